"""The core of data.py: photos to tensors, batches, folders and ImageNet, and the toy birds. Photos are made here; nothing is fetched."""
import dataclasses
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

import common
import data

PLAIN = common.Recipe(image_size=(24, 24), crop="none", hflip=0.0, toy_train=2, toy_test=2)
GREY = np.full((24, 24, 3), 100, np.uint8)


def recipe(**changes):
    return dataclasses.replace(PLAIN, **changes)


def save(path, image=GREY, **options):
    """Write an array or PIL image to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def ramp(height=80, width=120):
    """Photo whose red is 2 x column and green is 2 x row, so that a pixel tells where it comes from; blue is 100."""
    y, x = np.mgrid[:height, :width]
    return np.stack([2 * x, 2 * y, np.full_like(x, 100)], 2).astype(np.uint8)


def items(image, settings, n=40, boxes=None, train=True):
    """The first n epochs of a split of one image held in memory -> list of uint8 (3, H, W) as float."""
    split = data.Split(["held/0"], [0], boxes=boxes, images=[image])
    photos = data.Photos(split, settings, train)
    return [photos[(epoch, 0) if train else 0][0].double() for epoch in range(n)]


def place(item):
    """Where in the ramp the item's first pixel (centre), and one step right and one down, come from: origin, right, down as (x, y)."""
    item = item.numpy()
    at = lambda r, c: item[:2, r, c] / 2
    H, W = item.shape[1:]
    return at(0, 0), (at(0, W - 1) - at(0, 0)) / (W - 1), (at(H - 1, 0) - at(0, 0)) / (H - 1)


# ------------------------------------------------------------------------------------------------ photos


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGB", (200, 60, 20), (200, 60, 20)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 51400, (200, 200, 200)),  # 200 x 257: a 16-bit photo is scaled, not clipped
        ("LA", (0, 0), (255, 255, 255)),  # transparent: white
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_a_photo_of_any_mode_becomes_rgb_over_white(tmp_path, mode, colour, expected):
    image = Image.new(mode, (8, 6), colour)
    if mode == "P":
        image.putpalette([10, 20, 30] + [0] * 765)
        expected = (10, 20, 30)
    opened = data.open_photo(save(tmp_path / "a.png", image))
    assert opened.mode == "RGB" and opened.size == (8, 6) and np.allclose(opened.getpixel((3, 3)), expected, atol=1)


def test_palettes_with_transparency_and_cmyk_and_a_png_called_jpg_are_read(tmp_path):
    palette = Image.new("P", (8, 6), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "clear.png", transparency=0)
    assert data.open_photo(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    cmyk = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 6), (0, 255, 255, 0)))
    assert np.allclose(data.open_photo(cmyk).getpixel((0, 0)), (255, 0, 0), atol=3)
    assert data.open_photo(save(tmp_path / "png.jpg", GREY, format="PNG")).getpixel((0, 0)) == (100, 100, 100)


