"""The papers' datasets: fixture trees in the official formats with their oddities, the .mat reader, and downloads. Nothing is fetched."""
import hashlib
import io
import json
import struct
import tarfile
import tracemalloc
import urllib.request
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import data

RECIPE = common.Recipe(image_size=(16, 16), crop="none", hflip=0.0)


@pytest.fixture(autouse=True)
def every_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def photo(path, size=(24, 18), mode="RGB", format="JPEG", colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if colour is not None else 0).save(path, format)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def names(split, base):
    return [str(Path(p).relative_to(base)) for p in split.paths]


def load(name, root, **settings):
    return data.load(name, root, replace(RECIPE, **settings))


# ------------------------------------------------------------------------------------------------ a writer of .mat files

CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13, "i8": 14, "u8": 15}
STORAGE = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9, "i8": 12, "u8": 13}


def element(order, kind, payload):
    if 0 < len(payload) <= 4:  # the small form
        return struct.pack(order + "I", len(payload) << 16 | kind) + payload.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(payload)) + payload + b"\0" * (-len(payload) % 8)


def matrix(order, value, name=""):
    """Array, (array, storage type), str, (bytes, codec type, dims), list (n x 1 cell), object array (cell) or dict of lists (1 x n struct) -> a matrix element."""
    def head(kind, dims):
        return element(order, 6, struct.pack(order + "II", kind, 0)) + element(order, 5, struct.pack(f"{order}{len(dims)}i", *dims)) + element(order, 1, name.encode())

    if isinstance(value, str):
        body = head(4, (1, len(value))) + element(order, 17, value.encode("utf-16-le" if order == "<" else "utf-16-be"))
    elif isinstance(value, tuple) and isinstance(value[0], bytes):
        body = head(4, value[2]) + element(order, value[1], value[0])
    elif isinstance(value, list):
        body = head(1, (len(value), 1)) + b"".join(matrix(order, v) for v in value)
    elif isinstance(value, dict):
        rows = list(zip(*value.values()))
        body = head(2, (1, len(rows))) + element(order, 5, struct.pack(order + "i", 32)) + element(order, 1, b"".join(k.encode().ljust(32, b"\0") for k in value))
        body += b"".join(matrix(order, v) for row in rows for v in row)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        body = head(1, value.shape) + b"".join(matrix(order, v) for v in value.ravel(order="F"))
    else:
        array, storage = value if isinstance(value, tuple) else (value, value.dtype.str[1:])
        stored = array.astype(order + storage).tobytes(order="F")
        body = head(CLASSES[array.dtype.str[1:]], array.shape) + element(order, STORAGE[storage], stored)
    return struct.pack(order + "II", 14, len(body)) + body


def mat(order="<", compress=False, **variables):
    out = b"MATLAB 5.0 MAT-file, made by a test".ljust(124) + struct.pack(order + "H", 0x100) + (b"IM" if order == "<" else b"MI")
    for name, value in variables.items():
        body = matrix(order, value, name)
        packed = zlib.compress(body)
        out += struct.pack(order + "II", 15, len(packed)) + packed if compress else body
    return out


def row(*values, dtype="f8", storage="u1"):
    return np.array([values], dtype), storage


def one(value, storage="u1"):
    return row(value, storage=storage)


EVERY_KIND = dict(
    numbers=np.arange(6.0).reshape(2, 3), labels=row(1, 77, 102), ids=row(8189, 300, storage="u2"), text="Ram C/V Cargo Van ü", cell=["a", "bc", np.array([[7]], "i4")],
    records={"class": [one(196), one(3)], "fname": ["00001.jpg", "00002.jpg"]}, nested=[{"deep": [["x"]]}],
    square=np.array([["a", "b", "c"], ["d", "e", "f"]], object),
)

# ------------------------------------------------------------------------------------------------ read_mat


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compress", [False, True])
def test_read_mat_reads_numbers_text_cells_and_structs_compressed_or_not_in_both_byte_orders(order, compress, tmp_path):
    write(tmp_path / "all.mat", mat(order, compress, **EVERY_KIND))
    got = data.read_mat(tmp_path / "all.mat")
    assert list(got) == list(EVERY_KIND)
    assert got["numbers"].dtype == np.float64 and got["numbers"].dtype.isnative
    np.testing.assert_array_equal(got["numbers"], np.arange(6.0).reshape(2, 3))
    assert got["labels"].tolist() == [[1, 77, 102]] and got["ids"].tolist() == [[8189, 300]]
    assert got["text"] == "Ram C/V Cargo Van ü"
    assert got["cell"].shape == (3, 1) and got["cell"][:2, 0].tolist() == ["a", "bc"] and got["cell"][2, 0].tolist() == [[7]]
    assert got["records"]["fname"].tolist() == [["00001.jpg", "00002.jpg"]]
    assert [v.item() for v in got["records"]["class"][0]] == [196, 3]
    assert got["square"].tolist() == [["a", "b", "c"], ["d", "e", "f"]]
    assert got["nested"][0, 0]["deep"][0, 0][0, 0] == "x"


@pytest.mark.parametrize("storage", STORAGE)
def test_read_mat_reads_every_storage_type_also_in_small_elements(storage):
    low = -3 if storage[0] in "if" else 3
    for n in (1, 2, 4, 9):  # 1 to 4 bytes are small elements
        values = np.arange(low, low + n).reshape(1, n)
        got = data.read_mat(mat(v=(values.astype("f8"), storage)))["v"]
        assert got.tolist() == values.tolist() and got.dtype == np.dtype(storage)


def test_read_mat_reads_text_in_every_encoding_and_as_rows():
    for kind, codec in ((16, "utf-8"), (17, "utf-16-le"), (4, "utf-16-le"), (18, "utf-32-le"), (2, "latin-1"), (1, "latin-1")):
        assert data.read_mat(mat(v=("é1".encode(codec), kind, (1, 2))))["v"] == "é1"
    assert data.read_mat(mat(v=(b"adbecf", 16, (2, 3))))["v"] == ["abc", "def"]  # column by column
    assert data.read_mat(mat(v=(b"", 17, (0, 0))))["v"] == ""


def test_read_mat_refuses_what_is_no_level_5_file_and_names_it(tmp_path):
    newer = mat(v=row(1))[:124] + struct.pack("<H", 0x200) + b"IM"
    cut = zlib.compress(matrix("<", row(1, 2, 3), "v"))[:-2]  # zlib without the end of its checksum
    for content in (b"", b"text", newer + b"\0" * 600, mat(v=row(*range(20)))[:-4], mat(compress=True, v=row(*range(20)))[:-3], mat()[:-1], mat() + struct.pack("<II", 15, len(cut)) + cut):
        write(tmp_path / "bad.mat", content)
        with pytest.raises(ValueError, match="bad.mat.*unpack the official archive again"):
            data.read_mat(tmp_path / "bad.mat")
    assert data.read_mat(mat()) == {}


