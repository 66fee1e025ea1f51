"""Multi-stage ViT: Conde & Turgutlu, "Exploring Vision Transformers for Fine-grained Classification", CVPR Workshop FGVC8 2021, arXiv 2106.10587.

Idea: a ViT's own attention says where the object is. One shared encoder and head classify (a) the whole photo, (b) the object, cropped from
the photo at full resolution where the attention rollout of (a) is above its mean, and (c) the two object parts with most attention.
No part annotation, no extra parameters; boxes carry no gradient. Attention can also erase what it looked at, so that training finds more.

    Sec. 2     attention map: product of all layers' attention    attention_map (common.cls_rollout)
    Eq. 1      L = L_a + L_b + sum_i L_ci                         joint_loss
    Sec. 2.1   threshold, closing, best component's box           closing, connected_components, object_box
    Sec. 2.2   average pooling, non-maximum suppression           suppress, part_boxes
    Sec. 2.3   erasing what the attention map marks               erase
    Fig. 2     stages a, b, c                                     MultiStageViT.stages

Where the paper and the authors' code (mv-lab/ViT-FGVC8, notebooks without weights) differ, and what our recipes do:
    L_c         paper: sum over the parts. Code, ours: their mean, all with label smoothing 0.1. --part-reduction sum
    part crop   paper: "0.3 of the area ~ 112 x 112", which is 0.29 of the side. Code, ours: a third, 128 of 384 pixels. --part-crop 0.2917
    parts from  paper: "a higher resolution". Code, ours: the object image. --part-source highres
    box choice  paper: the component with the largest attention. Code, ours: inside its box, even another component's. --score region
    closing     paper: a grayscale closing of the binary map. Code, ours: a binary closing with a 3 x 3 cross, which is the same
    passes      paper: attention and features in one. Code: the photo always twice. Ours: twice only for photos that get erased
    erasing     paper: used. Code, ours: off in the final runs; no better where the notebooks compare. --erase
    prediction  neither says how stages are fused, nor which of them the tables hold. Ours: mean of all. --fusion full|object|parts
    training    paper: "sequential (multi-stage)". Code, ours: all stages at once, after a phase with the encoder frozen
Where ours differs from both: RAdam without Lookahead (the code's "ranger"), with constant betas; no random warp among the augmentations; the
photo is reduced to the encoder's size by an antialiased filter (--full-resize nearest is the code's); the fallback box is central in
evaluation; a map that is constant up to rounding falls back instead of cropping speckle; where windows run out, the last part is repeated.
Table 1's "Plant Pathology" (5 classes, 9,436 / 12,595) is the iCassava 2019 set, as its reference [17] says, and 12,595 are its unlabelled photos;
the real Plant Pathology 2020-FGVC7 has 4 classes and 1,821 labelled photos, and the authors' plant code is for yet another set. So Table 4
cannot be reproduced as printed. `--data plant` is the 2020 set with a hold-out of our own; iCassava goes through `--data folder`.

    python train.py --method vit_fgvc                              # toy birds
    python train.py --method vit_fgvc --data cub --root DIR        # the CUB recipe of the authors
    python train.py eval --run runs/vit_fgvc-cub --fusion full,object,parts,mean
"""
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import nn

import common
from common import Table, opt

