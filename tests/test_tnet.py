"""tnet.py against its paper: the equations, modules and numbers of "Hard-Attention for Scalable ..."."""
import dataclasses
from dataclasses import replace
from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import tnet

TINY = replace(tnet.RECIPES["toy"], width=4, image_size=(128, 128), cell=0.25)  # over 32 px, 16 channels
CONTEXT = torch.zeros(1, 16, 5, 5), torch.zeros(1, 16)  # F and V for a location module that looks at neither


def tiny(classes=3, seed=0, **changes):
    torch.manual_seed(seed)
    return tnet.build(replace(TINY, **changes), classes)


def on_meta(name, classes, **changes):
    with torch.device("meta"):
        return tnet.build(replace(tnet.RECIPES[name], **{"weights": "none", **changes}), classes).eval()


def trainable(module):
    return sum(p.numel() for p in module.parameters())


def statistics(model):
    return sum(b.numel() for key, b in model.named_buffers() if "running" in key)


def gmacs(model, side, locations=None):
    if locations is not None:
        model.locations = locations
    return common.count_macs(model, torch.empty(1, 3, side, side, device="meta")) / 1e9


class Camera(nn.Module):
    """A backbone that keeps every view it is shown; its vector is the view's mean colour."""

    def __init__(self, grid=5):
        super().__init__()
        self.views, self.grid = [], grid

    def forward(self, views):
        self.views.append(views)
        F_map, V = (F.adaptive_avg_pool2d(views, n).repeat(1, 6, 1, 1)[:, :16] for n in (self.grid, 1))
        return F_map, V.flatten(1), F_map


class Wish(nn.Module):
    """A location module that ranks these cells first, in this order."""

    def __init__(self, cells, K):
        super().__init__()
        self.logits = torch.zeros(K)
        self.logits[list(cells)] = torch.arange(len(cells), 0, -1.0)

    def forward(self, F_map, V):
        return self.logits.expand(len(V), -1)


def wanting(model, *cells):
    model.location = Wish(cells, model.recipe.grid**2)
    return model


# ---------------------------------------------------------------- modules and their sizes


@pytest.mark.parametrize("name, classes, changes, count, with_statistics", [
    ("imagenet-bagnet77", 1000, {}, 20_546_664, 20.55), ("imagenet", 1000, {}, 21_859_949, 21.86),
    ("fmow", 62, {"hard_attention": False}, 4_086_970, 4.13), ("fmow", 62, {}, 4_517_575, 4.56)])
def test_tables_1_and_2_parameters_are_the_papers_to_the_unit(name, classes, changes, count, with_statistics):
    model = on_meta(name, classes, **changes)
    assert trainable(model) == count  # the paper counts BatchNorm's running mean and variance
    assert round((count + statistics(model)) / 1e6, 2) == with_statistics


@pytest.mark.parametrize("i, baseline, attention, stats, channels, location, side", [
    (0, 4_263_748, 5_516_434, 42_016, 1280, 19_725, 80), (1, 6_769_384, 8_007_410, 62_048, 1280, 5_065, 40),
    (2, 7_982_794, 9_481_448, 67_568, 1408, 7_229, 48), (3, 11_003_632, 12_785_326, 87_296, 1536, 7_229, 48),
    (4, 17_907_216, 20_331_266, 125_200, 1792, 9_777, 56)])
def test_fig3_parameters_and_location_maps_of_every_backbone(
        i, baseline, attention, stats, channels, location, side):
    model = on_meta("cub", 200, backbone=f"efficientnet_b{i}")
    assert trainable(model) == attention and statistics(model) == stats
    assert trainable(on_meta("cub-en", 200, backbone=f"efficientnet_b{i}")) == baseline
    assert trainable(model.location) == location
    weighting = trainable(model.weighting)
    assert trainable(model.position) + weighting == attention - baseline - location
    assert weighting == {1280: 822_081, 1408: 994_401, 1536: 1_183_105, 1792: 1_609_665}[channels]
    F_map, V, last = model.backbone(torch.empty(2, 3, 224, 224, device="meta"))
    assert (F_map.shape, V.shape, last.shape) == ((2, side, 5, 5), (2, channels), (2, channels, 7, 7))


def test_table1_flops():
    model = on_meta("imagenet", 1000)
    assert gmacs(on_meta("imagenet-bagnet77", 1000), 224) == pytest.approx(18.423, rel=5e-3)
    assert gmacs(model.backbone, 77) == pytest.approx(1.803330, rel=1e-6)
    for k, expected in ((1, 3.628), (2, 5.432), (3, 7.236), (5, 10.843)):
        assert gmacs(model, 224, (k,)) == pytest.approx(expected, rel=5e-3)
    assert gmacs(model, 224, ()) + 0.0197 == pytest.approx(1.824, rel=5e-3)  # with the location module


def test_table2_flops_are_those_of_the_views_and_not_of_the_resolution():
    baseline, model = on_meta("fmow", 62, hard_attention=False), on_meta("fmow", 62)
    for side, expected in ((224, 0.387), (448, 1.546), (896, 6.180)):
        assert gmacs(baseline, side) == pytest.approx(expected, rel=5e-3)
    for locations, side, expected in (
            ((), 896, 0.388), ((1,), 448, 0.775), ((2,), 448, 1.162), ((3,), 1792, 1.549),
            ((2, 1), 896, 1.937), ((2, 2), 896, 2.711)):
        assert gmacs(model, side, locations) == pytest.approx(expected, rel=5e-3)


def test_sec51_a_cell_of_bagnets_last_map_sees_77_pixels_and_its_candidates_are_every_second():
    torch.manual_seed(0)
    net, image = tnet.BagNet77(), torch.randn(1, 3, 109, 109, requires_grad=True)
    F_map, _, last = net(image)
    last[0, :, 5, 5].sum().backward(retain_graph=True)
    rows = image.grad[0].abs().amax((0, 2)).nonzero()
    assert last.shape[2:] == (11, 11) and rows.max() - rows.min() + 1 == 77
    middle = net.part4(net.part3(net.part2(tnet.leaky(net.part1(image)))))
    assert torch.equal(F_map, middle[:, :, [0, 2, 4, 6, 8, 10, 12]][..., [0, 2, 4, 6, 8, 10, 12]])


