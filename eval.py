"""Prediction, metrics, pictures and export. Everything about the network comes from the checkpoint.

    python eval.py out/last.pt                                     per-class IoU on the validation data of the run
    python eval.py out/last.pt --data cityscapes:DIR --slide --flip --json scores.json --save panels
    python eval.py out/last.pt --adabn camvid:DIR                  BatchNorm statistics of unlabelled target images first
    python eval.py out/last.pt --images photo.jpg --save pictures  any image, or a folder of them
    python eval.py out/last.pt --data cityscapes:DIR --split test --submit upload
    python eval.py --table runs/*                                  mean, spread and paired differences over seeds
"""
import argparse
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
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from data import CLASS_SPACES, IGNORE, DataError, open_dataset, palette
from kernels import upsample_pseudo_label
from model import CheckpointError, WeightsError, build_segmenter, load_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Prediction


def starts(length, window, stride):
    """First pixels of the windows along one side; the last window is shifted back so that it stays inside."""
    return [*range(0, length - window, stride), length - window]


def raw_logits(model, image, window=None, stride=None, flip=False):
    """Logits before the last upsampling: float32 (B,K,h,w), on the network's grid or, from windows, on the pixels."""
    if flip:
        straight = raw_logits(model, image, window, stride)
        return (straight + raw_logits(model, image.flip(-1), window, stride).flip(-1)) / 2
    (B, _, H, W), S = image.shape, window
    if S is None or (H <= S and W <= S):
        return model(image).logits.float()
    stride = stride or max(1, S // 2)
    if not 0 < stride <= S:
        raise ValueError(f"stride {stride} leaves pixels uncovered: it must be in 1..{S}, the window's side")
    h, w = min(S, H), min(S, W)
    total, count = image.new_zeros(B, model.num_classes, H, W), image.new_zeros(H, W)
    for y in starts(H, h, stride):
        for x in starts(W, w, stride):
            logits = model(image[..., y:y + h, x:x + w]).logits.float()
            total[..., y:y + h, x:x + w] += F.interpolate(logits, (h, w), mode="bilinear", align_corners=False)
            count[y:y + h, x:x + w] += 1
    return total.div_(count)


@torch.no_grad()
def predict(model, image, size=None, window=None, stride=None, flip=False):
    """Class probabilities, float32 (B,K,h,w) at `size` (h,w), by default the image's own.

    image: float (B,3,H,W), RGB in [0,1], any size. window None: one pass over the whole image (DAFormer's protocol).
    window S: S x S windows, `stride` apart (default S // 2), logits averaged where they overlap (HRDA, MIC); a side
    shorter than S is taken whole. flip: logits averaged with those of the mirror image. One bilinear step leads from
    the network's grid to `size`. Raises ValueError on a stride that leaves gaps.
    """
    logits = raw_logits(model, image, window, stride, flip)
    return F.interpolate(logits, size or image.shape[2:], mode="bilinear", align_corners=False).softmax(1)


@torch.no_grad()
def predict_labels(model, image, size=None, window=None, stride=None, flip=False):
    """Arg-max of `predict`, uint8 (B,h,w), without ever holding K full-size maps where the image is taken whole."""
    return upsample_pseudo_label(raw_logits(model, image, window, stride, flip), size or image.shape[2:], 0.0)[0]


def read_ahead(dataset, indices, threads=4):
    """dataset[i] for i in indices, decoded by threads while the caller computes."""
    with ThreadPoolExecutor(threads) as pool:
        queue = deque()
        for i in indices:
            queue.append(pool.submit(dataset.__getitem__, i))
            if len(queue) > threads:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def predictions(model, dataset, device, window=None, flip=False, dtype=None, size=None):
    """(item, uint8 prediction (h,w) on the device) for this rank's share of the data: rank, rank + world, ...

    One image at a time, because native sizes differ; predicted at `size` (h,w) or, without it, at the label's. No sample
    is repeated to fill up ranks, so that no score depends on their number. dtype: of autocast.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = range(rank, len(dataset), world)
    bar = tqdm(read_ahead(dataset, indices), "eval", len(indices), disable=True if rank else None, leave=False)
    for item in bar:
        image = item["image"].to(device).float().div(255)[None]  # uint8 (3,H,W) -> (1,3,H,W) in [0,1]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            label = predict_labels(model, image, size or item["label"].shape, window, flip=flip)
        yield item, label[0]


@torch.no_grad()
def adapt_batchnorm(model, dataset, images=96, batch=8):
    """A copy of the model, in eval mode, with BatchNorm statistics of unlabelled images of another domain (AdaBN).

    Li et al. 2016, "Revisiting Batch Normalization for Practical Domain Adaptation". The running statistics are the
    average over batches of about `batch` of `images` images spread evenly over the data set; weights stay. Images of
    different sizes are cropped to the smallest of their batch. A model without BatchNorm is returned as it is.
    """
    if not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        print("AdaBN: this network has no BatchNorm, nothing to adapt", file=sys.stderr)
        return model
    model = copy.deepcopy(model).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.reset_running_stats()
            m.momentum = None  # PyTorch's cumulative average
            m.train()
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int).tolist()
    for part in np.array_split(chosen, math.ceil(len(chosen) / batch)):
        loaded = [dataset[int(i)]["image"] for i in part]
        h, w = (min(image.shape[side] for image in loaded) for side in (1, 2))
        stacked = torch.stack([image[:, :h, :w] for image in loaded])
        model(stacked.to(model.pixel_mean.device).float().div(255))
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
        raise ValueError(f"labels up to {counts.numel() // K - 1} for {K} classes; only 255 may lie outside")
    return counts.view(K + 1, K)[1:]


def scores(confusion, names):
    """Percentages from a confusion matrix (K,K) of a whole data set: {"miou", "iou": {name: value}, "accuracy", "absent"}.

    A class in neither label nor prediction has IoU None, is left out of the mean and named in "absent". For the 19
    Cityscapes classes also "miou16" and "miou13", the means over the classes that SYNTHIA has (without terrain, truck,
    train; without wall, fence, pole too), over the subset itself. None where nothing is to be averaged.
    """
    matrix = confusion.double().cpu()
    hits, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
    iou = {n: 100 * float(h / u) if u else None for n, h, u in zip(names, hits, union)}
    result = {"miou": mean(iou.values()), "iou": iou, "accuracy": mean([100 * float(hits.sum() / matrix.sum())]
              if matrix.sum() else []), "absent": [n for n in names if iou[n] is None]}
    if tuple(names) == tuple(CLASS_SPACES["cityscapes19"]):
        for k in (16, 13):
            result[f"miou{k}"] = mean(iou[n] for n in CLASS_SPACES[f"cityscapes{k}"])
    return result


def mean(values):
    """Mean of the values that are not None, None if there are none."""
    values = [v for v in values if v is not None]
    return statistics.fmean(values) if values else None


def number(value, form=".2f"):
    return "-" if value is None else format(value, form)


def format_scores(result):
    """The scores as lines of text: one class a line, then the means."""
    width = max(map(len, result["iou"]))
    lines = [f"{name:<{width}}  {number(value):>6}" for name, value in result["iou"].items()]
    lines.append("  ".join(f"{title} {number(result[key])}" for key, title in (
        ("miou", f"mIoU ({len(result['iou']) - len(result['absent'])} classes)"), ("miou16", "mIoU16"),
        ("miou13", "mIoU13"), ("accuracy", "accuracy")) if key in result))
    if result["absent"]:
        lines.append(f"in neither labels nor predictions, left out of the mean: {', '.join(result['absent'])}")
    return "\n".join(lines)


def evaluate(model, dataset, device=None, window=None, flip=False, dtype=None, save=None):
    """scores() of a model on a labelled data set plus "images" and "images_per_s"; the same on every rank.

    All ranks must call it; each takes its share and the confusion matrix is summed once. Labels keep their native
    size. dtype None computes in float32, else under autocast. save: a folder for one panel per image. The train/eval
    mode of every module is restored. Raises DataError where there are no labels or only ignored pixels.
    """
    if not dataset.labeled:
        raise DataError(f"{dataset.spec}: no labels in split {dataset.split}; for pictures alone use --images")
    device, names = torch.device(device or model.pixel_mean.device), dataset.classes
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    total, begin = torch.zeros(len(names), len(names), dtype=torch.int64, device=device), time.perf_counter()
    try:
        for item, label in predictions(model, dataset, device, window, flip, dtype):
            total += confusion(label, item["label"].to(device), len(names))
            if save:
                parts = item["label"].numpy(), label.cpu().numpy()
                panel(item["image"].permute(1, 2, 0).numpy(), *parts, palette(names)).save(
                    Path(save) / f"{Path(item['name']).stem}.png")
    finally:
        for m, training in modes:
            m.training = training
    if dist.is_initialized():
        dist.all_reduce(total)
    result = scores(total, names)  # waits for the device
    if result["accuracy"] is None:
        raise DataError(f"{dataset.spec}: every pixel of split {dataset.split} is ignored; do labels and classes match?")
    return result | {"images": len(dataset), "images_per_s": len(dataset) / (time.perf_counter() - begin)}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: uint8 arrays (h,w,3) until they are saved


def as_picture(image):
    """Image tensor (3,H,W), uint8 or float in [0,1], on any device -> uint8 array (H,W,3)."""
    image = image.detach().cpu()
    image = image if image.dtype == torch.uint8 else image.float().mul(255).round().clamp(0, 255).byte()
    return image.permute(1, 2, 0).numpy()  # (3,H,W) -> (H,W,3)


def colorize(label, colors):
    """Ids (h,w), tensor or array, with 255 drawn black, and a palette uint8 (K,3) -> uint8 (h,w,3)."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(colors)] = colors
    return table[torch.as_tensor(label).cpu().numpy()]


def overlay(picture, label, colors):
    """Half picture (h,w,3), half colours of the label (h,w); the picture alone where the label is 255."""
    label = torch.as_tensor(label).cpu().numpy()
    mixed = (picture.astype(np.uint16) + colorize(label, colors)) // 2
    return np.where(label[..., None] == IGNORE, picture, mixed).astype(np.uint8)  # (h,w) -> (h,w,1) against (h,w,3)


def grid(rows, titles=(), gap=4):
    """PIL image of rows of pictures (lists of uint8 (h,w,3), any sizes) on white, with a title above each column."""
    h, w = (max(picture.shape[side] for row in rows for picture in row) + gap for side in (0, 1))
    top = 14 if titles else 0
    sheet = Image.new("RGB", (max(map(len, rows)) * w - gap, top + len(rows) * h - gap), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((i * w + 2, 1), title, fill="black")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x * w, top + y * h))
    return sheet


