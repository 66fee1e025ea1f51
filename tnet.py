"""TNet, from "Hard-Attention for Scalable Image Classification", Papadopoulos, Korus and Memon, NeurIPS 2021.

The idea: look at a small copy of the image, decide which cells of an n x n grid deserve a closer look, crop
these from the full resolution, look at them with the same backbone, and so on, level by level. The feature
vectors of all views get a code of their place and scale, are averaged, and are classified. The cost grows
with the number of views and not with the resolution. Which cells were looked at is the explanation, and costs
nothing.
Choosing a cell has no gradient: the location module learns by REINFORCE, the reward being a correct answer.
Per-feature regularisation also asks each view alone.

Where to find it:
    Sec. 3.1, Fig. 2 (processing flow)          TNet.traverse
    Sec. 3.1 (sampling without replacement)     gumbel_top_k, plackett_luce_log_prob, TNet.choose
    Sec. 3.2 (location module)                  LocationConcat, LocationSqueezeExcite, TNet.location_logits
    Sec. 3.2 (positional encoding module)       positional_encoding, Position
    Sec. 3.2 (feature extraction module)        BagNet77, EfficientNet
    Sec. 3.2 (classification module)            Classifier
    Eq. 1, 3, 3a, 3b (learning rule)            TNet.learning_rule, as a loss
    Eq. 2 (baseline b)                          TNet.update_baseline
    Sec. 5.1 - 5.3 (candidate regions)          cell_boxes, crop
    Sec. 5.1 - 5.3 (the paper's baselines)      WholeImage
    Sec. 5.3 (feature weighting module)         FeatureWeighting

Where this differs from the paper:
  - On birds, Sec. 5.3 says "pre-trained on ImageNet"; it is the README of the authors' code that names Noisy
    Student's weights, which torchvision does not have. Ours are torchvision's, plain ImageNet's.
  - The paper counts BatchNorm's running statistics as parameters: its 4.13 and 4.56 M are 4.09 and 4.52 M
    without. With 0 locations the location module does not run and is not counted: 1.80 G and 21.07 M on
    ImageNet, 1.82 and 21.86 in Table 1.
  - How the 6 locations of Table 2 are split is not said: 2x2 here; 3x1 makes 6 too.
  - The small backbone, the recipes toy, folder and folder-b0, baseline="separate", logit_scale and mixed
    precision are ours.
Where the paper and the authors' code differ (the appendix, which may settle some of these, was not available
to us):
  - Selection. Paper: cells are sampled without replacement in training. Code: always the k most probable
    ones. We: select="sample", with the log-probability of the ordered sample; select="topk" is the code, with
    its sum of log-softmax (which would bias the gradient of a sample; tested). Evaluation takes the most
    probable.
  - The softmax. Paper: of the logits. Code: of the logits divided by their L2 norm, so that no one of 25
    cells can exceed 10.4 %. We: the code's, times logit_scale, because sampling would stay near uniform for
    ever; logit_scale=1 is the code, normalize_logits=False the paper.
  - Eq. 2. Paper: b follows the mean of R. Code: one b for R^s and R^k follows lambda_r R^s + (1 - lambda_r)
    R^k, from 0.5. We: code as baseline="shared". "separate" keeps one b for R^s and one for R^k, as R^k is
    lower than R^s, so that with one b it mostly counts as a failure.
  - Code only: the contrastive term on birds, level_cap on fMoW at 896 (Eq. 3b leaves out level 3), and L2:
    the code adds c * sum(v^2) to the loss, which with Adam is weight_decay=2c, on everything but BatchNorm.
    On birds it is on the new modules only; those of an EfficientNet baseline are its classifier.
  - Attended-only accuracies (Sec. 5.4) have no switch in the code: use_context=False leaves the context
    vector out.
Without a switch we do as the code, where the paper has:
  - the gradient of log p(l|x, w) with respect to all w (Eq. 1). Code: the location module's inputs are
    detached, so that it alone learns from rewards.
  - k = 1..|l| in Eq. 3b, with divisor |l|. Code: the context vector (level 1) also makes a prediction, with
    divisor |l| + 1; it has no reward.
  - "a slightly modified version of BagNet-77-lowD". Code: no BatchNorm, biases, leaky ReLU with slope 0.2.
Without a switch we do not as the code:
  - it crops level 3 from the level-2 crop, we from the image at its absolute place: the same pixels (tested)
    in the paper's settings.
  - TensorFlow pads EfficientNet's convolutions mostly right and below, torchvision on both sides, so a cell
    of a map sits elsewhere in the image: TAPS names the rows and columns whose centres come nearest.
  - its crops cover a tenth of an object's box (ImageNet, fMoW) and have fifty tries, ours ten, after which 30
    in 100 photos stay whole; it resizes by one of eight kernels that do not low-pass, we by one of Pillow's
    six, which do (but for nearest), in evaluation too; it adds to brightness where we multiply; its jitter
    has four orders, ours all.
  - its BatchNorm sees the 16 images of one GPU (8 where the batch is 32), ours those of one process.
  - its birds are normalised to [-1, 1]; torchvision's weights want ImageNet's mean and deviation.
  - its EfficientNet draws new convolutions from a truncated normal distribution, ours is not truncated.
  - its fMoW photos are shrunk beforehand to a shorter side of 1000 pixels, 275 for the baseline at 224.
  - its rows of fMoW at 448 (Table 2) may be those of the network trained on to 896, the only one released.
Eq. 3b's policy term is biased when a grid gives more than one location: log p(l_k|x, w) is the softmax over
all cells, but later cells are drawn from those that are left, so the score does not average to zero. With 25
cells and 3 locations |E score| is 0.002 for logits of norm 1 (the code's), 0.02 for 4 and 0.1 for 8 (tested).
It still points the right way: with b at the mean reward of the drawn cells, the expected push on a cell's
logit is its share of the draws times (its reward - b), so cells better than the mean rise and the others fall
(tested). Another b adds its error times E score.
Under Adam lambda_f hardly matters (only beside coupled weight decay and epsilon), as the location module
learns from the policy terms alone and Adam divides the scale of a gradient away.
Several processes, or parts of a batch, equal one only with BagNet-77, select="topk" and dropout=0: BatchNorm
sees its own part, and each part draws its own cells and dropout. b of Eq. 2 is that of the whole batch.

    python train.py --method tnet                                  # toy birds, a CPU and some minutes
    python train.py --method tnet --data imagenet --root DIR       # then: eval RUN --locations 0,1,2,3,5
    python train.py --method tnet --data fmow --root DIR           # at 448; then, from that run, at 896:
    python train.py --method tnet --data fmow --root DIR --recipe fmow-896
    python train.py --method tnet --data cub --root DIR --backbone efficientnet_b4 --epochs 125
"""
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
from common import Table, opt

