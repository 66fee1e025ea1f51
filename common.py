"""What the five method files share: the recipe and its command line, schedules, weights, pictures, and the plain ViT.

Nothing of ours is imported here. Order: recipes and tables -> learning rate -> weights -> pictures -> counting -> ViT and rollout.
"""
import argparse
import dataclasses
import hashlib
import itertools
import math
import os
import re
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

    def __post_init__(self):
        """Values that no run can have are a ValueError before anything is read or written."""
        for names, least, most in (
            ("batch_size epochs accumulate", 1, math.inf),
            ("iterations instances toy_train toy_test pad lr_batch lr weight_decay warmup warmup_lr min_lr grad_clip rotate translate brightness contrast saturation", 0, math.inf),
            ("hflip affine_prob jitter_prob erasing label_smoothing drop_path ema", 0, 1), ("hue", 0, 0.5), ("val_fraction", 0, 0.9),
        ):
            for name in names.split():
                if not least <= getattr(self, name) <= most:
                    raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is out of range; allowed: at least {least}" + (f", at most {most}" if most < math.inf else ""))
        if min(self.image_size) < 1 or min(self.resize) < 0 or not 0 < self.zoom[0] <= self.zoom[1] or not 0 < self.crop_area[0] <= self.crop_area[1] <= 1 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"--image-size {self.image_size}, --resize {self.resize}, --zoom {self.zoom}, --crop-area {self.crop_area} or --crop-ratio {self.crop_ratio} is out of range; sizes in pixels, areas in (0, 1], smaller value first")
        if self.instances and self.batch_size % self.instances:
            raise ValueError(f"--batch-size {self.batch_size} holds no whole groups of --instances {self.instances}; choose a multiple")


@dataclass(frozen=True)
class Table:
    """A table of the paper: `rows` of (name, overrides of recipe fields, the paper's value or None).

    The override "eval" is a dict of fields that only the evaluation uses: rows that differ in nothing else are evaluations of one training.
    """

    title: str
    data: str  # the dataset it is about, a key of the method's RECIPES
    metric: str  # "top1" (%), "mAP" (%), "params" (M), "macs" (G), ...
    rows: tuple[tuple[str, dict, float | None], ...]


def split_row(overrides):
    """A row's overrides -> (what it trains with, what its evaluation changes)."""
    return {k: v for k, v in overrides.items() if k != "eval"}, overrides.get("eval", {})


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


def load_newest(folder):
    """A run folder's last.pt, or the checkpoint before it when that is damaged or missing -> (state, path, what was wrong or None)."""
    problem = None
    for path in (Path(folder) / "last.pt", Path(folder) / "last.prev.pt"):
        try:
            return load_checkpoint(path), path, problem
        except (ValueError, FileNotFoundError) as error:
            problem = problem or error
    raise problem


def fetch(url, sha256=""):
    """Download `url` once into torch's hub folder and return the path; `sha256` (a prefix is enough) is checked when given."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 or None, progress=sys.stderr.isatty())
        except OSError as error:
            raise FileNotFoundError(f"could not download {url} ({error}); fetch it by hand to {path}, or use --weights none") from None
        except RuntimeError as error:  # what torch raises for a wrong hash; it keeps no file then
            raise ValueError(f"{url} is not the published file ({error}); try again, or fetch it by hand to {path}") from None
    return path


def read_state(source):
    """Weights of a file as a dict name -> tensor: a run folder, one of our checkpoints, a .pth/.pyth/.pt/.bin of others, or an .npz."""
    path = Path(source)
    if list(path.glob("last*.pt")):
        state = load_newest(path)[0]
        return state["ema"] or state["model"]
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
        return state["ema"] or state["model"]
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
    return images.float().sub_(mean).div_(std)  # in place: a fresh 100 MB costs more than the arithmetic


def to_pil(image, how):
    """One standardised image (3, H, W) -> PIL image; the inverse of `normalize`."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in MEAN_STD[how])
    pixels = (image.detach().float().cpu() * std + mean).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def heat(image, values, strength=0.55, span=None):
    """Lay a map (h, w) over a PIL image, dark blue (least) to yellow (most); `span` (least, most) puts several maps on one scale."""
    values = values.detach().float().cpu()
    least, most = (float(v) for v in span or (values.min(), values.max()))
    values = ((values - least) / max(most - least, 1e-12)).clamp(0, 1)
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

