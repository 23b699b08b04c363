"""Train on labelled source images, adapt to unlabelled target images.

    python train.py                                            one process: a laptop, one GPU
    torchrun train.py                                          the same
    torchrun --nproc-per-node 4 train.py --batch 1             four GPUs of one machine, joint batch 4
    torchrun --nnodes 2 --node-rank R --master-addr A --nproc-per-node 8 train.py    two machines, R 0 or 1, A the first

Without flags: rendered streets -> the same streets in another style, recipe mic, a few minutes on two CPU cores.
A run writes OUT/last.pt, OUT/best.pt (with --eval-every), OUT/log.jsonl, OUT/panels/*.png and starts again from
OUT/last.pt by itself.
"""
import argparse
import contextlib
import copy
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import eval as evaluation
import losses
import model
from losses import cross_entropy, feature_distance, mean_over_ranks

# A recipe is a set of flag values; any flag on the command line overrides it.
RECIPES = {
    "source": dict(mix=0.0, mask=0.0, fd=0.0, rcs=0.0),  # the labelled source only: what adaptation starts from
    "oracle": dict(source="target", mix=0.0, mask=0.0, fd=0.0, rcs=0.0),  # the target's training labels: the ceiling
    "dacs": dict(mix=1.0, mask=0.0, fd=0.0, rcs=0.0, alpha=0.99),  # DACS, Tranheden et al., WACV 2021: ClassMix
    "daformer": dict(mix=1.0, mask=0.0, fd=0.005, rcs=0.01),  # DAFormer, Hoyer et al., CVPR 2022
    "mic": dict(mix=1.0, mask=1.0, fd=0.005, rcs=0.01),    # MIC, Hoyer et al., CVPR 2023
    # LC-MSM, Kim et al., Pattern Recognition 2024: at MIC's width and length; then with the values of its released code
    "lcmsm": dict(mix=1.0, mask=1.0, fd=0.005, rcs=0.01, language="lcmsm", mask_views=["source", "mix"],
                  teacher_head="language"),
    "lcmsm_released": dict(mix=1.0, mask=1.0, fd=0.005, rcs=0.01, language="lcmsm", mask_views=["source", "mix"],
                           teacher_head="language", mask_block=32, mask_ratio=0.5, channels=512, steps=60_000,
                           decoder="daformer", slide=True),
    # contrast between classes and domains, on the features before the classifier; released code: --cluda 1 --tau 1
    "cluda": dict(mix=1.0, mask=0.0, fd=0.005, rcs=0.01, cluda=0.1),  # CLUDA, Vayyat et al., 2022, at one resolution
    "t2sda": dict(mix=1.0, mask=0.0, fd=0.005, rcs=0.01, t2s=0.1, projection=True),  # after T2S-DA, Wang et al., 2023
    "t2sda_dg": dict(target="none", mix=0.0, mask=0.0, fd=0.005, rcs=0.01, t2s=0.1, restyled=1.0, projection=True,
                     style="random"),  # its domain generalisation: no target image at all
    "sepico": dict(mix=1.0, mask=0.0, fd=0.005, rcs=0.01, sepico=0.1, projection=True),  # Xie et al., TPAMI 2023
    # after SemiDAViL, Basak and Yin, CVPR 2025, as reconstructed; --labeled N gives it target labels. Its first code
    # has --hardest 0.2: easy pixels are then never learned well enough for a pseudo-label to be confident
    "semidavil": dict(mix=0.0, mask=0.0, fd=0.0, rcs=0.0, consistency=1.0, dyce=True, hardest=1.0, language="dlg"),
    # masking, language, contrast and pull together; restyled images take the place of every second source image
    "all": dict(mix=1.0, mask=1.0, fd=0.005, rcs=0.01, language="dlg", cluda=0.1, t2s=0.1, projection=True,
                restyle="half"),
}
THINGS = {"traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
          "SignSymbol", "Pedestrian", "Car", "Bicyclist"}  # the feature distance holds on to these (DAFormer)
FREE_ON_RESUME = {"stop_at", "out", "eval_every", "slide", "profile"}
PROFILE_AFTER = 5  # steps that --profile lets pass first: they allocate, tune and compile
LIMITS = dict(crop=(1, 1e5), batch=(1, 1e5), steps=(1, 1e9), accum=(1, 1e4), save_every=(1, 1e9), log_every=(1, 1e9),
              panel_every=(1, 1e9), eval_every=(0, 1e9), channels=(1, 1e5), workers=(0, 1e3), seed=(0, 2**31),
              lr=(0, 10), head_lr=(0, 1e3), alpha=(0, 1), mix=(0, 1e3), mask=(0, 1e3), fd=(0, 1e3), rcs=(0, 1e3),
              spatial_depth=(0, 9), mask_ratio=(0, 1), mask_block=(1, 1e5), threshold=(0, 2),
              warmup=(0, 1e9), cluda=(0, 1e3), t2s=(0, 1e3), sepico=(0, 1e3), tau=(1e-3, 1e3), restyled=(0, 1e3),
              contrast_start=(0, 1e9), hardest=(1e-3, 1), omega=(0, 1), consistency=(0, 1e3),
              confident=(0, 1), profile=(0, 1e6), beta=(0, 0.5), border=(0, 1e5))  # least and most
NEEDS = dict(text="language", spatial_depth="language", teacher_head="language", pooled="cluda", style="t2s",
             beta="t2s", restyle="t2s", restyled="t2s", class_weights="t2s", hardest="dyce", omega="dyce",
             confident="consistency", threshold="mix or mask")  # flags that do nothing without another one


def backbone(text):
    """A name that model.py can build."""
    try:
        return model.check_backbone(text)
    except (ValueError, ImportError) as error:
        raise argparse.ArgumentTypeError(error) from None


