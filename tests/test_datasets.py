"""The papers' datasets in their official formats with their oddities, .mat files, own folders, downloads.

Nothing is fetched: every file is made here.
"""
import functools
import hashlib
import itertools
import json
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import data

RECIPE = common.Recipe(image_size=(16, 16), crop="none", hflip=0.0)


def photo(path, size=(24, 18), mode="RGB", format="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, format)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def tree(base, files, photos=(), **how):
    """A folder with these files, {name: content}, and photos -> the folder."""
    for file, content in files.items():
        write(base / file, content)
    for file in photos:
        photo(base / file, **how)
    return base


def load(name, root, skip_bad=False, **settings):
    return data.load(name, root, replace(RECIPE, **settings), skip_bad)


def told(split, base):
    """A text for each photo, in order: path below `base`, label, and its camera or box if it has one."""
    truth = [[]] * len(split) if split.boxes is None else split.boxes
    rows = zip(split.paths, split.labels, np.reshape(split.cameras, (-1, 1)) if split.cameras else truth)
    tell = lambda path, *values: " ".join([path.removeprefix(f"{base}/"), *map("{:g}".format, values)])
    return [tell(path, label, *more) for path, label, more in rows]


# ---------------------------------------------------------------------- .mat files
CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13, "i8": 14, "u8": 15}
STORAGE = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9, "i8": 12, "u8": 13}


def element(kind, payload):
    if 0 < len(payload) <= 4:  # the small form
        return struct.pack("<I", len(payload) << 16 | kind) + payload.ljust(4, b"\0")
    return struct.pack("<II", kind, len(payload)) + payload + b"\0" * (-len(payload) % 8)


def block(kind, dims, body=b"", name="v"):
    """A matrix of a class: flags, dimensions, name, then what the class says."""
    body = element(5, np.int32(dims).tobytes()) + element(1, name.encode()) + body
    body = element(6, struct.pack("<II", kind, 0)) + body
    return struct.pack("<II", 14, len(body)) + body


def matrix(value, name=""):
    """(array, storage), str, (bytes, codec, dims), list (cell) or dict of lists (struct) -> element."""
    if isinstance(value, str):
        value = value.encode("utf-16-le"), 17, (1, len(value))
    if isinstance(value, list):
        return block(1, (len(value), 1), b"".join(map(matrix, value)), name)
    if isinstance(value, dict):
        rows, names = list(zip(*value.values())), b"".join(key.encode().ljust(32, b"\0") for key in value)
        fields = element(5, struct.pack("<i", 32)) + element(1, names)
        return block(2, (1, len(rows)), fields + b"".join(matrix(v) for row in rows for v in row), name)
    if isinstance(value[0], bytes):
        return block(4, value[2], element(value[1], value[0]), name)
    array, storage = value
    stored = element(STORAGE[storage], array.astype("<" + storage).tobytes(order="F"))
    return block(CLASSES[array.dtype.str[1:]], array.shape, stored, name)


def packed(content):
    content = zlib.compress(content)
    return struct.pack("<II", 15, len(content)) + content


def mat(compress=False, **variables):
    elements = [matrix(value, name) for name, value in variables.items()]
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"".join(map(packed, elements) if compress else elements)


def row(*values, storage=""):
    return np.array([values], "f8"), storage or ("u2" if max(values) > 255 else "u1")  # stored small


@pytest.mark.parametrize("compress", [False, True])
def test_read_mat_reads_numbers_text_cells_and_structs_compressed_or_not(compress):
    records = {"class": [row(196), row(3)], "fname": ["00001.jpg", "00002.jpg"]}
    others = dict(text="Ram C/V Cargo Van ü", cell=["a", "bc"], nested=[{"deep": [["x"]]}])
    got = data.read_mat(mat(compress, labels=row(1, 77, 102), ids=row(8189, 300), records=records, **others))
    assert got.pop("labels").tolist() == [1, 77, 102] and got.pop("ids").tolist() == [8189, 300]
    assert [v.item() for v in got["records"].pop("class")] == [196, 3]
    assert got == {"records": {"fname": records["fname"]}} | others


def test_read_mat_reads_every_storage_type_also_in_small_elements_and_text_in_every_encoding():
    for storage, n in itertools.product(STORAGE, (1, 2, 4, 9)):  # 1 to 4 bytes are small elements
        values = [*range(-3 if storage[0] in "if" else 3, 9)][:n]
        assert data.read_mat(mat(v=row(*values, storage=storage)))["v"].tolist() == values
    for kind, codec in (16, "utf-8"), (17, "utf-16-le"), (4, "utf-16-le"), (2, "latin-1"):
        assert data.read_mat(mat(v=("é1".encode(codec), kind, (1, 2))))["v"] == "é1"


@pytest.mark.parametrize("case", {
    "empty": b"", "version 7.3": mat()[:124] + b"\0\2IM" + bytes(600), "cut": mat(v=row(*range(20)))[:-8],
    "cut in the stream": mat(True, v=row(*range(20)))[:-3], "zeros": mat() + packed(bytes(10**8)),
    "dimensions": mat() + block(6, (2**31 - 1,) * 30, element(9, bytes(8))),
    "cells announced": mat() + block(1, (2**30, 2)),
    "reserved type": mat() + block(6, (1, 1), element(11, bytes(8))),
    "complex": mat() + block(6, (1, 1), element(9, bytes(8)) * 2),
    "deep": mat() + functools.reduce(lambda deep, _: block(1, (1, 1), deep), range(3000), b""),
}.items(), ids=lambda item: item[0])
def test_a_hostile_mat_file_is_an_error_that_names_it(tmp_path, case):
    write(tmp_path / "bad.mat", case[1])
    with pytest.raises(ValueError, match="bad.mat: "):
        data.columns(tmp_path / "bad.mat", "", ["v"])


