r"""Prediction, metrics, pictures, export. Everything about the network comes from the checkpoint.

    python eval.py out/last.pt                         IoU per class on the run's validation data
    python eval.py out/last.pt --data cityscapes:DIR --slide --flip --json scores.json --save panels
    python eval.py out/last.pt --adabn camvid:DIR      BatchNorm statistics of unlabelled images
    python eval.py out/last.pt --images photo.jpg      any image, or a folder of them
    python eval.py mic.pth --backbone mit_b5 --decoder daformer --classes cityscapes19 \
        --size 1024x512 --data cityscapes:DIR          a published segmenter (HRDA: no --size)
    python eval.py out/last.pt --export net.onnx       also .pt2 (torch.export) and .safetensors
    python eval.py out/last.pt --data cityscapes:DIR --split test --submit upload
    python eval.py out/last.pt --alignment streets     distance of the domains, per class
    python eval.py out/last.pt --before out/source.pt --picture gain.png
                                                       what adaptation changed, in three frames
    python eval.py --table runs/* [--against ROW]      mean, spread and differences over seeds
    python eval.py --table runs/* --picture curve.png  mIoU over the number of labelled images
    python eval.py --curves runs/* --picture runs.png  mIoU and losses over the steps
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from data import (BY_POSITION, CLASS_SPACES, IGNORE, LABEL_IDS, OWN, SUFFIXES, DataError, Parser,
                  as_picture, cell_means, check_picture, check_sets, colorize, fail,
                  fingerprint_of_ids, grid, home, interrupted, keep_out, leave_out_bad, legend,
                  majority_label, open_dataset, output, overlay, palette, parse_size, parse_spec,
                  read_colours, read_image, resize_image, save_ids, save_picture, specs, walk,
                  whole_file, with_legend)
from model import (CheckpointError, WeightsError, build_segmenter, current_flags, has_one_value,
                   images_at_once, is_out_of_memory, load, open_checkpoint, reason_of, starts,
                   upsample_pseudo_label, why_unwritable, write_exported)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)

# --------------------------------------------------------------------------------------------------
# Prediction


def head_logits(model, image, head):
    """Logits float32 (B,K,h,w) of one decoder, or of the mean probability of both ("mean")."""
    if head != "mean":
        return model(image, head).logits.float()
    plain = model(image, "plain").logits.float().log_softmax(1)
    language = model(image, "language").logits.float().log_softmax(1)
    return torch.logaddexp(plain, language)


def raw_logits(model, image, window=None, stride=None, flip=False, head="plain"):
    """Logits float32 (B,K,h,w) before the last upsampling.

    They are on the network's grid or, where windows were slid, on the image's.
    image: float (B,3,H,W), RGB in [0,1], any size. window: None predicts the whole image in one
    pass (DAFormer's protocol). S slides windows of S x S, `stride` apart (default S // 2), and
    averages logits where they overlap (HRDA, MIC); a side shorter than S is taken whole. flip:
    logits are averaged with those of the mirror image. head: plain | language | mean. Raises
    ValueError on a stride that leaves gaps.
    """
    if flip:
        straight = raw_logits(model, image, window, stride, head=head)
        mirrored = raw_logits(model, image.flip(-1), window, stride, head=head)
        return (straight + mirrored.flip(-1)) / 2

    B, _, H, W = image.shape
    if window is None or max(H, W) <= window:
        return head_logits(model, image, head)

    if stride is None:
        stride = max(1, window // 2)
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} leaves pixels uncovered: it must be in 1..{window}, "
                         "the window's side")
    h = min(window, H)
    w = min(window, W)
    total = image.new_zeros(B, model.num_classes, H, W)
    count = image.new_zeros(H, W)
    for y in starts(H, h, stride):
        for x in starts(W, w, stride):
            logits = head_logits(model, image[..., y:y + h, x:x + w], head)
            logits = F.interpolate(logits, (h, w), mode="bilinear", align_corners=False)
            total[..., y:y + h, x:x + w] += logits
            count[y:y + h, x:x + w] += 1
    return total.div_(count)


@torch.no_grad()
def predict(model, image, size=None, window=None, stride=None, flip=False, head="plain"):
    """Class probabilities, float32 (B,K,h,w) at `size` (h,w), by default the image's own.

    image: float (B,3,H,W), RGB in [0,1], any size. The caller puts the model into eval mode.
    window: None predicts the whole image in one pass (DAFormer's protocol). S slides windows of
    S x S, `stride` apart (default S // 2), and averages logits where they overlap (HRDA, MIC); a
    side shorter than S is taken whole. One bilinear step leads from the network's grid to the
    image's size and, where `size` is another, a second one from there, as in DAFormer's released
    code.
    flip: logits are averaged with those of the mirror image.
    head: plain | language | mean.
    Raises ValueError on a stride that leaves gaps.
    """
    if size is None:
        size = image.shape[2:]
    logits = raw_logits(model, image, window, stride, flip, head)
    for step in (image.shape[2:], size):
        logits = F.interpolate(logits, step, mode="bilinear", align_corners=False)
    return logits.softmax(1)


@torch.no_grad()
def predict_labels(model, image, size=None, window=None, stride=None, flip=False, head="plain"):
    """Classes uint8 (B,h,w) at `size` (h,w), by default the image's own.

    The arg-max of `predict`, with its arguments; the K maps of that size are never made.
    """
    if size is None:
        size = image.shape[2:]
    logits = raw_logits(model, image, window, stride, flip, head)
    label, _, _ = upsample_pseudo_label(logits, size, 0.0, via=image.shape[2:])
    return label


def to_batch(image, model):
    """Float (B,3,H,W) in [0,1] on the model's device, from uint8 (3,H,W) or (B,3,H,W)."""
    image = image.view(-1, *image.shape[-3:])  # (3,H,W) -> (1,3,H,W)
    return image.to(model.pixel_mean.device).float().div(255)


@contextlib.contextmanager
def eval_mode(model):
    """Eval mode inside; afterwards every module has its own mode again (a teacher mixes them)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def read_ahead(dataset, indices, threads=4):
    """Yield dataset[i] for i in indices, read by threads while the caller computes."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for i in indices:
            waiting.append(pool.submit(dataset.__getitem__, i))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_batches(model, items, sizes_of):
    """Yield lists of consecutive items of equal sizes, no longer than images_at_once.

    sizes_of: item -> (height, width of its image at the network, anything else that must agree).
    """
    batch = []
    for item in items:
        sizes = sizes_of(item)
        if batch and sizes != sizes_of(batch[0]):
            yield batch
            batch = []
        batch.append(item)
        if len(batch) >= images_at_once(model.pixel_mean.device, *sizes[:2]):
            yield batch
            batch = []
    if batch:
        yield batch


def item_sizes(item):
    """Height and width of the image of a data set's item, and the shape of its label or None."""
    label = item["label"]
    return *item["image"].shape[1:], label is not None and label.shape


def predict_items(model, items, size=None, window=None, flip=False, head="plain"):
    """Classes uint8 (B,h,w), on the device, of items of equal sizes, at `size` or the labels'."""
    if size is None:
        size = items[0]["label"].shape
    images = torch.stack([item["image"] for item in items])  # B of (3,H,W) -> (B,3,H,W)
    return predict_labels(model, to_batch(images, model), size, window, flip=flip, head=head)


def predict_item(model, item, **how):
    """Classes uint8 (h,w), on the device, of one item; how: see predict_items."""
    return predict_items(model, [item], **how)[0]


def predictions(model, dataset, window=None, flip=False, head="plain", size=None):
    """Yield (item, uint8 prediction (h,w) on the device) for this process's share of the data.

    The share is rank, rank + world, ...: no image is repeated to fill up ranks, so that no score
    depends on their number (but for the rounding of batches, see images_at_once). Predictions have
    `size` (h,w), by default the label's.
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    share = range(rank, len(dataset), world)

    silent = True if rank else None  # None: silent where stderr is no terminal
    items = tqdm(read_ahead(dataset, share), "predict", len(share), disable=silent, leave=False)
    for batch in in_batches(model, items, item_sizes):
        yield from zip(batch, predict_items(model, batch, size, window, flip, head))


# Pixels of a batch of adapt_batchnorm: two images of 2048 x 2048
ADABN_PIXELS = 2 * 2048 * 2048


def adabn_batch(model, image, batch):
    """How many images like this one, (3,H,W), adapt_batchnorm takes at once: `batch`, or fewer."""
    pixels = image[0].numel()
    if getattr(model, "detail", 0):  # details half a side apart: most pixels are in four of them
        pixels *= 4
    return max(1, min(batch, ADABN_PIXELS // pixels))


@torch.no_grad()
def adapt_batchnorm(model, dataset, images=96, batch=8):
    """AdaBN: a copy of the model, in eval mode, with BatchNorm statistics of another domain.

    Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation". The statistics
    come from `images` unlabelled images, evenly spread over the data set: the mean over batches of
    about `batch`, of fewer where images are large. The weights stay. Images of several sizes are
    cropped to the smallest of their batch. A model without BatchNorm is returned as it is, and that
    is said. Raises torch's ValueError where all images together give BatchNorm one value a channel.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        print("AdaBN: this network has no BatchNorm, nothing to adapt", file=sys.stderr)
        return model

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # PyTorch's cumulative average
            module.train()

    count = min(images, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    batch = adabn_batch(model, dataset[int(chosen[0])]["image"], batch)
    for part in np.array_split(chosen, math.ceil(count / batch)):
        loaded = [dataset[int(i)]["image"] for i in part]
        h = min(image.shape[1] for image in loaded)
        w = min(image.shape[2] for image in loaded)
        stacked = torch.stack([image[:, :h, :w] for image in loaded])  # (B,3,h,w)
        for head in model.heads:
            model(to_batch(stacked, model), head)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Metrics


def confusion(pred, label, K):
    """Pixels per pair of classes: int64 (K,K), rows = label, columns = prediction.

    pred: integers in 0..K-1; the result is on its device. label: same shape, 0..K-1 or 255 (left
    out). Raises ValueError on any other label.
    """
    if label.dtype != torch.uint8 and label.numel():
        low, high = label.min(), label.max()
        if low < 0 or high > IGNORE:  # uint8 would take -1 for 255, and 256 for class 0
            raise ValueError(f"labels from {low} to {high} for {K} classes; only 255 may lie "
                             "outside")
    row = label.to(torch.uint8) + 1  # uint8 wraps round: 255 becomes row 0, class k row k + 1
    counts = torch.bincount((row.int() * K + pred).flatten(), minlength=(K + 1) * K)
    if counts.numel() > (K + 1) * K:
        largest = (counts.numel() - 1) // K - 1
        raise ValueError(f"labels up to {largest} for {K} classes; only 255 may lie outside")
    return counts.view(K + 1, K)[1:]


def check_classes(model, dataset):
    """Raise DataError where a network and a data set have other classes, or another order."""
    ours = getattr(model, "classes", None)
    count = getattr(model, "num_classes", None)
    theirs = dataset.classes
    if ours is not None and tuple(ours) != tuple(theirs):
        raise DataError(f"{dataset.spec}: has the classes {', '.join(theirs)}; those of the "
                        f"network are {', '.join(ours)}, in this order; open it with them")
    if count is not None and count != len(theirs):
        raise DataError(f"{dataset.spec}: has {len(theirs)} classes, the network {count}; open it "
                        "with those of the network")


def mean(values):
    """Mean of the values that are not None, None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known)


def number(value, form=".2f"):
    """A number as text, "-" for None."""
    if value is None:
        return "-"
    return format(value, form)


def scores(confusion, names):
    """Percentages of a data set: {"miou", "iou": {name: value}, "accuracy", "absent": names}.

    confusion: its (K,K) matrix. A class in neither labels nor predictions has IoU None, is left out
    of the mean and named in "absent". The 19 Cityscapes classes also get "miou16" and "miou13",
    means over the classes that SYNTHIA has (no terrain, truck, train; nor wall, fence, pole). A
    mean of nothing is None.
    """
    matrix = confusion.cpu().double()  # in this order: MPS has no float64
    hits = matrix.diag()  # (K,)
    union = matrix.sum(0) + matrix.sum(1) - hits  # (K,)
    iou = {}
    for name, hit, all_of_it in zip(names, hits, union):
        iou[name] = 100 * float(hit / all_of_it) if all_of_it else None

    accuracy = None
    if matrix.sum():
        accuracy = 100 * float(hits.sum() / matrix.sum())
    absent = [name for name, value in iou.items() if value is None]
    result = {"miou": mean(iou.values()), "iou": iou, "accuracy": accuracy, "absent": absent}
    if tuple(names) == CLASS_SPACES["cityscapes19"]:
        result["miou16"] = mean(iou[name] for name in CLASS_SPACES["cityscapes16"])
        result["miou13"] = mean(iou[name] for name in CLASS_SPACES["cityscapes13"])
    return result


def pair_counts(confusion, names):
    """What follows from the (K,K) matrix beside scores(), for files: plain numbers.

    dice: {name: 2 * hits / (pixels labelled so + pixels predicted so)}, percent, which is the
    class's F1 over pixels; None for an absent class. mean_dice: over those that are not None.
    confusion: [[pixels]], a row for each label, a column for each prediction.
    """
    matrix = confusion.double().cpu()
    dice = {}
    for name, hit, both in zip(names, matrix.diag(), matrix.sum(0) + matrix.sum(1)):
        dice[name] = 200 * float(hit / both) if both else None
    return {"dice": dice, "mean_dice": mean(dice.values()), "confusion": confusion.tolist()}


def format_scores(result):
    """The scores as text: one class a line, then the means."""
    width = max(map(len, result["iou"]))
    lines = [f"{name:<{width}}  {number(value):>6}" for name, value in result["iou"].items()]

    present = len(result["iou"]) - len(result["absent"])
    means = [f"mIoU ({present} classes) {number(result['miou'])}"]
    for key, title in (("miou16", "mIoU16"), ("miou13", "mIoU13"), ("accuracy", "accuracy")):
        if key in result:
            means.append(f"{title} {number(result[key])}")
    lines.append("  ".join(means))
    if result["absent"]:
        absent = ", ".join(result["absent"])
        lines.append(f"in neither labels nor predictions, left out of the mean: {absent}")
    return "\n".join(lines)


def format_read_outs(results, source_steps):
    """The scores of a run as text: IoU per class and mean, a column each read-out, and what to use.

    results: as in the log's "result" event: source (None, or the scores before adaptation, which
    hold those with AdaBN), student, teacher, adabn (None without BatchNorm or target), recommended.
    """
    before = results["source"]
    columns = {}
    if before:
        columns["source"] = before
        columns["+ AdaBN"] = before["adabn"]
    for name in ("student", "teacher", "adabn"):
        columns[name] = results[name]
    columns = {title: scores for title, scores in columns.items() if scores}

    width = max(len("mIoU"), *map(len, results["student"]["iou"]))
    lines = [" " * width + "".join(f"{title:>9}" for title in columns)]
    for name in results["student"]["iou"]:
        row = [f"{number(scores['iou'][name]):>9}" for scores in columns.values()]
        lines.append(f"{name:<{width}}" + "".join(row))
    row = [f"{number(scores['miou']):>9}" for scores in columns.values()]
    lines.append(f"{'mIoU':<{width}}" + "".join(row))

    if any(scores["absent"] for scores in columns.values()):
        lines.append("-: in neither labels nor predictions, left out of the mean")
    if before:
        lines.append(f"source: before adaptation, after {source_steps} steps on true labels alone")
    if before and before["adabn"]:
        lines.append("+ AdaBN: the same with BatchNorm statistics of target images, untrained")
    lines.append("student: after the last step; teacher: the average of its weights")
    if results["adabn"]:
        lines.append("adabn: the student with BatchNorm statistics of target images")

    name = results["recommended"]
    text = f"recommended: {name}, mIoU {number(results[name]['miou'])}"
    gains = []
    if before:
        gains.append(results[name]["miou"] - before["miou"])
        text += f", {gains[0]:+.2f} over source"
    if before and before["adabn"]:
        gains.append(results[name]["miou"] - before["adabn"]["miou"])
        text += f", {gains[1]:+.2f} over its AdaBN"
    lines.append(text)
    if gains and min(gains) < 0:
        lines.append(f"but on these images the {name} lost by adaptation: source.pt is the network "
                     "from before it, which eval.py scores and uses, also with --adabn")
    return "\n".join(lines)


def ignored_only(dataset):
    """The error of a labelled data set in which no pixel has a class."""
    return DataError(f"{dataset.spec}: split {dataset.split} has ignored pixels only; "
                     "do labels and classes match?")


def evaluate(model, dataset, window=None, flip=False, head="plain", save=None, colors=None,
             counts=False):
    """scores() of a model on a labelled data set plus "images" and "images_per_s".

    All ranks must call it and get the same: each predicts its share, in float32, and the confusion
    matrix is summed once. Labels are as the data set serves them: of split train at the size of
    training, else at their native one. save: an existing folder for one panel per
    image; colors: uint8 (K,3), those of its classes, by default palette's. counts: also those of
    pair_counts. The train/eval mode of every module is restored. Raises DataError where there are
    no labels or only ignored pixels, and on other classes than the network's.
    """
    if not dataset.labeled:
        raise DataError(f"{dataset.spec}: no labels in split {dataset.split}; "
                        "for pictures alone use --images")
    check_classes(model, dataset)
    names = dataset.classes
    if colors is None:
        colors = palette(names)
    K = len(names)
    begin = time.perf_counter()
    total = torch.zeros(K, K, dtype=torch.int64, device=model.pixel_mean.device)
    with eval_mode(model):
        for item, pred in predictions(model, dataset, window, flip, head):
            total += confusion(pred, item["label"].to(pred.device), K)
            if save:
                picture = as_picture(item["image"])
                label = item["label"].numpy()
                sheet = panel(picture, label, pred.cpu().numpy(), names, colors)
                name = item["name"].replace("/", "__")  # of a pool
                save_picture(sheet, Path(save) / f"{name}.png")
    if dist.is_initialized():
        dist.all_reduce(total)
    result = scores(total, names)  # waits for the device
    if result["accuracy"] is None:
        raise ignored_only(dataset)
    if counts:
        result |= pair_counts(total, names)
    result["images"] = len(dataset)
    result["images_per_s"] = len(dataset) / (time.perf_counter() - begin)
    return result


# --------------------------------------------------------------------------------------------------
# Alignment: how near two domains lie in feature space

ROUNDING = 1e-9  # margins and variances of unit vectors below it are what float32 leaves of zero


class Cells(NamedTuple):
    """Sums over the cells of a data set, float64 on the CPU: K classes, features of C channels."""

    sums: torch.Tensor  # (K,C) sum of a class's unit vectors
    second: torch.Tensor  # (C,C) sum of all outer products
    count: torch.Tensor  # (K,) cells of a class
    hits: torch.Tensor  # (K,) those of them whose nearest centroid is their class's


def accumulate_cells(model, dataset, head, centroids=None, known=None):
    """Cells of a labelled data set in one decoder's features.

    Features of a whole image are averaged over 2 x 2 positions (stride 8 where they have 4, 16
    where the network sees the image at half its size too) and scaled to length 1; such a cell
    counts where one class covers 75 % of it. centroids: unit vectors (K,C) of another domain, to
    count hits; `known` (K,) is 0 for a class that has none there. Raises DataError where no cell
    has a class.
    """
    K = len(dataset.classes)
    sums, second = 0, 0  # C is known from the first features
    count = torch.zeros(K).double()
    hits = torch.zeros(K).double()
    items = read_ahead(dataset, range(len(dataset)))
    with eval_mode(model):
        for item in tqdm(items, "alignment", len(dataset), disable=None, leave=False):
            # features are of the context: at two resolutions one detail crop will do, at any corner
            out = model(to_batch(item["image"], model), head, corner=(0, 0))
            features = out.features.float()  # (1,C,H,W)
            h = math.ceil(features.shape[2] / 2)
            w = math.ceil(features.shape[3] / 2)
            unit = F.normalize(cell_means(features, (h, w)), dim=1)
            unit = unit[0].flatten(1).T  # (1,C,h,w) -> (n,C)
            label = majority_label(item["label"][None].to(unit.device), (h, w), K)
            label = label.flatten().cpu()  # (1,h,w) -> (n,)

            has_class = label != IGNORE
            unit = unit.cpu().double()[has_class]  # on the CPU, because MPS has no float64
            label = label[has_class]
            member = F.one_hot(label, K).double()  # (n,K)
            sums = sums + member.T @ unit
            second = second + unit.T @ unit
            count = count + member.sum(0)
            if centroids is not None:
                cosine = (unit @ centroids.T).masked_fill(known == 0, -2)  # (n,K)
                hits += member[cosine.argmax(1) == label].sum(0)
    if not count.sum():
        raise DataError(f"{dataset.spec}: no cell of split {dataset.split} has a class; "
                        "do labels and classes match?")
    return Cells(sums, second, count, hits)


def effective_rank(cells):
    """exp(entropy) of the normalised eigenvalues of the cells' covariance, 1..C, None without any.

    Roy & Vetterli 2007, "The Effective Rank".
    """
    n = cells.count.sum()
    center = cells.sums.sum(0) / n  # (K,C) -> (C,)
    covariance = cells.second / n - center.outer(center)  # (C,C)
    spectrum = torch.linalg.eigvalsh(covariance).clamp(min=0)
    if spectrum.sum() <= ROUNDING:
        return None
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp().item()


def class_margin(centroids):
    """Mean 1 - cosine over pairs of different classes, from unit rows (P,C); None for one class."""
    P = len(centroids)
    if P < 2:
        return None
    pairs = (centroids @ centroids.T).sum().item() - P  # the sum without its P ones
    return max(0.0, 1 - pairs / (P * (P - 1)))


def compare_domains(names, source, target):
    """The measures of alignment() from the Cells of both domains -> dict of plain numbers."""
    near = F.normalize(source.sums, dim=1)  # (K,C)
    far = F.normalize(target.sums, dim=1)  # (K,C)
    both = (source.count > 0) & (target.count > 0)  # (K,)
    distance = (1 - (near * far).sum(1)).clamp(min=0).tolist()
    accuracy = (100 * target.hits / target.count).tolist()

    absent = []
    classes = {}
    for k, name in enumerate(names):
        shared = bool(both[k])
        if not shared:
            absent.append(name)
        classes[name] = {
            "source_cells": int(source.count[k]),
            "target_cells": int(target.count[k]),
            "distance": distance[k] if shared else None,
            "nearest_accuracy": accuracy[k] if shared else None,
        }

    mean_distance = mean(row["distance"] for row in classes.values())
    margin = class_margin(far[both])
    ratio = None
    if margin is not None and margin > ROUNDING:
        ratio = mean_distance / margin
    nearest = None
    if both.any():
        nearest = 100 * (target.hits[both].sum() / target.count[both].sum()).item()
    return {
        "absent": absent,
        "classes": classes,
        "distance": mean_distance,
        "margin": margin,
        "margin_source": class_margin(near[both]),
        "ratio": ratio,
        "nearest_accuracy": nearest,
        "nearest_class_accuracy": mean(row["nearest_accuracy"] for row in classes.values()),
        "effective_rank": effective_rank(target),
        "effective_rank_source": effective_rank(source),
    }


MEASURES = ("distance", "margin", "margin_source", "ratio", "nearest_accuracy",
            "nearest_class_accuracy", "effective_rank", "effective_rank_source")


ONE_HEAD = ("alignment is measured in the features of one decoder: --head plain or language, not "
            "mean")


@torch.no_grad()
def alignment(model, source, target, head="plain"):
    """How near two labelled data sets of the same K classes lie in one decoder's features.

    Returns a dict of plain numbers; a measure that is not defined is None. A cell is a patch of
    8 x 8 pixels in most networks (see accumulate_cells), a class's centroid the mean of its cells.
    classes: {name: source_cells, target_cells, distance, nearest_accuracy}. distance is 1 - cosine
    of the two domains' centroids, 0..2. nearest_accuracy is the percentage of target cells whose
    nearest source centroid, by cosine, is that of their own class.
    distance, nearest_class_accuracy: means over classes. nearest_accuracy: over cells.
    margin, margin_source: mean 1 - cosine of two classes' centroids, 0 where they collapse.
    ratio: distance / margin.
    absent: classes without a cell in one of the domains, left out of all these.
    effective_rank, effective_rank_source: of all cells, see there. The other measures are ours.
    Raises DataError without labels or cells, on other classes than the network's, and on head
    "mean", which has no features of its own.
    """
    if head == "mean":
        raise DataError(ONE_HEAD)
    for dataset in (source, target):
        if not dataset.labeled:
            raise DataError(f"{dataset.spec}: no labels in split {dataset.split}; "
                            "alignment needs those of both domains")
        check_classes(model, dataset)
    from_source = accumulate_cells(model, source, head)
    centroids = F.normalize(from_source.sums, dim=1)  # (K,C)
    from_target = accumulate_cells(model, target, head, centroids, from_source.count)
    about = {"source": source.spec, "target": target.spec, "head": head}
    return about | compare_domains(target.classes, from_source, from_target)


def format_alignment(result):
    """The alignment as text: one class a line, then the measures over all classes."""
    width = max(map(len, result["classes"]))
    titles = ("source cells", "target cells", "distance", "nearest %")
    lines = [
        f"alignment: source {result['source']}, target {result['target']}, "
        f"features of the {result['head']} decoder",
        " " * width + "".join(f"{title:>14}" for title in titles),
    ]
    for name, row in result["classes"].items():
        distance = number(row["distance"], ".3f")
        nearest = number(row["nearest_accuracy"], ".2f")
        lines.append(
            f"{name:<{width}}{row['source_cells']:>14}{row['target_cells']:>14}"
            f"{distance:>14}{nearest:>14}"
        )
    measures = [f"{key.replace('_', ' ')} {number(result[key], '.3f')}" for key in MEASURES]
    lines.append("  ".join(measures))
    if result["absent"]:
        absent = ", ".join(result["absent"])
        lines.append(f"without a cell in one of the domains, left out: {absent}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Pictures: uint8 arrays (h,w,3) until they are saved


def fitted(ids, picture):
    """Ids uint8 (h,w) at the size of the picture, taken from the nearest pixel."""
    h, w = picture.shape[:2]
    return np.asarray(Image.fromarray(ids).resize((w, h), Image.Resampling.NEAREST))


def panel(picture, label, prediction, names, colors):
    """
    PIL image, one row: image, label (None: left out), prediction, overlay, all of one size; below
    it a legend.
    """
    prediction = fitted(prediction, picture)
    row = {"image": picture}
    shown = [prediction]
    if label is not None:
        label = fitted(label, picture)
        row["label"] = colorize(label, colors)
        shown.append(label)
    row["prediction"] = colorize(prediction, colors)
    row["overlay"] = overlay(picture, prediction, colors)
    sheet = grid([list(row.values())], list(row))
    return with_legend(sheet, legend(shown, names, colors))


def training_panel(model, views, names, rows=4):
    """PIL image of what a training step saw, one sample a row, and a legend.

    views: title -> float images (B,3,S,S) in [0,1] or uint8 labels (B,S,S). The last column is the
    model's prediction of the view called target, of source where there is none.
    """
    seen = views.get("target", views["source"])
    with eval_mode(model):
        views = views | {"prediction": predict_labels(model, seen)}
    colors = palette(names)
    sheet, shown = [], []
    # a pass without a teacher may see labelled target images beside those of the source
    fewest = min(len(view) for view in views.values())
    for i in range(min(rows, fewest)):
        row = []
        for view in views.values():
            if view.ndim == 4:
                row.append(as_picture(view[i]))
            else:
                ids = view[i].cpu().numpy()
                row.append(colorize(ids, colors))
                shown.append(ids)
        sheet.append(row)
    return with_legend(grid(sheet, list(views)), legend(shown, names, colors))


@torch.no_grad()
def gain_per_frame(before, after, dataset, **how):
    """What `after` gains over `before`: {"before", "after", "pixels", "ignored"}, [(gain, index)].

    before, after: pixel accuracy over all images, percent; pixels, ignored: labelled ones and the
    rest. gain: percentage points of one frame; a frame without a labelled pixel has none. how:
    window, flip and head as in predict. Raises DataError where no pixel has a label.
    """
    right = {"before": 0, "after": 0}
    pixels, ignored = 0, 0
    gains = []
    items = read_ahead(dataset, range(len(dataset)))
    for i, item in enumerate(tqdm(items, "compare", len(dataset), disable=None, leave=False)):
        label = item["label"]
        known = int((label != IGNORE).sum())
        hits = {}
        for name, model in (("before", before), ("after", after)):
            pred = predict_item(model, item, **how).cpu()
            hits[name] = int((pred == label).sum())  # no class has the id of ignored pixels
            right[name] += hits[name]
        if known:
            gains.append((100 * (hits["after"] - hits["before"]) / known, i))
        pixels += known
        ignored += label.numel() - known
    if not pixels:
        raise ignored_only(dataset)
    accuracies = {name: 100 * count / pixels for name, count in right.items()}
    return accuracies | {"pixels": pixels, "ignored": ignored}, gains


def before_after(before, after, dataset, titles=("before", "after"), colors=None, **how):
    """What one model gains over another on a labelled data set -> PIL image, report.

    The image shows the three frames around the median gain in pixel accuracy, not the best ones:
    image, label, prediction before, prediction after, one frame a row, then a legend of the classes
    that occur. report: see gain_per_frame, and "frames": [(name, gain)]. One process does all the
    work. colors: as in evaluate. Raises DataError where there are no labels or only ignored pixels,
    and on other classes than the networks'.
    """
    if not dataset.labeled:
        raise DataError(f"{dataset.spec}: no labels in split {dataset.split}; a gain needs them")
    check_classes(before, dataset)
    check_classes(after, dataset)
    if colors is None:
        colors = palette(dataset.classes)
    rows, frames, shown = [], [], []
    with eval_mode(before), eval_mode(after):
        report, gains = gain_per_frame(before, after, dataset, **how)
        gains.sort()
        middle = len(gains) // 2
        for gain, i in gains[max(0, middle - 1):middle + 2]:
            item = dataset[i]
            picture = as_picture(item["image"])
            row = [picture]
            pred_before = predict_item(before, item, **how)
            pred_after = predict_item(after, item, **how)
            for ids in (item["label"], pred_before, pred_after):
                row.append(colorize(fitted(ids.cpu().numpy(), picture), colors))
                shown.append(ids.cpu())
            rows.append(row)
            frames.append((item["name"], gain))

    sheet = grid(rows, ["image", "label", *titles])
    sheet = with_legend(sheet, legend(shown, dataset.classes, colors))
    return sheet, report | {"frames": frames}


# --------------------------------------------------------------------------------------------------
# Own images and benchmark servers

# Label ids in the order of the train ids: both count the 19 classes in one order.
TRAIN_TO_LABEL_IDS = sorted(raw for raw, name in LABEL_IDS.names.items() if name)
# Kind of data set: size (h,w) that the server wants, id written for each train id, file names.
SERVERS = {
    "cityscapes": ((1024, 2048), TRAIN_TO_LABEL_IDS, r"[^_]+_\d{6}_\d{6}.*"),
    "acdc": ((1080, 1920), range(19), ".+"),
    "darkzurich": ((1080, 1920), range(19), ".+"),
}


LONGEST_NAME = 255  # bytes, of a file on the usual file systems


def images_below(path, results):
    """The image file `path`, or all images below the folder `path`, sorted.

    Hidden files (a Mac's ._photo.jpg) do not count, nor what lies in a folder of results inside.
    Raises DataError where there are none, and where results would lie among them.
    """
    path = Path(path)
    results = Path(results).resolve()
    folder = path if path.is_dir() else path.parent
    if results == folder.resolve():
        raise DataError(f"--save {results}: the folder of the images themselves, of which results "
                        "would be some the next time; give another one")
    if not path.is_dir():
        return [path]
    inside = path.resolve() in results.parents
    files = []
    for file in walk(path):
        ours = inside and results in file.resolve().parents
        if file.suffix.lower() in SUFFIXES and not ours:
            files.append(file)
    if not files:
        raise DataError(f"{path}: no images here ({', '.join(sorted(SUFFIXES))})")
    return sorted(files)


class Picture(NamedTuple):
    """An image file that could be read."""

    file: Path
    pixels: np.ndarray  # uint8 (h,w,3)
    image: torch.Tensor  # uint8 (3,h',w'), as the network sees it


def read_pictures(files, size, antialias, faults):
    """Yield the Picture of each file that can be read, and add a line to `faults` for each other.

    size, antialias: see predict_images. Raises DataError where no file can be read.
    """
    for file in tqdm(files, "images", disable=None, leave=False):
        try:
            if len(os.fsencode(f"{file.name}_panel.png")) > LONGEST_NAME:
                raise DataError(f"{file}: a name too long to add _panel.png to it; shorten it")
            pixels = read_image(file)  # (h,w,3)
        except DataError as error:
            faults.append(str(error))
            if len(faults) == len(files):
                raise
            continue
        h, w = pixels.shape[:2]
        scale = 1
        if size:
            scale = max(size) / max(h, w)
        at_scale = tuple(max(1, round(side * scale)) for side in (w, h))
        small = np.array(resize_image(pixels, at_scale, antialias))
        image = torch.from_numpy(small).permute(2, 0, 1).contiguous()  # (h',w',3) -> (3,h',w')
        yield Picture(file, pixels, image)


def picture_sizes(picture):
    """Height and width of a Picture at the network, and its own shape."""
    return *picture.image.shape[1:], picture.pixels.shape


def names_of_results(files):
    """{file: the name of what is written for it}: its own without the suffix where that is clear.

    Not so where a.jpg lies beside a.png, or beside a.jpg.png.
    """
    stems = Counter((file.parent, file.stem) for file in files)
    known = set(files)
    names = {}
    for file in files:
        clear = stems[file.parent, file.stem] == 1 and file.with_suffix("") not in known
        names[file] = file.stem if clear else file.name
    return names


def predict_images(model, path, names, folder, size=None, window=None, flip=False, head="plain",
                   colors=None, antialias=True):
    """Predict an image file, or every image below a folder.

    Writes NAME_ids.png (values are ids, the palette inside has their colours) and NAME_panel.png
    (image, prediction, overlay, legend) to `folder`, at the image's own size, in the sub-folders in
    which the images lie; NAME is the file's own. The network sees images at the training scale:
    their longer side is that of `size` (W,H). colors: as in evaluate; antialias: as in
    resize_image. Returns "images", their number, "share", {name: percent of the pixels that were
    given this class}, and "unreadable", a line for each file that cannot be read. Raises DataError
    where none can, and where results would lie among the images.
    """
    path = Path(path)
    folder = Path(folder)
    files = images_below(path, folder)
    if colors is None:
        colors = palette(names)
    stems = names_of_results(files)
    pixels = np.zeros(len(names), np.int64)
    faults = []
    pictures = read_pictures(files, size, antialias, faults)
    for batch in in_batches(model, pictures, picture_sizes):
        images = torch.stack([picture.image for picture in batch])  # B of (3,h',w') -> (B,3,h',w')
        own_size = batch[0].pixels.shape[:2]
        labels = predict_labels(model, to_batch(images, model), own_size, window, flip=flip,
                                head=head)
        for picture, label in zip(batch, labels.cpu().numpy()):
            pixels += np.bincount(label.flatten(), minlength=len(names))
            place = folder
            if path.is_dir():
                place = folder / picture.file.parent.relative_to(path)
            place.mkdir(parents=True, exist_ok=True)
            name = stems[picture.file]
            save_ids(place / f"{name}_ids.png", label, colors)
            sheet = panel(picture.pixels, None, label, names, colors)
            save_picture(sheet, place / f"{name}_panel.png")
    share = dict(zip(names, (100 * pixels / pixels.sum()).tolist()))
    return {"images": len(files) - len(faults), "share": share, "unreadable": faults}


def check_submission(dataset, folder):
    """What a benchmark's server takes: (size, ids, {name of an image: stem of its file}).

    Raises DataError on other data sets or classes, a folder that is not empty, and names that the
    server refuses.
    """
    kind = dataset.spec.partition(":")[0]
    if kind not in SERVERS or dataset.classes != CLASS_SPACES["cityscapes19"]:
        raise DataError(f"{dataset.spec}: --submit needs the 19 Cityscapes classes and one of "
                        f"{', '.join(SERVERS)}")
    size, ids, pattern = SERVERS[kind]
    stems = {name: image.stem for name, (image, _) in zip(dataset.names, dataset.files)}
    for stem, count in Counter(stems.values()).items():
        if count > 1 or not re.fullmatch(pattern, stem):
            raise DataError(f"{dataset.spec}: the server would refuse {stem}.png: not its naming, "
                            "or there twice")
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise DataError(f"{folder}: not empty; --submit needs a folder of its own, the server "
                        "reads every file")
    return size, np.array(ids, np.uint8), stems


def submit(model, dataset, folder, window=None, flip=False, head="plain"):
    """Write what the benchmark's server takes; returns the number of images.

    That is one PNG of ids per image in a flat, empty folder. Cityscapes wants label ids in files
    <city>_<sequence>_<frame>*.png, ACDC and Dark Zurich train ids under the image's name. Raises
    DataError as check_submission does.
    """
    size, ids, stems = check_submission(dataset, folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for item, label in predictions(model, dataset, window, flip, head, size):
        written = ids[label.cpu().numpy()]
        save_picture(Image.fromarray(written), folder / f"{stems[item['name']]}.png")
    return len(dataset)


# --------------------------------------------------------------------------------------------------
# Tables over runs: a row is a run's name without its seed

# Student's t, two-sided 95 %, 1 to 20 degrees of freedom. More runs take the last one, and their
# interval is a little too wide.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
# What has to be the same in all runs of one table: flags, and what read_run adds to them. Size,
# crop and batch need not be: labels are scored at their own size, and rows at one and at several
# resolutions differ in all three. Nor need steps, which the table then shows.
COMPARABLE = ("target", "val", "classes", "backbone", "decoder", "channels", "init",
              "slide", "validation images", "resizing of predictions")
# Flags that may differ within a row: the seed, and those that change no number. The number of
# processes counts by the images per step.
FREE = {"seed", "out", "cache", "workers", "stop_at", "eval_every", "save_every", "log_every",
        "world", "compile", "checkpointing", "device"}
# What a run did whose log is older than the flag, where that is not None, False or 0.
BEFORE_THE_FLAG = {"text": "auto", "tau": 0.1, "labeled": "0"}


class Run(NamedTuple):
    """What a table takes from one log."""

    path: str  # as the user gave it
    row: str  # name of its row
    flags: dict  # as of today, and what follows from them
    inputs: dict  # {flag: digest of what lay there, wherever that was}; empty in an old log
    labels: int  # number of labelled target images
    result: dict  # scores of each read-out, None in a run without validation data


def row_name(log, seed):
    """The run's name without a trailing -SEED: its folder's, or that of a renamed log file."""
    name = log.stem
    if log.name == "log.jsonl":
        name = Path(os.path.abspath(log)).parent.name
    return name.removesuffix(f"-{seed}") or name


def is_event(line):
    """Whether a line of a log, as JSON has it, is an event of train.py with what readers need."""
    if not isinstance(line, dict):
        return False
    kind = line.get("event")
    if kind in ("start", "resume"):
        flags = line.get("flags")
        return isinstance(flags, dict) and {"recipe", "seed"} <= flags.keys()
    if kind == "eval":
        return is_score(line.get("student"), {"miou"})
    if kind == "result":
        others = [line[name] for name in ("teacher", "adabn") if line.get(name)]
        return all(is_score(one, {"miou", "iou"}) for one in (line.get("student"), *others))
    return kind is not None and isinstance(line.get("step", 0), int)


def is_score(value, needed):
    """Whether a value of a log is the scores of a network, with what is needed of them."""
    if not isinstance(value, dict) or not needed <= value.keys():
        return False
    if "iou" in needed:
        if not isinstance(value["iou"], dict):
            return False
        for iou in value["iou"].values():
            if not isinstance(iou, (int, float, type(None))):
                return False
    return isinstance(value["miou"], (int, float)) and math.isfinite(value["miou"])


def read_events(log):
    """The events of a log, list of dict. Half a line, which a killed run leaves, is none."""
    events = []
    for line in Path(log).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if is_event(event):
                events.append(event)
    return events


def read_log(path, flag):
    """(log file, its events) of a run folder or a log file. Raises DataError on what is no log.

    flag: of the command line, for the message.
    """
    log = Path(path)
    if log.is_dir():
        log = log / "log.jsonl"
    takes = f"{flag} takes run folders, train.py's --out, or their log.jsonl"
    if log.suffix == ".pt":
        raise DataError(f"{log}: a checkpoint; {takes}")
    if Path(path).is_dir() and not log.exists():
        raise DataError(f"{path}: a folder without log.jsonl; {takes}")
    if not log.is_file():
        raise DataError(f"{log}: no such log; check the path; {takes}")
    return log, read_events(log)


def last_run(events):
    """(start, result) of the run that began last in a log, each an event or None.

    A result counts only with the flags of its own run: by the run's id or, in logs without ids,
    if it comes after the run's start. A run that goes on where the log is gone starts there.
    """
    start, result = None, None
    for event in events:
        known = start and event.get("run") == start.get("run")
        if event["event"] == "start" or (event["event"] == "resume" and not known):
            start, result = event, None
        elif event["event"] == "result" and known:
            result = event
    return start, result


def images_per_step(flags):
    """Images of each domain that one optimiser step sees, over all processes."""
    return flags.get("batch", 1) * flags.get("accum", 1) * flags.get("world", 1)


def read_run(path):
    """The Run of a run folder or a log file. Raises DataError where the run has not finished."""
    log, events = read_log(path, "--table")
    start, result = last_run(events)
    if start is None:
        raise DataError(f"{log}: no start event: no log of train.py; --table takes run folders or "
                        "their log.jsonl")
    if start["flags"].get("val") == "none":
        result = None
    elif result is None:
        raise DataError(f"{log}: no result event of the run that began last: it has not finished; "
                        "the same command goes on")

    flags = current_flags(start["flags"])
    if flags.get("dtype") == "auto":  # logs from before the answer was logged
        device = start.get("versions", {}).get("device", "")
        flags["dtype"] = "fp32" if device.startswith("cpu") else "bf16"
    flags["images per step"] = images_per_step(flags)
    if result:
        flags["validation images"] = result["student"].get("images")
        # see predict(); it was one step as long as logs had no ids of runs
        steps = "in two steps" if "run" in result else "in one step, as older scripts did"
        flags["resizing of predictions"] = steps
        flags["slide"] = result.get("slide", flags.get("slide"))
        names = [list(result[name]["iou"]) for name in ("student", "teacher", "adabn")
                 if result.get(name)]
        if any(other != names[0] for other in names):
            raise DataError(f"{log}: its read-outs have scores of different classes; no table can "
                            "hold them")
    inputs = dict(start.get("inputs") or {})
    if bank := start.get("text"):
        inputs["text"] = f"{bank.get('kind')} {bank['rows_sha256']}"
    labels = len(start.get("labeled") or [])
    return Run(str(path), row_name(log, flags["seed"]), flags, inputs, labels, result)


def adapts(flags):
    """Whether a step needs target images and what the teacher says of them. flags: a run's, a dict.

    T2S-DA weighs its classes by that, SePiCo contrasts them.
    """
    asks_teacher = (flags.get("t2s") or flags.get("sepico")) and flags.get("target") != "none"
    return bool(flags.get("mix") or flags.get("mask") or flags.get("consistency") or asks_teacher)


def flag_of(run, name):
    """Value of a run's flag; None, False, 0 and nothing all mean off, which is None here."""
    return run.flags.get(name, BEFORE_THE_FLAG.get(name)) or None


def differences(run, other, names):
    """What `run` has instead of `other` in these flags, as text: "fd 0.01 instead of None, ..."."""
    found = []
    for name in names:
        mine = flag_of(run, name)
        theirs = flag_of(other, name)
        same = mine == theirs
        if run.inputs.get(name) and other.inputs.get(name):  # what lies there counts, not where
            alike = run.inputs[name] == other.inputs[name]
            if same and not alike:
                mine = f"{mine} (digest {run.inputs[name]})"
                theirs = f"{theirs} (digest {other.inputs[name]})"
            same = alike
        if not same:
            found.append(f"{name} {mine} instead of {theirs}")
    return ", ".join(found)


def group_runs(runs):
    """Runs -> {row: {seed: run}}. Raises DataError on runs that one table, or row, cannot hold."""
    rows = {}
    first = runs[0]
    for run in runs:
        compared = list(COMPARABLE)
        if "none" in (flag_of(run, "target"), flag_of(first, "target")):
            # Domain generalisation is validated on the same data, and sees none of it before.
            compared.remove("target")
        if different := differences(run, first, compared):
            raise DataError(f"{run.path}: not comparable with {first.path}: {different}")
        names = [list(one.result["student"]["iou"]) for one in (run, first)]
        if names[0] != names[1]:
            raise DataError(f"{run.path}: not comparable with {first.path}: scores of the classes "
                            f"{', '.join(names[0])} instead of {', '.join(names[1])}")

        row = rows.setdefault(run.row, {})
        for other in row.values():
            names = sorted({*run.flags, *other.flags} - FREE)
            if different := differences(run, other, names):
                raise DataError(f"{run.path}: not of one row {run.row} with {other.path}: "
                                f"{different}; rename one of them")
        seed = run.flags["seed"]
        if seed in row:
            raise DataError(f"{run.path}: a second run of {run.row} with seed {seed}, beside "
                            f"{row[seed].path}")
        row[seed] = run
    return rows


def read_runs(paths):
    """The rows of group_runs, from run folders or logs; names and skips runs without scores."""
    runs = []
    for path in paths:
        run = read_run(path)
        if run.result:
            runs.append(run)
        else:
            print(f"{path}: no scores, the run had --val none; left out", file=sys.stderr)
    if not runs:
        raise DataError("--table: none of these runs has scores")
    return group_runs(runs)


def source_only_row(rows):
    """Name of the row that trained on the source alone, None if there is none.

    Raises DataError where several rows did.
    """
    found = []
    for row, seeds in rows.items():
        run = next(iter(seeds.values()))
        source_only = run.flags["recipe"] == "source" and not adapts(run.flags)
        if source_only and flag_of(run, "labeled") == "0":
            found.append(row)
    if len(found) > 1:
        raise DataError(f"--table: {', '.join(found)} are all of recipe source, so that it is not "
                        "clear which AdaBN is the reference; name a row with --against")
    if not found:
        return None
    return found[0]


def spread(values):
    """(mean, standard deviation with n - 1, half width of the 95 % t-interval of the mean).

    The last two are None where n = 1.
    """
    n = len(values)
    center = statistics.fmean(values)
    if n == 1:
        return center, None, None
    deviation = statistics.stdev(values)
    t = T_975[min(n - 1, len(T_975)) - 1]
    return center, deviation, t * deviation / math.sqrt(n)


def markdown(header, rows):
    """Markdown table; header and rows are lists of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def difference_cells(found, base):
    """Three cells: mean difference of the seeds that both have, its 95 % interval, their number.

    found, base: {seed: mIoU}.
    """
    pairs = [found[seed] - base[seed] for seed in found if seed in base]
    if not pairs:
        return ["-", "-", "0"]
    gain, _, half = spread(pairs)
    interval = "-"
    if half is not None:
        interval = f"{gain - half:+.1f} to {gain + half:+.1f}"
    return [f"{gain:+.1f}", interval, str(len(pairs))]


def read_outs(rows):
    """{(row, read-out): {seed: scores}} from the rows of group_runs, what no run has left out."""
    found = {}
    for row, runs in rows.items():
        for readout in ("student", "teacher", "adabn"):
            for seed, run in runs.items():
                if run.result.get(readout):
                    found.setdefault((row, readout), {})[seed] = run.result[readout]
    return found


def titles_of_rows(rows):
    """{row: what a table calls it}: its name, with its steps where those of the rows differ."""
    steps = {}
    for row, runs in rows.items():
        run = next(iter(runs.values()))
        steps[row] = flag_of(run, "steps")
    if len(set(steps.values())) == 1:
        return {row: row for row in rows}
    return {row: f"{row}, {count} steps" for row, count in steps.items()}


def table(paths, against=None):
    """Markdown: mIoU of each row's read-outs over seeds, paired differences, then the IoUs.

    paths: run folders or logs; a row is a run's name without its seed. The differences are to the
    same read-out of the row `against`. Without it they are to the AdaBN read-out of the row that
    trained on the source alone: the fair reference, because the BatchNorm of an adapted teacher has
    seen the target too. Raises DataError on a file that is no finished log, on runs that are not
    comparable, and where there is no row `against` or no single reference.
    """
    rows = read_runs(paths)
    if against and against not in rows:
        raise DataError(f"--against {against!r}: no such row; there are: {', '.join(rows)}")
    reference = against or source_only_row(rows)
    found = read_outs(rows)
    titles = titles_of_rows(rows)
    seeds = set()
    for results in found.values():
        seeds.update(results)
    seeds = sorted(seeds)
    header = ["run", "read-out", *(f"seed {seed}" for seed in seeds), "mean ± sd"]
    if reference:
        title = against or f"{reference} AdaBN"
        header += [f"minus {title}", "95 % interval", "pairs"]

    means = []
    for (row, readout), results in found.items():
        mious = {seed: result["miou"] for seed, result in results.items()}
        center, deviation, _ = spread(list(mious.values()))
        cells = [titles[row], readout]
        cells += [number(mious.get(seed), ".1f") for seed in seeds]
        cells.append(f"{center:.1f} ± {number(deviation, '.1f')}")
        if reference:
            beside = (reference, readout if against else "adabn")
            if (row, readout) == beside:
                cells += ["reference", "-", str(len(mious))]
            else:
                base = {seed: result["miou"] for seed, result in found.get(beside, {}).items()}
                cells += difference_cells(mious, base)
        means.append(cells)

    classes = []
    first = next(iter(found.values()))  # {seed: scores}
    names = list(next(iter(first.values()))["iou"])
    for (row, readout), results in found.items():
        cells = [titles[row], readout]
        for name in names:
            cells.append(number(mean(result["iou"][name] for result in results.values()), ".1f"))
        classes.append(cells)
    ious = markdown(["run", "read-out", *names], classes)
    return f"{markdown(header, means)}\n\nIoU, mean over seeds\n\n{ious}"


# --------------------------------------------------------------------------------------------------
# Curve over runs: mIoU over the number of labelled target images

CURVE_COLOURS = ((90, 90, 90), (31, 112, 180), (192, 57, 43), (230, 140, 40), (60, 150, 70),
                 (130, 80, 170))


def label_curves(rows):
    """Lines over the number of labelled target images -> [(name, read-out, points)], ticks.

    rows: of group_runs; those with the same recipe and source are one line, named by the runs
    without their --labeled. points: {labels: [mIoU of each seed]}; ticks: {labels: text}. Read-outs
    are the student and, where the recipe learns from it, the teacher, else AdaBN. Raises DataError
    on rows that cannot be told apart by --labeled.
    """
    groups = {}
    ticks = {}
    first = next(iter(next(iter(rows.values())).values()))
    for row, runs in rows.items():
        run = next(iter(runs.values()))
        source = flag_of(run, "source")
        if source == flag_of(run, "target"):
            raise DataError(f"--picture: {row} learns from all labels of the target; leave it out")
        if different := differences(run, first, ["steps"]):
            raise DataError(f"--picture: {row} has {different}; leave one out")
        group = groups.setdefault((run.flags["recipe"], str(source)), {})
        if run.labels in group:
            raise DataError(f"--picture: {group[run.labels]} and {row} are the same recipe, source "
                            "and number of labels; leave one out")
        for other in group.values():
            beside = next(iter(rows[other].values()))
            names = sorted({*run.flags, *beside.flags} - FREE - {"labeled"})
            if different := differences(run, beside, names):
                raise DataError(f"--picture: {row} and {other} are no one line: {different}; leave "
                                "one out")
        group[run.labels] = row
        ticks[run.labels] = str(run.labels)
        if flag_of(run, "labeled") == "all":
            ticks[run.labels] = f"all ({run.labels})"
    if len(ticks) < 2:
        raise DataError("--picture: draws mIoU over the number of labelled images (--labeled), and "
                        "all of these runs have the same")

    found = read_outs(rows)
    curves = []
    for group in groups.values():
        names = Counter()
        for row in group.values():
            run = next(iter(rows[row].values()))
            names[row.removesuffix(f"-{flag_of(run, 'labeled')}")] += 1
        name, _ = names.most_common(1)[0]
        for readout in ("student", "teacher" if adapts(run.flags) else "adabn"):
            points = {}
            for labels, row in sorted(group.items()):
                results = found.get((row, readout), {})
                if results:
                    points[labels] = [result["miou"] for result in results.values()]
            if points:
                curves.append((name, readout, points))
    return curves, ticks


def axis_values(least, most, finest=1):
    """Two to nine round numbers of an axis that covers least..most, at least `finest` apart.

    Whole numbers where finest is 1.
    """
    step = finest
    for i in itertools.cycle((2, 2.5, 2)):  # 1, 2, 5, 10, 20, ...
        if (most - least) / step <= 7:
            break
        step *= i
    if finest >= 1:
        step = round(step)
    first = math.floor(least / step)
    last = max(first + 1, math.ceil(most / step))
    return [step * i for i in range(first, last + 1)]


def curve_colours(names):
    """A colour (r,g,b) for each name; no two are alike."""
    if len(names) <= len(CURVE_COLOURS):
        return list(CURVE_COLOURS[:len(names)])
    return [tuple(colour) for colour in palette([f"line {i}" for i in range(len(names))]).tolist()]


def draw_curves(curves, ticks):
    """PIL image: a line through the means over seeds, a dot per seed. Arguments: see label_curves.

    The numbers of labels stand at equal distances. Drawn three times as large and scaled down,
    because Pillow's lines have no soft edges.
    """
    scale = 3
    width, height = 900 * scale, max(400, 60 + 22 * len(curves)) * scale  # room for the legend
    left, right, top, bottom = 50 * scale, 650 * scale, 30 * scale, 350 * scale
    font = ImageFont.load_default(13 * scale)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    every = []
    for _, _, points in curves:
        for mious in points.values():
            every += mious
    marks = axis_values(min(every), max(every))
    order = sorted(ticks)

    def x_of(labels):
        return left + (right - left) * (order.index(labels) + 0.5) / len(order)

    def y_of(miou):
        return bottom - (bottom - top) * (miou - marks[0]) / (marks[-1] - marks[0])

    for mark in marks:
        draw.line((left, y_of(mark), right, y_of(mark)), (225, 225, 225), scale)
        draw.text((left - 8 * scale, y_of(mark)), str(mark), "black", font, anchor="rm")
    for labels in order:
        draw.line((x_of(labels), top, x_of(labels), bottom), (225, 225, 225), scale)
        draw.text((x_of(labels), bottom + 8 * scale), ticks[labels], "black", font, anchor="mt")
    draw.text((left, 8 * scale), "mIoU, %", "black", font)
    draw.text(((left + right) / 2, height - 8 * scale), "target images with labels", "black", font,
              anchor="mb")

    names = list(dict.fromkeys(name for name, _, _ in curves))
    colours = curve_colours(names)
    for i, (name, readout, points) in enumerate(curves):
        colour = colours[names.index(name)]
        if readout != "student":  # the lighter one of a pair
            colour = tuple((c + 255) // 2 for c in colour)
        line = [(x_of(labels), y_of(statistics.fmean(mious))) for labels, mious in points.items()]
        draw.line(line, colour, 2 * scale, joint="curve")
        for labels, mious in points.items():
            for miou in mious:
                draw.circle((x_of(labels), y_of(miou)), 3 * scale, colour)
        y = top + (10 + 22 * i) * scale
        draw.line((right + 15 * scale, y, right + 45 * scale, y), colour, 2 * scale)
        draw.text((right + 52 * scale, y), f"{name}, {readout}", "black", font, anchor="lm")
    return sheet.resize((width // scale, height // scale), Image.Resampling.LANCZOS)


# --------------------------------------------------------------------------------------------------
# Curves over steps: mIoU and losses of runs, one panel each

# Numbers of a log's step lines that are no loss
NO_LOSS = ("step", "images_per_s", "lr", "grad_norm", "peak_mib", "share_of_peak", "class_weights")


def logged_numbers(events):
    """Yield (step, title of a panel, number) of the run that began last in a log."""
    start, _ = last_run(events)
    begin = 0
    for i, event in enumerate(events):
        if event is start:
            begin = i
    for event in events[begin:]:
        found = {}
        if event["event"] == "step":
            for key, value in event.items():
                if key == "gate":  # a number to watch
                    found[key] = value
                elif key not in NO_LOSS:
                    found[f"loss: {key}"] = value
        else:
            for name in ("student", "teacher"):
                if isinstance(event.get(name), dict):
                    found[f"mIoU, % ({name})"] = event[name].get("miou")
        for title, value in found.items():
            if "step" in event and type(value) in (int, float):
                yield event["step"], title, value


def step_curves(paths):
    """{title of a panel: {run: {step: number}}}, mIoU first, from run folders or logs.

    A run is named by its folder or file, by the path as given where two have the same name. Of a
    log with several runs the last one counts, and lines that a resumed run has written twice count
    once. Raises DataError on a log without any number.
    """
    logs = [read_log(path, "--curves") for path in paths]
    names = []
    for log, _ in logs:
        folder = Path(os.path.abspath(log)).parent
        names.append(folder.name if log.name == "log.jsonl" else log.stem)
    panels = {"mIoU, % (student)": {}, "mIoU, % (teacher)": {}}
    for path, name, (log, events) in zip(paths, names, logs):
        run = name if names.count(name) == 1 else str(path)
        found = {}
        for step, title, value in logged_numbers(events):
            found.setdefault(title, {})[step] = value
        finite = {}
        for title, points in found.items():
            kept = {step: value for step, value in sorted(points.items()) if math.isfinite(value)}
            if kept:
                finite[title] = kept
        if not finite:
            raise DataError(f"{log}: neither losses nor scores; not a log, or of no step yet")
        for title, points in finite.items():
            panels.setdefault(title, {})[run] = points
    return {title: runs for title, runs in panels.items() if runs}


def draw_axes(draw, box, title, x_marks, y_marks, font, scale):
    """Grid, numbers and title of a panel; box: (left, top, right, bottom). Returns (x, y) -> pixel.
    """
    left, top, right, bottom = box

    def place(x, y):
        across = (x - x_marks[0]) / (x_marks[-1] - x_marks[0])
        up = (y - y_marks[0]) / (y_marks[-1] - y_marks[0])
        return left + (right - left) * across, bottom - (bottom - top) * up

    grey = (225, 225, 225)
    for y in y_marks:
        height = place(x_marks[0], y)[1]
        draw.line((left, height, right, height), grey, scale)
        draw.text((left - 6 * scale, height), f"{y:.6g}", "black", font, anchor="rm")
    for x in x_marks:
        width = place(x, y_marks[0])[0]
        draw.line((width, top, width, bottom), grey, scale)
        draw.text((width, bottom + 6 * scale), f"{x:.6g}", "black", font, anchor="mt")
    draw.text((left, top - 6 * scale), title, "black", font, anchor="lb")
    draw.text((right, bottom + 20 * scale), "step", "black", font, anchor="rt")
    return place


def draw_step_curves(panels):
    """PIL image of step_curves: up to three panels a row, a colour a run, a legend of the runs.

    Drawn twice as large and scaled down, because Pillow's lines have no soft edges.
    """
    scale = 2
    wide, high = 420 * scale, 270 * scale
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * wide, rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12 * scale)

    names = list(dict.fromkeys(run for runs in panels.values() for run in runs))
    colours = curve_colours(names)
    last = max(step for runs in panels.values() for points in runs.values() for step in points)
    x_marks = axis_values(0, last)
    for i, (title, runs) in enumerate(panels.items()):
        left = i % columns * wide + 60 * scale
        right = (i % columns + 1) * wide - 20 * scale
        top = i // columns * high + 28 * scale
        bottom = (i // columns + 1) * high - 45 * scale
        values = [value for points in runs.values() for value in points.values()]
        y_marks = axis_values(min(values), max(values), 1e-6)
        box = (left, top, right, bottom)
        place = draw_axes(draw, box, title, x_marks, y_marks, font, scale)
        for run, points in runs.items():
            colour = colours[names.index(run)]
            line = [place(step, value) for step, value in points.items()]
            draw.line(line, colour, 2 * scale, joint="curve")
            if len(line) == 1:
                draw.circle(line[0], 3 * scale, colour)
    sheet = sheet.resize((columns * wide // scale, rows * high // scale), Image.Resampling.LANCZOS)
    return with_legend(sheet, list(zip(names, colours)))


# --------------------------------------------------------------------------------------------------
# Export: the network as a file that runs without this code, or its weights alone

EXPORT_SIDE = 64  # the smallest image side of an exported program
EXPORT_SIZES = ((1, 128, 192), (3, 145, 109), (1, 97, 65))  # (B,H,W) at which it is checked
EXPORT_ERROR = 1e-4  # of a logit, over the largest logit or 1


class Program(torch.nn.Module):
    """What is exported: image float32 (B,3,H,W), RGB in [0,1] -> logits (B,K,h,w) of a decoder."""

    def __init__(self, model, head):
        super().__init__()
        self.model = model
        self.head = head

    def forward(self, image):
        return head_logits(self.model, image, self.head)


def check_export(path):
    """Raise DataError where --export names no kind of file, or packages are missing."""
    suffix = Path(path).suffix
    if suffix not in (".pt2", ".onnx", ".safetensors"):
        raise DataError(f"--export {path}: write FILE.pt2, FILE.onnx or FILE.safetensors")
    lacking = []
    if suffix == ".onnx":
        packages = ("onnx", "onnxscript")
        lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking:
        raise DataError(f"--export {path}: needs the packages onnx and onnxscript: "
                        f"pip install {' '.join(lacking)}; or write FILE.pt2")


class SameConvolution(torch.nn.Conv2d):
    """timm's Conv2dSame, TensorFlow's padding, in whole numbers: float (B,C,H,W) -> (B,D,h,w).

    h is H over the stride, rounded up. timm computes the padding with math.ceil, which no program
    can hold. Its kernel reaches over a stride at least.
    """

    def forward(self, x):
        rim = []  # left, right, top, bottom
        for axis in (1, 0):
            side = x.shape[2 + axis]
            stride = self.stride[axis]
            cells = (side + stride - 1) // stride
            total = cells * stride - side + reach(self, axis) - stride
            rim += [total // 2, total - total // 2]
        x = F.pad(x, rim)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def reach(conv, axis):
    """Pixels between the first and the last that a convolution sees at once, both counted."""
    return conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1


def with_same_convolutions(program):
    """A copy of a program, with SameConvolution in place of timm's."""
    program = copy.deepcopy(program)
    for module in program.modules():
        if type(module).__name__ == "Conv2dSame":
            if all(reach(module, axis) >= module.stride[axis] for axis in (0, 1)):
                module.__class__ = SameConvolution
    return program


def trace(program):
    """torch.export of a Program for any batch and any image of EXPORT_SIDE or more a side."""
    batch = torch.export.Dim("batch", min=1)
    height = torch.export.Dim("height", min=EXPORT_SIDE)
    width = torch.export.Dim("width", min=EXPORT_SIDE)
    example = torch.rand(2, 3, 192, 256)  # a batch of one would be taken for a constant
    # Conditions on sizes that hold for all images become checks of the program, not its limits
    return torch.export.export(with_same_convolutions(program), (example,),
                               dynamic_shapes={"image": {0: batch, 2: height, 3: width}},
                               prefer_deferred_runtime_asserts_over_guards=True)


def written_pt2(program, path, checkpoint):
    """Write torch.export's file; returns the call image -> logits that it holds."""
    file = io.BytesIO()  # where a disk is full, torch does not raise but abort
    torch.export.save(trace(program), file)
    Path(path).write_bytes(file.getvalue())
    return torch.export.load(path).module()


def written_onnx(program, path, checkpoint):
    """Write ONNX; returns the call image -> logits, by onnxruntime where it is installed."""
    torch.onnx.export(trace(program), (), path, input_names=["image"], output_names=["logits"],
                      dynamo=True, external_data=False, verbose=False)
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime
        runner = onnxruntime.InferenceSession(path)
    else:
        from onnx.reference import ReferenceEvaluator
        runner = ReferenceEvaluator(path)
    return lambda image: torch.from_numpy(runner.run(None, {"image": image.numpy()})[0])


def written_safetensors(program, path, checkpoint):
    """Write the weights; returns the call image -> logits of the network that load() makes."""
    write_exported(path, program.model, checkpoint)
    return Program(load(path), program.head)


WRITERS = {".pt2": written_pt2, ".onnx": written_onnx, ".safetensors": written_safetensors}


def export_error(program, path, checkpoint):
    """Write a Program, read it again: the largest difference of a logit, over the largest or 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own, of which none is for a user
        logging.disable(logging.WARNING)
        try:
            call = WRITERS[Path(path).suffix](program, path, checkpoint)
        finally:
            logging.disable(logging.NOTSET)
    errors = []
    for batch, height, width in EXPORT_SIZES:
        image = torch.rand(batch, 3, height, width)
        wanted = program(image)
        errors.append((call(image) - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    worst = torch.stack(errors).max().item()  # NaN where one is, which Python's max would pass over
    return worst


@torch.no_grad()
def export(model, checkpoint, path, head="plain"):
    """Write a network in eval mode as FILE.pt2, FILE.onnx or FILE.safetensors.

    The programs take `image`, float32 (B,3,H,W), RGB in [0,1], sides of 64 or more, and give
    `logits`, float32 (B,K,h,w) on the Segmenter's grid, of one decoder. checkpoint: what the model
    was built from. The file is read again and compared with the network at EXPORT_SIZES before it
    gets its name. Returns the largest difference of a logit, over the largest logit or 1. Raises
    CheckpointError where a network cannot be written so, or differs, OSError where there is no
    room.
    """
    path = Path(path)
    if model.detail and path.suffix != ".safetensors":
        raise CheckpointError(f"--export {path}: how many details a network of two resolutions "
                              "sees depends on the image, which no program holds; write "
                              ".safetensors")
    program = Program(copy.deepcopy(model).cpu(), head).eval()
    with whole_file(path) as part:
        try:
            worst = export_error(program, str(part), checkpoint)
            if not worst <= EXPORT_ERROR:
                raise ValueError(f"logits differ from the network's by {worst:.1e}")
        except Exception as error:  # torch.export, the exporters and the runtimes: each has its own
            if is_out_of_memory(error):
                raise
            if reason := why_unwritable(error):
                raise OSError(reason) from None
            raise CheckpointError(f"--export {path}: this network cannot be written so: "
                                  f"{reason_of(error)}") from None
    return worst


# --------------------------------------------------------------------------------------------------
# Command line

PREDICTIONS = "predictions"  # where --images writes without --save


def device(text):
    """An argparse type: a torch.device that is there."""
    try:
        torch.empty(0, device=text).cpu()
        return torch.device(text)
    except (RuntimeError, AssertionError):  # no such device, or a torch built without it
        known = ["cpu"]
        if torch.cuda.is_available():
            known.insert(0, "cuda")
        if torch.backends.mps.is_available():
            known.insert(0, "mps")
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there; this torch sees {', '.join(known)}") from None


def build_parser():
    """One line per flag."""
    p = Parser(prog="eval.py", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("checkpoint", nargs="?", metavar="CKPT",
      help="last.pt or best.pt of a run, exported .safetensors, or a published segmenter")
    a("--backbone", metavar="B", help="of a published segmenter: mit_b0 to mit_b5")
    a("--decoder", metavar="D", help="of a published segmenter: segformer or daformer")
    a("--classes", metavar="C",
      help="of a published segmenter, in its order: cityscapes19, ... or a file of names")
    a("--detail", type=int, metavar="PIXELS",
      help="of a published segmenter: the side of its detail crops (default: HRDA's 512 where the "
           "file has a scale attention)")
    a("--data", nargs="+", metavar="SPEC",
      help="data set, as in data.py, several are pooled (default: the run's validation data)")
    a("--split", default="val", choices=("train", "val", "test"),
      help="split of the data set (default: val)")

    task = p.add_mutually_exclusive_group().add_argument
    task("--images", metavar="PATH",
         help="predict an image file or a folder of images instead: NAME_panel.png, and "
              "NAME_ids.png with the class of each pixel, counted from 0")
    task("--submit", metavar="DIR", help="write ids for the benchmark's server there instead")
    task("--table", nargs="+", metavar="RUN", help="tabulate run folders or log files instead")
    task("--curves", nargs="+", metavar="RUN",
         help="draw losses and mIoU over the steps of run folders or log files instead")
    task("--export", metavar="FILE",
         help="write the network instead: .pt2 (torch.export), .onnx, or weights .safetensors")
    task("--before", metavar="CKPT0",
         help="draw the gain over this run's student instead, with --picture")
    task("--alignment", nargs="+", metavar="SPEC",
         help="also compare features with this source, its val split")

    a("--against", metavar="ROW",
      help="row of the table that others are compared with (default: the source-only run's AdaBN)")
    a("--picture", metavar="FILE",
      help="with --before: frames around the median gain; with --table: mIoU over --labeled; with "
           "--curves: where to (default: curves.png)")
    a("--save", metavar="DIR",
      help=f"folder for panels (default: none; with --images: {PREDICTIONS})")
    a("--slide", action=argparse.BooleanOptionalAction,
      help="half overlapping windows of the training crop (HRDA, MIC; default: as in the run)")
    a("--flip", action="store_true", help="average with the mirror image")
    a("--head", default="plain", choices=("plain", "language", "mean"),
      help="decoder; language where one was trained, mean: both (default: plain)")
    a("--weights", choices=("student", "teacher"),
      help="which network of the run: the trained one, or its running average, which a run that "
           "adapts recommends, and by which best.pt is chosen then (default: student, with a note "
           "where the run recommends the teacher)")
    a("--adabn", nargs="+", metavar="SPEC",
      help="first re-estimate BatchNorm on unlabelled train images of this data set")
    a("--size", type=parse_size, metavar="WxH",
      help="pixels at the network; --images: the longer of both is the longer side of each image "
           "(default: as trained)")
    a("--palette", metavar="FILE",
      help="colours of the pictures: a name and its colour in a line, such as 128 64 128 road")
    a("--json", metavar="FILE.json",
      help="write the scores there too; with --images: the share of pixels of each class")
    a("--device", type=device, metavar="D", default="cuda" if torch.cuda.is_available() else "cpu",
      help="cuda, cuda:1, mps or cpu (default: cuda where it is there, else cpu)")
    return p


# Flags that a task would not read, beside those that parse_flags has a sentence for
OF_A_NETWORK = ("backbone", "decoder", "classes", "detail", "data", "split", "save", "slide",
                "flip", "head", "weights", "adabn", "size", "palette")
UNREAD = {
    "table": OF_A_NETWORK,
    "curves": OF_A_NETWORK,
    "images": ("split",),
    "submit": ("save", "palette"),
    "export": ("split", "palette"),
}


def unread(args, default):
    """'--FLAG does nothing ...' for a flag that was given in vain, None where there is none."""
    def given(name):
        return getattr(args, name) != default(name)

    for task, names in UNREAD.items():
        for name in names:
            if given(task) and given(name):
                return f"--{name} does nothing with --{task}: leave it out"
    if args.export and args.size and not args.adabn:
        return "--size does nothing with --export: what it writes takes any size"
    if args.palette and not (args.images or args.save or args.before):
        return "--palette colours pictures: add --save DIR"
    return None


def parse_flags(argv):
    """Command line -> checked arguments."""
    p = build_parser()
    args = p.parse_args(argv)
    if bool(args.checkpoint) == bool(args.table or args.curves):
        p.error("give a checkpoint first, or --table or --curves with runs")
    if args.images and args.data:
        p.error("--images and --data both name what to predict: give one of them")
    if args.against and not args.table:
        p.error("--against names a row of --table")
    if args.before and not args.picture:
        p.error("--before draws a picture: add --picture FILE.png")
    if args.before and args.save:
        p.error("--before draws one picture, that of --picture: leave out --save")
    if args.against and args.picture:
        p.error("--against does nothing with --picture: leave it out")
    if args.alignment and args.head == "mean":
        p.error(ONE_HEAD)
    if args.curves and not args.picture:
        args.picture = "curves.png"
    if args.picture and not (args.before or args.table or args.curves):
        p.error("--picture needs --before CKPT0, or --table or --curves with runs")
    if args.export and (args.data or args.save or args.slide or args.flip):
        p.error("--export writes the network alone: leave out --data, --save, --slide, --flip")
    if args.json and (args.submit or args.before or args.export or args.table or args.curves):
        p.error("--json holds scores, or with --images shares of pixels: there are none here")
    in_vain = unread(args, p.get_default)
    if in_vain:
        p.error(in_vain)
    return args


def check_folder(flag, path):
    """Raise DataError where `path` neither is a folder to write into nor can become one."""
    place = Path(path).resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise DataError(f"{flag} {path}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise DataError(f"{flag} {path}: no permission to write into {place}; give another place")


def check_outputs(args):
    """Raise DataError where what the work ends with could not be written."""
    outputs = (("json", args.json), ("picture", args.picture), ("export", args.export))
    for name, path in outputs:
        if not path:
            continue
        if not Path(path).resolve().parent.is_dir():
            raise DataError(f"--{name} {path}: there is no such folder")
        if Path(path).is_dir():
            raise DataError(f"--{name} {path}: a folder; give a file")
        if Path(path).exists() and not Path(path).is_file():
            raise DataError(f"--{name} {path}: no regular file; give another one")
        check_folder(f"--{name}", Path(path).parent)
    if args.json and Path(args.json).suffix != ".json":
        raise DataError(f"--json {args.json}: write FILE.json")
    if args.picture:
        check_picture(args.picture, "--picture")
    if args.export:
        check_export(args.export)
    if args.submit:
        check_folder("--submit", args.submit)
    elif args.save or args.images:
        check_folder("--save", args.save or PREDICTIONS)


def open_network(path, weights, args, *published):
    """A checkpoint and its network on the device, in eval mode.

    published: backbone, decoder, classes and detail of a segmenter that is not ours.
    """
    checkpoint = open_checkpoint(path, *published)
    model = build_segmenter(checkpoint, weights, path).to(args.device)
    if args.head != "plain" and "language" not in model.heads:
        raise CheckpointError(f"{path}: --head {args.head} needs a language decoder, "
                              "and it has none")
    return checkpoint, model


def recommends_teacher(checkpoint):
    """Whether a checkpoint holds a teacher, and its run had begun to adapt."""
    flags = checkpoint["flags"]
    if checkpoint["teacher"] is None or not adapts(flags):
        return False
    return checkpoint["step"] > (flags.get("source_steps") or 0)


def title_of(checkpoint, weights):
    """What a picture calls a network: its recipe, and whether that had begun to adapt."""
    flags = checkpoint["flags"]
    source_steps = flags.get("source_steps") or 0
    if source_steps and checkpoint["step"] <= source_steps:
        return f"before adaptation, {weights}"
    return f"{flags['recipe']}, {weights}"


def open_before(args, checkpoint):
    """(checkpoint, student) of --before, None without it. Raises CheckpointError."""
    if not args.before:
        return None
    before = open_network(args.before, "student", args)
    if before[0]["classes"] != checkpoint["classes"]:
        raise CheckpointError(f"{args.before}: has other classes than {args.checkpoint}")
    size, trained = checkpoint["flags"]["size"], before[0]["flags"]["size"]
    if trained and size and list(trained) != list(size) and not args.size:
        print(f"note: {args.before} was trained at {trained[0]}x{trained[1]} pixels, "
              f"{args.checkpoint} at {size[0]}x{size[1]}; both predict at the second size, which "
              "--size changes", file=sys.stderr)
    return before


def draw_gain(args, before, checkpoint, model, dataset, colors, how):
    """Save the picture of before_after, print its report; returns the number of images."""
    old, student = before
    titles = [title_of(old, old.get("network", "student")), title_of(checkpoint, args.weights)]
    if args.adabn:
        titles[1] += ", AdaBN"
    picture, report = before_after(student, model, dataset, titles, colors, **how)
    save_picture(picture, args.picture)
    print(f"pixel accuracy {report['before']:.1f} % before, {report['after']:.1f} % after, over "
          f"{len(dataset)} images of {dataset.spec}, split {dataset.split}: {report['pixels']} "
          f"pixels, {report['ignored']} without label left out")
    frames = ", ".join(f"{name} ({gain:+.1f})" for name, gain in report["frames"])
    print(f"{args.picture}: the frames around the median gain, in points: {frames}")
    return len(dataset)


def write_json(path, values):
    """The work of --json: a dict of plain values, whole or not at all. Raises OSError."""
    with whole_file(path) as part:
        part.write_text(json.dumps(values, indent=1) + "\n")


def score(args, about, model, dataset, aligned, colors, how):
    """Print the scores, write them to --json; returns the number of images."""
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
    result = evaluate(model, dataset, save=args.save, colors=colors, counts=bool(args.json), **how)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print(format_scores(result))
    if args.split == "train":
        print("note: labels of split train are scored at the size of training, those of val at "
              "their own: the two are not comparable")
    if aligned:
        print(format_alignment(aligned["alignment"]))
    if args.json:
        write_json(args.json, about | result | aligned)
    return result["images"]


def draw_images(args, checkpoint, model, size, colors, how):
    """Predict --images, write --json; returns the report of predict_images."""
    folder = args.save or PREDICTIONS
    antialias = checkpoint["flags"].get("antialias", True)
    report = predict_images(model, args.images, model.classes, folder, size, colors=colors,
                            antialias=antialias, **how)
    if Path(args.images).resolve() in Path(folder).resolve().parents:
        print(f"note: {folder} lies below {args.images}: a training on that folder would take the "
              "pictures for images; --save names another place")
    if size:
        print(f"scaled to a longer side of {max(size)} for the network, ", end="")
    print(f"panels and ids at native size in {folder}")
    if args.json:
        about = {"checkpoint": args.checkpoint, "step": checkpoint["step"],
                 "weights": args.weights, "path": args.images}
        write_json(args.json, about | report)
    return report


def write_network(args, checkpoint, model):
    """The work of --export, and what it has written, said."""
    network = args.weights
    if args.adabn and not network.endswith(" with AdaBN"):
        network += " with AdaBN"
    checkpoint = checkpoint | {"network": network}
    error = export(model, checkpoint, args.export, args.head)
    print(f"{args.export}: written and read again; over images of three sizes its logits differ "
          f"from the network's by {error:.1e} at most")
    if Path(args.export).suffix != ".safetensors":
        stride = model.stride
        print(f"image float32 (B,3,H,W), RGB in 0..1, sides from {EXPORT_SIDE} -> logits float32 "
              f"(B,{model.num_classes},(H+{stride - 1})//{stride},(W+{stride - 1})//{stride})")
    print(f"classes: {', '.join(model.classes)}")


def open_data(args, checkpoint, classes, size, detail):
    """The data sets (to predict, --alignment, --adabn), None where one is not asked for; notes.

    size, detail: as of open_dataset. All files that will be read are checked. Raises DataError.
    """
    # What the values of own masks mean that have no IDS: positions in the classes, or what the file
    # of --classes says. Where the classes came from IDS or a file that is gone, nothing says it.
    flags = checkpoint["flags"]
    cache = flags["cache"]
    if cache and not os.access(home(cache), os.W_OK):
        cache = None  # a folder of the machine that trained
    ids = flags.get("classes", BY_POSITION)
    lost = None
    if ids in CLASS_SPACES:
        ids = BY_POSITION
    elif ids is not BY_POSITION and not Path(home(ids or "")).is_file():
        lost = ids
        ids = None
    how = {"ids": ids, "antialias": flags.get("antialias", True), "detail": detail}
    dataset = source = target = None
    checked = []
    if not (args.images or args.export):
        spec = args.data or flags["val"]
        if spec == "none":
            raise DataError(f"{args.checkpoint}: the run had no validation data; "
                            "give --data SPEC or --images PATH")
        if lost and any(lacks_ids(one, args.split) for one in specs(spec)):
            raise DataError(f"{args.checkpoint}: {lost}, the run's --classes, says what masks mean "
                            "and is not there; restore it, or give --data with IDS behind the "
                            "masks")
        if ids is None and args.backbone is None:
            for one in specs(spec):
                if lacks_ids(one, args.split):
                    raise DataError(f"{one}: nothing says what the values of its masks mean; give "
                                    "IDS behind the masks")
        dataset = open_dataset(spec, args.split, classes, size, cache, **how)
        checked.append((dataset, not args.submit))
        if args.submit:
            check_submission(dataset, args.submit)
        check_meaning(args, checkpoint, dataset)
    if args.alignment:
        source = open_dataset(args.alignment, "val", classes, size, cache, **how)
        checked.append((source, True))
    if args.adabn:
        target = open_dataset(args.adabn, "train", classes, size, cache, True, **how)
        checked.append((target, False))
    for flag in ("save", "picture", "submit"):
        place = getattr(args, flag)
        if place and dataset:
            folder = Path(place).resolve().parent if flag == "picture" else place
            keep_out(f"--{flag} {place}", folder, dataset)
    skip = 0
    if not args.submit:  # a server wants every image
        skip = flags.get("skip_bad", 0)
    return dataset, source, target, check_data(checked, skip)


def lacks_ids(spec, split):
    """Whether a SPEC is of own files and does not say what the values of masks mean."""
    parsed = parse_spec(spec, split)
    return parsed.kind in OWN and not parsed.ids


def check_meaning(args, checkpoint, dataset):
    """Raise DataError where the masks of the run's own --val no longer mean what they did."""
    known = checkpoint.get("inputs", {}).get("val_masks")
    if args.data or args.split != "val" or known is None:
        return
    if known != fingerprint_of_ids(dataset):
        raise DataError(f"{dataset.spec}: its masks do not mean what they did in training: IDS or "
                        "the file of --classes has changed; restore it, or name the data by --data")


def with_adabn(model, target):
    """adapt_batchnorm() for --adabn. Raises DataError where the images are too few for it."""
    try:
        return adapt_batchnorm(model, target)
    except ValueError as error:
        if not has_one_value(error):
            raise
    raise DataError(f"--adabn {target.spec}: one image, and so small that BatchNorm gets one value "
                    "a channel; give more images, or larger ones by --size WxH")


def check_data(datasets, skip):
    """Read all files once before the work begins -> what they show, a list of str.

    datasets: [(data set, whether its labels are used)]. skip: so many bad pairs are left out, as in
    the run. Raises DataError.
    """
    parts = []
    for dataset, labels in datasets:
        if labels and not dataset.labeled:
            raise DataError(f"{dataset.spec}: no labels in split {dataset.split}"
                            f"{dataset.no_labels}; for pictures alone use --images")
        parts += [(part, labels) for part in dataset.parts]
    notes = leave_out_bad(parts, check_sets(parts, skip))
    for part, labels in parts:
        notes += [f"{part.spec} {part.split}: {remark}" for remark in part.remarks(labels)]
    for dataset, _ in datasets:
        dataset.join()
    return notes


def run(args):
    """The command line's work with a checkpoint; returns which images were left out, or ''."""
    check_outputs(args)
    published = args.backbone, args.decoder, args.classes, args.detail
    weights = args.weights or "student"
    checkpoint, model = open_network(args.checkpoint, weights, args, *published)
    if args.weights is None and recommends_teacher(checkpoint):
        print(f"note: {args.checkpoint}: this is the student; the run recommends its teacher, "
              "--weights teacher", file=sys.stderr)
    args.weights = checkpoint.get("network", weights)  # what was exported has but one
    flags = checkpoint["flags"]
    classes = model.classes
    size = args.size or flags["size"]
    detail = model.detail > 0  # several resolutions have published sizes of their own
    slide = flags.get("slide") if args.slide is None else args.slide
    how = {"window": flags["crop"] if slide else None, "flip": args.flip, "head": args.head}
    colors = palette(classes)
    if args.palette:
        colors = read_colours(args.palette, classes)
    before = open_before(args, checkpoint)

    dataset, source, target, notes = open_data(args, checkpoint, classes, size, detail)
    if target:
        model = with_adabn(model, target)
    if args.export:
        write_network(args, checkpoint, model)
        return ""
    aligned = {}
    if source:
        aligned["alignment"] = alignment(model, source, dataset, args.head)

    begin = time.perf_counter()
    unreadable = []
    if args.images:
        report = draw_images(args, checkpoint, model, size, colors, how)
        count, unreadable = report["images"], report["unreadable"]
    elif args.submit:
        count = submit(model, dataset, args.submit, **how)
        print(f"ids of {dataset.spec}, split {args.split}, for the server in {args.submit}")
    elif args.before:
        count = draw_gain(args, before, checkpoint, model, dataset, colors, how)
    else:
        about = {"checkpoint": args.checkpoint, "step": checkpoint["step"], "weights": args.weights,
                 "data": dataset.spec, "split": args.split, "adabn": target and target.spec,
                 "head": args.head, "slide": slide, "flip": args.flip}
        count = score(args, about, model, dataset, aligned, colors, how)

    for note in dict.fromkeys(notes):
        print("note:", note)
    print(f"{count} images, {count / (time.perf_counter() - begin):.1f} images/s", end="")
    if args.device.type == "cuda":
        print(f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", end="")
    print()
    if not unreadable:
        return ""
    print("\n".join(unreadable))
    return (f"{len(unreadable)} of {count + len(unreadable)} images cannot be read and are named "
            f"above, the first: {unreadable[0].partition(': ')[0]}; the others are predicted")


def run_table(args):
    """The command line's work without a checkpoint: a table, its picture, or curves."""
    if args.table and not args.picture:
        print(table(args.table, args.against))
        return
    check_outputs(args)
    if args.curves:
        panels = step_curves(args.curves)
        save_picture(draw_step_curves(panels), args.picture)
        print(f"{args.picture}: {', '.join(panels)} over the steps of {len(args.curves)} runs")
        return
    curves, ticks = label_curves(read_runs(args.table))
    save_picture(draw_curves(curves, ticks), args.picture)
    numbers = ", ".join(ticks[labels] for labels in sorted(ticks))
    print(f"{args.picture}: {len(curves)} lines over {numbers} labelled images")


def main(argv=None):
    """run() or run_table(). Bad input ends with exit status 2, a run that broke with 1."""
    args = parse_flags(argv)
    unreadable = ""
    try:
        if args.checkpoint:
            unreadable = run(args)
        else:
            run_table(args)
        with output():
            pass  # but to pass on what was printed
    except (DataError, CheckpointError, WeightsError) as error:
        fail("eval.py", error, 2)
    except OSError as error:  # a full disk: nobody's input was bad
        fail("eval.py", error, 1)
    except KeyboardInterrupt:
        interrupted()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fail("eval.py", "out of memory; try --size WxH, --slide, or --device cpu", 1)
    if unreadable:
        fail("eval.py", unreadable, 2)


if __name__ == "__main__":
    main()