def build_parser():
    """One line per flag; the help gives unit, sentinel and reason."""
    p = argparse.ArgumentParser(usage="train.py [--recipe NAME] [flags]   (-h explains them)", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    # data
    a("--recipe", default="mic", choices=RECIPES, help="a named set of flag values; every flag given here overrides it")
    a("--source", default="streets", help="labelled data, SPEC as in data.py; none trains on --labeled "
      "alone, 'target' on all of the target's labels")
    a("--target", default="streets:shifted", help="data to adapt to, SPEC or none; of its training labels those of "
      "--labeled alone are used")
    a("--labeled", default="0", help="target images with labels: N by SemiDAViL's rule, all that have some, or a "
      "list as UniMatch's; the rest stay unlabelled, and may lack masks")
    a("--val", help="labelled validation data, SPEC (default: the target's val split)")
    a("--classes", default="cityscapes19", help="cityscapes19, cityscapes16, camvid11 or a file with one name a line")
    a("--size", type=data.parse_size, help="WxH that every image is resized to (default: each set's published size)")
    a("--crop", type=int, default=128, help="side of the square training crop, pixels (published: 512)")
    a("--batch", type=int, default=4, help="images per process and domain (published: 2)")
    a("--cache", help="directory of the decoded uint8 images (default ~/.cache/nanouda, and there only sets < 2 GiB)")
    a("--workers", type=int, default=0, help="loader processes per domain; 0 is right where the data are cached")
    # network
    a("--backbone", type=backbone, default="mit_b0", help="mit_b0..mit_b5 or timm:NAME")
    a("--decoder", default="segformer", choices=model.FUSIONS, help="daformer is the published one, slow on a CPU")
    a("--channels", type=int, default=256, help="width of the decoder")
    a("--init", default="none", help="pretrained weights: a file, hub (network), none, or a .pt of ours to go on from")
    a("--language", choices=("lcmsm", "dlg"),
      help="lcmsm: a second decoder, conditioned on text; dlg: text guides the features of the decoder (default: none)")
    a("--text", default="auto", help="class vectors: FILE.npz, clip:MODEL/TAG, stub, learned, none, shuffled:FILE; auto"
      " is a cached bank, else a stub that knows no language")
    a("--spatial-depth", type=int, default=2, help="applications of LC-MSM's spatial block, 0 = off")
    # method
    a("--mix", type=float, default=1.0, help="weight of self-training on ClassMix images, 0 = off")
    a("--mask", type=float, default=1.0, help="weight of the consistency of masked target images (MIC), 0 = off")
    a("--mask-views", nargs="+", default=["target"], choices=("source", "mix", "target"),
      help="images that are masked: target in MIC, source and mix in LC-MSM; with --language its decoder sees them")
    a("--teacher-head", default="plain", choices=("plain", "language"), help="decoder that makes the pseudo-labels")
    a("--mask-block", type=int,
      help="side of a masked block, pixels (default 32 from crops of 512 on, as published; else 16)")
    a("--mask-ratio", type=float, default=0.7, help="share of masked blocks")
    a("--fd", type=float, default=0.005, help="weight of the distance to ImageNet features on things, 0 = off")
    a("--rcs", type=float, default=0.01, help="temperature of rare-class sampling, 0 = sample the source uniformly")
    a("--threshold", type=float, default=0.968, help="confidence counted in the pseudo-label weight q")
    a("--border", type=int, nargs=2, default=(0, 0), metavar=("TOP", "BOTTOM"),
      help="rows of a target crop without pseudo-labels: 15 120 for GTA5/SYNTHIA -> Cityscapes (the hood of the car), "
      "where a crop is as high as the image")
    a("--alpha", type=float,
      help="EMA decay of the teacher (default 0.999 from 10,000 steps on, as published; else 0.99)")
    a("--augment-source", action=argparse.BooleanOptionalAction, default=True,
      help="colour jitter and blur on source images; the published recipes leave them clean: --no-augment-source")
    # few target labels
    a("--dyce", action=argparse.BooleanOptionalAction, default=False,
      help="supervised loss on the hardest pixels, balanced by class, in place of the mean over all")
    a("--hardest", type=float, default=0.2, help="--dyce: share of the labelled pixels")
    a("--omega", type=float, default=0.5, help="--dyce: 1 weighs pixels alike, 0 classes")
    a("--consistency", type=float, default=0.0,
      help="weight of the consistency of unlabelled pixels of the ClassMix image with the teacher, 0 = off")
    a("--confident", type=float, default=0.95, help="--consistency: least confidence of a pseudo-label that is learned")
    # contrast: cells of stride 8, a class that covers 75 % of a cell is its label
    a("--cluda", type=float, default=0.0, help="weight of the contrast among source and among mixed pixels, 0 = off")
    a("--sepico", type=float, default=0.0, help="weight of the contrast with source classes' Gaussians, 0 = off")
    a("--t2s", type=float, default=0.0, help="weight of the pull of restyled source pixels to clean ones, 0 = off")
    a("--tau", type=float, default=0.1, help="temperature of the contrasts")
    a("--contrast-pixels", default="all", help="cells of a process and view: all, N or N/class")
    a("--contrast-start", type=int, help="steps before which a contrast weighs nothing (default: 0, --t2s: --warmup)")
    a("--pooled", action=argparse.BooleanOptionalAction, default=False,
      help="--cluda: one contrast over source and mixed pixels together, with pairs across the images")
    a("--projection", action=argparse.BooleanOptionalAction, default=False,
      help="contrast behind a projection head of two layers, not on the features themselves")
    a("--style", default="fourier", help="--t2s: how source images are restyled")
    a("--beta", type=float, nargs="+", default=[0.01], help="fourier: share of the spectrum, one of these a step")
    a("--restyle", default="extra", choices=("extra", "half"),
      help="--t2s: restyled images are a pass of their own, or take the place of every second source image")
    a("--restyled", type=float, default=0.0, help="--restyle extra: weight of the cross-entropy on restyled images")
    a("--class-weights", default="confidence", choices=("confidence", "none"),
      help="--t2s: classes that the teacher doubts weigh more, or all the same")
    a("--control", action=argparse.BooleanOptionalAction, default=False,
      help="compute all of a contrast's passes and heads, but give it no weight")
    # optimisation
    a("--steps", type=int, default=1000, help="length of the schedule (published: 40,000)")
    a("--stop-at", type=int, help="stop, and save, after this step of the schedule (default: --steps)")
    a("--warmup", type=int, help="steps of linear warm-up (default min(1500, steps / 20))")
    a("--lr", type=float, help="peak learning rate of the backbone (default 6e-5 with --init, as published, else 1e-3)")
    a("--head-lr", type=float, help="decoder's learning rate over the backbone's (default 10 with --init, else 1)")
    a("--accum", type=int, default=1, help="batches per optimiser step, for small memory; q and ClassMix go by batch")
    a("--seed", type=int, default=0, help="every random draw is a function of it, the step and the sample")
    a("--compile", action=argparse.BooleanOptionalAction, default=False,
      help="torch.compile backbone and decoders: minutes at first, pays on a GPU")
    a("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
      help="keep fewer activations and compute them again, for small memory (BatchNorm in a backbone of timm's then "
      "counts each batch twice)")
    a("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
      help="auto: bf16 where a short measurement at the start finds it faster")
    # run
    a("--out", default="out", help="directory of checkpoints, log and panels")
    a("--eval-every", type=int, default=0, help="validate every N steps, 0 = only at the end")
    a("--slide", action=argparse.BooleanOptionalAction, default=False,
      help="validate with half overlapping windows of the crop's size, not on whole images")
    a("--save-every", type=int, default=500, help="write OUT/last.pt every N steps")
    a("--log-every", type=int, default=50, help="a line in OUT/log.jsonl every N steps")
    a("--panel-every", type=int, default=500, help="a picture of what is trained on every N steps")
    a("--profile", type=int, default=0, help="time N steps, print where the time goes and leave; nothing is saved")
    return p


def parse_flags(argv=None):
    """Command line -> flags: defaults, then the recipe's values, then what was typed; derived defaults filled in."""
    parser = build_parser()
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES[known.recipe])
    f = parser.parse_args(argv)
    contrast = f.cluda or f.sepico or f.t2s
    for name, needed in NEEDS.items():
        if getattr(f, name) != parser.get_default(name) and not any(getattr(f, n) for n in needed.split(" or ")):
            parser.error(f"--{name.replace('_', '-')} does nothing without --{needed.replace(' or ', ' or --')}, or a "
                         "recipe that has it")
    if not contrast and (f.control or f.projection and not parser.get_default("projection")):
        parser.error(f"--{'control' if f.control else 'projection'} does nothing without --cluda, --sepico or --t2s")
    f.projection = bool(f.projection and contrast)  # a head that nothing trains would only be in the way
    f.mask_views = list(dict.fromkeys(f.mask_views))
    f.stop_at = f.steps if f.stop_at is None else f.stop_at
    f.warmup = min(1500, f.steps // 20) if f.warmup is None else f.warmup
    f.alpha = (0.999 if f.steps >= 10_000 else 0.99) if f.alpha is None else f.alpha
    f.lr = (1e-3 if f.init == "none" else 6e-5) if f.lr is None else f.lr
    f.head_lr = (1.0 if f.init == "none" else 10.0) if f.head_lr is None else f.head_lr
    f.mask_block = (32 if f.crop >= 512 else 16) if f.mask_block is None else f.mask_block
    f.contrast_start = (f.warmup if f.t2s else 0) if f.contrast_start is None else f.contrast_start
    f.val = f.val or f.target
    f.border = list(f.border)
    f.labeled = str(int(f.labeled)) if f.labeled.isdecimal() else f.labeled  # 00 is 0
    if f.source == "target":
        f.source = f.target
        if f.labeled != "0":
            parser.error("--source target, as in recipe oracle, takes all labels: --source none --labeled N takes some")
    if f.source == "none" and f.labeled == "0":
        parser.error("--source none leaves no label to learn from: --labeled N takes those of N target images")
    if f.target == "none" and f.labeled != "0":
        parser.error("--target none has no image for --labeled to count")
    if f.target == "none" and adapts(f):
        parser.error("--target none leaves nothing to adapt to: use --recipe source, or give a target")
    if f.teacher_head == "language" and f.language != "lcmsm":
        parser.error("--teacher-head language needs a language decoder: --language lcmsm")
    if f.language == "dlg" and f.spatial_depth != parser.get_default("spatial_depth"):
        parser.error("--spatial-depth belongs to --language lcmsm")
    if f.language == "lcmsm" and not f.mask:
        parser.error("--language lcmsm trains its decoder on masked views alone: give --mask a weight")
    if f.dyce and f.t2s and f.class_weights == "confidence":
        parser.error("--dyce and --t2s would both weigh the classes: add --class-weights none")
    if contrast and f.contrast_start >= f.steps:
        parser.error(f"--contrast-start {f.contrast_start} comes after the last of {f.steps} steps")
    if f.mask and "mix" in f.mask_views and not (f.mix or f.consistency):
        parser.error("--mask-views mix masks the ClassMix image, which --mix 0 leaves out")
    if f.t2s and f.style in ("fourier", "lab") and f.target == "none":
        parser.error(f"--style {f.style} takes looks from a target: without one give random, jitter or identity")
    if f.t2s and f.style == "random" and f.target != "none":
        parser.error("--style random, of t2sda_dg, is for domain generalisation, without a target: --target none "
                     "(--val SPEC gives scores)")
    for name, (least, most) in (LIMITS | {"stop_at": (1, f.steps)}).items():
        values = getattr(f, name)
        for value in values if isinstance(values, list) else [values]:
            if not least <= value <= most:
                parser.error(f"--{name.replace('_', '-')} must be from {least:g} to {most:g}, not {value}")
    return f


def adapts(f):
    """Whether a step looks at target images."""
    return bool(f.mix or f.consistency or f.mask and f.mask_views != ["source"] or f.t2s and f.target != "none")


def learning_rate(step, peak, steps, warmup):
    """Linear decay to zero, times a linear warm-up of the decayed value from 1e-6 (DAFormer: poly with power 1)."""
    ramp = 1 - (1 - step / warmup) * (1 - 1e-6) if step < warmup else 1.0
    return peak * (1 - step / steps) * ramp


def parameter_groups(net, lr, head_lr, decay=0.01):
    """AdamW groups of the family: no decay on the backbone's normalisation, `head_lr` times the rate on the decoder."""
    norms = {id(p) for m in net.backbone.modules() if "norm" in type(m).__name__.lower()
             for p in m.parameters(recurse=False)}
    backbone = list(net.backbone.parameters())
    heads = [p for name, p in net.named_parameters() if not name.startswith(("backbone.", "text."))]
    text = list(net.text.parameters()) if net.text else []  # LC-MSM: the backbone's rate
    return [dict(params=[p for p in backbone if id(p) not in norms], peak=lr, weight_decay=decay),
            dict(params=[p for p in backbone if id(p) in norms], peak=lr, weight_decay=0.0),
            dict(params=text, peak=lr, weight_decay=decay),
            dict(params=heads, peak=lr * head_lr, weight_decay=decay)]


# ---------------------------------------------------------------------------------------------------------------------
# The method: the terms of one step


# student, perhaps wrapped by DDP, and its frozen companions: EMA teacher, ImageNet copy (or None); running statistics
Networks = namedtuple("Networks", "student teacher imagenet confidence gaussians")
# what a step draws from and is told by: its number, a CPU generator of its own, (rank, world), a Clock
Context = namedtuple("Context", "step generator shard clock")


def contrast_rows(f, net, features, label, weight, generator, shard):
    """What a contrast sees of a batch, all in the order image, row, column: unit rows (N,C) of the cells of stride 8
    behind the projection head of `net`, their label int (N,), 255 outside the draw, and weight (N,), 1 where None."""
    net = getattr(net, "module", net)
    cells = data.majority_label(label, [max(1, side // 8) for side in label.shape[1:]], net.num_classes)  # (B,h,w)
    pooled = F.adaptive_avg_pool2d(features, cells.shape[1:]).permute(0, 2, 3, 1).flatten(0, 2)  # (B,C,h,w) -> (N,C)
    rows = F.normalize(net.projection(pooled).float(), dim=1, eps=1e-3)  # eps: a dead cell has no direction to amplify
    weight = torch.ones(label.shape, device=label.device) if weight is None else weight
    return rows, cells.flatten(), F.adaptive_avg_pool2d(weight, cells.shape[1:]).flatten()


def step_terms(f, context, networks, source, labeled, target, things):
    """The loss terms of one batch, in this order: source, feature distance, mix, mask, contrasts.

    f: flags; context: Context; networks: Networks; source: (image float (B,3,S,S) in [0,1], label uint8
    (B,S,S)); labeled: the same of the target, or None; target: the same without labels, 255 on padding and 0 elsewhere,
    or None; things: class indices of the feature distance.
    Returns (terms: name -> 0-d tensor, views: name -> image or label tensor for the panel).
    """
    student, teacher, imagenet, confidence, gaussians = networks
    step, generator, shard, clock = context
    (image, label), B = source, len(source[0])
    num_classes = teacher.num_classes
    terms, views = {}, {}

    view = data.strong_augment(image, generator) if f.augment_source else image
    if f.t2s:
        restyled = data.restyle(image, target[0] if target else None, generator, shard)
        views.update(restyled=restyled)
        query_label = label
        if f.restyle == "half":
            swap = (data.uniform((B, 1, 1), generator, shard) < 0.5).to(image.device, non_blocking=True)
            view = torch.where(swap[:, None], restyled, view)  # (B,1,1,1) against (B,3,S,S)
            query_label = torch.where(swap, label, data.IGNORE)
    donor, known_label = source, label  # whose classes ClassMix pastes; the labels of `view`
    if labeled:  # joins the source in everything that asks for true labels
        swap = (data.uniform((B, 1, 1), generator, shard) < 0.5).to(image.device, non_blocking=True)
        donor = torch.where(swap[:, None], labeled[0], image), torch.where(swap, labeled[1], label)
        clean = data.strong_augment(labeled[0], generator) if f.augment_source else labeled[0]
        view, known_label = torch.cat([view, clean]), torch.cat([label, labeled[1]])  # (2B,3,S,S), (2B,S,S)
    # a teacher's BatchNorm sees target images alone, and the student's is to see labelled ones so too; without a
    # teacher the running statistics of both domains together are what serves in the end
    out = model.joined([student(images) for images in (view.split(B) if adapts(f) else [view])])
    terms["source"] = (losses.dyce(out.logits, known_label, f.hardest, f.omega) if f.dyce else
                       cross_entropy(out.logits, known_label))
    views.update(source=view, label=known_label)

    if imagenet is not None:
        with torch.no_grad():
            reference = imagenet.encode(view)[-1]
        cells = data.majority_label(known_label, reference.shape[2:], num_classes)
        terms["fd"] = f.fd * feature_distance(out.pyramid[-1], reference, cells, things)
    clock("source")

    if adapts(f):  # pseudo-labels of the clean target; one weight q for the whole batch, over all processes
        with torch.no_grad():
            target, padding = target
            logits = teacher(target, head=f.teacher_head).logits
            pseudo, certainty, fraction = model.pseudo_label(logits, target.shape[2:], f.threshold)
            inside = padding != data.IGNORE  # (B,S,S)
            inside[:, :f.border[0]] = False
            inside[:, max(0, inside.shape[1] - f.border[1]):] = False
            weight = mean_over_ranks(fraction) * inside
        views.update(target=target, pseudo=pseudo)
        clock("teacher")

    mixes = f.mix or f.consistency
    if mixes:  # paste half of the batch's source classes onto the target (ClassMix)
        present = mean_over_ranks(data.present_classes(donor[1], num_classes).float()) > 0  # (K,), over all processes
        mixed, mixed_label, mixed_weight, pasted = data.class_mix(
            *donor, target, pseudo, weight, present, generator, shard)
        mixed = data.strong_augment(mixed, generator)
        mixed_out = student(mixed)
        if f.mix:
            terms["mix"] = f.mix * cross_entropy(mixed_out.logits, mixed_label, mixed_weight)
        if f.consistency:  # of the pixels that stay the target's, each trusted for itself
            terms["consistency"] = f.consistency * losses.consistency(
                mixed_out.logits, pseudo, certainty >= f.confident, inside & ~pasted[:, 0])
        views.update(mixed=mixed, mixed_label=mixed_label)
        clock("mixed")

    for name in f.mask_views if f.mask else ():  # predict what blanked blocks hide from what surrounds them
        clear, answer, trust = {"source": lambda: (image, label, None), "target": lambda: (target, pseudo, weight),
                                "mix": lambda: (mixed, mixed_label, mixed_weight)}[name]()
        keep = data.block_mask(len(clear), clear.shape[2:], f.mask_block, f.mask_ratio, generator, shard)
        keep = keep.to(clear, non_blocking=True)
        masked = data.strong_augment(clear, generator) * keep + teacher.pixel_mean * (1 - keep)
        logits = student(masked, head=teacher.heads[-1]).logits  # "language" in LC-MSM, else "plain"
        terms["mask" if name == "target" else f"mask_{name}"] = f.mask * cross_entropy(logits, answer, trust)
        views[f"masked_{name}"] = masked
        clock("masked")

    # contrasts, on what the passes above have seen, never on masked images: a hidden cell shows nothing of its class
    live = 0.0 if f.control or step < f.contrast_start else 1.0
    if f.t2s or f.sepico:  # the teacher's view of the clean source: where target features are to go
        with torch.no_grad(), model.frozen_statistics(teacher):
            known = teacher(image)
            keys, key_label, _ = contrast_rows(f, teacher, known.features, label, None, generator, shard)
    if f.cluda or f.sepico:
        sides = [contrast_rows(f, student, out.features, known_label, None, generator, shard)]
        if mixes:
            sides.append(contrast_rows(f, student, mixed_out.features, mixed_label, mixed_weight, generator, shard))
        if f.sepico:
            gaussians.update(keys, key_label)
            terms["sepico"] = live * f.sepico * sum(losses.sepico(*side, gaussians, f.tau) for side in sides)
        if f.cluda:
            pools = [[torch.cat(part) for part in zip(*sides)]] if f.pooled and mixes else sides
            terms["cluda"] = live * f.cluda * sum(losses.cluda(*pool, f.tau) for pool in pools)
    if f.t2s:
        features, labels = [out.features[:B]], [query_label]
        if f.restyle == "extra":
            styled = student(restyled)
            features = [styled.features]
            if f.restyled:
                terms["restyled"] = f.restyled * cross_entropy(styled.logits, label)
        if labeled:  # true target pixels with true labels are the best queries of all
            features.append(out.features[B:])
            labels.append(labeled[1])
        if f.target == "none":  # no target image: the teacher's confidence on source
            pseudo, certainty, _ = model.pseudo_label(known.logits, label.shape[1:])
        confidence.update(pseudo, certainty)
        class_weight = confidence.weights(0.5 if f.class_weights == "confidence" else 0)
        rows, cells, _ = contrast_rows(f, student, torch.cat(features), torch.cat(labels), None, generator, shard)
        terms["t2s"] = live * f.t2s * losses.t2s(rows, cells, keys, key_label, class_weight, f.tau)
    if f.cluda or f.sepico or f.t2s:
        clock("contrast")
    return terms, views


# ---------------------------------------------------------------------------------------------------------------------
# The run


def print0(*words):
    """Print on the first process only, around the progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(str(w) for w in words))


def setup():
    """Device and processes; torchrun's environment decides. Returns (device, rank, world)."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:  # one process needs no group, and its gradients no averaging
        # DDP minds the strides of dimensions of size 1, which a depthwise convolution's gradient is free to choose
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1))
    return device, rank, world


def open_training_set(f, spec, classes, count=False, partial=False):
    """A training split with its cache filled and its classes counted, by the first process where there are several."""
    dataset = data.open_dataset(spec, "train", classes, f.size, f.cache, partial)
    if f.cache and not dataset.cached:
        print0(f"note: --cache: {spec} has no common size and is read from its files each time; give --size WxH")
    if int(os.environ.get("RANK", 0)) == 0:
        dataset.prepare()
        if count and dataset.labeled:
            dataset.class_counts()
    if dist.is_initialized():
        dist.barrier()
    return dataset


def open_data(f):
    """Class names, labelled source (or None), target (or None), indices of its labelled images, validation set (or
    None)."""
    classes = data.class_names(f.classes)
    source_set = None if f.source == "none" else open_training_set(f, f.source, classes, count=f.rcs > 0)
    if source_set and not source_set.labeled:
        raise data.DataError(f"--source {f.source}: has no labels, and a source needs them")
    if source_set and (never := [name for i, name in enumerate(classes) if i not in source_set.table]):
        print0(f"note: {f.source} has no label for {', '.join(never)}")
    target_set = None if f.target == "none" else open_training_set(
        f, f.target, classes, count=not source_set and f.rcs, partial=True)
    labeled = [] if f.labeled == "0" else data.labeled_indices(target_set, f.labeled)
    for dataset, indices in (source_set, None), (target_set, labeled):
        if dataset and indices != [] and not data.shows_classes(dataset, indices):
            raise data.DataError(f"{dataset.spec}: no pixel of its labels is one of the {len(classes)} classes; see "
                                 f"python data.py {dataset.spec} --classes {f.classes}")
    val_set = None if f.val == "none" else data.open_dataset(f.val, "val", classes, f.size, f.cache)
    if val_set and not val_set.labeled:
        raise data.DataError(f"--val {f.val}: has no labels; give --val a labelled set, or none")
    return classes, source_set, target_set, labeled, val_set


def leave_signals_to_the_run(_):
    """A launcher signals loader processes too: they must live until the step has ended and the run is saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, f, start, shard, device, rare=None, labels=True, subset=None):
    """Batches of a data set or of a subset of its indices, from step `start` on; sample k of a run is the same whatever
    the number of processes.

    Yields (image float (B,3,S,S) in [0,1], label uint8 (B,S,S), file names), image and label on the device. Without
    `labels` those of the data set are not looked at.
    """
    rank, world = shard
    crops = data.Crops(dataset, f.crop, f.seed, rare, labels=labels, subset=subset)
    rounds = range(start * f.accum, f.steps * f.accum)
    order = [[(k * world + rank) * f.batch + b for b in range(f.batch)] for k in rounds]
    loader = torch.utils.data.DataLoader(crops, batch_sampler=order, num_workers=f.workers,
                                         pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_the_run)
    for batch in loader:
        image = batch["image"].to(device, non_blocking=True).float() / 255
        label = batch["label"] if crops.labels else torch.where(batch["inside"], 0, data.IGNORE).to(torch.uint8)
        yield image, label.to(device, non_blocking=True), [dataset.names[i] for i in batch["index"].tolist()]


def open_loaders(f, start, shard, device, source_set, target_set, labeled):
    """Batches of the source, of the labelled target and of the target, None where a step takes none of them; without a
    source the labelled target stands in its place."""
    known_set, known = (source_set, None) if source_set else (target_set, labeled)
    counts = known_set.class_counts()[known or slice(None)] if f.rcs else None
    rare = data.RareClassSampler(counts, f.rcs, data.RARE_IMAGE * f.crop ** 2) if f.rcs else None
    rest = sorted(set(range(len(target_set))) - set(labeled)) if labeled else None
    place = f, start, shard, device
    return (batches(known_set, *place, rare, subset=known),
            batches(target_set, *place, subset=labeled) if source_set and labeled else None,
            batches(target_set, *place, labels=False, subset=rest or None) if adapts(f) else None)  # none rests: all


def with_own_heads(state, student):
    """A checkpoint's weights without the heads that the student has not, and with its new ones that they have not. The
    text bank is the student's: --text names it."""
    own, optional = student.state_dict(), ("projection.", "language_decoder.", "text.", "guidance.")
    kept = {k: v for k, v in state.items() if (k in own or not k.startswith(optional)) and not k.endswith(".bank")}
    return {k: v for k, v in own.items() if k.startswith(optional) and k not in kept} | kept


def open_bank(f, checkpoint):
    """The text bank of a run, or None: that of its checkpoint, whatever has become of --text since; else made or read
    by the first process and sent to the others."""
    if checkpoint or not f.language:
        return model.checkpoint_bank(checkpoint) if checkpoint else None
    banks = [None]
    if int(os.environ.get("RANK", 0)) == 0:
        banks = [model.text_bank(f.text, data.class_names(f.classes))]
    if dist.is_initialized():
        dist.broadcast_object_list(banks)
    return banks[0]


def open_networks(f, classes, bank, device):
    """Networks, the student not wrapped, an ImageNet copy if the feature distance needs one."""
    torch.manual_seed(f.seed)
    timm_hub = f.init == "hub" and f.backbone.startswith("timm:")
    ours = f.init.endswith(".pt") and model.is_checkpoint(f.init)
    student = model.Segmenter(f.backbone, f.decoder, len(classes), f.channels, f.language, bank, f.spatial_depth,
                              timm_hub, f.projection)
    if ours:
        model.load_weights(student, with_own_heads(model.load_checkpoint(f.init)["student"], student), f.init)
    elif f.init == "none":
        print0(f"{f.backbone}: random weights; --init takes pretrained ones")
    elif not timm_hub:
        model.load_backbone(student, f.init)
    student.to(device).train()
    if f.checkpointing:
        student.backbone.recompute()
    teacher = model.teacher_mode(copy.deepcopy(student).requires_grad_(False))
    imagenet = None
    if f.fd and (f.init == "none" or ours):
        print0("feature distance: off, it needs ImageNet weights to stay near to (--init FILE or hub)")
    elif f.fd and not THINGS & set(classes):
        print0("feature distance: off, none of the classes is one of its things:", ", ".join(sorted(THINGS)))
    elif f.fd:
        imagenet = copy.deepcopy(student).requires_grad_(False).eval()
    gaussians = losses.ClassGaussians(len(classes), f.channels).to(device)
    return Networks(student, teacher, imagenet, losses.ClassConfidence(len(classes)).to(device), gaussians)


def faster_dtype(f, student, device):
    """Whether a training pass is at least a tenth faster under bf16 autocast than in fp32, measured on this device,
    network and crop, the same answer on all processes; and the two times, ms."""
    if device.type == "mps" or device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False, "no bf16 here"
    clock, image = Clock(device), torch.rand(f.batch, 3, f.crop, f.crop, device=device)
    label, best = torch.zeros(f.batch, f.crop, f.crop, dtype=torch.uint8, device=device), []
    with model.frozen_statistics(student):
        for name in ("fp32", "bf16"):
            times = []
            for _ in range(4):  # the first allocates and chooses kernels
                clock.reset()
                with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
                    loss = cross_entropy(student(image).logits, label)
                loss.backward()
                clock(name)
                times.append(clock.sums()[name])
            best.append(mean_over_ranks(torch.tensor(min(times[1:]))).item())
    student.zero_grad(set_to_none=True)
    return best[1] < 0.9 * best[0], f"{best[1]:.0f} ms a pass, {best[0]:.0f} in fp32"


def versions(device):
    """What a number depends on beside the flags: versions, hardware, a hash of the six scripts."""
    here = Path(__file__).resolve().parent
    names = ("model.py", "train.py", "data.py", "losses.py", "kernels.py", "eval.py")
    sources = b"".join((here / name).read_bytes() for name in names)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": numpy.__version__,
            "pillow": PIL.__version__, "device": f"{device.type}: {name}",
            "threads": torch.get_num_threads(), "source_sha256": hashlib.sha256(sources).hexdigest()[:16]}


def check_resume(flags, classes, checkpoint, path):
    """Refuse to go on from a checkpoint of other flags, classes or processes, naming each that differs."""
    saved = checkpoint["flags"] | {"the names in --classes": checkpoint["classes"]}
    changed = [(k, v) for k, v in (flags | {"the names in --classes": list(classes)}).items()
               if k not in FREE_ON_RESUME and v != saved.get(k)]
    if changed:
        name = {"world": "the number of processes"}
        what = ", ".join(f"{name.get(k, k if ' ' in k else '--' + k.replace('_', '-'))} was {saved.get(k)}, is {v}"
                         for k, v in changed)
        raise model.CheckpointError(f"{path} was trained with other flags: {what}; repeat them, or give another --out")


class Clock:
    """Where the time of the steps goes: clock(part) books what has passed since the last call on `part`. On a GPU by
    events, which are read when a sum is asked for: nothing waits in between."""

    def __init__(self, device):
        self.device, self.cuda = device, device.type == "cuda"
        self.reset()

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reset(self):
        self.spans, self.last = [], self.now()

    def __call__(self, part):
        now = self.now()
        self.spans.append((part, self.last, now))
        self.last = now

    def sums(self):
        """Milliseconds per part since the last reset, in the order of their first call; on a GPU, waits for it."""
        if self.cuda:
            self.last.synchronize()
        total = {}
        for part, begin, end in self.spans:
            total[part] = total.get(part, 0) + (begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin))
        return total


