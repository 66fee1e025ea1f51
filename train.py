"""Train, evaluate and look at one method on one dataset:  python train.py [ACTION] [RUN ...] [--flag ...]

  train                 (when none is named) trains and evaluates              -> runs/METHOD-DATA/
  eval RUN              accuracy, by class, confused pairs, where it looked    -> RUN/eval.json
  predict RUN PHOTOS    top five of photos or folders, a picture of each       -> RUN/predict/
  figures RUN [RUN ..]  the paper's figure of test images, learning curves     -> RUN/figures/
  profile [RUN]         parameters, MACs, time, memory, of several variants    -> the terminal
  table                 a table of the paper, row by row, beside its numbers   -> runs/table-METHOD-...

Examples:
  python train.py --method tnet                                  # minutes: drawn birds, no download
  python train.py eval runs/tnet-toy
  python train.py predict runs/tnet-toy my_photo.jpg my_folder
  python train.py --method dcal --data folder --root photos      # photos/train/CLASS/, photos/test/CLASS/
  python train.py --method m2former --data cub --root DIR        # the paper's recipe with no further flag
  python train.py table --method tdsa --table 2 --root DIR --seeds 0,1,2
  torchrun --nproc-per-node 8 train.py --method tnet --data imagenet --root DIR

`train.py ACTION --help` lists an action's flags, `train.py --method M --data D --help-all` every switch.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw

import common
import data
import dcal
import m2former
import tdsa
import tnet
import vit_fgvc
from common import opt

with contextlib.suppress(ImportError):
    import fcntl  # not on Windows: two starts into one folder are not told apart there

METHODS = {"m2former": m2former, "dcal": dcal, "tnet": tnet, "vit_fgvc": vit_fgvc, "tdsa": tdsa}
ACTIONS = {
    "train": "Trains and evaluates; writes runs/METHOD-DATA[-RECIPE][-NAME]/ or --out.",
    "eval": "Scores RUN; writes RUN/eval.json or into --out. Text switches take several values with commas.",
    "predict": "Top five of PHOTOS, files or folders, and a picture of each; writes RUN/predict/ or --out.",
    "figures": "The paper's figure of test images, of runs side by side; writes RUN/figures/ or --out.",
    "profile": "Parameters, MACs, time and memory, variants in turn; prints a table, which --out DIR keeps.",
    "table": "Runs a table of the paper over seeds; writes runs/table-METHOD-TABLE-DATA/ or --out.",
}

# ------------------------------------------------------------------------------------------ 1 parse

the_run = functools.partial(opt, group="the run")
for_training = functools.partial(opt, group="for train and table")
for_table = functools.partial(opt, group="for table")
for_profile = functools.partial(opt, group="for profile")
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Flags(common.Options):
    """How to run: nothing here changes what is learned, but for the seed."""

    method: str = the_run("", f"one of {', '.join(METHODS)}")
    data: str = the_run("toy", f"one of {', '.join(data.DATASETS)}")
    root: str = the_run("", "folder of the dataset")
    download: bool = the_run(False, "fetch the dataset into --root first (cub, aircraft, flowers, dogs)")
    recipe: str = the_run("", "which of the method's recipes, if not the one named like the data")
    run: str = the_run("", "run folder to act on: the same as RUN right after the action")
    out: str = the_run("", "output folder, if not the usual one")
    seed: int = the_run(0, "of initial weights, order and augmentation", most=MOST_SEED)
    device: str = the_run("auto", "auto: cuda when there is one", ("auto", "cpu", "cuda"))
    workers: int = the_run(-1, "processes that decode photos; -1: the cores, at most 8", least=-1, most=256)
    matmul_precision: str = the_run("highest", "of fp32 products", ("highest", "high", "medium"))
    compile: bool = the_run(False, "torch.compile the model")
    deterministic: bool = the_run(False, "only deterministic kernels (CUDA; slower)")
    resume: str = opt("", "run folder to go on with", group="for train")
    name: str = opt("", "appended to the run folder's name", group="for train")
    save_every: int = for_training(0, "also save every so many steps; 0: at the end of epochs", most=1e9)
    eval_every: int = for_training(1, "evaluate every so many epochs, and after the last", least=1)
    skip_bad_images: bool = for_training(False, "leave unreadable photos out instead of stopping")
    table: str = for_table("", "which; else they are listed. baseline without --method: all methods")
    seeds: tuple[int, ...] = for_table((0,), "seeds", most=MOST_SEED)
    rows: tuple[str, ...] = for_table((), "only these rows")
    row_weights: tuple[str, ...] = for_table((), "first weights of single rows: NAME=FILE,...")
    any_commit: bool = for_table(False, "also use finished rows that another commit produced")
    against: tuple[str, ...] = opt(
        (), "one more variant: its recipe flags, quoted", group="for eval and profile"
    )
    images: int = opt(6, "how many test images", least=1, group="for figures")
    pictures: bool = opt(True, "a picture of each photo", group="for predict")
    profile_batch: int = for_profile(2, "images in a batch", least=1)
    rounds: int = for_profile(5, "timed rounds, variants in turn", least=1)
    threads: int = for_profile(0, "CPU threads; 0: torch's choice", most=1024)
    classes: int = for_profile(0, "number of classes; 0: the run's, else 100")
    inference_only: bool = for_profile(False, "leave the training step out")


@dataclass(frozen=True)
class Call(Flags):
    """The flags of a command line and its other words."""

    action: str = opt("train", "what to do", tuple(ACTIONS))
    words: tuple[str, ...] = opt((), "photos of predict, further runs of figures")
    command: str = opt("", "the line itself")


OF_DATA = ("root", "seed", "skip_bad_images")  # flags of a run that hold for whatever is done with it
KEPT = (
    *OF_DATA,
    "workers",
    "matmul_precision",
    "compile",
    "deterministic",
    "save_every",
    "eval_every",
)  # resumed


class Parser(argparse.ArgumentParser):
    """The flags of an Options object; an error is a ValueError of one line."""

    def __init__(self, options, action=""):
        usage = f"python train.py {action} [RUN] [--flag VALUE ...]"
        super().__init__(add_help=False, allow_abbrev=False, usage=usage, description=ACTIONS.get(action))
        common.add_options(
            self, options, lambda f: action in f.metadata["group"] or "for " not in f.metadata["group"]
        )

    def error(self, message):
        raise ValueError(message)

    def flags(self):
        """Every flag."""
        return [flag for action in self._actions for flag in action.option_strings]

    def read(self, words):
        """Words -> the values of its flags among them, and the others."""
        values, others = self.parse_known_args(words)
        if [] in vars(values).values():  # how argparse reads --flag=--
            self.error("-- is no value of a flag")
        return vars(values), others


def parse(argv):
    """Command line -> a Call and its recipes [(label, Recipe)]: several of eval and profile, else one."""
    command, argv = "python train.py " + shlex.join(argv), list(argv)
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0)
    action = argv.pop(0) if argv and argv[0][:1] != "-" else "train"
    if action not in ACTIONS:
        raise ValueError(f"unknown action {action!r}; {near(action, ACTIONS)}")
    helps = {"-h", "--help", "--help-all"} & {*argv}
    argv, against = without_against([word for word in argv if word not in helps])
    cli = Parser(Flags(), action)
    given, words = cli.read(argv)
    for f in dataclasses.fields(Flags):
        if f.name in given and "for " in f.metadata["group"] and action not in f.metadata["group"]:
            raise ValueError(f"{common.flag(f)} is {f.metadata['group']}, not for {action}")
    about, run = run_of(action, given, words) if not helps else ({}, "")
    method = about.get("method", given.get("method", ""))
    optional = helps or (action, given.get("table")) == ("table", "baseline")
    if method not in METHODS and (method or not optional):
        problem = f"unknown method {method!r}; {near(method, METHODS)}" if method else "name a method"
        hint = (
            near(words[0], cli.flags())
            if words
            else "python train.py --method tnet is a first run of minutes"
        )
        raise ValueError(f"{problem}: {hint}; see --help")
    recipe, chosen, name = recipe_of(method, about, given, run)
    if helps:
        if "--help-all" in helps:
            common.add_options(cli, recipe)
        cli.print_help()
        raise SystemExit(0)
    switches = Parser(recipe)
    changed, words = switches.read(words)
    for word in words:
        if word.startswith("-"):
            raise ValueError(
                f"unknown argument {word}; {near(word, cli.flags() + switches.flags(), 'see --help-all')}"
            )
    if bool(words) > (action in ("predict", "figures")) or action == "predict" and not words:
        raise ValueError(
            f"{action} takes no {words[0]!r}" if words else "name photos: predict RUN PHOTO_OR_FOLDER ..."
        )
    if given.get("resume") and (changed or "recipe" in given):
        raise ValueError(
            "--resume goes on with the run's own recipe; to change it start anew, with --weights DIR"
        )
    flags = values_of(Flags(), about.get("flags", {}), f"{run}/run.json")
    flags = {key: flags[key] for key in (KEPT if given.get("resume") else OF_DATA) if key in flags} | given
    flags |= dict(
        method=method, data=name, recipe=chosen, run=run, action=action, words=tuple(words), command=command
    )
    out = Path(given.get("out", ""))
    if any(path.is_file() for path in (out, *out.parents)):
        raise ValueError(f"--out {out}: a file is in the way; name a folder")
    return Call(**flags), variants(recipe, changed, against, switches, action)


def without_against(argv):
    """Take every --against FLAGS, whose value looks like a flag, out of a line -> the rest, the values."""
    rest, values, words = [], [], iter(argv)
    for word in words:
        if word.startswith("--against="):
            values.append(word.partition("=")[2])
        elif word == "--against":
            values.append(next(words, ""))
        else:
            rest.append(word)
    return rest, values


def run_of(action, given, words):
    """The run folder to act on -> (its run.json, its name); taken out of `words` when it stands there."""
    if action in ("train", "table") and "run" in given:
        raise ValueError(
            "--run names a run to look at; --resume DIR goes on with it, --weights DIR starts from it"
        )
    run = given.get("resume") or given.get("run") or ""
    if not run and action not in ("train", "table") and words and words[0][:1] != "-":
        run = words.pop(0)
    if not run and action in ("eval", "predict", "figures"):
        raise ValueError(f"name the run right after the action: python train.py {action} RUN{runs_here()}")
    return (read_run(run) if run else {}), run


def recipe_of(method, about, given, run):
    """The recipe before any switch -> (Recipe, its name, the dataset's name)."""
    module = METHODS.get(method, common)
    tables = getattr(module, "TABLES", {})
    own = tables[given["table"]].data if given.get("root") and given.get("table") in tables else "toy"
    name = about.get("data", given.get("data", own))
    if name not in data.DATASETS:
        raise ValueError(f"unknown data {name!r}; {near(name, data.DATASETS)}")
    if about and (given.get("method", method), given.get("data", name)) != (method, name):
        raise ValueError(
            f"the run is {method} on {name}: leave --method and --data away, or act on another run"
        )
    chosen = given.get("recipe") or about.get("recipe_name", name)
    if about and "recipe" not in given:
        values = values_of(module.Recipe(), about["recipe"], f"{run}/run.json")
        return module.Recipe(**values), chosen, name
    recipes = getattr(module, "RECIPES", {chosen: common.Recipe()})
    if chosen not in recipes:
        raise ValueError(f"{method} has no recipe {chosen!r}; --recipe takes another's: {', '.join(recipes)}")
    return recipes[chosen], chosen, name


def variants(recipe, changed, against, switches, action):
    """The recipes asked for: all combinations of switches with commas, then one for each --against."""
    many = {k: v.split(",") for k, v in changed.items() if isinstance(v, str) and "," in v and k != "weights"}
    if many and action not in ("eval", "profile"):
        raise ValueError(f"{', '.join(many)}: several values are for eval and profile; {action} takes one")
    found = []
    for values in itertools.product(*many.values()):
        one = dict(zip(many, values))
        found.append((" ".join(f"{k}={v}" for k, v in one.items()), replace(recipe, **changed | one)))
    for text in against:
        other, words = switches.read(shlex.split(text))
        if words:
            raise ValueError(f"--against {text!r}: unknown argument {words[0]}")
        found.append((text, replace(found[0][1], **other)))
    return found


def near(word, known, otherwise=""):
    """Advice for a word that is none of the known ones."""
    found = difflib.get_close_matches(word.split("=")[0], known, 1)
    return f"did you mean {found[0]}?" if found else otherwise or f"allowed: {', '.join(known)}"


def runs_here():
    """The run folders in runs/, for an error."""
    found = ", ".join(sorted(str(path.parent) for path in Path("runs").glob("*/run.json"))[:8])
    return f"; here are: {found}" if found else "; there is none yet: python train.py --method tnet makes one"


# ------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def reading(path):
    """What is wrong with a file of ours, whatever its shape, becomes an error that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, not the JSON that train.py writes ({error})") from None


def read_json(path, **kinds):
    """A JSON object that has these keys, of these types."""
    with reading(path):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(isinstance(value[key], kind) for key, kind in kinds.items()):
            raise ValueError("a value of another type")
        return value


def read_run(folder):
    """run.json of a run folder."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        method, _, name = path.parent.name.partition("-")
        hint = (
            f"; python train.py --method {method} --data {name or 'toy'} makes it"
            if method in METHODS
            else runs_here()
        )
        raise FileNotFoundError(f"{folder} is no run folder (it has no run.json){hint}")
    about = read_json(path, method=str, data=str, recipe=dict, recipe_name=str, classes=list, flags=dict)
    if about["method"] not in METHODS or about["data"] not in data.DATASETS:
        raise ValueError(f"{path}: unknown method {about['method']!r} or data {about['data']!r}")
    return about


def read_log(folder):
    """The readable lines of a run's log.jsonl: of numbers, and of scores, which are dicts of numbers."""
    path, entries = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError), reading(path):
            entry = json.loads(line)
            for value in entry.values():
                statistics.mean(map(float, value.values() if isinstance(value, dict) else [value]))
            entries += [entry] * (entry["step"] > 0 and entry["epoch"] > 0 and entry["seconds"] >= 0)
    return entries