# ---------------------------------------------------------------------- makers of small official sets
def birds(base, records, classes, parts, places):
    """records: id -> (file, class, train, box x y w h)."""
    for i, (file, *_) in records.items():
        photo(base / "images" / file, mode="L" if i == 2 else "RGB")
    for k, file in enumerate(("images", "image_class_labels", "train_test_split", "bounding_boxes")):
        lines = [f"{i} {record[k]}" for i, record in records.items()]
        write(base / f"{file}.txt", "\n".join(lines[:: -1 if k else 1]))  # in any order
    return tree(base, {"classes.txt": classes, "parts/parts.txt": parts, "parts/part_locs.txt": places})


def cub(base):
    records = {  # ids are out of file-name order
        1: ("001.A_Tern/B_46.jpg", 1, 0, "6.0 2.0 10.0 8.0"), 2: ("001.A_Tern/B_09.jpg", 1, 1, "1 1 5 5"),
        3: ("001.A_Tern/B_02.jpg", 1, 1, "0 0 24 18"), 4: ("002.St.Helena/S_03.jpg", 2, 1, "10.5 3.0 20 6"),
        10: ("002.St.Helena/S_01.jpg", 2, 0, "2 2 4 4"),
    }
    places = "1 1 12.0 6.0 1\n1 2 8.0 3.0 1\n1 10 0.0 0.0 0\n4 2 30.0 5.0 1\n99 1 1 1 1\n"
    classes = "1 001.A_Tern\n2 002.St.Helena\n"
    return birds(base, records, classes, "1 back\n2 left eye\n10 throat\n", places)


def nabirds(base):
    records = {  # sparse class ids
        "9b5b-aa": ("0295/zz.jpg", 295, 1, "1 2 10 4"), "0000-13": ("1010/aa.jpg", 1010, 1, "0 0 24 18"),
        "0a00-10": ("0295/ef.jpg", 295, 0, "3 3 3 3"), "0b00-10": ("1010/gh.jpg", 1010, 0, "3 3 3 3"),
    }
    classes = "0 Birds\n22 Ducks, Geese\n295 Oriole (Adult male)\n1010 Dark-eyed Junco\n"
    return birds(base, records, classes, "0 bill\n1 crown\n", "9b5b-aa 0 5 6 1\n9b5b-aa 1 5 6 0\n")


CARS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"]


def annos(files, classes=None, key="fname", **more):
    boxes = [(3, 4, 20, 15), (1, 1, 24, 18), (2, 2, 300, 9)]  # the last one runs past the edge
    table = {f"bbox_{k}": [row(b[i]) for b in boxes] for i, k in enumerate(("x1", "y1", "x2", "y2"))}
    return table | ({"class": [row(c) for c in classes]} if classes else {}) | {key: files} | more


def cars(base):
    files = ["2.jpg", "1.jpg", "3.jpg"]  # not in order
    for file in files:
        photo(base / "cars_train" / file, mode="L" if file == files[2] else "RGB")
        photo(base / "cars_test" / file)
    write(base / "devkit/cars_train_annos.mat", mat(True, annotations=annos(files, [2, 1, 3])))
    write(base / "devkit/cars_test_annos.mat", mat(annotations=annos(files)))
    write(base / "cars_test_annos_withlabels.mat", mat(annotations=annos(files, [3, 2, 2])))
    write(base / "devkit/cars_meta.mat", mat(class_names=CARS))
    return base


def combined_cars(base):
    files = [f"car_ims/{i}.jpg" for i in (3, 1, 2)]
    table = annos(files, [3, 1, 2], "relative_im_path", test=[row(1), row(0), row(0)])
    return tree(base, {"cars_annos.mat": mat(True, annotations=table, class_names=CARS)}, files)


def aircraft(base):
    image = Image.new("RGB", (60, 80), (0, 0, 255))
    image.paste((255, 0, 0), (0, 60, 60, 80))  # the banner
    (base / "images").mkdir(parents=True, exist_ok=True)
    for name in ("0034309", "0000002", "0000009", "0000010", "0000011"):
        image.save(base / f"images/{name}.jpg", quality=95)
    others = "0000009 1 1 9 9\n0000010 1 1 9 9\n0000011 1 1 9 9\n"
    return tree(base, {
        "images_variant_train.txt": "0034309 F/A-18\n0000002 737-700",
        "images_variant_val.txt": "0000009 Boeing 717",
        "images_variant_test.txt": "0000011 737-700\n0000010 Boeing 717",
        "variants.txt": "737-700\nF/A-18\nBoeing 717\n",
        "images_box.txt": "0034309 1 1 60 80\n0000002 11 21 40 75\n" + others,
    })


def flowers(base):
    ids = dict(trnid=row(5, 2, storage="f8"), valid=row(6, storage="u2"), tstid=row(4, 3, 1))
    labels = mat(True, labels=row(77, 1, 60, 77, 1, 60))
    photos = [f"jpg/image_{i:05d}.jpg" for i in range(1, 7)]
    return tree(base, {"imagelabels.mat": labels, "setid.mat": mat(**ids)}, photos)


HOUND = "n02089078-black-and-tan_coonhound"
DOGS = ["n02085620-Chihuahua/n_7.jpg", f"{HOUND}/n_2.jpg", "n02085620-Chihuahua/n_10.jpg", f"{HOUND}/n_1.jpg"]