def peak(action):
    """What `action` gives or raises, and the most bytes it held."""
    tracemalloc.start()
    try:
        try:
            result = action()
        except ValueError as error:
            result = error
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bombs():
    element14 = lambda body: struct.pack("<II", 14, len(body)) + body
    head = lambda kind, dims: element("<", 6, struct.pack("<II", kind, 0)) + element("<", 5, struct.pack(f"<{len(dims)}i", *dims)) + element("<", 1, b"v")
    start = mat()
    zeros = zlib.compress(bytes(100_000_000))
    yield "zlib", start + struct.pack("<II", 15, len(zeros)) + zeros
    packed = zlib.compress(element14(head(6, (1, 10**8)) + struct.pack("<II", 9, 8 * 10**7) + bytes(8 * 10**7)))
    yield "numbers", start + struct.pack("<II", 15, len(packed)) + packed
    yield "dimensions", start + element14(head(6, (2**31 - 1,) * 30) + element("<", 9, bytes(8)))
    yield "many dimensions", start + element14(head(6, (2**31 - 1,) * 300_000) + element("<", 9, bytes(8)))
    yield "negative", start + element14(head(6, (-1, -8)) + element("<", 9, bytes(64)))
    yield "cells announced", start + element14(head(1, (2**30, 2)))
    yield "empty cells", start + element14(head(1, (400_000, 1)) + struct.pack("<II", 14, 0) * 400_000)
    fields = element("<", 5, struct.pack("<i", 4)) + element("<", 1, b"".join(b"%03x\0" % (i % 4096) for i in range(900_000)))
    yield "fields", start + element14(head(2, (0, 0)) + fields)
    yield "field width 0", start + element14(head(2, (1, 1)) + element("<", 5, struct.pack("<i", 0)) + element("<", 1, b"abcdefgh"))
    yield "rows of text", start + element14(head(4, (2**31 - 1, 0)) + element("<", 16, b"x" * 9))
    yield "short rows of text", start + element14(head(4, (1_200_000, 2)) + element("<", 16, b"ab" * 1_200_000))
    yield "wide text", start + element14(head(4, (1, 10**6)) + element("<", 16, "\U0001f426".encode() + b"x" * 10**6))
    deep = b""
    for _ in range(5000):
        deep = element14(head(1, (1, 1)) + deep)
    yield "nested", start + deep
    yield "reserved type", start + element14(head(6, (1, 1)) + element("<", 11, bytes(8)))


@pytest.mark.parametrize("name, content", list(bombs()), ids=lambda v: v if isinstance(v, str) else "")
def test_read_mat_gives_an_array_or_a_value_error_in_bounded_memory_for_hostile_files(name, content):
    result, held = peak(lambda: data.read_mat(content))
    assert isinstance(result, (dict, ValueError))
    assert held < max(10 * len(content), 40 * 2**20)


def test_read_mat_gives_an_array_or_a_value_error_for_ten_thousand_mutated_files():
    rng = np.random.default_rng(0)
    bases = [mat(**{k: v}) for k, v in EVERY_KIND.items()] + [mat("<", True, **EVERY_KIND), mat(">", False, **EVERY_KIND), mat("<", False, **EVERY_KIND)]
    hostile = [struct.pack("<I", v) for v in (0, 1, 2, 7, 8, 14, 15, 2**16 + 1, 2**20, 2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1)]
    read = refused = 0
    tracemalloc.start()
    for i in range(10_000):
        content = bytearray(bases[i % len(bases)])
        if content[128] == 15 and rng.integers(2):  # damage below the compression
            inner = bytearray(zlib.decompress(content[136:]))  # the first variable's stream
            inner[int(rng.integers(len(inner)))] ^= int(rng.integers(1, 256))
            packed = zlib.compress(inner)
            content[128:] = struct.pack("<II", 15, len(packed)) + packed
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(124, len(content)))
            kind = int(rng.integers(5))
            if kind == 0:
                content[at] ^= int(rng.integers(1, 256))
            elif kind == 1:
                content[at & ~3 : (at & ~3) + 4] = hostile[int(rng.integers(len(hostile)))]
            elif kind == 2:
                del content[max(at, 136) : max(at, 136) + int(rng.integers(1, 16))]
            elif kind == 3:
                content[at:at] = content[at : at + int(rng.integers(1, 64))]
            else:
                del content[max(at, 136) :]
        try:
            assert isinstance(data.read_mat(bytes(content)), dict)
            read += 1
        except ValueError:
            refused += 1
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read > 500 and refused > 3000 and held < 40 * 2**20


# ------------------------------------------------------------------------------------------------ CUB and NABirds

CUB = {  # id: (file, class, train, box x y w h); ids are out of file-name order
    1: ("001.Black_footed_Albatross/B_0046.jpg", 1, 0, "6.0 2.0 10.0 8.0"), 2: ("001.Black_footed_Albatross/B_0009.jpg", 1, 1, "1.0 1.0 5.0 5.0"),
    3: ("001.Black_footed_Albatross/B_0002.jpg", 1, 1, "0.0 0.0 24.0 18.0"), 4: ("002.St.Helena/S_0003.jpg", 2, 1, "10.5 3.0 20.0 6.0"),
    5: ("002.St.Helena/S_0001.jpg", 2, 0, "2.0 2.0 4.0 4.0"), 6: ("002.St.Helena/S_0002.jpg", 2, 1, "2.0 2.0 4.0 4.0"),
    10: ("003.Sooty_Albatross/T_0001.jpg", 3, 0, "2.0 2.0 4.0 4.0"), 11: ("003.Sooty_Albatross/T_0002.jpg", 3, 1, "2.0 2.0 4.0 4.0"),
}


def cub(base, records=CUB):
    for i, (file, *_) in records.items():
        photo(base / "images" / file, mode="L" if i == 2 else "RGB")
    order = sorted(records, reverse=True)  # lines in another order than the ids
    write(base / "images.txt", "".join(f"{i} {records[i][0]}\n" for i in sorted(records)))
    write(base / "image_class_labels.txt", "".join(f"{i} {records[i][1]}\n" for i in order))
    write(base / "train_test_split.txt", "\n".join(f"{i} {records[i][2]}" for i in order))  # no newline at the end
    write(base / "bounding_boxes.txt", "".join(f"{i} {records[i][3]}\n" for i in order))
    write(base / "classes.txt", "1 001.Black_footed_Albatross\n2 002.St.Helena\n3 003.Sooty_Albatross\n")
    write(base / "parts/parts.txt", "1 back\n2 left eye\n10 throat\n")
    write(base / "parts/part_locs.txt", "1 1 12.0 6.0 1\n1 2 8.0 3.0 1\n1 10 0.0 0.0 0\n4 2 30.0 5.0 1\n99 1 1 1 1\n")
    return base


