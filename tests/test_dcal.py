"""DCAL: each equation against a slow recomputation, what the figure implies, the recipes, and the Re-ID protocol."""
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import dcal

SWITCHES = dict(image_size=(32, 16), normalize="half", weights="none", local_ratio=0.3)


def tiny(task="classify", depth=12, classes=5, base=None, **switches):
    """A DCAL of float64 on 32 x 16 images: 8 patches in 4 rows and 2 columns, all weights large enough to matter."""
    recipe = dataclasses.replace(base or dcal.Recipe(), **{**SWITCHES, "task": task, **switches})
    vit = common.VisionTransformer(recipe.image_size, patch_size=8, dim=12, depth=depth, heads=3, drop_path=recipe.drop_path)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.3)
    model = dcal.DCAL(vit, recipe, classes).double()
    nn.init.normal_((model.head if task == "classify" else model.head.classifier).weight)
    return model


def rebuilt(model, **switches):
    """The same weights under other switches."""
    recipe = dataclasses.replace(model.recipe, **switches)
    other = dcal.DCAL(copy.deepcopy(model.vit), recipe, model.classes()).to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def batch(B=4, classes=5):
    return torch.randn(B, 3, 32, 16, dtype=torch.float64), torch.arange(B) % classes


# ------------------------------------------------------------------------------------------------ PWCA (Eq. 4)


def test_eq4_pwca_is_one_softmax_over_the_tokens_of_both_images():
    B, h, N, d = 3, 2, 4, 5
    q, k, v = torch.randn(3, B, h, N, d, dtype=torch.float64)
    partner = torch.tensor([2, 0, 1])
    out = dcal.pairwise_cross_attention(q, k, v, partner)
    for b in range(B):
        for head in range(h):
            for n in range(N):
                keys = [(k[b, head, j], v[b, head, j]) for j in range(N)] + [(k[partner[b], head, j], v[partner[b], head, j]) for j in range(N)]
                weights = torch.stack([q[b, head, n] @ key / math.sqrt(d) for key, _ in keys]).exp()
                literal = sum(w * value for w, (_, value) in zip(weights, keys)) / weights.sum()
                torch.testing.assert_close(out[b, head, n], literal)


def test_eq4_pwca_of_an_image_with_itself_is_self_attention():
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(dcal.pairwise_cross_attention(q, k, v, torch.arange(2)), F.scaled_dot_product_attention(q, k, v), rtol=0, atol=4e-13)


def test_eq4_the_pwca_stream_of_an_image_with_itself_is_the_sa_stream_at_every_block():
    model, (images, _) = tiny().eval(), batch()
    layers, pair_layers = [], []
    features = model.encode(images, torch.arange(4), layers=layers, pair_layers=pair_layers)
    assert len(layers) == len(pair_layers) == 12
    for layer, weights in zip(layers, pair_layers):  # every query's weights agree at every depth, so every token does
        own, other = weights.chunk(2, -1)
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)
        torch.testing.assert_close(own + other, common.attention_weights(*layer), rtol=0, atol=1e-12)
    torch.testing.assert_close(features["pwca"], features["sa"], rtol=0, atol=1e-11)


def test_eq4_the_order_of_the_two_images_keys_does_not_matter_and_masking_the_second_leaves_self_attention():
    q, k, v, k2, v2 = torch.randn(5, 2, 3, 7, 4, dtype=torch.float64)
    partner = torch.tensor([1, 0])
    swapped = F.scaled_dot_product_attention(q, torch.cat([k2[partner], k], 2), torch.cat([v2[partner], v], 2))
    torch.testing.assert_close(dcal.pairwise_cross_attention(q, k, v, partner, k2, v2), swapped)
    weights = torch.cat([q @ k.mT, torch.full((2, 3, 7, 7), -torch.inf, dtype=torch.float64)], -1) / 2
    torch.testing.assert_close(weights.softmax(-1) @ torch.cat([v, v2[partner]], 2), F.scaled_dot_product_attention(q, k, v))


def test_fig1_the_distractor_enters_with_its_own_self_attention_stream():
    model, (images, _) = tiny(depth=3).eval(), batch(2)
    x, blocks = model.vit.embed(images), model.vit.blocks
    p = x
    for block in blocks:  # a second image's keys and values come from its plain pass at the same depth
        q, k, v = block.attn.split(block.norm1(x))
        q1, k1, v1 = block.attn.split(block.norm1(p))
        weights = (q1 @ torch.cat([k1, k.flip(0)], 2).mT / 2).softmax(-1)  # d = 4
        p = block.finish(p, weights @ torch.cat([v1, v.flip(0)], 2))
        x = block(x)
    torch.testing.assert_close(model.encode(images, torch.tensor([1, 0]))["pwca"], model.vit.norm(p[:, 0]))


def test_sec_3_3_sa_and_glca_do_not_depend_on_the_partner_in_a_single_bit_but_pwca_does():
    model, (images, _) = tiny().eval(), batch()
    a, b = (model.encode(images, torch.tensor(p)) for p in ([1, 2, 3, 0], [3, 0, 1, 2]))
    assert torch.equal(a["sa"], b["sa"]) and torch.equal(a["glca"], b["glca"])
    assert not torch.allclose(a["pwca"], b["pwca"])


def test_sec_3_3_permuting_images_and_pairs_together_permutes_the_outputs():
    model, (images, _) = tiny(glca_readout="mean").eval(), batch()
    partner, order = torch.tensor([2, 3, 1, 0]), torch.tensor([3, 1, 0, 2])
    a = model.encode(images, partner)
    b = model.encode(images[order], torch.argsort(order)[partner[order]])
    for name in dcal.BRANCHES:
        torch.testing.assert_close(b[name], a[name][order])


def test_sec_3_3_gradient_flows_into_the_distractor():
    model, (images, _) = tiny(depth=2), batch(2)
    images.requires_grad_()
    model.encode(images, torch.tensor([1, 0]))["pwca"][0].sum().backward()
    assert images.grad[1].abs().sum() > 0


