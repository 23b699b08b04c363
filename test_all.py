"""The tests: python -m pytest -q test_all.py. On a CPU, without network, in a few minutes.

    python test_all.py bench        times ours against named peers, where they are installed
    python test_all.py record       compares six steps of every recipe with assets/record.json, bit for bit

Comparisons with code that is not ours (transformers, scikit-learn) skip, and say so, where it is not installed.
"""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels.py is imported: its Triton path runs on a CPU

import argparse
import colorsys
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

import data
import eval as evaluation
import kernels
import losses
import model
import train
from data import CLASS_SPACES, DataError
from model import (CheckpointError, MixTransformer, Output, Segmenter, TextBank, TextError, WeightsError, load_backbone,
                   load_checkpoint, save_checkpoint, text_bank)

HERE = str(Path(__file__).resolve().parent)


# ---------------------------------------------------------------- data.py: helpers


def put(path, array, mode=None):
    """Saves an array as an image (mode "P": as palette indices in Cityscapes colours)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image.putpalette([c for colour in data.COLOURS for c in colour])
    image.save(path)
    return path


def make_folder(root, count=6, size=(24, 18), classes=3, seed=0):
    """IMAGES and LABELS folders with random pictures; the labels are blocks of ids below `classes` and some 255."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        put(root / "images" / f"p{i:02d}.png", rng.integers(0, 256, (size[1], size[0], 3)))
        label = rng.choice([*range(classes), 255], (-(-size[1] // 3), -(-size[0] // 3))).repeat(3, 0).repeat(3, 1)
        put(root / "labels" / f"p{i:02d}.png", label[:size[1], :size[0]])
    return f"folder:{root / 'images'}:{root / 'labels'}"


def png16(path, pixels, filters):
    """Writes a 16-bit PNG byte by byte, row y with filter filters[y % len]. pixels uint16 (H,W,C)."""
    height, width, channels = pixels.shape
    step, rows, above = 2 * channels, b"", bytes(2 * channels * width)
    for y in range(height):
        row, kind, out = pixels[y].astype(">u2").tobytes(), filters[y % len(filters)], bytearray()
        for i, value in enumerate(row):
            a, b, c = row[i - step] if i >= step else 0, above[i], above[i - step] if i >= step else 0
            paeth = min((a, b, c), key=lambda v: abs(a + b - c - v))       # min keeps the first of equals: a, b, c
            out.append((value - (0, a, b, (a + b) // 2, paeth)[kind]) % 256)
        rows, above = rows + bytes([kind]) + bytes(out), row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)[:20]), (b"IDAT", zlib.compress(rows)[20:]), (b"IEND", b"")]
    return write_chunks(path, chunks)


def write_chunks(path, chunks):
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [(struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(kind + body)))
             for kind, body in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(map(b"".join, words)))
    return path


def refused(call, *words):
    """The call raises DataError with one line that holds all the words."""
    with pytest.raises(data.DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def same(a, b):
    equal = (torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a)
    return len(a) == len(b) and all(equal)


# ---------------------------------------------------------------- data.py: labels


def test_label_tables():
    n = data.CLASS_SPACES["cityscapes19"]
    ignore = 255
    published = [ignore] * 7 + [0, 1, ignore, ignore, 2, 3, 4, ignore, ignore, ignore, 5, ignore, *range(6, 16), ignore,
                                ignore, 16, 17, 18]
    table = data.label_table(data.LABEL_IDS, n)
    assert table[:34].tolist() == published and (table[34:255] == data.UNKNOWN).all() and table[255] == 255
    gta = data.label_table(data.GTA_IDS, n)
    assert gta[:34].tolist() == published and gta[34] == 255 and gta[35] == data.UNKNOWN
    known = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14,
             19: 15, 20: 16, 12: 17, 11: 18}
    synthia = data.label_table(data.SYNTHIA_IDS, n)
    assert synthia[:24].tolist() == [known.get(i, ignore) for i in range(23)] + [data.UNKNOWN]
    short = data.label_table(data.TRAIN_IDS, data.CLASS_SPACES["cityscapes16"])
    assert short[:19].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, ignore, 9, 10, 11, 12, ignore, 13, ignore, 14, 15]
    assert len(data.CLASS_SPACES["cityscapes13"]) == 13


def test_renames():
    names = data.CLASS_SPACES["camvid11"]
    merged = [names[i] for i in data.label_table(data.TRAIN_IDS, names)[:19]]
    assert merged == ["Road", "Pavement", "Building", "Building", "Fence", "Pole", "SignSymbol", "SignSymbol", "Tree",
                      "Tree", "Sky", "Pedestrian", "Bicyclist", "Car", "Car", "Car", "Car", "Bicyclist", "Bicyclist"]
    back = data.label_table(data.CAMVID_IDS, data.CLASS_SPACES["cityscapes19"])
    assert back[:12].tolist() == [10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18, 255]
    assert (data.palette(names)[3] == (128, 64, 128)).all()
    own = data.palette([f"class {i}" for i in range(40)])
    assert own.shape == (40, 3) and len(np.unique(own, axis=0)) == 40


def test_class_names(tmp_path):
    (tmp_path / "names.txt").write_text("sky\n\n wet road \n")
    assert data.class_names(str(tmp_path / "names.txt")) == ("sky", "wet road")
    (tmp_path / "twice.txt").write_text("sky\nsky\n")
    refused(lambda: data.class_names(str(tmp_path / "twice.txt")), "twice.txt", "different")
    refused(lambda: data.class_names("cityscapes20"), "cityscapes20", "cityscapes19")


# ---------------------------------------------------------------- data.py: reading files


@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0], [3, 4]])
def test_png16(tmp_path, filters):
    rng = np.random.default_rng(len(filters))
    pixels = rng.integers(0, 2 ** 16, (13, 9, 3), np.uint16)              # noise in green and blue, ids in red
    pixels[..., 0] = rng.integers(0, 256, (13, 9))
    assert (data.read_png16(png16(tmp_path / "a.png", pixels, filters)) == pixels[..., 0]).all()
    assert data.read_png16(png16(tmp_path / "b.png", pixels[:1, :1], filters)).item() == pixels[0, 0, 0]
    tall = pixels[:, :2, :1]
    assert (data.read_png16(png16(tmp_path / "c.png", tall, filters)) == tall[..., 0]).all()


def test_png16_faults(tmp_path):
    path = png16(tmp_path / "x.png", np.full((5, 4, 3), 300, np.uint16), [4])
    refused(lambda: data.read_png16(path), path, "above 255")
    whole = path.read_bytes()
    for broken in (whole[:60], b"", b"<html>not found</html>", whole[:-1] + b"x"):     # the last: only the checksum
        path.write_bytes(broken)
        refused(lambda: data.read_png16(path), path, "damaged")
    refused(lambda: data.read_png16(put(tmp_path / "8.png", np.zeros((4, 4)))), "8.png", "16-bit")
    root = tmp_path / "synthia"
    put(root / "RGB" / "a.png", np.zeros((4, 6, 3)))
    ids = np.array([3, 4, 2, 0, 1, 22], np.uint16)
    png16(root / "GT" / "LABELS" / "a.png", ids[None, :, None].repeat(4, 0).repeat(3, 2), [4])      # (6,) -> (4,6,3)
    _, label = data.open_dataset(f"synthia:{root}", "train", "cityscapes19", (6, 4), tmp_path / "cache").arrays(0)
    assert label[0].tolist() == [0, 1, 2, 255, 10, 255]


def test_label_files(tmp_path):
    ids = np.arange(6).reshape(2, 3)
    assert (data.read_label(put(tmp_path / "palette.png", ids, "P")) == ids).all()          # indices, not colours
    assert (data.read_label(put(tmp_path / "grey.png", ids)) == ids).all()
    Image.fromarray(ids.astype(bool)).save(tmp_path / "bits.png")
    assert (data.read_label(tmp_path / "bits.png") == (ids > 0)).all()
    refused(lambda: data.read_label(put(tmp_path / "rgb.png", np.zeros((2, 3, 3)))), "rgb.png", "colour", "8-bit")
    refused(lambda: data.read_label(put(tmp_path / "jpeg.jpg", ids)), "jpeg.jpg", "JPEG")
    for channels in (1, 3):
        wide = png16(tmp_path / f"wide{channels}.png", np.zeros((2, 3, channels), np.uint16), [0])
        refused(lambda: data.read_label(wide), wide, "16-bit")