# ------------------------------------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """Switches of the multi-stage ViT. image_size is the high resolution from which objects are cropped."""

    backbone: str = opt("vit_base", "the shared encoder; toy_vit and toy_vit16 are tiny, for small pictures (Sec. 2: ViT-B/16)", tuple(n for n in common.VITS if n != "r50_vit_base"))
    encoder_size: int = opt(384, "pixels to which photo, object and parts are resized, aspect not kept (Sec. 3)")
    full_resize: str = opt("bilinear", "reducing the photo to encoder_size: bilinear, antialiased (our choice); nearest (authors' code)", ("bilinear", "nearest"))
    head: str = opt("mlp", "classifier: mlp is linear, ReLU, linear (Sec. 2); mlp_bn adds BatchNorm and dropout (authors' code, Cars)", ("mlp", "mlp_bn"))
    stages: str = opt("abc", "which stages are trained and used: a full photo, b object, c parts (Sec. 2)", ("a", "b", "ab", "abc"))
    fusion: str = opt("mean", "the prediction: of one stage, or the mean of the stages' logits (our choice; the paper does not say)", ("full", "object", "parts", "mean"))
    part_reduction: str = opt("mean", "loss of the parts: their mean (authors' code) or sum (Eq. 1)", ("mean", "sum"))
    head_fusion: str = opt("mean", "how a layer's heads are joined in the attention map (authors' code: mean)", ("mean", "max", "min"))
    score: str = opt("bbox", "the object is the component with the largest attention inside its bbox (authors' code) or inside its region (Sec. 2.1)", ("bbox", "region"))
    min_object_area: float = opt(64**2 / 448**2, "components smaller than this share of the photo are no object (authors' code)")
    fallback: float = opt(384 / 448, "without an object: side of the box as a share of the photo's; random place in training, the centre else (authors' code)")
    parts: int = opt(2, "number of parts (Sec. 2.2)")
    part_crop: float = opt(128 / 384, "side of a part as a share of the object image's (authors' code; Sec. 2.2: 112 / 384)")
    part_source: str = opt("object", "parts are cropped from the object image (authors' code) or from the photo in high resolution (Sec. 3)", ("object", "highres"))
    part_iou: float = opt(0.1, "largest IoU of two parts (authors' code)")
    score_pool: str = opt("avg", "score of a window: average, maximum or generalised mean (p = 3) of its attention (Sec. 2.2)", ("avg", "max", "gem"))
    stride: int = opt(1, "step between windows, in pixels of the score map, a third of encoder_size wide (Sec. 2.2)")
    erase: bool = opt(False, "training: erase the most attended pixels of photos and objects (Sec. 2.3)")
    erase_prob: float = opt(0.5, "erase: probability P for an image (authors' code)")
    erase_threshold: float = opt(0.7, "erase: pixels with more attention than this share of the maximum, T (authors' code)")
    phases: tuple[float, ...] = opt((2, 4), "length of each training phase in epochs; shares of the run when epochs differs from their sum (authors' code)")
    head_lr: tuple[float, ...] = opt((3, 1), "peak learning rate of the new norm and head in each phase, as a factor of lr (authors' code)")
    encoder_lr: tuple[float, ...] = opt((0, 0.02), "peak learning rate of the encoder in each phase, as a factor of lr; 0: frozen (authors' code)")


CUB = Recipe(
    image_size=(448, 448), resize=(512, 512), crop="resized", crop_area=(0.75, 1.0), rotate=10, zoom=(1.0, 1.1), affine_prob=0.75,
    brightness=0.2, contrast=0.2, jitter_prob=0.75, batch_size=20, epochs=10, optimizer="radam", lr=1e-3, momentum=0.95, eps=1e-6, weight_decay=0.01,
    schedule="onecycle", label_smoothing=0.1, weights="default", phases=(2, 4, 4), head_lr=(3, 1, 0.1), encoder_lr=(0, 0.02, 0.002),
)
DOGS = replace(CUB, batch_size=16, epochs=6, phases=(2, 4), head_lr=(3, 1), encoder_lr=(0, 0.02))
RECIPES = {
    "cub": CUB,
    "dogs": DOGS,
    "cars": replace(
        CUB, image_size=(512, 512), resize=(584, 584), crop_area=(0.7, 1.0), batch_size=16, epochs=56, lr=1e-2, head="mlp_bn", min_object_area=73**2 / 512**2,
        fallback=384 / 512, part_crop=170 / 384, phases=(24, 32), head_lr=(1, 0.33), encoder_lr=(0, 0.0033),
    ),  # never completed by the authors
    "aircraft": replace(
        CUB, image_size=(786, 786), resize=(898, 898), batch_size=16, epochs=20, min_object_area=128**2 / 786**2, fallback=384 / 786, part_crop=224 / 384,
        phases=(4, 16), head_lr=(3, 1), encoder_lr=(0, 0.04),
    ),  # not in the paper; from the authors' notebooks
    "plant": CUB,  # Plant Pathology 2020, not the set of Table 1 (see above); the authors give no recipe
    "folder": CUB,
    "toy": Recipe(
        image_size=(192, 192), encoder_size=128, crop="resized", crop_area=(0.35, 1.0), backbone="toy_vit16", toy_preset="birds-small", batch_size=32, epochs=30, optimizer="adamw", lr=2e-3,
        weight_decay=0.05, schedule="onecycle", phases=(1,), head_lr=(1,), encoder_lr=(1,), amp="off",
    ),
}