def test_fig2_without_pwca_blocks_there_is_no_pwca_loss_and_with_t_blocks_the_streams_part_at_block_l_minus_t():
    images, targets = batch()
    model = tiny(pwca_blocks=0).train()
    assert "pwca" not in model(images, targets)[1]
    model = tiny(pwca_blocks=4).eval()
    layers, pair_layers = [], []
    features = model.encode(images, torch.tensor([1, 2, 3, 0]), layers=layers, pair_layers=pair_layers)
    assert len(pair_layers) == 4
    q, k = layers[8]  # block 9 is the first of the last four: its queries and keys are still those of SA
    torch.testing.assert_close(pair_layers[0], common.attention_weights(q, torch.cat([k, k[[1, 2, 3, 0]]], 2)))
    assert not torch.allclose(features["pwca"], features["sa"])


def test_sec_3_3_pairs_are_one_random_cycle_without_fixed_points():
    for B in (2, 3, 16, 64):
        partner = dcal.random_cycle(B)
        at, seen = 0, []
        for _ in range(B):
            seen.append(at)
            at = partner[at].item()
        assert sorted(seen) == list(range(B)) and at == 0
    g = torch.Generator().manual_seed(1)
    assert torch.equal(dcal.random_cycle(9, g), dcal.random_cycle(9, g.manual_seed(1))) and not torch.equal(dcal.random_cycle(9), dcal.random_cycle(9))


def test_sec_3_3_pk_batches_are_not_paired_with_their_neighbours():
    """64 = 16 identities x 4: rolling by one would make 3 pairs of 4 intra-identity, a random cycle makes 3 of 63."""
    ids = torch.arange(64) // 4
    share = torch.stack([(ids == ids[dcal.partners(ids, "any")]).float().mean() for _ in range(300)]).mean()
    assert abs(share - 3 / 63) < 0.01


def test_table4_kinds_of_pairs_are_respected_and_an_image_without_its_kind_takes_any_other():
    targets = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    for _ in range(20):
        assert (targets[dcal.partners(targets, "intra")] == targets).all()
        assert (targets[dcal.partners(targets, "inter")] != targets).all()
        for pair in ("any", "intra", "inter", "mixed"):
            assert (dcal.partners(targets, pair) != torch.arange(8)).all()
            assert (dcal.partners(torch.arange(4), pair) != torch.arange(4)).all()
            assert (dcal.partners(torch.zeros(4, dtype=torch.long), pair) != torch.arange(4)).all()
    mixed = torch.stack([targets[dcal.partners(targets, "mixed")] == targets for _ in range(300)]).float().mean()
    assert abs(mixed - 0.5) < 0.05
    drawn = torch.stack([dcal.partners(targets, "inter") for _ in range(300)])
    assert set(drawn[:, 0].tolist()) == {3, 4, 5, 6, 7}


def test_table4_noise_rows_change_what_they_name():
    images, targets = batch(8)
    model = tiny(depth=2, classes=50, pair="noise", glca=False).train()
    losses = [model(images, targets)[1] for _ in range(2)]
    assert losses[0]["sa"] == losses[1]["sa"] and losses[0]["pwca"] != losses[1]["pwca"]
    assert losses[0]["pwca"] != rebuilt(model, pair="any")(images, targets)[1]["pwca"]
    noisy = rebuilt(model, pwca=False, image_noise=0.5)
    assert noisy(images, targets)[0] != noisy(images, targets)[0]
    relabelled = rebuilt(model, pwca=False, label_noise=1.0)
    assert relabelled(images, targets)[0] != relabelled(images, targets)[0] != rebuilt(model, pwca=False)(images, targets)[0]
    for other in (noisy, relabelled):
        other.eval()
        assert other(images, targets)[0] == rebuilt(model, pwca=False).eval()(images, targets)[0]


def test_sec_4_1_pwca_leaves_parameters_inference_and_flops_alone():
    recipe = dataclasses.replace(dcal.RECIPES["cub"], weights="none")
    images, models = torch.randn(1, 3, 64, 64), []
    for pwca in (True, False):
        torch.manual_seed(0)
        models.append(dcal.build(dataclasses.replace(recipe, image_size=(64, 64), pwca=pwca), 7).eval())
    a, b = models
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    assert common.count_macs(a, images) == common.count_macs(b, images)
    with torch.no_grad():
        assert torch.equal(a(images), b(images)) and torch.equal(a(images, partner=torch.tensor([0])), a(images))


# ------------------------------------------------------------------------------------------------ GLCA (Eqs. 2 and 3)


def test_eq3_glca_is_cross_attention_of_the_selected_queries_over_all_tokens_then_the_ffn():
    block = common.Block(12, 3).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    tokens = torch.randn(2, 9, 12, dtype=torch.float64)
    local = tokens[:, [0, 4, 7]]
    x, y = block.norm1(local), block.norm1(tokens)
    w, bias = block.attn.qkv.weight, block.attn.qkv.bias
    q, k, v = x @ w[:12].T + bias[:12], y @ w[12:24].T + bias[12:24], y @ w[24:].T + bias[24:]
    heads = []
    for head in range(3):
        at = slice(4 * head, 4 * head + 4)
        heads.append((q[..., at] @ k[..., at].mT / math.sqrt(4)).softmax(-1) @ v[..., at])
    z = local + block.attn.proj(torch.cat(heads, -1))
    torch.testing.assert_close(dcal.global_local_cross_attention(block, local, tokens), z + block.mlp(block.norm2(z)))


