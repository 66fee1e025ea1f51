"""tdsa.py against the paper: each equation by hand or loop by loop, counts, recipes, tables, and what a user can get wrong."""
import dataclasses
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18
from torchvision.models.vgg import cfgs, make_layers

import common
import tdsa

TOY = tdsa.RECIPES["toy"]
SMALL = replace(TOY, image_size=(48, 32))


def model_of(classes=4, **changes):
    torch.manual_seed(0)
    return tdsa.build(replace(SMALL, **changes), classes)


def batch(images=3, classes=4, size=(48, 32), seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, *size, generator=g), torch.arange(images) % classes


def map_of(*shape, seed=0, relu=False):
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return features.relu() if relu else features


HAND = torch.tensor([[2.0, 0], [0, 2], [1, 1], [1, 1]]).view(1, 4, 1, 2)  # two classes of two channels on a 1 x 2 map

# ------------------------------------------------------------------------------------------------ Eqs. 3 to 6


def value(scalar):
    return scalar.detach().item()


def literal_mc_loss(features, targets, channels, mask):
    """Eqs. 3 to 6, one number after the other."""
    B, C, H, W = features.shape
    classes, dis, spread = C // channels, 0.0, 0.0
    for b in range(B):
        g = []
        for k in range(classes):
            pooled = 0.0
            for i in range(H):
                for j in range(W):
                    pooled = pooled + max((features[b, k * channels + m, i, j] * mask[k * channels + m] for m in range(channels)), key=value)
            g.append(pooled / (H * W))
            softmax = []
            for m in range(channels):
                e = [[features[b, k * channels + m, i, j].exp() for j in range(W)] for i in range(H)]
                total = sum(sum(row) for row in e)
                softmax.append([[v / total for v in row] for row in e])
            spread = spread + sum(max((softmax[m][i][j] for m in range(channels)), key=value) for i in range(H) for j in range(W)) / channels
        dis = dis - (g[int(targets[b])].exp() / sum(v.exp() for v in g)).log()
    return dis / B, 1 - spread / (B * classes)


