"""Countdown: the grammar against a search over all expressions, every published file, and what is no expression."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from unmask.errors import ConfigError, DataError
from unmask.tasks import TASKS
from unmask.tasks.arithmetic import is_solvable, parse_expression, solutions
from unmask.tasks.countdown import owner, plain
from unmask.types import Example, Status

TASK = TASKS["countdown"](num_test=4)
EXAMPLE = Example(0, "", {"numbers": [44, 19, 35], "target": 98})


@pytest.mark.parametrize(("text", "value", "numbers"), [
    ("44+19+35", 98, (44, 19, 35)), ("(44 + 19)*2\n", 126, (44, 19, 2)), ("-3+(2*-4)", -11, (3, 2, 4)), ("+5", 5, (5,)),
    ("1/3+1/3+1/3", 1, (1, 3, 1, 3, 1, 3)), ("8/4/2", 1, (8, 4, 2)), ("8-4-2", 2, (8, 4, 2)),
    ("2*(3+4)*5", 70, (2, 3, 4, 5)),
    ("((((7))))", 7, (7,)), ("2-3*4", -10, (2, 3, 4)), ("6/4", Fraction(3, 2), (6, 4)),
])  # fmt: skip
def test_values_are_exact(text, value, numbers):
    found = parse_expression(text)
    assert found is not None and (found.value, found.numbers) == (value, numbers)


@pytest.mark.parametrize("text", [
    "", " ", "()", "((1)", "1)", "1 2", "1+", "*1", "1**2", "44**19**35", "4*(5)**2", "44//19*35", "1/0", "1/(2-2)",
    "1.5+1",
    "1234567", "x", "1+x", "0x10", "1_0", "1e3", "٣+1", "1＋1", "2(3)", "(2)(3)", "1=1", "__import__('os')", "1;2",
    "1\x002",
    "(" * 100 + "1" + ")" * 100, "-" * 100 + "1", "+".join(["1"] * 101), "1#", "[1]", "1,2", "True", "'1'",
])  # fmt: skip
def test_what_is_no_expression(text):
    assert parse_expression(text) is None


def test_every_solution_of_the_search_parses_and_solvability_agrees_with_it():
    draw = random.Random(0)
    reached = 0
    for _ in range(60):
        numbers, target = [draw.randint(1, 12) for _ in range(draw.choice([2, 3, 3, 4]))], draw.randint(5, 40)
        first = next(solutions(numbers, target), None)
        assert is_solvable(numbers, target) == (first is not None)
        for text in itertools.islice(solutions(numbers, target), 5):
            found = parse_expression(text)
            assert found is not None and found.value == target and sorted(found.numbers) == sorted(numbers)
        reached += first is not None
    assert 15 < reached < 55


def test_an_opened_answer_is_judged_as_one():
    task = TASKS["countdown"](opening="<answer>", num_train=1)
    (row,) = task.examples("train")
    assert row.prompt[-1] == {"role": "assistant", "content": "<answer>"}
    numbers = "+".join(map(str, row.columns["numbers"]))
    assert (
        task.score(row, f"{numbers}</answer>").value
        > 0
        == TASKS["countdown"]().score(EXAMPLE, f"{numbers}</answer>").value
    )


@pytest.mark.parametrize(("completion", "value", "status"), [
    ("<reasoning>\nx\n</reasoning>\n<answer>\n44+19+35\n</answer>", 1.0, Status.CORRECT),
    ("<answer>35+(44+19)</answer>", 1.0, Status.CORRECT),
    ("<answer>1</answer><answer>44+19+35</answer>", 1.0, Status.CORRECT),
    ("<answer>44+19-35</answer>", 0.1, Status.WRONG),
    ("<answer>98</answer>", 0.1, Status.WRONG),
    ("<answer>44+19+35+0</answer>", 0.1, Status.WRONG),
    ("<answer>44+19+35=98</answer>", 0.1, Status.UNPARSED),
    ("<answer>44**19**35</answer>", 0.1, Status.UNPARSED),
    ("<answer></answer>", 0.1, Status.UNPARSED),
    ("44+19+35", 0.0, Status.UNPARSED),
    ("<answer>44+19+35", 0.0, Status.UNPARSED),
    ("", 0.0, Status.UNPARSED),
])  # fmt: skip
def test_rewards_of_d1(completion, value, status):
    found = TASK.score(EXAMPLE, completion)
    assert (found.value, found.status) == (value, status)
    solved = TASKS["countdown"](reward="solved").score(EXAMPLE, completion)
    assert solved.value == (1.0 if status == Status.CORRECT else 0.0) and solved.status == status


def test_the_lenient_parser_reads_what_evaluations_read():
    lenient = TASKS["countdown"](parser="lenient")
    for text in ("\\boxed{44+19+35}", "<answer>44+19+35 = 98</answer>", "<answer>\\boxed{44 + 19 + 35}</answer>",
                 "\\boxed{\\left(44+19\\right)+35}"):  # fmt: skip
        assert lenient.score(EXAMPLE, text).status == Status.CORRECT
    assert plain("3 \\times 4 \\div 2 = 6") == "3 * 4 / 2" and plain("2 × 3 − 1") == "2 * 3 - 1"


@pytest.mark.parametrize("count", [3, 4, 5])
def test_generated_instances_are_solvable_and_no_split_shares_one(count):
    tasks = [TASKS["countdown"](num_numbers=count, num_train=30, num_validation=8, num_test=8, seed=s) for s in (0, 1)]
    keys = {}
    for split in ("train", "validation", "test"):
        rows = [(e.columns["numbers"], e.columns["target"]) for task in tasks for e in task.examples(split)]
        assert all(len(n) == count and 10 <= t <= 100 and all(1 <= k <= 99 for k in n) for n, t in rows)
        assert all(owner(tuple(n), t) == split for n, t in rows)
        assert all(is_solvable(n, t) for n, t in (rows if count < 5 else rows[:2]))
        keys[split] = {(tuple(sorted(n)), t) for n, t in rows}
        assert len(keys[split]) == len(rows)  # two seeds, and nothing twice
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]


@pytest.mark.parametrize(("file", "rows"), [
    ("countdown_3to4_train.jsonl", 19_975), ("d1_countdown_cd3_test.jsonl", 256), ("dream_cd3_test.jsonl", 1_000),
])  # fmt: skip
def test_every_row_of_the_published_files_is_read_and_solvable(data_dir, file, rows):
    task = TASKS["countdown"](data=str(data_dir / "countdown" / file), reward="solved")
    examples = task.examples("test")
    assert len(examples) == rows and task.source("test").endswith(file)
    for example in examples[:: max(1, rows // 60)]:
        answer = next(solutions(example.columns["numbers"], example.columns["target"]))
        assert task.score(example, f"<answer>{answer}</answer>").status == Status.CORRECT
        assert task.score(example, f"<answer>{answer}+1</answer>").status == Status.WRONG


def test_validation_is_the_end_of_the_training_file_and_rows_can_be_chosen(data_dir):
    file = str(data_dir / "countdown" / "countdown_3to4_train.jsonl")
    task = TASKS["countdown"](train_data=file, num_validation=100, only_num_numbers=True)
    train, held = task.examples("train"), task.examples("validation")
    assert len(train) == 9_928 - 100 and len(held) == 100
    assert {task.stratum(e) for e in (*train, *held)} == {"3_numbers"}
    assert not {e.id for e in train} & {e.id for e in held}


def test_prompts():
    text = TASK.examples("test")[0].prompt[0]["content"]
    assert "Using only the numbers [" in text and text.startswith("\nRespond in the following format:\n<reasoning>")
    raw = TASKS["countdown"](prompt="raw", num_test=1).examples("test")[0]
    assert raw.prompt == f"{','.join(map(str, raw.columns['numbers']))}={raw.columns['target']}|"
    assert TASKS["countdown"](prompt="raw").score(EXAMPLE, "44+19+35").status == Status.CORRECT
    own = TASKS["countdown"](prompt="{numbers} -> {target}: <answer>", num_test=1)
    assert own.examples("test")[0].prompt.endswith(": <answer>")
    assert own.score(EXAMPLE, "44+19+35</answer>").status == Status.UNPARSED  # the completion alone is read


@pytest.mark.parametrize(("settings", "message"), [
    ({"prompt": "x"}, "task.prompt = 'x'"), ({"reward": "x"}, "task.reward"), ({"parser": "x"}, "task.parser"),
    ({"num_numbers": 6}, "3, 4 or 5"), ({"num_test": 0}, "task.num_test = 0"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TASKS["countdown"](**settings)


@pytest.mark.parametrize("row", [
    '{"target": 5}', '{"nums": [1, 2], "target": "x"}', '{"nums": [1.5, 2], "target": 3}', '{"nums": [1], "target": 1}',
    '{"input": "a,b", "output": "3"}', '{"input": 5, "output": "3"}', "[]", "5",
])  # fmt: skip
def test_rows_of_another_form_are_named(row, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"nums": [1, 2], "target": 3}\n' + row + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl line 2: is no Countdown row"):
        TASKS["countdown"](data=str(file)).examples("test")


def test_too_few_training_rows_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"nums": [1, 2], "target": 3}\n')
    with pytest.raises(ConfigError, match="has 1 rows, and validation takes"):
        TASKS["countdown"](train_data=str(tmp_path / "rows.jsonl")).examples("train")
