"""The networks: MiT and timm backbones, SegFormer and DAFormer decoders, the EMA teacher, weights in and out.

    from model import Segmenter, load_backbone
    net = Segmenter("mit_b5", "daformer", num_classes=19)
    load_backbone(net, "mit_b5.pth")                     # NVIDIA, Hugging Face or mmseg layout, strict
    out = net(images)                                    # images float (B,3,H,W) in [0,1]; out.logits (B,19,H/4,W/4)

    python model.py text --names names.txt --text clip:ViT-B-16/laion2b_s34b_b88k --out bank.npz    one vector a class
"""
import argparse
import contextlib
import glob
import hashlib
import importlib
import importlib.metadata
import itertools
import logging
import math
import os
import re
import shutil
import socket
import sys
import urllib.parse
import urllib.request
import zipfile
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import DataError, cache_folder, read_lines
from kernels import text_correlation, upsample_pseudo_label

Output = namedtuple("Output", "logits features pyramid")  # (B,K,h,w), (B,C,h,w), list of (B,C_i,h_i,w_i)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def joined(outputs):
    """A list of Outputs of passes over parts of a batch -> the Output of the whole batch."""
    logits, features, pyramids = zip(*outputs)
    return outputs[0] if len(outputs) == 1 else Output(
        torch.cat(logits), torch.cat(features), [torch.cat(maps) for maps in zip(*pyramids)])


class WeightsError(ValueError):
    """Backbone weights that do not fit; the message names the file and what differs."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names the file and the remedy."""


def import_optional(name):
    """Import timm or open_clip although a CUDA build of torchvision sits beside a CPU-only torch.

    That torchvision cannot register its C++ operators and its import dies with "operator torchvision::nms does not
    exist". Two operator schemas without an implementation let everything that we use load; where the real ones load,
    nothing is touched. Raises ImportError where the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for module in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm", "open_clip")]:
        del sys.modules[module]
    torch._nanouda_torchvision = torch.library.Library("torchvision", "DEF")  # lives as long as torch does
    for op in ("nms", "qnms"):
        torch._nanouda_torchvision.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


# ---------------------------------------------------------------------------------------------------------------------
# Mix Transformer (Xie et al., SegFormer, 2021), with the published parameter names

MIT = {  # name: (channels of the four stages, blocks of the four stages)
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)


def to_map(tokens, size):
    """(B,H*W,C) -> (B,C,H,W) as a channels-last view, no copy."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)  # the other order hides a single image's layout from torch


def to_tokens(maps):
    """(B,C,H,W) -> (B,H*W,C), no copy where the map is channels-last."""
    return maps.flatten(2).transpose(1, 2)


class DropPath(nn.Module):
    """Stochastic depth: drops the whole residual branch of a sample with probability `rate` and rescales the others."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


class PatchEmbed(nn.Module):
    """Overlapping patches: strided convolution, then LayerNorm over channels (eps 1e-5, unlike the blocks')."""

    def __init__(self, inputs, channels, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        x = self.proj(x)  # (B,3 or C,H,W) -> (B,C',H/stride,W/stride)
        return self.norm(to_tokens(x)), x.shape[2:]


class Attention(nn.Module):
    """Self-attention whose keys and values live on a grid reduced `reduction` times by a strided convolution."""

    def __init__(self, channels, heads, reduction):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.sr = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels) if reduction > 1 else None

    def forward(self, x, size):
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B,N,C) -> (B,heads,N,C/heads)
        if self.sr is not None:
            x = self.norm(to_tokens(self.sr(to_map(x, size))))  # (B,N,C) -> (B,N/r^2,C)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # two of (B,heads,M,C/heads)
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:
            # torch's own kernel takes two to four times as long here; parts, so that their scores stay in the cache
            parts = (q * q.shape[-1] ** -0.5).split(4096, 2)
            parts = [(part @ k.transpose(2, 3)).softmax(3).to(v.dtype) @ v for part in parts]
            x = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B,heads,N,C/heads) -> (B,N,C)


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution; a module of its own because the published names say `mlp.dwconv.dwconv`."""

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
    """MiT encoder. `MixTransformer("mit_b0".."mit_b5")(x)`: float (B,3,H,W), H and W >= 29, normalised ->
    four maps (B,C_i,H/s,W/s) at strides s = 4, 8, 16, 32 (sizes rounded up)."""

    min_size, multiple, stretch = 32, 1, False  # below 29, the stride-8 reduction of stage one has nothing to reduce

    def __init__(self, name="mit_b0", drop_path=0.1):
        super().__init__()
        self.channels, depths = MIT[check_backbone(name)]
        self.strides, self.recomputed = (4, 8, 16, 32), False
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        for s, (channels, depth) in enumerate(zip(self.channels, depths), 1):
            inputs, kernel, stride = (3, 7, 4) if s == 1 else (self.channels[s - 2], 3, 2)
            blocks = [Block(channels, HEADS[s - 1], REDUCTIONS[s - 1], next(rates)) for _ in range(depth)]
            setattr(self, f"patch_embed{s}", PatchEmbed(inputs, channels, kernel, stride))
            setattr(self, f"block{s}", nn.ModuleList(blocks))
            setattr(self, f"norm{s}", nn.LayerNorm(channels, eps=1e-6))
        self.apply(self._init)

    @staticmethod
    def _init(m):
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=math.sqrt(2 * m.groups / (m.kernel_size[0] ** 2 * m.out_channels)))
            nn.init.zeros_(m.bias)

    def recompute(self):
        """Gradient checkpointing: of the blocks only inputs are kept, the backward computes the rest again."""
        self.recomputed = True

    def forward(self, x):
        x, pyramid = x.contiguous(memory_format=torch.channels_last), []
        for s in "1234":
            x, size = getattr(self, "patch_embed" + s)(x)
            for block in getattr(self, "block" + s):
                again = self.recomputed and self.training
                x = checkpoint(block, x, size, use_reentrant=False) if again else block(x, size)
            x = to_map(getattr(self, "norm" + s)(x), size)  # (B,N,C) -> (B,C,H,W)
            pyramid.append(x)
        return pyramid


def check_backbone(name):
    """The name itself if it is mit_b0..mit_b5 or timm:NAME; otherwise ValueError with what is known."""
    if name.startswith("timm:"):
        timm, wanted = import_optional("timm"), name.removeprefix("timm:")
        architecture, _, tag = wanted.partition(".")
        if not timm.is_model(architecture):
            close = ", ".join(timm.list_models(wanted[:6] + "*")[:6])
            raise ValueError(f"timm has no model {wanted!r}; close: {close or 'none'}")
        if tag and f"{architecture}.{tag}" not in timm.list_pretrained(architecture):
            tags = ", ".join(timm.list_pretrained(architecture)[:6])
            raise ValueError(f"timm has no weights {wanted!r}; there are: {tags or 'none'}")
    elif name not in MIT:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(MIT)} and timm:NAME")
    return name


class TimmBackbone(nn.Module):
    """The last four feature maps of a timm model that has four or more for images of any size: convolutional pyramids;
    of a transformer of one scale (CLIP, DINOv2, EVA) those after each quarter of its blocks. Pixel statistics are the
    model's own. Segmenter stretches images for transformers, which resample their position embeddings, to whole patches
    (side `multiple`); pyramids get a rim up to whole cells of `multiple`. Raises WeightsError for another model, and
    where pretrained weights cannot be fetched."""

    def __init__(self, name, pretrained=False):
        super().__init__()
        timm = import_optional("timm")
        self.name, options = name, {}
        try:
            with torch.device("meta"):
                probe = timm.create_model(name, features_only=True)
                patch, *others = set(probe.feature_info.reduction())
                self.stretch = not others
                if self.stretch:
                    depth = len(probe.model.blocks)
                    options = dict(dynamic_img_size=True,
                                   out_indices=[depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)])
                    probe = timm.create_model(name, features_only=True, **options)
                self.channels, self.strides = (tuple(of()[-4:]) for of in (probe.feature_info.channels,
                                                                           probe.feature_info.reduction))
                size = (2 * patch, 3 * patch) if self.stretch else (96, 160)
                found = [tuple(x.shape) for x in probe.eval()(torch.zeros(1, 3, *size))[-4:]]
            if found != [(1, c, size[0] // s, size[1] // s) for c, s in zip(self.channels, self.strides, strict=True)]:
                raise ValueError(f"maps of the sizes {found}")
        except Exception as error:  # every model has its own way to fail
            raise WeightsError(f"--backbone timm:{name}: no four feature maps for images of any size "
                               f"({str(error).splitlines()[0][:90]}); take a convolutional network or a plain "
                               "transformer, such as timm:convnext_tiny or timm:vit_small_patch14_dinov2") from None
        # the shortcuts of CLIP's residual networks do not fit odd maps
        self.multiple = patch if self.stretch else 32 if re.match("resnet.*clip", name) else 1
        self.min_size = patch if self.stretch else 32
        self.net = from_hub(lambda: timm.create_model(name, features_only=True, pretrained=pretrained, **options),
                            f"--init hub, timm:{name}", "give --init FILE or none", WeightsError, local=not pretrained)
        self.mean, self.std = self.net.pretrained_cfg["mean"], self.net.pretrained_cfg["std"]

    def recompute(self):
        """Gradient checkpointing, by timm's own means."""
        getattr(self.net, "model", self.net).set_grad_checkpointing(True)

    def forward(self, x):
        return self.net(x.contiguous(memory_format=torch.channels_last))[-4:]