def test_broken_images(tmp_path):
    good = put(tmp_path / "good.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3))).read_bytes()
    for name, content in (("cut.png", good[:len(good) // 2]), ("empty.png", b""), ("page.png", b"<html>404</html>")):
        (tmp_path / name).write_bytes(content)
        for read in (data.read_image, data.read_label):
            refused(lambda: read(tmp_path / name), tmp_path / name, "restore or remove")


@pytest.mark.parametrize("side", [10_500, 20_000])                       # Pillow only warns about the first
def test_decompression_bomb(tmp_path, side):
    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    body = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    bomb = write_chunks(tmp_path / "bomb.png", body)
    refused(lambda: data.read_image(bomb), bomb, "make it smaller")


def test_image_modes(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6                                                      # turn by 90 degrees clockwise to show
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    assert (data.read_image(tmp_path / "turned.png") == np.rot90(array, -1)).all()
    alpha = put(tmp_path / "alpha.png", np.dstack([array, array[..., 0]]))
    assert (data.read_image(alpha) == array).all()
    assert (data.read_image(put(tmp_path / "grey.png", array[..., 0])) == array[..., :1]).all()
    Image.fromarray(array[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    refused(lambda: data.read_image(tmp_path / "deep.png"), "deep.png", "8-bit")


# ---------------------------------------------------------------- data.py: finding files


def test_published_layouts(tmp_path):
    """Every layout finds its images, pairs them with their own labels and maps these. The number is the id of cars."""
    city = "leftImg8bit/{s}/ulm/ulm_{i}_leftImg8bit.png"
    trees = {"cityscapes": (city, "gtFine/{s}/ulm/ulm_{i}_gtFine_labelIds.png", 26),
             "cityscapes_t": (city, "gtFine/{s}/ulm/ulm_{i}_gtFine_labelTrainIds.png", 13),
             "gta": ("images/{i}.png", "labels/{i}.png", 26),
             "camvid": ("{s}/images/{i}.jpg", "{s}/labels/{i}.png", 8),
             "camvid_s": ("{s}/{i}.png", "{s}annot/{i}.png", 8),
             "acdc": ("rgb_anon/fog/{s}/G1/{i}_rgb_anon.png", "gt/fog/{s}/G1/{i}_gt_labelTrainIds.png", 13),
             "acdc_f": ("rgb_anon/{s}/{i}_rgb_anon.png", "gt/{s}/{i}_gt_labelTrainIds.png", 13),
             "darkzurich": ("rgb_anon/{s}/night/{i}_rgb_anon.png", "gt/{s}/night/{i}_gt_labelTrainIds.png", 13)}
    for tree, (image, label, car) in trees.items():
        kind, root = tree.split("_")[0], tmp_path / tree
        for split in ("train",) if kind == "gta" else ("train", "val"):
            for i in range(3):
                put(root / image.format(s=split, i=i), np.zeros((4, 6, 3)))
                if (kind, split) != ("darkzurich", "train"):
                    fill = car if i == 1 else 11 if kind == "camvid" else 255
                    put(root / label.format(s=split, i=i), np.full((4, 6), fill))
            found = data.open_dataset(f"{kind}:{root}", split, "cityscapes19", cache=tmp_path / "cache")
            assert len(found) == 3 and found.size == data.SETS[kind][0] and found.names[1].endswith("1"), tree
            assert found.labeled == ((kind, split) != ("darkzurich", "train"))
            if found.labeled:
                assert [int(found[i]["label"].max()) for i in range(3)] == [255, 13, 255], tree
                assert found[1]["label"].shape == ((4, 6) if split == "val" else found.size[::-1])
            assert found[1]["image"].shape == (3, *found.size[::-1]) and found[1]["image"].dtype == torch.uint8
    refused(lambda: data.open_dataset(f"gta:{tmp_path / 'gta'}", "val", "cityscapes19"), "no 'val' split")
    (tmp_path / "camvid" / "train" / "labels" / "2.png").unlink()
    refused(lambda: data.open_dataset(f"camvid:{tmp_path / 'camvid'}", "train", "camvid11"), "1 of 3", "2.jpg")
    shutil.rmtree(tmp_path / "camvid" / "train" / "labels")
    assert not data.open_dataset(f"camvid:{tmp_path / 'camvid'}", "train", "camvid11").labeled


def test_folder_faults(tmp_path):
    spec, names = make_folder(tmp_path / "d", 8), ("a", "b", "c")
    for i in (1, 2):
        put(tmp_path / "d" / "labels" / f"extra{i}.png", np.zeros((2, 2)))
    assert "2 labels have no image" in data.open_dataset(spec, "train", names).notes[0]
    assert not data.open_dataset(spec.rsplit(":", 1)[0], "train", names).labeled
    for i in range(7):
        (tmp_path / "d" / "labels" / f"p{i:02d}.png").unlink()
    refused(lambda: data.open_dataset(spec, "train", names), "7 of 8", "p04.png and 2 more")
    refused(lambda: data.open_dataset(f"folder:{tmp_path / 'none'}", "train", names), tmp_path / "none")
    (tmp_path / "empty").mkdir()
    for spec in (f"folder:{tmp_path / 'empty'}", f"camvid:{tmp_path / 'empty'}", f"gta:{tmp_path / 'missing'}"):
        refused(lambda: data.open_dataset(spec, "train", names), spec, "matches", "*")
    for spec in ("none", "camvid", "kitti:/data", ""):
        refused(lambda: data.open_dataset(spec, "train", names), repr(spec), "streets", "cityscapes:DIR")


def test_content_faults(tmp_path):
    spec = make_folder(tmp_path / "d")
    open_it = lambda: data.open_dataset(spec, "val", ("a", "b", "c"))     # noqa: E731
    assert [open_it().check(i)[2] for i in range(6)] == [None] * 6
    label = tmp_path / "d" / "labels" / "p00.png"
    refused(lambda: data.open_dataset(spec, "val", ("a", "b"))[0], label, "ids 2", "2 classes")
    put(tmp_path / "d" / "labels" / "p03.png", np.zeros((8, 8)))
    refused(lambda: open_it()[3], "p03.png", "24x18", "8x8", tmp_path / "d" / "images", tmp_path / "d" / "labels")
    assert "24x18" in open_it().check(3)[2]


def test_lists(tmp_path):
    for name in ("a b.png", "c.png", "d.png"):
        put(tmp_path / "set" / name, np.zeros((4, 4, 3)))
    put(tmp_path / "set" / "m.png", np.ones((4, 4)))
    put(tmp_path / "outside.png", np.zeros((4, 4)))
    path = tmp_path / "set" / "list.txt"

    def listed(text):
        path.write_text(text)
        return data.open_dataset(f"list:{path}", "val", ("x", "y"))
    assert int(listed("a b.png m.png\nc.png m.png\n\n")[0]["label"].min()) == 1
    assert listed("a b.png\tm.png\n").names == ["a b"] and not listed("a b.png\nc.png\n").labeled
    for outside in ("../outside.png", "c.png ../outside.png", f"{tmp_path}/outside.png", "c.png\tm.png\td.png"):
        refused(lambda: listed(outside), path, "below")
    refused(lambda: listed("c.png m.png\nd.png\n"), path, "1 of 2 images have no label", "d.png")
    refused(lambda: listed("c.png none.png\n"), path, "none.png does not exist")
    refused(lambda: listed(""), path, "no image")
    refused(lambda: data.open_dataset(f"list:{tmp_path}", "val", ("x",)), "no such file")


def test_sizes(tmp_path):
    """Training labels follow the image, validation labels stay native; odd sizes and one pixel work."""
    spec = make_folder(tmp_path / "d", 2, (7, 5))
    for split, label in (("train", (3, 11)), ("val", (5, 7))):
        item = data.open_dataset(spec, split, ("a", "b", "c"), (11, 3), tmp_path / "cache")[0]
        assert item["image"].shape == (3, 3, 11) and item["label"].shape == label
    native = data.open_dataset(spec, "train", ("a", "b", "c"))
    assert native.size is None and not native.cached and native[0]["image"].shape == (3, 5, 7)
    one = make_folder(tmp_path / "one", 1, (1, 1))
    assert data.open_dataset(one, "val", ("a", "b", "c"))[0]["image"].shape == (3, 1, 1)
    assert data.parse_size("256x192") == (256, 192)
    for wrong in ("256", "0x4", "axb", "256x192x3"):
        with pytest.raises(argparse.ArgumentTypeError):
            data.parse_size(wrong)


def test_streets_data_set(tmp_path, monkeypatch):
    drawn = []

    def fake(seed, index, shifted, size):
        drawn.append((seed, index, shifted, size))
        return np.full((size[1], size[0], 3), index % 256, np.uint8), np.full((size[1], size[0]), index % 19, np.uint8)
    monkeypatch.setattr(data, "render_street", fake, raising=False)
    streets = data.open_dataset("streets", "train", "camvid11", (16, 12), tmp_path)
    assert len(streets) == 1500 and streets.names[7] == "streets_000007" and streets.size == (16, 12)
    assert int(streets[13]["label"][0, 0]) == streets.classes.index("Car") and int(streets[13]["image"].max()) == 13
    again = data.open_dataset("streets", "train", "cityscapes19", (16, 12), tmp_path)       # the same cache
    assert int(again[13]["label"][0, 0]) == 13 and drawn == [(data.STREETS_SEED, 13, False, (16, 12))]
    shifted = data.open_dataset("streets:shifted", "val", "cityscapes19", None, tmp_path)
    assert len(shifted) == 100 and shifted[0]["image"].shape == (3, 192, 256) and drawn[-1][2:] == (True, (256, 192))
    used = [i for splits in data.STREETS.values() for indices in splits.values() for i in indices]
    assert len(set(used)) == len(used)
    refused(lambda: data.open_dataset("streets", "test", "cityscapes19"), "no 'test' split")


# ---------------------------------------------------------------- data.py: the cache


def open_cached(spec, cache):
    return data.open_dataset(spec, "train", ("a", "b", "c"), (20, 14), cache)


def test_cache_equals_files(tmp_path):
    spec = make_folder(tmp_path / "d", 9)
    plain, cached = open_cached(spec, None), open_cached(spec, tmp_path / "cache")
    plain.cached = False
    cached.prepare()
    assert cached._maps[2].all() and all(same(plain[i], cached[i]) for i in range(9))
    counts = cached.class_counts()
    assert counts.dtype == np.int64
    assert counts.tolist() == [[int((plain[i]["label"] == c).sum()) for c in range(3)] for i in range(9)]
    os.utime(tmp_path / "d" / "labels" / "p00.png", (1, 1))               # a changed file is another cache
    assert open_cached(spec, tmp_path / "cache")._cache_file != cached._cache_file
    travelled = pickle.loads(pickle.dumps(cached))
    assert "_maps" not in vars(travelled) and same(travelled[3], cached[3])


def in_child(task):
    """Id of a forked process that runs the task; numpy only, since torch's threads do not survive a fork."""
    if not (child := os.fork()):
        try:
            task()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def plainly(spec):
    """The items of a data set read without a cache."""
    plain = open_cached(spec, None)
    plain.cached = False
    return [plain.arrays(i) for i in range(len(plain))]


def equal_arrays(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("write", [0, 1, 2, 12, 13, 14])                  # image, label, done byte of items 0 and 4
def test_cache_survives_a_kill(tmp_path, write):
    spec = make_folder(tmp_path / "d", 6)

    def killed():
        calls = []

        class Deadly(io.FileIO):
            def write(self, content):
                calls.append(1)
                if len(calls) > write:
                    super().write(content[:len(content) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().write(content)
        data.open = lambda path, mode: Deadly(path, mode.replace("b", ""))
        for i in range(6):
            open_cached(spec, tmp_path / "cache").arrays(i)
    assert os.waitpid(in_child(killed), 0)[1] == signal.SIGKILL
    cached = open_cached(spec, tmp_path / "cache")
    assert cached._maps[2].sum() == write // 3
    assert all(equal_arrays(a, cached.arrays(i)) for i, a in enumerate(plainly(spec))) and cached._maps[2].all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_cache_with_two_builders(tmp_path):
    spec = make_folder(tmp_path / "d", 40)
    wanted = plainly(spec)

    def build():
        shared = open_cached(spec, tmp_path / "cache")
        assert all(equal_arrays(wanted[i], shared.arrays(i)) for i in range(40))
    children = [in_child(build), in_child(build)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1 and open_cached(spec, tmp_path / "cache")._maps[2].all()


def test_cache_that_cannot_be_written(tmp_path):
    spec = make_folder(tmp_path / "d", 2)
    (tmp_path / "file").write_text("")
    refused(lambda: open_cached(spec, tmp_path / "file" / "cache").prepare(), "--cache", tmp_path / "file")
    script = ("import resource, sys, data\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
              f"try: data.open_dataset({spec!r}, 'train', ('a', 'b', 'c'), (20, 14), {str(tmp_path / 'c')!r})[0]\n"
              "except data.DataError as error: print(error)")
    here = Path(data.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0 and "--cache" in done.stdout and done.stdout.count("\n") == 1, done.stderr


def test_cache_is_of_its_classes_in_their_order(tmp_path):
    """Also where a folder holds files of train ids, which are mapped by name."""
    (tmp_path / "i").mkdir()
    (tmp_path / "l").mkdir()
    put(tmp_path / "i/a_labelTrainIds.png", np.zeros((4, 4, 3), np.uint8))
    put(tmp_path / "l/a_labelTrainIds.png", np.full((4, 4), 2, np.uint8))
    names = data.CLASS_SPACES["cityscapes19"]
    for classes in (names, names[::-1]):
        dataset = data.open_dataset(f"folder:{tmp_path}/i:{tmp_path}/l", "train", classes, (4, 4), tmp_path / "cache")
        wanted = classes.index("building")
        assert (dataset[0]["label"] == wanted).all() and dataset.class_counts()[0, wanted] == 16


def test_finished_cache_serves_without_being_written_and_damaged_counts_are_made_again(tmp_path, monkeypatch):
    labelled, _ = write_pairs(tmp_path)

    def opened():
        return data.open_dataset(labelled, "train", ("sky", "wall", "car"), (56, 40), tmp_path / "cache")

    first = opened()
    first.prepare()
    counts = first.class_counts()
    for damaged in (b"", next((tmp_path / "cache").glob("*.npy")).read_bytes()[:70]):
        next((tmp_path / "cache").glob("*.npy")).write_bytes(damaged)
        assert (opened().class_counts() == counts).all()
    monkeypatch.setattr(data, "_writing", None)  # whoever writes needs it
    assert torch.equal(opened()[0]["image"], first[0]["image"]) and (opened().class_counts() == counts).all()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at the process table in /proc")
def test_workers_of_a_killed_process_do_not_stay():
    code = (f"import sys, time; sys.path.insert(0, {HERE!r}); import data\n"
            "def task(i):\n    print(__import__('os').getpid(), flush=True); time.sleep(60)\n"
            "data._in_processes(task, range(2), 'waiting')")
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    run.kill()
    run.wait()
    for _ in range(100):
        time.sleep(0.2)
        try:
            state = Path(f"/proc/{worker}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":
            return
    pytest.fail("a worker outlived its parent")


# ---------------------------------------------------------------- data.py: sampling


def test_rare_class_probabilities():
    counts = np.array([[900, 50, 0, 5], [800, 60, 0, 5], [700, 0, 10, 0]])
    sampler = data.RareClassSampler(counts, 0.5, 9)
    share = counts.sum(0) / counts.sum()
    expected = np.exp((1 - share) / 0.5) * [1, 1, 1, 0]                   # class 3 never has more than 9 pixels
    assert np.allclose(sampler.probabilities, expected / expected.sum())
    assert data.RareClassSampler(counts, 0.5, 10).probabilities[2] == 0   # more than, not at least
    rng = np.random.default_rng(0)
    drawn = [sampler.draw(rng) for _ in range(4000)]
    assert set(drawn) == {(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2)}
    frequency = np.bincount([c for _, c in drawn], minlength=4) / 4000
    assert abs(frequency - sampler.probabilities).max() < 0.03
    assert np.isfinite(data.RareClassSampler(counts).probabilities).all()                   # T = 0.01 does not overflow
    refused(lambda: data.RareClassSampler(counts, min_pixels=10_000), "10000 pixels")


def test_rare_class_crops(tmp_path):
    """One corner holds the rare class: without re-crops about 1 of 4 crops would show enough of it."""
    label = np.zeros((64, 64))
    label[:, 32:], label[:16, :16] = 1, 2
    put(tmp_path / "d" / "images" / "a.png", np.zeros((64, 64, 3)))
    put(tmp_path / "d" / "labels" / "a.png", label)
    d = data.open_dataset(f"folder:{tmp_path / 'd' / 'images'}:{tmp_path / 'd' / 'labels'}", "train", ("a", "b", "c"))
    rare = data.RareClassSampler(np.array([[0, 0, 256]]))
    need = data.RARE_CROP * 32 ** 2
    hits = [sum(int((data.Crops(d, 32, 0, sampler, None)[k]["label"] == 2).sum() > need) for k in range(200))
            for sampler in (None, rare)]
    assert hits[0] < 120 and hits[1] > 185
    shares = [data.Crops(d, 16, 0, None, share)[k]["label"].flatten().bincount().max().item() / 256
              for share in (None, 0.75) for k in range(200)]
    assert np.mean(np.array(shares[:200]) < 0.75) < 0.5 < 0.9 < np.mean(np.array(shares[200:]) < 0.75)


def test_crops_are_a_function_of_seed_and_k(tmp_path):
    spec = make_folder(tmp_path / "d", 5, (40, 30))
    names, keys = ("a", "b", "c"), list(range(12)) + [1000]
    d = data.open_dataset(spec, "train", names)
    rare = data.RareClassSampler(d_counts := np.stack([d._count(i) for i in range(5)]), min_pixels=1)
    assert d_counts.shape == (5, 3)
    shutil.copytree(tmp_path / "d", tmp_path / "moved")                   # the place of the files does not matter
    moved = data.open_dataset(spec.replace(f"{tmp_path / 'd'}", f"{tmp_path / 'moved'}"), "train", names)
    for sampler in (None, rare):
        crops = data.Crops(d, 16, 3, sampler)
        wanted = {k: crops[k] for k in keys}
        backwards = {k: data.Crops(moved, 16, 3, sampler)[k] for k in reversed(keys)}
        loader = torch.utils.data.DataLoader(crops, batch_size=None, sampler=keys, num_workers=2)
        assert all(same(wanted[k], backwards[k]) for k in keys)
        assert all(same(wanted[k], {**item, "index": int(item["index"])}) for k, item in zip(keys, loader))
        assert not all(same(data.Crops(d, 16, 4, sampler)[k], wanted[k]) for k in keys)
    crops = data.Crops(d, 16, 3)
    orders = [[crops[k]["index"] for k in range(epoch * 5, epoch * 5 + 5)] for epoch in range(4)]
    assert all(sorted(order) == list(range(5)) for order in orders) and len(set(map(tuple, orders))) > 1
    item = crops[0]                                                       # image and label are cut and flipped alike
    windows = [(d[item["index"]]["image"][:, y:y + 16, x:x + 16], d[item["index"]]["label"][y:y + 16, x:x + 16])
               for y in range(15) for x in range(25)]
    windows += [(image.flip(2), label.flip(1)) for image, label in windows]
    assert any(torch.equal(image, item["image"]) and torch.equal(label, item["label"]) for image, label in windows)


def test_labels_of_a_target_never_reach_its_crops(tmp_path):
    labelled = data.open_dataset(make_folder(tmp_path, size=(48, 40)), "train", ("a", "b", "c"))
    plain = data.open_dataset(f"folder:{tmp_path / 'images'}", "train", ("a", "b", "c"))
    for k in range(40):
        seen, blind = data.Crops(labelled, 16, 0, labels=False)[k], data.Crops(plain, 16, 0)[k]
        assert torch.equal(seen["image"], blind["image"]) and (seen["label"] == 0).all()


def test_crops_larger_than_the_image(tmp_path):
    for size in ((5, 7), (1, 1), (40, 3)):
        spec = make_folder(tmp_path / str(size), 2, size)
        for labeled in (True, False):
            spec = spec if labeled else spec.rsplit(":", 1)[0]
            item = data.Crops(data.open_dataset(spec, "train", ("a", "b", "c")), 16, 0)[0]
            assert item["image"].shape == (3, 16, 16) and item["label"].shape == (16, 16)
            assert item["image"].dtype == item["label"].dtype == torch.uint8
            outside = (item["image"] == torch.tensor(data.MEAN_COLOUR)[:, None, None]).all(0)
            assert int((~outside).sum()) == min(16, size[0]) * min(16, size[1])
            assert (item["label"][outside] == 255).all() and (labeled or (item["label"][~outside] == 0).all())


def test_labeled_subset():
    names = [f"city_{i:06d}" for i in range(2975)]
    subset = [int(name[5:]) for name in data.labeled_subset(names[::-1], 500)]
    assert subset[:5] == [2403, 2865, 2159, 507, 2462] and [subset[i - 1] for i in (100, 200, 500)] == [1407, 1268, 927]
    assert data.labeled_subset(names, 100) == data.labeled_subset(names, 500)[:100]
    for n in (0, 2976):
        refused(lambda: data.labeled_subset(names, n), n, 2975)


def test_labeled_images_by_number_or_list(tmp_path):
    root = tmp_path / "leftImg8bit/train"
    for i in range(6):
        city = root / ("aachen" if i < 3 else "bremen")
        city.mkdir(parents=True, exist_ok=True)
        put(city / f"{city.name}_{i:06d}_000019_leftImg8bit.png", np.full((4, 4, 3), i, np.uint8))
        (tmp_path / "masks").mkdir(exist_ok=True)
        put(tmp_path / f"masks/{city.name}_{i:06d}_000019_leftImg8bit.png", np.full((4, 4), i % 2, np.uint8))
    unlabelled = data.open_dataset(f"folder:{root}", "train", ("a", "b"))
    refused(lambda: data.labeled_indices(unlabelled, "2"), "has no labels")
    dataset = data.open_dataset(f"folder:{root / 'aachen'}:{tmp_path / 'masks'}", "train", ("a", "b"))
    assert data.labeled_indices(dataset, "all") == [0, 1, 2]
    names = [dataset.names[i] for i in data.labeled_indices(dataset, "2")]
    assert names == sorted(data.labeled_subset(dataset.names, 2))
    split = tmp_path / "labeled.txt"
    split.write_text("leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.png gtFine/train/aachen/x.png\n"
                     "aachen_000000_000019\n")  # UniMatch's lines, or plain names
    assert data.labeled_indices(dataset, str(split)) == [0, 2]
    refused(lambda: data.labeled_indices(dataset, "4"), "--labeled 4", "3 images")
    refused(lambda: data.labeled_indices(dataset, "/nonexistent.txt"), "/nonexistent.txt", "no such file")
    for text, words in (("", "lists no image"), ("other.png x.png", "'other.png x.png' is no image"),
                        ("aachen_000000_000019\naachen_000000_000019", "for the second time"), (".png x", "no image")):
        split.write_text(text)
        refused(lambda: data.labeled_indices(dataset, str(split)), str(split), words)


def test_lists_of_names_with_spaces_and_images_twice(tmp_path):
    for part, shape in (("images", (4, 4, 3)), ("labels", (4, 4))):
        (tmp_path / part).mkdir()
        for name in ("a", "a b", "c d e"):
            put(tmp_path / part / f"{name}.png", np.zeros(shape, np.uint8))
    dataset = data.open_dataset(f"folder:{tmp_path}/images:{tmp_path}/labels", "train", ("a", "b"))
    split = tmp_path / "labeled.txt"
    for line, wanted in (("a b.png", "a b"), ("a b.png\tlabels/a b.png", "a b"), ("images/c d e.png", "c d e"),
                         ("a", "a"), ("images/a.png labels/a.png", "a"), ("images\\c d e.png", "c d e"),
                         ("./images/a b.png", "a b"), (str(tmp_path / "images/a b.png"), "a b")):
        split.write_text(line)
        assert [dataset.names[i] for i in data.labeled_indices(dataset, str(split))] == [wanted], line
    twice = tmp_path / "twice.txt"
    twice.write_text("images/a.png\tlabels/a.png\nimages/a.png\tlabels/a.png\n")
    dataset = data.open_dataset(f"list:{twice}", "train", ("a", "b"))
    assert data.labeled_indices(dataset, "all") == [0, 1]
    refused(lambda: data.labeled_indices(dataset, "1"), str(twice), "twice")


def test_images_without_a_mask_beside_labelled_ones(small_run, tmp_path):
    """A target may be labelled in part; a source may not."""
    masks = tmp_path / "target/labels"
    for name in ("001", "003", "004"):
        (masks / f"{name}.png").unlink()
    part = f"folder:{tmp_path}/target/images:{masks}"
    classes = data.class_names(str(tmp_path / "names.txt"))
    for size, cache in ((None, None), ((56, 40), tmp_path / "cache")):
        dataset = data.open_dataset(part, "train", classes, size, cache, partial=True)
        assert dataset.labeled and data.labeled_indices(dataset, "all") == [0, 2]
        assert (dataset[1]["label"] == 255).all() and (dataset[2]["label"] < 3).all()
        counts = dataset.class_counts()
        assert (counts.sum(1) > 0).tolist() == [True, False, True, False, False]
    refused(lambda: data.open_dataset(part, "train", classes), "3 of 5 images")
    checked = subprocess.run([sys.executable, "data.py", part, "--classes", str(tmp_path / "names.txt"), "--out",
                              str(tmp_path / "sheet.png")], cwd=HERE, capture_output=True, text=True)
    assert checked.returncode == 0 and "note: 3 of 5 images have no label" in checked.stdout
    refused(lambda: data.labeled_indices(dataset, "3"), "--labeled 3", "2 images with labels")
    argv = [*small_run, "--target", part, "--val", "none", "--recipe", "semidavil", "--labeled", "all"]
    run_train(argv)
    assert load_checkpoint(tmp_path / "out/last.pt")["labeled"] == ["000", "002"]
    split = tmp_path / "split.txt"
    split.write_text("003\n")
    done = run_train([*argv, "--labeled", str(split), "--out", str(tmp_path / "other")], check=False)
    assert done.returncode == 1 and "no image with a label" in done.stderr


def test_crops_of_a_subset(tmp_path):
    labelled, _ = write_pairs(tmp_path, count=7)
    dataset = data.open_dataset(labelled, "train", ("sky", "wall", "car"))
    seen = [data.Crops(dataset, 16, 0, subset=[1, 4, 6])[k]["index"] for k in range(30)]
    assert sorted(seen) == [1] * 10 + [4] * 10 + [6] * 10 and len(set(map(tuple, np.split(np.array(seen), 10)))) > 1
    counts = np.zeros((3, 3), int)
    counts[1, 2] = 9
    rare = data.RareClassSampler(counts)
    assert {data.Crops(dataset, 16, 0, rare, subset=[1, 4, 6])[k]["index"] for k in range(9)} == {4}
    other = data.Crops(dataset, 16, 0, labels=False, subset=[1, 4, 6])
    assert [other[k]["index"] for k in range(30)] != seen  # drawn apart from the labelled ones


# ---------------------------------------------------------------- data.py: on the device


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mix_inputs(batch=4, classes=7):
    g = generator(5)
    label = torch.randint(0, classes, (batch, 9, 11), generator=g).to(torch.uint8) * 2      # even ids only: n = 7 of 14
    label[:, 0] = 255
    label[2][label[2] == 4] = 6                                           # class 4 is in the batch, not in image 2
    return torch.rand(batch, 3, 9, 11, generator=g), label, torch.rand(batch, 3, 9, 11, generator=g), \
        torch.full((batch, 9, 11), 13, dtype=torch.uint8), torch.tensor(0.25)


def test_class_mix():
    inputs = source, source_label, target, _, _ = mix_inputs()
    present = data.present_classes(source_label, 19)
    assert present.nonzero().flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]
    drawn = set()
    for seed in range(40):
        image, label, mixed_weight, mask = data.class_mix(*inputs, present, generator(seed))
        for b in range(4):
            chosen = set(source_label[b][mask[b, 0]].tolist())
            rest = set(source_label[b][~mask[b, 0]].tolist())
            assert not chosen & rest and 255 in rest and len(chosen) in ((4,) if b != 2 else (3, 4))
            drawn.add(frozenset(chosen))
        where = mask.expand_as(source)
        assert torch.equal(image[where], source[where]) and torch.equal(image[~where], target[~where])
        assert torch.equal(label[mask[:, 0]], source_label[mask[:, 0]]) and (label[~mask[:, 0]] == 13).all()
        assert (mixed_weight[mask[:, 0]] == 1).all() and (mixed_weight[~mask[:, 0]] == 0.25).all()
    assert len(drawn) > 20                                                # another half per image and seed
    none, single = torch.zeros(19, dtype=torch.bool), torch.arange(19) == 6                 # ceil(1/2) = 1
    assert not data.class_mix(*inputs, none, generator())[3].any()
    assert torch.equal(data.class_mix(*inputs, single, generator())[3][:, 0], source_label == 6)



def test_block_mask():
    mask = data.block_mask(64, (128, 96), 32, 0.7, generator())
    assert mask.shape == (64, 1, 128, 96) and mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0.0, 1.0}
    cells = mask.reshape(64, 4, 32, 3, 32)                                # (B,1,H,W) -> (B, row, 32, column, 32)
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells)) and abs(mask.mean() - 0.3) < 0.05
    assert len({tuple(m.flatten().tolist()) for m in cells[:, :, 0, :, 0]}) > 50            # another mask per image
    assert data.block_mask(2, (70, 20), 32, 0.0, generator()).shape == (2, 1, 70, 20)
    assert data.block_mask(1, (5, 5), 32, 1.0, generator()).sum() == 25  # one block is always left
    assert data.block_mask(3, (64, 64), 16, 1.0, generator()).sum((1, 2, 3)).tolist() == [256.0] * 3


def test_draws_do_not_depend_on_the_number_of_processes():
    shards = [(0, 2), (1, 2)]
    whole = data.uniform((4, 3), generator(1))
    assert torch.equal(whole, torch.cat([data.uniform((2, 3), generator(1), shard) for shard in shards]))
    mask = data.block_mask(4, (32, 32), 8, 0.5, generator(1))
    assert torch.equal(mask, torch.cat([data.block_mask(2, (32, 32), 8, 0.5, generator(1), shard) for shard in shards]))
    *inputs, weight = mix_inputs()
    source, present = inputs[0], data.present_classes(inputs[1], 19)
    whole = data.class_mix(*inputs, weight, present, generator(1))
    halves = [data.class_mix(*(x[2 * rank:2 * rank + 2] for x in inputs), weight, present, generator(1), (rank, 2))
              for rank in range(2)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*halves)))
    for seed in range(5):
        parts = torch.cat([data.strong_augment(source[i:i + 2], generator(seed)) for i in (0, 2)])
        assert torch.equal(data.strong_augment(source, generator(seed)), parts)


def test_majority_labels_and_drawn_cells():
    label = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    label[0, :4, :4], label[0, :4, 4:] = 2, 0
    label[0, 3, :4] = 1  # 12 of 16 pixels are left: 75 %, just enough
    label[0, 2:4, 4:] = 1  # half and half
    label[0, 4:, :3] = 1  # 75 % of the cell, the rest ignored
    assert data.majority_label(label, (2, 2), 3).tolist() == [[[2, 255], [1, 255]]]
    cells = torch.randint(0, 4, (2, 9, 9), generator=generator())
    cells[0, :4] = 255
    assert data.sample_cells(cells, "all", generator()) is cells
    for count, most in (("20", None), ("5/class", 5)):
        drawn = [data.sample_cells(cells, count, generator(seed)) for seed in range(20)]
        for kept in drawn:
            taken = kept != 255
            assert torch.equal(kept[taken], cells[taken]) and (most or taken.sum() == 20)
            assert all((kept == c).sum() == 5 for c in range(4)) or most is None
        share = torch.stack([kept != 255 for kept in drawn]).float().mean(0)[cells != 255]
        assert share.max() < 0.6 and share.gt(0).float().mean() > 0.9  # any cell may be drawn
    few = data.sample_cells(cells, "1000/class", generator())
    assert torch.equal(few, cells) and torch.equal(data.sample_cells(cells, "1000", generator()), cells)
    for wrong in ("0", "x", "4/image", "-3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="write all"):
            data.cell_count(wrong)


def amplitudes(image, b):
    """Amplitudes of all frequencies, centred, and whether each is one of the (2b+1)^2 lowest."""
    H, W = image.shape[2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(image.double()), dim=(2, 3))
    low = torch.zeros(H, W, dtype=torch.bool)
    low[H // 2 - b:H // 2 + b + 1, W // 2 - b:W // 2 + b + 1] = True
    return spectrum, low


@pytest.mark.parametrize("size, beta, b", [((64, 48), 0.05, 2), ((33, 47), 0.09, 2), ((20, 20), 0.01, 0)])
def test_fourier_restyle_exchanges_low_amplitudes_and_keeps_phases(size, beta, b):
    torch.manual_seed(0)
    image, style = 0.5 + 0.02 * torch.randn(2, 3, *size), 0.5 + 0.02 * torch.randn(2, 3, *size)  # nothing is clipped
    out = data.fourier_restyle(image, style, beta)
    assert out.dtype == torch.float32 and 0 < out.min() and out.max() < 1
    (ours, low), (theirs, _), (mixed, _) = (amplitudes(x, b) for x in (image, style, out))
    assert low.sum() == (2 * b + 1) ** 2
    torch.testing.assert_close(mixed.abs()[..., low], theirs.abs()[..., low], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[..., ~low], ours[..., ~low], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed / mixed.abs(), ours / ours.abs(), rtol=1e-2, atol=1e-2)  # phases
    torch.testing.assert_close(data.fourier_restyle(image, image, beta), image, rtol=0, atol=1e-5)


def test_styles():
    torch.manual_seed(0)
    image, dark = torch.rand(4, 3, 24, 32), 0.1 + 0.2 * torch.rand(4, 3, 24, 32)
    torch.testing.assert_close(data.lab_restyle(image, image), image, rtol=0, atol=1e-4)
    moved = data.lab_restyle(0.3 + 0.3 * image, dark)  # nothing is clipped: the channel moments arrive in Lab
    again = data.lab_restyle(moved, 0.3 + 0.3 * image)
    assert (moved.mean() - dark.mean()).abs() < 0.02
    torch.testing.assert_close(again, 0.3 + 0.3 * image, rtol=0, atol=2e-3)  # and the way back is exact
    grey = data.lab_restyle(torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), 0.2))  # an even image stays finite
    torch.testing.assert_close(grey, torch.full((1, 3, 4, 4), 0.2), rtol=0, atol=1e-4)
    assert torch.equal(data.restyle(image, dark, "identity", [0.01], generator()), image)
    looks = {how: data.restyle(image, dark, how, [0.01, 0.09], generator(3)) for how in data.STYLES}
    assert all(x.shape == image.shape and x.min() >= 0 and x.max() <= 1 for x in looks.values())
    drawn = torch.stack([data.restyle(image, image, "random", [0.01], generator(seed)) for seed in range(30)])
    assert len(drawn.flatten(1).unique(dim=0)) > 20


def test_strong_augment():
    flat = torch.tensor([0.2, 0.5, 0.6]).view(1, 3, 1, 1).expand(1, 3, 5, 5)                # blur cannot change it
    edge = torch.zeros(2, 3, 12, 12)
    edge[..., 6:] = 1                                                     # jitter keeps it a step, blur does not
    jittered, blurred = [], []
    for seed in range(400):
        jittered.append((data.strong_augment(flat, generator(seed)) - flat).abs().max() > 1e-5)
        blurred.append(len(data.strong_augment(edge, generator(seed))[0, 0, 5].unique()) > 2)
    assert abs(np.mean(jittered) - 0.8) < 0.06 and abs(np.mean(blurred) - 0.5) < 0.07
    image = torch.rand(2, 3, 17, 23, generator=generator())
    outs = [data.strong_augment(image, generator(seed)) for seed in range(100)]
    assert all(out.shape == image.shape and out.dtype == torch.float32 for out in outs)
    assert all(0 <= out.min() and out.max() <= 1 + 1e-6 for out in outs)
    assert len({float(out.sum()) for out in outs}) > 80
    for size in ((1, 1), (1, 9), (3, 2)):                                 # the kernel shrinks with the image
        outs = [data.strong_augment(torch.rand(1, 3, *size), generator(seed)) for seed in range(8)]
        assert all(out.shape == (1, 3, *size) and out.isfinite().all() for out in outs)


def test_hue_saturation_blur():
    image = torch.rand(2, 3, 6, 6, generator=generator(2))
    image[0, :, 0, 0], image[0, :, 0, 1] = 0.3, 0                         # grey and black
    for turn, factor in ((0.13, 1), (-0.2, 1), (0, 1.2), (0, 0.8)):
        out = data._hsv(image, turn, factor).permute(0, 2, 3, 1).reshape(-1, 3)
        for pixel, changed in zip(image.permute(0, 2, 3, 1).reshape(-1, 3).tolist(), out.tolist()):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert np.allclose(changed, colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * factor), v), atol=1e-5)
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    blurred = data._blur(point, 0.9)[0, 0]
    x = torch.arange(31) - 15.0
    exact = torch.exp(-(x[:, None] ** 2 + x ** 2) / (2 * 0.9 ** 2))
    assert torch.allclose(blurred, exact / exact.sum(), atol=1e-4) and torch.allclose(blurred.sum(), torch.tensor(1.0))


# ---------------------------------------------------------------- data.py: the command


def test_data_command(tmp_path):
    spec = make_folder(tmp_path / "d")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")

    def run(*flags):
        command = [sys.executable, data.__file__, *flags, "--classes", tmp_path / "names.txt", "--out"]
        return subprocess.run([*command, tmp_path / "sheet.png"], capture_output=True, text=True)
    good = run(spec)
    assert good.returncode == 0 and all(w in good.stdout for w in ("6 images", "24x18 (6)", "0 problems"))
    assert Image.open(tmp_path / "sheet.png").width == 3 * 320
    put(tmp_path / "d" / "labels" / "p01.png", np.full((18, 24), 9))
    (tmp_path / "d" / "images" / "p02.png").write_bytes(b"")
    bad = run(spec)
    assert bad.returncode == 1 and not bad.stderr
    assert all(word in bad.stdout for word in ("2 problems", "p01.png: ids 9", "p02.png"))
    wrong = run("camvid:/nowhere")
    assert wrong.returncode == 1 and wrong.stderr.startswith("data.py: camvid:/now") and wrong.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# kernels.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch"] + ["triton"] * (kernels.triton is not None)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(2, 2, (9, 6), (18, 12)),             # factor 2
          (2, 19, (5, 7), (20, 28)),            # 4
          (1, 11, (3, 5), (24, 40)),            # 8
          (1, 150, (5, 3), (15, 9)),            # 3, several class tiles
          (2, 11, (7, 5), (33, 19)),            # no integer factor
          (1, 19, (13, 4), (6, 11)),            # down in one direction, up in the other
          (1, 2, (1, 17), (5, 17)),             # one row; same width
          (2, 3, (17, 19), (40, 57))]           # several tiles of cells and of pixels


def kernel_inputs(B, K, low, full, dtype=torch.float32):
    generator = torch.Generator().manual_seed(B + K + full[0])
    logits = (3 * torch.randn(B, K, *low, generator=generator)).to(dtype)
    labels = torch.randint(K, (B, *full), generator=generator)
    labels[torch.rand(B, *full, generator=generator) < 0.2] = 255
    return logits.to(DEVICE), labels.to(DEVICE), torch.rand(B, *full, generator=generator).to(DEVICE)


def plain_map(logits, labels, weight):
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(up, labels.long(), ignore_index=255, reduction="none") * weight


def loss_and_gradient(loss, logits, *others, upstream=None, **options):
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, *others, **options)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


def assert_near(ours, reference, limit=1e-5):
    assert ours.shape == reference.shape
    ours, reference = ours.double(), reference.double()
    assert (ours - reference).abs().max() <= limit * reference.abs().max()
    assert (ours - reference).norm() <= limit * reference.norm()


@each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsample_cross_entropy_equals_float64(shape, backend):
    logits, labels, weight = kernel_inputs(*shape)
    kept = logits.clone(), labels.clone(), weight.clone()
    loss, gradient = loss_and_gradient(lambda *a: 2.5 * plain_map(*a).mean(), logits.double(), labels, weight.double())
    ours, again = (loss_and_gradient(lambda *a: 2.5 * kernels.upsample_cross_entropy(*a, backend=backend),
                                     logits, labels, weight) for _ in range(2))
    assert_near(ours[0], loss)
    assert_near(ours[1], gradient)
    assert torch.equal(ours[0], again[0]) and torch.equal(ours[1], again[1])            # bit for bit
    assert all(torch.equal(a, b) for a, b in zip(kept, (logits, labels, weight)))       # inputs are left alone
    with torch.no_grad():
        assert_near(2.5 * kernels.upsample_cross_entropy(logits, labels, weight, backend=backend), loss)


@pytest.mark.parametrize("shape", [(5, 19, (16, 16), (128, 128)), (2, 19, (48, 32), (240, 256)),
                                   (1, 150, (9, 64), (70, 250))], ids=str)
def test_upsample_cross_entropy_over_several_chunks(shape):
    logits, labels, weight = kernel_inputs(*shape)
    assert len(list(kernels._upsampled_chunks(logits, shape[3]))) > 1
    loss, gradient = loss_and_gradient(lambda *a: plain_map(*a).mean(), logits.double(), labels, weight.double())
    ours = loss_and_gradient(kernels.upsample_cross_entropy, logits, labels, weight, backend="torch")
    assert_near(ours[0], loss)
    assert_near(ours[1], gradient)


@each_backend
def test_upsample_cross_entropy_map_is_differentiable(backend):
    logits, labels, weight = kernel_inputs(2, 11, (7, 5), (29, 16))
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    value, gradient = loss_and_gradient(plain_map, logits.double(), labels, weight.double(), upstream=upstream.double())
    ours = loss_and_gradient(kernels.upsample_cross_entropy, logits, labels, weight, reduction="none", backend=backend,
                             upstream=upstream)
    assert_near(ours[0], value)
    assert_near(ours[1], gradient)
    assert (ours[0][labels == 255] == 0).all()


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upsample_cross_entropy_with_nothing_to_learn_is_zero_with_a_graph(reduction, backend):
    logits, labels, weight = kernel_inputs(1, 19, (4, 5), (16, 20))
    for y, w in ((torch.full_like(labels, 255), None), (torch.full_like(labels, 255), weight), (labels, 0 * weight)):
        leaf = logits.clone().requires_grad_()
        value = kernels.upsample_cross_entropy(leaf, y, w, reduction=reduction, backend=backend)
        assert (value == 0).all() and value.grad_fn is not None
        value.sum().backward()
        assert (leaf.grad == 0).all()


@each_backend
def test_upsample_cross_entropy_divides_by_all_pixels(backend):
    logits, labels, _ = kernel_inputs(1, 5, (4, 4), (8, 8))
    labels = labels.remainder(5)                                # 255 -> 0: every pixel counts
    half = labels.clone()
    half[:, 4:] = 255
    pixels = kernels.upsample_cross_entropy(logits, labels, reduction="none", backend=backend)
    assert_near(kernels.upsample_cross_entropy(logits, half, backend=backend), pixels[:, :4].sum() / 64)
    top = torch.zeros(labels.shape, device=DEVICE)
    top[:, :4] = 1                                              # weight 0 and ignored are the same thing
    for a, b in zip(loss_and_gradient(kernels.upsample_cross_entropy, logits, labels, top, backend=backend),
                    loss_and_gradient(kernels.upsample_cross_entropy, logits, half, backend=backend)):
        assert_near(a, b)


@each_backend
def test_upsample_cross_entropy_label_types_and_strides(backend):
    logits, labels, _ = kernel_inputs(2, 11, (6, 5), (24, 20))
    weight = torch.tensor([0.3, 0.8], device=DEVICE).view(2, 1, 1).expand(labels.shape)
    reference = loss_and_gradient(kernels.upsample_cross_entropy, logits, labels, weight.contiguous(), backend=backend)
    strided = labels.transpose(1, 2).contiguous().transpose(1, 2)
    for x, y in ((logits, labels.to(torch.uint8)), (logits.contiguous(memory_format=torch.channels_last), strided)):
        value, gradient = loss_and_gradient(kernels.upsample_cross_entropy, x, y, weight, backend=backend)
        assert_near(value, reference[0])
        assert_near(gradient, reference[1])
    labels[labels == 255] = -1
    assert_near(kernels.upsample_cross_entropy(logits, labels, weight, ignore_index=-1, backend=backend), reference[0])


@each_backend
def test_upsample_cross_entropy_in_bfloat16(backend):
    logits, labels, weight = kernel_inputs(2, 19, (6, 7), (24, 28), torch.bfloat16)
    loss, gradient = loss_and_gradient(lambda *a: plain_map(*a).mean(), logits.double(), labels, weight.double())
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "backend": backend}
        value, ours = loss_and_gradient(lambda *a: kernels.upsample_cross_entropy(*a, **options).mean(),
                                        logits, labels, weight)
        assert value.dtype == torch.float32 and ours.dtype == torch.bfloat16
        assert_near(value, loss)                                # only the inputs were rounded, the sums are float32
        assert_near(ours, gradient, 2e-2)


@each_backend
def test_kernels_stay_in_float32_under_autocast(backend):
    logits, labels, weight = kernel_inputs(1, 19, (6, 7), (24, 28))
    leaf = logits.clone().requires_grad_()
    loss, gradient = loss_and_gradient(lambda *a: plain_map(*a).sum(), logits.double(), labels, weight.double())
    confidence = kernels.upsample_pseudo_label(logits, (24, 28), 0.5, backend=backend)[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        value = kernels.upsample_cross_entropy(leaf, labels, weight, reduction="none", backend=backend).sum()
        value.backward()
        assert torch.equal(kernels.upsample_pseudo_label(logits, (24, 28), 0.5, backend=backend)[1], confidence)
    assert_near(value.detach(), loss)
    assert_near(leaf.grad, gradient)


@each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsample_pseudo_label_equals_softmax_of_interpolated_logits(shape, backend):
    logits = kernel_inputs(*shape)[0]
    up = F.interpolate(logits.double(), shape[3], mode="bilinear", align_corners=False)
    confidence, label = up.softmax(1).max(1)
    threshold = confidence.median().float() + 1e-4
    for level in (threshold, threshold.item()):
        ours = kernels.upsample_pseudo_label(logits, shape[3], level, backend=backend)
        assert ours[0].dtype == torch.uint8 and torch.equal(ours[0].long(), label)
        assert_near(ours[1], confidence)
        assert ours[2].shape == () and abs(ours[2] - (confidence >= threshold).double().mean()) < 1e-6


@each_backend
def test_upsample_pseudo_label_gives_equal_classes_the_lowest_id(backend):
    logits = torch.zeros(1, 6, 2, 2, device=DEVICE)
    logits[:, 2] = logits[:, 4] = 1
    label, confidence, fraction = kernels.upsample_pseudo_label(logits, (4, 4), 0.99, backend=backend)
    assert (label == 2).all() and fraction == 0
    everything = kernels.upsample_pseudo_label(logits, (4, 4), float(confidence.min()), backend=backend)[2]
    assert everything == 1                                      # >=, not >


def test_kernels_refuse_wrong_input_in_one_line(monkeypatch):
    logits, labels, weight = (x.cpu() for x in kernel_inputs(1, 19, (4, 4), (8, 8)))
    for bad, message in ((19, "id 19"), (-1, "id -1")):
        wrong = labels.clone()
        wrong[0, 3, 3] = bad
        with pytest.raises(ValueError, match=message):
            kernels.upsample_cross_entropy(logits, wrong)
    with pytest.raises(ValueError, match="id 200"):
        kernels.upsample_cross_entropy(logits, torch.full((1, 8, 8), 200, dtype=torch.uint8))
    for arguments in ((labels[0],), (labels.int(),), (labels, weight[:, :4]), (labels, None, 255, "sum"),
                      (labels, None, 255, "mean", "cuda")):
        with pytest.raises(ValueError):
            kernels.upsample_cross_entropy(logits, *arguments)
    with pytest.raises(ValueError, match="300 classes"):
        kernels.upsample_pseudo_label(torch.zeros(1, 300, 2, 2), (4, 4), 0.5)
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        kernels.upsample_cross_entropy(logits, labels, backend="triton")
    assert kernels.upsample_cross_entropy(logits, labels).isfinite()                    # auto needs no triton


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux' /proc")
def test_upsample_cross_entropy_memory_is_an_eighth_of_eager():
    code = """if True:                                               # not ru_maxrss: it begins with the parent's peak
        import re, torch, torch.nn.functional as F, kernels
        def plain(x, y):
            F.cross_entropy(F.interpolate(x, y.shape[1:], mode="bilinear"), y, ignore_index=255).backward()
        def ours(x, y):
            kernels.upsample_cross_entropy(x, y, backend="torch").backward()
        def kilobytes(name):
            return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        def extra(side, x, y):
            open("/proc/self/clear_refs", "w").write("5")       # the peak starts again from here
            before = kilobytes("VmRSS")
            side(x, y)
            return kilobytes("VmHWM") - before
        for side in (plain, ours):                              # libraries are up before anything is measured
            side(torch.randn(1, 19, 8, 8, requires_grad=True), torch.randint(19, (1, 32, 32)))
        x, y = torch.randn(8, 19, 128, 128, requires_grad=True), torch.randint(19, (8, 512, 512))
        print(extra(ours, x, y), extra(plain, x.detach().requires_grad_(), y))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=os.path.dirname(os.path.abspath(kernels.__file__)),
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ours, plain = map(int, done.stdout.split())
    assert 0 < 8 * ours <= plain, f"ours {ours} KB, eager {plain} KB"


CORRELATIONS = [(2, 320, (3, 5), 19), (1, 33, (13, 7), 150), (2, 8, (9, 10), 1)]            # several tiles of each axis


def exact_unit(x, dim):
    return x / (x.square().sum(dim, keepdim=True) + 1e-12).sqrt()


def plain_correlation(features, text, scale):
    return scale * torch.einsum("bchw,kc->bkhw", exact_unit(features, 1), exact_unit(text, 1))


def correlation_inputs(B, C, size, K, zeros=True):
    generator = torch.Generator().manual_seed(C + K)
    features, text = torch.randn(B, C, *size, generator=generator), torch.randn(K, C, generator=generator)
    features *= torch.rand(B, 1, *size, generator=generator) + 0.1      # given lengths must not matter
    if zeros:
        features[-1, :, 1, 2] = 0
        text[K // 2:K // 2 + (K > 1)] = 0
    upstream = torch.randn(B, K, *size, generator=generator)
    upstream += 5 * plain_correlation(features, text, 1.0)              # else the scale's gradient is cancellation only
    return [x.to(DEVICE) for x in (features, text, torch.tensor(14.0), upstream)]


def correlate(operator, features, text, scale, upstream, **options):
    """-> value and the gradients to features, text and scale."""
    leaves = [x.detach().requires_grad_() for x in (features, text, scale)]
    value = operator(*leaves, **options)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def assert_correlations_near(ours, features, text, scale, upstream, limit=1e-5):
    features, text = features.double(), text.double()
    value, *gradients = correlate(plain_correlation, features, text, scale.double(), upstream)
    assert_near(ours[0], value, limit)
    assert ours[0].dtype == torch.float32
    norms = [(x.square().sum(1, keepdim=True) + 1e-12).sqrt() for x in (features, text)]
    for our, gradient, norm in zip(ours[1:], gradients, norms + [1]):   # a zero vector's is 1e6 times the others'
        assert our.isfinite().all()
        assert_near(our * norm, gradient * norm, limit)


@each_backend
@pytest.mark.parametrize("shape", CORRELATIONS, ids=str)
def test_text_correlation_equals_float64(shape, backend, monkeypatch):
    monkeypatch.setattr(kernels, "RUNS", 2)                     # a program has several tiles
    inputs = correlation_inputs(*shape)
    ours, again = (correlate(kernels.text_correlation, *inputs, backend=backend) for _ in range(2))
    assert_correlations_near(ours, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))                          # bit for bit
    assert (ours[0][-1, :, 1, 2] == 0).all() and (shape[3] == 1 or (ours[0][:, shape[3] // 2] == 0).all())


@each_backend
def test_text_correlation_of_any_strides(backend):
    features, *others = correlation_inputs(2, 24, (5, 6), 11)
    wide = torch.full((2, 24, 7, 9), float("nan"), device=DEVICE)                       # read outside: NaN
    wide[:, :, 1:6, 2:8] = features
    for strided in (features.contiguous(memory_format=torch.channels_last), wide[:, :, 1:6, 2:8],
                    wide.contiguous(memory_format=torch.channels_last)[:, :, 1:6, 2:8],
                    features.transpose(2, 3).contiguous().transpose(2, 3), features[:1].expand(2, -1, -1, -1)):
        ours = correlate(kernels.text_correlation, strided, *others, backend=backend)
        assert_correlations_near(ours, strided, *others)
        assert ours[1].is_contiguous(memory_format=torch.channels_last) == (strided.stride(1) == 1)


def test_text_correlation_over_several_chunks():
    inputs = correlation_inputs(2, 64, (100, 70), 5)
    assert len(list(kernels._feature_chunks(inputs[0]))) > 2
    assert_correlations_near(correlate(kernels.text_correlation, *inputs, backend="torch"), *inputs)


@each_backend
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_text_correlation_of_16_bit_features(dtype, limit, backend):
    features, *others = correlation_inputs(1, 40, (5, 6), 19, zeros=False)
    ours = correlate(kernels.text_correlation, features.to(dtype), *others, backend=backend)
    assert ours[1].dtype == dtype and ours[2].dtype == torch.float32
    assert_correlations_near(ours, features.to(dtype), *others, limit=limit)
    if DEVICE == "cpu":                                         # only the features and their gradient are rounded
        assert_near(ours[0], plain_correlation(features.to(dtype).double(), *(x.double() for x in others[:2])))


@each_backend
def test_text_correlation_is_float32_under_autocast(backend):
    inputs = correlation_inputs(1, 40, (5, 6), 19)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = correlate(kernels.text_correlation, *inputs, backend=backend)
    assert_correlations_near(ours, *inputs)


@each_backend
def test_text_correlation_options(backend):
    features, text, scale, _ = correlation_inputs(1, 40, (5, 6), 19)
    value, order = kernels.text_correlation(features, text, scale, backend=backend), torch.randperm(19)
    assert torch.equal(kernels.text_correlation(features, text, 14.0, backend=backend), value)
    assert_near(kernels.text_correlation(features, text[order], scale, backend=backend), value[:, order], 1e-6)
    assert value.abs().max() <= 14.0001
    for arguments in ((features, text[:, 1:], 1), (features[0], text, 1), (features, text[0], 1),
                      (features, text[:1].expand(257, -1), 1), (features, text, 1, "cuda")):
        with pytest.raises(ValueError):
            kernels.text_correlation(*arguments)


def test_text_correlation_makes_no_feature_sized_temporary():
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [x for x in (args, result) for x in torch.utils._pytree.tree_leaves(x) if torch.is_tensor(x)]
            made.extend(x.untyped_storage() for x in tensors if x.numel())
            return result

    for layout in (torch.contiguous_format, torch.channels_last):
        features, *others = correlation_inputs(4, 64, (96, 96), 5)
        features = features.contiguous(memory_format=layout).requires_grad_()
        made.clear()
        with Watch():
            kernels.text_correlation(features, *others[:2], backend="torch").backward(others[2])
        size = features.untyped_storage().nbytes()
        known = {x.untyped_storage().data_ptr() for x in (features, features.grad)}
        others = {x.data_ptr(): x.nbytes() for x in made if x.data_ptr() not in known}
        assert features.grad.shape == features.shape and 0 < max(others.values()) <= size / 8


FORMS = ["supcon", "per_positive"]
each_form = pytest.mark.parametrize("form", FORMS)


def plain_nce(q, k, yq, yk, wq=None, wk=None, tau=0.1, form="supcon", exclude_self=False):
    known = (yq[:, None] != 255) & (yk != 255) & ~(exclude_self & torch.ones_like(yq[:, None] == yk).tril().triu())
    same = yq[:, None] == yk
    live = ((known & same).any(1) & (known & ~same).any(1)).nonzero()[:, 0]
    known, same, s = known[live], same[live], (q @ k.t() / tau)[live]
    if form == "supcon":
        loss = s.masked_fill(~known, -torch.inf).logsumexp(1, keepdim=True) - s
    else:
        loss = F.softplus(s.masked_fill(~known | same, -torch.inf).logsumexp(1, keepdim=True) - s)
    loss = (loss * (known & same) * (1 if wk is None else wk)).sum(1) / (known & same).sum(1)
    return q.new_zeros(len(q)).index_put((live,), loss * (1 if wq is None else wq[live]))


def nce_inputs(N, M, C, classes=5, dtype=torch.float32):
    """-> q, k, labels with 255 and with a class that is present once, weights with zeros, upstream."""
    generator = torch.Generator().manual_seed(N + M + C)
    q, k = (F.normalize(torch.randn(n, C, generator=generator), dim=1).to(dtype) for n in (N, M))
    yq, yk = (torch.randint(classes, (n,), generator=generator) for n in (N, M))
    for y in (yq, yk):
        y[::7], y[5] = 255, 250
    wq, wk = (torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.7) for n in (N, M))
    return [x.to(DEVICE) for x in (q, k, yq, yk, wq, wk, torch.rand(N, generator=generator) + 0.2)]


def contrast(operator, q, k, *others, upstream, **options):
    """-> value and the gradients to q and k; to both at once where they are the same tensor."""
    leaves = [x.detach().requires_grad_() for x in ([q] if q is k else [q, k])]
    value = operator(leaves[0], leaves[-1], *others, **options)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def assert_contrasts_near(ours, q, k, yq, yk, wq, wk, upstream, limit=1e-5, **options):
    same, q = q is k, q.double()
    inputs = q, q if same else k.double(), yq, yk, wq.double(), wk.double()
    exact = contrast(plain_nce, *inputs, upstream=upstream, **options)
    assert ours[0].dtype == torch.float32
    for our, reference in zip(ours, exact, strict=True):
        assert_near(our, reference, limit)


@each_backend
@each_form
@pytest.mark.parametrize("N, M, C, classes", [(250, 237, 64, 11), (130, 70, 320, 2)])
def test_pixel_nce_equals_float64(N, M, C, classes, form, backend):
    *inputs, upstream = nce_inputs(N, M, C, classes)
    kept = [x.clone() for x in inputs]
    options = {"form": form, "backend": backend}
    ours, again = (contrast(kernels.pixel_nce, *inputs, upstream=upstream, **options) for _ in range(2))
    assert_contrasts_near(ours, *inputs, upstream, form=form)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))                          # bit for bit
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs))                         # inputs are left alone
    assert (ours[0][inputs[2] == 255] == 0).all() and (ours[1][inputs[2] == 255] == 0).all()
    mean = torch.full_like(upstream, 1 / N)                     # one number for all rows: the torch path's short cut
    assert_contrasts_near(contrast(kernels.pixel_nce, *inputs, upstream=mean, **options), *inputs, mean, form=form)


@each_backend
@each_form
def test_pixel_nce_without_itself(form, backend):
    q, k, yq, yk, wq, _, upstream = nce_inputs(200, 200, 256)
    options = {"form": form, "exclude_self": True, "tau": 0.2}
    ours = contrast(kernels.pixel_nce, q, q, yq.byte(), yq.int(), wq, wq, backend=backend, upstream=upstream, **options)
    assert_contrasts_near(ours, q, q, yq, yq, wq, wq, upstream, **options)
    assert ours[0][5] == 0                                      # the class that is present once
    other = yk.roll(3)                                          # its own key may be a negative, or ignored
    ours = contrast(kernels.pixel_nce, q, k, yq, other, backend=backend, upstream=upstream, **options)
    assert_contrasts_near(ours, q, k, yq, other, torch.ones_like(wq), torch.ones_like(wq), upstream, **options)


@each_form
def test_pixel_nce_over_several_chunks(form):
    *inputs, upstream = nce_inputs(700, 5000, 16, 40)
    ours = contrast(kernels.pixel_nce, *inputs, form=form, backend="torch", upstream=upstream)
    assert_contrasts_near(ours, *inputs, upstream, form=form)


@each_backend
@each_form
def test_pixel_nce_with_nothing_to_contrast_is_zero_with_a_graph(form, backend):
    q, k, yq, yk, wq, wk, _ = nce_inputs(40, 30, 16)
    q[0], k[0] = float("nan"), float("inf")                     # ignored: nothing of them may be read
    assert yq[0] == yk[0] == 255
    for n, m, a, b in ((40, 30, yq * 0, yk * 0), (40, 30, yq * 0, yk * 0 + 1), (40, 30, yq, yk * 0 + 255),
                       (40, 30, yq * 0 + 255, yk), (0, 30, yq, yk), (40, 0, yq, yk), (0, 0, yq, yk)):
        a, b = a.clone(), b.clone()
        a[0] = b[0] = 255
        leaves = [x.clone().requires_grad_() for x in (q[:n], k[:m])]
        value = kernels.pixel_nce(*leaves, a[:n], b[:m], wq[:n], wk[:m], form=form, backend=backend)
        assert value.shape == (n,) and (value == 0).all() and value.grad_fn is not None
        value.sum().backward()
        assert all((x.grad == 0).all() for x in leaves)
    ours = contrast(kernels.pixel_nce, q, k, yq, yk, form=form, backend=backend, upstream=torch.ones_like(wq))
    assert all(x.isfinite().all() for x in ours) and (ours[1][0] == 0).all() and (ours[2][0] == 0).all()


@each_backend
@each_form
def test_pixel_nce_of_large_logits(form, backend):
    *inputs, upstream = nce_inputs(90, 80, 32)
    inputs[0], inputs[1] = 40 * inputs[0], 50 * inputs[1]       # logits up to 20,000, which float32 rounds to 0.001
    ours = contrast(kernels.pixel_nce, *inputs, form=form, backend=backend, upstream=upstream)
    assert_contrasts_near(ours, *inputs, upstream, limit=2e-3, form=form)


@each_backend
def test_pixel_nce_skips_gradients_that_nobody_needs(backend, monkeypatch):
    q, k, *others, upstream = nce_inputs(100, 90, 16)
    reference = contrast(kernels.pixel_nce, q, k, *others, backend=backend, upstream=upstream)
    sweep, gradient_sweep, asked = getattr(kernels, f"_{backend}_nce"), f"_{backend}_nce_gradient", []
    monkeypatch.setattr(kernels, f"_{backend}_nce", lambda *a: (asked.append(a[-2:]), sweep(*a))[1])
    monkeypatch.setattr(kernels, gradient_sweep, lambda *a: pytest.fail("gradients to detached keys"))
    leaf = q.clone().requires_grad_()
    value = kernels.pixel_nce(leaf, k, *others, backend=backend)
    assert torch.equal(torch.autograd.grad(value, leaf, upstream)[0], reference[1])
    with torch.no_grad():
        assert torch.equal(kernels.pixel_nce(q, k, *others, backend=backend), reference[0])
    assert asked == [(True, False), (False, False)]
    monkeypatch.undo()
    leaf = k.clone().requires_grad_()
    value = kernels.pixel_nce(q, leaf, *others, backend=backend)
    assert torch.equal(torch.autograd.grad(value, leaf, upstream)[0], reference[2])


@each_backend
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_pixel_nce_of_16_bit_features(dtype, limit, backend):
    *inputs, upstream = nce_inputs(100, 90, 40, dtype=dtype)
    ours = contrast(kernels.pixel_nce, *inputs, form="per_positive", backend=backend, upstream=upstream)
    assert ours[1].dtype == ours[2].dtype == dtype
    assert_contrasts_near(ours, *inputs, upstream, limit=limit, form="per_positive")
    if DEVICE == "cpu":                                         # only the features and their gradients are rounded
        exact = plain_nce(*(x.double() if x.is_floating_point() else x for x in inputs), form="per_positive")
        assert_near(ours[0], exact)


@each_backend
def test_pixel_nce_options(backend):
    q, k, yq, yk, wq, wk, upstream = nce_inputs(100, 90, 40)
    reference = contrast(kernels.pixel_nce, q, k, yq, yk, wq, wk, backend=backend, upstream=upstream)
    strided = [torch.stack([x, x * 0 + 9], -1)[..., 0] for x in (q.t().contiguous().t(), k, yq, yk, wq, wk)]
    tau = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):                # backward too
        ours = contrast(kernels.pixel_nce, *strided, tau=tau, backend=backend, upstream=upstream)
    for a, b in zip(ours, reference):
        assert_near(a, b, 1e-6)
    assert kernels.pixel_nce(q, k, yq, yk, tau=tau, backend=backend).grad_fn is None    # no gradient to tau
    many = [torch.where(y == 255, 255, y - 3 + 1000 * (y > 4)) for y in (yq, yk)]       # any ids, in the same order
    ours = contrast(kernels.pixel_nce, q, k, *many, wq, wk, backend=backend, upstream=upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference))


def test_pixel_nce_refuses_wrong_input_in_one_line():
    q, k, yq, yk, wq, wk, _ = (x.cpu() for x in nce_inputs(20, 16, 8))
    for message, arguments, options in (
            ("must be", (q[:, 1:], k, yq, yk), {}), ("must be", (q[0], k, yq, yk), {}),
            ("yq is", (q, k, yq[1:], yk), {}), ("yk is", (q, k, yq, yk[:, None]), {}),
            ("yk is", (q, k, yq, yk.float()), {}), ("yq is", (q, k, yq == 1, yk), {}),
            ("wq is", (q, k, yq, yk, wq[1:]), {}), ("wk is", (q, k, yq, yk, wq, wk[None]), {}),
            ("tau", (q, k, yq, yk), {"tau": 0.0}), ("tau", (q, k, yq, yk), {"tau": float("nan")}),
            ("tau", (q, k, yq, yk), {"tau": torch.ones(2)}), ("form", (q, k, yq, yk), {"form": "out"}),
            ("exclude_self", (q, k, yq, yk), {"exclude_self": True}), ("backend", (q, k, yq, yk), {"backend": "cuda"})):
        with pytest.raises(ValueError, match=message) as error:
            kernels.pixel_nce(*arguments, **options)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux' /proc")
def test_pixel_nce_makes_no_matrix_of_logits():
    code = """if True:
        import re, torch, kernels
        def kilobytes(name):
            return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        def extra(n, C):
            y, q, k = torch.arange(n) * 19 // n, *(torch.randn(n, C, requires_grad=True) for _ in range(2))
            open("/proc/self/clear_refs", "w").write("5")       # as for the cross-entropy
            before = kilobytes("VmRSS")
            kernels.pixel_nce(q, k, y, y, form="per_positive", backend="torch").mean().backward()
            return kilobytes("VmHWM") - before
        extra(64, 16)
        print(extra(16384, 256))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                          cwd=os.path.dirname(os.path.abspath(kernels.__file__)),
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 200 * 1024, done.stdout       # KB; one N x M matrix of float32 would be 1 GiB


# ---------------------------------------------------------------------------------------------------------------------
# eval.py

NAMES19 = CLASS_SPACES["cityscapes19"]


class Pointwise(torch.nn.Module):
    """Sees each pixel alone, stride 1: the likeliest of K classes is red * (K - 1), rounded."""

    def __init__(self, classes=4):
        super().__init__()
        self.num_classes, self.conv = classes, torch.nn.Conv2d(3, classes, 1)
        self.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1))
        k, rest = torch.arange(classes), torch.zeros(classes)
        with torch.no_grad():
            self.conv.weight.copy_(torch.stack([0.2 * k * (classes - 1), rest, rest], 1)[..., None, None])  # (K,3,1,1)
            self.conv.bias.copy_(-0.1 * k ** 2)

    heads, language = ("plain",), None

    def forward(self, x, head="plain"):
        return Output(self.conv(x), x, [x])


class MadeImages:
    """Random images (24 x 32) and labels of another size for each image, one class never used, some 255."""

    def __init__(self, n=5, names=("a", "b", "c", "d"), labeled=True, spec="made", size=(24, 32), split="val"):
        self.n, self.classes, self.labeled, self.spec, self.split = n, tuple(names), labeled, spec, split
        self.size, self.names = size, [f"town_{i:06d}_000019" for i in range(n)]
        self.files = [(Path(f"images/{name}_leftImg8bit.png"), None) for name in self.names]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        image = torch.from_numpy(rng.integers(0, 256, (3, *self.size), dtype=np.uint8))
        label = rng.integers(0, 3, (40 + i, 50), dtype=np.uint8)
        label[:5] = 255
        return {"image": image, "label": torch.from_numpy(label) if self.labeled else None, "name": self.names[i]}


def test_confusion_equals_a_plain_loop():
    K, rng = 5, np.random.default_rng(0)
    pred, label = rng.integers(0, K, (2, 13, 17)), rng.integers(0, K, (2, 13, 17))
    label[rng.random(label.shape) < 0.2] = 255
    expected = np.zeros((K, K), np.int64)
    for p, t in zip(pred.flat, label.flat):
        if t != 255:
            expected[t, p] += 1
    for dtype in (torch.uint8, torch.int64):
        got = evaluation.confusion(torch.tensor(pred, dtype=dtype), torch.tensor(label, dtype=dtype), K)
        assert got.dtype == torch.int64 and torch.equal(got, torch.from_numpy(expected))
    assert evaluation.confusion(torch.zeros(3, 3).byte(), torch.full((3, 3), 255).byte(), K).sum() == 0
    big = evaluation.confusion(torch.tensor([[254]]).byte(), torch.tensor([[254]]).byte(), 255)
    assert big[254, 254] == 1 and big.sum() == 1  # the most classes that uint8 labels can hold beside 255
    for bad in (K, K + 3, 254):
        with pytest.raises(ValueError, match="only 255"):
            evaluation.confusion(torch.zeros(2, 2).byte(), torch.full((2, 2), bad).byte(), K)


def test_scores_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: mIoU not compared with it")
    rng = np.random.default_rng(1)
    pred, label = rng.integers(0, 6, 999), rng.integers(0, 6, 999)
    ours = evaluation.scores(evaluation.confusion(torch.tensor(pred), torch.tensor(label), 6), list("abcdef"))
    assert ours["miou"] == pytest.approx(100 * metrics.jaccard_score(label, pred, average="macro"))
    assert list(ours["iou"].values()) == pytest.approx(list(100 * metrics.jaccard_score(label, pred, average=None)))
    assert ours["accuracy"] == pytest.approx(100 * metrics.accuracy_score(label, pred))


def test_scores_leave_out_and_name_absent_classes():
    matrix = torch.diag(torch.tensor([7, 5, 0, 0]))
    matrix[0, 3] = 3  # class 3 is only predicted: IoU 0, not absent
    result = evaluation.scores(matrix, ["a", "b", "c", "d"])
    assert result["iou"] == {"a": pytest.approx(70), "b": pytest.approx(100), "c": None, "d": 0}
    assert result["absent"] == ["c"] and result["miou"] == pytest.approx(170 / 3)
    assert result["accuracy"] == pytest.approx(80) and "miou16" not in result
    text = evaluation.format_scores(result)
    assert "56.67" in text and "3 classes" in text and text.endswith("left out of the mean: c")
    nothing = evaluation.scores(torch.zeros(2, 2), ["a", "b"])
    assert nothing["miou"] is None and nothing["accuracy"] is None and json.dumps(nothing)


def test_scores_over_16_and_13_classes():
    matrix = torch.diag(torch.arange(1, 20))
    matrix[:, 0] += 5  # some of every class is taken for road
    result = evaluation.scores(matrix, NAMES19)
    missing16, missing13 = {9, 14, 16}, {9, 14, 16, 3, 4, 5}
    iou = list(result["iou"].values())
    for key, missing in (("miou", set()), ("miou16", missing16), ("miou13", missing13)):
        assert result[key] == pytest.approx(np.mean([v for i, v in enumerate(iou) if i not in missing]))
    matrix[11], matrix[:, 11] = 0, 0  # person absent: left out of the subsets' means too
    result = evaluation.scores(matrix, NAMES19)
    iou = list(result["iou"].values())
    assert result["miou13"] == pytest.approx(np.mean([v for i, v in enumerate(iou) if i not in missing13 | {11}]))


@pytest.mark.parametrize("size", [(16, 16), (9, 12), (16, 40), (33, 7), (37, 50), (1, 1), (5, 7)])
@pytest.mark.parametrize("stride", [None, 5, 16])
def test_windows_equal_the_whole_image_for_a_pointwise_network(size, stride):
    model, image = Pointwise(), torch.rand(2, 3, *size)
    whole = evaluation.predict(model, image)
    assert whole.shape == (2, 4, *size) and whole.dtype == torch.float32
    assert torch.allclose(whole.sum(1), torch.ones(2, *size), atol=1e-5)
    slid = evaluation.predict(model, image, window=16, stride=stride)
    assert torch.allclose(slid, whole, atol=1e-5)
    other = evaluation.predict(model, image, size=(11, 13), window=16, stride=stride)
    assert torch.allclose(other, evaluation.predict(model, image, size=(11, 13)), atol=1e-5)


def test_overlapping_windows_average_logits_and_stay_inside():
    class Counting(Pointwise):
        def forward(self, x, head="plain"):
            self.seen.append(tuple(x.shape[2:]))
            return Output(torch.full((1, 4, 1, 1), float(len(self.seen))), x, [x])

    model = Counting()
    model.seen = []
    logits = evaluation.raw_logits(model, torch.rand(1, 3, 8, 20), window=8)
    assert model.seen == [(8, 8)] * 4  # starts 0, 4, 8, 12: the stride is half of the window
    assert logits[0, 0, 0, [0, 3, 4, 8, 12, 16, 19]].tolist() == [1, 1, 1.5, 2.5, 3.5, 4, 4]
    assert evaluation.starts(21, 8, 4) == [0, 4, 8, 12, 13] and evaluation.starts(8, 8, 4) == [0]
    for stride in (9, -1):
        with pytest.raises(ValueError, match="uncovered"):
            evaluation.predict(model, torch.rand(1, 3, 8, 20), window=8, stride=stride)


@pytest.mark.parametrize("window", [None, 8])
def test_flip_is_symmetric(window):
    torch.manual_seed(0)
    model = Pointwise()
    model.conv = torch.nn.Conv2d(3, 4, 3, padding=1)  # knows left from right
    image = torch.rand(1, 3, 12, 20)
    plain, mirrored = (evaluation.predict(model, x, window=window) for x in (image, image.flip(-1)))
    assert not torch.allclose(mirrored.flip(-1), plain, atol=1e-3)
    plain, mirrored = (evaluation.predict(model, x, window=window, flip=True) for x in (image, image.flip(-1)))
    assert torch.allclose(mirrored.flip(-1), plain, atol=1e-6)
    logits = [evaluation.raw_logits(model, x) for x in (image, image.flip(-1))]
    assert window or torch.allclose(plain, ((logits[0] + logits[1].flip(-1)) / 2).softmax(1), atol=1e-6)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (33, 47), (64, 32)])
