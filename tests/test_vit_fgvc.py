"""Multi-stage ViT: the paper's steps against literal recomputations and hand cases, the authors' numbers."""
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

import common
import vit_fgvc
from vit_fgvc import RECIPES, TABLES, attention_map, closing, connected_components, object_box, part_boxes

TINY = replace(RECIPES["toy"], image_size=(96, 96), encoder_size=48, backbone="toy_vit", label_smoothing=0.1)


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


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_sec2_attention_map_is_the_class_tokens_row_of_the_product_of_all_layers(fusion):
    """Matrix by matrix: heads fused, plus identity, rows to sum 1, the newest layer left; maximum 1."""
    attns, product = [torch.randn(2, 3, 7, 7).mul(2).softmax(-1) for _ in range(3)], torch.eye(7)
    for attn in attns:
        mixed = {"mean": attn.mean(1), "max": attn.amax(1), "min": attn.amin(1)}[fusion] + torch.eye(7)
        product = mixed / mixed.sum(2, keepdim=True) @ product
    row, found = product[:, 0, 1:], attention_map(as_layers(attns), (2, 3), fusion)
    assert found.shape == (2, 2, 3) and not found.requires_grad
    assert torch.allclose(found.flatten(1), row / row.amax(1, keepdim=True), atol=1e-5)


def test_sec2_uniform_attention_gives_a_map_of_ones_and_one_that_stays_on_itself_zeros_without_object():
    found = attention_map(as_layers([torch.full((1, 2, 17, 17), 1 / 17)] * 12), (2, 8))
    assert torch.allclose(found, torch.ones(1, 2, 8), atol=1e-6)
    boxes = object_box(vit_fgvc.resize(found, (448, 448)), RECIPES["cub"])
    assert boxes.tolist() == [[32, 32, 416, 416]], "rounding speckle is no object"
    query = 1e4 * torch.eye(5).expand(1, 2, 5, 5)
    found = attention_map([(query, query)] * 3, (2, 2))
    assert torch.equal(found, torch.zeros(1, 2, 2)) and object_box(found, TINY).shape == (1, 4)


def test_sec2_sizes_of_the_paper():
    """577 tokens of 768; encoder, new norm, 768-768-K: 86,681,088 + 769 K parameters; Cars: another head."""
    for data, classes, count in (("cub", 200, 86_834_888), ("dogs", 120, 86_773_368),
                                 ("cars", 196, 86_833_920), ("aircraft", 100, 86_757_988)):
        with torch.device("meta"):
            models = [vit_fgvc.MultiStageViT(replace(RECIPES[data], stages=s), classes) for s in ("a", "abc")]
        assert [sum(p.numel() for p in model.parameters()) for model in models] == [count] * 2, data
    seen, encoder = [], models[0].encoder
    tokens = encoder.features(torch.empty(1, 3, 384, 384, device="meta"), lambda q, k: seen.append(q.shape))
    assert tokens.shape == (1, 577, 768) and encoder.grid == (24, 24) and seen == [(1, 12, 577, 64)] * 12


def flood_fill(mask):
    """8-connected labels in scan order: each pixel takes the largest number beside it again and again."""
    number = torch.arange(mask.numel(), 0, -1.0).view(mask.shape) * mask
    for _ in range(mask.numel()):
        number = F.max_pool2d(number[None], 3, 1, 1)[0] * mask
    values, order = number.unique(return_inverse=True)
    return (len(values) - order) * mask


def test_sec21_closing_is_dilation_then_erosion_by_a_cross():
    cross = torch.tensor([[[[0, 1.0, 0], [1, 1, 1], [0, 1, 0]]]])
    near = lambda mask: F.conv2d(mask[:, None].float(), cross, padding=1)[:, 0]  # how many are set
    for density in (0.1, 0.4, 0.7):
        masks = torch.rand(2, 7, 9) < density
        grown, all_in_the_image = near(masks) > 0, near(torch.ones_like(masks))
        assert torch.equal(closing(masks), near(grown) == all_in_the_image), density
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
            assert torch.equal(labels, (slow + shift) * mask), "numbers go on through a batch"
            shift += int(slow.max())


def box_of(attention, area, **changes):
    """The box in one map, with a smallest object of `area` pixels."""
    recipe = replace(TINY, min_object_area=area / attention.numel(), **changes)
    return object_box(attention[None], recipe)[0].tolist()


