"""Multi-stage ViT: the paper's steps against literal recomputations and hand cases, the authors' numbers."""
import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import vit_fgvc
from vit_fgvc import RECIPES, TABLES, attention_map, closing, connected_components, object_box, part_boxes

TINY = replace(RECIPES["toy"], image_size=(96, 96), encoder_size=48, backbone="toy_vit", label_smoothing=0.1)
STAGES = {"a": ["full"], "b": ["object"], "ab": ["full", "object"], "abc": ["full", "object", "parts"]}


def tiny(**changes):
    """A model of 48-pixel passes over 96-pixel photos."""
    return vit_fgvc.build(replace(TINY, **changes), 5)


def sharp(**changes):
    """One whose attention has contrast, as after training."""
    model = tiny(**changes)
    for block in model.encoder.blocks:
        block.attn.qkv.weight.data.mul_(4)
    return model


@torch.no_grad()
def found_in(model, images):
    """What the stages find, by name."""
    names = "map", "box", "object", "object_map", "part_boxes", "parts"
    return dict(zip(names, model.stages(images, locate=True)[1]))


def watch(model, monkeypatch):
    """The batches that enter the encoder, one entry a pass."""
    passes, features = [], model.encoder.features
    monkeypatch.setattr(model.encoder, "features", lambda x, *visit: passes.append(x) or features(x, *visit))
    return passes


def as_layers(attns):
    """Queries and keys that have these attention weights (B, h, N, N)."""
    side = attns[0].shape[-1]
    return [(attn.log().requires_grad_(), torch.eye(side).expand_as(attn) * side**0.5) for attn in attns]


# ------------------------------------------------------------------------------ Sec. 2: the attention map


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_sec2_attention_map_is_the_class_tokens_row_of_the_product_of_all_layers(fusion):
    """Matrix by matrix: heads fused, plus identity, rows to sum 1, the newest layer left; maximum 1."""
    for count in (1, 3):
        attns = [torch.randn(2, 3, 7, 7).mul(2).softmax(-1) for _ in range(count)]
        found = attention_map(as_layers(attns), (2, 3), fusion)
        assert found.shape == (2, 2, 3) and not found.requires_grad
        for b in range(2):
            product = torch.eye(7)
            for attn in attns:
                fused = {"mean": attn[b].mean(0), "max": attn[b].amax(0), "min": attn[b].amin(0)}[fusion]
                mixed = fused + torch.eye(7)
                product = mixed / mixed.sum(1, keepdim=True) @ product
            assert torch.allclose(found[b].flatten(), product[0, 1:] / product[0, 1:].max(), atol=1e-5)
    assert not torch.allclose(found, attention_map(as_layers(attns[::-1]), (2, 3), fusion), atol=1e-3)


def test_sec2_uniform_attention_gives_a_map_of_ones_and_no_object():
    uniform = [torch.full((1, 2, 17, 17), 1 / 17)] * 12
    found = attention_map(as_layers(uniform), (2, 8))
    assert torch.allclose(found, torch.ones(1, 2, 8), atol=1e-6)
    boxes = object_box(vit_fgvc.resize(found, (448, 448)), RECIPES["cub"])
    assert boxes.tolist() == [[32, 32, 416, 416]], "rounding speckle is no object"


def test_sec2_attention_that_stays_on_itself_gives_zeros_not_nan():
    query = 1e4 * torch.eye(5).expand(1, 2, 5, 5)
    found = attention_map([(query, query)] * 3, (2, 2))
    assert torch.equal(found, torch.zeros(1, 2, 2)) and object_box(found, TINY).shape == (1, 4)


def test_sec2_sizes_of_the_paper():
    """577 tokens of 768; encoder, new norm, 768-768-K: 86,681,088 + 769 K parameters; Cars: another head."""
    counts = {("cub", 200): 86_834_888, ("dogs", 120): 86_773_368, ("cars", 196): 86_833_920}
    for (data, classes), count in (counts | {("aircraft", 100): 86_757_988}).items():
        with torch.device("meta"):
            models = [vit_fgvc.MultiStageViT(replace(RECIPES[data], stages=s), classes) for s in ("a", "abc")]
        assert [sum(p.numel() for p in model.parameters()) for model in models] == [count] * 2, data
    seen, encoder = [], models[0].encoder
    tokens = encoder.features(torch.empty(1, 3, 384, 384, device="meta"), lambda q, k: seen.append(q))
    assert tokens.shape == (1, 577, 768) and encoder.grid == (24, 24)
    assert len(seen) == 12 and seen[0].shape == (1, 12, 577, 64)


