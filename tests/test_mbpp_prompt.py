"""MBPP's own prompt: its examples come from the rows, are not scored, and answers are read as the form asks."""

from __future__ import annotations

import json

import pytest

from tests.test_code import make
from unmask.errors import ConfigError, DataError
from unmask.tasks import TASKS


def row(number: int) -> dict:
    return {
        "text": f"Add {number}.",
        "code": f"def add{number}(x):\r\n    return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert add{number}({x}) == {x + number} " for x in (1, 2, 3)],
        "challenge_test_list": [],
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in (1, 2, 3, 4, 5, 11)))
    return path


def asks(number: int) -> str:
    tests = "\n".join(test.strip() for test in row(number)["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: Add {number}. Your code should pass these tests:"
        f"\n\n{tests}\n"
    )


def answer(number: int) -> str:
    return f"[BEGIN]\ndef add{number}(x):\n    return x + {number}\n[DONE]"


def test_three_examples_stand_in_front_as_turns_and_are_not_scored(file):
    examples = TASKS["code"](data=str(file), prompt="mbpp", num_shots=3).examples("test")
    assert [e.columns["task_id"] for e in examples] == ["1", "5", "11"]
    assert [e.id % 10_000_000 for e in examples] == [0, 4, 5]  # the rows of the file
    turns = examples[-1].prompt
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4
    assert [turn["content"] for turn in turns[:6]] == [f(n) for n in (2, 3, 4) for f in (asks, answer)]
    assert turns[6]["content"] == asks(11) and turns[7]["content"] == "[BEGIN]\n"


def test_the_same_as_one_text(file):
    text = TASKS["code"](data=str(file), prompt="mbpp_text", num_shots=3).examples("test")[-1].prompt
    assert text == "".join(f"{asks(n)}{answer(n)}\n\n" for n in (2, 3, 4)) + asks(11) + "[BEGIN]\n"
    bare = TASKS["code"](data=str(file), prompt="mbpp_text").examples("test")
    assert len(bare) == 6 and bare[-1].prompt == asks(11) + "[BEGIN]\n"


def test_examples_from_another_file_are_kept_out_of_training_too(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row(number)) + "\n" for number in (3, 601, 602, 603)))
    task = TASKS["code"](train_data=str(other), shots_data=str(file), prompt="mbpp", num_shots=2, num_validation=1)
    assert [e.columns["task_id"] for e in task.examples("train")] == ["601", "602"]
    assert [e.columns["task_id"] for e in task.examples("validation")] == ["603"]
    assert task.examples("train")[0].prompt[2]["content"] == asks(3)


def test_answers_end_at_done(file, sandbox):
    for prompt in ("mbpp", "mbpp_text"):
        task = make(file, sandbox, prompt=prompt, num_shots=3)
        example = task.examples("test")[1]  # task 5
        good = "def add5(x):\n    return x + 5\n"
        next_one = "[DONE]\n\nYou are an expert. [BEGIN]\ndef add5(x):\n    return 2\n```python\npass\n```\n[DONE]"
        more = [
            good + next_one,
            good + "[DONE]\nprint('and more",
            f" '{good}' \n[DONE] \n\n",
            f"```python\n{good}```\n[DONE]",
            good,
        ]
        assert [task.score(example, text).value for text in more] == [1.0] * 5
        bad = ["def add5(x): return 7\n[DONE]", f"[DONE]\n{good}", "", "'"]
        assert [task.score(example, text).value for text in bad] == [0.0] * 4


def test_what_does_not_go_together(file, tmp_path):
    for settings, message in (
        ({"num_shots": 10}, "num_shots = 10"),
        ({"reward": "espo"}, "does not ask for"),
    ):
        with pytest.raises(ConfigError, match=message):
            TASKS["code"](prompt="mbpp", **settings)
    with pytest.raises(DataError, match=r"no row of MBPP with task_id 6.*task.shots_data"):
        TASKS["code"](data=str(file), prompt="mbpp", num_shots=5).examples("test")
    plain = tmp_path / "ace.jsonl"
    plain.write_text(json.dumps({"id": "a", "question": "q", "test_cases": ["assert f(1) == 1"]}) + "\n")
    with pytest.raises(DataError, match=r"'a'.*needs rows of MBPP"):
        TASKS["code"](data=str(plain), prompt="mbpp").examples("test")


def test_the_published_examples_of_the_data(data_dir):
    file = data_dir / "mbpp" / "mbpp_001-487.jsonl"
    examples = TASKS["code"](data=str(file), prompt="mbpp", num_shots=3).examples("test")
    assert len(examples) == 484
    functions = ("similar_elements", "is_not_prime", "heap_queue_largest")
    for place, name in enumerate(functions):
        assert f"def {name}(" in examples[0].prompt[2 * place + 1]["content"]
    assert TASKS["code"](data=str(file), prompt="mbpp", num_shots=3, shots_data=str(file)).examples("test") == examples
