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
import zipfile
import zlib
from pathlib import Path
from unittest.mock import Mock

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
    assert [open_it()._check(i) for i in range(6)] == [None] * 6
    label = tmp_path / "d" / "labels" / "p00.png"
    refused(lambda: data.open_dataset(spec, "val", ("a", "b"))[0], label, "ids 2", "2 classes")
    put(tmp_path / "d" / "labels" / "p03.png", np.zeros((8, 8)))
    refused(lambda: open_it()[3], "p03.png", "24x18", "8x8", tmp_path / "d" / "images", tmp_path / "d" / "labels")
    assert "24x18" in open_it()._check(3).text


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
    assert Image.open(tmp_path / "sheet.png").width == 3 * 320 + 2 * 4
    put(tmp_path / "d" / "labels" / "p01.png", np.full((18, 24), 9))
    (tmp_path / "d" / "images" / "p02.png").write_bytes(b"")
    bad = run(spec)
    assert bad.returncode == 1 and not bad.stderr
    assert all(word in bad.stdout for word in ("2 problems", "p01.png: ids 9", "p02.png"))
    wrong = run("camvid:/nowhere")
    assert wrong.returncode == 1 and wrong.stderr.startswith("data.py: camvid:/now") and wrong.stderr.count("\n") == 1


# ---------------------------------------------------------------- data.py: checks, and what is said


def checked_run(root):
    """A command line of a tiny run on made pairs below `root`: source, target with labels, val."""
    source, _ = write_pairs(root, 6, name="source")
    target, _ = write_pairs(root, 4, name="the target")
    val, _ = write_pairs(root, 3, name="val")
    (root / "names.txt").write_text("sky\nwall\ncar\n")
    return ["--recipe", "source", "--source", source, "--target", target, "--val", val,
            "--classes", str(root / "names.txt"), "--cache", str(root / "cache"),
            "--out", str(root / "out"), *"--crop 32 --batch 2 --channels 8 --steps 2 --dtype fp32".split()]


