"""Multi-stage ViT: each step of the paper against a literal recomputation, hand cases with known answers, and the authors' numbers."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import vit_fgvc
from vit_fgvc import RECIPES, TABLES, attention_map, closing, connected_components, crop, erase, fuse, joint_loss, object_box, part_boxes, suppress

TINY = replace(RECIPES["toy"], image_size=(96, 96), encoder_size=48, backbone="toy_vit", label_smoothing=0.1, stages="abc")


def tiny(**changes):
    """A model of 48-pixel passes over 96-pixel photos, and its recipe."""
    recipe = replace(TINY, **changes)
    return vit_fgvc.build(recipe, 5), recipe


def attention(layers, B=2, h=3, N=10):
    """Random row-stochastic attention, first layer first."""
    return [torch.randn(B, h, N, N, dtype=torch.float64).mul(2).softmax(-1) for _ in range(layers)]


def count_passes(model, monkeypatch):
    """The batch sizes that enter the encoder, one entry a pass."""
    passes, features = [], model.encoder.features
    monkeypatch.setattr(model.encoder, "features", lambda images, visit=None: passes.append(len(images)) or features(images, visit))
    return passes


# ------------------------------------------------------------------------------------------------ Sec. 2: the attention map


def test_sec2_attention_map_is_the_class_tokens_row_of_the_product_of_all_layers():
    """Recomputed matrix by matrix: mean of the heads, plus identity, rows to sum 1, the newest layer on the left."""
    attns = attention(3)
    for b in range(2):
        product = torch.eye(10, dtype=torch.float64)
        for attn in attns:
            mixed = attn[b].mean(0) + torch.eye(10, dtype=torch.float64)
            product = mixed / mixed.sum(1, keepdim=True) @ product
        row = product[0, 1:]
        assert torch.allclose(attention_map(attns, (3, 3))[b].flatten(), row / row.max(), atol=1e-9)


def test_sec2_order_of_the_layers_matters():
    attns = attention(2)
    assert not torch.allclose(attention_map(attns, (3, 3)), attention_map(attns[::-1], (3, 3)), atol=1e-3)


def test_sec2_attention_map_has_maximum_one_rows_by_columns_and_no_gradient():
    attns = [a.requires_grad_() for a in attention(2, N=7)]
    found = attention_map(attns, (2, 3))
    assert found.shape == (2, 2, 3) and not found.requires_grad and found.min() >= 0
    assert torch.allclose(found.amax((1, 2)), torch.ones(2, dtype=found.dtype))


def test_sec2_with_one_layer_the_map_is_the_class_tokens_attention():
    attn = attention(1)
    row = attn[0].mean(1)[:, 0, 1:]
    assert torch.allclose(attention_map(attn, (3, 3)).flatten(1), row / row.amax(1, keepdim=True))


def test_sec2_uniform_attention_gives_a_map_of_ones_and_no_object():
    """R = 2^-12 I + (1 - 2^-12) / 17: 0.0590533 on the diagonal, 0.0588092 off it."""
    uniform = [torch.full((1, 2, 17, 17), 1 / 17)] * 12
    total = common.rollout([a.mean(1) for a in uniform])[0]
    assert torch.allclose(total.diagonal(), torch.tensor(0.0590533), atol=1e-6) and torch.allclose(total[0, 1:], torch.tensor(0.0588092), atol=1e-6)
    found = attention_map(uniform, (4, 4))
    assert torch.allclose(found, torch.ones(1, 4, 4), atol=1e-6)
    wide = vit_fgvc.resize(found, 448, 448)
    assert object_box(wide, 4096)[0].tolist() == [32, 32, 416, 416], "rounding speckle was taken for an object"


def test_sec2_attention_that_stays_on_itself_gives_zeros_not_nan():
    found = attention_map([torch.eye(5).expand(1, 2, 5, 5)] * 3, (2, 2))
    assert torch.equal(found, torch.zeros(1, 2, 2))
    assert object_box(found, 1).shape == (1, 4)


def test_sec2_the_class_token_keeps_at_least_two_to_the_minus_layers():
    row = common.cls_rollout([a.mean(1) for a in attention(12)])
    assert (row[:, 0] >= 2.0**-12).all() and (row[:, 1:].sum(1) <= 0.999756).all() and torch.allclose(row.sum(1), torch.ones(2, dtype=row.dtype))


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_sec2_queries_and_keys_give_the_same_map_as_their_attention(fusion):
    """And heads fused by maximum or minimum, whose rows do not sum to one, are normalised after adding the identity."""
    layers = [tuple(torch.randn(2, 2, 3, 10, 4).mul(1.5).unbind(0)) for _ in range(2)]
    attns = [(q @ k.transpose(2, 3) / 2).softmax(-1) for q, k in layers]
    found = attention_map(layers, (3, 3), fusion)
    assert torch.allclose(found, attention_map(attns, (3, 3), fusion), atol=1e-5)
    product = torch.eye(10)
    for attn in attns:
        mixed = {"mean": attn.mean(1), "max": attn.amax(1), "min": attn.amin(1)}[fusion][0] + torch.eye(10)
        product = mixed / mixed.sum(1, keepdim=True) @ product
    assert torch.allclose(found[0].flatten(), product[0, 1:] / product[0, 1:].max(), atol=1e-5)


def test_sec2_tokens_of_the_paper_are_577_by_768_and_attention_has_12_heads():
    with torch.device("meta"):
        encoder = common.vit("vit_base", (384, 384))
        seen = []
        assert encoder.features(torch.empty(1, 3, 384, 384), lambda q, k: seen.append(q)).shape == (1, 577, 768)
    assert encoder.grid == (24, 24) and len(seen) == 12 and seen[0].shape == (1, 12, 577, 64)


# ------------------------------------------------------------------------------------------------ Sec. 2.1: the object


def slow_closing(mask):
    """3 x 3 cross: a pixel is set if a neighbour is, then stays if all its neighbours inside the image are."""
    H, W = mask.shape

    def near(m, r, c):
        return [m[y][x] for y, x in ((r, c), (r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if 0 <= y < H and 0 <= x < W]

    pixels = mask.tolist()
    grown = [[any(near(pixels, r, c)) for c in range(W)] for r in range(H)]
    return torch.tensor([[all(near(grown, r, c)) for c in range(W)] for r in range(H)])


def flood_fill(mask):
    """8-connected labels in scan order, pixel by pixel."""
    (H, W), pixels, n = mask.shape, mask.tolist(), 0
    labels = [[0] * W for _ in range(H)]
    for r in range(H):
        for c in range(W):
            if pixels[r][c] and not labels[r][c]:
                n, todo = n + 1, [(r, c)]
                labels[r][c] = n
                while todo:
                    y, x = todo.pop()
                    for y2 in range(max(0, y - 1), min(H, y + 2)):
                        for x2 in range(max(0, x - 1), min(W, x + 2)):
                            if pixels[y2][x2] and not labels[y2][x2]:
                                labels[y2][x2] = n
                                todo.append((y2, x2))
    return torch.tensor(labels)


def test_sec21_closing_is_dilation_then_erosion_by_a_cross():
    for density in (0.1, 0.4, 0.7):
        masks = torch.rand(2, 9, 13) < density
        assert torch.equal(closing(masks), torch.stack([slow_closing(m) for m in masks])), density


def test_sec21_closing_joins_gaps_of_two_pixels_but_not_of_three():
    for gap, components in ((1, 1), (2, 1), (3, 2)):
        mask = torch.zeros(12, 20, dtype=torch.bool)
        mask[2:9, 2:8] = mask[2:9, 8 + gap : 14] = True
        assert connected_components(closing(mask)).max() == components, gap


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_sec21_connected_components_agree_with_a_flood_fill(density):
    for shape in ((24, 31), (1, 40), (40, 1)):
        masks, shift = torch.rand(3, *shape) < density, 0
        for mask, labels in zip(masks, connected_components(masks)):
            slow = flood_fill(mask)
            assert torch.equal(connected_components(mask), slow)
            assert torch.equal(labels, torch.where(slow > 0, slow + shift, 0)), "numbers go on through a batch"
            shift += int(slow.max())


def test_sec21_connected_components_join_by_corners_and_round_a_spiral():
    assert connected_components(torch.eye(6, dtype=torch.bool)).max() == 1
    assert connected_components(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]]).bool()).max() == 4
    spiral = torch.zeros(33, 33, dtype=torch.bool)
    r, c, step, turns = 0, -1, (0, 1), 0
    for length in [33, *(n for side in range(32, 0, -2) for n in (side, side))]:
        for _ in range(length):
            r, c = r + step[0], c + step[1]
            spiral[r, c] = True
        step, turns = (step[1], -step[0]), turns + 1
    assert turns == 33 and connected_components(spiral).max() == 1
    assert torch.equal(connected_components(spiral), flood_fill(spiral))


def test_sec21_object_box_is_half_open_rows_before_columns():
    attention = torch.zeros(40, 60)
    attention[5:17, 30:52] = 0.8
    attention[10, 31] = 1.0
    assert object_box(attention, 100).tolist() == [5, 30, 17, 52]
    assert object_box(attention, 12 * 22).tolist() == [5, 30, 17, 52], "a component of exactly min_area survives"
    assert object_box(attention, 12 * 22 + 1).tolist() == [3, 4, 37, 55], "one pixel less does not: centred box of 6/7 of each side"


def test_sec21_object_box_covers_its_component():
    for _ in range(5):
        attention = F.interpolate(torch.rand(1, 1, 6, 8), (60, 80), mode="bilinear")[0, 0]
        r1, c1, r2, c2 = object_box(attention, 40).tolist()
        labels = flood_fill(slow_closing(attention > attention.mean()))
        inside = [n for n in labels.unique().tolist() if n and (labels == n).sum() >= 40 and (labels == n).nonzero().amin(0).tolist() == [r1, c1] and ((labels == n).nonzero().amax(0) + 1).tolist() == [r2, c2]]
        assert inside, "no component has this box"
        assert attention[r1:r2, c1:c2].max() == attention.max(), "the largest attention lies in the box"


def test_sec21_bbox_score_sees_foreign_pixels_and_region_score_does_not():
    """An L holds a brighter speck of another component inside its box."""
    attention = torch.zeros(60, 60)
    attention[5:50, 5:12] = attention[43:50, 5:50] = 0.6  # the L
    attention[10:18, 30:38] = 1.0  # inside the L's box, too small to be an object
    attention[54:60, 20:58] = 0.7
    assert object_box(attention, 100).tolist() == [5, 5, 50, 50]
    assert object_box(attention, 100, score="region").tolist() == [54, 20, 60, 58]


def test_sec21_of_equal_scores_the_first_in_scan_order_wins():
    attention = torch.zeros(50, 50)
    attention[30:45, 2:20] = attention[4:20, 25:45] = 1.0
    assert object_box(attention, 100).tolist() == [4, 25, 20, 45]


def test_sec21_boxes_of_a_batch_equal_those_of_its_images():
    attention = F.interpolate(torch.rand(6, 1, 7, 7), (70, 50), mode="bilinear")[:, 0]
    attention[2] = 0.5  # no object here
    for score in ("bbox", "region"):
        together = object_box(attention, 150, score)
        assert torch.equal(together, torch.stack([object_box(a, 150, score) for a in attention]))
    assert together[2].tolist() == [5, 3, 65, 46]


def test_sec21_fallback_box_is_central_in_evaluation_and_random_in_training():
    """Of 448 pixels the box takes 384: its corner lies in [0, 64) on both axes."""
    assert object_box(torch.full((448, 448), 0.3), 4096).tolist() == [32, 32, 416, 416]
    boxes = object_box(torch.zeros(8, 448, 448), 4096, random=True)
    assert (boxes[:, 2:] - boxes[:, :2] == 384).all() and boxes[:, :2].min() >= 0 and boxes[:, :2].max() < 64
    assert len(boxes[:, 0].unique()) > 3 and len(boxes[:, 1].unique()) > 3 and not torch.equal(boxes[:, 0], boxes[:, 1])


# ------------------------------------------------------------------------------------------------ Sec. 2.2: the parts


def gaussian(side=128, sigma=30.0):
    x = (torch.arange(side) - (side - 1) / 2) ** 2
    return torch.exp(-(x[:, None] + x) / (2 * sigma**2))


def test_sec22_part_boxes_of_a_central_gaussian():
    best, second = part_boxes(gaussian(), 128, 384).tolist()
    assert best == [129, 129, 257, 257]
    alike = {(r, c, r + 128, c + 128) for r, c in ((36, 84), (36, 174), (84, 36), (174, 36), (84, 222), (174, 222), (222, 84), (222, 174))}  # its mirror images
    assert second == [36, 84, 164, 212] or tuple(second) in alike


def test_sec22_windows_grow_to_the_crop_at_the_far_side_or_inwards_at_the_border():
    def only(row, col):  # all attention in one window of 42 x 42
        attention = torch.zeros(128, 128)
        attention[row : row + 42, col : col + 42] = 1
        return part_boxes(attention, 128, 384, parts=1)[0].tolist()

    assert only(0, 0) == [0, 0, 128, 128]  # from 0, 0, 126, 126
    assert only(86, 86) == [256, 256, 384, 384]  # from 258, 258, 384, 384
    assert only(33, 86) == [99, 256, 227, 384]  # rows grow at the far side, columns inwards


def test_sec22_map_pixels_become_image_pixels_by_truncation():
    """24 cells over 448 pixels: cell 1 begins at 18 (18.67), 4 at 74, 7 at 130."""
    for cell, pixel in ((1, 18), (4, 74), (7, 130)):
        attention = torch.zeros(24, 24)
        attention[cell, cell + 1] = 1
        assert part_boxes(attention, 19, 448, parts=1)[0].tolist() == [pixel, (cell + 1) * 448 // 24, pixel + 19, (cell + 1) * 448 // 24 + 19]


def iou_plus_one(a, b):
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    inter = max(0, sides[0]) * max(0, sides[1])
    area = lambda box: (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    return inter / (area(a) + area(b) - inter)


def test_sec22_non_maximum_suppression_hand_case():
    """Five boxes, best first A B C D E; areas count the last pixel, so A and B, which touch, overlap."""
    boxes = torch.tensor([[0, 0, 10, 10], [10, 0, 20, 10], [5, 5, 15, 15], [30, 30, 40, 40], [0, 1, 10, 11]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    for iou, keep in ((0, [0, 3]), (0.05, [0, 1, 3]), (0.1, [0, 1, 3]), (0.25, [0, 1, 2, 3]), (0.5, [0, 1, 2, 3])):
        assert suppress(boxes, scores, len(keep), iou)[0].tolist() == keep, iou
        assert suppress(boxes, scores, len(keep) + 1, iou)[0].tolist() == keep + keep[-1:], "what is missing repeats the last"


def test_sec22_suppression_equals_torchvisions_nms_on_boxes_one_pixel_larger():
    for iou in (0.0, 0.1, 0.3):
        corner, side = torch.randint(0, 60, (80, 2)), torch.randint(8, 30, (80, 2))
        boxes, scores = torch.cat([corner, corner + side], 1), torch.rand(3, 80)
        found = suppress(boxes, scores, 4, iou)
        for row, score in zip(found, scores):
            oracle = torchvision.ops.nms((boxes + torch.tensor([0, 0, 1, 1])).float(), score, iou)[:4]
            assert torch.equal(row[: len(oracle)], oracle)


@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
def test_sec22_part_boxes_are_exact_squares_inside_and_hardly_overlap(pool):
    """k = 37, 42 and 56 of 128 (crops 112, 128, 170) always leave a second window, wherever the first is."""
    for side in (112, 128, 170):
        k = side * 128 // 384
        maps = F.interpolate(torch.rand(4, 1, 8, 8), 128, mode="bilinear")[:, 0]
        boxes = part_boxes(maps, side, 384, pool=pool)
        assert boxes.shape == (4, 2, 4) and (boxes[..., 2:] - boxes[..., :2] == side).all() and boxes.min() >= 0 and boxes.max() <= 384
        for pair in boxes.tolist():
            windows = [[math.ceil(r1 / 3), math.ceil(c1 / 3), math.ceil(r1 / 3) + k, math.ceil(c1 / 3) + k] for r1, c1, _, _ in pair]
            assert iou_plus_one(*windows) <= 0.1 + 1 / k  # the pixels of the image round the window by less than one of the map


def test_sec22_best_windows_are_those_of_a_loop_over_all_windows():
    attention = torch.rand(12, 12)
    for pool in ("avg", "max", "gem"):
        for stride in (1, 2):
            score = {"avg": lambda w: w.mean(), "max": lambda w: w.max(), "gem": lambda w: w.pow(3).mean() ** (1 / 3)}[pool]
            windows = [[r, c, r + 4, c + 4] for r in range(0, 9, stride) for c in range(0, 9, stride)]
            scores = [score(attention[r1:r2, c1:c2]).item() for r1, c1, r2, c2 in windows]
            chosen = []
            for i in sorted(range(len(windows)), key=lambda i: -scores[i]):
                if all(iou_plus_one(windows[i], windows[j]) <= 0.1 for j in chosen):
                    chosen.append(i)
            found = part_boxes(attention, 16, 48, parts=2, stride=stride, pool=pool)
            assert found[:, :2].tolist() == [[windows[i][0] * 4, windows[i][1] * 4] for i in chosen[:2]], (pool, stride)


def test_sec22_there_are_always_as_many_parts_as_asked():
    """A window of 64 of 128 pixels in the centre leaves no room for a second: the last is repeated."""
    for side in (192, 224, 384):
        boxes = part_boxes(gaussian(), side, 384, parts=3)
        assert boxes.shape == (3, 4) and torch.equal(boxes[0], boxes[1])
    assert part_boxes(torch.full((10, 14), 0.5), 12, 40, parts=4).shape == (4, 4), "a constant map has parts, too"


def test_sec22_a_crop_larger_than_the_object_image_is_an_error():
    with pytest.raises(ValueError, match="crop of 400 pixels does not fit an object image of 384"):
        part_boxes(gaussian(), 400, 384)
    with pytest.raises(ValueError, match="--part-crop 1.2"):
        tiny(part_crop=1.2)


def test_sec2_crop_equals_slicing_and_resizing():
    images = torch.randn(3, 2, 30, 44)
    boxes = torch.tensor([[0, 0, 30, 44], [3, 10, 21, 44], [28, 5, 30, 7]])
    for image, (r1, c1, r2, c2), found in zip(images, boxes.tolist(), crop(images, boxes, 16)):
        assert torch.allclose(found, F.interpolate(image[None, :, r1:r2, c1:c2], (16, 16), mode="bilinear", align_corners=True)[0], atol=1e-4)


# ------------------------------------------------------------------------------------------------ Sec. 2.3: erasing


def test_sec23_erasing_zeroes_exactly_the_pixels_above_the_threshold():
    images, maps = torch.randn(3, 3, 8, 9), torch.rand(3, 8, 9)
    before = images.clone()
    found = erase(images, maps, 0.7, 1.0)
    assert torch.equal(found == 0, (maps > 0.7)[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(found[found != 0], images[found != 0]) and torch.equal(images, before)
    assert torch.equal(erase(images, maps, 0.7, 0.0), images) and torch.equal(erase(images, maps, 1.0, 1.0), images)


def test_sec23_each_image_is_erased_with_its_own_coin():
    images, maps = torch.ones(400, 3, 2, 2), torch.ones(400, 2, 2)
    found = erase(images, maps, 0.7, 0.25, torch.Generator().manual_seed(3))
    gone = (found == 0).flatten(1)
    assert (gone.all(1) | ~gone.any(1)).all() and 70 <= gone.all(1).sum() <= 130
    assert torch.equal(found, erase(images, maps, 0.7, 0.25, torch.Generator().manual_seed(3)))


def test_sec23_a_map_resized_from_24_cells_still_erases_at_07():
    for cell in range(0, 576, 7):
        found = torch.zeros(1, 576)
        found[0, cell] = 1.0  # all attention in one cell
        assert vit_fgvc.resize(found.view(1, 24, 24), 384, 384).max() >= 0.94


# ------------------------------------------------------------------------------------------------ Eq. 1


def test_eq1_joint_loss_of_equal_logits_is_three_or_four_times_that_of_one():
    one, targets = torch.randn(6, 5), torch.randint(0, 5, (6,))
    logits = {"full": one, "object": one, "parts": one[:, None].expand(-1, 2, -1)}
    smooth = F.cross_entropy(one, targets, label_smoothing=0.1)
    assert torch.allclose(joint_loss(logits, targets)[0], 3 * smooth)
    assert torch.allclose(joint_loss(logits, targets, part_reduction="sum")[0], 4 * smooth)
    assert torch.allclose(joint_loss({"object": one}, targets)[0], smooth)


def test_eq1_joint_loss_term_by_term():
    full, thing, parts, targets = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 3, 5), torch.randint(0, 5, (4,))

    def slow(logits):
        log_p = logits.log_softmax(1)
        return sum(-0.8 * log_p[i, t] - 0.2 * log_p[i].mean() for i, t in enumerate(targets)) / len(targets)

    loss, terms = joint_loss({"full": full, "object": thing, "parts": parts}, targets, 0.2, "sum")
    expected = {"full": slow(full), "object": slow(thing), "parts": sum(slow(parts[:, i]) for i in range(3))}
    assert all(torch.allclose(terms[k], expected[k]) and not terms[k].requires_grad for k in expected)
    assert torch.allclose(loss, sum(expected.values()))


def test_prediction_is_one_stage_or_the_mean_of_the_stages():
    logits = {"full": torch.randn(2, 5), "object": torch.randn(2, 5), "parts": torch.randn(2, 2, 5)}
    assert torch.equal(fuse(logits, "object"), logits["object"]) and torch.allclose(fuse(logits, "parts"), logits["parts"].mean(1))
    assert torch.allclose(fuse(logits, "mean"), (logits["full"] + logits["object"] + logits["parts"].mean(1)) / 3)


# ------------------------------------------------------------------------------------------------ Fig. 2: the stages


def test_fig2_one_encoder_norm_and_head_whatever_the_stages():
    shapes = [{k: v.shape for k, v in tiny(stages=stages)[0].state_dict().items()} for stages in ("a", "b", "ab", "abc")]
    assert all(s == shapes[0] for s in shapes)


def test_sec2_parameter_counts_at_the_papers_size():
    """Encoder without its norm, the new norm and 768-768-K: 86,681,088 + 769 K; the notebook's head for Cars 592,896 + 768 K."""
    expected = {"cub": (200, 86_834_888), "dogs": (120, 86_773_368), "aircraft": (100, 86_757_988), "plant": (4, 86_684_164), "cars": (196, 86_833_920)}
    for data, (classes, count) in expected.items():
        with torch.device("meta"):
            model = vit_fgvc.MultiStageViT(RECIPES[data], classes)
        assert sum(p.numel() for p in model.parameters()) == count, data
        if data != "cars":
            assert count == 86_681_088 + 769 * classes


