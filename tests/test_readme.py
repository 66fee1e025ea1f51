"""What README.md says is so: its Python runs, its bugs are found, its numbers are in results/, lines fit."""
import importlib
import inspect
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from PIL import Image

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "green").save("photo.jpg")
    assert train.main(["--method", "tnet", "--toy-train", "4", "--toy-test", "1", "--epochs", "1"]) == 0
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, names)
    assert names["row"].sum().item() == pytest.approx(1, abs=1e-5) and names["loss"].requires_grad
    assert (
        names["boxes"].shape[1:] == (3, 4)
        and (names["boxes"][..., 2] <= 90).all()
        and names["images"].shape[0] == 1
    )


CELL = re.compile(r"\[([+-].*? ± .*? \(\d\))\]\((results/.*?\.json)\) ([a-z ]+)")
CLAIMS = [  # of the table of what is seen: a claim, and one of its links
    (line.split(" | ")[0][2:], *cell)
    for line in README.splitlines() if line.startswith("| ") for cell in CELL.findall(line)
]
ROWS = {  # which two rows of its file a claim compares
    "TNet over the low resolution alone": ("TNet, 3 locations", "the low resolution alone"),
    "TNet over random cells": ("TNet, 3 locations", "random cells"),
    "TNet over the best constant cells": ("TNet, 3 locations", "the three best constant cells"),
    "TNet, per-feature": ("TNet, 3 locations", "without per-feature regularisation"),
    "MC-Loss over cross-entropy": ("MC-Loss", "cross-entropy"), "TDSA over MC-Loss": ("TDSA-Loss", "MC-Loss"),
    "TDSA: its attention": ("TDSA-Loss", "MC-Loss on both maps, without attention"),
    "DCAL over the plain ViT": ("Ours", "Baseline"), "multi-stage ViT: the object again": ("a, b", "a"),
    "multi-stage ViT: parts on top": ("a, b, c", "a, b"), "MSPS over MViTv2": ("MSPS", "plain MViTv2"),
    "M2Former, all over MSPS": ("all", "MSPS"),
}


@pytest.mark.parametrize("claim, said, file, verdict", CLAIMS)
def test_a_claims_difference_and_verdict_follow_from_the_seeds_in_its_file(claim, said, file, verdict):
    first, second = next(rows for name, rows in ROWS.items() if claim.startswith(name))
    ours = {row["row"]: row["ours"] for row in json.loads((ROOT / file).read_text())["rows"]}
    differences = [a - b for a, b in zip(ours[first], ours[second], strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    assert said == f"{mean:+.1f} ± {error:.1f} ({len(differences)})"
    right = "seen" if mean > 2 * error else "contradicted" if mean < -2 * error else "not seen"
    assert verdict.strip() == right


def test_every_claim_was_found_and_every_file_and_test_that_is_named_exists():
    assert len(CLAIMS) == README.count(" ± ") - 1 > 20  # one stands in the text
    for text in (README, (ROOT / "results" / "README.md").read_text()):
        base = ROOT if text is README else ROOT / "results"
        missing = [path for path in re.findall(r"\]\((?!http)(.*?)\)", text) if not (base / path).exists()]
        assert not missing
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", README))
    assert named and all(f"def {name}(" in tests for name in named)


WRONG = {  # the README's bugs: file, function, what stands there, what the wrong variant has instead
    ("tnet", "plackett_luce_log_prob"): (
        "logits.gather(-1, cells) - left", "logits.log_softmax(-1).gather(-1, cells)",
    ),
    ("tdsa", "class_spread"): ("softmax(part, -1", "softmax(part, 2"),
    ("dcal", "pairwise_cross_attention"): (
        "F.scaled_dot_product_attention(q1, k_c, v_c)",
        "sum(F.scaled_dot_product_attention(q1, k, v) for k, v in ((k1, v1), (k2, v2))) / 2",
    ),
    ("vit_fgvc", "closing"): (
        "~grow(~grow(mask))", "~grow(F.pad(~grow(mask), (1, 1, 1, 1), value=True))[:, 1:-1, 1:-1]",
    ),
    ("m2former", "select_patches"): ("tokens.float()", "F.layer_norm(tokens.float(), tokens.shape[2:])"),
}


@pytest.mark.parametrize("file, function", WRONG)
def test_the_test_that_the_readme_names_finds_each_bug(monkeypatch, file, function):
    module, tests = importlib.import_module(file), importlib.import_module(f"test_{file}")
    [name] = re.findall(rf"^\| `{file}.py` \| `{function}` .*`(test_\w+)` \|$", README, re.M)
    test = getattr(tests, name)
    arguments = dict.fromkeys(inspect.signature(test).parameters, 0.0)
    test(**arguments)
    source, (right, wrong) = inspect.getsource(getattr(module, function)), WRONG[file, function]
    assert right in source
    monkeypatch.setattr(module, function, None)
    exec(source.replace(right, wrong), vars(module))
    monkeypatch.setattr(tests, function, getattr(module, function), raising=False)
    with pytest.raises(AssertionError):
        test(**arguments)


def test_lines_are_at_most_110_columns_and_the_readme_170_lines():
    files = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]
    wide = [
        f"{path.name}:{i}"
        for path in files
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 110
    ]
    prose = [line for line in README.splitlines() if not re.match(r"[|!]|python3 -m venv", line)]
    assert not wide and len(README.splitlines()) <= 170 and max(map(len, prose)) <= 110
