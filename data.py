"""
Where pixels and labels come from, how they are sampled, and what is done to a batch on the device.

    python data.py streets              the rendered default: counts, class shares, contact sheet
    python data.py camvid:DIR --split val         reads every file; exit code 2 if one has a problem
    python data.py folder:IMAGES:MASKS --classes FILE
                                        own data: a mask's value is a position in FILE
    python data.py folder:IMAGES:MASKS:IDS        own data: IDS says what the values are

SPEC    streets | streets:night | streets:shifted
                                                  rendered
        camvid:DIR | cityscapes:DIR | gta:DIR | synthia:DIR | acdc:DIR | darkzurich:DIR | ...
                                                  as published, one row of SETS each
        folder:IMAGES[:MASKS[:IDS]]               files of the same name in two folders
        glob:IMAGES[:MASKS[:IDS]]                 with stars, as in 'glob:d/*.jpg:d/*_mask.png': the
                                                  stars of a mask are filled with its image's;
                                                  **/ is any folders, {split} train, val or test
        list:FILE[:IDS]                           an image and its mask a line, by tab, comma, ; or
                                                  blanks, relative to FILE; # begins a comment, and
                                                  a line such as image,mask may come first
        list:FILE:IMAGES[:MASKS[:IDS]]            a name a line, which * stands for, as with VOC's
                                                  'list:d/{split}.txt:d/i/*.jpg:d/m/*.png'
IDS     a file that says what the values of masks mean, a line each, all in one notation:
        road | 7 road | 7, road | 0 - | 128 64 128 road | road,128,64,128 | #804080 road
                                                  see read_table; - is ignored

There is no conversion step. Images stay uint8 RGB until they are on the device; a label is a class
index, or 255 for "ignore".
"""
import argparse
import colorsys
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, UnidentifiedImageError
from tqdm import tqdm

from kernels import IGNORE

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)

UNKNOWN = 254  # marks a raw id that the label table does not list
READING = 8  # of files; a higher number where the same files are read to other values or faults
AUTO_CACHE_BYTES = 2 << 30  # real training sets below this are cached without --cache
Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow only warns above it; _open makes that an error


# ---------------------------------------------------------------- failing, text, writing

class DataError(ValueError):
    """
    Bad input data: one line that names the file and the remedy.

    spares_others: one pair is unreadable or of unequal sizes, which says nothing about the others;
    --skip-bad leaves such pairs out. values: all ids of a mask that holds unknown ones.
    """

    def __init__(self, text, spares_others=False, values=()):
        super().__init__(text)
        self.spares_others = spares_others
        self.values = tuple(values)


def fail(script, error, status):
    """Ends the program with one line on stderr. status 2: bad input, 1: a run that broke."""
    lines = str(error).splitlines() or [type(error).__name__]
    text = lines[-1].removeprefix("data.DataError: ")  # a loader process puts its traceback before
    line = f"{script}: error: {text}"
    with contextlib.suppress(OSError), output():
        pass  # but to pass on what was printed before
    print(line, file=sys.stderr)
    tell_launcher(line)
    sys.exit(status)


@contextlib.contextmanager
def output():
    """
    Inside, something is printed, and at the end all of it is passed on. Raises OSError where the
    other side takes no more, a full disk or a closed pipe; it is left alone then, or Python would
    complain of it once more at its end.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"standard output: cannot be written ({error.strerror})") from None


def tell_launcher(line):
    """
    Has torchrun end its own report with the line. The form of the file is that of torch's
    distributed.elastic.multiprocessing.errors.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # torchrun shows the process that failed first, in whole seconds. A second early, so that this
    # one comes before those that are ended because of it.
    failure = {"message": line, "extraInfo": {"timestamp": int(time.time()) - 1}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": failure}), encoding="utf-8")


def interrupted():
    """Ends the program after Ctrl-C; another one ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("interrupted", file=sys.stderr)
    sys.exit(130)


class Parser(argparse.ArgumentParser):
    """
    A command line whose errors are one line, like all others of the scripts. With it standard
    output takes any text: what its encoding lacks, such as a file's name in Latin-1, as \\udce9.
    """

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")

    def error(self, message):
        fail(self.prog, f"{message} (-h explains the flags)", 2)


def _numbered_lines(path):
    """
    [(number, line)] of a UTF-8 text file: the lines that hold something, stripped. Raises
    DataError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no readable UTF-8 text ({error}); save it as UTF-8") from error
    if any("\0" in line for line in lines):
        raise DataError(f"{path}: no readable UTF-8 text (zero bytes); save it as UTF-8")
    stripped = [line.strip("\ufeff\u200b").strip() for line in lines]  # marks of no width
    return [(number, line) for number, line in enumerate(stripped, 1) if line]


_QUOTES = re.compile(r'(?:^|(?<=[,;:=\t]))\s*"|"\s*(?=$|[,;:=\t])')


def _unquoted(line):
    """A line without the double quotes around its cells, as CSV has them."""
    return _QUOTES.sub("", line)


def _some(items):
    """The first five items in words, and how many more there are."""
    text = ", ".join(map(str, items[:5]))
    if len(items) > 5:
        text += f" and {len(items) - 5} more"
    return text


def _composed(text):
    """A name with its accents in one form: file systems differ (NFC, NFD)."""
    return unicodedata.normalize("NFC", text)


@contextlib.contextmanager
def whole_file(path):
    """
    Inside, a path to write to, of the same suffix; then it becomes `path`, so that an older file
    stays or goes whole. Raises OSError that names the file and the remedy; nothing of the new file
    is left then.
    """
    path = Path(path)
    place = path.resolve()  # a link stays one, to a new file
    part = place.with_name(f".{os.getpid()}{path.suffix}")  # short: a long name may just fit
    try:
        if place.exists() and not place.is_file():
            raise OSError(errno.EEXIST, "not a regular file")
        yield part
        os.replace(part, place)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error}); make room, or give "
                      "another place") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_picture(picture, path):
    """Writes a PIL image in the format of the suffix, whole or not at all. Raises OSError."""
    with whole_file(path) as part:
        picture.save(part)


def cache_folder(path=None):
    """
    Folder of images and text banks: `path`, or nanouda below XDG_CACHE_HOME or ~/.cache. Raises
    DataError where there is no home.
    """
    if path:
        return Path(home(path))  # no shell expands --cache=~/d
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanouda"
    except RuntimeError:
        raise DataError("this user has no home folder for ~/.cache; set --cache DIR, or "
                        "XDG_CACHE_HOME") from None


# ---------------------------------------------------------------- classes

CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle")
CAMVID = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car",
    "Pedestrian", "Bicyclist")


def _without(*names):
    """The Cityscapes classes but `names`."""
    return tuple(name for name in CITYSCAPES if name not in names)


CLASS_SPACES = {
    "cityscapes19": CITYSCAPES,
    "cityscapes16": _without("terrain", "truck", "train"),
    "cityscapes13": _without("terrain", "truck", "train", "wall", "fence", "pole"),
    "camvid11": CAMVID}

# Cityscapes and CamVid name their classes differently. The table is read in both directions; from
# right to left the first entry counts: SignSymbol becomes a traffic sign, Bicyclist a bicycle.
CAMVID_NAMES = {
    "road": "Road", "sidewalk": "Pavement", "building": "Building", "wall": "Building",
    "fence": "Fence", "pole": "Pole", "traffic sign": "SignSymbol", "traffic light": "SignSymbol",
    "vegetation": "Tree", "terrain": "Tree", "sky": "Sky", "person": "Pedestrian",
    "bicycle": "Bicyclist", "rider": "Bicyclist", "motorcycle": "Bicyclist", "car": "Car",
    "truck": "Car", "bus": "Car", "train": "Car"}

# The published colours of the 19 Cityscapes classes, in their order.
COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
    (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32))


def class_names(spec):
    """
    Class names, tuple of str. spec: a key of CLASS_SPACES, a file as of read_table, of which the
    names are taken, or the names themselves. Raises DataError.
    """
    if not isinstance(spec, str):
        return tuple(spec)
    if spec in CLASS_SPACES:
        return CLASS_SPACES[spec]
    path = Path(home(spec))
    if not path.is_file():
        raise DataError(f"classes {spec!r}: neither a file nor one of {', '.join(CLASS_SPACES)}")
    table = read_table(path)
    lines = [name for name in table.names.values() if name is not None]
    if table.kind == "position" and len(set(lines)) < len(lines):
        raise DataError(f"{spec}: needs different class names, one a line; {_some(_twice(lines))} "
                        "stands there twice")
    return _checked_names(spec, table)


def _checked_names(path, table):
    """The class names of a file's table, tuple of str. Raises DataError if they cannot be told."""
    names = table_classes(table)
    if not 1 <= len(names) < UNKNOWN:
        raise DataError(f"{path}: needs 1 to {UNKNOWN - 1} different class names, not {len(names)}")
    alike = _twice([_plain(name) for name in names])
    if alike:
        pair = [name for name in names if _plain(name) == alike[0]]
        raise DataError(f"{path}: the classes {' and '.join(map(repr, pair))} differ in case, "
                        "blanks, _ or - alone, which is not looked at in other files; write one "
                        "name to merge them")
    return names


def _twice(items):
    """The items that occur more than once, a list without repeats."""
    return [item for item, count in Counter(items).items() if count > 1]


def _plain(name):
    """A name as it is compared: without case, blanks, _, - and the form of its accents."""
    return re.sub(r"[\s_-]", "", _composed(name)).casefold()


def class_index(name, classes, renamed=True):
    """
    Position of the class `name` in `classes`, or 255: the same name, or one that differs in case,
    blanks, _ and - alone, or, where renamed, one of CAMVID_NAMES.
    """
    if name in classes:
        return classes.index(name)
    plain = [_plain(known) for known in classes]
    if _plain(name) in plain:
        return plain.index(_plain(name))
    if not renamed:
        return IGNORE
    candidates = [ours for ours, camvid in CAMVID_NAMES.items() if camvid == name]
    if name in CAMVID_NAMES:
        candidates.insert(0, CAMVID_NAMES[name])
    for candidate in candidates:
        if candidate in classes:
            return classes.index(candidate)
    return IGNORE


def palette(names):
    """
    Colours uint8 (K,3): that of the Cityscapes class if there is one, else a hue each. Of two names
    for one class of Cityscapes (person, Pedestrian) the second has a hue too.
    """
    colours = np.zeros((len(names), 3), np.uint8)
    taken = set()
    for i, name in enumerate(names):
        known = class_index(name, CITYSCAPES)
        if known != IGNORE and known not in taken:
            colours[i] = COLOURS[known]
            taken.add(known)
        else:
            hue = 0.618 * i % 1  # steps of the golden ratio: neighbours differ
            colours[i] = [int(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 0.95)]
    return colours


# ---------------------------------------------------------------- tables: what masks mean

class Table(NamedTuple):
    """
    What the values of masks mean.

    names: {value: class name, or None where it is ignored}. A value is an id from 0 to 65535, or a
    colour (red, green, blue). kind: position, id or colour. space: "cityscapes" or "camvid" where
    the names are those of Cityscapes or CamVid, which are renamed into each other. nearest: whether
    a value that is not listed means the nearest one that is. title: a first line that was left out
    of a list of names, because it looks like a title.
    """
    names: dict
    kind: str = "id"
    space: str = None
    nearest: bool = False
    title: str = None


# A line of a table. Between value and name stand blanks, commas, semicolons, colons, = or an arrow.
_GAP = r"(?:\s+(?:-|->|=>)\s+|[\s,;:=]+)"
_COLOUR = r"[(\[]?(?P<red>\d+)[\s,;]+(?P<green>\d+)[\s,;]+(?P<blue>\d+)[)\]]?"
_HEX = r"#(?P<hex>[0-9a-fA-F]{6})"
_NOTATIONS = (
    ("colour", rf"{_HEX}{_GAP}(?P<name>.+)"),  # #804080 road
    ("colour", rf"(?P<name>.+?){_GAP}{_HEX}"),  # road #804080
    ("colour", rf"{_COLOUR}{_GAP}(?P<name>.+)"),  # 128 64 128 road
    ("colour", rf"(?P<name>.+?){_GAP}{_COLOUR}[\s,;]*(:.*)?"),  # road,128,64,128
    ("id", rf"(?P<id>-?\d+){_GAP}(?P<name>.+)"),  # 7 road
    ("id", r"(?P<name>.+?)\s*[\t,;:=]\s*(?P<id>-?\d+)"),  # road, 7
    ("position", r"(?P<name>.*)"))  # road
# A name that begins or ends with another value; marks of JSON, YAML and the like, of a labelmap.txt
# without colours (road:::) and of half a bracket.
_NUMBERS = rf"[-+]?(0[xX][0-9a-fA-F]+|[\d.]+)({_GAP}.*)?|.*[,;]\s*[\d.]+"
_MARKS = r"[-*~|] .*|~.*|<.*|.*[{}\[\]\"].*|.*::.*|[^()]*\([^()]*"
_MARKS += r"|.*\d[\s,;]+\d+[\s,;]+\d.*"  # a colour in some other place
# Both ends of a name at which a number may stand that is meant as its value: 1) road, road 1.
_FIRST_NUMBER = r"\W*(?P<number>\d+)[\W_]+(?P<rest>.*)"
_LAST_NUMBER = r"(?P<rest>.*?)[\W_]+(?P<number>\d+)\W*"
# The first line of a list of names is a title if it is made of these words, one of _TITLES at
# least; that of values and names if it holds one.
_TITLES = {"name", "names", "class", "classes", "classname", "classnames", "label", "labels",
           "labelname", "labelnames", "category", "categories"}
_MORE_OF_A_TITLE = {"id", "ids", "index", "value", "color", "colour", "rgb", "hex", "list", "text",
                    "object", "objects", "semantic", "segmentation"}
_TITLE_WORD = re.compile(r"name|class|label|categor|index|value|colou?r|rgb|\b(id|idx|r)\b", re.I)
_KINDS = {"position": "no value, a name by its position", "id": "an id", "colour": "a colour"}


def read_table(path):
    """
    Table of a text file with a line for each value, all in one notation. Raises DataError.

        road                                    position: 0 for the first line
        7 road    7, road    0 -                id; - is ignored, as is an unlisted 255 without ~
        128 64 128 road    road,128,64,128      colour
        road:128,64,128::    #804080 road       colour

    Lines of the same name merge. A header, blank lines and comments (# and no colour; behind a
    line # and a blank) are skipped, and so are the quotes of CSV. ~ before all ids: masks may be
    JPEG, a value means the nearest one that is listed.
    """
    lines = []  # (number, kind, value, name, tilde)
    for number, line in _numbered_lines(path):
        if line.startswith("#") and not re.match(_HEX + _GAP, line):
            continue
        line = _unquoted(re.sub(r"\s+#(\s.*)?$", "", line))
        lines.append((number, *_parse_line(line, f"{path}: line {number}")))
    title = _title(lines)
    if title:
        lines = lines[1:]
    if not lines:
        raise DataError(f"{path}: names no class; write one a line (behind # is a comment)")

    first, kind, _, _, tilde = lines[0]
    if kind == "id" and len(re.split(r"[,;\t]", title)) > 2:
        raise DataError(f"{path}: its title, {title!r}, names more columns than a value and a "
                        "name; leave the others out")
    names = {}
    where = {}
    for position, (number, own_kind, value, name, own_tilde) in enumerate(lines):
        if own_kind != kind:
            raise DataError(f"{path}: line {number} gives {_KINDS[own_kind]}, where line {first} "
                            f"gives {_KINDS[kind]}; use one notation in all lines")
        if re.fullmatch(_MARKS, name):
            raise DataError(f"{path}: line {number}: {name!r} is no plain name; write a name a "
                            "line, or ID NAME, or RED GREEN BLUE NAME, ~ before an id")
        if own_tilde != tilde:
            raise DataError(f"{path}: line {number}: write ~ before all values or before none")
        if kind == "position":
            value = position
        if value in names:
            raise DataError(f"{path}: line {number}: {_words(value)} stands in line {where[value]} "
                            "already; remove one")
        names[value] = None if name == "-" else name
        where[value] = number
    if kind == "position":
        _refuse_columns(path, list(names.values()))
        _refuse_numbers(path, list(names.values()))
    return Table(names, kind, nearest=tilde, title=title if kind == "position" else None)


def _parse_line(line, where):
    """(kind, value or None, name, whether ~ stands before it) of a line. Raises DataError."""
    tilde = re.match(r"~\s*[-\d#]", line) is not None
    line = line.removeprefix("~").strip() if tilde else line
    for kind, notation in _NOTATIONS:
        match = re.fullmatch(notation, line)
        if match:
            break
    parts = match.groupdict()
    name = parts["name"].strip(" \t',;")
    if tilde and kind == "position" or re.fullmatch(_NUMBERS, name) or not name:
        raise DataError(f"{where}: {line!r} has not one value and one name; write ID NAME or "
                        "RED GREEN BLUE NAME, and letters first in a name")
    if kind == "position":
        return kind, None, name, tilde
    value, most = _value(parts)
    if kind == "colour" and tilde:
        raise DataError(f"{where}: ~ stands before a colour; it is for ids alone")
    if not 0 <= np.min(value) <= np.max(value) <= most:
        raise DataError(f"{where}: {_words(value)} is out of range; it must be from 0 to {most}")
    return kind, value, name, tilde


def _refuse_columns(path, names):
    """
    Raises DataError where several names, str or None, are rows of three columns or more, which say
    more than a position.
    """
    gaps = {len(re.findall(r"[,;\t]", name or "")) for name in names}
    if len(names) > 1 and len(gaps) == 1 and min(gaps) > 1:
        raise DataError(f"{path}: its lines have {min(gaps) + 1} columns, such as {names[0]!r}; "
                        "leave the value and the name, `ID NAME` or RED GREEN BLUE NAME")


def _refuse_numbers(path, names):
    """
    Raises DataError where each of several names, str or None, holds a number that may be its value.
    """
    for pattern in (_FIRST_NUMBER, _LAST_NUMBER):
        found = [re.fullmatch(pattern, name or "") for name in names]
        if len(names) < 2 or not all(found):
            continue
        numbers = {match["number"] for match in found}
        rests = {match["rest"] for match in found}
        if len(numbers) == len(names) and len(rests) > 1:  # not lane 1, lane 2
            raise DataError(f"{path}: all its lines hold a number, such as {names[0]!r}: write "
                            "`ID NAME` where that is the value, or else `0 NAME`, `1 NAME`")


def _value(parts):
    """(id or colour (red, green, blue), the largest number that it may hold)."""
    if parts.get("id"):
        return int(parts["id"]), 65535
    if parts.get("hex"):
        return tuple(bytes.fromhex(parts["hex"])), 255
    return (int(parts["red"]), int(parts["green"]), int(parts["blue"])), 255


def _title(lines):
    """The first of the lines (number, kind, value, name, tilde) if it titles the others, or ""."""
    if len(lines) < 2 or lines[0][1] != "position":
        return ""
    name = lines[0][3]
    if any(kind == "position" for _, kind, *_ in lines[1:]):
        words = set(re.findall(r"[^\W_]+", name.lower()))  # of Class names, or class_id,class_name
        titles = bool(words & _TITLES) and words <= _TITLES | _MORE_OF_A_TITLE
        # labelme counts from -1: its __ignore__ is saved as 255
        return name if titles or name == "__ignore__" else ""
    return name if _TITLE_WORD.search(name.replace("_", " ")) else ""


def _words(value):
    """An id or a colour as it is written: 7, or 128,64,128."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def table_classes(table):
    """The class names of a table, tuple of str, in order of first appearance."""
    return tuple(dict.fromkeys(name for name in table.names.values() if name is not None))


def _classes_of_values(table, classes):
    """{value: class index, or 255 where it is ignored}, the values in their order."""
    renamed = table.space is not None and tuple(classes) in CLASS_SPACES.values()
    found = {}
    for value in sorted(table.names):
        name = table.names[value]
        found[value] = IGNORE if name is None else class_index(name, classes, renamed)
    return found


def label_table(table, classes):
    """
    Classes uint8 (256,) or (65536,) of raw ids: index, 255 (ignore), or UNKNOWN for an id that the
    table does not list. Of colours (n+1,): of the n listed ones in their order, then UNKNOWN.
    """
    found = _classes_of_values(table, classes)
    values = list(found)
    if table.kind == "colour":
        return np.array([*found.values(), UNKNOWN], np.uint8)
    labels = np.full(256 if values[-1] < 256 else 65536, UNKNOWN, np.uint8)
    if table.nearest:
        ids = np.arange(len(labels))[:, None]  # (M,1) against (n,)
        labels[:] = np.array(list(found.values()), np.uint8)[abs(ids - values).argmin(1)]
    else:
        labels[IGNORE] = IGNORE
    labels[values] = list(found.values())
    return labels


def _look_up(table, labels, raw):
    """
    Labels uint8 (H,W) of raw ids or packed colours (H,W). table: a Table, labels: label_table of
    it.
    """
    if table.kind == "colour":
        return _labels_of_colours(tuple(sorted(table.names)), labels.tobytes())[raw]
    if raw.dtype != np.uint8 and len(labels) < 65536:
        labels = np.pad(labels, (0, 65536 - len(labels)), constant_values=UNKNOWN)
    return labels[raw]


@functools.lru_cache(4)
def _labels_of_colours(colours, labels):
    """Labels uint8 (2**24,) of colours packed as in read_mask_colours. labels: a label_table."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    for (red, green, blue), label in zip(colours, labels):
        table[red | green << 8 | blue << 16] = label
    return table


def _table_of_names(table, names):
    """label_table in which the values of some of its names are 0, and those of all others 255."""
    marked = {}
    for value, name in table.names.items():
        marked[value] = "marked" if name in names else None
    return label_table(table._replace(names=marked), ("marked",))


def mapping_lines(table, classes):
    """What each value of a table becomes, list of str such as '7 -> road'."""
    lines = []
    for value, index in _classes_of_values(table, classes).items():
        name = table.names[value]
        became = "ignored"
        if index != IGNORE:
            became = classes[index]
        elif name is not None:
            became = f"ignored ({name})"
        lines.append(f"{_words(value)} -> {became}")
    return lines


# ---------------------------------------------------------------- the table of data sets

def _ids(last, trained, names=CITYSCAPES, space="cityscapes"):
    """Table of ids up to `last`, of which those in `trained` have the names, in their order."""
    table = dict.fromkeys(range(last + 1))
    table.update(zip(trained, names))
    return Table(table, space=space)


# Raw ids in the order of the classes.
_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_SYNTHIA_IDS = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)

TRAIN_IDS = _ids(18, range(19))
LABEL_IDS = _ids(33, _LABEL_IDS)
GTA_IDS = _ids(34, _LABEL_IDS)
SYNTHIA_IDS = _ids(22, _SYNTHIA_IDS)
URBANSYN_IDS = _ids(19, range(19))  # train ids, and 19 for what has no label
CAMVID_IDS = _ids(11, range(11), CAMVID, "camvid")

# CamVid's 32 colours, grouped into the 11 classes as SegNet did (Badrinarayanan et al., 2017).
CAMVID_COLOURS = Table({
    (0, 0, 0): None,
    (128, 128, 128): "Sky",
    (0, 128, 64): "Building",  # bridge
    (128, 0, 0): "Building",
    (64, 192, 0): "Building",  # wall
    (64, 0, 64): "Building",  # tunnel
    (192, 0, 128): "Building",  # archway
    (192, 192, 128): "Pole",
    (0, 0, 64): "Pole",  # traffic cone
    (128, 64, 128): "Road",
    (128, 0, 192): "Road",  # lane markings
    (192, 0, 64): "Road",  # other markings
    (0, 0, 192): "Pavement",
    (64, 192, 128): "Pavement",  # parking block
    (128, 128, 192): "Pavement",  # road shoulder
    (128, 128, 0): "Tree",
    (192, 192, 0): "Tree",  # other vegetation
    (192, 128, 128): "SignSymbol",
    (128, 128, 64): "SignSymbol",  # other text
    (0, 64, 64): "SignSymbol",  # traffic light
    (64, 64, 128): "Fence",
    (64, 0, 128): "Car",
    (64, 128, 192): "Car",  # SUV, pickup
    (192, 128, 192): "Car",  # truck, bus
    (192, 64, 128): "Car",  # train
    (128, 64, 64): "Car",  # other moving things
    (64, 64, 0): "Pedestrian",
    (192, 128, 64): "Pedestrian",  # child
    (64, 0, 192): "Pedestrian",  # cart, luggage, pram
    (64, 128, 64): "Pedestrian",  # animal
    (0, 128, 192): "Bicyclist",
    (192, 0, 192): "Bicyclist"}, "colour", "camvid")  # motorcycle, scooter