def test_fig2_stages_give_their_logits_and_heads_name_them():
    images = torch.randn(3, 3, 96, 96)
    for stages, names in (("a", ["full"]), ("b", ["object"]), ("ab", ["full", "object"]), ("abc", ["full", "object", "parts"])):
        model, _ = tiny(stages=stages)
        model.eval()
        logits, _ = model.stages(images)
        assert list(logits) == names and all(v.shape == ((3, 2, 5) if k == "parts" else (3, 5)) for k, v in logits.items())
        heads = model.heads(images)
        assert list(heads) == (names if len(names) == 1 else names + ["mean"]) and all(v.shape == (3, 5) for v in heads.values())
        assert torch.allclose(model(images), heads[list(heads)[-1]])


def test_fig2_evaluation_takes_one_pass_for_photos_one_for_objects_one_for_all_parts(monkeypatch):
    for stages, expected in (("a", [3]), ("b", [3, 3]), ("ab", [3, 3]), ("abc", [3, 3, 6])):
        model, _ = tiny(stages=stages, erase=True, erase_prob=1.0)
        passes = count_passes(model.eval(), monkeypatch)
        model(torch.randn(3, 3, 96, 96))
        assert passes == expected, stages


def test_fig2_training_takes_a_second_pass_only_for_erased_photos(monkeypatch):
    images, targets = torch.randn(4, 3, 96, 96), torch.tensor([0, 1, 2, 3])
    for probability, expected in ((0.0, [4, 4, 8]), (1.0, [4, 4, 4, 8])):
        model, _ = tiny(erase=True, erase_prob=probability)
        passes = count_passes(model.train(), monkeypatch)
        model(images, targets)
        assert passes == expected
    model, _ = tiny(erase=True, erase_prob=0.5)
    passes = count_passes(model.train(), monkeypatch)
    for _ in range(4):
        model(images, targets)
    assert any(len(passes[i:]) > 1 and 0 < n < 4 for i, n in enumerate(passes)), "only the marked photos pass twice"


