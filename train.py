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
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
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
    import fcntl  # not on Windows, where two starts into one folder are not told apart
    import resource

METHODS = {"m2former": m2former, "dcal": dcal, "tnet": tnet, "vit_fgvc": vit_fgvc, "tdsa": tdsa}
ACTIONS = {
    "train": "Trains and evaluates; writes runs/METHOD-DATA[-RECIPE][-NAME]/ or --out.",
    "eval": "Scores RUN; writes RUN/eval.json or into --out. Text switches take several values with commas.",
    "predict": "Top five of PHOTOS, files or folders, and a picture of each; writes RUN/predict/ or --out.",
    "figures": "The figure of test images; writes RUN/figures/ (of several runs beside them) or --out.",
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
    """What to run, and how, which changes nothing that is learned but for the seed and skipped photos."""

    method: str = the_run("", f"one of {', '.join(METHODS)}")
    data: str = the_run("toy", f"one of {', '.join(data.DATASETS)}")
    root: str = the_run("", "folder of the dataset")
    download: bool = the_run(False, "fetch the dataset into --root first (cub, aircraft, flowers, dogs)")
    recipe: str = the_run("", "which of the method's recipes, if not the one named like the data")
    run: str = opt("", "the same as RUN after the action", group="for eval, predict, figures, profile")
    out: str = the_run("", "output folder, if not the usual one")
    seed: int = the_run(0, "of initial weights, order and augmentation", most=MOST_SEED)
    device: str = the_run("auto", "auto: cuda when there is one", ("auto", "cpu", "cuda"))
    workers: int = the_run(-1, "processes that decode photos; -1: the cores, at most 8", least=-1, most=256)
    matmul_precision: str = the_run("highest", "of fp32 products", ("highest", "high", "medium"))
    compile: bool = the_run(False, "torch.compile the model")
    deterministic: bool = the_run(False, "only deterministic kernels (CUDA; slower)")
    help_all: bool = the_run(False, "this text with every switch of the method")
    resume: str = opt("", "run folder to go on with", group="for train")
    name: str = opt("", "appended to the run folder's name", group="for train")
    save_every: int = for_training(0, "also save every so many steps; 0: at the end of epochs", most=1e9)
    eval_every: int = for_training(1, "evaluate every so many epochs, and after the last", least=1)
    skip_bad_images: bool = for_training(False, "leave unreadable photos out instead of stopping")
    table: str = for_table("", "which; else they are listed. baseline without --method: all methods")
    seeds: tuple[int, ...] = for_table((0,), "seeds", most=MOST_SEED)
    rows: tuple[str, ...] = for_table((), "only these rows")
    row_weights: tuple[str, ...] = for_table((), "first weights of single rows: NAME=FILE,...")
    against: str = opt("", "one more variant: its recipe flags, quoted", group="for eval and profile")
    images: int = opt(6, "how many test images", least=1, group="for figures")
    pictures: bool = opt(True, "a picture of each photo", group="for predict")
    profile_batch: int = for_profile(2, "images in a batch", least=1)
    rounds: int = for_profile(5, "timed rounds, in each all variants in random order", least=1)
    classes: int = for_profile(0, "number of classes; 0: the run's, else 100")
    inference_only: bool = for_profile(False, "leave the training step out")


@dataclass(frozen=True)
class Call(Flags):
    """The flags of a command line and its other words."""

    action: str = opt("train", "what to do", tuple(ACTIONS))
    words: tuple[str, ...] = opt((), "photos of predict, further runs of figures")
    changed: tuple[str, ...] = opt((), "switches of the recipe that the line names")
    command: str = opt("", "the line itself")


KEPT = ("root", "seed", "workers", "matmul_precision", "compile", "deterministic", "skip_bad_images")
KEPT += ("save_every", "eval_every")  # flags of a run that hold for whatever is done with it


class Parser(argparse.ArgumentParser):
    """The flags of an Options object; an error is a ValueError of one line."""

    def __init__(self, options, action=""):
        usage = f"python train.py {action} [RUN] [--flag VALUE ...]"
        how = dict(allow_abbrev=False, usage=usage, description=ACTIONS.get(action))
        super().__init__(add_help=bool(action), **how)
        common.add_options(self, options, lambda f: concerns(f, action))

    def error(self, message):
        raise ValueError(message)

    def read(self, words):
        """Words -> the values of its flags among them, and the others."""
        values, others = self.parse_known_args(words)
        if [] in vars(values).values():  # how argparse reads --flag=--
            self.error("-- is no value of a flag")
        return vars(values), others


def concerns(field, action):
    """Whether a flag belongs to an action."""
    group = field.metadata["group"]
    return not group.startswith("for ") or action in group


def parse(argv):
    """Command line -> a Call and its recipes [(label, Recipe)]: several of eval and profile, else one."""
    command, argv = "python train.py " + shlex.join(argv), [*argv]
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0)
    action = argv.pop(0) if argv and argv[0][:1] != "-" else "train"
    if action not in ACTIONS:
        raise ValueError(f"unknown action {action!r}; {near(action, ACTIONS)}")
    argv, against = without_against(argv)
    cli = Parser(Flags(), action)
    given, words = cli.read(argv)
    for f in dataclasses.fields(Flags):
        if f.name in given and not concerns(f, action):
            raise ValueError(f"{common.flag(f)} is {f.metadata['group']}, not for {action}")
    run = given.get("resume") or given.get("run", "")
    if not run and action not in ("train", "table") and words and words[0][:1] != "-":
        run = words.pop(0)
    if not run and action in ("eval", "predict", "figures"):
        raise ValueError(f"name the run right after the action: python train.py {action} RUN{runs_here()}")
    about = read_run(run) if run else {}
    if about and {"method", "data", "recipe"} & {*given}:
        raise ValueError(f"leave --method, --data and --recipe away: {run} has its own")
    method = (about | given).get("method", "")
    recipe, chosen, name = recipe_of(method, given, about, run)
    switches = Parser(recipe)
    changed, words = switches.read(words)
    for word in words:
        if word.startswith("-"):
            flags = [common.flag(f) for options in (Flags, recipe) for f in dataclasses.fields(options)]
            raise ValueError(f"unknown argument {word}; {near(word, flags, 'see --method M --help-all')}")
    if not method and (action, given.get("table")) != ("table", "baseline"):
        raise ValueError("name a method: python train.py --method tnet is a first run of minutes; see --help")
    if given.get("help_all"):
        common.add_options(cli, recipe)
        cli.print_help()
        raise SystemExit(0)
    if words and action not in ("predict", "figures"):
        raise ValueError(f"{action} takes no {words[0]!r}")
    if action == "predict" and not words:
        raise ValueError("name photos: predict RUN PHOTO_OR_FOLDER ...")
    if "resume" in given and (changed or {"out", "name", "seed"} & {*given}):
        raise ValueError("--resume keeps the run's recipe, folder and seed; --weights DIR starts another")
    flags = options_of(Flags(), about.get("flags", {}), f"{run}/run.json")
    kept = {key: getattr(flags, key) for key in KEPT}
    own = dict(method=method, data=name, recipe=chosen, run=run, action=action)
    call = Call(**kept | given | own, words=tuple(words), changed=tuple(changed), command=command)
    return call, variants(recipe, changed, against, switches, action)


