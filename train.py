"""Train, evaluate and look at one method on one dataset:  python train.py [ACTION] --method tnet --data imagenet --root DIR

ACTION (default train):
  train    trains, evaluates, writes the run folder runs/METHOD-DATA
  eval     scores a run: accuracy, per class, confused pairs, and where it looked; text switches take several values (--locations 0,1,2)
  predict  top-5 for photos or a folder of photos, and an annotated picture of each
  figures  the paper's qualitative figure for some test images, and the learning curves of one or several runs
  profile  parameters, MACs, time and memory of inference and of a training step; --against "FLAGS" compares in the same run
  table    reruns a table of the paper row by row over seeds, the paper's number beside ours
  compare  every method and its plain baseline on the same data, in one table

`python train.py --method dcal --data cub --help` lists every switch with the paper's value. On several GPUs or machines: torchrun.
"""
import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

import common
import data
import dcal
import m2former
import tdsa
import tnet
import vit_fgvc

METHODS = {"m2former": m2former, "dcal": dcal, "tnet": tnet, "vit_fgvc": vit_fgvc, "tdsa": tdsa}
ACTIONS = ("train", "eval", "predict", "figures", "profile", "table", "compare")

# ------------------------------------------------------------------------------------------------ 1 parse


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors of one line, so that every mistake of the user ends the same way."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0]
            known = [f for action in self._actions for f in action.option_strings]
            near = difflib.get_close_matches(flag.split("=")[0], known, 1)
            message = f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise ValueError(message)


def parse(argv):
    """Command line -> options with .action, .method (name), .data, .recipe (a Recipe), .run (folders) and the run's flags."""
    argv = list(argv)
    for i in range(len(argv) - 1, 0, -1):
        if argv[i - 1] == "--against":  # its value looks like a flag, which argparse refuses unless it is joined
            argv[i - 1 : i + 1] = [f"--against={argv[i]}"]
    action = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if action not in ACTIONS:
        raise ValueError(f"unknown action {action!r}; allowed: {', '.join(ACTIONS)}")
    head = Parser(add_help=False, allow_abbrev=False)
    what = head.add_argument_group("what")
    what.add_argument("--method", metavar="M", help=f"one of {', '.join(METHODS)}")
    what.add_argument("--data", metavar="D", help=f"one of {', '.join(data.DATASETS)} [toy]")
    what.add_argument("--root", metavar="DIR", help="folder of the dataset")
    what.add_argument("--recipe", metavar="NAME", help="which of the method's recipes [the one named like the data]")
    what.add_argument("--run", metavar="DIR", nargs="+" if action == "figures" else 1, help="run folder to act on; method, data and recipe come from there (figures: one or several)")
    what.add_argument("--resume", metavar="DIR", help="go on with a run that was stopped")
    if action == "table":
        what.add_argument("--table", metavar="N", help="which table of the paper; with --root on its own dataset, else on the toy; without it they are listed")
    first, rest = head.parse_known_args(argv)
    if action in ("eval", "predict", "figures") and not first.run and first.method in METHODS:
        first.run = [f"runs/{first.method}-{first.recipe or first.data or 'toy'}"]
        argv += ["--run", *first.run]
    run = read_run(first.resume or first.run[0]) if first.resume or first.run else None
    if first.resume and action != "train":
        raise ValueError(f"--resume goes on with training; for {action} name the folder with --run")
    if first.run and action in ("train", "table", "compare"):
        raise ValueError(f"--run names a run to look at (eval, predict, figures, profile); to {action} use --resume DIR, or --weights DIR to start from its weights")

    if first.resume and first.recipe:
        raise ValueError("--resume goes on with the run's own recipe; leave --recipe away, or start anew from its weights with --weights DIR")
    method = run["method"] if run else first.method
    asks_help = {"-h", "--help"} & set(rest)
    if method is None and action != "compare" and not asks_help:
        raise ValueError(f"name a method: --method {'|'.join(METHODS)}" + ("" if action == "train" else ", or a run folder: --run DIR"))
    if method is not None and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    if action == "compare" and (first.method or first.recipe):
        raise ValueError("compare runs every method with its own recipe; leave --method and --recipe away, or use table --method M")
    own = METHODS[method].TABLES.get(first.table) if action == "table" and first.root else None  # a table's own dataset
    name = run["data"] if run else first.data or (own.data if own else "toy")
    if run and (first.method not in (None, method) or first.data not in (None, name)):
        raise ValueError(f"the run is {method} on {name}: leave --method and --data away, or act on another run")
    if name not in data.DATASETS:
        raise ValueError(f"unknown data {name!r}; allowed: {', '.join(data.DATASETS)}")

    cli = Parser(prog="train.py", description=__doc__, parents=[head], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = cli.add_argument_group("the run")
    how.add_argument("--download", action="store_true", help="fetch the dataset into --root first (cub, aircraft, flowers, dogs)")
    how.add_argument("--seed", type=int, default=0, metavar="INT", help="of initial weights, order and augmentation [0]")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto: cuda when there is one]")
    how.add_argument("--workers", type=int, default=None, metavar="INT", help="processes that decode photos [0 for toy, else the cores, at most 8]")
    how.add_argument("--out", metavar="DIR", help="output folder [runs/METHOD-DATA, or inside the run]")
    how.add_argument("--name", default="", help="appended to the run folder's name")
    how.add_argument("--matmul-precision", choices=("highest", "high", "medium"), default="highest", help="of fp32 products: torch.set_float32_matmul_precision [highest]")
    how.add_argument("--compile", action="store_true", help="torch.compile the model")
    how.add_argument("--deterministic", action="store_true", help="only deterministic kernels (CUDA; slower)")
    if action in ("train", "table", "compare"):
        how.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="also save a checkpoint every so many steps [0: at the end of epochs]")
        how.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS", help="evaluate every so many epochs, and after the last [1]")
        how.add_argument("--skip-bad-images", action="store_true", help="leave out unreadable photos and list them in run.json, instead of stopping")
    if action in ("table", "compare"):
        how.add_argument("--seeds", default="0", help="comma-separated seeds [0]")
        how.add_argument("--any-commit", action="store_true", help="also use finished rows that another commit produced")
    if action == "predict":
        how.add_argument("photos", nargs="+", help="photos or folders of photos")
    if action == "figures":
        how.add_argument("--images", type=int, default=6, metavar="INT", help="how many test images [6]")
        how.add_argument("--format", choices=("png", "jpg"), default="png", help="of the pictures of test images; jpg is a quarter of the size [png]")
    if action in ("eval", "profile"):
        how.add_argument("--against", action="append", default=[], metavar='"FLAGS"', help="recipe flags of one more variant, compared in the same run; may be repeated")
    if action == "profile":
        how.add_argument("--profile-batch", type=int, default=2, metavar="INT", help="images in a batch [2]")
        how.add_argument("--rounds", type=int, default=5, metavar="INT", help="timed rounds, variants in turn [5]")
        how.add_argument("--threads", type=int, default=0, metavar="INT", help="CPU threads [0: torch's choice]")
        how.add_argument("--classes", type=int, default=0, metavar="INT", help="number of classes [0: the dataset's published one, else 100]")
        how.add_argument("--inference-only", action="store_true", help="leave the training step out")

    recipe = None
    if method:
        module = METHODS[method]
        chosen = first.recipe or (run["recipe_name"] if run else name)
        if chosen not in module.RECIPES:
            hint = "" if first.recipe else "; --recipe NAME trains on this data with another's settings"
            raise ValueError(f"{method} has no recipe {chosen!r}; it has: {', '.join(module.RECIPES)}{hint}")
        recipe = recipe_from(module, run["recipe"]) if run and not first.recipe else module.RECIPES[chosen]
        if not first.resume:
            common.add_options(cli, recipe, sweep=action == "eval")
    if first.resume:
        cli.set_defaults(seed=run["seed"], **run["flags"])
    opts = cli.parse_args(argv)
    fields = {f.name for f in dataclasses.fields(recipe)} if recipe else set()
    given = {k: v for k, v in vars(opts).items() if k in fields}
    opts.action, opts.method, opts.data, opts.given, opts.run_info = action, method, name, given, run
    opts.variants = [(label, recipe) for label, recipe in variants(recipe, given)] if recipe else []
    if len(opts.variants) > 1 and action not in ("eval", "profile"):
        raise ValueError(f"several values with commas ({opts.variants[0][0]}, ...) are for eval and profile; {action} takes one")
    for flags in getattr(opts, "against", []):
        extra = Parser(add_help=False, allow_abbrev=False)
        common.add_options(extra, recipe)
        opts.variants.append((flags.strip(), dataclasses.replace(opts.variants[0][1], **vars(extra.parse_args(shlex.split(flags))))))
    for flag, least in (("seed", 0), ("workers", 0), ("save_every", 0), ("eval_every", 1), ("images", 1), ("profile_batch", 1), ("rounds", 1), ("threads", 0), ("classes", 0)):
        if getattr(opts, flag, None) is not None and getattr(opts, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(opts, flag)} is out of range; allowed: at least {least}")
    opts.recipe_name, opts.recipe = (chosen, opts.variants[0][1]) if recipe else ("", None)
    opts.root = opts.root or (run or {}).get("root")
    opts.command = "python train.py " + shlex.join([a for a in ([action] if action != "train" else []) + argv])
    return opts