# ------------------------------------------------------------------------------ Sec. 2.1: the object


def slow_closing(mask):
    """3 x 3 cross: a pixel is set if a neighbour is, then stays if all its neighbours in the image are."""
    H, W = mask.shape

    def join(how, mask):
        inside = [(y, x) for y in range(H) for x in range(W)]
        near = [[(y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)] for y, x in inside]
        return torch.tensor([how(mask[p] for p in around if p in inside) for around in near]).view(H, W)

    return join(all, join(any, mask))


def flood_fill(mask):
    """8-connected labels in scan order, pixel by pixel."""
    n, labels, left = 0, torch.zeros(mask.shape, dtype=torch.long), mask.nonzero().tolist()
    while left:
        n, todo = n + 1, [left.pop(0)]
        while todo:
            y, x = todo.pop()
            labels[y, x] = n
            near = [p for p in left if abs(p[0] - y) <= 1 and abs(p[1] - x) <= 1]
            todo, left = todo + near, [p for p in left if p not in near]
    return labels


def test_sec21_closing_is_dilation_then_erosion_by_a_cross():
    for density in (0.1, 0.4, 0.7):
        masks = torch.rand(2, 7, 9) < density
        assert torch.equal(closing(masks), torch.stack([slow_closing(m) for m in masks])), density
    for gap, components in ((1, 1), (2, 1), (3, 2)):  # gaps of two pixels close, of three do not
        mask = torch.zeros(1, 12, 20, dtype=torch.bool)
        mask[0, 2:9, 2:8] = mask[0, 2:9, 8 + gap : 14] = True
        assert connected_components(closing(mask)).max() == components, gap


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_sec21_connected_components_agree_with_a_flood_fill(density):
    for shape in ((15, 21), (1, 40), (40, 1)):
        masks, shift = torch.rand(3, *shape) < density, 0
        for mask, labels in zip(masks, connected_components(masks)):
            slow = flood_fill(mask)
            assert torch.equal(connected_components(mask[None])[0], slow)
            assert torch.equal(labels, (slow + shift) * (slow > 0)), "numbers go on through a batch"
            shift += int(slow.max())


def box_of(attention, area, **changes):
    """The box in one map, with a smallest object of `area` pixels."""
    recipe = replace(TINY, min_object_area=area / attention.numel(), **changes)
    return object_box(attention[None], recipe)[0].tolist()


def test_sec21_object_box_is_half_open_above_the_threshold_and_large_enough():
    attention = torch.zeros(40, 60)
    attention[5:17, 30:52] = 0.8
    attention[10, 31] = 1.0
    assert box_of(attention, 100) == [30, 5, 52, 17] == box_of(attention, 12 * 22)
    assert box_of(attention, 12 * 22 + 1) == [4, 3, 55, 37], "a pixel less is none: central, 6/7 of each side"
    core = torch.zeros(40, 60)
    core[:, :40] = 0.3
    core[10:20, 10:25] = 1.0  # mean 0.244, median 0.3
    assert box_of(core, 50) == [0, 0, 40, 40] and box_of(core, 50, threshold="median") == [10, 10, 25, 20]


def test_sec21_bbox_score_sees_foreign_pixels_and_region_score_does_not():
    """An L holds a brighter speck of another component inside its box."""
    attention = torch.zeros(60, 60)
    attention[5:50, 5:12] = attention[43:50, 5:50] = 0.6  # the L
    attention[10:18, 30:38] = 1.0  # inside the L's box, too small to be an object
    attention[54:60, 20:58] = 0.7
    assert box_of(attention, 100) == [5, 5, 50, 50]
    assert box_of(attention, 100, score="region") == [20, 54, 58, 60]
    equals = torch.zeros(50, 50)
    equals[30:45, 2:20] = equals[4:20, 25:45] = 1.0
    assert box_of(equals, 100) == [25, 4, 45, 20], "the first in scan order"


def test_sec21_boxes_of_a_batch_equal_those_of_its_images():
    attention = F.interpolate(torch.rand(6, 1, 7, 7), (70, 50), mode="bilinear")[:, 0]
    attention[2] = 0.5  # no object here
    for score in ("bbox", "region"):
        recipe = replace(TINY, score=score)
        together = object_box(attention, recipe)
        assert torch.equal(together, torch.cat([object_box(a[None], recipe) for a in attention]))
    assert together[2].tolist() == [3, 5, 46, 65]


