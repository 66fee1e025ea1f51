"""Multi-stage ViT: Conde & Turgutlu, "Exploring Vision Transformers for Fine-grained Classification",
CVPR Workshop FGVC8 2021, arXiv 2106.10587.

Idea: a ViT's own attention says where the object is. One shared encoder and head classify (a) the photo,
(b) the object, cut from the photo at full resolution where the attention rollout of (a) is above its mean,
(c) the two object parts with most attention. No part annotation, no extra parameters; boxes have no gradient.
Attention can also erase what the model looks at, or zoom in on it, so that training finds more.

    Sec. 2     attention map: product of all layers' attention    attention_map (common.cls_rollout)
    Sec. 2.1   threshold, closing, best component's box           object_box, closing, connected_components
    Sec. 2.2   average pooling, non-maximum suppression           part_boxes
    Sec. 2.3   erasing and cropping by the attention map          erase, MultiStageViT.encode_augmented
    Eq. 1      L = L_a + L_b + sum_i L_ci                         joint_loss
    Fig. 2     stages a, b, c                                     MultiStageViT.stages

Where the paper and the authors' code (mv-lab/ViT-FGVC8, notebooks without weights) differ, and what our
recipes do ("code" in the help of the switches is the authors'):
    map         paper ("attention flow"): attention weights multiplied layer by layer. Code, ours: first the
                identity of the residual path is added to a layer's weights, rows then sum to one
                ("rollout"). No switch
    threshold   paper: histogram-based, the mean works well. Code, ours: mean (its local Gaussian one is not
                used and not here). --threshold median is another histogram's, and our choice
    closing     paper: grayscale, of the binary map. Code, ours: binary, a 3 x 3 cross, which is the same
    box choice  paper: the component with the largest attention. Code, ours: inside its box, even another
                component's. --score region
    part crop   paper: 0.3 of the object's area, about 112 x 112, which is 0.29 of the side. Code, ours: 128
                of 384 pixels of the side (Cars 170, Aircraft 224). --part-crop 0.2917
    score map   paper: windows are scored on a map 384 pixels wide. Code, ours: 128. No switch
    parts from  paper: the object image (Sec. 2 c), "a higher resolution" (Sec. 3). Code, ours: the object
                image. --part-source highres
    L           paper: cross-entropy. Code, ours: with label smoothing 0.1. --label-smoothing 0
    L_c         paper: sum over the parts. Code, ours: their mean. --part-reduction sum
    passes      paper: attention and features in one. Code: the photo always twice. Ours: in training those
                that --erase or --attention-crop changes twice, all others once
    erasing     paper: used. Code, ours: off in the final runs; no better where the notebooks compare. --erase
    cropping    paper: used beside erasing (Fig. 3), without numbers. Code, ours: the object stage is the only
                crop. --attention-crop 0.5 shows stage a the object alone for half of the photos
    prediction  neither says how stages are fused or whose numbers the tables hold. Ours: mean. --fusion full
    training    paper: stages "optimized simultaneously" (Sec. 2), "in a sequential (multi-stage) way" (Sec.
                3.1). Code, ours: all at once, after a phase with the encoder frozen
    setup       paper: the same for all datasets (Sec. 3), not printed. Code, ours: one for each
    numbers     paper: on Dogs a ViT has 91.7, multi-stage 93.2. Code: the notebooks' photo alone has 93.07
Where ours differs from both: RAdam without Lookahead (the code's "ranger"), with constant betas; no random
warp, reflected border or (the paper's) noise among the augmentations, of which rotation and zoom, brightness
and contrast share a coin; a cropped photo is not erased too; the photo is reduced to the encoder's size by an
antialiased filter (--full-resize nearest is the code's); the fallback box is central in evaluation; a map
that is constant up to rounding falls back instead of cropping speckle; where windows run out, the last part
is repeated; bf16 for the code's fp16; no weight decay on positions and class token; the third phase of CUB
goes on with its optimizer (the code loads the weights anew).
Table 1's "Plant Pathology" (5 classes, 9,436 / 12,595) is the iCassava 2019 set, as its reference [17] says,
and 12,595 are its unlabelled photos; the real Plant Pathology 2020-FGVC7 has 4 classes and 1,821 labelled
photos, and the authors' plant code is for yet another set. So Table 4 cannot be reproduced as printed. The
test split of `--data plant`, either set, is a hold-out of our own (unless there is a labelled test folder).

    python train.py --method vit_fgvc                              # toy birds in boxes; --no-boxes: scenes
    python train.py --method vit_fgvc --data cub --root DIR        # the CUB recipe of the authors
    python train.py eval runs/vit_fgvc-cub --fusion object         # by the object stage alone
"""
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import nn
from torchvision.ops import nms

