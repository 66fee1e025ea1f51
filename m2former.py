"""M2Former: Multi-Scale Patch Selection for Fine-Grained Visual Recognition.

Moon, Lee, Lee and Park, arXiv:2308.02161. Journal version, same title: Applied Sciences 14(19), 8710, 2024;
we had the arXiv text alone, all equations and numbers are its.

The idea: a multi-scale transformer has small patches in its early stages and large ones in its late stages.
After each stage keep the k patches with the highest mean activation (MSPS). The class token of the last
stage, which has heard of everything, is projected to each stage's width and joins its patches (CTT). One
block lets the stages interact, first over channels (CCA), then over positions (SCA). The class token of each
stage classifies, and all together.

Where to find it:
  Sec. 3.1  backbone             MViTv2; Table 6: SwinB, CvT; their .stages
  Sec. 3.2  MSPS, Eq. 1-3        merge_patches, select_patches, M2Former.select
  Sec. 3.3  CTT, Eq. 4-6         ClassTokenTransfer, M2Former.class_tokens, M2Former.interact
  Sec. 3.4  MSCA, Eq. 7          MSCA: Eq. 8-10 ChannelCrossAttention, Eq. 11-13 SpatialCrossAttention
  Sec. 3.5  Eq. 14-16            M2Former.forward, smooth_cross_entropy, M2Former.heads (Eq. 16)
  Figures   4; 5 and 6           figure_4; M2Former.figure, figures_5_6

Where this differs from the paper
  - Maps of an odd size: the last merged row or column averages fewer patches; k is at most the number of
    cells.
  - Ablations (Tables 3, 4, 7, 8), of which the authors' code has none. Without SCA each stage attends to its
    own tokens, with the same weights (Eq. 6's MSA). MSPS alone is one such block, with the class token
    attached as it is (Eq. 4); the plain backbone learns by cross-entropy. Fewer stages keep their own k and
    alpha. More MSCA blocks have their own weights. Without class tokens the mean is over normed tokens. All
    are our reading, and so is everything on Swin-B and CvT-21 (448 pixels for CvT, not stated).
  - Prediction: log(mean of the five softmax outputs); its argmax is that of Eq. 16, its softmax their mean.
  - Table 8's row of TransFG (91.7 large, 91.7 medium, 90.1 small, 91.3 in all) is another method's: not here.
  - Table 8 parts the objects at the quartiles of the test images; of which images, the paper does not say.
  - Figures 5 and 6 tint the patches and darken the rest, as the authors' code, in strengths of our own.
    Figure 6 shows the best patch of stage 4; the paper, some.
  - Scores (Eq. 2) are taken before any LayerNorm, as in the code; the paper names none. After a fresh one
    all of them would be zero.
Where the paper and the authors' code differ
  - k. Paper: {k1..k4} = {6, 18, 54, 162}, in Sec. 4.4.3 with 8 for 18. Code: {162, 54, 18, 6}, as the text
    wants (many small patches), and as 162 > 49 cells. We: code.
  - Eq. 8 divides by k, Eq. 15 by n. Code: by k + 1 and n - 1, which makes a mean and a distribution. We:
    code.
  - Eq. 13 has no LayerNorm, residual or FFN (Eq. 4 has the FFN), and no number of heads. Code: a pre-norm
    block with both residuals, 8 heads, d = c_last. Eq. 5, 9, 11 and 13 have no biases, Sec. 3.5 no LayerNorm
    before the classifiers; the code has. We: code.
  - Relative positions at 448. Code: the pretrained tables are dropped for new ones. We: interpolated;
    --rel-pos reinit is the code.
  - Warm-up of 500 steps, clipping at 1.0 and stochastic depth are the code's alone. Its scheduler steps
    first, so that update m = 1..10000 has lr(m); ours, m = 0..9999.
  - Code: the best test score of 100 evaluations is kept. We: the last step.
  - BatchNorm (Eq. 5, 9): the code's three GPUs see 6, 6 and 4 images; one process sees all 16. With torchrun
    each process has its own statistics, with --accumulate each part: they equal one process, or one part,
    only without it and without random draws, as with --ctt mlp1 --no-cca --drop-path 0, and not on CvT.

  python train.py --method m2former                                     # toy birds, a CPU and some minutes
  python train.py --method m2former --data cub --root DIR               # Table 1
  python train.py table --method m2former --table 3 --data toy --seeds 0,1,2
  python train.py table --method m2former --table 6 --root DIR --row-weights "CvT-21=FILE,CvT-21 MSPS=FILE"
  python -c "import data, m2former as m; m.figure_4(
      data.load('cub', 'DIR', m.CUB).test, data.open_photo).save('figure_4.png')"
"""
import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import SwinTransformer
from torchvision.ops import StochasticDepth

import common
from common import Mlp, Table, opt

MVIT = "https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_"
SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
BACKBONES = {  # name -> official weights; no hashes are published, L_in1k has other widths
    "mvitv2_tiny": f"{MVIT}T_in1k.pyth",  # ImageNet-1k, without a class token, as of small
    "mvitv2_small": f"{MVIT}S_in1k.pyth",
    "mvitv2_base": f"{MVIT}B_in21k.pyth",
    "mvitv2_large": f"{MVIT}L_in21k.pyth",
    "mvitv2_toy": "",  # our choice
    "swin_base": f"{SWIN}swin_base_patch4_window12_384_22k.pth",
    "cvt21": "",  # on Microsoft's OneDrive, by hand: CvT-21-384x384-IN-22k.pth
}