def test_fig2_evaluation_does_not_depend_on_erasing():
    model, recipe = tiny()
    other = vit_fgvc.MultiStageViT(replace(recipe, erase=True, erase_prob=1.0), 5)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_sec23_training_erases_photos_and_objects_by_the_map_of_the_whole_photo():
    model, recipe = tiny(erase=True, erase_prob=1.0)
    seen, features = [], model.encoder.features
    model.encoder.features = lambda images, visit=None: seen.append(images) or features(images, visit)
    _, found = model.train().stages(torch.randn(2, 3, 96, 96))
    first, erased = seen[0], seen[1]
    wide = vit_fgvc.resize(found["map"], 48, 48)
    assert torch.equal(erased == 0, (wide > 0.7)[:, None].expand(-1, 3, -1, -1)) and torch.equal(erased[erased != 0], first[erased != 0])
    assert torch.equal(seen[2] == 0, (found["object_map"] > 0.7)[:, None].expand(-1, 3, -1, -1)), "the object's map is not normalised again"


def test_fig2_object_and_parts_are_cut_from_the_high_resolution_photo():
    images = torch.randn(2, 3, 96, 80)
    for source in ("object", "highres"):
        model, recipe = tiny(part_source=source)
        with torch.no_grad():
            _, seen = model.eval().stages(images)
        for i, (r1, c1, r2, c2) in enumerate(seen["box"].tolist()):
            object_ = F.interpolate(images[i : i + 1, :, r1:r2, c1:c2], (48, 48), mode="bilinear", align_corners=True)
            assert torch.allclose(seen["object"][i], object_[0], atol=1e-4)
            small = F.interpolate(seen["object_map"][i][None, None], (16, 16), mode="bilinear", align_corners=True)[0, 0]
            for p, (y1, x1, y2, x2) in enumerate(part_boxes(small, 16, 48).tolist()):
                inside = [r1 + y1 * (r2 - r1) / 48, c1 + x1 * (c2 - c1) / 48, r1 + y2 * (r2 - r1) / 48, c1 + x2 * (c2 - c1) / 48]
                assert torch.allclose(seen["part_boxes"][i, p], torch.tensor(inside), atol=1e-3)
                expected = object_[..., y1:y2, x1:x2] if source == "object" else None
                if source == "object":
                    assert torch.allclose(seen["parts"][i, p], F.interpolate(expected, (48, 48), mode="bilinear", align_corners=True)[0], atol=1e-4)
                else:
                    assert torch.allclose(seen["parts"][i, p], crop(images[i : i + 1], seen["part_boxes"][i, p][None], 48)[0], atol=1e-4)


