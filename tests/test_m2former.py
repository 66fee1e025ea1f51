"""Facts of M2Former (arXiv:2308.02161), and of MViTv2, Swin-B and CvT-21 as its backbones.

Recipes and tables; MSPS, CTT, MSCA, loss; where and figures; MViTv2; sizes; Swin-B, CvT-21; weights; errors.
"""
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.models.video.mvit import MSBlockConfig, MViT

import common
import data
import m2former as m

TINY = replace(m.RECIPES["toy"], weights="none")  # 64 px, four stages, widths 16 to 128
CUB = replace(m.CUB, weights="none")
DIMS = (8, 16, 24, 32)


def randomise(model, scale=0.3):
    """Random weights everywhere, norms and position tables included: no term hides behind a zero or a one."""
    for name, p in model.named_parameters():
        spread = p[0].numel() ** -0.5 if p.dim() > 1 and "rel_pos" not in name else scale
        one = "norm" in name and name.endswith("weight")
        with torch.no_grad():
            p.copy_(torch.randn_like(p) * spread + one)
    return model.eval()


def tiny(num_classes=5, **changes):
    return randomise(m.M2Former(replace(TINY, **changes), num_classes))


def photos(B=2, H=64, W=64):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(0))


def token_lists():
    return [torch.randn(3, n, c) for n, c in zip((6, 5, 4, 3), DIMS)]


def found(model, images):
    """Taps of the backbone, selected patches, their boxes, and the tokens that enter MSCA."""
    taps, patches, boxes = model.select(images)
    return taps, patches, boxes, [torch.cat(pair, 1) for pair in zip(model.class_tokens(taps), patches)]


SEC42 = dict(  # warmup, grad_clip, amp and drop_path are the authors' code
    image_size=(448, 448), resize=(600, 600), batch_size=16, iterations=10_000, optimizer="sgd", lr=0.03,
    momentum=0.9, weight_decay=0.0, schedule="cosine", warmup=500, grad_clip=1.0, drop_path=0.3, amp="off",
    weights="default", crop="random", hflip=0.5, interpolation="bilinear", normalize="imagenet",
    backbone="mvitv2_base", rel_pos="interpolate", attention="auto", msps=True, stages=(1, 2, 3, 4),
    k=(162, 54, 18, 6), merge=2, ctt="mlp2", cca=True, sca=True, num_msca=1, alpha=(0.6, 0.7, 0.8, 0.9, 1.0))
TOY = dict(
    backbone="mvitv2_toy", image_size=(64, 64), resize=(0, 0), k=(12, 4, 2, 1), toy_preset="birds-easy",
    iterations=0, epochs=12, boxes=True, warmup=0, batch_size=32, optimizer="adamw", lr=1.5e-3,
    weight_decay=0.05, schedule="onecycle", drop_path=0.0, weights="none")
RECIPES = [("cub", {}), ("nabirds", {}), ("folder", dict(iterations=0, epochs=27, warmup=1.35)), ("toy", TOY)]


def test_sec42_every_field_of_the_recipes():
    filled = asdict(common.Recipe()) | SEC42
    assert [(name, asdict(r)) for name, r in m.RECIPES.items()] == [(name, filled | c) for name, c in RECIPES]


PLAIN, CVT = {"msps": False}, {"backbone": "cvt21", "drop_path": 0.1}
SWIN = dict(backbone="swin_base", ctt="pool", image_size=(384, 384), resize=(510, 510), drop_path=0.2)
CTT = {"cca": False, "sca": False}  # without cross-attention; MSPS: nor transfer
MSPS = CTT | {"ctt": "attach"}
TABLES = {  # once more from the paper: data, metrics, what each row changes, its numbers
    "baseline": ("cub", "top1", [(PLAIN, 91.6), ({}, 92.4)]),
    "toy": ("toy", "top1", [(PLAIN, None), (MSPS, None), (CTT, None), ({}, None)]),
    "1": ("cub", "top1", [({}, 92.4)]),
    "2": ("nabirds", "top1", [({}, 91.1)]),
    "3": ("cub", "top1", [(PLAIN, 91.6), (MSPS, 91.6), (CTT, 92.1), ({"sca": False}, 92.2),
                          ({"cca": False}, 92.1), ({}, 92.4)]),
    "4": ("cub", "top1", [({"num_msca": n}, v) for n, v in ((1, 92.4), (2, 92.1), (3, 92.2), (4, 92.2))]),
    "5": ("cub", "top1", [({"k": (12, 10, 8, 6)}, 92.2), ({"k": (48, 24, 12, 6)}, 92.2),
                          ({"k": (162, 54, 18, 6)}, 92.4), ({"k": (448, 112, 28, 7)}, 92.1)]),
    "6": ("cub", "top1", [(CVT | PLAIN, 89.3), (CVT, 90.0), (SWIN | PLAIN, 90.6), (SWIN, 91.3)]),
    "7": ("cub", "top1", [({"ctt": kind}, v) for kind, v in (
        ("pool", 91.5), ("attach", 91.9), ("mlp1", 92.1), ("mlp2", 92.4))]),
    "8": ("cub", "large medium small top1", [
        (PLAIN, (92.3, 91.8, 90.5, 91.6)), ({"stages": (4,)}, (91.9, 91.7, 90.6, 91.5)),
        ({"stages": (3, 4)}, (92.9, 91.9, 90.8, 91.9)), ({"stages": (2, 3, 4)}, (92.9, 92.4, 91.4, 92.3)),
        ({}, (92.9, 92.6, 91.4, 92.4))]),
}


