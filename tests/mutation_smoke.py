"""Mutation smoke: break objectives and estimators in small ways, one at a time; a test must go red for each.

    python -m tests.mutation_smoke                    every mutant; exit code 1 if one survives
    python -m tests.mutation_smoke --only corruption  files whose path contains the word
    python -m tests.mutation_smoke --sample 10        ten of each file, others with another --seed
    python -m tests.mutation_smoke --list             names the mutants without running them

A mutant is one expression or statement changed in the syntax tree: a sign, an operator, a comparison, a constant, a
term, factor, argument or check left out. Strings, annotations and `raise` statements are left alone. torch and
transformers are imported once; each mutant then runs in a forked child, in which an import hook hands out the changed
module, and the child runs the fast test files, the most specific one first, until a test fails.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "unmask"
ESTIMATORS = ("advantages.py", "corruption.py", "likelihood.py")
OWN_TESTS = {"objectives/target_weights.py": ["test_dmpo.py", "test_dmpo_density.py"]}
"""Tests of a file that has none of its own name."""
SHARED_TESTS = ("test_objectives.py", "test_all_objectives.py")
PRELOADED = ("torch", "numpy", "pytest", "tokenizers", "transformers.models.llama.modeling_llama")
CPU_SECONDS_PER_MUTANT, SECONDS_PER_MUTANT = 120, 1200
"""Limits for one child; a mutant that makes the tests hang counts as killed, as it would be noticed."""
_VERDICTS = (0, 1, 2, -signal.SIGPROF, -signal.SIGALRM)  # green, a test red, a file not importable, the limits
_NO_VERDICT = 70  # exit status of a child that could not run the tests
_PIPE_BYTES = 4096

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "advantages.py",
        'lowest = rewards.new_zeros(len(count)).scatter_reduce(0, member, rewards, "amin", include_self=False)',
        "rewards.new_zeros(len(count)) -> rewards.new_ones(len(count))",
    ): "every group has a member, and include_self=False overwrites what stood there",
    (
        "advantages.py",
        'top = values.new_zeros(len(count)).scatter_reduce(0, member, values, "amax", include_self=False)',
        "values.new_zeros(len(count)) -> values.new_ones(len(count))",
    ): "the same",
    (
        "corruption.py",
        "rank = u.argsort(stable=True).argsort()",
        "u.argsort(stable=True) -> u.argsort()",
    ): "equal uniforms are resolved alike on every device; on the CPU torch sorts stably without being asked",
    (
        "corruption.py",
        "rank = u.argsort(stable=True).argsort()",
        "True -> False",
    ): "the same",
    (
        "likelihood.py",
        "log_weight = weight.masked_fill(~is_read[:, None], 1.0).log()",
        "1.0 -> 2.0",
    ): "any number keeps the logarithm finite where no copy was read; the value is left out below",
    (
        "objectives/d_treerpo.py",
        "def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:",
        "0 -> 1",
    ): "the copies are fixed: there is nothing to draw, and the number is not looked at",
    (
        "objectives/spg.py",
        "bound = torch.where(advantages > 0, lower, bad)",
        "advantages > 0 -> advantages >= 0",
    ): "an advantage of 0 multiplies either bound",
}
"""(file, line, change) -> why no test can tell the mutant from the original."""


# ---- what is changed


NEGATED: dict[type, type] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
BOUNDARY: dict[type, type] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
}  # fmt: skip
_PAIRS = ("mean sum", "min max", "minimum maximum", "any all", "zeros_like ones_like", "new_zeros new_ones")
RENAMED = {a: b for pair in _PAIRS for a, b in (pair.split(), reversed(pair.split()))}
LEFT_OUT = {"exp", "square", "sqrt", "abs", "log", "clamp"}
"""Methods whose call is replaced by the tensor they are called on."""


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Every changed form of one node."""
    kinds = {
        ast.UnaryOp: _unary, ast.BinOp: _binary, ast.Compare: _comparison, ast.BoolOp: _boolean, ast.IfExp: _choice,
        ast.If: _branch, ast.Constant: _constant, ast.Call: _call, ast.AugAssign: _augmented, ast.Expr: _statement,
        ast.Assign: _entry,
    }  # fmt: skip
    if type(node) in kinds:
        yield from kinds[type(node)](node)


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    """A shallow copy with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _unary(node: ast.UnaryOp) -> Iterator[ast.AST]:
    yield node.operand


def _binary(node: ast.BinOp) -> Iterator[ast.AST]:
    """Another operator; a term, a factor, a divisor or an exponent left out."""
    yield _changed(node, op=SWAPPED[type(node.op)]())
    yield node.left
    if isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
        yield node.right
    if isinstance(node.op, ast.Sub):
        yield ast.UnaryOp(ast.USub(), node.right)


def _comparison(node: ast.Compare) -> Iterator[ast.AST]:
    for i, op in enumerate(node.ops):
        for table in (NEGATED, BOUNDARY):
            if type(op) in table:
                yield _changed(node, ops=[*node.ops[:i], table[type(op)](), *node.ops[i + 1 :]])


def _boolean(node: ast.BoolOp) -> Iterator[ast.AST]:
    yield _changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for i in range(len(node.values)):
        rest = [*node.values[:i], *node.values[i + 1 :]]
        yield rest[0] if len(rest) == 1 else _changed(node, values=rest)


def _choice(node: ast.IfExp) -> Iterator[ast.AST]:
    """The two values exchanged; a comparison in the test is negated elsewhere, to the same effect."""
    if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield _changed(node, body=node.orelse, orelse=node.body)


def _branch(node: ast.If) -> Iterator[ast.AST]:
    if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield _changed(node, test=ast.UnaryOp(ast.Not(), node.test))


def _constant(node: ast.Constant) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)


def _call(node: ast.Call) -> Iterator[ast.AST]:
    """Another function, no function, the last two arguments exchanged, or an argument left to its default."""
    if isinstance(node.func, ast.Attribute):
        if node.func.attr in RENAMED:
            yield _changed(node, func=_changed(node.func, attr=RENAMED[node.func.attr]))
        if node.func.attr in LEFT_OUT:
            yield node.func.value
    elif isinstance(node.func, ast.Name) and node.func.id in RENAMED:
        yield _changed(node, func=_changed(node.func, id=RENAMED[node.func.id]))
    if len(node.args) > 1 and not _is_symmetric(node):
        yield _changed(node, args=[*node.args[:-2], node.args[-1], node.args[-2]])
    for i in range(len(node.keywords)):
        yield _changed(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])


def _is_symmetric(node: ast.Call) -> bool:
    """minimum(a, b) and the like, and `require(...)`, whose last arguments are words of the error message."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    return name in ("min", "max", "minimum", "maximum") or name.startswith("require")