def cut(path):
    """The file loses its second half."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def relabel(ids, size=(56, 40), **how):
    """A change that writes stripes of these ids into a mask."""
    def change(path):
        label = np.repeat(np.array(ids, how.get("dtype", np.uint8)), -(-size[1] // len(ids)))[:size[1]]
        image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(label[:, None], size[::-1])))
        image.save(path, how.get("format", "PNG"))
    return change


FAULTS = {  # what happens to files of the made run, which ones, and the words of the one line
    "truncated image": (cut, "source/images/003.png", "no readable image"),
    "empty image": (lambda path: path.write_bytes(b""), "source/images/003.png", "restore or remove it"),
    "truncated mask": (cut, "source/labels/003.png", "no readable image"),
    "image of the target": (cut, "the target/images/002.png", "no readable image"),
    "image of the validation set": (cut, "val/images/002.png", "no readable image"),
    "mask of the validation set": (relabel((0, 7)), "val/labels/002.png", "ids 7"),
    "unequal sizes": (relabel((0, 1), (56, 39)), "source/labels/005.png", "56x40 but"),
    "unequal sizes in validation": (relabel((0, 1), (40, 56)), "val/labels/000.png", "56x40 but"),
    "ids from 1": (relabel((1, 2, 3)), "source/labels/*.png", "do the ids start at 1? write `1 NAME`"),
    "void is 0": (relabel((0, 1, 2, 3)), "source/labels/*.png", "is 0 no class? write `0 -`"),
    "stray id": (relabel((0, 9)), "source/labels/004.png", "values of these masks: 0, 9"),
    "binary": (relabel((0, 255)), "source/labels/*.png", "write `0 sky` and `255 wall` in an IDS file"),
    "binary validation": (relabel((0, 255)), "val/labels/*.png", "255 is ignored"),
    "ignored only": (relabel((255,)), "source/labels/*.png", "no pixel of its labels"),
    "colours": (lambda path: Image.new("RGB", (56, 40), (9, 8, 7)).save(path), "source/labels/002.png", "colour"),
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
    assert "val/labels/001.png" in lines[1] and "(1 of 3 items)" in lines[1]
    assert "images/000.png" in lines[0] and "(2 of 6 items)" in lines[0]
    assert "error: " in lines[2] and "labels/001.png: ids 3" in lines[2] and "(3 of 6 items)" in lines[2]

    classes = str(tmp_path / "names.txt")
    done = data_command(argv[argv.index("--source") + 1], "--classes", classes, "--out", tmp_path / "sheet.png")
    assert done.returncode == 2 and done.stdout.count("problem: ") == 2 and "5 problems" in done.stdout


def data_command(*argv):
    """Run data.py in a process of its own."""
    return subprocess.run([sys.executable, data.__file__, *map(str, argv)], capture_output=True, text=True)


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
    crops = [data.Crops(dataset, 32, 1, data.RareClassSampler(dataset.class_counts())) for dataset in (a, b)]
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
    assert done.returncode == 2 and "--skip-bad" in done.stderr and not (tmp_path / "out").exists()
    done = run_train([*argv, "--skip-bad", "2"], launcher=TORCHRUN, OMP_NUM_THREADS="1")
    assert "goes without 1 images" in done.stdout and "source (5 images)" not in done.stdout
    left_out = events(tmp_path / "out", "start")[0]["left_out"]
    assert list(left_out.values()) == [[str(tmp_path / "source/images/003.png")], [str(tmp_path / "val/images/001.png")]]
    assert events(tmp_path / "out", "result")[0]["student"]["images"] == 2
    relabel((0, 9))(tmp_path / "source/labels/000.png")
    shutil.rmtree(tmp_path / "out")
    done = run_train([*argv, "--skip-bad", "9"], check=False)  # wrong ids are never left out
    assert done.returncode == 2 and "ids 9" in done.stderr


def test_published_labels_of_another_size_are_resized_and_counted(tmp_path):
    for i, height in enumerate((20, 18, 20)):
        put(tmp_path / f"images/{i}.png", np.zeros((20, 30, 3)))
        put(tmp_path / f"labels/{i}.png", np.repeat([7, 23], height // 2)[:, None].repeat(30, 1))
    dataset = data.open_dataset(f"gta:{tmp_path}", "train", "cityscapes19", None, tmp_path / "cache")
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
        "crops of 80 are larger than 100% of the images (56x40): 65% of the crops is padding; use a smaller --crop or "
        "a larger --size",
        "ignored 12.5 % of the pixels of its labels", "no pixel of 1 of 4 classes: never"]
    assert dataset.remarks(labels=False) == said[:1] and len(dataset.remarks(crop=40)) == 3
    assert dataset.label_problem() == ""
    for i in range(4):
        relabel((1, 255))(tmp_path / f"train/labels/00{i}.png")
    one = data.open_dataset(spec, "train", names, None, tmp_path / "cache")
    assert any("ONE CLASS ONLY: all masks hold wall" in remark for remark in one.remarks()) and not one.label_problem()
    streets = data.open_dataset("streets", "train", names, None, tmp_path / "cache")
    assert streets.remarks(crop=128) == [] and "crops of 256" in streets.remarks(crop=256)[0] and streets.check() == []

    done = data_command(spec, "--classes", tmp_path / "names.txt", "--cache", tmp_path / "cache")
    assert done.returncode == 2 and "names.txt" in done.stderr
    (tmp_path / "names.txt").write_text("sky\nwall\n")
    done = data_command(spec, "--classes", tmp_path / "names.txt", "--cache", tmp_path / "cache", "--out", tmp_path / "o.png")
    words = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and ["sky", "0.000"] in words and ["wall", "100.000"] in words
    assert "4 images" in done.stdout and "ignored 50 %" in done.stdout


def test_masks_beside_images_are_no_images(tmp_path):
    for name in ("a.jpg", "a_mask.png", "b.png", "b_label.png", "c.png", "c_gt.png", "d_mask.png", "_mask.png"):
        put(tmp_path / "x" / name, np.zeros((4, 4, 3)))
    dataset = data.open_dataset(f"folder:{tmp_path / 'x'}", "train", "camvid11")
    assert dataset.names == ["_mask", "a", "b", "c", "d_mask"]
    note = dataset.notes[0]
    assert "MASKS" in note and " 3 files" in note and all(name in note for name in ("a_mask.png", "b_label.png", "c_gt.png"))


def test_where_labels_were_looked_for_is_said(tmp_path):
    put(tmp_path / "leftImg8bit/train/x/x_0_leftImg8bit.png", np.zeros((8, 8, 3)))
    put(tmp_path / "gtFine/train/x/x_0_gtFine_color.png", np.zeros((8, 8, 3)))
    wanted = tmp_path / "gtFine/train/x/x_0_gtFine_labelIds.png"
    done = run_train(["--recipe", "source", "--source", f"cityscapes:{tmp_path}", "--target", "none", "--val", "none",
                      "--out", str(tmp_path / "out")], check=False)
    assert done.returncode == 2 and str(wanted) in done.stderr.splitlines()[-1]
    done = data_command(f"cityscapes:{tmp_path}", "--cache", tmp_path / "cache", "--out", tmp_path / "sheet.png")
    assert done.returncode == 0 and str(wanted) in done.stdout


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
        assert done.returncode == 2 and "are images of the training set" in done.stderr and "if you want" in done.stderr
    for flags in (["--recipe", "source", "--source", source, "--target", target],  # the target is not trained on
                  ["--recipe", "source", "--source", source, "--target", "none", "--val", source],
                  ["--recipe", "dacs", "--source", "none", "--labeled", "2", "--target", target, "--val", target],
                  ["--recipe", "dacs", "--source", source, "--target", target.rpartition(":")[0], "--val", target]):
        said = run_train([*flags, *rest]).stdout
        assert ("VALIDATION ON TRAINING IMAGES" in said) == ("--val" in flags)
        shutil.rmtree(tmp_path / "out")
    for flags in (["--source", source], ["--source", "camvid:DIR", "--recipe", "source"]):
        done = run_train([*flags, *rest], check=False)
        assert done.returncode == 2 and "--target none" in done.stderr.splitlines()[-1]
    for flags in ([], ["--source", "streets"], ["--recipe", "oracle"]):
        assert train.parse_flags(flags).target == "streets:shifted"
    assert train.parse_flags(["--recipe", "t2sda_dg", "--source", source]).target == "none"


def test_legends_show_the_classes_that_occur(tmp_path):
    spec, _ = write_pairs(tmp_path, 2)
    names = ("sky", "wall", "car", "never")
    colours = [tuple(colour) for colour in data.palette(names).tolist()]
    sheet = data.contact_sheet(data.open_dataset(spec, "train", names, None, tmp_path / "cache"))
    plain = data.grid([[np.zeros((320 * 40 // 56, 320, 3), np.uint8)] * 3] * 2, ["image", "label", "overlay"])
    below = {colour for _, colour in sheet.crop((0, plain.height, *sheet.size)).getcolors(9999)}
    assert below >= set(colours[:3]) and colours[3] not in below
    label = np.array([[0, 2], [255, 2]], np.uint8)
    assert data.legend([label, torch.from_numpy(label)], names, colours) == [
        ("sky", colours[0]), ("car", colours[2]), ("not labelled", (0, 0, 0))]
    narrow = data.with_legend(Image.new("RGB", (8, 8)), [("a name that is longer than the sheet", (1, 2, 3))])
    assert narrow.width > 150 and narrow.getpixel((6, 14)) == (1, 2, 3)

    put(tmp_path / "in.png", np.array([[[0, 0, 0], [85, 0, 0], [255, 0, 0]]]).repeat(2, 0))
    own = tmp_path / "colours.txt"
    own.write_text("#010203 never\nwall,9,8,7\n")
    for flags, wall in (({}, colours[1]), ({"colors": data.read_colours(own, names)}, (9, 8, 7))):
        evaluation.predict_images(Pointwise(), tmp_path / "in.png", names, tmp_path / "out", **flags)
        ids = Image.open(tmp_path / "out/in_ids.png")
        assert ids.mode == "P" and np.asarray(ids).tolist() == [[0, 1, 3]] * 2
        rgb = ids.convert("RGB")
        assert rgb.getpixel((0, 0)) == colours[0] and rgb.getpixel((1, 0)) == wall
        assert tuple(ids.getpalette()[3 * 255:]) == (0, 0, 0)
        panel = Image.open(tmp_path / "out/in_panel.png")
        assert wall in {colour for _, colour in panel.crop((0, 16, *panel.size)).getcolors(9999)}


def test_palette_files(tmp_path):
    path = tmp_path / "p.txt"
    for text in ("1 2 3 traffic light", "traffic light,1,2,3", "# label:color_rgb:parts:actions\ntraffic light:1,2,3::",
                 "#010203 traffic light", "name,r,g,b\nroad,128,64,128\ntraffic light, 1, 2, 3\nelse,4,4,4"):
        path.write_text(text)
        assert data.read_colours(path, ("road", "traffic light")).tolist() == [[128, 64, 128], [1, 2, 3]]
    for text, words in (("road\nwall", "128 64 128 road"), ("1 2 256 road", "from 0 to 255")):
        path.write_text(text)
        refused(lambda: data.read_colours(path, ("road", "wall")), path, words)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_every_start_method(method, tmp_path):
    argv = checked_run(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        f"import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n")
    where = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run_train([*argv, "--workers", "1", "--steps", "1", "--size", "48x40"], **where)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import sys; sys.path.insert(0, {HERE!r}); import data; data._in_processes(exec, [{code!r}], 'waiting')"
    pool = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | where)
    worker = int(pool.stdout.readline())  # it did not end itself, and does when its parent is killed
    time.sleep(1)
    assert Path(f"/proc/{worker}").exists() or sys.platform != "linux"
    pool.kill()
    pool.wait()
    for _ in range(50):
        if not Path(f"/proc/{worker}").exists() or Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
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

    def forward(self, x, head="plain"):
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
    for stride in (9, -1, 0):
        with pytest.raises(ValueError, match="uncovered"):
            evaluation.predict(model, torch.rand(1, 3, 8, 20), window=8, stride=stride)


@pytest.mark.parametrize("window", [None, 8])
def test_flip_is_symmetric(window):
    torch.manual_seed(0)
    model, image = Pointwise(), torch.rand(1, 3, 12, 20)
    model.conv = torch.nn.Conv2d(3, 4, 3, padding=1)  # knows left from right
    plain, mirrored = (evaluation.predict(model, x, window=window) for x in (image, image.flip(-1)))
    assert not torch.allclose(mirrored.flip(-1), plain, atol=1e-3)
    plain, mirrored = (evaluation.predict(model, x, window=window, flip=True)
                       for x in (image, image.flip(-1)))
    assert torch.allclose(mirrored.flip(-1), plain, atol=1e-6)
    one, other = (evaluation.raw_logits(model, x) for x in (image, image.flip(-1)))
    assert window or torch.allclose(plain, ((one + other.flip(-1)) / 2).softmax(1), atol=1e-6)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (33, 47), (64, 32)])
def test_a_real_network_predicts_any_size(size):
    torch.manual_seed(0)
    model = Segmenter("mit_b0", "segformer", 3, channels=16).eval()
    image = torch.rand(1, 3, *size)
    for window, flip in itertools.product((None, 32), (False, True)):
        probabilities = evaluation.predict(model, image, window=window, flip=flip)
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
        pred = evaluation.predict(model, image, size=item["label"].shape).argmax(1)
        expected += evaluation.confusion(pred, item["label"][None], 4)
    assert result["miou"] == pytest.approx(evaluation.scores(expected, data.classes)["miou"])
    assert result["images"] == 5 and result["images_per_s"] > 0 and json.dumps(result)
    assert len(list(tmp_path.glob("town_*_000019.png"))) == 5
    refused(lambda: evaluation.evaluate(model, MadeImages(labeled=False)), "made: no labels")
    refused(lambda: evaluation.evaluate(model, Ignored()), "ignored pixels only")
    refused(lambda: evaluation.evaluate(model, Failing()), "x.png")
    assert [m.training for m in model.modules()] == modes


def test_two_processes_evaluate_as_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys\nimport torch\nimport eval as evaluation\n"
        "from test_all import MadeImages, Pointwise\n"
        "if 'RANK' in os.environ:\n    torch.distributed.init_process_group('gloo')\n"
        "r = evaluation.evaluate(Pointwise(), MadeImages())\n"
        "with open(sys.argv[1] + os.environ.get('RANK', 'one'), 'w') as file:\n"
        "    json.dump([r['iou'], r['accuracy'], r['images']], file)\n"
        "if 'RANK' in os.environ:\n    torch.distributed.destroy_process_group()\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    out = str(tmp_path / "scores_")
    subprocess.run([sys.executable, str(script), out], check=True, env=env)
    subprocess.run([*TORCHRUN, str(script), out], check=True, env=env, capture_output=True)
    one, *two = [json.loads((tmp_path / f"scores_{r}").read_text()) for r in ("one", 0, 1)]
    assert two == [one, one]


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
    sheet = data.grid([[picture, drawn], [mixed, mixed]], ["image", "label"])
    assert sheet.size == (2 + 4 + 2, 14 + 2 + 4 + 2) and sheet.getpixel((6, 14)) == (10, 20, 30)
    dark = np.zeros((20, 30, 3), np.uint8)
    wide = evaluation.panel(dark, label, label, "ab", colors)
    assert wide.width == 4 * 30 + 3 * 4 and wide.getpixel((34, 14)) == (10, 20, 30)
    assert evaluation.panel(dark, None, label, "ab", colors).width == 3 * 30 + 2 * 4
    entries = [("a", colors[0]), ("a long name", colors[1])]
    one, two = (data.with_legend(wide.crop((0, 0, w, 34)), entries) for w in (132, 80))
    assert one.size == (132, 34 + 18) and two.size == (80, 34 + 34)  # the second on its own line
    assert one.getpixel((6, 40)) == two.getpixel((6, 40)) == (10, 20, 30)
    assert two.getpixel((6, 56)) == (200, 100, 0) and one.getpixel((34, 14)) == (10, 20, 30)


def test_panel_of_a_training_step_leaves_the_network_alone():
    model = Pointwise()
    model.conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    views = {"source": torch.rand(5, 3, 8, 8), "label": torch.full((5, 8, 8), 255).byte()}
    sheet = evaluation.training_panel(model, views, "abcd")
    plain = data.grid([[np.zeros((8, 8, 3), np.uint8)] * 3] * 4, views)  # three columns, at most four rows
    shown = {colour for _, colour in sheet.crop((0, plain.height, *sheet.size)).getcolors(999)}
    assert sheet.height > plain.height and shown & {tuple(colour) for colour in data.palette("abcd").tolist()}
    assert model.conv[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
    for row, right in enumerate((2, 3, 4)):  # columns of 8 + 4 pixels, rows of 10 + 4 below a title
        label, old, new = np.array(sheet)[14 + 14 * row:24 + 14 * row, 12:37:12].swapaxes(0, 1)
        assert label.tolist() == [yes] * 9 + [[0, 0, 0]] and old.tolist() == [no] * 10
        assert new.tolist() == [yes] * right + [no] * (10 - right)
    assert before.training and before.conv.training
    one = Mended(1, names=frames.classes)
    assert len(evaluation.before_after(before, after, one)[1]["frames"]) == 1
    bare = MadeImages(labeled=False)
    refused(lambda: evaluation.before_after(before, after, bare), "made: no labels")
    refused(lambda: evaluation.before_after(before, after, Ignored()), "ignored pixels only")


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
    assert evaluation.predict_images(model, tmp_path / "in", names, out, size=(64, 48)) == 4
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
               contrast_pixels="all", dyce=0.0, cache="c", out="o", world=2, workers=3)
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
    refused(lambda: evaluation.table([text[0], text[2]]), "text 2e instead of 1f")
    refused(lambda: evaluation.table([text[0], text[3]]), "b/bank.npz instead of a/bank.npz")
    made_log(tmp_path / "mic-1.jsonl", 1, 40, **new | dict(tau=0.5, slide=True))
    refused(lambda: evaluation.table([named[0], tmp_path / "mic-1.jsonl"]), "row mic with",
            named[0], tmp_path / "mic-1.jsonl",
            "slide True instead of None, tau 0.5 instead of 0.1")

    logs = Path(HERE) / "assets/logs"
    for name, rows in (("streets", 3), ("camvid", 32), ("choice", 3)):
        assert len(rows_of(*sorted(logs.glob(f"{name}-*")))) == rows


def test_table_refuses_what_it_cannot_compare(tmp_path, capsys):
    one = made_log(tmp_path / "one-0", 0, 41, 45)
    (tmp_path / "text").write_text("no log\n\xff")
    foreign = '{"event": "start", "flags": {"a": 1}}\n{"event": "result"}\n'
    (tmp_path / "foreign").write_text(foreign)
    (tmp_path / "other").mkdir()
    for bad, words in ((tmp_path / "foreign", "no log of train.py"),
                       (tmp_path / "last.pt", "a checkpoint"),
                       (made_log(tmp_path / "other/one-0", 0, 1), "second run of one with seed 0"),
                       (made_log(tmp_path / "long", 1, 1, steps=30), "steps 30 instead of 20"),
                       (made_log(tmp_path / "killed", 2, 1, finished=False), "no result event"),
                       (tmp_path / "text", "no start event")):
        refused(lambda: evaluation.table([one, bad]), bad, words)
    refused(lambda: evaluation.table([one], "two"), "--against 'two': no such row; there are: one")
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
                              ("again", "src-9 and again", dict(labels=9, labeled="9"))):
        more = made_log(tmp_path / name, 0, 1, recipe="source", **more)
        refused(lambda: evaluation.label_curves(evaluation.read_runs([*runs, more])), words)
    refused(lambda: evaluation.label_curves(evaluation.read_runs(runs[:1])), "all of these runs")


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
        def forward(self, x, head="plain"):
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
    centred.forward = lambda x, head: Output(None, x - 0.5, None)
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
    assert "p00 (+0.0), p01 (+0.0), p02 (+0.0)" in out
    assert Image.open(picture).width == 4 * 64 + 3 * 4


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
            ([checkpoint, "--table", "x"], "give a checkpoint, or --table"),
            ([checkpoint, "--against", "mic"], "--table"),
            ([checkpoint, *picture], "--before CKPT0"),
            ([checkpoint, "--before", checkpoint], "add --picture"),
            ([checkpoint, *data, *picture, "--before", other], "other.pt: has other classes"),
            ([checkpoint, *data, "--picture", "no/x.png", "--before", other], "no such folder"),
            ([checkpoint, *data, "--picture", "x", "--before", other], "write FILE.png"),
            (["--table", tmp_path / "nowhere"], "nowhere")):
        eval_fails(capsys, argv, words)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=error))
        eval_fails(capsys, [checkpoint, *data], "out of memory; try", status=1)
    monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        evaluation.main([checkpoint, *data])


# ---------------------------------------------------------------------------------------------------------------------
# model.py


def refused_by(error, words, call, *arguments):
    """The call raises this error, in one line that the pattern `words` matches."""
    with pytest.raises(error, match=words) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


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


def test_wrong_weights_are_refused_by_name(tmp_path):
    state = MixTransformer("mit_b0").state_dict()
    broken = {key: value for key, value in state.items() if key != "norm2.bias"}
    cases = {"missing.pth": (broken, "missing 1 .norm2.bias"),
             "extra.pth": (state | {"neck.weight": torch.zeros(1)}, "unexpected 1 .neck.weight"),
             "shape.pth": (broken | {"norm2.bias": torch.zeros(7)}, r"norm2.bias \(7,\) for \(64"),
             "other.pth": (MixTransformer("mit_b1").state_dict(), "other shapes"),
             "page.pth": ("<html>", "cannot be read"), "absent.pth": (None, "no such"),
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
    ((32, 32), 6), ((33, 47), 12), ((20, 40), 18), ((7, 40), 2), ((5, 5), 3)])
def test_dilated_convolution_by_sub_images_equals_torch(size, dilation):
    torch.manual_seed(0)
    conv = model.DilatedDepthwise(5, 5, 3, 1, dilation, dilation, 5, bias=False).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    outputs = []
    for y in (conv(x), F.conv2d(x, conv.weight, None, 1, dilation, dilation, 5)):
        outputs.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight))))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 65), (64, 96)])
def test_any_image_size(size):
    grid = tuple(-(-side // 4) for side in size)
    for names in ("mit_b0 segformer", "mit_b0 daformer", "timm:tf_efficientnet_lite0 segformer"):
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


@pytest.mark.parametrize("name, strides, mean", [
    ("vit_base_patch32_clip_224", (32,) * 4, 0.48145466),
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
        for old, new, s in zip(before, teacher.parameters(), student.parameters()):
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


def test_heads_of_a_checkpoint_are_fitted_to_the_network():
    """Heads that the network lacks go, new ones stay as they are, the bank is the network's."""
    plain = Segmenter("mit_b0", "segformer", 3, 8).state_dict()
    rich = language_net(projection=True)
    own = {name: value.clone() for name, value in rich.state_dict().items()}
    fitted = model.fit_heads(plain, rich)
    model.load_weights(rich, fitted, "plain")
    for name, value in rich.state_dict().items():
        assert torch.equal(value, plain.get(name, own[name])), name
    other = language_net(made_bank(seed=1))
    own_bank = other.text.bank.clone()
    model.load_weights(other, model.fit_heads(own, other), "rich")
    assert torch.equal(other.text.bank, own_bank)
    assert torch.equal(other.text.projection.weight, own["text.projection.weight"])
    wrong = {name: value for name, value in plain.items() if "classifier" not in name}
    wrong = model.fit_heads(wrong, rich)
    refused_by(CheckpointError, "missing 2", model.load_weights, rich, wrong, "")


