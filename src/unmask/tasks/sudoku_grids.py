"""The 4x4 Sudoku world: its 288 grids and their split, puzzles made from them, and answers that ignore the columns.

A grid is a row of 16 digits, row by row from the top left; 0 stands for a blank. Tensors (n, 16) are int8.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from unmask.errors import ConfigError, DataError
from unmask.noise import Noise

GENERATOR_VERSION = 1
"""Part of every key below: raise it if a change makes other splits or other puzzles."""

SPLIT_SIZES = {"train": 200, "validation": 40, "test": 48}
"""Solution grids of each split; together all 288."""

MAX_BLANKS = 12
"""No 4x4 puzzle with fewer than 4 givens has a unique solution (enumerated in tests/test_sudoku.py)."""

ROWS = tuple(tuple(range(4 * r, 4 * r + 4)) for r in range(4))
COLUMNS = tuple(tuple(range(c, 16, 4)) for c in range(4))
BOXES = tuple(tuple(8 * r + 2 * c + i for i in (0, 1, 4, 5)) for r in range(2) for c in range(2))

_PLACES = 5 ** torch.arange(16)  # base 5: five symbols per cell
_CHUNK = 20_000  # candidate puzzles checked at once: about 30 MB


def _fill(units: Sequence[tuple[int, ...]], num_cells: int = 16) -> Tensor:
    """(n, num_cells) int8: all ways to fill the first cells so that no unit holds a digit twice, in ascending order."""
    partial = torch.zeros(1, 0, dtype=torch.int8)
    for cell in range(num_cells):
        peers = sorted({p for unit in units if cell in unit for p in unit if p < cell})
        digits = torch.arange(1, 5, dtype=torch.int8).repeat(len(partial))  # (4n,)
        longer = torch.cat([partial.repeat_interleave(4, 0), digits[:, None]], 1)  # (4n, cell + 1)
        partial = longer[(longer[:, peers] != digits[:, None]).all(1)]
    return partial


@cache
def all_grids() -> Tensor:
    """(288, 16) int8: every complete grid, in ascending order."""
    return _fill(ROWS + COLUMNS + BOXES)


@cache
def column_blind_grids() -> Tensor:
    """(9216, 16) int8: every grid with right rows and boxes; the columns are free. 9216 = 96 squared, see `_bands`."""
    return _fill(ROWS + BOXES)


@cache
def _bands() -> Tensor:
    """(96, 8) int8: two rows with right rows and boxes. No row or box joins the upper band to the lower one."""
    return _fill(ROWS + BOXES, num_cells=8)


def to_text(grids: Tensor) -> list[str]:
    """One string of 16 digits for each row of (n, 16)."""
    flat = (grids.to(torch.uint8) + ord("0")).flatten().numpy().tobytes().decode("ascii")
    return [flat[i : i + 16] for i in range(0, len(flat), 16)]


def from_text(grids: Collection[str]) -> Tensor:
    """(n, 16) int8 from strings of 16 ASCII digits."""
    flat = bytearray("".join(grids).encode("ascii"))
    if not flat:
        return torch.zeros(0, 16, dtype=torch.int8)
    return (torch.frombuffer(flat, dtype=torch.uint8) - ord("0")).to(torch.int8).reshape(len(grids), 16)


@cache
def grid_texts() -> frozenset[str]:
    """The 288 complete grids as strings, to ask whether one is among them."""
    return frozenset(to_text(all_grids()))


def codes(puzzles: Tensor) -> Tensor:
    """(n,) int64: a different number for each puzzle."""
    return (puzzles.long() * _PLACES).sum(-1)


def _matches(
    puzzles: Tensor,  # (n, cells), 0 = blank
    grids: Tensor,  # (m, cells)
) -> Tensor:  # (n, m) bool, grid agrees with every given
    one_hot = torch.arange(1, 5, dtype=torch.int8)
    given = (puzzles[:, :, None] == one_hot).flatten(1).float()  # (n, cells * 4)
    holds = (grids[:, :, None] == one_hot).flatten(1).float()  # (m, cells * 4)
    # counts up to 16 are exact in float32, so a matrix product may do the comparison
    return given @ holds.T == (puzzles != 0).sum(1, keepdim=True)


def completions(puzzles: Tensor) -> Tensor:
    """(n, 288) bool: which complete grids agree with the givens of each puzzle (n, 16)."""
    return _matches(puzzles, all_grids())


@cache
def split_grids(split: str) -> Tensor:
    """(m, 16) int8: the solution grids of a split.

    The grids are ordered by a SHA-256 of their digits, a rule that depends on no library's random numbers.
    """
    if split not in SPLIT_SIZES:
        raise ConfigError(f"unknown split '{split}' of sudoku. Known: {', '.join(SPLIT_SIZES)}.")

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"unmask sudoku split {GENERATOR_VERSION} {text}".encode("ascii")).digest()

    ordered = sorted(grid_texts(), key=rank)
    start = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            break
        start += size
    return from_text(ordered[start : start + SPLIT_SIZES[split]])


@cache
def _blank_patterns(num_blanks: int) -> Tensor:
    """(C(16, num_blanks), 16) bool, True = blank."""
    cells = torch.tensor(list(combinations(range(16), num_blanks)))
    return torch.zeros(len(cells), 16, dtype=torch.bool).scatter_(1, cells, True)


def _candidate_order(grids: Tensor, patterns: Tensor, split: str, seed: int) -> Tensor:
    """(m * c,) int64: all pairs (grid, pattern of blanks) in random order; pair i is grid i // c with pattern i % c."""
    noise = Noise(seed).stream(f"sudoku/puzzles/{GENERATOR_VERSION}/{split}")
    pattern_keys = (patterns.long() << torch.arange(16)).sum(1)
    keys = noise.bits(codes(grids)[:, None], pattern_keys)  # (m, c)
    return keys.flatten().argsort(stable=True)


