"""train.py: the command line, the loop's facts, exact resume, each action on tiny data, faults, tables."""
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import test_datasets as sets
import train

SMALL = "--toy-train 2 --toy-test 1 --batch-size 8 "
TINY = f"--method tdsa {SMALL} --image-size 48 --resize 52 --iterations 6 "  # four steps an epoch
FOLDER = "--method tdsa --data folder --root photos --backbone toy --image-size 32 --resize 32 "
FOLDER += "--batch-size 4 --epochs 1 --weights none "
PLAIN = f"--method dcal {SMALL} --backbone deit_tiny --image-size 32 --iterations 2 "
PLAIN += "--no-pwca --drop-path 0 --optimizer sgd --lr 0.1 "
TABLE = f"table --method tdsa --table t {SMALL} --toy-train 1 --epochs 1 "
ALONE = train.World(torch.device("cpu"))
draw_bird = functools.cache(data.draw_bird)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty folder to run in; each bird is drawn once in all tests; patches end with the test."""
    monkeypatch.setattr(data, "draw_bird", draw_bird)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    mock.patch.stopall()


def words(*argv):
    """Texts are split at blanks, paths and numbers are a word each."""
    return [word for one in argv for word in (one.split() if isinstance(one, str) else [str(one)])]


def run(*argv):
    """Exit status of a command line, in this process."""
    return train.main(words(*argv))


def error(*argv, status=2):
    """The one line on stderr with which a command line fails."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert run(*argv) == status, argv
    text = said.getvalue()
    assert text.startswith("train.py: ") and len(text.splitlines()) == 1, (argv, text)
    return text


def before(name, act):
    """A patch of train: `act(number, *arguments)` before each call of a function, counted from 1."""
    real, numbers = getattr(train, name), itertools.count(1)

    def function(*arguments):
        act(next(numbers), *arguments)
        return real(*arguments)

    return mock.patch.object(train, name, function)


def forked(*argv, output="output.txt", patch=lambda: None, **env):
    """The command line in a process of its own, without the cost of importing torch again."""

    def child():
        sys.stdout = sys.stderr = open(output, "a", buffering=1)
        os.environ.update(env)
        patch()
        os._exit(run(*argv))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def together(*argv, port=None, patch=lambda: None):
    """The command line on two processes, as torchrun starts them -> their exit statuses; said0, said1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = port or free.getsockname()[1]
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    group = [forked(*argv, output=f"said{r}", patch=patch, **meet, RANK=r, LOCAL_RANK=r) for r in "01"]
    for process in group:
        process.join(100)
    print(Path("said0").read_text(), Path("said1").read_text())  # shown where a test fails
    return [process.exitcode for process in group]


def last(folder):
    """A run's checkpoint, without what a clock wrote."""
    state = common.load_checkpoint(Path(folder) / "last.pt")
    state["sums"].pop("seconds", None)
    return state


def json_of(*path):
    """A file of JSON."""
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def log_of(folder):
    """The log's entries without what a clock wrote."""
    clock = ("seconds", "images_per_second")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in train.read_log(folder)]


