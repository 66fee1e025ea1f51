"""Mutation check: one wrong edit at a time, to which the file's tests must object.

    python tests/mutate.py tnet dcal               # each function's body in turn; without files: all of them
    python tests/mutate.py --data tnet             # each value of a recipe or table, and constant
    python tests/mutate.py --data "tnet:TABLES 3"  # those whose names begin so

Constants: the numbers of UPPERCASE names, of common.Recipe, of functions that build or draw. Prints the first
test that fails for each mutant, or SURVIVED; exit status 1 when one survived. Tests whose names say that they
may know are asked first. Works on a copy; a mutant is a forked process, so that torch is imported once.
"""
import ast
import contextlib
import importlib
import io
import os
import re
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401, so that the mutants need not

HOME = Path(__file__).resolve().parent.parent
FIRST = {False: "eq or sec or table or fig", True: "recipe or field or table or row or fig"}  # with --data
TESTS = {  # which tests answer for a file, those of the contract beside
    "common": ["test_common.py", "test_tdsa.py", "test_dcal.py", "test_vit_fgvc.py", "test_train.py"],
    "data": ["test_data.py", "test_datasets.py", "test_train.py"],
    "train": ["test_train.py", "test_dcal.py", "test_m2former.py"],
}
BUILDS_OR_DRAWS = re.compile(r"build|param_groups|.*(figure|page|panel|draw).*|heat|plot|Recipe")


def functions(source):
    """(name, source) with the body of each function, methods too, gone in turn; _private ones keep it."""
    for node in ast.parse(source).body:
        inner = [(n, f"{node.name}.") for n in node.body] if isinstance(node, ast.ClassDef) else [(node, "")]
        for n, owner in inner:
            if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and n.body[0].lineno > n.lineno:
                lines, top = source.splitlines(), n.body[0]
                lines[top.lineno - 1 : n.end_lineno] = [top.col_offset * " " + "raise NotImplementedError"]
                yield owner + n.name, "\n".join(lines) + "\n"


def other(value, rule={}):
    """Another value of the same kind, allowed by a field's metadata."""
    if rule.get("choices"):
        return next((v for v in rule["choices"] if v != value), "refused")
    if isinstance(value, tuple):
        return (other(value[0], rule), *value[1:]) if value else (0.5,)
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return value + "x"
    more = value + 1 if isinstance(value, int) else 1.5 * value or 0.25
    return more if more <= rule.get("most", more) else type(value)(value / 2)


def constants(source):
    """(place, source) with one number or truth value changed."""
    for node in ast.parse(source).body:
        for n in node.body if isinstance(node, ast.ClassDef) and node.name != "Recipe" else [node]:
            name = ast.unparse(n.targets[0]) if isinstance(n, ast.Assign) else getattr(n, "name", "")
            numbers = [c for c in ast.walk(n) if isinstance(getattr(c, "value", None), (int, float))]
            tells = name.isupper() and not re.search(r"(Recipe|replace|Table|by_dataset)\(", ast.unparse(n))
            for c in numbers if tells or BUILDS_OR_DRAWS.fullmatch(name) else ():
                lines = [line.encode() for line in source.splitlines()]
                line, new = lines[c.lineno - 1], repr(other(c.value)).encode()
                lines[c.lineno - 1] = line[: c.col_offset] + new + line[c.end_col_offset :]
                yield f"{name}, line {c.lineno}: {c.value}", b"\n".join(lines).decode() + "\n"


def settings(module):
    """(place, change of the module) for each value of a recipe, and each override and number of a table."""
    rules = {f.name: f.metadata for f in fields(module.Recipe)}
    for data, recipe in module.RECIPES.items():
        for name in rules:
            with contextlib.suppress(ValueError):  # what the recipe's own rules refuse is no mutant
                new = replace(recipe, **{name: other(getattr(recipe, name), rules[name])})
                yield f"RECIPES {data} {name}", lambda m, data=data, new=new: m.RECIPES.update({data: new})
    for key, table in module.TABLES.items():
        for i, (title, overrides, paper) in enumerate(table.rows):
            rows = [(title, overrides, other(paper))]
            for name, value in overrides.items():
                inner = {k: other(v, rules[k]) for k, v in value.items()} if name == "eval" else None
                rows.append((title, overrides | {name: inner or other(value, rules.get(name, {}))}, paper))
            for row in rows:
                new = replace(table, rows=(*table.rows[:i], row, *table.rows[i + 1 :]))
                yield f"TABLES {key} {row}", lambda m, key=key, new=new: m.TABLES.update({key: new})


def mutants(name, source, data):
    """[(place, source, change of the imported module or None)]"""
    found = [(*mutant, None) for mutant in (constants if data else functions)(source)]
    if data and "\nRECIPES" in source:
        sys.path.insert(0, str(HOME))
        found += [(place, source, change) for place, change in settings(importlib.import_module(name))]
        del sys.path[0], sys.modules[name], sys.modules["common"]  # the mutants import the copy's
    return found


def failing(folder, tests, which, name, change):
    """The first test of a folder that fails in a forked process with the module changed; "" if none does."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        code, out, files = "could not run", io.StringIO(), [f"tests/{test}" for test in tests]
        with contextlib.redirect_stdout(out), contextlib.suppress(BaseException):
            change and change(importlib.import_module(name))
            code = pytest.main(["-xq", "-rfE", "-p", "no:cacheprovider", "-k", which, *files])
        test = re.search(r"^(?:FAILED|ERROR) \S*?([^:\s]+)(?= |$)", out.getvalue(), re.M)
        name = "" if code in (0, 5) else test[1] if test else f"({code})"  # 5: none asked
        os.write(write, name.encode())
        os._exit(0)
    os.close(write)
    os.wait()
    return os.read(read, 10**4).decode()


def main(*wanted):
    torch.set_num_threads(1)
    data, survived, wanted = "--data" in wanted, 0, [w for w in wanted if w != "--data"]
    begins = tuple(w if ":" in w else w + ":" for w in wanted) or ""
    sources = {p.stem: p.read_text() for p in sorted(HOME.glob("*.py"))}
    methods = {name for name in sources if "\nRECIPES" in sources[name]}
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room) / "copy"
        shutil.copytree(HOME, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__"))
        for name in [name for name in sources if not wanted or any(w.split(":")[0] == name for w in wanted)]:
            tests = TESTS.get(name, [f"test_{name}.py"]) + ["test_contract.py"]
            others = sorted(methods - {name}) if data and name in methods else ()
            for place, new, change in mutants(name, sources[name], data):
                if f"{name}:{place}".startswith(begins):
                    (copy / f"{name}.py").write_text(new)
                    asked = [" and not ".join((f"{how} ({FIRST[data]})", *others)) for how in ("", "not")]
                    failed = (failing(copy, tests, which, name, change) for which in asked)
                    test = next(filter(None, failed), "SURVIVED")
                    survived += test == "SURVIVED"
                    print(f"{name}.{place}: {test}", flush=True)
            (copy / f"{name}.py").write_text(sources[name])
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