share = partial(opt, most=1)


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """TNet's switches; the defaults are those of ImageNet (Sec. 5.1)."""

    # ---- architecture
    backbone: str = opt("bagnet77", "feature extraction module (Sec. 3.2); small: ours", (
        "bagnet77", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
        "efficientnet_b4", "small"))
    width: int = opt(16, "channels of the first layer of backbone=small", least=1)
    base_resolution: int = opt(77, "side of every view the backbone gets, in pixels (Sec. 3.2)", least=8)
    grid: int = opt(5, "rows and columns of the grid of candidate locations (Sec. 3.2)", least=1, most=32)
    cell: float = opt(0.34375, "side of a cell as a share of the view's (Sec. 5.1)", least=0.02, most=1)
    dropout: float = share(0.5, "dropped: bagnet77's feature vector, else the classifier's input (Sec. 5.1)")
    batch_norm: tuple[float, float] = share((1e-3, 0.01), "EfficientNet's epsilon, momentum (authors' code)")
    feature_weighting: bool = opt(False, "learned weights for the mean of the feature vectors (Sec. 5.3)")
    hard_attention: bool = opt(True, "off: the backbone alone on the whole image, the paper's baselines")
    # ---- attention: these change evaluation too, and never the weights' shapes
    locations: str = opt("3", "cells chosen in each grid, level by level: 3; 2x1; 0 is the context alone")
    use_context: bool = opt(True, "off: classify from the attended locations only (Sec. 5.4)")
    policy: str = opt("learned", "which cells; random and fixed are controls", ("learned", "random", "fixed"))
    fixed_cells: tuple[int, ...] = opt((), "policy=fixed: cells, row by row; the first k are used")
    # ---- learning rule
    select: str = opt("sample", "in training (Sec. 3.1); topk: authors' code", ("sample", "topk"))
    normalize_logits: bool = opt(True, "divide the location logits by their L2 norm (authors' code)")
    logit_scale: float = opt(8.0, "then multiply them by this (our choice; authors' code: 1)")
    samples: int = opt(1, "M, Monte-Carlo samples of the locations for each image (Eq. 1)", least=1)
    lambda_f: float = opt(0.1, "weight of the policy terms (Eq. 1; authors' code)")
    lambda_c: float = share(0.3, "share of the pooled prediction in the cross-entropy (Eq. 3a, b)")
    lambda_r: float = share(0.3, "share of the pooled prediction in the reward (Eq. 3a, b)")
    baseline: str = opt("shared", "b of Eq. 2; separate: of R^s and of R^k (ours)", ("shared", "separate"))
    level_cap: int = opt(99, "per-feature terms only up to this level (authors' code)", least=2)
    contrastive: float = opt(0.0, "weight of the contrastive term (authors' code, birds)")
    # ---- optimizer
    backbone_lr: float = opt(1.0, "factor on lr for the backbone (authors' code: 0.1 on birds)")
    decay_backbone: bool = opt(True, "weight decay also on the backbone (authors' code: not on birds)")

    def __post_init__(self):
        super().__post_init__()
        counts, cells = parse_locations(self.locations), self.grid**2
        most = max(counts, default=0)
        given = (self.backbone, self.grid, self.base_resolution)
        if self.backbone != "small" and given not in TAPS:
            raise ValueError(f"--backbone, --grid, --base-resolution {given}: the map F is read at "
                             f"{', '.join(map(str, TAPS))}; use one of these, or --backbone small")
        no_pixel = min(self.image_size) * self.cell ** len(counts) < 1
        if most > cells or no_pixel or not (counts or self.use_context):
            raise ValueError(f"--locations {self.locations}: a grid has {cells} cells, a crop needs a pixel, "
                             "and 0 locations need --use-context")
        fixed = {*self.fixed_cells[:most]}
        if self.policy == "fixed" and (len(fixed) < most or max(fixed, default=0) >= cells):
            wanted = f"name {most} or more of 0 to {cells - 1}, the first {most} all different"
            raise ValueError(f"--fixed-cells {self.fixed_cells}: {wanted}")


def parse_locations(text):
    """Cells chosen in each grid, level by level: "3" -> (3,); "2x1" -> (2, 1); "0" -> ()."""
    if not re.fullmatch(r"0|[1-9]\d{0,3}(x[1-9]\d{0,3})*", text):
        raise ValueError(f"--locations {text}: allowed are 0, a number, or one a level as in 2x1")
    return tuple(int(count) for count in text.split("x") if count != "0")


class Tap(NamedTuple):
    """Where EfficientNet's map F is taken, and which of its cells are the candidate locations."""

    stage: int  # of torchvision's `features`
    block: int  # of that stage; its output is F
    lines: slice  # rows, and columns, of F whose centres come nearest to those of the grid's cells


TAPS = {  # by backbone, grid and base resolution
    ("bagnet77", 5, 77): None,  # BagNet77 takes its own
    ("efficientnet_b0", 3, 224): Tap(4, 2, slice(3, 12, 4)),
    ("efficientnet_b0", 5, 224): Tap(4, 0, slice(3, 12, 2)),
    **{(f"efficientnet_b{i}", 5, 224): Tap(3, 1, slice(6, 23, 4)) for i in (1, 2, 3, 4)},
}

