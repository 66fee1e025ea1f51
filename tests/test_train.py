"""train.py: the command line, the loop's facts, exact resume, each action on tiny data, faults, tables."""
import csv
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import resource
import shlex
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import train

HERE = Path(train.__file__).parent
METHODS = list(train.METHODS)
SMALL = "--toy-train 2 --toy-test 1 --batch-size 8 "
TINY = f"--method tdsa {SMALL} --image-size 48 --resize 52 --iterations 6 "  # four steps an epoch
FOLDER = "--method tdsa --data folder --root photos --backbone toy --image-size 32 --resize 32 "
FOLDER += "--batch-size 4 --epochs 1 --weights none "


draw_bird = functools.cache(data.draw_bird)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty folder to run in; each bird is drawn once in all tests."""
    drawn = data.draw_bird
    monkeypatch.setattr(data, "draw_bird", lambda *bird: draw_bird(*bird) if len(bird) == 4 else drawn(*bird))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*argv):
    """Texts are split at blanks, paths and numbers are a word each."""
    return [word for one in argv for word in (one.split() if isinstance(one, str) else [str(one)])]


def run(*argv):
    """Exit status of a command line, in this process."""
    return train.main(words(*argv))


def child(argv, output, env, patch):
    """A forked process: its own environment and output."""
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    os.environ.update(env)
    patch()
    os._exit(run(*argv))


def forked(*argv, output="output.txt", patch=lambda: None, **env):
    """The command line in a process of its own, without the cost of importing torch again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=child, args=(argv, output, env, patch))
        process.start()
    return process


def together(*argv, patch=lambda: None):
    """The command line on two processes, as torchrun starts them -> their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    group = [forked(*argv, patch=patch, **meet, RANK=str(r), LOCAL_RANK=str(r)) for r in (0, 1)]
    for process in group:
        process.join(100)
    return [process.exitcode for process in group]


def wait_for(path, process):
    """Until a file is there, or the process has ended."""
    deadline = time.time() + 60
    while not Path(path).exists() and process.is_alive() and time.time() < deadline:
        time.sleep(0.02)


def last(folder):
    """A run's checkpoint, without what a clock wrote."""
    state = common.load_checkpoint(Path(folder) / "last.pt")
    state["sums"].pop("seconds", None)
    return state


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


@pytest.fixture
def at_step(monkeypatch):
    """at_step(act): `act(number, model)` before each step, counted from 1; returns what ends it."""

    def begin(act):
        real, numbers = train.update, itertools.count(1)

        def update(model, *rest):
            act(next(numbers), model)
            return real(model, *rest)

        monkeypatch.setattr(train, "update", update)
        return lambda: monkeypatch.setattr(train, "update", real)

    return begin


# ------------------------------------------------------------------------------------------ the command line


def test_without_a_method_or_with_a_typing_error_the_next_right_command_is_in_the_answer(room, capsys):
    def answer(*argv):
        assert run(*argv) == 2
        text = capsys.readouterr().err
        assert text.startswith("train.py: ") and len(text.splitlines()) == 1
        return text

    assert "python train.py --method tnet" in answer()
    assert "did you mean --method?" in answer("--metod", "tnet")
    assert "did you mean eval?" in answer("evl", "runs/x")
    assert "did you mean tnet?" in answer("--method", "tent")
    assert "did you mean --epochs?" in answer("--method", "tnet", "--epoch", 3)
    assert "python train.py --method tnet makes one" in answer("eval", "runs/tnet-toy")
    assert "python train.py eval RUN" in answer("eval")


def test_help_fits_a_screen_has_examples_and_help_all_every_switch(capsys):
    def lines(*argv):
        with pytest.raises(SystemExit, match="0"):
            train.main(list(argv))
        text = capsys.readouterr().out
        assert "nan" not in text.split()
        return text.splitlines()

    first = lines("--help")
    assert len(first) <= 24 and sum("python train.py" in line for line in first) >= 5
    assert max(map(len, first)) <= 110
    assert all(any(line.startswith(f"  {a}") for line in first) for a in train.ACTIONS)
    for action in train.ACTIONS:
        text = "\n".join(lines(action, "--help"))
        assert len(text.splitlines()) <= 60 and ("runs/" in text or "RUN/" in text or "--out DIR" in text)
        for f in dataclasses.fields(train.Flags):
            other = "for " in f.metadata["group"] and action not in f.metadata["group"]
            assert (common.flag(f) + " " in text.replace("\n", " ").replace(",", " ")) != other, f.name
        assert "--label-smoothing" not in text
    text = "\n".join(lines("--method", "tdsa", "--data", "cub", "--help-all"))
    fields = dataclasses.fields(train.METHODS["tdsa"].Recipe)
    assert all(common.flag(f) in text for f in fields) and "[224,224]" in text


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


