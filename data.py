"""
Where pixels and labels come from, how they are sampled, and what is done to a batch on the device.

    python data.py streets                                        the rendered default: counts, class shares, contact sheet
    python data.py camvid:DIR --split val --size 256x192          checks every file; exit code 1 if one has a problem
    python data.py folder:IMAGES:LABELS --classes names.txt       own data: ids index the names, one name a line

Specs: streets | streets:shifted | camvid:DIR | cityscapes:DIR | gta:DIR | synthia:DIR | acdc:DIR | darkzurich:DIR |
folder:IMAGES[:LABELS] | list:FILE (image and label paths, one pair a line, relative to FILE). No conversion step, no side files.
Images stay uint8 RGB until they are on the device. A label is a class index or 255 (ignore).
"""
import argparse
import colorsys
import functools
import hashlib
import math
import os
import random
import re
import struct
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

IGNORE = 255
UNKNOWN = 254                             # marks raw ids outside a published table, so a data set has at most 254 classes
MEAN_COLOUR = (124, 116, 104)             # ImageNet mean: padding looks like nothing to a normalised network
RARE_IMAGE, RARE_CROP = 3000 / 512 ** 2, 1500 / 512 ** 2     # rare-class pixel thresholds of DAFormer, as shares of a crop
RECROPS = 10                              # how often a refused crop is drawn again
AUTO_CACHE_BYTES = 2 << 30                # real training sets up to this size are cached without being asked to
Image.MAX_IMAGE_PIXELS = 100_000_000      # Pillow only warns above this; _open makes that an error


class DataError(ValueError):
    """Bad input data: one line that names the file and the remedy."""


# ------------------------------------------------------------------ classes

CLASS_SPACES = {"cityscapes19": ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                                 "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
                                 "motorcycle", "bicycle"),
                "camvid11": ("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car",
                             "Pedestrian", "Bicyclist")}
CLASS_SPACES["cityscapes16"] = tuple(n for n in CLASS_SPACES["cityscapes19"] if n not in ("terrain", "truck", "train"))
CLASS_SPACES["cityscapes13"] = tuple(n for n in CLASS_SPACES["cityscapes16"] if n not in ("wall", "fence", "pole"))

# One label space maps onto another by name and, where the name is missing, by this table, read in both directions
# (right to left the first entry counts: a CamVid SignSymbol is a traffic sign, a Bicyclist a bicycle).
RENAMES = {"road": "Road", "sidewalk": "Pavement", "building": "Building", "wall": "Building", "fence": "Fence",
           "pole": "Pole", "traffic sign": "SignSymbol", "traffic light": "SignSymbol", "vegetation": "Tree",
           "terrain": "Tree", "sky": "Sky", "person": "Pedestrian", "bicycle": "Bicyclist", "rider": "Bicyclist",
           "motorcycle": "Bicyclist", "car": "Car", "truck": "Car", "bus": "Car", "train": "Car"}

COLOURS = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
                    (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)], np.uint8)


def class_names(spec):
    """Names of a class space: a key of CLASS_SPACES, a file with one name a line, or the names themselves -> tuple of str."""
    if not isinstance(spec, str):
        return tuple(spec)
    if spec in CLASS_SPACES:
        return CLASS_SPACES[spec]
    if not Path(spec).is_file():
        raise DataError(f"classes {spec!r}: neither a file nor one of {', '.join(CLASS_SPACES)}")
    names = tuple(line.strip() for line in Path(spec).read_text(encoding="utf-8").splitlines() if line.strip())
    if not 1 <= len(names) < UNKNOWN or len(set(names)) < len(names):
        raise DataError(f"{spec}: needs 1 to {UNKNOWN - 1} different class names, one a line, has {len(names)}")
    return names


def class_index(name, classes):
    """Index of the class called `name` in another list of names, directly or through RENAMES; 255 where it has none."""
    candidates = [name, RENAMES.get(name), *(left for left, right in RENAMES.items() if right == name)]
    return next((classes.index(c) for c in candidates if c in classes), IGNORE)


def palette(names):
    """Colours of classes, uint8 (K,3): the Cityscapes colour where a name has one, else a hue per position."""
    known = [class_index(name, CLASS_SPACES["cityscapes19"]) for name in names]
    spread = [np.multiply(colorsys.hsv_to_rgb(0.618 * i % 1, 0.85, 0.95), 255) for i in range(len(names))]
    return np.array([spread[i] if k == IGNORE else COLOURS[k] for i, k in enumerate(known)]).astype(np.uint8)


# ------------------------------------------------------------------ data sets: one label table and one line of globs each

def _ids(last, names):
    """{raw id: class name, or None for an id that the published table lists but does not train on}."""
    return {**dict.fromkeys(range(last + 1)), **names}


_TRAINED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)       # Cityscapes labelIds in train order
TRAIN_IDS = dict(enumerate(CLASS_SPACES["cityscapes19"]))
LABEL_IDS = _ids(33, dict(zip(_TRAINED, CLASS_SPACES["cityscapes19"])))
GTA_IDS = _ids(34, LABEL_IDS)                                                               # 34: licence plate
SYNTHIA_IDS = _ids(22, dict(zip((3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11),
                                CLASS_SPACES["cityscapes19"])))
