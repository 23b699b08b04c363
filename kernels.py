"""Fused operators, each one public function with a Triton path and a chunked torch path of the same meaning.

    python kernels.py        checks both paths against float64 torch and times ours against plain torch

backend="auto" takes Triton for CUDA tensors where the triton package imports, torch otherwise. Triton's interpreter
(TRITON_INTERPRET=1, set before this file is imported) runs the same kernels on CPU tensors: slow, for tests.
A *cell* is a position of the low-resolution logits (h, w), a *pixel* one of the full-resolution labels (H, W); of
text_correlation's features every position is a pixel, and of pixel_nce's queries and keys every row.
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
    os.environ.setdefault("TRITON_INTERPRET", "1")              # read when a kernel is defined
try:
    import triton
    import triton.language as tl
except ImportError:                                             # no wheel for this platform: the torch path does it all
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TILE_PIXELS, TILE_CELLS = (1024, 256) if INTERPRET else (256, 64)       # the interpreter pays per tile, not per element
IGNORE = 255                     # the label of pixels that take part in nothing
NOBODY = 2**62                  # stands for label 255 where pixels are sorted: behind every other
EPS = 1e-6                      # of a cosine: every vector x is divided by sqrt(|x|^2 + EPS^2)
NCE_TILES = {True: {64: (128, 128), 128: (128, 128), 256: (128, 64), 512: (64, 32)},    # bf16, by C: own x other pixels
             False: {64: (64, 64), 128: (64, 32), 256: (64, 32), 512: (16, 32)}}        # float32; what registers hold
RUNS = 64                       # partial sums of the text's gradient: fixed, so that results do not depend on the GPU


def _use_triton(tensor, backend):
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend is '{backend}', it must be 'auto', 'triton' or 'torch'")
    if backend == "triton" and triton is None:
        raise RuntimeError("backend='triton' needs the triton package (pip install triton); 'torch' computes the same")
    if backend == "triton" and not (tensor.is_cuda or INTERPRET):
        raise RuntimeError("backend='triton' needs CUDA tensors, or TRITON_INTERPRET=1 before kernels.py is imported")
    return backend == "triton" or (backend == "auto" and tensor.is_cuda and triton is not None)


# ---- bilinear interpolation along one axis, align_corners=False: the tables both paths share ----

class Axis(NamedTuple):
    """Where the pixels of one axis lie between its cells."""
    first: torch.Tensor         # (full,) int32: lower cell of a pixel; the upper is the next, or the same at the end
    fraction: torch.Tensor      # (full,) float32 in [0, 1): weight of the upper cell
    matrix: torch.Tensor        # (full, low) float32, both weights of every pixel: pixels = matrix @ cells
    start: torch.Tensor         # (low,) int32: first pixel that a cell takes part in
    window: int                 # the largest number of pixels that one cell takes part in
    reach: list                 # per pixel (lower cell, upper cell + 1), Python numbers


@lru_cache(maxsize=32)
def _axis(low, full, device):
    position = ((torch.arange(full, dtype=torch.float64) + 0.5) * (low / full) - 0.5).clamp_(min=0)
    first = position.long()
    second = (first + 1).clamp_(max=low - 1)
    fraction = position - first
    matrix = torch.zeros(full, low, dtype=torch.float64).scatter_add_(1, first[:, None], 1 - fraction[:, None])
    matrix = matrix.scatter_add_(1, second[:, None], fraction[:, None])
    touched = matrix > 0                                        # one run of pixels per cell, empty if it is skipped
    return Axis(first.int().to(device), fraction.float().to(device), matrix.float().to(device),
                touched.int().argmax(0).int().to(device), int(touched.sum(0).max()),
                list(zip(first.tolist(), (second + 1).tolist())))


# ---- torch path: interpolation as two small matrix products, one chunk of rows at a time ----

def _upsampled_chunks(logits, size):
    """Yields slices (images, rows, cells), row matrix (r,c), column matrix (W,w), upsampled float32 (b,K,r,W)."""
    (B, K, h, w), (H, W) = logits.shape, size
    row, column = _axis(h, H, logits.device), _axis(w, W, logits.device)
    budget = 2**20 if logits.device.type == "cpu" else 2**23    # elements of a chunk: fits a cache, feeds two threads
    r = min(H, max(8, budget // (K * W)))                       # thinner chunks repeat too many shared rows of cells
    r = -(-H // -(-H // r))                                     # all chunks about equally high
    b = max(1, budget // (K * W * r))
    for i in range(0, B, b):
        for y in range(0, H, r):
            end = min(y + r, H)
            cells = slice(row.reach[y][0], row.reach[end - 1][1])
            wide = logits[i:i + b, :, cells].float() @ column.matrix.t()                # (b,K,c,w) -> (b,K,c,W)
            up = row.matrix[y:end, cells] @ wide                                        # (b,K,c,W) -> (b,K,r,W)
            yield slice(i, i + b), slice(y, end), cells, row.matrix[y:end, cells], column.matrix, up


def _torch_cross_entropy(logits, labels, weight, ignore_index, with_gradient):
    """-> weight * CE (B,H,W), and the gradient of its sum with respect to logits, float32 (B,K,h,w), or None."""
    value = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    gradient = torch.zeros_like(logits, dtype=torch.float32) if with_gradient else None
    with torch.autocast(logits.device.type, enabled=False):     # these products interpolate: never in bf16
        for images, rows, cells, row_matrix, column_matrix, up in _upsampled_chunks(logits, labels.shape[1:]):
            label = labels[images, rows].unsqueeze(1).long()                            # (b,1,r,W), as the maps below
            valid = (label != ignore_index) & (label >= 0) & (label < logits.shape[1])
            label, scale = label.masked_fill(~valid, 0), weight[images, rows].unsqueeze(1) * valid
            picked, largest = up.gather(1, label), up.amax(1, keepdim=True)
            total = up.sub_(largest).exp_().sum(1, keepdim=True)
            value[images, rows] = ((total.log() + largest - picked) * scale).squeeze(1)
            if with_gradient:                                   # scale * (softmax - one-hot), both products transposed
                up.mul_(scale / total).scatter_add_(1, label, -scale)
                gradient[images, :, cells] += (row_matrix.t() @ up) @ column_matrix     # (b,K,r,W) -> (b,K,c,w)
    return value, gradient


def _torch_pseudo_label(logits, size):
    """-> label uint8 (B,H,W), its softmax probability float32 (B,H,W)."""
    B, K = logits.shape[:2]
    label = torch.empty(B, *size, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(B, *size, dtype=torch.float32, device=logits.device)
    rank = torch.arange(K - 1, -1, -1, dtype=torch.uint8, device=logits.device).view(1, K, 1, 1)
    with torch.autocast(logits.device.type, enabled=False):
        for images, rows, _, _, _, up in _upsampled_chunks(logits, size):
            largest = up.amax(1, keepdim=True)
            label[images, rows] = K - 1 - (up.eq(largest) * rank).amax(1)               # 3x faster than argmax on a CPU
            confidence[images, rows] = up.sub_(largest).exp_().sum(1).reciprocal_()
    return label, confidence


# ---- torch path of the correlation: normalised after the dot, one chunk of pixels at a time ----

def _feature_chunks(features):
    """Yields an image, a slice of its rows, and their features as float32 (C,n): a view where they are float32."""
    B, C, H, W = features.shape
    r = max(1, (2**18 if features.device.type == "cpu" else 2**23) // (C * W))          # 2**18 floats fit a CPU's cache
    for i in range(B):
        for y in range(0, H, r):
            yield i, slice(y, y + r), features[i, :, y:y + r].float().flatten(1)        # (C,r,W) -> (C,n)


def _gradient_like(features):
    layout = torch.channels_last if features.stride(1) == 1 else torch.contiguous_format
    return torch.empty(features.shape, dtype=features.dtype, device=features.device, memory_format=layout)


def _torch_correlation(features, rows):
    """-> dot products with rows (K,C) over the norm: float32 (B,K,H,W), and the inverse norms, float32 (B,H,W)."""
    (B, _, H, W), K = features.shape, len(rows)
    value = torch.empty(B, K, H, W, dtype=torch.float32, device=features.device)
    inverse = torch.empty(B, H, W, dtype=torch.float32, device=features.device)
    for i, y, f in _feature_chunks(features):
        r = inverse[i, y].flatten()                             # a view (n,), as value's below is one of (K,n)
        torch.add((f * f).sum(0), EPS**2, out=r).rsqrt_()       # on a CPU 10x faster than vector_norm over planes
        torch.mm(rows, f, out=value[i, :, y].flatten(1)).mul_(r)                # with out= autocast leaves it float32
    return value, inverse


def _torch_correlation_gradient(features, rows, value, inverse, upstream):
    """-> gradients of (value * upstream).sum(): with respect to features, in their dtype, and to rows, float32."""
    gradient, rows_gradient = _gradient_like(features), torch.zeros_like(rows)
    for i, y, f in _feature_chunks(features):
        r = inverse[i, y].flatten()                                                     # (r,W) -> (n,)
        g = upstream[i, :, y].flatten(1) * r                                            # (K,r,W) -> (K,n)
        along = (g * value[i, :, y].flatten(1)).sum(0).mul_(r)  # a step along the feature itself changes no cosine
        rows_gradient.addmm_(g, f.t())
        out = gradient[i, :, y].flatten(1)                                              # a view (C,n)
        work = out if out.dtype == torch.float32 else torch.empty_like(f)
        out.copy_(torch.mm(rows.t(), g, out=work).addcmul_(f, along, value=-1))         # onto itself: copies nothing
    return gradient, rows_gradient


# ---- class-labelled InfoNCE: both sides sorted by label, so that a pixel's positives are one range of the other ----

class Sorted(NamedTuple):
    """One side of a contrast in the order of its labels, and where its pixels' positives are on the other side."""
    order: torch.Tensor         # (N,) int64: the pixels of one side, queries or keys, by label, ignored ones last
    first: torch.Tensor         # (N,) int32: the other side's pixels of the same label, in its order, begin here
    last: torch.Tensor          # (N,) int32: and end before this
    own: torch.Tensor           # (N,) int32: where the other side has the pixel that is left out, -1 if there is none
    count: torch.Tensor         # 0-d int64: how many are not ignored; stays on the device