def test_orientation_is_applied_to_own_photos_and_not_to_the_benchmarks(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright, the photo is 80 wide and 120 high
    path = save(tmp_path / "a.jpg", ramp(), exif=exif, quality=95)
    assert data.open_photo(path).size == (80, 120) and data.open_photo(path, upright=False).size == (120, 80)
    assert data.open_photo(path, draft=(20, 30)).size == (20, 30)
    for upright, size in ((False, [80, 120]), (True, [120, 80])):
        pixels, _, _, held = data.Photos(data.Split([str(path)], [0], upright=upright), recipe(image_size=(24, 24)), False)[0]
        assert held.tolist() == size
        across, down = pixels[0, 12, -1].double() - pixels[0, 12, 0], pixels[0, -1, 12].double() - pixels[0, 0, 12]
        assert (abs(across) > 150) != upright and (abs(down) > 150) == upright  # red follows the stored columns
    broken = save(tmp_path / "b.jpg", ramp(), exif=b"Exif\0\0rubbish")
    assert data.open_photo(broken).size == (120, 80)


def test_a_jpeg_is_drafted_only_as_far_as_both_sides_stay_long_enough(tmp_path):
    path = save(tmp_path / "a.jpg", ramp(160, 240))
    assert data.open_photo(path).size == (240, 160)
    assert data.open_photo(path, draft=(121, 40)).size == (240, 160)
    assert data.open_photo(path, draft=(120, 80)).size == (120, 80)
    assert data.open_photo(path, draft=(30, 30)).size == (60, 40)
    assert data.open_photo(save(tmp_path / "a.png", ramp(160, 240)), draft=(30, 30)).size == (240, 160)


def test_an_unreadable_photo_is_named(tmp_path):
    whole = save(tmp_path / "whole.jpg", ramp(200, 300)).read_bytes()
    for name, content in {"cut.jpg": whole[: len(whole) // 2], "text.jpg": b"no photo at all", "empty.png": b"", "cut.png": save(tmp_path / "p.png", ramp()).read_bytes()[:200]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a photo .*; replace or remove"):
            data.open_photo(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            data.Photos(data.Split([str(tmp_path / name)], [0]), PLAIN, True)[(0, 0)]
    with pytest.raises(FileNotFoundError, match="gone.jpg: no such photo"):
        data.open_photo(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="cannot be read"):
        data.open_photo(tmp_path)


# ------------------------------------------------------------------------------------------------ transforms


def full(image, settings, resample=Image.Resampling.BILINEAR):
    """The photo resized as a whole, the long way round."""
    return np.asarray(Image.fromarray(image).resize(settings.resize[::-1], resample), np.float64).transpose(2, 0, 1)


def test_the_test_transform_is_resize_then_centre_crop_to_a_grey_level():
    image = np.asarray(Image.fromarray(data.draw_bird("birds", "train", 0, 128).image).resize((150, 110)))
    for size, resize in (((24, 32), (41, 53)), ((32, 32), (32, 32)), ((64, 48), (300, 200))):
        for name, resample in data.FILTERS.items():
            settings = recipe(image_size=size, resize=resize, interpolation=name)
            got = data.prepare(Image.fromarray(image), settings)
            want = torchvision.transforms.functional.center_crop(torch.from_numpy(full(image, settings, resample)), list(size))
            assert got.dtype == torch.uint8 and got.shape == (3, *size)
            gap = (got.double() - want).abs()
            assert gap.max() <= 1 if name != "nearest" else (gap == 0).double().mean() > 0.9  # nearest: ties may round to the other neighbour
    square = data.prepare(Image.fromarray(image), recipe(image_size=(32, 40)))  # resize 0,0
    assert np.abs(square.double().numpy() - full(image, recipe(resize=(32, 40)))).max() == 0


def test_items_of_photos_are_image_label_index_and_size_and_testing_equals_prepare(tmp_path):
    paths = [str(save(tmp_path / f"{i}.png", ramp(60 + i, 90))) for i in range(3)]
    settings = recipe(resize=(40, 40), hflip=1.0, crop="random", brightness=0.5, erasing=1.0, rotate=90.0)  # none of it touches testing
    photos = data.Photos(data.Split(paths, [5, 6, 7]), settings, False)
    pixels, label, index, size = photos[2]
    assert len(photos) == 3 and (label, index, size.tolist()) == (7, 2, [62, 90]) and torch.equal(pixels, data.prepare(data.open_photo(paths[2]), settings))
    assert torch.equal(photos[0][0], photos[0][0])
    images, labels, indices, sizes = next(iter(DataLoader(photos, batch_size=3)))
    assert images.shape == (3, 3, 24, 24) and images.dtype == torch.uint8 and labels.tolist() == [5, 6, 7] and indices.tolist() == [0, 1, 2] and sizes.shape == (3, 2)


def test_drafted_photos_give_the_same_input_as_whole_ones(tmp_path):
    bird = data.draw_bird("birds", "train", 3, 448).image
    jpeg, png = save(tmp_path / "a.jpg", bird, quality=98, subsampling=0), tmp_path / "a.png"
    save(png, Image.open(jpeg))
    for settings in (recipe(image_size=(100, 100), resize=(120, 120), crop="random"), recipe(image_size=(80, 80), crop="resized", crop_area=(0.3, 1.0))):
        for train in (False, True):
            views = [data.Photos(data.Split([str(p)], [0]), settings, train)[0] for p in (jpeg, png)]
            assert (views[0][0].double() - views[1][0]).abs().mean() < 1 and views[0][3].tolist() == [448, 448]


def test_random_crops_are_cuts_of_the_resized_photo_at_every_place():
    settings = recipe(crop="random", resize=(26, 28))
    whole, seen = full(ramp(), settings), set()
    for item in items(ramp(), settings, 60):
        gaps = {(t, l): np.abs(whole[:, t : t + 24, l : l + 24] - item.numpy()).max() for t in range(3) for l in range(5)}
        assert min(gaps.values()) <= 1
        seen.add(min(gaps, key=gaps.get))
    assert len(seen) == 15


def test_padding_moves_the_crop_over_the_edge_by_at_most_pad_and_is_black():
    seen = set()
    for item in items(np.full((50, 50, 3), 200, np.uint8), recipe(crop="random", pad=3), 80):
        black = item[0] == 0
        assert ((item == 200) | black).all()
        top, left = int(black[:, 12].sum()), int(black[12].sum())
        seen.add((top if black[0, 12] else -top, left if black[12, 0] else -left))
    assert {t for t, _ in seen} == {l for _, l in seen} == set(range(-3, 4))


def test_resized_crops_have_the_area_and_aspect_of_the_recipe_and_go_everywhere():
    areas, ratios, corners = [], [], []
    settings = recipe(crop="resized", crop_area=(0.2, 0.5), crop_ratio=(0.8, 1.6))
    for item in items(ramp(), settings, 150):
        origin, right, down = place(item)
        w, h = right[0] * 24, down[1] * 24
        areas.append(w * h / (80 * 120))
        ratios.append(w / h)
        corners.append(origin - (right[0] / 2, down[1] / 2) + 0.5)
    assert 0.18 < min(areas) < 0.25 and 0.45 < max(areas) < 0.53
    assert 0.75 < min(ratios) < 0.9 and 1.4 < max(ratios) < 1.7
    assert np.min(corners, 0).max() < 4 and np.max(corners, 0)[0] > 50 and np.max(corners, 0)[1] > 25
    wide = [place(i) for i in items(np.ascontiguousarray(ramp(20, 120)), recipe(crop="resized", crop_area=(0.9, 1.0), crop_ratio=(1.0, 1.0)), 5)]
    assert all(abs(right[0] * 24 - 20) < 1.5 and abs(origin[0] - 50) < 2 for origin, right, _ in wide)  # no such crop exists: the centred square


def test_crop_none_trains_on_the_test_view():
    settings = recipe(resize=(30, 30))
    assert all(torch.equal(item, items(ramp(), settings, 1, train=False)[0]) for item in items(ramp(), settings, 5))


def test_each_interpolation_is_pillows_and_random_draws_all_six_in_training_only():
    image = data.draw_bird("birds", "train", 0, 96).image
    for name, resample in data.FILTERS.items():
        assert np.abs(items(image, recipe(interpolation=name), 1)[0].numpy() - full(image, recipe(resize=(24, 24)), resample)).max() == 0
    of_filter = {r: full(image, recipe(resize=(24, 24)), r).tobytes() for r in map(Image.Resampling, range(6))}
    drawn = {item.numpy().tobytes() for item in items(image, recipe(interpolation="random"), 60)}
    assert drawn == set(of_filter.values()) and len(drawn) == 6
    assert items(image, recipe(interpolation="random"), 1, train=False)[0].numpy().tobytes() == of_filter[Image.Resampling.BILINEAR]


def test_hflip_mirrors_with_its_probability():
    plain = items(ramp(), PLAIN, 1)[0]
    assert all(torch.equal(item, plain.flip(2)) for item in items(ramp(), recipe(hflip=1.0), 3))
    share = np.mean([torch.equal(item, plain.flip(2)) for item in items(ramp(), recipe(hflip=0.3), 300)])
    assert 0.2 < share < 0.4


def motion(settings, n=60):
    """Angle (degrees), zoom and shift (shares of the side) of each item, read off the middle of a ramp."""
    found = []
    for item in items(ramp(120, 120), recipe(image_size=(120, 120), **settings), n):
        middle = item[:2, 60, 60].numpy() / 2
        right = (item[:2, 60, 80] - item[:2, 60, 40]).numpy() / 80  # of the source, for one pixel to the right
        found.append((math.degrees(math.atan2(right[1], right[0])), 1 / math.hypot(*right), *((60 - middle) / 120)))
    return np.array(found)


def test_rotation_translation_and_zoom_stay_in_their_ranges_and_fill_them():
    angle, zoom, across, down = motion({"rotate": 20.0}).T
    assert -21 < angle.min() < -15 and 15 < angle.max() < 21 and np.abs(zoom - 1).max() < 0.05 and np.abs(across).max() < 0.02
    angle, zoom, across, down = motion({"translate": 0.1}).T
    assert all(-0.11 < v.min() < -0.07 and 0.07 < v.max() < 0.11 for v in (across, down)) and np.abs(angle).max() < 1 and np.abs(zoom - 1).max() < 0.05
    angle, zoom, across, down = motion({"zoom": (1.2, 1.5)}).T
    assert 1.15 < zoom.min() < 1.28 and 1.42 < zoom.max() < 1.55 and np.abs(angle).max() < 1
    moved = np.abs(motion({"rotate": 20.0, "affine_prob": 0.25}, 200)[:, 0]) > 0.5
    assert 0.15 < moved.mean() < 0.35
    corner = items(np.full((24, 24, 3), 200, np.uint8), recipe(rotate=45.0), 20)
    assert min(float(item[0, 0, 0]) for item in corner) == 0  # what comes in from outside is black


def spread(image, settings, measure, n=150):
    values = np.array([measure(item) for item in items(image, settings, n)])
    return values.min(), values.max()


def test_brightness_contrast_saturation_and_hue_stay_in_their_ranges_and_fill_them():
    two = np.where(np.arange(24)[:, None, None] < 12, 80, 120).repeat(24, 1).repeat(3, 2).astype(np.uint8)
    low, high = spread(two, recipe(brightness=0.3), lambda i: float(i.mean()) / 100)
    assert 0.68 < low < 0.76 and 1.24 < high < 1.32
    low, high = spread(two, recipe(contrast=0.5), lambda i: float(i[0, -1, 0] - i[0, 0, 0]) / 40)
    assert 0.45 < low < 0.6 and 1.4 < high < 1.55
    red = np.zeros((24, 24, 3), np.uint8) + np.array([160, 100, 100], np.uint8)
    low, high = spread(red, recipe(saturation=0.4), lambda i: float(i[0, 0, 0] - i[1, 0, 0]) / 60)
    assert 0.55 < low < 0.68 and 1.32 < high < 1.45
    hue = lambda i: (Image.new("RGB", (1, 1), tuple(int(v) for v in i[:, 0, 0])).convert("HSV").getpixel((0, 0))[0] / 255 + 0.5) % 1 - 0.5
    low, high = spread(red, recipe(hue=0.2), hue)
    assert -0.21 < low < -0.16 and 0.16 < high < 0.21
    assert spread(red, recipe(brightness=5.0), lambda i: float(i.mean()))[0] == 0  # a factor never falls below zero


def test_jitter_comes_with_its_probability_and_in_random_order():
    changed = [not torch.equal(item, items(GREY, PLAIN, 1)[0]) for item in items(GREY, recipe(brightness=0.3, jitter_prob=0.3), 200)]
    assert 0.2 < np.mean(changed) < 0.4
    log, orders = [], set()
    photos = data.Photos(data.Split(["held/0"], [0], images=[GREY]), recipe(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5), True)
    with pytest.MonkeyPatch.context() as patch:
        for f in (data.TF.adjust_brightness, data.TF.adjust_contrast, data.TF.adjust_saturation, data.TF.adjust_hue):
            patch.setattr(data.TF, f.__name__, lambda image, factor, f=f: (log.append(f.__name__), f(image, factor))[1])
        for epoch in range(80):
            photos[(epoch, 0)]
            orders.add(tuple(log[4 * epoch :]))
    assert all(len(set(order)) == 4 for order in orders) and len(orders) > 15  # of 24


def test_erasing_fills_a_rectangle_with_noise_of_unit_variance_in_the_normalised_space():
    base = np.full((64, 64, 3), 255, np.uint8)
    for how in ("imagenet", "half"):
        values, areas, ratios, erased = [], [], [], 0
        for item in items(base, recipe(image_size=(64, 64), erasing=0.7, normalize=how), 300):
            rows, columns = np.nonzero((item != 255).any(0).numpy())
            if len(rows):
                erased += 1
                h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
                areas.append(h * w / 64**2)
                ratios.append(h / w)
                inside = item[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                values.append(common.normalize(inside[None], how)[0].flatten(1))
        values = torch.cat(values, 1)
        assert 0.6 < erased / 300 < 0.8 and 0.015 < min(areas) < 0.05 and 0.28 < max(areas) < 0.36 and min(ratios) < 0.5 and max(ratios) > 2
        assert values.mean(1).abs().max() < 0.08  # clipped to a byte, so a little less than 1
        assert (values.std(1) - (0.95 if how == "imagenet" else 0.68)).abs().max() < 0.1
    assert data.NOISE == common.MEAN_STD


def test_boxes_crop_the_photo_and_are_clipped_to_it():
    box = np.array([[30, 20, 150, 60]], np.float32)  # reaches 30 pixels over the right edge
    for train in (False, True):
        origin, right, down = place(items(ramp(), recipe(boxes=True), 1, boxes=box, train=train)[0])
        assert abs(right[0] * 24 - 90) < 3 and abs(down[1] * 24 - 40) < 2 and np.abs(origin - (30 + 90 / 48, 20 + 40 / 48)).max() < 1
    assert data.object_region((30, 20, 150, 60), (80, 120)) == (30, 20, 120, 60)
    inside = [place(i) for i in items(ramp(), recipe(boxes=True, crop="resized", crop_area=(0.1, 0.9)), 40, boxes=box)]
    assert all(origin[0] >= 29 and origin[1] >= 19 and (origin + right * 23 + down * 23 <= (121, 61)).all() for origin, right, down in inside)
    with pytest.raises(ValueError, match="outside its photo of 120 x 80"):
        data.object_region((130, 0, 150, 20), (80, 120))
    with pytest.raises(ValueError, match="--boxes: this dataset has no object boxes"):
        data.Photos(data.Split(["a"], [0]), recipe(boxes=True), True)


@pytest.mark.parametrize("share, margin", [(0.6, 0.15), (0.5, 0.15), (0.45, 0.2), (0.35, 0.3), (0.25, 0.5), (0.15, 1.0), (0.05, 2.0)])
def test_fmow_boxes_get_a_margin_that_grows_as_they_get_small(share, margin):
    side = share * 1000
    x1, y1, x2, y2 = data.object_region((400, 300, 400 + side, 300 + 2 * side), (4000, 1000), context=True)
    assert (x1, x2) == (max(0, 400 - margin * side / 2), min(1000, 400 + side + margin * side / 2))
    tall = next(m for least, m in ((0.5, 0.15), (0.4, 0.2), (0.3, 0.3), (0.2, 0.5), (0.1, 1.0), (0, 2.0)) if 2 * side / 4000 >= least)
    assert (y1, y2) == (max(0, 300 - tall * side), 300 + 2 * side + tall * side)
    split = data.Split(["x"], [0], boxes=np.array([[40, 30, 50, 40]], np.float32), images=[ramp()], context=True)
    assert data.Photos(split, recipe(boxes=True), False).region(0, (80, 120)) == (30, 25, 60, 45)


@pytest.mark.parametrize("settings", [{}, {"resize": (40, 60)}, {"resize": (30, 30), "boxes": True}, {"image_size": (20, 32), "resize": (64, 48)}])
def test_to_input_follows_the_pixels(settings):
    """A red rectangle of the photo must come out where to_input says."""
    settings = recipe(**settings)
    H, W = settings.image_size
    image = np.zeros((120, 200, 3), np.uint8)
    x1, y1, x2, y2 = 85, 45, 115, 75
    image[y1:y2, x1:x2] = 255
    split = data.Split(["held/0"], [0], boxes=np.array([[60, 20, 140, 100]], np.float32), images=[image])
    photos = data.Photos(split, settings, False)
    seen = photos[0][0][0].double() / 255
    box = data.to_input(np.array([[x1, y1, x2, y2]]), photos[0][3], settings, photos.region(0, photos[0][3]))[0]
    rows, columns = seen.amax(1), seen.amax(0)
    assert abs(float(rows.sum()) - (box[3] - box[1])) < 0.6 and abs(float(columns.sum()) - (box[2] - box[0])) < 0.6  # extents, from antialiased edges
    assert abs(float((rows * (torch.arange(H) + 0.5)).sum() / rows.sum()) - (box[1] + box[3]) / 2) < 0.3
    assert abs(float((columns * (torch.arange(W) + 0.5)).sum() / columns.sum()) - (box[0] + box[2]) / 2) < 0.3


def test_a_resize_below_the_image_size_is_refused_before_anything_is_read():
    for use in (lambda r: data.load("toy", None, r), lambda r: data.Photos(data.Split(["gone.jpg"], [0]), r, True), lambda r: data.prepare(Image.fromarray(GREY), r)):
        with pytest.raises(ValueError, match="--resize 20,30 is smaller than --image-size 24,24; give at least"):
            use(recipe(resize=(20, 30)))


EVERYTHING = dict(crop="resized", interpolation="random", hflip=0.5, rotate=10.0, translate=0.1, zoom=(0.9, 1.1), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, erasing=0.5)


def test_a_training_item_is_a_function_of_seed_epoch_and_index_whatever_the_workers():
    split = data.load("toy", None, recipe(toy_train=1, **EVERYTHING)).train
    photos = data.Photos(split, recipe(**EVERYTHING), True, seed=3)
    batches = [[(epoch, i) for i in range(start, start + 4)] for epoch in (0, 7) for start in (0, 4)]
    torch.manual_seed(0)
    alone = [batch[0] for batch in DataLoader(photos, batch_sampler=batches)]
    torch.manual_seed(99)  # neither torch's global random state nor the number of workers matters, nor what was drawn before
    with_workers = [batch[0] for batch in DataLoader(photos, batch_sampler=batches[::-1], num_workers=2)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, with_workers))
    assert not torch.equal(alone[0], alone[2])  # another epoch
    assert not torch.equal(photos[(0, 0)][0], data.Photos(split, recipe(**EVERYTHING), True, seed=4)[(0, 0)][0])  # another seed
    twins = data.Photos(data.Split(["held/0", "held/1"], [0, 0], images=split.images[:1] * 2), recipe(**EVERYTHING), True)
    assert not torch.equal(twins[(0, 0)][0], twins[(0, 1)][0])  # another index
    state = torch.get_rng_state()
    photos[(0, 1)]
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ batches


def test_an_epoch_has_each_image_once_in_an_order_given_by_seed_and_epoch():
    flat = lambda *args: [key for batch in data.EpochBatches(*args) for key in batch]
    keys = flat(20, 5, 2, 0)
    assert {e for e, _ in keys} == {2} and sorted(i for _, i in keys) == list(range(20)) and keys != sorted(keys) and keys == flat(20, 5, 2, 0)
    assert [i for _, i in keys] != [i for _, i in flat(20, 5, 3, 0)] and keys != flat(20, 5, 2, 1)
    assert [len(b) for b in data.EpochBatches(23, 5, 0, 0)] == [5] * 4 and len(data.EpochBatches(23, 5, 0, 0)) == 4  # the short one is dropped ...
    assert [len(b) for b in data.EpochBatches(3, 5, 0, 0)] == [3] and len(data.EpochBatches(3, 5, 0, 0)) == 1  # ... unless it is the only one


def test_ranks_share_each_global_batch_and_a_start_goes_on_where_it_was():
    whole = list(data.EpochBatches(50, 12, 4, 9))
    for world in (1, 2, 3, 4):
        parts = [list(data.EpochBatches(50, 12, 4, 9, rank, world)) for rank in range(world)]
        assert [sum(slices, []) for slices in zip(*parts)] == whole and all(len(b) == 12 // world for part in parts for b in part)
    for start in range(6):
        rest = data.EpochBatches(50, 12, 4, 9, start=start)
        assert list(rest) == whole[start:] and len(rest) == len(whole[start:])
    for n, batch, world in ((50, 10, 4), (1, 4, 2), (50, 0, 1)):
        with pytest.raises(ValueError, match="--batch-size"):
            data.EpochBatches(n, batch, 0, 0, 0, world)


# ------------------------------------------------------------------------------------------------ load, folder, ImageNet


def test_unknown_datasets_and_roots_are_told_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--data cup: no such dataset; choose one of toy, folder, imagenet"):
        data.load("cup", None, PLAIN)
    with pytest.raises(ValueError, match="--data folder needs a folder; add --root"):
        data.load("folder", None, PLAIN)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; give"):
        data.load("folder", tmp_path / "nowhere", PLAIN)
    with pytest.raises(ValueError, match="a.png: is a file; give the folder"):
        data.load("folder", save(tmp_path / "a.png"), PLAIN)


@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "val"), ("train", "validation"), ("training", "VALID")])
def test_a_folder_has_train_and_test_under_their_usual_names(tmp_path, train, test):
    for path in (f"{train}/b finch/2.JPG", f"{train}/b finch/1.png", f"{train}/a/x.WebP", f"{train}/a/deep/y.bmp", f"{test}/b finch/3.tif"):
        save(tmp_path / path)
    (tmp_path / train / "a" / "notes.txt").write_text("no photo")
    (tmp_path / train / "a" / "._x.png").write_text("of a Mac")
    (tmp_path / train / ".git").mkdir()
    splits = data.load("folder", str(tmp_path), PLAIN)
    assert splits.classes == ["a", "b finch"] and splits.val is None
    assert [Path(p).name for p in splits.train.paths] == ["y.bmp", "x.WebP", "1.png", "2.JPG"] and splits.train.labels == [0, 0, 1, 1]
    assert splits.test.labels == [1] and splits.train.upright and splits.note.startswith("4 train, 1 test images of 2 classes")  # a class may lack test photos
    assert data.Photos(splits.train, PLAIN, True)[(0, 3)][1] == 1


def test_a_folder_with_test_and_val_has_both(tmp_path):
    for path in ("train/a/1.png", "train/b/1.png", "val/b/1.png", "test/a/1.png", "test/b/1.png"):
        save(tmp_path / path)
    splits = data.load("folder", tmp_path, PLAIN)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2, 1, 2) and splits.val.labels == [1]
    with pytest.raises(ValueError, match="has its own validation"):
        data.load("folder", tmp_path, recipe(val_fraction=0.5))


def test_class_folders_alone_need_a_fraction_and_are_cut_by_class(tmp_path):
    for name, n in (("a", 10), ("b", 5), ("c", 1)):
        for i in range(n):
            save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match="no test or val folder; put .* or add --val-fraction"):
        data.load("folder", tmp_path, PLAIN)
    splits = data.load("folder", tmp_path, recipe(val_fraction=0.2))
    assert [splits.test.labels.count(c) for c in range(3)] == [2, 1, 0] and [splits.train.labels.count(c) for c in range(3)] == [8, 4, 1]
    assert splits.val is None and not set(splits.train.paths) & set(splits.test.paths) and "cut from train" in splits.note
    held = {p for p in splits.test.paths if "/a/" in p}
    save(tmp_path / "a" / "another.png")
    after = {p for p in data.load("folder", tmp_path, recipe(val_fraction=0.2)).test.paths if "/a/" in p}
    assert len(held & after) >= 1 and {Path(p).name for p in held} == {"0.png", "6.png"}  # by name: the same on every machine