# ------------------------------------------------------------------------------------------------ the plain ViT and attention rollout

DEIT, JAX = "https://dl.fbaipublicfiles.com/deit/", "https://storage.googleapis.com/vit_models/imagenet21k/"
VITS = {  # name -> (arguments of VisionTransformer, official weights); deit: trained on ImageNet-1k, vit: on ImageNet-21k
    "deit_tiny": (dict(dim=192, depth=12, heads=3), DEIT + "deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_small": (dict(dim=384, depth=12, heads=6), DEIT + "deit_small_patch16_224-cd65a155.pth"),
    "deit_base": (dict(dim=768, depth=12, heads=12), DEIT + "deit_base_patch16_224-b5f2ef4d.pth"),
    "vit_base": (dict(dim=768, depth=12, heads=12), JAX + "ViT-B_16.npz"),
    "r50_vit_base": (dict(dim=768, depth=12, heads=12, stem="r50"), JAX + "R50%2BViT-B_16.npz"),
    "toy_vit": (dict(dim=96, depth=4, heads=4, mlp_ratio=3, patch_size=8, stem="conv"), ""),  # for small pictures, from scratch
    "toy_vit16": (dict(dim=64, depth=2, heads=4, mlp_ratio=3, patch_size=16, stem="conv"), ""),  # a third of its cost at twice the pixels
}


def vit(name, image_size, num_classes=0, drop_path=0.0):
    """The VisionTransformer called `name` in VITS; num_classes 0: no head."""
    if name not in VITS:
        raise ValueError(f"backbone {name!r} is unknown; allowed: {', '.join(VITS)}")
    model = VisionTransformer(image_size, num_classes=num_classes, drop_path=drop_path, **VITS[name][0])
    model.official = VITS[name][1]
    return model


class Attention(nn.Module):
    """Multi-head attention in two halves, so that a method can put other queries, keys and values between them."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """Normalised tokens (B, N, C) -> queries, keys, values (B, h, N, d) each."""
        B, N, C = x.shape
        return self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x):
        """Outputs of the heads (B, h, N, d) -> (B, N, C)."""
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward network: two linear layers with a GELU between."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; stochastic depth drops a whole residual branch of an image."""

    def __init__(self, dim, heads, mlp_ratio=4, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = torchvision.ops.StochasticDepth(drop_path, "row")

    def finish(self, tokens, attended):
        """Tokens (B, N, C) and what their queries gathered (B, h, N, d) -> the block's output (B, N, C)."""
        tokens = tokens + self.drop_path(self.attn.merge(attended))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def forward(self, tokens, visit=None):
        """(B, N, C) -> (B, N, C). `visit(q, k)` is called with the queries and keys (B, h, N, d), cut from the graph: see cls_rollout."""
        q, k, v = self.attn.split(self.norm1(tokens))
        if visit is not None:
            visit(q.detach(), k.detach())
        return self.finish(tokens, F.scaled_dot_product_attention(q, k, v))


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> patch tokens (B, N, C), row by row; an optional convolutional stem comes before the projection."""

    def __init__(self, patch_size, dim, stem):
        super().__init__()
        if stem == "patch":
            self.backbone, self.proj = nn.Identity(), nn.Conv2d(3, dim, patch_size, patch_size)
        elif stem == "r50":
            self.backbone, self.proj = ResNetStem(), nn.Conv2d(1024, dim, patch_size // 16, patch_size // 16)
        else:  # one 3x3 convolution of stride 2 per halving: small images train far faster from scratch
            widths = [3] + [dim >> i for i in reversed(range(int(math.log2(patch_size))))]
            layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())]
            self.backbone, self.proj = nn.Sequential(*layers), nn.Conv2d(dim, dim, 1)

    def forward(self, images):
        return self.proj(self.backbone(images)).flatten(2).transpose(1, 2)  # (B, C, gh, gw) -> (B, N, C)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., ICLR 2021) under timm's parameter names. image_size is (height, width); drop_path grows linearly to its value."""

    def __init__(self, image_size, patch_size=16, dim=768, depth=12, heads=12, mlp_ratio=4, num_classes=0, drop_path=0.0, stem="patch"):
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(f"image_size {image_size[0]},{image_size[1]} is not divisible by the patch size {patch_size}; use multiples of {patch_size}")
        self.patch_size, self.official = patch_size, ""
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(patch_size, dim, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for parameter in (self.cls_token, self.pos_embed, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))):
            nn.init.trunc_normal_(parameter, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def embed(self, images):
        """(B, 3, H, W) -> tokens (B, 1 + gh * gw, C): class token first, then the patches row by row."""
        if images.shape[-2:] != (self.grid[0] * self.patch_size, self.grid[1] * self.patch_size):
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels for a ViT of {tuple(g * self.patch_size for g in self.grid)}; set image_size")
        patches = self.patch_embed(images)
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


# ---- the ResNet-50 stem of the hybrid R50 + ViT-B/16: stages 3-4-9, weight-standardised convolutions, GroupNorm, TensorFlow's "SAME" padding


def same_pad(x, kernel, stride):
    """Pad as TensorFlow does: output = ceil(input / stride), the odd pixel at the right and bottom."""
    total = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    return F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))


