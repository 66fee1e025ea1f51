"""TNet, from "Hard-Attention for Scalable Image Classification", Papadopoulos, Korus and Memon, NeurIPS 2021.

The idea: look at a small copy of the image, decide which cells of an n x n grid deserve a closer look, crop these from the full resolution, look at them
with the same backbone, and so on, level by level. The feature vectors of all views get a code of their place and scale, are averaged, and are classified.
The cost grows with the number of views and not with the resolution. Which cells were looked at is the explanation, and costs nothing.
Choosing a cell has no gradient: the location module learns by REINFORCE, the reward being a correct answer. Per-feature regularisation also asks each view alone.

Where to find it:
    Sec. 3.1, Fig. 2 (processing flow)           TNet.traverse      Eq. 1, 3, 3a, 3b (learning rule, as a loss)  TNet.learning_rule
    Sec. 3.1 (sampling without replacement)      gumbel_top_k, plackett_luce_log_prob                            TNet.select
    Sec. 3.2 (feature extraction module)         BagNet77, EfficientNet     Eq. 2 (baseline)                     TNet.update_baseline
    Sec. 3.2 (location module)                   LocationConcat, LocationSqueezeExcite                           TNet.location_logits
    Sec. 3.2 (positional encoding module)        positional_encoding, PositionConcat, PositionAdd
    Sec. 5.1 - 5.3 (candidate regions)           crop_grid, crop    Sec. 5.3 (feature weighting module)          FeatureWeighting

Where this differs from the paper:
  - Level 3 is cropped from the image at its absolute place, not from the level-2 crop. The pixels are the same (tested) in the paper's settings.
  - torchvision pads EfficientNet's convolutions on both sides, TensorFlow mostly right and below, so a cell of a map sits elsewhere in the image: TAPS
    names the rows and columns whose centres agree. torchvision's weights are plain ImageNet's; the authors start from Noisy Student's (Sec. 5.3).
  - The small backbone, the recipes toy and folder, baseline="separate" and logit_scale are ours.
A finding: under Adam lambda_f hardly matters (only beside coupled weight decay and epsilon), as the location module learns from the policy terms alone
and Adam divides the scale of a gradient away (tested).
Where the paper and the authors' code differ (the appendix, which may settle some of these, was not available to us):
  - Selection. Paper: cells are sampled without replacement in training. Code: always the k most probable ones. We: select="sample", with the log-probability
    of the ordered sample; select="topk" is the code, with its sum of log-softmax (which would bias the gradient of a sample; tested). Evaluation is top-k.
  - The softmax. Paper: of the logits. Code: of the logits divided by their L2 norm, so that no one of 25 cells can exceed 10 %. We: the code's, times
    logit_scale, because sampling would stay near uniform for ever; logit_scale=1 is the code, normalize_logits=False the paper.
  - Gradient of log p(l|x, w). Paper: with respect to all w. Code: the location module's inputs are detached, it alone learns from rewards. We: code.
  - Eq. 3b. Paper: k = 1..|l|. Code: the context vector (level 1) also makes a prediction, with divisor |l| + 1; it has no reward. We: code.
  - Eq. 2. Paper: b follows the mean of R. Code: one b for R^s and R^k follows lambda_r R^s + (1 - lambda_r) R^k, from 0.5. We: code as baseline="shared".
    "separate" keeps one b for R^s and one for R^k, as R^k is lower than R^s, so that with one b it mostly counts as a failure.
  - Code only: the contrastive term and the L2 penalty on birds, level_cap on fMoW at 896 (Eq. 3b leaves out level 3). We: recipe fields.
  - L2. The code adds c * sum(v^2) to the loss: with Adam this is weight_decay=2c, on everything but BatchNorm (on birds: on the new modules only).
  - BagNet-77. Paper: "a slightly modified version of BagNet-77-lowD". Code: no BatchNorm, biases, leaky ReLU with slope 0.2. We: code.
  - Attended-only accuracies (Sec. 5.4) have no switch in the code: use_context=False leaves the context vector out of the mean.

    python train.py --method tnet                                              # toy birds, a CPU and some minutes
    python train.py --method tnet --data imagenet --root DIR                   # Table 1; then: eval --run ... --locations 0,1,2,3,5
    python train.py --method tnet --data fmow --root DIR                       # Table 2 at 448; then, from runs/tnet-fmow, at 896:
    python train.py --method tnet --data fmow --root DIR --recipe fmow-896
    python train.py --method tnet --data cub --root DIR --backbone efficientnet_b4 --epochs 125
"""
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import common
from common import Table, opt