def test_fig2_gradient_reaches_the_encoder_from_every_logit_and_not_through_boxes():
    """The gradient of the object stage equals that of a plain ViT on the crop."""
    images, targets = torch.randn(2, 3, 96, 96), torch.tensor([1, 4])
    model, recipe = tiny(drop_path=0.0)
    model.eval()
    logits, seen = model.stages(images)
    assert not any(v.requires_grad for v in seen.values())
    weight = model.encoder.blocks[0].attn.qkv.weight
    for stage in (logits["full"], logits["object"], logits["parts"][:, 0], logits["parts"][:, 1]):
        assert torch.autograd.grad(stage.sum(), weight, retain_graph=True)[0].abs().sum() > 0
    through = torch.autograd.grad(F.cross_entropy(logits["object"], targets), weight)[0]
    plain = model.head(model.norm(model.encoder.features(seen["object"].detach())[:, 0]))
    assert torch.allclose(through, torch.autograd.grad(F.cross_entropy(plain, targets), weight)[0], atol=1e-6)


@pytest.mark.parametrize("changes", [{"stages": "a"}, {"stages": "b"}, {"stages": "ab"}, {"stages": "abc"}, {"erase": True, "erase_prob": 1.0}, {"stages": "b", "erase": True}])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_learns_also_under_autocast(changes, autocast):
    """A pass without gradients must not leave autocast's cast weights behind: later passes would train nothing."""
    model, recipe = tiny(**changes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, terms = model.train()(torch.randn(3, 3, 96, 96), torch.tensor([0, 1, 2]))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert 0 <= terms["top1"] <= 1 and set(terms) >= {{"a": "full", "b": "object"}.get(recipe.stages, "object"), "top1"} and not any(v.requires_grad for v in terms.values())


def test_images_need_not_be_square_nor_of_the_recipes_size():
    model, _ = tiny()
    for H, W in ((96, 60), (50, 130)):
        images = torch.randn(2, 3, H, W)
        assert model.eval()(images).shape == (2, 5)
        boxes, scores = model.where(images)
        assert boxes.shape == (2, 3, 4) and scores.shape == (2, 3)
        assert (boxes >= 0).all() and (boxes[..., 2] <= W).all() and (boxes[..., 3] <= H).all() and (boxes[..., 2:] > boxes[..., :2]).all()


@pytest.mark.parametrize("stages", ["a", "abc"])
def test_where_gives_the_object_first_and_its_parts_inside_as_xyxy(stages):
    model, recipe = tiny(stages=stages)
    images = torch.randn(2, 3, 96, 72)
    boxes, scores = model.eval().where(images)
    with torch.no_grad():
        seen = model.stages(images, locate=True)[1]
    assert torch.equal(boxes[:, 0].long(), seen["box"][:, [1, 0, 3, 2]])
    assert (boxes[:, 1:, :2] >= boxes[:, :1, :2]).all() and (boxes[:, 1:, 2:] <= boxes[:, :1, 2:] + 1e-3).all()
    for i, (r1, c1, r2, c2) in enumerate(seen["box"].tolist()):
        assert abs(scores[i, 0] - seen["wide_map"][i, r1:r2, c1:c2].max()) < 0.02
    assert (scores[:, :1] >= scores[:, 1:]).all() and scores.min() >= 0


def test_fig4_and_fig5_panels_show_box_maps_object_erasure_and_parts():
    model, _ = tiny()
    pages = model.eval().figure(torch.randn(2, 3, 96, 96))
    assert len(pages) == 2 and pages[0].width == 8 * 224 + 9 * 6
    page = torch.from_numpy(np.array(pages[0])).float()[6:230]  # (224, width, 3)
    red = (page[:, :230] - torch.tensor([255.0, 32, 32])).abs().amax(2) < 60
    assert red.sum() > 100, "the object box is drawn in red on the first panel"
    mean = (page[:, 5 * 230 + 6 : 6 * 230] - torch.tensor([123.7, 116.3, 103.5])).abs().amax(2) < 4
    assert mean.float().mean() > 0.005, "erased pixels have the mean colour"


def test_nearest_and_antialiased_reduction_differ():
    images = torch.randn(1, 3, 96, 96)
    model, recipe = tiny(stages="a")
    other = vit_fgvc.MultiStageViT(replace(recipe, full_resize="nearest"), 5)
    other.load_state_dict(model.state_dict())
    passed = F.interpolate(images, (48, 48))
    with torch.no_grad():
        assert torch.allclose(other.eval()(images), other.head(other.norm(other.encoder.features(passed)[:, 0])), atol=1e-6)
        assert not torch.allclose(model.eval()(images), other(images), atol=1e-4)


# ------------------------------------------------------------------------------------------------ recipes, groups, weights, errors


def test_sec3_recipes_hold_the_authors_numbers():
    cub, dogs, cars, aircraft = (RECIPES[k] for k in ("cub", "dogs", "cars", "aircraft"))
    for r, size, batch, epochs, area, least in ((cub, 448, 20, 10, 64**2, 0.75), (dogs, 448, 16, 6, 64**2, 0.75), (cars, 512, 16, 56, 73**2, 0.7), (aircraft, 786, 16, 20, 128**2, 0.75)):
        assert r.image_size == (size, size) and r.encoder_size == 384 and r.batch_size == batch and r.epochs == epochs == sum(r.phases)
        assert round(r.min_object_area * size**2) == area and round(r.fallback * size) == 384 and r.crop_area == (least, 1.0)
        assert r.resize == (size + math.ceil(size * 0.14 / 8) * 8,) * 2 and r.crop == "resized" and (r.rotate, r.zoom, r.affine_prob) == (10, (1.0, 1.1), 0.75)
        assert (r.brightness, r.contrast, r.jitter_prob, r.label_smoothing, r.weight_decay, r.eps) == (0.2, 0.2, 0.75, 0.1, 0.01, 1e-6)
        assert r.schedule == "onecycle" and r.optimizer == "radam" and r.backbone == "vit_base" and r.parts == 2 and r.part_iou == 0.1 and not r.erase
        assert (r.erase_prob, r.erase_threshold) == (0.5, 0.7)
    assert [round(r.part_crop * 384) for r in (cub, cars, aircraft)] == [128, 170, 224] and [r.head for r in (cub, cars)] == ["mlp", "mlp_bn"]
    assert {"toy", "folder", "plant"} <= set(RECIPES) and RECIPES["toy"].weights == "none" and RECIPES["toy"].toy_preset == "birds-small"


@pytest.mark.parametrize("data, encoder, head", [("cub", [(2, 0), (4, 2e-5), (4, 2e-6)], [(2, 3e-3), (4, 1e-3), (4, 1e-4)]), ("dogs", [(2, 0), (4, 2e-5)], [(2, 3e-3), (4, 1e-3)]),
                                                 ("cars", [(24, 0), (32, 3.3e-5)], [(24, 1e-2), (32, 3.3e-3)]), ("aircraft", [(4, 0), (16, 4e-5)], [(4, 3e-3), (16, 1e-3)])])
def test_sec3_three_learning_rates_over_the_one_cycle_of_each_phase(data, encoder, head):
    recipe = RECIPES[data]
    with torch.device("meta"):
        model = vit_fgvc.MultiStageViT(recipe, 7)
    names, per_epoch, steps = {id(p): n for n, p in model.named_parameters()}, 10, 10 * recipe.epochs
    groups = vit_fgvc.param_groups(model, recipe)
    for group in groups:
        expected, begin = encoder if names[id(group["params"][0])].startswith("encoder.") else head, 0
        for length, peak in expected:
            middle, last = begin + length * per_epoch // 2, begin + length * per_epoch - 1
            assert common.lr_at(recipe, middle, steps, per_epoch, group) == pytest.approx(peak), "peak at half of the phase"
            assert common.lr_at(recipe, begin, steps, per_epoch, group) == pytest.approx(peak / 25), "each phase starts anew"
            assert common.lr_at(recipe, last, steps, per_epoch, group) <= peak * 0.03
            begin += length * per_epoch


@pytest.mark.parametrize("head", ["mlp", "mlp_bn"])
def test_param_groups_hold_each_parameter_once_and_decay_only_matrices(head):
    model, recipe = tiny(head=head, weight_decay=0.01)
    groups = vit_fgvc.param_groups(model, recipe)
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] == 0.01) == (p.ndim > 1 and not names[id(p)].endswith(("cls_token", "pos_embed"))), names[id(p)]