def test_sec21_fallback_box_is_central_in_evaluation_and_random_in_training():
    """Of 448 pixels the box takes 384: its corner lies in [0, 64) on both axes."""
    assert object_box(torch.full((1, 448, 448), 0.3), RECIPES["cub"]).tolist() == [[32, 32, 416, 416]]
    boxes = object_box(torch.zeros(8, 448, 448), RECIPES["cub"], random=True)
    assert (boxes[:, 2:] - boxes[:, :2] == 384).all() and boxes[:, :2].min() >= 0 and boxes[:, :2].max() < 64
    assert min(len(boxes[:, i].unique()) for i in (0, 1)) > 3 and not torch.equal(boxes[:, 0], boxes[:, 1])


# ------------------------------------------------------------------------------ Sec. 2.2: the parts


def parts_of(attention, side, size, **changes):
    """The windows of `side` of `size` pixels in one map."""
    return part_boxes(attention[None], replace(TINY, encoder_size=size, part_crop=side / size, **changes))[0]


def test_sec22_part_boxes_of_a_central_gaussian():
    """The second is one of eight mirror images. Windows of half the side leave no room: the first repeats."""
    x = (torch.arange(128) - 63.5) ** 2
    gaussian = torch.exp(-(x[:, None] + x) / (2 * 30**2))
    best, second = parts_of(gaussian, 128, 384).tolist()
    assert best == [129, 129, 257, 257] and (second[2] - second[0], second[3] - second[1]) == (128, 128)
    assert {*second[:2]} in [{a, b} for a in (84, 174) for b in (36, 222)]
    for side in (192, 224, 384):
        boxes = parts_of(gaussian, side, 384, parts=3)
        assert boxes.shape == (3, 4) and torch.equal(boxes[0], boxes[1]) and torch.equal(boxes[0], boxes[2])


def test_sec22_windows_grow_to_the_crop_at_the_far_side_or_inwards_at_the_border():
    def only(x, y):  # all attention in one window of 42 x 42
        attention = torch.zeros(128, 128)
        attention[y : y + 42, x : x + 42] = 1
        return parts_of(attention, 128, 384, parts=1)[0].tolist()

    assert only(0, 0) == [0, 0, 128, 128]  # from 0, 0, 126, 126
    assert only(86, 33) == [256, 99, 384, 227]  # from 258, 99, 384, 225
    for cell, pixel in ((1, 18), (4, 74), (7, 130)):  # 24 cells over 448 pixels: 18.67, 74.67, 130.67
        attention = torch.zeros(24, 24)
        attention[cell + 1, cell] = 1
        assert parts_of(attention, 19, 448, parts=1)[0, :2].tolist() == [pixel, (cell + 1) * 448 // 24]


def iou_plus_one(a, b):
    """IoU of boxes whose last pixel lies inside."""
    x, y = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1) for i in (0, 1))
    area = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return x * y / (sum(area) - x * y)


@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
@pytest.mark.parametrize("stride, iou", [(1, 0.1), (2, 0.1), (1, 0.0), (1, 0.3)])
def test_sec22_best_windows_are_those_of_a_loop_over_all_windows(pool, stride, iou):
    """Greedy suppression; windows that touch overlap."""
    attention = torch.rand(12, 12)
    score = {"avg": torch.mean, "max": torch.max, "gem": lambda window: window.pow(3).mean() ** (1 / 3)}[pool]
    windows = [[x, y, x + 4, y + 4] for y in range(0, 9, stride) for x in range(0, 9, stride)]
    scores = torch.stack([score(attention[y1:y2, x1:x2]) for x1, y1, x2, y2 in windows])
    chosen = []
    for i in sorted(range(len(windows)), key=lambda i: -scores[i]):
        if all(iou_plus_one(windows[i], windows[j]) <= iou for j in chosen):
            chosen.append(i)
    found = parts_of(attention, 16, 48, parts=2, stride=stride, score_pool=pool, part_iou=iou)
    expected = [[windows[i][0] * 4, windows[i][1] * 4] for i in chosen[:2]]
    assert found[:, :2].tolist() == (expected * 2)[:2]
    exact = torch.zeros(40, 40)
    exact[0, 5:15], exact[0, 23] = 1.0, 0.5  # windows of 10 + 1 pixels that begin at 5 and 14 share a tenth
    assert parts_of(exact, 10, 40)[:, 0].tolist() == [5, 14]