def tiny_checkpoint(**changes):
    flags = {"backbone": "mit_b0", "decoder": "segformer", "channels": 8, "recipe": "mic"}
    state = Segmenter("mit_b0", "segformer", 3, 8).state_dict()
    return {"flags": flags, "classes": ["a", "b", "c"], "student": state, "teacher": state,
            "optimizer": {}, "step": 1, "versions": {}} | changes


def test_checkpoint_survives_sigkill(tmp_path):
    path = tmp_path / "last.pt"
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from model import save_checkpoint\n"
        "for i in range(10 ** 6):\n"
        "    state = dict.fromkeys(('flags', 'classes', 'optimizer', 'versions'), 0)\n"
        "    state |= dict(student=torch.full((400, 1000), float(i)), teacher=i, step=i)\n"
        "    save_checkpoint(sys.argv[2], state); print(i, flush=True)\n")
    for wait in (0.0, 0.011, 0.023, 0.037, 0.05):
        command = [sys.executable, "-c", script, HERE, str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
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
    poisoned = tiny_checkpoint(step=2, optimizer=Poison())
    refused_by(CheckpointError, "cannot be pickled.*intact", save_checkpoint, path, poisoned)
    script = (
        "import sys, signal, resource, torch; sys.path.insert(0, sys.argv[1])\n"
        "from model import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))\n"
        "save_checkpoint(sys.argv[2], dict(student=torch.zeros(10 ** 6)))\n")
    command = [sys.executable, "-c", script, HERE, str(path)]
    full = subprocess.run(command, capture_output=True, text=True)
    assert full.returncode != 0 and re.search("CheckpointError.*MB are free", full.stderr)
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
    cases = {"t2s": 0.1}, {"sepico": 0.1}, {"t2s": 0.1, "projection": False}
    for changes in cases:
        head = changes.get("projection", True)
        net = Segmenter("mit_b0", "segformer", 3, 8, projection=head)
        known = tiny_checkpoint(student=net.state_dict(), flags=flags | changes)
        assert same_tensors(dict(model.build_segmenter(known).state_dict()), dict(net.state_dict()))
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


# ---------------------------------------------------------------------------------------------------------------------
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
    ("clip:ViT-B-32", "needs MODEL/TAG"), ("clip:ViT-B-32/none", "needs MODEL/TAG"),
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
    refused_by(WeightsError, f"^--init hub, timm:resnet18: no weights: .*{way}", *timm)
    mit = load_backbone, MixTransformer("mit_b0"), "hub"
    refused_by(WeightsError, f"^--init hub, nvidia/mit-b0: no weights: .*{way}", *mit)
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
    broken = "model.py: error: No space left on device\n"
    assert leave.value.code == 1 and capsys.readouterr().err == broken


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


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def test_learning_rates_are_the_published_ones():
    rates = {0: 6.0e-11, 750: 2.94375e-5, 1499: 5.7713e-5, 1500: 5.775e-5, 39_999: 1.5e-9}
    for step, rate in rates.items():
        assert train.learning_rate(step, 6e-5, 40_000, 1500) == pytest.approx(rate, rel=1e-4)


def test_parameter_groups_are_the_published_ones():
    net = Segmenter("mit_b0", "daformer", 19, 16)
    groups = train.parameter_groups(net, 6e-5, 10)
    of = {id(p): g for g in groups for p in g["params"]}
    assert len(of) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        rate, decay = of[id(p)]["peak"], of[id(p)]["weight_decay"]
        if name.startswith("decoder"):
            assert (rate, decay) == (pytest.approx(6e-4), 0.01)  # its BatchNorm too
        else:
            assert (rate, decay) == (6e-5, 0.0 if "norm" in name else 0.01)


def test_recipes_and_derived_flags(capsys):
    flags = train.parse_flags("--recipe daformer --fd 0 --mask 0.5 --steps 40000 --init x.pth --crop 512".split())
    assert (flags.mix, flags.mask, flags.fd, flags.alpha, flags.warmup, flags.lr, flags.head_lr, flags.mask_block) == (
        1.0, 0.5, 0.0, 0.999, 1500, 6e-5, 10.0, 32)
    assert train.parse_flags(["--recipe", "oracle"]).source == "streets:shifted"
    bad = [["--recipe", "none"], ["--nonsense"], ["--crop", "0"], ["--batch", "x"], ["--target", "none"],
           ["--size", "12"], ["--decoder", "x"], ["--steps", "-1"], ["--source", "none"], ["--stop-at", "9999"],
           ["--stop-at", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--mask-ratio", "2"], ["--seed", "-1"],
           ["--border", "-5", "0"], *(line.split() for line in (
               "--text stub", "--style lab", "--control", "--projection", "--pooled", "--target none --labeled 2",
               "--recipe source --language lcmsm", "--recipe lcmsm --mask 0", "--recipe t2sda --beta nan",
               "--recipe t2sda --beta 0.01 -1",
               "--recipe cluda --contrast-start 1000", "--recipe cluda --contrast-pixels 0",
               "--recipe cluda --contrast-pixels " + 30 * "9", "--recipe t2sda_dg --style fourier",
               "--recipe t2sda --dyce", "--recipe semidavil --style random", "--recipe semidavil --hardest 0",
               "--recipe semidavil --spatial-depth 0", "--recipe semidavil --threshold 0.1",
               "--recipe oracle --labeled 2", "--source none --labeled 00"))]
    for argv in bad:
        with pytest.raises(SystemExit) as caught:
            train.parse_flags(argv)
        assert caught.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]
    assert not train.parse_flags("--recipe t2sda --t2s 0".split()).projection
    assert not train.adapts(train.parse_flags("--recipe lcmsm --mix 0 --mask-views source --target none".split()))


@pytest.mark.parametrize("flags", ["t2sda --t2s 0", "mic --mask-ratio 1", "t2sda_dg --style identity",
                                   "lcmsm --mix 0 --mask-views source source --teacher-head plain --target none"])
def test_flags_that_leave_little_to_do_still_train(flags, small_run, tmp_path):
    argv = [*small_run, "--steps", "2", "--recipe", *flags.split()]
    run_train([*argv, "--target", "none"] if "dg" in flags else argv)
    left = {"t2sda": {"mix"}, "mic": {"mix", "mask"}, "t2sda_dg": {"t2s", "restyled"}, "lcmsm": {"mask_source"}}
    terms = {"mix", "mask", "t2s", "restyled", "mask_source", "mask_mix"}
    assert events(tmp_path / "out", "step")[-1].keys() & terms == left[flags.split()[0]]


def context(generator, step=0, shard=(0, 1)):
    return train.Context(step, generator, shard, train.Clock(torch.device("cpu")))


def step_inputs(batch, size=64, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (batch, size, size), generator=g).byte()
    label[:, :9] = 255
    images = torch.rand(2, batch, 3, size, size, generator=g)
    return (images[0], label), (images[1], torch.zeros_like(label))


def unsure_networks():
    """A student and its teacher whose confidence differs from pixel to pixel."""
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, 8)
    with torch.no_grad():
        net.decoder.classifier.weight.normal_(std=1.0)
    return train.Networks(net, model.teacher_mode(copy.deepcopy(net).requires_grad_(False)), None, None, None)


