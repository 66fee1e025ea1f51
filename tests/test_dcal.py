"""DCAL: each equation against a slow recomputation, what the figure implies, recipes, tables and built models."""
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import dcal

SWITCHES = dict(image_size=(32, 16), normalize="half", weights="none", local_ratio=0.3)
close = torch.testing.assert_close


def tiny(task="classify", depth=12, classes=5, **switches):
    """A DCAL of float64 on 32 x 16 images: 8 patches in 4 rows and 2 columns, all weights large enough to matter."""
    recipe = dataclasses.replace(dcal.Recipe(), **{**SWITCHES, "task": task, **switches})
    vit = common.VisionTransformer(
        recipe.image_size, patch_size=8, dim=12, depth=depth, heads=3, drop_path=recipe.drop_path)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.3)
    model = dcal.DCAL(vit, recipe, classes).double()
    nn.init.normal_((model.head if task == "classify" else model.head.classifier).weight)
    return model


def rebuilt(model, **switches):
    """The same weights under other switches."""
    recipe = dataclasses.replace(model.recipe, **switches)
    other = dcal.DCAL(copy.deepcopy(model.vit), recipe, model.num_classes).to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def batch(B=4, classes=5):
    return torch.randn(B, 3, 32, 16, dtype=torch.float64), torch.arange(B) % classes


def pairs(*numbers):
    return torch.tensor(numbers)


def weights(layer):
    """Head-mean attention (B, N, N) of an SA layer."""
    return common.attention_weights(layer[1], layer[2])


def test_eq4_pwca_is_one_softmax_over_the_tokens_of_both_images():
    B, h, N, d = 2, 2, 4, 5
    q1, k1, v1, k2, v2 = torch.randn(5, B, h, N, d, dtype=torch.float64)
    out = dcal.pairwise_cross_attention(q1, k1, v1, k2, v2)
    for b in range(B):
        for head in range(h):
            own = list(zip(k1[b, head], v1[b, head]))
            both = own + list(zip(k2[b, head], v2[b, head]))
            for n in range(N):
                scores = torch.stack([q1[b, head, n] @ key / math.sqrt(d) for key, _ in both]).exp()
                literal = sum(s * value for s, (_, value) in zip(scores, both)) / scores.sum()
                close(out[b, head, n], literal)


def test_eq4_pwca_of_an_image_with_itself_is_self_attention_and_the_order_of_the_two_does_not_matter():
    q, k, v, k2, v2 = torch.randn(5, 2, 3, 7, 4, dtype=torch.float64)
    sa = F.scaled_dot_product_attention(q, k, v)
    close(dcal.pairwise_cross_attention(q, k, v, k, v), sa, rtol=0, atol=4e-13)
    both = dcal.pairwise_cross_attention(q, k, v, k2, v2)
    close(both, dcal.pairwise_cross_attention(q, k2, v2, k, v))
    assert not torch.allclose(both, sa)


def test_eq4_the_pwca_stream_of_an_image_with_itself_is_the_sa_stream_at_every_block():
    model, (images, _) = tiny().eval(), batch()
    _, layers = model.sa_branch(images)
    feature, pair_layers = model.pwca_branch(layers, torch.arange(4))
    assert len(layers) == len(pair_layers) == 12
    close(pair_layers, [(q, k) for _, q, k, _ in layers], rtol=0, atol=1e-11)
    close(feature, model.encode(images)["sa"], rtol=0, atol=1e-11)


def test_fig1_the_distractor_enters_with_its_own_self_attention_stream():
    model, (images, _) = tiny(depth=3).eval(), batch(2)
    x = p = model.vit.embed(images)
    for block in model.vit.blocks:  # I2's keys and values come from its plain pass at the same depth
        _, k, v = block.attn.split(block.norm1(x))
        q1, k1, v1 = block.attn.split(block.norm1(p))
        attn = (q1 @ torch.cat([k1, k.flip(0)], 2).mT / 2).softmax(-1)  # d = 4
        p = block.finish(p, attn @ torch.cat([v1, v.flip(0)], 2))
        x = block(x)
    close(model.encode(images, pairs(1, 0))["pwca"], model.vit.norm(p[:, 0]))


def test_sec_3_3_the_partner_changes_pwca_alone_and_receives_its_gradient():
    model, (images, _) = tiny().eval(), batch()
    images.requires_grad_()
    a, b = (model.encode(images, pairs(*p)) for p in ((1, 2, 3, 0), (3, 0, 1, 2)))
    assert torch.equal(a["sa"], b["sa"]) and torch.equal(a["glca"], b["glca"])
    assert not torch.allclose(a["pwca"], b["pwca"])
    a["pwca"][0].sum().backward()
    assert [grad.any().item() for grad in images.grad] == [True, True, False, False]


def test_fig2_with_t_pwca_blocks_the_streams_part_at_block_l_minus_t():
    images, targets = batch()
    model, partner = tiny(pwca_blocks=4).eval(), pairs(1, 2, 3, 0)
    _, layers = model.sa_branch(images)
    feature, pair_layers = model.pwca_branch(layers, partner)
    assert len(pair_layers) == 4
    close(pair_layers[0], layers[8][1:3])  # block 9 is the first of the last four: still SA's queries and keys
    assert not torch.allclose(pair_layers[1][0], layers[9][1]) and not torch.allclose(feature, layers[0][0][:, 0])
    assert "pwca" not in tiny(pwca_blocks=0).train()(images, targets)[1]
    everywhere = [rebuilt(model, pwca_blocks=t).pwca_branch(layers, partner)[0] for t in (12, 99)]
    assert torch.equal(*everywhere)