def variants(recipe, given):
    """The recipes asked for: text switches with commas (`--locations 0,1,2`) give one each, all combinations -> [(label, recipe)]."""
    many = {k: v.split(",") for k, v in given.items() if isinstance(v, str) and "," in v and k != "weights"}
    fixed = {k: v for k, v in given.items() if k not in many}
    for values in itertools.product(*many.values()):
        label = " ".join(f"{k}={v}" for k, v in zip(many, values))
        yield label, dataclasses.replace(recipe, **fixed, **dict(zip(many, values)))


def recipe_from(module, values):
    """A method's Recipe from the plain dict of run.json (JSON has no tuples)."""
    known = {f.name for f in dataclasses.fields(module.Recipe)}
    if set(values) - known:
        raise ValueError(f"run.json has recipe fields this code does not know: {sorted(set(values) - known)}; use the commit that wrote the run")
    return module.Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_run(folder):
    """run.json of a run folder. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder (it has no run.json); train one first, or see ls runs")
    try:
        run = json.loads(path.read_text())
        [run[key] for key in ("method", "data", "recipe", "recipe_name", "classes", "seed", "flags")]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it is not the JSON that training writes") from None
    return run


# ------------------------------------------------------------------------------------------------ 2 seed and device


@dataclass
class World:
    """This process among the others."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: object = None  # gloo group for small messages, so that they never wait for the GPU

    def sum(self, array):
        """Sum a numpy array over the processes."""
        if self.size == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        dist.all_reduce(tensor, group=self.control)
        return tensor.numpy()

    def any(self, flag):
        """Largest int flag of any process."""
        if self.size == 1:
            return int(flag)
        flag = torch.tensor(int(flag))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return flag.item()

    def gather(self, value):
        """List of every process's value."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


def start(opts):
    """Device, process group, precision and seeds -> World."""
    local, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if opts.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    use_cuda = opts.device != "cpu" and torch.cuda.is_available()
    if use_cuda and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many processes, or use --device cpu")
    device = torch.device(f"cuda:{local}" if use_cuda else "cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision(opts.matmul_precision)
    if opts.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    world = World(device)
    if size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
        world = World(device, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    seed_all(opts.seed + world.rank)
    return world


def seed_all(seed):
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state(device):
    """Random states as tensors and plain values (weights_only can read them)."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [kind, keys.tolist(), *rest], "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state, device):
    """The inverse of rng_state."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def precision(recipe, device):
    """Context manager of the recipe's mixed precision, and the gradient scaler that fp16 needs."""
    amp = recipe.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    context = functools.partial(torch.autocast, device.type, dtype) if dtype else contextlib.nullcontext
    return context, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


# ------------------------------------------------------------------------------------------------ 3 data


class Readable(torch.utils.data.Dataset):
    """Photos whose unreadable members come back as an error message, for `collate` to sort out (a worker's traceback is no answer)."""

    def __init__(self, photos):
        self.photos = photos

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, key):
        try:
            return self.photos[key]
        except (ValueError, OSError) as error:
            return str(error)


def collate(items):
    """Items of data.Photos -> (images uint8 (B, 3, H, W), labels (B,), indices (B,), sizes (B, 2)) and the messages of unreadable ones."""
    good = [item for item in items if not isinstance(item, str)]
    bad = [item for item in items if isinstance(item, str)]
    if not good:
        return None, bad
    images, labels, indices, sizes = zip(*good)
    return (torch.stack(images), torch.tensor(labels), torch.tensor(indices), torch.stack(sizes)), bad


def make_loader(photos, workers, device, **sampling):
    """DataLoader that leaves the global random state alone and whose workers leave stop signals to the main process."""
    return torch.utils.data.DataLoader(
        Readable(photos), num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        generator=torch.Generator(), worker_init_fn=_ignore_signals, **sampling)