class GradientCheck:
    """Stops a run before a gradient that is not finite reaches the weights. On a GPU nothing waits for the norm: the
    optimiser itself leaves the weights as they are, and the error comes one step later."""

    def __init__(self, optimizer, log, last, delayed):
        self.optimizer, self.log, self.last, self.delayed, self.pending = optimizer, log, last, delayed, []

    def __call__(self, step, norm, terms, files):
        event = torch.cuda.Event() if norm.is_cuda else None
        if self.delayed:
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # the fused kernels skip the step where it is 1
        self.pending.append((step, norm.to("cpu", non_blocking=norm.is_cuda), terms, files, event))
        if event:
            event.record()
        self.flush(keep=int(self.delayed))

    def flush(self, keep=0):
        """Look at all pending norms but the last `keep`. Raises FloatingPointError."""
        while len(self.pending) > keep:
            step, norm, terms, files, event = self.pending.pop(0)
            if event:
                event.synchronize()
            if not torch.isfinite(norm):
                parts = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
                self.log.write("non-finite", step=step, parts=parts, files=files)
                left = f"{self.last} is from before" if self.last.exists() else "nothing was saved yet"
                raise FloatingPointError(
                    f"step {step}: the gradient is not finite ({parts}); files: {', '.join(files)}; stopped before the "
                    f"optimiser step, {left}; try a lower --lr or --dtype fp32")