def voc(*boxes):
    keys = "xmin", "ymin", "xmax", "ymax"
    found = ["".join(f"<{key}>{v}</{key}>" for key, v in zip(keys, box)) for box in boxes]
    return f"<a>{''.join(f'<object><bndbox>{box}</bndbox></object>' for box in found)}</a>".encode()


def dogs(base):
    for i, file in enumerate(DOGS):  # one is a PNG with alpha under a JPEG's name
        photo(base / "Images" / file, mode="RGBA" if i == 1 else "RGB", format="PNG" if i == 1 else "JPEG")
        write(base / "Annotation" / file[:-4], voc((1, 1, 3, 3), (2, 3, 20 + i, 17)))  # the largest box
    for side, files in (("train", DOGS[:2]), ("test", DOGS[2:])):
        write(base / f"{side}_list.mat", mat(True, file_list=files, annotation_list=files, labels=row(1, 2)))
    return base


def fmow(base):
    def place(path, *found):
        found = [dict(zip(("ID", "category", "box"), entry)) for entry in found]
        write(Path(f"{path}_rgb.json"), json.dumps({"bounding_boxes": found if found[1:] else found[0]}))
        photo(Path(f"{path}_rgb.jpg"), (200, 100))
        photo(Path(f"{path}_msrgb.jpg"), (200, 100))  # the decoy

    false, whole, pairs = (-1, "false_detection", [0, 0, 90, 90]), [50, 20, 100, 30], []
    for side, kind in itertools.product(("train", "val"), ("zoo", "airport")):
        others = false, (-1, kind, [0, 0, 9, 9]), (3, "lake", [9, 9, 9, 9]), (3, kind, [5, 5, 2, 40])
        place(base / f"{side}/{kind}/{kind}_0/{kind}_0_0", (3, kind, whole))
        place(base / f"{side}/{kind}/{kind}_1/{kind}_1_0", *others, (3, kind, whole))
    for i, kind in ((12, "zoo"), (7, "airport"), (9, "false_detection")):
        place(base / f"test/{i:07d}/{i:07d}_3", (3, kind, whole))  # not the truth
        place(base / f"test_gt/{kind}/{kind}_0/{kind}_0_3", false)
        pairs.append({"input": f"test_gt/{kind}/{kind}_0", "output": f"test/{i:07d}"})
    return tree(base, {"test_gt_mapping.json": json.dumps(pairs)})


def people(base, folders="bounding_box_train query bounding_box_test", files=(
    [f"{i:04d}_c{c}s1_00045{k}_0{k}.jpg" for i in (2, 7, 1501) for c in (1, 6) for k in (1, 2)],
    ["0005_c2s1_01_00.jpg", "0009_c1s1_01_00.jpg"],  # 9 has no match in the gallery
    ["-1_c3s2_01_00.jpg", "0000_c1s1_02_03.jpg", "0005_c1s1_03_01.jpg", "0005_c2s1_04_01.jpg"],
)):
    for folder, found in zip(folders.split(), files):
        for file in found:
            photo(base / folder / file, (8, 16))
        write(base / folder / "Thumbs.db", b"\xd0\xcf\x11\xe0")
    return base


def vehicles(base):
    files = ["0001_c001_1.jpg", "0776_c020_1.jpg"], ["0002_c002_1.jpg"], ["0002_c012_1.jpg", "0005_c019.jpg"]
    return people(base, "image_train image_query image_test", files)


def msmt17(base):
    for name, folder, *lines in (
        ("train", "train", "0000/0000_000_01_0015_0.jpg 0", "0003/0003_045_12_0006_2.jpg 3"),
        ("val", "train", "0000/0000_001_15_0015_1.jpg 0"), ("query", "test", "0000/0000_000_03_0015_0.jpg 0"),
        ("gallery", "test", "0001/0001_000_04_0015_0.jpg 1", "0000/0000_001_05_0015_0.jpg 0"),
    ):
        tree(base, {f"list_{name}.txt": "\n".join(lines)}, [f"{folder}/{line.split()[0]}" for line in lines])
    return base


def plant(base):
    lines = [f"Train_{i},{','.join('01'[i % 4 == k] for k in range(4))}" for i in range(40)]
    table = "\r\n".join(["image_id,healthy,multiple_diseases,rust,scab", *lines, ""])
    photos = [f"images/{name}.jpg" for name in ["Test_0", *(f"Train_{i}" for i in range(40))]]
    return tree(base, {"train.csv": table}, photos, size=(8, 8))


# ---------------------------------------------------------------------- what is read of them
PEOPLE = (["2", "7", "1501"], [
    f"bounding_box_train/{i:04d}_c{c}s1_00045{k}_0{k}.jpg {n} {c}"
    for n, i in enumerate((2, 7, 1501)) for c in (1, 6) for k in (1, 2)
], [
    "query/0005_c2s1_01_00.jpg 5 2", "query/0009_c1s1_01_00.jpg 9 1",
    "bounding_box_test/0000_c1s1_02_03.jpg 0 1",  # a distractor
    "bounding_box_test/0005_c1s1_03_01.jpg 5 1", "bounding_box_test/0005_c2s1_04_01.jpg 5 2"])


