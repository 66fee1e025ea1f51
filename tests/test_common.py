"""What the method files share: options, learning rate, weights, pictures, ViT, rollout."""
import argparse
import dataclasses
import hashlib
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor, ImageDraw
from torch import nn
from torch.testing import assert_close

import common


@dataclasses.dataclass(frozen=True)
class Small(common.Options):
    rate: float = common.opt(0.5, "a share, 50 % at first", most=1)
    sizes: tuple[int, int] = common.opt((4, 8), "two sides", least=2)
    marks: tuple[float, ...] = common.opt((), "any number of them")
    kind: str = common.opt("a", "one of two", ("a", "b"))
    fast: bool = common.opt(False, "a switch")


def parsed(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    common.add_options(parser, Small())
    return dataclasses.replace(Small(), **vars(parser.parse_args(words)))


def test_a_field_is_a_typed_flag_and_one_value_stands_for_a_pair():
    assert parsed() == Small()
    given = parsed("--rate", "0.25", "--sizes", "6", "--marks", "1,2.5", "--kind", "b", "--fast")
    assert given == Small(0.25, (6, 6), (1.0, 2.5), "b", True)
    assert parsed("--sizes", "3,9", "--no-fast").sizes == (3, 9)
    for words in (("--sizes", "1,2,3"), ("--sizes", "x"), ("--rate", "x"), ("--sizes", "")):
        with pytest.raises(argparse.ArgumentError):
            parsed(*words)
    parser = argparse.ArgumentParser()
    common.add_options(parser, Small(), shown=lambda f: f.name == "rate")
    assert "a share, 50 % at first [0.5]" in parser.format_help() and "two sides" not in parser.format_help()


DEFAULTS = dict(
    task="classify", image_size=(224, 224), resize=(0, 0), crop="random", crop_area=(0.08, 1.0),
    crop_ratio=(0.75, 4 / 3), pad=0, interpolation="bilinear", normalize="imagenet", hflip=0.5, rotate=0.0,
    translate=0.0, zoom=(1.0, 1.0), affine_prob=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0,
    jitter_prob=1.0, erasing=0.0, boxes=False, val_fraction=0.0, train_split="trainval", crop_banner=False,
    toy_preset="birds", toy_train=0, toy_test=0, batch_size=32, instances=0, epochs=100, iterations=0,
    optimizer="sgd", lr=0.1, lr_batch=0, momentum=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
    schedule="cosine", milestones=(), warmup=0.0, warmup_lr=0.0, min_lr=0.0, label_smoothing=0.0,
    drop_path=0.0, grad_clip=0.0, accumulate=1, amp="auto", weights="none")
SHARES = "crop_area hflip translate affine_prob jitter_prob erasing val_fraction momentum beta2 milestones "
SHARES += "label_smoothing drop_path"


def test_what_a_recipe_does_not_say_and_what_it_may_say():
    assert dataclasses.asdict(common.Recipe()) == DEFAULTS
    assert common.Recipe(batch_size=3).batch_size == 3
    bounds = dict.fromkeys(DEFAULTS, (0, 1e6)) | dict.fromkeys(SHARES.split(), (0, 1)) | {"hue": (0, 0.5)}
    bounds |= dict.fromkeys(("image_size", "batch_size", "epochs", "accumulate"), (1, 1e6))
    found = {f.name: (f.metadata["least"], f.metadata["most"]) for f in dataclasses.fields(common.Recipe)}
    assert found == bounds


def test_a_rows_reserved_keys_are_no_overrides_and_by_dataset_deals_the_values():
    assert common.split_row({"a": 1, "eval": {"b": 2}, "start": "first"}) == ({"a": 1}, {"b": 2}, "first")
    assert common.split_row({}) == ({}, {}, None)
    rows = [("plain", {"x": 0}, 1.5, (2.5, 3.5)), ("whole", {}, 4.5, None)]
    tables = common.by_dataset("3", "title", {"cub": "top1", "cars": "mAP rank1"}, rows)
    first, second = tables["3"], tables["3-cars"]
    assert first == common.Table("title", "cub", "top1", (("plain", {"x": 0}, 1.5), ("whole", {}, 4.5)))
    assert second.rows == (("plain", {"x": 0}, (2.5, 3.5)), ("whole", {}, None))
    assert len(tables) == 2 and (second.data, second.metric) == ("cars", "mAP rank1")


@pytest.mark.parametrize("work, said", [
    (lambda: Small(rate=1.5), "--rate 1.5: allowed are numbers from 0 to 1"),
    (lambda: Small(rate=math.nan), "--rate nan"), (lambda: Small(rate=-math.inf), "--rate -inf"),
    (lambda: Small(sizes=(4, 1)), "--sizes 1: allowed are numbers from 2"),
    (lambda: Small(marks=(0.1, math.inf)), "--marks inf"),
    (lambda: Small(kind="c"), "--kind c: allowed are a, b"),
    (lambda: common.Recipe(crop_area=(0.5, 0.1)), "0.5 to 0.1 is no range"),
    (lambda: common.Recipe(pad=8, image_size=(8, 9)), "pad 8: .* show nothing"),
    (lambda: common.Recipe(crop_ratio=(2, 1)), "no range"),
    (lambda: common.Recipe(zoom=(1.2, 0.8)), "no range"), (lambda: common.Recipe(task="reid"), "--task reid"),
    (lambda: common.Recipe(momentum=1.1), "--momentum 1.1"),
    (lambda: common.Recipe(batch_size=30, instances=4), "a multiple of --instances"),
    (lambda: common.Recipe(batch_size=2, accumulate=3), "at least --accumulate"),
    (lambda: common.check_build("toy", common.Recipe, 8), "build wants a common.Recipe, like RECIPES"),
    (lambda: common.check_build(common.Recipe(), common.Recipe, 1), "and at least 2 classes"),
    (lambda: common.check_images(torch.zeros(3, 8, 6), (8, 6)), "wanted are normalised floats"),
    (lambda: common.check_images(torch.zeros(1, 3, 6, 8), (8, 6)), "wanted are normalised floats"),
    (lambda: common.check_images(torch.zeros(1, 3, 8, 6).byte(), (8, 6)), "wanted are normalised floats"),
    (lambda: common.normalize(torch.zeros(1, 3, 2, 2), "half"), "normalize wants uint8"),
    (lambda: small_vit()(torch.zeros(1, 3, 64, 32)), r"normalised floats \(B, 3, 32, 32\)"),
    (lambda: small_vit(image_size=(100, 64)), "use multiples of the patch size 8"),
    (lambda: common.load_vit(small_vit(), "default"), "no official weights"),
    (lambda: common.resize_pos_embed(torch.zeros(1, 64, 2), (7, 9), "bilinear"), "63 patches: no known"),
])
def test_values_out_of_range_impossible_recipes_and_wrong_use_are_refused_with_what_is_wanted(work, said):
    common.check_build(common.Recipe(), common.Recipe, 2)
    common.check_images(torch.zeros(2, 3, 8, 6), (8, 6))
    with pytest.raises(ValueError, match=said):
        work()


WARM = dict(  # the peak is 1.0 * 32 / 64
    lr=1.0, lr_batch=64, batch_size=32, warmup=2, warmup_lr=0.1, epochs=10, min_lr=0.05)


@pytest.mark.parametrize("settings, group, expected", [  # of 100 steps, 10 an epoch
    (WARM, {}, {0: 0.1, 10: 0.3, 20: 0.5, 60: (0.5 + 0.05) / 2, 99: 0.0501735}),
    (WARM, {"lr_scale": 0.1}, {60: 0.0275}), (WARM | {"iterations": 100}, {}, {1: 0.3}),  # warm-up in steps
    (dict(lr=1.0, schedule="onecycle"), {}, {0: 1 / 25, 25: 0.52, 50: 1, 75: 0.500005}),
    (dict(lr=1.0, schedule="steps", milestones=(0.5, 0.75)), {}, {49: 1, 50: 0.1, 74: 0.1, 75: 0.01}),
    (dict(lr=0.3, schedule="constant"), {}, {99: 0.3}),
    ({}, {"phases": [(5, 1.0), (3, 0.0), (2, 0.5)]}, {0: 1, 25: 0.5, 50: 0, 79: 0, 80: 0.5, 90: 0.25}),
])
def test_lr_at_follows_schedule_warmup_batch_scaling_and_phases(settings, group, expected):
    found = {step: common.lr_at(common.Recipe(**settings), step, 100, 10, group) for step in expected}
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_is_written_whole_or_not_at_all_and_only_when_it_is_finite(tmp_path, monkeypatch):
    optimizer, weights = {"state": {0: {"m": torch.ones(2)}}, "groups": [(1, "x")]}, torch.arange(4.0)
    common.save_checkpoint(tmp_path / "last.pt", {"step": 3, "model": {"w": weights}, "optimizer": optimizer})
    for bad in {"running_var": torch.tensor([1.0, math.inf])}, {0: [torch.tensor(math.nan)]}:
        with pytest.raises(FloatingPointError, match="not finite"):
            common.save_checkpoint(tmp_path / "last.pt", {"model": bad})
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError("unexpected pos 64 vs 0")))
    with pytest.raises(OSError, match="could not save .*last.pt"):
        common.save_checkpoint(tmp_path / "last.pt", {"step": 4})
    held = common.load_checkpoint(tmp_path)  # the old file stays, read by its run folder
    assert held["step"] == 3 and held["optimizer"]["groups"] == [(1, "x")]
    assert torch.equal(held["model"]["w"], weights)


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


