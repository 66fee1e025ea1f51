"""DCAL: dual cross-attention beside the self-attention of a ViT, for fine-grained classification and for re-identification (Re-ID).

Zhu, Ke, Li, Liu, Tian, Shan, "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification", CVPR 2022,
arXiv:2205.02151. There is no official code.

The idea. Two helpers are trained with a plain ViT (the SA branch). GLCA: the patches to which the class token's attention flows, and the
class token itself, ask the whole image once more in a block of their own, which has its own classifier. PWCA: a second pass through the same
weights, in which every block also offers the keys and values of another image of the batch as a distractor, under the label of the
first image; it exists in training only. SA and GLCA predict together.

  Sec. 3.1, Eq. 1, SA              common.Block              Eq. 4, PWCA               pairwise_cross_attention
  Eq. 2, rollout                   common.rollout, and       Sec. 3.3, random pairs    random_cycle, partners
                                   common.cls_rollout        Sec. 4.1, loss weights    uncertainty_weighted
  Sec. 3.2, the top-R queries      select_local              Sec. 4.1, inference       fuse (FGVC), DCAL.features (Re-ID)
  Eq. 3, GLCA                      global_local_cross_attention   Figures 3 and 4      DCAL.figure, pair_rollout
  Figure 1, how they are wired     DCAL.encode               Tables 2-4, Re-ID         triplet_loss, BNNeck, reid_scores

What Figure 1 settles and the text does not
- GLCA is parallel to the last M self-attention blocks, not a 13th block: with M = 1 the rollout is over blocks 1 to 11, the queries are tokens of
  block 11, and keys and values are what enters block 12. It is a full block (attention and FFN: Table 3's parameters agree), on the
  selected tokens only (Table 3's FLOPs agree), and the class token is always a query, in addition to the selected patches.
- PWCA runs through all T = 12 blocks. Its keys and values of the second image are, in our reading, those of that image's SA pass.

A finding that a reader should know: the class token's output of GLCA does NOT depend on which patches were chosen. Every query attends to the
same keys and values on its own, and the norms and the FFN work on one token at a time, so the other queries never reach the class token, from
which the loss and the prediction are read: R, the rollout and the selection drop out, in value and in gradient. Literal DCAL's GLCA is one more last
block with its own weights, evaluated for the class token. The paper's gap between random (82.6), last-layer (82.8) and rollout queries (83.1) on CUB can
then not come from the selection. It does matter for --kv local, whose keys are the selected tokens, and for --glca-readout mean, which averages GLCA's
output tokens (our addition). Where it cannot matter we skip it: --local-queries always computes it all the same, for figures' sake and for
timing. (test_dcal.py: test_sec_3_2_with_class_token_readout_glca_does_not_depend_on_the_chosen_patches.)

Where this differs from the paper (what it leaves open; our choice)
- GLCA's blocks start as copies of the SA blocks beside them, and its final norm as a copy of the ViT's (TransReID does so with its branches).
- "Adam" with weight decay 0.05 and DeiT's learning-rate rule is AdamW, none on biases, norms, tokens and positions. Warm-up 5 epochs; stochastic depth 0.1.
- The loss weights start at log-variance 0. Under SGD at 0.008 they follow the losses within tens of steps, and as L -> 0 the gradient would grow like
  1 / L: the Re-ID recipe holds them above -2 (our guard). The total loss may be negative: that is no fault.
- Re-ID, where the paper names two losses and no more, is TransReID's baseline: BNNeck, soft-margin triplet on features before it, bias rate x2, padding, erasing.
- Pairs are drawn inside the batch. An image that finds no partner of the wanted kind (--pair intra, inter) takes any; rows "intra" draw 4 images a class.
- The noise levels of Table 4 are unpublished; ours are in its rows. "I2 from COCO" needs a second dataset and is not part of this codebase.
- CrossViT's exchange, in Sec. 4.4 (82.1), lets the class token of one branch ask the other's patches. For the class token that is --kv local, which
  the same section calls local self-attention (82.6): the same row here.

  python train.py --method dcal                                              toy birds, minutes on a CPU
  python train.py --method dcal --no-glca --no-pwca                          the plain ViT
  python train.py --method dcal --data cub --root DIR                        DeiT-Tiny, Table 3; --backbone deit_small|deit_base
  python train.py --method dcal --data cub --root DIR --backbone r50_vit_base --normalize half         Table 1's best
  python train.py --method dcal --data market1501 --root DIR                 ViT-Base, Table 2
  python train.py eval --run runs/dcal-toy --infer both,sa,glca              Sec. 4.6
"""
import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Table, opt

