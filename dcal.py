"""DCAL: dual cross-attention beside the self-attention (SA) of a ViT, for fine-grained photos and for Re-ID.

Zhu, Ke, Li, Liu, Tian, Shan, "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
Re-Identification", CVPR 2022, arXiv:2205.02151. There is no official code.

The idea. Two helpers are trained with a plain ViT, the SA branch. GLCA (global-local cross-attention): the
class token, and the patches to which its attention flows, ask the whole image once more in a block of their
own, which has its own classifier. PWCA (pair-wise cross-attention): a second pass of image I1 through the
same weights, in which every block also offers the keys and values of another image I2 of the batch as a
distractor, under I1's label; it exists in training only. SA and GLCA predict together.

  Sec. 3.1, Eq. 1, SA           DCAL.sa_branch                 Sec. 3.3, pairs        random_cycle, partners
  Eq. 2, rollout                common.rollout, cls_rollout    Sec. 4.1, weights      uncertainty_weighted
  Sec. 3.2, top-R queries       select_local                   Sec. 4.1, Re-ID        make_head, triplet_loss
  Eq. 3, GLCA                   global_local_cross_attention   Sec. 4.1, inference    DCAL.heads
  Eq. 4, PWCA                   pairwise_cross_attention       Figures 3 and 4        draw_pages, pair_rollout
  Figure 1, how they are wired  DCAL.glca_branch, pwca_branch  Tables, Fig. 2         TABLES

What Figure 1 settles and the text does not
- GLCA is parallel to the last M self-attention blocks, not a 13th block: with M = 1 the rollout is over
  blocks 1 to 11, the queries are tokens of block 11, and keys and values are what enters block 12. It is a
  full block (attention and FFN: Table 3's parameters agree), on the selected tokens only (its FLOPs agree),
  and the class token is always a query, in addition to the selected patches.

A finding that a reader should know: the class token's output of GLCA does NOT depend on which patches were
chosen. Every query attends to the same keys and values on its own, and the norms and the FFN work on one
token at a time, so the other queries never reach the class token, from which the loss and the prediction are
read: R, the rollout and the selection drop out, in value and in gradient. Literal DCAL's GLCA is one more
last block with its own weights, evaluated for the class token. The paper's gap between random (82.6),
penultimate-layer (82.8) and rollout queries (83.1) on CUB can then not come from the selection. It does
matter for --kv local, whose keys are the selected tokens, and for --glca-readout mean, which averages GLCA's
output tokens (our addition: try it with `table --table glca`). Where it cannot matter we skip it:
--local-queries always computes it all the same, for timing.

Table 3's parameters and FLOPs are counted in a way of its own: weights and biases of linear layers and
convolutions (on CUB norms and heads too, but neither positions nor class token), 2 FLOPs a multiplication,
none for attention's products; Re-ID in units of 2^20 and 2^30. So counted, with all local queries, ours are,
before the paper's (two cells do not agree, *):

                      CUB, DeiT-Tiny                VeRi-776, ViT-Base            MSMT17, ViT-Base
  Baseline, + PWCA    5.53M 5.5M   8.57G 8.6G       81.64M 81.6M   40.94G 41.1G*  81.64M 81.6M   20.55G 20.5G
  + GLCA, Ours        6.01M 6.0M   8.74G 8.8G*      88.40M 88.4M   42.35G 42.4G   88.40M 88.4M   21.26G 21.3G

8.8 would be right for queries projected from all patches, and 41.1 is twice 20.55. `profile` counts
everything: on CUB 6.16M, and 7.23 giga multiplications with all local queries.

Where this differs from the paper (what it leaves open; our choice)
- PWCA's keys and values of I2 are those of I2's own SA pass, which gradients reach. The figure draws those of
  I1, and its queries, as of I1's SA pass too; we let I1 run a second time, through blocks that each mix in
  those of I2, as Eq. 4 and the distractor maps of Figures 3 and 4 suggest. All T = 12 blocks do (Sec. 4.1).
- GLCA's blocks start as copies of the SA blocks beside them, and its final norm as a copy of the ViT's
  (TransReID does so with its branches). Linear heads start from a truncated normal of deviation 0.02.
- "Adam" with weight decay 0.05 and DeiT's learning-rate rule is AdamW, without decay on biases, norms, tokens
  and positions. Warm-up 5 epochs; stochastic depth 0.1. Batch 16 is of all 4 GPUs together, so lr is 1.6e-5,
  and it ends at 0. Tested is the centre, 448 x 448, of the photo at 550 x 550. Mirror images, bicubic
  resizing and bf16 are not in the paper either.
- The loss weights start at log-variance 0. Under SGD at 0.008 they follow the losses within tens of steps,
  and as L -> 0 the gradient would grow like 1 / L: the Re-ID recipe holds them above -2 (our guard). The
  total loss may be negative: that is no fault.
- Re-ID, where the paper names two losses and no more, is TransReID's baseline: BNNeck, soft-margin triplet
  loss on the features before it, twice the rate for biases, padding, erasing. We differ from that reference
  in this: it decays biases and norms too, we do not; its cosine runs on from epoch 0 under the warm-up and
  changes the rate once an epoch, ours starts from the peak after it and changes at every step; its epoch ends
  when identities run out, ours has n // 64 batches; it resizes test photos bilinearly, we bicubically as in
  training; it starts from a ViT-B fine-tuned on ImageNet-1k, where this paper says ImageNet-21k; for DeiT it
  erases with 0.8, here all rows with 0.5.
- Pairs and triplets are found inside a batch, or a process's or part's share of it: two processes equal one
  only without PWCA, Re-ID (BatchNorm and triplets) and stochastic depth. An image that finds no partner of
  the wanted kind (--pair intra, inter, mixed) takes any; rows with intra-class pairs draw 4 images a class.
- Level and kind of the noise of Table 4 are unpublished; ours, drawn anew at each step, are in its rows. "I2
  from COCO" needs a second dataset and is not part of this codebase.
- Figure 2 is only drawn: which M and T, and that the other branch is off, is our reading.
- CrossViT's exchange, in Sec. 4.4 (82.1), lets the class token of each branch ask the other's patches. For
  the image's class token that is --kv local, which the same section calls local self-attention (82.6), and
  the other direction is GLCA itself: two rows here, of one training.

  python train.py --method dcal                                            toy birds, minutes on a CPU
  python train.py --method dcal --no-glca --no-pwca                        the plain ViT
  python train.py table --method dcal --table 3 --data toy                 the two modules on toy birds
  python train.py --method dcal --data cub --root DIR                      DeiT-Tiny, Table 3
  python train.py --method dcal --data cub --root DIR --backbone r50_vit_base --normalize half      Table 1
  python train.py --method dcal --data market1501 --root DIR               ViT-Base, Table 2
  python train.py eval runs/dcal-toy --infer sa                            Sec. 4.6
  python train.py figures RUN BASELINE                                     Figures 3 and 4, plain ViT beside
"""
import copy
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Table, by_dataset, opt, take