@pytest.mark.parametrize("case", [  # set, folder, maker, classes, train and test: path, label, box or camera
    ("cub", "CUB_200_2011", cub, ["A Tern", "St.Helena"], [
        "images/001.A_Tern/B_09.jpg 0 1 1 6 6", "images/001.A_Tern/B_02.jpg 0 0 0 24 18",
        "images/002.St.Helena/S_03.jpg 1 10.5 3 30.5 9",  # over the photo's right edge at 24, as given
    ], ["images/001.A_Tern/B_46.jpg 0 6 2 16 10", "images/002.St.Helena/S_01.jpg 1 2 2 6 6"]),
    ("nabirds", "nabirds/nabirds", nabirds, ["Oriole (Adult male)", "Dark-eyed Junco"], [
        "images/1010/aa.jpg 1 0 0 24 18", "images/0295/zz.jpg 0 1 2 11 6",
    ], ["images/0295/ef.jpg 0 3 3 6 6", "images/1010/gh.jpg 1 3 3 6 6"]),
    ("cars", "stanford_cars", cars, CARS, [
        "cars_train/1.jpg 0 0 0 24 18", "cars_train/2.jpg 1 2 3 20 15", "cars_train/3.jpg 2 1 1 300 9",
    ], ["cars_test/1.jpg 1 0 0 24 18", "cars_test/2.jpg 2 2 3 20 15", "cars_test/3.jpg 1 1 1 300 9"]),
    ("cars", "", combined_cars, CARS, [
        "car_ims/1.jpg 0 0 0 24 18", "car_ims/2.jpg 1 1 1 300 9"], ["car_ims/3.jpg 2 2 3 20 15"]),
    ("aircraft", "fgvc-aircraft-2013b/data", aircraft, ["737-700", "F/A-18", "Boeing 717"], [
        "images/0000002.jpg 0 10 20 40 75", "images/0000009.jpg 2 0 0 9 9", "images/0034309.jpg 1 0 0 60 80",
    ], ["images/0000010.jpg 2 0 0 9 9", "images/0000011.jpg 0 0 0 9 9"]),
    ("flowers", "flowers-102", flowers, data.Flowers102.classes, [
        "jpg/image_00002.jpg 0", "jpg/image_00005.jpg 0", "jpg/image_00006.jpg 59",
    ], ["jpg/image_00001.jpg 76", "jpg/image_00003.jpg 59", "jpg/image_00004.jpg 76"]),
    ("dogs", "ImageNetDogs", dogs, ["Chihuahua", "black-and-tan coonhound"], [
        f"Images/{DOGS[0]} 0 2 3 20 17", f"Images/{DOGS[1]} 1 2 3 21 17",
    ], [f"Images/{DOGS[2]} 0 2 3 22 17", f"Images/{DOGS[3]} 1 2 3 23 17"]),
    ("market1501", "Market-1501-v15.09.15", people, *PEOPLE),
    ("dukemtmc", "DukeMTMC-reID", people, *PEOPLE),
    ("veri776", "VeRi", vehicles, ["1", "776"], [
        "image_train/0001_c001_1.jpg 0 1", "image_train/0776_c020_1.jpg 1 20",
    ], ["image_query/0002_c002_1.jpg 2 2", "image_test/0002_c012_1.jpg 2 12", "image_test/0005_c019.jpg 5 19"
    ]),
    ("msmt17", "MSMT17_V1", msmt17, ["0", "3"], [
        "train/0000/0000_000_01_0015_0.jpg 0 1", "train/0000/0000_001_15_0015_1.jpg 0 15",
        "train/0003/0003_045_12_0006_2.jpg 1 12",
    ], ["test/0000/0000_000_03_0015_0.jpg 0 3", "test/0000/0000_001_05_0015_0.jpg 0 5",
        "test/0001/0001_000_04_0015_0.jpg 1 4"]),
], ids=lambda case: f"{case[0]} {case[1][:5]}")
def test_an_official_set_is_read_from_its_folder_or_from_where_that_lies(tmp_path, case):
    name, folder, make, classes, train, test = case
    base = make(tmp_path / folder)
    for root in (tmp_path, base):
        splits = load(name, root)
        assert splits.classes == list(classes) and splits.val is None and not splits.train.upright
        assert told(splits.train, base) == train and told(splits.test, base) == test
        assert splits.train.query is None and f"of {len(classes)} classes" in splits.note
        assert splits.test.query in (None, ["query" in line or "_000_03" in line for line in test])
        assert data.Photos(splits.train, RECIPE)[1][0].shape == (3, 16, 16)  # gray, PNG with alpha


def test_the_parts_of_birds_are_squares_of_a_tenth_of_the_objects_side_and_boxes_are_clipped(tmp_path):
    splits, unseen = load("cub", cub(tmp_path / "cub")), [np.nan] * 4
    assert splits.test.part_names == ("back", "left eye", "throat") and splits.test.signature == (True,) * 3
    # the box's longer side is 10 pixels, so a part reaches one pixel to each side; 20: two pixels
    np.testing.assert_array_equal(splits.test.parts[0], np.float32([[11, 5, 13, 7], [7, 2, 9, 4], unseen]))
    np.testing.assert_array_equal(splits.train.parts[2], np.float32([unseen, [28, 3, 32, 7], unseen]))
    assert data.Photos(splits.train, replace(RECIPE, boxes=True))[2][3].tolist() == [10.5, 3, 24, 9]
    train = load("nabirds", nabirds(tmp_path / "nabirds")).train
    assert train.part_names == ("bill", "crown")
    np.testing.assert_array_equal(train.parts[1], np.float32([[4, 5, 6, 7], unseen]))


def test_cub_without_its_parts_and_with_a_bom_and_windows_line_ends_and_dogs_without_boxes(tmp_path):
    before = load("cub", cub(tmp_path))
    for file in ("images.txt", "classes.txt", "bounding_boxes.txt", "train_test_split.txt"):
        write(tmp_path / file, b"\xef\xbb\xbf" + (tmp_path / file).read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "parts/part_locs.txt").unlink()
    after = load("cub", tmp_path)
    assert told(after.train, "/") == told(before.train, "/") and after.classes == before.classes
    assert after.train.parts is None and after.train.part_names == ()
    (dogs(tmp_path / "dogs") / "Annotation").rename(tmp_path / "elsewhere")
    assert load("dogs", tmp_path / "dogs").train.boxes is None


