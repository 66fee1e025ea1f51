"""Attacks that take too long for the test suite: kills, damaged files, hostile command lines.

    OMP_NUM_THREADS=1 python tests/attack.py kills 1000      # SIGKILL of tiny runs of the five methods
    OMP_NUM_THREADS=1 python tests/attack.py files 100000    # mutated photos, weights, annotations, JSON
    OMP_NUM_THREADS=1 python tests/attack.py lines 1000      # random command lines of all flags

A third argument is the number of the first case: `files 1 4711` repeats case 4711."""
import dataclasses
import io
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import data
import test_datasets as sets
import test_train
import train

METHODS, ENDS = list(train.METHODS), Counter()
TINY = "--toy-preset birds-easy --toy-train 1 --toy-test 1 --batch-size 4 --epochs 2 --save-every 1".split()


def fault(case, text):
    ENDS["FAULT"] += 1
    print(f"FAULT in case {case}: {text}", flush=True)


def ended(work, killed_after=None):
    """Do `work()` in a forked process -> its status, negative for a signal, and what it printed."""
    Path("said").write_text("")
    process = test_train.forked(output="said", patch=lambda: os._exit(work() or 0))
    process.join(killed_after)
    process.kill()
    process.join()
    return process.exitcode, Path("said").read_text(errors="replace")


def attempt(words, folder, number):
    """The command in this process, killed before file operation `number` in a folder."""
    operations, own = itertools.count(1), os.getpid()

    def hook(event, args):
        on_file = event in ("open", "os.rename", "os.mkdir", "os.remove") and folder in str(args[0])
        if on_file and os.getpid() == own and next(operations) == number:
            os.kill(own, signal.SIGKILL)

    sys.addaudithook(hook)
    return train.main(words)


def kills(count, first=0):
    """Kill tiny runs at each file operation in turn, then at random; resumed, they end as undisturbed."""
    begun = [["--method", method, *TINY] for method in METHODS]
    for words in begun:
        ended(lambda: train.main([*words, "--out", words[1]]))
    for case in itertools.count(first):
        if ENDS["killed"] >= count:
            return f"{ENDS['killed']} kills in {case - first} runs"
        rng, folder, status, way = random.Random(f"kills {case}"), f"run{case}", -signal.SIGKILL, "operation"
        words, number = begun[case % len(METHODS)], case // len(METHODS) % 30 + 1  # a run has 30 operations
        while status == -signal.SIGKILL and not Path(folder, "result.json").exists():
            command, moment = [*words, "--out", folder], rng.uniform(0, 2) if way == "moment" else None
            if Path(folder, "last.pt").exists() or Path(folder, "run.json").exists() and rng.random() < 0.5:
                command = ["--resume", folder]
            command += ["--workers", rng.choice("00012")]
            status, said = ended(lambda: attempt(command, folder, number * (way == "operation")), moment)
            status = "killed, not by us" if way == "end" and status == -signal.SIGKILL else status
            ENDS["killed" if status == -signal.SIGKILL else f"{words[1]}, status {status}"] += 1
            way, number = rng.choice(["operation", "moment", "end"]), rng.randint(1, 30)
        differs, where = ended(lambda: test_train.same_run(words[1], folder))
        same = not differs and status in (0, -signal.SIGKILL)
        text = f"{os.getcwd()}: {shlex.join(command)}: {status}, {said[-500:]}, {where[-300:]}"
        shutil.rmtree(folder) if same else fault(case, text)


PIECES = [b"9" * 400, b"", b"\0", b"\xff\xfe", b"[" * 5000, b",", b" ", b"-1", b"nan", b"1e999", b"\r\n"]
PIECES += [b"\xef\xbb\xbf", b"../x", b"\xff" * 8, b"<!ENTITY a '&a;'>", b"%!PS-Adobe-3.0 EPSF-3.0"]
VALUES = "null true 0 -1 1e308 NaN 1e999 %s \"\" \"x\" [] {} [[]] {\"a\":{}} [null]" % ("9" * 400)
TOKEN = re.compile(rb'"[^"]*"|-?\d[\d.e+-]*|\[[^\[\]]*\]|\{[^{}]*\}')
RECIPE = common.Recipe(image_size=(16, 16), resize=(20, 20))
RUN = ["--method", "tdsa", *TINY, "--out", "run"]
TABLE = "table --method tdsa --table toy --rows cross-entropy --out table".split() + TINY
PHOTOS = "a.jpg RGB, b.jpg CMYK, c.png RGBA, d.png P transparency, e.webp RGB, f.tif RGB, g.tif I;16, h.gif P"


