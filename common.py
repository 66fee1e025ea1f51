"""What the five method files share: the recipe and its command line, schedules, weights, pictures, and the plain ViT.

Nothing of ours is imported here. Order: recipes and tables -> learning rate -> weights -> pictures -> counting -> ViT and rollout.
"""
import argparse
import dataclasses
import hashlib
import math
import os
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------------------------------------------------------ recipes and tables


def opt(default, help, choices=(), group="method"):
    """A recipe field: its default, what it means (unit and source), the values allowed, its group in --help."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "group": group})


def _input(default, help, choices=()):
    return opt(default, help, choices, "input")


def _training(default, help, choices=()):
    return opt(default, help, choices, "training")


@dataclass(frozen=True)
class Recipe:
    """What every training needs. A method adds its own switches in a subclass of its file."""

    # ---- input: photo -> (3, H, W)
    task: str = _input("classify", "classify: logits and accuracy; reid: features, mAP and rank-k", ("classify", "reid"))
    image_size: tuple[int, int] = _input((224, 224), "height,width of the model's input in pixels")
    resize: tuple[int, int] = _input((0, 0), "height,width to which a photo is resized (aspect not kept) before the crop of image_size; 0,0: image_size")
    crop: str = _input("random", "training crop: random place in the resized photo; resized: random area and aspect of the photo; none", ("random", "resized", "none"))
    crop_area: tuple[float, float] = _input((0.08, 1.0), "crop=resized: least and largest share of the photo's area")
    crop_ratio: tuple[float, float] = _input((0.75, 4 / 3), "crop=resized: least and largest width / height")
    pad: int = _input(0, "crop=random: border of zeros added on each side first, pixels of the resized photo")
    interpolation: str = _input("bilinear", "resampling of photos; random draws one of Pillow's filters for each training photo", ("nearest", "bilinear", "bicubic", "random"))
    normalize: str = _input("imagenet", "imagenet: (x - mean) / std of ImageNet; half: x in [-1, 1]", ("imagenet", "half"))
    hflip: float = _input(0.5, "probability of a mirror image")
    rotate: float = _input(0.0, "largest rotation, degrees")
    translate: float = _input(0.0, "largest shift as a share of the side")
    zoom: tuple[float, float] = _input((1.0, 1.0), "range of a random zoom about the centre")
    affine_prob: float = _input(1.0, "probability of the rotation, shift and zoom")
    brightness: float = _input(0.0, "colour jitter: brightness factor in 1 -+ this")
    contrast: float = _input(0.0, "colour jitter: contrast factor in 1 -+ this")
    saturation: float = _input(0.0, "colour jitter: saturation factor in 1 -+ this")
    hue: float = _input(0.0, "colour jitter: hue shift in -+ this, in turns (at most 0.5)")
    jitter_prob: float = _input(1.0, "probability of the colour jitter")
    erasing: float = _input(0.0, "probability of random erasing with noise")
    boxes: bool = _input(False, "train and test on the object boxes instead of the whole photos")
    val_fraction: float = _input(0.0, "share of each class cut from train as a validation split (never from test)")
    train_split: str = _input("trainval", "Aircraft, Flowers, MSMT17: train on trainval or on train alone", ("trainval", "train"))
    crop_banner: bool = _input(False, "Aircraft: cut the 20-pixel copyright banner (the literature leaves it on)")
    toy_preset: str = _input("birds", "which toy birds are drawn for --data toy", ("birds", "birds-easy", "birds-small", "birds-pretrain"))
    toy_train: int = _input(0, "toy: training images a class; 0: the preset's")
    toy_test: int = _input(0, "toy: test images a class; 0: the preset's")

    # ---- training
    batch_size: int = _training(32, "images a step, over all processes")
    instances: int = _training(0, "reid: images of each identity in a batch (K of a P x K batch); 0: plain shuffling")
    epochs: int = _training(100, "passes over the training set")
    iterations: int = _training(0, "length of the run in steps; 0: given by epochs")
    optimizer: str = _training("sgd", "optimizer", ("sgd", "adam", "adamw", "radam"))
    lr: float = _training(0.1, "peak learning rate")
    lr_batch: int = _training(0, "lr is for this batch size and scales linearly with batch_size; 0: lr is used as it is")
    momentum: float = _training(0.9, "SGD's momentum; Adam's beta 1")
    eps: float = _training(1e-8, "Adam's epsilon")
    weight_decay: float = _training(0.0, "weight decay (decoupled in adamw and radam)")
    schedule: str = _training("cosine", "cosine; steps: times 0.1 at each milestone; onecycle: cosine up to lr and down; constant", ("cosine", "steps", "onecycle", "constant"))
    milestones: tuple[float, ...] = _training((), "schedule=steps: shares of the run after which lr is multiplied by 0.1")
    warmup: float = _training(0.0, "linear warm-up, in epochs (in steps where iterations gives the length)")
    warmup_lr: float = _training(0.0, "learning rate at the start of the warm-up")
    min_lr: float = _training(0.0, "learning rate at the end of the cosine")
    label_smoothing: float = _training(0.0, "share of the target spread evenly over the classes")
    drop_path: float = _training(0.0, "stochastic depth: drop probability of the last block")
    grad_clip: float = _training(0.0, "largest global norm of the gradient; 0: no clipping")
    accumulate: int = _training(1, "a batch is computed in this many parts, to save memory")
    ema: float = _training(0.0, "decay of an exponential moving average of the weights, used for evaluation; 0: none")
    amp: str = _training("auto", "mixed precision; auto: bf16 on CUDA that has it, else off", ("auto", "bf16", "fp16", "off"))
    weights: str = _training("none", "none: random; default: the official pretrained weights; FILE: a checkpoint or a run folder")


@dataclass(frozen=True)
class Table:
    """A table of the paper: `rows` of (name, overrides of recipe fields, the paper's value or None)."""

    title: str
    data: str  # the dataset it is about, a key of the method's RECIPES
    metric: str  # "top1" (%), "mAP" (%), "params" (M), "macs" (G), ...
    rows: tuple[tuple[str, dict, float | None], ...]


def parse_tuple(kind, text):
    """"448" or "448,448" -> tuple of kind; raises ValueError on anything else."""
    return tuple(kind(v) for v in text.split(",")) if text else ()


def add_options(parser, recipe, sweep=False):
    """One typed flag for each recipe field, its value as the default. With sweep, text fields take several values with commas."""
    groups, hints = {}, typing.get_type_hints(type(recipe))
    for f in dataclasses.fields(recipe):
        name, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group({"method": f"{type(recipe).__module__}: the paper's own switches"}.get(group, group))
        value, choices = getattr(recipe, f.name), f.metadata["choices"]
        shown = ",".join(str(v) for v in value) if isinstance(value, tuple) else value
        text = f.metadata["help"].replace("%", "%%") + f" [{shown}]"
        add = groups[group].add_argument
        if kind is bool:
            add(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif typing.get_origin(kind) is tuple:
            add(name, type=_tuple_of(kind, f.name), default=argparse.SUPPRESS, metavar="A,B", help=text)
        elif choices:
            add(name, type=_one_of(choices, sweep), default=argparse.SUPPRESS, metavar="{" + ",".join(map(str, choices)) + "}", help=text)
        else:
            add(name, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text)


def _tuple_of(kind, field_name):
    of, length = typing.get_args(kind)[0], len(typing.get_args(kind))
    fixed = typing.get_args(kind)[-1] is not Ellipsis

    def parse(text):
        values = parse_tuple(of, text)
        if fixed and len(values) == 1:
            values *= length
        if fixed and len(values) != length:
            raise ValueError(f"{field_name} takes {length} values")
        return values

    parse.__name__ = f"{length} comma-separated {of.__name__}" if fixed else f"comma-separated {of.__name__}"
    return parse


def _one_of(choices, sweep):
    def parse(text):
        for value in text.split(",") if sweep else (text,):
            if value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(choices)}")
        return text

    return parse


# ------------------------------------------------------------------------------------------------ learning rate


def schedule(recipe, step, steps, warmup=0, peak=1.0):
    """Learning rate of update `step` (0-based) of `steps`; pure. min_lr and warmup_lr are absolute, warmup is in steps."""
    if step < warmup:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * step / warmup
    t = min(1.0, (step - warmup) / max(1, steps - warmup))  # 0 .. 1 over the rest of the run
    if recipe.schedule == "cosine":
        return recipe.min_lr + (peak - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * t))
    if recipe.schedule == "steps":
        return peak * 0.1 ** sum(step >= round(m * steps) for m in recipe.milestones)
    if recipe.schedule == "onecycle":  # cosine from peak / 25 up to the peak at half time, then down to peak / 1e5
        a, b, u = (1 / 25, 1.0, 2 * t) if t < 0.5 else (1.0, 1e-5, 2 * t - 1)
        return peak * (a + (b - a) * 0.5 * (1 - math.cos(math.pi * u)))
    return peak