def panel(picture, label, prediction, colors):
    """One row at the picture's size: image, label (None: left out), prediction, overlay -> PIL image."""
    def fit(ids):  # (h,w) of the label -> (H,W) of the picture
        return np.asarray(Image.fromarray(np.asarray(ids)).resize(picture.shape[1::-1], Image.NEAREST))
    prediction = fit(prediction)
    row = [picture] + ([] if label is None else [colorize(fit(label), colors)])
    titles = ["image"] + ([] if label is None else ["label"]) + ["prediction", "overlay"]
    return grid([row + [colorize(prediction, colors), overlay(picture, prediction, colors)]], titles)


def training_panel(model, views, names):
    """What one training step saw, one row an image of the batch -> PIL image.

    views: title -> images float (B,3,H,W) in [0,1] or ids (B,H,W), each ids map drawn after the picture that it belongs
    to; the model's prediction on the target (or, without one, the source) comes last. The mode is restored.
    """
    training, colors = model.training, palette(names)
    shown = views["target"] if "target" in views else views["source"]
    views = views | {"prediction": predict_labels(model.eval(), shown)}
    model.train(training)
    rows = [[as_picture(view[b]) if view.dim() == 4 else colorize(view[b], colors) for view in views.values()]
            for b in range(len(shown))]
    return grid(rows, [title.replace("_", " ") for title in views])