def test_every_row_of_the_tables_changes_what_the_paper_changes_and_holds_its_numbers():
    ours = {key: (t.data, t.metric, [row[1:] for row in t.rows]) for key, t in m.TABLES.items()}
    assert ours == TABLES and list(ours) == list(TABLES)


def test_sec32_merging_averages_r_by_r_patches_and_what_there_is_at_an_odd_edge():
    maps = photos(2, 6, 5)
    for r, (H, W) in {1: (6, 5), 2: (3, 3), 3: (2, 2)}.items():
        merged = m.merge_patches(maps, r)
        assert merged.shape == (2, 3, H, W)
        for y, x in np.ndindex(H, W):
            cell = maps[:, :, r * y : r * y + r, r * x : r * x + r]
            assert_close(merged[:, :, y, x], cell.mean((2, 3)))


def test_eq1_to_3_the_k_tokens_with_the_highest_channel_mean_are_gathered_and_alone_get_gradients():
    tokens = torch.randn(3, 20, 7, requires_grad=True)
    for k in (6, 90):  # no more than there are
        selected, indices = m.select_patches(tokens, k)
        order = np.argsort(-tokens.detach().numpy().sum(2))[:, :k]
        assert indices.tolist() == order.tolist()
        assert selected.equal(torch.stack([own[best] for own, best in zip(tokens, order)]))
        (gradient,) = torch.autograd.grad(selected.sum(), tokens)
        assert gradient.equal(torch.zeros(3, 20, 7).scatter(1, indices[:, :, None].expand(-1, -1, 7), 1))


def test_eq2_scores_are_taken_before_any_layer_norm_which_would_make_all_of_them_zero():
    taps, patches, _, _ = found(tiny(), photos())
    tokens = m.merge_patches(taps[1][0], 2).flatten(2).transpose(1, 2)
    assert F.layer_norm(tokens, (32,)).mean(2).abs().max() < 1e-5 < tokens.mean(2).std()
    best = tokens.mean(2).topk(4, 1).indices
    assert patches[1].equal(tokens.gather(1, best[:, :, None].expand(-1, -1, 32)))


def test_eq5_class_token_transfer_is_two_linear_layers_with_batch_norm_and_relu():
    ctt, x = randomise(m.ClassTokenTransfer(16, 6)), torch.randn(4, 16)
    first, norm, _, last = ctt
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    hidden = x @ first.weight.T + first.bias - norm.running_mean
    hidden = hidden / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    assert_close(ctt(x), hidden.clamp(min=0) @ last.weight.T + last.bias)
    assert len(first.bias) == 12 and len(m.ClassTokenTransfer(16, 6, "mlp1").state_dict()) == 2  # one layer


@pytest.mark.parametrize("ctt", ["mlp2", "mlp1", "attach", "pool"])
def test_eq4_eq6_table7_where_the_class_token_of_a_stage_comes_from_and_what_classifies(ctt):
    model = tiny(ctt=ctt, num_msca=2)
    taps, _, _, tokens = found(model, photos())
    expected = [own for _, own in taps]  # Eq. 4
    if ctt in ("mlp1", "mlp2"):  # stage 4 keeps CLS_g
        expected[:3] = [model.ctt[s](expected[3][:, 0])[:, None] for s in range(3)]
    assert all(a.equal(b) for a, b in zip(model.class_tokens(taps), expected, strict=True))
    assert {own.shape[1] for own in expected} == {0 if ctt == "pool" else 1}
    normed = model.norms[1](model.msca[1](model.msca[0](tokens))[1])  # Table 4: blocks follow each other
    feature = normed.mean(1) if ctt == "pool" else normed[:, 0]
    assert_close(model.heads(photos())["y2"], model.stage_heads[1](feature))


def test_eq8_to_10_channel_cross_attention():
    tokens, cca = token_lists(), randomise(m.ChannelCrossAttention(DIMS))
    first, norm, _, last, _ = cca.gate
    D = torch.cat([t.sum(1) / t.shape[1] for t in tokens], 1)
    C = torch.sigmoid(last(norm(first(D)).clamp(min=0)))
    assert first.weight.shape == (40, 80)
    for out, t, a, b in zip(cca(tokens), tokens, (0, 8, 24, 48), (8, 24, 48, 80)):
        assert_close(out, t * C[:, None, a:b] + t)


