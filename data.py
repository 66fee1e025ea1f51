"""Datasets: official files on disk -> lists of paths, labels, boxes, parts; photos -> uint8 tensors; and toy birds that need no files.

Order: splits -> photos to tensors -> batches -> folders and ImageNet -> the papers' datasets -> re-identification -> toy birds.
`python data.py [FILE]` draws a contact sheet of the toy birds.

Every random choice is a function of its key: a training photo of (seed, epoch, index), an epoch's order of (seed, epoch), a bird of
(preset, split, index), a validation cut of the file names. So runs resume exactly, with any number of workers or processes.
"""
import colorsys
import csv
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
import tarfile
import urllib.request
import warnings
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torchvision.datasets import Flowers102
from torchvision.models import ResNet50_Weights
from torchvision.transforms.v2 import functional as TF

Image.MAX_IMAGE_PIXELS = 2**29  # fMoW has photos past Pillow's default limit of 89 million pixels

# ------------------------------------------------------------------------------------------------ splits


@dataclass
class Split:
    """One split as parallel lists; what a dataset does not have is None.

    Boxes are xyxy, half-open, in pixels of the photo on disk, and may reach over its edge.
    """

    paths: list  # str of a file; for the toy "birds/train/17"
    labels: list  # int class (re-identification: identity) per image
    boxes: np.ndarray | None = None  # (n, 4) float32 object boxes
    parts: np.ndarray | None = None  # (n, P, 4) float32 part boxes; a part that is not visible is nan
    part_names: tuple = ()  # P names
    signature: tuple = ()  # P bools: does this part carry the class (toy: yes or decoy; CUB: all yes)
    cameras: list | None = None  # re-identification: int camera per image
    query: list | None = None  # re-identification test: True for queries, False for the gallery
    images: list | None = None  # toy: the drawn images (H, W, 3) uint8; else photos are opened from paths
    banner: int = 0  # pixels to cut off the bottom of each photo (Aircraft's copyright line)
    context: bool = False  # recipe.boxes: crop the boxes with fMoW's margin around them
    upright: bool = False  # turn photos as their EXIF orientation says: own photos yes, the benchmarks no (as the papers' code; their boxes are of the pixels as stored)

    def __len__(self):
        return len(self.paths)

    def take(self, indices):
        """The images of `indices`, in that order, as a new Split."""
        def pick(value):
            return value[indices] if isinstance(value, np.ndarray) else [value[i] for i in indices] if isinstance(value, list) else value

        return Split(**{f.name: pick(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass
class Splits:
    """train, test and optionally val, and the class names in label order."""

    train: Split
    test: Split
    classes: list
    val: Split | None = None
    note: str = ""  # printed before training: counts and version


def load(name, root, recipe):
    """Dataset `name` from the folder `root` -> Splits; recipe.val_fraction cuts the validation split out of train.

    Raises ValueError or FileNotFoundError that says what was given, what is allowed and what to do next.
    """
    if name not in DATASETS:
        raise ValueError(f"--data {name}: no such dataset; choose one of {', '.join(DATASETS)}; for own photos use --data folder")
    test_view((1, 1), recipe)  # refuses sizes that do not fit
    if name != "toy":
        if root is None:
            raise ValueError(f"--data {name} needs a folder; add --root DIR (the unpacked dataset), or try --data toy, which needs none")
        if not Path(root).exists():
            raise FileNotFoundError(f"--root {root}: no such folder; give the folder that holds the unpacked {name} dataset")
        if not Path(root).is_dir():
            raise ValueError(f"--root {root}: is a file; give the folder that holds the unpacked {name} dataset")
        root = Path(root)
    splits = DATASETS[name](root, recipe)
    if name in PUBLISHED:
        check(name, splits, recipe)
    notes = [splits.note] if splits.note else []
    if splits.test is None:  # own photos without a test folder
        if not recipe.val_fraction:
            raise ValueError(f"--root {root}: no test or val folder; put the photos into DIR/train/CLASS/ and DIR/test/CLASS/, or add --val-fraction 0.2 to test on a fifth of them")
        splits.train, splits.test = cut(splits.train, recipe.val_fraction)
        notes.append("the test images were cut from train")
    elif recipe.val_fraction:
        if splits.val is not None or splits.test.query is not None:
            raise ValueError(f"--val-fraction {recipe.val_fraction}: {name} has its own validation or query images; leave --val-fraction out")
        splits.train, splits.val = cut(splits.train, recipe.val_fraction)
    val, kind = f" {len(splits.val):,} val," if splits.val else "", "classes" if splits.test.query is None else "training identities"
    splits.note = "; ".join([f"{len(splits.train):,} train,{val} {len(splits.test):,} test images of {len(splits.classes)} {kind}"] + notes)
    return splits


def cut(split, fraction):
    """Cut `fraction` of each class -> (rest, cut). By the hashes of the file names: the same on every machine, and stable when files are added."""
    of_class = {}
    for i, label in enumerate(split.labels):
        of_class.setdefault(label, []).append(i)
    held = set()
    for members in of_class.values():
        members.sort(key=lambda i: hashlib.sha256(os.path.basename(split.paths[i]).encode()).digest())
        held.update(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])  # at least one on each side; a single image stays
    return split.take([i for i in range(len(split)) if i not in held]), split.take(sorted(held))


# ------------------------------------------------------------------------------------------------ photos to tensors

FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
NOISE = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3)}  # mean, std of the normalised space
ORDER, ITEM = 1, 2  # first word of a random stream: what it is for


def open_photo(path, draft=None, upright=True):
    """Photo of any kind -> PIL RGB: gray, CMYK, palette, 16 bit, transparency over white, whatever the file's extension says.

    draft (width, height): a JPEG may be decoded at 1/2, 1/4 or 1/8, as long as both sides stay at least this long.
    upright turns the photo as its EXIF orientation says. Raises ValueError naming a file that cannot be read.
    """
    image, _ = _try(path, _header, upright)
    return _try(path, _decode, image, draft, upright)


def _try(path, action, *args):
    try:
        return action(path, *args)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such photo; the dataset is incomplete: unpack it again") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise ValueError(f"{path}: cannot be read as a photo ({str(error) or type(error).__name__}); replace or remove the file") from None


def _orientation(image, upright):
    """EXIF orientation 1 (as stored) to 8; 5 to 8 are quarter turns, where width and height change places."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) if upright else 1
    except Exception:  # a damaged EXIF block says nothing about the photo
        return 1


def _header(path, upright):
    """Open without decoding -> PIL image and its size (h, w) as it will be once decoded."""
    image = Image.open(path)
    return image, image.size if _orientation(image, upright) in (5, 6, 7, 8) else image.size[::-1]


def _decode(path, image, draft, upright):
    with image:
        orientation = _orientation(image, upright)
        if draft:
            image.draft("RGB", draft[::-1] if orientation in (5, 6, 7, 8) else draft)
        if orientation != 1:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bit; Pillow's own conversion would clip it to white
            image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
        return image


def object_region(box, size, context=False):
    """Box clipped to a photo of size (h, w), for recipe.boxes; `context` first adds fMoW's margin, which grows as the box gets small."""
    edges = []
    for low, high, side in ((box[0], box[2], size[1]), (box[1], box[3], size[0])):
        share = (high - low) / side
        margin = next(m for least, m in ((0.5, 0.15), (0.4, 0.2), (0.3, 0.3), (0.2, 0.5), (0.1, 1.0), (-math.inf, 2.0)) if share >= least)
        grow = (high - low) * margin / 2 if context else 0.0
        edges.append((max(0.0, float(low - grow)), min(float(side), float(high + grow))))
    (x1, x2), (y1, y2) = edges
    if not (x2 - x1 >= 1 and y2 - y1 >= 1):
        raise ValueError(f"object box {[round(float(v), 1) for v in box]} is outside its photo of {size[1]} x {size[0]} pixels; correct the box or train with --no-boxes")
    return x1, y1, x2, y2


# A view is (region, scaled, place): the region xyxy of the photo is resized to `scaled` (h, w) pixels, of which the input, image_size
# large, begins at `place` (top, left). Only the pixels of the input are ever computed.


def test_view(size, recipe, region=None):
    """The test transform of a photo of size (h, w): resize to recipe.resize, centre crop of image_size -> view."""
    (H, W), scaled = recipe.image_size, recipe.resize if any(recipe.resize) else recipe.image_size
    if scaled[0] < H or scaled[1] < W:
        raise ValueError(f"--resize {scaled[0]},{scaled[1]} is smaller than --image-size {H},{W}; give at least {H},{W}, or 0,0")
    return region or (0, 0, size[1], size[0]), tuple(scaled), (round((scaled[0] - H) / 2), round((scaled[1] - W) / 2))


def train_view(size, recipe, rng, region=None):
    """A random view as recipe.crop says."""
    region, scaled, place = test_view(size, recipe, region)
    if recipe.crop == "random":
        place = tuple(int(rng.integers(-recipe.pad, s + recipe.pad - o + 1)) for s, o in zip(scaled, recipe.image_size))
    if recipe.crop == "resized":
        region, scaled, place = random_region(region, recipe, rng), tuple(recipe.image_size), (0, 0)
    return region, scaled, place


def random_region(region, recipe, rng):
    """Random area and aspect inside `region`; after ten misses the largest centred one of an allowed aspect (as torchvision)."""
    x1, y1, w, h = region[0], region[1], region[2] - region[0], region[3] - region[1]
    least, most = recipe.crop_ratio
    for _ in range(10):
        area, ratio = w * h * rng.uniform(*recipe.crop_area), math.exp(rng.uniform(math.log(least), math.log(most)))
        cw, ch = math.sqrt(area * ratio), math.sqrt(area / ratio)
        u, v = rng.random(2)
        if cw <= w and ch <= h:
            break
    else:
        ratio, u, v = min(max(w / h, least), most), 0.5, 0.5
        cw, ch = min(w, h * ratio), min(h, w / ratio)
    x1, y1 = x1 + u * (w - cw), y1 + v * (h - ch)
    return x1, y1, x1 + cw, y1 + ch