def test_sec2_crop_equals_slicing_and_resizing():
    images = torch.randn(2, 2, 30, 44)
    boxes = torch.tensor([[[0, 0, 44, 30], [10, 3, 44, 21]], [[5, 28, 7, 30], [0, 0, 1, 1]]])
    for image, own, views in zip(images, boxes.tolist(), vit_fgvc.crop(images, boxes, 16)):
        for (x1, y1, x2, y2), view in zip(own, views):
            slow = F.interpolate(image[None, :, y1:y2, x1:x2], (16, 16), mode="bilinear", align_corners=True)
            assert torch.allclose(view, slow[0], atol=1e-4)


# ------------------------------------------------------------------------------ Sec. 2.3: augmentations


def test_sec23_erasing_zeroes_exactly_the_pixels_above_the_threshold_of_the_chosen_images():
    images, maps, chosen = torch.randn(3, 3, 8, 9), torch.rand(3, 8, 9), torch.tensor([True, False, True])
    erased = vit_fgvc.erase(images, maps, chosen, 0.7)
    whole = images.masked_fill((maps > 0.7)[:, None], 0.0)
    assert torch.equal(erased[1], images[1]) and torch.equal(erased[::2], whole[::2])
    for share, fewest, most in ((0.0, 0, 0), (0.25, 70, 130), (1.0, 400, 400)):
        assert fewest <= vit_fgvc.toss(torch.zeros(400, 3), share).sum() <= most


def reduced(images):
    """Photos as stage a sees them."""
    return F.interpolate(images, (48, 48), mode="bilinear", antialias=True)


def test_sec23_training_erases_by_the_map_of_the_whole_photo_and_seeks_the_object_there(monkeypatch):
    """Only the photos that are erased have a pass before, which changes no running statistics."""
    model, images = sharp(erase=True, erase_prob=0.5, head="mlp_bn").train(), torch.randn(12, 3, 96, 96)
    small, passes = reduced(images), watch(model, monkeypatch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = model.attention(small)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found, (_, first, full, thing, _) = found_in(model, images), passes
    assert model.head[0].num_batches_tracked == 3, "stages a, b, c"
    erased = (full != small).flatten(1).any(1)
    assert torch.equal(first, small[erased]) and 0 < erased.sum() < 12
    holes = (vit_fgvc.resize(maps, 48) > 0.7) & erased[:, None, None]
    assert 0 < holes[erased].float().mean() < 0.5
    assert torch.equal(full, small.masked_fill(holes[:, None], 0))
    wide = vit_fgvc.resize(maps, (96, 96))
    assert torch.allclose(found["map"][erased], wide[erased], atol=1e-5), "not the erased photo's map"
    assert torch.equal(found["box"][:, 0], object_box(found["map"], model.recipe))
    holes, gone = (found["object_map"] > 0.7)[:, None].expand_as(thing), thing == 0
    chosen = gone.flatten(1).any(1)
    assert torch.equal(gone, holes & chosen[:, None, None, None]), "the object's map is not normalised again"
    assert 0 < chosen.sum() < 12 and not torch.equal(chosen, erased)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sec23_attention_cropping_shows_stage_a_the_object_of_some_photos(share, monkeypatch):
    images, model = torch.randn(16, 3, 96, 96), tiny(attention_crop=share).train()
    passes = watch(model, monkeypatch)
    found, (first, full, *_) = found_in(model, images), passes
    cropped = (full == found["object"]).flatten(1).all(1)
    assert torch.equal(full[~cropped], reduced(images)[~cropped])
    assert torch.equal(first, reduced(images)[cropped])
    assert cropped.all() if share == 1 else 2 < cropped.sum() < 14
    plain = tiny().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), plain(images)), "evaluation does not augment"


# ------------------------------------------------------------------------------ Eq. 1


def test_eq1_joint_loss_term_by_term_and_the_prediction():
    """Of equal logits three times that of one if parts count as their mean (code), four times by the sum."""
    logits = {"full": torch.randn(4, 1, 5), "object": torch.randn(4, 1, 5), "parts": torch.randn(4, 2, 5)}
    targets = torch.randint(0, 5, (4,))
    for reduction, weight in (("mean", 0.5), ("sum", 1.0)):
        recipe = replace(TINY, part_reduction=reduction)
        loss, terms = vit_fgvc.joint_loss(logits, targets, recipe)
        for name, stage in logits.items():
            log_p = stage.log_softmax(2)
            slow = sum(-0.9 * log_p[i, :, t] - 0.1 * log_p[i].mean(1) for i, t in enumerate(targets))
            assert torch.allclose(terms[name], slow.sum() / 4 * (weight if name == "parts" else 1.0))
        assert torch.allclose(loss, sum(terms.values()))
        same = {name: logits["full"].expand(-1, stage.shape[1], -1) for name, stage in logits.items()}
        assert torch.allclose(vit_fgvc.joint_loss(same, targets, recipe)[0], terms["full"] * (2 + 2 * weight))
    views = {name: stage.mean(1) for name, stage in logits.items()}
    for fusion, expected in (views | {"mean": torch.stack(list(views.values())).mean(0)}).items():
        assert torch.allclose(vit_fgvc.fuse(logits, fusion), expected)