# -------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """The paper's switches. Tuples begin at the finest stage; of three stages: first of k, last of alpha."""

    backbone: str = opt("mvitv2_base", "multi-scale transformer (Sec. 4.2, Table 6)", tuple(BACKBONES))
    rel_pos: str = opt("interpolate", "tables of other sizes; reinit: their code", ("interpolate", "reinit"))
    attention: str = opt("auto", "form of MViTv2's attention, same numbers", ("auto", "folded", "explicit"))
    msps: bool = opt(True, "patch selection (Sec. 3.2); off: the plain backbone (Table 3)")
    stages: tuple[int, ...] = opt((1, 2, 3, 4), "stages that select; 1 is the finest (Table 8)", (), 1, 4)
    k: tuple[int, ...] = opt((162, 54, 18, 6), "patches selected in each stage (Eq. 3, Sec. 4.2)", (), 1)
    merge: int = opt(2, "r: r x r patches are averaged before selection (Sec. 3.2)", (), 1)
    ctt: str = opt("mlp2", "class token: Eq. 5, one layer, Eq. 4, none", ("mlp2", "mlp1", "attach", "pool"))
    cca: bool = opt(True, "channel cross-attention (Sec. 3.4.1)")
    sca: bool = opt(True, "spatial cross-attention (Sec. 3.4.2); off: within each stage")
    num_msca: int = opt(1, "blocks of multi-scale cross-attention (Table 4)", (), 1)
    alpha: tuple[float, ...] = opt((0.6, 0.7, 0.8, 0.9, 1.0), "target of the truth (Eq. 15)", (), 0, 1)

CUB = Recipe(  # Sec. 4.2; warm-up, clipping, fp32 and stochastic depth are the authors' code
    image_size=(448, 448), resize=(600, 600), batch_size=16, iterations=10_000, optimizer="sgd", lr=0.03,
    momentum=0.9, weight_decay=0.0, schedule="cosine", warmup=500, grad_clip=1.0, drop_path=0.3, amp="off",
    weights="default",
)
RECIPES = {
    "cub": CUB,
    "nabirds": CUB,
    "folder": replace(CUB, iterations=0, epochs=27, warmup=1.35),  # what 10,000 steps are on CUB
    "toy": replace(  # our choice; on scenes it is still at chance after 6 epochs
        CUB, backbone="mvitv2_toy", image_size=(64, 64), resize=(0, 0), k=(12, 4, 2, 1), weights="none",
        toy_preset="birds-easy", boxes=True, iterations=0, epochs=12, warmup=0, batch_size=32,
        optimizer="adamw", lr=1.5e-3, weight_decay=0.05, schedule="onecycle", drop_path=0.0,
    ),
}

# -------------------------------------------------------------------------------------- tables

PLAIN = {"msps": False}
ONLY_MSPS = {"ctt": "attach", "cca": False, "sca": False}
ONLY_CTT = {"cca": False, "sca": False}
CVT_21 = {"backbone": "cvt21", "drop_path": 0.1}
SWIN_B = {
    "backbone": "swin_base", "ctt": "pool", "image_size": (384, 384), "resize": (510, 510), "drop_path": 0.2,
}
TABLES = {
    "baseline": Table("M2Former and its plain backbone", "cub", "top1", (
        ("plain MViTv2", PLAIN, 91.6),
        ("M2Former", {}, 92.4),
    )),
    "toy": Table("Modules on toy birds", "toy", "top1", (
        ("plain MViTv2", PLAIN, None),
        ("MSPS", ONLY_MSPS, None),
        ("MSPS + CTT", ONLY_CTT, None),
        ("all", {}, None),
    )),
    "1": Table("Table 1: CUB", "cub", "top1", (("M2Former", {}, 92.4),)),
    "2": Table("Table 2: NABirds", "nabirds", "top1", (("M2Former", {}, 91.1),)),
    "3": Table("Table 3: modules", "cub", "top1", (
        ("(a) MViTv2-B", PLAIN, 91.6),
        ("(b) MSPS", ONLY_MSPS, 91.6),
        ("(c) MSPS + CTT", ONLY_CTT, 92.1),
        ("(d) MSPS + CTT + CCA", {"sca": False}, 92.2),
        ("(e) MSPS + CTT + SCA", {"cca": False}, 92.1),
        ("(f) all", {}, 92.4),
    )),
    "4": Table("Table 4: MSCA blocks", "cub", "top1", (
        ("1", {"num_msca": 1}, 92.4),
        ("2", {"num_msca": 2}, 92.1),
        ("3", {"num_msca": 3}, 92.2),
        ("4", {"num_msca": 4}, 92.2),
    )),
    "5": Table("Table 5: selected patches, stage 4 to 1", "cub", "top1", (
        ("6, 8, 10, 12", {"k": (12, 10, 8, 6)}, 92.2),
        ("6, 12, 24, 48", {"k": (48, 24, 12, 6)}, 92.2),
        ("6, 18, 54, 162", {"k": (162, 54, 18, 6)}, 92.4),
        ("7, 28, 112, 448", {"k": (448, 112, 28, 7)}, 92.1),
    )),
    "6": Table("Table 6: backbones", "cub", "top1", (
        ("CvT-21", CVT_21 | PLAIN, 89.3),
        ("CvT-21 MSPS", CVT_21, 90.0),
        ("Swin-B", SWIN_B | PLAIN, 90.6),
        ("Swin-B MSPS", SWIN_B, 91.3),
    )),
    "7": Table("Table 7: class tokens", "cub", "top1", (
        ("global pool", {"ctt": "pool"}, 91.5),
        ("simple attach", {"ctt": "attach"}, 91.9),
        ("CTT with 1 layer", {"ctt": "mlp1"}, 92.1),
        ("CTT with 2 layers", {"ctt": "mlp2"}, 92.4),
    )),
    "8": Table("Table 8: stages (its TransFG is not ours)", "cub", "large medium small top1", (
        ("none", PLAIN, (92.3, 91.8, 90.5, 91.6)),
        ("4", {"stages": (4,)}, (91.9, 91.7, 90.6, 91.5)),
        ("3, 4", {"stages": (3, 4)}, (92.9, 91.9, 90.8, 91.9)),
        ("2, 3, 4", {"stages": (2, 3, 4)}, (92.9, 92.4, 91.4, 92.3)),
        ("all", {}, (92.9, 92.6, 91.4, 92.4)),
    )),
}

