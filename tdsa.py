"""TDSA-Loss, from "Fine-Grained Visual Classification via Simultaneously Learning of Multi-regional
Multi-grained Features", Chang, Zheng, Ma, Du and Liang, arXiv:2102.00367; and MC-Loss, on which it builds,
from "The Devil is in the Channels", Chang et al., IEEE TIP 2020.

The idea: a few channels of the last feature map belong to each class. MC-Loss has two terms: a random half
of a class's channels must be enough to tell the class (discriminality), and the channels of one class must
peak at different places (diversity). TDSA-Loss puts MC-Loss on a middle map as well, which has xi times as
many channels, after each high-level channel has gated the xi middle ones below it: the head's channel shows
the beak's where to search. Everything happens in the loss: at test time the network is a plain backbone, its
last maps as wide as the classes need.

Where to find it:
    Sec. III-A (groups F^1 ... F^S)       class_groups, by_class
    Eq. 3 (the mask M of CWA)             cwa_mask
    Eq. 3 (g: CWA, CCMP, GAP)             class_scores
    Eq. 5 (h)                             class_spread
    Eq. 4, 6 (L_dis, L_div)               mc_loss
    Eq. 7 (top-down spatial attention)    top_down_attention
    Eq. 8 (which maps get MC-Loss)        Model.constrained
    Eq. 1, 2, 9 (the total loss)          Model.forward
    Figure 6                              figure_6

The symbols are the paper's: F^l is `mid`, F^h is `high`, and S, the number of classes, is K. It writes xi
for two things. Here `xi` is that of Sec. IV-D, middle channels per high-level channel; the channels of one
class in the map at hand, theta in Sec. III-A and xi in Eqs. 3 and 5, are c: 3 at the high level, 3 xi at the
middle one.

Where the paper and the authors' code differ (the default is the code):
  - L_div. Paper: mean h, in Eqs. 1 and 6. Code: mean h / c, which weakens it 3 times at the high level and
    3 xi times at the middle one. We: diversity="code", as mean h / c - 1, so that the total loss is the
    code's to the last constant; diversity="paper".
  - Eq. 6 sums to N, the number of images, and divides by S: the mean over classes and images is meant.
  - The mask of Eq. 3. Code: one for all images of a batch, another for each map. We: mask="batch"; "sample"
    draws one for each image.
  - Eq. 7 for C^h "higher than" C^l: C^l is xi times C^h, and each high-level channel is repeated xi times.
  - The classifier of F^h (C in Algorithm 1) is the code's: max pooling, BatchNorm, 512 units, BatchNorm, ELU,
    linear; the paper does not describe its own.
  - The code knows 3, 6 and 9 channels a class, one size and CUB; the paper xi up to 5 and four datasets.
  - lambda = 10 and mu = 1.5 are the paper's, the code's 15 is their product; its tuner could overwrite
    both. The released MC-Loss has 20 for 15.
  - Test accuracy. Code: the best of 300 epochs on the test set, without the last incomplete batch (5792 of
    CUB's 5794 images). We: the last epoch, every image.

Where this differs from the paper (what it leaves open; our choice):
  - ResNet18: which stages, widths and strides are unpublished; Section V names the fourth and the fifth block
    of VGG16. layout="A" has layer3 and layer4 with the usual strides (middle 14, high 7), as all rows of
    Table III here; "B": layer4 without stride, as the MC-Loss ResNet18; "C": layer3 without stride, VGG16's
    28 and 14.
  - Cross-entropy has the backbone's own widths, 512 and 512 or 256 and 512, and MC-Loss widens the last map
    only: aligned="none", "high". (The released MC-Loss VGG16 has 600 channels at conv4_3 too, without a loss
    on them: loss="mc", xi=1.) The default, "both", makes the three losses differ in nothing but the loss.
  - A published backbone's channels are no multiple of the classes: the first classes get one channel less
    (as the authors advise for MC-Loss).
  - All is trained from scratch, as in the paper. With --weights default, layers whose width follows the
    number of classes begin anew, like the classifier.
  - Figure 6 shows the channels of the predicted class, and the middle maps before they are gated.
  - The head pools to the grid that the recipe's image size gives; at 224 it is the code's.
  - Tables V and VII (VI and VIII) disagree for the same setting by 2.3 (0.4) points: different runs.
  - `where` of plain cross-entropy, none of whose channels belongs to a class, is the peak of its class
    activation map (Grad-CAM).
  - The eight other losses of Tables II and III have no published settings and are not here.
Several processes: BatchNorm's statistics and the masks are each process's own, so that two processes equal
one only in evaluation.

How to run it:
    python train.py --method tdsa                                 toy birds, a minute or two on a CPU
    python train.py --method tdsa --loss mc                       MC-Loss; --loss ce is cross-entropy alone
    python train.py --method tdsa --data cub --root DIR           Table II; --backbone resnet18: Table III
    python train.py --method tdsa --data folder --root DIR --loss mc --aligned none --weights default \
        --normalize imagenet --lr 0.01 --mu 5e-4                  own photos, from ImageNet's weights, which
                                                                  a large mu would destroy (MC-Loss's author)
    python train.py table --method tdsa --table 4 --data toy --seeds 0,1,2
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

import common
from common import Table, opt

# -------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """The paper's switches."""

    drop_path: float = common.on_training(0.0, "these backbones have no stochastic depth", most=0)
    backbone: str = opt("vgg16", "with batch norm; toy: ours, small", ("vgg16", "resnet18", "toy"))
    loss: str = opt("tdsa", "mc: MC-Loss; ce: cross-entropy alone (Table IV)", ("ce", "mc", "tdsa"))
    attention: bool = opt(True, "loss=tdsa: the high-level map gates the middle one (Eq. 7)")
    channels: int = opt(3, "high-level channels a class (Sec. IV-B)", least=1)
    xi: int = opt(3, "middle channels per high-level channel (Sec. IV-D)", least=1)
    mu: float = opt(1.5, "weight of MC-Loss on each map (Eqs. 2 and 9, Sec. IV-B)")
    lambda_div: float = opt(10.0, "lambda, weight of L_div beside L_dis (Eq. 1, Sec. IV-B)")
    diversity: str = opt("code", "L_div: mean h / c in the code, h in the paper", ("code", "paper"))
    mask: str = opt("batch", "Eq. 3's mask is drawn a batch (authors' code) or a sample", ("batch", "sample"))
    upsample: str = opt("nearest", "of F^h in Eq. 7 (Table VII; authors' code)", common.FILTERS[:3])
    aligned: str = opt("both", "maps as wide as the classes need", ("both", "high", "none"))
    layout: str = opt("A", "strides of the last stages: 2,2  2,1  or 1,2 (our choice)", ("A", "B", "C"))

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "tdsa" and self.aligned != "both":
            raise ValueError(f"--loss tdsa --aligned {self.aligned}: use --aligned both, or --loss mc")
        if self.backbone == "toy" and self.weights == "default":
            raise ValueError("--weights default: only for vgg16 and resnet18; use none or a file")


