"""Worked examples for prompts of 4x4 Sudoku: puzzles of training grids, each solved cell by cell in words."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from unmask.errors import DataError
from unmask.tasks.sudoku_grids import BOXES, COLUMNS, ROWS, generate_puzzles, to_text

UNITS = ROWS + COLUMNS + BOXES
NUM_SHOTS = 3
"""SPG, arXiv:2510.09541."""
_NUM_BLANKS, _NUM_TRIED = 8, 64


@cache
def generated_shots() -> list[tuple[str, str]]:
    """(puzzle, solution) of the examples, from the 200 training grids. The same for every seed and number of blanks, so
    that all runs see one prompt."""
    puzzles, solutions = generate_puzzles("train", _NUM_TRIED, _NUM_BLANKS, seed=0)
    return chosen_shots(zip(to_text(puzzles), to_text(solutions), strict=True), "the generator")


def chosen_shots(rows: Iterable[tuple[str, str]], source: str) -> list[tuple[str, str]]:
    """The first puzzles, of different solutions, that can be solved one sure cell after the other.

    Raises: DataError if there are too few.
    """
    shots: dict[str, str] = {}
    for puzzle, solution in rows:
        if solution not in shots and sure_steps(puzzle) is not None:
            shots[solution] = puzzle
        if len(shots) == NUM_SHOTS:
            return [(puzzle, solution) for solution, puzzle in shots.items()]
    raise DataError(
        f"{source}: prompt 'spg' shows {NUM_SHOTS} puzzles of different solutions that can be solved cell by cell, and "
        f"{len(shots)} were found. Give more training puzzles."
    )


def sure_steps(puzzle: str) -> list[str] | None:
    """One line for each blank cell, in an order in which one digit is left for each; None if one has to guess, as in
    puzzles with several solutions."""
    cells, steps = list(puzzle), []
    while "0" in cells:
        for cell in (place for place in range(16) if cells[place] == "0"):
            seen = {cells[peer] for unit in UNITS if cell in unit for peer in unit} - {"0"}
            if len(seen) == 3:
                break
        else:
            return None
        (digit,) = set("1234") - seen
        cells[cell] = digit
        first, second, third = sorted(seen)
        steps.append(
            f"Row {cell // 4 + 1}, column {cell % 4 + 1}: {first}, {second} and {third} stand in its row, column or "
            f"box, so it is {digit}."
        )
    return steps


def worked_example(puzzle: str, solution: str) -> str:
    """Question and answer, the reasoning between its tags."""
    steps = sure_steps(puzzle)
    assert steps is not None, puzzle  # as chosen_shots has seen
    return "\n".join(
        [
            "Question:",
            f"Solve the following Sudoku puzzle: {puzzle}",
            "Answer:",
            "<reasoning>",
            "The rows are:",
            *_rows(puzzle),
            *steps,
            "The solved rows are:",
            *_rows(solution),
            "</reasoning>",
            "<answer>",
            solution,
            "</answer>",
        ]
    )


def _rows(cells: str) -> list[str]:
    return [" ".join(cells[start : start + 4]) for start in range(0, 16, 4)]