WRONG = """
--method tnet --data mars ; unknown data
--method vgg ; unknown method
--method tnet --recipe mars ; no recipe
--method tnet --lr nan ; --lr
--method tnet --milestones nan ; --milestones
--method tnet --epochs 1e308 ; invalid int
--method tnet --device tpu ; --device
--method tnet --image-size 64,64,64 ; --image-size
--method tnet --nonsense 3 ; unknown argument --nonsense
--method tnet --toy-preset bird ; --toy-preset
--method tnet --crop-ratio=-- ; -- is no value
--method tnet --images 3 ; --images is for figures
--method tnet word ; train takes no 'word'
--method tnet --run r ; --run is for eval, predict, figures, profile
--method tnet --locations 0,1 ; several values are for eval and profile
--method tdsa --task reid ; --task
--method tnet --toy-train 1 --toy-test 1 --out text.txt ; text.txt
--method tnet --toy-train 1 --toy-test 1 --out text.txt/x ; text.txt
--method tnet --data folder ; --root
--method tnet --data folder --root nowhere ; nowhere
--method tnet --data cub --root empty ; empty
--method tnet --toy-train 1 --toy-test 1 --weights nowhere.pt ; nowhere.pt
--method tdsa --toy-train 1 --toy-test 1 --weights text.txt ; text.txt
--resume nowhere ; no run folder
--resume r --lr 3 ; goes on with the run's own recipe
eval r --method tnet ; leave --method
predict r ; name photos
predict r nowhere.jpg ; nowhere.jpg
predict r text.txt --resize 8,8 ; is smaller than --image-size
figures r nowhere --out new ; nowhere is no run folder
predict r empty ; empty
profile ; name a method
profile --method tnet --against --nonsense ; unknown argument --nonsense
table --method tnet --table 99 ; no table '99'
table --table 1 ; name a method
table --method tdsa --table 2 --seeds a ; --seeds
table --method tdsa --table 2 --seeds , ; one seed
table --method tdsa --table 2 --rows best ; the rows are
table --method tdsa --table 2 --root nowhere ; nowhere
"""


def test_a_wrong_command_line_ends_with_status_2_and_one_line_and_writes_nothing(trained, room, capsys):
    Path("empty").mkdir()
    Path("text.txt").write_text("hello")
    Path("r").symlink_to(trained)
    before = sorted(room.rglob("*")) + sorted(trained.rglob("*"))
    for case in WRONG.strip().splitlines():
        line, words = case.split(" ; ")
        assert run(*shlex.split(line)) == 2, line
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1 and text.startswith("train.py: ") and words in text, (line, text)
        assert sorted(room.rglob("*")) + sorted(trained.rglob("*")) == before, line


def test_every_number_of_the_flags_has_a_range_and_nothing_outside_it_is_taken():
    for f in dataclasses.fields(train.Flags):
        for value in (f.metadata["least"] - 1, f.metadata["most"] + 1, float("nan")):
            if isinstance(f.default, (int, tuple)) and f.type is not bool and "str" not in str(f.type):
                with pytest.raises(ValueError, match=f"{common.flag(f)} .*allowed"):
                    train.Flags(**{f.name: (value,) if isinstance(f.default, tuple) else value})


def test_json_of_the_wrong_shape_is_one_line_that_names_the_file(trained, room, capsys):
    good = json.loads((trained / "run.json").read_text())
    changes = (
        {"flags": None}, {"recipe": []}, {"recipe": {"lr": "fast"}}, {"recipe": {"lr": float("nan")}},
        {"classes": 3}, {"recipe": {"unknown": 1}}, {"recipe": {"image_size": [[1], {}]}}, {"method": "vgg"},
        {"data": "mars"}, {"flags": {"workers": "many"}}, {"flags": {"seed": -1}}, {"recipe_name": None},
    )
    bad = ["", "{half", "[]", "null", "{}", "[" * 100000, *(json.dumps(good | change) for change in changes)]
    Path("r").mkdir()
    for text in [*(text.encode() for text in bad), b"\xff\xfe{}"]:
        Path("r/run.json").write_bytes(text)
        for words in (["eval", "r"], ["--resume", "r"], ["figures", "r"]):
            assert run(*words) == 2, text[:80]
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1 and "r/run.json" in said, said[:300]
    Path("r/run.json").write_text(json.dumps(good))
    Path("r/result.json").write_text("[]")
    with pytest.raises(ValueError, match="result.json is damaged"):
        train.read_json(Path("r/result.json"), commit=str)


# ------------------------------------------------------------------------------------------ the loop


ALONE, NO_SCALER = train.World(torch.device("cpu")), torch.amp.GradScaler("cpu", enabled=False)