BACKBONES = ("bagnet77", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "small")


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """TNet's switches; the defaults are those of ImageNet (Sec. 5.1)."""

    # ---- architecture
    backbone: str = opt("bagnet77", "feature extraction module (Sec. 3.2); small is for the toy", BACKBONES)
    width: int = opt(16, "channels of the first layer of backbone=small")
    base_resolution: int = opt(77, "side in pixels of every view the backbone gets (Sec. 3.2)")
    grid: int = opt(5, "candidate locations form a grid of this many rows and columns (Sec. 3.2)")
    cell: float = opt(0.34375, "side of a grid cell as a share of the view it divides (Sec. 5.1)")
    dropout: float = opt(0.5, "drop probability: bagnet77 of the feature vector, others of the classifier's input (Sec. 5.1)")
    batch_norm: tuple[float, float] = opt((1e-3, 0.01), "EfficientNet's BatchNorm: epsilon and momentum (authors' code); torchvision's weights want 1e-5")
    feature_weighting: bool = opt(False, "learned weights instead of the plain mean of the feature vectors (Sec. 5.3)")
    hard_attention: bool = opt(True, "off: the backbone alone on the whole image, the paper's baselines")
    # ---- attention: these change evaluation too, and never the weights
    locations: str = opt("3", "cells chosen in each grid, a number for each level below the first, joined by x: 3; 2x1; 0: the context alone")
    use_context: bool = opt(True, "off: classify from the attended locations only (Sec. 5.4)")
    policy: str = opt("learned", "which cells: of the location module; random or fixed ones as controls", ("learned", "random", "fixed"))
    fixed_cells: tuple[int, ...] = opt((), "policy=fixed: the cells, counted row by row from 0; the first k are used")
    # ---- learning rule
    select: str = opt("sample", "training: sample cells without replacement (Sec. 3.1); topk: the most probable (authors' code)", ("sample", "topk"))
    normalize_logits: bool = opt(True, "divide the location logits by their L2 norm (authors' code)")
    logit_scale: float = opt(8.0, "then multiply them by this (our choice; authors' code: 1)")
    samples: int = opt(1, "M, Monte-Carlo samples of the locations for each image (Eq. 1)")
    lambda_f: float = opt(0.1, "weight of the policy terms (Eq. 1)")
    lambda_c: float = opt(0.3, "share of the pooled prediction in the cross-entropy; the rest is per feature (Eq. 3); 1: no per-feature term")
    lambda_r: float = opt(0.3, "share of the pooled prediction in the reward (Eq. 3); 1: no per-feature term")
    baseline: str = opt("shared", "b of Eq. 2: one for all rewards, or one for R^s and one for R^k (our choice)", ("shared", "separate"))
    level_cap: int = opt(0, "per-feature terms only for levels up to this, at least 2; 0: all (authors' code)")
    contrastive: float = opt(0.0, "weight of the contrastive term (authors' code, birds)")
    contrastive_margin: float = opt(0.4, "cosine above which two classes repel each other (authors' code)")
    contrastive_chunk: int = opt(16, "images that are compared with each other: the authors' share of a batch on one GPU")
    # ---- optimizer
    backbone_lr: float = opt(1.0, "factor on lr for the backbone (authors' code: 0.1 on birds)")
    decay_backbone: bool = opt(True, "weight decay also on the backbone (authors' code: not on birds)")


# Authors' code, unless a section is named: Adam with Keras' epsilon, one drop of the learning rate, crops of 85 to 100 % of the photo.
_imagenet = Recipe(
    image_size=(224, 224), crop="resized", crop_area=(0.85, 1.0), crop_ratio=(0.5, 2.0), interpolation="random", normalize="half",
    brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2, jitter_prob=0.8,
    batch_size=64, epochs=200, optimizer="adam", lr=1e-4, eps=1e-7, schedule="steps", milestones=(0.8,),
)
_fmow = replace(
    _imagenet, backbone="efficientnet_b0", base_resolution=224, image_size=(448, 448), grid=3, cell=0.5, locations="2",
    epochs=40, lr=1e-3, dropout=0.5, drop_path=0.3, lambda_c=0.2, lambda_r=0.2,
)
_birds = dict(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, translate=0.1, rotate=20.0, normalize="imagenet", weights="default", batch_norm=(1e-5, 0.01))
_cub = replace(
    _imagenet, **_birds, backbone="efficientnet_b0", base_resolution=224, image_size=(448, 448), cell=0.35, locations="5", feature_weighting=True,
    epochs=200, lr=1e-3, backbone_lr=0.1, milestones=(0.9,), dropout=0.75, drop_path=0.5, contrastive=100.0, weight_decay=2e-4, decay_backbone=False,
)
_birds_en = dict(hard_attention=False, backbone_lr=0.05, weight_decay=0.0)
_fmow_en = {  # EfficientNet-B0 at each resolution (Table 2)
    "224-boxes": dict(hard_attention=False, image_size=(224, 224), epochs=65, dropout=0.75, drop_path=0.5, weight_decay=2e-5, boxes=True),
    "224": dict(hard_attention=False, image_size=(224, 224), epochs=60, dropout=0.75, drop_path=0.5, weight_decay=2e-5),
    "448": dict(hard_attention=False, batch_size=32, epochs=30, dropout=0.75, drop_path=0.3, weight_decay=2e-5),
    "896": dict(hard_attention=False, image_size=(896, 896), batch_size=32, epochs=30, dropout=0.3, drop_path=0.2, weight_decay=2e-5),
}
_fmow_896 = dict(image_size=(896, 896), locations="2x1", epochs=10, drop_path=0.5, lambda_c=0.05, lambda_r=0.05, level_cap=2, weights="runs/tnet-fmow")
_bagnet77 = dict(hard_attention=False, dropout=0.625, epochs=175, milestones=(160 / 175,))  # a run of 200 epochs with the drop at 160, stopped at 175

# Locations on birds (authors' code): CUB 5 for B0 to B4, with 125 epochs for B4; NABirds 5 for B0 to B2, and --locations 3 for B3 and B4.
RECIPES = {
    "toy": Recipe(
        image_size=(128, 128), toy_preset="birds-easy", crop="none", normalize="half",  # few pictures and no random shift: with one, 32 pixels are enough
        backbone="small", base_resolution=32, cell=0.25, dropout=0.0, lambda_f=0.05, baseline="separate",
        batch_size=32, epochs=40, optimizer="adamw", lr=2e-3, schedule="onecycle",
    ),
    "folder": Recipe(
        image_size=(224, 224), crop="resized", crop_area=(0.5, 1.0), normalize="imagenet",
        backbone="small", width=32, base_resolution=56, cell=0.25, dropout=0.0, lambda_f=0.05, baseline="separate",
        batch_size=32, epochs=60, optimizer="adamw", lr=2e-3, schedule="onecycle",
    ),
    "folder-b0": replace(_cub, locations="3", contrastive=0.0, epochs=60, batch_norm=(1e-5, 0.1)),
    "imagenet": _imagenet,
    "imagenet-bagnet77": replace(_imagenet, **_bagnet77),
    "fmow": _fmow,
    "fmow-896": replace(_fmow, **_fmow_896),
    **{f"fmow-en{size}": replace(_fmow, **changes) for size, changes in _fmow_en.items()},
    "cub": _cub,
    "cub-en": replace(_cub, **_birds_en),
    "nabirds": replace(_cub, epochs=100, contrastive=50.0),
    "nabirds-en": replace(_cub, **_birds_en, epochs=100, contrastive=50.0),
}