class Log:
    """OUT/log.jsonl: one JSON object a line; means of the loss terms and of the milliseconds of a step's parts, and
    images/s, since the last line."""

    def __init__(self, path, images_per_step, clock, enabled):
        self.file = open(path, "a", buffering=1) if enabled else None
        self.images, self.clock = images_per_step, clock
        self.reset()

    def reset(self):
        self.sums, self.steps, self.began = {}, 0, time.perf_counter()
        self.clock.reset()

    @contextlib.contextmanager
    def left_out(self):
        """Panels, validation and checkpoints take no time of a step's."""
        begin = time.perf_counter()
        yield
        self.began += time.perf_counter() - begin
        self.clock.last = self.clock.now()

    def write(self, event, **values):
        if self.file:
            try:
                self.file.write(json.dumps({"event": event, **values}) + "\n")
            except OSError as error:
                raise OSError(f"{self.file.name}: cannot be written ({error.strerror}); make room, then start again; "
                              "checkpoints stay as they are") from error

    def add(self, terms):
        self.steps += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def report(self, bar, done, f, **values):
        """A line in the log, and on the bar or, where stderr is no terminal, on stdout."""
        means = {name: round(mean_over_ranks(value).item() / self.steps, 4) for name, value in self.sums.items()}
        parts = {part: round(ms / self.steps, 2) for part, ms in self.clock.sums().items()}
        pace = self.steps / (time.perf_counter() - self.began)
        speed = round(pace * self.images, 2)
        self.write("step", step=done, images_per_s=speed, **values, **means, ms=parts,
                   peak_mib=round(peak_memory(self.clock.device)))
        bar.set_postfix({**means, "images/s": speed})
        if bar.disable:
            print0(f"step {done}/{f.steps}", *(f"{name} {value}" for name, value in means.items()),
                   f"{speed} images/s, {(f.stop_at - done) / pace:.0f} s left")
        self.reset()
        return parts, speed


