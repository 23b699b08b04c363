"""Train on labelled source images, adapt to unlabelled target images.

    python train.py                                    one process: a laptop, one GPU
    torchrun train.py                                  the same
    torchrun --nproc-per-node 4 train.py --batch 1     four GPUs of one machine, joint batch 4
    torchrun --nnodes 2 --node-rank R --master-addr A --nproc-per-node 8 train.py
                                                       two machines, R is 0 or 1, A the first one,
                                                       OUT in a folder that both share

Without flags: rendered streets -> the same streets at night, recipe best, 5 to 8 minutes on two CPU
cores. A run writes OUT/last.pt, OUT/best.pt (with --eval-every), OUT/log.jsonl, OUT/panels/*.png.
With --source-steps, the default of short runs that adapt, it also writes OUT/source.pt and, after
validation, OUT/result.png. It goes on from OUT/last.pt if that is there; another --out begins anew.
"""
import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import secrets
import shlex
import signal
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

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
from losses import cross_entropy, mean_over_ranks

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is where, from top to bottom. Who adds a loss needs the first two; README shows the places.
#     recipes and flags     RECIPES, build_parser, parse_flags and what flags mean for a step
#     the method            step_terms, one step: views, a pass of the student for each, terms
#     optimiser, set-up     learning rates; processes, data, networks; may this run go on?
#     what is watched       time, gradients, the folder's lock, the log
#     the run               Run, which holds it all; loop, over the steps; read_out, at the end

# -------------------------------------------------------------------------------------------------
# Recipes and flags

# A recipe names what it turns on; everything else is off. Any flag that is typed overrides it.
DAFORMER = dict(mix=1.0, fd=0.005, rcs=0.01)
RECIPES = {
    "source": {},                                          # labelled source only
    "oracle": dict(source="target"),                       # the target's own labels: the ceiling
    "dacs": dict(mix=1.0, alpha=0.99),                     # Tranheden et al., WACV 2021
    "daformer": DAFORMER,                                  # Hoyer et al., CVPR 2022
    "mic": DAFORMER | dict(mask=1.0),                      # Hoyer et al., CVPR 2023
    # ours: mic and logit adjustment, which gained most over mic on real images (assets/results.md)
    "best": DAFORMER | dict(mask=1.0, logit_adjust=0.25),
    "lcmsm": DAFORMER | dict(mask=1.0, language="lcmsm"),  # Kim et al., Pattern Recognition 2024
    "cluda": DAFORMER | dict(cluda=0.1),                   # Vayyat et al., 2022, one resolution
    # several resolutions: --crop is that of the context, at the images' full size
    "hrda": DAFORMER | dict(detail=0.5),                   # Hoyer et al., ECCV 2022
    "mic_hrda": DAFORMER | dict(mask=1.0, detail=0.5),     # Hoyer et al., CVPR 2023
    "cluda_hrda": DAFORMER | dict(cluda=0.1, detail=0.5),  # learned weighting, as rebuilt
    # our reconstruction: the code of LC-MSM at several resolutions was never released
    "lcmsm_hrda": DAFORMER | dict(mask=1.0, language="lcmsm", detail=0.5),
    # Xie et al., TPAMI 2023. At its published temperature the contrast is nearly inert: the name
    # stands for the published method; with --tau 1 the contrast is felt
    "sepico": dict(mix=1.0, rcs=0.01, sepico=1.0, tau=100.0),
    "t2sda": DAFORMER | dict(t2s=0.1),                     # after T2S-DA, Wang et al., 2023
    # its domain generalisation: no target image at all
    "t2sda_dg": dict(target="none", fd=0.005, rcs=0.01, t2s=0.1, restyled=1.0),
    # after SemiDAViL, Basak and Yin, CVPR 2025, as reconstructed; dyce=1.0, not the 0.2 of its
    # first code, with which no pseudo-label ever becomes confident
    "semidavil": dict(consistency=1.0, dyce=1.0, threshold=0.95, language="dlg"),
    "all": DAFORMER | dict(mask=1.0, language="dlg", cluda=0.1, t2s=0.1),
}

# The feature distance holds on to what ImageNet knows of these classes (DAFormer).
THINGS = {"traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train",
          "motorcycle", "bicycle", "SignSymbol", "Pedestrian", "Car", "Bicyclist"}

# Flags that a resumed run may change: none of them changes what is learned (--skip-bad does where
# images have been lost or repaired since, which is noted).
FREE_ON_RESUME = {"recipe", "stop_at", "out", "eval_every", "save_every", "log_every", "workers",
                  "cache", "skip_bad", "device"}
# Flags that say where something lies. Another place is free if the same lies there.
PLACES = ("source", "target", "val", "classes", "labeled", "init", "text")