def _ignore_signals(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def epoch_batches(split, recipe, epoch, seed, world, start=0):
    """This process's share of the batches of one epoch from batch `start` on: lists of (epoch, index), the same for any number of workers."""
    if recipe.batch_size % world.size:
        raise ValueError(f"--batch-size {recipe.batch_size} does not split over {world.size} processes; choose a multiple of {world.size}")
    if not recipe.instances:
        return data.EpochBatches(len(split), recipe.batch_size, epoch, seed, world.rank, world.size, start)
    P, K = recipe.batch_size // recipe.instances, recipe.instances
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    share = recipe.batch_size // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    return [[(epoch, i) for i in batch[mine]] for batch in data.PKSampler(split.labels, P, K, generator)][start:]


def load_data(opts):
    """The dataset of the options, downloaded first when asked (by the first process of each machine)."""
    if opts.download:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            data.download(opts.data, opts.root)
        if dist.is_initialized():
            dist.barrier()
    return data.load(opts.data, opts.root, opts.recipe)


def workers_of(opts):
    """Number of decoding processes: given, or none for the toy (it lives in memory), else the cores, at most 8."""
    if opts.workers is not None:
        return opts.workers
    return 0 if opts.data == "toy" else min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ------------------------------------------------------------------------------------------------ 4 model, 5 optimizer


def build(opts, recipe, num_classes, device):
    """The method's model on its device, convolutions in channels_last."""
    model = METHODS[opts.method].build(recipe, num_classes).to(device, memory_format=torch.channels_last)
    if opts.compile:
        model.compile()
    return model


def make_optimizer(recipe, groups):
    """The recipe's optimizer over a method's parameter groups; fused where torch has it."""
    common_args = {"params": groups, "lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        # under fp16 not fused: when the first step is skipped, as the loss scaler often does, the fused kernel starts from uninitialised momentum
        return torch.optim.SGD(**common_args, momentum=recipe.momentum, fused=recipe.amp != "fp16")
    adam_args = common_args | {"betas": (recipe.momentum, 0.999), "eps": recipe.eps}
    if recipe.optimizer == "radam":
        return torch.optim.RAdam(**adam_args, decoupled_weight_decay=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](**adam_args, fused=True)


def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model; counters are copied."""
    for e, p in zip(ema.state_dict().values(), model.state_dict().values()):
        e.lerp_(p, 1 - decay) if e.is_floating_point() else e.copy_(p)


# ------------------------------------------------------------------------------------------------ training


class Stopped(Exception):
    """A stop was asked for during the evaluation of an epoch."""


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step (a second Ctrl-C stops at once)\n".encode())  # print is not safe in a handler

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(opts, world):
    """Train one recipe from options to result.json -> the result, or exit status 130 / 143 when stopped."""
    recipe, method, lead = opts.recipe, METHODS[opts.method], world.rank == 0
    seed_all(opts.seed + world.rank)
    folder = Path(opts.resume or opts.out or f"runs/{opts.method}-{opts.recipe_name}{'-' + opts.name if opts.name else ''}")
    if not opts.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds another run; go on with --resume {folder}, choose --out DIR or --name NAME, or delete it")

    splits = load_data(opts)
    test_split, test_name = (splits.val, "val") if splits.val else (splits.test, "test")
    saved = load_last(folder, opts, world, splits.classes) if opts.resume else None
    photos = data.Photos(splits.train, recipe, True, opts.seed)
    test_photos = data.Photos(test_split, recipe, False)
    per_epoch = len(epoch_batches(splits.train, recipe, 0, opts.seed, world))
    steps = recipe.iterations or recipe.epochs * per_epoch

    model = build(opts, recipe, len(splits.classes), world.device)
    optimizer = make_optimizer(recipe, method.param_groups(model, recipe))
    context, scaler = precision(recipe, world.device)
    wrapped = model
    if world.size > 1:
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[world.device.index] if world.device.type == "cuda" else None, find_unused_parameters=True)
    ema = copy.deepcopy(model).requires_grad_(False) if recipe.ema else None  # after the processes were given the same weights

    # -- 6 resume
    step, sums, count, seconds, best, scores, bad_images = 0, {}, 0, 0.0, {}, {}, []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        if ema:
            ema.load_state_dict(saved["ema"])
        step, seconds, best, scores = (saved[k] for k in ("step", "seconds", "best", "scores"))
        sums, count, bad_images = restore_share(saved["processes"], opts.seed + 7919 * step, world)
        if lead:
            keep_log(folder / "log.jsonl", step - bool(sums))  # sums: the epoch's line is still to be written
    elif lead:
        (folder / "log.jsonl").unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", describe(opts, splits, model, steps, world))
    if lead:
        print(f"{opts.method} on {opts.data}: {splits.note}")
        print(f"{count_parameters(model) / 1e6:.2f} M parameters, {steps} steps of {recipe.batch_size} images on {device_name(world)}, seed {opts.seed} -> {folder}" + (f" (from step {step})" if saved else ""))

    def save(rng):
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise FloatingPointError(f"the weights are not finite after step {step}; the last checkpoint is untouched; try a smaller --lr, --grad-clip 1 or --amp off")
        shares = world.gather({"rng": rng, "count": count, "bad_images": bad_images, "sums": {k: v.cpu() for k, v in sums.items()}})
        if lead:
            common.save_checkpoint(folder / "last.pt", {
                "method": opts.method, "data": opts.data, "classes": splits.classes, "step": step, "model": model.state_dict(), "ema": ema.state_dict() if ema else {},
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "seconds": seconds, "best": best, "scores": scores, "processes": shares})

    # -- 7 loop
    stop, batches, saved_step = StopRequest(), None, step if saved is not None else -1
    line, epoch_started = Line(lead), time.perf_counter() - seconds
    try:
        while True:
            if sums and (step % per_epoch == 0 or step == steps):  # the end of an epoch; also right after a resume in the middle of its evaluation
                rng = rng_state(world.device)
                seconds = time.perf_counter() - epoch_started
                entry = epoch_entry(step, per_epoch, sums, count, seconds, common.lr_at(recipe, step - 1, steps, per_epoch), world)
                if step == steps or entry["epoch"] % opts.eval_every == 0:
                    for buffer in (ema or model).buffers() if world.size > 1 else ():
                        dist.broadcast(buffer, 0)  # BatchNorm's statistics are each process's own: score the model that is saved
                    try:
                        entry[test_name] = scores = evaluate(opts, recipe, ema or model, test_photos, world, stop)
                    except Stopped:
                        save(rng)
                        return stopped(stop, folder, step, lead)
                    metric = next(iter(scores))
                    if scores[metric] > best.get("score", -1.0):
                        best = {"metric": metric, "score": scores[metric], "epoch": entry["epoch"]}
                if lead:
                    line.done(epoch_line(entry, math.ceil(steps / per_epoch), sums, test_name))
                    with open(folder / "log.jsonl", "a") as log:
                        log.write(json.dumps(entry) + "\n")
                sums, count, batches = {}, 0, None
                epoch_started = time.perf_counter()
                seconds = 0.0
                save(rng_state(world.device))
                saved_step = step
            if step >= steps:
                break
            reason = world.any(stop.signal)
            if reason:
                stop.signal = reason
                if saved_step != step:
                    seconds = time.perf_counter() - epoch_started
                    save(rng_state(world.device))
                return stopped(stop, folder, step, lead)

            if batches is None:
                epoch = step // per_epoch
                batches = iter(make_loader(photos, workers_of(opts), world.device, batch_sampler=epoch_batches(splits.train, recipe, epoch, opts.seed, world, step % per_epoch)))
            batch, bad = next(batches)
            if bad and not opts.skip_bad_images:
                raise ValueError(f"{bad[0]}; remove the file, or leave such photos out with --skip-bad-images")
            for message in bad:
                if message not in bad_images:
                    bad_images.append(message)
            if batch is None:
                raise ValueError(f"a whole batch is unreadable, first: {bad[0]}")

            for group in optimizer.param_groups:
                group["lr"] = common.lr_at(recipe, step, steps, per_epoch, group)
            loss, terms, size = update(recipe, model, wrapped, optimizer, scaler, context, batch, world, describe_step=lambda: f"step {step}, lr {optimizer.param_groups[0]['lr']:.3g}, photos {[splits.train.paths[i] for i in batch[2][:4]]}")
            if ema:
                update_ema(ema, model, recipe.ema)
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * size
            count, step = count + size, step + 1
            line.update(lambda: f"epoch {(step - 1) // per_epoch + 1}/{math.ceil(steps / per_epoch)}  step {step}/{steps}  " + "  ".join(f"{k} {(v / count).item():.4g}" for k, v in sums.items() if k in ("loss", "top1")) + f"  {count * world.size / (time.perf_counter() - epoch_started):.0f} images/s  {time_left(epoch_started, count, (steps - step) * size)} left in training")
            if opts.save_every and step % opts.save_every == 0 and step % per_epoch and step < steps:
                seconds = time.perf_counter() - epoch_started
                save(rng_state(world.device))
                saved_step = step
    finally:
        line.clear()
        stop.restore()

    # -- 8 report
    if splits.val:  # the validation split was for looking on; the test images are scored once, here
        test_name, scores = "test", evaluate(opts, recipe, ema or model, data.Photos(splits.test, recipe, False), world)
    result = {"split": test_name, **scores, "best_over_epochs": best, "steps": steps, "commit": git_commit(), "seed": opts.seed, "seconds": round(total_seconds(folder / "log.jsonl"), 1) if lead else 0}
    bad_images = sorted({message for part in world.gather(bad_images) for message in part})
    if lead:
        if bad_images:
            write_json(folder / "run.json", read_run(folder) | {"bad_images": bad_images})
            print(f"{len(bad_images)} unreadable photos were left out; they are listed in {folder}/run.json")
        write_json(folder / "result.json", result)
        print(f"result: {test_name} " + "  ".join(percentages(scores)) + f" after the last epoch, {result['seconds']:.0f} s of training -> {folder}/result.json")
        print(f"next:   python train.py eval --run {folder}\n        python train.py figures --run {folder}" + ("" if recipe.task == "reid" else f"\n        python train.py predict --run {folder} PHOTO_OR_FOLDER"))
    return result


def restore_share(shares, seed, world):
    """What differed between the processes that wrote a checkpoint -> this one's sums of the epoch's terms, count of images, unreadable photos; sets the random states."""
    same = len(shares) == world.size
    if same:
        set_rng_state(shares[world.rank]["rng"], world.device)
    else:  # another number of processes: the same run in law, not in bits
        seed_all(seed + world.rank)
    sums, count, bad_images = {}, 0, []
    for r, share in enumerate(shares):
        mine = int(r == world.rank if same else world.rank == 0)  # the sums of processes that are no more go to the first
        count += mine * share["count"]
        bad_images += share["bad_images"] if mine else []
        for name, value in share["sums"].items():
            sums[name] = sums.get(name, 0) + mine * value.to(world.device)
    return sums, count, bad_images


def epoch_entry(step, per_epoch, sums, count, seconds, lr, world):
    """A line of log.jsonl: the epoch's mean terms over the images of all processes; the scores come beside them."""
    images = float(world.sum(np.array([count]))[0])
    means = {k: float(world.sum(v.double().cpu().numpy().reshape(1))[0] / images) for k, v in sums.items()}
    return {"step": step, "epoch": math.ceil(step / per_epoch), "lr": lr, **{k: round(v, 6) for k, v in means.items()}, "seconds": round(seconds, 2), "images_per_second": round(images / max(seconds, 1e-9), 1)}


def percentages(scores, digits=1):
    """Scores as texts: all are shares, but for the number of skipped queries."""
    return [f"{k} {v}" if k == "skipped" else f"{k} {100 * v:.{digits}f}%" for k, v in scores.items()]


def epoch_line(entry, epochs, terms, test_name):
    """The same line for a reader."""
    said = [f"epoch {entry['epoch']}/{epochs}", *(f"{k} {entry[k]:.4g}" for k in terms), *(f"{test_name} {text}" for text in percentages(entry.get(test_name, {})))]
    return "  ".join(said) + f"  {entry['images_per_second']:.0f} images/s"


def update(recipe, model, wrapped, optimizer, scaler, context, batch, world, describe_step):
    """One optimizer step on a batch, in recipe.accumulate parts -> (loss, terms, images)."""
    images, labels = batch[0].to(world.device, non_blocking=True), batch[1].to(world.device, non_blocking=True)
    parts = list(zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate)))
    total, all_terms = 0.0, {}
    wrapped.train()
    for i, (part, targets) in enumerate(parts):
        share = len(part) / len(images)
        quiet = wrapped.no_sync() if wrapped is not model and i < len(parts) - 1 else contextlib.nullcontext()
        with quiet:
            with context():
                loss, terms = wrapped(common.normalize(part, recipe.normalize).contiguous(memory_format=torch.channels_last), targets)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at {describe_step()}, terms {({k: round(v.item(), 4) for k, v in terms.items()})}; the last checkpoint is untouched; try a smaller --lr, --grad-clip 1 or --amp off")
            scaler.scale(loss * share).backward()
        total = total + loss.detach() * share
        for name, value in terms.items():
            all_terms[name] = all_terms.get(name, 0) + value.detach() * share
    scaler.unscale_(optimizer)
    for group in optimizer.param_groups:
        if group["lr"] == 0:  # frozen: no update and no running averages either
            for p in group["params"]:
                p.grad = None
    if recipe.grad_clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], recipe.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, all_terms, len(images)