# Rows that differ only in `locations` and `use_context` are evaluations of one training: with 3 on ImageNet, 2 on fMoW and 2x1 there at 896, 5 on CUB.
TABLES = {
    "1": Table("Hard attention on ImageNet", "imagenet", "top1", (
        ("BagNet-77", _bagnet77, 73.42),
        *((f"TNet, {k} locations", {"eval": {"locations": k}}, top1) for k, top1 in zip("01235", (67.29, 73.12, 74.12, 74.41, 74.62))),
    )),
    "2": Table("Scalability on fMoW", "fmow", "top1", (
        *((f"EfficientNet-B0, {size}", _fmow_en[size], top1) for size, top1 in zip(_fmow_en, (69.7, 62.8, 69.83, 70.6))),
        *((f"TNet, 448, {k} locations", {"eval": {"locations": k}}, top1) for k, top1 in zip("0123", (47.79, 70.17, 71.46, 71.57))),
        ("TNet, 896, 4 locations", _fmow_896, 72.16), ("TNet, 896, 6 locations", {**_fmow_896, "eval": {"locations": "2x2"}}, 71.92),
    )),
    "toy": Table("Where to look, on the toy birds", "toy", "top1", (
        ("TNet, 3 locations", {}, None),
        ("the low resolution alone", {"locations": "0"}, None),
        ("random cells", {"policy": "random"}, None),
        ("the three best constant cells", {"policy": "fixed", "fixed_cells": (12, 11, 13)}, None),
        ("without per-feature regularisation", {"lambda_c": 1.0, "lambda_r": 1.0}, None),
    )),
    "baseline": Table("TNet and its backbone on the whole image at full resolution", "toy", "top1", (
        ("backbone at full resolution", {"hard_attention": False}, None), ("TNet, 3 locations", {}, None),
    )),
    "fig3": Table("Backbones on CUB-200-2011 (the paper plots its values)", "cub", "top1", tuple(
        row for i in range(5) for row in (
            (f"EfficientNet-B{i}", {**_birds_en, "backbone": f"efficientnet_b{i}"}, None),
            *((f"TNet-B{i}, {k} locations", {"backbone": f"efficientnet_b{i}", "epochs": 125 if i == 4 else 200, "eval": {"locations": k}}, None) for k in "012345"),
        )
    )),
    "5.4": Table("Attended locations without the context on ImageNet (Sec. 5.4)", "imagenet", "top1", tuple(
        (f"TNet, {k} locations, no context", {"eval": {"locations": k, "use_context": False}}, top1) for k, top1 in zip("235", (67.95, 69.66, 71.05))
    )),
    "5.5": Table("Per-feature regularisation on ImageNet (Sec. 5.5)", "imagenet", "top1", (
        *((f"with, {k} locations", {"eval": {"locations": k}}, top1) for k, top1 in zip("135", (73.12, 74.41, 74.62))),
        *((f"without, {k} locations", {"lambda_c": 1.0, "lambda_r": 1.0, "eval": {"locations": k}}, top1) for k, top1 in zip("135", (65.21, 67.33, 68.55))),
    )),
}

# ------------------------------------------------------------------------------------------------ choosing cells (Sec. 3.1)


def gumbel_top_k(logits, k, generator=None):
    """Sample k of K cells without replacement (Sec. 3.1): (B, K) -> indices (B, k) in draw order, log-probability of that order (B,).

    The k largest of logits + Gumbel noise are distributed as k draws, one after the other, from the softmax over the cells that are left.
    """
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    indices = (logits + noise).topk(k, dim=-1).indices
    return indices, plackett_luce_log_prob(logits, indices)


def plackett_luce_log_prob(logits, indices):
    """log p(l|x, w) of Eq. 1 for cells drawn in this order without replacement: (B, K), (B, k) -> (B,)."""
    draws = F.one_hot(indices, logits.shape[-1])  # (B, k, K)
    gone = (draws.cumsum(1) - draws).bool()  # before each draw, the cells that earlier draws took
    left = logits[:, None].masked_fill(gone, -torch.inf).logsumexp(-1)  # (B, k)
    return (logits.gather(1, indices) - left).sum(1)


# ------------------------------------------------------------------------------------------------ cropping cells (Sec. 5.1)


def crop_grid(size, grid, fraction):
    """Where the cells of a grid lie along one side of `size` pixels -> (start of each, may be negative; their side), in pixels (Sec. 5.1)."""
    patch = round(size * fraction)
    stride = -(-(size - patch) // (grid - 1)) if grid > 1 else 0  # rounded up
    before = ((grid - 1) * stride + patch - size + 1) // 2  # the cells may reach over the border, by as much on both sides
    return [i * stride - before for i in range(grid)], patch


def crop(images, owner, corner, size, outside=True):
    """Windows of the images, zero where they reach outside: (B, 3, H, W), image (n,), corner y,x (n, 2), size (h, w) -> (n, 3, h, w).

    Unfolding gives a view of all windows without copying; indexing it reads the chosen ones only. `outside`: can a window reach over the border?
    """
    h, w = size
    nearest = corner.clamp(min=0).minimum(corner.new_tensor([images.shape[2] - h, images.shape[3] - w]))
    windows = images.unfold(2, h, 1).unfold(3, w, 1)  # (B, 3, H - h + 1, W - w + 1, h, w), no copy
    crops = windows[owner, :, nearest[:, 0], nearest[:, 1]]  # (n, 3, h, w)
    if outside:
        for dim, length, moved in ((2, h, nearest[:, 0] - corner[:, 0]), (3, w, nearest[:, 1] - corner[:, 1])):
            line = torch.arange(length, device=images.device) - moved[:, None]  # which row (column) of the window belongs here
            shape = (-1, 1, length, 1) if dim == 2 else (-1, 1, 1, length)
            crops = crops.gather(dim, line.clamp(0, length - 1).view(shape).expand_as(crops)) * ((line >= 0) & (line < length)).view(shape)
    return crops


# ------------------------------------------------------------------------------------------------ feature extraction module (Sec. 3.2)

leaky = partial(F.leaky_relu, negative_slope=0.2, inplace=True)  # TensorFlow's slope


def initialize(module, glorot=False):
    """Initial weights of the authors' code: BagNet's convolutions Glorot normal, EfficientNet's He normal by fan-out, linear layers by their outputs."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_normal_(layer.weight) if glorot else nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.weight, -layer.out_features**-0.5, layer.out_features**-0.5)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(layer.bias)


class Bottleneck(nn.Module):
    """BagNet's residual block, 1x1 -> f x f -> 1x1, with biases and without normalisation; `valid`: the f x f convolution is not padded."""

    def __init__(self, inputs, width, kernel, stride, valid):
        super().__init__()
        self.valid = valid and kernel == 3
        self.reduce = nn.Conv2d(inputs, width, 1)
        self.conv = nn.Conv2d(width, width, kernel, stride)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride) if stride > 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x):
        y = leaky(self.reduce(x))
        if self.valid:
            x = x[:, :, 1:-1, 1:-1]
        elif self.conv.kernel_size == (3, 3):  # TensorFlow's "same": with stride 2, an even side is padded at its end only
            (top, left) = (1 if self.conv.stride == (1, 1) else side % 2 for side in y.shape[2:])
            y = F.pad(y, (left, 1, top, 1))
        y = self.expand(leaky(self.conv(y)))
        return leaky(y + self.shortcut(x))