# IDD's level-3 ids; its names that Cityscapes does not train on stay names, for --classes FILE.
IDD_IDS = Table(dict(enumerate((
    "road", "drivable fallback", "sidewalk", "non-drivable fallback", "person", "rider",
    "motorcycle", "bicycle", "autorickshaw", "car", "truck", "bus", "vehicle fallback", "curb",
    "wall", "fence", "guard rail", "billboard", "traffic sign", "traffic light", "pole",
    "obs-str-bar-fallback", "building", "bridge", "vegetation", "sky"))), space="cityscapes")
IDD_LITE_IDS = Table(dict(enumerate((
    "drivable", "non-drivable", "living things", "vehicles", "roadside objects", "far objects",
    "sky"))))

# Mapillary Vistas 1.2: its 66 ids as classes of Cityscapes, where these are defined to include them
# (curbs, say, are part of a sidewalk). The others, such as parking, bridges or mountains, are None.
VISTAS_IDS = Table(dict.fromkeys(range(66)) | {
    2: "sidewalk", 3: "fence", 6: "wall", 7: "road", 8: "road", 9: "sidewalk", 11: "sidewalk",
    13: "road", 14: "road", 15: "sidewalk", 17: "building", 19: "person", 20: "rider", 21: "rider",
    22: "rider", 23: "road", 24: "road", 26: "terrain", 27: "sky", 29: "terrain", 30: "vegetation",
    36: "road", 41: "road", 43: "road", 45: "pole", 47: "pole", 48: "traffic light",
    50: "traffic sign", 52: "bicycle", 54: "bus", 55: "car", 57: "motorcycle", 58: "train",
    61: "truck"}, space="cityscapes")

LOVEDA_IDS = Table(dict(enumerate((
    None, "background", "building", "road", "water", "barren", "forest", "agricultural"))))

# size: the published (W,H), None for that of each file; detail_size: that of training at several
# resolutions (HRDA), None where it is the same. layouts: tuples of an image glob and the
# label paths to try, in which a star is what the star of the same rank matched in the image's path.
# splits: other words for {split}. Files that are named *labelTrainIds* hold TRAIN_IDS, whatever the
# data set.
# Tried on real files: camvid, in ids. The others are built to their publishers' descriptions.
Published = namedtuple("Published", "size ids layouts splits detail_size", defaults=({}, None))

_LOVEDA_SPLITS = {"train": "Train", "val": "Val", "test": "Test"}

SETS = {
    "camvid": Published((480, 360), CAMVID_IDS, [
        ("{split}/images/*.*", "{split}/labels/*.png"),
        ("{split}/*.png", "{split}annot/*.png")]),
    "camvid32": Published((480, 360), CAMVID_COLOURS, [
        ("{split}/*.png", "{split}_labels/*_L.png"),
        ("701_StillsRaw_full/*.png", "LabeledApproved_full/*_L.png")]),
    "cityscapes": Published((1024, 512), LABEL_IDS, [
        ("leftImg8bit/{split}/*/*_leftImg8bit.png",
         "gtFine/{split}/*/*_gtFine_labelIds.png",
         "gtFine/{split}/*/*_gtFine_labelTrainIds.png")], detail_size=(2048, 1024)),
    "foggycityscapes": Published((1024, 512), LABEL_IDS, [
        ("leftImg8bit_foggy/{split}/*/*_leftImg8bit_foggy_beta_0.02.png",
         "gtFine/{split}/*/*_gtFine_labelIds.png",
         "gtFine/{split}/*/*_gtFine_labelTrainIds.png")]),
    "gta": Published((1280, 704), GTA_IDS, [
        ("images/*.png", "labels/*.png")], detail_size=(2560, 1408)),
    "synthia": Published((1280, 760), SYNTHIA_IDS, [
        ("RGB/*.png", "GT/LABELS/*.png")], detail_size=(2560, 1520)),
    "urbansyn": Published((1024, 512), URBANSYN_IDS, [
        ("rgb/rgb_*.png", "ss/ss_*.png")]),
    "synscapes": Published((1440, 720), LABEL_IDS, [
        ("img/rgb/*.png", "img/class/*.png")]),
    "acdc": Published((960, 540), TRAIN_IDS, [
        ("rgb_anon/**/{split}/**/*_rgb_anon.png", "gt/**/{split}/**/*_gt_labelTrainIds.png")],
        detail_size=(1920, 1080)),
    "darkzurich": Published((960, 540), TRAIN_IDS, [
        ("rgb_anon/{split}/night/**/*_rgb_anon.png",
         "gt/{split}/night/**/*_gt_labelTrainIds.png")], detail_size=(1920, 1080)),
    "bdd100k": Published((1280, 720), TRAIN_IDS, [
        ("images/10k/{split}/*.jpg", "labels/sem_seg/masks/{split}/*.png"),
        ("seg/images/{split}/*.jpg", "seg/labels/{split}/*_train_id.png")]),
    "kitti": Published((1242, 375), LABEL_IDS, [
        ("training/image_2/*.png", "training/semantic/*.png")]),
    "vistas": Published(None, VISTAS_IDS, [
        ("{split}/images/*.jpg", "{split}/v1.2/labels/*.png", "{split}/labels/*.png")],
        {"train": "training", "val": "validation", "test": "testing"}),
    "idd": Published((1280, 720), IDD_IDS, [  # after IDD's createLabels.py --id-type level3Id
        ("leftImg8bit/{split}/*/*_leftImg8bit.*",
         "gtFine/{split}/*/*_gtFine_labellevel3Ids.png")]),
    "idd-lite": Published((320, 227), IDD_LITE_IDS, [
        ("leftImg8bit/{split}/*/*_image.jpg", "gtFine/{split}/*/*_label.png")]),
    "loveda": Published((1024, 1024), LOVEDA_IDS, [
        ("{split}/*/images_png/*.png", "{split}/*/masks_png/*.png")], _LOVEDA_SPLITS),
    "loveda-urban": Published((1024, 1024), LOVEDA_IDS, [
        ("{split}/Urban/images_png/*.png", "{split}/Urban/masks_png/*.png")], _LOVEDA_SPLITS),
    "loveda-rural": Published((1024, 1024), LOVEDA_IDS, [
        ("{split}/Rural/images_png/*.png", "{split}/Rural/masks_png/*.png")], _LOVEDA_SPLITS)}

# The rendered streets: the indices that the renderer draws for each split.
STREETS_SEED = 0
STREETS_SIZE = (256, 192)
STREETS = {
    "streets": {"train": range(1500), "val": range(100_000, 100_100)},
    "streets:shifted": {"train": range(200_000, 200_500), "val": range(300_000, 300_100)},
    "streets:night": {"train": range(400_000, 400_500), "val": range(500_000, 500_100)}}


# ---------------------------------------------------------------- a SPEC in its parts

# Own data: the kinds of SPEC, their parts in order, as Spec has them, and what each part names.
OWN = {
    "folder": {"images": "folder", "masks": "folder", "ids": "file"},
    "glob": {"images": "glob", "masks": "glob", "ids": "file"},
    "list": {"listed": "file", "ids": "file"}}
LIST_OF_NAMES = {"listed": "file"} | OWN["glob"]

# A SPEC in its parts. images: the folder of published data, or what stands for images in own data;
# listed: the file of list:; None for what is not given.
Spec = namedtuple("Spec", "kind images masks ids listed", defaults=(None, None, None, None))


def home(path):
    """The path, str, with ~ as the user's folder."""
    return os.path.expanduser(path)


def specs(value):
    """One SPEC, or a list of several, as a list of str."""
    return [value] if isinstance(value, str) else list(value)


def parse_spec(text, split="train"):
    """Spec of a text. Raises DataError."""
    if text in STREETS:
        return Spec(text)
    kind, _, rest = text.partition(":")
    if not rest or kind not in (*OWN, *SETS):
        published = ", ".join(f"{name}:DIR" for name in SETS)
        raise DataError(f"{text!r} names no data set; use {', '.join(STREETS)}, "
                        f"folder:IMAGES[:MASKS[:IDS]], glob:IMAGES[:MASKS[:IDS]], list:FILE[:IDS], "
                        f"list:FILE:IMAGES[:MASKS[:IDS]] or {published}")
    if kind in SETS:
        return Spec(kind, _as_stored(rest, "folder"))
    if "" in rest.split(":"):
        raise DataError(f"{text!r}: nothing stands between two of its colons or behind the last; "
                        "fill it in, or leave the colon out")
    rest = rest.replace("{split}", split)
    form = OWN[kind]
    if kind == "list" and "*" in rest:
        form = LIST_OF_NAMES
    parts = {}
    for part, path in zip(form, _split_paths(rest, tuple(form.values()))):
        parts[part] = _as_stored(path, form[part])
    ids = parts.get("ids", "")
    if form is OWN["list"] and ":" in ids and not os.path.exists(ids):
        raise DataError(f"{text!r}: {ids}: no such file; if these are IMAGES and MASKS, "
                        "write patterns with a * for the names: images/*.jpg:masks/*.png")
    return Spec(kind, **parts)


def _split_paths(text, kinds):
    """
    The paths that colons join, list of str. kinds: what they name, at most that many paths.

    A path may hold colons, or begin with a drive letter. Of all ways to split the text one is taken
    of which all paths exist, else the most; among equals one that tears off no drive letter; then
    that of the most paths.
    """
    pieces = text.split(":")
    best = None
    for count in range(1, min(len(kinds), len(pieces)) + 1):
        for cuts in itertools.combinations(range(1, len(pieces)), count - 1):
            edges = (0, *cuts, len(pieces))
            paths = []
            for begin, end in zip(edges, edges[1:]):
                paths.append(":".join(pieces[begin:end]))
            existing = sum(map(_exists, paths, kinds))
            torn = 0
            for path, following in zip(paths, paths[1:]):
                torn += bool(re.search("(^|:)[A-Za-z]$", path) and re.match(r"[\\/]", following))
            rank = (existing == count, existing, -torn, count)
            if best is None or rank > best[0]:
                best = (rank, paths)
    return best[1]


def _exists(path, kind):
    """Whether a path of a SPEC exists: a folder, a file, or the folder in which a glob begins."""
    path = _as_stored(path, kind)
    if kind == "folder":
        return os.path.isdir(path)
    if kind == "glob" and "*" in path:
        folder, rest = _glob_root(path)
        return os.path.isdir(folder) and ":" not in rest
    return os.path.isfile(path)


def _as_stored(path, kind):
    """A path of a SPEC, str; ~ is the user's folder, accents are as the file system has them."""
    path = home(path)
    if not path:
        return path
    rest = ""
    begin = path
    if kind == "glob" and "*" in path:
        begin, rest = _glob_root(path)
    found = _existing(Path(begin))
    if found is None or str(found) == begin:
        return path
    return os.path.join(found, rest) if rest else str(found)


def _glob_root(pattern):
    """(folder, the rest): a glob is cut before its first part with a star."""
    parts = Path(pattern).parts
    stars = [i for i, part in enumerate(parts) if "*" in part]
    cut = stars[0] if stars else len(parts) - 1
    return str(Path(*parts[:cut])), "/".join(parts[cut:])


# ---------------------------------------------------------------- finding files

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jpe", ".jfif", ".jp2", ".j2k", ".jpx", ".tga", ".dib", ".pcx", ".sgi", ".ras", ".qoi",
    ".apng", ".mpo", ".dds", ".xbm", ".xpm")
PHONE_SUFFIXES = (".heic", ".heif", ".avif")  # read where Pillow is built or extended for it
SUFFIXES += tuple(end for end in PHONE_SUFFIXES if end in Image.registered_extensions())


def walk(folder, above=()):
    """
    Files below a folder, also in linked ones, but not in a link to a folder that it is in, and
    links to files that are gone, which nobody can read: they would be missed in silence. Hidden
    files and folders, such as .ipynb_checkpoints or a Mac's ._a.png, do not count, nor does @eaDir,
    in which a Synology keeps thumbnails.
    """
    real = os.path.realpath(folder)
    inside = any(os.path.join(one, "").startswith(os.path.join(real, "")) for one in above)
    if inside or not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if entry.name[0] == "." or entry.name == "@eaDir":
            continue
        if entry.is_dir():
            yield from walk(entry.path, (*above, real))
        elif entry.is_file() or not os.path.exists(entry.path):
            yield Path(entry.path)


def _glob(dataset, root, pattern):
    """
    [(image file, what its stars matched)] below a folder, as of walk, sorted. Those that Pillow
    cannot read are named in the data set's notes. Raises DataError where two match alike, x.jpg and
    x.JPG.
    """
    stars = _star_groups(_composed(pattern))
    found = []
    skipped = []
    for file in walk(root):
        match = stars.fullmatch(_composed(file.relative_to(root).as_posix()))
        suffix = file.suffix.lower()
        if not match:
            continue
        if suffix in SUFFIXES:
            found.append((file, match.groups()))
        elif suffix in PHONE_SUFFIXES:
            skipped.append(file.name)
    if skipped:
        dataset.notes.append(f"{root}: {len(skipped)} files are skipped, Pillow does not read them "
                             f"here; save them as JPEG or PNG: {_some(sorted(skipped))}")
    found.sort()
    seen = {}
    for file, matched in found:
        if matched in seen:
            raise DataError(f"{file}: is the same name as {seen[matched]} but for upper case or "
                            "the form of accents; remove one of the two")
        seen[matched] = file
    return found


def _star_groups(pattern):
    """Regular expression of a glob, with a group for each star; *.jpg is *.JPG too."""
    text = re.escape(pattern).replace(r"\*\*/", "((?:.*/)?)").replace(r"\*", "([^/]*)")
    text = re.sub(r"\\\.\w+$", lambda suffix: f"(?i:{suffix[0]})", text)
    return re.compile(text)


def _fill_stars(pattern, matched):
    """The pattern with its stars replaced by texts, in their order."""
    first, *rest = re.split(r"\*\*/|\*", pattern)
    return first + "".join(text + part for text, part in zip(matched, rest))


@functools.lru_cache(None)
def _composed_names(folder):
    """{name with its accents composed: name} of what is in a folder."""
    return {_composed(name): name for name in os.listdir(folder)}


def _existing(path):
    """The path, or one that exists and differs in the form of its accents, or None."""
    if os.path.exists(path):  # False too for what is too long for a name
        return path
    if str(path).isascii() or path == path.parent:
        return None
    parent = _existing(path.parent)
    if parent is None or not parent.is_dir():
        return None
    name = _composed_names(parent).get(_composed(path.name))
    return parent / name if name else None


def _existing_file(path):
    """The file of that name, as _existing, or one with its suffix in other case, or None."""
    candidates = [path]
    if path.suffix:
        candidates.append(path.with_suffix(path.suffix.lower()))
        candidates.append(path.with_suffix(path.suffix.upper()))
    for candidate in candidates:
        found = _existing(candidate)
        if found and found.is_file():
            return found
    return None


def _accept_missing(dataset, files):
    """
    Checks [(image, label or None)]: all labels may be missing, that is an unlabelled set. Where
    some are missing this is noted if dataset.partial, else raises DataError.
    """
    missing = [str(image) for image, label in files if label is None]
    if len(missing) in (0, len(files)):
        return
    text = f"{len(missing)} of {len(files)} images have no label: {_some(missing)}"
    if not dataset.partial:
        raise DataError(f"{dataset.spec}: {text}; add them (only the --target of train.py may lack "
                        "some, with another --val, or none)")
    dataset.notes.append(text + "; train.py refuses that, but in its --target")


def _find_published(dataset, root):
    """[(image, label or None)] of the first layout of SETS that has images. Raises DataError."""
    root = Path(root)
    published = SETS[dataset.kind]
    split = published.splits.get(dataset.split, dataset.split)
    layouts = published.layouts
    if dataset.split != "train":
        layouts = [layout for layout in layouts if "{split}" in layout[0]]
    if not layouts:
        raise DataError(f"{dataset.spec}: has no {dataset.split!r} split, all its images are "
                        "'train'; use another data set")
    for layout in layouts:
        pattern, *label_patterns = [path.format(split=split) for path in layout]
        images = _glob(dataset, root, pattern)
        if images:
            break
    if not images:
        tried = [str(root / layout[0].format(split=split)) for layout in layouts]
        raise DataError(f"{dataset.spec}: no image matches {' or '.join(tried)}; check the folder "
                        "and the split")

    files = []
    for image, matched in images:
        labels = [root / _fill_stars(pattern, matched) for pattern in label_patterns]
        files.append((image, next(filter(None, map(_existing_file, labels)), None)))
    if not any(label for _, label in files):
        tried = " or ".join(map(str, labels))
        dataset.no_labels = f"; tried {tried} for {files[-1][0].name}"
    _accept_missing(dataset, files)
    return files


def _files_by_name(dataset, root):
    """{path below the folder without suffix, composed: file}. Raises DataError."""
    root = Path(root)
    files = [file for file, _ in _glob(dataset, root, "**/*")]
    if not files:
        raise DataError(f"{dataset.spec}: no image file matches {root}/**/*; check the folder"
                        + "".join(f"; {note}" for note in dataset.notes))
    found = {}
    for file in files:
        found[_composed(file.relative_to(root).with_suffix("").as_posix())] = file
    if len(found) < len(files):
        raise DataError(f"{dataset.spec}: two files in {root} differ only in their suffix; "
                        "remove one")
    return found


def _find_in_folders(dataset, spec):
    """[(image, label or None)] of IMAGES[:MASKS], matched by _files_by_name. Raises DataError."""
    images = _files_by_name(dataset, spec.images)
    if spec.masks is None:
        return _without_masks(dataset, images.values())

    labels = _files_by_name(dataset, spec.masks)
    files = [(image, labels.get(name)) for name, image in images.items()]
    if not any(label for _, label in files):
        missing = [str(image) for image, _ in files]
        raise DataError(f"{dataset.spec}: no image has a label of the same name, such as "
                        f"{_some(missing)}; for other names use glob:IMAGES:MASKS")
    _accept_missing(dataset, files)
    extra = [str(label) for name, label in labels.items() if name not in images]
    if extra:
        dataset.notes.append(f"{len(extra)} labels have no image and are not used: {_some(extra)}")
    return files


def _find_by_glob(dataset, spec):
    """[(image, label or None)] of two patterns whose stars of equal rank pair. Raises DataError."""
    images = _glob(dataset, *_glob_root(spec.images))
    if not images:
        raise DataError(f"{dataset.spec}: no image matches {spec.images}; check the pattern, in "
                        "which * and **/ alone stand for other names, and put it in quotes")
    if spec.masks is None:
        return _without_masks(dataset, [image for image, _ in images])

    masks = Path(spec.masks).as_posix()
    if "*" not in masks and len(images) > 1:
        raise DataError(f"{dataset.spec}: {masks} is one mask for {len(images)} images; write * "
                        "where its name is that of the image, and put the SPEC in quotes")
    if len(re.findall(r"\*\*/|\*", masks)) > len(images[0][1]):
        raise DataError(f"{dataset.spec}: {masks} has more stars than {spec.images}; each star of "
                        "a mask is filled with its image's")
    files = []
    for image, matched in images:
        files.append((image, _existing_file(Path(_fill_stars(masks, matched)))))
    # x.png and its mask x_mask.png in one folder: no pattern of images leaves the mask out
    masks_found = {os.path.abspath(label) for image, label in files if label and label != image}
    kept = [(image, label) for image, label in files if os.path.abspath(image) not in masks_found]
    if len(kept) < len(files):
        dataset.notes.append(f"{len(files) - len(kept)} files that match {spec.images} are masks "
                             "of others, and no images")
        files = kept
    if not any(label for _, label in files):
        image, matched = images[0]
        raise DataError(f"{dataset.spec}: no image has a label, {image} not in "
                        f"{_fill_stars(masks, matched)}; check the pattern of the masks")
    _accept_missing(dataset, files)
    return files


# What tools add to an image's name to name its mask, and how they name the folders of masks.
_MASK = r"(mask|label(Train|Instance)?(Id)?|gt|seg(mentation)?|annot(ation)?)s?"
TWIN = re.compile(
    rf"[ ._-]({_MASK}([ _-]?\d+)?|(?-i:L))$|(?<![^/\\]){_MASK}[ _-](?=[^/\\]*$)", re.I)
MASK_FOLDER = re.compile(
    r"(?<!un)(mask|label(?!l?ed)|annot)|ground.?truth|segmentation(class|object)|"
    r"^(segmentations?|gt)$", re.I)


def _without_masks(dataset, images):
    """
    [(image, None)] of the images but those that are the mask of another one, X_mask.png beside
    X.jpg: noted. So are images in folders of a name that masks have.
    """
    known = {str(image.with_suffix("")) for image in images}
    kept, twins, odd = [], [], []
    for image in images:
        name = str(image.with_suffix(""))
        if TWIN.search(name) and TWIN.sub("", name) in known:
            twins.append(str(image))
            continue
        kept.append(image)
        if MASK_FOLDER.search(image.parent.name):
            odd.append(str(image))
    if odd and len(odd) < len(kept):
        dataset.notes.append(f"MASKS TAKEN FOR IMAGES? {len(odd)} of {len(kept)} images lie in "
                             f"folders that are named as masks are: {_some(odd)}")
    if twins:
        dataset.notes.append(f"MASKS TAKEN FOR IMAGES? {len(twins)} files are left out, each has "
                             f"an image of the same name without its ending beside it: "
                             f"{_some(twins)}")
    return [(image, None) for image in kept]


def _names_in_line(line, folder):
    """
    [image] or [image, label] of a line: split at its tabs, else where both parts are files, at a
    comma, a semicolon or blanks, else at the last of them.
    """
    if "\t" in line:
        return [name.strip() for name in line.split("\t")]
    if not _existing_file(folder / home(line)):
        line = line.rstrip(",; ")  # of an empty last cell
    if _existing_file(folder / home(line)):  # a name may hold blanks and commas
        return [line]
    splits = []
    for gap in re.finditer(r"\s*[,;\s]\s*", line):
        names = [line[:gap.start()], line[gap.end():]]
        if all(_existing_file(folder / home(name)) for name in names):
            return names
        splits.append(names)
    return splits[-1] if splits else [line]


def _titles_paths(names, folder):
    """Whether two cells of a line, such as image and mask, are words and no paths."""
    if len(names) != 2:
        return False
    for name in names:
        word = re.fullmatch(r"[^\W\d]+([ _-][^\W\d]+)*", name)
        if not word or _existing_file(folder / name):
            return False
    return True


def _find_in_list(dataset, spec):
    """[(image, label or None)] of a text file. Raises DataError."""
    path = Path(spec.listed)
    if not path.is_file():
        raise DataError(f"list:{path}: no such file; give a text file with an image and its label "
                        "per line")
    if spec.images:
        files = _find_listed_names(spec)
    else:
        files = _find_listed_paths(dataset, path)
    if not files:
        raise DataError(f"{path}: lists no image")
    _accept_missing(dataset, files)
    if not any(label for _, label in files):
        return _without_masks(dataset, [image for image, _ in files])
    return files


def _find_listed_paths(dataset, path):
    """[(image, label or None)] of a file whose lines are one or two paths. Raises DataError."""
    files = []
    titled = False
    for number, line in _numbered_lines(path):
        names = _names_in_line(_unquoted(line), path.parent)
        if line.startswith("#") and not _existing_file(path.parent / names[0]):
            continue  # a comment
        if not files and not titled and _titles_paths(names, path.parent):
            titled = True
            dataset.notes.append(f"{path}: its first line is taken for a title: {line!r}")
            continue
        if len(names) > 2:
            raise DataError(f"{path}: line {number}: {line!r} must be one or two paths")
        found = []
        for name in names:
            wanted = path.parent / home(name)  # an absolute path stays what it is
            file = _existing_file(wanted)
            if file is None:
                raise DataError(f"{path}: line {number}: {wanted} does not exist; paths are "
                                "relative to the list's folder; for a list of names write "
                                "list:FILE:IMAGES:MASKS with a * for the name in IMAGES and MASKS")
            found.append(file)
        files.append((found[0], found[1] if len(found) == 2 else None))
    return files


def _find_listed_names(spec):
    """[(image, label or None)] of a file whose lines are names, for the stars of two patterns."""
    for pattern in filter(None, (spec.images, spec.masks)):
        if "*" not in pattern or "**" in pattern:
            raise DataError(f"{pattern}: needs a * where the names of {spec.listed} belong")
    files = []
    for number, name in _numbered_lines(spec.listed):
        image = spec.images.replace("*", name)
        found = _existing_file(Path(image))
        if found is None and name.startswith("#"):
            continue  # a comment
        if found is None:
            raise DataError(f"{spec.listed}: line {number}: {image} does not exist; a line is "
                            "what * stands for")
        label = spec.masks and _existing_file(Path(spec.masks.replace("*", name)))
        files.append((found, label))
    if spec.masks and files and not any(label for _, label in files):
        tried = spec.masks.replace("*", name)
        raise DataError(f"{spec.listed}: no line has a mask, {tried} does not exist; check the "
                        "pattern of the masks")
    return files