def test_a_validation_split_is_cut_from_train_by_class_and_never_from_test():
    whole = data.load("toy", None, recipe(toy_train=10))
    splits = data.load("toy", None, recipe(toy_train=10, val_fraction=0.3))
    assert [splits.val.labels.count(c) for c in range(16)] == [3] * 16 and [splits.train.labels.count(c) for c in range(16)] == [7] * 16
    assert splits.test.paths == whole.test.paths and sorted(splits.train.paths + splits.val.paths) == sorted(whole.train.paths)
    assert splits.val.paths == data.load("toy", None, recipe(toy_train=10, val_fraction=0.3)).val.paths
    at = whole.train.paths.index(splits.val.paths[5])  # every list is cut alike
    assert np.array_equal(splits.val.images[5], whole.train.images[at]) and np.array_equal(splits.val.parts[5], whole.train.parts[at]) and np.array_equal(splits.val.boxes[5], whole.train.boxes[at])


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    cases = {
        "nothing": ([], "holds no class folders"),
        "no_classes": (["train/1.png", "test/1.png"], "train holds no class folders"),
        "one": (["train/a/1.png", "test/a/1.png"], "at least two classes"),
        "no_train": (["test/a/1.png", "test/b/1.png"], "has test and no train"),
        "surplus": (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "has 1 classes that train has not: c"),
    }
    for name, (paths, message) in cases.items():
        (tmp_path / name).mkdir()
        for path in paths:
            save(tmp_path / name / path)
        with pytest.raises(ValueError, match=message):
            data.load("folder", tmp_path / name, PLAIN)
    (tmp_path / "surplus" / "train" / "c").mkdir()
    with pytest.raises(ValueError, match="c holds no photos .*; add some or remove the folder"):
        data.load("folder", tmp_path / "surplus", PLAIN)