CAMVID_IDS = _ids(11, dict(enumerate(CLASS_SPACES["camvid11"])))

# kind: (published size (W,H), raw ids, layouts). A layout is an image glob and the label paths tried in order: their n-th
# star stands for what the n-th star of the image glob matched. A file called *labelTrainIds* holds TRAIN_IDS.
SETS = {
    "camvid": ((480, 360), CAMVID_IDS, [("{split}/images/*.*", "{split}/labels/*.png"), ("{split}/*.png", "{split}annot/*.png")]),
    "cityscapes": ((1024, 512), LABEL_IDS, [("leftImg8bit/{split}/*/*_leftImg8bit.png", "gtFine/{split}/*/*_gtFine_labelIds.png",
                                             "gtFine/{split}/*/*_gtFine_labelTrainIds.png")]),
    "gta": ((1280, 704), GTA_IDS, [("images/*.png", "labels/*.png")]),
    "synthia": ((1280, 760), SYNTHIA_IDS, [("RGB/*.png", "GT/LABELS/*.png")]),
    "acdc": ((960, 540), TRAIN_IDS, [("rgb_anon/**/{split}/**/*_rgb_anon.png", "gt/**/{split}/**/*_gt_labelTrainIds.png")]),
    "darkzurich": ((960, 540), TRAIN_IDS, [("rgb_anon/{split}/night/**/*_rgb_anon.png",
                                            "gt/{split}/night/**/*_gt_labelTrainIds.png")]),
}
STREETS_SEED, STREETS_SIZE = 0, (256, 192)
STREETS = {"streets": {"train": range(1500), "val": range(100_000, 100_100)},                # indices given to the renderer
           "streets:shifted": {"train": range(200_000, 200_500), "val": range(300_000, 300_100)}}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def label_table(ids, classes):
    """256-entry table: raw id -> class index, 255 (ignore), or UNKNOWN for an id that the data set does not know."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[IGNORE] = IGNORE
    for raw, name in ids.items():
        table[raw] = IGNORE if name is None else class_index(name, classes)
    return table


def _some(items):
    return ", ".join(str(i) for i in items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _glob(root, pattern):
    found = (p for p in root.glob(pattern) if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())


def _need(path, spec):
    if not path.exists():
        raise DataError(f"{spec}: {path} does not exist; give the folder or file that holds the data")
    return path


def _published(spec, kind, root, split):
    """Image and label paths of a published layout; no label at all is an unlabelled split, some missing is an error."""
    _need(root, spec)
    layouts = [tuple(glob.format(split=split) for glob in layout) for layout in SETS[kind][2]]
    if split != "train" and layouts == SETS[kind][2]:
        raise DataError(f"{spec}: {kind} has no {split!r} split, all its images are 'train'; choose another data set for it")
    images, layout = next(((found, l) for l in layouts if (found := _glob(root, l[0]))), ([], None))
    if not images:
        raise DataError(f"{spec}: no image matches {' or '.join(str(root / l[0]) for l in layouts)}; check folder and split")
    star = re.escape(layout[0]).replace(r"\*\*/", "((?:.*/)?)").replace(r"\*", "([^/]*)")
    files = []
    for image in images:
        stars = re.fullmatch(star, image.relative_to(root).as_posix()).groups()
        tries = []
        for label in layout[1:]:
            for text in stars:
                label = re.sub(r"\*\*/|\*", lambda _: text, label, count=1)
            tries.append(root / label)
        files.append((image, next((t for t in tries if t.is_file()), None), tries[0]))
    missing = [wanted for _, label, wanted in files if label is None]
    if 0 < len(missing) < len(files):
        raise DataError(f"{spec}: {len(missing)} of {len(files)} images have no label, expected {_some(missing)}; "
                        "add the labels or remove the images")
    return [(image, label) for image, label, _ in files], []


def _folder(spec, text):
    """folder:IMAGES[:LABELS], matched by the path below each folder without its suffix."""
    roots = [_need(Path(part), spec) for part in text.split(":", 1)]
    stems = []
    for root in roots:
        files = _glob(root, "**/*")
        if not files:
            raise DataError(f"{spec}: no image matches {root / '**' / '*'} ({' '.join(sorted(SUFFIXES))})")
        stems.append({f.relative_to(root).with_suffix("").as_posix(): f for f in files})
        if len(stems[-1]) < len(files):
            raise DataError(f"{spec}: two files in {root} differ only in their suffix; remove one of each")
    images, labels = stems[0], stems[-1] if len(stems) == 2 else None
    if labels is None:
        return [(image, None) for image in images.values()], []
    missing = [str(images[s]) for s in images if s not in labels]
    if missing:
        raise DataError(f"{spec}: {len(missing)} of {len(images)} images have no label of the same name in {roots[1]}: {_some(missing)}")
    extra = [str(labels[s]) for s in labels if s not in images]
    return ([(images[s], labels[s]) for s in images],
            [f"{len(extra)} labels have no image and are not used: {_some(extra)}"] if extra else [])


def _listed(spec, path):
    """list:FILE, one image or one pair a line, split at the tab, else at the last space."""
    if not _need(path, spec).is_file():
        raise DataError(f"{spec}: is a folder; list: takes a text file, folder: takes a folder")
    files = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        whole = "\t" not in line and (path.parent / line.strip()).is_file()        # a path may hold spaces
        parts = [line.strip()] if whole else [p.strip() for p in (line.strip().split("\t") if "\t" in line else line.strip().rsplit(" ", 1))]
        # A list may come from anywhere: it must not reach outside its folder. (Symbolic links are the user's own and are followed.)
        if len(parts) > 2 or any(not p or Path(p).is_absolute() or ".." in Path(p).parts for p in parts):
            raise DataError(f"{path}:{number}: {line.strip()!r} needs one or two paths below {path.parent}, without '..'")
        found = [path.parent / p for p in parts]
        if missing := [f for f in found if not f.is_file()]:
            raise DataError(f"{path}:{number}: {missing[0]} does not exist")
        files.append((found[0], found[1] if len(found) == 2 else None))
    if len({label is None for _, label in files}) != 1:
        raise DataError(f"{path}: {'some lines have a label and some have none' if files else 'lists no image'}")
    return files, []


# ------------------------------------------------------------------ reading files

def _open(path):
    """Opened and fully decoded PIL image; whatever is wrong with the file becomes a DataError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"{path}: not a readable image ({str(error).split(str(path))[0].strip()}); restore or remove it") from error