@pytest.mark.parametrize("patches, ratio, queries", [(784, 0.1, 79), (128, 0.3, 39), (256, 0.3, 77), (64, 0.001, 2), (64, 1.0, 65)])
def test_sec_3_2_queries_are_the_class_token_and_the_top_r_patches(patches, ratio, queries):
    row = torch.rand(3, 1 + patches)
    row[:, 0] = 0  # the class token is a query whatever its own response
    index = dcal.select_local(row, ratio)
    assert index.shape == (3, queries) and (index[:, 0] == 0).all()
    for r, i in zip(row, index):
        assert len(set(i.tolist())) == queries and i[1:].min() >= 1 and i.max() <= patches
        others = torch.ones(1 + patches, dtype=torch.bool).scatter(0, i, False)
        assert not others.any() or r[i[1:]].min() >= r[others].max()


def test_eq3_with_all_patches_as_queries_glca_is_an_ordinary_block_on_the_output_of_block_11():
    model, (images, _) = tiny(local_ratio=1.0, glca_readout="mean").eval(), batch()
    x = model.vit.embed(images)
    for block in model.vit.blocks[:11]:
        x = block(x)
    nn.init.normal_(model.glca.blocks[0].attn.qkv.weight)
    expected = model.glca.blocks[0](x)
    layers = []
    model.encode(images, layers=layers)
    index = dcal.select_local(common.cls_rollout(layers[:11]), 1.0)
    out = dcal.global_local_cross_attention(model.glca.blocks[0], dcal.take(x, index), x)
    assert not torch.equal(index, torch.arange(9).expand(4, -1))  # sorted by response
    torch.testing.assert_close(dcal.take(out, index.argsort(1)), expected)
    torch.testing.assert_close(model.encode(images)["glca"], model.glca.norm(expected).mean(1))


def test_fig1_glca_starts_as_a_copy_of_block_12_so_both_class_tokens_coincide_for_any_r():
    images, _ = batch()
    for ratio in (0.1, 0.5, 1.0):
        features = tiny(local_ratio=ratio, local_queries="always").eval().encode(images)
        torch.testing.assert_close(features["glca"], features["sa"], rtol=0, atol=1e-12)


def test_fig1_with_m_blocks_glca_runs_beside_the_last_m_and_its_keys_are_the_sa_stream():
    model, (images, _) = tiny(depth=5, glca_blocks=2, local_ratio=1.0, glca_readout="mean").eval(), batch()
    for block in model.glca.blocks:
        nn.init.normal_(block.attn.qkv.weight)
    x = model.vit.embed(images)
    for block in model.vit.blocks[:3]:
        x = block(x)
    local = x
    for mine, theirs in zip(model.glca.blocks, model.vit.blocks[3:]):
        local = dcal.global_local_cross_attention(mine, local, x)
        x = theirs(x)
    torch.testing.assert_close(model.encode(images)["glca"], model.glca.norm(local).mean(1))


def test_sec_3_2_with_class_token_readout_glca_does_not_depend_on_the_chosen_patches():
    """The finding in dcal.py's docstring: R, the rollout and the selection drop out of GLCA's class token, for any M."""
    images, targets = batch()
    for m in (1, 2):
        literal = tiny(glca_blocks=m, local_queries="always", pwca=False).eval()
        for p in literal.glca.parameters():
            nn.init.normal_(p, std=0.3)
        reference = literal.encode(images)["glca"]
        for change in (dict(local_ratio=0.1), dict(local_ratio=1.0), dict(select="random"), dict(select="last"), dict(local_queries="needed")):
            torch.testing.assert_close(rebuilt(literal, **change).encode(images)["glca"], reference, rtol=0, atol=1e-12)
        gradients = []
        for queries in ("always", "needed"):  # the shortcut is exact in its gradient too
            model = rebuilt(literal, local_queries=queries)
            model(images, targets)[0].backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_sec_3_2_the_class_token_readout_sends_no_gradient_to_the_local_queries():
    model, (images, _) = tiny().eval(), batch()
    tokens = model.vit.embed(images).detach()
    local = tokens[:, :4].clone().requires_grad_()
    dcal.global_local_cross_attention(model.glca.blocks[0], local, tokens)[:, 0].sum().backward()
    assert (local.grad[:, 1:] == 0).all() and (local.grad[:, 0] != 0).any()


def test_sec_3_2_the_mean_readout_and_local_keys_do_depend_on_the_chosen_patches():
    images, _ = batch()
    for change in (dict(glca_readout="mean"), dict(kv="local")):
        model = tiny(**change).eval()
        a = model.encode(images)["glca"]
        assert not torch.allclose(rebuilt(model, local_ratio=0.6).encode(images)["glca"], a)
        assert not torch.allclose(rebuilt(model, select="random").encode(images)["glca"], a)


def test_sec_4_4_local_keys_are_the_selected_tokens_own():
    model, (images, _) = tiny(depth=3, kv="local").eval(), batch()
    layers, x = [], model.vit.embed(images)
    model.encode(images, layers=layers)
    for block in model.vit.blocks[:2]:
        x = block(x)
    local = dcal.take(x, dcal.select_local(common.cls_rollout(layers[:2]), 0.3))
    torch.testing.assert_close(model.encode(images)["glca"], model.glca.norm(model.glca.blocks[0](local))[:, 0])


def test_sec_4_4_queries_by_the_last_layer_use_the_attention_of_block_l_minus_m_alone():
    model, (images, _) = tiny(depth=4, select="last").eval(), batch()
    layers = []
    x = model.vit.embed(images)
    model.encode(images, layers=layers)
    row = common.attention_weights(*layers[2])[:, 0]
    torch.testing.assert_close(dcal.select_local(model.response(x, layers[:3]), 0.5)[:, 1:].sort(1)[0], row[:, 1:].topk(4).indices.sort(1)[0] + 1)
    with torch.no_grad():  # on a CPU, inference sums the weights up on the way
        seen = []
        model.encode(images, layers=seen)
    for a, b in zip(layers, seen):
        torch.testing.assert_close(common.attention_weights(*a), b)


# ------------------------------------------------------------------------------------------------ losses and inference (Sec. 4.1)