GOOD = {"w": torch.arange(6.0)}
BAD = {  # what is saved, or the bytes of a file
    "expanded": {"w": torch.zeros(1).expand(2**15, 2**15)}, "sparse": {"w": torch.eye(4).to_sparse()},
    "meta": {"w": torch.zeros(4, device="meta")}, "code": Evil(), "cut": GOOD, "flipped": GOOD,
    "conjugate": {"w": torch.zeros(4, dtype=torch.cfloat).conj()}, "tensor": torch.ones(2),
    "bomb": np.zeros(2**25, np.float32), "words": np.array(["text"]), "empty": b"",
    "text": b"<html>not found</html>", "a list": [torch.ones(2)], "a number": {"a": 1.0},
    "a numbered dict": {3: torch.ones(2)},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_hostile_or_other_file_is_one_error_that_names_it_and_runs_nothing(tmp_path, kind, capsys):
    held, path = BAD[kind], tmp_path / ("bad.npz" if kind in ("bomb", "words") else "bad.pt")
    np.savez_compressed(path, w=held) if path.suffix == ".npz" else torch.save(held, path)
    raw = bytearray(path.read_bytes())
    raw[raw.find(GOOD["w"].numpy().tobytes()) + 5] ^= kind == "flipped"
    raw = raw[: len(raw) // 2] if kind == "cut" else raw
    path.write_bytes(held if isinstance(held, bytes) else raw)
    said = ": holds no state_dict" if kind.startswith("a ") else " is damaged, or no file of tensors"
    with pytest.raises(ValueError, match=f"{path}{said}"):
        common.read_state(path)
    assert capsys.readouterr().out == ""


def test_heads_may_differ_and_nothing_else(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.Linear(2, 5)})
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    others = {"head.weight": torch.zeros(9, 2), "head.extra": torch.zeros(1)}
    common.load_state(model, state | others, ("head.",))
    fits = ["body.weight", "body.bias", "head.bias"]
    assert_close([model.state_dict()[k] for k in fits], [state[k] for k in fits], rtol=0, atol=0)
    lacking = {k: v for k, v in state.items() if k != "body.weight"}
    surplus, other = state | {"tail": torch.zeros(1)}, state | {"body.bias": torch.zeros(9)}
    for wrong, name in (lacking, "body.weight"), (surplus, "tail"), (other, "body.bias"):
        with pytest.raises(ValueError, match=rf"1 tensors are missing, .* \['{name}'\]"):
            common.load_state(model, wrong, ("head.",), "w.pth")


def test_fetch_downloads_once_checks_the_hash_and_says_where_to_put_a_file_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "w.pth").write_bytes(b"weights")
    url, sha256 = (tmp_path / "w.pth").as_uri(), hashlib.sha256(b"weights").hexdigest()[:8]
    got = common.fetch(url, sha256)
    assert got.read_bytes() == b"weights" and got.parent == tmp_path / "hub" / "checkpoints"
    (tmp_path / "w.pth").write_bytes(b"other bytes")
    assert common.fetch(url).read_bytes() == b"weights", "the second time nothing is read from the address"
    got.unlink()
    with pytest.raises(ValueError, match="no download of .*hash.* fetch it to .*w.pth"):
        common.fetch(url, sha256)
    assert not got.exists(), "what does not fit its hash is not kept"


