"""HumanEval and MBPP, plain and EvalPlus: references pass, stubs fail, completions are read as the prompts ask."""

from __future__ import annotations

import json

import pytest

from unmask.errors import ConfigError, DataError
from unmask.sandbox.pool import SandboxUnavailable
from unmask.tasks import TASKS
from unmask.tasks.code import acecoder, block_format, blocks, last_block, parses, until_next_statement
from unmask.types import Status

SLOW_HUMANEVAL_PLUS = {"15", "36", "59"}
"""References of the original format that compute for more than 1.5 s."""
SLOW_MBPP_PLUS = {"84", "123", "255", "271", "300", "389", "392"}
TOO_LARGE = {"255", "Mbpp/255"}
"""MBPP+: one answer has 6 million parts, more than cross between processes (docs/tasks.md)."""
FILES = {
    "humaneval": ("humaneval/HumanEval_000-081.jsonl", 82),
    "mbpp": ("mbpp/mbpp_001-487.jsonl", 487),
    "humaneval_plus": ("humaneval/HumanEvalPlus-OriginFmt-v0.1.10_000-081.jsonl.gz", 82),
    "mbpp_plus": ("mbpp/MbppPlus-OriginFmt-v0.2.0_002-487.jsonl.gz", 231),
    "humaneval_plus_native": ("humaneval/HumanEvalPlus-v0.1.10_000-081.jsonl.gz", 82),
    "mbpp_plus_native": ("mbpp/MbppPlus-v0.2.0_002-487.jsonl", 231),
}


@pytest.fixture(scope="module")
def runner():
    """One sandbox for the whole file."""
    task = TASKS["code"](data="x", cpu_seconds=20.0, memory_mib=1024)
    try:
        yield task.runner
    except SandboxUnavailable as error:
        assert "a program can" not in str(error)  # a kernel that lacks something is skipped, a hole is not
        pytest.skip(str(error))
    task.runner.close()


def make(file, runner, **settings):
    task = TASKS["code"](**({"data": str(file), "cpu_seconds": 20.0, "memory_mib": 1024} | settings))
    task.__dict__["runner"] = runner
    return task


def fenced(code):
    return f"Here it is.\n```python\n{code}\n```"


def check_file(task, examples, *, stub=True):
    """References pass; a stub for every function that the tests call fails."""
    scores = task.score_all(examples, [fenced(e.columns["solution"]) for e in examples])
    assert {e.columns["task_id"]: s.status for e, s in zip(examples, scores, strict=True) if s.value != 1} == {}
    if stub:
        stubs = [fenced("\n".join(f"def {n}(*a, **k): return None" for n in e.columns["names"])) for e in examples]
        scores = task.score_all(examples, stubs)
        assert [e.columns["task_id"] for e, s in zip(examples, scores, strict=True) if s.status == "correct"] == []


def test_humaneval_references_pass_and_stubs_fail(data_dir, runner):
    task = make(data_dir / "humaneval" / "HumanEval_000-081.jsonl", runner)
    examples = task.examples("test")
    assert len(examples) == 82
    check_file(task, examples)


def test_an_object_equal_to_everything_passes_no_humaneval_task(data_dir, runner):
    task = make(data_dir / "humaneval" / "HumanEval_000-081.jsonl", runner)
    yes = "class Yes:\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 0\n"
    examples = task.examples("test")
    forged = [fenced(yes + f"def {e.columns['names'][0]}(*a, **k): return Yes()") for e in examples]
    assert [s.status for s in task.score_all(examples, forged) if s.status == Status.CORRECT] == []


def test_mbpp_references_pass_and_stubs_fail(data_dir, runner):
    task = make(data_dir / "mbpp" / "mbpp_001-487.jsonl", runner)
    examples = task.examples("test")
    assert len(examples) == 487
    check_file(task, [e for e in examples if e.columns["task_id"] != "123"][::4])  # 123 computes for 22 s


def test_humaneval_plus_references_pass(data_dir, runner):
    task = make(data_dir / "humaneval" / "HumanEvalPlus-OriginFmt-v0.1.10_000-081.jsonl.gz", runner)
    examples = task.examples("test")
    assert len(examples) == 82
    quick = [e for e in examples if e.columns["task_id"].split("/")[1] not in SLOW_HUMANEVAL_PLUS]
    check_file(task, [*quick[::6], *(e for e in quick if e.columns["task_id"] == "HumanEval/32")])


