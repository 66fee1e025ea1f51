"""M2Former: Multi-Scale Patch Selection for Fine-Grained Visual Recognition, Moon, Lee, Lee and Park, arXiv:2308.02161.

The idea: a multi-scale transformer sees large patches late and small ones early. After each stage, keep the k patches with the highest mean
activation (MSPS). The class token of the last stage, which has seen everything, is projected to each stage's width and joins its patches (CTT). One
block lets all stages interact, first over channels (CCA), then over positions (SCA). Each stage's class token classifies, and so do all together.

Where to find it:
  Sec. 3.1 backbone       MViTv2, SwinB, CvT: .stages       Eq. 8-10  channel cross-attention   ChannelCrossAttention
  Sec. 3.2 merging, r     merge_patches                     Eq. 11-13 spatial cross-attention   SpatialCrossAttention
  Eq. 1-3  MSPS           select_patches                    Eq. 7     both of them              CrossScaleBlock
  Eq. 5    CTT            ClassTokenTransfer                Eq. 14-16 loss and prediction       smooth_cross_entropy, M2Former.forward
  Eq. 4, 6 P with CLS     M2Former.with_class_tokens        Figures 5, 6                        M2Former.figure

Where this differs from the paper
  - Eq. 13 has no LayerNorm, residual or FFN, and no number of heads: as the authors' code, a pre-norm block with both residuals, 8 heads, d = c_last.
  - Maps of an odd size: the last merged row or column averages fewer patches, and k is at most the number of cells.
  - The rows of Table 3 without CCA or SCA have no code. Without SCA each stage attends to its own tokens, with the same weights (Eq. 6's MSA).
    Fewer stages keep their own k and alpha. More MSCA blocks have their own weights. All are our reading, and so is everything on Swin-B and CvT-21.
  - Prediction: forward returns log(mean of the five softmax outputs), whose argmax is that of Eq. 16 and whose softmax is their mean.
Where the paper and the authors' code differ
  - k. Paper: {k1..k4} = {6, 18, 54, 162}. Code: the reverse, as the text wants (many small patches), and as 162 > 49 cells. We: code.
  - Eq. 8 divides by k, Eq. 15 by n. Code: by k + 1 and by n - 1, so that these are a mean and a distribution. We: code.
  - Scores (Eq. 2) are taken before any LayerNorm, whose output has mean zero. Both of them; worth knowing.
  - Relative positions at 448. Code: the pretrained tables are dropped for new ones. We: interpolated; --rel-pos reinit is the code.
  - Warm-up of 500 steps and clipping at 1.0 are the code's alone. Its scheduler steps first, so that update m = 1..10000 has lr(m); ours, m = 0..9999.
  - Code: the best test score of 100 looks is kept. We: the last step.
  - BatchNorm (Eq. 5, 9): the code's three GPUs see 6, 6 and 4 images; one process sees all 16. With torchrun each process has its own statistics.

  python train.py --method m2former                                              # toy birds, a CPU and some minutes
  python train.py --method m2former --data cub --root DIR                        # Table 1
  python train.py --method m2former --data cub --root DIR --backbone swin_base --ctt pool --image-size 384 --resize 510 --drop-path 0.2
  python train.py table --method m2former --table 3 --data toy --seeds 0,1,2
"""
import math
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.autograd.function import once_differentiable
from torchvision.models import SwinTransformer
from torchvision.ops import StochasticDepth

import common
from common import Table, opt

BACKBONES = ("mvitv2_tiny", "mvitv2_small", "mvitv2_base", "mvitv2_large", "mvitv2_large_in1k", "mvitv2_toy", "swin_base", "cvt21")
MVIT_URL, SWIN_URL = "https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_{}.pyth", "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/{}.pth"
WEIGHTS = {  # --weights default; the authors of MViTv2 publish tiny and small on ImageNet-1K only, without a class token; no hashes are published
    "mvitv2_tiny": MVIT_URL.format("T_in1k"), "mvitv2_small": MVIT_URL.format("S_in1k"), "mvitv2_base": MVIT_URL.format("B_in21k"),
    "mvitv2_large": MVIT_URL.format("L_in21k"), "mvitv2_large_in1k": MVIT_URL.format("L_in1k"), "swin_base": SWIN_URL.format("swin_base_patch4_window12_384_22k"),
}

# ------------------------------------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class Recipe(common.Recipe):
    """The paper's switches. Tuples count stages from the finest; a backbone of three stages uses the first k and the last alpha."""

    backbone: str = opt("mvitv2_base", "multi-scale transformer (Sec. 4.2, Table 6); large_in1k widens in the MLP, as that file does; toy: our choice", BACKBONES)
    rel_pos: str = opt("interpolate", "pretrained position tables of another size: resized, or drawn anew (authors' code)", ("interpolate", "reinit"))
    attention: str = opt("auto", "form of MViTv2's attention, the same numbers: position bias folded into the dot product (accelerators), a few rows of scores at a time (CPUs), or written out (authors' code)", ("auto", "folded", "chunked", "explicit"))
    msps: bool = opt(True, "multi-scale patch selection (Sec. 3.2); off: the plain backbone with one head, Table 3 (a)")
    stages: tuple[int, ...] = opt((1, 2, 3, 4), "stages that select patches, 1 is the finest (Table 8)")
    k: tuple[int, ...] = opt((162, 54, 18, 6), "patches selected in each stage (Eq. 3, Sec. 4.2)")
    merge: int = opt(2, "r: r x r patches are averaged before selection (Sec. 3.2)")
    ctt: str = opt("mlp2", "class token of a stage: transferred by two layers or one (Eq. 5), its own (Eq. 4), or none and average pooling (Table 7)", ("mlp2", "mlp1", "attach", "pool"))
    cca: bool = opt(True, "channel cross-attention (Sec. 3.4.1)")
    sca: bool = opt(True, "spatial cross-attention (Sec. 3.4.2); off: each stage attends to its own tokens only")
    num_msca: int = opt(1, "blocks of multi-scale cross-attention (Table 4)")
    alpha: tuple[float, ...] = opt((0.6, 0.7, 0.8, 0.9, 1.0), "target of the true class for the head of each stage, and for the one of all (Eq. 15)")