def test_normalize_is_torchvisions_and_to_pil_its_inverse():
    images, half = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8), (0.5, 0.5, 0.5)
    known = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": (half, half)}
    for how, mean_std in known.items():
        expected = torchvision.transforms.functional.normalize(images / 255, *mean_std)
        assert_close(common.normalize(images, how), expected, rtol=0, atol=1e-5)
        assert np.array_equal(common.to_pil(expected[1], how), images[1].permute(1, 2, 0))


def test_cells_and_patches_are_numbered_row_by_row_and_take_picks_rows():
    boxes = common.cells_to_boxes(torch.tensor([[0, 5], [7, 2]]), (2, 4), (20, 80))
    assert boxes.tolist() == [[[0, 0, 20, 10], [20, 10, 40, 20]], [[60, 10, 80, 20], [40, 0, 60, 10]]]
    values = torch.randn(2, 5, 3)
    picked = common.take(values, torch.tensor([[4, 0], [2, 2]]))
    assert torch.equal(picked, torch.stack([values[0, [4, 0]], values[1, [2, 2]]]))
    model, images = small_vit(image_size=(128, 64)), torch.zeros(1, 3, 128, 64)
    images[:, :, 24:32, 40:48] = 1  # row 3, column 5 of 16 x 8
    changed = (model.embed(images) - model.embed(torch.zeros_like(images))).abs().sum(2)[0]
    assert changed.nonzero().flatten().tolist() == [1 + 3 * 8 + 5]