def test_tables_list_the_papers_rows_with_recipe_fields():
    values = {key: [row[2] for row in table.rows] for key, table in TABLES.items()}
    assert values["2"] == [91.7, 93.2] and values["3"] == [89.4, 91.0] and values["3-cars"] == [92.8, 94.3]
    assert values["ablation"][:4] == [93.07, 92.70, 90.40, 90.04] and len(values["ablation"]) == 8
    assert values["4"] == [None, None] and "not reproducible as printed" in TABLES["4"].title
    assert "iCassava 2019" in vit_fgvc.__doc__
    for table in TABLES.values():
        for _, overrides, _ in table.rows:
            vit_fgvc.build(replace(TINY, **overrides), 3)
            assert table.data in RECIPES


def test_pretrained_weights_fill_the_encoder_without_its_norm(tmp_path):
    """A plain ViT of 80 pixels for an encoder of 48: position embeddings are resized, its norm and head are dropped."""
    vit = common.vit("toy_vit", (80, 80), num_classes=9)
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    model, _ = tiny(weights=str(tmp_path / "vit.pth"))
    assert torch.equal(model.encoder.blocks[2].mlp.fc1.weight, vit.blocks[2].mlp.fc1.weight) and model.encoder.pos_embed.shape == (1, 37, 96)
    assert torch.equal(model.norm.weight, torch.ones(96)) and torch.equal(model.norm.bias, torch.zeros(96))