# -------------------------------------------------------------------------------------- MSPS (Sec. 3.2)


def merge_patches(maps, r):
    """Average r x r neighbouring patches (Sec. 3.2): (B, C, H, W) -> (B, C, ceil(H / r), ceil(W / r))."""
    return F.avg_pool2d(maps, r, ceil_mode=True, count_include_pad=False)


def select_patches(tokens, k):
    """The k tokens with the highest mean activation (Eq. 1-3), best first; k is at most N.

    (B, N, C) -> the tokens (B, k, C) and their numbers (B, k).
    """
    scores = tokens.float().mean(2)  # Eq. 2; after a fresh LayerNorm all of them would be zero
    indices = scores.topk(min(k, tokens.shape[1]), 1).indices
    return common.take(tokens, indices), indices  # Eq. 3


# -------------------------------------------------------------------------------------- CTT (Sec. 3.3)


class ClassTokenTransfer(nn.Sequential):
    """The global class token in a stage's width (Eq. 5); mlp1: Table 7. (B, c_last) -> (B, c_i)."""

    def __init__(self, dim, dim_out, kind="mlp2"):
        hidden = 2 * dim_out
        if kind == "mlp1":
            super().__init__(nn.Linear(dim, dim_out))
        else:
            norm = nn.BatchNorm1d(hidden), nn.ReLU()
            super().__init__(nn.Linear(dim, hidden), *norm, nn.Linear(hidden, dim_out))


# -------------------------------------------------------------------------------------- MSCA (Sec. 3.4)


class ChannelCrossAttention(nn.Module):
    """Gate each stage's channels by what all stages hold (Eq. 8-10): list of (B, N_i, c_i) -> same shapes."""

    def __init__(self, dims):
        super().__init__()
        self.dims, c, half = list(dims), sum(dims), sum(dims) // 2
        self.gate = nn.Sequential(
            nn.Linear(c, half), nn.BatchNorm1d(half), nn.ReLU(), nn.Linear(half, c), nn.Sigmoid()
        )

    def forward(self, tokens):
        descriptors = torch.cat([t.mean(1) for t in tokens], 1)  # Eq. 8, over k + 1 tokens
        gates = self.gate(descriptors).split(self.dims, 1)  # Eq. 9
        return [t * gate[:, None] + t for t, gate in zip(tokens, gates)]  # Eq. 10


class SpatialCrossAttention(nn.Module):
    """Tokens of each stage attend to those of all stages (Eq. 11-13); across=False: to those of their own.

    List of (B, N_i, c_i) -> the same shapes; N is the sum of all N_i.
    """

    def __init__(self, dims, dim, across=True):
        super().__init__()
        self.across = across
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(c, dim) for c in dims) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(dim, c) for c in dims)

    def project(self, layers, tokens):
        """One of Q, K, V of every stage (Eq. 11), joined (Eq. 12) -> (B, h, N, d)."""
        joined = torch.cat([layer(t) for layer, t in zip(layers, tokens)], 1)
        return joined.unflatten(2, (8, -1)).transpose(1, 2)  # 8 heads (authors' code)

    def forward(self, tokens, visit=None):
        """`visit(q, k)` is given the queries and keys (B, h, N, d)."""
        q, k, v = (self.project(layers, tokens) for layers in (self.q, self.k, self.v))
        if visit is not None:
            visit(q, k)
        lengths, mask = [t.shape[1] for t in tokens], None
        if not self.across:
            mask = torch.block_diag(*(torch.ones(n, n, device=q.device) for n in lengths)).bool()
        attended = F.scaled_dot_product_attention(q, k, v, mask)  # Eq. 13, the queries of all stages at once
        attended = attended.transpose(1, 2).flatten(2).split(lengths, 1)  # list of (B, N_i, h * d)
        return [layer(a) for layer, a in zip(self.out, attended)]


class MSCA(nn.Module):
    """Multi-scale cross-attention (Eq. 7): CCA, then SCA and FFN, both pre-norm and residual."""

    def __init__(self, dims, dim, cca=True, sca=True):
        super().__init__()
        self.cca = ChannelCrossAttention(dims) if cca else nn.Identity()
        self.sca = SpatialCrossAttention(dims, dim, across=sca)
        self.ffn = nn.ModuleList(Mlp(c, 4 * c) for c in dims)
        self.norm_attn = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in dims)
        self.norm_ffn = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in dims)

    def forward(self, tokens, visit=None):
        tokens = self.cca(tokens)
        attended = self.sca([norm(t) for norm, t in zip(self.norm_attn, tokens)], visit)
        tokens = [t + a for t, a in zip(tokens, attended)]
        return [t + ffn(norm(t)) for t, ffn, norm in zip(tokens, self.ffn, self.norm_ffn)]