import common
from common import Table, by_dataset, opt

# -------------------------------------------------------------------------------- recipe

share = partial(opt, most=1)


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """Switches of the multi-stage ViT. image_size is the high resolution from which objects are cropped."""

    backbone: str = opt("vit_base", "the shared encoder (Sec. 2: ViT-B/16)", tuple(common.VITS))
    encoder_size: int = opt(384, "pixels of each view as encoded, squashed (Sec. 3)", least=8, most=8192)
    full_resize: str = opt(
        "bilinear", "of photos: bilinear, antialiased (our choice); nearest (code)", ("bilinear", "nearest"))
    head: str = opt("mlp", "linear, ReLU, linear (Sec. 2); mlp_bn: code, Cars", ("mlp", "mlp_bn"))
    stages: str = opt("abc", "trained and used: a photo, b object, c parts (Sec. 2)", ("a", "b", "ab", "abc"))
    fusion: str = opt(
        "mean", "prediction: of one stage, or the mean (our choice)", ("full", "object", "parts", "mean"))
    part_reduction: str = opt("mean", "loss of the parts: mean (code) or sum (Eq. 1)", ("mean", "sum"))
    head_fusion: str = opt("mean", "joins a layer's heads in the map (code: mean)", ("mean", "max", "min"))
    threshold: str = opt("mean", "foreground: above mean (Sec. 2.1) or median (ours)", ("mean", "median"))
    score: str = opt("bbox", "object: most attention in bbox (code) or region (Sec. 2.1)", ("bbox", "region"))
    min_object_area: float = share(64**2 / 448**2, "smallest object, as a share of the photo (code)")
    fallback: float = share(
        384 / 448, "side of the box without an object, a share of the photo's (code)", least=0.01)
    parts: int = opt(2, "number of parts (Sec. 2.2)", least=1, most=99)
    part_crop: float = share(
        1 / 3, "side of a part, a share of the object's (code; Sec. 2.2: 112 / 384)", least=0.01)
    part_source: str = opt("object", "parts from object (code); photo (Sec. 3)", ("object", "highres"))
    part_iou: float = share(0.1, "largest IoU of two parts (code)", most=0.99)
    score_pool: str = opt(
        "avg", "of a window: average, maximum, generalised mean with p = 3 (Sec. 2.2)", ("avg", "max", "gem"))
    stride: int = opt(1, "step between windows, pixels of the score map (Sec. 2.2)", least=1)
    erase: bool = opt(False, "training: erase the most attended pixels of photos and objects (Sec. 2.3)")
    erase_prob: float = share(0.5, "erase: probability P for an image (code)")
    erase_threshold: float = share(0.7, "erase: above this share T of the largest attention (code)")
    attention_crop: float = share(0.0, "training: probability that stage a sees the object alone (Sec. 2.3)")
    phases: tuple[float, ...] = opt((2, 4), "lengths of the training phases, as ratios (code)", least=0.01)
    head_lr: tuple[float, ...] = opt((3, 1), "peak lr of norm and head in each phase, x lr (code)", least=0)
    encoder_lr: tuple[float, ...] = opt((0, 0.02), "the same of the encoder; 0: frozen (code)", least=0)

    def __post_init__(self):
        super().__post_init__()
        stage = {"full": "a", "object": "b", "parts": "c"}.get(self.fusion, "")
        if stage not in self.stages:
            raise ValueError(f"--fusion {self.fusion} needs stage {stage}, not in --stages {self.stages}")
        if self.attention_crop and "a" not in self.stages:
            raise ValueError(f"--attention-crop needs stage a, not in --stages {self.stages}")
        if not len(self.phases) == len(self.head_lr) == len(self.encoder_lr) > 0:
            raise ValueError("--phases, --head-lr and --encoder-lr: give each one value for each phase")