def test_sec_4_1_uncertainty_weights():
    losses, s = torch.tensor([2.0, 4.0]), torch.zeros(2, requires_grad=True)
    total = dcal.uncertainty_weighted(losses, s)
    assert total.item() == 3.0
    assert torch.autograd.grad(dcal.uncertainty_weighted(losses, s), s)[0].tolist() == [-0.5, -1.5]
    best = losses.log().requires_grad_()
    total = dcal.uncertainty_weighted(losses, best)
    assert total.item() == pytest.approx(0.5 * (2 + math.log(8)), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(total, best)[0], torch.zeros(2), rtol=0, atol=1e-6)


def test_sec_4_1_the_total_is_the_weighted_sum_of_the_branches_and_a_single_branch_is_not_weighted():
    images, targets = batch()
    model = tiny(depth=3).train()
    with torch.no_grad():
        model.log_vars.copy_(torch.tensor([0.1, -0.2, 0.3]))
    loss, terms = model(images, targets)
    s = model.log_vars.tolist()
    assert loss.item() == pytest.approx(sum(0.5 * (math.exp(-a) * terms[n].item() + a) for n, a in zip(dcal.BRANCHES, s)), abs=1e-6)
    assert all(terms[f"s_{n}"].item() == a for n, a in zip(dcal.BRANCHES, s)) and not any(t.requires_grad for t in terms.values())
    loss.backward()
    assert (model.log_vars.grad != 0).all()
    pwca_only = rebuilt(tiny(depth=3, glca=False))
    loss, terms = pwca_only(images, targets)
    loss.backward()
    assert pwca_only.log_vars.grad[1] == 0 and pwca_only.log_vars.grad[[0, 2]].abs().min() > 0 and "glca" not in terms
    for model in (tiny(depth=3, glca=False, pwca=False), tiny(depth=3, dynamic_loss=False)):
        loss, terms = model(images, targets)
        assert loss.item() == pytest.approx(sum(v.item() for k, v in terms.items() if k in dcal.BRANCHES), rel=1e-6)
        assert not model.log_vars.requires_grad


def test_sec_4_1_each_branch_is_trained_with_cross_entropy_under_the_target_of_the_first_image():
    model, (images, targets) = tiny(depth=3).train(), batch()
    partner = torch.tensor([1, 2, 3, 0])
    features = model.encode(images, partner)
    _, terms = model(images, targets, partner)
    for name, head in (("sa", model.head), ("glca", model.glca_head), ("pwca", model.head)):
        log_p = head(features[name]).log_softmax(1)
        assert terms[name].item() == pytest.approx(-sum(log_p[i, t].item() for i, t in enumerate(targets)) / 4)


def test_the_log_variances_never_fall_below_their_floor_but_may_leave_it():
    model, (images, targets) = tiny(depth=2, log_var_floor=-2.0).train(), batch()
    with torch.no_grad():
        model.log_vars.fill_(-5)
    loss, terms = model(images, targets)
    assert terms["s_sa"] == -2 and (model.log_vars == -2).all()
    loss.backward()
    assert (model.log_vars.grad < 0).all()  # losses above e^-2 push them up again


def test_sec_4_1_inference_adds_probabilities_and_not_logits():
    sa, glca = torch.tensor([[6.0, 5.0, 0.0]]), torch.tensor([[0.0, 1.2, 1.3]])
    fused = dcal.fuse([sa, glca])
    assert fused.argmax() == 0 and (sa + glca).argmax() == 1
    torch.testing.assert_close(2 * fused.exp(), sa.softmax(1) + glca.softmax(1))
    assert (2 * fused.exp()).sum().item() == pytest.approx(2.0, abs=1e-6)
    assert dcal.fuse([torch.tensor([[1000.0, 0.0]]), torch.tensor([[900.0, 0.0]])]).isfinite().all()


def test_sec_4_6_inference_with_one_branch_uses_its_head_alone():
    model, (images, _) = tiny(depth=3).eval(), batch()
    heads = model.heads(images)
    assert list(heads) == ["sa", "glca", "both"]
    for infer in heads:
        torch.testing.assert_close(rebuilt(model, infer=infer)(images), heads[infer])
    torch.testing.assert_close(heads["both"], dcal.fuse([heads["sa"], heads["glca"]]))
    plain = tiny(depth=3, glca=False, pwca=False).eval()
    assert list(plain.heads(images)) == ["sa"]
    torch.testing.assert_close(plain(images), plain.heads(images)["sa"])
    torch.testing.assert_close(plain(images), plain.head(plain.vit.norm(plain.vit.features(images))[:, 0]).float())


def test_sec_4_1_reid_features_are_both_class_tokens_before_the_neck_side_by_side_and_of_length_one():
    model, (images, _) = tiny("reid", depth=3).eval(), batch()
    nn.init.normal_(model.glca.norm.weight)
    features = model.encode(images)
    out = model(images)
    assert out.shape == (4, 24)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4))
    both = torch.cat([features["sa"], features["glca"]], 1).float()
    torch.testing.assert_close(out, both / both.norm(dim=1, keepdim=True))
    assert {k: v.shape for k, v in model.heads(images).items()} == {"sa": (4, 12), "glca": (4, 12), "both": (4, 24)}


def test_sec_4_1_triplet_loss_takes_the_farthest_positive_and_the_nearest_negative():
    features, ids = torch.randn(12, 6), torch.arange(12) // 4
    expected = []
    for a in range(12):
        positive = max((features[a] - features[j]).norm().item() for j in range(12) if ids[j] == ids[a])
        negative = min((features[a] - features[j]).norm().item() for j in range(12) if ids[j] != ids[a])
        expected.append(math.log1p(math.exp(positive - negative)))
    assert dcal.triplet_loss(features, ids).item() == pytest.approx(sum(expected) / 12, rel=1e-4)
    same = torch.ones(4, 6, requires_grad=True)
    dcal.triplet_loss(same, torch.tensor([0, 0, 1, 1])).backward()
    assert same.grad.isfinite().all()  # no infinite slope at distance 0


