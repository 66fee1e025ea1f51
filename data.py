"""What is known about images: datasets, how a photo becomes an input, toy birds, how answers are scored.

Order: splits -> photo to input -> batches -> loading a dataset -> official sets -> toy birds -> scores.

One door: a Split lists photos and the truth about them, Photos makes inputs of them, and `score` compares a
model's answers with the truth. A view is one box of a photo: it cuts the pixels, and it carries boxes from
the photo to the input and back.

Every random choice is a function of its key: a training photo of (seed, epoch, index), an epoch's order of
(seed, epoch), a bird of (preset, split, index), a validation cut of the file names. So runs resume exactly,
with any number of workers.
"""
import colorsys
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import re
import struct
import tarfile
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.datasets import Flowers102
from torchvision.models import ResNet50_Weights
from torchvision.ops import box_iou
from torchvision.transforms import RandomErasing
from torchvision.transforms.v2 import functional as TF

Image.MAX_IMAGE_PIXELS = None  # `header` has our own limit, and fMoW's photos pass Pillow's

# ------------------------------------------------------------------------------------------- splits


@dataclass
class Split:
    """One split as parallel lists; what a dataset does not have is None.

    Boxes are xyxy, half-open, in pixels of the photo on disk, and may reach over its edge.
    """

    paths: list  # str of a file; for the toy "birds/train/17"
    labels: list | None  # int class (re-identification: identity) per image; None: photos to predict
    boxes: np.ndarray | None = None  # (n, 4) float32 object boxes
    parts: np.ndarray | None = None  # (n, P, 4) float32 part boxes; a part that is not visible is nan
    part_names: tuple = ()  # P names
    signature: tuple = ()  # P bools: does this part carry the class (toy: yes or decoy; CUB: all yes)
    cameras: list | None = None  # re-identification: int camera per image
    query: list | None = None  # re-identification test: True for queries, False for the gallery
    images: list | None = None  # toy: the drawn images (H, W, 3) uint8; else photos are opened from paths
    banner: int = 0  # pixels to cut off the bottom of each photo (Aircraft's copyright line)
    context: bool = False  # recipe.boxes: crop the boxes with fMoW's margin around them
    upright: bool = False  # turn photos as their EXIF says: own photos yes, benchmarks no (as the authors)

    def __len__(self):
        return len(self.paths)

    def take(self, indices):
        """The images of `indices`, in that order, as a new Split."""
        taken = {k: v[indices] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        taken |= {k: [v[i] for i in indices] for k, v in vars(self).items() if isinstance(v, list)}
        return dataclasses.replace(self, **taken)


@dataclass
class Splits:
    """train, test and optionally val, and the class names in label order."""

    train: Split
    test: Split
    classes: list
    val: Split | None = None
    note: str = ""  # printed before training: counts, and what is not as published


# ------------------------------------------------------------------------------------------- photo to input

ORDER, ITEM = 1, 2  # first word of a random stream: what it is for
FILTERS = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic")}
FILTERS["random"] = FILTERS["bilinear"]  # in testing
FORMATS = "JPEG PNG WEBP TIFF BMP GIF PPM".split()  # no others: EPS would start Ghostscript
EXTENSIONS = tuple(".jpg .jpeg .png .webp .tif .tiff .bmp .gif .ppm .pgm".split())
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> the Image.Transpose that undoes it
QUARTERS = (2, 4, 5, 6)  # of these, the ones in which width and height change places


def photos_in(folder):
    """Sorted paths of the photos in a folder and its subfolders, without hidden files and folders."""
    found = glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True)
    return sorted(path for path in found if path.lower().endswith(EXTENSIONS))


def list_photos(paths):
    """Paths of photos and of folders of photos -> paths of photos."""
    found = []
    for path in map(str, paths):
        inside = photos_in(path) if os.path.isdir(path) else glob.glob(glob.escape(path))
        if not inside:
            raise FileNotFoundError(f"{path}: no such photo, or no photos in it: {' '.join(EXTENSIONS)}")
        found += inside
    return found


@contextlib.contextmanager
def named(path):
    """Whatever goes wrong inside with a photo becomes one message that names it."""
    try:
        yield
    except MemoryError:  # says nothing about the photo
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        why = str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as a photo ({why}); replace or remove the file") from None


def header(path, upright):
    """Open a photo without decoding it -> (PIL image, how to turn it, its size (h, w) once turned)."""
    if not os.path.isfile(path):
        raise ValueError("no such file")
    image, turn = Image.open(path, formats=FORMATS), None
    w, h = image.size
    if w * h > (2**27 if "progressive" in image.info else 2**28) or max(w, h) > 2**16:
        raise ValueError(f"{w} x {h} pixels are too many")
    if upright and "exif" in image.info:  # not in a TIFF, which Pillow turns itself
        with contextlib.suppress(Exception):  # a damaged block says nothing about the photo
            turn = TURNS.get(image.getexif().get(0x0112))
    return image, turn, (w, h) if turn in QUARTERS else (h, w)


def decode(image, turn, need):
    """Opened photo of any kind -> RGB, turned, over white. A JPEG may be smaller, down to `need` (w, h).

    What is held in several copies may have fewer pixels: less than 2 GB at any time.
    """
    image.draft("RGB", need[::-1] if turn in QUARTERS else need)
    w, h = image.size
    once = image.mode in ("L", "RGB") and turn is None and image.format not in ("WEBP", "TIFF")
    if w * h > 2**26 and (not once or {"progressive", "transparency"} & image.info.keys()):
        raise ValueError(f"{w} x {h} pixels are too many for a photo of this kind")
    if image.mode in ("F", "I") and image.format == "TIFF":
        raise ValueError("pixels of 32 bits, whose range nobody knows; save it with 8 or 16")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image, np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    image.load()
    return image if turn is None else image.transpose(turn)


def open_photo(path, upright=True, longest=None):
    """A photo for pictures -> PIL RGB, its longer side at most `longest` pixels."""
    with named(path):
        image, turn, (h, w) = header(path, upright)
        longest = longest or max(w, h)
        image = decode(image, turn, (longest * w / max(w, h), longest * h / max(w, h)))
        image.thumbnail((longest, longest), FILTERS["bicubic"])
        return image


def object_region(box, size, context=False):
    """Box clipped to a photo of size (h, w); `context` first adds fMoW's margin, large around small ones."""
    box, sides = np.float32(box), np.tile(np.float32(size[::-1]), 2)
    if context:
        spans = np.tile(box[2:] - box[:2], 2)
        margins = np.float32([2.0, 1.0, 0.5, 0.3, 0.2, 0.15])[(10 * spans / sides).astype(int).clip(0, 5)]
        box = box + margins * spans / 2 * np.float32([-1, -1, 1, 1])
    x1, y1, x2, y2 = np.clip(box, 0, sides).tolist()
    if not (x2 - x1 >= 1 and y2 - y1 >= 1):
        raise ValueError(f"its object box {np.round(box, 1)} is outside; correct it or train with --no-boxes")
    return x1, y1, x2, y2


def view(region, recipe, rng=None):
    """The box of a photo that becomes the input, from the region xyxy to look at (all, or its object).

    The region is thought of as resized to recipe.resize; of that, testing shows the centre, and training
    (rng) what recipe.crop says.
    """
    if rng and recipe.crop == "resized":
        return random_box(region, recipe, rng)
    (x1, y1, x2, y2), (H, W) = region, recipe.image_size
    h, w = recipe.resize if any(recipe.resize) else recipe.image_size
    top, left = round((h - H) / 2), round((w - W) / 2)
    if rng and recipe.crop == "random":
        top, left = (int(rng.integers(-recipe.pad, room + recipe.pad + 1)) for room in (h - H, w - W))
    u, v = (x2 - x1) / w, (y2 - y1) / h  # pixels of the photo in one of the resized region
    return x1 + left * u, y1 + top * v, x1 + (left + W) * u, y1 + (top + H) * v


def random_box(region, recipe, rng):
    """Random area and aspect in a region; after ten misses the largest allowed in the centre."""
    (x1, y1, x2, y2), (least, most) = region, recipe.crop_ratio
    w, h = x2 - x1, y2 - y1
    for _ in range(10):
        area = w * h * rng.uniform(*recipe.crop_area)
        ratio = math.exp(rng.uniform(math.log(least), math.log(most)))
        cw, ch = math.sqrt(area * ratio), math.sqrt(area / ratio)
        u, v = rng.random(2)
        if cw <= w and ch <= h:
            break
    else:
        ratio, u, v = min(max(w / h, least), most), 0.5, 0.5
        cw, ch = min(w, h * ratio), min(h, w / ratio)
    x1, y1 = x1 + u * (w - cw), y1 + v * (h - ch)
    return x1, y1, x1 + cw, y1 + ch


