"""Four fused operators, each with a Triton path for GPUs and a torch path of the same meaning.

    python kernels.py        compares both paths with float64 and times them against plain torch

Why they exist: plain torch forms a tensor that is much larger than what goes in and what comes out.

    operator                   what plain torch forms, and none of this file does
    upsample_cross_entropy     the logits of every pixel (B,K,H,W), their softmax and its gradient
    upsample_pseudo_label      the logits of every pixel and their softmax
    text_correlation           a copy of the features (B,C,h,w) whose vectors have unit length
    pixel_nce                  the logits of every pair of pixels (N,M), a mask and their softmax

The torch path is the specification. It works through the input in chunks, and a chunk is sized by
its largest temporary: 2**18 to 2**20 floats on a CPU, which fit its cache, 2**23 to 2**25 on a
GPU, which keep it busy. The four public functions at the end hold the contract; plain torch,
which the tests and the bench compare with, stands behind them.

The Triton path, for those who know PyTorch alone. A kernel is a function that runs many times at
once, each time as one *program*. tl.program_id says which tile of the result a program owns. What
looks like a variable is a small tensor, a tile, that lives in registers. tl.load and tl.store
move a tile from and to the GPU's memory: pointer + offsets, and a mask of the elements that
exist. A tl.constexpr is known when the kernel is compiled. Every number in memory is written by
one program only, in an order of sums that does not depend on which program runs first (no
atomics): results repeat bit for bit.

backend="auto" takes Triton for CUDA tensors where the triton package imports, and torch
otherwise. Triton's interpreter (TRITON_INTERPRET=1, set before this file is imported) runs the
same kernels on CPU tensors: slowly, for tests.

A *cell* is a position of the low-resolution logits (h,w), a *pixel* one of the labels (H,W). Every
position of text_correlation's features is a pixel, and so is every row of pixel_nce's q and k.
"""
import argparse
import functools
import os
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the torch path does it all
    triton = None

IGNORE = 255  # the label of pixels that take part in nothing
NOBODY = 2**62  # stands for label 255 where pixels are sorted: behind every other
EPS = 1e-6  # of a cosine: every vector x is divided by sqrt(|x|^2 + EPS^2)

# Sizes of tiles. The interpreter pays for each tile, a GPU for what its registers cannot hold.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TILE_PIXELS = 1024 if INTERPRET else 256
TILE_CELLS = 256 if INTERPRET else 64
# pixel_nce, by the number of channels: (own pixels, pixels of the other side)
NCE_TILES_BF16 = {64: (128, 128), 128: (128, 128), 256: (128, 64), 512: (64, 32)}
NCE_TILES_FLOAT32 = {64: (64, 64), 128: (64, 32), 256: (64, 32), 512: (16, 32)}
# Partial sums of the text's gradient: a fixed number, so that results do not depend on the GPU.
RUNS = 64


def _use_triton(tensor, backend):
    """Whether the Triton path takes the call; an error where it is asked for and cannot."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend is '{backend}', it must be 'auto', 'triton' or 'torch'")
    if backend == "auto":
        return tensor.is_cuda and triton is not None
    if backend == "torch":
        return False
    if triton is None:
        raise RuntimeError(
            "backend='triton' needs the triton package (pip install triton); "
            "'torch' computes the same"
        )
    if not (tensor.is_cuda or INTERPRET):
        raise RuntimeError(
            "backend='triton' needs CUDA tensors, or TRITON_INTERPRET=1 before kernels.py "
            "is imported"
        )
    return True


def _budget(tensor, on_cpu, elsewhere):
    """Elements of a chunk's largest temporary: fit a CPU's cache, keep a GPU busy."""
    if tensor.device.type == "cpu":
        return on_cpu
    return elsewhere


# ---- bilinear interpolation along one axis, align_corners=False: the tables both paths share ----


class Axis(NamedTuple):
    """Where the pixels of one axis lie between its cells."""

    first: torch.Tensor  # (full,) int32: lower cell of a pixel; the upper is the next, or the same
    fraction: torch.Tensor  # (full,) float32 in [0, 1): weight of the upper cell
    matrix: torch.Tensor  # (full, low) float32, both weights of a pixel: pixels = matrix @ cells
    start: torch.Tensor  # (low,) int32: first pixel that a cell takes part in
    window: int  # the largest number of pixels that one cell takes part in
    reach: list  # per pixel (lower cell, upper cell + 1), Python numbers


@functools.lru_cache(maxsize=32)
def _axis(low, full, device):
    """The Axis from `low` cells to `full` pixels, its tensors on the device."""
    # The centre of pixel i, measured in cells. Before the first centre of a cell nothing changes.
    position = (torch.arange(full, dtype=torch.float64) + 0.5) * (low / full) - 0.5
    position = position.clamp_(min=0)
    first = position.long()
    second = (first + 1).clamp_(max=low - 1)
    fraction = position - first

    matrix = torch.zeros(full, low, dtype=torch.float64)
    matrix = matrix.scatter_add_(1, first[:, None], 1 - fraction[:, None])
    matrix = matrix.scatter_add_(1, second[:, None], fraction[:, None])
    touched = matrix > 0  # (full, low): one run of pixels per cell, empty if no pixel looks at it

    return Axis(
        first=first.int().to(device),
        fraction=fraction.float().to(device),
        matrix=matrix.float().to(device),
        start=touched.int().argmax(0).int().to(device),
        window=int(touched.sum(0).max()),
        reach=list(zip(first.tolist(), (second + 1).tolist())),
    )


@functools.lru_cache(maxsize=32)
def _axis_in_two_steps(low, middle, full, device):
    """The Axis from `low` cells to `middle` and from there to `full` pixels, for the torch path.

    A step is a matrix along each axis, and so are two: their product.
    """
    near = _axis(low, middle, device)
    far = _axis(middle, full, device)
    reach = [(near.reach[a][0], near.reach[b - 1][1]) for a, b in far.reach]
    matrix = far.matrix @ near.matrix  # (full,middle) x (middle,low) -> (full,low)
    return Axis(None, None, matrix, None, None, reach)


# ---- torch path of upsampling: two small matrix products, one chunk of pixel rows at a time ----


class Chunk(NamedTuple):
    """Some rows of pixels of some images, and what their gradient needs to find its way back."""

    images: slice
    rows: slice  # of pixels
    cells: slice  # the rows of cells that these rows of pixels look at
    row_matrix: torch.Tensor  # (r,c): pixels' rows from cells' rows
    column_matrix: torch.Tensor  # (W,w): pixels' columns from cells' columns
    up: torch.Tensor  # (b,K,r,W) float32: the upsampled logits, to be overwritten at will


def _upsampled_chunks(logits, size, via=None):
    """Yields Chunks that cover the upsampled logits (B,K,H,W), which are never there as a whole."""
    B, K, h, w = logits.shape
    H, W = size
    if via is None:
        row = _axis(h, H, logits.device)
        column = _axis(w, W, logits.device)
    else:
        row = _axis_in_two_steps(h, via[0], H, logits.device)
        column = _axis_in_two_steps(w, via[1], W, logits.device)

    # r rows of b images. At least 8: thin chunks would interpolate many rows of cells twice.
    budget = _budget(logits, 2**20, 2**23)  # of up
    r = min(H, max(8, budget // (K * W)))
    count = -(-H // r)  # rounded up
    r = -(-H // count)  # now all chunks are about equally high
    b = max(1, budget // (K * W * r))

    for i in range(0, B, b):
        for y in range(0, H, r):
            end = min(y + r, H)
            cells = slice(row.reach[y][0], row.reach[end - 1][1])
            row_matrix = row.matrix[y:end, cells]
            wide = logits[i : i + b, :, cells].float() @ column.matrix.t()  # (b,K,c,w) -> (b,K,c,W)
            up = row_matrix @ wide  # (b,K,c,W) -> (b,K,r,W)
            images = slice(i, i + b)
            yield Chunk(images, slice(y, end), cells, row_matrix, column.matrix, up)


def _torch_cross_entropy(logits, labels, weight, ignore_index, with_gradient):
    """Returns weight * CE (B,H,W), and the gradient of its sum (B,K,h,w) float32, or None."""
    value = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    gradient = torch.zeros_like(logits, dtype=torch.float32) if with_gradient else None
    # The matrix products interpolate: never in bf16.
    with torch.autocast(logits.device.type, enabled=False):
        for chunk in _upsampled_chunks(logits, labels.shape[1:]):
            label = labels[chunk.images, chunk.rows].unsqueeze(1).long()  # (b,1,r,W), as all below
            valid = (label != ignore_index) & (label >= 0) & (label < logits.shape[1])
            label = label.masked_fill(~valid, 0)
            scale = weight[chunk.images, chunk.rows].unsqueeze(1) * valid

            up = chunk.up  # (b,K,r,W)
            picked = up.gather(1, label)
            largest = up.amax(1, keepdim=True)
            exponential = up.sub_(largest).exp_()
            total = exponential.sum(1, keepdim=True)
            cross_entropy = total.log() + largest - picked
            value[chunk.images, chunk.rows] = (cross_entropy * scale).squeeze(1)

            if with_gradient:
                # scale * (softmax - one-hot), then the two products of the upsampling, transposed
                slope = exponential.mul_(scale / total).scatter_add_(1, label, -scale)
                slope = chunk.row_matrix.t() @ slope  # (b,K,r,W) -> (b,K,c,W)
                slope = slope @ chunk.column_matrix  # (b,K,c,W) -> (b,K,c,w)
                gradient[chunk.images, :, chunk.cells] += slope
    return value, gradient


def _torch_pseudo_label(logits, size, via=None):
    """Returns the label uint8 (B,H,W) and its softmax probability float32 (B,H,W)."""
    B, K = logits.shape[:2]
    label = torch.empty(B, *size, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(B, *size, dtype=torch.float32, device=logits.device)
    # K - 1 for class 0 down to 0: the largest rank among the largest logits is the lowest class.
    # On a CPU that takes a third of argmax's time.
    rank = torch.arange(K - 1, -1, -1, dtype=torch.uint8, device=logits.device).view(1, K, 1, 1)
    with torch.autocast(logits.device.type, enabled=False):
        for chunk in _upsampled_chunks(logits, size, via):
            largest = chunk.up.amax(1, keepdim=True)  # (b,1,r,W)
            label[chunk.images, chunk.rows] = K - 1 - (chunk.up.eq(largest) * rank).amax(1)
            total = chunk.up.sub_(largest).exp_().sum(1)  # (b,r,W); the largest adds exp(0) = 1
            confidence[chunk.images, chunk.rows] = total.reciprocal_()
    return label, confidence


# ---- torch path of the correlation: normalised after the product, one chunk at a time ----


def _feature_chunks(features):
    """Yields an image, a slice of its rows, and their features (C,n) as float32."""
    B, C, H, W = features.shape
    budget = _budget(features, 2**18, 2**23)  # of a chunk of features
    r = max(1, budget // (C * W))
    for i in range(B):
        for y in range(0, H, r):
            rows = slice(y, y + r)
            # (C,r,W) -> (C,n); a view where the features are float32
            yield i, rows, features[i, :, rows].float().flatten(1)


def _gradient_like(features):
    """An empty tensor of the features' shape and dtype, with channels last where theirs are."""
    layout = torch.channels_last if features.stride(1) == 1 else torch.contiguous_format
    return torch.empty(
        features.shape, dtype=features.dtype, device=features.device, memory_format=layout
    )