def stopped(stop, folder, step, lead):
    """Say how to go on after a stop -> the exit status."""
    if lead:
        print(f"stopped at step {step}; go on with: python train.py --resume {folder}")
    return 128 + (stop.signal or signal.SIGTERM)


def load_last(folder, opts, world, classes):
    """The newest sound checkpoint of an unfinished run; None for one that was killed before its first."""
    if (folder / "result.json").exists():
        raise ValueError(f"{folder} is finished; look at it with eval, figures or predict, or train anew with --out DIR")
    try:
        state, path, problem = common.load_newest(folder)
    except FileNotFoundError:
        return None
    world.gather(0)  # every process has read it
    if problem and world.rank == 0:
        print(f"warning: {problem}; going on from {path}", file=sys.stderr)
        os.replace(path, folder / "last.pt")  # else the next save would put the damaged file in its place
    return check_run(state, path, opts, classes)


def check_run(state, path, opts, classes=None):
    """A checkpoint must be of this method and these classes -> the checkpoint."""
    missing = set("method data classes step model ema optimizer scaler seconds best scores processes".split()) - set(state)  # what train.save writes
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: another version of this code wrote it; use the commit in the run's run.json")
    if state["method"] != opts.method:
        raise ValueError(f"{path} is a checkpoint of {state['method']}, not of {opts.method}")
    if classes is not None and state["classes"] != classes:
        here, there = sorted(set(classes) - set(state["classes"]))[:3], sorted(set(state["classes"]) - set(classes))[:3]
        raise ValueError(f"{path} was trained on other classes ({len(state['classes'])}, here {len(classes)}; only there {there}, only here {here}); use the data of the run, or train anew")
    return state


def describe(opts, splits, model, steps, world):
    """What run.json holds."""
    return {
        "command": opts.command, "method": opts.method, "data": opts.data, "root": str(Path(opts.root).resolve()) if opts.root else None, "recipe_name": opts.recipe_name,
        "recipe": dataclasses.asdict(opts.recipe), "seed": opts.seed, "classes": splits.classes, "commit": git_commit(), "device": device_name(world), "processes": world.size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__},
        "counts": {"train": len(splits.train), "test": len(splits.test), "val": len(splits.val) if splits.val else 0}, "parameters": count_parameters(model), "steps": steps,
        "flags": {k: getattr(opts, k) for k in ("eval_every", "save_every", "skip_bad_images", "workers", "matmul_precision", "deterministic", "compile")}}


class Line:
    """On a terminal, one line that is kept up to date; elsewhere only the finished lines."""

    def __init__(self, lead):
        self.live, self.lead, self.shown = lead and sys.stdout.isatty(), lead, 0.0

    def update(self, text):
        if self.live and time.perf_counter() - self.shown > 0.2:
            print("\r\033[K" + text()[: os.get_terminal_size().columns - 1], end="", flush=True)
            self.shown = time.perf_counter()

    def done(self, text):
        self.clear()
        print(text, flush=True)

    def clear(self):
        if self.live:
            print("\r\033[K", end="", flush=True)


def time_left(started, done, left):
    """Minutes and seconds until `left` more images are done at the rate so far."""
    total = int((time.perf_counter() - started) / max(done, 1) * left)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}" if total >= 3600 else f"{total // 60}:{total % 60:02d}"


def keep_log(path, step):
    """Drop what the log says of steps after the checkpoint: they will be done again."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(entry) + "\n" for entry in read_log(path) if entry["step"] <= step))
    os.replace(part, path)


def read_log(path):
    """Lines of a log.jsonl as dicts, up to a half-written one."""
    entries = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            entries.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return entries


def total_seconds(path):
    """Seconds of all epochs in a log."""
    return sum(entry["seconds"] for entry in read_log(path))


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    part = Path(path).with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def count_parameters(model):
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@functools.cache
def git_commit():
    """Short hash of the code's commit, with '+' when tracked files are changed; 'unknown' outside git."""
    git = lambda *args: subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), *args], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short", "HEAD")
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "-uno").stdout.strip() else "") if head.returncode == 0 else "unknown"
    except OSError:
        return "unknown"


def device_name(world):
    """What the run runs on."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    return name if world.size == 1 else f"{world.size} x {name}"


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def run_over(model, photos, recipe, opts, world, ask, stop=None):
    """Call `ask(images, indices) -> dict name -> tensor (b, ...)` on every image exactly once, over all processes -> dict name -> array (n, ...).

    Process r takes the images r, r + size, ...: nothing is padded, so that any number of processes gives the same numbers.
    """
    model.eval()
    n, mine = len(photos), range(world.rank, len(photos), world.size)
    if n < world.size:
        raise ValueError(f"{n} test images for {world.size} processes; start fewer")
    results, context = {}, precision(recipe, world.device)[0]
    for batch, bad in make_loader(photos, workers_of(opts), world.device, batch_size=max(1, recipe.batch_size // world.size), sampler=mine):
        if bad:
            raise ValueError(f"{bad[0]}; every test image must be readable: repair or remove it")
        images, _, indices, sizes = batch
        with context():
            answer = ask(common.normalize(images.to(world.device, non_blocking=True), recipe.normalize).contiguous(memory_format=torch.channels_last), indices)
        for name, value in {**answer, "sizes": sizes}.items():
            value = value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
            results.setdefault(name, np.zeros((n, *value.shape[1:]), value.dtype))[indices.numpy()] = value
        if stop is not None and stop.signal:
            break
    if stop is not None and world.any(stop.signal):
        raise Stopped
    return {name: world.sum(array) for name, array in results.items()}


def evaluate(opts, recipe, model, photos, world, stop=None):
    """Scores of a model on a split, the headline first: top1 and top5, or mAP and rank-1/5/10; all in [0, 1]."""
    if recipe.task == "reid":
        features = run_over(model, photos, recipe, opts, world, lambda images, _: {"features": model(images)}, stop)["features"]
        return reid_scores(opts, features, photos.split)
    top = run_over(model, photos, recipe, opts, world, lambda images, _: {"top": ranked(model(images))}, stop)["top"]
    return top_scores(top, np.array(photos.split.labels))


def ranked(logits):
    """Classes of the five largest logits, best first; equal logits in class order on every device. (B, K) -> (B, min(5, K))."""
    return logits.float().sort(dim=1, descending=True, stable=True).indices[:, :5]


def top_scores(top, labels):
    """Share of images whose label is the best class, and among the best five."""
    hits = top == labels[:, None]
    return {"top1": round(float(hits[:, 0].mean()), 6), "top5": round(float(hits.any(1).mean()), 6)}


def reid_scores(opts, features, split):
    """mAP and CMC of a Re-ID test split (the method knows the protocol), as floats."""
    scores = METHODS[opts.method].reid_evaluate(torch.from_numpy(features), split.labels, split.cameras, split.query)
    return {k: round(float(v), 6) for k, v in scores.items()}


def load_run(opts, world, recipe, state):
    """The run's model with its trained weights, built for a recipe that may differ in what only evaluation uses."""
    model = build(opts, dataclasses.replace(recipe, weights="none"), len(state["classes"]), world.device)
    try:
        model.load_state_dict(state["ema"] or state["model"])
    except RuntimeError as error:
        raise ValueError(f"the run's weights do not fit these switches ({str(error).splitlines()[-1].strip()}); give only switches that leave the parameters alone") from None
    return model.eval()


