"""Published 4x4 Sudoku files: d1's CSV (Puzzle,Solution) and Dream's JSON lines (input, output).

Every row is checked: a task built on a broken row would score right answers as wrong.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.errors import DataError
from unmask.tasks.sudoku_grids import grid_texts

NUM_FEW_SHOT = 8
"""Rows at the head of a Dream file that its evaluation shows as examples and does not score."""

_EXPECTED = "A Sudoku file is a CSV with the header Puzzle,Solution or JSON lines with input and output."


@dataclass(frozen=True)
class PuzzleRow:
    """One puzzle of a file. `index` counts rows from 0, `line` lines of the file from 1.

    Example: PuzzleRow(index=0, line=2, puzzle="3102200002100320", solution="3142243142131324", is_few_shot=False)
    """

    index: int
    line: int
    puzzle: str
    solution: str
    is_few_shot: bool


def read_puzzles(path: str | Path) -> list[PuzzleRow]:
    """All rows of a file; JSON lines if its name ends so or its text starts with a brace, else CSV.

    Raises: DataError naming file and line if the file or a row cannot be used.
    """
    text = _read_text(Path(path))
    is_jsonl = Path(path).suffix.lower() == ".jsonl" or text.lstrip().startswith("{")
    records = _jsonl_records(text, path) if is_jsonl else _csv_records(text, path)
    rows = []
    for index, (line, puzzle, solution) in enumerate(records):
        _check_row(puzzle, solution, f"{path} line {line}")
        rows.append(PuzzleRow(index, line, puzzle, solution, is_few_shot=is_jsonl and index < NUM_FEW_SHOT))
    if not rows:
        raise DataError(f"{path}: no puzzles in this file, at least one is required. {_EXPECTED}")
    return rows


def scored_puzzles(path: str | Path) -> list[PuzzleRow]:
    """The rows to score: all of a CSV; of a JSON lines file those behind its few-shot examples."""
    rows = read_puzzles(path)
    scored = [row for row in rows if not row.is_few_shot]
    if not scored:
        raise DataError(
            f"{path}: {len(rows)} rows, and the first {NUM_FEW_SHOT} of a JSON lines file are few-shot examples that "
            f"are not scored. Add rows, or write the puzzles as a CSV with the header Puzzle,Solution."
        )
    return scored


def drawn_puzzles(rows: Sequence[PuzzleRow], count: int) -> list[PuzzleRow]:
    """The rows that d1's evaluation draws, in the order of the file: NumPy's legacy generator under seed 42, without
    replacement. All rows if there are no more than `count`."""
    if len(rows) <= count:
        return list(rows)
    chosen = np.random.RandomState(42).choice(len(rows), count, replace=False)
    return [rows[place] for place in sorted(chosen.tolist())]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give the path of a file. {_EXPECTED}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save it as UTF-8 text. {_EXPECTED}") from error
    except ValueError as error:  # a zero byte in the name
        raise DataError(f"{str(path)!r}: cannot be read ({error}). Give the path of a file. {_EXPECTED}") from error


def _csv_records(text: str, path: str | Path) -> Iterator[tuple[int, str, str]]:
    """(line, puzzle, solution) of each row; columns are found by name, further ones are ignored."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in ("Puzzle", "Solution"):
            if name not in header:
                raise DataError(f"{path} line 1: no column '{name}' among {header}. Name it in the first line.")
        puzzle_at, solution_at = header.index("Puzzle"), header.index("Solution")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path} line {reader.line_num}: {len(fields)} fields, the header has {len(header)}. Mend the line."
                )
            yield reader.line_num, fields[puzzle_at].strip(), fields[solution_at].strip()
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: not readable as CSV ({error}). Mend the line.") from error


def _jsonl_records(text: str, path: str | Path) -> Iterator[tuple[int, str, str]]:
    """(line, puzzle, solution) of each object; the line breaks inside a grid are taken out."""
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines would also cut at breaks inside a string
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {line}: not a JSON object ({error}). Write one object a line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{path} line {line}: a JSON {type(record).__name__}, an object is required. {_EXPECTED}")
        grids = []
        for name in ("input", "output"):
            value = record.get(name)
            if not isinstance(value, str):
                found = f"a {type(value).__name__}" if name in record else "missing"
                raise DataError(
                    f"{path} line {line}: '{name}' is {found}. A string of four lines of digits is required."
                )
            grids.append("".join(value.split()))
        yield line, grids[0], grids[1]


def _check_row(puzzle: str, solution: str, where: str) -> None:
    for name, cells, digits in (("puzzle", puzzle, "01234"), ("solution", solution, "1234")):
        shown = cells if len(cells) <= 40 else cells[:40] + "..."
        if len(cells) != 16:
            hint = " A spreadsheet may have dropped leading zeros: keep the column as text." if len(cells) < 16 else ""
            raise DataError(
                f"{where}: {name} '{shown}' has {len(cells)} characters, 16 are required.{hint} Mend the line."
            )
        wrong = next((c for c in cells if c not in digits), None)
        if wrong is not None:
            raise DataError(
                f"{where}: {name} '{shown}' has '{wrong}', only the digits {digits[0]}-4 are allowed"
                f"{' (0 = blank)' if name == 'puzzle' else ''}. Mend the line."
            )
    if "0" not in puzzle:
        raise DataError(f"{where}: puzzle '{puzzle}' has no blank cell, at least one is required. Drop the line.")
    if solution not in grid_texts():
        raise DataError(f"{where}: solution '{solution}' repeats a digit in a row, column or box. Mend the line.")
    for cell, (given, answer) in enumerate(zip(puzzle, solution, strict=True)):
        if given not in ("0", answer):
            raise DataError(
                f"{where}: the solution has {answer} in row {cell // 4 + 1}, column {cell % 4 + 1}, but the puzzle "
                f"gives {given} there. Mend the line."
            )