def test_sec51_bagnet_pads_like_tensorflow():
    block = tnet.Bottleneck(1, 1, 3, 2)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        for weight in (block.reduce.weight, block.expand.weight, block.conv.weight[0, 0, 0, 0]):
            weight.fill_(1.0)  # reads the window's first pixel
        assert block(torch.arange(6.0).expand(1, 1, 6, 6))[0, 0, 0].tolist() == [0, 2, 4]  # even: from 0
        assert block(torch.arange(1, 6.0).expand(1, 1, 5, 5))[0, 0, 1].tolist() == [0, 2, 4]  # odd: padded
        assert tnet.leaky(torch.tensor([-1.0])).item() == pytest.approx(-0.2)


@pytest.mark.parametrize("backbone, grid, stride, centres, sees", [
    ("efficientnet_b0", 3, 16, [48, 112, 176], 147), ("efficientnet_b0", 5, 16, [48, 80, 112, 144, 176], 83),
    ("efficientnet_b1", 5, 8, [48, 80, 112, 144, 176], 79)])
def test_sec32_candidate_locations_of_efficientnet_sit_where_the_cells_are(
        backbone, grid, stride, centres, sees):
    tap = tnet.TAPS[backbone, grid, 224]
    assert [stride * row for row in range(224 // stride)[tap.lines]] == centres
    torch.manual_seed(0)
    net = tnet.EfficientNet(backbone, tap, (1e-3, 0.01), 0.0).eval()
    for layer in net.modules():
        if isinstance(layer, tnet.torchvision.ops.SqueezeExcitation):
            layer.forward = lambda x: x  # it sees the whole image
    image = torch.randn(1, 3, 224, 224, requires_grad=True)
    net(image)[0][0, :, grid // 2, grid // 2].sum().backward()
    reach = image.grad[0].abs().amax((0, 2)).nonzero()
    assert (reach.min() + reach.max()) / 2 == 112 and reach.max() - reach.min() + 1 == sees


@pytest.mark.parametrize("name, eps, rate, dropout", [("fmow", 1e-3, 0.3, 0.5), ("cub", 1e-5, 0.5, 0.75)])
def test_sec52_drop_path_epsilon_and_dropout_of_the_built_efficientnet(name, eps, rate, dropout):
    model = on_meta(name, 5)
    drops = [m.p for m in model.modules() if isinstance(m, tnet.torchvision.ops.StochasticDepth)]
    assert drops == pytest.approx([rate * i / 16 for i in range(1, 17)])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49 and {(m.eps, m.momentum) for m in norms} == {(eps, 0.01)}
    classifier = tnet.Classifier(300, 300, model.recipe)
    nn.init.eye_(classifier.weight)
    outputs = (classifier(torch.ones(300)) - classifier.bias).detach().round(decimals=3)
    assert outputs.unique().tolist() == [0, 1 / (1 - dropout)] and model.classifier.dropout == dropout


def test_sec51_dropout_of_bagnet_is_in_the_last_layer_of_feature_extraction():
    for name, p in (("imagenet", 0.5), ("imagenet-bagnet77", 0.625)):
        model = on_meta(name, 5)
        assert model.backbone.dropout.p == p and model.classifier.dropout == 0
    torch.manual_seed(0)
    net = tnet.BagNet77(0.625).train()
    _, V, last = net(torch.randn(4, 3, 77, 77))
    gone = (last == 0).all((2, 3))  # whole channels of the last map, so of V, the context of locations
    assert 0.55 < gone.float().mean() < 0.7 and torch.equal(V == 0, gone)


@pytest.mark.parametrize("name, stds", [
    ("imagenet", {"backbone.part5.1.conv": (2 / (512 * 9 * 2)) ** 0.5, "location.hidden": (2 / 2050) ** 0.5,
                  "position.linear": 512**-0.5 / 3**0.5, "classifier": 200**-0.5 / 3**0.5}),
    ("cub", {"backbone.features.6.1.block.1.0": (2 / 25) ** 0.5, "backbone.features.8.0": (2 / 1280) ** 0.5,
             "location.hidden": (2 / 80) ** 0.5, "weighting.excite": 1280**-0.5 / 3**0.5,
             "classifier": 200**-0.5 / 3**0.5})])
def test_the_authors_initial_weights_of_the_built_model(name, stds):
    torch.manual_seed(0)
    model = tnet.build(replace(tnet.RECIPES[name], weights="none"), 200)
    for layer, std in stds.items():
        assert model.get_submodule(layer).weight.std().item() == pytest.approx(std, rel=0.06), layer
    assert all(not p.any() for key, p in model.named_parameters() if key.endswith("bias"))
    assert model.location.coordinates.scale.tolist() == [1, 1] and model.baseline.tolist() == [0.5, 0.5]


def test_sec32_location_logits_use_the_context_and_the_place():
    torch.manual_seed(0)
    V, same = torch.zeros(1, 5), torch.randn(1, 6, 1, 1).expand(1, 6, 3, 3)  # nine equal locations
    concat, excite = tnet.LocationConcat(6, 5), tnet.LocationSqueezeExcite(6)
    for module in (concat, excite):
        assert len(module(same, V)[0].unique()) == 9  # told apart by their coordinates
        nn.init.zeros_(module.coordinates.scale)
        assert module(same, V).std() < 1e-6
    seen, places = [], torch.tensor(list(product((-1.0, 0, 1), repeat=2)))  # row, column
    with torch.no_grad():
        concat.coordinates.scale.copy_(torch.tensor([2.0, 3.0]))
        concat.coordinates.shift.copy_(torch.tensor([0.1, 0.2]))
    concat.hidden.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    concat(same, V)
    expected = places * torch.tensor([2.0, 3.0]) + torch.tensor([0.1, 0.2])
    assert torch.allclose(seen[0][0, -2:].flatten(1).T, expected)
    different = torch.randn(1, 6, 3, 3)
    assert not torch.allclose(concat(different, V), concat(different, V + 1))
    changed = different + 9 * F.one_hot(torch.tensor(8), 9).view(3, 3)
    assert not torch.allclose(excite(different, V)[0, 0], excite(changed, V)[0, 0])  # carried to cell 0


# ---------------------------------------------------------------- choosing cells


def test_sec31_sampling_without_replacement_has_the_plackett_luce_frequencies():
    torch.manual_seed(0)
    logits, n = torch.tensor([0.5, -0.3, 0.9, 0.0]), 400_000
    draws, p = tnet.gumbel_top_k(logits.expand(n, 4), 2), logits.softmax(0).tolist()
    assert (draws[:, 0] != draws[:, 1]).all()
    for i, j in permutations(range(4), 2):
        expected = p[i] * p[j] / (1 - p[i])
        chosen = (draws == torch.tensor([i, j])).all(1).float().mean().item()
        assert abs(chosen - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_sec31_log_probability_of_a_sequence_by_drawing_one_cell_after_the_other():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, dtype=torch.double)
    p = logits.softmax(1)[0].tolist()
    for k in (1, 2, 3, 5):
        total = 0.0
        for order in permutations(range(5), k):
            literal, left = 1.0, 1.0
            for cell in order:
                literal, left = literal * p[cell] / left, left - p[cell]
            log_prob = tnet.plackett_luce_log_prob(logits, torch.tensor([order]))
            assert log_prob.exp().item() == pytest.approx(literal, rel=1e-9)
            total += literal
        assert total == pytest.approx(1.0)
    logits.requires_grad_()
    tnet.plackett_luce_log_prob(logits, torch.tensor([[3, 1, 4, 0, 2]])).sum().backward()
    assert logits.grad.isfinite().all()


def expected_gradient(log_prob_of, b):
    """E over all ordered pairs of (R - b) * d log p / d logits, and E[R] with its gradient."""
    rewards = {(0, 1): 1.0, (0, 2): 0.0, (0, 3): 0.5, (1, 2): 0.2, (1, 3): 1.0, (2, 3): 0.0}
    logits = torch.tensor([[0.5, -0.3, 0.9, 0.0]], dtype=torch.double, requires_grad=True)
    pairs = torch.tensor(list(permutations(range(4), 2)))
    reward = torch.tensor([rewards[tuple(sorted(pair.tolist()))] for pair in pairs], dtype=torch.double)
    each = logits.expand(len(pairs), 4)
    p = tnet.plackett_luce_log_prob(each, pairs).exp()
    score = (p.detach() * (reward - b) * log_prob_of(each, pairs)).sum()
    mean = (p * reward).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0][0] for value in (score, mean)]
    return gradients[0], mean.item(), gradients[1]


def summed(logits, cells):
    """The authors' log-probability of a choice."""
    return logits.log_softmax(-1).gather(1, cells).sum(1)


@pytest.mark.parametrize("b", [0.0, 0.5])
def test_eq1_the_policy_gradient_is_unbiased_whatever_the_baseline(b):
    estimate, mean, exact = expected_gradient(tnet.plackett_luce_log_prob, b)
    assert mean == pytest.approx(0.2347, abs=5e-5)
    assert exact.tolist() == pytest.approx([0.0342, 0.1152, -0.1824, 0.0329], abs=1e-4)
    assert torch.allclose(estimate, exact, atol=1e-10)


def test_eq1_control_the_sum_of_log_softmax_would_be_biased_for_a_sample():
    estimate, _, exact = expected_gradient(summed, 0.0)
    assert estimate.tolist() == pytest.approx([0.0208, 0.1135, -0.1676, 0.0333], abs=1e-3)
    assert (estimate - exact).abs().max() > 0.01
    assert (expected_gradient(summed, 0.5)[0] - exact).abs().max() > 0.05


def share_of_draws(p):
    """Share of each cell in three draws without replacement, exactly: (K,) -> (K,), sum 1."""
    i = torch.arange(len(p))
    first, second, third = p[:, None, None], p[None, :, None], p
    joint = first * second / (1 - first) * third / (1 - first - second)
    joint[(i[:, None, None] == i[:, None]) | (i[:, None, None] == i) | (i[:, None] == i)] = 0
    return (joint.sum((1, 2)) + joint.sum((0, 2)) + joint.sum((0, 1))) / 3


@pytest.mark.parametrize("norm, size", [(1.0, 0.002), (4.0, 0.021), (8.0, 0.10)])
def test_eq3b_the_policy_term_is_biased_for_more_than_one_location_and_still_points_the_right_way(norm, size):
    torch.manual_seed(0)
    logits = norm * F.normalize(torch.randn(100, 25, dtype=torch.double), dim=-1)
    score = torch.stack([share_of_draws(p) - p for p in logits.softmax(-1)])  # E of d log p(l_k) / d logits
    assert score.norm(dim=1).mean() == pytest.approx(size, rel=0.1)  # of an unbiased term 0
    p, reward = logits[0].softmax(-1), torch.rand(25, dtype=torch.double)
    share = share_of_draws(p)
    b = (share * reward).sum()
    push = share * (reward - b) - p * (share * (reward - b)).sum()  # E of (R^k - b) times the score
    assert torch.allclose(push, share * (reward - b)) and torch.equal(push > 0, reward > b)


def test_sec31_choose_samples_in_training_and_takes_the_most_probable_cells_in_evaluation():
    logits = torch.tensor([0.1, 0.9, 0.9, 0.3]).repeat(64, 1)
    model = tiny(grid=2, locations="2")
    assert len(model.choose(logits, 2).unique(dim=0)) == 12
    code = tiny(grid=2, locations="2", select="topk")
    for one in (model.eval(), code):  # of equals the first; the authors' code also in training
        assert one.choose(logits, 2).unique(dim=0).tolist() == [[1, 2]]


@pytest.mark.parametrize("grid, most, least", [(2, 0.475, 0.109), (3, 0.2536, 0.0440), (5, 0.1017, 0.0151)])
def test_the_authors_unit_norm_bounds_every_probability_and_without_it_the_softmax_is_the_papers(
        grid, most, least):
    def probabilities(logits, **changes):
        model = wanting(tiny(**dict(grid=grid, logit_scale=1.0, locations="1") | changes))
        model.location.logits = logits
        return model.location_logits(torch.zeros(1, 16, grid, grid), torch.zeros(1, 16)).softmax(-1)[0]

    peak = 1e3 * F.one_hot(torch.tensor(0), grid**2).float()
    assert probabilities(peak).max().item() == pytest.approx(most, abs=1e-3)
    assert probabilities(-peak).min().item() == pytest.approx(least, abs=1e-3)
    logits, zero = torch.randn(grid**2), torch.zeros(grid**2, requires_grad=True)
    assert torch.allclose(probabilities(logits), probabilities(7 * logits), atol=1e-6)  # any scale
    assert torch.allclose(probabilities(logits, logit_scale=8.0), (8 * F.normalize(logits, dim=0)).softmax(0))
    assert torch.equal(probabilities(logits, normalize_logits=False), logits.softmax(0))
    probabilities(zero)[0].log().backward()
    assert torch.allclose(probabilities(zero), torch.tensor(1 / grid**2)) and zero.grad.isfinite().all()


# ---------------------------------------------------------------- cropping


@pytest.mark.parametrize("size, grid, fraction, patch, starts", [
    (224, 5, 0.34375, 77, [-1, 36, 73, 110, 147]), (448, 3, 0.5, 224, [0, 112, 224]), (9, 1, 0.5, 4, [2]),
    (896, 3, 0.5, 448, [0, 224, 448]), (448, 5, 0.35, 157, [-1, 72, 145, 218, 291])])
def test_sec5_grids_of_every_dataset(size, grid, fraction, patch, starts):
    assert tnet.cell_boxes((size, size), grid, fraction) == [
        (x, y, x + patch, y + patch) for y in starts for x in starts]


@pytest.mark.parametrize("size", [(224, 224), (150, 224), (301, 130)])
def test_sec51_crops_are_slices_of_the_zero_padded_image(size):
    rows, columns = (torch.arange(1.0, side + 1) for side in size)
    image = torch.stack((*torch.meshgrid(rows, columns, indexing="ij"), torch.ones(size)))
    boxes = torch.tensor(tnet.cell_boxes(size, 5, 0.34375))
    x1, y1, x2, y2 = boxes[0].tolist()
    images, margin = torch.stack((0 * image, image)), max(0, -x1, -y1)
    crops = tnet.crop(images, boxes.expand(2, 25, 4), (y2 - y1, x2 - x1), margin)
    padded = F.pad(image, (10, 10, 10, 10))
    for crop, (x1, y1, x2, y2) in zip(crops[25:], (boxes + 10).tolist()):
        assert torch.equal(crop, padded[:, y1:y2, x1:x2])
    if size == (224, 224):  # a zero row first; then pixel 36
        assert not crops[25, :, 0].any() and crops[25, 0, 1, 1] == 1 and crops[31, 0, 0, 0] == 37


def test_sec52_level_3_is_cut_bit_by_bit_from_the_full_resolution_and_knows_its_place():
    model = tiny(grid=3, cell=0.5, base_resolution=224, locations="2x1").eval()
    model.backbone, image = Camera(3), torch.randn(1, 3, 896, 896)
    small = lambda view: F.interpolate(view, (224, 224), mode="bilinear", align_corners=False)
    for first, second, third in ((0, 8, 4), (5, 3, 2)):
        model.backbone.views.clear()
        wishes = iter((Wish((first, second), 9), Wish((third,), 9)))
        model.location = nn.Identity()
        model.location.forward = lambda F_map, V: next(wishes)(F_map, V)
        places = model.traverse(image).places[0].tolist()
        level1, level2, level3 = model.backbone.views
        assert torch.equal(level1, small(image)) and places[0] == [0, 0, 0]
        for i, (crop2, crop3, cell) in enumerate(zip(level2, level3, (first, second))):
            row, column = cell // 3, cell % 3
            y, x = 224 * row, 224 * column
            assert torch.equal(crop2, small(image[:, :, y : y + 448, x : x + 448])[0])
            assert places[1 + i] == [row, column, 1]
            y, x = y + 112 * (third // 3), x + 112 * (third % 3)
            assert torch.equal(crop3, image[0, :, y : y + 224, x : x + 224])
            assert places[3 + i] == [3 * row + third // 3, 3 * column + third % 3, 2]


# ---------------------------------------------------------------- positions, pooling, order


def test_sec32_positional_encoding_and_modules_written_out():
    position, m, literal = torch.tensor([3.0, 1.0, 2.0]), 4, []
    for value in position.tolist():
        for wave in (torch.sin, torch.cos):
            literal += [wave(torch.tensor(value * 100 ** (-j / (m - 1)))).item() for j in range(m)]
    assert tnet.positional_encoding(position, 26).tolist() == pytest.approx(literal + [0.0, 0.0], abs=1e-6)
    for D, m in ((512, 85), (320, 53), (352, 58), (384, 64), (448, 74)):
        code = tnet.positional_encoding(torch.zeros(3), D)
        assert code.shape == (D,) and code.sum() == 3 * m and code[6 * m :].eq(0).all()
    V, place = torch.randn(2, 3, 24), torch.randint(0, 5, (2, 3, 3))
    concat, add = tnet.Position(24, False), tnet.Position(24, True)
    beside = torch.cat((V, tnet.positional_encoding(place, 24)), -1)
    assert torch.allclose(concat(V, place), concat.linear(beside))
    assert torch.allclose(add(V, place), F.silu(V + add.linear(tnet.positional_encoding(place, 6))))
    assert on_meta("cub", 5).position.add and not on_meta("imagenet", 5).position.add


def test_sec53_feature_weights_sum_to_one_and_are_equal_when_nothing_is_learned():
    model, features = tiny(feature_weighting=True), torch.randn(4, 6, 16)
    module = model.weighting
    gate = module.excite(F.silu(module.squeeze(features.mean(1)))).sigmoid()[:, None]
    weights = module.weight(features * gate).softmax(1)
    assert torch.allclose(model.pool(features), (features * weights).sum(1), atol=1e-6)
    nn.init.zeros_(module.weight.weight)
    assert torch.allclose(model.pool(features), features.mean(1), atol=1e-6)


def test_eq1_samples_of_one_image_lie_one_after_the_other():
    model, seen = tiny(samples=3, locations="2x2"), []
    images = torch.arange(1.0, 4).view(3, 1, 1, 1).expand(3, 3, 128, 128)  # each has its own colour
    model.backbone, rule = Camera(), model.learning_rule
    model.learning_rule = lambda views, logits, targets: seen.append(targets) or rule(views, logits, targets)
    model(images, torch.tensor([0, 1, 2]))
    assert seen[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for views, m in zip(model.backbone.views, (1, 2, 4)):
        assert torch.allclose(views.mean((1, 2, 3)), torch.tensor([1.0, 2, 3]).repeat_interleave(3 * m))
    model.eval()(images, torch.tensor([0, 1, 2]))
    assert seen[1].tolist() == [0, 1, 2]  # evaluation has one, the best


def test_sec31_what_was_chosen_on_the_way_to_a_view_multiplies():
    model, chosen, choose = tiny(locations="2x3"), [], tnet.TNet.choose
    model.choose = lambda logits, k: chosen.append((logits, choose(model, logits, k))) or chosen[-1][1]
    views = model.traverse(torch.randn(2, 3, 128, 128))
    first, second = (logits.softmax(-1).gather(-1, cells) for logits, cells in chosen)  # (2, 1, 2), (2, 2, 3)
    assert torch.allclose(views.reached[:, 1:3], first[:, 0])
    assert torch.allclose(views.reached[:, 3:], (first[:, 0, :, None] * second).flatten(1))
    for (logits, cells), choice in zip(chosen, views.choices):
        assert choice[0] is logits and choice[1] is cells


# ---------------------------------------------------------------- the learning rule


@pytest.mark.parametrize("select, baseline, level_cap, share", [
    ("sample", "shared", 99, 0.2), ("topk", "separate", 99, 0.2), ("sample", "separate", 2, 0.2),
    ("sample", "shared", 99, 1.0)])
def test_eq3_the_learning_rule_written_out_and_eq1_is_what_is_left_without_per_feature_terms(
        select, baseline, level_cap, share):
    model = tiny(4, lambda_f=0.1, lambda_c=share, lambda_r=share, baseline=baseline, level_cap=level_cap,
                 locations="2x1", select=select)
    torch.manual_seed(1)
    vectors, choices = torch.randn(6, 5, 16), []
    for g, k in ((1, 2), (2, 1)):  # grids on levels 1 and 2, cells chosen in each
        logits = torch.randn(6, g, 25)
        cells = tnet.gumbel_top_k(logits, k)
        choices.append((logits, cells, logits.log_softmax(-1).gather(-1, cells)))
    logits, targets = model.classifier(vectors.mean(1)), torch.arange(6) % 4
    model.baseline.copy_(torch.tensor([0.4, 0.7]))
    total, A = 0.0, 2 if level_cap == 2 else 4
    for i, y in enumerate(targets.tolist()):
        p = [grids[i].softmax(-1) for grids, _, _ in choices]
        a, b, c, d = (cells.item() for _, level, _ in choices for cells in level[i].flatten())
        each = torch.stack((p[0][0, a], p[0][0, b], p[1][0, c], p[1][1, d])).log()  # log p(l_k|x, w)
        together = each.sum() - (1 - p[0][0, a]).log() * (select == "sample")  # the second of what is left
        R = float(logits[i].argmax() == y)
        total += share * -logits[i].log_softmax(0)[y] + 0.1 * share * (R - 0.4) * -together  # Eq. 3a
        for k in range(1 + A):  # the context too, as in the authors' code, but it has no reward
            alone = model.classifier(vectors[i, k])
            total += (1 - share) * -alone.log_softmax(0)[y] / (A + 1)  # Eq. 3b
            R_k = float(alone.argmax() == y)
            total += 0.1 * (1 - share) / A * (R_k - 0.7) * -each[k - 1] * (k > 0)
    views = tnet.Views(vectors, None, None, None, choices)
    loss, terms = model.learning_rule(views, logits, targets)
    assert loss.item() == pytest.approx(total.item() / 6, rel=1e-5)
    p = torch.cat([grids.softmax(-1).flatten(0, 1) for grids, _, _ in choices])  # 18 grids
    assert terms["entropy"].item() == pytest.approx(-(p * p.log()).sum().item() / 18, rel=1e-5)


def test_eq2_the_baseline_follows_the_mean_reward_of_the_whole_batch():
    for changes, rewards, expected in (
        ({"lambda_r": 0.3, "baseline": "shared"}, (1.0, 0.5), [0.515, 0.515]), ({}, (1.0, 0.2), [0.55, 0.47]),
        ({"lambda_r": 1.0, "baseline": "shared"}, (0.8, 0.0), [0.9 * 0.5 + 0.1 * 0.8] * 2),  # the paper's
    ):
        model = tiny(**changes)
        model.update_baseline(*torch.tensor(rewards), 4)
        assert model.baseline.tolist() == pytest.approx(expected)
    model = tiny(accumulate=2)
    for _ in range(2):  # two batches of two parts
        model.baseline.fill_(0.5)
        model.update_baseline(torch.tensor(1.0), torch.tensor(0.5), 4)
        assert model.baseline.tolist() == [0.5, 0.5]
        model.update_baseline(torch.tensor(0.0), torch.tensor(0.25), 2)
        assert model.baseline.tolist() == pytest.approx([0.45 + 0.1 * 4 / 6, 0.45 + 0.1 * 2.5 / 6])


def test_eq2_the_baseline_is_saved_and_changes_in_training_alone():
    model, images, targets = tiny(), torch.randn(3, 3, 128, 128), torch.tensor([0, 1, 0])
    model.eval()(images, targets)
    assert model.state_dict()["baseline"].tolist() == [0.5, 0.5]
    _, terms = model.train()(images, targets)
    assert model.baseline[0].item() == pytest.approx(0.45 + 0.1 * terms["reward"].item()) != 0.5


def test_sec4_rewards_teach_the_location_module_alone_and_cross_entropy_everything_else():
    model = tiny(locations="2x1", feature_weighting=True)
    images = torch.randn(3, 3, 128, 128, requires_grad=True)

    def taught(*names):
        model.zero_grad(set_to_none=True)
        views = model.traverse(images)
        logits = model.classifier(model.pool(views.vectors))
        _, terms = model.learning_rule(views, logits, torch.tensor([0, 1, 2]))
        sum(terms[name] for name in names).backward()
        given = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name.split(".")[0] for name, gradient in given.items() if gradient.any()}

    assert taught("policy", "policy_each") == {"location"} and images.grad is None
    assert taught("ce") == {"backbone", "position", "weighting", "classifier"}
    assert taught("ce_each") == {"backbone", "position", "classifier"}


def test_the_contrastive_term_written_out():
    torch.manual_seed(0)
    vectors, targets = torch.randn(8, 5), torch.tensor([0, 0, 1, 1, 2, 0, 1, 2])
    total = 0.0
    for a, b in product(range(8), repeat=2):
        cosine = F.cosine_similarity(vectors[a], vectors[b], dim=0).item()
        total += 1 - cosine if targets[a] == targets[b] else max(cosine - 0.4, 0)
    assert tnet.contrastive_loss(vectors, targets).item() == pytest.approx(total / 64, rel=1e-4)
    first, second = (tnet.contrastive_loss(vectors[i : i + 4], targets[i : i + 4]) for i in (0, 4))
    twice = tnet.contrastive_loss(vectors.repeat_interleave(4, 0), targets.repeat_interleave(4))
    assert twice.item() == pytest.approx((first + second).item() / 2)  # 32 images are two chunks of 16
    for changes in ({"hard_attention": False}, {"lambda_c": 1.0, "lambda_f": 0.0}):
        model = tiny(contrastive=100.0, **changes)
        loss, terms = model(torch.randn(4, 3, 128, 128), torch.tensor([0, 0, 1, 2]))
        assert loss.item() == pytest.approx((terms["ce"] + 100 * terms["contrastive"]).item(), rel=1e-5)


def test_sec4_the_policy_finds_what_only_the_full_resolution_tells():
    """A bright square in one of 9 cells; whether its lines lie or stand is erased by the small copy."""
    torch.manual_seed(0)
    model = tiny(2, grid=3, cell=1 / 3, base_resolution=16, image_size=(48, 48), locations="1", lambda_f=0.1)
    optimizer = torch.optim.AdamW(tnet.param_groups(model, model.recipe), lr=6e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 120)

    def draw(n):
        cell, label = torch.randint(0, 9, (n,)), torch.randint(0, 2, (n,))
        square = torch.zeros(n, 3, 16, 3, 16)
        square[torch.arange(n), cell // 3, :, cell % 3] = 1.0
        lines = torch.where(torch.arange(48) % 3 == 0, -1.0, 1.0)
        pattern = torch.stack((lines[:, None].expand(48, 48), lines.expand(48, 48)))[label]
        return (square.view(n, 48, 48) * pattern)[:, None].expand(n, 3, 48, 48), label, cell

    assert set(model.rescale(draw(64)[0]).unique().tolist()) == {0.0, 1.0}  # no line left
    for _ in range(120):
        images, label, _ = draw(32)
        optimizer.zero_grad()
        model(images, label)[0].backward()
        optimizer.step()
        scheduler.step()
    images, label, cell = draw(200)
    boxes = model.eval().where(images)[0][:, 0]
    found = (boxes[:, 1] // 16 * 3 + boxes[:, 0] // 16 == cell).float().mean()
    right = (model(images).argmax(1) == label).float().mean()
    assert found > 0.8 and right > 0.85, (found, right)  # at random 0.11, and 0.56


# ---------------------------------------------------------------- what it looked at, and its classifiers


def test_where_gives_the_attended_crops_best_first_and_clipped():
    model = wanting(tiny(cell=0.34375, logit_scale=1.0, locations="2x1"), 0, 24).eval()
    boxes, scores = model.where(torch.randn(2, 3, 224, 200))
    grid = tnet.cell_boxes((224, 200), 5, 0.34375)  # one row of cell 0 lies outside
    assert grid[0][1] == -1 and boxes.shape == (2, 4, 4) and torch.equal(boxes[0], boxes[1])
    assert boxes[0, :2].tolist() == [[0, 0, *grid[0][2:]], [*grid[24][:2], 200, 224]]
    p = model.location_logits(*CONTEXT).softmax(-1)[0]
    assert torch.allclose(scores, torch.stack((p[0], p[24], p[0] * p[0], p[24] * p[0])), rtol=1e-4)


def test_where_is_the_whole_image_without_locations_and_for_a_baseline_where_its_evidence_peaks(monkeypatch):
    boxes, scores = tiny(locations="0").eval().where(torch.randn(2, 3, 128, 96))
    assert boxes.tolist() == [[[0, 0, 96, 128]]] * 2 and scores.tolist() == [[1.0]] * 2
    model, images = tiny(hard_attention=False).eval(), torch.zeros(1, 3, 128, 128)
    assert type(model) is tnet.WholeImage and torch.equal(model.heads(images)["all"], model(images))
    for p in model.backbone.parameters():
        nn.init.constant_(p, 0.1)
    nn.init.ones_(model.classifier.weight)
    images[..., 84:92, 36:44] = 5.0  # the only thing there is
    x1, y1, x2, y2 = model.where(images)[0][0, 0].tolist()
    assert (x2 - x1, y2 - y1) == (8, 8) and abs((x1 + x2) / 2 - 40) <= 8 and abs((y1 + y2) / 2 - 88) <= 8
    _, V, last = model.backbone(images)
    assert torch.allclose(model.evidence(images), last.sum(1)) and torch.equal(V, last.amax((2, 3)))
    drawn, photo = [], common.to_pil(images[0], "half")
    monkeypatch.setattr(common, "panels", lambda *given: drawn.append(given))
    model.figure(images)
    [([boxed, heat], captions)] = drawn
    assert boxed == common.draw_boxes(photo, [[x1, y1, x2, y2]]) != photo and len(captions) == 2
    assert heat == common.heat(photo, model.evidence(images)[0])


def test_sec54_heads_are_everything_the_context_and_the_attended_locations():
    model, images = tiny().eval(), torch.randn(2, 3, 128, 128)
    vectors, heads = model.traverse(images).vectors, model.heads(images)
    for head, chosen in (("all", vectors), ("context", vectors[:, :1]), ("attended", vectors[:, 1:])):
        assert torch.allclose(heads[head], model.classifier(chosen.mean(1)), atol=1e-6)
    for changes, head in (({}, "all"), ({"locations": "0"}, "context"), ({"use_context": False}, "attended")):
        assert torch.allclose(tiny(**changes).eval()(images), heads[head], atol=1e-5)
    assert list(tiny(locations="0").eval().heads(images)) == ["all", "context"]


def test_controls_look_at_fixed_or_at_random_cells():
    images = torch.randn(40, 3, 128, 128)
    fixed = tiny(policy="fixed", fixed_cells=(12, 0), locations="2").eval().where(images)[0]
    assert fixed.unique(dim=0).tolist() == [[[48, 48, 80, 80], [0, 0, 32, 32]]]
    torch.manual_seed(0)
    model = tiny(policy="random").eval()
    boxes, scores = model.where(images)
    assert len(boxes.flatten(0, 1).unique(dim=0)) == 25 and torch.allclose(scores, torch.tensor(1 / 25))
    assert not any(p.requires_grad for p in model.location.parameters())


@pytest.mark.parametrize("weighting", [False, True])
def test_fig1c_and_fig4_draw_the_crops_and_their_probabilities_or_weights(weighting, monkeypatch):
    drawn, panels, boxed = [], common.panels, common.draw_boxes
    monkeypatch.setattr(common, "panels", lambda *given: drawn.append(given) or panels(*given))
    monkeypatch.setattr(common, "draw_boxes", lambda *a, **k: drawn.append(a) or boxed(*a, **k))
    model = wanting(tiny(feature_weighting=weighting, locations="2x1"), 6, 18).eval()
    images = torch.randn(1, 3, 128, 128)
    views = model.traverse(images)
    numbers = model.weighting(views.vectors) if weighting else views.reached
    model.figure(images)
    (picture, boxes, labels), (shown, captions) = drawn
    whole, *expected = [f"{k}: {'w' if weighting else 'p'} {n:.2f}" for k, n in enumerate(numbers[0])]
    assert labels == expected and picture.size == (448, 448) and torch.equal(boxes, 3.5 * views.boxes[0, 1:])
    assert list(captions) == ["attended locations", f"{whole}, level 1", "probability of the cells", *labels]
    assert [s.size for s in shown] == [(448, 448), (32, 32), (128, 128)] + [(32, 32)] * 2 + [(8, 8)] * 2
    tiny(locations="0").eval().figure(images)
    assert list(drawn[-1][1]) == ["attended locations", "0: p 1.00, level 1"]


# ---------------------------------------------------------------- recipes, tables, weights, errors


def test_sec52_stage_2_starts_from_the_run_of_stage_1(tmp_path):
    first = tiny(grid=3, cell=0.5, locations="2")
    first.baseline.fill_(0.8)
    common.save_checkpoint(tmp_path / "last.pt", {"model": first.state_dict()})
    second = tiny(seed=1, grid=3, cell=0.5, locations="2x1", image_size=(256, 256), weights=str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("hard_attention, fetched", [(True, True), (False, True), (True, False)])
def test_sec53_torchvisions_weights_go_to_the_backbone(tmp_path, monkeypatch, hard_attention, fetched):
    theirs, path = tnet.torchvision.models.efficientnet_b0().state_dict(), tmp_path / "b0.pth"
    torch.save(theirs, path)
    monkeypatch.setattr(common, "fetch", lambda url, sha256: path if url.endswith(f"-{sha256}.pth") else None)
    weights = "default" if fetched else str(path)
    recipe = replace(tnet.RECIPES["cub"], hard_attention=hard_attention, weights=weights)
    held = tnet.build(recipe, 5).backbone.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in held.items())


IMAGENET = dict(  # Sec. 5.1 and the authors' code: what differs from the defaults, which are of Sec. 5.1 too
    crop="resized", crop_area=(0.85, 1.0), crop_ratio=(0.5, 2.0), interpolation="random", normalize="half",
    brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2, jitter_prob=0.8, batch_size=64, epochs=200,
    optimizer="adam", lr=1e-4, eps=1e-7, schedule="steps", milestones=(0.8,))
FMOW = IMAGENET | dict(  # Sec. 5.2
    backbone="efficientnet_b0", base_resolution=224, image_size=(448, 448), grid=3, cell=0.5, locations="2",
    epochs=40, lr=1e-3, drop_path=0.3, lambda_c=0.2, lambda_r=0.2)
FMOW_896 = dict(image_size=(896, 896), locations="2x1", epochs=10, drop_path=0.5, lambda_c=0.05,
                lambda_r=0.05, level_cap=2)
CUB = IMAGENET | dict(  # Sec. 5.3
    backbone="efficientnet_b0", base_resolution=224, image_size=(448, 448), cell=0.35, locations="5",
    feature_weighting=True, translate=0.1, rotate=20.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0,
    normalize="imagenet", weights="default", batch_norm=(1e-5, 0.01), dropout=0.75, drop_path=0.5,
    contrastive=100.0, lr=1e-3, backbone_lr=0.1, milestones=(0.9,), weight_decay=2e-4,
    decay_backbone=False)
EN = dict(hard_attention=False, backbone_lr=0.05)
BAGNET = dict(hard_attention=False, dropout=0.625, epochs=175, milestones=(160 / 175,))
TOY = dict(image_size=(112, 112), toy_preset="birds-easy", pad=8, normalize="half", backbone="small",
           base_resolution=32, cell=2 / 7, dropout=0.0, lambda_f=0.05, baseline="separate", epochs=16,
           optimizer="adamw", lr=2e-3, schedule="onecycle")


def test_recipes_hold_the_numbers_of_the_paper_and_of_the_authors_code():
    inherited = dataclasses.asdict(common.Recipe())
    assert {k: v for k, v in dataclasses.asdict(tnet.Recipe()).items() if k not in inherited} == dict(
        backbone="bagnet77", width=16, base_resolution=77, grid=5, cell=77 / 224, dropout=0.5,
        batch_norm=(1e-3, 0.01), feature_weighting=False, hard_attention=True, locations="3",
        use_context=True, policy="learned", fixed_cells=(), select="sample", normalize_logits=True,
        logit_scale=8.0, samples=1, lambda_f=0.1, lambda_c=0.3, lambda_r=0.3, baseline="shared", level_cap=99,
        contrastive=0.0, backbone_lr=1.0, decay_backbone=True)
    expected = {
        "toy": TOY,
        "folder": TOY | dict(image_size=(224, 224), crop="resized", crop_area=(0.5, 1.0), width=32,
                             pad=0, cell=0.25, normalize="imagenet", base_resolution=56, epochs=60),
        "folder-b0": CUB | dict(locations="3", contrastive=0.0, epochs=60, batch_norm=(1e-5, 0.1)),
        "imagenet": IMAGENET, "imagenet-bagnet77": IMAGENET | BAGNET,
        "fmow": FMOW, "fmow-896": FMOW | FMOW_896 | {"weights": "runs/tnet-fmow"},
        "cub": CUB, "cub-en": CUB | EN, "nabirds": CUB | dict(epochs=100, contrastive=50.0),
        "nabirds-en": CUB | EN | dict(epochs=100, contrastive=50.0)}
    assert list(tnet.RECIPES) == list(expected)
    for name, values in expected.items():
        assert tnet.RECIPES[name] == tnet.Recipe(**values), name
    r = tnet.Recipe()
    assert (r.momentum, r.beta2, r.hflip) == (0.9, 0.999, 0.5)
    assert r.label_smoothing == r.grad_clip == r.warmup == 0


def at(papers, changes={}, **more):
    """Rows that evaluate with each number of locations."""
    return [(changes | {"eval": {"locations": k, **more}}, paper) for k, paper in papers.items()]


def test_tables_hold_the_papers_rows_and_values():
    en = dict(hard_attention=False, weight_decay=2e-5)
    en224 = en | dict(image_size=(224, 224), batch_size=64, dropout=0.75, drop_path=0.5)
    from_448, without = FMOW_896 | {"start": "TNet, 448, 2 locations"}, dict(lambda_c=1.0, lambda_r=1.0)
    expected = {
        "1": [(BAGNET, 73.42), *at({"0": 67.29, "1": 73.12, "2": 74.12, "3": 74.41, "5": 74.62})],
        "2": [
            (en224 | dict(epochs=65, boxes=True), 69.7), (en224 | dict(epochs=60), 62.8),
            (en | dict(batch_size=32, epochs=30, dropout=0.75, drop_path=0.3), 69.83),
            (en | dict(image_size=(896, 896), batch_size=32, epochs=30, dropout=0.3, drop_path=0.2), 70.6),
            *at({"0": 47.79, "1": 70.17, "2": 71.46, "3": 71.57}), (from_448, 72.16),
            *at({"2x2": 71.92}, from_448)],
        "5.4": at({"2": 67.95, "3": 69.66, "5": 71.05}, use_context=False),
        "5.4-fmow": [({}, None), (from_448, 37.91)],
        "5.5": at({"1": 73.12, "3": 74.41, "5": 74.62}) + at({"1": 65.21, "3": 67.33, "5": 68.55}, without),
        "toy": [({}, None), ({"locations": "0"}, None), ({"policy": "random"}, None),
                ({"policy": "fixed", "fixed_cells": (12, 7, 17)}, None), (without, None)],
        "baseline": [({"hard_attention": False}, None), ({}, None)], "fig3": [], "fig3-nabirds": []}
    for i in range(5):
        backbone = {"backbone": f"efficientnet_b{i}"}
        for key, own in (("fig3", {"epochs": 125} if i == 4 else {}),
                         ("fig3-nabirds", {"locations": "3"} if i > 2 else {})):
            expected[key] += [(backbone | EN, None), *at(dict.fromkeys("012345"), backbone | own)]
    assert {key: [row[1:] for row in table.rows] for key, table in tnet.TABLES.items()} == expected
    assert {key: (table.data, table.metric) for key, table in tnet.TABLES.items()} == {
        "1": ("imagenet", "top1"), "2": ("fmow", "top1"), "fig3": ("cub", "top1"),
        "fig3-nabirds": ("nabirds", "top1"), "5.4": ("imagenet", "top1"), "5.4-fmow": ("fmow", "coverage"),
        "5.5": ("imagenet", "top1"), "toy": ("toy", "top1"), "baseline": ("toy", "top1")}


def test_the_authors_penalty_spares_batch_norm_and_on_birds_the_backbone():
    def sizes(model):
        groups = tnet.param_groups(model, model.recipe)
        return {(g["lr_scale"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in groups}

    assert sizes(on_meta("cub", 200)) == {(0.1, 0.0): 4_007_548, (1.0, 2e-4): 5_516_434 - 4_007_548}
    assert sizes(on_meta("cub-en", 200)) == {(0.05, 0.0): 4_007_548, (1.0, 2e-4): 1280 * 200 + 200}
    model = on_meta("fmow", 62, hard_attention=False, weight_decay=2e-5)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sizes(model) == {(1.0, 0.0): norms, (1.0, 2e-5): trainable(model) - norms}


@pytest.mark.parametrize("changes, message", [
    ({"locations": "3,1"}, "3,1.*2x1"), ({"locations": "2x0"}, "2x0"), ({"locations": "26"}, "25 cells"),
    ({"locations": "1x1x1x1"}, "pixel"), ({"locations": "0", "use_context": False}, "use-context"),
    ({"backbone": "bagnet77", "grid": 3}, "bagnet77', 3, 32.*bagnet77', 5, 77"),
    ({"policy": "fixed", "fixed_cells": (1, 2, 25)}, "0 to 24"),
    ({"policy": "fixed", "fixed_cells": (1, 2, 2)}, "name 3"),
    ({"weights": "default"}, "EfficientNets"),
    ({"weights": "default", "backbone": "efficientnet_b0", "base_resolution": 224}, "batch-norm 1e-5")])
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