def _augmented(node: ast.AugAssign) -> Iterator[ast.AST]:
    yield _changed(node, op=SWAPPED[type(node.op)]())
    yield ast.Pass()


def _statement(node: ast.Expr) -> Iterator[ast.AST]:
    """A call for its effect, such as a check, left out."""
    if isinstance(node.value, ast.Call):
        yield ast.Pass()


def _entry(node: ast.Assign) -> Iterator[ast.AST]:
    """An entry of a table, such as a metric, left out."""
    if isinstance(node.targets[0], ast.Subscript):
        yield ast.Pass()


# ---- where


@dataclass(frozen=True)
class Mutant:
    """One change of one file: form number `form` of place number `place` of its syntax tree; place -1 is no change."""

    file: str  # relative to the package
    text: str  # of the whole file, unchanged
    number: int  # of the line
    change: str
    place: int
    form: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.text.splitlines()[self.number - 1].strip(), self.change

    def source(self) -> str:
        """The changed text."""
        tree = ast.parse(self.text)
        if self.place >= 0:
            parent, field, index = list(_places(tree))[self.place]
            _put(parent, field, index, list(replacements(_at(parent, field, index)))[self.form])
        return ast.unparse(ast.fix_missing_locations(tree))


_NOT_CODE = {"annotation", "returns", "decorator_list", "bases", "ctx"}