def open_run(opts):
    """Folder and checkpoint of the run to look at."""
    folder = Path(opts.run[0])
    if not list(folder.glob("last*.pt")):
        raise FileNotFoundError(f"{folder} has no checkpoint yet; let it train, or start it anew")
    state, path, problem = common.load_newest(folder)
    if problem:
        print(f"warning: {problem}; looking at {path}", file=sys.stderr)
    return folder, check_run(state, path, opts)


def evaluate_run(opts, world):
    """The eval action: scores, classes, confusions, where it looked, object scales; one row for each variant -> eval.json."""
    folder, state = open_run(opts)
    splits = load_data(opts)
    check_run(state, folder, opts, splits.classes)
    split, lead = splits.test, world.rank == 0
    rows = [{"variant": label} | scored(opts, world, recipe, state, split) for label, recipe in opts.variants]
    if lead:
        title = f"{opts.method} on {opts.data}, {len(split)} test images, {folder}"
        print(title + "\n" + "-" * len(title))
        for row in rows:
            print((f"[{row['variant']}]  " if row["variant"] else "") + "  ".join(percentages(row["scores"], 2)) + f"  {row['macs'] / 1e9:.3f} GMACs  {row['ms_per_image']:.1f} ms/image")
            if len(row["heads"]) > 1:
                print("   heads: " + "  ".join(f"{k} {100 * v:.2f}%" for k, v in row["heads"].items()))
            for name, text in row.get("said", {}).items():
                print(f"   {name}: {text}")
        if opts.recipe.task != "reid":
            print_classes(rows[0], splits.classes)
        out = Path(opts.out or folder)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "eval.json", {"command": opts.command, "commit": git_commit(), "device": device_name(world), "run": str(folder), "rows": rows})
        print(f"written: {out / 'eval.json'}")


def scored(opts, world, recipe, state, split):
    """A checkpoint on a split under a recipe -> dict: scores, those of its heads, what `looked` finds of a classifier, parameters, MACs and ms an image."""
    model, photos = load_run(opts, world, recipe, state), data.Photos(split, recipe, False)
    if recipe.task == "reid":
        heads = run_over(model, photos, recipe, opts, world, lambda images, _: {"all": model(images), **model.heads(images)})
        row = {"scores": reid_scores(opts, heads["all"], split), "heads": {k: reid_scores(opts, v, split)["mAP"] for k, v in heads.items() if k not in ("all", "sizes")}}
    else:
        row = looked(opts, recipe, model, photos, world)
    sample = torch.zeros(1, 3, *recipe.image_size, device=world.device)
    return row | {"parameters": count_parameters(model), "macs": common.count_macs(model, sample), "ms_per_image": milliseconds(model, sample, world.device)}


def looked(opts, recipe, model, photos, world):
    """Accuracy of a classifier, of its heads, by class and object scale, and where it looked -> dict for eval.json."""

    fresh = untrained(opts, recipe, world) if opts.data == "toy" else None

    def ask(images, _):
        boxes = {"boxes": model.where(images)[0]} | ({"fresh": fresh.where(images)[0]} if fresh else {})
        return {"top": ranked(model(images)), **boxes, **{f"head {k}": v.float().argmax(1) for k, v in model.heads(images).items()}}

    split, (H, W) = photos.split, recipe.image_size
    answer, labels = run_over(model, photos, recipe, opts, world, ask), np.array(photos.split.labels)
    right = answer["top"][:, 0] == labels
    row = {"scores": top_scores(answer["top"], labels), "heads": {k[5:]: float((v == labels).mean()) for k, v in answer.items() if k.startswith("head ")}, "said": {}}
    boxes, said = answer["boxes"], row["said"]
    classes = np.unique(labels)
    row["per_class"] = {int(c): [int(right[labels == c].sum()), int((labels == c).sum())] for c in classes}
    pairs, counts = np.unique(np.stack([labels, answer["top"][:, 0]])[:, ~right], axis=1, return_counts=True)
    row["confused"] = [[int(pairs[0, i]), int(pairs[1, i]), int(counts[i])] for i in np.argsort(-counts, kind="stable")[:10]]

    raster = centres_in(boxes, H, W).any(1)  # (n, 32, 32) cells looked at
    row["coverage"] = float(raster.mean())
    said["coverage"] = f"its boxes cover {100 * row['coverage']:.1f}% of the image"
    if split.parts is not None:
        parts = np.stack([data.to_input(split.parts[i], answer["sizes"][i], recipe, photos.region(i, answer["sizes"][i])) for i in range(len(photos))])  # (n, P, 4), pixels of the input
        signature = np.array(split.signature, bool)
        for kind, chosen in (("signature", signature), ("decoy", ~signature)):
            if chosen.any():
                score = row[f"pointing_{kind}"] = pointing(boxes, parts[:, chosen], H, W)
                text = "best box {best:.1f}%, all boxes {all:.1f}%; chance by area {chance:.1f}%, best constant box {constant:.1f}%".format(**{k: 100 * v for k, v in score.items()})
                if fresh:
                    score |= {f"untrained_{k}": v for k, v in pointing(answer["fresh"], parts[:, chosen], H, W).items() if k in ("best", "all")}
                    text += f", untrained network {100 * score['untrained_best']:.1f}%, all its boxes {100 * score['untrained_all']:.1f}%"
                said[f"{kind} parts"] = text
    if split.boxes is not None:
        objects = np.stack([data.to_input(split.boxes[i][None], answer["sizes"][i], recipe, photos.region(i, answer["sizes"][i]))[0] for i in range(len(photos))])
        row["object_iou"] = object_iou(boxes[:, 0], objects) | ({"untrained": object_iou(answer["fresh"][:, 0], objects)["mean"]} if fresh else {})
        said["object box"] = "mean IoU of the best box {mean:.3f}; best constant box {constant:.3f}".format(**row["object_iou"]) + (f", untrained network {row['object_iou']['untrained']:.3f}" if fresh else "")
        areas = (split.boxes[:, 2] - split.boxes[:, 0]) * (split.boxes[:, 3] - split.boxes[:, 1])
        scale, (low, high) = object_scale(areas)
        row["scale"] = {name: float(right[scale == name].mean()) for name in ("large", "medium", "small") if (scale == name).any()} | {"thresholds": [float(low), float(high)]}
        said["object scale"] = "  ".join(f"{k} {100 * v:.2f}%" for k, v in row["scale"].items() if k != "thresholds") + f"  (box area above {high:.0f} / below {low:.0f} square pixels)"
    if opts.data == "toy":
        row["reliance"] = reliance(recipe, model, photos, world)
        said["reliance"] = "swapping a part changes the decision in " + ", ".join(f"{k} {100 * v[1]:.0f}%" for k, v in row["reliance"].items()) + " of the images"
    return row


def untrained(opts, recipe, world):
    """The toy's network with random weights of the run's seed: where it looks is salience, not knowledge."""
    with torch.random.fork_rng():
        torch.manual_seed(opts.run_info["seed"])
        return build(opts, dataclasses.replace(recipe, weights="none"), data.PRESETS[recipe.toy_preset].classes, world.device).eval()


def centres_in(boxes, H, W, cells=32):
    """Which cells of a cells x cells raster have their centre in which box: (n, b, 4) pixels -> (n, b, cells, cells) bool."""
    x, y = (np.arange(cells) + 0.5) * W / cells, (np.arange(cells) + 0.5) * H / cells
    inside_x = (x >= boxes[..., 0, None]) & (x < boxes[..., 2, None])
    inside_y = (y >= boxes[..., 1, None]) & (y < boxes[..., 3, None])
    return inside_y[..., :, None] & inside_x[..., None, :]


def pointing(boxes, parts, H, W):
    """Share of centres of boxes (n, b, 4) inside one of the parts (n, P, 4; nan: not visible): of the best box, of all, and two references.

    chance is the share of the image that the parts cover; constant is the best single place for all images, chosen in hindsight.
    """
    centres = np.stack([(boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2], -1)[:, :, None]  # (n, b, 1, 2)
    hit = ((centres >= parts[:, None, :, :2]) & (centres < parts[:, None, :, 2:])).all(-1).any(-1)  # (n, b)
    covered = centres_in(parts, H, W).any(1)
    return {"best": float(hit[:, 0].mean()), "all": float(hit.mean()), "chance": float(covered.mean()), "constant": float(covered.mean(0).max())}


def object_iou(found, objects):
    """Mean IoU of found (n, 4) and true boxes, and of the best constant box: the best of the mean true box and 200 of the true ones."""

    def iou(a, b):
        inter = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
        area = lambda box: np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1)
        return inter / np.maximum(area(a) + area(b) - inter, 1e-9)

    constants = np.concatenate([objects.mean(0, keepdims=True), objects[:200]])
    return {"mean": float(iou(found, objects).mean()), "constant": float(iou(constants[:, None], objects[None]).mean(1).max())}