def read_image(path):
    """RGB image, uint8 (H,W,3), turned upright by its EXIF tag; alpha is dropped, grey is repeated. Raises DataError."""
    image = _open(path)
    if image.mode[0] in "IF":
        raise DataError(f"{path}: more than 8 bits per channel (mode {image.mode}); convert it to an 8-bit image")
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_label(path):
    """Raw ids of an 8-bit grey or palette image, uint8 (H,W). Palette files give indices, never colours. Raises DataError."""
    image = _open(path)
    with open(path, "rb") as file:
        head = file.read(26)
    depth, colour = (head[24], head[25]) if image.format == "PNG" else (8, 0)
    if depth == 16 or image.mode[0] in "IF":
        raise DataError(f"{path}: 16-bit label; save class ids as an 8-bit grey or palette PNG")
    if image.mode not in ("1", "L", "P"):
        raise DataError(f"{path}: a colour picture ({image.mode}), not class ids; save ids as an 8-bit grey or palette PNG")
    if image.format in ("JPEG", "WEBP") or colour == 0 and depth in (2, 4):       # lossy, or grey values that Pillow scales up
        raise DataError(f"{path}: {image.format} with {depth} bits does not keep class ids exactly; save them as an 8-bit PNG")
    return np.asarray(image).astype(np.uint8)