def test_weights_of_another_run_bring_norm_and_what_fits_of_the_head(tmp_path):
    first, recipe = tiny(encoder_size=64)
    torch.nn.init.normal_(first.norm.weight)
    torch.save(first.state_dict(), tmp_path / "run.pt")
    model = vit_fgvc.build(replace(recipe, encoder_size=48, weights=str(tmp_path / "run.pt")), 11)
    assert torch.equal(model.norm.weight, first.norm.weight) and torch.equal(model.head[0].weight, first.head[0].weight)
    assert model.head[2].weight.shape == (11, 96)


def test_default_weights_are_the_authors_at_384_pixels(monkeypatch):
    asked = []
    monkeypatch.setattr(common, "load_vit", lambda model, source: asked.append(source) or {})
    build = lambda **changes: vit_fgvc.build(replace(TINY, encoder_size=32, weights="default", **changes), 5)
    build(backbone="toy_vit")
    monkeypatch.setattr(common, "vit", lambda name, size, drop_path=0.0: common.VisionTransformer(size, dim=24, depth=1, heads=2))
    build(backbone="vit_base")
    assert asked[0] == "default" and asked[1].endswith("jx_vit_base_p16_384-83fb41ba.pth")


@pytest.mark.parametrize("changes, message", [({"stages": "ab", "fusion": "parts"}, "--fusion parts needs a stage that --stages ab leaves out; use full, object or mean"), ({"task": "reid"}, "use --method dcal"),
                                              ({"phases": (1, 2)}, "one value for each phase"), ({"parts": 0}, "--parts 0 is out of range; use 1 to 99"), ({"fallback": 0.0}, "0.01 to 1"), ({"encoder_size": 50}, "not divisible")])
def test_settings_that_cannot_work_are_errors_that_say_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