def test_a_real_network_predicts_any_size(size):
    torch.manual_seed(0)
    model, image = Segmenter("mit_b0", "segformer", 3, channels=16).eval(), torch.rand(1, 3, *size)
    for window in (None, 32):
        for flip in (False, True):
            probabilities = evaluation.predict(model, image, window=window, flip=flip)
            label = evaluation.predict_labels(model, image, window=window, flip=flip)
            assert probabilities.shape == (1, 3, *size) and label.shape == (1, *size) and label.dtype == torch.uint8
            top2 = probabilities.topk(2, 1).values
            clear = (top2[:, 0] - top2[:, 1]) > 1e-5
            assert torch.equal(probabilities.argmax(1)[clear], label.long()[clear])


def test_evaluate_counts_every_pixel_once_and_restores_the_mode(tmp_path):
    model, data = Pointwise(), MadeImages()
    model.extra = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm2d(3))
    model.train()
    model.extra[0].eval()  # as in a teacher: a mixture of modes
    modes = [m.training for m in model.modules()]
    result = evaluation.evaluate(model, data, save=tmp_path)
    assert [m.training for m in model.modules()] == modes
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for item in (data[i] for i in range(5)):
        probabilities = evaluation.predict(model, item["image"][None] / 255, size=item["label"].shape)
        expected += evaluation.confusion(probabilities.argmax(1), item["label"][None], 4)
    assert result["miou"] == pytest.approx(evaluation.scores(expected, data.classes)["miou"])
    assert result["images"] == 5 and result["images_per_s"] > 0 and json.dumps(result)
    assert len(list(tmp_path.glob("town_*_000019.png"))) == 5
    with pytest.raises(DataError, match="no labels"):
        evaluation.evaluate(model, MadeImages(labeled=False))

    class Ignored(MadeImages):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"label": torch.full((4, 4), 255, dtype=torch.uint8)}
    with pytest.raises(DataError, match="ignored pixels only"):
        evaluation.evaluate(model, Ignored())

    class Failing(MadeImages):
        def __getitem__(self, i):
            raise DataError("x.png: broken")
    with pytest.raises(DataError, match="x.png"):
        evaluation.evaluate(model, Failing())
    assert [m.training for m in model.modules()] == modes


def test_two_processes_evaluate_as_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys\nimport torch\nfrom test_all import MadeImages, Pointwise\nimport eval as evaluation\n"
        "if 'RANK' in os.environ:\n    torch.distributed.init_process_group('gloo')\n"
        "r = evaluation.evaluate(Pointwise(), MadeImages())\n"
        "with open(sys.argv[1] + os.environ.get('RANK', 'one'), 'w') as file:\n"
        "    json.dump([r['iou'], r['accuracy'], r['images']], file)\n"
        "if 'RANK' in os.environ:\n    torch.distributed.destroy_process_group()\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    out = str(tmp_path / "scores_")
    subprocess.run([sys.executable, str(script), out], check=True, env=env)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(script), out], check=True, env=env, capture_output=True)
    one, *two = [json.loads((tmp_path / f"scores_{r}").read_text()) for r in ("one", 0, 1)]
    assert two == [one, one]