def test_sec_3_3_pairs_are_one_random_cycle_without_fixed_points():
    for B in (2, 3, 16, 64):
        partner, at = dcal.random_cycle(B), [0]
        for _ in range(B):
            at.append(partner[at[-1]].item())
        assert sorted(at[:-1]) == list(range(B)) and at[-1] == 0
    assert not torch.equal(dcal.random_cycle(9), dcal.random_cycle(9))


def test_table4_kinds_of_pairs_are_respected_and_an_image_without_its_kind_takes_any_other():
    targets = pairs(0, 0, 0, 1, 1, 1, 2, 2)
    for _ in range(20):
        assert (targets[dcal.partners(targets, "intra")] == targets).all()
        assert (targets[dcal.partners(targets, "inter")] != targets).all()
        for labels in (targets, torch.arange(4), torch.zeros(4, dtype=torch.long)):
            for pair in ("any", "intra", "inter", "mixed", "noise"):
                assert (dcal.partners(labels, pair) != torch.arange(len(labels))).all()
    assert dcal.partners(pairs(7, 7, 9), "intra")[:2].tolist() == [1, 0]  # the docstring's example
    assert {dcal.partners(pairs(7, 7, 9), "intra")[2].item() for _ in range(30)} == {0, 1}
    mixed = torch.stack([targets[dcal.partners(targets, "mixed")] == targets for _ in range(300)]).float().mean()
    assert abs(mixed - 0.5) < 0.05
    assert {dcal.partners(targets, "inter")[0].item() for _ in range(100)} == {3, 4, 5, 6, 7}
    with pytest.raises(ValueError, match="no pairs for PWCA"):
        dcal.partners(pairs(1), "any")


def test_table4_noise_rows_change_what_they_name_and_only_in_training():
    images, targets = batch(8)
    model = tiny(depth=2, classes=50, pair="noise", glca=False).train()
    losses = [model(images, targets)[1] for _ in range(2)]
    assert losses[0]["sa"] == losses[1]["sa"] and losses[0]["pwca"] != losses[1]["pwca"]
    assert losses[0]["pwca"] != rebuilt(model, pair="any")(images, targets)[1]["pwca"]
    plain = rebuilt(model, pwca=False)
    for noise in (dict(image_noise=0.5), dict(label_noise=1.0)):
        noisy = rebuilt(plain, **noise)
        assert noisy(images, targets)[0] != noisy(images, targets)[0] != plain(images, targets)[0]
        assert noisy.eval()(images, targets)[0] == plain(images, targets)[0]
    features, three = plain.encode(images[:1].expand(8, -1, -1, -1)), torch.full((8,), 3)
    log_p = plain.classify(features)["sa"].log_softmax(1)[0]
    noisy = rebuilt(plain, label_noise=0.25)  # a quarter of the labels is drawn anew
    losses = torch.stack([noisy(images[:1].expand(8, -1, -1, -1), three)[1]["sa"] for _ in range(200)])
    assert abs(losses.mean() + 0.75 * log_p[3] + 0.25 * log_p.mean()) < 4 * losses.std() / 200**0.5


def test_sec_4_1_pwca_leaves_parameters_inference_and_flops_alone():
    models, images = [], torch.randn(1, 3, 64, 64)
    for pwca in (True, False):
        torch.manual_seed(0)
        recipe = dataclasses.replace(dcal.RECIPES["cub"], weights="none", image_size=(64, 64), pwca=pwca)
        models.append(dcal.build(recipe, 7).eval())
    a, b = models
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    assert common.count_macs(a, images) == common.count_macs(b, images)
    with torch.no_grad():
        assert torch.equal(a(images), b(images))


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
    close(dcal.global_local_cross_attention(block, local, tokens), z + block.mlp(block.norm2(z)))


@pytest.mark.parametrize("patches, ratio, queries", [
    (784, 0.1, 79), (128, 0.3, 39), (256, 0.3, 77), (64, 0.001, 2), (64, 1.0, 65)])
def test_sec_3_2_queries_are_the_class_token_and_the_top_r_patches(patches, ratio, queries):
    row = torch.rand(3, 1 + patches)
    row[:, 0] = 0  # the class token is a query whatever its own response
    index = dcal.select_local(row, ratio)
    assert index.shape == (3, queries) and (index[:, 0] == 0).all()
    assert torch.equal(index[:, 1:], row[:, 1:].argsort(1, descending=True)[:, : queries - 1] + 1)


def test_eq3_with_all_patches_as_queries_glca_is_an_ordinary_block_on_the_output_of_block_11():
    model, (images, _) = tiny(local_ratio=1.0, glca_readout="mean").eval(), batch()
    _, layers = model.sa_branch(images)
    x, block = layers[11][0], model.glca.blocks[0]
    nn.init.normal_(block.attn.qkv.weight)
    index = dcal.select_local(dcal.class_rollout(layers[:11]), 1.0)
    assert not torch.equal(index, torch.arange(9).expand(4, -1))  # sorted by response
    out = dcal.global_local_cross_attention(block, common.take(x, index), x)
    close(common.take(out, index.argsort(1)), block(x))
    close(model.encode(images)["glca"], model.glca.norm(block(x)).mean(1))


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
    close(model.encode(images)["glca"], model.glca.norm(local).mean(1))