def cut(image, box, size, resample):
    """A box of an image resized to (H, W), black over the edge. Only these pixels are computed."""
    (H, W), (x1, y1, x2, y2), (w, h) = size, box, image.size
    u, v = (x2 - x1) / W, (y2 - y1) / H
    left, top = round(max(0, -x1) / u), round(max(0, -y1) / v)
    right, bottom = W - round(max(0, x2 - w) / u), H - round(max(0, y2 - h) / v)
    inside = max(0, x1), max(0, y1), min(x2, w), min(y2, h)
    page = Image.new("RGB", (W, H))
    page.paste(image.resize((right - left, bottom - top), resample, inside), (left, top))
    return page


def to_input(boxes, shown, size):
    """Boxes (..., 4) in pixels of a photo -> of the input (H, W) that shows the box `shown` of it."""
    corner, scale = frame(shown, size)
    return (boxes - corner) / scale


def to_photo(boxes, shown, size):
    """The inverse of `to_input`: boxes in pixels of the input -> of the photo."""
    corner, scale = frame(shown, size)
    return np.asarray(boxes) * scale + corner


def frame(shown, size):
    """Where the input (H, W) begins in the photo, and the photo's pixels in one of it, for x, y, x, y."""
    corner = np.tile(shown[..., :2], 2)
    return corner, (np.tile(shown[..., 2:], 2) - corner) / np.tile(size[::-1], 2)


def augment(image, recipe, rng):
    """Mirror; rotation, shift and zoom; colour jitter in random order: PIL -> PIL, as the recipe says."""
    if rng.random() < recipe.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    moves = recipe.rotate or recipe.translate or recipe.zoom != (1.0, 1.0)
    if moves and rng.random() < recipe.affine_prob:
        angle, zoom = rng.uniform(-recipe.rotate, recipe.rotate), rng.uniform(*recipe.zoom)
        shift = [round(rng.uniform(-recipe.translate, recipe.translate) * side) for side in image.size]
        image = TF.affine(image, angle, shift, zoom, [0.0, 0.0], TF.InterpolationMode.BILINEAR)
    names = [name for name in ("brightness", "contrast", "saturation", "hue") if getattr(recipe, name)]
    if names and rng.random() < recipe.jitter_prob:
        for name in rng.permutation(names):
            most, middle = getattr(recipe, name), float(name != "hue")
            amount = max(rng.uniform(middle - most, middle + most), middle - 1)
            image = getattr(TF, f"adjust_{name}")(image, amount)
    return image


def erase(images, recipe):
    """Random erasing of normalised images (B, 3, H, W), in place: N(0, 1) noise in 2 to 33 % of the area.

    Part of the training step, as the reference erases after normalising: that noise does not fit into bytes.
    """
    erasing = RandomErasing(recipe.erasing, (0.02, 1 / 3), (0.3, 1 / 0.3), "random", inplace=True)
    for image in images:
        erasing(image)
    return images


class Photos(torch.utils.data.Dataset):
    """A split as tensors: item -> (uint8 image (3, H, W), label, index, the box of the photo it shows).

    Key: an index, or (epoch, index); every random choice of training is drawn from (seed, epoch, index). A
    photo that cannot be read is a ValueError that names it; with `skip`, training takes the next one of the
    split, and testing gives black, whose box is nan.
    """

    def __init__(self, split, recipe, train=False, seed=0, skip=False):
        (h, w), (H, W) = recipe.resize, recipe.image_size
        if (h or w) and (h < H or w < W):
            raise ValueError(f"--resize {h},{w} is smaller than --image-size {H},{W}; give at least {H},{W}")
        if recipe.boxes and split.boxes is None:
            raise ValueError("--boxes: this dataset has no object boxes; use --no-boxes")
        self.split, self.recipe, self.train, self.seed, self.skip = split, recipe, train, seed, skip

    def __len__(self):
        return len(self.split)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([ITEM, self.seed, epoch, index]) if self.train else None
        try:
            with named(self.split.paths[index]):
                image, shown = self.read(index, rng)
        except ValueError:
            if not self.skip:
                raise
            if self.train:
                return self[epoch, (index + 1) % len(self)]
            image, shown = Image.new("RGB", self.recipe.image_size[::-1]), (math.nan,) * 4
        if self.train:
            image = augment(image, self.recipe, rng)
        pixels = np.stack([np.asarray(band) for band in image.split()])  # the fastest of six ways
        label = self.split.labels[index] if self.split.labels else -1
        return torch.from_numpy(pixels), label, index, torch.from_numpy(np.array(shown))

    def read(self, index, rng):
        """Cut the view of a photo out of it -> PIL RGB of image_size, the box of the view."""
        split, recipe = self.split, self.recipe
        if split.images is None:
            image, turn, (h, w) = header(split.paths[index], split.upright)
        else:
            image, turn = Image.fromarray(split.images[index]), None
            w, h = image.size
        region = (0, 0, w, h - split.banner)
        if recipe.boxes:
            region = object_region(split.boxes[index], (h - split.banner, w), split.context)
        x1, y1, x2, y2 = box = view(region, recipe, rng)
        H, W = recipe.image_size
        need = math.ceil(W * w / (x2 - x1) - 1e-6), math.ceil(H * h / (y2 - y1) - 1e-6)
        image = decode(image, turn, need)
        k = 0.5 ** round(math.log2(w / image.width))  # a JPEG may be decoded at 1/2, 1/4, 1/8, rounded up
        resample = FILTERS[recipe.interpolation]
        if rng and recipe.interpolation == "random":
            resample = Image.Resampling(rng.integers(6))
        return cut(image, (x1 * k, y1 * k, x2 * k, y2 * k), (H, W), resample), box


# ------------------------------------------------------------------------------------------- batches