def average_buffers(*networks):
    """Average the BatchNorm statistics over the processes, so that each of them evaluates the same network."""
    for buffer in (b for net in networks for b in net.buffers() if b.is_floating_point()):
        buffer.copy_(mean_over_ranks(buffer))


def settle_buffers(student, teacher):
    """BatchNorm statistics as they are saved and evaluated: averaged over the processes; a layer of the teacher that
    saw no batch, because no term runs it, has its student's."""
    average_buffers(student, teacher)
    for mine, theirs in zip(teacher.modules(), student.modules()):
        if isinstance(mine, torch.nn.modules.batchnorm._BatchNorm) and not mine.num_batches_tracked:
            mine.running_mean.copy_(theirs.running_mean)
            mine.running_var.copy_(theirs.running_var)


def read_out(student, teacher, target_set, val_set, window, log, step):
    """The three read-outs of a finished run: student, EMA teacher, student with AdaBN on the target."""
    results = {"student": evaluation.evaluate(student, val_set, window),
               "teacher": evaluation.evaluate(teacher, val_set, window), "adabn": None}
    if target_set and any(isinstance(m, torch.nn.BatchNorm2d) for m in student.modules()):
        results["adabn"] = evaluation.evaluate(evaluation.adapt_batchnorm(student, target_set), val_set, window)
    log.write("result", step=step, **results)
    print0(f"student, {val_set.spec}, val:\n{evaluation.format_scores(results['student'])}")
    print0(*(f"{name} mIoU {result['miou']:.2f}  " for name, result in results.items() if result),
           "(adabn: the student with BatchNorm statistics of the target)")