DOGS = Recipe(
    image_size=(448, 448), resize=(512, 512), crop="resized", crop_area=(0.75, 1.0),
    rotate=10, zoom=(1.0, 1.1), affine_prob=0.75, brightness=0.2, contrast=0.2, jitter_prob=0.75,
    batch_size=16, epochs=6, optimizer="radam", lr=1e-3, momentum=0.95, beta2=0.99, eps=1e-6,
    weight_decay=0.01, schedule="onecycle", label_smoothing=0.1, weights="default",
)
CUB = replace(  # the head alone, all, all gently
    DOGS, batch_size=20, epochs=10, phases=(2, 4, 4), head_lr=(3, 1, 0.1), encoder_lr=(0, 0.02, 0.002),
)
RECIPES = {
    "cub": CUB,
    "dogs": DOGS,
    "cars": replace(  # never completed by the authors
        DOGS, image_size=(512, 512), resize=(584, 584), crop_area=(0.7, 1.0), epochs=56, lr=1e-2,
        head="mlp_bn", min_object_area=73**2 / 512**2, fallback=384 / 512, part_crop=170 / 384,
        phases=(24, 32), head_lr=(1, 0.33), encoder_lr=(0, 0.0033),
    ),
    "aircraft": replace(  # not in the paper; from the authors' notebooks
        DOGS, image_size=(786, 786), resize=(898, 898), epochs=20, min_object_area=128**2 / 786**2,
        fallback=384 / 786, part_crop=224 / 384, phases=(4, 16), encoder_lr=(0, 0.04),
    ),
    "plant": CUB,  # Plant Pathology 2020 or iCassava, which is Table 1's; the authors give no recipe
    "folder": CUB,
    "toy": Recipe(  # on scenes it is still at chance after 8 epochs
        image_size=(192, 192), encoder_size=128, crop="resized", crop_area=(0.35, 1.0), boxes=True,
        toy_preset="birds-easy", backbone="toy_vit16", epochs=12, optimizer="adamw", lr=2e-3, amp="off",
        weight_decay=0.05, schedule="onecycle", phases=(1,), head_lr=(1,), encoder_lr=(1,),
    ),
}
PLAIN = {"stages": "a"}  # the full photo alone: a ViT
TABLES = {
    "toy": Table("Stages on the toy birds", "toy", "top1", (
        ("a", PLAIN, None),
        ("a, b", {"stages": "ab"}, None),
        ("a, b, c", {}, None),
    )),
    "2": Table("Table 2: Stanford Dogs (pretrained weights have seen these photos)", "dogs", "top1", (
        ("ViT-B/16", PLAIN, 91.7),
        ("multi-stage", {}, 93.2),
    )),
    **by_dataset("3", "Table 3 (its ten other methods are not here)", {"cub": "top1", "cars": "top1"}, (
        ("ViT-B/16", PLAIN, 89.4, 92.8),
        ("multi-stage", {}, 91.0, 94.3),
    )),
    "4": Table(
        "Table 4, not reproducible as printed: ViT 91.7, multi-stage 92.4 (not ours: ResNet-50 89.2, "
        "EfficientNet-B0 90.1, B2 90.4); its set is iCassava 2019, its test photos have no labels",
        "plant", "top1", (
            ("ViT-B/16", PLAIN, None),
            ("multi-stage", {}, None),
        )),
    "ablation": Table("The notebooks' eight runs on Dogs; numbers of the finished ones", "dogs", "top1", (
        ("full", PLAIN, 93.07),
        ("full, erasing", {"stages": "a", "erase": True}, 92.70),
        ("object", {"stages": "b"}, 90.40),
        ("object, erasing", {"stages": "b", "erase": True}, 90.04),
        ("full + object", {"stages": "ab"}, None),
        ("full + object, erasing", {"stages": "ab", "erase": True}, None),
        ("full + object + parts", {}, None),
        ("full + object + parts, erasing", {"erase": True}, None),
    )),
    "text": Table("Choices of Sec. 2, 3 and ours, without numbers", "cub", "top1", (
        ("as the code", {}, None),
        ("threshold: median", {"threshold": "median"}, None),
        ("object by region", {"score": "region"}, None),
        ("max pooling", {"score_pool": "max"}, None),
        ("GeM pooling", {"score_pool": "gem"}, None),
        ("stride 2", {"stride": 2}, None),
        ("parts of 112 / 384", {"part_crop": 112 / 384}, None),
        ("parts in high resolution", {"part_source": "highres"}, None),
        ("sum over parts", {"part_reduction": "sum"}, None),
        ("maximum of the heads", {"head_fusion": "max"}, None),
        ("minimum of the heads", {"head_fusion": "min"}, None),
        ("attention erasing", {"erase": True}, None),
        ("attention cropping", {"attention_crop": 0.5}, None),
    )),
}
TABLES["baseline"] = TABLES["3"]