# ------------------------------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """The paper's switches."""

    task: str = common.on_input("classify", "classify: accuracy; reid: features, mAP", ("classify", "reid"))
    backbone: str = opt("deit_tiny", "the ViT (Sec. 4.1); vit_base, r50_vit_base want --normalize half",
                        (*common.VITS, "r50_vit_base"))
    glca: bool = opt(True, "global-local cross-attention branch (Sec. 3.2)")
    glca_blocks: int = opt(1, "M, GLCA blocks, beside the last M of SA (Fig. 2)", (), 1)
    local_ratio: float = opt(0.1, "R, share of the patches kept as local queries (Sec. 4.1)", (), 1e-6, 1)
    select: str = opt("rollout", "local queries by rollout, the last layer before GLCA, chance (Sec. 4.4)",
                      ("rollout", "last", "random"))
    kv: str = opt("global", "GLCA's keys: all tokens (Eq. 3), the local ones (Sec. 4.4)", ("global", "local"))
    glca_readout: str = opt("cls", "GLCA's feature: its class token; mean: all its tokens (ours)",
                            ("cls", "mean"))
    local_queries: str = opt("needed", "computed where the read-out needs them, or always",
                             ("needed", "always"))
    pwca: bool = opt(True, "pair-wise cross-attention branch in training (Sec. 3.3)")
    pwca_blocks: int = opt(12, "T, the last T blocks attend to the pair (Fig. 2); more than there are: all")
    pair: str = opt("any", "I2: any; of the same class; another; 1:1; Gaussian keys, values (Table 4)",
                    ("any", "intra", "inter", "mixed", "noise"))
    image_noise: float = opt(0.0, "deviation of noise on standardised training images (Table 4; our level)")
    label_noise: float = opt(0.0, "share of training labels made random (Table 4; our level)", (), 0, 1)
    dynamic_loss: bool = opt(True, "losses weighted by learned uncertainties (Sec. 4.1); off: their sum")
    log_var_floor: float = opt(-10.0, "lowest log-variance of the loss weights (our choice)", (), -100)
    bias_lr: float = opt(1.0, "factor on the learning rate of biases (TransReID's code)")
    infer: str = opt("both", "test with both branches, or with one (Sec. 4.6)", ("both", "sa", "glca"))


