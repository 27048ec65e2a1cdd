"""EvalPlus's two formats: programs are compared with a reference on inputs, or with values, and nothing else passes."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path

import pytest

from unmask.errors import DataError
from unmask.rows import cached_rows
from unmask.sandbox import pool
from unmask.sandbox.pool import SandboxUnavailable
from unmask.tasks import TASKS
from unmask.tasks.evalplus import mended, restored

HALVES = {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\ndef halves(xs: List[float]) -> List[float]:\n    """Half of each."""\n',
    "entry_point": "halves",
    "canonical_solution": "    return [x / 2 for x in xs]\n",
    "test": "def check(candidate):\n    pass\n",
    "contract": "",
    "base_input": [[[1, 2]], [[]]],
    "plus_input": [[[3.0, 0.1]], [[float("inf")]]],
    "atol": 0,
}
MEAN = {
    "task_id": "Mbpp/901",
    "prompt": '"""\nThe mean.\nassert mean([1, 2]) == 1.5\n"""\n',
    "entry_point": "mean",
    "canonical_solution": "\ndef mean(xs):\n    total = 0\n    while xs: total += xs.pop() / 3\n    return total\n",
    "assertion": "\nassert mean([3]) == 1\n",
    "contract": "",
    "base_input": [[[1, 2]], [[5]]],
    "plus_input": {},
    "atol": 0.0001,
}
SUM = {
    "task_id": "Mbpp/902",
    "prompt": '"""\nThe sum.\n"""\n',
    "entry_point": "sum",
    "canonical_solution": "\ndef sum(xs):\n    return xs[0] + sum(xs[1:]) if xs else 0\n",
    "contract": "",
    "base_input": [[[1, 2]], [[5]], [[]]],
    "plus_input": [],
    "atol": 0,
}
FLOAT = {
    "task_id": 903,
    "prompt": "A third.",
    "code": "def third(x): return x / 3",
    "source_file": "",
    "test_imports": [],
    "test_list": ["assert third(3) == 1.0"],
    "test": """import numpy as np

def is_floats(x):
    return isinstance(x, float)

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp

for inp, exp in zip([[3], [1]], [1.0, 0.3333333]):
    assertion(third(*inp), exp, 0)