def _image_names(images):
    """A name per image: its file's, or its path's where two files have the same one."""
    names = [re.sub("_(leftImg8bit|rgb_anon)$", "", image.stem) for image in images]
    if len(set(names)) == len(images):
        return names
    images = [Path(os.path.normpath(image)) for image in images]  # without ..
    top = os.path.commonpath([image.parent for image in images])
    images = [image.relative_to(top) for image in images]
    names = ["__".join(image.with_suffix("").parts) for image in images]
    if len(set(names)) < len(set(images)):  # a.jpg and a.png
        names = ["__".join(image.parts) for image in images]
    return names


# ---------------------------------------------------------------- reading files

def _open(path, low_bytes=False):
    """
    Decoded PIL image; info["orientation"] is its EXIF tag, 1 to 8, and info["turned"] whether it is
    turned by that already. low_bytes: of a PNG's 16-bit colours the low bytes, where Pillow gives
    the high ones. Whatever is wrong with the file becomes a DataError that names it.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if _has_pages(image):
                    raise DataError(f"{path}: holds {image.n_frames} pictures; save the one that "
                                    "counts as a file of its own", spares_others=True)
                if image.format == "BMP" and image.mode == "1" and _bits(path, image) != 1:
                    raise DataError(f"{path}: a BMP of 8 bits and two colours, which Pillow reads "
                                    "wrongly; save it as a PNG", spares_others=True)
                # Damaged PNG data may well be decoded, to other pixels; their checksums tell.
                if image.format == "PNG":
                    image.verify()
            # From a file object: Pillow maps an uncompressed TIFF of a path into memory, with the
            # rows as long as those of the turned image where its tag turns it.
            with Image.open(file) as image:
                if low_bytes:  # told that bytes stand the other way round, Pillow takes those
                    tile = image.tile[0]
                    image.tile = [tile._replace(args=tile.args.replace("16B", "16L"))]
                orientation = image.getexif().get(0x0112, 1)
                image.load()
                image.info["orientation"] = orientation
                image.info["turned"] = image.format == "TIFF"  # loading it did that
                return image
    except (DataError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; "
                        "make it smaller") from error
    except Exception as error:  # damaged files make Pillow's parts raise errors of many kinds
        if isinstance(error, UnidentifiedImageError) and (fault := _foreign_fault(path)):
            raise DataError(f"{path}: {fault}", spares_others=True) from error
        raise DataError(f"{path}: no readable image ({type(error).__name__}: {error}); "
                        "restore or remove it", spares_others=True) from error


def _foreign_fault(path):
    """What a sound file is that Pillow cannot read, with the remedy, or None."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        begins = file.read(64)
        if begins.startswith(b"version https://git-lfs"):
            return "no readable image but a pointer of Git LFS; git lfs pull"
        if begins.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "no readable image but a page of the web; restore or remove it"
        if begins[:4] in (b"II*\0", b"MM\0*"):
            return ("no readable image: a TIFF that is damaged, or of a kind such as 64 bits or "
                    "many bands; restore it, or save it as an 8-bit grey or RGB PNG")
    return None


def _has_pages(image):
    """
    Whether a file holds several pictures, none of them the one that counts: a stack, an animation.
    What phones and maps store beside their picture is none: exposures, smaller copies, its mask.
    """
    if image.format == "MPO" or getattr(image, "n_frames", 1) == 1:
        return False
    size = image.size
    image.seek(1)
    if image.format == "TIFF" and image.tag_v2.get(254, 0) & 5:  # NewSubfileType: a copy, a mask
        return False
    return image.size == size


def _bits(path, image):
    """Bits per channel in the file of an opened image. Pillow reads all but 16-bit grey as 8."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))
    if image.format == "BMP":
        with open(path, "rb") as file:
            header = file.read(30)
        return 1 if header[24 if header[14] == 12 else 28] == 1 else 8  # of OS/2, of Windows
    if image.format == "PPM":
        with open(path, "rb") as file:
            header = re.match(rb"P[2356](?:\s+|#[^\n]*\n)+\d+\s+\d+\s+(\d+)", file.read(512))
        most = int(header[1]) if header else 255
        if most < 255:
            return min(most.bit_length(), 7)  # Pillow scales what ends at 254, too
        return most.bit_length()
    if image.format == "SGI":
        with open(path, "rb") as file:
            return 8 * file.read(4)[3]
    if image.format == "JPEG2000":
        with open(path, "rb") as file:  # its first two markers; the second gives size and bits
            size = re.search(rb"\xff\x4f\xff\x51.{38}(.)", file.read(1 << 16), re.DOTALL)
        return (size[1][0] & 127) + 1 if size else 8
    return 8


# By the number in the EXIF tag. 1 is upright, and so is what has an odd tag.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def _upright(image):
    """(an image of _open as its EXIF tag shows it, whether that turned or mirrored it)."""
    # Not by ImageOps.exif_transpose, which writes the other tags anew and fails where one is odd.
    turn = TURNS.get(image.info["orientation"])
    if turn is not None and not image.info["turned"]:
        image = image.transpose(turn)
    return image, turn is not None


def _read_upright(path):
    """(RGB image uint8 (H,W,3), whether its EXIF tag turned or mirrored it). Raises DataError."""
    image = _open(path)
    bits = _bits(path, image)
    if image.mode[0] in "IF" or bits > 8:
        raise DataError(f"{path}: more than 8 bits per channel (mode {image.mode}, {bits} bits); "
                        "convert it to an 8-bit image")
    image, turned = _upright(image)
    return np.asarray(image.convert("RGB")), turned


def read_image(path):
    """RGB image uint8 (H,W,3), upright by EXIF; alpha dropped, grey repeated. Raises DataError."""
    return _read_upright(path)[0]


# What need not keep values exactly: nothing tells whether such a file does.
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF", "HEIF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")


def _hides_values(image):
    """Whether wholly transparent pixels of a picture with alpha still have values of a mask.

    They do where they have several, or one that is seen elsewhere, and neither black nor white.
    """
    channels = np.asarray(image)  # (H,W,2) or (H,W,4)
    alpha = channels[:, :, -1]
    hidden = channels[alpha == 0][:, :-1]  # (n,1) or (n,3)
    if len(hidden) == 0:
        return False
    if (hidden != hidden[0]).any():
        return True
    seen = channels[alpha > 0][:, :-1]
    plain = (hidden[0] == 0).all() or (hidden[0] == 255).all()
    return bool(not plain and (seen == hidden[0]).all(1).any())


def _mask_fault(image, what, lossy=False):
    """
    Why the file of an opened image does not keep a mask's values, str, or None. what: "ids" or
    "colours", which these are. lossy: JPEG and its like are taken.
    """
    if image.mode in ("LA", "RGBA"):
        *colours, (least, most) = image.getextrema()
        if least < most and all(low == high for low, high in colours):  # as brushes save it
            return "of one colour, with all its values in the alpha channel"
        if least < most and _hides_values(image):
            return ("partly transparent, with values below, as erased strokes leave them (flatten "
                    "it in the program that made it)")
    exact = image.format not in LOSSY and image.info.get("compression") not in LOSSY_TIFF
    if exact or lossy:
        return None
    fault = f"a {image.format}, a format that need not keep {what} exactly"
    if image.mode == "RGB":  # a photograph in a mask's place may be a swapped folder
        fault += " (if it is a photograph: images stand before masks in a SPEC)"
    return fault


def read_label(path, lossy=False, known=()):
    """
    Raw ids (H,W), uint8 or uint16, upright by EXIF. Raises DataError.

    They are read from 8- and 16-bit grey, from the indices of a palette, never from its colours,
    and from RGB(A) whose channels are equal or all of whose values are red (CARLA). lossy: JPEG and
    its like are taken as well; the values are grey ones then, of a palette those of its colours.
    known: ids; a palette whose greys are such ids at other indices is refused.
    """
    image = _open(path)
    fault = _mask_fault(image, "ids", lossy) or _ids_fault(image, _bits(path, image))
    if fault is None and not lossy and image.mode == "P":
        fault = _renumbered(image, known)
    if fault is None and lossy and image.mode[0] != "I":
        image, fault = _grey_values(image)
    if fault is None:
        ids = np.asarray(_upright(image)[0])
        if ids.ndim == 3:
            ids, fault = _one_channel(ids, image.mode)
    if fault is None and not 0 <= ids.min() <= ids.max() <= 65535:
        fault = f"a picture with values from {ids.min()} to {ids.max()}, where 0 to 65535 are ids"
    if fault:
        raise DataError(f"{path}: is {fault}; save the ids as an 8-bit grey or palette PNG, or say "
                        "what the colours are in IDS")
    return ids.astype(np.uint8 if ids.max() < 256 else np.uint16)


def _ids_fault(image, bits):
    """Why Pillow does not give the ids in an opened file of `bits` per channel, str, or None."""
    if image.mode in ("L", "LA") and bits < 8:
        return f"a {bits}-bit grey {image.format}, which Pillow scales to 8 bits"
    if image.mode[0] == "I" and bits not in (8, 16, 32):
        return f"a {bits}-bit grey {image.format}, which Pillow scales to 16 bits"
    if image.format == "TIFF" and image.mode != "P" and image.tag_v2.get(262) == 0:
        return "a TIFF in which 0 is white, which Pillow inverts"
    if image.mode in ("RGB", "RGBA") and bits != 8:
        return f"a {bits}-bit colour picture"
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA") and image.mode[0] != "I":
        return f"a picture of mode {image.mode} and no class ids"
    return None


def _renumbered(image, known):
    """Why a palette hides the grey ids that a mask had, str, or None; known: ids that are listed.

    Programs that make files small, and GIF, number the greys of a mask anew: 0, 1 and 255 become
    the indices 0, 1 and 2. A palette that just shows a mask passes: it has colours, or greys that
    are no ids, or black and white alone, where 255 is no id.
    """
    used = np.unique(np.asarray(image))
    colours = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)  # (3n,) -> (n,3)
    greys = colours[:, 0]
    if (colours != greys[:, None]).any():
        return None
    if used[-1] >= len(greys) or (greys[used] == used).all():
        return None
    inner = set(greys.tolist()) - {0, IGNORE}
    if not inner and IGNORE not in known:
        return None
    if not inner <= set(known):
        return None
    return (f"a palette with the greys {_some(greys[used].tolist())} at the indices "
            f"{_some(used.tolist())}, and both may be ids")


def _one_channel(channels, mode):
    """(ids (H,W), fault or None) of an image (H,W,C) in which one channel says it all."""
    ids = channels[:, :, 0]
    if mode in ("LA", "PA"):
        return ids, None
    equal = (channels[:, :, 1:3] == channels[:, :, :1]).all()
    red = not channels[:, :, 1:3].any()
    if equal or red:
        return ids, None
    return ids, f"a colour picture ({mode}) and no class ids"


GREY_SPREAD = 48  # channels of a grey JPEG, re-saved or not, differ by less


def _grey_values(image):
    """(a mask as a grey PIL image, fault or None where its channels are too unlike for grey)."""
    channels = np.asarray(image.convert("RGB"))  # (H,W,3)
    fault = None
    if np.ptp(channels, 2).max() > GREY_SPREAD:
        fault = "a colour picture, and ~ in IDS stands before grey values"
    return image.convert("L"), fault


def read_mask_colours(path):
    """
    Colours (H,W), red | green << 8 | blue << 16, upright by EXIF; of a palette its colours, alpha
    dropped, grey repeated. Raises DataError.
    """
    image = _open(path)
    fault = _mask_fault(image, "colours")
    if fault is None and (image.mode[0] in "IF" or _bits(path, image) > 8):
        fault = f"a picture of more than 8 bits per channel (mode {image.mode})"
    if fault is None and image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        fault = f"a picture of mode {image.mode}"
    if fault:
        raise DataError(f"{path}: is {fault}; save the mask as an 8-bit RGB PNG")
    channels = np.asarray(_upright(image)[0].convert("RGB").convert("RGBX"))  # (H,W,4)
    return channels.view("<u4")[:, :, 0] & 0xffffff  # four bytes as one number


def palette_of(path):
    """
    The colours of a mask's palette up to the last index that it uses, bytes, three for each; b""
    where it has none. What comes behind, some files leave out, and some fill.
    """
    with Image.open(path) as image:
        if image.mode != "P" or image.palette is None:
            return b""
        used = 3 * (int(np.asarray(image).max()) + 1)
        return bytes(image.getpalette()[:used]).ljust(used, b"\0")


def palette_digest(path):
    """
    A hash, str, of the palette of a mask that can be read, "" where it has none. Masks whose ids
    are palette indices should have one palette: tools that reduce colours make one for each file,
    and an index then means another colour in each.
    """
    colours = palette_of(path)
    return hashlib.sha256(colours).hexdigest()[:16] if colours else ""


def _resized(array, size, how):
    """An image or label resized to (W,H); itself where it has that size already or size is None."""
    if size is None or array.shape[1::-1] == size:
        return array
    return np.asarray(Image.fromarray(array).resize(size, how))


def resize_image(image, size, antialias=True):
    """
    An image uint8 (H,W,3) at size (W,H), bilinear; itself where it has that size or size is None.
    Made smaller, a pixel is the mean of all that it covers, without antialias of the nearest four:
    so do OpenCV, and with it the released code of DAFormer's and SegFormer's families.
    """
    if antialias or size is None or image.shape[1::-1] == tuple(size):
        return _resized(image, size, Image.Resampling.BILINEAR)
    maps = torch.tensor(image).permute(2, 0, 1)[None].float()  # (H,W,3) -> (1,3,H,W)
    maps = F.interpolate(maps, size[::-1], mode="bilinear", align_corners=False)
    return maps[0].round().byte().permute(1, 2, 0).numpy()  # (1,3,h,w) -> (h,w,3)


def _pixels_per_class(label, num_classes):
    """Pixels of each class in a label uint8 of any shape, int64 (K,)."""
    counts = torch.bincount(torch.from_numpy(label.flatten()), minlength=256)  # numpy's is slower
    return counts[:num_classes].numpy()


def read_png16(path):
    """
    Raw ids uint8 (H,W) from the first channel of a 16-bit PNG. Raises DataError.

    SYNTHIA keeps the class in the red channel. Of a colour Pillow gives the high byte, in an id
    always 0; the file is read a second time for the low one.
    """
    try:
        image = _open(path)
        if image.format != "PNG" or _bits(path, image) != 16:
            raise DataError(f"{path}: not the 16-bit PNG that this data set publishes; "
                            "use the original label file")
        # The last chunk, with its checksum, at which alone Pillow does not look.
        if b"IEND\xae\x42\x60\x82" not in Path(path).read_bytes():
            raise DataError(f"{path}: no end", spares_others=True)
        ids = np.asarray(image)  # grey: the whole ids (H,W)
        if ids.ndim == 3:
            high = ids[:, :, 0].astype(np.uint16)
            ids = 256 * high + np.asarray(_open(path, low_bytes=True))[:, :, 0]
    except DataError as error:
        if error.spares_others:
            raise DataError(f"{path}: truncated or damaged PNG; restore or remove it",
                            spares_others=True) from error
        raise
    if ids.max() > 255:
        raise DataError(f"{path}: holds ids above 255; use the original label file")
    return ids.astype(np.uint8)


# ---------------------------------------------------------------- the cache

class Cache:
    """
    A file of equal records, one per image, which several runs may fill at once.

    path: the file, made when it is first used. count: number of records. fields: as of numpy.dtype.
    A record is written in one piece and ends with the byte `done`. So neither a kill nor another
    run leaves a wrong record: what was cut off is not done, and two writers write the same bytes.
    (A power cut may leave one: disks reorder writes.) A finished file may be read-only.
    Raises DataError if the file cannot be made or written.
    """

    def __init__(self, path, count, fields):
        self.path = path
        self.count = count
        self.record = np.dtype([*fields, ("done", "u1")])

    def __getstate__(self):
        """All but the mapping, whose whole content would travel to other processes."""
        return {"path": self.path, "count": self.count, "record": self.record}

    def _make(self):
        """Makes the file, full of zeros, unless it is there."""
        size = self.count * self.record.itemsize
        if not os.path.isfile(self.path) or self.path.stat().st_size != size:
            with _writing(self.path, size):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab") as file:
                    file.truncate(size)  # keeps what another run has written

    @functools.cached_property
    def records(self):
        """Read-only mapping of the file, a structured array (count,)."""
        self._make()
        return np.memmap(self.path, self.record, "r")

    def done(self, i):
        """Whether record i is whole."""
        return bool(self.records["done"][i])

    def pending(self):
        """Indices of the records that are not done, int (n,)."""
        return np.flatnonzero(self.records["done"] == 0)

    def write(self, i, **values):
        """Writes record i; fields without a value are zero."""
        record = np.zeros((), self.record)
        for name, value in values.items():
            record[name] = value
        record["done"] = 1
        rest = memoryview(record.tobytes())
        self._make()
        # Not through the mapping, where a full disk kills the process instead of raising. A file
        # takes the part that there is room for; the next write raises.
        with _writing(self.path, len(rest)), open(self.path, "r+b", buffering=0) as file:
            file.seek(i * len(rest))
            while rest:
                rest = rest[file.write(rest):]


@contextlib.contextmanager
def _writing(path, size):
    """Turns an OSError into a DataError that says what could not be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot write {size:,} bytes ({error.strerror}); "
                        "set --cache DIR") from error


MOST_WORKERS = 61  # Windows cannot wait for more processes at once