def test_labels_of_boxes_never_cover_each_other_and_stay_in_the_picture(monkeypatch):
    places = []
    monkeypatch.setattr(common, "write", lambda draw, at, text, size, **how: places.append((at, size)))
    boxes = [[10, 10, 60, 60]] * 3 + [[10, 170, 60, 180], [80, 175, 99, 180], [12, 12, 40, 44]]
    page = common.draw_boxes(Image.new("RGB", (100, 180)), boxes, "123456", width=2)
    rows = sorted(y for (_, y), _ in places)
    assert (np.diff(rows) >= places[0][1]).all() and rows[0] >= 10 and rows[-1] + places[0][1] <= 180
    assert page.getpixel((10, 10)) == page.getpixel((59, 59)) == (255, 79, 163), "the last one there"
    assert page.getpixel((9, 9)) == page.getpixel((60, 60)) == (0, 0, 0), "half-open"


def test_a_text_is_drawn_in_letters_that_a_font_has_and_cut_to_its_width(monkeypatch):
    drawn, draw = [], ImageDraw.Draw(Image.new("RGB", (400, 40)))
    monkeypatch.setattr(draw, "text", lambda at, text, font, **how: drawn.append((text, font)))
    for text in ("Grünfink", "黄喉鹀 Emberiza", "plain", ""):
        common.write(draw, (0, 0), text)
    for text, font in drawn:
        assert bytes(font.getmask("\uffff")) not in [bytes(font.getmask(letter)) for letter in text]
    assert drawn[0][0] in ("Grünfink", "Gr?nfink") and "Emberiza" in drawn[1][0]
    common.write(draw, (0, 0), "a very long name of a bird", width=60)
    assert drawn[-1][0].endswith("...") and len(drawn[-1][0]) < 20


def test_pages_are_put_together_without_loss_and_a_chart_draws_every_series(monkeypatch):
    red, blue = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (60, 40), "blue")
    assert common.stack([red, blue]).size == (60, 64)
    assert common.stack([red, blue], across=True).size == (94, 40)
    page = common.panels([red, blue], ["r", "b"], height=100)
    assert page.size == (150 + 4 + 150, 122)
    assert page.getpixel((75, 80)) == (255, 0, 0) and page.getpixel((230, 80)) == (0, 0, 255)
    assert common.headed(red, "title").size == (30, 42) and common.panels([red], ["r"]).height == 224 + 22
    plot = lambda **series: np.asarray(common.plot("loss", "epoch", "nats", series, (460, 320)))
    first, second = (ImageColor.getrgb(f"hsl({hue}, 90%, 35%)") for hue in (0, 137))
    chart = plot(a=[(1, 3.0), (2, 1.0)], b=[(1, math.nan), (2, 2.0)], none=[])
    assert (chart == first).all(-1).any() and (chart == second).all(-1).any()
    assert plot().shape == (320, 460, 3)
    texts = []
    monkeypatch.setattr(common, "write", lambda draw, at, text, *rest, **how: texts.append((at[1], text)))
    assert (plot(one=[(4, 2.5)], two=[(4, 0.5)]) == first).all(-1).sum() > 9, "one entry is a point"
    assert [t for _, t in sorted(texts)] == ["loss: nats over epoch 4 to 4", "2.5", "0.5", "one", "two"]
    hot = common.heat(Image.new("RGB", (8, 8)), torch.tensor([[0.0, 1.0]]), strength=1.0)
    assert hot.getpixel((0, 4)) == (12, 10, 60) and hot.getpixel((7, 4)) == (255, 245, 120)
    above = common.heat(Image.new("RGB", (2, 2), "white"), torch.ones(1, 2), span=(0.0, 0.5))
    assert above.getpixel((0, 0)) == (255, 249, 180)  # 0.45 of white, 0.55 of the span's most