# The paper's (Sec. 5.1 to 5.3): sizes, grids, cells; TNet's epochs, locations on ImageNet and fMoW; the lr,
# lambda and dropout of ImageNet. The rest is the authors' code: Keras' epsilon, large crops.
_imagenet = Recipe(
    crop="resized", crop_area=(0.85, 1.0), crop_ratio=(0.5, 2.0), normalize="half",
    interpolation="random", brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2, jitter_prob=0.8,
    batch_size=64, epochs=200, optimizer="adam", lr=1e-4, eps=1e-7, schedule="steps", milestones=(0.8,),
)
_bagnet77 = dict(  # a run of 200 epochs with the drop at 160, stopped at 175
    hard_attention=False, dropout=0.625, epochs=175, milestones=(160 / 175,),
)
_fmow = replace(
    _imagenet, backbone="efficientnet_b0", base_resolution=224, image_size=(448, 448), grid=3, cell=0.5,
    locations="2", epochs=40, lr=1e-3, drop_path=0.3, lambda_c=0.2, lambda_r=0.2,
)
_fmow_896 = dict(
    image_size=(896, 896), locations="2x1", epochs=10, drop_path=0.5, lambda_c=0.05, lambda_r=0.05,
    level_cap=2,
)
_fmow_en448 = dict(
    hard_attention=False, batch_size=32, epochs=30, dropout=0.75, drop_path=0.3, weight_decay=2e-5,
)
_fmow_en896 = dict(_fmow_en448, image_size=(896, 896), dropout=0.3, drop_path=0.2)
_fmow_en224 = dict(_fmow_en448, image_size=(224, 224), batch_size=64, epochs=60, drop_path=0.5)
_cub = replace(
    _imagenet, backbone="efficientnet_b0", base_resolution=224, image_size=(448, 448), cell=0.35,
    locations="5", feature_weighting=True, dropout=0.75, drop_path=0.5, contrastive=100.0,
    brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, translate=0.1, rotate=20.0, normalize="imagenet",
    weights="default", batch_norm=(1e-5, 0.01), weight_decay=2e-4, decay_backbone=False,
    lr=1e-3, backbone_lr=0.1, milestones=(0.9,),
)
_nabirds = replace(_cub, epochs=100, contrastive=50.0)
_birds_en = dict(hard_attention=False, backbone_lr=0.05)
_toy = Recipe(  # a crop shows about half a bird, the low resolution hardly what marks it
    image_size=(112, 112), toy_preset="birds-easy", normalize="half",
    backbone="small", base_resolution=32, cell=2 / 7, dropout=0.0, lambda_f=0.05, baseline="separate",
    epochs=16, optimizer="adamw", lr=2e-3, schedule="onecycle",
)

RECIPES = {
    "toy": _toy,
    "folder": replace(_toy, image_size=(224, 224), crop="resized", crop_area=(0.5, 1.0), cell=0.25,
                      normalize="imagenet", width=32, base_resolution=56, epochs=60),
    "folder-b0": replace(_cub, locations="3", contrastive=0.0, epochs=60, batch_norm=(1e-5, 0.1)),
    "imagenet": _imagenet,
    "imagenet-bagnet77": replace(_imagenet, **_bagnet77),
    "fmow": _fmow,
    "fmow-896": replace(_fmow, **_fmow_896, weights="runs/tnet-fmow"),
    "cub": _cub,
    "cub-en": replace(_cub, **_birds_en),
    "nabirds": _nabirds,
    "nabirds-en": replace(_nabirds, **_birds_en),
}


def by_locations(name, papers, changes={}, **evaluation):
    """Rows of one training evaluated with other numbers of locations; papers: {number: the paper's value}."""
    return [(f"{name}, {k} locations", changes | {"eval": {"locations": k, **evaluation}}, paper)
            for k, paper in papers.items()]


def figure_3(data, training):
    """A baseline and 0 to 5 locations of TNet on EfficientNet-B0 to B4; `training`: overrides of each."""
    rows = []
    for i, changes in enumerate(training):
        backbone = {"backbone": f"efficientnet_b{i}"}
        rows.append((f"EfficientNet-B{i}", backbone | _birds_en, None))
        rows += by_locations(f"TNet-B{i}", dict.fromkeys("012345"), backbone | changes)
    return Table(f"Backbones on {data} (Figure 3 plots three)", data, "top1", tuple(rows))


_from_448 = _fmow_896 | {"start": "TNet, 448, 2 locations"}
_no_regularisation = {"lambda_c": 1.0, "lambda_r": 1.0}