def _begin_worker():
    """
    Set-up of a worker: one thread for torch, and one that ends it when its parent has gone. Ctrl-C
    reaches it too, and is left to the parent.
    """
    def watch():  # a pool's worker would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _ctrl_c_waits():
    """Inside, Ctrl-C is put off, for good in processes that are begun there."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _each(task, items):
    """[task(i) for i in items], the work of one process."""
    return [task(i) for i in items]


def _in_processes(task, items, text):
    """[task(i) for i in items], over all cores, with a bar on stderr. Raises DataError."""
    if not len(items):
        return []
    workers = min(os.cpu_count(), len(items), MOST_WORKERS)
    chunk = max(1, min(32, len(items) // (8 * workers)))
    results = []
    try:
        # disable=None: no bar where stderr is not a terminal
        with (ProcessPoolExecutor(workers, initializer=_begin_worker) as pool,
              tqdm(total=len(items), desc=text, disable=None) as bar):
            try:
                futures = []
                with _ctrl_c_waits():
                    for first in range(0, len(items), chunk):
                        futures.append(pool.submit(_each, task, items[first:first + chunk]))
                for future in futures:
                    results += future.result()
                    bar.update(len(results) - bar.n)
            except BaseException:  # Ctrl-C or a fault: nobody waits for what else was begun
                for worker in multiprocessing.active_children():
                    worker.kill()
                raise
    except BrokenProcessPool:
        raise DataError(f"{text}: a process died, perhaps for lack of memory; what is done stays, "
                        "try again") from None
    return results


# ---------------------------------------------------------------- the data set

BY_POSITION = object()  # in place of IDS, whose file may have any name


def open_dataset(spec, split, classes=None, size=None, cache=None, partial=False, ids=BY_POSITION,
                 antialias=True, detail=False):
    """
    Data set of {"image": uint8 (3,H,W) tensor, "label": uint8 (h,w) tensor or None, "name": str}.

    spec: see the top of the file; a list of several is pooled. split: "train", "val" or "test"; own
    data are the same in all, unless {split} is in their SPEC. classes: see class_names; None:
    default_classes. size (W,H): images are resized to it; None is the published size, for own data
    the size of each file. Labels follow the image in "train" and stay native elsewhere, so that
    scores do not depend on size. cache: directory, None is ~/.cache/nanouda; used for streets, and
    for real training sets of one size if they are small or a directory is given. partial: some
    images may lack a label, and are then served with one of 255. ids: what the values of own masks
    mean where their SPEC has no IDS: BY_POSITION, positions in the classes, or what the file says
    of which these are; another file; None, which makes such masks an error. antialias: see
    resize_image; without it files are not cached. detail: the published size is that of training at
    several resolutions, where there is one. Raises DataError at once for what file names tell, and
    at reading for what is wrong in a file.
    """
    spec = specs(spec)
    if ids is BY_POSITION and (classes is None or isinstance(classes, str)):
        ids = classes
    if classes is None:
        classes = default_classes(spec[0])
    names = class_names(classes)
    how = names, size, cache, partial, ids, antialias, detail
    parts = [SegmentationDataset(one, split, *how) for one in spec]
    return parts[0] if len(parts) == 1 else Pool(parts, partial)


def default_classes(spec):
    """
    The classes of a SPEC where none are given: a key of CLASS_SPACES, or names, tuple of str: those
    of its table; () where it says nothing of classes. Raises DataError.
    """
    parsed = parse_spec(spec)
    if parsed.kind in OWN:
        return _checked_names(parsed.ids, read_table(parsed.ids)) if parsed.ids else ()
    if parsed.kind in STREETS:
        return "cityscapes19"
    table = SETS[parsed.kind].ids
    known = {"cityscapes": "cityscapes19", "camvid": "camvid11"}
    return known.get(table.space) or table_classes(table)


# DAFormer's rare-class thresholds, for crops of 512 x 512
RARE_SIDE = 512
RARE_IMAGE = 3000  # pixels in an image
RARE_CROP = 1500 / RARE_SIDE ** 2  # share of a crop


class SegmentationDataset(torch.utils.data.Dataset):
    """
    What open_dataset returns for one SPEC.

    spec, split, classes: as given. kind: the spec's first word, of streets all of it. names: one
    per image. size: (W,H) or None. labeled: whether it has labels. notes: list of str, what the
    user should know. files: [(image, label or None)], None for streets. ids: the Table of its
    masks. table: label_table of it. mapping: mapping_lines of it. cached: whether items go through
    the cache. left_out: images that leave_out has taken away, list of str.
    """

    def __init__(self, spec, split, classes, size, cache, partial=False, ids=BY_POSITION,
                 antialias=True, detail=False):
        self.spec = spec
        self.split = split
        self.classes = classes
        self.partial = partial
        self.antialias = antialias
        self.detail = detail
        self.notes = []
        self.no_labels = ""  # says where labels were looked for in vain
        self.left_out = []
        if spec in STREETS:
            published = self._open_streets()
        else:
            published = self._open_files(ids)
        size = size or published
        self.size = tuple(size) if size else None
        self.table = label_table(self.ids, classes)
        self.train_table = label_table(TRAIN_IDS, classes)
        self.mapping = []
        if self.labeled:
            self.mapping = mapping_lines(self._shown_ids(), classes)
        self.lacking = None  # a _table_of_names of those that the classes lack
        self.train_lacking = None  # the same of TRAIN_IDS
        self._note_names()
        self.cache = cache_folder(cache)
        self.cached = self._is_cached(cache)
        self._record = list(range(len(self)))

    # What the data set consists of, and what its masks mean.

    def _open_streets(self):
        """Sets kind, files, indices, names, labeled and ids -> size."""
        self.kind = self.spec
        self.files = None
        if self.split not in STREETS[self.spec]:
            raise DataError(f"{self.spec}: has no {self.split!r} split, "
                            f"only {' and '.join(STREETS[self.spec])}")
        self.indices = STREETS[self.spec][self.split]
        self.names = [f"streets_{index:06d}" for index in self.indices]
        self.labeled = True
        self.train_ids = False
        self.ids = TRAIN_IDS
        return STREETS_SIZE

    def _open_files(self, ids):
        """Sets kind, files, names, labeled and ids -> published size or None."""
        spec = parse_spec(self.spec, self.split)
        self.kind = spec.kind
        find = {"folder": _find_in_folders, "glob": _find_by_glob, "list": _find_in_list}
        if self.kind in OWN:
            self.files = find[self.kind](self, spec)
        else:
            self.files = _find_published(self, spec.images)
        self._note_repeats()
        self.names = _image_names([image for image, _ in self.files])
        self.labeled = any(label for _, label in self.files)
        self.train_ids = True  # in masks that are named *labelTrainIds*
        self.ids_from = f"the table of {self.kind} ({len(self.classes)} classes)"
        if self.kind in SETS:
            self.ids = SETS[self.kind].ids
            if self.detail:
                return SETS[self.kind].detail_size or SETS[self.kind].size
            return SETS[self.kind].size
        self._set_own_ids(spec.ids, ids)
        self.train_ids = spec.ids is None and self.ids.kind == "position"
        return None

    def _note_repeats(self):
        """Notes images and masks that occur again. Raises DataError where a mask is its image."""
        own = [str(image) for image, label in self.files if image == label]
        if own:
            raise DataError(f"{self.spec}: {len(own)} images are their own masks, such as "
                            f"{own[0]}; give the files of the masks")
        images, labels = zip(*self.files)
        again = _twice([os.path.abspath(image) for image in images])
        if again:
            self.notes.append(f"{len(again)} images are listed more than once and count as often: "
                              f"{_some(again)}")
        shared = _twice([label for label in labels if label])
        if shared and not again:
            self.notes.append(f"{len(shared)} masks are those of several images: "
                              f"{_some(shared)}")

    def _set_own_ids(self, file, ids):
        """
        Sets what the values of own masks mean. file: the SPEC's IDS or None. ids: as of
        open_dataset, for masks without.
        """
        self.ids = Table(dict(enumerate(self.classes)) or {0: None}, "position")
        if file is None and ids is None and self.labeled:
            raise DataError(f"{self.spec}: nothing says what the values of its masks mean; give "
                            "--classes FILE (a name per line, the first is value 0), or IDS behind "
                            "the masks, a file with lines such as '7 road' or '128 64 128 road'")
        if file is None and ids in (None, BY_POSITION, *CLASS_SPACES):
            return
        file = file or ids
        self.ids = read_table(home(file))
        self.ids_from = file
        if self.ids.title:
            self.notes.append(f"{file}: its first line, {self.ids.title}, is taken for a title and "
                              f"is no class; if it is one, write `0 {self.ids.title}`, `1 NAME`")
        if self.ids.nearest:
            self.notes.append(f"{file}: a value that is not listed means the nearest one (~)")

    def _shown_ids(self):
        """The table that says most about the masks: published ids without those of no name."""
        labels = [label for _, label in self.files or [] if label]
        if labels and all(map(self._holds_train_ids, labels)):
            return TRAIN_IDS
        if self.kind in OWN:
            return self.ids
        named = {value: name for value, name in self.ids.names.items() if name is not None}
        return self.ids._replace(names=named)

    def _note_names(self):
        """Sets which names the classes lack; notes whose ids masks named labelTrainIds hold."""
        # Published data and published classes lack names of each other by their nature.
        if not self.labeled or self.kind not in OWN and self.classes in CLASS_SPACES.values():
            return
        shown = self._shown_ids()
        became = _classes_of_values(shown, self.classes)
        ignored = {name for value, name in shown.names.items() if became[value] == IGNORE}
        lacking = sorted(ignored - {None})
        if lacking:
            self.lacking_names = lacking
            self.lacking = _table_of_names(self.ids, lacking)
            self.train_lacking = _table_of_names(TRAIN_IDS, lacking)
        found = sum(self._holds_train_ids(label) for _, label in self.files or [] if label)
        if found:
            self.notes.append(
                f"{found} masks are named labelTrainIds and taken for train ids of Cityscapes, "
                "0 road to 18 bicycle; for ids of your own use glob:IMAGES:MASKS:IDS")

    # Its items.

    def has_label(self, i):
        """Whether item i has a label of its own."""
        return self.files is None or self.files[i][1] is not None

    def image_path(self, i):
        """Path of item i's image with slashes, "" where it is rendered."""
        if self.files is None:
            return ""
        return os.path.abspath(self.files[i][0]).replace(os.sep, "/")

    @property
    def drawn_names(self):
        """The names that random draws depend on."""
        return self.names

    @property
    def parts(self):
        """The data sets of single SPECs, here this one: see Pool."""
        return [self]

    def join(self):
        """See Pool."""

    def _is_cached(self, cache):
        """Whether the cache is used; cache: the directory that the user gives, or None."""
        if self.files is None:
            return True
        if self.split != "train" or self.size is None or not self.antialias:
            return False
        width, height = self.size
        return bool(cache) or len(self) * width * height * 4 < AUTO_CACHE_BYTES

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return _item(*self.arrays(i), self.names[i])

    def arrays(self, i):
        """Item i as arrays not to be written to: image uint8 (H,W,3), label uint8 (h,w) or None."""
        if not self.cached:
            return self._load(i)
        self._fill(i)
        item = self._items.records[self._record[i]]
        label = item["label"] if self.labeled else None
        if self.files is None:  # one cache of the streets, any classes
            label = self.table[label]
        return item["image"], label

    # Reading all of them, and what this shows.

    def prepare(self):
        """
        Fills the cache in parallel, and with it the facts. Runs may share the work; a killed one
        leaves what it did. Raises DataError.
        """
        if not self.cached:
            return
        if self.files is None:
            self._fill_all(self._items.pending(), self._fill)
        else:
            self._check_all()

    def check(self):
        """
        Reads every file once, in parallel -> [Fault], of items that cannot be used.

        What is whole goes into the facts, and into the cache where there is one, and is not read
        again. Nothing is rendered for this. Raises DataError if the cache cannot be written.
        """
        if self.files is None:
            return []
        pending = self._facts.records["done"] == 0
        if self.cached:
            pending |= self._items.records["done"] == 0
        items = [i for i, record in enumerate(self._record) if pending[record]]
        faults = self._fill_all(items, self._check)
        return sorted(fault for fault in faults if fault)

    def _check_all(self):
        """check(), but a fault raises DataError."""
        problems = describe_faults(self, self.check())
        if problems:
            raise DataError(problems[0])

    def leave_out(self, items):
        """
        Takes items of files away, as if their files were not there; they are named in `left_out`.
        Raises DataError if none remains.
        """
        # Both caches are named after all files, so they are opened before.
        self._facts._make()
        if self.cached:
            self._items._make()
        self._record = [record for i, record in enumerate(self._record) if i not in items]
        self.left_out += [str(self.files[i][0]) for i in items]
        self.names = [name for i, name in enumerate(self.names) if i not in items]
        self.files = [pair for i, pair in enumerate(self.files) if i not in items]
        if not self.files:
            raise DataError(f"{self.spec}: no pair is left; restore the files")

    def facts(self):
        """What the table of facts holds of each item, a structured array (N,). Raises DataError."""
        if self.files is None:
            text = f"{self.spec} {self.split}: counting classes"
            _in_processes(self._learn, self._facts.pending().tolist(), text)
        else:
            self._check_all()
        return np.array(self._facts.records[self._record])

    def remarks(self, labels=True, crop=None):
        """
        What the user should know about the items, list of str. labels: whether they are used. crop:
        side of the training crops. Raises DataError.
        """
        if self.files is None:  # what the renderer draws is known
            return self._crop_remarks(crop, np.array([self.size]))
        facts = self.facts()
        remarks = list(self.notes)
        turned = facts["turned"].sum()
        if turned:
            remarks.append(f"{turned} images are turned by their EXIF tag")
        fitted = facts["fitted"].sum()
        if fitted:
            remarks.append(f"{fitted} labels have another size than their image and are resized "
                           "to it")
        remarks += self._crop_remarks(crop, np.array([self.size]) if self.size else facts["size"])
        if labels and self.labeled:
            alone = facts["alone"].sum()
            if alone:
                remarks.append(f"{alone} of the turned images have a mask without such a tag: does "
                               "it lie on its image? `python data.py SPEC` draws both")
            remarks += self._label_remarks(*self._native_counts())
        return remarks

    def _crop_remarks(self, crop, sizes):
        """Remarks if crops are larger than images, or tiny in them; sizes: (N,2) as served."""
        if crop is None or self.split != "train":
            return []
        remarks = []
        pixels = np.minimum(sizes, crop).prod(1)  # (N,) of an image that are in a crop
        inside = pixels / crop ** 2
        if inside.min() < 1:
            width, height = sizes[inside.argmin()]
            remarks.append(f"crops of {crop} are larger than {(inside < 1).mean():.0%} of the "
                           f"images ({width}x{height}): {1 - inside.mean():.0%} of the crops is "
                           "padding; use a smaller --crop or a larger --size")
        # in published settings 28 to 50 %
        shown = pixels / sizes.prod(1)
        if shown.mean() < 0.05:
            width, height = sizes[shown.argmin()]
            remarks.append(f"crops of {crop} show {100 * shown.mean():.2g} % of an image "
                           f"({width}x{height}), too little to tell what it is; scale images down "
                           "by --size WxH, or use a larger --crop")
        return remarks

    def _label_remarks(self, counts, ignored):
        """Remarks on the pixels per class (K,) of all labels, and how many are ignored."""
        remarks = []
        shown = counts > 0
        absent = [name for name, there in zip(self.classes, shown) if not there]
        pixels = max(1, ignored + counts.sum())
        if ignored:
            remarks.append(f"ignored {100 * ignored / pixels:.3g} % of the pixels of its labels")
        if self.lacking is not None:
            share = 100 * self.facts()["lacking"].sum() / pixels
            remarks.append(f"{share:.3g} % of the pixels are ignored because the classes lack "
                           f"their names: {_some(self.lacking_names)}")
        zeros = self._masks_of_zero_and_255()
        masks = sum(label is not None for _, label in self.files)
        if 0 < zeros < masks:
            remarks.append(f"{zeros} of {masks} masks hold the values 0 and 255 only, and 255 is "
                           "ignored; write in IDS what it is if that is not meant")
        if shown.sum() == 1 and ignored:
            remarks.append(f"ONE CLASS ONLY: all masks hold {self.classes[shown.argmax()]} and "
                           "ignored pixels, so there is nothing to tell apart; do ids and classes "
                           "match?")
        if absent:
            remarks.append(f"no pixel of {len(absent)} of {len(self.classes)} classes: "
                           f"{', '.join(absent)}")
        return remarks

    def _native_counts(self):
        """(Pixels per class (K,), ignored pixels) of all labels read, at their images' size."""
        facts = self._facts.records[self._record]
        labelled = [label is not None for _, label in self.files]
        facts = facts[labelled & (facts["done"] == 1)]
        counts = facts["native"].sum(0)
        width, height = facts["size"].astype(np.int64).T
        return counts, int((width * height).sum() - counts.sum())

    def _masks_of_zero_and_255(self):
        """How many own masks may well be of 0 and 255, though 255 is ignored."""
        zero = self._class_of_zero()
        if zero is None:
            return 0
        facts = self._facts.records[self._record]
        width, height = facts["size"].astype(np.int64).T
        counts = facts["native"]  # (N,K)
        alone = (counts[:, zero] == counts.sum(1)) & (counts[:, zero] > 0)
        return int((alone & (counts.sum(1) < width * height)).sum())

    def label_problem(self):
        """A line that says why labels of files that fit the table teach nothing or wrong, or ''."""
        if self.files is None or not self.labeled:
            return ""
        if unlike := self._unlike_palettes():
            return (f"{self.spec}: masks are read by index, and in the palettes of "
                    f"{' and '.join(unlike)} one id has two colours, as after reducing colours "
                    "file by file; give the colours in IDS (128 64 128 road), or save all ids with "
                    "one palette")
        counts, ignored = self._native_counts()
        if ignored and not counts.any():
            return (f"{self.spec}: no pixel of its labels is one of the {len(self.classes)} "
                    "classes; check --classes")
        zero = self._class_of_zero()
        if ignored and zero is not None and counts[zero] == counts.sum():
            other = [name for name in self.classes if name != self.classes[zero]][0]
            return (f"{self.spec}: its masks hold the values 0 and 255 only: 255 is ignored; "
                    f"write `0 {self.classes[zero]}` and `255 {other}` in an IDS file")
        return ""

    def _unlike_palettes(self):
        """Two masks whose palettes are not the beginning of one, names (2,); () if there are none.
        """
        digests = self._facts.records[self._record]["palette"]
        masks = {digest: mask for digest, (_, mask) in zip(digests, self.files) if digest}
        palettes = [(palette_of(mask), str(mask)) for mask in masks.values()]
        palettes.sort(key=lambda pair: len(pair[0]))
        # from short to long: where each begins the next one, all begin the last
        for (palette, mask), (longer, other) in itertools.pairwise(palettes):
            if not longer.startswith(palette):
                return mask, other
        return ()

    def _class_of_zero(self):
        """
        Index of the class of value 0 in own masks in which 255, and it alone, is ignored and no
        other value has that class, so that pixels per class tell it apart. None: not such masks.
        """
        if self.kind in SETS or self.ids.kind == "colour":
            return None
        found = _classes_of_values(self.ids, self.classes)
        zero = found.pop(0, IGNORE)
        if len(self.classes) < 2 or zero in found.values() or IGNORE in (zero, *found.values()):
            return None
        if any(self._holds_train_ids(label) for _, label in self.files if label):
            return None
        return zero

    def class_counts(self, crop=RARE_SIDE):
        """
        Pixels per image and class, int64 (N,K), for rare_pixels(crop). Raises DataError.

        Data with a published size are counted at the images' own size, as DAFormer counts the label
        files of GTA5: then 3,000 pixels of a class are the same things whatever --size. Others are
        counted as they are served, and so are all for crops below the published side, of which
        rare_pixels is a share.
        """
        if not self.labeled:
            raise DataError(f"{self.spec}: the {self.split} split has no labels to count")
        published = self.kind in SETS and SETS[self.kind].size is not None
        return self.facts()["native" if published and crop >= RARE_SIDE else "served"]

    # From the files to the cache: _read gives item i at its own size, _store puts it into the cache
    # at that of the data set, and what was learnt about it into the table of facts.

    def _read(self, i):
        """
        (image, label or None, whether EXIF turned the image, whether the label was resized to it,
        pixels of names that the classes lack), from the files, at the image's own size. Raises
        DataError.
        """
        path, label_path = self.files[i]
        image, turned = _read_upright(path)
        label, lacking = None, 0
        if label_path:
            label, lacking = self._read_label(i)
        elif self.labeled:
            label = np.full(image.shape[:2], IGNORE, np.uint8)
        if label is None or image.shape[:2] == label.shape:
            return image, label, turned, False, lacking
        # Some published labels have another size than their image: a few hundred of GTA5. DAFormer
        # and its family train on them, resized.
        if self.kind in SETS:
            fitted = _resized(label, image.shape[1::-1], Image.Resampling.NEAREST)
            return image, fitted, turned, True, lacking
        height, width = image.shape[:2]
        label_height, label_width = label.shape
        remedy = "make them equal"
        if turned and (width, height) == (label_height, label_width):
            remedy = "the image is turned by its EXIF tag, turn the label too"
        raise DataError(f"{path} is {width}x{height} but {label_path} is "
                        f"{label_width}x{label_height}; {remedy}", spares_others=True)

    def _read_label(self, i):
        """
        (Label of item i at its own size, mapped to class indices; how many of its pixels have names
        that the classes lack).
        """
        path = self.files[i][1]
        ids = self.ids
        listed_in = self.ids_from
        table = self.table
        marks = self.lacking
        if self._holds_train_ids(path):
            ids = TRAIN_IDS
            listed_in = "the train ids of Cityscapes, which the file's name labelTrainIds promises"
            table = self.train_table
            marks = self.train_lacking
            raw = read_label(path, known=ids.names)
        elif ids.kind == "colour":
            raw = read_mask_colours(path)
        elif self.kind == "synthia":
            raw = read_png16(path)
        else:
            raw = read_label(path, lossy=ids.nearest, known=ids.names)
        label = _look_up(ids, table, raw)
        if (label == UNKNOWN).any():
            raise DataError(f"{path}: {self._unknown_values(raw[label == UNKNOWN])} are not in "
                            f"{listed_in}; correct the mask or the table (255 is 'ignore', and "
                            "so is a value with the name -)",
                            values=[] if self.ids.kind == "colour" else np.unique(raw).tolist())
        lacking = 0
        if marks is not None:
            lacking = int((_look_up(ids, marks, raw) == 0).sum())
        return label, lacking

    def _holds_train_ids(self, path):
        """Whether a mask holds train ids of Cityscapes, as its name says. IDS says more."""
        return self.train_ids and "labelTrainIds" in path.name

    def _unknown_values(self, raw):
        """Values (n,) that the table does not list, in words with their counts."""
        values, counts = np.unique(raw, return_counts=True)
        said = []
        for value, count in zip(values.tolist(), counts.tolist()):
            if self.ids.kind == "colour":
                value = _words((value & 255, value >> 8 & 255, value >> 16))
            said.append(f"{value} ({count} pixels)")
        kind = "colours" if self.ids.kind == "colour" else "ids"
        return f"{kind} {_some(said)}"

    def _served_label(self, label):
        """The label at the size at which it is served."""
        if label is None or self.split != "train":
            return label
        return _resized(label, self.size, Image.Resampling.NEAREST)

    def _load(self, i):
        """Item i as served, from its files."""
        image, label, *_ = self._read(i)
        return resize_image(image, self.size, self.antialias), self._served_label(label)

    def _check(self, i):
        """Reads item i and stores what it holds -> None, or a Fault if its files cannot be used."""
        try:
            item = self._read(i)
        except DataError as error:
            return Fault(i, str(error), error.spares_others, error.values)
        self._store(i, *item)

    def _fill(self, i):
        """Writes item i into the cache, and what it shows into the facts, unless it is there."""
        if self._items.done(self._record[i]):
            return
        if self.files is not None:
            self._store(i, *self._read(i))
            return
        style = list(STREETS).index(self.kind)
        image, ids = render_street(STREETS_SEED, self.indices[i], style, self.size)
        self._note(i, self.size, self.table[ids])
        self._items.write(i, image=image, label=ids)

    def _learn(self, i):
        """Writes the facts of street i, which may be cached, but with other classes."""
        self._fill(i)
        if not self._facts.done(i):
            self._note(i, self.size, self.arrays(i)[1])

    def _fill_all(self, items, task):
        """[task(i) for i in items], and says what is written."""
        items = np.array(items, int)
        np.random.default_rng().shuffle(items)  # so that two runs seldom do the same image
        text = f"{self.spec} {self.split}: checking files"
        if self.cached and len(items):
            text = f"{self.spec} {self.split}: filling the cache"
            size = self._items.path.stat().st_size >> 20
            print(f"{self.spec} {self.split}: {len(items)} images go into {self._items.path} "
                  f"({size} MB), once", file=sys.stderr)
        return _in_processes(task, items.tolist(), text)

    def _store(self, i, image, label, turned, fitted, lacking):
        """Writes item i, as _read gives it, into the facts and, where there is one, the cache."""
        facts = {"turned": turned, "fitted": fitted, "lacking": lacking}
        mask = self.files[i][1]
        if turned and mask:
            facts["alone"] = not _upright(_open(mask))[1]
        by_index = self.ids.kind != "colour" and not self.ids.nearest
        if mask and self.kind in OWN and by_index:
            facts["palette"] = palette_digest(mask)
        self._note(i, image.shape[1::-1], label, **facts)
        if not self.cached:
            return
        item = {"image": _resized(image, self.size, Image.Resampling.BILINEAR)}
        if self.labeled:
            item["label"] = self._served_label(label)
        self._items.write(self._record[i], **item)

    def _note(self, i, size, label, **facts):
        """Writes the facts of item i; label: at the image's size, None where there is none."""
        facts["size"] = size
        if label is not None:
            served = self._served_label(label)
            facts["native"] = _pixels_per_class(label, len(self.classes))
            facts["served"] = facts["native"]
            if served.shape != label.shape:
                facts["served"] = _pixels_per_class(served, len(self.classes))
        self._facts.write(self._record[i], **facts)

    # The files of the cache, and their names.

    @functools.cached_property
    def _items(self):
        """Cache of images and labels; the renderer's own ids for streets, whatever the classes."""
        width, height = self.size
        fields = [("image", "u1", (height, width, 3))]
        if self.labeled:
            fields.append(("label", "u1", (height, width)))
        tables = [] if self.files is None else [self.table.tobytes(), self.train_table.tobytes()]
        return Cache(self._cache_path(".items", *tables), len(self), fields)

    @functools.cached_property
    def _facts(self):
        """
        Cache of what is known about each item, whose files were read and fit: size (W,H) of the
        image; whether EXIF turned it, and it alone, as its mask has no tag; whether the label was
        resized to it; palette_digest of own masks that are read by index; pixels of names that the
        classes lack; pixels per class in the label at the image's size (native) and as served.
        """
        num_classes = len(self.classes)
        fields = [
            ("size", "u4", (2,)), ("turned", "?"), ("alone", "?"), ("fitted", "?"),
            ("palette", "S16"), ("lacking", "i8"),
            ("native", "i8", (num_classes,)), ("served", "i8", (num_classes,))]
        tables = [self.table.tobytes(), self.train_table.tobytes()]
        return Cache(self._cache_path(".facts", *tables, fields), len(self), fields)

    def _cache_path(self, suffix, *content):
        """Path of a cache file: the data set and a hash of all that the file depends on."""
        digest = hashlib.sha256(repr((self._origin, *content)).encode()).hexdigest()[:16]
        return self.cache / f"{self.kind.replace(':', '-')}-{self.split}-{digest}{suffix}"

    @functools.cached_property
    def _origin(self):
        """Hash of where the items come from: their files, or the renderer."""
        ids = None
        if self.files is None:  # another renderer draws another world
            source = Path(__file__).read_text(encoding="utf-8")
            renderer = source.rpartition("\n# ---- the rendered streets")[2]
            parts = (STREETS_SEED, self.indices, renderer)
        else:
            parts = []
            ids = sorted(self.ids.names.items()), self.ids.nearest, self.train_ids, READING
            for path in itertools.chain.from_iterable(self.files):
                parts.append(path and (str(path.resolve()), *_size_and_times(path)))
        content = (self.kind, self.split, self.size, parts, ids)
        return hashlib.sha256(repr(content).encode()).hexdigest()


def _size_and_times(path):
    """Size and times of a file, ints, which tell whether it was replaced; () where it is gone."""
    try:
        status = path.stat()
    except OSError:  # reading it says why
        return ()
    # ctime too: unpacking and copying may give a replaced file the old mtime
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _item(image, label, name):
    """An item of a data set, see open_dataset, of its arrays."""
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())  # (H,W,3) -> (3,H,W)
    if label is not None:
        label = torch.from_numpy(label.copy())
    return {"image": image, "label": label, "name": name}


# ---------------------------------------------------------------- checking data sets

# Why an item cannot be used. text: one line, with file and remedy; the rest: see DataError.
Fault = namedtuple("Fault", "index text spares_others values")


def describe_faults(dataset, faults, bad_pairs=None):
    """
    The faults of a data set in words, list of str: a line for each kind, the most frequent first,
    with its first file, how many there are, and for ids what may be behind them. bad_pairs: how
    many --skip-bad would have to leave out in all; None: those of this data set.
    """
    if bad_pairs is None:
        bad_pairs = sum(fault.spares_others for fault in faults)
    kinds = {}
    for fault in faults:
        kind = "ids"
        if not fault.values:
            kind = fault.text
            for path in filter(None, dataset.files[fault.index]):
                kind = kind.replace(str(path), "")
            kind = re.sub(r"\(.*\)|\d+", "", kind)  # details, sizes
        kinds.setdefault(kind, []).append(fault)

    lines = []
    for group in sorted(kinds.values(), key=len, reverse=True):
        text = group[0].text
        values = set().union(*[fault.values for fault in group])
        if values:
            text += _diagnosis(values, dataset)
        if group[0].spares_others:
            text += f"; or train.py --skip-bad {bad_pairs} leaves out as many"
        lines.append(f"{text} ({len(group)} of {len(dataset)} items of {dataset.spec})")
    return lines


def _diagnosis(values, dataset):
    """What ids that are not all known may mean, in words that follow the fault's own."""
    values = sorted(values - {IGNORE})
    count = len(dataset.ids.names)
    if dataset.ids.kind != "position" or values != list(range(values[0], values[-1] + 1)):
        return f"; all values of these masks: {', '.join(map(str, values))}"
    text = f"; values {values[0]}..{values[-1]}, {count} classes 0..{count - 1}"
    if values[-1] != count:
        return text
    if values[0] == 0:
        return text + ": is 0 no class? write `0 -` and `1 NAME` in an IDS file"
    return text + ": do the ids start at 1? write `1 NAME` in an IDS file"


def check_sets(datasets, skip=0):
    """
    Checks data sets before they are used -> a list for each: the items to leave out.

    datasets: [(data set, whether its labels are used)]. Up to `skip` images in all may be left out
    whose pair is unreadable or of unequal sizes. Raises DataError with the first kind of problem;
    the others are printed before, a line each.
    """
    found, problems = [], []
    faulty = {}  # an image that two of the sets have counts once
    for dataset, _ in datasets:
        found.append(dataset.check())
        faulty.update((fault.text, fault.spares_others) for fault in found[-1])
    for (dataset, _), faults in zip(datasets, found):
        problems += describe_faults(dataset, faults, sum(faulty.values()))
    bad = [[fault.index for fault in faults] for faults in found]
    if len(faulty) <= skip and all(faulty.values()):
        problems = []
    for dataset, labels in datasets:
        if labels:
            problems.append(dataset.label_problem())
    problems = list(dict.fromkeys(filter(None, problems)))
    for problem in problems[1:]:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        raise DataError(problems[0])
    return bad


def leave_out_bad(datasets, bad):
    """Takes what check_sets gave away from its data sets -> what is left out, list of str."""
    notes = []
    for (dataset, _), items in zip(datasets, bad):
        if items:
            dataset.leave_out(items)
            notes.append(f"--skip-bad: {dataset.spec} {dataset.split} goes without {len(items)} "
                         f"images: {', '.join(dataset.left_out)}")
    return notes