def epoch_batches(split, recipe, seed, epoch, rank=0, size=1):
    """Process `rank`'s share of the batches of an epoch: lists of keys (epoch, index) for Photos.

    The order is a function of (seed, epoch), whatever the number of processes: each takes its slice of every
    batch. A last short batch is dropped, unless it is the only one. With recipe.instances, batches are P
    identities x K images, and every part of a batch (--accumulate, a process's share) must hold at least two
    whole identities.
    """
    n, K, parts = len(split), recipe.instances, size * recipe.accumulate
    unit, least, most = size, parts, math.inf
    if K:
        unit, least, most = K * parts, 2 * K * parts, K * len(set(split.labels))
    if recipe.batch_size % unit or not least <= recipe.batch_size <= most or n < parts:
        raise ValueError(
            f"--batch-size {recipe.batch_size} of {n} images does not split over {size} processes with "
            f"--accumulate {recipe.accumulate}, --instances {K}; take a multiple of {unit}, "
            f"{least} to {most}, and {parts} images or more"
        )
    rng, batch = np.random.default_rng([ORDER, seed, epoch]), min(n, recipe.batch_size)
    if K:
        batches = identity_batches(np.array(split.labels), recipe.batch_size // K, K, rng)
    else:
        batches = rng.permutation(n)[: n // batch * batch].reshape(-1, batch).tolist()
    share = lambda some: some[len(some) * rank // size : len(some) * (rank + 1) // size]
    return [[(epoch, i) for i in share(some)] for some in batches]


def identity_batches(labels, P, K, rng):
    """One epoch of n // (P * K) batches of P identities x K images (TransReID's sampler, at a fixed length).

    An identity's images are shuffled and cut into groups of K; one with fewer is filled up by drawing again.
    """
    batches, groups = [], {}
    while len(batches) < max(1, len(labels) // (P * K)):
        if len(groups) < P:  # deal anew
            for label in np.unique(labels):
                images = rng.permutation(np.flatnonzero(labels == label))
                images = np.append(images, rng.choice(images, max(0, K - len(images))))
                groups[label] = images[: len(images) // K * K].reshape(-1, K).tolist()
        chosen = rng.choice(list(groups), P, replace=False)
        batches.append([i for label in chosen for i in groups[label].pop()])
        groups = {label: left for label, left in groups.items() if left}
    return batches


# ------------------------------------------------------------------------------------------ loading a dataset


def load(name, root, recipe, skip_bad=False):
    """Dataset `name` from the folder `root` -> Splits; recipe.val_fraction cuts val out of train.

    Own photos are looked through first; `skip_bad` leaves out what cannot be read, and the note says so.
    Raises ValueError or FileNotFoundError that says what was given, what is allowed and what to do next.
    """
    if name != "toy" and not os.path.isdir(root or ""):
        given = f"--root {root} is no folder" if root else "it needs a folder"
        raise FileNotFoundError(f"--data {name}: {given}; add --root DIR, the dataset's, or try --data toy")
    root, fraction = Path(root or "."), recipe.val_fraction
    splits = load_official(name, root, recipe) if name in SETS else DATASETS[name](root, recipe)
    if name == "folder":
        look_through(splits, skip_bad)
    if splits.test is None and not fraction:
        raise ValueError(
            f"--root {root}: no test or val folder; put photos into DIR/train/CLASS/ and DIR/test/CLASS/, "
            "or add --val-fraction 0.2 to test on a fifth of them"
        )
    if fraction:
        if splits.val or splits.test and splits.test.query:
            raise ValueError(f"--val-fraction {fraction}: {name} has val or query images; leave it out")
        splits.train, held = hold_out(splits.train, fraction)
        if not held:
            raise ValueError(f"--val-fraction {fraction}: no class has two photos; add some or leave it out")
        if splits.test:
            splits.val = held
        else:
            splits.test = held
            splits.note += "; the test images were cut from train"
    train, test, val, classes = splits.train, splits.test, splits.val, splits.classes
    if not test.query and (untested := sorted(set(train.labels) - set(test.labels))):
        names = ", ".join(classes[label] for label in untested[:5])
        splits.note += f"; no test images of {names}{', ...' * (len(untested) > 5)}"
    counts = f"{len(train):,} train,{f' {len(val):,} val,' if val else ''} {len(test):,} test images"
    splits.note = f"{counts} of {len(classes)} classes{splits.note}"
    return splits


def load_official(name, root, recipe):
    """An official set -> Splits; other counts than the published ones are noted.

    Whatever is wrong with it becomes one error that says so; `reading` names the file.
    """
    base = find(name, root)
    try:
        splits = DATASETS[name](base, recipe)
        paths = [path for split in (splits.train, splits.test, splits.val) if split for path in split.paths]
        lost = [path for path in paths if not os.path.exists(path)]
        if lost:
            share = f"{len(lost):,} of {len(paths):,} photos are missing"
            raise ValueError(f"{lost[0]} is listed but not there ({share})")
        if not (splits.train and splits.test):
            raise ValueError("there are no training or no test photos")
        found = len(splits.classes), len(splits.train), len(splits.test)
    except Exception as error:  # of text, numbers, JSON, XML, MATLAB files
        wrong = f"{base} is damaged or not the official release: {error or type(error).__name__}"
        advice = "unpack the official archive again, or use photos in class folders with --data folder"
        raise ValueError(f"--data {name}: {wrong}; {advice}") from None
    published = SETS[name][3:6]
    if found != published and 0 not in published and recipe.train_split == "trainval":
        splits.note += f"; classes, training and test images: {found}, published: {published}"
    return splits


def hold_out(split, fraction):
    """Cut `fraction` of each class -> (rest, cut): by hashes of file names, steady when files are added.

    At least one image on each side; the single image of a class stays.
    """
    key = lambda i: hashlib.sha256(os.path.basename(split.paths[i]).encode()).digest()
    groups, held = {}, set()
    for i in sorted(range(len(split)), key=key):
        groups.setdefault(split.labels[i], []).append(i)
    for own in groups.values():
        held |= set(own[: min(max(1, round(fraction * len(own))), len(own) - 1)])
    return split.take(sorted(set(range(len(split))) - held)), split.take(sorted(held))


def look_through(splits, skip_bad):
    """Read the header of every own photo: those that cannot be read are all named, or left out and noted."""
    bad = {}
    for side, split in vars(splits).items():
        if isinstance(split, Split):
            for path in split.paths:
                try:
                    header(path, True)[0].close()
                except Exception as error:  # Pillow raises a dozen kinds
                    bad[path] = str(error).partition(" '")[0]
            setattr(splits, side, split.take([i for i, path in enumerate(split.paths) if path not in bad]))
    if bad:
        listed = ", ".join(f"{path} ({why})" for path, why in [*bad.items()][:20]) + ", ..." * (len(bad) > 20)
        if not skip_bad:
            advice = "replace or remove them, or add --skip-bad-images to leave them out"
            raise ValueError(f"{len(bad)} photos cannot be read: {listed}; {advice}")
        splits.note += f"; left out: {listed}"


def folders_in(folder):
    """Folders inside a folder, by name, without hidden ones; links that lead nowhere too, to be named."""
    return sorted(d for d in folder.iterdir() if not d.is_file() and not d.name.startswith("."))


def class_folders(folder, classes=None):
    """A folder of class folders -> (Split, class names); `classes` of train fixes the labels."""
    folders, paths, labels = folders_in(folder), [], []
    if len(folders) < (1 if classes else 2):
        raise ValueError(
            f"{folder} holds {len(folders)} class folders; put the photos of each class into a folder of "
            f"their own, of at least two classes: {folder}/CLASS/photo.jpg, no level deeper"
        )
    classes = classes or [d.name for d in folders]
    for d in folders:
        found = photos_in(d)
        if not d.exists():
            raise ValueError(f"{d} is a link that leads nowhere; mend or remove it")
        if d.name not in classes:
            raise ValueError(f"{d} is no class of train; rename or remove it, or add photos of it to train")
        if not found:
            raise ValueError(f"{d} holds no photos ({' '.join(EXTENSIONS)}); add some or remove the folder")
        paths += found
        labels += [classes.index(d.name)] * len(found)
    return Split(paths, labels), classes


def load_folder(root, recipe):
    """DIR/train and DIR/test (or val), each with class folders; or class folders alone, for `load` to cut."""
    present = {path.name for path in root.iterdir()} - {"train", "test", "val"}
    for name, source in SETS.items():
        if len(present & set(re.split("[ |]", source.files))) > 1:
            raise ValueError(f"--root {root} looks like {name}, an official set: use --data {name}")
    named = {d.name.lower(): d for d in folders_in(root)}
    at = [named[n] for n in ("test", "testing", "val", "valid", "validation") if n in named]
    first = named.get("train", named.get("training", root))
    if at and first == root:
        raise ValueError(f"{root} has {at[0].name} and no train; put photos into {root}/train/CLASS/")
    train, classes = class_folders(first)
    test, val, *_ = [class_folders(d, classes)[0] for d in at] + [None, None]
    for split in filter(None, (train, test, val)):
        split.upright = True
    return Splits(train, test, classes, val, f"; test is {at[0]}" if at else "")


# ------------------------------------------------------------------------------------------- official sets


def find(name, root):
    """The folder of an official set: the official folder in root, or root itself."""
    source = SETS[name]
    base = next((root / folder for folder in source.folders.split() if (root / folder).exists()), root)
    lost = [[f for f in files.split() if not (base / f).exists()] for files in source.files.split("|")]
    if all(lost):
        files, (folder, *_) = " or ".join(map(" ".join, lost)), source.folders.split()
        raise FileNotFoundError(
            f"--data {name}: {base} lacks {files}; {source.source} and unpack it into {root}, as {folder}"
        )
    return base


@contextlib.contextmanager
def reading(path):
    """The bytes of a file of a set; whatever is wrong with them inside becomes an error that names it."""
    try:
        yield path.read_bytes()
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}"[:400]) from None


class Lines(dict):
    """Lines "key rest" of a text file as key -> kind(rest); a key that it lacks is an error that names it."""

    def __init__(self, path, kind=str, separator=" "):
        self.path = path
        with reading(path) as content:
            for line in content.decode("utf-8-sig", "replace").split("\n"):
                key, _, rest = line.strip().partition(separator)
                if key:
                    self[key] = kind(rest.strip())

    def __missing__(self, key):
        raise ValueError(f"{self.path} has no line for {key}")


def four(text):
    """Text of four numbers -> floats; what no photo can have is refused."""
    numbers = tuple(map(float, text.split()))
    if len(numbers) != 4 or not all(abs(number) < 1e6 for number in numbers):
        raise ValueError(f"not the four numbers of a box: {text}")
    return numbers


def read_mat(data):
    """Bytes of a MATLAB level 5 file -> {variable: array, str, list (cell), dict of lists (struct array)}.

    Written here because scipy is not a package of ours; reads what Cars, Dogs and Flowers use, and no more.
    """
    dtypes = "- i1 u1 <i2 <u2 <i4 <u4 <f4 - <f8 - - <i8 <u8".split()
    codecs = {4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}

    def elements(view):  # (type, payload) one after the other; up to 4 bytes are packed into the tag itself
        while view:
            kind, size = struct.unpack_from("<II", view)
            start = 8
            if kind >> 16:
                kind, size, start = kind & 0xFFFF, kind >> 16, 4
            end = start + size
            yield kind, view[start:end]
            view = view[end if kind == 15 else end + -end % 8 :]  # 15 is compressed, and not padded

    def matrix(view):  # payload of a matrix: flags, dimensions, name, then what the class says -> name, value
        (_, flags), (_, dims), (_, name), *parts = elements(view)
        kind, count, fields = flags[0], np.frombuffer(dims, "<i4").prod(), [""]
        if kind > 2:
            ((storage, stored),) = parts
            codec = codecs.get(storage, "latin-1")
            value = str(stored, codec) if kind == 4 else np.frombuffer(stored, dtypes[storage])
        else:  # cell, struct array: one matrix for each entry, all fields of an entry together
            if kind == 2:
                _, (_, names), *parts = parts
                fields = bytes(names).replace(b"\0", b" ").decode().split()
            value = [matrix(inner)[1] for _, inner in parts]
        if len(value) != count * len(fields):
            raise ValueError("it holds more or fewer values than it says")
        if kind == 2:
            value = {field: value[i :: len(fields)] for i, field in enumerate(fields)}
        return bytes(name).decode(), value

    if data[124:128] != b"\0\1IM":
        raise ValueError("no MATLAB level 5 file")
    variables = {}
    for kind, payload in elements(memoryview(data)[128:]):
        if kind == 15:
            payload = zlib.decompressobj().decompress(payload, 2**25)  # bytes; the official files need 2 MB
            ((_, payload),) = elements(memoryview(payload))
        name, value = matrix(payload)
        variables[name] = value
    return variables


def columns(path, struct, texts, numbers=()):
    """Variables of a .mat file, or fields of its struct array: a list of str or int each."""
    with reading(path) as content:
        held = read_mat(content)
        held = held[struct] if struct else held
        found = [list(map(str.strip, held[name])) for name in texts]
        return found + [[int(value.item()) for value in held[name]] for name in numbers]


def splits_of(rows, keys, classes, note="", first=0, **more):
    """Rows (side, path, key of the class[, box[, parts]]) -> Splits of the sides train, test and val.

    first: the number of a box's first pixel; boxes that count from 1 also hold their last one.
    """
    def split(side):
        held = [row for which, *row in rows if which == side]
        if held:
            paths, labels, *truth = zip(*held)
            boxes = (np.array(values, np.float32) - np.float32([first, first, 0, 0]) for values in truth)
            return Split(list(paths), [keys.index(key) for key in labels], *boxes, **more)

    return Splits(split("train"), split("test"), classes, split("val"), note)


def load_imagenet(base, recipe):
    """ILSVRC2012: folders of wnids in train and val; of Kaggle's val, LOC_val_solution.csv has the labels."""
    solution = base / "../../../LOC_val_solution.csv"
    train, wnids = class_folders(base / "train")
    if solution.exists() and not folders_in(base / "val"):
        labels, paths = Lines(solution, separator=","), photos_in(base / "val")
        test = Split(paths, [wnids.index(labels[Path(path).stem].split()[0]) for path in paths])
    else:
        test, _ = class_folders(base / "val", wnids)
    whole = len(wnids) == 1000
    names = ResNet50_Weights.DEFAULT.meta["categories"] if whole else wnids  # in the order of the wnids
    return Splits(train, test, names)


def load_birds(base, recipe):
    """CUB-200-2011 and NABirds: files joined by image id; the classes are the ids in use; boxes x y w h.

    A part is a square about its point in parts/part_locs.txt that reaches a tenth of the object's longer side
    (PCK at 0.1), at least a pixel, to each side.
    """
    paths, names = Lines(base / "images.txt"), Lines(base / "classes.txt")
    class_of, box = Lines(base / "image_class_labels.txt", int), Lines(base / "bounding_boxes.txt", four)
    side = Lines(base / "train_test_split.txt", {"0": "test", "1": "train"}.__getitem__)
    rows, points, parts, about, by_number = [], {}, [], {}, lambda number: (len(number), number)
    if (base / "parts/part_locs.txt").exists():
        names_of_parts = Lines(base / "parts/parts.txt")
        parts = sorted(names_of_parts, key=by_number)
        about = {"part_names": tuple(map(names_of_parts.get, parts)), "signature": (True,) * len(parts)}
        with reading(base / "parts/part_locs.txt") as content:
            for line in content.decode().splitlines():
                image, part, x, y, visible = line.split()
                if visible == "1":
                    points[image, part] = four(f"{x} {y} {x} {y}")
    for i in sorted(paths, key=by_number):
        x, y, w, h = box[i]
        reach = max(1, 0.1 * max(w, h)) * np.array([-1, -1, 1, 1])
        squares = [points.get((i, part), (math.nan,) * 4) + reach for part in parts]
        truth = (x, y, x + w, y + h), squares
        rows.append((side[i], f"{base}/images/{paths[i]}", class_of[i], *truth[: 1 + bool(parts)]))
    used = sorted(set(class_of.values()))
    classes = [re.sub(r"^\d+\.", "", names[str(c)]).replace("_", " ") for c in used]
    return splits_of(rows, used, classes, **about)


def load_cars(base, recipe):
    """Stanford Cars, original (devkit) or combined (car_ims)."""
    keys, names, rows = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class"], base / "cars_annos.mat", []
    if names.exists():
        for file, *box, c, test in zip(*columns(names, "annotations", ["relative_im_path"], [*keys, "test"])):
            rows.append(("test" if test else "train", f"{base}/{file}", c, box))
    else:
        names = base / "devkit/cars_meta.mat"
        mats = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
        for side, mat in mats.items():
            for file, *box, c in zip(*columns(base / mat, "annotations", ["fname"], keys)):
                rows.append((side, f"{base}/cars_{side}/{file}", c, box))
    (classes,) = columns(names, "", ["class_names"])
    return splits_of(sorted(rows), range(1, len(classes) + 1), classes, first=1)


def load_aircraft(base, recipe):
    """FGVC-Aircraft 2013b, 100 variants in the order of variants.txt."""
    classes = list(Lines(base / "variants.txt", separator="\n"))
    boxes, rows = Lines(base / "images_box.txt", four), []
    for side, name in (("train", "train"), (val_side(recipe), "val"), ("test", "test")):
        for image, variant in Lines(base / f"images_variant_{name}.txt", classes.index).items():
            rows.append((side, f"{base}/images/{image}.jpg", variant, boxes[image]))
    banner = 20 * recipe.crop_banner
    return splits_of(sorted(rows), range(len(classes)), classes, first=1, banner=banner)


def load_flowers(base, recipe):
    """Flowers-102: trained on trnid and valid (or trnid alone), tested on tstid; some codes swap them."""
    (labels,) = columns(base / "imagelabels.mat", "", [], ["labels"])
    numbers = columns(base / "setid.mat", "", [], ["trnid", "valid", "tstid"])
    if max(map(max, numbers)) > len(labels):
        raise ValueError("setid.mat lists images that imagelabels.mat has not")
    sides = zip(("train", val_side(recipe), "test"), numbers)
    rows = [(side, f"{base}/jpg/image_{i:05d}.jpg", labels[i - 1]) for side, images in sides for i in images]
    return splits_of(sorted(rows), range(1, 103), Flowers102.classes)


def val_side(recipe):
    """Where the official validation images go."""
    return "train" if recipe.train_split == "trainval" else "val"


def load_dogs(base, recipe):
    """Stanford Dogs: the official lists; boxes from Annotation, the largest dog of a photo."""
    rows, annotations = [], base / "Annotation"
    for side in ("train", "test"):
        for file in columns(base / f"{side}_list.mat", "", ["file_list"])[0]:
            box = [dog_box(annotations / file.rsplit(".", 1)[0])] if annotations.exists() else []
            rows.append((side, f"{base}/Images/{file}", file.split("/")[0], *box))
    breeds = sorted({row[2] for row in rows})
    classes = [breed.partition("-")[2].replace("_", " ") for breed in breeds]
    note = "; all its photos, those of test too, are in ImageNet's training set: weights from there saw them"
    return splits_of(sorted(rows), breeds, classes, note)


def dog_box(path):
    """The largest box of an annotation in XML, whose numbers are in the order x1 y1 x2 y2."""
    with reading(path) as content:
        boxes = [four(" ".join(box.itertext())) for box in ElementTree.fromstring(content).iter("bndbox")]
        return max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))


def load_plant(base, recipe):
    """Plant Pathology 2020 (train.csv, 4 classes) or iCassava 2019 (train/cbb, cbsd, cgm, cmd, healthy).

    The paper calls its set Plant Pathology, but the 5 classes and 9,436 images of its Table 1 are iCassava's.
    The test labels of both are hidden: a fifth of each class is the test split, if there is no folder of it.
    """
    table = base / "train.csv"
    if table.exists():
        with reading(table) as content:  # image_id and the classes; of these, a single 1 in each line
            (_, *classes), *lines = (line.split(",") for line in content.decode("utf-8-sig").split())
            marks = np.eye(len(classes), dtype=int).astype(str).tolist()
            rows = [("train", f"{base}/images/{image}.jpg", line) for image, *line in sorted(lines)]
            train = splits_of(rows, marks, classes).train
    else:
        train, classes = class_folders(base / "train")
    if (base / "test" / classes[0]).exists():
        test, val = (class_folders(base / side, classes)[0] for side in ("test", "validation"))
        return Splits(train, test, classes, val)
    note = "; its test labels are hidden: a fifth of each labelled class is the test split"
    return Splits(*hold_out(train, 0.2), classes, note=note)


def load_fmow(base, recipe):
    """fMoW-rgb: train, val, and test as test_gt_mapping.json labels it (without it, val is test)."""
    photos = [
        (side, photo, photo.parts[-3], photo.with_suffix(".json"))
        for side in ("train", "val") for photo in base.glob(f"{side}/*/*/*_rgb.jpg")
    ]
    mappings = [folder / "test_gt_mapping.json" for folder in (base, base / "groundtruth")]
    mapping = next(filter(Path.exists, mappings), None)
    if mapping:
        with reading(mapping) as content:
            for pair in json.loads(content):
                given = mapping.parent / pair["input"]
                for photo in base.glob(f"{pair['output']}/*_rgb.jpg"):
                    file = given / f"{given.name}_{photo.stem.split('_', 1)[1]}.json"
                    photos.append(("test", photo, given.parent.name, file))
    rows = [
        (side, str(photo), category, *([fmow_box(file, category)] if recipe.boxes else []))
        for side, photo, category, file in sorted(photos) if category != "false_detection"
    ]
    classes = sorted({category for side, _, category, *_ in rows if side == "train"})
    splits = splits_of(rows, classes, classes, context=True)
    if not mapping:
        note = "; no test_gt_mapping.json (of groundtruth.tar.bz2 in the tree's root): val is the test split"
        splits = Splits(splits.train, splits.val, classes, note=note)
    return splits


def fmow_box(path, category):
    """A photo's first box of a category over 2 pixels wide and high, else one over all edges."""
    with reading(path) as content:
        held = json.loads(content)["bounding_boxes"]
        for entry in [held] if isinstance(held, dict) else held:
            x, y, w, h = four(" ".join(map(str, entry["box"])))
            if entry["ID"] != -1 and entry["category"] == category and min(w, h) > 2:
                return x, y, x + w, y + h
    return 0, 0, 1e6, 1e6


def reid(*sides):
    """Rows (path, identity, camera) of train, query, gallery -> Splits; those of train are counted from 0.

    Junk (identity -1) is dropped; distractors (0 in Market-1501) stay.
    """
    train, query, gallery = (sorted(row for row in side if row[1] != -1) for side in sides)
    if not (train and query and gallery):
        raise ValueError(f"{len(train)} photos in train, {len(query)} in query, {len(gallery)} in gallery")
    paths, labels, cameras = map(list, zip(*query, *gallery))
    test = Split(paths, labels, cameras=cameras, query=[True] * len(query) + [False] * len(gallery))
    paths, labels, cameras = map(list, zip(*train))
    used = sorted(set(labels))
    return Splits(Split(paths, [used.index(i) for i in labels], cameras=cameras), test, list(map(str, used)))


def numbers_in(path, pattern):
    """The numbers that a photo's name has of an identity and a camera."""
    match = re.match(pattern, os.path.basename(path))
    if not match:
        raise ValueError(f"{path} is not named like {pattern}")
    return map(int, match.groups())


def load_named(base, recipe):
    """Market-1501, DukeMTMC-reID, VeRi-776: photos named IDENTITY_cCAMERA..., as 0002_c1s1_000451_03.jpg."""
    folders = PERSONS if (base / "query").exists() else VEHICLES
    sides = [map(str, (base / folder).glob("*.jpg")) for folder in folders.split()]
    return reid(*([(path, *numbers_in(path, r"(-?\d+)_c(\d+)")) for path in side] for side in sides))


def load_msmt17(base, recipe):
    """MSMT17 version 1: lists of `path identity`; trained on train and val (TransReID), or on train alone.

    Identities of train and test overlap as numbers, not as persons. 0000_000_01_...: the third is the camera.
    """
    def listed(folder, name):
        identities = Lines(base / f"list_{name}.txt", int).items()
        return [(f"{base}/{folder}/{path}", i, *numbers_in(path, r"\d+_\d+_(\d+)")) for path, i in identities]

    train = listed("train", "train")
    if val_side(recipe) == "train" and (base / "list_val.txt").exists():
        train += listed("train", "val")
    return reid(train, listed("test", "query"), listed("test", "gallery"))


CALTECH = "https://data.caltech.edu/records/65de6-vp158/files"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
STANFORD = "http://vision.stanford.edu/aditya86/ImageNetDogs"
BIRDS = "images images.txt image_class_labels.txt train_test_split.txt classes.txt bounding_boxes.txt"
PERSONS, VEHICLES = "bounding_box_train query bounding_box_test", "image_train image_query image_test"
# read(folder, recipe) -> Splits; folders: of the set, in --root unless that is it already; files: what it
# holds, "|" parts alternatives; classes (identities), training, test images (queries and gallery) as
# published, 0 where that is not known; source: whom to ask for the archives, or these with their sha256
Source = namedtuple("Source", "read folders files classes train test source archives", defaults=((),))
SETS = {
    "imagenet": Source(
        load_imagenet, "ILSVRC/Data/CLS-LOC Data/CLS-LOC", "train val", 1000, 1281167, 50000,
        "get it from image-net.org or Kaggle (by registration; ILSVRC2012_img_train.tar and _val.tar)",
    ),
    "cub": Source(load_birds, "CUB_200_2011", BIRDS, 200, 5994, 5794, "add --download", [
        (f"{CALTECH}/CUB_200_2011.tgz", "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"),
    ]),
    "nabirds": Source(
        load_birds, "nabirds/nabirds nabirds", BIRDS, 555, 23929, 24633,
        "get it from https://dl.allaboutbirds.org/nabirds (a form to agree to; nabirds.tar.gz)",
    ),
    "cars": Source(
        load_cars, "stanford_cars",
        "devkit cars_train cars_test cars_test_annos_withlabels.mat|cars_annos.mat car_ims",
        196, 8144, 8041,
        "get it from a mirror (car_devkit.tgz, cars_train.tgz, cars_test.tgz, cars_test_annos_withlabels.mat;"
        " the official pages are gone since 2023, see pytorch/vision#7545)",
    ),
    "aircraft": Source(
        load_aircraft, "fgvc-aircraft-2013b/data data", "images variants.txt images_box.txt", 100, 6667, 3333,
        "add --download",
        [(f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
          "d5f68b1b81d6d7831eb9d5c5517074176b5dfbce6bcb43dc14ed1c66a87b8d75")],
    ),
    "flowers": Source(load_flowers, "flowers-102", "jpg imagelabels.mat setid.mat", 102, 2040, 6149,
                      "add --download", [
        (f"{OXFORD}/flowers/102/102flowers.tgz",
         "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246"),
        (f"{OXFORD}/flowers/102/imagelabels.mat", ""),
        (f"{OXFORD}/flowers/102/setid.mat", ""),
    ]),
    "dogs": Source(load_dogs, "ImageNetDogs", "Images train_list.mat test_list.mat", 120, 12000, 8580,
                   "add --download", [
        (f"{STANFORD}/images.tar", "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"),
        (f"{STANFORD}/annotation.tar", "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd"),
        (f"{STANFORD}/lists.tar", "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c"),
    ]),
    "plant": Source(
        load_plant, "plant-pathology-2020-fgvc7 cassavaleafdata cassava-disease",
        "train.csv images|train/cbb train/cbsd train/cgm train/cmd train/healthy", 5, 0, 0,
        "get it from Kaggle (plant-pathology-2020-fgvc7, or cassava-disease: iCassava 2019)",
    ),
    "fmow": Source(
        load_fmow, "fmow-rgb fmow", "train val", 62, 363572, 53473,
        "get it from s3://spacenet-dataset/Hosted-Datasets/fmow/fmow-rgb (free, 200 GB; aws s3 sync "
        "--no-sign-request; its groundtruth.tar.bz2 has the labels of test)",
    ),
    "market1501": Source(
        load_named, "Market-1501-v15.09.15", PERSONS, 751, 12936, 3368 + 15913,
        "get it from its authors (Zheng et al., ICCV 2015; Market-1501-v15.09.15.zip)",
    ),
    "dukemtmc": Source(
        load_named, "DukeMTMC-reID", PERSONS, 702, 16522, 2228 + 17661,
        "its authors withdrew it in 2019: take a copy of DukeMTMC-reID.zip that you hold",
    ),
    "veri776": Source(
        load_named, "VeRi", VEHICLES, 576, 37778, 1678 + 11579,
        "get it from its authors (Liu et al., ECCV 2016; by e-mail)",
    ),
    "msmt17": Source(
        load_msmt17, "MSMT17_V1", "train test list_train.txt list_query.txt list_gallery.txt",
        1041, 32621, 11659 + 82161,
        "get it from its authors (Wei et al., CVPR 2018; a form to agree to; version 1)",
    ),
}


def download(name, root):
    """Fetch and unpack the official archives of a set into `root`, unless that is done -> its folder."""
    if name not in SETS or not SETS[name].archives or not root:
        free = "--download fetches cub, aircraft, flowers, dogs into --root DIR"
        raise ValueError(f"--data {name} --root {root}: {free}; leave it out for other data")
    root, begun = Path(root), Path(root, f"{name}.unpacking")  # stands until all is unpacked
    with contextlib.suppress(FileNotFoundError):
        if not begun.exists():
            return find(name, root)
    root.mkdir(parents=True, exist_ok=True)
    begun.touch()
    for url, sha256 in SETS[name].archives:
        path = root / os.path.basename(url)
        try:
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), sha256)
            if path.suffix != ".mat":
                with tarfile.open(path) as archive:
                    archive.extractall(root, filter="data")  # refuses what leads out of the folder
        except Exception as error:  # of the net, the hash, the archive
            advice = f"delete {path} if it is there, and run again or fetch it by hand"
            raise ValueError(f"{url}: {error}; {advice}") from None
    begun.unlink()
    return find(name, root)


