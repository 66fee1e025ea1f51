"""train.py: every action for every method on a tiny toy, exact resume, faults, several processes, bad command lines."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import train

HERE = Path(train.__file__).parent
TINY = ["--toy-train", "2", "--toy-test", "1", "--epochs", "2", "--batch-size", "8"]
METHODS = list(train.METHODS)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    """Exit status of a command line, in this process."""
    return train.main([str(a) for a in argv])


def last(folder):
    """State of a run's checkpoint."""
    return common.load_checkpoint(Path(folder) / "last.pt")


def same(a, b, path=""):
    """Both nested states are equal, bit for bit; names what is not."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def log_without_clock(folder):
    """The log's entries without what a clock wrote."""
    return [{k: v for k, v in entry.items() if k not in ("seconds", "images_per_second")} for entry in train.read_log(Path(folder) / "log.jsonl")]


def photo_folder(root, per_class=4, splits=("train", "test")):
    """An image folder of three classes of coloured noise."""
    rng = np.random.default_rng(0)
    for split in splits:
        for c in range(3):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(np.clip(rng.normal(60 + 60 * c, 20, (70, 90, 3)), 0, 255).astype(np.uint8)).save(root / split / f"class{c}" / f"{i}.JPG")
    return root


SMALL = ["--method", "tdsa", "--data", "folder", "--backbone", "toy", "--image-size", "64", "--resize", "64", "--epochs", "1", "--batch-size", "4"]


@pytest.fixture
def two_rows(monkeypatch):
    """TDSA with a table of two rows."""
    tables = {"t": common.Table("two losses", "cub", "top1", (("CE", {"loss": "ce"}, 28.5), ("TDSA", {}, None)))}
    monkeypatch.setattr(train.METHODS["tdsa"], "TABLES", tables)


TABLE = ["table", "--method", "tdsa", "--table", "t", "--toy-train", "1", "--toy-test", "1", "--epochs", "1", "--batch-size", "8"]


@pytest.mark.parametrize("method", METHODS)
def test_every_action_runs_for_each_method_and_writes_its_files(method, room, capsys):
    assert run("--method", method, *TINY) == 0
    folder = room / "runs" / f"{method}-toy"
    assert {"run.json", "log.jsonl", "last.pt", "result.json"} <= {p.name for p in folder.iterdir()}
    info, log = json.loads((folder / "run.json").read_text()), train.read_log(folder / "log.jsonl")
    assert info["method"] == method and info["counts"]["train"] == 2 * len(info["classes"]) and info["parameters"] > 1000
    assert [e["epoch"] for e in log] == [1, 2] and np.isfinite(log[-1]["loss"]) and 0 <= log[-1]["test"]["top1"] <= 1
    said = capsys.readouterr().out
    assert "result: test top1" in said and f"predict --run runs/{method}-toy" in said

    assert run("eval", "--run", folder) == 0
    said = capsys.readouterr().out
    row = json.loads((folder / "eval.json").read_text())["rows"][0]
    assert "signature parts" in said and "most confused" in said and "weakest classes" in said and "reliance" in said
    assert row["scores"]["top1"] == pytest.approx(log[-1]["test"]["top1"]), "eval repeats what training measured"
    assert set(row["reliance"]) == set(data.PARTS) and row["macs"] > 1e5

    bird = data.draw_bird("birds", "test", 3, 80)
    (room / "photos").mkdir()
    Image.fromarray(bird.image).save(room / "photos" / "bird.png")
    Image.fromarray(bird.image).convert("L").save(room / "photos" / "GREY.JPG")
    assert run("predict", "--run", folder, room / "photos") == 0
    said = capsys.readouterr().out
    assert "bird.png" in said and "GREY.JPG" in said and said.count("%") >= 6
    assert Image.open(folder / "predict" / "bird.png").size[0] > 300

    assert run("figures", "--run", folder, "--images", 2) == 0
    pictures = sorted((folder / "figures").glob("*.png"))
    assert len(pictures) == 3 and all(np.asarray(Image.open(p)).std() > 5 for p in pictures)
    assert run("figures", "--run", folder, "--images", 2, "--format", "jpg", "--out", "jpgs") == 0
    assert np.abs(np.asarray(Image.open("jpgs/test00000.jpg"), float) - np.asarray(Image.open(pictures[1]).convert("RGB"), float)).mean() < 6

    assert run("profile", "--method", method, "--rounds", 1) == 0
    assert "GMACs" in capsys.readouterr().out


def test_re_identification_trains_scores_and_draws_from_a_market_folder(room, capsys):
    rng = np.random.default_rng(0)
    for folder, ids, copies in (("bounding_box_train", (2, 7, 11), 2), ("query", (5, 6), 1), ("bounding_box_test", (5, 6, -1), 2)):
        for pid in ids:
            for camera in (1, 2):
                for i in range(copies):
                    path = room / "market" / folder / f"{'-1' if pid < 0 else f'{pid:04d}'}_c{camera}s1_{i:06d}_00.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray((rng.integers(0, 60, (40, 20, 3)) + 17 * max(pid, 0)).astype(np.uint8)).save(path)
    flags = ["--method", "dcal", "--data", "market1501", "--root", "market", "--weights", "none", "--backbone", "toy_vit", "--image-size", "64,32", "--batch-size", 4, "--instances", 2, "--epochs", 2, "--workers", 0]
    assert run(*flags, "--out", "a") == 0
    scores = train.read_log(Path("a/log.jsonl"))[-1]["test"]
    assert set(scores) == {"mAP", "rank1", "rank5", "rank10", "skipped"} and 0 < scores["mAP"] <= 1 and scores["skipped"] == 0
    said = capsys.readouterr().out
    assert f"test mAP {100 * scores['mAP']:.1f}%" in said and "skipped 0" in said and "skipped 0.0%" not in said
    assert run("eval", "--run", "a", "--infer", "both,sa") == 0 and run("figures", "--run", "a", "--images", 2) == 0
    rows = json.loads(Path("a/eval.json").read_text())["rows"]
    assert rows[0]["scores"] == scores and [row["variant"] for row in rows] == ["infer=both", "infer=sa"] and len(list(Path("a/figures").glob("test*.png"))) == 2
    assert run("predict", "--run", "a", "market/query") == 2 and "ranks identities" in capsys.readouterr().err