def test_mbpp_plus_references_pass(data_dir, runner):
    task = make(data_dir / "mbpp" / "MbppPlus-OriginFmt-v0.2.0_002-487.jsonl.gz", runner)
    examples = task.examples("test")
    assert len(examples) == 231
    quick = [e for e in examples if e.columns["task_id"].split("/")[-1] not in SLOW_MBPP_PLUS]
    check_file(task, quick[::12])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_reference_passes_and_no_stub(data_dir, runner, name):
    task = make(data_dir / FILES[name][0], runner, cpu_seconds=400.0, memory_mib=4096)
    examples = task.examples("test")
    assert len(examples) == FILES[name][1]
    check_file(task, [e for e in examples if e.columns["task_id"] not in TOO_LARGE])


def test_acecoder_rows(tmp_path, runner):
    row = {
        "id": "a",
        "source": "s",
        "question": "Square it.",
        "test_cases": ["assert sq(2) == 4", "assert sq(len([1])) == 1"],
    }
    assert acecoder(row)["names"] == ["sq"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = make(tmp_path / "rows.jsonl", runner, reward="espo")
    (example,) = task.examples("test")
    assert example.prompt[-1]["content"] == "Square it.\nTest cases: assert sq(2) == 4"
    good, half = fenced("def sq(x): return x * x"), fenced("def sq(x): return 4")
    assert [task.score(example, text).value for text in (good, half, good + "\nmore", "none", fenced("def sq("))] == [
        2.0,
        1.5,
        0.0,
        0.0,
        0.5,
    ]
    coupled = make(tmp_path / "rows.jsonl", runner, reward="coupled_grpo")
    assert coupled.score(example, half).value == 1.5 and coupled.score(example, half).status == Status.WRONG
    assert make(tmp_path / "rows.jsonl", runner, reward="tests").score(example, good + "\nmore").value == 1.0
    assert task.score(example, "none").status == Status.UNPARSED


def test_completions_behind_the_prompt(data_dir, runner):
    task = make(data_dir / "humaneval" / "HumanEval_000-081.jsonl", runner, prompt="complete")
    example = task.examples("test")[2]  # truncate_number
    assert isinstance(example.prompt, str) and example.prompt.startswith("\n\ndef truncate_number")
    body = "    return number % 1.0\n"
    assert task.score(example, body).value == 1.0
    assert task.score(example, body + "\nprint('more')\nraise SystemExit\n").value == 1.0  # what follows is cut off
    assert until_next_statement("    a\n\n    b\n# c\ndef g(): pass\nx = 1\n") == "    a\n\n    b\n# c\ndef g(): pass\n"


def test_imports_of_the_prompt_need_not_be_repeated(data_dir, runner):
    task = make(data_dir / "humaneval" / "HumanEval_000-081.jsonl", runner)
    example = task.examples("test")[0]
    bare = example.columns["solution"].replace("from typing import List\n", "")
    assert "List" in bare and task.score(example, fenced(bare)).value == 1.0


def test_code_blocks():
    text = "a\n```python\nx = 1\n```\nb\n```\ny\n```"
    assert [(language, code) for language, code, _ in blocks(text)] == [("python", "x = 1\n"), ("", "y\n")]
    assert last_block(text) == "y\n" and last_block("```js\n1\n```") is None and last_block("```python\nx") is None
    assert [block_format(t) for t in (fenced("x = 1"), fenced("x ="), text, "x", "```\nx\n```")] == [
        1.0,
        0.5,
        0.0,
        0.0,
        0.0,
    ]
    assert not parses("x" * 70_000) and not parses("(" * 10_000) and not parses("-" * 60_000 + "1") and not parses("\0")


def test_bad_settings_and_rows(tmp_path):
    for settings, message in (
        ({"reward": "x"}, "task.reward"),
        ({"cpu_seconds": 0.0}, "cpu_seconds"),
        ({"prompt": "x"}, "task.prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            TASKS["code"](**settings)
    for row in (
        {"prompt": "x"},
        {"entry_point": "f"},
        {"id": 1, "question": "q", "test_cases": ["assert ("]},
        {"code": "def (", "text": "t", "test_list": []},
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match="line 1: is no row of code"):
            TASKS["code"](data=str(tmp_path / "rows.jsonl")).examples("test")


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "q", "test_cases": ["assert sum([1, 2]) == 3", "assert sum([]) == 0"]}, ["sum"]),
        ({"question": "q", "test_cases": ["assert sorted(f(3)) == [1]"]}, ["f"]),
        ({"question": "q", "test_cases": []}, None),
        ({"question": "q", "test_cases": ["assert True"]}, None),
    ],
)
def test_a_row_has_tests_that_call_the_program(row, names):
    task = TASKS["code"](data="x")
    if names is None:
        with pytest.raises(ValueError, match="every program would pass"):
            task.read_row(row)
        return
    assert task.read_row(row)["names"] == names