def test_sec21_object_box_is_half_open_above_the_threshold_large_enough_and_by_its_bbox_or_region():
    attention, core, two, equals = (torch.zeros(60, 60) for _ in range(4))
    attention[5:17, 30:52] = 0.8
    attention[10, 31] = 1.0
    assert box_of(attention, 100) == [30, 5, 52, 17] == box_of(attention, 12 * 22)
    assert box_of(attention, 12 * 22 + 1) == [4, 4, 55, 55], "a pixel less is none: central, 6/7 of each side"
    core[:, :40] = 0.3
    core[10:20, 10:25] = 1.0  # mean 0.23, median 0.3
    assert box_of(core, 50) == [0, 0, 40, 60] and box_of(core, 50, threshold="median") == [10, 10, 25, 20]
    two[5:50, 5:12] = two[43:50, 5:50] = 0.6  # an L
    two[10:18, 30:38] = 1.0  # inside the L's box, too small to be an object
    two[54:60, 20:58] = 0.7
    assert box_of(two, 100) == [5, 5, 50, 50] and box_of(two, 100, score="region") == [20, 54, 58, 60]
    equals[30:45, 2:20] = equals[4:20, 25:45] = 1.0
    assert box_of(equals, 100) == [25, 4, 45, 20], "the first in scan order"


def test_sec21_boxes_of_a_batch_equal_those_of_its_images_without_object_central_and_in_training_random():
    attention = F.interpolate(torch.rand(1, 6, 7, 7), (70, 50), mode="bilinear")[0]
    attention[2] = 0.5  # no object here
    for recipe in (TINY, replace(TINY, score="region")):
        boxes, *alone = (object_box(maps, recipe) for maps in (attention, *attention[:, None]))
        assert torch.equal(boxes, torch.cat(alone)) and boxes[2].tolist() == [3, 5, 46, 65]
    corner, far = object_box(torch.zeros(8, 448, 448), RECIPES["cub"], random=True).split(2, 1)
    assert (far - corner == 384).all() and corner.min() >= 0 and corner.max() < 64
    assert min(len(side.unique()) for side in corner.T) > 3 and not torch.equal(*corner.T)


def parts_of(attention, side, size, **changes):
    """The windows of `side` of `size` pixels in one map."""
    return part_boxes(attention[None], replace(TINY, encoder_size=size, part_crop=side / size, **changes))[0]


def test_sec22_windows_grow_to_the_crop_at_the_far_side_or_inwards_at_the_border():
    def only(map_side, x, y, window, side, size):  # all attention in one window
        attention = torch.zeros(map_side, map_side)
        attention[y : y + window, x : x + window] = 1
        return parts_of(attention, side, size, parts=1)[0].tolist()

    assert only(128, 0, 0, 42, 128, 384) == [0, 0, 128, 128]  # from 0, 0, 126, 126
    assert only(128, 86, 33, 42, 128, 384) == [256, 99, 384, 227]  # from 258, 99, 384, 225
    for cell, x, y in ((1, 18, 37), (4, 74, 93), (7, 130, 149)):  # 448 pixels / 24 cells: 18.67, 37.33, ...
        assert only(24, cell, cell + 1, 1, 19, 448)[:2] == [x, y]


@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
@pytest.mark.parametrize("stride, iou", [(1, 0.1), (2, 0.1), (1, 0.0), (1, 0.3)])
def test_sec22_best_windows_are_those_of_a_loop_over_all_windows(pool, stride, iou):
    attention = torch.rand(12, 12)
    score = {"avg": torch.mean, "max": torch.max, "gem": lambda window: window.pow(3).mean() ** (1 / 3)}[pool]
    corners = [(x, y) for y in range(0, 9, stride) for x in range(0, 9, stride)]
    scores = [score(attention[y : y + 4, x : x + 4]) for x, y in corners]
    windows = torch.tensor([(x, y, x + 5, y + 5) for x, y in corners])  # those that touch overlap
    overlap, chosen = box_iou(windows, windows), []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(overlap[i, j] <= iou for j in chosen):
            chosen.append(i)
    found = parts_of(attention, 16, 48, parts=5, stride=stride, score_pool=pool, part_iou=iou).tolist()
    best = [corners[i] for i in (chosen + 5 * chosen[-1:])[:5]]  # where windows run out the last repeats
    assert found == [[4 * x, 4 * y, 4 * x + 16, 4 * y + 16] for x, y in best]
    assert parts_of(attention, 48, 48, parts=3).tolist() == [[0, 0, 48, 48]] * 3
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