def test_the_official_validation_images_are_trained_on_or_a_split_of_their_own(tmp_path):
    makers = {"aircraft": aircraft, "flowers": flowers, "msmt17": msmt17}
    planes, plants, persons = (
        load(name, make(tmp_path / name), train_split="train") for name, make in makers.items())
    assert told(planes.val, tmp_path) == ["aircraft/images/0000009.jpg 2 0 0 9 9"]
    assert told(plants.val, tmp_path) == ["flowers/jpg/image_00006.jpg 59"]
    assert planes.train.labels == [0, 1] and plants.train.labels == [0, 0]
    assert persons.train.cameras == [1, 12] and persons.val is None
    (tmp_path / "msmt17/list_val.txt").unlink()  # version 1 has it, not every copy
    assert load("msmt17", tmp_path / "msmt17").train.cameras == [1, 12]
    half = load("flowers", tmp_path / "flowers", val_fraction=0.5)
    assert len(half.val) == 1  # the single one of class 59 stays in train


def test_crop_banner_cuts_the_bottom_20_pixels_of_aircraft_with_and_without_boxes(tmp_path):
    base, crop = aircraft(tmp_path), {"crop_banner": True}
    boxes = crop | {"boxes": True}
    for settings, region in ({}, [0, 0, 60, 80]), (crop, [0, 0, 60, 60]), (boxes, [10, 20, 40, 60]):
        split = load("aircraft", base, **settings).train
        pixels, _, _, shown = data.Photos(split, replace(RECIPE, **settings))[0]
        assert (pixels[0].float().mean() > 50) == (not settings) and shown.tolist() == region


def test_plant_holds_out_a_fifth_of_each_class_as_its_test_labels_are_hidden(tmp_path):
    base = plant(tmp_path / "plant-pathology-2020-fgvc7")
    splits = load("plant", tmp_path)
    assert splits.classes == ["healthy", "multiple_diseases", "rust", "scab"] and "hidden" in splits.note
    assert "published" not in splits.note, "of the photos that have labels no number is"
    for split, n in ((splits.train, 8), (splits.test, 2)):
        assert [int(Path(p).stem[6:]) % 4 for p in split.paths] == split.labels
        assert np.bincount(split.labels).tolist() == [n] * 4
    assert not set(splits.train.paths) & set(splits.test.paths)
    first, *lines = (base / "train.csv").read_text().split()
    write(base / "train.csv", "\ufeff" + "\n".join([first, *lines[::-1]]))  # in another order: the same split
    assert load("plant", base).test.paths == splits.test.paths


def test_plant_reads_icassava_too_the_five_classes_of_the_paper_s_table_1(tmp_path):
    kinds = ["cbb", "cbsd", "cgm", "cmd", "healthy"]
    photos = [f"train/{kind}/train-{i}.jpg" for kind in kinds for i in range(5)]
    base = tree(tmp_path / "cassavaleafdata", {}, photos)
    splits = load("plant", tmp_path)
    assert splits.classes == kinds and "hidden" in splits.note
    assert np.bincount(splits.test.labels).tolist() == [1] * 5 and len(splits.train) == 20
    tree(base, {}, [f"{side}/{kind}/{side}.jpg" for kind in kinds for side in ("test", "validation")])
    splits = load("plant", base)
    assert len(splits.train) == 25 and splits.test.labels == splits.val.labels == [0, 1, 2, 3, 4]
    assert Path(splits.test.paths[0]).name == "test.jpg"


FMOW = [f"{c}/{c}_{n}/{c}_{n}_0_rgb.jpg {i}" for i, c in enumerate(("airport", "zoo")) for n in (0, 1)]


@pytest.mark.parametrize("truth", ["", "groundtruth"])
def test_fmow_takes_rgb_photos_their_first_usable_box_and_the_test_labels_of_the_mapping(tmp_path, truth):
    base, recipe = fmow(tmp_path / "fmow-rgb"), replace(RECIPE, boxes=True)
    for name in ("test_gt", "test_gt_mapping.json"):  # some unpack the archive into a folder
        (base / truth).mkdir(exist_ok=True)
        (base / name).rename(base / truth / name)
    splits = load("fmow", tmp_path)
    assert told(splits.train, base / "train") == told(splits.val, base / "val") == FMOW
    assert told(splits.test, base / "test") == ["0000007/0000007_3_rgb.jpg 0", "0000012/0000012_3_rgb.jpg 1"]
    splits = load("fmow", base, boxes=True)
    assert splits.classes == ["airport", "zoo"] and splits.train.boxes.tolist() == [[50, 20, 150, 50]] * 4
    # width 100 of 200: factor 0.15, 7.5 pixels to each side; height 30 of 100: 0.3, 4.5 pixels
    assert data.Photos(splits.train, recipe)[0][3].tolist() == [42.5, 15.5, 157.5, 54.5]
    assert data.Photos(splits.test, recipe)[0][3].tolist() == [0, 0, 200, 100]  # no usable box: all of it
    (base / truth / "test_gt_mapping.json").unlink()
    splits = load("fmow", base)
    assert told(splits.test, base / "val") == FMOW and splits.val is None
    assert "groundtruth.tar.bz2" in splits.note and "val is the test split" in splits.note


