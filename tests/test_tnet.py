"""tnet.py against its paper: each equation, module and number of "Hard-Attention for Scalable Image Classification"."""
from dataclasses import replace
from itertools import combinations, permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import tnet

TINY = replace(tnet.RECIPES["toy"], width=4, toy_preset="birds-easy")  # 128 px over 32 px, 5 x 5 grid, 16 channels


def tiny(classes=3, seed=0, **changes):
    torch.manual_seed(seed)
    return tnet.build(replace(TINY, **changes), classes)


def on_meta(name, classes, **changes):
    with torch.device("meta"):
        return tnet.build(replace(tnet.RECIPES[name], **{"weights": "none", **changes}), classes).eval()


def trainable(module):
    return sum(p.numel() for p in module.parameters())


def gmacs(model, *size):
    return common.count_macs(model, torch.empty(1, 3, *size, device="meta")) / 1e9


class Camera(nn.Module):
    """A backbone that keeps every view it is shown; its vector is the view's mean colour."""

    def __init__(self, channels):
        super().__init__()
        self.views, self.channels = [], channels

    def forward(self, views):
        self.views.append(views)
        colour = F.adaptive_avg_pool2d(views, 1).repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels]
        return F.adaptive_avg_pool2d(views, 8).repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels], colour