class Ones(torch.nn.Module):
    """loss = a * b, whatever the images."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, images, targets):
        loss = (self.a * self.b).sum()
        return loss, {"top1": loss.detach()}


def test_a_group_with_rate_zero_is_frozen_without_moments():
    model, recipe = Ones(), common.Recipe(optimizer="adamw", weight_decay=0.1)
    optimizer = train.make_optimizer(recipe, [{"params": [model.a]}, {"params": [model.b]}])
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.0, 0.1
    batch = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    train.update(model, optimizer, NO_SCALER, batch, recipe, ALONE)
    assert model.a.item() == 1 and model.a not in optimizer.state and model.b.item() < 1


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


def test_a_batch_is_cut_into_exactly_as_many_parts_as_the_recipe_says():
    sizes, model = [], Ones()
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    optimizer = train.make_optimizer(common.Recipe(), [{"params": model.parameters()}])
    batch = torch.zeros(7, 3, 4, 4, dtype=torch.uint8), torch.zeros(7, dtype=torch.long)
    loss, terms = train.update(model, optimizer, NO_SCALER, batch, common.Recipe(accumulate=5), ALONE)
    assert sizes == [2, 2, 1, 1, 1] and loss.item() == pytest.approx(1) and set(terms) == {"top1"}


PLAIN = f"--method dcal {SMALL} --backbone deit_tiny --image-size 32 --iterations 2 "
PLAIN += "--no-pwca --drop-path 0 --optimizer sgd --lr 0.1 "


def test_parts_of_a_batch_and_two_processes_give_the_weights_of_the_whole_batch_on_one(room):
    """DeiT has no BatchNorm, whose statistics would be those of the parts; only rounding differs."""
    assert run(PLAIN, "--out whole") == 0 and run(PLAIN, "--out parts --accumulate 4") == 0
    assert together(PLAIN, "--out two --workers 0") == [0, 0], Path("output.txt").read_text()
    whole = last("whole")["model"]
    start = train.METHODS["dcal"].build(train.load("whole")[2], 8).state_dict()
    assert max((whole[k] - start[k]).abs().max() for k in whole) > 1e-2, "they were trained"
    for other in ("parts", "two"):
        model = last(other)["model"]
        for k in whole:
            torch.testing.assert_close(model[k], whole[k], atol=2e-6, rtol=1e-4)
        assert log_of(other)[-1]["loss"] == pytest.approx(log_of("whole")[-1]["loss"], rel=1e-5)
    assert Path("output.txt").read_text().count("result:") == 1, "the first process writes and speaks"
    assert sorted(p.name for p in Path("two").iterdir()) == sorted(p.name for p in Path("whole").iterdir())


def test_two_processes_score_nine_photos_once_each_also_by_eval_run(room):
    photo_folder(room / "photos", per_class=3)
    assert together(FOLDER, "--out two") == [0, 0], Path("output.txt").read_text()
    assert together("eval two") == [0, 0], Path("output.txt").read_text()
    row = json.loads(Path("two/eval.json").read_text())["rows"][0]
    assert sum(n for _, n in row["per_class"].values()) == 9 and row["scores"] == log_of("two")[-1]["test"]
    assert run("eval two --out one") == 0
    assert json.loads(Path("one/eval.json").read_text())["rows"][0]["scores"] == row["scores"]


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
    log, result = log_of("r"), json.loads(Path("r/result.json").read_text())
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


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_in_an_epoch_resumes_bit_for_bit(method, room, at_step):
    flags = f"--method {method} {SMALL} --iterations 5 "
    assert run(flags, "--out whole") == 0

    def dying(number, model):
        assert number < 4, "killed a step after the checkpoint of step 2, in the middle of the first epoch"

    end = at_step(dying)
    with pytest.raises(AssertionError, match="killed"):
        run(flags, "--out cut --save-every 2")
    end()
    with open("cut/log.jsonl", "a") as file:
        file.write('{"step": 9, half a line')
    torch.manual_seed(99)  # what the process did since must not matter
    assert run("--resume cut") == 0
    same_run("whole", "cut")


def test_a_run_killed_by_the_system_resumes_bit_for_bit_with_other_workers(room):
    flags = TINY + "--iterations 9 --save-every 1 --grad-clip 1 "
    assert run(flags, "--out whole") == 0
    process = forked(flags, "--out killed --workers 2")
    wait_for("killed/last.pt", process)
    process.kill()
    process.join()
    assert 0 < last("killed")["step"] < 9 and process.exitcode == -signal.SIGKILL
    assert run("--resume killed --workers 1") == 0
    same_run("whole", "killed")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_and_one_in_an_evaluation_ends_and_repeats_it(number, status, room, monkeypatch, capsys):
    assert run(TINY, "--out whole") == 0
    for name in ("update", "run_over"):
        real = getattr(train, name)

        def interrupted(*args, **kwargs):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            return real(*args, **kwargs)

        monkeypatch.setattr(train, name, interrupted)
        assert run(TINY, "--out", name) == status
        said = capsys.readouterr()
        assert f"--resume {name}" in said.out + said.err
        assert last(name)["step"] == (1 if name == "update" else 4)
        assert len(log_of(name)) == 0
        monkeypatch.setattr(train, name, real)
        assert run("--resume", name) == 0
        same_run("whole", name)


DAMAGES = (
    lambda text: text, lambda text: text[:-9], lambda text: "[]\n5\n" + text + "{}\n\xff",
    lambda text: '"tset"'.join(text.rsplit('"test"', 1)),  # the last line has no scores
    lambda text: '{"step": 1, "epoch": 1, "seconds": 0, "test": {}, "loss": null}\n' + text,
)


def test_a_run_killed_after_its_last_checkpoint_or_line_still_ends_with_its_scores(room):
    assert run(TINY, "--out r") == 0
    whole, log = json.loads(Path("r/result.json").read_text()), log_of("r")
    for damage in DAMAGES:
        Path("r/result.json").unlink()
        path = Path("r/log.jsonl")
        path.write_bytes(damage(path.read_text()).encode("latin1"))
        assert run("--resume r") == 0
        result = json.loads(Path("r/result.json").read_text())
        assert result["top1"] == whole["top1"] and log_of("r") == log, "a damaged line never blocks a resume"
    assert run("--resume r") == 2, "it is finished"


def test_a_folder_without_a_checkpoint_is_begun_anew_by_the_same_command_and_by_resume(room, capsys):
    assert run(TINY, "--out whole") == 0
    assert run(TINY, "--out whole") == 2 and "eval whole shows it" in capsys.readouterr().err
    about = Path("whole/run.json").read_text()
    for i, left in enumerate(([], ["run.part"], ["run.json"], ["run.json", "log.jsonl", "last.part"])):
        folder = Path(f"r{i}")
        folder.mkdir()
        for name in left:
            (folder / name).write_text(about if name == "run.json" else "rest")
        assert run(*(["--resume", folder] if "log.jsonl" in left else [TINY, "--out", folder])) == 0
        same_run("whole", folder)


def test_of_two_starts_into_one_folder_one_wins_and_the_other_says_so(room, capsys):
    process = forked(TINY, "--iterations 1000000 --save-every 1 --out r")
    wait_for("r/run.json", process)
    assert run(TINY, "--out r") == 2
    assert re.search("another process trains in it|holds the run", capsys.readouterr().err)
    wait_for("r/last.pt", process)
    assert run("--resume r") == 2 and "another process trains in it" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143 and run(TINY, "--out r") == 2 and "--resume r" in capsys.readouterr().err


def test_resume_takes_the_runs_flags_and_refuses_other_classes_and_states(trained, room, capsys):
    photo_folder(room / "photos")
    assert run(FOLDER, "--seed 3 --eval-every 2 --out r") == 0
    flags, _ = train.parse(["--resume", "r", "--workers", "1"])
    assert (flags.seed, flags.eval_every, flags.workers, flags.root) == (3, 2, 1, str(room / "photos"))
    (room / "photos/test/Käse").rename(room / "photos/test/Wurst")
    (room / "photos/train/Käse").rename(room / "photos/train/Wurst")
    assert run("eval r") == 2 and "other classes (Käse, Wurst)" in capsys.readouterr().err
    state = common.load_checkpoint(trained / "last.pt")
    wrong = {"sums": None, "model": {}, "step": "x", "method": "vgg", "optimizer": {"state": 3}}
    for key, value in wrong.items():
        common.save_checkpoint(room / "r/last.pt", state | {key: value})
        Path("r/result.json").unlink(missing_ok=True)
        Path("r/run.json").write_text((trained / "run.json").read_text())
        assert run("--resume r") == 2 and "last.pt" in (said := capsys.readouterr().err)
        assert len(said.splitlines()) == 1


# ------------------------------------------------------------------------------------------ faults


def test_a_loss_that_is_not_finite_stops_with_step_terms_rate_and_photos(room, monkeypatch, capsys):
    real = train.update

    def poisoned(*args):
        loss, terms = real(*args)
        return loss * float("nan"), terms

    monkeypatch.setattr(train, "update", poisoned)
    assert run(TINY, "--out r") == 1
    said = capsys.readouterr().err
    assert re.search(r"the loss is nan at step 0, lr .*terms \{.*birds/train/", said)
    assert len(said.splitlines()) == 1


def test_weights_that_are_not_finite_are_never_saved_the_good_ones_stay(room, at_step, capsys):
    def poison(number, model):
        if number == 3:
            next(b for b in model.buffers() if b.is_floating_point()).fill_(float("inf"))  # a BatchNorm's

    end = at_step(poison)
    assert run(TINY, "--save-every 1 --out r") == 1 and "finite" in capsys.readouterr().err
    end()
    assert last("r")["step"] == 2 and run("--resume r") == 0


def test_a_dead_or_silent_worker_ends_with_one_line(room, monkeypatch, capsys):
    real = data.Photos.__getitem__
    monkeypatch.setattr(data.Photos, "__getitem__", lambda self, key: os.kill(os.getpid(), signal.SIGKILL))
    assert run(TINY, "--workers 1 --out r") == 1
    said = capsys.readouterr().err
    assert "fewer --workers, or a larger /dev/shm" in said and len(said.splitlines()) == 1
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (48, 48))
    few = forked(TINY, "--workers 8 --out s", patch=limit)
    few.join()
    said = Path("output.txt").read_text()
    assert few.exitcode == 1 and "open files" in said and "Traceback" not in said
    monkeypatch.setattr(data.Photos, "__getitem__", real)
    photos = data.Photos(data.Split([], [], images=[]), common.Recipe())
    loader = train.make_loader(photos, train.Flags(workers=2), ALONE)
    assert 0 < loader.timeout < 60


def test_an_unreadable_photo_stops_the_run_with_its_name_also_from_a_worker_or_is_left_out(room, capsys):
    photo_folder(room / "photos")
    (room / "photos/train/Käse/0.JPG").write_text("not a photo")
    assert run(FOLDER, "--workers 1 --out a") == 2
    said = capsys.readouterr().err
    assert "Käse/0.JPG" in said and len(said.splitlines()) == 1 and "Traceback" not in said
    assert "--skip-bad-images" in said
    assert run(FOLDER, "--skip-bad-images --out b") == 0
    (room / "photos/test/Käse/1.JPG").write_bytes((room / "photos/test/Käse/1.JPG").read_bytes()[:400])
    assert run("eval b --workers 1") == 0, "the run's switch holds for eval"
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback ...\nValueError: a.jpg: bad"
    assert train.fail(2, text) == 2 and capsys.readouterr().err.splitlines()[-1] == "train.py: a.jpg: bad"


def test_a_part_of_one_image_that_batchnorm_refuses_ends_with_advice(room, capsys):
    assert run("--method m2former", SMALL, "--accumulate 8 --out r") == 1
    assert "--batch-size, --accumulate" in capsys.readouterr().err


def test_out_of_memory_names_batch_accumulate_and_amp(room, at_step, capsys):
    at_step(lambda number, model: torch.empty(2**50))
    assert run(TINY, "--out r") == 1
    assert re.search("out of memory at batch 8.*--accumulate 2.*--amp bf16", capsys.readouterr().err)


def test_a_process_that_dies_ends_the_others_and_one_goes_on_from_the_checkpoint(room):
    def patch():
        real, calls = train.update, []

        def dying(*args):
            calls.append(1)
            if os.environ["RANK"] == "1" and len(calls) == 3:
                os._exit(9)
            return real(*args)

        train.update = dying

    assert together(TINY, "--save-every 1 --out r", patch=patch) == [1, 9]
    said = Path("output.txt").read_text()
    assert "train.py: this process lost the others" in said and "Traceback" not in said
    assert last("r")["step"] == 2 and run("--resume r") == 0 and last("r")["step"] == 6


def test_a_taken_port_is_one_line_of_each_process(room):
    """The first one cannot listen; the second meets a program that never answers."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1]), "WORLD_SIZE": "2"}
        soon = lambda: setattr(train, "MEETING", 2)
        group = [forked(TINY, output=r, patch=soon, **meet, RANK=r, LOCAL_RANK=r) for r in "01"]
        for rank, process in zip("01", group):
            process.join(60)
            said = [line for line in Path(rank).read_text().splitlines() if "train.py: " in line]
            assert process.exitcode == 1 and len(said) == 1 and "--master-port" in said[0]