# -------------------------------------------------------------------------------------- loss (Sec. 3.5)


def smooth_cross_entropy(logits, targets, alpha):
    """Cross-entropy, alpha on the true class, the rest on the others (Eq. 14-15): (B, n), (B,) -> scalar."""
    other = (1 - alpha) / (logits.shape[1] - 1)  # paper: / n, which does not sum to 1
    soft = torch.full_like(logits, other, dtype=torch.float32).scatter(1, targets[:, None], alpha)  # Eq. 15
    return F.cross_entropy(logits.float(), soft)


# -------------------------------------------------------------------------------------- model


class M2Former(nn.Module):
    """Backbone, MSPS at the chosen stages, CTT, MSCA, a classifier for each stage and one for all."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe = recipe
        self.backbone = make_backbone(recipe, 0 if recipe.msps else num_classes)
        dims, stages = self.backbone.dims, len(self.backbone.dims)
        self.chosen = [s for s in range(stages) if s + 1 in recipe.stages]  # 0-based
        check(recipe, self.chosen, stages)
        *alpha, con = recipe.alpha[-stages - 1 :]
        self.alpha = {"y": con}  # of each classifier
        if not recipe.msps:
            return
        self.alpha = {f"y{s + 1}": alpha[s] for s in self.chosen} | {"con": con}
        widths = [dims[s] for s in self.chosen]
        lower = [dims[s] for s in self.chosen if "mlp" in recipe.ctt and s < stages - 1]
        self.ctt = nn.ModuleList(ClassTokenTransfer(dims[-1], c, recipe.ctt) for c in lower)
        self.msca = nn.ModuleList(
            MSCA(widths, dims[-1], recipe.cca, recipe.sca) for _ in range(recipe.num_msca)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in widths)
        self.stage_heads = nn.ModuleList(nn.Linear(c, num_classes) for c in widths).apply(trunc_normal)
        self.head_con = nn.Linear(sum(widths), num_classes).apply(trunc_normal)

    def select(self, images):
        """MSPS at the chosen stages (Eq. 1-3), finest first.

        -> the backbone's stages, patches (B, k, C) of each, best first, their boxes (B, k, 4) in the images.
        """
        (H, W), taps, patches, boxes = images.shape[2:], self.backbone.stages(images), [], []
        for s in self.chosen:
            maps = merge_patches(taps[s][0], self.recipe.merge)
            best, cells = select_patches(maps.flatten(2).transpose(1, 2), self.recipe.k[s])
            grid, side = maps.shape[2:], 4 * 2**s * self.recipe.merge  # of merged patches; of one, in pixels
            found = common.cells_to_boxes(cells, grid, [n * side for n in grid])
            patches.append(best)
            boxes.append(found.minimum(found.new_tensor([W, H, W, H])))  # an odd grid reaches over the edge
        return taps, patches, boxes

    def class_tokens(self, taps):
        """The class token of each chosen stage: list of (B, 1, c_i), finest first; pool: (B, 0, c_i)."""
        transferred = [transfer(taps[-1][1][:, 0])[:, None] for transfer in self.ctt]  # Eq. 5, of CLS_g
        own = [taps[s][1] for s in self.chosen]  # Eq. 4; that of the last stage is CLS_g itself
        return transferred + own[len(transferred) :]

    def interact(self, taps, patches, visit=None):
        """Class token and patches of each stage (Eq. 4, 6) through MSCA (Eq. 7): list of (B, 1 + k, c_i)."""
        tokens = [torch.cat(pair, 1) for pair in zip(self.class_tokens(taps), patches)]
        for block in self.msca:
            tokens = block(tokens, visit)
        return tokens

    def heads(self, images):
        """Logits (B, K) of each classifier (Sec. 3.5), y1 .. y4 and con, and of all; plain backbone: of y."""
        if not self.recipe.msps:
            return {"y": self.backbone(images)}
        taps, patches, _ = self.select(images)
        tokens = [norm(t) for norm, t in zip(self.norms, self.interact(taps, patches))]
        features = [t.mean(1) if self.recipe.ctt == "pool" else t[:, 0] for t in tokens]
        logits = [head(f) for head, f in zip(self.stage_heads, features)]
        logits.append(self.head_con(torch.cat(features, 1)))
        return dict(zip(self.alpha, logits), all=common.fuse(logits))  # Eq. 16

    def forward(self, images, targets=None):
        """(B, 3, H, W) -> logits (B, K); with targets (B,): the loss (Eq. 14), and its terms."""
        logits = self.heads(images)
        answer = logits["all" if self.recipe.msps else "y"]
        if targets is None:
            return answer
        losses = {name: smooth_cross_entropy(logits[name], targets, a) for name, a in self.alpha.items()}
        terms = {name: loss.detach() for name, loss in losses.items()}
        return sum(losses.values()), terms | {"top1": (answer.argmax(1) == targets).float().mean()}

    def where(self, images):
        """Selected patches, coarsest stage first: boxes (B, n, 4), mean activations (B, n).

        Scores fall within a stage. Selection has no weights: the plain backbone (msps=False) answers too.
        """
        common.check_images(images, self.recipe.image_size)
        _, patches, boxes = self.select(images)
        return torch.cat(boxes[::-1], 1), torch.cat([p.float().mean(2) for p in patches[::-1]], 1)

    def attention(self, taps, patches):
        """Figure 6: weights of the coarsest stage's best patch for the patches of each: list of (B, k)."""
        layers, lengths = [], [p.shape[1] for p in patches]
        tokens = self.interact(taps, patches, lambda q, k: layers.append((q, k)))
        weights = common.attention_weights(*layers[-1])[:, -lengths[-1]]  # (B, N), mean of heads
        by_stage = weights.split([t.shape[1] for t in tokens], 1)
        return [w[:, -n:] for w, n in zip(by_stage, lengths)]  # without the class tokens

    def figure(self, images):
        """Figure 5 of each image, below it Figure 6 where stages attend to each other: list of PIL images."""
        taps, patches, boxes = self.select(images)
        attention = []
        if self.recipe.msps and self.recipe.sca and len(patches) > 1:
            attention = self.attention(taps, patches)
        names = [f"stage {s + 1}" for s in self.chosen]
        pages = []
        for i, image in enumerate(images):
            photo, own = common.to_pil(image, self.recipe.normalize), [b[i] for b in boxes[::-1]]
            pages.append(figures_5_6(photo, names[::-1], own, [a[i] for a in attention[::-1]]))
        return pages