class Wish(nn.Module):
    """A location module whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, F_map, V):
        return self.logits.expand(len(V), -1)


def wanting(model, *cells):
    """The model with a location module that ranks these cells first, in this order."""
    logits = torch.zeros(model.recipe.grid**2)
    logits[list(cells)] = torch.arange(len(cells), 0, -1.0)
    model.location = Wish(logits)
    return model


# ---------------------------------------------------------------- modules and their sizes


@pytest.mark.parametrize("name, classes, count, with_statistics", [
    ("imagenet-bagnet77", 1000, 20_546_664, 20.55), ("imagenet", 1000, 21_859_949, 21.86), ("fmow-en224", 62, 4_086_970, 4.13), ("fmow", 62, 4_517_575, 4.56)])
def test_tables_1_and_2_parameters_are_the_papers_to_the_unit(name, classes, count, with_statistics):
    model = on_meta(name, classes)
    assert trainable(model) == count
    statistics = sum(b.numel() for key, b in model.named_buffers() if "running" in key)
    assert round((count + statistics) / 1e6, 2) == with_statistics  # the paper counts BatchNorm's running mean and variance


@pytest.mark.parametrize("i, baseline, attention, statistics", [
    (0, 4_263_748, 5_516_434, 42_016), (1, 6_769_384, 8_007_410, 62_048), (2, 7_982_794, 9_481_448, 67_568),
    (3, 11_003_632, 12_785_326, 87_296), (4, 17_907_216, 20_331_266, 125_200)])
def test_fig3_parameters_and_location_maps_of_every_backbone(i, baseline, attention, statistics):
    backbone = f"efficientnet_b{i}"
    model = on_meta("cub", 200, backbone=backbone)
    assert trainable(model) == attention and trainable(on_meta("cub-en", 200, backbone=backbone)) == baseline
    assert sum(b.numel() for key, b in model.named_buffers() if "running" in key) == statistics
    assert model.classifier.in_features == model.backbone.channels == (1280, 1280, 1408, 1536, 1792)[i]
    assert trainable(model.position) == (410_880, 410_880, 497_024, 591_360, 804_608)[i]
    assert trainable(model.weighting) == (822_081, 822_081, 994_401, 1_183_105, 1_609_665)[i]
    assert trainable(model.location) == (19_725, 5_065, 7_229, 7_229, 9_777)[i]
    views, (channels, side) = torch.empty(2, 3, 224, 224, device="meta"), ((80, 14), (40, 28), (48, 28), (48, 28), (56, 28))[i]
    assert model.backbone(views)[0].shape == (2, channels, side, side)
    F_map, V = model.extract(views)
    assert F_map.shape == (2, channels, 5, 5) and V.shape == (2, model.backbone.channels)


def test_sec32_module_parameters_of_the_imagenet_and_fmow_models():
    imagenet, fmow = on_meta("imagenet", 1000), on_meta("fmow", 62)
    assert trainable(imagenet.backbone) == 20_033_664
    assert [trainable(part) for part in imagenet.backbone.children()] == [1_792, 181_632, 953_856, 4_990_976, 12_856_320, 1_049_088, 0]
    assert trainable(imagenet.location) == 788_485 and trainable(imagenet.position) == 524_800
    assert trainable(fmow.location) == 19_725 and trainable(fmow.backbone) == 4_007_548


def test_table1_flops():
    bagnet, model = on_meta("imagenet-bagnet77", 1000), on_meta("imagenet", 1000)
    assert gmacs(bagnet, 224, 224) == pytest.approx(18.423, rel=5e-3)
    assert gmacs(model.backbone, 77, 77) == pytest.approx(1.803330, rel=1e-6)
    for k, expected in ((1, 3.628), (2, 5.432), (3, 7.236), (5, 10.843)):
        model.locations = (k,)
        assert gmacs(model, 224, 224) == pytest.approx(expected, rel=5e-3)
    model.locations = ()
    assert gmacs(model, 224, 224) + 0.0197 == pytest.approx(1.824, rel=5e-3)  # the paper's row has the location module


def test_table2_flops_are_those_of_the_views_and_not_of_the_resolution():
    baseline, model = on_meta("fmow-en224", 62), on_meta("fmow", 62)
    for side, expected in ((224, 0.387), (448, 1.546), (896, 6.180)):
        assert gmacs(baseline, side, side) == pytest.approx(expected, rel=5e-3)
    for locations, expected in (((), 0.388), ((1,), 0.775), ((2,), 1.162), ((3,), 1.549), ((2, 1), 1.937), ((2, 2), 2.711)):
        model.locations = locations
        assert gmacs(model, 896, 896) == pytest.approx(expected, rel=5e-3)
    assert gmacs(model, 448, 448) == gmacs(model, 1792, 1792)


def test_sec51_bagnet_layer_sizes_at_77_and_224():
    net = on_meta("imagenet", 1000).backbone
    for side, expected in ((77, (75, 38, 19, 9, 7, 7)), (224, (222, 111, 56, 27, 25, 25))):
        x, sizes = torch.empty(1, 3, side, side, device="meta"), []
        for part in list(net.children())[:6]:
            x = part(x)
            sizes.append((x.shape[1], x.shape[2]))
        assert sizes == list(zip((64, 256, 512, 1024, 2048, 512), expected))
    F_map, V = on_meta("imagenet", 1000).extract(torch.empty(2, 3, 77, 77, device="meta"))
    assert F_map.shape == (2, 1024, 5, 5) and V.shape == (2, 512)


def test_sec51_a_cell_of_bagnets_last_map_sees_77_pixels():
    torch.manual_seed(0)
    net = tnet.BagNet77()
    image = torch.randn(1, 3, 109, 109, requires_grad=True)
    last = net(image)[1]
    assert last.shape[2:] == (11, 11)
    last[0, :, 5, 5].sum().backward()
    rows = image.grad[0].abs().amax((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 77


def test_sec51_bagnet_pads_like_tensorflow():
    block = tnet.Bottleneck(1, 1, 3, 2, False)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        block.reduce.weight.fill_(1.0), block.expand.weight.fill_(1.0), block.conv.weight[0, 0, 0, 0].fill_(1.0)  # reads the window's first pixel
        assert block(torch.arange(6.0).expand(1, 1, 6, 6))[0, 0, 0].tolist() == [0, 2, 4]  # even: windows start at 0
        assert block(torch.arange(1, 6.0).expand(1, 1, 5, 5))[0, 0, 1].tolist() == [0, 2, 4]  # odd: one column of padding first


@pytest.mark.parametrize("backbone, grid, stride, centres", [
    ("efficientnet_b0", 3, 16, (48, 112, 176)), ("efficientnet_b0", 5, 16, (48, 80, 112, 144, 176)), ("efficientnet_b1", 5, 8, (48, 80, 112, 144, 176))])
def test_sec32_candidate_locations_of_efficientnet_sit_where_the_cells_are(backbone, grid, stride, centres):
    base, tap, rows = tnet.TAPS[backbone, grid]
    assert tuple(stride * row for row in rows) == centres
    torch.manual_seed(0)
    net = tnet.EfficientNet(backbone, tap, (1e-3, 0.01), 0.0).eval()
    net.features = net.features[: tap[0] + 1]  # what comes later is not needed here
    for layer in net.modules():
        if isinstance(layer, tnet.torchvision.ops.SqueezeExcitation):
            layer.forward = lambda x: x  # it sees the whole image
    image = torch.randn(1, 3, base, base, requires_grad=True)
    middle = net(image)[0]
    assert middle.shape[2] == base // stride
    middle[0, :, rows[grid // 2], rows[grid // 2]].sum().backward()
    seen = image.grad[0].abs().amax((0, 2)).nonzero()
    assert (seen.min() + seen.max()) / 2 == 112


def test_efficientnet_settings_of_the_authors():
    net = tnet.EfficientNet("efficientnet_b0", (4, 2), (1e-3, 0.01), 0.5)
    drops = [m.p for m in net.modules() if isinstance(m, tnet.torchvision.ops.StochasticDepth)]
    assert drops == pytest.approx([0.5 * i / 16 for i in range(1, 17)])
    assert all((m.eps, m.momentum) == (1e-3, 0.01) for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    depthwise = next(m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups == 32)
    assert depthwise.weight.std().item() == pytest.approx(0.47, abs=0.06)


def test_sec32_location_logits_use_the_context_and_the_place():
    torch.manual_seed(0)
    same = torch.randn(1, 6, 1, 1).expand(1, 6, 3, 3)  # nine equal locations
    for module in (tnet.LocationConcat(6, 5), tnet.LocationSqueezeExcite(6)):
        logits = module(same, torch.zeros(1, 5))
        assert logits.shape == (1, 9) and len(logits.unique()) == 9  # told apart by their coordinates
        module.coordinates.scale.data.zero_()
        assert torch.allclose(module(same, torch.zeros(1, 5)), logits.new_tensor(module(same, torch.zeros(1, 5))[0, 0].item()).expand(1, 9))
    different = torch.randn(1, 6, 3, 3)
    concat, excite = tnet.LocationConcat(6, 5), tnet.LocationSqueezeExcite(6)
    assert not torch.allclose(concat(different, torch.zeros(1, 5)), concat(different, torch.ones(1, 5)))
    changed = different.clone()
    changed[..., 2, 2] += 1
    assert not torch.allclose(excite(different, None)[0, 0], excite(changed, None)[0, 0])  # squeeze-and-excitation carries it to cell 0


# ---------------------------------------------------------------- choosing cells


def test_sec31_sampling_without_replacement_has_the_plackett_luce_frequencies():
    torch.manual_seed(0)
    logits, n = torch.tensor([0.5, -0.3, 0.9, 0.0]), 400_000
    draws, log_prob = tnet.gumbel_top_k(logits.expand(n, 4), 2)
    assert (draws[:, 0] != draws[:, 1]).all()
    p = logits.softmax(0).tolist()
    for i, j in permutations(range(4), 2):
        expected = p[i] * p[j] / (1 - p[i])
        chosen = (draws == torch.tensor([i, j])).all(1)
        assert abs(chosen.float().mean().item() - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
        assert log_prob[chosen][0].exp().item() == pytest.approx(expected, rel=1e-5)


def test_sec31_sampling_takes_a_generator_of_its_own():
    logits = torch.zeros(8, 25)
    first, again = (tnet.gumbel_top_k(logits, 3, torch.Generator().manual_seed(7))[0] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, tnet.gumbel_top_k(logits, 3, torch.Generator().manual_seed(8))[0])


def test_sec31_log_probability_of_a_sequence_by_drawing_one_cell_after_the_other():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, dtype=torch.double)
    p = logits.softmax(1)[0]
    for k in (1, 2, 3, 5):
        total = 0.0
        for order in permutations(range(5), k):
            literal, left = 1.0, 1.0
            for cell in order:
                literal *= p[cell].item() / left
                left -= p[cell].item()
            log_prob = tnet.plackett_luce_log_prob(logits, torch.tensor([order]))
            assert log_prob.exp().item() == pytest.approx(literal, rel=1e-9)
            total += literal
        assert total == pytest.approx(1.0)
    logits.requires_grad_()
    tnet.plackett_luce_log_prob(logits, torch.tensor([[3, 1, 4, 0, 2]])).sum().backward()
    assert logits.grad.isfinite().all()


def expected_gradient(log_prob_of, b):
    """E over all ordered pairs of (R - b) * d log p / d logits, and E[R] with its gradient, in double precision."""
    rewards = {(0, 1): 1.0, (0, 2): 0.0, (0, 3): 0.5, (1, 2): 0.2, (1, 3): 1.0, (2, 3): 0.0}
    logits = torch.tensor([[0.5, -0.3, 0.9, 0.0]], dtype=torch.double, requires_grad=True)
    pairs = torch.tensor(list(permutations(range(4), 2)))
    reward = torch.tensor([rewards[tuple(sorted(pair.tolist()))] for pair in pairs], dtype=torch.double)
    each = logits.expand(len(pairs), 4)
    p = tnet.plackett_luce_log_prob(each, pairs).exp()
    estimate = torch.autograd.grad((p.detach() * (reward - b) * log_prob_of(each, pairs)).sum(), logits, retain_graph=True)[0][0]
    mean = (p * reward).sum()
    return estimate, mean.item(), torch.autograd.grad(mean, logits)[0][0]


@pytest.mark.parametrize("b", [0.0, 0.5])
def test_eq1_the_policy_gradient_is_unbiased_whatever_the_baseline(b):
    estimate, mean, exact = expected_gradient(tnet.plackett_luce_log_prob, b)
    assert mean == pytest.approx(0.2347, abs=5e-5)
    assert exact.tolist() == pytest.approx([0.0342, 0.1152, -0.1824, 0.0329], abs=1e-4)
    assert torch.allclose(estimate, exact, atol=1e-10)


def test_eq1_control_the_sum_of_log_softmax_would_be_biased_for_a_sample():
    summed = lambda logits, pairs: logits.log_softmax(-1).gather(1, pairs).sum(1)
    estimate, _, exact = expected_gradient(summed, 0.0)
    assert estimate.tolist() == pytest.approx([0.0208, 0.1135, -0.1676, 0.0333], abs=1e-3)
    assert (estimate - exact).abs().max() > 0.01
    assert (expected_gradient(summed, 0.5)[0] - exact).abs().max() > 0.05


def test_select_samples_in_training_and_takes_the_most_probable_cells_in_evaluation():
    logits = torch.tensor([0.1, 0.9, 0.9, 0.3]).repeat(64, 1)
    model = tiny(grid=2, locations="2")
    cells, log_prob, each = model.select(logits, 2)
    assert len(cells.unique(dim=0)) == 12
    assert torch.allclose(log_prob, tnet.plackett_luce_log_prob(logits, cells)) and torch.allclose(each, logits.log_softmax(-1).gather(1, cells))
    assert model.eval().select(logits, 2)[0].unique(dim=0).tolist() == [[1, 2]]  # of equals the first
    code = tiny(grid=2, locations="2", select="topk")
    cells, log_prob, each = code.select(logits, 2)  # in training
    assert cells.unique(dim=0).tolist() == [[1, 2]] and torch.allclose(log_prob, each.sum(1))


@pytest.mark.parametrize("grid, most, least", [(2, 0.475, 0.109), (3, 0.2536, 0.0440), (5, 0.1017, 0.0151)])
def test_the_authors_unit_norm_bounds_every_probability(grid, most, least):
    model, K = tiny(grid=grid, logit_scale=1.0, locations="1"), grid**2
    peak = torch.full((K,), 0.0)
    peak[0] = 1e3

    def probabilities(logits):
        model.location = Wish(logits)
        return model.location_logits(torch.zeros(1, 16, grid, grid), torch.zeros(1, 16)).softmax(-1)[0]

    assert probabilities(peak).max().item() == pytest.approx(most, abs=1e-3)
    assert probabilities(-peak).min().item() == pytest.approx(least, abs=1e-3)
    logits = torch.randn(K)
    assert torch.allclose(probabilities(logits), probabilities(7 * logits), atol=1e-6)  # any scale is the same policy
    zero = torch.zeros(K, requires_grad=True)
    p = probabilities(zero)
    p[0].log().backward()
    assert torch.allclose(p, torch.full((K,), 1 / K)) and zero.grad.isfinite().all()


def test_without_the_norm_the_policy_is_the_papers_softmax():
    model = wanting(tiny(normalize_logits=False, logit_scale=1.0), 7, 3)
    assert torch.allclose(model.location_logits(torch.zeros(1, 16, 5, 5), torch.zeros(1, 16))[0], model.location.logits)


# ---------------------------------------------------------------- cropping


@pytest.mark.parametrize("size, grid, fraction, patch, starts", [
    (224, 5, 0.34375, 77, [-1, 36, 73, 110, 147]), (448, 3, 0.5, 224, [0, 112, 224]), (896, 3, 0.5, 448, [0, 224, 448]),
    (448, 5, 0.35, 157, [-1, 72, 145, 218, 291]), (128, 5, 0.25, 32, [0, 24, 48, 72, 96])])
def test_sec5_grids_of_every_dataset(size, grid, fraction, patch, starts):
    assert tnet.crop_grid(size, grid, fraction) == (starts, patch)


@pytest.mark.parametrize("size", [(224, 224), (150, 224), (301, 130)])
def test_sec51_crops_are_slices_of_the_zero_padded_image(size):
    H, W = size
    image = torch.stack((torch.arange(1.0, H + 1)[:, None].expand(H, W), torch.arange(1.0, W + 1).expand(H, W), torch.ones(H, W)))
    (starts_y, h), (starts_x, w) = (tnet.crop_grid(side, 5, 0.34375) for side in size)
    corners = torch.tensor(list(product(starts_y, starts_x)))
    crops = tnet.crop(image[None], torch.zeros(25, dtype=torch.long), corners, (h, w))
    padded = F.pad(image, (10, 10, 10, 10))
    for crop, (y, x) in zip(crops, corners.tolist()):
        assert torch.equal(crop, padded[:, y + 10 : y + 10 + h, x + 10 : x + 10 + w])
    if size == (224, 224):
        assert crops[0, :, 0].eq(0).all() and crops[0, 0, 1, 1] == 1 and crops[6, 0, 0, 0] == 37  # a zero row first; then pixel 36
    inside = (corners >= 0).all(1) & (corners + torch.tensor((h, w)) <= torch.tensor(size)).all(1)
    assert torch.equal(tnet.crop(image[None], torch.zeros(25, dtype=torch.long), corners, (h, w), outside=False)[inside], crops[inside])


def test_sec52_level_3_is_cut_bit_by_bit_from_the_full_resolution():
    torch.manual_seed(0)
    model = tiny(grid=3, cell=0.5, base_resolution=224, locations="2x1").eval()
    model.backbone, image = Camera(16), torch.randn(1, 3, 896, 896)
    for first, second, third in ((0, 8, 4), (5, 3, 2)):
        model.backbone.views.clear()
        model.location = Wish(F.one_hot(torch.tensor([first, second]), 9).float().mul(torch.tensor([[3.0], [2.0]])).sum(0))
        calls = iter((model.location.logits, F.one_hot(torch.tensor(third), 9).float()))
        model.location.forward = lambda F_map, V: next(calls).expand(len(V), -1)
        model.traverse(image)
        level1, level2, level3 = model.backbone.views
        assert torch.equal(level1, F.interpolate(image, (224, 224), mode="bilinear", align_corners=False))
        for crop2, crop3, cell in zip(level2, level3, (first, second)):
            y, x = 224 * (cell // 3), 224 * (cell % 3)
            assert torch.equal(crop2, F.interpolate(image[:, :, y : y + 448, x : x + 448], (224, 224), mode="bilinear", align_corners=False)[0])
            y, x = y + 112 * (third // 3), x + 112 * (third % 3)
            assert torch.equal(crop3, image[0, :, y : y + 224, x : x + 224])


class Watched(torch.Tensor):
    """An image that allows views of itself and counts the pixels that are read otherwise."""

    read = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, torch.Tensor):
            source = next(a for a in args if isinstance(a, Watched))
            if result.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
                Watched.read += result.numel()
                return result.as_subclass(torch.Tensor)
        return result


@pytest.mark.parametrize("side", [448, 896, 1792])
def test_sec1_the_cost_does_not_grow_with_the_resolution(side):
    model = tiny(grid=3, cell=0.5, base_resolution=56, locations="2x1").eval()
    model.backbone = Camera(16)
    patch2, patch3 = side // 2, side // 4
    Watched.read = 0
    model.traverse(torch.zeros(2, 3, side, side).as_subclass(Watched))
    assert [v.shape for v in model.backbone.views] == [(2, 3, 56, 56), (4, 3, 56, 56), (4, 3, 56, 56)]  # 1 + 2 + 2 views, a call a level
    assert Watched.read == 2 * 3 * (56**2 + 2 * patch2**2 + 2 * patch3**2)  # the small copy and the chosen crops, nothing else


# ---------------------------------------------------------------- positions, pooling, order


def test_sec32_positional_encoding_written_out():
    position, dim = torch.tensor([3.0, 1.0, 2.0]), 26
    m, literal = 4, []
    for value in position.tolist():
        for wave in (torch.sin, torch.cos):
            literal += [wave(torch.tensor(value * 100 ** (-j / (m - 1)))).item() for j in range(m)]
    assert tnet.positional_encoding(position, dim).tolist() == pytest.approx(literal + [0.0, 0.0], abs=1e-6)
    for D, m in ((512, 85), (320, 53), (352, 58), (384, 64), (448, 74)):
        code = tnet.positional_encoding(torch.zeros(3), D)
        assert code.shape == (D,) and code.sum() == 3 * m and code[6 * m :].eq(0).all()


def test_sec32_every_place_and_scale_has_its_own_code():
    places = [(0, 0, 0)] + [(y, x, 1) for y in range(3) for x in range(3)] + [(y, x, 2) for y in range(9) for x in range(9)]
    codes = tnet.positional_encoding(torch.tensor(places), 320)
    assert torch.pdist(codes).min() > 0.1


def test_sec32_children_have_the_coordinates_of_their_place_in_the_finer_grid():
    model = wanting(tiny(grid=3, cell=0.5, locations="2x2"), 5, 7).eval()
    seen = []
    model.position.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    model.traverse(torch.randn(1, 3, 128, 128))
    expected = [[0, 0, 0], [1, 2, 1], [2, 1, 1]] + [[3 * y + r, 3 * x + c, 2] for y, x in ((1, 2), (2, 1)) for r, c in ((1, 2), (2, 1))]
    assert seen[0][0].tolist() == expected


def test_sec32_positional_modules_are_what_the_authors_built():
    torch.manual_seed(0)
    V, place = torch.randn(2, 3, 24), torch.randint(0, 5, (2, 3, 3))
    concat, add = tnet.PositionConcat(24), tnet.PositionAdd(24)
    assert torch.allclose(concat(V, place), concat.linear(torch.cat((V, tnet.positional_encoding(place, 24)), -1)))
    assert torch.allclose(add(V, place), F.silu(V + add.linear(tnet.positional_encoding(place, 6))))


def test_sec53_feature_weights_sum_to_one_and_are_equal_when_nothing_is_learned():
    model = tiny(feature_weighting=True)
    features = torch.randn(4, 6, 16)
    weights = model.weighting(features)
    assert torch.allclose(weights.sum(1), torch.ones(4)) and weights.std() > 0
    assert torch.allclose(model.pool(features), torch.einsum("bnc,bn->bc", features, weights), atol=1e-6)  # of the vectors before the gate
    nn.init.zeros_(model.weighting.weight.weight)
    assert torch.allclose(model.pool(features), features.mean(1), atol=1e-6)


def test_sec31_images_keep_their_order_and_do_not_mix():
    model = tiny().eval()
    images, order = torch.randn(5, 3, 128, 128), torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(model(images)[order], model(images[order]), atol=1e-5)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), alone, atol=1e-5)


def test_eq1_samples_of_one_image_lie_one_after_the_other_and_share_level_1():
    model = tiny(samples=3, locations="2x2")
    model.backbone = Camera(16)
    images = torch.arange(1.0, 4.0).view(3, 1, 1, 1).expand(3, 3, 128, 128)  # each image has its own colour
    seen = model.traverse(images)
    level1, level2, level3 = (views.mean((1, 2, 3)) for views in model.backbone.views)
    assert torch.allclose(level1, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(level2, torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(6)) and torch.allclose(level3, torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(12))
    assert seen.features.shape == (9, 7, 16) and seen.log_prob.shape == (9,)
    loss, terms = model(images, torch.tensor([0, 1, 2]))
    assert loss.shape == () and 0 <= terms["top1"] <= 1
    assert model.eval()(images).shape == (3, 3)  # evaluation has one, the best


def test_sec31_the_log_probability_of_all_grids_multiplies():
    model = tiny(locations="2x3")
    grids = []
    model.location.register_forward_hook(lambda module, args, logits: grids.append(8.0 * F.normalize(logits, dim=-1)))
    chosen, select = [], model.select
    model.select = lambda logits, k: chosen.append(select(logits, k)) or chosen[-1]
    seen = model.traverse(torch.randn(2, 3, 128, 128))
    first, second = (tnet.plackett_luce_log_prob(g, c[0]) for g, c in zip(grids, chosen))
    assert torch.allclose(seen.log_prob, first + second.view(2, 2).sum(1), atol=1e-5)
    own = [g.log_softmax(-1).gather(1, c[0]) for g, c in zip(grids, chosen)]
    assert torch.allclose(seen.cell_log_probs, torch.cat((own[0], own[1].view(2, 6)), 1), atol=1e-5)
    assert torch.allclose(seen.reached[:, 2:].view(2, 2, 3), own[0].exp()[..., None] * own[1].exp().view(2, 2, 3), atol=1e-5)


# ---------------------------------------------------------------- the learning rule


def rule(model, B=6, A=3, seed=1):
    """A traversal made up by hand, with its logits and targets."""
    torch.manual_seed(seed)
    C = model.backbone.channels
    seen = tnet.Traversal(torch.randn(B, 1 + A, C), None, None, torch.randn(B, A), torch.randn(B), [torch.full((B, 25), 0.04)])
    return seen, model.classify(model.pool(seen.features)), torch.arange(B) % model.classifier.out_features


def losses(model, seen, logits, targets):
    terms = {"ce": F.cross_entropy(logits, targets)}
    return model.learning_rule(seen, logits, targets, terms), terms


@pytest.mark.parametrize("baseline, level_cap", [("shared", 0), ("separate", 0), ("separate", 2)])
def test_eq3_the_learning_rule_written_out(baseline, level_cap):
    model = tiny(classes=4, lambda_f=0.1, lambda_c=0.3, lambda_r=0.2, baseline=baseline, level_cap=level_cap, locations="2x1" if level_cap else "4")
    seen, logits, targets = rule(model, A=4)
    model.baseline.copy_(torch.tensor([0.4, 0.7]))
    total, A = 0.0, 2 if level_cap else 4
    for i, y in enumerate(targets.tolist()):
        R = float(logits[i].argmax() == y)
        total += 0.3 * -logits[i].log_softmax(0)[y] + 0.1 * 0.2 * (R - 0.4) * -seen.log_prob[i]  # Eq. 3a
        total += 0.7 * -model.classify(seen.features[i, 0]).log_softmax(0)[y] / (A + 1)  # the context, as in the authors' code
        for k in range(A):
            each = model.classify(seen.features[i, 1 + k])
            R_k = float(each.argmax() == y)
            total += 0.7 * -each.log_softmax(0)[y] / (A + 1) + 0.1 * 0.8 / A * (R_k - 0.7) * -seen.cell_log_probs[i, k]  # Eq. 3b
    assert losses(model, seen, logits, targets)[0].item() == pytest.approx(total.item() / len(targets), rel=1e-5)


def test_eq1_is_what_is_left_without_per_feature_terms():
    model = tiny(classes=4, lambda_c=1.0, lambda_r=1.0, lambda_f=0.1)
    seen, logits, targets = rule(model)
    R = (logits.argmax(1) == targets).float()
    expected = F.cross_entropy(logits, targets) - 0.1 * ((R - 0.5) * seen.log_prob).mean()
    assert losses(model, seen, logits, targets)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_eq3b_alone_is_the_mean_over_all_vectors_and_rewards_only_attended_ones():
    model = tiny(classes=4, lambda_c=0.0, lambda_r=0.0, lambda_f=0.0)
    seen, logits, targets = rule(model)
    each = [F.cross_entropy(model.classify(seen.features[:, k]), targets).item() for k in range(4)]
    assert losses(model, seen, logits, targets)[0].item() == pytest.approx(sum(each) / 4, rel=1e-5)
    model = tiny(classes=4, lambda_r=0.0)
    terms = losses(model, *rule(model))[1]
    other = rule(model)
    other[0].features[:, 0] = 100 * torch.randn(16)  # another context vector
    model.baseline.fill_(0.5)
    other_terms = losses(model, *other)[1]
    assert torch.equal(other_terms["policy_each"], terms["policy_each"]) and other_terms["ce_each"] != terms["ce_each"]


def test_eq2_the_baseline_follows_the_mean_reward_and_the_loss_uses_the_old_one():
    model = tiny(lambda_r=0.3, baseline="shared")
    model.update_baseline(torch.tensor(1.0), torch.tensor(0.5))
    assert model.baseline.tolist() == pytest.approx([0.515, 0.515])
    separate = tiny(baseline="separate")
    separate.update_baseline(torch.tensor(1.0), torch.tensor(0.2))
    assert separate.baseline.tolist() == pytest.approx([0.55, 0.47])
    eq2 = tiny(lambda_r=1.0, baseline="shared")
    eq2.update_baseline(torch.tensor(0.8), torch.tensor(0.0))
    assert eq2.baseline[0].item() == pytest.approx(0.9 * 0.5 + 0.1 * 0.8)
    seen, logits, targets = rule(model)
    old = model.baseline[0].item()
    R = (logits.argmax(1) == targets).float()
    assert losses(model, seen, logits, targets)[1]["policy"].item() == pytest.approx(-((R - old) * seen.log_prob).mean().item(), rel=1e-5)
    assert model.baseline[0].item() != pytest.approx(old)


def test_eq2_the_baseline_is_saved_and_never_trained_or_touched_by_evaluation():
    model = tiny()
    assert "baseline" in model.state_dict() and "baseline" not in dict(model.named_parameters())
    model.eval()(torch.randn(2, 3, 128, 128), torch.tensor([0, 1]))
    assert model.baseline.tolist() == [0.5, 0.5]
    model.train()(torch.randn(3, 3, 128, 128), torch.tensor([0, 1, 0]))
    assert 0.5 not in model.baseline.tolist()


@pytest.mark.parametrize("reward", [1.0, 0.0])
def test_eq1_a_reward_above_the_baseline_makes_the_chosen_cells_more_probable(reward):
    model = tiny(classes=2, lambda_f=1.0, locations="2")
    images = torch.randn(1, 3, 128, 128)
    nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([1.0, -1.0])  # the answer is always 0
    chosen = torch.tensor([[7, 3]])

    def same_again(logits, k):
        each = logits.log_softmax(-1).gather(1, chosen)
        return chosen, tnet.plackett_luce_log_prob(logits, chosen), each

    model.select = same_again
    before = model.traverse(images)
    model(images, torch.tensor([0 if reward else 1]))[0].backward()
    with torch.no_grad():
        for p in model.location.parameters():
            p -= 1e-3 * p.grad
    after = model.traverse(images)
    assert (after.log_prob > before.log_prob).item() == bool(reward)
    assert (after.cell_log_probs.sum() > before.cell_log_probs.sum()).item() == bool(reward)


def test_eq1_a_step_on_the_cross_entropy_lowers_it():
    model, images, targets = tiny(lambda_f=0.0), torch.randn(4, 3, 128, 128), torch.tensor([0, 1, 2, 0])
    model.select = lambda logits, k: (cells := torch.tensor([[7, 3, 12]]).expand(4, 3), logits.new_zeros(4), logits.gather(1, cells))
    loss, _ = model(images, targets)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-2 * p.grad if p.grad is not None else 0.0
    assert model(images, targets)[0] < loss


def gradients(model, term, images, targets):
    """Parameters by module that get a gradient other than zero from one term alone."""
    model.zero_grad(set_to_none=True)
    r = model.recipe
    seen = model.traverse(images)
    logits = model.classify(model.pool(seen.features))
    terms = {"ce": F.cross_entropy(logits, targets)}
    model.learning_rule(seen, logits, targets, terms)
    sum(terms[name] for name in term).backward()
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_sec4_rewards_teach_the_location_module_alone_and_cross_entropy_everything_else():
    model = tiny(locations="2x1", feature_weighting=True)
    images, targets = torch.randn(3, 3, 128, 128, requires_grad=True), torch.tensor([0, 1, 2])
    assert gradients(model, ("policy", "policy_each"), images, targets) == {"location"}
    assert images.grad is None
    assert gradients(model, ("ce",), images, targets) == {"backbone", "position", "weighting", "classifier"}
    assert gradients(model, ("ce_each",), images, targets) == {"backbone", "position", "classifier"}
    assert images.grad is not None


def test_every_trainable_parameter_gets_a_gradient_in_every_configuration():
    for changes in ({}, {"locations": "0"}, {"lambda_f": 0.0}, {"policy": "random"}, {"locations": "2x1", "level_cap": 2, "feature_weighting": True},
                    {"use_context": False}, {"hard_attention": False, "contrastive": 1.0}, {"select": "topk"}, {"samples": 2}):
        model = tiny(**changes)
        model(torch.randn(4, 3, 128, 128), torch.tensor([0, 1, 2, 0]))[0].backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == [], changes


def test_the_contrastive_term_written_out():
    torch.manual_seed(0)
    vectors, targets = torch.randn(8, 5), torch.tensor([0, 0, 1, 1, 2, 0, 1, 2])

    def literal(v, t):
        total = 0.0
        for a, b in product(range(len(v)), repeat=2):
            cosine = F.cosine_similarity(v[a], v[b], dim=0).item()
            total += 1 - cosine if t[a] == t[b] else max(cosine - 0.4, 0)
        return total / len(v) ** 2

    assert tnet.contrastive_loss(vectors, targets, 0.4, 16).item() == pytest.approx(literal(vectors, targets), rel=1e-4)
    halves = (literal(vectors[:4], targets[:4]) + literal(vectors[4:], targets[4:])) / 2
    assert tnet.contrastive_loss(vectors, targets, 0.4, 4).item() == pytest.approx(halves, rel=1e-4)
    model = tiny(contrastive=100.0, hard_attention=False)
    loss, terms = model(torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 2]))
    assert loss.item() == pytest.approx((terms["ce"] + 100 * terms["contrastive"]).item(), rel=1e-5)


def test_sec4_the_policy_finds_what_only_the_full_resolution_tells():
    """A bright square in one of 9 cells; whether its lines lie or stand is erased by the small copy, which keeps every third pixel."""
    torch.manual_seed(0)
    recipe = replace(TINY, grid=3, cell=1 / 3, base_resolution=16, image_size=(48, 48), locations="1", lambda_f=0.1)
    model = tnet.build(recipe, 2)
    optimizer = torch.optim.AdamW(tnet.param_groups(model, recipe), lr=3e-3)

    def draw(n):
        cell, label = torch.randint(0, 9, (n,)), torch.randint(0, 2, (n,))
        square = torch.zeros(n, 3, 16, 3, 16)
        square[torch.arange(n), cell // 3, :, cell % 3] = 1.0
        lines = torch.where(torch.arange(48) % 3 == 0, -1.0, 1.0)
        pattern = torch.stack((lines[:, None].expand(48, 48), lines.expand(48, 48)))[label]
        return (square.view(n, 48, 48) * pattern)[:, None].expand(n, 3, 48, 48), label, cell

    assert set(F.interpolate(draw(64)[0], (16, 16), mode="bilinear").unique().tolist()) == {0.0, 1.0}  # no line left
    for _ in range(250):
        images, label, _ = draw(32)
        optimizer.zero_grad()
        model(images, label)[0].backward()
        optimizer.step()
    images, label, cell = draw(200)
    boxes = model.eval().where(images)[0][:, 0]
    found = (boxes[:, 1] // 16 * 3 + boxes[:, 0] // 16 == cell).float().mean()
    right = (model(images).argmax(1) == label).float().mean()
    assert found > 0.8 and right > 0.85, (found, right)  # at random 0.11, and 0.56


def test_under_adam_the_weight_of_the_policy_terms_does_not_matter():
    weights = []
    for lambda_f in (0.05, 1.0):
        model = tiny(lambda_f=lambda_f)
        optimizer = torch.optim.Adam(tnet.param_groups(model, model.recipe), lr=1e-3, eps=1e-12)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 3, 128, 128), torch.arange(6) % 3)[0].backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.location.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny().location.parameters()])
    assert (weights[0] - start).abs().max() > 1e-3 and (weights[0] - weights[1]).abs().max() < 1e-4


# ---------------------------------------------------------------- what it looked at, and its classifiers


def test_where_gives_the_attended_crops_best_first_and_clipped():
    model = wanting(tiny(grid=5, cell=0.34375, logit_scale=1.0, locations="2x1"), 0, 24).eval()  # one row of cell 0 lies outside
    boxes, scores = model.where(torch.randn(2, 3, 224, 200))
    (y, h), (x, w) = tnet.crop_grid(224, 5, 0.34375), tnet.crop_grid(200, 5, 0.34375)
    assert y[0] == -1 and boxes.shape == (2, 4, 4) and torch.equal(boxes[0], boxes[1])
    assert boxes[0, :2].tolist() == [[0, 0, x[0] + w, y[0] + h], [x[-1], y[-1], 200, 224]]
    p = model.location_logits(torch.zeros(1, 16, 5, 5), torch.zeros(1, 16)).softmax(-1)[0]
    assert scores[0].tolist() == pytest.approx(torch.stack((p[0], p[24], p[0] * p[0], p[24] * p[0])).tolist(), rel=1e-4)
    assert (scores.diff(dim=1) <= 0).all() and (boxes[..., 2:] > boxes[..., :2]).all() and (boxes >= 0).all()


def test_where_is_the_whole_image_without_locations_and_a_cell_sized_box_for_a_baseline():
    boxes, scores = tiny(locations="0").eval().where(torch.randn(2, 3, 128, 96))
    assert boxes.tolist() == [[[0, 0, 96, 128]]] * 2 and scores.tolist() == [[1.0]] * 2
    model = tiny(hard_attention=False).eval()
    for p in model.backbone.parameters():
        nn.init.constant_(p, 0.1)
    nn.init.ones_(model.classifier.weight)
    images = torch.zeros(1, 3, 128, 128)
    images[..., 84:92, 36:44] = 5.0  # the only thing there is
    box = model.where(images)[0][0, 0]
    assert (box[2:] - box[:2]).tolist() == [32, 32]
    assert abs((box[0] + box[2]) / 2 - 40) <= 8 and abs((box[1] + box[3]) / 2 - 88) <= 8


def test_sec54_heads_are_everything_the_context_and_the_attended_locations():
    model, images = tiny().eval(), torch.randn(2, 3, 128, 128)
    features, heads = model.traverse(images).features, model.heads(images)
    assert list(heads) == ["all", "context", "attended"]
    assert torch.allclose(heads["all"], model(images)) and torch.allclose(heads["context"], model.classifier(features[:, 0]))
    assert torch.allclose(heads["attended"], model.classifier(features[:, 1:].mean(1)), atol=1e-6)
    for changes, head in (({"locations": "0"}, "context"), ({"use_context": False}, "attended")):
        assert torch.allclose(tiny(**changes).eval()(images), heads[head], atol=1e-5)  # the same initial weights
    assert list(tiny(hard_attention=False).heads(images)) == ["all"]


def test_sec54_all_cells_without_the_context_are_the_mean_of_all_cells():
    model = tiny(grid=2, cell=0.5, locations="4", use_context=False).eval()
    images = torch.randn(1, 3, 64, 64)
    quarters = images.unfold(2, 32, 32).unfold(3, 32, 32).reshape(3, 4, 32, 32).transpose(0, 1)
    V = model.extract(quarters)[1]
    places = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
    assert torch.allclose(model(images)[0], model.classifier(model.position(V, places).mean(0)), atol=1e-5)


def test_controls_look_at_fixed_or_at_random_cells():
    images = torch.randn(40, 3, 128, 128)
    fixed = tiny(policy="fixed", fixed_cells=(12, 0), locations="2").eval().where(images)[0]
    assert fixed.unique(dim=0).tolist() == [[[48, 48, 80, 80], [0, 0, 32, 32]]]
    torch.manual_seed(0)
    model = tiny(policy="random").eval()
    boxes, scores = model.where(images)
    assert len(boxes.unique(dim=0)) > 30 and len(boxes.flatten(0, 1).unique(dim=0)) == 25 and torch.allclose(scores, torch.tensor(1 / 25))
    assert not any(p.requires_grad for p in model.location.parameters())


def test_figures_show_every_attended_crop():
    images = torch.randn(2, 3, 128, 128)
    for changes in ({}, {"locations": "2x1", "feature_weighting": True}, {"locations": "0"}, {"hard_attention": False}):
        pages = tiny(**changes).eval().figure(images)
        assert len(pages) == 2 and all(page.height == pages[0].height for page in pages)
    assert tiny(locations="5").eval().figure(images)[0].width > tiny(locations="3").eval().figure(images)[0].width


# ---------------------------------------------------------------- recipes, weights, errors


def test_locations_and_use_context_leave_the_weights_alone():
    state = tiny(locations="3").state_dict()
    for changes in ({"locations": "0"}, {"locations": "5"}, {"locations": "2x1"}, {"use_context": False}, {"policy": "random"}, {"select": "topk", "logit_scale": 1.0}, {"baseline": "shared"}):
        assert {k: v.shape for k, v in tiny(seed=1, **changes).state_dict().items()} == {k: v.shape for k, v in state.items()}, changes


def test_sec52_stage_2_starts_from_the_run_of_stage_1(tmp_path):
    first = tiny(grid=3, cell=0.5, locations="2")
    first.baseline.fill_(0.8)
    common.save_checkpoint(tmp_path / "last.pt", {"model": first.state_dict(), "ema": None})
    (tmp_path / "run.json").write_text("{}")  # a run folder
    second = tiny(seed=1, grid=3, cell=0.5, locations="2x1", image_size=(256, 256), weights=str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())) and second.baseline[0] == 0.8
    other = tiny(classes=7, seed=1, grid=3, cell=0.5, weights=str(tmp_path))  # another data set: all but the classifier
    assert other.classifier.weight.shape == (7, 16) and torch.equal(other.position.linear.weight, first.position.linear.weight)
    with pytest.raises(ValueError, match="missing.*weighting"):
        tiny(feature_weighting=True, weights=str(tmp_path))
    assert tnet.RECIPES["fmow-896"].weights == "runs/tnet-fmow"


def test_torchvisions_weights_go_to_the_backbone(tmp_path, monkeypatch):
    recipe = replace(tnet.RECIPES["cub"], feature_weighting=False)
    torch.manual_seed(0)
    theirs = tnet.torchvision.models.efficientnet_b0().state_dict()
    torch.save(theirs, tmp_path / "b0.pth")
    asked = []
    monkeypatch.setattr(common, "fetch", lambda url, sha256="": asked.append((url, sha256)) or tmp_path / "b0.pth")
    model = tnet.build(recipe, 5)
    assert asked[0][0].endswith(f"-{asked[0][1]}.pth") and len(asked[0][1]) == 8
    assert all(torch.equal(value, theirs[key]) for key, value in model.backbone.state_dict().items())


def test_recipes_hold_the_papers_numbers():
    R = tnet.RECIPES
    imagenet, fmow, stage2, cub = R["imagenet"], R["fmow"], R["fmow-896"], R["cub"]
    assert (imagenet.epochs, imagenet.lr, imagenet.dropout, imagenet.lambda_c, imagenet.lambda_r, imagenet.locations, imagenet.cell) == (200, 1e-4, 0.5, 0.3, 0.3, "3", 0.34375)
    assert (imagenet.optimizer, imagenet.eps, imagenet.batch_size, imagenet.schedule, imagenet.milestones, imagenet.normalize) == ("adam", 1e-7, 64, "steps", (0.8,), "half")
    assert (imagenet.crop, imagenet.crop_area, imagenet.crop_ratio, imagenet.interpolation, imagenet.jitter_prob) == ("resized", (0.85, 1.0), (0.5, 2.0), "random", 0.8)
    assert (R["imagenet-bagnet77"].dropout, R["imagenet-bagnet77"].epochs, R["imagenet-bagnet77"].hard_attention) == (0.625, 175, False)
    assert (fmow.image_size, fmow.locations, fmow.grid, fmow.cell, fmow.epochs, fmow.lr, fmow.lambda_c, fmow.drop_path) == ((448, 448), "2", 3, 0.5, 40, 1e-3, 0.2, 0.3)
    assert (stage2.image_size, stage2.locations, stage2.epochs, stage2.lambda_c, stage2.lambda_r, stage2.level_cap, stage2.drop_path) == ((896, 896), "2x1", 10, 0.05, 0.05, 2, 0.5)
    assert [(R[f"fmow-en{n}"].batch_size, R[f"fmow-en{n}"].epochs, R[f"fmow-en{n}"].dropout, R[f"fmow-en{n}"].drop_path, R[f"fmow-en{n}"].boxes) for n in ("224", "224-boxes", "448", "896")] == [
        (64, 60, 0.75, 0.5, False), (64, 65, 0.75, 0.5, True), (32, 30, 0.75, 0.3, False), (32, 30, 0.3, 0.2, False)]
    assert (cub.image_size, cub.cell, cub.locations, cub.epochs, cub.contrastive, cub.dropout, cub.milestones, cub.feature_weighting) == ((448, 448), 0.35, "5", 200, 100.0, 0.75, (0.9,), True)
    assert (cub.normalize, cub.weights, cub.translate, cub.rotate, cub.brightness, cub.batch_norm[0]) == ("imagenet", "default", 0.1, 20.0, 0.0, 1e-5)
    assert (R["nabirds"].epochs, R["nabirds"].contrastive, R["nabirds-en"].hard_attention) == (100, 50.0, False)


def test_tables_hold_the_papers_numbers_and_name_recipe_fields():
    rows = {key: {name: value for name, _, value in table.rows} for key, table in tnet.TABLES.items()}
    assert rows["1"]["BagNet-77"] == 73.42 and list(rows["1"].values())[1:] == [67.29, 73.12, 74.12, 74.41, 74.62]
    assert list(rows["2"].values()) == [69.7, 62.8, 69.83, 70.6, 47.79, 70.17, 71.46, 71.57, 72.16, 71.92]
    assert list(rows["5.5"].values()) == [73.12, 74.41, 74.62, 65.21, 67.33, 68.55] and list(rows["5.4"].values()) == [67.95, 69.66, 71.05]
    for table in tnet.TABLES.values():
        for name, changes, _ in table.rows:
            training, evaluation = common.split_row(changes)
            tnet.check(replace(tnet.RECIPES[table.data], **training))
            tnet.check(replace(tnet.RECIPES[table.data], **training | evaluation))  # every field exists, every setting works
    assert dict((name, changes["image_size"]) for name, changes, _ in tnet.TABLES["2"].rows if "image_size" in changes)["EfficientNet-B0, 896"] == (896, 896)


def test_the_authors_penalty_spares_batch_norm_and_on_birds_the_backbone():
    model = on_meta("cub", 200)
    groups = tnet.param_groups(model, model.recipe)
    assert sum(p.numel() for group in groups for p in group["params"]) == trainable(model)
    assert sorted((group["lr_scale"], group["weight_decay"]) for group in groups) == [(0.1, 0.0), (1.0, 2e-4)]
    baseline = on_meta("fmow-en224", 62)
    decays = {group["weight_decay"]: group["params"] for group in tnet.param_groups(baseline, baseline.recipe)}
    norms = sum(p.numel() for m in baseline.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sum(p.numel() for p in decays[0.0]) == norms and sum(p.numel() for p in decays[2e-5]) == trainable(baseline) - norms


@pytest.mark.parametrize("changes, message", [
    ({"locations": "3,1"}, "locations '3,1'.*2x1"), ({"locations": "two"}, "locations 'two'"), ({"locations": "2x0"}, "2x0"), ({"locations": "26"}, "has 25"),
    ({"backbone": "resnet50"}, "backbone resnet50.*efficientnet_b0"), ({"backbone": "bagnet77", "grid": 3}, "grid 3 with backbone bagnet77"),
    ({"backbone": "efficientnet_b0"}, "base_resolution 32.*224"), ({"cell": 0.0}, "cell 0.0"), ({"locations": "0", "use_context": False}, "nothing is left"),
    ({"policy": "fixed"}, "needs 3 different cells"), ({"policy": "fixed", "fixed_cells": (1, 2, 25)}, "0 to 24"), ({"policy": "fixed", "fixed_cells": (1, 2, 2)}, "different"),
    ({"lambda_c": 1.5}, "lambda_c 1.5"), ({"samples": 0}, "samples 0"), ({"samples": 2, "select": "topk"}, "--select sample"), ({"level_cap": 1}, "level_cap 1"),
    ({"weights": "default"}, "efficientnet_b0"), ({"weights": "default", "backbone": "efficientnet_b0", "base_resolution": 224}, "batch-norm 1e-5")])
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