# ------------------------------------------------------------------------------------------ the other actions


@pytest.mark.parametrize("method", METHODS)
def test_eval_figures_and_profile_of_each_method_write_their_files(method, room, capsys):
    assert run("--method", method, SMALL, "--iterations 1") == 0
    folder = room / "runs" / f"{method}-toy"
    about = json.loads((folder / "run.json").read_text())
    assert about["counts"] == {"train": 2 * len(about["classes"]), "test": len(about["classes"])}
    assert about["parameters"] > 1000
    assert run("eval", folder) == 0 and run("figures", folder, "--images 2") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("next:", "signature parts", "confused", "weakest classes", "heads"))
    row = json.loads((folder / "eval.json").read_text())["rows"][0]
    assert row["scores"] == log_of(folder)[-1]["test"] and set(row["reliance"]) == set(data.PARTS)
    assert row["macs"] > 1e-4
    pictures = sorted(p.name for p in (folder / "figures").iterdir())
    assert len(pictures) == 3 and "curves.png" in pictures and max(map(len, said.splitlines())) <= 130
    model, classes, recipe = train.load(folder)
    assert classes == about["classes"] and not model.training and type(recipe) is train.METHODS[method].Recipe
    assert model(torch.zeros(1, 3, *recipe.image_size)).shape == (1, len(classes))
    assert run("profile", folder, "--rounds 1 --out p --against=--accumulate=2") == 0
    kept = json.loads(Path("p/profile.json").read_text())
    assert [r["variant"] for r in kept["rows"]] == ["as given", "--accumulate=2"]
    assert kept["rows"][0]["step ratio"] == 1
    assert kept["rows"][1]["infer ms/image"] > 0 and kept["classes"] == len(classes)
    assert kept["rows"][0]["GMACs"] == row["macs"]