def check(recipe, chosen, stages):
    """Refuse switches that do not fit a backbone of so many stages, or its class tokens."""
    if not chosen or len(recipe.k) < stages or len(recipe.alpha) <= stages:
        given = f"--stages {recipe.stages} --k {recipe.k} --alpha {recipe.alpha}"
        wanted = f"some of stages 1 to {stages}, {stages} numbers for --k, {stages + 1} for --alpha"
        raise ValueError(f"{given}: {recipe.backbone} wants {wanted}")
    fitting = {"swin_base": "pool", "cvt21": "mlp2 mlp1 pool"}.get(recipe.backbone, recipe.ctt)
    if recipe.msps and recipe.ctt not in fitting.split():
        raise ValueError(f"--ctt {recipe.ctt}: {recipe.backbone} has no such token; use one of: {fitting}")
    if recipe.label_smoothing:
        raise ValueError("--label-smoothing: it is --alpha here (Eq. 15); set --label-smoothing 0")


# -------------------------------------------------------------------------------------- figures


def paint(photo, boxes, colour, strength):
    """A darkened photo with boxes (k, 4) tinted in a colour, by strengths (k,) in [0, 1] -> PIL image."""
    mask = Image.new("L", photo.size)
    for box, s in zip(boxes.int().tolist(), strength.tolist()):
        mask.paste(round(255 * s), tuple(box))
    tinted = Image.blend(photo, Image.new("RGB", photo.size, colour), 0.25)
    return Image.composite(tinted, photo.point(lambda value: value / 3), mask)


def figure_4(split, open_photo):
    """Large, medium and small objects of a Split with boxes, a row each; open_photo(path, upright) -> PIL."""
    order = np.prod(split.boxes[:, 2:] - split.boxes[:, :2], 1).argsort()[::-1]
    quarter, rows = len(order) // 4, []  # quartiles (Sec. 4.5.2)
    for name, own in zip(("large", "medium", "small"), np.split(order, [quarter, -quarter])):
        shown = own[len(own) // 2 :][:4]
        photos = [open_photo(split.paths[i], split.upright) for i in shown]
        photos = [common.draw_boxes(photo, split.boxes[i : i + 1]) for photo, i in zip(photos, shown)]
        rows.append(common.panels(photos, 4 * [name]))
    return common.stack(rows)


def figures_5_6(photo, names, boxes, attention):
    """Figure 5: the photo and, coarsest first, each stage's selected patches, boxes (k, 4), in red.

    Figure 6 below it: the coarsest stage's best patch in red, and the other stages' in orange, as bright as
    the attention (k,) that it pays to each, relative to the strongest of the stage.
    """
    red = [paint(photo, own, "red", torch.ones(len(own))) for own in boxes]
    rows = [common.panels([photo, *red], ["input", *names])]
    if attention:
        patch = paint(photo, boxes[0][:1], "red", torch.ones(1))
        orange = [paint(photo, own, "orange", a / a.max()) for own, a in zip(boxes[1:], attention[1:])]
        captions = [f"a patch of {names[0]}", *(f"its attention, {name}" for name in names[1:])]
        rows.append(common.panels([patch, *orange], captions))
    return common.stack(rows)


# -------------------------------------------------------------------------------------- MViTv2


class Backbone(nn.Module):
    """What MViTv2 and CvT share.

    stages(images): (B, 3, H, W) -> for each stage its last map (B, C, H', W'), before any norm, and its class
    token (B, 1, C), or (B, 0, C) where there is none.
    """

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, K), from the class token or the mean of the patches."""
        maps, class_token = self.stages(images)[-1]
        tokens = class_token if class_token.shape[1] else maps.flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens).mean(1))


def split_tokens(tokens, grid):
    """Tokens (B, N, C) -> class token (B, 1 or 0, C) and patches as a map (B, C, *grid), channels_last."""
    first = tokens.shape[1] - math.prod(grid)
    return tokens[:, :first], tokens[:, first:].transpose(1, 2).unflatten(2, grid)


def join_tokens(class_token, maps):
    """The inverse of split_tokens; class_token (1 or B, 1 or 0, C), or None."""
    tokens = maps.flatten(2).transpose(1, 2)
    return tokens if class_token is None else torch.cat([class_token.expand(len(maps), -1, -1), tokens], 1)


def trunc_normal(module):
    """Initial weights of MViTv2's, CvT's and the classifiers' linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def resize_rel_pos(table, rows):
    """A table of relative positions, interpolated: (n, d) -> (rows, d)."""
    if len(table) == rows:
        return table
    return F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T