def wnid_tree(root, wnids, flat=False):
    for k, wnid in enumerate(wnids):
        save(root / f"train/{wnid}/{wnid}_1.JPEG")
        save(root / (f"val/ILSVRC2012_val_{k:08d}.JPEG" if flat else f"val/{wnid}/ILSVRC2012_val_{k:08d}.JPEG"))


def test_imagenet_is_folders_of_wnids_with_readable_names(tmp_path):
    wnid_tree(tmp_path, ["n01443537", "n01440764"])
    save(tmp_path / "train/n01440764/cmyk.JPEG", Image.new("CMYK", (9, 9)))
    save(tmp_path / "train/n01440764/png.JPEG", GREY, format="PNG")
    splits = data.load("imagenet", tmp_path, PLAIN)
    assert splits.classes == ["n01440764", "n01443537"] and splits.train.labels == [0, 0, 0, 1] and splits.test.labels == [0, 1] and not splits.train.upright
    assert all(data.Photos(splits.train, PLAIN, False)[i][0].shape == (3, 24, 24) for i in range(4))
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    assert data.load("imagenet", tmp_path, PLAIN).classes == ["tench", "goldfish"]


def test_imagenet_as_kaggle_packs_it(tmp_path):
    base = tmp_path / "ILSVRC/Data/CLS-LOC"
    wnid_tree(base, ["n01440764", "n01443537"], flat=True)
    with pytest.raises(FileNotFoundError, match="LOC_val_solution.csv is not there; put"):
        data.load("imagenet", tmp_path, PLAIN)
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4 n01440764 5 6 7 8 \nILSVRC2012_val_00000000,n01443537 1 2 3 4 \n")
    for root in (tmp_path, base):
        splits = data.load("imagenet", root, PLAIN)
        assert [(Path(p).stem[-1], l) for p, l in zip(splits.test.paths, splits.test.labels)] == [("0", 1), ("1", 0)]
    save(base / "val/ILSVRC2012_val_00000009.JPEG")
    with pytest.raises(ValueError, match="ILSVRC2012_val_00000009.JPEG: no label in"):
        data.load("imagenet", tmp_path, PLAIN)