def small_vit(**changes):
    """A ViT of 32 x 32 images with patches of 8, its weights large enough to matter."""
    arguments = dict(image_size=32, patch_size=8, dim=32, depth=3, heads=4, num_classes=5) | changes
    model = common.VisionTransformer(**arguments).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def as_google(model):
    """The arrays of a Google .npz with the weights of a VisionTransformer of width 32, by hand."""
    proj, zero, layers = model.patch_embed.proj, torch.zeros, {"Transformer/encoder_norm": model.norm}
    out = {"cls": model.cls_token, "Transformer/posembed_input/pos_embedding": model.pos_embed,
           "embedding/kernel": proj.weight.permute(2, 3, 1, 0), "embedding/bias": proj.bias,
           "head/kernel": zero(32, 21843), "pre_logits/kernel": zero(32, 32), "pre_logits/bias": zero(32)}
    for i, block in enumerate(model.blocks):
        at, qkv, merge = f"Transformer/encoderblock_{i}/", block.attn.qkv, block.attn.proj
        layers |= {at + "LayerNorm_0": block.norm1, at + "LayerNorm_2": block.norm2,
                   at + "MlpBlock_3/Dense_0": block.mlp.fc1, at + "MlpBlock_3/Dense_1": block.mlp.fc2}
        at += "MultiHeadDotProductAttention_1/"
        for name, weight, bias in zip(("query", "key", "value"), qkv.weight.split(32), qkv.bias.split(32)):
            out |= {f"{at}{name}/kernel": weight.T.reshape(32, 4, 8), f"{at}{name}/bias": bias.reshape(4, 8)}
        out |= {f"{at}out/kernel": merge.weight.T.reshape(4, 8, 32), f"{at}out/bias": merge.bias}
    for name, layer in layers.items():
        kind = "kernel" if isinstance(layer, nn.Linear) else "scale"
        out |= {f"{name}/{kind}": layer.weight.t(), f"{name}/bias": layer.bias}
    return {name: value.detach().contiguous().numpy() for name, value in out.items()}


def test_the_vit_equals_torchvisions_with_the_same_weights(tmp_path):
    theirs = torchvision.models.VisionTransformer(32, 8, 11, 4, 32, 128, num_classes=5).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    ours, images = small_vit(depth=11), torch.randn(2, 3, 32, 32)
    common.load_vit(ours, tmp_path / "vit_b_16.pth")
    ours.head.load_state_dict(theirs.heads.head.state_dict())
    assert theirs(images).std() > 0.1
    assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", "google.npz wrapped.npz deit.pth wrapped.pth distilled.pth run".split())