class BagNet77(nn.Module):
    """ResNet-50 in which most 3x3 convolutions are 1x1, so that a cell of the last map sees 77 x 77 pixels (Sec. 5.1).

    images (B, 3, S, S) -> F, the map for the location module (B, 1024, 9, 9) at S = 77; the last map (B, 512, 7, 7), whose mean is V.
    """

    map_channels, channels = 1024, 512

    def __init__(self, dropout=0.0):
        super().__init__()
        self.part1 = nn.Conv2d(3, 64, 3)
        self.part2 = self._part(64, 64, (3, 3, 1), 2)
        self.part3 = self._part(256, 128, (3, 3, 1, 1), 2)
        self.part4 = self._part(512, 256, (3, 3, 1, 1, 1, 1), 2, valid=True)
        self.part5 = self._part(1024, 512, (3, 3, 1), 1, valid=True)
        self.part6 = nn.Conv2d(2048, 512, 1)
        self.dropout = nn.Dropout2d(dropout)  # of whole channels: the same as dropout of V
        initialize(self, glorot=True)

    @staticmethod
    def _part(inputs, width, kernels, stride, valid=False):  # the first block has the stride, and is the one that may be unpadded
        first = Bottleneck(inputs, width, kernels[0], stride, valid)
        return nn.Sequential(first, *(Bottleneck(4 * width, width, kernel, 1, False) for kernel in kernels[1:]))

    def forward(self, images):
        x = self.part3(self.part2(leaky(self.part1(images))))
        middle = self.part4(x)
        return middle, self.dropout(leaky(self.part6(self.part5(middle))))


class EfficientNet(nn.Module):
    """torchvision's EfficientNet: images (B, 3, 224, 224) -> F, the map after block `tap` = (stage, block); the last map (B, C, 7, 7)."""

    def __init__(self, name, tap, batch_norm, drop_path):
        super().__init__()
        eps, momentum = batch_norm
        self.tap = tap
        self.features = torchvision.models.get_model(name, norm_layer=partial(nn.BatchNorm2d, eps=eps, momentum=momentum)).features
        self.channels = self.features[-1].out_channels
        self.map_channels = self.features[tap[0]][tap[1]].out_channels
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # PyTorch's fan-out overlooks the groups; TensorFlow's does not
                nn.init.normal_(layer.weight, std=(2 / layer.kernel_size[0] ** 2) ** 0.5)
        drops = [layer for layer in self.features.modules() if isinstance(layer, torchvision.ops.StochasticDepth)]
        for i, layer in enumerate(drops, 1):  # counted from 1, so that the last block has the full rate
            layer.p = drop_path * i / len(drops)

    def forward(self, x):
        for s, stage in enumerate(self.features):
            if s != self.tap[0]:
                x = stage(x)
                continue
            for b, block in enumerate(stage):
                x = block(x)
                if b == self.tap[1]:
                    middle = x
        return middle, x


class Small(nn.Module):
    """A CNN of four layers for the toy (our choice): images (B, 3, S, S) -> F (B, 4w, S/4, S/4), the last map (B, 4w, S/8, S/8)."""

    def __init__(self, width):
        super().__init__()
        self.map_channels = self.channels = 4 * width
        layer = lambda inputs, outputs, stride: nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.early = nn.Sequential(layer(3, width, 1), layer(width, 2 * width, 2), layer(2 * width, 4 * width, 2))
        self.late = layer(4 * width, 4 * width, 2)

    def forward(self, images):
        middle = self.early(images)
        return middle, self.late(middle)


# (backbone, grid) -> base resolution, (stage, block) whose output is F, rows and columns of F that are the candidate locations.
TAPS = {("bagnet77", 5): (77, None, (0, 2, 4, 6, 8)), ("efficientnet_b0", 3): (224, (4, 2), (3, 7, 11)), ("efficientnet_b0", 5): (224, (4, 0), (3, 5, 7, 9, 11))}
TAPS |= {(f"efficientnet_b{i}", 5): (224, (3, 1), (6, 10, 14, 18, 22)) for i in (1, 2, 3, 4)}


# ------------------------------------------------------------------------------------------------ location module (Sec. 3.2)