""",
}
YES = "class Yes(float):\n    __eq__ = __le__ = __ge__ = lambda s, o: True\n    __sub__ = __rsub__ = lambda s, o: 0.0\n"


@pytest.fixture(scope="module")
def sandbox():
    task = TASKS["code"](data="x")
    try:
        yield task.runner
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    task.runner.close()


@pytest.fixture
def shares(tmp_path, sandbox):
    """The share of tests that a program passes, by row and source."""

    def judge(row, *sources: str) -> list[float]:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
        task = TASKS["code"](data=str(file), reward="tests", cpu_seconds=5.0)
        task.__dict__["runner"] = sandbox
        (example,) = task.examples("test")
        texts = [f"```python\n{source or example.columns['solution']}\n```" for source in sources]
        return [score.value for score in task.score_all([example] * len(sources), texts)]

    return judge


@pytest.fixture(scope="module")
def differential():
    sys.path.insert(0, str(Path(pool.SUPERVISOR).parent))
    try:
        import differential as found
    finally:
        sys.path.pop(0)
    yield found
    sys.modules.pop("differential", None)


# ---- the native format


def test_each_input_is_a_test_and_the_reference_passes(shares):
    assert shares(HALVES, "") == [1.0] and shares(MEAN, "") == [1.0] and shares(SUM, "") == [1.0]
    one = "def halves(xs): return [0.5, 1.0]"
    assert shares(HALVES, one, "def halves(xs): return None", "def other(): pass") == [0.25, 0.0, 0.0]


def test_floats_are_compared_with_a_tolerance_and_their_number_counts(shares):
    near, far, short, long, empty, tuples = (
        f"def halves(xs): return {value}"
        for value in ("[x / 2 + 5e-7 for x in xs]", "[x / 2 + 5e-6 for x in xs]", "[x / 2 for x in xs[:1]]",
                      "[x / 2 for x in xs] + [0.0]", "[]", "tuple(x / 2 + 5e-7 for x in xs)")
    )  # fmt: skip
    # of the inputs one has two elements, one none, one two, one an infinite one
    assert shares(HALVES, near, far, short, long, empty, tuples) == [1.0, 0.5, 0.5, 0.0, 0.25, 0.0]
    near, far, empty, nested = (f"def mean(xs): return {value}" for value in (
        "sum(xs) / 3 + 5e-5", "sum(xs) / 3 + 5e-4", "[]", "[sum(xs) / 3]",
    ))  # fmt: skip
    assert shares(MEAN, near, far, empty, nested) == [1.0, 0.0, 0.0, 0.0]


def test_objects_that_are_equal_to_everything_pass_nothing(shares):
    assert shares(HALVES, YES + "def halves(xs): return Yes()") == [0.0]
    assert shares(HALVES, YES + "def halves(xs): return [Yes(7) for x in xs]") == [0.25]  # the empty list is right
    assert (
        shares(MEAN, YES + "def mean(xs): return Yes()", YES.replace("(float)", "") + "def mean(xs): return Yes()")
        == [0.0] * 2
    )


def test_the_reference_calls_nothing_of_the_program(shares):
    """It is recursive and named like a function of Python that the comparison might use."""
    assert shares(SUM, "def sum(xs): return 0", "def sum(xs): return 7") == [pytest.approx(1 / 3), 0.0]


def test_the_two_tasks_that_take_more_than_the_reference(shares):
    """Of MBPP+ before its version 0.2.0, which has left them out."""
    zero = MEAN | {"task_id": "Mbpp/295", "entry_point": "sum_div", "atol": 0, "base_input": [[8], [12]]}
    zero["canonical_solution"] = "\ndef sum_div(n):\n    return sum(d for d in range(1, n) if n % d == 0)\n"
    sources = [f"def sum_div(n): return {value}" for value in ("0", "7", "'0'", "n")]
    assert shares(zero, "", *sources, YES + "def sum_div(n): return Yes(3)") == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    some = MEAN | {"task_id": "Mbpp/164", "entry_point": "are_equivalent", "atol": 0, "base_input": [[2, 4]]}
    some["canonical_solution"] = "\ndef are_equivalent(a, b):\n    return a == b\n"
    raising = "def are_equivalent(a, b): raise ValueError"
    assert shares(some, "", "def are_equivalent(a, b): return True", raising, "x = 1") == [1.0, 1.0, 0.0, 0.0]


def test_rows_that_are_none(tmp_path):
    for change in ({"entry_point": "no"}, {"atol": "x"}, {"base_input": None}, {"canonical_solution": "    ("}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(HALVES | change) + "\n")
        with pytest.raises(DataError, match="line 1: is no row of code"):
            TASKS["code"](data=str(tmp_path / "rows.jsonl")).examples("test")


def test_types_that_json_has_lost_are_restored():
    cases = {
        ("Mbpp/2", "[[1, 2], [3]]"): "[(1, 2), (3,)]",
        ("Mbpp/63", "[[[1, 2], [3, 4]]]"): "[[(1, 2), (3, 4)]]",
        ("Mbpp/75", "[[[1, 2]], 6]"): "[[(1, 2)], 6]",
        ("Mbpp/106", "[[5], [9, 10]]"): "[[5], (9, 10)]",
        ("Mbpp/307", "[['a', []], 1, 50]"): "[('a', []), 1, 50]",
        ("Mbpp/259", "[[[1, 3]], [[6, 7]]]"): "[((1, 3),), ((6, 7),)]",
        ("Mbpp/278", "[[1, [2, 3]]]"): "[(1, (2, 3))]",
        ("Mbpp/580", "[[1, [2, [3]]]]"): "[(1, (2, (3,)))]",
        ("Mbpp/115", "[[[1, 1], [], {}]]"): "[[{1}, {}, {}]]",
        ("Mbpp/722", "[{'a': [6.2, 70]}, 6.0, 70]"): "[{'a': (6.2, 70)}, 6.0, 70]",
        ("Mbpp/124", "['0', '1j']"): "[0.0, 1j]",
        ("Mbpp/252", "['(1+2j)']"): "[1 + 2j]",
        ("Mbpp/3", "[[1]]"): "[[1]]",
        ("HumanEval/2", "[[1]]"): "[[1]]",
    }
    for (task_id, given), wanted in cases.items():
        found = restored(task_id, ast.literal_eval(given))
        assert list(found) == ast.literal_eval(wanted), task_id


def different_inputs(data_dir, step: int) -> tuple[int, set[str]]:
    """Of every so manieth task: how many, and those whose inputs are not the original format's."""
    original, native = (
        [row for _, row in cached_rows(str(data_dir / "mbpp" / name), "test", "x")][::step]
        for name in ("MbppPlus-OriginFmt-v0.2.0_002-487.jsonl.gz", "MbppPlus-v0.2.0_002-487.jsonl")
    )
    other = {}
    for row in original:
        (node,) = (n for n in ast.parse(row["test"]).body if isinstance(n, ast.Assign) and n.targets[0].id == "inputs")
        text = ast.unparse(node.value)
        other[f"Mbpp/{row['task_id']}"] = {repr(a) for a in eval(text, {"inf": math.inf, "nan": math.nan})}
    different = set()
    for row in native:
        inputs = [restored(row["task_id"], a) for key in ("base_input", "plus_input") for a in row[key]]
        if {repr(list(a)) for a in inputs} != other[row["task_id"]]:
            different.add(row["task_id"])
    return len(native), different