FGVC = Recipe(  # Sec. 4.1; the backbone is Table 3's
    image_size=(448, 448), resize=(550, 550), interpolation="bicubic", batch_size=16, epochs=100,
    optimizer="adamw", lr=5e-4, lr_batch=512, weight_decay=0.05, warmup=5, warmup_lr=1e-6, drop_path=0.1,
    weights="default"
)
PERSON = Recipe(  # Sec. 4.1; what it does not name is TransReID's baseline
    task="reid", backbone="vit_base", image_size=(256, 128), interpolation="bicubic", normalize="half",
    pad=10, erasing=0.5, local_ratio=0.3, batch_size=64, instances=4, epochs=120, optimizer="sgd", lr=0.008,
    momentum=0.9, weight_decay=1e-4, warmup=5, warmup_lr=8e-5, min_lr=1.6e-5, drop_path=0.1, bias_lr=2.0,
    log_var_floor=-2.0, weights="default"
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
        FGVC, backbone="toy_vit", toy_preset="birds-easy", image_size=(64, 64), resize=(0, 0), pad=4,
        boxes=True, batch_size=32, epochs=12,  # on scenes it is still at chance after 11 epochs
        lr=1.5e-3, lr_batch=0, schedule="onecycle", warmup=0,
        drop_path=0.0, weights="none"
    )
}

# ------------------------------------------------------------------------------------------ tables

PLAIN, GLCA_ONLY, PWCA_ONLY = {"glca": False, "pwca": False}, {"pwca": False}, {"glca": False}
TINY = {"backbone": "deit_tiny", "normalize": "imagenet"}
SMALL = {"backbone": "deit_small", "normalize": "imagenet"}
BASE = {"backbone": "deit_base", "normalize": "imagenet"}
VIT = {"backbone": "vit_base", "normalize": "half"}
HYBRID = {"backbone": "r50_vit_base", "normalize": "half"}
REID, BOTH = "mAP rank1", {"cub": "top1", "msmt17": "mAP"}