def test_time_left_is_what_the_rate_so_far_gives(monkeypatch):
    monkeypatch.setattr(train.time, "perf_counter", lambda: 100.0)
    assert train.time_left(40.0, 30, 45) == "1:30" and train.time_left(40.0, 1, 61) == "1:01:00" and train.time_left(100.0, 0, 5) == "0:00"


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_weights_state_and_log_bit_for_bit(method, room, monkeypatch):
    flags = ["--method", method, "--toy-train", "3", "--toy-test", "1", "--iterations", "6", "--batch-size", "8"]
    assert run(*flags, "--out", "whole") == 0

    class Killed(BaseException):
        pass

    real, calls = train.update, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # two steps after the checkpoint of step 2: in the middle of the first epoch
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "update", dying)
    with pytest.raises(Killed):
        run(*flags, "--out", "cut", "--save-every", 2)
    monkeypatch.setattr(train, "update", real)
    torch.manual_seed(99)  # what the process did since must not matter
    assert run("--resume", "cut") == 0
    a, b = last("whole"), last("cut")
    for state in (a, b):
        state.pop("seconds")
    same(a, b)
    assert log_without_clock("whole") == log_without_clock("cut")


def test_resume_is_exact_with_workers_ema_and_accumulation(room, monkeypatch):
    flags = ["--method", "tdsa", "--toy-train", "2", "--toy-test", "1", "--iterations", "6", "--batch-size", "8", "--ema", "0.9", "--accumulate", "2", "--workers", "2", "--grad-clip", "1"]
    assert run(*flags, "--out", "whole") == 0
    real, calls = train.update, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "update", stopping)
    assert run(*flags, "--out", "cut") == 128 + signal.SIGTERM
    monkeypatch.setattr(train, "update", real)
    assert last("cut")["step"] == 3
    assert run("--resume", "cut", "--workers", 1) == 0
    a, b = last("whole"), last("cut")
    assert a["ema"] and not torch.equal(next(iter(a["ema"].values())), next(iter(a["model"].values())))
    for state in (a, b):
        state.pop("seconds")
    same(a, b)


def test_sigkill_leaves_a_run_that_goes_on(room):
    command = [sys.executable, str(HERE / "train.py"), "--method", "tdsa", "--toy-train", "2", "--toy-test", "1", "--iterations", "1000000", "--batch-size", "8", "--save-every", "1", "--out", "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 100
    while not (room / "killed" / "last.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    step = last("killed")["step"]
    assert step >= 1
    info = train.read_run("killed")
    info["recipe"]["iterations"] = step + 1  # cut the endless run short
    train.write_json(room / "killed" / "run.json", info)
    assert run("--resume", "killed") == 0 and last("killed")["step"] == step + 1


def test_ctrl_c_saves_and_exits_130_and_a_stop_during_evaluation_repeats_the_evaluation(room, monkeypatch, capsys):
    flags = ["--method", "tdsa", *TINY]
    assert run(*flags, "--out", "whole") == 0
    real = train.run_over

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "run_over", interrupted)
    assert run(*flags, "--out", "cut") == 130
    assert "--resume cut" in capsys.readouterr().out
    monkeypatch.setattr(train, "run_over", real)
    assert run("--resume", "cut") == 0
    assert log_without_clock("whole") == log_without_clock("cut")
    same(last("whole")["model"], last("cut")["model"])


def test_sigterm_while_saving_keeps_the_checkpoint_whole(room, monkeypatch):
    real = common.save_checkpoint

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    monkeypatch.setattr(common, "save_checkpoint", interrupted)
    assert run("--method", "tdsa", *TINY, "--out", "cut") == 143
    monkeypatch.setattr(common, "save_checkpoint", real)
    assert run("--resume", "cut") == 0


def test_two_processes_write_one_log_and_score_nine_test_images_once_each(room):
    photo_folder(room / "photos", per_class=3)
    flags = [*SMALL, "--root", "photos", "--iterations", "3", "--out"]
    assert run(*flags, "one") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(29500 + os.getpid() % 2000), str(HERE / "train.py")]
    done = subprocess.run([*launch, *flags, "two"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = log_without_clock("one"), log_without_clock("two")
    assert [(e["step"], e["lr"]) for e in one] == [(e["step"], e["lr"]) for e in two] and done.stdout.count("result:") == 1
    assert sorted(p.name for p in Path("one").iterdir()) == sorted(p.name for p in Path("two").iterdir())
    assert run("eval", "--run", "two") == 0
    scores = json.loads(Path("two/eval.json").read_text())["rows"][0]
    assert sum(n for _, n in scores["per_class"].values()) == 9
    assert scores["scores"] == two[-1]["test"], "nine images over two processes give the numbers of one"


WORKER = """
import os, sys, torch, train, data, common
DETERMINISTIC = {"tnet": dict(select="topk"), "dcal": dict(pwca=False, drop_path=0.0), "m2former": dict(drop_path=0.0), "vit_fgvc": dict(drop_path=0.0), "tdsa": {}}
results = {}
for method, module in train.METHODS.items():
    opts = train.parse(["--method", method, "--toy-train", "2", "--toy-test", "1", "--batch-size", "8", "--device", "cpu"])
    if "world" not in globals():
        world = train.start(opts)
    recipe = train.dataclasses.replace(opts.recipe, optimizer="sgd", **DETERMINISTIC[method])  # Adam would blow up the rounding of gradients that are zero
    photos = data.Photos(train.load_data(opts).train, recipe, False)
    torch.manual_seed(1)
    model = module.build(recipe, 16)
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.train = lambda mode, m=m: m  # frozen statistics: batch statistics are each process's own
            m.training = False
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world.size > 1 else model
    optimizer = train.make_optimizer(recipe, module.param_groups(model, recipe))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    context, scaler = train.precision(recipe, world.device)
    mine = range(8)[world.rank * 8 // world.size : (world.rank + 1) * 8 // world.size]
    (batch, _) = train.collate([photos[i] for i in mine])
    for step in range(2):
        torch.manual_seed(step)  # TDSA's mask of the batch
        loss, terms, _ = train.update(recipe, model, wrapped, optimizer, scaler, context, batch, world, lambda: "test")
    losses = world.gather(loss.item())
    results[method] = {"loss": sum(losses) / len(losses), "weights": {k: v.clone() for k, v in model.state_dict().items()}}
if world.rank == 0:
    torch.save(results, sys.argv[1])
if world.size > 1:
    torch.distributed.destroy_process_group()
    os._exit(0)  # as train.py does
"""


def test_two_processes_give_the_losses_and_weights_of_one_for_each_method(tmp_path):
    """The same global batch on one and on two processes, two steps, BatchNorm statistics frozen (they are per process otherwise)."""
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(31500 + os.getpid() % 2000), str(tmp_path / "worker.py"), str(tmp_path / "two.pt")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "one.pt")], capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = torch.load(tmp_path / "one.pt", weights_only=True), torch.load(tmp_path / "two.pt", weights_only=True)
    for method in METHODS:
        assert two[method]["loss"] == pytest.approx(one[method]["loss"], rel=1e-5), method
        for name, value in one[method]["weights"].items():
            torch.testing.assert_close(two[method]["weights"][name], value, atol=1e-5, rtol=1e-4, msg=lambda m: f"{method} {name}: {m}")