def distances(table, queries, keys):
    """The table's row for each pair of positions on an axis, on the finer grid -> (queries, keys, d)."""
    q = torch.arange(queries, device=table.device) * max(keys / queries, 1.0)
    k = torch.arange(keys, device=table.device) * max(queries / keys, 1.0)
    index = q[:, None] - k + k[-1]
    return resize_rel_pos(table, 2 * max(queries, keys) - 1)[index.long()]


def position_products(q, tables, q_grid, k_grid):
    """Queries (B, h, N, d) times both tables -> (B, h, N, kh), (B, h, N, kw); 0 for the class token."""
    class_token = q.shape[2] - math.prod(q_grid)
    patches = q[:, :, class_token:].unflatten(2, q_grid)
    rows, columns = (distances(table, a, b) for table, a, b in zip(tables, q_grid, k_grid))
    by_row = torch.einsum("bnyxd,yvd->bnyxv", patches, rows)
    by_column = torch.einsum("bnyxd,xwd->bnyxw", patches, columns)
    return (F.pad(x.flatten(2, 3), (0, 0, class_token, 0)) for x in (by_row, by_column))


def attend_explicit(q, k, v, by_row, by_column):
    """softmax(q k^T / sqrt(d) + bias) v, the bias written out (authors' code); q, k, v (B, h, N, d)."""
    bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(3)  # (B, h, N, kh * kw)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores + F.pad(bias, (k.shape[2] - bias.shape[3], 0))).softmax(-1) @ v


def attend_folded(q, k, v, by_row, by_column):
    """The same, without an N x N tensor.

    The bias of query i and key j is by_row[i, row of j] + by_column[i, column of j]: the product of both with
    a one-hot code of j's row and column. So append the former to the scaled query and the code to the key,
    and the plain dot product of the two is the biased score, exactly. Any fused attention kernel can then
    work through it in tiles, and keeps only its output for backward. The class token gets zeros, hence no
    bias. Fused kernels want q, k and v of one width, so v is padded with zeros, which come out as zeros.
    """
    d, kh, kw = q.shape[3], by_row.shape[3], by_column.shape[3]
    rows, columns = (torch.eye(n, device=k.device, dtype=k.dtype) for n in (kh, kw))
    codes = torch.cat([rows.repeat_interleave(kw, 0), columns.repeat(kh, 1)], 1)  # (kh * kw, kh + kw)
    codes = F.pad(codes, (0, 0, k.shape[2] - kh * kw, 0)).expand(*k.shape[:2], -1, -1)
    q, k = torch.cat([q * d**-0.5, by_row, by_column], -1), torch.cat([k, codes], -1)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, kh + kw)), scale=1.0)[..., :d]


class PoolingAttention(nn.Module):
    """Attention with pooled queries, keys and values, and decomposed relative positions (MViTv2)."""

    def __init__(self, dim, dim_out, heads, q_stride, kv_stride, grid, form):
        super().__init__()
        self.heads, self.form, d = heads, form, dim_out // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim_out), nn.Linear(dim_out, dim_out)
        for name, stride in zip("qkv", (q_stride, kv_stride, kv_stride)):
            setattr(self, f"pool_{name}", nn.Conv2d(d, d, 3, stride, 1, groups=d, bias=False))
            setattr(self, f"norm_{name}", nn.LayerNorm(d, eps=1e-6))
        rows = [2 * -(-side // min(q_stride, kv_stride)) - 1 for side in grid]  # the finer grid
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(n, d)) for n in rows)

    def pool(self, tokens, grid, name):
        """(B, N, C) -> (B, h, N', d), its grid; the class token passes by the convolution, not the norm."""
        conv, norm = getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")
        class_token, maps = split_tokens(tokens, grid)
        weight = conv.weight.repeat(self.heads, 1, 1, 1)  # one kernel for all heads
        maps = F.conv2d(maps, weight, stride=conv.stride, padding=1, groups=len(weight))
        heads = join_tokens(class_token, maps).unflatten(2, (self.heads, -1))  # (B, N', h, d)
        return norm(heads).to(tokens.dtype).transpose(1, 2), maps.shape[2:]  # autocast: norms in fp32

    def forward(self, x, grid):
        pooled = [self.pool(t, grid, name) for t, name in zip(self.qkv(x).chunk(3, -1), "qkv")]
        (q, q_grid), (k, k_grid), (v, _) = pooled
        by_row, by_column = position_products(q, (self.rel_pos_h, self.rel_pos_w), q_grid, k_grid)
        large = q.is_cuda or q.shape[2] * k.shape[2] > 2**18  # scores outgrow a CPU's cache
        folded = large if self.form == "auto" else self.form == "folded"
        out = (attend_folded if folded else attend_explicit)(q, k, v, by_row, by_column)
        class_token = q.shape[2] - math.prod(q_grid)
        out = out + F.pad(q[:, :, class_token:], (0, 0, class_token, 0))  # residual pooling, of patches only
        return self.proj(out.transpose(1, 2).flatten(2)), q_grid