TABLES = {
    "baseline": Table("DCAL and the plain ViT", "cub", "top1", (
        ("plain ViT", PLAIN, 82.1),
        ("DCAL", {}, 84.6)
    )),
    **by_dataset("1", "Table 1: FGVC", {"cub": "top1", "cars": "top1", "aircraft": "top1"}, (
        ("DeiT-Tiny", TINY | PLAIN, 82.1, 87.2, 84.7),
        ("DeiT-Tiny + DCAL", TINY, 84.6, 89.4, 87.4),
        ("DeiT-Small", SMALL | PLAIN, 85.8, 90.7, 88.1),
        ("DeiT-Small + DCAL", SMALL, 87.6, 92.3, 90.0),
        ("DeiT-Base", BASE | PLAIN, 88.0, 92.9, 90.3),
        ("DeiT-Base + DCAL", BASE, 88.8, 93.8, 92.6),
        ("ViT-Base", VIT | PLAIN, 90.8, 92.5, 90.0),
        ("ViT-Base + DCAL", VIT, 91.4, 93.4, 91.5),
        ("R50-ViT-Base", HYBRID | PLAIN, 91.3, 94.0, 92.4),
        ("R50-ViT-Base + DCAL", HYBRID, 92.0, 95.3, 93.3)
    )),
    **by_dataset(
        "2", "Table 2: Re-ID",
        {"veri776": REID, "msmt17": REID, "market1501": REID, "dukemtmc": REID}, (
        ("DeiT-Tiny", TINY | PLAIN, (71.3, 94.3), (42.1, 63.9), (77.9, 90.3), (69.5, 82.9)),
        ("DeiT-Tiny + DCAL", TINY, (74.1, 94.7), (44.9, 68.2), (79.8, 91.8), (71.7, 84.9)),
        ("DeiT-Small", SMALL | PLAIN, (76.7, 95.5), (53.3, 75.0), (84.3, 93.7), (75.7, 87.6)),
        ("DeiT-Small + DCAL", SMALL, (78.1, 95.9), (55.1, 77.3), (85.3, 94.0), (77.4, 87.9)),
        ("DeiT-Base", BASE | PLAIN, (78.3, 95.9), (60.5, 81.6), (86.6, 94.4), (79.1, 88.7)),
        ("DeiT-Base + DCAL", BASE, (80.0, 96.5), (62.3, 83.1), (87.2, 94.5), (80.2, 89.6)),
        ("ViT-Base", VIT | PLAIN, (78.1, 96.0), (61.6, 81.4), (87.1, 94.3), (78.9, 89.4)),
        ("ViT-Base + DCAL", VIT, (80.2, 96.9), (64.0, 83.1), (87.5, 94.7), (80.1, 89.0))
    )),
    **by_dataset("3", "Table 3: the two modules", {"cub": "top1", "veri776": REID, "msmt17": REID}, (
        ("Baseline", PLAIN, 82.1, (78.1, 96.0), (61.6, 81.4)),
        ("+ GLCA", GLCA_ONLY, 83.1, (79.5, 96.5), (63.7, 83.0)),
        ("+ PWCA", PWCA_ONLY, 83.1, (79.2, 96.5), (62.8, 82.3)),
        ("Ours", {}, 84.6, (80.2, 96.9), (64.0, 83.1))
    )),
    **by_dataset("4", "Table 4: regularisation", BOTH, (
        ("Baseline", PLAIN, 82.1, 61.6),
        ("+ PWCA", PWCA_ONLY, 83.1, 62.8),
        ("+ Adding noise in I1", PLAIN | {"image_noise": 0.5}, 77.3, 56.0),
        ("+ Adding noise in label of I1", PLAIN | {"label_noise": 0.1}, 81.6, 60.8),
        ("+ I2 from noise", PWCA_ONLY | {"pair": "noise"}, 82.1, 62.1),
        ("+ I2 from intra-class only", PWCA_ONLY | {"pair": "intra", "instances": 4}, 81.7, 62.2),
        ("+ I2 from inter-class only", PWCA_ONLY | {"pair": "inter"}, 83.0, 62.7),
        ("+ I2 from intra- & inter-class (1:1)", PWCA_ONLY | {"pair": "mixed", "instances": 4}, 83.0, 62.5)
    )),
    "glca": Table("Sec. 4.4: GLCA's queries and keys", "cub", "top1", (
        ("CrossViT's exchange (for the class token: local keys)", GLCA_ONLY | {"kv": "local"}, 82.1),
        ("local self-attention", GLCA_ONLY | {"kv": "local"}, 82.6),
        ("random local queries", GLCA_ONLY | {"select": "random"}, 82.6),
        ("queries by the penultimate layer", GLCA_ONLY | {"select": "last"}, 82.8),
        ("GLCA", GLCA_ONLY, 83.1)
    )),
    **by_dataset("infer", "Sec. 4.6: one training, tested with", {"cub": "top1", "veri776": "mAP"}, (
        ("SA and GLCA", {}, 84.6, 80.2),
        ("SA alone", {"eval": {"infer": "sa"}}, 84.3, 80.1),
        ("GLCA alone", {"eval": {"infer": "glca"}}, None, None)
    )),
    # Figure 2 is only drawn: its known values are those of Table 3
    **by_dataset("fig2-glca", "Figure 2: GLCA blocks", BOTH, (
        ("M = 1", GLCA_ONLY, 83.1, 63.7),
        ("M = 2", GLCA_ONLY | {"glca_blocks": 2}, None, None),
        ("M = 3", GLCA_ONLY | {"glca_blocks": 3}, None, None)
    )),
    **by_dataset("fig2-pwca", "Figure 2: PWCA blocks", BOTH, (
        ("T = 0", PLAIN, 82.1, 61.6),
        ("T = 4", PWCA_ONLY | {"pwca_blocks": 4}, None, None),
        ("T = 8", PWCA_ONLY | {"pwca_blocks": 8}, None, None),
        ("T = 12", PWCA_ONLY, 83.1, 62.8)
    ))
}

# ------------------------------------------------------------------------------------------ GLCA (Sec. 3.2)


def select_local(row, ratio):
    """The class token's rollout row (B, N) -> token numbers of the queries (B, 1 + k), best first.

    The class token, number 0, is always the first; then the k = R * (N - 1) patches that it reaches most.
    """
    response = row[:, 1:]  # of the patches
    k = max(1, int(ratio * response.shape[1]))
    return F.pad(response.topk(k).indices + 1, (1, 0))  # the class token has number 0