class Coordinates(nn.Module):
    """Append each cell's row and column, from -1 to 1 and learnably scaled and shifted: (B, C, n, n) -> (B, C + 2, n, n)."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        B, _, n, _ = x.shape
        line = torch.linspace(-1, 1, n, device=x.device)
        places = torch.stack((line[:, None].expand(n, n), line.expand(n, n)))  # (2, n, n): row, column
        places = places * self.scale[:, None, None] + self.shift[:, None, None]
        return torch.cat((x, places.expand(B, 2, n, n)), 1)


class LocationConcat(nn.Module):
    """BagNet's location module: the context V beside each location's features. F (B, C, n, n), V (B, D) -> logits (B, n * n)."""

    def __init__(self, map_channels, channels):
        super().__init__()
        self.coordinates = Coordinates()
        self.hidden = nn.Conv2d(map_channels + channels + 2, channels, 1)
        self.logit = nn.Conv2d(channels, 1, 1)

    def forward(self, F_map, V):
        x = torch.cat((F_map, V[:, :, None, None].expand(-1, -1, *F_map.shape[2:])), 1)
        return self.logit(leaky(self.hidden(self.coordinates(x)))).flatten(1)


class LocationSqueezeExcite(nn.Module):
    """EfficientNet's location module: context by squeeze-and-excitation over the grid. F (B, C, n, n) -> logits (B, n * n); V is not used."""

    def __init__(self, map_channels):
        super().__init__()
        self.reduce = nn.Conv2d(map_channels, map_channels, 1)
        self.context = torchvision.ops.SqueezeExcitation(map_channels, map_channels // 2, activation=nn.SiLU)
        self.coordinates = Coordinates()
        self.hidden = nn.Conv2d(map_channels + 2, map_channels, 1)
        self.logit = nn.Conv2d(map_channels, 1, 1)

    def forward(self, F_map, V):
        x = self.context(F.silu(self.reduce(F_map)))
        return self.logit(F.silu(self.hidden(self.coordinates(x)))).flatten(1)


# ------------------------------------------------------------------------------------------------ positional encoding module (Sec. 3.2)


def positional_encoding(positions, dim):
    """Sines and cosines of row y, column x and scale s (Sec. 3.2): (..., 3) -> (..., dim), zeros in what 6 does not divide."""
    m = dim // 6
    frequencies = 100.0 ** -(torch.arange(m, device=positions.device) / max(1, m - 1))  # 1 down to 0.01 (authors' code; the Transformer's go to 1e-4)
    angles = positions.float()[..., None] * frequencies  # (..., 3, m)
    code = torch.stack((angles.sin(), angles.cos()), -2).flatten(-3)  # sin y, cos y, sin x, cos x, sin s, cos s
    return F.pad(code, (0, dim - 6 * m))


class PositionConcat(nn.Module):
    """BagNet's: V' is a linear layer of V beside the code of its place; (..., C), (..., 3) -> (..., C)."""

    def __init__(self, channels):
        super().__init__()
        self.code = channels
        self.linear = nn.Linear(2 * channels, channels)

    def forward(self, V, positions):
        return self.linear(torch.cat((V, positional_encoding(positions, self.code).to(V)), -1))


class PositionAdd(nn.Module):
    """EfficientNet's: V' = swish(V + a linear layer of the code of its place); (..., C), (..., 3) -> (..., C)."""

    def __init__(self, channels):
        super().__init__()
        self.code = channels // 4
        self.linear = nn.Linear(self.code, channels)

    def forward(self, V, positions):
        return F.silu(V + self.linear(positional_encoding(positions, self.code).to(V)))


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


# ------------------------------------------------------------------------------------------------ losses of the authors' code


def contrastive_loss(vectors, targets, margin, chunk):
    """Vectors of one class attract each other, of two classes repel above a cosine of `margin` (authors' code): (B, C), (B,) -> scalar.

    The mean over all pairs of a chunk, each image with itself included.
    """
    losses = []
    with torch.autocast(vectors.device.type, enabled=False):
        for v, t in zip(F.normalize(vectors.float(), dim=-1).split(chunk), targets.split(chunk)):
            cosine, same = v @ v.T, t[:, None] == t
            losses.append(torch.where(same, 1 - cosine, (cosine - margin).clamp(min=0)).mean())
    return torch.stack(losses).mean()


# ------------------------------------------------------------------------------------------------ the model


class Traversal(NamedTuple):
    """What one pass through the scale-space gives, for B images and A attended locations, level by level."""

    features: torch.Tensor  # (B, 1 + A, C): V', the context first
    boxes: torch.Tensor  # (B, A, 4): xyxy in pixels of the image, may reach outside
    reached: torch.Tensor  # (B, A): probability of the cell times that of the cells it lies in
    cell_log_probs: torch.Tensor  # (B, A): log p(l_k|x, w) of Eq. 3b, within the cell's own grid
    log_prob: torch.Tensor  # (B,): log p(l|x, w) of Eq. 3a, of all grids together
    grids: list  # level by level, the probabilities of all cells (B * grids, n * n)


class TNet(nn.Module):
    """Traversal Network (Fig. 2); with hard_attention=False its backbone and classifier alone, on the whole image."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe = recipe
        check(recipe)
        self.locations = parse_locations(recipe.locations)
        _, tap, self.rows = TAPS.get((recipe.backbone, recipe.grid), (0, (0, 0), ()))
        if recipe.backbone == "small":
            self.backbone = Small(recipe.width)
        elif recipe.backbone == "bagnet77":
            self.backbone = BagNet77(recipe.dropout)
        else:
            self.backbone = EfficientNet(recipe.backbone, tap, recipe.batch_norm, recipe.drop_path)
        C = self.backbone.channels
        self.dropout = nn.Dropout(0.0 if recipe.backbone == "bagnet77" else recipe.dropout)
        self.classifier = nn.Linear(C, num_classes)
        if recipe.hard_attention:
            efficient = recipe.backbone.startswith("efficientnet")
            self.location = LocationSqueezeExcite(self.backbone.map_channels) if efficient else LocationConcat(self.backbone.map_channels, C)
            self.position = PositionAdd(C) if efficient else PositionConcat(C)
            self.weighting = FeatureWeighting(C) if recipe.feature_weighting else None
            self.register_buffer("baseline", torch.full((2,), 0.5))  # b of Eq. 2, for R^s and for R^k; the same value twice when shared
            self.learns_where = recipe.policy == "learned" and recipe.lambda_f > 0 and bool(self.locations)
            self.location.requires_grad_(self.learns_where)  # else it would have no gradient, which DistributedDataParallel refuses
        for name, module in self.named_children():
            if name != "backbone" and recipe.backbone != "small":
                initialize(module, glorot=recipe.backbone == "bagnet77")

    # ---- one view
    def rescale(self, views):
        """Any view -> base resolution, by bilinear interpolation without a low-pass filter (authors' code)."""
        base = (self.recipe.base_resolution,) * 2
        return views if views.shape[2:] == base else F.interpolate(views, base, mode="bilinear", align_corners=False)

    def extract(self, views):
        """Feature extraction module: views (n, 3, h, w) of any size -> F at the candidate locations (n, C_F, grid, grid), V (n, C)."""
        middle, last = self.backbone(self.rescale(views))
        F_map = middle[:, :, self.rows][:, :, :, self.rows] if self.rows else F.adaptive_avg_pool2d(middle, self.recipe.grid)
        return F_map, self.vector(last)

    def vector(self, last):
        """The last map becomes V: its mean, or in the small backbone the maximum, (n, C, h, w) -> (n, C)."""
        return last.amax((2, 3)) if self.recipe.backbone == "small" else last.mean((2, 3))

    def location_logits(self, F_map, V):
        """Location module: logits of all cells (n, K), in fp32. Its inputs are detached, so rewards teach it alone."""
        if self.recipe.policy != "learned":
            return V.new_zeros(len(V), self.recipe.grid**2, dtype=torch.float32)
        logits = self.location(F_map.detach(), V.detach()).float()
        return self.recipe.logit_scale * (F.normalize(logits, dim=-1) if self.recipe.normalize_logits else logits)

    def select(self, logits, k):
        """Choose k cells in each grid: (n, K) -> cells (n, k), log-probability of this choice (n,), log-probability of each cell (n, k)."""
        r = self.recipe
        if r.policy == "fixed":
            cells = torch.tensor(r.fixed_cells[:k], device=logits.device).expand(len(logits), k)
        elif r.policy == "random" or (self.training and r.select == "sample"):
            cells, _ = gumbel_top_k(logits, k)
        else:
            cells = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        cell_log_probs = logits.log_softmax(-1).gather(1, cells)
        return cells, plackett_luce_log_prob(logits, cells) if r.select == "sample" else cell_log_probs.sum(1), cell_log_probs

    # ---- all views
    def traverse(self, images):
        """Processing flow (Sec. 3.1, Fig. 2): images (B, 3, H, W) -> Traversal of B * M rows, the M samples of an image one after the other."""
        r, n = self.recipe, self.recipe.grid
        F_map, V = self.extract(images)  # level 1: the whole image, downscaled
        owner = torch.arange(len(images), device=images.device)  # the image of each row
        if self.training and r.samples > 1:
            F_map, V, owner = (t.repeat_interleave(r.samples, 0) for t in (F_map, V, owner))
        B, size, outside = len(owner), images.shape[2:], False
        corner = owner.new_zeros(B, 1, 2)  # y, x of the first pixel of each view, in the image
        position = owner.new_zeros(B, 1, 3)  # y, x, s for the positional encoding
        reached = V.new_ones(B, 1, dtype=torch.float32)
        vectors, positions, boxes, grids = [V[:, None]], [position], [owner.new_zeros(B, 0, 4)], []
        log_prob, cell_log_probs, reaches = reached.new_zeros(B), [reached[:, :0]], [reached[:, :0]]
        for level, k in enumerate(self.locations, 2):
            # choose k cells in the grid of each view of the level above, of which an image has m
            logits = self.location_logits(F_map, V)  # (B * m, K)
            cells, choice_log_prob, each_log_prob = self.select(logits, k)  # (B * m, k), (B * m,), (B * m, k)
            row, column = (cells // n).view(B, -1, k), (cells % n).view(B, -1, k)  # (B, m, k)
            # where they lie in the image, and in scale-space
            (starts_y, h), (starts_x, w) = (crop_grid(side, n, r.cell) for side in size)
            outside |= min(starts_y + starts_x) < 0 or starts_y[-1] + h > size[0] or starts_x[-1] + w > size[1]
            start = torch.stack((owner.new_tensor(starts_y)[row], owner.new_tensor(starts_x)[column]), -1)
            corner, size = (corner[:, :, None] + start).flatten(1, 2), (h, w)  # (B, m * k, 2)
            y, x = n * position[:, :, None, 0] + row, n * position[:, :, None, 1] + column
            position = torch.stack((y, x, torch.full_like(y, level - 1)), -1).flatten(1, 2)  # (B, m * k, 3)
            # look at them: all crops of the level in one batch
            m = corner.shape[1]
            F_map, V = self.extract(crop(images, owner.repeat_interleave(m), corner.flatten(0, 1), size, outside))
            vectors.append(V.view(B, m, -1))
            positions.append(position)
            boxes.append(torch.cat((corner.flip(-1), corner.flip(-1) + corner.new_tensor((w, h))), -1))
            grids.append(logits.softmax(-1))
            log_prob = log_prob + choice_log_prob.view(B, -1).sum(1)
            cell_log_probs.append(each_log_prob.view(B, m))
            reached = (reached[:, :, None] * each_log_prob.detach().exp().view(B, -1, k)).flatten(1)
            reaches.append(reached)
        features = self.position(torch.cat(vectors, 1), torch.cat(positions, 1))
        return Traversal(features, torch.cat(boxes, 1), torch.cat(reaches, 1), torch.cat(cell_log_probs, 1), log_prob, grids)

    def pool(self, features):
        """The vectors V' become one (Fig. 2, step 4): (B, N, C) -> (B, C)."""
        if self.weighting is None:
            return features.mean(1)
        return (features * self.weighting(features)[..., None].to(features)).sum(1)

    def classify(self, vectors):
        """Classification module: (..., C) -> logits (..., K)."""
        return self.classifier(self.dropout(vectors))

    def forward(self, images, targets=None):
        """Images (B, 3, H, W) -> logits (B, K); with targets (B,) -> loss, terms."""
        r = self.recipe
        if r.hard_attention:
            seen = self.traverse(images)
            pooled = self.pool(seen.features if r.use_context else seen.features[:, 1:])
        else:
            pooled = self.vector(self.backbone(images)[1])
        logits = self.classify(pooled)
        if targets is None:
            return logits
        targets = targets.repeat_interleave(len(logits) // len(targets))  # (B * M,)
        terms = {"ce": F.cross_entropy(logits.float(), targets, label_smoothing=r.label_smoothing)}
        loss = self.learning_rule(seen, logits, targets, terms) if r.hard_attention else terms["ce"]
        if r.contrastive:
            terms["contrastive"] = contrastive_loss(pooled, targets, r.contrastive_margin, r.contrastive_chunk)
            loss = loss + r.contrastive * terms["contrastive"]
        terms["top1"] = (logits.argmax(-1) == targets).float().mean()
        return loss, {name: term.detach() for name, term in terms.items()}

    # ---- learning (Sec. 4)
    def learning_rule(self, seen, logits, targets, terms):
        """Eq. 3 as a loss to minimise (the paper writes the gradient of what is maximised); adds what it computes to `terms`."""
        r = self.recipe
        levels = self.locations[: r.level_cap - 1] if r.level_cap else self.locations
        A = sum(prod(levels[: i + 1]) for i in range(len(levels)))  # |l|, the attended locations with per-feature terms
        each = self.classify(seen.features[:, : 1 + A])  # (B, 1 + A, K): each vector alone, the context first
        terms["ce_each"] = F.cross_entropy(each.flatten(0, 1).float(), targets.repeat_interleave(1 + A), label_smoothing=r.label_smoothing)
        loss = r.lambda_c * terms["ce"] + (1 - r.lambda_c) * terms["ce_each"]  # first terms of Eq. 3a and 3b
        if self.learns_where:
            R = (logits.argmax(-1) == targets).float()  # (B,): R^s of Eq. 3a
            R_each = (each[:, 1:].argmax(-1) == targets[:, None]).float()  # (B, A): R^k of Eq. 3b
            b, b_each = self.baseline.clone()  # those of the batch before
            terms["policy"] = -((R - b) * seen.log_prob).mean()
            terms["policy_each"] = -((R_each - b_each) * seen.cell_log_probs[:, :A]).mean()
            loss = loss + r.lambda_f * (r.lambda_r * terms["policy"] + (1 - r.lambda_r) * terms["policy_each"])  # second terms
            terms |= {"reward": R.mean(), "reward_each": R_each.mean(), "entropy": torch.special.entr(torch.cat(seen.grids)).sum(-1).mean()}
            if self.training:
                self.update_baseline(terms["reward"], terms["reward_each"])
        return loss

    @torch.no_grad()
    def update_baseline(self, reward, reward_each):
        """Eq. 2, from the mean rewards of the batch (over all processes)."""
        mean = torch.stack((reward, reward_each))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        if self.recipe.baseline == "shared":
            mean = (self.recipe.lambda_r * mean[0] + (1 - self.recipe.lambda_r) * mean[1]).expand(2)
        self.baseline.copy_(0.9 * self.baseline + 0.1 * mean)

    # ---- what it looked at, and what it made of it
    @torch.no_grad()
    def heads(self, images):
        """Logits of all vectors pooled, of the context alone and of the attended locations alone (Sec. 5.4)."""
        if not self.recipe.hard_attention:
            return {"all": self(images)}
        features = self.traverse(images).features
        heads = {"all": self.classify(self.pool(features)), "context": self.classify(features[:, 0])}
        return heads | ({"attended": self.classify(self.pool(features[:, 1:]))} if self.locations else {})

    @torch.no_grad()
    def where(self, images):
        """Attended crops (B, A, 4), xyxy in pixels of the input, by the probability (B, A) of reaching them; the whole image when there are none.

        Of a baseline, which attends to nothing: one box as large as a grid cell at the peak of the class activation map of its answer.
        """
        H, W = images.shape[2:]
        limit = torch.tensor((W, H, W, H), device=images.device)
        if self.recipe.hard_attention and self.locations:
            seen = self.traverse(images)
            scores, order = seen.reached.sort(dim=1, descending=True, stable=True)
            return seen.boxes.gather(1, order[..., None].expand(-1, -1, 4)).clamp(min=0).minimum(limit).float(), scores
        if self.recipe.hard_attention:
            return images.new_tensor((0, 0, W, H)).expand(len(images), 1, 4), images.new_ones(len(images), 1)
        maps = self.activation_map(images)  # (B, h, w)
        scores, at = maps.flatten(1).softmax(-1).max(-1, keepdim=True)  # (B, 1)
        half = images.new_tensor((W, H)) * self.recipe.cell / 2
        centre = torch.stack(((at % maps.shape[2] + 0.5) * W / maps.shape[2], (at // maps.shape[2] + 0.5) * H / maps.shape[1]), -1)  # (B, 1, 2)
        centre = centre.maximum(half).minimum(images.new_tensor((W, H)) - half)
        return torch.cat((centre - half, centre + half), -1), scores

    def activation_map(self, images):
        """A baseline's evidence for its answer at each place of its last map: (B, 3, H, W) -> (B, h, w)."""
        last = self.backbone(images)[1].float()
        answer = self.classifier(self.vector(last)).argmax(-1)
        return (last * self.classifier.weight[answer][:, :, None, None]).sum(1)

    def location_map(self, probabilities, size):
        """Probability of looking at each pixel's cells on average: of the level-1 grid (K,) -> (H, W)."""
        total, cover = (torch.zeros(*size) for _ in range(2))
        (starts_y, h), (starts_x, w) = (crop_grid(side, self.recipe.grid, self.recipe.cell) for side in size)
        for i, p in enumerate(probabilities.tolist()):
            y, x = starts_y[i // self.recipe.grid], starts_x[i % self.recipe.grid]
            window = (slice(max(0, y), y + h), slice(max(0, x), x + w))
            total[window] += p
            cover[window] += 1
        return total / cover.clamp(min=1)

    @torch.no_grad()
    def figure(self, images):
        """Figures 1c and 4: the image with its attended cells, level 1, the location map, and the crops, best first (p: probability, w: weight)."""
        r, (H, W), pages = self.recipe, images.shape[2:], []
        zoom = max(1, 448 // H)  # room for labels on small images
        pictures = [common.to_pil(image, r.normalize).resize((zoom * W, zoom * H), Image.Resampling.BICUBIC) for image in images]
        if not r.hard_attention:
            for picture, box, values in zip(pictures, self.where(images)[0], self.activation_map(images)):
                pages.append(common.panels([common.draw_boxes(picture, box * zoom), common.heat(picture, values)], ["evidence is strongest", "evidence for the answer"]))
            return pages
        seen, context = self.traverse(images), self.rescale(images)
        weights = None if self.weighting is None else self.weighting(seen.features)  # (B, 1 + A)
        for i, picture in enumerate(pictures):
            p, order = seen.reached[i], seen.reached[i].sort(descending=True, stable=True).indices.tolist()
            weight = lambda k: "" if weights is None else f", w {weights[i, k]:.2f}"
            boxes = (seen.boxes[i].clamp(min=0).minimum(seen.boxes.new_tensor((W, H, W, H))) * zoom)[order]
            labels = [f"{rank}: {p[k]:.2f}" for rank, k in enumerate(order, 1)]
            shown = [common.draw_boxes(picture, boxes, labels, width=3), common.to_pil(context[i], r.normalize)]
            captions = ["attended locations", f"level 1, {r.base_resolution} px{weight(0)}"]
            if self.locations:
                shown.append(common.heat(picture, self.location_map(seen.grids[0][i], (H, W))))
                captions.append("probability of a look")
            shown += [picture.crop(box) for box in boxes.tolist()]
            captions += [f"{rank}: p {p[k]:.2f}{weight(1 + k)}" for rank, k in enumerate(order, 1)]
            pages.append(common.panels(shown, captions))
        return pages


# ------------------------------------------------------------------------------------------------ from a recipe


def parse_locations(text):
    """"3" -> (3,); "2x1" -> (2, 1): cells chosen in each grid, level by level; "0" -> ()."""
    if text == "0":
        return ()
    counts = text.split("x")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ValueError(f"locations {text!r}: allowed are a number for each level below the first, joined by x; try 3, 2x1, or 0 for the context alone")
    return tuple(int(count) for count in counts)


def check(recipe):
    """Refuse settings that cannot work."""
    r, most, cells = recipe, max(parse_locations(recipe.locations), default=0), recipe.grid**2
    taps = {grid: base for (backbone, grid), (base, _, _) in TAPS.items() if backbone == r.backbone} or {r.grid: r.base_resolution}  # small: anything
    named = sorted(set(r.fixed_cells) & set(range(cells)))
    for fine, problem in (
        (r.backbone in BACKBONES, f"backbone {r.backbone}: there are {', '.join(BACKBONES)}; choose one of these"),
        (r.grid in taps, f"grid {r.grid} with backbone {r.backbone}: its location map is read for a grid of {list(taps)}; choose one of these, or --backbone small"),
        (taps.get(r.grid) == r.base_resolution, f"base_resolution {r.base_resolution} with backbone {r.backbone}: its location map is read at {taps.get(r.grid)} pixels; use that"),
        (0 < r.cell <= 1, f"cell {r.cell}: it is a share of the side, in (0, 1]; the paper has 0.34375, 0.5 and 0.35"),
        (most <= cells, f"locations {r.locations}: a {r.grid} x {r.grid} grid has {cells}; choose fewer"),
        (most or r.use_context, "locations 0 without use_context: nothing is left to classify; add --use-context, or some --locations"),
        (r.policy != "fixed" or len(named) == len(r.fixed_cells) >= most, f"fixed_cells {r.fixed_cells}: policy fixed needs {most} different cells of 0 to {cells - 1}; name them, as in --fixed-cells 12"),
        (0 <= r.lambda_c <= 1 and 0 <= r.lambda_r <= 1, f"lambda_c {r.lambda_c}, lambda_r {r.lambda_r}: they are shares in [0, 1]; 1 is no per-feature regularisation"),
        (r.samples == 1 or (r.samples > 1 and r.select == "sample"), f"samples {r.samples} with select {r.select}: at least 1, and with topk they are all the same; use --select sample"),
        (r.level_cap == 0 or r.level_cap > 1, f"level_cap {r.level_cap}: 0 is none, level 1 has no location; use 2 or more"),
    ):
        if r.hard_attention and not fine:
            raise ValueError(problem)


def build(recipe, num_classes):
    """The model of a recipe, with the weights that it names."""
    model = TNet(recipe, num_classes)
    if recipe.weights == "default":
        if not recipe.backbone.startswith("efficientnet"):
            raise ValueError(f"weights default with backbone {recipe.backbone}: torchvision has weights for efficientnet_b0 to b4; use one of them or --weights none")
        if recipe.batch_norm[0] != 1e-5:
            raise ValueError(f"batch_norm {recipe.batch_norm} with weights default: torchvision's were trained with epsilon 1e-5; use --batch-norm 1e-5,0.01 or --weights none")
        url = torchvision.models.get_model_weights(recipe.backbone).DEFAULT.url
        state = common.read_state(common.fetch(url, url.rsplit("-", 1)[1].removesuffix(".pth")))
        common.load_state(model.backbone, state, heads=("classifier.",), source=url)
    elif recipe.weights != "none":
        common.load_state(model, common.read_state(recipe.weights), heads=("classifier.",), source=recipe.weights)
    return model


def param_groups(model, recipe):
    """Backbone and new modules, each with and without weight decay: there is none on BatchNorm, nor on the backbone when decay_backbone is off."""
    norm = {id(p) for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) for p in layer.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            backbone = name.startswith("backbone.")
            decays = id(p) not in norm and (recipe.decay_backbone or not backbone)
            groups.setdefault((recipe.backbone_lr if backbone else 1.0, recipe.weight_decay if decays else 0.0), []).append(p)
    return [{"params": params, "lr_scale": lr_scale, "weight_decay": decay} for (lr_scale, decay), params in groups.items()]
