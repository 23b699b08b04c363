"""Prediction, metrics, pictures, export. Everything about the network comes from the checkpoint.

    python eval.py out/last.pt                                      per-class IoU on the validation data of the run
    python eval.py out/last.pt --data cityscapes:DIR --slide --flip --json scores.json --save panels
    python eval.py out/last.pt --adabn camvid:DIR                   BatchNorm statistics of unlabelled target images
    python eval.py out/last.pt --images photo.jpg --save pictures   any image, or a folder of them
    python eval.py out/last.pt --data cityscapes:DIR --split test --submit upload
    python eval.py out/last.pt --alignment streets                  distance of the domains in feature space, per class
    python eval.py --table runs/* [--against ROW]                   mean, spread and paired differences over seeds
"""
import argparse
import contextlib
import copy
import json
import math
import re
import statistics
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from data import (CLASS_SPACES, IGNORE, LABEL_IDS, SUFFIXES, DataError, as_picture, colorize, grid, majority_label,
                  open_dataset, overlay, palette, parse_size, read_image)
from model import CheckpointError, WeightsError, build_segmenter, load_checkpoint, upsample_pseudo_label

# ---------------------------------------------------------------------------------------------------------------------
# Prediction


def starts(length, window, stride):
    """First pixels of the windows along one side; the last window is shifted back so that it stays inside."""
    return [*range(0, length - window, stride), length - window]


def head_logits(model, image, head):
    """Logits float32 (B,K,h,w) of one decoder; of head "mean" those of the mean probability of both decoders."""
    if head != "mean":
        return model(image, head).logits.float()
    return torch.logaddexp(*(model(image, name).logits.float().log_softmax(1) for name in ("plain", "language")))


def raw_logits(model, image, window=None, stride=None, flip=False, head="plain"):
    """float32 logits (B,K,h,w) before the last upsampling: on the network's grid or, from windows, on the image's."""
    if flip:
        straight = raw_logits(model, image, window, stride, head=head)
        return (straight + raw_logits(model, image.flip(-1), window, stride, head=head).flip(-1)) / 2
    (B, _, H, W), S = image.shape, window
    if S is None or max(H, W) <= S:
        return head_logits(model, image, head)
    stride = stride or max(1, S // 2)
    if not 0 < stride <= S:
        raise ValueError(f"stride {stride} leaves pixels uncovered: it must be in 1..{S}, the window's side")
    h, w = min(S, H), min(S, W)
    total, count = image.new_zeros(B, model.num_classes, H, W), image.new_zeros(H, W)
    for y in starts(H, h, stride):
        for x in starts(W, w, stride):
            logits = head_logits(model, image[..., y:y + h, x:x + w], head)
            total[..., y:y + h, x:x + w] += F.interpolate(logits, (h, w), mode="bilinear", align_corners=False)
            count[y:y + h, x:x + w] += 1
    return total.div_(count)


@torch.no_grad()
def predict(model, image, size=None, window=None, stride=None, flip=False, head="plain"):
    """Class probabilities, float32 (B,K,h,w) at `size` (h,w), by default the image's own.

    image: float (B,3,H,W), RGB in [0,1], any size. window None: one pass over the whole image (DAFormer's protocol).
    window S: S x S windows, `stride` apart (default S // 2), logits averaged where they overlap (HRDA, MIC); a side
    shorter than S is taken whole. flip: logits averaged with those of the mirror image. Without windows one bilinear
    step leads from the network's grid to `size`. head: plain | language | mean. The caller puts the model into eval
    mode. Raises ValueError on a stride that leaves gaps.
    """
    logits = raw_logits(model, image, window, stride, flip, head)
    return F.interpolate(logits, size or image.shape[2:], mode="bilinear", align_corners=False).softmax(1)


@torch.no_grad()
def predict_labels(model, image, size=None, window=None, stride=None, flip=False, head="plain"):
    """Arg-max of `predict`, uint8 (B,h,w), without K maps at `size`."""
    logits = raw_logits(model, image, window, stride, flip, head)
    return upsample_pseudo_label(logits, size or image.shape[2:], 0.0)[0]


def to_batch(image, model):
    """uint8 (3,H,W) or (B,3,H,W) -> float (B,3,H,W) in [0,1] on the model's device."""
    image = image.view(-1, *image.shape[-3:])  # (3,H,W) -> (1,3,H,W)
    return image.to(model.pixel_mean.device).float().div(255)


@contextlib.contextmanager
def eval_mode(model):
    """Eval mode inside, the mode of every single module (a teacher mixes them) restored after."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def read_ahead(dataset, indices, threads=4):
    """dataset[i] for i in indices, read by threads while the caller computes."""
    with ThreadPoolExecutor(threads) as pool:
        queue = deque()
        for i in indices:
            queue.append(pool.submit(dataset.__getitem__, i))
            if len(queue) > threads:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def predictions(model, dataset, window=None, flip=False, head="plain", size=None):
    """(item, uint8 prediction (h,w) on the device) for this rank's share of the data: rank, rank + world, ...

    One image at a time, because native sizes differ; predicted at `size` (h,w) or, without it, at the label's. No
    image is repeated to fill up ranks, so that no score depends on their number.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank, len(dataset), world)
    bar = tqdm(read_ahead(dataset, share), "predict", len(share), disable=True if rank else None, leave=False)
    for item in bar:
        image = to_batch(item["image"], model)
        yield item, predict_labels(model, image, size or item["label"].shape, window, flip=flip, head=head)[0]


