"""What the five methods share: options and recipe, learning rate, weights, pictures, the plain ViT, rollout.

Nothing of ours is imported here; no dataset, and no files but weights and fonts.
"""
import argparse
import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import typing
import unicodedata
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

# ------------------------------------------------------------------------------------------ options


def opt(default, help, choices=(), least=0, most=1e6, group="method"):
    """A field that is a flag too: default, meaning (unit and source), what is allowed, group in --help."""
    rule = dict(help=help, choices=choices, least=least, most=most, group=group)
    return field(default=default, metadata=rule)


def flag(f):
    """The command-line flag of a field."""
    return "--" + f.name.replace("_", "-")


class Options:
    """A frozen dataclass of fields made by `opt`, checked by what they declare; nan, inf are in no range."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, (_, choices, least, most, _) = getattr(self, f.name), f.metadata.values()
            for v in value if isinstance(value, tuple) else (value,):
                if choices and v not in choices:
                    raise ValueError(f"{flag(f)} {v}: allowed are {', '.join(choices)}")
                if not isinstance(v, str) and not least <= v <= most:
                    raise ValueError(f"{flag(f)} {v}: allowed are numbers from {least:g} to {most:g}")


def add_options(parser, options, shown=lambda f: True):
    """One typed flag for each field, its value as the default; fields not `shown` are not in the help."""
    groups = {}
    for f in dataclasses.fields(options):
        value, (help, choices, _, _, group) = getattr(options, f.name), f.metadata.values()
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        how = {"type": f.type, "metavar": "|".join(choices) or f.type.__name__.upper()}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, tuple):
            how = {"type": tuple_of(*typing.get_args(f.type)), "metavar": "A,B"}
            value = ",".join(map(str, value))
        text = f"{help} [{value}]".replace("%", "%%") if shown(f) else argparse.SUPPRESS
        groups[group].add_argument(flag(f), default=argparse.SUPPRESS, help=text, **how)


def tuple_of(kind, *rest):
    """Reader of "448,448"; one value stands for both of a pair."""

    def numbers(text):
        values = tuple(kind(v) for v in text.split(",") if v)
        if ... in rest:
            return values
        first, second = values if values[1:] else 2 * values
        return first, second

    return numbers


# ------------------------------------------------------------------------------------------ recipe and tables

on_input, on_training = functools.partial(opt, group="input"), functools.partial(opt, group="training")
chance, share = functools.partial(on_input, most=1), functools.partial(on_training, most=1)
FILTERS = ("nearest", "bilinear", "bicubic", "random")
PRESETS = ("birds", "birds-easy", "birds-pretrain")


@dataclass(frozen=True)
class Recipe(Options):
    """What every training needs. A method adds its own switches in a subclass of its file."""

    # ---- input: photo -> (3, H, W)
    task: str = on_input("classify", "classify: logits and accuracy", ("classify",))
    image_size: tuple[int, int] = on_input((224, 224), "height,width of the input in pixels", least=1)
    resize: tuple[int, int] = on_input((0, 0), "height,width before the crop; 0,0: image_size")
    crop: str = on_input("random", "of training photos", ("random", "resized", "none"))
    crop_area: tuple[float, float] = chance((0.08, 1.0), "crop=resized: share of the area")
    crop_ratio: tuple[float, float] = on_input((0.75, 4 / 3), "crop=resized: width / height")
    pad: int = on_input(0, "crop=random: border on each side, pixels; black beyond the photo")
    interpolation: str = on_input("bilinear", "of photos; random: one of these, in training", FILTERS)
    normalize: str = on_input("imagenet", "half: to [-1, 1]", ("imagenet", "half"))
    hflip: float = chance(0.5, "probability of a mirror image")
    rotate: float = on_input(0.0, "largest rotation, degrees")
    translate: float = chance(0.0, "largest shift as a share of the side")
    zoom: tuple[float, float] = on_input((1.0, 1.0), "range of a random zoom")
    affine_prob: float = chance(1.0, "probability of the rotation, shift and zoom")
    brightness: float = on_input(0.0, "colour jitter: factor in 1 -+ this")
    contrast: float = on_input(0.0, "colour jitter: factor in 1 -+ this")
    saturation: float = on_input(0.0, "colour jitter: factor in 1 -+ this")
    hue: float = on_input(0.0, "colour jitter: shift in -+ this, in turns", most=0.5)
    jitter_prob: float = chance(1.0, "probability of the colour jitter")
    erasing: float = chance(0.0, "probability of random erasing with noise")
    boxes: bool = on_input(False, "train and test on the object boxes instead of the whole photos")
    val_fraction: float = chance(0.0, "share of each class cut from train to validate (or test) on")
    train_split: str = on_input("trainval", "of Aircraft, Flowers, MSMT17", ("trainval", "train"))
    crop_banner: bool = on_input(False, "Aircraft: cut the copyright banner (the literature does not)")
    toy_preset: str = on_input("birds", "which toy birds are drawn", PRESETS)
    toy_train: int = on_input(0, "toy: training images a class; 0: the preset's")
    toy_test: int = on_input(0, "toy: test images a class; 0: the preset's")

    # ---- training
    batch_size: int = on_training(32, "images a step, over all processes", least=1)
    instances: int = on_training(0, "images of each identity in a batch (K of P x K); 0: plain shuffling")
    epochs: int = on_training(100, "passes over the training set", least=1)
    iterations: int = on_training(0, "length of the run in steps; 0: given by epochs")
    optimizer: str = on_training("sgd", "optimizer", ("sgd", "adam", "adamw", "radam"))
    lr: float = on_training(0.1, "peak learning rate")
    lr_batch: int = on_training(0, "lr is for this batch size and scales linearly with it; 0: lr as it is")
    momentum: float = share(0.9, "SGD's momentum; Adam's first beta")
    beta2: float = share(0.999, "Adam's second beta")
    eps: float = on_training(1e-8, "Adam's epsilon")
    weight_decay: float = on_training(0.0, "weight decay (decoupled in adamw and radam)")
    schedule: str = on_training("cosine", "of the learning rate", ("cosine", "steps", "onecycle", "constant"))
    milestones: tuple[float, ...] = share((), "schedule=steps: shares of the run, lr x 0.1 at each")
    warmup: float = on_training(0.0, "linear warm-up, epochs (steps where iterations gives the length)")
    warmup_lr: float = on_training(0.0, "learning rate at the start of the warm-up")
    min_lr: float = on_training(0.0, "learning rate at the end of the cosine")
    label_smoothing: float = share(0.0, "share of the target spread evenly over the classes")
    drop_path: float = share(0.0, "stochastic depth: drop probability of the last block")
    grad_clip: float = on_training(0.0, "largest global norm of the gradient; 0: no clipping")
    accumulate: int = on_training(1, "a batch is computed in this many parts, to save memory", least=1)
    amp: str = on_training("auto", "bf16 on CUDA that has it", ("auto", "bf16", "fp16", "off"))
    weights: str = on_training("none", "first weights: none, default (official), a FILE or a run folder")

    def __post_init__(self):
        super().__post_init__()
        for least, most in (self.crop_area, self.crop_ratio, self.zoom):
            if not 0 < least <= most:
                raise ValueError(f"--crop-area, --crop-ratio, --zoom: {least} to {most} is no range")
        if self.batch_size % (self.instances or 1) or self.batch_size < self.accumulate:
            raise ValueError("--batch-size: use a multiple of --instances, of at least --accumulate")
        if self.pad >= min(self.image_size):
            raise ValueError(f"--pad {self.pad}: some crops would show nothing; stay below --image-size")


@dataclass(frozen=True)
class Table:
    """A table of the paper: `rows` of (name, overrides of recipe fields, the paper's value or None).

    Several metrics stand side by side, "mAP rank1"; a row's value is then a tuple. Two keys are no fields:
    "eval", a dict of fields that only the evaluation uses (rows that differ in nothing else are evaluations
    of one training), and "start", the row of this table whose run of the same seed gives the first weights.
    """

    title: str
    data: str  # the dataset it is about, a key of the method's RECIPES
    metric: str  # "top1" (%), "mAP rank1" (%), "params" (M), "macs" (G), ...
    rows: tuple[tuple[str, dict, float | tuple | None], ...]


def split_row(overrides):
    """Overrides -> (what a row trains with, what its evaluation changes, the row it starts from or None)."""
    training = dict(overrides)
    return training, training.pop("eval", {}), training.pop("start", None)


def by_dataset(number, title, metrics, rows):
    """Rows of (name, overrides, a value a dataset) -> {"3": Table on the first one, "3-msmt17": ..., ...}."""
    tables = {}
    for i, data in enumerate(metrics, 2):
        own = tuple((*row[:2], row[i]) for row in rows)
        tables[f"{number}-{data}" if i > 2 else number] = Table(title, data, metrics[data], own)
    return tables


def check_build(recipe, kind, num_classes):
    """`build` wants a recipe of its own file, and at least two classes."""
    if not isinstance(recipe, kind) or num_classes < 2:
        wanted = f"a {kind.__module__}.Recipe, like RECIPES['toy'], and at least 2 classes"
        raise ValueError(f"build wants {wanted}, not {recipe!r:.20} and {num_classes}")


def check_images(images, size=None):
    """A model looks at normalised images, float (B, 3, H, W), of its own size where that is given."""
    wanted = (3, *(size or images.shape[-2:]))
    if images.shape[1:] != wanted or not images.is_floating_point():
        given = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images are {given}; wanted are normalised floats (B, {str(wanted)[1:]}")


# ------------------------------------------------------------------------------------------ learning rate


def schedule(recipe, step, steps, warmup, peak):
    """Learning rate of update `step` (0-based) of `steps`; min_lr, warmup_lr absolute, warmup in steps."""
    if step < warmup:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * step / warmup

    def cosine(start, end, t):
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * t))

    t = (step - warmup) / (steps - warmup)  # 0 .. 1 over the rest of the run
    if recipe.schedule == "cosine":
        return cosine(peak, recipe.min_lr, t)
    if recipe.schedule == "steps":
        return peak * 0.1 ** sum(step >= round(m * steps) for m in recipe.milestones)
    if recipe.schedule == "onecycle":  # from peak / 25 up to the peak at half time, then down to peak / 1e5
        return cosine(peak / 25, peak, 2 * t) if t < 0.5 else cosine(peak, peak / 1e5, 2 * t - 1)
    return peak


def lr_at(recipe, step, steps, steps_per_epoch=1, group={}):
    """Learning rate of update `step` (0-based) of `steps`, of a parameter group or of the recipe.

    The recipe's lr is scaled by batch_size / lr_batch when that is set. A group may have "lr_scale", a factor
    of it, or "phases" of (length in any unit, peak): the schedule runs once in each; peak 0 keeps it frozen.
    """
    if "phases" not in group:
        base = recipe.lr * (recipe.batch_size / recipe.lr_batch if recipe.lr_batch else 1)
        warmup = round(recipe.warmup * (1 if recipe.iterations else steps_per_epoch))
        return schedule(recipe, step, steps, warmup, base) * group.get("lr_scale", 1)
    done, total, end = 0, sum(length for length, _ in group["phases"]), 0
    for length, peak in group["phases"]:
        done, begin, end = done + length, end, round((done + length) / total * steps)
        if step < end:
            return peak and schedule(recipe, step - begin, end - begin, 0, peak)


# ------------------------------------------------------------------------------------------ weights


def tensors_in(value):
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


def save_checkpoint(path, state):
    """Write nested tensors and plain values whole or not at all: temporary file, flush to disk, replace.

    Raises FloatingPointError when a tensor is not finite, OSError when the disk is full; the old file stays.
    """
    if not all(t.isfinite().all() for t in tensors_in(state)):
        raise FloatingPointError(f"the weights are not finite; {path} keeps the last good ones; lower --lr")
    part = Path(path).with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:  # how torch reports a full disk
        raise OSError(f"could not save {path} ({error}); the old one stays; free space, --resume") from None


def load_checkpoint(path):
    """What a .pt, .pth or .npz file, or a run folder, holds: tensors and plain values only.

    Raises ValueError when it is damaged or hostile, FileNotFoundError when it is not there.
    """
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a checkpoint or the folder of a run with one")
    room = 2 * path.stat().st_size + 2**26  # bytes that its content may take
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > room or archive.testzip():
                    raise ValueError("a size or a checksum is wrong")
        if path.suffix == ".npz":
            held = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        else:
            held = torch.load(path, "cpu", weights_only=True)
        # numpy refuses what is no plain array
        if sum(t.detach().numpy().nbytes for t in tensors_in(held)) > room:
            raise ValueError("its tensors are larger than the file")
        return dict(held)
    except Exception as error:  # zip, pickle and numpy raise a dozen kinds on damaged files
        reason = f"{type(error).__name__}: {error!s:.80}"
        raise ValueError(f"{path} is damaged, or no file of tensors ({reason})") from None


def fetch(url, sha256=""):
    """Download `url` once into torch's hub folder -> the path; its `sha256`, or a prefix, is checked."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.exists() or torch.hub.download_url_to_file(url, path, sha256 or None, sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network, or a wrong hash: no file is kept
        raise ValueError(f"no download of {url} ({error}); fetch it to {path}, or --weights none") from None
    return path


def state_in(held, source):
    """The state_dict in what a file held: a checkpoint of ours, or what DeiT, SlowFast, timm ... wrapped."""
    for key in ("model", "model_state", "state_dict"):
        held = held[key] if isinstance(held.get(key), dict) else held
    if not all(isinstance(name, str) and torch.is_tensor(held[name]) for name in held):
        raise ValueError(f"--weights {source}: holds no state_dict of names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in held.items()}


def read_state(source):
    """Weights of a run folder, a checkpoint, a .pth/.pyth/.pt/.bin file or an .npz -> dict of tensors."""
    return state_in(load_checkpoint(source), source)


def load_state(model, state, heads=(), source="the file"):
    """Load `state` into `model`. Keys that start with one of `heads` may be missing, surplus, or not fit."""
    own, heads = model.state_dict(), tuple(heads)
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    wrong = [k for k in {**own, **state} if k not in fits and not k.startswith(heads)]
    if wrong:
        problem = f"{len(wrong)} tensors are missing, unexpected or of another shape, {wrong[:9]}"
        raise ValueError(f"{source} does not fit {type(model).__name__}: {problem}")
    model.load_state_dict(fits, strict=False)


# ------------------------------------------------------------------------------------------ pictures

MEAN_STD = {  # of pixel values 0 to 255
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
}
COLOURS = ("#ffd400", "#00c2ff", "#ff4fa3", "#7cff4f", "#ff8a1f", "#b48cff")  # of boxes, in their order
GAP = 4  # pixels between pictures
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc", "PingFang.ttc")


def normalize(images, how):
    """uint8 (B, 3, H, W) -> float, standardised as the recipe's `normalize` says."""
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize wants uint8 images, not {images.dtype}; are they normalised already?")
    return TF.normalize(images.float(), *MEAN_STD[how], inplace=True)  # a fresh copy costs more than the sums


def to_pil(image, how):
    """One standardised image (3, H, W) -> PIL image; the inverse of `normalize`."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in MEAN_STD[how])
    return TF.to_pil_image((image.detach().float().cpu() * std + mean).round().clamp(0, 255).byte())


def cells_to_boxes(cells, grid, size):
    """Numbers (B, n) of cells of a grid (h, w), row by row -> boxes (B, n, 4), xyxy pixels of (H, W)."""
    (h, w), (H, W) = grid, size
    x, y = cells % w, cells // w
    return torch.stack((x, y, x + 1, y + 1), -1) * cells.new_tensor((W / w, H / h) * 2, dtype=torch.float32)


@functools.cache
def fonts(size):
    """The system fonts that are there, and Pillow's own."""
    found = []
    for name in FONTS:
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return [*found, ImageFont.load_default(size)]


def write(draw, at, text, size=14, width=9999, **how):
    """Draw a text in the first font that has its letters, else its ASCII letters, cut to `width` pixels."""
    for face in fonts(size):
        lacking = bytes(face.getmask("\uffff"))  # the box that stands for a letter the font lacks
        if all(bytes(face.getmask(letter)) != lacking for letter in text):
            break
    else:
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    while len(text) > 3 and draw.textlength(text, font=face) > width:
        text = text[:-4] + "..."
    draw.text(at, text, font=face, **how)


def heat(image, values, strength=0.55, span=None):
    """Lay a map (h, w) over a PIL image, dark blue (least) to yellow (most); `span`: of several maps."""
    values = values.detach().float().cpu()
    least, most = span or (values.min(), values.max())
    gray = TF.to_pil_image(((values - least) / (most - least + 1e-12)).clamp(0, 1))
    gray = gray.resize(image.size, Image.BILINEAR)
    return Image.blend(image, ImageOps.colorize(gray, "#0c0a3c", "#fff578", "#c8325a"), strength)


def draw_boxes(image, boxes, labels=(), colours=COLOURS, width=2):
    """A PIL image with boxes (n, 4) xyxy in its pixels, each in its colour; no label covers another."""
    image, boxes = image.copy(), torch.as_tensor(boxes).tolist()
    colours = [colours[i % len(colours)] for i in range(len(boxes))]
    draw, size, y = ImageDraw.Draw(image), max(10, image.height // 18), 0
    for (x1, y1, x2, y2), colour in zip(boxes, colours):
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), None, colour, width)
    marks = sorted((y1, x1, label, colour) for (x1, y1, _, _), label, colour in zip(boxes, labels, colours))
    for i, (y1, x1, label, colour) in enumerate(marks):  # from the top down, each on a line of its own
        y = max(y, min(y1 + width, image.height - size * (len(marks) - i)))
        write(draw, (x1 + width + 1, y), label, size, fill=colour, stroke_width=2, stroke_fill="black")
        y += size
    return image


def stack(pages, across=False):
    """PIL images one under the other, or side by side, on white -> PIL image."""
    w, h = (max(page.size[side] for page in pages) for side in (0, 1))
    room = lambda page: (0, 0, GAP, h - page.height) if across else (0, 0, w - page.width, GAP)
    whole = np.concatenate([ImageOps.expand(page, room(page), "white") for page in pages], int(across))
    return Image.fromarray(whole[:, :-GAP] if across else whole[:-GAP])


def headed(image, text, colour="black"):
    """A picture under a strip with a text."""
    image = ImageOps.expand(image, (0, 22, 0, 0), "white")
    write(ImageDraw.Draw(image), (2, 3), text, 14, image.width - 4, fill=colour)
    return image


def panels(images, captions, height=224):
    """PIL images side by side at one height, a caption over each -> PIL image."""
    sized = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    return stack([*map(headed, sized, captions)], across=True)


def plot(title, x_name, y_name, series, size):
    """A line chart of {label: [(x, y), ...]} -> PIL image; least and largest value stand at the y axis."""
    page, foot = Image.new("RGB", size, "white"), size[1] - 24 - 16 * len(series)
    draw, points = ImageDraw.Draw(page), np.array(sum(series.values(), []) or [(0, 0)])
    (x1, y1), (x2, y2) = np.nanmin(points, 0), np.nanmax(points, 0)
    write(draw, (6, 4), f"{title}: {y_name} over {x_name} {x1:g} to {x2:g}", 13, size[0], fill="black")
    for y, value in (24, y2), (foot - 8, y1):
        write(draw, (6, y), f"{value:.4g}", 12, fill="black")
    for i, (label, own) in enumerate(series.items()):
        x, y = np.array(own).reshape(-1, 2).T
        line = list(zip(np.interp(x, (x1, x2), (60, size[0] - 10)), np.interp(y, (y1, y2), (foot, 32))))
        colour = f"hsl({137 * i % 360}, 90%, 35%)"
        draw.line(line, colour, 2)
        for end in line[-1:]:
            draw.circle(end, 3, colour)
        write(draw, (14, foot + 16 * (i + 1)), label, 12, fill=colour)
    return page


# ------------------------------------------------------------------------------------------ any model


def count_macs(model, images):
    """Multiply-accumulates of a forward pass: convolutions, linear layers, attention, squeeze-excitation."""
    scaled = []
    hooks = [m.register_forward_hook(lambda m, i, out: scaled.append(out.numel()))
             for m in model.modules() if isinstance(m, torchvision.ops.SqueezeExcitation)]
    # the fused attention kernel is counted as 0 on torch 2.11
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2 + sum(scaled)


def take(values, index):
    """Rows of values (B, N, ...) by their numbers (B, n) -> (B, n, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def fuse(logits):
    """Logits of several classifiers, (B, K) each -> log of the mean of their softmax probabilities (B, K)."""
    return torch.stack([x.float().log_softmax(1) for x in logits]).logsumexp(0) - math.log(len(logits))


# ------------------------------------------------------------------------------------------ the plain ViT

DEIT, JAX = "https://dl.fbaipublicfiles.com/deit/", "https://storage.googleapis.com/vit_models/imagenet21k/"
VITS = {  # arguments of VisionTransformer, official weights; deit: of ImageNet-1k, vit: of ImageNet-21k
    "deit_tiny": (dict(dim=192), DEIT + "deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_small": (dict(dim=384), DEIT + "deit_small_patch16_224-cd65a155.pth"),
    "deit_base": (dict(dim=768), DEIT + "deit_base_patch16_224-b5f2ef4d.pth"),
    "vit_base": (dict(dim=768), JAX + "ViT-B_16.npz"),
    # for small pictures, from scratch; the second costs a third at twice the side
    "toy_vit": (dict(dim=96, depth=4, heads=4, mlp_ratio=3, patch_size=8, stem="conv"), ""),
    "toy_vit16": (dict(dim=64, depth=2, heads=4, mlp_ratio=3, patch_size=16, stem="conv"), ""),
}


def vit(name, image_size, num_classes=0, drop_path=0.0):
    """The VisionTransformer `name` of VITS; image_size int or (height, width); num_classes 0: no head."""
    arguments, official = VITS[name]
    model = VisionTransformer(image_size, num_classes=num_classes, drop_path=drop_path, **arguments)
    model.official = official
    return model


class Attention(nn.Module):
    """Multi-head attention in two halves: a method can put other queries, keys and values between them."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """Normalised tokens (B, N, C) -> queries, keys, values (B, h, N, d) each."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, N, d)

    def merge(self, x):
        """Outputs of the heads (B, h, N, d) -> (B, N, C)."""
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward network: two linear layers with an activation between."""

    def __init__(self, dim, hidden, dim_out=None, activation=F.gelu):
        super().__init__()
        self.fc1, self.activation = nn.Linear(dim, hidden), activation
        self.fc2 = nn.Linear(hidden, dim_out or dim)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; stochastic depth drops a whole residual branch of an image."""

    def __init__(self, dim, heads, mlp_ratio=4, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, 1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, 1e-6), Mlp(dim, mlp_ratio * dim)
        self.drop_path = torchvision.ops.StochasticDepth(drop_path, "row")

    def finish(self, tokens, attended):
        """Tokens (B, N, C) and what their queries gathered (B, h, N, d) -> the block's output (B, N, C)."""
        tokens = tokens + self.drop_path(self.attn.merge(attended))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def forward(self, tokens, visit=None):
        """(B, N, C) -> (B, N, C). `visit(q, k)` gets queries and keys (B, h, N, d), cut from the graph."""
        q, k, v = self.attn.split(self.norm1(tokens))
        if visit:
            visit(q.detach(), k.detach())
        return self.finish(tokens, F.scaled_dot_product_attention(q, k, v))


class ConvStem(nn.Sequential):
    """A 3x3 convolution of stride 2 a halving: small images train far faster from scratch so."""

    def __init__(self, stride, dim):
        self.channels, self.stride, layers, inputs = dim, stride, [], 3
        for i in reversed(range(int(math.log2(stride)))):
            layers += torchvision.ops.Conv2dNormActivation(inputs, dim >> i, 3, 2)
            inputs = dim >> i
        super().__init__(*layers)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., ICLR 2021) under timm's names; drop_path grows linearly with depth.

    image_size int or (height, width); stem: None (patches), "conv", or a module with .channels and .stride.
    """

    def __init__(self, image_size, patch_size=16, dim=768, depth=12, heads=0, mlp_ratio=4, num_classes=0,
                 drop_path=0.0, stem=None):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.patch_size, self.official = patch_size, ""
        self.grid = tuple(n // patch_size for n in self.image_size)
        if any(n % patch_size for n in self.image_size):
            raise ValueError(f"--image-size {self.image_size}: use multiples of the patch size {patch_size}")
        stem = ConvStem(patch_size, dim) if stem == "conv" else stem
        channels, side = (stem.channels, patch_size // stem.stride) if stem else (3, patch_size)
        proj = nn.Conv2d(channels, dim, side, side)
        self.patch_embed = nn.Sequential(OrderedDict(backbone=stem or nn.Identity(), proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        rates = np.linspace(0, drop_path, depth)
        self.blocks = nn.ModuleList(Block(dim, heads or dim // 64, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for name, parameter in self.named_parameters():
            if parameter.ndim in (2, 3):  # linear layers, class token, positions; convolutions have four
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias") and not name.startswith("patch_embed"):
                nn.init.zeros_(parameter)

    def embed(self, images):
        """(B, 3, H, W) -> tokens (B, 1 + gh * gw, C): class token first, then the patches row by row."""
        check_images(images, self.image_size)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, C, gh, gw) -> (B, N, C)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed

    def features(self, images, visit=None):
        """(B, 3, H, W) -> tokens (B, N, C) of the last block, before the final norm. `visit`: see Block."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens, visit)
        return tokens

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, K)."""
        return self.head(self.norm(self.features(images)[:, 0]))


RENAMES = (  # Google's .npz and torchvision's vit_b_16 -> timm's names, in this order
    (r"^(opt/target/|params/)", ""),
    (r"^cls$|^class_token$", "cls_token"),
    (r"^Transformer/posembed_input/pos_embedding$|^encoder\.pos_embedding$", "pos_embed"),
    (r"^Transformer/encoderblock_(\d+)/|^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1\2."),
    (r"^Transformer/encoder_norm/|^encoder\.ln\.", "norm."),
    (r"LayerNorm_0/|ln_1\.", "norm1."),
    (r"LayerNorm_2/|ln_2\.", "norm2."),
    (r"MultiHeadDotProductAttention_1/out/|self_attention\.out_proj\.", "attn.proj."),
    (r"MultiHeadDotProductAttention_1/", "attn."),
    (r"self_attention\.in_proj_", "attn.qkv."),
    (r"MlpBlock_3/Dense_0/|mlp\.0\.|mlp\.linear_1\.", "mlp.fc1."),
    (r"MlpBlock_3/Dense_1/|mlp\.3\.|mlp\.linear_2\.", "mlp.fc2."),
    (r"^embedding/|^conv_proj\.", "patch_embed.proj."),
    (r"^heads\.head\.", "head."),
    (r"/", "."),
    (r"\.kernel$|\.scale$", ".weight"),
)


def vit_state(state, renames=()):
    """Weights of Google's .npz, torchvision, DeiT, timm or a model around a ViT -> timm's names."""
    out = {}
    for key, value in state.items():
        name = key
        for pattern, new in (*renames, *RENAMES):
            name = re.sub(pattern, new, name)
        if key.endswith("/kernel") and value.ndim == 4:  # JAX keeps inputs before outputs
            value = value.permute(3, 2, 0, 1)  # HWIO -> OIHW
        elif key.endswith("/kernel"):  # projection (h, d, C) -> (C, h * d); else (C, h, d) -> (h * d, C)
            value = value.flatten(0, -2).T if name.endswith("attn.proj.weight") else value.flatten(1).T
        elif key.endswith(("/bias", "/scale")):
            value = value.flatten()
        out[name] = value
    for name in [n for n in out if ".attn.query." in n]:  # three matrices -> rows q, k, v of one
        parts = [out.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        out[name.replace("query", "qkv")] = torch.cat(parts)
    prefix = next((n.removesuffix("cls_token") for n in out if n.endswith("cls_token")), "")
    out = {n.removeprefix(prefix): v for n, v in out.items() if n.startswith(prefix)}
    if "dist_token" in out:  # a distilled DeiT: its second token is dropped
        pos_embed = out["pos_embed"]
        out["pos_embed"] = torch.cat([pos_embed[:, :1], pos_embed[:, 2:]], 1)
    return out


def resize_pos_embed(pos_embed, grid, mode, old=()):
    """Position embeddings (1, 1 + gh * gw, C) of a grid `old`, else a square one -> of another grid.

    The class token's row is kept. Raises ValueError when the patches fill neither the old grid nor a square.
    """
    patches = pos_embed[:, 1:]
    N, side = patches.shape[1], math.isqrt(patches.shape[1])
    old = old if old and math.prod(old) == N else (side, side)
    if math.prod(old) != N:
        raise ValueError(f"position embeddings of {N} patches: no known and no square grid")
    patches = patches.unflatten(1, old).permute(0, 3, 1, 2).float()  # (1, C, gh, gw)
    patches = F.interpolate(patches, grid, mode=mode)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)


def load_vit(model, source, renames=()):
    """Load pretrained weights into a VisionTransformer, its head where it fits -> the state_dict in the file.

    source: "default" (the official file), a URL, DeiT's or timm's .pth, Google's .npz, torchvision's, a run.
    Anything missing or unexpected beyond heads (and a final norm replaced by nn.Identity) is a ValueError.
    """
    path = model.official if source == "default" else str(source)
    if not path:
        raise ValueError("--weights default: this backbone has no official weights; use none or a file")
    if path.startswith("http"):
        stamp = re.findall(r"-([0-9a-f]{8,})\.", path)  # DeiT's names end with the sha256, Google's do not
        path = str(fetch(path, *stamp))
    held = load_checkpoint(path)
    weights = state_in(held, path)
    state = vit_state(weights, renames)
    if "pos_embed" in state:
        mode = "bilinear" if path.endswith(".npz") else "bicubic"
        old = tuple(n // model.patch_size for n in held["recipe"]["image_size"]) if "recipe" in held else ()
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], model.grid, mode, old)
    heads = ["head.", "head_dist.", "pre_logits.", "dist_token"]
    if isinstance(model.norm, nn.Identity):
        heads.append("norm.")
    load_state(model, state, heads, path)
    return weights


# ------------------------------------------------------------------------------------------ attention rollout


@torch.no_grad()
def attention_weights(q, k, fusion="mean"):
    """Queries (B, h, n, d), keys (B, h, N, d) -> softmax weights, heads fused, fp32 (B, n, N)."""
    join = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}[fusion]
    q, k = (q.float() * q.shape[-1] ** -0.5).unbind(1), k.float().transpose(-2, -1).unbind(1)
    with torch.autocast(q[0].device.type, enabled=False):  # head by head: one matrix stays in the cache
        weights = functools.reduce(join, ((a @ b).softmax(-1) for a, b in zip(q, k)))
    return weights / len(q) if fusion == "mean" else weights


def rollout(attns):
    """Attention rollout (Abnar & Zuidema, ACL 2020; Eq. 2 of DCAL): what of each input reaches a deep token.

    Attention matrices (..., N, N), first block first -> their product with the residual paths, 0.5 S + 0.5 E,
    (..., N, N); rows are divided by their sums, for heads fused by max or min do not sum to one. What the
    methods run is `cls_rollout`.
    """
    total = eye = torch.eye(attns[0].shape[-1], device=attns[0].device, dtype=attns[0].dtype)
    for attn in attns:
        total = (attn + eye) / (attn + eye).sum(-1, keepdim=True) @ total
    return total


@torch.no_grad()
def cls_rollout(layers, fusion="mean"):
    """The class token's row (B, N) of `rollout`, from the (q, k) of each layer, first layer first; sums to 1.

    Vector-matrix products, deepest layer first: N^2 a layer instead of N^3, and one layer's matrix at a time.
    """
    row = torch.ones(1, 1, device=layers[0][0].device)  # of the deepest layer, the class token's row alone
    for q, k in reversed(layers):
        weights = attention_weights(q[:, :, : row.shape[1]], k, fusion)  # (B, N, N), of the deepest (B, 1, N)
        share = row / (1 + weights.sum(-1))  # of the rows of (S + E) / sum: E keeps it, S hands it down
        row = (share[..., None] * weights).sum(1)
        row[:, : share.shape[1]] += share
    return row