# ------------------------------------------------------------------------------ Fig. 2: the stages


@pytest.mark.parametrize("stages", STAGES)
def test_fig2_stages_give_their_logits_and_heads_name_them(stages):
    model, images = tiny(stages=stages).eval(), torch.randn(3, 3, 96, 96)
    logits, names = model.stages(images)[0], STAGES[stages]
    assert {k: v.shape for k, v in logits.items()} == {k: (3, 2 if k == "parts" else 1, 5) for k in names}
    heads = model.heads(images)
    assert list(heads) == names + ["mean"] * (len(names) > 1)
    assert torch.allclose(model(images), heads[list(heads)[-1]])


@pytest.mark.parametrize("stages, expected", [("a", [3]), ("b", [3, 3]), ("ab", [3, 3]), ("abc", [3, 3, 6])])
def test_fig2_a_pass_for_photos_objects_and_all_parts_and_a_first_to_augment(stages, expected, monkeypatch):
    images, targets = torch.randn(3, 3, 96, 96), torch.tensor([0, 1, 2])
    for changes, first in (({"erase": True, "erase_prob": 1.0}, [3] * ("a" in stages)), ({}, [])):
        model = tiny(stages=stages, **changes)
        passes = watch(model.eval(), monkeypatch)
        model(images)
        model.train()(images, targets)
        assert [len(x) for x in passes] == expected + first + expected


@pytest.mark.parametrize("source", ["object", "highres"])
def test_fig2_object_and_parts_are_cut_from_the_high_resolution_photo(source):
    images = torch.randn(2, 3, 96, 80)
    found = found_in(tiny(part_source=source).eval(), images)

    def cut(image, box):
        x1, y1, x2, y2 = box
        return F.interpolate(image[None, :, y1:y2, x1:x2], (48, 48), mode="bilinear", align_corners=True)[0]

    for i, box in enumerate(found["box"][:, 0].tolist()):
        x1, y1, x2, y2 = box
        thing = cut(images[i], box)
        assert torch.allclose(found["object"][i], thing, atol=1e-4)
        assert torch.allclose(found["object_map"][i], cut(found["map"][i][None], box)[0], atol=1e-4)
        inside = part_boxes(vit_fgvc.resize(found["object_map"][i][None], 16), TINY)[0]
        scale = torch.tensor([x2 - x1, y2 - y1] * 2) / 48
        assert torch.allclose(found["part_boxes"][i], torch.tensor([x1, y1] * 2) + inside * scale, atol=1e-3)
        for p, part in enumerate(found["parts"][i]):
            there = vit_fgvc.crop(images[i][None], found["part_boxes"][i, p][None, None], 48)[0, 0]
            expected = cut(thing, inside[p].tolist()) if source == "object" else there
            assert torch.allclose(part, expected, atol=1e-4)


def test_fig2_gradient_reaches_the_encoder_from_every_logit_and_not_through_boxes():
    """The gradient of the object stage equals that of a plain ViT on the crop."""
    model, targets = tiny().eval(), torch.tensor([1, 4])
    logits, found = model.stages(torch.randn(2, 3, 96, 96))
    assert not any(value.requires_grad for value in found)
    weight = model.encoder.blocks[0].attn.qkv.weight
    for stage in (logits["full"], logits["object"], logits["parts"][:, 0], logits["parts"][:, 1]):
        assert torch.autograd.grad(stage.sum(), weight, retain_graph=True)[0].abs().sum() > 0
    through = torch.autograd.grad(F.cross_entropy(logits["object"][:, 0], targets), weight)[0]
    plain = model.head(model.norm(model.encoder.features(found[2])[:, 0]))
    assert torch.allclose(through, torch.autograd.grad(F.cross_entropy(plain, targets), weight)[0], atol=1e-6)