def same(a, b, path=""):
    """Both nested states are equal, bit for bit; names what is not."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), path
        for key in a if isinstance(a, dict) else range(len(a)):
            same(a[key], b[key], f"{path}/{key}")
    else:
        assert a == b, path


def same_run(a, b):
    """Two runs ended with the same checkpoint and the same log."""
    same(last(a), last(b))
    assert log_of(a) == log_of(b)


def photo_folder(root, classes=("Käse", "苹果", 'a "b", c'), per_class=4):
    """An image folder of noise in the colours of its classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.normal(60 + 60 * c, 20, (40, 50, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.JPG")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of TDSA on six classes of birds, to look at."""
    folder = tmp_path_factory.mktemp("trained") / "tdsa-toy"
    assert run(TINY, "--out", folder) == 0
    return folder


# ------------------------------------------------------------------------------------------ the command line
def test_help_fits_a_screen_has_examples_and_help_all_every_switch(capsys):
    def help_of(*argv):
        with pytest.raises(SystemExit, match="0"):
            run(*argv)
        text = capsys.readouterr().out
        assert "nan" not in text.split()
        return text

    first = help_of("--help")
    assert len(first.splitlines()) <= 24 and max(map(len, first.splitlines())) <= 110
    assert first.count("python train.py") > 5
    for action in train.ACTIONS:
        text = help_of(action, "--help")
        assert f"\n  {action} " in first and "--label-smoothing" not in text
        assert len(text.splitlines()) <= 60 and re.search("runs/|RUN/|--out DIR", text)
        for f in dataclasses.fields(train.Flags):
            other = "for " in f.metadata["group"] and action not in f.metadata["group"]
            assert (re.search(rf"{common.flag(f)}[ ,\n]", text) is None) == other, f.name
    text = help_of("--method tdsa --data cub --help-all")
    assert all(common.flag(f) in text for f in dataclasses.fields(train.METHODS["tdsa"].Recipe))
    assert "[224,224]" in text


def test_a_call_has_its_flags_recipe_run_and_words(trained, room):
    flags, [(label, recipe)] = train.parse(words("--method tnet --lr 0.5 --image-size 64 --seed 4"))
    assert (flags.action, flags.method, flags.data, flags.seed) == ("train", "tnet", "toy", 4) and label == ""
    assert recipe == dataclasses.replace(train.METHODS["tnet"].RECIPES["toy"], lr=0.5, image_size=(64, 64))
    for line in ("RUN a.jpg b", "--run RUN a.jpg b", "--out o RUN a.jpg b"):
        flags, _ = train.parse(words("predict " + line.replace("RUN", str(trained))))
        assert (flags.run, flags.words, flags.method) == (str(trained), ("a.jpg", "b"), "tdsa")
    line = words("eval", trained, "--upsample bilinear,nearest --against") + ["--lr 3 --xi 1"]
    labels, recipes = zip(*train.parse(line)[1])
    assert labels == ("upsample=bilinear", "upsample=nearest", "--lr 3 --xi 1")
    assert recipes[1].upsample == "nearest" and (recipes[2].lr, recipes[2].upsample) == (3, "bilinear")
    for more, name in (("", "toy"), ("--root x", "cub"), ("--root x --data cars", "cars")):
        assert train.parse(words("table --method tdsa --table 2", more))[0].data == name
    for recipe in (module.RECIPES[name] for module in train.METHODS.values() for name in module.RECIPES):
        values = json.loads(json.dumps(dataclasses.asdict(recipe)))
        assert train.options_of(type(recipe)(), values, "run.json") == recipe


BIRD = "--method tdsa --toy-train 1 --toy-test 1"
WRONG = [  # command line, what the answer says
    ("", "python train.py --method tnet"), ("--metod tnet", "did you mean --method?"),
    ("evl runs/x", "did you mean eval?"), ("--method tent", "did you mean tnet?"),
    ("--method tnet --epoch 3", "did you mean --epochs?"), ("--method vgg", "unknown method"),
    ("--method tnet --data mars", "unknown data"), ("--method tnet --recipe mars", "no recipe"),
    ("--method tnet --lr nan", "--lr"), ("--method tnet --milestones nan", "--milestones"),
    ("--method tnet --epochs 1e308", "invalid int"), ("--method tnet --device tpu", "--device"),
    ("--method tnet --image-size 64,64,64", "--image-size"), ("--method tdsa --task reid", "--task"),
    ("--method tnet --toy-preset bird", "--toy-preset"), ("--method tnet --crop-ratio=--", "-- is no value"),
    ("--method tnet --seed -1", "--seed -1"), ("--method tnet --workers 257", "--workers 257"),
    ("--method tnet --eval-every 0", "--eval-every 0"), ("profile --method tnet --rounds 0", "--rounds 0"),
    ("--method tnet --images 3", "--images is for figures"), ("--method tnet word", "train takes no 'word'"),
    ("--method tnet --run r", "--run is for eval, predict, figures, profile"),
    ("--method tnet --nonsense 3", "unknown argument --nonsense"),
    ("profile --method tnet --against --nonsense", "unknown argument --nonsense"),
    ("--method tnet --locations 0,1", "several values are for eval and profile"),
    (f"{BIRD} --out text.txt", "text.txt"), (f"{BIRD} --out text.txt/x", "text.txt"),
    (f"{BIRD} --weights text.txt", "text.txt"), (f"{BIRD} --weights nowhere.pt", "nowhere.pt"),
    ("--method tnet --data folder", "--root"), ("--method tnet --data cub --root empty", "empty"),
    ("--method tnet --data folder --root nowhere", "nowhere"), ("--resume nowhere", "no run folder"),
    ("--resume r --lr 3", "keeps the run's recipe"), ("profile", "name a method"),
    ("--resume r --out x", "recipe, folder and seed"), ("--resume r --seed 3", "recipe, folder and seed"),
    ("--method tnet --against --lr=3", "not for train: --against"), ("eval r --against", "--against ''"),
    ("eval", "python train.py eval RUN"), ("eval runs/x", "python train.py --method tnet makes one"),
    ("eval r --method tnet", "leave --method"), ("figures r nowhere --out new", "nowhere is no run folder"),
    ("predict r", "name photos"), ("predict r nowhere.jpg", "nowhere.jpg"), ("predict r empty", "empty"),
    ("predict r text.txt --resize 8,8", "is smaller than --image-size"), ("table --table 1", "name a method"),
    ("table --method tnet --table 99", "no table '99'"),
    ("table --method tdsa --table 2 --seeds a", "--seeds"),
    ("table --method tdsa --table 2 --seeds ,", "one seed"),
    ("table --method tdsa --table 2 --root nowhere", "nowhere"),
]


def test_a_wrong_command_line_ends_with_status_2_and_one_line_of_advice_and_writes_nothing(trained, room):
    Path("empty").mkdir()
    Path("text.txt").write_text("hello")
    Path("r").symlink_to(trained)
    files = lambda: sorted([*room.rglob("*"), *trained.rglob("*")])
    there = files()
    for line, said in WRONG:
        assert said in error(line) and files() == there, line


def test_json_of_the_wrong_shape_is_one_line_that_names_the_file(trained, room):
    good = json_of(trained, "run.json")
    changes = (
        {"flags": None}, {"recipe": []}, {"recipe": {"lr": "fast"}}, {"recipe": {"lr": float("nan")}},
        {"classes": 3}, {"recipe": {"unknown": 1}}, {"recipe": {"image_size": [[1], {}]}}, {"method": "vgg"},
        {"data": "mars"}, {"flags": {"workers": "many"}}, {"flags": {"seed": -1}}, {"recipe_name": None},
    )
    bad = ["", "{half", "[]", "null", "{}", "[" * 100000, *(json.dumps(good | change) for change in changes)]
    Path("r").mkdir()
    for text in [*(text.encode() for text in bad), b"\xff\xfe{}"]:
        Path("r/run.json").write_bytes(text)
        for line in ("eval r", "--resume r", "figures r"):
            assert "r/run.json" in error(line), text[:80]
    Path("r/result.json").write_text("[]")
    with pytest.raises(ValueError, match="result.json is damaged"):
        train.read_json(Path("r/result.json"), commit=str)


def test_train_knows_no_paper_no_bird_and_no_box():
    text = Path(train.__file__).read_text()
    found = [line for line in text.splitlines() if re.search("toy|reid|market|locations", line)]
    assert all(re.search("""runs/|["']toy["']""", line) for line in found), found
    methods = "".join(Path(method.__file__).read_text() for method in train.METHODS.values())
    assert not re.search(r"^import (train)|from train", methods, re.M)


# ------------------------------------------------------------------------------------------ the loop
def test_the_optimizer_has_the_recipes_momentum_betas_epsilon_and_decay():
    groups = [torch.nn.Parameter(torch.ones(1))]
    for name, kind in (("adam", "Adam"), ("adamw", "AdamW"), ("radam", "RAdam")):
        recipe = common.Recipe(optimizer=name, momentum=0.8, beta2=0.99, eps=1e-5, weight_decay=0.3, lr=0.2)
        optimizer = train.make_optimizer(recipe, groups)
        wanted = {"betas": (0.8, 0.99), "eps": 1e-5, "weight_decay": 0.3, "lr": 0.2}
        assert type(optimizer).__name__ == kind and wanted.items() <= optimizer.defaults.items()
        assert name != "radam" or optimizer.defaults["decoupled_weight_decay"]
    for amp, fused in (("off", True), ("fp16", False)):
        optimizer = train.make_optimizer(common.Recipe(optimizer="sgd", momentum=0.8, amp=amp), groups)
        assert (optimizer.defaults["momentum"], optimizer.defaults["fused"]) == (0.8, fused)


def test_a_batch_is_cut_into_as_many_parts_as_the_recipe_says_and_a_group_with_rate_zero_is_frozen():
    sizes, model = [], torch.nn.Linear(1, 1)

    def forward(images, targets):
        sizes.append(len(images))
        loss = (model.weight * model.bias).sum()
        return loss, {"top1": loss.detach()}

    model.forward, (weight, bias) = forward, [parameter.item() for parameter in model.parameters()]
    recipe = common.Recipe(optimizer="adamw", weight_decay=0.1, accumulate=5)
    groups = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias], "lr": 0.1}]
    optimizer = train.make_optimizer(recipe, groups)
    batch = torch.zeros(7, 3, 4, 4, dtype=torch.uint8), torch.zeros(7, dtype=torch.long)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, terms = train.update(model, optimizer, scaler, batch, recipe, ALONE)
    assert sizes == [2, 2, 1, 1, 1] and loss.item() == pytest.approx(weight * bias) and set(terms) == {"top1"}
    assert model.weight.item() == weight and model.weight not in optimizer.state, "without moments"
    assert model.bias.item() != bias