def without_against(argv):
    """Take every --against FLAGS, whose value looks like a flag, out of a line -> the rest, the values."""
    rest, values, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--against":
            values.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return rest, values


def recipe_of(method, given, about, run):
    """The recipe before any switch -> (Recipe, its name, the dataset's name)."""
    if method not in ("", *METHODS):
        raise ValueError(f"unknown method {method!r}; {near(method, METHODS)}")
    module = METHODS.get(method, common)
    table = getattr(module, "TABLES", {}).get(given.get("table"))
    name = (about | given).get("data", table.data if table and "root" in given else "toy")
    if name not in data.DATASETS:
        raise ValueError(f"unknown data {name!r}; {near(name, data.DATASETS)}")
    chosen = about.get("recipe_name", given.get("recipe", name))
    if about:
        return options_of(module.Recipe(), about["recipe"], f"{run}/run.json"), chosen, name
    recipes = getattr(module, "RECIPES", {chosen: common.Recipe()})
    if chosen not in recipes:
        raise ValueError(f"{method} has no recipe {chosen!r}; --recipe takes another's: {', '.join(recipes)}")
    return recipes[chosen], chosen, name


def variants(recipe, changed, against, switches, action):
    """The recipes asked for: all combinations of switches with commas, then one for each --against."""
    many = {k: v.split(",") for k, v in changed.items() if isinstance(v, str) and "," in v and k != "weights"}
    if (many or against) and action not in ("eval", "profile"):
        flags = ", ".join(many) or "--against"
        raise ValueError(f"several values are for eval and profile, not for {action}: {flags}")
    found = []
    for values in itertools.product(*many.values()):
        one = dict(zip(many, values))
        found.append((" ".join(f"{k}={v}" for k, v in one.items()), replace(recipe, **changed | one)))
    for text in against:
        other, words = switches.read(shlex.split(text))
        if words or not other:
            problem = f"unknown argument {words[0]}" if words else "name flags of the recipe, quoted"
            raise ValueError(f"--against {text!r}: {problem}")
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
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or does not fit: {str(error) or repr(error):.300}") from None


def checked(value, **kinds):
    """A dict that has these keys, of these types."""
    for key, kind in kinds.items():
        if not isinstance(value[key], kind):
            raise ValueError(f"{key} is {value[key]!r:.80}")
    return value


def read_json(path, **kinds):
    """A JSON object of ours."""
    with reading(path):
        return checked(json.loads(Path(path).read_text(encoding="utf-8")), **kinds)


