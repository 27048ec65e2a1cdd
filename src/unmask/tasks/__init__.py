"""Tasks: prompts and judges, used by training and evaluation alike. `TASKS` is the registry."""

from __future__ import annotations

from unmask.tasks.code import Code
from unmask.tasks.countdown import Countdown
from unmask.tasks.gsm8k import GSM8K
from unmask.tasks.mathematics import Mathematics
from unmask.tasks.sudoku import Sudoku
from unmask.tasks.sudoku_twice import SudokuTwice
from unmask.tasks.user import UserTask

TASKS = {
    "sudoku": Sudoku,
    "sudoku_twice": SudokuTwice,
    "countdown": Countdown,
    "gsm8k": GSM8K,
    "math": Mathematics,
    "code": Code,
    "data": UserTask,
}