# Sec. IV-B; batch size, momentum, padded crop, mirror and normalisation are the authors' code, which lets
# epochs 150 to 224 (counted from 1) run at 0.01.
PAPER = Recipe(
    image_size=(224, 224), pad=4, normalize="half", batch_size=32, epochs=300, optimizer="sgd", lr=0.1,
    momentum=0.9, weight_decay=5e-4, schedule="steps", milestones=(149 / 300, 224 / 300), amp="off",
)
RECIPES = {
    "cub": PAPER,  # xi: the best of Table V
    "aircraft": replace(PAPER, xi=2),
    "cars": replace(PAPER, xi=2),
    "flowers": PAPER,
    "folder": PAPER,
    # shifted by a crop: with the black border of padding MC-Loss stays at chance in this budget
    "toy": replace(
        PAPER, backbone="toy", xi=2, image_size=(96, 96), resize=(104, 104), pad=0, batch_size=16, epochs=60,
        lr=0.05, schedule="onecycle", toy_preset="birds",
    ),
}

# -------------------------------------------------------------------------------------- tables

CE, MC = {"loss": "ce", "aligned": "none"}, {"loss": "mc", "aligned": "high"}
R18 = {"backbone": "resnet18"}
TOP1 = dict.fromkeys(("cub", "aircraft", "cars", "flowers"), "top1")