class StdConv(nn.Conv2d):
    """Convolution whose kernels have zero mean and unit deviation (population; Google adds 1e-5 to the deviation)."""

    def __init__(self, inputs, outputs, kernel, stride=1):
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return F.conv2d(same_pad(x, self.kernel_size[0], self.stride[0]), (self.weight - mean) / (std + 1e-5), None, self.stride)


class Bottleneck(nn.Module):
    """1x1, 3x3 (stride), 1x1 with GroupNorm; ReLU after the sum."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        mid = outputs // 4
        for i, (a, b, kernel, s) in enumerate(((inputs, mid, 1, 1), (mid, mid, 3, stride), (mid, outputs, 1, 1)), 1):
            self.add_module(f"conv{i}", StdConv(a, b, kernel, s))
            self.add_module(f"norm{i}", nn.GroupNorm(32, b, eps=1e-6))
        project = inputs != outputs or stride > 1
        self.downsample = nn.ModuleDict({"conv": StdConv(inputs, outputs, 1, stride), "norm": nn.GroupNorm(32, outputs, eps=1e-6)}) if project else None

    def forward(self, x):
        shortcut = self.downsample["norm"](self.downsample["conv"](x)) if self.downsample else x
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class ResNetStem(nn.Module):
    """(B, 3, H, W) -> (B, 1024, H / 16, W / 16)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleDict({"conv": StdConv(3, 64, 7, 2), "norm": nn.GroupNorm(32, 64, eps=1e-6)})
        stages = [(64, 256, 3, 1), (256, 512, 4, 2), (512, 1024, 9, 2)]
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.Sequential(*(Bottleneck(b if u else a, b, 1 if u else s) for u in range(n)))}) for a, b, n, s in stages)

    def forward(self, x):
        x = F.relu(self.stem["norm"](self.stem["conv"](x)))
        x = F.max_pool2d(same_pad(x, 3, 2), 3, 2)
        for stage in self.stages:
            x = stage["blocks"](x)
        return x


# ---- weights