@pytest.mark.parametrize("inside", [True, False])
def test_cub_is_joined_by_id_with_boxes_parts_and_class_names(tmp_path, inside):
    base = cub(tmp_path / "CUB_200_2011")
    splits = load("cub", tmp_path if inside else base)
    assert splits.classes == ["Black footed Albatross", "St.Helena", "Sooty Albatross"]
    assert names(splits.train, base / "images") == [CUB[i][0] for i in (2, 3, 4, 6, 11)] and splits.train.labels == [0, 0, 1, 1, 2]
    assert names(splits.test, base / "images") == [CUB[i][0] for i in (1, 5, 10)] and splits.test.labels == [0, 1, 2] and splits.val is None
    assert splits.train.boxes[2].tolist() == [10.5, 3, 30.5, 9]  # over the photo's right edge at 24, as given
    assert splits.test.boxes.tolist() == [[6, 2, 16, 10], [2, 2, 6, 6], [2, 2, 6, 6]]
    assert splits.test.part_names == ("back", "left eye", "throat") and splits.test.signature == (True,) * 3
    # the box's longer side is 10 pixels, so a part reaches one pixel to each side; 20: two pixels
    np.testing.assert_array_equal(splits.test.parts[0], np.float32([[11, 5, 13, 7], [7, 2, 9, 4], [np.nan] * 4]))
    np.testing.assert_array_equal(splits.train.parts[2], np.float32([[np.nan] * 4, [28, 3, 32, 7], [np.nan] * 4]))
    photos = data.Photos(splits.train, replace(RECIPE, boxes=True), train=False)
    assert photos[0][0].shape == (3, 16, 16) and photos.region(2, (18, 24)) == (10.5, 3, 24, 9)  # a gray photo; a box past the edge is clipped


def test_the_order_of_cub_s_lines_does_not_matter_and_missing_parts_are_none(tmp_path):
    base = cub(tmp_path)
    before = load("cub", base)
    lines = (base / "images.txt").read_text().splitlines()
    write(base / "images.txt", "\r\n".join(lines[::-1]) + "\r\n\r\n")
    (base / "parts/part_locs.txt").unlink()
    after = load("cub", base)
    assert after.train.paths == before.train.paths and after.test.labels == before.test.labels
    assert after.train.parts is None and after.train.part_names == ()


@pytest.mark.parametrize("file, change, message", [
    ("images.txt", lambda t: t + "3 001.Black/again.jpg\n", r"images.txt, line 9: 3 comes a second time"),
    ("image_class_labels.txt", lambda t: t.replace("4 2\n", ""), r"image_class_labels.txt has no line for 4"),
    ("image_class_labels.txt", lambda t: t.replace("4 2\n", "4 7\n"), r"classes.txt has no line for 7"),
    ("image_class_labels.txt", lambda t: t.replace("4 2\n", "4 two\n"), r"image_class_labels.txt: cannot read the line of 4: 'two'"),
    ("train_test_split.txt", lambda t: t.replace("4 1", "4 2"), r"train_test_split.txt: cannot read the line of 4: '2'"),
    ("bounding_boxes.txt", lambda t: t.replace("4 10.5 3.0", "4 10.5"), r"bounding_boxes.txt: cannot read the line of 4"),
    ("parts/part_locs.txt", lambda t: t + "1 4 1.0 1.0 1\n", r"part_locs.txt, line 6: '1 4 1.0 1.0 1' is not"),
    ("images.txt", lambda t: t.replace("S_0003", "S_0001"), r"S_0001.jpg is listed twice"),
    ("train_test_split.txt", lambda t: t.replace(" 0", " 1"), r"the test split has no photos"),
])
def test_a_damaged_index_is_an_error_that_names_the_file_and_the_line(tmp_path, file, change, message):
    base = cub(tmp_path)
    write(base / file, change((base / file).read_text()))
    with pytest.raises(ValueError, match=message):
        load("cub", tmp_path)