def global_local_cross_attention(block, local, tokens):
    """One GLCA block (Eq. 3): Q^l of `local` (B, n, C), K^g and V^g of `tokens` (B, N, C) -> (B, n, C)."""
    x, y, qkv = block.norm1(local), block.norm1(tokens), block.attn.qkv
    # Q^l = x W_Q, K^g = y W_K, V^g = y W_V (Sec. 3.1), cut into heads: (B, h, n or N, d)
    sources = zip((x, y, y), qkv.weight.chunk(3), qkv.bias.chunk(3))
    q, k, v = (F.linear(t, W, b).unflatten(2, (block.attn.heads, -1)).transpose(1, 2) for t, W, b in sources)
    return block.finish(local, F.scaled_dot_product_attention(q, k, v))


# ------------------------------------------------------------------------------------------ PWCA (Sec. 3.3)


def random_cycle(B):
    """Partner of each of B images, (B,): one cycle through all in random order, so none is its own."""
    order = torch.randperm(B)
    return order.roll(1)[order.argsort()]  # the partner of order[i] is order[i - 1]


def partners(targets, pair):
    """For each image I1 of a batch the number of its I2, (B,), of the wanted kind (Table 4), never itself.

    Classes [7, 7, 9] with pair "intra": [1, 0, 0 or 1]; the third image is alone in its class and takes any.
    """
    B, device = len(targets), targets.device
    if B < 2:
        raise ValueError("a training batch of one image has no pairs for PWCA; use --batch-size 2 or more "
                         "(in each process and part), or --no-pwca")
    if pair in ("any", "noise"):
        return random_cycle(B).to(device)
    others = {"intra": 0.0, "mixed": 0.5, "inter": 1.0}[pair]  # share of images that want another class
    own_class = (torch.rand(B, 1) >= others).to(device)
    same = targets[:, None] == targets  # (B, B)
    score = torch.rand(B, B).to(device) + (same == own_class)  # the wanted kind first, random within a kind
    return score.fill_diagonal_(-1).argmax(1)


def pairwise_cross_attention(q1, k1, v1, k2, v2):
    """Queries of I1 over the keys and values of I1 and I2, normalised together (Eq. 4); all (B, h, N, d)."""
    k_c, v_c = torch.cat([k1, k2], 2), torch.cat([v1, v2], 2)  # (B, h, 2N, d)
    return F.scaled_dot_product_attention(q1, k_c, v_c)


# ------------------------------------------------------------------------------------------ losses (Sec. 4.1)

BRANCHES = ("sa", "glca", "pwca")


def uncertainty_weighted(loss, log_var):
    """Loss L and log-variance s of a branch -> 0.5 * (exp(-s) L + s), to be summed (FairMOT; Sec. 4.1)."""
    return 0.5 * ((-log_var).exp() * loss + log_var)


def triplet_loss(features, targets):
    """Batch-hard triplet loss with soft margin on un-normalised features (B, C).

    log(1 + exp(farthest positive - nearest negative)), Euclidean. ValueError for a batch of one identity.
    """
    same = targets[:, None] == targets
    if same.all():
        raise ValueError("a batch, or a part of it, holds one identity: the triplet loss has no negatives; "
                         "use a larger --batch-size, fewer --accumulate or processes, or smaller --instances")
    distance = torch.cdist(features.float(), features.float())  # (B, B)
    positive = (distance * same).amax(1)
    negative = distance.masked_fill(same, torch.inf).amin(1)
    return F.softplus(positive - negative).mean()


def make_head(recipe, dim, classes):
    """A branch's classifier: features (B, C) -> logits (B, K).

    For Re-ID BNNeck: batch norm without shift, then linear without bias. Triplet loss and test use its input.
    """
    if recipe.task == "reid":
        neck = nn.Sequential(OrderedDict(
            norm=nn.BatchNorm1d(dim), classifier=nn.Linear(dim, classes, bias=False)))
        neck.norm.bias.requires_grad_(False)
        nn.init.normal_(neck.classifier.weight, std=0.001)
        return neck
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


# ------------------------------------------------------------------------------------------ model (Figure 1)


def class_rollout(layers):
    """The class token's row (B, N) of the rollout over SA layers of (tokens, q, k, v)."""
    return common.cls_rollout([(q, k) for _, q, k, _ in layers])