def object_scale(areas):
    """Object scale by quartiles of the box areas (M2Former, Table 8): small below the first, large above the third, else medium -> (names, (Q1, Q3))."""
    low, high = np.quantile(areas, (0.25, 0.75))
    return np.where(areas < low, "small", np.where(areas > high, "large", "medium")), (low, high)


@torch.no_grad()
def reliance(recipe, model, photos, world, images=120):
    """Toy counterfactuals: swap one part of a test bird, every other pixel kept -> {part: (mean |change of log p(label)|, share of changed decisions)}."""
    split, birds = photos.split, []
    for i in range(min(images, len(split))):
        preset, name, index = split.paths[i].split("/")
        size = split.images[i].shape[0]
        bird = data.draw_bird(preset, name, int(index), size)
        birds.append([bird] + [data.draw_bird(preset, name, int(index), size, {part: (bird.values[part] + 1 + i % 3) % 4}) for part in split.part_names])
    context, log_p = precision(recipe, world.device)[0], []
    for versions in birds:
        batch = torch.stack([data.prepare(data.Image.fromarray(b.image), recipe) for b in versions]).to(world.device)
        with context():
            log_p.append(model(common.normalize(batch, recipe.normalize)).float().log_softmax(1).cpu())
    log_p = torch.stack(log_p)  # (n, 1 + P, K)
    labels = torch.tensor(split.labels[: len(birds)])[:, None, None].expand(-1, log_p.shape[1], 1)
    change = (log_p.gather(2, labels) - log_p.gather(2, labels)[:, :1]).abs().squeeze(2)[:, 1:].mean(0)
    flipped = (log_p.argmax(2)[:, 1:] != log_p.argmax(2)[:, :1]).float().mean(0)
    return {part: (round(change[p].item(), 4), round(flipped[p].item(), 4)) for p, part in enumerate(split.part_names)}


def print_classes(row, classes):
    """The weakest classes and the most confused pairs."""
    weak = sorted(row["per_class"].items(), key=lambda item: item[1][0] / item[1][1])[:5]
    print("   weakest classes: " + "; ".join(f"{classes[c]} {right}/{n}" for c, (right, n) in weak))
    print("   most confused (true > predicted): " + "; ".join(f"{classes[a]} > {classes[b]} {n}x" for a, b, n in row["confused"]))


# ------------------------------------------------------------------------------------------------ predict and figures


def list_photos(paths):
    """Files of photos and folders of photos -> sorted list of files."""
    known, found = {e.lower() for e in data.Image.registered_extensions()}, []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such photo or folder")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in known) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: no photos in this folder (extensions known: {', '.join(sorted(known)[:8])}, ...)")
        found += inside
    return found


@torch.no_grad()
def predict(opts, world):
    """The predict action: top-5 of each photo, and a picture of what the model looked at."""
    folder, state = open_run(opts)
    if opts.recipe.task == "reid":
        raise ValueError("a re-identification run ranks identities and has no classes to predict; look at it with eval and figures")
    recipe, classes, out = opts.recipe, state["classes"], Path(opts.out or folder / "predict")
    paths = list_photos(opts.photos)
    photos = [data.prepare(data.open_photo(p), recipe) for p in paths]
    model = load_run(opts, world, recipe, state)
    out.mkdir(parents=True, exist_ok=True)
    context, stems = precision(recipe, world.device)[0], Counter(p.stem for p in paths)
    for i, (path, photo) in enumerate(zip(paths, photos)):
        image = common.normalize(photo[None].to(world.device), recipe.normalize)
        with context():
            p, top = model(image).float().softmax(1)[0].sort(descending=True, stable=True)
            boxes, scores = model.where(image)
        names = [f"{classes[c]} {100 * q:.1f}%" for q, c in zip(p[:5].tolist(), top[:5].tolist())]
        print(f"{path}: " + ", ".join(names))
        plain = common.to_pil(image[0], recipe.normalize)
        zoom = max(1, round(320 / plain.height))
        big = plain.resize((plain.width * zoom, plain.height * zoom), data.Image.Resampling.BICUBIC)
        marked = common.draw_boxes(big, boxes[0].float().cpu() * zoom, [str(b + 1) for b in range(boxes.shape[1])])
        common.panels([big, marked], [path.name, names[0]], height=320).save(out / (f"{path.stem}.png" if stems[path.stem] == 1 else f"{i:04d}-{path.stem}.png"))
    print(f"pictures: {out}/")


@torch.no_grad()
def figures(opts, world):
    """The figures action: the paper's qualitative figure for some test images, learning curves, and accuracy against MACs after a sweep."""
    if len(opts.run or []) > 1:
        out = Path(opts.out or "runs/figures")
        curves(opts.run, out)
        return
    folder, state = open_run(opts)
    recipe, out = opts.recipe, Path(opts.out or folder / "figures")
    splits = load_data(opts)
    photos = data.Photos(splits.test, recipe, False)
    model = load_run(opts, world, recipe, state)
    k = min(opts.images, len(photos))
    chosen = [i * len(photos) // k + i % (len(photos) // k) for i in range(k)]  # spread over the split, and over its classes where these alternate
    batch = torch.stack([photos[i][0] for i in chosen]).to(world.device)
    with precision(recipe, world.device)[0]():
        pictures = model.figure(common.normalize(batch, recipe.normalize))
    out.mkdir(parents=True, exist_ok=True)
    for i, picture in zip(chosen, pictures):
        name = splits.classes[splits.test.labels[i]] if recipe.task != "reid" else f"identity {splits.test.labels[i]}"
        path = out / f"test{i:05d}.{opts.format}"
        picture.save(path, quality=92)  # of a jpg
        print(f"{path}: {name}")
    curves([folder], out)


def plot(title, x_name, y_name, series, size=(460, 320)):
    """A line chart drawn with Pillow: series is {label: [(x, y), ...]} -> PIL image with axes, round ticks and a legend."""
    (W, H), font, small = size, common.ImageFont.load_default(size=14), common.ImageFont.load_default(size=12)
    page = data.Image.new("RGB", size, "white")
    draw = common.ImageDraw.Draw(page)
    series = {k: [(x, y) for x, y in v if math.isfinite(y)] for k, v in series.items()}
    series = {k: v for k, v in series.items() if v}
    draw.text((W / 2, 6), title, fill="black", font=font, anchor="ma")
    if not series:
        draw.text((W / 2, H / 2), "nothing logged yet", fill="gray", font=font, anchor="mm")
        return page
    legend = 16 * len(series) + 6
    left, top, right, bottom = 64, 28, W - 14, H - 44 - legend
    xs, ys = ([p[i] for v in series.values() for p in v] for i in (0, 1))
    x_ticks, y_ticks = ticks(0, max(xs)), ticks(min(ys), max(ys))
    place = lambda x, y: (left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left), bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top))
    for x in x_ticks:
        draw.line((*place(x, y_ticks[0]), *place(x, y_ticks[-1])), fill="#e6e6e6")
        draw.text((place(x, 0)[0], bottom + 4), f"{x:g}", fill="black", font=small, anchor="ma")
    for y in y_ticks:
        draw.line((*place(x_ticks[0], y), *place(x_ticks[-1], y)), fill="#e6e6e6")
        draw.text((left - 5, place(0, y)[1]), f"{y:g}", fill="black", font=small, anchor="rm")
    draw.line((left, top, left, bottom, right, bottom), fill="black")
    draw.text(((left + right) / 2, bottom + 20), x_name, fill="black", font=small, anchor="ma")
    draw.text((6, 10), y_name, fill="black", font=small)
    colours = ("#0057b8", "#d1495b", "#2a9134", "#8f3fae", "#e08a00", "#00868b", "#6b4f3a", "#555555")
    for i, (label, points) in enumerate(series.items()):
        colour = colours[i % len(colours)]
        draw.line([place(*p) for p in points], fill=colour, width=2)
        for p in points if len(points) < 30 else points[-1:]:
            x, y = place(*p)
            draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=colour)
        y = bottom + 40 + 16 * i
        draw.line((left, y + 7, left + 20, y + 7), fill=colour, width=3)
        draw.text((left + 26, y), label, fill="black", font=small)
    return page