CUB = Recipe(  # Sec. 4.2; warm-up, clipping, fp32 and stochastic depth are the authors' code
    image_size=(448, 448), resize=(600, 600), batch_size=16, iterations=10_000, optimizer="sgd", lr=0.03, momentum=0.9, weight_decay=0.0,
    schedule="cosine", warmup=500, grad_clip=1.0, drop_path=0.3, amp="off", weights="default",
)
RECIPES = {
    "cub": CUB,
    "nabirds": CUB,
    "folder": replace(CUB, iterations=0, epochs=27, warmup=1.35),  # what 10,000 steps are on CUB
    "toy": replace(  # the setting that was seen to learn; lr 2e-3 with shifts of 4 px was still at chance after half of 40 epochs
        CUB, backbone="mvitv2_toy", image_size=(64, 64), resize=(0, 0), k=(12, 4, 2, 1), toy_preset="birds-easy", iterations=0, epochs=25, warmup=0,
        batch_size=32, optimizer="adamw", lr=1.5e-3, weight_decay=0.05, schedule="onecycle", drop_path=0.0, weights="none",
    ),
}

# ------------------------------------------------------------------------------------------------ tables

CVT, SWIN = {"backbone": "cvt21", "drop_path": 0.1}, {"backbone": "swin_base", "ctt": "pool", "image_size": (384, 384), "resize": (510, 510), "drop_path": 0.2}
TABLES = {
    "baseline": Table("M2Former and its plain backbone", "cub", "top1", (("plain MViTv2", {"msps": False}, 91.6), ("M2Former", {}, 92.4))),
    "toy": Table("Modules on toy birds", "toy", "top1", (
        ("plain MViTv2", {"msps": False}, None), ("MSPS", {"ctt": "attach", "cca": False, "sca": False}, None), ("MSPS + CTT", {"cca": False, "sca": False}, None), ("all", {}, None),
    )),
    "1": Table("Table 1: CUB", "cub", "top1", (("M2Former", {}, 92.4),)),
    "2": Table("Table 2: NABirds", "nabirds", "top1", (("M2Former", {}, 91.1),)),
    "3": Table("Table 3: modules", "cub", "top1", (
        ("(a) MViTv2-B", {"msps": False}, 91.6),
        ("(b) MSPS", {"ctt": "attach", "cca": False, "sca": False}, 91.6),
        ("(c) MSPS + CTT", {"cca": False, "sca": False}, 92.1),
        ("(d) MSPS + CTT + CCA", {"sca": False}, 92.2),
        ("(e) MSPS + CTT + SCA", {"cca": False}, 92.1),
        ("(f) all", {}, 92.4),
    )),
    "4": Table("Table 4: MSCA blocks", "cub", "top1", tuple((str(n), {"num_msca": n}, top1) for n, top1 in ((1, 92.4), (2, 92.1), (3, 92.2), (4, 92.2)))),
    "5": Table("Table 5: selected patches, stage 4 to 1", "cub", "top1", tuple(
        (str(k), {"k": k[::-1]}, top1) for k, top1 in (((6, 8, 10, 12), 92.2), ((6, 12, 24, 48), 92.2), ((6, 18, 54, 162), 92.4), ((7, 28, 112, 448), 92.1)))),
    "6": Table("Table 6: backbones", "cub", "top1", (
        ("CvT-21", CVT | {"msps": False}, 89.3), ("CvT-21 MSPS", CVT, 90.0), ("Swin-B", SWIN | {"msps": False}, 90.6), ("Swin-B MSPS", SWIN, 91.3),
    )),
    "7": Table("Table 7: class tokens", "cub", "top1", (
        ("global pool", {"ctt": "pool"}, 91.5), ("simple attach", {"ctt": "attach"}, 91.9), ("CTT with 1 layer", {"ctt": "mlp1"}, 92.1), ("CTT with 2 layers", {}, 92.4),
    )),
    "8": Table("Table 8: stages; eval has the accuracy by object scale", "cub", "top1", (
        ("none", {"msps": False}, 91.6), ("4", {"stages": (4,)}, 91.5), ("3, 4", {"stages": (3, 4)}, 91.9), ("2, 3, 4", {"stages": (2, 3, 4)}, 92.3), ("all", {}, 92.4),
    )),
}

# ------------------------------------------------------------------------------------------------ MViTv2


def resize_rel_pos(table, rows):
    """Linear interpolation of a table of relative positions (n, d) -> (rows, d); row i is distance i - (n - 1) / 2."""
    if len(table) == rows:
        return table
    return F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T


def distances(table, queries, keys):
    """Rows of the resized table for every pair of positions on one axis, on the grid of the finer of the two -> (queries, keys, d)."""
    q = torch.arange(queries, device=table.device)[:, None] * max(keys / queries, 1.0)
    k = torch.arange(keys, device=table.device)[None] * max(queries / keys, 1.0)
    index = q - k + (keys - 1) * max(queries / keys, 1.0)
    return resize_rel_pos(table, 2 * max(queries, keys) - 1)[index.long()]


def position_products(q, tables, q_grid, k_grid):
    """Products of the patch queries of q (B, h, N, d) with the two tables -> (B, h, qh, qw, kh) and (B, h, qh, qw, kw); the class token has none."""
    patches = q[:, :, -q_grid[0] * q_grid[1]:].unflatten(2, q_grid)
    rows, columns = (distances(table, a, b) for table, a, b in zip(tables, q_grid, k_grid))
    return torch.einsum("bnyxd,yvd->bnyxv", patches, rows), torch.einsum("bnyxd,xwd->bnyxw", patches, columns)


def attend_explicit(q, k, v, tables, q_grid, k_grid):
    """softmax(q k^T / sqrt(d) + bias) v with the bias written out, as in the authors' code: (B, h, N, d) -> (B, h, N, d)."""
    by_row, by_column = position_products(q, tables, q_grid, k_grid)
    bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)  # (B, h, qh * qw, kh * kw)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    class_token = scores.shape[-2] - bias.shape[-2]
    return (scores + F.pad(bias, (class_token, 0, class_token, 0))).softmax(-1) @ v