@torch.no_grad()
def adapt_batchnorm(model, dataset, images=96, batch=8):
    """AdaBN: a copy of the model, in eval mode, with BatchNorm statistics of unlabelled images of another domain.

    Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation". The statistics are the mean over
    batches of about `batch` of `images` images, evenly spread over the data set; the weights stay. Images of several
    sizes are cropped to the smallest of their batch. A model without BatchNorm is returned as it is, and that is said.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        print("AdaBN: this network has no BatchNorm, nothing to adapt", file=sys.stderr)
        return model
    model = copy.deepcopy(model).eval()
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            m.reset_running_stats()
            m.momentum = None  # PyTorch's cumulative average
            m.train()
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    for part in np.array_split(chosen, math.ceil(len(chosen) / batch)):
        loaded = [dataset[int(i)]["image"] for i in part]
        h, w = (min(image.shape[side] for image in loaded) for side in (1, 2))
        for head in model.heads:
            model(to_batch(torch.stack([image[:, :h, :w] for image in loaded]), model), head)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def confusion(pred, label, K):
    """Pixels per pair of classes: int64 (K,K), rows = label, columns = prediction, on the device of `pred`.

    pred: integers in 0..K-1; label: same shape, 0..K-1 or 255 (left out). Raises ValueError on any other label.
    """
    row = label.to(torch.uint8) + 1  # uint8 wraps round: 255 becomes row 0, class k row k + 1
    counts = torch.bincount((row.int() * K + pred).flatten(), minlength=(K + 1) * K)
    if counts.numel() > (K + 1) * K:
        raise ValueError(f"labels up to {(counts.numel() - 1) // K - 1} for {K} classes; only 255 may lie outside")
    return counts.view(K + 1, K)[1:]


def mean(values):
    """Mean of the values that are not None, None if there are none."""
    values = [v for v in values if v is not None]
    return statistics.fmean(values) if values else None


def number(value, form=".2f"):
    """A number as text, "-" for None."""
    return "-" if value is None else format(value, form)


def scores(confusion, names):
    """Percentages from the (K,K) matrix of a data set: {"miou", "iou": {name: value}, "accuracy", "absent": names}.

    A class in neither labels nor predictions has IoU None, is left out of the mean and named in "absent". The 19
    Cityscapes classes also get "miou16" and "miou13", means over the classes that SYNTHIA has (no terrain, truck,
    train; nor wall, fence, pole). A mean of nothing is None.
    """
    matrix = confusion.double().cpu()
    hits, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()  # (K,)
    iou = {n: 100 * float(h / u) if u else None for n, h, u in zip(names, hits, union)}
    accuracy = 100 * float(hits.sum() / matrix.sum()) if matrix.sum() else None
    absent = [n for n, value in iou.items() if value is None]
    result = {"miou": mean(iou.values()), "iou": iou, "accuracy": accuracy, "absent": absent}
    if tuple(names) == CLASS_SPACES["cityscapes19"]:
        result |= {f"miou{k}": mean(iou[n] for n in CLASS_SPACES[f"cityscapes{k}"]) for k in (16, 13)}
    return result


def format_scores(result):
    """The scores as text: one class a line, then the means."""
    width, present = max(map(len, result["iou"])), len(result["iou"]) - len(result["absent"])
    lines = [f"{name:<{width}}  {number(value):>6}" for name, value in result["iou"].items()]
    means = {"miou": f"mIoU ({present} classes)", "miou16": "mIoU16", "miou13": "mIoU13", "accuracy": "accuracy"}
    lines.append("  ".join(f"{title} {number(result[key])}" for key, title in means.items() if key in result))
    if result["absent"]:
        lines.append(f"in neither labels nor predictions, left out of the mean: {', '.join(result['absent'])}")
    return "\n".join(lines)


def evaluate(model, dataset, window=None, flip=False, head="plain", save=None):
    """scores() of a model on a labelled data set plus "images" and "images_per_s"; the same on every rank.

    All ranks must call it: each predicts its share, in float32, and the confusion matrix is summed once. Labels keep
    their native size. save: an existing folder for one panel per image. The train/eval mode of every module is
    restored. Raises DataError where there are no labels or only ignored pixels.
    """
    if not dataset.labeled:
        raise DataError(f"{dataset.spec}: no labels in split {dataset.split}; for pictures alone use --images")
    names, begin = dataset.classes, time.perf_counter()
    total = torch.zeros(len(names), len(names), dtype=torch.int64, device=model.pixel_mean.device)
    with eval_mode(model):
        for item, label in predictions(model, dataset, window, flip, head):
            total += confusion(label, item["label"].to(label.device), len(names))
            if save:
                sheet = panel(as_picture(item["image"]), item["label"].numpy(), label.cpu().numpy(), palette(names))
                sheet.save(Path(save) / f"{item['name']}.png")
    if dist.is_initialized():
        dist.all_reduce(total)
    result = scores(total, names)  # waits for the device
    if result["accuracy"] is None:
        raise DataError(f"{dataset.spec}: split {dataset.split} has ignored pixels only; do labels and classes match?")
    return result | {"images": len(dataset), "images_per_s": len(dataset) / (time.perf_counter() - begin)}


# ---------------------------------------------------------------------------------------------------------------------
# Alignment of two domains in feature space

ROUNDING = 1e-9  # margins and variances of unit vectors below it are what float32 leaves of zero


@torch.no_grad()
def alignment(model, source, target, head="plain"):
    """How near two labelled data sets of the same K classes lie in one decoder's features -> dict of plain numbers.

    Features (C,h,w) of the whole image are averaged over 2 x 2 positions, stride 8 where they have 4, and scaled to
    length 1; such a cell counts where one class covers 75 % of it. A class's centroid is the mean of its cells.
    classes: {name: source_cells, target_cells, distance (1 - cosine of the two centroids, 0..2), nearest_accuracy (% of
    the target cells whose nearest source centroid, by cosine, is their own class's)}; distance, nearest_class_accuracy:
    means over classes; nearest_accuracy: over cells; margin, margin_source: mean 1 - cosine of two classes' centroids,
    0 where they collapse; ratio: distance / margin; absent: classes without a cell in one of the domains, left out of
    all these. effective_rank, effective_rank_source: exp of the entropy of the normalised eigenvalues of all cells'
    covariance, 1..C (Roy & Vetterli 2007, "The Effective Rank"); the other measures are ours. None where undefined.
    Raises DataError without labels or cells, and on head "mean", which has no features of its own.
    """
    if head == "mean":
        raise DataError("alignment is measured in the features of one decoder: --head plain or language, not mean")
    if bare := [d for d in (source, target) if not d.labeled]:
        raise DataError(f"{bare[0].spec}: no labels in split {bare[0].split}; alignment needs those of both domains")
    K, domains = len(target.classes), []
    for data in (source, target):
        sums, second, count, hits = 0, 0, torch.zeros(K).double(), torch.zeros(K).double()
        with eval_mode(model):
            for item in tqdm(read_ahead(data, range(len(data))), "alignment", len(data), disable=None, leave=False):
                features = model(to_batch(item["image"], model), head).features.float()
                size = [-(-side // 2) for side in features.shape[2:]]
                unit = F.normalize(F.adaptive_avg_pool2d(features, size), dim=1)[0].flatten(1).T  # (1,C,h,w) -> (n,C)
                label = majority_label(item["label"][None].to(unit.device), size, K).flatten().cpu()  # (1,h,w) -> (n,)
                unit, label = unit.cpu().double()[label != IGNORE], label[label != IGNORE]  # MPS has no float64
                member = F.one_hot(label, K).double()  # (n,K)
                sums, second, count = sums + member.T @ unit, second + unit.T @ unit, count + member.sum(0)
                for mu, known, _ in domains:  # the source's, in the target's turn
                    nearest = (unit @ mu.T).masked_fill(known == 0, -2).argmax(1)  # (n,K) -> (n,)
                    hits += member[nearest == label].sum(0)
        if not (n := count.sum()):
            raise DataError(f"{data.spec}: no cell of split {data.split} has a class; do labels and classes match?")
        center = sums.sum(0) / n  # (K,C) -> (C,)
        spectrum = torch.linalg.eigvalsh(second / n - center.outer(center)).clamp(min=0)
        entropy = torch.special.entr(spectrum / spectrum.sum()).sum()
        domains.append((F.normalize(sums, dim=1), count, entropy.exp().item() if spectrum.sum() > ROUNDING else None))
    (near, n_source, rank_source), (far, n_target, rank) = domains
    both = (n_source > 0) & (n_target > 0)
    P = int(both.sum())
    margin, margin_source = (max(0.0, 1 - ((mu[both] @ mu[both].T).sum().item() - P) / (P * (P - 1))) if P > 1 else None
                             for mu in (far, near))  # the sum without its P ones: pairs of different classes
    distances, accuracies = ([v if there else None for v, there in zip(values.tolist(), both)] for values in (
        (1 - (near * far).sum(1)).clamp(min=0), 100 * hits / n_target))
    rows = zip(target.classes, n_source.int().tolist(), n_target.int().tolist(), distances, accuracies)
    distance = mean(distances)
    return {"source": source.spec, "target": target.spec, "head": head, "absent": [
                name for name, there in zip(target.classes, both) if not there],
            "classes": {name: dict(zip(("source_cells", "target_cells", "distance", "nearest_accuracy"), row))
                        for name, *row in rows},
            "distance": distance, "margin": margin, "margin_source": margin_source,
            "ratio": distance / margin if P > 1 and margin > ROUNDING else None,
            "nearest_accuracy": 100 * (hits[both].sum() / n_target[both].sum()).item() if P else None,
            "nearest_class_accuracy": mean(accuracies), "effective_rank": rank, "effective_rank_source": rank_source}


def format_alignment(result):
    """The alignment as text: one class a line, then the means."""
    source, target, head, absent, classes, *_ = result.values()
    width, forms = max(map(len, classes)), ("", "", ".3f", ".2f")
    titles = "source cells", "target cells", "distance", "nearest %"
    lines = [f"alignment: source {source}, target {target}, features of the {head} decoder",
             " " * width + "".join(f"{title:>14}" for title in titles)]
    lines += [f"{name:<{width}}" + "".join(f"{number(v, form):>14}" for v, form in zip(row.values(), forms))
              for name, row in classes.items()]
    lines.append("  ".join(f"{key.replace('_', ' ')} {number(v, '.3f')}" for key, v in [*result.items()][5:]))
    return "\n".join(lines + ["without a cell in one of the domains, left out: " + ", ".join(absent)] * bool(absent))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: uint8 arrays (h,w,3) until they are saved


def panel(picture, label, prediction, colors):
    """One row at the picture's size: image, label (None: left out), prediction, overlay -> PIL image."""
    prediction, *rest = (np.asarray(Image.fromarray(ids).resize(picture.shape[1::-1], Image.Resampling.NEAREST))
                         for ids in (prediction, label) if ids is not None)
    row = {"image": picture} | {"label": colorize(ids, colors) for ids in rest} | {
        "prediction": colorize(prediction, colors), "overlay": overlay(picture, prediction, colors)}
    return grid([list(row.values())], list(row))


def training_panel(model, views, names, rows=4):
    """What a training step saw, one sample a row -> PIL image.

    views: title -> float images (B,3,S,S) in [0,1] or uint8 labels (B,S,S). The last column is the model's prediction
    of the view called target, of source where there is none.
    """
    with eval_mode(model):
        views = views | {"prediction": predict_labels(model, views.get("target", views["source"]))}
    colors = palette(names)
    return grid([[as_picture(view[i]) if view.ndim == 4 else colorize(view[i].cpu().numpy(), colors)
                  for view in views.values()] for i in range(min(rows, len(views["prediction"])))], list(views))


# ---------------------------------------------------------------------------------------------------------------------
# Own images and benchmark servers

TRAIN_TO_LABEL_IDS = sorted(raw for raw, name in LABEL_IDS.items() if name)  # both count the classes in one order
SERVERS = {  # kind of data set: size (h,w) that the server wants, id written for each train id, file names
    "cityscapes": ((1024, 2048), TRAIN_TO_LABEL_IDS, r"[^_]+_\d{6}_\d{6}.*"),
    "acdc": ((1080, 1920), range(19), ".+"), "darkzurich": ((1080, 1920), range(19), ".+")}


@torch.no_grad()
def predict_images(model, path, names, folder, size=None, window=None, flip=False, head="plain"):
    """Predict a file or every image of a folder; write NAME_ids.png and NAME_panel.png (image, prediction, overlay).

    Images are predicted at the training scale, their longer side as long as that of `size` (W,H), and written at their
    own size. NAME is the file's own, without its folder. Returns the number of images. Raises DataError.
    """
    path, folder, colors = Path(path), Path(folder), palette(names)
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no images here ({', '.join(sorted(SUFFIXES))})")
    stems = Counter(f.stem for f in files)
    folder.mkdir(parents=True, exist_ok=True)
    for file in tqdm(files, "images", disable=None, leave=False):
        picture = read_image(file)
        h, w = picture.shape[:2]
        scale = max(size) / max(h, w) if size else 1
        fitted = [max(1, round(side * scale)) for side in (w, h)]
        small = Image.fromarray(picture).resize(fitted, Image.Resampling.BILINEAR)
        image = to_batch(torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous(), model)  # (h,w,3) -> (1,3,h,w)
        label = predict_labels(model, image, (h, w), window, flip=flip, head=head)[0].cpu().numpy()
        name = file.stem if stems[file.stem] == 1 else file.name  # a.jpg beside a.png
        Image.fromarray(label).save(folder / f"{name}_ids.png")
        panel(picture, None, label, colors).save(folder / f"{name}_panel.png")
    return len(files)


def submit(model, dataset, folder, window=None, flip=False, head="plain"):
    """Write what the benchmark's server takes, one id PNG per image in a flat, empty folder; returns their number.

    Cityscapes wants label ids in <city>_<sequence>_<frame>*.png, ACDC and Dark Zurich train ids under the image's name.
    Raises DataError on other data sets or classes, a folder that is not empty, and names that the server refuses.
    """
    kind, folder = dataset.spec.partition(":")[0], Path(folder)
    if kind not in SERVERS or dataset.classes != CLASS_SPACES["cityscapes19"]:
        raise DataError(f"{dataset.spec}: --submit needs the 19 Cityscapes classes and one of {', '.join(SERVERS)}")
    size, ids, pattern = SERVERS[kind]
    stems = {name: image.stem for name, (image, _) in zip(dataset.names, dataset.files)}
    if wrong := [s for s, n in Counter(stems.values()).items() if n > 1 or not re.fullmatch(pattern, s)]:
        raise DataError(f"{dataset.spec}: the server would refuse {wrong[0]}.png: not its naming, or there twice")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; --submit needs a folder of its own, the server reads every file")
    for item, label in predictions(model, dataset, window, flip, head, size):
        written = np.array(ids, np.uint8)[label.cpu().numpy()]
        Image.fromarray(written).save(folder / f"{stems[item['name']]}.png")
    return len(dataset)


# ---------------------------------------------------------------------------------------------------------------------
# Tables over runs

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
         2.120, 2.110, 2.101, 2.093, 2.086)  # Student's t, two-sided 95 %, 1 to 20 degrees of freedom
COMPARABLE = ("target", "val", "classes", "size", "crop", "batch", "steps", "backbone", "decoder", "channels", "init")
UNNAMED = {"recipe", "seed", "out", "cache", "workers", "stop_at", "eval_every", "save_every", "log_every",
           "panel_every", "world", "profile", "compile", "checkpointing", *COMPARABLE}  # flags that give no row a name
# Flags whose default is not "off", as runs did whose logs are older than the flag.
OLD = {"text": "auto", "spatial_depth": 2, "mask_views": ["target"], "teacher_head": "plain", "tau": 0.1,
       "contrast_pixels": "all", "style": "fourier", "beta": [0.01], "restyle": "extra", "class_weights": "confidence",
       "hardest": 0.2, "omega": 0.5, "confident": 0.95, "labeled": "0"}


def spread(values):
    """(mean, standard deviation with n - 1, half width of the 95 % t-interval of the mean); None where n = 1."""
    n, center = len(values), statistics.fmean(values)
    if n == 1:
        return center, None, None
    deviation = statistics.stdev(values)
    return center, deviation, T_975[min(n - 1, len(T_975)) - 1] * deviation / math.sqrt(n)  # a little wide beyond 20


def read_run(path):
    """(flags, result) of a run directory or log.jsonl, result None of a run without validation data. Raises DataError
    where the run has not finished."""
    log, events = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path), {}
    if log.suffix == ".pt":
        raise DataError(f"{log}: a checkpoint; --table takes run directories or their log.jsonl")
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a killed run leaves half a line
            event = json.loads(line)
            events[event["event"]] = event
    if events.get("start", {}).get("flags", {}).get("val") == "none":
        return events["start"]["flags"], None
    if "start" not in events or "result" not in events:
        raise DataError(f"{log}: no {'result' if 'start' in events else 'start'} event; not a log, or not finished")
    flags = events["start"].get("flags", {})
    if not {"recipe", "seed"} <= flags.keys() or "student" not in events["result"]:
        raise DataError(f"{log}: no log of train.py; --table takes run directories or their log.jsonl")
    if flags.get("dtype") == "auto":  # logs from before the measurement
        flags["dtype"] = "fp32" if events["start"]["versions"]["device"].startswith("cpu") else "bf16"
    return flags, events["result"]


