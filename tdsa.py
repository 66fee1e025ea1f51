"""TDSA-Loss, and MC-Loss on which it builds: two losses that give every class its own channels and make them look at different places.

Chang, Zheng, Ma, Du, Liang, "Fine-Grained Visual Classification via Simultaneously Learning of Multi-regional Multi-grained
Features", arXiv:2102.00367. MC-Loss: Chang et al., "The Devil is in the Channels", IEEE TIP 2020.

The idea. A few channels of the last feature map belong to each class. MC-Loss has two terms: a random half of a class's channels must
be enough to tell the class (discriminality), and the channels of one class must peak at different places (diversity). TDSA-Loss puts
MC-Loss on a middle map as well, xi times as many channels, after each high-level channel has gated the xi middle ones below it: the
head's channel shows the beak's where to search. Everything happens in the loss: at test time the network is the plain backbone.

  Sec. III-A, groups F^1..F^S   class_groups, by_class       Eq. 6, 1    mc_loss: diversity, and both terms
  Eq. 3, the CWA mask           cwa_mask                     Eq. 7       top_down_attention
  Eq. 3, CCMP and GAP           class_scores: g              Eq. 8       Model.constrained: which maps get MC-Loss
  Eq. 4, discriminality         mc_loss                      Eq. 2, 9    Model.forward: the total loss
  Eq. 5, h                      class_spread                 Figure 6    Model.figure

The paper writes xi for two things. Here `xi` is that of Sec. IV-D, middle channels per high-level channel; the number of channels of
one class in the map at hand, the xi of Eqs. 3 and 5, is `channels`: 3 at the high level, 3 * xi at the middle one.

Where the paper and the authors' code differ (the default is the code)
- Diversity: Eqs. 1 and 6 subtract lambda * mean h. The code adds beta * (1 - mean h / channels), beta = 15 = mu * lambda. Same sign, but
  dividing by the channels weakens it 3 times at the high level and 3 * xi times at the middle one. --diversity code|paper
- Eq. 6 sums over i = 1..N, the number of images, and divides by S: the mean over classes and images is meant.
- The mask of Eq. 3: the code draws one a batch and map, for all images. --mask batch|sample
- Eq. 7 for C^h "higher than" C^l: it is lower by xi, and each high-level channel is repeated xi times.
- The code knows 3, 6 and 9 channels a class, one image size and CUB; the paper has xi up to 5 and four datasets.
- lambda = 10 and mu = 1.5 are the paper's; a tuner could overwrite the code's arguments. The released MC-Loss has beta = 20.
- Test accuracy: the authors keep the best of 300 epochs on the test set and leave the last incomplete test batch out (5792 of 5794
  images of CUB). We score every image and report the last epoch.

Where this differs from the paper (what it leaves open; our choice)
- ResNet18: which stage, width and stride are unpublished. Section V says the fourth and the fifth block. --layout A: strides as usual
  (middle 14, high 7); B: layer4 without stride, the MC-Loss ResNet18; C: layer3 without stride, VGG16's 28 and 14.
- Cross-entropy has the backbone's own widths, 512 and 512 or 256 and 512, and MC-Loss widens the last map only: --aligned none|high.
  (The released MC-Loss VGG16 has 600 channels at conv4_3 too, without a loss on them: --loss mc --xi 1.) The default, both, makes the
  three losses differ in nothing but the loss.
- Ragged groups for a pretrained backbone, whose channels are no multiple of the classes: the first classes get one channel less.
- The head pools to the grid that the recipe's image size gives, so any other size goes through; at 224 it is the code's.
- Tables V and VII (VI and VIII) disagree with each other for the same setting by 2.3 (0.4) points: different runs.
- `where` of plain cross-entropy, none of whose channels belongs to a class, is the peak of its class activation map (Grad-CAM).
- The nine competitor losses of Tables II and III have no published settings and are not part of this file.

  python train.py --method tdsa                                            toy birds, a minute or two on a CPU
  python train.py --method tdsa --loss mc                                  MC-Loss; --loss ce is cross-entropy alone
  python train.py --method tdsa --data cub --root DIR                      Table II; --backbone resnet18: Table III
  python train.py --method tdsa --data folder --root DIR --loss mc --aligned none --weights default --normalize imagenet --lr 0.01
  python train.py table --method tdsa --table 4 --data toy --seeds 0,1,2
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet18_Weights, VGG16_BN_Weights
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

import common
from common import Table, opt

# ------------------------------------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """The paper's switches."""

    backbone: str = opt("vgg16", "vgg16 (with batch norm), resnet18, or toy: a ResNet of four blocks (Sec. IV-B; toy: our choice)", ("vgg16", "resnet18", "toy"))
    loss: str = opt("tdsa", "ce: cross-entropy; mc: and MC-Loss on the high-level map; tdsa: and on the middle map (Table IV)", ("ce", "mc", "tdsa"))
    attention: bool = opt(True, "loss=tdsa: gate the middle map by the high-level one (Eq. 7); off: Table IV's 'w/o attention'")
    channels: int = opt(3, "high-level channels a class (Sec. IV-B)")
    xi: int = opt(3, "middle channels per high-level channel (Sec. IV-D, Tables V and VI)")
    alpha: float = opt(1.5, "weight of the discriminality of each map: mu (Sec. IV-B)")
    beta: float = opt(15.0, "weight of the diversity of each map: mu * lambda (Sec. IV-B); 0: without it")
    diversity: str = opt("code", "code: 1 - mean h / channels (authors' code); paper: -mean h (Eqs. 1 and 6)", ("code", "paper"))
    mask: str = opt("batch", "the channel mask of Eq. 3 is drawn once a batch (authors' code) or for each image", ("batch", "sample"))
    upsample: str = opt("nearest", "how the high-level map gets the middle map's size (Tables VII and VIII; default: authors' code)", ("nearest", "bilinear", "bicubic"))
    aligned: str = opt("both", "maps whose width is made to fit the classes: both; high: the last one; none: the backbone's own widths", ("both", "high", "none"))
    layout: str = opt("A", "resnet18, toy: strides of the last two stages, A: 2,2  B: 2,1  C: 1,2 (our choice)", ("A", "B", "C"))
    figure_maps: str = opt("raw", "Figure 6 shows the middle maps raw, or attended as in Eq. 7 (our choice)", ("raw", "attended"))


