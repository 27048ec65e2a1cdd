"""Open 4x4 Sudoku, written twice: puzzles and their splits, the teacher, the judge, and how strongly tokens depend."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from unmask.errors import ConfigError
from unmask.tasks import TASKS
from unmask.tasks.common import SPLITS
from unmask.tasks.sudoku_grids import all_grids, completions, from_text, split_grids, to_text
from unmask.tasks.sudoku_twice import SudokuTwice, parse_grids, right_solutions, right_units
from unmask.types import Example, Status

# Two grids that solve the puzzle: they differ by the exchange of 1 and 3 at the corners of a rectangle.
PUZZLE, FIRST_WAY, SECOND_WAY = "0204040221434321", "1234341221434321", "3214143221434321"
EXAMPLE = Example(0, PUZZLE + "|", {"puzzle": PUZZLE})

SMALL = {"num_train": 400, "num_validation": 100, "num_test": 100}


def change(grid: str, cell: int, digit: str) -> str:
    return grid[:cell] + digit + grid[cell + 1 :]


def test_examples_are_distinct_puzzles_and_no_split_shares_one():
    task = SudokuTwice(**SMALL)
    by_split = {split: task.examples(split) for split in SPLITS}
    puzzles = [e.columns["puzzle"] for examples in by_split.values() for e in examples]
    assert len(puzzles) == len(set(puzzles)) == 600
    assert len({e.id for examples in by_split.values() for e in examples}) == 600
    assert {puzzle.count("0") for puzzle in puzzles} == {10}
    for split, examples in by_split.items():
        fits = completions(from_text([e.columns["puzzle"] for e in examples]))
        own = torch.tensor([grid in set(to_text(split_grids(split))) for grid in to_text(all_grids())])
        assert bool((fits & own).any(1).all())  # made from a grid of the split
        assert [e.prompt for e in examples] == [e.columns["puzzle"] + "|" for e in examples]


def test_overlapping_puzzles_are_dropped_from_the_later_split():
    # With 12 blanks many grids leave the same puzzle: without the exclusion some test puzzles were trained on.
    task = SudokuTwice(num_blanks=12)
    seen = {e.columns["puzzle"] for e in task.examples("train")}
    assert not seen & {e.columns["puzzle"] for split in ("validation", "test") for e in task.examples(split)}


def test_the_task_is_registered_and_declares_33_tokens():
    task = TASKS["sudoku_twice"](**SMALL)
    ((_, completion),) = SudokuTwice(**SMALL, num_demonstrations=1).demonstrations()
    assert (task.gen_length, task.num_steps) == (33, 33) and len(completion) == 33
    assert (task.stratum(EXAMPLE), task.source("test")) == ("", "generated:test")


@pytest.mark.parametrize(
    ("completion", "status", "units", "agreement"),
    [
        (f"{FIRST_WAY}|{FIRST_WAY}", Status.CORRECT, 1, 1),
        (f"{SECOND_WAY}|{SECOND_WAY}", Status.CORRECT, 1, 1),  # any solution counts
        (f" {FIRST_WAY} |\n{FIRST_WAY}", Status.CORRECT, 1, 1),
        (f"{FIRST_WAY}|{SECOND_WAY}", Status.WRONG, 1, 0.75),  # both right, not the same: cells 0, 2, 4 and 6 differ
        # a wrong cell breaks its row, column and box in one grid: units (9/12 + 1) / 2
        (f"{change(FIRST_WAY, 0, '3')}|{FIRST_WAY}", Status.WRONG, 0.875, 0.9375),
        (f"{change(FIRST_WAY, 0, '3')}|{change(FIRST_WAY, 0, '3')}", Status.WRONG, 0.75, 1),
        # exchanging all 1s and 3s leaves four digits in each unit, but changes givens 9, 11, 13, 15: rows 2, 3, columns
        # 1, 3 and the lower boxes are wrong
        (f"{FIRST_WAY.translate(str.maketrans('13', '31'))}|{FIRST_WAY}", Status.WRONG, 0.75, 0.5),
        ("0" * 16 + "|" + "0" * 16, Status.WRONG, 0, 1),
        (FIRST_WAY, Status.UNPARSED, 0, 0),
        (f"{FIRST_WAY}|{FIRST_WAY[:15]}", Status.UNPARSED, 0, 0),
        (f"{FIRST_WAY}|{FIRST_WAY}|", Status.UNPARSED, 0, 0),
        (f"{FIRST_WAY}|{FIRST_WAY}|{FIRST_WAY}", Status.UNPARSED, 0, 0),
        (f"{FIRST_WAY}{FIRST_WAY}", Status.UNPARSED, 0, 0),
        (f"{FIRST_WAY}|³{FIRST_WAY[1:]}", Status.UNPARSED, 0, 0),
        ("", Status.UNPARSED, 0, 0),
        ("|" * 1_000_000, Status.UNPARSED, 0, 0),
    ],
)
def test_verdicts(completion: str, status: Status, units: float, agreement: float):
    solved = float(status is Status.CORRECT)
    score, strict = (SudokuTwice(reward=reward).score(EXAMPLE, completion) for reward in ("units", "solved"))
    assert score.status is strict.status is status
    assert dict(score.facts) == dict(strict.facts)
    assert dict(score.facts) == {"accuracy": solved, "unit_accuracy": units, "agreement": agreement}
    assert score.value == pytest.approx((2 * units + agreement) / 3, abs=1e-15)  # a sum of three rounded shares
    assert strict.value == solved


def test_only_a_correct_completion_has_the_full_reward():
    task = SudokuTwice()
    for first in (FIRST_WAY, SECOND_WAY, change(FIRST_WAY, 0, "2")):
        for second in (FIRST_WAY, SECOND_WAY, change(FIRST_WAY, 0, "2")):
            score = task.score(EXAMPLE, f"{first}|{second}")
            assert (score.value == 1) == (score.status is Status.CORRECT) == (first == second and first[0] != "2")


def test_right_units_is_one_for_the_grids_that_keep_the_givens_alone():
    grids = to_text(all_grids())
    fits = completions(from_text([PUZZLE]))[0].tolist()
    assert [right_units(grid, PUZZLE) == 1 for grid in grids] == fits and sum(fits) == 2
    assert right_units("1" * 16, "0" * 16) == 0
    assert right_units(change(FIRST_WAY, 15, "4"), PUZZLE) == 0.75  # one given changed: its row, column and box


def test_right_solutions_are_uniform_over_the_right_grids():
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # a grid of quantiles: exact counts
    counts = Counter(to_text(right_solutions(from_text([PUZZLE] * 1000), uniforms)))
    assert counts == {FIRST_WAY: 500, SECOND_WAY: 500}


def test_demonstrations_are_two_equal_copies_and_right_in_the_stated_share():
    task = SudokuTwice(right_share=0.15)
    pairs = task.demonstrations()
    assert len(pairs) == 8_000
    scores = [task.score(example, text) for example, text in pairs]
    assert all(score.facts["agreement"] == 1 for score in scores)
    # Rows and boxes are right in every answer, so 8 units of 12 at least.
    assert min(score.facts["unit_accuracy"] for score in scores) >= 8 / 12
    # 15 % drawn right; of the others the share of right grids among those that keep givens, rows and boxes, 12.7 % in
    # the mean (counted over the enumerated grids). One sd of the share is 0.5 points.
    assert abs(sum(score.facts["accuracy"] for score in scores) / 8_000 - (0.15 + 0.85 * 0.127)) < 0.02
    assert task.demonstrations("test")[:3] == task.demonstrations("test")[:3]


def test_all_demonstrations_are_right_where_the_share_is_one():
    task = SudokuTwice(**SMALL, right_share=1.0)
    assert all(task.score(e, text).status is Status.CORRECT for e, text in task.demonstrations())


@pytest.mark.parametrize(
    ("num_blanks", "solutions", "together", "one_by_one"),
    [(8, 1.2, 0.146, 1.18), (10, 1.7, 0.44, 3.8), (12, 4.1, 1.3, 12.3)],
)
def test_right_answers_hang_together_as_the_documentation_says(num_blanks, solutions, together, one_by_one):
    """docs/tasks.md: entropy in nats of a uniform right answer, and the sum of the entropies of its 33 tokens."""
    puzzles = from_text([e.columns["puzzle"] for e in SudokuTwice(num_blanks=num_blanks).examples("train")])
    fits = completions(puzzles).double()  # (n, 288)
    number = fits.sum(1)
    one_hot = (all_grids()[:, :, None] == torch.arange(1, 5)).double().flatten(1)  # (288, 64)
    marginals = (fits @ one_hot / number[:, None]).reshape(-1, 16, 4)
    entropies = -2 * torch.special.xlogy(marginals, marginals).sum((1, 2))  # both grids
    # 4 % for rounding in the page; the puzzles are the same on every machine
    assert number.mean().item() == pytest.approx(solutions, rel=0.04)
    assert number.log().mean().item() == pytest.approx(together, rel=0.04)
    assert entropies.mean().item() == pytest.approx(one_by_one, rel=0.04)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "d1"}, r"task.prompt = 'd1' is not known. Known: raw"),
        ({"reward": "cells"}, r"task.reward = 'cells' is not known. Known: units, solved"),
        ({"num_blanks": 7}, r"task.num_blanks = 7: 8 to 12"),
        ({"num_blanks": 13}, r"task.num_blanks = 13"),
        ({"right_share": 1.5}, r"task.right_share = 1.5: is a share"),
        ({"right_share": float("nan")}, r"task.right_share = nan"),
        ({"num_test": 0}, r"task.num_test = 0"),
    ],
)
def test_wrong_fields_are_refused_while_building(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        SudokuTwice(**fields)


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown split 'dev' of sudoku_twice.*train, validation, test"):
        SudokuTwice().examples("dev")


def test_parse_grids_reads_exactly_two():
    assert parse_grids("1" * 16 + "|" + "2" * 16) == ("1" * 16, "2" * 16)
    assert parse_grids("1" * 15 + "|" + "2" * 17) is None