def test_sec_3_2_with_class_token_readout_glca_does_not_depend_on_the_chosen_patches():
    """The finding in the docstring: R, the rollout and the selection drop out of GLCA's class token, for any M."""
    images, targets = batch()
    for m in (1, 2):
        literal = tiny(glca_blocks=m, local_queries="always", pwca=False).eval()
        for p in literal.glca.parameters():
            nn.init.normal_(p, std=0.3)
        reference = literal.encode(images)["glca"]
        for change in (dict(local_ratio=0.1), dict(local_ratio=1.0), dict(select="random"), dict(select="last")):
            close(rebuilt(literal, **change).encode(images)["glca"], reference, rtol=0, atol=1e-12)
        gradients = []
        for queries in ("always", "needed"):  # the shortcut is exact in its gradient too
            model = rebuilt(literal, local_queries=queries)
            model(images, targets)[0].backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [dict(glca_readout="mean"), dict(kv="local")])
def test_sec_3_2_the_mean_readout_and_local_keys_do_depend_on_the_chosen_patches(change):
    model, (images, _) = tiny(**change).eval(), batch()
    a = model.encode(images)["glca"]
    for other in (dict(local_ratio=0.6), dict(select="random"), dict(select="last")):
        assert not torch.allclose(rebuilt(model, **other).encode(images)["glca"], a)


def test_sec_4_4_local_keys_are_the_selected_tokens_own_and_the_last_layer_alone_may_select():
    model, (images, _) = tiny(depth=4, kv="local").eval(), batch()
    _, layers = model.sa_branch(images)
    for select, row in (("rollout", dcal.class_rollout(layers[:3])), ("last", weights(layers[2])[:, 0])):
        local = common.take(layers[3][0], dcal.select_local(row, 0.3))
        expected = model.glca.norm(model.glca.blocks[0](local))[:, 0]
        close(rebuilt(model, select=select).encode(images)["glca"], expected)


def test_sec_4_1_uncertainty_weights():
    losses, s = torch.tensor([2.0, 4.0]), torch.zeros(2, requires_grad=True)
    total = dcal.uncertainty_weighted(losses, s).sum()
    assert total.item() == 3.0 and torch.autograd.grad(total, s)[0].tolist() == [-0.5, -1.5]
    best = losses.log().requires_grad_()
    total = dcal.uncertainty_weighted(losses, best).sum()
    assert total.item() == pytest.approx(0.5 * (2 + math.log(8)), abs=1e-6)
    close(torch.autograd.grad(total, best)[0], torch.zeros(2), rtol=0, atol=1e-6)


def test_sec_4_1_the_total_is_the_weighted_sum_of_the_branches_and_a_single_branch_is_not_weighted():
    images, targets = batch()
    model = tiny(depth=3).train()
    with torch.no_grad():
        model.log_vars.copy_(torch.tensor([0.1, -0.2, 0.3]))
    loss, terms = model(images, targets)
    s = dict(zip(dcal.BRANCHES, model.log_vars.tolist()))
    expected = sum(0.5 * (math.exp(-s[n]) * terms[n].item() + s[n]) for n in s)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert all(terms[f"s_{n}"].item() == s[n] for n in s) and not any(t.requires_grad for t in terms.values())
    loss.backward()
    assert (model.log_vars.grad != 0).all()
    without = tiny(depth=3, glca=False)
    loss, terms = without(images, targets)
    loss.backward()
    assert set(terms) == {"sa", "pwca", "s_sa", "s_pwca", "top1"}
    assert without.log_vars.grad[1] == 0 and without.log_vars.grad[[0, 2]].abs().min() > 0
    for model in (tiny(depth=3, glca=False, pwca=False), tiny(depth=3, dynamic_loss=False)):
        loss, terms = model(images, targets)
        assert loss.item() == pytest.approx(sum(v.item() for k, v in terms.items() if k != "top1"), rel=1e-6)
        assert not model.log_vars.requires_grad


def test_sec_4_1_each_branch_learns_the_target_of_the_first_image():
    model, (images, targets) = tiny(depth=3).train(), batch(2)
    features = model.encode(images, pairs(1, 0))  # of two images the pairs are known
    _, terms = model(images, targets)
    for name, head in (("sa", model.head), ("glca", model.glca_head), ("pwca", model.head)):
        log_p = head(features[name]).log_softmax(1)
        assert terms[name].item() == pytest.approx(-(log_p[0, 0] + log_p[1, 1]).item() / 2)
    smooth = rebuilt(model, label_smoothing=0.2)(images, targets)[1]["sa"]
    log_p = model.head(features["sa"]).log_softmax(1)
    assert smooth.item() == pytest.approx(0.8 * terms["sa"].item() - 0.2 * log_p.mean().item())
    answers = model.classify(features)
    assert terms["top1"] == (common.fuse([answers["sa"], answers["glca"]]).argmax(1) == targets).float().mean()


def test_the_log_variances_never_fall_below_their_floor_but_may_leave_it():
    model, (images, targets) = tiny(depth=2, log_var_floor=-2.0).train(), batch()
    nn.init.constant_(model.log_vars, -5)
    loss, terms = model(images, targets)
    assert terms["s_sa"] == -2 and (model.log_vars == -2).all()
    loss.backward()
    assert (model.log_vars.grad < 0).all()  # losses above e^-2 push them up again


def test_sec_4_1_inference_adds_the_probabilities_and_sec_4_6_one_branch_uses_its_head_alone():
    model, (images, _) = tiny(depth=3).eval(), batch()
    nn.init.normal_(model.glca_head.weight)
    heads = model.heads(images)
    assert list(heads) == ["sa", "glca", "both"]
    close(2 * heads["both"].exp(), heads["sa"].softmax(1) + heads["glca"].softmax(1))
    for infer in heads:
        close(rebuilt(model, infer=infer)(images), heads[infer])
    only_sa = rebuilt(model, infer="sa")
    assert common.count_macs(only_sa, images) == common.count_macs(tiny(depth=3, glca=False).eval(), images)
    plain = tiny(depth=3, glca=False, pwca=False).eval()
    assert list(plain.heads(images)) == ["sa"]
    close(plain(images), plain.head(plain.vit.norm(plain.vit.features(images))[:, 0]).float())


