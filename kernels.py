"""Fused operators. Each is one public function with a Triton path and a chunked pure-torch path of the same signature and meaning.

    python kernels.py        checks both paths against float64 torch and times ours against plain torch

backend="auto" takes Triton for CUDA tensors where the triton package imports, and torch elsewhere. Triton's interpreter
(TRITON_INTERPRET=1, set before this file is imported) runs the same kernels on CPU tensors: slow, for tests.
Words: a *cell* is a position of the low-resolution logits (h, w), a *pixel* one of the full-resolution labels (H, W).
"""
import os
import sys
import time
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")              # triton reads it when a kernel is defined
try:
    import triton
    import triton.language as tl
except ImportError:                                             # no wheel for this platform: the torch path does everything
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TILE_PIXELS, TILE_CELLS = (1024, 256) if INTERPRET else (256, 64)       # the interpreter pays per tile, not per element


def _use_triton(tensor, backend):
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend is '{backend}', it must be 'auto', 'triton' or 'torch'")
    if backend == "triton" and triton is None:
        raise RuntimeError("backend='triton' needs the triton package (pip install triton); backend='torch' gives the same result")
    if backend == "triton" and not (tensor.is_cuda or INTERPRET):
        raise RuntimeError("backend='triton' needs CUDA tensors, or TRITON_INTERPRET=1 set before kernels.py is imported")
    return backend == "triton" or (backend == "auto" and tensor.is_cuda and triton is not None)


# ---- bilinear interpolation along one axis, align_corners=False: the tables both paths share ----

class Axis(NamedTuple):
    matrix: torch.Tensor        # (full, low) float32: pixel = matrix @ cells; each row holds the weights of two neighbours
    first: torch.Tensor         # (full,) int32: the lower of the two cells; the other is the next one, or the same at the end
    fraction: torch.Tensor      # (full,) float32 in [0,1): weight of the other cell
    start: torch.Tensor         # (low,) int32: first pixel that a cell takes part in
    window: int                 # the largest number of pixels that one cell takes part in
    reach: list                 # per pixel the range (lowest cell, highest cell + 1) as Python numbers, to cut rows into chunks


@lru_cache(maxsize=32)
def _axis(low, full, device):
    position = ((torch.arange(full, dtype=torch.float64) + 0.5) * (low / full) - 0.5).clamp_(min=0)    # as F.interpolate
    first = position.long()
    second = (first + 1).clamp_(max=low - 1)
    fraction = position - first
    matrix = torch.zeros(full, low, dtype=torch.float64)
    matrix.scatter_add_(1, first[:, None], 1 - fraction[:, None]).scatter_add_(1, second[:, None], fraction[:, None])
    touched = matrix > 0                                        # one unbroken run of pixels per cell, empty where down-sampling skips it
    return Axis(matrix.float().to(device), first.int().to(device), fraction.float().to(device),
                touched.int().argmax(0).int().to(device), int(touched.sum(0).max()),
                list(zip(first.tolist(), (second + 1).tolist())))


# ---- torch path: interpolation as two small matrix products, a chunk of rows at a time ----