def peak_memory(device):
    """The most memory in use so far, MiB: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def profile_table(parts, speed, flops, device, dtype):
    """What --profile prints: milliseconds and share of the step's parts, images/s, peak memory; on a GPU the share of
    the rate of a large matrix product that the model's FLOPs reach."""
    total = sum(parts.values())
    lines = [f"{'part':<10} {'ms':>9} {'share':>7}", *(f"{part:<10} {ms:9.2f} {ms / total:7.1%}"
                                                     for part, ms in parts.items()), f"{'step':<10} {total:9.2f}"]
    lines.append(f"{speed:.1f} images/s, peak memory {peak_memory(device):.0f} MiB, {flops / 1e9:.1f} GFLOP a step")
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=dtype or torch.float32)
        clock = Clock(device)
        for _ in range(20):
            a @ a
            clock("product")
        clock.sums()  # waits for the GPU
        best = min(begin.elapsed_time(end) for _, begin, end in clock.spans)
        rate = 2 * 8192**3 / best
        lines.append(f"{flops / total / rate:.1%} of the rate of a matrix product here, {rate / 1e9:.0f} TFLOP/s")
    return "\n".join(lines)


def accumulate(f, step, networks, loaders, things, shard, dtype, clock):
    """The gradient of one step, from f.accum batches of the loaders of source, labelled target and target, None where
    there is none. Returns (terms, views, file names) for log, panel and errors."""
    generator, files, total = torch.Generator(), [], {}
    for part in range(f.accum):
        batch = []
        for loader in loaders:
            *images, names = next(loader) if loader else [[]]
            batch.append(images or None)
            files += names
        clock("data")
        seed = int.from_bytes(hashlib.sha256(f"{f.seed} {step} {part}".encode()).digest()[:7], "big")
        generator.manual_seed(seed)  # draws for the joint batch: the same on every process
        torch.manual_seed(seed + shard[0])  # dropout and stochastic depth; after next(), which may draw a loader's seed
        local = part + 1 < f.accum and shard[1] > 1  # the processes average their gradients once
        with networks.student.no_sync() if local else contextlib.nullcontext():
            with torch.autocast(batch[0][0].device.type, dtype, enabled=dtype is not None):
                context = Context(step, generator, shard, clock)
                terms, views = step_terms(f, context, networks, *batch, things)
            (sum(terms.values()) / f.accum).backward()
        clock("backward")
        total = {name: total.get(name, 0) + value.detach() / f.accum for name, value in terms.items()}
    return total, views, files


