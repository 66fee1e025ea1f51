"""Facts of M2Former (arXiv:2308.02161), and of MViTv2, Swin-B and CvT-21 as its backbones."""
import dataclasses
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import SwinTransformer
from torchvision.models.video.mvit import MSBlockConfig, MViT

import common
import data
import m2former as m

TINY = replace(m.RECIPES["toy"], weights="none")  # 64 px, four stages, widths 16 to 128
CUB = replace(m.CUB, weights="none")
DIMS = (8, 16, 24, 32)


def randomise(model, seed=0, scale=0.3):
    """Random weights everywhere, norms and position tables included: no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        spread = p[0].numel() ** -0.5 if p.dim() > 1 and "rel_pos" not in name else scale
        one = "norm" in name and name.endswith("weight")
        with torch.no_grad():
            p.copy_(torch.randn_like(p) * spread + one)
    return model.eval()


def tiny(seed=0, num_classes=5, **changes):
    return randomise(m.M2Former(replace(TINY, **changes), num_classes), seed)


def photos(B=2, H=64, W=64, seed=0):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed))


def token_lists(B=3, lengths=(6, 5, 4, 3), dims=DIMS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, c, generator=generator) for n, c in zip(lengths, dims)]


def found(model, images):
    """Taps of the backbone, selected patches, their boxes, and the tokens that enter MSCA."""
    taps, patches, boxes = model.select(images)
    return taps, patches, boxes, [torch.cat(pair, 1) for pair in zip(model.class_tokens(taps), patches)]


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------- recipes and tables

SEC42 = dict(  # warmup, grad_clip, amp and drop_path are the authors' code
    image_size=(448, 448), resize=(600, 600), batch_size=16, iterations=10_000, optimizer="sgd", lr=0.03,
    momentum=0.9, weight_decay=0.0, schedule="cosine", warmup=500, grad_clip=1.0, drop_path=0.3, amp="off",
    weights="default", crop="random", hflip=0.5, interpolation="bilinear", normalize="imagenet",
    backbone="mvitv2_base", rel_pos="interpolate", attention="auto", msps=True, stages=(1, 2, 3, 4),
    k=(162, 54, 18, 6), merge=2, ctt="mlp2", cca=True, sca=True, num_msca=1, alpha=(0.6, 0.7, 0.8, 0.9, 1.0),
)
RECIPES = {
    "cub": SEC42,
    "nabirds": SEC42,
    "folder": SEC42 | dict(iterations=0, epochs=27, warmup=1.35),
    "toy": SEC42 | dict(
        backbone="mvitv2_toy", image_size=(64, 64), resize=(0, 0), k=(12, 4, 2, 1), toy_preset="birds-easy",
        iterations=0, epochs=12, boxes=True, warmup=0, batch_size=32, optimizer="adamw", lr=1.5e-3,
        weight_decay=0.05, schedule="onecycle", drop_path=0.0, weights="none",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_sec42_every_field_of_the_recipes(name):
    assert list(m.RECIPES) == list(RECIPES)
    assert dataclasses.asdict(m.RECIPES[name]) == dataclasses.asdict(common.Recipe()) | RECIPES[name]


PLAIN = {"msps": False}
CVT = {"backbone": "cvt21", "drop_path": 0.1}
SWIN = dict(backbone="swin_base", ctt="pool", image_size=(384, 384), resize=(510, 510), drop_path=0.2)
TABLES = {  # once more from the paper: data, metrics, what each row changes, its numbers
    "baseline": ("cub", "top1", [(PLAIN, 91.6), ({}, 92.4)]),
    "toy": ("toy", "top1", [(PLAIN, None), ({"ctt": "attach", "cca": False, "sca": False}, None),
                            ({"cca": False, "sca": False}, None), ({}, None)]),
    "1": ("cub", "top1", [({}, 92.4)]),
    "2": ("nabirds", "top1", [({}, 91.1)]),
    "3": ("cub", "top1", [
        (PLAIN, 91.6), ({"ctt": "attach", "cca": False, "sca": False}, 91.6),
        ({"cca": False, "sca": False}, 92.1), ({"sca": False}, 92.2), ({"cca": False}, 92.1), ({}, 92.4)]),
    "4": ("cub", "top1", [({"num_msca": n}, v) for n, v in ((1, 92.4), (2, 92.1), (3, 92.2), (4, 92.2))]),
    "5": ("cub", "top1", [({"k": (12, 10, 8, 6)}, 92.2), ({"k": (48, 24, 12, 6)}, 92.2),
                          ({"k": (162, 54, 18, 6)}, 92.4), ({"k": (448, 112, 28, 7)}, 92.1)]),
    "6": ("cub", "top1", [(CVT | PLAIN, 89.3), (CVT, 90.0), (SWIN | PLAIN, 90.6), (SWIN, 91.3)]),
    "7": ("cub", "top1", [({"ctt": "pool"}, 91.5), ({"ctt": "attach"}, 91.9), ({"ctt": "mlp1"}, 92.1),
                          ({"ctt": "mlp2"}, 92.4)]),
    "8": ("cub", "large medium small top1", [
        (PLAIN, (92.3, 91.8, 90.5, 91.6)), ({"stages": (4,)}, (91.9, 91.7, 90.6, 91.5)),
        ({"stages": (3, 4)}, (92.9, 91.9, 90.8, 91.9)), ({"stages": (2, 3, 4)}, (92.9, 92.4, 91.4, 92.3)),
        ({}, (92.9, 92.6, 91.4, 92.4))]),
}


@pytest.mark.parametrize("key", TABLES)
def test_every_row_of_the_tables_changes_what_the_paper_changes_and_holds_its_numbers(key):
    assert list(m.TABLES) == list(TABLES)
    table = m.TABLES[key]
    assert (table.data, table.metric, [row[1:] for row in table.rows]) == TABLES[key]
    assert len({name for name, _, _ in table.rows}) == len(table.rows)


# ---------------------------------------------------------------------------- MSPS (Sec. 3.2)


def test_sec32_merging_averages_r_by_r_patches_and_what_there_is_at_an_odd_edge():
    maps = photos(2, 6, 5)
    merged = m.merge_patches(maps, 2)
    assert merged.shape == (2, 3, 3, 3)
    for y in range(3):
        for x in range(3):
            cell = maps[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            torch.testing.assert_close(merged[:, :, y, x], cell.mean((2, 3)))
    assert m.merge_patches(maps, 1).equal(maps) and m.merge_patches(maps, 3).shape == (2, 3, 2, 2)


def test_eq1_to_3_the_k_tokens_with_the_highest_channel_mean_are_gathered():
    tokens = token_lists(3, (20,), (7,))[0]
    selected, indices = m.select_patches(tokens, 6)
    for b in range(3):
        order = sorted(range(20), key=lambda j: -float(tokens[b, j].sum() / 7))
        assert indices[b].tolist() == order[:6]
        assert selected[b].equal(tokens[b, order[:6]])
    selected, indices = m.select_patches(tokens, 90)  # no more than there are
    assert selected.shape == (3, 20, 7) and sorted(indices[0].tolist()) == list(range(20))


def test_eq3_the_gradient_of_a_selected_token_reaches_its_four_patches_with_a_quarter_each_and_no_other():
    maps = photos(1, 6, 6).requires_grad_()
    selected, indices = m.select_patches(m.merge_patches(maps, 2).flatten(2).transpose(1, 2), 2)
    (gradient,) = torch.autograd.grad(selected[0, 0].sum(), maps)
    expected = F.one_hot(indices[0, :1], 9).view(3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1) / 4
    torch.testing.assert_close(gradient[0, 1], expected)


def test_eq2_scores_are_taken_before_any_layer_norm_which_would_make_all_of_them_zero():
    taps, patches, _, _ = found(tiny(), photos())
    tokens = m.merge_patches(taps[1][0], 2).flatten(2).transpose(1, 2)
    assert F.layer_norm(tokens, (32,)).mean(2).abs().max() < 1e-5 < tokens.mean(2).std()
    best = tokens.mean(2).topk(4, 1).indices
    assert patches[1].equal(tokens.gather(1, best[:, :, None].expand(-1, -1, 32)))


# ---------------------------------------------------------------------------- CTT (Sec. 3.3)


def test_eq5_class_token_transfer_is_two_linear_layers_with_batch_norm_and_relu():
    ctt = randomise(m.ClassTokenTransfer(16, 6))
    ctt[1].running_mean.normal_(), ctt[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 16)
    hidden = x @ ctt[0].weight.T + ctt[0].bias
    hidden = (hidden - ctt[1].running_mean) / (ctt[1].running_var + 1e-5).sqrt() * ctt[1].weight + ctt[1].bias
    torch.testing.assert_close(ctt(x), hidden.clamp(min=0) @ ctt[3].weight.T + ctt[3].bias)
    assert ctt[0].weight.shape == (12, 16)
    assert list(m.ClassTokenTransfer(16, 6, "mlp1").state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("ctt", ["mlp2", "mlp1", "attach", "pool"])
def test_eq4_eq6_table7_where_the_class_token_of_a_stage_comes_from_and_what_classifies(ctt):
    model = tiny(ctt=ctt, num_msca=2)
    taps, _, _, tokens = found(model, photos())
    attached, own = ctt == "attach", model.class_tokens(taps)
    if ctt == "pool":
        assert [t.shape[1] for t in own] == [0] * 4 and model.backbone.cls_token is None
    else:
        assert own[3].equal(taps[3][1]) and len(model.ctt) == (0 if attached else 3)  # stage 4 keeps CLS_g
        for stages, same in (((0, 1, 2), [not attached] * 3 + [True]), ((3,), [attached] * 3 + [False])):
            changed = [(maps, t + 1 if s in stages else t) for s, (maps, t) in enumerate(taps)]
            assert [a.equal(b) for a, b in zip(own, model.class_tokens(changed))] == same
    normed = model.norms[1](model.msca[1](model.msca[0](tokens))[1])  # Table 4: blocks follow each other
    feature = normed.mean(1) if ctt == "pool" else normed[:, 0]
    torch.testing.assert_close(model.heads(photos())["y2"], model.stage_heads[1](feature))


# ---------------------------------------------------------------------------- MSCA (Sec. 3.4)


def test_eq8_to_10_channel_cross_attention():
    tokens, cca = token_lists(), randomise(m.ChannelCrossAttention(DIMS))
    gate = cca.gate
    D = torch.stack([torch.cat([t[b].sum(0) / len(t[b]) for t in tokens]) for b in range(3)])
    C = torch.sigmoid(gate[3](gate[1](gate[0](D)).clamp(min=0)))
    assert gate[0].weight.shape == (40, 80)
    for out, t, a, b in zip(cca(tokens), tokens, (0, 8, 24, 48), (8, 24, 48, 80)):
        torch.testing.assert_close(out, t * C[:, None, a:b] + t)
        assert (out * t >= 0).all() and (out.abs() >= t.abs()).all() and (out.abs() <= 2 * t.abs()).all()


def test_eq11_to_13_spatial_cross_attention_token_by_token_and_head_by_head():
    tokens, sca = token_lists(1), randomise(m.SpatialCrossAttention(DIMS, 32))
    K, V = (torch.cat([layer(t[0]) for layer, t in zip(layers, tokens)]) for layers in (sca.k, sca.v))
    assert K.shape == (18, 32)
    for i, out in enumerate(sca(tokens)):
        Q = sca.q[i](tokens[i][0])
        for j in range(len(Q)):
            heads = []
            for c in torch.arange(32).split(4):  # 8 heads
                p = torch.exp(Q[j, c] @ K[:, c].T / math.sqrt(4))
                heads.append(p / p.sum() @ V[:, c])
            torch.testing.assert_close(out[0, j], sca.out[i](torch.cat(heads)))


def test_eq6_without_sca_a_stage_attends_to_its_own_tokens_with_the_same_weights():
    tokens, sca = token_lists(), randomise(m.SpatialCrossAttention(DIMS, 32, across=False))
    for i, (out, t) in enumerate(zip(sca(tokens), tokens)):
        q, k, v = (layers[i](t).unflatten(2, (8, 4)).transpose(1, 2) for layers in (sca.q, sca.k, sca.v))
        own = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, sca.out[i](own))


def test_eq7_a_block_is_cca_then_sca_and_an_ffn_with_pre_norms_and_residuals():
    tokens, block = token_lists(), randomise(m.MSCA(DIMS, 32))
    y = block.cca(tokens)
    a = [t + o for t, o in zip(y, block.sca([norm(t) for norm, t in zip(block.norm_attn, y)]))]
    for i, (out, t) in enumerate(zip(block(tokens), a)):
        torch.testing.assert_close(out, t + block.ffn[i](block.norm_ffn[i](t)))


# ---------------------------------------------------------------------------- loss and prediction (Sec. 3.5)


@pytest.mark.parametrize("alpha", [0.6, 0.9, 1.0])
def test_eq14_15_smoothed_cross_entropy_with_targets_that_sum_to_one(alpha):
    logits, targets, n = torch.randn(4, 6), torch.tensor([0, 5, 2, 2]), 6
    expected = 0.0
    for b in range(4):
        soft = [alpha if t == targets[b] else (1 - alpha) / (n - 1) for t in range(n)]
        assert sum(soft) == pytest.approx(1)
        expected -= sum(p * float(q) for p, q in zip(soft, logits[b].log_softmax(0))) / 4
    assert m.smooth_cross_entropy(logits, targets, alpha).item() == pytest.approx(expected, rel=1e-5)


ALPHA = {"y1": 0.6, "y2": 0.7, "y3": 0.8, "y4": 0.9, "con": 1.0}
CHOSEN = [({}, ALPHA), ({"stages": (3, 4)}, {"y3": 0.8, "y4": 0.9, "con": 1.0}), (PLAIN, {"y": 1.0})]


@pytest.mark.parametrize("change, alphas", CHOSEN, ids=str)
def test_eq14_to_16_table8_losses_are_summed_with_rising_alpha_and_probabilities_are_summed(change, alphas):
    model, targets = tiny(**change), torch.tensor([1, 4])
    logits, (loss, terms) = model.heads(photos()), model(photos(), targets)
    assert list(terms) == [*alphas, "top1"] and list(logits) == [*alphas] + ["all"] * (change != PLAIN)
    assert loss.requires_grad and not any(t.requires_grad for t in terms.values())
    for name, alpha in alphas.items():
        torch.testing.assert_close(terms[name], m.smooth_cross_entropy(logits[name], targets, alpha))
    torch.testing.assert_close(loss, sum(terms[name] for name in alphas))
    mean = sum(logits[name].softmax(1) for name in alphas) / len(alphas)
    torch.testing.assert_close(model(photos()).softmax(1), mean)
    assert terms["top1"] == (mean.argmax(1) == targets).float().mean()


# ---------------------------------------------------------------------------- switches


def test_tables_3_and_8_switches_take_their_own_weights_out_and_nothing_else():
    def names(**change):
        return set(m.M2Former(replace(TINY, **change), 5).state_dict())

    whole = names()
    ctt = {name for name in whole if name.startswith("ctt.")}
    assert names(sca=False) == names(attention="explicit") == whole
    assert names(cca=False) == {name for name in whole if ".cca." not in name}
    assert names(ctt="attach") == whole - ctt and names(ctt="pool") == whole - ctt - {"backbone.cls_token"}
    block = {name for name in whole if name.startswith("msca.0")}
    assert names(num_msca=2) - whole == {name.replace("msca.0", "msca.1") for name in block}
    plain, few = tiny(msps=False), tiny(stages=(3, 4))
    official = m.mvitv2("toy", (64, 64), 5).state_dict()
    assert {name.removeprefix("backbone.") for name in plain.state_dict()} == set(official)
    assert plain(photos()).equal(plain.backbone(photos())) and plain.where(photos())[0].shape == (2, 19, 4)
    assert few.msca[0].cca.dims == [64, 128] and few.head_con.in_features == 64 + 128
    assert [p.shape[1] for p in found(few, photos())[1]] == [2, 1]


# ---------------------------------------------------------------------------- where and figures


def test_where_gives_the_selected_cells_in_pixels_coarsest_stage_first():
    model, images = tiny(image_size=(96, 64)), photos(2, 96, 64)
    boxes, scores = model.where(images)
    taps, n = model.backbone.stages(images), 0
    assert boxes.shape == (2, 19, 4) and scores.shape == (2, 19)
    with pytest.raises(ValueError, match=r"\(B, 3, 96, 64\)"):
        model.where(photos())
    for s, k in ((3, 1), (2, 2), (1, 4), (0, 12)):
        side, maps, own = 8 * 2**s, m.merge_patches(taps[s][0], 2), boxes[:, n : n + k]
        assert (own[..., 2] - own[..., 0]).eq(side).all()
        assert (own[..., 3] - own[..., 1]).eq((96 - own[..., 1]).clamp(max=side)).all()
        for b in range(2):
            at = [maps[b, :, int(y) // side, int(x) // side].mean() for x, y, _, _ in own[b]]
            torch.testing.assert_close(torch.stack(at), scores[b, n : n + k])
            assert sorted(at, reverse=True) == at and min(at) == maps[b].mean(0).flatten().topk(k)[0].min()
        n += k
    odd = tiny(image_size=(62, 45))  # the last patches reach over the edge, their boxes do not
    assert odd.where(photos(1, 62, 45))[0][0, 0].tolist() == [0, 0, 45, 62]
    assert odd.backbone.blocks[0].attn.rel_pos_w.shape == (2 * 12 - 1, 16)


@pytest.mark.parametrize("change", [{}, {"num_msca": 2}, {"ctt": "pool", "merge": 1}, {"stages": (1, 3)}])
def test_figure6_is_the_attention_of_the_best_patch_of_the_coarsest_stage_to_the_patches_of_each(change):
    model, images = tiny(**change), photos()
    taps, patches, _, tokens = found(model, images)
    first = 0 if change.get("ctt") == "pool" else 1  # the class token comes first
    for block in model.msca[:-1]:
        tokens = block(tokens)
    block = model.msca[-1]
    normed = [norm(t) for norm, t in zip(block.norm_attn, block.cca(tokens))]
    d = 128 // 8
    drawn = model.attention(taps, patches)
    assert [a.shape for a in drawn] == [p.shape[:2] for p in patches]
    for b in range(2):
        query = block.sca.q[-1](normed[-1][b, first])  # the first patch of the last stage
        keys = torch.cat([layer(t[b]) for layer, t in zip(block.sca.k, normed)])
        heads = [(keys[:, c] @ query[c] / math.sqrt(d)).softmax(0) for c in torch.arange(128).split(d)]
        by_stage = sum(heads).div(8).split([t.shape[1] for t in tokens])
        for a, row in zip(drawn, by_stage):
            torch.testing.assert_close(a[b], row[first:])


def test_figures_5_and_6_paint_the_boxes_of_each_stage_and_the_weights_of_figure_6(monkeypatch):
    model, calls, captions, panels = tiny(stages=(1, 2, 3)), [], [], common.panels
    monkeypatch.setattr(m, "paint", lambda photo, *how: calls.append(how) or photo)
    monkeypatch.setattr(common, "panels", lambda p, names: captions.append(list(names)) or panels(p, names))
    page = model.figure(photos(1))[0]
    taps, patches, boxes, _ = found(model, photos(1))
    weights = [w[0] / w[0].max() for w in model.attention(taps, patches)]
    expected = [(boxes[s][0], "red", torch.ones(len(weights[s]))) for s in (2, 1, 0)]
    expected += [(boxes[2][0][:1], "red", torch.ones(1))]
    expected += [(boxes[s][0], "orange", weights[s]) for s in (1, 0)]
    for (box, colour, strength), (b, c, s) in zip(calls, expected, strict=True):
        assert box.equal(b) and colour == c
        torch.testing.assert_close(strength, s)
    assert captions == [["input", "stage 3", "stage 2", "stage 1"],
                        ["a patch of stage 3", "its attention, stage 2", "its attention, stage 1"]]
    assert tiny(stages=(1, 3)).figure(photos(1))[0].height == page.height
    for change in ({"sca": False}, {"msps": False}, {"stages": (4,)}):  # no attention across stages
        calls.clear()
        assert tiny(**change).figure(photos(1))[0].height < 0.6 * page.height
        assert {colour for _, colour, _ in calls} == {"red"}


def test_figures_5_and_6_tint_the_selected_patches_and_darken_the_rest():
    photo = Image.new("RGB", (64, 64), (120, 120, 120))
    boxes = torch.tensor([[8.0, 16, 16, 24], [32, 32, 40, 40]])
    painted = m.paint(photo, boxes, (255, 0, 0), torch.tensor([1.0, 0.5]))
    full, half, rest = (painted.getpixel(at) for at in ((8, 16), (39, 39), (7, 16)))
    assert rest == (40, 40, 40) == painted.getpixel((16, 24)) and painted.getpixel((15, 23)) == full
    assert full == pytest.approx((0.75 * 120 + 0.25 * 255, 90, 90), abs=1)
    assert half == pytest.approx((97, 65, 65), abs=2)


def test_figure4_by_its_command_shows_objects_of_both_outer_quartiles_and_between(monkeypatch, tmp_path):
    sides = 10 * np.random.default_rng(0).permutation(20).astype(np.float32) + 10  # 10 to 200
    boxes = np.stack([0 * sides + 5, 0 * sides + 3, sides + 5, 0 * sides + 10], 1)
    shown, names, panels = [], [], common.panels
    for i in range(20):
        Image.new("RGB", (210, 210)).save(tmp_path / f"{i}.png")
    split = data.Split([str(tmp_path / f"{i}.png") for i in range(20)], None, boxes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda name, root, recipe: data.Splits(None, split, None))
    monkeypatch.setattr(common, "draw_boxes", lambda photo, own: shown.append(own[:, 2].item() - 5) or photo)
    monkeypatch.setattr(common, "panels", lambda photos, texts: names.append(texts) or panels(photos, texts))
    exec(re.search(r'python -c "(.*?)"', m.__doc__, re.S)[1].replace("\n  ", "\n"))
    assert names == [["large"] * 4, ["medium"] * 4, ["small"] * 4]
    assert shown == [180, 170, 160] + [100, 90, 80, 70] + [30, 20, 10]  # from the median of each down
    assert Image.open("figure_4.png").height == 3 * (224 + 22) + 2 * common.GAP


# ---------------------------------------------------------------------------- MViTv2


NAMES = {  # ours (the official ones) -> torchvision's
    ".norm_q.": ".pool_q.norm_act.0.", ".norm_k.": ".pool_k.norm_act.0.", ".norm_v.": ".pool_v.norm_act.0.",
    ".pool_q.w": ".pool_q.pool.w", ".pool_k.w": ".pool_k.pool.w", ".pool_v.w": ".pool_v.pool.w",
    ".attn.proj.": ".attn.project.0.", ".mlp.fc1.": ".mlp.0.", ".mlp.fc2.": ".mlp.3.",
    "head.projection.": "head.1.", "patch_embed.proj": "conv_proj", "cls_token": "pos_encoding.class_token",
}


def torchvision_mvit(ours, depths, dim, heads, side, num_classes):
    """torchvision's video MViT at T = 1 with our weights; its time tables are zero."""
    config, kv, width = [], 4, dim
    for stage, depth in enumerate(depths):
        for b in range(depth):
            s, out = (2 if stage and b == 0 else 1), dim * 2**stage
            kv = max(1, kv // s)
            kernels, strides = ([1, 3, 3], [1, 3, 3]), ([1, s, s], [1, kv, kv])
            config.append(MSBlockConfig(heads * 2**stage, width, out, *kernels, *strides))
            width = out
    patches = dict(patch_embed_kernel=(1, 7, 7), patch_embed_stride=(1, 4, 4), patch_embed_padding=(0, 3, 3))
    with torch.device("meta"):
        theirs = MViT((side, side), 1, config, True, False, True, True, 0.0, num_classes=num_classes,
                      norm_layer=partial(nn.LayerNorm, eps=1e-6), **patches)
    state, own = {}, theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        for a, b in NAMES.items():
            name = name.replace(a, b)
        name = re.sub(r"^(blocks\.\d+)\.proj", r"\1.project", name)
        state[name] = tensor.view(own[name].shape)
    zero = {name: torch.zeros(t.shape) for name, t in own.items() if name.endswith("rel_pos_t")}
    theirs.load_state_dict(state | zero, assign=True)
    return theirs.eval()


@pytest.mark.parametrize("shape, side, attention", [
    (((2, 1, 2, 1), 16, 1), 64, "folded"), (((2, 1, 2, 1), 16, 1), 64, "explicit"),
    (((1, 2, 1, 2), 24, 2), 96, "folded"), (m.VARIANTS["tiny"], 224, "folded")])
def test_mvitv2_equals_torchvisions_video_mvit_on_one_frame(shape, side, attention):
    with torch.device("meta"):
        ours = m.MViTv2(*shape, (side, side), 7, True, 0.0, attention)
    ours, images = randomise(ours.to_empty(device="cpu"), scale=0.1), photos(1, side, side)
    with torch.no_grad():
        theirs = torchvision_mvit(ours, *shape, side, 7)(images[:, :, None])
        torch.testing.assert_close(ours(images), theirs, atol=1e-5, rtol=1e-5)


def test_resized_position_tables_equal_torchvisions():
    """Weights for 64 px in torchvision, whose forward resizes its tables, and in our model for 128 px."""
    shape = (1, 1, 2, 1), 16, 1
    small, large = randomise(m.MViTv2(*shape, (64, 64), 5)), m.MViTv2(*shape, (128, 128), 5).eval()
    theirs, images = torchvision_mvit(small, *shape, 64, 5), photos(2, 128, 128)
    theirs.pos_encoding.spatial_size = (32, 32)
    large.load_state_dict(m.fit_positions(small.state_dict(), large.state_dict(), "interpolate"))
    torch.testing.assert_close(large(images), theirs(images[:, :, None]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small(images), large(images), atol=1e-5, rtol=1e-5)  # our forward resizes too


GRIDS = [((4, 4), (4, 4)), ((8, 8), (2, 2)), ((3, 5), (6, 10)), ((6, 4), (3, 7)), ((5, 1), (2, 3))]


def attention_inputs(q_grid, k_grid, class_token, B, h, d=6):
    torch.manual_seed(0)
    n, k = math.prod(q_grid) + class_token, math.prod(k_grid) + class_token
    tables = [(2 * max(a, b) - 1, d) for a, b in zip(q_grid, k_grid)]
    shapes = [(B, h, n, d), (B, h, k, d), (B, h, k, d), *tables]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def attended(form, q, k, v, rows, columns, q_grid, k_grid):
    return form(q, k, v, *m.position_products(q, (rows, columns), q_grid, k_grid))


@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize("q_grid, k_grid", GRIDS)
def test_both_forms_are_softmax_of_scaled_products_and_queries_times_tables(q_grid, k_grid, class_token):
    """Pair by pair; the class token's row and column carry no bias."""
    inputs = [t.detach() for t in attention_inputs(q_grid, k_grid, class_token, B=1, h=1)]
    q, k, v, *tables = inputs
    scores = q[0, 0] @ k[0, 0].T / math.sqrt(q.shape[-1])
    for i, j in np.ndindex(math.prod(q_grid), math.prod(k_grid)):
        at = zip(divmod(i, q_grid[1]), divmod(j, k_grid[1]), q_grid, k_grid, tables)
        for a, b, n, K, table in at:  # the row of each axis, on the grid of the finer of the two
            up, down = max(K / n, 1.0), max(n / K, 1.0)
            row = table[int(a * up - b * down + (K - 1) * down)]
            scores[class_token + i, class_token + j] += q[0, 0, class_token + i] @ row
    for form in (m.attend_folded, m.attend_explicit):
        out = attended(form, *inputs, q_grid, k_grid)
        torch.testing.assert_close(out[0, 0], scores.softmax(1) @ v[0, 0])


@pytest.mark.parametrize("form, class_token, called", [
    ("auto", 0, "explicit"), ("auto", 1, "folded"), ("folded", 0, "folded"), ("explicit", 1, "explicit")])
def test_attention_is_folded_on_a_cpu_beyond_2_to_the_18_scores(form, class_token, called, monkeypatch):
    names = []
    for name in ("folded", "explicit"):
        monkeypatch.setattr(m, f"attend_{name}", lambda q, *a, name=name: names.append(name) or q)
    m.PoolingAttention(4, 4, 1, 1, 1, (16, 32), form)(torch.randn(1, 512 + class_token, 4), (16, 32))
    assert names == [called]


def test_folded_attention_keeps_no_tensor_of_queries_times_keys_for_backward_and_has_the_same_gradients():
    largest, gradients, q_grid, k_grid = {}, [], (24, 24), (20, 20)
    for form in (m.attend_folded, m.attend_explicit):
        inputs, sizes = attention_inputs(q_grid, k_grid, 1, B=1, h=1, d=8), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            out = attended(form, *inputs, q_grid, k_grid)
        largest[form] = max(sizes)
        gradients.append(torch.autograd.grad(out.pow(2).sum(), inputs))
    assert largest[m.attend_explicit] >= 577 * 401 and largest[m.attend_folded] <= 577 * (8 + 40)
    for folded, explicit in zip(*gradients):
        torch.testing.assert_close(folded, explicit, atol=1e-10, rtol=1e-8)


def test_parameter_counts_are_the_published_ones_and_those_of_the_authors_model():
    sizes = {"tiny": 24_173_320, "small": 34_870_216, "base": 51_472_744, "large": 213_635_368}
    with torch.device("meta"):
        assert {v: count(m.mvitv2(v, (224, 224), 1000, False)) for v in sizes} == sizes
        assert count(m.mvitv2("base", (224, 224), 19168)) == 65_444_032
        assert count(m.mvitv2("large", (224, 224), 19168)) == 234_583_216
        assert count(m.CvT(1000)) == 31_622_696 and count(m.SwinB(1000)) == 87_903_584
        model, cvt, swin = (m.M2Former(replace(CUB, **change), 200) for change in ({}, CVT, SWIN))
        assert count(model) == 65_674_936 and count(m.M2Former(CUB, 555)) == 66_699_111
    assert [count(c) for c in model.ctt] == [166_560, 369_984, 887_424]
    assert count(model.stage_heads) + count(model.head_con) == 577_000 and count(model.norms) == 2_880
    parts = [(count(x.msca[0].cca), count(x.msca[0]), count(x.ctt)) for x in (model, cvt, swin)]
    assert parts == [
        (2_077_200, 12_791_376, 1_423_968), (411_200, 2_911_424, 280_320), (3_691_200, 22_728_128, 0)]
    tables = [model.backbone.blocks[b].attn.rel_pos_h.shape for b in (0, 2, 5, 6, 21, 22)]
    assert tables == [(n, 96) for n in (223, 111, 111, 55, 55, 27)]


def test_multiply_accumulates_are_the_published_ones():
    with torch.device("meta"):
        whole = m.M2Former(replace(CUB, attention="explicit"), 200)
        models = whole, m.mvitv2("tiny", (224, 224), 1000, attention="explicit"), m.CvT(1000)
        for model, side, expected in zip(models, (448, 224, 224), (55.15, 4.70, 7.18)):
            macs = common.count_macs(model.eval(), torch.zeros(1, 3, side, side)) / 1e9
            assert macs == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("name", ["cub", "toy"])
def test_strides_taps_drop_path_and_epsilons_of_the_built_model(name):
    recipe = replace(m.RECIPES[name], weights="none")
    dim, side, starts = (96, 112, [2, 5, 21]) if name == "cub" else (16, 16, [1, 2, 4])
    with torch.device("meta"):
        model, plain = m.build(recipe, 10), m.build(replace(recipe, msps=False), 10)
        taps, blocks = model.backbone.stages(torch.zeros(2, 3, *recipe.image_size)), model.backbone.blocks
    for s, (maps, class_token) in enumerate(taps):
        assert maps.shape == (2, dim * 2**s, side >> s, side >> s) and class_token.shape == (2, 1, dim * 2**s)
    assert [b for b, block in enumerate(blocks) if block.attn.pool_q.stride == (2, 2)] == starts
    strides = [4] * starts[0] + [2] * (starts[1] - starts[0]) + [1] * (len(blocks) - starts[1])
    assert [block.attn.pool_k.stride[0] for block in blocks] == strides
    rate, n = (0.3, 24) if name == "cub" else (0, 5)
    assert [block.drop_path.p for block in blocks] == pytest.approx([rate * b / (n - 1) for b in range(n)])
    assert {x.eps for y in (model, plain) for x in y.modules() if isinstance(x, nn.LayerNorm)} == {1e-6}


def test_initial_weights_of_the_built_model():
    model = m.build(TINY, 200)
    layers = *model.backbone.modules(), *model.stage_heads, model.head_con
    normal = [x for x in layers if isinstance(x, nn.Linear)]
    assert len(normal) == 5 * 4 + 3 + 5
    for layer in normal:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()
    attn = model.backbone.blocks[0].attn
    assert all(0.01 < p.std() < 0.03 for p in (model.backbone.cls_token, attn.rel_pos_h, attn.rel_pos_w))
    for layer in (x for part in (model.ctt, model.msca) for x in part.modules() if isinstance(x, nn.Linear)):
        bound = layer.in_features**-0.5  # PyTorch's own (authors' code)
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.any()


def test_drop_path_drops_whole_branches_of_an_image_in_training_only():
    block = m.Block(m.PoolingAttention(8, 8, 2, 1, 1, (2, 2), "folded"), 8, 8, 0.5)
    x = torch.randn(64, 5, 8)
    unchanged = (block(x, (2, 2))[0] == x).all(2).all(1).float().mean()
    assert 0.1 < unchanged < 0.45  # both branches dropped: 1/4
    assert (block.eval()(x, (2, 2))[0] != x).any(2).any(1).all()


# ---------------------------------------------------------------------------- Swin-B and CvT-21


def test_swins_classification_path_equals_torchvisions():
    shape = [4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [12, 12]
    with torch.device("meta"):
        ours, theirs = m.SwinB(7), SwinTransformer(*shape, num_classes=7)
    ours, images = randomise(ours.to_empty(device="cpu"), scale=0.05), photos(1, 64, 96)
    for module in ours.modules():
        if hasattr(module, "define_relative_position_index"):
            module.define_relative_position_index()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    with torch.no_grad():
        taps = ours.stages(images)
        features = ours.norm(taps[-1][0].permute(0, 2, 3, 1)).mean((1, 2))
        torch.testing.assert_close(ours.head(features), theirs.eval()(images))
    shapes = [(1, 128, 16, 24), (1, 256, 8, 12), (1, 512, 4, 6), (1, 1024, 2, 3)]
    assert [tuple(maps.shape) for maps, _ in taps] == shapes and {t.shape[1] for _, t in taps} == {0}


def test_microsofts_swin_names_become_torchvisions():
    names = {
        "patch_embed.proj.weight": "features.0.0.weight", "patch_embed.norm.bias": "features.0.2.bias",
        "layers.0.blocks.1.norm1.weight": "features.1.1.norm1.weight", "norm.weight": "norm.weight",
        "layers.2.blocks.17.mlp.fc2.weight": "features.5.17.mlp.3.weight", "head.bias": "head.bias",
        "layers.3.blocks.0.mlp.fc1.bias": "features.7.0.mlp.0.bias",
        "layers.0.downsample.reduction.weight": "features.2.reduction.weight",
        "layers.2.downsample.norm.bias": "features.6.norm.bias",
    }
    constants = ("layers.0.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index")
    index = "features.1.0.attn.relative_position_index"
    with torch.device("meta"):
        own = m.SwinB(11).state_dict()
    renamed = m.swin_names(dict.fromkeys((*names, *constants), 0), own)
    assert [name for name in renamed if isinstance(renamed[name], int)] == list(names.values())
    assert set(names.values()) <= set(own)
    assert renamed[index] is own[index] and not any("mask" in name for name in renamed)


def test_cvts_attention_scales_by_the_whole_width_and_the_class_token_passes_by_the_convolutions():
    attn, x, inputs = randomise(m.ConvAttention(12, 3)), torch.randn(1, 1 + 15, 12), []
    maps = x[:, 1:].transpose(1, 2).reshape(1, 12, 3, 5)
    for name in "qkv":
        conv, linear = getattr(attn, f"conv_proj_{name}"), getattr(attn, f"proj_{name}")
        conv.bn.running_mean.normal_(), conv.bn.running_var.uniform_(0.5, 2)
        patches = conv.bn(conv.conv(maps)).flatten(2).transpose(1, 2)
        inputs.append(linear(torch.cat([x[:, :1], patches], 1))[0])
    q, k, v = inputs
    assert len(q) == 16 and len(k) == 1 + 6
    heads = [(q[:, c] @ k[:, c].T / math.sqrt(12)).softmax(1) @ v[:, c] for c in torch.arange(12).split(4)]
    torch.testing.assert_close(attn(x, (3, 5))[0][0], attn.proj(torch.cat(heads, 1)))


@pytest.mark.parametrize("change", [CVT, SWIN], ids=["cvt21", "swin_base"])
def test_table6_the_built_model_on_the_other_backbones(change, monkeypatch):
    """Shapes on the meta device, at the recipe's own size."""
    recipe, alphas = replace(CUB, **change), []
    monkeypatch.setattr(m, "smooth_cross_entropy", lambda y, t, alpha: alphas.append(alpha) or y.mean())
    with torch.device("meta"):
        model, images = m.build(recipe, 7), torch.zeros(2, 3, *recipe.image_size)
        _, terms = model(images, torch.zeros(2, dtype=torch.long))
        taps, boxes = model.backbone.stages(images), model.where(images)[0]
    n = len(taps)
    assert list(terms) == [f"y{s + 1}" for s in range(n)] + ["con", "top1"]
    assert alphas == [0.6, 0.7, 0.8, 0.9, 1.0][-n - 1 :]  # three stages: the last
    assert boxes.shape == (2, sum([162, 54, 18, 6][:n]), 4)
    rates = [x.p for x in model.modules() if type(x).__name__ == "StochasticDepth"]
    eps = {x.eps for x in model.backbone.modules() if isinstance(x, nn.LayerNorm)}
    assert eps == {1e-5} and {x.eps for x in model.msca.modules() if isinstance(x, nn.LayerNorm)} == {1e-6}
    if change is SWIN:
        assert rates == pytest.approx([0.2 * b / 23 for b in range(24)])
        return
    assert rates == pytest.approx([0] * 5 + [0.1 * b / 15 for b in range(16)])
    assert [tuple(maps.shape[1:]) for maps, _ in taps] == [(64, 112, 112), (192, 56, 56), (384, 28, 28)]
    assert [t.shape[1] for _, t in taps] == [0, 0, 1]  # a class token in the last stage only
    assert [model.backbone.get_submodule(f"stage{s}.blocks.0.attn").heads for s in range(3)] == [1, 3, 6]
    quick_gelu = model.backbone.stage0.blocks[0].mlp.activation
    assert quick_gelu(torch.tensor(2.0)).item() == pytest.approx(2 / (1 + math.exp(-3.404)))


def test_cvt_has_the_official_names():
    with torch.device("meta"):
        names = set(m.CvT(10).state_dict())
    few = """stage0.patch_embed.proj.weight stage1.patch_embed.norm.bias stage2.cls_token norm.bias head.bias
        stage2.blocks.15.attn.conv_proj_q.conv.weight stage1.blocks.3.attn.conv_proj_v.bn.running_var
        stage0.blocks.0.attn.proj_k.bias stage2.blocks.0.attn.proj.weight stage1.blocks.0.mlp.fc2.bias"""
    assert set(few.split()) <= names and len(names) == 21 * 34 + 3 * 4 + 5


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize("change", [{}, PLAIN, {"ctt": "pool"}, {"rel_pos": "reinit"}], ids=str)
def test_official_files_and_plain_runs_fill_a_backbone_with_tables_resized(change, tmp_path):
    """Files with and without a class token, of a smaller size, and of a run of ours."""
    path = str(tmp_path / "MViTv2.pyth")
    official = m.mvitv2("toy", (64, 64), 1000), m.mvitv2("toy", (64, 64), 1000, False)
    for source in (*official, tiny(num_classes=9, msps=False), randomise(m.mvitv2("toy", (32, 32), 1000))):
        torch.save({"model_state": source.state_dict(), "epoch": 3}, path)
        model = m.build(replace(TINY, weights=path, **change), 5)
        held = {name.removeprefix("backbone."): tensor for name, tensor in source.state_dict().items()}
        for name, tensor in model.backbone.state_dict().items():
            if name not in held or name.startswith("head."):
                assert name.startswith(("head.", "cls_token"))
            elif held[name].shape == tensor.shape:
                assert tensor.equal(held[name]), name
            else:
                resized = torch.allclose(tensor, m.resize_rel_pos(held[name], len(tensor)))
                assert "rel_pos" in name and resized == ("rel_pos" not in change)
        assert model(photos()).shape == (2, 5) and model.backbone.blocks[0].attn.rel_pos_h.shape == (31, 16)


def test_table6_a_cvt_file_fills_a_backbone_without_a_class_token(monkeypatch):
    with torch.device("meta"):
        monkeypatch.setattr(common, "read_state", lambda path: m.CvT(1000).state_dict())
        for change in ({"ctt": "pool"}, {"ctt": "pool", "msps": False}, {}):
            m.build(replace(CUB, **CVT | change, weights="FILE"), 5)
        monkeypatch.setattr(common, "read_state", lambda path: {"stage2.cls_token": torch.zeros(1)})
        with pytest.raises(ValueError, match="FILE does not fit CvT.*missing"):
            m.build(replace(CUB, **CVT, ctt="pool", weights="FILE"), 5)


def test_a_whole_m2former_is_loaded_at_another_size_and_other_files_are_refused_by_name(tmp_path):
    trained, path = tiny(num_classes=9), str(tmp_path / "w.bin")
    torch.save({"model": trained.state_dict()}, path)
    model = m.build(replace(TINY, weights=path, image_size=(96, 128)), 5)
    assert model.msca[0].sca.q[0].weight.equal(trained.msca[0].sca.q[0].weight)
    assert model.ctt[0][1].weight.equal(trained.ctt[0][1].weight)
    ours, theirs = (x.backbone.blocks[0].attn.rel_pos_w for x in (model, trained))
    torch.testing.assert_close(ours, m.resize_rel_pos(theirs, 63))
    with pytest.raises(ValueError, match="(?s)does not fit.*ctt.0.0.weight"):
        m.build(replace(TINY, weights=path, ctt="mlp1"), 5)
    torch.save(trained.state_dict() | {"backbone.blocks.0.attn.rel_pos_h": torch.zeros(0, 16)}, path)
    with pytest.raises(ValueError, match="does not fit.*rel_pos_h"):
        m.build(replace(TINY, weights=path), 5)
    torch.save(m.MViTv2((1, 1, 1, 1), 16, 1, (64, 64), 10).state_dict(), path)
    with pytest.raises(ValueError, match=r"(?s)w\.bin does not fit.*blocks\.3\."):
        m.build(replace(TINY, weights=path), 5)


def test_the_official_weights_of_each_backbone(monkeypatch):
    assert {name: url.rsplit("/", 1)[-1] for name, url in m.BACKBONES.items()} == {
        "mvitv2_tiny": "MViTv2_T_in1k.pyth", "mvitv2_small": "MViTv2_S_in1k.pyth", "mvitv2_toy": "",
        "cvt21": "", "mvitv2_base": "MViTv2_B_in21k.pyth", "mvitv2_large": "MViTv2_L_in21k.pyth",
        "swin_base": "swin_base_patch4_window12_384_22k.pth"}
    monkeypatch.setattr(common, "fetch", lambda url: f"no file of {url}")
    with torch.device("meta"), pytest.raises(FileNotFoundError, match="mvitv2_models/MViTv2_B_in21k.pyth"):
        m.build(m.CUB, 5)
    with pytest.raises(ValueError, match="mvitv2_toy has no file to download"):
        m.build(replace(TINY, weights="default"), 5)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("change, message", [
    ({"stages": ()}, "some of stages 1 to 4"),
    ({"stages": (4, 5)}, "--stages 5: allowed are numbers from 1 to 4"),
    ({"alpha": (0.9, 0.9, 0.9, 0.9, 1.1)}, "--alpha 1.1: allowed are numbers from 0 to 1"),
    ({"backbone": "cvt21", "stages": (4,)}, "some of stages 1 to 3"),
    ({"k": (6, 4)}, "4 numbers for --k"),
    ({"alpha": (0.6, 0.7)}, "5 for --alpha"),
    ({"label_smoothing": 0.1}, "--alpha"),
    ({"backbone": "swin_base"}, "use one of: pool"),
    ({"backbone": "cvt21", "ctt": "attach"}, "use one of: mlp2 mlp1 pool"),
], ids=str)
def test_settings_that_do_not_fit_are_refused_with_what_to_do(change, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        m.build(replace(TINY, **change), 5)