# ------------------------------------------------------------------------------------------- toy birds
#
# A bird: up to 25 polygons in its own frame (length about 1, facing right, y down): body, head and tail move
# a little against each other, then all is turned, mirrored, scaled and placed. Six parts have four values
# each. The values of the signature parts are the class; those of the other two are drawn at random: as easy
# to see, and worth nothing. The marks of wing and breast cover about the same area, whatever their value, so
# that a small copy does not tell them apart. Colours, pose, background and light say nothing about the class.
# Values, plumage, scene and light have a random stream each, so a swapped part changes no other pixel.
#
# A polygon is written "x y x y ...", an ellipse "o x y rx ry angle".

PARTS = {  # part: what it moves with; its four values, and the place where it is or would be
    "beak": ("head", """
        cone      .09 -.05 .203 .012 .09 .061
        dagger    .09 -.033 .307 .012 .09 .05
        hooked    .09 -.05 .197 -.033 .235 .017 .225 .094 .186 .033 .09 .05
        upcurved  .09 -.033 .186 -.006 .285 -.066 .301 -.044 .208 .039 .09 .055
        place     .1 -.072 .318 -.072 .318 .11 .1 .11"""),
    "eye": ("head", """
        plain
        ring      o .045 -.03 .065 .065 0
        stripe    -.085 -.051 .115 -.041 .115 -.004 -.09 -.002
        brow      -.055 -.068 .03 -.103 .095 -.07 .09 -.05 .03 -.066 -.045 -.04
        place     o .012 -.035 .108 .08 0"""),
    "crest": ("head", """
        none
        spike     .03 -.11 -.04 -.252 -.075 -.08
        feathers  -.088 -.095 -.137 -.224 -.052 -.1;
                  -.043 -.095 -.043 -.237 -.007 -.1;
                  .002 -.095 .051 -.235 .038 -.1
        cap       o -.02 -.105 .083 .055 -.15
        place     -.149 -.263 .066 -.263 .066 -.08 -.149 -.08"""),
    "wing": ("body", """
        bar       -.059 -.095 .008 -.101 -.017 .09 -.084 .086
        bars      -.009 -.095 .034 -.101 .009 .08 -.034 .074; -.115 -.095 -.072 -.101 -.098 .08 -.14 .074
        patch     o -.052 -.007 .069 .062 0
        dots      o -.009 -.051 .034 .034 0; o -.103 -.051 .034 .034 0;
                  o -.021 .049 .034 .034 0; o -.115 .049 .034 .034 0
        place     o -.08 -.03 .15 .1 .25"""),
    "breast": ("body", """
        spots     o .112 .012 .029 .029 0; o .172 -.024 .029 .029 0; o .148 .078 .029 .029 0;
                  o .214 .042 .029 .029 0; o .088 .12 .029 .029 0; o .196 .12 .029 .029 0
        streaks   .074 .048 .102 .048 .102 .192 .074 .192; .124 .012 .153 .012 .153 .156 .124 .156;
                  .174 -.012 .203 -.012 .203 .132 .174 .132; .225 -.036 .254 -.036 .254 .108 .225 .108
        band      .04 .078 .262 -.048 .274 .018 .052 .15
        bars      .064 -.024 .256 -.024 .256 .004 .064 .004; .064 .042 .256 .042 .256 .07 .064 .07;
                  .064 .108 .244 .108 .244 .136 .064 .136
        place     o .16 .06 .105 .13 -.3"""),
    "tail": ("tail", """
        square    -.1 -.062 0 -.055 0 .055 -.1 .062 -.33 .07 -.33 -.07
        forked    -.1 -.062 0 -.055 0 .055 -.1 .062 -.36 .1 -.22 0 -.36 -.1
        round     -.1 -.062 0 -.055 0 .055 -.1 .062
                  -.2 .085 -.28 .08 -.32 .045 -.335 0 -.32 -.045 -.28 -.08 -.2 -.085
        wedge     -.1 -.062 0 -.055 0 .055 -.1 .062 -.2 .06 -.37 0 -.2 -.06
        place     -.37 -.1 -.09 -.1 -.09 .1 -.37 .1"""),
}
SIGNATURE = ("beak", "eye", "wing", "breast")
FIXED = {  # what every bird has, likewise
    "left leg": ("body", "-.02 .17 -.002 .17 .01 .33 .05 .335 .05 .35 -.04 .35 -.008 .33"),
    "right leg": ("body", ".06 .17 .078 .17 .09 .33 .13 .335 .13 .35 .04 .35 .072 .33"),
    "body": ("body", "o 0 0 .29 .185 -.12"),
    "belly": ("body", "o .1 .075 .17 .1 -.35"),
    "head": ("head", "o 0 0 .125 .12 0"),
    "back": ("body", ".1 -.06 .05 -.115 -.05 -.125 -.16 -.085 -.34 .03 -.24 .06 -.12 .085 0 .07 .075 .02"),
    "pupil": ("head", "o .045 -.03 .024 .024 0"),
    "glint": ("head", "o .053 -.038 .0084 .0084 0"),
}
PAINTED = "tail,left leg,right leg,body,neck,belly,beak,crest,head,breast,back,wing,eye,pupil,glint"
BLOBS = (  # dot, bar, ring around an eye, triangle
    "o 0 0 .018 .018 0", "-.01 -.06 .02 -.06 .02 .06 -.01 .06",
    "o 0 0 .05 .05 0; o 0 0 .024 .024 0", "0 -.04 .14 0 0 .04",
)
LENGTH = 0.44, 0.68  # of a bird, as a share of the side
LUMA = np.array([0.299, 0.587, 0.114])
FLOOR = 45  # least difference in luma (0 .. 255) of a mark and the plumage under it