def between(least, most, kind=float):
    """An argparse type: a number from least to most."""
    def number(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be from {least:g} to {most:g}")
        return value
    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


count = between(1, 10**9, int)
count_or_0 = between(0, 10**9, int)
factor = between(0, 1000)  # of a loss or a learning rate
share = between(0, 1)
switch = argparse.BooleanOptionalAction


def backbone(text):
    """An argparse type: a name that model.py can build."""
    try:
        return model.check_backbone(text)
    except (ValueError, ImportError) as error:
        raise argparse.ArgumentTypeError(error) from None


def device_name(text):
    """An argparse type: the name of a device that is there, as log and checkpoint keep it."""
    evaluation.device(text)
    return text


class Help(argparse.RawDescriptionHelpFormatter):
    """Each flag with its default, which is that of the recipe."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=27, width=118)

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or "default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"


def build_parser():
    """The parser of train.py's flags; a recipe's values become its defaults in parse_flags."""
    usage = "train.py [--recipe NAME] [flags]   (-h explains them)"
    p = data.Parser("train.py", usage, __doc__, formatter_class=Help, allow_abbrev=False)

    a = p.add_argument_group("data (SPEC: see python data.py -h)").add_argument
    a("--recipe", default="best", choices=RECIPES, metavar="NAME",
      help=f"a named set of values for the flags below, see README: {', '.join(RECIPES)}")
    a("--source", default="streets", nargs="+", metavar="SPEC",
      help="labelled data, several are pooled; 'target': the target's own labels, 'none': only "
           "those of --labeled")
    a("--target", nargs="+", metavar="SPEC",
      help="data to adapt to, several are pooled, or none (default: streets:night, unless --source "
           "has data of yours)")
    a("--labeled", default="0", metavar="N",
      help="target images whose labels are used: N, all, or a file with one image name a line")
    a("--val", nargs="+", metavar="SPEC",
      help="labelled validation data, or none (default: the target's val split)")
    a("--skip-bad", type=count_or_0, default=0, metavar="N",
      help="leave out up to N images that are unreadable or have a label of another size")
    a("--classes", metavar="C",
      help="cityscapes19, cityscapes16, camvid11, or a file with one name a line (default: the "
           "names of the first source's IDS where it has one, camvid11 for --target streets:night, "
           "else cityscapes19)")
    a("--size", type=data.parse_size, metavar="WxH",
      help="pixels to which every image is resized (default: the data set's published size, own "
           "images as they are)")
    a("--crop", type=between(1, 10**5, int), default=128, metavar="S",
      help="side of the training crop, pixels; published: 512, with --detail 1024")
    a("--detail", type=share, default=0.0, metavar="SHARE",
      help="several resolutions: the crop is seen at half its size, and a square of this share of "
           "its side at full size; published: 0.5; 0: one resolution")
    a("--batch", type=between(1, 10**5, int), default=4, metavar="N",
      help="images per process of source, of target, and of labelled target; published: 2")
    a("--cache", metavar="DIR",
      help="folder of decoded images (default: ~/.cache/nanouda, and there only sets below 2 GiB)")
    a("--workers", type=between(0, 1000, int), default=0, metavar="N",
      help="loader processes per domain; 0 is right where data are cached")
    a("--augment-source", action=switch, default=True,
      help="jitter and blur source images; published: so in SePiCo and SemiDAViL, otherwise not, "
           "but source-only and oracle distort colours in another way")

    a = p.add_argument_group("network").add_argument
    a("--backbone", type=backbone, default="timm:tf_efficientnet_lite0", metavar="B",
      help="timm:NAME or mit_b0..mit_b5")
    a("--decoder", default="segformer", choices=model.FUSIONS, metavar="D",
      help="segformer, or daformer, the published one, slow on a CPU")
    a("--channels", type=between(1, 10**5, int), default=128, metavar="N",
      help="width of the decoder; published: 256")
    a("--init", default="imagenet", metavar="W",
      help="weights to start from: imagenet (or hub, the same: for EfficientNet-Lite0 from an "
           "installed package, else from the network), FILE of a backbone, a .pt of train.py, or "
           "none: random")
    a("--language", choices=("lcmsm", "dlg"), metavar="L",
      help="lcmsm: a second decoder reads text; dlg: text guides the decoder (default: neither)")
    a("--text", default="auto", metavar="T",
      help="class vectors: FILE.npz, clip:MODEL/TAG, stub (of no language), learned, none, "
           "shuffled:FILE; auto: a cached bank, else stub")

    p.method = p.add_argument_group("method (a loss of weight 0 is off)")
    a = p.method.add_argument
    a("--mix", type=factor, default=0.0, metavar="X",
      help="weight of self-training on ClassMix images")
    a("--mask", type=factor, default=0.0, metavar="X",
      help="weight of the consistency of masked images (MIC)")
    a("--mask-block", type=between(1, 10**5, int), metavar="S",
      help="side of a masked block, pixels (default: 32 from crops of 512 on, else 16; with "
           "--detail a 16th of the crop)")
    a("--mask-ratio", type=share, default=0.7, metavar="R", help="share of blocks that are masked")
    a("--fd", type=factor, default=0.0, metavar="X",
      help="weight of the distance to ImageNet features on things; needs --init imagenet or FILE")
    a("--rcs", type=factor, default=0.0, metavar="T",
      help="temperature of rare-class sampling; 0 draws images uniformly")
    a("--threshold", type=share, default=0.968, metavar="P",
      help="confidence from which the teacher is believed: --mix and --mask weigh all pixels by "
           "the share of such pixels, --consistency takes these alone")
    a("--border", type=between(0, 10**5, int), nargs=2, default=(0, 0), metavar=("TOP", "BOTTOM"),
      help="pixel rows of a target crop without pseudo-labels; GTA5 or SYNTHIA -> Cityscapes: "
           "15 120, the hood of the car")
    a("--alpha", type=share, metavar="A",
      help="EMA decay of the teacher (default: 0.999 from 10,000 steps on, else 0.99)")
    a("--consistency", type=factor, default=0.0, metavar="X",
      help="weight of SemiDAViL's consistency: confident target pixels of the ClassMix image")
    a("--dyce", type=share, default=0.0, metavar="H",
      help="supervised loss balanced by class, on this share of the hardest pixels; 0: plain mean")
    a("--logit-adjust", type=between(0, 10), default=0.0, metavar="TAU",
      help="in all losses on labels and pseudo-labels but that of --consistency, add TAU * "
           "log(share of the pixels) of each class to the logits, so that rare classes are "
           "predicted more often; 0: off")
    a("--cluda", type=factor, default=0.0, metavar="X",
      help="weight of CLUDA's contrast among source and among mixed cells; beside --t2s from the "
           "end of --warmup on, as that itself")
    a("--gate", choices=("learned", "half"), metavar="G",
      help="what weighs --cluda's contrast with cells of the context against that with cells of "
           "the detail: learned, or half of each, its control (default: learned)")
    a("--sepico", type=factor, default=0.0, metavar="X",
      help="weight of SePiCo's contrast of source and target cells with Gaussians of the source "
           "classes, from step 3/40 of --steps on")
    a("--t2s", type=factor, default=0.0, metavar="X",
      help="weight of T2S-DA's pull of restyled source cells to clean ones")
    a("--restyled", type=factor, default=0.0, metavar="X",
      help="weight of the cross-entropy on the restyled images of --t2s")
    a("--tau", type=between(1e-3, 1e3), default=0.1, metavar="T",
      help="temperature, one for all contrasts; published: 100 for SePiCo, 1 for CLUDA")
    a("--control", action=switch, default=False,
      help="for ablations: compute all that a contrast needs, but give it no weight")

    a = p.add_argument_group("optimisation").add_argument
    a("--steps", type=count, default=1000, metavar="N",
      help="length of the schedule; published: 40,000")
    a("--source-steps", type=count_or_0, metavar="N",
      help="the source phase: the first N of --steps learn from true labels alone, with a schedule "
           "of their own; what adaptation then gains over that is shown at the end (default: a "
           "third of --steps in a run that adapts, 0 from 10,000 steps on, as published)")
    a("--stop-at", type=count, metavar="N",
      help="save and stop after this step of the schedule (default: --steps)")
    a("--warmup", type=count_or_0, metavar="N",
      help="steps of linear warm-up, of the source phase and of the rest (default: 1500, at most "
           "--steps / 20 and half of the shorter one)")
    a("--lr", type=between(0, 10), metavar="X",
      help="peak learning rate of the backbone (default: 6e-5 from 10,000 steps on, published, "
           "else 1e-3)")
    a("--head-lr", type=factor, metavar="X",
      help="the decoder's learning rate over the backbone's (default: 10 from 10,000 steps on, "
           "published, else 1)")
    a("--accum", type=between(1, 10**4, int), default=1, metavar="N",
      help="batches per optimiser step, for small memory; each is a batch of its own to ClassMix, "
           "to pseudo-labels' weight and to losses that divide by what they count")
    a("--seed", type=between(0, 2**31, int), default=0, metavar="N",
      help="every random draw is a function of it, the step and the sample")
    a("--compile", action=switch, default=False,
      help="torch.compile the network: minutes at first, pays on a GPU")
    a("--checkpointing", action=switch, default=False,
      help="compute activations twice, for small memory; BatchNorm in a timm backbone then counts "
           "each batch twice")
    a("--dtype", default="auto", choices=("auto", "bf16", "fp32"), metavar="D",
      help="bf16, fp32, or auto: bf16 on a GPU that has it, else fp32 (default: auto)")

    a = p.add_argument_group("run").add_argument
    a("--device", type=device_name, metavar="D",
      help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    a("--out", default="out", metavar="DIR", help="folder of checkpoints, log and pictures")
    a("--eval-every", type=count_or_0, default=0, metavar="N",
      help="validate every N steps, and keep the best network as OUT/best.pt: of the source phase "
           "the best student, of adaptation the best teacher; 0: only after the last one")
    a("--slide", action=switch, default=False,
      help="validate with half-overlapping windows of the crop's size")
    a("--save-every", type=count, default=500, metavar="N",
      help="write OUT/last.pt and a picture every N steps")
    a("--log-every", type=count, default=50, metavar="N",
      help="a line in OUT/log.jsonl every N steps")
    return p


def parse_flags(argv=None):
    """The flags of a run: defaults, then the recipe's values, then what was typed.

    Flags without a default are filled in. `saved` is the dict of flags that log and checkpoint
    keep. Exits with status 2 on flags that contradict each other.
    """
    parser = build_parser()
    # the recipe is read first: its values are the defaults of all other flags
    first = data.Parser("train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=parser.get_default("recipe"))
    recipe = first.parse_known_args(argv)[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    f = parser.parse_args(argv)
    for name in ("source", "target", "val"):
        setattr(f, name, one_or_several(getattr(f, name), name, parser))

    # as typed, before it is filled in
    typed = list(sys.argv[1:] if argv is None else argv)
    all_labels = f.source == "target"
    asked_val = f.val
    own_ids = f.classes  # say what own masks without IDS mean

    settle_data(f, parser)
    settle_training(f)

    # every flag of the parser, filled in: what a resumed run has to repeat
    saved = dict(vars(f))
    for name, value in saved.items():
        if isinstance(value, tuple):
            saved[name] = list(value)  # as JSON has it

    # what follows from the flags, and how they were typed: not saved
    f.saved = saved
    f.typed = typed
    f.asked_val = asked_val
    f.own_ids = own_ids
    f.class_names = data.class_names(f.classes or data.default_classes(first_labelled(f)))
    f.lcmsm = f.language == "lcmsm"
    f.contrasts = bool(f.cluda or f.sepico or f.t2s)
    f.adapts = evaluation.adapts(vars(f))
    f.doubt_power = 0.0 if f.dyce else 0.5  # of T2S-DA's class weights; DyCE weighs classes already
    f.detail_side = detail_side(f, parser)

    for message, wrong in contradictions(f, parser.get_default, all_labels).items():
        if wrong:
            parser.error(message)
    return f


def detail_side(f, parser):
    """Side of the detail crop, pixels, 0 at one resolution. Exits where it does not fit."""
    side = round(f.detail * f.crop)
    if not f.detail:
        return 0
    if f.crop % 16 or side % 16 or not side:
        parser.error(f"--detail {f.detail:g}: --crop, {f.crop}, and its share, {side} pixels, must "
                     "be multiples of 16")
    if f.mask and f.mask_block > side / 4:
        parser.error(f"--mask-block {f.mask_block}: with --detail at most a quarter of the detail "
                     f"crop's {side} pixels: larger blocks can hide all that it shows")
    return side


def flags_at(f, step):
    """The flags of a step: in the first --source-steps without what needs target images.

    So a term that reads the view "mix" or "mask" asks whether it is there. What needs source images
    alone, contrasts too, is on in both phases.
    """
    if step >= f.source_steps:
        return f
    f = copy.copy(f)
    f.adapts = False
    f.mix = 0.0
    f.consistency = 0.0
    if not f.lcmsm:  # which masks source images too
        f.mask = 0.0
    return f


def phase_at(f, step):
    """First step and length of what a step belongs to, the source phase or the rest of the run."""
    if step < f.source_steps:
        return 0, f.source_steps
    return f.source_steps, f.steps - f.source_steps


def shorter_phase(f):
    """Length of the source phase or of the rest, whichever is shorter; of a run without, all."""
    return min(f.source_steps or f.steps, f.steps - f.source_steps)


def settle_training(f):
    """Fill in what follows from --steps, --crop and the method; after settle_data()."""
    # published: long runs from ImageNet weights on large crops
    long = f.steps >= 10_000
    if f.alpha is None:
        f.alpha = 0.999 if long else 0.99
    if f.source_steps is None:
        # a teacher that has learned next to nothing yet would mislead a short run
        f.source_steps = f.steps // 3 if evaluation.adapts(vars(f)) and not long else 0
    if f.warmup is None:
        f.warmup = min(1500, f.steps // 20, max(0, shorter_phase(f)) // 2)
    if f.lr is None:
        f.lr = 6e-5 if long else 1e-3
    if f.head_lr is None:
        f.head_lr = 10.0 if long else 1.0
    if f.init == "hub":  # another name of it
        f.init = "imagenet"
    if f.mask_block is None:
        f.mask_block = 32 if f.crop >= 512 else 16
        if f.detail:
            f.mask_block = f.crop // 16
    if f.gate is None and f.cluda and f.detail:
        f.gate = "learned"
    if f.stop_at is None:
        f.stop_at = f.steps


def settle_data(f, parser):
    """Fill in --target, --val and --classes."""
    if f.labeled.isdecimal():
        f.labeled = str(int(f.labeled))  # 00 is 0
    if f.target is None:
        if not set(data.specs(f.source)) <= {"target", "none", *data.STREETS}:
            parser.error(f"--source {words(f.source)} has no --target: give images to adapt to, or "
                         "--target none with --recipe source (the default is rendered streets)")
        f.target = "streets:night"
    if f.source == "target":
        f.source = f.target
    if f.val is None:
        f.val = f.target
    if f.classes is None:
        f.classes = usual_classes(f)


def one_or_several(value, name, parser):
    """A SPEC, str, or a list of several. Exits where "none" or "target" is one of several."""
    if not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0]
    for word in ("none", "target"):
        if word in value:
            parser.error(f"--{name} {' '.join(value)}: {word} stands alone")
    return value


def words(value):
    """The SPECs of --source, --target or --val as they were typed."""
    return " ".join(data.specs(value))


def first_labelled(f):
    """The SPEC whose names are the classes: the first of --source, without one of --target."""
    return data.specs(f.target if f.source == "none" else f.source)[0]


def usual_classes(f):
    """cityscapes19, None where the first labelled SPEC has names of its own, camvid11 at night."""
    first = first_labelled(f)
    if first != "none":
        usual = data.default_classes(first)
        if usual and not isinstance(usual, str):
            return None
    if f.target == "streets:night":
        # minutes of training do not reach the rare ones among Cityscapes' 19 classes
        return "camvid11"
    return "cityscapes19"


def contradictions(f, default, all_labels):
    """{message: whether it holds} of flags that mislead: that cannot be together, or do nothing."""
    def changed(name):
        return getattr(f, name) != default(name)

    blocks_typed = any(word.partition("=")[0] == "--mask-block" for word in f.typed)
    no_source = f.source == "none"
    no_target = f.target == "none"
    return {
        "--stop-at comes after --steps": f.stop_at > f.steps,
        "--source-steps does nothing without a target to adapt to":
            f.source_steps and not f.adapts,
        "--source-steps leaves none of --steps to adapt in": f.source_steps >= f.steps,
        "--source target takes its labels from --target, which is none": all_labels and no_target,
        "--recipe oracle learns from the labels of --target: leave out --source, or use another "
        "recipe": f.recipe == "oracle" and f.source != f.target,
        "--source none leaves no label to learn from: add --labeled N":
            no_source and f.labeled == "0",
        "--source target, as in oracle, takes all labels; --source none --labeled N takes some":
            all_labels and f.labeled != "0",
        "--target none has no image for --labeled": no_target and f.labeled != "0",
        "--target none leaves nothing to adapt to: use --recipe source, or give a target":
            no_target and f.adapts,
        "--recipe t2sda_dg generalises without a target: use --recipe t2sda, or --target none":
            f.recipe == "t2sda_dg" and not no_target,
        "--language lcmsm learns from masked images: give --mask a weight": f.lcmsm and not f.mask,
        "--language lcmsm masks the ClassMix image: give --mix a weight":
            f.lcmsm and not f.mix and not f.consistency,
        "--t2s begins after --warmup, which is as long as the run": f.t2s and f.warmup >= f.steps,
        "--dyce and --logit-adjust, which recipe best has, both balance the classes: give one of "
        "them 0": f.logit_adjust and f.dyce,
        "--text does nothing without --language": f.text != "auto" and not f.language,
        "--restyled does nothing without --t2s": f.restyled and not f.t2s,
        "--control does nothing without --cluda, --sepico or --t2s": f.control and not f.contrasts,
        "--tau does nothing without --cluda, --sepico or --t2s": changed("tau") and not f.contrasts,
        "--gate does nothing without --cluda and --detail":
            f.gate and not (f.cluda and f.detail),
        "--mask-ratio does nothing without --mask": changed("mask_ratio") and not f.mask,
        "--mask-block does nothing without --mask": blocks_typed and not f.mask,
        "--border does nothing without a target to adapt to": any(f.border) and not f.adapts,
        "--border leaves no row of --crop a pseudo-label: give smaller numbers, or a larger crop":
            f.adapts and sum(f.border) >= f.crop,
        "--threshold does nothing without --mix, --mask or --consistency":
            changed("threshold") and not (f.mix or f.mask or f.consistency),
        "--eval-every needs validation data: --val SPEC": f.eval_every and f.val == "none",
    }


# -------------------------------------------------------------------------------------------------
# The method. A step has three acts: views, one pass of the student for each, terms. That is
# step_terms; what it calls follows, from the top down

# What the student looks at and what it should say there. image: float (B,3,S,S) in [0,1]; label:
# uint8 (B,S,S), 255 is ignored; weight of each pixel's loss: float (B,S,S), None where all are 1.
# A target comes without a label; its weight is bool then, False on padding. corner: (top, left) of
# the part that the student also sees at full size, None at one resolution.
View = namedtuple("View", "image label weight corner", defaults=(None, None))

# student, perhaps inside DDP's wrapper, and its frozen companions: the EMA teacher, and a copy with
# ImageNet weights or None; running statistics of the contrasts, by class; with --logit-adjust the
# ClassShares of each view that teaches by its labels.
Networks = namedtuple("Networks", "student teacher imagenet class_confidence gaussians shares",
                      defaults=(None,))

# Views that other decoders than the plain one look at: the one with text, or none at all.
HEADS = {"mask_source": "language", "mask_mix": "language", "jittered": None}

# Where random numbers come from: a CPU generator for the joint batch; shard = (rank, processes).
# Functions of data.py take both as their last arguments, *draw.
Draws = namedtuple("Draws", "generator shard")


def loss_weights(f):
    """Weight of the loss of each view that teaches by its labels, {name: float}, but the source."""
    return {
        "mix": f.mix,
        "mask": f.mask,
        "mask_source": f.mask,
        "mask_mix": f.mask,
        "restyled": f.restyled,
    }


def step_terms(f, step, nets, source, labeled, target, things, draw, clock):
    """The losses of one batch, {name: 0-d tensor}, and the views they are of, {name: View}.

    f: the flags of this step, see flags_at. source: View. labeled: View of target images with true
    labels, or None. target: View without a label, or None. things: classes of the feature distance,
    int (n,). The views are for a picture: "target" is as the teacher sees it.
    """
    # 1. views; the teacher speaks first
    valid = None
    if f.adapts:
        target, confidence, valid = pseudo_label(f, nets.teacher, target)
        clock("teacher")
    views, pasted = make_views(f, nets.teacher, source, labeled, target, valid, draw)
    clock("views")

    # 2. one pass of the student for each
    outs = {}
    for name, view in views.items():
        head = HEADS.get(name, "plain")
        outs[name] = nets.student(view.image, head=head, corner=view.corner)
        clock(name)

    # 3. terms: the supervised loss, on source and labelled target
    terms = {}
    known, known_out = true_labels(views, outs)
    loss = cross_entropy
    if f.dyce:
        loss = functools.partial(losses.dyce, hardest=f.dyce)
    loss = adjusted(loss, f, nets, "source", known.label)
    terms["source"] = supervise(loss, known_out, known.label)

    # stay near to ImageNet's features of things (DAFormer)
    if nets.imagenet:
        with torch.no_grad():
            reference = nets.imagenet(known.image, head=None).pyramid[-1]
        label = data.majority_label(known.label, reference.shape[2:], nets.teacher.num_classes)
        features = known_out.pyramid[-1]
        terms["fd"] = f.fd * losses.feature_distance(features, reference, label, things)

    terms |= taught_terms(f, nets, views, outs, valid, pasted)

    # pixels of the ClassMix image that stay the target's, each trusted for itself (SemiDAViL)
    if f.consistency:
        trusted = confidence >= f.threshold
        stays = valid & ~pasted
        value = supervise(losses.consistency, outs["mix"], target.label, trusted, stays)
        terms["consistency"] = f.consistency * value

    clock("losses")
    if f.contrasts:
        said = None
        if f.adapts:
            said = (torch.where(valid, target.label, data.IGNORE), confidence)
        terms |= contrast_terms(f, step, nets, source, known, known_out, views, outs, said)
        clock("contrast")
    if f.adapts:
        views["target"] = target
    return terms, views


@torch.no_grad()
def pseudo_label(f, teacher, target):
    """What the teacher says of the target: a View, its confidence, float (B,S,S) in [0,1], and the
    valid pixels, bool (B,S,S).

    Every pixel gets the same weight, the share of confident pixels in the joint batch (DACS). Those
    on padding and in the rows of --border are not valid and get 0.
    """
    size = target.image.shape[2:]
    head = "language" if f.lcmsm else "plain"
    logits = teacher(target.image, head=head).logits  # no corner: details cover all of it
    label, confidence, share = model.upsample_pseudo_label(logits, size, f.threshold)

    top, bottom = f.border
    valid = target.weight.clone()  # bool (B,S,S), False on padding
    valid[:, :top] = False
    valid[:, max(0, size[0] - bottom):] = False
    weight = mean_over_ranks(share) * valid
    return View(target.image, label, weight), confidence, valid


def make_views(f, net, source, labeled, target, valid, draw):
    """All that the student sees in a step, {name: View}, and where ClassMix pasted, bool (B,S,S).

    Those of these that the flags ask for: "source" and "labeled", which have true labels; "mix",
    the ClassMix image; "mask", "mask_source" and "mask_mix", with hidden blocks; "restyled", the
    source in another look; "jittered", the augmented target.

    net: a Segmenter, for its constants. target, valid: as the teacher sees it, and its valid
    pixels; or None.
    """
    source = look_closely(source, f, draw)
    views = {"source": source}
    if f.augment_source:
        views["source"] = augment(source, draw)
    donor = source  # whose classes ClassMix pastes
    pasted = None

    # T2S-DA: the source in the look of target images, or in a random one. The order of all draws
    # below is part of a run: to move one is to change every number
    if f.t2s:
        looks = target.image if target else None
        restyled = data.restyle(source.image, looks, *draw)

    # target images with true labels. With a teacher they get a pass of their own, because its
    # BatchNorm sees the target alone too; without one they join the source's
    if labeled:
        donor = either(source, labeled, draw)
        labeled = labeled._replace(corner=source.corner)  # one loss for both
        views["labeled"] = labeled
        if f.augment_source:
            views["labeled"] = augment(labeled, draw)
        if not f.adapts:
            views["source"] = join([views["source"], views.pop("labeled")])

    # ClassMix: half of the donor's classes, with their pixels, pasted onto the target (DACS)
    if f.mix or f.consistency:
        present = data.present_classes(donor.label, net.num_classes).float()
        present = mean_over_ranks(present) > 0  # (K,), in the joint batch
        image, label, weight, pasted = data.class_mix(
            donor.image, donor.label, target.image, target.label, target.weight, present, *draw)
        mixed = look_closely(View(image, label, weight), f, draw)
        views["mix"] = augment(mixed, draw, each=True)
        pasted = pasted[:, 0]  # (B,1,S,S) -> (B,S,S)

    # MIC: hide blocks of the target; what is there has to follow from what surrounds them.
    # LC-MSM hides blocks of the source and of the augmented ClassMix image, and text helps out
    mean = net.pixel_mean
    if f.mask and f.lcmsm:
        views["mask_source"] = hide(source, f, mean, draw)
        if "mix" in views:
            views["mask_mix"] = hide(views["mix"], f, mean, draw)
    elif f.mask:
        views["mask"] = hide(target, f, mean, draw)

    if f.t2s:
        views["restyled"] = look_closely(View(restyled, source.label), f, draw)

    # SePiCo: the augmented target with its pseudo-labels, which all count alike, also in a batch in
    # which none is confident
    if f.sepico and target:
        label = torch.where(valid, target.label, data.IGNORE)
        views["jittered"] = augment(View(target.image, label), draw)
    return views, pasted


def augment(view, draw, each=False):
    """The view with colour jitter and blur; each: all draws but whether to are each image's own."""
    return view._replace(image=data.strong_augment(view.image, *draw, each))


def look_closely(view, f, draw):
    """The view with a detail crop of its own, where there are several resolutions (HRDA)."""
    return view._replace(corner=data.detail_corner(f.crop, f.detail_side, draw.generator))


def hide(view, f, mean, draw):
    """The view augmented, with --mask-ratio of its blocks painted in the mean colour (MIC).

    Its detail crop, if there is one, is another than the view's, and not all of it is hidden.
    """
    view = look_closely(view, f, draw)
    size = view.image.shape[2:]
    keep = data.block_mask(len(view.image), size, f.mask_block, f.mask_ratio, *draw, view.corner,
                           f.detail_side)  # (B,1,S,S)
    keep = keep.to(view.image, non_blocking=True)
    view = augment(view, draw)
    return view._replace(image=view.image * keep + mean * (1 - keep))


def either(a, b, draw):
    """Each sample from one of two views, at random."""
    second = data.uniform((len(a.image), 1, 1), *draw) < 0.5  # (B,1,1)
    second = second.to(a.image.device, non_blocking=True)
    image = torch.where(second[:, None], b.image, a.image)
    return View(image, torch.where(second, b.label, a.label))


def join(views):
    """Several views as one, concatenated along the batch; their weights are left out.

    A detail crop is at one corner in all of them.
    """
    images = [view.image for view in views]
    labels = [view.label for view in views]
    return View(torch.cat(images), torch.cat(labels), corner=views[0].corner)


def true_labels(views, outs):
    """The views with true labels as one View, and the student's Output for it."""
    names = [name for name in ("source", "labeled") if name in views]
    view = join([views[name] for name in names])
    return view, model.joined([outs[name] for name in names])


def taught_terms(f, nets, views, outs, valid, pasted):
    """The losses of all other views that teach by their labels, {name: 0-d tensor}.

    valid, pasted: bool (B,S,S) or None, as pseudo_label and make_views give them.
    """
    # --logit-adjust does not count what the teacher says of padding and of --border
    counted = {"mask": valid}
    if pasted is not None:
        counted["mix"] = counted["mask_mix"] = valid | pasted

    terms = {}
    for name, loss_weight in loss_weights(f).items():
        if name in views and loss_weight:
            view = views[name]
            loss = adjusted(cross_entropy, f, nets, name, view.label, counted.get(name))
            value = supervise(loss, outs[name], view.label, view.weight)
            terms[name] = loss_weight * value
    return terms


def adjusted(loss, f, nets, name, label, counted=None):
    """The loss, as a function of logits to which --logit-adjust has been added.

    name, label: of the view that it is of. counted: its pixels whose labels count for the shares,
    bool (B,S,S); None: all.
    """
    if not f.logit_adjust:
        return loss
    if counted is not None:
        label = torch.where(counted, label, data.IGNORE)
    shares = nets.shares[name]
    shares.update(label)
    offset = shares.offset(f.logit_adjust)[:, None, None]  # (K,1,1) against (B,K,h,w)
    return lambda logits, *maps: loss(logits.float() + offset, *maps)


def supervise(loss, out, *maps):
    """The loss of a pass, 0-d; at several resolutions 0.9 of it on the fused logits and 0.1 on
    those of the detail crop alone (HRDA).

    loss: called with logits and maps; maps: labels, weights, each (B,S,S) or None.
    """
    value = loss(out.logits, *maps)
    if out.detail is None:
        return value
    crops = []
    for full in maps:
        crops.append(None if full is None else full[out.window])  # (B,S,S) -> (B,D,D)
    return 0.9 * value + 0.1 * loss(out.detail.logits, *crops)


def contrast_terms(f, step, nets, source, known, known_out, views, outs, said):
    """The contrasts, {name: 0-d tensor}, on what the passes have seen.

    Never on masked views, where a hidden cell shows nothing of its class. source: before jitter and
    blur. known, known_out: see true_labels. said: the teacher's labels of the target and their
    confidence, or None. "gate" is no loss but a number to watch, without a gradient.
    """
    # out of DDP's wrapper: projections and gate are not in forward()
    student = getattr(nets.student, "module", nets.student)
    teacher = nets.teacher
    # T2S-DA waits for the end of the warm-up, and CLUDA, where it is beside it, waits with it
    waits = f.t2s and step < f.warmup
    live = float(not waits and not f.control)
    terms = {}

    # where features are to go: the teacher's of the clean source
    if f.t2s or f.sepico:
        with torch.no_grad(), model.frozen_statistics(teacher):
            # one detail crop will do: keys are of the context
            corner = views["source"].corner
            clean = teacher(source.image, head="plain" if f.t2s else None, corner=corner)
            if f.t2s:
                keys, key_label, _ = cells(teacher, clean.features, source)
            if f.sepico:
                nets.gaussians.update(*stage_cells(teacher, clean.pyramid, source))

    # SePiCo contrasts cells of the source and of the target with the source's Gaussians, from step
    # 3,000 of 40,000 on
    if f.sepico:
        rows, label = stage_cells(student, known_out.pyramid, known)
        value = losses.sepico(rows, label, nets.gaussians, f.tau)
        if "jittered" in views:
            rows, label = stage_cells(student, outs["jittered"].pyramid, views["jittered"])
            value = value + losses.sepico(rows, label, nets.gaussians, f.tau)
        started = step >= f.steps * 3 // 40
        terms["sepico"] = float(started and not f.control) * f.sepico * value

    # CLUDA contrasts the cells of the source and of the ClassMix image, each with all others
    if f.cluda:
        passes = [(known_out, known)]
        if "mix" in views:
            passes.append((outs["mix"], views["mix"]))
        found = [contrast_within(f, student, out, view) for out, view in passes]
        terms["cluda"] = live * f.cluda * sum(value for value, _ in found)
        if f.detail:
            terms["gate"] = sum(gate for _, gate in found) / len(found)

    # T2S-DA pulls restyled cells to those of the clean source, while adapting labelled target
    # cells too; classes that the teacher doubts weigh more
    if f.t2s:
        if said is None:  # no target image: the teacher's confidence on the source
            size = source.label.shape[1:]
            label, confidence = model.upsample_pseudo_label(clean.logits, size, threshold=0.0)[:2]
            said = (torch.where(source.label == data.IGNORE, data.IGNORE, label), confidence)
        nets.class_confidence.update(*said)
        class_weight = nets.class_confidence.weights(f.doubt_power)
        names = [name for name in ("restyled", "labeled") if name in views]
        queries = join([views[name] for name in names])
        features = torch.cat([outs[name].features for name in names])
        rows, label, _ = cells(student, features, queries)
        value = losses.t2s(rows, label, keys, key_label, class_weight, f.tau)
        terms["t2s"] = live * f.t2s * value
    return terms


def contrast_within(f, net, out, view):
    """CLUDA's contrast among the cells of one pass, 0-d, and the mean of its gate, 0-d.

    At one resolution there is no gate, None.
    """
    rows, label, weight = cells(net, out.features, view)
    if not f.detail:
        return losses.cluda(rows, label, weight, f.tau), None

    # in cells of 16 x 16 pixels: the grid (B,h,w), and the n x n of them that the detail crop has
    B, *shape = view.label.shape
    h, w = [length // 16 for length in shape]
    n = f.detail_side // 16
    top, left = [first // 16 for first in view.corner]
    window = (slice(None), slice(top, top + n), slice(left, left + n))
    detail = cell_rows(net, out.detail.features, (n, n))

    gate = torch.full((B, n, n), 0.5, device=rows.device)
    if f.gate == "learned":
        # read from the context, without a gradient to it: the gate only weighs
        maps = [level.detach() for level in out.pyramid]
        gate = net.gate(maps)[0].float().sigmoid()
        gate = gate[..., :out.features.shape[2], :out.features.shape[3]]  # without encode()'s rim
        gate = data.cell_means(gate, (h, w))[:, 0][window]  # (B,1,S/8,S/8) -> (B,n,n)
    value = losses.cluda_two(
        rows.view(B, h, w, -1),
        detail.view(B, n, n, -1),
        label.view(B, h, w),
        gate,
        window,
        weight.view(B, h, w),
        f.tau,
    )
    return value, gate.detach().mean()


def cells(net, features, view):
    """The view in cells of 8 x 8 pixels: rows (N,C), label (N,), weight (N,).

    With several resolutions a cell is 16 x 16 pixels, which are 8 x 8 of the context. It is never
    smaller than a cell of the features, which is 16 x 16 in many a ViT: it would be compared with
    copies of itself. Rows: see cell_rows. The label of a cell is the class that covers 75 % of it,
    else 255.
    """
    cell = max(16 if net.detail else 8, net.cell())
    grid = [max(1, side // cell) for side in view.label.shape[1:]]
    label = data.majority_label(view.label, grid, net.num_classes)  # (B,S,S) -> (B,h,w)
    rows = cell_rows(net, features, grid)
    weight = view.weight
    if weight is None:
        weight = torch.ones(view.label.shape, device=label.device)
    weight = data.cell_means(weight[None], grid)[0]  # (B,S,S) -> (1,B,S,S) -> (B,h,w)
    return rows, label.flatten(), weight.flatten()


def stage_cells(net, pyramid, view):
    """The view in cells of the encoder's finest stage, through SePiCo's head.

    -> rows (N,C), label (N,). In all else as cells().
    """
    h, w = [math.ceil(side / net.cell()) for side in view.label.shape[1:]]
    projected = net.stage_projection(pyramid)[..., :h, :w]  # (B,C,h,w), without encode()'s rim
    label = data.majority_label(view.label, projected.shape[2:], net.num_classes)  # (B,h,w)
    rows = unit_rows(projected.permute(0, 2, 3, 1).flatten(0, 2))  # (B,C,h,w) -> (N,C)
    return rows, label.flatten()


def cell_rows(net, features, grid):
    """Features (B,C,h,w) as unit vectors, (N,C), one for each cell of a coarser grid.

    They have gone through the network's projection head, where it has one. Cells come in the order
    image, row, column.
    """
    pooled = data.cell_means(features, grid)  # (B,C,h,w)
    return unit_rows(net.projection(pooled.permute(0, 2, 3, 1).flatten(0, 2)))  # -> (N,C)


def unit_rows(rows):
    """Rows (N,C) as float32 unit vectors; one of zeros stays 0."""
    return F.normalize(rows.float(), dim=1, eps=1e-3)


# -------------------------------------------------------------------------------------------------
# The optimiser


def learning_rate(step, peak, steps, warmup):
    """The rate of a step: linear decay to zero, times a linear warm-up from 1e-6 (DAFormer)."""
    decayed = peak * (1 - step / steps)
    if step >= warmup:
        return decayed
    return decayed * (1 - (1 - step / warmup) * (1 - 1e-6))


def parameter_groups(net, lr, head_lr, decay=0.01):
    """AdamW's groups, each with its "peak" learning rate, as in the DAFormer family.

    The backbone's normalisation has no weight decay; the decoder learns head_lr times as fast.
    """
    norms = set()
    for module in net.backbone.modules():
        if "norm" in type(module).__name__.lower():
            norms |= {id(p) for p in module.parameters(recurse=False)}

    weights, normalisation, text, heads = [], [], [], []
    for name, p in net.named_parameters():
        if id(p) in norms:
            normalisation.append(p)
        elif name.startswith("backbone."):
            weights.append(p)
        elif name.startswith("text."):  # LC-MSM: the backbone's rate
            text.append(p)
        else:
            heads.append(p)
    return [
        dict(params=weights, peak=lr, weight_decay=decay),
        dict(params=normalisation, peak=lr, weight_decay=0.0),
        dict(params=text, peak=lr, weight_decay=decay),
        dict(params=heads, peak=lr * head_lr, weight_decay=decay),
    ]


# -------------------------------------------------------------------------------------------------
# Set-up: processes, data, networks

RANK, WORLD = 0, 1
BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
if BY_TORCHRUN:
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])


def print0(*words):
    """Print on the first process only, around the progress bar, and at once, also into a file."""
    if RANK == 0:
        with data.output():
            tqdm.write(" ".join(str(word) for word in words))


def from_first(value):
    """The first process's value on all of them; it can be pickled."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def from_all(value):
    """The values of all processes, in their order; they can be pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def keep_freed_memory():
    """Let glibc keep the memory that torch frees, instead of giving it back to Linux.

    A step frees and asks for the same large maps again and again, and Linux clears every page that
    it hands out: up to a fifth of the time of a step on a CPU.
    """
    mallopt = None
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: so many free bytes it may hold
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: up to this size a block comes from what it holds


def check_launcher(environment):
    """Say what other launchers than torchrun left in the environment; raise DataError where it
    would be waited for processes that nobody has started."""
    if BY_TORCHRUN:
        return
    left = {}
    for name, alone in (("WORLD_SIZE", "1"), ("RANK", "0")):
        if environment.get(name, alone) != alone:
            left[name] = environment[name]
    if left:
        said = " ".join(f"{name}={value}" for name, value in left.items())
        raise data.DataError(f"{said} is set, but torchrun did not start this process: start it "
                             "with torchrun --nproc-per-node N train.py, or for one process "
                             "unset RANK WORLD_SIZE")

    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if tasks != "1" and environment.get("SLURM_PROCID", "0") == "0":
        print0(f"note: SLURM has {tasks} tasks, but torchrun did not start this process: under "
               "srun each task is a run of its own. One run on N GPUs of each machine: srun "
               "--ntasks-per-node 1 torchrun --nproc-per-node N train.py, on several machines also "
               "--nnodes $SLURM_NNODES --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500")


def pick_device(wanted):
    """The torch.device of this process: --device, else the fastest kind that is there.

    Under torchrun each process gets a GPU of its own. Raises DataError where there are too few.
    """
    if wanted is None:
        wanted = "cpu"
        if torch.backends.mps.is_available():
            wanted = "mps"
        if torch.cuda.is_available():
            wanted = "cuda"
    device = torch.device(wanted)
    if WORLD > 1 and (device.type == "mps" or device.index is not None):
        raise data.DataError(f"--device {wanted} is for one process, and torchrun started {WORLD}; "
                             "start python train.py, or give --device cuda or cpu")
    if wanted == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise data.DataError(f"more processes than the {torch.cuda.device_count()} GPUs of "
                                 "this machine; give a smaller --nproc-per-node")
    return device


def setup(wanted):
    """The device of this process, see pick_device; joins the other processes, if there are any."""
    keep_freed_memory()
    check_launcher(os.environ)
    device = pick_device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if WORLD > 1:
        # a depthwise convolution's gradient may have other strides than DDP's bucket: harmless
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    return device


def pick_dtype(wanted, device):
    """("bf16" or "fp32", why): what --dtype asks for; auto is bf16 on a GPU that has it."""
    if wanted != "auto":
        return wanted, "as asked"
    if device.type != "cuda":
        return "fp32", f"auto on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "auto, this GPU has it"
    return "fp32", "auto, this GPU has no bf16"


# Labelled source or None; target or None; indices of the target's labelled images; validation set
# or None.
Sets = namedtuple("Sets", "source target labeled val")


def open_training_set(f, spec, partial=False):
    """A training split, as far as the names of its files tell."""
    dataset = data.open_dataset(spec, "train", f.class_names, f.size, f.cache, partial, f.own_ids,
                                detail=f.detail > 0)
    if f.cache and not dataset.cached:
        print0(f"note: --cache: {dataset.spec} has no common size and is read from its files each "
               "time; give --size WxH")
    return dataset


def render(dataset, count):
    """Draw the streets of a training split, and with count count their classes.

    On the first process. Files are read by check_sets.
    """
    for part in dataset.parts:
        if RANK == 0 and part.files is None:
            part.prepare()
            if count:
                part.class_counts()


def check_sets(f, datasets):
    """Read all files once, on the first process, before the first step; say what they show.

    datasets: [(data set, whether its labels are used)]. Raises DataError where files cannot be
    used, but up to --skip-bad of them are left out of the data sets.
    """
    parts = []
    for dataset, labels in datasets:
        for part in dataset.parts:
            parts.append((part, labels))
    bad = None
    if RANK == 0:
        bad = data.check_sets(parts, f.skip_bad)
    for note in data.leave_out_bad(parts, from_first(bad)):
        print0("note:", note)
    if RANK == 0:
        for dataset, labels in parts:
            for remark in dataset.remarks(labels, f.crop):
                print0(f"note: {dataset.spec} {dataset.split}: {remark}")
    for dataset, _ in datasets:
        dataset.join()


def check_validation(f, source, target, val):
    """Raise DataError where validation images are trained on, unless --val asks for just that.

    Images whose labels are learned are asked for by the SPEC of their training set, images that are
    adapted to without labels by any --val that is typed.
    """
    trained = [(f.source, source, f.source)]  # (SPEC, data set, the --val that asks for its images)
    if f.labeled != "0" and target.labeled:
        trained.append((f.target, target, f.target))
    elif f.adapts:
        trained.append((f.target, target, f.asked_val or f.val))
    for spec, dataset, wanted in trained:
        both = data.images_in_both(dataset, val) if dataset else []
        if not both:
            continue
        text = (f"--val {words(f.val)}: {len(both)} of its {len(val)} images are images of the "
                f"training set {words(spec)}, such as {both[0]}")
        if f.asked_val != wanted:
            raise data.DataError(f"{text}; give other images, --val none, or --val {words(wanted)} "
                                 "if you want a score on training images")
        print0(f"note: VALIDATION ON TRAINING IMAGES: {text}; the scores say nothing about others")


def check_labels(dataset, f, indices=None):
    """Raise DataError where no pixel of a training set's labels is one of the classes."""
    if not data.shows_classes(dataset, indices):
        raise data.DataError(
            f"{dataset.spec}: no pixel of its labels is one of the {len(dataset.classes)} classes; "
            f"see python data.py {dataset.spec}"
            + (f" --classes {f.classes}" if f.classes else ""))


def open_sets(f):
    """The data of a run, as Sets, as far as names and lists tell. Raises DataError."""
    source = target = val = None
    labeled = []
    if f.source != "none":
        source = open_training_set(f, f.source)
        if not source.labeled:
            raise data.DataError(f"--source {words(f.source)}: has no labels, and a source "
                                 f"needs them{source.no_labels}")
        never = [name for i, name in enumerate(f.class_names) if i not in source.table]
        if never:
            print0(f"note: {words(f.source)} has no label for {', '.join(never)}")
    if f.target != "none":
        target = open_training_set(f, f.target, partial=True)
        both = data.images_in_both(source, target) if source and f.source != f.target else []
        if both:
            print0(f"note: {len(both)} of the {len(target)} target images are also images of the "
                   f"source, such as {both[0]}")
        if source and f.source == f.target and f.adapts:
            print0(f"note: --source and --target are both {words(f.source)}: there is no other "
                   "domain to adapt to")
    if f.val != "none":
        val = data.open_dataset(f.val, "val", f.class_names, f.size, f.cache, ids=f.own_ids,
                                detail=f.detail > 0)
        if not val.labeled:
            raise data.DataError(f"--val {words(f.val)}: has no labels; give a labelled set, or "
                                 f"none{val.no_labels}")
        check_validation(f, source, target, val)
    for dataset in filter(None, (source, target, val)):
        data.keep_out(f"--out {f.out}", f.out, dataset)
    if f.labeled != "0":
        labeled = data.labeled_indices(target, f.labeled)
    return Sets(source, target, labeled, val)


def read_sets(f, sets):
    """Render or read all the data of a run, which takes minutes the first time -> Sets, without
    what --skip-bad leaves out. Raises DataError.
    """
    source, target, labeled, val = sets
    counted = source or target  # for --rcs
    used = []  # (data set, whether its labels are used)
    for dataset, labels in ((source, True), (target, f.labeled != "0")):
        if dataset:
            render(dataset, count=f.rcs > 0 and dataset is counted)
            used.append((dataset, labels))
    if val:
        used.append((val, True))
    check_sets(f, used)

    if f.labeled != "0":
        labeled = data.labeled_indices(target, f.labeled)
    if source:
        check_labels(source, f)
    if labeled:
        check_labels(target, f, labeled)
    return sets._replace(labeled=labeled)


def leave_signals_to_the_run(_):
    """Loader processes ignore a launcher's signals: the run needs them until its step has ended."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Stream:
    """Batches of random crops of a data set, or of a subset of its indices.

    Sample k of a run is the same whatever the number of processes. With labels=False the data set's
    own labels are not read.
    """

    def __init__(self, dataset, f, rare=None, labels=True, subset=None):
        self.dataset = dataset
        self.f = f
        self.labels = labels
        self.crops = data.Crops(dataset, f.crop, f.seed, rare, labels=labels, subset=subset)

    def batch_keys(self, batch):
        """The samples of this process in a batch, counted from the start of the run."""
        first = (batch * WORLD + RANK) * self.f.batch
        return list(range(first, first + self.f.batch))

    def files(self, step):
        """Names of the images of this process in a step."""
        keys = []
        for part in range(self.f.accum):
            keys += self.batch_keys(step * self.f.accum + part)
        return [self.dataset.names[self.crops[key]["index"]] for key in keys]

    def views(self, start, device):
        """Yields a View a batch, on the device, from step `start` on.

        Without labels its label is None, and its weight bool (B,S,S), False on padding.
        """
        batches = range(start * self.f.accum, self.f.steps * self.f.accum)
        loader = torch.utils.data.DataLoader(
            self.crops,
            batch_sampler=[self.batch_keys(batch) for batch in batches],
            num_workers=self.f.workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals_to_the_run,
        )
        for batch in loader:
            image = batch["image"].to(device, non_blocking=True).float() / 255
            if self.labels:
                yield View(image, batch["label"].to(device, non_blocking=True))
            else:
                yield View(image, None, batch["inside"].to(device, non_blocking=True))


def open_streams(f, sets):
    """{name: Stream} of "source", "labeled" and "target", those of which steps take batches.

    Without a source the labelled target images stand in its place.
    """
    known = sets.source or sets.target
    subset = None if sets.source else sets.labeled
    rare = None
    if f.rcs:
        counts = known.class_counts(f.crop)
        if subset:
            counts = counts[subset]
        rare = data.RareClassSampler(counts, f.rcs, data.rare_pixels(f.crop))

    streams = {"source": Stream(known, f, rare, subset=subset)}
    if sets.source and sets.labeled:
        streams["labeled"] = Stream(sets.target, f, subset=sets.labeled)
    if f.adapts:
        others = sorted(set(range(len(sets.target))) - set(sets.labeled))
        if not sets.labeled or not others:  # all images, where none or all of them have labels
            others = None
        streams["target"] = Stream(sets.target, f, labels=False, subset=others)
    return streams


def open_bank(f, checkpoint):
    """The text bank of a run, or None.

    A resumed run has that of its checkpoint, even if the file of --text has changed. Else the first
    process makes or reads it, and sends it to the others.
    """
    if checkpoint:
        return model.checkpoint_bank(checkpoint)
    if not f.language:
        return None
    bank = None
    if RANK == 0:
        bank = model.text_bank(f.text, f.class_names)
    return from_first(bank)


def load_ours(student, classes, path):
    """Weights of one of our checkpoints into a student; those of a class go by its name."""
    checkpoint = model.load_checkpoint(path)
    before = checkpoint["classes"]
    state = model.fit_heads(checkpoint["student"], student, before, classes)
    model.load_weights(student, state, path)
    fresh = [name for name in classes if name not in before]
    note = ""
    if fresh:
        note = f"; random weights for {', '.join(fresh)}"
    print0(f"--init {path}: {len(classes) - len(fresh)} of {len(classes)} classes matched by "
           f"name{note}")


def open_networks(f, classes, bank, device, checkpoint=None):
    """Networks with fresh or pretrained weights; the student is not yet wrapped by DDP.

    checkpoint: of a run that goes on. Its weights replace the student's and the teacher's, so that
    --init, which may be gone, is read for the feature distance alone.
    """
    torch.manual_seed(f.seed)
    reads_init = checkpoint is None or checkpoint.get("imagenet", f.init != "none")
    timm_imagenet = reads_init and f.init == "imagenet" and f.backbone.startswith("timm:")
    ours = reads_init and f.init.endswith(".pt") and model.is_checkpoint(f.init)
    student = model.Segmenter(
        f.backbone,
        f.decoder,
        len(classes),
        f.channels,
        f.language,
        bank,
        pretrained=timm_imagenet,
        projection=bool(f.t2s),  # CLUDA contrasts the features themselves
        stages=bool(f.sepico),
        detail=f.detail_side,
        gate=f.gate == "learned",
    )
    if f.cluda and f.detail and student.cell() > 16:
        raise model.WeightsError(f"--cluda with --detail compares cells of 16 pixels, those of "
                                 f"{f.backbone} have {student.cell()}; take another backbone")
    if ours:
        load_ours(student, classes, f.init)
    elif reads_init and f.init == "none":
        print0(f"{f.backbone}: random weights; --init takes pretrained ones")
    elif reads_init and not timm_imagenet:
        model.load_backbone(student, f.init)
    student.to(device).train()
    if f.checkpointing:
        student.backbone.recompute()
        if model.batchnorms(student.backbone):
            print0(f"note: --checkpointing: BatchNorm of {f.backbone} counts each batch twice")
    teacher = model.teacher_mode(copy.deepcopy(student).requires_grad_(False))

    imagenet = None
    wanted = f.fd and reads_init
    if wanted and (f.init == "none" or ours):
        print0("feature distance: off, it needs ImageNet weights to stay near to (--init FILE)")
    elif wanted and not THINGS & set(classes):
        print0("feature distance: off, none of the classes is one of its things:",
               ", ".join(sorted(THINGS)))
    elif wanted:
        imagenet = copy.deepcopy(student).requires_grad_(False).eval()

    confidence = losses.ClassConfidence(len(classes), f.alpha).to(device)
    gaussians = None
    if f.sepico:
        channels = model.StageProjection.channels
        gaussians = losses.ClassGaussians(len(classes), channels).to(device)
    shares = None
    if f.logit_adjust:
        names = ("source", *loss_weights(f))
        counted = {name: losses.ClassShares(len(classes)) for name in names}
        shares = torch.nn.ModuleDict(counted).to(device)
    return Networks(student, teacher, imagenet, confidence, gaussians, shares)


def check_batchnorm(net, f, device):
    """Raise DataError where BatchNorm sees one value a channel, which has no variance.

    That is so with one image whose crop the network reduces to one position. The network is asked:
    each reduces in its own way.
    """
    if f.batch > 1:
        return
    image = torch.zeros(1, 3, f.crop, f.crop, device=device)
    corner = (0, 0) if f.detail else None
    try:
        with torch.no_grad(), model.frozen_statistics(net):
            for head in net.heads:
                net(image, head, corner)
    except ValueError as error:
        if not model.has_one_value(error):
            raise
        raise data.DataError(
            f"--batch 1 --crop {f.crop}: {f.backbone} reduces a crop to one position, and of one "
            "value BatchNorm has no variance; give a larger --crop, or --batch 2 or more") from None


def compile_networks(nets, device):
    """torch.compile backbones and decoders in place: names and weights stay those they had."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # each backend has its own
        reason = str(error).partition("\n")[0][:90]
        raise OSError(f"--compile: torch.compile does not work here ({reason}); install a C++ "
                      "compiler, or leave --compile out") from None
    # compiled for CPUs, torch 2.13 loses gradients where levels are upsampled
    model.resize = torch.compiler.disable(model.resize)
    for net in (nets.student, nets.teacher, nets.imagenet):
        if net is not None:
            for module in net.compilable():
                module.compile()


def digest(content):
    """The first 16 digits of the sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def processor():
    """The processor, by which numbers differ in their last digits: "x86_64, AVX512, 6/207".

    Architecture, the vector instructions that torch takes, family/model where Linux tells.
    """
    parts = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text()
        numbers = re.findall(r"^(?:cpu family|model)\s*:\s*(\d+)", cpu, re.M)
        parts.append("/".join(numbers[:2]))
    return ", ".join(part for part in parts if part)


def versions(device):
    """What a number depends on beside the flags: versions, hardware, a hash of the six scripts."""
    here = Path(__file__).resolve().parent
    scripts = ("model.py", "train.py", "data.py", "losses.py", "kernels.py", "eval.py")
    code = b"".join((here / name).read_bytes() for name in scripts)
    hardware = f"{processor()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    try:
        timm = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:  # a MiT needs none
        timm = None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "timm": timm,
        "device": f"{device.type}: {hardware}",
        "threads": torch.get_num_threads(),
        "source_sha256": digest(code),
    }


def changed_flags(before, flags):
    """Names of the flags that differ between two runs, without those that change no number."""
    changed = []
    for name in before | flags:
        old = before.get(name) or None  # a flag that the checkpoint is older than: off
        new = flags.get(name) or None
        if name not in FREE_ON_RESUME and old != new:
            changed.append(name)
    return changed


def differing(names, before, flags, old_classes, classes):
    """Flags and class names that differ, in words; '' where there are none."""
    changed = []
    for name in names:
        shown = "the number of processes" if name == "world" else "--" + name.replace("_", "-")
        changed.append(f"{shown} was {before.get(name)}, is {flags.get(name)}")
    if list(classes) != list(old_classes):
        changed.append(f"the names in --classes were {old_classes}, are {list(classes)}")
    return ", ".join(changed)


def same_step(before, world):
    """Flags with which `world` processes see as many images per step as `before`, in words.

    BatchNorm then sees batches as large as before or, where that cannot be, smaller ones.
    """
    images = evaluation.images_per_step(before)
    if images % world:
        return f"{world} processes cannot share {images} images per step equally"
    each = images // world
    batch = max(n for n in range(1, before["batch"] + 1) if each % n == 0)
    return f"--batch {batch} --accum {each // batch} keep the {images} images per step"


def check_resume(flags, classes, checkpoint, path):
    """Raise CheckpointError that names what differs from the run that wrote the checkpoint.

    Returns the PLACES that differ: what lies there is still to be compared. Another number of
    processes is free where a step sees as many images: image k of a run is the same for any number
    of processes, and so are the draws of augmentation where all processes' batches are as large
    together. What BatchNorm, dropout, --t2s and contrasts see is not.
    """
    before = model.current_flags(checkpoint["flags"])
    changed = changed_flags(before, flags)
    known = checkpoint.get("inputs", {})
    moved = [name for name in changed if name in known]
    again = "repeat them, or give --out NEW"
    if "world" in changed:
        if evaluation.images_per_step(before) == evaluation.images_per_step(flags):
            moved += ["world", "batch", "accum"]
        else:
            again += f"; {same_step(before, flags['world'])}"
    if flags["steps"] > before["steps"]:
        again += f"; to train longer, --init {path} --out NEW begins a schedule from its student"
        if flags["source_steps"]:
            again += " (add --source-steps 0 to begin with adaptation)"
    if before["recipe"] != flags["recipe"]:
        again += f"; it had --recipe {before['recipe']}"
    refused = [name for name in changed if name not in moved]
    if text := differing(refused, before, flags, checkpoint["classes"], classes):
        raise model.CheckpointError(f"{path} was trained with other flags: {text}; {again}")
    return [name for name in moved if name in PLACES]


def check_scores(out, flags, classes):
    """Raise CheckpointError where OUT, without last.pt, has results of a run with other flags."""
    found = []
    log = out / "log.jsonl"
    if log.is_file():
        start, result = evaluation.last_run(evaluation.read_events(log))
        if result:
            found.append((log, start))
    for path in (out / "best.pt", out / "source.pt"):
        if model.is_checkpoint(path):
            found.append((path, model.load_checkpoint(path)))
    for path, run in found:
        before = model.current_flags(run["flags"])
        changed = changed_flags(before, flags)
        if text := differing(changed, before, flags, run["classes"], classes):
            raise model.CheckpointError(f"{path} is of a run with other flags: {text}; repeat "
                                        "them, or give --out NEW")


def check_log(log):
    """Raise DataError where OUT/log.jsonl, to which a run adds, is another program's."""
    if not log.is_file():
        return
    with open(log, "rb") as file:
        begins = file.read(len(Log.BEGINS))
    if not Log.BEGINS.startswith(begins):  # a killed run may have left the half of it
        raise data.DataError(f"{log}: no log of train.py; move it, or give --out NEW")


def read_inputs(f, sets, labeled, bank):
    """{flag: digest of what lies there} of the PLACES; what is no file or data stands for itself.

    "source_masks", "target_masks" and "val_masks" say what masks mean whose labels are used.
    labeled: names of the target images whose labels are used.
    """
    inputs = {
        "classes": digest("\n".join(f.class_names).encode()),
        "labeled": digest("\n".join(labeled).encode()),
        "init": f.init,
        "text": None,
    }
    if Path(f.init).is_file():
        inputs["init"] = model.file_hash(f.init)[:16]
    if bank:
        inputs["text"] = f"{bank.kind} {digest(bank.embeddings.numpy().tobytes())}"
    for name in ("source", "target", "val"):
        dataset = getattr(sets, name)
        inputs[name] = data.fingerprint(dataset) if dataset else None
        labels_count = dataset and (name != "target" or f.labeled != "0")
        inputs[f"{name}_masks"] = data.fingerprint_of_ids(dataset) if labels_count else None
    return inputs


# -------------------------------------------------------------------------------------------------
# What a run keeps an eye on: time, gradients, its log


class Clock:
    """Where the time of the steps goes: clock(part) books what has passed since the last call.

    On a GPU by events, which are read when a sum is asked for: nothing waits in between. On Apple's
    MPS, which has no such events here, a part is the time until its work was handed over.
    """

    def __init__(self, device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.reset()

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reset(self):
        self.spans = []
        self.last = self.now()

    def __call__(self, part):
        now = self.now()
        self.spans.append((part, self.last, now))
        self.last = now

    def milliseconds(self):
        """[(part, milliseconds)] of all calls since the last reset."""
        if not self.cuda:
            return [(part, 1e3 * (end - begin)) for part, begin, end in self.spans]
        self.last.synchronize()
        return [(part, begin.elapsed_time(end)) for part, begin, end in self.spans]

    def sums(self):
        """{part: milliseconds since the last reset}, in the order of their first call."""
        total = {}
        for part, span in self.milliseconds():
            total[part] = total.get(part, 0.0) + span
        return total


def product_rate(device, dtype, side=4096):
    """FLOP/s of a large matrix product: the most that can be expected of a network here."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    clock = Clock(device)
    for _ in range(10):
        a @ a
        clock("product")
    fastest = min(span for _, span in clock.milliseconds())
    return 2 * side**3 / (fastest / 1e3)


class GradientGuard:
    """Remembers, on the device, the first step whose gradient was not finite, and its loss terms.

    On a CPU the run asks for it after each backward. On a GPU that would wait for it: there the
    optimiser itself skips such a step, and the run asks when it reports or saves.
    """

    def __init__(self, optimizer, device):
        self.optimizer = optimizer
        self.delayed = device.type == "cuda"
        self.first = torch.full((), -1, device=device)  # the step, -1 while all were finite
        self.terms = {}

    def __call__(self, step, norm, terms):
        bad = ~torch.isfinite(norm)
        here = bad & (self.first < 0)
        self.first = torch.where(here, step, self.first)
        for name, value in terms.items():
            self.terms[name] = torch.where(here, value, self.terms.get(name, value))
        if self.delayed:
            self.optimizer.found_inf = bad.float()  # the fused kernels skip the step where it is 1

    def fault(self):
        """(step, its loss terms as text), or None."""
        step = int(self.first)
        if step < 0:
            return None
        return step, ", ".join(f"{name} {value.item():.4g}" for name, value in self.terms.items())


def peak_memory(device):
    """The most memory in use so far, MiB: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def try_lock(file):
    """Whether the operating system's lock on an open file is ours; None where it has none.

    Such a lock goes with its process, however that ends.
    """
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return None
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network folders
        return None
    return True


def runs_here(host, pid):
    """Whether a process lives; where that cannot be told, on another host or Windows, it may."""
    if host != platform.node() or os.name == "nt":
        return True
    if pid == os.getpid():  # of a container that begins again with the same numbers
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


class Lock:
    """OUT/lock, which holds host and process of the run that writes into OUT.

    A lock whose process is dead counts for nothing. A folder that cannot be written gets none.
    """

    def __init__(self, folder):
        """Raises DataError that names the process which has the lock."""
        self.folder = folder
        self.path = folder / "lock"
        # folders that this run makes, the innermost first
        self.made = [place for place in (folder, *folder.parents) if not place.exists()]
        self.file = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.take()
        except OSError:
            return  # what has to be written there will say so

    def open_file(self):
        """The file, opened, and what try_lock says of it."""
        while True:
            file = open(self.path, "a+")
            ours = try_lock(file)
            # the run that had it may have removed it in between
            with contextlib.suppress(FileNotFoundError):
                if not ours or os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file, ours
            file.close()

    def take(self):
        """Open the file, lock it and write who has it."""
        file, ours = self.open_file()
        file.seek(0)
        host, _, pid = file.read().strip().rpartition(" ")
        fault = None
        if ours is False:
            fault = "wait for it"
        elif ours is None and pid.isdecimal() and runs_here(host, int(pid)):
            fault = f"if it has ended, delete {self.path}"
        if fault:
            file.close()
            who = f"process {pid} on {host}" if host else "another process"
            raise data.DataError(f"{self.folder}: {who} trains there; {fault}, or give --out NEW")
        if host and host != platform.node():
            print0(f"note: {self.path}: process {pid} on {host} is taken to have ended, its lock "
                   "is free")
        file.truncate(0)
        file.write(f"{platform.node()} {os.getpid()}\n")
        file.flush()
        self.file = file

    def release(self):
        """Remove the file, and the folders that were made for it if nothing has come into them."""
        if self.file:
            if os.name == "nt":  # an open file cannot be removed there
                self.file.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.file.close()
        with contextlib.suppress(OSError):
            for place in self.made:
                place.rmdir()


@contextlib.contextmanager
def locked(folder):
    """Inside, no other run writes into the folder. Raises DataError on every process."""
    lock, fault = None, None
    if RANK == 0:
        try:
            lock = Lock(folder)
        except data.DataError as error:
            fault = str(error)
    fault = from_first(fault)
    if fault:
        raise data.DataError(fault)
    try:
        yield
    finally:
        if lock:
            lock.release()


def cut_half_line(path):
    """Take away the half line that a killed run left at the end of its log."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def four_digits(value):
    """A float rounded to four significant digits."""
    return float(f"{value:.4g}")


class Log:
    """OUT/log.jsonl: one JSON object a line, with the id of its run.

    A run that was killed and goes on does some steps twice: of two lines the later one counts.
    A "step" line has the means since the last one: loss terms, milliseconds of a step's parts,
    images/s; on a GPU also the share of its peak that the network's products reach. The first
    process writes it.
    """

    BEGINS = b'{"event": '

    def __init__(self, path, run, clock):
        self.path = path
        self.run = run
        self.file = None
        if RANK == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                cut_half_line(path)
                self.file = open(path, "ab", buffering=0)
            except OSError as error:
                raise data.DataError(f"{path}: cannot be written ({error.strerror}); give another "
                                     "--out") from error
        self.clock = clock
        self.least_ms = None  # what a step's matrix products would take at the GPU's peak rate
        self.warm = False
        self.crowded = False
        self.reset()

    def reset(self):
        self.sums = {}
        self.steps = 0
        self.images = 0
        self.began = time.perf_counter()
        self.cpu_began = time.process_time()
        self.clock.reset()

    @contextlib.contextmanager
    def left_out(self):
        """What happens inside takes no time of a step's: pictures, validation, checkpoints."""
        begin = time.perf_counter()
        cpu_begin = time.process_time()
        yield
        self.began += time.perf_counter() - begin
        self.cpu_began += time.process_time() - cpu_begin
        self.clock.last = self.clock.now()

    def write(self, event, **values):
        """One line, whole or not at all. Raises OSError that names the file."""
        if not self.file:
            return
        line = (json.dumps({"event": event, "run": self.run, **values}) + "\n").encode()
        before = os.fstat(self.file.fileno()).st_size
        reason = "the disk is full"
        try:
            if self.file.write(line) == len(line):  # a full disk takes a part
                return
        except OSError as error:
            reason = error.strerror
        with contextlib.suppress(OSError):
            os.truncate(self.file.fileno(), before)
        raise OSError(f"{self.path}: cannot be written ({reason}); make room, then start again; "
                      "checkpoints stay as they are")

    def add(self, terms, images):
        """Count one step, which took so many images."""
        self.steps += 1
        self.images += images
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def note_crowding(self, milliseconds):
        """Say once, on a CPU, that other programs hold up the threads of the steps since reset().

        Then a thread that has the processor waits, busily, for one that has none. milliseconds: a
        step's, without its data, which may come from a slow disk.
        """
        threads = torch.get_num_threads()
        computed = 1e3 * (time.process_time() - self.cpu_began) / threads / self.steps
        on_cpu = self.clock.device.type == "cpu"  # elsewhere the processor may wait for the device
        if self.crowded or not on_cpu or threads == 1 or milliseconds < 3 * computed:
            return
        self.crowded = True
        print0(f"note: a step takes {milliseconds / computed:.0f} times as long as its {threads} "
               "threads compute: other programs use this processor too. With OMP_NUM_THREADS=1 "
               "before the command it may be several times as fast; the same command then goes on "
               "from the last checkpoint")

    def report(self, bar, done, f, **values):
        """A line in the log, and on the bar or, where stderr is no terminal, on stdout."""
        means = {}
        for name, value in self.sums.items():
            means[name] = four_digits(mean_over_ranks(value).item() / self.steps)
        parts = {part: round(ms / self.steps, 2) for part, ms in self.clock.sums().items()}
        elapsed = time.perf_counter() - self.began
        pace = self.steps / elapsed  # steps a second
        speed = round(self.images / elapsed, 2)
        first, length = phase_at(f, done - 1)  # a step takes as long as others of its phase
        end = min(first + length, f.stop_at)
        of_phase = ""
        if end < f.stop_at:
            of_phase = " of the source phase"
        if self.least_ms:
            values["share_of_peak"] = round(self.least_ms / sum(parts.values()), 4)
        self.write("step", step=done, images_per_s=speed, **values, **means, ms=parts,
                   peak_mib=round(peak_memory(self.clock.device)))
        words = " ".join(f"{name} {value}" for name, value in means.items())
        words = f"{words} {speed} images/s"
        if self.warm:  # a run's first step is slower than all others
            words += f", {bar.format_interval((end - done) / pace)} left{of_phase}"
            self.note_crowding(sum(parts.values()) - parts.get("data", 0))
        self.warm = True
        bar.set_postfix_str(words)
        if bar.disable:
            print0(f"step {done}/{f.steps} {words}")
        self.reset()


# -------------------------------------------------------------------------------------------------
# The run: set-up, the loop, the end


class Run:
    """All that belongs to one training. loop() steps it, read_out() scores it."""

    def __init__(self, f, device):
        """Reads the checkpoint, if there is one. Raises CheckpointError."""
        self.f = f
        self.device = device
        self.dtype_name, self.dtype_reason = pick_dtype(f.dtype, self.device)
        self.flags = f.saved | {"world": WORLD, "dtype": self.dtype_name}
        self.out = Path(f.out)
        self.last = self.out / "last.pt"
        self.source_pt = self.out / "source.pt"  # the network before adaptation
        self.start = 0  # the first step that is left to do
        self.best = -1.0  # the highest mIoU so far in this phase, of --eval-every
        self.window = f.crop if f.slide else None

        self.id = secrets.token_hex(4)  # tells the lines of two runs in one log apart
        self.checkpoint = None
        self.moved = []  # PLACES that are others than before
        check_log(self.out / "log.jsonl")
        if self.last.exists():
            self.checkpoint = model.load_checkpoint(self.last)
            self.start = self.checkpoint["step"]
            self.best = self.checkpoint["best"]
            self.id = self.checkpoint.get("run")
            before = self.checkpoint
            if self.start == f.steps:
                # --slide helps a read-out that is left and for which memory is short
                result = self.result()
                if result is None or result.get("slide") == f.slide:
                    before = before | {"flags": before["flags"] | {"slide": f.slide}}
            self.moved = check_resume(self.flags, f.class_names, before, self.last)
        else:
            check_scores(self.out, self.flags, f.class_names)
        found = (self.start, self.id if self.checkpoint else None)
        if set(from_all(found)) != {found}:
            raise data.DataError(f"--out {f.out}: the machines of this run find different "
                                 "checkpoints there; give a folder that all of them share")

    # In this order, so that what takes minutes comes last: names, downloads, reading and rendering.

    def open_data(self):
        """Open data and text, as far as names tell."""
        self.sets = open_sets(self.f)
        self.bank = open_bank(self.f, self.checkpoint)

    def open_networks(self):
        """Open the networks, with the weights that they begin with."""
        f = self.f
        self.nets = open_networks(f, f.class_names, self.bank, self.device, self.checkpoint)
        check_batchnorm(self.nets.student, f, self.device)

    def read_data(self):
        """Read all data. Raises CheckpointError where they are not those of the checkpoint."""
        f = self.f
        self.sets = read_sets(f, self.sets)
        self.labeled_names = [self.sets.target.names[i] for i in self.sets.labeled]
        self.check_labeled()
        bank = open_bank(f, None) if "text" in self.moved else self.bank
        self.inputs = read_inputs(f, self.sets, self.labeled_names, bank)
        if self.checkpoint:
            self.check_inputs()

    def open(self):
        """Open optimiser, loaders and log; go on from the checkpoint, if there is one."""
        f = self.f
        nets = self.nets
        self.student, self.teacher = nets.student, nets.teacher
        self.statistics = torch.nn.ModuleDict({"confidence": nets.class_confidence})
        if nets.gaussians is not None:
            self.statistics["gaussians"] = nets.gaussians
        if nets.shares is not None:
            self.statistics["shares"] = nets.shares
        groups = parameter_groups(self.student, f.lr, f.head_lr)
        self.fused = self.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(groups, fused=self.fused)
        if self.checkpoint:
            self.restore()
        if f.compile:
            compile_networks(nets, self.device)
        self.streams = open_streams(f, self.sets)
        self.loaders = {}
        for name, stream in self.streams.items():
            first = self.start
            if name == "target":
                first = max(first, f.source_steps)
            self.loaders[name] = stream.views(first, self.device)

        # every term goes into one backward: DDP need not look for parameters without a gradient
        if WORLD > 1:
            with warnings.catch_warnings():
                # its successor is no substitute: that sends buffers once, at the start
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                wrapped = DistributedDataParallel(self.student, broadcast_buffers=False)
            nets = nets._replace(student=wrapped)
        self.nets = nets
        things = [i for i, name in enumerate(f.class_names) if name in THINGS]
        self.things = torch.tensor(things, device=self.device)

        self.versions = versions(self.device)
        self.clock = Clock(self.device)
        self.guard = GradientGuard(self.optimizer, self.device)
        self.log = Log(self.out / "log.jsonl", self.id, self.clock)

    def check_inputs(self):
        """Raise CheckpointError where other things lie in another place than before.

        And where masks mean another thing. Other files in the same place are said: they may have
        been repaired.
        """
        before = model.current_flags(self.checkpoint["flags"])
        known = self.checkpoint.get("inputs", {})
        other = [name for name in known if known[name] != self.inputs[name]]
        refused = [name for name in other if name in self.moved]
        classes = self.f.class_names
        if text := differing(refused, before, self.flags, classes, classes):
            raise model.CheckpointError(
                f"{self.last} was trained with other data: {text}, and that is not the same by "
                "names, sizes or contents; give the same, or --out NEW")
        for name in ("source", "target", "val"):
            if f"{name}_masks" in other:
                raise model.CheckpointError(
                    f"{self.last}: masks of --{name} {words(before[name])} do not mean what they "
                    "did: IDS or the file of --classes has changed; restore it, or give --out NEW")
        if "init" in other and self.nets.imagenet is not None:
            raise model.CheckpointError(
                f"{self.last} stays near to the features of --init {before['init']}, which is "
                "another file now; restore it, or give --out NEW")
        for name in other:
            if name in ("source", "target", "val"):
                print0(f"note: --{name} {words(before[name])}: its files are not as they were "
                       "(names, sizes or meaning of masks); the run goes on with what is there")

    def check_labeled(self):
        """Raise CheckpointError where --labeled now gives other images than before."""
        if self.checkpoint is None:
            return
        before = self.checkpoint.get("labeled", [])
        if before != self.labeled_names:
            raise model.CheckpointError(
                f"{self.last} was trained with the labels of {len(before)} target images; "
                f"--labeled {self.f.labeled} now gives {len(self.labeled_names)}, not all the "
                "same; restore the list or images, or give another --out")

    def restore(self):
        """Weights, optimiser and statistics of the checkpoint."""
        state = self.checkpoint
        heads = [name for name in state["student"] if name.startswith("stage_projection.")]
        if self.f.sepico and not heads:
            raise model.CheckpointError(
                f"{self.last}: --sepico contrasted other features when it was written; go on with "
                "that version of the scripts, or begin anew with another --out")
        model.load_weights(self.student, state["student"], self.last)
        model.load_weights(self.teacher, state["teacher"], self.last)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = self.fused  # of this device, not of the one that saved
        statistics = state.get("statistics", self.statistics.state_dict())
        if not self.f.sepico:  # an earlier version kept those of SePiCo in every run
            statistics = {k: v for k, v in statistics.items() if not k.startswith("gaussians.")}
        model.load_weights(self.statistics, statistics, self.last)

    def announce(self):
        """Say what is trained on what, and write the log's first line."""
        f, sets, bank = self.f, self.sets, self.bank
        begins = {
            "step": self.start,
            "flags": self.flags,
            "classes": list(f.class_names),
            "versions": self.versions,
            "inputs": self.inputs,
        }
        labels = ""
        if self.labeled_names:
            hashed = self.inputs["labeled"]
            labels = f" ({len(self.labeled_names)} images with labels, sha256 {hashed})"
            begins |= {"labeled": self.labeled_names, "labeled_sha256": hashed}
        for dataset in (sets.source, sets.target, sets.val):
            if dataset and dataset.left_out:
                left_out = begins.setdefault("left_out", {})
                left_out[f"{dataset.spec} {dataset.split}"] = dataset.left_out
        images = f" ({len(sets.source)} images)" if sets.source else ""
        seen = f"crops of {f.crop}"
        if f.detail:
            seen += f" at half their size with details of {f.detail_side}"
        print0(f"{f.recipe}: {words(f.source)}{images} -> {words(f.target)}{labels}, "
               f"{len(f.class_names)} classes; {f.backbone} + {f.decoder}-{f.channels}; "
               f"{WORLD} x {f.batch} {seen}, {self.dtype_name} ({self.dtype_reason}); "
               f"{self.versions['device']}, torch {self.versions['torch']}")
        if f.warmup >= shorter_phase(f):
            print0(f"note: --warmup {f.warmup} does not end within a phase of {shorter_phase(f)} "
                   "steps, whose learning rate stays below --lr")
        if bank:
            rows = digest(bank.embeddings.numpy().tobytes())
            dimensions = bank.embeddings.shape[1]
            begins["text"] = {
                "kind": bank.kind,
                "dimensions": dimensions,
                "about": bank.about,
                "rows_sha256": rows,
            }
            tower = [bank.about[key] for key in ("model", "pretrained") if key in bank.about]
            print0("text:", bank.kind, *tower, f"{dimensions} dimensions, sha256 {rows}")
        self.log.write("resume" if self.checkpoint else "start", **begins)

    def save(self, name, step):
        """Write OUT/name: all that a resumed run and eval.py need."""
        if RANK > 0:
            return
        bank = self.bank
        state = {
            "run": self.id,
            "flags": self.flags,
            "inputs": self.inputs,
            "imagenet": self.nets.imagenet is not None,
            "classes": list(self.f.class_names),
            "versions": self.versions,
            "step": step,
            "best": self.best,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "statistics": self.statistics.state_dict(),
            "labeled": self.labeled_names,
            "text": None,
        }
        if bank:
            state["text"] = {"embeddings": bank.embeddings, "kind": bank.kind, "about": bank.about}
        try:
            model.save_checkpoint(self.out / name, state)
        except model.CheckpointError as error:
            raise OSError(str(error)) from None  # the run broke; nobody's input was bad

    def result(self):
        """The event of this run's read-out in the log, or None."""
        log = self.out / "log.jsonl"
        if not log.exists():
            return None
        start, result = evaluation.last_run(evaluation.read_events(log))
        return result if result and result.get("run") == self.id else None

    def finished(self):
        """Whether neither a step is left to do nor, after the last of all steps, the read-out."""
        if self.start < self.f.stop_at:
            return False
        if self.f.val == "none" or self.f.stop_at < self.f.steps:
            return True
        return self.result() is not None

    def streams_of(self, step):
        """{name: Stream} of which a step takes a batch."""
        used = dict(self.streams)
        if step < self.f.source_steps:
            del used["target"]
        return used

    @contextlib.contextmanager
    def counted(self, step):
        """Inside, the FLOPs of a phase's first step are counted, for the log's share of the peak.

        That is of a GPU; compiled code cannot be counted.
        """
        begins = step in (self.start, self.f.source_steps)
        if not begins or self.device.type != "cuda" or self.f.compile:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        dtype = torch.bfloat16 if self.dtype_name == "bf16" else torch.float32
        with self.log.left_out():
            rate = product_rate(self.device, dtype)
        self.log.least_ms = 1e3 * counter.get_total_flops() / rate

    def draw_panel(self, views, step):
        """OUT/panels/STEP.png: what this step was trained on, and the student's prediction."""
        if RANK > 0:
            return
        columns = {}
        for name, view in views.items():
            columns[name] = view.image
            if name in ("source", "mix"):
                columns[f"{name} label"] = view.label
            elif name == "target":
                columns["pseudo-label"] = view.label
        path = self.out / "panels" / f"{step:06d}.png"
        sheet = evaluation.training_panel(self.student, columns, self.f.class_names)
        try:
            path.parent.mkdir(exist_ok=True)
            data.save_picture(sheet, path)
        except OSError as error:  # a picture is not worth a run
            print0(f"note: {error}; the run goes on")

    def validate(self, step):
        """Score the student and, once adaptation has begun, the teacher.

        best.pt keeps the best student before, and the step of the best teacher after.
        """
        nets = {"student": self.student}
        recommended = "student"
        if self.f.adapts and step > self.f.source_steps:
            nets["teacher"] = self.teacher
            recommended = "teacher"
        results = {name: scored(self, net) for name, net in nets.items()}
        self.log.write("eval", step=step, **results)
        words = [f"{name} mIoU {result['miou']:.2f}" for name, result in results.items()]
        print0(f"step {step}: {', '.join(words)}")
        if results[recommended]["miou"] > self.best:
            self.best = results[recommended]["miou"]
            self.save("best.pt", step)

    def check_gradients(self):
        """Raise FloatingPointError, with the whole story, where a gradient was not finite."""
        fault = self.guard.fault()
        if fault is None:
            return
        step, parts = fault
        files = []
        for stream in self.streams_of(step).values():
            files += stream.files(step)
        # All processes are here, as their gradients were averaged; one of them had the bad images.
        told = from_all((parts, files))
        parts = " | ".join(parts for parts, _ in told)
        files = [name for _, files in told for name in files]
        self.log.write("non-finite", step=step, parts=parts, files=files)
        left = "nothing was saved yet"
        stopped = "stopped before the optimiser step"
        if self.guard.delayed:
            stopped = "its optimiser step was not taken"
        remedy = "try a lower --lr"
        if self.dtype_name != "fp32":
            remedy += " or --dtype fp32"
        if self.last.exists():
            left = f"{self.last} is from before"
            remedy += ", with another --out"
        raise FloatingPointError(
            f"step {step}: the gradient is not finite ({parts}); files: {', '.join(files)}; "
            f"{stopped}, {left}; {remedy}")


def backward(run, step):
    """The gradient of one step, from --accum batches.

    Returns (terms, views) for log and panel: the mean of the terms, the views of the last batch.
    """
    f = flags_at(run.f, step)
    generator = torch.Generator()
    total = {}
    for part in range(f.accum):
        batch = {"source": None, "labeled": None, "target": None}  # a View where there is one
        for name in run.streams_of(step):
            batch[name] = next(run.loaders[name])
        run.clock("data")

        # draws for the joint batch are the same on every process; dropout and stochastic depth are
        # each process's own. After next(), which may draw a loader's seed
        text = f"{f.seed} {step} {part}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        generator.manual_seed(seed)
        torch.manual_seed(seed + RANK)
        draw = Draws(generator, (RANK, WORLD))

        # the processes average their gradients once, after the last batch
        wait = contextlib.nullcontext()
        if WORLD > 1 and part + 1 < f.accum:
            wait = run.nets.student.no_sync()
        with wait:
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype_name == "bf16"):
                terms, views = step_terms(f, step, run.nets, **batch, things=run.things, draw=draw,
                                          clock=run.clock)
            loss = sum(terms.values()) / f.accum
            loss.backward()
        run.clock("backward")
        for name, value in terms.items():
            total[name] = total.get(name, 0) + value.detach() / f.accum
    return total, views


def asked_to_leave(signals):
    """Whether any process has caught a signal; all processes have to ask."""
    return mean_over_ranks(torch.tensor(float(bool(signals)))) > 0  # on the CPU: no GPU waits


def loop(run, signals):
    """Train from the run's start to --stop-at; leave early, saved, after a signal."""
    f, student, teacher, optimizer = run.f, run.student, run.teacher, run.optimizer
    clock, log = run.clock, run.log
    # not with tqdm's own estimate of the time that is left: it begins with the first step, which is
    # slower than all others
    bar = tqdm(range(run.start, f.stop_at), f.recipe, f.stop_at, initial=run.start,
               disable=True if RANK else None,
               bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
    for step in bar:
        first, length = phase_at(f, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - first, group["peak"], length, f.warmup)

        # the teacher follows the weights after the previous step
        model.ema_update(teacher, student, step, f.alpha)
        clock("EMA")
        with run.counted(step):
            terms, views = backward(run, step)
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        run.guard(step, norm, terms)
        if not run.guard.delayed:
            run.check_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock("optimiser")
        log.add(terms, len(run.streams_of(step)) * f.batch * f.accum * WORLD)

        # what is due; a signal on any process ends the run on all of them
        done = step + 1
        finished = done == f.stop_at
        leaves = asked_to_leave(signals)
        validates = f.eval_every and done % f.eval_every == 0
        adapts_next = done == f.source_steps
        # no line in the log has the means of both phases
        reports = finished or adapts_next or done == run.start + 1 or done % f.log_every == 0
        saves = finished or leaves or done % f.save_every == 0

        if reports or validates or saves:
            run.check_gradients()  # statistics of a bad step are neither saved nor scored
        if reports:
            values = {"lr": optimizer.param_groups[0]["lr"], "grad_norm": round(norm.item(), 4)}
            if f.t2s:
                values["class_weights"] = run.nets.class_confidence.weights(f.doubt_power).tolist()
            log.report(bar, done, f, **values)
        with log.left_out():
            if validates or saves or adapts_next:
                model.settle_batchnorm(student, teacher, mean_over_ranks)
            if adapts_next:
                run.save("source.pt", done)
                print0(f"step {done}: the source phase ends; its network is {run.source_pt}")
            if validates:
                run.validate(done)
            if adapts_next:
                run.best = -1.0  # of students; best.pt is of teachers from here on
            if saves:
                run.save("last.pt", done)
                run.draw_panel(views, done)
        if finished:
            leaves = asked_to_leave(signals)  # also while the last step was saved
        if leaves:
            print0(f"stopped by a signal, {run.last} saved at step {done}; the same command goes "
                   "on from there")
            sys.exit(130 if signal.SIGINT in signals else 0)  # SIGTERM: a scheduler asked


def before_adaptation(run):
    """The network of OUT/source.pt, or None where the run has no source phase or lost the file.

    The first process reads it for all.
    """
    if not run.f.source_steps:
        return None
    checkpoint = None
    if RANK == 0:
        try:
            checkpoint = model.load_checkpoint(run.source_pt)
            if checkpoint.get("run") != run.id:
                raise model.CheckpointError(f"{run.source_pt}: of another run")
        except model.CheckpointError as error:
            checkpoint = None
            print0(f"note: nothing is shown of the network before adaptation ({error})")
    checkpoint = from_first(checkpoint)
    if checkpoint is None:
        return None
    return model.build_segmenter(checkpoint, "student", run.source_pt).to(run.device)


def with_adabn(run, net):
    """The network with BatchNorm statistics of the target, None where it has none, or no target.

    None also where the target's images are too small and too few for statistics, or memory is
    short: that is said.
    """
    if not run.sets.target or not model.batchnorms(net):
        return None
    try:
        return evaluation.adapt_batchnorm(net, run.sets.target)
    except (ValueError, RuntimeError, MemoryError) as error:
        if model.has_one_value(error):
            why = (f"{words(run.f.target)} has one image, and so small that BatchNorm gets one "
                   "value")
        elif model.is_out_of_memory(error) and WORLD == 1:  # others would wait for this process
            path = run.last if net is run.student else run.source_pt
            command = ["python", "eval.py", str(path), "--adabn", *data.specs(run.f.target),
                       "--device", "cpu"]
            why = f"out of memory; {shlex.join(command)} measures it in the memory of the CPU"
        else:
            raise
    print0(f"note: no read-out with AdaBN: {why}")
    return None


def scored(run, net):
    """The scores of a network on the validation data; None of None."""
    return net and evaluation.evaluate(net, run.sets.val, run.window)


def read_out(run):
    """Score a finished run: student, EMA teacher, student with AdaBN on the target.

    After a source phase also the network from before adaptation, with and without AdaBN, and a
    picture of what changed, OUT/result.png.
    """
    nets = {"student": run.student, "teacher": run.teacher}
    recommended = "teacher" if run.f.adapts else "student"
    before = before_adaptation(run)
    results = {"source": scored(run, before)}
    if before:
        results["source"]["adabn"] = scored(run, with_adabn(run, before))
    for name, net in nets.items():
        results[name] = scored(run, net)
    results["adabn"] = scored(run, with_adabn(run, run.student))
    results["recommended"] = recommended

    if before and RANK == 0:
        draw_result(run, before, nets[recommended], recommended)
    run.log.write("result", step=run.f.steps, slide=run.f.slide, **results)
    print0(f"{words(run.f.val)}, val, {len(run.sets.val)} images:")
    print0(evaluation.format_read_outs(results, run.f.source_steps))


def draw_result(run, before, after, name):
    """OUT/result.png: three frames with their labels, before adaptation and after."""
    titles = ("before adaptation", f"after adaptation, {name}")
    sheet, _ = evaluation.before_after(before, after, run.sets.val, titles, window=run.window)
    path = run.out / "result.png"
    try:
        data.save_picture(sheet, path)
        print0(f"{path}: the three frames with the middle gain, not the best ones")
    except OSError as error:  # a picture is not worth a run
        again = ["python", "eval.py", str(run.last), "--weights", name, "--before",
                 str(run.source_pt), "--picture", "FILE.png"]
        print0(f"note: {error}; {shlex.join(again)} draws it")


def say_what_to_read(run):
    """How to use what an adapted run has made, and how to get what it has to beat."""
    f = run.f
    if not f.adapts:
        return
    print0(f"use it: {use_command(run)}")
    if f.source != "none" and f.val != "none":
        print0(f"what adaptation is worth, as many steps without it: {source_only(f)}")


def use_command(run, *what):
    """The command of eval.py with the read-out that is recommended; by default it predicts images.

    what: words that ask for something else.
    """
    words = ["python", "eval.py", str(run.last)]
    if run.f.adapts:
        words += ["--weights", "teacher"]
    slides = run.f.slide  # as last.pt says, which a read-out with another --slide does not change
    if run.checkpoint and run.start == run.f.steps:
        slides = run.checkpoint["flags"].get("slide", False)
    if slides != run.f.slide:
        words.append("--slide" if run.f.slide else "--no-slide")
    return shlex.join([*words, *(what or ("--images", "PATH"))])


def flags_of_adaptation():
    """Names of the flags with which a run is more than --recipe source."""
    names = {"language", "text", "source_steps"}
    for action in build_parser().method._group_actions:
        names.add(action.dest)
    return names


def source_only(f):
    """The command of a run that learns from the source alone, else with the flags as typed."""
    adaptation = flags_of_adaptation()
    kept = []
    keeps = True
    for word in f.typed:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
            keeps = name not in adaptation | {"recipe", "out"}
        if keeps:
            kept.append(word)
    # as the recipe has it
    if f.detail and not any(word.startswith("--detail") for word in kept):
        kept += ["--detail", f"{f.detail:g}"]
    launch = ["python"]
    if WORLD > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
        launch = ["torchrun"]
        if here < WORLD:
            launch += ["--nnodes", str(WORLD // here), "..."]
        launch += ["--nproc-per-node", str(here)]
    out = f"{f.out}-source"
    if f.out.endswith(f"-{f.seed}"):  # --table reads a seed at the end of a name
        out = f"{f.out.removesuffix(f'-{f.seed}')}-source-{f.seed}"
    own = ["--recipe", "source", "--out", out]
    return shlex.join([*launch, "train.py", *own, *kept])


def catch_signals():
    """A list that collects SIGTERM and SIGINT; a second one does not wait for the step to end."""
    caught = []

    def catch(number, _):
        if caught:
            os._exit(128 + number)
        caught.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def release_signals():
    """SIGTERM and SIGINT do again what they do in every program; the first SIGTERM by SystemExit,
    so that the run can say what is left to do."""
    def leave(number, _):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if WORLD == 1:  # else it may wait for another process, outside of Python
        signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def process_note(before, flags):
    """What another number of processes changes, in words."""
    batch = flags["batch"]
    seen = f"BatchNorm sees batches of {batch} as before"
    if batch != before["batch"]:
        seen = f"BatchNorm now sees batches of {batch} instead of {before['batch']}"
    if batch * flags["world"] != before["batch"] * before["world"]:
        seen += ", augmentation and the sums in losses are of other batches"
    return (f"note: {flags['world']} instead of {before['world']} processes: every step has the "
            f"same {evaluation.images_per_step(flags)} images; {seen}, and the run is not bit for "
            f"bit what {before['world']} would give")


def say_where_it_goes_on(run):
    """One line, or several, at the start of a run that has a checkpoint."""
    left = ""
    if run.start >= run.f.steps:
        left = "; only the read-out is left"
    print0(f"goes on from {run.last}, step {run.start}{left}")
    before = run.checkpoint["flags"]
    if before.get("world", 1) != WORLD:
        print0(process_note(before, run.flags))


def train(f, device):
    """Set-up, the loop, the read-out, in a folder that no other run writes into."""
    run = Run(f, device)
    if run.checkpoint and run.finished():
        if run.moved:
            run.open_data()
            run.read_data()  # which compares what lies there
        print0(f"{run.last} is at step {run.start} of {f.steps}, nothing is left to do; "
               f"use it: {use_command(run)}")
        return
    if run.checkpoint:
        say_where_it_goes_on(run)
    evaluation.check_folder("--out", run.out)
    run.open_data()
    run.open_networks()
    run.read_data()
    run.open()
    run.announce()
    loop(run, catch_signals())
    release_signals()
    if run.sets.val and f.stop_at == f.steps:
        try:
            read_out(run)
        except BaseException as error:
            print0(f"all {f.steps} steps are done and saved in {run.last}, the read-out is not; "
                   "the same command does it again, without training")
            if model.is_out_of_memory(error):
                remedy = "the same command with --slide scores them in pieces"
                if f.slide:
                    command = use_command(run, "--device", "cpu")
                    remedy = f"{command} scores them in the memory of the CPU"
                data.fail("train.py", f"out of memory while images were scored; {remedy}", 1)
            raise
    if f.stop_at == f.steps:
        say_what_to_read(run)
    print0(f"step {f.stop_at} of {f.steps}: checkpoint {run.last}, panels {run.out / 'panels'}, "
           f"log {run.out / 'log.jsonl'}")


def start(argv=None):
    """One training, from its command line on."""
    f = parse_flags(argv)
    device = setup(f.device)
    with locked(Path(f.out)):
        train(f, device)


def end_processes():
    """Leave no loader process behind, which ignore SIGTERM and which Python would wait for."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise at the kill
    for child in children:
        child.kill()
    if dist.is_initialized():
        # gloo's threads give back their last tensors, for which they need Python: at its end, which
        # in turn waits for them, they would not get it
        time.sleep(0.2)
        dist.destroy_process_group()


def lost_another_process(error):
    """Whether a RuntimeError says that a process has gone with which this one exchanges tensors."""
    told = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting")  # gloo's words
    lost = isinstance(error, dist.DistError) or any(words in str(error) for words in told)
    return WORLD > 1 and lost


def lost_a_loader(error):
    """Whether a RuntimeError says that the system has ended a process that loads images."""
    return "DataLoader worker (pid" in str(error) or "shared memory" in str(error)


def main(argv=None):
    """start(); status 2 for bad input, 1 for a run that broke, each with one line."""
    try:
        start(argv)
    except (data.DataError, model.WeightsError, model.CheckpointError, model.TextError) as error:
        data.fail("train.py", error, 2)
    except (FloatingPointError, OSError) as error:
        data.fail("train.py", error, 1)
    except (RuntimeError, MemoryError) as error:
        if lost_another_process(error):
            # not by data.fail: torchrun shall end with what the other one said
            print("train.py: ended, because another process of this run has", file=sys.stderr)
            sys.exit(1)
        if lost_a_loader(error):
            data.fail("train.py", "a loader process died, probably for lack of memory or of shared "
                      "memory (/dev/shm); try --workers 0", 1)
        if not model.is_out_of_memory(error):
            raise
        remedy = "try --checkpointing, --batch 1 --accum N or a smaller --crop"
        data.fail("train.py", f"out of memory; {remedy}", 1)
    except KeyboardInterrupt:  # before the first step and after the last; between, it is collected
        data.interrupted()
    finally:
        end_processes()


if __name__ == "__main__":
    main()