def test_sec_4_1_reid_features_are_both_class_tokens_before_the_neck_side_by_side_and_of_length_one():
    model, (images, _) = tiny("reid", depth=3).eval(), batch()
    nn.init.normal_(model.glca.norm.weight)
    features = model.encode(images)
    both = torch.cat([features["sa"], features["glca"]], 1).float()
    close(model(images), both / both.norm(dim=1, keepdim=True))
    assert {k: v.shape for k, v in model.heads(images).items()} == {"sa": (4, 12), "glca": (4, 12), "both": (4, 24)}
    close(rebuilt(model, infer="sa")(images), F.normalize(features["sa"].float(), dim=1))


def test_sec_4_1_triplet_loss_takes_the_farthest_positive_and_the_nearest_negative():
    features, ids, expected = torch.randn(12, 6), torch.arange(12) // 4, []
    for a in range(12):
        far = [(features[a] - x).norm().item() for x in features]
        positive = max(d for d, i in zip(far, ids) if i == ids[a])
        negative = min(d for d, i in zip(far, ids) if i != ids[a])
        expected.append(math.log1p(math.exp(positive - negative)))
    assert dcal.triplet_loss(features, ids).item() == pytest.approx(sum(expected) / 12, rel=1e-4)
    same = torch.ones(4, 6, requires_grad=True)
    dcal.triplet_loss(same, pairs(0, 0, 1, 1)).backward()
    assert same.grad.isfinite().all()  # no infinite slope at distance 0


def test_a_batch_of_one_identity_has_no_triplets_and_says_so_instead_of_a_loss_of_zero():
    model, (images, _) = tiny("reid", depth=2).train(), batch()
    with pytest.raises(ValueError, match="one identity.*no negatives"):
        model(images, pairs(3, 3, 3, 3))
    assert model(images, pairs(3, 3, 3, 1))[0].isfinite()