class DCAL(nn.Module):
    """A ViT with its two helpers. One head serves SA and PWCA, GLCA has its own."""

    def __init__(self, vit, recipe, num_classes):
        super().__init__()
        dim = len(vit.norm.weight)
        self.recipe, self.vit, self.num_classes = recipe, vit, num_classes
        self.head = make_head(recipe, dim, num_classes)
        if recipe.glca:
            end = nn.ModuleDict({"blocks": vit.blocks[-recipe.glca_blocks :], "norm": vit.norm})
            self.glca = copy.deepcopy(end)
            self.glca_head = make_head(recipe, dim, num_classes)
        self.paired = recipe.pwca and recipe.pwca_blocks > 0
        # with the class token as read-out the chosen patches change nothing (see the finding above)
        self.selects = (
            recipe.kv == "local" or recipe.glca_readout == "mean" or recipe.local_queries == "always")
        learned = recipe.dynamic_loss and (recipe.glca or self.paired)  # one loss alone needs no weight
        self.log_vars = nn.Parameter(torch.zeros(3), requires_grad=learned)  # of BRANCHES

    def encode(self, images, partner=None, glca=True):
        """Images (B, 3, H, W) -> dict of features (B, C) after the final norms: "sa", "glca", "pwca".

        partner (B,): number of each image's I2, without it no PWCA; glca: run that branch if there is one.
        """
        glca &= self.recipe.glca
        tokens, layers = self.sa_branch(images, partner is not None or glca and self.selects)
        features = {"sa": self.vit.norm(tokens[:, 0])}
        if glca:
            features["glca"] = self.glca_branch(layers)
        if partner is not None:
            features["pwca"], _ = self.pwca_branch(layers, partner)
        return features

    def sa_branch(self, images, keep_all=True):
        """Images -> tokens (B, N, C) after the last block, and the layers that the other branches borrow.

        A layer is what a block works on: (tokens, q, k, v), tokens (B, N, C) as they enter it, the others
        (B, h, N, d). Keeping them takes memory: all, or the last M.
        """
        blocks, tokens, layers = self.vit.blocks, self.vit.embed(images), []
        for i, block in enumerate(blocks):
            q, k, v = block.attn.split(block.norm1(tokens))
            if keep_all or i >= len(blocks) - self.recipe.glca_blocks:
                layers.append((tokens, q, k, v))
            tokens = block.finish(tokens, F.scaled_dot_product_attention(q, k, v))
        return tokens, layers

    def glca_branch(self, layers):
        """The last M SA layers, all where patches are selected -> GLCA's feature (B, C) (Fig. 1a)."""
        recipe, M = self.recipe, self.recipe.glca_blocks
        tokens = layers[-M][0]  # (B, N, C), as block L - M gives them
        local = tokens[:, :1]
        if self.selects:
            row = class_rollout(layers[:-M] if recipe.select == "rollout" else layers[-M - 1 : -M])
            if recipe.select == "random":
                row = torch.rand_like(row)
            local = take(tokens, select_local(row, recipe.local_ratio))  # (B, 1 + k, C)
        for block, (tokens, *_) in zip(self.glca.blocks, layers[-M:]):
            local = global_local_cross_attention(block, local, tokens if recipe.kv == "global" else local)
        return self.glca.norm(local[:, :1] if recipe.glca_readout == "cls" else local).mean(1)

    def pwca_branch(self, layers, partner):
        """All SA layers, number of each image's I2 (B,) -> PWCA's feature (B, C), (q1, k1) of its blocks.

        In the last T blocks I1 also attends to the keys and values that I2 has in its SA pass (Fig. 1b).
        """
        T, pair_layers = self.recipe.pwca_blocks, []
        layers = layers[-T:]
        tokens = layers[0][0]  # up to here PWCA is SA
        for block, (_, _, k2, v2) in zip(self.vit.blocks[-T:], layers):
            q1, k1, v1 = block.attn.split(block.norm1(tokens))
            if self.training and self.recipe.pair == "noise":
                k2, v2 = torch.randn_like(k2), torch.randn_like(v2)
            tokens = block.finish(tokens, pairwise_cross_attention(q1, k1, v1, k2[partner], v2[partner]))
            pair_layers.append((q1, k1))
        return self.vit.norm(tokens[:, 0]), pair_layers

    def classify(self, features):
        """dict of features -> dict of logits (B, K), each by its branch's head."""
        return {name: (self.glca_head if name == "glca" else self.head)(x).float()
                for name, x in features.items()}

    def forward(self, images, targets=None):
        """images -> logits (B, K) or Re-ID features; with targets (B,) -> (loss, terms) (Sec. 4.1)."""
        recipe, partner, labels, loss, terms = self.recipe, None, targets, 0, {}
        if targets is None:
            outputs = self.heads(images, recipe.infer != "sa")
            return outputs.get(recipe.infer, outputs["sa"])
        if self.training:
            if self.paired:
                partner = partners(targets, recipe.pair)
            if recipe.image_noise:
                images = images + recipe.image_noise * torch.randn_like(images)
            if recipe.label_noise:
                wrong = torch.rand_like(targets, dtype=torch.float) < recipe.label_noise
                labels = torch.where(wrong, torch.randint_like(targets, self.num_classes), targets)
        features = self.encode(images, partner)
        logits = self.classify(features)
        self.log_vars.data.clamp_(min=recipe.log_var_floor)
        for name, feature in features.items():
            value = F.cross_entropy(logits[name], labels, label_smoothing=recipe.label_smoothing)
            if recipe.task == "reid":
                value = value + triplet_loss(feature, labels)
            terms[name] = value.detach()
            if len(features) > 1 and recipe.dynamic_loss:
                log_var = self.log_vars[BRANCHES.index(name)]
                terms[f"s_{name}"] = log_var.detach()
                value = uncertainty_weighted(value, log_var)
            loss = loss + value
        right = common.fuse([x for name, x in logits.items() if name != "pwca"]).argmax(1) == targets
        return loss, terms | {"top1": right.float().mean()}

    def heads(self, images, glca=True):
        """images -> logits (B, K), or Re-ID features of length 1, of each branch and both (Sec. 4.1)."""
        features, reid = self.encode(images, glca=glca), self.recipe.task == "reid"
        outputs = features if reid else self.classify(features)
        values = list(outputs.values())
        if len(values) > 1:
            outputs["both"] = torch.cat(values, 1) if reid else common.fuse(values)
        return {name: F.normalize(x.float()) for name, x in outputs.items()} if reid else outputs

    @torch.no_grad()
    def where(self, images):
        """Top-R patches of the rollout before GLCA -> boxes (B, k, 4), responses (B, k), best first."""
        _, layers = self.sa_branch(images)
        row = class_rollout(layers[: -self.recipe.glca_blocks])
        patches = select_local(row, self.recipe.local_ratio)[:, 1:]
        return common.cells_to_boxes(patches - 1, self.vit.grid, images.shape[2:]), row.gather(1, patches)

    def figure(self, images):
        """One page an image of Figures 3 and 4; each image's distractor is the next of the batch."""
        return draw_pages(self, images)