# Trained with 3 locations on ImageNet, 2 on fMoW, 2x1 there at 896, 5 on birds (3 for NABirds' B3 and B4).
TABLES = {
    "1": Table("Hard attention on ImageNet", "imagenet", "top1", (
        ("BagNet-77", _bagnet77, 73.42),
        *by_locations("TNet", {"0": 67.29, "1": 73.12, "2": 74.12, "3": 74.41, "5": 74.62}),
    )),
    "2": Table("Scalability on fMoW", "fmow", "top1", (
        ("EfficientNet-B0, 224, boxes", _fmow_en224 | {"epochs": 65, "boxes": True}, 69.7),
        ("EfficientNet-B0, 224", _fmow_en224, 62.8),
        ("EfficientNet-B0, 448", _fmow_en448, 69.83),
        ("EfficientNet-B0, 896", _fmow_en896, 70.6),
        *by_locations("TNet, 448", {"0": 47.79, "1": 70.17, "2": 71.46, "3": 71.57}),
        ("TNet, 896, 4 locations", _from_448, 72.16),
        ("TNet, 896, 6 locations", _from_448 | {"eval": {"locations": "2x2"}}, 71.92),
    )),
    "fig3": figure_3("cub", ({}, {}, {}, {}, {"epochs": 125})),
    "fig3-nabirds": figure_3("nabirds", ({}, {}, {}, {"locations": "3"}, {"locations": "3"})),
    "5.4": Table("Attended locations without the context on ImageNet (Sec. 5.4)", "imagenet", "top1", (
        *by_locations("TNet, no context", {"2": 67.95, "3": 69.66, "5": 71.05}, use_context=False),
    )),
    "5.4-fmow": Table("Share of the image that is looked at on fMoW (Sec. 5.4)", "fmow", "coverage", (
        ("TNet, 448, 2 locations", {}, None),
        ("TNet, 896, 4 locations", _from_448, 37.91),  # at level 3 under 12.5
    )),
    "5.5": Table("Per-feature regularisation on ImageNet (Sec. 5.5)", "imagenet", "top1", (
        *by_locations("with", {"1": 73.12, "3": 74.41, "5": 74.62}),
        *by_locations("without", {"1": 65.21, "3": 67.33, "5": 68.55}, _no_regularisation),
    )),
    "toy": Table("Where to look, on the toy birds", "toy", "top1", (
        ("TNet, 3 locations", {}, None),
        ("the low resolution alone", {"locations": "0"}, None),
        ("random cells", {"policy": "random"}, None),
        ("the three best constant cells", {"policy": "fixed", "fixed_cells": (12, 7, 17)}, None),
        ("without per-feature regularisation", _no_regularisation, None),
    )),
    "baseline": Table("TNet and its backbone on the whole image at full resolution", "toy", "top1", (
        ("backbone at full resolution", {"hard_attention": False}, None),
        ("TNet, 3 locations", {}, None),
    )),
}

# ------------------------------------------------------------------------------- choosing cells (Sec. 3.1)


def gumbel_top_k(logits, k):
    """Sample k of K cells without replacement (Sec. 3.1): logits (..., K) -> cells (..., k), in their order.

    The k largest of logits + Gumbel noise are distributed as k draws, each from the softmax of what is left.
    """
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).topk(k, dim=-1).indices


def plackett_luce_log_prob(logits, cells):
    """log p(l|x, w) of Eq. 1 for cells drawn in this order without replacement.

    Logits (..., K), cells (..., k) -> (...).
    """
    draws = F.one_hot(cells, logits.shape[-1])  # (..., k, K)
    gone = (draws.cumsum(-2) - draws).bool()  # before each draw, the cells that earlier draws took
    left = logits[..., None, :].masked_fill(gone, -torch.inf).logsumexp(-1)  # (..., k)
    return (logits.gather(-1, cells) - left).sum(-1)


# ------------------------------------------------------------------------------- cropping cells (Sec. 5.1)