# -------------------------------------------------------------------------------- Sec. 2, 2.1: the object


def attention_map(layers, grid, fusion="mean"):
    """Rollout of the class token over the patches (Sec. 2): (q, k) of each layer, in order -> (B, gh, gw).

    Detached, maximum 1; all zeros if no patch is attended to. A layer's attention (as the mean of its heads)
    counts half, the other half is the identity of its residual path, which the paper does not mention.
    """
    row = common.cls_rollout(layers, fusion)[:, 1:]  # (B, gh * gw)
    return (row / row.amax(1, keepdim=True).clamp(min=1e-12)).unflatten(1, grid)


def resize(maps, size):
    """Maps (B, h, w) -> (B, H, W) or (B, size, size), bilinear with corners on corners (authors' code)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def closing(mask):
    """Binary closing with a 3 x 3 cross (Sec. 2.1): closes gaps of 1 or 2 pixels. (B, H, W) -> the same."""

    def grow(mask):  # by the pixels left, right, above and below
        row, column = F.pad(mask, (1, 1)), F.pad(mask, (0, 0, 1, 1))
        return mask | row[..., :-2] | row[..., 2:] | column[:, :-2] | column[:, 2:]

    return ~grow(~grow(mask))  # outside is no background: the frame does not erode


def connected_components(mask):
    """8-connected components: (B, H, W) bool -> labels, 0 outside, 1, 2, ... in scan order through the batch.

    A run is a stretch of foreground in a row, from `first` to before `end`. Two runs that touch and differ in
    number hand the smaller one on to the run that the larger one names, until all that touch agree.
    """
    row = mask.shape[2] + 2  # a row with a blank at both ends; a blank row parts the images
    flat = F.pad(mask, (1, 1, 0, 1)).flatten()
    first, end = (flat[1:] != flat[:-1]).nonzero().view(-1, 2).T.contiguous()  # (R,) each
    runs = number = torch.arange(len(first), device=mask.device)

    # runs of the next row that touch, also by a corner: they end not before `first`, begin not behind `end`
    low, high = torch.searchsorted(end, first + row), torch.searchsorted(first, end + row, right=True)
    upper = runs.repeat_interleave(high - low)  # (E,) all pairs of runs that touch
    lower = torch.arange(len(upper), device=mask.device) + (high - (high - low).cumsum(0))[upper]

    while not torch.equal(a := number[upper], b := number[lower]):
        number = number.scatter_reduce(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        number = number[number[number]]  # a run takes the number that its own has got
    labels = (number == runs).cumsum(0)[number]  # of each run
    return mask.long().masked_scatter(mask, labels.repeat_interleave(end - first))


@torch.compiler.disable  # numbers of components are data: nothing to compile
def object_box(maps, recipe, random=False):
    """Box of the object in attention maps (Sec. 2.1): (B, H, W) -> (B, 4) xyxy, half-open, pixels of the map.

    The map is thresholded and closed. Of the connected components that are large enough the one with the
    largest attention, inside its box (score bbox) or itself (region), is the object; of equals the first in
    scan order. Without any the box is a share of each side, in the centre or at a random place.
    """
    r, (B, H, W) = recipe, maps.shape
    sides = torch.tensor([round(r.fallback * W), round(r.fallback * H)])
    place = torch.rand(B, 2) if random else torch.full((B, 2), 0.5)
    corner = (place * (torch.tensor([W, H]) - sides)).long()
    boxes = torch.cat([corner, corner + sides], 1).to(maps.device)

    level = maps.mean((1, 2)) if r.threshold == "mean" else maps.flatten(1).median(1).values
    foreground = maps - level[:, None, None] > 1e-5 * maps.amax((1, 2), keepdim=True)  # not of a constant map
    labels, smallest = connected_components(closing(foreground)), max(1, round(r.min_object_area * H * W))
    for image, (attention, label) in enumerate(zip(maps, labels)):
        largest = 0.0
        for number, area in enumerate(label.flatten().bincount()[1:].tolist(), 1):
            if area >= smallest:
                y, x = (label == number).nonzero().T
                box = x1, y1, x2, y2 = x.min(), y.min(), x.max() + 1, y.max() + 1
                found = (attention[y1:y2, x1:x2] if r.score == "bbox" else attention[y, x]).max()
                if found > largest:
                    largest, boxes[image] = found, torch.stack(box)
    return boxes


# -------------------------------------------------------------------------------- Sec. 2.2: its parts


@torch.compiler.disable
def part_boxes(maps, recipe):
    """The windows with most attention that hardly overlap (Sec. 2.2): (B, s, s) -> (B, P, 4) xyxy, half-open.

    Boxes are in pixels of the object image, all of one size, best first. IoU is that of the windows on the
    map and counts the pixel behind the last (areas "+1", code), so windows that touch overlap. If fewer
    windows than parts fit, the last is repeated.
    """
    r, side, size = recipe, maps.shape[2], recipe.encoder_size
    window = max(1, round(r.part_crop * size))
    kernel = max(1, window * side // size)
    pooling = F.max_pool2d if r.score_pool == "max" else F.avg_pool2d
    scores = pooling(maps**3 if r.score_pool == "gem" else maps, kernel, r.stride)  # no root: same order
    steps = torch.arange(scores.shape[2], device=maps.device) * r.stride
    corners = torch.cartesian_prod(steps, steps).flip(1)  # (n, 2) x, y, row by row
    windows = torch.cat([corners, corners + kernel + 1], 1).float()
    wanted, chosen = torch.arange(r.parts, device=maps.device), []
    for own in scores.flatten(1):  # (n,)
        kept = nms(windows, own, r.part_iou + 1e-6)  # an IoU equal to the largest passes
        chosen.append(kept[wanted.clamp(max=len(kept) - 1)])
    corners = corners[torch.stack(chosen)]  # (B, P, 2)
    corners = (corners * size // side).clamp(max=size - window)  # pixels of the image
    return torch.cat([corners, corners + window], 2)


def crop(images, boxes, size):
    """Cut boxes (B, P, 4), xyxy and half-open, out of images (B, c, H, W), resized with corners on corners.

    -> (B, P, c, size, size)
    """
    H, W = images.shape[2:]
    low, high = boxes[..., None].float().split(2, 2)  # (B, P, 2, 1)
    points = low + torch.linspace(0, 1, size, device=images.device) * (high - 1 - low)  # (B, P, 2, size)
    x, y = (2 * points / points.new_tensor([[W - 1], [H - 1]]) - 1).unbind(2)  # from -1 to 1
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), 4).flatten(1, 2)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=True)  # one under the other
    return views.unflatten(2, (-1, size)).transpose(1, 2)


# -------------------------------------------------------------------------------- Sec. 2.3, Eq. 1


def toss(images, probability):
    """A coin for each image (Sec. 2.3): (B, ...) -> (B,) bool."""
    return torch.rand(len(images), device=images.device) < probability


def erase(images, maps, chosen, threshold):
    """Erase what is attended (Sec. 2.3): in the chosen (B,) of images (B, 3, H, W), pixels with more
    attention (B, H, W) than the threshold T become 0, the mean colour."""
    holes = chosen[:, None, None] & (maps > threshold)
    return images.masked_fill(holes[:, None], 0.0)


def joint_loss(logits, targets, recipe):
    """Eq. 1 over the stages present: {name: (B, P, K)}, P views of each image, (B,) -> (loss, terms)."""
    terms = {}
    for name, stage in logits.items():
        views = stage.shape[1]
        mean = F.cross_entropy(stage.float().flatten(0, 1), targets.repeat_interleave(views),
                               label_smoothing=recipe.label_smoothing)
        terms[name] = mean * views if recipe.part_reduction == "sum" else mean
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}


def fuse(logits, fusion):
    """The stages' logits {name: (B, P, K)} -> (B, K): those of one stage, or the mean of the stages."""
    stages = {name: stage.mean(1) for name, stage in logits.items()}
    return stages[fusion] if fusion in stages else sum(stages.values()) / len(stages)


