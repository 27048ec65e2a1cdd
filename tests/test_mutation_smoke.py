"""Broken objectives and estimators are noticed: the mutation smoke makes its mutants as told, and none survives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutation_smoke
from tests.mutation_smoke import files, mutants_of, relevant_tests
from unmask.objectives import ALGORITHMS, SFT

ROOT = Path(__file__).parents[1]


def changes(text, monkeypatch, tmp_path):
    """{change} of all mutants of a file with this text."""
    (tmp_path / "sample.py").write_text(text)
    monkeypatch.setattr(mutation_smoke, "PACKAGE", tmp_path)
    return {mutant.change for mutant in mutants_of("sample.py")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-a", {"-a -> a"}),
        ("a + b", {"a + b -> a - b", "a + b -> a", "a + b -> b"}),
        ("a - b", {"a - b -> a + b", "a - b -> a", "a - b -> -b"}),
        ("a * b", {"a * b -> a / b", "a * b -> a", "a * b -> b"}),
        ("a / b", {"a / b -> a * b", "a / b -> a"}),
        ("a < b", {"a < b -> a >= b", "a < b -> a <= b"}),
        ("a and b", {"a and b -> a or b", "a and b -> a", "a and b -> b"}),
        ("a if b else c", {"a if b else c -> c if b else a"}),
        ("1.5", {"1.5 -> 2.5"}),
        ("True", {"True -> False"}),
        ("a.mean()", {"a.mean() -> a.sum()"}),
        ("torch.minimum(a, b)", {"torch.minimum(a, b) -> torch.maximum(a, b)"}),
        ("a.clamp(b, c)", {"a.clamp(b, c) -> a", "a.clamp(b, c) -> a.clamp(c, b)"}),
        ("f(a, b=c)", {"f(a, b=c) -> f(a)"}),
        ("'words'", set()),
        ("f'{1 + 1}'", set()),
    ],
)
def test_operators_change_what_they_say(line, expected, monkeypatch, tmp_path):
    assert changes(f"x = {line}\n", monkeypatch, tmp_path) == expected


def test_statements_are_left_out_and_messages_left_alone(monkeypatch, tmp_path):
    text = 'def f(a: 1 = b) -> 2:\n    """1 + 1"""\n    check(a)\n    m["x"] = c\n    if a:\n        raise E(1 + 1)\n'
    assert changes(text, monkeypatch, tmp_path) == {"check(a) -> pass", "m['x'] = c -> pass", "if a -> if not a"}


def test_every_objective_is_mutated_and_tested_first_by_its_own_file():
    """A newly registered algorithm needs no line in the script."""
    homes = {cls.__module__.removeprefix("unmask.").replace(".", "/") + ".py" for cls in (*ALGORITHMS.values(), SFT)}
    assert homes | {"advantages.py", "corruption.py", "likelihood.py", "objectives/policy_gradient.py"} <= set(files())
    assert Path(relevant_tests("corruption.py")[0]).name == "test_corruption.py"
    assert {Path(path).name for path in relevant_tests("objectives/espo.py")} >= set(mutation_smoke.SHARED_TESTS)
    for name in files():
        assert all(Path(path).is_file() for path in relevant_tests(name))
        assert name.endswith("__init__.py") or len(mutants_of(name)) >= 8


def test_a_sample_is_some_of_each_file_and_the_same_again():
    every = mutants_of("objectives/sapo.py")
    some = mutation_smoke.sampled(every, 5, "0 sapo")
    assert len(some) == 5 and some == [mutant for mutant in every if mutant in some]
    assert some == mutation_smoke.sampled(every, 5, "0 sapo") != mutation_smoke.sampled(every, 5, "1 sapo")
    assert mutation_smoke.sampled(every, None, "") == mutation_smoke.sampled(every, len(every), "") == every


@pytest.mark.slow
def test_mutation_smoke_has_no_survivor():
    """Every mutant of every file; some minutes on two cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "tests.mutation_smoke"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