# ---------------------------------------------------------------------------------------------------------------------
# Decoders


@torch.compiler.disable  # compiled for CPUs, torch 2.13 loses the gradients of some of several upsampled levels
def resize(x, size):
    """Bilinear, align_corners False, (B,C,h,w) -> (B,C,*size)."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def project_and_fuse(pyramid, linears, weight):
    """conv1x1(concat_i(upsample(linear_i(x_i)))) -> (B,E,H,W), computed below the upsampling.

    A 1x1 convolution and bilinear upsampling commute exactly (both linear, and the interpolation weights of a pixel
    sum to one, so biases pass as well): each level gets the product of its two matrices at its own resolution, and the
    wide concatenation never exists. weight: (E, 4*C, 1, 1), its columns in the order of the pyramid.
    """
    parts, total = weight.flatten(1).chunk(len(linears), 1), None  # of (E,C)
    bias = sum(part @ linear.bias for part, linear in zip(parts, linears))
    for x, linear, part in reversed([*zip(pyramid, linears, parts)]):  # the bias comes in where it is cheapest
        level = F.conv2d(x, (part @ linear.weight)[:, :, None, None], bias if total is None else None)
        level = resize(level, pyramid[0].shape[2:])
        total = level if total is None else total.add_(level)
    return total


def init_decoder(module):
    """Kaiming-normal (fan-out) convolutions; the classifier, the only one with a bias, N(0, 0.01)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.normal_(m.weight, std=0.01)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class SegFormerFusion(nn.Module):
    """All-MLP fusion (SegFormer): a linear layer per level, upsampled, concatenated, fused by a 1x1 convolution."""

    def __init__(self, inputs, channels):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(c, channels) for c in inputs)
        self.fuse = nn.Conv2d(len(inputs) * channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, pyramid):
        return F.relu(self.bn(project_and_fuse(pyramid, self.linears, self.fuse.weight)))