def test_sec_4_1_reid_loss_is_cross_entropy_after_the_neck_plus_triplet_before_it():
    model, (images, _) = tiny("reid", depth=3, pwca=False, dynamic_loss=False).train(), batch()
    targets = pairs(0, 0, 1, 1)
    features = model.encode(images)
    _, terms = model(images, targets)
    for name, neck in (("sa", model.head), ("glca", model.glca_head)):
        f = features[name]
        normed = (f - f.mean(0)) / (f.var(0, unbiased=False) + 1e-5).sqrt()
        expected = F.cross_entropy(normed @ neck.classifier.weight.T, targets) + dcal.triplet_loss(f, targets)
        assert terms[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluating_the_loss_needs_no_pairs_and_training_on_one_image_says_what_does():
    model, (images, targets) = tiny(depth=2).eval(), batch(1)
    loss, terms = model(images, targets)
    assert loss.isfinite() and "pwca" not in terms and set(terms) >= {"sa", "glca", "top1"}
    with pytest.raises(ValueError, match="no pairs for PWCA.*--no-pwca"):
        model.train()(images, targets)
    assert rebuilt(model, pwca=False)(images, targets)[0].isfinite()


@torch.no_grad()
def test_fig3_an_image_paired_with_itself_keeps_three_quarters_of_its_rollout_in_each_pwca_block():
    model, (images, _), partner = tiny().eval(), batch(), torch.arange(4)
    _, layers = model.sa_branch(images)
    own, other = dcal.pair_rollout(layers, model.pwca_branch(layers, partner)[1], partner)
    close(own.sum(1), torch.full((4,), 0.75**12), rtol=1e-5, atol=0)
    close(own + other, dcal.class_rollout(layers))
    own, other = dcal.pair_rollout(layers, [], partner)  # without PWCA nothing leaves the image
    close(own, dcal.class_rollout(layers))
    assert (other == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("T", [4, 2])
def test_fig3_pair_rollout_is_the_class_row_of_the_product_over_the_tokens_of_both_images(T):
    model, (images, _), partner = tiny(depth=4, pwca_blocks=T).eval(), batch(2), pairs(1, 0)
    _, layers = model.sa_branch(images)
    pair_layers = model.pwca_branch(layers, partner)[1]
    own, other = dcal.pair_rollout(layers, pair_layers, partner)
    for b in range(2):
        whole = []
        for depth, layer in enumerate(layers):  # I1's tokens see both images, I2's only their own
            rows = F.pad(weights(layer)[b], (0, 9))
            if depth >= 4 - T:
                q1, k1 = pair_layers[depth - 4 + T]
                keys = torch.cat([k1[b : b + 1], layer[2][1 - b : 2 - b]], 2)
                rows = common.attention_weights(q1[b : b + 1], keys)[0]
            whole.append(torch.cat([rows, F.pad(weights(layer)[1 - b], (9, 0))]))
        close(torch.cat([own[b], other[b]]), common.rollout(whole)[0])


def test_where_gives_the_patches_of_the_highest_rollout_over_the_blocks_before_glca_row_by_row():
    model, (images, _) = tiny(local_ratio=0.5, glca_blocks=2).eval(), batch()
    boxes, scores = model.where(images)
    row = common.rollout([weights(layer) for layer in model.sa_branch(images)[1][:10]])[:, 0, 1:]
    assert boxes.shape == (4, 4, 4) and (scores.diff(dim=1) <= 0).all()
    for b in range(4):
        for box, score, patch in zip(boxes[b].tolist(), scores[b], row[b].argsort(descending=True)):
            y, x = divmod(patch.item(), 2)  # two columns
            assert box == [8 * x, 8 * y, 8 * x + 8, 8 * y + 8]
            assert score.item() == pytest.approx(row[b, patch].item(), rel=1e-4)


def test_fig3_and_fig4_draw_the_rollout_the_patches_and_the_pair_on_one_scale(monkeypatch):
    model, (images, _), maps, boxes, captions = tiny(depth=3).eval(), batch(3), [], [], []
    heat, draw, panels = common.heat, common.draw_boxes, common.panels
    monkeypatch.setattr(common, "heat", lambda photo, m, **how: maps.append((photo, m, how)) or heat(photo, m, **how))
    monkeypatch.setattr(common, "draw_boxes", lambda photo, b, *how: boxes.append(b) or draw(photo, b, *how))
    monkeypatch.setattr(common, "panels", lambda p, text, *how: captions.append(list(text)) or panels(p, text, *how))
    pages = model.figure(images)
    assert len(pages) == 3 and pages[0].height == 448 + 22  # persons are twice as high as wide
    _, layers = model.sa_branch(images)
    own, other = dcal.pair_rollout(layers, model.pwca_branch(layers, pairs(1, 2, 0))[1], pairs(1, 2, 0))
    close(torch.stack(boxes), model.where(images)[0])
    for i in range(3):
        (photo, sa, _), (same, a, on_own), (distractor, b, on_other) = maps[3 * i : 3 * i + 3]
        close(torch.stack([sa, a, b]).flatten(1), torch.stack([dcal.class_rollout(layers), own, other])[:, i, 1:])
        assert same is photo and distractor.tobytes() == common.to_pil(images[(i + 1) % 3], "half").tobytes()
        low, top = a.quantile(0.02), a.quantile(0.98)  # the distractor is brighter only where it gets more
        assert on_own["span"] == (low, top) and on_other["span"] == (b.quantile(0.02), max(top, b.quantile(0.98)))
        assert captions[i][2:] == ["top 2 patches", f"PWCA: {own[i].sum():.0%} stays here",
                                   f"distractor: {other[i].sum():.0%}"]
    for alone in (rebuilt(model, pwca=False).figure(images), model.figure(images[:1])):
        assert len(captions[-1]) == 3 and alone[0].width < pages[0].width


def test_sec_4_1_the_hybrid_stem_standardises_its_kernels_and_pads_like_tensorflow():
    conv = dcal.StdConv(4, 6, 3, 2, bias=False)
    nn.init.normal_(conv.weight, mean=3.0, std=2.0)
    x, w = torch.randn(1, 4, 8, 8), conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), unbiased=False, keepdim=True) + 1e-5)
    close(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2))  # 3x3, stride 2: right and bottom only
    conv = dcal.StdConv(1, 1, 7, 2, bias=False)
    one = torch.zeros(1, 1, 32, 32)
    one[..., 0, 0] = 1
    kernel = (conv.weight - conv.weight.mean()) / (conv.weight.std(unbiased=False) + 1e-5)
    close(conv(one)[0, 0, :2, :2], kernel[0, 0, [2, 0]][:, [2, 0]])  # 7x7: two pixels before, three after
    assert dcal.StdConv(1, 1, 1, 2, bias=False)(one).shape[2:] == (16, 16)
    block = dcal.Bottleneck(64, 256, 2).eval()
    x = torch.randn(1, 64, 8, 8)
    y = F.relu(block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x))))))
    close(block(x), F.relu(block.norm3(block.conv3(y)) + block.downsample.norm(block.downsample.conv(x))))
    assert block(x).shape == (1, 256, 4, 4) and (block.norm1.eps, block.norm1.num_groups) == (1e-6, 32)
    assert isinstance(dcal.Bottleneck(256, 256, 1).downsample, nn.Identity)
    stem, x = dcal.ResNetStem().eval(), torch.randn(1, 3, 32, 48)
    y = F.relu(stem.stem(x))
    close(stem(x), stem.stages(F.max_pool2d(F.pad(y, (0, 1, 0, 1)), 3, 2)))
    assert stem(x).shape == (1, 1024, 2, 3) and [len(s.blocks) for s in stem.stages] == [3, 4, 9]


def test_sec_4_1_the_hybrids_npz_names_are_timms():
    _, model = count("cub", 9, backbone="r50_vit_base", normalize="half", image_size=(64, 64))
    own = model.vit.state_dict()
    google = {"conv_root/kernel": (7, 7, 3, 64), "gn_root/scale": (1, 1, 1, 64), "gn_root/bias": (1, 1, 1, 64)}
    for b, (units, mid, inputs) in enumerate(((3, 64, 64), (4, 128, 256), (9, 256, 512)), 1):
        for u in range(1, units + 1):
            at, width = f"block{b}/unit{u}/", inputs if u == 1 else 4 * mid
            google |= {f"{at}conv1/kernel": (1, 1, width, mid), f"{at}conv2/kernel": (3, 3, mid, mid)}
            google |= {f"{at}conv3/kernel": (1, 1, mid, 4 * mid)}
            if u == 1:
                google |= {f"{at}conv_proj/kernel": (1, 1, width, 4 * mid)}
            for j in ("1", "2", "3", "_proj")[: 4 if u == 1 else 3]:
                google |= {f"{at}gn{j}/{p}": (1, 1, 1, mid if j in "12" else 4 * mid) for p in ("scale", "bias")}
    google |= {"cls": (1, 1, 768), "embedding/kernel": (1, 1, 1024, 768), "embedding/bias": (768,)}
    tensors = {k: torch.empty(v, device="meta") for k, v in google.items()}
    mapped = common.vit_state(tensors, dcal.RENAMES)
    assert {n for n in own if n.startswith("patch_embed")} <= set(mapped)
    assert all(own[n].shape == v.shape for n, v in mapped.items())
    assert model.vit.official.endswith("imagenet21k/R50%2BViT-B_16.npz")