def test_imagenet_has_folders_of_wnids_and_kaggle_s_val_a_table(tmp_path):
    known, own, kaggle = ["n01440764", "n01443537"], tmp_path / "a", tmp_path / "b/ILSVRC/Data/CLS-LOC"
    for k, wnid in enumerate(known[::-1]):
        for base, val in ((own, wnid), (kaggle, "")):
            photo(base / f"train/{wnid}/{wnid}_1.JPEG", mode="CMYK" if k == 0 else "RGB")
            photo(base / "val" / val / f"V{k}.JPEG")
    splits = load("imagenet", own)
    assert splits.classes == known and splits.train.labels == [0, 1]
    assert told(splits.test, own / "val") == ["n01440764/V1.JPEG 0", "n01443537/V0.JPEG 1"]
    assert data.Photos(splits.train, RECIPE)[1][0].shape == (3, 16, 16)
    solution = "ImageId,PredictionString\r\nV1,n01440764 1 2 3 4 \r\nV0,n01443537 1 2 3 4\r\n"
    write(tmp_path / "b/LOC_val_solution.csv", solution)
    for root in (tmp_path / "b", kaggle):
        assert load("imagenet", root).classes == known and load("imagenet", root).test.labels == [1, 0]
    write(tmp_path / "b/LOC_val_solution.csv", solution.split("V0")[0])
    with pytest.raises(ValueError, match="LOC_val_solution.csv has no line for V0"):
        load("imagenet", kaggle)
    for i in range(2000):  # the whole of it has names
        folder = tmp_path / "c" / ("train", "val")[i % 2] / f"n{i // 2:08}"
        folder.mkdir(parents=True)
        (folder / "1.JPEG").hardlink_to(own / "val/n01440764/V1.JPEG")
    assert load("imagenet", tmp_path / "c").classes[:2] == ["tench", "goldfish"]


# ---------------------------------------------------------------------- damaged and missing sets
LONG, DEEP, NUMBERED = b"9" * 400, b"[" * 200_000, mat(annotations=annos([row(1)] * 3, [1, 2, 3]))


@pytest.mark.parametrize("case", [  # set, maker, file, old content (None: all), new content, its error
    ("cub", cub, "image_class_labels.txt", b"4 2\n", b"", "image_class_labels.txt has no line for 4"),
    ("cub", cub, "train_test_split.txt", b"4 1", b"4 2", "train_test_split.txt.*'2'"),
    ("cub", cub, "train_test_split.txt", b" 0", b" 1", "no training or no test photos"),
    ("cub", cub, "bounding_boxes.txt", b"4 10.5 3.0", b"4 10.5", "bounding_boxes.txt.*four numbers"),
    ("cub", cub, "parts/part_locs.txt", b"1 10 0.0", b"1 10 ", "part_locs.txt"),
    ("cub", cub, "images.txt", b"S_03", b"S_33", r"S_33.jpg is listed but not there \(1 of 5 photos"),
    ("cars", cars, "devkit/cars_train_annos.mat", None, mat(annotations=annos(["1"])), "train_annos.*class"),
    ("cars", cars, "devkit/cars_meta.mat", None, mat(class_names=CARS[:2]), "3 is not in range"),
    ("cars", cars, "cars_test_annos_withlabels.mat", None, NUMBERED, "withlabels.mat"),
    ("aircraft", aircraft, "images_variant_test.txt", None, b"0000010 Concorde", "variant_test.*'Concorde'"),
    ("flowers", flowers, "imagelabels.mat", None, mat(labels=row(77, 1, 60, 103, 1, 60)), "103 is not in"),
    ("flowers", flowers, "imagelabels.mat", None, mat(labels=row(77, 1, 60)), "setid.mat.*imagelabels.mat"),
    ("flowers", flowers, "setid.mat", None, b"version https://git-lfs.github.com/", "setid.mat.*level 5"),
    ("dogs", dogs, f"Annotation/{DOGS[0][:-4]}", None, voc(), "n_7"),
    ("dogs", dogs, f"Annotation/{DOGS[0][:-4]}", None, b'<?xml version="1.0" encoding="x-no"?><a/>', "n_7"),
    ("plant", plant, "train.csv", b"Train_1,0,1,0,0", b"Train_1,0,0,0,0", "train.csv.*'0', '0', '0', '0'"),
    ("plant", plant, "train.csv", b"Train_1,0,1", b"Train_1,0," + b"1" * 200_000, "train.csv"),
    ("plant", plant, "train.csv", None, b"", "train.csv"),
    ("fmow", fmow, "val/zoo/zoo_1/zoo_1_0_rgb.json", None, DEEP, "zoo_1_0_rgb.json"),
    ("fmow", fmow, "val/zoo/zoo_1/zoo_1_0_rgb.json", b"[5, 5, 2", b"[5, 5, " + LONG, "zoo_1_0_rgb.json"),
    ("fmow", fmow, "test_gt_mapping.json", b'"input"', b'"inputs"', "'input'"),
    ("market1501", people, "query/person.jpg", None, b"", "query/person.jpg is not named"),
    ("msmt17", msmt17, "list_query.txt", None, b"0000/query.jpg 0", "query.jpg is not named"),
    ("msmt17", msmt17, "list_query.txt", None, b"", "0 in query"),
], ids=lambda case: case[2])
def test_a_damaged_file_of_an_official_set_is_one_error_that_names_it(tmp_path, case):
    name, make, file, old, new, message = case
    path = make(tmp_path) / file
    write(path, new if old is None else path.read_bytes().replace(old, new))
    expected = f"--data {name}: .*official release.*{message}.*unpack the official archive again.*folder"
    with pytest.raises(ValueError, match=expected) as error:
        load(name, tmp_path, boxes=name == "fmow")
    assert len(str(error.value)) < 1500