def conv_bn_relu(inputs, outputs, kernel=1, dilation=1, groups=1):
    """Convolution without bias, BatchNorm, ReLU; keeps the size."""
    pad, kind = dilation * (kernel // 2), DilatedDepthwise if dilation > 1 and groups == inputs else nn.Conv2d
    conv = kind(inputs, outputs, kernel, 1, pad, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class DilatedDepthwise(nn.Conv2d):
    """A dilated depthwise 3x3 convolution. CPUs have no fast kernel for one: there each of the d x d interleaved
    sub-images, in which it is not dilated, goes through a plain convolution; the same sums."""

    def forward(self, x):
        (B, C, H, W), d = x.shape, self.dilation[0]
        if x.device.type != "cpu" or 2 * d >= min(H, W):  # few cells a sub-image: nothing to win
            return super().forward(x)
        h, w = -(-H // d), -(-W // d)
        x = F.pad(x, (0, w * d - W, 0, h * d - H)).view(B, C, h, d, w, d)
        x = x.permute(0, 3, 5, 1, 2, 4).reshape(B * d * d, C, h, w)  # (B,C,h,d,w,d) -> (B*d*d,C,h,w)
        x = F.conv2d(x.contiguous(memory_format=torch.channels_last), self.weight, None, 1, 1, 1, C)
        x = x.view(B, d, d, C, h, w).permute(0, 3, 4, 1, 5, 2)  # -> (B,C,h,d,w,d)
        return x.reshape(B, C, h * d, w * d)[..., :H, :W]


class DAFormerFusion(nn.Module):
    """Context-aware fusion of DAFormer (Hoyer et al., 2022): embeddings of all levels at the finest stride, separable
    ASPP with dilations 1, 6, 12, 18 and no image pooling, 3x3 bottleneck."""

    def __init__(self, inputs, channels):
        super().__init__()
        wide = len(inputs) * channels
        self.linears = nn.ModuleList(nn.Linear(c, channels) for c in inputs)
        self.point = conv_bn_relu(wide, channels)
        self.dilated = nn.ModuleList(
            nn.Sequential(conv_bn_relu(wide, wide, 3, d, wide), conv_bn_relu(wide, channels)) for d in (6, 12, 18))
        self.bottleneck = conv_bn_relu(4 * channels, channels, 3)

    def forward(self, pyramid):
        size = pyramid[0].shape[2:]
        levels = [resize(to_map(linear(to_tokens(x)), x.shape[2:]), size) for x, linear in zip(pyramid, self.linears)]
        wide = torch.cat(levels, 1)  # four of (B,C,h,w) -> (B,4C,h,w)
        conv, bn, relu = self.point
        branches = [relu(bn(project_and_fuse(pyramid, self.linears, conv.weight)))] + [b(wide) for b in self.dilated]
        return self.bottleneck(torch.cat(branches, 1))


FUSIONS = {"segformer": SegFormerFusion, "daformer": DAFormerFusion}


class Decoder(nn.Module):
    """Fusion of the pyramid, dropout, 1x1 classifier: pyramid -> (logits (B,K,h,w), features (B,C,h,w))."""

    def __init__(self, name, inputs, channels, num_classes):
        super().__init__()
        self.fusion = FUSIONS[name](inputs, channels)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        init_decoder(self)

    def forward(self, pyramid, guidance=None):
        features = self.fusion(pyramid)
        features = guidance(features) if guidance else features
        return self.classifier(self.dropout(features)), features


class LanguageDecoder(nn.Module):
    """Decoder conditioned on text (LC-MSM, Kim et al., 2024, after its released code): the scaled cosine between each
    pixel's feature and each class's text, refined by LSeg's spatial block, is concatenated to the features.

    forward(pyramid, text): text float (K,C), None leaves the correlation out (the ablation's second plain decoder).
    """

    scale = 1 / 0.07  # a constant: the released code exponentiates it once, and neither trains nor saves it

    def __init__(self, name, inputs, channels, num_classes, with_text=True, spatial_depth=2):
        super().__init__()
        self.fusion = FUSIONS[name](inputs, channels)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels + num_classes * with_text, num_classes, 1)
        init_decoder(self)
        self.depth = spatial_depth if with_text else 0
        self.spatial = nn.Conv2d(1, 1, 3, 1, 1) if self.depth else None  # one kernel for all classes and applications

    def refine(self, scores):
        """LSeg's bottleneck block: each class's map through the shared convolution, plus the maximum over classes."""
        for i in range(self.depth):
            maps = self.spatial(scores.flatten(0, 1)[:, None]).view_as(scores)  # (B,K,h,w) -> (B*K,1,h,w) and back
            scores = maps + scores.amax(1, keepdim=True)
            scores = F.relu(scores) if i + 1 < self.depth else scores
        return scores

    def forward(self, pyramid, text):
        features = joined = self.fusion(pyramid)
        if text is not None:
            scores = self.refine(text_correlation(features, text, self.scale))
            joined = torch.cat([features, scores.to(features.dtype)], 1)  # (B,C+K,h,w)
        return self.classifier(self.dropout(joined)), features


class TextProjection(nn.Module):
    """The classes' vectors in the decoder's space, (K,C): a trained linear layer on a frozen text bank (LC-MSM), or, of
    kind "learned", trained vectors and no text."""

    def __init__(self, bank, channels):
        super().__init__()
        if bank.kind == "learned":
            self.vectors = nn.Parameter(torch.randn(len(bank.names), channels))
        else:
            self.register_buffer("bank", bank.embeddings.clone())
            self.projection = nn.Linear(bank.embeddings.shape[1], channels)

    def forward(self):
        return self.vectors if hasattr(self, "vectors") else self.projection(self.bank)


class DenseLanguageGuidance(nn.Module):
    """Features and class vectors attend to each other, and what they find is added to the features (DLG after
    SemiDAViL, Basak and Yin, CVPR 2025, as reconstructed; its formulas are also those of M3Att, Liu et al., TIP 2023).

    Float (B,C,h,w) -> same. Class names take the place of the paper's captions: with a single text token, as in the
    released code, `vision` would be the same at every pixel. The output projection starts at zero, so that a network
    without guidance is where training begins; the bank is centred. Kind "learned" of the bank: trained vectors.
    """

    def __init__(self, bank, channels):
        super().__init__()
        text = torch.randn(len(bank.names), channels)
        if bank.kind == "learned":
            self.vectors = nn.Parameter(text)
        else:
            text = bank.embeddings - bank.embeddings.mean(0) if len(bank.names) > 1 else bank.embeddings
            self.register_buffer("bank", F.normalize(text, dim=1))
        self.norm, self.multimodal_norm = nn.LayerNorm(channels), nn.LayerNorm(len(text))
        self.vision, self.language = nn.Linear(channels, 2 * channels), nn.Linear(text.shape[1], 2 * channels)
        self.out = nn.Linear(channels + len(text), channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def attend(self, features):
        """-> vision that has read language (B,P,C), multimodal feature (B,P,K), both float32; P = h*w."""
        pixels = self.norm(features.flatten(2).transpose(1, 2))  # (B,C,h,w) -> (B,P,C)
        scale = features.shape[1] ** -0.5
        key_v, value_v = self.vision(pixels).float().chunk(2, 2)  # (B,P,C) each
        rows = self.vectors if hasattr(self, "vectors") else self.bank
        key_l, value_l = self.language(rows).float().chunk(2, 1)  # (K,C) each
        with torch.autocast(features.device.type, enabled=False):
            affinity = key_v @ key_l.t() * scale  # (B,P,K)
            vision = affinity.softmax(2) @ value_l  # (B,P,C)
            language = affinity.softmax(1).transpose(1, 2) @ value_v  # (B,K,P) x (B,P,C) -> (B,K,C)
            return vision, vision @ language.transpose(1, 2) * scale  # (B,P,K)

    def forward(self, features):
        vision, multimodal = self.attend(features)
        out = self.out(torch.cat([vision, self.multimodal_norm(multimodal)], 2))  # (B,P,C+K) -> (B,P,C)
        return features + out.transpose(1, 2).view_as(features)  # (B,P,C) -> (B,C,h,w)


class Segmenter(nn.Module):
    """A backbone and a decoder; owns the pixel statistics, so that callers pass plain RGB in [0,1].

    backbone: mit_b0..mit_b5 | timm:NAME; decoder: segformer | daformer; channels: width of the decoder.
    language "lcmsm" adds a second, language-conditioned decoder; text is its TextBank: a frozen one is projected to the
    decoder's width by a trained linear layer, kind "learned" trains one vector a class and no text at all, kind "none"
    leaves a second decoder without language; spatial_depth: applications of its spatial block. language "dlg" guides
    the decoder's features by the bank instead, kind "none" leaves that out. projection adds the head through which
    contrastive losses see the features: rows (N,C) -> (N,C), called as .projection by the training step.
    pretrained=True asks timm for the hub's weights (network). Raises ValueError on unknown names.
    """

    def __init__(self, backbone="mit_b0", decoder="segformer", num_classes=19, channels=256, language=None, text=None,
                 spatial_depth=2, pretrained=False, projection=False):
        super().__init__()
        if decoder not in FUSIONS:
            raise ValueError(f"unknown decoder {decoder!r}; known: {', '.join(FUSIONS)}")
        if language not in (None, "lcmsm", "dlg"):
            raise ValueError(f"unknown language module {language!r}; known: lcmsm, dlg")
        timm_name = check_backbone(backbone).removeprefix("timm:")
        self.backbone = MixTransformer(backbone) if timm_name in MIT else TimmBackbone(timm_name, pretrained)
        self.decoder = Decoder(decoder, self.backbone.channels, channels, num_classes)
        self.num_classes, self.stride, self.language = num_classes, self.backbone.strides[0], language
        self.heads = ("plain", "language") if language == "lcmsm" else ("plain",)
        with_text = bool(language) and text.kind != "none"
        self.guidance = DenseLanguageGuidance(text, channels) if language == "dlg" and with_text else None
        self.text = None
        if language == "lcmsm":
            self.language_decoder = LanguageDecoder(
                decoder, self.backbone.channels, channels, num_classes, with_text, spatial_depth)
            self.text = TextProjection(text, channels) if with_text else None
        self.projection = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True),
                                        nn.Linear(channels, channels)) if projection else nn.Identity()
        for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            value = torch.tensor(getattr(self.backbone, name, default))
            self.register_buffer("pixel_" + name, value.view(1, 3, 1, 1))

    def compilable(self):
        """The modules that torch.compile takes whole, whatever the recipe: the backbone and the decoders' fusions."""
        return [self.backbone, *(m for m in self.modules() if isinstance(m, tuple(FUSIONS.values())))]

    def encode(self, x):
        """Float (B,3,H,W), RGB in [0,1] -> the backbone's maps; for sizes that it cannot take, of the image stretched
        to whole patches or with a mean-coloured rim, which forward() cuts off."""
        x, least, cell = (x - self.pixel_mean) / self.pixel_std, self.backbone.min_size, self.backbone.multiple
        height, width = (max(least, -(-side // cell) * cell) for side in x.shape[2:])
        if self.backbone.stretch:  # a rim would take part of a patch, and what is predicted there could not be cut off
            x = resize(x, (height, width))
        elif (height, width) != x.shape[2:]:
            x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        return self.backbone(x)

    def forward(self, x, head="plain"):
        """x: float (B,3,H,W), RGB in [0,1]; head: plain | language -> Output(logits (B,K,ceil(H/s),ceil(W/s)), features
        of that decoder on the same grid, pyramid of the backbone). Raises ValueError where there is no such head."""
        if head not in self.heads:
            raise ValueError(f"this network has no {head!r} head")
        pyramid = self.encode(x)
        if head == "language":
            out = self.language_decoder(pyramid, self.text() if self.text else None)
        else:
            out = self.decoder(pyramid, self.guidance)
        h, w = (-(-side // self.stride) for side in x.shape[2:])
        logits, features = (t[..., :h, :w] for t in out)
        return Output(logits, features, pyramid)


# ---------------------------------------------------------------------------------------------------------------------
# Text: one vector a class

# float32 (K,D) unit rows as stored, tuple of str, str, and what a bank's file says of its origin
TextBank = namedtuple("TextBank", "embeddings names kind about", defaults=({},))
ORIGIN = ("templates", "model", "pretrained", "open_clip", "sha256")
STUB_DIM, TEXT_SEED = 512, 0
RENAMED = {"person": "pedestrian", "rider": "driver", "bicycle": "bike", "motorcycle": "motorbike"}  # LC-MSM's code
SPOKEN = {"SignSymbol": "traffic sign", "Pavement": "sidewalk", "Bicyclist": "cyclist"}  # CamVid's names are no words
SYNONYMS = {
    "road": ("road", "street", "asphalt"), "sidewalk": ("sidewalk", "pavement", "footpath"),
    "building": ("building", "house", "facade"), "wall": ("wall", "free-standing wall"), "fence": ("fence", "railing"),
    "pole": ("pole", "lamp post"), "traffic light": ("traffic light",), "traffic sign": ("traffic sign", "road sign"),
    "vegetation": ("vegetation", "tree", "bush"), "terrain": ("grass", "soil", "verge"), "sky": ("sky", "clouds"),
    "person": ("person", "pedestrian"), "rider": ("rider", "cyclist", "motorcyclist"), "car": ("car",),
    "truck": ("truck", "lorry"), "bus": ("bus", "coach"), "train": ("train", "tram"),
    "motorcycle": ("motorcycle", "scooter"), "bicycle": ("bicycle", "bike")}
STREET_TEMPLATES = tuple(f"{medium} {scene}" for medium in ("a photo of", "a video game image of") for scene in (
    "a {}.", "a {} in a street scene.", "a {} seen from a car.", "many {}."))  # half real, half synthetic
PROMPTS = {  # name: (templates, names to put into them for a class)
    "paper": (("a photo of a {}.",), lambda name: (RENAMED.get(name, name),)),
    "plain": (("a photo of a {}.",), lambda name: (name,)),
    "ensemble": (STREET_TEMPLATES, lambda name: (name,)),
    "concepts": (STREET_TEMPLATES, lambda name: SYNONYMS.get(name, (name,)))}


class TextError(ValueError):
    """A text bank that is missing, damaged or for other classes; the message names it and the remedy."""


def text_cache():
    """Folder of the banks that were encoded here."""
    return str(cache_folder() / "text")


def read_bank(path, class_names):
    """Check and read an .npz bank: emb (K,D), finite unit rows; names, in the order of the classes; kind; and what of
    ORIGIN is there. Says so where another version of open_clip made it. Raises TextError."""
    remedy = "delete it, or make one with: python model.py text"
    try:
        if not os.path.exists(path):
            raise FileNotFoundError("there is no such file")
        if not zipfile.is_zipfile(path):
            raise ValueError("no .npz archive")
        with np.load(path, allow_pickle=False) as file:
            bank = {key: file[key] for key in file.files}
        if missing := {"emb", "names", "kind"} - bank.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        if not np.issubdtype(bank["emb"].dtype, np.floating):
            raise ValueError(f"emb is {bank['emb'].dtype}, not float")
        rows, kind = torch.tensor(bank["emb"], dtype=torch.float32), bank["kind"].item()
        names, wanted = tuple(map(str, np.atleast_1d(bank["names"]))), tuple(class_names)
        if not isinstance(kind, str) or kind in ("learned", "none"):
            raise ValueError(f"kind {kind!r}, which no file can have")
    except FileNotFoundError as error:
        raise TextError(f"{path}: {error}; make it with: python model.py text") from None
    except Exception as error:  # zipfile, numpy and the file system each have their own
        raise TextError(f"{path}: not a text bank ({str(error).splitlines()[0]}); {remedy}") from None
    if names != wanted:
        pair = next(pair for pair in itertools.zip_longest(names, wanted, fillvalue="none") if pair[0] != pair[1])
        raise TextError(f"{path}: its {len(names)} classes are not the run's {len(wanted)} in their order (first "
                        f"difference: {pair[0]} for {pair[1]}); make a bank for --classes")
    if rows.ndim != 2 or len(rows) != len(names) or not ((rows.norm(dim=1) - 1).abs() < 1e-2).all():
        raise TextError(f"{path}: its rows {tuple(rows.shape)} are not {len(names)} finite unit vectors; {remedy}")
    if "sha256" in bank and str(bank["sha256"]) != bank_hash(bank):
        raise TextError(f"{path}: its sha256 does not belong to its content; {remedy}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        here = importlib.metadata.version("open_clip_torch")
        if str(bank.get("open_clip", here)) != here:
            print(f"TEXT: {path} was encoded by open_clip {bank['open_clip']}, here is {here}", file=sys.stderr)
    return TextBank(rows, names, kind, {key: bank[key].tolist() for key in ORIGIN if key in bank})


def write_bank(path, bank):
    """A TextBank as .npz, never half a file."""
    part = f"{path}.{os.getpid()}.npz"
    np.savez(part, emb=bank.embeddings.numpy(), names=np.array(bank.names), kind=bank.kind, **bank.about)
    os.replace(part, path)


def bank_hash(bank):
    """sha256 over what a bank was made from and over its rows."""
    text = repr([bank[key].tolist() if key in bank else "" for key in ("names", "templates", "model", "pretrained")])
    return hashlib.sha256(text.encode() + np.ascontiguousarray(bank["emb"], np.float32).tobytes()).hexdigest()


def checkpoint_bank(checkpoint):
    """The bank that a checkpoint's network was built with, or None."""
    text, names = checkpoint.get("text"), tuple(checkpoint["classes"])
    return TextBank(text["embeddings"], names, text["kind"], text.get("about", {})) if text else None


def text_bank(spec, class_names):
    """One unit vector per class -> TextBank(embeddings float32 (K,D) as stored, names, kind). Nothing is centred.

    spec: FILE.npz | clip:MODEL/TAG[:PROMPTS] (OpenCLIP; TAG is a tag, for which the network is used once, or a file;
    PROMPTS: paper, plain, ensemble, concepts or a file with a template a line, {} for the class; encoded once, then
    cached) | stub (seeded orthonormal rows, no language) | learned (vectors that the student trains) | none (no
    vectors) | shuffled:FILE (each of two or more classes has another one's row) | auto (the cached bank of these
    classes, else the stub, said loudly; never the network). Raises TextError, for auto also where several banks fit.
    """
    names, (kind, _, rest) = tuple(class_names), str(spec).partition(":")
    if kind == "clip":
        return encode_bank(rest, names)
    if kind == "shuffled":
        bank = read_bank(rest, names)
        shift = 1 + np.random.RandomState(TEXT_SEED).randint(max(1, len(names) - 1))
        return bank._replace(embeddings=bank.embeddings.roll(shift, 0), kind="shuffled", about={})
    if spec.endswith(".npz"):
        return read_bank(spec, names)
    if spec == "auto":
        fitting = {}
        for path in sorted(glob.glob(os.path.join(text_cache(), "*.npz"))):
            with contextlib.suppress(TextError):
                fitting[path] = read_bank(path, names)
        if len(fitting) > 1:
            raise TextError(f"--text auto: several cached banks are for these classes; name one: {', '.join(fitting)}")
        if fitting:
            return fitting.popitem()[1]
        print("TEXT: no bank of these classes is cached, a STUB of orthonormal vectors stands in for it: expect no "
              "gain from language. Remedy: --text FILE.npz or --text clip:MODEL/TAG", file=sys.stderr)
        spec = "stub"
    if spec not in ("stub", "learned", "none"):
        raise TextError(f"--text {spec}: give FILE.npz, clip:MODEL/TAG, stub, learned, none, shuffled:FILE or auto")
    random = torch.randn(max(STUB_DIM, len(names)), len(names), generator=torch.Generator().manual_seed(TEXT_SEED))
    return TextBank(torch.linalg.qr(random)[0].T.contiguous(), names, spec)  # (D,K) -> (K,D)


def encode_bank(spec, names):
    """clip:MODEL/TAG[:PROMPTS]: the cached .npz, encoded first if there is none. Raises TextError."""
    body, _, prompts = spec.rpartition(":")
    if not body or not (prompts in PROMPTS or os.path.isfile(prompts)):
        body, prompts = spec, "paper"
    architecture, _, tag = body.partition("/")
    if ":" in tag and not os.path.exists(tag):
        raise TextError(f"--text clip:{spec}: {tag.split(':')[-1]} is neither a file of templates nor one of "
                        f"{', '.join(PROMPTS)}")
    if tag in ("", "None", "none"):
        raise TextError(f"--text clip:{spec}: needs MODEL/TAG, such as ViT-B-16/laion2b_s34b_b88k; a tower without "
                        "weights knows no language")
    templates, variants = PROMPTS[prompts] if prompts in PROMPTS else (read_lines(prompts), lambda name: (name,))
    if not templates or any(re.findall("[{}]+", template) != ["{}"] for template in templates):
        raise TextError(f"{prompts}: every line is a template and needs one {{}} for the class: a photo of a {{}}.")
    texts = [[template.format(variant) for variant in variants(SPOKEN.get(name, name)) for template in templates]
             for name in names]
    weights = f"{os.path.basename(tag)} {file_hash(tag)}" if os.path.isfile(tag) else tag
    made_from = dict(templates=np.array(sum(texts, [])), model=np.array(architecture), pretrained=np.array(weights))
    key = bank_hash(made_from | {"names": np.array(names), "emb": np.zeros(0)})
    path = os.path.join(text_cache(), key[:16] + ".npz")
    if not os.path.exists(path):
        open_clip, tower = open_text_tower(architecture, tag)
        tokenize = open_clip.get_tokenizer(architecture)
        vectors = [F.normalize(encode_text(tower, tokenize(prompts)), dim=1).mean(0) for prompts in texts]  # K of (D,)
        rows = F.normalize(torch.stack(vectors), dim=1)
        content = made_from | {"names": np.array(names), "emb": rows.numpy()}
        about = made_from | {"open_clip": open_clip.__version__, "sha256": bank_hash(content)}
        try:
            os.makedirs(text_cache(), exist_ok=True)
            write_bank(path, TextBank(rows, names, "clip", about))
        except OSError as error:
            raise TextError(f"{path}: cannot be written ({error}); XDG_CACHE_HOME names another place") from None
    return read_bank(path, names)


def file_hash(path):
    """The first half of a file's sha256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()[:32]


def hub_offline():
    """Whether the hub cannot be reached. Tells huggingface_hub so, which would retry for a minute or two."""
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if endpoint.scheme in urllib.request.getproxies() or "HF_HUB_OFFLINE" in os.environ:
        return False  # not for us to find out
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if "huggingface_hub.constants" in sys.modules:  # it has looked at the environment already
            sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True
        return True
    return False


def from_hub(fetch, what, remedy, error_type, local=False):
    """fetch(), with whatever goes wrong as one line that begins with `what` and ends with the remedy; in seconds also
    where there is no network. local: nothing is fetched."""
    offline = "no network, and " if not local and hub_offline() else ""
    try:
        logging.disable(logging.ERROR)  # the error says the same once more
        return fetch()
    except Exception as error:  # timm, open_clip, huggingface_hub, torch and the file system each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].split(" (")[0]
        raise error_type(f"{what}: {offline}no weights: {reason}; {remedy}") from None
    finally:
        logging.disable(logging.NOTSET)


def open_text_tower(architecture, tag):
    """(open_clip, frozen CLIP without its image tower). Raises TextError, in seconds also where there is no network."""
    def create():
        return import_optional("open_clip").create_model(architecture, pretrained=tag, require_pretrained=True)
    tower = from_hub(create, f"--text clip:{architecture}/{tag}", "name a tag while online, a local file as TAG, or a "
                     "bank made elsewhere (FILE.npz)", TextError, local=os.path.exists(tag))
    tower.visual = None
    return import_optional("open_clip"), tower.eval().requires_grad_(False)


@torch.no_grad()
def encode_text(tower, tokens):
    """Text features float32 (N,D) of int64 tokens (N,77). The context is cut to the longest prompt: exact under CLIP's
    causal mask, and several times faster. Towers of another kind encode the whole context."""
    if not hasattr(tower, "positional_embedding") or getattr(tower, "text_pool_type", "argmax") != "argmax":
        return tower.encode_text(tokens).float()
    end = tokens.argmax(1)  # the end-of-text token has the largest id
    length = int(end.max()) + 1
    x = tower.token_embedding(tokens[:, :length]) + tower.positional_embedding[:length]  # (N,L,C)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    x, project = x[torch.arange(len(x)), end], tower.text_projection  # (N,L,C) -> (N,C)
    return (project(x) if isinstance(project, nn.Linear) else x @ project).float()


def similarity_table(bank):
    """Cosines between classes as text, raw and after subtracting the mean row: a bank that makes sense has contrast."""
    centred = F.normalize(bank.embeddings - bank.embeddings.mean(0), dim=1)
    lines = []
    for title, rows in (("raw", F.normalize(bank.embeddings, dim=1)), ("centred", centred)):
        cosine = rows @ rows.T
        others = cosine.clone().fill_diagonal_(-2)
        rest = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
        lines.append(f"{title}: cosine of two classes {rest.min():.3f} to {rest.max():.3f}, mean {rest.mean():.3f}")
        lines += [f"  {name:<16} closest to {bank.names[j]:<16} {others[i, j]:.3f}"
                  for i, (name, j) in enumerate(zip(bank.names, others.argmax(1).tolist()))]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The teacher


@torch.no_grad()
def ema_update(teacher, student, step, alpha):
    """teacher <- a * teacher + (1-a) * student with a = min(1 - 1/(step+1), alpha): a copy at step 0.

    Parameters only, as in DAFormer: BatchNorm buffers are not averaged, the teacher keeps its own. The projection of
    the text is not averaged either, student and teacher share the current one (LC-MSM's released code).
    """
    a = min(1 - 1 / (step + 1), alpha)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - a)
    if teacher.text:
        teacher.text.load_state_dict(student.text.state_dict())


def pseudo_label(logits, size, threshold=0.0):
    """Logits float (B,K,h,w) on any grid -> label uint8 (B,H,W), confidence float32 (B,H,W) in [0,1], and the share of
    pixels whose confidence reaches the threshold (0-d): DACS's pseudo-labels and their weight, or plain predictions.
    The B x K x H x W tensor is never formed."""
    return upsample_pseudo_label(logits, size, threshold)


def teacher_mode(teacher):
    """Train mode without dropout and stochastic depth: BatchNorm uses the statistics of the batch (DAFormer)."""
    teacher.train()
    for m in teacher.modules():
        if "drop" in type(m).__name__.lower():
            m.eval()
    return teacher


@contextlib.contextmanager
def frozen_statistics(net):
    """Inside, BatchNorm in train mode normalises by the batch as ever, but its running statistics stay: a teacher that
    looks at source images keeps those of the target."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, (momentum, batches) in zip(norms, before):
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in

PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.|backbone\.|segformer\.)+")
CLASSIFIERS = re.compile(r"^(?:head|classifier|decode_head|auxiliary_head)\.")
RENAMES = [  # (published layout, ours); {0} is the stage counted from one, {1} the block. Hugging Face 4.x, 5.x, mmseg
    (r"encoder\.patch_embeddings\.(\d)\.proj\.", "patch_embed{0}.proj."),
    (r"encoder\.patch_embeddings\.(\d)\.layer_norm\.", "patch_embed{0}.norm."),
    (r"encoder\.layer_norm\.(\d)\.", "norm{0}."),
    (r"encoder\.block\.(\d)\.(\d+)\.", "block{0}.{1}."),
    (r"stages\.(\d)\.patch_embeddings\.proj\.", "patch_embed{0}.proj."),
    (r"stages\.(\d)\.patch_embeddings\.layer_norm\.", "patch_embed{0}.norm."),
    (r"stages\.(\d)\.blocks\.(\d+)\.", "block{0}.{1}."),
    (r"stages\.(\d)\.layer_norm\.", "norm{0}."),
    (r"layers\.(\d)\.0\.projection\.", "patch_embed{0}.proj."),
    (r"layers\.(\d)\.0\.norm\.", "patch_embed{0}.norm."),
    (r"layers\.(\d)\.1\.(\d+)\.", "block{0}.{1}."),
    (r"layers\.(\d)\.2\.", "norm{0}."),
]
BLOCK_RENAMES = [  # the part of the name inside a block
    (r"\.layer_norm_1\.|\.layernorm_before\.", ".norm1."), (r"\.layer_norm_2\.|\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.layer_norm\.|\.attention\.sequence_reduction\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.self\.sr\.|\.attention\.sequence_reduction\.sequence_reduction\.", ".attn.sr."),
    (r"\.attention\.self\.query\.|\.attention\.q_proj\.", ".attn.q."),
    (r"\.attention\.self\.key\.|\.attention\.k_proj\.", ".attn.k."),
    (r"\.attention\.self\.value\.|\.attention\.v_proj\.", ".attn.v."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.|\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.mlp\.dense1\.|\.ffn\.layers\.0\.", ".mlp.fc1."), (r"\.mlp\.dense2\.|\.ffn\.layers\.4\.", ".mlp.fc2."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv.dwconv."),
]


def published_to_ours(state):
    """Tensors by name in the NVIDIA, Hugging Face (4.x, 5.x) or mmseg layout of MiT -> by our (NVIDIA's) names."""
    renamed = {}
    for key, value in state.items():
        key = PREFIXES.sub("", key)
        for pattern, template in RENAMES:
            match = re.match(pattern, key)
            if match:
                stage, *block = match.groups()
                key = template.format(int(stage) + 1, *block) + key[match.end():]
                break
        for pattern, ours in BLOCK_RENAMES if key.startswith("block") else []:
            key = re.sub(pattern, ours, key)
        if re.search(r"\.mlp\.fc\d\.weight", key):
            value = value.flatten(1)  # mmseg keeps these linear layers as 1x1 convolutions: (O,I,1,1) -> (O,I)
        if ".attn.qkv." in key:  # q, k, v stacked: (3C,...) -> (C,...) and (2C,...)
            third = len(value) // 3
            renamed[key.replace("qkv", "q")], renamed[key.replace("qkv", "kv")] = value[:third], value[third:]
        else:
            renamed[key] = value
    for key in [k for k in renamed if ".attn.k." in k and k.replace(".attn.k.", ".attn.v.") in renamed]:
        both = renamed.pop(key), renamed.pop(key.replace(".attn.k.", ".attn.v."))
        renamed[key.replace(".attn.k.", ".attn.kv.")] = torch.cat(both)  # two of (C,...) -> (2C,...), key first
    return {k: v for k, v in renamed.items() if not CLASSIFIERS.match(k)}


def read_weights(path):
    """Tensors by name from .pth / .bin / .pt / .safetensors; nothing in the file is executed. Raises WeightsError."""
    if not os.path.isfile(path):
        raise WeightsError(f"{path}: no such weights file; give a file to --init, or hub, or none")
    try:
        if str(path).endswith(".safetensors"):
            return import_optional("safetensors.torch").load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, header and EOF errors of many kinds: one meaning
        reason = str(error).split("\n")[0][:120]
        raise WeightsError(f"{path}: cannot be read as weights ({reason}); it must be a dict of tensors") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    state = {k: v for k, v in state.items() if torch.is_tensor(v)} if isinstance(state, dict) else {}
    if not state:
        raise WeightsError(f"{path}: holds no tensors by name; it must be a state dict")
    return state


def differences(expected, found):
    """One line on how two dicts of tensors by name differ, '' where they agree in names and shapes."""
    def some(keys):
        return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
    missing = [k for k in expected if k not in found]
    extra = [k for k in found if k not in expected]
    wrong = [f"{k} {tuple(found[k].shape)} for {tuple(v.shape)}" for k, v in expected.items()
             if k in found and found[k].shape != v.shape]
    parts = (("missing", missing), ("unexpected", extra), ("other shapes", wrong))
    return "; ".join(f"{what} {some(keys)}" for what, keys in parts if keys)


def load_backbone(module, path):
    """Load ImageNet weights into a MixTransformer or into the backbone of a Segmenter, strictly.

    path: a file in NVIDIA's, Hugging Face's or mmseg's layout (MiT), or a state dict of the timm model; `hub` fetches
    nvidia/mit-b* (timm backbones fetch theirs when built). A timm file without any key in common is taken in order if
    every shape agrees, which is printed. Raises WeightsError naming the file and what is missing, unexpected or
    of another shape; only ImageNet classifiers and decoders of the file are left out.
    """
    backbone = getattr(module, "backbone", module)
    if isinstance(backbone, TimmBackbone):
        return load_timm(backbone, path)
    if path == "hub":
        name = next(n for n, (c, d) in MIT.items() if c == backbone.channels and d == tuple(
            len(getattr(backbone, f"block{s}")) for s in range(1, 5)))
        name = "nvidia/" + name.replace("_", "-")
        state = from_hub(lambda: import_optional("timm.models").load_state_dict_from_hf(name),
                         f"--init hub, {name}", "give --init FILE or none", WeightsError)
    else:
        state = read_weights(path)
    state, ours = published_to_ours(state), backbone.state_dict()
    problem = differences(ours, state)
    if problem:
        raise WeightsError(f"{path}: not the weights of this backbone ({len(ours)} tensors): {problem}")
    backbone.load_state_dict(state)


def load_timm(backbone, path):
    """load_backbone for timm: by name, or in order where no name but every shape agrees."""
    full = import_optional("timm").create_model(backbone.name, pretrained=False).state_dict()
    state = {PREFIXES.sub("", k): v for k, v in read_weights(path).items()}
    if not set(state) & set(full):
        same = len(state) == len(full) and all(a.shape == b.shape for a, b in zip(state.values(), full.values()))
        if not same:
            raise WeightsError(f"{path}: no name in common with {backbone.name} and {len(state)} tensors for its "
                               f"{len(full)}, or other shapes in that order; give the weights of this very model")
        print(f"{path}: no name in common with timm's {backbone.name}, but all {len(full)} shapes agree in order: "
              f"loaded in order", file=sys.stderr)
        state = dict(zip(full, state.values()))
    others = [k for k in state if k not in full and not re.match(r"(head|fc|classifier)[._]", k)]
    if others:
        raise WeightsError(f"{path}: not the weights of {backbone.name}, which has no {', '.join(others[:3])} "
                           f"({len(others)} such names in all); give the weights of this very model")
    ours = backbone.net.state_dict()
    # timm flattens stages.0 to stages_0, and puts a transformer into .model
    used = {k: state.get(k.removeprefix("model."), state.get(k.replace("_", ".", 1))) for k in ours}
    problem = differences(ours, {k: v for k, v in used.items() if v is not None})
    if problem:
        raise WeightsError(f"{path}: not the weights of {backbone.name}: {problem}")
    backbone.net.load_state_dict(used)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: dicts of tensors and plain Python values

def current_flags(flags):
    """Flags of a log or checkpoint, of this or an earlier version -> the same in today's flags, a new dict.

    Flags that are gone are left out where their value is the one that every run has now. Another value stays: a table
    and a resumed run then name it as a difference.
    """
    flags = dict(flags)
    hardest, confident = flags.pop("hardest", None), flags.pop("confident", None)
    if flags.get("dyce") is True:  # was a switch beside the share
        flags["dyce"] = hardest
    flags["dyce"] = float(flags.get("dyce", 0))
    if flags.get("consistency") and confident is not None:  # was a threshold of its own
        flags["threshold"] = confident

    lcmsm = flags.get("language") == "lcmsm"
    gone = {
        "panel_every": flags.get("panel_every"),  # changed no number
        "profile": flags.get("profile"),
        "spatial_depth": 2,
        "omega": 0.5,
        "beta": [0.01],
        "contrast_pixels": "all",
        "pooled": False,
        "restyle": "extra",
        "mask_views": ["source", "mix"] if lcmsm else ["target"],
        "teacher_head": "language" if lcmsm else "plain",
        "projection": bool(flags.get("t2s") or flags.get("sepico")),
        "style": "random" if flags.get("t2s") and flags.get("target") == "none" else "fourier",
        "contrast_start": flags.get("warmup") if flags.get("t2s") else 0,
        "class_weights": "none" if flags["dyce"] and flags.get("t2s") else "confidence",
    }
    for name, value in gone.items():
        if name in flags and flags[name] == value:
            del flags[name]
    return flags


CHECKPOINT_KEYS = ("flags", "classes", "student", "teacher", "optimizer", "step", "versions")


def save_checkpoint(path, state):
    """Write `state` (tensors, str, int, float, bool, None, list, dict only) so that `path` is never half a file:
    temporary file, fsync, rename. Raises CheckpointError; the old file then stays and no temporary one is left."""
    temporary = f"{path}.tmp"  # one name: what a killed run has left is overwritten
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk surfaces as RuntimeError "unexpected pos"
        folder = os.path.dirname(os.path.abspath(path))
        free = shutil.disk_usage(folder).free >> 20 if os.path.isdir(folder) else 0
        raise CheckpointError(f"{path}: cannot be written ({str(error).splitlines()[0][:100]}); {free} MB are free "
                              "there; a previous checkpoint is intact") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_checkpoint(path, map_location="cpu"):
    """Read and check one of our checkpoints -> dict with flags, classes, student, teacher, optimizer, step, versions.

    Every byte is checked against the archive's CRC (torch.load alone does not notice a flipped one) and nothing in the
    file is executed. Raises CheckpointError naming the file.
    """
    remedy = "use another checkpoint of the run (last.pt, best.pt) or train again"
    if not os.path.isfile(path):
        what = "a folder, give its last.pt" if os.path.isdir(path) else "no such checkpoint"
        raise CheckpointError(f"{path}: {what}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        state = None if broken else torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # zip, pickle, EOF and decoding errors of many kinds: one meaning
        reason = (str(error) or "empty").splitlines()[0][:60]
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({reason}); {remedy}") from None
    if broken:
        raise CheckpointError(f"{path}: damaged ({broken} fails its checksum); {remedy}")
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(state, dict) or k not in state]
    if missing:
        raise CheckpointError(f"{path}: not one of our checkpoints (no {', '.join(missing)}); backbones go to --init")
    return state


def is_checkpoint(path):
    """Whether a file is one of our checkpoints and whole."""
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def load_weights(module, state, path):
    """Strict load_state_dict that forgives the prefixes of DDP and torch.compile; raises CheckpointError."""
    state = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", k): v for k, v in state.items()}
    problem = differences(module.state_dict(), state)
    if problem:
        raise CheckpointError(f"{path}: other network than its flags or the command line describe: {problem}")
    module.load_state_dict(state)


def build_segmenter(checkpoint, weights="student", path="checkpoint"):
    """The network that a checkpoint describes, with its student's or teacher's weights, in eval mode."""
    if checkpoint.get(weights) is None:
        raise CheckpointError(f"{path}: holds no {weights} (recipe {checkpoint['flags'].get('recipe')})")
    flags, bank, num_classes = checkpoint["flags"], checkpoint_bank(checkpoint), len(checkpoint["classes"])
    net = Segmenter(flags["backbone"], flags["decoder"], num_classes, flags["channels"], flags.get("language"), bank,
                    flags.get("spatial_depth", 2), projection=flags.get("projection", False))
    load_weights(net, checkpoint[weights], path)
    return net.eval()


def main(argv=None):
    """python model.py text: make a bank, write it, print how similar its classes are; bad input: one line, exit 2."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("text",))
    p.add_argument("--names", required=True, help="file with one class name a line, or names with commas between")
    p.add_argument("--text", required=True, metavar="SPEC", help="clip:MODEL/TAG[:PROMPTS], FILE.npz, stub, ...")
    p.add_argument("--out", help="bank to write, .npz")
    args = p.parse_args(argv)
    try:
        names = tuple(map(str.strip, args.names.split(","))) if "," in args.names else tuple(read_lines(args.names))
        if "" in names or len(set(names)) < max(2, len(names)):
            raise TextError(f"--names {args.names}: needs two or more different names")
        bank = text_bank(args.text, names)
        if args.out and (bank.kind in ("learned", "none") or not args.out.endswith(".npz")):
            raise TextError(f"--out {args.out}: a bank is an .npz file, and {args.text} must give vectors to write")
        print(f"{bank.kind}: {len(names)} classes, {bank.embeddings.shape[1]} dimensions\n{similarity_table(bank)}")
        if args.out:
            write_bank(args.out, bank)
            print(f"written: {args.out}")
    except (TextError, DataError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