def test_all_thousand_wnids_get_torchvisions_names_and_a_missing_part_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_img_train.tar"):
        data.load("imagenet", tmp_path, PLAIN)
    for k in range(1000):
        for part in ("train", "val"):
            folder = tmp_path / part / f"n{k:08d}"
            folder.mkdir(parents=True)
            (folder / "x.JPEG").touch()
    classes = data.load("imagenet", tmp_path, PLAIN).classes
    assert classes[0] == "tench" and classes[1] == "goldfish" and classes[999] == "toilet tissue" and len(classes) == 1000


# ------------------------------------------------------------------------------------------------ toy birds

STORED = """
birds 4680323b4aa7a8fa 0 4.5 19.2 84.8 72.0 032020
birds 34c323d09360ea69 1 4.9 15.2 60.4 47.8 220302
birds-easy 70a139eaf1dce3d4 5 10.7 24.1 119.9 98.1 320312
birds-small f37a305fe422fd8a 3 8.9 16.8 117.2 83.0 113230
birds-pretrain ff35775e24e45d25 0 8.1 3.5 58.3 53.9 031003
"""  # Pillow before 11.2 fills the tips of polygons differently
SCRIPT = """
import runpy, sys
sys.argv = ["data.py", sys.argv[1]]
draw_bird = runpy.run_path("data.py", run_name="__main__")["draw_bird"]
sys.path.insert(0, "tests")
import test_data
print(test_data.fingerprints(draw_bird))
"""