def test_one_pseudo_label_weight_for_the_batch_and_border_rows_without(monkeypatch):
    flags = train.parse_flags(["--recipe", "mic", "--border", "5", "7", "--threshold", "0.4"])
    networks, (source, target) = unsure_networks(), step_inputs(2)
    target[1][:, :, :4] = 255  # padding, where a pseudo-label would be an invention
    seen = []
    real = train.cross_entropy
    monkeypatch.setattr(train, "cross_entropy", lambda *a: (seen.append(a), real(*a))[1])
    terms, views = train.step_terms(flags, context(torch.Generator()), networks, source, None, target, [])
    assert list(terms) == ["source", "mix", "mask"]
    with torch.no_grad():
        logits = networks.teacher(target[0]).logits
        confidence = F.interpolate(logits, size=(64, 64), mode="bilinear").softmax(1).amax(1)
    q = (confidence >= 0.4).float().mean()
    assert 0.05 < q < 0.95
    (_, _, mixed_weight), (_, pseudo, weight) = seen[1], seen[2]
    assert (weight[:, :5] == 0).all() and (weight[:, -7:] == 0).all()
    torch.testing.assert_close(weight[:, 5:-7, 4:], q.expand(2, 52, 60))
    assert (weight[:, :, :4] == 0).all()
    pasted = (views["mixed_label"] != pseudo) & (mixed_weight != q)
    assert pasted.any() and (mixed_weight[pasted] == 1).all()  # source pixels weigh 1, in the border rows too


def test_terms_carry_their_weights_and_the_mask_hides_blocks():
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, 8).eval()
    teacher, imagenet = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        for p in imagenet.parameters():
            p.add_(0.05)
    values = []
    for weight in ("1", "0.25"):
        flags = train.parse_flags(["--mix", weight, "--mask", weight, "--fd", weight, "--threshold", "0.2",
                                   "--mask-ratio", "0.5", "--no-augment-source"])
        (image, label), target = step_inputs(2)
        label[:, :, :40] = 1
        generator = torch.Generator().manual_seed(0)
        networks = train.Networks(net, teacher, imagenet, None, None)
        terms, views = train.step_terms(flags, context(generator), networks, (image, label), None, target, [1])
        values.append({name: float(value.detach()) for name, value in terms.items()})
    for name in ("mix", "mask", "fd"):
        assert values[0][name] > 0 and values[1][name] == pytest.approx(values[0][name] / 4)
    assert values[0]["source"] == values[1]["source"] and torch.equal(views["source"], image)
    hidden = (views["masked_target"] == net.pixel_mean).all(1)  # (2,64,64): whole blocks of 16 in the mean colour
    blocks = hidden.unfold(1, 16, 16).unfold(2, 16, 16).flatten(3)
    assert torch.equal(blocks.all(3), blocks.any(3)) and 0 < blocks.float().mean() < 1