TABLES = {
    "toy": Table("losses on the toy birds", "toy", "top1", (
        ("cross-entropy", CE, None),
        ("MC-Loss", MC, None),
        ("MC-Loss on both maps, without attention", {"attention": False}, None),
        ("TDSA-Loss", {}, None),
        ("MC-Loss without its diversity term", MC | {"lambda_div": 0.0}, None),
    )),
    "baseline": Table("TDSA-Loss, MC-Loss and plain cross-entropy", "cub", "top1", (
        ("cross-entropy", CE, 28.53),
        ("MC-Loss", MC, 65.98),
        ("TDSA-Loss", {}, 72.77),
    )),
    **common.by_dataset("2", "Table II: losses, VGG16", TOP1, (
        ("CE Loss", CE, 28.53, 82.90, 76.59, 40.90),
        ("MC-Loss", MC, 65.98, 89.20, 90.85, 83.23),
        ("TDSA-Loss", {}, 72.77, 89.57, 92.29, 88.74),
    )),
    **common.by_dataset("3", "Table III: losses, ResNet18", TOP1, (
        ("CE Loss", R18 | CE, 45.70, 79.90, 79.12, 65.75),
        ("MC-Loss", R18 | MC, 59.41, 85.57, 87.47, 79.54),
        ("TDSA-Loss", R18, 69.24, 86.18, 90.38, 85.34),
    )),
    **common.by_dataset("4", "Table IV: modules, VGG16", TOP1, (
        ("CE Loss", CE, 28.53, 82.90, 76.59, 40.90),
        ("MC-Loss", MC, 65.98, 89.20, 90.85, 83.23),
        ("TDSA-Loss without attention", {"attention": False}, 69.95, 88.89, 90.61, 85.81),
        ("TDSA-Loss", {}, 72.77, 89.57, 92.29, 88.74),
    )),
    **common.by_dataset("5", "Table V: middle channels, VGG16", TOP1, (
        ("xi = 1", {"xi": 1}, 71.06, 88.82, 91.68, 87.14),
        ("xi = 2", {"xi": 2}, 72.12, 89.57, 92.29, 87.81),
        ("xi = 3", {"xi": 3}, 72.77, 89.21, 92.08, 88.74),
        ("xi = 4", {"xi": 4}, 72.76, 89.00, 91.37, 88.26),
        ("xi = 5", {"xi": 5}, 72.58, 88.76, 91.94, 87.60),
    )),
    **common.by_dataset("6", "Table VI: middle channels, ResNet18", TOP1, (
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

# -------------------------------------------------------------------------------------- MC-Loss


def class_groups(C, K):
    """C = K * c channels, c in a row for each of K classes: ((K, c),). Else the first classes get one less:

    512 channels for 200 classes are ((88, 2), (112, 3)). Raises ValueError when a class would get none.
    """
    c, more = divmod(C, K)
    if c == 0:
        raise ValueError(f"{C} channels do not fit {K} classes, each needs its own; use --aligned both")
    return ((K - more, c), (more, c + 1)) if more else ((K, c),)


def by_class(features, K):
    """F = [F^1, ..., F^S] (Sec. III-A): (B, K * c, H, W) -> [(B, K, c, H * W)], a view a size of group."""
    groups = class_groups(features.shape[1], K)
    parts = features.flatten(2).split([n * c for n, c in groups], 1)
    return [part.unflatten(1, group) for part, group in zip(parts, groups)]


def cwa_mask(C, K, draws=1):
    """Masks of channel-wise attention (Eq. 3): (draws, C) bool, ceil(c / 2) ones at random for each class."""
    masks = [
        (torch.rand(draws, n, c).argsort(2) < (c + 1) // 2).flatten(1)  # a random permutation for each class
        for n, c in class_groups(C, K)
    ]
    return torch.cat(masks, 1)


def class_scores(features, K, mask=None):
    """g (Eq. 3): the largest of a class's channels, averaged over places; (B, C, H, W) -> (B, K) in fp32.

    mask (1 or B, C), of `cwa_mask`: a channel switched off counts as 0, not as absent.
    """
    if mask is not None:
        features = features * mask.to(features)[:, :, None, None]  # CWA
    # CCMP, GAP. max, not amax: at a tie, frequent after ReLU and mask, one channel gets the whole gradient
    return torch.cat([part.max(2).values.mean(2, dtype=torch.float32) for part in by_class(features, K)], 1)


def class_spread(features, K, share=False):
    """h (Eq. 5): over how many places a class's channels spread; (B, C, H, W) -> (B, K) in fp32.

    From 1, all look at one place, to c, each at its own; `share`: h / c.
    """
    h = []
    for part in by_class(features, K):
        places = F.softmax(part, -1, dtype=torch.float32)  # each channel sums to 1 over H * W
        h.append(places.max(2).values.sum(2) / (part.shape[2] if share else 1))
    return torch.cat(h, 1)


def mc_loss(features, targets, K, mask=None, diversity="code"):
    """(L_dis (Eq. 4), L_div (Eq. 6)) of one map (B, C, H, W) with targets (B,), two scalars.

    MC-Loss is L_dis - lambda * L_div (Eq. 1). L_div ignores the mask and grows as channels part: "paper",
    mean h, from 1 to c; "code", mean h / c - 1, from 1 / c - 1 to 0. On a map of one place it is constant.
    """
    dis = F.cross_entropy(class_scores(features, K, mask), targets)
    if diversity == "paper":
        return dis, class_spread(features, K).mean()
    return dis, class_spread(features, K, share=True).mean() - 1


# -------------------------------------------------------------------------------------- TDSA-Loss


def top_down_attention(mid, high, mode="nearest"):
    """F^l' = F^l * sigmoid(upsample(F^h)) (Eq. 7): (B, xi * C, H, W), (B, C, h, w) -> (B, xi * C, H, W).

    High-level channel j gates the middle channels xi * j to xi * j + xi - 1, of its class. No gradient is
    stopped.
    """
    up = F.interpolate(high, mid.shape[2:], mode=mode)
    gated = mid.unflatten(1, (high.shape[1], -1)) * up.sigmoid()[:, :, None]  # (B, C, xi, H, W)
    return gated.flatten(1, 2)


class Model(nn.Module):
    """A backbone and its classifier, with MC-Loss or TDSA-Loss in training."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        mid, high = WIDTHS[recipe.backbone]
        if recipe.aligned != "none":
            high = num_classes * recipe.channels
        if recipe.aligned == "both":
            mid = high * recipe.xi
        self.trunk = make_trunk(recipe, mid, high)
        self.head = classifier(recipe, high, num_classes)
        if recipe.loss != "ce":
            self.register_buffer("high_of_class", channels_of_class(high, num_classes), persistent=False)

    def forward(self, images, targets=None):
        """Images (B, 3, H, W) -> logits (B, K); with targets (B,) -> loss (Eqs. 1, 2 and 9), its terms."""
        recipe, K = self.recipe, self.num_classes
        mid, high = self.trunk(images)
        logits = self.head(high)  # the classifier sees F^h alone; F^l' exists in the loss only
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        terms = {"ce": loss}
        for name, features in self.constrained(mid, high).items():
            mask = cwa_mask(features.shape[1], K, len(images) if recipe.mask == "sample" else 1)
            dis, div = mc_loss(features, targets, K, mask, recipe.diversity)
            loss = loss + recipe.mu * (dis - recipe.lambda_div * div)
            terms |= {f"dis_{name}": dis, f"div_{name}": div}
        terms["top1"] = (logits.argmax(1) == targets).float().mean()
        return loss, {name: term.detach() for name, term in terms.items()}

    def constrained(self, mid, high):
        """The maps that get MC-Loss (Eq. 8), by name; the middle one first, as in the authors' code."""
        if self.recipe.loss == "ce":
            return {}
        if self.recipe.loss == "mc":
            return {"high": high}
        if self.recipe.attention:
            mid = top_down_attention(mid, high, self.recipe.upsample)
        return {"mid": mid, "high": high}

    @torch.no_grad()
    def heads(self, images):
        """Logits (B, K) of the classifier, and g (Eq. 3, without mask) of each map that has MC-Loss."""
        mid, high = self.trunk(images)
        maps = self.constrained(mid, high).items()
        return {"classifier": self.head(high)} | {name: class_scores(f, self.num_classes) for name, f in maps}

    @torch.no_grad()
    def where(self, images):
        """Cells where the predicted class's high-level channels peak -> boxes (B, n, 4), heights (B, n)."""
        common.check_images(images, self.recipe.image_size)
        _, maps = self.evidence(self.trunk(images)[1])
        scores, cells = maps.flatten(2).max(2)
        scores, order = scores.float().sort(1, descending=True)
        return common.cells_to_boxes(cells.gather(1, order), maps.shape[2:], images.shape[2:]), scores

    def evidence(self, high):
        """F^h -> predicted class (B,), its channels (B, c, h, w); loss=ce: a class activation map, c = 1."""
        if self.recipe.loss != "ce":
            classes = self.head(high).argmax(1)
            return classes, common.take(high, self.high_of_class[classes])
        # Grad-CAM, which for average pooling and one linear layer is CAM
        with torch.inference_mode(False), torch.enable_grad():
            high = high.clone().requires_grad_()
            best, classes = self.head(high).max(1)
            (gradient,) = torch.autograd.grad(best.sum(), high)
        return classes, (gradient.mean((2, 3), keepdim=True) * high.detach()).sum(1, keepdim=True)

    @torch.no_grad()
    def figure(self, images):
        """Figure 6 of each image: list of PIL images."""
        mid, high = self.trunk(images)
        classes, tops = self.evidence(high)
        middles = tops[:, :, :0]  # none
        if self.recipe.loss == "tdsa":
            middles = common.take(mid.unflatten(1, (-1, self.recipe.xi)), self.high_of_class[classes])
        photos = [common.to_pil(image, self.recipe.normalize) for image in images]
        return list(map(figure_6, photos, classes, tops, middles))


def channels_of_class(C, K):
    """Numbers of the channels of each class, (K, c); one with a channel less names its last one twice."""
    runs = torch.arange(C).split([c for n, c in class_groups(C, K) for _ in range(n)])
    return torch.stack([torch.cat((run, run[-1:]))[: len(runs[-1])] for run in runs])


# -------------------------------------------------------------------------------------- Figure 6


def figure_6(image, predicted, high, mid):
    """A row for each channel of a class: its peak, its map (red), the middle maps that it gates (green).

    PIL image, class, high (c, h, w), mid (c, xi, H', W'), xi may be 0 -> PIL image.
    """
    image, rows = image.resize((round(224 * image.width / image.height), 224)), []
    cells = high.flatten(1).argmax(1, keepdim=True)
    peaks = common.cells_to_boxes(cells, high.shape[1:], image.size[::-1])  # (c, 1, 4)
    for i, (peak, top, below) in enumerate(zip(peaks, high, mid), 1):
        shown, captions = [common.draw_boxes(image, peak)], [f"predicted: class {predicted}"]
        for j, values in enumerate((top, *below)):
            name, colour = (f"middle {i}.{j}", "lime") if j else (f"high {i}", "red")
            shown.append(ImageOps.expand(common.heat(image, values), 4, colour))
            captions.append(f"{name}, peak {values.max():.1f}")
        rows.append(common.panels(shown, captions))
    return common.stack(rows)


# -------------------------------------------------------------------------------------- backbones


class VGG16(nn.Module):
    """VGG16 with batch norm: images -> conv4_3 (B, mid, H/8, W/8), conv5_3 (B, high, H/16, W/16)."""

    def __init__(self, mid, high):
        super().__init__()
        self.features = make_layers(  # True: with batch norm
            [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, mid, "M", 512, 512, high], True
        )

    def forward(self, images):
        mid = self.features[:33](images)  # ten times convolution, batch norm, ReLU, and three poolings
        return mid, self.features[33:](mid)  # the next begins with the fourth pooling


class ResNet(nn.Module):
    """ResNet of basic blocks: images -> outputs of its third stage (mid channels) and fourth (high).

    widths of the four stages, blocks in each, strides of the last two, stem: size of its kernel, 7 or 3.
    """

    def __init__(self, widths, blocks, strides, stem):
        super().__init__()
        width = widths[0]
        self.conv1 = nn.Conv2d(3, width, stem, 2, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == 7 else nn.Identity()
        for i, (out, stride) in enumerate(zip(widths, (1, 2, *strides)), 1):
            skip = None
            if stride != 1 or out != width:
                skip = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            rest = [BasicBlock(out, out) for _ in range(1, blocks)]
            setattr(self, f"layer{i}", nn.Sequential(BasicBlock(width, out, stride, skip), *rest))
            width = out
        for weight in self.parameters():
            if weight.ndim == 4:
                nn.init.kaiming_normal_(weight, mode="fan_out")  # for ReLU

    def forward(self, images):
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        mid = self.layer3(self.layer2(self.layer1(x)))
        return mid, self.layer4(mid)


WIDTHS = {"vgg16": (512, 512), "resnet18": (256, 512), "toy": (96, 48)}  # own: of the middle and the high map
STRIDES = {"A": (2, 2), "B": (2, 1), "C": (1, 2)}  # of the last two stages


def make_trunk(recipe, mid, high):
    """The backbone without its head, its two maps as wide as asked for: images -> F^l, F^h."""
    if recipe.backbone == "vgg16":
        return VGG16(mid, high)
    if recipe.backbone == "resnet18":
        return ResNet((64, 128, mid, high), 2, STRIDES[recipe.layout], 7)
    return ResNet((16, 32, mid, high), 1, STRIDES[recipe.layout], 3)


def classifier(recipe, high, num_classes):
    """The classifier on the high-level map: (B, high, h, w) -> logits (B, K)."""
    if recipe.backbone == "toy":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(high, num_classes))
    # VGG16: a 2 x 2 max pooling
    grid = [max(1, side // 32) if recipe.backbone == "vgg16" else 1 for side in recipe.image_size]
    inputs = high * grid[0] * grid[1]
    return nn.Sequential(
        nn.AdaptiveMaxPool2d(grid), nn.Flatten(),
        nn.BatchNorm1d(inputs), nn.Linear(inputs, 512), nn.BatchNorm1d(512), nn.ELU(),
        nn.Linear(512, num_classes),
    )


# -------------------------------------------------------------------------------------- building

PUBLISHED = {  # of torchvision, and how their sha256 begins
    "vgg16": ("https://download.pytorch.org/models/vgg16_bn-6c64b313.pth", "6c64b313"),
    "resnet18": ("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd"),
}
# may be missing: classifiers, ours and torchvision's, and shortcuts, which are where widths or strides differ
HEADS = (
    "head.", "trunk.classifier.", "trunk.fc.", "trunk.layer3.0.downsample.", "trunk.layer4.0.downsample.",
)
# layers whose width follows the classes, and those that read them: they begin anew where they do not fit
BY_CLASSES = ("trunk.features.3", "trunk.features.4", "trunk.layer3.", "trunk.layer4.")


def build(recipe, num_classes):
    """The model for `num_classes` classes; weights of torchvision, fetched or a file, or of a run of ours."""
    common.check_build(recipe, Recipe, num_classes)
    model, source = Model(recipe, num_classes), recipe.weights
    if source == "none":
        return model
    if source == "default":
        source = common.fetch(*PUBLISHED[recipe.backbone])
    own = model.state_dict()
    state = {k: v for k, v in own.items() if v.ndim == 0}  # counters, which older files lack
    for key, value in common.read_state(source).items():
        key = key if key.startswith(("trunk.", "head.")) else f"trunk.{key}"  # torchvision's names
        anew = key.startswith(BY_CLASSES) and own.get(key, value).shape != value.shape
        state[key] = own[key] if anew else value
    common.load_state(model, state, HEADS, f"--weights {recipe.weights}")
    return model


def param_groups(model, recipe):
    """One group: weight decay on everything, batch norm and biases included (authors' code)."""
    return [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}]