def markdown(header, rows):
    """Markdown table from rows of cells, the first being the header."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def row_names(runs):
    """Flags of runs -> the name of each one's row: its recipe, then, as typed, what differs among that recipe's runs.

    None, False, 0, "" and a flag that the log lacks are the same, unless OLD knows better. A path loses its folders
    where it stays unique.
    """
    def value(flags, key):
        v = flags.get(key, OLD.get(key))
        return (" ".join(map(str, v)) if isinstance(v, list) else v) or None

    def short(v):
        path = isinstance(v, str) and not v.startswith("clip:") and not v.endswith("/class")
        return re.sub("(^|:)[^:]*/(?=[^:])", r"\1", v) if path else v

    def typed(key, v, values):
        flag, like = "--" + key.replace("_", "-"), next(filter(None, values))
        if isinstance(like, bool):
            return f" {flag}" if v else f" --no{flag[1:]}"
        if v is None:
            return "" if isinstance(like, str) else f" {flag} 0"
        return f" {flag} {v if [*map(short, values)].count(short(v)) > 1 else short(v)}"

    names = []
    for flags in runs:
        same = [other for other in runs if other["recipe"] == flags["recipe"]]
        found = {key: {value(other, key) for other in same} for other in same for key in other if key not in UNNAMED}
        told = (typed(key, value(flags, key), values) for key, values in found.items() if len(values) > 1)
        names.append(flags["recipe"] + "".join(told))
    return names


def table(paths, against=None):
    """Markdown: mIoU of each row's read-outs over seeds, paired differences, then the IoUs. Rows: see row_names.

    The differences are to the same read-out of the row `against`, without it to source-only AdaBN: the fair reference,
    because the BatchNorm of an adapted teacher has seen the target too. Raises DataError on a file that is no finished
    log, a second run of a row and seed, runs that are not comparable, and where there is no row `against`.
    """
    runs, logs = defaultdict(dict), [(path, *read_run(path)) for path in paths]
    for path in [path for path, _, result in logs if not result]:
        print(f"{path}: no scores, the run had --val none; left out", file=sys.stderr)
    logs = [log for log in logs if log[2]]
    for (path, flags, result), row in zip(logs, row_names([flags for _, flags, _ in logs])):
        seed, first = flags["seed"], logs[0][1]
        differs = [k for k in COMPARABLE if flags.get(k) != first.get(k)]
        if differs == ["target"] and "none" in (flags["target"], first["target"]):
            differs = []  # domain generalisation is validated on the same data, and sees none of it before
        if differs:
            what = ", ".join(f"{k} {flags.get(k)} instead of {first.get(k)}" for k in differs)
            raise DataError(f"{path}: not comparable with {logs[0][0]}: {what}")
        if seed in runs[row]:
            raise DataError(f"{path}: a second run of {row} with seed {seed}")
        runs[row][seed] = result
    if not runs:
        raise DataError("--table: none of these runs has scores")
    if against and against not in runs:
        raise DataError(f"--against {against!r}: no such row; there are: {', '.join(runs)}")
    seeds = sorted({seed for results in runs.values() for seed in results})
    names = list(result["student"]["iou"])
    means, classes = [], []
    for row, readout in ((r, o) for r in runs for o in ("student", "teacher", "adabn")):
        found = {seed: r[readout] for seed, r in runs[row].items() if r[readout]}
        if not found:
            continue
        center, deviation, _ = spread([r["miou"] for r in found.values()])
        reference = (against, readout) if against else ("source", "adabn")
        base = {seed: r[reference[1]]["miou"] for seed, r in runs.get(reference[0], {}).items() if r[reference[1]]}
        pairs = [r["miou"] - base[seed] for seed, r in found.items() if seed in base]
        gain, _, half = spread(pairs) if pairs and (row, readout) != reference else (None, None, None)
        means.append([row, readout, *(number(found[s]["miou"] if s in found else None, ".1f") for s in seeds),
                      f"{center:.1f} ± {number(deviation, '.1f')}",
                      "reference" if (row, readout) == reference else number(gain, "+.1f"),
                      "-" if half is None else f"{gain - half:+.1f} to {gain + half:+.1f}", str(len(pairs))])
        classes.append([row, readout, *(number(mean(r["iou"][n] for r in found.values()), ".1f") for n in names)])
    header = [*(f"seed {s}" for s in seeds), "mean ± sd", f"minus {against or 'source AdaBN'}",
              "95 % interval", "pairs"]
    return (markdown(["recipe", "read-out", *header], means) + "\n\nIoU, mean over seeds\n\n"
            + markdown(["recipe", "read-out", *names], classes))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def device(text):
    """A device that this torch can use."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError):  # no such device, or a torch built without it
        raise argparse.ArgumentTypeError(f"{text!r} is not there; this torch sees "
                                         f"{'cuda and ' if torch.cuda.is_available() else ''}cpu") from None