def test_parts_of_a_batch_and_two_processes_give_the_weights_of_the_whole_batch_on_one(room):
    """DeiT has no BatchNorm, whose statistics would be those of the parts; only rounding differs."""
    assert run(PLAIN, "--out whole") == 0 and run(PLAIN, "--out parts --accumulate 4") == 0
    assert together(PLAIN, "--out two --workers 0") == [0, 0]
    whole = last("whole")["model"]
    start = train.METHODS["dcal"].build(train.load("whole")[2], 8).state_dict()
    assert max((whole[k] - start[k]).abs().max() for k in whole) > 1e-2, "they were trained"
    for other in ("parts", "two"):
        model = last(other)["model"]
        for k in whole:
            torch.testing.assert_close(model[k], whole[k], atol=2e-6, rtol=1e-4)
        assert log_of(other)[-1]["loss"] == pytest.approx(log_of("whole")[-1]["loss"], rel=1e-5)
        assert set(os.listdir(other)) == set(os.listdir("whole"))
    assert "result:" in Path("said0").read_text() and not Path("said1").read_text(), "the first one speaks"


def test_two_processes_score_nine_photos_once_each_also_by_eval_run(room):
    photo_folder(room / "photos", per_class=3)
    assert together(FOLDER, "--out two") == [0, 0]
    assert together("eval two") == [0, 0]
    (row,) = json_of("two/eval.json")["rows"]
    assert sum(n for _, n in row["per_class"].values()) == 9 and row["scores"] == log_of("two")[-1]["test"]
    assert run("eval two --out one") == 0
    assert json_of("one/eval.json")["rows"][0]["scores"] == row["scores"]


