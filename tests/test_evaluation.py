"""Evaluation rows: intervals by hand, exact accuracies of a scripted policy, everything that identifies the setting."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.helpers import tiny_policy
from unmask.errors import DataError
from unmask.evaluation import Setting, evaluate, share
from unmask.intervals import wilson
from unmask.noise import Noise
from unmask.runs import plain
from unmask.samplers import SAMPLERS
from unmask.tasks.sudoku import Sudoku
from unmask.types import Samples

KEYS = """task data num_examples accuracy ci95 parse_failures gen_length num_steps block_length temperature sampler
prompt nfe_per_completion seconds tokens_per_second model seed"""

Z = 1.959964


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # p = 1/2: the interval is 1/2 ± z / (2 sqrt(n + z²)), by inserting p = 1/2 into the formula
        (5, 10, 0.5 - Z / 2 / math.sqrt(10 + Z * Z), 0.5 + Z / 2 / math.sqrt(10 + Z * Z)),
        # p = 0: centre = half = z² / (2 (n + z²)), so from 0 to z² / (n + z²); p = 1 is its mirror image
        (0, 20, 0.0, Z * Z / (20 + Z * Z)),
        (20, 20, 20 / (20 + Z * Z), 1.0),
        # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3: 81/263, 15/148
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes, total, low, high):
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_share_of_nothing_is_not_an_error():
    assert share([]) == {"num_examples": 0, "accuracy": 0, "ci95": [0.0, 1.0]}


class Scripted:
    """A sampler that writes given texts, by the example's place."""

    gen_length = 16

    def __init__(self, policy, texts):
        self.policy, self.texts, self.place = policy, texts, 0

    def sample(self, policy, prompts, *, noise, on_step=None):
        texts = self.texts[self.place : self.place + len(prompts)]
        self.place += len(prompts)
        ids = self.policy.encode_completions(texts, self.gen_length)
        return Samples(ids, torch.zeros_like(ids), ids.double(), torch.full((len(ids),), 3))


def scripted_row(texts_of, batch_size=4, **task_fields):
    task = Sudoku(num_test=10, **task_fields)
    examples = task.examples("test")
    policy = tiny_policy()
    setting = Setting("sudoku", task.source("test"), "scripted", task.prompt, "m", 5)
    sampler = Scripted(policy, texts_of(examples))
    row, rollouts = evaluate(policy, task, examples, sampler, setting, noise=Noise(0), batch_size=batch_size)
    return row, rollouts, examples


def answers(examples):
    """Four right answers, three with one wrong blank, two that are no grid at all, one that is too short."""
    solutions = [example.columns["solution"] for example in examples]
    wrong = []
    for example, solution in zip(examples[4:7], solutions[4:7], strict=True):
        blank = example.columns["puzzle"].index("0")
        digit = "1" if solution[blank] != "1" else "2"
        wrong.append(solution[:blank] + digit + solution[blank + 1 :])
    return [*solutions[:4], *wrong, "", "|" * 16, solutions[9][:15]]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_scripted_policy_gets_its_exact_accuracy(batch_size):
    row, rollouts, _ = scripted_row(answers, batch_size)
    assert row["num_examples"] == 10 and row["accuracy"] == 0.4
    assert row["ci95"] == pytest.approx(wilson(4, 10))
    assert row["parse_failures"] == 0.3
    assert row["statuses"] == {"correct": 4, "wrong": 3, "unparsed": 3}
    assert row["match_accuracy"] == 0.4
    assert row["cell_accuracy"] == pytest.approx((4 + 3 * 7 / 8) / 10)  # eight blanks each
    assert row["reward"] == pytest.approx(row["cell_accuracy"])
    assert row["nfe_per_completion"] == 3.0
    assert len(rollouts) == 10


def test_a_row_says_everything_about_its_setting():
    task = Sudoku(num_test=6)
    setting = Setting("sudoku", task.source("test"), "low_confidence", task.prompt, "m", 5)
    sampler = SAMPLERS["low_confidence"](gen_length=16, num_steps=4, block_length=8)
    row, _ = evaluate(tiny_policy(), task, task.examples("test"), sampler, setting, noise=Noise(0))
    assert set(KEYS.split()) <= set(row)
    assert json.loads(json.dumps(plain(row))) == row  # nothing that JSON does not know
    expected = {"task": "sudoku", "data": "generated:test", "sampler": "low_confidence", "prompt": "raw", "model": "m"}
    expected |= {"seed": 5, "gen_length": 16, "num_steps": 4, "block_length": 8, "temperature": 0.0}
    assert expected.items() <= row.items()
    assert row["nfe_per_completion"] == 4.0
    assert row["tokens_per_second"] == pytest.approx(6 * 16 / row["seconds"])


def test_the_numbers_do_not_depend_on_the_batch_size():
    task = Sudoku(num_test=7)
    setting = Setting("sudoku", "", "roar", task.prompt, "m", 5)
    rows = []
    for size in (1, 3, 64):
        sampler = SAMPLERS["roar"](gen_length=16)
        row, answers = evaluate(
            tiny_policy(), task, task.examples("test"), sampler, setting, noise=Noise(0), batch_size=size
        )
        rows.append([[answer.completion for answer in answers], row["reward"], row["statuses"]])
    assert rows[0] == rows[1] == rows[2]


def test_puzzles_with_a_trained_grid_are_reported_apart(tmp_path):
    task = Sudoku(num_test=3, num_train=3)
    trained, fresh = task.examples("train"), task.examples("test")
    file = tmp_path / "puzzles.csv"
    rows = [f"{e.columns['puzzle']},{e.columns['solution']}" for e in (*trained, *fresh)]
    file.write_text("\n".join(["Puzzle,Solution", *rows]))
    task = Sudoku(data=str(file))
    examples = task.examples("test")
    policy = tiny_policy()
    texts = [e.columns["solution"] for e in examples[:4]] + ["", ""]
    setting = Setting("sudoku", task.source("test"), "scripted", "raw", "m", 0)
    row, _ = evaluate(policy, task, examples, Scripted(policy, texts), setting, noise=Noise(0))
    assert row["data"] == str(file)
    assert row["seen_grids"] == {"num_examples": 3, "accuracy": 1.0, "ci95": list(wilson(3, 3))}
    assert row["unseen_grids"] == {"num_examples": 3, "accuracy": 1 / 3, "ci95": list(wilson(1, 3))}


def test_one_stratum_needs_no_rows_of_its_own():
    row, _, _ = scripted_row(answers)
    assert "unseen_grids" not in row and "seen_grids" not in row


def test_nothing_to_evaluate_is_refused():
    setting = Setting("sudoku", "empty.csv", "roar", "raw", "m", 0)
    with pytest.raises(DataError, match=r"no examples to evaluate in empty\.csv"):
        evaluate(tiny_policy(), Sudoku(), [], SAMPLERS["roar"](gen_length=16), setting, noise=Noise(0))
