"""tdsa.py against the paper: each equation by hand or loop by loop, backbones, recipes, tables, weights."""
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet18_Weights, VGG16_BN_Weights, resnet18
from torchvision.models.vgg import cfgs, make_layers

import common
import tdsa

TOY, CUB = tdsa.RECIPES["toy"], tdsa.RECIPES["cub"]
SMALL = replace(TOY, image_size=(48, 32))
CE, MC, R18 = {"loss": "ce", "aligned": "none"}, {"loss": "mc", "aligned": "high"}, {"backbone": "resnet18"}
PEAKS = [(0, 1, 2.0), (2, 0, 5.0), (1, 1, 3.0)]  # row, column and height of a channel's on 3 x 2 cells
HAND = torch.tensor([[2.0, 0], [0, 2], [1, 1], [1, 1]]).view(1, 4, 1, 2)  # two classes of two channels


def model_of(classes=4, **changes):
    torch.manual_seed(0)
    return tdsa.build(replace(SMALL, **changes), classes)


def on_meta(classes=200, **changes):
    with torch.device("meta"):
        return tdsa.build(replace(CUB, **changes), classes).eval()


def batch(images=3, classes=4):
    torch.manual_seed(1)
    return torch.randn(images, 3, 48, 32), torch.arange(images) % classes


def test_eqs_3_to_6_by_hand_on_a_map_of_two_places():
    target, masked = torch.tensor([0]), torch.tensor([[True, False, True, False]])
    empty, _ = tdsa.mc_loss(torch.zeros(1, 600, 2, 2), target, 200)
    assert empty.item() == pytest.approx(5.298317, abs=1e-5)  # ln S
    assert tdsa.class_spread(HAND, 2)[0].tolist() == pytest.approx([2 / (1 + math.exp(-2)), 1.0], abs=1e-6)
    assert tdsa.class_spread(HAND, 2, share=True)[0].tolist() == pytest.approx([1.7615942 / 2, 0.5], abs=1e-6)
    assert tdsa.class_scores(HAND, 2)[0].tolist() == [2, 1]
    assert tdsa.class_scores(HAND, 2, masked)[0].tolist() == [1, 1]
    for mask, dis in ((None, 0.3132617), (masked, math.log(2))):
        found = [v.item() for v in tdsa.mc_loss(HAND, target, 2, mask)]
        assert found == pytest.approx((dis, -0.3096015), abs=1e-6)
        _, paper = tdsa.mc_loss(HAND, target, 2, mask, "paper")
        assert paper.item() == pytest.approx(2.7615942 / 2, abs=1e-6)


@pytest.mark.parametrize("masks", [1, 2])  # one for all images, or each its own
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 3, 3)])
def test_eqs_3_to_6_class_by_class_in_value_and_gradient_also_if_the_first_have_a_channel_less(sizes, masks):
    features, targets = torch.randn(2, sum(sizes), 3, 2).requires_grad_(), torch.tensor([1, 0])
    mask = tdsa.cwa_mask(sum(sizes), 3, masks)
    masked = (features * mask[:, :, None, None]).split(sizes, 1)
    g = torch.stack([part.amax(1).mean((1, 2)) for part in masked], 1)
    h = [part.flatten(2).softmax(2).amax(1).sum(1).mean() for part in features.split(sizes, 1)]
    dis = -(g.exp() / g.exp().sum(1, keepdim=True))[[0, 1], targets].log().mean()
    code = sum(h_k / c for h_k, c in zip(h, sizes)) / 3 - 1
    for diversity, div in (("paper", sum(h) / 3), ("code", code)):
        for found, wanted in zip(tdsa.mc_loss(features, targets, 3, mask, diversity), (dis, div)):
            ours, literal = (torch.autograd.grad(x, features, retain_graph=True)[0] for x in (found, wanted))
            assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
            assert torch.allclose(ours, literal, atol=1e-7) and (sizes[0] == 1 or literal.abs().max() > 1e-3)