def attend_folded(q, k, v, tables, q_grid, k_grid):
    """The same, without an N x N tensor.

    The bias of query i and key j is rows_i[row of j] + columns_i[column of j]: the product of (rows_i, columns_i) with a one-hot code of the row and of
    the column of j. So append the former to the scaled query and the code to the key, and the plain dot product of the two is the biased score, exactly.
    Any fused attention kernel can then work through it in tiles, and keeps only its output for backward. The class token gets zeros, hence no bias.
    Fused kernels want q, k and v of one width, so v is padded with zeros, which come out as zeros.
    """
    (B, h, N, d), (kh, kw) = q.shape, k_grid
    products = torch.cat(position_products(q, tables, q_grid, k_grid), -1).flatten(2, 3)  # (B, h, qh * qw, kh + kw)
    eye = lambda n: torch.eye(n, device=k.device, dtype=k.dtype)
    codes = torch.cat([eye(kh).repeat_interleave(kw, 0), eye(kw).repeat(kh, 1)], 1)  # (kh * kw, kh + kw)
    class_token = N - products.shape[2]
    q = torch.cat([q * d**-0.5, F.pad(products, (0, 0, class_token, 0))], -1)
    k = torch.cat([k, F.pad(codes, (0, 0, class_token, 0)).expand(B, h, -1, -1)], -1)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, kh + kw)), scale=1.0)[..., :d]


CHUNK = 2**18  # scores, 1 MB: what stays in the cache of a CPU core


