"""AceCoder's rows: which are hard, by the pass rates of the models that are recorded with them, and their second form.

Columns: `id`, `question`, `test_cases` (assertions), and for the choice `inferences`, a list of
{"completion", "model_name", "pass_rate"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unmask.errors import DataError

MODELS = ("qwen_coder_2.5", "llama3_instruct")
"""Those whose pass rates count."""
MAX_MEAN, MIN_SPREAD = 20, 40
"""Percentiles, over all rows, of the mean pass rate and of its standard deviation: DiffuCoder, arXiv:2506.20639, and
ESPO, arXiv:2512.03759."""

Row = tuple[str, Any]
"""(place in the file, row)."""


def hard_rows(rows: Sequence[Row]) -> list[Row]:
    """The hard ones: a mean pass rate among the lowest 20 % of all rows, and a standard deviation not among the lowest
    40 %, so that not everything failed. Each is followed by its second form if it has one.

    Raises: DataError for a row without pass rates.
    """
    if not rows:
        return []
    rates = [pass_rates(row, where) for where, row in rows]
    means, spreads = (np.array([function(of_row) for of_row in rates]) for function in (np.mean, np.std))
    is_hard = (means <= np.percentile(means, MAX_MEAN)) & (spreads >= np.percentile(spreads, MIN_SPREAD))
    found: list[Row] = []
    for (where, row), hard in zip(rows, is_hard, strict=True):
        if hard:
            second = to_complete(row)
            found += [(where, row)] + ([] if second is None else [(f"{where} (as a function to complete)", second)])
    if not found:
        raise DataError(f"task.difficulty = 'hard': none of {len(rows)} rows is. Give all rows of AceCoder.")
    return found


def pass_rates(row: Any, where: str) -> list[float]:
    """Of the completions of the models that count. Raises: DataError if there is none, or one is no number."""
    try:
        rates = [float(made["pass_rate"]) for made in row["inferences"] if made["model_name"] in MODELS]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: task.difficulty = 'hard' needs inferences with model_name and pass_rate ({error!r}). Use 'all'."
        ) from error
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise DataError(
            f"{where}: task.difficulty = 'hard' needs pass rates from 0 to 1 of {' or '.join(MODELS)}. Use 'all'."
        )
    return rates


def to_complete(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row with its question as the docstring of a function to complete, headed as the best recorded completion is;
    None for a question that speaks to the reader, or if that completion does not begin with a function."""
    question = str(row["question"])
    if "you" in question.lower():
        return None
    best = max(row["inferences"], key=lambda made: float(made["pass_rate"]))
    head = str(best.get("completion", "")).partition(":\n")[0].strip()
    if not head.startswith("def "):
        return None
    text = f'Please complete the following problem:\n```\n{head}:\n    """\n    {question}\n    """\n```\n'
    return {**row, "question": text}