def _torch_correlation(features, rows):
    """Returns rows (K,C) @ feature / norm (B,K,H,W), and 1 / norm (B,H,W), both float32."""
    B, _, H, W = features.shape
    K = len(rows)
    value = torch.empty(B, K, H, W, dtype=torch.float32, device=features.device)
    inverse = torch.empty(B, H, W, dtype=torch.float32, device=features.device)
    for i, y, f in _feature_chunks(features):
        r = inverse[i, y].flatten()  # a view (n,), as that of value below is one (K,n)
        square = (f * f).sum(0)  # on a CPU ten times faster than vector_norm over planes
        torch.add(square, EPS**2, out=r).rsqrt_()
        # With out= autocast leaves the product in float32.
        torch.mm(rows, f, out=value[i, :, y].flatten(1)).mul_(r)
    return value, inverse


def _torch_correlation_gradient(features, rows, value, inverse, upstream):
    """Returns the gradients of (value * upstream).sum() to features, in their dtype, and to rows.

    The cosine is s = row . f / |f|, so ds/df = (row - s * f / |f|) / |f|: what points along the
    feature itself is taken away, as it changes no cosine.
    """
    gradient = _gradient_like(features)
    rows_gradient = torch.zeros_like(rows)  # (K,C) float32
    for i, y, f in _feature_chunks(features):
        r = inverse[i, y].flatten()  # (r,W) -> (n,)
        g = upstream[i, :, y].flatten(1) * r  # (K,r,W) -> (K,n)
        along = (g * value[i, :, y].flatten(1)).sum(0).mul_(r)  # (n,): how much of f to take away
        rows_gradient.addmm_(g, f.t())
        out = gradient[i, :, y].flatten(1)  # a view (C,n)
        work = out if out.dtype == torch.float32 else torch.empty_like(f)
        torch.mm(rows.t(), g, out=work).addcmul_(f, along, value=-1)
        out.copy_(work)  # onto itself where the features are float32: that copies nothing
    return gradient, rows_gradient


# ---- class-labelled InfoNCE: both sides sorted by label, so that positives are one range ----


class Sorted(NamedTuple):
    """One side of a contrast by label, and where its pixels' positives are on the other side.

    Example: labels 2 0 255 0 of one side and 0 2 2 of the other
        order   1 3 0 2        label 0 of pixels 1 and 3, then label 2, the ignored one last
        first   0 0 1 .        the range of the other side, sorted too: 0 | 2 2
        last    1 1 3 .
    """

    order: torch.Tensor  # (N,) int64: the pixels of this side, sorted by label, ignored ones last
    first: torch.Tensor  # (N,) int32: in the other side's order its label begins here
    last: torch.Tensor  # (N,) int32: and end before this
    own: torch.Tensor  # (N,) int32: where the pixel to be left out lies there, -1 if none
    count: torch.Tensor  # 0-d int64: how many are not ignored; stays on the device


def _sorted_side(label, order, other_label, other_order, exclude_self):
    """Sorted labels (N,) and the order that sorted them, of both sides -> Sorted of the first."""
    if exclude_self:
        own = other_order.argsort()[order]
    else:
        own = torch.full_like(order, -1)
    # An ignored pixel is out already.
    own = own.masked_fill(own >= (other_label < NOBODY).sum(), -1)
    first = torch.searchsorted(other_label, label)
    last = torch.searchsorted(other_label, label, right=True)
    return Sorted(order, first.int(), last.int(), own.int(), (label < NOBODY).sum())


@torch.no_grad()
def _sort_by_label(yq, yk, exclude_self):
    """Returns Sorted queries, Sorted keys, and 1 / |P| of each sorted query.

    The labels are int64, NOBODY where ignored. A query without a positive or without a negative
    has 0.
    """
    label, order = yq.sort(stable=True)
    key_label, key_order = yk.sort(stable=True)
    queries = _sorted_side(label, order, key_label, key_order, exclude_self)
    keys = _sorted_side(key_label, key_order, label, order, exclude_self)

    left_out = queries.own >= 0
    own_is_positive = left_out & (queries.own >= queries.first) & (queries.own < queries.last)
    positives = queries.last - queries.first - own_is_positive.int()
    negatives = keys.count - left_out.int() - positives
    contrasts = (label < NOBODY) & (positives > 0) & (negatives > 0)
    return queries, keys, contrasts / positives.clamp(min=1)