@pytest.mark.parametrize("H, W, stages", [(96, 60, "abc"), (50, 130, "a")])
def test_fig2_where_gives_the_object_then_its_parts_whatever_the_shape_of_the_photo(H, W, stages):
    model, images = tiny(stages=stages).eval(), torch.randn(2, 3, H, W)
    boxes, scores = model.where(images)
    found = found_in(model, images)
    assert torch.equal(boxes[:, :1], found["box"].float()) and torch.equal(boxes[:, 1:], found["part_boxes"])
    assert (boxes[:, :, :2] >= boxes[:, :1, :2]).all() and (boxes[:, :, 2:] <= boxes[:, :1, 2:] + 1e-3).all()
    for i, own in enumerate(boxes.round().long().tolist()):
        inside = [found["map"][i, y1:y2, x1:x2] for x1, y1, x2, y2 in own]
        expected = torch.stack([inside[0].max(), *(part.mean() for part in inside[1:])])
        assert torch.allclose(scores[i], expected, atol=0.03)


def test_sec3_the_photo_is_reduced_by_an_antialiased_filter_or_by_the_codes_nearest(monkeypatch):
    images = torch.randn(1, 3, 96, 96)
    for full_resize, expected in (("nearest", images[..., ::2, ::2]), ("bilinear", reduced(images))):
        model = tiny(stages="a", full_resize=full_resize).eval()
        passes = watch(model, monkeypatch)
        model(images)
        assert torch.equal(passes[0], expected)


def test_fig4_and_fig5_show_box_maps_object_erasure_and_parts(monkeypatch):
    """Page by page: the numbers that are drawn."""
    pages = []
    monkeypatch.setattr(common, "panels", lambda images, captions: pages.append(dict(zip(captions, images))))
    model, images = sharp(parts=1, stages="a").eval(), torch.randn(2, 3, 96, 96)
    model.figure(images)
    found = found_in(model, images)
    for i, page in enumerate(pages):
        photo, attention, array = common.to_pil(images[i], "imagenet"), found["map"][i], {}
        array = {caption: np.asarray(picture).astype(int) for caption, picture in page.items()}
        x1, y1, x2, y2 = found["box"][i, 0].tolist()
        changed = (array["object box"] != np.asarray(photo)).any(2)
        assert changed[y1 : y1 + 4, x1:x2].mean() > 0.9 and changed[y1:y2, x1 : x1 + 4].mean() > 0.9
        assert not changed[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].any()
        assert array["object box"][y1, x1].tolist() == [255, 32, 32]
        assert page["attention"] == common.heat(photo, attention, strength=1.0)
        product = np.asarray(photo) * np.floor(attention.numpy() * 255)[..., None] / 255
        assert np.abs(array["image x attention"] - product).max() <= 1
        thing = common.to_pil(found["object"][i], "imagenet")
        assert page["object"] == thing and page["part 1"] == common.to_pil(found["parts"][i, 0], "imagenet")
        assert page["its attention"] == common.heat(thing, found["object_map"][i], strength=1.0)
        hole, erased = (attention > 0.7).numpy(), array["erased above 0.7"]
        rim = F.max_pool2d((attention > 0.7)[None].float(), 9, 1, 4)[0].bool().numpy() & ~hole
        assert hole.any() and rim.any() and (erased[rim] == 255).all()
        assert (erased[hole] == [124, 116, 104]).all()
        assert (erased[~hole & ~rim] == np.asarray(photo)[~hole & ~rim]).all()


# ------------------------------------------------------------------------------ recipes, tables, weights

CUB = dict(
    image_size=(448, 448), resize=(512, 512), crop="resized", crop_area=(0.75, 1.0), rotate=10,
    zoom=(1.0, 1.1), affine_prob=0.75, brightness=0.2, contrast=0.2, jitter_prob=0.75, batch_size=20,
    epochs=10, lr=1e-3, optimizer="radam", momentum=0.95, beta2=0.99, eps=1e-6, weight_decay=0.01,
    schedule="onecycle", label_smoothing=0.1, weights="default", backbone="vit_base", encoder_size=384,
    full_resize="bilinear", head="mlp", stages="abc", fusion="mean", part_reduction="mean",
    head_fusion="mean", threshold="mean", score="bbox", min_object_area=64**2 / 448**2, fallback=384 / 448,
    parts=2, part_crop=128 / 384, part_source="object", part_iou=0.1, score_pool="avg", stride=1, erase=False,
    erase_prob=0.5, erase_threshold=0.7, attention_crop=0.0,
    phases=(2, 4, 4), head_lr=(3, 1, 0.1), encoder_lr=(0, 0.02, 0.002))