# Sec. IV-B; batch size, padded crop, mirror and normalisation are the authors' code, which lets epochs 150 to 224 (counted from 1) run at 0.01
PAPER = Recipe(
    image_size=(224, 224), pad=4, normalize="half", batch_size=32, epochs=300, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4,
    schedule="steps", milestones=(149 / 300, 224 / 300), amp="off",
)
RECIPES = {
    "cub": PAPER,  # xi: the best of Table V
    "aircraft": replace(PAPER, xi=2),
    "cars": replace(PAPER, xi=2),
    "flowers": PAPER,
    "folder": PAPER,
    "toy": replace(  # shifted by a crop: with the black border of padding MC-Loss stays at chance in this budget
        PAPER, backbone="toy", xi=2, image_size=(96, 96), resize=(104, 104), pad=0, batch_size=16, epochs=60, lr=0.05, schedule="onecycle", milestones=(), toy_preset="birds",
    ),
}

# ------------------------------------------------------------------------------------------------ tables

CE, MC = {"loss": "ce", "aligned": "none"}, {"loss": "mc", "aligned": "high"}
R18 = {"backbone": "resnet18"}


def by_dataset(number, title, rows):
    """Rows of (name, overrides, values on CUB, Aircraft, Cars, Flowers) -> {"4": Table on CUB, "4-aircraft": ..., ...}."""
    columns = ("cub", "aircraft", "cars", "flowers")
    return {
        number + ("" if data == "cub" else f"-{data}"): Table(f"Table {title}", data, "top1", tuple((name, change, values[i]) for name, change, *values in rows))
        for i, data in enumerate(columns)
    }