def test_restored_inputs_are_those_of_the_original_format(data_dir):
    assert different_inputs(data_dir, 20) == (12, set())


@pytest.mark.slow
def test_all_restored_inputs_are_those_of_the_original_format(data_dir):
    # these two have complex numbers with -0, which are printed otherwise
    assert different_inputs(data_dir, 1) == (231, {"Mbpp/124", "Mbpp/252"})


@pytest.mark.parametrize(("file", "step"), [("humaneval/HumanEvalPlus-v0.1.10_000-081.jsonl.gz", 41),
                                            ("mbpp/MbppPlus-v0.2.0_002-487.jsonl", 80)])  # fmt: skip
def test_references_of_the_native_files_pass_and_stubs_fail(data_dir, sandbox, file, step):
    task = TASKS["code"](data=str(data_dir / file), cpu_seconds=5.0)
    task.__dict__["runner"] = sandbox
    examples = task.examples("test")
    chosen = examples[::step]
    scores = task.score_all(chosen, [f"```python\n{e.columns['solution']}\n```" for e in chosen])
    assert [e.columns["task_id"] for e, s in zip(chosen, scores, strict=True) if s.value != 1] == []
    for value in ("None", "[]"):
        stubs = [f"```python\ndef {e.columns['names'][0]}(*a, **k): return {value}\n```" for e in chosen]
        assert [s.value for s in task.score_all(chosen, stubs)] == [0.0] * len(chosen)


# ---- the original format


def test_an_empty_list_is_no_float_in_the_original_format(shares):
    assert "np.allclose(out" in FLOAT["test"] and "np.allclose(out" not in mended(FLOAT["test"], "Mbpp/903")
    sources = [f"def third(x): return {value}" for value in ("x / 3 + 1e-7", "[]", "[x / 3]", "x / 3 + 1e-3", "None")]
    assert shares(FLOAT, "", *sources) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert shares(FLOAT, YES + "def third(x): return Yes()") == [0.0]


# ---- comparing


