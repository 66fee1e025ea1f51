"""The core of data.py: photos to inputs, batches, toy birds and scores. Photos are made here."""
import colorsys
import dataclasses
import hashlib
import itertools
import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import common
import data

PEOPLE = [*range(20)] * 4  # identities
PLAIN = common.Recipe(image_size=(24, 24), crop="none", hflip=0.0, toy_train=2, toy_test=2)
GREY = np.full((24, 24, 3), 100, np.uint8)
BOX = np.array([[30, 20, 150, 60]], np.float32)  # reaches 30 pixels over the ramp's right edge
MODES = {"RGB": ((200, 60, 20), (200, 60, 20)), "L": (90, 90), "1": (1, 255), "P": (0, (10, 20, 30))}
MODES |= {"LA": ((0, 0), 255), "RGBA": ((255, 0, 0, 128), (255, 127, 127)), "I;16": (51400, 200)}  # 200 x 257


def recipe(**changes):
    return dataclasses.replace(PLAIN, **changes)


def save(path, image=GREY, **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def ramp(height=80, width=120):
    """Photo whose red is 2 x column and green is 2 x row: a pixel tells where it comes from; blue is 100."""
    y, x = np.mgrid[:height, :width]
    return np.stack([2 * x, 2 * y, np.full_like(x, 100)], 2).astype(np.uint8)


def held(image, n=1, **truth):
    """A split of one image in memory, n times."""
    return data.Split([f"held/{i}" for i in range(n)], [0] * n, images=[image] * n, **truth)


def drawn(image, n=40, train=True, truth=None, **settings):
    """The first n epochs of a split of one image -> list of (image (3, H, W) as float, box shown (4,))."""
    photos = data.Photos(held(image, boxes=truth), recipe(**settings), train)
    return [(item[0].double(), item[3].numpy()) for item in (photos[(epoch, 0)] for epoch in range(n))]


def items(*what, **settings):
    return [image for image, _ in drawn(*what, **settings)]


def shown(*what, **settings):
    return np.array([box for _, box in drawn(*what, **settings)])


def full(image, size, resample=Image.Resampling.BILINEAR):
    """The photo resized as a whole to size (H, W), the long way round -> (3, H, W)."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], resample), np.float64).transpose(2, 0, 1)


def bird(size, index=0):
    return data.draw_bird("birds", "train", index, size)["image"]


# ------------------------------------------------------------------------------------------- photos
@pytest.mark.parametrize("mode", MODES)
def test_a_photo_of_any_mode_becomes_rgb_over_white(tmp_path, mode):
    image = Image.new(mode, (8, 6), MODES[mode][0])
    if mode == "P":
        image.putpalette([10, 20, 30] + [0] * 765)
        image.save(tmp_path / "clear.png", transparency=0)
        assert data.open_photo(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    opened = data.open_photo(save(tmp_path / "a.png", image))
    assert opened.mode == "RGB" and np.abs(np.asarray(opened, float) - MODES[mode][1]).max() <= 1


def test_seven_formats_are_read_by_content_and_nothing_else(tmp_path):
    for name in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"):
        path = save(tmp_path / f"{name}.jpg", GREY, format=name)
        assert np.abs(np.asarray(data.open_photo(path), float) - 100).max() <= 2
    cmyk = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 6), (0, 255, 255, 0)))
    assert np.allclose(data.open_photo(cmyk).getpixel((0, 0)), (255, 0, 0), atol=3)
    wide = save(tmp_path / "16.ppm", np.full((6, 8), 40000, np.uint16))
    assert data.open_photo(wide).getpixel((0, 0)) == (155, 155, 155)
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    for kind in ("float32", "int32"):  # whose range nobody knows: never black
        save(tmp_path / f"{kind}.tif", np.arange(48, dtype=kind).reshape(6, 8))
    for name in ("eps.jpg", "pipe.jpg", "float32.tif", "int32.tif", "."):
        with pytest.raises(ValueError, match="cannot be read as a photo .*; replace or remove"):
            data.open_photo(tmp_path / name)


def test_an_unreadable_photo_is_named_or_with_skip_replaced_in_training_and_black_in_testing(tmp_path):
    jpg, png = (save(tmp_path / f"a.{kind}", ramp()).read_bytes() for kind in ("jpg", "png"))
    train = lambda path: data.Photos(data.Split([str(path)], [0]), PLAIN, True)[(0, 0)]
    contents = jpg[: len(jpg) // 2], b"no photo at all", b"", png[:200]
    for content, read in itertools.product(contents, (data.open_photo, train)):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(ValueError, match="bad.jpg: cannot be read as a photo .*; replace or remove"):
            read(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match="gone.jpg: .*no such file"):
        data.open_photo(tmp_path / "gone.jpg")
    split = data.Split([str(tmp_path / name) for name in ("a.png", "bad.jpg", "gone.jpg")], [1, 2, 3])
    for key in (1, 2):
        assert data.Photos(split, PLAIN, True, skip=True)[(0, key)][1:3] == (1, 0)
        pixels, label, index, shown = data.Photos(split, PLAIN, skip=True)[key]
        assert pixels.sum() == 0 and (label, index) == (key + 1, key) and shown.isnan().all()


@pytest.mark.parametrize("w, h, colour", [(20, 50_331_648, 2), (2**14, 2**14 + 1, 2), (2**13, 2**13 + 1, 6)])
def test_too_many_pixels_are_refused_before_anything_is_decoded(tmp_path, monkeypatch, w, h, colour):
    """2^28 pixels; 2^26 where decoding holds several copies, as with transparency; no side over 2^16."""
    number = lambda n: struct.pack(">I", n)
    chunk = lambda kind, body: number(len(body)) + kind + body + number(zlib.crc32(kind + body))
    about = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, colour, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + about + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    Image.init()  # plugins of Pillow load pictures of their own
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=f"a.png: .*{w} x {h} pixels are too many"):
        data.open_photo(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_own_photos_are_turned_as_exif_says_and_benchmarks_are_not(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", ramp(), exif=exif, quality=95)
    stored, turned = Image.open(path), ImageOps.exif_transpose(Image.open(path))
    for upright, whole in ((False, stored), (True, turned)):
        assert np.array_equal(data.open_photo(path, upright), whole)
        pixels, _, _, shown = data.Photos(data.Split([str(path)], [0], upright=upright), PLAIN)[0]
        assert shown.tolist() == [0, 0, *whole.size]
        assert np.abs(pixels.numpy() - full(np.asarray(whole), (24, 24))).mean() < 2  # decoded smaller
    png, tiff = (save(tmp_path / f"a.{kind}", ramp(), exif=exif) for kind in ("png", "tif"))
    assert np.array_equal(data.open_photo(tiff), ImageOps.exif_transpose(Image.open(png)))  # not turned twice


@pytest.mark.parametrize("width", [125, 200, 300])  # decoded at 1/8, 1/4, 1/2: 126, 251 and 501 pixels
def test_a_jpeg_that_is_decoded_smaller_is_not_shifted(tmp_path, width):
    photo = Image.fromarray(np.tile(np.linspace(0, 255, 1001).astype(np.uint8), (801, 1)))
    paths = [str(save(tmp_path / f"a.{kind}", photo, quality=100)) for kind in ("jpg", "png")]
    photos = data.Photos(data.Split(paths, None), recipe(image_size=(100, width)))
    small, exact = (photos[i][0][0, :, -30:-5].float().mean() for i in (0, 1))
    assert abs(small - exact) < 0.2 * 255 / width  # of the step between two pixels


def test_a_lack_of_memory_is_not_blamed_on_the_photo():
    with pytest.raises(MemoryError), data.named("a.jpg"):
        raise MemoryError


def test_damaged_exif_says_nothing_about_the_photo(tmp_path):
    assert data.open_photo(save(tmp_path / "a.jpg", ramp(), exif=b"Exif\0\0rubbish")).size == (120, 80)
    exif = Image.Exif()
    exif[0x0112], exif[282] = 6, 1.0
    raw = bytearray(exif.tobytes())
    raw[-8:] = struct.pack("<ii" if raw[6:8] == b"II" else ">ii", -1, 0)  # a resolution of -1 / 0
    assert data.open_photo(save(tmp_path / "b.jpg", ramp(), exif=bytes(raw))).size == (80, 120)


def test_photos_are_decoded_no_larger_than_needed_and_look_the_same(tmp_path):
    path = save(tmp_path / "p.jpg", ramp(160, 240))
    sizes = [data.open_photo(path, longest=n).size for n in (None, 300, 120, 31, 1)]
    assert sizes == [(240, 160), (240, 160), (120, 80), (31, 21), (1, 1)]
    jpeg = save(tmp_path / "a.jpg", bird(448, 3), quality=98, subsampling=0)
    png = save(tmp_path / "a.png", Image.open(jpeg))
    small = recipe(image_size=(100, 100), resize=(120, 120), crop="random")
    resized = recipe(image_size=(80, 80), crop="resized", crop_area=(0.3, 1.0))
    for settings, train in itertools.product((small, resized), (False, True)):
        one, two = (data.Photos(data.Split([str(p)], [0]), settings, train)[0] for p in (jpeg, png))
        assert (one[0].double() - two[0]).abs().mean() < 1 and torch.equal(one[3], two[3])


def test_photos_are_listed_without_what_is_hidden_and_what_is_no_photo(tmp_path):
    shown = ["a.JPG", "b/c.webp", "b/d [1]/e.png", "umlaut-ä.jpeg"]
    for name in shown + ["._a.jpg", ".thumbnails/a.jpg", "b/.ipynb_checkpoints/a.jpg", "paper.pdf"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    expected = sorted(f"{tmp_path}/{name}" for name in shown)
    assert data.photos_in(tmp_path) == data.list_photos([tmp_path]) == expected
    assert data.list_photos([tmp_path / "paper.pdf", tmp_path / "b"])[0].endswith("paper.pdf")  # as asked
    (tmp_path / "empty").mkdir()
    for name in ("gone", "empty"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such photo, or no photos in it"):
            data.list_photos([tmp_path / name])


# ------------------------------------------------------------------------------------------- inputs
def test_the_test_transform_is_resize_then_centre_crop_to_a_grey_level():
    image = np.asarray(Image.fromarray(bird(128)).resize((150, 110)))
    for size, resize in (((24, 32), (41, 53)), ((32, 32), (32, 32)), ((64, 48), (300, 200))):
        for name in ("nearest", "bilinear", "bicubic"):
            resample = Image.Resampling[name.upper()]
            (got,) = items(image, 1, False, image_size=size, resize=resize, interpolation=name)
            whole = torch.from_numpy(full(image, resize, resample))
            gap = (got - torchvision.transforms.functional.center_crop(whole, list(size))).abs()
            assert gap.max() <= 1 if name != "nearest" else (gap == 0).double().mean() > 0.9  # ties
    assert np.array_equal(items(image, 1, False, image_size=(32, 40))[0], full(image, (32, 40)))


def test_items_are_image_label_index_and_the_box_shown_and_testing_draws_nothing():
    split = data.Split(["a", "b"], [5, 6], images=[ramp(60), ramp(62, 90)])
    settings = recipe(resize=(40, 48), hflip=1.0, crop="random", brightness=0.5, rotate=90.0)
    images, labels, indices, shown = next(iter(DataLoader(data.Photos(split, settings), batch_size=2)))
    assert images.shape == (2, 3, 24, 24) and images.dtype == torch.uint8
    assert torch.equal(images[1], data.Photos(split, settings)[1][0])
    assert labels.tolist() == [5, 6] and indices.tolist() == [0, 1]
    assert np.allclose(shown, [[30, 12, 90, 48], [22.5, 62 * 0.2, 67.5, 62 * 0.8]])
    assert data.Photos(data.Split(["a"], None, images=[GREY]), PLAIN)[0][1] == -1  # photos to predict
    with pytest.raises(ValueError, match="--resize 20,30 is smaller than --image-size 24,24; give at least"):
        data.Photos(data.Split(["gone.jpg"], [0]), recipe(resize=(20, 30)))


@pytest.mark.parametrize("settings", [
    {"crop": "random", "resize": (26, 28)}, {"crop": "resized"}, {"boxes": True}, {"resize": (40, 60)},
    {"boxes": True, "crop": "resized"},
])
def test_the_pixels_of_an_item_are_those_of_the_box_that_it_shows(settings):
    photo = Image.fromarray(ramp())
    photos = data.Photos(held(ramp(), boxes=BOX), recipe(**settings), train=True)
    for epoch in range(10):
        pixels, _, _, shown = photos[(epoch, 0)]
        expected = photo.resize((24, 24), Image.Resampling.BILINEAR, shown.tolist())
        assert np.array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))


def test_random_crops_of_the_resized_photo_go_everywhere_and_padding_moves_them_over_the_edge_into_black():
    boxes = shown(ramp(), 100, crop="random", resize=(26, 28)) / (120 / 28, 80 / 26, 120 / 28, 80 / 26)
    corners = {(left, top, left + 24, top + 24) for left in range(5) for top in range(3)}
    assert set(map(tuple, boxes.round(6))) == corners
    image = np.full((48, 48, 3), 200, np.uint8)
    boxes = shown(image, 80, crop="random", pad=3)
    assert set(boxes[:, 0]) == set(boxes[:, 1]) == set(range(-6, 7, 2))
    for (x1, y1, *_), item in zip(boxes, items(image, 80, crop="random", pad=3)):
        x, y = (first + 2 * np.arange(24) + 1 for first in (x1, y1))  # the middle of each pixel
        inside = ((y >= 0) & (y < 48))[:, None] & ((x >= 0) & (x < 48))
        assert np.array_equal(item, np.broadcast_to(200 * inside, (3, 24, 24)))


def test_resized_crops_have_the_area_and_aspect_of_the_recipe_and_go_everywhere():
    x1, y1, x2, y2 = shown(ramp(), 300, crop="resized", crop_area=(0.2, 0.5), crop_ratio=(0.8, 1.6)).T
    area, ratio = (x2 - x1) * (y2 - y1) / (80 * 120), (x2 - x1) / (y2 - y1)
    assert 0.2 <= area.min() < 0.21 and 0.49 < area.max() <= 0.5
    assert 0.8 <= ratio.min() < 0.82 and 1.55 < ratio.max() <= 1.6
    assert (np.log(ratio) > np.log(0.8 * 1.6) / 2).mean() == pytest.approx(0.5, abs=0.1)
    assert 0 <= min(x1.min(), y1.min()) and max(x1.min(), y1.min()) < 2
    assert 118 < x2.max() <= 120 and 78 < y2.max() <= 80
    square = dict(crop="resized", crop_area=(0.9, 1.0), crop_ratio=(1.0, 1.0))  # none fits: the centred one
    assert np.allclose(shown(np.ascontiguousarray(ramp(20, 120)), 5, **square), [50, 0, 70, 20])


def test_boxes_crop_the_photo_and_are_clipped_to_it():
    for train in (False, True):
        assert shown(ramp(), 1, train, BOX, boxes=True).tolist() == [[30, 20, 120, 60]]
    x1, y1, x2, y2 = shown(ramp(), 60, truth=BOX, boxes=True, crop="resized").T
    assert min(x1) >= 30 and min(y1) >= 20 and max(x2) <= 120 and max(y2) <= 60
    with pytest.raises(ValueError, match="held/0.*outside"):
        shown(ramp(), 1, truth=BOX + 120, boxes=True)
    with pytest.raises(ValueError, match="--boxes: this dataset has no object boxes"):
        data.Photos(held(GREY), recipe(boxes=True))
    pixels, _, _, box = data.Photos(held(ramp(), banner=20), PLAIN)[0]
    assert box.tolist() == [0, 0, 120, 60] and pixels[1].max() < 120  # green: rows above 60


def test_fmow_boxes_get_a_margin_that_grows_as_they_get_small():
    for share, margin in {0.6: 0.15, 0.5: 0.15, 0.45: 0.2, 0.3: 0.3, 0.25: 0.5, 0.1: 1.0, 0.05: 2.0}.items():
        side, half = share * 1000, margin * share * 500
        region = data.object_region((400, 390, 400 + side, 400), (1000, 1000), context=True)
        expected = max(0, 400 - half), 380, min(1000, 400 + side + half), 410  # each side by its own share
        assert np.allclose(region, expected, atol=1e-4)


def test_to_input_carries_boxes_from_the_photo_to_the_box_shown_of_it_and_to_photo_back():
    shown, box = np.array([10.0, 20, 50, 80]), np.array([10, 80, 30, 50.0])  # scaled by 1/2 and 1/3
    assert data.to_input(box, shown, (20, 20)).tolist() == [0, 20, 10, 10]
    many, shown = np.random.default_rng(0).random((2, 3, 4)), np.array([[[0, 0, 2, 3]], [[1, 1, 2, 2]]])
    assert np.allclose(data.to_photo(data.to_input(many, shown, (7, 9)), shown, (7, 9)), many)


def test_random_interpolation_draws_all_six_filters_of_pillow_in_training_only():
    image = bird(96)
    filters = {r: full(image, (24, 24), r).tobytes() for r in map(Image.Resampling, range(6))}
    drawn = {item.numpy().tobytes() for item in items(image, 60, interpolation="random")}
    assert drawn == set(filters.values()) and len(drawn) == 6
    tested = items(image, 1, False, interpolation="random")[0].numpy().tobytes()
    assert tested == filters[Image.Resampling.BILINEAR]


def test_hflip_mirrors_with_its_probability_and_crop_none_trains_on_the_test_view():
    (plain,), found = items(ramp(), 1, False, resize=(30, 30)), items(ramp(), 300, resize=(30, 30), hflip=0.3)
    mirrored = [item for item in found if not torch.equal(item, plain)]
    assert all(torch.equal(item, plain.flip(2)) for item in mirrored) and 60 < len(mirrored) < 120


def test_rotation_translation_and_zoom_stay_in_their_ranges_and_fill_them():
    def motion(n=60, **settings):
        """Angle (degrees), zoom and shift (shares of the side), read off the middle of a ramp -> (4, n)."""
        found = torch.stack(items(ramp(120, 120), n, image_size=(120, 120), **settings))
        left, at, right = found[:, :2, 60, (40, 60, 80)].numpy().T  # each (2, n): x, y
        x, y = (right - left) / 80
        return np.degrees(np.arctan2(y, x)), 1 / np.hypot(x, y), *(60 - at / 2) / 120

    angle, zoom, *_ = motion(rotate=20.0)
    assert -21 < angle.min() < -15 and 15 < angle.max() < 21 and np.abs(zoom - 1).max() < 0.05
    angle, zoom, *shifts = motion(translate=0.1)
    assert all(-0.11 < v.min() < -0.07 and 0.07 < v.max() < 0.11 for v in shifts) and np.abs(angle).max() < 1
    zoom = motion(zoom=(1.2, 1.5))[1]
    assert 1.15 < zoom.min() < 1.28 and 1.42 < zoom.max() < 1.55
    assert 0.15 < (np.abs(motion(200, rotate=20.0, affine_prob=0.25)[0]) > 0.5).mean() < 0.35


def test_brightness_contrast_saturation_and_hue_stay_in_their_ranges_and_fill_them():
    two = np.where(np.arange(24)[:, None, None] < 12, 80, 120).repeat(24, 1).repeat(3, 2).astype(np.uint8)
    red = np.zeros((24, 24, 3), np.uint8) + np.array([160, 100, 100], np.uint8)
    hue = lambda i: colorsys.rgb_to_hsv(*(i[:, 0, 0] / 255).tolist())[0]
    for image, name, most, measure in (
        (two, "brightness", 0.3, lambda i: float(i.mean()) / 100 - 1),
        (two, "contrast", 0.5, lambda i: float(i[0, -1, 0] - i[0, 0, 0]) / 40 - 1),
        (red, "saturation", 0.4, lambda i: float(i[0, 0, 0] - i[1, 0, 0]) / 60 - 1),
        (red, "hue", 0.2, lambda i: (hue(i) + 0.5) % 1 - 0.5),
    ):
        found = [measure(item) for item in items(image, 150, **{name: most})]
        assert -1.08 * most < min(found) < -0.8 * most and 0.8 * most < max(found) < 1.08 * most, name
    some = items(two, 200, brightness=0.3, jitter_prob=0.3)
    assert 0.2 < np.mean([float(item.mean()) != 100 for item in some]) < 0.4
    assert min(float(item.mean()) for item in items(two, brightness=5.0)) == 0  # no factor below zero


def test_erasing_fills_a_rectangle_of_normalised_images_with_unclipped_noise_of_unit_variance():
    values, sides = [], []
    for image in data.erase(torch.full((600, 3, 40, 40), 9.0), recipe(erasing=0.5)):
        erased = image != 9
        if erased.any():
            h, w = (int(erased[0].any(k).sum()) for k in (1, 0))
            assert erased.sum() == 3 * h * w
            values.append(image[erased])
            sides.append((h, w))
    noise, (h, w) = torch.cat(values), np.array(sides).T
    area = h * w / 1600
    assert 0.43 < len(h) / 600 < 0.57 and 0.01 < area.min() < 0.03 and 0.31 < area.max() < 0.35
    assert 0.25 < (h / w).min() < 0.4 and 2.5 < (h / w).max() < 4
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and noise.abs().max() > 3.5


def test_a_training_item_is_a_function_of_seed_epoch_and_index_whatever_the_workers():
    settings = recipe(toy_train=1, brightness=0.2, hue=0.1, crop="resized", rotate=9.0)
    split = data.load("toy", None, settings).train
    photos = data.Photos(split, settings, True, seed=3)
    batches = [[(epoch, i) for i in range(start, start + 4)] for epoch in (0, 7) for start in (0, 4)]
    alone = [batch[0] for batch in DataLoader(photos, batch_sampler=batches)]
    state = torch.manual_seed(99).get_state()  # of no matter, as what was drawn before
    workers = dict(num_workers=2, generator=torch.Generator())
    others = [batch[0] for batch in DataLoader(photos, batch_sampler=batches[::-1], **workers)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, others)) and not torch.equal(alone[0], alone[2])
    assert not torch.equal(photos[(0, 0)][0], data.Photos(split, settings, True, seed=4)[(0, 0)][0])
    twins = data.Photos(held(split.images[0], 2), settings, True)
    assert not torch.equal(twins[(0, 0)][0], twins[(0, 1)][0]) and torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------- batches
def epoch_of(labels, batch_size, epoch=0, seed=0, rank=0, size=1, **settings):
    settings = recipe(batch_size=batch_size, **settings)
    return data.epoch_batches(data.Split([""] * len(labels), labels), settings, seed, epoch, rank, size)


def test_an_epoch_has_each_image_once_in_an_order_given_by_seed_and_epoch_and_processes_share_each_batch():
    flat = lambda *key: [i for batch in epoch_of([0] * 20, 5, *key) for epoch, i in batch if epoch == key[0]]
    assert sorted(flat(2, 0)) == list(range(20)) != flat(2, 0) == flat(2, 0)
    assert flat(2, 0) != flat(3, 0) and flat(2, 0) != flat(2, 1)
    assert [len(b) for b in epoch_of([0] * 23, 5)] == [5] * 4  # the short one is dropped ...
    assert [len(b) for b in epoch_of([0] * 3, 5)] == [3]  # ... unless it is the only one
    for (labels, batch, K), size in itertools.product((([0] * 50, 12, 0), (PEOPLE, 24, 2)), (1, 2, 3, 4)):
        parts = [epoch_of(labels, batch, 4, 9, rank, size, instances=K) for rank in range(size)]
        assert [sum(shares, []) for shares in zip(*parts)] == epoch_of(labels, batch, 4, 9, instances=K)
        assert all(len(share) == batch // size for part in parts for share in part)


def test_p_x_k_batches_hold_p_identities_with_k_images_and_every_image_has_its_turn():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(30), rng.integers(2, 20, 30))).tolist()
    epochs = [epoch_of(labels, 32, epoch, instances=4) for epoch in range(8)]
    epochs = [[[i for _, i in batch] for batch in batches] for batches in epochs]
    for batch in (batch for batches in epochs for batch in batches):
        identities = np.array(labels)[batch].reshape(8, 4)
        assert (identities == identities[:, :1]).all() and len(set(identities[:, 0])) == 8
        for label in identities[:, 0]:
            assert len({i for i in batch if labels[i] == label}) == min(4, labels.count(label))
    assert {len(batches) for batches in epochs} == {len(labels) // 32} and epochs[0] != epochs[1]
    assert len({i for batches in epochs for batch in batches for i in batch}) > 0.97 * len(labels)
    assert len(epoch_of([0, 1, 2], 8, instances=4)[0]) == 8  # fewer images than a batch: filled up


@pytest.mark.parametrize("labels, batch, K, accumulate, size", [
    ([0] * 50, 10, 0, 1, 4), ([0], 4, 0, 1, 2), ([0] * 3, 8, 0, 4, 1),  # plain shuffling
    (PEOPLE, 64, 4, 8, 3), (PEOPLE, 64, 4, 16, 1), (PEOPLE, 64, 4, 2, 8),  # groups cut, one identity
    ([*range(5)] * 8, 64, 4, 1, 1),  # fewer than 16 identities
])
def test_batches_that_cannot_be_split_are_refused_with_what_fits(labels, batch, K, accumulate, size):
    with pytest.raises(ValueError, match=f"--batch-size {batch} of .* over {size} processes.*take a"):
        epoch_of(labels, batch, size=size, instances=K, accumulate=accumulate)
    for parts, processes in ((1, 1), (8, 1), (2, 4), (1, 8)):  # whole identities, two or more in each part
        epoch_of(PEOPLE, 64, size=processes, instances=4, accumulate=parts)


# ------------------------------------------------------------------------------------------- toy birds
def test_toy_birds_are_the_pixels_that_are_stored_and_no_two_are_the_same():
    for bird, *stored in (  # hash of the pixels, class and values, object box
        ("birds train 0 96", "a07ec48a377608fc", "0 000003", [26.0, 22.8, 77.3, 50.8]),
        ("birds test 17 64", "43d72bf8e0a6f334", "1 121320", [22.8, 38.7, 60.7, 62.5]),
        ("birds-easy train 5 128", "daed58bffdb69bbc", "5 133203", [7.5, 36.5, 102.1, 87.4]),
        ("birds-easy test 3 160", "25329d6379a727f0", "3 311210", [40.1, 74.6, 118.8, 136.7]),
        ("birds-pretrain train 1000 64", "cb28138262b8970f", "0 021233", [11.7, 6.3, 48.9, 36.9]),
    ):  # Pillow before 11.2 fills tips differently
        preset, split, index, size = bird.split()
        b = data.draw_bird(preset, split, int(index), int(size))
        values = "".join(map(str, b["values"].values()))
        pixels, box = hashlib.sha256(b["image"]).hexdigest()[:16], b["object_box"].astype(float).round(1)
        assert [pixels, f"{b['label']} {values}", box.tolist()] == stored
    keys = list(itertools.product(data.PRESETS, ("train", "test"), range(40), (32,)))
    assert len({data.draw_bird(*key)["image"].tobytes() for key in keys}) == len(keys)


def test_toy_splits_have_the_counts_the_size_and_the_truth_of_the_recipe():
    splits = data.load("toy", None, recipe(toy_train=0, toy_test=1, image_size=(16, 20)))
    train = splits.train
    assert (len(train), len(splits.test), len(set(splits.classes))) == (240, 16, 16)
    assert splits.classes[0] == "cone-plain-bar-spots" and train.paths[17] == "birds/train/17"
    assert train.images[0].shape == (20, 20, 3) and train.images[0].dtype == np.uint8  # the longest side
    assert train.part_names == ("beak", "eye", "crest", "wing", "breast", "tail")
    assert train.signature == (True, True, False, True, True, False)
    easy = data.load("toy", None, recipe(toy_preset="birds-easy", resize=(36, 30))).test
    b = data.draw_bird("birds-easy", "test", 5, 36)
    assert np.array_equal(easy.images[5], b["image"]) and np.array_equal(easy.parts[5], b["part_boxes"])
    assert np.array_equal(easy.boxes[5], b["object_box"]) and easy.labels[5] == b["label"] == 5
    counts = {name: (len(p.codes), p.train, p.test) for name, p in data.PRESETS.items()}
    assert list(counts) == list(common.PRESETS)
    assert counts == {"birds": (16, 15, 30), "birds-easy": (8, 400, 60), "birds-pretrain": (8, 400, 60)}


@pytest.mark.parametrize("name", data.PRESETS)
def test_classes_differ_in_three_parts_or_four_and_no_place_is_often_on_a_part_that_carries_the_class(name):
    """One place for all birds is on a class-bearing part in at most 30 % of them, any place in 12 %."""
    codes = np.array([[int(v) for v in code] for code in data.PRESETS[name].codes])
    apart = (codes[:, None] != codes[None]).sum(2) + 99 * np.eye(len(codes), dtype=int)
    assert (apart.min(1) == 3).all()
    assert all((np.bincount(codes[:, k], minlength=4) == len(codes) // 4).all() for k in range(4)), "equally"
    birds = [data.draw_bird(name, "test", i, 16) for i in range(480)]
    carries = [part in data.SIGNATURE for part in data.PARTS]
    cells = data.covered(np.stack([b["part_boxes"][carries] for b in birds]), (16, 16))
    assert cells.max() <= 0.30 and cells.mean() <= 0.12


def test_signature_parts_carry_the_class_and_decoys_do_not():
    birds = [data.draw_bird("birds", "train", i, 16) for i in range(16 * 16)]
    for i, b in enumerate(birds):
        code = "".join(str(b["values"][part]) for part in data.SIGNATURE)
        assert b["label"] == i % 16 and code == data.PRESETS["birds"].codes[i % 16]
    for part in ("crest", "tail"):
        assert np.bincount([b["values"][part] for b in birds], minlength=4).min() > 0.18 * len(birds)
        assert all(len({b["values"][part] for b in birds[c::16]}) >= 3 for c in range(16))


@pytest.mark.parametrize("preset, size", [("birds", 96), ("birds-easy", 64)])
def test_a_swapped_part_changes_pixels_inside_its_box_only_and_a_scene_is_one_at_every_size(preset, size):
    for index in range(5):
        b = data.draw_bird(preset, "test", index, size)
        for (part, value), box in zip(b["values"].items(), b["part_boxes"]):
            x1, y1, x2, y2 = *np.floor(box[:2] - 2).clip(0).astype(int), *np.ceil(box[2:] + 2).astype(int)
            for shift in range(4):
                new = data.draw_bird(preset, "test", index, size, (part, shift))
                changed = (new["image"] != b["image"]).any(2)
                assert changed.any() == (shift > 0) and changed[y1:y2, x1:x2].sum() == changed.sum()
                assert np.array_equal(new["part_boxes"], b["part_boxes"])
                assert new["values"] == b["values"] | {part: (value + shift) % 4}
    large = data.draw_bird(preset, "test", index, 3 * size)
    assert np.allclose(large["part_boxes"], 3 * b["part_boxes"], atol=1e-2)
    assert np.abs(np.asarray(Image.fromarray(large["image"]).reduce(3), float) - b["image"]).mean() < 6


def linear_probe(features, labels, n):
    """Accuracy of ridge regression on one-hot labels after n examples, the better of two strengths."""
    features = (features - features[:n].mean(0)) / (features[:n].std(0) + 1e-9)
    x, target = features[:n], np.eye(16)[labels[:n]] - 1 / 16
    solve = lambda ridge: np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ target)
    return max(((features[n:] @ solve(ridge)).argmax(1) == labels[n:]).mean() for ridge in (1.0, 100.0))


def test_neither_colour_nor_edges_give_the_class_away():
    """Colour within chance + 3 points, edges within chance + 10; and the probe finds a tint."""
    birds = [data.draw_bird("birds", split, i, 32) for split in ("train", "test") for i in range(480)]
    images, labels = np.stack([b["image"] for b in birds]), np.array([b["label"] for b in birds])
    bins = lambda values, n: np.stack([np.bincount(v.ravel(), minlength=n) for v in values]) / values[0].size
    codes = lambda x: (x >> 6)[..., 0] * 16 + (x >> 6)[..., 1] * 4 + (x >> 6)[..., 2]
    colours = lambda x: np.concatenate([x.mean((1, 2)), x.std((1, 2)), bins(codes(x), 64)], 1)
    grey = images.mean(3)
    strength = np.hypot(np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1])
    assert linear_probe(colours(images), labels, 480) < 1 / 16 + 0.03
    assert linear_probe(bins(np.minimum(strength // 10, 15).astype(int), 16), labels, 480) < 1 / 16 + 0.10
    tinted = (images * (0.4 + 0.6 * labels / 15)[:, None, None, None]).astype(np.uint8)
    assert linear_probe(colours(tinted), labels, 480) > 1 / 16 + 0.06


# ------------------------------------------------------------------------------------------- scores
def scored(split, top, boxes=None, **answers):
    """data.score of answers to a split of which 32 x 32 pixels are shown."""
    if boxes is not None:
        answers |= {"boxes": np.array(boxes, float), "shown": np.tile([0.0, 0, 32, 32], (len(top), 1))}
    return data.score(split, answers | {"answer": np.array(top)}, recipe(image_size=(32, 32)))


def test_top_scores_of_a_hand_case_ties_in_class_order_and_heads():
    top = data.ranked(torch.tensor([[0.1, 0.5, 0.5, 0, 0, 0, 0], [0, 0, 0, 1, 2, 3, 4.0]])).numpy()
    assert top.tolist() == [[1, 2, 0, 3, 4], [6, 5, 4, 3, 0]]
    result = scored(data.Split(["a", "b"], [2, 0]), top, **{"head x": np.array([2, 1])})
    assert result == {"scores": {"top1": 0.0, "top5": 1.0}, "heads": {"x": 0.5}}
    assert scored(data.Split(["a"], [1]), [[1, 0, 2, 3, 4]])["scores"] == {"top1": 1.0}  # of five classes


def test_pointing_counts_centres_in_parts_beside_chance_and_one_place_and_coverage_is_of_the_union_of_boxes():
    parts = np.array([[[0, 0, 16, 16], [16, 16, 32, 32.0]], [[0, 0, 8, 32], [np.nan] * 4]])
    split = data.Split(["a", "b"], [0, 1], parts=parts, part_names=("x", "y"), signature=(True, False))
    boxes = np.array([[[2, 2, 6, 6], [20, 20, 24, 24]], [[20, 2, 24, 6], [0, 0, 4, 4]]])
    found = scored(split, [[0, 1], [1, 0]], boxes, **{"untrained boxes": boxes[:, ::-1]})
    names = ("best", "all", "untrained_best", "untrained_all", "chance", "constant")
    assert found["pointing"]["signature"] == dict(zip(names, (0.5, 0.5, 0.5, 0.5, 0.25, 1.0)))
    assert found["pointing"]["decoy"] == dict(zip(names, (0.0, 0.25, 0.5, 0.25, 0.125, 0.5)))
    assert found["coverage"] == 32 / 1024 and "coverage_by_size" not in found
    lines = list(data.tell(found, ["tern", "wren"]))
    assert "signature parts: best 50.0%, all 50.0%, untrained" in lines[1]
    assert lines[-2:] == ["weakest classes: tern 1/1; wren 1/1", "most confused (true > predicted): none"]
    found = scored(data.Split(["a"], [0]), [[0, 1]], [[[0, 0, 16, 16], [8, 0, 24, 16], [0, 0, 32, 8]]])
    assert found["coverage"] == (24 * 16 + 8 * 8) / 1024
    assert found["coverage_by_size"] == {"16 x 16": 24 * 16 / 1024, "32 x 8": 0.25}


def test_object_iou_beside_the_best_constant_box_and_object_scale_by_quartiles():
    """M2Former, Table 8: small below the first quartile of areas, large above the third, ties medium."""
    areas, right = np.array([1, 2, 2, 3, 4, 5, 6, 6, 7.0]), np.array([1, 1, 1, 0, 1, 0, 1, 1, 0])
    objects = np.stack([0 * areas, 0 * areas, areas, 0 * areas + 1], 1)
    split = data.Split(["x"] * 9, [0] * 9, boxes=objects)
    found = scored(split, np.stack([1 - right, right], 1), objects[:, None] + [0.5, 0, 0.5, 0])
    constant = max(np.mean([min(a, c) / max(a, c) for a in areas]) for c in [*areas, areas.mean()])
    assert np.allclose(list(found["object_iou"].values()), (np.mean((areas - 0.5) / (areas + 0.5)), constant))
    assert found["scale"] == {"large": 0.0, "medium": 5 / 7, "small": 1.0, "thresholds": [2.0, 6.0]}
    assert found["per_class"] == {0: [6, 9]} and found["confused"] == [[0, 1, 3]]
    assert list(data.tell(found, "ab"))[-2:] == [
        "weakest classes: a 6/9", "most confused (true > predicted): a > b 3x"]


def test_photos_that_could_not_be_read_do_not_count():
    boxes, shown = np.tile([0, 0, 8, 8.0], (3, 1)), np.array([[0, 0, 32, 32.0], [np.nan] * 4, [0, 0, 32, 32]])
    answers = {"answer": np.array([[0, 1], [1, 0], [1, 0]]), "shown": shown, "boxes": boxes[:, None]}
    split = data.Split(["a", "b", "c"], [0, 0, 1], boxes=boxes)
    found = data.score(split, answers, recipe(image_size=(32, 32)))
    assert found["scores"] == {"top1": 1.0} and found["object_iou"]["mean"] == 1
    assert found["per_class"] == {0: [1, 1], 1: [1, 1]}


def test_reliance_swaps_one_part_of_the_birds_and_measures_log_p_and_flips():
    split = data.load("toy", None, PLAIN).test.take([3, 9, 20])
    before = dict(zip(split.paths, split.images))

    def model(some):  # sure of the label as long as nothing has changed
        changed = [[not np.array_equal(before[path], image)] for path, image in zip(some.paths, some.images)]
        true = np.arange(16) == np.array(some.labels)[:, None]
        return np.log(np.where(np.array(changed) ^ true, 0.9, 0.2))

    found = data.reliance(split, model)
    assert list(found) == list(data.PARTS) and np.allclose(list(found.values()), (math.log(0.9 / 0.2), 1))
    swapped = data.toy_split(split.take([1, 2]).paths, 24, "tail")
    for i, index in enumerate((9, 20)):  # each to another value, those of a part of a split too
        other = data.draw_bird("birds", "test", index, 24, ("tail", 1 + i))["image"]
        assert np.array_equal(swapped.images[i], other)
    assert swapped.labels == split.labels[1:] and swapped.paths == split.paths[1:]


def test_reid_scores_of_a_hand_case():
    """Place on a line: (identity, camera). A query's camera does not count for its identity; 3 has none."""
    gallery = {1: (1, 0), 2: (2, 1), 3: (1, 1), 4: (2, 1), 5: (1, 2), 20: (4, 1), 30: (5, 1)}
    queries = {0: (1, 0), 4.4: (2, 0), -1: (4, 0), 9: (3, 0)}  # find theirs at 2 and 4; 1 and 4; 6; nowhere
    labels, cameras = zip(*queries.values(), *gallery.values())
    truth = dict(labels=list(labels), cameras=list(cameras), query=[True] * 4 + [False] * 7)
    places = np.array([[*queries, *gallery]], np.float32).T
    found = data.score(data.Split([""] * 11, **truth), {"answer": places, "head x": -places % 7}, PLAIN)
    right = {"mAP": ((1 / 2 + 2 / 4) / 2 + (1 + 2 / 4) / 2 + 1 / 6) / 3, "rank1": 1 / 3, "rank5": 2 / 3}
    assert found["scores"] == pytest.approx(right | {"rank10": 1.0, "skipped": 1})
    assert list(found["scores"]) == ["mAP", "rank1", "rank5", "rank10", "skipped"]
    assert found["heads"]["x"] == data.reid_scores(-places % 7, **truth)["mAP"] != found["scores"]["mAP"]
    with pytest.raises(ValueError, match="none of 2 queries has its identity in the gallery"):
        data.reid_scores(places[:3], [1, 3, 2], [0, 0, 1], [True, True, False])