def test_the_rate_of_a_step_and_the_logs_means(room, monkeypatch):
    rates, losses, real = [], [], train.update

    def watched(model, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        loss, terms = real(model, optimizer, *rest)
        losses.append(loss.item())
        return loss, terms

    monkeypatch.setattr(train, "update", watched)
    assert run(TINY, "--lr 0.4 --schedule constant --warmup 4 --eval-every 2 --out r") == 0
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4]), "a warm-up of four steps"
    log = log_of("r")
    assert [(e["step"], e["epoch"]) for e in log] == [(4, 1), (6, 2)]
    assert [e["lr"] for e in log] == pytest.approx([0.3, 0.4])
    assert [e["loss"] for e in log] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], abs=1e-5)
    assert "test" not in log[0] and set(log[1]["test"]) == {"top1", "top5"}


def test_a_validation_split_is_scored_during_training_and_the_test_split_once_at_the_end(room, capsys):
    photo_folder(room / "photos")
    assert run(FOLDER, "--val-fraction 0.5 --epochs 2 --out r") == 0
    log, result = log_of("r"), json_of("r/result.json")
    assert all(set(e["val"]) == {"top1"} and "test" not in e for e in log), "three classes have no top-5"
    assert result["split"] == "test" and result["best_over_epochs"]["split"] == "val" and "top5" not in result
    assert "epoch 1" in (text := capsys.readouterr().out) and " left" in text and "predict r PHOTO" in text


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_accumulates_clips_and_leaves_finite_weights(amp, room):
    """Under fp16 the loss scaler skips the first steps."""
    assert run(TINY, "--amp", amp, "--accumulate 2 --grad-clip 1 --out r") == 0
    state = last("r")
    assert all(t.isfinite().all() for t in state["model"].values())
    assert amp == "bf16" or state["scaler"]["scale"] > 0


# ------------------------------------------------------------------------------------------ resume
@pytest.mark.parametrize("method", train.METHODS)
def test_a_run_killed_in_an_epoch_resumes_bit_for_bit_with_other_workers(method, room):
    flags = f"--method {method} {SMALL} --iterations 5 "
    assert run(flags, "--out whole") == 0
    kill = lambda number, *_: number == 4 and os.kill(os.getpid(), signal.SIGKILL)
    process = forked(flags, "--out cut --save-every 2 --workers 2", patch=before("update", kill).start)
    process.join()
    assert process.exitcode == -signal.SIGKILL and last("cut")["step"] == 2, "in its first epoch"
    torch.manual_seed(99)  # what the process did since must not matter
    assert run("--resume cut --workers 1") == 0
    same_run("whole", "cut")


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place, step", [("update", 1), ("run_over", 4)])
def test_a_stop_saves_and_one_in_an_evaluation_ends_and_repeats_it(sent, status, place, step, trained, room):
    with before(place, lambda *_: signal.raise_signal(sent)):
        assert "--resume r" in error(TINY, "--out r", status=status)
    assert last("r")["step"] == step and log_of("r") == []
    assert run("--resume r") == 0
    same_run(trained, "r")


def test_a_folder_with_a_damaged_log_is_resumed_and_one_without_a_checkpoint_is_begun_anew(trained, room):
    """A line cut short, others of any kind, a last one without scores; parts of files."""
    log, about = Path(trained, "log.jsonl").read_text(), Path(trained, "run.json").read_text()
    bad = '{"step": 1, "epoch": 1, "seconds": 0, "test": {}, "loss": null}\n'
    half = '"tset"'.join(log.rsplit('"test"', 1))
    for i, text in enumerate((log, log[:-9], "[]\n5\n" + log + "{}\n\xff", bad + log, half)):
        folder = shutil.copytree(trained, f"r{i}", ignore=lambda *_: ["result.json"])
        Path(folder, "log.jsonl").write_bytes(text.encode("latin1"))
        assert run("--resume", folder) == 0
        same_run(trained, folder)
        assert json_of(folder, "result.json")["top1"] == json_of(trained, "result.json")["top1"]
    for i, left in enumerate(([], ["run.part"], ["run.json"], ["run.json", "log.jsonl", "last.part"])):
        folder = room / f"anew{i}"
        folder.mkdir()
        for name in left:
            (folder / name).write_text({"run.json": about, "log.jsonl": log}.get(name, "rest"))
        assert run(*(["--resume", folder] if "log.jsonl" in left else [TINY, "--out", folder])) == 0
        same_run(trained, folder)
    assert all(f"eval {trained} shows it" in error(how, trained) for how in ("--resume", f"{TINY} --out"))