def read_run(folder):
    """run.json of a run folder."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder (it has no run.json){runs_here()}")
    about = read_json(path, method=str, data=str, recipe=dict, recipe_name=str, classes=list, flags=dict)
    if about["method"] not in METHODS or about["data"] not in data.DATASETS:
        raise ValueError(f"{path}: unknown method {about['method']!r} or data {about['data']!r}")
    return about


def read_log(folder):
    """The readable lines of a run's log.jsonl: of numbers, and of scores, which are dicts of numbers."""
    path, entries = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError), reading(path):
            entry = checked(json.loads(line), step=int, epoch=int, seconds=float)
            for value in entry.values():
                statistics.fmean(value.values() if isinstance(value, dict) else [value])
            entries.append(entry)
    return entries


def options_of(options, values, source):
    """Options with fields from a file, where nothing is sure and tuples are lists: read as flags."""
    words = []
    with reading(source):
        for name, value in values.items():
            flag = str(name).replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            yes = "" if value else "no-"
            words.append(f"--{yes}{flag}" if isinstance(value, bool) else f"--{flag}={text}")
        found, unknown = Parser(options).read(words)
        if unknown:
            raise ValueError(f"{unknown[0]} is unknown; use the commit that wrote it")
        return replace(options, **found)


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

MEETING = 120  # seconds that a process waits for the others to start


@dataclass
class World:
    """This process among the others."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def sum(self, values):
        """Sum an array over the processes, on the CPU, so that it never waits for the GPU."""
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(values))  # in place
        return values


def start(flags):
    """Device, precision and process group -> World."""
    local, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    use_cuda = flags.device != "cpu" and torch.cuda.is_available()
    if use_cuda and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} has no GPU; start {torch.cuda.device_count()} processes a machine")
    device = torch.device(f"cuda:{local}" if use_cuda else "cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision(flags.matmul_precision)
    if flags.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if size > 1:
        meet("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    return World(device, dist.get_rank() if size > 1 else 0, size)


def meet(backend):
    """Join the other processes; one whose port another program holds would wait for ever in torch's code."""
    problem = f"no meeting at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    problem += "; start all processes, or give another --master-port"
    late = threading.Timer(MEETING, lambda: os._exit(fail(1, problem)))
    late.start()
    try:
        dist.init_process_group(backend)
    except RuntimeError as error:
        raise OSError(f"{problem} ({error})") from None
    finally:
        late.cancel()


def seed_step(seed, step, rank):
    """All randomness of a step is a function of (seed, step, process), so a resumed run needs no state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def autocast(recipe, device):
    """Context of the recipe's mixed precision."""
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = torch.float16 if recipe.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=auto if recipe.amp == "auto" else recipe.amp != "off")


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
    how = dict(num_workers=workers, timeout=55 if workers else 0, worker_init_fn=ignore_signals)
    pinned, generator = world.device.type == "cuda", torch.Generator()
    return torch.utils.data.DataLoader(photos, pin_memory=pinned, generator=generator, **how, **sampling)


def to_model(images, recipe, device):
    """uint8 images (B, 3, H, W) -> what a model reads, on its device."""
    images = common.normalize(images.to(device, non_blocking=True), recipe.normalize)
    return images.contiguous(memory_format=torch.channels_last)


def build(recipe, num_classes, flags, world):
    """The method's model on its device, convolutions in channels_last."""
    model = METHODS[flags.method].build(recipe, num_classes)
    model.to(world.device, memory_format=torch.channels_last)
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
        self.resumed, self.world, self.lead = flags.resume, world, world.rank == 0
        self.refuse_others()

    def refuse_others(self):
        """Never write into another run; a folder that has no checkpoint is begun anew."""
        holds, other = f"{self.folder} holds a run", "--out DIR or --name NAME makes another"
        if self.result.exists():
            raise ValueError(f"{holds}, finished: eval {self.folder} shows it; {other}")
        if self.last.exists() and not self.resumed:
            raise ValueError(f"{holds}: --resume {self.folder} goes on with it; {other}")

    def open(self, about, parts):
        """Take the folder; fill model, optimizer and scaler from last.pt, if any -> the first step."""
        self.about, self.parts, self.sums, step = about, parts, {}, 0
        if self.lead:
            make_folder(self.folder)
            self.lock = open(self.folder / ".lock", "w")  # held until this process ends, however it ends
            try:
                "fcntl" in globals() and fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                problem = f"{self.folder}: another process trains in it; wait, or choose --out DIR"
                raise ValueError(problem) from None
            self.refuse_others()
        log = read_log(self.folder) if self.last.exists() else []
        log = [entry for entry in log if entry["step"] < about["steps"]]  # the last epoch is scored again
        if self.lead:  # without lines that were cut short, or of a run that was killed before a checkpoint
            write_text(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
        if self.last.exists():
            state = read_checkpoint(self.last)
            check_classes(self.last, state["classes"], about["classes"])
            with reading(self.last):
                for name, part in parts.items():
                    part.load_state_dict(state[name])
            step = state["step"]
            if step not in [entry["step"] for entry in log]:
                self.sums = {name: value * self.lead for name, value in state["sums"].items()}
        elif self.lead:
            write_json(self.folder / "run.json", about)
        if self.lead:
            say(f"{about['method']} on {about['data']}: {about['note']}")
            size, of = about["parameters"] / 1e6, f"of {about['recipe']['batch_size']} images"
            say(f"{size:.2f} M parameters, step {step} to {about['steps']} {of}: {self.folder}")
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
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            common.save_checkpoint(self.last, state | {"step": step, "sums": self.sums})

    def close_epoch(self, entry, scores, left):
        """Write and say the epoch's line: the mean terms of its steps, and the scores."""
        if self.lead:
            steps, seconds = self.sums.pop("steps"), self.sums.pop("seconds") / self.world.size
            terms = {name: round(value / steps, 6) for name, value in self.sums.items()}
            images = steps / self.world.size * self.about["recipe"]["batch_size"]
            rate = round(images / seconds, 1)
            entry |= terms | scores | {"seconds": round(seconds, 2), "images_per_second": rate}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry, default=float) + "\n")
            text = [f"epoch {entry['epoch']}", *(f"{name} {value:.4g}" for name, value in terms.items())]
            text += [f"{split} {percentages(some)}" for split, some in scores.items()]
            say("  ".join(text) + f"  {rate:.0f} images/s  {left} left")
        self.sums, self.clock = {}, time.perf_counter()