def cell_boxes(size, grid, fraction):
    """The cells of a grid over a view of size (h, w), row by row -> list of boxes xyxy in its pixels.

    A cell's side is a `fraction` of the view's. Outer cells may reach over the edge, equally on both sides,
    an odd pixel before.
    """
    lines = []
    for side in size:
        length = round(side * fraction)
        stride = -(-(side - length) // max(1, grid - 1))  # rounded up
        before = ((grid - 1) * stride + length - side + 1) // 2
        lines.append([(i * stride - before, i * stride - before + length) for i in range(grid)])
    return [(x1, y1, x2, y2) for y1, y2 in lines[0] for x1, x2 in lines[1]]


def crop(images, boxes, size, margin):
    """Boxes (B, m, 4), all of size (h, w), of images (B, 3, H, W) -> (B * m, 3, h, w).

    They reach over the edge by at most `margin` pixels, where the crops are zero. Unfolding gives a view of
    all windows without copying; indexing it reads the chosen ones only.
    """
    if margin:
        images = F.pad(images, (margin,) * 4)
    windows = images.unfold(2, size[0], 1).unfold(3, size[1], 1)  # (B, 3, rows, columns, h, w)
    owner = torch.arange(len(images), device=images.device)[:, None]
    return windows[owner, :, boxes[..., 1] + margin, boxes[..., 0] + margin].flatten(0, 1)


# ------------------------------------------------------------------------------- the modules (Sec. 3.2)

leaky = partial(F.leaky_relu, negative_slope=0.2, inplace=True)  # TensorFlow's slope


class Location(nn.Module):
    """What both location modules end with: features (B, C, n, n) of the cells -> logits (B, n * n)."""

    def __init__(self, inputs, width):
        super().__init__()
        self.coordinates = nn.ParameterDict({"scale": torch.ones(2), "shift": torch.zeros(2)})
        self.hidden = nn.Conv2d(inputs + 2, width, 1)
        self.logit = nn.Conv2d(width, 1, 1)

    def score(self, x, activation):
        """Each cell's row and column, from -1 to 1, scaled and shifted, join its features."""
        line = torch.linspace(-1, 1, x.shape[2], device=x.device)
        places = torch.cartesian_prod(line, line) * self.coordinates.scale + self.coordinates.shift
        x = torch.cat((x, places.T.reshape(2, *x.shape[2:]).expand(len(x), -1, -1, -1)), 1)
        return self.logit(activation(self.hidden(x))).flatten(1)


class LocationConcat(Location):
    """Location module of BagNet: the context V beside F. (B, C, n, n), (B, D) -> logits (B, n * n)."""

    def __init__(self, map_channels, channels):
        super().__init__(map_channels + channels, channels)

    def forward(self, F_map, V):
        context = V[:, :, None, None].expand(-1, -1, *F_map.shape[2:])
        return self.score(torch.cat((F_map, context), 1), leaky)


class LocationSqueezeExcite(Location):
    """Location module of EfficientNet: context by squeeze-and-excitation over the grid, not by V."""

    def __init__(self, map_channels):
        super().__init__(map_channels, map_channels)
        self.reduce = nn.Conv2d(map_channels, map_channels, 1)
        self.context = torchvision.ops.SqueezeExcitation(
            map_channels, map_channels // 2, activation=nn.SiLU)

    def forward(self, F_map, V):
        return self.score(self.context(F.silu(self.reduce(F_map))), F.silu)


def positional_encoding(places, dim):
    """Sines and cosines of row y, column x and scale s: (..., 3) -> (..., dim), zeros at its end."""
    m = dim // 6
    powers = torch.arange(m, device=places.device) / max(1, m - 1)
    angles = places.float()[..., None] * 100.0**-powers  # (..., 3, m), frequencies 1 to 0.01 (authors' code)
    code = torch.stack((angles.sin(), angles.cos()), -2).flatten(-3)  # sin y, cos y, sin x, ...
    return F.pad(code, (0, dim - 6 * m))


class Position(nn.Module):
    """Positional encoding module: vectors V (..., C), places (..., 3) -> V' (..., C).

    BagNet's is a linear layer of V beside the code of its place; EfficientNet's, which adds, is swish(V + a
    linear layer of the code).
    """

    def __init__(self, channels, add):
        super().__init__()
        self.add, self.dim = add, channels // 4 if add else channels
        self.linear = nn.Linear(self.dim if add else 2 * channels, channels)

    def forward(self, V, places):
        code = positional_encoding(places, self.dim).to(V)
        return F.silu(V + self.linear(code)) if self.add else self.linear(torch.cat((V, code), -1))


class FeatureWeighting(nn.Module):
    """Weights of the N feature vectors, which sum up to 1 (Sec. 5.3): (B, N, C) -> (B, N)."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 4)
        self.excite = nn.Linear(channels // 4, channels)
        self.weight = nn.Linear(channels, 1)

    def forward(self, features):
        gate = self.excite(F.silu(self.squeeze(features.mean(1)))).sigmoid()  # (B, C)
        return self.weight(features * gate[:, None]).squeeze(-1).float().softmax(-1)


class Classifier(nn.Linear):
    """Classification module: (..., C) -> (..., K). BagNet has dropout in its last layer (Sec. 5.1)."""

    def __init__(self, channels, num_classes, recipe):
        super().__init__(channels, num_classes)
        self.dropout = 0.0 if recipe.backbone == "bagnet77" else recipe.dropout

    def forward(self, vectors):
        return super().forward(F.dropout(vectors, self.dropout, self.training))


# ------------------------------------------------------------------------------- the model


class Views(NamedTuple):
    """The N views of B images: the whole image first, then level by level what was attended to."""

    vectors: torch.Tensor  # (B, N, C): V'
    places: torch.Tensor  # (B, N, 3): y, x, s
    boxes: torch.Tensor  # (B, N, 4): xyxy in pixels of the image, may reach outside
    reached: torch.Tensor  # (B, N): probability of the cell times that of the cells it lies in
    # for each level but the last, of its g grids: logits (B, g, K), chosen cells (B, g, k), log p in the grid
    choices: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class TNet(nn.Module):
    """Traversal Network (Fig. 2)."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe, self.locations = recipe, parse_locations(recipe.locations)
        self.backbone = make_backbone(recipe)
        C, map_channels = self.backbone.channels, self.backbone.map_channels
        self.classifier = Classifier(C, num_classes, recipe)
        add = recipe.backbone.startswith("efficientnet")
        self.location = LocationSqueezeExcite(map_channels) if add else LocationConcat(map_channels, C)
        self.position = Position(C, add)
        self.weighting = FeatureWeighting(C) if recipe.feature_weighting else None
        self.learns_where = recipe.policy == "learned" and recipe.lambda_f > 0 and bool(self.locations)
        self.location.requires_grad_(self.learns_where)
        self.register_buffer("baseline", torch.full((2,), 0.5))  # b of Eq. 2, for R^s and for R^k
        self.rewards = []  # of the parts of a batch so far, for Eq. 2

    def rescale(self, views):
        """Any view -> base resolution, bilinear without a low-pass filter (authors' code)."""
        return F.interpolate(views, (self.recipe.base_resolution,) * 2, mode="bilinear")

    def location_logits(self, F_map, V):
        """Location module: logits of all cells (n, K), fp32. Inputs are detached: rewards teach it alone."""
        r = self.recipe
        if r.policy != "learned":
            return V.new_zeros(len(V), r.grid**2, dtype=torch.float32)
        logits = self.location(F_map.detach(), V.detach()).float()
        return r.logit_scale * F.normalize(logits, dim=-1) if r.normalize_logits else logits

    def choose(self, logits, k):
        """k cells of each grid, (..., K) -> (..., k): sampled in training, else the most probable."""
        r = self.recipe
        if r.policy == "fixed":
            return torch.tensor(r.fixed_cells[:k], device=logits.device).expand(*logits.shape[:-1], k)
        if r.policy == "random" or (self.training and r.select == "sample"):
            return gumbel_top_k(logits, k)
        return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # of equals the first

    def traverse(self, images):
        """Processing flow (Sec. 3.1, Fig. 2): images (B, 3, H, W) -> Views."""
        r, n, margin, (B, _, height, width) = self.recipe, self.recipe.grid, 0, images.shape
        F_map, V, _ = self.backbone(self.rescale(images))  # level 1: the whole image, downscaled
        boxes = torch.tensor([0, 0, width, height], device=images.device).expand(B, 1, 4)
        places, reached = 0 * boxes[..., :3], torch.ones_like(boxes[..., 0], dtype=torch.float32)
        levels, choices = [(V[:, None], places, boxes, reached)], []
        for k in self.locations:
            # choose k cells in the grid of each view of the level above, of which an image has g
            logits = self.location_logits(F_map, V).unflatten(0, (B, -1))  # (B, g, K)
            cells = self.choose(logits, k)  # (B, g, k)
            log_probs = logits.log_softmax(-1).gather(-1, cells)  # (B, g, k)
            choices.append((logits, cells, log_probs))
            reached = reached[..., None] * log_probs.detach().exp()
            # where they lie in scale-space, and in the image
            step = torch.stack((cells // n, cells % n, torch.ones_like(cells)), -1)  # (B, g, k, 3)
            places = places[:, :, None] * cells.new_tensor((n, n, 1)) + step
            grid = cell_boxes((height, width), n, r.cell)  # in pixels of the view that they divide
            boxes = boxes[:, :, None, [0, 1, 0, 1]] + cells.new_tensor(grid)[cells]  # (B, g, k, 4)
            places, boxes, reached = (t.flatten(1, 2) for t in (places, boxes, reached))  # (B, g * k, ...)
            x1, y1, x2, y2 = grid[0]
            height, width, margin = y2 - y1, x2 - x1, margin + max(0, -x1, -y1)
            # look at them: all crops of the level in one batch
            F_map, V, _ = self.backbone(self.rescale(crop(images, boxes, (height, width), margin)))
            levels.append((V.unflatten(0, (B, -1)), places, boxes, reached))
        vectors, places, boxes, reached = (torch.cat(parts, 1) for parts in zip(*levels))
        return Views(self.position(vectors, places), places, boxes, reached, choices)

    def pool(self, features):
        """The vectors V' become one (Fig. 2, step 4): (B, N, C) -> (B, C)."""
        if self.weighting is None:
            return features.mean(1)
        return (features * self.weighting(features)[..., None].to(features)).sum(1)

    def forward(self, images, targets=None):
        """Images (B, 3, H, W) -> logits (B, K); with targets (B,) -> loss, terms; M samples of an image."""
        if self.training and targets is not None:
            images, targets = (t.repeat_interleave(self.recipe.samples, 0) for t in (images, targets))
        views = self.traverse(images)
        pooled = self.pool(views.vectors if self.recipe.use_context else views.vectors[:, 1:])
        logits = self.classifier(pooled)
        if targets is None:
            return logits
        loss, terms = self.learning_rule(views, logits, targets)
        if self.training and self.learns_where:
            self.update_baseline(terms["reward"], terms["reward_each"], len(targets))
        return finish(loss, terms, pooled, logits, targets, self.recipe)

    def learning_rule(self, views, logits, targets):
        """Eq. 3 as a loss to minimise (the paper has the gradient of what is maximised) -> loss, terms."""
        r = self.recipe
        A = sum(accumulate(self.locations[: r.level_cap - 1], mul))  # |l|, locations on these levels
        each = self.classifier(views.vectors[:, : 1 + A])  # (B, 1 + A, K): each view alone, the context first
        cross_entropy = partial(F.cross_entropy, label_smoothing=r.label_smoothing)
        ce = cross_entropy(logits.float(), targets)
        ce_each = cross_entropy(each.flatten(0, 1).float(), targets.repeat_interleave(1 + A))
        loss = r.lambda_c * ce + (1 - r.lambda_c) * ce_each  # first terms of Eq. 3a and 3b
        terms = {"ce": ce, "ce_each": ce_each}
        if not self.learns_where:
            return loss, terms
        R = (logits.argmax(-1) == targets).float()  # (B,): R^s of Eq. 3a
        R_each = (each[:, 1:].argmax(-1) == targets[:, None]).float()  # (B, A): R^k of Eq. 3b
        grids, cells, each_cell = zip(*views.choices)
        together = map(plackett_luce_log_prob, grids, cells)  # (B, g) a level: all cells chosen in a grid
        if r.select == "topk":
            together = (log_probs.sum(-1) for log_probs in each_cell)
        log_p = torch.cat([*together], 1).sum(1)  # log p(l|x, w), (B,)
        log_p_each = torch.cat([log_probs.flatten(1) for log_probs in each_cell], 1)[:, :A]  # log p(l_k|x, w)
        b, b_each = self.baseline
        policy = -((R - b) * log_p).mean()
        policy_each = -((R_each - b_each) * log_p_each).mean()
        loss = loss + r.lambda_f * (r.lambda_r * policy + (1 - r.lambda_r) * policy_each)  # second terms
        entropy = torch.special.entr(torch.cat(grids, 1).softmax(-1)).sum(-1).mean()
        return loss, terms | {"policy": policy, "policy_each": policy_each, "reward": R.mean(),
                              "reward_each": R_each.mean(), "entropy": entropy}

    @torch.no_grad()
    def update_baseline(self, reward, reward_each, count):
        """Eq. 2, from the mean rewards of `count` images: once a batch, over all its parts and processes."""
        self.rewards.append(torch.stack((reward, reward_each, torch.ones_like(reward))) * count)
        if len(self.rewards) < self.recipe.accumulate:
            return
        total, self.rewards = sum(self.rewards), []
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        mean = total[:2] / total[2]
        if self.recipe.baseline == "shared":
            mean = self.recipe.lambda_r * mean[0] + (1 - self.recipe.lambda_r) * mean[1]
        self.baseline.copy_(0.9 * self.baseline + 0.1 * mean)

    @torch.no_grad()
    def heads(self, images):
        """Logits of all vectors, of the context alone and of the attended locations alone (Sec. 5.4)."""
        features = self.traverse(images).vectors
        parts = {"all": features, "context": features[:, :1], "attended": features[:, 1:]}
        return {name: self.classifier(self.pool(part)) for name, part in parts.items() if part.shape[1]}

    @torch.no_grad()
    def where(self, images):
        """Attended crops (B, A, 4), xyxy in pixels of the input, by the probability (B, A) of reaching them.

        The whole image when there are none.
        """
        common.check_images(images)
        views, first = self.traverse(images), min(1, len(self.locations))
        scores, order = views.reached[:, first:].sort(dim=1, descending=True, stable=True)
        boxes = common.take(views.boxes, order + first).float()
        return torchvision.ops.clip_boxes_to_image(boxes, images.shape[2:]), scores

    def figure(self, images):
        """Figures 1c and 4."""
        return attention_pages(self, images)


class WholeImage(nn.Module):
    """The paper's baselines (hard_attention=False): backbone and classifier on the whole image."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe, self.backbone = recipe, make_backbone(recipe)
        self.classifier = Classifier(self.backbone.channels, num_classes, recipe)

    def forward(self, images, targets=None):
        """Images (B, 3, H, W) -> logits (B, K); with targets (B,) -> loss, terms."""
        _, V, _ = self.backbone(images)
        logits = self.classifier(V)
        if targets is None:
            return logits
        ce = F.cross_entropy(logits.float(), targets, label_smoothing=self.recipe.label_smoothing)
        return finish(ce, {"ce": ce}, V, logits, targets, self.recipe)

    def heads(self, images):
        """Logits of its one classifier."""
        return {"all": self(images)}

    @torch.no_grad()
    def evidence(self, images):
        """Class activation map: what each place adds to the answer, (B, 3, H, W) -> (B, h, w).

        Of `small`, whose V is a maximum, only where the maximum is reached.
        """
        _, V, last = self.backbone(images)
        weights = self.classifier.weight[self.classifier(V).argmax(-1)]  # (B, C)
        return torch.einsum("bchw,bc->bhw", last.float(), weights.float())

    def where(self, images):
        """It attends to nothing: the cell of the last map with most evidence, (B, 1, 4) and (B, 1)."""
        common.check_images(images)
        maps = self.evidence(images)
        scores, peak = maps.flatten(1).softmax(-1).max(-1, keepdim=True)
        return common.cells_to_boxes(peak, maps.shape[1:], images.shape[2:]), scores

    def figure(self, images):
        """The image with the box of `where`, and the evidence."""
        pages = []
        for image, boxes, evidence in zip(images, self.where(images)[0], self.evidence(images)):
            photo = common.to_pil(image, self.recipe.normalize)
            shown = common.draw_boxes(photo, boxes), common.heat(photo, evidence)
            pages.append(common.panels(shown, ["evidence is strongest", "evidence for the answer"]))
        return pages


def finish(loss, terms, pooled, logits, targets, recipe):
    """The contrastive term of the authors' code joins the loss -> loss, detached terms."""
    terms = terms | {"top1": (logits.argmax(-1) == targets).float().mean()}
    if recipe.contrastive:
        terms["contrastive"] = contrastive_loss(pooled, targets)
        loss = loss + recipe.contrastive * terms["contrastive"]
    return loss, {name: term.detach() for name, term in terms.items()}


def contrastive_loss(vectors, targets, margin=0.4, chunk=16):
    """Vectors of one class attract each other, of two repel above a cosine of `margin` (authors' code).

    (B, C), (B,) -> scalar: the mean over all pairs of a chunk (the code: a GPU's images), each image with
    itself included.
    """
    losses = []
    for v, t in zip(vectors.float().split(chunk), targets.split(chunk)):
        cosine = F.cosine_similarity(v[:, None], v, dim=-1)
        losses.append(torch.where(t[:, None] == t, 1 - cosine, (cosine - margin).clamp(min=0)).mean())
    return torch.stack(losses).mean()


# ------------------------------------------------------------------------------- pictures


@torch.no_grad()
def attention_pages(model, images):
    """Figures 1c and 4: the image with its attended cells, level 1, the policy there, and the crops.

    The number of a view is the weight of its vector (w) or, where all weigh the same, its probability (p).
    """
    n, how, pages = model.recipe.grid, model.recipe.normalize, []
    views, level_1 = model.traverse(images), model.rescale(images)
    letter, numbers = ("w", model.weighting(views.vectors)) if model.weighting else ("p", views.reached)
    for i, boxes in enumerate(views.boxes[:, 1:]):
        photo = common.to_pil(images[i], how)
        zoom = 448 / photo.height  # room for labels
        picture = photo.resize((round(zoom * photo.width), 448))
        whole, *labels = [f"{k}: {letter} {number:.2f}" for k, number in enumerate(numbers[i])]
        panels = {"attended locations": common.draw_boxes(picture, zoom * boxes, labels, width=3),
                  f"{whole}, level 1": common.to_pil(level_1[i], how)}
        for logits, *_ in views.choices[:1]:
            panels["probability of the cells"] = common.heat(photo, logits[i].softmax(-1).view(n, n))
        panels |= zip(labels, map(photo.crop, boxes.tolist()))
        pages.append(common.panels(panels.values(), panels))
    return pages


# ------------------------------------------------------------------------------- feature extraction modules
# Each gives of images (B, 3, S, S): F at the candidate locations, V, and the last map, which V sums up.


class Bottleneck(nn.Module):
    """BagNet's residual block, 1x1 -> f x f -> 1x1, with biases and without normalisation."""

    def __init__(self, inputs, width, kernel, stride=1, valid=False):
        super().__init__()
        self.valid = valid  # the 3x3 convolution is not padded
        self.reduce = nn.Conv2d(inputs, width, 1)
        self.conv = nn.Conv2d(width, width, kernel, stride)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.shortcut = nn.Identity() if inputs == 4 * width else nn.Conv2d(inputs, 4 * width, 1, stride)

    def forward(self, x):
        y = leaky(self.reduce(x))
        if self.valid:
            x = x[:, :, 1:-1, 1:-1]
        elif self.conv.kernel_size == (3, 3):  # as TensorFlow: of stride 2, an even side only behind
            top, left = (1 - (side - 1) % self.conv.stride[0] for side in y.shape[2:])
            y = F.pad(y, (left, 1, top, 1))
        y = self.expand(leaky(self.conv(y)))
        return leaky(y + self.shortcut(x))


class BagNet77(nn.Module):
    """ResNet-50 in which half of the 3x3 convolutions are 1x1, so that a cell of the last map sees 77 pixels.

    At S = 77, F is (B, 1024, 5, 5), the last map (B, 512, 7, 7), and V its mean.
    """

    map_channels, channels = 1024, 512

    def __init__(self, dropout=0.0):
        super().__init__()
        self.part1 = nn.Conv2d(3, 64, 3)
        self.part2 = self.part(64, 64, (3, 3, 1), 2, False)
        self.part3 = self.part(256, 128, (3, 3, 1, 1), 2, False)
        self.part4 = self.part(512, 256, (3, 3, 1, 1, 1, 1), 2, True)
        self.part5 = self.part(1024, 512, (3, 3, 1), 1, True)
        self.part6 = nn.Conv2d(2048, 512, 1)
        self.dropout = nn.Dropout2d(dropout)  # of whole channels: the same as dropout of V

    @staticmethod
    def part(inputs, width, kernels, stride, valid):
        """Blocks one after the other; stride and missing padding are those of the first."""
        first = Bottleneck(inputs, width, kernels[0], stride, valid)
        return nn.Sequential(first, *(Bottleneck(4 * width, width, kernel) for kernel in kernels[1:]))

    def forward(self, images):
        middle = self.part4(self.part3(self.part2(leaky(self.part1(images)))))
        last = self.dropout(leaky(self.part6(self.part5(middle))))
        return middle[:, :, ::2, ::2], last.mean((2, 3)), last


class EfficientNet(nn.Module):
    """torchvision's EfficientNet: at S = 224, F (B, C_F, n, n), the last map (B, C, 7, 7), and V its mean."""

    def __init__(self, name, tap, batch_norm, drop_path):
        super().__init__()
        eps, momentum = batch_norm
        norm = partial(nn.BatchNorm2d, eps=eps, momentum=momentum)
        self.tap, self.features = tap, torchvision.models.get_model(name, norm_layer=norm).features
        self.channels = self.features[-1].out_channels
        self.map_channels = self.features[tap.stage][tap.block].out_channels
        drops = [layer for layer in self.modules() if isinstance(layer, torchvision.ops.StochasticDepth)]
        for i, layer in enumerate(drops, 1):  # counted from 1, so that the last block has the full rate
            layer.p = drop_path * i / len(drops)

    def forward(self, images):
        stage, block, lines = self.tap
        middle = self.features[stage][: block + 1](self.features[:stage](images))
        last = self.features[stage + 1 :](self.features[stage][block + 1 :](middle))
        return middle[:, :, lines, lines], last.mean((2, 3)), last


class Small(nn.Module):
    """A CNN of four layers for the toy (our choice): F (B, 4w, n, n), last map (B, 4w, S/8, S/8).

    V is its maximum.
    """

    def __init__(self, width, grid):
        super().__init__()
        self.map_channels = self.channels = 4 * width
        self.grid, layer, w = grid, torchvision.ops.Conv2dNormActivation, width
        self.early = nn.Sequential(layer(3, w), layer(w, 2 * w, 3, 2), layer(2 * w, 4 * w, 3, 2))
        self.late = layer(4 * w, 4 * w, 3, 2)

    def forward(self, images):
        middle = self.early(images)
        last = self.late(middle)
        return F.adaptive_avg_pool2d(middle, self.grid), last.amax((2, 3)), last


def make_backbone(recipe):
    """The feature extraction module of a recipe."""
    if recipe.backbone == "small":
        return Small(recipe.width, recipe.grid)
    if recipe.backbone == "bagnet77":
        return BagNet77(recipe.dropout)
    tap = TAPS[recipe.backbone, recipe.grid, recipe.base_resolution]
    return EfficientNet(recipe.backbone, tap, recipe.batch_norm, recipe.drop_path)


@torch.no_grad()
def initialize(model):
    """First weights of the authors' code: convolutions Glorot (BagNet) or He normal by fan-out.

    Linear layers are uniform by their outputs.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.weight, -layer.out_features**-0.5, layer.out_features**-0.5)
        elif isinstance(layer, nn.Conv2d) and model.recipe.backbone == "bagnet77":
            nn.init.xavier_normal_(layer.weight)
        elif isinstance(layer, nn.Conv2d):
            # PyTorch's fan-out overlooks the groups of a depthwise convolution; TensorFlow's does not
            nn.init.kaiming_normal_(layer.weight, mode="fan_out").mul_(layer.groups**0.5)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)


# ------------------------------------------------------------------------------- from a recipe


def build(recipe, num_classes):
    """The model of a recipe, with the weights that it names: torchvision's for the backbone, or a run's."""
    common.check_build(recipe, Recipe, num_classes)
    model = (TNet if recipe.hard_attention else WholeImage)(recipe, num_classes)
    if recipe.backbone != "small":  # which keeps PyTorch's
        initialize(model)
    source = recipe.weights
    if source == "none":
        return model
    if source == "default":
        if not recipe.backbone.startswith("efficientnet") or recipe.batch_norm[0] != 1e-5:
            raise ValueError(f"--weights default --backbone {recipe.backbone}: torchvision's weights are of "
                             "EfficientNets, for --batch-norm 1e-5,0.01; or use --weights none")
        url = torchvision.models.get_model_weights(recipe.backbone).DEFAULT.url
        source = common.fetch(url, url[-12:-4])  # its name ends in its sha256
    state = common.read_state(source)
    part = model.backbone if "features.0.0.weight" in state else model  # torchvision's names, or ours
    common.load_state(part, state, heads=("classifier.",), source=source)
    return model


def param_groups(model, recipe):
    """Backbone and new modules, each with and without weight decay.

    There is none on BatchNorm, nor, without decay_backbone, on the backbone.
    """
    groups = {}
    for name, layer in model.named_modules():
        backbone = name.startswith("backbone.")
        spared = isinstance(layer, nn.BatchNorm2d) or (backbone and not recipe.decay_backbone)
        key = recipe.backbone_lr if backbone else 1.0, 0.0 if spared else recipe.weight_decay
        for p in layer.parameters(recurse=False):
            if p.requires_grad:
                groups.setdefault(key, []).append(p)
    return [{"params": params, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), params in groups.items()]