def test_of_two_starts_into_one_folder_one_wins_and_the_other_says_so(room):
    process = forked(TINY, "--iterations 1000000 --save-every 1 --out r")
    deadline = time.time() + 60
    while not Path("r/last.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    assert "holds a run" in error(TINY, "--out r") and "another process trains in it" in error("--resume r")
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143 and "--resume r" in error(TINY, "--out r")


def test_resume_takes_the_runs_flags_and_refuses_other_classes_and_states(trained, room):
    photos = photo_folder(room / "photos")
    assert run(FOLDER, "--seed 3 --eval-every 2 --out r") == 0
    flags, _ = train.parse(words("--resume r --workers 1"))
    assert (flags.seed, flags.eval_every, flags.workers, flags.root) == (3, 2, 1, str(photos))
    for split in ("train", "test"):
        (photos / split / "Käse").rename(photos / split / "Wurst")
    assert "other classes (Käse, Wurst)" in error("eval r") == error("figures r")
    Path("r/result.json").unlink()
    shutil.copy(trained / "run.json", "r")
    wrong = {"sums": None, "model": {}, "step": "x", "method": "vgg", "optimizer": {"state": 3}}
    for key, value in wrong.items():
        common.save_checkpoint(Path("r/last.pt"), common.load_checkpoint(trained / "last.pt") | {key: value})
        assert "last.pt" in error("--resume r"), key


# ------------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize("line, act, said", [
    (TINY, lambda number, model, *_: next(model.parameters()).data.fill_(float("nan")),
     r"the loss is nan at step 0, lr .*terms \{.*birds/train/"),
    (TINY, lambda *_: torch.empty(2**50), "out of memory at batch 8.*--accumulate 2.*--amp bf16"),
    (f"--method m2former {SMALL} --accumulate 8", lambda *_: 0, "--batch-size, --accumulate"),
], ids=["not finite", "memory", "BatchNorm"])
def test_a_step_that_fails_says_its_loss_terms_rate_and_photos_or_what_to_try(line, act, said, room):
    with before("update", act):
        assert re.search(said, error(line, "--out r", status=1))


def test_weights_that_are_not_finite_are_never_saved_the_good_ones_stay(room):  # here of a BatchNorm
    spoil = lambda number, model, *_: number == 3 and [*model.buffers()][-3].fill_(float("inf"))
    with before("update", spoil):
        assert "finite" in error(TINY, "--save-every 1 --out r", status=1)
    assert last("r")["step"] == 2 and run("--resume r") == 0