def read_checkpoint(path):
    """last.pt of a run."""
    state = common.load_checkpoint(path)
    with reading(path):
        if state["method"] not in METHODS:
            raise ValueError(f"unknown method {state['method']!r}")
        return checked(state, classes=list, step=int, recipe=dict, sums=dict)


def check_classes(path, classes, wanted):
    """A checkpoint must know the classes of the data."""
    if classes != wanted:
        other = ", ".join(sorted(map(str, {*classes} ^ {*wanted}))[:3]) or "in another order"
        raise ValueError(f"{path} is of other classes ({other}); use the run's data, or train anew")


def describe(flags, recipe, splits, model, steps, world):
    """What run.json holds."""
    root = flags.root and os.path.abspath(flags.root)
    packages = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
    return {
        "command": flags.command, "method": flags.method, "data": flags.data, "recipe_name": flags.recipe,
        "recipe": dataclasses.asdict(recipe), "seed": flags.seed, "classes": splits.classes,
        **provenance(world), "processes": world.size, "steps": steps, "parameters": count_parameters(model),
        "versions": packages | {"python": sys.version.split()[0]},
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
    words = "git describe --always --dirty=+ --exclude=*".split()
    with contextlib.suppress(OSError):
        git = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
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
    """On the first process's terminal, one line that is kept up to date."""
    if sys.stdout.isatty() and os.environ.get("RANK", "0") == "0":
        print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)


def percentages(scores, digits=1):
    """Scores as a text: all are shares, but for the number of skipped queries."""
    texts = (f"{k} {v}" if k == "skipped" else f"{k} {100 * v:.{digits}f}%" for k, v in scores.items())
    return "  ".join(texts)


def clock(seconds):
    """Seconds as minutes:seconds, from an hour on with hours."""
    minutes, seconds = divmod(int(seconds), 60)
    start = f"{minutes // 60}:{minutes % 60:02d}" if minutes >= 60 else minutes
    return f"{start}:{seconds:02d}"


# ------------------------------------------------------------------------------------------ 7 loop