class Block(nn.Module):
    """Transformer block: tokens (B, N, dim) of a grid -> (B, N', dim_out) and their grid.

    attn: from dim to dim_out; may pool the queries by `stride`. Where the width grows, so does the skip path.
    """

    def __init__(self, attn, dim, dim_out, drop_path, stride=1, eps=1e-6, activation=F.gelu):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim_out, eps)
        self.attn, self.mlp = attn, Mlp(dim_out, 4 * dim_out, activation=activation)
        self.proj = nn.Linear(dim, dim_out) if dim_out != dim else None
        self.stride, self.drop_path = stride, StochasticDepth(drop_path, "row")

    def forward(self, x, grid):
        u = self.norm1(x)
        attended, q_grid = self.attn(u, grid)
        skip = self.proj(u) if self.proj else x
        if self.stride > 1:
            class_token, maps = split_tokens(skip, grid)
            skip = join_tokens(class_token, F.max_pool2d(maps, 3, self.stride, 1))
        x = skip + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), q_grid


class MViTv2(Backbone):
    """MViTv2 under the official parameter names. num_classes=0: no final norm and no head, for stages() only.

    depths: blocks in each stage; dim, heads: of the first stage, both double from stage to stage; drop_path:
    of the last block.
    """

    def __init__(self, depths, dim, heads, image_size, num_classes, class_token=True, drop_path=0.0,
                 attention="auto"):
        super().__init__()
        self.dims = [dim * 2**s for s in range(len(depths))]
        self.ends = np.cumsum(depths).tolist()  # how many blocks there are up to the end of each stage
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, 7, 4, 3)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.blocks, before = nn.ModuleList(), 0
        stages = [s for s, depth in enumerate(depths) for _ in range(depth)]
        for stage, rate in zip(stages, np.linspace(0, drop_path, len(stages))):
            width, dim_out, stride = self.dims[before], self.dims[stage], 2 if stage > before else 1
            grid = [-(-side // (4 * 2**before)) for side in image_size]  # rounded up, as convolutions do
            strides = stride, max(1, 4 // 2**stage)  # of queries; of keys and values
            attn = PoolingAttention(width, dim_out, heads * 2**stage, *strides, grid, attention)
            self.blocks.append(Block(attn, width, dim_out, rate, stride))
            before = stage
        if num_classes:
            self.norm = nn.LayerNorm(self.dims[-1], eps=1e-6)
            self.head = nn.Sequential(OrderedDict(projection=nn.Linear(self.dims[-1], num_classes)))
        self.apply(trunc_normal)
        for name, p in self.named_parameters():
            if name == "cls_token" or "rel_pos" in name:
                nn.init.trunc_normal_(p, std=0.02)

    def stages(self, images):
        maps = self.patch_embed(images)
        x, grid, taps = join_tokens(self.cls_token, maps), maps.shape[2:], []  # a class token has no position
        for i, block in enumerate(self.blocks, 1):
            x, grid = block(x, grid)
            if i in self.ends:
                taps.append(split_tokens(x, grid)[::-1])
        return taps


VARIANTS = {  # depths, dim, heads
    "tiny": ((1, 2, 5, 2), 96, 1),
    "small": ((1, 2, 11, 2), 96, 1),
    "base": ((2, 3, 16, 3), 96, 1),
    "large": ((2, 6, 36, 4), 144, 2),
    "toy": ((1, 1, 2, 1), 16, 1),
}


def mvitv2(variant, image_size, num_classes, class_token=True, drop_path=0.0, attention="auto"):
    """MViTv2 of a published size."""
    return MViTv2(*VARIANTS[variant], image_size, num_classes, class_token, drop_path, attention)


# -------------------------------------------------------------------------------------- Swin-B and CvT-21


class SwinB(SwinTransformer):
    """torchvision's Swin-B, window 12 as the 22K weights, tapped before merging; no class token."""

    dims = (128, 256, 512, 1024)

    def __init__(self, num_classes, drop_path=0.0):
        shape = [4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [12, 12]
        super().__init__(*shape, stochastic_depth_prob=drop_path, num_classes=max(1, num_classes))
        if not num_classes:
            self.norm = self.head = nn.Identity()

    def stages(self, images):
        """As Backbone's."""
        taps, x = [], images
        for i, layer in enumerate(self.features):
            x = layer(x)  # (B, H', W', C)
            if i % 2:  # 0 is the stem, 2, 4 and 6 merge patches
                taps.append((x.permute(0, 3, 1, 2), x[:, 0, :0]))
        return taps


class ConvAttention(nn.Module):
    """Attention, its inputs from depthwise convolutions, BatchNorm and linear layers (CvT)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.proj = heads, nn.Linear(dim, dim)
        for name, stride in zip("qkv", (1, 2, 2)):
            conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
            setattr(self, f"conv_proj_{name}", nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim))))
            setattr(self, f"proj_{name}", nn.Linear(dim, dim))

    def forward(self, x, grid):
        class_token, maps = split_tokens(x, grid)
        heads = []
        for name in "qkv":
            conv, linear = getattr(self, f"conv_proj_{name}"), getattr(self, f"proj_{name}")
            tokens = linear(join_tokens(class_token, conv(maps)))  # the class token passes by the convolution
            heads.append(tokens.unflatten(2, (self.heads, -1)).transpose(1, 2))  # (B, h, N', d)
        out = F.scaled_dot_product_attention(*heads, scale=x.shape[2] ** -0.5)  # all the width, not d
        return self.proj(out.transpose(1, 2).flatten(2)), grid


def quick_gelu(x):
    """CvT's approximation of GELU (authors' code)."""
    return x * torch.sigmoid(1.702 * x)


class ConvStage(nn.Module):
    """Stage of CvT: convolution, LayerNorm, blocks; a class token may join. Map -> map and class token."""

    def __init__(self, dim_in, dim, depth, kernel, stride, padding, class_token=False, drop_path=0.0):
        super().__init__()
        conv = nn.Conv2d(dim_in, dim, kernel, stride, padding)
        self.patch_embed = nn.ModuleDict({"proj": conv, "norm": nn.LayerNorm(dim)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if class_token else None
        self.blocks = nn.ModuleList()
        for rate in np.linspace(0, drop_path, depth):
            attn = ConvAttention(dim, dim // 64)
            self.blocks.append(Block(attn, dim, dim, rate, 1, 1e-5, quick_gelu))

    def forward(self, maps):
        maps = self.patch_embed["proj"](maps)
        grid = maps.shape[2:]
        maps = self.patch_embed["norm"](maps.movedim(1, -1)).movedim(-1, 1)
        x = join_tokens(self.cls_token, maps)
        for block in self.blocks:
            x, grid = block(x, grid)
        return split_tokens(x, grid)[::-1]


class CvT(Backbone):
    """CvT-21 under the official parameter names: three stages, a class token in the last, no positions."""

    dims = (64, 192, 384)

    def __init__(self, num_classes, class_token=True, drop_path=0.1):
        super().__init__()
        self.stage0 = ConvStage(3, 64, 1, 7, 4, 2)
        self.stage1 = ConvStage(64, 192, 4, 3, 2, 1)
        self.stage2 = ConvStage(192, 384, 16, 3, 2, 1, class_token, drop_path)
        if num_classes:
            self.norm, self.head = nn.LayerNorm(384), nn.Linear(384, num_classes)
        self.apply(trunc_normal)

    def stages(self, images):
        fine = self.stage0(images)
        middle = self.stage1(fine[0])
        return [fine, middle, self.stage2(middle[0])]


def make_backbone(recipe, num_classes):
    """The recipe's backbone; with num_classes=0 without final norm and head."""
    name, class_token, rate = recipe.backbone, recipe.ctt != "pool", recipe.drop_path
    if name == "swin_base":
        return SwinB(num_classes, rate)
    if name == "cvt21":
        return CvT(num_classes, class_token, rate)
    how = recipe.image_size, num_classes, class_token, rate, recipe.attention
    return mvitv2(name.removeprefix("mvitv2_"), *how)


# -------------------------------------------------------------------------------------- building


def build(recipe, num_classes):
    """The model with its weights: none, the official ones, or a file of a backbone or of an M2Former.

    Heads may differ, position tables are resized or drawn anew. Raises ValueError for settings that do not
    fit each other and for weights that do not fit the model.
    """
    common.check_build(recipe, Recipe, num_classes)
    model, source = M2Former(recipe, num_classes), recipe.weights
    if source == "none":
        return model
    source = BACKBONES[recipe.backbone] if source == "default" else source
    if not source:
        raise ValueError(f"--weights default: {recipe.backbone} has no file to download; give one, or none")
    state = common.read_state(common.fetch(source) if source.startswith("http") else source)
    target, heads = model, ("stage_heads.", "head_con.")
    if "head_con.weight" not in state:  # of a backbone; M2Former drops its norm and head (authors' code)
        target, heads = model.backbone, ("norm.", "head.", "cls_token", "stage2.cls_token")
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    own = target.state_dict()
    if recipe.backbone == "swin_base":
        state = swin_names(state, own)
    common.load_state(target, fit_positions(state, own, recipe.rel_pos), heads, source)
    return model


def swin_names(state, own):
    """Microsoft's names of Swin's weights -> torchvision's; the window's constants are the model's."""
    names = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    for i in range(4):
        names[f"layers.{i}.blocks"] = f"features.{2 * i + 1}"
        names[f"layers.{i}.downsample"] = f"features.{2 * i + 2}"
    constants = "attn_mask", "relative_position_index"
    renamed = {name: tensor for name, tensor in own.items() if name.endswith(constants)}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if not name.endswith(constants):
            renamed[name] = tensor
    return renamed


def fit_positions(state, own, how):
    """MViTv2's position tables of a file in the sizes of `own`: interpolated, or its new ones (reinit)."""
    fitted = dict(state)
    for name in state.keys() & own.keys():
        old, new = state[name], own[name]
        if "rel_pos" in name and old.shape[1:] == new.shape[1:] and 0 < len(old) != len(new):
            fitted[name] = new if how == "reinit" else resize_rel_pos(old.float(), len(new))
    return fitted


def param_groups(model, recipe):
    """Weight decay (the paper's is 0) on matrices and kernels only, not on tokens and position tables."""
    decayed, plain, tables = [], [], ("cls_token", "rel_pos_h", "rel_pos_w", "relative_position_bias_table")
    for name, p in model.named_parameters():
        (plain if p.dim() < 2 or name.endswith(tables) else decayed).append(p)
    return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