RENAMES = (  # Google's .npz and torchvision's vit_b_16 -> timm's names, in this order
    (r"^(opt/target/|params/)", ""), (r"^cls$|^class_token$", "cls_token"), (r"^Transformer/posembed_input/pos_embedding$|^encoder\.pos_embedding$", "pos_embed"),
    (r"^Transformer/encoderblock_(\d+)/|^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1\2."), (r"^Transformer/encoder_norm/|^encoder\.ln\.", "norm."),
    (r"LayerNorm_0/|ln_1\.", "norm1."), (r"LayerNorm_2/|ln_2\.", "norm2."), (r"MultiHeadDotProductAttention_1/out/|self_attention\.out_proj\.", "attn.proj."),
    (r"MultiHeadDotProductAttention_1/", "attn."), (r"self_attention\.in_proj_", "attn.qkv."), (r"MlpBlock_3/Dense_0/|mlp\.0\.|mlp\.linear_1\.", "mlp.fc1."),
    (r"MlpBlock_3/Dense_1/|mlp\.3\.|mlp\.linear_2\.", "mlp.fc2."), (r"^embedding/|^conv_proj\.", "patch_embed.proj."), (r"^heads\.head\.", "head."),
    (r"^conv_root/", "patch_embed.backbone.stem.conv."), (r"^gn_root/", "patch_embed.backbone.stem.norm."),
    (r"^block(\d+)/unit0?(\d+)/", lambda m: f"patch_embed.backbone.stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}."),
    (r"conv_proj/", "downsample.conv."), (r"gn_proj/", "downsample.norm."), (r"(conv\d)/", r"\1."), (r"gn(\d)/", r"norm\1."),
    (r"/", "."), (r"\.kernel$|\.scale$", ".weight"),
)


def vit_state(state):
    """Weights of Google's .npz, torchvision, DeiT or timm, or a model of ours around a ViT -> dict under timm's names, heads left out."""
    out = {}
    for key, value in state.items():
        name = key
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if key.endswith("/kernel"):  # JAX keeps inputs before outputs
            if value.ndim == 4:
                value = value.permute(3, 2, 0, 1)  # HWIO -> OIHW
            elif name.endswith("attn.proj.weight"):
                value = value.flatten(0, 1).T  # (h, d, C) -> (C, C)
            else:
                value = value.flatten(1).T  # (C, h, d) or (C, D) -> outputs first
        elif "/" in key and key.endswith(("/bias", "/scale")):
            value = value.flatten()
        out[name] = value
    for name in [n for n in out if ".attn.query." in n]:  # three matrices -> rows q, k, v of one
        out[name.replace("query", "qkv")] = torch.cat([out.pop(name.replace("query", part)) for part in ("query", "key", "value")])
    prefix = next((n.removesuffix("cls_token") for n in out if n.endswith("cls_token")), "")
    out = {n.removeprefix(prefix): v for n, v in out.items() if n.startswith(prefix)}
    if "dist_token" in out:  # a distilled DeiT: its second token and head are dropped
        out["pos_embed"] = torch.cat([out["pos_embed"][:, :1], out["pos_embed"][:, 2:]], 1)
    return {n: v for n, v in out.items() if not n.startswith(("head.", "head_dist.", "pre_logits.", "dist_token"))}


def resize_pos_embed(pos_embed, grid, mode):
    """Position embeddings (1, 1 + g * g, C) of a square grid -> (1, 1 + gh * gw, C): the class token's row is kept, the grid interpolated."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    if patches.shape[1] == grid[0] * grid[1]:
        return pos_embed
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"position embeddings of {patches.shape[1]} patches are no square grid and cannot be resized to {grid[0]}x{grid[1]}; use the image_size of the weights")
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, g, g)
    patches = F.interpolate(patches.float(), grid, mode=mode, align_corners=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], 1)


def load_vit(model, source):
    """Load pretrained weights into a VisionTransformer, all but its head, and return the dict that the file held.

    source: "default" (the official file), a URL, a DeiT or timm .pth, Google's .npz, torchvision's vit_b_16, or a run of ours.
    Anything missing or unexpected beyond heads (and a final norm that was replaced by nn.Identity) is a ValueError that lists it.
    """
    path = model.official if source == "default" else source
    if not path:
        raise ValueError("--weights default: there are no official weights for this backbone; use none or a file")
    if str(path).startswith("http"):
        stamp = re.search(r"-([0-9a-f]{8,})\.", path)  # DeiT and timm publish the sha256 in the file's name, Google none
        path = fetch(path, stamp[1] if stamp else "")
    held = read_state(path)
    state = vit_state(held)
    if "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], model.grid, "bilinear" if str(path).endswith(".npz") else "bicubic")
    if isinstance(model.norm, nn.Identity):
        state = {n: v for n, v in state.items() if not n.startswith("norm.")}
    load_state(model, state, heads=("head.",), source=path)
    return held


# ---- attention rollout (Abnar & Zuidema, ACL 2020): how much of each input token reaches each token of a deep layer


@torch.no_grad()
def attention_weights(q, k, fusion="mean"):
    """Queries (B, h, n, d) and keys (B, h, N, d) -> softmax weights fused over the heads (mean, max or min), (B, n, N), at least fp32."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return weights.mean(1) if fusion == "mean" else weights.amax(1) if fusion == "max" else weights.amin(1)