def test_a_wrong_root_says_what_is_missing_and_where_to_get_it(tmp_path):
    for name, source in data.SETS.items():
        files = ".*".join(source.files.split("|")[0].split())
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} lacks .*{files}") as error:
            load(name, tmp_path)
        assert source.source in str(error.value)
        assert ("--download" in str(error.value)) == (name in ("cub", "flowers", "aircraft", "dogs"))
    (cub(tmp_path / "CUB_200_2011") / "classes.txt").unlink()
    (cars(tmp_path / "stanford_cars") / "cars_test_annos_withlabels.mat").unlink()
    mirror = "stanford_cars lacks cars_test_annos_withlabels.mat or .*; get it from a mirror"
    for name, root, message in (
        ("cub", tmp_path, "CUB_200_2011 lacks classes.txt; "), ("cars", tmp_path, mirror),
        ("cub", None, "add --root"), ("cub", tmp_path / "nowhere", "nowhere is no folder"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load(name, root)


def test_published_counts_are_those_of_the_fact_sheet_and_others_are_noted(tmp_path, monkeypatch):
    assert {name: tuple(source[3:6]) for name, source in data.SETS.items()} == {
        "imagenet": (1000, 1_281_167, 50_000), "cub": (200, 5994, 5794), "cars": (196, 8144, 8041),
        "aircraft": (100, 6667, 3333), "flowers": (102, 2040, 6149), "dogs": (120, 12_000, 8580),
        "nabirds": (555, 23_929, 24_633), "plant": (5, 0, 0), "fmow": (62, 363_572, 53_473),
        "market1501": (751, 12936, 19_281), "dukemtmc": (702, 16522, 19_889), "veri776": (576, 37778, 13257),
        "msmt17": (1041, 32_621, 93_820)}
    assert set(data.DATASETS) == {"toy", "folder", *data.SETS}
    assert "images: (2, 3, 2), published: (200, 5994, 5794)" in load("cub", cub(tmp_path)).note
    monkeypatch.setitem(data.SETS, "cub", data.SETS["cub"]._replace(classes=2, train=3, test=2))
    assert load("cub", tmp_path).note == "3 train, 2 test images of 2 classes"
    assert "no test images of AM General" in load("cars", cars(tmp_path / "cars")).note
    assert "in ImageNet's training set" in load("dogs", dogs(tmp_path / "dogs")).note


# ---------------------------------------------------------------------- own folders
def own(root, names):
    """A folder of photos: own(root, "a/0 b/0") makes root/a/0.png and root/b/0.png."""
    return tree(root, {}, [f"{name}.png" for name in names.split()])


@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "val"), ("training", "VALID")])
def test_a_folder_has_train_and_test_under_their_usual_names_without_hidden_files(tmp_path, train, test):
    for path in ("b ü/2.JPG", "b ü/1.png", "a/x.WebP", "a/deep/y.bmp", "a/._x.png", ".x/x.png"):
        photo(tmp_path / train / path, format=None)
    photo(tmp_path / test / "b ü/3.tif", format=None)
    write(tmp_path / train / "a/notes.txt", "no photo")
    splits = load("folder", str(tmp_path))
    assert splits.classes == ["a", "b ü"] and splits.val is None
    assert splits.train.upright and splits.test.upright and splits.test.labels == [1]
    expected = ["a/deep/y.bmp 0", "a/x.WebP 0", "b ü/1.png 1", "b ü/2.JPG 1"]
    assert told(splits.train, tmp_path / train) == expected
    assert splits.note.startswith("4 train, 1 test images of 2 classes; ")
    assert splits.note.endswith(f"test is {tmp_path / test}; no test images of a")


def test_class_folders_alone_need_a_fraction_and_are_cut_by_class_and_file_name(tmp_path):
    own(tmp_path, " ".join(f"{name}/{i}" for name, n in (("a", 10), ("b", 5), ("c", 1)) for i in range(n)))
    with pytest.raises(ValueError, match="no test or val folder; put .* or add --val-fraction"):
        load("folder", tmp_path)
    splits = load("folder", tmp_path, val_fraction=0.2)
    cut = {"a/0.png 0", "a/6.png 0", "b/0.png 1"}  # on every machine
    assert set(told(splits.test, tmp_path)) == cut and splits.train.labels == [0] * 8 + [1] * 4 + [2]
    assert not cut & set(told(splits.train, tmp_path)) and splits.val is None
    assert "cut from train; no test images of c" in splits.note


def test_a_validation_split_is_cut_from_train_and_every_list_alike(tmp_path):
    whole = load("toy", None, toy_train=10, toy_test=1)
    splits = load("toy", None, toy_train=10, toy_test=1, val_fraction=0.3)
    assert [splits.val.labels.count(c) for c in range(16)] == [3] * 16
    assert splits.test.paths == whole.test.paths
    assert sorted(splits.train.paths + splits.val.paths) == sorted(whole.train.paths)
    at = whole.train.paths.index(splits.val.paths[5])
    for key in ("images", "parts", "boxes", "labels"):
        assert np.array_equal(getattr(splits.val, key)[5], getattr(whole.train, key)[at])
    splits = load("folder", own(tmp_path, "train/a/0 train/b/0 val/b/0 test/a/0 test/b/0"))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2, 1, 2) and splits.val.labels == [1]