def test_sec_4_1_reid_loss_is_cross_entropy_after_the_neck_plus_triplet_before_it():
    model, (images, _) = tiny("reid", depth=3, pwca=False, dynamic_loss=False).train(), batch()
    targets = torch.tensor([0, 0, 1, 1])
    features = model.encode(images)
    assert model.head.norm.bias.requires_grad is False and model.head.classifier.bias is None
    _, terms = model(images, targets)
    for name, neck in (("sa", model.head), ("glca", model.glca_head)):
        f = features[name]
        normed = (f - f.mean(0)) / (f.var(0, unbiased=False) + 1e-5).sqrt()
        expected = F.cross_entropy(normed @ neck.classifier.weight.T, targets) + dcal.triplet_loss(f, targets)
        assert terms[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluating_the_loss_needs_no_pairs():
    model, (images, targets) = tiny(depth=2).eval(), batch(1)
    loss, terms = model(images, targets)
    assert loss.isfinite() and "pwca" not in terms and set(terms) >= {"sa", "glca", "top1"}


# ------------------------------------------------------------------------------------------------ rollout over a pair, figures, where


@torch.no_grad()
def test_fig3_an_image_paired_with_itself_keeps_three_quarters_of_its_rollout_in_each_pwca_block():
    model, (images, _) = tiny().eval(), batch()
    layers, pair_layers, partner = [], [], torch.arange(4)
    model.encode(images, partner, layers=layers, pair_layers=pair_layers)
    own, other = dcal.pair_rollout(layers, pair_layers, partner)
    torch.testing.assert_close(own.sum(1), torch.full((4,), 0.75**12, dtype=torch.float64))
    assert 0.75**12 == pytest.approx(0.03168, abs=1e-5)
    torch.testing.assert_close(own + other, common.cls_rollout(layers))
    model = rebuilt(model, pwca_blocks=3)
    pair_layers.clear(), layers.clear()
    model.encode(images, partner.roll(1), layers=layers, pair_layers=pair_layers)
    own, other = dcal.pair_rollout(layers, pair_layers, partner.roll(1))
    torch.testing.assert_close((own + other).sum(1), torch.ones(4, dtype=torch.float64))


@torch.no_grad()
def test_fig3_pair_rollout_is_the_class_row_of_the_product_over_the_tokens_of_both_images():
    model, (images, _) = tiny(depth=3).eval(), batch(2)
    layers, pair_layers, partner = [], [], torch.tensor([1, 0])
    model.encode(images, partner, layers=layers, pair_layers=pair_layers)
    for b in range(2):
        whole = []
        for sa, pair in zip(layers, pair_layers):  # 2N x 2N: the image's tokens see both, the partner's only themselves
            whole.append(torch.cat([pair[b], torch.cat([torch.zeros(9, 9, dtype=torch.float64), sa[1 - b]], 1)]))
        row = common.rollout(whole)[0]
        own, other = dcal.pair_rollout(layers, pair_layers, partner)
        torch.testing.assert_close(torch.cat([own[b], other[b]]), row)


def test_where_gives_the_patches_of_the_highest_rollout_over_the_blocks_before_glca_row_by_row():
    model, (images, _) = tiny(local_ratio=0.5).eval(), batch()
    boxes, scores = model.where(images)
    layers = []
    model.encode(images, layers=layers)
    row = common.rollout([common.attention_weights(*layer) for layer in layers[:11]])[:, 0, 1:]
    assert boxes.shape == (4, 4, 4) and (scores.diff(dim=1) <= 0).all()
    for b in range(4):
        for box, score, patch in zip(boxes[b].tolist(), scores[b], row[b].argsort(descending=True)):
            y, x = divmod(patch.item(), 2)  # two columns
            assert box == [8 * x, 8 * y, 8 * x + 8, 8 * y + 8] and score.item() == pytest.approx(row[b, patch].item())


def test_fig3_and_fig4_have_one_page_an_image_and_the_pair_only_with_pwca():
    images, _ = batch(3)
    with_pair = tiny(depth=3).eval().figure(images.float().double())
    alone = tiny(depth=3, pwca=False).eval().figure(images)
    assert len(with_pair) == len(alone) == 3 and with_pair[0].width > 1.5 * alone[0].width and with_pair[0].height == 448 + 28
    assert len(tiny(depth=3).eval().figure(images[:1])) == 1
    model = tiny("reid", depth=3, pwca_blocks=2).eval()
    assert len(model.figure(images)) == 3


# ------------------------------------------------------------------------------------------------ Re-ID evaluation


def scores_of(relevance):
    """reid_scores of one query whose gallery, nearest first, is relevant as given."""
    n = len(relevance)
    return dcal.reid_scores(torch.arange(n).float()[None], torch.tensor([1]), torch.tensor([0]), torch.tensor([1 if r else 2 for r in relevance]), torch.ones(n, dtype=torch.long))


def test_average_precision_is_the_mean_precision_at_the_hits():
    a, b = scores_of([1, 0, 1, 0, 0]), scores_of([0, 1, 0, 0, 1])
    assert a["mAP"] == pytest.approx((1 + 2 / 3) / 2) and a["cmc"][0] == 1  # the trapezoid rule would give 0.7917
    assert b["mAP"] == pytest.approx((1 / 2 + 2 / 5) / 2) and b["cmc"][0] == 0 and b["cmc"][4] == 1  # and here 0.2875


HAND = dict(
    distances=torch.tensor([[0.1, 0.5, 0.2, 0.05, 0.4, 0.3, 0.6, 0.7], [0.5, 0.6, 0.3, 0.1, 0.7, 0.2, 0.4, 0.8], [0.1] * 8, [0.1] * 8]),
    query_ids=torch.tensor([1, 2, 3, 9]), query_cameras=torch.tensor([0, 0, 0, 1]),
    gallery_ids=torch.tensor([1, 1, 2, -1, 1, 0, 2, 3]), gallery_cameras=torch.tensor([0, 1, 1, 2, 2, 1, 2, 0]),
)


def test_the_hand_case_of_the_protocol_same_camera_and_junk_are_removed_and_queries_without_a_match_skipped():
    scores = dcal.reid_scores(**HAND)
    assert scores["mAP"] == pytest.approx(0.5) and scores["skipped"] == 2
    assert scores["cmc"].tolist() == [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]
    first = dcal.reid_scores(**{k: v[:1] if k in ("distances", "query_ids", "query_cameras") else v for k, v in HAND.items()})
    assert first["mAP"] == pytest.approx(5 / 12) and first["cmc"][0] == 0
    no_camera_rule = dcal.reid_scores(**{**HAND, "query_cameras": torch.full((4,), 7)})
    assert no_camera_rule["cmc"][0] > 0


def test_reid_scores_against_a_slow_loop():
    Q, G = 12, 60
    q_ids, q_cams, g_ids, g_cams = (torch.randint(0, n, (m,)) for n, m in ((6, Q), (3, Q), (8, G), (3, G)))
    g_ids[::9] = -1
    distances = torch.rand(Q, G)
    aps, firsts, skipped = [], [], 0
    for i in range(Q):
        kept = [j for j in distances[i].argsort().tolist() if g_ids[j] != -1 and not (g_ids[j] == q_ids[i] and g_cams[j] == q_cams[i])]
        hits = [rank for rank, j in enumerate(kept, 1) if g_ids[j] == q_ids[i]]
        if not hits:
            skipped += 1
            continue
        aps.append(sum(n / rank for n, rank in enumerate(hits, 1)) / len(hits))
        firsts.append(hits[0])
    scores = dcal.reid_scores(distances, q_ids, q_cams, g_ids, g_cams)
    assert scores["mAP"] == pytest.approx(sum(aps) / len(aps)) and scores["skipped"] == skipped
    assert scores["cmc"].tolist() == pytest.approx([sum(f <= r for f in firsts) / len(firsts) for r in range(1, 11)])


def test_reid_evaluation_in_chunks_equals_the_whole_distance_matrix():
    features = F.normalize(torch.randn(50, 8), dim=1)
    ids, cameras, query = torch.randint(0, 5, (50,)).tolist(), torch.randint(0, 3, (50,)).tolist(), [i < 13 for i in range(50)]
    whole = dcal.reid_scores(torch.cdist(features[:13], features[13:]), torch.tensor(ids[:13]), torch.tensor(cameras[:13]), torch.tensor(ids[13:]), torch.tensor(cameras[13:]))
    for chunk in (1, 37 * 5, 2**24):
        result = dcal.reid_evaluate(features, ids, cameras, query, chunk)
        assert list(result) == ["mAP", "rank1", "rank5", "rank10", "skipped"]
        assert result["mAP"] == pytest.approx(whole["mAP"]) and result["skipped"] == whole["skipped"]
        assert [result[f"rank{r}"] for r in (1, 5, 10)] == pytest.approx([whole["cmc"][r - 1].item() for r in (1, 5, 10)])


def test_reid_evaluation_without_queries_or_without_any_match_is_an_error():
    features = torch.randn(4, 3)
    with pytest.raises(ValueError, match="0 queries and 4 gallery images"):
        dcal.reid_evaluate(features, [1, 1, 2, 2], [0, 1, 0, 1], [False] * 4)
    with pytest.raises(ValueError, match="none of the 2 queries"):
        dcal.reid_evaluate(features, [1, 2, 3, 4], [0, 1, 0, 1], [True, True, False, False])


def test_pk_batches_hold_p_identities_of_k_images_and_every_epoch_is_equally_long():
    ids = [i for i in range(40) for _ in range(1 + i * 7 % 23)]
    counts = [ids.count(i) for i in range(40)]
    sampler, epochs = data.PKSampler(ids, 16, 4, torch.Generator().manual_seed(0)), []
    for _ in range(4):
        batches = list(sampler)
        assert len(batches) == len(sampler) >= 1 and len(batches) * 64 <= sum(max(n, 4) // 4 * 4 for n in counts)
        used = []
        for b in batches:
            labels = [ids[i] for i in b]
            assert len(b) == 64 and len(set(labels)) == 16 and all(len(set(labels[j : j + 4])) == 1 for j in range(0, 64, 4))
            used += b
        for i in set(used):  # an image comes twice only where its identity has fewer than four
            assert used.count(i) == 1 or counts[ids[i]] < 4
        epochs.append(used)
    assert epochs[0] != epochs[1]
    again = data.PKSampler(ids, 16, 4, torch.Generator().manual_seed(0))
    assert [i for b in again for i in b] == epochs[0]


def test_pk_batches_use_as_many_groups_as_distinct_identities_allow():
    ids = [0] * 400 + [1] * 8 + [2] * 8  # two identities a batch: the big one cannot be paired with itself
    assert len(data.PKSampler(ids, 2, 4)) == 4
    assert len(data.PKSampler([i for i in range(751) for _ in range(16)], 16, 4)) == 751 * 4 // 16
    with pytest.raises(ValueError, match="batches of 4 identities x 4 images from 3 identities"):
        data.PKSampler(ids, 4, 4)


# ------------------------------------------------------------------------------------------------ recipes, tables, counts


def test_sec_4_1_recipes_have_the_papers_numbers():
    for name in ("cub", "cars", "aircraft"):
        r = dcal.RECIPES[name]
        assert (r.resize, r.image_size, r.crop, r.local_ratio) == ((550, 550), (448, 448), "random", 0.1)
        assert (r.batch_size, r.epochs, r.weight_decay, r.schedule, r.lr, r.lr_batch) == (16, 100, 0.05, "cosine", 5e-4, 512)
        assert r.label_smoothing == 0 and r.drop_path > 0 and r.task == "classify" and r.weights == "default"
    for name in ("market1501", "dukemtmc", "msmt17", "veri776"):
        r = dcal.RECIPES[name]
        assert r.image_size == ((256, 256) if name == "veri776" else (256, 128)) and r.resize in ((0, 0), r.image_size)
        assert (r.task, r.local_ratio, r.optimizer, r.momentum, r.weight_decay) == ("reid", 0.3, "sgd", 0.9, 1e-4)
        assert (r.batch_size, r.instances, r.epochs, r.lr, r.lr_batch, r.schedule) == (64, 4, 120, 0.008, 0, "cosine")
        assert r.log_var_floor == -2
    for r in dcal.RECIPES.values():
        assert r.glca and r.pwca and (r.glca_blocks, r.pwca_blocks, r.select, r.kv, r.glca_readout, r.pair, r.infer) == (1, 12, "rollout", "global", "cls", "any", "both")
    assert {"toy", "folder"} <= set(dcal.RECIPES)


def test_sec_4_1_learning_rate_follows_deits_rule():
    r = dcal.RECIPES["cub"]
    steps, per_epoch = 100 * 374, 374
    peak = lambda recipe: max(common.lr_at(recipe, s, steps, per_epoch) for s in range(0, steps, 11))
    assert common.lr_at(r, 5 * per_epoch, steps, per_epoch) == pytest.approx(1.5625e-5) and peak(r) == pytest.approx(1.5625e-5, rel=1e-3)
    assert common.lr_at(dataclasses.replace(r, batch_size=64), 5 * per_epoch, steps, per_epoch) == pytest.approx(6.25e-5)
    assert common.lr_at(r, 0, steps, per_epoch) == 1e-6 and common.lr_at(r, steps, steps, per_epoch) == pytest.approx(0, abs=1e-12)
    r = dcal.RECIPES["msmt17"]
    assert common.lr_at(r, 5 * 500, 120 * 500, 500) == pytest.approx(0.008) and common.lr_at(r, 120 * 500, 120 * 500, 500) == pytest.approx(0.002 * 0.008)


def count(name, classes, **switches):
    with torch.device("meta"):
        model = dcal.build(dataclasses.replace(dcal.RECIPES[name], weights="none", **switches), classes)
    return sum(p.numel() for p in model.parameters()), model


def test_table3_parameters():
    whole, model = count("cub", 200)
    assert whole - 3 == 6_159_760  # and three log-variances
    assert sum(p.numel() for p in model.vit.parameters()) == 5_637_312
    assert sum(p.numel() for p in model.glca.parameters()) == 444_864 + 384
    weights = lambda modules: sum(p.numel() for m in modules for layer in m.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)) for p in layer.parameters())
    table = [sum(p.numel() for p in part.parameters()) for part in (model.vit, model.head, model.glca, model.glca_head)]
    table[0] -= model.vit.pos_embed.numel() + model.vit.cls_token.numel()  # Table 3 seems to leave positions and class token out: 5.5M, 6.0M
    assert round(sum(table[:2]) / 1e6, 3) == 5.525 and round(sum(table) / 1e6, 3) == 6.009
    for name, pixels, backbone in (("msmt17", "81.642", 85_746_432), ("veri776", "81.642", 85_844_736)):
        _, model = count(name, 1041)
        assert sum(p.numel() for p in model.vit.parameters()) == backbone
        assert f"{weights([model.vit]) / 2**20:.3f}" == pixels and f"{weights([model.vit, model.glca]) / 2**20:.3f}" == "88.399"  # Table 3: 81.6M, 88.4M
    _, model = count("cub", 200, backbone="r50_vit_base", normalize="half")
    assert sum(p.numel() for p in model.vit.parameters()) == 98_341_696 and sum(p.numel() for p in model.glca.parameters()) == 7_087_872 + 1_536