TABLES = {
    "toy": Table("losses on the toy birds", "toy", "top1", (
        ("cross-entropy", CE, None),
        ("MC-Loss", MC, None),
        ("MC-Loss on both maps, without attention", {"attention": False}, None),
        ("TDSA-Loss", {}, None),
        ("MC-Loss without its diversity term", MC | {"beta": 0.0}, None),
    )),
    "baseline": Table("TDSA-Loss, MC-Loss and plain cross-entropy", "cub", "top1", (("cross-entropy", CE, 28.53), ("MC-Loss", MC, 65.98), ("TDSA-Loss", {}, 72.77))),
    **by_dataset("2", "II: losses, VGG16", (
        ("CE Loss", CE, 28.53, 82.90, 76.59, 40.90),
        ("MC-Loss", MC, 65.98, 89.20, 90.85, 83.23),
        ("TDSA-Loss", {}, 72.77, 89.57, 92.29, 88.74),
    )),
    **by_dataset("3", "III: losses, ResNet18", (
        ("CE Loss", R18 | CE, 45.70, 79.90, 79.12, 65.75),
        ("MC-Loss", R18 | MC, 59.41, 85.57, 87.47, 79.54),
        ("TDSA-Loss", R18, 69.24, 86.18, 90.38, 85.34),
    )),
    **by_dataset("4", "IV: modules, VGG16", (
        ("CE Loss", CE, 28.53, 82.90, 76.59, 40.90),
        ("MC-Loss", MC, 65.98, 89.20, 90.85, 83.23),
        ("TDSA-Loss without attention", {"attention": False}, 69.95, 88.89, 90.61, 85.81),
        ("TDSA-Loss", {}, 72.77, 89.57, 92.29, 88.74),
    )),
    **by_dataset("5", "V: middle channels, VGG16", (
        ("xi = 1", {"xi": 1}, 71.06, 88.82, 91.68, 87.14),
        ("xi = 2", {"xi": 2}, 72.12, 89.57, 92.29, 87.81),
        ("xi = 3", {"xi": 3}, 72.77, 89.21, 92.08, 88.74),
        ("xi = 4", {"xi": 4}, 72.76, 89.00, 91.37, 88.26),
        ("xi = 5", {"xi": 5}, 72.58, 88.76, 91.94, 87.60),
    )),
    **by_dataset("6", "VI: middle channels, ResNet18", (
        ("xi = 1", R18 | {"xi": 1}, 65.25, 84.65, 88.37, 82.86),
        ("xi = 2", R18 | {"xi": 2}, 68.72, 86.18, 90.38, 84.34),
        ("xi = 3", R18 | {"xi": 3}, 69.24, 86.09, 89.70, 85.34),
        ("xi = 4", R18 | {"xi": 4}, 69.12, 85.55, 89.08, 85.32),
        ("xi = 5", R18 | {"xi": 5}, 68.72, 85.87, 89.36, 83.78),
    )),
    "7": Table("Table VII: upsampling, VGG16, xi = 1", "cub", "top1", (
        ("nearest", {"xi": 1, "upsample": "nearest"}, 73.33),
        ("bicubic", {"xi": 1, "upsample": "bicubic"}, 72.82),
        ("bilinear", {"xi": 1, "upsample": "bilinear"}, 73.03),
    )),
    "8": Table("Table VIII: upsampling, ResNet18, xi = 1", "cub", "top1", (
        ("nearest", R18 | {"xi": 1, "upsample": "nearest"}, 65.66),
        ("bicubic", R18 | {"xi": 1, "upsample": "bicubic"}, 65.50),
        ("bilinear", R18 | {"xi": 1, "upsample": "bilinear"}, 65.33),
    )),
}

# ------------------------------------------------------------------------------------------------ backbones: images -> middle map, high-level map


class VGG16(nn.Module):
    """VGG16 with batch norm: images (B, 3, H, W) -> conv4_3 (B, mid, H/8, W/8) before its pooling, and conv5_3 (B, high, H/16, W/16), both after ReLU."""

    own = (512, 512)

    def __init__(self, mid, high, layout):
        super().__init__()
        self.features = make_layers([64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, mid, "M", 512, 512, high], batch_norm=True)

    def forward(self, images):
        mid = self.features[:33](images)  # ten times convolution, batch norm, ReLU, and three poolings
        return mid, self.features[33:](mid)  # the next begins with the fourth pooling