def attend(q, k, v, memory=None):
    """F.scaled_dot_product_attention of queries, keys and values (B, h, N, d), and what cls_rollout needs of the layer.

    That is (q, k), cut from the graph; but at inference on a CPU the head-mean weights (B, N, N), written to `memory` when given: summed up
    while each head's rows are in cache anyway, which is cheaper than computing them twice.
    """
    if q.requires_grad or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v), (q.detach(), k.detach())
    (B, h, N, d), out, full = q.shape, torch.empty_like(q), torch.promote_types(q.dtype, torch.float32)
    mean = torch.empty(B, N, N, dtype=full) if memory is None else memory
    with torch.autocast("cpu", enabled=False):
        q, k, v = (t.to(full) for t in (q * d**-0.5, k, v))
        scratch = q.new_empty(min(N, 256), N)
        for b, i, head in itertools.product(range(B), range(0, N, 256), range(h)):
            rows, total = slice(i, i + 256), mean[b, i : i + 256]
            weights = torch.mm(q[b, head, rows], k[b, head].T, out=scratch[: min(256, N - i)])
            weights = torch.softmax(weights, -1, out=weights)
            out[b, head, rows] = weights @ v[b, head]
            total.add_(weights) if head else total.copy_(weights)
    return out, mean.div_(h)


def rollout(attns):
    """Eq. 2 of DCAL, literally: attention matrices (..., N, N), first block first -> their product with the residual paths (..., N, N)."""
    total = eye = torch.eye(attns[0].shape[-1], device=attns[0].device, dtype=attns[0].dtype)
    for attn in attns:
        total = (attn + eye) / (attn + eye).sum(-1, keepdim=True) @ total  # 0.5 S + 0.5 E, as rows of S sum to one (unless heads were fused by max or min)
    return total


@torch.no_grad()
def cls_rollout(layers, fusion="mean"):
    """The class token's row (B, N) of `rollout`, as vector-matrix products from the deepest layer down: N^2 instead of N^3 a layer.

    layers, first block first: a block's head-fused attention (B, N, N), or its (q, k) as Block visits them. From (q, k) the weights are
    recomputed a slab of rows at a time, so that no N x N matrix is ever kept.
    """
    row = None
    for layer in reversed(layers):
        q, k = layer if isinstance(layer, tuple) else (layer, layer)
        B, N = k.shape[0], k.shape[-2]
        if row is None:
            row = torch.ones(B, 1, device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))  # of the deepest layer only the class token's own row counts
        n, new = row.shape[1], row.new_zeros(B, N)
        images, rows = (1, 128) if k.device.type == "cpu" else (max(1, 2**27 // (k.shape[1] * N * N)), N)  # a CPU's slab stays in its cache, a GPU's within 0.5 GB
        for b, i in itertools.product(range(0, B, images), range(0, n, rows)):
            some, slab = slice(b, b + images), slice(i, min(i + rows, n))
            weights = attention_weights(q[some, :, slab], k[some], fusion) if isinstance(layer, tuple) else layer[some, slab]
            share = row[some, slab] / (2 if fusion == "mean" else 1 + weights.sum(-1))  # row of 0.5 S + 0.5 E: the residual half stays, the other is handed down
            new[some, slab] += share
            with torch.autocast(k.device.type, enabled=False):
                new[some] += (share[:, None] @ weights)[:, 0]
        row = new
    return row
