"""Facts of M2Former (arXiv:2308.02161), of MViTv2, Swin-B and CvT-21 as its backbones, and of what m2former.py promises."""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import SwinTransformer
from torchvision.models.video.mvit import MSBlockConfig, MViT

import common
import m2former as m

TINY = replace(m.RECIPES["toy"], image_size=(64, 64), weights="none")  # the toy's backbone: four stages, widths 16 to 128


def randomise(model, seed=0, scale=0.3):
    """Random weights everywhere, norms and position tables included, so that no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.dim() > 1 and "rel_pos" not in name else scale) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def tiny(seed=0, num_classes=5, **changes):
    return randomise(m.M2Former(replace(TINY, **changes), num_classes), seed)


def photos(B=2, H=64, W=64, seed=0):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed))


def token_lists(B=3, lengths=(6, 5, 4, 3), dims=(8, 16, 24, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, c, generator=generator) for n, c in zip(lengths, dims)]


# ------------------------------------------------------------------------------------------------ MViTv2


def torchvision_mvit(ours, depths, dim, heads, side, num_classes):
    """torchvision's video MViT at T = 1 with our weights; its time tables are zero."""
    config, kv, width = [], 4, dim
    for stage, depth in enumerate(depths):
        kv = kv if stage == 0 else max(1, kv // 2)
        for b in range(depth):
            s, out = (2 if stage and b == 0 else 1), dim * 2**stage
            config.append(MSBlockConfig(heads * 2**stage, width, out, [1, 3, 3], [1, 3, 3], [1, s, s], [1, kv, kv]))
            width = out
    with torch.device("meta"):
        theirs = MViT((side, side), 1, config, True, False, True, True, 0.0, num_classes=num_classes,
                      norm_layer=partial(nn.LayerNorm, eps=1e-6), patch_embed_kernel=(1, 7, 7), patch_embed_stride=(1, 4, 4), patch_embed_padding=(0, 3, 3))
    state = {}
    for name, tensor in ours.state_dict().items():
        if name == "cls_token":
            name, tensor = "pos_encoding.class_token", tensor.flatten()
        elif name.endswith((".pool_q.weight", ".pool_k.weight", ".pool_v.weight")):
            name, tensor = name.replace(".weight", ".pool.weight"), tensor.unsqueeze(2)
        elif name.startswith("patch_embed.proj"):
            name, tensor = name.replace("patch_embed.proj", "conv_proj"), tensor.unsqueeze(2) if tensor.dim() == 4 else tensor
        else:
            for a, b in ((".norm_q.", ".pool_q.norm_act.0."), (".norm_k.", ".pool_k.norm_act.0."), (".norm_v.", ".pool_v.norm_act.0."), (".attn.proj.", ".attn.project.0."),
                         (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.3."), ("head.projection.", "head.1.")):
                name = name.replace(a, b)
            if name.startswith("blocks.") and name.split(".")[2] == "proj":
                name = name.replace(".proj.", ".project.")
        state[name] = tensor
    own = theirs.state_dict()
    state |= {name: torch.zeros(tensor.shape) for name, tensor in own.items() if name.endswith("rel_pos_t")}
    theirs.load_state_dict(state, assign=True)
    return theirs.eval()


@pytest.mark.parametrize("attention", ["folded", "chunked", "explicit"])
@pytest.mark.parametrize("depths, dim, heads, side", [((2, 1, 2, 1), 16, 1, 64), ((1, 2, 1, 2), 24, 2, 96)])
def test_mvitv2_equals_torchvisions_video_mvit_on_one_frame(depths, dim, heads, side, attention):
    ours = randomise(m.MViTv2(depths, dim, heads, side, 7, True, 0.0, attention))
    theirs = torchvision_mvit(ours, depths, dim, heads, side, 7)
    images = photos(2, side, side)
    torch.testing.assert_close(ours(images), theirs(images[:, :, None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant, side", [("tiny", 448), ("small", 224), ("base", 224)])
def test_the_published_sizes_equal_torchvisions_class(variant, side):
    depths, dim, heads, _ = m.VARIANTS[variant]
    with torch.device("meta"):
        ours = m.mvitv2(variant, side, 5)
    ours = randomise(ours.to_empty(device="cpu"), scale=0.1)
    with torch.no_grad():
        images = photos(1, side, side)
        torch.testing.assert_close(ours(images), torchvision_mvit(ours, depths, dim, heads, side, 5)(images[:, :, None]), atol=1e-5, rtol=1e-5)


def test_resized_position_tables_equal_torchvisions():
    """Weights for 64 px in torchvision, whose forward resizes its tables at 128 px, and in our 128 px model with the tables resized beforehand."""
    depths, dim, heads = (1, 1, 2, 1), 16, 1
    small, large = randomise(m.MViTv2(depths, dim, heads, 64, 5)), m.MViTv2(depths, dim, heads, 128, 5).eval()
    theirs = torchvision_mvit(small, depths, dim, heads, 64, 5)
    theirs.pos_encoding.spatial_size = (32, 32)
    large.load_state_dict(m.fit_positions(small.state_dict(), large.state_dict(), "interpolate"))
    images = photos(2, 128, 128)
    torch.testing.assert_close(large(images), theirs(images[:, :, None]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small(images), large(images), atol=1e-5, rtol=1e-5)  # our forward resizes too


def test_a_resized_table_keeps_its_ends_its_order_and_a_straight_line():
    line = torch.arange(13.0)[:, None].repeat(1, 3)
    assert m.resize_rel_pos(line, 13) is line
    wide = m.resize_rel_pos(line, 27)
    assert wide.shape == (27, 3) and wide[0, 0] == 0 and wide[-1, 0] == 12 and wide[13, 0] == 6
    torch.testing.assert_close(wide[2:25].diff(dim=0), torch.full((22, 3), 13 / 27))


GRIDS = [((4, 4), (4, 4)), ((8, 8), (2, 2)), ((3, 5), (6, 10)), ((6, 4), (3, 7)), ((5, 1), (2, 3))]


def attention_inputs(q_grid, k_grid, class_token, B=2, h=2, d=6, dtype=torch.float64):
    torch.manual_seed(0)
    n, k = q_grid[0] * q_grid[1] + class_token, k_grid[0] * k_grid[1] + class_token
    tables = [torch.randn(2 * max(a, b) - 1, d, dtype=dtype) for a, b in zip(q_grid, k_grid)]
    return [t.requires_grad_() for t in (torch.randn(B, h, n, d, dtype=dtype), torch.randn(B, h, k, d, dtype=dtype), torch.randn(B, h, k, d, dtype=dtype), *tables)]


@pytest.mark.parametrize("attend, chunk", [(m.attend_folded, 0), (m.attend_chunked, 2**18), (m.attend_chunked, 40)])
@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize("q_grid, k_grid", GRIDS)
def test_folded_and_chunked_attention_equal_the_explicit_one_in_value_and_every_gradient(q_grid, k_grid, class_token, attend, chunk, monkeypatch):
    monkeypatch.setattr(m, "CHUNK", chunk)
    inputs = attention_inputs(q_grid, k_grid, class_token)
    results = []
    for form in (attend, m.attend_explicit):
        q, k, v, *tables = inputs
        out = form(q, k, v, tables, q_grid, k_grid)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for one, explicit in zip(*results):
        torch.testing.assert_close(one, explicit, atol=1e-10, rtol=1e-10)
        assert one.abs().sum() > 0


def test_chunked_attention_in_bf16_is_as_near_to_fp32_as_the_explicit_one():
    q, k, v, *tables = (t.detach() for t in attention_inputs((6, 5), (3, 5), 1, d=16, dtype=torch.float32))
    exact, errors = m.attend_explicit(q, k, v, tables, (6, 5), (3, 5)), {}
    for form in (m.attend_chunked, m.attend_explicit):
        x = [t.bfloat16().requires_grad_() for t in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16):
            out = form(*x, tables, (6, 5), (3, 5))
        out.float().sum().backward()
        assert all(t.grad.dtype == torch.bfloat16 and t.grad.isfinite().all() for t in x)
        errors[form] = (out.float() - exact).abs().mean()
    assert errors[m.attend_chunked] < 1.2 * errors[m.attend_explicit]


def test_auto_is_chunked_on_a_cpu_once_a_heads_scores_leave_its_cache_and_explicit_before(monkeypatch):
    called = []
    for name in ("attend_chunked", "attend_explicit", "attend_folded"):
        monkeypatch.setattr(m, name, lambda *a, name=name: called.append(name))
    q, k, v, *tables = attention_inputs((4, 4), (4, 4), 0)
    monkeypatch.setattr(m, "CHUNK", 16 * 16)
    m.attend_auto(q, k, v, tables, (4, 4), (4, 4))
    monkeypatch.setattr(m, "CHUNK", 16 * 16 - 1)
    m.attend_auto(q, k, v, tables, (4, 4), (4, 4))
    m.attend_auto(q.to("meta"), k.to("meta"), v, tables, (4, 4), (4, 4))
    assert called == ["attend_explicit", "attend_chunked", "attend_folded"]


@pytest.mark.parametrize("q_grid, k_grid", GRIDS)
def test_explicit_attention_is_softmax_of_scaled_products_plus_the_unscaled_queries_times_both_tables(q_grid, k_grid):
    """Pair by pair; the class token's row and column carry no bias."""
    q, k, v, rows, columns = (t.detach() for t in attention_inputs(q_grid, k_grid, 1, B=1, h=1))
    scores = torch.empty(q.shape[2], k.shape[2], dtype=q.dtype)

    def entry(table, a, b, queries, keys):
        return table[int(a * max(keys / queries, 1.0) - b * max(queries / keys, 1.0) + (keys - 1) * max(queries / keys, 1.0))]

    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            scores[i, j] = q[0, 0, i] @ k[0, 0, j] / math.sqrt(q.shape[-1])
            if i and j:
                (y, x), (r, c) = divmod(i - 1, q_grid[1]), divmod(j - 1, k_grid[1])
                scores[i, j] += q[0, 0, i] @ entry(rows, y, r, q_grid[0], k_grid[0]) + q[0, 0, i] @ entry(columns, x, c, q_grid[1], k_grid[1])
    torch.testing.assert_close(m.attend_explicit(q, k, v, (rows, columns), q_grid, k_grid)[0, 0], scores.softmax(1) @ v[0, 0])


def test_the_class_token_gets_no_relative_position_and_no_residual_pooling():
    attn = m.PoolingAttention(16, 16, 2, 1, 2, (4, 6), "folded")
    attn.proj = nn.Identity()
    randomise(attn)
    x = torch.randn(2, 25, 16)
    before, grid = attn(x, (4, 6))
    assert grid == (4, 6)
    q, k, v = (attn.pool(t, (4, 6), conv, norm)[0] for t, conv, norm in zip(attn.qkv(x).chunk(3, -1), (attn.pool_q, attn.pool_k, attn.pool_v), (attn.norm_q, attn.norm_k, attn.norm_v)))
    plain = ((q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(before[:, :1], plain)  # attn v and nothing else
    with torch.no_grad():
        attn.rel_pos_h += 1
    after, _ = attn(x, (4, 6))
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert (after[:, 1:] - before[:, 1:]).abs().max() > 1e-3


def test_one_kernel_is_shared_by_all_stage_heads_a_block():
    attn = randomise(m.PoolingAttention(12, 12, 3, 2, 1, (5, 7), "folded"))
    x = torch.randn(2, 1 + 35, 12)
    pooled, grid = attn.pool(x, (5, 7), attn.pool_q, attn.norm_q)
    assert grid == (3, 4) and pooled.shape == (2, 3, 13, 4)
    for head in range(3):
        maps = attn.pool_q(x[:, 1:, head * 4:head * 4 + 4].transpose(1, 2).reshape(2, 4, 5, 7)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(pooled[:, head, 1:], attn.norm_q(maps))
        torch.testing.assert_close(pooled[:, head, 0], attn.norm_q(x[:, 0, head * 4:head * 4 + 4]))


def test_parameter_counts_of_mvitv2_are_the_published_ones():
    with torch.device("meta"):
        count = lambda *args: sum(p.numel() for p in m.mvitv2(*args).parameters())
        assert [count(v, 224, 1000, False) for v in ("tiny", "small", "base", "large", "large_in1k")] == [24_173_320, 34_870_216, 51_472_744, 213_635_368, 217_992_952]
        assert count("base", 224, 1000, True) == 51_472_744 + 96
        assert count("base", 224, 19168, True) == 65_444_032 and count("large", 224, 19168, True) == 234_583_216
        assert count("base", 448, 0, True) == 50_881_248 - 1536  # without final norm


def test_parameter_counts_of_m2former_are_those_of_the_authors_model():
    with torch.device("meta"):
        model = m.M2Former(replace(m.CUB, weights="none"), 200)
        count = lambda module: sum(p.numel() for p in module.parameters())
        assert count(model) == 65_674_936 and count(m.M2Former(replace(m.CUB, weights="none"), 555)) == 66_699_111
        assert [count(c) for c in model.ctt] == [166_560, 369_984, 887_424, 0]
        assert count(model.msca[0].cca) == 2_077_200 and count(model.msca[0]) - count(model.msca[0].cca) == 10_714_176
        assert count(model.stage_heads) + count(model.head_con) == 577_000 and count(model.norms) == 2_880
        assert [tuple(block.attn.rel_pos_h.shape) for block in (model.backbone.blocks[b] for b in (0, 2, 5, 6, 21, 22))] == [(n, 96) for n in (223, 111, 111, 55, 55, 27)]


def test_parameter_counts_of_the_other_backbones():
    with torch.device("meta"):
        count = lambda module: sum(p.numel() for p in module.parameters())
        assert count(m.CvT(1000)) == 31_622_696 and count(m.SwinB(1000)) == 87_903_584
        models = [m.M2Former(replace(m.CUB, weights="none", **change), 200) for change in (m.CVT, m.SWIN)]
        assert [(count(x.msca[0].cca), count(x.msca[0]) - count(x.msca[0].cca), count(x.ctt)) for x in models] == [(411_200, 2_500_224, 280_320), (3_691_200, 19_036_928, 0)]


@pytest.mark.parametrize("variant, class_token", [("base", True), ("base", False), ("tiny", True), ("large_in1k", False)])
def test_state_dict_keys_are_the_official_ones(variant, class_token):
    depths = m.VARIANTS[variant][0]
    expected = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias"} | ({"cls_token"} if class_token else set())
    widened = {sum(depths[:s]) - (variant == "large_in1k") for s in (1, 2, 3)}  # first blocks of stages; with expansion in the MLP the last ones before
    for n in range(sum(depths)):
        expected |= {f"blocks.{n}.{layer}.{kind}" for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "attn.norm_q", "attn.norm_k", "attn.norm_v", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")}
        expected |= {f"blocks.{n}.attn.{name}" for name in ("pool_q.weight", "pool_k.weight", "pool_v.weight", "rel_pos_h", "rel_pos_w")}
        expected |= {f"blocks.{n}.proj.{kind}" for kind in ("weight", "bias")} if n in widened else set()
    with torch.device("meta"):
        assert set(m.mvitv2(variant, 224, 1000, class_token).state_dict()) == expected
        if variant == "base" and class_token:
            whole = {name.removeprefix("backbone.") for name in m.M2Former(replace(m.CUB, weights="none"), 200).state_dict() if name.startswith("backbone.")}
            assert whole == {name for name in expected if not name.startswith(("norm.", "head."))}


def test_multiply_accumulates_are_the_published_ones():
    with torch.device("meta"):
        macs = lambda model, side: common.count_macs(model.eval(), torch.zeros(1, 3, side, side)) / 1e9
        assert macs(m.M2Former(replace(m.CUB, weights="none", attention="explicit"), 200), 448) == pytest.approx(55.15, abs=0.005)
        assert macs(m.mvitv2("tiny", 224, 1000, True, attention="explicit"), 224) == pytest.approx(4.70, abs=0.005)
        assert macs(m.CvT(1000), 448) == pytest.approx(36.65, abs=0.005)


def test_strides_drop_path_and_taps_of_mvitv2_base_at_448():
    with torch.device("meta"):
        model = m.mvitv2("base", 448, 10)
        taps = model.stages(torch.zeros(2, 3, 448, 448))
    assert [tuple(maps.shape) for maps, _ in taps] == [(2, 96, 112, 112), (2, 192, 56, 56), (2, 384, 28, 28), (2, 768, 14, 14)]
    assert [tuple(class_token.shape) for _, class_token in taps] == [(2, 96), (2, 192), (2, 384), (2, 768)]
    assert [b for b, block in enumerate(model.blocks) if block.attn.pool_q.stride == (2, 2)] == [2, 5, 21]
    assert [block.attn.pool_k.stride[0] for block in model.blocks] == [4] * 2 + [2] * 3 + [1] * 19
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0.3 * b / 23 for b in range(24)])
    assert model.ends == [1, 4, 20, 23]


def test_drop_path_drops_whole_branches_of_an_image_in_training_only():
    block = m.Block(8, 8, 8, 2, 1, 1, (2, 2), "folded", 0.5)
    x = torch.randn(64, 5, 8)
    unchanged = (block(x, (2, 2))[0] == x).all(2).all(1).float().mean()
    assert 0.1 < unchanged < 0.45  # both branches dropped: 1/4
    assert (block.eval()(x, (2, 2))[0] != x).any(2).any(1).all()


@pytest.mark.parametrize("widen", ["attention", "mlp"])
def test_a_wider_output_comes_from_a_linear_layer_on_the_normed_input(widen):
    """With attention's and the MLP's last layers at zero only the skip path is left."""
    dim_att = 12 if widen == "attention" else 8
    block = randomise(m.Block(8, dim_att, 12, 2, 1, 1, (2, 3), "folded", 0.0))
    for layer in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(block(x, (2, 3))[0], block.proj((block.norm1 if widen == "attention" else block.norm2)(x)))


def test_widening_in_the_mlp_has_doubled_its_width_at_a_stages_end():
    with torch.device("meta"):
        model = m.MViTv2((2, 1, 2, 1), 144, 2, 64, 10, False, widen="mlp")
        taps = model.stages(torch.zeros(1, 3, 64, 64))
        assert [maps.shape[1] for maps, _ in taps] == [288, 576, 1152, 1152] == model.dims
        assert all(class_token is None for _, class_token in taps)


@pytest.mark.parametrize("H, W", [(64, 64), (96, 64), (68, 132), (84, 84), (4, 8)])
def test_any_size_that_the_patch_stride_divides_runs_and_gives_ceil_halved_grids(H, W):
    model = tiny(image_size=(96, 96))
    taps = model.backbone.stages(photos(2, H, W))
    assert [tuple(maps.shape[2:]) for maps, _ in taps] == [(math.ceil(H / s), math.ceil(W / s)) for s in (4, 8, 16, 32)]
    boxes, _ = model.where(photos(2, H, W))
    assert model(photos(2, H, W)).shape == (2, 5) and boxes[..., 2].max() <= W and boxes[..., 3].max() <= H and boxes.min() >= 0


def test_folded_and_chunked_attention_keep_no_tensor_of_queries_times_keys_for_backward():
    q_grid, k_grid = (24, 24), (20, 20)
    largest = {}
    for name, attend in (("folded", m.attend_folded), ("chunked", m.attend_chunked), ("explicit", m.attend_explicit)):
        q, k, v, *tables = attention_inputs(q_grid, k_grid, 1, B=1, h=1, d=8, dtype=torch.float32)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            attend(q, k, v, tables, q_grid, k_grid)
        largest[name] = max(sizes)
    assert largest["explicit"] >= 577 * 401 and largest["folded"] <= 577 * (8 + 40) and largest["chunked"] <= 577 * 20


# ------------------------------------------------------------------------------------------------ Swin-B and CvT-21


def test_swins_classification_path_equals_torchvisions():
    with torch.device("meta"):
        ours, theirs = m.SwinB(7), SwinTransformer([4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [12, 12], num_classes=7)
    ours = ours.to_empty(device="cpu").eval()
    for module in ours.modules():
        if hasattr(module, "define_relative_position_index"):
            module.define_relative_position_index()
    for name, p in ours.named_parameters():
        p.data.uniform_(-0.05, 0.05).add_(1.0 if p.dim() == 1 and name.endswith("weight") else 0.0)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    images = photos(1, 64, 96)
    with torch.no_grad():
        taps = ours.stages(images)
        features = ours.norm(taps[-1][0].permute(0, 2, 3, 1)).mean((1, 2))
        torch.testing.assert_close(ours.head(features), theirs.eval()(images))
    assert [tuple(maps.shape) for maps, _ in taps] == [(1, 128, 16, 24), (1, 256, 8, 12), (1, 512, 4, 6), (1, 1024, 2, 3)]


def test_microsofts_swin_names_become_torchvisions():
    with torch.device("meta"):
        own = m.SwinB(11).state_dict()
    theirs = {}
    for name, tensor in own.items():
        parts = name.split(".")
        if parts[0] == "features" and parts[1] == "0":
            name = f"patch_embed.{'proj' if parts[2] == '0' else 'norm'}.{parts[3]}"
        elif parts[0] == "features":
            i = int(parts[1]) - 1
            name = ".".join(["layers", str(i // 2), *(["blocks"] if i % 2 == 0 else ["downsample"]), *parts[2:]]).replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
        theirs[name] = tensor.unflatten(0, (144, 144)) if name.endswith("relative_position_index") else tensor
    assert "layers.2.blocks.17.mlp.fc2.weight" in theirs and "layers.0.downsample.reduction.weight" in theirs and "patch_embed.norm.bias" in theirs
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 144, 144)
    renamed = m.swin_names(theirs)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {name: tensor.shape for name, tensor in own.items()}


def test_swins_bias_table_of_another_window_is_resized_bicubically():
    name = "features.1.0.attn.relative_position_bias_table"
    row = torch.linspace(-1, 1, 13)
    state = {name: (row[:, None] + 10 * row[None]).reshape(169, 1).repeat(1, 2)}
    fitted = m.fit_positions(state, {name: torch.zeros(529, 2)}, "interpolate")[name].unflatten(0, (23, 23))
    assert fitted[11, 11].abs().max() < 1e-6 and (fitted[:, 11, 0].diff() > 0).all() and (fitted[11, :, 0].diff() > 0).all()
    assert (fitted[11, -1, 0] - 10 * fitted[-1, 11, 0]).abs() < 0.05 and torch.equal(m.fit_positions(state, {name: torch.ones(529, 2)}, "reinit")[name], torch.ones(529, 2))


def test_cvts_attention_scales_by_the_whole_width_and_the_class_token_passes_by_the_convolutions():
    attn = randomise(m.ConvAttention(12, 3))
    for bn in (attn.conv_proj_q.bn, attn.conv_proj_k.bn, attn.conv_proj_v.bn):
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    x, maps = torch.randn(1, 1 + 15, 12), None
    maps = x[:, 1:].transpose(1, 2).reshape(1, 12, 3, 5)
    q, k, v = (linear(torch.cat([x[:, :1], conv.bn(conv.conv(maps)).flatten(2).transpose(1, 2)], 1))[0]
               for conv, linear in ((attn.conv_proj_q, attn.proj_q), (attn.conv_proj_k, attn.proj_k), (attn.conv_proj_v, attn.proj_v)))
    assert len(q) == 16 and len(k) == 1 + 6
    heads = [((q[:, c] @ k[:, c].T / math.sqrt(12)).softmax(1) @ v[:, c]) for c in (slice(0, 4), slice(4, 8), slice(8, 12))]
    torch.testing.assert_close(attn(x, (3, 5))[0], attn.proj(torch.cat(heads, 1)))


def test_cvt_has_the_official_names_grids_and_a_class_token_in_its_last_stage_only():
    with torch.device("meta"):
        model = m.CvT(10)
        taps = model.stages(torch.zeros(1, 3, 448, 448))
    assert [tuple(maps.shape) for maps, _ in taps] == [(1, 64, 112, 112), (1, 192, 56, 56), (1, 384, 28, 28)]
    assert [None if t is None else tuple(t.shape) for _, t in taps] == [None, None, (1, 384)]
    names = set(model.state_dict())
    assert {"stage0.patch_embed.proj.weight", "stage1.patch_embed.norm.bias", "stage2.cls_token", "stage2.blocks.15.attn.conv_proj_q.conv.weight", "stage1.blocks.3.attn.conv_proj_v.bn.running_var",
            "stage0.blocks.0.attn.proj_k.bias", "stage2.blocks.0.attn.proj.weight", "stage1.blocks.0.mlp.fc2.bias", "norm.weight", "head.weight"} <= names
    assert [block.drop_path.p for block in model.stage2.blocks] == pytest.approx([0.1 * b / 15 for b in range(16)]) and model.stage1.blocks[3].drop_path.p == 0
    assert model.stage0.blocks[0].mlp.activation(torch.tensor(2.0)).item() == pytest.approx(2 / (1 + math.exp(-3.404)))


@pytest.mark.parametrize("change", [m.CVT, m.SWIN], ids=["cvt21", "swin_base"])
def test_m2former_runs_on_the_other_backbones(change):
    """Shapes on the meta device, at the recipe's own size."""
    recipe = replace(m.CUB, weights="none", **change)
    with torch.device("meta"):
        model = m.M2Former(recipe, 7)
        images = torch.zeros(2, 3, *recipe.image_size)
        loss, terms = model(images, torch.zeros(2, dtype=torch.long))
        boxes, scores = model.where(images)
    n = len(model.backbone.dims)
    assert list(terms) == [f"y{s + 1}" for s in range(n)] + ["con", "top1"] and loss.shape == ()
    assert boxes.shape == (2, sum(min(k, (recipe.image_size[0] // side) ** 2) for k, side in zip(recipe.k[:n], (8, 16, 32, 64))), 4) == (*scores.shape, 4)


# ------------------------------------------------------------------------------------------------ MSPS (Sec. 3.2)


def test_sec32_merging_averages_r_by_r_patches_and_what_there_is_at_an_odd_edge():
    maps = photos(2, 6, 5)
    merged = m.merge_patches(maps, 2)
    assert merged.shape == (2, 3, 3, 3)
    for y in range(3):
        for x in range(3):
            torch.testing.assert_close(merged[:, :, y, x], maps[:, :, 2 * y:2 * y + 2, 2 * x:2 * x + 2].mean((2, 3)))
    assert m.merge_patches(maps, 1).equal(maps) and m.merge_patches(maps, 3).shape == (2, 3, 2, 2)


def test_eq1_to_3_the_k_tokens_with_the_highest_channel_mean_are_gathered():
    tokens = token_lists(3, (20,), (7,))[0]
    selected, indices = m.select_patches(tokens, 6)
    for b in range(3):
        order = sorted(range(20), key=lambda j: -float(tokens[b, j].sum() / 7))
        assert indices[b].tolist() == order[:6]
        assert selected[b].equal(tokens[b, order[:6]])


def test_k_above_the_number_of_cells_selects_all_of_them():
    selected, indices = m.select_patches(token_lists(2, (5,), (4,))[0], 9)
    assert selected.shape == (2, 5, 4) and sorted(indices[0].tolist()) == [0, 1, 2, 3, 4]


def test_eq2_adding_a_constant_to_a_cells_channels_moves_it_into_the_selection():
    tokens = token_lists(1, (30,), (8,))[0]
    _, before = m.select_patches(tokens, 5)
    outsider = next(j for j in range(30) if j not in before[0])
    tokens[0, outsider] += 10
    assert m.select_patches(tokens, 5)[1][0, 0] == outsider


def test_eq3_the_gradient_of_a_selected_token_reaches_its_four_patches_with_a_quarter_each_and_no_other():
    maps = photos(1, 6, 6).requires_grad_()
    selected, indices = m.select_patches(m.merge_patches(maps, 2).flatten(2).transpose(1, 2), 2)
    (gradient,) = torch.autograd.grad(selected[0, 0].sum(), maps)
    y, x = divmod(indices[0, 0].item(), 3)
    expected = torch.zeros(6, 6)
    expected[2 * y:2 * y + 2, 2 * x:2 * x + 2] = 0.25
    torch.testing.assert_close(gradient[0, 1], expected)


def test_eq2_scores_are_taken_before_any_layer_norm_which_would_make_all_of_them_zero():
    model = tiny()
    maps, _ = model.backbone.stages(photos())[1]
    tokens = m.merge_patches(maps, 2).flatten(2).transpose(1, 2)
    assert F.layer_norm(tokens, (32,)).mean(2).abs().max() < 1e-5 < tokens.mean(2).std()
    patches, indices, columns = model.select(model.backbone.stages(photos()))[1]
    assert columns == 4 and indices.equal(tokens.mean(2).topk(4, 1).indices) and patches.equal(tokens.gather(1, indices[:, :, None].expand(-1, -1, 32)))


# ------------------------------------------------------------------------------------------------ CTT (Sec. 3.3)


def test_eq5_class_token_transfer_is_two_linear_layers_with_batch_norm_and_relu():
    ctt = randomise(m.ClassTokenTransfer(16, 6))
    ctt[1].running_mean.normal_(), ctt[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 16)
    hidden = x @ ctt[0].weight.T + ctt[0].bias
    hidden = (hidden - ctt[1].running_mean) / (ctt[1].running_var + 1e-5).sqrt() * ctt[1].weight + ctt[1].bias
    torch.testing.assert_close(ctt(x), hidden.clamp(min=0) @ ctt[3].weight.T + ctt[3].bias)
    assert ctt[0].weight.shape == (12, 16) and [name for name, _ in m.ClassTokenTransfer(16, 6, 1).named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("ctt", ["mlp2", "mlp1", "attach", "pool"])
def test_table7_where_the_class_token_of_a_stage_comes_from(ctt):
    model = tiny(ctt=ctt)
    taps = model.backbone.stages(photos())
    selected = model.select(taps)
    tokens = model.with_class_tokens(taps, selected)
    if ctt == "pool":
        assert all(t.equal(p) for t, (p, _, _) in zip(tokens, selected)) and model.backbone.cls_token is None
        return
    assert all(t[:, 1:].equal(p) for t, (p, _, _) in zip(tokens, selected))
    assert tokens[3][:, 0].equal(taps[3][1])  # stage 4 keeps the global token itself
    changed = [(maps, t if s == 3 else t + 1) for s, (maps, t) in enumerate(taps)]  # the class tokens of stages 1 to 3
    same = [a.equal(b) for a, b in zip(tokens, model.with_class_tokens(changed, selected))]
    assert same == ([False, False, False, True] if ctt == "attach" else [True] * 4)
    changed = [(maps, t + 1 if s == 3 else t) for s, (maps, t) in enumerate(taps)]
    same = [a.equal(b) for a, b in zip(tokens, model.with_class_tokens(changed, selected))]
    assert same == ([True, True, True, False] if ctt == "attach" else [False] * 4)


def test_global_pooling_classifies_from_the_mean_of_the_normed_tokens():
    model = tiny(ctt="pool", cca=False)
    taps = model.backbone.stages(photos())
    tokens = model.msca[0](model.with_class_tokens(taps, model.select(taps)))
    torch.testing.assert_close(model.classify(photos())["y2"], model.stage_heads[1](model.norms[1](tokens[1]).mean(1)))


# ------------------------------------------------------------------------------------------------ MSCA (Sec. 3.4)


def test_eq8_to_10_channel_cross_attention():
    tokens, cca = token_lists(), m.ChannelCrossAttention((8, 16, 24, 32))
    randomise(cca)
    gate = cca.gate
    D = torch.stack([torch.cat([t[b].sum(0) / len(t[b]) for t in tokens]) for b in range(3)])
    C = torch.sigmoid(gate[3](gate[1](gate[0](D)).clamp(min=0)))
    assert gate[0].weight.shape == (40, 80)
    for out, t, a, b in zip(cca(tokens), tokens, (0, 8, 24, 48), (8, 24, 48, 80)):
        torch.testing.assert_close(out, t * C[:, None, a:b] + t)


def test_eq10_the_gate_keeps_signs_at_most_doubles_and_ignores_the_order_of_tokens():
    tokens, cca = token_lists(), randomise(m.ChannelCrossAttention((8, 16, 24, 32)))
    for out, t in zip(cca(tokens), tokens):
        assert (out * t >= 0).all() and (out.abs() >= t.abs()).all() and (out.abs() <= 2 * t.abs()).all()
    for out, mixed in zip(cca(tokens), cca([t.flip(1) for t in tokens])):
        torch.testing.assert_close(out, mixed.flip(1))


def test_eq11_to_13_spatial_cross_attention_token_by_token_and_head_by_head():
    tokens, sca = token_lists(1), m.SpatialCrossAttention((8, 16, 24, 32), 32, heads=4)
    randomise(sca)
    project = lambda layers: [layer(t[0]) for layer, t in zip(layers, tokens)]
    K, V = torch.cat(project(sca.k)), torch.cat(project(sca.v))
    assert K.shape == (18, 32)
    for i, (out, Q) in enumerate(zip(sca(tokens), project(sca.q))):
        for j in range(len(Q)):
            heads = []
            for c in (slice(8 * h, 8 * h + 8) for h in range(4)):
                p = torch.exp(Q[j, c] @ K[:, c].T / math.sqrt(8))
                heads.append(p / p.sum() @ V[:, c])
            torch.testing.assert_close(out[0, j], sca.out[i](torch.cat(heads)))


def test_eq13_attention_rows_sum_to_one_over_all_stages_and_give_the_output():
    tokens, sca = token_lists(), randomise(m.SpatialCrossAttention((8, 16, 24, 32), 32))
    weights = sca.weights(tokens)
    assert weights.shape == (3, 8, 18, 18)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8, 18))
    (v,) = sca.project(sca.v, tokens)
    mixed = (weights @ v).transpose(1, 2).flatten(2).split((6, 5, 4, 3), 1)
    for out, layer, a in zip(sca(tokens), sca.out, mixed):
        torch.testing.assert_close(out, layer(a))


@pytest.mark.parametrize("across", [True, False])
def test_sec342_stages_hear_of_each_other_only_with_sca(across):
    tokens, block = token_lists(), randomise(m.CrossScaleBlock((8, 16, 24, 32), 32, cca=False, sca=across))
    changed = [tokens[0], tokens[1], tokens[2] + torch.randn(3, 4, 24), tokens[3]]
    same = [torch.allclose(a, b) for a, b in zip(block(tokens), block(changed))]
    assert same == ([False] * 4 if across else [True, True, False, True])


def test_the_order_of_selected_patches_does_not_matter_to_class_tokens():
    tokens, block = token_lists(), randomise(m.CrossScaleBlock((8, 16, 24, 32), 32))
    order = [0, 3, 1, 5, 4, 2]
    out, mixed = block(tokens), block([tokens[0][:, order], *tokens[1:]])
    torch.testing.assert_close(mixed[0], out[0][:, order])
    for a, b in zip(out[1:], mixed[1:]):
        torch.testing.assert_close(a, b)


def test_eq7_a_block_is_cca_then_sca_and_an_ffn_with_pre_norms_and_residuals():
    tokens, block = token_lists(), randomise(m.CrossScaleBlock((8, 16, 24, 32), 32))
    y = block.cca(tokens)
    a = [t + o for t, o in zip(y, block.sca([block.norm_attn[i](t) for i, t in enumerate(y)]))]
    for i, (out, t) in enumerate(zip(block(tokens), a)):
        torch.testing.assert_close(out, t + block.ffn[i](block.norm_ffn[i](t)))
    torch.testing.assert_close(block.weights(tokens), block.sca.weights([block.norm_attn[i](t) for i, t in enumerate(y)]))


# ------------------------------------------------------------------------------------------------ loss and prediction (Sec. 3.5)


@pytest.mark.parametrize("alpha", [0.6, 0.9, 1.0])
def test_eq14_15_smoothed_cross_entropy_with_targets_that_sum_to_one(alpha):
    logits, targets, n = torch.randn(4, 6), torch.tensor([0, 5, 2, 2]), 6
    expected = 0.0
    for b in range(4):
        soft = [alpha if t == targets[b] else (1 - alpha) / (n - 1) for t in range(n)]
        assert sum(soft) == pytest.approx(1)
        expected -= sum(p * float(q) for p, q in zip(soft, logits[b].log_softmax(0))) / 4
    assert m.smooth_cross_entropy(logits, targets, alpha).item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(m.smooth_cross_entropy(logits, targets, alpha), F.cross_entropy(logits, targets, label_smoothing=(1 - alpha) * n / (n - 1)))


@pytest.mark.parametrize("n", [200, 555])
def test_eq14_at_zeroed_heads_the_loss_is_5_ln_n(n):
    model = tiny(num_classes=n)
    for head in (*model.stage_heads, model.head_con):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    assert model(photos(), torch.tensor([3, 4]))[0].item() == pytest.approx(5 * math.log(n), rel=1e-6)


def test_eq14_the_loss_is_the_sum_of_five_with_alpha_rising_from_06_to_1():
    model, targets = tiny(), torch.tensor([1, 4])
    loss, terms = model(photos(), targets)
    logits = model.heads(photos())
    assert list(terms) == ["y1", "y2", "y3", "y4", "con", "top1"] and not any(t.requires_grad for t in terms.values())
    for name, alpha in zip(("y1", "y2", "y3", "y4", "con"), (0.6, 0.7, 0.8, 0.9, 1.0)):
        torch.testing.assert_close(terms[name], m.smooth_cross_entropy(logits[name], targets, alpha))
    torch.testing.assert_close(loss, sum(terms[name] for name in list(terms)[:5]))
    assert terms["top1"] == (logits["all"].argmax(1) == targets).float().mean()


def test_eq16_prediction_is_the_highest_sum_of_the_five_probabilities():
    model = tiny()
    logits = model.heads(photos(4))
    total = sum(logits[name].softmax(1) for name in ("y1", "y2", "y3", "y4", "con"))
    torch.testing.assert_close(total.sum(1), torch.full((4,), 5.0))
    torch.testing.assert_close(model(photos(4)).softmax(1), total / 5)
    torch.testing.assert_close(logits["all"], model(photos(4)))


def test_every_parameter_gets_a_gradient_from_the_summed_loss():
    model = tiny().train()
    model(photos(4), torch.tensor([0, 1, 2, 3]))[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]


def test_from_the_first_head_alone_gradients_reach_the_stem_all_transfers_and_all_keys_but_no_other_head():
    model = tiny().train()
    model.classify(photos(4))["y1"].square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert {"backbone.patch_embed.proj.weight", "ctt.0.0.weight", "ctt.1.3.weight", "ctt.2.0.weight", "stage_heads.0.weight"} <= reached
    assert {f"msca.0.sca.{kind}.{s}.weight" for kind in "kv" for s in range(4)} <= reached
    assert not reached & ({f"stage_heads.{s}.weight" for s in (1, 2, 3)} | {"head_con.weight", "msca.0.sca.out.1.weight", "norms.2.weight"})


def test_a_few_steps_learn_four_photos_by_heart():
    torch.manual_seed(0)
    model, images, targets = m.M2Former(TINY, 4).train(), photos(4), torch.arange(4)
    optimizer = torch.optim.AdamW(m.param_groups(model, TINY), lr=1e-3)
    for _ in range(15):
        loss, terms = model(images, targets)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert terms["top1"] == 1 and loss < 0.7 * 5 * math.log(4)


# ------------------------------------------------------------------------------------------------ switches


@pytest.mark.parametrize("row", [(key, name) for key in ("3", "4", "5", "7", "8") for name, _, _ in m.TABLES[key].rows], ids=" ".join)
def test_every_row_of_the_tables_runs(row):
    change = next(change for name, change, _ in m.TABLES[row[0]].rows if name == row[1]) | ({} if row[0] != "5" else {"k": (4, 3, 2, 1)})
    model = tiny(**change)
    loss, _ = model(photos(), torch.tensor([0, 1]))
    boxes, scores = model.where(photos())
    assert loss.isfinite() and model(photos()).shape == (2, 5) and scores.shape == boxes.shape[:2] and list(model.heads(photos()))


def test_table3_switches_take_their_own_weights_out_and_nothing_else():
    names = lambda **change: set(tiny(**change).state_dict())
    whole = names()
    assert names(sca=False) == names(attention="explicit") == whole
    assert whole - names(cca=False) == {name for name in whole if ".cca." in name} and not names(cca=False) - whole
    assert whole - names(ctt="attach") == {name for name in whole if name.startswith("ctt.")} and not names(ctt="attach") - whole
    assert whole - names(ctt="pool") == {name for name in whole if name.startswith("ctt.")} | {"backbone.cls_token"}
    assert names(num_msca=2) - whole == {name.replace("msca.0", "msca.1") for name in whole if name.startswith("msca.0")}


def test_table3a_without_msps_the_model_is_the_backbone_with_plain_cross_entropy():
    model, targets = tiny(msps=False), torch.tensor([1, 4])
    assert {name.removeprefix("backbone.") for name in model.state_dict()} == set(m.mvitv2("toy", 64, 5).state_dict())
    assert model(photos()).equal(model.backbone(photos())) and list(model.heads(photos())) == ["y"]
    loss, terms = model(photos(), targets)
    torch.testing.assert_close(loss, F.cross_entropy(model(photos()), targets))
    assert list(terms) == ["y", "top1"] and model.where(photos())[0].shape == (2, 12 + 4 + 2 + 1, 4)


def test_table8_fewer_stages_keep_their_own_k_and_alpha():
    model, targets = tiny(stages=(3, 4)), torch.tensor([1, 4])
    logits, (_, terms) = model.classify(photos()), model(photos(), targets)
    assert list(logits) == ["y3", "y4", "con"] and model.head_con.in_features == 64 + 128 and model.msca[0].cca.dims == [64, 128]
    torch.testing.assert_close(terms["y3"], m.smooth_cross_entropy(logits["y3"], targets, 0.8))
    assert [p.shape[1] for p, _, _ in model.select(model.backbone.stages(photos()))] == [2, 1]


def test_the_two_forms_of_attention_give_one_model():
    folded, explicit = tiny(), tiny(attention="explicit")
    torch.testing.assert_close(folded(photos(2, 64, 96)), explicit(photos(2, 64, 96)), atol=1e-5, rtol=1e-5)


def test_an_image_is_classified_the_same_alone_and_in_a_batch():
    model = tiny()
    torch.testing.assert_close(model(photos(3))[1:2], model(photos(3)[1:2]), atol=1e-5, rtol=1e-5)


def test_under_bf16_autocast_the_loss_is_fp32_and_close():
    model, targets = tiny(), torch.tensor([1, 4])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(photos(), targets)
        loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(photos(), targets)[0].item(), rel=0.05)


# ------------------------------------------------------------------------------------------------ where and figure


def test_where_gives_the_selected_cells_in_pixels_coarsest_stage_first():
    model, images = tiny(), photos(2, 96, 64)
    boxes, scores = model.where(images)
    taps, n = model.backbone.stages(images), 0
    assert boxes.shape == (2, 19, 4) and scores.shape == (2, 19)
    for s, k in ((3, 1), (2, 2), (1, 4), (0, 12)):
        side = 8 * 2**s
        maps = m.merge_patches(taps[s][0], 2)
        found = boxes[:, n:n + k]
        assert (found[..., 2] - found[..., 0]).eq(side).all() and (found[..., 3] - found[..., 1]).eq((96 - found[..., 1]).clamp(max=side)).all()
        for b in range(2):
            at = [maps[b, :, int(y) // side, int(x) // side].mean() for x, y, _, _ in found[b]]
            torch.testing.assert_close(torch.stack(at), scores[b, n:n + k])
            assert sorted(at, reverse=True) == at and min(at) == maps[b].mean(0).flatten().topk(k).values.min()
        n += k


def test_figures_5_and_6_are_one_picture_per_photo_with_a_column_for_each_stage():
    with torch.no_grad():
        whole, alone, plain = (tiny(**change).figure(photos()) for change in ({}, {"sca": False}, {"msps": False}))
    assert len(whole) == 2 and whole[0].mode == "RGB" and whole[0].width == alone[0].width > 5 * 200
    assert whole[0].height > 1.9 * alone[0].height and plain[0].size == alone[0].size  # Figure 6 needs attention across stages


def test_figures_5_and_6_tint_the_selected_patches_and_darken_the_rest():
    photo = common.to_pil(torch.zeros(3, 64, 64), "imagenet")
    painted = m.paint(photo, torch.tensor([[8.0, 16, 16, 24], [32, 32, 40, 40]]), (255, 0, 0), torch.tensor([1.0, 0.5]))
    full, half, rest = (painted.getpixel(at) for at in ((8, 16), (39, 39), (7, 16)))
    grey = photo.getpixel((0, 0))
    assert rest == tuple(int(c / 3) for c in grey) and full[0] > half[0] > rest[0] and full[0] == int(0.75 * grey[0] + 0.25 * 255)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("how", ["interpolate", "reinit"])
def test_an_official_file_fills_the_backbone_and_its_position_tables_are_resized_or_drawn_anew(how, tmp_path):
    official = randomise(m.mvitv2("toy", 32, 1000))
    state = {name: tensor.unsqueeze(2) if name.endswith("pool_q.weight") else tensor for name, tensor in official.state_dict().items()}
    torch.save({"model_state": state, "epoch": 3}, tmp_path / "MViTv2.pyth")
    model = m.build(replace(TINY, weights=str(tmp_path / "MViTv2.pyth"), rel_pos=how), 5)
    for name, tensor in model.backbone.state_dict().items():
        old = official.state_dict()[name]
        if old.shape == tensor.shape:
            assert tensor.equal(old), name
        else:
            assert "rel_pos" in name and (how == "interpolate") == torch.allclose(tensor, m.resize_rel_pos(old, len(tensor)))
    assert model.backbone.blocks[0].attn.rel_pos_h.shape == (31, 16)


def test_weights_without_a_class_token_leave_it_as_drawn_and_the_plain_backbone_keeps_its_norm(tmp_path):
    official = randomise(m.mvitv2("toy", 64, 1000, False))
    torch.save(official.state_dict(), tmp_path / "w.pyth")
    model = m.build(replace(TINY, weights=str(tmp_path / "w.pyth"), msps=False), 5)
    assert model.backbone.norm.weight.equal(official.norm.weight) and model.backbone.cls_token.abs().sum() > 0 and model.backbone.head.projection.out_features == 5
    pooled = m.build(replace(TINY, weights=str(tmp_path / "w.pyth"), ctt="pool"), 5)
    torch.testing.assert_close(pooled.backbone.stages(photos())[3][0], official.stages(photos())[3][0])


def test_a_run_of_the_plain_backbone_starts_an_m2former_or_another_plain_one(tmp_path):
    plain = tiny(num_classes=9, msps=False)
    torch.save({"model": plain.state_dict()}, tmp_path / "w.bin")
    for change in ({}, {"msps": False}):
        model = m.build(replace(TINY, weights=str(tmp_path / "w.bin"), **change), 5)
        assert all(tensor.equal(plain.state_dict()[f"backbone.{name}"]) for name, tensor in model.backbone.state_dict().items() if not name.startswith("head."))
        assert model(photos()).shape == (2, 5)


def test_a_whole_m2former_is_loaded_with_other_heads_at_another_size(tmp_path):
    trained = tiny(num_classes=9)
    torch.save({"model": trained.state_dict()}, tmp_path / "w.bin")
    model = m.build(replace(TINY, weights=str(tmp_path / "w.bin"), image_size=(96, 128)), 5)
    assert model.msca[0].sca.q[0].weight.equal(trained.msca[0].sca.q[0].weight) and model.ctt[0][1].weight.equal(trained.ctt[0][1].weight)
    torch.testing.assert_close(model.backbone.blocks[0].attn.rel_pos_w, m.resize_rel_pos(trained.backbone.blocks[0].attn.rel_pos_w, 63))
    with pytest.raises(ValueError, match="missing.*unexpected"):
        m.build(replace(TINY, weights=str(tmp_path / "w.bin"), ctt="mlp1"), 5)


def test_a_checkpoint_of_another_variant_is_refused_with_the_keys_that_do_not_fit(tmp_path):
    torch.save(m.MViTv2((1, 1, 1, 1), 16, 1, 64, 10).state_dict(), tmp_path / "w.pyth")
    with pytest.raises(ValueError, match=r"does not fit MViTv2: missing .*blocks\.4\."):
        m.build(replace(TINY, weights=str(tmp_path / "w.pyth")), 5)


# ------------------------------------------------------------------------------------------------ recipe and errors


def test_the_recipe_is_that_of_sec42_and_the_authors_code():
    for r in (m.RECIPES["cub"], m.RECIPES["nabirds"]):
        assert (r.backbone, r.image_size, r.resize, r.crop, r.hflip, r.batch_size, r.iterations) == ("mvitv2_base", (448, 448), (600, 600), "random", 0.5, 16, 10_000)
        assert (r.optimizer, r.lr, r.momentum, r.weight_decay, r.schedule, r.warmup, r.grad_clip, r.drop_path) == ("sgd", 0.03, 0.9, 0.0, "cosine", 500, 1.0, 0.3)
        assert (r.k, r.merge, r.num_msca, r.ctt, r.stages, r.alpha, r.weights, r.amp) == ((162, 54, 18, 6), 2, 1, "mlp2", (1, 2, 3, 4), (0.6, 0.7, 0.8, 0.9, 1.0), "default", "off")
    lr = [common.lr_at(m.CUB, step, 10_000, 374) for step in (0, 250, 500, 5250, 10_000)]
    assert lr == pytest.approx([0, 0.015, 0.03, 0.015, 0], abs=1e-12)
    assert {"toy", "folder"} <= set(m.RECIPES)


def test_the_tables_hold_the_papers_numbers():
    numbers = {key: [value for _, _, value in table.rows] for key, table in m.TABLES.items() if key != "toy"}
    assert numbers == {"baseline": [91.6, 92.4], "1": [92.4], "2": [91.1], "3": [91.6, 91.6, 92.1, 92.2, 92.1, 92.4], "4": [92.4, 92.1, 92.2, 92.2], "5": [92.2, 92.2, 92.4, 92.1],
                       "6": [89.3, 90.0, 90.6, 91.3], "7": [91.5, 91.9, 92.1, 92.4], "8": [91.6, 91.5, 91.9, 92.3, 92.4]}
    assert [change["k"] for _, change, _ in m.TABLES["5"].rows] == [(12, 10, 8, 6), (48, 24, 12, 6), (162, 54, 18, 6), (448, 112, 28, 7)]
    assert all(table.data in m.RECIPES for table in m.TABLES.values())


@pytest.mark.parametrize("change", [{}, {"msps": False}, {"ctt": "pool"}])
def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay(change):
    model = tiny(**change)
    decayed, plain = m.param_groups(model, replace(TINY, weight_decay=0.1))
    assert sorted(map(id, decayed["params"] + plain["params"])) == sorted(map(id, model.parameters()))
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0 and all(p.dim() > 1 for p in decayed["params"])
    assert any(p is model.backbone.blocks[0].attn.rel_pos_h for p in plain["params"])


@pytest.mark.parametrize("change, message", [
    ({"image_size": (62, 64)}, "multiples of 4; try 60x64"),
    ({"backbone": "resnet50"}, "choose one of mvitv2_tiny"),
    ({"stages": (5,)}, "give some of 1..4"),
    ({"stages": (3, 2)}, "rising order"),
    ({"k": (6, 4)}, "has 4 stages and needs as many"),
    ({"k": (6, 4, 2, 0)}, "at least 1"),
    ({"alpha": (0.6, 0.7)}, "needs 5 values"),
    ({"num_msca": 0}, "--no-msps"),
    ({"label_smoothing": 0.1}, "--alpha"),
    ({"task": "reid"}, "--task classify"),
    ({"backbone": "swin_base"}, "no class token; use --ctt pool"),
    ({"backbone": "cvt21", "ctt": "attach"}, "in its last stage only; use mlp2, mlp1 or pool"),
])
def test_settings_that_do_not_fit_are_refused_with_what_to_do(change, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        m.M2Former(replace(TINY, **change), 5)


def test_other_bad_input_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny()(photos(1, 63, 64))
    with pytest.raises(ValueError, match="at least two; raise --batch-size"):
        tiny().train()(photos(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="at least two classes"):
        m.M2Former(TINY, 1)
    with pytest.raises(ValueError, match="no official weights"):
        with torch.device("meta"):
            m.load_weights(None, replace(TINY, backbone="cvt21", weights="default"))
    with pytest.raises(ValueError, match="unknown MViTv2 'giant'; allowed: tiny"):
        m.mvitv2("giant", 224, 10)


def test_k_above_the_number_of_cells_is_said_once_when_the_model_is_built():
    with pytest.warns(UserWarning, match=r"stage 4 has 1 cells of 64 px, not --k 6") as said:
        model = m.build(replace(TINY, k=(64, 16, 4, 6)), 5)
    assert len(said) == 1 and model.where(photos())[0].shape == (2, 64 + 16 + 4 + 1, 4)