def test_a_photo_that_the_index_lists_and_nobody_has_is_an_error_that_names_it(tmp_path):
    base = cub(tmp_path)
    (base / "images" / CUB[4][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"S_0003.jpg is listed but not there \(1 of 8 photos are missing\); unpack the official archive again"):
        load("cub", tmp_path)


def test_a_wrong_root_says_what_is_missing_and_where_to_get_it(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, source in data.SOURCES.items():
        with pytest.raises(FileNotFoundError) as error:
            load(name, tmp_path / "empty")
        text = str(error.value)
        assert str(tmp_path / "empty") in text and source.folders[0] in text and source.page in text and all(file in text for file in source.layouts[0])
        for file, size, digest, _ in source.archives:
            assert file in text and digest in text and (not size or f"{size:,} bytes" in text)
            assert file.endswith(".mat") or f"{file} -{'d' if file.endswith('.zip') else 'C'} {tmp_path / 'empty'}" in text
        assert ("tar -xf" in text or "unzip" in text) == (name != "fmow")
        assert ("--download" in text) == (name in ("cub", "flowers", "aircraft", "dogs"))
    base = cub(tmp_path / "CUB_200_2011")
    (base / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="CUB_200_2011 lacks classes.txt; "):
        load("cub", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load("cub", tmp_path / "nowhere")


def test_published_counts_are_those_of_the_fact_sheet():
    assert data.PUBLISHED == {
        "imagenet": (1000, 1_281_167, 50_000), "cub": (200, 5994, 5794), "cars": (196, 8144, 8041), "aircraft": (100, 6667, 3333, 3334), "flowers": (102, 2040, 6149, 1020),
        "dogs": (120, 12_000, 8580), "nabirds": (555, 23_929, 24_633), "plant": (5, 0, 0), "fmow": (62, 363_572, 53_473), "market1501": (751, 12_936, 19_281),
        "dukemtmc": (702, 16_522, 19_889), "veri776": (576, 37_778, 13_257), "msmt17": (1041, 32_621, 93_820, 30_248)}
    assert set(data.PUBLISHED) | {"toy", "folder"} == set(data.DATASETS) and set(data.SOURCES) == set(data.PUBLISHED) - {"imagenet"}


def test_a_full_set_with_a_wrong_count_is_warned_about_and_a_subset_is_not(tmp_path, monkeypatch):
    base = cub(tmp_path)
    for published in ((3, 5, 3), (200, 5994, 5794), (4, 6, 4)):  # exact; subsets: five of six and three of four are under nine tenths
        monkeypatch.setitem(data.PUBLISHED, "cub", published)
        load("cub", base)  # every warning is an error here
    for published, message in (((3, 5, 4), "3 test images instead of 4 as published"), ((4, 5, 3), "3 classes instead of 4 as"), ((3, 4, 9), "5 training images instead of 4, 3 test images instead of 9")):
        monkeypatch.setitem(data.PUBLISHED, "cub", published)
        with pytest.warns(UserWarning, match=message):
            load("cub", base)
    monkeypatch.setitem(data.PUBLISHED, "imagenet", (2, 100, 50))
    few, most = (data.Splits(data.Split([""] * n, [0] * n), data.Split([""] * 44, [0] * 44), ["a", "b"]) for n in (89, 90))
    data.check("imagenet", few, RECIPE)
    with pytest.warns(UserWarning, match="90 training images instead of 100, 44 test images instead of 50 as published"):
        data.check("imagenet", most, RECIPE)


def nabirds(base):
    records = {  # uuid: (file, class, train, box)
        "9b5b-aa": ("0295/zz.jpg", 295, 1, "1 2 10 4"), "0000-13": ("1010/aa.jpg", 1010, 1, "0 0 24 18"), "77e2-01": ("0817/ab.jpg", 817, 0, "3 3 3 3"),
        "1f00-10": ("0817/cd.jpg", 817, 1, "3 3 3 3"), "0a00-10": ("0295/ef.jpg", 295, 0, "3 3 3 3"), "0b00-10": ("1010/gh.jpg", 1010, 0, "3 3 3 3"),
    }
    for file, *_ in records.values():
        photo(base / "images" / file)
    for column, file in enumerate(("images", "image_class_labels", "train_test_split", "bounding_boxes")):
        write(base / f"{file}.txt", "\n".join(f"{i} {r[column]}" for i, r in records.items()))
    write(base / "classes.txt", "0 Birds\n22 Ducks, Geese, and Swans\n295 Oak Titmouse\n817 Bullock's Oriole (Adult male)\n1010 Dark-eyed Junco (Gray-headed)\n")
    write(base / "parts/parts.txt", "0 bill\n1 crown\n")
    write(base / "parts/part_locs.txt", "".join(f"{i} {p} 5 6 {int(i == '9b5b-aa' and p == 0)}\n" for i in records for p in (0, 1)))
    return base


def test_nabirds_numbers_its_sparse_class_ids_in_ascending_order_and_keeps_names_with_spaces_and_brackets(tmp_path):
    base = nabirds(tmp_path / "nabirds/nabirds")  # the doubled folder of the official repositories
    for root in (tmp_path, tmp_path / "nabirds", base):
        splits = load("nabirds", root)
        assert splits.classes == ["Oak Titmouse", "Bullock's Oriole (Adult male)", "Dark-eyed Junco (Gray-headed)"]
        assert names(splits.train, base / "images") == ["1010/aa.jpg", "0817/cd.jpg", "0295/zz.jpg"] and splits.train.labels == [2, 1, 0]
        assert names(splits.test, base / "images") == ["0295/ef.jpg", "1010/gh.jpg", "0817/ab.jpg"] and splits.test.labels == [0, 2, 1]
        assert splits.train.boxes[2].tolist() == [1, 2, 11, 6] and splits.train.part_names == ("bill", "crown")
        np.testing.assert_array_equal(splits.train.parts[2], np.float32([[4, 5, 6, 7], [np.nan] * 4]))


# ------------------------------------------------------------------------------------------------ Cars, Aircraft, Flowers, Dogs

CAR_NAMES = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"]


def annos(files, boxes, classes=None, **more):
    table = {f"bbox_{k}": [one(b[i], "u2" if b[i] > 255 else "u1") for b in boxes] for i, k in enumerate(("x1", "y1", "x2", "y2"))}
    return table | ({"class": [one(c) for c in classes]} if classes else {}) | {"fname": files} | more


def cars(base):
    boxes = [(3, 4, 20, 15), (1, 1, 24, 18), (2, 2, 300, 9)]  # the last one runs past the edge
    for side in ("train", "test"):
        for i in (1, 2, 3):
            photo(base / f"cars_{side}/{i:05d}.jpg", mode="L" if i == 3 else "RGB")
    files = ["00002.jpg", "00001.jpg", "00003.jpg"]  # not in order
    write(base / "devkit/cars_train_annos.mat", mat(compress=True, annotations=annos(files, boxes, [2, 1, 3])))
    write(base / "devkit/cars_test_annos.mat", mat(annotations=annos(files, boxes)))
    write(base / "cars_test_annos_withlabels.mat", mat(annotations=annos(files, boxes, [3, 2, 2])))
    write(base / "devkit/cars_meta.mat", mat(class_names=CAR_NAMES))
    return base


@pytest.mark.parametrize("inside", [True, False])
def test_cars_in_the_original_layout(tmp_path, inside):
    base = cars(tmp_path / "stanford_cars")
    splits = load("cars", tmp_path if inside else base)
    assert splits.classes == CAR_NAMES
    assert names(splits.train, base) == [f"cars_train/0000{i}.jpg" for i in (1, 2, 3)] and splits.train.labels == [0, 1, 2]
    assert names(splits.test, base) == [f"cars_test/0000{i}.jpg" for i in (1, 2, 3)] and splits.test.labels == [1, 2, 1]
    assert splits.train.boxes.tolist() == [[0, 0, 24, 18], [2, 3, 20, 15], [1, 1, 300, 9]]  # from 1-based inclusive to half-open


def test_cars_without_the_labels_of_the_test_set_says_which_file_is_needed(tmp_path):
    base = cars(tmp_path)
    (base / "cars_test_annos_withlabels.mat").rename(base / "devkit/cars_test_annos_withlabels.mat")
    assert load("cars", base).test.labels == [1, 2, 1]  # may also lie in devkit
    write(base / "devkit/cars_test_annos_withlabels.mat", (base / "devkit/cars_test_annos.mat").read_bytes())
    with pytest.raises(ValueError, match="withlabels.mat has no annotations.class"):
        load("cars", base)
    (base / "devkit/cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"cars_test_annos_withlabels.mat is missing.*185,758 bytes, md5 b0a2b23655a3edd16d84508592a98d10"):
        load("cars", base)


def test_cars_in_the_combined_layout(tmp_path):
    files = [f"car_ims/00000{i}.jpg" for i in (3, 1, 2)]
    for file in files:
        photo(tmp_path / file)
    table = annos(files, [(5, 5, 9, 9)] * 3, [129, 1, 2], test=[one(1), one(0), one(0)])
    table["relative_im_path"] = table.pop("fname")
    class_names = [f"car {i}" for i in range(1, 130)]
    write(tmp_path / "cars_annos.mat", mat(compress=True, annotations=table, class_names=class_names))
    splits = load("cars", tmp_path)
    assert names(splits.train, tmp_path) == files[1:] and splits.train.labels == [0, 1] and splits.classes == class_names
    assert names(splits.test, tmp_path) == files[:1] and splits.test.labels == [128] and splits.test.boxes.tolist() == [[4, 4, 9, 9]]
    write(tmp_path / "cars_annos.mat", mat(annotations=table, class_names=class_names[:100]))
    with pytest.raises(ValueError, match="000003.jpg has class number 129, but there are 100 classes"):
        load("cars", tmp_path)
    for damage in ({"class": ["two", one(1), one(2)]}, {"test": [np.zeros((1, 2)), one(1), one(2)]}, {"relative_im_path": [one(1), files[1], files[2]]}):
        write(tmp_path / "cars_annos.mat", mat(annotations=table | damage, class_names=class_names))
        with pytest.raises(ValueError, match=f"cars_annos.mat: annotations.{list(damage)[0]} does not hold one (number|text) each"):
            load("cars", tmp_path)


@pytest.mark.parametrize("train, test", [("cars_train", "cars_test"), ("train", "test")])
def test_cars_in_class_folders(tmp_path, train, test):
    for side in (train, test):
        for car in ("Acura RL Sedan 2012", "smart fortwo Convertible 2012"):
            photo(tmp_path / side / car / "00001.jpg")
    splits = load("cars", tmp_path)
    assert splits.classes == ["Acura RL Sedan 2012", "smart fortwo Convertible 2012"] and splits.test.labels == [0, 1]
    assert names(splits.test, tmp_path / test) == ["Acura RL Sedan 2012/00001.jpg", "smart fortwo Convertible 2012/00001.jpg"]


def aircraft(base):
    lines = {"train": ["0034309 F/A-18", "0000002 737-700"], "val": ["0000009 Boeing 717"], "test": ["0000011 737-700", "0000010 Boeing 717"]}
    lines["trainval"] = lines["train"] + lines["val"]
    for side, found in lines.items():
        write(base / f"images_variant_{side}.txt", "\n".join(found))
        for line in found:
            image = Image.new("RGB", (60, 80), (0, 0, 255))
            image.paste((255, 0, 0), (0, 60, 60, 80))  # the banner
            (base / "images").mkdir(exist_ok=True)
            image.save(base / "images" / f"{line.split()[0]}.jpg", quality=95)
    write(base / "variants.txt", "737-700\nF/A-18\nBoeing 717\n")
    write(base / "families.txt", "Boeing 737\nF/A-18\nBoeing 717\n")
    write(base / "images_box.txt", "0034309 1 1 60 80\n0000002 11 21 40 75\n0000009 1 1 9 9\n0000010 1 1 9 9\n0000011 1 1 9 9\n")
    return base


def test_aircraft_keeps_leading_zeros_names_with_slashes_and_the_order_of_variants_txt(tmp_path):
    base = aircraft(tmp_path / "fgvc-aircraft-2013b/data")
    for root in (tmp_path, tmp_path / "fgvc-aircraft-2013b", base):
        splits = load("aircraft", root)
        assert splits.classes == ["737-700", "F/A-18", "Boeing 717"] and splits.val is None
        assert names(splits.train, base / "images") == ["0000002.jpg", "0000009.jpg", "0034309.jpg"] and splits.train.labels == [0, 2, 1]
        assert names(splits.test, base / "images") == ["0000010.jpg", "0000011.jpg"] and splits.test.labels == [2, 0]
        assert splits.train.boxes.tolist() == [[10, 20, 40, 75], [0, 0, 9, 9], [0, 0, 60, 80]]
    alone = load("aircraft", base, train_split="train")
    assert names(alone.train, base / "images") == ["0000002.jpg", "0034309.jpg"] and names(alone.val, base / "images") == ["0000009.jpg"]
    write(base / "images_variant_test.txt", "0000010 Concorde")
    with pytest.raises(ValueError, match="images_variant_test.txt: cannot read the line of 0000010: 'Concorde'"):
        load("aircraft", base)


def test_crop_banner_cuts_the_bottom_20_pixels_of_aircraft_with_and_without_boxes(tmp_path):
    base = aircraft(tmp_path)
    for settings, banner, region in (({}, True, None), ({"crop_banner": True}, False, (0, 0, 60, 60)), ({"crop_banner": True, "boxes": True}, False, (10, 20, 40, 60))):
        split, recipe = load("aircraft", base, **settings).train, replace(RECIPE, **settings)
        photos = data.Photos(split, recipe, train=False)
        red = photos[0][0][0].float().mean()
        assert (red > 50) == banner and photos.region(0, (80, 60)) == region


def flowers(base, names_of_ids=("trnid", "valid", "tstid")):
    for i in range(1, 7):
        photo(base / f"jpg/image_{i:05d}.jpg")
    write(base / "imagelabels.mat", mat(compress=True, labels=row(77, 1, 60, 77, 1, 60)))
    ids = (row(5, 2, storage="f8"), row(6, storage="u2"), row(4, 3, 1, storage="u1"))
    write(base / "setid.mat", mat(**dict(zip(names_of_ids, ids))))
    return base


@pytest.mark.parametrize("inside", [True, False])
def test_flowers_trains_on_trnid_and_valid_and_tests_on_tstid(tmp_path, inside):
    base = flowers(tmp_path / "flowers-102")
    splits = load("flowers", tmp_path if inside else base)
    assert names(splits.train, base) == [f"jpg/image_0000{i}.jpg" for i in (2, 5, 6)] and splits.train.labels == [0, 0, 59]
    assert names(splits.test, base) == [f"jpg/image_0000{i}.jpg" for i in (1, 3, 4)] and splits.test.labels == [76, 59, 76]
    assert len(splits.classes) == 102 and splits.classes[0] == "pink primrose" and splits.classes[59] == "pink-yellow dahlia?"
    alone = load("flowers", base, train_split="train")
    assert names(alone.train, base) == ["jpg/image_00002.jpg", "jpg/image_00005.jpg"] and alone.val.labels == [59]
    assert len(load("flowers", base, val_fraction=0.5).val) == 1  # one of the two of class 0; the single one of class 59 stays in train


def test_flowers_with_damaged_lists_names_the_file(tmp_path):
    base = flowers(tmp_path)
    write(base / "imagelabels.mat", mat(labels=row(77, 1, 60)))
    with pytest.raises(ValueError, match="setid.mat: trnid, valid lists image 2 to 6 of 3"):
        load("flowers", base)
    write(base / "imagelabels.mat", mat(labels=row(77, 1, 60, 103, 1, 60)))
    with pytest.raises(ValueError, match="image_00004.jpg has class number 103, but there are 102 classes"):
        load("flowers", base)
    flowers(base, ("trnid", "valid", "test"))
    with pytest.raises(ValueError, match="setid.mat has no tstid"):
        load("flowers", base)
    write(base / "setid.mat", b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="setid.mat: damaged or no MATLAB level 5 file"):
        load("flowers", base)


DOGS = ["n02085620-Chihuahua/n02085620_7.jpg", "n02089078-black-and-tan_coonhound/n02089078_2.jpg", "n02085620-Chihuahua/n02085620_10.jpg", "n02089078-black-and-tan_coonhound/n02089078_1.jpg"]


def dogs(base, text=False, boxes=True):
    for i, file in enumerate(DOGS):
        photo(base / "Images" / file, mode="RGBA" if i == 1 else "RGB", format="PNG" if i == 1 else "JPEG")  # a PNG with alpha under a JPEG's name
        if boxes:
            extra = "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></object>"
            write(base / "Annotation" / file[:-4], f"<annotation>{extra}<object><name>x</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>{20 + i}</xmax><ymax>17</ymax></bndbox></object></annotation>")
    for side, files in (("train", DOGS[:2]), ("test", DOGS[2:])):
        if text:
            write(base / f"{side}_list.txt", "\n".join(f"{f} {1 + (f > 'n02087')}" for f in files))
        else:
            write(base / f"{side}_list.mat", mat(compress=True, file_list=files, annotation_list=[f[:-4] for f in files], labels=row(1, 2)))
    return base


@pytest.mark.parametrize("text", [False, True])
def test_dogs_from_lists_with_hyphenated_breeds_boxes_and_a_png_named_jpg(tmp_path, text):
    base = dogs(tmp_path / "ImageNetDogs", text)
    for root in (tmp_path, base):
        splits = load("dogs", root)
        assert splits.classes == ["Chihuahua", "black-and-tan coonhound"]
        assert names(splits.train, base / "Images") == DOGS[:2] and splits.train.labels == [0, 1] and splits.test.labels == [0, 1]
        assert names(splits.test, base / "Images") == DOGS[2:]
        assert splits.train.boxes.tolist() == [[2, 3, 20, 17], [2, 3, 21, 17]]  # the larger of two
        assert data.Photos(splits.train, RECIPE, train=False)[1][0].shape == (3, 16, 16)
        assert "ImageNet" in splits.note


def test_dogs_without_annotations_has_no_boxes_and_a_damaged_one_is_named(tmp_path):
    assert load("dogs", dogs(tmp_path / "a", boxes=False)).train.boxes is None
    base = dogs(tmp_path / "b")
    for content in ("<annotation><object></object></annotation>", "<annotation>", "<a><bndbox><xmin>1</xmin></bndbox></a>"):
        write(base / "Annotation" / DOGS[0][:-4], content)
        with pytest.raises(ValueError, match="n02085620_7 holds no object box"):
            load("dogs", base)


# ------------------------------------------------------------------------------------------------ plants and fMoW


def plant(base, n=10):
    lines = [f"Train_{i},{int(i % 4 == 0)},{int(i % 4 == 1)},{int(i % 4 == 2)},{int(i % 4 == 3)}" for i in range(4 * n)]
    write(base / "train.csv", "\r\n".join(["image_id,healthy,multiple_diseases,rust,scab", *lines, ""]))
    for i in range(4 * n):
        photo(base / f"images/Train_{i}.jpg", (8, 8))
    photo(base / "images/Test_0.jpg")
    return base


def test_plant_is_the_set_of_2020_with_a_fifth_of_each_class_held_out_as_its_test_labels_are_hidden(tmp_path):
    base = plant(tmp_path / "plant-pathology-2020-fgvc7")
    splits = load("plant", tmp_path)
    assert splits.classes == ["healthy", "multiple_diseases", "rust", "scab"] and "hidden" in splits.note
    assert np.bincount(splits.test.labels).tolist() == [2] * 4 and np.bincount(splits.train.labels).tolist() == [8] * 4
    for split in (splits.train, splits.test):
        assert [int(Path(p).stem[6:]) % 4 for p in split.paths] == split.labels
    assert not set(splits.train.paths) & set(splits.test.paths)
    table = (base / "train.csv").read_text().split()
    write(base / "train.csv", "\n".join(table[:1] + table[:0:-1]))  # lines in another order: the same split
    assert load("plant", base).test.paths == splits.test.paths


@pytest.mark.parametrize("line, marks", [("Train_1,0,0,0,0", "0,0,0,0"), ("Train_1,0,1,1,0", "0,1,1,0"), ("Train_1,0,1,0", "0,1,0"), ("Train_0,1,0,0,0", "1,0,0,0")])
def test_a_plant_without_exactly_one_mark_is_an_error_that_names_it(tmp_path, line, marks):
    base = plant(tmp_path)
    write(base / "train.csv", (base / "train.csv").read_text().replace("Train_1,0,1,0,0", line))
    with pytest.raises(ValueError, match=rf"train.csv: the line of {line.split(',')[0]} must come once and have a single 1 among 4 columns, not {marks}"):
        load("plant", base)


def test_the_plants_of_2021_are_refused_by_name(tmp_path):
    base = plant(tmp_path)
    write(base / "train.csv", "image,labels\n800113bb.jpg,rust scab\n")
    with pytest.raises(ValueError, match="begins with 'image', not image_id"):
        load("plant", base)


def test_plant_reads_icassava_too_the_five_classes_of_the_paper_s_table_1(tmp_path):
    for kind in ("cbb", "cbsd", "cgm", "cmd", "healthy"):
        for i in range(5):
            photo(tmp_path / f"cassavaleafdata/train/{kind}/train-{kind}-{i}.jpg", (8, 8))
    splits = load("plant", tmp_path)
    assert splits.classes == ["cbb", "cbsd", "cgm", "cmd", "healthy"] and "iCassava" in splits.note
    assert np.bincount(splits.test.labels).tolist() == [1] * 5 and np.bincount(splits.train.labels).tolist() == [4] * 5
    for kind in splits.classes:
        for side in ("test", "validation"):
            photo(tmp_path / f"cassavaleafdata/{side}/{kind}/{side}-{kind}-0.jpg", (8, 8))
    splits = load("plant", tmp_path / "cassavaleafdata")
    assert len(splits.train) == 25 and splits.test.labels == splits.val.labels == [0, 1, 2, 3, 4] and "test-cbb-0" in splits.test.paths[0]


def fmow(base, test=True):
    def place(folder, stem, category, boxes):
        photo(folder / f"{stem}_rgb.jpg", (200, 100))
        photo(folder / f"{stem}_msrgb.jpg", (200, 100))  # the decoy
        return json.dumps({"bounding_boxes": boxes})

    false = {"ID": -1, "category": "false_detection", "box": [0, 0, 90, 90]}
    good = {"ID": 3, "category": "airport", "box": [50, 20, 100, 30]}
    for side in ("train", "val"):
        for category in ("zoo", "airport"):
            for n in (0, 1):
                stem, folder = f"{category}_{n}_0", base / side / category / f"{category}_{n}"
                boxes = [false, {**false, "category": category}, {**good, "category": "lake", "box": [9, 9, 9, 9]}, {**good, "category": category, "box": [5, 5, 2, 40]}, {**good, "category": category}] if n else {**good, "category": category}
                write(folder / f"{stem}_rgb.json", place(folder, stem, category, boxes))
    if test:
        pairs = []
        for i, category in ((12, "zoo"), (7, "airport"), (9, "false_detection")):
            text = place(base / f"test/{i:07d}", f"{i:07d}_3", category, [false])
            write(base / f"test_gt/{category}/{category}_0/{category}_0_3_rgb.json", text)
            pairs.append({"input": f"test_gt/{category}/{category}_0", "output": f"test/{i:07d}"})
        write(base / "test_gt_mapping.json", json.dumps(pairs))
    return base


def test_fmow_takes_rgb_photos_and_joins_the_test_labels_by_the_mapping(tmp_path):
    base = fmow(tmp_path / "fmow-rgb")
    for root in (tmp_path, base):
        splits = load("fmow", root)
        assert splits.classes == ["airport", "zoo"] and splits.train.boxes is None
        expected = [f"{c}/{c}_{n}/{c}_{n}_0_rgb.jpg" for c in ("airport", "zoo") for n in (0, 1)]
        assert names(splits.train, base / "train") == expected and names(splits.val, base / "val") == expected and splits.train.labels == [0, 0, 1, 1]
        assert names(splits.test, base / "test") == ["0000007/0000007_3_rgb.jpg", "0000012/0000012_3_rgb.jpg"] and splits.test.labels == [0, 1]
    (base / "test_gt_mapping.json").unlink()
    splits = load("fmow", base)
    assert names(splits.test, base / "val") == expected and splits.val is None and "val is the test split" in splits.note
    photo(base / "val/harbour/harbour_0/harbour_0_0_rgb.jpg")
    with pytest.raises(ValueError, match="harbour is no class folder of train"):
        load("fmow", base)


def test_fmow_s_boxes_are_the_first_usable_one_of_the_folder_s_class_and_get_its_context_margin(tmp_path):
    base = fmow(tmp_path)
    splits = load("fmow", base, boxes=True)
    assert splits.train.boxes.tolist() == [[50, 20, 150, 50]] * 4  # a dict instead of a list; after a false detection, another class and 2 pixels
    photos = data.Photos(splits.train, replace(RECIPE, boxes=True), train=False)
    # width 100 of 200: factor 0.15, 7.5 pixels to each side; height 30 of 100: 0.3, 4.5 pixels
    assert photos.region(0, (100, 200)) == (42.5, 15.5, 157.5, 54.5) and photos[0][0].shape == (3, 16, 16)
    assert data.Photos(splits.test, replace(RECIPE, boxes=True), train=False).region(0, (100, 200)) == (0, 0, 200, 100)  # false detections only: all of it
    write(base / "val/zoo/zoo_1/zoo_1_0_rgb.json", "{}")
    with pytest.raises(ValueError, match="zoo_1_0_rgb.json: no bounding_boxes can be read"):
        load("fmow", base, boxes=True)


@pytest.mark.parametrize("side, factor", [(600, 0.15), (500, 0.15), (499, 0.2), (400, 0.2), (399, 0.3), (300, 0.3), (299, 0.5), (200, 0.5), (199, 1), (100, 1), (99, 2)])
def test_fmow_s_context_grows_in_steps_as_the_box_gets_small(side, factor):
    low = (1000 - side) / 2
    x1, _, x2, _ = data.object_region((low, 0, low + side, 100), (100, 1000), context=True)
    assert (x1, x2) == (max(0, low - factor * side / 2), min(1000, low + side + factor * side / 2))


# ------------------------------------------------------------------------------------------------ re-identification


def people(base, folders, files):
    for folder, found in zip(folders, files):
        for file in found:
            photo(base / folder / file, (8, 16))
        write(base / folder / "Thumbs.db", b"\xd0\xcf\x11\xe0")
    return base


MARKET = (
    [f"{i:04d}_c{c}s1_00045{k}_0{k}.jpg" for i in (2, 7, 1501) for c in (1, 6) for k in (1, 2)],
    ["0005_c2s1_000001_00.jpg", "0009_c1s1_000001_00.jpg"],  # 9 has no match in the gallery
    ["-1_c3s2_000001_00.jpg", "0000_c1s1_000002_03.jpg", "0005_c1s1_000003_01.jpg", "0005_c2s1_000004_01.jpg"],
)


@pytest.mark.parametrize("name, folder, inside", [("market1501", "Market-1501-v15.09.15", True), ("market1501", "", False), ("dukemtmc", "DukeMTMC-reID", True)])
def test_market_and_duke_number_training_identities_keep_distractors_and_drop_junk(tmp_path, name, folder, inside):
    base = people(tmp_path / folder, ("bounding_box_train", "query", "bounding_box_test"), MARKET)
    splits = load(name, tmp_path)
    assert splits.classes == ["2", "7", "1501"] and splits.train.labels == [0] * 4 + [1] * 4 + [2] * 4 and splits.train.cameras == [1, 1, 6, 6] * 3
    assert names(splits.train, base / "bounding_box_train") == sorted(MARKET[0]) and splits.train.query is None
    assert names(splits.test, base) == [f"query/{f}" for f in MARKET[1]] + [f"bounding_box_test/{f}" for f in MARKET[2][1:]]
    assert splits.test.labels == [5, 9, 0, 5, 5] and splits.test.cameras == [2, 1, 1, 1, 2] and splits.test.query == [True, True, False, False, False]
    assert "3 training identities" in splits.note


def test_reid_files_with_other_names_or_an_empty_query_are_errors(tmp_path):
    base = people(tmp_path, ("bounding_box_train", "query", "bounding_box_test"), MARKET)
    photo(base / "query/person.jpg")
    with pytest.raises(ValueError, match="query/person.jpg is not named IDENTITY_cCAMERA"):
        load("market1501", base)
    for file in (base / "query").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no photos in query"):
        load("market1501", base)


def test_veri_has_cameras_of_three_digits(tmp_path):
    files = (["0001_c001_00016450_0.jpg", "0776_c020_00016460_0.jpg"], ["0002_c002_00030600_0.jpg"], ["0002_c012_00030605_0.jpg", "0005_c019_00030605_1.jpg"])
    base = people(tmp_path / "VeRi", ("image_train", "image_query", "image_test"), files)
    for root in (tmp_path, base):
        splits = load("veri776", root)
        assert splits.train.cameras == [1, 20] and splits.train.labels == [0, 1] and splits.classes == ["1", "776"]
        assert splits.test.cameras == [2, 12, 19] and splits.test.labels == [2, 2, 5] and splits.test.query == [True, False, False]


def msmt17(base):
    lists = {
        "train": ("train", ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0003/0003_045_12_0303morning_0006_2.jpg 3"]), "val": ("train", ["0000/0000_001_15_0303noon_0015_1.jpg 0"]),
        "query": ("test", ["0000/0000_000_03_0303morning_0015_0.jpg 0"]), "gallery": ("test", ["0001/0001_000_04_0303morning_0015_0.jpg 1", "0000/0000_001_05_0303morning_0015_0.jpg 0"]),
    }
    for name, (folder, lines) in lists.items():
        write(base / f"list_{name}.txt", "\n".join(lines) + "\n")
        for line in lines:
            photo(base / folder / line.split()[0])
    return base


def test_msmt17_reads_its_lists_with_or_without_val(tmp_path):
    base = msmt17(tmp_path / "MSMT17_V1")
    for root in (tmp_path, base):
        splits = load("msmt17", root)
        assert splits.train.labels == [0, 0, 1] and splits.train.cameras == [1, 15, 12] and splits.classes == ["0", "3"]
        assert splits.test.labels == [0, 0, 1] and splits.test.cameras == [3, 5, 4] and splits.test.query == [True, False, False]
        assert names(splits.test, base / "test")[0] == "0000/0000_000_03_0303morning_0015_0.jpg"
    assert load("msmt17", base, train_split="train").train.cameras == [1, 12]
    (base / "list_val.txt").unlink()
    assert load("msmt17", base).train.cameras == [1, 12]
    write(base / "list_query.txt", "0000/query.jpg 0")
    with pytest.raises(ValueError, match=r"list_query.txt: 0000/query.jpg 0 is not"):
        load("msmt17", base)


# ------------------------------------------------------------------------------------------------ downloads


def archive(path, members):
    """A tar of (name, content bytes | dict of TarInfo fields)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(info, key, value)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def hosted(tmp_path, monkeypatch):
    """CUB's archive on a host of its own: (the archive, an empty folder)."""
    cub(tmp_path / "made/CUB_200_2011")
    host = tmp_path / "host"
    host.mkdir()
    made = archive(host / "CUB_200_2011.tgz", [(name, content) for name, content in everything(tmp_path / "made").items() if content is not None] + [("attributes.txt", b"stray")])
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    monkeypatch.setitem(data.DOWNLOADS, "cub", ((made.name, 0, digest, made.as_uri()),))
    return made, tmp_path / "root"


def test_download_fetches_checks_and_unpacks_and_does_so_once(hosted, monkeypatch):
    made, root = hosted
    assert data.download("cub", root) == root / "CUB_200_2011"
    assert len(load("cub", root).train) == 5
    assert set(p.name for p in root.iterdir()) == {"CUB_200_2011", "CUB_200_2011.tgz", "attributes.txt"}  # no .part, no mark of an unfinished unpacking
    made.unlink()
    monkeypatch.delattr(data, "unpack")
    assert data.download("cub", root) == root / "CUB_200_2011"  # nothing is fetched or unpacked again


def test_a_download_with_a_wrong_hash_leaves_nothing_behind(hosted):
    made, root = hosted
    made.write_bytes(made.read_bytes()[:-10])
    with pytest.raises(ValueError, match="instead of.*nothing was kept"):
        data.download("cub", root)
    assert everything(root) == {}
    made.unlink()
    with pytest.raises(FileNotFoundError, match=r"could not download file:.*fetch it by hand to .*CUB_200_2011.tgz"):
        data.download("cub", root)
    assert everything(root) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionResetError])
def test_an_interrupted_download_starts_anew(hosted, monkeypatch, error):
    made, root = hosted
    opened = urllib.request.urlopen

    class Breaks:
        headers = {}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, n, blocks=[b"half"]):
            if blocks:
                return blocks.pop()
            raise error

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Breaks())
    with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
        data.download("cub", root)
    assert everything(root) == {}
    monkeypatch.setattr(urllib.request, "urlopen", opened)
    write(root / "CUB_200_2011.tgz.part", b"left by a process that was killed")
    write(root / "CUB_200_2011.tgz", b"an older archive that is cut short")
    data.download("cub", root)
    assert len(load("cub", root).test) == 3 and not (root / "CUB_200_2011.tgz.part").exists()


def test_an_interrupted_unpacking_is_done_again(hosted, monkeypatch):
    made, root = hosted
    unpack = data.unpack

    def broken(archive, folder):
        unpack(archive, folder)
        (folder / "CUB_200_2011/images" / CUB[1][0]).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "unpack", broken)
    with pytest.raises(KeyboardInterrupt):
        data.download("cub", root)
    monkeypatch.setattr(data, "unpack", unpack)
    made.unlink()  # the archive is there already
    data.download("cub", root)
    assert len(load("cub", root).test) == 3