def values_of(options, values, source):
    """Fields of an Options object from a file, where nothing is sure and tuples are lists: read as flags."""
    words = []
    for name, value in values.items():
        name = str(name).replace("_", "-")
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        words.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={text}")
    try:
        found, unknown = Parser(options).read(words)
        if unknown:
            raise ValueError(f"{unknown[0]} is unknown; use the commit that wrote it")
        replace(options, **found)  # checks the ranges
        return found
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def write_text(path, text):
    """Write a file whole or not at all."""
    part = Path(path).with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path, value):
    """Write a value whole or not at all, numpy's numbers as numbers."""
    write_text(path, json.dumps(value, indent=1, default=float) + "\n")


def make_folder(path):
    """A folder that exists from now on."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


# ------------------------------------------------------------------------------------------ 2 seed and device


@dataclass
class World:
    """This process among the others."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: object = None  # gloo group for small messages, so that they never wait for the GPU

    def sum(self, values):
        """Sum an array over the processes."""
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(values), group=self.control)  # in place
        return values


def start(flags):
    """Device, precision and process group -> World."""
    local, size = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    use_cuda = flags.device != "cpu" and torch.cuda.is_available()
    if use_cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU; start {torch.cuda.device_count()} processes"
        )
    device = torch.device(f"cuda:{local}" if use_cuda else "cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision(flags.matmul_precision)
    if flags.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if size == 1:
        return World(device)
    try:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OSError(f"no meeting at {place}, give another --master-port ({first_line(error)})") from None
    return World(device, dist.get_rank(), size, dist.new_group(backend="gloo"))


def seed_step(seed, step, rank):
    """All randomness of a step is a function of (seed, step, process), so a resumed run needs no state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def autocast(recipe, device):
    """Context of the recipe's mixed precision."""
    bf16 = recipe.amp == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get("bf16" if bf16 else recipe.amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


# -------------------------------------------------------------------------------------- 3 to 5 data and model


def load_data(flags, recipe):
    """The dataset, downloaded first when asked (by the first process of each machine)."""
    if flags.download and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        data.download(flags.data, flags.root)
    if dist.is_initialized():
        dist.barrier()
    return data.load(flags.data, flags.root or None, recipe, flags.skip_bad_images)


def ignore_signals(worker):
    """A worker leaves Ctrl-C and SIGTERM to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(photos, flags, world, **sampling):
    """DataLoader that leaves the global random state alone and gives up after a minute without a batch."""
    workers = flags.workers
    if workers < 0:  # images in memory need none
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, cores) if photos.split.images is None else 0
    return torch.utils.data.DataLoader(
        photos,
        num_workers=workers,
        timeout=55 if workers else 0,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
        **sampling,
    )


def to_model(images, recipe, device):
    """uint8 images (B, 3, H, W) -> what a model reads, on its device."""
    images = common.normalize(images.to(device, non_blocking=True), recipe.normalize)
    return images.contiguous(memory_format=torch.channels_last)


def build(recipe, num_classes, flags, world):
    """The method's model on its device, convolutions in channels_last."""
    model = (
        METHODS[flags.method].build(recipe, num_classes).to(world.device, memory_format=torch.channels_last)
    )
    if flags.compile:
        model.compile()
    return model


def make_optimizer(recipe, groups):
    """The recipe's optimizer over a method's parameter groups; fused where torch has it."""
    how = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "sgd":  # the fused kernel starts from garbage when fp16 skips the first step
        return torch.optim.SGD(groups, momentum=recipe.momentum, fused=recipe.amp != "fp16", **how)
    how |= dict(betas=(recipe.momentum, recipe.beta2), eps=recipe.eps)
    if recipe.optimizer == "radam":
        return torch.optim.RAdam(groups, decoupled_weight_decay=True, **how)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](groups, fused=True, **how)


def parts_of(recipe, model, flags, world):
    """What a checkpoint has to hold."""
    optimizer = make_optimizer(recipe, METHODS[flags.method].param_groups(model, recipe))
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "fp16")
    return {"model": model, "optimizer": optimizer, "scaler": scaler}