def reduced(images):
    """Photos as stage a sees them."""
    return F.interpolate(images, (48, 48), mode="bilinear", antialias=True)


def test_sec23_training_erases_by_the_map_of_the_whole_photo_and_seeks_the_object_there(monkeypatch):
    model, images = sharp(erase=True, erase_prob=0.5, head="mlp_bn").train(), torch.randn(12, 3, 96, 96)
    small, passes = reduced(images), watch(model, monkeypatch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = model.attention(small)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found, (_, first, full, thing, _) = found_in(model, images), passes
    assert model.head[0].num_batches_tracked == 3, "stages a, b, c"
    erased = (full != small).flatten(1).any(1)
    assert torch.equal(first, small[erased]) and 0 < erased.sum() < 12, "a pass before for those alone"
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
    for share, fewest, most in ((0.0, 0, 0), (0.25, 70, 130), (1.0, 400, 400)):
        assert fewest <= vit_fgvc.toss(torch.zeros(400, 3), share).sum() <= most


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


def test_eq1_joint_loss_term_by_term_and_the_prediction():
    logits = {"full": torch.randn(4, 1, 5), "object": torch.randn(4, 1, 5), "parts": torch.randn(4, 2, 5)}
    targets = torch.randint(0, 5, (4,))
    for reduction, weights in (("mean", (1, 1, 1)), ("sum", (1, 1, 2))):  # code, paper
        loss, terms = vit_fgvc.joint_loss(logits, targets, replace(TINY, part_reduction=reduction))
        for (name, stage), weight in zip(logits.items(), weights):
            log_p = stage.log_softmax(2)
            smooth = -0.9 * log_p[torch.arange(4), :, targets] - 0.1 * log_p.mean(2)
            assert torch.allclose(terms[name], weight * smooth.mean())
        assert torch.allclose(loss, sum(terms.values()))
    views = {name: stage.mean(1) for name, stage in logits.items()}
    for fusion, expected in (views | {"mean": torch.stack(list(views.values())).mean(0)}).items():
        assert torch.allclose(vit_fgvc.fuse(logits, fusion), expected)


@pytest.mark.parametrize("stages, names, expected", [
    ("a", ["full"], [3]), ("b", ["object"], [3, 3]), ("ab", ["full", "object"], [3, 3]),
    ("abc", ["full", "object", "parts"], [3, 3, 6])])
def test_fig2_a_pass_for_photos_objects_and_all_parts_gives_the_logits_that_heads_name(
        stages, names, expected, monkeypatch):
    images, targets = torch.randn(3, 3, 96, 96), torch.tensor([0, 1, 2])
    for changes, first in (({"erase": True, "erase_prob": 1.0}, [3] * ("a" in stages)), ({}, [])):
        model = tiny(stages=stages, **changes).eval()
        logits, heads = model.stages(images)[0], model.heads(images)
        assert {k: v.shape for k, v in logits.items()} == {k: (3, 2 if k == "parts" else 1, 5) for k in names}
        assert list(heads) == names + ["mean"] * (len(names) > 1)
        passes = watch(model, monkeypatch)
        assert torch.allclose(model(images), heads[list(heads)[-1]])
        model.train()(images, targets)  # a first pass to augment
        assert [len(x) for x in passes] == expected + first + expected


@pytest.mark.parametrize("source", ["object", "highres"])
def test_fig2_object_and_parts_are_cut_from_the_high_resolution_photo(source):
    images, cut = torch.randn(2, 3, 96, 80), vit_fgvc.crop
    found = found_in(tiny(part_source=source).eval(), images)
    thing, whole_map = cut(images, found["box"], 48)[:, 0], found["map"][:, None]
    assert torch.allclose(found["object"], thing, atol=1e-4)
    assert torch.allclose(found["object_map"], cut(whole_map, found["box"], 48)[:, 0, 0], atol=1e-4)
    inside = part_boxes(vit_fgvc.resize(found["object_map"], 16), TINY)
    for i, (x1, y1, x2, y2) in enumerate(found["box"][:, 0].tolist()):
        expected = torch.tensor([x1, y1] * 2) + inside[i] * torch.tensor([x2 - x1, y2 - y1] * 2) / 48
        assert torch.allclose(found["part_boxes"][i], expected, atol=1e-3)
    parts = cut(thing, inside, 48) if source == "object" else cut(images, found["part_boxes"], 48)
    assert torch.allclose(found["parts"], parts, atol=1e-4)


def test_fig2_gradient_reaches_the_encoder_from_every_logit_and_not_through_boxes():
    model, targets = tiny().eval(), torch.tensor([1, 4])
    logits, found = model.stages(torch.randn(2, 3, 96, 96))
    assert not any(value.requires_grad for value in found)
    weight = model.encoder.blocks[0].attn.qkv.weight
    gradient = lambda value: torch.autograd.grad(value, weight, retain_graph=True)[0]
    for stage in (logits["full"], logits["object"], *logits["parts"].unbind(1)):
        assert gradient(stage.sum()).any()
    plain = model.head(model.norm(model.encoder.features(found[2])[:, 0]))  # a plain ViT on the crop
    both = (gradient(F.cross_entropy(answer, targets)) for answer in (logits["object"][:, 0], plain))
    assert torch.allclose(*both, atol=1e-6)


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
    pages, picture = [], lambda image: common.to_pil(image, "imagenet")
    monkeypatch.setattr(common, "panels", lambda images, captions: pages.append(dict(zip(captions, images))))
    model, images = sharp(parts=1, stages="a").eval(), torch.randn(2, 3, 96, 96)
    model.figure(images)
    found = found_in(model, images).values()
    for page, image, attention, [box], thing, object_map, _, [part] in zip(pages, images, *found):
        array = {caption: np.asarray(panel).astype(int) for caption, panel in page.items()}
        photo, x1, y1, x2, y2 = np.asarray(picture(image)), *box.tolist()
        changed = (array["object box"] != photo).any(2)
        assert changed[y1 : y1 + 4, x1:x2].mean() > 0.9 and changed[y1:y2, x1 : x1 + 4].mean() > 0.9
        assert not changed[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].any()
        assert array["object box"][y1, x1].tolist() == [255, 32, 32]
        assert page["attention"] == common.heat(picture(image), attention, strength=1.0)
        product = photo * np.floor(attention.numpy() * 255)[..., None] / 255
        assert np.abs(array["image x attention"] - product).max() <= 1
        assert page["object"] == picture(thing) and page["part 1"] == picture(part)
        assert page["its attention"] == common.heat(picture(thing), object_map, strength=1.0)
        hole, erased = (attention > 0.7).numpy(), array["erased above 0.7"]
        rim = F.max_pool2d((attention > 0.7)[None].float(), 9, 1, 4)[0].bool().numpy() & ~hole
        assert hole.any() and rim.any() and (erased[rim] == 255).all()
        assert (erased[hole] == [124, 116, 104]).all()
        assert (erased[~hole & ~rim] == photo[~hole & ~rim]).all()


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


def test_sec3_every_field_of_a_recipe_is_the_authors_or_the_shared_default():
    default = asdict(common.Recipe())
    own = {name: value for name, value in CUB.items() if name not in default}
    settings = {"cub": CUB, "plant": CUB, "folder": CUB, "dogs": CUB | DOGS, "cars": CUB | CARS,
                "aircraft": CUB | AIRCRAFT, "toy": own | TOY}
    assert {data: asdict(r) for data, r in RECIPES.items()} == {k: default | v for k, v in settings.items()}
    for data, r in RECIPES.items():
        resized = r.image_size[0] + math.ceil(r.image_size[0] * 0.14 / 8) * 8
        assert data == "toy" or r.resize == (resized, resized) and r.epochs == sum(r.phases)


def test_tables_hold_the_papers_rows_and_values():  # once more from the paper and the notebooks' logs
    plain, multi, erase = ("ViT-B/16", {"stages": "a"}), ("multi-stage", {}), {"erase": True}
    text = {
        "as the code": {}, "threshold: median": {"threshold": "median"},
        "object by region": {"score": "region"}, "max pooling": {"score_pool": "max"},
        "GeM pooling": {"score_pool": "gem"}, "stride 2": {"stride": 2},
        "parts of 112 / 384": {"part_crop": 112 / 384},
        "parts in high resolution": {"part_source": "highres"}, "sum over parts": {"part_reduction": "sum"},
        "maximum of the heads": {"head_fusion": "max"}, "minimum of the heads": {"head_fusion": "min"},
        "attention erasing": erase, "attention cropping": {"attention_crop": 0.5}}
    expected = {
        "toy": ("toy", [("a", plain[1], None), ("a, b", {"stages": "ab"}, None), ("a, b, c", {}, None)]),
        "2": ("dogs", [(*plain, 91.7), (*multi, 93.2)]), "4": ("plant", [(*plain, None), (*multi, None)]),
        "3": ("cub", [(*plain, 89.4), (*multi, 91.0)]), "3-cars": ("cars", [(*plain, 92.8), (*multi, 94.3)]),
        "ablation": ("dogs", [
            ("full", {"stages": "a"}, 93.07), ("full, erasing", {"stages": "a"} | erase, 92.70),
            ("object", {"stages": "b"}, 90.40), ("object, erasing", {"stages": "b"} | erase, 90.04),
            ("full + object", {"stages": "ab"}, None),
            ("full + object, erasing", {"stages": "ab"} | erase, None),
            ("full + object + parts", {}, None), ("full + object + parts, erasing", erase, None)]),
        "text": ("cub", [(*row, None) for row in text.items()]),
        "baseline": ("cub", [(*plain, 89.4), (*multi, 91.0)])}
    assert {key: (t.data, list(t.rows)) for key, t in TABLES.items()} == expected
    assert {t.metric for t in TABLES.values()} == {"top1"}
    for words in ("not reproducible", "ResNet-50 89.2", "EfficientNet-B0 90.1", "B2 90.4", "iCassava 2019"):
        assert words in TABLES["4"].title, words
    assert "ten other methods" in TABLES["3"].title and "iCassava 2019" in vit_fgvc.__doc__


@pytest.mark.parametrize("data, encoder, head", [
    ("cub", [(2, 0), (4, 2e-5), (4, 2e-6)], [(2, 3e-3), (4, 1e-3), (4, 1e-4)]),
    ("dogs", [(2, 0), (4, 2e-5)], [(2, 3e-3), (4, 1e-3)]),
    ("cars", [(24, 0), (32, 3.3e-5)], [(24, 1e-2), (32, 3.3e-3)]),
    ("aircraft", [(4, 0), (16, 4e-5)], [(4, 3e-3), (16, 1e-3)])])
def test_sec3_learning_rates_follow_one_cycle_in_each_phase(data, encoder, head):
    with torch.device("meta"):
        model = vit_fgvc.MultiStageViT(RECIPES[data], 7)
    names, steps = {id(p): name for name, p in model.named_parameters()}, 10 * RECIPES[data].epochs
    for group in vit_fgvc.param_groups(model, RECIPES[data]):
        own, begin = [names[id(p)] for p in group["params"]], 0
        for name, p in zip(own, group["params"]):
            matrix = p.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
            assert group["weight_decay"] == (0.01 if matrix else 0.0), name
        for length, peak in encoder if own[0].startswith("encoder.") else head:
            at = [begin, begin + 5 * length, begin + 10 * length - 1]
            first, middle, last = (common.lr_at(RECIPES[data], step, steps, 10, group) for step in at)
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
    vit, path = common.vit("toy_vit", 80, num_classes=9), tmp_path / "vit.pth"
    torch.save({"model": vit.state_dict()}, path)
    model = tiny(weights=str(path))  # of 48 pixels: positions are resized, norm and head dropped
    assert torch.equal(model.encoder.blocks[2].mlp.fc1.weight, vit.blocks[2].mlp.fc1.weight)
    assert model.encoder.pos_embed.shape == (1, 37, 96) and torch.equal(model.norm.weight, torch.ones(96))
    torch.nn.init.normal_(model.norm.weight)
    torch.save(model.state_dict(), path)
    again = vit_fgvc.build(replace(TINY, weights=str(path)), 11)
    for name in ("norm.weight", "head.0.weight"):
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    asked = []  # the default: the authors' at 384 pixels
    monkeypatch.setattr(common, "load_vit", lambda vit, source: asked.append((vit.official, source)) or {})
    monkeypatch.setitem(common.VITS, "vit_base", (dict(dim=24, depth=1, heads=2), "Google's"))
    for backbone in ("vit_base", "toy_vit"):
        tiny(weights="default", backbone=backbone)
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