DYING = """
import os, sys, train
real, calls = train.update, []
def update(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        raise ValueError("the second process has had enough")
    return real(*args, **kwargs)
train.update = update
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_process_that_dies_ends_the_others_and_one_process_goes_on_from_the_last_checkpoint(room):
    (room / "dying.py").write_text(DYING)
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(33500 + os.getpid() % 2000), str(room / "dying.py")]
    began = time.time()
    done = subprocess.run([*launch, "--method", "tdsa", "--toy-train", "2", "--toy-test", "1", "--iterations", "6", "--batch-size", "8", "--save-every", "1", "--out", "dead"], capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode != 0 and "train.py: the second process has had enough" in done.stderr and time.time() - began < 100
    assert last("dead")["step"] == 3, "the last checkpoint stays"
    assert run("--resume", "dead") == 0 and last("dead")["step"] == 6


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_checkpoint_is_never_loaded(damage, tmp_path):
    """Truncated at twenty places, or one bit flipped at twenty places: an error every time, or (a bit of zip padding) the very same state."""
    state = {"step": 3, "model": {"w": torch.arange(600.0)}, "log": ["a", 1.5, None, (1, 2)]}
    common.save_checkpoint(tmp_path / "last.pt", state)
    raw = (tmp_path / "last.pt").read_bytes()
    refused = 0
    for k in range(20):
        at = (2 * k + 1) * len(raw) // 40
        bad = raw[:at] if damage == "cut" else raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1:]
        (tmp_path / "bad.pt").write_bytes(bad)
        try:
            same(common.load_checkpoint(tmp_path / "bad.pt"), state)
        except ValueError as error:
            assert "bad.pt" in str(error)
            refused += 1
    assert refused == 20 if damage == "cut" else refused >= 8


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(room, capsys):
    assert run("--method", "tdsa", *TINY, "--out", "r") == 0
    (room / "r" / "result.json").unlink()
    raw = (room / "r" / "last.pt").read_bytes()
    (room / "r" / "last.pt").write_bytes(raw[: len(raw) // 2])
    assert run("--resume", "r") == 0
    assert "going on from r/last.prev.pt" in capsys.readouterr().err
    assert last("r")["step"] == 8 and common.load_checkpoint(room / "r" / "last.prev.pt")["step"] < 8, "the damaged file is gone"


def test_foreign_newer_and_pickled_checkpoints_are_refused_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"format": 1, "checksum": "", "state": Evil()}, tmp_path / "evil.pt")
    torch.save({"format": 2, "checksum": "", "state": {}}, tmp_path / "newer.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    for name, words in (("evil", "damaged or no checkpoint"), ("newer", "format 2"), ("foreign", "no checkpoint of ours")):
        with pytest.raises(ValueError, match=words):
            common.load_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    common.save_checkpoint(tmp_path / "last.pt", {"step": 1})

    def full(value, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left.*previous checkpoint is untouched"):
        common.save_checkpoint(tmp_path / "last.pt", {"step": 2})
    assert common.load_checkpoint(tmp_path / "last.pt") == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_loss_that_is_not_finite_stops_with_step_terms_rate_and_photos(room, monkeypatch, capsys):
    build = train.METHODS["tdsa"].build

    def broken(recipe, classes):
        model = build(recipe, classes)
        forward = model.forward

        def poisoned(images, targets=None):
            out = forward(images, targets)
            return out if targets is None else (out[0] * float("nan"), out[1])

        model.forward = poisoned
        return model

    monkeypatch.setattr(train.METHODS["tdsa"], "build", broken)
    assert run("--method", "tdsa", *TINY) == 1
    said = capsys.readouterr().err
    assert "the loss is nan at step 0, lr" in said and "birds/train/" in said and "terms {" in said and len(said.splitlines()) == 1
    assert not (room / "runs" / "tdsa-toy" / "last.pt").exists()


def test_resume_takes_seed_and_flags_from_the_run_and_refuses_another_recipe(room, capsys):
    assert run("--method", "tdsa", *TINY, "--seed", "3", "--eval-every", "2", "--out", "r") == 0
    opts = train.parse(["--resume", "r"])
    assert (opts.seed, opts.eval_every, opts.matmul_precision) == (3, 2, "highest")
    assert train.parse(["--resume", "r", "--workers", "1"]).workers == 1
    assert run("--resume", "r", "--recipe", "cub") == 2 and "--resume goes on with the run's own recipe" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_again_on_resume(room):
    assert run("--method", "tdsa", *TINY, "--out", "whole") == 0
    assert run("--method", "tdsa", *TINY, "--out", "r") == 0
    for path in Path("r").glob("*.pt"):
        path.unlink()
    Path("r/result.json").unlink()
    assert run("--resume", "r") == 0
    same(last("whole")["model"], last("r")["model"])
    assert log_without_clock("whole") == log_without_clock("r")


def test_a_run_killed_between_its_last_checkpoint_and_its_result_still_has_its_scores(room):
    assert run("--method", "tdsa", *TINY, "--out", "r") == 0
    whole = json.loads(Path("r/result.json").read_text())
    Path("r/result.json").unlink()
    assert run("--resume", "r") == 0
    assert json.loads(Path("r/result.json").read_text())["top1"] == whole["top1"]


def test_a_row_of_a_table_equals_the_single_run_of_its_seed(two_rows, room):
    assert run(*TABLE, "--seeds", "0,1") == 0
    assert run("--method", "tdsa", "--toy-train", "1", "--toy-test", "1", "--epochs", "1", "--batch-size", "8", "--seed", "1", "--out", "single") == 0
    same(last("runs/table-tdsa-t-toy/tdsa-tdsa-seed1")["model"], last("single")["model"])


def test_sigterm_to_the_workers_too_stops_with_a_checkpoint(room):
    """Schedulers and torchrun signal the whole process group."""
    command = [sys.executable, str(HERE / "train.py"), "--method", "tdsa", "--toy-train", "2", "--toy-test", "1", "--iterations", "1000000", "--batch-size", "8", "--save-every", "1", "--workers", "1", "--out", "killed"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.time() + 100
    while not (room / "killed" / "last.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in said and "--resume killed" in said, said


def test_unreadable_photos_stop_the_run_or_are_left_out_and_listed(room, capsys):
    photo_folder(room / "photos")
    (room / "photos" / "train" / "class0" / "0.JPG").write_text("not a photo")
    assert run(*SMALL, "--root", "photos", "--out", "a") == 2
    assert "class0/0.JPG" in capsys.readouterr().err
    assert run(*SMALL, "--root", "photos", "--out", "b", "--skip-bad-images", "--workers", 2) == 0
    assert "class0/0.JPG" in train.read_run("b")["bad_images"][0]


def test_a_run_refuses_other_classes_and_other_methods(room, capsys):
    photo_folder(room / "photos")
    assert run(*SMALL, "--root", "photos", "--out", "a") == 0
    os.rename("photos/train/class2", "photos/train/zebra")
    os.rename("photos/test/class2", "photos/test/zebra")
    assert run("eval", "--run", "a") == 2
    assert "other classes" in capsys.readouterr().err
    info = train.read_run("a")
    train.write_json(Path("a/run.json"), info | {"method": "tnet", "recipe": {}, "recipe_name": "toy"})
    assert run("predict", "--run", "a", "photos") == 2
    assert "checkpoint of tdsa" in capsys.readouterr().err


def test_a_checkpoint_that_lacks_a_field_says_that_another_version_wrote_it(room, capsys):
    assert run("--method", "tdsa", *TINY, "--out", "a") == 0
    state = common.load_checkpoint(Path("a/last.pt"))
    del state["scores"]
    common.save_checkpoint(Path("a/last.pt"), state)
    assert run("eval", "--run", "a") == 2
    assert "lacks scores" in capsys.readouterr().err


def test_table_runs_on_its_own_dataset_when_root_is_given_and_on_the_toy_otherwise(two_rows, room, capsys):
    assert train.parse(["table", "--method", "tdsa", "--table", "t"]).data == "toy"
    own = train.parse(["table", "--method", "tdsa", "--table", "t", "--root", "photos"])
    assert own.data == "cub" and own.recipe == train.METHODS["tdsa"].RECIPES["cub"]
    assert train.parse(["table", "--method", "tdsa", "--table", "t", "--root", "photos", "--data", "folder"]).data == "folder"
    assert run(*TABLE, "--root", "nowhere") == 2 and "nowhere" in capsys.readouterr().err


def test_out_of_memory_names_batch_accumulate_and_amp(room, monkeypatch, capsys):
    def hungry(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes")

    monkeypatch.setattr(train, "update", hungry)
    assert run("--method", "tdsa", *TINY) == 1
    assert "out of memory at batch 8" in (said := capsys.readouterr().err) and "--accumulate 2" in said and "--amp bf16" in said


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_bf16_and_in_two_parts(method, room):
    assert run("--method", method, "--toy-train", 2, "--toy-test", 1, "--iterations", 1, "--batch-size", 8, "--amp", "bf16", "--accumulate", 2, "--ema", "0.5", "--grad-clip", "1", "--deterministic") == 0
    torch.use_deterministic_algorithms(False)
    assert np.isfinite(train.read_log(f"runs/{method}-toy/log.jsonl")[-1]["loss"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_fp16_where_the_loss_scaler_skips_the_first_steps(method, room):
    assert run("--method", method, "--toy-train", 2, "--toy-test", 1, "--iterations", 3, "--batch-size", 8, "--amp", "fp16") == 0
    state = last(f"runs/{method}-toy")
    assert state["scaler"]["scale"] > 0 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_an_accumulated_batch_gives_the_gradient_of_the_whole_batch(room):
    """DeiT has no BatchNorm, whose statistics would be those of the parts, so parts and the whole agree to rounding."""
    flags = ["--method", "dcal", "--backbone", "deit_tiny", "--image-size", 32, "--toy-train", 2, "--toy-test", 1, "--iterations", 2, "--batch-size", 8, "--no-pwca", "--optimizer", "sgd", "--lr", "0.1"]
    assert run(*flags, "--out", "whole") == 0 and run(*flags, "--out", "parts", "--accumulate", 4) == 0
    whole, parts = (common.load_checkpoint(Path(name) / "last.pt")["model"] for name in ("whole", "parts"))
    start = train.METHODS["dcal"].build(train.recipe_from(train.METHODS["dcal"], train.read_run("whole")["recipe"]), 8).state_dict()
    assert max((whole[k] - start[k]).abs().max() for k in whole) > 1e-2, "they were trained"
    for k in whole:
        torch.testing.assert_close(parts[k], whole[k], atol=2e-6, rtol=1e-4)
    assert log_without_clock("parts")[-1]["loss"] == pytest.approx(log_without_clock("whole")[-1]["loss"], rel=1e-5)


BAD = [  # command line, what the one line on stderr must say
    ("fly --method tnet", "unknown action 'fly'"),
    ("", "name a method"),
    ("eval", "name a method"),
    ("--method resnet", "unknown method 'resnet'"),
    ("--method tnet --data birds", "unknown data 'birds'"),
    ("--method dcal --data imagenet", "no recipe 'imagenet'"),
    ("--method tnet --recipe nothing", "no recipe 'nothing'"),
    ("--method tnet --epoch 3", "did you mean --epochs"),
    ("--method tnet --learning-rate 3", "unknown argument --learning-rate"),
    ("--method tnet --epochs many", "invalid int value: 'many'"),
    ("--method tnet --epochs 1.5", "invalid int value: '1.5'"),
    ("--method tnet --epochs", "expected one argument"),
    ("--method tnet --epochs 0", "at least 1"),
    ("--method tnet --batch-size 0", "at least 1"),
    ("--method tnet --batch-size -4", "at least 1"),
    ("--method tnet --accumulate 0", "at least 1"),
    ("--method tnet --iterations -1", "at least"),
    ("--method tnet --lr fast", "invalid float value"),
    ("--method tnet --image-size 1,2,3", "image-size"),
    ("--method tnet --image-size a", "image-size"),
    ("--method tnet --crop-area 0.5,0.6,0.7", "crop-area"),
    ("--method tnet --optimizer lion", "'lion' is not one of sgd, adam, adamw, radam"),
    ("--method tnet --schedule linear", "'linear' is not one of"),
    ("--method tnet --crop five", "'five' is not one of"),
    ("--method tnet --amp int8", "'int8' is not one of"),
    ("--method tnet --interpolation lanczos", "is not one of"),
    ("--method tnet --normalize caffe", "is not one of"),
    ("--method tnet --task detect", "is not one of"),
    ("--method tnet --toy-preset dogs", "is not one of"),
    ("--method tnet --train-split val", "is not one of"),
    ("--method tnet --device tpu", "invalid choice"),
    ("--method tnet --matmul-precision low", "invalid choice"),
    ("--method tnet --data folder", "--root"),
    ("--method tnet --data folder --root nowhere", "nowhere"),
    ("--method tnet --data folder --root empty", "empty"),
    ("--method tnet --data folder --root text.txt", "text.txt"),
    ("--method tnet --data imagenet", "--root"),
    ("--method tnet --data imagenet --root empty", "empty"),
    ("--method tnet --data cub --root empty", "empty"),
    ("--method tnet --data nabirds --root nowhere", "nowhere"),
    ("--method tnet --data fmow --root empty", "empty"),
    ("--method tdsa --data flowers --root empty", "empty"),
    ("--method tdsa --data aircraft --root empty", "empty"),
    ("--method tdsa --data cars --root empty", "empty"),
    ("--method vit_fgvc --data dogs --root empty", "empty"),
    ("--method vit_fgvc --data plant --root empty", "empty"),
    ("--method dcal --data market1501 --root empty --weights none", "empty"),
    ("--method dcal --data dukemtmc --root empty --weights none", "empty"),
    ("--method dcal --data msmt17 --root empty --weights none", "empty"),
    ("--method dcal --data veri776 --root empty --weights none", "empty"),
    ("--method m2former --data cub --root text.txt", "text.txt"),
    ("--method tnet --data imagenet --root empty --download", "imagenet"),
    ("--method tnet --weights nowhere.pt", "nowhere.pt"),
    ("--method tnet --weights text.txt", "text.txt"),
    ("--method dcal --weights text.txt", "text.txt"),
    ("--method dcal --weights nowhere", "nowhere"),
    ("--method tdsa --weights text.txt", "text.txt"),
    ("--method m2former --weights text.txt", "text.txt"),
    ("--method vit_fgvc --weights text.txt", "text.txt"),
    ("--method tnet --resume nowhere", "no run folder"),
    ("--resume nowhere", "no run folder"),
    ("--resume empty", "no run folder"),
    ("--resume text.txt", "no run folder"),
    ("--resume brokenrun", "damaged"),
    ("--run empty --method tnet", "no run folder"),
    ("eval --run empty", "no run folder"),
    ("eval --run brokenrun", "damaged"),
    ("eval --method tnet", "no run folder"),
    ("eval --resume empty", "no run folder"),
    ("predict --run empty photo.png", "no run folder"),
    ("figures --run empty", "no run folder"),
    ("figures --method tdsa", "no run folder"),
    ("profile", "name a method"),
    ("profile --method tnet --data mars", "unknown data"),
    ("profile --method tnet --against --nonsense", "unknown argument --nonsense"),
    ("profile --method tnet --against=--nonsense", "unknown argument --nonsense"),
    ("profile --method tnet --rounds few", "invalid int value"),
    ("table --method tnet --table 99", "no table '99'"),
    ("table --table 1", "name a method"),
    ("table --method tnet --table 1 --seeds a", "--seeds a: give whole numbers"),
    ("compare --seeds ,", "seeds"),
    ("compare --data cub", "--root"),
    ("compare --data market1501", "no two methods"),
    ("compare --method tnet", "leave --method"),
    ("--method tnet --seed -1", "--seed -1 is out of range"),
    ("--method tnet --locations 0,1", "for eval and profile"),
    ("--method dcal --local-ratio 0", "local_ratio"),
    ("--method dcal --local-ratio 1.5", "local_ratio"),
    ("--method dcal --backbone resnet", "is not one of"),
    ("--method dcal --image-size 65", "65"),
    ("--method dcal --infer best", "is not one of"),
    ("--method dcal --weights default", "weights"),
    ("--method tnet --locations many", "locations"),
    ("--method tnet --locations 99", "locations"),
    ("--method tnet --locations -1", "locations"),
    ("--method tnet --select greedy", "is not one of"),
    ("--method tnet --backbone vgg16", "is not one of"),
    ("--method tdsa --loss focal", "is not one of"),
    ("--method tdsa --xi 0", "xi"),
    ("--method tdsa --backbone vgg19", "is not one of"),
    ("--method tdsa --upsample lanczos", "is not one of"),
    ("--method vit_fgvc --stages c", "is not one of"),
    ("--method vit_fgvc --fusion sum", "is not one of"),
    ("--method m2former --backbone vit", "is not one of"),
    ("--method m2former --ctt mlp3", "is not one of"),
    ("--method m2former --image-size 65", "65"),
    ("--method tnet --toy-train -3", "toy-train"),
    ("--method tnet --val-fraction 1.5", "val-fraction"),
    ("--method tnet --ema 1.5", "ema"),
    ("--method tnet --workers -1", "workers"),
    ("--method tnet --save-every -1", "save-every"),
    ("--method tnet --eval-every 0", "eval-every"),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line or "nothing" for line, _ in BAD])
def test_a_bad_command_line_ends_with_status_2_one_line_and_nothing_written(line, words, room, capsys):
    (room / "empty").mkdir()
    (room / "text.txt").write_text("hello")
    (room / "brokenrun").mkdir()
    (room / "brokenrun" / "run.json").write_text("{half")
    before = sorted(room.rglob("*"))
    assert run(*line.split(), *(["--toy-train", "2", "--toy-test", "1"] if "--method" in line and line.startswith("--") and "toy-train" not in line else [])) == 2
    said = capsys.readouterr().err
    plain = lambda text: text.lower().replace("_", "-")
    assert len(said.splitlines()) == 1 and said.startswith("train.py: ") and plain(words) in plain(said), said
    assert sorted(room.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ scores, by hand


def test_pointing_counts_centres_in_parts_beside_chance_by_area_and_the_best_constant_place():
    parts = np.array([[[0, 0, 16, 32], [np.nan] * 4], [[0, 0, 16, 16], [16, 16, 32, 32]]], float)  # halves and quarters of a 32 x 32 image
    boxes = np.array([[[0, 0, 8, 8], [20, 0, 30, 8]], [[20, 0, 32, 8], [20, 20, 24, 24]]], float)
    got = train.pointing(boxes, parts, 32, 32)
    assert got == {"best": 0.5, "all": 0.5, "chance": 0.5, "constant": 1.0}


def test_object_iou_of_a_shifted_box_and_the_best_constant_box():
    objects = np.array([[0, 0, 10, 10]] * 3 + [[20, 20, 30, 30]], float)
    got = train.object_iou(objects + [5, 0, 5, 0], objects)
    assert got["mean"] == pytest.approx(50 / 150) and got["constant"] == pytest.approx(0.75)


def test_object_scale_table_8_of_m2former_is_by_quartiles_and_ties_are_medium():
    names, (low, high) = train.object_scale(np.array([1, 2, 2, 3, 4, 5, 6, 6, 7.0]))
    assert (low, high) == (2, 6)
    assert names.tolist() == ["small", "medium", "medium", "medium", "medium", "medium", "medium", "medium", "large"]


def test_top_scores_of_a_hand_case_and_ties_in_class_order():
    top = train.ranked(torch.tensor([[0.1, 0.5, 0.5, 0, 0, 0, 0]])).numpy()
    assert top.tolist() == [[1, 2, 0, 3, 4]]
    assert train.top_scores(top, np.array([2])) == {"top1": 0.0, "top5": 1.0}


def test_lr_at_follows_schedule_warmup_batch_scaling_and_phases():
    r = common.Recipe(lr=1.0, lr_batch=64, batch_size=32, schedule="cosine", warmup=2, warmup_lr=0.1, epochs=10, min_lr=0.05)
    at = lambda step, group=None: common.lr_at(r, step, 100, 10, group)
    assert at(0) == pytest.approx(0.1) and at(10) == pytest.approx(0.3) and at(20) == pytest.approx(0.5) and at(60) == pytest.approx((0.5 + 0.05) / 2) and at(100) == pytest.approx(0.05)
    assert at(20, {"lr_scale": 0.1}) == pytest.approx(0.05)
    one = common.Recipe(lr=1.0, schedule="onecycle")
    phases = {"phases": [(1, 0.0), (3, 2.0)]}
    assert [common.lr_at(one, s, 80, 1, phases) for s in (0, 19)] == [0, 0] and common.lr_at(one, 20, 80, 1, phases) == pytest.approx(2 / 25) and common.lr_at(one, 50, 80, 1, phases) == pytest.approx(2.0)
    steps = common.Recipe(lr=1.0, schedule="steps", milestones=(0.5, 0.75))
    assert [round(common.lr_at(steps, s, 100), 4) for s in (49, 50, 74, 75)] == [1, 0.1, 0.1, 0.01]


def test_an_average_of_the_weights_is_kept_with_its_decay():
    model, ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.num_batches_tracked += 7
    train.update_ema(ema, model, 0.9)
    assert torch.allclose(ema.weight, torch.tensor(1.2)) and ema.num_batches_tracked == 7


def test_a_group_with_rate_zero_is_frozen_without_moments():
    recipe = common.Recipe(optimizer="adamw", weight_decay=0.1)
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, images, targets):
            loss = (a * b).sum()
            return loss, {"top1": loss.detach()}

    model = Tiny()
    optimizer = train.make_optimizer(recipe, [{"params": [a]}, {"params": [b]}])
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.0, 0.1
    context, scaler = train.precision(recipe, torch.device("cpu"))
    batch = (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), torch.arange(2))
    train.update(recipe, model, model, optimizer, scaler, context, batch, train.World(torch.device("cpu")), lambda: "")
    assert a.item() == 1 and a not in optimizer.state and b.item() < 1


# ------------------------------------------------------------------------------------------------ tables and figures


def test_a_table_resumes_aggregates_over_seeds_and_prints_the_papers_number(two_rows, room, capsys, monkeypatch):
    real, trained = train.train, []
    monkeypatch.setattr(train, "train", lambda opts, world: (trained.append((opts.recipe.loss, opts.seed)), real(opts, world))[1])
    assert run(*TABLE, "--seeds", "0") == 0
    assert trained == [("ce", 0), ("tdsa", 0)]
    for seed, value in ((0, 0.25), (1, 0.75)):  # results made by hand, to know the mean and the sd
        if seed == 1:
            assert run(*TABLE, "--seeds", "0,1") == 0 and trained[2:] == [("ce", 1), ("tdsa", 1)], "what was done is not run again"
        path = Path(f"runs/table-tdsa-t-toy/tdsa-ce-seed{seed}/result.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"top1": value}))
    capsys.readouterr()
    assert run(*TABLE, "--seeds", "0,1") == 0 and len(trained) == 4
    said = capsys.readouterr().out
    assert "50.0 +- 35.4 (2)" in said and "28.5" in said and "two losses" in said
    kept = json.loads(Path("runs/table-tdsa-t-toy/results.json").read_text())
    assert kept["rows"][0]["ours"] == [25.0, 75.0] and kept["rows"][0]["paper"] == 28.5 and kept["commit"] == train.git_commit()


def test_rows_that_differ_only_in_how_they_are_evaluated_share_one_training(room, monkeypatch):
    rows = (("3", {"eval": {"locations": "3"}}, 1.0), ("0", {"eval": {"locations": "0"}}, 2.0), ("random", {"policy": "random", "eval": {"locations": "0"}}, None))
    monkeypatch.setattr(train.METHODS["tnet"], "TABLES", {"t": common.Table("locations", "imagenet", "top1", rows)})
    real, trained = train.train, []
    monkeypatch.setattr(train, "train", lambda opts, world: (trained.append(opts.recipe.policy), real(opts, world))[1])
    assert run("table", "--method", "tnet", "--table", "t", "--toy-train", "1", "--toy-test", "2", "--epochs", "1", "--seeds", "0,1") == 0
    assert trained == ["learned", "learned", "random", "random"]
    kept = json.loads(Path("runs/table-tnet-t-toy/results.json").read_text())["rows"]
    assert [row["paper"] for row in kept] == [1.0, 2.0, None] and kept[0]["macs"] > 2 * kept[1]["macs"]
    heads = [row["looked"][1]["heads"] for row in kept]
    assert kept[0]["ours"][1] == pytest.approx(100 * heads[0]["all"], abs=1e-3) and kept[1]["ours"][1] == pytest.approx(100 * heads[1]["context"], abs=1e-3)


def test_compare_trains_every_method_and_its_baseline_and_prints_one_table(room, monkeypatch, capsys):
    monkeypatch.setattr(train, "METHODS", {name: train.METHODS[name] for name in ("tnet", "tdsa")})
    for module in train.METHODS.values():
        small = train.dataclasses.replace(module.RECIPES["toy"], toy_train=1, toy_test=1, epochs=1, batch_size=8)
        monkeypatch.setitem(module.RECIPES, "toy", small)
    assert run("compare", "--seeds", "0") == 0
    said, kept = capsys.readouterr().out, json.loads(Path("runs/compare-toy/results.json").read_text())["rows"]
    names = [f"{method}: {name}" for method in ("tnet", "tdsa") for name, _, _ in train.METHODS[method].TABLES["baseline"].rows]
    assert [row["row"] for row in kept] == names and all(name in said for name in names)
    assert all(len(row["ours"]) == 1 and row["macs"] > 0 and "pointing" in row for row in kept)
    assert Path("runs/compare-toy/results.md").read_text().count("\n|") == len(names) + 2


def test_a_stopped_table_stops_and_goes_on_where_it_was(two_rows, room, monkeypatch):
    real = train.update

    def stopping(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "update", stopping)
    assert run(*TABLE, "--seeds", "0,1") == 143
    assert [p.name for p in Path("runs/table-tdsa-t-toy").iterdir()] == ["tdsa-ce-seed0"]
    monkeypatch.setattr(train, "update", real)
    assert run(*TABLE) == 0 and last("runs/table-tdsa-t-toy/tdsa-ce-seed0")["step"] == 2


def test_a_table_refuses_rows_of_another_commit_unless_asked(two_rows, room, capsys):
    assert run(*TABLE) == 0
    path = Path("runs/table-tdsa-t-toy/tdsa-ce-seed0/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "0000000"}))
    capsys.readouterr()
    assert run(*TABLE) == 2 and "commit 0000000" in capsys.readouterr().err
    assert run(*TABLE, "--any-commit") == 0


def test_table_without_a_number_lists_the_tables_of_each_method(room, capsys):
    for method in METHODS:
        assert run("table", "--method", method) == 0
        said = capsys.readouterr().out
        assert all(table.title in said for table in train.METHODS[method].TABLES.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_every_table_is_a_recipe_of_the_tables_data(method):
    for key, table in train.METHODS[method].TABLES.items():
        base = train.METHODS[method].RECIPES[table.data]
        names = [name for name, _, _ in table.rows]
        assert len(set(names)) == len(names) and names, f"{method} table {key}"
        for name, overrides, paper in table.rows:
            training, evaluation = common.split_row(overrides)
            row = train.dataclasses.replace(base, **training | evaluation)
            assert row.task == base.task and (paper is None or paper > 0), f"{method} table {key}: {name}"


def test_figures_of_several_runs_draw_their_curves_in_one_picture(room, capsys):
    for loss in ("ce", "mc"):
        assert run("--method", "tdsa", *TINY, "--loss", loss, "--out", loss) == 0
    assert run("figures", "--run", "ce", "mc", "--out", "both") == 0
    picture = np.asarray(Image.open("both/curves.png"))
    assert picture.shape[1] == 3 * 460 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_ticks_are_round_and_cover_the_range():
    for low, high in ((0, 1), (0, 40), (12.3, 97.2), (0.001, 0.002), (5, 5), (-3, 8), (0, 1e-5)):
        got = train.ticks(low, high)
        assert got[0] <= low + 1e-12 and got[-1] >= high - 1e-12 and 2 <= len(got) <= 8, (low, high, got)


# ------------------------------------------------------------------------------------------------ the README


def readme_commands():
    """Lines `python train.py ...` of the code blocks of both READMEs, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text() + (HERE / "results" / "README.md").read_text(), re.S)
    return [shlex.split(line, comments=True)[2:] for block in blocks for line in block.splitlines() if line.startswith("python train.py")]


def test_the_readmes_commands_that_need_no_dataset_run_and_the_others_parse(room):
    assert run("--method", "tnet", *TINY) == 0
    Image.fromarray(data.draw_bird("birds", "test", 1, 64).image).save("my_photo.jpg")
    commands = readme_commands()
    assert len(commands) >= 6
    for command in commands:
        if "--help" in command:
            with pytest.raises(SystemExit, match="0"):
                train.parse(command)
        elif "--root" in command:
            assert train.parse(command).recipe.batch_size > 1
        elif not command[0].startswith("--") and command[0] not in ("table", "compare"):  # hours; the tests of tables run small ones
            assert run(*command, *(["--rounds", "1"] if command[0] == "profile" else [])) == 0, command
        else:
            assert train.parse(command).action in train.ACTIONS


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text()))
    written = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (HERE / "tests").glob("test_*.py")), re.M))
    assert len(named) >= 10 and named <= written, named - written


def test_the_readmes_numbers_come_from_result_files_that_say_how_they_were_made():
    files = sorted((HERE / "results").glob("*.json"))
    assert files
    for path in files:
        kept = json.loads(path.read_text())
        assert {"command", "commit", "device", "date"} <= set(kept), path.name