def ticks(low, high, about=5):
    """Round numbers that cover [low, high]."""
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    unit = 10 ** math.floor(math.log10(span / about))
    unit *= next(m for m in (1, 2, 5, 10) if m * unit * about >= span * (1 - 1e-9))
    first = math.floor(low / unit + 1e-9)
    return [round(k * unit, 12) for k in range(first, max(first + 1, math.ceil(high / unit - 1e-9)) + 1)]


def curves(runs, out):
    """Learning curves of runs (loss terms, accuracy, learning rate) in one PNG, and accuracy against MACs where eval compared variants."""
    logs = {Path(run).name: read_log(Path(run) / "log.jsonl") for run in runs}
    for run in runs:
        read_run(run)
    one = len(logs) == 1
    other = {"step", "epoch", "lr", "seconds", "images_per_second", "top1", "test", "val"}
    losses, scores, rates = {}, {}, {}
    for run, log in logs.items():
        for entry in log:
            x, tag = entry["epoch"], "" if one else f"{run}: "
            for name in [k for k in entry if k not in other and (one or k == "loss")]:
                losses.setdefault(tag + name, []).append((x, entry[name]))
            if "top1" in entry:
                scores.setdefault(f"{tag}training top1", []).append((x, 100 * entry["top1"]))
            for split in ("val", "test"):
                for name in list(entry.get(split, {}))[:1]:
                    scores.setdefault(f"{tag}{split} {name}", []).append((x, 100 * entry[split][name]))
            rates.setdefault(tag + "learning rate", []).append((x, entry["lr"]))
    most = max(len(losses), len(scores), len(rates))
    size = (460, 300 + 16 * most)
    charts = [plot("loss", "epoch", "nats", losses, size), plot("accuracy", "epoch", "%", scores, size), plot("learning rate", "epoch", "", rates, size)]
    for run in runs:
        path = Path(run) / "eval.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        if len(rows) > 1:
            name = next(iter(rows[0]["scores"]))
            charts.append(plot(f"{name} against cost", "GMACs an image", "%", {Path(run).name: sorted((r["macs"] / 1e9, 100 * r["scores"][name]) for r in rows)}, size))
    page = data.Image.new("RGB", (sum(c.width for c in charts), size[1]), "white")
    for i, chart in enumerate(charts):
        page.paste(chart, (i * size[0], 0))
    out.mkdir(parents=True, exist_ok=True)
    page.save(out / "curves.png")
    print(f"{out / 'curves.png'}: learning curves")


# ------------------------------------------------------------------------------------------------ profile


def peak_memory(work, device):
    """Bytes that `work()` needs at its peak above what is held before; nan where the system cannot tell."""
    import ctypes
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        work()
        return math.nan


def _status(field):
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) * 1024


def profile(opts, world):
    """The profile action: each variant's parameters, MACs, time and peak memory, timed in turn so that ratios hold; the first is 1.00."""
    if opts.threads:
        torch.set_num_threads(opts.threads)
    B, rows = opts.profile_batch, []
    classes = opts.classes or (len(opts.run_info["classes"]) if opts.run_info else 0) or (data.PRESETS[opts.recipe.toy_preset].classes if opts.data == "toy" else data.PUBLISHED.get(opts.data, (100,))[0])
    for label, recipe in opts.variants:
        if recipe.task == "reid" and B % max(1, recipe.instances):
            raise ValueError(f"--profile-batch {B} holds no whole groups of {recipe.instances} images an identity; choose a multiple")
        model = build(opts, dataclasses.replace(recipe, weights="none"), classes, world.device)
        optimizer = make_optimizer(recipe, METHODS[opts.method].param_groups(model, recipe))
        for group in optimizer.param_groups:
            group["lr"] = 1e-12  # real steps, but the weights stay (0 would freeze them)
        context, scaler = precision(recipe, world.device)
        images = torch.randn(B, 3, *recipe.image_size, device=world.device).contiguous(memory_format=torch.channels_last)
        pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8)
        labels = torch.arange(B) // max(1, recipe.instances) % classes

        @torch.no_grad()
        def infer(model=model, images=images, context=context):
            model.eval()
            with context():
                model(images)

        def step(recipe=recipe, model=model, optimizer=optimizer, context=context, scaler=scaler, pixels=pixels, labels=labels):
            update(recipe, model, model, optimizer, scaler, context, (pixels, labels, torch.arange(B)), world, lambda: "profile")

        rows.append({"variant": label or "as given", "parameters": count_parameters(model), "macs": common.count_macs(model.eval(), images[:1]), "infer": infer, "step": step, "times": {"infer": [], "step": []}})
    kinds = ("infer",) if opts.inference_only else ("infer", "step")
    for row in rows:
        for kind in kinds:
            row[kind]()  # warm-up
            row[f"{kind}_bytes"] = peak_memory(row[kind], world.device)
    order = random.Random(opts.seed)
    for _ in range(opts.rounds):
        for row in order.sample(rows, len(rows)):
            for kind in kinds:
                row["times"][kind].append(seconds_of(row[kind], world.device))
    print(f"{opts.method} on {device_name(world)}, batch {B}, {opts.rounds} rounds, input {opts.recipe.image_size}, torch {torch.__version__}")
    table_rows = [["variant", "parameters M", "GMACs"] + [f"{k}" for kind in kinds for k in (f"{kind} ms/image", f"{kind} images/s", "ratio", f"{kind} peak MB", "ratio")]]
    for row in rows:
        cells = [row["variant"], f"{row['parameters'] / 1e6:.3f}", f"{row['macs'] / 1e9:.3f}"]
        for kind in kinds:
            times, first = row["times"][kind], rows[0]["times"][kind]
            row[f"{kind}_ms"] = statistics.median(times) / B * 1e3
            row[f"{kind}_ratio"] = statistics.median(a / b for a, b in zip(times, first))
            cells += [f"{row[f'{kind}_ms']:.2f}", f"{1e3 / row[f'{kind}_ms']:.1f}", f"{row[f'{kind}_ratio']:.2f}", f"{row[f'{kind}_bytes'] / 2**20:.0f}", f"{row[f'{kind}_bytes'] / max(rows[0][f'{kind}_bytes'], 1):.2f}"]
        table_rows.append(cells)
    print(text_table(table_rows))
    if opts.out:
        Path(opts.out).mkdir(parents=True, exist_ok=True)
        keep = [{k: v for k, v in row.items() if k not in ("infer", "step", "times")} for row in rows]
        write_json(Path(opts.out) / "profile.json", {"command": opts.command, "commit": git_commit(), "device": device_name(world), "date": time.strftime("%Y-%m-%d"), "batch": B, "rows": keep})


def seconds_of(work, device):
    """Seconds that `work()` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def milliseconds(model, image, device):
    """Median time of one image over five calls, ms."""
    return round(statistics.median(seconds_of(lambda: model(image), device) for _ in range(5)) * 1e3, 3)


def text_table(rows):
    """Rows of cells -> a Markdown table with aligned columns, the first row as head."""
    widths = [max(len(str(row[c])) for row in rows) for c in range(len(rows[0]))]
    lines = ["| " + " | ".join(str(cell).ljust(w) if c == 0 else str(cell).rjust(w) for c, (cell, w) in enumerate(zip(row, widths))) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# ------------------------------------------------------------------------------------------------ table and compare


def table(opts, world):
    """The table action: train every row over the seeds, then print name, paper, ours mean and sd (n), seconds -> results.md, a JSON a row."""
    tables = METHODS[opts.method].TABLES
    if not opts.table:
        print(f"tables of {opts.method} (choose with --table):\n" + "\n".join(f"  {key:12} {t.title} [{t.data}, {t.metric}, {len(t.rows)} rows]" for key, t in tables.items()))
        return
    if opts.table not in tables:
        raise ValueError(f"{opts.method} has no table {opts.table!r}; it has: {', '.join(tables)}")
    chosen, folder = tables[opts.table], Path(opts.out or f"runs/table-{opts.method}-{opts.table}-{opts.data}")
    return run_rows(opts, world, folder, f"{opts.method}, table {opts.table}: {chosen.title}", chosen.metric, [(opts.method, *row) for row in chosen.rows])


def compare(opts, world):
    """The compare action: every method's `baseline` table on the same data, with pointing, parameters, MACs and ms/image."""
    able = {method: module for method, module in METHODS.items() if opts.data in module.RECIPES}
    if not able or opts.data in ("market1501", "dukemtmc", "msmt17", "veri776"):
        raise ValueError(f"--data {opts.data}: no two methods have recipes for it to compare; try toy, folder or cub")
    rows = [(method, *row) for method, module in able.items() for row in module.TABLES["baseline"].rows]
    return run_rows(opts, world, Path(opts.out or f"runs/compare-{opts.data}"), f"methods and their plain baselines on {opts.data}", "top1", rows)