def cut_view(image, size, view, recipe, resample):
    """Pixels of a view of the photo of size (h, w), which `image` holds, perhaps drafted smaller -> PIL image of image_size."""
    (x1, y1, x2, y2), (sh, sw), (top, left), (H, W) = *view, recipe.image_size
    t, l, b, r = max(top, 0), max(left, 0), min(top + H, sh), min(left + W, sw)  # what of the input is photo, not border
    kx, ky = image.width / size[1], image.height / size[0]
    ux, uy = (x2 - x1) / sw, (y2 - y1) / sh  # pixels of the photo in one of the scaled photo
    box = ((x1 + l * ux) * kx, (y1 + t * uy) * ky, min((x1 + r * ux) * kx, image.width), min((y1 + b * uy) * ky, image.height))
    piece = image.resize((r - l, b - t), resample, box)
    if piece.size == (W, H):
        return piece
    page = Image.new("RGB", (W, H))
    page.paste(piece, (l - left, t - top))
    return page


def draft_size(size, view):
    """(width, height) that a photo of size (h, w) needs to have for the view not to be enlarged."""
    (x1, y1, x2, y2), (sh, sw), _ = view
    return math.ceil(size[1] * sw / (x2 - x1) - 1e-6), math.ceil(size[0] * sh / (y2 - y1) - 1e-6)


def to_tensor(image):
    """PIL RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))  # the fastest of six ways tried


def prepare(image, recipe, region=None):
    """Test transform of a PIL image, or of its region xyxy -> uint8 (3, H, W)."""
    size = image.size[::-1]
    resample = FILTERS.get(recipe.interpolation, Image.Resampling.BILINEAR)
    return to_tensor(cut_view(image, size, test_view(size, recipe, region), recipe, resample))


def to_input(boxes, size, recipe, region=None):
    """Boxes (..., 4) xyxy in pixels of a photo of size (h, w) -> in pixels of its test-time input (they may lie outside it)."""
    (x1, y1, x2, y2), (sh, sw), (top, left) = test_view(tuple(int(v) for v in size), recipe, region)
    scale = np.array([sw / (x2 - x1), sh / (y2 - y1)] * 2)
    return (np.asarray(boxes, np.float64) - (x1, y1, x1, y1)) * scale - (left, top, left, top)


def augment(image, recipe, rng):
    """Mirror; rotation, shift and zoom; colour jitter in random order: PIL -> PIL, each as the recipe says."""
    if rng.random() < recipe.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    moves = recipe.rotate or recipe.translate or tuple(recipe.zoom) != (1.0, 1.0)
    if moves and rng.random() < recipe.affine_prob:
        angle, zoom = rng.uniform(-recipe.rotate, recipe.rotate), rng.uniform(*recipe.zoom)
        shift = [round(rng.uniform(-recipe.translate, recipe.translate) * side) for side in image.size]
        image = TF.affine(image, angle, shift, zoom, [0.0, 0.0], interpolation=TF.InterpolationMode.BILINEAR)
    steps = [(TF.adjust_brightness, recipe.brightness, 1), (TF.adjust_contrast, recipe.contrast, 1), (TF.adjust_saturation, recipe.saturation, 1), (TF.adjust_hue, recipe.hue, 0)]
    steps = [step for step in steps if step[1]]
    if steps and rng.random() < recipe.jitter_prob:
        for k in rng.permutation(len(steps)):
            adjust, strength, middle = steps[k]
            image = adjust(image, max(rng.uniform(middle - strength, middle + strength), middle - 1.0))
    return image


def erase(pixels, normalize, rng):
    """Fill a random rectangle (2 to 33 % of the area, aspect 0.3 to 3.3) of uint8 (3, H, W), in place, with noise that is N(0, 1) once normalised."""
    _, H, W = pixels.shape
    for _ in range(10):
        area, ratio = H * W * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < H and 0 < w < W:
            top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
            mean, std = (np.array(v, np.float32).reshape(3, 1, 1) * 255 for v in NOISE[normalize])
            noise = mean + std * rng.standard_normal((3, h, w), np.float32)
            pixels[:, top : top + h, left : left + w] = torch.from_numpy(noise.round().clip(0, 255).astype(np.uint8))
            return


class Photos(torch.utils.data.Dataset):
    """A split as tensors: item -> (uint8 image (3, H, W), label, index, size (h, w) of the photo).

    In training the key is (epoch, index), as EpochBatches gives it, and every random choice comes from (seed, epoch, index);
    for testing the key is the index.
    """

    def __init__(self, split, recipe, train, seed=0):
        test_view((1, 1), recipe)  # refuses sizes that do not fit
        self.split, self.recipe, self.train, self.seed = split, recipe, train, seed
        if recipe.boxes and split.boxes is None:
            raise ValueError("--boxes: this dataset has no object boxes; leave --boxes out")

    def __len__(self):
        return len(self.split)

    def region(self, index, size):
        """The part of a photo of size (h, w) that the input shows: its object box with recipe.boxes, else all of it (None) but the banner."""
        h, w = int(size[0]) - self.split.banner, int(size[1])
        if self.recipe.boxes:
            return object_region(self.split.boxes[index], (h, w), self.split.context)
        return (0, 0, w, h) if self.split.banner else None

    def __getitem__(self, key):
        split, recipe = self.split, self.recipe
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([ITEM, self.seed, epoch, index]) if self.train else None
        if split.images is not None:
            image = Image.fromarray(split.images[index])
            size = image.size[::-1]
        else:
            image, size = _try(split.paths[index], _header, split.upright)
        region = self.region(index, size)
        view = train_view(size, recipe, rng, region) if self.train else test_view(size, recipe, region)
        if split.images is None:
            image = _try(split.paths[index], _decode, image, draft_size(size, view), split.upright)
        if self.train and recipe.interpolation == "random":
            resample = Image.Resampling(rng.integers(6))  # nearest, lanczos, bilinear, bicubic, box, hamming; newer Pillows have more
        else:
            resample = FILTERS.get(recipe.interpolation, Image.Resampling.BILINEAR)
        image = cut_view(image, size, view, recipe, resample)
        pixels = to_tensor(augment(image, recipe, rng) if self.train else image)
        if self.train and rng.random() < recipe.erasing:
            erase(pixels, recipe.normalize, rng)
        return pixels, split.labels[index], index, torch.tensor(size)


# ------------------------------------------------------------------------------------------------ batches


class EpochBatches:
    """Batch sampler: this rank's lists of keys (epoch, index) of one epoch, beginning at global batch number `start`.

    The epoch is a permutation of range(n) given by (seed, epoch), in global batches of batch_size; a last short one is dropped, unless
    it is the only one. Each rank takes its slice of every global batch, so the batches are the same on any number of ranks.
    """

    def __init__(self, n, batch_size, epoch, seed, rank=0, world=1, start=0):
        if n < world or batch_size < 1 or batch_size % world:
            raise ValueError(f"--batch-size {batch_size} cannot be split over {world} processes with {n} training images; give a multiple of {world} and at least {world} images")
        self.n, self.batch_size, self.epoch, self.seed, self.rank, self.world, self.start = n, min(n, batch_size), epoch, seed, rank, world, start

    def __len__(self):
        return max(0, self.n // self.batch_size - self.start)

    def __iter__(self):
        order = np.random.default_rng([ORDER, self.seed, self.epoch]).permutation(self.n).tolist()
        low, high = (self.batch_size * r // self.world for r in (self.rank, self.rank + 1))
        for first in range(self.start * self.batch_size, self.n - self.batch_size + 1, self.batch_size):
            yield [(self.epoch, i) for i in order[first + low : first + high]]


# ------------------------------------------------------------------------------------------------ folders and ImageNet


@functools.cache
def photo_extensions():
    """Lower-case extensions of the formats that Pillow can decode (not those it only recognises)."""
    Image.preinit()  # the usual formats first: Image.open tries them in order of registration
    Image.init()
    return frozenset(e for e, f in Image.registered_extensions().items() if f in Image.OPEN and f not in ("BUFR", "GRIB", "HDF5", "MPEG", "WMF"))


def photos_in(folder):
    """Sorted paths of the photos in a folder and its subfolders; hidden files are left out."""
    found = []
    for where, _, names in os.walk(folder, followlinks=True):
        found += [f"{where}/{n}" for n in names if os.path.splitext(n)[1].lower() in photo_extensions() and not n.startswith(".")]
    return sorted(found)


def folders_in(folder):
    """Folders inside a folder, by name, without hidden ones."""
    return sorted((d for d in Path(folder).iterdir() if d.is_dir() and not d.name.startswith(".")), key=lambda d: d.name)


def class_folders(folder, classes=None):
    """A folder with one folder of photos for each class -> (Split, class names); `classes` of train fixes the labels."""
    folders = folders_in(folder)
    if not folders:
        raise ValueError(f"{folder} holds no class folders; put the photos of each class into a folder of their own: {folder}/CLASS/photo.jpg")
    own = [d.name for d in folders]
    unknown = sorted(set(own) - set(classes or own))
    if unknown:
        raise ValueError(f"{folder} has {len(unknown)} classes that train has not: {', '.join(unknown[:5])}; rename or remove these folders")
    classes = classes or own
    if len(classes) < 2:
        raise ValueError(f"{folder} has one class folder only, {own[0]}; at least two classes are needed: {folder}/CLASS/photo.jpg")
    label, paths, labels = {name: i for i, name in enumerate(classes)}, [], []
    for d in folders:
        found = photos_in(d)
        if not found:
            raise ValueError(f"{d} holds no photos (files that Pillow reads, as .jpg .png .webp); add some or remove the folder")
        paths += found
        labels += [label[d.name]] * len(found)
    return Split(paths, labels), classes


def load_folder(root, recipe):
    """DIR/train and DIR/test (or val), each with a folder for each class; without a test folder, `load` cuts the test images out by val_fraction."""
    named = {d.name.lower(): d for d in folders_in(root)}
    at = [named[n] for n in ("test", "testing", "val", "valid", "validation") if n in named]
    train_at = next((named[n] for n in ("train", "training") if n in named), None)
    if at and not train_at:
        raise ValueError(f"{root} has {at[0].name} and no train; put the training photos into {root}/train/CLASS/")
    train, classes = class_folders(train_at or root)
    test, val = ([class_folders(d, classes)[0] for d in at] + [None, None])[:2]
    for split in (train, test, val):
        if split is not None:
            split.upright = True
    return Splits(train, test, classes, val, "; ".join(f"{role} is {d}" for role, d in zip(("test", "val"), at)))


def load_imagenet(root, recipe):
    """ILSVRC2012: train and val, each with a folder for each wnid; or Kaggle's, where val is flat and LOC_val_solution.csv has its labels."""
    base = next((b for b in (root, root / "ILSVRC/Data/CLS-LOC", root / "Data/CLS-LOC") if (b / "train").is_dir() and (b / "val").is_dir()), None)
    if base is None:
        raise FileNotFoundError(f"--root {root}: neither train and val nor ILSVRC/Data/CLS-LOC is there; unpack ILSVRC2012_img_train.tar and "
                                "ILSVRC2012_img_val.tar (image-net.org, by registration) into train/WNID/ and val/WNID/")
    beside = lambda name: next((d / name for d in (base, *base.parents[:3]) if (d / name).is_file()), None)
    train, wnids = class_folders(base / "train")
    if folders_in(base / "val"):
        test, _ = class_folders(base / "val", wnids)
    else:
        table = beside("LOC_val_solution.csv")
        if table is None:
            raise FileNotFoundError(f"{base / 'val'} has no class folders and LOC_val_solution.csv is not there; put Kaggle's file into {base}, or sort the photos into val/WNID/")
        wnid = {row[0]: row[1].split()[0] for row in csv.reader(table.read_text().splitlines()) if row and row[0] != "ImageId"}
        label, paths = {w: i for i, w in enumerate(wnids)}, photos_in(base / "val")
        missing = [p for p in paths if wnid.get(Path(p).stem) not in label]
        if missing or not paths:
            raise ValueError(f"{missing[0] if missing else base / 'val'}: no label in {table} of a class in train; use the validation photos and the table of one release")
        test = Split(paths, [label[wnid[Path(p).stem]] for p in paths])
    names, mapping = {}, beside("LOC_synset_mapping.txt")
    if len(wnids) == 1000:
        names = dict(zip(wnids, ResNet50_Weights.DEFAULT.meta["categories"]))  # in the order of the sorted wnids
    elif mapping:
        names = {line.split()[0]: line.split(maxsplit=1)[1].split(",")[0].strip() for line in mapping.read_text().splitlines() if " " in line.strip()}
    return Splits(train, test, [names.get(w, w) for w in wnids])