def test_closeness(differential):
    close = differential.is_close
    assert close(1.0, 1.0 + 1e-7, 1e-6) and close(1, 1.0, 0.1) and close([1.0, [2]], [1.05, [2.05]], 0.1)
    assert close(math.nan, math.nan, 0.1) and close(math.inf, math.inf, 0.1) and close(1 + 1j, 1 + 1.05j, 0.1)
    assert close((1.0, [0.2]), [1.0, (0.2,)], 1e-6)  # numpy's allclose sees no difference between the two
    assert close(1e9 + 50, 1e9, 1e-6) and not close(1e9 + 200, 1e9, 1e-6)  # relative
    shapes = [([], 1.0), ([1.0], 1.0), (1.0, [1.0]), ([], [1.0]), ([1.0], []), ([1.0, 9], [1.0, 2])]
    kinds = [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.inf), ("1", 1.0), (None, 0.0), ({}, 0.0)]
    for found, expected in shapes + kinds:
        assert not close(found, expected, 0.1), (found, expected)


def test_the_reference_sees_the_inputs_as_they_were(differential):
    """Where edits of arguments come back, a program that empties its input must not empty the reference's."""
    total = "def f(xs):\n    return sum(x * x for x in xs)\n"
    checked = differential.Reference(total, "f", [[[1, 2, 3]], [[4]]], 0)

    def empties(xs):
        xs.clear()
        return 0

    with pytest.raises(AssertionError, match="input 0: another value"):
        checked.check(empties, 0)
    checked.check(lambda xs: sum(x * x for x in xs) + len(xs[:0]), 0)
    assert checked.inputs == [[[1, 2, 3]], [[4]]]


def test_what_differs_from_the_reference_has_its_type(differential):
    agrees = differential.agrees
    assert agrees(1.0 + 1e-9, 1.0, 0) and agrees([1.0, 2.0 + 1e-9], [1.0, 2.0], 0) and agrees(3, 3.0, 0)
    assert agrees([(0.1, 0.2)], [[0.1, 0.2]], 1e-6)
    for found, expected in [(3, 3.0000000001), (True, 1.0000001), (1.0000001 + 1e-8j, 1.0), ((1.0 + 1e-9,), [1.0])]:
        assert not agrees(found, expected, 1e-6), (found, expected)


def test_answers_that_are_not_unique(differential):
    special = {name: lambda *a, f=f: f(*a) for name, f in differential.SPECIAL.items()}
    assert special["similar_elements"]((2, 1), (1, 2), [], 0) and not special["Diff"]([], [1], [], 0)
    assert special["check_str"](object(), object(), [], 0) and special["check_str"](True, object(), [], 0)
    assert not special["check_str"](None, object(), [], 0) and not special["check_str"](False, object(), [], 0)
    assert special["are_equivalent"](None, True, [2, 4], 0)  # whatever is returned
    assert special["sum_div"](7, 7, [8], 0) and special["sum_div"](0, 7, [8], 0)
    assert not special["sum_div"](1, 7, [8], 0) and not special["sum_div"](None, 7, [8], 0)
    root = special["find_zero"]  # 2 - 3x + x² has the roots 1 and 2
    assert root(1.0, 2.0, [[2, -3, 1]], 1e-4) and root(2.00001, 1.0, [[2, -3, 1]], 1e-4)
    for wrong in (1.5, math.nan, [], None, True, "1"):
        assert not root(wrong, 1.0, [[2, -3, 1]], 1e-4)
    digits = special["digit_distance_nums"]
    assert (
        digits(1, 1, [1, 2], 0)
        and digits(6, 5, [23, 56], 0)
        and digits(3, 0, [1, 22], 0)
        and not digits(4, 0, [1, 22], 0)
    )
    assert special["surface_Area"](33, 33, [3, 4], 0) and special["surface_Area"](35, 33, [3, 4], 0)
    assert not special["surface_Area"](34, 33, [3, 4], 0) and not special["surface_Area"]([], 33, [3, 4], 0)