def _first_of_each(values: Tensor) -> Tensor:
    """(n,) bool: True where a value stands for the first time."""
    order = values.argsort(stable=True)
    ranked = values[order]
    first = torch.ones_like(values, dtype=torch.bool)
    first[order[1:]] = ranked[1:] != ranked[:-1]
    return first


def generate_puzzles(
    split: str,
    count: int,
    num_blanks: int,
    seed: int,
    unique: bool = True,
    exclude: Collection[str] = frozenset(),
) -> tuple[Tensor, Tensor]:  # puzzles (count, 16) and their solutions (count, 16), int8
    """Distinct random puzzles whose solution is a grid of the split, each with `num_blanks` blanks.

    All pairs (grid, set of blank cells) are put into a random order that depends on the seed alone; the first `count`
    usable ones are returned. So a smaller count gives the first rows of a larger one, and no pair is ever missed.
    `unique` keeps puzzles with one solution only; puzzles in `exclude` (strings of 16 digits) are left out.

    Raises: ConfigError if there are fewer than `count` such puzzles.
    """
    grids = split_grids(split)
    puzzles, solutions = grids[:0], grids[:0]
    for new_puzzles, new_solutions in _usable(grids, split, num_blanks, seed, unique, exclude):
        puzzles = torch.cat([puzzles, new_puzzles])
        solutions = torch.cat([solutions, new_solutions])
        if not unique:  # two grids can leave the same puzzle only where that puzzle has several solutions
            first = _first_of_each(codes(puzzles))
            puzzles, solutions = puzzles[first], solutions[first]
        if len(puzzles) >= count:
            return puzzles[:count], solutions[:count]
    raise _too_few(split, count, num_blanks, len(grids), len(puzzles), unique)


def generate_spread_puzzles(
    grids: Tensor,  # (m, 16)
    name: str,
    count: int,
    num_blanks: int,
    seed: int,
    exclude: Collection[str] = frozenset(),
) -> tuple[Tensor, Tensor]:  # puzzles (count, 16) and their solutions (count, 16), int8
    """Distinct random puzzles with one solution, as evenly spread over the grids as their number allows; `name` is a
    key of the draw.

    Raises: ConfigError if some grid has too few such puzzles.
    """
    share, num_more = divmod(count, len(grids))
    taken: Counter[str] = Counter()
    puzzles, solutions = grids[:0], grids[:0]
    for new_puzzles, new_solutions in _usable(grids, name, num_blanks, seed, True, exclude):
        keep = []
        for place, solution in enumerate(to_text(new_solutions)):
            is_one_more = taken[solution] == share and num_more > 0
            if taken[solution] < share or is_one_more:
                keep.append(place)
                taken[solution] += 1
                num_more -= is_one_more
        puzzles = torch.cat([puzzles, new_puzzles[keep]])
        solutions = torch.cat([solutions, new_solutions[keep]])
        if len(puzzles) == count:
            return puzzles, solutions
    raise _too_few(name, count, num_blanks, len(grids), len(puzzles), True)


def _usable(
    grids: Tensor, name: str, num_blanks: int, seed: int, unique: bool, exclude: Collection[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(puzzles, solutions), a part at a time, in a random order of all pairs of a grid and a pattern of blanks."""
    patterns = _blank_patterns(num_blanks)
    left_out = codes(from_text(exclude))
    for pairs in _candidate_order(grids, patterns, name, seed).split(_CHUNK):
        solutions = grids[pairs // len(patterns)]
        puzzles = solutions.masked_fill(patterns[pairs % len(patterns)], 0)
        usable = ~torch.isin(codes(puzzles), left_out)
        if unique:
            usable &= completions(puzzles).sum(1) == 1
        yield puzzles[usable], solutions[usable]


def _too_few(name: str, count: int, num_blanks: int, num_grids: int, found: int, unique: bool) -> ConfigError:
    return ConfigError(
        f"sudoku: {count} {name} puzzles with {num_blanks} blanks were asked for, but the {num_grids} grids of this "
        f"split leave only {found}{' with a unique solution' if unique else ''}. "
        f"Ask for fewer, or for a number of blanks nearer 8."
    )


def column_blind_solutions(
    puzzles: Tensor,  # (n, 16)
    ids: Tensor,  # (n,) int64, keys of the draws
    noise: Noise,
) -> Tensor:  # (n, 16) int8
    """One answer for each puzzle, uniform over the grids that keep the givens and get rows and boxes right.

    Columns are ignored. As rows and boxes lie within a band of two rows, a uniform grid is a uniform upper band beside
    an independent uniform lower one: two choices among at most 96 instead of one among 9216.

    Raises: DataError if the givens of a puzzle already break a row or a box.
    Oracle: tests/test_sudoku.py::test_column_blind_draws_are_uniform_over_the_enumerated_grids
    """
    halves = []
    for band in range(2):
        fits = _matches(puzzles[:, 8 * band : 8 * band + 8], _bands())  # (n, 96)
        counts = fits.sum(1)
        if not bool((counts > 0).all()):
            bad = int((counts == 0).nonzero()[0, 0])
            raise DataError(f"puzzle {to_text(puzzles[bad : bad + 1])[0]}: its givens repeat a digit in a row or box.")
        chosen = (noise.uniform(ids, band) * counts).long()  # (n,) the how-manieth fit, below counts as u < 1
        index = (fits.cumsum(1) > chosen[:, None]).int().argmax(1)  # first place where the running count passes it
        halves.append(_bands()[index])
    return torch.cat(halves, 1)