@torch.no_grad()
def _sort_by_label(yq, yk, exclude_self):
    """Labels int64, NOBODY where ignored -> Sorted queries, Sorted keys, and per sorted query 1 / |P|, 0 where it has
    no positive or no negative."""
    (queries, keys), sides = [y.sort(stable=True) for y in (yq, yk)], []
    for (y, order), (other, other_order) in ((queries, keys), (keys, queries)):
        own = other_order.argsort()[order] if exclude_self else torch.full_like(order, -1)
        own = own.masked_fill(own >= (other < NOBODY).sum(), -1)
        first, last = torch.searchsorted(other, y), torch.searchsorted(other, y, right=True)
        sides.append(Sorted(order, first.int(), last.int(), own.int(), (y < NOBODY).sum()))
    label, (queries, keys) = queries[0], sides
    span, left_out = queries.last - queries.first, queries.own >= 0
    positives = span - (left_out & (queries.own >= queries.first) & (queries.own < queries.last)).int()
    negatives = keys.count - left_out.int() - positives
    return queries, keys, ((label < NOBODY) & (positives > 0) & (negatives > 0)) / positives.clamp(min=1)


def _torch_nce(q, k, queries, keys, scale, wk, tau, per_positive, q_gradient, k_gradient):
    """q (N,C), k (M,C) as given, scale (N,) and wk (M,) sorted -> of the pixels that are not ignored, sorted: value *
    scale, and the gradients of its sum with respect to q and to k, or None; and a tuple of what the backward needs."""
    q, k = q[queries.order[:queries.count]].float() / tau, k[keys.order[:keys.count]].float()
    scale, first, last, own = (x[:len(q), None] for x in (scale, *queries[1:4]))
    low, high = torch.where(own < 0, first, torch.minimum(first, own)), torch.maximum(last, own + 1)
    value, scaled = q.new_zeros(len(q)), q * scale
    gradient, k_gradient = (torch.zeros_like(x) if needed else None for x, needed in ((q, q_gradient), (k, k_gradient)))
    r = max(64, (2**19 if q.device.type == "cpu" else 2**25) // max(1, len(k)))         # 2**19 floats fit a CPU's cache
    for begin in range(0, len(q) if len(k) else 0, r):
        rows = slice(begin, begin + r)
        near = slice(int(low[rows].min()), int(high[rows].max()))                       # all others are negatives
        column = torch.arange(near.start, near.stop, dtype=torch.int32, device=q.device)
        hidden = column == own[rows]
        positive = (column >= first[rows]) & (column < last[rows]) & ~hidden            # (r,n) of the r x M logits
        slope = torch.where(positive, wk[near], 0.0)
        s = torch.mm(q[rows], k.t())
        block = s[:, near]
        margin = block.clone()
        block.masked_fill_(hidden | positive if per_positive else hidden, float("-inf"))
        largest = s.amax(1, keepdim=True).clamp_(min=-1e30)     # finite if all is hidden: such rows scale by 0
        total = s.sub_(largest).exp_().sum(1, keepdim=True).clamp_(min=1)
        torch.sub(largest + total.log(), margin, out=margin)
        value[rows] = (slope * (F.softplus(margin) if per_positive else margin)).sum(1)
        if q_gradient or k_gradient is not None:
            slope = slope.mul_(margin.sigmoid_()) if per_positive else slope
            s.mul_(slope.sum(1, keepdim=True) / total)          # the pull of each positive, shared among the negatives
            block.sub_(slope)
            if q_gradient:
                torch.mm(s, k, out=gradient[rows])
            if k_gradient is not None:
                k_gradient.addmm_(s.t(), scaled[rows])
    return value * scale[:, 0], gradient.mul_(scale / tau) if q_gradient else None, k_gradient, ()


def _torch_nce_gradient(*arguments):
    """As _torch_nce, but only the gradient with respect to sorted k."""
    return _torch_nce(*arguments, False, True)[2]


# ---- Triton path: every program owns what it writes; no atomics, so results repeat bit for bit ----

if triton is not None:
    @triton.jit
    def _bilinear(pointer, down, across, fy, fx, mask):
        a = tl.load(pointer, mask=mask, other=0).to(tl.float32)                 # at once: no bf16 in the interpreter
        b = tl.load(pointer + across, mask=mask, other=0).to(tl.float32)
        c = tl.load(pointer + down, mask=mask, other=0).to(tl.float32)
        d = tl.load(pointer + down + across, mask=mask, other=0).to(tl.float32)
        return (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy

    @triton.jit
    def _pixel_kernel(logits, K, h, w, H, W, first_y, fraction_y, first_x, fraction_x, labels, weight, ignore_index,
                      value, normalizer, LABELED: tl.constexpr, TILE: tl.constexpr):
        """A tile of pixels of one image in one sweep over the classes (online softmax). LABELED: writes the value
        weight * CE and the log-normalizer; else writes labels = arg max and value = its probability."""
        image = tl.program_id(1).to(tl.int64)                   # int64: B*K*h*w and B*H*W may pass 2**31
        pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = pixel < H * W
        y, x = pixel // W, pixel % W
        y0, fy = tl.load(first_y + y, mask=inside, other=0), tl.load(fraction_y + y, mask=inside, other=0)
        x0, fx = tl.load(first_x + x, mask=inside, other=0), tl.load(fraction_x + x, mask=inside, other=0)
        down, across = tl.where(y0 + 1 < h, w, 0), tl.where(x0 + 1 < w, 1, 0)
        corner = logits + image * K * h * w + y0 * w + x0
        plane = corner
        best = tl.zeros([TILE], tl.int32)
        total = tl.zeros([TILE], tl.float32)
        largest = tl.full([TILE], float("-inf"), tl.float32)
        for k in range(K):
            z = _bilinear(plane, down, across, fy, fx, inside)
            plane += h * w
            best = tl.where(z > largest, k, best)
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
    def _cell_kernel(logits, K, h, w, H, W, first_y, fraction_y, matrix_y, start_y, window_y,
                     first_x, fraction_x, matrix_x, start_x, window_x, labels, weight, ignore_index,
                     normalizer, gradient, TILE: tl.constexpr, TILE_K: tl.constexpr):
        """A tile of cells x classes of one image gathers share * weight * (softmax - one-hot) from the pixels its cells
        take part in; share is the interpolation weight. A pixel is computed once for each of its (up to four) cells."""
        image = tl.program_id(1).to(tl.int64)
        cell = tl.program_id(0) * TILE + tl.arange(0, TILE)
        k = tl.program_id(2) * TILE_K + tl.arange(0, TILE_K)[None, :]
        owned = cell < h * w
        begin_y = tl.load(start_y + cell // w, mask=owned, other=0)
        begin_x = tl.load(start_x + cell % w, mask=owned, other=0)
        plane = (image * K + k) * h * w                                                 # (1, TILE_K)
        result = tl.zeros([TILE, TILE_K], tl.float32)
        for step_y in range(window_y):
            y = begin_y + step_y
            in_y = owned & (y < H)
            y0, fy = tl.load(first_y + y, mask=in_y, other=0), tl.load(fraction_y + y, mask=in_y, other=0)
            share_y = tl.load(matrix_y + y * h + cell // w, mask=in_y, other=0)         # 0 past the cell's own window
            down = tl.where(y0 + 1 < h, w, 0)
            for step_x in range(window_x):
                x = begin_x + step_x
                used = in_y & (x < W)
                x0, fx = tl.load(first_x + x, mask=used, other=0), tl.load(fraction_x + x, mask=used, other=0)
                share = share_y * tl.load(matrix_x + x * w + cell % w, mask=used, other=0)
                across = tl.where(x0 + 1 < w, 1, 0)
                at = image * H * W + y * W + x
                label = tl.load(labels + at, mask=used, other=0).to(tl.int32)
                used = used & (label != ignore_index) & (label >= 0) & (label < K)
                share = share * tl.load(weight + at, mask=used, other=0)                # 0 where ignored
                lse = tl.load(normalizer + at, mask=used, other=0)
                z = _bilinear(logits + plane + (y0 * w + x0)[:, None], down[:, None], across[:, None],
                              fy[:, None], fx[:, None], used[:, None] & (k < K))        # (TILE, TILE_K)
                result += share[:, None] * (tl.exp(z - lse[:, None]) - tl.where(label[:, None] == k, 1.0, 0.0))
        tl.store(gradient + plane + cell[:, None], result, mask=owned[:, None] & (k < K))

    @triton.jit
    def _offset(pixel, W, at_y, at_x, channel, at_channel):
        """-> (pixels, channels) int64: C*H*W may pass 2**31. Any strides: the features are never copied."""
        plane = (pixel // W).to(tl.int64) * at_y + (pixel % W).to(tl.int64) * at_x
        return plane[:, None] + channel.to(tl.int64)[None, :] * at_channel

    @triton.jit
    def _correlation_kernel(features, at_image, at_channel, at_y, at_x, rows, C, K, W, pixels, value, inverse,
                            EPS2: tl.constexpr, PRECISION: tl.constexpr,
                            TILE: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr):
        """A tile of pixels of one image in one sweep over the channels: dot products with all rows, and the norm."""
        image = tl.program_id(1).to(tl.int64)
        pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
        k = tl.arange(0, TILE_K)
        inside, known = (pixel < pixels)[:, None], (k < K)[None, :]
        dots = tl.zeros([TILE, TILE_K], tl.float32)
        square = tl.zeros([TILE], tl.float32)
        for begin in range(0, C, TILE_C):
            c = begin + tl.arange(0, TILE_C)
            f = tl.load(features + image * at_image + _offset(pixel, W, at_y, at_x, c, at_channel),
                        mask=inside & (c < C)[None, :], other=0)                        # (TILE, TILE_C)
            row = tl.load(rows + k[None, :] * C + c[:, None], mask=(c < C)[:, None] & known, other=0)
            exact = f.to(tl.float32)
            square += tl.sum(exact * exact, 1)
            dots = tl.dot(f.to(row.dtype), row, dots, input_precision=PRECISION)
        r = tl.rsqrt(square + EPS2)
        tl.store(inverse + image * pixels + pixel, r, mask=pixel < pixels)
        tl.store(value + (image * K + k[None, :]) * pixels + pixel[:, None], dots * r[:, None], mask=inside & known)

    @triton.jit
    def _correlation_gradient_kernel(features, at_image, at_channel, at_y, at_x, rows, B, C, K, W, pixels,
                                     value, inverse, upstream, gradient, to_image, to_channel, to_y, to_x, partial,
                                     tiles, steps, PRECISION: tl.constexpr,
                                     TILE: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr):
        """A few channels of every n-th tile of pixels, n programs: reads their features once, writes the gradient and
        this program's share of the rows' gradient. tiles is the number of one image."""
        c, k = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C), tl.arange(0, TILE_K)
        owned = (k < K)[:, None] & (c < C)[None, :]
        row = tl.load(rows + k[:, None] * C + c[None, :], mask=owned, other=0)          # (TILE_K, TILE_C)
        share = tl.zeros([TILE_K, TILE_C], tl.float32)
        for step in range(steps):
            tile = step * tl.num_programs(1) + tl.program_id(1)
            image = (tile // tiles).to(tl.int64)
            pixel = tile % tiles * TILE + tl.arange(0, TILE)
            inside = (pixel < pixels) & (image < B)
            r = tl.load(inverse + image * pixels + pixel, mask=inside, other=0)
            plane = (image * K + k[None, :]) * pixels + pixel[:, None]                  # (TILE, TILE_K)
            known = inside[:, None] & (k < K)[None, :]
            g = tl.load(upstream + plane, mask=known, other=0) * r[:, None]
            along = tl.sum(g * tl.load(value + plane, mask=known, other=0), 1) * r      # as in the torch path
            used = inside[:, None] & (c < C)[None, :]
            f = tl.load(features + image * at_image + _offset(pixel, W, at_y, at_x, c, at_channel), mask=used, other=0)
            g = g.to(row.dtype)
            share = tl.dot(tl.trans(g), f.to(row.dtype), share, input_precision=PRECISION)
            d = tl.dot(g, row, input_precision=PRECISION) - f.to(tl.float32) * along[:, None]
            tl.store(gradient + image * to_image + _offset(pixel, W, to_y, to_x, c, to_channel),
                     d.to(gradient.dtype.element_ty), mask=used)
        tl.store(partial + (tl.program_id(1).to(tl.int64) * K + k[:, None]) * C + c[None, :], share, mask=owned)

    @triton.jit
    def _nce_own(rows, first, last, own, count, others, C: tl.constexpr, TILE: tl.constexpr, TILE_Y: tl.constexpr):
        """-> a tile of one side; and of the other side's tiles the first with pixels of the same labels, the number of
        such, their number with the last tile, which may be ragged, and the number of all."""
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = row < count
        at = row.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]                   # int64: N*C may pass 2**31
        x = tl.load(rows + at, mask=inside[:, None], other=0)
        first = tl.load(first + row, mask=inside, other=2**30)
        last = tl.load(last + row, mask=inside, other=0)
        own = tl.load(own + row, mask=inside, other=-1)
        low = tl.min(tl.where(own < 0, first, tl.minimum(first, own)), 0) // TILE_Y
        near = tl.cdiv(tl.max(tl.maximum(last, own + 1), 0), TILE_Y) - low
        tiles = tl.cdiv(others, TILE_Y)
        looked = near + tl.where(low + near < tiles, 1, 0)
        return row, inside, at, x, first[:, None], last[:, None], own[:, None], low, near, looked, tiles

    @triton.jit
    def _nce_tile(x, rows, step, low, near, tiles, count, factor, LOOK: tl.constexpr, PRECISION: tl.constexpr,
                  C: tl.constexpr, TILE_Y: tl.constexpr):
        """-> pixels of the other side, their rows, and the logits of x with them in units of log 2. LOOK: of the near
        tiles, then the last one; else of the rest, in which all are negatives."""
        tile = tl.where(step < near, low + step, tiles - 1) if LOOK else tl.where(step < low, step, step + near)
        pixel = tile * TILE_Y + tl.arange(0, TILE_Y)
        at = rows + pixel.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
        y = tl.load(at, mask=(pixel < count)[:, None], other=0) if LOOK else tl.load(at)
        return pixel, y, tl.dot(x, tl.trans(y), input_precision=PRECISION) * factor

    @triton.jit
    def _nce_query_kernel(q, k, first, last, own, queries, keys, scale, wk, tau, value, normalizer, slopes, gradient,
                          PER_POSITIVE: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
                          C: tl.constexpr, TILE: tl.constexpr, TILE_Y: tl.constexpr):
        """A tile of queries in one sweep over the keys and a second over those near its own labels: value * scale, the
        normalizer in units of log 2, the sum of the positives' slopes, and the gradient with respect to q."""
        queries, keys = tl.load(queries).to(tl.int32), tl.load(keys).to(tl.int32)
        if tl.program_id(0) * TILE >= queries:
            return
        row, inside, at, x, first, last, own, low, near, looked, tiles = _nce_own(
            q, first, last, own, queries, keys, C, TILE, TILE_Y)
        tau = tl.load(tau)
        factor = 1.4426950408889634 / tau
        largest = tl.full([TILE], -1e30, tl.float32)            # finite, so that -inf - largest is no NaN
        total = tl.zeros([TILE], tl.float32)
        pull = tl.zeros([TILE, C], tl.float32)                  # sum of exp(s - largest) * k
        for LOOK in tl.static_range(2):
            for step in range(looked if LOOK else tiles - looked):
                j, y, s = _nce_tile(x, k, step, low, near, tiles, keys, factor, LOOK, PRECISION, C, TILE_Y)
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
                    pull = tl.dot(p.to(y.dtype), y, pull * shrink[:, None], input_precision=PRECISION)
        total = tl.maximum(total, 1.0)                          # it is, but where everything is hidden
        z = largest + tl.log2(total)
        if GRADIENT:                                            # parked in memory: registers hold one (TILE, C) only
            tl.store(gradient + at, pull / total[:, None], mask=inside[:, None])
            pull = tl.zeros([TILE, C], tl.float32)              # from here on: sum of slope * k over the positives
        loss = tl.zeros([TILE], tl.float32)
        slope = tl.zeros([TILE], tl.float32)
        for step in range(near):
            j, y, s = _nce_tile(x, k, step, low, near, tiles, keys, factor, True, PRECISION, C, TILE_Y)
            w = tl.load(wk + j, mask=j < keys, other=0)[None, :]
            j = j[None, :]
            w = tl.where((j >= first) & (j < last) & (j != own), w, 0.0)
            margin = z[:, None] - s
            if PER_POSITIVE:
                loss += tl.sum(w * (tl.maximum(margin, 0.0) + tl.log2(1 + tl.exp2(-tl.abs(margin)))), 1)
                w = w / (1 + tl.exp2(-margin))
            else:
                loss += tl.sum(w * margin, 1)
            slope += tl.sum(w, 1)
            if GRADIENT:
                pull = tl.dot(w.to(y.dtype), y, pull, input_precision=PRECISION)
        a = tl.load(scale + row, mask=inside, other=0)
        tl.store(value + row, a * loss * 0.6931471805599453, mask=inside)
        tl.store(normalizer + row, tl.where(a == 0, 1e30, z), mask=inside)              # unused: exp(s - z) = 0
        tl.store(slopes + row, slope, mask=inside)
        if GRADIENT:
            tl.debug_barrier()                                  # what other threads of this program have parked is seen
            parked = tl.load(gradient + at, mask=inside[:, None], other=0)
            tl.store(gradient + at, (slope[:, None] * parked - pull) * (a / tau)[:, None], mask=inside[:, None])

    @triton.jit
    def _nce_key_kernel(k, q, first, last, own, keys, queries, wk, tau, normalizer, push, slope_push, gradient,
                        PER_POSITIVE: tl.constexpr, PRECISION: tl.constexpr,
                        C: tl.constexpr, TILE: tl.constexpr, TILE_Y: tl.constexpr):
        """A tile of keys gathers its gradient from all queries. push (N,) is upstream * scale / tau of the queries, and
        slope_push that times their slopes."""
        queries, keys = tl.load(queries).to(tl.int32), tl.load(keys).to(tl.int32)
        if tl.program_id(0) * TILE >= keys:
            return
        row, inside, at, x, first, last, own, low, near, looked, tiles = _nce_own(
            k, first, last, own, keys, queries, C, TILE, TILE_Y)
        w = tl.load(wk + row, mask=inside, other=0)[:, None]
        factor = 1.4426950408889634 / tl.load(tau)
        total = tl.zeros([TILE, C], tl.float32)
        for LOOK in tl.static_range(2):
            for step in range(looked if LOOK else tiles - looked):
                i, y, s = _nce_tile(x, q, step, low, near, tiles, queries, factor, LOOK, PRECISION, C, TILE_Y)
                known = i < queries                             # always so, where it need not LOOK
                s = s - tl.load(normalizer + i, mask=known, other=1e30)[None, :]
                d = tl.exp2(s) * tl.load(slope_push + i, mask=known, other=0)[None, :]
                if LOOK:
                    slope = w * tl.load(push + i, mask=known, other=0)[None, :]
                    i = i[None, :]
                    d = tl.where((i >= first) & (i < last), -slope / (1 + tl.exp2(s)) if PER_POSITIVE else d - slope, d)
                    d = tl.where(i == own, 0.0, d)
                total = tl.dot(d.to(y.dtype), y, total, input_precision=PRECISION)
        tl.store(gradient + at, total, mask=inside[:, None])


def _triton_cross_entropy(logits, labels, weight, ignore_index, with_gradient):
    """As _torch_cross_entropy."""
    (B, K, h, w), (H, W) = logits.shape, labels.shape[1:]
    row, column = _axis(h, H, logits.device), _axis(w, W, logits.device)
    logits, labels, weight = logits.contiguous(), labels.contiguous(), weight.contiguous()
    value, normalizer, gradient = torch.empty_like(weight), torch.empty_like(weight), None
    with torch.cuda.device_of(logits):
        _pixel_kernel[(triton.cdiv(H * W, TILE_PIXELS), B)](
            logits, K, h, w, H, W, *row[:2], *column[:2], labels, weight, ignore_index, value, normalizer,
            LABELED=True, TILE=TILE_PIXELS)
        if with_gradient:
            gradient, tile_k = torch.empty_like(logits, dtype=torch.float32), min(32, triton.next_power_of_2(K))
            _cell_kernel[(triton.cdiv(h * w, TILE_CELLS), B, triton.cdiv(K, tile_k))](
                logits, K, h, w, H, W, *row[:5], *column[:5], labels, weight, ignore_index, normalizer, gradient,
                TILE=TILE_CELLS, TILE_K=tile_k)
    return value, gradient


def _triton_pseudo_label(logits, size):
    """As _torch_pseudo_label."""
    (B, K, h, w), (H, W) = logits.shape, size
    row, column = _axis(h, H, logits.device), _axis(w, W, logits.device)
    label = torch.empty(B, H, W, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(B, H, W, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _pixel_kernel[(triton.cdiv(H * W, TILE_PIXELS), B)](
            logits.contiguous(), K, h, w, H, W, *row[:2], *column[:2], label, None, IGNORE, confidence, None,
            LABELED=False, TILE=TILE_PIXELS)
    return label, confidence


def _correlation_tiles(features, K):
    """-> the dtype of the dot products' operands, and the options of both kernels."""
    # bf16 goes to the tensor cores as it is; float16 could not hold the gradients, and is exact in tf32
    operand = torch.bfloat16 if features.dtype == torch.bfloat16 and not INTERPRET else torch.float32
    precision = "tf32" if features.dtype == torch.float16 else "tf32x3"                 # tf32x3: float32's accuracy
    tile_k = max(16, triton.next_power_of_2(K))                 # 16 is the least that a tensor core takes
    tile, tile_c = (32, 32) if tile_k > 64 else (128, 64) if operand == torch.bfloat16 else (64, 64)    # registers
    return operand, {"PRECISION": precision, "TILE": tile, "TILE_C": tile_c, "TILE_K": tile_k,
                     "num_warps": 8, "num_stages": 2}


def _triton_correlation(features, rows):
    """As _torch_correlation."""
    (B, C, H, W), K = features.shape, len(rows)
    operand, options = _correlation_tiles(features, K)
    value = torch.empty(B, K, H, W, dtype=torch.float32, device=features.device)
    inverse = torch.empty(B, H, W, dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(features):
        _correlation_kernel[(triton.cdiv(H * W, options["TILE"]), B)](
            features, *features.stride(), rows.to(operand), C, K, W, H * W, value, inverse, EPS2=EPS**2, **options)
    return value, inverse


def _triton_correlation_gradient(features, rows, value, inverse, upstream):
    """As _torch_correlation_gradient."""
    (B, C, H, W), K = features.shape, len(rows)
    operand, options = _correlation_tiles(features, K)
    gradient, tiles = _gradient_like(features), triton.cdiv(H * W, options["TILE"])
    runs = min(RUNS, B * tiles)
    partial = torch.empty(runs, K, C, dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(features):
        _correlation_gradient_kernel[(triton.cdiv(C, options["TILE_C"]), runs)](
            features, *features.stride(), rows.to(operand), B, C, K, W, H * W, value, inverse, upstream.contiguous(),
            gradient, *gradient.stride(), partial, tiles, triton.cdiv(B * tiles, runs), **options)
    return gradient, partial.sum(0)


def _nce_operands(q, k, queries, keys):
    """-> sorted q and k for the dot products, C padded to a power of two >= 64, and the options of both kernels."""
    C, dtypes = max(64, triton.next_power_of_2(q.shape[1])), {q.dtype, k.dtype}
    bf16 = dtypes == {torch.bfloat16} and not INTERPRET         # float32 otherwise, as in _correlation_tiles
    q, k = (F.pad(x[side.order].to(torch.bfloat16 if bf16 else torch.float32), (0, C - x.shape[1]))
            for x, side in ((q, queries), (k, keys)))
    tile, tile_y = (64, 64) if INTERPRET else NCE_TILES[bf16].get(C, (16, 16))
    return q, k, {"PRECISION": "tf32" if dtypes == {torch.float16} else "tf32x3", "C": C, "TILE": tile,
                  "TILE_Y": tile_y, "num_warps": 8, "num_stages": 2 if bf16 or C < 512 else 1}


def _triton_nce(q, k, queries, keys, scale, wk, tau, per_positive, q_gradient, k_gradient):
    """As _torch_nce, but the gradient with respect to k is left to the backward, and ignored pixels have rows of 0."""
    C = q.shape[1]
    q, k, options = _nce_operands(q, k, queries, keys)
    value, normalizer, slopes = torch.zeros(3, len(q), dtype=torch.float32, device=q.device)
    gradient = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if q_gradient else None
    if len(q) and len(k):
        with torch.cuda.device_of(q):
            _nce_query_kernel[(triton.cdiv(len(q), options["TILE"]),)](
                q, k, *queries[1:4], queries.count, keys.count, scale, wk, tau, value, normalizer, slopes, gradient,
                PER_POSITIVE=per_positive, GRADIENT=q_gradient, **options)
    return value, gradient[:, :C] if q_gradient else None, None, (normalizer, slopes)


def _triton_nce_gradient(q, k, queries, keys, scale, wk, tau, per_positive, normalizer, slopes):
    """As _torch_nce_gradient."""
    C = q.shape[1]
    q, k, options = _nce_operands(q, k, queries, keys)
    gradient, push = torch.zeros(k.shape, dtype=torch.float32, device=k.device), scale / tau
    if len(q) and len(k):
        with torch.cuda.device_of(q):
            _nce_key_kernel[(triton.cdiv(len(k), options["TILE"]),)](
                k, q, *keys[1:4], keys.count, queries.count, wk, tau, normalizer, push, push * slopes, gradient,
                PER_POSITIVE=per_positive, **options)
    return gradient[:, :C]


# ---- the public operators ----

class _UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, weight, ignore_index, reduction, sweep):
        ctx.formed = reduction == "mean" and ctx.needs_input_grad[0]    # upstream is one scalar: gradient in this sweep
        value, gradient = sweep(logits, labels, weight, ignore_index, ctx.formed)
        ctx.ignore_index, ctx.sweep, ctx.pixels = ignore_index, sweep, labels.numel()
        ctx.save_for_backward(*((gradient,) if ctx.formed else (logits, labels, weight)))
        return value.mean() if reduction == "mean" else value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.formed:
            gradient = ctx.saved_tensors[0] * (upstream / ctx.pixels)
        else:
            logits, labels, weight = ctx.saved_tensors
            _, gradient = ctx.sweep(logits, labels, weight * upstream, ctx.ignore_index, True)
        return gradient, None, None, None, None, None                   # autograd casts it to the logits' dtype


def upsample_cross_entropy(logits, labels, weight=None, ignore_index=IGNORE, reduction="mean", backend="auto"):
    """Cross-entropy of bilinearly upsampled logits (align_corners=False, any ratio) without the B x K x H x W tensor.

    logits (B,K,h,w) float, computed in float32, gradient in the logits' dtype. labels (B,H,W) uint8 or int64.
    weight (B,H,W) float, finite, or None; it gets no gradient.
    reduction "mean" -> 0-d float32: sum over valid pixels of weight * CE, over B*H*W (convention of the DAFormer
    family: ignored pixels count in the divisor); "none" -> weight * CE (B,H,W) float32, 0 where ignored.
    Differentiable once.
    An id outside 0..K-1 that is not ignore_index raises ValueError on the CPU; on an accelerator, where looking would
    stall the queue, it counts as ignored. ValueError on wrong shapes, RuntimeError where backend="triton" cannot run.
    The gradient is formed in the forward sweep, after Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989)."""
    B, K = logits.shape[:2]
    if labels.ndim != 3 or len(labels) != B or labels.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}, they must be ({B}, H, W) uint8 or int64")
    if weight is not None and weight.shape != labels.shape:
        raise ValueError(f"weight {tuple(weight.shape)} must have the shape of the labels, {tuple(labels.shape)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is '{reduction}', it must be 'mean' or 'none'")
    if labels.device.type == "cpu":
        low, high = labels.masked_fill(labels == ignore_index, 0).aminmax()
        if low < 0 or high >= K:
            raise ValueError(f"labels hold the id {int(low if low < 0 else high)}, which is neither in 0..{K - 1} "
                             f"nor ignore_index {ignore_index}: map the ids when the labels are loaded")
    weight = torch.ones((), device=logits.device).expand(labels.shape) if weight is None else weight.float()
    sweep = _triton_cross_entropy if _use_triton(logits, backend) else _torch_cross_entropy
    return _UpsampleCrossEntropy.apply(logits, labels, weight, ignore_index, reduction, sweep)


@torch.no_grad()
def upsample_pseudo_label(logits, size, threshold, backend="auto"):
    """Arg max and confidence after bilinear upsampling (align_corners=False), without the B x K x H x W tensor.

    logits (B,K,h,w) float, K <= 256; size (H,W); threshold in [0,1], number or 0-d tensor.
    -> label uint8 (B,H,W), the lowest id among equals; confidence (B,H,W) float32, its softmax probability; fraction
    0-d float32, the share of all pixels with confidence >= threshold (q of DACS, Tranheden et al. 2021), still on the
    device. No gradient. ValueError on too many classes, RuntimeError where backend="triton" cannot run."""
    if logits.shape[1] > 256:
        raise ValueError(f"{logits.shape[1]} classes do not fit into uint8 labels")
    label, confidence = (_triton_pseudo_label if _use_triton(logits, backend) else _torch_pseudo_label)(logits, size)
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
        return *ctx.gradient_sweep(*ctx.saved_tensors, upstream), None, None


def text_correlation(features, text, scale, backend="auto"):
    """scale * cosine of every pixel's feature with every class's text, without normalised features in memory.

    features (B,C,H,W) and text (K,C) float, K <= 256, of any length whose square float32 can hold, any strides; scale a
    number or a 0-d tensor -> (B,K,H,W) float32 in [-scale, scale], computed in float32, also under autocast. (On a GPU
    the products of bfloat16 features take text and upstream gradients in bfloat16 too, and sum in float32.)
    Differentiable once, with respect to features, text and scale; gradients repeat bit for bit.
    Every vector x is divided by sqrt(|x|^2 + 1e-6^2): a zero vector has the value 0 and a gradient that is finite but
    large (times 1e6; in float16 it may overflow).
    ValueError on wrong shapes, RuntimeError where backend="triton" cannot run.
    The scores of LSeg (Li et al. 2022, arXiv:2201.03546) with its temperature as 1 / scale."""
    if features.ndim != 4 or text.ndim != 2 or text.shape[1] != features.shape[1]:
        raise ValueError(f"features {tuple(features.shape)}, text {tuple(text.shape)}: must be (B, C, H, W) and (K, C)")
    if len(text) > 256:
        raise ValueError(f"{len(text)} rows of text, 256 are the most")
    paths = ((_triton_correlation, _triton_correlation_gradient) if _use_triton(features, backend) else
             (_torch_correlation, _torch_correlation_gradient))
    text = text.float()
    rows = text * (text * text).sum(1, keepdim=True).add(EPS**2).rsqrt() * scale        # autograd's: K x C is little
    return _TextCorrelation.apply(features, rows, *paths)


class _PixelNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, queries, keys, scale, wk, tau, per_positive, sweep, gradient_sweep):
        with torch.autocast(q.device.type, enabled=False):
            value, q_gradient, k_gradient, rest = sweep(q, k, queries, keys, scale, wk, tau, per_positive,
                                                        *ctx.needs_input_grad[:2])
        ctx.sorted, ctx.per_positive, ctx.gradient_sweep = (queries, keys), per_positive, gradient_sweep
        ctx.save_for_backward(q, k, scale, wk, tau, q_gradient, k_gradient, *rest)
        return _unsorted(value, queries)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        q, k, scale, wk, tau, q_gradient, k_gradient, *rest = ctx.saved_tensors
        queries, keys = ctx.sorted
        if q_gradient is not None:
            q_gradient = _unsorted(q_gradient, queries).mul_(upstream[:, None])
        if ctx.needs_input_grad[1]:
            upstream = upstream[queries.order]
            scaled, used = scale * upstream, scale.argmax() if len(q) else slice(0)
            if k_gradient is not None and torch.equal(scaled, scale * upstream[used]):  # a sum or a mean: one number
                k_gradient = k_gradient * upstream[used].sum()
            else:
                with torch.autocast(q.device.type, enabled=False):
                    k_gradient = ctx.gradient_sweep(q, k, queries, keys, scaled, wk, tau, ctx.per_positive, *rest)
            k_gradient = _unsorted(k_gradient, keys)
        return q_gradient, k_gradient, *[None] * 8                              # autograd casts to the inputs' dtypes


def _unsorted(rows, side):
    """Rows in sorted order, those of ignored pixels may be missing -> as given, 0 where ignored."""
    return rows.new_zeros(len(side.order), *rows.shape[1:]).index_copy_(0, side.order[:len(rows)], rows)


def pixel_nce(q, k, yq, yk, wq=None, wk=None, tau=0.1, form="supcon", exclude_self=False, backend="auto"):
    """Class-labelled InfoNCE of every query pixel against all key pixels, without any N x M matrix.

    q (N,C), k (M,C) float, used as given (unit length is the caller's business); yq (N,), yk (M,) labels of any integer
    dtype, 255 takes part in nothing; wq (N,), wk (M,) float weights or None; tau > 0, a number or a 0-d tensor
    -> (N,) float32. With s = q.k / tau and P_i the keys labelled as query i, row i is
    wq_i / |P_i| * sum over j in P_i of wk_j * l_ij:
    form "supcon"        l_ij = logsumexp over all keys of s_i - s_ij  (L_out of Khosla et al., NeurIPS 2020);
    form "per_positive"  l_ij = softplus(logsumexp over the keys of other labels of s_i - s_ij), which is
        -log(exp(s_ij) / (exp(s_ij) + sum over negatives of exp(s_i)))  (ContrastiveSeg, Wang et al., ICCV 2021;
        CLUDA, Vayyat et al. 2022, arXiv:2208.14227).
    exclude_self: q and k are the same pixels, and row i knows nothing of key i. A row without a positive or without a
    negative is 0, with gradient 0; |P_i| counts keys, whatever their weights. The caller averages. Computed in float32,
    also under autocast. (On a GPU the products of bfloat16 q and k take the softmax in bfloat16 too, and sum in
    float32.) Differentiable once, with respect to q and k only; gradients repeat bit for bit.
    ValueError on wrong shapes, RuntimeError where backend="triton" cannot run."""
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: must be (N, C) and (M, C)")
    if exclude_self and len(q) != len(k):
        raise ValueError(f"exclude_self needs as many keys as queries, there are {len(k)} and {len(q)}")
    if form not in ("supcon", "per_positive"):
        raise ValueError(f"form is '{form}', it must be 'supcon' or 'per_positive'")
    if tau.ndim if torch.is_tensor(tau) else not tau > 0:
        raise ValueError(f"tau is {tau}, it must be a positive number or a 0-d tensor")
    labels, weights = [], []
    for name, x, y, w in (("q", q, yq, wq), ("k", k, yk, wk)):
        if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"y{name} is {tuple(y.shape)} {y.dtype}, it must be ({len(x)},) of an integer dtype")
        if w is not None and w.shape != y.shape:
            raise ValueError(f"w{name} is {tuple(w.shape)}, it must be ({len(x)},)")
        labels.append(y.long().masked_fill(y == IGNORE, NOBODY))
        weights.append(torch.ones(len(x), device=x.device) if w is None else w.detach().float())
    if backend == "auto" and q.shape[1] > (512 if q.dtype == k.dtype == torch.bfloat16 else 256):
        backend = "torch"                                       # Triton's tiles would not fit into registers
    paths = (_triton_nce, _triton_nce_gradient) if _use_triton(q, backend) else (_torch_nce, _torch_nce_gradient)
    tau = tau.detach().float() if torch.is_tensor(tau) else torch.full((), tau, device=q.device)
    queries, keys, scale = _sort_by_label(*labels, exclude_self)
    return _PixelNCE.apply(q, k, queries, keys, scale * weights[0][queries.order], weights[1][keys.order], tau,
                           form == "per_positive", *paths)


# ---- python kernels.py ----

def _plain_correlation(features, text, scale):
    return scale * torch.einsum("bchw,kc->bkhw", F.normalize(features), F.normalize(text))


def _plain_cross_entropy(logits, labels, weight):
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return (F.cross_entropy(up, labels, ignore_index=255, reduction="none") * weight).mean()


@torch.no_grad()
def _plain_pseudo_label(logits, size, threshold):
    confidence, label = F.interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1).max(1)
    return label, confidence, (confidence >= threshold).double().mean()


def _plain_nce(x, yq, yk, wq, wk, tau, form):
    same, s = yq[:, None] == yk, x[0] @ x[1].t() / tau          # no ignored pixels, every label on both sides
    if form == "supcon":
        loss = s.logsumexp(1, keepdim=True) - s
    else:
        loss = F.softplus(s.masked_fill(same, float("-inf")).logsumexp(1, keepdim=True) - s)
    return wq / same.sum(1) * (loss * (same * wk)).sum(1)


def _stacked_nce(x, *inputs, backend):
    return pixel_nce(*x, *inputs, backend=backend)              # x (2,N,C) is q and k: one leaf for both gradients


def _run(operator, inputs, **options):
    """-> the operator's outputs and, where it has one, the gradient of the first output's sum to the first input."""
    leaf = inputs[0].detach().requires_grad_()
    outputs = operator(leaf, *inputs[1:], **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs + torch.autograd.grad(outputs[0].sum(), leaf) if outputs[0].requires_grad else outputs


def _milliseconds(functions, finish):
    """The best of 15 interleaved rounds, so that a busy machine slows every side alike."""
    best = [float("inf")] * len(functions)
    for _ in range(15):
        for side, function in enumerate(functions):
            finish()
            began = time.perf_counter()
            function()
            finish()
            best[side] = min(best[side], 1e3 * (time.perf_counter() - began))
    return best


def _map_cases(device):
    """Yields operator, plain operator, inputs, title, whether to time it."""
    checked = (2, 19, (9, 13), (36, 52)), (1, 2, (7, 5), (57, 33)), (2, 11, (12, 9), (7, 20)), (1, 150, (5, 6), (9, 8))
    timed = (4, 19, (32, 32), (128, 128)), (2, 19, (64, 64), (256, 256)), (2, 19, (128, 128), (512, 512))
    channels = {19: 256, 11: 33, 150: 320}                      # of text_correlation, by the number of classes
    for B, K, low, full in checked + timed:
        logits, labels = 3 * torch.randn(B, K, *low, device=device), torch.randint(K, (B, *full), device=device)
        labels[:, :full[0] // 7] = 255
        time_it, C, weight = (B, K, low, full) in timed, channels.get(K, 64), torch.rand(B, *full, device=device)
        features, text = torch.randn(B, C, *low, device=device), torch.randn(K, C, device=device)
        title = f"{(B, K, *low)} -> {full}"
        yield upsample_cross_entropy, _plain_cross_entropy, (logits, labels, weight), title, time_it
        yield upsample_pseudo_label, _plain_pseudo_label, (logits, full, 0.5), title, time_it
        title = f"{(B, C, *low)} -> {(K, *low)}"
        yield text_correlation, _plain_correlation, (features, text, 14.0), title, time_it


def _nce_cases(device):
    """As _map_cases; pixels of 19 classes, as uneven as those of a street, in labels and weights."""
    timed = ((1024, 128, True), (2048, 128, True)) + ((16384, 256, True),) * (device == "cuda")
    for n, C, time_it in ((250, 320, False),) + timed:
        x = F.normalize(torch.randn(2, n, C, device=device), dim=2)
        yq, yk = (19 * torch.rand(2, n, device=device) ** 2).long()
        weights = torch.rand(2, n, device=device)
        for form in ("supcon", "per_positive"):
            yield _stacked_nce, _plain_nce, (x, yq, yk, *weights, 0.1, form), f"{(n, C)} {form}", time_it


def main():
    """Check both paths against float64, then time them against plain torch, interleaved."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; relative error against float64\n"
          f"{'operator':24}{'input -> size':38}{'backend':9}{'error':>7}{'ms':>9}{'plain':>9}")
    torch.manual_seed(0)
    worst = 0.0
    for ours, plain, inputs, title, time_it in (*_map_cases(device), *_nce_cases(device)):
        exact = _run(plain, [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs])
        for backend in ["torch"] + ["triton"] * (triton is not None and not (time_it and INTERPRET)):
            pairs = [(a.double(), b.double()) for a, b in zip(_run(ours, inputs, backend=backend), exact)
                     if a.is_floating_point()]                                          # labels may differ at ties
            error = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)
            worst = max(worst, error)
            sides = lambda: _run(ours, inputs, backend=backend), lambda: _run(plain, inputs)
            times = "".join(f"{t:9.2f}" for t in _milliseconds(sides, finish)) if time_it else ""
            name = ours.__name__.replace("_stacked", "pixel")
            print(f"{name:24}{title:38}{backend:9}{error:7.0e}{times}", flush=True)
    if not worst < 1e-5:
        sys.exit(f"a path is off by {worst:.0e} relative, the limit is 1e-5")


if __name__ == "__main__":
    main()