DOGS = dict(batch_size=16, epochs=6, phases=(2, 4), head_lr=(3, 1), encoder_lr=(0, 0.02))
CARS = dict(
    image_size=(512, 512), resize=(584, 584), crop_area=(0.7, 1.0), batch_size=16, epochs=56, lr=1e-2,
    head="mlp_bn", min_object_area=73**2 / 512**2, fallback=384 / 512, part_crop=170 / 384,
    phases=(24, 32), head_lr=(1, 0.33), encoder_lr=(0, 0.0033))
AIRCRAFT = dict(
    image_size=(786, 786), resize=(898, 898), batch_size=16, epochs=20, min_object_area=128**2 / 786**2,
    fallback=384 / 786, part_crop=224 / 384, phases=(4, 16), head_lr=(3, 1), encoder_lr=(0, 0.04))
TOY = dict(
    image_size=(192, 192), encoder_size=128, crop="resized", crop_area=(0.35, 1.0), toy_preset="birds-easy",
    backbone="toy_vit16", boxes=True, epochs=12, optimizer="adamw", lr=2e-3, weight_decay=0.05, amp="off",
    schedule="onecycle", phases=(1,), head_lr=(1,), encoder_lr=(1,))
OWN = {k: v for k, v in CUB.items() if k not in common.Recipe.__dataclass_fields__}
SETTINGS = {"cub": CUB, "plant": CUB, "folder": CUB, "dogs": CUB | DOGS, "cars": CUB | CARS,
            "aircraft": CUB | AIRCRAFT, "toy": OWN | TOY}


@pytest.mark.parametrize("data", SETTINGS)
def test_sec3_every_field_of_a_recipe_is_the_authors_or_the_shared_default(data):
    r, default = RECIPES[data], dataclasses.asdict(common.Recipe())
    assert set(RECIPES) == set(SETTINGS) and dataclasses.asdict(r) == default | SETTINGS[data]
    resized = r.image_size[0] + math.ceil(r.image_size[0] * 0.14 / 8) * 8
    assert data == "toy" or r.resize == (resized, resized) and r.epochs == sum(r.phases)


PLAIN, MULTI = ("ViT-B/16", {"stages": "a"}), ("multi-stage", {})
ROWS = {  # once more from the paper and the notebooks' logs
    "baseline": ("cub", [(*PLAIN, 89.4), (*MULTI, 91.0)]),
    "2": ("dogs", [(*PLAIN, 91.7), (*MULTI, 93.2)]),
    "3": ("cub", [(*PLAIN, 89.4), (*MULTI, 91.0)]), "3-cars": ("cars", [(*PLAIN, 92.8), (*MULTI, 94.3)]),
    "4": ("plant", [(*PLAIN, None), (*MULTI, None)]),
    "toy": ("toy", [("a", {"stages": "a"}, None), ("a, b", {"stages": "ab"}, None), ("a, b, c", {}, None)]),
    "ablation": ("dogs", [
        ("full", {"stages": "a"}, 93.07), ("full, erasing", {"stages": "a", "erase": True}, 92.70),
        ("object", {"stages": "b"}, 90.40), ("object, erasing", {"stages": "b", "erase": True}, 90.04),
        ("full + object", {"stages": "ab"}, None),
        ("full + object, erasing", {"stages": "ab", "erase": True}, None),
        ("full + object + parts", {}, None), ("full + object + parts, erasing", {"erase": True}, None)]),
    "text": ("cub", [
        ("as the code", {}, None), ("threshold: median", {"threshold": "median"}, None),
        ("object by region", {"score": "region"}, None), ("max pooling", {"score_pool": "max"}, None),
        ("GeM pooling", {"score_pool": "gem"}, None), ("stride 2", {"stride": 2}, None),
        ("parts of 112 / 384", {"part_crop": 112 / 384}, None),
        ("parts in high resolution", {"part_source": "highres"}, None),
        ("sum over parts", {"part_reduction": "sum"}, None),
        ("maximum of the heads", {"head_fusion": "max"}, None),
        ("minimum of the heads", {"head_fusion": "min"}, None),
        ("attention erasing", {"erase": True}, None), ("attention cropping", {"attention_crop": 0.5}, None)])}


@pytest.mark.parametrize("key", ROWS)
def test_tables_hold_the_papers_rows_and_values(key):
    data, rows = ROWS[key]
    assert set(TABLES) == set(ROWS) and TABLES[key].data == data and TABLES[key].metric == "top1"
    assert list(TABLES[key].rows) == rows
    for words in ("not reproducible", "ResNet-50 89.2", "EfficientNet-B0 90.1", "B2 90.4", "iCassava 2019"):
        assert words in TABLES["4"].title, words
    assert "not ours: ResNet-101 83.5, 91.2" in TABLES["3"].title and "iCassava 2019" in vit_fgvc.__doc__


