"""What the method files share: the recipe and its flags, schedules, checkpoints, pictures, and the ViT against torchvision's."""
import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common

# ------------------------------------------------------------------------------------------------ the plain ViT and attention rollout


def small_vit(**changes):
    """A ViT of 32 x 32 images with patches of 8, its weights large enough to matter."""
    model = common.VisionTransformer(**{**dict(image_size=(32, 32), patch_size=8, dim=32, depth=3, heads=4, num_classes=5), **changes}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def as_google(model):
    """The arrays of a Google .npz with the weights of a VisionTransformer (the inverse of what the loader does, by hand)."""
    out, C = {}, model.cls_token.shape[-1]
    put = lambda key, value: out.__setitem__(key, value.detach().contiguous().numpy())
    put("cls", model.cls_token), put("Transformer/posembed_input/pos_embedding", model.pos_embed)
    put("embedding/kernel", model.patch_embed.proj.weight.permute(2, 3, 1, 0)), put("embedding/bias", model.patch_embed.proj.bias)
    put("Transformer/encoder_norm/scale", model.norm.weight), put("Transformer/encoder_norm/bias", model.norm.bias)
    for i, block in enumerate(model.blocks):
        at, h = f"Transformer/encoderblock_{i}/", block.attn.heads
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            put(f"{at}{name}/scale", norm.weight), put(f"{at}{name}/bias", norm.bias)
        for j, name in enumerate(("query", "key", "value")):
            put(f"{at}MultiHeadDotProductAttention_1/{name}/kernel", block.attn.qkv.weight[j * C : (j + 1) * C].T.reshape(C, h, C // h))
            put(f"{at}MultiHeadDotProductAttention_1/{name}/bias", block.attn.qkv.bias[j * C : (j + 1) * C].reshape(h, C // h))
        put(f"{at}MultiHeadDotProductAttention_1/out/kernel", block.attn.proj.weight.T.reshape(h, C // h, C))
        put(f"{at}MultiHeadDotProductAttention_1/out/bias", block.attn.proj.bias)
        for name, layer in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            put(f"{at}MlpBlock_3/{name}/kernel", layer.weight.T), put(f"{at}MlpBlock_3/{name}/bias", layer.bias)
    put("head/kernel", torch.zeros(C, 21843)), put("head/bias", torch.zeros(21843))
    put("pre_logits/kernel", torch.zeros(C, C)), put("pre_logits/bias", torch.zeros(C))
    return out


def test_the_vit_equals_torchvisions_with_the_same_weights(tmp_path):
    theirs = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=128, num_classes=5).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    ours = small_vit()
    common.load_vit(ours, tmp_path / "vit_b_16.pth")
    ours.head.load_state_dict(theirs.heads.head.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert theirs(images).std() > 0.1
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
    old = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in theirs.state_dict().items()}  # files before torchvision 0.12
    torch.save(old, tmp_path / "old.pth")
    again = small_vit()
    common.load_vit(again, tmp_path / "old.pth")
    assert torch.equal(again.features(images), ours.features(images))


def test_the_keys_and_shapes_of_the_full_size_vit_are_those_of_torchvisions_vit_b_16():
    with torch.device("meta"):
        ours, theirs = common.vit("vit_base", (224, 224)), torchvision.models.vit_b_16()
    mapped = common.vit_state(theirs.state_dict())
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in ours.state_dict().items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_google_npz_and_a_deit_pth_load_to_the_same_function(tmp_path, wrapped):
    source, images = small_vit(), torch.randn(2, 3, 32, 32)
    arrays = {("params/" if wrapped else "") + k: v for k, v in as_google(source).items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    torch.save({"model": source.state_dict()} if wrapped else source.state_dict(), tmp_path / "deit.pth")
    for file in ("weights.npz", "deit.pth"):
        model = small_vit(num_classes=7)
        head = model.head.weight.clone()
        common.load_vit(model, str(tmp_path / file))
        assert torch.equal(model.features(images), source.features(images)) and torch.equal(model.norm.weight, source.norm.weight)
        assert torch.equal(model.head.weight, head)


def test_a_distilled_deit_loses_its_second_token_and_a_model_of_ours_gives_its_vit(tmp_path):
    source, images = small_vit(), torch.randn(2, 3, 32, 32)
    state = source.state_dict()
    pos = state["pos_embed"]
    distilled = state | {"pos_embed": torch.cat([pos[:, :1], torch.randn(1, 1, 32), pos[:, 1:]], 1), "dist_token": torch.randn(1, 1, 32), "head_dist.weight": torch.zeros(5, 32), "head_dist.bias": torch.zeros(5)}
    torch.save({"model": distilled}, tmp_path / "distilled.pth")
    common.save_checkpoint(tmp_path / "last.pt", {"model": {f"vit.{k}": v for k, v in state.items()} | {"log_vars": torch.zeros(3)}, "ema": {}})
    for file in ("distilled.pth", ""):
        model = small_vit()
        held = common.load_vit(model, tmp_path / file)
        assert torch.equal(model.features(images), source.features(images))
        assert ("log_vars" in held) == (file == "")


def test_what_is_missing_or_unexpected_in_a_vits_file_is_listed(tmp_path):
    state = small_vit().state_dict()
    del state["blocks.1.attn.proj.bias"]
    torch.save(state | {"blocks.9.norm1.weight": torch.ones(32)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"missing \['blocks.1.attn.proj.bias'\].*unexpected \['blocks.9.norm1.weight'\]"):
        common.load_vit(small_vit(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="no official weights"):
        common.load_vit(small_vit(), "default")
    headless = small_vit()
    headless.norm = nn.Identity()  # a method with its own final norm
    torch.save(small_vit().state_dict(), tmp_path / "whole.pth")
    common.load_vit(headless, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="backbone 'vit_huge' is unknown"):
        common.vit("vit_huge", (224, 224))


def test_official_files_are_fetched_from_their_urls_and_checked_where_the_name_holds_a_hash(monkeypatch, tmp_path):
    asked = []

    def fetch(url, sha256=""):
        asked.append((url.rsplit("/", 1)[-1], sha256))
        return tmp_path / "none.pth"

    monkeypatch.setattr(common, "fetch", fetch)
    for name in common.VITS:
        with torch.device("meta"):
            model = common.vit(name, (64, 64))
        with pytest.raises((FileNotFoundError, ValueError)):
            common.load_vit(model, "default")
    assert asked == [("deit_tiny_patch16_224-a1311bcf.pth", "a1311bcf"), ("deit_small_patch16_224-cd65a155.pth", "cd65a155"), ("deit_base_patch16_224-b5f2ef4d.pth", "b5f2ef4d"), ("ViT-B_16.npz", ""), ("R50%2BViT-B_16.npz", "")]


def test_position_embeddings_of_equal_size_stay_and_others_keep_the_class_row_and_the_order_of_rows():
    pos = torch.randn(1, 17, 6)
    assert common.resize_pos_embed(pos, (4, 4), "bicubic") is pos
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ramp = torch.cat([torch.tensor([[[9.0, 9.0]]]), torch.stack([y, x], -1).reshape(1, 16, 2)], 1)  # embedding = (row, column)
    for mode in ("bilinear", "bicubic"):
        out = common.resize_pos_embed(ramp, (16, 8), mode)
        assert out.shape == (1, 129, 2) and out[0, 0].tolist() == [9.0, 9.0]
        grid = out[0, 1:].reshape(16, 8, 2)  # row-major: 16 rows of 8
        assert (grid[..., 0].diff(dim=0)[2:-2] > 0).all() and (grid[..., 1].diff(dim=1)[:, 1:-1] > 0).all()
        torch.testing.assert_close(grid[..., 0], grid[:, :1, 0].expand(16, 8), rtol=0, atol=1e-5)
        torch.testing.assert_close(grid[0, 2:-2, 1], (torch.arange(8.0)[2:-2] + 0.5) / 2 - 0.5, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="12 patches are no square grid"):
        common.resize_pos_embed(torch.randn(1, 13, 6), (4, 4), "bicubic")


def test_weights_at_another_image_size_are_resized_bilinearly_from_npz_and_bicubically_from_pth(tmp_path):
    source = small_vit()
    np.savez(tmp_path / "w.npz", **as_google(source))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    for file, mode in (("w.npz", "bilinear"), ("w.pth", "bicubic")):
        model = small_vit(image_size=(64, 32))
        common.load_vit(model, tmp_path / file)
        assert model.grid == (8, 4)
        assert torch.equal(model.pos_embed, common.resize_pos_embed(source.pos_embed, (8, 4), mode))


def test_patches_are_numbered_row_by_row_on_images_that_are_not_square():
    model = small_vit(image_size=(128, 64))
    images = torch.zeros(1, 3, 128, 64)
    images[:, :, 24:32, 40:48] = 1  # row 3, column 5 of 16 x 8
    changed = (model.embed(images) - model.embed(torch.zeros_like(images))).abs().sum(2)[0]
    assert changed.nonzero().flatten().tolist() == [1 + 3 * 8 + 5]
    with pytest.raises(ValueError, match=r"images of \(64, 128\) pixels for a ViT of \(128, 64\)"):
        model(images.transpose(2, 3))
    with pytest.raises(ValueError, match="image_size 100,64 is not divisible by the patch size 8"):
        small_vit(image_size=(100, 64))


@pytest.mark.parametrize("name, pixels, parameters", [
    ("deit_tiny", 224, 5_524_416), ("deit_tiny", 448, 5_637_312), ("deit_small", 448, 21_891_456), ("vit_base", 224, 85_798_656), ("vit_base", 448, 86_250_240),
    ("r50_vit_base", 224, 97_890_112), ("r50_vit_base", 448, 98_341_696),
])
def test_vit_parameter_counts(name, pixels, parameters):
    with torch.device("meta"):
        model = common.vit(name, (pixels, pixels))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model(torch.empty(2, 3, pixels, pixels)).shape == (2, model.cls_token.shape[-1])


def test_stochastic_depth_grows_with_depth_and_drops_whole_residuals_of_an_image():
    model = small_vit(depth=5, drop_path=0.4)
    assert [b.drop_path.p for b in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block = common.Block(32, 4, drop_path=0.5).train()
    nn.init.normal_(block.mlp.fc2.weight)
    tokens = torch.randn(400, 2, 32)
    change = block(tokens) - tokens
    untouched = (change == 0).flatten(1).all(1).float().mean()
    assert 0.15 < untouched < 0.35  # both residuals dropped: a quarter of the images
    q, k, v = block.attn.split(block.norm1(tokens))
    attended = block.attn.merge(F.scaled_dot_product_attention(q, k, v))
    kept = torch.stack([torch.isclose(c, 2 * a, atol=1e-5).all() for c, a in zip(change, attended)]).float().mean()
    assert 0.15 < kept < 0.35  # attention kept and doubled, FFN dropped
    assert torch.equal(block.eval()(tokens), block(tokens))


def test_the_hybrid_stem_standardises_its_kernels_and_pads_like_tensorflow():
    conv = common.StdConv(4, 6, 3, 2)
    nn.init.normal_(conv.weight, mean=3.0, std=2.0)
    x = torch.randn(1, 4, 8, 8)
    w = conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), unbiased=False, keepdim=True) + 1e-5)
    torch.testing.assert_close(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2))  # 3x3, stride 2, even size: right and bottom only
    assert common.same_pad(torch.zeros(1, 1, 448, 448), 7, 2).shape[-2:] == (453, 453)
    one = torch.zeros(1, 1, 448, 448)
    one[..., 0, 0] = 1
    assert common.same_pad(one, 7, 2)[0, 0].nonzero().tolist() == [[2, 2]]  # two before, three after
    torch.testing.assert_close(common.StdConv(2, 2, 3)(torch.ones(1, 2, 5, 5))[..., 1:-1, 1:-1], torch.zeros(1, 2, 3, 3), rtol=0, atol=1e-4)


def test_a_bottleneck_adds_its_shortcut_before_the_last_relu():
    block = common.Bottleneck(64, 256, 2).eval()
    x = torch.randn(1, 64, 8, 8)
    y = F.relu(block.norm1(block.conv1(x)))
    y = block.norm3(block.conv3(F.relu(block.norm2(block.conv2(y)))))
    torch.testing.assert_close(block(x), F.relu(y + block.downsample["norm"](block.downsample["conv"](x))))
    assert block(x).shape == (1, 256, 4, 4) and block.norm1.eps == 1e-6 and block.norm1.num_groups == 32
    assert common.Bottleneck(256, 256, 1).downsample is None


def test_the_hybrids_npz_names_are_timms():
    with torch.device("meta"):
        model = common.vit("r50_vit_base", (64, 64))
    names = {n for n in model.state_dict() if n.startswith("patch_embed.backbone")}
    google = {"conv_root/kernel": (7, 7, 3, 64), "gn_root/scale": (1, 1, 1, 64), "gn_root/bias": (1, 1, 1, 64)}
    for b, (units, mid, inputs) in enumerate(((3, 64, 64), (4, 128, 256), (9, 256, 512)), 1):
        for u in range(1, units + 1):
            at, width = f"block{b}/unit{u}/", inputs if u == 1 else 4 * mid
            google |= {f"{at}conv1/kernel": (1, 1, width, mid), f"{at}conv2/kernel": (3, 3, mid, mid), f"{at}conv3/kernel": (1, 1, mid, 4 * mid)}
            google |= {f"{at}gn{j}/{p}": (1, 1, 1, 4 * mid if j == 3 else mid) for j in (1, 2, 3) for p in ("scale", "bias")}
            if u == 1:
                google |= {f"{at}conv_proj/kernel": (1, 1, width, 4 * mid), f"{at}gn_proj/scale": (1, 1, 1, 4 * mid), f"{at}gn_proj/bias": (1, 1, 1, 4 * mid)}
    google |= {"cls": (1, 1, 768), "embedding/kernel": (1, 1, 1024, 768), "embedding/bias": (768,)}
    mapped = common.vit_state({k: torch.empty(v, device="meta") for k, v in google.items()})
    assert names <= set(mapped)
    assert all(model.state_dict()[n].shape == v.shape for n, v in mapped.items())


# ---- rollout


def test_eq2_rollout_is_the_product_of_the_layers_with_their_residuals_deepest_on_the_left():
    first = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2]])
    second = torch.tensor([[0.6, 0.1, 0.3], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(common.rollout([first, second])[0], torch.tensor([0.5125, 0.2750, 0.2125]))
    assert not torch.allclose(common.rollout([second, first])[0], torch.tensor([0.5125, 0.2750, 0.2125]))
    e = torch.eye(3)
    torch.testing.assert_close(common.rollout([first, second]), (0.5 * second + 0.5 * e) @ (0.5 * first + 0.5 * e))


@pytest.mark.parametrize("N", [10, 300])  # 300: more rows than one slab
def test_eq2_the_class_row_as_a_chain_of_vector_products_is_row_0_of_the_matrix_product(N):
    pairs = [tuple(torch.randn(2, 2, 3, N, 4, dtype=torch.float64)) for _ in range(11)]
    attns = [common.attention_weights(q, k) for q, k in pairs]
    whole = common.rollout(attns)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, N, dtype=torch.float64))
    assert (whole >= 0).all() and whole[:, 0, 0].min() >= 0.5**11
    for layers in (attns, pairs):
        torch.testing.assert_close(common.cls_rollout(layers), whole[:, 0], rtol=0, atol=1e-15)
    for fusion in ("max", "min"):
        fused = [common.attention_weights(q, k, fusion) for q, k in pairs]
        torch.testing.assert_close(common.cls_rollout(pairs, fusion), common.rollout(fused)[:, 0], rtol=0, atol=1e-15)
        assert not torch.allclose(common.cls_rollout(pairs, fusion), whole[:, 0])


def test_eq2_limits_identity_attention_stays_at_the_class_token_and_uniform_attention_spreads():
    eye, n = torch.eye(10, dtype=torch.float64)[None], 10
    assert torch.equal(common.cls_rollout([eye] * 11), eye[:, 0])
    row = common.cls_rollout([torch.full((1, n, n), 1 / n, dtype=torch.float64)] * 11)[0]
    torch.testing.assert_close(row, torch.tensor([2**-11 + (1 - 2**-11) / n] + [(1 - 2**-11) / n] * 9, dtype=torch.float64))
    assert row[:2].tolist() == pytest.approx([0.100439, 0.099951], abs=1e-6)


def test_attention_weights_are_the_softmax_of_the_scaled_products_fused_over_the_heads():
    q, k, v = torch.randn(3, 2, 3, 6, 4, dtype=torch.float64)
    literal = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(6):
                e = [math.exp(sum(q[b, h, i, c].item() * k[b, h, j, c].item() for c in range(4)) / 2) for j in range(6)]
                literal[b, h, i] = torch.tensor(e) / sum(e)
    for fusion, fused in (("mean", literal.mean(1)), ("max", literal.amax(1)), ("min", literal.amin(1))):
        torch.testing.assert_close(common.attention_weights(q, k, fusion), fused)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), literal @ v)


@pytest.mark.parametrize("N", [6, 300])
def test_attend_gives_attention_and_weights_at_inference_and_queries_and_keys_in_training(N):
    q, k, v = torch.randn(3, 2, 3, N, 8).unbind(0)
    out, weights = common.attend(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights, common.attention_weights(q, k), rtol=1e-4, atol=1e-7)
    memory = torch.full((2, N, N), torch.nan)
    assert common.attend(q, k, v, memory)[1] is memory and torch.equal(memory, weights)
    out, (q1, k1) = common.attend(q.requires_grad_(), k, v)
    assert out.requires_grad and not q1.requires_grad and torch.equal(q1, q) and torch.equal(k1, k)


def test_the_rollout_keeps_no_attention_matrix_for_the_backward_pass():
    model, seen = small_vit(), []
    tokens = model.features(torch.randn(1, 3, 32, 32), lambda q, k: seen.append((q, k)))
    assert tokens.requires_grad and len(seen) == 3 and all(t.shape == (1, 4, 17, 8) and not t.requires_grad for pair in seen for t in pair)
    assert not common.cls_rollout(seen).requires_grad
    with torch.autocast("cpu", torch.bfloat16):  # fp32 whatever the context: bf16 would change which patches are picked
        row = common.cls_rollout([(q.bfloat16(), k.bfloat16()) for q, k in seen])
    assert row.dtype == torch.float32 and row.sum().item() == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------------------------------ official weights


def test_fetch_downloads_once_checks_the_hash_and_says_where_to_put_a_file_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "w.pth").write_bytes(b"weights")
    url = (tmp_path / "w.pth").as_uri()
    got = common.fetch(url, hashlib.sha256(b"weights").hexdigest()[:8])
    assert got.read_bytes() == b"weights" and got.parent == tmp_path / "hub" / "checkpoints"
    (tmp_path / "w.pth").unlink()
    assert common.fetch(url).read_bytes() == b"weights", "the second time nothing is read from the address"
    got.unlink()
    with pytest.raises(FileNotFoundError, match="fetch it by hand to .*w.pth, or use --weights none"):
        common.fetch(url)
    (tmp_path / "w.pth").write_bytes(b"other bytes")
    with pytest.raises(ValueError, match="not the published file .*hash"):
        common.fetch(url, hashlib.sha256(b"weights").hexdigest()[:8])
    assert not got.exists(), "what does not fit its hash is not kept"
