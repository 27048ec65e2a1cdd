"""AceCoder's hard rows: chosen by recorded pass rates, and asked a second time as functions to complete."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.test_code import fenced, make
from unmask.errors import ConfigError, DataError
from unmask.tasks import TASKS
from unmask.tasks.acecoder import hard_rows, to_complete


def row(number: int, *rates: float, question: str = "", other: float = 1.0) -> dict:
    """A row with pass rates of one model that counts and of another that does not."""
    made = [("qwen_coder_2.5", rate) for rate in rates[:-1]] + [("llama3_instruct", rates[-1])]
    inferences = [{"completion": f"def f{number}(x): ...", "model_name": name, "pass_rate": r} for name, r in made]
    best = {"completion": f"def f{number}(x: int) -> int:\n    return x", "model_name": "else", "pass_rate": other}
    return {
        "id": str(number),
        "question": question or f"Add {number}.",
        "test_cases": [f"assert f{number}(1) == {number + 1}"],
        "inferences": [*inferences, best],
    }


ROWS = [
    row(0, 0.0, 0.0),  # nothing passes: no spread
    row(1, 0.0, 0.2),  # hard
    row(2, 0.0, 0.3, question="Can you add 2?"),  # hard, and speaks to the reader
    *(row(number, 0.5, 0.5 + number / 100) for number in range(3, 9)),
    row(9, 0.2, 1.0),
    row(10, 0.9, 1.0),
]


def places(rows):
    return hard_rows([(f"row {number}", r) for number, r in enumerate(rows)])


def test_the_hard_rows_are_low_and_spread():
    means, spreads = ([f([m["pass_rate"] for m in r["inferences"][:-1]]) for r in ROWS] for f in (np.mean, np.std))
    low, high = np.percentile(means, 20), np.percentile(spreads, 40)
    assert low == pytest.approx(0.15) and 0.025 < high < 0.05  # of 11 rows: the third lowest mean
    assert [where for where, _ in places(ROWS)] == ["row 1", "row 1 (as a function to complete)", "row 2"]


def test_what_other_models_passed_does_not_count():
    assert [where for where, _ in places([{**r, "inferences": r["inferences"][:-1]} for r in ROWS])][-1] == "row 2"
    assert places([row(n, 0.1 * n, 0.1 * n + 0.1, other=0.0) for n in range(5)])


def test_the_second_form_has_the_head_of_the_best_completion():
    text = to_complete(ROWS[1])["question"]
    assert text.startswith("Please complete the following problem:\n```\ndef f1(x: int) -> int:\n")
    assert '    """\n    Add 1.\n    """\n```' in text and ROWS[1]["question"] == "Add 1."
    assert to_complete(ROWS[2]) is None and to_complete(row(1, 0.1, 0.2, other=0.0))["question"].count("def f1(x)") == 1
    plain = ROWS[1] | {"inferences": [{"completion": "x = 1", "model_name": "else", "pass_rate": 1.0}]}
    assert to_complete(plain) is None


def test_training_reads_the_hard_ones_and_the_test_reads_all(tmp_path, sandbox):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    task = make(file, sandbox, train_data=str(file), difficulty="hard", num_validation=1)
    train = task.examples("train")
    assert [e.columns["task_id"] for e in train] == ["1", "1"] and len({e.id for e in train}) == 2
    assert "Test cases: assert f1(1) == 2" in train[0].prompt[-1]["content"]
    assert "Test cases" not in train[1].prompt[-1]["content"]  # it has a code block
    assert [e.columns["task_id"] for e in task.examples("validation")] == ["2"] and len(task.examples("test")) == 11
    assert [s.value for s in task.score_all(train, [fenced("def f1(x): return x + 1")] * 2)] == [1.0, 1.0]
    assert len(TASKS["code"](train_data=str(file), num_validation=1).examples("train")) == 10


def test_rows_without_rates_and_a_wrong_choice_are_refused():
    with pytest.raises(ConfigError, match=r"task.difficulty = 'hrad'.*Did you mean 'hard'"):
        TASKS["code"](difficulty="hrad")
    changes = ({"inferences": []}, {"inferences": None}, {"inferences": [{"model_name": "llama3_instruct"}]},
               {"inferences": [{"model_name": "llama3_instruct", "pass_rate": float("nan")}]})  # fmt: skip
    for change in changes:
        with pytest.raises(DataError, match=r"row 1: task.difficulty = 'hard' needs"):
            places([ROWS[0], ROWS[1] | change])
    assert hard_rows([]) == []
    with pytest.raises(DataError, match="none of 3"):  # the low one has no spread
        places([row(0, 0.0, 0.0), row(1, 0.4, 0.6), row(2, 0.4, 0.6)])