# ---------------------------------------------------------------------------------------------------------------------
# Own images and benchmark servers

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # Cityscapes id of each train id
SERVERS = {  # spec: (size (W,H) the server wants, id written for each train id, file names)
    "cityscapes": ((2048, 1024), LABEL_IDS, r"[^_]+_\d{6}_\d{6}.*"),
    "acdc": ((1920, 1080), tuple(range(19)), ".+"), "darkzurich": ((1920, 1080), tuple(range(19)), ".+")}


def read_photo(path):
    """Any image file as a PIL image in RGB, turned as its EXIF tag says. Raises DataError naming the file."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
        raise DataError(f"{path}: cannot be read as an image ({error}); remove or repair it") from None


def predict_images(model, path, names, folder, size=None, window=None, flip=False):
    """Predict a file or every image of a folder; write NAME_ids.png and NAME_panel.png (image, prediction, overlay).

    Images are predicted at the training scale, the longer side as long as that of `size` (W,H), and written at their
    own size. NAME is the file's own name without its folder. Returns the number of images. Raises DataError.
    """
    path, folder = Path(path), Path(folder)
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_FILES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no images here ({', '.join(sorted(IMAGE_FILES))})")
    stems, colors = Counter(f.stem for f in files), palette(names)
    folder.mkdir(parents=True, exist_ok=True)
    for file in tqdm(files, "images", disable=None, leave=False):
        photo = read_photo(file)
        scale = max(size) / max(photo.size) if size else 1
        small = photo.resize([max(1, round(side * scale)) for side in photo.size], Image.BILINEAR)
        image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]  # (h,w,3) -> (1,3,h,w)
        image = image.to(model.pixel_mean.device).float().div(255)
        label = predict_labels(model, image, photo.size[::-1], window, flip=flip)[0].cpu().numpy()
        name = file.stem if stems[file.stem] == 1 else file.name  # a.jpg beside a.png
        Image.fromarray(label).save(folder / f"{name}_ids.png")
        panel(np.array(photo), None, label, colors).save(folder / f"{name}_panel.png")
    return len(files)


def submit(model, dataset, folder, window=None, flip=False):
    """Write what the benchmark's server takes, one id PNG per image in a flat, empty folder; returns their number.

    Cityscapes wants label ids in <city>_<sequence>_<frame>*.png, ACDC and Dark Zurich train ids under the image's name.
    Raises DataError on other data sets or classes, a folder that is not empty, and names that the server refuses.
    """
    kind, folder = dataset.spec.split(":")[0], Path(folder)
    if kind not in SERVERS or tuple(dataset.classes) != tuple(CLASS_SPACES["cityscapes19"]):
        raise DataError(f"{dataset.spec}: --submit needs the 19 Cityscapes classes and one of {', '.join(SERVERS)}")
    (w, h), ids, pattern = SERVERS[kind]
    stems = [Path(name).stem for name in dataset.names]
    wrong = [s for s in stems if not re.fullmatch(pattern, s)] or [s for s, n in Counter(stems).items() if n > 1]
    if wrong:
        raise DataError(f"{dataset.spec}: the server would refuse {wrong[0]}.png ({len(wrong)} names not as it wants, or twice)")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; --submit needs a folder of its own, the server reads every file")
    for item, label in predictions(model, dataset, model.pixel_mean.device, window, flip, size=(h, w)):
        written = np.array(ids, np.uint8)[label.cpu().numpy()]
        Image.fromarray(written).save(folder / f"{Path(item['name']).stem}.png")
    return len(dataset)


# ---------------------------------------------------------------------------------------------------------------------
# Tables over runs

READOUTS = ("student", "teacher", "adabn")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
         2.110, 2.101, 2.093, 2.086)  # Student's t, two-sided 95 %, 1 to 20 degrees of freedom


def spread(values):
    """(mean, standard deviation with n - 1, half width of the 95 % t-interval of the mean); None where n = 1."""
    n, center = len(values), statistics.fmean(values)
    if n == 1:
        return center, None, None
    deviation = statistics.stdev(values)
    return center, deviation, T_975[min(n - 1, len(T_975)) - 1] * deviation / math.sqrt(n)  # beyond 20 a little too wide


def read_run(path):
    """(flags, result) of a run directory or log.jsonl. Raises DataError where the run has not finished."""
    log = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    events = {}
    for line in log.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a killed run leaves half a line
            continue
        if isinstance(event, dict):
            events[event.get("event")] = event
    if "start" not in events or "result" not in events:
        raise DataError(f"{log}: no {'result' if 'start' in events else 'start'} event; not a log, or not finished")
    return events["start"]["flags"], events["result"]


def table(paths):
    """Markdown: mIoU of each recipe's read-outs over seeds with paired differences to source-only AdaBN, then IoUs.

    AdaBN is the fair reference, because a teacher's BatchNorm has seen the target too. Raises DataError on a log that is
    none, on two runs of one recipe and seed, and on runs that are not comparable.
    """
    runs, setting = defaultdict(dict), {}
    for path in paths:
        flags, result = read_run(path)
        seed, recipe = flags["seed"], flags["recipe"]
        if seed in runs[recipe]:
            raise DataError(f"{path}: a second run of {recipe} with seed {seed}")
        runs[recipe][seed] = result
        same = {"val": flags.get("val") or flags.get("target"), "step": result["step"]} | {
            key: flags.get(key) for key in ("classes", "size", "crop", "backbone", "decoder")}
        setting = setting or same
        if same != setting:
            differs = ", ".join(f"{k} {same[k]} for {setting[k]}" for k in same if same[k] != setting[k])
            raise DataError(f"{path}: not comparable with {paths[0]}: {differs}")
    seeds = sorted({seed for results in runs.values() for seed in results})
    names = list(next(iter(next(iter(runs.values())).values()))["student"]["iou"])
    base = {seed: result["adabn"]["miou"] for seed, result in runs["source"].items() if result["adabn"]}
    first = ["recipe | read-out | " + " | ".join(f"seed {s}" for s in seeds) +
             " | mean ± sd | minus source AdaBN | 95 % interval | pairs"]
    second = ["recipe | read-out | " + " | ".join(names)]
    for recipe in runs:
        for readout in READOUTS:
            found = {seed: result[readout] for seed, result in runs[recipe].items() if result[readout]}
            if not found:
                continue
            center, deviation, _ = spread([r["miou"] for r in found.values()])
            pairs = [r["miou"] - base[seed] for seed, r in found.items() if seed in base]
            cells = ["-", "-", str(len(pairs))]
            if (recipe, readout) == ("source", "adabn"):
                cells[0] = "reference"
            elif pairs:
                gain, _, half = spread(pairs)
                cells[:2] = f"{gain:+.1f}", "-" if half is None else f"{gain - half:+.1f} to {gain + half:+.1f}"
            each = [number(found[s]["miou"] if s in found else None, ".1f") for s in seeds]
            first.append(" | ".join([recipe, readout, *each, f"{center:.1f} ± {number(deviation, '.1f')}", *cells]))
            second.append(" | ".join([recipe, readout, *(number(mean(r["iou"][n] for r in found.values()), ".1f")
                                                         for n in names)]))
    return "\n\n".join("\n".join(f"| {line} |" for line in (lines[0], " | ".join(["---"] * (lines[0].count("|") + 1)),
                                                            *lines[1:])) for lines in (first, second))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_size(text):
    width, height = text.lower().split("x")
    return int(width), int(height)


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", metavar="CKPT", help="last.pt or best.pt of a run")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--data", metavar="SPEC", help="data set to score (default: validation data of the run)")
    what.add_argument("--images", metavar="PATH", help="an image file or a folder of images to predict instead")
    p.add_argument("--split", default="val", choices=("train", "val", "test"), help="split of the data set")
    p.add_argument("--save", metavar="DIR", help="folder for panels (default with --images: predictions)")
    p.add_argument("--submit", metavar="DIR", help="write ids for the benchmark's server into an empty folder instead")
    p.add_argument("--slide", action="store_true", help="windows of the training crop, half overlapping (HRDA, MIC)")
    p.add_argument("--flip", action="store_true", help="average with the mirror image")
    p.add_argument("--weights", default="student", choices=("student", "teacher"), help="which network of the run")
    p.add_argument("--adabn", metavar="SPEC", help="re-estimate BatchNorm on unlabelled train images of this data set first")
    p.add_argument("--size", type=parse_size, metavar="WxH", help="size of images at the network (default: as trained)")
    p.add_argument("--json", metavar="FILE", help="write the scores there too")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, mps or cpu")
    p.add_argument("--table", nargs="+", metavar="RUN", help="run directories or log.jsonl files to tabulate instead")
    args = p.parse_args(argv)
    if bool(args.checkpoint) == bool(args.table):
        p.error("give a checkpoint, or --table with runs")
    if args.images and args.submit:
        p.error("--images writes pictures, --submit what a server takes: give one of them")
    return args


def run(args):
    if args.table:
        print(table(args.table))
        return
    checkpoint = load_checkpoint(args.checkpoint)
    flags, classes = checkpoint["flags"], tuple(checkpoint["classes"])
    model = build_segmenter(checkpoint, args.weights, args.checkpoint).to(args.device)
    size, window = args.size or flags["size"], flags["crop"] if args.slide else None
    if args.adabn:
        model = adapt_batchnorm(model, open_dataset(args.adabn, "train", classes, size, flags.get("cache")))
    begin = time.perf_counter()
    if args.images:
        folder = args.save or "predictions"
        count = predict_images(model, args.images, classes, folder, size, window, args.flip)
        print(f"predictions at native size in {folder}; images taken at the longer side {max(size) if size else 'as is'}")
    else:
        spec = args.data or flags.get("val") or flags.get("target")
        dataset = open_dataset(spec, args.split, classes, size, flags.get("cache"))
        if args.submit:
            count = submit(model, dataset, args.submit, window, args.flip)
            print(f"ids for the server in {args.submit}")
        else:
            if args.save:
                Path(args.save).mkdir(parents=True, exist_ok=True)
            result = evaluate(model, dataset, window=window, flip=args.flip, save=args.save)
            count = result["images"]
            how = [args.weights, f"step {checkpoint['step']}"] + [f"AdaBN on {args.adabn}"] * bool(args.adabn)
            print(f"{args.checkpoint} ({', '.join(how)}) on {spec}, split {args.split}\n{format_scores(result)}")
            if args.json:
                report = {"checkpoint": args.checkpoint, "data": spec, "split": args.split, "weights": args.weights,
                          "adabn": args.adabn, "slide": args.slide, "flip": args.flip, "step": checkpoint["step"]}
                Path(args.json).write_text(json.dumps(report | result, indent=1) + "\n")
    peak = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if torch.cuda.is_available() else ""
    print(f"{count} images, {count / (time.perf_counter() - begin):.1f} images/s{peak}")


def main(argv=None):
    args = arguments(argv)
    try:
        run(args)
    except (DataError, CheckpointError, WeightsError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