NOTEBOOK = (
    ("full", {"stages": "a"}), ("full, erasing", {"stages": "a", "erase": True}), ("object", {"stages": "b"}), ("object, erasing", {"stages": "b", "erase": True}),
    ("full + object", {"stages": "ab"}), ("full + object, erasing", {"stages": "ab", "erase": True}),
    ("full + object + parts", {"stages": "abc"}), ("full + object + parts, erasing", {"stages": "abc", "erase": True}),
)
VIT, OURS = ("ViT-B/16", {"stages": "a"}), ("multi-stage", {"stages": "abc"})
TABLES = {
    "baseline": Table("the full photo alone, and all stages", "cub", "top1", (("full photo (plain ViT)", {"stages": "a"}, 89.4), ("object and parts too", {}, 91.0))),
    "toy": Table("Stages on the toy birds, drawn small", "toy", "top1", (("a", {"stages": "a"}, None), ("a, b", {"stages": "ab"}, None), ("a, b, c", {"stages": "abc"}, None))),
    "2": Table("Table 2: Stanford Dogs (its photos are part of ImageNet: pretrained weights have seen them)", "dogs", "top1", ((*VIT, 91.7), (*OURS, 93.2))),
    "3": Table("Table 3: CUB-200-2011", "cub", "top1", ((*VIT, 89.4), (*OURS, 91.0))),
    "3-cars": Table("Table 3: Stanford Cars", "cars", "top1", ((*VIT, 92.8), (*OURS, 94.3))),
    "4": Table("Table 4: not reproducible as printed (paper: ViT 91.7, ours 92.4); its set is iCassava 2019, its test photos have no labels", "plant", "top1", ((*VIT, None), (*OURS, None))),
    "ablation": Table("The notebooks' eight runs on Dogs; logged numbers where a run was finished", "dogs", "top1", tuple((*row, logged) for row, logged in zip(NOTEBOOK, (93.07, 92.70, 90.40, 90.04) + (None,) * 4))),
    "text": Table(
        "Sec. 2.1 and 2.2: pooling, stride, source and loss of the parts, heads, choice of the object", "cub", "top1",
        (("as the code", {}, None), ("max pooling", {"score_pool": "max"}, None), ("GeM pooling", {"score_pool": "gem"}, None), ("stride 2", {"stride": 2}, None),
         ("parts of 112 / 384", {"part_crop": 112 / 384}, None), ("parts in high resolution", {"part_source": "highres"}, None), ("sum over parts", {"part_reduction": "sum"}, None),
         ("maximum of the heads", {"head_fusion": "max"}, None), ("minimum of the heads", {"head_fusion": "min"}, None), ("object by region", {"score": "region"}, None)),
    ),
}

# ------------------------------------------------------------------------------------------------ where is the object (Sec. 2, 2.1)


def attention_map(attns, grid, fusion="mean"):
    """Rollout of the class token over the patches (Sec. 2). Attention per layer, first layer first -> (B, gh, gw), detached, maximum 1.

    A layer is (B, h, N, N), (B, N, N) with its heads fused, or the (q, k) from which common.cls_rollout recomputes it a slab at a time,
    so that the layers' attention tensors (192 MB an image at 384 pixels) never stand in memory. All zeros if no patch was attended to.
    """
    fuse = {"mean": torch.Tensor.mean, "max": torch.Tensor.amax, "min": torch.Tensor.amin}[fusion]
    row = common.cls_rollout([fuse(a, 1) if torch.is_tensor(a) and a.ndim == 4 else a for a in attns], fusion)[:, 1:]  # (B, gh * gw)
    return (row / row.amax(1, keepdim=True).clamp(min=1e-12)).unflatten(1, grid)


def closing(mask):
    """Binary closing with a 3 x 3 cross (Sec. 2.1): gaps of one or two pixels close. (..., H, W) bool -> the same."""

    def cross(m):  # the pixel, above, below, left, right: (..., H, W) out of (..., H + 2, W + 2)
        return m[..., 1:-1, 1:-1], m[..., :-2, 1:-1], m[..., 2:, 1:-1], m[..., 1:-1, :-2], m[..., 1:-1, 2:]

    grown = reduce(torch.bitwise_or, cross(F.pad(mask, (1, 1, 1, 1), value=False)))
    return reduce(torch.bitwise_and, cross(F.pad(grown, (1, 1, 1, 1), value=True)))  # outside counts as foreground: the frame does not erode