def _torch_nce(q, k, queries, keys, scale, wk, tau, per_positive, q_gradient, k_gradient):
    """Returns value * scale, the gradients of its sum to q and to k or None each, and ().

    q (N,C), k (M,C) as given; scale (N,) and wk (M,) sorted. What is returned is in the sorted
    order and holds the pixels that are not ignored. (): here the Triton path hands something on to
    its backward.

    A chunk is some of the n sorted queries against all m sorted keys. One letter a class:

             keys   a a a b b b b c c c d d d d
        queries b   - - - + + + + - - - - - - -      + positive, - negative
                b   - - - + + + + - - - - - - -
                c   - - - - - - - + + + - - - -
                          '--- near --'              the columns with a positive alone need masks
    """
    q = q[queries.order[: queries.count]].float() / tau  # (n,C)
    k = k[keys.order[: keys.count]].float()  # (m,C)
    scale = scale[: len(q), None]  # (n,1), as the next three
    first = queries.first[: len(q), None]
    last = queries.last[: len(q), None]
    own = queries.own[: len(q), None]
    low = torch.where(own < 0, first, torch.minimum(first, own))  # first column to look at closely
    high = torch.maximum(last, own + 1)  # and the one after the last

    value = q.new_zeros(len(q))
    scaled = q * scale
    gradient = torch.zeros_like(q) if q_gradient else None
    key_gradient = torch.zeros_like(k) if k_gradient else None

    budget = _budget(q, 2**19, 2**25)  # of a chunk's logits
    r = max(64, budget // max(1, len(k)))
    contrasted = len(q) if len(k) > 0 else 0
    for begin in range(0, contrasted, r):
        rows = slice(begin, begin + r)
        near = slice(int(low[rows].min()), int(high[rows].max()))
        column = torch.arange(near.start, near.stop, dtype=torch.int32, device=q.device)
        hidden = column == own[rows]  # (r,c), as the next two
        positive = (column >= first[rows]) & (column < last[rows]) & ~hidden
        slope = torch.where(positive, wk[near], 0.0)  # d value / d margin of each pair

        # The normaliser: over the negatives, or over all keys but itself.
        s = torch.mm(q[rows], k.t())  # (r,m)
        block = s[:, near]  # a view (r,c)
        margin = block.clone()
        block.masked_fill_(hidden | positive if per_positive else hidden, float("-inf"))
        largest = s.amax(1, keepdim=True).clamp_(min=-1e30)  # finite if all is hidden
        total = s.sub_(largest).exp_().sum(1, keepdim=True).clamp_(min=1)

        # The loss of each positive: the normaliser less its own logit.
        torch.sub(largest + total.log(), margin, out=margin)
        loss = F.softplus(margin) if per_positive else margin
        value[rows] = (slope * loss).sum(1)
        if not (q_gradient or k_gradient):
            continue

        # s becomes d value / d logits: the pull of a positive is shared among its competitors.
        if per_positive:
            slope.mul_(margin.sigmoid_())
        s.mul_(slope.sum(1, keepdim=True) / total)
        block.sub_(slope)
        if q_gradient:
            torch.mm(s, k, out=gradient[rows])
        if k_gradient:
            key_gradient.addmm_(s.t(), scaled[rows])

    if q_gradient:
        gradient.mul_(scale / tau)
    return value * scale[:, 0], gradient, key_gradient, ()


def _torch_nce_gradient(*arguments):
    """Returns the sorted gradient to k alone. Arguments: those of _torch_nce but the last two."""
    return _torch_nce(*arguments, False, True)[2]


# ---- Triton path: the kernels. Every program owns what it writes ----

if triton is not None:

    @triton.jit
    def _bilinear(pointer, down, across, fraction_y, fraction_x, mask):
        """The value between four cells: that at the pointer, the next across, down, and both."""
        # float32 at once: the interpreter has no bf16
        here = tl.load(pointer, mask=mask, other=0).to(tl.float32)
        right = tl.load(pointer + across, mask=mask, other=0).to(tl.float32)
        below = tl.load(pointer + down, mask=mask, other=0).to(tl.float32)
        corner = tl.load(pointer + down + across, mask=mask, other=0).to(tl.float32)
        upper = here * (1 - fraction_x) + right * fraction_x
        lower = below * (1 - fraction_x) + corner * fraction_x
        return upper * (1 - fraction_y) + lower * fraction_y

    @triton.jit
    def _pixel_kernel(
        logits, K, h, w, H, W, first_y, fraction_y, first_x, fraction_x, labels, weight,
        ignore_index, value, normalizer, LABELED: tl.constexpr, TILE: tl.constexpr,
    ):
        """Cross-entropy (LABELED) or pseudo-label of upsampled logits, TILE pixels a program.

        Grid (tiles of pixels, images). The pixels of an image as they lie in memory, by class:

                         program 0       program 1     2
            class 0   |.............|.............|......
                  1   |.............|.............|......     a program goes down through the
                  :   |      |      |      |      |           classes; in registers it keeps the
                K-1   |      v      |      v      |           largest logit of each of its pixels,
                                                              its class, and the sum of exponentials

        Each logit is interpolated from four cells when its turn comes and forgotten then. The
        softmax is made "online": where a larger logit appears the sum so far is scaled down to it.
        LABELED: writes weight * CE to value, and the logsumexp, which _cell_kernel reads, to
        normalizer. Otherwise: writes the class to labels and its probability to value.
        """
        image = tl.program_id(1).to(tl.int64)  # int64: B*K*h*w and B*H*W may pass 2**31
        pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = pixel < H * W
        y = pixel // W
        x = pixel % W
        y0 = tl.load(first_y + y, mask=inside, other=0)
        fy = tl.load(fraction_y + y, mask=inside, other=0)
        x0 = tl.load(first_x + x, mask=inside, other=0)
        fx = tl.load(fraction_x + x, mask=inside, other=0)
        down = tl.where(y0 + 1 < h, w, 0)  # at the border the next cell is the cell itself
        across = tl.where(x0 + 1 < w, 1, 0)

        corner = logits + image * K * h * w + y0 * w + x0  # of class 0
        plane = corner
        best = tl.zeros([TILE], tl.int32)
        total = tl.zeros([TILE], tl.float32)
        largest = tl.full([TILE], float("-inf"), tl.float32)
        for k in range(K):
            z = _bilinear(plane, down, across, fy, fx, inside)
            plane += h * w
            best = tl.where(z > largest, k, best)  # > and not >=: the lowest class among equals
            new_largest = tl.maximum(largest, z)
            total = total * tl.exp(largest - new_largest) + tl.exp(z - new_largest)
            largest = new_largest

        at = image * H * W + pixel
        if LABELED:
            label = tl.load(labels + at, mask=inside, other=0).to(tl.int32)
            valid = inside & (label != ignore_index) & (label >= 0) & (label < K)
            picked = _bilinear(corner + label.to(tl.int64) * h * w, down, across, fy, fx, valid)
            lse = largest + tl.log(total)
            scale = tl.load(weight + at, mask=valid, other=0)
            tl.store(value + at, tl.where(valid, (lse - picked) * scale, 0.0), mask=inside)
            tl.store(normalizer + at, lse, mask=inside)
        else:
            tl.store(labels + at, best.to(tl.uint8), mask=inside)
            tl.store(value + at, 1 / total, mask=inside)

    @triton.jit
    def _cell_kernel(
        logits, K, h, w, H, W, first_y, fraction_y, matrix_y, start_y, window_y,
        first_x, fraction_x, matrix_x, start_x, window_x, labels, weight, ignore_index,
        normalizer, gradient, TILE: tl.constexpr, TILE_K: tl.constexpr,
    ):
        """The gradient of the cross-entropy to the logits, TILE cells x TILE_K classes a program.

        Grid (tiles of cells, images, tiles of classes). Upsampling by two; o is a cell, . a pixel:

            . . . . . . . .
            . . x x x x . .      The cell gathers from its window, the pixels x. Each x gives
            . . x x x x . .      share * weight * (softmax - one-hot), where share is the cell's
                   o             part in the pixel's logits. The softmax is made again from the
            . . x x x x . .      logits and the normalizer that _pixel_kernel has written.
            . . x x x x . .
            . . . . . . . .

        The other way round, every pixel adding to its four cells, would need atomics. This way a
        pixel is computed four times, but one program sums up all of a cell, in the order of its
        window, in registers, and writes it once: it repeats bit for bit.
        """
        image = tl.program_id(1).to(tl.int64)
        cell = tl.program_id(0) * TILE + tl.arange(0, TILE)
        k = tl.program_id(2) * TILE_K + tl.arange(0, TILE_K)[None, :]  # (1,TILE_K)
        owned = cell < h * w
        begin_y = tl.load(start_y + cell // w, mask=owned, other=0)
        begin_x = tl.load(start_x + cell % w, mask=owned, other=0)
        plane = (image * K + k) * h * w  # (1,TILE_K)
        result = tl.zeros([TILE, TILE_K], tl.float32)

        # All cells of the tile go through their windows in step.
        for step_y in range(window_y):
            y = begin_y + step_y
            in_y = owned & (y < H)
            y0 = tl.load(first_y + y, mask=in_y, other=0)
            fy = tl.load(fraction_y + y, mask=in_y, other=0)
            share_y = tl.load(matrix_y + y * h + cell // w, mask=in_y, other=0)  # 0 past the window
            down = tl.where(y0 + 1 < h, w, 0)
            for step_x in range(window_x):
                x = begin_x + step_x
                used = in_y & (x < W)
                x0 = tl.load(first_x + x, mask=used, other=0)
                fx = tl.load(fraction_x + x, mask=used, other=0)
                share = share_y * tl.load(matrix_x + x * w + cell % w, mask=used, other=0)
                across = tl.where(x0 + 1 < w, 1, 0)

                at = image * H * W + y * W + x
                label = tl.load(labels + at, mask=used, other=0).to(tl.int32)
                used = used & (label != ignore_index) & (label >= 0) & (label < K)
                share = share * tl.load(weight + at, mask=used, other=0)  # 0 where ignored
                lse = tl.load(normalizer + at, mask=used, other=0)

                z = _bilinear(
                    logits + plane + (y0 * w + x0)[:, None], down[:, None], across[:, None],
                    fy[:, None], fx[:, None], used[:, None] & (k < K),
                )  # (TILE,TILE_K)
                softmax = tl.exp(z - lse[:, None])
                one_hot = tl.where(label[:, None] == k, 1.0, 0.0)
                result += share[:, None] * (softmax - one_hot)
        tl.store(gradient + plane + cell[:, None], result, mask=owned[:, None] & (k < K))

    @triton.jit
    def _offset(pixel, W, at_y, at_x, channel, at_channel):
        """Where pixels and channels lie in an image of any strides, int64 (pixels, channels)."""
        # int64: C*H*W may pass 2**31
        plane = (pixel // W).to(tl.int64) * at_y + (pixel % W).to(tl.int64) * at_x
        return plane[:, None] + channel.to(tl.int64)[None, :] * at_channel

    @triton.jit
    def _correlation_kernel(
        features, at_image, at_channel, at_y, at_x, rows, C, K, W, pixels, value, inverse,
        EPS2: tl.constexpr, PRECISION: tl.constexpr,
        TILE: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr,
    ):
        """Dot products of TILE pixels with all rows, divided by the norms of the pixels.

        Grid (tiles of pixels, images). at_*: the strides of the features, which are never copied.

                        C channels                K classes
                     +-----+-----+-----+           +---+
            TILE     |  0  |  1  |  2  |           | 0 |       steps 0, 1, 2 of TILE_C channels;
            pixels   +-----+-----+-----+           | 1 |       dots += features of a step @ rows
                          features                 | 2 |
                                                   +---+ rows, transposed

        One sweep over the channels. Registers hold the sums, dots (TILE,TILE_K) and square
        (TILE,); the division comes last, so that normalised features exist nowhere. Each program
        writes value and 1 / norm of its pixels, and sums up over channels in their order.
        """
        image = tl.program_id(1).to(tl.int64)
        pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
        k = tl.arange(0, TILE_K)
        inside = (pixel < pixels)[:, None]
        known = (k < K)[None, :]
        dots = tl.zeros([TILE, TILE_K], tl.float32)
        square = tl.zeros([TILE], tl.float32)

        for begin in range(0, C, TILE_C):
            c = begin + tl.arange(0, TILE_C)
            used = inside & (c < C)[None, :]
            at = features + image * at_image + _offset(pixel, W, at_y, at_x, c, at_channel)
            f = tl.load(at, mask=used, other=0)  # (TILE,TILE_C)
            used = (c < C)[:, None] & known
            row = tl.load(rows + k[None, :] * C + c[:, None], mask=used, other=0)  # (TILE_C,TILE_K)
            exact = f.to(tl.float32)
            square += tl.sum(exact * exact, 1)
            dots = tl.dot(f.to(row.dtype), row, dots, input_precision=PRECISION)

        r = tl.rsqrt(square + EPS2)
        tl.store(inverse + image * pixels + pixel, r, mask=pixel < pixels)
        used = inside & known
        at = value + (image * K + k[None, :]) * pixels + pixel[:, None]
        tl.store(at, dots * r[:, None], mask=used)

    @triton.jit
    def _correlation_gradient_kernel(
        features, at_image, at_channel, at_y, at_x, rows, B, C, K, W, pixels, value, inverse,
        upstream, gradient, to_image, to_channel, to_y, to_x, partial, tiles, steps,
        PRECISION: tl.constexpr, TILE: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr,
    ):
        """Both gradients of the correlation: TILE_C channels of every n-th tile a program.

        Grid (tiles of channels, n). tiles: of one image; the images stand one behind the other
        here, with steps * n tiles in all. at_*, to_*: the strides of the features and of their
        gradient. With n = 3 and one letter a program:

                            tiles of pixels -->
            channels 0..  | A | B | C | A | B | C | A |     A reads its features once and writes
                    64..  | D | E | F | D | E | F | D |     their gradient tile by tile. Registers
                   128..  | G | H | I | G | H | I | G |     hold its channels of the rows and a sum
                                                            for them, both (TILE_K,TILE_C).

        In the end a program writes its sum to partial (n,K,C), which torch adds up over n. As n
        does not depend on the GPU, neither does the order of any sum.
        """
        c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
        k = tl.arange(0, TILE_K)
        owned = (k < K)[:, None] & (c < C)[None, :]
        row = tl.load(rows + k[:, None] * C + c[None, :], mask=owned, other=0)  # (TILE_K,TILE_C)
        share = tl.zeros([TILE_K, TILE_C], tl.float32)

        for step in range(steps):
            tile = step * tl.num_programs(1) + tl.program_id(1)
            image = (tile // tiles).to(tl.int64)
            pixel = tile % tiles * TILE + tl.arange(0, TILE)
            inside = (pixel < pixels) & (image < B)

            # As in _torch_correlation_gradient; here a pixel is a row.
            r = tl.load(inverse + image * pixels + pixel, mask=inside, other=0)
            plane = (image * K + k[None, :]) * pixels + pixel[:, None]  # (TILE,TILE_K)
            known = inside[:, None] & (k < K)[None, :]
            g = tl.load(upstream + plane, mask=known, other=0) * r[:, None]
            along = tl.sum(g * tl.load(value + plane, mask=known, other=0), 1) * r  # (TILE,)
            used = inside[:, None] & (c < C)[None, :]
            at = features + image * at_image + _offset(pixel, W, at_y, at_x, c, at_channel)
            f = tl.load(at, mask=used, other=0)  # (TILE,TILE_C)
            g = g.to(row.dtype)
            share = tl.dot(tl.trans(g), f.to(row.dtype), share, input_precision=PRECISION)
            d = tl.dot(g, row, input_precision=PRECISION) - f.to(tl.float32) * along[:, None]
            to = gradient + image * to_image + _offset(pixel, W, to_y, to_x, c, to_channel)
            tl.store(to, d.to(gradient.dtype.element_ty), mask=used)

        to = partial + (tl.program_id(1).to(tl.int64) * K + k[:, None]) * C + c[None, :]
        tl.store(to, share, mask=owned)

    # The two kernels of pixel_nce. Both sides are sorted by label. A program owns TILE rows of one
    # side and goes through the other side in tiles of TILE_Y:
    #
    #     | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |      tiles = 8, low = 3, near = 2, looked = 3
    #      far far far near near far far last
    #
    # A near tile may hold positives, or the pixel that a row leaves out: masks tell, row by row.
    # A far tile holds negatives of all rows, so it needs no masks. The last one may be ragged:
    # where it is not near anyway, it is looked at too. A sweep takes the far tiles first (LOOK =
    # 0), in the order of memory, then the near ones and the last (LOOK = 1).

    @triton.jit
    def _nce_own(
        rows, first, last, own, count, others,
        C: tl.constexpr, TILE: tl.constexpr, TILE_Y: tl.constexpr,
    ):
        """Returns this program's rows of one side, and low, near, looked and tiles of the other."""
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = row < count
        at = row.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]  # int64: N*C may pass 2**31
        x = tl.load(rows + at, mask=inside[:, None], other=0)  # (TILE,C)
        first = tl.load(first + row, mask=inside, other=2**30)
        last = tl.load(last + row, mask=inside, other=0)
        own = tl.load(own + row, mask=inside, other=-1)
        low = tl.min(tl.where(own < 0, first, tl.minimum(first, own)), 0) // TILE_Y
        near = tl.cdiv(tl.max(tl.maximum(last, own + 1), 0), TILE_Y) - low
        tiles = tl.cdiv(others, TILE_Y)
        looked = near + tl.where(low + near < tiles, 1, 0)
        first = first[:, None]
        last = last[:, None]
        own = own[:, None]
        return row, inside, at, x, first, last, own, low, near, looked, tiles

    @triton.jit
    def _nce_tile(
        x, rows, step, low, near, tiles, count, factor, LOOK: tl.constexpr,
        PRECISION: tl.constexpr, C: tl.constexpr, TILE_Y: tl.constexpr,
    ):
        """Returns pixels of the other side (TILE_Y,), rows (TILE_Y,C) and logits (TILE,TILE_Y).

        step counts the tiles of this kind, see above. The logits are in units of log 2.
        """
        if LOOK:
            tile = tl.where(step < near, low + step, tiles - 1)
        else:
            tile = tl.where(step < low, step, step + near)
        pixel = tile * TILE_Y + tl.arange(0, TILE_Y)
        at = rows + pixel.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
        if LOOK:
            y = tl.load(at, mask=(pixel < count)[:, None], other=0)
        else:
            y = tl.load(at)
        return pixel, y, tl.dot(x, tl.trans(y), input_precision=PRECISION) * factor

    @triton.jit
    def _nce_query_kernel(
        q, k, first, last, own, queries, keys, scale, wk, tau, value, normalizer, slopes, gradient,
        PER_POSITIVE: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
        C: tl.constexpr, TILE: tl.constexpr, TILE_Y: tl.constexpr,
    ):
        """The loss of TILE queries and, with GRADIENT, its gradient to q.

        Grid (tiles of queries,). Both sweeps, over the tiles of keys (see above):

            1. far and looked at   the logsumexp of the logits: largest, total; and with the same
                                   exponentials, pull = sum of exp(s - largest) * k
            2. near                the positives: loss, slope; and pull = sum of slope * k

        Registers hold the queries (TILE,C), one pull (TILE,C) and a tile of logits (TILE,TILE_Y).
        Two pulls would not fit: the first is parked in the gradient's own memory.
        The program writes of its queries: value * scale; the normalizer, in units of log 2, and the
        sum of slopes, which _nce_key_kernel reads; the gradient. The order of tiles is fixed.
        """
        queries = tl.load(queries).to(tl.int32)
        keys = tl.load(keys).to(tl.int32)
        if tl.program_id(0) * TILE >= queries:
            return
        row, inside, at, x, first, last, own, low, near, looked, tiles = _nce_own(
            q, first, last, own, queries, keys, C, TILE, TILE_Y
        )
        tau = tl.load(tau)
        factor = 1.4426950408889634 / tau  # log2(e): exp2 is faster than exp

        # Sweep 1: the normaliser.
        largest = tl.full([TILE], -1e30, tl.float32)  # finite, so that -inf - largest is no NaN
        total = tl.zeros([TILE], tl.float32)
        pull = tl.zeros([TILE, C], tl.float32)
        for LOOK in tl.static_range(2):
            for step in range(looked if LOOK else tiles - looked):
                j, y, s = _nce_tile(
                    x, k, step, low, near, tiles, keys, factor, LOOK, PRECISION, C, TILE_Y
                )
                if LOOK:
                    j = j[None, :]
                    hidden = (j >= keys) | (j == own)
                    if PER_POSITIVE:
                        hidden = hidden | ((j >= first) & (j < last))
                    s = tl.where(hidden, float("-inf"), s)
                new_largest = tl.maximum(largest, tl.max(s, 1))
                shrink = tl.exp2(largest - new_largest)
                p = tl.exp2(s - new_largest[:, None])
                total = total * shrink + tl.sum(p, 1)
                largest = new_largest
                if GRADIENT:
                    pull = tl.dot(
                        p.to(y.dtype), y, pull * shrink[:, None], input_precision=PRECISION
                    )
        total = tl.maximum(total, 1.0)  # it is, but where everything is hidden
        z = largest + tl.log2(total)
        if GRADIENT:
            tl.store(gradient + at, pull / total[:, None], mask=inside[:, None])
            pull = tl.zeros([TILE, C], tl.float32)

        # Sweep 2: the positives.
        loss = tl.zeros([TILE], tl.float32)
        slope = tl.zeros([TILE], tl.float32)
        for step in range(near):
            j, y, s = _nce_tile(
                x, k, step, low, near, tiles, keys, factor, True, PRECISION, C, TILE_Y
            )
            w = tl.load(wk + j, mask=j < keys, other=0)[None, :]
            j = j[None, :]
            w = tl.where((j >= first) & (j < last) & (j != own), w, 0.0)
            margin = z[:, None] - s
            if PER_POSITIVE:
                # softplus and its derivative, in units of log 2
                softplus = tl.maximum(margin, 0.0) + tl.log2(1 + tl.exp2(-tl.abs(margin)))
                loss += tl.sum(w * softplus, 1)
                w = w / (1 + tl.exp2(-margin))
            else:
                loss += tl.sum(w * margin, 1)
            slope += tl.sum(w, 1)
            if GRADIENT:
                pull = tl.dot(w.to(y.dtype), y, pull, input_precision=PRECISION)

        a = tl.load(scale + row, mask=inside, other=0)
        tl.store(value + row, a * loss * 0.6931471805599453, mask=inside)  # log(2)
        # A row that does not count must not push its keys either: exp(s - 1e30) = 0.
        tl.store(normalizer + row, tl.where(a == 0, 1e30, z), mask=inside)
        tl.store(slopes + row, slope, mask=inside)
        if GRADIENT:
            tl.debug_barrier()  # what other threads of this program have parked is seen
            parked = tl.load(gradient + at, mask=inside[:, None], other=0)
            d = (slope[:, None] * parked - pull) * (a / tau)[:, None]
            tl.store(gradient + at, d, mask=inside[:, None])

    @triton.jit
    def _nce_key_kernel(
        k, q, first, last, own, keys, queries, wk, tau, normalizer, push, slope_push, gradient,
        PER_POSITIVE: tl.constexpr, PRECISION: tl.constexpr,
        C: tl.constexpr, TILE: tl.constexpr, TILE_Y: tl.constexpr,
    ):
        """The gradient to TILE keys, gathered from all queries.

        Grid (tiles of keys,). One sweep over the tiles of queries (see above). In that sum the
        row of a query i has the factor

            key j a negative    exp(s - normalizer_i) * slope_push_i, its part in the logsumexp
            key j a positive    supcon: the same, less wk_j * push_i
                                per_positive: -wk_j * push_i * sigmoid(normalizer_i - s)

        push (N,) is upstream * scale / tau of the queries, slope_push that times their slopes.
        Registers hold the keys and the sum, both (TILE,C), and a tile of logits (TILE,TILE_Y). The
        program writes its keys' gradient once, summed up in a fixed order.
        """
        queries = tl.load(queries).to(tl.int32)
        keys = tl.load(keys).to(tl.int32)
        if tl.program_id(0) * TILE >= keys:
            return
        row, inside, at, x, first, last, own, low, near, looked, tiles = _nce_own(
            k, first, last, own, keys, queries, C, TILE, TILE_Y
        )
        w = tl.load(wk + row, mask=inside, other=0)[:, None]
        factor = 1.4426950408889634 / tl.load(tau)
        total = tl.zeros([TILE, C], tl.float32)
        for LOOK in tl.static_range(2):
            for step in range(looked if LOOK else tiles - looked):
                i, y, s = _nce_tile(
                    x, q, step, low, near, tiles, queries, factor, LOOK, PRECISION, C, TILE_Y
                )
                known = i < queries  # always so, where it need not LOOK
                s = s - tl.load(normalizer + i, mask=known, other=1e30)[None, :]
                d = tl.exp2(s) * tl.load(slope_push + i, mask=known, other=0)[None, :]
                if LOOK:
                    slope = w * tl.load(push + i, mask=known, other=0)[None, :]
                    i = i[None, :]
                    same_label = (i >= first) & (i < last)
                    if PER_POSITIVE:
                        positive = -slope / (1 + tl.exp2(s))
                    else:
                        positive = d - slope
                    d = tl.where(same_label, positive, d)
                    d = tl.where(i == own, 0.0, d)
                total = tl.dot(d.to(y.dtype), y, total, input_precision=PRECISION)
        tl.store(gradient + at, total, mask=inside[:, None])


# ---- Triton path: what starts the kernels ----


def _triton_cross_entropy(logits, labels, weight, ignore_index, with_gradient):
    """As _torch_cross_entropy."""
    B, K, h, w = logits.shape
    H, W = labels.shape[1:]
    row = _axis(h, H, logits.device)
    column = _axis(w, W, logits.device)
    logits = logits.contiguous()
    labels = labels.contiguous()
    weight = weight.contiguous()
    value = torch.empty_like(weight)
    normalizer = torch.empty_like(weight)
    gradient = None
    with torch.cuda.device_of(logits):
        _pixel_kernel[(triton.cdiv(H * W, TILE_PIXELS), B)](
            logits, K, h, w, H, W, row.first, row.fraction, column.first, column.fraction,
            labels, weight, ignore_index, value, normalizer, LABELED=True, TILE=TILE_PIXELS,
        )
        if with_gradient:
            gradient = torch.empty_like(logits, dtype=torch.float32)
            tile_k = min(32, triton.next_power_of_2(K))
            grid = (triton.cdiv(h * w, TILE_CELLS), B, triton.cdiv(K, tile_k))
            _cell_kernel[grid](
                logits, K, h, w, H, W,
                row.first, row.fraction, row.matrix, row.start, row.window,
                column.first, column.fraction, column.matrix, column.start, column.window,
                labels, weight, ignore_index, normalizer, gradient, TILE=TILE_CELLS, TILE_K=tile_k,
            )
    return value, gradient


def _triton_pseudo_label(logits, size, via=None):
    """As _torch_pseudo_label."""
    if via is not None:
        logits = F.interpolate(logits.float(), via, mode="bilinear", align_corners=False)
    B, K, h, w = logits.shape
    H, W = size
    row = _axis(h, H, logits.device)
    column = _axis(w, W, logits.device)
    label = torch.empty(B, H, W, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(B, H, W, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _pixel_kernel[(triton.cdiv(H * W, TILE_PIXELS), B)](
            logits.contiguous(), K, h, w, H, W, row.first, row.fraction, column.first,
            column.fraction, label, None, IGNORE, confidence, None, LABELED=False, TILE=TILE_PIXELS,
        )
    return label, confidence


def _correlation_tiles(features, K):
    """Returns the dtype of the operands of the dot products, and the options of both kernels."""
    # bf16 goes to the tensor cores as it is. float16 could not hold the gradients, and is exact in
    # tf32. tf32x3 has float32's accuracy.
    bf16 = features.dtype == torch.bfloat16 and not INTERPRET
    operand = torch.bfloat16 if bf16 else torch.float32
    precision = "tf32" if features.dtype == torch.float16 else "tf32x3"
    tile_k = max(16, triton.next_power_of_2(K))  # 16 is the least that a tensor core takes
    if tile_k > 64:  # the sums (tile,tile_k) fill the registers
        tile, tile_c = 32, 32
    elif bf16:
        tile, tile_c = 128, 64
    else:
        tile, tile_c = 64, 64
    options = {"PRECISION": precision, "TILE": tile, "TILE_C": tile_c, "TILE_K": tile_k}
    return operand, options | {"num_warps": 8, "num_stages": 2}


def _triton_correlation(features, rows):
    """As _torch_correlation."""
    B, C, H, W = features.shape
    K = len(rows)
    operand, options = _correlation_tiles(features, K)
    value = torch.empty(B, K, H, W, dtype=torch.float32, device=features.device)
    inverse = torch.empty(B, H, W, dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(features):
        _correlation_kernel[(triton.cdiv(H * W, options["TILE"]), B)](
            features, *features.stride(), rows.to(operand), C, K, W, H * W, value, inverse,
            EPS2=EPS**2, **options,
        )
    return value, inverse


def _triton_correlation_gradient(features, rows, value, inverse, upstream):
    """As _torch_correlation_gradient."""
    B, C, H, W = features.shape
    K = len(rows)
    operand, options = _correlation_tiles(features, K)
    gradient = _gradient_like(features)
    tiles = triton.cdiv(H * W, options["TILE"])  # of an image
    runs = min(RUNS, B * tiles)
    steps = triton.cdiv(B * tiles, runs)
    partial = torch.empty(runs, K, C, dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(features):
        _correlation_gradient_kernel[(triton.cdiv(C, options["TILE_C"]), runs)](
            features, *features.stride(), rows.to(operand), B, C, K, W, H * W, value, inverse,
            upstream.contiguous(), gradient, *gradient.stride(), partial, tiles, steps, **options,
        )
    return gradient, partial.sum(0)


def _nce_operands(q, k, queries, keys):
    """Returns sorted q and k for the dot products, and the options of both kernels.

    Their channels are padded to a power of two of at least 64.
    """
    C = max(64, triton.next_power_of_2(q.shape[1]))
    dtypes = {q.dtype, k.dtype}
    bf16 = dtypes == {torch.bfloat16} and not INTERPRET
    operand = torch.bfloat16 if bf16 else torch.float32  # as in _correlation_tiles
    padding = (0, C - q.shape[1])
    q = F.pad(q[queries.order].to(operand), padding)
    k = F.pad(k[keys.order].to(operand), padding)

    if INTERPRET:
        tile, tile_y = 64, 64
    elif bf16:
        tile, tile_y = NCE_TILES_BF16.get(C, (16, 16))
    else:
        tile, tile_y = NCE_TILES_FLOAT32.get(C, (16, 16))
    precision = "tf32" if dtypes == {torch.float16} else "tf32x3"
    stages = 2 if bf16 or C < 512 else 1
    options = {"PRECISION": precision, "C": C, "TILE": tile, "TILE_Y": tile_y}
    return q, k, options | {"num_warps": 8, "num_stages": stages}


def _triton_nce(q, k, queries, keys, scale, wk, tau, per_positive, q_gradient, k_gradient):
    """As _torch_nce, but the gradient to k is left to the backward.

    Ignored pixels have rows of 0. In the place of () stands what that backward needs.
    """
    C = q.shape[1]
    q, k, options = _nce_operands(q, k, queries, keys)
    value, normalizer, slopes = torch.zeros(3, len(q), dtype=torch.float32, device=q.device)
    gradient = None
    if q_gradient:
        gradient = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    if len(q) and len(k):
        with torch.cuda.device_of(q):
            _nce_query_kernel[(triton.cdiv(len(q), options["TILE"]),)](
                q, k, queries.first, queries.last, queries.own, queries.count, keys.count,
                scale, wk, tau, value, normalizer, slopes, gradient,
                PER_POSITIVE=per_positive, GRADIENT=q_gradient, **options,
            )
    if q_gradient:
        gradient = gradient[:, :C]
    return value, gradient, None, (normalizer, slopes)


def _triton_nce_gradient(q, k, queries, keys, scale, wk, tau, per_positive, normalizer, slopes):
    """As _torch_nce_gradient."""
    C = q.shape[1]
    q, k, options = _nce_operands(q, k, queries, keys)
    gradient = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    push = scale / tau
    if len(q) and len(k):
        with torch.cuda.device_of(q):
            _nce_key_kernel[(triton.cdiv(len(k), options["TILE"]),)](
                k, q, keys.first, keys.last, keys.own, keys.count, queries.count,
                wk, tau, normalizer, push, push * slopes, gradient,
                PER_POSITIVE=per_positive, **options,
            )
    return gradient[:, :C]


# ---- the public operators ----


class _UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, weight, ignore_index, reduction, sweep):
        # Of a mean the upstream gradient is one number, so that the gradient is formed in this
        # sweep and scaled later. Of a map it is another number for each pixel: a second sweep.
        formed = reduction == "mean" and ctx.needs_input_grad[0]
        value, gradient = sweep(logits, labels, weight, ignore_index, formed)
        if formed:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(logits, labels, weight)
        ctx.formed = formed
        ctx.ignore_index = ignore_index
        ctx.sweep = sweep
        ctx.pixels = labels.numel()
        if reduction == "mean":
            return value.mean()
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.formed:
            (gradient,) = ctx.saved_tensors
            gradient = gradient * (upstream / ctx.pixels)
        else:
            logits, labels, weight = ctx.saved_tensors
            _, gradient = ctx.sweep(logits, labels, weight * upstream, ctx.ignore_index, True)
        return gradient, None, None, None, None, None  # autograd casts it to the logits' dtype


def _check_logits(logits):
    """Raises ValueError unless logits are (B,K,h,w), with something in them."""
    if logits.ndim != 4 or logits.numel() == 0:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, they must be (B, K, h, w), none of it 0"
        )


def _check_size(name, size):
    """Raises ValueError unless a size is (H,W) with a pixel in it."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} is {tuple(size)}, it must be (H, W), none of it 0")


def upsample_cross_entropy(
    logits, labels, weight=None, ignore_index=IGNORE, reduction="mean", backend="auto"
):
    """Cross-entropy of bilinearly upsampled logits, without the B x K x H x W tensor.

    Returns float32,
    reduction "mean"    0-d: the sum over valid pixels of weight * CE, over B*H*W. Ignored pixels
                        count in the divisor: the convention of the DAFormer family.
    reduction "none"    weight * CE (B,H,W), 0 where ignored.

    logits (B,K,h,w) float. Upsampling has align_corners=False and any ratio. All is computed in
    float32; the gradient has the logits' dtype.
    labels (B,H,W) uint8 or int64. An id outside 0..K-1 that is not ignore_index raises ValueError
    on the CPU. On an accelerator, where looking would stall the queue, it counts as ignored.
    weight (B,H,W) float, finite, or None. It gets no gradient.

    Differentiable once. Raises ValueError on wrong shapes, RuntimeError where backend="triton"
    cannot run. The gradient is formed in the forward sweep, after Liger-Kernel (Hsu et al. 2024,
    arXiv:2410.10989).
    """
    _check_logits(logits)
    B, K = logits.shape[:2]
    if labels.ndim != 3 or len(labels) != B or labels.dtype not in (torch.uint8, torch.int64):
        raise ValueError(
            f"labels are {tuple(labels.shape)} {labels.dtype}, "
            f"they must be ({B}, H, W) uint8 or int64"
        )
    _check_size("the size of the labels", labels.shape[1:])
    if weight is not None and weight.shape != labels.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} must have the shape of the labels, {tuple(labels.shape)}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is '{reduction}', it must be 'mean' or 'none'")
    if labels.device.type == "cpu":
        low, high = labels.masked_fill(labels == ignore_index, 0).aminmax()
        if low < 0 or high >= K:
            wrong = int(low if low < 0 else high)
            raise ValueError(
                f"labels hold the id {wrong}, which is neither in 0..{K - 1} nor ignore_index "
                f"{ignore_index}: map the ids when the labels are loaded"
            )

    if weight is None:
        weight = torch.ones((), device=logits.device).expand(labels.shape)  # no memory
    else:
        weight = weight.float()
    sweep = _triton_cross_entropy if _use_triton(logits, backend) else _torch_cross_entropy
    return _UpsampleCrossEntropy.apply(logits, labels, weight, ignore_index, reduction, sweep)


@torch.no_grad()
def upsample_pseudo_label(logits, size, threshold, backend="auto", via=None):
    """Class and confidence after bilinear upsampling, without the B x K x H x W tensor.

    Returns label uint8 (B,H,W), the lowest id among equals; confidence float32 (B,H,W), its
    softmax probability; fraction 0-d float32, still on the device: the share of all pixels with
    confidence >= threshold, which is q of DACS (Tranheden et al. 2021).

    logits (B,K,h,w) float, K <= 256; size (H,W), align_corners=False; threshold in [0,1], a
    number or a 0-d tensor; via: a size (h',w') on the way, where the released evaluations upsample
    twice. No gradient. Raises ValueError on wrong shapes and too many classes, RuntimeError where
    backend="triton" cannot run.
    """
    _check_logits(logits)
    if logits.shape[1] > 256:
        raise ValueError(f"{logits.shape[1]} classes do not fit into uint8 labels")
    _check_size("size", size)
    sweep = _triton_pseudo_label if _use_triton(logits, backend) else _torch_pseudo_label
    if via is not None:
        via = tuple(via)
        _check_size("via", via)
        if via in (tuple(size), tuple(logits.shape[2:])):  # one of the two steps does nothing
            via = None
    label, confidence = sweep(logits, size, via)
    return label, confidence, (confidence >= threshold).float().mean()


class _TextCorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, rows, sweep, gradient_sweep):
        value, inverse = sweep(features, rows)
        ctx.gradient_sweep = gradient_sweep
        ctx.save_for_backward(features, rows, value, inverse)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        features, rows, value, inverse = ctx.saved_tensors
        gradient, rows_gradient = ctx.gradient_sweep(features, rows, value, inverse, upstream)
        return gradient, rows_gradient, None, None


def text_correlation(features, text, scale, backend="auto"):
    """scale * cosine of every pixel's feature with every class's text, float32 (B,K,H,W).

    Normalised features are never in memory. The values lie in [-scale, scale].

    features (B,C,H,W) and text (K,C) float, K <= 256, any strides, of any length whose square
    float32 can hold; scale a number or a 0-d tensor.

    Computed in float32, also under autocast. (On a GPU the products of bfloat16 features take text
    and upstream gradients in bfloat16 too, and sum in float32.) Differentiable once, with respect
    to features, text and scale; gradients repeat bit for bit.
    Every vector x is divided by sqrt(|x|^2 + 1e-6^2): a zero vector has the value 0 and a gradient
    that is finite but large (times 1e6; in float16 it may overflow).

    Raises ValueError on wrong shapes, RuntimeError where backend="triton" cannot run.
    The scores of LSeg (Li et al. 2022, arXiv:2201.03546) with its temperature as 1 / scale.
    """
    if features.ndim != 4 or text.ndim != 2 or text.shape[1] != features.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)}, text {tuple(text.shape)}: "
            "must be (B, C, H, W) and (K, C)"
        )
    if torch.is_tensor(scale) and scale.ndim:
        raise ValueError(f"scale is {tuple(scale.shape)}, it must be a number or a 0-d tensor")
    if len(text) > 256:
        raise ValueError(f"{len(text)} rows of text, 256 are the most")
    if torch.compiler.is_exporting():  # a loop over images and rows would tie the program to a size
        return plain_correlation(features.float(), text.float(), scale)
    if features.numel() == 0 or text.numel() == 0:
        raise ValueError(
            f"features {tuple(features.shape)}, text {tuple(text.shape)}: none of it may be 0"
        )

    # Text is small: it is normalised and scaled here, and its gradients are left to autograd.
    text = text.float()
    rows = text * (text * text).sum(1, keepdim=True).add(EPS**2).rsqrt() * scale  # (K,C)
    rows = rows.contiguous()  # a product has the strides of text; the kernels count on these
    if _use_triton(features, backend):
        sweep, gradient_sweep = _triton_correlation, _triton_correlation_gradient
    else:
        sweep, gradient_sweep = _torch_correlation, _torch_correlation_gradient
    return _TextCorrelation.apply(features, rows, sweep, gradient_sweep)


def _unsorted(rows, side):
    """Rows in sorted order, those of ignored pixels may be missing -> as given, 0 where ignored."""
    out = rows.new_zeros(len(side.order), *rows.shape[1:])
    return out.index_copy_(0, side.order[: len(rows)], rows)


class _PixelNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, queries, keys, scale, wk, tau, per_positive, sweep, gradient_sweep):
        q_needed, k_needed = ctx.needs_input_grad[:2]
        with torch.autocast(q.device.type, enabled=False):
            value, q_gradient, k_gradient, rest = sweep(
                q, k, queries, keys, scale, wk, tau, per_positive, q_needed, k_needed
            )
        ctx.sorted = queries, keys
        ctx.per_positive = per_positive
        ctx.gradient_sweep = gradient_sweep
        ctx.save_for_backward(q, k, scale, wk, tau, q_gradient, k_gradient, *rest)
        return _unsorted(value, queries)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        q, k, scale, wk, tau, q_gradient, k_gradient, *rest = ctx.saved_tensors
        queries, keys = ctx.sorted

        # A query's row of the gradient depends on its own upstream number alone.
        if q_gradient is not None:
            q_gradient = _unsorted(q_gradient, queries).mul_(upstream[:, None])

        # A key's gathers from all queries. The torch path has formed it for an upstream of 1
        # each: that is enough for a sum or a mean, where all rows that count have the same
        # number.
        if ctx.needs_input_grad[1]:
            upstream = upstream[queries.order]
            scaled = scale * upstream
            used = scale.argmax() if len(q) else slice(0)  # a row that counts, if any
            if k_gradient is not None and torch.equal(scaled, scale * upstream[used]):
                k_gradient = k_gradient * upstream[used].sum()
            else:
                with torch.autocast(q.device.type, enabled=False):
                    k_gradient = ctx.gradient_sweep(
                        q, k, queries, keys, scaled, wk, tau, ctx.per_positive, *rest
                    )
            k_gradient = _unsorted(k_gradient, keys)
        nothing = (None,) * 8  # for the other arguments; autograd casts to the dtypes of q and k
        return q_gradient, k_gradient, *nothing


def _label_and_weight(name, x, label, weight):
    """Checks one side of a contrast. Returns labels int64, NOBODY for 255, and weights float32."""
    if label.shape != x.shape[:1] or label.is_floating_point() or label.dtype == torch.bool:
        raise ValueError(
            f"y{name} is {tuple(label.shape)} {label.dtype}, "
            f"it must be ({len(x)},) of an integer dtype"
        )
    if weight is not None and weight.shape != label.shape:
        raise ValueError(f"w{name} is {tuple(weight.shape)}, it must be ({len(x)},)")
    if weight is None:
        weight = torch.ones(len(x), device=x.device)
    return label.long().masked_fill(label == IGNORE, NOBODY), weight.detach().float()


def pixel_nce(
    q, k, yq, yk, wq=None, wk=None, tau=0.1, form="supcon", exclude_self=False, backend="auto"
):
    """Class-labelled InfoNCE of every query pixel against all key pixels, float32 (N,).

    No N x M matrix is formed. With s = q.k / tau and P_i the keys labelled as query i, row i is
    wq_i / |P_i| * sum over j in P_i of wk_j * l_ij:

    form "supcon"        l_ij = logsumexp over all keys of s_i - s_ij
                         (L_out of Khosla et al., NeurIPS 2020)
    form "per_positive"  l_ij = softplus(logsumexp over the keys of other labels of s_i - s_ij)
                         = -log(exp(s_ij) / (exp(s_ij) + sum over negatives of exp(s_i)))
                         (ContrastiveSeg, Wang et al., ICCV 2021; CLUDA, Vayyat et al. 2022,
                         arXiv:2208.14227)

    A row without a positive or without a negative is 0, with gradient 0. |P_i| counts keys,
    whatever their weights. The caller averages.

    q (N,C), k (M,C) float, used as given: unit length is the caller's business.
    yq (N,), yk (M,) labels of any integer dtype; 255 takes part in nothing.
    wq (N,), wk (M,) float weights or None. tau > 0, a number or a 0-d tensor.
    exclude_self: q and k are the same pixels, and row i knows nothing of key i.

    Computed in float32, also under autocast. (On a GPU the products of bfloat16 q and k take the
    softmax in bfloat16 too, and sum in float32.) Differentiable once, with respect to q and k only;
    gradients repeat bit for bit. Raises ValueError on wrong shapes, RuntimeError where
    backend="triton" cannot run.
    """
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: must be (N, C) and (M, C)")
    if exclude_self and len(q) != len(k):
        raise ValueError(
            f"exclude_self needs as many keys as queries, there are {len(k)} and {len(q)}"
        )
    if form not in ("supcon", "per_positive"):
        raise ValueError(f"form is '{form}', it must be 'supcon' or 'per_positive'")
    if tau.ndim if torch.is_tensor(tau) else not tau > 0:
        raise ValueError(f"tau is {tau}, it must be a positive number or a 0-d tensor")
    yq, wq = _label_and_weight("q", q, yq, wq)
    yk, wk = _label_and_weight("k", k, yk, wk)

    # Wider tiles would not fit into a GPU's registers.
    widest = 512 if q.dtype == k.dtype == torch.bfloat16 else 256
    if backend == "auto" and q.shape[1] > widest:
        backend = "torch"
    if _use_triton(q, backend):
        sweep, gradient_sweep = _triton_nce, _triton_nce_gradient
    else:
        sweep, gradient_sweep = _torch_nce, _torch_nce_gradient

    if torch.is_tensor(tau):
        tau = tau.detach().float()
    else:
        tau = torch.full((), tau, device=q.device)
    queries, keys, share = _sort_by_label(yq, yk, exclude_self)
    scale = share * wq[queries.order]  # (N,), sorted: wq / |P|
    per_positive = form == "per_positive"
    return _PixelNCE.apply(
        q, k, queries, keys, scale, wk[keys.order], tau, per_positive, sweep, gradient_sweep
    )


# ---- the same in plain torch: what the check, the tests and the bench compare with ----
#
# Arguments and results are those above. Written as one would without the operators, and well.


def plain_cross_entropy(logits, labels, weight=None, ignore_index=IGNORE, reduction="mean"):
    """upsample_cross_entropy by F.interpolate and F.cross_entropy."""
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    value = F.cross_entropy(up, labels.long(), ignore_index=ignore_index, reduction="none")
    if weight is not None:
        value = value * weight
    if reduction == "mean":
        return value.mean()
    return value


@torch.no_grad()
def plain_pseudo_label(logits, size, threshold):
    """upsample_pseudo_label by F.interpolate and softmax; label is int64."""
    up = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    confidence, label = up.softmax(1).max(1)
    return label, confidence, (confidence >= threshold).float().mean()


def plain_correlation(features, text, scale):
    """text_correlation by einsum of unit vectors."""
    def unit(x):
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x / (norm.square() + EPS**2).sqrt()

    return scale * torch.einsum("bchw,kc->bkhw", unit(features), unit(text))


def plain_nce(q, k, yq, yk, wq=None, wk=None, tau=0.1, form="supcon", exclude_self=False):
    """pixel_nce by the whole matrix (N,M) of logits."""
    yq = yq.long().masked_fill(yq == IGNORE, NOBODY)  # nobody's label, and on the
    yk = yk.long().masked_fill(yk == IGNORE, NOBODY + 1)  # other side not the same
    positive = yq[:, None] == yk  # (N,M)
    hidden = (yk == NOBODY + 1)[None]  # (1,M), or (N,M)
    if exclude_self:
        own = torch.eye(len(q), dtype=torch.bool, device=q.device)
        positive = positive & ~own
        hidden = hidden | own
    count = positive.sum(1)
    contrasts = (yq != NOBODY) & (count > 0) & ((~hidden).sum(1) > count)

    s = (q @ k.t()).to(torch.promote_types(q.dtype, torch.float32)) / tau
    if form == "per_positive":
        s_negative = s.masked_fill(hidden | positive, -1e30)
        loss = F.softplus(s_negative.logsumexp(1, keepdim=True) - s)
    else:
        loss = s.masked_fill(hidden, -1e30).logsumexp(1, keepdim=True) - s
    loss = loss.masked_fill(~positive, 0)
    if wk is not None:
        loss = loss * wk
    total = loss.sum(1)
    if wq is not None:
        total = total * wq
    return total * contrasts / count.clamp(min=1)


# ---- python kernels.py ----


def _cases(device):
    """Yields an operator, its plain form, and their inputs, the first of which gets a gradient."""
    side = 128 if device == "cuda" else 32
    size = (4 * side, 4 * side)
    logits = 3 * torch.randn(2, 19, side, side, device=device)
    labels = torch.randint(19, (2, *size), device=device)
    labels[:, : side // 2] = IGNORE
    weight = torch.rand(2, *size, device=device)
    yield upsample_cross_entropy, plain_cross_entropy, (logits, labels, weight)
    yield upsample_pseudo_label, plain_pseudo_label, (logits, size, 0.5)

    features = torch.randn(2, 256, side, side, device=device)
    text = torch.randn(19, 256, device=device)
    yield text_correlation, plain_correlation, (features, text, 14.0)

    rows = F.normalize(torch.randn(2, side * side, 128, device=device), dim=2)
    label = (19 * torch.rand(2, side * side, device=device) ** 2).long()  # as uneven as in streets
    yield pixel_nce, plain_nce, (rows[0], rows[1], label[0], label[1])


def _run(operator, inputs):
    """Returns the operator's outputs and, where it has one, the gradient to the first input."""
    leaf = inputs[0].detach().requires_grad_()
    outputs = operator(leaf, *inputs[1:])
    if isinstance(outputs, tuple):
        return outputs
    return outputs.detach(), torch.autograd.grad(outputs.sum(), leaf)[0]


def _error(found, exact):
    """The relative error of a tensor; of labels the share that differs."""
    if not found.is_floating_point():
        return (found != exact).double().mean().item()
    return ((found.double() - exact).norm() / exact.norm()).item()


def _milliseconds(call, rounds):
    """The best of some runs, each begun and ended with the GPU's queue empty."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def _in_float64(inputs):
    """The inputs with their floating-point tensors in float64."""
    doubled = []
    for x in inputs:
        if torch.is_tensor(x) and x.is_floating_point():
            x = x.double()
        doubled.append(x)
    return doubled


def _check(operator, plain, inputs):
    """Prints a line for each path of an operator; returns what is off, a list of str."""
    exact = _run(plain, _in_float64(inputs))
    plain_time = _milliseconds(lambda: _run(plain, inputs), 10)
    backends = ["torch"]
    if triton is not None:
        backends.append("triton")

    wrong = []
    for backend in backends:
        path, rounds = backend, 10
        if backend == "triton" and INTERPRET:
            path, rounds = "triton (interpreter)", 1  # slow
        ours = functools.partial(operator, backend=backend)
        error = max(map(_error, _run(ours, inputs), exact))
        our_time = _milliseconds(lambda: _run(ours, inputs), rounds)
        name = operator.__name__
        print(f"{name:24}{path:22}{error:8.0e}{our_time:12.2f}{plain_time:18.2f}", flush=True)
        if not error < 1e-5:
            wrong.append(f"{name} ({backend}) is off by {error:.0e}")
    return wrong


def main(argv=None):
    """Compares both paths of each operator with float64 and times them; exits 1 if one is off."""
    p = argparse.ArgumentParser(
        "kernels.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.parse_args(argv)  # there are no flags but -h
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    print(f"{'operator':24}{'backend':22}{'error':>8}{'ours, ms':>12}{'plain torch, ms':>18}")
    torch.manual_seed(0)
    wrong = []
    for operator, plain, inputs in _cases(device):
        wrong += _check(operator, plain, inputs)
    if wrong:
        sys.exit(f"kernels.py: error: {', '.join(wrong)}; the limit is 1e-5")


if __name__ == "__main__":
    main()