# ------------------------------------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """The paper's switches."""

    backbone: str = opt("deit_tiny", "the ViT (Sec. 4.1); vit_base and r50_vit_base want --normalize half; toy_vit: patch 8, for the toy", tuple(common.VITS))
    glca: bool = opt(True, "global-local cross-attention branch (Sec. 3.2)")
    glca_blocks: int = opt(1, "M, GLCA blocks, beside the last M self-attention blocks (Fig. 2)")
    local_ratio: float = opt(0.1, "R, share of the patches kept as local queries, in (0, 1] (Sec. 4.1)")
    select: str = opt("rollout", "local queries: by the rollout, by the last layer's attention alone, or at random (Sec. 4.4)", ("rollout", "last", "random"))
    kv: str = opt("global", "GLCA's keys and values: all tokens (Eq. 3) or the local queries' own tokens (Sec. 4.4)", ("global", "local"))
    glca_readout: str = opt("cls", "GLCA's feature: its class token, or the mean of its output tokens (our addition: see the finding above)", ("cls", "mean"))
    local_queries: str = opt("needed", "compute the local queries only where the read-out depends on them, or always, as drawn in Fig. 1", ("needed", "always"))
    pwca: bool = opt(True, "pair-wise cross-attention branch in training (Sec. 3.3)")
    pwca_blocks: int = opt(12, "T, the last T blocks attend to the pair (Fig. 2); more than there are: all")
    pair: str = opt(
        "any", "second image: any; of the same class; of another; the two 1:1; or Gaussian keys and values (Table 4)", ("any", "intra", "inter", "mixed", "noise"))
    image_noise: float = opt(0.0, "deviation of Gaussian noise on the standardised training images (Table 4; the level is our choice)")
    label_noise: float = opt(0.0, "share of training labels replaced by a random class (Table 4; the level is our choice)")
    dynamic_loss: bool = opt(True, "weigh the branches' losses by learned uncertainties (Sec. 4.1); off: their sum")
    log_var_floor: float = opt(-10.0, "lowest log-variance of the loss weights (our choice)")
    bias_lr: float = opt(1.0, "factor on the learning rate of biases (TransReID's code)")
    infer: str = opt("both", "test with both branches, self-attention alone, or GLCA alone (Sec. 4.6)", ("both", "sa", "glca"))


FGVC = Recipe(  # Sec. 4.1; backbone as in Table 3
    image_size=(448, 448), resize=(550, 550), interpolation="bicubic", batch_size=16, epochs=100, optimizer="adamw", lr=5e-4, lr_batch=512, weight_decay=0.05,
    warmup=5, warmup_lr=1e-6, drop_path=0.1, weights="default",
)
PERSON = Recipe(  # Sec. 4.1; what it does not name is TransReID's baseline
    task="reid", backbone="vit_base", image_size=(256, 128), interpolation="bicubic", normalize="half", pad=10, erasing=0.5, local_ratio=0.3, batch_size=64, instances=4,
    epochs=120, optimizer="sgd", lr=0.008, momentum=0.9, weight_decay=1e-4, warmup=5, warmup_lr=8e-5, min_lr=1.6e-5, drop_path=0.1, bias_lr=2.0,
    log_var_floor=-2.0, weights="default",
)
RECIPES = {
    "cub": FGVC,
    "cars": FGVC,
    "aircraft": FGVC,
    "folder": FGVC,
    "market1501": PERSON,
    "dukemtmc": PERSON,
    "msmt17": PERSON,
    "veri776": replace(PERSON, image_size=(256, 256)),
    "toy": replace(
        FGVC, backbone="toy_vit", toy_preset="birds-easy", image_size=(64, 64), resize=(0, 0), pad=4, batch_size=32, epochs=40, lr=1.5e-3, lr_batch=0, schedule="onecycle",
        warmup=0, warmup_lr=0.0, drop_path=0.0, weights="none",
    ),
}

# ------------------------------------------------------------------------------------------------ tables

PLAIN, GLCA_ONLY, PWCA_ONLY = {"glca": False, "pwca": False}, {"pwca": False}, {"glca": False}
VIT = {"backbone": "vit_base", "normalize": "half"}
NAMES = {"deit_tiny": "DeiT-Tiny", "deit_small": "DeiT-Small", "deit_base": "DeiT-Base", "vit_base": "ViT-Base", "r50_vit_base": "R50-ViT-Base"}