def connected_components(mask):
    """8-connected components: (..., H, W) bool -> labels, 0 for background, 1, 2, ... in scan order, numbered through a batch.

    Runs of foreground in a row are nodes, runs that touch in the next row are edges; each round hooks roots onto smaller neighbours and then
    shortens all paths to length one. 448 x 448 on one core: 2 ms of CPU time for an attention map, 18 ms for noise of the worst density (0.41), measured with
    python -m timeit -p -s "import torch, vit_fgvc; torch.set_num_threads(1); m = torch.rand(448, 448) < 0.41" "vit_fgvc.connected_components(m)"
    """
    H, W = mask.shape[-2:]
    flat = F.pad(mask.reshape(-1, H, W), (0, 1, 0, 1)).flatten()  # a blank column and row: no run crosses a row or an image
    first = (flat & ~F.pad(flat[:-1], (1, 0))).nonzero()[:, 0]  # (R,) first and last pixel of each run
    last = (flat & ~F.pad(flat[1:], (0, 1))).nonzero()[:, 0]
    low = torch.searchsorted(last, first + W)  # runs low .. high - 1 of the next row (W + 1 pixels on) touch, also by a corner
    count = (torch.searchsorted(first, last + W + 2, right=True) - low).clamp(min=0)
    above = torch.arange(len(first), device=mask.device).repeat_interleave(count)
    below = torch.arange(len(above), device=mask.device) - (count.cumsum(0) - count - low).repeat_interleave(count)
    root = torch.arange(len(first), device=mask.device)
    while len(above):
        a, b = root[above], root[below]
        root.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
        apart = root[above] != root[below]
        above, below = above[apart], below[apart]
    number = (root == torch.arange(len(root), device=mask.device)).cumsum(0)[root]  # of each run
    labels = flat.long()
    labels[flat] = number.repeat_interleave(last - first + 1)
    return labels.view(-1, H + 1, W + 1)[:, :H, :W].reshape(mask.shape)


@torch.compiler.disable  # numbers of components are data: nothing to compile
def object_box(attention, min_area, score="bbox", fallback=384 / 448, random=False):
    """Box of the object in an attention map (Sec. 2.1): (..., H, W) -> (..., 4) half-open row1, col1, row2, col2 in pixels of the map.

    Pixels above the mean, closed, fall into components; of those with at least `min_area` pixels the one with the largest attention inside
    its box (score bbox) or itself (region) is taken, the first in scan order of equals. Without any (a constant map, or specks only) the box
    is a share `fallback` of each side, in the centre or at a random place.
    """
    H, W = attention.shape[-2:]
    maps = attention.detach().reshape(-1, H, W)
    foreground = maps - maps.mean((1, 2), keepdim=True) > 1e-5 * maps.amax((1, 2), keepdim=True)  # 1e-5: a map constant up to rounding has no object
    labels = connected_components(closing(foreground))
    edges = F.pad(labels, (1, 1)).diff(dim=2) != 0  # a run of foreground in a row begins and ends at an edge; an image has few of them
    image, row, first = (edges[:, :, :-1] & (labels > 0)).nonzero().T  # (R,)
    last = (edges[:, :, 1:] & (labels > 0)).nonzero()[:, 2]
    label = labels[image, row, first] - 1
    n = int(labels.max())

    def over(values, how, start):  # one value per component
        return torch.full((n,), start, device=maps.device).scatter_reduce(0, label, values, how)

    boxes = torch.stack([over(row, "amin", H), over(first, "amin", W), over(row, "amax", -1) + 1, over(last, "amax", -1) + 1], 1)  # (n, 4)
    large = (over(last - first + 1, "sum", 0) >= min_area).nonzero()[:, 0]  # a few at most
    owners, large_boxes = over(image, "amax", -1)[large].tolist(), boxes[large].tolist()
    if score == "region":
        scores = [maps[i][labels[i] == k + 1].max() for i, k in zip(owners, large.tolist())]
    else:
        scores = [maps[i, r1:r2, c1:c2].max() for i, (r1, c1, r2, c2) in zip(owners, large_boxes)]
    scores = torch.stack(scores).tolist() if scores else []
    found, best = fallback_boxes(len(maps), H, W, fallback, random).tolist(), [-torch.inf] * len(maps)
    for i, box, value in zip(owners, large_boxes, scores):  # in scan order
        if value > best[i]:
            found[i], best[i] = box, value
    return torch.tensor(found, device=maps.device).reshape(*attention.shape[:-2], 4)