class ChunkedAttention(torch.autograd.Function):
    """The explicit form a few rows of scores at a time, so that they stay in a CPU's cache; what FlashAttention does in its tiles.

    With P = softmax(S), O = P v and the gradient G of O: dv = P^T G, dS = P * (G v^T - rowsum(G * O)), and dS flows to q, k and the two summands of the
    bias. Backward makes P again from S and the kept logsumexp of its rows, so that no N x N tensor outlives a chunk.
    """

    @staticmethod
    def scores(q, k, by_row, by_column):
        """Rows of biased scores in fp32 at least: q (n, d), k (M, d), by_row (n, kh), by_column (n, kw) -> (n, M)."""
        s = (q * q.shape[1] ** -0.5) @ k.T
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        patches = s[:, len(k) - by_row.shape[1] * by_column.shape[1]:].unflatten(1, (by_row.shape[1], by_column.shape[1]))
        patches.add_(by_row[:, :, None]).add_(by_column[:, None, :])
        return s

    @staticmethod
    def chunks(B, h, N, M):
        """Index (image, head, slice of queries) of each chunk."""
        step = max(1, CHUNK // M)
        return [(b, i, slice(a, a + step)) for b in range(B) for i in range(h) for a in range(0, N, step)]

    @staticmethod
    def forward(ctx, q, k, v, by_row, by_column):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for at in ChunkedAttention.chunks(*q.shape[:3], k.shape[2]):
            s = ChunkedAttention.scores(q[at], k[at[:2]], by_row[at], by_column[at])
            lse[at] = s.logsumexp(1)
            out[at] = s.sub_(lse[at][:, None]).exp_().to(v.dtype) @ v[at[:2]]
        ctx.save_for_backward(q, k, v, by_row, by_column, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, by_row, by_column, out, lse = ctx.saved_tensors
        dq, dk, dv, drow, dcolumn = (torch.zeros_like(x) for x in (q, k, v, by_row, by_column))
        inner, scale = (grad * out).sum(3, dtype=lse.dtype), q.shape[3] ** -0.5
        for at in ChunkedAttention.chunks(*q.shape[:3], k.shape[2]):
            head = at[:2]
            p = ChunkedAttention.scores(q[at], k[head], by_row[at], by_column[at]).sub_(lse[at][:, None]).exp_()
            dv[head].addmm_(p.to(v.dtype).T, grad[at])
            ds = p.mul_((grad[at] @ v[head].T).sub_(inner[at][:, None])).to(q.dtype)
            dq[at] = (ds @ k[head]).mul_(scale)
            dk[head].addmm_(ds.T, q[at], alpha=scale)
            patches = ds[:, k.shape[2] - by_row.shape[3] * by_column.shape[3]:].unflatten(1, (by_row.shape[3], by_column.shape[3]))
            drow[at], dcolumn[at] = patches.sum(2), patches.sum(1)
        return dq, dk, dv, drow, dcolumn


@torch.compiler.disable  # a loop over chunks is not for a compiler to unroll
def attend_chunked(q, k, v, tables, q_grid, k_grid):
    """The same by ChunkedAttention: the fastest form on a CPU."""
    class_token = q.shape[2] - q_grid[0] * q_grid[1]
    products = (F.pad(p.flatten(2, 3), (0, 0, class_token, 0)) for p in position_products(q, tables, q_grid, k_grid))
    return ChunkedAttention.apply(q, k, v, *products)


def attend_auto(q, k, *rest):
    """The fastest: folded on an accelerator; on a CPU explicit while the scores of a head fit its cache, and chunked beyond."""
    fits = q.shape[2] * k.shape[2] <= CHUNK
    return (attend_folded if q.device.type != "cpu" else attend_explicit if fits else attend_chunked)(q, k, *rest)


ATTEND = {"auto": attend_auto, "folded": attend_folded, "chunked": attend_chunked, "explicit": attend_explicit}


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim, hidden, dim_out, activation=F.gelu):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(dim, hidden), nn.Linear(hidden, dim_out), activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class PoolingAttention(nn.Module):
    """Attention whose queries, keys and values are pooled by depthwise convolutions, with decomposed relative positions (MViTv2)."""

    def __init__(self, dim, dim_out, heads, q_stride, kv_stride, grid, form):
        super().__init__()
        d = dim_out // heads
        self.heads, self.attend = heads, ATTEND[form]
        self.qkv, self.proj = nn.Linear(dim, 3 * dim_out), nn.Linear(dim_out, dim_out)
        for name, stride in (("q", q_stride), ("k", kv_stride), ("v", kv_stride)):
            setattr(self, f"pool_{name}", nn.Conv2d(d, d, 3, stride, 1, groups=d, bias=False))  # one kernel for all heads
            setattr(self, f"norm_{name}", nn.LayerNorm(d, eps=1e-6))
        rows = [2 * -(-side // min(q_stride, kv_stride)) - 1 for side in grid]  # of the finer of the pooled grids
        self.rel_pos_h, self.rel_pos_w = nn.Parameter(torch.zeros(rows[0], d)), nn.Parameter(torch.zeros(rows[1], d))

    def pool(self, x, grid, conv, norm):
        """(B, N, C) -> (B, h, N', d) and its grid; the class token passes by the convolution, not by the norm."""
        B, N, C = x.shape
        class_token = N - grid[0] * grid[1]
        maps = x[:, class_token:].transpose(1, 2).unflatten(2, grid)  # (B, C, H, W), in memory channels_last already
        maps = F.conv2d(maps, conv.weight.repeat(self.heads, 1, 1, 1), stride=conv.stride, padding=1, groups=C)
        x = torch.cat([x[:, :class_token], maps.flatten(2).transpose(1, 2)], 1)
        x = norm(x.unflatten(2, (self.heads, -1))).to(x.dtype)  # under autocast a norm answers in fp32
        return x.transpose(1, 2), tuple(maps.shape[2:])  # (B, h, N', d)

    def forward(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, q_grid = self.pool(q, grid, self.pool_q, self.norm_q)
        k, k_grid = self.pool(k, grid, self.pool_k, self.norm_k)
        v, _ = self.pool(v, grid, self.pool_v, self.norm_v)
        out = self.attend(q, k, v, (self.rel_pos_h, self.rel_pos_w), q_grid, k_grid)
        class_token = q.shape[2] - q_grid[0] * q_grid[1]
        out = out + F.pad(q[:, :, class_token:], (0, 0, class_token, 0))  # residual pooling, of patches only
        return self.proj(out.transpose(1, 2).flatten(2)), q_grid


class Block(nn.Module):
    """Transformer block of MViTv2: (B, N, dim) -> (B, N', dim_out). `dim_att` is dim_out when the width grows in attention, else dim."""

    def __init__(self, dim, dim_att, dim_out, heads, q_stride, kv_stride, grid, form, drop_path):
        super().__init__()
        self.q_stride, self.widen_att, self.widen_mlp = q_stride, dim_att != dim, dim_out != dim_att
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim_att, eps=1e-6)
        self.attn = PoolingAttention(dim, dim_att, heads, q_stride, kv_stride, grid, form)
        self.mlp = Mlp(dim_att, 4 * dim_att, dim_out)
        if dim_out != dim:
            self.proj = nn.Linear(dim, dim_out)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, grid):
        u = self.norm1(x)
        out, q_grid = self.attn(u, grid)
        skip = self.proj(u) if self.widen_att else x
        if self.q_stride > 1:
            class_token = x.shape[1] - grid[0] * grid[1]
            maps = F.max_pool2d(skip[:, class_token:].transpose(1, 2).unflatten(2, grid), 3, self.q_stride, 1)
            skip = torch.cat([skip[:, :class_token], maps.flatten(2).transpose(1, 2)], 1)
        x = skip + self.drop_path(out)
        u = self.norm2(x)
        return (self.proj(u) if self.widen_mlp else x) + self.drop_path(self.mlp(u)), q_grid


class MViTv2(nn.Module):
    """MViTv2 under the official parameter names. num_classes=0: no final norm and no head, for stages() only.

    depths: blocks in each stage; dim, heads: of the first stage, both double from stage to stage; drop_path: of the last block.
    """

    def __init__(self, depths, dim, heads, image_size, num_classes, class_token=True, drop_path=0.0, attention="auto", widen="attention"):
        super().__init__()
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.check(H, W)
        widths = [dim * 2**s for s in range(len(depths))]
        self.ends = [end - 1 for end in accumulate(depths)]
        self.dims = widths if widen == "attention" else widths[1:] + widths[-1:]  # of what comes out of each stage
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, 7, 4, 3)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.blocks, grid, width, kv_stride = nn.ModuleList(), (H // 4, W // 4), dim, 4
        for stage, depth in enumerate(depths):
            kv_stride = kv_stride if stage == 0 else max(1, kv_stride // 2)
            for b in range(depth):
                q_stride = 2 if stage and b == 0 else 1
                dim_att = widths[stage]
                dim_out = dim_att if b < depth - 1 else self.dims[stage]
                rate = drop_path * len(self.blocks) / max(1, self.ends[-1])
                self.blocks.append(Block(width, dim_att, dim_out, heads * 2**stage, q_stride, kv_stride, grid, attention, rate))
                grid, width = tuple(-(-side // q_stride) for side in grid), dim_out
        if num_classes:
            self.norm = nn.LayerNorm(self.dims[-1], eps=1e-6)
            self.head = nn.Sequential(OrderedDict(projection=nn.Linear(self.dims[-1], num_classes)))
        self.apply(trunc_normal)
        for name, p in self.named_parameters():
            if name == "cls_token" or "rel_pos" in name:
                nn.init.trunc_normal_(p, std=0.02)

    @staticmethod
    def check(H, W):
        if H % 4 or W % 4 or min(H, W) < 4:
            raise ValueError(f"image size {H}x{W}: MViTv2 takes patches with stride 4, so both sides must be multiples of 4; try {max(4, H // 4 * 4)}x{max(4, W // 4 * 4)}")

    def stages(self, images):
        """(B, 3, H, W) -> for each stage its last map before any norm (B, C, H', W') and its class token (B, C), or None."""
        self.check(*images.shape[2:])
        maps = self.patch_embed(images)
        x, grid, taps = maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:]), []
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # at index 0, without a position
        for i, block in enumerate(self.blocks):
            x, grid = block(x, grid)
            if i in self.ends:
                patches = x if self.cls_token is None else x[:, 1:]
                taps.append((patches.transpose(1, 2).unflatten(2, grid), None if self.cls_token is None else x[:, 0]))
        return taps

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, K), from the class token or the mean of the tokens."""
        maps, class_token = self.stages(images)[-1]
        return self.head(self.norm(maps.flatten(2).transpose(1, 2)).mean(1) if class_token is None else self.norm(class_token))


def trunc_normal(module):
    """Initial weights of MViTv2's, CvT's and the classifiers' linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


VARIANTS = {  # depths, dim, heads, drop_path
    "tiny": ((1, 2, 5, 2), 96, 1, 0.1), "small": ((1, 2, 11, 2), 96, 1, 0.1), "base": ((2, 3, 16, 3), 96, 1, 0.3),
    "large": ((2, 6, 36, 4), 144, 2, 0.5), "large_in1k": ((2, 6, 36, 4), 144, 2, 0.5), "toy": ((1, 1, 2, 1), 16, 1, 0.0),
}


def mvitv2(variant, image_size, num_classes, class_token=True, drop_path=None, attention="auto"):
    """MViTv2 of a published size; "large_in1k" widens in the MLP of a stage's last block, the others in the attention of the next one's first."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown MViTv2 {variant!r}; allowed: {', '.join(VARIANTS)}")
    depths, dim, heads, rate = VARIANTS[variant]
    return MViTv2(depths, dim, heads, image_size, num_classes, class_token, rate if drop_path is None else drop_path, attention, "mlp" if variant == "large_in1k" else "attention")


# ------------------------------------------------------------------------------------------------ Swin-B and CvT-21


class SwinB(SwinTransformer):
    """torchvision's Swin-B with the window of the ImageNet-22K weights, tapped before patch merging. It has no class token."""

    dims = (128, 256, 512, 1024)

    def __init__(self, num_classes, drop_path=0.0, window=12):
        super().__init__([4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [window, window], stochastic_depth_prob=drop_path, num_classes=max(1, num_classes))
        if not num_classes:
            self.norm = self.head = nn.Identity()

    def stages(self, images):
        """(B, 3, H, W) -> for each stage its last map (B, C, H', W') and None."""
        taps, x = [], images
        for i, layer in enumerate(self.features):
            x = layer(x)  # (B, H', W', C)
            if i % 2:  # 0 is the stem, 2, 4 and 6 merge patches
                taps.append((x.permute(0, 3, 1, 2), None))
        return taps


class ConvAttention(nn.Module):
    """Attention whose queries, keys and values come from depthwise convolutions with BatchNorm, then a linear layer (CvT)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        for name, stride in (("q", 1), ("k", 2), ("v", 2)):
            setattr(self, f"conv_proj_{name}", nn.Sequential(OrderedDict(conv=nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False), bn=nn.BatchNorm2d(dim))))
            setattr(self, f"proj_{name}", nn.Linear(dim, dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid):
        class_token = x.shape[1] - grid[0] * grid[1]
        maps, inputs = x[:, class_token:].transpose(1, 2).unflatten(2, grid), []
        for conv, linear in ((self.conv_proj_q, self.proj_q), (self.conv_proj_k, self.proj_k), (self.conv_proj_v, self.proj_v)):
            tokens = torch.cat([x[:, :class_token], conv(maps).flatten(2).transpose(1, 2)], 1)  # the class token passes by the convolution
            inputs.append(linear(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2))  # (B, h, N', d)
        out = F.scaled_dot_product_attention(*inputs, scale=x.shape[-1] ** -0.5)  # all of the width, not a head's, as published
        return self.proj(out.transpose(1, 2).flatten(2))


class ConvBlock(nn.Module):
    """Transformer block of CvT."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), ConvAttention(dim, heads), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, dim, lambda x: x * torch.sigmoid(1.702 * x))  # QuickGELU
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, grid):
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvStage(nn.Module):
    """Stage of CvT: a convolution and LayerNorm, then blocks; a class token may join."""

    def __init__(self, dim_in, dim, heads, depth, kernel, stride, padding, class_token, drop_path):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(dim_in, dim, kernel, stride, padding), "norm": nn.LayerNorm(dim)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        if class_token:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(ConvBlock(dim, heads, drop_path * b / max(1, depth - 1)) for b in range(depth))

    def forward(self, maps):
        maps = self.patch_embed["proj"](maps)
        x, grid = self.patch_embed["norm"](maps.flatten(2).transpose(1, 2)), tuple(maps.shape[2:])
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, grid)
        patches = x if self.cls_token is None else x[:, 1:]
        return patches.transpose(1, 2).unflatten(2, grid), None if self.cls_token is None else x[:, 0]


class CvT(nn.Module):
    """CvT-21 under the official parameter names: three stages, the class token joins in the last, no positions."""

    dims = (64, 192, 384)

    def __init__(self, num_classes, class_token=True, drop_path=0.1):
        super().__init__()
        self.stage0 = ConvStage(3, 64, 1, 1, 7, 4, 2, False, 0.0)
        self.stage1 = ConvStage(64, 192, 3, 4, 3, 2, 1, False, 0.0)
        self.stage2 = ConvStage(192, 384, 6, 16, 3, 2, 1, class_token, drop_path)
        if num_classes:
            self.norm, self.head = nn.LayerNorm(384), nn.Linear(384, num_classes)
        self.apply(trunc_normal)

    def stages(self, images):
        """(B, 3, H, W) -> for each stage its last map (B, C, H', W') and its class token (B, C), or None."""
        taps, maps = [], images
        for stage in (self.stage0, self.stage1, self.stage2):
            maps, class_token = stage(maps)
            taps.append((maps, class_token))
        return taps

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, K)."""
        maps, class_token = self.stages(images)[-1]
        return self.head(self.norm(maps.flatten(2).transpose(1, 2)).mean(1) if class_token is None else self.norm(class_token))


def make_backbone(recipe, num_classes):
    """The recipe's backbone; with num_classes=0 without final norm and head."""
    if recipe.backbone == "swin_base":
        return SwinB(num_classes, recipe.drop_path)
    if recipe.backbone == "cvt21":
        return CvT(num_classes, recipe.ctt != "pool", recipe.drop_path)
    return mvitv2(recipe.backbone.removeprefix("mvitv2_"), recipe.image_size, num_classes, recipe.ctt != "pool", recipe.drop_path, recipe.attention)