def by_dataset(number, title, metrics, rows):
    """Rows of (name, overrides, a value for each dataset) -> {"3": Table on the first dataset, "3-msmt17": ..., ...}."""
    first = next(iter(metrics))
    return {
        number + ("" if data == first else f"-{data}"): Table(f"{title}", data, metric, tuple((name, change, values[i]) for name, change, *values in rows))
        for i, (data, metric) in enumerate(metrics.items())
    }


def baselines(rows):
    """Rows of (backbone, [(baseline, DCAL) for each dataset]) -> rows of tables 1 and 2."""
    for backbone, pairs in rows:
        change = {"backbone": backbone, "normalize": "imagenet" if backbone.startswith("deit") else "half"}
        yield (f"{NAMES[backbone]}", change | PLAIN, *(a for a, _ in pairs))
        yield (f"{NAMES[backbone]} + DCAL", change, *(b for _, b in pairs))


TABLES = {
    "baseline": Table("DCAL and the plain ViT", "cub", "top1", (("plain ViT", PLAIN, 82.1), ("DCAL", {}, 84.6))),
    "toy": Table("The two modules on toy birds", "toy", "top1", (("plain ViT", PLAIN, None), ("+ GLCA", GLCA_ONLY, None), ("+ PWCA", PWCA_ONLY, None), ("DCAL", {}, None))),
    **by_dataset("1", "Table 1: FGVC", {"cub": "top1", "cars": "top1", "aircraft": "top1"}, tuple(baselines((
        ("deit_tiny", ((82.1, 84.6), (87.2, 89.4), (84.7, 87.4))),
        ("deit_small", ((85.8, 87.6), (90.7, 92.3), (88.1, 90.0))),
        ("deit_base", ((88.0, 88.8), (92.9, 93.8), (90.3, 92.6))),
        ("vit_base", ((90.8, 91.4), (92.5, 93.4), (90.0, 91.5))),
        ("r50_vit_base", ((91.3, 92.0), (94.0, 95.3), (92.4, 93.3))),
    )))),
    **by_dataset("2", "Table 2: Re-ID", {"veri776": "mAP", "msmt17": "mAP", "market1501": "mAP", "dukemtmc": "mAP"}, tuple(baselines((
        ("deit_tiny", ((71.3, 74.1), (42.1, 44.9), (77.9, 79.8), (69.5, 71.7))),
        ("deit_small", ((76.7, 78.1), (53.3, 55.1), (84.3, 85.3), (75.7, 77.4))),
        ("deit_base", ((78.3, 80.0), (60.5, 62.3), (86.6, 87.2), (79.1, 80.2))),
        ("vit_base", ((78.1, 80.2), (61.6, 64.0), (87.1, 87.5), (78.9, 80.1))),
    )))),
    **by_dataset("3", "Table 3: the two modules", {"cub": "top1", "veri776": "mAP", "msmt17": "mAP"}, (
        ("Baseline", PLAIN, 82.1, 78.1, 61.6),
        ("+ GLCA", GLCA_ONLY, 83.1, 79.5, 63.7),
        ("+ PWCA", PWCA_ONLY, 83.1, 79.2, 62.8),
        ("Ours", {}, 84.6, 80.2, 64.0),
    )),
    **by_dataset("4", "Table 4: regularisation", {"cub": "top1", "msmt17": "mAP"}, (
        ("Baseline", PLAIN, 82.1, 61.6),
        ("+ PWCA", PWCA_ONLY, 83.1, 62.8),
        ("+ Adding noise in I1", PLAIN | {"image_noise": 0.5}, 77.3, 56.0),
        ("+ Adding noise in label of I1", PLAIN | {"label_noise": 0.1}, 81.6, 60.8),
        ("+ I2 from noise", PWCA_ONLY | {"pair": "noise"}, 82.1, 62.1),
        ("+ I2 from intra-class only", PWCA_ONLY | {"pair": "intra", "instances": 4}, 81.7, 62.2),
        ("+ I2 from inter-class only", PWCA_ONLY | {"pair": "inter"}, 83.0, 62.7),
        ("+ I2 from intra- & inter-class (1:1)", PWCA_ONLY | {"pair": "mixed", "instances": 4}, 83.0, 62.5),
    )),
    "glca": Table("Sec. 4.4: GLCA's queries and keys", "cub", "top1", (
        ("CrossViT's exchange (for the class token: local keys)", GLCA_ONLY | {"kv": "local"}, 82.1),
        ("local self-attention", GLCA_ONLY | {"kv": "local"}, 82.6),
        ("random local queries", GLCA_ONLY | {"select": "random"}, 82.6),
        ("queries by the last layer's attention", GLCA_ONLY | {"select": "last"}, 82.8),
        ("GLCA", GLCA_ONLY, 83.1),
        ("random local queries, mean read-out (ours)", GLCA_ONLY | {"select": "random", "glca_readout": "mean"}, None),
        ("queries by the last layer's attention, mean read-out (ours)", GLCA_ONLY | {"select": "last", "glca_readout": "mean"}, None),
        ("GLCA, mean read-out (ours)", GLCA_ONLY | {"glca_readout": "mean"}, None),
    )),
    "infer": Table("Sec. 4.6: trained as DCAL, tested with", "cub", "top1", (
        ("SA and GLCA", {}, 84.6), ("SA alone", {"eval": {"infer": "sa"}}, 84.3), ("GLCA alone", {"eval": {"infer": "glca"}}, None),
    )),
    "fig2-glca": Table("Figure 2: GLCA blocks (most values are only drawn)", "cub", "top1", (
        ("M = 1", GLCA_ONLY, 83.1), ("M = 2", GLCA_ONLY | {"glca_blocks": 2}, None), ("M = 3", GLCA_ONLY | {"glca_blocks": 3}, None),
    )),
    "fig2-pwca": Table("Figure 2: PWCA blocks (most values are only drawn)", "cub", "top1", (
        ("T = 0", PLAIN, 82.1), ("T = 4", PWCA_ONLY | {"pwca_blocks": 4}, None), ("T = 8", PWCA_ONLY | {"pwca_blocks": 8}, None), ("T = 12", PWCA_ONLY, 83.1),
    )),
}