@pytest.mark.parametrize("change, giga", [
    (dict(glca=False), 7.122), (dict(local_queries="always", select="random"), 7.233), (dict(backbone="vit_base", glca=False), 78.49),
    (dict(backbone="vit_base", image_size=(256, 128), local_ratio=0.3, local_queries="always", select="random"), 11.73),
])
def test_table3_multiplications_with_the_ffn_on_the_selected_tokens_only(change, giga):
    with torch.device("meta"):
        model = dcal.build(dataclasses.replace(dcal.RECIPES["cub"], weights="none", **change), 200).eval()
        macs = common.count_macs(model, torch.empty(1, 3, *model.recipe.image_size))
    assert macs / 1e9 == pytest.approx(giga, abs=6e-3)


def test_every_row_of_every_table_is_a_recipe_and_its_overrides_build():
    rows = {key: len(t.rows) for key, t in dcal.TABLES.items()}
    assert {"baseline", "1", "1-cars", "1-aircraft", "2", "2-msmt17", "2-market1501", "2-dukemtmc", "3", "3-veri776", "3-msmt17", "4", "4-msmt17", "glca", "infer"} <= set(rows)
    assert rows["1"] == 10 and rows["2-msmt17"] == 8 and rows["3"] == 4 and rows["4"] == 8
    kinds = {f.name: f for f in dataclasses.fields(dcal.Recipe)}
    for table in dcal.TABLES.values():
        assert table.data in dcal.RECIPES
        for name, overrides, _ in table.rows:
            change = {k: v for part in common.split_row(overrides) for k, v in part.items()}
            recipe = dataclasses.replace(dcal.RECIPES[table.data], **change)
            assert all(not kinds[k].metadata["choices"] or v in kinds[k].metadata["choices"] for k, v in change.items()), name
            small = {k: v for k, v in change.items() if k not in ("backbone", "normalize", "instances")}
            dcal.build(dataclasses.replace(dcal.RECIPES["toy"], **small), 4)
            assert recipe.task == dcal.RECIPES[table.data].task
    values = {(key, name): value for key, t in dcal.TABLES.items() for name, _, value in t.rows}
    assert values["1", "R50-ViT-Base + DCAL"] == 92.0 and values["1-cars", "DeiT-Small + DCAL"] == 92.3 and values["2-msmt17", "ViT-Base + DCAL"] == 64.0
    assert values["2", "DeiT-Tiny"] == 71.3 and values["3", "Ours"] == 84.6 and values["4-msmt17", "+ I2 from noise"] == 62.1