def test_files_of_google_and_deit_and_runs_of_ours_load_to_the_same_function_at_any_size(tmp_path, file):
    """At another size positions are resized bilinearly from an .npz, else bicubically; a head stays."""
    source, path, images = small_vit(), tmp_path / file, torch.randn(2, 3, 32, 32)
    state, pos = source.state_dict(), source.pos_embed.detach()
    second = {"pos_embed": torch.cat([pos[:, :1], torch.randn(1, 1, 32), pos[:, 1:]], 1),
              "dist_token": torch.randn(1, 1, 32), "head_dist.weight": torch.zeros(5, 32)}
    ours = {f"vit.{k}": v for k, v in state.items()} | {"log_vars": torch.zeros(3)}
    if path.suffix == ".npz":
        prefix = "params/" if file == "wrapped.npz" else ""
        np.savez(path, **{prefix + k: v for k, v in as_google(source).items()})
    elif file == "run":
        path.mkdir()
        common.save_checkpoint(path / "last.pt", {"model": ours, "recipe": {"image_size": [32, 32]}})
    else:
        wrapped = {"model": state | second if file == "distilled.pth" else state}
        torch.save(state if file == "deit.pth" else wrapped, path)
    model, wide = small_vit(num_classes=7), small_vit(image_size=(64, 32))
    head, wide.norm = model.head.weight.clone(), nn.Identity()  # the file's norm may be surplus
    assert ("log_vars" in common.load_vit(model, path)) == (file == "run")
    assert torch.equal(model.features(images), source.features(images))
    assert torch.equal(model.norm.weight, source.norm.weight) and torch.equal(model.head.weight, head)
    common.load_vit(wide, str(path))
    resized = common.resize_pos_embed(pos, (8, 4), "bilinear" if path.suffix == ".npz" else "bicubic")
    assert wide.grid == (8, 4) and torch.equal(wide.pos_embed, resized)


def test_official_files_are_fetched_and_checked_where_the_name_holds_a_hash(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(common, "fetch", lambda *how: (asked.append(how), tmp_path / "none.pth")[1])
    for name in ("deit_tiny", "deit_small", "deit_base", "vit_base"):
        with torch.device("meta"), pytest.raises(FileNotFoundError, match="none.pth: no such file"):
            common.load_vit(common.vit(name, 64), "default")
    stamps = {"tiny": "a1311bcf", "small": "cd65a155", "base": "b5f2ef4d"}
    deit = [(f"{common.DEIT}deit_{size}_patch16_224-{stamp}.pth", stamp) for size, stamp in stamps.items()]
    assert asked == [*deit, (f"{common.JAX}ViT-B_16.npz",)]


def test_position_embeddings_of_equal_grid_stay_and_others_keep_the_class_row_and_the_order_of_rows():
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")  # embedding = (row, column)
    ramp = torch.cat([torch.full((1, 1, 2), 9.0), torch.stack([y, x], -1).view(1, 16, 2)], 1)
    assert torch.equal(common.resize_pos_embed(ramp, (4, 4), "bicubic"), ramp)
    rows, columns = (((torch.arange(n) + 0.5) * 4 / n - 0.5).clamp(0, 3) for n in (16, 8))
    for mode, atol in (("bilinear", 1e-6), ("bicubic", 0.12)):
        out = common.resize_pos_embed(ramp, (16, 8), mode)[0]
        assert out[0].tolist() == [9, 9]
        assert_close(out[1:], torch.cartesian_prod(rows, columns), rtol=0, atol=atol)


def test_position_embeddings_of_another_grid_of_the_same_number_are_resized_not_scrambled(tmp_path):
    rows = torch.arange(4.0).repeat_interleave(16)  # a grid of 4 x 16, each patch its row
    pos = torch.cat([torch.zeros(1), rows])[None, :, None].expand(1, 65, 2)
    wide = common.resize_pos_embed(pos, (8, 8), "bilinear", (4, 16))
    assert (wide[0, 1:, 0].reshape(8, 8).diff(dim=1) == 0).all(), "a row stays a row"
    source, model = small_vit(image_size=(32, 128)), small_vit(image_size=(64, 64))
    state = {"model": source.state_dict(), "recipe": {"image_size": [32, 128]}}
    common.save_checkpoint(tmp_path / "last.pt", state)
    common.load_vit(model, tmp_path)
    assert torch.equal(model.pos_embed, common.resize_pos_embed(source.pos_embed, (8, 8), "bicubic", (4, 16)))


def test_vit_parameter_counts_epsilons_and_initialisation():
    for name, pixels, parameters in (
        ("deit_tiny", 224, 5_524_416), ("deit_tiny", 448, 5_637_312), ("deit_small", 448, 21_891_456),
        ("vit_base", 224, 85_798_656), ("vit_base", 448, 86_250_240),
    ):
        with torch.device("meta"):
            model = common.vit(name, (pixels, pixels))
            assert model(torch.empty(2, 3, pixels, pixels)).shape == (2, model.cls_token.shape[-1])
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    small = common.VisionTransformer(32, 8, 64, 2, num_classes=5)
    assert small.blocks[0].attn.heads == 1 and small.blocks[0].mlp.fc1.out_features == 256
    for weight in (small.pos_embed, small.blocks[1].attn.qkv.weight, small.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(m.bias.any() for m in small.modules() if isinstance(m, nn.Linear))


def test_stochastic_depth_grows_with_depth_and_drops_whole_residuals_of_an_image():
    rates = [block.drop_path.p for block in small_vit(depth=5, drop_path=0.4).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block, tokens = common.Block(32, 4, drop_path=0.5).train(), torch.randn(400, 2, 32)
    nn.init.normal_(block.mlp.fc2.weight)
    change = block(tokens) - tokens
    attended = block.attn.merge(F.scaled_dot_product_attention(*block.attn.split(block.norm1(tokens))))
    for left in (0 * attended, 2 * attended):  # both dropped; attention kept and doubled, FFN dropped
        assert 0.15 < torch.isclose(change, left, rtol=1e-5, atol=1e-5).all(2).all(1).float().mean() < 0.35
    assert torch.equal(block.eval()(tokens), block(tokens))


def test_macs_of_a_linear_layer_a_convolution_and_attention():
    N, C = 17, 32
    block = N * 3 * C * C + N * C * C + 2 * N * N * C + 2 * N * C * 4 * C  # qkv, projection, attention, FFN
    assert common.count_macs(small_vit(), torch.zeros(1, 3, 32, 32)) == 16 * 3 * 64 * C + 3 * block + C * 5
    squeeze = torchvision.ops.SqueezeExcitation(4, 2)
    assert common.count_macs(squeeze, torch.zeros(1, 4, 5, 5)) == 4 * 2 + 2 * 4 + 4 * 25


def test_eq2_rollout_is_the_product_of_the_layers_with_their_residuals_deepest_on_the_left():
    first = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2]])
    second = torch.tensor([[0.6, 0.1, 0.3], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])
    assert_close(common.rollout([first, second])[0], torch.tensor([0.5125, 0.2750, 0.2125]))
    e = torch.eye(3)
    assert_close(common.rollout([first, second]), (0.5 * second + 0.5 * e) @ (0.5 * first + 0.5 * e))


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_eq2_the_class_row_as_a_chain_of_vector_products_is_row_0_of_the_matrix_product(fusion):
    pairs = [tuple(torch.randn(2, 2, 3, 10, 4)) for _ in range(11)]
    whole = common.rollout([common.attention_weights(q, k, fusion).double() for q, k in pairs])
    row = common.cls_rollout(pairs, fusion)
    assert_close(row.double(), whole[:, 0], rtol=0, atol=1e-6)
    assert_close(row.sum(-1), torch.ones(2), rtol=0, atol=1e-6)
    assert row[:, 0].min() >= 0.5**11 and not torch.allclose(row, common.cls_rollout(pairs[::-1], fusion))