# ------------------------------------------------------------------------------------------------ global-local cross-attention (Sec. 3.2)


def select_local(row, ratio):
    """The rollout row (B, N) of the class token, itself first -> numbers of the queries (B, 1 + k): 0, then the k patches with the highest response."""
    k = max(1, int(ratio * (row.shape[1] - 1)))
    patches = row[:, 1:].topk(k, dim=1).indices + 1  # (B, k), best first
    return torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)


def take(tokens, index):
    """tokens (B, N, C), numbers (B, n) -> (B, n, C)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def global_local_cross_attention(block, local, tokens):
    """One GLCA block (Eq. 3): queries from `local` (B, n, C), keys and values from `tokens` (B, N, C) -> (B, n, C)."""
    C, attn = local.shape[2], block.attn
    query, key_value = attn.qkv.weight.split([C, 2 * C]), attn.qkv.bias.split([C, 2 * C])
    q = F.linear(block.norm1(local), query[0], key_value[0]).unflatten(2, (attn.heads, -1)).transpose(1, 2)  # (B, h, n, d)
    k, v = F.linear(block.norm1(tokens), query[1], key_value[1]).unflatten(2, (2, attn.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, d) each
    return block.finish(local, F.scaled_dot_product_attention(q, k, v))


# ------------------------------------------------------------------------------------------------ pair-wise cross-attention (Sec. 3.3)


def random_cycle(B, generator=None):
    """Partner of each of B images, (B,): one cycle through all in random order, so no image is its own partner (B >= 2)."""
    order = torch.randperm(B, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def partners(targets, pair):
    """Partner of each image of a batch, (B,), by the kind of pair (Table 4); an image that finds none of its kind takes any other."""
    B = len(targets)
    if pair in ("any", "noise"):
        return random_cycle(B).to(targets.device)
    same = targets[:, None] == targets
    intra = {"intra": torch.ones(B, 1), "inter": torch.zeros(B, 1), "mixed": torch.rand(B, 1).round()}[pair].to(targets.device) > 0
    score = torch.rand(B, B).to(targets.device) + (same == intra)  # the wanted kind first, random within a kind
    return score.fill_diagonal_(-1).argmax(1)


def pairwise_cross_attention(q, k, v, partner, k2=None, v2=None):
    """Queries of an image over the keys and values of itself and of its partner, normalised together (Eq. 4).

    q, k, v (B, h, N, d); partner (B,) numbers images of k2, v2 (default: k, v) -> (B, h, N, d).
    """
    k2, v2 = (k if k2 is None else k2)[partner], (v if v2 is None else v2)[partner]
    return F.scaled_dot_product_attention(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2))


def pair_rollout(layers, pair_layers, partner):
    """Rollout of PWCA's class token over both images of a pair -> (B, N) on the image, (B, N) on its partner; together each row sums to 1.

    layers: SA of every block, as common.attend gives it; pair_layers: PWCA's weights (B, N, 2N) of the last blocks (Figs. 3b, 4b).
    """
    alone = [layer if torch.is_tensor(layer) else common.attention_weights(*layer) for layer in layers]  # (B, N, N) each
    before = [F.pad(weights, (0, weights.shape[-1])) for weights in alone[: len(alone) - len(pair_layers)]]  # there PWCA is SA
    own = torch.zeros_like(alone[0][:, :1])  # (B, 1, N)
    own[:, :, 0], other = 1, torch.zeros_like(own)
    for weights, sa in zip(reversed(before + pair_layers), reversed(alone)):
        on_own, on_other = weights.chunk(2, -1)
        other = 0.5 * other + 0.5 * (own @ on_other + other @ sa[partner])
        own = 0.5 * own + 0.5 * own @ on_own
    return own[:, 0], other[:, 0]


# ------------------------------------------------------------------------------------------------ losses and inference (Sec. 4.1)

BRANCHES = ("sa", "glca", "pwca")


def uncertainty_weighted(losses, log_vars):
    """0.5 * sum of exp(-s_i) L_i + s_i: losses (n,) or a list of n scalars, log-variances s (n,) -> scalar (FairMOT, which Sec. 4.1 follows)."""
    losses = torch.stack(tuple(losses)).float() if not isinstance(losses, torch.Tensor) else losses
    return 0.5 * ((-log_vars).exp() * losses + log_vars).sum()


def triplet_loss(features, targets):
    """Batch-hard triplet loss with soft margin on un-normalised features (B, C): log(1 + exp(farthest positive - nearest negative)), Euclidean."""
    with torch.autocast(features.device.type, enabled=False):
        x = features.float()
        square = x.square().sum(1)
        distance = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt()  # (B, B)
        same = targets[:, None] == targets
        positive = distance.masked_fill(~same, -torch.inf).amax(1)
        negative = distance.masked_fill(same, torch.inf).amin(1)
        return F.softplus(positive - negative).mean()


class BNNeck(nn.Module):
    """Re-ID classifier: features (B, C) -> batch norm without shift -> linear without bias -> logits (B, K). Triplet loss and test use its input."""

    def __init__(self, dim, classes):
        super().__init__()
        self.norm, self.classifier = nn.BatchNorm1d(dim), nn.Linear(dim, classes, bias=False)
        self.norm.bias.requires_grad_(False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, features):
        return self.classifier(self.norm(features))


def make_head(recipe, dim, classes):
    """A branch's classifier: linear, or BNNeck for Re-ID."""
    if recipe.task == "reid":
        return BNNeck(dim, classes)
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def fuse(logits):
    """Logits of several classifiers, (B, K) each -> log of the mean of their softmax probabilities (Sec. 4.1 adds them: the same order of classes)."""
    log_probabilities = torch.stack([x.float().log_softmax(1) for x in logits])
    return log_probabilities.logsumexp(0) - math.log(len(logits))