def changed(recipe, default):
    return {k: v for k, v in dataclasses.asdict(recipe).items() if v != getattr(default, k)}


def test_sec_4_1_every_field_of_every_recipe():
    """Against the paper, DeiT's rule and TransReID's code: what is not listed has the default."""
    default = common.Recipe()
    assert changed(default, default) == {} and (default.crop, default.hflip) == ("random", 0.5)
    switches = dict(
        backbone="deit_tiny", glca=True, glca_blocks=1, local_ratio=0.1, select="rollout", kv="global",
        glca_readout="cls", local_queries="needed", pwca=True, pwca_blocks=12, pair="any", image_noise=0.0,
        label_noise=0.0, dynamic_loss=True, log_var_floor=-10.0, bias_lr=1.0, infer="both")
    common_fields = {f.name for f in dataclasses.fields(common.Recipe)}
    assert {k: v for k, v in dataclasses.asdict(dcal.Recipe()).items() if k not in common_fields} == switches
    assert all(getattr(dcal.Recipe(), name) == getattr(default, name) for name in common_fields)
    fgvc = dict(
        image_size=(448, 448), resize=(550, 550), interpolation="bicubic", batch_size=16, optimizer="adamw",
        lr=5e-4, lr_batch=512, weight_decay=0.05, warmup=5, warmup_lr=1e-6, drop_path=0.1, weights="default")
    person = dict(
        task="reid", backbone="vit_base", image_size=(256, 128), interpolation="bicubic", normalize="half", pad=10,
        erasing=0.5, local_ratio=0.3, batch_size=64, instances=4, epochs=120, lr=0.008, weight_decay=1e-4, warmup=5,
        warmup_lr=8e-5, min_lr=1.6e-5, drop_path=0.1, bias_lr=2.0, log_var_floor=-2.0, weights="default")
    toy = dict(
        backbone="toy_vit", toy_preset="birds-easy", image_size=(64, 64), pad=4, interpolation="bicubic", epochs=40,
        optimizer="adamw", lr=1.5e-3, weight_decay=0.05, schedule="onecycle")
    expected = {name: fgvc for name in ("cub", "cars", "aircraft", "folder")} | {"toy": toy}
    expected |= {name: person for name in ("market1501", "dukemtmc", "msmt17")}
    expected["veri776"] = person | {"image_size": (256, 256)}
    assert {name: changed(recipe, dcal.Recipe()) for name, recipe in dcal.RECIPES.items()} == expected
    assert (default.epochs, default.momentum, default.optimizer, default.schedule) == (100, 0.9, "sgd", "cosine")
    assert (default.batch_size, default.label_smoothing, default.amp) == (32, 0, "auto")


def test_sec_4_1_learning_rates_follow_deits_and_transreids_rules():
    r, steps, epoch = dcal.RECIPES["cub"], 100 * 374, 374
    rates = [common.lr_at(r, s, steps, epoch) for s in (0, 5 * epoch, steps)]
    assert rates == pytest.approx([1e-6, 5e-4 / 512 * 16, 0], abs=1e-12)
    r = dcal.RECIPES["msmt17"]
    rates = [common.lr_at(r, s, 120 * 500, 500) for s in (0, 5 * 500, 120 * 500)]
    assert rates == pytest.approx([0.01 * 0.008, 0.008, 0.002 * 0.008])


DATA = {"1": ("cub", "cars", "aircraft"), "2": ("veri776", "msmt17", "market1501", "dukemtmc"),
        "3": ("cub", "veri776", "msmt17"), "4": ("cub", "msmt17"), "infer": ("cub", "veri776"),
        "fig2-glca": ("cub", "msmt17"), "fig2-pwca": ("cub", "msmt17"), "glca": ("cub",), "baseline": ("cub",)}
PLAIN, GLCA, PWCA = {"glca": False, "pwca": False}, {"pwca": False}, {"glca": False}
VITS = [{"backbone": b, "normalize": n} for b, n in (
    ("deit_tiny", "imagenet"), ("deit_small", "imagenet"), ("deit_base", "imagenet"), ("vit_base", "half"),
    ("r50_vit_base", "half"))]