@pytest.mark.parametrize("across", [True, False])
def test_eq11_to_13_spatial_cross_attention_head_by_head_and_eq6_without_sca_in_each_stage_alone(across):
    tokens, sca = token_lists(), randomise(m.SpatialCrossAttention(DIMS, 32, across))
    Q, K, V = ([layer(t) for layer, t in zip(layers, tokens)] for layers in (sca.q, sca.k, sca.v))
    for i, out in enumerate(sca(tokens)):
        keys, values = (torch.cat(every, 1) if across else every[i] for every in (K, V))
        heads = []
        for c in torch.arange(32).split(4):  # 8 heads
            p = torch.exp(Q[i][..., c] @ keys[..., c].mT / math.sqrt(4))
            heads.append(p / p.sum(2, keepdim=True) @ values[..., c])
        assert_close(out, sca.out[i](torch.cat(heads, 2)))


def test_eq7_a_block_is_cca_then_sca_and_an_ffn_with_pre_norms_and_residuals():
    tokens, block = token_lists(), randomise(m.MSCA(DIMS, 32))
    y = block.cca(tokens)
    a = [t + o for t, o in zip(y, block.sca([norm(t) for norm, t in zip(block.norm_attn, y)]))]
    for i, (out, t) in enumerate(zip(block(tokens), a)):
        assert_close(out, t + block.ffn[i](block.norm_ffn[i](t)))


ALPHA = {"y1": 0.6, "y2": 0.7, "y3": 0.8, "y4": 0.9, "con": 1.0}
CHOSEN = [({}, ALPHA), ({"stages": (3, 4)}, {"y3": 0.8, "y4": 0.9, "con": 1.0}), (PLAIN, {"y": 1.0})]


@pytest.mark.parametrize("change, alphas", CHOSEN, ids=["all", "two-stages", "plain"])
def test_eq14_to_16_table8_losses_are_summed_with_rising_alpha_and_probabilities_are_summed(change, alphas):
    """Eq. 15: the rest of alpha is spread over the others, so that targets sum to one."""
    model, targets = tiny(**change), torch.tensor([1, 4])
    logits, (loss, terms) = model.heads(photos()), model(photos(), targets)
    assert list(terms) == [*alphas, "top1"] and list(logits) == [*alphas] + ["all"] * (change != PLAIN)
    assert loss.requires_grad and not any(t.requires_grad for t in terms.values())
    for name, alpha in alphas.items():
        soft = torch.full((2, 5), (1 - alpha) / 4).scatter(1, targets[:, None], alpha)
        assert_close(terms[name], -(soft * logits[name].log_softmax(1)).sum(1).mean())
    assert_close(loss, sum(terms[name] for name in alphas))
    mean = sum(logits[name].softmax(1) for name in alphas) / len(alphas)
    assert_close(model(photos()).softmax(1), mean)
    assert terms["top1"] == (mean.argmax(1) == targets).float().mean()


def test_tables_3_and_8_switches_take_their_own_weights_out_and_nothing_else():
    def names(**change):
        return set(tiny(**change).state_dict())

    whole = names()
    ctt, block = ({name for name in whole if name.startswith(part)} for part in ("ctt.", "msca.0"))
    assert names(sca=False) == names(attention="explicit") == whole
    assert names(cca=False) == {name for name in whole if ".cca." not in name}
    assert names(ctt="attach") == whole - ctt and names(ctt="pool") == whole - ctt - {"backbone.cls_token"}
    assert names(num_msca=2) - whole == {name.replace("msca.0", "msca.1") for name in block}
    official = m.mvitv2("toy", (64, 64), 5).state_dict()
    assert names(msps=False) == {f"backbone.{name}" for name in official}
    plain, few = tiny(msps=False), tiny(stages=(3, 4))
    assert plain(photos()).equal(plain.backbone(photos())) and plain.where(photos())[0].shape == (2, 19, 4)
    assert few.msca[0].cca.dims == [64, 128] and few.head_con.in_features == 64 + 128
    assert [p.shape[1] for p in found(few, photos())[1]] == [2, 1]


def test_where_gives_the_selected_cells_in_pixels_coarsest_stage_first():
    model, images, boxes, scores = tiny(image_size=(96, 64)), photos(2, 96, 64), [], []
    taps = model.backbone.stages(images)
    for s, k in ((3, 1), (2, 2), (1, 4), (0, 12)):
        means, side = m.merge_patches(taps[s][0], 2).mean(1), 8 * 2**s
        best, cells = means.flatten(1).topk(k)
        y, x = cells // means.shape[2] * side, cells % means.shape[2] * side
        boxes.append(torch.stack([x, y, x + side, (y + side).clamp(max=96)], 2).float())
        scores.append(best)
    assert_close(model.where(images), (torch.cat(boxes, 1), torch.cat(scores, 1)))
    odd = tiny(image_size=(62, 45))  # the last patches reach over the edge, their boxes do not
    assert odd.where(photos(1, 62, 45))[0][0, 0].tolist() == [0, 0, 45, 62]
    assert odd.backbone.blocks[0].attn.rel_pos_w.shape == (2 * 12 - 1, 16)


