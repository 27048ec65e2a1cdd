"""Tasks: prompts and judges, used by training and evaluation alike. `TASKS` is the registry."""

from __future__ import annotations

from unmask.tasks.sudoku import Sudoku
from unmask.tasks.sudoku_twice import SudokuTwice

TASKS = {
    "sudoku": Sudoku,
    "sudoku_twice": SudokuTwice,
}