# ------------------------------------------------------------------------------------------ 6 the run folder


class Run:
    """A run folder: run.json says what it is, log.jsonl has a line an epoch, last.pt is where to go on.

    Order of writing: last.pt, then the epoch's line. So the log is never ahead of the checkpoint, and a run
    that is killed at any moment goes on from last.pt, at worst with the evaluation of an epoch again.
    """

    def __init__(self, flags, world):
        usual = [f"runs/{flags.method}", flags.data, flags.recipe * (flags.recipe != flags.data), flags.name]
        self.folder = Path(flags.resume or flags.out or "-".join(filter(None, usual)))
        self.last, self.result = self.folder / "last.pt", self.folder / "result.json"
        self.flags, self.world, self.lead = flags, world, world.rank == 0
        self.sums, self.clock = {}, time.perf_counter()
        self.refuse_others()

    def refuse_others(self):
        """Never write into another run; a folder that has no checkpoint is begun anew."""
        if self.result.exists() or self.last.exists() and not self.flags.resume:
            made = read_run(self.folder).get("command")
            how = (
                f"eval {self.folder} shows"
                if self.result.exists()
                else f"--resume {self.folder} goes on with"
            )
            raise ValueError(
                f"{self.folder} holds the run of: {made}; {how} it, --out DIR or --name NAME makes another"
            )

    def open(self, about, parts):
        """Take the folder; fill model, optimizer and scaler from last.pt, if any -> the first step."""
        self.about, self.parts = about, parts
        if self.lead:
            self.lock = open(
                make_folder(self.folder) / ".lock", "w"
            )  # held until this process ends, however it ends
            try:
                "fcntl" in globals() and fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{self.folder}: another process trains in it; wait, or choose --out DIR"
                ) from None
            self.refuse_others()
        log, step = read_log(self.folder) if self.last.exists() else [], 0
        log = [line for line in log if line["step"] < about["steps"] or {"val", "test"} & {*line}]
        if self.lead:  # without lines that were cut short, or of a run that was killed before a checkpoint
            write_text(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
        if self.last.exists():
            state = read_checkpoint(self.last, about)
            for name, part in parts.items():
                restore(part, state[name], self.last)
            step = state["step"]
            if step not in [entry["step"] for entry in log]:
                self.sums = {name: value * self.lead for name, value in state["sums"].items()}
        elif self.lead:
            write_json(self.folder / "run.json", about)
        if self.lead:
            say(f"{about['method']} on {about['data']}: {about['note']}")
            size, images = about["parameters"] / 1e6, about["recipe"]["batch_size"]
            say(f"{size:.2f} M parameters, step {step} to {about['steps']} of {images} images: {self.folder}")
        self.clock = time.perf_counter()
        return step

    def count(self, terms):
        """Add a step's terms to the epoch's, on their device: nothing waits."""
        now = time.perf_counter()
        for name, value in {"steps": 1, "seconds": now - self.clock, **terms}.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).double()
        self.clock = now

    def save(self, step):
        """Write last.pt; the sums of all processes are from now on the first one's."""
        sums = self.world.sum(np.array([float(value) for value in self.sums.values()]))
        self.sums = dict(zip(self.sums, (sums * self.lead).tolist()))
        if self.lead:
            state = {name: self.about[name] for name in ("method", "data", "classes", "recipe")}
            state |= {"step": step, "sums": self.sums} | {
                name: part.state_dict() for name, part in self.parts.items()
            }
            common.save_checkpoint(self.last, state)

    def close_epoch(self, entry, scores, left):
        """Write and say the epoch's line: the mean terms of its steps, and the scores."""
        steps, seconds, terms = self.sums.pop("steps"), self.sums.pop("seconds") / self.world.size, {}
        if self.lead:
            terms = {name: round(value / steps, 6) for name, value in self.sums.items()}
            rate = round(steps / self.world.size * self.about["recipe"]["batch_size"] / max(seconds, 1e-9), 1)
            entry |= terms | scores | {"seconds": round(seconds, 2), "images_per_second": rate}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry, default=float) + "\n")
            text = [f"epoch {entry['epoch']}", *(f"{name} {value:.4g}" for name, value in terms.items())]
            text += [f"{split} {percentages(some)}" for split, some in scores.items()]
            say("  ".join(text) + f"  {rate:.0f} images/s  {left} left")
        self.sums, self.clock = {}, time.perf_counter()