def test_adabn_statistics_are_those_of_the_activations():
    torch.manual_seed(0)
    model, data = Pointwise(), MadeImages(n=16)
    model.conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.9))
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    one = evaluation.adapt_batchnorm(model, data, images=16, batch=16).conv[1]
    images = torch.stack([data[i]["image"] for i in range(16)]).float() / 255
    act = model.conv[0](images)
    assert torch.allclose(one.running_mean, act.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(one.running_var, act.var((0, 2, 3)), rtol=1e-5)
    four = evaluation.adapt_batchnorm(model, data, images=16, batch=4).conv[1]
    parts = act.split(4)
    assert torch.allclose(four.running_mean, act.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(four.running_var, torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0), rtol=1e-5)
    few = evaluation.adapt_batchnorm(model, data, images=3, batch=8)  # images 0, 8 and 15
    assert torch.allclose(few.conv[1].running_mean, act[[0, 8, 15]].mean((0, 2, 3)), atol=1e-6)
    assert not any(m.training for m in few.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()) and model.training  # the original


def test_adabn_without_batchnorm_says_so(capsys):
    model = Pointwise()
    assert evaluation.adapt_batchnorm(model, MadeImages()) is model
    assert "no BatchNorm" in capsys.readouterr().err


def test_pictures():
    colors = np.array([[10, 20, 30], [200, 100, 0]], np.uint8)
    label = np.array([[0, 1], [255, 1]], np.uint8)
    drawn = evaluation.colorize(label, colors)
    assert drawn[0, 0].tolist() == [10, 20, 30] and drawn[1, 0].tolist() == [0, 0, 0] and drawn.dtype == np.uint8
    picture = evaluation.as_picture(torch.full((3, 2, 2), 100 / 255))
    assert np.array_equal(picture, evaluation.as_picture(torch.full((3, 2, 2), 100, dtype=torch.uint8)))
    mixed = evaluation.overlay(picture, label, colors)
    assert mixed[0, 1].tolist() == [150, 100, 50] and mixed[1, 0].tolist() == [100, 100, 100]
    sheet = evaluation.grid([[picture, drawn], [mixed, mixed]], ["image", "label"])
    assert sheet.size == (2 + 4 + 2, 14 + 2 + 4 + 2) and sheet.getpixel((6, 14)) == (10, 20, 30)
    wide = evaluation.panel(np.zeros((20, 30, 3), np.uint8), label, label, colors)
    assert wide.size == (4 * 30 + 3 * 4, 14 + 20) and wide.getpixel((34, 14)) == (10, 20, 30)
    assert evaluation.panel(np.zeros((20, 30, 3), np.uint8), None, label, colors).width == 3 * 30 + 2 * 4


def test_panel_of_a_training_step_leaves_the_network_alone():
    model = Pointwise()
    model.conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    views = {"source": torch.rand(5, 3, 8, 8), "label": torch.full((5, 8, 8), 255, dtype=torch.uint8)}
    sheet = evaluation.training_panel(model, views, "abcd")
    assert sheet.size == (3 * 12 - 4, 14 + 4 * 12 - 4)  # three columns, at most four rows
    assert model.conv[1].training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_submission_holds_the_ids_and_names_of_the_server(tmp_path):
    model = Pointwise(19)
    data = MadeImages(n=1, names=NAMES19, labeled=False, spec="cityscapes:x", split="test")
    assert evaluation.submit(model, data, tmp_path / "city") == 1
    files = sorted(p.name for p in (tmp_path / "city").iterdir())
    assert files == ["town_000000_000019_leftImg8bit.png"]
    written = Image.open(tmp_path / "city" / files[0])
    assert written.mode == "L" and written.size == (2048, 1024)
    train_ids = evaluation.predict_labels(model, data[0]["image"][None] / 255, (1024, 2048))[0].numpy()
    ids = {0: 7, 1: 8, 2: 11, 3: 12, 4: 13, 5: 17, 6: 19, 7: 20, 8: 21, 9: 22, 10: 23, 11: 24, 12: 25, 13: 26, 14: 27,
           15: 28, 16: 31, 17: 32, 18: 33}
    assert np.array_equal(np.array(written), np.vectorize(ids.get)(train_ids)) and len(np.unique(train_ids)) == 19
    data.spec = "acdc:x"
    evaluation.submit(model, data, tmp_path / "acdc")
    acdc = np.array(Image.open(tmp_path / "acdc" / files[0]))
    assert acdc.shape == (1080, 1920) and acdc.max() < 19
    with pytest.raises(DataError, match="not empty"):
        evaluation.submit(model, data, tmp_path / "acdc")
    data.spec, data.files = "cityscapes:x", [(Path("frame1.png"), None), (Path("frame2.png"), None)]
    with pytest.raises(DataError, match="frame1.png"):
        evaluation.submit(model, data, tmp_path / "new")
    data.spec, data.names, data.files = "acdc:x", ["a", "b"], [(Path("a/same.png"), None), (Path("b/same.png"), None)]
    with pytest.raises(DataError, match="same.png"):
        evaluation.submit(model, data, tmp_path / "new")
    for spec, names in (("camvid:x", NAMES19), ("cityscapes:x", ("a", "b", "c"))):
        with pytest.raises(DataError, match="--submit needs"):
            evaluation.submit(model, MadeImages(names=names, spec=spec), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_images_of_any_kind_are_predicted_at_their_own_size(tmp_path):
    model, names, rng = Pointwise(), ("a", "b", "c", "d"), np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    photo = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    photo.save(tmp_path / "in" / "turned.jpg", exif=exif)
    photo.convert("LA").save(tmp_path / "in" / "gray.png")
    photo.convert("P").save(tmp_path / "in" / "twice.png")
    photo.crop((0, 0, 1, 1)).save(tmp_path / "in" / "twice.bmp")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    assert evaluation.predict_images(model, tmp_path / "in", names, tmp_path / "out", size=(64, 48)) == 4
    shapes = {p.name: Image.open(p).size for p in (tmp_path / "out").glob("*_ids.png")}
    assert shapes == {"turned_ids.png": (30, 50), "gray_ids.png": (50, 30), "twice.png_ids.png": (50, 30),
                      "twice.bmp_ids.png": (1, 1)}
    assert Image.open(tmp_path / "out" / "turned_ids.png").getextrema()[1] < 4
    assert Image.open(tmp_path / "out" / "gray_panel.png").width == 3 * 50 + 2 * 4
    evaluation.predict_images(model, tmp_path / "in" / ".." / "in" / "gray.png", names, tmp_path / "single" / "out")
    assert sorted(p.name for p in (tmp_path / "single" / "out").iterdir()) == ["gray_ids.png", "gray_panel.png"]
    png = (tmp_path / "in" / "gray.png").read_bytes()
    for content in (b"", b"<html>", png[:len(png) // 2]):
        (tmp_path / "in" / "broken.png").write_bytes(content)
        with pytest.raises(DataError, match="broken.png.*remove") as error:
            evaluation.predict_images(model, tmp_path / "in" / "broken.png", names, tmp_path / "out")
        assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        evaluation.predict_images(model, tmp_path / "empty", names, tmp_path / "out")


def made_log(folder, recipe, seed, student, teacher, adabn, step=20, finished=True, **flags):
    """A run directory with a log of the given mIoUs (None where a read-out is missing)."""
    def scored(value):
        return None if value is None else {"miou": value, "iou": {"a": value + 10, "b": value - 10, "c": None}}
    events = [{"event": "start", "flags": {"recipe": recipe, "seed": seed, "source": "s", "target": "t", "val": "t",
                                           "steps": step} | flags},
              {"event": "step", "step": 1}]
    if finished:
        events.append({"event": "result", "step": step, "student": scored(student), "teacher": scored(teacher),
                       "adabn": scored(adabn)})
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"event": "st')  # killed while writing
    return folder


def test_table_of_means_spread_and_paired_differences(tmp_path):
    runs = [made_log(tmp_path / f"source{s}", "source", s, 40 + s, None, 42 + 2 * s) for s in (0, 1, 2)]
    runs += [made_log(tmp_path / f"mic{s}", "mic", s, 41, 45 + t, 44) for s, t in ((2, 3), (0, 0), (1, 3))]
    runs[0] = runs[0] / "log.jsonl"
    first, _, second = [[[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines()]
                        for part in evaluation.table(runs).split("\n\n")]
    rows = {tuple(row[:2]): row[2:] for row in first}
    assert rows["recipe", "read-out"] == ["seed 0", "seed 1", "seed 2", "mean ± sd", "minus source AdaBN",
                                          "95 % interval", "pairs"]
    assert rows["source", "adabn"] == ["42.0", "44.0", "46.0", "44.0 ± 2.0", "reference", "-", "3"]
    assert rows["source", "student"][:4] == ["40.0", "41.0", "42.0", "41.0 ± 1.0"]
    assert ("source", "teacher") not in rows
    # teacher 45, 48, 48 against 42, 44, 46: differences 3, 4, 2; sd 1; t(2) = 4.303; 4.303 / sqrt(3) = 2.484
    assert rows["mic", "teacher"] == ["45.0", "48.0", "48.0", "47.0 ± 1.7", "+3.0", "+0.5 to +5.5", "3"]
    iou = {tuple(row[:2]): row[2:] for row in second}
    assert iou["recipe", "read-out"] == ["a", "b", "c"] and iou["mic", "teacher"] == ["57.0", "37.0", "-"]
    assert evaluation.spread([5.0]) == (5.0, None, None)
    assert evaluation.spread([1.0, 3.0]) == pytest.approx((2, 2 ** 0.5, 12.706))


def test_table_of_few_runs_and_wrong_logs(tmp_path):
    one = made_log(tmp_path / "one", "mic", 0, 41, 45, None)
    assert "| mic | teacher | 45.0 | 45.0 ± - | - | - | 0 |" in evaluation.table([one])  # no reference, one seed
    source = made_log(tmp_path / "source", "source", 0, 40, None, 42)
    assert "| mic | teacher | 45.0 | 45.0 ± - | +3.0 | - | 1 |" in evaluation.table([one, source])
    general = made_log(tmp_path / "general", "dg", 0, 43, None, None, target="none")  # the same validation data
    assert "| dg | student | 43.0 | 43.0 ± - | +1.0 | - | 1 |" in evaluation.table([general, source])
    (tmp_path / "text").write_text("no log\n\xff")
    (tmp_path / "foreign").write_text('{"event": "start", "flags": {"a": 1}}\n{"event": "result"}\n')
    for bad, words in ((tmp_path / "foreign", "no log of train.py"), (tmp_path / "last.pt", "a checkpoint"),
                       (made_log(tmp_path / "again", "mic", 0, 1, 1, 1), "second run of mic with seed 0"),
                       (made_log(tmp_path / "long", "mic", 1, 1, 1, 1, step=30), "steps 30 instead of 20"),
                       (made_log(tmp_path / "killed", "mic", 2, 1, 1, 1, finished=False), "no result event"),
                       (tmp_path / "text", "no start event")):
        with pytest.raises(DataError, match=words) as error:
            evaluation.table([one, bad])
        assert str(bad) in str(error.value) and "\n" not in str(error.value)


def test_table_leaves_out_runs_without_scores(tmp_path, capsys):
    one = made_log(tmp_path / "one", "mic", 0, 41, 45, None)
    mine = made_log(tmp_path / "mine", "mic", 1, 0, 0, 0, finished=False, val="none")
    assert evaluation.table([mine, one]) == evaluation.table([one]) and f"{mine}: no scores" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of these runs"):
        evaluation.table([mine], "mic")


def table_rows(text):
    """Cells of the first of a table's parts, keyed by row and read-out."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()]
    return {tuple(row[:2]): row[2:] for row in cells}


def test_table_rows_are_variants(tmp_path):
    changes = [dict(text="../banks/photo.npz"), dict(text="shuffled:/x/banks/photo.npz"), dict(text="stub"),
               dict(text="clip:ViT-B-32/openai"), dict(text="stub", fd=0.0), dict(text="stub", rare=True, fd=0.01),
               dict(text="stub", mask_views=["source", "mix"], fd=0.01, out="elsewhere", world=2)]
    made = [made_log(tmp_path / f"{i}-{seed}", "lcmsm", seed, 40 + i + seed * i, None, None,
                     **dict(fd=0.01, rare=False) | flags)
            for i, flags in enumerate(changes) for seed in (0, 1)]
    names = ["lcmsm --fd 0.01 --no-rare --text photo.npz", "lcmsm --fd 0.01 --no-rare --text shuffled:photo.npz",
             "lcmsm --fd 0.01 --no-rare --text stub", "lcmsm --fd 0.01 --no-rare --text clip:ViT-B-32/openai",
             "lcmsm --fd 0 --no-rare --text stub", "lcmsm --fd 0.01 --rare --text stub",
             "lcmsm --fd 0.01 --no-rare --text stub --mask-views source mix"]
    rows = table_rows(evaluation.table(made))
    assert [row for row, _ in rows][2:] == [n if "views" in n else n + " --mask-views target" for n in names]
    rows = table_rows(evaluation.table(made[:6]))
    assert [row for row, _ in rows][2:] == ["lcmsm --text photo.npz", "lcmsm --text shuffled:photo.npz",
                                            "lcmsm --text stub"]
    assert rows["lcmsm --text stub", "student"][:3] == ["42.0", "44.0", "43.0 ± 1.4"]
    alike = [made_log(tmp_path / f"alike{i}", "lcmsm", 0, 40, None, None, text=text)
             for i, text in enumerate(("a/photo.npz", "b/photo.npz", "b/other.npz"))]
    assert [row for row, _ in table_rows(evaluation.table(alike))][2:] == [
        "lcmsm --text a/photo.npz", "lcmsm --text b/photo.npz", "lcmsm --text other.npz"]
    cells = [made_log(tmp_path / f"cells{i}", "cluda", 0, 40, None, None, contrast_pixels=count)
             for i, count in enumerate(("64/class", "all"))]
    assert [row for row, _ in table_rows(evaluation.table(cells))][2:] == ["cluda --contrast-pixels 64/class",
                                                                          "cluda --contrast-pixels all"]
    with pytest.raises(DataError, match="second run of lcmsm --text stub with seed 0"):
        evaluation.table([*made[:6], made_log(tmp_path / "twice", "lcmsm", 0, 1, 1, 1, text="stub", fd=0.01)])


def test_table_keeps_logs_from_before_a_flag_in_their_row(tmp_path):
    off = dict(language=None, text="auto", spatial_depth=2, mask_views=["target"], teacher_head="plain", extra=0.0,
               fast=False, note="")
    old, new = made_log(tmp_path / "old", "mic", 0, 40, 41, 42), made_log(tmp_path / "new", "mic", 1, 40, 41, 42, **off)
    assert [row for row, _ in table_rows(evaluation.table([old, new]))][2:] == ["mic"] * 3
    on = made_log(tmp_path / "on", "mic", 1, 50, None, None, **off | dict(language="lcmsm", extra=0.5, fast=True))
    assert {row for row, _ in table_rows(evaluation.table([new, old, on]))} == {
        "recipe", "---", "mic --extra 0 --no-fast", "mic --language lcmsm --extra 0.5 --fast"}
    published = sorted((Path(HERE) / "assets/logs").glob("streets-mic-?.jsonl"))  # seed 2's log has more flags
    assert [row for row, _ in table_rows(evaluation.table(published))][2:] == ["mic"] * 3


def test_table_against_a_row(tmp_path, capsys):
    runs = [made_log(tmp_path / f"{text}{s}", "lcmsm", s, 41 + s, 45 + gain * s, None, text=text)
            for text, gain in (("stub", 1), ("bank", 3)) for s in (0, 1, 2)]
    runs.append(made_log(tmp_path / "source", "source", 0, 40, None, 42))
    evaluation.main(["--table", *map(str, runs), "--against", "lcmsm --text stub"])
    rows = table_rows(capsys.readouterr().out)
    assert rows["recipe", "read-out"][4] == "minus lcmsm --text stub"
    assert rows["lcmsm --text stub", "student"][4:] == ["reference", "-", "3"]
    assert rows["lcmsm --text stub", "teacher"][4:] == ["reference", "-", "3"]
    # teacher 45, 48, 51 against 45, 46, 47: differences 0, 2, 4; sd 2; 4.303 * 2 / sqrt(3) = 4.97
    assert rows["lcmsm --text bank", "teacher"][4:] == ["+2.0", "-3.0 to +7.0", "3"]
    assert rows["source", "student"][4:] == ["-1.0", "-", "1"] and rows["source", "adabn"][4:] == ["-", "-", "0"]
    assert table_rows(evaluation.table(runs))["source", "adabn"][4] == "reference"
    for argv, words in ((["--table", *map(str, runs), "--against", "lcmsm"], "'lcmsm': no such row; there are: lcmsm "
                         "--text stub, lcmsm --text bank, source"), (["x.pt", "--against", "mic"], "--table")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


class Painted(MadeImages):
    """Blocks of one class in its colour (K,3), 0..255, plus noise; labels of twice the size, some pixels 255."""

    def __init__(self, colours, n=3, noise=0, size=(24, 32), seed=0, classes=(0, 1, 2), **rest):
        super().__init__(n, size=size, **{"names": ("a", "b", "c"), **rest})
        self.colours, self.noise, self.seed, self.used = np.array(colours), noise, seed, classes

    def __getitem__(self, i):
        (h, w), rng = self.size, np.random.default_rng([self.seed, i])
        blocks = np.resize(np.roll(self.used, i), (-(-h // 8), -(-w // 8)))  # every class in every image
        label = blocks.repeat(8, 0).repeat(8, 1)[:h, :w]
        image = self.colours[label % len(self.colours)] + rng.integers(-self.noise, self.noise + 1, (h, w, 3))
        label = label.repeat(2, 0).repeat(2, 1).astype(np.uint8)
        label[:, :5 * bool(self.noise)] = 255
        return {"image": torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1),  # (h,w,3) -> (3,h,w)
                "label": torch.from_numpy(label) if self.labeled else None, "name": self.names[i]}


AXES = 255 * np.eye(3, dtype=int)  # red, green, blue: what Pointwise passes on as three orthogonal features


def plain_cells(dataset, classes):
    """Unit vectors (n,C) and classes (n,) of a data set's cells under Pointwise: loops over windows, all stored."""
    def windows(length, n):
        return [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
    units, labels = [], []
    for item in (dataset[i] for i in range(len(dataset))):
        image, label = item["image"].numpy() / 255, item["label"].numpy()
        grid = [-(-side // 2) for side in image.shape[1:]]
        for (y0, y1), (v0, v1) in zip(windows(image.shape[1], grid[0]), windows(label.shape[0], grid[0])):
            for (x0, x1), (u0, u1) in zip(windows(image.shape[2], grid[1]), windows(label.shape[1], grid[1])):
                share = [(label[v0:v1, u0:u1] == c).mean() for c in range(classes)]
                if max(share) >= 0.75:
                    vector = image[:, y0:y1, x0:x1].mean((1, 2))
                    units.append(vector / np.linalg.norm(vector))
                    labels.append(int(np.argmax(share)))
    return np.array(units), np.array(labels)


def test_alignment_equals_a_plain_computation_over_stored_cells():
    colours = np.array([[200, 60, 40], [50, 190, 70], [60, 80, 180], [200, 190, 60], [120, 120, 120]])
    names, shared = tuple("abcde"), [0, 1, 2]  # d only in the source, e only in the target
    source = Painted(colours, 4, 60, (23, 31), 0, (0, 1, 2, 3, 1), names=names, spec="painted")
    target = Painted(colours // 5 + [70, 80, 60], 3, 70, (25, 30), 1, (0, 1, 4, 2, 1), names=names)
    net = Pointwise(5).train()
    got = evaluation.alignment(net, source, target)
    (s, ys), (t, yt) = plain_cells(source, 5), plain_cells(target, 5)
    mu = {c: s[ys == c].mean(0) for c in {*ys}}
    mu_t = {c: t[yt == c].mean(0) for c in {*yt}}

    def distance(a, b):
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    def rank(cells):
        p = np.linalg.eigvalsh(np.cov(cells.T, bias=True))
        return np.exp(-sum(x * np.log(x) for x in p / p.sum() if x > 0))

    expected = {c: distance(mu[c], mu_t[c]) for c in shared}
    nearest = np.array([min(mu, key=lambda c: distance(x, mu[c])) for x in t])
    hits = {c: 100 * (nearest[yt == c] == c).mean() for c in shared}
    assert 0 < min(hits.values()) < 100 and got["absent"] == ["d", "e"]
    for c, row in enumerate(got["classes"].values()):
        assert (row["source_cells"], row["target_cells"]) == ((ys == c).sum(), (yt == c).sum())
        assert row["distance"] == (pytest.approx(expected[c], rel=1e-5) if c in shared else None)
        assert row["nearest_accuracy"] == (pytest.approx(hits[c]) if c in shared else None)
    margins = [np.mean([distance(m[a], m[b]) for a in shared for b in shared if a != b]) for m in (mu_t, mu)]
    assert got["distance"] == pytest.approx(np.mean(list(expected.values())), rel=1e-5)
    assert [got["margin"], got["margin_source"]] == pytest.approx(margins, rel=1e-5)
    assert got["ratio"] == pytest.approx(np.mean(list(expected.values())) / margins[0], rel=1e-5)
    assert got["nearest_accuracy"] == pytest.approx(100 * (nearest == yt)[np.isin(yt, shared)].mean())
    assert got["nearest_class_accuracy"] == pytest.approx(np.mean(list(hits.values())))
    assert [got["effective_rank"], got["effective_rank_source"]] == pytest.approx([rank(t), rank(s)], rel=1e-5)
    assert (got["source"], got["target"], got["head"]) == ("painted", "made", "plain")
    assert net.training and net.conv.training


def test_alignment_of_known_domains():
    net, source = Pointwise(3), Painted(AXES)
    same = evaluation.alignment(net, source, source)
    assert [same["distance"], same["ratio"]] == pytest.approx([0, 0], abs=1e-9)
    assert same["absent"] == [] and same["nearest_accuracy"] == 100
    assert same["margin"] == same["margin_source"] == pytest.approx(1)
    # equally many cells on three orthogonal axes: the covariance I / 3 - 1 / 9 has the eigenvalues 1/3, 1/3 and 0
    assert same["effective_rank"] == pytest.approx(2, abs=1e-5)
    swapped = evaluation.alignment(net, source, Painted(AXES[[1, 0, 2]]))
    assert [row["distance"] for row in swapped["classes"].values()] == pytest.approx([1, 1, 0])
    assert [row["nearest_accuracy"] for row in swapped["classes"].values()] == [0, 0, 100]
    assert swapped["margin"] == pytest.approx(1) and swapped["ratio"] == pytest.approx(2 / 3)
    turned = evaluation.alignment(net, source, Painted([[153, 204, 0], *AXES[1:]], n=1))  # 0.6, 0.8: towards class b
    assert [row["distance"] for row in turned["classes"].values()] == pytest.approx([0.4, 0, 0], abs=1e-7)
    assert [row["nearest_accuracy"] for row in turned["classes"].values()] == [0, 100, 100]
    assert turned["nearest_class_accuracy"] == pytest.approx(200 / 3)
    assert turned["margin"] == pytest.approx(1 - 0.8 / 3) and turned["margin_source"] == pytest.approx(1)


def test_alignment_sees_collapse():
    class Changed(Pointwise):
        def forward(self, x, head="plain"):
            return Output(None, self.change(x), None)

    net, source = Changed(3), Painted(AXES)
    net.change = lambda x: (x[:, :1] - 0.5) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)  # either way along one line
    assert evaluation.alignment(net, source, source)["effective_rank"] == pytest.approx(1, abs=1e-5)
    net.change = lambda x: x + 20  # near one point, and still apart
    near = evaluation.alignment(net, source, source)
    assert 0 < near["margin"] < 0.001 and near["nearest_accuracy"] == 100
    net.change = torch.ones_like
    point = evaluation.alignment(net, source, source)
    assert [point["distance"], point["margin"]] == pytest.approx([0, 0], abs=1e-9)
    assert point["ratio"] is point["effective_rank"] is None
    assert point["nearest_class_accuracy"] == pytest.approx(100 / 3)


def test_alignment_of_absent_classes_and_wrong_input():
    net, source = Pointwise(3), Painted(AXES)
    one = evaluation.alignment(net, source, Painted(AXES, classes=(1,)))
    assert one["absent"] == ["a", "c"] and one["distance"] < 1e-9 and one["margin"] is one["ratio"] is None
    none = evaluation.alignment(net, Painted(AXES, classes=(0,)), Painted(AXES, classes=(1,)))
    assert none["absent"] == ["a", "b", "c"]
    assert none["distance"] is none["nearest_accuracy"] is none["nearest_class_accuracy"] is None
    assert "left out: a, b, c" in evaluation.format_alignment(none)
    centred = Pointwise(3)
    centred.forward = lambda x, head: Output(None, x - 0.5, None)
    opposite = evaluation.alignment(centred, Painted(AXES, classes=(1,)), Painted(255 - AXES, classes=(1,)))
    assert opposite["distance"] == pytest.approx(2) and opposite["nearest_accuracy"] == 100  # no other is known
    bare, grey = Painted(AXES, labeled=False, spec="bare"), Painted(AXES, classes=(255,), spec="grey")
    for arguments, words in (((bare, source), "bare: no labels"), ((source, bare), "bare: no labels"),
                             ((source, source, "mean"), "not mean"), ((source, grey), "grey: no cell")):
        with pytest.raises(DataError, match=words):
            evaluation.alignment(net, *arguments)


def made_checkpoint(path, **flags):
    """A checkpoint of an untrained network with three classes."""
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, channels=16)
    save_checkpoint(path, {
        "flags": {"recipe": "source", "backbone": "mit_b0", "decoder": "segformer", "channels": 16, "size": [32, 24],
                  "crop": 16, "val": "none", "target": "none", "cache": str(path.parent / "cache")} | flags,
        "classes": ["road", "sky", "own thing"], "student": net.state_dict(), "teacher": None, "optimizer": None,
        "step": 7, "versions": {}})
    return path


def made_folders(root, n=3):
    """n images and labels of three classes in root/images and root/labels."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind).mkdir()
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 3, (48, 64), dtype=np.uint8)).save(root / "labels" / f"{i}.png")
    return f"folder:{root / 'images'}:{root / 'labels'}"


def test_command_line_scores_and_draws(tmp_path, capsys):
    checkpoint, spec = made_checkpoint(tmp_path / "last.pt"), made_folders(tmp_path)
    report, panels = tmp_path / "scores.json", tmp_path / "panels"
    evaluation.main([str(checkpoint), "--data", spec, "--json", str(report), "--save", str(panels), "--slide", "--flip",
                     "--adabn", spec])
    out = capsys.readouterr().out
    assert "own thing" in out and "mIoU (3 classes)" in out and "split val" in out and "images/s" in out
    assert "weights student" in out and "adabn folder:" in out
    stored = json.loads(report.read_text())
    assert stored["step"] == 7 and f"{stored['miou']:.2f}" in out and len(list(panels.iterdir())) == 3
    evaluation.main([str(checkpoint), "--images", str(tmp_path / "images"), "--save", str(tmp_path / "drawn")])
    assert len(list((tmp_path / "drawn").iterdir())) == 6 and "3 images" in capsys.readouterr().out
    again = made_checkpoint(tmp_path / "best.pt", val=spec)
    evaluation.main([str(again), "--size", "64x48"])
    assert spec in capsys.readouterr().out


def test_command_line_compares_domains(tmp_path, capsys):
    specs = {}
    for domain, shade in (("near", 0), ("far", 90)):
        painted = Painted(AXES, 2, 0, (48, 64))
        for i, item in enumerate(map(painted.__getitem__, range(2))):
            put(tmp_path / domain / "images" / f"{i}.png", (item["image"] // 2 + shade).permute(1, 2, 0).numpy())
            put(tmp_path / domain / "labels" / f"{i}.png", item["label"][::2, ::2].numpy())
        specs[domain] = f"folder:{tmp_path / domain / 'images'}:{tmp_path / domain / 'labels'}"
    checkpoint = str(made_checkpoint(tmp_path / "last.pt", val=specs["far"], size=[64, 48]))
    state = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "both.pt", state | {"teacher": {k: v * 2 for k, v in state["student"].items()}})
    found = []
    for argv in ([], ["--data", specs["near"]], ["--adabn", specs["far"]], ["--weights", "teacher"]):
        report = tmp_path / "scores.json"
        evaluation.main([str(tmp_path / "both.pt"), "--alignment", specs["near"], "--json", str(report), *argv])
        out, stored = capsys.readouterr().out, json.loads(report.read_text())
        found.append(stored["alignment"])
        assert f"source {specs['near']}, target {argv[-1] if '--data' in argv else specs['far']}" in out
        assert f"\ndistance {found[-1]['distance']:.3f}  margin {found[-1]['margin']:.3f}" in out and "mIoU" in out
        assert "miou" in stored and set(found[-1]["classes"]) == set(stored["iou"])
    assert found[1]["distance"] < 1e-9 and len({f["distance"] for f in found}) == 4  # of four networks and data sets
    bare = f"folder:{tmp_path / 'near' / 'images'}"
    near = ["--alignment", specs["near"]]
    for argv, words in ((["--alignment", bare], "no labels"), ([*near, "--data", bare], "no labels"),
                        ([*near, "--head", "mean"], "mean"), (["--alignment", "gta:x"], "'val' split"),
                        (["--head", "language"], "needs a language decoder")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([checkpoint, *argv])
        captured = capsys.readouterr()
        assert stop.value.code == 2 and words in captured.err and captured.err.count("\n") == 1 and not captured.out
    with pytest.raises(SystemExit):
        evaluation.main([checkpoint, "--alignment", bare, "--images", "x"])


def test_command_line_refuses_bad_input_in_one_line(tmp_path, capsys):
    checkpoint, spec = str(made_checkpoint(tmp_path / "last.pt")), made_folders(tmp_path)
    (tmp_path / "text.pt").write_text("no checkpoint")
    cases = [([str(tmp_path / "none.pt")], "none.pt"), ([str(tmp_path / "text.pt")], "text.pt"),
             ([checkpoint, "--data", f"folder:{tmp_path / 'images'}"], "no labels"), ([checkpoint], "--data SPEC"),
             ([checkpoint, "--weights", "teacher"], "teacher"), ([checkpoint, "--data", "camvid:nowhere"], "nowhere"),
             ([checkpoint, "--images", str(tmp_path / "nothing.jpg")], "nothing.jpg"),
             ([checkpoint, "--data", spec, "--submit", str(tmp_path / "up")], "--submit needs"),
             ([checkpoint, "--data", spec, "--json", str(tmp_path / "no" / "x.json")], "x.json"),
             (["--table", str(tmp_path / "nowhere")], "nowhere")]
    for argv, words in cases:
        with pytest.raises(SystemExit) as stop:
            evaluation.main(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count("\n") == 1, (argv, err)
    for argv in ([], [checkpoint, "--table", "x"], [checkpoint, "--data", "x", "--images", "y"],
                 [checkpoint, "--size", "x"], [checkpoint, "--images", "x", "--submit", "y"],
                 [checkpoint, "--device", "nonsense"]):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(argv)
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# model.py


def parameters_on_meta(*arguments):
    with torch.device("meta"):
        return sum(p.numel() for p in Segmenter(*arguments).parameters())


@pytest.mark.parametrize("name, encoder, tensors, segformer, daformer", [
    ("mit_b0", 3_319_392, 176, 3_719_027, 6_900_595), ("mit_b1", 13_151_424, 176, 13_682_131, 16_863_699),
    ("mit_b2", 24_196_288, 332, 27_361_235, 27_908_563), ("mit_b3", 44_072_128, 572, 47_237_075, 47_784_403),
    ("mit_b4", 60_842_688, 832, 64_007_635, 64_554_963), ("mit_b5", 81_443_008, 1052, 84_607_955, 85_155_283)])
def test_published_parameter_counts(name, encoder, tensors, segformer, daformer):
    with torch.device("meta"):
        mit = MixTransformer(name)
    assert sum(p.numel() for p in mit.parameters()) == encoder and len(mit.state_dict()) == tensors
    assert parameters_on_meta(name, "segformer", 19, 256 if name in ("mit_b0", "mit_b1") else 768) == segformer
    assert parameters_on_meta(name, "daformer", 19, 256) == daformer


def hugging_face_layout(state):
    """NVIDIA's names -> those of `nvidia/mit-b*` files, written out independently of the loader's table."""
    other = {}
    for key, value in state.items():
        stage, rest = int(key.split(".")[0][-1]) - 1, key.split(".", 1)[1]
        prefix = "segformer.encoder."
        if key.startswith("patch_embed"):
            other[f"{prefix}patch_embeddings.{stage}.{rest.replace('norm', 'layer_norm')}"] = value
        elif key.startswith("norm"):
            other[f"{prefix}layer_norm.{stage}.{rest}"] = value
        else:
            block, part = rest.split(".", 1)
            name, kind = part.rsplit(".", 1)
            base = f"{prefix}block.{stage}.{block}."
            if name == "attn.kv":
                half = len(value) // 2
                other[f"{base}attention.self.key.{kind}"] = value[:half]
                other[f"{base}attention.self.value.{kind}"] = value[half:]
                continue
            name = {"norm1": "layer_norm_1", "norm2": "layer_norm_2", "attn.q": "attention.self.query",
                    "attn.sr": "attention.self.sr", "attn.norm": "attention.self.layer_norm",
                    "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.dense1",
                    "mlp.fc2": "mlp.dense2"}.get(name, name)
            other[f"{base}{name}.{kind}"] = value
    return other | {"classifier.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)}


def mmseg_layout(state):
    other, queries = {}, {}
    for key, value in state.items():
        stage, rest = int(key.split(".")[0][-1]) - 1, key.split(".", 1)[1]
        if key.startswith("patch_embed"):
            other[f"backbone.layers.{stage}.0.{rest.replace('proj', 'projection')}"] = value
        elif key.startswith("norm"):
            other[f"backbone.layers.{stage}.2.{rest}"] = value
        else:
            block, part = rest.split(".", 1)
            name, kind = part.rsplit(".", 1)
            base = f"backbone.layers.{stage}.1.{block}."
            if name == "attn.q":
                queries[base + kind] = value
            elif name == "attn.kv":
                other[f"{base}attn.attn.in_proj_{kind}"] = torch.cat([queries[base + kind], value])
            elif name in ("mlp.fc1", "mlp.fc2") and kind == "weight":
                other[f"{base}ffn.layers.{'0' if name == 'mlp.fc1' else '4'}.weight"] = value[:, :, None, None]
            else:
                name = {"attn.proj": "attn.attn.out_proj", "mlp.fc1": "ffn.layers.0", "mlp.fc2": "ffn.layers.4",
                        "mlp.dwconv.dwconv": "ffn.layers.1"}.get(name, name)
                other[f"{base}{name}.{kind}"] = value
    return {"state_dict": other}


@pytest.mark.parametrize("layout, suffix", [
    (lambda s: s | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}, ".pth"),
    (hugging_face_layout, ".safetensors"), (hugging_face_layout, ".bin"), (mmseg_layout, ".pth"),
    (lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, ".pth")])
def test_published_weight_layouts_load_strictly(tmp_path, layout, suffix):
    source, target = MixTransformer("mit_b0"), MixTransformer("mit_b0")
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    path = tmp_path / f"weights{suffix}"
    state = layout(source.state_dict())
    if suffix == ".safetensors":
        model.import_optional("safetensors.torch").save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    load_backbone(target, path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_wrong_weights_are_refused_by_name(tmp_path):
    state = MixTransformer("mit_b0").state_dict()
    cases = {"missing.pth": {k: v for k, v in state.items() if k != "norm2.bias"},
             "extra.pth": state | {"neck.weight": torch.zeros(1)},
             "shape.pth": state | {"norm2.bias": torch.zeros(7)}, "other.pth": MixTransformer("mit_b1").state_dict()}
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    wanted = {"missing.pth": "missing 1 .norm2.bias", "extra.pth": "unexpected 1 .neck.weight",
              "shape.pth": r"norm2.bias \(7,\) for \(64,\)", "other.pth": "other shapes|missing|unexpected",
              "page.pth": "cannot be read", "page.safetensors": "cannot be read", "absent.pth": "no such"}
    before = MixTransformer("mit_b0")
    for name, words in wanted.items():
        with pytest.raises(WeightsError, match=words) as caught:
            load_backbone(before, str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_and_maps_are_views_of_each_other(batch):
    tokens = torch.randn(batch, 15, 8)
    maps = model.to_map(tokens, (3, 5))
    assert maps.data_ptr() == tokens.data_ptr() and torch.equal(maps[:, :, 2, 1], tokens[:, 11])
    assert model.to_tokens(maps).data_ptr() == tokens.data_ptr() and torch.equal(model.to_tokens(maps), tokens)
    with torch.no_grad():  # a convolution must see the layout, also of a single image: else it copies
        assert torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8)(maps).stride()[1:] == (1, 40, 8)



@pytest.mark.parametrize("name", ["mit_b0", "mit_b1"])
def test_mix_transformer_equals_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: MiT not compared with it")
    model.import_optional("torchvision")  # which transformers imports too
    dims, depths = model.MIT[name]
    config = transformers.SegformerConfig(hidden_sizes=list(dims), depths=list(depths), sr_ratios=[8, 4, 2, 1],
                                          num_attention_heads=[1, 2, 5, 8])
    torch.manual_seed(0)
    theirs = transformers.SegformerForImageClassification(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    torch.save(theirs.state_dict(), tmp_path / "hf.bin")
    ours = MixTransformer(name).eval()
    load_backbone(ours, tmp_path / "hf.bin")
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        reference = theirs(x, output_hidden_states=True).hidden_states
        for a, b in zip(ours(x), reference[-4:], strict=True):
            assert (a - b).norm() / b.norm() < 1e-3


def test_timm_weights_by_name_and_in_order(tmp_path, capsys):
    full = model.import_optional("timm").create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"other_{i}": v for i, v in enumerate(full.values())}, tmp_path / "order.pth")
    torch.save(full, tmp_path / "name.pth")
    nets = [Segmenter("timm:tf_efficientnet_lite0", "segformer", 3, 16) for _ in range(2)]
    load_backbone(nets[0], tmp_path / "name.pth")
    assert capsys.readouterr().err == ""
    load_backbone(nets[1], tmp_path / "order.pth")
    assert "loaded in order" in capsys.readouterr().err
    for key, value in nets[0].backbone.net.state_dict().items():
        assert torch.equal(value, full[key]) and torch.equal(value, nets[1].backbone.net.state_dict()[key])
    state = {f"other_{i}": v for i, v in enumerate(full.values())}
    state["other_0"] = state["other_0"][:1]
    torch.save(state, tmp_path / "shape.pth")
    with pytest.raises(WeightsError, match="no name in common"):
        load_backbone(nets[1], tmp_path / "shape.pth")
    assert nets[1].pixel_mean.flatten().tolist() == pytest.approx([0.5] * 3)  # its own statistics, not ImageNet's
    with pytest.raises(ValueError, match="no model"):
        Segmenter("timm:nonsense")


@pytest.mark.parametrize("small, large", [("resnet18", "resnet34"), ("vit_tiny_patch16_224", "deeper")])
def test_weights_of_a_deeper_model_are_refused(small, large, tmp_path):
    timm = model.import_optional("timm")
    other = timm.create_model(small, depth=14) if large == "deeper" else timm.create_model(large)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="which has no .*very model"):
        load_backbone(Segmenter(f"timm:{small}", "segformer", 3, 16), tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "crossvit_9_240",
                                  "vit_tiny_patch16_224.no_such_weights"])
def test_models_without_maps_of_any_size_are_one_clear_line(name, small_run, capsys):
    if "." in name:
        with pytest.raises(SystemExit):
            train.parse_flags(["--backbone", f"timm:{name}"])
        assert "timm has no weights" in capsys.readouterr().err.splitlines()[-1]
        return
    done = run_train([*small_run, "--backbone", f"timm:{name}"], check=False)
    assert done.returncode == 1 and f"timm:{name}" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_fusion_below_the_upsampling_is_exact():
    torch.manual_seed(0)
    pyramid = [torch.randn(2, c, s, s + 1, dtype=torch.float64) for c, s in ((4, 16), (6, 8), (8, 4), (10, 2))]
    linears = torch.nn.ModuleList(torch.nn.Linear(x.shape[1], 5) for x in pyramid).double()
    weight = torch.randn(7, 20, 1, 1, dtype=torch.float64)
    levels = [F.interpolate(F.linear(x.movedim(1, -1), m.weight, m.bias).movedim(-1, 1), size=(16, 17), mode="bilinear")
              for x, m in zip(pyramid, linears)]
    torch.testing.assert_close(model.project_and_fuse(pyramid, linears, weight), F.conv2d(torch.cat(levels, 1), weight))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 65), (64, 96)])
def test_any_image_size(size):
    names = ("mit_b0", "segformer"), ("mit_b0", "daformer"), ("timm:tf_efficientnet_lite0", "segformer")
    for backbone, decoder in names:
        out = Segmenter(backbone, decoder, 5, 16).eval()(torch.rand(2, 3, *size))
        grid = tuple(-(-side // 4) for side in size)
        assert out.logits.shape == (2, 5, *grid) and out.features.shape == (2, 16, *grid) and len(out.pyramid) == 4


def test_teacher_schedule():
    torch.manual_seed(0)
    student, teacher = Segmenter("mit_b0", "segformer", 3, 16), Segmenter("mit_b0", "segformer", 3, 16)
    student.decoder.fusion.bn.running_mean.fill_(3.0)
    for step, weight in ((0, 0.0), (1, 0.5), (3, 0.75), (10_000, 0.999)):
        before = [p.clone() for p in teacher.parameters()]
        model.ema_update(teacher, student, step, 0.999)
        for old, new, s in zip(before, teacher.parameters(), student.parameters()):
            torch.testing.assert_close(new, weight * old + (1 - weight) * s)
    assert teacher.decoder.fusion.bn.running_mean.abs().max() == 0  # parameters only
    model.teacher_mode(teacher)
    modes = {type(m).__name__: m.training for m in teacher.modules()}
    assert modes["BatchNorm2d"] and not modes["DropPath"] and not modes["Dropout2d"]
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(teacher(x).logits, teacher(x).logits)  # nothing random is left


def tiny_checkpoint(**changes):
    flags = {"backbone": "mit_b0", "decoder": "segformer", "channels": 8, "recipe": "mic"}
    state = Segmenter("mit_b0", "segformer", 3, 8).state_dict()
    return {"flags": flags, "classes": ["a", "b", "c"], "student": state, "teacher": state, "optimizer": {}, "step": 1,
            "versions": {}} | changes


def test_checkpoint_survives_sigkill(tmp_path):
    path = tmp_path / "last.pt"
    script = ("import sys, torch; sys.path.insert(0, sys.argv[1]); from model import save_checkpoint\n"
              "for i in range(10 ** 6):\n"
              "    save_checkpoint(sys.argv[2], dict(flags={}, classes=[], student=torch.full((400, 1000), float(i)),\n"
              "        teacher=i, optimizer=0, step=i, versions=0)); print(i, flush=True)\n")
    for wait in (0.0, 0.011, 0.023, 0.037, 0.05):
        child = subprocess.Popen([sys.executable, "-c", script, HERE, str(path)], stdout=subprocess.PIPE)
        child.stdout.readline()  # one whole checkpoint is written
        time.sleep(wait)
        child.kill()
        child.wait()
        state = load_checkpoint(path)
        assert (state["student"] == state["step"]).all() and state["teacher"] == state["step"]


def test_failed_saves_leave_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, tiny_checkpoint())

    class Poison:
        def __reduce__(self):
            raise RuntimeError("cannot be pickled")
    with pytest.raises(CheckpointError, match="cannot be pickled.*intact"):
        save_checkpoint(path, tiny_checkpoint(step=2, optimizer=Poison()))
    code = ("import sys, signal, resource, torch; sys.path.insert(0, sys.argv[1]); from model import save_checkpoint\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6,) * 2)\n"
            "save_checkpoint(sys.argv[2], dict(student=torch.zeros(10 ** 6)))\n")
    full = subprocess.run([sys.executable, "-c", code, HERE, str(path)], capture_output=True, text=True)
    assert full.returncode != 0 and "CheckpointError" in full.stderr and "MB are free" in full.stderr
    assert load_checkpoint(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    path, bad = tmp_path / "last.pt", tmp_path / "bad.pt"
    save_checkpoint(path, tiny_checkpoint())
    blob = path.read_bytes()
    flipped = bytearray(blob)
    flipped[len(blob) // 2] ^= 1
    contents = [blob[:int(len(blob) * share)] for share in (0, 0.1, 0.5, 0.999)] + [bytes(flipped), b"<html>"]
    for content in contents:
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match="bad.pt: damaged"):
            load_checkpoint(bad)
    save_checkpoint(bad, {"epoch": 1})
    with pytest.raises(CheckpointError, match="bad.pt: not one of our checkpoints"):
        load_checkpoint(bad)
    with pytest.raises(CheckpointError, match="absent.pt: no such"):
        load_checkpoint(tmp_path / "absent.pt")
    other = tiny_checkpoint(student=Segmenter("mit_b0", "segformer", 4, 8).state_dict())
    with pytest.raises(CheckpointError, match="other shapes 2 .decoder.classifier.weight"):
        model.build_segmenter(other)
    with pytest.raises(CheckpointError, match="holds no teacher"):
        model.build_segmenter(tiny_checkpoint(teacher=None), "teacher")


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)
    torch.save(tiny_checkpoint(optimizer=Evil()), path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises(WeightsError):
        load_backbone(MixTransformer("mit_b0"), path)
    assert not trace.exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_forgiven(prefix):
    checkpoint = tiny_checkpoint()
    state = {prefix + k: v for k, v in checkpoint["student"].items()}
    net = model.build_segmenter(checkpoint | {"student": state})
    assert same_tensors(dict(net.state_dict()), dict(checkpoint["student"]))


# ---------------------------------------------------------------------------------------------------------------------
# losses.py


def test_cross_entropy_divides_by_all_pixels():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 12, 12)).byte()
    label[:, 3:] = 255  # three of four pixels ignored
    plain = F.cross_entropy(F.interpolate(logits, size=(12, 12), mode="bilinear"), label.long(), ignore_index=255)
    torch.testing.assert_close(losses.cross_entropy(logits, label), plain / 4)
    everything = losses.cross_entropy(logits.requires_grad_(), torch.full_like(label, 255))
    everything.backward()
    assert everything == 0 and logits.grad.abs().max() == 0


def test_feature_distance():
    label = torch.full((1, 64, 64), 255, dtype=torch.uint8)
    label[0, :32, :32], label[0, :32, 32:] = 2, 0  # a thing, and a class that is none
    label[0, 32:, :32] = 2
    label[0, 32:42, :32] = 0  # only 22 of 32 rows: under 75 %
    features = torch.randn(1, 5, 2, 2, requires_grad=True)
    reference = torch.randn(1, 5, 2, 2)
    cells = data.majority_label(label, (2, 2), 3)
    assert cells.tolist() == [[[2, 0], [255, 255]]]
    value = losses.feature_distance(features, reference, cells, [2])
    torch.testing.assert_close(value, (features - reference)[0, :, 0, 0].norm())
    value.backward()
    assert features.grad[0, :, 0, 0].abs().min() > 0 and features.grad[0, :, 1].abs().max() == 0
    features.grad = None
    for nothing in (losses.feature_distance(features, reference, torch.zeros_like(cells), [2]),
                    losses.feature_distance(features, reference, cells, []),
                    losses.feature_distance(features, features.detach(), cells, [2])):
        nothing.backward()
        assert nothing == 0 and torch.isfinite(features.grad).all() and features.grad.abs().max() == 0


def dyce_inputs(seed=0, shape=(2, 5, 4, 5), full=(8, 10)):
    g = generator(seed)
    label = torch.randint(0, shape[1] - 1, (shape[0], *full), generator=g).byte()  # the last class does not occur
    label[:, :2] = 255
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)), label


def plain_dyce(logits, label, hardest, omega):
    """Eq. 9, written class by class, divided by K^(1-omega)."""
    up = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)
    values = F.cross_entropy(up, label.long(), ignore_index=255, reduction="none")[label != 255]
    ids = label[label != 255]
    chosen = values.argsort(descending=True)[:int(np.ceil(hardest * len(values)))]
    values, ids = values[chosen], ids[chosen]
    total = sum(values[ids == c].sum() / (ids == c).sum() ** (1 - omega) for c in ids.unique())
    return total / len(values) ** omega / len(ids.unique()) ** (1 - omega)


@pytest.mark.parametrize("hardest, omega", [(1, 1), (1, 0), (0.2, 0.5), (0.37, 0), (0.2, 1), (1e-4, 0.5)])
def test_dyce_equals_the_equation(hardest, omega):
    for seed in range(3):
        logits, label = dyce_inputs(seed)
        reference, gradient = loss_and_gradient(plain_dyce, logits, label, hardest, omega)
        value, ours = loss_and_gradient(losses.dyce, logits.float(), label, hardest, omega)
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
        assert_near(ours, gradient)


def test_dyce_limits_bounds_and_nothing_to_learn():
    logits, label = dyce_inputs()
    up = F.interpolate(logits.float(), (8, 10), mode="bilinear", align_corners=False)
    values = F.cross_entropy(up, label.long(), ignore_index=255, reduction="none")
    torch.testing.assert_close(losses.dyce(logits.float(), label, 1.0, 1.0), values[label != 255].mean())
    classes = torch.stack([values[label == c].mean() for c in range(4)])
    torch.testing.assert_close(losses.dyce(logits.float(), label, 1.0, 0.0), classes.mean())
    even = losses.dyce(torch.zeros(2, 5, 4, 5), label, 0.2, 0.5)  # one cross-entropy e everywhere: all tie, all count
    e, share = np.log(5), [(label == c).sum().item() / (label != 255).sum().item() for c in range(4)]
    assert even == pytest.approx(e * sum(s ** 0.5 for s in share) / 2, rel=1e-5)
    assert e / 4 ** 0.5 <= even <= e * 1.00001  # e <= L <= e K^(1-omega) before the division
    leaf = logits.float().requires_grad_()
    losses.dyce(leaf, torch.full_like(label, 255)).backward()
    assert leaf.grad.abs().max() == 0
    ours = torch.autograd.grad(losses.dyce(leaf, label, 0.3, 0.5), leaf)[0]
    i, step = (0, 1, 2, 3), 1e-5  # finite differences, of the reference in float64
    moved = []
    for sign in (1, -1):
        other = logits.clone()
        other[i] += sign * step
        moved.append(plain_dyce(other, label, 0.3, 0.5))
    assert ours[i].item() == pytest.approx(((moved[0] - moved[1]) / (2 * step)).item(), rel=1e-3)


def test_dyce_takes_at_least_the_hardest_pixel():
    logits, label = dyce_inputs()
    values = losses.upsample_cross_entropy(logits.float(), label, reduction="none")
    torch.testing.assert_close(losses.dyce(logits.float(), label, 0.0, 1.0), values.max())


def test_consistency_learns_trusted_pixels_over_valid_ones():
    logits, pseudo = dyce_inputs()
    logits, pseudo = logits.float(), pseudo.clamp(max=4)
    trusted, valid = torch.rand(2, 2, 8, 10, generator=generator()) < 0.6
    values = F.cross_entropy(F.interpolate(logits, (8, 10), mode="bilinear", align_corners=False), pseudo.long(),
                             reduction="none")
    expected = values[trusted & valid].sum() / valid.sum()
    torch.testing.assert_close(losses.consistency(logits, pseudo, trusted, valid), expected)
    for nothing in ((trusted & False, valid), (trusted, valid & False)):
        leaf = logits.clone().requires_grad_()
        zero = losses.consistency(leaf, pseudo, *nothing)
        zero.backward()
        assert zero == 0 and leaf.grad.abs().max() == 0


def guided_net(bank, **options):
    torch.manual_seed(0)
    return Segmenter("mit_b0", "segformer", 3, 8, "dlg", bank, **options).eval()


def test_guidance_begins_as_no_guidance_and_then_learns():
    torch.manual_seed(0)
    plain, image = Segmenter("mit_b0", "segformer", 3, 8).eval(), torch.rand(2, 3, 64, 96)
    net = guided_net(made_bank())
    net.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(net(image).logits, plain(image).logits)  # the output projection is zero
    assert guided_net(made_bank()._replace(kind="none")).guidance is None
    for _ in range(2):
        net.zero_grad()
        net(image).logits.square().sum().backward()
        with torch.no_grad():
            net.guidance.out.weight -= 0.1 * net.guidance.out.weight.grad
    for name in ("vision", "language"):
        keys, values = getattr(net.guidance, name).weight.grad.chunk(2)
        assert keys.abs().max() > 0 and values.abs().max() > 0, name
    assert not torch.equal(net(image).logits, plain(image).logits)
    with pytest.raises(ValueError, match="no 'language' head"):
        net(image, head="language")


def test_guidance_formulas():
    torch.manual_seed(0)
    bank = made_bank()
    block, features = model.DenseLanguageGuidance(bank, 8), torch.randn(2, 8, 4, 5)
    vision, multimodal = block.attend(features)
    text = bank.embeddings - bank.embeddings.mean(0)
    text = text / text.norm(dim=1, keepdim=True)
    rows = block.norm(features.permute(0, 2, 3, 1).reshape(2, 20, 8))
    kv, vv = block.vision(rows).split(8, 2)
    kl, vl = block.language(text).split(8, 1)
    a = kv @ kl.t() / 8 ** 0.5
    torch.testing.assert_close(vision, a.softmax(2) @ vl)
    read = a.transpose(1, 2).softmax(2) @ vv  # (2,3,8): the text that has read vision
    torch.testing.assert_close(multimodal, vision @ read.transpose(1, 2) / 8 ** 0.5)
    swapped = model.DenseLanguageGuidance(bank._replace(embeddings=bank.embeddings[[2, 0, 1]]), 8)
    with torch.no_grad():
        swapped.load_state_dict(block.state_dict() | {"bank": block.bank[[2, 0, 1]]})
        again = swapped.attend(features)
    torch.testing.assert_close(again[0], vision)
    torch.testing.assert_close(again[1], multimodal[:, :, [2, 0, 1]])  # permuting the bank permutes the channels
    # one vector for the whole caption, as in the released code: every pixel reads the same
    single = model.DenseLanguageGuidance(TextBank(bank.embeddings[:1], ("caption",), "clip"), 8)
    constant = single.attend(features)[0]
    assert (constant - constant[:, :1]).abs().max() < 1e-6 and (vision - vision[:, :1]).abs().max() > 1e-3
    learned = model.DenseLanguageGuidance(bank._replace(kind="learned"), 8)
    assert isinstance(learned.vectors, torch.nn.Parameter) and learned.attend(features)[0].shape == vision.shape


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_cluda(rows, label, weight, tau):
    """The per-positive loss, one anchor at a time, in float64."""
    rows, total, counted = rows.double(), 0, 0
    for i in range(len(rows)):
        own = (label == label[i]) & (torch.arange(len(rows)) != i)
        other = (label != label[i]) & (label != 255)
        if label[i] == 255 or not own.any() or not other.any():
            continue
        s = rows @ rows[i] / tau
        terms = -(s[own] - torch.logaddexp(s[own], s[other].logsumexp(0)))
        total, counted = total + weight[i] * (weight[own] * terms).mean(), counted + 1
    return total / counted


def test_cluda():
    rows, weight = unit(40, 6), torch.rand(40, generator=generator())
    label = torch.randint(0, 4, (40,), generator=generator())
    label[::5], label[3] = 255, 9  # 9 occurs once: it is nobody's positive
    leaf = rows.clone().requires_grad_()
    loss = losses.cluda(leaf, label, weight, 0.2)
    reference = plain_cluda(rows, label, weight, 0.2)
    torch.testing.assert_close(loss.double(), reference)
    loss.backward()
    assert leaf.grad[label == 255].abs().max() == 0 and leaf.grad[label != 255].abs().max(1)[0].gt(0).all()
    for alone in (torch.full((40,), 2), torch.full((40,), 255)):
        leaf.grad = None
        losses.cluda(leaf, alone, weight, 0.2).backward()
        assert leaf.grad.abs().max() == 0
    # the released code's defects, each of which would pass unseen through the shapes alone
    as_a_class = plain_cluda(rows, torch.where(label == 255, 7, label), weight, 0.2)  # 255 as one more class
    assert (as_a_class - reference).abs() > 1e-3
    everything_weighs = plain_cluda(rows, label, torch.ones(40), 0.2)
    assert (everything_weighs - reference).abs() > 1e-3
    # its mask "thing or stuff" on pairs of one class excludes nobody; here 255 leaves classes out, and does so
    stuff = torch.where(label < 2, 255, label)
    leaf.grad = None
    loss = losses.cluda(leaf, stuff, weight, 0.2)
    torch.testing.assert_close(loss.double(), plain_cluda(rows, stuff, weight, 0.2))
    assert (loss - reference).abs() > 1e-3
    loss.backward()
    assert leaf.grad[label < 2].abs().max() == 0


def test_contrast_rows_keep_their_labels_in_a_batch():
    """With two images the released code pairs features in the order (y, x, image) with labels in (image, y, x)."""
    flags = train.parse_flags(["--recipe", "cluda"])
    net = Segmenter("mit_b0", "segformer", 5, 8)
    label = torch.randint(0, 5, (2, 4, 6), generator=generator()).repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    label[0, :8] = 255
    weight = (label.float() + 1) / 10
    features = F.one_hot(label[:, ::4, ::4].long().clamp(max=7), 8).permute(0, 3, 1, 2) * 3.0  # tells its place's class
    rows, cells, weights = train.contrast_rows(flags, net, features, label, weight, generator(), (0, 1))
    assert torch.equal(cells, label[:, ::8, ::8].flatten().long())
    assert torch.equal(rows.argmax(1), cells.clamp(max=7)) and torch.equal(rows.norm(dim=1), torch.ones(48))
    torch.testing.assert_close(weights, (cells + 1) / 10)
    released = F.avg_pool2d(features, 2).permute(2, 3, 0, 1).flatten(0, 2)  # (B,C,h,w) -> (h*w*B,C): the defect
    assert (released.argmax(1) == cells.clamp(max=7)).float().mean() < 0.5
    with torch.no_grad():
        flags.contrast_pixels = "7"
        assert (train.contrast_rows(flags, net, features, label, weight, generator(), (0, 1))[1] != 255).sum() == 7
    dead = train.contrast_rows(flags, net, torch.zeros_like(features), label, weight, generator(), (0, 1))
    assert dead[0].abs().max() == 0  # and not nan


def test_t2s():
    queries, keys = unit(30, 6).requires_grad_(), unit(50, 6, seed=1).requires_grad_()
    label, key_label = torch.randint(0, 5, (30,), generator=generator()), torch.arange(50) % 4  # class 4: no keys
    label[:3], key_label[:5] = 255, 255
    weight = torch.tensor([1.0, 0.25, 0.5, 0.1, 1.0, 0.7])  # class 5 does not occur
    loss = losses.t2s(queries, label, keys, key_label, weight, 0.1)
    s = queries.detach().double() @ keys.detach().double().t() / 0.1
    means = []
    for c in range(4):
        rows = s[label == c][:, key_label != 255]
        means.append((rows.logsumexp(1) - rows[:, key_label[key_label != 255] == c].mean(1)).mean())
    expected = (weight[:4].double() * torch.stack(means)).sum() / weight[:4].sum()
    torch.testing.assert_close(loss.double(), expected)
    loss.backward()
    assert keys.grad is None and queries.grad[label < 4].abs().max(1)[0].gt(0).all()
    assert queries.grad[(label == 4) | (label == 255)].abs().max() == 0
    # equal networks, identity: one orthonormal vector a class, n cells each, has the analytic value
    rows, label = torch.eye(4, 6).repeat_interleave(5, 0), torch.arange(4).repeat_interleave(5)
    value = losses.t2s(rows, label, rows, label, torch.ones(4), 0.5)
    torch.testing.assert_close(value, torch.tensor(5 * np.exp(2) + 15).log().float() - 2)
    nothing = losses.t2s(queries, torch.full((30,), 255), keys, key_label, weight, 0.1)
    nothing.backward()
    assert nothing == 0


def test_class_confidence_and_weights():
    running = losses.ClassConfidence(4, momentum=0.9)
    running.update(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0.8, 0.6, 0.95, 0.1]]))
    torch.testing.assert_close(running.confidence, torch.tensor([0.7, 0.95, 0, 0]))  # the first value is taken whole
    running.update(torch.tensor([0, 2]), torch.tensor([0.5, 0.4]))
    torch.testing.assert_close(running.confidence, torch.tensor([0.68, 0.95, 0.4, 0]))
    weights = running.weights()
    torch.testing.assert_close(weights, (torch.tensor([0.32, 0.05, 0.6, 0.6]) / 0.6).sqrt())
    assert weights[3] == weights.max() == 1 and running.seen.tolist() == [True, True, True, False]
    assert torch.equal(running.weights(0), torch.ones(4))
    assert torch.equal(losses.ClassConfidence(3).weights(), torch.ones(3))  # before any prediction
    sure = losses.ClassConfidence(2)
    sure.update(torch.tensor([0, 1]), torch.ones(2))
    assert torch.isfinite(sure.weights()).all()


def test_sepico():
    torch.manual_seed(0)
    centers = unit(3, 8, seed=4)
    rows = F.normalize(centers.repeat_interleave(200, 0) + 0.3 * torch.randn(600, 8), dim=1)
    label = torch.arange(3).repeat_interleave(200)
    gaussians = losses.ClassGaussians(5, 8, momentum=0.5)
    for part in range(40):
        pick = torch.randperm(600)[:500]
        gaussians.update(rows[pick], label[pick])
    mean, variance, known = gaussians.moments()
    assert known.tolist() == [True] * 3 + [False] * 2
    for c in range(3):
        torch.testing.assert_close(mean[c], rows[label == c].mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(variance[c], rows[label == c].var(0), rtol=0, atol=0.02)
    once = losses.ClassGaussians(5, 8)
    once.update(rows, label)  # corrected for its start
    torch.testing.assert_close(once.moments()[0][:3], torch.stack([rows[label == c].mean(0) for c in range(3)]))
    # the closed form is the expectation: a class's E exp(x.k / tau) over many samples of its Gaussian
    x, tau = unit(6, 8, seed=7).requires_grad_(), 0.3
    target = torch.tensor([0, 1, 2, 0, 255, 4])
    value = losses.sepico(x, target, None, gaussians, tau)
    k = mean[:3, None] + variance[:3, None].sqrt() * torch.randn(3, 200_000, 8)
    expected = (torch.einsum("nd,cmd->ncm", x.detach(), k) / tau).exp().mean(2)  # (6,3)
    sampled = expected.sum(1).log()[:4] - (x * mean[target.clamp(max=4)]).sum(1)[:4] / tau
    torch.testing.assert_close(value, sampled.mean(), rtol=2e-2, atol=2e-2)
    value.backward()
    assert x.grad[4:].abs().max() == 0 and x.grad[:4].abs().max(1)[0].gt(0).all()
    zero = losses.sepico(x, target, None, losses.ClassGaussians(5, 8), tau)
    zero.backward()
    assert zero == 0 and torch.isfinite(x.grad).all()
    halved = losses.sepico(x, target, torch.full((6,), 0.5), gaussians, tau)
    torch.testing.assert_close(halved, value / 2)


# -------------------------------------------------------------------------------------------------
# train.py: flags


def test_learning_rates_are_the_published_ones():
    rates = {0: 6.0e-11, 750: 2.94375e-5, 1499: 5.7713e-5, 1500: 5.775e-5, 39_999: 1.5e-9}
    for step, rate in rates.items():
        assert train.learning_rate(step, 6e-5, 40_000, 1500) == pytest.approx(rate, rel=1e-4)


def test_parameter_groups_are_the_published_ones():
    net = Segmenter("mit_b0", "daformer", 19, 16)
    groups = train.parameter_groups(net, 6e-5, 10)
    of = {}
    for group in groups:
        of |= {id(p): group for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        rate, decay = of[id(p)]["peak"], of[id(p)]["weight_decay"]
        if name.startswith("decoder"):
            assert (rate, decay) == (pytest.approx(6e-4), 0.01)  # its BatchNorm too
        else:
            assert (rate, decay) == (6e-5, 0.0 if "norm" in name else 0.01)


RECIPE_VALUES = """
recipe    mix mask fd    rcs  cluda sepico t2s restyled consistency dyce threshold language alpha
source    0   0    0     0    0     0      0   0        0           0    0.968     None     0.999
oracle    0   0    0     0    0     0      0   0        0           0    0.968     None     0.999
dacs      1   0    0     0    0     0      0   0        0           0    0.968     None     0.99
daformer  1   0    0.005 0.01 0     0      0   0        0           0    0.968     None     0.999
mic       1   1    0.005 0.01 0     0      0   0        0           0    0.968     None     0.999
lcmsm     1   1    0.005 0.01 0     0      0   0        0           0    0.968     lcmsm    0.999
cluda     1   0    0.005 0.01 0.1   0      0   0        0           0    0.968     None     0.999
sepico    1   0    0.005 0.01 0     0.1    0   0        0           0    0.968     None     0.999
t2sda     1   0    0.005 0.01 0     0      0.1 0        0           0    0.968     None     0.999
t2sda_dg  0   0    0.005 0.01 0     0      0.1 1        0           0    0.968     None     0.999
semidavil 0   0    0     0    0     0      0   0        1           1    0.95      dlg      0.999
all       1   1    0.005 0.01 0.1   0      0.1 0        0           0    0.968     dlg      0.999
"""


def test_recipes_have_the_values_of_their_papers():
    (_, *names), *rows = [line.split() for line in RECIPE_VALUES.strip().splitlines()]
    assert [row[0] for row in rows] == list(train.RECIPES)
    for recipe, *values in rows:
        flags = train.parse_flags(["--recipe", recipe, "--steps", "40000"])
        for name, value in zip(names, values, strict=True):
            wanted = value if name == "language" else float(value)
            given = str(flags.language) if name == "language" else getattr(flags, name)
            assert given == wanted, f"{recipe}: {name}"
        domains = {"oracle": (2 * ("streets:shifted",)), "t2sda_dg": ("streets", "none")}
        assert (flags.source, flags.target) == domains.get(recipe, ("streets", "streets:shifted"))
        assert flags.adapts == (recipe not in ("source", "oracle", "t2sda_dg"))
        assert set(flags.saved) == {"recipe"} | set(train.parse_flags([]).saved)


def test_typed_flags_override_the_recipe_and_the_others_follow():
    long = "--recipe daformer --fd 0 --mask 0.5 --steps 40000 --init x.pth --crop 512"
    wanted = dict(mix=1.0, mask=0.5, fd=0.0, alpha=0.999, warmup=1500, lr=6e-5, head_lr=10.0,
                  mask_block=32, stop_at=40_000)
    assert wanted.items() <= vars(train.parse_flags(long.split())).items()
    wanted = dict(recipe="mic", mix=1.0, mask=1.0, alpha=0.99, warmup=50, lr=1e-3, head_lr=1.0,
                  mask_block=16, stop_at=1000, val="streets:shifted", labeled="0")
    assert wanted.items() <= vars(train.parse_flags(["--labeled", "00"])).items()
    assert not train.parse_flags("--recipe source --t2s 1 --target none".split()).adapts


def test_help_names_every_flag_with_its_default():
    shown = run_train(["-h"]).stdout
    assert shown.count("\n") <= 120
    flags = re.split(r"\n  (?=--)", shown)[1:]
    assert len(flags) == 50
    for text in flags:
        assert "(default: " in " ".join(text.split()), text
    assert len({text.split()[0].rstrip(",") for text in flags} | {"-h"}) == 51
    saved = {"--" + name.replace("_", "-") for name in train.parse_flags([]).saved}
    assert {text.split()[0].rstrip(",") for text in flags} == saved


WRONG_FLAGS = {  # command line: words of the message
    "--recipe none": "invalid choice: 'none'",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--profile 2": "unrecognized arguments: --profile",
    "--crop 0": "--crop: 0: must be from 1",
    "--batch x": "--batch: invalid int value: 'x'",
    "--size 12": "--size",
    "--decoder x": "--decoder: invalid choice",
    "--backbone mit_b9": "--backbone: ",
    "--steps -1": "--steps: -1: must be from 1",
    "--stop-at 0": "--stop-at: 0: must be from 1",
    "--lr -1": "--lr: -1: must be from 0 to 10",
    "--lr nan": "--lr: nan: must be from 0 to 10",
    "--tau 0": "--tau: 0: must be from 0.001",
    "--mask-ratio 2": "--mask-ratio: 2: must be from 0 to 1",
    "--dyce 1.5": "--dyce: 1.5: must be from 0 to 1",
    "--dyce": "--dyce: expected one argument",
    "--seed -1": "--seed: -1: must be from 0",
    "--border -5 0": "--border: -5: must be from 0",
    "--stop-at 9999": "--stop-at comes after --steps",
    "--source none": "add --labeled N",
    "--source none --labeled 00": "add --labeled N",
    "--recipe oracle --labeled 2": "--source target, as in oracle, takes all labels",
    "--recipe source --target none --labeled 2": "no image for --labeled",
    "--target none": "nothing to adapt to",
    "--recipe semidavil --target none": "nothing to adapt to",
    "--recipe t2sda --target none": "nothing to adapt to",
    "--recipe t2sda_dg --target streets": "generalises without a target",
    "--recipe source --language lcmsm --mix 1": "give --mask a weight",
    "--recipe lcmsm --mask 0": "give --mask a weight",
    "--recipe lcmsm --mix 0": "give --mix a weight",
    "--recipe t2sda --warmup 1000": "--t2s begins after --warmup",
    "--text stub": "--text does nothing without --language",
    "--restyled 1": "--restyled does nothing without --t2s",
    "--control": "--control does nothing without",
    "--tau 0.2": "--tau does nothing without",
    "--recipe source --threshold 0.1": "--threshold does nothing without",
}


def test_wrong_command_lines_are_one_clear_line(capsys, monkeypatch):
    rules = Mock(wraps=train.contradictions)
    monkeypatch.setattr(train, "contradictions", rules)
    messages = []
    for line, words in WRONG_FLAGS.items():
        with pytest.raises(SystemExit) as caught:
            train.parse_flags(line.split())
        *usage, message = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and len(usage) == 1 and usage[0].startswith("usage: ")
        assert message.startswith("train.py: error: ") and words in message, line
        messages.append(message.removeprefix("train.py: error: "))
    assert set(train.contradictions(*rules.call_args.args)) <= set(messages)  # each rule is tried


# -------------------------------------------------------------------------------------------------
# train.py: the step


def one_step(flags, networks, source, labeled, target, things=(), step=0, seed=0, shard=(0, 1)):
    """train.step_terms on a CPU -> terms, views."""
    draw = train.Draws(torch.Generator().manual_seed(seed), shard)
    clock = train.Clock(torch.device("cpu"))
    things = torch.tensor(things, dtype=torch.long)
    return train.step_terms(flags, step, networks, source, labeled, target, things, draw, clock)


def step_inputs(batch, size=64, classes=3, seed=0):
    """A source and a target as the loaders give them: noise, source labels of noise below row 9."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (batch, size, size), generator=g).byte()
    label[:, :9] = 255
    images = torch.rand(2, batch, 3, size, size, generator=g)
    inside = torch.ones(batch, size, size, dtype=torch.bool)
    return train.View(images[0], label), train.View(images[1], None, inside)


def striped_inputs():
    """The same, with two classes in the source, one in each half; and labelled target images."""
    source, target = step_inputs(2)
    source.label.copy_((torch.arange(64) // 32)[None, :, None].expand(2, 64, 64))
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return source, train.View(image, source.label.flip(1)), target


def networks_of(student, imagenet=None):
    """train.Networks for three classes."""
    teacher = model.teacher_mode(copy.deepcopy(student).requires_grad_(False))
    return train.Networks(student, teacher, imagenet, losses.ClassConfidence(3), None)


def unsure_networks():
    """A student and its teacher whose confidence differs from pixel to pixel."""
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, 8)
    with torch.no_grad():
        net.decoder.classifier.weight.normal_(std=1.0)
    return networks_of(net)


@torch.no_grad()
def teachers_word(networks, image):
    """The teacher's confidence and label of each pixel, by torch alone."""
    logits = networks.teacher(image).logits
    return F.interpolate(logits, image.shape[2:], mode="bilinear").softmax(1).max(1)


def test_one_pseudo_label_weight_for_the_batch_and_border_rows_without(monkeypatch):
    flags = train.parse_flags("--recipe mic --border 5 7 --threshold 0.4".split())
    networks, (source, target) = unsure_networks(), step_inputs(2)
    target.weight[:, :, :4] = False  # padding, where a pseudo-label would be an invention
    spy = Mock(wraps=train.cross_entropy)
    monkeypatch.setattr(train, "cross_entropy", spy)
    terms, views = one_step(flags, networks, source, None, target)
    assert list(terms) == ["source", "mix", "mask"]
    for name, call in zip(terms, spy.call_args_list, strict=True):
        assert torch.equal(call.args[1], views[name].label)
        assert name == "source" or call.args[2] is views[name].weight
    confidence, label = teachers_word(networks, target.image)
    q = (confidence >= 0.4).float().mean()
    assert 0.05 < q < 0.95
    _, pseudo, weight = views["mask"]
    assert torch.equal(pseudo, label.byte()) and torch.equal(views["target"].label, pseudo)
    assert (weight[:, :5] == 0).all() and (weight[:, -7:] == 0).all()
    torch.testing.assert_close(weight[:, 5:-7, 4:], q.expand(2, 52, 60))
    assert (weight[:, :, :4] == 0).all()
    mixed = views["mix"]
    pasted = (mixed.label != pseudo) & (mixed.weight != q)
    assert pasted.any() and (mixed.weight[pasted] == 1).all()  # source: in the border rows too
    assert (views["source"].weight is None) and target.label is None


def test_terms_carry_their_weights_and_the_mask_hides_blocks():
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, 8).eval()
    imagenet = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        for p in imagenet.parameters():
            p.add_(0.05)
    networks = networks_of(net, imagenet)._replace(teacher=copy.deepcopy(net).requires_grad_(False))
    values = []
    for weight in ("1", "0.25"):
        line = f"--mix {weight} --mask {weight} --fd {weight} --threshold 0.2 --mask-ratio 0.5"
        flags = train.parse_flags([*line.split(), "--no-augment-source"])
        source, target = step_inputs(2)
        source.label[:, :, :40] = 1
        terms, views = one_step(flags, networks, source, None, target, things=[1])
        values.append({name: value.item() for name, value in terms.items()})
    for name in ("mix", "mask", "fd"):
        assert values[0][name] > 0 and values[1][name] == pytest.approx(values[0][name] / 4)
    assert values[0]["source"] == values[1]["source"]
    assert torch.equal(views["source"].image, source.image)
    hidden = (views["mask"].image == net.pixel_mean).all(1)  # (2,64,64): blocks of the mean colour
    blocks = hidden.unfold(1, 16, 16).unfold(2, 16, 16).flatten(3)
    assert torch.equal(blocks.all(3), blocks.any(3)) and 0 < blocks.float().mean() < 1


def test_pull_moves_the_student_alone_and_starts_with_the_warm_up(monkeypatch):
    torch.manual_seed(0)
    student = Segmenter("mit_b0", "segformer", 3, 8, projection=True)
    networks = networks_of(student)
    networks.teacher.requires_grad_(True)  # its weights could learn, if a gradient reached them
    source, _, target = striped_inputs()
    spy = Mock(wraps=losses.t2s)
    monkeypatch.setattr(losses, "t2s", spy)
    for dyce in ("0", "0.5"):
        flags = train.parse_flags(f"--recipe t2sda --mix 0 --warmup 2 --dyce {dyce}".split())
        for step in (1, 2):
            terms, views = one_step(flags, networks, source, None, target, step=step)
            student.zero_grad()
            terms["t2s"].backward()
            moved = [p.grad.abs().max() > 0 for p in student.projection.parameters()]
            assert len(moved) == 4 and all(moved) == any(moved) == (step == 2)
            assert all(p.grad is None for p in networks.teacher.parameters())
    doubted, _, balanced, _ = [call.args[4] for call in spy.call_args_list]
    assert (balanced == 1).all() and doubted.max() == 1 > doubted.min()  # DyCE weighs them already
    assert set(views) == {"source", "restyled", "target"}
    assert (views["restyled"].image - source.image).abs().mean() > 0


def test_true_target_labels_join_the_supervised_loss_and_the_queries(monkeypatch):
    flags = train.parse_flags(
        "--recipe t2sda --warmup 0 --no-augment-source --labeled 2".split())
    torch.manual_seed(0)
    student = Segmenter("mit_b0", "segformer", 3, 8, projection=True).eval()
    networks = networks_of(student)._replace(teacher=copy.deepcopy(student))
    source, labeled, target = striped_inputs()
    spy = Mock(wraps=losses.t2s)
    monkeypatch.setattr(losses, "t2s", spy)
    terms, views = one_step(flags, networks, source, labeled, target)
    with torch.no_grad():
        logits = student(torch.cat([source.image, labeled.image])).logits
        expected = losses.cross_entropy(logits, torch.cat([source.label, labeled.label]))
    torch.testing.assert_close(terms["source"], expected)
    (call,) = spy.call_args_list  # cells of two restyled and of two labelled target images
    assert [len(rows) for rows in call.args[:4]] == [4 * 64, 4 * 64, 2 * 64, 2 * 64]


def test_consistency_is_of_confident_pixels_that_stay_the_targets(monkeypatch):
    flags = train.parse_flags("--recipe semidavil --threshold 0.5".split())
    networks, (source, _, target) = unsure_networks(), striped_inputs()
    target.weight[:, :, :4] = False  # padding
    spy = Mock(wraps=losses.consistency)
    monkeypatch.setattr(losses, "consistency", spy)
    monkeypatch.setattr(data, "strong_augment", lambda image, generator: image)
    terms, views = one_step(flags, networks, source, None, target)
    confidence, label = teachers_word(networks, target.image)
    (call,) = spy.call_args_list
    _, pseudo, trusted, valid = call.args
    assert torch.equal(pseudo, label.byte()) and 0.1 < trusted.float().mean() < 0.9
    clear = (confidence - 0.5).abs() > 1e-4  # not decided by rounding
    assert clear.float().mean() > 0.9
    assert torch.equal(trusted[clear], (confidence >= 0.5)[clear])
    stays = (views["mix"].image == target.image).all(1)
    assert stays.float().mean((1, 2)).tolist() == [0.5, 0.5]  # one of the two classes was pasted
    assert torch.equal(valid, stays & target.weight)
    assert list(terms) == ["source", "consistency"]


@pytest.mark.parametrize("recipe, passes", [("source", [4]), ("semidavil", [2, 2, 2])])
def test_with_a_teacher_labelled_target_images_have_a_pass_of_their_own(recipe, passes):
    flags = train.parse_flags(f"--recipe {recipe} --labeled 2 --no-augment-source".split())
    networks, seen = networks_of(Segmenter("mit_b0", "segformer", 3, 8)), []
    networks.student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    source, labeled, target = striped_inputs()
    one_step(flags, networks, source, labeled, target)
    assert [len(images) for images in seen] == passes
    assert torch.equal(torch.cat(seen)[:4], torch.cat([source.image, labeled.image]))


def test_class_mix_pastes_from_the_source_and_from_the_labelled_target(monkeypatch):
    flags = train.parse_flags("--recipe semidavil --labeled 2".split())
    networks = networks_of(Segmenter("mit_b0", "segformer", 3, 8))
    source, target = step_inputs(2)
    labeled = striped_inputs()[1]._replace(label=source.label.flip(1))
    monkeypatch.setattr(data, "strong_augment", lambda image, generator: image)
    origins = set()
    for seed in range(4):
        _, views = one_step(flags, networks, source, labeled, target, seed=seed)
        image, label, _ = views["mix"]
        for i in range(2):
            found = [(image[i] == domain.image[i]).all(0) for domain in (target, source, labeled)]
            assert sum(f.float().mean() for f in found) == 1
            assert not (found[1].any() and found[2].any())
            for name, domain, here in zip(("source", "labelled"), (source, labeled), found[1:]):
                if here.any():
                    origins.add(name)
                    assert torch.equal(label[i][here], domain.label[i][here])
    assert origins == {"source", "labelled"}


# -------------------------------------------------------------------------------------------------
# train.py: runs


def write_pairs(root, count=5, size=(56, 40), classes=3, name="train"):
    """A folder pair of made images: coloured stripes and noise -> SPEC with labels, without."""
    rng = np.random.default_rng(len(name))
    for part in ("images", "labels"):
        (root / name / part).mkdir(parents=True)
    for i in range(count):
        rows = np.arange(size[1])[:, None] * classes // size[1]
        label = (rows + np.zeros(size[0], int)[None]).astype(np.uint8)
        noise = rng.integers(0, 60, (*label.shape, 3))
        image = (label[..., None] * np.array([90, 40, 20]) + noise).astype(np.uint8)
        Image.fromarray(image).save(root / name / "images" / f"{i:03d}.png")
        Image.fromarray(label).save(root / name / "labels" / f"{i:03d}.png")
    images = f"folder:{root / name / 'images'}"
    return f"{images}:{root / name / 'labels'}", images


@pytest.fixture
def small_run(tmp_path):
    """A command line of a tiny run on made data; further flags are added by the tests."""
    labelled, _ = write_pairs(tmp_path, name="source")
    val, unlabelled = write_pairs(tmp_path, name="target")
    (tmp_path / "names.txt").write_text("sky\nwall\ncar\n")
    return ["--source", labelled, "--target", unlabelled, "--val", val,
            "--classes", str(tmp_path / "names.txt"),
            *"--crop 32 --batch 2 --channels 8 --steps 6 --log-every 1 --dtype fp32".split(),
            "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]


def run_train(argv, check=True, launcher=(), **environment):
    """Run train.py: in this process, or in new ones where a launcher or an environment is given.

    A failing run without `check` has to end with one line: status 1 or 2, `train.py: error: ...`.
    """
    if launcher or environment:
        command = [*(launcher or [sys.executable]), str(Path(HERE) / "train.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                              env=os.environ | environment)
    else:
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                train.main(argv)
            except SystemExit as leave:
                code = leave.code or 0
        for number, handler in handlers.items():
            signal.signal(number, handler)
        done = subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def fails(argv, *words, status=2, **options):
    """The run ends with this status and one clear line, that has the words -> the line."""
    done = run_train(argv, check=False, **options)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("train.py: error: ") and all(word in line for word in words), line
    return line


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def events(out, kind):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def same_tensors(a, b):
    """Whether two nested containers are equal, tensors bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def origin(crop, folder):
    """The name of the image that a crop, float (3,S,S), perhaps flipped, was cut from."""
    crop = (255 * crop).round().byte().permute(1, 2, 0).numpy()
    for path in sorted(folder.glob("*.png")):
        image = np.asarray(Image.open(path))
        windows = np.lib.stride_tricks.sliding_window_view(image, crop.shape)
        for seen in (crop, crop[:, ::-1]):
            if (windows == seen).all((-1, -2, -3)).any():
                return path.stem
    raise AssertionError(f"not a crop of an image of {folder}")


WRONG_INPUTS = [  # change (in capitals: made by the test), words of the message, status
    ("--source folder:/nonexistent:/nonexistent", "check the folder", 2),
    ("--source moon", "moon", 2),
    ("--source IMAGES", "has no labels, and a source needs them", 2),
    ("--source BLANK --rcs 0", "no pixel of its labels is one of the 3 classes", 2),
    ("--target BLANK --val none --labeled 2", "no pixel of its labels is one of the 3 classes", 2),
    ("--labeled 2", "has no labels", 2),
    ("--val IMAGES", "has no labels; give a labelled set, or none", 2),
    ("--classes /nonexistent.txt", "neither a file", 2),
    ("--init /nonexistent.pth", "no such weights file", 2),
    ("--init /nonexistent.pt", "no such weights file", 2),
    ("--init OURS --channels 16", "ours.pt: other network", 2),
    ("--recipe lcmsm --text /nonexistent.npz", "/nonexistent.npz", 2),
    ("--init NAN", "step 0: the gradient is not finite (source nan", 1),
    ("--out FILE/out", "Not a directory", 1),
]


def test_wrong_inputs_of_a_run_are_one_clear_line(small_run, tmp_path):
    blank = tmp_path / "blank"
    shutil.copytree(tmp_path / "source", blank)
    for path in sorted((blank / "labels").glob("*.png")):
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    run_train([*small_run, "--recipe", "source", "--steps", "1", "--val", "none"])
    state = load_checkpoint(tmp_path / "out/last.pt")
    save_checkpoint(tmp_path / "ours.pt", state)
    state["student"]["decoder.classifier.bias"][0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", state)
    shutil.rmtree(tmp_path / "out")
    made = {"IMAGES": small_run[3], "FILE": tmp_path / "names.txt", "OURS": tmp_path / "ours.pt",
            "NAN": tmp_path / "nan.pt", "BLANK": f"folder:{blank}/images:{blank}/labels"}
    for change, words, status in WRONG_INPUTS:
        for name, path in made.items():
            change = change.replace(name, str(path))
        fails([*small_run, *change.split()], words, status=status)
        assert not (tmp_path / "out/last.pt").exists()
        assert status == 1 or not (tmp_path / "out").exists(), change


def test_resumed_run_equals_uninterrupted_bit_for_bit(small_run, tmp_path):
    straight, halves = str(tmp_path / "straight"), str(tmp_path / "halves")
    run_train([*small_run, "--out", straight])
    run_train([*small_run, "--out", halves, "--stop-at", "3"])
    assert load_checkpoint(f"{halves}/last.pt")["step"] == 3
    done = run_train([*small_run, "--out", halves])
    a, b = (load_checkpoint(f"{out}/last.pt") for out in (straight, halves))
    for key in ("student", "teacher", "optimizer", "step"):
        assert same_tensors(a[key], b[key]), key
    steps = zip(events(straight, "step"), events(halves, "step"), strict=True)
    for step, (one, two) in enumerate(steps):
        for part in ("step", "source", "mix", "mask", "grad_norm", "lr"):
            assert one[part] == two[part]
        assert one["step"] == step + 1
        assert one["lr"] == pytest.approx(train.learning_rate(step, 1e-3, 6, 0))
    assert step == 5
    for weights in ("student", "teacher"):
        scores = tmp_path / f"{weights}.json"
        evaluation.main([f"{halves}/last.pt", "--weights", weights, "--json", str(scores)])
        for out in (straight, halves):
            (result,) = events(out, "result")
            assert json.loads(scores.read_text())["iou"] == result[weights]["iou"]
    assert "student mIoU" in done.stdout
    again = run_train([*small_run, "--out", halves])
    assert "nothing is left to do" in again.stdout


def test_flags_that_change_no_number_are_free_on_resume(small_run, tmp_path):
    argv = [*small_run, "--recipe", "source", "--val", "none"]
    run_train([*argv, "--stop-at", "2", "--dtype", "auto" if DEVICE == "cpu" else "fp32"])
    (tmp_path / "out").rename(tmp_path / "moved")
    argv += ["--out", str(tmp_path / "moved"), "--eval-every", "2"]
    free = "--stop-at 4 --save-every 3 --log-every 2 --workers 1 --cache"
    run_train([*argv, *free.split(), str(tmp_path / "other cache")])
    assert load_checkpoint(tmp_path / "moved/last.pt")["step"] == 4
    for change, words in (
            ("--slide", "--slide was False, is True"), ("--lr 0.5", "--lr was 0.001, is 0.5"),
            ("--dtype bf16", "--dtype was fp32, is bf16"), ("--mix 1", "--mix was 0.0, is 1.0")):
        line = fails([*argv, *change.split()], words)
        assert "moved/last.pt was trained with other flags" in line and "--eval-every" not in line
    # and so is each of the others
    names = ["sky", "wall", "car"]
    flags = train.parse_flags(argv).saved | {"world": 1}
    state = {"flags": flags, "classes": names}
    free = {"stop_at", "out", "eval_every", "save_every", "log_every", "workers", "cache"}
    assert free == train.FREE_ON_RESUME
    for name in flags:
        other = flags | {name: "other"}
        check = functools.partial(train.check_resume, other, names, state, "last.pt")
        shown = f"--{name.replace('_', '-')} was"
        if name == "world":
            shown = "the number of processes was"
        if name in free:
            check()
        else:
            with pytest.raises(CheckpointError, match=f"other flags: {shown} .*, is other; repeat"):
                check()
    with pytest.raises(CheckpointError, match="the names in --classes was .*, is .*'sofa'"):
        train.check_resume(flags, [*names[:2], "sofa"], state, "last.pt")


# what the version before wrote beside today's flags
EARLIER_FLAGS = dict(
    spatial_depth=2, mask_views=["target"], teacher_head="plain", dyce=False, hardest=0.2,
    omega=0.5, confident=0.95, contrast_pixels="all", contrast_start=0, pooled=False,
    projection=False, style="fourier", beta=[0.01], restyle="extra", class_weights="confidence",
    panel_every=500, profile=0)
EARLIER_RUNS = {  # recipe: what it had changed of these
    "mic": {},
    "semidavil": dict(dyce=True, hardest=1.0, threshold=0.968),
    "lcmsm": dict(mask_views=["source", "mix"], teacher_head="language"),
    "t2sda": dict(projection=True, contrast_start=50),
    "t2sda_dg": dict(projection=True, contrast_start=50, style="random"),
    "sepico": dict(projection=True),
}
EARLIER_CHANGES = dict(
    spatial_depth=1, mask_views=["source"], teacher_head="other", omega=1.0,
    contrast_pixels="64/class", contrast_start=5, pooled=True, projection="other", style="lab",
    beta=[0.1], restyle="half", class_weights="none")


def test_a_checkpoint_of_the_version_before_goes_on_if_its_flags_mean_the_same(small_run, tmp_path):
    def refused_flags(flags, earlier):
        state = {"flags": flags | EARLIER_FLAGS | earlier, "classes": ["sky"]}
        try:
            train.check_resume(flags, ["sky"], state, "last.pt")
        except CheckpointError as error:
            return re.search("other flags: (.*); repeat", str(error))[1]

    for recipe, earlier in EARLIER_RUNS.items():
        flags = train.parse_flags(["--recipe", recipe]).saved
        assert refused_flags(flags, earlier) is None, recipe
        for name, value in EARLIER_CHANGES.items():
            shown = f"--{name.replace('_', '-')} was {value}, is None"
            assert refused_flags(flags, earlier | {name: value}) == shown
    flags = train.parse_flags(["--recipe", "semidavil"]).saved
    other = EARLIER_RUNS["semidavil"] | dict(hardest=0.2, confident=0.9)
    assert refused_flags(flags, other) == "--threshold was 0.9, is 0.95, --dyce was 0.2, is 1.0"

    argv = [*small_run, "--recipe", "semidavil", "--text", "none", "--val", "none"]
    straight, path = tmp_path / "straight", tmp_path / "out/last.pt"
    run_train([*argv, "--out", str(straight)])
    run_train([*argv, "--stop-at", "3"])
    state = load_checkpoint(path)
    state["flags"] |= EARLIER_FLAGS | EARLIER_RUNS["semidavil"]
    save_checkpoint(path, state)
    run_train(argv)
    states = [load_checkpoint(out)["student"] for out in (path, straight / "last.pt")]
    assert same_tensors(*states)


def test_teacher_layers_without_a_batch_have_the_statistics_of_the_student(small_run, tmp_path):
    """LC-MSM's teacher labels with its language decoder; its plain one sees nothing."""
    argv = [*small_run, *"--mask-block 4 --steps 3 --crop 64 --val none".split()]
    run_train([*argv, *"--recipe lcmsm --text stub --out".split(), str(tmp_path / "lcmsm")])
    run_train([*argv, "--recipe", "mic", "--out", str(tmp_path / "mic")])
    seen = {("lcmsm", "language_decoder"), ("mic", "decoder")}
    for recipe, part in [*seen, ("lcmsm", "decoder")]:
        state = load_checkpoint(tmp_path / f"{recipe}/last.pt")
        for name in ("running_mean", "running_var"):
            name = f"{part}.fusion.bn.{name}"
            same = torch.equal(state["teacher"][name], state["student"][name])
            assert same == ((recipe, part) not in seen), f"{recipe}: {name}"


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(number, status, small_run, tmp_path):
    argv = [*small_run, "--steps", "100000", "--recipe", "source"]
    child = subprocess.Popen([sys.executable, str(Path(HERE) / "train.py"), *argv],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while "step 2/" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    step = load_checkpoint(tmp_path / "out/last.pt")["step"]
    assert child.returncode == status and step >= 2 and f"saved at step {step};" in out
    done = run_train([*argv, "--stop-at", str(step + 1)])
    assert f"step {step + 1}/100000" in done.stdout and f"step {step}/" not in done.stdout


@pytest.mark.parametrize("recipe", ["source", "oracle", "dacs", "daformer"])
def test_recipes_run(recipe, small_run, tmp_path, monkeypatch):
    sampler = Mock(wraps=data.RareClassSampler)
    monkeypatch.setattr(data, "RareClassSampler", sampler)
    argv = [*small_run, "--recipe", recipe, "--target", small_run[5],
            *"--steps 2 --accum 2 --workers 1 --eval-every 1".split()]
    if recipe == "oracle":
        argv += ["--source", "target"]
    run_train(argv)
    expected = {"source"} if recipe in ("source", "oracle") else {"source", "mix"}
    step = events(tmp_path / "out", "step")[-1]
    assert expected == {"source", "mix", "mask", "fd"} & step.keys()
    assert (tmp_path / "out/best.pt").exists() and len(events(tmp_path / "out", "eval")) == 2
    assert (recipe == "daformer") == sampler.called  # rare classes are sampled by this recipe alone
    state = load_checkpoint(tmp_path / "out/best.pt")
    assert state["flags"]["source"] == small_run[5 if recipe == "oracle" else 1]
    assert state["teacher"]["decoder.fusion.bn.running_var"].ne(1).all()  # of images


@pytest.mark.parametrize("flags, terms", [
    ("t2sda --t2s 0", ["mix"]), ("mic --mask-ratio 1", ["mix", "mask"]),
    ("cluda --mix 0 --rcs 0", ["cluda"]), ("mic --mix 0 --threshold 1", ["mask"]),
    ("t2sda_dg --target none --restyled 0", ["t2s"]),
    ("lcmsm --mix 0 --consistency 1 --text stub", ["mask_source", "mask_mix", "consistency"])])
def test_flags_that_leave_little_to_do_still_train(flags, terms, small_run, tmp_path):
    run_train([*small_run, *"--steps 2 --crop 64 --val none --recipe".split(), *flags.split()])
    found = events(tmp_path / "out", "step")[-1]
    known = ["mix", "mask", "t2s", "restyled", "cluda", "mask_source", "mask_mix", "consistency"]
    assert [name for name in known if name in found] == terms


def test_init_takes_pretrained_weights_and_our_checkpoints_of_other_heads(small_run, tmp_path):
    weights = tmp_path / "mit_b0.pth"
    torch.save(MixTransformer("mit_b0").state_dict(), weights)
    for recipe, more in (("daformer", "--lr 1e-3"), ("sepico", "--lr 0"), ("mic", "--lr 1e-3")):
        out = tmp_path / recipe
        argv = [*small_run, *"--steps 1 --val none --recipe".split(), recipe, *more.split()]
        done = run_train([*argv, "--init", str(weights), "--out", str(out)])
        far = "feature distance: off" in done.stdout  # from the weights of ImageNet
        assert far == (recipe != "daformer") == ("fd" not in events(out, "step")[0])
        weights = out / "last.pt"
    first = load_checkpoint(tmp_path / "daformer/last.pt")["student"]
    second = load_checkpoint(tmp_path / "sepico/last.pt")["student"]
    new = {f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(second) - set(first) == new
    assert torch.equal(first["decoder.classifier.weight"], second["decoder.classifier.weight"])


# -------------------------------------------------------------------------------------------------
# train.py: several processes, and what breaks a run


GRADIENTS = """
import copy, os, sys, torch, torch.distributed as dist
sys.path[:0] = [sys.argv[1]]
import test_all, model, train
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
flags = train.parse_flags("--recipe mic --threshold 0.4 --fd 1".split())
torch.manual_seed(0)
net = model.Segmenter("mit_b0", "segformer", 3, 8)
with torch.no_grad():
    net.decoder.classifier.weight.normal_()
    imagenet = copy.deepcopy(net).requires_grad_(False).eval()
    for p in net.parameters():
        p.add_(0.01 * torch.randn_like(p))
net.eval()
teacher = copy.deepcopy(net).requires_grad_(False).eval()
source, target = test_all.step_inputs(2)
source.label[0, 9:], source.label[1, 40:] = 1, 2
student = net
if world > 1:
    student = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    part = slice(rank, rank + 1)
    source = train.View(source.image[part], source.label[part])
    target = train.View(target.image[part], None, target.weight[part])
networks = train.Networks(student, teacher, imagenet, None, None)
terms, _ = test_all.one_step(
    flags, networks, source, None, target, [1, 2], seed=5, shard=(rank, world))
assert set(terms) == {"source", "fd", "mix", "mask"}
sum(terms.values()).backward()
if rank == 0:
    torch.save([p.grad for p in net.parameters()], sys.argv[2])
if world > 1:
    dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    for launcher, out in (((sys.executable,), "one"), (TORCHRUN, "two")):
        done = subprocess.run([*launcher, str(script), HERE, str(tmp_path / out)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    scale = max(g.abs().max() for g in one)
    assert scale > 1e-4
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(scale))


def test_two_processes_draw_the_samples_of_one(small_run, monkeypatch):
    def samples(world, batch):
        f = train.parse_flags([*small_run, "--batch", str(batch), "--accum", "2"])
        dataset = data.open_dataset(f.source, "train", data.class_names(f.classes))
        drawn = []
        for rank in range(world):
            monkeypatch.setattr(train, "RANK", rank)
            monkeypatch.setattr(train, "WORLD", world)
            views = train.Stream(dataset, f).views(1, torch.device("cpu"))
            drawn.append(torch.stack([next(views).image for _ in range(4)]))
        return torch.cat(drawn, 1)  # (4 batches, 4 images, 3,S,S)

    one, two = samples(1, 4), samples(2, 2)
    assert torch.equal(one, two) and len(two.flatten(0, 1).unique(dim=0)) == 16


def test_two_processes_train_and_evaluate_like_one(small_run, tmp_path):
    more = "--steps 4 --batch 1 --crop 64 --t2s 0.1 --cluda 0.1 --sepico 0.1"
    run_train([*small_run, *more.split()], launcher=TORCHRUN, OMP_NUM_THREADS="1")
    terms = {"source", "mix", "mask", "t2s", "cluda", "sepico"}
    assert terms <= events(tmp_path / "out", "step")[-1].keys()
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pt")) == ["last.pt"]
    (result,) = events(tmp_path / "out", "result")
    assert result["student"]["images"] == 5  # odd, over two processes
    net = model.build_segmenter(load_checkpoint(tmp_path / "out/last.pt"))
    val = data.open_dataset(small_run[5], "val", data.class_names(small_run[7]))
    alone = evaluation.evaluate(net, val)
    assert alone["iou"] == result["student"]["iou"]
    assert alone["accuracy"] == result["student"]["accuracy"]


DYING = """
import os, sys
sys.path.insert(0, {here!r})
import train
real, calls = train.step_terms, []
def step_terms(*args, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise RuntimeError("rank 1 dies")
    return real(*args, **options)
train.step_terms = step_terms
train.main()
"""


def test_a_dying_rank_ends_the_job(small_run, tmp_path):
    run_train([*small_run, "--stop-at", "2"], launcher=TORCHRUN, OMP_NUM_THREADS="1")
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(here=HERE))
    before, begin = (tmp_path / "out/last.pt").read_bytes(), time.time()
    done = subprocess.run([*TORCHRUN, str(script), *small_run], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "rank 1 dies" in done.stderr and time.time() - begin < 60
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_a_broken_image_ends_the_run_and_loses_no_checkpoint(small_run, tmp_path):
    for domain in ("source", "target"):
        broken = tmp_path / domain / "images/003.png"
        broken.write_bytes(broken.read_bytes()[:200])
    begin = time.time()
    argv = [*small_run, "--rcs", "0", "--workers"]
    fails([*argv, "1"], "source/images/003.png", launcher=(sys.executable,))  # a loader process
    fails([*argv, "0"], "source/images/003.png")
    assert time.time() - begin < 120
    good, _ = write_pairs(tmp_path, name="good")
    argv = [*small_run, "--source", good, "--out", str(tmp_path / "last")]
    fails([*argv, *"--recipe source --target none --steps 2".split()], "target/images/003.png")
    assert load_checkpoint(tmp_path / "last/last.pt")["step"] == 2  # the final evaluation failed


@pytest.mark.parametrize("error, status, words", [
    (torch.OutOfMemoryError("x"), 1, "out of memory; try --checkpointing"),
    (MemoryError(), 1, "out of memory"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
    (OSError(28, "No space left on device", "x"), 1, "No space left on device: 'x'"),
    (DataError("a.png: damaged"), 2, "a.png: damaged"), (TextError("a.npz: x"), 2, "a.npz: x"),
    (WeightsError("a.pth: x"), 2, "a.pth: x"), (CheckpointError("a.pt: x"), 2, "a.pt: x")])
def test_what_ends_a_run_from_outside_is_one_line(error, status, words, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", Mock(side_effect=error))
    with pytest.raises(SystemExit) as caught:
        train.main([])
    err = capsys.readouterr().err
    assert caught.value.code == status and words in err and err.count("\n") == 1
    assert status == 130 or err.startswith("train.py: error: ")
    monkeypatch.setattr(train, "run", lambda argv: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train.main([])  # a fault of ours keeps its traceback


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's code needs no C++ compiler")
def test_compile_without_a_compiler_is_one_line(small_run, tmp_path):
    fails([*small_run, "--compile"], "--compile: torch.compile does not work here", status=1,
          CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


def made_bank(classes=3, dim=12, seed=0, kind="clip"):
    rows = F.normalize(torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
    return TextBank(rows, tuple(f"class {i}" for i in range(classes)), kind)


def write_bank(path, bank, **changes):
    np.savez(path, **({"emb": bank.embeddings.numpy(), "names": np.array(bank.names), "kind": bank.kind} | changes))
    return str(path)


@pytest.mark.parametrize("channels, total, text, decoder", [
    (512, 109_923_929, 524_800, 14_240_646), (256, 88_867_929, 262_400, None)])
def test_published_parameter_counts_of_lcmsm(channels, total, text, decoder):
    bank = made_bank(19, 1024)
    with torch.device("meta"):
        net = Segmenter("mit_b5", "daformer", 19, channels, "lcmsm", bank)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert count["text"] == text and sum(count.values()) == total + text
    assert decoder is None or count["language_decoder"] == decoder


def language_net(bank=None, depth=2, classes=3):
    torch.manual_seed(0)
    return Segmenter("mit_b0", "segformer", classes, 8, "lcmsm", bank or made_bank(classes), depth).eval()


def test_correlation_is_bounded_and_the_plain_head_knows_no_text():
    net, x = language_net(), torch.rand(2, 3, 64, 96)
    features = net.language_decoder.fusion(net.encode(x))
    scores = kernels.text_correlation(features, net.text(), net.language_decoder.scale)
    assert scores.shape == (2, 3, 16, 24) and scores.abs().max() <= 1 / 0.07 + 1e-4
    net.language_decoder(net.encode(x), net.text())[0].sum().backward()
    assert net.text.projection.weight.grad.abs().max() > 0
    net.zero_grad()
    net(x).logits.sum().backward()
    assert all(p.grad is None for p in net.text.parameters())  # no text gradient from the plain head
    plain, language = net(x).logits, net(x, "language").logits
    net.text.bank.copy_(made_bank(seed=1).embeddings)
    assert torch.equal(net(x).logits, plain) and not torch.allclose(net(x, "language").logits, language)
    with pytest.raises(ValueError, match="no 'language' head"):
        Segmenter("mit_b0", "segformer", 3, 8)(x, "language")


def test_permuting_the_bank_permutes_the_language_decoder():
    net, x, order = language_net(), torch.rand(1, 3, 64, 64), torch.tensor([2, 0, 1])
    with torch.no_grad():
        before = net(x, "language")
        scores = kernels.text_correlation(before.features, net.text(), 1.0)
        net.text.bank.copy_(net.text.bank[order])
        torch.testing.assert_close(kernels.text_correlation(before.features, net.text(), 1.0), scores[:, order])
        classifier = net.language_decoder.classifier
        weight = classifier.weight[order]  # (K,C+K,1,1): rows, then the columns of the scores
        classifier.weight.copy_(torch.cat([weight[:, :8], weight[:, 8:][:, order]], 1))
        classifier.bias.copy_(classifier.bias[order])
        torch.testing.assert_close(net(x, "language").logits, before.logits[:, order])


def test_spatial_block_is_shared_by_classes_and_applications():
    decoder, scores = language_net().language_decoder, torch.randn(2, 3, 5, 7)
    once = torch.stack([decoder.spatial(scores[:, k:k + 1])[:, 0] for k in range(3)], 1) + scores.amax(1, keepdim=True)
    once = once.relu()
    twice = torch.stack([decoder.spatial(once[:, k:k + 1])[:, 0] for k in range(3)], 1) + once.amax(1, keepdim=True)
    torch.testing.assert_close(decoder.refine(scores), twice)
    assert torch.equal(language_net(depth=0).language_decoder.refine(scores), scores)


def test_teacher_shares_the_text_projection():
    student, teacher = language_net(), language_net()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = teacher.decoder.classifier.bias.clone()
    model.ema_update(teacher, student, 9, 0.5)
    assert same_tensors(dict(teacher.text.state_dict()), dict(student.text.state_dict()))
    torch.testing.assert_close(teacher.decoder.classifier.bias, before + 0.5)


def test_text_banks(tmp_path, monkeypatch, capsys):
    bank = made_bank()
    path = write_bank(tmp_path / "bank.npz", bank)
    read = text_bank(path, bank.names)
    assert torch.equal(read.embeddings, bank.embeddings) and read.kind == "clip" and read.names == bank.names
    shuffled = text_bank("shuffled:" + path, bank.names)
    assert shuffled.kind == "shuffled" and (shuffled.embeddings != bank.embeddings).any(1).all()
    assert torch.equal(shuffled.embeddings.sort(0).values, bank.embeddings.sort(0).values)
    stub = text_bank("stub", bank.names)
    torch.testing.assert_close(stub.embeddings @ stub.embeddings.T, torch.eye(3))
    assert torch.equal(stub.embeddings, text_bank("stub", bank.names).embeddings)
    assert text_bank("learned", bank.names).kind == "learned" and capsys.readouterr().err == ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text_bank("auto", bank.names).kind == "stub" and "STUB" in capsys.readouterr().err
    os.makedirs(model.text_cache())
    write_bank(model.text_cache() + "/x.npz", bank)
    assert text_bank("auto", bank.names).kind == "clip" and capsys.readouterr().err == ""
    Path(model.text_cache(), "damaged.npz").write_bytes(b"")
    assert text_bank("auto", bank.names).kind == "clip"
    write_bank(model.text_cache() + "/y.npz", bank)
    with pytest.raises(TextError, match="x.npz, .*y.npz"):
        text_bank("auto", bank.names)
    newer = write_bank(tmp_path / "newer.npz", bank, open_clip="99.0")
    assert text_bank(newer, bank.names).about["open_clip"] == "99.0" and "open_clip 99.0" in capsys.readouterr().err
    np.save(tmp_path / "array.npy", np.zeros(3))
    shutil.copy(tmp_path / "array.npy", tmp_path / "array.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("emb", "text")
    half = Path(path).read_bytes()
    (tmp_path / "half.npz").write_bytes(half[:len(half) // 2])
    strange = {name: str(tmp_path / f"{name}.npz") for name in ("array", "empty", "other", "half")}
    strange |= {f"strange {i}": write_bank(tmp_path / f"strange{i}.npz", bank, **content) for i, content in enumerate((
        dict(names="sky"), dict(emb=np.array(["a", "b", "c"])), dict(emb=bank.embeddings.numpy().astype(complex)),
        dict(kind="learned"), dict(kind=["a", "b"]), dict(sha256="0"), dict(emb=np.zeros((3, 4), np.float32))))}
    faults = {name: (spec, bank.names) for name, spec in strange.items()} | {"folder": (str(tmp_path), bank.names)}
    faults |= {"order": (path, bank.names[::-1]), "number": (path, bank.names[:2]),
              "absent": (str(tmp_path / "no.npz"), ("a",)),
              "length": (write_bank(tmp_path / "l.npz", bank, emb=2 * bank.embeddings.numpy()), bank.names),
              "nan": (write_bank(tmp_path / "n.npz", bank, emb=np.full((3, 4), np.nan, np.float32)), bank.names),
              "hash": (write_bank(tmp_path / "h.npz", bank, sha256="0", templates=np.array(["{}"]), model="m",
                                  pretrained="p"), bank.names),
              "spec": ("moon", bank.names), "random tower": ("clip:ViT-B-32/", bank.names)}
    with pytest.raises(TextError, match="first difference: none for other"):
        text_bank(path, (*bank.names, "other"))
    for spec, names in faults.values():
        with pytest.raises(TextError) as caught:
            text_bank(spec, names)
        assert "\n" not in str(caught.value) and spec.split(":")[-1] in str(caught.value)


def test_openclip_encodes_prompts_once(tmp_path, monkeypatch):
    """A tower with random weights stands in for one with real ones, as a local file; the cut context must be exact."""
    open_clip = model.import_optional("open_clip")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    torch.manual_seed(0)
    tower = open_clip.create_model("tiny")
    torch.save(tower.state_dict(), tmp_path / "tiny.pt")
    spec = f"clip:tiny/{tmp_path / 'tiny.pt'}"
    bank = text_bank(spec, ("road", "person"))
    tokens = open_clip.get_tokenizer("tiny")(["a photo of a road.", "a photo of a pedestrian."])
    with torch.no_grad():
        torch.testing.assert_close(bank.embeddings, F.normalize(tower.eval().encode_text(tokens), dim=1))
    monkeypatch.setattr(model, "open_text_tower", None)  # the second time nothing is encoded
    assert torch.equal(text_bank(spec, ("road", "person")).embeddings, bank.embeddings)
    assert bank.kind == "clip" and text_bank("auto", ("road", "person")).kind == "clip"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    (tmp_path / "mine.txt").write_text("\ufeffeine {}\n\nviele {} hier\n", encoding="utf-8")
    mine = text_bank(f"{spec}:{tmp_path / 'mine.txt'}", ("road", "Bicyclist"))
    assert mine.about["templates"] == ["eine road", "viele road hier", "eine cyclist", "viele cyclist hier"]
    (tmp_path / "mine.txt").write_text("no class\n")
    with pytest.raises(TextError, match="mine.txt: every line"):
        text_bank(f"{spec}:{tmp_path / 'mine.txt'}", ("road", "person"))
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "tiny.pt")  # other weights under the same name
    assert not torch.equal(text_bank(spec, ("road", "person")).embeddings, bank.embeddings)


def test_openclip_without_network_fails_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begin = time.time()
    with pytest.raises(TextError, match="no weights.*FILE.npz"):
        text_bank("clip:ViT-B-32/no_such_tag", ("road",))
    assert time.time() - begin < 30


def test_probe_spares_the_retries_without_network(tmp_path, monkeypatch):
    """Also where huggingface_hub was imported first, as timm does, and has read its switch."""
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub = model.import_optional("huggingface_hub.constants")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model.urllib.request, "getproxies", dict)
    monkeypatch.setattr(model.socket, "create_connection", refuse)
    begin = time.time()
    with pytest.raises(TextError, match="no weights"):
        text_bank("clip:ViT-B-16/laion2b_s34b_b88k", ("road",))
    assert hub.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1" and time.time() - begin < 30
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(WeightsError, match="^--init hub, timm:resnet18: no network, and no weights.* FILE or none$"):
        Segmenter("timm:resnet18", "segformer", 3, 8, pretrained=True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(WeightsError, match="^--init hub, nvidia/mit-b0: no network, and no weights"):
        load_backbone(Segmenter("mit_b0", "segformer", 3, 8), "hub")


def test_text_command(tmp_path, capsys):
    path = write_bank(tmp_path / "bank.npz", made_bank())
    model.main(["text", "--names", "class 0,class 1,class 2", "--text", path, "--out", str(tmp_path / "copy.npz")])
    out = capsys.readouterr().out
    assert "raw: cosine" in out and "centred: cosine" in out
    assert text_bank(str(tmp_path / "copy.npz"), made_bank().names).kind == "clip"
    (tmp_path / "names.txt").write_text("class 0\n\nclass 1\r\nclass 2", encoding="utf-8-sig")
    model.main(["text", "--names", str(tmp_path / "names.txt"), "--text", path])
    (tmp_path / "latin.txt").write_bytes("stra\xdfe\nhaus".encode("latin-1"))
    capsys.readouterr()
    faults = {"bank.npz": ["a,b", path], "--names a,b,a": ["a,b,a", "stub"], "--names a,": ["a,", "stub"],
              "nosuch.txt": ["nosuch.txt", "stub"], "latin.txt": [str(tmp_path / "latin.txt"), "stub"],
              "--out x": ["a,b", "stub", "--out", "x"], "learned must": ["a,b", "learned", "--out", "x.npz"],
              "/no/": ["a,b", "stub", "--out", "/no/such/x.npz"]}
    for told, (names, text, *out) in faults.items():
        with pytest.raises(SystemExit) as leave:
            model.main(["text", "--names", names, "--text", text, *out])
        err = capsys.readouterr().err
        assert leave.value.code == 2 and told in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["FILE", "shuffled", "learned", "none", "auto"])
def test_lcmsm_trains_and_evaluates_with_every_head(text, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bank = made_bank()._replace(names=("sky", "wall", "car"))
    path = write_bank(tmp_path / "bank.npz", bank)
    spec = {"FILE": path, "shuffled": "shuffled:" + path}.get(text, text)
    argv = [*small_run, "--recipe", "lcmsm", "--steps", "3", "--text", spec]
    done = run_train([*argv, "--stop-at", "2"])
    assert ("STUB" in done.stderr) == (text == "auto")
    other = bank._replace(embeddings=bank.embeddings.flip(1))
    write_bank(path, other)
    run_train(argv)
    step = events(tmp_path / "out", "step")[-1]
    assert {"source", "mix", "mask_source", "mask_mix"} <= step.keys() and "mask" not in step
    if text == "FILE":  # the checkpoint's bank went on, whatever was written over its file
        saved = load_checkpoint(tmp_path / "out/last.pt")
        assert torch.equal(saved["student"]["text.bank"], bank.embeddings)
        assert saved["text"]["kind"] == "clip"
        log = [events(tmp_path / "out", event)[0]["text"] for event in ("start", "resume")]
        assert log[0] == log[1] and log[0]["dimensions"] == bank.embeddings.shape[1]
        init = ["--init", str(tmp_path / "out/last.pt"), "--out", str(tmp_path / "init")]
        run_train([*argv, *init, "--stop-at", "1"])
        saved = load_checkpoint(tmp_path / "init/last.pt")  # a new run has the bank that it names
        assert torch.equal(saved["student"]["text.bank"], other.embeddings)
        assert torch.equal(saved["teacher"]["text.bank"], saved["text"]["embeddings"])
    (tmp_path / "bank.npz").unlink()  # the checkpoint holds what evaluation needs
    for head in ("plain", "language", "mean"):
        scores = tmp_path / f"{head}.json"
        evaluation.main([str(tmp_path / "out/last.pt"), "--head", head, "--json", str(scores)])
        if head == "plain":
            (result,) = events(tmp_path / "out", "result")
            assert json.loads(scores.read_text())["iou"] == result["student"]["iou"]


def test_statistics_stay_where_the_teacher_looks_at_source():
    net = model.teacher_mode(Segmenter("mit_b0", "segformer", 3, 8))
    norm, image = net.decoder.fusion.bn, torch.rand(2, 3, 32, 32)
    before = norm.running_mean.clone()
    with torch.no_grad():
        with model.frozen_statistics(net):
            inside = net(image).logits
        assert torch.equal(norm.running_mean, before) and norm.momentum == 0.1
        assert torch.equal(net(image).logits, inside) and not torch.equal(norm.running_mean, before)


CONTRASTS = {  # flags: terms
    "cluda": ["cluda"],
    "t2sda": ["t2s"],
    "t2sda --restyled 0.5 --mix 0": ["t2s", "restyled"],
    "sepico --tau 0.2 --accum 2": ["sepico"],
    "t2sda_dg --target none": ["t2s", "restyled"],
    "mic --cluda 0.1 --t2s 0.1 --sepico 0.1 --language lcmsm --text stub":
        ["cluda", "t2s", "sepico", "mask_source", "mask_mix"],
}


@pytest.mark.parametrize("flags", CONTRASTS)
def test_contrasts_train_and_resume(flags, small_run, tmp_path, monkeypatch):
    more = "--crop 64 --steps 4 --mask-block 4 --val none --recipe"
    argv = [*small_run, *more.split(), *flags.split()]
    real = data.SegmentationDataset.arrays
    spy = create_autospec(real, side_effect=real)
    monkeypatch.setattr(data.SegmentationDataset, "arrays", spy)
    run_train([*argv, "--out", str(tmp_path / "straight")])
    opened = {call.args[0].spec for call in spy.call_args_list}
    assert opened == ({small_run[1]} if "dg" in flags else {small_run[1], small_run[3]})
    run_train([*argv, "--out", str(tmp_path / "halves"), "--stop-at", "2"])
    run_train([*argv, "--out", str(tmp_path / "halves")])
    a, b = (load_checkpoint(tmp_path / f"{out}/last.pt") for out in ("straight", "halves"))
    for key in ("student", "teacher", "optimizer", "statistics"):
        assert same_tensors(a[key], b[key]), key
    steps = events(tmp_path / "straight", "step")
    terms = {"cluda", "t2s", "sepico", "restyled", "mask", "mask_source", "mask_mix"}
    for step in steps:
        assert set(CONTRASTS[flags]) == terms & step.keys()
        assert ("t2s" in flags) == ("class_weights" in step)
        assert "contrast" in step["ms"]
    for name in CONTRASTS[flags]:
        assert any(step[name] > 0 for step in steps), name
    assert a["statistics"]["confidence.seen"].any() == ("t2s" in flags)
    assert (a["statistics"]["gaussians.sums"] != 0).any() == ("sepico" in flags)
    has_head = any(name.startswith("projection.") for name in a["student"])
    assert has_head == ("t2s" in flags or "sepico" in flags)
    evaluation.main([str(tmp_path / "straight/last.pt"), "--data", small_run[5]])


def test_control_computes_contrasts_without_effect(small_run, tmp_path):
    """Bit for bit; the teacher's statistics too, though it sees the source."""
    lines = ("daformer", "cluda --control", "sepico --control", "cluda")
    states = {}
    for line in lines:
        out = tmp_path / line
        argv = [*small_run, *"--crop 64 --val none --recipe".split(), *line.split()]
        run_train([*argv, "--out", str(out)])
        saved = load_checkpoint(out / "last.pt")
        states[line] = []
        for who in ("student", "teacher"):
            kept = {k: v for k, v in saved[who].items() if not k.startswith("projection.")}
            states[line].append(kept)
        if "--control" in line:
            assert events(out, "step")[-1][line.split()[0]] == 0
    for line in lines[1:3]:
        assert same_tensors(states["daformer"], states[line]), line
    assert not same_tensors(states["daformer"], states["cluda"])


@pytest.mark.parametrize("flags, number, terms", [
    ("semidavil", 0, "source consistency"),
    ("semidavil", 2, "source consistency"),
    ("semidavil --text learned", "all", "source consistency"),
    ("semidavil --source none --text none", 2, "source consistency"),
    ("source", 3, "source"),
    ("source --source none --rcs 0.01", 2, "source"),
    ("all", 0, "source mix mask cluda t2s"),
    ("all", 1, "source mix mask cluda t2s")])
def test_few_target_labels(flags, number, terms, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = small_run[5]  # the target with its labels
    argv = [*small_run, "--target", given, *"--steps 4 --crop 64 --accum 2 --labeled".split(),
            str(number), "--recipe", *flags.split()]
    if "semidavil" in flags:
        argv += ["--threshold", "0.3"]
    real = data.Crops.__getitem__
    drawn = []

    def draw(self, k):
        item = real(self, k)
        drawn.append((self.dataset.spec, self.labels, self.dataset.names[item["index"]]))
        return item

    monkeypatch.setattr(data.Crops, "__getitem__", draw)
    done = run_train([*argv, "--stop-at", "2"])
    state = load_checkpoint(tmp_path / "out/last.pt")
    (start,) = events(tmp_path / "out", "start")
    run_train(argv)
    wanted = 5 if number == "all" else number
    assert len(state["labeled"]) == wanted and start.get("labeled", []) == state["labeled"]
    assert wanted == 0 or f"split {start['labeled_sha256']}" in done.stdout
    with_labels = {name for spec, labels, name in drawn if spec == given and labels}
    without = {name for spec, labels, name in drawn if spec == given and not labels}
    assert with_labels <= set(state["labeled"]) and bool(with_labels) == bool(wanted)
    assert bool(without) == (not flags.startswith("source"))
    assert wanted == 5 or not without & with_labels  # no other label was looked at
    assert ("--source none" in flags) != any(spec == small_run[1] for spec, _, _ in drawn)
    known = {"source", "fd", "mix", "mask", "consistency", "cluda", "t2s"}
    assert set(terms.split()) == known & events(tmp_path / "out", "step")[-1].keys()
    evaluation.main([str(tmp_path / "out/last.pt")])


def test_another_labelled_set_is_refused_on_resume(small_run, tmp_path):
    split, given = tmp_path / "split.txt", small_run[5]
    split.write_text("000\n002\n")
    argv = [*small_run, "--target", given, "--recipe", "semidavil", "--labeled", str(split)]
    run_train([*argv, "--stop-at", "1"])
    (start,) = events(tmp_path / "out", "start")
    assert start["labeled_sha256"] == hashlib.sha256(b"000\n002").hexdigest()[:16]
    split.write_text("000\n003\n")
    fails(argv, f"{tmp_path}/out/last.pt", "not all the same")
    assert load_checkpoint(tmp_path / "out/last.pt")["step"] == 1
    split.write_text("002\n000\n")
    run_train(argv)


def test_a_run_says_what_its_source_never_labels_and_where_it_goes_on(
        small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(data.STREETS["streets"], "train", range(2))
    (tmp_path / "names.txt").write_text("sky\nsofa\ncar\n")
    argv = [*small_run, *"--source streets --recipe source --val none --steps 2".split()]
    done = run_train([*argv, "--stop-at", "1"])
    assert "note: streets has no label for sofa\n" in done.stdout
    assert "goes on from" not in done.stdout
    assert f"goes on from {tmp_path}/out/last.pt, step 1\n" in run_train(argv).stdout
    with pytest.raises(model.CheckpointError, match="/out: a folder, give its last.pt"):
        load_checkpoint(tmp_path / "out")


def test_trained_class_vectors_of_the_guidance_go_on_from_a_checkpoint(small_run, tmp_path):
    argv = [*small_run, *"--recipe semidavil --text learned --val none".split()]
    run_train(argv)
    first = load_checkpoint(tmp_path / "out/last.pt")["student"]
    other = ["--init", str(tmp_path / "out/last.pt"), *"--lr 0 --seed 1".split()]
    run_train([*argv, *other, "--out", str(tmp_path / "two")])
    second = load_checkpoint(tmp_path / "two/last.pt")["student"]
    assert first["guidance.vectors"].shape == (3, 8)
    assert torch.equal(first["guidance.vectors"], second["guidance.vectors"])


@pytest.mark.parametrize("name, strides, mean", [
    ("vit_base_patch32_clip_224", (32,) * 4, 0.48145466), ("resnet50_clip", (4, 8, 16, 32), 0.48145466),
    ("vit_small_patch14_dinov2", (14,) * 4, 0.485), ("eva02_tiny_patch14_224", (14,) * 4, 0.48145466)])
def test_vision_language_towers_take_any_size(name, strides, mean, tmp_path):
    torch.manual_seed(0)
    net = Segmenter(f"timm:{name}", "segformer", 3, 8).eval()
    assert net.backbone.strides == strides and net.pixel_mean[0, 0].item() == pytest.approx(mean)
    for size in ((64, 96), (50, 70), (33, 47)):
        with torch.no_grad():
            out = net(torch.rand(1, 3, *size))
        assert out.logits.shape[2:] == tuple(-(-side // strides[0]) for side in size)
    # what is seen at an edge is answered at that edge, also where the last patch is not a whole one
    forward, cell = net.backbone.forward, strides[0]
    net.backbone.forward = lambda x: 4 * [F.avg_pool2d(x[:, :1], cell)]
    image = torch.zeros(1, 3, 9 * cell // 2, 9 * cell // 2)
    image[..., 3 * cell:] = 1
    answer = F.interpolate(net.encode(image)[0], (4, 9 * cell // 2), mode="bilinear")[0, 0, 0]
    edge = int((answer < (answer.min() + answer.max()) / 2).sum())
    assert len(set(strides)) > 1 or abs(edge - 3 * cell) <= cell // 8
    net.backbone.forward = forward
    timm = model.import_optional("timm")
    other = timm.create_model(name)
    torch.save(other.state_dict(), tmp_path / "tower.pth")
    load_backbone(net, str(tmp_path / "tower.pth"))
    mine = dict(net.backbone.net.named_parameters())
    for key, value in other.state_dict().items():
        match = mine.get(f"model.{key}", mine.get(key.replace(".", "_", 1)))
        assert match is None or torch.equal(match, value)
    assert sum(f"model.{key}" in mine or key.replace(".", "_", 1) in mine for key in other.state_dict()) > 100


@pytest.mark.parametrize("name", ["resnet50_clip", "vit_base_patch32_clip_224"])
def test_vision_language_towers_train_and_evaluate_offline(name, small_run, tmp_path):
    argv = [*small_run, "--backbone", f"timm:{name}", "--steps", "2", "--batch", "2", "--init", "none"]
    done = run_train([*argv, "--recipe", "source"])
    assert "random weights" in done.stdout
    evaluation.main([str(tmp_path / "out/last.pt")])


# -------------------------------------------------------------------------------------------------
# train.py: gradients, time, pictures, numbers


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_gradient_that_is_not_finite_never_reaches_the_weights(bad, delayed):
    """Delayed, as on a GPU, the fused optimiser skips the step, and check() tells of it later."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard = train.GradientGuard(optimizer, torch.device("cpu"))
    assert not guard.delayed
    guard.delayed = delayed

    def step(number, gradient):
        weight.grad = torch.full((3,), gradient)
        norm = torch.nn.utils.get_total_norm([weight.grad])
        guard(number, norm, {"source": torch.tensor(0.5), "mix": torch.tensor(gradient)})
        optimizer.step()

    step(0, 1.0)
    guard.check()
    after = weight.detach().clone()
    assert (after < 1).all()
    with pytest.raises(FloatingPointError) as caught:
        step(1, float(bad))
        assert delayed and torch.equal(weight, after)
        step(2, 1.0)
        step(3, float("nan"))  # the first bad step is told, not the last
        guard.check()
    assert caught.value.args == (1, f"source 0.5, mix {bad}")
    assert (weight < after).all() if delayed else torch.equal(weight, after)


@pytest.mark.parametrize("delayed", [False, True])
def test_a_run_with_a_bad_gradient_names_the_files_of_that_step_and_saves_nothing(
        delayed, small_run, tmp_path, monkeypatch):
    class Guard(train.GradientGuard):
        def __init__(self, *args):
            super().__init__(*args)
            self.delayed = delayed

    real, batches = train.step_terms, []

    def step_terms(f, step, nets, source, labeled, target, **options):
        batches.append((step, source.image, target.image))
        if step == 3:
            source = source._replace(image=source.image * float("nan"))
        return real(f, step, nets, source, labeled, target, **options)

    monkeypatch.setattr(train, "step_terms", step_terms)
    monkeypatch.setattr(train, "GradientGuard", Guard)
    argv = [*small_run, *"--accum 2 --eval-every 4 --save-every 4 --log-every 5".split()]
    last = tmp_path / "out/last.pt"
    line = fails(argv, "step 3: the gradient is not finite (source nan", "nothing was saved yet",
                 "try a lower --lr or --dtype fp32", status=1)
    assert not list((tmp_path / "out").glob("*.pt"))
    files = []
    for at, domain in ((1, "source"), (2, "target")):
        for batch in batches:
            if batch[0] == 3:
                files += [origin(crop, tmp_path / domain / "images") for crop in batch[at]]
    assert len(files) == 8 and f"files: {', '.join(files)};" in line
    assert batches[-1][0] == 3  # a check comes before statistics are scored or saved
    (event,) = events(tmp_path / "out", "non-finite")
    assert (event["step"], event["files"]) == (3, files) and "source nan" in event["parts"]

    # a resumed run leaves its checkpoint as it is, and counts its samples from the same start
    run_train([*argv, "--stop-at", "2"])
    before = last.read_bytes()
    again = fails(argv, f"{last} is from before", status=1)
    assert f"files: {', '.join(files)};" in again and last.read_bytes() == before


def test_times_in_the_log_are_of_steps_alone_part_by_part(small_run, tmp_path, monkeypatch):
    real = evaluation.evaluate

    def slow(*args):
        time.sleep(2)
        return real(*args)

    monkeypatch.setattr(evaluation, "evaluate", slow)
    run_train([*small_run, *"--eval-every 1 --save-every 1 --stop-at 2".split()])
    steps = events(tmp_path / "out", "step")
    assert len(steps) == len(events(tmp_path / "out", "eval")) == 2
    for step in steps:
        assert set(step["ms"]) == {"EMA", "data", "teacher", "views", "source", "mix", "mask",
                                   "backward", "optimiser"}
        assert min(step["ms"].values()) > 0
        spent = 1e3 * 4 / step["images_per_s"]  # 2 + 2 images a step
        assert 0.5 * spent < sum(step["ms"].values()) < 1.1 * spent < 2000
        assert step["peak_mib"] > 100


def test_a_picture_is_drawn_wherever_a_checkpoint_is_saved(small_run, tmp_path):
    run_train([*small_run, *"--steps 5 --save-every 2 --val none".split()])
    pictures = sorted((tmp_path / "out/panels").iterdir())
    assert [path.name for path in pictures] == ["000002.png", "000004.png", "000005.png"]
    for path in pictures:
        # two rows; source, mix and target with their labels, the masked image, the prediction
        picture = Image.open(path)
        width, height = picture.size
        assert 8 * 32 <= width < 16 * 32 and 2 * 32 <= height < 8 * 32
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100


def test_dtype_is_bf16_on_a_gpu_that_has_it(small_run, tmp_path, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for wanted, device, has_it, dtype, reason in [
            ("bf16", cpu, False, "bf16", "as asked"), ("fp32", gpu, True, "fp32", "as asked"),
            ("auto", cpu, True, "fp32", "auto on cpu"),
            ("auto", gpu, True, "bf16", "auto, this GPU has it"),
            ("auto", gpu, False, "fp32", "auto, this GPU has no bf16")]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(return_value=has_it))
        assert train.pick_dtype(wanted, device) == (dtype, reason)
    monkeypatch.setattr(train, "pick_dtype", Mock(return_value=("bf16", "told by the test")))
    argv = [*small_run, *"--recipe lcmsm --text stub --stop-at 1 --dtype auto".split()]
    assert ", bf16 (told by the test);" in run_train(argv).stdout
    assert load_checkpoint(tmp_path / "out/last.pt")["flags"]["dtype"] == "bf16"


def test_sliding_validation_is_remembered(small_run, tmp_path):
    run_train([*small_run, *"--recipe source --steps 3 --slide".split()])
    (result,) = events(tmp_path / "out", "result")
    scores = []
    for more in ([], ["--no-slide"]):
        report = tmp_path / "scores.json"
        evaluation.main([str(tmp_path / "out/last.pt"), "--json", str(report), *more])
        scores.append(json.loads(report.read_text())["iou"])
    assert scores[0] == result["student"]["iou"] and scores[1] != scores[0]


@pytest.mark.parametrize("name", ["mit_b0", "timm:resnet10t"])
def test_checkpointing_computes_activations_again(name):
    net, calls = Segmenter(name, "segformer", 3, 8).train(), []
    inner = net.backbone.block3[0].mlp if name == "mit_b0" else net.backbone.net.layer3[0].conv1
    inner.register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(2, 3, 64, 64)).logits.sum().backward()
    net.backbone.recompute()
    net(torch.rand(2, 3, 64, 64)).logits.sum().backward()
    assert len(calls) == 3  # once, then twice


@pytest.mark.parametrize("flags", ["", "--backbone timm:resnet10t --no-augment-source"])
def test_checkpointing_computes_the_same(flags, small_run, tmp_path):
    argv = [*small_run, *flags.split(), *"--val none --crop 64 --steps 2".split()]
    run_train([*argv, "--out", str(tmp_path / "plain")])
    run_train([*argv, "--out", str(tmp_path / "twice"), "--checkpointing"])
    a, b = (load_checkpoint(tmp_path / f"{name}/last.pt")["student"] for name in ("plain", "twice"))
    for name, value in a.items():
        # a BatchNorm inside a block sees its batch twice
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


def plain_cross_entropy(logits, label, weight=None):
    full = F.interpolate(logits.float(), label.shape[1:], mode="bilinear")
    value = F.cross_entropy(full, label.long(), ignore_index=255, reduction="none")
    return (value if weight is None else value * weight).mean()


def plain_pseudo_label(logits, size, threshold=1.0):
    full = F.interpolate(logits.float(), size, mode="bilinear")
    certainty, label = full.softmax(1).max(1)
    return label.byte(), certainty, (certainty >= threshold).float().mean()


def standing_run(f, nets, source, target, dtype, device):
    """As much of a train.Run as train.backward() reads; its batch is always the same."""
    loaders = {"source": itertools.repeat(source), "labeled": None,
               "target": itertools.repeat(target)}
    return SimpleNamespace(f=f, nets=nets, loaders=loaders, device=device, dtype_name=dtype,
                           things=torch.tensor([], device=device), clock=train.Clock(device))


def test_kernels_and_bf16_do_not_change_what_is_learned(small_run, tmp_path, monkeypatch):
    flags = train.parse_flags("--fd 0 --threshold 0.05 --batch 2 --crop 128 --channels 64".split())
    device, (source, target) = torch.device("cpu"), step_inputs(2, 128, 19)

    def plain(wanted):
        monkeypatch.undo()
        if wanted:
            monkeypatch.setattr(train, "cross_entropy", plain_cross_entropy)
            monkeypatch.setattr(model, "upsample_pseudo_label", plain_pseudo_label)

    def first_step(dtype):
        nets = train.open_networks(flags, NAMES19, None, device)
        terms, _ = train.backward(standing_run(flags, nets, source, target, dtype, device), 1)
        assert list(terms) == ["source", "mix", "mask"]
        return sum(terms.values()), torch.cat([p.grad.flatten() for p in nets.student.parameters()])

    plain(True)
    loss, gradient = first_step("fp32")
    plain(False)
    for dtype, limit in (("fp32", 1e-5), ("bf16", 2e-2)):
        ours, own_gradient = first_step(dtype)
        assert (ours - loss).abs() < limit * loss
        assert (own_gradient - gradient).norm() < limit * gradient.norm()

    curves = {}
    for name in ("plain", "fp32", "bf16"):
        plain(name == "plain")
        run_train([*small_run, "--steps", "20", "--val", "none", "--out", str(tmp_path / name),
                   "--dtype", "bf16" if name == "bf16" else "fp32"])
        steps = events(tmp_path / name, "step")
        curves[name] = torch.tensor([step["source"] + step["mix"] + step["mask"] for step in steps])
    assert len(curves["plain"]) == 20
    assert (curves["fp32"] - curves["plain"]).abs().max() < 2e-3
    fell = curves["plain"][0] - curves["plain"][-1]
    assert (curves["bf16"] - curves["plain"]).abs().max() < 0.1 < fell


def test_compiled_network_learns_the_same(small_run, tmp_path):
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:  # no C++ compiler, no Python headers
        pytest.skip(f"torch.compile does not work here: {complaint(error)}")
    # compiled whole, the levels of the decoder lost gradients
    plain = model.SegFormerFusion((16, 32, 48, 96), 8).double()
    fusion, pyramid = copy.deepcopy(plain), []
    for i, c in enumerate((16, 32, 48, 96)):
        level = torch.randn(2, c, 16 >> i, 16 >> i).double()
        pyramid.append(level.contiguous(memory_format=torch.channels_last))
    fusion.compile()
    for net in (plain, fusion):
        out = net([level.requires_grad_() for level in pyramid])
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
    torch.testing.assert_close([p.grad for p in fusion.parameters()],
                               [p.grad for p in plain.parameters()])
    argv = [*small_run, "--backbone", "timm:test_resnet.r160_in1k",
            *"--steps 3 --val none --crop 64".split()]
    run_train([*argv, "--out", str(tmp_path / "plain")])
    run_train([*argv, "--out", str(tmp_path / "compiled"), "--compile"])
    one, two = tmp_path / "plain", tmp_path / "compiled"
    names = [list(load_checkpoint(out / "last.pt")["student"]) for out in (one, two)]
    assert names[0] == names[1]  # the raw module is saved
    steps = list(zip(events(one, "step"), events(two, "step"), strict=True))
    assert len(steps) == 3
    for straight, compiled in steps:
        # not the weights: AdamW blows up rounding
        for term in ("source", "mix", "mask", "grad_norm"):
            assert compiled[term] == pytest.approx(straight[term], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("size, dilation", [((32, 32), 6), ((33, 47), 12), ((20, 40), 18), ((7, 40), 2), ((5, 5), 3)])
def test_dilated_convolution_by_sub_images_equals_torch(size, dilation):
    torch.manual_seed(0)
    conv = model.DilatedDepthwise(5, 5, 3, 1, dilation, dilation, 5, bias=False).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    outputs = []
    for forward in (conv.forward, lambda x: F.conv2d(x, conv.weight, None, 1, dilation, dilation, 5)):
        y = forward(x)
        outputs.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight))))
    for ours, theirs in zip(*outputs):
        torch.testing.assert_close(ours, theirs)


def test_default_command_on_the_rendered_streets(tmp_path, monkeypatch):
    few = {}
    for kind, splits in data.STREETS.items():
        few[kind] = {split: indices[:4] for split, indices in splits.items()}
    monkeypatch.setattr(data, "STREETS", few)
    places = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = run_train(["--steps", "2", "--batch", "2", *places])
    assert "student mIoU" in done.stdout
    assert [path.name for path in (tmp_path / "out/panels").iterdir()] == ["000002.png"]


def test_runs_without_triton_and_open_clip(small_run, tmp_path):
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import sys\nsys.modules['triton'] = None\nsys.modules['open_clip'] = None\n"
                       "import socket\ndef refuse(*a, **k): raise OSError('no network')\n"
                       "socket.socket.connect = refuse\n")
    run_train([*small_run, "--steps", "1"], PYTHONPATH=str(tmp_path), TRITON_INTERPRET="0")
    help_text = run_train(["--help"], PYTHONPATH=str(tmp_path)).stdout
    assert "--recipe" in help_text


def test_the_record_has_each_recipe_and_holds_for_two_rows():
    """All rows: python test_all.py record, one minute."""
    known = json.loads(RECORD.read_text())
    assert set(known) == {"made on", "pixels", *RECORD_ROWS}
    recorded = {line.split("--recipe ")[1].split()[0] for line in RECORD_ROWS.values()}
    assert recorded == set(train.RECIPES)
    command = [sys.executable, __file__, "record", "source", "mic"]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    *notes, source, mic = done.stdout.splitlines()
    assert (source, mic) == ("source: as recorded", "mic: as recorded")
    if notes:
        warnings.warn(f"compared in part: {notes[0]}")

    # and each kind of difference is seen
    row = known["mic"]
    for key in row:
        changed = copy.deepcopy(row)
        changed[key][2] = None
        assert record_difference(row, changed, True).startswith(f"{key} of step 3: None, recorded ")
    for factor, exact, differs in (
            (1.005, False, False), (1.02, False, True), (1.0000001, True, True)):
        changed = copy.deepcopy(row)
        changed["terms"][0]["mix"] *= factor
        assert bool(record_difference(row, changed, exact)) == differs
    del changed["terms"][0]["mix"]
    assert record_difference(row, changed, False) and not record_difference(row, row, True)


# ---------------------------------------------------------------------------------------------------------------------
# python test_all.py record: what every recipe computed when the record was made, and whether it still does
#
# A change of the code that should change no number is checked here: six steps of each row on made images, in fp32 on
# one CPU thread, have to give the same loss terms, gradient norms, weights and scores bit for bit. A change that should
# change a number writes its rows again, and its commit says why. On another kind of machine or version of torch the
# rounding differs; there only the first step's terms are compared, to one percent.

RECORD = Path(HERE) / "assets" / "record.json"
RECORD_STEPS = 6
RECORD_ROWS = {  # name: further flags; "2 x" before them runs two processes
    "source": "--recipe source",
    "oracle": "--recipe oracle --source target",
    "dacs": "--recipe dacs --threshold 0.34",
    "daformer": "--recipe daformer --threshold 0.34 --init MIT",
    "mic": "--recipe mic --threshold 0.34 --init MIT",
    "mic, six steps as three and three": "--recipe mic --threshold 0.34 --init MIT",
    "mic, two processes": "2 x --recipe mic --threshold 0.34 --init MIT --batch 1",
    "mic, accumulated": "--recipe mic --threshold 0.34 --init MIT --batch 1 --accum 2",
    "mic, labels": "--recipe mic --threshold 0.34 --labeled 2",
    "mic, decoder daformer, border, clean source":
        "--recipe mic --threshold 0.34 --decoder daformer --border 5 9 --no-augment-source --slide",
    "mic, timm backbone, bf16": "--recipe mic --threshold 0.34 --backbone timm:resnet10t --dtype bf16",
    "mic, recomputed activations, resized, workers": "--recipe mic --threshold 0.34 --checkpointing --size 96x80 --workers 1",
    "lcmsm": "--recipe lcmsm --threshold 0.34 --text BANK --mask-block 8",
    "lcmsm, learned vectors": "--recipe lcmsm --threshold 0.34 --text learned",
    "lcmsm, two processes": "2 x --recipe lcmsm --threshold 0.34 --text stub --batch 1",
    "cluda": "--recipe cluda --threshold 0.34",
    "t2sda": "--recipe t2sda --threshold 0.34 --warmup 2",
    "t2sda, control": "--recipe t2sda --threshold 0.34 --control",
    "t2sda, labels": "--recipe t2sda --threshold 0.34 --labeled 2 --restyled 0.5",
    "t2sda_dg": "--recipe t2sda_dg",
    "sepico": "--recipe sepico --threshold 0.34",
    "semidavil": "--recipe semidavil --text BANK --labeled 2 --threshold 0.34",
    "semidavil, no labels": "--recipe semidavil --text stub --threshold 0.34",
    "labels alone": "--recipe source --source none --labeled 3 --dyce 0.5",
    "all": "--recipe all --threshold 0.34 --text BANK",
    "all, labels, two processes": "2 x --recipe all --threshold 0.34 --text BANK --labeled 2 --batch 1",
}


def record_inputs(root):
    """Made data, a text bank and weights of a backbone below `root` -> the flags that all rows share."""
    labelled, _ = write_pairs(root, 6, (104, 88), name="source")
    val, _ = write_pairs(root, 5, (104, 88), name="the target")
    (root / "names.txt").write_text("sky\nwall\ncar\n")
    write_bank(root / "bank.npz", made_bank()._replace(names=("sky", "wall", "car")))
    torch.manual_seed(0)
    torch.save(MixTransformer("mit_b0").state_dict(), root / "mit_b0.pth")
    return ["--source", labelled, "--target", val, "--val", val, "--classes", str(root / "names.txt"),
            "--cache", str(root / "cache"), *"--crop 64 --batch 2 --channels 16 --dtype fp32 --seed 3".split(),
            *f"--lr 1e-3 --head-lr 1 --steps {RECORD_STEPS} --log-every 1 --save-every 1".split()]


def digest(*arrays):
    """The first digits of a sha256 over tensors or arrays."""
    hashed = hashlib.sha256()
    for array in arrays:
        if torch.is_tensor(array):
            array = array.detach().contiguous().view(-1).view(torch.uint8).numpy() if array.ndim else array.numpy()
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:12]


def recorded_run(argv, out):
    """Run train.py's main() -> {"terms": a dict for each batch, "norm", "student", "teacher": one value a step, ...}."""
    row = {"terms": [], "norm": [], "student": [], "teacher": []}
    step_terms, total_norm, save = train.step_terms, torch.nn.utils.get_total_norm, model.save_checkpoint

    def spy_on_terms(*args, **options):
        terms, *rest = step_terms(*args, **options)
        row["terms"].append({name: value.item() for name, value in terms.items()})
        return terms, *rest

    def spy_on_norm(*args, **options):
        norm = total_norm(*args, **options)
        row["norm"].append(norm.item())
        return norm

    def spy_on_save(path, state):
        for name in ("student", "teacher"):
            row[name].append(digest(*state[name].values()))
        return save(path, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step_terms", spy_on_terms)
        patch.setattr(torch.nn.utils, "get_total_norm", spy_on_norm)
        patch.setattr(model, "save_checkpoint", spy_on_save)
        run_train([*argv, "--out", str(out)])
    if finished := events(out, "result"):
        row["miou"] = [finished[-1][name]["miou"] if finished[-1][name] else None
                       for name in ("student", "teacher", "adabn")]
    return row


def recorded_row(name, shared, root):
    """One row of the record, computed anew."""
    flags = [str({"MIT": root / "mit_b0.pth", "BANK": root / "bank.npz"}.get(word, word))
             for word in RECORD_ROWS[name].split()]
    out = root / re.sub(r"\W+", "-", name)
    if flags[0] == "2":
        command = [*TORCHRUN, __file__, "record-rank", str(root / "row.json"), *shared, *flags[2:], "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads((root / "row.json").read_text())
    if "t2sda_dg" in flags:
        flags += ["--target", "none"]
    if "three and three" in name:
        half = RECORD_STEPS // 2
        first = recorded_run([*shared, *flags, "--stop-at", str(half)], out)
        second = recorded_run([*shared, *flags], out)
        return {key: first.get(key, []) + second[key] for key in second}
    return recorded_run([*shared, *flags], out)


def recorded_pixels(root, shared):
    """Checksums of rendered streets, of a resized data set and of crops."""
    row = {}
    for shifted in (False, True):
        for index in (0, 7, 100_003, 200_001):
            image, label = data.render_street(0, index, shifted, (256, 192))
            row[f"street {index}{' shifted' if shifted else ''}"] = digest(image, label)
    row["street 3, small"] = digest(*data.render_street(0, 3, False, (100, 76)))
    classes = data.class_names(str(root / "names.txt"))
    dataset = data.open_dataset(shared[1], "train", classes, (60, 50), root / "cache")
    row["resized"] = digest(*(dataset[i][key] for i in range(len(dataset)) for key in ("image", "label")))
    for size in (32, 80):  # the second is larger than the images: padded
        crops = [data.Crops(dataset, size, 5)[k] for k in range(8)]
        row[f"crops of {size}"] = digest(*(crop[key] for crop in crops for key in ("image", "label")))
    return row


def record(argv):
    """python test_all.py record [--write] [NAME ...]"""
    parser = argparse.ArgumentParser(prog="test_all.py record", description="compare with assets/record.json")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows (default: all)")
    parser.add_argument("--write", action="store_true", help="write the rows into the record instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    exact = known.get("made on", machine) == machine
    if not exact:
        print(f"the record was made on {known['made on']}, here is {machine}: only first steps are compared")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shared = record_inputs(root)
        for name in args.names or ["pixels", *RECORD_ROWS]:
            row = recorded_pixels(root, shared) if name == "pixels" else recorded_row(name, shared, root)
            if args.write:
                known[name] = row
            fault = record_difference(known.get(name, {}), row, exact)
            print(f"{name}: {fault or 'as recorded'}", flush=True)
            if fault:
                wrong.append(name)
    if args.write:
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in (known | {"made on": machine}).items())
        RECORD.write_text("{" + rows + "}\n")
    if wrong:
        sys.exit(f"{len(wrong)} rows differ from the record: {', '.join(wrong)}")


def record_difference(old, new, exact):
    """In a few words, where a row first differs from the record; '' where it does not."""
    if not exact and "terms" in new:
        near = old["terms"][0].keys() == new["terms"][0].keys() and all(
            new["terms"][0][name] == pytest.approx(value, rel=0.01) for name, value in old["terms"][0].items())
        return "" if near else f"first terms {new['terms'][0]}, recorded {old['terms'][0]}"
    for key in new:
        if old.get(key) == new[key]:
            continue
        if isinstance(new[key], list) and isinstance(old.get(key), list):
            at = next((i for i, pair in enumerate(zip(old[key], new[key])) if pair[0] != pair[1]), "length")
            if at != "length":
                return f"{key} of step {at + 1}: {new[key][at]}, recorded {old[key][at]}"
        return f"{key}: {new[key]}, recorded {old.get(key)}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# python test_all.py bench [NAME ...] [--json FILE]: ours against named peers, side by side in one process
#
# Every side first has to come near the reference (float64; for networks the peer in float32). Then the sides take
# turns, so that a busy machine slows all of them alike, and the least time of each counts; where other programs keep
# the cores busy, OMP_NUM_THREADS=1 steadies the ratios. "times ours" is a peer's time over ours: below 1 the peer wins.
# Goals are those of the big shapes on a GPU, and of the networks on two free cores.

BENCH_SHAPES = {  # name of what is timed: arguments of bench_NAME, one table or two each
    "text_correlation": [(2, 512, 256, 19), (4, 512, 256, 150)] if DEVICE == "cuda" else [(2, 256, 64, 19)],
    "upsample_cross_entropy": [(8, 19, 128), (4, 150, 256)] if DEVICE == "cuda" else [(2, 19, 64)],
    "pixel_nce": ([(32768, 256, "per_positive"), (32768, 256, "supcon"), (32768, 256, "single"),
                   (65536, 256, "per_positive")] if DEVICE == "cuda" else
                  [(1024, 128, "per_positive"), (2048, 128, "per_positive"), (2048, 128, "supcon"),
                   (1024, 128, "single")]),
    "network": [(mode, *size) for mode, *size in [
        ("training", 4, 128, 128), ("training", 2, 256, 256), ("inference", 1, 512, 1024), ("training", 8, 512, 512)]
        if size[0] < 8 or DEVICE == "cuda"],
    "uda_step": [(128,), (512,)] if DEVICE == "cuda" else [(128,)],
    "crop": [(128,), (512,)]}
BENCH_SECONDS = 20 if DEVICE == "cuda" else 4  # of taking turns, per table
COLUMNS = {"ms": "{:.3f}", "times ours": "{:.2f}", "goal": "{:g}", "error": "{:.0e}", "extra MB": "{:.1f}",
           "%": "{:.0f}"}
SCALE, TAU = 1 / 0.07, 0.1


def seconds(call, repeats=1):
    finish = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    finish()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return (time.perf_counter() - began) / repeats


@functools.lru_cache
def best_rate(kind, dtype=torch.uint8):
    """What this device does in this run: bytes read and written per second by a copy, FLOP/s of a matrix product."""
    if kind == "copy":
        a, b = torch.empty(2, 2**30 if DEVICE == "cuda" else 2**26, dtype=dtype, device=DEVICE)
        return 2 * a.numel() / min(seconds(lambda: b.copy_(a)) for _ in range(100))
    a = torch.randn(2 * [8192 if DEVICE == "cuda" else 1024], device=DEVICE).to(dtype)
    return 2 * len(a) ** 3 / min(seconds(lambda: a @ a) for _ in range(100))


def distances(found, exact):
    """The relative errors of some tensors, of labels the share that differs; without exact ones: 0 where finite."""
    if exact is None:
        return [0.0 if t.isfinite().all() else float("inf") for t in found]
    return torch.stack([(a.double() - b.double()).norm() / b.double().norm() if a.is_floating_point() else
                        (a != b).double().mean() for a, b in zip(found, exact, strict=True)]).tolist()


def complaint(error):
    if isinstance(error, ImportError):
        return f"not installed: {error.name}"
    return f"fails: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:90]}"


def compare(title, sides, exact=None, limit=1e-4, least=0, rate=1, repeats=True):
    """One table, printed and returned. sides: (name, make, goal or None), ours first; make() -> a call -> tensors.

    exact: tensors that every call must return within `limit` (one for all or one each), None: finite ones; least: bytes
    or FLOP that a call needs, in % of the device's `rate`; repeats: whether ours must return the same bits ten times.
    "extra MB": the peak of memory beyond what a call returns.
    """
    rows, timed = [{"name": name, "goal": goal, "note": ""} for name, _, goal in sides], {}
    for row, (_, make, _) in zip(rows, sides):
        found = None
        try:
            call = make()
            found = call()  # compiles what is compiled
            errors = distances(found, exact)
            row["error"] = exact and max(errors)
            limits = limit if isinstance(limit, tuple) else itertools.repeat(limit)
            if not all(e <= most for e, most in zip(errors, limits)):
                raise ArithmeticError(f"off by {', '.join(f'{e:.0e}' for e in errors)}, the limit is {limit}")
            if row is rows[0] and repeats:
                same = all(torch.equal(a, b) for _ in range(10) for a, b in zip(call(), found))
                row["note"] = "ten repeats are equal bit for bit" if same else "REPEATS DIFFER"
            returned, found = sum(t.numel() * t.element_size() for t in found), None
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                row["extra MB"] = max(0, torch.cuda.max_memory_allocated() - before - returned) / 1e6
            timed[row["name"]] = call, 1 if DEVICE == "cpu" else max(1, min(20, int(0.01 / seconds(call)))), []
        except Exception as error:  # not installed, unsupported here, out of memory, wrong: the row says so
            row["note"] = complaint(error)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    began = time.perf_counter()
    for turn in range(100):
        for row in [row for row in rows if row["name"] in timed]:
            call, inner, times = timed[row["name"]]
            try:
                times.append(seconds(call, inner))
            except torch.OutOfMemoryError as error:  # beside what the others hold
                row["note"] = complaint(error)
                del timed[row["name"]]
        if turn >= 4 and time.perf_counter() - began > BENCH_SECONDS:
            break
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or the next shape would be compiled for any shape, which is slower
    for row in rows:
        if row["name"] in timed:
            row["ms"] = 1e3 * min(timed[row["name"]][2])
            row["%"] = 1e5 * least / rate / row["ms"] or None
            row["times ours"] = row["ms"] / rows[0]["ms"] if "ms" in rows[0] else None
            if row["times ours"] and row["times ours"] < 1:
                row["note"] = "faster than ours"
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    print(f"\n### {title}\n\n| | {' | '.join(shown)} | |\n{'|---' * (len(shown) + 2)}|")
    for row in rows:
        cells = [COLUMNS[key].format(row[key]) if row.get(key) is not None else "" for key in shown]
        print(f"| {' | '.join([row['name'], *cells, row['note']])} |", flush=True)
    return {"title": title, "turns": turn + 1, "rows": rows}


def with_gradients(function, leaves, upstream):
    """-> a call: the function's value, and the leaves' gradients for an upstream gradient in the value's dtype."""
    cast = functools.lru_cache(upstream.to)

    def call():
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves, cast(value.dtype))
    return call


def normalised_correlation(features, text):
    with torch.autocast(DEVICE, torch.bfloat16, enabled=features.dtype == torch.bfloat16):
        return SCALE * torch.einsum("bchw,kc->bkhw", F.normalize(features), F.normalize(text))


def divided_correlation(features, text):  # the norms divide the scores, which are fewer than the features
    scores = torch.einsum("bchw,kc->bkhw", features, (SCALE * F.normalize(text)).to(features.dtype))
    return scores / torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-6)


def bench_text_correlation(B, C, side, K):
    dtype, limit = (torch.bfloat16, 3e-2) if DEVICE == "cuda" else (torch.float32, 1e-4)
    leaves = [torch.randn(B, C, side, side, device=DEVICE).to(dtype).requires_grad_(),
              torch.randn(K, C, device=DEVICE, requires_grad=True)]
    upstream = torch.randn(B, K, side, side, device=DEVICE)
    exact = with_gradients(normalised_correlation, [x.detach().double().requires_grad_() for x in leaves], upstream)()
    functions = [("ours", lambda f, t: kernels.text_correlation(f, t, SCALE), None),
                 ("F.normalize, einsum", normalised_correlation, 5), ("einsum, then divide", divided_correlation, 1.5),
                 ("F.normalize, einsum, compiled", torch.compile(normalised_correlation, dynamic=False), 1.5),
                 ("einsum, then divide, compiled", torch.compile(divided_correlation, dynamic=False), 1.5)]
    least = 3 * leaves[0].numel() * leaves[0].element_size() + 3 * 4 * upstream.numel()  # F -> S; F, dS, S -> dF
    yield compare(f"text_correlation forward + backward, {tuple(leaves[0].shape)} {dtype}, {K} classes; "
                  "%: least bytes, of a copy's bandwidth (goal 60)",
                  [(name, lambda f=f: with_gradients(f, leaves, upstream), goal) for name, f, goal in functions],
                  exact, limit, least, best_rate("copy"))


def bench_upsample_cross_entropy(B, K, low):
    full, one = 4 * low, torch.ones((), device=DEVICE)
    logits = (3 * torch.randn(B, K, low, low, device=DEVICE)).requires_grad_()
    labels, weight = torch.randint(K, (B, full, full), device=DEVICE), torch.rand(B, full, full, device=DEVICE)
    labels[:, :full // 7] = 255

    def eager(z):
        return plain_map(z, labels, weight).mean()

    @torch.no_grad()
    def pseudo(z):
        confidence, label = F.interpolate(z, (full, full), mode="bilinear", align_corners=False).softmax(1).max(1)
        return label, confidence, (confidence >= 0.5).float().mean()

    compiled, compiled_pseudo = torch.compile(eager, dynamic=False), torch.compile(pseudo, dynamic=False)
    title = f"({B}, {K}, {low}, {low}) -> {full} x {full} float32"
    exact = with_gradients(eager, [logits.detach().double().requires_grad_()], one)()
    functions = [("ours", lambda z: kernels.upsample_cross_entropy(z, labels, weight), None),
                 ("F.interpolate, F.cross_entropy", eager, 5), ("the same, compiled", compiled, 2)]
    yield compare(f"upsample_cross_entropy forward + backward, {title}; goal of extra MB: a tenth of eager's",
                  [(name, lambda f=f: with_gradients(f, [logits], one), goal) for name, f, goal in functions], exact)
    yield compare(f"upsample_pseudo_label, {title}", [
        ("ours", lambda: lambda: kernels.upsample_pseudo_label(logits, (full, full), 0.5), None),
        ("F.interpolate, softmax, max", lambda: lambda: pseudo(logits), 4),
        ("the same, compiled", lambda: lambda: compiled_pseudo(logits), None)], pseudo(logits.double()))


def scores_of(q, k):  # products of 16-bit vectors go on in float32
    return (q @ k.T).to(torch.promote_types(q.dtype, torch.float32)) / TAU


def published_nce(q, k, yq, yk, form):
    """The way of ContrastiveSeg's and CLUDA's released codes: masks, exponentials and log-probabilities, all N x M."""
    positive = (yq[:, None] == yk[None]).float()
    s = scores_of(q, k)
    s = s - s.amax(1, keepdim=True).detach()
    power = s.exp()
    total = (power * (1 - positive)).sum(1, keepdim=True) + power if form == "per_positive" else power.sum(1)[:, None]
    return -((s - total.log()) * positive).sum(1) / positive.sum(1)


def pull(q, k, yq, yk, form):
    """The mean of s over a query's positives without N x M: one mean key a class, or the one key of that number."""
    if form == "single":
        return (q * k[yq - 256]).sum(1) / TAU
    member = F.one_hot(yk, 19).to(torch.promote_types(k.dtype, torch.float32))  # (M,19)
    return (q * (member.T @ k.to(member.dtype) / member.sum(0)[:, None])[yq]).sum(1) / TAU


def tidy_nce(q, k, yq, yk, form):
    s = scores_of(q, k)
    if form != "per_positive":
        return s.logsumexp(1) - pull(q, k, yq, yk, form)
    same = yq[:, None] == yk[None]
    loss = F.softplus(s.masked_fill(same, float("-inf")).logsumexp(1, keepdim=True) - s)
    return loss.masked_fill(~same, 0).sum(1) / same.sum(1)


def chunked_nce(q, k, yq, yk, form):
    """Some rows at a time, computed again in the backward pass: little memory."""
    n = 2048 if DEVICE == "cuda" else 256
    return torch.cat([checkpoint(tidy_nce, a, k, b, yk, form, use_reentrant=False)
                      for a, b in zip(q.split(n), yq.split(n))])


def flex_nce(yq, yk, form):
    """FlexAttention gives the logsumexp over all keys or those of other classes; positives are added class by class.
    The order of the classes and the mask are made here, outside the timing, which favours it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    attention, mask = torch.compile(flex_attention, dynamic=False), None
    rows, keys = yq.argsort(), yk.argsort()
    if form == "per_positive":
        a, b, sizes = yq[rows], yk[keys], [y.bincount().tolist() for y in (yq, yk)]
        mask = create_block_mask(lambda batch, head, i, j: a[i] != b[j], None, None, len(a), len(b), DEVICE)

    def loss(q, k):
        x, y = q[rows], k[keys]
        _, z = attention(x[None, None], y[None, None], y.new_zeros(1, 1, len(y), 16), block_mask=mask, scale=1 / TAU,
                         return_lse=True)
        if mask is None:
            return z[0, 0][rows.argsort()] - pull(q, k, yq, yk, form)
        parts = zip(x.split(sizes[0]), y.split(sizes[1]), z[0, 0].split(sizes[0]))
        return torch.cat([F.softplus(z[:, None] - scores_of(x, y)).mean(1) for x, y, z in parts])[rows.argsort()]
    return loss


def inf_cl_nce():
    import inf_cl  # PyPI inf-cl: one positive per query, float32
    if DEVICE == "cpu":
        raise NotImplementedError("it needs a GPU")
    return lambda q, k: inf_cl.cal_flash_loss(q, k, scale=1 / TAU)


def bench_pixel_nce(N, C, form):
    dtype, limit = (torch.bfloat16, 5e-2) if DEVICE == "cuda" else (torch.float32, 1e-4)
    share = 0.65 ** torch.arange(19.0) + 0.02  # of the classes, about as uneven as in streets
    labels = [torch.multinomial(share, N, True).to(DEVICE) for _ in range(2)]
    centres = torch.randn(19, C, device=DEVICE)
    leaves = [F.normalize(centres[y] + torch.randn(N, C, device=DEVICE)).to(dtype).requires_grad_() for y in labels]
    if form == "single":
        labels = 2 * [torch.arange(N, device=DEVICE) + 256]  # 255 would be ignored
    (q, k), exact = [x.detach().double().requires_grad_() for x in leaves], []
    for a, b in zip(q.split(1024), labels[0].split(1024)):  # the gradients of all rows add up
        exact.append(tidy_nce(a, k, b, labels[1], form))
        exact[-1].sum().div(N).backward()
    exact = torch.cat(exact).detach(), q.grad, k.grad
    ours = "per_positive" if form == "per_positive" else "supcon"
    compiled = torch.compile(tidy_nce, dynamic=False)
    sides = [("ours", lambda: lambda q, k: kernels.pixel_nce(q, k, *labels, tau=TAU, form=ours), None),
             ("published form", lambda: lambda q, k: published_nce(q, k, *labels, form), 12),
             ("tidy eager", lambda: lambda q, k: tidy_nce(q, k, *labels, form), 8),
             ("tidy, compiled", lambda: lambda q, k: compiled(q, k, *labels, form), 1.8),
             ("tidy, checkpointed chunks", lambda: lambda q, k: chunked_nce(q, k, *labels, form), None),
             ("FlexAttention's logsumexp", lambda: flex_nce(*labels, form), 1.2), ("inf-cl", inf_cl_nce, 2.5)]
    sides = sides[:1] if N > 32768 else sides if form == "single" else sides[:-1]
    upstream = torch.full((N,), 1 / N, device=DEVICE)
    yield compare(f"pixel_nce forward + backward, {form}, {N} x {N}, {C} channels {dtype}; %: 8NMC, of a matrix "
                  "product's rate (goal 45); goal of extra MB: a hundredth of eager's",
                  [(name, lambda f=make: with_gradients(f(), leaves, upstream), goal) for name, make, goal in sides],
                  exact, limit, 8 * N * N * C, best_rate("product", dtype))


def b0_passes(mode, B, height, width):
    """-> ours, theirs: dtype -> a call of MiT-B0 with the SegFormer head and the same weights. It returns, training
    without dropout: logits, loss, gradients of the first and last layer; in inference, after making labels: logits."""
    size, training = (height, width), mode == "training"
    x, label = torch.rand(B, 3, *size, device=DEVICE), torch.randint(19, (B, *size), device=DEVICE)
    net, byte = Segmenter().to(DEVICE).eval().requires_grad_(training), label.byte()
    net = model.teacher_mode(net) if training else net  # train mode without dropout and stochastic depth
    theirs = None
    with contextlib.suppress(ImportError):
        model.import_optional("torchvision")  # which transformers imports too
        import transformers
        theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
            num_labels=19, drop_path_rate=0.0, classifier_dropout_prob=0.0))
        theirs = theirs.to(DEVICE).train(training).requires_grad_(training)
        for m in theirs.modules():
            if isinstance(m, torch.nn.LayerNorm):
                m.eps = 1e-6  # of the published code
        head, fusion = theirs.decode_head, net.decoder.fusion
        net.backbone.load_state_dict(model.published_to_ours(theirs.segformer.state_dict()))
        for mine, other in zip(fusion.linears, getattr(head, "linear_projections", None) or head.linear_c):
            mine.load_state_dict(other.proj.state_dict())
        fusion.bn.load_state_dict(head.batch_norm.state_dict())
        net.decoder.classifier.load_state_dict(head.classifier.state_dict())
        levels = head.linear_fuse.weight.detach().unflatten(1, (4, 256))  # theirs begin with the coarsest
        fusion.fuse.load_state_dict({"weight": levels.flip(1).flatten(1, 2)})

    def ours_forward():
        z = net(x).logits
        return z, losses.cross_entropy(z, byte) if training else model.pseudo_label(z, size)[0]

    def their_forward():
        if theirs is None:
            raise ModuleNotFoundError(name="transformers")
        out = theirs((x - net.pixel_mean) / net.pixel_std, labels=label if training else None)
        return out.logits, out.loss if training else F.interpolate(out.logits, size, mode="bilinear").argmax(1)

    def run(forward, module, dtype):
        with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
            logits, last = forward()
        if not training:
            return logits,
        gradients = torch.autograd.grad(last, list(module.parameters()))
        return logits.detach(), last.detach(), gradients[0], gradients[-1]

    return [lambda dtype, f=f, m=m: lambda: run(f, m, dtype) for f, m in ((ours_forward, net), (their_forward, theirs))]


def bench_network(mode, B, height, width):
    (ours, theirs), exact = b0_passes(mode, B, height, width), None
    with contextlib.suppress(ImportError):
        exact = theirs(None)()
    limits = 1e-4, 1e-4, 1e-2, 1e-4  # a ReLU that rounding takes across 0 moves the first layer's gradient by 1e-3
    for dtype, limit, goal in ((None, limits, 1.5), (torch.bfloat16, 0.1, 1.6)):
        yield compare(f"MiT-B0 + SegFormer head, {mode}, {B} x {height} x {width} {dtype or torch.float32}",
                      [("ours", lambda: ours(dtype), None),
                       ("transformers, same weights", lambda: theirs(dtype), goal if mode == "training" else None)],
                      exact, limit, repeats=False)


def bench_uda_step(side):
    """A step of recipe mic, except that its images stay the same. No peer has one: one pass is beside it."""
    f = train.parse_flags(["--fd", "0", "--batch", "2", "--crop", str(side)])
    device = torch.device(DEVICE)
    nets = train.open_networks(f, data.CLASS_SPACES["cityscapes19"], None, device)
    groups = train.parameter_groups(nets.student, f.lr, f.head_lr)
    optimizer = torch.optim.AdamW(groups, fused=True)
    source, target = step_inputs(2, side, 19)
    source = train.View(source.image.to(device), source.label.to(device))
    target = train.View(target.image.to(device), None, target.weight.to(device))
    _, theirs = b0_passes("training", 2, side, side)

    def step(dtype):
        model.ema_update(nets.teacher, nets.student, 1000, f.alpha)
        terms, _ = train.backward(standing_run(f, nets, source, target, dtype, device), 1000)
        torch.nn.utils.get_total_norm([p.grad for p in nets.student.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tuple(terms.values())

    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        yield compare(f"UDA step, MiT-B0 + SegFormer head, {side} x {side} {dtype or torch.float32}; it holds EMA, "
                      "teacher, three passes, AdamW: 0.33 would be the time of three of the peer's passes",
                      [("ours, whole step, 2 + 2 images", lambda: lambda: step(name), None),
                       ("transformers, one pass, 2 images", lambda: theirs(dtype), None)], repeats=False)


def bench_crop(side):
    """A training crop out of the cache beside the same one from a PNG, decoded and resized each time."""
    with tempfile.TemporaryDirectory() as folder:
        for name, array in zip(("images", "labels"), data.render_street(0, 0, False, (512, 256))):
            Path(folder, name).mkdir()
            Image.fromarray(array).resize((2048, 1024), Image.Resampling.NEAREST).save(Path(folder, name, "a.png"))
        spec = f"folder:{folder}/images:{folder}/labels"
        cached, plain = (data.open_dataset(spec, "train", CLASS_SPACES["cityscapes19"], (1024, 512),
                                           Path(folder, "cache")) for _ in range(2))
        cached.prepare()
        plain.arrays = plain._load

        def crop(dataset):
            item = data.Crops(dataset, side, 0)[0]
            return [item["image"], item["label"]]

        yield compare(f"crop of {side} pixels from a PNG of 2048 x 1024 at 1024 x 512",
                      [("ours, cached", lambda: lambda: crop(cached), None),
                       ("decode, resize, crop", lambda: lambda: crop(plain), 50)], crop(plain), 0)


def bench(argv):
    parser = argparse.ArgumentParser(prog="test_all.py bench", description="ours against named peers, as tables")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCH_SHAPES)} (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    if not set(args.names) <= set(BENCH_SHAPES):
        parser.error(f"NAME must be one of {', '.join(BENCH_SHAPES)}")
    about = train.versions(torch.device(DEVICE)) | {"triton": getattr(kernels.triton, "__version__", "none")}
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, triton {about['triton']}")
    torch.backends.cudnn.benchmark = True  # as train.py sets it
    torch.manual_seed(0)
    tables = [table for name in args.names or BENCH_SHAPES for shape in BENCH_SHAPES[name]
              for table in globals()["bench_" + name](*shape)]
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": about, "tables": tables}, indent=1))
    wrong = [table["title"] for table in tables if "ms" not in table["rows"][0] or "DIFFER" in table["rows"][0]["note"]]
    if wrong:
        sys.exit("ours failed: " + "; ".join(wrong))


def test_bench_has_a_row_for_every_peer(capsys, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise RuntimeError("no compiler here")
    monkeypatch.setitem(BENCH_SHAPES, "text_correlation", [(1, 16, 8, 3)])
    monkeypatch.setattr(sys.modules[__name__], "BENCH_SECONDS", 0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    bench(["text_correlation", "--json", str(tmp_path / "out.json")])
    out, (table,) = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["tables"]
    assert f"torch {torch.__version__}" in out and "### text_correlation" in out
    assert all(f"\n| {row['name']} |" in out for row in table["rows"])
    assert ["ms" in row for row in table["rows"]] == [True, True, True, False, False]
    assert out.count("fails: RuntimeError: no compiler here") == 2 and "bit for bit" in table["rows"][0]["note"]
    with pytest.raises(SystemExit):
        bench(["nonsense"])


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "bench":
        bench(sys.argv[2:])
    elif command == "record":
        record(sys.argv[2:])
    elif command == "record-rank":  # one of the processes of a row of the record: FILE, then train.py's flags
        torch.set_num_threads(1)
        *flags, _, folder = sys.argv[3:]
        row = recorded_run(flags, folder)
        if os.environ["RANK"] == "0":
            Path(sys.argv[2]).write_text(json.dumps(row))
    else:
        sys.exit("the tests: python -m pytest -q test_all.py; also: python test_all.py bench, python test_all.py record")