# ------------------------------------------------------------------------------------------------ model


class GLCA(nn.Module):
    """M blocks and the final norm of the GLCA branch, as copies of the ViT's last blocks and norm."""

    def __init__(self, vit, blocks):
        super().__init__()
        self.blocks, self.norm = copy.deepcopy(vit.blocks[len(vit.blocks) - blocks :]), copy.deepcopy(vit.norm)


class DCAL(nn.Module):
    """A ViT with its two helpers. One head serves SA and PWCA, GLCA has its own."""

    def __init__(self, vit, recipe, num_classes):
        super().__init__()
        dim = vit.norm.weight.numel()
        self.recipe, self.vit = recipe, vit
        self.head = make_head(recipe, dim, num_classes)
        if recipe.glca:
            self.glca = GLCA(vit, recipe.glca_blocks)
            self.glca_head = make_head(recipe, dim, num_classes)
        self.paired = recipe.pwca and recipe.pwca_blocks > 0
        learned = recipe.dynamic_loss and (recipe.glca or self.paired)  # one loss alone needs no weight
        self.log_vars = nn.Parameter(torch.zeros(len(BRANCHES)), requires_grad=learned)

    def encode(self, images, partner=None, glca=None, layers=None, pair_layers=None):
        """Figure 1: images (B, 3, H, W) -> dict of features (B, C) after the final norms: "sa", "glca", and with partner (B,) "pwca".

        glca: run that branch (default: as the recipe says). The list `layers` is filled with each block's layer for common.cls_rollout, `pair_layers`
        with the weights (B, N, 2N) of each PWCA block.
        """
        recipe, blocks = self.recipe, self.vit.blocks
        glca = recipe.glca if glca is None else glca
        first_glca, first_pair = len(blocks) - recipe.glca_blocks, len(blocks) - recipe.pwca_blocks
        select = glca and (recipe.kv == "local" or recipe.glca_readout == "mean" or recipe.local_queries == "always")
        watched = len(blocks) if layers is not None else first_glca if select and recipe.select != "random" else 0  # blocks whose attention is looked at
        layers = [] if layers is None else layers

        tokens = pair = self.vit.embed(images)  # (B, N, C)
        B, N, C = tokens.shape
        maps = [None] * watched  # at inference on a CPU all in one piece, which the allocator keeps: no page faults the next time
        if tokens.device.type == "cpu" and not tokens.requires_grad:
            maps = torch.empty(watched, B, N, N, dtype=torch.promote_types(tokens.dtype, torch.float32))
        for i, block in enumerate(blocks):
            if glca and i == first_glca:
                local = take(tokens, select_local(self.response(tokens, layers), recipe.local_ratio)) if select else tokens[:, :1]  # (B, 1 + k, C)
            if glca and i >= first_glca:
                local = global_local_cross_attention(self.glca.blocks[i - first_glca], local, tokens if recipe.kv == "global" else local)
            q, k, v = block.attn.split(block.norm1(tokens))
            if partner is not None and i >= first_pair:
                q1, k1, v1 = block.attn.split(block.norm1(pair))
                k2, v2 = (torch.randn_like(k), torch.randn_like(v)) if recipe.pair == "noise" else (k, v)
                pair = block.finish(pair, pairwise_cross_attention(q1, k1, v1, partner, k2, v2))
                if pair_layers is not None:
                    pair_layers.append(common.attention_weights(q1, torch.cat([k1, k2[partner]], 2)))
            if i < watched:
                attended, layer = common.attend(q, k, v, maps[i])
                layers.append(layer)
            else:
                attended = F.scaled_dot_product_attention(q, k, v)
            tokens = block.finish(tokens, attended)
            if i < first_pair:
                pair = tokens

        features = {"sa": self.vit.norm(tokens[:, 0])}
        if glca:
            features["glca"] = self.glca.norm(local[:, :1] if recipe.glca_readout == "cls" else local).mean(1)
        if partner is not None and recipe.pwca_blocks > 0:
            features["pwca"] = self.vit.norm(pair[:, 0])
        return features

    def response(self, tokens, layers):
        """How much the class token attends to each of the tokens (B, N, C) after these layers, (B, N): what select_local ranks."""
        if self.recipe.select == "random":
            return torch.rand(tokens.shape[:2], device=tokens.device)
        return common.cls_rollout(layers[-1:] if self.recipe.select == "last" else layers)

    def classify(self, features):
        """dict of features -> dict of logits (B, K), each by its branch's head."""
        return {name: (self.glca_head if name == "glca" else self.head)(f).float() for name, f in features.items()}

    def forward(self, images, targets=None, partner=None):
        """images -> logits (B, K) or Re-ID features; with targets (B,) -> (loss, terms). partner (B,), training only, replaces the drawn pairs."""
        recipe = self.recipe
        if targets is None:
            outputs = self.heads(images, infer=recipe.infer)
            return outputs[recipe.infer] if recipe.infer in outputs else outputs["sa"]
        if not self.training or not self.paired:
            partner = None
        elif len(images) < 2:
            raise ValueError("a training batch of one image has no pairs for PWCA; use --batch-size 2 or more (in each process and part), or --no-pwca")
        elif partner is None:
            partner = partners(targets, recipe.pair)
        labels = targets
        if self.training and recipe.image_noise:
            images = images + recipe.image_noise * torch.randn_like(images)
        if self.training and recipe.label_noise:
            labels = torch.where(torch.rand(targets.shape, device=targets.device) < recipe.label_noise, torch.randint_like(targets, self.classes()), targets)

        features = self.encode(images, partner)
        logits, losses = self.classify(features), {}
        for name in features:
            losses[name] = F.cross_entropy(logits[name], labels, label_smoothing=recipe.label_smoothing)
            if recipe.task == "reid":
                losses[name] = losses[name] + triplet_loss(features[name], labels)
        if len(losses) > 1 and recipe.dynamic_loss:
            with torch.no_grad():
                self.log_vars.clamp_(min=recipe.log_var_floor)
            used = torch.stack([self.log_vars[BRANCHES.index(name)] for name in losses])
            loss = uncertainty_weighted(losses.values(), used)
        else:
            loss, used = sum(losses.values()), ()
        top1 = fuse([logits[name] for name in logits if name != "pwca"]).argmax(1) == targets
        terms = {name: value.detach() for name, value in losses.items()} | {f"s_{name}": s.detach() for name, s in zip(losses, used)}
        return loss, terms | {"top1": top1.float().mean()}

    def classes(self):
        """K."""
        return (self.head.classifier if self.recipe.task == "reid" else self.head).out_features

    def heads(self, images, infer="both"):
        """images -> logits (B, K), or Re-ID features of length 1, of each branch and of both together (Sec. 4.1)."""
        features = self.encode(images, glca=self.recipe.glca and infer != "sa")
        if self.recipe.task == "reid":
            outputs = {name: F.normalize(f.float(), dim=1) for name, f in features.items()}
            return outputs | ({"both": F.normalize(torch.cat([f.float() for f in features.values()], 1), dim=1)} if len(outputs) > 1 else {})
        outputs = self.classify(features)
        return outputs | ({"both": fuse(list(outputs.values()))} if len(outputs) > 1 else {})

    # ---- pictures

    def patch_boxes(self, patches):
        """Numbers of tokens (B, n), 1 for the first patch -> boxes (B, n, 4), xyxy in pixels."""
        size, columns = self.vit.patch_size, self.vit.grid[1]
        y, x = (patches - 1) // columns * size, (patches - 1) % columns * size
        return torch.stack([x, y, x + size, y + size], -1).float()

    @torch.no_grad()
    def where(self, images):
        """The top-R patches of the rollout over the blocks before GLCA -> boxes (B, k, 4), their responses (B, k), best first."""
        layers = []
        self.encode(images, glca=False, layers=layers)
        row = common.cls_rollout(layers[: len(layers) - self.recipe.glca_blocks])
        patches = select_local(row, self.recipe.local_ratio)[:, 1:]
        return self.patch_boxes(patches), row.gather(1, patches)

    @torch.no_grad()
    def figure(self, images):
        """Figures 3 and 4: image, rollout of SA, the selected patches; and with PWCA its rollout on the image and on a distractor, the next image of the batch."""
        B, (H, W), (rows, columns) = len(images), images.shape[-2:], self.vit.grid
        partner, layers, pair_layers, pages = torch.arange(B, device=images.device).roll(-1), [], [], []
        self.encode(images, partner if self.paired and B > 1 else None, glca=False, layers=layers, pair_layers=pair_layers)
        boxes, _ = self.where(images)
        grid = lambda row: row[:, 1:].reshape(-1, rows, columns)
        attention = grid(common.cls_rollout(layers))
        own, other = pair_rollout(layers, pair_layers, partner)
        scale = max(1, round(224 / min(H, W)))  # small pictures are enlarged before anything is drawn on them
        photos = [common.to_pil(image, self.recipe.normalize).resize((W * scale, H * scale)) for image in images]
        for i, photo in enumerate(photos):
            parts = [(photo, "image"), (common.heat(photo, attention[i]), "attention rollout (SA)")]
            parts.append((common.draw_boxes(photo, boxes[i] * scale, colours=("#ffd400",), width=max(1, scale)), f"top {boxes.shape[1]} of {rows * columns} patches"))
            if pair_layers:
                span = (min(grid(own)[i].min(), grid(other)[i].min()), max(grid(own)[i].max(), grid(other)[i].max()))  # one scale for both
                share = other[i].sum().item()
                parts.append((common.heat(photo, grid(own)[i], span=span), f"PWCA: {1 - share:.0%} stays here"))
                parts.append((common.heat(photos[partner[i]], grid(other)[i], span=span), f"distractor: {share:.0%}"))
            pages.append(common.panels(*zip(*parts), height=max(224, 224 * H // W)))
        return pages


# ------------------------------------------------------------------------------------------------ Re-ID evaluation


def query_scores(distances, query_ids, query_cameras, gallery_ids, gallery_cameras):
    """Average precision and rank of the first hit of each query that has one: (m,), (m,). Same identity and camera, and identity -1, do not count."""
    order = distances.argsort(dim=1, stable=True)  # (Q, G), nearest first
    ids, cameras = gallery_ids[order], gallery_cameras[order]
    match = ids == query_ids[:, None]
    keep = ~(match & (cameras == query_cameras[:, None])) & (ids != -1)
    match = match & keep
    rank, hits = keep.cumsum(1), match.cumsum(1)  # among those kept
    valid = match.any(1)
    precision = torch.where(match, hits.double() / rank.clamp(min=1), 0.0)  # at each hit
    first = torch.where(match, rank, rank.shape[1] + 1).amin(1)
    return (precision.sum(1) / hits[:, -1].clamp(min=1))[valid], first[valid]


def _summary(precision, first, queries):
    if not len(first):
        raise ValueError(f"none of the {queries} queries has an image of the same identity from another camera in the gallery; check the split's identities and cameras")
    cmc = (first[:, None] <= torch.arange(1, 11, device=first.device)).double().mean(0)
    return {"mAP": precision.mean().item(), "cmc": cmc, "skipped": queries - len(first)}


def reid_scores(distances, query_ids, query_cameras, gallery_ids, gallery_cameras):
    """Single-query protocol of Market-1501, DukeMTMC, MSMT17 and VeRi: distances (Q, G), integer ids and cameras -> dict mAP, cmc (10,), skipped.

    For a query, gallery images of its identity from its camera and junk (identity -1) are removed; a query without any match left is skipped, not counted as 0.
    """
    return _summary(*query_scores(distances, query_ids, query_cameras, gallery_ids, gallery_cameras), len(query_ids))


def reid_evaluate(features, ids, cameras, query, chunk=2**24):
    """Features (n, D), ids, cameras and the query flag of a test split's images -> dict mAP, rank1, rank5, rank10 in [0, 1], and skipped queries.

    Queries are taken a few at a time, so that at most `chunk` distances exist at once (MSMT17 has 11,659 x 82,161).
    """
    query, ids, cameras = (torch.as_tensor(x, device=features.device) for x in (query, ids, cameras))
    q, g = query.nonzero()[:, 0], (~query).nonzero()[:, 0]
    if not len(q) or not len(g):
        raise ValueError(f"{len(q)} queries and {len(g)} gallery images: Re-ID needs both; check the dataset's folders")
    scores = []
    for some in q.split(max(1, chunk // len(g))):
        distances = torch.cdist(features[some], features[g])
        scores.append(query_scores(distances, ids[some], cameras[some], ids[g], cameras[g]))
    result = _summary(*(torch.cat(x) for x in zip(*scores)), len(q))
    return {"mAP": result["mAP"], **{f"rank{r}": result["cmc"][r - 1].item() for r in (1, 5, 10)}, "skipped": result["skipped"]}


# ------------------------------------------------------------------------------------------------ building


def build(recipe, num_classes):
    """The model for `num_classes` classes or identities, its weights as recipe.weights says. Raises ValueError for settings that do not go together."""
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes: a classifier needs 2 at least; check the dataset's folders")
    if not 0 < recipe.local_ratio <= 1:
        raise ValueError(f"--local-ratio {recipe.local_ratio} is outside (0, 1]; the paper has 0.1 for FGVC and 0.3 for Re-ID")
    if not 0 <= recipe.label_noise <= 1 or recipe.image_noise < 0 or recipe.pwca_blocks < 0:
        given = f"--label-noise {recipe.label_noise} --image-noise {recipe.image_noise} --pwca-blocks {recipe.pwca_blocks}"
        raise ValueError(f"{given}: one is out of range; label noise is 0 to 1, the others at least 0")
    if recipe.infer == "glca" and not recipe.glca:
        raise ValueError("--infer glca --no-glca: there is no GLCA branch to ask; use --infer sa")
    vit = common.vit(recipe.backbone, recipe.image_size, drop_path=recipe.drop_path)
    if not 1 <= recipe.glca_blocks < len(vit.blocks):
        raise ValueError(f"--glca-blocks {recipe.glca_blocks}: 1 to {len(vit.blocks) - 1} for {recipe.backbone}; the rollout needs a block before them")
    held = common.load_vit(vit, recipe.weights) if recipe.weights != "none" else {}
    model = DCAL(vit, recipe, num_classes)
    own = {name.removeprefix("glca."): value for name, value in held.items() if name.startswith("glca.")}
    if own and recipe.glca:  # a run of ours that had the branch; otherwise it starts from the last blocks
        common.load_state(model.glca, own, source=f"--weights {recipe.weights}")
    return model


def param_groups(model, recipe):
    """Weights with decay; biases, norms, class token and positions without; biases may have their own rate; the loss weights without decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = name.endswith(".bias")
            plain = parameter.ndim < 2 or name.endswith(("cls_token", "pos_embed"))
            kind = "log_vars" if name == "log_vars" else "bias" if bias else "no decay" if plain else "decay"
            groups.setdefault(kind, []).append(parameter)
    decay, scale = {"decay": recipe.weight_decay}, {"bias": recipe.bias_lr}
    return [{"params": params, "weight_decay": decay.get(kind, 0.0), "lr_scale": scale.get(kind, 1.0)} for kind, params in groups.items()]