# ------------------------------------------------------------------------------------------------ the papers' datasets

AGAIN = "unpack the official archive again"  # the advice when a file of a dataset is damaged


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from. Its folder may be --root itself or a `folder` in it, and holds one of the `layouts`."""

    page: str  # who gives it
    folders: tuple  # names of the official folder
    layouts: tuple  # alternatives; each the files and folders that must be there
    archives: tuple = ()  # (file, bytes or 0, md5 or sha256 or "", URL of the official host or "")
    into: str = ""  # the folder in --root into which the archives unpack


CALTECH, OXFORD = "https://data.caltech.edu/records/65de6-vp158", "https://www.robots.ox.ac.uk/~vgg/data"
STANFORD = "http://vision.stanford.edu/aditya86/ImageNetDogs"
BIRD_FILES = ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "bounding_boxes.txt")
VARIANTS = tuple(f"images_variant_{side}.txt" for side in ("train", "val", "trainval", "test"))
PERSON_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
SOURCES = {
    "cub": Source(CALTECH, ("CUB_200_2011",), (BIRD_FILES,), (
        ("CUB_200_2011.tgz", 1150585339, "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081", f"{CALTECH}/files/CUB_200_2011.tgz"),)),
    "cars": Source("a mirror (the official pages are gone since 2023, see pytorch/vision#7545)", ("stanford_cars",),
        (("devkit", "cars_train", "cars_test"), ("cars_annos.mat", "car_ims"), ("cars_train", "cars_test"), ("train", "test")), (
        ("cars_train.tgz", 979269282, "065e5b463ae28d29e77c1b4b166cfe61", ""),
        ("cars_test.tgz", 977350468, "4ce7ebf6a94d07f1952d94dd34c4d501", ""),
        ("car_devkit.tgz", 330960, "c3b158d763b6e2245038c8ad08e45376", ""),
        ("cars_test_annos_withlabels.mat", 185758, "b0a2b23655a3edd16d84508592a98d10", "")), "stanford_cars"),
    "aircraft": Source(f"{OXFORD}/fgvc-aircraft", ("fgvc-aircraft-2013b/data", "data"), (("images", "variants.txt", "images_box.txt", *VARIANTS),), (
        ("fgvc-aircraft-2013b.tar.gz", 0, "d5f68b1b81d6d7831eb9d5c5517074176b5dfbce6bcb43dc14ed1c66a87b8d75",
         f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"),)),
    "flowers": Source(f"{OXFORD}/flowers/102", ("flowers-102",), (("jpg", "imagelabels.mat", "setid.mat"),), (
        ("102flowers.tgz", 344862509, "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246", f"{OXFORD}/flowers/102/102flowers.tgz"),
        ("imagelabels.mat", 502, "e0620be6f572b9609742df49c70aed4d", f"{OXFORD}/flowers/102/imagelabels.mat"),
        ("setid.mat", 14989, "a5357ecc9cb78c4bef273ce3793fc85c", f"{OXFORD}/flowers/102/setid.mat")), "flowers-102"),
    "dogs": Source(STANFORD, ("ImageNetDogs",), (("Images", "train_list.mat", "test_list.mat"), ("Images", "train_list.txt", "test_list.txt")), (
        ("images.tar", 793579520, "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58", f"{STANFORD}/images.tar"),
        ("annotation.tar", 21852160, "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd", f"{STANFORD}/annotation.tar"),
        ("lists.tar", 481280, "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c", f"{STANFORD}/lists.tar")), "ImageNetDogs"),
    "nabirds": Source("https://dl.allaboutbirds.org/nabirds (a form to agree to)", ("nabirds", "nabirds/nabirds"), (BIRD_FILES,), (
        ("nabirds.tar.gz", 0, "df21a9e4db349a14e2b08adfd45873bd", ""),)),
    "plant": Source("Kaggle: plant-pathology-2020-fgvc7 (4 classes), or cassava-disease, that is iCassava 2019 (the 5 classes of the paper's Table 1)",
        ("plant-pathology-2020-fgvc7", "cassavaleafdata", "cassava-disease"), (("train.csv", "images"), tuple(f"train/{kind}" for kind in ("cbb", "cbsd", "cgm", "cmd", "healthy"))), (
        ("cassavaleafdata.zip", 1354096203, "8ae63d2ef7dee0899d252a748523e603f97e2ae7022f103f92fc42a9fce74d95", ""),)),
    "fmow": Source("s3://spacenet-dataset/Hosted-Datasets/fmow/fmow-rgb (free, about 200 GB; with aws s3 sync --no-sign-request)", ("fmow-rgb", "fmow"), (("train", "val"),)),
    "market1501": Source("its authors (Zheng et al., ICCV 2015)", ("Market-1501-v15.09.15",), (PERSON_FOLDERS,), (
        ("Market-1501-v15.09.15.zip", 0, "65005ab7d12ec1c44de4eeafe813e68a", ""),)),
    "dukemtmc": Source("none, its authors withdrew it in 2019; a copy that you hold is read", ("DukeMTMC-reID",), (PERSON_FOLDERS,), (("DukeMTMC-reID.zip", 0, "", ""),)),
    "msmt17": Source("its authors (Wei et al., CVPR 2018; a form to agree to; version 1)", ("MSMT17_V1",), (("train", "test", "list_train.txt", "list_query.txt", "list_gallery.txt"),)),
    "veri776": Source("its authors (Liu et al., ECCV 2016; by e-mail)", ("VeRi",), (("image_train", "image_query", "image_test"),)),
}
DOWNLOADS = {name: source.archives for name, source in SOURCES.items() if source.archives and all(url for *_, url in source.archives)}


def find(name, root):
    """The folder of dataset `name`: root or root/<official folder>. Raises FileNotFoundError that says what is missing and where to get it."""
    root, source = Path(root), SOURCES[name]
    tried = []  # (number of files found, folder, files missing)
    for base in (root, *(root / folder for folder in source.folders)):
        for layout in source.layouts:
            lost = [file for file in layout if not (base / file).exists()]
            if not lost:
                return base
            tried.append((len(layout) - len(lost), str(base), lost))
    found, base, lost = max(tried, key=lambda t: t[0])
    given = f"{base} lacks {', '.join(lost)}" if found else f"it is not in {' nor in '.join(dict.fromkeys(base for _, base, _ in tried))}"
    layouts = " or ".join(f"{source.folders[0]}/{{{', '.join(layout)}}}" for layout in source.layouts)
    raise FileNotFoundError(f"--data {name}: {given}; the layout is {layouts}; {how_to_get(name, root)}")


def how_to_get(name, root):
    """Where to ask for a dataset, its archives with size and hash, and the commands that unpack them."""
    source, listed, commands = SOURCES[name], [], []
    for file, size, digest, _ in source.archives or (("ARCHIVE", 0, "", ""),):
        facts = [f"{size:,} bytes"] * bool(size) + [f"{hash_kind(digest)} {digest}"] * bool(digest)
        listed += [f"{file} ({', '.join(facts)})" if facts else file]
        if not file.endswith(".mat"):
            commands.append(f"{'unzip {} -d {}' if file.endswith('.zip') else 'tar -xf {} -C {}'}".format(file, Path(root) / source.into))
    commands = ([f"mkdir -p {Path(root) / source.into}"] if source.into else []) + commands
    unpacking = f"{', '.join(listed)}; {' && '.join(commands)}" if name != "fmow" else "no archive: a tree of files"
    return f"source: {source.page}: {unpacking}" + ("; or add --download" if name in DOWNLOADS else "")


def read_mat(source):
    """Variables of a MATLAB level 5 file (a path or its bytes): numbers -> array in their storage type, text -> str (a list of rows for
    a matrix of text), cell -> object array, struct array -> dict field -> object array.

    The file is not trusted: ValueError for whatever is damaged, foreign, nested over 8 deep, or larger in memory than 8 times the
    file. (Small files may take 32 MiB: the labels of Flowers unpack to 16 times their file, those of Cars to more.)
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    left, order = max(8 * len(data), 2**25), {b"IM": "<", b"MI": ">"}.get(data[126:128])
    numbers = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
    codecs = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}

    def spend(size):
        nonlocal left
        left -= size
        if left < 0:
            raise ValueError("it needs far more memory than a file of its size should")

    def elements(view):  # (type, payload) of each data element
        at = 0
        while at < len(view):
            kind, size = struct.unpack_from(order + "II", view, at)
            small = kind >> 16  # size and at most 4 bytes of payload in the 8 bytes of the tag
            begin, kind, size = (at + 4, kind & 0xFFFF, small) if small else (at + 8, kind, size)
            if begin + size > len(view) or small > 4:
                raise ValueError("an element is longer than what holds it")
            yield kind, view[begin : begin + size]
            at = at + 8 if small else begin + size + (-size % 8 if kind != 15 else 0)  # 15: compressed, not padded

    def matrix(view, depth=0):  # payload of a matrix element (type 14) -> name, value
        spend(256)  # about what a small array takes
        if not len(view):
            return "", np.zeros((0, 0))
        parts = elements(view)
        flags = struct.unpack_from(order + "I", next(parts)[1])[0]
        dims = np.frombuffer(next(parts)[1], order + "i4")
        name, kind = str(next(parts)[1], "ascii"), flags & 0xFF
        if depth > 8 or not 2 <= dims.size <= 32 or dims.min() < 0:
            raise ValueError("a matrix is nested too deep or has impossible dimensions")
        dims, fields = dims.tolist(), [""]
        count = math.prod(dims)
        if kind == 2:
            width, names = struct.unpack(order + "i", next(parts)[1])[0], bytes(next(parts)[1])
            spend(256 * (len(names) // max(1, width)))
            fields = [names[i : i + width].split(b"\0")[0].decode("ascii") for i in range(0, len(names), width)]
        if kind in (1, 2):  # cell, struct: one matrix for each entry, all fields of an entry together
            if 8 * count * len(fields) > len(view):
                raise ValueError("it announces more entries than it holds")
            values = np.empty(count * len(fields), object)
            for i in range(len(values)):
                inner, payload = next(parts)
                if inner != 14:
                    raise ValueError("an entry is no matrix")
                values[i] = matrix(payload, depth + 1)[1]
            columns = {field: values[i :: len(fields)].reshape(dims, order="F") for i, field in enumerate(fields)}
            return name, columns[""] if kind == 1 else columns
        storage, payload = next(parts)
        if kind == 4:
            spend(4 * len(payload) + 64 * (dims[0] if count else 0))
            text = str(payload, codecs[storage] + ("" if storage in (1, 2, 16) else "-le" if order == "<" else "-be"))
            if dims[0] > 1 and len(text) != count:
                raise ValueError("a text has another length than its dimensions")
            return name, [text[i :: dims[0]] for i in range(dims[0])] if dims[0] > 1 and count else text
        if not 6 <= kind <= 15 or flags & 0x800:
            raise ValueError("it holds complex, sparse or object arrays, which no dataset here uses")
        spend(len(payload))
        array = np.frombuffer(payload, order + numbers[storage])
        return name, array.astype(array.dtype.newbyteorder("=")).reshape(dims, order="F")

    try:
        if order is None or struct.unpack_from(order + "H", data, 124) != (0x100,):
            raise ValueError("it does not start as one; version 7.3 files are HDF5: save them with -v7")
        variables = {}
        for kind, payload in elements(memoryview(data)[128:]):
            if kind == 15:  # zlib holding one whole element
                stream = zlib.decompressobj()
                payload = stream.decompress(payload, max(1, left // 3))  # zlib holds its output twice over for a moment
                spend(len(payload))
                if not stream.eof:
                    raise ValueError("a compressed element is cut short, or unpacks to far more than its size")
                kind, payload = next(elements(memoryview(payload)))
            if kind == 14:
                name, value = matrix(payload)
                variables[name] = value
        return variables
    except (ValueError, KeyError, StopIteration, struct.error, zlib.error) as error:
        raise ValueError(f"{'these bytes' if isinstance(source, bytes) else source}: damaged or no MATLAB level 5 file ({error or type(error).__name__}); {AGAIN}") from None


def check(name, splits, recipe):
    """Raises for listed photos that are missing or come twice and for class numbers out of range; warns of a full set with a wrong count.

    A set with less than nine tenths of the published images in train and in test is taken for a subset, and is fine.
    """
    folders, seen, lost = {}, set(), []
    for split in (splits.train, splits.val, splits.test) if name in SOURCES else ():
        for path, label in zip(split.paths, split.labels) if split else ():
            folder, file = os.path.split(path)
            if folder not in folders:
                folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if file not in folders[folder]:
                lost.append(path)
            if path in seen:
                raise ValueError(f"--data {name}: {path} is listed twice; {AGAIN}, or correct the list")
            if not 0 <= label < len(splits.classes) and split.query is None:
                raise ValueError(f"--data {name}: {path} has class number {label + 1}, but there are {len(splits.classes)} classes; {AGAIN}")
            seen.add(path)
    if lost:
        raise FileNotFoundError(f"--data {name}: {lost[0]} is listed but not there ({len(lost)} of {len(seen)} photos are missing); {AGAIN}, or correct the list")
    if not (len(splits.train) and len(splits.test)):
        raise ValueError(f"--data {name}: the {'test' if len(splits.train) else 'training'} split has no photos; {AGAIN}")
    classes, train, test, *alone = PUBLISHED[name]
    published = {"classes": classes, "training images": alone[0] if alone and recipe.train_split == "train" else train, "test images": test}
    found = dict(zip(published, (len(splits.classes), len(splits.train), len(splits.test))))
    off = [f"{found[key]:,} {key} instead of {n:,}" for key, n in published.items() if found[key] != n]
    if off and train and any(found[key] >= 0.9 * n for key, n in published.items() if key != "classes"):
        warnings.warn(f"--data {name}: {', '.join(off)} as published; {AGAIN}, or ignore this if the set was changed on purpose", stacklevel=3)


def rows(path):
    """Lines "key rest of the line" of a text file -> dict key -> rest."""
    held = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        key, _, rest = line.strip().partition(" ")
        if key in held:
            raise ValueError(f"{path}, line {number}: {key} comes a second time; {AGAIN}")
        if key:
            held[key] = rest.strip()
    return held


def column(path, keys, kind=str):
    """What the lines of `path` say about each of `keys`, read by `kind`."""
    held = rows(path)
    for key in keys:
        if key not in held:
            raise ValueError(f"{path} has no line for {key}; {AGAIN}")
        try:
            held[key] = kind(held[key])
        except ValueError:
            raise ValueError(f"{path}: cannot read the line of {key}: {held[key]!r}; {AGAIN}") from None
    return [held[key] for key in keys]


def four(text):
    """Text of four numbers -> four floats."""
    x, y, z, w = (float(v) for v in text.split())
    return x, y, z, w


def mat_values(path, *names):
    """Variables ("labels") and fields of struct arrays ("annotations.class") of a .mat file, each as a list of ints, or of texts for names."""
    held, columns = read_mat(path), []
    for name in names:
        value, kind = held, str if name.endswith(("name", "_path", "_list", "_names")) else int
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{path} has no {name}; {AGAIN}")
        try:
            columns.append([v if isinstance(v, str) else int(np.asarray(v).item()) for v in value.ravel(order="F")])
            if not all(isinstance(v, kind) for v in columns[-1]):
                raise TypeError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}: {name} does not hold one {'text' if kind is str else 'number'} each; {AGAIN}") from None
    return columns


def load_birds(name, root, recipe):
    """CUB-200-2011 and NABirds, whose files are alike: joined by image id; the classes are the ids in use, in ascending order; boxes x y w h."""
    base = find(name, root)
    paths = rows(base / "images.txt")
    ids = sorted(paths, key=lambda i: (len(i), i))
    class_ids, train = column(base / "image_class_labels.txt", ids, int), column(base / "train_test_split.txt", ids, ("0", "1").index)
    used = sorted(set(class_ids))
    classes = [re.sub(r"^\d+\.", "", c).replace("_", " ") for c in column(base / "classes.txt", [str(i) for i in used])]
    boxes = np.array(column(base / "bounding_boxes.txt", ids, four), np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label = {c: i for i, c in enumerate(used)}
    everything = Split([str(base / "images" / paths[i]) for i in ids], [label[c] for c in class_ids], boxes, **bird_parts(base, ids, boxes))
    return Splits(*(everything.take([i for i, t in enumerate(train) if t == side]) for side in (1, 0)), classes)


def bird_parts(base, ids, boxes):
    """parts/part_locs.txt as boxes: squares about each visible point, a tenth of the object box's longer side (at least a pixel) to each
    side, which is the distance that PCK at 0.1 allows; nan where not visible."""
    file = base / "parts/part_locs.txt"
    if not file.exists():
        return {}
    names = rows(base / "parts/parts.txt")
    place, number = {part: k for k, part in enumerate(sorted(names, key=int))}, {image: i for i, image in enumerate(ids)}
    parts = np.full((len(ids), len(names), 4), np.nan, np.float32)
    reach = np.maximum(1.0, 0.1 * (boxes[:, 2:] - boxes[:, :2]).max(1)) if len(boxes) else boxes
    for count, line in enumerate(open(file), 1):
        try:
            image, part, x, y, visible = line.split()
            if visible == "1" and image in number:
                i, x, y = number[image], float(x), float(y)
                parts[i, place[part]] = x - reach[i], y - reach[i], x + reach[i], y + reach[i]
        except (ValueError, KeyError):
            raise ValueError(f"{file}, line {count}: {line.strip()!r} is not `image part x y visible`; {AGAIN}") from None
    return {"parts": parts, "part_names": tuple(names[p] for p in place), "signature": (True,) * len(names)}


def load_cars(root, recipe):
    """Stanford Cars: the original layout (devkit), the combined one (car_ims, cars_annos.mat), or class folders. Boxes count from 1 and hold their last pixel."""
    base, keys = find("cars", root), [f"annotations.{k}" for k in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")]

    def split(folder, records):  # (file name, x1, y1, x2, y2, class)
        records = sorted(records)
        boxes = np.array([r[1:5] for r in records], np.float32).reshape(-1, 4) - np.float32([1, 1, 0, 0])
        return Split([str(folder / r[0]) for r in records], [r[5] - 1 for r in records], boxes)

    folders = [base / f for f in ("cars_train", "cars_test", "train", "test") if (base / f).exists()]
    if (base / "cars_annos.mat").exists():
        meta = base / "cars_annos.mat"
        test, *records = mat_values(meta, "annotations.test", "annotations.relative_im_path", *keys)
        train, test = (split(base, [r for r, t in zip(zip(*records), test) if bool(t) == side]) for side in (False, True))
    elif not (base / "devkit").exists() and folders_in(folders[0]):
        train, classes = class_folders(folders[0])
        return Splits(train, class_folders(folders[1], classes)[0], classes)
    else:
        labelled, meta = "cars_test_annos_withlabels.mat", base / "devkit/cars_meta.mat"
        files = [base / "devkit/cars_train_annos.mat", meta, base / labelled if (base / labelled).exists() else base / "devkit" / labelled]
        lost = [str(file) for file in files if not file.exists()]
        if lost:
            raise FileNotFoundError(f"--data cars: {', '.join(lost)} is missing (cars_test_annos.mat has no labels: {labelled} is needed beside it); {how_to_get('cars', root)}")
        train, test = (split(base / f"cars_{side}", zip(*mat_values(file, "annotations.fname", *keys))) for side, file in (("train", files[0]), ("test", files[2])))
    return Splits(train, test, *mat_values(meta, "class_names"))


def load_aircraft(root, recipe):
    """FGVC-Aircraft 2013b, 100 variants in the order of variants.txt. Boxes count from 1 and hold their last pixel."""
    base = find("aircraft", root)
    classes = [line.strip() for line in (base / "variants.txt").read_text(encoding="utf-8").splitlines() if line.strip()]

    def split(name):
        file = base / f"images_variant_{name}.txt"
        ids = sorted(rows(file))
        boxes = np.array(column(base / "images_box.txt", ids, four), np.float32).reshape(-1, 4) - np.float32([1, 1, 0, 0])
        return Split([str(base / "images" / f"{i}.jpg") for i in ids], column(file, ids, classes.index), boxes, banner=20 * recipe.crop_banner)

    return Splits(split(recipe.train_split), split("test"), classes, split("val") if recipe.train_split == "train" else None)


def load_flowers(root, recipe):
    """Flowers-102: trained on trnid and valid (or trnid alone), tested on tstid; some copies of the code swap them."""
    base = find("flowers", root)
    labels, = mat_values(base / "imagelabels.mat", "labels")

    def split(*names):
        images = sorted(sum(mat_values(base / "setid.mat", *names), []))
        if images and not 1 <= images[0] <= images[-1] <= len(labels):
            raise ValueError(f"{base / 'setid.mat'}: {', '.join(names)} lists image {images[0]} to {images[-1]} of {len(labels)} in imagelabels.mat; {AGAIN}")
        return Split([str(base / "jpg" / f"image_{i:05d}.jpg") for i in images], [labels[i - 1] - 1 for i in images])

    whole = recipe.train_split == "trainval"
    return Splits(split("trnid", "valid") if whole else split("trnid"), split("tstid"), list(Flowers102.classes), None if whole else split("valid"))


def load_dogs(root, recipe):
    """Stanford Dogs: train_list and test_list (.mat, or .txt with a path first on each line); boxes from Annotation, the largest dog of a photo."""
    base = find("dogs", root)

    def listed(side):
        file = base / f"{side}_list.mat"
        return sorted(mat_values(file, "file_list")[0] if file.exists() else rows(file.with_suffix(".txt")))

    def split(files):
        boxes = np.array([dog_box(base / "Annotation" / file.rsplit(".", 1)[0]) for file in files], np.float32) if (base / "Annotation").exists() else None
        return Split([str(base / "Images" / file) for file in files], [label[file.split("/")[0]] for file in files], boxes)

    train, test = listed("train"), listed("test")
    label = {folder: i for i, folder in enumerate(sorted({file.split("/")[0] for file in train + test}))}
    classes = [folder.partition("-")[2].replace("_", " ") for folder in label]
    return Splits(split(train), split(test), classes, note="all its photos, those of the test too, are in ImageNet's training set: weights trained there have seen them")


def dog_box(path):
    """Largest box of a VOC annotation -> (x1, y1, x2, y2)."""
    try:
        found = [[float(box.find(key).text) for key in ("xmin", "ymin", "xmax", "ymax")] for box in ElementTree.parse(path).iter("bndbox")]
        return max(found, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError):
        raise ValueError(f"{path} holds no object box; {AGAIN}, or remove the folder Annotation to go without boxes") from None


def load_plant(root, recipe):
    """Plant Pathology 2020 (train.csv, 4 classes) or iCassava 2019 (train/cbb, cbsd, cgm, cmd, healthy).

    The paper calls its set Plant Pathology, but the 5 classes and 9,436 images of its Table 1 are those of iCassava. The test labels of
    both competitions are hidden: a fifth of each class of the labelled photos is the test split, unless iCassava comes with labelled
    test and validation folders (cassavaleafdata.zip).
    """
    base, hidden = find("plant", root), "its test labels are hidden, so a fifth of each class of the labelled photos is the test split"
    table = base / "train.csv"
    if not table.exists():
        train, classes = class_folders(base / "train")
        if (base / "test" / classes[0]).is_dir():
            test, val = (class_folders(base / d, classes)[0] if (base / d).is_dir() else None for d in ("test", "validation"))
            return Splits(train, test, classes, val, "iCassava 2019")
        return Splits(*cut(train, 0.2), classes, note=f"iCassava 2019; {hidden}")
    with open(table, newline="", encoding="utf-8-sig") as file:
        (head, *classes), *lines = [line for line in csv.reader(file) if line] or [[""]]
    if head != "image_id":
        raise ValueError(f"{table} begins with {head!r}, not image_id: not Plant Pathology 2020 (that of 2021 has several labels a photo); use that of 2020, or iCassava 2019")
    labels = {}
    for image, *marks in lines:
        if sorted(marks) != ["0"] * (len(classes) - 1) + ["1"] or image in labels:
            raise ValueError(f"{table}: the line of {image} must come once and have a single 1 among {len(classes)} columns, not {','.join(marks)}; {AGAIN}")
        labels[image] = marks.index("1")
    everything = Split([str(base / "images" / f"{i}.jpg") for i in sorted(labels)], [labels[i] for i in sorted(labels)])
    if len(labels) != 1821 and len(labels) >= 0.9 * 1821:
        warnings.warn(f"--data plant: {table} has {len(labels):,} images instead of 1,821 as published; {AGAIN}", stacklevel=3)
    return Splits(*cut(everything, 0.2), classes, note=f"Plant Pathology 2020; {hidden}")


def load_fmow(root, recipe):
    """fMoW-rgb: train, val, and test as test_gt_mapping.json labels it (without that file, val is the test split). One box a photo: the
    first of the photo's class that is over 2 pixels wide and high; a photo without one is kept whole. Read only with recipe.boxes."""
    base = find("fmow", root)
    classes = [d.name for d in folders_in(base / "train") if d.name != "false_detection"]
    label = {c: i for i, c in enumerate(classes)}

    def split(photos):  # (photo, class, JSON file)
        photos = sorted((p, c, j) for p, c, j in photos if c != "false_detection")
        unknown = next((c for _, c, _ in photos if c not in label), None)
        if unknown:
            raise ValueError(f"{base}: {unknown} is no class folder of train; {AGAIN}")
        boxes = np.array([fmow_box(j, c) for _, c, j in photos], np.float32).reshape(-1, 4) if recipe.boxes else None
        return Split([str(p) for p, _, _ in photos], [label[c] for _, c, _ in photos], boxes, context=True)

    train, val = (split((p, p.parts[-3], p.with_suffix(".json")) for p in (base / side).glob("*/*/*_rgb.jpg")) for side in ("train", "val"))
    mapping = base / "test_gt_mapping.json"
    if not mapping.exists():
        return Splits(train, val, classes, note="there is no test_gt_mapping.json: val is the test split")
    try:
        pairs = [(PurePosixPath(pair["input"]), PurePosixPath(pair["output"])) for pair in json.loads(mapping.read_text())]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{mapping} is no list of input and output; {AGAIN}") from None
    photos = [(p, given) for given, output in pairs for p in (base / output).glob("*_rgb.jpg")]
    test = split((p, given.parent.name, base / given / f"{given.name}_{p.stem.split('_', 1)[1]}.json") for p, given in photos)
    return Splits(train, test, classes, val)


def fmow_box(path, category):
    """Box of a category in a photo's JSON, or None where there is no usable one."""
    try:
        held = json.loads(path.read_text())["bounding_boxes"]
        for entry in [held] if isinstance(held, dict) else held:
            x, y, w, h = (float(v) for v in entry["box"])
            if entry["ID"] != -1 and entry["category"] == category and min(w, h) > 2:
                return x, y, x + w, y + h
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no bounding_boxes can be read ({error}); {AGAIN}, or train with --no-boxes") from None
    return 0, 0, 1e6, 1e6  # reaches over every edge: the whole photo


def download(name, root):
    """Fetch the official archives of `name` into the folder `root`, check their hashes and unpack them, unless that is done -> the dataset's folder."""
    if name not in DOWNLOADS:
        raise ValueError(f"--download can fetch {', '.join(DOWNLOADS)}, not {name}; " + (how_to_get(name, root or "DIR") if name in SOURCES else "leave it out"))
    if root is None:
        raise ValueError(f"--download needs a folder to unpack {name} into; add --root DIR")
    folder = Path(root) / SOURCES[name].into
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / f"{name}.unpacking"  # is there while an unpacking has begun and not ended
    if not begun.exists():
        try:
            return find(name, root)
        except FileNotFoundError:
            pass
    for file, _, digest, url in DOWNLOADS[name]:
        if not (folder / file).exists() or hash_of(folder / file, hash_kind(digest)) != digest:
            fetch_archive(url, folder / file, digest)
    begun.touch()
    for file, *_ in DOWNLOADS[name]:
        if ".t" in file:
            unpack(folder / file, folder)
    begun.unlink()
    return find(name, root)


def hash_kind(digest):
    """md5 or sha256, by the digest's length."""
    return "md5" if len(digest) == 32 else "sha256"


def hash_of(path, kind):
    """Hex digest of a file."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fetch_archive(url, path, digest):
    """Stream `url` to path.part, hashing it on the way, and move it to `path` if the hash is `digest`. Whatever goes wrong, no file is left behind."""
    part, hashed, done = path.with_name(path.name + ".part"), hashlib.new(hash_kind(digest)), 0
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "Python"}), timeout=60) as source, open(part, "wb") as target:
            total = int(source.headers.get("Content-Length") or 0)
            while block := source.read(2**20):
                hashed.update(block)
                done += target.write(block)
                if sys.stderr.isatty():
                    print(f"{path.name}: {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB", end="\r" if done < total else "\n", file=sys.stderr)
        if hashed.hexdigest() != digest:
            raise ValueError(f"{url} gave {done:,} bytes with hash {hashed.hexdigest()} instead of {digest}: cut short or not the official file; "
                             f"nothing was kept: run it again, or fetch it by hand to {path}")
        os.replace(part, path)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"could not download {url} ({error}); run it again, or fetch it by hand to {path}") from None
    finally:
        part.unlink(missing_ok=True)


def unpack(archive, folder):
    """Write the files of a tar archive into `folder`. A link becomes a copy of the member that it names; ValueError for a link to anything
    else, for a member that would lie outside `folder`, and for what is neither file nor folder."""
    folder = Path(folder).resolve()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                target = (folder / member.name).resolve()
                if not target.is_relative_to(folder):
                    raise ValueError(f"{archive}: {member.name!r} would be written outside {folder}: not an official archive; delete it")
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                source = tar.extractfile(member)
                if source is None:
                    raise ValueError(f"{archive}: {member.name!r} is neither file nor folder: not an official archive; delete it")
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, KeyError, RecursionError) as error:
        raise ValueError(f"{archive}: damaged, or a link leads out of it ({error or type(error).__name__}); delete it and get it again") from None


# ------------------------------------------------------------------------------------------------ re-identification


def reid(name, train, query, gallery):
    """Lists of (path, identity, camera) -> Splits: training identities numbered 0.. in ascending order, test identities as they are.
    Junk (identity -1) is dropped; distractors (0 in Market-1501) stay in the gallery."""
    train, query, gallery = (sorted(record for record in part if record[1] != -1) for part in (train, query, gallery))
    if not (train and query and gallery):
        raise ValueError(f"--data {name}: no photos in {'train' if not train else 'query' if not query else 'the gallery'}; {AGAIN}")
    ids = sorted({identity for _, identity, _ in train})
    label = {identity: i for i, identity in enumerate(ids)}

    def split(records, labels, **more):
        return Split([path for path, _, _ in records], labels, cameras=[camera for _, _, camera in records], **more)

    test = split(query + gallery, [identity for _, identity, _ in query + gallery], query=[True] * len(query) + [False] * len(gallery))
    return Splits(split(train, [label[identity] for _, identity, _ in train]), test, [str(i) for i in ids])


def named_photos(folder):
    """Photos of a folder whose names begin with identity and camera, as 0002_c1s1_000451_03.jpg, -1_c3s2_..., 0002_c020_...jpg."""
    records = []
    for path in folder.glob("*.jpg"):
        match = re.match(r"(-?\d+)_c(\d+)", path.name)
        if not match:
            raise ValueError(f"{path} is not named IDENTITY_cCAMERA...; {AGAIN}, or remove the file")
        records.append((str(path), int(match[1]), int(match[2])))
    return records


def load_named(name, root, recipe):
    """Market-1501, DukeMTMC-reID and VeRi-776: folders of train, query and gallery."""
    base = find(name, root)
    return reid(name, *(named_photos(base / folder) for folder in SOURCES[name].layouts[0]))


def load_msmt17(root, recipe):
    """MSMT17 version 1: lists of `path identity`; trained on its train and val lists (DCAL compares with that), or on train alone.
    Identities of train and test overlap as numbers, not as persons."""
    base = find("msmt17", root)

    def listed(folder, *lists):
        records = []
        for file in (base / f"list_{name}.txt" for name in lists):
            for path, identity in rows(file).items():
                try:
                    records.append((str(base / folder / path), int(identity), int(os.path.basename(path).split("_")[2])))
                except (ValueError, IndexError):
                    raise ValueError(f"{file}: {path} {identity} is not `ID/ID_NUMBER_CAMERA_...jpg ID`; {AGAIN} (version 1)") from None
        return records

    whole = recipe.train_split == "trainval" and (base / "list_val.txt").exists()
    return reid("msmt17", listed("train", *(("train", "val") if whole else ("train",))), listed("test", "query"), listed("test", "gallery"))


class PKSampler:
    """Batches of one epoch for triplet losses: lists of P * K indices, P different identities with K images each, one after the other.

    Each identity's images are shuffled and cut into groups of K; what is left over sits out, and an identity with fewer than K images is
    filled up by drawing from them again. The groups are dealt to as many batches as can be filled without an identity coming twice, so every
    epoch has the same length (TransReID's loop ends when fewer than P identities are left, a little earlier or later each time).
    Raises ValueError with fewer than P identities.
    """

    def __init__(self, ids, P, K, generator=None):
        self.P, self.K, self.generator = P, K, generator
        self.images = {}
        for i, identity in enumerate(ids):
            self.images.setdefault(identity, []).append(i)
        if P < 1 or K < 1 or len(self.images) < P:
            raise ValueError(f"batches of {P} identities x {K} images from {len(self.images)} identities: use --batch-size of at most {len(self.images) * K} with --instances {K}")
        groups = [max(len(v), K) // K for v in self.images.values()]
        low, high = 1, sum(groups) // P + 1  # the most batches: each identity fills a place in at most `batches` of them
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(min(g, middle) for g in groups) >= middle * P else (low, middle)
        self.batches = low

    def __len__(self):
        return self.batches

    def __iter__(self):
        shuffled = lambda n: torch.randperm(n, generator=self.generator).tolist()
        groups = []
        for images in self.images.values():
            order = [images[j] for j in shuffled(len(images))]
            if len(order) < self.K:
                order += [images[j] for j in torch.randint(len(images), (self.K - len(order),), generator=self.generator).tolist()]
            groups.append([order[j : j + self.K] for j in range(0, len(order) - self.K + 1, self.K)][: self.batches])
        spare = [(a, b) for a, some in enumerate(groups) for b in range(len(some))]  # more groups than places: which sit out is drawn
        out = {spare[j] for j in shuffled(len(spare))[self.batches * self.P :]}
        dealt = [groups[a][b] for a in shuffled(len(groups)) for b in range(len(groups[a])) if (a, b) not in out]
        for first in shuffled(self.batches):  # an identity's groups follow each other, at most `batches` of them: they fall into different batches
            yield [i for group in dealt[first :: self.batches] for i in group]

# ------------------------------------------------------------------------------------------------ toy birds
#
# A bird is some 25 polygons in its own frame (length about 1, facing right, y down): body, head and tail move a little against each
# other, then all is turned, mirrored, scaled and placed. Six parts have four values each. The values of the signature parts are the
# class; those of the other two are drawn at random: as easy to see, and worth nothing. Colours, pose, background and light say
# nothing about the class. Values, plumage, scene and light have a random stream each, so a swapped part changes no other pixel.

PARTS = {  # part: its four values
    "beak": ("cone", "dagger", "hooked", "upcurved"), "eye": ("plain", "ring", "stripe", "brow"), "crest": ("none", "spike", "feathers", "cap"),
    "wing": ("plain", "bar", "bars", "patch"), "breast": ("plain", "spots", "streaks", "band"), "tail": ("square", "forked", "round", "wedge"),
}
SIGNATURE = ("beak", "eye", "wing", "breast")
LUMA = np.array([0.299, 0.587, 0.114])
FLOOR = 45  # least difference in luma (0 .. 255) of a mark and the plumage under it


@dataclass(frozen=True)
class Preset:
    """Settings of a set of toy birds."""

    classes: int = 16
    distance: int = 1  # least number of signature parts in which two classes differ
    part_scale: float = 1.0  # size of the marks, beak and crest
    clutter: int = 8  # leaves and branches in the background
    blobs: int = 6  # dots, bars, rings and triangles that look like pieces of parts
    length: tuple[float, float] = (0.72, 0.95)  # of the bird, as a share of the side
    train: int = 15  # images a class
    test: int = 30
    seed: int = 0  # of the classes' code book and of every bird


EASY = Preset(classes=8, distance=2, part_scale=1.3, clutter=4, blobs=3, train=150, test=60)
PRESETS = {"birds": Preset(), "birds-easy": EASY, "birds-small": dataclasses.replace(EASY, length=(0.45, 0.70)), "birds-pretrain": dataclasses.replace(EASY, seed=5)}


@dataclass
class Bird:
    """One toy bird; boxes are xyxy in pixels of the image."""

    image: np.ndarray  # (H, W, 3) uint8
    label: int
    object_box: np.ndarray  # (4,) float32, around all that is drawn of the bird
    part_boxes: np.ndarray  # (6, 4) float32 in the order of PARTS: where the part is or would be, the same for each of its values
    signature: np.ndarray  # (6,) bool: does the part carry the class
    values: dict  # part name -> 0 .. 3, as drawn


@functools.cache
def class_codes(preset):
    """Values of the signature parts of each class, (classes, 4): pairwise at least `distance` apart, each value about equally often, close relatives preferred."""
    order = np.array(list(itertools.product(range(4), repeat=len(SIGNATURE))))
    np.random.default_rng([preset.seed, 77]).shuffle(order)
    codes, used = order[:0], np.zeros((len(SIGNATURE), 4))
    for _ in range(preset.classes):
        apart = (order[:, None] != codes[None]).sum(2)  # (candidates, classes so far)
        fits = (apart >= preset.distance).all(1)
        assert fits.any(), f"there are no {preset.classes} codes that differ in {preset.distance} parts"
        score = np.minimum((apart == preset.distance).sum(1), 3) - 10 * used[range(len(SIGNATURE)), order].sum(1)  # relatives break the ties of balance
        best = order[np.where(fits, score, -np.inf).argmax()]
        codes, used[range(len(SIGNATURE)), best] = np.vstack([codes, best]), used[range(len(SIGNATURE)), best] + 1
    return codes


def ellipse(x, y, rx, ry, angle=0.0, points=24):
    """Polygon of an ellipse, turned by `angle` radians -> (points, 2)."""
    t = np.arange(points) * (2 * np.pi / points)
    return turn(np.stack([rx * np.cos(t), ry * np.sin(t)], 1), angle) + (x, y)


def turn(points, angle):
    """Rotate points (n, 2) by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


BODY, BELLY, HEAD = ellipse(0, 0, 0.29, 0.185, -0.12), ellipse(0.10, 0.075, 0.17, 0.10, -0.35), ellipse(0, 0, 0.125, 0.12)
WING = np.array([(0.10, -0.06), (0.05, -0.115), (-0.05, -0.125), (-0.16, -0.085), (-0.34, 0.03), (-0.24, 0.06), (-0.12, 0.085), (0, 0.07), (0.075, 0.02)])
BLOBS = (  # dot, bar, ring around an eye, triangle
    [ellipse(0, 0, 0.018, 0.018, 0, 10)], [np.array([(-0.01, -0.06), (0.02, -0.06), (0.02, 0.06), (-0.01, 0.06)])],
    [ellipse(0, 0, 0.05, 0.05, 0, 10), ellipse(0, 0, 0.024, 0.024, 0, 10)], [np.array([(0, -0.04), (0.14, 0), (0, 0.04)])],
)
EYE = np.array([12.0, 10.0, 10.0])
LEG = np.array([(0, 0.17), (0.018, 0.17), (0.03, 0.33), (0.07, 0.335), (0.07, 0.35), (-0.02, 0.35), (0.012, 0.33)])


@functools.cache
def part_shapes(g):
    """{part: (frame, polygons of each of its four values, outline of its place)} at part scale g, in the frame's coordinates."""
    bar = lambda x: [(x, -0.09), (x + 0.03 * g, -0.095), (x - 0.02 + 0.03 * g, 0.058), (x - 0.02, 0.055)]
    streak = lambda x, y: [(x - 0.008 * g, y), (x + 0.008 * g, y), (x + 0.006 * g, y + 0.10 * g), (x - 0.006 * g, y + 0.10 * g)]
    feather = lambda x, a: [(x - 0.018, -0.095), (x + math.sin(a) * 0.14 * g, -0.10 - math.cos(a) * 0.125 * g), (x + 0.018, -0.10)]
    spots = ((0.12, 0.02), (0.17, -0.01), (0.15, 0.075), (0.205, 0.045), (0.10, 0.11), (0.19, 0.11))
    box = lambda x1, y1, x2, y2: [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    base = ((-0.10, -0.062), (0, -0.055), (0, 0.055), (-0.10, 0.062))  # of every tail
    table = {
        "beak": ("head", (
            [[(0.09, -0.045 * g), (0.12 + 0.075 * g, 0.012), (0.09, 0.055 * g)]],
            [[(0.09, -0.03 * g), (0.12 + 0.17 * g, 0.012), (0.09, 0.045 * g)]],
            [[(0.09, -0.045 * g), (0.12 + 0.07 * g, -0.03 * g), (0.12 + 0.105 * g, 0.015 * g), (0.12 + 0.095 * g, 0.085 * g), (0.12 + 0.06 * g, 0.03 * g), (0.09, 0.045 * g)]],
            [[(0.09, -0.03 * g), (0.12 + 0.06 * g, -0.005 * g), (0.12 + 0.15 * g, -0.06 * g), (0.12 + 0.165 * g, -0.04 * g), (0.12 + 0.08 * g, 0.035 * g), (0.09, 0.05 * g)]],
        ), box(0.10, -0.065 * g, 0.12 + 0.18 * g, 0.10 * g)),
        "eye": ("head", (
            [],
            [ellipse(0.045, -0.03, 0.05 * g, 0.05 * g)],
            [[(-0.085, -0.035 - 0.012 * g), (0.115, -0.025 - 0.012 * g), (0.115, -0.02 + 0.012 * g), (-0.09, -0.02 + 0.014 * g)]],
            [[(-0.055, -0.055 - 0.01 * g), (0.03, -0.085 - 0.014 * g), (0.095, -0.062 - 0.006 * g), (0.09, -0.05), (0.03, -0.066), (-0.045, -0.04)]],
        ), ellipse(0.012, -0.035, 0.108, 0.015 + 0.05 * g)),
        "crest": ("head", (
            [],
            [[(0.03, -0.11), (-0.04, -0.12 - 0.12 * g), (-0.075, -0.08)]],
            [feather(-0.07, -0.45), feather(-0.025, -0.12), feather(0.02, 0.2)],
            [ellipse(-0.02, -0.105, 0.075 * g, 0.05 * g, -0.15, 10)],
        ), box(-0.135 * g, -0.12 - 0.13 * g, 0.06 * g, -0.08)),
        "wing": ("body", (
            [], [bar(-0.06)], [bar(-0.015), bar(-0.105)], [ellipse(-0.065, -0.02, 0.045 * g, 0.04 * g, 0, 10)],
        ), ellipse(-0.08, -0.03, 0.15, 0.10, 0.25)),
        "breast": ("body", (
            [],
            [ellipse(x, y, 0.017 * g, 0.017 * g, 0, 10) for x, y in spots],
            [streak(0.10, 0.05), streak(0.14, 0.03), streak(0.18, 0.015), streak(0.22, 0)],
            [[(0.06, 0.075), (0.245, -0.03), (0.255, -0.03 + 0.032 * g), (0.07, 0.075 + 0.035 * g)]],
        ), ellipse(0.16, 0.06, 0.105, 0.13, -0.3)),
        "tail": ("tail", (
            [[*base, (-0.33, 0.07), (-0.33, -0.07)]],
            [[*base, (-0.36, 0.10), (-0.22, 0), (-0.36, -0.10)]],
            [[*base, (-0.2, 0.085), (-0.28, 0.08), (-0.32, 0.045), (-0.335, 0), (-0.32, -0.045), (-0.28, -0.08), (-0.2, -0.085)]],
            [[*base, (-0.2, 0.06), (-0.37, 0), (-0.2, -0.06)]],
        ), box(-0.37, -0.10, -0.09, 0.10)),
    }
    return {part: (frame, [[np.array(p, float) for p in value] for value in values], np.array(place, float)) for part, (frame, values, place) in table.items()}


def hsv(h, s, v):
    """Hue in turns, saturation and value in [0, 1] -> RGB array in 0..255."""
    return np.array(colorsys.hsv_to_rgb(h % 1, min(max(s, 0), 1), min(max(v, 0), 1))) * 255


def mix(a, b, share):
    """Blend colour a with `share` of colour b."""
    return a * (1 - share) + b * share


def apart(mark, ground):
    """A mark's colour, moved towards black or white where needed so that its luma differs from the ground's by FLOOR."""
    luma, under = mark @ LUMA, ground @ LUMA
    white = luma >= under and under + FLOOR <= 255 or under < FLOOR
    short = under + FLOOR - luma if white else luma - under + FLOOR
    return mix(mark, np.full(3, 255.0 * white), max(0.0, short) / (255 - luma if white else luma)) if short > 0 else mark


def plumage(rng):
    """Colours of one bird by what is painted with them. None says anything about the class."""
    hue, s, v = rng.random(), rng.uniform(0.15, 0.6), rng.uniform(0.45, 0.8)
    near = lambda: hue + rng.uniform(-0.06, 0.06)
    c = {"body": hsv(hue, s, v), "dark": hsv(hue, 0.4, 0.16), "pale": hsv(rng.uniform(0.08, 0.18), rng.uniform(0.02, 0.25), 0.97)}
    c["belly"] = mix(c["body"], hsv(hue + rng.uniform(-0.1, 0.1), s / 2, v + 0.25), 0.8)
    c["back"], c["tail"] = hsv(near(), s, v * 0.72), hsv(near(), s, v * 0.66)
    c["head"] = hsv(near(), s * rng.uniform(0.7, 1.2), v * rng.uniform(0.85, 1.1))
    c["beak"] = (hsv(rng.uniform(0.08, 0.14), 0.8, 0.9), hsv(rng.uniform(0, 0.06), 0.7, 0.8), hsv(0.1, 0.25, 0.22))[rng.integers(3)]
    c["crest"] = apart(mix(c["head"], (c["dark"], hsv(rng.random(), 0.7, 0.8))[rng.integers(2)], 0.65), c["head"])
    c["wing"] = apart(c["pale"] if rng.random() < 0.7 else mix(c["back"], c["dark"], 0.85), c["back"])
    c["breast"] = apart(mix(c["belly"], c["dark"], 0.75), c["belly"])
    c["eye"], c["stripe"] = apart(c["pale"], c["head"]), apart(mix(c["head"], c["dark"], 0.85), c["head"])
    c["legs"] = [c[("beak", "dark")[k]] for k in rng.integers(2, size=2)]
    return c


def background(rng, preset, colours, length, side):
    """Smooth gradients, leaves, branches, and blobs in the bird's colours that look like pieces of parts -> PIL image of side x side."""
    base = hsv(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.35, 0.9))
    grid = base + rng.normal(0, 28, (5, 5, 1)) + rng.normal(0, 14, (5, 5, 3))
    image = Image.fromarray(grid.clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(preset.clutter):
        hue = rng.random() if rng.random() < 0.4 else rng.uniform(0.08, 0.4)
        colour, at, angle = hsv(hue, rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.85)), rng.random(2), rng.uniform(0, math.pi)
        if rng.random() < 0.45:  # a branch
            half, thick = rng.uniform(0.1, 0.45), rng.uniform(0.004, 0.015)
            shape = np.array([(-half, -thick), (half, -thick), (half, thick), (-half, thick)])
        else:  # a leaf
            shape = ellipse(0, 0, rng.uniform(0.03, 0.12), rng.uniform(0.015, 0.05), 0, 10)
        paint(draw, (turn(shape, angle) + at) * side, colour)
    for _ in range(preset.blobs):
        at, angle, scale = rng.random(2), rng.uniform(0, 6.3), length * rng.uniform(0.7, 1.3)
        colour = colours[("pale", "dark", "beak")[rng.integers(3)]]
        shapes = BLOBS[rng.integers(len(BLOBS))]
        for shape, own in zip(shapes, (colour, EYE)):
            paint(draw, (turn(shape, angle) * scale + at) * side, own)
    return image


def ints(colour):
    """Colour as Pillow wants it."""
    return tuple(int(v) for v in colour)


def paint(draw, points, colour):
    """Fill a polygon (n, 2) with a colour."""
    draw.polygon(points.ravel().tolist(), ints(colour))


def draw_bird(preset, split, index, size, values=None):
    """Bird number `index` of a split of a preset, size x size pixels; the same pixels in every process and on every machine.

    Its class is index % classes. `values` {part: 0 .. 3} swaps parts for others, all else staying as it is (a counterfactual).
    """
    if preset not in PRESETS or split not in ("train", "test") or index < 0 or size < 16:
        raise ValueError(f"no toy bird {preset}/{split}/{index} of {size} pixels; presets are {', '.join(PRESETS)}, splits train and test, index from 0, size from 16")
    if not all(part in PARTS and value in range(4) for part, value in (values or {}).items()):
        raise ValueError(f"toy bird parts {values}; give a dict of {', '.join(PARTS)} to 0, 1, 2 or 3")
    return render(PRESETS[preset], split, index, size, values or {})


def render(preset, split, index, size, swapped):
    """Draw one bird of a preset -> Bird; `swapped` sets values of parts."""
    drawn, feathers, scene, light = (np.random.default_rng([preset.seed, ("train", "test").index(split), index, k]) for k in range(4))
    label, shapes, c = index % preset.classes, part_shapes(preset.part_scale), plumage(feathers)
    values = dict(zip(PARTS, drawn.integers(4, size=len(PARTS)).tolist())) | dict(zip(SIGNATURE, class_codes(preset)[label].tolist())) | swapped

    # the pose: three frames, each a function from its coordinates to the bird's
    tilt, stretch = math.radians(scene.uniform(-20, 20)), 1 + scene.uniform(-0.08, 0.08)
    head, tail = math.radians(scene.uniform(-22, 22)), math.radians(scene.uniform(-18, 28))
    neck = np.array([0.27 + scene.uniform(-0.03, 0.02), -0.19 + scene.uniform(-0.04, 0.05)])
    whole = turn(np.diag([stretch, 1 / stretch]), tilt) * (scene.choice([-1, 1]), 1)  # turned, then mirrored
    pose = {"body": lambda p: p @ whole, "head": lambda p: (turn(p, head) + neck) @ whole, "tail": lambda p: (turn(p, tail) + (-0.25, 0.05)) @ whole}

    # what is painted, back to front
    layers, jitter = [], feathers.uniform(-0.008, 0.008, (6, 2))

    def add(frame, points, colour):
        layers.append((pose[frame](points), colour))

    def add_part(part):
        frame, shape, _ = shapes[part]
        for points, shift in zip(shape[values[part]], jitter):
            add(frame, points + shift if (part, values[part]) == ("breast", 1) else points, c["stripe" if (part, values[part]) == ("eye", 2) else part])

    add_part("tail")
    for x, colour in zip((-0.02, 0.06), c["legs"]):
        add("body", LEG + (x, 0), colour)
    add("body", BODY, c["body"])
    add("body", np.array([(0.08, -0.14), neck + (-0.10, -0.06), neck + (0.10, 0.06), (0.26, 0.04)]), mix(c["body"], c["head"], 0.5))
    add("body", BELLY, c["belly"])
    add_part("beak")
    add_part("crest")
    add("head", HEAD, c["head"])
    add_part("breast")
    add("body", WING, c["back"])
    add_part("wing")
    add_part("eye")
    add("head", ellipse(0.045, -0.03, 0.024, 0.024, 0, 10), EYE)
    add("head", ellipse(0.053, -0.038, 0.0084, 0.0084, 0, 10), np.full(3, 240.0))

    # its place: from the places of the parts, not from what is drawn there, so that no value moves the bird
    places = [pose[frame](place) for frame, _, place in shapes.values()]
    extent = np.concatenate(places + [pose["body"](np.concatenate([BODY, LEG, LEG + (0.06, 0)])), pose["head"](HEAD)])
    low, span = extent.min(0), np.ptp(extent, 0)
    length = min(scene.uniform(*preset.length), 0.97 / span.max())
    shift = scene.random(2) * (1 - span * length) - low * length
    boxes = np.array([[*p.min(0), *p.max(0)] for p in [np.concatenate([p for p, _ in layers])] + places]) * length + np.tile(shift, 2)

    # drawn larger and averaged, then lit: gain, cast, a linear gradient, grain
    fine = 3 if size <= 80 else 2
    image = background(scene, preset, c, length, size * fine)
    draw = ImageDraw.Draw(image)
    for points, colour in layers:
        paint(draw, (points * length + shift) * (size * fine), colour)
    pixels = np.asarray(image.reduce(fine), np.float32)
    gain = light.uniform(0.75, 1.2) * (1 + light.normal(0, 0.05, 3))
    slope, ramp = light.normal(0, 0.15, 2), np.linspace(-0.5, 0.5, size)
    shade = 1 + slope[0] * ramp[None, :] + slope[1] * ramp[:, None]
    pixels = pixels * (shade[..., None] * gain).astype(np.float32) + 4 * light.standard_normal((size, size, 1), np.float32)
    boxes = (boxes * size).astype(np.float32)
    return Bird(pixels.clip(0, 255).astype(np.uint8), label, boxes[0], boxes[1:], np.array([part in SIGNATURE for part in PARTS]), values)


def load_toy(root, recipe):
    """Toy birds of recipe.toy_preset, drawn into memory as squares of the longest side that the recipe needs; nothing is read from disk."""
    preset, size = PRESETS[recipe.toy_preset], max(recipe.resize if any(recipe.resize) else recipe.image_size)

    def draw(split, per_class):
        birds = [draw_bird(recipe.toy_preset, split, i, size) for i in range(per_class * preset.classes)]
        return Split([f"{recipe.toy_preset}/{split}/{i}" for i in range(len(birds))], [b.label for b in birds], np.stack([b.object_box for b in birds]),
                     np.stack([b.part_boxes for b in birds]), tuple(PARTS), tuple(birds[0].signature.tolist()), images=[b.image for b in birds])

    names = ["-".join(PARTS[part][v] for part, v in zip(SIGNATURE, code)) for code in class_codes(preset)]
    return Splits(draw("train", recipe.toy_train or preset.train), draw("test", recipe.toy_test or preset.test), names)


def contact_sheet(size=160, columns=8):
    """PIL image: every value of every part in one scene; below, birds of each class of the preset `birds`, the last two of a row with their boxes."""
    plain = dataclasses.replace(PRESETS["birds"], clutter=0, blobs=0)
    cells = [(render(plain, "test", 25, size, dict.fromkeys(PARTS, 0) | {part: v}), f"{part}: {name}") for part, names in PARTS.items() for v, name in enumerate(names)]
    for label, code in enumerate(class_codes(PRESETS["birds"])):
        name = f"class {label}: " + "-".join(PARTS[part][v] for part, v in zip(SIGNATURE, code))
        cells += [(draw_bird("birds", "train", label + k * PRESETS["birds"].classes, size), name if k == 0 else "") for k in range(columns)]
    sheet = Image.new("RGB", (columns * (size + 4), len(cells) // columns * (size + 22)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (bird, text) in enumerate(cells):
        x, y = k % columns * (size + 4), k // columns * (size + 22) + 18
        sheet.paste(Image.fromarray(bird.image), (x, y))
        draw.text((x + 2, y - 15), text, fill="black", font=ImageFont.load_default(size=13))
        if k % columns >= columns - 2 and k >= 4 * len(PARTS):
            for box, colour in zip([bird.object_box, *bird.part_boxes], ["#ffd400", *("#ff3030" if carries else "#30a0ff" for carries in bird.signature)]):
                draw.rectangle((box + (x, y, x, y)).tolist(), outline=colour, width=2)
    return sheet


DATASETS = {  # name -> loader(root, recipe) -> Splits
    "toy": load_toy, "folder": load_folder, "imagenet": load_imagenet, "cub": functools.partial(load_birds, "cub"), "cars": load_cars, "aircraft": load_aircraft,
    "flowers": load_flowers, "dogs": load_dogs, "nabirds": functools.partial(load_birds, "nabirds"), "plant": load_plant, "fmow": load_fmow,
    **{name: functools.partial(load_named, name) for name in ("market1501", "dukemtmc", "veri776")}, "msmt17": load_msmt17,
}
PUBLISHED = {  # name -> classes (identities), training images, test images (queries + gallery), training images with --train-split train; 0: not known
    "imagenet": (1000, 1281167, 50000), "cub": (200, 5994, 5794), "cars": (196, 8144, 8041), "aircraft": (100, 6667, 3333, 3334), "flowers": (102, 2040, 6149, 1020),
    "dogs": (120, 12000, 8580), "nabirds": (555, 23929, 24633), "plant": (5, 0, 0), "fmow": (62, 363572, 53473), "market1501": (751, 12936, 3368 + 15913),
    "dukemtmc": (702, 16522, 2228 + 17661), "veri776": (576, 37778, 1678 + 11579), "msmt17": (1041, 32621, 11659 + 82161, 30248),
}

if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/birds.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet().save(target)
    print(f"wrote {target}")