def fallback_boxes(n, H, W, share, random):
    """Boxes for n images without an object, of a share of each side, in the centre or each at a random place -> (n, 4)."""
    h, w = max(1, round(share * H)), max(1, round(share * W))
    room = torch.tensor([H - h, W - w])
    corner = (torch.rand(n, 2) * room).long() if random else (room // 2).expand(n, 2)
    return torch.cat([corner, corner + torch.tensor([h, w])], 1)


# ------------------------------------------------------------------------------------------------ where are its parts (Sec. 2.2)


def suppress(boxes, scores, keep, iou):
    """Greedy non-maximum suppression of many images at once: boxes (n, 4), scores (B, n) -> indices (B, keep), best first.

    IoU counts the last pixel as inside (areas "+1", as the authors' code); windows that touch overlap. Too few windows: the last is repeated.
    """
    scores = scores.clone()
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    chosen = [scores.argmax(1)]
    while len(chosen) < keep:
        last = boxes[chosen[-1]][:, None]  # (B, 1, 4)
        inter = (torch.minimum(last[..., 2:], boxes[:, 2:]) - torch.maximum(last[..., :2], boxes[:, :2]) + 1).clamp(min=0).prod(2)  # (B, n)
        scores[inter > iou * (area[chosen[-1]][:, None] + area - inter)] = -torch.inf
        scores.scatter_(1, chosen[-1][:, None], -torch.inf)
        best, index = scores.max(1)
        chosen.append(torch.where(best > -torch.inf, index, chosen[-1]))
    return torch.stack(chosen, 1)


@torch.compiler.disable
def part_boxes(attention, crop, size, parts=2, iou=0.1, stride=1, pool="avg"):
    """The windows with most attention that hardly overlap (Sec. 2.2): map (..., h, w) -> (..., parts, 4) half-open row1, col1, row2, col2.

    Boxes are in pixels of a size x size object image, exactly `crop` wide, best first; IoU is that of the windows on the map. If fewer windows
    than `parts` fit, the last is repeated. Raises ValueError if `crop` is not within 1 .. size.
    """
    if not 1 <= crop <= size:
        raise ValueError(f"a part crop of {crop} pixels does not fit an object image of {size}; use 1 to {size} (recipe: part_crop, a share of encoder_size)")
    h, w = attention.shape[-2:]
    maps = attention.detach().reshape(-1, 1, h, w)
    kh, kw = max(1, crop * h // size), max(1, crop * w // size)
    if pool == "max":
        scores = F.max_pool2d(maps, (kh, kw), stride)
    else:
        scores = F.avg_pool2d(maps.pow(3) if pool == "gem" else maps, (kh, kw), stride)  # the cube root of GeM changes no order
    rows, cols = (torch.arange(n, device=maps.device) * stride for n in scores.shape[-2:])
    corner = torch.cartesian_prod(rows, cols)  # (n, 2)
    windows = torch.cat([corner, corner + torch.tensor([kh, kw], device=maps.device)], 1)
    corner = corner[suppress(windows, scores.flatten(1), parts, iou)]  # (B, parts, 2)
    corner = (corner * size // torch.tensor([h, w], device=maps.device)).clamp(max=size - crop)  # pixels; widening keeps the corner unless it would leave the image
    return torch.cat([corner, corner + crop], 2).reshape(*attention.shape[:-2], parts, 4)


def crop(images, boxes, size):
    """Cut a box out of each image and resize it, corners on corners: (B, c, H, W), (B, 4) half-open row1, col1, row2, col2 -> (B, c, size, size)."""
    H, W = images.shape[-2:]
    t = torch.linspace(0, 1, size, device=images.device)
    r1, c1, r2, c2 = boxes.float()[:, :, None].unbind(1)  # (B, 1) each
    y, x = r1 + t * (r2 - 1 - r1), c1 + t * (c2 - 1 - c1)  # (B, size) pixels
    y, x = 2 * y / max(1, H - 1) - 1, 2 * x / max(1, W - 1) - 1
    grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    return F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=True)


def erase(images, maps, threshold, probability, generator=None):
    """Erase what was looked at (Sec. 2.3): with `probability`, an image's pixels with maps (B, H, W) > threshold become 0, the mean colour."""
    coin = torch.rand(len(images), generator=generator, device=images.device) < probability
    return images.masked_fill((coin[:, None, None] & (maps > threshold))[:, None], 0.0)


# ------------------------------------------------------------------------------------------------ loss and prediction


def joint_loss(logits, targets, label_smoothing=0.1, part_reduction="mean"):
    """Eq. 1 over the stages present: {"full": (B, K), "object": (B, K), "parts": (B, P, K)}, (B,) -> (loss, detached terms)."""
    terms = {}
    for name, stage in logits.items():
        stage, parts = stage.float(), stage.shape[1] if name == "parts" else 1
        terms[name] = F.cross_entropy(stage.reshape(-1, stage.shape[-1]), targets.repeat_interleave(parts), label_smoothing=label_smoothing)
        if part_reduction == "sum":
            terms[name] = terms[name] * parts
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}


def fuse(logits, fusion):
    """The stages' logits -> (B, K): those of one stage (parts: their mean) or the mean of the stages."""
    stages = {name: stage.mean(1) if name == "parts" else stage for name, stage in logits.items()}
    return torch.stack(list(stages.values())).mean(0) if fusion == "mean" else stages[fusion]


# ------------------------------------------------------------------------------------------------ the model


class MultiStageViT(nn.Module):
    """One encoder, one new norm and one head for the photo, the object and the parts (Fig. 2). Images may have any size and aspect."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe = recipe
        self.encoder = common.vit(recipe.backbone, (recipe.encoder_size, recipe.encoder_size), drop_path=recipe.drop_path)
        self.encoder.norm = nn.Identity()  # the pretrained norm is dropped for a new one, so that the encoder can stay frozen (authors' code)
        dim = self.encoder.cls_token.shape[-1]
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if recipe.head == "mlp":
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, num_classes))
        else:
            first, second = nn.Linear(dim, dim, bias=False), nn.Linear(dim, num_classes, bias=False)
            self.head = nn.Sequential(nn.BatchNorm1d(dim), nn.Dropout(0.25), first, nn.ReLU(), nn.BatchNorm1d(dim), nn.Dropout(0.5), second)

    def encode(self, images, attend):
        """(B, 3, S, S) -> logits (B, K) and, if `attend`, the attention map (B, gh, gw)."""
        layers = []
        tokens = self.encoder.features(images, (lambda q, k: layers.append((q, k))) if attend else None)  # (B, N, C)
        logits = self.head(self.norm(tokens[:, 0]))
        return logits, attention_map(layers, self.encoder.grid, self.recipe.head_fusion) if attend else None

    def stages(self, images, locate=False):
        """Run the stages (Fig. 2): (B, 3, H, W) -> logits by stage, and what was seen on the way: maps, boxes and crops.

        With `locate` everything is found whatever the recipe's stages, for pictures.
        """
        r, size, logits, seen = self.recipe, self.recipe.encoder_size, {}, {}
        erasing = self.training and r.erase
        B, _, H, W = images.shape

        # a: the photo, small; photos that will be erased need a first pass, for their attention alone
        small = F.interpolate(images, (size, size), mode="nearest") if r.full_resize == "nearest" else F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        marked = (torch.rand(B, device=images.device) < r.erase_prob).nonzero()[:, 0] if erasing and "a" in r.stages else ()
        if len(marked):
            first = self.attention(small[marked])
            small = small.index_copy(0, marked, erase(small[marked], resize(first, size, size), r.erase_threshold, 1.0))
        if "a" in r.stages:
            logits["full"], seen["map"] = self.encode(small, attend=locate or r.stages != "a")
            if len(marked) and seen["map"] is not None:
                seen["map"] = seen["map"].index_copy(0, marked, first)
        else:
            seen["map"] = self.attention(small)
        if r.stages == "a" and not locate:
            return logits, seen

        # b: the object, cut out of the photo at full resolution
        seen["wide_map"] = resize(seen["map"], H, W)
        seen["box"] = object_box(seen["wide_map"], round(r.min_object_area * H * W), r.score, r.fallback, self.training)
        seen["object"] = crop(images, seen["box"], size)
        seen["object_map"] = crop(seen["wide_map"][:, None], seen["box"], size)[:, 0]
        if erasing:
            seen["object"] = erase(seen["object"], seen["object_map"], r.erase_threshold, r.erase_prob)
        if "b" in r.stages:
            logits["object"] = self.encode(seen["object"], attend=False)[0]
        if "c" not in r.stages and not locate:
            return logits, seen

        # c: its parts, all in one batch
        side = round(r.part_crop * size)
        found = part_boxes(resize(seen["object_map"], size // 3, size // 3), side, size, r.parts, r.part_iou, r.stride, r.score_pool)  # (B, P, 4) of the object image
        r1, c1, r2, c2 = seen["box"][:, None].unbind(2)
        scale = torch.stack([r2 - r1, c2 - c1] * 2, 2) / size
        seen["part_boxes"] = torch.stack([r1, c1, r1, c1], 2) + found * scale  # (B, P, 4) of the photo
        source, boxes = (images, seen["part_boxes"]) if r.part_source == "highres" else (seen["object"], found)
        parts = crop(source.repeat_interleave(r.parts, 0), boxes.flatten(0, 1), size)  # (B * P, 3, S, S)
        seen["parts"] = parts.unflatten(0, (B, r.parts))
        if "c" in r.stages:
            logits["parts"] = self.encode(parts, attend=False)[0].unflatten(0, (B, r.parts))
        return logits, seen

    @torch.no_grad()
    def attention(self, images):
        """A pass for the attention map alone: (B, 3, S, S) -> (B, gh, gw)."""
        found = self.encode(images, attend=True)[1]
        torch.clear_autocast_cache()  # else autocast would hand the weights that it cast here, without their graph, to the next pass
        return found

    def forward(self, images, targets=None):
        """(B, 3, H, W) -> logits (B, K); with targets (B,) -> (loss, terms)."""
        logits, _ = self.stages(images)
        if targets is None:
            return fuse(logits, self.recipe.fusion)
        loss, terms = joint_loss(logits, targets, self.recipe.label_smoothing, self.recipe.part_reduction)
        terms["top1"] = (fuse(logits, self.recipe.fusion).detach().argmax(1) == targets).float().mean()
        return loss, terms

    @torch.no_grad()
    def heads(self, images):
        """(B, 3, H, W) -> logits (B, K) of each stage and of their mean."""
        logits, _ = self.stages(images)
        names = list(logits) + ["mean"] * (len(logits) > 1)
        return {name: fuse(logits, name) for name in names}

    @torch.no_grad()
    def where(self, images):
        """(B, 3, H, W) -> the object's box, then its parts (B, 1 + P, 4), xyxy pixels of the photo; scores (B, 1 + P): the object's largest, a part's mean attention."""
        _, seen = self.stages(images, locate=True)
        boxes = torch.cat([seen["box"][:, None].float(), seen["part_boxes"]], 1)  # (B, 1 + P, 4) row, col
        inside = crop(seen["wide_map"].repeat_interleave(boxes.shape[1], 0)[:, None], boxes.flatten(0, 1), self.recipe.encoder_size).unflatten(0, boxes.shape[:2])
        scores = torch.cat([inside[:, :1].amax((2, 3, 4)), inside[:, 1:].mean((2, 3, 4))], 1)
        return boxes[..., [1, 0, 3, 2]], scores

    @torch.no_grad()
    def figure(self, images):
        """Figures 4 and 5 for each image: box, attention, image x attention, object and its map, what erasing leaves, parts."""
        _, seen = self.stages(images, locate=True)
        erased = erase(images, seen["wide_map"], self.recipe.erase_threshold, 1.0)
        pages = []
        for i, image in enumerate(images):
            photo, thing = common.to_pil(image, self.recipe.normalize), common.to_pil(seen["object"][i], self.recipe.normalize)
            weight = Image.fromarray((seen["wide_map"][i] * 255).byte().cpu().numpy()).convert("RGB")
            pictures = {
                "object box": common.draw_boxes(photo, seen["box"][i, [1, 0, 3, 2]][None], colours=("#ff2020",), width=max(2, photo.height // 100)),
                "attention": common.heat(photo, seen["map"][i], strength=1.0),
                "image x attention": ImageChops.multiply(photo, weight),
                "object": thing,
                "its attention": common.heat(thing, seen["object_map"][i], strength=1.0),
                f"erased above {self.recipe.erase_threshold:g}": common.to_pil(erased[i], self.recipe.normalize),
            }
            pictures |= {f"part {p + 1}": common.to_pil(part, self.recipe.normalize) for p, part in enumerate(seen["parts"][i])}
            pages.append(common.panels(list(pictures.values()), list(pictures)))
        return pages


def resize(maps, H, W):
    """Maps (B, h, w) -> (B, H, W), bilinear with corners on corners (authors' code)."""
    return F.interpolate(maps[:, None], (H, W), mode="bilinear", align_corners=True)[:, 0]


# ------------------------------------------------------------------------------------------------ build

# timm's weights of early 2021 at 384 pixels (ImageNet-21k, fine-tuned on ImageNet-1k), which the authors started from
VIT_BASE_384 = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/jx_vit_base_p16_384-83fb41ba.pth"


def build(recipe, num_classes):
    """The model, its encoder with pretrained weights (see common.load_vit); those of a run of ours bring norm and head along where they fit.

    Raises ValueError for settings that contradict each other.
    """
    uses = {"a": ["full"], "b": ["object"], "ab": ["full", "object"], "abc": ["full", "object", "parts"]}[recipe.stages]
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes: a classifier needs 2 at least; check the dataset's folders")
    if recipe.task != "classify":
        raise ValueError(f"--task {recipe.task}: the multi-stage ViT is for classification; use --method dcal for re-identification")
    if recipe.fusion not in (*uses, "mean"):
        raise ValueError(f"--fusion {recipe.fusion} needs a stage that --stages {recipe.stages} leaves out; use {', '.join(uses)} or mean, or other stages")
    if not len(recipe.phases) == len(recipe.head_lr) == len(recipe.encoder_lr) > 0 or min(recipe.phases) <= 0:
        raise ValueError(f"--phases {recipe.phases} --head-lr {recipe.head_lr} --encoder-lr {recipe.encoder_lr}: give one value for each phase, lengths above 0")
    for name, least, most in (("parts", 1, 99), ("stride", 1, recipe.encoder_size), ("fallback", 0.01, 1), ("part_iou", 0, 1), ("min_object_area", 0, 1), ("erase_prob", 0, 1),
                              ("part_crop", 1 / recipe.encoder_size, 1)):
        if not least <= getattr(recipe, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(recipe, name)} is out of range; use {least:g} to {most:g}")
    model = MultiStageViT(recipe, num_classes)
    if recipe.weights == "none":
        for layer in model.encoder.modules():
            if isinstance(layer, nn.Linear):  # Glorot's range as in Google's ViT: from scratch, a narrow encoder with timm's 0.02 stays at chance several times longer
                nn.init.xavier_uniform_(layer.weight)
    else:
        source = VIT_BASE_384 if recipe.weights == "default" and recipe.backbone == "vit_base" else recipe.weights
        held = common.load_vit(model.encoder, source)
        if "encoder.cls_token" in held:
            common.load_state(model, {k: v for k, v in held.items() if not k.startswith("encoder.")}, heads=("encoder.", "head."), source=source)
    return model


def param_groups(model, recipe):
    """Encoder, new norm and head, each with its peak learning rate in each phase; no weight decay on biases, norms, position and class token."""
    groups = []
    for module, factors in ((model.encoder, recipe.encoder_lr), (model.norm, recipe.head_lr), (model.head, recipe.head_lr)):
        phases = [(length, factor * recipe.lr) for length, factor in zip(recipe.phases, factors)]
        for decay in (True, False):
            params = [p for name, p in module.named_parameters() if (p.ndim > 1 and name not in ("cls_token", "pos_embed")) == decay]
            if params:
                groups.append({"params": params, "weight_decay": recipe.weight_decay if decay else 0.0, "phases": phases})
    return groups