def lr_at(recipe, step, steps, steps_per_epoch=1, group=None):
    """Learning rate of update `step` (0-based) of `steps`, of a parameter group or of the recipe.

    The recipe's lr is scaled by batch_size / lr_batch when lr_batch is set. A group may carry "lr_scale", a factor on the
    recipe's lr, or "phases", a list of (length in any unit, peak): the schedule runs once in each; peak 0 keeps it frozen.
    """
    group = group or {}
    base = recipe.lr * (recipe.batch_size / recipe.lr_batch if recipe.lr_batch else 1.0)
    if "phases" not in group:
        warmup = round(recipe.warmup * (1 if recipe.iterations else steps_per_epoch))
        return schedule(recipe, step, steps, warmup, base) * group.get("lr_scale", 1.0)
    total, done = sum(length for length, _ in group["phases"]), 0.0
    for length, peak in group["phases"]:
        begin, done = round(done / total * steps), done + length
        end = round(done / total * steps)
        if step < end:
            break
    return schedule(recipe, step - begin, max(1, end - begin), 0, peak) if peak else 0.0


# ------------------------------------------------------------------------------------------------ checkpoints and weights

FORMAT = 1  # of our checkpoint files


def checksum(value, digest=None):
    """sha256 over a nested structure of dicts, lists, tuples, tensors and plain values: what a checkpoint holds."""
    top, digest = digest is None, digest or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        digest.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(value, dict):
        digest.update(f"D{len(value)}".encode())
        for key in value:
            digest.update(f"K{key!r}".encode())
            checksum(value[key], digest)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            checksum(item, digest)
    else:
        digest.update(f"V{value!r}".encode())
    return digest.hexdigest() if top else None


