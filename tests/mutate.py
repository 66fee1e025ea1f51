"""Mutation check: the body of every public function in turn becomes `raise NotImplementedError`, and the file's tests must object.

    python tests/mutate.py tnet dcal          # files; without any: all of them
    python tests/mutate.py tnet:TNet.where    # one function

Prints for each function the first test that fails, or SURVIVED; exit status 1 when one survived. Tests whose names hold an equation, section, table
or figure are asked first, so that one of them answers where it can. Works on a copy; every mutant is a forked process,
so that torch is imported once.
"""
import ast
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401, imported here so that the mutants need not

HOME = Path(__file__).resolve().parent.parent
NAMED = "eq or sec or table or fig"
TESTS = {  # which tests answer for a file
    "common": ["test_common.py", "test_dcal.py", "test_vit_fgvc.py", "test_train.py"], "data": ["test_data.py", "test_datasets.py", "test_train.py"],
    "train": ["test_train.py", "test_dcal.py", "test_m2former.py"],
}


def functions(tree):
    """(name, node) of the module's and its classes' functions whose names do not begin with _ ; forward counts, __init__ does not."""
    for node in tree.body:
        for inner, owner in ((n, f"{node.name}.") for n in node.body) if isinstance(node, ast.ClassDef) else ((node, ""),):
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                yield owner + inner.name, inner


def mutant(source, node):
    """The source with the node's body, but for its docstring's place, replaced."""
    lines, first = source.splitlines(), node.body[0]
    if first.lineno == node.lineno:  # one line: def f(x): return x
        return None
    return "\n".join(lines[: first.lineno - 1] + [" " * first.col_offset + "raise NotImplementedError"] + lines[node.end_lineno :]) + "\n"


class First:
    """Remembers the first failing test."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid.split("::")[-1]

    def pytest_collectreport(self, report):
        if report.failed and not self.name:
            self.name = f"(collecting {report.nodeid})"


def ask(folder, tests, *which):
    """Run tests of a folder in a forked process -> name of the first that fails, "" when none does."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        first = First()
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *which, *(f"tests/{t}" for t in tests)], plugins=[first])
        os.write(write, (first.name or ("(could not run)" if code not in (0, 5) else "")).encode())  # 5: no test of that name
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        name = answer.read()
    os.wait()
    return name


def main(wanted):
    torch.set_num_threads(1)
    survived = 0
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room) / "copy"
        shutil.copytree(HOME, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__"))
        for name in sorted({w.split(":")[0] for w in wanted}) or sorted(p.stem for p in HOME.glob("*.py")):
            source = (HOME / f"{name}.py").read_text()
            for function, node in functions(ast.parse(source)):
                changed = mutant(source, node)
                if changed is None or (wanted and name not in wanted and f"{name}:{function}" not in wanted):
                    continue
                (copy / f"{name}.py").write_text(changed)
                tests = TESTS.get(name, [f"test_{name}.py"])
                by = ask(copy, tests, "-k", NAMED) or ask(copy, tests, "-k", f"not ({NAMED})")
                survived += not by
                print(f"{name}.{function}: {by or 'SURVIVED'}", flush=True)
            (copy / f"{name}.py").write_text(source)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