def run_rows(opts, world, folder, title, metric, rows):
    """Train (method, name, overrides, paper) rows over seeds, each in its folder, and tabulate. What is finished is not run again."""
    if not opts.seeds.replace(",", "").isdigit():
        raise ValueError(f"--seeds {opts.seeds}: give whole numbers with commas, like 0,1,2")
    seeds = [int(s) for s in opts.seeds.split(",") if s]
    if opts.data != "toy" and not Path(opts.root or "nowhere").is_dir():
        data.load(opts.data, opts.root, common.Recipe())  # says what is wrong with --root, once for all rows
    lines, done, homes, lead = [], {}, {}, world.rank == 0
    for method, name, overrides, paper in rows:
        one = copy.copy(opts)
        base = METHODS[method].RECIPES[opts.data] if opts.recipe is None else opts.recipe
        if opts.data == "toy":  # the toy keeps its own input, training settings and small backbone: only the method's switches vary
            own = {f.name for f in dataclasses.fields(base) if f.metadata["group"] == "method"} - {"backbone"}
            overrides = {k: v for k, v in overrides.items() if k in own | {"eval"}}
        overrides, change = common.split_row(overrides)
        one.method, one.recipe, one.recipe_name = method, dataclasses.replace(base, **overrides), opts.recipe_name or opts.data
        key, training = (method, json.dumps([overrides, change], sort_keys=True)), (method, json.dumps(overrides, sort_keys=True))
        if key in done:
            lines.append((method, name, paper, None, f"as row {done[key]} on {opts.data}"))
            continue
        slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
        done[key], results = name, []
        home = homes.setdefault(training, slug)  # the first row with this training names its folders
        for seed in seeds:
            one.seed, one.out, one.resume = seed, str(folder / f"{method}-{home}-seed{seed}"), None
            check_row(one)
            try:
                result = finish_row(one, world, change)
            except ValueError as error:  # a row that this data cannot have is said in the table; the others go on
                results, problem = [], str(error)
                break
            if not isinstance(result, dict):
                return result  # stopped: the exit status
            results.append(result)
        lines.append((method, name, paper, results, "" if results else problem))
        if lead:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{method}-{slug}.json", {
                "table": title, "row": name, "method": method, "overrides": overrides, "eval": change, "data": opts.data, "paper": paper, "metric": metric, "seeds": seeds,
                "results": results, "problem": "" if results else problem, "command": opts.command, "device": device_name(world)})
    if not lead:
        return
    head = ["row", "paper", f"ours (last epoch, {opts.data})", "seconds", "pointing at signature parts", "object box IoU", "M parameters", "GMACs", "ms/image"]
    cells, kept = [head], []
    for method, name, paper, results, remark in lines:
        label = f"{method}: {name}" if opts.action == "compare" else name
        shown = "-" if paper is None else f"{paper:g}"
        if not results:
            cells.append([label, shown, remark] + ["-"] * (len(head) - 3))
            continue
        values = {"ours": [metric_of(r, metric) for r in results], "seconds": [r["seconds"] for r in results], "pointing": [100 * r["looked"].get("pointing_signature", {}).get("best", math.nan) for r in results],
                  "iou": [r["looked"].get("object_iou", {}).get("mean", math.nan) for r in results]}
        cells.append([label, shown, spread(values["ours"], metric), spread(values["seconds"], "s"), spread(values["pointing"]), spread(values["iou"], "iou"),
                      f"{results[0]['parameters'] / 1e6:.2f}", f"{results[0]['macs'] / 1e9:.3f}", f"{results[0]['ms_per_image']:.1f}"])
        kept.append({"row": label, "paper": paper, **{k: [round(x, 4) for x in v] for k, v in values.items() if not math.isnan(v[0])}, "parameters": results[0]["parameters"], "macs": results[0]["macs"], "commits": sorted({r["commit"] for r in results}),
                     "looked": [{k: v for k, v in r["looked"].items() if k not in ("per_class", "confused", "said", "parameters", "macs", "ms_per_image")} for r in results]})
    keep = [c for c in range(len(head)) if any(row[c] not in ("-", "nan") for row in cells[1:]) or c < 3]
    about = {"title": title, "command": opts.command, "commit": git_commit(), "device": device_name(world), "seeds": opts.seeds, "date": time.strftime("%Y-%m-%d")}
    text = "\n".join([title, f"{opts.command}; commit {about['commit']}; {about['device']}; {about['date']}; seeds {opts.seeds}; mean +- sd over seeds, last epoch", "", text_table([[row[c] for c in keep] for row in cells]), ""])
    (folder / "results.md").write_text(text)
    write_json(folder / "results.json", {**about, "metric": metric, "rows": kept})
    print(text + f"written: {folder / 'results.md'}, {folder / 'results.json'}")


def check_row(opts):
    """Refuse a row that was begun with other settings, or finished by another commit."""
    folder = Path(opts.out)
    if (folder / "run.json").exists() and recipe_from(METHODS[opts.method], read_run(folder)["recipe"]) != opts.recipe:
        raise ValueError(f"{folder} was trained with other settings; delete it, or choose another --out")
    if (folder / "result.json").exists():
        commit = json.loads((folder / "result.json").read_text())["commit"]
        if commit != git_commit() and not opts.any_commit:
            raise ValueError(f"{folder} was made by commit {commit}, this is {git_commit()}; delete it to run it again, or use it as it is with --any-commit")


def finish_row(opts, world, change):
    """One row and seed of a table: read its result, go on with it, or train it; evaluate it with `change` of its recipe -> the result with what eval saw, or an exit status."""
    folder, key = Path(opts.out), json.dumps(change, sort_keys=True)
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
    else:
        if (folder / "run.json").exists():
            opts.resume = str(folder)
        result = train(opts, world)
        if not isinstance(result, dict):
            return result
    evaluations = result.setdefault("evaluations", {})
    if key not in evaluations:
        opts.run, opts.run_info = [str(folder)], read_run(folder)
        evaluations[key] = scored(opts, world, dataclasses.replace(opts.recipe, **change), open_run(opts)[1], load_data(opts).test)
        if world.rank == 0:
            write_json(folder / "result.json", result)
    seen = evaluations[key]
    return result | {"looked": seen} | {k: seen[k] for k in ("parameters", "macs", "ms_per_image")} | (seen["scores"] if change else {})


def metric_of(result, metric):
    """A result in the unit of its table: % for top1 and mAP, M for params, G for macs."""
    if metric in ("params", "macs"):
        return result["parameters"] / 1e6 if metric == "params" else result["macs"] / 1e9
    return 100 * result[metric] if metric in result else math.nan


def spread(values, unit=""):
    """mean +- sd (n) of values; nan when there is nothing."""
    if any(math.isnan(v) for v in values):
        return "nan"
    digits = {"s": 0, "iou": 3, "params": 2, "macs": 3}.get(unit, 1)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.{digits}f} ({len(values)})"


# ------------------------------------------------------------------------------------------------ the command line


def main(argv=None):
    """Run the command line -> exit status: 0 done, 1 training failed, 2 the user's mistake, 130 / 143 stopped."""
    try:
        opts = parse(sys.argv[1:] if argv is None else argv)
        world = start(opts)
        if world.rank and opts.action in ("predict", "figures", "profile"):
            return 0  # one process does these
        status = {"train": train, "eval": evaluate_run, "predict": predict, "figures": figures, "profile": profile, "table": table, "compare": compare}[opts.action](opts, world)
        return status if isinstance(status, int) else 0
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return fail(2, error)
    except (FloatingPointError, OSError) as error:
        return fail(1, error)
    except KeyboardInterrupt:
        return fail(130, "stopped at once")
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            r = opts.recipe or common.Recipe()
            return fail(1, f"out of memory at batch {r.batch_size}; compute it in parts with --accumulate {2 * r.accumulate}, use --amp bf16, or a smaller --batch-size")
        if dist.is_initialized():
            return fail(1, f"this process lost the others: {str(error).splitlines()[0]}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(status, error):
    """One line on stderr -> the exit status."""
    print("train.py: " + " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    status = main()
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort an interpreter that is shutting down, after all is done (seen in torch 2.15, with twenty lines of torch alone)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