def write_pairs(root, count=5, size=(56, 40), classes=3, name="train"):
    """A folder pair of made images: three coloured stripes and noise."""
    rng = np.random.default_rng(len(name))
    for part in ("images", "labels"):
        (root / name / part).mkdir(parents=True)
    for i in range(count):
        label = (np.arange(size[1])[:, None] * classes // size[1] + np.zeros(size[0], int)[None]).astype(np.uint8)
        image = (label[..., None] * np.array([90, 40, 20]) + rng.integers(0, 60, (*label.shape, 3))).astype(np.uint8)
        Image.fromarray(image).save(root / name / "images" / f"{i:03d}.png")
        Image.fromarray(label).save(root / name / "labels" / f"{i:03d}.png")
    return f"folder:{root / name / 'images'}:{root / name / 'labels'}", f"folder:{root / name / 'images'}"


@pytest.fixture
def small_run(tmp_path):
    """A command line of a tiny run on made data; further flags are added by the tests."""
    labelled, _ = write_pairs(tmp_path, name="source")
    val, unlabelled = write_pairs(tmp_path, name="target")
    (tmp_path / "names.txt").write_text("sky\nwall\ncar\n")
    return ["--source", labelled, "--target", unlabelled, "--val", val, "--classes", str(tmp_path / "names.txt"),
            *"--crop 32 --batch 2 --channels 8 --steps 6 --log-every 1 --panel-every 100 --dtype fp32".split(),
            "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]


def run_train(argv, check=True, launcher=(), **environment):
    """Run train.py: in this process, or in new ones where a launcher or an environment is given."""
    if launcher or environment:
        command = [*(launcher or [sys.executable]), str(Path(HERE) / "train.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)
    else:
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                train.main(argv)
            except SystemExit as leave:
                code = leave.code if isinstance(leave.code, int) else 1
        for number, handler in handlers.items():
            signal.signal(number, handler)
        done = subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


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


def test_resumed_run_equals_uninterrupted_bit_for_bit(small_run, tmp_path):
    straight, halves = str(tmp_path / "straight"), str(tmp_path / "halves")
    run_train([*small_run, "--out", straight])
    run_train([*small_run, "--out", halves, "--stop-at", "3"])
    assert load_checkpoint(f"{halves}/last.pt")["step"] == 3
    done = run_train([*small_run, "--out", halves])
    a, b = (load_checkpoint(f"{out}/last.pt") for out in (straight, halves))
    for key in ("student", "teacher", "optimizer", "step"):
        assert same_tensors(a[key], b[key]), key
    terms = [[{k: e[k] for k in ("step", "source", "mix", "mask", "grad_norm")} for e in events(out, "step")]
             for out in (straight, halves)]
    assert terms[0] == terms[1] and len(terms[0]) == 6
    for e in events(straight, "step"):
        assert e["lr"] == pytest.approx(train.learning_rate(e["step"] - 1, 1e-3, 6, 0))
    assert events(halves, "result")[0]["student"]["iou"] == events(straight, "result")[0]["student"]["iou"]
    assert len(list((tmp_path / "halves/panels").glob("*.png"))) == 2 and "student mIoU" in done.stdout
    again = run_train([*small_run, "--out", halves])
    assert "nothing is left to do" in again.stdout
    refused = run_train([*small_run, "--out", halves, "--lr", "0.5", "--eval-every", "2"], check=False)
    assert refused.returncode == 1 and "--lr was" in refused.stderr and "--eval-every" not in refused.stderr
    assert "Traceback" not in refused.stderr


def test_teacher_layers_without_a_batch_have_the_statistics_of_the_student(small_run, tmp_path):
    """LC-MSM's teacher labels the target with its language decoder: its plain one, which is evaluated, sees nothing."""
    argv = [*small_run, "--recipe", "lcmsm", "--text", "stub", "--mask-block", "4", "--steps", "3", "--crop", "64"]
    for head, same in (("language", True), ("plain", False)):
        run_train([*argv, "--teacher-head", head, "--out", str(tmp_path / head)])
        state = load_checkpoint(tmp_path / f"{head}/last.pt")
        for name in ("decoder.fusion.bn.running_mean", "decoder.fusion.bn.running_var"):
            assert torch.equal(state["teacher"][name], state["student"][name]) == same
            other = f"language_{name}"
            assert torch.equal(state["teacher"][other], state["student"][other]) != same


def test_evaluation_of_the_checkpoint_repeats_the_number(small_run, tmp_path):
    run_train(small_run)
    for weights in ("student", "teacher"):
        scores = tmp_path / f"{weights}.json"
        evaluation.main([str(tmp_path / "out/last.pt"), "--weights", weights, "--json", str(scores)])
        assert json.loads(scores.read_text())["iou"] == events(tmp_path / "out", "result")[0][weights]["iou"]


def test_sigterm_saves_and_leaves(small_run, tmp_path):
    argv = [*small_run, "--steps", "100000"]
    child = subprocess.Popen([sys.executable, str(Path(HERE) / "train.py"), *argv], stdout=subprocess.PIPE, text=True)
    while "step 2/" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 0
    step = load_checkpoint(tmp_path / "out/last.pt")["step"]
    assert step >= 2
    done = run_train([*argv, "--stop-at", str(step + 1)])
    assert f"step {step + 1}/100000" in done.stdout and f"step {step}/" not in done.stdout


def test_non_finite_gradient_stops_before_the_optimiser(small_run, tmp_path):
    run_train([*small_run, "--stop-at", "2"])
    path = tmp_path / "out/last.pt"
    state = load_checkpoint(path)
    state["student"]["decoder.classifier.bias"][0] = float("nan")
    save_checkpoint(path, state)
    before = path.read_bytes()
    done = run_train(small_run, check=False)
    assert done.returncode == 1 and "step 2: the gradient is not finite (source nan" in done.stderr
    assert "Traceback" not in done.stderr and path.read_bytes() == before
    assert len(events(tmp_path / "out", "non-finite")[0]["files"]) == 4  # two source, two target images


@pytest.mark.parametrize("recipe", ["source", "oracle", "dacs", "daformer"])
def test_recipes_run(recipe, small_run, tmp_path, monkeypatch):
    drawn, real = [], data.RareClassSampler.__init__
    monkeypatch.setattr(data.RareClassSampler, "__init__", lambda *a: (drawn.append(a), real(*a))[1])
    _, target = small_run[3], small_run[5]
    argv = [*small_run, "--recipe", recipe, "--steps", "2", "--accum", "2", "--target", target, "--workers", "1",
            "--eval-every", "1"]
    run_train(argv)
    expected = {"source": {"source"}, "oracle": {"source"}, "dacs": {"source", "mix"}, "daformer": {"source", "mix"}}
    step = events(tmp_path / "out", "step")[-1]
    assert expected[recipe] == {"source", "mix", "mask", "fd"} & step.keys()
    assert (tmp_path / "out/best.pt").exists() and len(events(tmp_path / "out", "eval")) == 2
    assert (recipe == "daformer") == bool(drawn)  # rare classes are sampled by this recipe alone
    state = load_checkpoint(tmp_path / "out/best.pt")
    assert state["teacher"]["decoder.fusion.bn.running_var"].ne(1).all()  # of images, not of the start


def test_feature_distance_runs_from_pretrained_weights_and_init_takes_our_checkpoint(small_run, tmp_path):
    torch.save(MixTransformer("mit_b0").state_dict(), tmp_path / "mit_b0.pth")
    argv = [*small_run, "--recipe", "daformer", "--steps", "2"]
    run_train([*argv, "--init", str(tmp_path / "mit_b0.pth")])
    assert all("fd" in e for e in events(tmp_path / "out", "step"))
    done = run_train([*argv, "--init", str(tmp_path / "out/last.pt"), "--out", str(tmp_path / "next")])
    assert "feature distance: off" in done.stdout
    argv += ["--init", str(tmp_path / "out/last.pt"), "--channels", "16", "--out", str(tmp_path / "other")]
    wrong = run_train(argv, check=False)
    assert wrong.returncode == 1 and "last.pt: other network" in wrong.stderr and "Traceback" not in wrong.stderr


GRADIENTS = """
import copy, os, sys, torch, torch.distributed as dist
sys.path[:0] = [sys.argv[1]]
import test_all, model, train
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
flags = train.parse_flags(["--recipe", "mic", "--threshold", "0.4", "--fd", "1"])
torch.manual_seed(0)
net = model.Segmenter("mit_b0", "segformer", 3, 8)
with torch.no_grad():
    net.decoder.classifier.weight.normal_()
    imagenet = copy.deepcopy(net).requires_grad_(False).eval()
    for p in net.parameters():
        p.add_(0.01 * torch.randn_like(p))
net.eval()
teacher = copy.deepcopy(net).requires_grad_(False).eval()
(image, label), (target, padding) = test_all.step_inputs(2)
label[0, 9:], label[1, 40:] = 1, 2
part = slice(rank, rank + 1) if world > 1 else slice(None)
generator = torch.Generator().manual_seed(5)
student = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
networks = train.Networks(student, teacher, imagenet, None, None)
context = test_all.context(generator, shard=(rank, world))
terms, _ = train.step_terms(flags, context, networks, (image[part], label[part]), None,
                            (target[part], padding[part]), [1, 2])
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
        done = subprocess.run([*launcher, str(script), HERE, str(tmp_path / out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    scale = max(g.abs().max() for g in one)
    assert scale > 1e-4
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(scale))


def test_two_processes_train_and_evaluate_like_one(small_run, tmp_path):
    argv = [*small_run, "--steps", "4", "--batch", "1"]
    run_train(argv, launcher=TORCHRUN, OMP_NUM_THREADS="1")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pt")) == ["last.pt"]
    result = events(tmp_path / "out", "result")[0]
    assert result["student"]["images"] == 5  # odd, over two processes
    net = model.build_segmenter(load_checkpoint(tmp_path / "out/last.pt"))
    val = data.open_dataset(small_run[5], "val", data.class_names(small_run[7]))
    alone = evaluation.evaluate(net, val)
    assert alone["iou"] == result["student"]["iou"] and alone["accuracy"] == result["student"]["accuracy"]


def test_a_dying_rank_ends_the_job(small_run, tmp_path):
    run_train([*small_run, "--stop-at", "2"], launcher=TORCHRUN, OMP_NUM_THREADS="1")
    script = tmp_path / "dying.py"
    script.write_text(f"import os, sys; sys.path.insert(0, {HERE!r}); sys.argv = ['train.py', *sys.argv[1:]]\n"
                      "import train\nreal = train.step_terms\ncalls = []\n"
                      "def step_terms(*a):\n    calls.append(1)\n"
                      "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
                      "        raise RuntimeError('rank 1 dies')\n"
                      "    return real(*a)\ntrain.step_terms = step_terms\ntrain.run()\n")
    before, begin = (tmp_path / "out/last.pt").read_bytes(), time.time()
    done = subprocess.run([*TORCHRUN, str(script), *small_run], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "rank 1 dies" in done.stderr and time.time() - begin < 60
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_a_broken_image_in_a_loader_process_ends_the_run(small_run, tmp_path):
    broken = tmp_path / "source/images/003.png"
    broken.write_bytes(broken.read_bytes()[:200])
    begin = time.time()
    done = run_train([*small_run, "--rcs", "0", "--workers", "1"], check=False, launcher=(sys.executable,))
    assert done.returncode == 1 and "003.png" in done.stderr.splitlines()[-1] and time.time() - begin < 120


def test_a_delayed_check_saves_no_statistics_of_a_bad_step(small_run, tmp_path, monkeypatch):
    real, calls, check = train.step_terms, [], train.GradientCheck

    def step_terms(f, context, networks, source, *rest):
        calls.append(1)
        return real(f, context, networks, (source[0] * float("nan"), source[1]) if len(calls) == 2 else source, *rest)

    monkeypatch.setattr(train, "step_terms", step_terms)
    monkeypatch.setattr(train, "GradientCheck", lambda *a, delayed: check(*a, delayed=True))
    done = run_train([*small_run, "--recipe", "source", "--eval-every", "2", "--log-every", "100"], check=False)
    assert done.returncode == 1 and "step 1: the gradient is not finite" in done.stderr
    assert not list((tmp_path / "out").glob("*.pt"))


def test_times_in_the_log_are_of_steps_alone(small_run, tmp_path, monkeypatch):
    real = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a: (time.sleep(3), real(*a))[1])
    run_train([*small_run, "--recipe", "source", "--eval-every", "1", "--steps", "3", "--save-every", "1"])
    steps = events(tmp_path / "out", "step")
    assert len(steps) == 3 and all(sum(step["ms"].values()) < 3000 for step in steps)
    assert all(step["images_per_s"] > 2 / 3 for step in steps)


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("x"), "out of memory"), (MemoryError(), "out of memory"),
    (KeyboardInterrupt(), "interrupted"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory")])
def test_what_ends_a_run_from_outside_is_one_line(error, words, monkeypatch, capsys):
    def run(argv):
        raise error

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(SystemExit) as caught:
        train.main([])
    assert caught.value.code == (130 if words == "interrupted" else 1)
    assert words in capsys.readouterr().err and "\n" not in capsys.readouterr().err
    monkeypatch.setattr(train, "run", lambda argv: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):  # a fault of ours keeps its traceback
        train.main([])


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's code needs no C++ compiler")
def test_compile_without_a_compiler_is_one_line(small_run, tmp_path):
    done = run_train([*small_run, "--compile"], check=False, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: --compile: torch.compile does not")


def test_a_failing_final_evaluation_loses_nothing(small_run, tmp_path):
    broken = tmp_path / "target/images/003.png"
    argv = [*small_run, "--recipe", "source", "--target", "none", "--steps", "2"]
    broken.write_bytes(broken.read_bytes()[:200])
    done = run_train(argv, check=False)
    assert done.returncode == 1 and "003.png" in done.stderr and load_checkpoint(tmp_path / "out/last.pt")["step"] == 2


@pytest.mark.parametrize("change, words", [
    (("--source", "folder:/nonexistent:/nonexistent"), "check the folder"), (("--source", "moon"), "moon"),
    (("--init", "/nonexistent.pth"), "no such weights file"), (("--init", "/nonexistent.pt"), "no such weights file"),
    (("--classes", "/nonexistent.txt"), "neither a file"), (("--backbone", "mit_b9"), "mit_b9")])
def test_wrong_inputs_of_training_are_one_clear_line(change, words, small_run):
    done = run_train([*small_run, *change], check=False)
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr
    assert words in done.stderr.strip().splitlines()[-1]


def test_labels_without_a_class_are_refused(small_run, tmp_path):
    folder = tmp_path / "target/labels"
    for path in folder.glob("*.png"):
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    blank = f"folder:{tmp_path}/target/images:{folder}"
    for change in (["--source", blank, "--rcs", "0"], ["--target", blank, "--val", "none", "--labeled", "2"]):
        done = run_train([*small_run, *change], check=False)
        assert done.returncode == 1 and "no pixel of its labels is one of the 3 classes" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["FILE", "shuffled", "learned", "none", "auto"])
def test_lcmsm_trains_and_evaluates_with_every_head(text, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bank = made_bank()._replace(names=("sky", "wall", "car"))
    path = write_bank(tmp_path / "bank.npz", bank)
    argv = [*small_run, "--recipe", "lcmsm", "--steps", "3", "--text"]
    argv.append({"FILE": path, "shuffled": "shuffled:" + path}.get(text, text))
    done = run_train([*argv, "--stop-at", "2"])
    assert ("STUB" in done.stderr) == (text == "auto")
    other = bank._replace(embeddings=bank.embeddings.flip(1))
    write_bank(path, other)
    run_train(argv)
    step = events(tmp_path / "out", "step")[-1]
    assert {"source", "mix", "mask_source", "mask_mix"} <= step.keys() and "mask" not in step
    if text == "FILE":  # the checkpoint's bank went on, whatever was written over its file
        saved = load_checkpoint(tmp_path / "out/last.pt")
        assert torch.equal(saved["student"]["text.bank"], bank.embeddings) and saved["text"]["kind"] == "clip"
        log = [events(tmp_path / "out", event)[0]["text"] for event in ("start", "resume")]
        assert log[0] == log[1] and log[0]["dimensions"] == bank.embeddings.shape[1]
        write_bank(path, other)
        run_train([*argv, "--init", str(tmp_path / "out/last.pt"), "--out", str(tmp_path / "init"), "--stop-at", "1"])
        saved = load_checkpoint(tmp_path / "init/last.pt")  # a new run has the bank that it names
        assert torch.equal(saved["student"]["text.bank"], other.embeddings)
        assert torch.equal(saved["teacher"]["text.bank"], saved["text"]["embeddings"])
    (tmp_path / "bank.npz").unlink()  # the checkpoint holds what evaluation needs
    for head in ("plain", "language", "mean"):
        scores = tmp_path / f"{head}.json"
        evaluation.main([str(tmp_path / "out/last.pt"), "--head", head, "--json", str(scores)])
        if head == "plain":
            assert json.loads(scores.read_text())["iou"] == events(tmp_path / "out", "result")[0]["student"]["iou"]


CONTRASTS = {"cluda": ["cluda"], "cluda --pooled --projection --contrast-pixels 3/class": ["cluda"],
             "t2sda": ["t2s"], "t2sda --restyle half --style lab --class-weights none --contrast-start 0": ["t2s"],
             "t2sda --restyled 0.5 --mix 0": ["t2s", "restyled"], "sepico --contrast-pixels 9": ["sepico"],
             "t2sda_dg --target none": ["t2s", "restyled"],
             "mic --cluda 0.1 --t2s 0.1 --sepico 0.1 --language lcmsm --text stub": ["cluda", "t2s", "sepico", "mask"]}


@pytest.mark.parametrize("flags", CONTRASTS)
def test_contrasts_train_resume_and_leave_the_keys_alone(flags, small_run, tmp_path, monkeypatch):
    argv = [*small_run, "--recipe", *flags.split(), "--crop", "64", "--steps", "4", "--mask-block", "4"]
    real, calls = data.SegmentationDataset.arrays, []
    monkeypatch.setattr(data.SegmentationDataset, "arrays", lambda self, i: (calls.append(self.spec), real(self, i))[1])
    run_train([*argv, "--out", str(tmp_path / "straight"), "--val", "none"])
    assert calls and ("dg" in flags) != any("target" in spec for spec in calls)  # not one target image was opened
    run_train([*argv, "--out", str(tmp_path / "halves"), "--val", "none", "--stop-at", "2"])
    run_train([*argv, "--out", str(tmp_path / "halves"), "--val", "none"])
    a, b = (load_checkpoint(tmp_path / f"{out}/last.pt") for out in ("straight", "halves"))
    for key in ("student", "teacher", "optimizer", "statistics"):
        assert same_tensors(a[key], b[key]), key
    for step in events(tmp_path / "straight", "step"):
        assert set(CONTRASTS[flags]) == {"cluda", "t2s", "sepico", "restyled", "mask"} & step.keys()
        assert ("t2s" in flags) == ("class_weights" in step)
    assert a["statistics"]["confidence.seen"].any() == ("t2s" in flags)
    assert any(step[name] > 0 for name in CONTRASTS[flags] for step in events(tmp_path / "straight", "step"))
    has_head = any(name.startswith("projection.") for name in a["student"])
    assert has_head == ("projection" in flags or flags.startswith(("t2sda", "sepico")))
    evaluation.main([str(tmp_path / "straight/last.pt"), "--data", small_run[5]])


def test_control_computes_contrasts_without_effect(small_run, tmp_path):
    """Bit for bit, the teacher's statistics too: source images, which it sees for sepico, leave no trace in them."""
    states = []
    for flags in ("--recipe daformer", "--recipe cluda --control", "--recipe sepico --control", "--recipe cluda"):
        run_train([*small_run, *flags.split(), "--crop", "64", "--val", "none", "--out", str(tmp_path / flags)])
        state = load_checkpoint(tmp_path / flags / "last.pt")
        states.append([{k: v for k, v in state[who].items() if not k.startswith("projection.")}
                       for who in ("student", "teacher")])
    assert same_tensors(states[0], states[1]) and same_tensors(states[0], states[2])
    assert not same_tensors(states[1], states[3])
    assert events(tmp_path / "--recipe cluda --control", "step")[-1]["cluda"] == 0


def test_pull_moves_the_student_alone_and_starts_with_the_warm_up():
    flags = train.parse_flags(["--recipe", "t2sda", "--mix", "0", "--warmup", "2"])
    assert flags.contrast_start == 2 and train.parse_flags(["--recipe", "cluda"]).contrast_start == 0
    torch.manual_seed(0)
    student = Segmenter("mit_b0", "segformer", 3, 8, projection=True)
    teacher = model.teacher_mode(copy.deepcopy(student))  # its weights could learn, if a gradient reached them
    networks = train.Networks(student, teacher, None, losses.ClassConfidence(3), None)
    source, target = step_inputs(2)
    source[1].copy_((torch.arange(64) // 32)[None, :, None].expand(2, 64, 64))
    for step in (1, 2):
        terms, views = train.step_terms(flags, context(generator(), step), networks, source, None, target, [])
        student.zero_grad()
        terms["t2s"].backward()
        moved = [p.grad.abs().max() > 0 for p in student.projection.parameters()]
        assert all(moved) == any(moved) == (step == 2) and all(p.grad is None for p in teacher.parameters())
    assert set(views) == {"source", "label", "restyled", "target", "pseudo"}
    assert (views["restyled"] - source[0]).abs().mean() > 0


def test_domain_generalisation_refuses_a_target(small_run, capsys):
    for argv in (["--recipe", "t2sda_dg", "--target", small_run[3]], ["--recipe", "t2sda", "--style", "random"],
                 ["--recipe", "source", "--target", "none", "--t2s", "1"]):
        with pytest.raises(SystemExit) as caught:
            train.parse_flags(argv)
        assert caught.value.code == 2 and "without" in capsys.readouterr().err.splitlines()[-1]


def test_init_takes_a_checkpoint_without_the_new_heads(small_run, tmp_path):
    run_train([*small_run, "--recipe", "source", "--steps", "1", "--out", str(tmp_path / "first")])
    argv = [*small_run, "--steps", "1", "--init", str(tmp_path / "first/last.pt"), "--lr", "0"]
    run_train([*argv, "--recipe", "sepico", "--out", str(tmp_path / "second")])
    first, second = (load_checkpoint(tmp_path / f"{out}/last.pt")["student"] for out in ("first", "second"))
    assert set(second) - set(first) == {f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert torch.equal(first["decoder.classifier.weight"], second["decoder.classifier.weight"])
    argv += ["--init", str(tmp_path / "second/last.pt"), "--out", str(tmp_path / "third")]
    run_train([*argv, "--recipe", "mic"])


def test_two_processes_contrast(small_run, tmp_path):
    argv = [*small_run, *"--recipe t2sda --cluda 0.1 --sepico 0.1 --steps 3 --batch 1 --crop 64 --val none".split()]
    run_train(argv, launcher=TORCHRUN, OMP_NUM_THREADS="1")
    assert {"t2s", "cluda", "sepico"} <= events(tmp_path / "out", "step")[-1].keys()


@pytest.mark.parametrize("flags", [
    "semidavil --labeled 0", "semidavil --labeled 2", "semidavil --labeled all --text learned", "all --labeled 1",
    "semidavil --source none --labeled 2 --text none", "source --labeled 3",
    "source --source none --labeled 2 --rcs 0.01", "all"])
def test_few_target_labels(flags, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = small_run[5]  # the target with its labels
    argv = [*small_run, "--target", given, "--recipe", *flags.split(), "--steps", "4", "--crop", "64",
            "--accum", "2", *(["--confident", "0.3"] if "semidavil" in flags else []),
            *(["--contrast-start", "0"] if flags.startswith("all") else [])]
    real, drawn = data.Crops.__getitem__, []
    monkeypatch.setattr(data.Crops, "__getitem__", lambda self, k: (item := real(self, k), drawn.append(
        (self.dataset.spec, self.labels, self.dataset.names[item["index"]])))[0])
    done = run_train([*argv, "--stop-at", "2"])
    state, start = load_checkpoint(tmp_path / "out/last.pt"), events(tmp_path / "out", "start")[0]
    run_train(argv)
    number = {"labeled 0": 0, "labeled 1": 1, "labeled 2": 2, "labeled 3": 3, "labeled all": 5}
    wanted = next((n for text, n in number.items() if text in flags), 0)
    assert len(state["labeled"]) == wanted and start.get("labeled", []) == state["labeled"]
    assert wanted == 0 or start["labeled_sha256"] in done.stdout
    with_labels = {name for spec, labels, name in drawn if spec == given and labels}
    without = {name for spec, labels, name in drawn if spec == given and not labels}
    assert with_labels <= set(state["labeled"]) and bool(with_labels) == bool(wanted)  # no other label was looked at
    assert bool(without) == (not flags.startswith("source")) and (wanted == 5 or not without & with_labels)
    assert ("--source none" in flags) != any(spec == small_run[1] for spec, _, _ in drawn)
    terms = {"semidavil": {"source", "consistency"}, "all": {"source", "mix", "mask", "cluda", "t2s"},
             "source": {"source"}}
    step = events(tmp_path / "out", "step")[-1]
    assert terms[flags.split()[0]] == {"source", "fd", "mix", "mask", "consistency", "cluda", "t2s"} & step.keys()
    evaluation.main([str(tmp_path / "out/last.pt")])


def test_another_labelled_set_is_refused_on_resume(small_run, tmp_path):
    split, given = tmp_path / "split.txt", small_run[5]
    split.write_text("000\n002\n")
    argv = [*small_run, "--target", given, "--recipe", "semidavil", "--labeled", str(split)]
    run_train([*argv, "--stop-at", "1"])
    state = load_checkpoint(tmp_path / "out/last.pt")
    assert state["labeled_sha256"] == hashlib.sha256(b"000\n002").hexdigest()[:16]
    split.write_text("000\n003\n")
    done = run_train(argv, check=False)
    assert done.returncode == 1 and f"{tmp_path}/out/last.pt" in done.stderr and "not all of them" in done.stderr
    assert load_checkpoint(tmp_path / "out/last.pt")["step"] == 1
    split.write_text("002\n000\n")
    run_train(argv)


def test_a_run_says_what_its_source_never_labels_and_where_it_goes_on(small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(data.STREETS["streets"], "train", range(2))
    (tmp_path / "names.txt").write_text("sky\nsofa\ncar\n")
    argv = [*small_run, "--source", "streets", "--recipe", "source", "--val", "none", "--steps", "2"]
    done = run_train([*argv, "--stop-at", "1"])
    assert "note: streets has no label for sofa\n" in done.stdout and "goes on from" not in done.stdout
    assert f"goes on from {tmp_path}/out/last.pt, step 1\n" in run_train(argv).stdout
    with pytest.raises(model.CheckpointError, match="/out: a folder, give its last.pt"):
        load_checkpoint(tmp_path / "out")


def test_trained_class_vectors_of_the_guidance_go_on_from_a_checkpoint(small_run, tmp_path):
    argv = [*small_run, "--recipe", "semidavil", "--text", "learned"]
    run_train(argv)
    first = load_checkpoint(tmp_path / "out/last.pt")["student"]
    other = ["--init", str(tmp_path / "out/last.pt"), "--lr", "0", "--seed", "1", "--out", str(tmp_path / "two")]
    run_train([*argv, *other])
    second = load_checkpoint(tmp_path / "two/last.pt")["student"]
    assert first["guidance.vectors"].shape == (3, 8) and torch.equal(first["guidance.vectors"],
                                                                      second["guidance.vectors"])


def test_semi_supervised_needs_labels(small_run, capsys):
    for argv in (["--source", "none"], ["--target", "none", "--recipe", "source", "--labeled", "3"]):
        with pytest.raises(SystemExit) as caught:
            train.parse_flags(argv)
        assert caught.value.code == 2 and "--labeled" in capsys.readouterr().err.splitlines()[-1]
    done = run_train([*small_run, "--labeled", "2"], check=False)  # the target has none
    assert done.returncode == 1 and "has no labels" in done.stderr and "Traceback" not in done.stderr


def test_true_target_labels_join_the_supervised_loss_and_the_queries():
    flags = train.parse_flags(["--recipe", "t2sda", "--contrast-start", "0", "--no-augment-source", "--labeled", "2"])
    torch.manual_seed(0)
    student = Segmenter("mit_b0", "segformer", 3, 8, projection=True).eval()
    teacher = copy.deepcopy(student)
    networks = train.Networks(student, teacher, None, losses.ClassConfidence(3), None)
    source, target = step_inputs(2)
    source[1].copy_((torch.arange(64) // 32)[None, :, None].expand(2, 64, 64))
    labeled = torch.rand(2, 3, 64, 64, generator=generator()), source[1].flip(1)
    terms, views = train.step_terms(flags, context(generator()), networks, source, labeled, target, [])
    with torch.no_grad():
        logits = student(torch.cat([source[0], labeled[0]])).logits
        expected = losses.cross_entropy(logits, torch.cat([source[1], labeled[1]]))
    torch.testing.assert_close(terms["source"], expected)
    seen = []
    real = losses.t2s
    losses.t2s = lambda queries, *rest: (seen.append(len(queries)), real(queries, *rest))[1]
    try:
        train.step_terms(flags, context(generator()), networks, source, labeled, target, [])
    finally:
        losses.t2s = real
    assert seen == [4 * 8 * 8]  # cells of two restyled and of two labelled target images


def test_consistency_is_of_confident_pixels_that_stay_the_targets(monkeypatch):
    flags = train.parse_flags(["--recipe", "semidavil", "--confident", "0.5"])
    networks, (source, target) = unsure_networks(), step_inputs(2)
    source[1].copy_((torch.arange(64) // 32)[None, :, None].expand(2, 64, 64))
    target[1][:, :, :4] = 255  # padding
    seen, real = [], losses.consistency
    monkeypatch.setattr(losses, "consistency", lambda *a: (seen.append(a), real(*a))[1])
    monkeypatch.setattr(data, "strong_augment", lambda image, generator: image)
    terms, views = train.step_terms(flags, context(generator()), networks, source, None, target, [])
    with torch.no_grad():
        logits = networks.teacher(target[0]).logits
        confidence, label = F.interpolate(logits, (64, 64), mode="bilinear").softmax(1).max(1)
    (_, pseudo, trusted, valid), = seen
    assert torch.equal(pseudo, label.byte()) and 0.1 < trusted.float().mean() < 0.9
    clear = (confidence - 0.5).abs() > 1e-4  # not decided by rounding
    assert torch.equal(trusted[clear], (confidence >= 0.5)[clear])
    stays = (views["mixed"] == target[0]).all(1)
    assert 0.1 < stays.float().mean() < 0.9 and torch.equal(valid, stays & (target[1] != 255))


@pytest.mark.parametrize("recipe, passes", [("source", [4]), ("semidavil", [2, 2, 2])])
def test_with_a_teacher_labelled_target_images_have_a_pass_of_their_own(recipe, passes):
    flags = train.parse_flags(["--recipe", recipe, "--labeled", "2", "--no-augment-source"])
    net, seen = Segmenter("mit_b0", "segformer", 3, 8), []
    networks = train.Networks(net, model.teacher_mode(copy.deepcopy(net)), None, None, None)
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    source, target = step_inputs(2)
    labeled = torch.rand(2, 3, 64, 64, generator=generator()), source[1].flip(1)
    train.step_terms(flags, context(generator()), networks, source, labeled, target, [])
    assert [len(images) for images in seen] == passes
    assert torch.equal(torch.cat(seen)[:4], torch.cat([source[0], labeled[0]]))


def test_class_mix_pastes_from_the_source_and_from_the_labelled_target(monkeypatch):
    flags = train.parse_flags(["--recipe", "semidavil", "--labeled", "2"])
    net = Segmenter("mit_b0", "segformer", 3, 8)
    networks = train.Networks(net, model.teacher_mode(copy.deepcopy(net)), None, None, None)
    source, target = step_inputs(2)
    labeled = torch.rand(2, 3, 64, 64, generator=generator()), source[1].flip(1)
    monkeypatch.setattr(data, "strong_augment", lambda image, generator: image)
    origins = set()
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        _, views = train.step_terms(flags, context(g), networks, source, labeled, target, [])
        for i in range(2):
            found = [(views["mixed"][i] == domain[0][i]).all(0) for domain in (target, source, labeled)]
            assert sum(f.float().mean() for f in found) == 1 and not (found[1].any() and found[2].any())
            for name, (_, label), here in zip(("source", "labelled"), (source, labeled), found[1:]):
                if here.any():
                    origins.add(name)
                    assert torch.equal(views["mixed_label"][i][here], label[i][here])
    assert origins == {"source", "labelled"}


@pytest.mark.parametrize("name", ["resnet50_clip", "vit_base_patch32_clip_224"])
def test_vision_language_towers_train_and_evaluate_offline(name, small_run, tmp_path):
    argv = [*small_run, "--backbone", f"timm:{name}", "--steps", "2", "--batch", "2", "--init", "none"]
    done = run_train([*argv, "--recipe", "source"])
    assert "random weights" in done.stdout
    evaluation.main([str(tmp_path / "out/last.pt")])


@pytest.mark.parametrize("delayed", [False, True])
def test_gradient_that_is_not_finite_never_reaches_the_weights(delayed, tmp_path):
    """Delayed, as on a GPU, the fused optimiser skips the step and the error comes with the next one."""
    log = train.Log(tmp_path / "log.jsonl", 1, train.Clock(torch.device("cpu")), True)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    check = train.GradientCheck(optimizer, log, tmp_path / "last.pt", delayed)

    def step(number, gradient):
        weight.grad = torch.full((3,), gradient)
        check(number, torch.nn.utils.get_total_norm([weight.grad]), {"mix": torch.tensor(gradient)}, ["a.png"])
        optimizer.step()

    step(0, 1.0)
    after = weight.detach().clone()
    assert (after < 1).all()
    with pytest.raises(FloatingPointError, match="step 1.*mix nan.*a.png.*nothing was saved"):
        step(1, float("nan"))
        assert delayed and torch.equal(weight, after)
        step(2, 1.0)
    assert delayed or torch.equal(weight, after)
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 1
    step(3, 1.0)
    with pytest.raises(FloatingPointError, match="step 4"):
        step(4, float("inf"))
        check.flush()


@pytest.mark.parametrize("bf16", [True, False])
def test_dtype_is_measured_once(bf16, small_run, tmp_path, monkeypatch):
    argv = [*small_run, "--dtype", "auto", "--recipe", "lcmsm", "--text", "stub"]
    monkeypatch.setattr(train, "faster_dtype", lambda *a: (bf16, "told by the test"))
    done = run_train([*argv, "--stop-at", "2"])
    assert f"{'bf16' if bf16 else 'fp32'} (bf16: told by the test)" in done.stdout
    monkeypatch.setattr(train, "faster_dtype", None)
    run_train([*argv, "--stop-at", "3"])
    assert events(tmp_path / "out", "resume")[0]["flags"]["dtype"] == ("bf16" if bf16 else "fp32")
    other = run_train([*argv, "--stop-at", "4", "--dtype", "fp32" if bf16 else "bf16"], check=False)
    assert other.returncode and "--dtype was" in other.stderr


def test_measuring_the_dtype_changes_nothing():
    flags = train.parse_flags("--crop 32 --batch 2 --channels 8".split())
    net = Segmenter("mit_b0", "segformer", 3, 8)
    before = copy.deepcopy(net.state_dict())
    faster, why = train.faster_dtype(flags, net, torch.device("cpu"))
    assert re.fullmatch(r"\d+ ms a pass, \d+ in fp32", why) and isinstance(faster, bool)
    assert not model.differences(before, net.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_sliding_validation_is_remembered(small_run, tmp_path):
    run_train([*small_run, "--recipe", "source", "--steps", "3", "--slide"])
    slid, scores = events(tmp_path / "out", "result")[0]["student"]["iou"], []
    for more in ([], ["--no-slide"]):
        evaluation.main([str(tmp_path / "out/last.pt"), "--json", str(tmp_path / "scores.json"), *more])
        scores.append(json.loads((tmp_path / "scores.json").read_text())["iou"])
    assert scores[0] == slid and scores[1] != slid


def test_profile_prints_where_the_time_goes_and_leaves_nothing(small_run, tmp_path):
    done = run_train([*small_run, "--profile", "2", "--recipe", "cluda", "--mask", "1"])
    parts = ["EMA", "data", "source", "teacher", "mixed", "masked", "contrast", "backward", "optimiser", "step"]
    rows = done.stdout.split("share\n")[1].splitlines()
    table = dict(line.split()[:2] for line in rows[:len(parts)])
    assert list(table) == parts
    assert sum(float(table[part]) for part in parts[:-1]) == pytest.approx(float(table["step"]), abs=0.1)
    assert "images/s, peak memory" in done.stdout and not (tmp_path / "out").exists()
    run_train([*small_run, "--steps", "2"])
    for step in events(tmp_path / "out", "step"):
        assert {"data", "source", "teacher", "backward"} <= step["ms"].keys() and step["peak_mib"] > 100
        assert sum(step["ms"].values()) < 1.1e3 * 8 / step["images_per_s"]


@pytest.mark.parametrize("flags", ["", "--backbone timm:resnet10t --no-augment-source"])
def test_checkpointing_computes_the_same(flags, small_run, tmp_path):
    for name in ("plain", "--checkpointing"):
        argv = [*small_run, *flags.split(), *([name] if "-" in name else []), "--val", "none", "--crop", "64"]
        run_train([*argv, "--steps", "2", "--out", str(tmp_path / name)])
    a, b = (load_checkpoint(tmp_path / f"{name}/last.pt")["student"] for name in ("plain", "--checkpointing"))
    for name, value in a.items():
        if "running" not in name and "tracked" not in name:  # a BatchNorm inside a block sees its batch twice
            torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


def plain_cross_entropy(logits, label, weight=1.0):
    full = F.interpolate(logits.float(), label.shape[1:], mode="bilinear")
    value = F.cross_entropy(full, label.long(), ignore_index=255, reduction="none")
    return (value * (1.0 if weight is None else weight)).mean()


def plain_pseudo_label(logits, size, threshold=1.0):
    certainty, label = F.interpolate(logits.float(), size, mode="bilinear").softmax(1).max(1)
    return label.byte(), certainty, (certainty >= threshold).float().mean()


def test_kernels_and_bf16_do_not_change_what_is_learned(small_run, tmp_path, monkeypatch):
    flags = train.parse_flags("--fd 0 --threshold 0.05 --batch 2 --crop 128 --channels 64".split())
    device, (source, target) = torch.device("cpu"), step_inputs(2, 128, 19)

    def plain(wanted):
        monkeypatch.undo()
        if wanted:
            monkeypatch.setattr(train, "cross_entropy", plain_cross_entropy)
            monkeypatch.setattr(model, "upsample_pseudo_label", plain_pseudo_label)

    def first_step(dtype):
        networks = train.open_networks(flags, NAMES19, None, device)
        loaders = [(*source, [])], None, [(*target, [])]
        terms, _, _ = train.accumulate(flags, 1, networks, [x and iter(x) for x in loaders], [], (0, 1), dtype,
                                       train.Clock(device))
        return sum(terms.values()), torch.cat([p.grad.flatten() for p in networks.student.parameters()])

    plain(True)
    loss, gradient = first_step(None)
    plain(False)
    for dtype, limit in ((None, 1e-5), (torch.bfloat16, 2e-2)):
        ours, own_gradient = first_step(dtype)
        assert (ours - loss).abs() < limit * loss and (own_gradient - gradient).norm() < limit * gradient.norm()

    curves = {}
    for name in ("plain", "fp32", "bf16"):
        plain(name == "plain")
        run_train([*small_run, "--steps", "20", "--val", "none", "--dtype", "bf16" if name == "bf16" else "fp32",
                   "--out", str(tmp_path / name)])
        steps = events(tmp_path / name, "step")
        curves[name] = torch.tensor([step["source"] + step["mix"] + step["mask"] for step in steps])
    assert (curves["fp32"] - curves["plain"]).abs().max() < 2e-3 and len(curves["plain"]) == 20
    assert (curves["bf16"] - curves["plain"]).abs().max() < 0.1 < curves["plain"][0] - curves["plain"][-1]


def test_compiled_network_learns_the_same(small_run, tmp_path, monkeypatch):
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:  # no C++ compiler, no Python headers
        pytest.skip(f"torch.compile does not work here: {complaint(error)}")
    plain = model.SegFormerFusion((16, 32, 48, 96), 8).double()  # whose levels lost gradients, compiled whole
    pyramid, fusion = [torch.randn(2, c, 16 >> i, 16 >> i).double().contiguous(memory_format=torch.channels_last)
                       for i, c in enumerate((16, 32, 48, 96))], copy.deepcopy(plain)
    fusion.compile()
    for net in (plain, fusion):
        out = net([level.requires_grad_() for level in pyramid])
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
    torch.testing.assert_close([p.grad for p in fusion.parameters()], [p.grad for p in plain.parameters()])
    argv = [*small_run, "--backbone", "timm:test_resnet.r160_in1k", "--steps", "3", "--val", "none", "--crop", "64"]
    for name in ("plain", "--compile"):
        run_train([*argv, "--out", str(tmp_path / name), *([name] if "--" in name else [])])
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["student"] for name in ("plain", "--compile"))
    assert list(a) == list(b)  # the raw module is saved
    for straight, compiled in zip(*(events(tmp_path / name, "step") for name in ("plain", "--compile"))):
        for term in ("source", "mix", "mask", "grad_norm"):  # not the weights: AdamW blows up rounding
            assert compiled[term] == pytest.approx(straight[term], rel=1e-3, abs=1e-3)


def test_default_command_on_the_rendered_streets(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "STREETS", {kind: {split: indices[:4] for split, indices in splits.items()}
                                          for kind, splits in data.STREETS.items()})
    places = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = run_train(["--steps", "2", "--batch", "2", *places])
    assert "student mIoU" in done.stdout
    assert len(list((tmp_path / "out/panels").glob("*.png"))) == 1


def test_runs_without_triton_and_open_clip(small_run, tmp_path):
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import sys\nsys.modules['triton'] = None\nsys.modules['open_clip'] = None\n"
                       "import socket\ndef refuse(*a, **k): raise OSError('no network')\n"
                       "socket.socket.connect = refuse\n")
    run_train([*small_run, "--steps", "1"], PYTHONPATH=str(tmp_path), TRITON_INTERPRET="0")
    help_text = run_train(["--help"], PYTHONPATH=str(tmp_path)).stdout
    assert "--recipe" in help_text


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
        return z, losses.cross_entropy(z, byte) if training else model.upsample_pseudo_label(z, size, 0.0)[0]

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
    """A whole step of recipe mic, except that its images stay the same; no peer has one, so one pass is beside it."""
    f, device = train.parse_flags(["--fd", "0", "--batch", "2", "--crop", str(side)]), torch.device(DEVICE)
    networks = train.open_networks(f, data.CLASS_SPACES["cityscapes19"], None, device)
    optimizer = torch.optim.AdamW(train.parameter_groups(networks.student, f.lr, f.head_lr), fused=True)
    source, target = (itertools.repeat([*(t.to(device) for t in domain), []]) for domain in step_inputs(2, side, 19))
    _, theirs = b0_passes("training", 2, side, side)

    def step(dtype):
        model.ema_update(networks.teacher, networks.student, 1000, f.alpha)
        terms, _, _ = train.accumulate(
            f, 1000, networks, (source, None, target), [], (0, 1), dtype, train.Clock(device))
        torch.nn.utils.get_total_norm([p.grad for p in networks.student.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tuple(terms.values())

    for dtype in (None, torch.bfloat16):
        yield compare(f"UDA step, MiT-B0 + SegFormer head, {side} x {side} {dtype or torch.float32}; it holds EMA, "
                      "teacher, three passes, AdamW: 0.33 would be the time of three of the peer's passes",
                      [("ours, whole step, 2 + 2 images", lambda: lambda: step(dtype), None),
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