def test_download_of_other_sets_says_where_to_get_them(tmp_path):
    assert {name: [a[3] for a in archives] for name, archives in data.DOWNLOADS.items()} == {
        "cub": ["https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"],
        "aircraft": ["https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"],
        "flowers": [f"https://www.robots.ox.ac.uk/~vgg/data/flowers/102/{f}" for f in ("102flowers.tgz", "imagelabels.mat", "setid.mat")],
        "dogs": [f"http://vision.stanford.edu/aditya86/ImageNetDogs/{f}.tar" for f in ("images", "annotation", "lists")]}
    with pytest.raises(ValueError, match="can fetch cub, aircraft, flowers, dogs, not market1501; source: its authors.*65005ab7d12ec1c44de4eeafe813e68a"):
        data.download("market1501", tmp_path)
    with pytest.raises(ValueError, match="not toy; leave it out"):
        data.download("toy", tmp_path)
    with pytest.raises(ValueError, match="add --root DIR"):
        data.download("cub", None)
    assert everything(tmp_path) == {}


def link(target, kind=tarfile.SYMTYPE):
    return {"type": kind, "linkname": target}


@pytest.mark.parametrize("members", [
    [("../evil", b"x")], [("a/../../evil", b"x")], [("/tmp/evil-of-a-test", b"x")], [("a/b", link("../../evil"))], [("a", link("/etc/passwd"))],
    [("a", link("../evil", tarfile.LNKTYPE))], [("a", link("..")), ("a/evil", b"x")], [("fifo", {"type": tarfile.FIFOTYPE})], [("null", {"type": tarfile.CHRTYPE})],
    [("a", link("b")), ("b", link("a"))], [("a", link("absent"))],
], ids=lambda m: m[0][0] + str(m[0][1])[:40])
def test_a_tar_that_leads_out_of_its_folder_is_refused_and_writes_nothing_outside(tmp_path, members):
    made = archive(tmp_path / "evil.tgz", [("fine.txt", b"fine"), *members])
    (tmp_path / "in/here").mkdir(parents=True)
    before = set(everything(tmp_path))
    with pytest.raises(ValueError, match="evil.tgz.*delete it"):
        data.unpack(made, tmp_path / "in/here")
    assert set(everything(tmp_path)) - before <= {"in/here/fine.txt", "in/here/a"} and not Path("/tmp/evil-of-a-test").exists()
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_unpack_writes_files_folders_and_copies_of_inner_links_and_names_a_damaged_archive(tmp_path):
    made = archive(tmp_path / "good.tgz", [("d", {"type": tarfile.DIRTYPE}), ("./d/one.txt", b"1"), ("e/two.txt", b"2"), ("d/soft", link("../e/two.txt")), ("hard", link("./d/one.txt", tarfile.LNKTYPE))])
    data.unpack(made, tmp_path / "out")
    assert everything(tmp_path / "out") == {"d": None, "d/one.txt": b"1", "e": None, "e/two.txt": b"2", "d/soft": b"2", "hard": b"1"}
    for content in (b"no tar", made.read_bytes()[:100], made.read_bytes()[: made.stat().st_size // 2]):
        made.write_bytes(content)
        with pytest.raises(ValueError, match="good.tgz: damaged"):
            data.unpack(made, tmp_path / "again")