def fingerprint(dataset):
    """
    Digest of what a data set gives, wherever it lies: names and sizes of its files in their order,
    and what its masks mean, where it has any; 16 hex digits. Where two are equal, so are all crops
    that are drawn at one --size. Files are the same at every size; what is rendered is another
    picture at each.
    """
    content = [dataset.kind, dataset.split]
    for part in dataset.parts:
        rendered_at = part.size if part.files is None else None
        sizes = []
        for path in itertools.chain.from_iterable(part.files or []):
            sizes.append(path and path.stat().st_size)
        content.append((part.kind, rendered_at, part.names, sizes, _meaning(part)))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def fingerprint_of_ids(dataset):
    """
    Digest of what the masks of a user's own files mean, 16 hex digits; None where there are none.
    What published masks mean does not change under a run.
    """
    content = [_meaning(part) for part in dataset.parts if part.kind in OWN and part.labeled]
    if not content:
        return None
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _meaning(part):
    """What the masks of one SPEC mean, None where it has none."""
    if not part.labeled:
        return None
    return sorted(part.ids.names.items()), part.ids.nearest, part.train_ids


def keep_out(flag, folder, dataset):
    """
    Raises DataError where results in a folder would lie among the files of a data set: they would
    replace some of them, or be taken for some the next time. flag: what names the folder.
    """
    folder = Path(folder).resolve()
    for part in dataset.parts:
        if part.files is None:
            continue
        places = {path.parent for path in itertools.chain.from_iterable(part.files) if path}
        among = any(folder == place.resolve() for place in places)
        spec = parse_spec(part.spec, part.split)
        for place in filter(None, (spec.images, spec.masks)):
            if part.kind == "folder":  # which is searched with all that it holds
                among |= folder.is_relative_to(Path(place).resolve())
            elif part.kind == "glob":
                among |= _finds_results(place, folder, part.names)
        if among:
            raise DataError(f"{flag}: {folder} is a folder of {part.spec}'s own files; "
                            "give another place")


def _finds_results(pattern, folder, names):
    """
    Whether a glob would match results in a folder, which is resolved: what train.py draws there,
    or what eval.py draws for images of these names.
    """
    root, rest = _glob_root(pattern)
    root = Path(root).resolve()
    if "*" not in pattern or not folder.is_relative_to(root):
        return False
    stars = _star_groups(rest)
    inside = folder.relative_to(root)
    results = ["result.png", "panels/000000.png", *[f"{name}.png" for name in names]]
    return any(stars.fullmatch((inside / result).as_posix()) for result in results)


# ---------------------------------------------------------------- several data sets as one

def images_in_both(a, b):
    """Paths of images that two data sets share, links resolved, list of str in b's order."""
    if a.files is None or b.files is None:
        return []
    known = {image.resolve() for image, _ in a.files if image}
    return [str(image) for image, _ in b.files if image and image.resolve() in known]


class Pool(torch.utils.data.Dataset):
    """
    Several data sets of one split as one, with the interface of SegmentationDataset: what
    open_dataset returns for several SPECs.

    parts: the data sets, each with its own table and cache; images are numbered through, in the
    order of the parts. names: INDEX/NAME, the part and the name in it. spec: the SPECs with blanks
    between. size: that of all parts, or None. mapping, notes: with the part's SPEC before them.
    Crops are drawn as from one folder with all the files, if the order of their names there is this
    one: so kind is folder, see also drawn_names.
    """

    kind = "folder"

    def __init__(self, parts, partial):
        self.parts = parts
        self.spec = " ".join(part.spec for part in parts)
        self.split = parts[0].split
        self.classes = parts[0].classes
        self.labeled = any(part.labeled for part in parts)
        if self.labeled and not partial:
            for part in parts:
                if not part.labeled:
                    raise DataError(f"{part.spec}: has no labels, and {self.spec} needs them in "
                                    "all its parts; give masks for this one, or leave it out")
        sizes = {part.size for part in parts}
        self.size = sizes.pop() if len(sizes) == 1 else None
        self.cached = all(part.cached for part in parts)
        self.table = np.concatenate([part.table for part in parts])
        self.notes = []
        self.mapping = []
        self._note_repeats()
        for part in parts:
            self.notes += [f"{part.spec}: {note}" for note in part.notes]
            self.mapping += [f"{part.spec}: {line}" for line in part.mapping]
        self.no_labels = "".join(part.no_labels for part in parts)
        self.join()

    def _note_repeats(self):
        """Notes, at a part, its images that are in a part before it."""
        for number, part in enumerate(self.parts):
            before = self.parts[:number]
            both = [path for other in before for path in images_in_both(other, part)]
            if both:
                part.notes.append(f"{len(set(both))} images are also in a SPEC before it and "
                                  f"count as often: {_some(both)}")

    def join(self):
        """Sets what the parts' items give together; again after a part's leave_out."""
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.left_out = []
        self.names = []
        self.files = []
        for index, part in enumerate(self.parts):
            self.left_out += part.left_out
            self.names += [f"{index}/{name}" for name in part.names]
            self.files += part.files or [(None, None)] * len(part)

    def __len__(self):
        return len(self.names)

    def _locate(self, i):
        """(part, index in it) of item i."""
        part = int(np.searchsorted(self.starts, i, "right")) - 1
        return self.parts[part], i - int(self.starts[part])

    def __getitem__(self, i):
        return _item(*self.arrays(i), self.names[i])

    def arrays(self, i):
        """Item i as of SegmentationDataset.arrays; labels of 255 for a part without labels."""
        part, at = self._locate(i)
        image, label = part.arrays(at)
        if self.labeled and label is None:
            label = np.full(image.shape[:2], IGNORE, np.uint8)
        return image, label

    @property
    def drawn_names(self):
        """The names without INDEX/, or with INDEX__ where two are the same: as in one folder."""
        names = []
        for part in self.parts:
            names += part.names
        if len(set(names)) == len(names):
            return names
        return [name.replace("/", "__", 1) for name in self.names]

    def has_label(self, i):
        """As of SegmentationDataset."""
        part, at = self._locate(i)
        return part.has_label(at)

    def image_path(self, i):
        """As of SegmentationDataset."""
        part, at = self._locate(i)
        return part.image_path(at)

    def prepare(self):
        """Fills the caches of all parts."""
        for part in self.parts:
            part.prepare()

    def class_counts(self, crop=RARE_SIDE):
        """Pixels per image and class, int64 (N,K); none in a part without labels."""
        counts = []
        for part in self.parts:
            none = np.zeros((len(part), len(self.classes)), np.int64)
            counts.append(part.class_counts(crop) if part.labeled else none)
        return np.concatenate(counts)


# ---------------------------------------------------------------- sampling

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: padding is near zero once normalised
RECROPS = 10  # how often a refused crop is drawn again


def rare_pixels(crop):
    """
    Pixels of a class that make an image stand for it: 3,000, as published at every crop size. Below
    512, where images are small too, the same share of a crop.
    """
    return RARE_IMAGE * min(1, crop / RARE_SIDE) ** 2


class RareClassSampler:
    """
    Draws a class, rare ones more often, then an image that shows it: P(c) = softmax((1 - f_c) / T),
    f_c the share of class c.

    counts int64 (N,K): pixels per image and class. Only images with more than min_pixels of c stand
    for c (see rare_pixels). A class without such an image is left out; DataError is raised if none
    remains. Source: DAFormer (Hoyer et al., CVPR 2022), section 3.3.
    """

    def __init__(self, counts, temperature=0.01, min_pixels=0):
        self.images = [np.flatnonzero(column > min_pixels) for column in counts.T]
        drawn = np.array([len(images) > 0 for images in self.images])
        if not drawn.any():
            raise DataError(f"no image has over {min_pixels:.0f} pixels of a class; "
                            "use --rcs 0 or a smaller --crop")
        share = counts.sum(0) / counts.sum()
        score = np.where(drawn, (1 - share) / temperature, -np.inf)
        odds = np.exp(score - score.max())
        self.probabilities = odds / odds.sum()

    def draw(self, rng):
        """(image index, class), drawn with a numpy Generator."""
        wanted = rng.choice(len(self.probabilities), p=self.probabilities)
        return int(rng.choice(self.images[wanted])), int(wanted)


class Crops(torch.utils.data.Dataset):
    """
    Endless random crops: item k (any int >= 0) -> {"image" uint8 (3,S,S), "label" uint8 (S,S),
    "inside" bool (S,S), "index" int}.

    An item depends on (seed, names in the data set, k) alone, not on workers, processes or the
    order of calls. Images come in a new order per epoch and are flipped with probability 0.5. Small
    ones are padded: there `inside` is False and the label 255.

    rare: a RareClassSampler that draws the images; a crop is then drawn again until it shows more
    than RARE_CROP * S**2 pixels of the class. max_share: a crop is drawn again until it has two
    classes and none covers that share of the labelled pixels; None: not for this. After RECROPS
    vain tries the last crop stays. labels=False: labels are not looked at, so that a target's own
    cannot steer its crops; they are 255 everywhere, as in a set without labels. subset: the indices
    that are drawn from, None for all; `rare` counts these.
    Source: DAFormer, section 3.3; max_share is mmsegmentation's cat_max_ratio.
    """

    def __init__(self, dataset, crop, seed, rare=None, max_share=0.75, labels=True, subset=None):
        self.dataset = dataset
        self.crop = crop
        self.rare = rare
        self.labels = labels and dataset.labeled
        self.max_share = max_share if self.labels else None
        # The labelled and the other images of one data set are drawn independently.
        if subset is None:
            self.subset = range(len(dataset))
            names = dataset.drawn_names
        else:
            self.subset = subset
            names = [f"labelled {labels}"] + [dataset.drawn_names[i] for i in subset]
        text = "\n".join([dataset.kind, *names])  # a name may be in another encoding than UTF-8
        self.seed = (seed, zlib.crc32(text.encode(errors="surrogateescape")))

    def __getitem__(self, k):
        rng = np.random.default_rng((*self.seed, 0, k))
        at, wanted = self._draw_image(k, rng)
        index = int(self.subset[at])
        image, label = self.dataset.arrays(index)
        if not self.labels:
            label = np.full(image.shape[:2], IGNORE, np.uint8)
        inside = np.ones(image.shape[:2], bool)
        if min(inside.shape) < self.crop:
            image = _pad(image, self.crop, MEAN_COLOUR)
            label = _pad(label, self.crop, IGNORE)
            inside = _pad(inside, self.crop, False)

        for _ in range(1 + RECROPS):
            window = self._draw_window(label, rng)
            if wanted is None or (label[window] == wanted).sum() > RARE_CROP * self.crop ** 2:
                break
        flip = -1 if rng.random() < 0.5 else 1
        image = image[window][:, ::flip].transpose(2, 0, 1)  # (S,S,3) -> (3,S,S)
        return {
            "image": torch.from_numpy(image.copy()),
            "label": torch.from_numpy(label[window][:, ::flip].copy()),
            "inside": torch.from_numpy(inside[window][:, ::flip].copy()),
            "index": index}

    def _draw_image(self, k, rng):
        """(position in the subset, class that the crop must show or None)."""
        if self.rare:
            return self.rare.draw(rng)
        epoch, turn = divmod(k, len(self.subset))
        order = np.random.default_rng((*self.seed, 1, epoch)).permutation(len(self.subset))
        return order[turn], None

    def _draw_window(self, label, rng):
        """Slices of a random square, of which no class covers too much."""
        height, width = label.shape
        for _ in range(1 + RECROPS):
            top = rng.integers(height - self.crop + 1)
            left = rng.integers(width - self.crop + 1)
            window = np.s_[top:top + self.crop, left:left + self.crop]
            if self.max_share is None:
                break
            counts = _pixels_per_class(label[window], IGNORE)
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return window


def _pad(array, size, value):
    """The array (h,w) or (h,w,3), padded below and on the right to at least size x size."""
    height, width, *channels = array.shape
    padded = np.full((max(height, size), max(width, size), *channels), value, array.dtype)
    padded[:height, :width] = array
    return padded


# ---------------------------------------------------------------- labelled subsets

def labeled_subset(names, n):
    """
    The first n of the sorted names after a shuffle by numpy's RandomState(42), list of str:
    SemiDAViL's rule. A smaller subset lies in a larger one. Raises DataError.
    """
    if not 0 < n <= len(names):
        raise DataError(f"--labeled {n}: there are {len(names)} images with labels; "
                        "give a number up to that, or all")
    names = sorted(names)
    np.random.RandomState(42).shuffle(names)
    return names[:n]


def labeled_indices(dataset, spec):
    """
    Sorted indices of the images whose labels are used. Raises DataError.

    spec: all; N of those that have a label, by labeled_subset; or a file with an image per line, by
    name or by the end of its path. What follows a tab or the last space, as the label in UniMatch's
    lists, is not looked at: labels are the data set's own.
    """
    if not dataset.labeled:
        raise DataError(f"--labeled {spec}: {dataset.spec} has no labels; give a target with masks "
                        "for these images")
    known = [i for i in range(len(dataset)) if dataset.has_label(i)]
    if spec == "all":
        return known
    if spec.isdecimal():
        at = {dataset.names[i]: i for i in known}
        if len(at) < len(known):
            raise DataError(f"--labeled {spec}: {dataset.spec} holds an image twice; remove one, "
                            "or use all")
        return sorted(at[name] for name in labeled_subset(list(at), int(spec)))
    if not Path(spec).is_file():
        raise DataError(f"--labeled {spec}: no such file; give a number, all, or a list with an "
                        "image per line")
    return _listed_indices(dataset, known, spec)


def _listed_indices(dataset, known, spec):
    """The indices, of `known`, that a file lists."""
    images = {}  # name or end of a path: indices
    for i in known:
        path = _composed(dataset.image_path(i))
        ends = {path[slash.end():] for slash in re.finditer("/", path)}
        for end in {_composed(dataset.names[i])} | ends:
            images.setdefault(end, []).append(i)
    found = set()
    for _, line in _numbered_lines(spec):
        matches = _images_in_line(images, line)
        if line.startswith("#") and not matches:
            continue  # a comment
        fault = None
        if not matches:
            fault = "no"
        elif len(matches) > 1:
            fault = "more than one"
        elif matches[0] in found:
            fault = "for the second time an"
        if fault:
            raise DataError(f"{spec}: {line!r} is {fault} image with a label of {dataset.spec}; "
                            "write one line per image, its name or the end of its path")
        found.add(matches[0])
    if not found:
        raise DataError(f"{spec}: lists no image")
    return sorted(found)


def _images_in_line(images, line):
    """Indices of the images {name or end of a path: indices} that a line of a list means."""
    whole, tab, _ = _composed(line).replace("\\", "/").removeprefix("./").partition("\t")
    candidates = [whole] if tab else [whole, whole.rpartition(" ")[0]]  # a name may hold spaces
    for wanted in filter(None, candidates):
        matches = images.get(wanted.lstrip("/"))
        if matches:
            return matches
    return []


def shows_classes(dataset, indices=None):
    """
    Whether any pixel of a labelled data set, or of its images `indices`, has a class; looks no
    further than the first.
    """
    if indices is None:
        indices = range(len(dataset))
    return any((dataset[i]["label"] != IGNORE).any() for i in indices)


# ---------------------------------------------------------------- on the device (no host sync)

def uniform(shape, generator, shard=(0, 1)):
    """
    Uniform numbers in [0,1), float32 on the CPU. shape[0] is the batch of this process; shard =
    (rank, processes). The joint batch is drawn and this rank's rows are kept, so that results do
    not depend on the number of processes.
    """
    rank, world = shard
    batch, *rest = shape
    joint = torch.rand((batch * world, *rest), generator=generator)
    return joint[rank * batch:(rank + 1) * batch]


def present_classes(label, num_classes):
    """Classes that occur in a uint8 label of any shape, bool (K,); 255 is not a class."""
    seen = torch.zeros(256, dtype=torch.bool, device=label.device)
    return seen.scatter_(0, label.flatten().long(), True)[:num_classes]  # (256,) -> (K,)


def cell_means(maps, size):
    """
    Means float (B,C,h,w) over the cells of a coarse grid, size (h,w), of maps (B,C,H,W).

    That is adaptive_avg_pool2d, which older torch has on MPS for cells of equal size alone: others
    are computed on the CPU.
    """
    h, w = size
    unequal = maps.shape[2] % h or maps.shape[3] % w
    if maps.device.type == "mps" and unequal:
        return F.adaptive_avg_pool2d(maps.cpu(), size).to(maps.device)
    return F.adaptive_avg_pool2d(maps, size)


def majority_label(label, size, num_classes, min_ratio=0.75):
    """
    Label int64 (B,h,w) of the cells of a coarse grid: the majority class where it covers
    `min_ratio` of the cell, else 255.

    label uint8 (B,H,W); size (h,w). Ignored pixels count as a class of their own. Source: DAFormer
    (Hoyer et al., CVPR 2022), whose 75 % SePiCo takes over.
    """
    index = torch.where(label == IGNORE, num_classes, label.long())
    shares = F.one_hot(index, num_classes + 1).permute(0, 3, 1, 2).float()  # (B,H,W) -> (B,K+1,H,W)
    ratio, winner = cell_means(shares, size).max(1)  # (B,h,w)
    return torch.where((ratio >= min_ratio) & (winner < num_classes), winner, IGNORE)