# Images a class for training and testing; seed of every bird; and of each class the values of its signature
# parts: a code of 16 words in which any two differ in at least three of the four parts and each value comes
# equally often. The species of birds-pretrain are not those of birds-easy.
Preset = namedtuple("Preset", "train test seed codes")
SPECIES = "0000 1232 2313 3121 0112 1320 2201 3033 0223 1011 2130 3302 0331 1103 2022 3210".split()
PRESETS = {
    "birds": Preset(15, 30, 2, SPECIES),
    "birds-easy": Preset(400, 60, 1, SPECIES[:8]),
    "birds-pretrain": Preset(400, 60, 5, SPECIES[8:]),
}


def rotate(points, angle):
    """Rotate points (n, 2) by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def ellipse(x, y, rx, ry, angle):
    """Polygon of an ellipse, turned by `angle` radians -> (24, 2)."""
    t = np.arange(24) * (2 * np.pi / 24)
    return rotate(np.stack([rx * np.cos(t), ry * np.sin(t)], 1), angle) + (x, y)


@functools.cache
def outlines(text):
    """Polygons (n, 2) of a text."""
    polygons = []
    for one in filter(str.strip, text.split(";")):
        numbers = np.array(one.replace("o", "").split(), float)
        polygons.append(ellipse(*numbers) if "o" in one else numbers.reshape(-1, 2))
    return polygons


@functools.cache
def part_shapes(part):
    """{value: its polygons} of the four values of a part; the fifth is its place."""
    _, *words = re.split("([a-z]{3,})", PARTS[part][1])
    return {name: outlines(text) for name, text in zip(words[::2], words[1::2])}


EYE = np.array([12.0, 10.0, 10.0])


def hsv(h, s, v):
    """Hue in turns, saturation and value in [0, 1] -> RGB array in 0..255."""
    return np.array(colorsys.hsv_to_rgb(h % 1, *np.clip((s, v), 0, 1))) * 255


def mix(a, b, share):
    """Blend colour a with `share` of colour b."""
    return a * (1 - share) + b * share


def apart(mark, ground):
    """A mark's colour, moved towards black or white until its luma differs from the ground's by FLOOR."""
    luma, under = mark @ LUMA, ground @ LUMA
    if luma >= under and under + FLOOR <= 255 or under < FLOOR:
        return mix(mark, 255.0, max(0.0, under + FLOOR - luma) / (255 - luma))
    return mix(mark, 0.0, max(0.0, luma - under + FLOOR) / luma)


def plumage(rng):
    """Colours of one bird by what is painted with them. None says anything about the class."""
    hue, saturation, value = rng.random(), rng.uniform(0.15, 0.6), rng.uniform(0.45, 0.8)
    like = lambda s, v: hsv(hue + rng.uniform(-0.06, 0.06), s * saturation, v * value)
    body, back, tail, head = like(1, 1), like(1, 0.72), like(1, 0.66), like(0.95, rng.uniform(0.85, 1.1))
    dark, pale = hsv(hue, 0.4, 0.16), hsv(rng.uniform(0.08, 0.18), rng.uniform(0.02, 0.25), 0.97)
    belly = mix(body, like(0.5, 1.3), 0.8)
    beak, leg = (hsv(rng.uniform(0, 0.14), 0.8, v) for v in rng.choice([0.25, 0.85], 2))
    return {
        "body": body, "belly": belly, "back": back, "tail": tail, "head": head, "beak": beak,
        "neck": mix(body, head, 0.5), "left leg": leg, "right leg": leg, "pale": pale, "dark": dark,
        "pupil": EYE, "glint": np.full(3, 240.0),
        "crest": apart(mix(head, hsv(rng.random(), 0.7, 0.8), 0.65), head), "wing": apart(pale, back),
        "breast": apart(mix(belly, dark, 0.75), belly), "eye": apart(pale, head),
        "stripe": apart(mix(head, dark, 0.85), head),
    }


def background(rng, colours, length, side):
    """Smooth gradients, leaves and twigs, and blobs in the bird's colours, like parts -> PIL image."""
    u, base = rng.uniform, hsv(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.35, 0.9))
    grid = base + rng.normal(0, 28, (5, 5, 1)) + rng.normal(0, 14, (5, 5, 3))
    image = Image.fromarray(grid.clip(0, 255).astype(np.uint8)).resize((side, side), FILTERS["bicubic"])
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        shape = ellipse(*rng.random(2), u(0.03, 0.2), u(0.005, 0.04), u(0, math.pi))
        paint(draw, shape * side, hsv(rng.random(), u(0.1, 0.6), u(0.2, 0.85)))
    for _ in range(3):
        at, angle, scale = rng.random(2), u(0, 6.3), length * u(0.7, 1.3)
        colour = colours[rng.choice(["pale", "dark", "beak"])]
        for shape, own in zip(outlines(rng.choice(BLOBS)), (colour, EYE)):
            paint(draw, (rotate(shape, angle) * scale + at) * side, own)
    return image