# -------------------------------------------------------------------------------- Fig. 2: the model

SCORE_SHRINK = 3  # windows are scored on a map so much smaller than the object image: 128 of 384 (code)


class MultiStageViT(nn.Module):
    """One encoder, norm and head for photo, object and parts (Fig. 2). Photos may have any size and shape."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe, self.size = recipe, recipe.encoder_size
        self.encoder = common.vit(recipe.backbone, self.size, drop_path=recipe.drop_path)
        self.encoder.norm = nn.Identity()  # a new one trains while the encoder is frozen (code)
        dim, plain = self.encoder.cls_token.shape[-1], recipe.head == "mlp"
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        first, last = nn.Linear(dim, dim, bias=plain), nn.Linear(dim, num_classes, bias=plain)

        def before(drop):
            return [] if plain else [nn.BatchNorm1d(dim), nn.Dropout(drop)]

        self.head = nn.Sequential(*before(0.25), first, nn.ReLU(), *before(0.5), last)

    def encode(self, views, attend=False):
        """Views (n, 3, S, S) -> class tokens (n, C), attention maps (n, gh, gw) if `attend`."""
        layers = []
        tokens = self.encoder.features(views, (lambda *qk: layers.append(qk)) if attend else None)
        maps = attention_map(layers, self.encoder.grid, self.recipe.head_fusion) if attend else None
        return self.norm(tokens[:, 0]), maps

    def classify(self, views):
        """P views of each image (B, P, 3, S, S) -> logits (B, P, K)."""
        return self.head(self.encode(views.flatten(0, 1))[0]).unflatten(0, views.shape[:2])

    @torch.no_grad()
    def attention(self, views):
        """A pass for the maps alone, which changes no running statistics: (n, 3, S, S) -> (n, gh, gw)."""
        self.encoder.eval()
        _, maps = self.encode(views, attend=True)
        self.encoder.train(self.training)
        torch.clear_autocast_cache()  # the next pass would get weights cast here, without a graph
        return maps

    def encode_augmented(self, images, small, attend):
        """`encode` of photos (B, 3, H, W), small (B, 3, S, S), after some are erased or cropped (Sec. 2.3).

        The maps are those of the photos as they are, where the object is sought.
        """
        r = self.recipe
        erased, cropped = toss(images, r.erase * r.erase_prob), toss(images, r.attention_crop)
        changed, before = erased | cropped, small.new_zeros(len(small), *self.encoder.grid)
        before[changed] = self.attention(small[changed])
        small = erase(small, resize(before, self.size), erased, r.erase_threshold)
        boxes = object_box(resize(before[cropped], images.shape[2:]), r, True)[:, None]
        small[cropped] = crop(images[cropped], boxes, self.size)[:, 0]
        tokens, maps = self.encode(small, attend)
        return tokens, torch.where(changed[:, None, None], before, maps) if attend else None

    def stages(self, images, locate=False):
        """Run the stages (Fig. 2): (B, 3, H, W) -> logits (B, P, K) by stage, and what was found.

        That is nothing without parts, unless with `locate`; else maps (B, H, W), the object's box in the
        photo (B, 1, 4), the object (B, 3, S, S), its map (B, S, S), its parts' boxes in the photo (B, P, 4)
        and the parts (B, P, 3, S, S).
        """
        r, size, logits = self.recipe, self.size, {}
        used, augment = r.stages, self.training and (r.erase or r.attention_crop)
        attend = locate or used != "a"

        # a: the photo
        smooth = r.full_resize == "bilinear"
        small = F.interpolate(images, (size, size), mode=r.full_resize, antialias=smooth)
        if "a" not in used:
            maps = self.attention(small)
        else:
            encode = partial(self.encode_augmented, images) if augment else self.encode
            tokens, maps = encode(small, attend)
            logits["full"] = self.head(tokens)[:, None]
        if not attend:
            return logits, ()

        # b: the object
        maps = resize(maps, images.shape[2:])
        box = object_box(maps, r, self.training)[:, None]
        thing, object_map = (crop(whole, box, size)[:, 0] for whole in (images, maps[:, None]))
        object_map = object_map[:, 0]
        if self.training and r.erase:
            thing = erase(thing, object_map, toss(images, r.erase_prob), r.erase_threshold)
        if "b" in used:
            logits["object"] = self.classify(thing[:, None])
        if "c" not in used and not locate:
            return logits, ()

        # c: its parts, cut out of it or of the photo
        inside = part_boxes(resize(object_map, size // SCORE_SHRINK), r)  # in the object
        corner, far = box.split(2, 2)
        boxes = corner.repeat(1, 1, 2) + inside * ((far - corner).repeat(1, 1, 2) / size)  # in the photo
        parts = crop(images, boxes, size) if r.part_source == "highres" else crop(thing, inside, size)
        if "c" in used:
            logits["parts"] = self.classify(parts)
        return logits, (maps, box, thing, object_map, boxes, parts)

    def forward(self, images, targets=None):
        """(B, 3, H, W) -> logits (B, K); with targets (B,) -> (loss, terms)."""
        logits, _ = self.stages(images)
        fused = fuse(logits, self.recipe.fusion)
        if targets is None:
            return fused
        loss, terms = joint_loss(logits, targets, self.recipe)
        return loss, terms | {"top1": (fused.argmax(1) == targets).float().mean()}

    @torch.no_grad()
    def heads(self, images):
        """(B, 3, H, W) -> logits (B, K) of each stage and of their mean."""
        logits, _ = self.stages(images)
        return {name: fuse(logits, name) for name in [*logits] + ["mean"] * (len(logits) > 1)}

    @torch.no_grad()
    def where(self, images):
        """(B, 3, H, W) -> boxes (B, 1 + P, 4) xyxy of the object and its parts, scores (B, 1 + P).

        Scores: the largest attention in the object, the mean attention in a part.
        """
        common.check_images(images)
        _, (maps, box, _, _, boxes, _) = self.stages(images, locate=True)
        boxes = torch.cat([box, boxes], 1)
        inside = crop(maps[:, None], boxes, self.size).flatten(2)  # (B, 1 + P, S * S)
        return boxes, torch.cat([inside[:, :1].amax(2), inside[:, 1:].mean(2)], 1)

    @torch.no_grad()
    def figure(self, images):
        """Figures 4 and 5, a page for each image: box, attention, object and its map, erasing, parts."""
        _, found = self.stages(images, locate=True)
        return [page(self.recipe, *views) for views in zip(images, *found)]


# -------------------------------------------------------------------------------- pictures


def page(recipe, image, attention, box, thing, object_map, boxes, parts):
    """The panels of one image (3, H, W) and what was found in it -> PIL image."""
    hole = attention > recipe.erase_threshold
    rim = F.max_pool2d(hole[None].float(), 9, 1, 4)[0] > 0
    erased = image.masked_fill(rim, 9.0).masked_fill(hole, 0.0)  # grey as in training, with a white rim
    views = image, erased, thing, *parts
    photo, erased, thing, *parts = (common.to_pil(view, recipe.normalize) for view in views)
    weight = Image.fromarray((attention * 255).byte().cpu().numpy()).convert("RGB")
    panels = {
        "object box": common.draw_boxes(photo, box, colours=("#ff2020",), width=4),
        "attention": common.heat(photo, attention, strength=1.0),
        "image x attention": ImageChops.multiply(photo, weight),
        "object": thing,
        "its attention": common.heat(thing, object_map, strength=1.0),
        f"erased above {recipe.erase_threshold:g}": erased,
    }
    panels |= {f"part {i}": part for i, part in enumerate(parts, 1)}
    return common.panels(panels.values(), panels)


# -------------------------------------------------------------------------------- build

VIT_BASE_384 = (  # timm's of early 2021 (ImageNet-21k, then 1k at 384 pixels), which the authors took
    "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/"
    "jx_vit_base_p16_384-83fb41ba.pth"
)


def build(recipe, num_classes):
    """The model, its encoder with pretrained weights (see common.load_vit); those of a run of ours bring norm
    and head along where they fit. Raises ValueError for another method's recipe or fewer than two classes."""
    common.check_build(recipe, Recipe, num_classes)
    model = MultiStageViT(recipe, num_classes)
    if recipe.weights == "none":
        for weight in model.encoder.parameters():
            if weight.ndim == 2:  # as Google's ViT: with timm's 0.02 narrow encoders learn later
                nn.init.xavier_uniform_(weight)
        return model
    if recipe.backbone == "vit_base":
        model.encoder.official = VIT_BASE_384
    held = common.load_vit(model.encoder, recipe.weights)
    if "encoder.cls_token" in held:
        common.load_state(model, held, ("encoder.", "head."), recipe.weights)
    return model


def param_groups(model, recipe):
    """Encoder, and new norm and head, with (length, peak learning rate) of their phases: see common.lr_at.

    Weight decay on matrices and convolutions; not on biases and norms (1 dimension), nor on the position
    embeddings and the class token (3).
    """
    groups = {}
    for name, p in model.named_parameters():
        factors = recipe.encoder_lr if name.startswith("encoder.") else recipe.head_lr
        phases = tuple((length, factor * recipe.lr) for length, factor in zip(recipe.phases, factors))
        groups.setdefault((phases, recipe.weight_decay * (p.ndim in (2, 4))), []).append(p)
    return [{"params": params, "phases": phases, "weight_decay": decay}
            for (phases, decay), params in groups.items()]