def read_checkpoint(path, about=None):
    """last.pt of a run; `about`: the method and the classes that it has to have."""
    state = common.load_checkpoint(path)
    kinds = dict(
        method=str, classes=list, recipe=dict, step=int, sums=dict, model=dict, optimizer=dict, scaler=dict
    )
    wrong = [
        key
        for key, kind in kinds.items()
        if not isinstance(state, dict) or not isinstance(state.get(key), kind)
    ]
    if wrong or state["method"] not in METHODS:
        raise ValueError(
            f"{path} lacks {', '.join(wrong) or 'a method'}: use the commit in the run's run.json"
        )
    if about and (state["method"], state["classes"]) != (about["method"], about["classes"]):
        other = ", ".join(sorted(map(str, {*state["classes"]} ^ {*about["classes"]}))[:3])
        raise ValueError(
            f"{path} is of {state['method']} with other classes ({other}); use the run's data, or train anew"
        )
    return state


def restore(part, state, path):
    """load_state_dict, whose dozen errors become one line."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(
            f"{path} does not fit ({what}); only switches that leave the weights alone do"
        ) from None


def describe(flags, recipe, splits, model, steps, world):
    """What run.json holds."""
    root = str(Path(flags.root).resolve()) if flags.root else ""
    return {
        "command": flags.command,
        "method": flags.method,
        "data": flags.data,
        "recipe_name": flags.recipe,
        "recipe": dataclasses.asdict(recipe),
        "seed": flags.seed,
        "classes": splits.classes,
        **provenance(world),
        "processes": world.size,
        "steps": steps,
        "parameters": count_parameters(model),
        "versions": {"python": sys.version.split()[0]}
        | {m.__name__: m.__version__ for m in (torch, torchvision, np)},
        "counts": {name: len(split) for name, split in vars(splits).items() if isinstance(split, data.Split)},
        "note": splits.note,
        "flags": {name: getattr(flags, name) for name in KEPT} | {"root": root},
    }


def provenance(world):
    """Where a number comes from: commit, device and date."""
    name = f"CPU ({torch.get_num_threads()} threads)"
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    device = name if world.size == 1 else f"{world.size} x {name}"
    return {"commit": git_commit(), "device": device, "date": time.strftime("%Y-%m-%d")}


@functools.cache
def git_commit():
    """Short hash of the code's commit, with '+' when tracked files are changed; 'unknown' outside git."""
    words = "describe --always --dirty=+ --exclude=*".split()
    with contextlib.suppress(OSError):
        git = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return git.stdout.strip() or "unknown"
    return "unknown"


def count_parameters(model):
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------ what is said


def say(text):
    """Print a text, its lines cut at words."""
    live_line("")
    width = max(60, shutil.get_terminal_size((110, 24)).columns)
    how = dict(subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    print(textwrap.fill(text, width, **how), flush=True)


def live_line(text):
    """On a terminal, one line that is kept up to date."""
    if sys.stdout.isatty():
        print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)


def percentages(scores, digits=1):
    """Scores as a text: all are shares, but for the number of skipped queries."""
    return "  ".join(
        f"{k} {v}" if k == "skipped" else f"{k} {100 * v:.{digits}f}%" for k, v in scores.items()
    )


def clock(seconds):
    """Seconds as minutes:seconds, from an hour on with hours."""
    minutes, seconds = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    )