def paint(draw, points, colour):
    """Fill a polygon (n, 2) with a colour."""
    draw.polygon(points.ravel().tolist(), tuple(map(int, colour)))


def draw_bird(name, split, index, size, *shifts):
    """Bird number `index` of a split of a preset, size x size pixels: the same on every machine.

    Its class is index % classes. shifts: pairs (part, how many values further), all else staying as it is.
    -> dict: image (H, W, 3) uint8; label; object_box (4,) around all that is drawn of the bird; part_boxes
    (6, 4) in the order of PARTS, where the part is or would be, the same for each of its values; values
    {part: 0 .. 3}.
    """
    preset = PRESETS[name]
    streams = ([preset.seed, ("train", "test").index(split), index, k] for k in range(4))
    drawn, feathers, scene, light = map(np.random.default_rng, streams)
    label, colours = index % len(preset.codes), plumage(feathers)
    values = dict(zip(PARTS, drawn.integers(4, size=len(PARTS)).tolist()))
    values |= zip(SIGNATURE, map(int, preset.codes[label]))
    values |= {part: (values[part] + shift) % 4 for part, shift in shifts}
    if values["eye"] == 2:
        colours["eye"] = colours["stripe"]

    # the pose: three frames, each a function from its coordinates to the bird's
    u = scene.uniform
    tilt, head, tail = np.radians([u(-20, 20), u(-22, 22), u(-18, 28)])
    neck = np.array([0.27 + u(-0.03, 0.02), -0.19 + u(-0.04, 0.05)])
    whole = rotate(np.eye(2), tilt) * (scene.choice([-1, 1]), 1)  # turned, then mirrored
    pose = {
        "body": lambda p: p @ whole,
        "head": lambda p: (rotate(p, head) + neck) @ whole,
        "tail": lambda p: (rotate(p, tail) + (-0.25, 0.05)) @ whole,
    }
    nape = np.array([(0.08, -0.14), neck + (-0.10, -0.06), neck + (0.10, 0.06), (0.26, 0.04)])
    placed, places = {"neck": [nape @ whole]}, []
    for part, (frame, text) in FIXED.items():
        placed[part] = [pose[frame](points) for points in outlines(text)]
    extent = [points for shapes in placed.values() for points in shapes]
    for part, (frame, _) in PARTS.items():
        *shapes, place = part_shapes(part).values()
        placed[part] = [pose[frame](points) for points in shapes[values[part]]]
        places.append(pose[frame](place[0]))
    layers = [(points, colours[part]) for part in PAINTED.split(",") for points in placed[part]]

    # its place: from the places of the parts, not from what is drawn there, so that no value moves the bird
    extent = np.concatenate(extent + places)
    low, span, length = extent.min(0), np.ptp(extent, 0), u(*LENGTH)
    shift = scene.random(2) * (1 - span * length) - low * length
    corners = [[*p.min(0), *p.max(0)] for p in (np.concatenate([p for p, _ in layers]), *places)]
    boxes = ((np.array(corners) * length + np.tile(shift, 2)) * size).astype(np.float32)

    # drawn larger and averaged, then lit: gain, cast, a linear gradient, grain
    fine = 3 if size <= 80 else 2
    image = background(scene, colours, length, size * fine)
    draw = ImageDraw.Draw(image)
    for points, colour in layers:
        paint(draw, (points * length + shift) * (size * fine), colour)
    gain = light.uniform(0.75, 1.2) * (1 + light.normal(0, 0.05, 3))
    slope, ramp = light.normal(0, 0.15, 2), np.linspace(-0.5, 0.5, size)
    shade = 1 + slope[0] * ramp[None, :] + slope[1] * ramp[:, None]
    pixels = np.asarray(image.reduce(fine), np.float32) * (shade[..., None] * gain).astype(np.float32)
    pixels = (pixels + 4 * light.standard_normal((size, size, 1), np.float32)).clip(0, 255).astype(np.uint8)
    return dict(image=pixels, label=label, object_box=boxes[0], part_boxes=boxes[1:], values=values)