def test_param_groups_hold_every_trainable_parameter_once_and_no_decay_where_none_belongs():
    for name, classes in (("toy", 8), ("market1501", 10)):
        recipe = dataclasses.replace(dcal.RECIPES[name], weights="none", backbone="toy_vit")
        model = dcal.build(recipe, classes)
        names = {id(p): n for n, p in model.named_parameters()}
        groups = dcal.param_groups(model, recipe)
        listed = [names[id(p)] for g in groups for p in g["params"]]
        assert sorted(listed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
        for g in groups:
            for p in g["params"]:
                n = names[id(p)]
                free = p.ndim == 1 or n in ("vit.cls_token", "vit.pos_embed")
                assert g["weight_decay"] == (0 if free else recipe.weight_decay)
                assert g["lr_scale"] == (2.0 if name == "market1501" and n.endswith(".bias") else 1.0)
        assert [names[id(p)] for p in next(g for g in groups if names[id(g["params"][0])] == "log_vars")["params"]] == ["log_vars"]
        assert "head.norm.bias" not in listed


# ------------------------------------------------------------------------------------------------ training, weights, errors


def test_a_few_steps_learn_a_batch_by_heart_and_give_every_parameter_a_gradient():
    recipe = dataclasses.replace(dcal.RECIPES["toy"], image_size=(32, 32), glca_readout="mean")
    model = dcal.build(recipe, 4).train()
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(dcal.param_groups(model, recipe), lr=2e-3)
    first = None
    for _ in range(25):
        loss, terms = model(images, targets)
        first = first or terms
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert all(terms[n] < 0.5 * first[n] for n in dcal.BRANCHES) and terms["top1"] == 1


def test_mixed_precision_keeps_losses_and_selection_in_fp32():
    model = dcal.build(dataclasses.replace(dcal.RECIPES["toy"], image_size=(32, 32), local_queries="always", task="reid"), 4).train()
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = model(images, targets)
        layers = []
        model.encode(images, layers=layers)
        assert layers[0][0].dtype == torch.bfloat16 and common.cls_rollout(layers).dtype == torch.float32
        loss.backward()
        model.eval()
        with torch.no_grad():
            assert model(images).dtype == torch.float32
            seen = []
            model.encode(images, layers=seen)
            assert seen[0].dtype == torch.float32
            for some in (layers, seen):  # in bf16 the rows' sum would be off by 1e-3
                assert common.cls_rollout(some).sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in terms.values())