def test_re_identification_trains_scores_and_draws_from_a_market_folder(room, capsys):
    rng = np.random.default_rng(0)
    folders = {"bounding_box_train": (2, 7, 11), "query": (5, 6), "bounding_box_test": (5, 6, -1)}
    for folder, ids in folders.items():
        copies = range(1 if folder == "query" else 2)
        for pid, camera, i in itertools.product(ids, (1, 2), copies):
            name = "-1" if pid < 0 else f"{pid:04d}"
            path = room / "market" / folder / f"{name}_c{camera}s1_{i:06d}_00.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((rng.integers(0, 60, (40, 20, 3)) + 17 * max(pid, 0)).astype(np.uint8)).save(path)
    flags = "--method dcal --data market1501 --root market --weights none --backbone toy_vit "
    flags += "--image-size 64,32 --resize 64,32 --batch-size 4 --instances 2 --epochs 1 --workers 0"
    assert run(flags, "--out a") == 0
    scores = log_of("a")[-1]["test"]
    assert set(scores) == {"mAP", "rank1", "rank5", "rank10", "skipped"} and 0 < scores["mAP"] <= 1
    assert scores["skipped"] == 0
    said = capsys.readouterr().out
    assert f"test mAP {100 * scores['mAP']:.1f}%" in said and "skipped 0" in said
    assert "skipped 0.0%" not in said
    assert run("eval a --infer both,sa") == 0 and run("figures a --images 2") == 0
    rows = json.loads(Path("a/eval.json").read_text())["rows"]
    assert rows[0]["scores"] == scores and [row["variant"] for row in rows] == ["infer=both", "infer=sa"]
    assert run("predict a market/query") == 2 and "ranks identities" in capsys.readouterr().err