def _places(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index in it) of every node that may be changed."""
    for field, value in ast.iter_fields(parent):
        if field in _NOT_CODE:
            continue
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(node, ast.AST) and not isinstance(node, ast.Raise | ast.JoinedStr | ast.Import):
                yield parent, field, i if isinstance(value, list) else None
                yield from _places(node)


def _at(parent: ast.AST, field: str, index: int | None) -> Any:
    value = getattr(parent, field)
    return value if index is None else value[index]


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _shown(node: ast.AST) -> str:
    """Source of an expression; of an `if` its condition alone."""
    return f"if {ast.unparse(node.test)}" if isinstance(node, ast.If) else ast.unparse(node)


def mutants_of(file: str) -> list[Mutant]:
    """All mutants of a file of the package."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    found = []
    for place, (parent, field, index) in enumerate(_places(ast.parse(text))):
        node = _at(parent, field, index)
        before = _shown(node) if isinstance(node, ast.stmt | ast.expr) else ""
        for form, new in enumerate(replacements(node)):
            after = _shown(new)
            if after != before:
                found.append(Mutant(file, text, node.lineno, f"{before} -> {after}", place, form))
    return found


def files() -> list[str]:
    """The estimators, and whatever lies in objectives/."""
    return [*ESTIMATORS, *sorted(f"objectives/{path.name}" for path in (PACKAGE / "objectives").glob("*.py"))]


def relevant_tests(file: str) -> list[str]:
    """Fast test files, those named after the file first."""
    own = sorted(path.name for path in (ROOT / "tests").glob(f"test_{Path(file).stem}*.py")) or OWN_TESTS.get(file, [])
    rest = [name for name in SHARED_TESTS if name not in own]
    if file in ESTIMATORS:
        rest = [*(f"test_{Path(name).stem}.py" for name in ESTIMATORS if name != file), *rest]
    return [str(ROOT / "tests" / name) for name in (*own, *rest)]


# ---- running


class _Loader(importlib.machinery.SourceFileLoader):
    """Hands out a changed source under the name and path of the original."""

    def __init__(self, name: str, path: str, source: str):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant):
        parts = ("unmask", *Path(mutant.file).with_suffix("").parts)
        self.name = ".".join(part for part in parts if part != "__init__")
        self.loader = _Loader(self.name, str(PACKAGE / mutant.file), mutant.source())

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.loader.path, loader=self.loader)


class _Witness:
    """A pytest plugin that puts the tests which killed the most mutants first, and keeps the name of one that fails."""

    def __init__(self, kills: Counter[str]):
        self.kills, self.failed = kills, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: -self.kills[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = report.nodeid


def run_tests(mutant: Mutant, witness: _Witness) -> int:
    """In a child: exit status of the first test file that is not green, else 0."""
    pytest = importlib.import_module("pytest")
    if any(name.split(".")[0] == "unmask" for name in sys.modules):
        raise RuntimeError("unmask was imported before the mutant could take its place")
    sys.meta_path.insert(0, _Finder(mutant))
    options = ["-x", "-q", "--assert=plain", "--tb=no", "-o", "addopts=", "-m", "not slow and not gpu"]
    # unraisableexception collects garbage several times, which costs more than most test files
    options += ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "--rootdir", str(ROOT)]
    for path in relevant_tests(mutant.file):
        status = int(pytest.main([*options, path], plugins=[witness]))
        if status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):  # a file may hold slow tests alone
            return status
    return 0


