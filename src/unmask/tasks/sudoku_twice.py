"""Open 4x4 Sudoku, written twice: few givens, several right answers, and a completion whose tokens hang together.

The completion is a grid, "|" and the same grid again, 33 tokens. Any legal grid that keeps the givens is right, and
both copies must be equal. The prompt leaves most cells open, so what a token should be is decided by the other tokens:
the likelihood of a completion is far from the product of what each token is worth on its own (docs/tasks.md has the
numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, tensor

from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.tasks.common import SPLITS, first_id, require_choices, require_counts
from unmask.tasks.sudoku_grids import (
    BOXES,
    COLUMNS,
    ROWS,
    all_grids,
    column_blind_solutions,
    completions,
    from_text,
    generate_puzzles,
    to_text,
)
from unmask.types import Example, Score, Status

UNITS = ROWS + COLUMNS + BOXES

BLANKS = (8, 12)
"""Fewer blanks leave the answer hardly open, more leave too few puzzles."""

_FACTS = ("accuracy", "unit_accuracy", "agreement")


@dataclass(frozen=True)
class SudokuTwice:
    """4x4 Sudoku with several solutions, answered twice. The puzzles of one split stand in no other."""

    prompt: str = "raw"
    """"raw": the 16 cells and "|". There is no other."""
    reward: str = "units"
    """"units": mean of three shares: rows, columns and boxes of the first grid that are right (all four digits, givens
    kept), those of the second, and cells on which the two agree. "solved": 1 for two equal right grids, else 0."""
    num_blanks: int = 10
    """Blank cells of a puzzle, 8 to 12: 1.2 solutions in the mean with 8, 1.7 with 10, 4.1 with 12."""
    num_train: int = 8_000
    """Training puzzles. Validation and test puzzles are drawn around them, so they depend on this number."""
    num_validation: int = 256
    """Validation puzzles."""
    num_test: int = 512
    """Test puzzles."""
    seed: int = 0
    """Draws the puzzles and the demonstrations."""
    right_share: float = 0.0
    """Share of the demonstrations whose grid is right. The others have right rows and boxes, columns as they fall."""
    num_demonstrations: int = 8_000
    """Demonstrations at most: one for each of the first examples of the split."""

    def __post_init__(self) -> None:
        require_choices(self, prompt=("raw",), reward=("units", "solved"))
        if not BLANKS[0] <= self.num_blanks <= BLANKS[1]:
            raise ConfigError(
                f"task.num_blanks = {self.num_blanks}: {BLANKS[0]} to {BLANKS[1]} are possible, as fewer leave one "
                f"answer and more leave too few puzzles. The recipes use 10."
            )
        if not 0 <= self.right_share <= 1:
            raise ConfigError(f"task.right_share = {self.right_share}: is a share, from 0 to 1. Try 0.")
        require_counts(self, "num_train", "num_validation", "num_test", "num_demonstrations")

    @property
    def gen_length(self) -> int:
        """Tokens of a completion: two grids and "|"."""
        return 33

    @property
    def num_steps(self) -> int:
        """Denoising steps that go with `gen_length`, one token each."""
        return 33

    def examples(self, split: str) -> list[Example]:
        """The puzzles of "train", "validation" or "test". Columns: `puzzle`, a string of 16 digits.

        A puzzle is made from a solution grid of its split, but as a rule grids of other splits solve it as well. What
        is kept apart are the puzzles: one that stands in a split is left out of those that follow.
        """
        offset = first_id(split, "sudoku_twice")
        counts = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        earlier: set[str] = set()
        for name in SPLITS:
            found, _ = generate_puzzles(
                name, counts[name], self.num_blanks, self.seed, unique=False, exclude=frozenset(earlier)
            )
            puzzles = to_text(found)
            if name == split:
                break
            earlier |= set(puzzles)
        return [Example(offset + row, puzzle + "|", {"puzzle": puzzle}) for row, puzzle in enumerate(puzzles)]

    def score(self, example: Example, completion: str) -> Score:
        """Judge one completion. Facts: `accuracy` (both grids right and equal), `unit_accuracy` (share of rows, columns
        and boxes that are right; mean over both grids), `agreement` (share of cells on which the grids agree)."""
        grids = parse_grids(completion)
        if grids is None:
            return Score(0.0, Status.UNPARSED, dict.fromkeys(_FACTS, 0.0))
        first, second = grids
        puzzle = example.columns["puzzle"]
        units = (right_units(first, puzzle) + right_units(second, puzzle)) / 2
        agreement = sum(a == b for a, b in zip(first, second, strict=True)) / 16
        solved = units == 1 and agreement == 1
        value = float(solved) if self.reward == "solved" else (2 * units + agreement) / 3
        facts = dict(zip(_FACTS, (float(solved), units, agreement), strict=True))
        return Score(value, Status.CORRECT if solved else Status.WRONG, facts)

    def demonstrations(self, split: str = "train") -> list[tuple[Example, str]]:
        """The first `num_demonstrations` examples of a split, each with an answer of the teacher, written twice.

        With probability `right_share` the answer is uniform over the right grids, else over those that
        `column_blind_solutions` may give, among which a few are right.
        """
        examples = self.examples(split)[: self.num_demonstrations]
        puzzles, ids = from_text([e.columns["puzzle"] for e in examples]), tensor([e.id for e in examples])
        noise = Noise(self.seed).stream("sudoku_twice/demonstrations")
        is_right = noise.stream("right").uniform(ids) < self.right_share  # (n,)
        right = right_solutions(puzzles, noise.stream("choice").uniform(ids))
        blind = column_blind_solutions(puzzles, ids, noise.stream("blind"))
        answers = to_text(torch.where(is_right[:, None], right, blind))
        return [(example, f"{answer}|{answer}") for example, answer in zip(examples, answers, strict=True)]

    def stratum(self, example: Example) -> str:
        """No strata."""
        return ""

    def source(self, split: str) -> str:
        """Where the puzzles of a split come from, as evaluation rows name it."""
        return f"generated:{split}"


def parse_grids(completion: str) -> tuple[str, str] | None:
    """The two grids of "grid|grid", 16 ASCII digits each with white space around them, or None for any other text."""
    # three parts are enough to know that there are too many
    parts = [part.strip() for part in completion.split("|", 2)]
    if len(parts) != 2 or not all(len(part) == 16 and part.isascii() and part.isdigit() for part in parts):
        return None
    return parts[0], parts[1]


def right_units(grid: str, puzzle: str) -> float:
    """Share of the 12 rows, columns and boxes that hold all four digits and keep the givens in them."""
    kept = [given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True)]
    right = [{grid[cell] for cell in unit} == set("1234") and all(kept[cell] for cell in unit) for unit in UNITS]
    return sum(right) / len(UNITS)


def right_solutions(
    puzzles: Tensor,  # (n, 16)
    uniforms: Tensor,  # (n,) in [0, 1)
) -> Tensor:  # (n, 16) int8
    """For each puzzle one of the complete grids that keep its givens, all equally likely."""
    fits = completions(puzzles)  # (n, 288)
    chosen = (uniforms * fits.sum(1)).long()  # the how-manieth fit
    return all_grids()[(fits.cumsum(1) > chosen[:, None]).int().argmax(1)]