def test_figures_of_two_runs_stand_side_by_side_and_their_curves_in_one_chart(trained, room, monkeypatch):
    heads, series, real = [], {}, common.headed

    def headed(image, text, colour="black"):
        heads.append((text, colour))
        return real(image, text, colour)

    def plot(title, x_name, y_name, found, size):
        series[title] = found
        return Image.new("RGB", size)

    monkeypatch.setattr(common, "headed", headed)
    monkeypatch.setattr(common, "plot", plot)
    assert run("figures", trained, "--images 1") == 0 and run("figures", trained, trained, "--images 1") == 0
    folders = trained / "figures", trained.parent / "figures"
    one, two = (Image.open(folder / "test00000.png") for folder in folders)
    assert two.width > 1.9 * one.width
    answers = [(text, colour) for text, colour in heads if colour != "black"]
    right = [("green" if colour == "#1a7f37" else "red") for _, colour in answers]
    split, (model, classes, recipe) = data.load("toy", None, train.load(trained)[2]).test, train.load(trained)
    image = train.to_model(data.Photos(split, recipe)[0][0][None], recipe, "cpu")
    share, best = model(image).softmax(1)[0].max(0)
    assert answers[0][0] == f"{classes[best]} {share:.1%}"
    assert right[0] == ("green" if best == split.labels[0] else "red")
    assert any(Path(split.paths[0]).name in text and classes[split.labels[0]] in text for text, _ in heads)
    name = Path(trained).name
    assert set(series) == {"losses", "accuracy", "learning rate"}
    assert set(series["losses"]) == {f"{name} loss"}
    assert {f"{name} training top1", f"{name} test top1"} == set(series["accuracy"])