@pytest.mark.parametrize("data, encoder, head", [
    ("cub", [(2, 0), (4, 2e-5), (4, 2e-6)], [(2, 3e-3), (4, 1e-3), (4, 1e-4)]),
    ("dogs", [(2, 0), (4, 2e-5)], [(2, 3e-3), (4, 1e-3)]),
    ("cars", [(24, 0), (32, 3.3e-5)], [(24, 1e-2), (32, 3.3e-3)]),
    ("aircraft", [(4, 0), (16, 4e-5)], [(4, 3e-3), (16, 1e-3)])])
def test_sec3_learning_rates_follow_one_cycle_in_each_phase(data, encoder, head):
    recipe = RECIPES[data]
    with torch.device("meta"):
        model = vit_fgvc.MultiStageViT(recipe, 7)
    names, steps = {id(p): n for n, p in model.named_parameters()}, 10 * recipe.epochs
    for group in vit_fgvc.param_groups(model, recipe):
        for p in group["params"]:
            matrix = p.ndim > 1 and not names[id(p)].endswith(("cls_token", "pos_embed"))
            assert group["weight_decay"] == (0.01 if matrix else 0.0), names[id(p)]
        begin = 0
        for length, peak in encoder if names[id(group["params"][0])].startswith("encoder.") else head:
            at = [begin, begin + 5 * length, begin + 10 * length - 1]
            first, middle, last = (common.lr_at(recipe, step, steps, 10, group) for step in at)
            assert (first, middle) == pytest.approx((peak / 25, peak)) and last <= 0.03 * peak
            begin += 10 * length


def test_sec2_the_built_model_has_the_heads_epsilons_drop_path_and_first_weights_it_should():
    model = tiny(drop_path=0.3, backbone="toy_vit")
    assert [b.drop_path.p for b in model.encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    assert [type(m).__name__ for m in model.head] == ["Linear", "ReLU", "Linear"]
    assert model.head[0].weight.shape == (96, 96) and model.head[2].bias.shape == (5,)
    bound = (6 / (96 + 3 * 96)) ** 0.5  # Glorot's
    weight = model.encoder.blocks[0].attn.qkv.weight
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert model.encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    cars = tiny(head="mlp_bn").head
    names = " ".join(type(m).__name__ for m in cars)
    assert names == "BatchNorm1d Dropout Linear ReLU BatchNorm1d Dropout Linear"
    assert (cars[1].p, cars[5].p, cars[2].bias, cars[6].bias) == (0.25, 0.5, None, None)


def test_weights_fill_the_encoder_without_its_norm_or_all_if_they_are_of_a_run(tmp_path, monkeypatch):
    """A plain ViT of 80 pixels for an encoder of 48: positions are resized, norm and head dropped."""
    vit = common.vit("toy_vit", 80, num_classes=9)
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    model = tiny(weights=str(tmp_path / "vit.pth"))
    assert torch.equal(model.encoder.blocks[2].mlp.fc1.weight, vit.blocks[2].mlp.fc1.weight)
    assert model.encoder.pos_embed.shape == (1, 37, 96) and torch.equal(model.norm.weight, torch.ones(96))
    torch.nn.init.normal_(model.norm.weight)
    torch.save(model.state_dict(), tmp_path / "run.pt")
    again = vit_fgvc.build(replace(TINY, weights=str(tmp_path / "run.pt")), 11)
    for name in ("norm.weight", "head.0.weight"):
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    asked = []  # the default: the authors' at 384 pixels
    monkeypatch.setattr(common, "load_vit", lambda vit, source: asked.append((vit.official, source)) or {})
    monkeypatch.setitem(common.VITS, "vit_base", (dict(dim=24, depth=1, heads=2), "Google's"))
    tiny(weights="default", backbone="vit_base"), tiny(weights="default")
    timm = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/"
    assert asked == [(timm + "jx_vit_base_p16_384-83fb41ba.pth", "default"), ("", "default")]


@pytest.mark.parametrize("changes, message", [
    ({"stages": "ab", "fusion": "parts"}, "--fusion parts needs stage c, not in --stages ab"),
    ({"stages": "b", "fusion": "full"}, "--fusion full needs stage a"),
    ({"stages": "b", "attention_crop": 0.5}, "--attention-crop needs stage a, not in --stages b"),
    ({"phases": (1, 2)}, "one value for each phase"),
    ({"encoder_size": 50}, "multiples of the patch size")])
def test_settings_that_cannot_work_are_errors_that_say_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