# ------------------------------------------------------------------------------------------------ the paper's modules


def merge_patches(maps, r):
    """Average r x r neighbouring patches (Sec. 3.2): (B, C, H, W) -> (B, C, ceil(H / r), ceil(W / r))."""
    return F.avg_pool2d(maps, r, ceil_mode=True, count_include_pad=False)


def select_patches(tokens, k):
    """The k tokens with the highest mean activation (Eq. 1-3): (B, N, C) -> (B, k, C), best first, and their indices (B, k); k is at most N."""
    scores = tokens.float().mean(2)  # Eq. 2, of the residual stream: after a LayerNorm all of them would be zero
    indices = scores.topk(min(k, tokens.shape[1]), 1).indices
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2])), indices  # Eq. 3


class ClassTokenTransfer(nn.Sequential):
    """Project the global class token to the width of a stage (Eq. 5), by two layers or one (Table 7): (B, c_last) -> (B, c_i)."""

    def __init__(self, dim, dim_out, layers=2):
        if layers == 1:
            super().__init__(nn.Linear(dim, dim_out))
        else:
            super().__init__(nn.Linear(dim, 2 * dim_out), nn.BatchNorm1d(2 * dim_out), nn.ReLU(), nn.Linear(2 * dim_out, dim_out))


class ChannelCrossAttention(nn.Module):
    """Gate the channels of every stage by what all stages hold (Eq. 8-10): list of (B, N_i, c_i) -> the same shapes."""

    def __init__(self, dims):
        super().__init__()
        self.dims, c = list(dims), sum(dims)
        self.gate = nn.Sequential(nn.Linear(c, c // 2), nn.BatchNorm1d(c // 2), nn.ReLU(), nn.Linear(c // 2, c), nn.Sigmoid())

    def forward(self, tokens):
        descriptors = torch.cat([t.mean(1) for t in tokens], 1)  # Eq. 8, over k + 1 tokens
        gates = self.gate(descriptors).split(self.dims, 1)  # Eq. 9
        return [t * gate[:, None] + t for t, gate in zip(tokens, gates)]  # Eq. 10


class SpatialCrossAttention(nn.Module):
    """The tokens of every stage attend to those of all stages (Eq. 11-13), or of their own only: list of (B, N_i, c_i) -> the same shapes."""

    def __init__(self, dims, dim, heads=8, across=True):
        super().__init__()
        self.heads, self.across = heads, across
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(c, dim) for c in dims) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(dim, c) for c in dims)

    def project(self, layers, tokens):
        """One of Q, K, V of every stage (Eq. 11) -> list of (B, h, N_i, d); across stages they are joined to one (Eq. 12)."""
        projected = [layer(t).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, t in zip(layers, tokens)]
        return [torch.cat(projected, 2)] if self.across else projected

    def forward(self, tokens):
        q, k, v = (self.project(layers, tokens) for layers in (self.q, self.k, self.v))
        attended = torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in zip(q, k, v)], 2)  # Eq. 13: all stages' queries at once
        attended = attended.transpose(1, 2).flatten(2).split([t.shape[1] for t in tokens], 1)  # list of (B, N_i, d)
        return [layer(a) for layer, a in zip(self.out, attended)]

    def weights(self, tokens):
        """Softmax(Q K^T / sqrt(d)) across stages -> (B, h, N, N), N = sum of N_i, each row sums to 1."""
        (q,), (k,) = self.project(self.q, tokens), self.project(self.k, tokens)
        return (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


class CrossScaleBlock(nn.Module):
    """Multi-scale cross-attention (Eq. 7): CCA, then SCA and an FFN as a pre-norm residual block (authors' code)."""

    def __init__(self, dims, dim, cca=True, sca=True):
        super().__init__()
        self.cca = ChannelCrossAttention(dims) if cca else nn.Identity()
        self.sca = SpatialCrossAttention(dims, dim, across=sca)
        self.ffn = nn.ModuleList(Mlp(c, 4 * c, c) for c in dims)
        self.norm_attn, self.norm_ffn = (nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in dims) for _ in range(2))

    def forward(self, tokens):
        tokens = self.cca(tokens)
        tokens = [t + a for t, a in zip(tokens, self.sca([norm(t) for norm, t in zip(self.norm_attn, tokens)]))]
        return [t + ffn(norm(t)) for t, ffn, norm in zip(tokens, self.ffn, self.norm_ffn)]

    def weights(self, tokens):
        """Attention of SCA for these inputs of the block -> (B, h, N, N)."""
        return self.sca.weights([norm(t) for norm, t in zip(self.norm_attn, self.cca(tokens))])