def class_mix(source, source_label, target, target_label, target_weight, present, generator,
              shard=(0, 1)):
    """
    Source pixels of half of the classes, pasted onto the target: image (B,3,H,W), label (B,H,W),
    weight (B,H,W), 1 on source pixels, and mask bool (B,1,H,W), True on source pixels.

    source, target (B,3,H,W); labels uint8 (B,H,W); target_weight: float tensor that broadcasts to
    (B,H,W); present bool (K,): present_classes of the joint source batch. Each image draws
    ceil(n/2) of these n classes, also ones that it does not show. 255 is never drawn, while the
    published code counts it as a class.
    Source: ClassMix (Olsson et al., WACV 2021) across domains, as in DACS (Tranheden et al., WACV
    2021).
    """
    draw = uniform((len(source), len(present)), generator, shard)  # (B,K)
    draw = draw.to(source.device, non_blocking=True)
    # The rank of each class in its image's draw; absent classes come last.
    rank = draw.masked_fill(~present, -1).argsort(1, descending=True).argsort(1)
    chosen = present & (rank < (present.sum() + 1) // 2)
    table = F.pad(chosen, (0, 256 - len(present)))  # (B,K) -> (B,256), a row for any id
    mask = table.gather(1, source_label.flatten(1).long())  # (B,H*W)
    mask = mask.view(source_label.shape)  # (B,H*W) -> (B,H,W)
    image = torch.where(mask[:, None], source, target)
    label = torch.where(mask, source_label, target_label)
    weight = torch.where(mask, 1.0, target_weight)
    return image, label, weight, mask[:, None]


def detail_corner(crop, side, generator, cell=16):
    """
    (top, left) of a detail crop of side x side pixels in a crop, the same for the joint batch: each
    uniform over the multiples of `cell` from 0 to crop - side. None, without a draw, if side is 0.

    Source: HRDA (Hoyer et al., ECCV 2022), whose code takes multiples of 8 and never the last one.
    Here cells of contrasts (16 pixels) lie wholly inside or outside.
    """
    if not side:
        return None
    places = (crop - side) // cell + 1
    top, left = torch.randint(places, (2,), generator=generator).tolist()
    return top * cell, left * cell


def _whole_cells(first, length, cells, whole):
    """Slice of those of `cells` cells along a side of `whole` pixels that lie in first..+length."""
    return slice(-(-first * cells // whole), (first + length) * cells // whole)


def block_mask(batch, size, block, ratio, generator, shard=(0, 1), corner=None, side=0):
    """
    1 (keep) or 0 (hide) per block, float32 (B,1,H,W). size (H,W).

    There are round(H/block) x round(W/block) cells, kept where u > ratio. In each image the cell of
    the largest u is kept too: nothing can be learned from an image that is hidden whole. The same
    holds for the detail crop of `side` pixels at the corner (top, left), if there is one: of the
    cells that lie wholly in it, which must be one at least, that of the largest u is kept.
    Source: MIC (Hoyer et al., CVPR 2023), section 3.2.
    """
    rows, columns = [max(1, round(side / block)) for side in size]
    u = uniform((batch, 1, rows, columns), generator, shard)
    cells = (u > ratio) | (u == u.amax((2, 3), keepdim=True))
    if corner:
        top, left = corner
        box = np.s_[..., _whole_cells(top, side, rows, size[0]),
                    _whole_cells(left, side, columns, size[1])]
        cells[box] |= u[box] == u[box].amax((2, 3), keepdim=True)
    return F.interpolate(cells.float(), size=tuple(size))  # nearest: (B,1,h,w) -> (B,1,H,W)


def strong_augment(image, generator, shard=(0, 1), each=False):
    """
    Image float32 (B,3,H,W) in [0,1] with another colour (probability 0.8) and blurred (0.5). image:
    float of that shape and range.

    Whether to jitter and whether to blur is drawn once per call. Each image has factors of its own:
    brightness (added) and hue (in turns) from +-0.2, contrast and saturation (factors) from
    0.8..1.2. Their order and sigma, 0.15..1.15 pixels, are drawn once per call or, with each=True,
    per image. Source: DACS and DAFormer with kornia 0.5, where contrast scales towards black and
    every part clamps; they call it once for a batch of the source, and image by image for ClassMix.
    """
    jitter, blur = torch.rand(2, generator=generator).tolist()
    factors = 0.4 * uniform((len(image), 4), generator, shard) - 0.2
    if each:
        order = uniform((len(image), 4), generator, shard).argsort(1)
        sigma = 0.15 + uniform((len(image),), generator, shard)
    else:
        order = torch.randperm(4, generator=generator).expand(len(image), 4)
        sigma = 0.15 + torch.rand(1, generator=generator).expand(len(image))
    image = image.float()
    if jitter > 0.2:
        image = _jitter(image, factors, order)
    if blur > 0.5:
        image = _blur(image, sigma)
    return image


def _jitter(image, factors, order):
    """
    Image (B,3,H,W) with brightness, contrast, saturation and hue moved by factors (B,4). order int
    (B,4): the turn, 0..3, in which each of these comes. Both on the CPU, where it is seen which
    parts a turn has.
    """
    neutral = torch.tensor([0.0, 1.0, 1.0, 0.0])
    for turn in range(4):
        due = order == turn  # (B,4), one part of each image
        values = neutral + torch.where(due, factors, 0.0)  # of the other parts: no change
        values = values[:, :, None, None, None].to(image.device, non_blocking=True)
        brightness, contrast, saturation, hue = values.unbind(1)  # (B,1,1,1) each
        if due[:, :2].any():
            image = (image * contrast + brightness).clamp(0, 1)
        if due[:, 2:].any():
            concerned = due[:, 2:].any(1).view(-1, 1, 1, 1).to(image.device, non_blocking=True)
            image = torch.where(concerned, _hsv(image, hue, saturation), image)
    return image


# _hsv and _blur are our own. torchvision's adjust_hue differs from ours by 9e-7 and takes 2.6 times
# as long on one core; its gaussian_blur differs by 4e-7 and takes 2.4 times as long.

def _hsv(image, turn, factor):
    """
    Image (B,3,H,W) with `turn`, a share of the circle, added to the hue of HSV and the saturation
    scaled by `factor`, capped at 1; the value stays. turn, factor: numbers, or (B,1,1,1).
    """
    red, green, blue = image.split(1, 1)  # (B,1,H,W) each
    value = image.amax(1, keepdim=True)
    spread = value - image.amin(1, keepdim=True)
    safe = spread.clamp(min=1e-8)
    # The hue in sixths of the circle, counted from the channel that is the largest.
    from_red = (green - blue) / safe
    from_green = 2 + (blue - red) / safe
    from_blue = 4 + (red - green) / safe
    hue = torch.where(value == green, from_green, from_blue)
    hue = torch.where(value == red, from_red, hue)
    shift = torch.arange(5, 0, -2, device=image.device).view(1, 3, 1, 1)  # red, green, blue
    k = (shift + hue + 6 * turn) % 6  # (B,3,H,W)
    chroma = torch.minimum(spread * factor, value)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(image, sigma, radius=4):
    """
    Image (B,3,H,W) under a separable Gaussian with reflected borders; sigma float (B,) on the CPU,
    pixels. The 9 taps hold all but 1e-3 of the published 51 at the largest sigma.
    """
    for axis in (2, 3):
        side = image.shape[axis]
        r = min(radius, side - 1)  # n pixels can be reflected n - 1 times
        offsets = torch.arange(-r, r + 1)
        taps = torch.exp(-offsets ** 2 / (2 * sigma[:, None] ** 2))  # (B,2r+1)
        taps = taps / taps.sum(1, keepdim=True)
        taps = taps.view(-1, 2 * r + 1, 1, 1, 1).to(image.device, non_blocking=True)
        border = (0, 0, r, r) if axis == 2 else (r, r, 0, 0)
        padded = F.pad(image, border, mode="reflect")
        # Slices instead of a convolution: several times faster on a CPU, and autocast does not
        # touch them.
        parts = [taps[:, i] * padded.narrow(axis, i, side) for i in range(2 * r + 1)]
        image = sum(parts)
    return image


def fourier_restyle(image, style, beta=0.01):
    """
    Images with the low-frequency amplitudes of others, float32 (B,3,H,W) in [0,1]; phases, and with
    them shapes and labels, stay.

    image, style: float of that shape and range. The amplitudes of the (2b+1) x (2b+1) lowest
    frequencies are replaced, b = floor(beta * min(H,W)). Source: FDA (Yang and Soatto, CVPR 2020).
    """
    H, W = image.shape[2:]
    b = int(beta * min(H, W))
    low = torch.zeros(H, W // 2 + 1, dtype=torch.bool, device=image.device)  # half of the spectrum
    low[:b + 1, :b + 1] = True
    low[H - b:, :b + 1] = True  # negative vertical frequencies
    ours = torch.fft.rfft2(image.float())  # (B,3,H,W//2+1), complex
    theirs = torch.fft.rfft2(style.float())
    amplitude = torch.where(low, theirs.abs(), ours.abs())
    mixed = torch.polar(amplitude, ours.angle())
    return torch.fft.irfft2(mixed, (H, W)).clamp(0, 1)


def restyle(image, looks, generator, shard=(0, 1)):
    """
    Source images in another look, float32 (B,3,H,W) in [0,1]. image: float of that shape and range.

    looks: target images (B,3,H,W), of which each image draws one to take its low frequencies from;
    T2S-DA's pseudo-target. None draws a random look, for domain generalisation, once per step:
    colour jitter and blur (strong_augment); or a gain and a shift per image and channel; or the low
    frequencies of another image of the batch, beta from 0.01..0.1. Images are chosen among those of
    the process; where it has one alone, that one has a gain and a shift instead. Source: after
    T2S-DA (Wang et al., 2023).
    """
    # Both kinds of look draw these first.
    B = len(image)
    pick = uniform((B,), generator, shard)  # (B,), in [0,1)
    choice, where = torch.rand(2, generator=generator).tolist()
    if looks is not None:
        pick = (pick * len(looks)).long().to(image.device, non_blocking=True)
        return fourier_restyle(image, looks[pick], 0.01)
    if choice < 1 / 3:
        return strong_augment(image, generator, shard)
    if choice < 2 / 3 or B == 1:
        draw = uniform((B, 2, 3, 1, 1), generator, shard)
        gain, shift = draw.to(image.device, non_blocking=True).unbind(1)  # (B,3,1,1) each
        return (image.float() * (0.6 + 0.8 * gain) + 0.4 * shift - 0.2).clamp(0, 1)
    # never an image itself: the next one, or the one after that, ...
    other = (torch.arange(B) + 1 + (pick * (B - 1)).long()) % B  # (B,)
    other = other.to(image.device, non_blocking=True)
    return fourier_restyle(image, image[other], 0.01 + 0.09 * where)


# ---------------------------------------------------------------- pictures: uint8 arrays (h,w,3)

def as_picture(image):
    """Picture uint8 (H,W,3) of an image tensor (3,H,W), uint8 or float in [0,1], on any device."""
    if image.dtype != torch.uint8:
        image = image.float().mul(255).round().clamp(0, 255).byte()
    return image.permute(1, 2, 0).cpu().numpy()  # (3,H,W) -> (H,W,3)


def colorize(label, colors):
    """Picture (h,w,3) of ids uint8 (h,w) in the colours of a palette uint8 (K,3); 255 is black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(colors)] = colors
    return table[label]


def overlay(picture, label, colors):
    """Half picture (h,w,3), half colours of the ids (h,w); the picture alone where they are 255."""
    mixed = (picture.astype(np.uint16) + colorize(label, colors)) // 2
    ignored = label[..., None] == IGNORE  # (h,w) -> (h,w,1) against (h,w,3)
    return np.where(ignored, picture, mixed).astype(np.uint8)


def grid(rows, titles, gap=4):
    """
    PIL image of rows of pictures (lists of uint8 (h,w,3), of any sizes), a title a column. Columns
    are as wide as the widest picture or title.
    """
    pictures = list(itertools.chain.from_iterable(rows))
    height = max(picture.shape[0] for picture in pictures) + gap
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    title_widths = [math.ceil(ruler.textlength(title)) + 2 for title in titles]
    width = max([picture.shape[1] for picture in pictures] + title_widths) + gap
    top = 14  # the height of Pillow's own font
    sheet = Image.new("RGB", (len(titles) * width - gap, top + len(rows) * height - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * width + 2, 1), title, fill="black")
        for y, row in enumerate(rows):
            sheet.paste(Image.fromarray(row[column]), (column * width, top + y * height))
    return sheet


def with_legend(sheet, entries):
    """
    PIL image: the sheet, below it a square of each colour and its name. entries: (name, RGB). A
    sheet that is narrower than an entry gets wider.
    """
    line, square = 16, 10  # heights
    draw = ImageDraw.Draw(sheet)
    widths = [square + 4 + math.ceil(draw.textlength(name)) for name, _ in entries]
    width = max([sheet.width, *[wide + 4 for wide in widths]])
    larger = Image.new("RGB", (width, sheet.height + line * (len(entries) + 1)), "white")
    larger.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(larger)
    x = 2
    y = sheet.height + 2
    for (name, colour), wide in zip(entries, widths):
        if x > 2 and x + wide > width:
            x = 2
            y += line
        draw.rectangle((x, y, x + square, y + square), fill=tuple(int(c) for c in colour))
        draw.text((x + square + 4, y), name, fill="black")
        x += wide + 14
    return larger.crop((0, 0, width, y + line))


def legend(labels, names, colors):
    """Entries for with_legend of the classes that occur in ids (arrays or tensors uint8)."""
    occurring = set()
    for label in labels:
        occurring.update(np.unique(np.asarray(label)).tolist())
    entries = [(name, colors[i]) for i, name in enumerate(names) if i in occurring]
    if IGNORE in occurring:
        entries.append(("not labelled", (0, 0, 0)))
    return entries


def save_ids(path, label, colors):
    """
    Writes ids uint8 (h,w) as an indexed PNG: its values are the ids, its palette the colours.
    Raises OSError.
    """
    image = Image.fromarray(label)
    image.putpalette(colorize(np.arange(256), colors).tobytes())  # a colour for each id
    save_picture(image, path)


def read_colours(path, names):
    """
    Colours uint8 (K,3) of the classes: those of a file as of read_table. Classes that it lacks keep
    their own. Raises DataError.
    """
    table = read_table(path)
    if table.kind != "colour":
        raise DataError(f"{path}: no line has a name and a colour; write `128 64 128 road`")
    colours = palette(names)
    index = _classes_of_values(table, names)
    for colour in table.names:  # in the order of the lines: the last of a class counts
        if index[colour] != IGNORE:
            colours[index[colour]] = colour
    return colours


def contact_sheet(dataset, rows=8, width=320):
    """
    PIL image of evenly spaced items, a row each: image, and where labelled colours and both, with
    a legend.
    """
    colors = palette(dataset.classes)
    titles = ["image"]
    if dataset.labeled:
        titles += ["label", "overlay"]
    pictures, labels = [], []
    for i in np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int):
        image, label = dataset.arrays(i)
        size = (width, max(1, width * image.shape[0] // image.shape[1]))
        image = _resized(image, size, Image.Resampling.BICUBIC)
        row = [image]
        if label is not None:
            label = _resized(label, size, Image.Resampling.NEAREST)
            row += [colorize(label, colors), overlay(image, label, colors)]
            labels.append(label)
        pictures.append(row)
    return with_legend(grid(pictures, titles), legend(labels, dataset.classes, colors))


# ---------------------------------------------------------------- the command: python data.py SPEC

def parse_size(text):
    """'WxH' as (W, H), an argparse type."""
    if not re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WxH, for example 256x192")
    width, height = map(int, text.split("x"))
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise argparse.ArgumentTypeError(f"{text}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; "
                                         "give a smaller one")
    return width, height


def _report(dataset, faults):
    """Prints what is in a data set -> number of items with a problem. faults: of dataset.check."""
    kind = "labelled" if dataset.labeled else "without labels"
    print(f"{dataset.spec} {dataset.split}: {len(dataset)} images, {kind}: {_some(dataset.names)}")
    for line in dataset.mapping:
        print(line)
    problems = describe_faults(dataset, faults)
    count = len(faults)
    if count < len(dataset):
        if faults:
            dataset.leave_out([fault.index for fault in faults])  # the rest is reported
        facts = dataset.facts()
        _print_sizes(facts)
        if dataset.labeled:
            _print_shares(dataset, facts)
        if dataset.files is not None:
            for remark in dataset.remarks():
                print(f"note: {remark}")
        unfit = dataset.label_problem()
        if unfit:
            problems.append(unfit)
            count += 1
    if dataset.no_labels:
        print(f"note: no label was found{dataset.no_labels}")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{count} problems")
    return count


def _print_sizes(facts):
    """Prints the sizes of images, the most frequent first."""
    sizes = Counter(f"{width}x{height}" for width, height in facts["size"])
    text = ", ".join(f"{size} ({number})" for size, number in sizes.most_common(5))
    if len(sizes) > 5:
        text += f" and {len(sizes) - 5} more sizes"
    print(f"sizes: {text}")


def _print_shares(dataset, facts):
    """Prints each class with its share of the pixels that have a class."""
    counts = facts["native"].sum(0)
    print(f"{'class':20} {'% of pixels':>11}")
    for name, share in zip(dataset.classes, 100 * counts / max(1, counts.sum())):
        print(f"{name:20} {share:11.3f}")
    never = [name for i, name in enumerate(dataset.classes) if i not in dataset.table]
    if never:
        print(f"note: no label of {dataset.kind} can become {_some(never)}")


def build_parser():
    """One line per flag."""
    parser = Parser("data.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="data set, see above")
    parser.add_argument("--classes", help="class space or names file (default: for own data the "
                                          "names of IDS, camvid11 for camvid:, else cityscapes19)")
    parser.add_argument("--split", default="train", help="train, val or test (default: train)")
    parser.add_argument("--size", type=parse_size, metavar="WxH",
                        help="pixels of the images on the sheet (default: the published size)")
    parser.add_argument("--cache", help="directory of the cache (default: ~/.cache/nanouda)")
    parser.add_argument("--out", default="sheet.png",
                        help="contact sheet: image, label colours, overlay (default: sheet.png)")
    return parser


def check_picture(path, flag):
    """Raises DataError where a picture that the work ends with could not be written."""
    if not Path(path).resolve().parent.is_dir():
        raise DataError(f"{flag} {path}: there is no such folder")
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind or "")
        written = not Path(path).is_dir()
    except (KeyError, OSError, ValueError):  # no such kind, or one that Pillow only reads
        written = False
    if not written:
        raise DataError(f"{flag} {path}: no kind of picture that can be written; write FILE.png")


def run(args):
    """The command's work. Raises DataError on bad input, OSError where a file is out of reach."""
    check_picture(args.out, "--out")
    dataset = open_dataset(
        args.spec, args.split, args.classes, args.size, args.cache, partial=True)
    if dataset.files is not None:
        dataset.cached = False  # a look at a data set needs its facts, not a copy of its images
    keep_out(f"--out {args.out}", Path(args.out).resolve().parent, dataset)
    problems = _report(dataset, dataset.check())
    if problems:
        raise DataError(f"{args.spec}: {problems} problems, see the list above")
    save_picture(contact_sheet(dataset), args.out)
    print(f"contact sheet: {args.out}")


def main(argv=None):
    """Checks a data set, prints what is in it, draws a contact sheet. Exit status 2: problems."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
        with output():
            pass  # but to pass on what was printed
    except DataError as error:
        fail("data.py", error, 2)
    except OSError as error:
        fail("data.py", error, 1)
    except KeyboardInterrupt:
        interrupted()


# ---- the rendered streets
#
# render_street(seed, index, style, size) -> image uint8 (H,W,3), label uint8 (H,W)
#
# A small world for the default commands, drawn with numpy and Pillow. How a picture comes to be:
#
#   1. _Street       chooses camera, light and place by chance, and opens four canvases at twice
#                    the final size: image, label, material of the ground, shadow on it.
#   2. _lay_out      lays the ground and the shadows, and queues whatever stands upright on it.
#   3. _paint_sky, _paint_ground    paint the backdrop. The ground is ray-cast, one ray a pixel:
#                    colour of the material, times noise that is fixed to the world, times light.
#   4. _paint_queue  paints what stands upright from far to near, so that the near hides the far.
#                    Every shape goes onto image and label alike, and so the two always agree.
#   5. _photograph   halves the size and adds what a camera adds: exposure, noise, blur, JPEG.
#
# At night the same world is lit by its lamps, shop windows and headlights (`lights`), some windows
# are bright, and _photograph adds the glow around what shines, its reflections on a wet road, and a
# veil in the colour of the lamps.
#
# World: metres. x points right from the middle of the street, y up from the ground, z ahead from
# the camera. `side` is -1 for the left and 1 for the right. `line` is the distance from the middle
# at which the pavement ends and the plots begin. The street is straight in this world; the camera's
# projection bends it.
#
# Colours: palettes hold reflectances, 0..255 for red, green and blue. What is seen is a reflectance
# times the light (between `shade` and `sun`), paler the farther it is (haze): _Street.tone. What
# shines itself is seen as its palette has it: _Street.shine.
#
# Chance: all of it comes from one generator, started with (seed, index, number of the style). Draws
# are made in the order of the code, some of them for things that are then left out. One draw more
# or less makes other worlds, and with them other numbers in the README.
#
# Where to change what: light, weather, lens and colours of a style in _STYLES (another style is
# another entry, and one of STREETS); shapes in _VEHICLES and _FIGURES; how many stand where in
# _FURNITURE (lamps, people, signs); what lines a street in _DISTRICTS and _line_up.

# Cityscapes train ids
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
KERB, PAINT = 19, 20  # materials of the ground only: labelled as sidewalk and road

SUPERSAMPLING = 2  # canvas pixels for one pixel of the picture, along each side
BEAM_REACH = 16.0  # metres at which 1/e of our headlights' light is left
NEAR = 0.7  # metres: nothing is drawn that is nearer to the camera
FAR = 110.0  # metres: end of the built street
FOOT = 0.2  # metres: what stands on a foot reaches so far from its place
FULL_LIGHT = 200  # a sun of colour c8c8c8 shows reflectances as the palettes have them
LIT, SHADED, COVERED = 0, 200, 255  # levels of the shadow canvas; covered: under a car
TILE = 512  # side of the noise tiles, a power of two
CROWN = 128  # side of the pictures of tree crowns
CROWNS = 8  # such pictures of each kind, leafy and bare

# -- styles

_DAY = dict(
    night=False,  # whether lamps light the street in place of the sun
    camera_rise=0.0,  # metres above a driver's eyes
    sun_chance=0.6,  # share of the pictures with sun; the others are overcast
    sun_strength=(0.9, 1.1),
    shade_sunny=(0.36, 0.6),  # light in the shade on a sunny day; 1 shows reflectances as they are
    shade_overcast=(0.62, 0.85),  # light everywhere under clouds
    shade_tint=(0.96, 1, 1.05),  # red, green, blue: shade is lit by the sky
    shadow_slope=(0.7, 3),  # metres of shadow for a metre of height
    visibility=(120, 300, 800),  # metres at which 1/e of a colour is left, the rest is haze
    log_gain=(0.12, 0.3),  # exposure: mean and deviation of its logarithm
    blur=(0.2, 0.7),  # of the lens: deviation in pixels
    white_balance=0.04,  # deviation of the gains of red, green and blue
    noise=(0.5, 4),  # of the sensor: deviation, 0..255
)
_PALETTE = dict(  # colours that all styles have, as hex RGB
    marking="e6e6e2 dcdcd8 e6e6e2 d2aa46",
    black="18181a",
    plate="d2c896",
    tail_light="be1a16 ff3c28",
    head_light="eae6dc",
    hair="342820",
    skin="c4967c 6a4838",
    red_light="ff4628 380c08",
    green_light="50ffa0 08301c",
)
_SUMMER = _PALETTE | dict(
    road="3a3c40 4e4f52 626161 76736e 58544f",
    sidewalk="706e6a 847e76 96938c 626162 8c7a6c",
    terrain="4c602c 607038 545a32 6e7042",
    leaf="30421e 425426 545c2e 363c28 5a5438",
    wall="864e3c 96664c a89270 beb094 cecac2 7a5446 96928c 5c5858",
    glass="1e2228 2c323a 3e4854 606c7a 18181a",
    frame="d6d4ce beb6b0 5a544e e6e6e4",
    roof="565050 704e40 464850",
    paint="282a2e 464a50 969a9e c8cacc 222e52 781a1a 18181a 3c5478",
    cloth="22242c 3c3e48 2e3654 6e645c 962828 bab8b4 1e1e20",
    metal="5c5e60 787a7a 3c3e3e 2c3a32",
    sign="c42828 284ca0 dededc 246e46",
    zenith="608ccd 8cacd7 bec8d4 ced2d6 969ea8",
    horizon="d6e0ea e8eaea dedcd6",
    cloud="f0f0f2 dee0e4 969aa2",
    sun="ded4c4 e0dcd4",
)
_STYLES = (  # render_street's `style` is the position, in the order of STREETS
    _DAY | dict(palettes=_SUMMER),
    _DAY | dict(  # pale roads, autumn, a low sun, a higher and sharper camera
        camera_rise=0.25,
        shadow_slope=(1.7, 4.5),
        blur=(0, 0.3),
        palettes=_PALETTE | dict(
            road="9c968c a8a298 908a80",
            sidewalk="683a30 5c3632 764434",
            terrain="b0985c bca86e a08654",
            leaf="b05c1e c48628 963a22 b8703c",
            wall="d8b268 ce9284 9ebea8 96accc e2d4b8 be7a5a",
            glass="e8d6a4 ceccc6 f0e2be",
            frame="4a362a 3c4642 603c32",
            roof="964a34 a65c42 3c5c58",
            paint="c4a828 3c8854 ce7024 4896aa beaa88 963c78",
            cloth="d8c43c dcdcd6 46aaa0 dc783c c86e96",
            metal="c4c0b4 967048 b0b4b0",
            sign="e2ba1e 14786e 784628",
            zenith="4a526c 5c5c6c 54627a",
            horizon="cea478 b0988c d8b884",
            cloud="464858 706268 967c6e",
            sun="e8c8a0 e6c496",
        ),
    ),
    _DAY | dict(  # the first world after dusk
        night=True,
        sun_chance=0.0,
        shade_overcast=(0.1, 0.24),  # what is left of the sky's light
        shade_tint=(0.9, 0.96, 1.12),
        visibility=(80, 150, 300),
        log_gain=(-0.3, 0.3),
        blur=(0.4, 1.1),
        white_balance=0.09,
        noise=(12, 20),
        one_colour=0.8,  # share of all colours that drowns in that of the lamps
        veil=(20, 50),  # lamplight in the air and on the lens, 0..255
        palettes=_SUMMER | dict(
            zenith="0a0c14 10121c 06080c 1a1814",
            horizon="1c1e28 2c241e 34281c 16181e",
            cloud="20201e 2a241e 14161c",
            sun="ffa14d ffb664 9ad6ff",  # light of the lamps: sodium, warm, cold
            bulb="ffdca0 fff0d2 ffffff",
            window="ffc878 ffdc9c fff0d0 d8a860 b4c8e6",
            tail_light="d21e18 ff3020",
            head_light="fff6e0 f4f8ff",
        ),
    ),
)

# -- catalogues

_VEHICLES = {
    # class; length, width, height of the body and of the roof, in metres; begin and end of the
    # cabin, at its foot and at the roof, in lengths from the rear; width of the roof, in widths;
    # number of windows on a side
    "hatch": (CAR, 4, 1.8, 0.9, 1.5, (0, 0.74), (0.1, 0.56), 0.8, 2),
    "sedan": (CAR, 5, 1.8, 0.9, 1.4, (0.1, 0.75), (0.3, 0.58), 0.8, 2),
    "wagon": (CAR, 5, 1.9, 1, 1.7, (0, 0.76), (0.05, 0.6), 0.8, 3),
    "van": (CAR, 5, 2, 1.1, 2, (0, 0.9), (0, 0.74), 0.9, 1),
    "truck": (TRUCK, 8, 2.4, 1, 3.5, (0, 1), (0, 1), 1, 0),
    "bus": (BUS, 11, 2.5, 1, 3, (0, 1), (0, 1), 1, 6),
    "train": (TRAIN, 24, 2.6, 1.4, 3.5, (0, 1), (0.02, 0.98), 0.86, 10),
}
_PARKED = ["hatch", "hatch", "sedan", "wagon", "van"]  # twice: twice as often
_TRAFFIC = _PARKED * 7 + ["bus", "truck"] * 3 + ["train"]

_FIGURES = {
    # class, then strokes: palette, width, points (x, y), in centimetres from the middle of the
    # foot. A stroke of one point is a disc. Later strokes cover earlier ones. Of a palette one
    # colour is taken for the whole figure.
    "legs": (
        PERSON,
        ("cloth", 15, (-21, 0), (-11, 45), (-4, 92)),
        ("cloth", 15, (21, 0), (12, 45), (4, 92)),
    ),
    "bent": (  # legs of a rider
        RIDER,
        ("cloth", 15, (14, 22), (26, 66), (-6, 88)),
        ("cloth", 15, (2, 34), (16, 74), (-6, 88)),
    ),
    "torso": (
        PERSON,
        ("cloth", 9, (-14, 142), (-25, 112), (-22, 86)),
        ("cloth", 36, (0, 80), (0, 140)),
        ("hair", 22, (-2, 166)),
        ("cloth", 9, (14, 142), (25, 112), (36, 92)),
        ("cloth", 24, (0, 139), (0, 149)),
        ("skin", 20, (1, 160)),
    ),
    "bicycle": (
        BICYCLE,
        ("black", 68, (-52, 34)),
        ("black", 68, (52, 34)),
        ("paint", 6, (52, 34), (36, 102), (46, 104)),
        ("paint", 7, (-52, 34), (-18, 82), (0, 34), (38, 78), (-18, 82), (-14, 92)),
    ),
    "motorcycle": (
        MOTORCYCLE,
        ("black", 62, (-66, 31)),
        ("black", 62, (66, 31)),
        ("paint", 12, (66, 31), (40, 106)),
        ("metal", 40, (-30, 38), (30, 38)),
        ("paint", 22, (-86, 78), (-20, 70), (40, 84)),
    ),
    "lamp": (
        POLE,
        ("metal", 14, (0, 0), (0, 720), (130, 740)),
        ("metal", 20, (130, 740), (200, 745)),
    ),
    "bulb": (POLE, ("bulb", 44, (130, 738), (190, 741))),  # of a lamp that shines
    "post": (POLE, ("metal", 10, (0, 0), (0, 240))),
    "disc": (SIGN, ("sign", 76, (0, 240)), ("frame", 52, (0, 240))),
    "board": (
        SIGN,
        ("sign", 90, (-60, 240), (60, 240)),
        ("frame", 14, (-45, 256), (30, 256)),
        ("frame", 14, (-45, 224), (9, 224)),
    ),
    "signal": (
        LIGHT,
        ("black", 38, (0, 220), (0, 320)),
        ("red_light", 26, (0, 302)),
        ("green_light", 26, (0, 238)),
    ),
}
_FURNITURE = [
    # figures, drawn over one another; mean number on a side; metres ahead, from and to; place
    # across, from and to: 0 is the middle of the street, 1 the kerb, 2 the end of the pavement
    ("legs torso", 1.1, (5, 16), (1.2, 1.9)),
    ("legs torso", 1.3, (10, 50), (1.2, 1.9)),
    ("legs torso", 0.2, (8, 40), (0, 1)),
    ("bicycle bent torso", 0.2, (6, 28), (0.2, 0.9)),
    ("motorcycle bent torso", 0.1, (6, 28), (0.2, 0.9)),
    ("lamp", 2, (8, 80), (1, 1.2)),
    ("bicycle", 0.3, (7, 25), (1.7, 1.9)),
    ("motorcycle", 0.1, (7, 25), (1.1, 1.9)),
    ("post disc", 0.7, (7, 40), (1.1, 1.3)),
    ("post board", 0.4, (7, 40), (1.1, 1.4)),
    ("post signal", 0.7, (9, 40), (1.1, 1.3)),
]

_SHINING = {"bulb", "red_light", "green_light"}  # palettes of what shines at night
_PLOTS = ["house", "wall", "fence", "hedge", "park"]
_BARRIERS = {"wall": (WALL, "wall"), "fence": (FENCE, "metal")}  # class, palette
_DISTRICTS = [  # from town to park
    # share of the pictures; shares of the _PLOTS; chance of avenue trees and of a verge, for each
    # side; ground beyond the street
    (0.40, (0.80, 0.06, 0.06, 0.02, 0.06), 0.30, 0.1, SIDEWALK),
    (0.30, (0.50, 0.13, 0.13, 0.12, 0.12), 0.45, 0.4, TERRAIN),
    (0.15, (0.20, 0.20, 0.20, 0.10, 0.30), 0.50, 0.6, TERRAIN),
    (0.15, (0.05, 0.10, 0.20, 0.20, 0.45), 0.50, 0.6, TERRAIN),
]

# For _Street.panels: outlines within the unit square, (2, corners), and bounds (s0, s1, t0, t1).
_SQUARE = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]).T
_ANGLES = np.arange(10) * 0.63  # rad: ten corners make a wheel
_WHEEL = 0.5 + 0.5 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])
_WHOLE = (0, 1, 0, 1)  # the panel fills its face
_GREYS = np.arange(256, dtype=np.uint16)[:, None]  # (256,1)
_BRANCHES = [0] * 61 + [255] * 195  # opacities that are labelled: thin branches count too

# -- noise and tree crowns


def _noise(rng, slope, stretch=1):
    """Seamless noise tile, float32 (TILE, TILE), of mean 0 and deviation 1.

    slope: the amplitude falls as 1 / frequency^slope; 0 is white. stretch > 1 draws it out along x.
    """
    freq = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE) * stretch)
    freq[0, 0] = np.inf  # takes the mean away
    tile = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE, TILE))) * freq ** -slope)
    return (tile / tile.std()).astype(np.float32)


def _crown(rng, bare):
    """Tree crown as a picture of two bands (PIL, "La", CROWN x CROWN): brightness and opacity."""
    y, x = np.mgrid[-1:1:CROWN * 1j, -1:1:CROWN * 1j]  # y down, both -1..1 from the middle
    leaves = _noise(rng, 0.6)[:CROWN, :CROWN]
    clumps = _noise(rng, 1.7)[:CROWN, :CROWN]
    streaks = _noise(rng, 0.8, 4)

    # A ball with a ragged rim: the first factor makes it hard, the second sets the radius.
    distance = np.hypot(x, y)
    if bare:
        alpha = 900 * (1 - distance + 0.3 * clumps + 0.18 * leaves)
        # Branches are streaks of noise that spread from a point below the crown, at y = 1.1.
        angle = np.arctan2(x, 1.1 - y) * 60
        reach = np.hypot(x, 1.1 - y) * (25 + 9 * leaves.clip(-1, 1))
        streaks = streaks[angle.astype(int), reach.astype(int)]
        alpha = np.minimum(alpha, 60 + 90 * streaks)
    else:
        alpha = 300 * (1 - 1.4 * distance + 0.3 * clumps + 0.18 * leaves)

    tone = 120 + 34 * leaves + 34 * clumps - 45 * y  # darker below
    bands = np.stack([tone, alpha], 2).clip(0, 255).astype(np.uint8)
    return Image.frombytes("La", (CROWN, CROWN), bytes(bands))


@functools.cache
def _colours(palette):
    """Reflectances (r, g, b) of a palette as ints 0..255. palette: hex RGB, between spaces."""
    return [tuple(bytes.fromhex(code)) for code in palette.split()]


@functools.lru_cache(maxsize=1)
def _bank():
    """Noise tiles by slope, and lists of crowns by "is bare". The same for every seed."""
    rng = np.random.default_rng(0)
    crowns = {False: [], True: []}
    for _ in range(CROWNS):
        crowns[False].append(_crown(rng, False))
        crowns[True].append(_crown(rng, True))
    tiles = {slope: _noise(rng, slope) for slope in (0, 0.3, 0.7, 1.1)}
    tiles[1.7] = _noise(rng, 1.7, 2)  # clouds are wide
    return tiles, crowns


# -- the scene


class _Street:
    """One scene: its camera, light and place, four canvases, the queue of what stands upright."""

    def __init__(self, rng, style, size):
        """rng: numpy generator. style: one of _STYLES. size: (W, H) of the picture in pixels."""
        self.rng = rng
        self.style = style
        self.size = size
        self.w = size[0] * SUPERSAMPLING  # of the canvases
        self.h = size[1] * SUPERSAMPLING
        self.jobs = []  # (distance, function, arguments)
        self.night = style["night"]
        self.lights = []  # at night: (x, z, strength, reach) of what lights its surroundings

        self._choose_camera()
        self._choose_light()
        self._choose_place()

        self.image = Image.new("RGB", (self.w, self.h), 0)
        self.label = Image.new("L", (self.w, self.h), SKY)
        self.ground = Image.new("L", (self.w, self.h), SKY)  # material; SKY where no ground is laid
        self.shadow = Image.new("L", (self.w, self.h), SHADED if self.night else LIT)
        self.image_pen = ImageDraw.Draw(self.image)
        self.label_pen = ImageDraw.Draw(self.label)
        self.ground_pen = ImageDraw.Draw(self.ground)
        self.shadow_pen = ImageDraw.Draw(self.shadow)

    def _choose_camera(self):
        """Chooses where the camera is and looks, and the width and the bend of its street."""
        rng = self.rng
        self.focal = self.w * rng.uniform(0.8, 1.15)  # canvas pixels; 64 to 47 degrees of view
        self.height = rng.uniform(1.25, 1.5) + self.style["camera_rise"]  # metres: eyes of a driver
        self.cu = self.w / 2
        self.cv = self.h * rng.uniform(0.44, 0.55)  # canvas row of the horizon
        self.roll = rng.normal(0, 0.008)  # rad
        self.heading = rng.normal(0, 0.035)  # rad
        bend = rng.normal(0, 0.0012)  # 1/m: moves x by bend z^2, a curve of radius 1 / (2 bend)
        curved = rng.random() < 0.5
        self.bend = bend * curved
        # The road: half its width in metres, the side on which one drives, and our lane on it.
        self.half = float(rng.choice([3, 3.5, 3.5, 4, 5, 6.5]))
        self.hand = int(rng.choice([-1, 1]))
        self.eye = self.hand * self.half * rng.uniform(0.4, 0.7)  # x of the camera

    def _choose_light(self):
        """Chooses sun or clouds, the colours of light and haze, and where shadows fall."""
        rng = self.rng
        style = self.style
        self.sunny = float(rng.random() < style["sun_chance"])  # 0 or 1
        slope = rng.uniform(*style["shadow_slope"])
        azimuth = rng.uniform(0, 2 * math.pi)
        # How far the shadow of a metre of height falls, along x and z.
        self.cast = slope * math.sin(azimuth), slope * math.cos(azimuth)
        # Light (3,) where no sun comes, and on what faces the sun.
        tint = np.array(style["shade_tint"])
        if self.sunny:
            self.shade = rng.uniform(*style["shade_sunny"]) * tint
            strength = rng.uniform(*style["sun_strength"])
            self.sun = strength * self.pick("sun", spread=0) / FULL_LIGHT
        else:
            self.shade = rng.uniform(*style["shade_overcast"]) * tint
            self.sun = self.shade
        if self.night:
            self.lamp = rng.uniform(0.5, 1) * self.pick("sun", spread=0) / FULL_LIGHT
            self.sun = self.shade + self.lamp
            self.beam = rng.uniform(0.25, 0.6)  # light of our headlights on what is near
            self.window_share = rng.uniform(0.15, 0.7)  # of the windows that are bright
            self.wetness = rng.uniform(0.2, 0.8) * (rng.random() < 0.5)  # of the road
        self.haze = self.pick("horizon")
        self.visibility = float(rng.choice(style["visibility"]))

    def _choose_place(self):
        """Chooses the district, the crossing street ahead, and what the trees are like."""
        rng = self.rng
        shares = [district[0] for district in _DISTRICTS]
        district = _DISTRICTS[rng.choice(len(shares), p=shares)]
        _, self.plot_shares, self.avenue_chance, self.verge_chance, self.beyond = district
        near = 2 * FAR  # metres: out of sight, most streets have no crossing
        if rng.random() < 0.45:
            near = rng.uniform(10, 45)
        self.crossing = near, near + rng.uniform(7, 14)  # metres ahead, from and to
        self.leaf = self.pick("leaf")
        self.bare_share = rng.random()  # of the trees

    def pick(self, name, spread=10):
        """Reflectance, float64 (3,): one of a palette, varied.

        spread: deviation of its brightness, 0..255; red, green and blue vary by a third of it more.
        """
        colours = _colours(self.style["palettes"][name])
        all_bands, *bands = (spread * self.rng.standard_normal(4)).tolist()
        colour = colours[self.rng.integers(len(colours))]
        return np.array([level + all_bands + band / 3 for level, band in zip(colour, bands)])

    def tone(self, colour, lit, z):
        """Colour (r, g, b) as ints 0..255: a reflectance in some light, seen from z metres.

        lit: 0 in the shade, 1 in the sun.
        """
        near = 0
        if self.night:
            near = self.beam * math.exp(-z / BEAM_REACH)
        sent = []
        # of three numbers Python is faster than numpy
        for level, shade, sun in zip(colour.tolist(), self.shade.tolist(), self.sun.tolist()):
            sent.append(level * (shade + (sun - shade) * lit + near))
        return self.shine(sent, z)

    def shine(self, colour, z):
        """Colour (r, g, b) as ints 0..255 of what sends out `colour`, seen from z metres."""
        clear = math.exp(-z / self.visibility)
        seen = []
        for level, haze in zip(colour, self.haze.tolist()):
            seen.append(int(min(max(haze + clear * (level - haze), 0), 255)))
        return tuple(seen)

    def project(self, x, y, z):
        """Canvas column and row of a point in metres; numbers or arrays. z is at least NEAR."""
        u = self.focal / z * (x - self.eye - self.heading * z + self.bend * z * z)
        v = self.focal / z * (self.height - y)
        return self.cu + u - self.roll * v, self.cv + v + self.roll * u

    def sunshine(self, x, z):
        """
        How much sun the ground at (x, z) gets, 0 to 1, or light of lamps at night. What stands
        there is lit alike.
        """
        if self.night:
            return float(self.lamplight(x, z))
        u, v = self.project(x, 0, max(z, NEAR))
        column = int(u)
        row = int(v)
        if not (0 <= column < self.w and 0 <= row < self.h):
            return self.sunny
        level = self.shadow.getpixel((column, row))
        return 1 - min(SHADED, level) / SHADED

    def lamplight(self, x, z):
        """
        Light of lamps and shop windows at points in metres, numbers or arrays: 0 to 1.25.

        On the ground below a small lamp at height `reach` light falls with (1 + d^2/reach^2)^-1.5.
        A camera compresses what is bright: several lamps together give less than their sum.
        """
        total = 0 * x
        for at_x, at_z, strength, reach in self.lights:
            apart = ((x - at_x) ** 2 + (z - at_z) ** 2) / reach ** 2
            total = total + strength * (1 + apart) ** -1.5
        return total / (1 + 0.8 * total)

    def field(self, slope):
        """A random piece of a noise tile, float32 (H, W) at the size of the picture."""
        w, h = self.size
        rows = (np.arange(h) + self.rng.integers(TILE)) % TILE
        columns = (np.arange(w) + self.rng.integers(TILE)) % TILE
        tiles, _ = _bank()
        return tiles[slope].take(rows, 0).take(columns, 1)

    def panels(self, face, rows, label, shape=_SQUARE):
        """Paints panels on a plane face, each in one colour, and labels the face.

        face: its corners (x, y, z) in metres, the first two along the foot.
        rows: (s0, s1, t0, t1, colour) of each panel, in fractions of the face: s along the foot, t
        upwards. The first panel holds the others. colour None: nothing but the label.
        shape: outline of every panel within its bounds, (2, corners).
        """
        if len(rows) == 1:  # of few numbers Python is faster than numpy
            corners = _panel_corners(face, rows[0][:4], shape)
            outline = [self.project(*corner) for corner in corners]
            self.label_pen.polygon(outline, label)
            self.image_pen.polygon(outline, rows[0][4])
            return
        a, b, c, d = np.array(face, float)
        bounds = np.array([row[:4] for row in rows])  # (R,4)
        s0, s1, t0, t1 = bounds.T[..., None, None]  # (R,4) -> four times (R,1,1)
        s = s0 + (s1 - s0) * shape[0][:, None]  # (R,corners,1)
        t = t0 + (t1 - t0) * shape[1][:, None]
        points = (1 - t) * ((1 - s) * a + s * b) + t * ((1 - s) * d + s * c)  # (R,corners,3)
        u, v = self.project(*points.transpose(2, 0, 1))  # each (R,corners)
        outlines = np.empty((len(rows), 2 * u.shape[1]))  # u, v, u, v ... of each panel
        outlines[:, ::2] = u
        outlines[:, 1::2] = v
        for i, outline in enumerate(outlines.tolist()):
            _, _, low, _, colour = rows[i]
            if i == 0 or low < 0:  # the others lie within the first, but tyres reach below
                self.label_pen.polygon(outline, label)
            if colour:
                self.image_pen.polygon(outline, colour)

    def strip(self, x0, x1, z0, z1, material):
        """Lays a piece of ground from x0 to x1 and z0 to z1. It follows the street's bend."""
        straight = z1 - z0 < 3  # metres
        z0 = max(z0, NEAR)
        z1 = max(z1, NEAR)
        if straight:
            corners = (x0, z0), (x0, z1), (x1, z1), (x1, z0)
            self.ground_pen.polygon([self.project(x, 0, z) for x, z in corners], material)
            return
        z = 10 ** np.linspace(math.log10(z0), math.log10(z1), 9)
        z[[0, -1]] = z0, z1
        x = np.repeat((x0, x1), len(z))
        z = np.concatenate([z, z[::-1]])  # there and back
        u, v = self.project(x, 0, z)
        self.ground_pen.polygon(np.stack([u, v], 1).ravel().tolist(), material)

    def cast_shadow(self, ends, height):
        """Darkens the ground behind upright walls over a chain of points (x, z); metres."""
        if not self.sunny:
            return
        tips = [(x + self.cast[0] * height, z + self.cast[1] * height) for x, z in ends]
        for corners in zip(ends, ends[1:], tips[1:], tips):
            self.shadow_pen.polygon([self.project(x, 0, max(z, NEAR)) for x, z in corners], SHADED)

    def queue(self, distance, function, *arguments):
        """Queues function(self, *arguments), to be called in turn from far to near; metres."""
        self.jobs.append((distance, function, arguments))

    def place(self, reach, function, x, z, *arguments):
        """Queues function(self, x, z, *arguments) and lays the shadow of what it draws.

        reach: it stands from z - reach to z + reach, in metres.
        """
        wide = min(0.9, reach)  # metres to either side: half a car
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]
        foot = [(x + wide * a, max(NEAR, z + reach * b)) for a, b in corners]
        self.cast_shadow(foot, 1.5)  # metres: height of a car, and enough of anything else
        self.shadow_pen.polygon([self.project(a, 0, b) for a, b in foot], COVERED)
        self.queue(z - 0.9 * reach, function, x, z, *arguments)


# -- houses and trees


def _panel_corners(face, bounds, shape):
    """Corners (x, y, z) in metres of one panel; see _Street.panels."""
    if shape is _SQUARE and bounds == _WHOLE:  # as of most
        return face
    s0, s1, t0, t1 = bounds
    corners = []
    for across, up in shape.T.tolist():
        s = s0 + (s1 - s0) * across
        t = t0 + (t1 - t0) * up
        corner = []
        for a, b, c, d in zip(*face):  # x, y, z
            corner.append((1 - t) * ((1 - s) * a + s * b) + t * ((1 - s) * d + s * c))
        corners.append(corner)
    return corners


def _windows(street, bays, floors, shop, z, frame, sign, glass):
    """Rows for _Street.panels: the windows of a front, and shop windows below them if `shop`.

    bays, floors: columns and rows of windows. z: distance in metres, which decides about details.
    frame, sign: colours. glass: five colours.
    """
    rng = street.rng
    # Within the loops across is in bays and up in floors; rows are in fractions of the front.
    wide = rng.uniform(0.3, 0.75)  # width of a window, in bays
    high = rng.uniform(0.6, 0.9)  # upper edge of a window, in floors
    rows = []
    for bay in range(bays):
        for floor in range(floors):
            left = bay + 0.5 - wide / 2
            right = bay + 0.5 + wide / 2
            low = floor + 0.25
            top = floor + high
            if shop and floor == 0:
                left = bay + 0.06
                right = bay + 0.94
                low = 0.15 * (bay % 3)  # every third one is a door
                top = 0.7
                rows.append((bay / bays, (bay + 1) / bays, 0, 1 / floors, sign))

            pane = glass[rng.integers(5)]
            middle = (left + right) / 2
            curtain_top = low + (top - low) * rng.random()
            curtain = glass[rng.integers(5)]
            spans = [(left, right, low, top, pane)]
            if z < 50:  # metres: frames are seen
                spans.insert(0, (left - 0.05, right + 0.05, low - 0.04, top + 0.04, frame))
            if z < 30:  # metres: curtains are seen
                spans.append((left, middle, low, curtain_top, curtain))
            for a, b, c, d, colour in spans:
                rows.append((a / bays, b / bays, c / floors, d / floors, colour))
    return rows


def _draw_house(street, side, x, z0, z1, height, floors, roof, shop):
    """Draws the roof, the end that faces the camera, and the front with its windows.

    side: the front is at x, the rest beyond. z0, z1: where it begins and ends. height: of the
    front. roof: how far it rises above the front, 0 if flat. All in metres. floors: how many.
    shop: whether the lowest has shop windows.
    """
    rng = street.rng
    ridge = x + side * 4  # metres: half of the house's depth
    back = x + side * 8
    top = height + roof

    wall_colour = street.pick("wall", spread=12)
    front_lit = street.sunny * (side * street.cast[0] > 0) * rng.uniform(0.6, 1)
    end_lit = street.sunny * (street.cast[1] > 0)
    if street.night:
        front_lit = street.sunshine(x, (z0 + z1) / 2)
        end_lit = street.sunshine(ridge, z0)
    wall = street.tone(wall_colour, front_lit, z0)
    gable = street.tone(wall_colour * 0.85, end_lit, z0)
    slope = street.tone(street.pick("roof"), max(front_lit, end_lit), z0)
    frame = street.tone(street.pick("frame"), front_lit, z0)
    sign = street.tone(street.pick("sign", spread=25), front_lit, z0)
    glass = []
    for _ in range(5):
        pane = street.tone(street.pick("glass") * rng.uniform(0.7, 1.5), front_lit, z0)
        if street.night and rng.random() < street.window_share:
            pane = street.shine(street.pick("window") * rng.uniform(0.3, 1), z0)
        glass.append(pane)

    pitch = [(x, height, z0), (x, height, z1), (ridge, top, z1), (ridge, top, z0)]
    street.panels(pitch, [(*_WHOLE, slope)], BUILDING)

    end = [(x, 0, z0), (back, 0, z0), (back, top, z0), (x, top, z0)]
    chimney = 1 + (roof > 0) / height  # a little over a metre above the ridge
    street.panels(end, [(0.4, 0.6, 0.8, chimney, gable)], BUILDING)
    eaves = height / top
    outline = np.array([(0, 0), (1, 0), (1, eaves), (0.5, 1), (0, eaves)]).T
    street.panels(end, [(*_WHOLE, gable)], BUILDING, outline)

    front = [(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)]
    bays = max(1, int((z1 - z0) / rng.uniform(1.5, 3.4)))  # metres a bay
    windows = _windows(street, bays, floors, shop, z0, frame, sign, glass)
    street.panels(front, [(*_WHOLE, wall), *windows], BUILDING)


def _draw_foliage(street, x, z, width, low, high, leaf, bare=False):
    """Draws a crown or a bush of some width between two heights, in metres.

    leaf: its reflectance. bare: branches without leaves.
    """
    u0, v0 = street.project(x - width / 2, high, z)
    u1, v1 = street.project(x + width / 2, low, z)
    left = max(0, round(u0))
    right = min(street.w, round(u1))
    top = max(0, round(v0))
    bottom = min(street.h, round(v1))
    if right <= left or bottom <= top:
        return

    def within(pixel, start, stop):
        """Place of a canvas pixel in the picture of the crown, 0..CROWN."""
        return min(CROWN, max(0, CROWN * (pixel - start) / (stop - start)))

    # Only the part within the canvas is enlarged.
    size = (right - left, bottom - top)
    box = (within(left, u0, u1), within(top, v0, v1), within(right, u0, u1), within(bottom, v0, v1))
    _, crowns = _bank()
    crown = crowns[bare][street.rng.integers(CROWNS)]
    tone, alpha = crown.resize(size, Image.BILINEAR, box).split()

    colour = leaf * 2  # makes up for the mean of `tone`, about half of white
    if bare:
        colour = leaf * 0.5 + 18
    lit = street.sunny
    if street.night:
        lit = street.sunshine(x, z)
    # A palette gives each grey its shade of the colour.
    shades = _GREYS * np.array(street.tone(colour, lit, z), np.uint16) // 255  # (256,3)
    tone.putpalette(shades.astype(np.uint8).tobytes())
    street.image.paste(tone.convert("RGB"), (left, top), alpha)
    if bare:
        alpha = alpha.point(_BRANCHES)
    mask = alpha.convert("1", dither=Image.Dither.NONE)  # of more than 127
    street.label.paste(VEGETATION, (left, top), mask)


def _draw_tree(street, x, z, height, leaf, bare):
    """Draws a trunk up to half the height (metres), and one bare crown or three leafy ones."""
    trunk = [(-0.03, 0), (0.03, 0), (0.02, 0.5), (-0.02, 0.5)]  # x, y of its corners, in heights
    face = [(x + height * a, height * b, z) for a, b in trunk]
    bark = np.array((78, 68, 56))
    lit = street.sunshine(x, z) * 0.5  # it stands in the shade of its crown
    street.panels(face, [(*_WHOLE, street.tone(bark, lit, z))], VEGETATION)

    # x, foot and size of the crowns, in heights
    crowns = [(-0.15, 0.3, 0.55), (0.16, 0.32, 0.5), (0, 0.42, 0.58)]
    if bare:
        crowns = [(0, 0.2, 0.8)]
    for dx, foot, size in crowns:
        width = size * height * 0.9
        low = foot * height
        high = (foot + size) * height
        _draw_foliage(street, x + dx * height, z, width, low, high, leaf, bare)


# -- figures and vehicles


def _draw_figure(street, x, z, names):
    """Draws _FIGURES over one another, flat and turned alike. names: theirs, between spaces."""
    rng = street.rng
    lit = street.sunshine(x, z - 0.5)  # metres: before its own shadow
    scale = rng.uniform(0.0092, 0.0106)  # metres for a centimetre: figures differ in height
    riding = "bent" in names

    # x shrinks as the figure turns away, and changes sign as it faces the other way.
    least = 0.25 if riding else 0.6  # a rider may be seen almost from behind
    shrink = rng.uniform(least, 1)
    facing = -x if names.startswith("lamp") else rng.normal()  # a lamp reaches over the street
    turn = math.copysign(shrink, facing)

    for name in names.split():
        label, *strokes = _FIGURES[name]
        if riding and label == PERSON:
            label = RIDER
        tones = {}
        for palette, thickness, *points in strokes:
            if palette not in tones and street.night and palette in _SHINING:
                tones[palette] = street.shine(street.pick(palette), z)
            elif palette not in tones:
                tones[palette] = street.tone(street.pick(palette), lit, z)
            corners = [street.project(x + turn * scale * a, scale * b, z) for a, b in points]
            radius = max(1, street.focal * thickness * scale / z / 2)  # canvas pixels
            _draw_stroke(street, corners, radius, abs(turn), tones[palette], label)


def _draw_stroke(street, corners, radius, turn, colour, label):
    """Draws a line through canvas points or, at a single one, a disc.

    radius: half the line's width, in canvas pixels. turn: width of a disc in heights.
    """
    if len(corners) > 1:
        street.image_pen.line(corners, colour, round(2 * radius), "curve")
        street.label_pen.line(corners, label, round(2 * radius), "curve")
        return
    u, v = corners[0]
    wide = radius * turn
    box = (u - wide, v - radius, u + wide, v + radius)
    rim = round(radius / 5 + 1)
    inside = None if label == BICYCLE else colour  # one sees through its wheels
    street.image_pen.ellipse(box, inside, colour, rim)
    street.label_pen.ellipse(box, label, label, rim)


def _vehicle_colours(street, rear, lit, z, parked):
    """Colours of a vehicle's parts at z metres, by name. rear: whether its tail lights are seen."""
    paint = street.pick("paint", spread=14)
    pane = street.pick("glass") * 0.4 + 12
    lamp = street.pick("tail_light" if rear else "head_light")
    parts = dict(
        body=paint * 0.8,
        top=paint * 1.15,  # brighter than the body: it faces the sky
        trim=paint * 0.3 + 14,
        window=pane,
        sky=pane * 1.7 + 20,  # mirrored in the upper part of a windscreen
        lamp=lamp * (2 - lit),  # it shines: twice as bright in the shade
        black=street.pick("black"),
        plate=street.pick("plate"),
    )
    tones = {name: street.tone(colour, lit, z) for name, colour in parts.items()}
    if street.night and not parked:
        tones["lamp"] = street.shine(lamp, z)
    return tones


def _draw_vehicle(street, x, z, kind, ahead):
    """Draws a body and a cabin, of which top, one flank and one end are seen, and two wheels.

    x, z: its middle, in metres. kind: a key of _VEHICLES. ahead: 1 if it goes our way, else -1.
    """
    label, length, width, belt, height, at_belt, at_roof, roof, windows = _VEHICLES[kind]
    flank = np.sign(street.eye - x)  # the side that is seen
    rear = ahead > 0  # the end that is seen
    lit = street.sunshine(x, z - length / 2 - 0.5)  # metres: before its own shadow

    colours = _vehicle_colours(street, rear, lit, z, parked=abs(x) > street.half)

    def face(corners, rows, shape=_SQUARE):
        """Paints a face; corners: half widths across, height in metres, lengths from the rear."""
        points = []
        for across, y, along in corners:
            points.append((x + across * width / 2, y, z + ahead * (along - 0.5) * length))
        street.panels(points, rows, label, shape)

    def block(y0, y1, foot, head, narrow, on_side, on_end):
        """Paints top, flank and end of a box from height y0 to y1.

        foot, head: its rear and front at y0 and at y1. narrow: half width at y1.
        on_side, on_end: rows for the panels on flank and end.
        """
        r0, f0 = foot
        r1, f1 = head
        b = flank * narrow
        above = [(-narrow, y1, r1), (narrow, y1, r1), (narrow, y1, f1), (-narrow, y1, f1)]
        face(above, [(*_WHOLE, colours["top"])])
        side = [(flank, y0, r0), (flank, y0, f0), (b, y1, f1), (b, y1, r1)]
        face(side, [(*_WHOLE, colours["body"]), *on_side])
        e0, e1 = (r0, r1) if rear else (f0, f1)
        end = [(-1, y0, e0), (1, y0, e0), (narrow, y1, e1), (-narrow, y1, e1)]
        face(end, [(*_WHOLE, colours["body"]), *on_end])

    on_end = [
        (0.04, 0.18, -0.3, 0.1, colours["black"]),  # two tyres
        (0.82, 0.96, -0.3, 0.1, colours["black"]),
        (0.01, 0.99, 0, 0.3, colours["trim"]),  # bumper
        (0.38, 0.62, 0.35, 0.6, colours["plate"]),
        (0.03, 0.18, 0.5, 0.8, colours["lamp"]),
        (0.82, 0.97, 0.5, 0.8, colours["lamp"]),
    ]
    floor = 0.22 * belt  # metres
    block(floor, belt, (0, 1), (0, 1), 1, [], on_end)

    glass = colours["window"]
    on_side = []
    for k in range(windows):
        on_side.append(((k + 0.12) / windows, (k + 0.92) / windows, 0.08, 0.86, glass))
    on_end = [(0.08, 0.92, 0.1, 0.88, glass), (0.08, 0.92, 0.55, 0.88, colours["sky"])]
    if rear and not windows:  # the load of a truck
        on_end = []
    block(belt, height, at_belt, at_roof, roof, on_side, on_end)

    radius = 0.33 if label == CAR else 0.5  # metres
    for axle in (0.2, 0.8):  # lengths from the rear
        a = axle - radius / length
        b = axle + radius / length
        wheel = [(flank, 0, a), (flank, 0, b), (flank, 2 * radius, b), (flank, 2 * radius, a)]
        hub = (0.25, 0.75, 0.25, 0.75, colours["top"])
        face(wheel, [(*_WHOLE, colours["black"]), hub], _WHEEL)


# -- the layout: what lies and stands where


def _lay_out(street):
    """Lays the ground and its shadows, and queues what stands on it."""
    street.strip(-500, 500, NEAR, 3000, street.beyond)  # metres: as far as one sees
    if street.night:  # a lamp beside or behind the camera
        x, z = street.rng.uniform((-street.half, -15), (street.half, 6))
        street.lights.append((x, z, 1, 7))
    for side in (-1, 1):
        _lay_side(street, side)
    _close_street(street)
    street.strip(-200, 200, *street.crossing, ROAD)
    _mark_road(street)


def _lay_side(street, side):
    """Lays one side of the street, from its middle to the plots, and queues what stands there."""
    rng = street.rng
    parking_chance = 0.3
    chances = (parking_chance, street.avenue_chance, street.verge_chance)
    parked, avenue, verge = rng.random(3) < chances

    # Metres from the middle: the lane of parked cars, the verge, the pavement end there.
    kerb = street.half + 2.1 * parked
    grass = kerb + verge * rng.uniform(0.8, 3)
    line = grass + rng.uniform(2, 6)
    # Each strip covers the inner part of the one before. The kerb is 16 cm wide.
    street.strip(0, side * line, NEAR, 2 * FAR, SIDEWALK)
    street.strip(0, side * grass, NEAR, 2 * FAR, TERRAIN)
    street.strip(0, side * (kerb + 0.16), NEAR, 2 * FAR, KERB)
    street.strip(0, side * kerb, NEAR, 2 * FAR, ROAD)

    _line_up(street, side, line)
    _queue_vehicles(street, side, street.half / 2, 30, _TRAFFIC)  # metres between two
    if parked:
        _queue_vehicles(street, side, kerb - 1.05, 1.2, _PARKED)  # in the middle of its lane
    for names, count, ahead, across in _FURNITURE:
        for z in rng.uniform(*ahead, rng.poisson(count)):
            x = side * np.interp(rng.uniform(*across), (0, 1, 2), (0, kerb, line))
            figure = names
            if names == "lamp" and street.night:
                figure = "lamp bulb"
                street.lights.append((x - side * 1.6, z, 1, 7))  # the arm's end, 7 m up
            street.place(FOOT, _draw_figure, x, z, figure)
    if avenue:
        x = side * (kerb + 0.9)  # metres behind the kerb
        bare = street.bare_share > 0.55  # avenue trees are alike
        first = rng.uniform(7, 20)
        distance = rng.uniform(8, 16)  # metres from tree to tree
        for z in np.arange(first, 80, distance).tolist():
            street.place(FOOT, _draw_tree, x, z, rng.uniform(5, 12), street.leaf, bare)


def _queue_vehicles(street, side, lane, gap, kinds):
    """Queues a row of vehicles, up to 70 m away.

    lane: metres from the middle of the street. gap: mean of the metres between two, beyond one.
    kinds: keys of _VEHICLES to choose from.
    """
    rng = street.rng
    z = 5 + rng.exponential(gap)  # none stands right before the camera
    while z < 70:
        kind = kinds[rng.integers(len(kinds))]
        reach = _VEHICLES[kind][1] / 2  # half its length
        ahead = side * street.hand
        street.place(reach, _draw_vehicle, side * lane, z + reach, kind, ahead)
        if street.night and ahead < 0 and lane < street.half:
            street.lights.append((side * lane, z - 4, 0.5, 3))  # before its headlights
        z += 2 * reach + 1 + rng.exponential(gap)


def _line_up(street, side, line):
    """Queues what stands on one side beyond the pavement: plot after plot up to FAR."""
    rng = street.rng
    near, far = street.crossing
    flat, shops = rng.random(2) < 0.5
    storeys = rng.integers(2, 6)  # of a typical house
    x = side * line
    z = 2.5  # metres: begin of the plot
    while z < FAR:
        if near - 5 < z < far + 2:  # metres: the crossing stays free
            z = far + 2
        limit = near - 2 if z < near else FAR + 9
        end = min(z + rng.uniform(6, 18), limit)

        # Houses stand at the pavement, or behind some of the walls and fences.
        kind = _PLOTS[rng.choice(len(_PLOTS), p=street.plot_shares)]
        built = kind == "house"
        if kind in _BARRIERS:
            _queue_barrier(street, kind, x, z, end)
            built = rng.random() < 0.55
        if built:
            setback = rng.uniform(3, 8)  # metres behind the wall or fence
            front = x + side * setback * (kind != "house")
            _queue_house(street, side, front, z, end, storeys, flat, shops and kind == "house")
        else:
            _queue_garden(street, side, x, z, end)
        if kind == "hedge":
            for at in np.arange(z, end, 1.7).tolist():  # metres from bush to bush
                # 0.7 m behind the line, 3 m wide, from -0.3 m up: the rim of a crown is ragged
                bush = (x + side * 0.7, at, 3, -0.3, rng.uniform(1, 1.6), street.leaf)
                street.queue(at + 0.03, _draw_foliage, *bush)

        gap = rng.uniform(2, 8)
        z = end + gap * (rng.random() < 0.2)  # behind every fifth plot


# Of a plot the trees are painted first, then the house, then what stands before it: that is why the
# distances below differ by centimetres.


def _queue_barrier(street, kind, x, z, end):
    """Queues a wall or fence along the street from z to end."""
    label, palette = _BARRIERS[kind]
    height = street.rng.uniform(1, 2.6)
    lit = street.sunny * 0.7  # whichever way it faces
    if street.night:
        lit = 0.25  # as if between two lamps, which are not placed yet
    colour = street.tone(street.pick(palette), lit, z)
    rows = [(*_WHOLE, colour)]
    if kind == "fence":  # what is seen between its bars counts as fence too
        length = end - z
        rows = [(*_WHOLE, None), (0, 1, 0.9, 1, colour)]  # a rail on top
        for start in np.arange(0, 1, 0.4 / length).tolist():  # a bar of 5 cm every 40 cm
            rows.append((start, start + 0.05 / length, 0, 1, colour))
    face = [(x, 0, z), (x, 0, end), (x, height, end), (x, height, z)]
    street.queue(end + 0.02, _Street.panels, face, rows, label)


def _queue_house(street, side, x, z, end, storeys, flat, shop):
    """Queues a house of about `storeys` from z to end, its front at x, and lays its shadow."""
    rng = street.rng
    floors = max(1, storeys + rng.integers(-1, 2))
    roof = (not flat) * rng.uniform(2, 4)
    height = floors * rng.uniform(2.8, 3.6)  # metres a floor
    street.queue(end + 0.05, _draw_house, side, x, z, end, height, floors, roof, shop)
    street.cast_shadow([(x, z), (x, end)], height)
    if street.night and shop:
        street.lights.append((x - side * 2, (z + end) / 2, 0.4, 4))  # before its windows


def _queue_garden(street, side, x, z, end):
    """Lays grass beyond x from z to end, and queues two to four trees on it."""
    rng = street.rng
    street.strip(x, side * 60, z, end, TERRAIN)
    count = rng.integers(2, 5)
    places = rng.uniform((1, z), (12, end), (count, 2))  # metres beyond x, metres ahead
    for out, at in places.tolist():
        height = rng.uniform(6, 16)
        leaf = street.pick("leaf", spread=8)
        bare = rng.random() < street.bare_share
        street.queue(end + 0.1, _draw_tree, x + side * out, at, height, leaf, bare)


def _close_street(street):
    """Queues bushes 22 m wide across the end of the street, with houses before them."""
    rng = street.rng
    house_share = street.plot_shares[_PLOTS.index("house")]
    for x in np.arange(-90, 90, 9).tolist():
        height = rng.uniform(5, 15)
        bare = rng.random() < street.bare_share
        bush = (x, FAR + 19, 22, -1, height, street.leaf, bare)
        street.queue(FAR + 20, _draw_foliage, *bush)
        if rng.random() < house_share:
            height = rng.uniform(5, 16)
            house = (1, x, FAR + 12, FAR + 19, height, 4, 3, False)  # 4 floors, 3 m of roof
            street.queue(FAR + 19, _draw_house, *house)


def _mark_road(street):
    """Lays the paint: stop line, edge lines, middle line, zebra crossing."""
    rng = street.rng
    half = street.half
    near, _ = street.crossing
    dash = rng.choice([0, 2, 2, 99])  # metres: no middle line, dashes, unbroken
    edge = half - rng.choice([0.2, 0.5, 99])  # metres from the middle; 99: out of sight
    # All in metres; stop line and zebra lie before the crossing.
    street.strip(0, street.hand * half, near - 1.2, near - 0.9, PAINT)
    for x in (-edge, edge):  # lines 12 cm wide
        street.strip(x - 0.06, x + 0.06, NEAR, near, PAINT)
    first = rng.uniform(1, 6)
    distance = rng.uniform(4, 9)
    for z in np.arange(first, min(near, 70), distance):  # dashes 14 cm wide
        street.strip(-0.07, 0.07, z, z + dash, PAINT)
    if rng.random() < 0.5:
        for x in np.arange(0.4 - half, half - 0.4, 1.1):  # a bar of 55 cm every 1.1 m
            street.strip(x, x + 0.55, near - 4.6, near - 1.8, PAINT)


# -- painting
#
# A picture is computed as three planes (H, W), red, green and blue: numpy is slow at a last axis
# of 3.


def _bands(planes):
    """The three planes, float32 (H, W), as grey PIL pictures, cut off at 0 and 255."""
    return [Image.fromarray(plane.clip(0, 255).astype(np.uint8)) for plane in planes]


def _picture(planes):
    """PIL picture of three planes, float32 (H, W), cut off at 0 and 255."""
    return Image.merge("RGB", _bands(planes))


def _planes(picture):
    """Three planes, float32 (H, W), of a PIL picture."""
    return [np.asarray(band, np.float32) for band in picture.split()]


def _grey(planes):
    """The mean of three planes, float32 (H, W)."""
    red, green, blue = planes
    return (red + green + blue) / 3


def _paint_sky(street):
    """Paints the sky: the horizon's colour to the zenith's, with clouds.

    The ground will hide it below the last row in which nothing is laid.
    """
    rng = street.rng
    free = (np.asarray(street.ground) == SKY).any(1)  # (rows of the canvas,)
    last = max(_ground_top(street), int(free.nonzero()[0].max(initial=0)))
    h = min(street.size[1], last // SUPERSAMPLING + 4)  # enlarging mixes rows up to 2 apart
    height = 1 - np.arange(h) * SUPERSAMPLING / street.cv  # 1 in the top row, 0 at the horizon
    height = np.clip(height, 0, 1)[:, None]  # (H,) -> (H,1)
    steepness = rng.uniform(0.5, 1.2)
    zenith = street.pick("zenith")
    sky = np.float32(street.haze + height ** steepness * (zenith - street.haze))  # (H,3)

    # Noise above a random level is cloud; its contrast and greatest opacity are random too.
    cover = street.field(1.7)[:h] + rng.uniform(-1.6, 1.2)  # (H,W)
    cover = (cover * rng.uniform(0.2, 1.2)).clip(0, rng.uniform(0.3, 1))
    cloud = np.float32(street.pick("cloud"))
    planes = []
    for c in range(3):
        clear = sky[:, c, None]  # (H,1)
        planes.append(clear + cover * (cloud[c] - clear))  # (H,W)
    street.image.paste(_picture(planes).resize((street.w, h * SUPERSAMPLING)))


def _paint_ground(street):
    """Paints the ground onto image and label, wherever a material has been laid."""
    base = _ground_colours(street)
    top = _ground_top(street)
    rows, x, z = _ground_points(street, top)
    texture = _ground_texture(street.rng, x, z)
    lights = _ground_light(street, top)
    if street.night:
        lights = [light * more for light, more in zip(lights, _night_light(street, x, z))]

    # Wet ground mirrors the sky, the more the nearer it is to the horizon.
    wet = float(street.rng.choice([0, 0, 0.35])) * np.exp(-rows / (0.12 * street.h))
    clear = np.exp(-z / street.visibility) * (1 - wet)  # (R,W)
    haze = np.float32(street.haze)
    material = np.asarray(street.ground)[top:].astype(np.intp)
    planes = []
    for c in range(3):
        seen = base[c].take(material) * texture * lights[c]
        planes.append(haze[c] + clear * (seen - haze[c]))

    laid = [255 * (m != SKY) for m in range(256)]
    mask = street.ground.crop((0, top, street.w, street.h)).point(laid)
    street.image.paste(_picture(planes), (0, top), mask)

    labels = list(range(256))
    labels[KERB] = SIDEWALK
    labels[PAINT] = ROAD
    street.label.paste(street.ground.point(labels))


def _ground_top(street):
    """Canvas row 6 pixels above the tilted horizon: the ground is painted from there on."""
    return max(0, int(street.cv - 6 - abs(street.roll) * street.cu))


def _ground_colours(street):
    """Reflectance of each material, a row a colour, float32 (3, 21)."""
    base = np.zeros((PAINT + 1, 3), np.float32)
    base[ROAD] = street.pick("road")
    base[SIDEWALK] = street.pick("sidewalk")
    base[TERRAIN] = street.pick("terrain")
    base[KERB] = base[SIDEWALK] * street.rng.uniform(0.7, 1.25)
    base[PAINT] = street.pick("marking")
    return np.ascontiguousarray(base.T)


def _ground_points(street, top):
    """Points of the ground that the canvas pixels from row `top` on show: undoes _Street.project.

    Returns rows (R, 1) in pixels below the horizon, and x and z (R, W) in metres, float32.
    """
    columns = np.arange(street.w, dtype=np.float32) - street.cu
    rows = np.arange(top, street.h, dtype=np.float32)[:, None] - street.cv
    below = np.maximum(rows - street.roll * columns, 1)  # at least a pixel: z stays finite
    z = street.focal * street.height / below
    across = (columns + street.roll * rows) / street.focal
    x = z * (across + street.heading) + street.eye - street.bend * z * z
    return rows, x, z


def _ground_texture(rng, x, z):
    """Factor on the ground's colour at points x, z in metres: float32 (R, W) around 1."""
    tiles, _ = _bank()
    grain = (0.3, 32, 32, True)  # slope of the noise, cells a metre along x and z, whether it fades
    tracks = (1.1, 9, 0.9, False)
    stains = (1.1, 3, 3, False)
    texture = 1
    for slope, per_x, per_z, fades in (grain, tracks, stains):
        row = (z * per_z).astype(np.int32) & (TILE - 1)  # the tile repeats
        column = (x * per_x).astype(np.int32) & (TILE - 1)
        noise = rng.uniform(0.01, 0.09) * tiles[slope].take(row * TILE + column)
        if fades:
            noise = noise / (1 + z / 25)  # half as strong at 25 m: cells get smaller than pixels
        texture = texture + noise
    return texture


def _ground_light(street, top):
    """
    Light on the ground from canvas row `top` on: for each colour float32 (R, W). Shadows have soft
    edges.
    """
    level = np.arange(256)[:, None]  # (256,1), of the shadow canvas
    light = street.sun + np.minimum(level / SHADED, 1) * (street.shade - street.sun)  # (256,3)
    light *= 1 - np.maximum(level - SHADED, 0) / 75  # 0.27 of it is left at COVERED
    above = max(0, top - 2)  # a blur of 1.5 reaches two pixels farther
    shadow = street.shadow.crop((0, above, street.w, street.h)).filter(ImageFilter.BoxBlur(1.5))
    shadow = np.asarray(shadow)[top - above:].astype(np.intp)
    return [column.take(shadow) for column in np.float32(light).T]


def _night_light(street, x, z):
    """
    Factor on the ground's light at points x, z in metres, of lamps and headlights: for each colour
    float32 (R, W).
    """
    fine = x.shape[::-1]
    x = x[::4, ::4]  # (R,W) -> (r,w): such light changes slowly
    z = z[::4, ::4]
    lamps = street.lamplight(x, z)
    across = (x - street.eye) / (1.5 + 0.15 * z)  # in widths of the beam
    beam = 1.4 * street.beam * np.exp(-z / BEAM_REACH - across ** 2)
    beam = beam * (1 - np.exp(-(z / 6) ** 2))  # it passes over what lies right before the car
    factors = []
    for lamp, shade in zip(street.lamp, street.shade):
        factor = 1 + (lamp * lamps + beam) / shade  # (r,w)
        factor = Image.fromarray(np.float32(factor)).resize(fine, Image.BILINEAR)
        factors.append(np.asarray(factor))
    return factors


def _paint_queue(street):
    """Paints what stands upright, from far to near; of the same distance what was queued first."""
    for _, function, arguments in sorted(street.jobs, key=lambda job: -job[0]):
        function(street, *arguments)


def _by_lamplight(street, planes, glows):
    """The planes of a picture in the colour of its lamps, with their glow and a veil."""
    tint = np.float32(street.lamp / street.lamp.mean())
    grey = _grey(planes)
    veil = np.float32(street.rng.uniform(*street.style["veil"]))
    lit = []
    for plane, colour, glow in zip(planes, tint, glows):
        plane = plane + street.style["one_colour"] * (grey * colour - plane)
        lit.append(plane + colour * (glow + veil))
    return lit


def _shine_around(street, seen, label):
    """Glow around what shines and its reflections on a wet road: three planes, float32 (H, W).

    seen: the picture, PIL. label: uint8 (H, W).
    """
    w, h = seen.size
    bright = seen.point([max(0, level - 130) * 2 for level in range(256)] * 3)  # 0..250
    small = bright.resize((math.ceil(w / 4), math.ceil(h / 4)), Image.BOX)
    wide = small.filter(ImageFilter.GaussianBlur(3)).resize((w, h), Image.BILINEAR)
    near = bright.filter(ImageFilter.GaussianBlur(2))
    strength = street.rng.uniform(0.5, 1.3)

    # A wet road mirrors what is above the horizon, drawn out downwards.
    horizon = int(street.cv / SUPERSAMPLING)
    mirror = np.clip(2 * horizon - np.arange(h), 0, h - 1)  # the row that each row shows
    mirrored = Image.fromarray(np.asarray(bright)[mirror])
    streaks = mirrored.resize((w, math.ceil(h / 16)), Image.BOX).resize((w, h), Image.BILINEAR)
    mirrors = street.wetness * (label == ROAD)  # (H,W)
    glows = []
    for ball, halo, streak in zip(_planes(near), _planes(wide), _planes(streaks)):
        glow = strength * (ball + np.minimum(5 * halo, 90))
        glows.append(glow + mirrors * streak)
    return glows


@functools.lru_cache(maxsize=1)
def _squared_radius(w, h):
    """Squared distance from the middle of a picture, float64 (H, W); 1 at the middle of a side."""
    x, y = np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h))
    return np.hypot(x, y) ** 2


def _photograph(street):
    """What a camera makes of the canvases: image uint8 (H, W, 3), label uint8 (H, W)."""
    rng = street.rng
    label = np.array(street.label)[1::SUPERSAMPLING, 1::SUPERSAMPLING]  # ids cannot be averaged

    # Surfaces are not smooth: grain, strongest on grass and leaves.
    strength = np.full(19, 0.05, np.float32)
    strength[[BUILDING, WALL, VEGETATION, TERRAIN, SKY]] = 0.1, 0.1, 0.14, 0.18, 0
    seen = street.image.reduce(SUPERSAMPLING)
    grain = 1 + strength[label] * street.field(0.7)  # (H,W)
    planes = [plane * grain for plane in _planes(seen)]
    if street.night:
        planes = _by_lamplight(street, planes, _shine_around(street, seen, label))

    # The lens: exposure, white balance, corners up to half as bright (radius is 2 ** 0.5 there).
    exposure = math.exp(rng.normal(*street.style["log_gain"]))
    gain = exposure * (1 + rng.normal(0, street.style["white_balance"], 3))
    falloff = np.float32(1 - rng.uniform(0, 0.25) * _squared_radius(*street.size))
    planes = [plane * (np.float32(g) * falloff) for plane, g in zip(planes, gain)]

    # The sensor: saturation and white noise.
    grey = _grey(planes)
    saturation = rng.uniform(0.55, 1.15)
    noise = rng.uniform(*street.style["noise"])
    noise = noise * street.field(0)
    planes = [grey + (plane - grey) * saturation + noise for plane in planes]

    # The file: a gamma curve with raised black, blur, JPEG.
    gamma = rng.uniform(0.85, 1.35)
    curve = 255 * (np.arange(256) / 255) ** gamma + rng.uniform(0, 12)
    curve = curve.clip(0, 255).astype(int).tolist()
    blur = ImageFilter.GaussianBlur(rng.uniform(*street.style["blur"]))
    photo = Image.merge("RGB", [band.point(curve).filter(blur) for band in _bands(planes)])
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=int(rng.integers(55, 96)))
    return np.array(Image.open(file)), label


def render_street(seed, index, style=0, size=(256, 192)):
    """One picture of a street and its labels, a function of the arguments only.

    Returns image uint8 (H, W, 3) RGB and label uint8 (H, W) with Cityscapes train ids 0..18.
    seed, index: ints >= 0 that name the picture. size: (W, H) in pixels.
    style: position in _STYLES. 0: by day; 1, shifted: the same world with other materials, season,
    light and camera; 2, night: the first world after dusk. Layouts are distributed alike, but no
    scene is there in two styles.
    """
    style = int(style)
    rng = np.random.default_rng([seed, index, style])
    street = _Street(rng, _STYLES[style], size)
    _lay_out(street)
    _paint_sky(street)
    _paint_ground(street)
    _paint_queue(street)
    return _photograph(street)


if __name__ == "__main__":
    main()