def test_attention_weights_are_the_softmax_of_the_scaled_products_fused_over_the_heads():
    q, k = torch.randn(2, 2, 3, 6, 4, dtype=torch.float64)
    literal = np.exp(np.einsum("bhid,bhjd->bhij", q, k) / 2)
    literal = literal / literal.sum(3, keepdims=True)
    for fusion, fused in (("mean", literal.mean(1)), ("max", literal.max(1)), ("min", literal.min(1))):
        assert_close(common.attention_weights(q, k, fusion), torch.from_numpy(fused).float())


def test_the_rollout_keeps_no_attention_matrix_for_the_backward_pass_and_stays_in_fp32():
    model, layers = small_vit(), []
    tokens = model.features(torch.randn(1, 3, 32, 32), lambda q, k: layers.append((q, k)))
    assert tokens.requires_grad and not common.cls_rollout(layers).requires_grad and len(layers) == 3
    assert all(t.shape == (1, 4, 17, 8) and not t.requires_grad for pair in layers for t in pair)
    # fp32 whatever the context: bf16 would change which patches are picked
    with torch.autocast("cpu", torch.bfloat16):
        row = common.cls_rollout([(q.bfloat16(), k.bfloat16()) for q, k in layers])
    assert row.dtype == torch.float32 and row.sum().item() == pytest.approx(1, abs=1e-5)
