"""The tests: python -m pytest -q test_all.py. On a CPU, without network, in a few minutes.

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
import io
import json
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

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
    refused(lambda: listed("c.png m.png\nd.png\n"), path, "all or none")
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
    assert data.block_mask(1, (5, 5), 32, 2.0, generator()).sum() == 0


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


def test_pixel_nce_refuses_wrong_input_in_one_line():
    q, k, yq, yk, wq, wk, _ = (x.cpu() for x in nce_inputs(20, 16, 8))
    for message, arguments, options in (
            ("must be", (q[:, 1:], k, yq, yk), {}), ("must be", (q[0], k, yq, yk), {}),
            ("yq is", (q, k, yq[1:], yk), {}), ("yk is", (q, k, yq, yk[:, None]), {}),
            ("yk is", (q, k, yq, yk.float()), {}), ("yq is", (q, k, yq == 1, yk), {}),
            ("wq is", (q, k, yq, yk, wq[1:]), {}), ("wk is", (q, k, yq, yk, wq, wk[None]), {}),
            ("label 256", (q, k, yq + 1, yk), {}), ("label -1", (q, k, yq, yk - yk - 1), {}),
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

    language = None

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


def made_log(folder, recipe, seed, student, teacher, adabn, step=20, finished=True):
    """A run directory with a log of the given mIoUs (None where a read-out is missing)."""
    def scored(value):
        return None if value is None else {"miou": value, "iou": {"a": value + 10, "b": value - 10, "c": None}}
    events = [{"event": "start", "flags": {"recipe": recipe, "seed": seed, "source": "s", "target": "t", "val": "t",
                                           "steps": step}},
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
    (tmp_path / "text").write_text("no log\n\xff")
    for bad, words in ((made_log(tmp_path / "again", "mic", 0, 1, 1, 1), "second run of mic with seed 0"),
                       (made_log(tmp_path / "long", "mic", 1, 1, 1, 1, step=30), "steps 30 instead of 20"),
                       (made_log(tmp_path / "killed", "mic", 2, 1, 1, 1, finished=False), "no result event"),
                       (tmp_path / "text", "no start event")):
        with pytest.raises(DataError, match=words) as error:
            evaluation.table([one, bad])
        assert str(bad) in str(error.value) and "\n" not in str(error.value)


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
           ["--stop-at", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--mask-ratio", "2"], ["--seed", "-1"]]
    for argv in bad:
        with pytest.raises(SystemExit) as caught:
            train.parse_flags(argv)
        assert caught.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]


def step_inputs(batch, size=64, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (batch, size, size), generator=g).byte()
    label[:, :9] = 255
    images = torch.rand(2, batch, 3, size, size, generator=g)
    return (images[0], label), (images[1], torch.zeros_like(label))


def test_one_pseudo_label_weight_for_the_batch_and_border_rows_without(monkeypatch):
    flags = train.parse_flags(["--recipe", "mic", "--border", "5", "7", "--threshold", "0.4"])
    torch.manual_seed(0)
    net = Segmenter("mit_b0", "segformer", 3, 8)
    with torch.no_grad():
        net.decoder.classifier.weight.normal_(std=1.0)
    teacher = model.teacher_mode(copy.deepcopy(net).requires_grad_(False))
    source, target = step_inputs(2)
    target[1][:, :, :4] = 255  # padding, where a pseudo-label would be an invention
    seen = []
    real = train.cross_entropy
    monkeypatch.setattr(train, "cross_entropy", lambda *a: (seen.append(a), real(*a))[1])
    terms, views = train.step_terms(flags, net, teacher, None, source, target, [], torch.Generator(), (0, 1))
    assert list(terms) == ["source", "mix", "mask"]
    with torch.no_grad():
        confidence = F.interpolate(teacher(target[0]).logits, size=(64, 64), mode="bilinear").softmax(1).amax(1)
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
        terms, views = train.step_terms(flags, net, teacher, imagenet, (image, label), target, [1], generator, (0, 1))
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
            *"--crop 32 --batch 2 --channels 8 --steps 6 --log-every 1 --panel-every 100".split(),
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
terms, _ = train.step_terms(flags, student, teacher, imagenet, (image[part], label[part]),
                            (target[part], padding[part]), [1, 2], generator, (rank, world))
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
    faults = {"order": (path, bank.names[::-1]), "number": (path, bank.names[:2]),
              "absent": (str(tmp_path / "no.npz"), ("a",)),
              "length": (write_bank(tmp_path / "l.npz", bank, emb=2 * bank.embeddings.numpy()), bank.names),
              "nan": (write_bank(tmp_path / "n.npz", bank, emb=np.full((3, 4), np.nan, np.float32)), bank.names),
              "hash": (write_bank(tmp_path / "h.npz", bank, sha256="0", templates=np.array(["{}"]), model="m",
                                  pretrained="p"), bank.names),
              "spec": ("moon", bank.names), "random tower": ("clip:ViT-B-32/", bank.names)}
    for spec, names in faults.values():
        with pytest.raises(TextError) as caught:
            text_bank(spec, names)
        assert "\n" not in str(caught.value) and spec.split(":")[-1] in str(caught.value)


def test_openclip_encodes_prompts_once(tmp_path, monkeypatch):
    """A tower with random weights stands in for one with real ones, as a local file; the cut context must be exact."""
    open_clip = model.import_optional("open_clip")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}})
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


def test_openclip_without_network_fails_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begin = time.time()
    with pytest.raises(TextError, match="no weights.*FILE.npz"):
        text_bank("clip:ViT-B-32/no_such_tag", ("road",))
    assert time.time() - begin < 30


def test_text_command(tmp_path, capsys):
    path = write_bank(tmp_path / "bank.npz", made_bank())
    model.main(["text", "--names", "class 0,class 1,class 2", "--text", path, "--out", str(tmp_path / "copy.npz")])
    out = capsys.readouterr().out
    assert "raw: cosine" in out and "centred: cosine" in out
    assert text_bank(str(tmp_path / "copy.npz"), made_bank().names).kind == "clip"
    with pytest.raises(SystemExit) as leave:
        model.main(["text", "--names", "a,b", "--text", path])
    assert leave.value.code == 2 and "bank.npz" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["FILE", "shuffled", "learned", "none", "auto"])
def test_lcmsm_trains_and_evaluates_with_every_head(text, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bank = made_bank()._replace(names=("sky", "wall", "car"))
    path = write_bank(tmp_path / "bank.npz", bank)
    # blocks of 4: a crop that is hidden as a whole leaves a new network only zeros, whose LayerNorms explode backwards
    argv = [*small_run, "--recipe", "lcmsm", "--steps", "3", "--mask-block", "4", "--text"]
    argv.append({"FILE": path, "shuffled": "shuffled:" + path}.get(text, text))
    done = run_train([*argv, "--stop-at", "2"])
    assert ("STUB" in done.stderr) == (text == "auto")
    run_train(argv)
    step = events(tmp_path / "out", "step")[-1]
    assert {"source", "mix", "mask_source", "mask_mix"} <= step.keys() and "mask" not in step
    (tmp_path / "bank.npz").unlink()  # the checkpoint holds what evaluation needs
    for head in ("plain", "language", "mean"):
        scores = tmp_path / f"{head}.json"
        evaluation.main([str(tmp_path / "out/last.pt"), "--head", head, "--json", str(scores)])
        if head == "plain":
            assert json.loads(scores.read_text())["iou"] == events(tmp_path / "out", "result")[0]["student"]["iou"]


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