def fingerprints(draw_bird):
    """A line for each of some birds: hash of its pixels, class, object box, values."""
    lines = []
    for preset, split, index, size in (("birds", "train", 0, 96), ("birds", "test", 17, 64), ("birds-easy", "train", 5, 128), ("birds-small", "test", 3, 160), ("birds-pretrain", "train", 1000, 64)):
        bird = draw_bird(preset, split, index, size)
        lines.append(f"{preset} {hashlib.sha256(bird.image.tobytes()).hexdigest()[:16]} {bird.label} {' '.join(f'{v:.1f}' for v in bird.object_box)} {''.join(map(str, bird.values.values()))}")
    return "\n".join(lines)


def test_toy_birds_are_the_same_pixels_in_every_process_and_as_stored_and_data_py_draws_its_sheet(tmp_path):
    assert fingerprints(data.draw_bird) == STORED.strip()
    sheet, here = tmp_path / "new" / "birds.png", Path(data.__file__).parent
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(sheet)], env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(here)}, cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"wrote {sheet}\n{STORED.strip()}"
    assert min(Image.open(sheet).size) > 800


def test_the_presets_are_those_that_were_measured():
    sizes = {name: (p.classes, p.distance, p.part_scale, p.clutter, p.blobs, p.length, p.train, p.test, p.seed) for name, p in data.PRESETS.items()}
    assert sizes == {
        "birds": (16, 1, 1.0, 8, 6, (0.72, 0.95), 15, 30, 0),
        "birds-easy": (8, 2, 1.3, 4, 3, (0.72, 0.95), 150, 60, 0),
        "birds-small": (8, 2, 1.3, 4, 3, (0.45, 0.70), 150, 60, 0),
        "birds-pretrain": (8, 2, 1.3, 4, 3, (0.72, 0.95), 150, 60, 5),
    }
    assert set(data.PRESETS) == set(next(f for f in dataclasses.fields(common.Recipe) if f.name == "toy_preset").metadata["choices"])