PAIRS_4 = ("noise", "intra", "inter", "mixed")
OVERRIDES = {
    "1": [vit | change for vit in VITS for change in (PLAIN, {})],
    "2": [vit | change for vit in VITS[:4] for change in (PLAIN, {})],
    "3": [PLAIN, GLCA, PWCA, {}],
    "4": [PLAIN, PWCA, PLAIN | {"image_noise": 0.5}, PLAIN | {"label_noise": 0.1}] + [
        PWCA | {"pair": pair} | ({"instances": 4} if pair in ("intra", "mixed") else {}) for pair in PAIRS_4],
    "infer": [{}, {"eval": {"infer": "sa"}}, {"eval": {"infer": "glca"}}],
    "fig2-glca": [GLCA, GLCA | {"glca_blocks": 2}, GLCA | {"glca_blocks": 3}],
    "fig2-pwca": [PLAIN, PWCA | {"pwca_blocks": 4}, PWCA | {"pwca_blocks": 8}, PWCA],
    "glca": [GLCA | {"kv": "local"}] * 2 + [GLCA | {"select": s} for s in ("random", "last")] + [GLCA],
    "baseline": [PLAIN, {}],
}
VALUES = {  # from the paper, row by row; mAP and rank 1 in turn where a table has both
    "1": "82.1 84.6 85.8 87.6 88.0 88.8 90.8 91.4 91.3 92.0",
    "1-cars": "87.2 89.4 90.7 92.3 92.9 93.8 92.5 93.4 94.0 95.3",
    "1-aircraft": "84.7 87.4 88.1 90.0 90.3 92.6 90.0 91.5 92.4 93.3",
    "2": "71.3 94.3 74.1 94.7 76.7 95.5 78.1 95.9 78.3 95.9 80.0 96.5 78.1 96.0 80.2 96.9",
    "2-msmt17": "42.1 63.9 44.9 68.2 53.3 75.0 55.1 77.3 60.5 81.6 62.3 83.1 61.6 81.4 64.0 83.1",
    "2-market1501": "77.9 90.3 79.8 91.8 84.3 93.7 85.3 94.0 86.6 94.4 87.2 94.5 87.1 94.3 87.5 94.7",
    "2-dukemtmc": "69.5 82.9 71.7 84.9 75.7 87.6 77.4 87.9 79.1 88.7 80.2 89.6 78.9 89.4 80.1 89.0",
    "3": "82.1 83.1 83.1 84.6",
    "3-veri776": "78.1 96.0 79.5 96.5 79.2 96.5 80.2 96.9",
    "3-msmt17": "61.6 81.4 63.7 83.0 62.8 82.3 64.0 83.1",
    "4": "82.1 83.1 77.3 81.6 82.1 81.7 83.0 83.0",
    "4-msmt17": "61.6 62.8 56.0 60.8 62.1 62.2 62.7 62.5",
    "infer": "84.6 84.3 None", "infer-veri776": "80.2 80.1 None",
    "fig2-glca": "83.1 None None", "fig2-glca-msmt17": "63.7 None None",
    "fig2-pwca": "82.1 None None 83.1", "fig2-pwca-msmt17": "61.6 None None 62.8",
    "glca": "82.1 82.6 82.6 82.8 83.1", "baseline": "82.1 84.6",
}


def test_tables_1_to_4_figure_2_and_the_sections_have_the_papers_rows_and_values():
    found = {}
    for number, sets in DATA.items():
        for i, name in enumerate(sets):
            table = dcal.TABLES[number + f"-{name}" * (i > 0)]
            found[number + f"-{name}" * (i > 0)] = table
            both = number in "23" and name in DATA["2"]
            metric = "top1" if name in DATA["1"] else "mAP rank1" if both else "mAP"
            assert (table.data, table.metric) == (name, metric)
            assert [overrides for _, overrides, _ in table.rows] == OVERRIDES[number]
            values = [v for _, _, value in table.rows for v in (value if both else (value,))]
            assert " ".join(map(str, values)) == VALUES[number + f"-{name}" * (i > 0)]
    assert found.keys() == dcal.TABLES.keys()
    names = [name for name, *_ in dcal.TABLES["1"].rows]
    backbones = ["DeiT-Tiny", "DeiT-Small", "DeiT-Base", "ViT-Base", "R50-ViT-Base"]
    assert names == [b + more for b in backbones for more in ("", " + DCAL")]
    assert [name for name, *_ in dcal.TABLES["2"].rows] == names[:8]


def count(name, classes, **switches):
    with torch.device("meta"):
        model = dcal.build(dataclasses.replace(dcal.RECIPES[name], weights="none", **switches), classes)
    return sum(p.numel() for p in model.parameters()), model.eval()


def test_table3_parameters_as_they_are():
    whole, model = count("cub", 200)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.vit, model.glca, model.head)]
    assert whole - 3 == 6_159_760 and sizes == [5_637_312, 444_864 + 384, 38_600]  # and three log-variances
    for name, backbone in (("msmt17", 85_746_432), ("veri776", 85_844_736)):
        assert sum(p.numel() for p in count(name, 1041)[1].vit.parameters()) == backbone
    _, model = count("cub", 200, backbone="r50_vit_base", normalize="half")
    assert sum(p.numel() for p in model.vit.parameters()) == 98_341_696
    assert sum(p.numel() for p in model.glca.parameters()) == 7_087_872 + 1_536


@pytest.fixture
def no_rollout(monkeypatch):
    """Queries at random need no rollout, which a meta device cannot compute."""
    monkeypatch.setattr(common, "cls_rollout", lambda layers: layers[0][0].new_empty(1, layers[0][0].shape[2]))


def table_3_cost(name, glca):
    """Parameters and FLOPs as Table 3 seems to count them: M and G on CUB, in units of 2^20 and 2^30 in Re-ID."""
    _, model = count(name, 200, glca=glca, local_queries="always", select="random")
    reid, size = model.recipe.task == "reid", model.recipe.image_size
    kinds = (nn.Linear, nn.Conv2d) if reid else (nn.Linear, nn.Conv2d, nn.LayerNorm)
    modules = [m for n, m in model.named_modules() if isinstance(m, kinds) and not (reid and "head" in n)]
    parameters = sum(p.numel() for m in modules for p in m.parameters())
    N, C = model.vit.pos_embed.shape[1:]
    queries = 1 + int(model.recipe.local_ratio * (N - 1)) if glca else 0
    products = 2 * N * C * (12 * N + queries)  # of attention: q k^T and S v
    flops = 2 * (common.count_macs(model, torch.empty(1, 3, *size, device="meta")) - products)
    return (parameters / 2**20, flops / 2**30) if reid else (parameters / 1e6, flops / 1e9)