def smooth_cross_entropy(logits, targets, alpha):
    """Cross-entropy with alpha on the true class and the rest spread over the n - 1 others (Eq. 14-15): (B, n), (B,) -> scalar."""
    log_p = logits.float().log_softmax(1)
    true = log_p.gather(1, targets[:, None])[:, 0]
    others = (log_p.sum(1) - true) / (logits.shape[1] - 1)  # the paper divides by n: the targets would not sum to 1
    return -(alpha * true + (1 - alpha) * others).mean()


# ------------------------------------------------------------------------------------------------ model


class M2Former(nn.Module):
    """Backbone, patch selection at the chosen stages, class tokens, cross-scale blocks, a classifier for each stage and one for all."""

    def __init__(self, recipe, num_classes):
        super().__init__()
        self.recipe = recipe
        if recipe.backbone not in BACKBONES:
            raise ValueError(f"--backbone {recipe.backbone}: unknown; choose one of {', '.join(BACKBONES)}")
        if recipe.task != "classify" or num_classes < 2:
            raise ValueError(f"M2Former classifies into at least two classes; given: --task {recipe.task}, {num_classes} classes; use --task classify")
        self.backbone = make_backbone(recipe, 0 if recipe.msps else num_classes)
        dims, last = self.backbone.dims, len(self.backbone.dims)
        self.chosen = [s - 1 for s in recipe.stages if s <= last]  # 0-based
        if not self.chosen or sorted(set(recipe.stages)) != list(recipe.stages) or not 1 <= recipe.stages[0] <= recipe.stages[-1] <= 4:
            raise ValueError(f"--stages {recipe.stages}: give some of 1..{last} in rising order, such as {','.join(map(str, range(1, last + 1)))}")
        if len(recipe.k) < last or min(recipe.k) < 1 or recipe.merge < 1:
            raise ValueError(f"--k {recipe.k} --merge {recipe.merge}: {recipe.backbone} has {last} stages and needs as many numbers of patches, all at least 1; such as --k 162,54,18,6 --merge 2")
        if not recipe.msps:
            return
        if len(recipe.alpha) <= last or not all(0 < a <= 1 for a in recipe.alpha):
            raise ValueError(f"--alpha {recipe.alpha}: {recipe.backbone} has {last} stages and needs {last + 1} values in (0, 1]; such as --alpha 0.6,0.7,0.8,0.9,1.0")
        if recipe.label_smoothing:
            raise ValueError(f"--label-smoothing {recipe.label_smoothing}: the labels of M2Former are smoothed by --alpha (Eq. 15); set --label-smoothing 0")
        if recipe.num_msca < 1:
            raise ValueError(f"--num-msca {recipe.num_msca}: at least 1; the backbone alone is --no-msps")
        has_token = {"swin_base": (), "cvt21": (2,)}.get(recipe.backbone, range(last))  # stages with a class token of their own
        if recipe.ctt != "pool" and (not has_token or recipe.ctt == "attach" and not set(self.chosen) <= set(has_token)):
            raise ValueError(f"--ctt {recipe.ctt}: {recipe.backbone} has {'a class token in its last stage only; use mlp2, mlp1 or pool' if has_token else 'no class token; use --ctt pool'}")
        widths = [dims[s] for s in self.chosen]
        transfer = {"mlp2": 2, "mlp1": 1}.get(recipe.ctt)
        self.ctt = nn.ModuleList(ClassTokenTransfer(dims[-1], dims[s], transfer) if transfer and s != last - 1 else nn.Identity() for s in self.chosen)
        self.msca = nn.ModuleList(CrossScaleBlock(widths, dims[-1], recipe.cca, recipe.sca) for _ in range(recipe.num_msca))
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in widths)
        self.stage_heads = nn.ModuleList(nn.Linear(c, num_classes) for c in widths)
        self.head_con = nn.Linear(sum(widths), num_classes)
        self.stage_heads.apply(trunc_normal)
        self.head_con.apply(trunc_normal)
        alpha = recipe.alpha[-last - 1:]
        self.alpha = {f"y{s + 1}": alpha[s] for s in self.chosen} | {"con": alpha[-1]}

    def select(self, taps):
        """MSPS at the chosen stages (Eq. 1-3) -> list of (patches (B, k, C), indices (B, k) of merged cells, cells in a row), finest first."""
        selected = []
        for s in self.chosen:
            maps = merge_patches(taps[s][0], self.recipe.merge)
            selected.append((*select_patches(maps.flatten(2).transpose(1, 2), self.recipe.k[s]), maps.shape[3]))
        return selected

    def with_class_tokens(self, taps, selected):
        """Put a class token in front of the patches of each stage: transferred (Eq. 6), its own (Eq. 4), or none -> list of (B, k + 1, C)."""
        patches = [p for p, _, _ in selected]
        if self.recipe.ctt == "pool":
            return patches
        own = self.recipe.ctt == "attach"
        tokens = [transfer(taps[s if own else -1][1]) for s, transfer in zip(self.chosen, self.ctt)]  # CLS_g is the last stage's
        return [torch.cat([t[:, None], p], 1) for t, p in zip(tokens, patches)]

    def classify(self, images):
        """Logits of each classifier (Sec. 3.5) -> dict of (B, K): y1 .. y4 of the chosen stages, and con; of the plain backbone, y."""
        if not self.recipe.msps:
            return {"y": self.backbone(images)}
        if self.training and len(images) < 2 and any(isinstance(m, nn.BatchNorm1d) for m in self.modules()):
            raise ValueError("a training batch of one image: the BatchNorm of Eq. 5 and 9 needs at least two; raise --batch-size or lower --accumulate")
        taps = self.backbone.stages(images)
        tokens = self.with_class_tokens(taps, self.select(taps))
        for block in self.msca:
            tokens = block(tokens)
        pooled = self.recipe.ctt == "pool"
        features = [norm(t).mean(1) if pooled else norm(t[:, 0]) for norm, t in zip(self.norms, tokens)]
        logits = {f"y{s + 1}": head(f) for s, head, f in zip(self.chosen, self.stage_heads, features)}
        return logits | {"con": self.head_con(torch.cat(features, 1))}

    @staticmethod
    def fuse(logits):
        """Log of the mean of the classifiers' probabilities (Eq. 16): dict of (B, K) -> (B, K)."""
        return torch.stack([y.float().log_softmax(1) for y in logits.values()]).logsumexp(0) - math.log(len(logits))

    def forward(self, images, targets=None):
        """(B, 3, H, W) -> logits (B, K); with targets (B,): the loss (Eq. 14), and its terms."""
        logits = self.classify(images)
        if targets is None:
            return self.fuse(logits) if self.recipe.msps else logits["y"]
        if self.recipe.msps:
            losses = {name: smooth_cross_entropy(y, targets, self.alpha[name]) for name, y in logits.items()}
        else:
            losses = {"y": F.cross_entropy(logits["y"].float(), targets, label_smoothing=self.recipe.label_smoothing)}
        top1 = (self.fuse(logits).argmax(1) == targets).float().mean()
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()} | {"top1": top1.detach()}

    def heads(self, images):
        """Logits of each classifier and of all together (Eq. 16) -> dict of (B, K)."""
        logits = self.classify(images)
        return logits | {"all": self.fuse(logits)} if self.recipe.msps else logits

    def boxes(self, images, selected):
        """Selected patches as xyxy pixels -> list of (B, k, 4), finest stage first."""
        H, W = images.shape[2:]
        boxes = []
        for s, (_, indices, columns) in zip(self.chosen, selected):
            y, x, side = indices // columns, indices % columns, self.recipe.merge * 4 * 2**s
            corners = torch.stack([x, y, x + 1, y + 1], -1) * side
            boxes.append(corners.minimum(corners.new_tensor([W, H, W, H])).float())
        return boxes

    def where(self, images):
        """The selected patches of all stages, coarsest stage first: boxes (B, n, 4) in pixels and their mean activations (B, n), falling in each stage.

        Selection has no weights, so the plain backbone (msps=False) answers too.
        """
        selected = self.select(self.backbone.stages(images))
        scores = [patches.float().mean(2) for patches, _, _ in selected]
        return torch.cat(self.boxes(images, selected)[::-1], 1), torch.cat(scores[::-1], 1)

    def figure(self, images):
        """Figure 5, the selected patches from the coarsest stage to the finest, and Figure 6, the attention of the best coarsest patch to the others."""
        taps = self.backbone.stages(images)
        selected = self.select(taps)
        boxes, weights = self.boxes(images, selected), None
        if self.recipe.msps and self.recipe.sca and len(self.chosen) > 1:
            tokens = self.with_class_tokens(taps, selected)
            for block in self.msca[:-1]:
                tokens = block(tokens)
            weights = self.msca[-1].weights(tokens).mean(1)  # (B, N, N), over heads
            lengths, extra = [t.shape[1] for t in tokens], tokens[0].shape[1] - selected[0][0].shape[1]  # extra: 1 with class tokens
            starts = [end - length + extra for end, length in zip(accumulate(lengths), lengths)]
        pages = []
        for b, image in enumerate(images):
            photo = common.to_pil(image, self.recipe.normalize)
            stages = list(zip(self.chosen, (found[b] for found in boxes)))[::-1]
            names = [f"stage {s + 1}: {len(found)} of {self.recipe.merge * 4 * 2**s} px" for s, found in stages]
            rows = [common.panels([photo] + [paint(photo, found, (255, 0, 0)) for _, found in stages], ["input"] + names)]
            if weights is not None:
                seen = [weights[b, starts[-1], start:start + len(found)] for start, (_, found) in zip(starts[::-1], stages)]
                pictures = [paint(photo, stages[0][1][:1], (255, 0, 0))] + [paint(photo, found, (255, 150, 0), a / a.max()) for (_, found), a in list(zip(stages, seen))[1:]]
                rows.append(common.panels([photo] + pictures, ["input", f"a stage {stages[0][0] + 1} patch"] + [f"its attention, stage {s + 1}" for s, _ in stages[1:]]))
            pages.append(common.stack(rows))
        return pages