def _upsampled_chunks(logits, size):
    """Yields (images, rows, cells, row matrix, column matrix, upsampled float32 (b,K,r,W)); images, rows and cells are slices."""
    (B, K, h, w), (H, W) = logits.shape, size
    row, column = _axis(h, H, logits.device), _axis(w, W, logits.device)
    budget = 2**19 if logits.device.type == "cpu" else 2**23    # elements of one chunk: about the cache of one core
    r = min(H, max(8, budget // (K * W)))                       # 8: thinner chunks repeat too many shared rows of cells
    r = -(-H // -(-H // r))                                     # the same number of chunks, all about equally high
    b = max(1, budget // (K * W * r))
    for i in range(0, B, b):
        for y in range(0, H, r):
            end = min(y + r, H)
            cells = slice(row.reach[y][0], row.reach[end - 1][1])
            rows = row.matrix[y:end, cells]
            wide = logits[i:i + b, :, cells].float() @ column.matrix.t()                # (b,K,c,w) @ (w,W) -> (b,K,c,W)
            yield slice(i, i + b), slice(y, end), cells, rows, column.matrix, rows @ wide     # (r,c) @ (b,K,c,W) -> (b,K,r,W)


def _torch_cross_entropy(logits, labels, weight, ignore_index, with_gradient):
    """-> weight * CE (B,H,W), and the gradient of its sum with respect to logits, float32 (B,K,h,w) or None."""
    value = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    gradient = torch.zeros_like(logits, dtype=torch.float32) if with_gradient else None
    with torch.autocast(logits.device.type, enabled=False):     # the matrix products are interpolation: never in bf16
        for images, rows, cells, row_matrix, column_matrix, up in _upsampled_chunks(logits, labels.shape[1:]):
            label = labels[images, rows].long()
            valid = (label != ignore_index) & (label >= 0) & (label < logits.shape[1])
            label = label.masked_fill_(~valid, 0).unsqueeze(1)                          # (b,1,r,W), as all maps below
            scale = (weight[images, rows] * valid).unsqueeze(1)
            picked, largest = up.gather(1, label), up.amax(1, keepdim=True)
            total = up.sub_(largest).exp_().sum(1, keepdim=True)
            value[images, rows] = ((total.log() + largest - picked) * scale)[:, 0]
            if with_gradient:                                   # scale * (softmax - one-hot), then both products transposed
                up.mul_(scale / total).scatter_add_(1, label, -scale)
                gradient[images, :, cells] += (row_matrix.t() @ up) @ column_matrix     # (b,K,c,W) @ (W,w) -> (b,K,c,w)
    return value, gradient


def _torch_pseudo_label(logits, size):
    B, K = logits.shape[:2]
    label = torch.empty(B, *size, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(B, *size, dtype=torch.float32, device=logits.device)
    rank = torch.arange(K - 1, -1, -1, dtype=torch.uint8, device=logits.device).view(1, K, 1, 1)       # lowest id first
    with torch.autocast(logits.device.type, enabled=False):
        for images, rows, _, _, _, up in _upsampled_chunks(logits, size):
            largest = up.amax(1, keepdim=True)
            label[images, rows] = K - 1 - (up.eq(largest) * rank).amax(1)               # three times faster than arg-max on a CPU
            confidence[images, rows] = up.sub_(largest).exp_().sum(1).reciprocal_()
    return label, confidence


# ---- Triton path: every program owns what it writes, so there are no atomics and results repeat bit for bit ----

if triton is not None:
    @triton.jit
    def _bilinear(pointer, across, down, x_fraction, y_fraction, mask):
        top_left = tl.load(pointer, mask=mask, other=0).to(tl.float32)                  # to float32 first: the interpreter has no bf16
        top_right = tl.load(pointer + across, mask=mask, other=0).to(tl.float32)
        low_left = tl.load(pointer + down, mask=mask, other=0).to(tl.float32)
        low_right = tl.load(pointer + down + across, mask=mask, other=0).to(tl.float32)
        top = top_left * (1 - x_fraction) + top_right * x_fraction
        low = low_left * (1 - x_fraction) + low_right * x_fraction
        return top * (1 - y_fraction) + low * y_fraction

    @triton.jit
    def _pixel_kernel(logits, batch_stride, class_stride, y_stride, x_stride, K, h, w, H, W,
                      y_first, y_fraction, x_first, x_fraction,
                      labels, weight, weight_batch_stride, weight_y_stride, weight_x_stride, ignore_index, value, normalizer,
                      LABELED: tl.constexpr, TILE: tl.constexpr):
        """One tile of pixels of one image, one sweep over the classes with a running maximum (online softmax).
        LABELED: reads labels, writes value = weight * CE and the log-normalizer; else writes labels = arg max, value = max softmax."""
        image = tl.program_id(1).to(tl.int64)                   # int64: B*K*h*w and B*H*W may pass 2**31
        pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = pixel < H * W
        y, x = pixel // W, pixel % W
        y0, x0 = tl.load(y_first + y, mask=inside, other=0), tl.load(x_first + x, mask=inside, other=0)
        fy, fx = tl.load(y_fraction + y, mask=inside, other=0), tl.load(x_fraction + x, mask=inside, other=0)
        down, across = tl.where(y0 + 1 < h, y_stride, 0), tl.where(x0 + 1 < w, x_stride, 0)
        pointer = logits + image * batch_stride + y0 * y_stride + x0 * x_stride
        at = image * H * W + pixel
        if LABELED:
            label = tl.load(labels + at, mask=inside, other=0).to(tl.int32)
        best = tl.zeros([TILE], tl.int32)
        picked = tl.zeros([TILE], tl.float32)
        total = tl.zeros([TILE], tl.float32)
        largest = tl.full([TILE], float("-inf"), tl.float32)
        for k in range(K):
            z = _bilinear(pointer, across, down, fx, fy, inside)
            pointer += class_stride
            if LABELED:
                picked = tl.where(label == k, z, picked)
            else:
                best = tl.where(z > largest, k, best)
            new_largest = tl.maximum(largest, z)
            total = total * tl.exp(largest - new_largest) + tl.exp(z - new_largest)
            largest = new_largest
        if LABELED:
            scale = tl.load(weight + image * weight_batch_stride + y * weight_y_stride + x * weight_x_stride, mask=inside, other=0)
            valid = (label != ignore_index) & (label >= 0) & (label < K)
            lse = largest + tl.log(total)
            tl.store(value + at, tl.where(valid, (lse - picked) * scale.to(tl.float32), 0.0), mask=inside)
            tl.store(normalizer + at, lse, mask=inside)
        else:
            tl.store(labels + at, best.to(tl.uint8), mask=inside)
            tl.store(value + at, 1 / total, mask=inside)

    @triton.jit
    def _cell_kernel(logits, batch_stride, class_stride, y_stride, x_stride, K, h, w, H, W,
                     y_first, y_fraction, y_matrix, y_start, y_window, x_first, x_fraction, x_matrix, x_start, x_window,
                     labels, weight, weight_batch_stride, weight_y_stride, weight_x_stride, ignore_index, normalizer, gradient,
                     TILE: tl.constexpr, TILE_K: tl.constexpr):
        """One tile of cells x classes of one image: gathers interpolation weight * scale * (softmax - one-hot) from every
        pixel its cells take part in. A pixel is computed by each of its (up to four) cells."""
        image = tl.program_id(1).to(tl.int64)
        cell = tl.program_id(0) * TILE + tl.arange(0, TILE)
        k = tl.program_id(2) * TILE_K + tl.arange(0, TILE_K)
        owned = cell < h * w
        i, j = cell // w, cell % w
        y_begin, x_begin = tl.load(y_start + i, mask=owned, other=0), tl.load(x_start + j, mask=owned, other=0)
        plane = logits + image * batch_stride + k.to(tl.int64)[None, :] * class_stride
        result = tl.zeros([TILE, TILE_K], tl.float32)
        for step_y in range(y_window):
            y = y_begin + step_y
            in_y = owned & (y < H)
            y0, fy = tl.load(y_first + y, mask=in_y, other=0), tl.load(y_fraction + y, mask=in_y, other=0)
            share_y = tl.load(y_matrix + y * h + i, mask=in_y, other=0)                 # 0 beyond the cell's own window
            down = tl.where(y0 + 1 < h, y_stride, 0)
            for step_x in range(x_window):
                x = x_begin + step_x
                use = in_y & (x < W)
                x0, fx = tl.load(x_first + x, mask=use, other=0), tl.load(x_fraction + x, mask=use, other=0)
                share = share_y * tl.load(x_matrix + x * w + j, mask=use, other=0)
                across = tl.where(x0 + 1 < w, x_stride, 0)
                at = image * H * W + y * W + x
                label = tl.load(labels + at, mask=use, other=0).to(tl.int32)
                lse = tl.load(normalizer + at, mask=use, other=0)
                scale = tl.load(weight + image * weight_batch_stride + y * weight_y_stride + x * weight_x_stride, mask=use, other=0)
                valid = (label != ignore_index) & (label >= 0) & (label < K)
                share = tl.where(valid, share * scale.to(tl.float32), 0.0)
                z = _bilinear(plane + (y0 * y_stride + x0 * x_stride)[:, None], across[:, None], down[:, None],
                              fx[:, None], fy[:, None], use[:, None] & (k[None, :] < K))
                result += share[:, None] * (tl.exp(z - lse[:, None]) - tl.where(label[:, None] == k[None, :], 1.0, 0.0))
        at = (image * K + k.to(tl.int64)[None, :]) * h * w + cell[:, None]
        tl.store(gradient + at, result, mask=owned[:, None] & (k[None, :] < K))


def _triton_cross_entropy(logits, labels, weight, ignore_index, with_gradient):
    """As _torch_cross_entropy."""
    (B, K, h, w), (H, W), labels = logits.shape, labels.shape[1:], labels.contiguous()
    row, column = _axis(h, H, logits.device), _axis(w, W, logits.device)
    value = torch.empty(B, H, W, dtype=torch.float32, device=logits.device)
    normalizer, gradient = torch.empty_like(value), None
    pixels = labels, weight, *weight.stride(), ignore_index
    with torch.cuda.device_of(logits):
        _pixel_kernel[(triton.cdiv(H * W, TILE_PIXELS), B)](
            logits, *logits.stride(), K, h, w, H, W, row.first, row.fraction, column.first, column.fraction, *pixels,
            value, normalizer, LABELED=True, TILE=TILE_PIXELS)
        if with_gradient:
            gradient = torch.empty(B, K, h, w, dtype=torch.float32, device=logits.device)
            tile_k = min(32, triton.next_power_of_2(K))
            _cell_kernel[(triton.cdiv(h * w, TILE_CELLS), B, triton.cdiv(K, tile_k))](
                logits, *logits.stride(), K, h, w, H, W, row.first, row.fraction, row.matrix, row.start, row.window,
                column.first, column.fraction, column.matrix, column.start, column.window, *pixels,
                normalizer, gradient, TILE=TILE_CELLS, TILE_K=tile_k)
    return value, gradient


def _triton_pseudo_label(logits, size):
    (B, K, h, w), (H, W) = logits.shape, size
    row, column = _axis(h, H, logits.device), _axis(w, W, logits.device)
    label = torch.empty(B, H, W, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(B, H, W, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _pixel_kernel[(triton.cdiv(H * W, TILE_PIXELS), B)](
            logits, *logits.stride(), K, h, w, H, W, row.first, row.fraction, column.first, column.fraction,
            label, confidence, 0, 0, 0, 0, confidence, confidence, LABELED=False, TILE=TILE_PIXELS)    # weight, normalizer: unread
    return label, confidence


# ---- the public operators ----

class _UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, weight, ignore_index, reduction, sweep):
        ctx.now = reduction == "mean" and ctx.needs_input_grad[0]       # upstream is one scalar: form the gradient in this sweep
        value, gradient = sweep(logits, labels, weight, ignore_index, ctx.now)
        ctx.arguments, ctx.dtype, ctx.pixels = (ignore_index, sweep), logits.dtype, labels.numel()
        ctx.save_for_backward(*((gradient,) if ctx.now else (logits, labels, weight)))
        return value.mean() if reduction == "mean" else value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.now:
            gradient = ctx.saved_tensors[0] * (upstream / ctx.pixels)
        else:
            (logits, labels, weight), (ignore_index, sweep) = ctx.saved_tensors, ctx.arguments
            gradient = sweep(logits, labels, weight * upstream, ignore_index, True)[1]
        return gradient.to(ctx.dtype), None, None, None, None, None


def upsample_cross_entropy(logits, labels, weight=None, ignore_index=255, reduction="mean", backend="auto"):
    """Cross-entropy of bilinearly upsampled logits (align_corners=False, any ratio) without the B x K x H x W tensor.

    logits (B,K,h,w) float, any dtype: computed in float32, gradient in the logits' dtype. labels (B,H,W) uint8 or int64.
    weight (B,H,W) float >= 0 or None, no gradient to it; an expanded tensor is read in place.
    reduction "mean": 0-d float32, sum over valid pixels of weight * CE, divided by B*H*W (the DAFormer convention: ignored pixels
    count in the divisor); "none": the map weight * CE (B,H,W) float32, 0 where ignored. Both differentiable once.
    An id that is neither ignore_index nor in 0..K-1 raises ValueError on the CPU; on an accelerator, where looking
    would stall the queue, it counts as ignored. ValueError on wrong shapes, RuntimeError where backend="triton" cannot run.
    The gradient is formed in the forward sweep and scaled in backward, after Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989)."""
    B, K = logits.shape[:2]
    if labels.ndim != 3 or len(labels) != B or labels.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, logits {tuple(logits.shape)} need uint8 or int64 ({B}, H, W)")
    if weight is not None and weight.shape != labels.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, it must be that of the labels, {tuple(labels.shape)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is '{reduction}', it must be 'mean' or 'none'")
    if labels.device.type == "cpu":
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= K))
        if wrong.any():
            raise ValueError(f"label ids {labels[wrong].unique().tolist()[:9]} are neither in 0..{K - 1} nor ignore_index "
                             f"{ignore_index}: map them when the labels are loaded")
    weight = torch.ones((), device=logits.device).expand(labels.shape) if weight is None else weight.detach().float()
    sweep = _triton_cross_entropy if _use_triton(logits, backend) else _torch_cross_entropy
    return _UpsampleCrossEntropy.apply(logits, labels, weight, ignore_index, reduction, sweep)


@torch.no_grad()
def upsample_pseudo_label(logits, size, threshold, backend="auto"):
    """Arg max and its softmax probability after bilinear upsampling (align_corners=False), without the B x K x H x W tensor.

    logits (B,K,h,w) float, K <= 256; size (H,W); threshold in [0,1], number or 0-d tensor.
    -> label uint8 (B,H,W), the lowest id among equals; confidence float32 (B,H,W) in (0,1]; fraction 0-d float32: share of all
    pixels with confidence >= threshold (q of DACS, Tranheden et al. 2021), left on the device. No gradient. RuntimeError as above."""
    if logits.shape[1] > 256:
        raise ValueError(f"{logits.shape[1]} classes do not fit into uint8 labels")
    pseudo_label = _triton_pseudo_label if _use_triton(logits, backend) else _torch_pseudo_label
    label, confidence = pseudo_label(logits, size)
    return label, confidence, (confidence >= threshold).float().mean()


# ---- python kernels.py ----

def _plain_cross_entropy(logits, labels, weight):
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return (F.cross_entropy(up, labels, ignore_index=255, reduction="none") * weight).mean()


def _plain_pseudo_label(logits, size):
    confidence, label = F.interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1).max(1)
    return label, confidence, (confidence >= 0.5).float().mean()


def _example(B, K, low, full, device):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, K, (B, *full), generator=generator)
    labels[:, :full[0] // 9] = 255
    tensors = 3 * torch.randn(B, K, *low, generator=generator), labels, torch.rand(B, *full, generator=generator)
    return [tensor.to(device) for tensor in tensors]


def _with_gradient(loss, logits, *others, **options):
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, *others, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _distance(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm()).item()


def _minima(functions, rounds):
    """Milliseconds: the best of interleaved rounds, so that a busy machine slows every side alike."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for position, function in enumerate(functions):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[position] = min(best[position], 1e3 * (time.perf_counter() - began))
    return best


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ["torch"] + ["triton"] * (triton is not None)
    worst = 0.0
    print(f"{'relative error against float64':46}{'backend':10}{'loss':>9}{'gradient':>10}{'confidence':>12}")
    for B, K, low, full in ((2, 19, (9, 13), (36, 52)), (1, 2, (7, 5), (57, 33)), (2, 11, (12, 9), (7, 20)), (1, 150, (5, 6), (10, 12))):
        logits, labels, weight = _example(B, K, low, full, device)
        loss, gradient = _with_gradient(_plain_cross_entropy, logits.double(), labels, weight.double())
        confidence = _plain_pseudo_label(logits.double(), full)[1]
        for backend in backends:
            ours = _with_gradient(upsample_cross_entropy, logits, labels, weight, backend=backend)
            errors = [_distance(ours[0], loss), _distance(ours[1], gradient),
                      _distance(upsample_pseudo_label(logits, full, 0.5, backend=backend)[1], confidence)]
            print(f"{f'({B},{K},{low[0]},{low[1]}) -> {full[0]}x{full[1]}':46}{backend:10}{errors[0]:9.0e}{errors[1]:10.0e}{errors[2]:12.0e}")
            worst = max(worst, *errors)
    if worst > 1e-5:
        sys.exit(f"a path is off by {worst:.0e} relative, more than 1e-5")
    timed = [backend for backend in backends if backend == "torch" or device == "cuda"]         # the interpreter's time means nothing
    print(f"\n{f'milliseconds, {device}, best of 15, {torch.get_num_threads()} threads':46}{'plain':>10}" + "".join(f"{b:>10}" for b in timed))
    for B, K, low, full in ((4, 19, 32, 128), (2, 19, 64, 256), (2, 19, 128, 512)):
        logits, labels, weight = _example(B, K, (low, low), (full, full), device)
        rows = {"cross-entropy, forward + backward":
                    [lambda: _with_gradient(_plain_cross_entropy, logits, labels, weight)]
                    + [lambda b=b: _with_gradient(upsample_cross_entropy, logits, labels, weight, backend=b) for b in timed],
                "pseudo-label":
                    [lambda: _plain_pseudo_label(logits, (full, full))]
                    + [lambda b=b: upsample_pseudo_label(logits, (full, full), 0.5, backend=b) for b in timed]}
        for name, functions in rows.items():
            shape = f"({B},{K},{low},{low}) -> {full} "
            print(f"{shape + name:46}" + "".join(f"{t:10.2f}" for t in _minima(functions, 15)))


if __name__ == "__main__":
    main()