class ResNet(nn.Module):
    """ResNet: images -> output of its third stage (mid channels) and of its fourth (high channels), under torchvision's parameter names."""

    def __init__(self, widths, blocks, stem, strides):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], stem, stride=2, padding=stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == 7 else nn.Identity()
        width = widths[0]
        for i, (out, stride) in enumerate(zip(widths, strides), start=1):
            skip = None
            if stride != 1 or out != width:
                skip = nn.Sequential(nn.Conv2d(width, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
            setattr(self, f"layer{i}", nn.Sequential(BasicBlock(width, out, stride, skip), *(BasicBlock(out, out) for _ in range(blocks - 1))))
            width = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        mid = self.layer3(self.layer2(self.layer1(x)))
        return mid, self.layer4(mid)


STRIDES = {"A": (1, 2, 2, 2), "B": (1, 2, 2, 1), "C": (1, 2, 1, 2)}


class ResNet18(ResNet):
    """ResNet18 whose last two stages have the widths asked for; layout A: mid (B, mid, H/16, W/16), high (B, high, H/32, W/32)."""

    own = (256, 512)

    def __init__(self, mid, high, layout):
        super().__init__((64, 128, mid, high), blocks=2, stem=7, strides=STRIDES[layout])


class ToyResNet(ResNet):
    """A ResNet of one block a stage for small pictures; layout A: mid (B, mid, H/8, W/8), high (B, high, H/16, W/16)."""

    own = (96, 48)

    def __init__(self, mid, high, layout):
        super().__init__((16, 32, mid, high), blocks=1, stem=3, strides=STRIDES[layout])


BACKBONES = {"vgg16": VGG16, "resnet18": ResNet18, "toy": ToyResNet}


def classifier(backbone, high, num_classes, image_size):
    """The classifier on the high-level map: (B, high, h, w) -> logits (B, K)."""
    if backbone == "toy":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(high, num_classes))
    grid = tuple(max(1, side // 32) for side in image_size) if backbone == "vgg16" else (1, 1)  # VGG16: a 2 x 2 max pooling
    inputs = high * grid[0] * grid[1]
    return nn.Sequential(
        nn.AdaptiveMaxPool2d(grid), nn.Flatten(),
        nn.BatchNorm1d(inputs), nn.Linear(inputs, 512), nn.BatchNorm1d(512), nn.ELU(), nn.Linear(512, num_classes),
    )


# ------------------------------------------------------------------------------------------------ MC-Loss


def class_groups(width, classes):
    """Deal `width` channels to the classes in contiguous runs: ((classes, channels each), ...), one entry, or two when it does not divide."""
    each, more = divmod(width, classes)
    if each == 0:
        raise ValueError(f"{width} channels do not fit {classes} classes: each needs one at least; use --aligned both, or a wider backbone")
    return ((classes - more, each), (more, each + 1)) if more else ((classes, each),)


def by_class(features, channels):
    """F = [F^1, ..., F^S] (Sec. III-A): (B, C, H, W) -> views (B, K_i, c_i, H*W), one for each size of group.

    channels: of one class, an int; or what class_groups returns. Raises ValueError when they do not make up C.
    """
    B, C = features.shape[:2]
    groups = ((C // channels, channels),) if isinstance(channels, int) else channels
    if C == 0 or sum(n * c for n, c in groups) != C:
        raise ValueError(f"a map of {C} channels cannot be split into classes of {channels}; give it classes * channels of them, or class_groups({C}, classes)")
    parts = features.split([n * c for n, c in groups], dim=1)
    return [part.reshape(B, n, c, -1) for part, (n, c) in zip(parts, groups)]


def cwa_mask(classes, channels, generator=None):
    """The 0-1 mask of channel-wise attention (Eq. 3): (classes * channels,), for each class ceil(channels / 2) ones at random places."""
    if classes < 1 or channels < 1:
        raise ValueError(f"a mask for {classes} classes of {channels} channels: both must be 1 at least")
    order = torch.empty(classes, channels).uniform_(generator=generator).argsort(1)  # a random permutation for each class
    return (order < (channels + 1) // 2).float().flatten()


def class_scores(features, channels, mask=None):
    """g (Eq. 3): mean over places of the largest of a class's channels; (B, C, H, W) -> (B, K) in fp32.

    mask (C,) or (B, C) is the channel-wise attention: a channel switched off counts as 0, not as absent.
    """
    if mask is not None:
        if mask.shape[-1] != features.shape[1]:
            raise ValueError(f"a mask of {mask.shape[-1]} channels for a map of {features.shape[1]}; cwa_mask(classes, channels) makes one")
        features = features * mask.to(features).view(-1, features.shape[1], 1, 1)  # CWA
    # CCMP, then GAP. max, not amax: at a tie, frequent after ReLU and mask, one channel gets the whole gradient
    return torch.cat([part.max(2).values.mean(2, dtype=torch.float32) for part in by_class(features, channels)], 1)


def class_spread(features, channels):
    """h (Eq. 5): over how many places a class's channels spread; (B, C, H, W) -> (B, K) in fp32, 1 (all look at one) to c (each at its own)."""
    places = [F.softmax(part, dim=-1, dtype=torch.float32) for part in by_class(features, channels)]  # each channel sums to 1 over H*W
    return torch.cat([part.max(2).values.sum(2) for part in places], 1)


def mc_loss(features, targets, channels, mask=None, form="code"):
    """MC-Loss of one map (B, C, H, W) for targets (B,): (discriminality (Eq. 4), diversity (Eq. 6)), two scalars to minimise.

    channels: of one class, or what class_groups returns. Diversity, form "code": 1 - mean h / c, in [0, 1 - 1/c]; "paper": -mean h. It ignores the mask.
    """
    g, h = class_scores(features, channels, mask), class_spread(features, channels)
    check_labels(targets, g.shape[1])
    discriminality = F.cross_entropy(g, targets)
    if form == "paper":
        return discriminality, -h.mean()
    if isinstance(channels, int):
        return discriminality, 1 - h.mean() / channels
    sizes = torch.cat([h.new_full((n,), c) for n, c in channels])
    return discriminality, 1 - (h / sizes).mean()


def check_labels(targets, classes):
    """Raise ValueError for labels outside 0..classes-1; where looking would stall an accelerator or break a graph, cross_entropy's own check is left to speak."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(f"labels from {int(targets.min())} to {int(targets.max())} for {classes} classes; allowed: 0 to {classes - 1}; check the dataset's labels")


# ------------------------------------------------------------------------------------------------ top-down spatial attention


def top_down_attention(mid, high, xi, mode):
    """F^l' = F^l * sigmoid(upsample(F^h)) (Eq. 7): (B, xi * C, H, W), (B, C, h, w) -> (B, xi * C, H, W).

    High-level channel j gates the middle channels xi * j to xi * j + xi - 1, which are of the same class. No gradient is stopped.
    """
    if mid.shape[1] != xi * high.shape[1]:
        raise ValueError(f"{mid.shape[1]} middle channels for {high.shape[1]} high-level ones: there must be xi = {xi} times as many")
    up = F.interpolate(high, size=mid.shape[-2:], mode=mode, align_corners=None if mode == "nearest" else False)
    return (mid.unflatten(1, (-1, xi)) * up.sigmoid().unsqueeze(2)).flatten(1, 2)  # (B, C, xi, H, W), gates broadcast over xi


# ------------------------------------------------------------------------------------------------ the model


class Model(nn.Module):
    """A backbone and its classifier, with MC-Loss or TDSA-Loss in training."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        backbone = BACKBONES[recipe.backbone]
        mid, high = backbone.own
        if recipe.aligned != "none":
            high = num_classes * recipe.channels
        if recipe.aligned == "both":
            mid = high * recipe.xi
        self.trunk = backbone(mid, high, recipe.layout)
        self.head = classifier(recipe.backbone, high, num_classes, recipe.image_size)
        if recipe.loss != "ce":
            self.high_groups = class_groups(high, num_classes)
            self.register_buffer("high_of_class", channels_of_class(self.high_groups), persistent=False)  # (K, c)
        if recipe.loss == "tdsa":
            self.mid_groups = class_groups(mid, num_classes)
            self.register_buffer("mid_of_class", channels_of_class(self.mid_groups), persistent=False)  # (K, xi * c)

    def forward(self, images, targets=None):
        """images (B, 3, H, W) -> logits (B, K); with targets (B,) -> (loss (Eqs. 2 and 9), its terms)."""
        if self.training and len(images) < 2:
            raise ValueError(f"a training batch of {len(images)}: batch norm needs 2 images a process at least; raise --batch-size")
        recipe = self.recipe
        mid, high = self.trunk(images)
        logits = self.head(high)  # the classifier sees the high-level map only, the middle map feeds it as it is
        if targets is None:
            return logits
        check_labels(targets, self.num_classes)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        terms = {"ce": loss}
        for name, (maps, groups) in self.constrained(mid, high).items():
            if recipe.beta and maps.shape[-2:].numel() == 1:
                raise ValueError(f"the {name} map is 1 x 1, which leaves its channels no places to differ in; use larger images, or --beta 0")
            dis, div = mc_loss(maps, targets, groups, self.draw_mask(groups, len(images)), recipe.diversity)
            loss = loss + recipe.alpha * dis + recipe.beta * div
            terms |= {f"dis_{name}": dis, f"div_{name}": div}
        terms["top1"] = (logits.argmax(1) == targets).float().mean()
        return loss, {name: term.detach() for name, term in terms.items()}

    def constrained(self, mid, high):
        """The maps that get MC-Loss (Eq. 8), middle first as in the authors' code: name -> (map, its groups)."""
        recipe, maps = self.recipe, {}
        if recipe.loss == "tdsa":
            maps["mid"] = top_down_attention(mid, high, recipe.xi, recipe.upsample) if recipe.attention else mid, self.mid_groups
        if recipe.loss != "ce":
            maps["high"] = high, self.high_groups
        return maps

    def draw_mask(self, groups, images):
        """A channel mask (C,) for the batch, or (B, C) with one for each image."""
        draws = images if self.recipe.mask == "sample" else 1
        return torch.cat([cwa_mask(draws * n, c).view(draws, n * c) for n, c in groups], 1).squeeze(0)

    @torch.no_grad()
    def heads(self, images):
        """Logits (B, K) of the classifier, and the class scores g (Eq. 3, without mask) of each map that has MC-Loss."""
        mid, high = self.trunk(images)
        return {"classifier": self.head(high)} | {name: class_scores(maps, groups) for name, (maps, groups) in self.constrained(mid, high).items()}

    @torch.no_grad()
    def where(self, images):
        """Peaks of the predicted class's high-level channels, strongest first: boxes (B, n, 4) of their cells, xyxy pixels, and heights (B, n)."""
        maps = self.evidence(self.trunk(images)[1])  # (B, n, h, w)
        (H, W), (h, w) = images.shape[-2:], maps.shape[-2:]
        scores, cell = maps.flatten(2).max(2)
        scores, order = scores.float().sort(1, descending=True)
        cell = cell.gather(1, order)
        return cell_boxes(cell, h, w, H, W), scores

    def evidence(self, high):
        """Maps (B, n, h, w) that speak for the predicted class: its channels; with loss=ce, where no channel has a class, the class activation map, n = 1."""
        if self.recipe.loss != "ce":
            return take(high, self.high_of_class[self.head(high).argmax(1)])
        with torch.inference_mode(False), torch.enable_grad():  # Grad-CAM, which for pooling and one linear layer is CAM
            high = high.clone().requires_grad_()
            gradient, = torch.autograd.grad(self.head(high).max(1).values.sum(), high)
        return (gradient.mean((2, 3), keepdim=True) * high.detach()).sum(1, keepdim=True)

    @torch.no_grad()
    def figure(self, images):
        """Figure 6: a row for each high-level channel of the predicted class: its peak, its map (red), the middle maps that it supervises (green)."""
        mid, high = self.trunk(images)
        classes, rows = self.head(high).argmax(1), self.evidence(high)
        H, W = images.shape[-2:]
        cells = cell_boxes(rows.flatten(2).argmax(2), *rows.shape[-2:], H, W)  # (B, n, 4)
        if self.recipe.loss == "tdsa":
            maps = self.constrained(mid, high)["mid"][0] if self.recipe.figure_maps == "attended" else mid
            below = take(maps, self.mid_of_class[classes])  # (B, n * xi, H', W')
        pages = []
        for b, image in enumerate(images):
            image, lines = common.to_pil(image, self.recipe.normalize), []
            image = image.resize((round(224 * W / H), 224))  # so that frames and captions keep their size
            for i, top in enumerate(rows[b]):
                name = "class activation map" if self.recipe.loss == "ce" else f"high {i + 1}, peak {top.max():.1f}"
                shown = [common.draw_boxes(image, cells[b, i : i + 1].cpu() * (224 / H)), frame(common.heat(image, top), "red")]
                captions = [f"predicted: class {classes[b]}", name]
                for j in range(i * self.recipe.xi, (i + 1) * self.recipe.xi) if self.recipe.loss == "tdsa" else ():
                    shown.append(frame(common.heat(image, below[b, j]), "lime"))
                    captions.append(f"middle {j + 1}, peak {below[b, j].max():.1f}")
                lines.append(common.panels(shown, captions))
            pages.append(common.stack(lines))
        return pages


def channels_of_class(groups):
    """Channel numbers of each class, (K, c); with ragged groups a class that has one channel less names its last one twice."""
    rows, start, most = [], 0, max(c for _, c in groups)
    for n, c in groups:
        for _ in range(n):
            rows.append([start + min(j, c - 1) for j in range(most)])
            start += c
    return torch.tensor(rows)


def take(maps, channels):
    """maps (B, C, h, w), channel numbers (B, n) -> (B, n, h, w)."""
    return maps[torch.arange(len(maps), device=maps.device)[:, None], channels]


def cell_boxes(cell, h, w, H, W):
    """Numbers (B, n) of cells of an h x w map -> boxes (B, n, 4), xyxy in the pixels of an H x W image."""
    x, y = cell % w, cell // w
    return torch.stack((x * W / w, y * H / h, (x + 1) * W / w, (y + 1) * H / h), -1)


def frame(image, colour):
    """A PIL image with a coloured border."""
    return common.draw_boxes(image, [[0, 0, image.width, image.height]], colours=(colour,), width=4)


# ------------------------------------------------------------------------------------------------ building


def build(recipe, num_classes):
    """The model for `num_classes` classes, its weights as recipe.weights says.

    Raises ValueError for settings that do not go together.
    """
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes: a classifier needs 2 at least; check the dataset's folders")
    if recipe.channels < 1 or recipe.xi < 1:
        raise ValueError(f"--channels {recipe.channels} --xi {recipe.xi}: both must be 1 at least; the paper has 3, and 1 to 5")
    if recipe.task != "classify":
        raise ValueError(f"--task {recipe.task}: TDSA-Loss is for classification; use --method dcal for re-identification")
    if recipe.drop_path:
        raise ValueError(f"--drop-path {recipe.drop_path}: these backbones have none; leave it at 0")
    if recipe.loss == "tdsa" and recipe.aligned != "both":
        raise ValueError(f"--loss tdsa --aligned {recipe.aligned}: both maps need channels for each class; use --aligned both, or --loss mc")
    if recipe.weights == "default" and (recipe.backbone == "toy" or recipe.aligned != "none"):
        raise ValueError(f"--weights default --backbone {recipe.backbone} --aligned {recipe.aligned}: published weights are for vgg16 and resnet18 with their own widths; use --aligned none with --loss mc or ce, or --weights none")
    model = Model(recipe, num_classes)
    if recipe.weights != "none":
        load(model, recipe)
    return model


def load(model, recipe):
    """Load recipe.weights: torchvision's published ones, a file with their names, or a run of ours; the classifier may differ in shape."""
    source = recipe.weights
    if source == "default":
        url = {"vgg16": VGG16_BN_Weights, "resnet18": ResNet18_Weights}[recipe.backbone].IMAGENET1K_V1.url
        source = common.fetch(url, url.rsplit("-", 1)[1].removesuffix(".pth"))  # the name ends in the first digits of the sha256
    state = common.read_state(source)
    if not any(key.startswith("trunk.") for key in state):  # torchvision's names
        state = {f"trunk.{key}": value for key, value in state.items() if not key.startswith(("classifier.", "fc."))}
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}  # older files have none
        state = counters | state
    common.load_state(model, state, heads=("head.",), source=f"--weights {recipe.weights}")


def param_groups(model, recipe):
    """One group: weight decay on everything, batch norm and biases included (authors' code)."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": recipe.weight_decay}]