def test_toy_splits_have_the_counts_the_size_and_the_truth_of_the_recipe():
    splits = data.load("toy", None, recipe(toy_train=0, toy_test=1, image_size=(16, 20)))
    assert len(splits.train) == 16 * 15 and len(splits.test) == 16 and len(splits.classes) == len(set(splits.classes)) == 16
    assert splits.train.images[0].shape == (20, 20, 3) and splits.train.images[0].dtype == np.uint8  # the longest side
    assert splits.train.boxes.shape == (240, 4) and splits.train.parts.shape == (240, 6, 4) and splits.train.paths[17] == "birds/train/17"
    assert splits.train.part_names == ("beak", "eye", "crest", "wing", "breast", "tail") and splits.train.signature == (True, True, False, True, True, False)
    assert data.load("toy", None, recipe(resize=(36, 30))).train.images[0].shape == (36, 36, 3)
    easy = data.load("toy", None, recipe(toy_preset="birds-easy"))
    assert len(easy.train) == len(easy.test) == 16 and len(easy.classes) == 8
    bird = data.draw_bird("birds-easy", "test", 5, 24)
    assert np.array_equal(easy.test.images[5], bird.image) and np.array_equal(easy.test.parts[5], bird.part_boxes) and easy.test.labels[5] == bird.label == 5


def test_toy_splits_and_presets_share_no_image():
    seen = [data.draw_bird(preset, split, i, 32).image.tobytes() for preset in data.PRESETS for split in ("train", "test") for i in range(40)]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", list(data.PRESETS))