def test_eqs_3_to_6_by_hand_on_a_map_of_two_places():
    target = torch.tensor([0])
    dis, div = tdsa.mc_loss(HAND, target, 2, torch.ones(4))
    assert tdsa.class_spread(HAND, 2)[0].tolist() == pytest.approx([2 * torch.sigmoid(torch.tensor(2.0)).item(), 1.0], abs=1e-6)
    assert tdsa.class_spread(HAND, 2)[0, 0].item() == pytest.approx(1.7615942, abs=1e-6)
    assert tdsa.class_scores(HAND, 2)[0].tolist() == [2, 1]
    assert (dis.item(), div.item()) == pytest.approx((0.3132617, 0.3096015), abs=1e-6)
    masked = torch.tensor([1.0, 0, 1, 0])
    assert tdsa.class_scores(HAND, 2, masked)[0].tolist() == [1, 1]
    dis, div = tdsa.mc_loss(HAND, target, 2, masked)
    assert (dis.item(), div.item()) == pytest.approx((math.log(2), 0.3096015), abs=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_eqs_3_to_6_loop_by_loop_in_value_and_gradient(channels):
    targets, mask = torch.tensor([1, 0]), tdsa.cwa_mask(3, channels, torch.Generator().manual_seed(3))
    ours, literal = (map_of(2, 3 * channels, 3, 2).requires_grad_() for _ in range(2))
    dis, div = tdsa.mc_loss(ours, targets, channels, mask)
    dis_l, div_l = literal_mc_loss(literal, targets, channels, mask)
    assert (dis.item(), div.item()) == pytest.approx((dis_l.item(), div_l.item()), abs=1e-6)
    for ours_term, literal_term in ((dis, dis_l), (div, div_l)):
        if channels > 1 or ours_term is dis:  # with one channel diversity is the constant 0
            mine, = torch.autograd.grad(ours_term, ours, retain_graph=True)
            theirs, = torch.autograd.grad(literal_term, literal, retain_graph=True)
            assert theirs.abs().max() > 1e-3 and torch.allclose(mine, theirs, atol=1e-7)


@pytest.mark.parametrize("channels, ones", [(1, 1), (3, 2), (6, 3), (9, 5), (12, 6), (15, 8)])
def test_eq3_mask_has_ceil_half_ones_in_every_class(channels, ones):
    mask = tdsa.cwa_mask(40, channels, torch.Generator().manual_seed(0))
    assert mask.shape == (40 * channels,) and set(mask.tolist()) <= {0.0, 1.0}
    assert mask.view(40, channels).sum(1).tolist() == [ones] * 40


@pytest.mark.parametrize("channels, patterns", [(3, 3), (6, 20)])
def test_eq3_mask_reaches_every_pattern_about_equally_often_and_classes_draw_on_their_own(channels, patterns):
    rows = tdsa.cwa_mask(4000, channels, torch.Generator().manual_seed(0)).view(-1, channels)
    kinds, counts = rows.unique(dim=0, return_counts=True)
    assert len(kinds) == patterns == math.comb(channels, (channels + 1) // 2)
    assert (counts / 4000 * patterns - 1).abs().max() < 0.25


def test_eq3_mask_comes_from_torchs_random_state_or_the_generator_given():
    torch.manual_seed(5)
    first, second = tdsa.cwa_mask(50, 3), tdsa.cwa_mask(50, 3)
    torch.manual_seed(5)
    assert torch.equal(tdsa.cwa_mask(50, 3), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    given = [tdsa.cwa_mask(50, 3, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*given) and torch.equal(torch.get_rng_state(), state)


def test_eq3_a_masked_channel_counts_as_zero_so_that_zero_wins_over_negative_ones():
    features = torch.tensor([-1.0, -2.0, -3.0]).view(1, 3, 1, 1)
    assert tdsa.class_scores(features, 3, torch.tensor([1.0, 1, 1])).item() == -1
    assert tdsa.class_scores(features, 3, torch.tensor([1.0, 1, 0])).item() == 0


def test_eq3_one_mask_serves_the_whole_batch_and_one_for_each_image_serves_only_it():
    features, mask = map_of(2, 6, 2, 2), tdsa.cwa_mask(4, 3, torch.Generator().manual_seed(1)).view(2, 6)
    both = tdsa.class_scores(features, 3, mask)
    for b in range(2):
        alone = tdsa.class_scores(features, 3, mask[b])  # the same mask for both images
        assert torch.equal(both[b], alone[b])
    assert not torch.equal(both[1], tdsa.class_scores(features, 3, mask[0])[1])


def test_eq4_with_all_channels_on_a_relu_map_is_cross_entropy_of_the_pooled_class_maximum():
    features, targets = map_of(4, 12, 5, 3, relu=True), torch.tensor([0, 3, 1, 1])
    pooled = features.view(4, 4, 3, 5, 3).amax(2).mean((2, 3))
    assert torch.allclose(tdsa.mc_loss(features, targets, 3, torch.ones(12))[0], F.cross_entropy(pooled, targets), atol=1e-6)
    assert torch.equal(*(tdsa.mc_loss(features, targets, 3, m)[0] for m in (None, torch.ones(12))))


def test_eq4_of_an_empty_map_is_ln_S():
    assert tdsa.mc_loss(torch.zeros(2, 600, 2, 2), torch.tensor([0, 199]), 3)[0].item() == pytest.approx(5.298317, abs=1e-5)


def test_eq4_does_not_change_when_channels_and_mask_are_permuted_together():
    features, targets, mask = map_of(3, 6, 4, 4), torch.tensor([0, 1, 0]), torch.tensor([1.0, 1, 0, 0, 1, 1])
    order = torch.tensor([2, 0, 1, 4, 5, 3])
    assert torch.allclose(tdsa.mc_loss(features, targets, 3, mask)[0], tdsa.mc_loss(features[:, order], targets, 3, mask[order])[0])
    assert not torch.allclose(tdsa.mc_loss(features, targets, 3, mask)[0], tdsa.mc_loss(features[:, order], targets, 3, mask)[0])


@pytest.mark.parametrize("channels, div", [(3, 0.6666667), (9, 0.8888889)])
def test_eq5_is_one_when_all_channels_of_a_class_look_at_the_same_places(channels, div):
    same = map_of(2, 1, 4, 4).expand(2, 2 * channels, 4, 4)
    for features in (torch.zeros(2, 2 * channels, 4, 4), torch.full((2, 2 * channels, 4, 4), 3.0), same):
        assert torch.allclose(tdsa.class_spread(features, channels), torch.ones(2, 2), atol=1e-6)
        assert tdsa.mc_loss(features, torch.tensor([0, 1]), channels)[1].item() == pytest.approx(div, abs=1e-6)


def test_eq5_is_the_number_of_channels_when_their_peaks_are_apart_and_at_most_the_number_of_places():
    peaks = torch.zeros(1, 3, 2, 2)
    for m in range(3):
        peaks[0, m].view(-1)[m] = 50
    assert tdsa.class_spread(peaks, 3).item() == pytest.approx(3, abs=1e-6)
    assert tdsa.mc_loss(peaks, torch.tensor([0]), 3)[1].item() == pytest.approx(0, abs=1e-6)
    h = tdsa.class_spread(map_of(1, 9, 1, 2) * 20, 9)
    assert 1 < h.item() <= 2 + 1e-6


def test_eq5_ignores_constants_added_to_a_channel_the_order_of_channels_and_the_mask():
    features, targets = map_of(2, 6, 3, 3), torch.tensor([0, 1])
    h = tdsa.class_spread(features, 3)
    assert torch.allclose(tdsa.class_spread(features + torch.arange(6.0).view(1, 6, 1, 1), 3), h, atol=1e-5)
    assert torch.allclose(tdsa.class_spread(features[:, [1, 2, 0, 5, 3, 4]], 3), h, atol=1e-6)
    assert not torch.allclose(tdsa.class_spread(features[:, [0, 1, 3, 2, 4, 5]], 3), h, atol=1e-3)  # a channel that changes class
    masks = torch.zeros(6), torch.ones(6)
    assert torch.equal(*(tdsa.mc_loss(features, targets, 3, m)[1] for m in masks))


def test_eqs_3_and_5_give_the_gradient_of_a_tie_to_one_channel():
    features = torch.zeros(1, 6, 2, 2).requires_grad_()
    dis, div = tdsa.mc_loss(features, torch.tensor([0]), 3)
    grad, = torch.autograd.grad(dis, features)
    assert (grad != 0).sum(1).flatten().tolist() == [2] * 4  # one winner a class, not three with a third each
    pooled = F.max_pool3d(features.view(1, 1, 6, 2, 2), (3, 1, 1)).mean((-1, -2)).view(1, 2)
    oracle, = torch.autograd.grad(F.cross_entropy(pooled, torch.tensor([0])), features)
    assert torch.allclose(grad, oracle)


def test_eq6_in_the_papers_form_is_minus_the_mean_of_h():
    features, targets = map_of(2, 6, 3, 3), torch.tensor([0, 1])
    h = tdsa.class_spread(features, 3)
    assert tdsa.mc_loss(features, targets, 3, form="paper")[1].item() == pytest.approx(-h.mean().item(), abs=1e-6)
    assert tdsa.mc_loss(features, targets, 3, form="code")[1].item() == pytest.approx(1 - h.mean().item() / 3, abs=1e-6)


def test_eq6_alone_drives_free_maps_to_disjoint_peaks():
    features = (0.1 * map_of(1, 6, 3, 3)).requires_grad_()
    before = tdsa.mc_loss(features, torch.tensor([0]), 3)[1].item()
    for _ in range(300):
        div = tdsa.mc_loss(features, torch.tensor([0]), 3)[1]
        grad, = torch.autograd.grad(div, features)
        features = (features - 20 * grad).detach().requires_grad_()
    assert before > 0.6 and div.item() < 0.05


def test_ragged_groups_give_the_first_classes_one_channel_less():
    assert tdsa.class_groups(512, 200) == ((88, 2), (112, 3))
    assert tdsa.class_groups(2048, 200) == ((152, 10), (48, 11))
    assert tdsa.class_groups(600, 200) == ((200, 3),)
    assert tdsa.channels_of_class(tdsa.class_groups(5, 2)).tolist() == [[0, 1, 1], [2, 3, 4]]
    assert tdsa.channels_of_class(((2, 3),)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_mc_loss_of_ragged_groups_is_that_of_each_class_taken_alone():
    features, targets, mask = map_of(2, 8, 3, 3), torch.tensor([0, 2]), torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])
    dis, div = tdsa.mc_loss(features, targets, tdsa.class_groups(8, 3), mask)
    pieces = [(0, 2), (2, 5), (5, 8)]
    g = torch.stack([(features * mask.view(8, 1, 1))[:, a:b].amax(1).mean((1, 2)) for a, b in pieces], 1)
    h = torch.stack([features[:, a:b].flatten(2).softmax(2).amax(1).sum(1) / (b - a) for a, b in pieces], 1)
    assert torch.allclose(dis, F.cross_entropy(g, targets)) and torch.allclose(div, 1 - h.mean(), atol=1e-6)


# ------------------------------------------------------------------------------------------------ Eq. 7


def test_eq7_loop_by_loop_with_nearest_neighbours():
    mid, high = map_of(2, 12, 4, 6), map_of(2, 4, 2, 3, seed=1)
    attended = tdsa.top_down_attention(mid, high, 3, "nearest")
    for b in range(2):
        for c in range(12):
            for i in range(4):
                for j in range(6):
                    gate = 1 / (1 + math.exp(-high[b, c // 3, i // 2, j // 2].item()))
                    assert attended[b, c, i, j].item() == pytest.approx(mid[b, c, i, j].item() * gate, abs=1e-6)


def test_eq7_of_an_empty_high_level_map_halves_the_middle_map():
    mid = map_of(1, 6, 4, 4)
    for mode in ("nearest", "bilinear", "bicubic"):
        assert torch.allclose(tdsa.top_down_attention(mid, torch.zeros(1, 2, 2, 2), 3, mode), mid / 2, atol=1e-6)


@pytest.mark.parametrize("xi", [1, 2, 3, 4, 5])
def test_eq7_each_high_level_channel_gates_the_xi_middle_channels_of_its_own_class(xi):
    high = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 2, 2)  # two classes of three channels, each constant
    gates = tdsa.top_down_attention(torch.ones(1, 6 * xi, 4, 4), high, xi, "nearest")
    expected = torch.sigmoid(torch.arange(6.0)).repeat_interleave(xi)
    assert torch.allclose(gates, expected.view(1, -1, 1, 1).expand_as(gates))
    assert tdsa.channels_of_class(tdsa.class_groups(6 * xi, 2)).tolist() == [list(range(3 * xi)), list(range(3 * xi, 6 * xi))]  # class 1 is gated by 3, 4, 5


def test_eq7_upsamples_before_the_sigmoid_and_can_at_most_halve_unless_bicubic_undershoots():
    high, ones = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 8, 8)
    high[..., 1:3, 1:3] = 8
    gates = {mode: tdsa.top_down_attention(ones, high, 1, mode) for mode in ("nearest", "bilinear", "bicubic")}
    assert gates["nearest"].min() >= 0.5 and gates["bilinear"].min() >= 0.5 and gates["bicubic"].min() < 0.5
    sigmoid_first = F.interpolate(high.sigmoid(), size=(8, 8), mode="bilinear", align_corners=False)
    assert (gates["bilinear"] - sigmoid_first).abs().max() > 0.1
    assert torch.allclose(gates["bilinear"], F.interpolate(high, scale_factor=2, mode="bilinear", align_corners=False).sigmoid())


def test_eq7_stops_no_gradient():
    mid, high = map_of(2, 6, 4, 4, relu=True).requires_grad_(), map_of(2, 3, 2, 2, seed=1, relu=True).requires_grad_()
    dis, div = tdsa.mc_loss(tdsa.top_down_attention(mid, high, 2, "nearest"), torch.tensor([0, 0]), 6)
    for grad in torch.autograd.grad(div, (mid, high)):
        assert grad.abs().max() > 0
    images, targets = batch()
    model = model_of()
    maps = model.trunk(images)
    attended, groups = model.constrained(*maps)["mid"]
    grad, = torch.autograd.grad(tdsa.mc_loss(attended, targets, groups)[0], maps[1])
    assert grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ Eqs. 2, 8 and 9, the model


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("xi", [1, 3])
def test_eq9_weighs_both_maps_as_the_paper_or_the_code_does(xi, form):
    model, (images, targets) = model_of(xi=xi, diversity=form), batch()
    loss, terms = model(images, targets)
    mid, high = model.trunk(images)
    h = {"high": tdsa.class_spread(high, 3).mean(), "mid": tdsa.class_spread(tdsa.top_down_attention(mid, high, xi, "nearest"), 3 * xi).mean()}
    total = terms["ce"] + 1.5 * (terms["dis_high"] + terms["dis_mid"])
    total = total + 30 - 5 * h["high"] - 15 / (3 * xi) * h["mid"] if form == "code" else total - 15 * (h["high"] + h["mid"])
    assert loss.item() == pytest.approx(total.item(), abs=1e-4)
    assert torch.allclose(terms["ce"], F.cross_entropy(model.head(high), targets))


def test_eqs_2_and_8_the_losses_act_on_the_maps_they_name():
    images, targets = batch()
    names = {"ce": set(), "mc": {"high"}, "tdsa": {"mid", "high"}}
    for loss, maps in names.items():
        _, terms = model_of(loss=loss)(images, targets)
        assert set(terms) == {"ce", "top1"} | {f"{t}_{m}" for t in ("dis", "div") for m in maps}
        assert all(not t.requires_grad and t.dim() == 0 for t in terms.values())
    model = model_of(beta=0.0, alpha=2.0, loss="mc")
    loss, terms = model(images, targets)
    assert loss.item() == pytest.approx((terms["ce"] + 2 * terms["dis_high"]).item(), abs=1e-5)


def test_without_attention_the_middle_map_is_raw_and_not_halved():
    images, _ = batch()
    model = model_of(attention=False)
    mid, high = model.trunk(images)
    assert model.constrained(mid, high)["mid"][0] is mid
    model = model_of()
    attended = model.constrained(mid, high)["mid"][0]
    assert torch.equal(attended, tdsa.top_down_attention(mid, high, 2, "nearest")) and list(model.constrained(mid, high)) == ["mid", "high"]


def test_the_classifier_in_evaluation_does_not_know_the_loss():
    images, targets = batch()
    model = model_of().eval()
    expected, state = model(images), model.state_dict()
    changes = [dict(loss="ce"), dict(loss="mc"), dict(attention=False), dict(upsample="bicubic"), dict(alpha=0.0, beta=1.0), dict(diversity="paper"), dict(mask="sample"), dict(figure_maps="attended")]
    for change in changes:
        other = model_of(**change).eval()
        other.load_state_dict(state)  # strict: no switch of the loss changes a name
        assert torch.equal(other(images), expected), change
    model(images, targets)  # and computing the loss changes nothing
    assert torch.equal(model(images), expected)


def test_the_mask_is_drawn_from_torchs_random_state_for_each_batch():
    model, (images, targets) = model_of().eval(), batch()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(images, targets)[0].item())
    assert losses[0] == losses[1] != losses[2]
    sampled = model_of(mask="sample")
    assert sampled.draw_mask(sampled.high_groups, 3).shape == (3, 12) and model.draw_mask(model.high_groups, 3).shape == (12,)
    assert sampled.draw_mask(((2, 3), (1, 4)), 5).view(5, 10)[:, 6:].sum(1).tolist() == [2] * 5


@pytest.mark.parametrize("loss", ["ce", "mc", "tdsa"])
def test_every_parameter_gets_a_gradient_and_is_in_one_group(loss):
    model, (images, targets) = model_of(loss=loss), batch()
    model(images, targets)[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    groups = tdsa.param_groups(model, SMALL)
    listed = [p for g in groups for p in g["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()} and len(listed) == len(list(model.parameters()))
    assert [g["weight_decay"] for g in groups] == [5e-4]


def test_training_learns_to_tell_eight_pictures_apart():
    torch.manual_seed(0)
    model = tdsa.build(replace(SMALL, image_size=(32, 32)), 4)
    images, targets = batch(8, size=(32, 32))
    optimizer, first = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), None
    for _ in range(40):
        loss, terms = model(images, targets)
        first = first or {k: v.item() for k, v in terms.items()}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["top1"] == 1 and terms["dis_high"] < first["dis_high"] / 2 and terms["div_high"] < first["div_high"] / 2 and terms["div_mid"] < first["div_mid"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_softmax_and_h_in_fp32(dtype):
    features = map_of(2, 6, 16, 16)
    half = features.to(dtype)
    assert tdsa.class_spread(half, 3).dtype == tdsa.class_scores(half, 3, torch.ones(6)).dtype == torch.float32
    assert torch.allclose(tdsa.class_spread(half, 3), tdsa.class_spread(half.float(), 3), atol=1e-6)  # no rounding but that of the input
    assert (half.flatten(2).softmax(2).view(2, 2, 3, -1).amax(2).sum(2).float() - tdsa.class_spread(half.float(), 3)).abs().max() > 1e-4
    model, (images, targets) = model_of(), batch()
    with torch.autocast("cpu", dtype=dtype):
        loss, terms = model(images, targets)
    assert loss.dtype == torch.float32 and all(torch.isfinite(t) for t in terms.values())
    loss.backward()


def test_heads_are_the_classifier_and_the_class_scores_of_each_constrained_map():
    images, _ = batch()
    model = model_of().eval()
    heads = model.heads(images)
    assert list(heads) == ["classifier", "mid", "high"] and all(v.shape == (3, 4) for v in heads.values())
    mid, high = model.trunk(images)
    assert torch.equal(heads["classifier"], model(images)) and torch.equal(heads["high"], tdsa.class_scores(high, 3))
    assert torch.equal(heads["mid"], tdsa.class_scores(tdsa.top_down_attention(mid, high, 2, "nearest"), 6))
    assert list(model_of(loss="mc").eval().heads(images)) == ["classifier", "high"] and list(model_of(loss="ce").eval().heads(images)) == ["classifier"]


# ------------------------------------------------------------------------------------------------ where it looks, Figure 6


class Maps(torch.nn.Module):
    """A trunk that gives the same maps for every image."""

    def __init__(self, mid, high):
        super().__init__()
        self.mid, self.high = mid, high

    def forward(self, images):
        return self.mid.expand(len(images), -1, -1, -1), self.high.expand(len(images), -1, -1, -1)


def looking_at(channel_peaks, **changes):
    """A model of 4 classes on 3 x 2 high-level maps that predicts class 2, channel 6 + i of which peaks at (row, column, height)."""
    model = model_of(**changes).eval()
    high = torch.zeros(1, 12, 3, 2)
    high[0, 0] = 50  # of class 0, to be ignored
    for i, (row, column, height) in enumerate(channel_peaks):
        high[0, 6 + i, row, column] = height
    model.trunk = Maps(torch.rand(1, 24, 6, 4), high)
    model.head[2].weight.data.zero_()
    model.head[2].bias.data = torch.tensor([0.0, 0, 1, 0])
    return model


def test_where_gives_the_cells_at_which_the_predicted_classs_channels_peak_strongest_first():
    model = looking_at([(0, 1, 2.0), (2, 0, 5.0), (1, 1, 3.0)])
    boxes, scores = model.where(torch.zeros(2, 3, 48, 32))
    assert scores.tolist() == [[5, 3, 2]] * 2
    assert boxes[0].tolist() == [[0, 32, 16, 48], [16, 16, 32, 32], [16, 0, 32, 16]]


def test_where_of_plain_cross_entropy_is_the_peak_of_the_class_activation_map():
    images, _ = batch(5)
    model = model_of(loss="ce").eval()
    logits, high = model(images), model.trunk(images)[1]
    cam = torch.einsum("bc,bchw->bhw", model.head[2].weight[logits.argmax(1)], high) / high[0, 0].numel()
    boxes, scores = model.where(images)
    assert boxes.shape == (5, 1, 4) and torch.allclose(scores[:, 0], cam.flatten(1).amax(1), atol=1e-5)
    peak = cam.flatten(1).argmax(1)
    assert boxes[:, 0, 0].tolist() == [16.0 * (p % 2) for p in peak] and boxes[:, 0, 3].tolist() == [16.0 * (p // 2 + 1) for p in peak]
    with torch.inference_mode():
        assert torch.allclose(model.where(images)[1], scores)


def test_figure_6_has_a_row_a_high_level_channel_with_the_middle_maps_it_supervises():
    model, plain = looking_at([(0, 1, 2.0), (2, 0, 5.0), (1, 1, 3.0)]), []
    pages = model.figure(torch.zeros(2, 3, 48, 32))
    assert len(pages) == 2
    panel = round(224 * 32 / 48)
    assert pages[0].width == 6 + 4 * (panel + 6)  # the image, the high-level map and xi = 2 middle maps
    row = (pages[0].height + 4) // 3
    assert pages[0].height == 3 * row - 4
    for i in range(3):
        y = i * row + 6 + 112  # half way down the panels
        frames = [pages[0].getpixel((6 + k * (panel + 6) + 1, y)) for k in range(4)]
        assert frames[1:] == [(255, 0, 0), (0, 255, 0), (0, 255, 0)] and frames[0] not in frames[1:]


def test_figure_6_shows_the_middle_channels_of_the_class_and_row(monkeypatch):
    shown = []
    monkeypatch.setattr(common, "heat", lambda image, values, strength=0.55: (shown.append(values), image)[1])
    for maps in ("raw", "attended"):
        shown.clear()
        model = looking_at([(0, 1, 2.0), (2, 0, 5.0), (1, 1, 3.0)], figure_maps=maps)
        model.figure(torch.zeros(1, 3, 48, 32))
        mid, high = model.trunk(torch.zeros(1, 3, 48, 32))
        mid = mid if maps == "raw" else tdsa.top_down_attention(mid, high, 2, "nearest")
        expected = [m for i in range(3) for m in (high[0, 6 + i], mid[0, 12 + 2 * i], mid[0, 12 + 2 * i + 1])]
        assert len(shown) == 9 and all(torch.equal(a, b) for a, b in zip(shown, expected))


@pytest.mark.parametrize("changes, panels", [(dict(loss="mc"), 2), (dict(loss="ce"), 2), (dict(loss="mc", aligned="none"), 2), (dict(xi=1), 3), (dict(image_size=(56, 40)), 4)])
def test_where_and_figure_work_for_every_loss_with_ragged_groups_and_odd_sizes(changes, panels):
    recipe = replace(SMALL, **changes)
    model, (images, _) = model_of(classes=5, **changes).eval(), batch(3, size=recipe.image_size)
    boxes, scores = model.where(images)
    H, W = recipe.image_size
    assert boxes.shape[:2] == scores.shape and (boxes[..., :2] >= 0).all() and (boxes[..., 2] <= W).all() and (boxes[..., 3] <= H).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all() and (scores.diff(dim=1) <= 0).all()
    pages = model.figure(images[:1])
    assert pages[0].width == 6 + panels * (round(224 * W / H) + 6)


# ------------------------------------------------------------------------------------------------ backbones


def parameters(backbone, classes, **changes):
    with torch.device("meta"):
        model = tdsa.build(replace(tdsa.RECIPES["cub"], backbone=backbone, **changes), classes)
    return sum(p.numel() for p in model.parameters())


COUNTS = {
    ("vgg16", 200): (31155912, 36687312, 42218712, 47750112, 53281512), ("vgg16", 100): (19399812, 22165512, 24931212, 27696912, 30462612),
    ("vgg16", 196): (30685668, 36106440, 41527212, 46947984, 52368756), ("vgg16", 102): (19634934, 22455948, 25276962, 28097976, 30918990),
    ("resnet18", 200): (24915608, 58449608, 111423608, 183837608, 275691608), ("resnet18", 100): (7040108, 15617108, 29054108, 47351108, 70508108),
    ("resnet18", 196): (23979404, 56200628, 107092028, 176653604, 264885356), ("resnet18", 102): (7284722, 16200338, 30172298, 49200602, 73285250),
}


@pytest.mark.parametrize("backbone, classes", COUNTS)
def test_parameters_of_both_backbones_for_every_xi_and_dataset(backbone, classes):
    assert tuple(parameters(backbone, classes, xi=xi) for xi in range(1, 6)) == COUNTS[backbone, classes]


def test_parameters_of_the_baselines_equal_those_of_the_released_networks():
    assert parameters("vgg16", 200, **tdsa.CE) == 27722504 and parameters("resnet18", 200, **tdsa.CE) == 11543816
    assert parameters("vgg16", 200, **tdsa.MC) == 30344640 and parameters("vgg16", 200, loss="mc", xi=1) == 31155912
    assert parameters("resnet18", 200, **tdsa.MC) == 14457320
    assert len({parameters("resnet18", 200, layout=layout) for layout in "ABC"}) == 1
    with torch.device("meta"):
        model = tdsa.build(tdsa.RECIPES["cub"], 200)
    split = [sum(p.numel() for p in part.parameters()) for part in (model.trunk.features[:33], model.trunk.features[33:], model.head)]
    assert split == [13579608, 13423368, 15215736]


@pytest.mark.parametrize("backbone, layout, size, grids", [
    ("vgg16", "A", (224, 224), ((28, 28), (14, 14))), ("vgg16", "A", (256, 192), ((32, 24), (16, 12))),
    ("resnet18", "A", (224, 224), ((14, 14), (7, 7))), ("resnet18", "B", (224, 224), ((14, 14), (14, 14))), ("resnet18", "C", (224, 224), ((28, 28), (14, 14))),
    ("resnet18", "A", (448, 448), ((28, 28), (14, 14))), ("toy", "A", (96, 96), ((12, 12), (6, 6))),
])
def test_maps_have_the_published_channels_and_sizes(backbone, layout, size, grids):
    with torch.device("meta"):
        model = tdsa.build(replace(tdsa.RECIPES["cub"], backbone=backbone, layout=layout, image_size=size), 200).eval()
        images = torch.empty(2, 3, *size)
        mid, high = model.trunk(images)
        assert mid.shape == (2, 1800, *grids[0]) and high.shape == (2, 600, *grids[1]) and model(images).shape == (2, 200)
    if backbone == "vgg16":
        assert model.head[3].in_features == 600 * (size[0] // 32) * (size[1] // 32)


def test_multiply_adds_are_the_published_ones():
    published = {("vgg16", "A"): (15.8, 18.5, 21.2, 24.0, 26.7), ("resnet18", "A"): (3.7, 9.7, 19.6), ("resnet18", "C"): (11.8, 36.0, 75.4)}
    for (backbone, layout), counts in published.items():
        for xi, giga in enumerate(counts, start=1):
            with torch.device("meta"):
                model = tdsa.build(replace(tdsa.RECIPES["cub"], backbone=backbone, layout=layout, xi=xi), 200).eval()
                assert common.count_macs(model, torch.empty(1, 3, 224, 224)) / 1e9 == pytest.approx(giga, abs=0.1)


def test_the_paths_of_vgg16_and_resnet18_are_torchvisions():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 32)
    vgg, oracle = tdsa.VGG16(512, 512, "A").eval(), make_layers(cfgs["D"], batch_norm=True).eval()
    vgg.features.load_state_dict({k: v for k, v in oracle.state_dict().items()})
    mid, high = vgg(images)
    assert torch.allclose(F.max_pool2d(high, 2), oracle(images), atol=1e-5) and torch.allclose(mid, oracle[:33](images), atol=1e-5)
    assert (mid >= 0).all() and (high >= 0).all()

    net, oracle = tdsa.ResNet18(256, 512, "A").eval(), resnet18().eval()
    net.load_state_dict({k: v for k, v in oracle.state_dict().items() if not k.startswith("fc.")})
    seen = {}
    for name in ("layer3", "layer4"):
        getattr(oracle, name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    oracle(images)
    mid, high = net(images)
    assert torch.allclose(mid, seen["layer3"], atol=1e-5) and torch.allclose(high, seen["layer4"], atol=1e-5)


def test_the_head_at_the_recipes_size_is_a_two_by_two_max_pooling_and_takes_other_sizes():
    head = tdsa.classifier("vgg16", 6, 3, (96, 64)).eval()
    high = map_of(2, 6, 6, 4)
    assert torch.equal(head[0](high), F.max_pool2d(high, 2)) and head(map_of(2, 6, 9, 5)).shape == (2, 3)
    assert [type(m).__name__ for m in head] == ["AdaptiveMaxPool2d", "Flatten", "BatchNorm1d", "Linear", "BatchNorm1d", "ELU", "Linear"]


@pytest.mark.parametrize("backbone", ["resnet18", "toy"])
@pytest.mark.parametrize("classes, size", [(2, (64, 64)), (7, (72, 100))])
def test_any_number_of_classes_and_any_size_trains_and_evaluates(backbone, classes, size):
    model = model_of(classes, backbone=backbone, xi=1, image_size=size)
    images, targets = batch(2, classes, size)
    loss, _ = model(images, targets)
    loss.backward()
    assert torch.isfinite(loss) and model.eval()(images[:1]).shape == (1, classes)


# ------------------------------------------------------------------------------------------------ weights


def test_weights_of_torchvision_load_into_the_trunk_and_older_files_without_counters_too(tmp_path):
    torch.manual_seed(0)
    published = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in resnet18().state_dict().items()}
    for name, drop in (("new.pth", ()), ("old.pth", ("num_batches_tracked",))):
        torch.save({k: v for k, v in published.items() if not k.endswith(drop)} if drop else published, tmp_path / name)
        model = model_of(backbone="resnet18", loss="mc", aligned="none", weights=str(tmp_path / name))
        assert torch.equal(model.trunk.layer4[1].conv2.weight, published["layer4.1.conv2.weight"])
    torch.save({k: v for k, v in published.items() if k != "layer3.0.conv1.weight"}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"missing .*trunk.layer3.0.conv1.weight"):
        model_of(backbone="resnet18", loss="mc", aligned="none", weights=str(tmp_path / "broken.pth"))


def test_default_weights_are_fetched_from_torchvisions_address_and_checked_against_the_hash_in_its_name(tmp_path, monkeypatch):
    asked = []
    torch.save(resnet18().state_dict(), tmp_path / "net.pth")
    monkeypatch.setattr(common, "fetch", lambda url, sha256="": (asked.append((url, sha256)), tmp_path / "net.pth")[1])
    model_of(backbone="resnet18", loss="mc", aligned="none", weights="default")
    assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]


def test_weights_of_a_run_load_with_another_head_but_not_with_other_widths(tmp_path):
    trained = model_of(loss="mc", aligned="none", classes=3)
    torch.save(trained.state_dict(), tmp_path / "run.pt")
    model = model_of(loss="ce", aligned="none", classes=5, weights=str(tmp_path / "run.pt"))
    assert torch.equal(model.trunk.layer3[0].conv1.weight, trained.trunk.layer3[0].conv1.weight) and model.head[2].weight.shape == (5, 48)
    with pytest.raises(ValueError, match="other shapes"):
        model_of(loss="mc", classes=5, weights=str(tmp_path / "run.pt"))


# ------------------------------------------------------------------------------------------------ recipes and tables


@pytest.mark.parametrize("data, xi", [("cub", 3), ("aircraft", 2), ("cars", 2), ("flowers", 3)])
def test_the_recipe_of_sec_4b_and_of_the_authors_code(data, xi):
    r = tdsa.RECIPES[data]
    assert (r.backbone, r.loss, r.attention, r.xi, r.channels, r.upsample, r.diversity, r.mask) == ("vgg16", "tdsa", True, xi, 3, "nearest", "code", "batch")
    assert (r.alpha, r.beta) == (1.5, 1.5 * 10)
    assert (r.image_size, r.resize, r.crop, r.pad, r.hflip, r.normalize) == ((224, 224), (0, 0), "random", 4, 0.5, "half")
    assert (r.epochs, r.batch_size, r.optimizer, r.lr, r.momentum, r.weight_decay) == (300, 32, "sgd", 0.1, 0.9, 5e-4)
    assert (r.schedule, r.warmup, r.label_smoothing, r.grad_clip, r.ema, r.amp, r.weights) == ("steps", 0, 0, 0, 0, "off", "none")


def test_the_learning_rate_drops_at_epochs_150_and_225_counted_from_one():
    recipe, steps_per_epoch = tdsa.RECIPES["cub"], 5994 // 32
    for epoch, lr in ((1, 0.1), (149, 0.1), (150, 0.01), (224, 0.01), (225, 0.001), (300, 0.001)):
        for step in ((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch - 1):  # its first and its last
            assert common.lr_at(recipe, step, 300 * steps_per_epoch, steps_per_epoch) == pytest.approx(lr)


def test_every_dataset_has_its_recipe_and_the_toy_is_small():
    assert set(tdsa.RECIPES) == {"toy", "folder", "cub", "aircraft", "cars", "flowers"}
    model = tdsa.build(TOY, 16)
    assert [model.trunk.conv1.out_channels, *(getattr(model.trunk, f"layer{i}")[0].conv1.out_channels for i in range(1, 5))] == [16, 16, 32, 96, 48]
    assert tdsa.ToyResNet.own == (96, 48) and TOY.toy_preset == "birds"


def test_tables_2_to_8_have_the_papers_rows():
    fields = {f.name: f for f in dataclasses.fields(tdsa.Recipe)}
    for key, table in tdsa.TABLES.items():
        assert table.data in tdsa.RECIPES and table.metric == "top1" and len({name for name, _, _ in table.rows}) == len(table.rows)
        for _, changes, _ in table.rows:
            recipe = replace(tdsa.RECIPES[table.data], **changes)
            assert all(not fields[k].metadata["choices"] or v in fields[k].metadata["choices"] for k, v in changes.items())
            with torch.device("meta"):
                tdsa.build(recipe, 10)
    value = {key: [v for _, _, v in table.rows] for key, table in tdsa.TABLES.items()}
    assert value["2"] == [28.53, 65.98, 72.77] and value["3-flowers"] == [65.75, 79.54, 85.34] and value["4-aircraft"] == [82.90, 89.20, 88.89, 89.57]
    assert value["5-cars"] == [91.68, 92.29, 92.08, 91.37, 91.94] and value["6"] == [65.25, 68.72, 69.24, 69.12, 68.72]
    assert value["7"] == [73.33, 72.82, 73.03] and value["8"] == [65.66, 65.50, 65.33]
    built = [replace(tdsa.RECIPES["cub"], **changes) for _, changes, _ in tdsa.TABLES["4"].rows]
    assert [(r.loss, r.attention) for r in built] == [("ce", True), ("mc", True), ("tdsa", False), ("tdsa", True)]
    assert all(replace(tdsa.RECIPES["cub"], **c).backbone == "resnet18" for _, c, _ in tdsa.TABLES["8"].rows)


# ------------------------------------------------------------------------------------------------ what a user can get wrong


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="7 channels cannot be split into classes of 3"):
        tdsa.mc_loss(torch.zeros(1, 7, 2, 2), torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="mask of 4 channels for a map of 6"):
        tdsa.mc_loss(torch.zeros(1, 6, 2, 2), torch.tensor([0]), 3, torch.ones(4))
    with pytest.raises(ValueError, match="must be xi = 3 times as many"):
        tdsa.top_down_attention(torch.zeros(1, 6, 4, 4), torch.zeros(1, 3, 2, 2), 3, "nearest")
    with pytest.raises(ValueError, match="512 channels do not fit 600 classes"):
        tdsa.class_groups(512, 600)
    with pytest.raises(ValueError, match="48 channels do not fit 60 classes.*--aligned both"):
        model_of(60, loss="mc", aligned="none")
    with pytest.raises(ValueError, match="must be 1 at least"):
        tdsa.cwa_mask(3, 0)


@pytest.mark.parametrize("targets", [[0, 4], [-1, 0]])
def test_labels_out_of_range_are_refused(targets):
    images, _ = batch(2)
    with pytest.raises(ValueError, match="for 4 classes; allowed: 0 to 3"):
        model_of()(images, torch.tensor(targets))
    with pytest.raises(ValueError, match="for 4 classes; allowed: 0 to 3"):
        tdsa.mc_loss(torch.zeros(2, 12, 2, 2), torch.tensor(targets), 3)


def test_a_training_batch_of_one_is_refused_and_evaluated():
    images, targets = batch(1)
    with pytest.raises(ValueError, match="training batch of 1.*--batch-size"):
        model_of()(images, targets)
    assert torch.isfinite(model_of().eval()(images, targets)[0])


def test_maps_of_one_place_are_refused_with_diversity_and_accepted_without():
    images, targets = batch(2, size=(16, 16))
    with pytest.raises(ValueError, match="high map is 1 x 1.*--beta 0"):
        model_of(image_size=(16, 16))(images, targets)
    assert torch.isfinite(model_of(image_size=(16, 16), beta=0.0)(images, targets)[0])


@pytest.mark.parametrize("changes, message", [
    (dict(xi=0), "--xi 0"), (dict(channels=0), "--channels 0"), (dict(aligned="none"), "--loss tdsa --aligned none"), (dict(aligned="high"), "--loss tdsa --aligned high"),
    (dict(task="reid"), "--task reid"), (dict(drop_path=0.1), "--drop-path 0.1"), (dict(weights="default"), "--weights default --backbone toy"),
    (dict(weights="default", backbone="vgg16"), "--aligned both"), (dict(weights="no/such.pt"), None),
])
def test_settings_that_do_not_go_together_are_refused_with_what_to_do(changes, message):
    with pytest.raises(FileNotFoundError if message is None else ValueError, match=message or "no such file"):
        model_of(**changes)
    with pytest.raises(ValueError, match="2 at least"):
        tdsa.build(SMALL, 1)