def paint(photo, boxes, colour, strength=None):
    """A darkened photo with boxes (k, 4) tinted in a colour, each by its strength in [0, 1] -> PIL image."""
    pixels = np.asarray(photo, float)
    out = pixels / 3
    strength = np.ones(len(boxes)) if strength is None else strength.detach().float().cpu().numpy()
    for (x1, y1, x2, y2), s in zip(boxes.int().tolist(), strength):
        out[y1:y2, x1:x2] += s * (0.75 * pixels[y1:y2, x1:x2] + 0.25 * np.array(colour) - out[y1:y2, x1:x2])
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------ building


def build(recipe, num_classes):
    """The model with its weights: none, the official ones of the backbone, or a file of a backbone or of an M2Former.

    Raises ValueError for settings that do not fit each other and for weights that do not fit the model.
    """
    model = M2Former(recipe, num_classes)
    for s in model.chosen:
        side = recipe.merge * 4 * 2**s
        cells = -(-recipe.image_size[0] // side) * -(-recipe.image_size[1] // side)
        if recipe.k[s] > cells:
            warnings.warn(f"stage {s + 1} has {cells} cells of {side} px, not --k {recipe.k[s]}: it selects all of them")
    if recipe.weights != "none":
        load_weights(model, recipe)
    return model


def load_weights(model, recipe):
    """Fill the backbone from an official file or a plain run of ours, or the whole model from one of ours; heads may differ, position tables are resized or drawn anew."""
    source = recipe.weights
    if source == "default":
        if recipe.backbone not in WEIGHTS:
            raise ValueError(f"--weights default: {recipe.backbone} has no official weights to download; give a file (CvT-21's are on Microsoft's OneDrive) or --weights none")
        source = common.fetch(WEIGHTS[recipe.backbone])
    state = common.read_state(source)
    if all(name.startswith("backbone.") for name in state):  # a run of ours with the plain backbone
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    whole = any(name.startswith("backbone.") for name in state)
    target = model if whole else model.backbone
    heads = ("backbone.head.", "stage_heads.", "head_con.") if whole else ("head.", "cls_token") + (() if recipe.msps else ("norm.",))
    if not whole and recipe.msps:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("norm.", "head."))}  # the backbone has none (authors' code)
    state = {name: tensor.squeeze(2) if tensor.dim() == 5 else tensor for name, tensor in swin_names(state).items()}  # 5-D: saved from a video model
    common.load_state(target, fit_positions(state, target.state_dict(), recipe.rel_pos), heads, source)