def mutated(content, rng):
    """Bytes with one to four small damages; of JSON also a value of another kind; zips with right sums."""
    if content[:2] == b"PK" and rng.random() < 0.5:
        old, new = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
        chosen = rng.choice([name for name in old.namelist() if name.endswith((".pkl", ".npy"))])
        with zipfile.ZipFile(new, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name in old.namelist():
                archive.writestr(name, mutated(old.read(name), rng) if name == chosen else old.read(name))
        return new.getvalue()
    new = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, piece = rng.randrange(len(new) + 1), rng.choice([*PIECES, rng.randbytes(1)])
        if content[:1] in b"{[" and rng.random() < 0.7 and (token := TOKEN.search(new, at)):
            new[slice(*token.span())] = rng.choice(VALUES.split()).encode()
        elif rng.random() < 0.3:
            new[at : at + 1] = bytes([rng.choice(b"0123456789 ,")])
        else:
            new[at : at + rng.choice([0, 1, 4, 40, len(new) * (rng.random() < 0.1)])] = piece
    return bytes(new)


def make_files():
    """Good files in this folder -> [(weight, path, what reads it)]."""
    kinds, exif, bird = [], Image.Exif(), data.draw_bird("birds", "train", 0, 40)["image"]
    exif[0x0112], exif[0x011A] = 6, 72.0
    for name, mode, *more in map(str.split, PHOTOS.split(", ")):
        photo = Image.fromarray(bird).convert("L" if ";" in mode else mode).convert(mode)
        photo.save(name, **dict.fromkeys(more, 1), **{"exif": exif} if name[0] in "acef" else {})
        see = lambda path: data.Photos(data.Split([str(path)], [0], upright=True), RECIPE)[0]
        kinds += [(3, name, data.open_photo), (3, name, see)]
    torch.save({"a.weight": torch.ones(3, 2), "b": torch.arange(9), "c": torch.ones(2).half()}, "w.pt")
    np.savez("y.npz", a=np.ones((3, 2), np.float32), b=np.arange(9))
    ended(lambda: train.main(RUN) or train.main(TABLE))
    kinds += [(9, "w.pt", common.read_state), (9, "y.npz", common.read_state)]
    kinds += [(1, "run/last.pt", lambda path: train.load("run"))]
    kinds.append((2, "run/log.jsonl", lambda path: train.curves(["run"])))
    for words in (["eval", "run"], ["--resume", "run"]):
        kinds.append((5, "run/run.json", lambda path, words=words: train.parse(words)))
    world, finished = train.World(torch.device("cpu")), "table/tdsa-cross-entropy-seed0/result.json"
    kinds.append((2, finished, lambda path: train.table(*train.parse(TABLE), world)))
    for name in ("cub", "cars", "aircraft", "flowers", "dogs", "plant", "fmow", "msmt17"):
        about = name, getattr(sets, name)(Path(name)), dataclasses.replace(RECIPE, boxes=name == "fmow")
        files = [p for p in Path(name).rglob("*") if p.is_file() and p.suffix not in (".jpg", ".png")]
        kinds += [(10 / len(files), path, lambda path, about=about: data.load(*about)) for path in files]
    return [(weight, Path(path), read) for weight, path, read in kinds]


def file_cases(numbers, kinds):
    """Read mutated files in this process; the last line is the count of ends, or the case it died of."""
    ENDS.clear()
    for case in numbers:
        print(case)
        rng, peak = random.Random(f"files {case}"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ((_, path, read),) = rng.choices(kinds, [kind[0] for kind in kinds])
        content, end = path.read_bytes(), "read"
        path.write_bytes(mutated(content, rng))
        signal.alarm(10)
        try:
            read(path)
        except Exception as error:
            end, right = "refused", isinstance(error, (ValueError, OSError))
            if not right or path.name not in str(error) and f"{path.parts[0]} is damaged" not in str(error):
                fault(case, f"{path}: {error!r:.300}")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak > 2 * 2**20:
            fault(case, f"{path} takes more than 2 GB")
        path.write_bytes(content)
        ENDS[f"{path.parts[0]}, {end}"] += 1
    print("\n" + json.dumps(ENDS))


def files(count, first=0):
    """Read mutated files of all kinds, a thousand in a process."""
    kinds = make_files()
    for begin in range(first, first + count, 1000):
        status, said = ended(lambda: file_cases(range(begin, min(begin + 1000, first + count)), kinds))
        print(*(f"{line}\n" for line in said.splitlines() if "FAULT" in line), end="", flush=True)
        if status:
            fault("that is the last number here", f"status {status}: {said[-300:]}")
            kinds = make_files()
        else:
            ENDS.update(json.loads(said.splitlines()[-1]))
    return f"{count} mutated files"


HOSTILE = "inf nan 1e308 1e-320 -1 0 0.0 1 2 0.5 999999999 18446744073709551616 10000 1,2 , none x -- ٣"
HOSTILE += " text.txt photo.jpg folder empty run pipe nowhere /dev/zero 1_000 0x10 true a=b toy cub / {} %s"
HOSTILE = [*HOSTILE.split(), "", " ", "\n"]


def random_line(rng):
    """A command line with up to four random flags, most of them hostile."""
    method, action = rng.choice(METHODS), rng.choice([*train.ACTIONS, "train", "evl", ""])
    words = ["--method", method, *TINY, "--iterations", "1", *["--table", "toy"] * (action == "table")]
    if action in ("eval", "predict", "figures"):
        words = ["run"] + rng.choices([*HOSTILE, "photo.jpg"], k=action == "predict")
    elif rng.random() < 0.1:
        words += ["--data", "folder", "--root", "folder", "--weights", "none"]
    kinds = (train.METHODS[method].Recipe, train.METHODS[method].Recipe, train.Flags)
    flags = [f for kind in kinds for f in dataclasses.fields(kind) if f.name not in ("compile", "download")]
    for f in rng.sample(flags, rng.randint(0, 4)):
        flag, value = common.flag(f), rng.choice([*HOSTILE, *f.metadata["choices"], str(f.default)])
        flag = flag[:-2] + flag[-1] if rng.random() < 0.03 else flag
        words += [flag] if f.type is bool else rng.choice([[flag, value], [f"{flag}={value}"]])
    return [action] * (action != "train") + words + rng.choices(HOSTILE, k=rng.random() < 0.05)


def lines(count, first=0):
    """Run random command lines, each in a copy of a folder with a run, photos and other things."""
    good, copy = Path("good"), Path("copy")
    test_train.photo_folder(good / "folder"), sets.photo(good / "photo.jpg")
    sets.write(good / "text.txt", "hello"), (good / "empty").mkdir()
    ended(lambda: train.main([*RUN[:-1], "good/run"]))
    for case in range(first, first + count):
        words = random_line(random.Random(f"lines {case}"))
        shutil.copytree(good, copy)
        os.mkfifo(copy / "pipe")
        before = {(path, path.lstat().st_mtime_ns) for path in copy.rglob("*")}

        def work():
            os.chdir(copy)
            resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
            return train.main(words)

        status, said = ended(work, 60)
        new = {(path, path.lstat().st_mtime_ns) for path in copy.rglob("*")} ^ before
        errors, line = said.count("train.py: "), shlex.join(words)
        ENDS[f"status {status}"] += 1
        if status not in (0, 1, 2, -signal.SIGKILL) or "Traceback" in said or status > 0 and not errors:
            fault(case, f"status {status}: {line}: {said[-700:]}")
        elif status == 2 and (errors > 1 or new):
            fault(case, f"wrote {new} or more than a line: {line}: {said[-500:]}")
        elif status not in (0, 2) and "could not be read" not in said:  # predict says which photos
            print(f"case {case} {'failed' if status == 1 else 'takes over a minute'}: {line}: {said[-300:]}")
        shutil.rmtree(copy)
    return f"{count} command lines"


if __name__ == "__main__":
    part, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    torch.hub.download_url_to_file = lambda *args: open("no network")
    began, _ = time.time(), os.chdir(tempfile.mkdtemp(prefix="attack-"))
    print({"kills": kills, "files": files, "lines": lines}[part](*map(int, numbers)), end=" ")
    print(f"in {time.time() - began:.0f} s: {dict(sorted(ENDS.items()))}")
    sys.exit(ENDS["FAULT"] > 0)