# ------------------------------------------------------------------------------------------ pictures


def pair_rollout(layers, pair_layers, partner):
    """Rollout (Eq. 2) of PWCA's class token over both images -> (B, N) on I1, (B, N) on I2 (Figs. 3b, 4b).

    layers: (tokens, q, k, v) of every SA block; pair_layers: (q1, k1) of the last T. Together they sum to 1.
    """
    N = layers[0][0].shape[1]
    row = torch.eye(1, 2 * N, device=partner.device)  # of the class token, on the tokens of both
    for (_, q, k, _), pair in zip_longest(reversed(layers), reversed(pair_layers)):
        alone = common.attention_weights(q, k)  # (B, N, N)
        first = F.pad(alone, (0, N))  # (B, N, 2N), of I1: before the last T blocks PWCA is SA
        if pair:
            q1, k1 = pair
            first = common.attention_weights(q1, torch.cat([k1, k[partner]], 2))
        second = F.pad(alone[partner], (N, 0))  # of I2, which attends to itself alone
        row = 0.5 * row + 0.5 * row @ torch.cat([first, second], 1)
    return row[:, 0].chunk(2, -1)


@torch.no_grad()
def draw_pages(model, images):
    """Figures 3 and 4: image, rollout of SA, selected patches; with PWCA its rollout on both images."""
    (H, W), pages = images.shape[2:], []
    partner = torch.arange(len(images), device=images.device).roll(-1)
    _, layers = model.sa_branch(images)
    boxes, _ = model.where(images)
    pair_layers = model.pwca_branch(layers, partner)[1] if model.paired else []
    rows = class_rollout(layers), *pair_rollout(layers, pair_layers, partner)
    rows = torch.stack(rows, 1).cpu()  # (B, 3, N)
    photos = [common.to_pil(image, model.recipe.normalize) for image in images]
    for i, photo in enumerate(photos):
        sa, own, other = rows[i, :, 1:].unflatten(1, model.vit.grid)
        parts = {"image": photo, "attention rollout (SA)": common.heat(photo, sa)}
        parts[f"top {boxes.shape[1]} patches"] = common.draw_boxes(photo, boxes[i], (), common.COLOURS[:1], 1)
        if pair_layers and len(photos) > 1:
            # without the few outliers, beside which all else is dark; the distractor at most as bright
            top = own.quantile(0.98)
            span = own.quantile(0.02), top
            parts[f"PWCA: {rows[i, 1].sum():.0%} stays here"] = common.heat(photo, own, span=span)
            span = other.quantile(0.02), max(top, other.quantile(0.98))
            parts[f"distractor: {rows[i, 2].sum():.0%}"] = common.heat(photos[partner[i]], other, span=span)
        pages.append(common.panels(parts.values(), parts, max(H, 224 * H // W)))
    return pages


# ------------------------------------------------------------------------------------------ the hybrid


class StdConv(nn.Conv2d):
    """Convolution whose kernels have zero mean and unit deviation (population; Google adds 1e-5 to it).

    Padded as TensorFlow does, the odd pixel at the right and bottom; sides are multiples of the stride here.
    """

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        pad = max(0, self.kernel_size[0] - self.stride[0])
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), None, self.stride)


def conv_norm(inputs, outputs, kernel=1, stride=1):
    """A standardised convolution and its GroupNorm."""
    conv = StdConv(inputs, outputs, kernel, stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.GroupNorm(32, outputs, eps=1e-6)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (stride), 1x1, each with GroupNorm; ReLU after the sum."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        mid = outputs // 4
        self.conv1, self.norm1 = conv_norm(inputs, mid)
        self.conv2, self.norm2 = conv_norm(mid, mid, 3, stride)
        self.conv3, self.norm3 = conv_norm(mid, outputs)
        self.downsample = nn.Identity() if inputs == outputs else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.downsample(x))


class ResNetStem(nn.Module):
    """ResNet-50 with its last units in the third stage: (B, 3, H, W) -> (B, 1024, H / 16, W / 16)."""

    channels, stride = 1024, 16

    def __init__(self):
        super().__init__()
        self.stem, self.stages = conv_norm(3, 64, 7, 2), nn.Sequential()
        for inputs, outputs, units, stride in ((64, 256, 3, 1), (256, 512, 4, 2), (512, 1024, 9, 2)):
            others = (Bottleneck(outputs, outputs, 1) for _ in range(units - 1))
            blocks = nn.Sequential(Bottleneck(inputs, outputs, stride), *others)
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))

    def forward(self, images):
        x = F.relu(self.stem(images))
        return self.stages(F.max_pool2d(x, 3, 2, ceil_mode=True))  # TensorFlow's padding again