def start(mutant: Mutant, kills: Counter[str]) -> tuple[int, int]:
    """Fork a child that runs the tests on the mutant: its process id, and a pipe for the name of a failing test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status, witness = _NO_VERDICT, _Witness(kills)
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_PER_MUTANT)
        signal.alarm(SECONDS_PER_MUTANT)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        status = run_tests(mutant, witness)
        os.write(writer, witness.failed.encode()[:_PIPE_BYTES])
    finally:
        os._exit(status)


def run(mutants: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, int, float]]:
    """(mutant, exit status, CPU seconds) in the order of completion; a child stopped by a limit has a negative one."""
    waiting, running, kills = list(reversed(mutants)), {}, Counter[str]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            pid, reader = start(mutant, kills)
            running[pid] = mutant, reader
        pid, status, usage = os.wait4(-1, 0)
        mutant, reader = running.pop(pid)
        kills[os.read(reader, _PIPE_BYTES).decode()] += 1
        os.close(reader)
        yield mutant, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def preload() -> None:
    """Import what is large and not ours, so that a child need not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(PACKAGE.parent))
    for name in PRELOADED:
        importlib.import_module(name)
    plugins = importlib.import_module("_pytest.config").default_plugins
    for name in plugins:
        importlib.import_module(f"_pytest.{name}")
    _ = importlib.import_module("transformers").PreTrainedTokenizerFast  # loaded when first asked for
    gc.freeze()  # children need not look through these objects for garbage


def check_baseline(names: Iterable[str], jobs: int) -> None:
    """Raises: SystemExit unless the tests are green on unchanged files that went through the same machinery."""
    unchanged = [Mutant(name, (PACKAGE / name).read_text(encoding="utf-8"), 0, "", -1, 0) for name in names]
    red = [mutant.file for mutant, status, _ in run(unchanged, jobs) if status]
    if red:
        raise SystemExit(f"tests fail without any mutation, so mutants tell nothing. Files: {', '.join(sorted(red))}")


# ---- the report


def table(rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: the first to the left, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for first, *others in texts:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def judge(mutants: Sequence[Mutant], jobs: int) -> tuple[int, str]:
    """Number of survivors, each printed when found, and the table."""
    rows = {mutant.file: [0] * 5 for mutant in mutants}  # mutants, killed, equivalent, survivors, CPU s
    for mutant in mutants:
        rows[mutant.file][0] += 1
        rows[mutant.file][2] += mutant.key in EQUIVALENT
    for mutant, status, seconds in run([m for m in mutants if m.key not in EQUIVALENT], jobs):
        if status not in _VERDICTS:
            raise SystemExit(f"the child for {mutant.key} ended with {status}, which is no verdict of tests")
        rows[mutant.file][1 if status else 3] += 1
        rows[mutant.file][4] += seconds
        if not status:
            print(f"survivor  {mutant.file}:{mutant.number}: {mutant.key[1]}\n          {mutant.change}", flush=True)
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    head = ("file", "mutants", "killed", "equivalent", "survivors", "CPU s")
    return total[3], table([head, *((name, *map(round, row)) for name, row in [*rows.items(), ("all", total)])])


def sampled(mutants: Sequence[Mutant], number: int | None, seed: str) -> Sequence[Mutant]:
    """So many of them in their order, or all."""
    if number is None or number >= len(mutants):
        return mutants
    return [mutants[i] for i in sorted(random.Random(seed).sample(range(len(mutants)), number))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the smoke and prints its table; 1 if a mutant survived or an entry of EQUIVALENT names none."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation_smoke", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--jobs", type=int, default=2, help="children at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of each file, chosen by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default 0)")
    options = parser.parse_args(arguments)
    names = [name for name in files() if options.only in name]
    found = {name: mutants_of(name) for name in names}
    mutants = [mutant for name in names for mutant in sampled(found[name], options.sample, f"{options.seed} {name}")]
    if options.list:
        print("\n".join(f"{mutant.file}:{mutant.number}: {mutant.change}" for mutant in mutants))
        return 0
    keys = {mutant.key for every in found.values() for mutant in every}
    stale = [key for key in EQUIVALENT if key[0] in names and key not in keys]
    preload()
    started = time.perf_counter()
    check_baseline(dict.fromkeys(mutant.file for mutant in mutants), options.jobs)
    num_survivors, text = judge(mutants, options.jobs)
    print(f"{text}\n{time.perf_counter() - started:.0f} seconds, {options.jobs} mutants at a time")
    for key in stale:
        print(f"EQUIVALENT names no mutant: {key}")
    return 1 if num_survivors or stale else 0


if __name__ == "__main__":
    sys.exit(main())
