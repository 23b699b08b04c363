"""One function per published loss: tensors in, a scalar out. All is float32, also under autocast.

Under torchrun every loss is scaled so that the mean of its gradients over the processes, which DDP
forms, equals the gradient of one process that sees the joint batch. Only `cluda`, `cluda_two` and
`t2s` differ: they compare a pixel with those of its own process.
"""
import functools
import math

import torch
import torch.distributed as dist

from kernels import IGNORE, pixel_nce, upsample_cross_entropy


def without_autocast(function):
    """The function in float32 also under autocast, which would take matrix products to bf16."""
    @functools.wraps(function)
    def in_float32(*args, **options):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **options)
    return in_float32


def mean_over_ranks(value):
    """The mean of a tensor over all processes, without gradient; of one process itself."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def cross_entropy(logits, label, weight=None):
    """The sum of the cross-entropy over the valid pixels, divided by the number of *all* pixels.

    This is the convention of the DAFormer family and of its released code. (F.cross_entropy divides
    by the number of valid pixels.)

    logits: float (B,K,h,w), upsampled on the way; label: uint8 (B,H,W), 255 ignored; weight: float
    (B,H,W) or None.
    """
    return upsample_cross_entropy(logits, label, weight, IGNORE)


def dyce(logits, label, hardest=0.2):
    """The cross-entropy of the hardest share of the labelled pixels, balanced between its classes.

    Dynamic cross-entropy: DyCE of SemiDAViL (Basak and Yin, CVPR 2025), eq. 9 as witnessed by its
    first released code. Over the hardest pixels, H,

        K^(w - 1) f_H^-w sum_c f_c^(w - 1) sum_{i in H, y_i = c} CE_i

    with f_H = |H|, f_c its pixels of class c, K the classes in it, and w = 1/2: half-way between
    the mean over H, w = 1, and the mean of the class means, w = 0. The factor of K is ours and
    keeps the scale of a mean.

    logits: float (B,K,h,w), upsampled on the way; label: uint8 (B,H,W), 255 ignored; hardest: in
    [0,1]. Selection and counts carry no gradient. Pixels as hard as the last one chosen are chosen
    too. No labelled pixel: 0 with a graph.
    """
    with torch.no_grad():
        values = upsample_cross_entropy(logits, label, None, IGNORE, "none")  # (B,H,W), >= 0
        valid = label != IGNORE
        # Floats >= 0 have the order of their bits read as integers.
        bits = torch.where(valid, values.contiguous().view(torch.int32), -1)
        wanted = (hardest * mean_over_ranks(valid.sum().float())).clamp(min=1)

        # The hardness of rank `wanted` over all processes, found bit by bit from the highest: no
        # sorting and no host sync, at the price of 31 all-reduces of one number in each call.
        least = torch.zeros_like(bits[0, 0, 0])
        for bit in reversed(range(31)):
            trial = least + 2 ** bit
            count = mean_over_ranks((bits >= trial).sum().float())
            least = torch.where(count >= wanted, trial, least)
        chosen = (valid & (bits >= least)).float()

        # Whole numbers, so that a sum in any order is exact.
        counts = chosen.new_zeros(256).scatter_add_(0, label.flatten().long(), chosen.flatten())
        counts = mean_over_ranks(counts)  # f_c, (256,)
        classes = (counts > 0).sum()
        by_class = (counts * classes).clamp(min=1e-6) ** 0.5
        share = by_class * counts.sum().clamp(min=1e-6) ** 0.5
        weight = chosen / share[label.long()]  # (B,H,W)
    return upsample_cross_entropy(logits, label, weight, IGNORE) * label.numel()


def consistency(logits, pseudo, trusted, valid):
    """The cross-entropy against a teacher's labels where they are trusted, over all valid pixels.

    SemiDAViL's eq. 4 with the divisor of UniMatch. logits: float (B,K,h,w) of the strong view,
    upsampled on the way; pseudo: uint8 (B,H,W); trusted, valid: bool (B,H,W). Nothing trusted: 0
    with a graph.
    """
    count = mean_over_ranks(valid.sum().float()).clamp(min=1e-6)
    weight = (trusted & valid).float()
    return upsample_cross_entropy(logits, pseudo, weight, IGNORE) * (pseudo.numel() / count)


def feature_distance(features, reference, label, things):
    """The mean L2 norm of f - f_ImageNet over the cells of thing classes.

    The thing-class feature distance of DAFormer (Hoyer et al., 2022).

    features, reference: float (B,C,h,w), the last stage of the student and of the frozen ImageNet
    network; label: int (B,h,w), 255 where no class has the majority; things: class indices, a
    tensor or a list. Without a thing cell it is 0 with a graph. (The reference code has NaN there,
    and one backward for all terms would lose the step.)
    """
    keep = torch.isin(label, torch.as_tensor(things, device=label.device))
    difference = features.float() - reference.float()
    distance = torch.linalg.vector_norm(difference, dim=1)  # (B,C,h,w) -> (B,h,w)
    count = mean_over_ranks(keep.sum().float())
    return (distance * keep).sum() / count.clamp(min=1e-6)


class ClassShares(torch.nn.Module):
    """The running share of the labelled pixels that each class has, and what it adds to logits.

    Logit adjustment (Menon et al., ICLR 2021, equation 10): trained on logits + tau * log(share),
    a network leaves to that term, with tau 1 all of it, how frequent a class is. Its own logits,
    with which it predicts, give rare classes more.
    """

    def __init__(self, num_classes, momentum=0.99):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("share", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def update(self, label):
        """label: uint8 of any shape, 255 left out; without any other the shares stay."""
        classes = torch.arange(len(self.share), device=label.device)
        count = (label.flatten()[:, None] == classes).sum(0)  # (N,1) against (K,) -> (K,)
        count = mean_over_ranks(count.float())
        new = count / count.sum().clamp(min=1e-6)
        moved = self.momentum * self.share + (1 - self.momentum) * new
        self.share.copy_(torch.where(count.sum() > 0, moved, self.share))

    def offset(self, tau):
        """tau * log(share), float (K,); shares below 1e-4 count as that."""
        return tau * self.share.clamp(min=1e-4).log()


# ---- contrast: rows are unit vectors, one per cell of a coarse grid, label 255 takes no part ----


def _one_hot(label, num_classes):
    """Integers (N,) -> float32 (N,K), a row of zeros for 255.

    Sums over it repeat bit for bit; scatter_add on a GPU would not.
    """
    return (label[:, None] == torch.arange(num_classes, device=label.device)).float()


def _anchors(label):
    """How many cells of labels (N,) have a positive and a negative, a mean over the processes."""
    count = _one_hot(label, IGNORE).sum(0)  # (255,)
    counted = (count * ((count > 1) & (count < count.sum()))).sum()
    return mean_over_ranks(counted).clamp(min=1e-6)


def cluda(rows, label, weight=None, tau=0.1):
    """The mean contrast among the cells of one pass (CLUDA, Vayyat et al., 2022).

    CLUDA contrasts those of both domains: train.py adds one for the source and one for the ClassMix
    image, which holds parts of both.

    The per-positive InfoNCE of ContrastiveSeg (Wang et al., ICCV 2021), itself excluded, averaged
    over all cells that have a positive and a negative.

    rows: unit float (N,C), gradient on both sides; label: int (N,), 255 = takes no part; weight:
    float (N,), a pair weighs the product; tau: temperature (the released code's is 1 in effect).
    Released code with two images pairs rows with labels of other cells and takes 255 for a class;
    here rows and labels share one order. Pairs are formed within a process: two processes of B
    images contrast fewer pairs than one of 2B.
    """
    value = pixel_nce(
        rows, rows, label, label, weight, weight, tau, "per_positive", exclude_self=True
    )
    return value.sum() / _anchors(label)


def cluda_two(rows, detail, label, gate, window, weight=None, tau=0.1):
    """CLUDA's learned-weighted contrast of two resolutions (Vayyat et al., 2022), as rebuilt.

    A cell of the context that lies in the detail crop is contrasted twice: with the context's cells
    (R, a row of `cluda`) and with the crop's detail cells (T). Its gate q weighs the two, q * R +
    (1 - q) * T; outside of the crop it is R alone. The mean is over the cells that cluda counts;
    with q = 1 the value is cluda's. A learned gate falls where T is the smaller of the two, and
    nothing else holds it: watch its mean. T has fewer keys, those of the crop, and so is the
    smaller one even where both resolutions have the same features.

    rows: unit float (B,h,w,C), the context's cells; detail: unit float (B,a,b,C), the same cells of
    the crop seen at full size; both with gradient. label: int (B,h,w), 255 = takes no part; gate:
    float (B,a,b), from 0 to 1; window: index of the crop in (B,h,w), in cells; weight: float
    (B,h,w), a pair weighs the product; tau: temperature. The cell at the same place is nobody's
    key at either resolution.

    The released code (no temperature, weight 1) differs in what are taken for its faults: with two
    images rows meet labels of other cells, 255 is a class, road counts as outside of the crop, and
    there the missing detail enters as keys of zeros, which drive the gate. It gates a pair by q_i *
    q_j; here by the anchor's q_i, which needs no gradient through keys' weights.
    """
    if weight is None:
        weight = torch.ones(label.shape, device=label.device)

    def contrast(anchors, keys, where):  # an index of cells; ... is all of them
        y = label[where].flatten()  # (B,a,b) -> (n,)
        w = weight[where].flatten()
        values = pixel_nce(
            anchors.flatten(0, 2), keys.flatten(0, 2), y, y, w, w, tau, "per_positive",
            exclude_self=True
        )
        return values.view(anchors.shape[:3])  # (n,) -> (B,a,b)

    own = contrast(rows, rows, ...)  # R, (B,h,w)
    across = contrast(rows[window], detail, window)  # T, (B,a,b)
    total = own.sum() + ((1 - gate) * (across - own[window])).sum()
    return total / _anchors(label.flatten())


@without_autocast
def t2s(queries, label, keys, key_label, class_weight, tau=0.1):
    """The InfoNCE of restyled source pixels against all of the clean source's.

    It pulls target to source, after T2S-DA (Wang et al., 2023), as reconstructed: the mean within
    each class first, then over the classes by their weight.

    queries: unit float (N,C) of the student; keys: unit (M,C) of the teacher, detached here: only
    the queries move; label (N,), key_label (M,): int, 255 = takes no part; class_weight: float
    (K,); tau: temperature. Keys are those of the process: two processes of B images compare fewer
    pairs than one of 2B.
    """
    value = pixel_nce(queries, keys.detach(), label, key_label, tau=tau, form="supcon")
    hot = _one_hot(label, len(class_weight))  # (N,K)
    known = _one_hot(key_label, len(class_weight)).sum(0)  # (K,), keys of each class
    contrasts = (known > 0) & (known < known.sum())  # (K,), classes with both kinds of keys
    count = mean_over_ranks(hot.sum(0) * contrasts)
    total = value @ hot  # (N,) -> (K,)
    weight = class_weight * (count > 0)
    return (weight * total / count.clamp(min=1e-6)).sum() / weight.sum().clamp(min=1e-6)


@without_autocast
def sepico(rows, label, gaussians, tau=100.0):
    """The mean contrast with infinitely many samples of each class's Gaussian, in closed form.

    SePiCo (Xie et al., TPAMI 2023), DistCL, after its released code: the mean over the rows of

        log sum_c exp(x.mu_c / tau + x^2.var_c / (2 tau^2)) - x.mu_y / tau

    plus its regulariser, sum_c log p_c / (K log K), p the softmax of mean(x).mu_c / tau. That is -1
    where p is even and less elsewhere: the sign is the released code's. A class without statistics
    has the mean 0, in the sum and as positive.

    rows: unit float (N,C); label: int (N,), 255 = takes no part; gaussians: ClassGaussians of the
    teacher's rows of the source; tau: temperature, published 100. With unit rows that is nearly
    inert, because the exponents differ by 0.01 at most.

    Around it train.py differs from the released code in this: crops of the target are not drawn
    for balanced pseudo-labels, and the teacher's look at the source leaves its BatchNorm alone.
    """
    rows = rows.float()
    mean, variance = gaussians.moments()
    classes = len(mean)
    logits = rows @ mean.t() / tau + rows.square() @ variance.t() / (2 * tau ** 2)  # (N,K)
    counted = (label != IGNORE).float()
    number = mean_over_ranks(counted.sum())
    positive = (rows * mean[label.long().clamp(max=classes - 1)]).sum(1) / tau  # (N,)
    value = (logits.logsumexp(1) - positive) * counted
    contrast = value.sum() / number.clamp(min=1e-6)

    # the mean row of all processes, with the gradient of this one's rows
    total = counted @ rows  # (N,) x (N,C) -> (C,)
    joint = mean_over_ranks(total.detach()) + (total - total.detach())
    similarity = mean @ (joint / number.clamp(min=1e-6)) / tau  # (K,)
    scale = max(1.0, classes * math.log(classes))
    regulariser = similarity.log_softmax(0).sum() / scale
    return contrast + regulariser * (number > 0)


class ClassConfidence(torch.nn.Module):
    """The running mean of the teacher's confidence per predicted class, and class weights from it.

    After T2S-DA, as reconstructed; the form is that of AEL (Hu et al., NeurIPS 2021), whose
    momentum is 0.999. A short run needs a smaller one, to forget its untrained teacher in time.
    """

    def __init__(self, num_classes, momentum=0.999):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("confidence", torch.zeros(num_classes))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    @without_autocast
    def update(self, label, confidence):
        """label: int of any shape, 255 left out; confidence: float of that shape, in [0,1]."""
        hot = _one_hot(label.flatten(), len(self.seen))
        sums = torch.stack([confidence.flatten().float() @ hot, hot.sum(0)])  # (2,K)
        total, count = mean_over_ranks(sums)
        new = total / count.clamp(min=1e-6)
        step = torch.where(self.seen, 1 - self.momentum, 1.0)  # the first value is taken whole
        moved = self.confidence.lerp(new, step)
        self.confidence.copy_(torch.where(count > 0, moved, self.confidence))
        self.seen |= count > 0

    def weights(self, beta=0.5):
        """((1 - conf_c) / max_k (1 - conf_k))^beta, float (K,).

        It is 1, the largest, for a class never predicted.
        """
        doubt = 1 - self.confidence
        largest = torch.where(self.seen, doubt, 0).max().clamp(min=1e-6)
        return torch.where(self.seen, doubt / largest, 1).pow(beta)


class ClassGaussians(torch.nn.Module):
    """The mean and diagonal variance of each class's rows over the whole history (SePiCo)."""

    def __init__(self, num_classes, channels):
        super().__init__()
        self.register_buffer("count", torch.zeros(num_classes))  # rows, the mean over processes
        self.register_buffer("powers", torch.zeros(2, num_classes, channels))  # means of x and x^2

    @torch.no_grad()
    @without_autocast
    def update(self, rows, label):
        """rows: unit float (N,C); label: int (N,), 255 left out."""
        rows = rows.float()
        hot = _one_hot(label, len(self.count))
        total = mean_over_ranks(hot.t() @ torch.stack([rows, rows.square()]))  # (2,K,C)
        count = mean_over_ranks(hot.sum(0))  # (K,)
        self.count += count
        share = count / self.count.clamp(min=1e-6)  # of all rows so far
        self.powers.lerp_(total / count.clamp(min=1e-6)[:, None], share[:, None])

    def moments(self):
        """-> mean (K,C), variance (K,C); zeros for a class without a row."""
        mean, square = self.powers  # (K,C) each
        return mean, (square - mean.square()).clamp(min=0)