def catch_signals():
    """SIGTERM and SIGINT are collected in the returned list; a second one does not wait for the step to end."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: os._exit(128 + n) if caught else caught.append(n))
    return caught


def run(argv=None):
    """Flags, set-up, the loop."""
    f = parse_flags(argv)
    device, rank, world = setup()
    out, last = Path(f.out), Path(f.out) / "last.pt"
    flags = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(f).items()} | {"world": world}
    checkpoint = model.load_checkpoint(last) if last.exists() and not f.profile else None
    if checkpoint:
        if f.dtype == "auto":  # once measured, it is a flag like the others
            f.dtype = flags["dtype"] = checkpoint["flags"]["dtype"]
        check_resume(flags, data.class_names(f.classes), checkpoint, last)
        if checkpoint["step"] >= f.stop_at:
            return print0(f"{last} is at step {checkpoint['step']} of {f.steps}, nothing is left to do; "
                          f"use it with: python eval.py {last}{' --images PATH' if f.val == 'none' else ''}")

    if checkpoint:
        print0(f"goes on from {last}, step {checkpoint['step']}")
    bank = open_bank(f, checkpoint)
    classes, source_set, target_set, labeled, val_set = open_data(f)
    split = [target_set.names[i] for i in labeled]
    split_hash = hashlib.sha256("\n".join(split).encode()).hexdigest()[:16]
    if checkpoint and (known := checkpoint.get("labeled", [])) != split:
        raise model.CheckpointError(
            f"{last} was trained with the labels of {len(known)} target images; --labeled {f.labeled} "
            f"now gives {len(split)}, not all of them the same; restore the list or images, or give another --out")
    window = f.crop if f.slide else None
    things = torch.tensor([i for i, name in enumerate(classes) if name in THINGS], device=device)
    networks = open_networks(f, classes, bank, device)
    student, teacher, *_ = networks
    statistics = torch.nn.ModuleDict({"confidence": networks.confidence, "gaussians": networks.gaussians})
    optimizer = torch.optim.AdamW(parameter_groups(student, f.lr, f.head_lr), fused=device.type in ("cuda", "cpu"))
    bf16, why = faster_dtype(f, student, device) if f.dtype == "auto" else (f.dtype == "bf16", "")
    dtype, start, best = torch.bfloat16 if bf16 else None, 0, -1.0
    flags["dtype"] = "bf16" if bf16 else "fp32"
    if checkpoint:
        model.load_weights(student, checkpoint["student"], last)
        model.load_weights(teacher, checkpoint["teacher"], last)
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["fused"] = device.type in ("cuda", "cpu")  # not that of the device that saved
        model.load_weights(statistics, checkpoint.get("statistics", statistics.state_dict()), last)
        start, best = checkpoint["step"], checkpoint["best"]
    if f.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        except Exception as error:  # of any backend
            raise OSError(f"--compile: torch.compile does not work here ({str(error).splitlines()[0][:90]}); install a "
                          "C++ compiler, or leave --compile out") from None
    for net in filter(None, networks[:3] if f.compile else ()):
        for module in net.compilable():
            module.compile()  # in place: names and weights stay those of the plain module
    loaders = open_loaders(f, start, (rank, world), device, source_set, target_set, labeled)
    # every term goes into one backward, so no parameter is unused; buffers are averaged where they are needed
    if world > 1:
        networks = networks._replace(student=DistributedDataParallel(student, broadcast_buffers=False))

    if rank == 0 and not f.profile:
        (out / "panels").mkdir(parents=True, exist_ok=True)
    images = sum(loader is not None for loader in loaders) * f.batch * f.accum * world
    about, clock, signals = versions(device), Clock(device), catch_signals()
    log = Log(out / "log.jsonl", images, clock, rank == 0 and not f.profile)
    check = GradientCheck(optimizer, log, last, delayed=device.type == "cuda")
    if f.profile:
        f.stop_at = PROFILE_AFTER + f.profile
        f.steps = max(f.steps, f.stop_at)
    text = bank and {"kind": bank.kind, "dimensions": bank.embeddings.shape[1], "about": bank.about,
                     "rows_sha256": hashlib.sha256(bank.embeddings.numpy().tobytes()).hexdigest()[:16]}
    log.write("resume" if checkpoint else "start", step=start, flags=flags, classes=list(classes), versions=about,
              **({"text": text} if bank else {}),
              **({"labeled": split, "labeled_sha256": split_hash} if split else {}))
    print0(f"{f.recipe}: {f.source}{f' ({len(source_set)} images)' if source_set else ''} -> {f.target}"
           f"{f' ({len(split)} images with labels, split {split_hash})' if split else ''}, {len(classes)} classes; "
           f"{f.backbone} + {f.decoder}-{f.channels}; {world} x {f.batch} crops of {f.crop}, "
           f"{flags['dtype']}{f' (bf16: {why})' if why else ''}; "
           f"{about['device']}, torch {about['torch']}")

    if bank:
        tower = "".join(f" {bank.about[key]}" for key in ("model", "pretrained") if key in bank.about)
        print0(f"text: {bank.kind}{tower}, {text['dimensions']} dimensions, sha256 {text['rows_sha256']}")

    def save(name, step):
        if rank == 0:
            model.save_checkpoint(out / name, {
                "flags": flags, "classes": list(classes), "student": student.state_dict(), "step": step, "best": best,
                "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(), "versions": about,
                "text": bank and {"embeddings": bank.embeddings, "kind": bank.kind, "about": bank.about},
                "statistics": statistics.state_dict(), "labeled": split, "labeled_sha256": split_hash})

    steps = tqdm(range(start, f.stop_at), f.recipe, f.stop_at, initial=start, disable=True if rank else None)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, group["peak"], f.steps, f.warmup)
        if f.profile and step == PROFILE_AFTER:
            log.reset()
        model.ema_update(teacher, student, step, f.alpha)
        clock("EMA")
        counted = FlopCounterMode(display=False) if f.profile and step == 0 else contextlib.nullcontext()
        with counted:
            terms, views, files = accumulate(f, step, networks, loaders, things, (rank, world), dtype, clock)
        if f.profile and step == 0:
            flops = counted.get_total_flops()
        norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
        check(step, norm, terms, files)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock("optimiser")
        log.add(terms)

        done, finished = step + 1, step + 1 == f.stop_at
        if finished or signals or done % f.log_every == 0 or done % f.save_every == 0:
            check.flush()
        if f.profile:
            if finished:
                parts, speed = log.report(steps, done, f)
                print0(profile_table(parts, speed, flops, device, dtype))
            elif signals:
                sys.exit(130 if signal.SIGINT in signals else 0)
            continue
        if done % f.log_every == 0 or finished:
            doubts = {"class_weights": networks.confidence.weights().tolist()} if f.t2s else {}
            log.report(steps, done, f, lr=group["lr"], grad_norm=round(norm.item(), 4), **doubts)
        if rank == 0 and (done % f.panel_every == 0 or finished):
            with log.left_out():
                evaluation.training_panel(student, views, classes).save(out / "panels" / f"{done:06d}.png")
        if val_set and f.eval_every and done % f.eval_every == 0:
            check.flush()  # statistics of a step that was not finite must not be saved
            with log.left_out():
                settle_buffers(student, teacher)
                result = evaluation.evaluate(student, val_set, window)
                log.write("eval", step=done, student=result)
                print0(f"step {done}: student mIoU {result['miou']:.2f}")
                if result["miou"] > best:
                    best = result["miou"]
                    save("best.pt", done)
        leave = mean_over_ranks(torch.tensor(float(bool(signals)))) > 0  # on the CPU: no GPU is waited for
        if leave or finished or done % f.save_every == 0:
            check.flush()
            with log.left_out():
                settle_buffers(student, teacher)
                save("last.pt", done)
        if leave:
            print0(f"stopped by a signal, {last} saved at step {done}; the same command goes on from there")
            sys.exit(130 if signal.SIGINT in signals else 0)
    if f.profile:
        return
    if val_set and f.stop_at == f.steps:
        read_out(student, teacher, target_set, val_set, window, log, f.steps)
    print0(f"step {f.stop_at} of {f.steps}: checkpoint {last}, panels {out / 'panels'}, log {out / 'log.jsonl'}")


def main(argv=None):
    """run(), with bad input as one line on stderr and exit status 1."""
    try:
        run(argv)
    except (data.DataError, model.WeightsError, model.CheckpointError, model.TextError, FloatingPointError,
            OSError) as error:
        print("error:", str(error).splitlines()[-1], file=sys.stderr)  # a loader process puts its traceback before it
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; try --checkpointing, --batch 1 --accum N or a smaller --crop", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the first step; later it is collected
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if children := multiprocessing.active_children():  # loaders ignore SIGTERM, and Python would wait for them
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that they were killed
            for child in children:
                child.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