@pytest.mark.parametrize("names, fraction, message", [
    ("", 0, "holds 0 class folders"), ("train/0 test/0", 0, "train holds 0 class folders"),
    ("train/a/0 test/a/0", 0, "holds 1 class folders.*of at least two classes"),
    ("test/a/0 test/b/0", 0, "has test and no train"),
    ("train/a/0 train/b/0 test/c/0", 0, "test/c is no class of train"),
    ("train/a/0 train/b/.hidden/0 test/a/0", 0, "b holds no photos"),
    ("train/a/0 train/b/0 test/a/0 val/a/0", 0.5, "--val-fraction 0.5: folder has val or"),
    ("a/0 b/0", 0.5, "--val-fraction 0.5: no class has two photos"),
    ("train/fruit/banana/0 train/fruit/apple/0", 0, "train holds 1 class folders; .*no level deeper"),
    ("Images/0 train_list.mat/0", 0, "looks like dogs, an official set: use --data dogs"),
])
def test_what_is_wrong_with_a_folder_is_said_with_what_to_do(tmp_path, names, fraction, message):
    with pytest.raises(ValueError, match=message):
        load("folder", own(tmp_path, names), val_fraction=float(fraction))


def test_own_photos_are_looked_through_and_the_unreadable_ones_named_together(tmp_path):
    own(tmp_path, "train/a/0 train/a/1 train/a/2 train/b/0 train/b/1 train/b/2 test/a/0 test/b/0")
    tree(tmp_path, {"train/a/empty.jpg": b"", "train/b/text.jpg": "not a photo"})
    (tmp_path / "test/a/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    faults = "a/empty.jpg .cannot identify image file.*b/text.jpg .cannot.*gone.jpg .no such file.; .*--skip"
    with pytest.raises(ValueError, match=f"^3 photos cannot be read: .*{faults}"):
        load("folder", tmp_path)
    splits = load("folder", tmp_path, skip_bad=True)
    assert (len(splits.train), len(splits.test)) == (6, 2) and splits.train.upright and splits.test.upright
    assert "left out: " in splits.note and "empty.jpg" in splits.note
    (tmp_path / "train/c").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="train/c is a link that leads nowhere"):
        load("folder", tmp_path, skip_bad=True)


# ---------------------------------------------------------------------- downloads
@pytest.fixture
def hosted(tmp_path, monkeypatch):
    """CUB's archive on a host of its own: (the archive, an empty folder)."""
    cub(tmp_path / "CUB_200_2011")
    made = tmp_path / "host/CUB_200_2011.tgz"
    made.parent.mkdir()
    with tarfile.open(made, "w:gz") as archive:
        archive.add(tmp_path / "CUB_200_2011", "CUB_200_2011")
    archives = [(made.as_uri(), hashlib.sha256(made.read_bytes()).hexdigest())]
    monkeypatch.setitem(data.SETS, "cub", data.SETS["cub"]._replace(archives=archives))
    return made, tmp_path / "root"


def test_download_fetches_checks_and_unpacks_and_does_so_once(hosted):
    made, root = hosted
    assert data.download("cub", root) == root / "CUB_200_2011" and len(load("cub", root).train) == 3
    assert {p.name for p in root.iterdir()} == {"CUB_200_2011", "CUB_200_2011.tgz"}  # nothing unfinished
    made.unlink()
    (root / "CUB_200_2011.tgz").unlink()
    assert data.download("cub", root) == root / "CUB_200_2011"  # nothing is fetched or unpacked again
    (root / "cub.unpacking").touch()  # an unpacking that was interrupted is done again
    with pytest.raises(ValueError, match="CUB_200_2011.tgz: .*delete .*or fetch it by hand"):
        data.download("cub", root)


def test_a_download_with_a_wrong_hash_is_not_kept_and_a_damaged_archive_is_named(hosted):
    made, root = hosted
    made.write_bytes(made.read_bytes()[:-10])
    with pytest.raises(ValueError, match="CUB_200_2011.tgz: invalid hash"):
        data.download("cub", root)
    assert [path.name for path in root.iterdir()] == ["cub.unpacking"]
    write(root / "CUB_200_2011.tgz", made.read_bytes()[:400])
    with pytest.raises(ValueError, match="delete .*CUB_200_2011.tgz if it is there"):
        data.download("cub", root)


@pytest.mark.parametrize("member, link", [("../evil", ""), ("a", "/etc/passwd"), ("a", "../../b")])
def test_an_archive_that_leads_out_of_its_folder_is_refused(hosted, member, link):
    made, root = hosted
    info = tarfile.TarInfo(member)
    info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
    root.mkdir()
    with tarfile.open(root / made.name, "w:gz") as archive:
        archive.addfile(info)
    with pytest.raises((ValueError, FileNotFoundError)):
        data.download("cub", root)
    assert not any(path.exists() for path in (root / "a", root.parent / "evil"))


def test_the_sets_that_can_be_downloaded_have_their_official_urls_and_others_say_where_to_get_them(tmp_path):
    oxford = "https://www.robots.ox.ac.uk/~vgg/data"
    stanford = "http://vision.stanford.edu/aditya86/ImageNetDogs"
    assert {name: [url for url, _ in s.archives] for name, s in data.SETS.items() if s.archives} == {
        "cub": ["https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"],
        "aircraft": [f"{oxford}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"],
        "flowers": [f"{oxford}/flowers/102/{f}" for f in ("102flowers.tgz", "imagelabels.mat", "setid.mat")],
        "dogs": [f"{stanford}/{f}.tar" for f in ("images", "annotation", "lists")]}
    for name, root in ("market1501", tmp_path), ("toy", tmp_path), ("cub", None):
        with pytest.raises(ValueError, match="fetches cub, aircraft, flowers, dogs into --root DIR; leave"):
            data.download(name, root)
    assert not list(tmp_path.iterdir())