RENAMES = (  # Google's .npz of the hybrid -> timm's names
    (r"conv_root/", "patch_embed.backbone.stem.conv."),
    (r"gn_root/", "patch_embed.backbone.stem.norm."),
    (r"\bblock(\d+)/unit0?(\d+)/",
     lambda m: f"patch_embed.backbone.stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}."),
    (r"conv_proj/", "downsample.conv."),
    (r"gn_proj/", "downsample.norm."),
    (r"(conv\d)/", r"\1."),
    (r"gn(\d)/", r"norm\1.")
)

# ------------------------------------------------------------------------------------------ building


def build(recipe, num_classes):
    """The model for `num_classes` classes or identities, its weights as recipe.weights says."""
    common.check_build(recipe, Recipe, num_classes)
    if recipe.backbone == "r50_vit_base":
        vit = common.VisionTransformer(recipe.image_size, drop_path=recipe.drop_path, stem=ResNetStem())
        vit.official = common.JAX + "R50%2BViT-B_16.npz"
    else:
        vit = common.vit(recipe.backbone, recipe.image_size, drop_path=recipe.drop_path)
    if recipe.glca_blocks >= len(vit.blocks) or recipe.infer == "glca" and not recipe.glca:
        raise ValueError(
            f"--glca-blocks {recipe.glca_blocks} --infer {recipe.infer}: {recipe.backbone} takes 1 to "
            f"{len(vit.blocks) - 1} (the rollout needs a block before them); --infer glca needs --glca")
    held = common.load_vit(vit, recipe.weights, RENAMES) if recipe.weights != "none" else {}
    model = DCAL(vit, recipe, num_classes)
    own = {name[5:]: value for name, value in held.items() if name.startswith("glca.")}
    if own and recipe.glca:  # a run of ours that had the branch; else it starts from the last blocks
        common.load_state(model.glca, own, source=f"--weights {recipe.weights}")
    return model


def param_groups(model, recipe):
    """Weights with decay; biases, norms, tokens, positions, loss weights without; biases at own rate."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or name.endswith(("cls_token", "pos_embed"))
            rate = recipe.bias_lr if name.endswith(".bias") else 1.0
            groups.setdefault((0.0 if free else recipe.weight_decay, rate), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "lr_scale": rate}
            for (decay, rate), params in groups.items()]