def read_png16(path):
    """First channel of a 16-bit PNG as ids, uint8 (H,W): SYNTHIA keeps the class in the red one, of which Pillow returns the
    high byte, always 0. Every filter predicts a byte from its left (a), upper (b) and upper left (c) neighbour, which lie on
    the two anti-diagonals before its own: so whole anti-diagonals are undone at once, W + H steps for all rows together.
    Raises DataError. Source: PNG specification (W3C), sections 5, 9 and 11."""
    blob, chunks, at = Path(path).read_bytes(), {}, 8
    damaged = DataError(f"{path}: truncated or damaged PNG; restore or remove it")
    try:
        while b"IEND" not in chunks:
            length, kind = struct.unpack(">I4s", blob[at:at + 8])
            body, crc = blob[at + 8:at + 8 + length], blob[at + 8 + length:at + 12 + length]
            if zlib.crc32(kind + body) != int.from_bytes(crc, "big"):
                raise damaged
            chunks[kind] = chunks.get(kind, b"") + body
            at += 12 + length
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        if depth != 16 or colour == 3 or interlaced or width * height > Image.MAX_IMAGE_PIXELS:
            raise DataError(f"{path}: not the 16-bit PNG that this data set publishes; use the original label file")
        step = 2 * {0: 1, 2: 3, 4: 2, 6: 4}[colour]                                # bytes per pixel
        rows = zlib.decompressobj().decompress(chunks[b"IDAT"], height * (1 + width * step))
    except (KeyError, struct.error, zlib.error) as error:
        raise damaged from error
    if len(rows) != height * (1 + width * step):
        raise damaged
    rows = np.frombuffer(rows, np.uint8).reshape(height, 1 + width * step)
    kind = rows[:, :1]
    coded = rows[:, 1:].reshape(height, width, step)[:, :, :2].astype(np.int16)    # (H,W,2): both bytes of the first channel
    out = np.zeros((height + width + 1, height + 1, 2), np.int16)                  # [x + y + 2, y + 1], zeros outside the image
    for t in range(height + width - 1):
        y = np.arange(max(0, t - width + 1), min(height, t + 1))
        a, b, c = out[t + 1, y + 1], out[t + 1, y], out[t, y]
        pa, pb, pc = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
        paeth = np.where((pa <= pb) & (pa <= pc), a, np.where(pb <= pc, b, c))
        out[t + 2, y + 1] = coded[y, t - y] + np.choose(kind[y], (0 * a, a, b, (a + b) // 2, paeth)) & 255
    y, x = np.ogrid[:height, :width]
    high, low = np.moveaxis(out[x + y + 2, y + 1], 2, 0)
    if high.any():
        raise DataError(f"{path}: ids above 255; use the original label file")
    return low.astype(np.uint8)


# ------------------------------------------------------------------ the data set and its cache

def open_dataset(spec, split, classes, size=None, cache=None):
    """
    Data set of {"image": uint8 (3,H,W) tensor, "label": uint8 (h,w) tensor or None, "name": str}.

    spec, split ("train", "val", "test"): see the top of the file; classes: see class_names; size (W,H): images are resized
    to it, None is the published size (native for folder: and list:, which are the same in every split). Labels follow the
    image (nearest) in "train" and stay native elsewhere, so that scores do not depend on `size`. cache: directory, None is
    ~/.cache/nanouda; streets and real training sets of one size below 2 GiB are cached there, larger ones only where a
    directory is given. Raises DataError for what can be seen from file names; files are checked when they are read.
    """
    return SegmentationDataset(spec, split, class_names(classes), size, cache)


def parse_size(text):
    """'WxH' -> (W, H)."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WxH, for example 256x192")
    return tuple(map(int, text.split("x")))


class SegmentationDataset(torch.utils.data.Dataset):
    """Made by open_dataset. spec, split, classes, size, names, labeled, notes (what is odd but no error), files (None: rendered)."""

    def __init__(self, spec, split, classes, size, cache):
        kind, _, rest = spec.partition(":")
        self.spec, self.split, self.classes, self.files, self.notes = spec, split, classes, None, []
        self.kind = kind
        if spec in STREETS:
            if split not in STREETS[spec]:
                raise DataError(f"{spec}: has no {split!r} split, only {' and '.join(STREETS[spec])}")
            self.kind, self.indices, self.labeled = spec, STREETS[spec][split], True
            self.names = [f"streets_{i:06d}" for i in self.indices]
            published, ids = STREETS_SIZE, TRAIN_IDS
        elif kind in ("folder", "list") and rest:
            find = {"folder": lambda: _folder(spec, rest), "list": lambda: _listed(spec, Path(rest))}[kind]
            (self.files, self.notes), published, ids = find(), None, dict(enumerate(classes))
        elif kind in SETS and rest:
            published, ids, _ = SETS[kind]
            self.files, self.notes = _published(spec, kind, Path(rest), split)
        else:
            raise DataError(f"{spec!r} is no data set; use {', '.join(STREETS)}, folder:IMAGES[:LABELS], list:FILE or one of "
                            + ", ".join(f"{k}:DIR" for k in SETS))
        if self.files is not None:
            self.labeled = self.files[0][1] is not None
            images = [image for image, _ in self.files]
            self.names = [re.sub("_(leftImg8bit|rgb_anon)$", "", image.stem) for image in images]
            if len(set(self.names)) < len(images):                                # the same stem in several folders
                top = os.path.commonpath([image.parent for image in images])
                self.names = ["__".join(image.relative_to(top).with_suffix("").parts) for image in images]
        self.size = tuple(size or published) if size or published else None
        self.table, self.train_table = label_table(ids, classes), label_table(TRAIN_IDS, classes)
        home = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanouda")
        self.cache_base = home / f"{self.kind.replace(':', '-')}-{split}"
        bytes_needed = len(self) * math.prod(self.size or (0,)) * 4
        self.cached = self.files is None or bool(split == "train" and self.size and (cache or bytes_needed < AUTO_CACHE_BYTES))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        image, label = self.arrays(i)
        return {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),           # (H,W,3) -> (3,H,W)
                "label": None if label is None else torch.from_numpy(np.array(label)), "name": self.names[i]}

    def arrays(self, i):
        """Item i as numpy arrays: image uint8 (H,W,3), label uint8 (h,w) or None; views of the cache where there is one."""
        if not self.cached:
            return self._load(i)
        self._fill(i)
        images, labels, _ = _map_cache(self._cache_file, len(self), self.size, self.labeled)
        if self.files is None:                       # the cache of the streets serves every class space
            return images[i], self.table[labels[i]]
        return images[i], labels[i] if self.labeled else None

    def prepare(self):
        """Fills the cache, if there is one, in parallel; several runs may do so at once, and a killed one may be repeated."""
        if self.cached:
            pending = np.flatnonzero(_map_cache(self._cache_file, len(self), self.size, self.labeled)[2] == 0).tolist()
            random.shuffle(pending)                  # two runs that fill one cache share the work instead of repeating it
            _in_processes(self._fill, pending, f"{self.spec} {self.split}: filling the cache")

    def class_counts(self):
        """Pixels per image and class, int64 (N,K), as `arrays` gives the labels; counted once, then read from the cache."""
        path = Path(f"{self.cache_base}-{self._key(self.table.tobytes())}-counts.npy")
        if not path.is_file():
            self.prepare()
            counts = np.stack(_in_processes(self._count, range(len(self)), f"{self.spec} {self.split}: counting classes"))
            with _writing(path, counts.nbytes):
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}.npy")
                np.save(part, counts)
                os.replace(part, path)
        return np.load(path)

    def check(self, i):
        """(size (W,H), pixels per class (K,) or None, problem or None) of item i as it lies on the disk, not in the cache."""
        try:
            image, label = self.arrays(i) if self.files is None else self._read(i)
        except DataError as error:
            return None, None, str(error)
        return image.shape[1::-1], None if label is None else np.bincount(label.ravel(), minlength=256)[:len(self.classes)], None

    def _read_label(self, i):
        path = self.files[i][1]
        raw = (read_png16 if self.kind == "synthia" else read_label)(path)
        label = (self.train_table if "labelTrainIds" in path.name else self.table)[raw]
        if (unknown := np.unique(raw[label == UNKNOWN])).size:
            raise DataError(f"{path}: ids {_some(unknown.tolist())} are not in the label table of {self.kind} "
                            f"({len(self.classes)} classes); correct the mask or the class list, 255 is 'ignore'")
        return label

    def _read(self, i):
        image, label = read_image(self.files[i][0]), self._read_label(i) if self.labeled else None
        if label is not None and image.shape[:2] != label.shape:
            sizes = ["{1}x{0}".format(*a.shape) for a in (image, label)]
            raise DataError(f"{self.files[i][0]} is {sizes[0]} but {self.files[i][1]} is {sizes[1]}; image and label must agree")
        return image, label

    def _resize(self, array, how):
        if self.size is None or array.shape[1::-1] == self.size:
            return array
        return np.asarray(Image.fromarray(array).resize(self.size, how))

    def _load(self, i):
        if self.files is None:
            return render_street(STREETS_SEED, self.indices[i], self.kind == "streets:shifted", self.size)
        image, label = self._read(i)
        if label is not None and self.split == "train":
            label = self._resize(label, Image.Resampling.NEAREST)
        return self._resize(image, Image.Resampling.BILINEAR), label

    def _count(self, i):
        if not self.labeled:
            raise DataError(f"{self.spec} {self.split}: has no labels to count")
        label = self.arrays(i)[1] if self.cached else self._read_label(i)
        if self.split == "train":
            label = self._resize(label, Image.Resampling.NEAREST)
        return np.bincount(label.ravel(), minlength=256)[:len(self.classes)]

    def _key(self, extra=b""):
        """Hash of everything that the cached bytes depend on."""
        if self.files is None:                       # the renderer's own source: a changed one draws another world
            source = Path(__file__).read_text(encoding="utf-8").rpartition("\n# ---- the rendered streets")[2]
            return hashlib.sha256(repr((self.kind, self.indices, self.size, source, extra)).encode()).hexdigest()[:16]
        stats = [(str(p.resolve()), (s := p.stat()).st_size, s.st_mtime_ns) for pair in self.files for p in pair if p]
        content = (self.kind, self.split, stats, self.size, self.table.tobytes(), extra)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    @functools.cached_property
    def _cache_file(self):
        return f"{self.cache_base}-{self._key()}.u8"

    def _fill(self, i):
        """Writes item i into the cache unless it is there. The done byte comes last and a rewrite gives the same bytes, so
        neither a second run nor a kill in between can leave a wrong item. Written by file, not by mapping: a full disk is
        then an error and not a crash."""
        done = _map_cache(self._cache_file, len(self), self.size, self.labeled)[2]
        if done[i]:
            return
        image, label = self._load(i)
        pixels = math.prod(self.size)
        with _writing(self._cache_file, pixels * 4), open(self._cache_file, "r+b") as file:
            file.seek(i * pixels * 3)
            file.write(image.tobytes())
            if self.labeled:
                file.seek(len(self) * pixels * 3 + i * pixels)
                file.write(label.tobytes())
            file.flush()
            file.seek(-len(self) + i, os.SEEK_END)
            file.write(b"\1")


class _writing:
    """Context: a failed write to the cache becomes one DataError that names the file, the bytes and --cache."""

    def __init__(self, path, needed):
        self.path, self.needed = path, needed

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise DataError(f"{self.path}: cannot be written ({error.strerror}, {self.needed:,} bytes); "
                            "choose another place with --cache DIR") from error


@functools.lru_cache(maxsize=None)                   # one mapping per file and process; data sets stay small to pickle
def _map_cache(path, count, size, labeled):
    """Maps a cache file, made with zeros where it does not exist: images (N,H,W,3), labels (N,H,W) or None, done (N,)."""
    pixels = math.prod(size)
    total = count * (pixels * (4 if labeled else 3) + 1)
    with _writing(path, total):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.truncate(total)                     # changes nothing in a file that another run has begun to fill
    flat = np.memmap(path, np.uint8, "r")
    images, labels, done = np.split(flat, [count * pixels * 3, total - count])
    return images.reshape(count, size[1], size[0], 3), labels.reshape(-1, size[1], size[0]) if labeled else None, done


def _in_processes(task, items, text):
    """[task(i) for i in items] over all cores with a bar on stderr."""
    if not len(items):
        return []
    workers = os.cpu_count()
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = pool.map(task, items, chunksize=max(1, min(32, len(items) // (8 * workers))))
        return list(tqdm(results, total=len(items), desc=text, disable=None))


# ------------------------------------------------------------------ sampling: item k is a function of (seed, data, k)

class RareClassSampler:
    """
    Draws an image for a class, rare classes more often: P(c) = softmax((1 - f_c) / T), f_c the share of labelled pixels.

    counts int64 (N,K): pixels per image and class; only images with more than min_pixels of c stand for c (RARE_IMAGE *
    crop**2 in the published setting), and a class without such an image is never drawn. Raises DataError if none is left.
    Source: DAFormer (Hoyer et al., CVPR 2022), section 3.3.
    """

    def __init__(self, counts, temperature=0.01, min_pixels=0):
        self.images = [np.flatnonzero(column > min_pixels) for column in counts.T]
        found = np.array([len(images) > 0 for images in self.images])
        if not found.any():
            raise DataError(f"no image has more than {min_pixels:.0f} pixels of a class; check the labels with: python data.py SPEC")
        score = np.where(found, (1 - counts.sum(0) / counts.sum()) / temperature, -np.inf)
        self.probabilities = np.exp(score - score.max())
        self.probabilities /= self.probabilities.sum()

    def draw(self, rng):
        """-> (image index, class)."""
        wanted = rng.choice(len(self.probabilities), p=self.probabilities)
        return int(rng.choice(self.images[wanted])), int(wanted)


@functools.lru_cache(maxsize=4)
def _permutation(count, *seed):
    return np.random.default_rng(seed).permutation(count)


class Crops(torch.utils.data.Dataset):
    """
    Endless random crops: item k (any int >= 0) -> {"image" uint8 (3,S,S), "label" uint8 (S,S), "index" int}.

    Item k depends on (seed, names of the data set, k) only, so neither workers, processes nor a resumed run change it.
    Images come in a new order per epoch, or from `rare` (RareClassSampler), which re-crops until more than RARE_CROP * S**2
    pixels of the drawn class are inside. max_share (0.75): re-crops until two classes are present and none covers that share
    of the labelled pixels; None: a plain crop. Both give up after RECROPS tries and take the last crop, as published.
    Flipped with probability 0.5. Small images are padded, labels with 255; an unlabelled set has labels of 255 only.
    Source: DAFormer; `max_share` is mmsegmentation's cat_max_ratio.
    """

    def __init__(self, dataset, crop, seed, rare=None, max_share=0.75):
        self.dataset, self.crop, self.rare = dataset, crop, rare
        self.max_share = max_share if dataset.labeled else None
        # Names, not paths: where the data lies must not change the run.
        self.seed = (seed, zlib.crc32("\n".join([dataset.kind, *dataset.names]).encode()))

    def __getitem__(self, k):
        rng = np.random.default_rng((*self.seed, 0, k))
        if self.rare:
            index, wanted = self.rare.draw(rng)
        else:
            epoch, at = divmod(k, len(self.dataset))
            index, wanted = int(_permutation(len(self.dataset), *self.seed, 1, epoch)[at]), None
        image, label = self.dataset.arrays(index)
        size = self.crop
        if label is None:
            label = np.full(image.shape[:2], IGNORE, np.uint8)
        if min(label.shape) < size:
            image, label = _pad(image, size, MEAN_COLOUR), _pad(label, size, IGNORE)
        for _ in range(1 + RECROPS):
            window = self._window(label, rng)
            if wanted is None or (label[window] == wanted).sum() > RARE_CROP * size * size:
                break
        flip = np.s_[:, ::-1] if rng.random() < 0.5 else np.s_[:]
        image, label = image[window][flip], label[window][flip]
        return {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),           # (S,S,3) -> (3,S,S)
                "label": torch.from_numpy(np.array(label)), "index": index}

    def _window(self, label, rng):
        size = self.crop
        for _ in range(1 + RECROPS):
            top, left = rng.integers(label.shape[0] - size + 1), rng.integers(label.shape[1] - size + 1)
            window = np.s_[top:top + size, left:left + size]
            if self.max_share is None:
                break
            counts = np.bincount(label[window].ravel(), minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return window


def _pad(array, size, value):
    height, width = array.shape[:2]
    padded = np.empty((max(height, size), max(width, size), *array.shape[2:]), np.uint8)
    padded[:] = value
    padded[:height, :width] = array
    return padded


def labeled_subset(names, n):
    """n of the names: sorted, shuffled by numpy's RandomState(42), the first n; nested in n. The published SemiDAViL split."""
    names = sorted(names)
    if not 0 < n <= len(names):
        raise DataError(f"--labeled {n}: the data set has {len(names)} images")
    np.random.RandomState(42).shuffle(names)
    return names[:n]


# ------------------------------------------------------------------ on the device: batched, no host sync, no loop over images

def uniform(shape, generator, shard=(0, 1)):
    """Uniform [0,1) numbers, float32 on the CPU. shape[0] is this process's batch: the whole batch of all `shard[1]` processes
    is drawn and the rows of process `shard[0]` are returned, so results do not depend on the number of processes."""
    rank, world = shard
    return torch.rand((shape[0] * world, *shape[1:]), generator=generator)[rank * shape[0]:(rank + 1) * shape[0]]


def present_classes(label, num_classes):
    """Which classes occur in a label batch, uint8 (B,H,W) -> bool (K,); 255 is not a class."""
    seen = torch.zeros(256, dtype=torch.bool, device=label.device)
    return seen.scatter_(0, label.flatten().long(), True)[:num_classes]                    # (B*H*W,) -> (256,) -> (K,)


def class_mix(source, source_label, target, target_label, target_weight, present, generator, shard=(0, 1)):
    """
    Pastes the pixels of half of the classes of the source batch onto the target, another half for every image.

    source, target (B,3,H,W); labels uint8 (B,H,W); target_weight float, anything that broadcasts to (B,H,W); present bool (K,):
    classes of the whole source batch (present_classes, reduced over processes). Every image draws ceil(n/2) of those n classes,
    also ones that it does not show, as the published code does; 255 is not drawn (there it was).
    -> image (B,3,H,W), label (B,H,W), weight (B,H,W; 1 on source pixels), mask bool (B,1,H,W; True is source).
    Source: ClassMix (Olsson et al., WACV 2021), DACS (Tranheden et al., WACV 2021).
    """
    draw = uniform((source.shape[0], len(present)), generator, shard).to(source.device)    # (B,K)
    rank = draw.masked_fill(~present, -1).argsort(1, descending=True).argsort(1)           # (B,K), absent classes last
    chosen = present & (rank < (present.sum() + 1) // 2)
    table = F.pad(chosen, (0, 256 - len(present)))                                         # (B,256), 255 -> False
    mask = table.gather(1, source_label.flatten(1).long()).view(source_label.shape)        # (B,H*W) -> (B,H,W)
    return (torch.where(mask[:, None], source, target), torch.where(mask, source_label, target_label),
            torch.where(mask, 1.0, target_weight), mask[:, None])


def block_mask(batch, size, block, ratio, generator, shard=(0, 1), device="cpu"):
    """Block mask, float32 (B,1,H,W): 1 keeps a block, 0 hides it; a block is kept where its uniform draw exceeds `ratio`.
    The grid has round(H/block) x round(W/block) cells. Source: MIC (Hoyer et al., CVPR 2023), section 3.2."""
    grid = [max(1, round(side / block)) for side in size]
    keep = uniform((batch, 1, *grid), generator, shard) > ratio
    return F.interpolate(keep.float().to(device), size=tuple(size), mode="nearest")        # (B,1,h,w) -> (B,1,H,W)


def strong_augment(image, generator):
    """
    Colour jitter with probability 0.8 and Gaussian blur with 0.5, float32 (B,3,H,W) in [0,1] -> the same.

    Everything is drawn once per batch: brightness (added) and hue (share of the circle) from +-0.2, contrast and saturation
    (factors) from 0.8..1.2 in random order, sigma from 0.15..1.15. Nine taps hold all of such a Gaussian but 1e-3.
    Source: DACS and DAFormer, which use kornia 0.5: contrast scales towards black, values are clamped after each part.
    """
    jitter, blur, brightness, contrast, saturation, hue, sigma = torch.rand(7, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    parts = (lambda x: (x + 0.4 * brightness - 0.2).clamp(0, 1), lambda x: (x * (0.8 + 0.4 * contrast)).clamp(0, 1),
             lambda x: _saturate(x, 0.8 + 0.4 * saturation), lambda x: _rotate_hue(x, 0.4 * hue - 0.2))
    image = image.float()
    if jitter > 0.2:
        for part in order:
            image = parts[part](image)
    return _blur(image, 0.15 + sigma) if blur > 0.5 else image


def _saturate(image, factor):
    """Scales the saturation of HSV, capped at 1; value and hue stay."""
    value = image.amax(1, keepdim=True)
    spread = value - image.amin(1, keepdim=True)                                           # saturation = spread / value
    return value - (value - image) * (value / spread.clamp(min=1e-8)).clamp(max=factor)


def _rotate_hue(image, turn):
    """Turns the hue of HSV by a share of the full circle; value and saturation stay."""
    red, green, blue = image.split(1, 1)
    value = image.amax(1, keepdim=True)
    spread = value - image.amin(1, keepdim=True)
    safe = spread.clamp(min=1e-8)
    hue = torch.where(value == red, (green - blue) / safe, torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    corner = torch.tensor([5.0, 3.0, 1.0], device=image.device).view(1, 3, 1, 1)
    k = (corner + hue + 6 * turn) % 6                                                      # (B,3,H,W), in sixths of the circle
    return value - spread * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(image, sigma, radius=4):
    """Separable Gaussian blur with reflected borders; a side of n pixels can be reflected by n - 1 at most."""
    for axis in (2, 3):
        r = min(radius, image.shape[axis] - 1)
        taps = torch.exp(torch.arange(-r, r + 1, device=image.device) ** 2 / (-2 * sigma ** 2))
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        kernel = (taps / taps.sum()).view(shape).repeat(3, 1, 1, 1)                        # (3,1,2r+1,1) or (3,1,1,2r+1)
        padded = F.pad(image, (0, 0, r, r) if axis == 2 else (r, r, 0, 0), mode="reflect")
        with torch.autocast(image.device.type, enabled=False):                             # 8 bits need more than bf16
            image = F.conv2d(padded, kernel, groups=3)
    return image


# ------------------------------------------------------------------ python data.py SPEC

def contact_sheet(dataset, rows=8, width=320):
    """PIL image of `rows` evenly spaced items: image | label | overlay, with the classes' names and colours below."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(dataset.classes)] = palette(dataset.classes)
    cells = []
    for i in np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int):
        image, label = dataset.arrays(i)
        size = (width, max(1, round(width * image.shape[0] / image.shape[1])))
        cells.append([Image.fromarray(np.asarray(image)).resize(size, Image.Resampling.BILINEAR)])
        if label is not None:
            drawn = Image.fromarray(colours[label]).resize(size, Image.Resampling.NEAREST)
            cells[-1] += [drawn, Image.blend(cells[-1][0], drawn, 0.5)]
    per_row = len(cells[0]) * width // 160
    foot = 18 * math.ceil(len(dataset.classes) / per_row)
    sheet = Image.new("RGB", (len(cells[0]) * width, sum(row[0].height for row in cells) + foot))
    top = 0
    for row in cells:
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * width, top))
        top += row[0].height
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(dataset.classes):
        x, y = i % per_row * 160, top + i // per_row * 18
        pen.rectangle((x + 2, y + 2, x + 16, y + 16), fill=tuple(colours[i].tolist()))
        pen.text((x + 22, y + 3), name[:22], fill="white")
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="data set, see above")
    parser.add_argument("--classes", help="class space or file with one name a line; default camvid11 for camvid, else cityscapes19")
    parser.add_argument("--size", type=parse_size, help="WxH that the images of the contact sheet are resized to; default as published")
    parser.add_argument("--split", default="train", help="train, val or test")
    parser.add_argument("--cache", help="directory of the cache; default ~/.cache/nanouda")
    parser.add_argument("--out", default="sheet.png", help="contact sheet (image | label | overlay)")
    args = parser.parse_args()
    try:
        dataset = open_dataset(args.spec, args.split, args.classes or ("camvid11" if args.spec.startswith("camvid:") else "cityscapes19"),
                               args.size, args.cache)
        dataset.prepare() if dataset.files is None else None
    except DataError as error:
        sys.exit(f"data.py: {error}")
    sizes, counts, problems = zip(*_in_processes(dataset.check, range(len(dataset)), "checking every file"))
    problems = [p for p in problems if p]
    print(f"{args.spec} {args.split}: {len(dataset)} images, {'with' if dataset.labeled else 'without'} labels, first {_some(dataset.names)}")
    print("sizes: " + ", ".join(f"{w}x{h} ({n})" for (w, h), n in Counter(s for s in sizes if s).most_common(5)))
    for note in dataset.notes:
        print(f"note: {note}")
    if dataset.labeled:
        counts = [c for c in counts if c is not None]
        total = sum(counts, np.zeros(len(dataset.classes), np.int64))
        print(f"{'class':20} {'pixels %':>9} {'images':>7}")
        for name, pixels, images in zip(dataset.classes, total, sum((c > 0 for c in counts), np.zeros(len(total), int))):
            print(f"{name:20} {100 * pixels / max(1, total.sum()):9.3f} {images:7d}")
        if never := [name for i, name in enumerate(dataset.classes) if i not in dataset.table]:
            print(f"note: {dataset.kind} cannot supply {', '.join(never)}: nothing in its label table has such a name")
        if not total.sum():
            problems.append(f"{args.spec}: no pixel belongs to any of the classes; check --classes")
    for problem in problems[:20]:
        print(f"problem: {problem}")
    print(f"{len(problems)} problems" if problems else "no problems")
    if not problems:
        contact_sheet(dataset).save(args.out)
        print(f"contact sheet: {args.out}")
    sys.exit(1 if problems else 0)


# ---- the rendered streets: render_street(seed, index, shifted, size=(256, 192)) -> image uint8 (H,W,3), label uint8 (H,W)


if __name__ == "__main__":
    main()