def toy_split(paths, size, part=None):
    """The birds of some paths as a Split; `part`: that part of each swapped for another value."""
    birds = []
    for i, path in enumerate(paths):
        preset, split, index = path.split("/")
        shifts = [(part, 1 + i % 3)] if part else []
        birds.append(draw_bird(preset, split, int(index), size, *shifts))
    images, labels, boxes, parts, _ = (list(column) for column in zip(*(bird.values() for bird in birds)))
    truth = np.stack(boxes), np.stack(parts), tuple(PARTS), tuple(part in SIGNATURE for part in PARTS)
    return Split(paths, labels, *truth, images=images)


def load_toy(root, recipe):
    """Toy birds of recipe.toy_preset, drawn into memory, of the longest side that the recipe needs."""
    name, preset, splits = recipe.toy_preset, PRESETS[recipe.toy_preset], []
    for role in ("train", "test"):
        count = getattr(recipe, f"toy_{role}") or getattr(preset, role)
        paths = [f"{name}/{role}/{i}" for i in range(count * len(preset.codes))]
        splits.append(toy_split(paths, max(recipe.resize + recipe.image_size)))
    names = [list(part_shapes(part)) for part in SIGNATURE]
    classes = ["-".join(values[int(v)] for values, v in zip(names, code)) for code in preset.codes]
    return Splits(*splits, classes)

