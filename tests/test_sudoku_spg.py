"""SPG's Sudoku: a split by solution into 200 and 88, and a prompt with worked examples that are true."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from unmask.errors import ConfigError, DataError
from unmask.tasks.sudoku import PROMPTS, Sudoku
from unmask.tasks.sudoku_grids import generate_puzzles, generate_spread_puzzles, split_grids, to_text
from unmask.tasks.sudoku_shots import chosen_shots, generated_shots, sure_steps

SMALL = {"prompt": "spg", "grids": "spg", "num_train": 2_000, "num_validation": 300}


def test_the_split_is_by_solution_and_the_test_is_spread_over_88_grids():
    task = Sudoku(num_test=256, **SMALL)
    train, test, validation = (task.examples(split) for split in ("train", "test", "validation"))
    of_test = Counter(e.columns["solution"] for e in test)
    of_train = {e.columns["solution"] for e in train}
    assert len(of_test) == 88 and sorted(of_test.values()) == [2] * 8 + [3] * 80
    assert len(of_train) == 200 and not of_train & set(of_test)
    assert {task.stratum(e) for e in test} == {"unseen_grids"}
    of_validation = Counter(e.columns["solution"] for e in validation)
    assert set(of_validation) == of_train and set(of_validation.values()) == {1, 2}
    puzzles = [e.columns["puzzle"] for e in [*train, *test, *validation]]
    assert len(set(puzzles)) == len(puzzles) == 2_556
    assert not {puzzle for puzzle, _ in generated_shots()} & set(puzzles)


def test_the_prompt_shows_three_worked_puzzles_of_training_grids():
    (turn,) = Sudoku(num_test=88, seed=5, num_blanks=6, **SMALL).examples("test")[0].prompt
    text = turn["content"]
    shots = re.findall(r"puzzle: (\d{16})\nAnswer:\n<reasoning>.+?</reasoning>\n<answer>\n(\d{16})\n", text, re.DOTALL)
    assert shots == generated_shots() and len({solution for _, solution in shots}) == 3
    assert {solution for _, solution in shots} <= set(to_text(split_grids("train")))
    assert text.startswith(PROMPTS["d1"].template.partition("Solve the following")[0])
    assert re.search(r"\n\nQuestion: Solve the following Sudoku puzzle: [0-4]{16}\nAnswer:\n$", text)
    assert "{" not in text


def peers_of(cell: int) -> set[int]:
    """The cells of its row, column and box."""
    corner = 8 * (cell // 8) + 2 * (cell % 4 // 2)
    line = {4 * (cell // 4) + i for i in range(4)} | {cell % 4 + 4 * i for i in range(4)}
    return (line | {corner + i for i in (0, 1, 4, 5)}) - {cell}


def check_steps(puzzle: str, solution: str) -> None:
    """Cell by cell: the digit is the solution's, and the others do stand where it is said."""
    cells, steps = list(puzzle), sure_steps(puzzle)
    assert steps is not None and len(steps) == puzzle.count("0")
    for step in steps:
        form = r"Row (\d), column (\d): (\d), (\d) and (\d) stand in its row, column or box, so it is (\d)\."
        row, column, *named, digit = re.fullmatch(form, step).groups()
        cell = 4 * (int(row) - 1) + int(column) - 1
        assert cells[cell] == "0" and solution[cell] == digit
        assert {*named, digit} == set("1234") and set(named) <= {cells[peer] for peer in peers_of(cell)}
        cells[cell] = digit
    assert "".join(cells) == solution


def test_every_step_of_an_example_is_true():
    for shot in generated_shots():
        check_steps(*shot)
    for blanks in (8, 12):
        for pair in zip(*map(to_text, generate_puzzles("test", 100, blanks, seed=0)), strict=True):
            check_steps(*pair)


def test_a_puzzle_that_takes_a_guess_is_no_example():
    assert sure_steps("0" * 16) is None and sure_steps("1000" + "0" * 12) is None
    assert sure_steps("1234341021434321") == [
        "Row 2, column 4: 1, 3 and 4 stand in its row, column or box, so it is 2."
    ]
    rows = [("1234341021434321", "1234341221434321")] * 5 + [("0" * 16, "x")]
    with pytest.raises(DataError, match=r"the file: prompt 'spg' shows 3 puzzles of different solutions .* 1 were"):
        chosen_shots(rows, "the file")


def test_examples_come_from_the_training_file_and_leave_it(tmp_path):
    generated = Sudoku(prompt="raw", num_train=30).examples("train")
    file = tmp_path / "train.csv"
    file.write_text(
        "Puzzle,Solution\n" + "".join(f"{e.columns['puzzle']},{e.columns['solution']}\n" for e in generated)
    )
    task = Sudoku(prompt="spg", train_data=str(file), num_test=10)
    shown = chosen_shots([(e.columns["puzzle"], e.columns["solution"]) for e in generated], "x")
    train = task.examples("train")
    assert len(train) == 27 and not {p for p, _ in shown} & {e.columns["puzzle"] for e in train}
    assert all(puzzle in train[0].prompt[0]["content"] for puzzle, _ in shown)


def test_settings():
    with pytest.raises(ConfigError, match=r"task.grids = 'sgp' is not known.*Did you mean 'spg'"):
        Sudoku(grids="sgp")
    with pytest.raises(ConfigError, match="leave only"):
        generate_spread_puzzles(split_grids("test"), "test", 500_000, 2, seed=0)
    answer = "<reasoning>\n</reasoning>\n<answer>\n{}\n</answer>"
    task = Sudoku(num_test=88, **SMALL)
    example = task.examples("test")[0]
    assert task.score(example, answer.format(example.columns["solution"])).value == 1.0
    assert task.score(example, answer.format("1" * 16)).value < 1.0