class StopRequest:
    """Ctrl-C and SIGTERM end training after the current step; at once in an evaluation."""

    def __init__(self, folder):
        self.signal, self.hurry, self.advice = 0, False, f"go on with: python train.py --resume {folder}"

    def __enter__(self):
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number, frame=None):
        if self.hurry or self.signal:
            raise KeyboardInterrupt(128 + number, f"stopped at once; {self.advice}")
        self.signal = number
        os.write(2, b"\nstopping after this step (once more: at once)\n")  # print is not safe here

    @contextlib.contextmanager
    def at_once(self):
        """For work that is done again on resume."""
        self.hurry = True
        if self.signal:
            self.handle(self.signal)
        yield
        self.hurry = False

    def __exit__(self, *error):
        live_line("")
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(flags, recipes, world):
    """Train one recipe to result.json. Raises KeyboardInterrupt when it was asked to stop, and has saved."""
    recipe, run = recipes[0][1], Run(flags, world)
    # 3 data
    splits = load_data(flags, recipe)
    photos = data.Photos(splits.train, recipe, train=True, seed=flags.seed, skip=flags.skip_bad_images)
    watched = "val" if splits.val else "test"

    def scores_of(name):
        return {name: evaluate(model, getattr(splits, name), recipe, flags, world)["scores"]}

    def batches(epoch):
        return data.epoch_batches(splits.train, recipe, flags.seed, epoch, world.rank, world.size)

    per_epoch = len(batches(0))
    steps = recipe.iterations or recipe.epochs * per_epoch
    # 4 model
    torch.manual_seed(flags.seed)
    model = parallel = build(recipe, len(splits.classes), flags, world)
    if world.size > 1:
        parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    # 5 optimizer
    parts = parts_of(recipe, model, flags, world)
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
                    status = 128 + (stop.signal or signal.SIGTERM)
                    raise KeyboardInterrupt(status, f"stopped at step {step}; {stop.advice}")
            run.save(step)  # before the evaluation, which may be long: it can be done again
            scores = {}
            if step == steps or (epoch + 1) % flags.eval_every == 0:
                seed_step(flags.seed, step, world.rank)  # a repeated evaluation draws the same numbers
                with stop.at_once():
                    scores = scores_of(watched)
            entry = {"step": step, "epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
            run.close_epoch(entry, scores, left)
        # 8 report
        with stop.at_once():
            tested = scores_of("test") if splits.val else {}
    if run.lead:
        report(run, tested, watched)
    world.sum(np.zeros(1))  # the others wait until all is written


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
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                advice = "give each process and part two images: --batch-size, --accumulate"  # of BatchNorm
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
    terms, rate = {name: f"{value:.4g}" for name, value in terms.items()}, optimizer.param_groups[0]["lr"]
    where = f"the loss is {loss:.4g} at step {step}, lr {rate:.3g}, terms {terms}, photos {paths}"
    return f"{where}; the last checkpoint is untouched; try a smaller --lr, --grad-clip 1 or --amp off"


def report(run, tested, watched):
    """8: write result.json and say what to type next. tested: scores that are not in the log."""
    log = read_log(run.folder)
    entries = [entry for entry in log if watched in entry]
    scores = tested.get("test", entries[-1][watched])
    metric = next(iter(scores))
    best = max(entries, key=lambda entry: entry[watched][metric])
    best = {"split": watched, "metric": metric, "score": best[watched][metric], "epoch": best["epoch"]}
    result = {"split": "test", **scores, "best_over_epochs": best}
    result |= {"seconds": sum(entry["seconds"] for entry in log)}
    write_json(run.result, result | {name: run.about[name] for name in ("steps", "commit", "seed")})
    say(f"result: test {percentages(scores)} after the last epoch -> {run.result}")
    print(f"next:   python train.py eval {run.folder}\n        python train.py figures {run.folder}")
    if run.about["recipe"]["task"] == "classify":
        print(f"        python train.py predict {run.folder} PHOTO_OR_FOLDER")


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
        arrays = {name: value.float().cpu().numpy() for name, value in answers.items()}
        yield indices.numpy(), arrays | {"shown": shown.numpy()}
        done += len(images)
        left = clock((time.perf_counter() - began) / done * (len(mine) - done))
        live_line(f"{done} of {len(mine)} photos  {left} left")


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
    if world.size > 1:
        for buffer in model.buffers():  # BatchNorm's statistics are each process's own: score what is saved
            dist.broadcast(buffer, 0)

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
        logs = lambda images: {"answer": model(images).float().log_softmax(1)}
        return run_over(model, some, recipe, flags, world, logs)["answer"]

    answers = run_over(model, split, recipe, flags, world, question)
    return data.score(split, answers, recipe, log_probabilities)


def load(run, device="cpu", recipe=None):
    """A run's model, ready to answer -> (model, classes, recipe); `recipe`: with changes for eval alone."""
    path = Path(run) / "last.pt"
    state = read_checkpoint(path)
    module = METHODS[state["method"]]
    recipe = recipe or options_of(module.Recipe(), state["recipe"], path)
    model = module.build(replace(recipe, weights="none"), len(state["classes"]))
    with reading(path):
        model.load_state_dict(state["model"])
    return model.to(device, memory_format=torch.channels_last).eval(), state["classes"], recipe


@torch.no_grad()
def score_run(run, recipe, flags, world, splits):
    """A run on the test images under a recipe -> its scores, where it looks, what it costs."""
    (model, classes, _), untrained = load(run, world.device, recipe), None
    check_classes(Path(run) / "last.pt", classes, splits.classes)
    if splits.test.parts is not None:  # where an untrained network looks is salience, not knowledge
        with torch.random.fork_rng():
            torch.manual_seed(flags.seed)
            untrained = build(replace(recipe, weights="none"), len(classes), flags, world).eval()
    if flags.compile:
        model.compile()
    row = evaluate(model, splits.test, recipe, flags, world, True, untrained)
    image = torch.zeros(1, 3, *recipe.image_size, device=world.device)
    ms = statistics.median(seconds_of(lambda: model(image), world) for _ in range(5)) * 1e3
    return row | costs_of(model, image) | {"ms": ms, "classes": classes}


def evaluate_run(flags, recipes, world):
    """The eval action -> eval.json."""
    rows, held = [], {}
    for label, recipe in recipes:  # variants of the model alone share the photos
        inputs = tuple(getattr(recipe, f.name) for f in dataclasses.fields(common.Recipe))
        held = held if inputs in held else {inputs: load_data(flags, recipe)}
        rows.append({"variant": label} | score_run(flags.run, recipe, flags, world, held[inputs]))
    if world.rank:
        return
    say(f"{flags.method} on {flags.data}, {flags.run}")
    for row in rows:
        variant = f"[{row['variant']}]  " if row["variant"] else ""
        say(f"{variant}{percentages(row['scores'], 2)}  {row['macs']:.3f} GMACs  {row['ms']:.1f} ms/image")
        if len(row["heads"]) > 1:
            say(f"   heads: {percentages(row['heads'], 2)}")
        for text in data.tell(row, row["classes"]):
            say(f"   {text}")
    path = make_folder(flags.out or flags.run) / "eval.json"
    write_json(path, {"command": flags.command, "run": flags.run, **provenance(world), "rows": rows})
    print(f"written: {path}")


# -------------------------------------------------------------------------------------- predict and figures


def predict(flags, recipes, world):
    """The predict action: photo by photo into CSV, JSON, a picture -> status 1 if one was unreadable."""
    recipe = replace(recipes[0][1], boxes=False)  # the whole photo is its object's box
    model, classes, _ = load(flags.run, world.device, recipe)
    if recipe.task != "classify":
        raise ValueError("this run ranks identities and has no classes to predict; see eval and figures")

    def question(images):
        shares, order = model(images).float().softmax(1).sort(descending=True, stable=True)
        boxes, scores = model.where(images)
        return {"classes": order[:, :5], "shares": shares[:, :5], "boxes": boxes, "scores": scores}

    split = data.Split(data.list_photos(flags.words), None, upright=True)
    data.Photos(split, recipe)  # refuses a recipe that photos cannot have before anything is written
    out, bad, separator = make_folder(flags.out or f"{flags.run}/predict"), [], ""
    flags = replace(flags, skip_bad_images=True)
    answers = answers_of(model, split, recipe, flags, World(world.device), question)
    how = dict(mode="w", newline="", encoding="utf-8")
    with open(out / "predictions.csv", **how) as table, open(out / "predictions.json", **how) as file:
        rows = csv.writer(table)
        ranks = range(1, 1 + min(5, len(classes)))
        rows.writerow(["path", *(f"{name} {rank}" for rank in ranks for name in ("class", "probability"))])
        about = {"run": flags.run, "command": flags.command, **provenance(world)}
        file.write(json.dumps(about)[:-1] + ', "photos": [\n')
        for i, top, shares, boxes, scores, shown in (one for n, a in answers for one in zip(n, *a.values())):
            path = str(split.paths[i])
            if np.isnan(shown).any():
                bad.append(path)
                print(f"train.py: {path}: cannot be read as a photo; skipped", file=sys.stderr)
                continue
            top = [(classes[int(c)], round(float(share), 4)) for c, share in zip(top, shares)]
            boxes = data.to_photo(boxes, shown, recipe.image_size)
            entry = {"path": path, "top": top, "boxes": boxes.round(2).tolist(), "scores": scores.tolist()}
            if flags.pictures:
                entry["picture"] = picture_of(path, top, boxes[:6], out)
            rows.writerow([path, *itertools.chain(*top)])
            file.write(separator + json.dumps(entry, ensure_ascii=False))
            separator = ",\n"
            say(f"{i + 1}/{len(split)} {path}: " + ", ".join(f"{name} {share:.1%}" for name, share in top))
        file.write(f'], "unreadable": {json.dumps(bad, ensure_ascii=False)}}}\n')
    print(f"written: {out}/predictions.csv, predictions.json" + ", a picture of each photo" * flags.pictures)
    if bad:
        say(f"{len(bad)} of {len(split)} files could not be read: {', '.join(bad)}")
    return int(bool(bad))


def picture_of(path, top, boxes, out):
    """Draw boxes of a photo above bars of its three best classes -> the picture's file name, which is new."""
    photo = data.open_photo(path, longest=800)
    height, scale = photo.height, max(photo.size) / max(Image.open(path).size)
    photo = common.draw_boxes(photo, boxes * scale, "123456", width=2 + height // 300)
    page = Image.new("RGB", (max(360, photo.width), height + 80), "white")
    page.paste(photo)
    draw, middle = ImageDraw.Draw(page), page.width // 2
    for n, (name, share) in enumerate(top[:3]):
        y, right = height + 6 + 24 * n, middle + share * (middle - 6)
        common.write(draw, (6, y), f"{share:.1%}  {name}", 16, middle - 12, fill="black")
        draw.rectangle((middle, y, right, y + 16), fill=common.COLOURS[n], outline="black")
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
        splits = []
        for run, (_, classes, recipe) in zip(runs, models):
            own = load_data(flags, recipe)
            check_classes(Path(run) / "last.pt", classes, own.classes)
            splits.append(own.test)
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
        label, known = split.labels[i], f"identity {split.labels[i]}"
        if recipe.task == "classify":
            (share, best), known = answer.softmax(0).max(0), classes[label]
            colour = "#1a7f37" if best == label else "#c62828"
            picture = common.headed(picture, f"{classes[best]} {share:.1%}", colour)
        pages.append(common.headed(picture, f"{Path(split.paths[i]).name}   {known}"))
    return pages


def curves(runs):
    """Learning curves of runs: losses, shares, rate."""
    losses, shares, rates = {}, {}, {}
    for run in runs:
        tag = f"{Path(run).name} " if len(runs) > 1 else ""
        for entry in read_log(run):
            for name, value in entry.items():
                chart = losses
                if isinstance(value, dict):  # val, test: the headline
                    (score, value), *_ = value.items()
                    chart, name, value = shares, f"{name} {score}", 100 * value
                elif name.startswith(("top1", "reward")):
                    chart, name, value = shares, f"training {name}", 100 * value
                elif name == "lr":
                    chart = rates
                elif name in ("step", "epoch", "seconds", "images_per_second") or tag and name != "loss":
                    continue
                chart.setdefault(tag + name, []).append((entry["epoch"], value))
    size = (460, 300 + 16 * max(map(len, (losses, shares, rates))))
    charts = ("losses", "nats", losses), ("accuracy", "%", shares), ("learning rate", "", rates)
    plots = [common.plot(title, "epoch", unit, series, size) for title, unit, series in charts]
    return common.stack(plots, across=True)


# ------------------------------------------------------------------------------------------ profile


def peak_memory(work, world):
    """Bytes that `work()` needs at its peak above what is held before; nan where the system cannot tell."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on what is held
    except (OSError, AttributeError, TypeError):
        return math.nan
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


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
    recipe = replace(recipe, weights="none", accumulate=1)
    parts = parts_of(recipe, build(recipe, classes, flags, world), flags, world)
    model, optimizer, _ = parts.values()
    for one in optimizer.param_groups:
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
    first = {}
    for row, kind, _, times in works:
        row[f"{kind} ms/image"] = statistics.median(times) / flags.profile_batch * 1e3
        row[f"{kind} images/s"] = 1e3 / row[f"{kind} ms/image"]
        ratios = (a / b for a, b in zip(times, first.setdefault(kind, times)))
        row[f"{kind} ratio"] = statistics.median(ratios)
    about = {"command": flags.command, "method": flags.method, **provenance(world), "classes": classes}
    about |= {"batch": flags.profile_batch, "rounds": flags.rounds, "torch": torch.__version__}
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    print(text_table(rows))
    if flags.out:
        write_json(make_folder(flags.out) / "profile.json", {**about, "rows": rows})


def text_table(rows):
    """Dicts with the same keys -> a Markdown table with aligned columns; numbers with four digits."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *cells)]
    lines = [list(rows[0]), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


# ------------------------------------------------------------------------------------------ table


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
    run: str  # its folder: that of the first row with the same training


def key_of(name):
    """A row's name in file names and for --rows."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")


def rows_of(method, flags, base):
    """Rows of a table; on other data than its own only the method's switches vary, and not the backbone."""
    table, rows = METHODS[method].TABLES[flags.table], []
    switches = {f.name for f in dataclasses.fields(base) if f.metadata["group"] == "method"} - {"backbone"}
    weights = {key_of(name): path for name, _, path in (pair.rpartition("=") for pair in flags.row_weights)}
    for name, overrides, paper in table.rows:
        key, (training, evaluation, start) = key_of(name), common.split_row(overrides)
        own = replace(METHODS[method].RECIPES[table.data], **training)  # the paper's
        if table.data != flags.data:
            training = {field: value for field, value in training.items() if field in switches}
        if key in weights:
            training = training | {"weights": weights[key]}
        recipe, label = replace(base, **training), name if flags.method else f"{method}: {name}"
        backbone = getattr(recipe, "backbone", None)
        same = backbone == getattr(own, "backbone", None)
        paper = paper if isinstance(paper, tuple) else (paper,)
        if table.data != flags.data or not same:
            paper = (None,)
        trained = (row.run for row in rows if (row.recipe, row.start) == (recipe, start))
        run = next(trained, f"{method}-{key}")
        label += "" if same else f" ({backbone})"
        rows.append(Row(method, key, label, paper, recipe, evaluation, start, run))
    return rows


def table(flags, recipes, world):
    """The table action: rows over seeds, beside the paper -> results.md, a JSON a row."""
    recipe, having = recipes[0][1], [name for name in METHODS if flags.data in METHODS[name].RECIPES]
    names = [flags.method] if flags.method else having
    tables = METHODS[names[0]].TABLES
    if not flags.table:
        print("\n".join(f"  {key:12} {one.title} [{one.data}, {one.metric}]" for key, one in tables.items()))
        return
    if flags.table not in tables:
        raise ValueError(f"no table {flags.table!r} of {names[0]}; it has: {', '.join(tables)}")
    rows, changed = [], {name: getattr(recipe, name) for name in flags.changed}
    for name in names:
        base = recipe if flags.method else replace(METHODS[name].RECIPES[flags.data], **changed)
        rows += rows_of(name, flags, base)
    keys, chosen = [row.key for row in rows], [key_of(name) for name in flags.rows]
    unknown = {*chosen, *(key_of(pair.rpartition("=")[0]) for pair in flags.row_weights)} - {*keys}
    if unknown or not flags.seeds:
        raise ValueError(f"the rows are {', '.join(keys)}, not {', '.join(unknown)}; give one seed at least")
    load_data(flags, rows[0].recipe)  # says what is wrong with --root, once for all rows
    one, whose = tables[flags.table], flags.method or "all methods"
    folder = Path(flags.out or f"runs/table-{flags.method or 'all'}-{flags.table}-{flags.data}")
    about = {"title": f"{whose}, table {flags.table}: {one.title}; on {flags.data}", "command": flags.command}
    about, lines = about | provenance(world) | {"seeds": flags.seeds}, []
    for row in (row for row in rows if not chosen or row.key in chosen):
        results, problem = [], ""
        try:
            results = [finish_row(row, rows, seed, folder, flags, world) for seed in flags.seeds]
        except (ValueError, FileNotFoundError) as error:  # a row that this data cannot have; the others go on
            problem = " ".join(str(error).split())
        lines.append(line_of(row, results, problem, one.metric.split()))
        if world.rank == 0:
            kept = {**dataclasses.asdict(row), "line": lines[-1], "results": results}
            write_json(make_folder(folder) / f"{row.method}-{row.key}.json", about | kept)
    if world.rank == 0:
        empty = ("-", "nan", about["commit"])
        shown = [name for name in lines[0] if any(line[name] not in empty for line in lines)]
        cells = text_table([{name: line[name] for name in shown} for line in lines])
        text = "\n".join([*(f"{name}: {value}" for name, value in about.items()), "", cells, ""])
        write_text(folder / "results.md", text)
        print(text + f"written: {folder}/results.md, a JSON of each row")


def finish_row(row, rows, seed, folder, flags, world):
    """One row and seed, trained unless its run is there -> its result, and how eval saw it."""
    run, recipe, module = folder / f"{row.run}-seed{seed}", row.recipe, METHODS[row.method]
    if row.start:
        start = next(other for other in rows if (other.method, other.key) == (row.method, key_of(row.start)))
        finish_row(start, rows, seed, folder, flags, world)
        recipe = replace(recipe, weights=str(folder / f"{start.run}-seed{seed}"))
    begun = (run / "last.pt").exists()
    if begun and options_of(module.Recipe(), read_run(run)["recipe"], f"{run}/run.json") != recipe:
        raise FileExistsError(f"{run} was trained with other settings; delete it, or choose another --out")
    own = replace(flags, method=row.method, recipe=flags.recipe or flags.data, seed=seed, out=str(run))
    if not (run / "result.json").exists():
        train(replace(own, resume=str(run) * begun), [("", recipe)], world)
    result = read_json(run / "result.json", commit=str, seconds=float)
    with reading(run / "result.json"):
        evaluations = result["evaluations"] = dict(result.get("evaluations", {}))
    key = json.dumps(row.evaluation, sort_keys=True)
    if key not in evaluations:
        seen = replace(recipe, **row.evaluation)
        evaluations[key] = score_run(run, seen, own, world, load_data(own, seen))
        if world.rank == 0:
            write_json(run / "result.json", result)
        world.sum(np.zeros(1))  # the others wait
    with reading(run / "result.json"):
        found = {"seed": seed, "seconds": result["seconds"], "commit": result["commit"], **evaluations[key]}
        numbers_of(found)
    return found


def line_of(row, results, problem, metrics):
    """A row as it is printed: the paper and ours, mean +- sd (n) over the seeds, shares in %."""
    line, numbers = {"row": row.label}, [numbers_of(result) for result in results]
    line["commit"] = ", ".join(sorted({result["commit"] for result in results}))
    for i, metric in enumerate(metrics):
        paper = row.paper[i % len(row.paper)]
        line[f"{metric}, paper"] = "-" if paper is None else f"{paper:g}"
        line[metric] = problem
    for metric in [*metrics, "seconds", "params", "macs", "ms", "pointing", "iou"]:
        values = [one.get(metric, math.nan) for one in numbers]
        if values:
            spread = f" +- {statistics.stdev(values):.2g} ({len(values)})" if values[1:] else ""
            line[metric] = f"{statistics.mean(values):.4g}{spread}"
        line.setdefault(metric, "-")
    return line


def numbers_of(result):
    """What a table can show of an evaluation, shares in %."""
    shares = result["scores"] | result.get("scale", {}) | {"coverage": result.get("coverage")}
    shares["pointing"] = result.get("pointing", {}).get("signature", {}).get("best")
    shares["iou"] = result.get("object_iou", {}).get("mean")
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
        actions = dict(train=train, eval=evaluate_run, predict=predict, figures=figures)
        actions |= dict(profile=profile, table=table)
        return actions[flags.action](flags, recipes, world) or 0
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        return fail(2, error)
    except (FloatingPointError, OSError) as error:
        return fail(1, error)
    except KeyboardInterrupt as stop:
        return fail(*stop.args or (130, "stopped at once"))
    except (RuntimeError, MemoryError) as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            parts = f"--accumulate {2 * recipe.accumulate}, --amp bf16 or a smaller --batch-size"
            return fail(1, f"out of memory at batch {recipe.batch_size}; try {parts}")
        if any(part in str(error) for part in ("DataLoader", "shared memory", "open files")):
            hint = "give fewer --workers, or a larger /dev/shm or ulimit -n"
            return fail(1, f"a process that decodes photos died or went silent; {hint} ({text})")
        lost = dist.is_initialized() and re.search("gloo|[Cc]onnection", text)
        if lost or isinstance(error, dist.DistError):
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