@pytest.mark.parametrize("c, ones", [(1, 1), (3, 2), (6, 3), (9, 5), (12, 6), (15, 8)])
def test_eq3_mask_has_ceil_half_ones_in_every_class_everywhere_equally_often_also_in_ragged_groups(c, ones):
    masks = tdsa.cwa_mask(400 * c, 400, 10)
    assert masks.shape == (10, 400 * c) and (masks.view(10, 400, c).sum(2) == ones).all()
    kinds, counts = masks.view(-1, c).int().unique(dim=0, return_counts=True)
    assert len(kinds) == math.comb(c, ones) or c > 9
    assert c > 6 or (counts / 4000 * len(kinds) - 1).abs().max() < 0.25
    assert tdsa.cwa_mask(8, 3).shape == (1, 8) and tdsa.cwa_mask(8, 3)[0, :2].sum() == 1  # groups 2, 3, 3
    for C, groups in ((512, ((88, 2), (112, 3))), (2048, ((152, 10), (48, 11))), (600, ((200, 3),))):
        assert tdsa.class_groups(C, 200) == groups
    assert tdsa.channels_of_class(5, 2).tolist() == [[0, 1, 1], [2, 3, 4]]


def test_eq5_is_one_when_channels_look_at_the_same_places_and_their_number_when_their_peaks_are_apart():
    for features in (torch.zeros(2, 18, 4, 4), torch.randn(2, 1, 4, 4).expand(2, 18, 4, 4)):
        for c, div in ((3, -0.6666667), (9, -0.8888889)):
            assert torch.allclose(tdsa.class_spread(features, 18 // c), torch.ones(2, 18 // c), atol=1e-6)
            _, found = tdsa.mc_loss(features, torch.tensor([0, 1]), 18 // c)
            assert found.item() == pytest.approx(div, abs=1e-6)
    peaks = 50 * torch.eye(3, 4).view(1, 3, 2, 2)
    assert tdsa.class_spread(peaks, 1).item() == pytest.approx(3, abs=1e-6)
    assert tdsa.mc_loss(peaks, torch.tensor([0]), 1)[1].item() == pytest.approx(0, abs=1e-6)


def test_eq3_gives_the_gradient_of_a_tie_to_one_channel():
    features = torch.zeros(1, 6, 2, 2).requires_grad_()
    (grad,) = torch.autograd.grad(tdsa.mc_loss(features, torch.tensor([0]), 2)[0], features)
    assert (grad != 0).sum(1).flatten().tolist() == [2] * 4  # one winner a class
    pooled = F.max_pool3d(features.view(1, 1, 6, 2, 2), (3, 1, 1)).mean((-1, -2)).view(1, 2)
    assert torch.allclose(grad, *torch.autograd.grad(F.cross_entropy(pooled, torch.tensor([0])), features))


def test_eq7_a_high_level_channel_gates_xi_middle_ones_of_its_class_and_gradients_pass_both():
    for xi in (1, 2, 3):
        mid, high = torch.randn(2, 4 * xi, 4, 6).requires_grad_(), torch.randn(2, 4, 2, 3).requires_grad_()
        attended = tdsa.top_down_attention(mid, high)
        nearest = high.repeat_interleave(xi, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.allclose(attended, mid / (1 + torch.exp(-nearest)), atol=1e-6)
        for term in tdsa.mc_loss(attended, torch.tensor([0, 1]), 2):
            gradients = torch.autograd.grad(term, (mid, high), retain_graph=True)
            assert xi == 1 or all(grad.any() for grad in gradients)


def test_eq7_upsamples_before_the_sigmoid_and_can_at_most_halve_unless_bicubic_undershoots():
    high, ones = F.pad(torch.full((1, 1, 2, 2), 8.0), (1, 1, 1, 1)), torch.ones(1, 1, 8, 8)
    for mode in ("nearest", "bilinear", "bicubic"):
        gate = tdsa.top_down_attention(ones, high, mode)
        assert (gate.min() < 0.5) == (mode == "bicubic")
        assert torch.equal(tdsa.top_down_attention(ones, 0 * high, mode), ones / 2)
        if mode != "nearest":
            up = {"size": (8, 8), "mode": mode, "align_corners": False}
            assert torch.allclose(gate, F.interpolate(high, **up).sigmoid())
            assert (gate - F.interpolate(high.sigmoid(), **up)).abs().max() > 0.1


@pytest.mark.parametrize("diversity", ["code", "paper"])
@pytest.mark.parametrize("xi", [1, 3])
def test_eq9_weighs_both_maps_as_the_paper_or_the_code_does(xi, diversity):
    model, (images, targets) = model_of(xi=xi, diversity=diversity), batch()
    loss, terms = model(images, targets)
    mid, high = model.trunk(images)
    h_high = tdsa.class_spread(high, 4).mean()
    h_mid = tdsa.class_spread(tdsa.top_down_attention(mid, high), 4).mean()
    code = 15 * (1 - h_high / 3) + 15 * (1 - h_mid / (3 * xi))  # beta of the authors' script is 15
    paper = -1.5 * 10 * (h_high + h_mid)
    total = F.cross_entropy(model.head(high), targets) + 1.5 * (terms["dis_high"] + terms["dis_mid"])
    assert loss.item() == pytest.approx((total + (code if diversity == "code" else paper)).item(), abs=1e-4)


def test_eqs_2_and_8_the_losses_act_on_the_maps_they_name_and_heads_are_their_class_scores():
    images, targets = batch()
    for loss, maps in {"ce": (), "mc": ("high",), "tdsa": ("mid", "high")}.items():
        _, terms = model_of(loss=loss)(images, targets)
        assert list(terms) == ["ce", *(f"{t}_{m}" for m in maps for t in ("dis", "div")), "top1"]
    loss, terms = model_of(mu=2.0, lambda_div=0.0, loss="mc")(images, targets)
    assert loss.item() == pytest.approx((terms["ce"] + 2 * terms["dis_high"]).item(), abs=1e-5)
    maps = mid, high = model_of().trunk(images)
    assert model_of(attention=False).constrained(*maps)["mid"] is mid  # raw, not halved
    for mode in ("nearest", "bicubic"):
        attended = model_of(upsample=mode).constrained(*maps)["mid"]
        assert torch.equal(attended, tdsa.top_down_attention(*maps, mode))
        heads, logits = model_of(upsample=mode).heads(images), model_of(upsample=mode)(images)
        assert list(heads) == ["classifier", "mid", "high"] and torch.equal(heads["classifier"], logits)
        assert torch.equal(heads["mid"], tdsa.class_scores(attended, 4))
        assert torch.equal(heads["high"], tdsa.class_scores(high, 4))


def test_the_classifier_in_evaluation_does_not_know_the_loss():
    images, targets = batch()
    model = model_of().eval()
    expected = model(images)
    for change in ({"loss": "ce"}, {"loss": "mc"}, {"attention": False}, {"upsample": "bicubic"}, {"mu": 0.0},
                   {"diversity": "paper"}, {"mask": "sample"}):
        other = model_of(**change).eval()
        other.load_state_dict(model.state_dict())  # strict: no switch of the loss changes a name
        assert torch.equal(other(images), expected), change
    model(images, targets)  # and computing the loss changes nothing
    assert torch.equal(model(images), expected)


def test_eq3_the_mask_is_drawn_from_torchs_random_state_a_batch_or_a_sample(monkeypatch):
    model, (images, targets), drawn, losses = model_of().eval(), batch(), [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(images, targets)[0].item())
    assert losses[0] == losses[1] != losses[2]
    monkeypatch.setattr(tdsa, "cwa_mask", lambda *how: drawn.append(how))
    for mask in ("batch", "sample"):
        model_of(mask=mask)(images, targets)
    assert drawn == [(24, 4, 1), (12, 4, 1), (24, 4, 3), (12, 4, 3)]  # the middle map first


def test_eqs_3_and_5_keep_softmax_and_sums_of_half_precision_in_fp32():
    half = torch.randn(2, 6, 16, 16).half()
    assert tdsa.class_scores(half, 2, torch.ones(1, 6)).dtype == torch.float32
    spread, expected = (tdsa.class_spread(features, 2) for features in (half, half.float()))
    assert spread.dtype == torch.float32 and torch.allclose(spread, expected, atol=1e-6)


def looking_at_peaks():
    """A model that predicts class 2 of 4, whose channels have their PEAKS, and its maps."""
    model, mid, high = model_of().eval(), torch.rand(1, 24, 6, 4), torch.zeros(1, 12, 3, 2)
    high[0, 0] = 50  # of class 0, to be ignored
    for i, (row, column, height) in enumerate(PEAKS):
        high[0, 6 + i, row, column] = height
    model.trunk.forward = lambda images: [m.expand(len(images), -1, -1, -1) for m in (mid, high)]
    model.head[2].weight.data.zero_()
    model.head[2].bias.data = torch.tensor([0.0, 0, 1, 0])
    return model, mid, high


def test_where_gives_the_cells_at_which_the_predicted_classs_channels_peak_strongest_first():
    boxes, scores = looking_at_peaks()[0].where(torch.zeros(2, 3, 48, 32))
    assert scores.tolist() == [[5, 3, 2]] * 2
    assert boxes[1].tolist() == [[0, 32, 16, 48], [16, 16, 32, 32], [16, 0, 32, 16]]


def test_where_of_plain_cross_entropy_is_the_peak_of_the_class_activation_map():
    images, model = batch(5)[0], model_of(loss="ce").eval()
    high, weights = model.trunk(images)[1], model.head[2].weight[model(images).argmax(1)]
    peaks, cells = (torch.einsum("bc,bchw->bhw", weights, high) / high[0, 0].numel()).flatten(1).max(1)
    with torch.inference_mode():
        boxes, scores = model.where(images)
    assert torch.allclose(scores, peaks[:, None], atol=1e-5)
    assert boxes.tolist() == [[[16 * x, 16 * y, 16 * x + 16, 16 * y + 16]]
                              for y, x in (divmod(cell, 2) for cell in cells.tolist())]


def test_figure_6_shows_the_peak_the_map_and_the_middle_maps_of_the_class_and_row(monkeypatch):
    heats, drawn, captions, panels = [], [], [], common.panels
    monkeypatch.setattr(common, "heat", lambda image, values: heats.append(values) or image)
    monkeypatch.setattr(common, "draw_boxes", lambda image, boxes: drawn.append(boxes.tolist()) or image)
    monkeypatch.setattr(common, "panels", lambda *row: captions.append(row[1]) or panels(*row))
    model, mid, high = looking_at_peaks()
    [page] = model.figure(torch.zeros(1, 3, 48, 32))
    expected = [m for i in range(3) for m in (high[0, 6 + i], mid[0, 12 + 2 * i], mid[0, 13 + 2 * i])]
    assert len(heats) == 9 and all(torch.equal(a, b) for a, b in zip(heats, expected))
    h, w = 224 / 3, 149 / 2  # a cell of the enlarged picture
    cells = [[c * w, r * h, (c + 1) * w, (r + 1) * h] for r, c, _ in PEAKS]
    assert drawn == [[pytest.approx(cell, abs=1e-3)] for cell in cells]
    assert captions[1][:2] == ["predicted: class 2", "high 2, peak 5.0"]
    assert captions[1][3] == f"middle 2.2, peak {mid[0, 15].max():.1f}"
    for y in (100, 350, 600):  # frames of 4 pixels, somewhat less after resizing
        row = [page.getpixel((x, y)) for x in range(page.width)]
        assert (row.count((255, 0, 0)), row.count((0, 255, 0))) == (6, 12)


@pytest.mark.parametrize("loss, rows", [("mc", 10), ("ce", 1)])
def test_figure_6_without_a_loss_on_the_middle_map_has_two_columns_and_a_row_a_channel(loss, rows):
    model, (images, _) = model_of(classes=5, loss=loss, aligned="none").eval(), batch(3)
    boxes, (page,) = model.where(images)[0], model.figure(images[:1])  # 48 channels: up to 10 each
    assert boxes.shape == (3, rows, 4) and abs(page.width / 2 - 155) < 6 and page.height // 246 == rows


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_for_every_xi_and_dataset_and_of_the_baselines_equal_the_released_networks():
    for backbone, classes, counts in (
            ("vgg16", 200, [31155912, 36687312, 42218712, 47750112, 53281512]),
            ("vgg16", 100, [19399812, 22165512, 24931212, 27696912, 30462612]),
            ("vgg16", 196, [30685668, 36106440, 41527212, 46947984, 52368756]),
            ("vgg16", 102, [19634934, 22455948, 25276962, 28097976, 30918990]),
            ("resnet18", 200, [24915608, 58449608, 111423608, 183837608, 275691608]),
            ("resnet18", 100, [7040108, 15617108, 29054108, 47351108, 70508108]),
            ("resnet18", 196, [23979404, 56200628, 107092028, 176653604, 264885356]),
            ("resnet18", 102, [7284722, 16200338, 30172298, 49200602, 73285250])):
        assert [parameters(on_meta(classes, backbone=backbone, xi=xi)) for xi in range(1, 6)] == counts
    for toy in (model_of(16), model_of(16, loss="ce", aligned="none")):  # own widths are those of 16 classes
        assert parameters(toy) == 201792
    for count, changes in ((27722504, CE), (11543816, R18 | CE), (30344640, MC), (14457320, R18 | MC),
                           (31155912, {"loss": "mc", "xi": 1})):
        assert parameters(on_meta(**changes)) == count
    assert len({parameters(on_meta(backbone="resnet18", layout=layout)) for layout in "ABC"}) == 1
    model = on_meta()
    parts = (model.trunk.features[:33], model.trunk.features[33:], model.head)
    assert [parameters(part) for part in parts] == [13579608, 13423368, 15215736]


def test_maps_and_multiply_adds_are_the_published_ones():
    for backbone, layout, (H, W), mid, high in (
            ("toy", "A", (96, 96), (12, 12), (6, 6)), ("vgg16", "A", (224, 224), (28, 28), (14, 14)),
            ("vgg16", "A", (256, 192), (32, 24), (16, 12)), ("resnet18", "A", (224, 224), (14, 14), (7, 7)),
            ("resnet18", "B", (224, 224), (14, 14), (14, 14)),
            ("resnet18", "C", (224, 224), (28, 28), (14, 14))):
        images = torch.empty(2, 3, H, W, device="meta")
        model = on_meta(backbone=backbone, layout=layout, image_size=(H, W))
        shapes = [tuple(m.shape) for m in model.trunk(images)]
        assert shapes == [(2, 1800, *mid), (2, 600, *high)] and model(images).shape == (2, 200)
    image = torch.empty(1, 3, 224, 224, device="meta")
    for backbone, layout, counts in (
            ("vgg16", "A", (15.8, 18.5, 21.2, 24.0, 26.7)), ("resnet18", "A", (3.7, 9.7, 19.6)),
            ("resnet18", "C", (11.8, 36.0, 75.4))):
        for xi, giga in enumerate(counts, start=1):
            macs = common.count_macs(on_meta(xi=xi, backbone=backbone, layout=layout), image)
            assert macs / 1e9 == pytest.approx(giga, abs=0.1)


def test_the_paths_of_vgg16_and_resnet18_are_torchvisions():
    images = torch.randn(2, 3, 64, 32)
    vgg, oracle = tdsa.VGG16(512, 512).eval(), make_layers(cfgs["D"], batch_norm=True).eval()
    vgg.features.load_state_dict(oracle.state_dict())
    mid, high = vgg(images)
    assert torch.allclose(F.max_pool2d(high, 2), oracle(images), atol=1e-5)
    assert torch.allclose(mid, oracle[:33](images), atol=1e-5) and (mid >= 0).all() and (high >= 0).all()
    net, oracle, outputs = tdsa.ResNet((64, 128, 256, 512), 2, (2, 2), 7).eval(), resnet18().eval(), []
    net.load_state_dict({k: v for k, v in oracle.state_dict().items() if not k.startswith("fc.")})
    for stage in (oracle.layer3, oracle.layer4):
        stage.register_forward_hook(lambda m, i, out: outputs.append(out))
    oracle(images)
    assert all(torch.allclose(ours, out, atol=1e-5) for ours, out in zip(net(images), outputs, strict=True))


def test_the_head_at_the_recipes_size_is_a_two_by_two_max_pooling_and_takes_other_sizes():
    head, high = tdsa.classifier(replace(CUB, image_size=(96, 64)), 6, 3).eval(), torch.randn(2, 6, 6, 4)
    assert torch.equal(head[0](high), F.max_pool2d(high, 2)) and head(torch.randn(2, 6, 9, 5)).shape == (2, 3)
    layers = [nn.AdaptiveMaxPool2d, nn.Flatten, nn.BatchNorm1d, nn.Linear, nn.BatchNorm1d, nn.ELU, nn.Linear]
    assert [type(m) for m in head] == layers and (head[3].in_features, head[3].out_features) == (36, 512)


@pytest.mark.parametrize("backbone", ["vgg16", "resnet18", "toy"])
def test_initial_weights_and_epsilons_of_the_built_model_are_the_authors(backbone):
    for name, m in model_of(backbone=backbone, xi=1).named_modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert (m.eps, m.momentum) == (1e-5, 0.1) and (m.weight == 1).all() and (m.bias == 0).all(), name
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.numel() > 2000:
            std = (3 * m.weight[0].numel()) ** -0.5  # PyTorch's default: uniform by the fan-in
            if isinstance(m, nn.Conv2d) and backbone != "vgg16":  # MC-Loss: normal of sqrt(2 / (k k out))
                std = (2 / m.weight[:, 0].numel()) ** 0.5
            assert m.weight.std().item() == pytest.approx(std, rel=0.06), name


@pytest.mark.parametrize("backbone, published, lost_layers, layers", [  # as wide as the classes ask, or next
    ("resnet18", ResNet18_Weights, ("bn1.", "layer4.1.conv2."), {"layer3", "layer4"}),
    ("vgg16", VGG16_BN_Weights, ("features.1.", "features.3."),
     {"features.30", "features.31", "features.34", "features.40", "features.41"})])
def test_torchvisions_weights_are_fetched_or_a_file_and_only_the_width_of_classes_begins_anew(
        backbone, published, lost_layers, layers, tmp_path, monkeypatch):
    net, path, fetched = resnet18() if backbone == "resnet18" else nn.Module(), tmp_path / "net.pth", []
    if backbone == "vgg16":
        net.features, net.classifier = make_layers(cfgs["D"], batch_norm=True), nn.Linear(3, 1000)
    old = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, path)  # of 2017, without counters
    monkeypatch.setattr(common, "fetch", lambda *how: fetched.append(how) or path)
    for aligned, weights, expected in (("none", "default", set()), ("both", str(path), layers)):
        model = model_of(5, backbone=backbone, loss="mc", aligned=aligned, weights=weights)
        loaded = {k for k, v in model.trunk.state_dict().items() if k in old and torch.equal(v, old[k])}
        anew = {k for k in old if not k.startswith(("fc.", "classifier."))} - loaded
        assert {k.rsplit(".", 1)[0] if backbone == "vgg16" else k[:6] for k in anew} == expected
    url = published.IMAGENET1K_V1.url
    assert fetched == [(url, url.split("-")[1].split(".")[0])]
    for lost in lost_layers:
        torch.save({k: v for k, v in old.items() if not k.startswith(lost)}, path)
        with pytest.raises(ValueError, match=f"(?is)missing.*{lost}"):
            model_of(5, backbone=backbone, weights=str(path))


def test_sec_4b_every_field_of_every_recipe():
    paper = dict(  # Sec. IV-B
        image_size=(224, 224), resize=(0, 0), epochs=300, optimizer="sgd", lr=0.1, weight_decay=5e-4,
        schedule="steps", weights="none", mu=1.5, lambda_div=10, channels=3, xi=3, backbone="vgg16",
        loss="tdsa", attention=True, aligned="both",
        # the authors' code
        crop="random", pad=4, interpolation="bilinear", normalize="half", hflip=0.5, batch_size=32, amp="off",
        momentum=0.9, milestones=(149 / 300, 224 / 300), diversity="code", mask="batch", upsample="nearest",
        # neither has any
        task="classify", rotate=0, translate=0, zoom=(1, 1), brightness=0, contrast=0, saturation=0, hue=0,
        erasing=0, boxes=False, val_fraction=0, train_split="trainval", crop_banner=False, instances=0,
        warmup=0, iterations=0, lr_batch=0, label_smoothing=0, drop_path=0, grad_clip=0, accumulate=1,
        layout="A")
    unused = {"crop_area", "crop_ratio", "affine_prob", "jitter_prob", "beta2", "eps", "warmup_lr", "min_lr",
              "toy_preset", "toy_train", "toy_test"}
    toy = dict(backbone="toy", xi=2, image_size=(96, 96), resize=(104, 104), pad=0, batch_size=16, epochs=60,
               lr=0.05, schedule="onecycle", toy_preset="birds")  # ours
    two = {"xi": 2}  # Table V
    own = {"cub": {}, "aircraft": two, "cars": two, "flowers": {}, "folder": {}, "toy": toy}
    assert set(tdsa.RECIPES) == set(own)
    for name, recipe in tdsa.RECIPES.items():
        fields = asdict(recipe)
        assert {k: fields[k] for k in fields if k not in unused or k in own[name]} == paper | own[name], name


def test_sec_4b_the_learning_rate_drops_at_epochs_150_and_225_counted_from_one_and_everything_decays():
    assert [g["weight_decay"] for g in tdsa.param_groups(model_of(), SMALL)] == [5e-4]
    steps = 5994 // 32
    for epoch, lr in ((1, 0.1), (149, 0.1), (150, 0.01), (224, 0.01), (225, 0.001), (300, 0.001)):
        for step in ((epoch - 1) * steps, epoch * steps - 1):  # its first and its last
            assert common.lr_at(CUB, step, 300 * steps, steps) == pytest.approx(lr)


def test_tables_2_to_8_row_by_row_from_the_paper():
    losses, less = {"CE Loss": CE, "MC-Loss": MC, "TDSA-Loss": {}}, "TDSA-Loss without attention"
    modules = {"CE Loss": CE, "MC-Loss": MC, less: {"attention": False}, "TDSA-Loss": {}}
    xi = {f"xi = {xi}": {"xi": xi} for xi in range(1, 6)}
    upsample = {mode: {"xi": 1, "upsample": mode} for mode in ("nearest", "bicubic", "bilinear")}
    paper = {  # rows, and a column for CUB-200-2011, FGVC-Aircraft, Stanford Cars, Flowers-102
        "2": (losses, "28.53 65.98 72.77", "82.90 89.20 89.57", "76.59 90.85 92.29", "40.90 83.23 88.74"),
        "3": (losses, "45.70 59.41 69.24", "79.90 85.57 86.18", "79.12 87.47 90.38", "65.75 79.54 85.34"),
        "4": (modules, "28.53 65.98 69.95 72.77", "82.90 89.20 88.89 89.57", "76.59 90.85 90.61 92.29",
              "40.90 83.23 85.81 88.74"),
        "5": (xi, "71.06 72.12 72.77 72.76 72.58", "88.82 89.57 89.21 89.00 88.76",
              "91.68 92.29 92.08 91.37 91.94", "87.14 87.81 88.74 88.26 87.60"),
        "6": (xi, "65.25 68.72 69.24 69.12 68.72", "84.65 86.18 86.09 85.55 85.87",
              "88.37 90.38 89.70 89.08 89.36", "82.86 84.34 85.34 85.32 83.78"),
        "7": (upsample, "73.33 72.82 73.03"), "8": (upsample, "65.66 65.50 65.33")}
    toy = {"cross-entropy": CE, "MC-Loss": MC, "TDSA-Loss": {}, "MC-Loss on both maps, without attention":
           {"attention": False}, "MC-Loss without its diversity term": MC | {"lambda_div": 0}}
    wanted = {"toy": ("toy", "top1", [(*row, None) for row in toy.items()]),
              "baseline": ("cub", "top1", [(name, toy[name], paper) for name, paper in (
                  ("cross-entropy", 28.53), ("MC-Loss", 65.98), ("TDSA-Loss", 72.77))])}
    for number, (rows, *columns) in paper.items():
        backbone = R18 if number in "368" else {}
        for data, column in zip(("cub", "aircraft", "cars", "flowers"), columns):
            values = map(float, column.split())
            rest = [(name, backbone | changes, value) for (name, changes), value in zip(rows.items(), values)]
            wanted[number if data == "cub" else f"{number}-{data}"] = (data, "top1", rest)
    found = {key: (t.data, t.metric, sorted(t.rows, key=str)) for key, t in tdsa.TABLES.items()}
    assert found == {key: (*rest, sorted(rows, key=str)) for key, (*rest, rows) in wanted.items()}
    titles = [tdsa.TABLES[n].title.split(":")[0] for n in paper]
    assert titles == [f"Table {n}" for n in ("II", "III", "IV", "V", "VI", "VII", "VIII")]


@pytest.mark.parametrize("changes, message", [
    ({"aligned": "none"}, "--loss tdsa --aligned none: use --aligned both, or"),
    ({"aligned": "high"}, "--loss tdsa --aligned high: use --aligned both, or"),
    ({"weights": "default"}, "--weights default: only for vgg16 and resnet18"),
    ({"classes": 60, "loss": "mc", "aligned": "none"}, "48 channels do not fit 60 classes.*--aligned both"),
    ({"channels": 0}, "--channels 0"), ({"xi": 0}, "--xi 0"), ({"drop_path": 0.1}, "--drop-path 0.1"),
    ({"upsample": "random"}, "--upsample random")])
def test_settings_that_do_not_go_together_are_refused_with_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        model_of(**changes)
    assert model_of(channels=1, xi=1).trunk.layer4[0].conv2.out_channels == 4  # the least
