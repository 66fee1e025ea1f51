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
import hashlib
import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageOps
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
    if not 0 <= recipe.val_fraction < 1:
        raise ValueError(f"--val-fraction {recipe.val_fraction}: must be at least 0 and below 1; try 0.1")
    if name != "toy":
        if root is None:
            raise ValueError(f"--data {name} needs a folder; add --root DIR (the unpacked dataset), or try --data toy, which needs none")
        if not Path(root).exists():
            raise FileNotFoundError(f"--root {root}: no such folder; give the folder that holds the unpacked {name} dataset")
        if not Path(root).is_dir():
            raise ValueError(f"--root {root}: is a file; give the folder that holds the unpacked {name} dataset")
        root = Path(root)
    splits = DATASETS[name](root, recipe)
    classes, *published = PUBLISHED.get(name, (0, 0, 0))
    if len(splits.classes) == classes and [len(splits.train), len(splits.test)] != published:
        splits.note += f" WARNING: published are {published[0]:,} train and {published[1]:,} test images: look for missing files in {root}."
    if splits.test is None:  # own photos without a test folder
        if not recipe.val_fraction:
            raise ValueError(f"{root} has no test or val folder; make {root}/train and {root}/test, or add --val-fraction 0.2 to test on a fifth of the photos")
        splits.train, splits.test = cut(splits.train, recipe.val_fraction)
        splits.note += " The test images were cut from train."
    elif recipe.val_fraction:
        if splits.val is not None or splits.test.query is not None:
            raise ValueError(f"--val-fraction {recipe.val_fraction}: {name} has its own validation or query images; leave --val-fraction out")
        splits.train, splits.val = cut(splits.train, recipe.val_fraction)
    val = f" {len(splits.val):,} val," if splits.val else ""
    splits.note = f"{len(splits.train):,} train,{val} {len(splits.test):,} test images of {len(splits.classes)} classes. {splits.note.strip()}".strip()
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
        raise ValueError(f"{path}: cannot be read as a photo ({error or type(error).__name__}); replace or remove the file") from None


def _turned(image, upright):
    return upright and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter: width and height change places


def _header(path, upright):
    """Open without decoding -> PIL image and its size (h, w) as it will be once decoded."""
    image = Image.open(path)
    return image, image.size if _turned(image, upright) else image.size[::-1]


def _decode(path, image, draft, upright):
    with image:
        if draft:
            image.draft("RGB", draft[::-1] if _turned(image, upright) else draft)
        if upright and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bit; Pillow's own conversion would clip it to white
            image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
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
    if min(H, W) < 1 or scaled[0] < H or scaled[1] < W:
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
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


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
        self.split, self.recipe, self.train, self.seed = split, recipe, train, seed
        if recipe.boxes and split.boxes is None:
            raise ValueError("--boxes: this dataset has no object boxes; leave --boxes out")

    def __len__(self):
        return len(self.split)

    def region(self, index, size):
        """The part of a photo of size (h, w) that the input shows: its object box with recipe.boxes, else None, all of it."""
        return object_region(self.split.boxes[index], size, self.split.context) if self.recipe.boxes else None

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
            resample = list(Image.Resampling)[rng.integers(len(Image.Resampling))]
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
    Image.init()
    return frozenset(e for e, f in Image.registered_extensions().items() if f in Image.OPEN and f not in ("BUFR", "GRIB", "HDF5", "MPEG", "WMF"))


def photos_in(folder):
    """Sorted paths of the photos in a folder and its subfolders; hidden files are left out."""
    found = []
    for where, _, names in os.walk(folder, followlinks=True):
        found += [f"{where}/{n}" for n in names if os.path.splitext(n)[1].lower() in photo_extensions() and not n.startswith(".")]
    return sorted(found)


def folders_in(folder):
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
    return Splits(train, test, classes, val, "".join(f" {role} is {d}." for role, d in zip(("Test", "Val"), at)))


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
        wnid = {row[0]: row[1].split()[0] for row in csv.reader(open(table, newline="")) if row and row[0] != "ImageId"}
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

# ------------------------------------------------------------------------------------------------ re-identification

# ------------------------------------------------------------------------------------------------ toy birds


DATASETS = {"folder": load_folder, "imagenet": load_imagenet}  # name -> loader(root, recipe) -> Splits

PUBLISHED = {"imagenet": (1000, 1281167, 50000)}  # name -> classes, training images, test images of the full dataset