def save_checkpoint(path, state):
    """Write `state` (tensors and plain values) to `path` with a checksum: temporary file, flush, replace; the old file becomes .prev."""
    path = Path(path)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save({"format": FORMAT, "checksum": checksum(state), "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # a full disk: torch reports it as either
        part.unlink(missing_ok=True)
        raise OSError(f"could not save {path}: {error}; the previous checkpoint is untouched; free some space and --resume") from error
    if path.exists():
        os.replace(path, path.with_suffix(".prev.pt"))
    os.replace(part, path)


def load_checkpoint(path):
    """Read what save_checkpoint wrote. Raises ValueError for a damaged, foreign or newer file; nothing but tensors and plain values is unpickled."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a zip or pickle error of any kind: torch raises half a dozen
        raise ValueError(f"{path} is damaged or no checkpoint of ours ({type(error).__name__})") from None
    if not isinstance(held, dict) or not {"format", "checksum", "state"} <= set(held):
        raise ValueError(f"{path} is no checkpoint of ours (it has no format, checksum and state)")
    if held["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {held['format']}, this code reads {FORMAT}: use the version that wrote it")
    if checksum(held["state"]) != held["checksum"]:
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return held["state"]


def fetch(url, sha256=""):
    """Download `url` once into torch's hub folder and return the path; `sha256` (a prefix is enough) is checked when given."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 or None, progress=sys.stderr.isatty())
        except OSError as error:
            raise FileNotFoundError(f"could not download {url} ({error}); fetch it by hand to {path}, or use --weights none") from None
    return path


def read_state(source):
    """Weights of a file as a dict name -> tensor: a run folder, one of our checkpoints, a .pth/.pyth/.pt/.bin of others, or an .npz."""
    path = Path(source)
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"--weights {source}: no such file; give none, default, a checkpoint file or a run folder")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--weights {source}: cannot be read as tensors ({type(error).__name__}); convert it to a plain state_dict") from None
    if isinstance(held, dict) and {"format", "checksum", "state"} <= set(held):
        state = load_checkpoint(path)
        return state.get("ema") or state["model"]
    for key in ("state", "model", "model_state", "state_dict"):  # how DeiT, SlowFast and others wrap theirs
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    if not isinstance(held, dict) or not all(isinstance(v, torch.Tensor) for v in held.values()):
        raise ValueError(f"--weights {source}: holds no state_dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in held.items()}


def load_state(model, state, heads=(), source="the file"):
    """Load `state` into `model`. Keys that start with one of `heads` may be missing, surplus or of another shape; anything else is a ValueError."""
    own, heads = model.state_dict(), tuple(heads)
    is_head = lambda key: bool(heads) and key.startswith(heads)
    state = {k: v for k, v in state.items() if not (is_head(k) and (k not in own or own[k].shape != v.shape))}
    missing = [k for k in own if k not in state and not is_head(k)]
    unexpected = [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in state if k in own and own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        raise ValueError(f"{source} does not fit {type(model).__name__}: missing {missing[:8]} ({len(missing)}), unexpected {unexpected[:8]} ({len(unexpected)}), other shapes {shapes[:8]} ({len(shapes)})")
    model.load_state_dict(state, strict=False)


# ------------------------------------------------------------------------------------------------ pictures

MEAN_STD = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
COLOURS = ("#ffd400", "#00c2ff", "#ff4fa3", "#7cff4f", "#ff8a1f", "#b48cff")  # in the order of boxes, readable on photos


def normalize(images, how):
    """uint8 (B, 3, H, W) -> float, standardised as the recipe's `normalize` says."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) * 255 for v in MEAN_STD[how])
    return (images.float() - mean) / std


def to_pil(image, how):
    """One standardised image (3, H, W) -> PIL image; the inverse of `normalize`."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in MEAN_STD[how])
    pixels = (image.detach().float().cpu() * std + mean).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def heat(image, values, strength=0.55):
    """Lay a map (h, w) over a PIL image, dark blue (least) to yellow (most)."""
    values = values.detach().float().cpu()
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    values = F.interpolate(values[None, None], size=image.size[::-1], mode="bilinear", align_corners=False)[0, 0].clamp(0, 1).numpy()
    stops = np.array([(12, 10, 60), (90, 20, 130), (200, 50, 90), (250, 140, 40), (255, 245, 120)], float)
    at = values * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    colour = stops[low] + (stops[low + 1] - stops[low]) * (at - low)[..., None]
    return Image.fromarray((np.asarray(image.convert("RGB"), float) * (1 - strength) + colour * strength).astype(np.uint8))


def draw_boxes(image, boxes, labels=(), colours=COLOURS, width=2):
    """Copy of a PIL image with boxes (n, 4) xyxy in its pixels, each in its colour, with an optional label inside the corner."""
    image = image.convert("RGB")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(10, image.height // 18))
    for i, (x1, y1, x2, y2) in enumerate(torch.as_tensor(boxes).tolist()):
        colour = colours[i % len(colours)]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        if i < len(labels):
            draw.text((x1 + width + 1, y1 + width), str(labels[i]), fill=colour, font=font, stroke_width=2, stroke_fill="black")
    return image


def panels(images, captions, height=224, gap=6):
    """PIL images side by side at one height, a caption under each -> PIL image."""
    images = [im.convert("RGB").resize((max(1, round(im.width * height / im.height)), height), Image.Resampling.NEAREST if im.height < height // 2 else Image.Resampling.BICUBIC) for im in images]
    font, strip = ImageFont.load_default(size=14), 22
    page = Image.new("RGB", (sum(im.width for im in images) + gap * (len(images) + 1), height + strip + gap), "white")
    draw, x = ImageDraw.Draw(page), gap
    for image, caption in zip(images, captions):
        page.paste(image, (x, gap))
        while caption and draw.textlength(caption, font=font) > image.width:
            caption = caption[:-2].rstrip() + "…" if len(caption) > 2 else ""
        draw.text((x, height + gap + 2), caption, fill="black", font=font)
        x += image.width + gap
    return page


def stack(pages, gap=4):
    """PIL images one under the other, left-aligned on white -> PIL image."""
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages) + gap * (len(pages) - 1)), "white")
    y = 0
    for p in pages:
        page.paste(p, (0, y))
        y += p.height + gap
    return page


# ------------------------------------------------------------------------------------------------ counting


def count_macs(model, images):
    """Multiply-accumulates of one forward pass: convolutions, linear layers, attention, and the scaling of squeeze-excitation blocks."""
    scaled = []
    hooks = [m.register_forward_hook(lambda m, i, out: scaled.append(out.numel())) for m in model.modules() if isinstance(m, torchvision.ops.SqueezeExcitation)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel is counted as 0 on torch 2.11
        model(images)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2 + sum(scaled)