def test_a_run_of_ours_can_be_fine_tuned_with_other_classes_and_glca_starts_from_its_last_block(tmp_path):
    plain = dataclasses.replace(dcal.RECIPES["toy"], image_size=(32, 32), glca=False, pwca=False)
    trained = dcal.build(plain, 4)
    for p in trained.parameters():
        nn.init.normal_(p, std=0.1)
    common.save_checkpoint(tmp_path / "last.pt", {"model": trained.state_dict(), "ema": {}})
    tuned = dcal.build(dataclasses.replace(plain, glca=True, pwca=True, weights=str(tmp_path)), 7)
    assert tuned.head.out_features == 7
    for key, value in trained.vit.state_dict().items():
        assert torch.equal(tuned.vit.state_dict()[key], value)
    for key, value in trained.vit.blocks[-1].state_dict().items():
        assert torch.equal(tuned.glca.blocks[0].state_dict()[key], value)
    assert torch.equal(tuned.glca.norm.weight, trained.vit.norm.weight) and tuned.glca.norm.weight is not tuned.vit.norm.weight
    nn.init.normal_(tuned.glca.norm.weight)
    common.save_checkpoint(tmp_path / "last.pt", {"model": tuned.state_dict(), "ema": {}})
    again = dcal.build(dataclasses.replace(plain, glca=True, weights=str(tmp_path)), 3)
    assert torch.equal(again.glca.norm.weight, tuned.glca.norm.weight)
    dcal.build(dataclasses.replace(plain, weights=str(tmp_path)), 3)  # a run with GLCA as the start of a plain ViT
    with pytest.raises(ValueError, match="missing .*blocks.1"):
        dcal.build(dataclasses.replace(plain, glca=True, glca_blocks=2, weights=str(tmp_path)), 3)


def test_a_training_batch_of_one_with_pwca_is_an_error_and_without_it_is_not():
    model, (images, targets) = tiny(depth=2).train(), batch(1)
    with pytest.raises(ValueError, match="no pairs for PWCA"):
        model(images, targets)
    assert rebuilt(model, pwca=False)(images, targets)[0].isfinite()
    assert model.eval()(images).shape == (1, 5)


@pytest.mark.parametrize("change, message", [
    (dict(local_ratio=0.0), "local-ratio 0.0 is outside"), (dict(local_ratio=1.2), "outside"), (dict(image_size=(60, 64)), "not divisible by the patch size 8"),
    (dict(glca_blocks=4), "1 to 3 for toy_vit"), (dict(glca_blocks=0), "1 to 3"), (dict(infer="glca", glca=False), "no GLCA branch"),
    (dict(label_noise=2.0), "label-noise"), (dict(pwca_blocks=-1), "pwca-blocks"), (dict(weights="default"), "no official weights"), (dict(weights="nowhere.pth"), "no such file"),
])
def test_settings_that_cannot_work_say_what_is_allowed(change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dcal.build(dataclasses.replace(dcal.RECIPES["toy"], **change), 8)


def test_a_single_class_is_an_error():
    with pytest.raises(ValueError, match="1 classes"):
        dcal.build(dcal.RECIPES["toy"], 1)