def swin_names(state):
    """Microsoft's names of Swin's weights -> torchvision's; files of others pass."""
    if not any(name.startswith("layers.") for name in state):
        return state
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^layers\.(\d)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", name)
        for theirs, ours in (("patch_embed.proj", "features.0.0"), ("patch_embed.norm", "features.0.2"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3")):
            name = name.replace(theirs, ours)
        if not name.endswith("attn_mask"):  # a constant that torchvision does not keep
            renamed[name] = tensor.flatten() if name.endswith("relative_position_index") else tensor
    return renamed


def fit_positions(state, own, how):
    """Position tables of a file -> the sizes of `own`: MViTv2's resized linearly, Swin's bicubically, or taken from `own` (reinit)."""
    fitted = dict(state)
    for name in state.keys() & own.keys():
        old, new, kind = state[name], own[name], name.rsplit(".", 1)[-1]
        if kind == "relative_position_index":  # a constant of the window
            fitted[name] = new
        elif kind in ("rel_pos_h", "rel_pos_w", "relative_position_bias_table") and len(old) != len(new) and old.shape[1] == new.shape[1]:
            if how == "reinit":
                fitted[name] = new
            elif kind == "relative_position_bias_table":  # (side * side, heads)
                side, new_side = round(len(old) ** 0.5), round(len(new) ** 0.5)
                maps = old.float().T.unflatten(1, (side, side))[None]
                fitted[name] = F.interpolate(maps, size=(new_side, new_side), mode="bicubic", align_corners=False)[0].flatten(1).T
            else:
                fitted[name] = resize_rel_pos(old.float(), len(new))
    return fitted


def param_groups(model, recipe):
    """Weight decay on matrices and kernels; none on biases, norms, class tokens and position tables. (The paper's is 0.)"""
    plain = lambda name, p: p.dim() < 2 or name.endswith(("cls_token", "rel_pos_h", "rel_pos_w", "relative_position_bias_table"))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if not plain(name, p)], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in named if plain(name, p)], "weight_decay": 0.0},
    ]