def test_class_codes_are_at_least_distance_apart_with_relatives_at_exactly_that_and_balanced_values(name):
    preset = data.PRESETS[name]
    codes = data.class_codes(preset)
    apart = (codes[:, None] != codes[None]).sum(2)
    np.fill_diagonal(apart, 99)
    assert codes.shape == (preset.classes, 4) and apart.min() == preset.distance and (apart.min(1) == preset.distance).all()
    assert all((np.bincount(codes[:, k], minlength=4) == preset.classes // 4).all() for k in range(4))


@pytest.mark.parametrize("classes, distance", [(40, 1), (40, 2), (8, 3)])
def test_class_codes_keep_their_distance_when_many_classes_crowd(classes, distance):
    codes = data.class_codes(data.Preset(classes=classes, distance=distance))
    apart = (codes[:, None] != codes[None]).sum(2)
    assert (apart[~np.eye(classes, dtype=bool)] >= distance).all()
    with pytest.raises(AssertionError, match="no 17 codes that differ in 3 parts"):
        data.class_codes(data.Preset(classes=17, distance=3))


def test_signature_parts_carry_the_class_and_decoys_do_not():
    birds = [data.draw_bird("birds", "train", i, 16) for i in range(16 * 24)]
    codes = data.class_codes(data.PRESETS["birds"])
    for i, bird in enumerate(birds):
        assert bird.label == i % 16 and [bird.values[p] for p in data.SIGNATURE] == codes[bird.label].tolist()
        assert [p for p, carries in zip(data.PARTS, bird.signature) if carries] == list(data.SIGNATURE)
    for part in ("crest", "tail"):
        counts = np.bincount([b.values[part] for b in birds], minlength=4)
        assert counts.min() > 0.2 * len(birds)
        assert all(len({b.values[part] for b in birds if b.label == c}) >= 3 for c in range(16))  # also within each class


@pytest.mark.parametrize("preset, size", [("birds", 96), ("birds-easy", 64), ("birds-small", 128)])
def test_a_swapped_part_changes_pixels_inside_its_box_only(preset, size):
    for index in range(12):
        bird = data.draw_bird(preset, "test", index, size)
        for k, part in enumerate(data.PARTS):
            for value in range(4):
                other = data.draw_bird(preset, "test", index, size, {part: value})
                changed = (other.image != bird.image).any(2)
                assert other.label == bird.label and np.array_equal(other.part_boxes, bird.part_boxes) and other.values == bird.values | {part: value}
                x1, y1, x2, y2 = bird.part_boxes[k]
                inside = np.zeros_like(changed)
                inside[max(0, math.floor(y1 - 2)) : math.ceil(y2 + 2), max(0, math.floor(x1 - 2)) : math.ceil(x2 + 2)] = True
                assert not (changed & ~inside).any(), (part, value, index)
                assert changed.any() == (value != bird.values[part]), (part, value, index)
        bare = data.draw_bird(preset, "test", index, size, {"crest": 0})
        assert (bare.object_box[:2] >= bird.object_box[:2]).all() and (bare.object_box[2:] <= bird.object_box[2:]).all()


def test_a_scene_is_the_same_at_every_size():
    small, large = (data.draw_bird("birds", "train", 11, s) for s in (96, 288))
    assert np.allclose(large.part_boxes, 3 * small.part_boxes, atol=1e-2) and np.allclose(large.object_box, 3 * small.object_box, atol=1e-2) and small.values == large.values
    assert np.abs(np.asarray(Image.fromarray(large.image).reduce(3), float) - small.image).mean() < 6


def test_boxes_lie_where_the_bird_is():
    length = {}
    for preset in ("birds", "birds-easy", "birds-small"):
        boxes = [data.draw_bird(preset, "test", i, 32) for i in range(60)]
        length[preset] = np.array([max(b.object_box[2] - b.object_box[0], b.object_box[3] - b.object_box[1]) for b in boxes]) / 32
        assert all((b.object_box > -0.5).all() and (b.object_box < 32.5).all() and (b.part_boxes > -0.5).all() and (b.part_boxes < 32.5).all() for b in boxes)
        assert 0.4 < length[preset].min() and length[preset].max() < 1 and length[preset].std() > 0.02
    assert length["birds-small"].mean() < 0.8 * length["birds"].mean()
    centres = np.array([(b.object_box[:2] + b.object_box[2:]) / 64 for b in boxes])  # birds-small: anywhere
    assert (centres.min(0) < 0.35).all() and (centres.max(0) > 0.65).all()


def test_a_mark_stands_out_from_the_plumage_under_it():
    rng = np.random.default_rng(0)
    for mark, ground in rng.uniform(0, 255, (500, 2, 3)):
        moved = data.apart(mark, ground)
        assert abs((moved - ground) @ data.LUMA) >= data.FLOOR - 1e-6 and moved.min() >= 0 and moved.max() <= 255
        if abs((mark - ground) @ data.LUMA) >= data.FLOOR:
            assert moved is mark


def linear_probe(features, labels, classes, train):
    """Accuracy of ridge regression on one-hot labels, standardised features, the better of two strengths."""
    features = (features - features[:train].mean(0)) / (features[:train].std(0) + 1e-9)
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    seen, target = features[:train], np.eye(classes)[labels[:train]]
    solve = lambda ridge: np.linalg.solve(seen.T @ seen + ridge * np.eye(seen.shape[1]), seen.T @ target)
    return max(((features[train:] @ solve(ridge)).argmax(1) == labels[train:]).mean() for ridge in (1.0, 100.0))


def colour_features(images):
    bins = (images >> 6) @ np.array([16, 4, 1], np.uint8)
    histogram = np.stack([np.bincount(b.ravel(), minlength=64) for b in bins]) / bins[0].size
    return np.concatenate([images.mean((1, 2)), images.std((1, 2)), histogram], 1)


def edge_features(images):
    grey = images.astype(np.float32) @ data.LUMA.astype(np.float32)
    strength = np.hypot(np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1])
    return np.stack([np.bincount(b.ravel(), minlength=16) for b in np.minimum(strength // 10, 15).astype(int)]) / strength[0].size


def test_neither_colour_nor_edges_give_the_class_away():
    """facts: colour within chance + 3 points, edges within chance + 10; the probe does find a tint of the classes that is not there in the birds."""
    n = 16 * 50
    birds = [data.draw_bird("birds", split, i, 48) for split in ("train", "test") for i in range(n)]
    images, labels = np.stack([b.image for b in birds]), np.array([b.label for b in birds])
    assert linear_probe(colour_features(images), labels, 16, n) < 1 / 16 + 0.03
    assert linear_probe(edge_features(images), labels, 16, n) < 1 / 16 + 0.10
    tinted = (images * (0.4 + 0.6 * labels / 15)[:, None, None, None]).astype(np.uint8)
    assert linear_probe(colour_features(tinted), labels, 16, n) > 1 / 16 + 0.06


def test_toy_birds_that_do_not_exist_are_refused():
    for args in (("birdz", "train", 0, 96), ("birds", "val", 0, 96), ("birds", "train", -1, 96), ("birds", "train", 0, 8)):
        with pytest.raises(ValueError, match="no toy bird .*; presets are birds"):
            data.draw_bird(*args)
    for values in ({"foot": 1}, {"beak": 4}):
        with pytest.raises(ValueError, match="give a dict of beak, eye"):
            data.draw_bird("birds", "train", 0, 96, values)