def first_line(error):
    """What an error says, in a line."""
    return (str(error) or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------------------ 7 loop


class StopRequest:
    """Ctrl-C and SIGTERM end training after the current step; at once in an evaluation."""

    def __init__(self, folder):
        self.signal, self.hurry, self.advice = 0, False, f"go on with: python train.py --resume {folder}"

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame=None):
        if self.hurry or self.signal:
            raise KeyboardInterrupt(128 + number, f"stopped at once; {self.advice}")
        self.signal = number
        os.write(2, b"\nstopping after this step (once more: at once)\n")  # print is not safe here

    @contextlib.contextmanager
    def at_once(self):
        """For work that is done again on resume."""
        self.hurry = True
        if self.signal:
            self.ask(self.signal)
        yield
        self.hurry = False

    def __exit__(self, *error):
        live_line("")
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(flags, recipes, world):
    """Train one recipe to result.json -> its result, or the exit status of a run that was asked to stop."""
    recipe, run = recipes[0][1], Run(flags, world)
    # 3 data
    splits = load_data(flags, recipe)
    photos = data.Photos(splits.train, recipe, train=True, seed=flags.seed, skip=flags.skip_bad_images)
    watched = {"val": splits.val} if splits.val else {"test": splits.test}
    batches = functools.partial(
        data.epoch_batches, splits.train, recipe, flags.seed, rank=world.rank, size=world.size
    )
    per_epoch = len(batches(0))
    steps = recipe.iterations or recipe.epochs * per_epoch
    # 4 model, 5 optimizer
    torch.manual_seed(flags.seed)
    model = build(recipe, len(splits.classes), flags, world)
    parts, parallel = parts_of(recipe, model, flags, world), on_all_processes(model, world)
    _, optimizer, scaler = parts.values()
    # 6 run folder
    step, left = run.open(describe(flags, recipe, splits, model, steps, world), parts), "?"
    # 7 loop
    with StopRequest(run.folder) as stop:
        for epoch in range(math.ceil(step / per_epoch) - bool(run.sums), math.ceil(steps / per_epoch)):
            keys = batches(epoch)[step - epoch * per_epoch :][: steps - step]
            for batch in make_loader(photos, flags, world, batch_sampler=keys):
                seed_step(flags.seed, step, world.rank)
                for group in optimizer.param_groups:
                    group["lr"] = common.lr_at(recipe, step, steps, per_epoch, group)
                loss, terms = update(parallel, optimizer, scaler, batch, recipe, world)
                if not math.isfinite(loss):
                    paths = [splits.train.paths[i] for i in batch[2][:4]]
                    raise FloatingPointError(not_finite(step, loss, terms, optimizer, paths))
                step += 1
                run.count({"loss": loss, **terms})
                left = clock((steps - step) * run.sums["seconds"] / run.sums["steps"])
                live_line(f"epoch {epoch + 1}  step {step}/{steps}  loss {loss:.4g}  {left} left")
                stopping = world.sum(np.array([stop.signal]))[0]
                if stopping or flags.save_every and step % flags.save_every == 0:
                    run.save(step)
                if stopping:
                    print(f"stopped at step {step}; {stop.advice}" * run.lead)
                    return 128 + (stop.signal or signal.SIGTERM)
            run.save(step)  # before the evaluation, which may be long: it can be done again
            scores = {}
            if step == steps or (epoch + 1) % flags.eval_every == 0:
                seed_step(flags.seed, step, world.rank)  # a repeated evaluation draws the same numbers
                with stop.at_once():
                    scores = scores_of(model, watched, recipe, flags, world)
            entry = {"step": step, "epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
            run.close_epoch(entry, scores, left)
        # 8 report
        with stop.at_once():
            tested = scores_of(model, {"test": splits.test} if splits.val else {}, recipe, flags, world)
    result = report(run, tested, *watched) if run.lead else {}
    world.sum(np.zeros(1))  # the others wait until all is written
    return result


def on_all_processes(model, world):
    """The model whose gradients are those of all processes."""
    if world.size == 1:
        return model
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def scores_of(model, splits, recipe, flags, world):
    """The scores of each split."""
    return {name: evaluate(model, split, recipe, flags, world)["scores"] for name, split in splits.items()}


def update(model, optimizer, scaler, batch, recipe, world):
    """One optimizer step on a batch of Photos, in recipe.accumulate parts -> loss, terms."""
    images, labels = batch[0], batch[1].to(world.device)
    parts = zip(images.tensor_split(recipe.accumulate), labels.tensor_split(recipe.accumulate))
    totals = {}
    model.train()
    for i, (part, targets) in enumerate(parts, 1):
        share, last = len(part) / len(images), i == recipe.accumulate
        inputs = data.erase(to_model(part, recipe, world.device), recipe)
        later = contextlib.nullcontext() if last or world.size == 1 else model.no_sync()
        with later:  # the processes sum their gradients once, after the last part
            try:
                with autocast(recipe, world.device):
                    loss, terms = model(inputs, targets)
            except ValueError as error:  # BatchNorm cannot normalise a single image
                advice = "give each process and part two images: --batch-size, --accumulate"
                raise FloatingPointError(f"{error}; {advice}") from None
            scaler.scale(loss * share).backward()
        for name, value in {"loss": loss, **terms}.items():
            totals[name] = totals.get(name, 0) + value.detach() * share
    scaler.unscale_(optimizer)
    for p in (p for group in optimizer.param_groups if group["lr"] == 0 for p in group["params"]):
        p.grad = None  # frozen: no running averages either
    if recipe.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return totals.pop("loss"), totals


def not_finite(step, loss, terms, optimizer, paths):
    """What to know of a step whose loss is not finite."""
    terms, rate = {name: round(float(value), 4) for name, value in terms.items()}, optimizer.param_groups[0][
        "lr"
    ]
    where = f"the loss is {loss:.4g} at step {step}, lr {rate:.3g}, terms {terms}, photos {paths}"
    return f"{where}; the last checkpoint is untouched; try a smaller --lr, --grad-clip 1 or --amp off"


def report(run, tested, watched):
    """8: write result.json and say what to type next -> the result. tested: scores not in the log."""
    log = read_log(run.folder)
    scored = [entry for entry in log if watched in entry]
    scores = tested.get("test", scored[-1][watched])
    metric, *_ = scores
    best = max(scored, key=lambda entry: entry[watched][metric])
    best = {"split": watched, "metric": metric, "score": best[watched][metric], "epoch": best["epoch"]}
    result = {
        "split": "test",
        **scores,
        "best_over_epochs": best,
        "seconds": sum(entry["seconds"] for entry in log),
    }
    write_json(run.result, result | {name: run.about[name] for name in ("steps", "commit", "seed")})
    say(f"result: test {percentages(scores)} after the last epoch -> {run.result}")
    print(f"next:   python train.py eval {run.folder}\n        python train.py figures {run.folder}")
    if run.about["recipe"]["task"] == "classify":
        print(f"        python train.py predict {run.folder} PHOTO_OR_FOLDER")
    return result


# ------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def answers_of(model, split, recipe, flags, world, question):
    """Ask a model about every photo once; process r takes r, r + size, ... -> (indices, dict of arrays)."""
    model.eval()
    if len(split) < world.size:
        raise ValueError(f"{len(split)} images for {world.size} processes; start fewer")
    photos, done, began = data.Photos(split, recipe, skip=flags.skip_bad_images), 0, time.perf_counter()
    mine = range(world.rank, len(split), world.size)
    batch_size = max(1, recipe.batch_size // world.size)
    for images, _, indices, shown in make_loader(photos, flags, world, batch_size=batch_size, sampler=mine):
        with autocast(recipe, world.device):
            answers = question(to_model(images, recipe, world.device))
        answers = {
            name: value.float() if value.is_floating_point() else value for name, value in answers.items()
        }
        yield indices.numpy(), {
            name: value.cpu().numpy() for name, value in {**answers, "shown": shown}.items()
        }
        done += len(images)
        left = clock((time.perf_counter() - began) / done * (len(mine) - done))
        live_line(f"{done} of {len(mine)} photos  {left} left" * (world.rank == 0))


def run_over(model, split, recipe, flags, world, question):
    """The answers of all processes about every photo of a split -> dict name -> array (n, ...)."""
    results = {}
    for indices, answers in answers_of(model, split, recipe, flags, world, question):
        for name, value in answers.items():
            results.setdefault(name, np.zeros((len(split), *value.shape[1:]), value.dtype))[indices] = value
    live_line("")
    return {name: world.sum(array) for name, array in results.items()}


def evaluate(model, split, recipe, flags, world, whole=False, untrained=None):
    """Scores of a model -> data.score's dict; `whole`: of its heads too, and of where it looks."""
    classify = recipe.task == "classify"
    for buffer in model.buffers() if world.size > 1 else ():
        dist.broadcast(
            buffer, 0
        )  # BatchNorm's statistics are each process's own: score the model that is saved

    def question(images):
        logits = model(images)
        answers = {"answer": data.ranked(logits) if classify else logits}
        for name, value in model.heads(images).items() if whole else ():
            answers[f"head {name}"] = value.float().argmax(1) if classify else value
        if whole and classify:
            answers["boxes"] = model.where(images)[0]
        if untrained:
            answers["untrained boxes"] = untrained.where(images)[0]
        return answers

    def log_probabilities(some):
        def question(images):
            return {"answer": model(images).float().log_softmax(1)}

        return run_over(model, some, recipe, flags, world, question)["answer"]

    return data.score(
        split, run_over(model, split, recipe, flags, world, question), recipe, log_probabilities
    )


def load(run, device="cpu", recipe=None):
    """A run's model, ready to answer -> (model, classes, recipe); `recipe`: with changes for eval alone."""
    path = Path(run) / "last.pt"
    if Path(run).is_dir() and not path.exists():
        raise FileNotFoundError(f"{run} has no checkpoint yet; python train.py --resume {run} trains it")
    state = read_checkpoint(path)
    module = METHODS[state["method"]]
    recipe = recipe or module.Recipe(**values_of(module.Recipe(), state["recipe"], path))
    model = module.build(replace(recipe, weights="none"), len(state["classes"]))
    restore(model, state["model"], path)
    return model.to(device, memory_format=torch.channels_last).eval(), state["classes"], recipe


@torch.no_grad()
def scored(run, recipe, flags, world):
    """A run on its test images under a recipe -> its scores, where it looks, what it costs."""
    splits, untrained = load_data(flags, recipe), None
    read_checkpoint(Path(run) / "last.pt", {"method": flags.method, "classes": splits.classes})
    model, _, _ = load(run, world.device, recipe)
    if splits.test.swap:  # drawn images: where an untrained network looks is salience, not knowledge
        with torch.random.fork_rng():
            torch.manual_seed(flags.seed)
            untrained = build(replace(recipe, weights="none"), len(splits.classes), flags, world).eval()
    if flags.compile:
        model.compile()
    row = evaluate(model, splits.test, recipe, flags, world, True, untrained)
    image = torch.zeros(1, 3, *recipe.image_size, device=world.device)
    ms = statistics.median(seconds_of(lambda: model(image), world) for _ in range(5)) * 1e3
    return row | costs_of(model, image) | {"ms": ms, "classes": splits.classes}


def evaluate_run(flags, recipes, world):
    """The eval action -> eval.json."""
    rows = [{"variant": label} | scored(flags.run, recipe, flags, world) for label, recipe in recipes]
    if world.rank:
        return
    say(f"{flags.method} on {flags.data}, {flags.run}")
    for row in rows:
        variant = f"[{row['variant']}]  " if row["variant"] else ""
        say(f"{variant}{percentages(row['scores'], 2)}  {row['macs']:.3f} GMACs  {row['ms']:.1f} ms/image")
        if len(row["heads"]) > 1:
            say(f"   heads: {percentages(row['heads'], 2)}")
        for text in row.get("lines", ()):
            say(f"   {text}")
    classes, first = rows[0]["classes"], rows[0]
    if "per_class" in first:
        weak = sorted(first["per_class"].items(), key=lambda item: item[1][0] / item[1][1])[:5]
        say("   weakest classes: " + "; ".join(f"{classes[c]} {right}/{n}" for c, (right, n) in weak))
        pairs = "; ".join(f"{classes[a]} > {classes[b]} {n}x" for a, b, n in first["confused"])
        say(f"   most confused (true > predicted): {pairs or 'none'}")
    path = make_folder(flags.out or flags.run) / "eval.json"
    write_json(path, {"command": flags.command, "run": flags.run, **provenance(world), "rows": rows})
    print(f"written: {path}")


# -------------------------------------------------------------------------------------- predict and figures


def predict(flags, recipes, world):
    """The predict action: photo by photo into CSV, JSON, a picture -> status 1 if one was unreadable."""
    recipe = recipes[0][1]
    model, classes, _ = load(flags.run, world.device, recipe)
    if recipe.task != "classify":
        raise ValueError(
            "this run ranks identities and has no classes to predict; look at it with eval and figures"
        )

    def question(images):
        shares, order = model(images).float().softmax(1).sort(descending=True, stable=True)
        boxes, scores = model.where(images)
        return {"classes": order[:, :5], "shares": shares[:, :5], "boxes": boxes, "scores": scores}

    split = data.Split(data.list_photos(flags.words), None, upright=True)
    data.Photos(split, recipe)  # refuses a recipe that photos cannot have before anything is written
    out, bad, flags = (
        make_folder(flags.out or f"{flags.run}/predict"),
        [],
        replace(flags, skip_bad_images=True),
    )
    how = dict(mode="w", newline="", encoding="utf-8")
    with open(out / "predictions.csv", **how) as table, open(out / "predictions.json", **how) as file:
        rows = csv.writer(table)
        ranks = range(1, 1 + min(5, len(classes)))
        rows.writerow(["path", *(f"{name} {rank}" for rank in ranks for name in ("class", "probability"))])
        separator = (
            json.dumps({"run": flags.run, "command": flags.command, **provenance(world)})[:-1]
            + ', "photos": [\n'
        )
        for indices, answers in answers_of(model, split, recipe, flags, World(world.device), question):
            for i, top, shares, boxes, scores, shown in zip(indices, *answers.values()):
                path = str(split.paths[i])
                if np.isnan(shown).any():
                    bad.append(path)
                    print(f"train.py: {path}: cannot be read as a photo; skipped", file=sys.stderr)
                    continue
                top = [(classes[c], round(float(share), 4)) for c, share in zip(top, shares)]
                boxes = data.to_photo(boxes, shown, recipe.image_size)
                entry = {
                    "path": path,
                    "top": top,
                    "boxes": boxes.round(2).tolist(),
                    "scores": scores.tolist(),
                }
                if flags.pictures:
                    entry["picture"] = picture_of(path, top, boxes[:6], out)
                rows.writerow([path, *itertools.chain(*top)])
                file.write(separator + json.dumps(entry, ensure_ascii=False))
                separator = ",\n"
                say(
                    f"{i + 1}/{len(split)} {path}: " + ", ".join(f"{name} {share:.1%}" for name, share in top)
                )
        separator = (
            separator if len(bad) == len(split) else ""
        )  # no photo at all: the head is still to be written
        file.write(f'{separator}], "unreadable": {json.dumps(bad, ensure_ascii=False)}}}\n')
    print(f"written: {out}/predictions.csv, predictions.json" + ", a picture of each photo" * flags.pictures)
    if bad:
        say(f"{len(bad)} of {len(split)} files could not be read: {', '.join(bad)}")
    return int(bool(bad))


def picture_of(path, top, boxes, out):
    """Draw boxes of a photo above bars of its three best classes -> the picture's file name, which is new."""
    photo = data.open_photo(path)
    scale = min(1.0, 800 / max(photo.size))
    width, height = (max(1, round(side * scale)) for side in photo.size)
    numbers = [str(n + 1) for n in range(len(boxes))]
    photo = common.draw_boxes(
        photo.resize((width, height), reducing_gap=2), boxes * scale, numbers, width=2 + height // 300
    )
    page = Image.new("RGB", (max(360, width), height + 80), "white")
    page.paste(photo)
    draw, middle = ImageDraw.Draw(page), page.width // 2
    for n, (name, share) in enumerate(top[:3]):
        y = height + 6 + 24 * n
        common.write(draw, (6, y), f"{share:.1%}  {name}", 16, middle - 12, fill="black")
        draw.rectangle(
            (middle, y, middle + share * (middle - 6), y + 16), fill=common.COLOURS[n], outline="black"
        )
    for n in itertools.count(1):
        name = f"{Path(path).stem}-{n}.png" if n > 1 else f"{Path(path).stem}.png"
        with contextlib.suppress(FileExistsError), open(out / name, "xb") as file:
            page.save(file, "PNG")
            return name


def figures(flags, recipes, world):
    """The figures action: the paper's figure of test images, of several runs side by side; curves."""
    runs = [flags.run, *flags.words]
    beside = Path(flags.run) if len(runs) == 1 else Path(flags.run).parent
    comparable = {read_run(run)["data"] for run in runs} == {flags.data}
    out = make_folder(flags.out or beside / "figures")
    if comparable:
        models = [load(run, world.device, None if i else recipes[0][1]) for i, run in enumerate(runs)]
        splits = [load_data(flags, recipe).test for _, _, recipe in models]
        n = min(map(len, splits))
        count = min(flags.images, n)
        chosen = [j * n // count + j % (n // count) for j in range(count)]  # spread over split and classes
        columns = [pages_of(*model, split, chosen, world) for model, split in zip(models, splits)]
        for i, *pages in zip(chosen, *columns):
            if len(runs) > 1:
                pages = [common.headed(page, str(run)) for page, run in zip(pages, runs)]
            path = out / f"test{i:05d}.png"
            common.stack(pages, across=True).save(path)
            print(f"{path}: {splits[0].paths[i]}")
    curves(runs).save(out / "curves.png")
    print(f"{out / 'curves.png'}: learning curves")


@torch.no_grad()
def pages_of(model, classes, recipe, split, chosen, world):
    """A method's figures of test images, under name, true class and, in green or red, the predicted one."""
    photos = data.Photos(split, recipe)
    images = to_model(torch.stack([photos[i][0] for i in chosen]), recipe, world.device)
    with autocast(recipe, world.device):
        pictures, answers = model.figure(images), model(images).float()
    pages = []
    for i, picture, answer in zip(chosen, pictures, answers):
        name, label = Path(split.paths[i]).name, split.labels[i]
        if recipe.task == "classify":
            share, best = answer.softmax(0).max(0)
            colour = "#1a7f37" if best == label else "#c62828"
            picture = common.headed(picture, f"{classes[best]} {share:.1%}", colour)
        named = classes[label] if recipe.task == "classify" else f"identity {label}"
        pages.append(common.headed(picture, f"{name}   {named}"))
    return pages


def curves(runs):
    """Learning curves of runs: losses, shares, rate, and accuracy against cost of eval's variants."""
    charts = {
        ("losses", "epoch", "nats"): {},
        ("accuracy", "epoch", "%"): {},
        ("learning rate", "epoch", ""): {},
    }
    losses, shares, rates = charts.values()
    for run in runs:
        tag = f"{Path(run).name} " if len(runs) > 1 else ""
        for entry in read_log(run):
            for name, value in entry.items():
                chart, factor = losses, 1
                if isinstance(value, dict):  # val, test: the headline
                    (name, value), chart, factor = (
                        (f"{name} {next(iter(value))}", next(iter(value.values()))),
                        shares,
                        100,
                    )
                elif name.startswith(("top1", "reward")):
                    name, chart, factor = f"training {name}", shares, 100
                elif name == "lr":
                    chart = rates
                skip = (
                    name in ("step", "epoch", "seconds", "images_per_second")
                    or chart is losses
                    and tag
                    and name != "loss"
                )
                if isinstance(value, (int, float)) and not skip:
                    chart.setdefault(tag + name, []).append((entry["epoch"], factor * value))
        path = Path(run) / "eval.json"
        rows = read_json(path, rows=list)["rows"] if path.exists() else []
        if len(rows) > 1:
            with reading(path):
                points = sorted((float(row["macs"]), 100 * [*row["scores"].values()][0]) for row in rows)
            charts.setdefault(("accuracy against cost", "GMACs an image", "%"), {})[Path(run).name] = points
    size = (460, 300 + 16 * max(map(len, charts.values())))
    return common.stack([common.plot(*names, series, size) for names, series in charts.items()], across=True)


# ------------------------------------------------------------------------------------------ profile


def peak_memory(work, world):
    """Bytes that `work()` needs at its peak above what is held before; nan where the system cannot tell."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds_of(work, world)
        return torch.cuda.max_memory_allocated() - before

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status("VmRSS")
    except (OSError, AttributeError):
        return math.nan
    work()
    return status("VmHWM") - before


def seconds_of(work, world):
    """Seconds that `work()` takes."""
    wait = torch.cuda.synchronize if world.device.type == "cuda" else int
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def workloads(flags, recipe, classes, world):
    """A recipe's costs, and what is timed: inference and a training step on a random batch."""
    size, group = flags.profile_batch, max(1, recipe.instances)
    if size % group:
        raise ValueError(f"--profile-batch {size} holds no whole groups of {group} images; give a multiple")
    recipe = replace(recipe, weights="none", accumulate=1)
    parts = parts_of(recipe, build(recipe, classes, flags, world), flags, world)
    model = parts["model"]
    for one in parts["optimizer"].param_groups:
        one["lr"] = 1e-12  # real steps, but the weights stay (0 would freeze them)
    pixels = torch.randint(0, 256, (size, 3, *recipe.image_size), dtype=torch.uint8)
    batch, images = (pixels, torch.arange(size) // group % classes), to_model(pixels, recipe, world.device)

    @torch.no_grad()
    def infer():
        model.eval()
        with autocast(recipe, world.device):
            model(images)

    def step():
        update(*parts.values(), batch, recipe, world)

    works = {"infer": infer} if flags.inference_only else {"infer": infer, "step": step}
    return costs_of(model.eval(), images[:1]), works


def costs_of(model, image):
    """Parameters in M, multiply-adds in G."""
    return {"params": count_parameters(model) / 1e6, "macs": common.count_macs(model, image) / 1e9}


def profile(flags, recipes, world):
    """The profile action: variants timed in turn, so that ratios hold; the first is 1.00."""
    if flags.threads:
        torch.set_num_threads(flags.threads)
    classes = flags.classes or (len(read_run(flags.run)["classes"]) if flags.run else 100)
    rows, works = [], []
    for label, recipe in recipes:
        costs, own = workloads(flags, recipe, classes, world)
        rows.append({"variant": label or "as given", "M parameters": costs["params"], "GMACs": costs["macs"]})
        works += [(rows[-1], kind, work, []) for kind, work in own.items()]
    for row, kind, work, _ in works:
        work()  # warm-up
        row[f"{kind} MB"] = peak_memory(work, world) / 2**20
    order = np.random.default_rng(flags.seed)
    for i in itertools.chain(*(order.permutation(len(works)) for _ in range(flags.rounds))):
        works[i][3].append(seconds_of(works[i][2], world))
    for n, (row, kind, _, times) in enumerate(works):
        first, _, _, base = works[n % (len(works) // len(rows))]
        row[f"{kind} MB ratio"] = row[f"{kind} MB"] / max(1e-6, first[f"{kind} MB"])
        row[f"{kind} ms/image"] = statistics.median(times) / flags.profile_batch * 1e3
        row[f"{kind} images/s"] = 1e3 / row[f"{kind} ms/image"]
        row[f"{kind} ratio"] = statistics.median(a / b for a, b in zip(times, base))
    about = {"command": flags.command, "method": flags.method, **provenance(world), "classes": classes}
    about |= {"batch": flags.profile_batch, "rounds": flags.rounds, "torch": torch.__version__}
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    print(text_table(rows))
    if flags.out:
        write_json(make_folder(flags.out) / "profile.json", {**about, "rows": rows})


def text_table(rows):
    """Dicts with the same keys -> a Markdown table with aligned columns; numbers with four digits."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *cells)]
    lines = [list(rows[0]), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


# ------------------------------------------------------------------------------------------ table


class Refused(Exception):
    """What the user has to decide before a table can go on."""


@dataclass
class Row:
    """A row of a table, on the data at hand."""

    method: str
    key: str  # its name in file names and for --rows
    label: str
    paper: tuple  # the paper's value for each metric, or None
    recipe: common.Recipe  # what it trains with
    evaluation: dict  # what its evaluation changes
    start: str | None  # key of the row whose run gives the first weights
    home: str  # its folder: that of the first row with the same training


def key_of(name):
    """A row's name in file names and for --rows."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def rows_of(method, flags, base):
    """Rows of a table; on other data than its own only the method's switches vary, and not the backbone."""
    table, rows = METHODS[method].TABLES[flags.table], []
    switches = {f.name for f in dataclasses.fields(base) if f.metadata["group"] == "method"} - {"backbone"}
    weights = {key_of(name): path for name, _, path in (pair.rpartition("=") for pair in flags.row_weights)}
    for name, overrides, paper in table.rows:
        key, (training, evaluation, start) = key_of(name), common.split_row(overrides)
        backbone = getattr(replace(METHODS[method].RECIPES[table.data], **training), "backbone", None)
        if table.data != flags.data:
            training = {field: value for field, value in training.items() if field in switches}
        recipe = replace(
            base, **training | {"weights": weights.get(key, training.get("weights", base.weights))}
        )
        label, ours = name if flags.method else f"{method}: {name}", getattr(recipe, "backbone", None)
        if ours != backbone:
            label += f" ({ours})"
        if ours != backbone or table.data != flags.data:
            paper = None
        home = next(
            (row.home for row in rows if (row.recipe, row.start) == (recipe, start)), f"{method}-{key}"
        )
        paper = paper if isinstance(paper, tuple) else (paper,)
        rows.append(Row(method, key, label, paper, recipe, evaluation, start, home))
    return rows


def table(flags, recipes, world):
    """The table action: rows over seeds, beside the paper -> results.md, results.json, a JSON a row."""
    recipe, names = recipes[0][1], [flags.method] if flags.method else [*METHODS]
    names = [name for name in names if flags.method or flags.data in METHODS[name].RECIPES]
    tables = METHODS[names[0]].TABLES
    if not flags.table:
        print("\n".join(f"  {key:12} {one.title} [{one.data}, {one.metric}]" for key, one in tables.items()))
        return
    if flags.table not in tables:
        raise ValueError(f"no table {flags.table!r} of {names[0]}; it has: {', '.join(tables)}")
    rows, given = [], {k: v for k, v in vars(recipe).items() if v != getattr(common.Recipe(), k, v)}
    for name in names:
        rows += rows_of(
            name, flags, recipe if flags.method else replace(METHODS[name].RECIPES[flags.data], **given)
        )
    keys, chosen = [row.key for row in rows], [key_of(name) for name in flags.rows]
    unknown = {*chosen, *(key_of(pair.rpartition("=")[0]) for pair in flags.row_weights)} - {*keys}
    if unknown or not flags.seeds:
        raise ValueError(
            f"--rows {', '.join(unknown)}: the rows are {', '.join(keys)}; give one seed at least"
        )
    load_data(flags, rows[0].recipe)  # says what is wrong with --root, once for all rows
    title = (
        f"{flags.method or 'all methods'}, table {flags.table}: {tables[flags.table].title}; on {flags.data}"
    )
    folder = Path(flags.out or f"runs/table-{flags.method or 'all'}-{flags.table}-{flags.data}")
    about, lines = {"title": title, "command": flags.command, **provenance(world), "seeds": flags.seeds}, []
    for row in (row for row in rows if not chosen or row.key in chosen):
        results, problem = [], ""
        try:
            for seed in flags.seeds:
                results.append(finish_row(row, rows, seed, folder, flags, world))
                if isinstance(results[-1], int):
                    return results[-1]  # stopped
        except (ValueError, FileNotFoundError) as error:  # a row that this data cannot have; the others go on
            results, problem = [], " ".join(str(error).split())
        lines.append(line_of(row, results, problem, tables[flags.table].metric.split()))
        if world.rank == 0:
            one = {**dataclasses.asdict(row), "problem": problem, "results": results}
            write_json(make_folder(folder) / f"{row.method}-{row.key}.json", about | one)
    if world.rank == 0:
        shown = [name for name in lines[0] if any(line[name] not in ("-", "nan") for line in lines)]
        cells = text_table([{name: line[name] for name in shown} for line in lines])
        text = "\n".join([*(f"{name}: {value}" for name, value in about.items()), "", cells, ""])
        write_text(folder / "results.md", text)
        write_json(folder / "results.json", about | {"rows": lines})
        print(text + f"written: {folder}/results.md, results.json")


def finish_row(row, rows, seed, folder, flags, world):
    """One row and seed: its result, read or trained, and how eval saw it; or the exit status of a stop."""
    home, recipe, module = folder / f"{row.home}-seed{seed}", row.recipe, METHODS[row.method]
    if row.start:
        start = next(other for other in rows if (other.method, other.key) == (row.method, key_of(row.start)))
        status = finish_row(start, rows, seed, folder, flags, world)
        if isinstance(status, int):
            return status
        recipe = replace(recipe, weights=str(folder / f"{start.home}-seed{seed}"))
    own = replace(flags, method=row.method, recipe=flags.recipe or flags.data, seed=seed, out=str(home))
    begun = (home / "last.pt").exists()
    trained = values_of(module.Recipe(), read_run(home)["recipe"], f"{home}/run.json") if begun else {}
    if begun and module.Recipe(**trained) != recipe:
        raise Refused(f"{home} was trained with other settings; delete it, or choose another --out")
    if not (home / "result.json").exists():
        trained = train(replace(own, resume=str(home) * begun), [("", recipe)], world)
        if isinstance(trained, int):
            return trained
    result = read_json(home / "result.json", commit=str, seconds=float)
    if result["commit"] != git_commit() and not flags.any_commit:
        raise Refused(
            f"{home} is of commit {result['commit']}, this is {git_commit()}; delete it, or --any-commit"
        )
    with reading(home / "result.json"):
        evaluations = result["evaluations"] = dict(result.get("evaluations", {}))
    key = json.dumps(row.evaluation, sort_keys=True)
    if key not in evaluations:
        evaluations[key] = scored(home, replace(recipe, **row.evaluation), own, world)
        if world.rank == 0:
            write_json(home / "result.json", result)
        world.sum(np.zeros(1))  # the others wait
    with reading(home / "result.json"):
        found = {"seed": seed, "seconds": result["seconds"], "commit": result["commit"], **evaluations[key]}
        numbers_of(found)
    return found


def line_of(row, results, problem, metrics):
    """A row as it is printed: the paper and ours, mean +- sd (n) over the seeds, shares in %."""
    line = {"row": row.label}
    for i, metric in enumerate([*metrics, "seconds", "params", "macs", "ms", "pointing", "iou"]):
        values = [numbers_of(result).get(metric, math.nan) for result in results]
        ours = f"{statistics.mean(values):.4g}" if values else problem if i == 0 else "-"
        if len(values) > 1:
            ours += f" +- {statistics.stdev(values):.2g} ({len(values)})"
        if i < len(metrics):
            line[f"{metric}, paper"] = (
                "-" if (paper := row.paper[i % len(row.paper)]) is None else f"{paper:g}"
            )
        line |= {metric: ours} if metric not in line else {}
    return line


def numbers_of(result):
    """What a table can show of an evaluation, shares in %."""
    pointing, iou = result.get("pointing", {}).get("signature", {}), result.get("object_iou", {})
    shares = {"coverage": result.get("coverage", math.nan), "iou": iou.get("mean", math.nan)}
    shares |= {"pointing": pointing.get("best", math.nan), **result["scores"], **result.get("scale", {})}
    numbers = {name: 100 * share for name, share in shares.items() if isinstance(share, float)}
    return numbers | {name: float(result[name]) for name in ("seconds", "params", "macs", "ms")}


# ------------------------------------------------------------------------------------------ the command line


def main(argv=None):
    """Run the command line -> exit status: 0 done, 1 it failed, 2 the user's mistake, 130 / 143 stopped."""
    recipe = common.Recipe()
    try:
        flags, recipes = parse(sys.argv[1:] if argv is None else argv)
        recipe, world = recipes[0][1], start(flags)
        if world.rank and flags.action in ("predict", "figures", "profile"):
            return 0  # one process does these
        actions = {
            "eval": evaluate_run,
            "predict": predict,
            "figures": figures,
            "profile": profile,
            "table": table,
        }
        status = actions.get(flags.action, train)(flags, recipes, world)
        return status if isinstance(status, int) else 0
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, Refused) as error:
        return fail(2, error)
    except (FloatingPointError, OSError) as error:
        return fail(1, error)
    except KeyboardInterrupt as stop:
        return fail(*stop.args or (130, "stopped at once"))
    except (RuntimeError, MemoryError) as error:
        text = first_line(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            parts = f"--accumulate {2 * recipe.accumulate}, --amp bf16 or a smaller --batch-size"
            return fail(1, f"out of memory at batch {recipe.batch_size}; try {parts}")
        if any(part in str(error) for part in ("DataLoader", "shared memory", "open files")):
            hint = "give fewer --workers, or a larger /dev/shm or ulimit -n"
            return fail(1, f"a process that decodes photos died or went silent; {hint} ({text})")
        if dist.is_initialized():
            return fail(1, f"this process lost the others: {text}")
        raise
    finally:
        stuck = [child for child in multiprocessing.active_children() if child.daemon]  # workers of a loader
        for worker in stuck:  # which would be waited for, and ignore SIGTERM
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of their end
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(status, error):
    """One line on stderr -> the exit status. Of an error in a worker process the last line is the message."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    print("train.py: " + " ".join(text.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    status = main()
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort an interpreter that is shutting down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