def test_a_dead_or_silent_worker_ends_with_one_line(room):
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
    few = forked(TINY, "--workers 8 --out r", patch=limit)
    few.join()
    said = Path("output.txt").read_text()
    assert few.exitcode == 1 and "open files" in said and "Traceback" not in said
    with mock.patch.object(data.Photos, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
        assert "fewer --workers, or a larger /dev/shm" in error(TINY, "--workers 1 --out s", status=1)
    photos = data.Photos(data.Split([], [], images=[]), common.Recipe())
    assert 0 < train.make_loader(photos, train.Flags(workers=2), ALONE).timeout < 60


def test_an_unreadable_photo_stops_the_run_with_its_name_also_from_a_worker_or_is_left_out(room, capsys):
    photos = photo_folder(room / "photos")
    (photos / "train/Käse/0.JPG").write_text("not a photo")
    assert re.search("Käse/0.JPG.*--skip-bad-images", error(FOLDER, "--workers 1 --out a"))
    assert run(FOLDER, "--skip-bad-images --out b") == 0
    (photos / "test/Käse/1.JPG").write_bytes((photos / "test/Käse/1.JPG").read_bytes()[:400])
    assert run("eval b --workers 1") == 0, "the run's switch holds for eval"
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback ...\nValueError: a.jpg: bad"
    assert train.fail(2, text) == 2 and capsys.readouterr().err == "train.py: a.jpg: bad\n"


def test_a_process_that_dies_ends_the_others_and_one_goes_on_from_the_checkpoint(room):
    die = lambda number, *_: number == 3 and os.environ["RANK"] == "1" and os._exit(9)
    assert together(TINY, "--save-every 1 --out r", patch=before("update", die).start) == [1, 9]
    said = Path("said0").read_text()
    assert "train.py: this process lost the others" in said and "Traceback" not in said
    assert last("r")["step"] == 2 and run("--resume r") == 0 and last("r")["step"] == 6


def test_a_fault_of_ours_keeps_its_traceback_and_a_models_its_words(room):
    mock.patch.object(torch.distributed, "is_initialized", lambda: True).start()
    mock.patch.object(torch.distributed, "destroy_process_group").start()
    mock.patch.object(torch.distributed, "barrier").start()
    with mock.patch.object(train, "load_data", side_effect=RuntimeError("shapes cannot be multiplied")):
        with pytest.raises(RuntimeError, match="shapes"):
            run(TINY)
    with mock.patch.object(train.METHODS["tdsa"].Model, "forward", side_effect=ValueError("targets 0..9")):
        assert "two images" not in error(TINY)


def test_the_live_line_is_the_first_process_s_and_the_same_classes_in_another_order_are_others(monkeypatch):
    said = io.StringIO()
    said.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", said)
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        train.live_line(f"process {rank}")
    assert "process 0" in said.getvalue() and "process 1" not in said.getvalue()
    with pytest.raises(ValueError, match="in another order"):
        train.check_classes("last.pt", ["a", "b"], ["b", "a"])


def test_a_taken_port_is_one_line_of_each_process(room):
    """The first one cannot listen; the second meets a program that never answers."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        soon = lambda: setattr(train, "MEETING", 2)
        assert together(TINY, port=taken.getsockname()[1], patch=soon) == [1, 1]
    for said in ("said0", "said1"):
        (line,) = (line for line in Path(said).read_text().splitlines() if "train.py: " in line)
        assert "--master-port" in line


# ------------------------------------------------------------------------------------------ the other actions
@pytest.mark.parametrize("method", train.METHODS)
def test_eval_figures_and_profile_of_each_method_write_their_files(method, room, capsys):
    assert run("--method", method, SMALL, "--iterations 1") == 0
    folder = Path("runs", f"{method}-toy")
    model, classes, recipe = train.load(folder)
    assert not model.training and type(recipe) is train.METHODS[method].Recipe
    about = json_of(folder, "run.json")
    assert about["counts"] == {"train": 2 * len(classes), "test": len(classes)}
    assert about["parameters"] > 1000 and about["classes"] == classes
    assert run("eval", folder) == 0 and run("figures", folder, "--images 2") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("next:", "signature parts", "confused", "weakest classes", "heads"))
    (row,) = json_of(folder, "eval.json")["rows"]
    assert row["scores"] == log_of(folder)[-1]["test"] and set(row["reliance"]) == set(data.PARTS)
    pictures = [path.name for path in folder.glob("figures/*")]
    assert len(pictures) == 3 and "curves.png" in pictures and max(map(len, said.splitlines())) <= 130
    assert run("profile", folder, "--rounds 1 --out p --against=--accumulate=2") == 0
    first, second = json_of("p/profile.json")["rows"]
    assert (first["variant"], second["variant"]) == ("as given", "--accumulate=2")
    assert first["step ratio"] == 1 and second["infer ms/image"] > 0 and first["GMACs"] == row["macs"] > 1e-4
    assert json_of("p/profile.json")["classes"] == len(classes)


def test_real_birds_are_scored_beside_an_untrained_network_too(room):
    sets.cub(room)
    small = "--recipe toy --image-size 32 --resize 32 --batch-size 2 --epochs 1 --workers 0"
    assert run("--method tdsa --data cub --root .", small, "--out a") == 0 and run("eval a") == 0
    (row,) = json_of("a/eval.json")["rows"]
    kinds = {"best", "all", "untrained_best", "untrained_all", "chance", "constant"}
    assert set(row["pointing"]["signature"]) == kinds and "untrained_mean" in row["object_iou"]


def test_re_identification_trains_scores_and_draws_from_a_market_folder(room, capsys):
    sets.people(room / "market")
    flags = "--method dcal --data market1501 --root market --weights none --backbone toy_vit "
    flags += "--image-size 64,32 --resize 64,32 --batch-size 4 --instances 2 --epochs 1 --workers 0"
    assert run(flags, "--out a") == 0
    scores = log_of("a")[-1]["test"]
    assert set(scores) == {"mAP", "rank1", "rank5", "rank10", "skipped"} and 0 < scores["mAP"] <= 1
    said = capsys.readouterr().out
    assert f"test mAP {100 * scores['mAP']:.1f}%" in said and scores["skipped"] == 1 and "skipped 1" in said
    assert "skipped 100" not in said, "a number, not a share"
    loads = []
    before("load_data", lambda *_: loads.append(1)).start()
    assert run("eval a --infer both,sa") == 0 and len(loads) == 1, "variants of the model share the photos"
    assert run("figures a --images 2") == 0
    rows = json_of("a/eval.json")["rows"]
    assert rows[0]["scores"] == scores and [row["variant"] for row in rows] == ["infer=both", "infer=sa"]
    assert "ranks identities" in error("predict a market/query")


def test_figures_of_two_runs_stand_side_by_side_and_their_curves_in_one_chart(trained, room):
    headed, plot = (mock.patch.object(common, name, wraps=getattr(common, name)).start()
                    for name in ("headed", "plot"))
    assert run("figures", trained, "--images 1") == run("figures", trained, trained, "--images 1") == 0
    one, two = (Image.open(folder / "figures/test00000.png") for folder in (trained, trained.parent))
    assert two.width > 1.9 * one.width and two.height == one.height + 22  # under the name of its run
    model, classes, recipe = train.load(trained)
    split = data.load("toy", None, recipe).test
    image = train.to_model(data.Photos(split, recipe)[0][0][None], recipe, "cpu")
    share, best = model(image).softmax(1)[0].max(0)
    colour = "#1a7f37" if best == split.labels[0] else "#c62828"  # green, red
    heads = [list(call.args[1:]) for call in headed.call_args_list]
    assert [f"{classes[best]} {share:.1%}", colour] in heads
    assert [f"{Path(split.paths[0]).name}   {classes[split.labels[0]]}"] in heads
    charts = (call.args for call in plot.call_args_list[3:])  # of both runs
    charts = {title: set(series) for title, _, _, series, _ in charts}
    assert charts.pop("accuracy") == {"tdsa-toy training top1", "tdsa-toy test top1"}
    assert charts == {"losses": {"tdsa-toy loss"}, "learning rate": {"tdsa-toy lr"}}


@pytest.fixture
def photos(room):
    """Ten photos as people have them, one of which is none."""
    sizes = {"portrait.jpg": (90, 160), "panorama.png": (1200, 400), "turned.jpg": (120, 80)}
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("UPPER.JPG", "苹果.png", 'Müller, "A".jpg', "a/1.png", "b/1.jpg", "b/1.png", *sizes):
        path = room / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.effect_noise(sizes.get(name, (50, 40)), 90).convert("RGB")
        picture.save(path, **{"exif": turned} if name == "turned.jpg" else {})
    (room / "p/broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    return room / "p"


def test_predict_lists_every_photo_skips_the_unreadable_one_and_draws_the_originals(trained, photos, capsys):
    assert run("predict", trained, photos, "--out out --workers 1") == 1
    said, kept, out = capsys.readouterr(), json_of("out/predictions.json"), Path("out")
    assert "broken.jpg: cannot be read" in said.err and "1 of 10 files could not be read: " in said.out
    assert kept["unreadable"] == [str(photos / "broken.jpg")] and kept["run"] == str(trained)
    with open("out/predictions.csv", encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:3] == ["path", "class 1", "probability 1"] and len(head) == 11
    assert [row[0] for row in rows] == [str(p) for p in sorted(photos.rglob("*.*")) if p.name != "broken.jpg"]
    for row, entry in zip(rows, kept["photos"], strict=True):
        (best, share), (_, next_share), *_ = entry["top"]
        assert row[:2] == [entry["path"], best] and float(row[2]) == share >= next_share
        photo, page = data.open_photo(entry["path"]), Image.open(out / entry["picture"])
        scale = min(1, 800 / max(photo.size))
        assert page.size == (max(360, round(photo.width * scale)), round(photo.height * scale) + 80)
    before = {p: p.read_bytes() for p in out.glob("*.png")}
    names = {path.name for path in before}
    assert len({name.lower() for name in names}) == 9
    assert {"苹果.png", 'Müller, "A".png', "1.png", "1-2.png", "1-3.png"} <= names
    assert run("predict", trained, photos / "a", "--out out") == 0
    assert all(p.read_bytes() == content for p, content in before.items()) and (out / "1-4.png").exists()
    assert run("predict", trained, photos / "a", "--out bare --no-pictures") == 0
    assert not list(Path("bare").glob("*.png"))


def test_the_picture_of_a_photo_as_large_as_the_network_can_read(trained, room):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("L", (8300, 8200)).save("big.jpg", exif=turned)
    assert run("predict", trained, "big.jpg --out out") == 0
    (entry,) = json_of("out/predictions.json")["photos"]
    assert Image.open("out/big.png").size == (790, 880) and np.array(entry["boxes"]).max() > 4000


def test_boxes_of_predict_are_those_of_where_in_pixels_of_the_upright_photo(trained, photos):
    own = [str(photos / name) for name in ("turned.jpg", "panorama.png")]
    for out in ("--boxes --out boxes", "--out out"):
        assert run("predict", trained, *own, out) == 0
    entries = json_of("out/predictions.json")["photos"]
    assert entries == json_of("boxes/predictions.json")["photos"], "an own photo is its object's box"
    model, _, recipe = train.load(trained)
    items = data.Photos(data.Split(own, None, upright=True), recipe)
    for entry, (pixels, _, _, shown), size in zip(entries, items, ((80, 120), (1200, 400)), strict=True):
        boxes, scores = model.where(train.to_model(pixels[None], recipe, "cpu"))
        back = data.to_input(np.array(entry["boxes"]), shown.numpy(), recipe.image_size)
        np.testing.assert_allclose(back, boxes[0], atol=0.1)
        np.testing.assert_allclose(entry["scores"], scores[0].detach(), rtol=1e-4, atol=1e-6)
        centres = np.array(entry["boxes"]).reshape(-1, 2, 2).mean(1)
        assert (centres >= 0).all() and (centres <= size).all(), "in the photo as it is looked at"


# ------------------------------------------------------------------------------------------ tables
def two_rows(rows, data_name="cub", metric="top1"):
    """TDSA with a table of its own -> the runs that it trains, as they begin: (name, recipe)."""
    tables, runs = {"t": common.Table("two losses", data_name, metric, rows)}, []
    mock.patch.object(train.METHODS["tdsa"], "TABLES", tables).start()
    mock.patch.object(data, "reliance", lambda *_: {}).start()  # its drawings take seconds
    note = lambda _, flags, recipes, world: runs.append((Path(flags.out).name, recipes[0][1]))
    before("train", note).start()
    return runs


def results(folder="runs/table-tdsa-t-toy"):
    """The printed rows of a table, by name."""
    lines = [json_of(path)["line"] for path in Path(folder).glob("*.json")]
    text = Path(folder, "results.md").read_text()
    return {line["row"]: line for line in sorted(lines, key=lambda line: text.index(f"| {line['row']}"))}


def test_a_table_runs_its_rows_over_the_seeds_once_also_after_a_stop_and_a_row_equals_its_run(room, capsys):
    runs = two_rows((("CE", {"loss": "ce", "lr": 9.0}, 28.5), ("TDSA", {}, None)), "toy")
    folder, first = Path("runs/table-tdsa-t-toy"), ["tdsa-ce-seed0", "tdsa-tdsa-seed0"]
    with before("update", lambda *_: signal.raise_signal(signal.SIGTERM)):
        assert run(TABLE) == 143 and os.listdir(folder) == first[:1]
    assert run(TABLE) == 0 and last(folder / first[0])["step"] == 2
    assert runs[0][1].lr == 9.0, "on the table's own data the rows say all"
    assert run(TABLE, "--seeds 0,1") == 0
    assert [name for name, _ in runs] == [first[0], *first, "tdsa-ce-seed1", "tdsa-tdsa-seed1"]
    for seed, top1 in ((0, 0.25), (1, 0.75)):  # made by hand, to know the mean and the sd
        kept = json_of(path := folder / f"tdsa-ce-seed{seed}/result.json")
        kept["evaluations"]["{}"]["scores"]["top1"] = top1
        path.write_text(json.dumps(kept))
    capsys.readouterr()
    assert run(TABLE, "--seeds 0,1") == 0 and len(runs) == 5, "what is done is not run again"
    said = capsys.readouterr().out
    assert "two losses" in said and (folder / "results.md").read_text() in said and "nan" not in said
    assert (results()["CE"]["top1"], results()["CE"]["top1, paper"]) == ("50 +- 35 (2)", "28.5")
    assert results()["TDSA"]["top1, paper"] == "-" and len(json_of(folder, "tdsa-ce.json")["results"]) == 2
    assert run("--method tdsa", SMALL, "--toy-train 1 --epochs 1 --seed 1 --out single") == 0
    same(last(folder / "tdsa-tdsa-seed1")["model"], last("single")["model"])
    path = folder / "tdsa-ce-seed0/result.json"
    path.write_text(path.read_text().replace(train.git_commit(), "0000000"))
    assert run(TABLE) == 0 and results()["CE"]["commit"] == "0000000", "a row says which code it is of"
    assert "other settings" in error(TABLE, "--epochs 2")


def test_on_other_data_only_switches_vary_and_the_papers_column_stays_empty(room):
    rows = (("CE", {"loss": "ce", "lr": 9.0, "backbone": "resnet18"}, (28.5, None)),)
    runs = two_rows(rows, metric="top1 params")
    assert run(TABLE) == 0
    (_, recipe), toy = runs[0], train.METHODS["tdsa"].RECIPES["toy"]
    assert (recipe.loss, recipe.lr, recipe.backbone) == ("ce", toy.lr, "toy")
    assert results()["CE (toy)"]["top1, paper"] == "-", "28.5 is of ResNet-18 on CUB"
    two_rows(rows, "toy", "top1 params")
    assert run(TABLE, "--rows ce --backbone toy --out own") == 0
    flags, recipes = train.parse(words(TABLE))
    (row,) = train.rows_of("tdsa", flags, recipes[0][1])
    assert (row.label, row.paper, row.recipe.backbone) == ("CE", (28.5, None), "resnet18")


def test_a_row_starts_from_the_row_it_names_a_missing_file_ends_only_its_row_and_evaluations_share_runs(room):
    rows = ("large, b", {"loss": "ce", "start": "small: a"}, 1.0), ("small: a", {"loss": "ce"}, 2.0)
    rows += ("mc", {"loss": "mc"}, 3.0), ("near", {"loss": "ce", "eval": {"upsample": "nearest"}}, None)
    runs = two_rows(rows, metric="top1 params large")
    assert run(TABLE, "--rows large-b,mc,near --row-weights mc=nowhere.pt --seeds 0,1") == 0
    names = [f"tdsa-{row}-seed{seed}" for seed in (0, 1) for row in ("small-a", "large-b")]
    assert [name for name, _ in runs] == [*names, "tdsa-mc-seed0"], "near is a run of small-a"
    start = "runs/table-tdsa-t-toy/tdsa-small-a-seed"
    assert [recipe.weights for _, recipe in runs[1:4:2]] == [f"{start}0", f"{start}1"]
    assert set(json_of(f"{start}0", "result.json")["evaluations"]) == {'{"upsample": "nearest"}', "{}"}
    (first, mc, near), found = ("large, b (toy)", "mc (toy)", "near (toy)"), results()
    assert list(found) == [first, mc, near] and "nowhere.pt" in found[mc]["top1"]
    assert float(found[first]["params"].split()[0]) > 0.01 and "large, paper" in found[first]
    assert "the rows are large-b, small-a, mc, near" in error(TABLE, "--rows best")


def test_the_baseline_table_without_a_method_has_all_and_each_lists_its_tables(room, capsys):
    for method, module in train.METHODS.items():
        assert run("table --method", method) == 0
        said = capsys.readouterr().out
        assert all(table.title in said for table in module.TABLES.values())
    mock.patch.object(train, "METHODS", {name: train.METHODS[name] for name in ("dcal", "tdsa")}).start()
    mock.patch.object(data, "reliance", lambda *_: {}).start()
    assert run("table --table baseline", SMALL, "--toy-train 1 --epochs 1 --lr 0.1") == 0
    kept = [json_of(path)["recipe"]["lr"] for path in Path("runs/table-all-baseline-toy").glob("*/run.json")]
    assert {*kept} == {common.Recipe().lr}, "a flag holds for all, also one of the default's value"
    names = [f"{method}: {row}" for method, module in train.METHODS.items()
             for row, *_ in module.TABLES["baseline"].rows]
    assert [row.rpartition(" (")[0] for row in results("runs/table-all-baseline-toy")] == names