def test_table3_parameters_and_flops_in_the_papers_convention_agree_but_for_two_cells(no_rollout):
    paper = {"cub": (5.5, 8.6, 6.0, 8.8), "veri776": (81.6, 41.1, 88.4, 42.4), "msmt17": (81.6, 20.5, 88.4, 21.3)}
    lines, differ = ["Baseline, + PWCA", "+ GLCA, Ours"], []
    for name, cells in paper.items():
        for glca in (False, True):
            ours, theirs = table_3_cost(name, glca), cells[2 * glca : 2 * glca + 2]
            lines[glca] += f" {ours[0]:.2f}M {theirs[0]}M {ours[1]:.2f}G {theirs[1]}G"
            differ += [b for a, b in zip(ours, theirs) if abs(a - b) > 0.0505]
    assert differ == [8.8, 41.1]
    printed = [" ".join(text.replace("*", " ").split()) for text in dcal.__doc__.splitlines()]
    assert set(lines) <= set(printed)  # as the docstring has them


@pytest.mark.parametrize("change, giga", [
    (dict(glca=False), 7.122), (dict(local_queries="always", select="random"), 7.233),
    (dict(backbone="vit_base", glca=False), 78.49), (dict(backbone="r50_vit_base", glca=False), 94.4)])
def test_table3_multiplications_with_those_of_attention(change, giga, no_rollout):
    _, model = count("cub", 200, **change)
    macs = common.count_macs(model, torch.empty(1, 3, 448, 448, device="meta"))
    assert macs / 1e9 == pytest.approx(giga, abs=6e-3 if giga < 90 else 0.06)


def test_sec_4_1_what_a_built_model_starts_from():
    recipe = dataclasses.replace(dcal.RECIPES["cub"], weights="none", image_size=(32, 32))
    model = dcal.build(recipe, 200)
    rates = [block.drop_path.p for block in model.vit.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)]) and model.glca.blocks[0].drop_path.p == 0.1
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    for head in (model.head, model.glca_head):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05) and (head.bias == 0).all()
    assert model.log_vars.tolist() == [0, 0, 0] and model.vit.blocks[0].attn.heads == 3
    last = model.vit.blocks[-1].state_dict()
    assert all(torch.equal(last[k], v) for k, v in model.glca.blocks[0].state_dict().items())
    neck = dcal.build(dataclasses.replace(dcal.RECIPES["market1501"], weights="none", backbone="toy_vit"), 751).head
    assert isinstance(neck.norm, nn.BatchNorm1d) and not neck.norm.bias.requires_grad and neck.classifier.bias is None
    assert neck.classifier.weight.std().item() == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("name", ["toy", "market1501"])
def test_sec_4_1_weight_decay_spares_biases_norms_tokens_and_loss_weights_and_reid_biases_run_twice_as_fast(name):
    recipe = dataclasses.replace(dcal.RECIPES[name], weights="none", backbone="toy_vit")
    model = dcal.build(recipe, 10)
    own = {id(p): g for g in dcal.param_groups(model, recipe) for p in g["params"]}
    for n, p in model.named_parameters():
        if p.requires_grad:
            free = p.ndim == 1 or n in ("vit.cls_token", "vit.pos_embed")
            assert own[id(p)]["weight_decay"] == (0 if free else recipe.weight_decay)
            assert own[id(p)]["lr_scale"] == (2.0 if name == "market1501" and n.endswith(".bias") else 1.0)


def test_glca_starts_from_the_last_block_of_a_plain_run_and_from_its_own_of_a_run_that_had_it(tmp_path):
    plain = dataclasses.replace(dcal.RECIPES["toy"], image_size=(32, 32), glca=False, pwca=False)
    trained, saved = dcal.build(plain, 4), tmp_path / "last.pt"
    for p in trained.parameters():
        nn.init.normal_(p, std=0.1)
    recipe = {"image_size": (32, 32)}
    common.save_checkpoint(saved, {"model": trained.state_dict(), "recipe": recipe})
    both = dataclasses.replace(plain, glca=True, pwca=True, weights=str(tmp_path))
    tuned = dcal.build(both, 7)
    for mine, theirs in ((tuned.glca.blocks[0], trained.vit.blocks[-1]), (tuned.glca.norm, trained.vit.norm)):
        assert all(torch.equal(mine.state_dict()[k], v) for k, v in theirs.state_dict().items())
    assert tuned.head.out_features == 7 and tuned.glca.norm.weight is not tuned.vit.norm.weight
    nn.init.normal_(tuned.glca.norm.weight)
    common.save_checkpoint(saved, {"model": tuned.state_dict(), "recipe": recipe})
    assert torch.equal(dcal.build(both, 3).glca.norm.weight, tuned.glca.norm.weight)
    dcal.build(dataclasses.replace(both, glca=False), 3)  # a run with GLCA as the start of a plain ViT
    with pytest.raises(ValueError, match="missing"):
        dcal.build(dataclasses.replace(both, glca_blocks=2), 3)


@pytest.mark.parametrize("change, message", [
    (dict(glca_blocks=4), "takes 1 to 3"), (dict(infer="glca", glca=False), "--infer glca needs --glca"),
    (dict(weights="default"), "no official weights"), (dict(local_ratio=0.0), "--local-ratio")])
def test_settings_that_cannot_work_say_what_is_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        dcal.build(dataclasses.replace(dcal.RECIPES["toy"], **change), 8)