@pytest.mark.parametrize("change", [{}, {"num_msca": 2}, {"ctt": "pool", "merge": 1}, {"stages": (1, 3)}])
def test_figure6_is_the_attention_of_the_best_patch_of_the_coarsest_stage_to_the_patches_of_each(change):
    model = tiny(**change)
    taps, patches, _, tokens = found(model, photos())
    first = 0 if "ctt" in change else 1  # the class token comes first
    *before, block = model.msca
    for other in before:
        tokens = other(tokens)
    normed = [norm(t) for norm, t in zip(block.norm_attn, block.cca(tokens))]
    query = block.sca.q[-1](normed[-1][:, first])[:, :, None]  # the first patch of the last stage
    keys = torch.cat([layer(t) for layer, t in zip(block.sca.k, normed)], 1)
    heads = [(keys[..., c] @ query[:, c] / math.sqrt(16)).softmax(1) for c in torch.arange(128).split(16)]
    by_stage = (sum(heads) / 8)[..., 0].split([t.shape[1] for t in tokens], 1)
    assert_close(model.attention(taps, patches), [row[:, first:] for row in by_stage])


def test_figures_5_and_6_tint_the_boxes_of_each_stage_by_the_weights_of_figure_6_on_a_dark_photo(monkeypatch):
    photo, boxes = Image.new("RGB", (64, 64), (120,) * 3), torch.tensor([[8, 16, 16, 24], [32, 32, 40, 40]])
    tinted = m.paint(photo, boxes, (255, 0, 0), torch.tensor([1.0, 0.5]))
    full, half, rest = (tinted.getpixel(at) for at in ((8, 16), (39, 39), (7, 16)))
    assert rest == (40, 40, 40) == tinted.getpixel((16, 24)) and tinted.getpixel((15, 23)) == full
    assert full == pytest.approx((0.75 * 120 + 0.25 * 255, 90, 90), abs=1)
    assert half == pytest.approx((97, 65, 65), abs=2)
    model, calls, captions = tiny(stages=(1, 2, 3)), [], []
    monkeypatch.setattr(m, "paint", lambda photo, *how: calls.append(how) or photo)
    monkeypatch.setattr(common, "headed", lambda photo, caption: captions.append(caption) or photo)
    assert model.figure(photos(1))[0].height == 224 + common.GAP + 224
    taps, patches, boxes, _ = found(model, photos(1))
    one, two, three = (own[0] for own in boxes)
    w1, w2, _ = (w[0] / w[0].max() for w in model.attention(taps, patches))
    painted, colours, strengths = zip(*calls)
    assert_close(painted, (three, two, one, three[:1], two, one))
    assert colours == ("red", "red", "red", "red", "orange", "orange")
    assert_close(strengths, (*map(torch.ones, (2, 4, 12, 1)), w2, w1))
    assert captions == ["input", "stage 3", "stage 2", "stage 1",
                        "a patch of stage 3", "its attention, stage 2", "its attention, stage 1"]
    for change in ({"sca": False}, PLAIN, {"stages": (4,)}):  # no attention across stages
        calls.clear()
        assert tiny(**change).figure(photos(1))[0].height == 224
        assert {colour for _, colour, _ in calls} == {"red"}


def test_figure4_by_its_command_shows_objects_of_both_outer_quartiles_and_between(monkeypatch, tmp_path):
    sides = 10 * np.random.default_rng(0).permutation(20).astype(np.float32) + 10  # 10 to 200
    boxes = np.stack([0 * sides + 5, 0 * sides + 3, sides + 5, 0 * sides + 10], 1)
    shown, names, panels = [], [], common.panels
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (210, 210)).save("photo.png")
    splits = data.Splits(None, data.Split(["photo.png"] * 20, None, boxes), None)
    monkeypatch.setattr(data, "load", lambda name, root, recipe: splits)
    monkeypatch.setattr(common, "draw_boxes", lambda photo, own: shown.append(own[:, 2].item() - 5) or photo)
    monkeypatch.setattr(common, "panels", lambda photos, texts: names.append(texts) or panels(photos, texts))
    exec(re.search(r'python -c "(.*?)"', m.__doc__, re.S)[1])
    assert names == [["large"] * 4, ["medium"] * 4, ["small"] * 4]
    assert shown == [180, 170, 160] + [100, 90, 80, 70] + [30, 20, 10]  # from the median of each down
    assert Image.open("figure_4.png").height == 3 * (224 + 22) + 2 * common.GAP


NAMES = {  # patterns in our names (the official ones) -> torchvision's
    r"norm_([qkv])": r"pool_\1.norm_act.0", r"pool_([qkv])\.w": r"pool_\1.pool.w",
    r"attn\.proj": "attn.project.0", r"mlp\.fc1": "mlp.0", r"mlp\.fc2": "mlp.3", r"(\d)\.proj": r"\1.project",
    r"head\.projection": "head.1", r"patch_embed\.proj": "conv_proj", "cls_token": "pos_encoding.class_token",
}