@pytest.fixture
def photos(room):
    """Ten photos as people have them, one of which is none."""
    rng = np.random.default_rng(1)

    def save(path, size, **how):
        (room / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(room / path, **how)

    turned = Image.Exif()
    turned[0x0112] = 6
    for path in ("UPPER.JPG", "苹果.png", 'Müller, "A".jpg', "a/1.png", "b/1.jpg", "b/1.png"):
        save(f"p/{path}", (50, 40))
    for path, size in (("p/portrait.jpg", (90, 160)), ("p/panorama.png", (1200, 400))):
        save(path, size)
    save("p/turned.jpg", (120, 80), exif=turned)
    (room / "p/broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    return room / "p"


def test_predict_lists_every_photo_skips_the_unreadable_one_and_draws_the_originals(trained, photos, capsys):
    assert run("predict", trained, photos, "--out out --workers 1") == 1
    said = capsys.readouterr()
    assert "broken.jpg: cannot be read" in said.err and "1 of 10 files could not be read: " in said.out
    with open("out/predictions.csv", encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    kept = json.loads(Path("out/predictions.json").read_text(encoding="utf-8"))
    assert len(rows) == len(kept["photos"]) == 9 and kept["run"] == str(trained)
    assert head[:3] == ["path", "class 1", "probability 1"] and len(head) == 11
    assert kept["unreadable"] == [str(photos / "broken.jpg")]
    assert {row[0] for row in rows} == {str(p) for p in photos.rglob("*.*") if p.name != "broken.jpg"}
    names = [entry["picture"] for entry in kept["photos"]]
    assert len({name.lower() for name in names}) == 9
    assert {"苹果.png", 'Müller, "A".png', "1.png", "1-2.png", "1-3.png"} <= set(names)
    for row, entry in zip(rows, kept["photos"]):
        top = entry["top"]
        assert row[0] == entry["path"] and row[1] == top[0][0] and float(row[2]) == top[0][1] >= top[1][1]
        photo = data.open_photo(entry["path"])
        scale = min(1, 800 / max(photo.size))
        page = Image.open(Path("out") / entry["picture"])
        assert page.size == (max(360, round(photo.width * scale)), round(photo.height * scale) + 80)
    before = {p: p.read_bytes() for p in Path("out").glob("*.png")}
    assert run("predict", trained, photos / "a", "--out out") == 0
    assert all(p.read_bytes() == content for p, content in before.items()) and Path("out/1-4.png").exists()
    assert run("predict", trained, photos / "a", "--out bare --no-pictures") == 0
    assert not list(Path("bare").glob("*.png"))


def test_boxes_of_predict_are_those_of_where_in_pixels_of_the_upright_photo(trained, photos):
    model, classes, recipe = train.load(trained)
    own = trained, photos / "turned.jpg", photos / "panorama.png"
    assert run("predict", *own, "--boxes --out boxes") == run("predict", *own, "--out out") == 0
    answers = [json.loads(Path(out, "predictions.json").read_text())["photos"] for out in ("boxes", "out")]
    assert answers[0] == answers[1], "an own photo is its object's box"
    split = data.Split([str(photos / "turned.jpg"), str(photos / "panorama.png")], None, upright=True)
    items = [data.Photos(split, recipe)[i] for i in range(2)]
    boxes, scores = model.where(train.to_model(torch.stack([item[0] for item in items]), recipe, "cpu"))
    kept = {Path(e["path"]).name: e for e in json.loads(Path("out/predictions.json").read_text())["photos"]}
    for i, (name, size) in enumerate((("turned.jpg", (80, 120)), ("panorama.png", (1200, 400)))):
        entry = kept[name]
        back = data.to_input(np.array(entry["boxes"]), items[i][3].numpy(), recipe.image_size)
        np.testing.assert_allclose(back, boxes[i].numpy(), atol=0.1)
        np.testing.assert_allclose(entry["scores"], scores[i].detach().numpy(), rtol=1e-4, atol=1e-6)
        centres = np.array(entry["boxes"]).reshape(-1, 2, 2).mean(1)
        assert (centres >= 0).all() and (centres <= size).all(), "in the photo as it is looked at"


# ------------------------------------------------------------------------------------------ tables


def two_rows(monkeypatch, rows, data_name="cub", metric="top1"):
    """TDSA with a table of its own."""
    tables, calls, real = {"t": common.Table("two losses", data_name, metric, rows)}, [], train.train

    def remembered(flags, recipes, world):
        calls.append((Path(flags.out).name, recipes[0][1]))
        return real(flags, recipes, world)

    monkeypatch.setattr(train.METHODS["tdsa"], "TABLES", tables)
    monkeypatch.setattr(data, "reliance", lambda *_: {})  # its drawings take seconds
    monkeypatch.setattr(train, "train", remembered)
    return calls


TABLE = f"table --method tdsa --table t {SMALL} --toy-train 1 --epochs 1 "


def results(folder="runs/table-tdsa-t-toy"):
    """The printed rows of a table, by name."""
    lines = [json.loads(path.read_text())["line"] for path in Path(folder).glob("*.json")]
    text = Path(folder, "results.md").read_text()
    return {line["row"]: line for line in sorted(lines, key=lambda line: text.index(f"| {line['row']}"))}


def test_a_table_runs_its_rows_over_the_seeds_once_and_a_row_equals_the_single_run(room, monkeypatch, capsys):
    calls = two_rows(monkeypatch, (("CE", {"loss": "ce", "lr": 9.0}, 28.5), ("TDSA", {}, None)), "toy")
    assert run(TABLE) == 0 and [name for name, _ in calls] == ["tdsa-ce-seed0", "tdsa-tdsa-seed0"]
    assert calls[0][1].lr == 9.0, "on the table's own data the rows say all"
    assert run(TABLE, "--seeds 0,1") == 0
    assert [name for name, _ in calls[2:]] == ["tdsa-ce-seed1", "tdsa-tdsa-seed1"]
    folder = Path("runs/table-tdsa-t-toy")
    for seed, top1 in ((0, 0.25), (1, 0.75)):  # made by hand, to know the mean and the sd
        path = folder / f"tdsa-ce-seed{seed}/result.json"
        kept = json.loads(path.read_text())
        kept["evaluations"]["{}"]["scores"]["top1"] = top1
        path.write_text(json.dumps(kept))
    capsys.readouterr()
    assert run(TABLE, "--seeds 0,1") == 0 and len(calls) == 4, "what is done is not run again"
    said = capsys.readouterr().out
    assert "two losses" in said and "50 +- 35 (2)" in said and "28.5" in said
    assert said == said.replace("nan", "")
    assert results()["CE"]["top1, paper"] == "28.5" and results()["TDSA"]["top1, paper"] == "-"
    assert "50 +- 35 (2)" in (folder / "results.md").read_text()
    assert len(json.loads((folder / "tdsa-ce.json").read_text())["results"]) == 2
    assert run("--method tdsa", SMALL, "--toy-train 1 --epochs 1 --seed 1 --out single") == 0
    same(last(folder / "tdsa-tdsa-seed1")["model"], last("single")["model"])
    path = folder / "tdsa-ce-seed0/result.json"
    path.write_text(path.read_text().replace(train.git_commit(), "0000000"))
    assert run(TABLE) == 0 and results()["CE"]["commit"] == "0000000", "a row says which code it is of"
    assert run(TABLE, "--epochs 2") == 2 and "other settings" in capsys.readouterr().err


def test_on_other_data_only_switches_vary_and_the_papers_column_stays_empty(room, monkeypatch):
    rows = (("CE", {"loss": "ce", "lr": 9.0, "backbone": "resnet18"}, 28.5),)
    calls = two_rows(monkeypatch, rows)
    assert run(TABLE) == 0
    recipe = calls[0][1]
    assert (recipe.loss, recipe.lr, recipe.backbone) == ("ce", train.METHODS["tdsa"].RECIPES["toy"].lr, "toy")
    row = results()["CE (toy)"]
    assert row["top1, paper"] == "-", "28.5 is of ResNet-18 on CUB"
    rows = (("CE", {"loss": "ce", "backbone": "resnet18"}, (28.5, None)),)
    two_rows(monkeypatch, rows, "toy", "top1 params")
    assert run(TABLE, "--rows ce --backbone toy --out own") == 0
    flags, recipes = train.parse(words(TABLE))
    (row,) = train.rows_of("tdsa", flags, recipes[0][1])
    assert row.label == "CE" and row.paper == (28.5, None) and row.recipe.backbone == "resnet18"


def test_a_row_starts_from_the_row_it_names_and_a_missing_file_ends_only_its_row(room, monkeypatch, capsys):
    rows = (
        ("large, b", {"loss": "ce", "start": "small: a"}, 1.0),
        ("small: a", {"loss": "ce"}, 2.0),
        ("mc", {"loss": "mc"}, 3.0),
    )
    calls = two_rows(monkeypatch, rows, metric="top1 params large")
    assert run(TABLE, "--rows large-b,mc --row-weights mc=nowhere.pt --seeds 0,1") == 0
    names = [f"tdsa-{row}-seed{seed}" for seed in (0, 1) for row in ("small-a", "large-b")]
    assert [name for name, _ in calls] == [*names, "tdsa-mc-seed0"]
    assert calls[1][1].weights == "runs/table-tdsa-t-toy/tdsa-small-a-seed0"
    assert calls[3][1].weights.endswith("small-a-seed1")
    found = results()
    assert list(found) == ["large, b (toy)", "mc (toy)"] and "nowhere.pt" in found["mc (toy)"]["top1"]
    assert float(found["large, b (toy)"]["params"].split()[0]) > 0.01
    assert "large, paper" in found["large, b (toy)"]
    assert run(TABLE, "--rows best") == 2 and "the rows are large-b, small-a, mc" in capsys.readouterr().err


def test_rows_that_differ_only_in_how_they_are_evaluated_share_one_training(room, monkeypatch):
    rows = (("3", {"eval": {"upsample": "nearest"}}, 1.0), ("0", {}, 2.0), ("ce", {"loss": "ce"}, None))
    calls = two_rows(monkeypatch, rows)
    assert run(TABLE) == 0 and [name for name, _ in calls] == ["tdsa-3-seed0", "tdsa-ce-seed0"]
    kept = json.loads(Path("runs/table-tdsa-t-toy/tdsa-3-seed0/result.json").read_text())["evaluations"]
    assert set(kept) == {'{"upsample": "nearest"}', "{}"}
    assert set(results()) == {"3 (toy)", "0 (toy)", "ce (toy)"}


def test_a_stopped_table_stops_and_goes_on_where_it_was(room, monkeypatch, at_step):
    two_rows(monkeypatch, (("CE", {"loss": "ce"}, 28.5), ("TDSA", {}, None)))
    end = at_step(lambda number, model: os.kill(os.getpid(), signal.SIGTERM))
    assert run(TABLE) == 143
    assert [p.name for p in Path("runs/table-tdsa-t-toy").iterdir()] == ["tdsa-ce-seed0"]
    end()
    assert run(TABLE) == 0 and last("runs/table-tdsa-t-toy/tdsa-ce-seed0")["step"] == 2


def test_the_baseline_table_without_a_method_has_all_and_each_lists_its_tables(room, monkeypatch, capsys):
    for method in METHODS:
        assert run("table --method", method) == 0
        said = capsys.readouterr().out
        assert all(table.title in said for table in train.METHODS[method].TABLES.values())
    monkeypatch.setattr(train, "METHODS", {name: train.METHODS[name] for name in ("dcal", "tdsa")})
    monkeypatch.setattr(data, "reliance", lambda *_: {})
    assert run("table --table baseline", SMALL, "--toy-train 1 --epochs 1") == 0
    tables = {method: module.TABLES["baseline"] for method, module in train.METHODS.items()}
    names = [f"{method}: {row[0]}" for method, table in tables.items() for row in table.rows]
    assert [row.rpartition(" (")[0] for row in results("runs/table-all-baseline-toy")] == names


# ------------------------------------------------------------------------------------------ the house


def test_train_knows_no_paper_no_bird_and_no_box():
    text = (HERE / "train.py").read_text()
    found = [line for line in text.splitlines() if re.search("toy|reid|market|locations", line)]
    assert all(re.search("""runs/|["']toy["']""", line) for line in found), found
    assert not re.search(r"^import (train)|from train",
        "".join((HERE / f"{m}.py").read_text() for m in METHODS), re.M)