DATASETS = {"toy": load_toy, "folder": load_folder} | {name: source.read for name, source in SETS.items()}

# ------------------------------------------------------------------------------------------- scores


def ranked(logits):
    """Classes of the five largest logits, best first, equal ones in class order: (B, K) -> (B, min(5, K))."""
    return logits.float().sort(dim=1, descending=True, stable=True).indices[:, :5]


def score(split, answers, recipe, model_answers=None):
    """Answers to a split against the truth -> dict of scores in [0, 1], the headline first.

    answers: "answer" (n, 5) classes from `ranked` (fewer if there are fewer), or Re-ID features (n, D); "head
    NAME" (n,) classes or features; "shown" (n, 4) of Photos; where the model looked, in pixels of the input:
    "boxes" (n, b, 4), best first, and "untrained boxes", those of random weights. model_answers(split) ->
    log-probabilities of another split, for the toy's swapped parts.
    """
    if "shown" in answers:  # nan: a photo that could not be read
        kept = np.flatnonzero(np.isfinite(answers["shown"][:, 0]))
        split, answers = split.take(kept), {name: value[kept] for name, value in answers.items()}
    heads = {name[5:]: value for name, value in answers.items() if name.startswith("head ")}
    if split.query:
        rate = lambda features: reid_scores(features, split.labels, split.cameras, split.query)
        maps = {name: rate(features)["mAP"] for name, features in heads.items()}
        return {"scores": rate(answers["answer"]), "heads": maps}
    labels, top = np.array(split.labels), answers["answer"].astype(int)
    hits = top == labels[:, None]
    right = hits[:, 0]
    result = {"scores": {"top1": right.mean()}, "heads": {k: (v == labels).mean() for k, v in heads.items()}}
    if max(labels.max(), top.max()) > 4:
        result["scores"]["top5"] = hits.any(1).mean()
    if "boxes" in answers:
        pairs = Counter(sorted(zip(split.labels, top[:, 0].tolist())))
        result["per_class"] = {c: [pairs[c, c], n] for c, n in sorted(Counter(split.labels).items())}
        result["confused"] = [[c, other, n] for (c, other), n in pairs.most_common() if c != other][:10]
        result |= look(split, answers, recipe.image_size, right)
        if split.images:
            result["reliance"] = reliance(split, model_answers)
    return result


def look(split, answers, size, right):
    """Where the boxes lie, beside what costs nothing: chance, one place for all, an untrained network."""
    boxes, shown = answers["boxes"], answers["shown"]
    sides = np.rint(boxes[..., 2:] - boxes[..., :2])
    kinds = np.unique(sides.reshape(-1, 2), axis=0)
    result = {"coverage": covered(boxes, size).mean()}
    if 1 < len(kinds) < 5:  # levels, stages
        own = lambda kind: np.where((sides == kind).all(2, keepdims=True), boxes, np.nan)
        shares = {f"{kind[0]:.0f} x {kind[1]:.0f}": covered(own(kind), size).mean() for kind in kinds}
        result["coverage_by_size"] = shares

    def both(measure, truth):
        found = measure(boxes, truth)
        if "untrained boxes" in answers:
            found |= {f"untrained_{k}": v for k, v in measure(answers["untrained boxes"], truth).items()}
        return found

    if split.parts is not None:
        parts, result["pointing"] = to_input(split.parts, shown[:, None], size), {}
        for name, wanted in ("signature", True), ("decoy", False):
            own = parts[:, np.array(split.signature) == wanted]
            if own.size:
                cells = covered(own, size)
                free = {"chance": cells.mean(), "constant": cells.max()}
                result["pointing"][name] = both(pointing, own) | free
    if split.boxes is not None:
        objects = to_input(split.boxes, shown, size)
        best = lambda found, truth: {"mean": iou(found[:, 0], truth).mean()}
        constant = max(iou(box, objects).mean() for box in (objects.mean(0), *objects[:200]))
        result["object_iou"] = both(best, objects) | {"constant": constant}
        areas = np.prod(split.boxes[:, 2:] - split.boxes[:, :2], 1)
        low, high = np.quantile(areas, (0.25, 0.75)).tolist()  # M2Former, Table 8
        sizes = {"large": areas > high, "medium": (low <= areas) & (areas <= high), "small": areas < low}
        result["scale"] = {name: right[own].mean() for name, own in sizes.items() if own.any()}
        result["scale"]["thresholds"] = [low, high]
    return result


def tell(result, classes):
    """Lines for the terminal on what `score` found, where it knows boxes."""
    if "coverage" not in result:
        return
    shares = lambda found: ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in found.items())
    yield "coverage: " + shares({"all boxes": result["coverage"]} | result.get("coverage_by_size", {}))
    for name, found in result.get("pointing", {}).items():
        yield f"boxes with their centre in {name} parts: " + shares(found)
    if "object_iou" in result:
        yield "IoU of the best box with the object's: " + shares(result["object_iou"])
        *scale, (_, (low, high)) = result["scale"].items()
        yield f"object scale: {shares(dict(scale))}; area above {high:.0f} / below {low:.0f} square pixels"
    if "reliance" in result:
        flips = {part: flipped for part, (_, flipped) in result["reliance"].items()}
        yield "reliance, decisions changed by swapping a part: " + shares(flips)
    weak = sorted(result["per_class"].items(), key=lambda item: item[1][0] / item[1][1])[:5]
    yield "weakest classes: " + "; ".join(f"{classes[c]} {right}/{n}" for c, (right, n) in weak)
    pairs = "; ".join(f"{classes[a]} > {classes[b]} {n}x" for a, b, n in result["confused"])
    yield f"most confused (true > predicted): {pairs or 'none'}"


def inside(points, boxes):
    """Whether points (..., p, 2) lie in one of the boxes (..., b, 4) -> (..., p)."""
    points, boxes = points[..., None, :], boxes[..., None, :, :]
    return ((boxes[..., :2] <= points) & (points < boxes[..., 2:])).all(-1).any(-1)


def covered(boxes, size, cells=32):
    """How often each cell of a raster over images (H, W) has its centre in one of the boxes (n, b, 4)."""
    y, x = (np.indices((cells, cells)).reshape(2, -1) + 0.5) / cells
    centres = np.stack((x, y), 1) * size[::-1]
    return np.mean([inside(centres, own) for own in boxes], 0)


def pointing(boxes, parts):
    """Share of boxes (n, b, 4) with their centre in a part (n, P, 4; nan: not visible): the best, all."""
    hit = inside((boxes[..., :2] + boxes[..., 2:]) / 2, parts)  # (n, b)
    return {"best": hit[:, 0].mean(), "all": hit.mean()}


def iou(a, b):
    """Intersection over union of boxes (n, 4), pair by pair; a may be one box for all."""
    a, b = (torch.as_tensor(boxes, dtype=torch.float64)[..., None, :] for boxes in (a, b))
    return box_iou(a, b)[..., 0, 0].numpy()


def reliance(split, model_answers):
    """One part of 120 birds swapped -> {part: [mean |change of log p(label)|, share of flips]}."""
    some, result = split.take(range(min(120, len(split)))), {}
    labels, before = np.array(some.labels)[:, None], model_answers(some)
    for part in split.part_names:
        after = model_answers(toy_split(some.paths, len(some.images[0]), part))
        change = abs(np.take_along_axis(after - before, labels, 1))
        result[part] = [float(change.mean()), (after.argmax(1) != before.argmax(1)).mean()]
    return result


def reid_scores(features, labels, cameras, query):
    """Single-query protocol of Market-1501, DukeMTMC, MSMT17 and VeRi: features (n, D) -> dict.

    For a query, gallery images of its identity from its own camera do not count; a query without any match
    left is skipped, not counted as 0. Queries are taken a few at a time (MSMT17 has 11,659 x 82,161
    distances).
    """
    features, labels, cameras, query = map(torch.as_tensor, (features, labels, cameras, query))
    precision, first, gallery = [], [], features[~query]
    for some in query.nonzero()[:, 0].split(1 + 2**22 // (1 + len(gallery))):
        for i, distances in zip(some, torch.cdist(features[some], gallery)):
            same, other = labels[~query] == labels[i], cameras[~query] != cameras[i]
            distances[same & ~other] = math.inf
            matches = (same & other)[distances.argsort(stable=True)]
            ranks = matches.nonzero()[:, 0].numpy() + 1  # ascending
            if len(ranks):
                precision.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
                first.append(ranks[0])
    if not first:
        raise ValueError(f"none of {sum(query)} queries has its identity in the gallery from another camera")
    ranks = {f"rank{k}": float(np.mean(np.array(first) <= k)) for k in (1, 5, 10)}
    return {"mAP": float(np.mean(precision)), **ranks, "skipped": int(query.sum()) - len(first)}