def torchvision_mvit(ours, depths, dim, heads, side):
    """torchvision's video MViT of 7 classes at T = 1 with our weights; its time tables are zero."""
    config, width = [], dim
    for stage in np.repeat(range(4), depths).tolist():
        out, kv = dim * 2**stage, max(1, 4 // 2**stage)
        s = 2 if out > width else 1
        kernels, strides = ([1, 3, 3], [1, 3, 3]), ([1, s, s], [1, kv, kv])
        config.append(MSBlockConfig(heads * 2**stage, width, out, *kernels, *strides))
        width = out
    patches = dict(patch_embed_kernel=(1, 7, 7), patch_embed_stride=(1, 4, 4), patch_embed_padding=(0, 3, 3))
    with torch.device("meta"):
        theirs = MViT((side, side), 1, config, True, False, True, True, 0.0, num_classes=7,
                      norm_layer=lambda width: nn.LayerNorm(width, 1e-6), **patches)
    own = theirs.state_dict()
    state = {name: torch.zeros(t.shape) for name, t in own.items() if name.endswith("rel_pos_t")}
    for name, tensor in ours.state_dict().items():
        for pattern, new in NAMES.items():
            name = re.sub(pattern, new, name)
        state[name] = tensor.view(own[name].shape)
    theirs.load_state_dict(state, assign=True)
    return theirs.eval()


@pytest.mark.parametrize("shape, side, attention", [
    (((2, 1, 2, 1), 16, 1), 64, "folded"), (((2, 1, 2, 1), 16, 1), 64, "explicit"),
    (((1, 2, 1, 2), 24, 2), 96, "folded"), (m.VARIANTS["tiny"], 96, "folded")])
def test_mvitv2_equals_torchvisions_video_mvit_on_one_frame_and_on_a_larger_one(shape, side, attention):
    """On the larger one torchvision's forward resizes the position tables; so does ours, and so do we."""
    with torch.device("meta"):
        ours, large = (m.MViTv2(*shape, (n, n), 7, True, 0.0, attention) for n in (side, 2 * side))
    ours, large = randomise(ours.to_empty(device="cpu"), scale=0.1), large.to_empty(device="cpu").eval()
    large.load_state_dict(m.fit_positions(ours.state_dict(), large.state_dict(), "interpolate"))
    theirs, images, more = torchvision_mvit(ours, *shape, side), *(photos(1, n, n) for n in (side, 2 * side))
    with torch.no_grad():
        assert_close(ours(images), theirs(images[:, :, None]), atol=1e-5, rtol=1e-5)
        theirs.pos_encoding.spatial_size = (side // 2, side // 2)
        for model in (ours, large):
            assert_close(model(more), theirs(more[:, :, None]), atol=1e-5, rtol=1e-5)


def attention_inputs(grids, class_token, d):
    """Queries, keys and values of one image and head, and both tables; float64."""
    n, k = (math.prod(grid) + class_token for grid in grids)
    shapes = [(1, 1, n, d), (1, 1, k, d), (1, 1, k, d)] + [(2 * max(sides) - 1, d) for sides in zip(*grids)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attended(form, grids, q, k, v, *tables):
    return form(q, k, v, *m.position_products(q, tables, *grids))


@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize("q_grid, k_grid", [
    ((4, 4), (4, 4)), ((8, 8), (2, 2)), ((3, 5), (6, 10)), ((6, 4), (3, 7)), ((5, 1), (2, 3))])
def test_both_forms_are_softmax_of_scaled_products_and_queries_times_tables(q_grid, k_grid, class_token):
    """Pair by pair; the class token's row and column carry no bias."""
    q, k, v, *tables = (t.detach() for t in attention_inputs((q_grid, k_grid), class_token, 6))
    scores = q[0, 0] @ k[0, 0].T / math.sqrt(6)
    for i, j in np.ndindex(math.prod(q_grid), math.prod(k_grid)):
        at = zip(divmod(i, q_grid[1]), divmod(j, k_grid[1]), q_grid, k_grid, tables)
        for a, b, n, K, table in at:  # the row of each axis, on the grid of the finer of the two
            up, down = max(K / n, 1.0), max(n / K, 1.0)
            row = table[int(a * up - b * down + (K - 1) * down)]
            scores[class_token + i, class_token + j] += q[0, 0, class_token + i] @ row
    for form in (m.attend_folded, m.attend_explicit):
        out = attended(form, (q_grid, k_grid), q, k, v, *tables)
        assert_close(out[0, 0], scores.softmax(1) @ v[0, 0])


def test_attention_is_folded_on_a_cpu_beyond_2_to_the_18_scores(monkeypatch):
    names = []
    for name in ("folded", "explicit"):
        monkeypatch.setattr(m, f"attend_{name}", lambda q, *a, name=name: names.append(name) or q)
    for form, class_token in (("auto", 0), ("auto", 1), ("folded", 0), ("explicit", 1)):
        m.PoolingAttention(4, 4, 1, 1, 1, (16, 32), form)(torch.randn(1, 512 + class_token, 4), (16, 32))
    assert names == ["explicit", "folded", "folded", "explicit"]


def test_folded_attention_keeps_no_tensor_of_queries_times_keys_for_backward_and_has_the_same_gradients():
    largest, gradients, grids = [], [], ((24, 24), (20, 20))
    inputs = attention_inputs(grids, 1, 8)
    for form in (m.attend_folded, m.attend_explicit):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            out = attended(form, grids, *inputs)
        largest.append(max(sizes))
        gradients.append(torch.autograd.grad(out.pow(2).sum(), inputs))
    assert largest[0] <= 577 * (8 + 40) and largest[1] >= 577 * 401
    assert_close(*gradients, atol=1e-10, rtol=1e-8)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_and_multiply_accumulates_are_the_published_ones_and_those_of_the_authors_model():
    sizes = {"tiny": 24_173_320, "small": 34_870_216, "base": 51_472_744, "large": 213_635_368}
    with torch.device("meta"):
        assert {v: count(m.mvitv2(v, (224, 224), 1000, False)) for v in sizes} == sizes
        assert [count(m.mvitv2(v, (224, 224), 19168)) for v in ("base", "large")] == [65_444_032, 234_583_216]
        assert count(m.CvT(1000)) == 31_622_696 and count(m.SwinB(1000)) == 87_903_584
        changes = {"attention": "explicit"}, CVT, SWIN
        model, cvt, swin = (m.M2Former(replace(CUB, **change), 200).eval() for change in changes)
        assert count(model) == 65_674_936 and count(m.M2Former(CUB, 555)) == 66_699_111
        whole = m.mvitv2("tiny", (224, 224), 1000, attention="explicit"), m.CvT(1000).eval()
        for net, side, giga in zip((model, *whole), (448, 224, 224), (55.15, 4.70, 7.18)):
            macs = common.count_macs(net, torch.zeros(1, 3, side, side))
            assert macs / 1e9 == pytest.approx(giga, abs=0.005)
    assert [count(c) for c in model.ctt] == [166_560, 369_984, 887_424]
    assert count(model.stage_heads) + count(model.head_con) == 577_000 and count(model.norms) == 2_880
    assert [(count(x.msca[0].cca), count(x.msca[0]), count(x.ctt)) for x in (model, cvt, swin)] == [
        (2_077_200, 12_791_376, 1_423_968), (411_200, 2_911_424, 280_320), (3_691_200, 22_728_128, 0)]
    tables = [model.backbone.blocks[b].attn.rel_pos_h.shape for b in (0, 2, 5, 6, 21, 22)]
    assert tables == [(n, 96) for n in (223, 111, 111, 55, 55, 27)]


BUILT = {  # recipe, side and widths of the taps, class tokens, rates of stochastic depth, epsilon
    "cub": (CUB, 112, (96, 192, 384, 768), (1, 1, 1, 1), [0.3 * b / 23 for b in range(24)], 1e-6),
    "toy": (TINY, 16, (16, 32, 64, 128), (1, 1, 1, 1), [0] * 5, 1e-6),
    "cvt21": (replace(CUB, **CVT), 112, (64, 192, 384), (0, 0, 1),
              [0] * 5 + [0.1 * b / 15 for b in range(16)], 1e-5),
    "swin_base": (replace(CUB, **SWIN), 96, (128, 256, 512, 1024), (0, 0, 0, 0),
                  [0.2 * b / 23 for b in range(24)], 1e-5),
}


@pytest.mark.parametrize("recipe, side, widths, tokens, rates, eps", BUILT.values(), ids=BUILT)
def test_table6_the_model_built_on_each_backbone_at_its_own_size(recipe, side, widths, tokens, rates, eps):
    with torch.device("meta"):
        model, plain = m.build(recipe, 7), m.build(replace(recipe, msps=False), 7)
        images = torch.zeros(2, 3, *recipe.image_size)
        taps, boxes, n = model.backbone.stages(images), model.where(images)[0], len(widths)
        assert model(images).shape == (2, 7) and boxes.shape == (2, sum(recipe.k[:n]), 4)
    assert [maps.shape for maps, _ in taps] == [(2, C, side >> s, side >> s) for s, C in enumerate(widths)]
    assert [own.shape for _, own in taps] == [(2, t, C) for t, C in zip(tokens, widths)]
    names, alphas = [f"y{s + 1}" for s in range(n)] + ["con"], [0.6, 0.7, 0.8, 0.9, 1.0]
    assert model.alpha == dict(zip(names, alphas[-n - 1 :]))  # three stages: the last
    depth = [x.p for x in model.modules() if isinstance(x, torchvision.ops.StochasticDepth)]
    assert depth == pytest.approx(rates)
    for part, expected in ((model.backbone, eps), (plain, eps), (model.msca, 1e-6), (model.norms, 1e-6)):
        assert {x.eps for x in part.modules() if isinstance(x, nn.LayerNorm)} == {expected}


def test_initial_weights_of_the_built_model():
    model = m.build(TINY, 200)
    normal, torchs = ([x for part in parts for x in part.modules() if isinstance(x, nn.Linear)] for parts in (
        (model.backbone, model.stage_heads, model.head_con), (model.ctt, model.msca)))
    assert len(normal) == 5 * 4 + 3 + 5
    for layer in normal:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()
    attn = model.backbone.blocks[0].attn
    assert all(0.01 < p.std() < 0.03 for p in (model.backbone.cls_token, attn.rel_pos_h, attn.rel_pos_w))
    for layer in torchs:  # PyTorch's own (authors' code)
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.any()


def test_drop_path_drops_whole_branches_of_an_image_in_training_only():
    block = m.Block(m.PoolingAttention(8, 8, 2, 1, 1, (2, 2), "folded"), 8, 8, 0.5)
    x = torch.randn(64, 5, 8)
    unchanged = (block(x, (2, 2))[0] == x).all(2).all(1).float().mean()
    assert 0.1 < unchanged < 0.45  # both branches dropped: 1/4
    assert (block.eval()(x, (2, 2))[0] != x).any(2).any(1).all()


def test_swins_classification_path_equals_torchvisions_and_microsofts_names_become_its():
    shape, ours = ([4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [12, 12]), m.SwinB(7).eval()
    with torch.device("meta"):
        theirs = torchvision.models.SwinTransformer(*shape, num_classes=7).eval()
    own = ours.state_dict()
    theirs.load_state_dict(own, assign=True)
    with torch.no_grad():
        features = ours.norm(ours.stages(photos(1, 64, 96))[-1][0].permute(0, 2, 3, 1)).mean((1, 2))
        assert_close(ours.head(features), theirs(photos(1, 64, 96)))
    names = {
        "patch_embed.proj.weight": "features.0.0.weight", "patch_embed.norm.bias": "features.0.2.bias",
        "layers.0.blocks.1.norm1.weight": "features.1.1.norm1.weight", "norm.weight": "norm.weight",
        "layers.2.blocks.17.mlp.fc2.weight": "features.5.17.mlp.3.weight", "head.bias": "head.bias",
        "layers.3.blocks.0.mlp.fc1.bias": "features.7.0.mlp.0.bias",
        "layers.0.downsample.reduction.weight": "features.2.reduction.weight",
        "layers.2.downsample.norm.bias": "features.6.norm.bias",
    }
    constants = "layers.0.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index"
    kept = {name: tensor for name, tensor in own.items() if name.endswith("relative_position_index")}
    renamed = m.swin_names(dict.fromkeys((*names, *constants)), own)
    assert renamed == kept | dict.fromkeys(names.values()) and renamed.keys() <= own.keys()


def test_cvts_attention_scales_by_the_whole_width_and_the_class_token_passes_by_the_convolutions():
    attn, x, inputs = randomise(m.ConvAttention(12, 3)), torch.randn(1, 1 + 15, 12), []
    maps = x[:, 1:].transpose(1, 2).reshape(1, 12, 3, 5)
    for name in "qkv":
        (conv, norm), linear = getattr(attn, f"conv_proj_{name}"), getattr(attn, f"proj_{name}")
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        patches = norm(conv(maps)).flatten(2).transpose(1, 2)
        inputs.append(linear(torch.cat([x[:, :1], patches], 1))[0])
    q, k, v = inputs
    assert len(q) == 16 and len(k) == 1 + 6
    heads = [(q[:, c] @ k[:, c].T / math.sqrt(12)).softmax(1) @ v[:, c] for c in torch.arange(12).split(4)]
    assert_close(attn(x, (3, 5))[0][0], attn.proj(torch.cat(heads, 1)))


def test_cvt_has_the_official_names_heads_of_64_channels_and_quick_gelu():
    with torch.device("meta"):
        cvt = m.CvT(10)
    few = """stage0.patch_embed.proj.weight stage1.patch_embed.norm.bias stage2.cls_token norm.bias head.bias
        stage2.blocks.15.attn.conv_proj_q.conv.weight stage1.blocks.3.attn.conv_proj_v.bn.running_var
        stage0.blocks.0.attn.proj_k.bias stage2.blocks.0.attn.proj.weight stage1.blocks.0.mlp.fc2.bias"""
    assert set(few.split()) <= set(cvt.state_dict()) and len(cvt.state_dict()) == 21 * 34 + 3 * 4 + 5
    blocks = [stage.blocks[0] for stage in (cvt.stage0, cvt.stage1, cvt.stage2)]
    assert [block.attn.heads for block in blocks] == [1, 3, 6]
    for block in blocks:
        assert block.mlp.activation(torch.tensor(2.0)).item() == pytest.approx(2 / (1 + math.exp(-3.404)))


@pytest.mark.parametrize("change", [{}, PLAIN, {"ctt": "pool"}, {"rel_pos": "reinit"}], ids=str)
def test_official_files_and_plain_runs_fill_a_backbone_with_tables_resized(change, tmp_path):
    """Files with and without a class token, of a smaller size, and of a run of ours."""
    path, kinds = str(tmp_path / "MViTv2.pyth"), ((64, True), (64, False), (32, True))
    official = [randomise(m.mvitv2("toy", (side, side), 1000, token)) for side, token in kinds]
    for source in (*official, tiny(9, msps=False)):
        torch.save({"model_state": source.state_dict(), "epoch": 3}, path)
        model = m.build(replace(TINY, weights=path, **change), 5)
        held = {name.removeprefix("backbone."): tensor for name, tensor in source.state_dict().items()}
        for name, tensor in model.backbone.state_dict().items():
            if name not in held or name.startswith("head."):
                assert name.startswith(("head.", "cls_token"))
            else:
                same = tensor.equal(m.resize_rel_pos(held[name], len(tensor)))
                assert same == (tensor.shape == held[name].shape or "rel_pos" not in change), name
        assert model(photos()).shape == (2, 5)


def test_table6_a_cvt_file_fills_a_backbone_without_a_class_token(monkeypatch):
    recipe = replace(CUB, **CVT, ctt="pool", weights="FILE")
    with torch.device("meta"):
        monkeypatch.setattr(common, "read_state", lambda path: m.CvT(1000).state_dict())
        for change in ({}, PLAIN, {"ctt": "mlp2"}):
            m.build(replace(recipe, **change), 5)
        monkeypatch.setattr(common, "read_state", lambda path: {"stage2.cls_token": torch.zeros(1)})
        with pytest.raises(ValueError, match="FILE does not fit CvT.*missing"):
            m.build(recipe, 5)


def test_a_whole_m2former_is_loaded_at_another_size_and_other_files_are_refused_by_name(tmp_path):
    trained, path = tiny(9), str(tmp_path / "w.bin")
    torch.save({"model": trained.state_dict()}, path)
    model = m.build(replace(TINY, weights=path, image_size=(96, 128)), 5)
    for part in ("msca", "ctt"):
        assert_close(getattr(model, part).state_dict(), getattr(trained, part).state_dict(), rtol=0, atol=0)
    ours, theirs = (x.backbone.blocks[0].attn.rel_pos_w for x in (model, trained))
    assert_close(ours, m.resize_rel_pos(theirs, 63))
    for state, change, said in (
        (trained.state_dict(), {"ctt": "mlp1"}, "ctt.0.0.weight"),
        (trained.state_dict() | {"backbone.blocks.0.attn.rel_pos_h": torch.zeros(0, 16)}, {}, "rel_pos_h"),
        (m.MViTv2((1, 1, 1, 1), 16, 1, (64, 64), 10).state_dict(), {}, r"blocks\.3\."),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"(?s)w\.bin does not fit.*{said}"):
            m.build(replace(TINY, weights=path, **change), 5)


def test_the_official_weights_of_each_backbone(monkeypatch):
    assert {name: url.rsplit("/", 1)[-1] for name, url in m.BACKBONES.items()} == {
        "mvitv2_tiny": "MViTv2_T_in1k.pyth", "mvitv2_small": "MViTv2_S_in1k.pyth", "mvitv2_toy": "",
        "cvt21": "", "mvitv2_base": "MViTv2_B_in21k.pyth", "mvitv2_large": "MViTv2_L_in21k.pyth",
        "swin_base": "swin_base_patch4_window12_384_22k.pth"}
    monkeypatch.setattr(common, "fetch", lambda url: f"no file of {url}")
    with torch.device("meta"), pytest.raises(FileNotFoundError, match="mvitv2_models/MViTv2_B_in21k.pyth"):
        m.build(m.CUB, 5)


@pytest.mark.parametrize("change, message", [
    ({"stages": ()}, "some of stages 1 to 4"),
    ({"stages": (4, 5)}, "--stages 5: allowed are numbers from 1 to 4"),
    ({"alpha": (0.9, 0.9, 0.9, 0.9, 1.1)}, "--alpha 1.1: allowed are numbers from 0 to 1"),
    ({"backbone": "cvt21", "stages": (4,)}, "some of stages 1 to 3"),
    ({"k": (6, 4)}, "4 numbers for --k"), ({"alpha": (0.6, 0.7)}, "5 for --alpha"),
    ({"label_smoothing": 0.1}, "--alpha"), ({"backbone": "swin_base"}, "use one of: pool"),
    ({"backbone": "cvt21", "ctt": "attach"}, "use one of: mlp2 mlp1 pool"),
    ({"weights": "default"}, "mvitv2_toy has no file to download"),
], ids=str)
def test_settings_that_do_not_fit_are_refused_with_what_to_do(change, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        m.build(replace(TINY, **change), 5)


def test_weight_decay_is_on_matrices_and_kernels_and_not_on_tokens_and_position_tables():
    model = tiny()
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    decayed, plain = m.param_groups(model, TINY)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {"weight"}
    assert all(p.ndim > 1 for p in decayed["params"])
    assert {names[id(p)] for p in plain["params"] if p.ndim > 1} == {"cls_token", "rel_pos_h", "rel_pos_w"}