def arguments(argv):
    """Command line -> checked arguments."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, task = p.add_argument, p.add_mutually_exclusive_group()
    a("checkpoint", nargs="?", metavar="CKPT", help="last.pt or best.pt of a run")
    a("--data", metavar="SPEC", help="data set, as in data.py (default: the validation data of the run)")
    a("--split", default="val", choices=("train", "val", "test"), help="split of the data set")
    task.add_argument("--images", metavar="PATH", help="predict an image file or a folder of images instead")
    task.add_argument("--submit", metavar="DIR", help="write ids for the benchmark's server there instead")
    task.add_argument("--table", nargs="+", metavar="RUN", help="tabulate run directories or log.jsonl files instead")
    task.add_argument("--alignment", metavar="SPEC", help="also compare features with this source, its val split")
    a("--against", metavar="ROW", help="row of the table that the others are compared with (default: source, AdaBN)")
    a("--save", metavar="DIR", help="folder for panels (default: none; with --images: predictions)")
    a("--slide", action=argparse.BooleanOptionalAction,
      help="half overlapping windows of the training crop (HRDA, MIC; default: as the run validated)")
    a("--flip", action="store_true", help="average with the mirror image")
    a("--head", default="plain", choices=("plain", "language", "mean"), help="decoder; language where one was trained")
    a("--weights", default="student", choices=("student", "teacher"), help="which network of the run")
    a("--adabn", metavar="SPEC", help="first re-estimate BatchNorm on unlabelled train images of this data set")
    a("--size", type=parse_size, metavar="WxH", help="size at the network (default: as trained; --images: longer side)")
    a("--json", metavar="FILE", help="write the scores there too")
    a("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, mps, cpu")
    args = p.parse_args(argv)
    if bool(args.checkpoint) == bool(args.table):
        p.error("give a checkpoint, or --table with runs")
    if args.images and args.data:
        p.error("--images and --data both name what to predict: give one of them")
    if args.against and not args.table:
        p.error("--against names a row of --table")
    return args


def run(args):
    """The command line's work after its flags are known."""
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise DataError(f"--json {args.json}: there is no such folder")
    checkpoint = load_checkpoint(args.checkpoint)
    flags, classes = checkpoint["flags"], tuple(checkpoint["classes"])
    model = build_segmenter(checkpoint, args.weights, args.checkpoint).to(args.device)
    if args.head != "plain" and "language" not in model.heads:
        raise CheckpointError(f"{args.checkpoint}: --head {args.head} needs a language decoder, and it has none")
    slide = flags.get("slide") if args.slide is None else args.slide
    size, window = args.size or flags["size"], flags["crop"] if slide else None
    if args.adabn:
        model = adapt_batchnorm(model, open_dataset(args.adabn, "train", classes, size, flags["cache"]))
    spec = args.data or flags["val"]
    if spec == "none" and not args.images:
        raise DataError(f"{args.checkpoint}: the run had no validation data; give --data SPEC or --images PATH")
    dataset = None if args.images else open_dataset(spec, args.split, classes, size, flags["cache"])
    source = args.alignment and open_dataset(args.alignment, "val", classes, size, flags["cache"])
    aligned = {"alignment": alignment(model, source, dataset, args.head)} if source else {}
    begin = time.perf_counter()
    if args.images:
        folder = args.save or "predictions"
        count = predict_images(model, args.images, classes, folder, size, window, args.flip, args.head)
        scale = f"scaled to a longer side of {max(size)} for the network, " if size else ""
        print(f"{scale}panels and ids at native size in {folder}")
    elif args.submit:
        count = submit(model, dataset, args.submit, window, args.flip, args.head)
        print(f"ids of {spec}, split {args.split}, for the server in {args.submit}")
    else:
        if args.save:
            Path(args.save).mkdir(parents=True, exist_ok=True)
        result = evaluate(model, dataset, window, args.flip, args.head, args.save)
        what = {"checkpoint": args.checkpoint, "step": checkpoint["step"], "weights": args.weights, "data": spec,
                "split": args.split, "adabn": args.adabn, "head": args.head, "slide": slide,
                "flip": args.flip}
        print(", ".join(f"{k} {v}" for k, v in what.items() if v), format_scores(result), sep="\n")
        if aligned:
            print(format_alignment(aligned["alignment"]))
        if args.json:
            Path(args.json).write_text(json.dumps(what | result | aligned, indent=1) + "\n")
        count = result["images"]
    peak = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if args.device.type == "cuda" else ""
    print(f"{count} images, {count / (time.perf_counter() - begin):.1f} images/s{peak}")


def main(argv=None):
    """run(), with bad input as one line on stderr and exit status 2."""
    args = arguments(argv)
    try:
        print(table(args.table, args.against)) if args.table else run(args)
    except (DataError, CheckpointError, WeightsError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
