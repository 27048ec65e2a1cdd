"""Preference pairs: files of prompts with a chosen and a rejected answer, and making them from a run's rollouts.

A row has a prompt, `chosen` and `rejected`, in one of three forms, and may have scores of both answers:

    text           prompt, chosen, rejected: strings
    messages       each a list of {"role", "content"}; chosen and rejected end with the assistant's turn, and may repeat
                   the prompt's turns before it (`prompt` may then be left out)
    conversations  turns {"from", "value"} as the prompt, chosen and rejected one such turn each
    scores         chosen_score and rejected_score, or score_chosen and score_rejected
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmask.demonstrations import messages
from unmask.errors import ConfigError, DataError
from unmask.rows import read_rows
from unmask.types import Example, NoiseLike

Turns = list[dict[str, str]]

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Speakers of a conversation, and how a chat template calls them."""

SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))


@dataclass(frozen=True)
class Preference:
    """One pair. Scores are 1 and 0 where the file has none."""

    example: Example
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    where: str
    """File and place in it, for messages."""


# ---- reading


def read_preferences(source: str, split: str = "train") -> list[Preference]:
    """All rows of a JSON lines file, a JSON array, a file or hub id that the package datasets reads.

    Raises: DataError with file and line for the first row that is no pair of two different answers; ConfigError if
    datasets is needed and not installed.
    """
    pairs = [preference(row, number, where) for number, (where, row) in enumerate(read_rows(source, split), start=1)]
    if not pairs:
        raise DataError(f"{source}: holds no rows. Give one JSON object per line with prompt, chosen and rejected.")
    return pairs


def preference(row: Any, number: int, where: str) -> Preference:
    """One row in any of the forms; `number` keys its noise. Raises: DataError beginning with `where`."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not a JSON object. Give one with prompt, chosen and rejected.")
    row = {key: value for key, value in row.items() if value is not None}
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"{where}: no '{key}'. Give a prompt with a chosen and a rejected answer.")
    prompt = _prompt(row, where)
    found = [_answer(row[key], f"{where}: {key}") for key in ("chosen", "rejected")]
    for before, _ in found:
        if before:
            prompt = _same_prompt(prompt, before, where)
    if prompt is None:
        raise DataError(f"{where}: no 'prompt'. Give 'prompt' or 'conversations', or its turns before both answers.")
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise DataError(f"{where}: the prompt ends with a turn of {prompt[-1]['role']!r}. The user's must be the last.")
    (_, chosen), (_, rejected) = found
    for key, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not text or (isinstance(text, str) and not text.strip()):
            raise DataError(f"{where}: {key} is empty. Drop the row.")
    if chosen == rejected:
        raise DataError(f"{where}: chosen equals rejected, so nothing is preferred. Drop the row.")
    good, bad = _scores(row, where)
    return Preference(Example(number, prompt), chosen, rejected, good, bad, where)


def _prompt(row: Mapping[str, Any], where: str) -> str | Turns | None:
    """What the row says about the prompt itself."""
    if "conversations" in row:
        return _turns(row["conversations"], f"{where}: conversations")
    prompt = row.get("prompt")
    return prompt if prompt is None or isinstance(prompt, str) else _turns(prompt, f"{where}: prompt")


def _answer(value: Any, where: str) -> tuple[Turns, str]:
    """(turns before the answer, its text)."""
    if isinstance(value, str):
        return [], value
    turns = _turns([value] if isinstance(value, dict) else value, where)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: ends with a turn of {turns[-1]['role']!r}. The answer must be the assistant's.")
    return turns[:-1], turns[-1]["content"]


def _turns(value: Any, where: str) -> Turns:
    """Messages, or turns of a conversation as messages."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "from" in turn for turn in value):
        value = [{"role": ROLES.get(str(turn["from"])), "content": turn.get("value")} for turn in value]
        if unknown := [turn for turn in value if turn["role"] is None]:
            raise DataError(f"{where}: {len(unknown)} turns are not of one of {', '.join(ROLES)}. Mend the row.")
    return messages(value, where)


def _same_prompt(prompt: str | Turns | None, before: Turns, where: str) -> Turns:
    """The turns that stand before an answer, if they agree with what is known of the prompt."""
    is_same = prompt is None or prompt == before or [prompt] == [turn["content"] for turn in before]
    if not is_same:
        raise DataError(f"{where}: the turns before an answer are not the prompt, or differ. Mend the row.")
    return before


def _scores(row: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Of chosen and rejected; 1 and 0 if the row has none."""
    for names in SCORES:
        given = [row[name] for name in names if name in row]
        if not given:
            continue
        # an integer may be too large for a float
        is_number = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e300 for v in given)
        if len(given) < 2 or not is_number:
            raise DataError(f"{where}: {names[0]} and {names[1]} must both be finite numbers. Mend the row.")
        if given[0] < given[1]:
            raise DataError(f"{where}: {names[0]} = {given[0]} is below {names[1]} = {given[1]}. Swap the answers.")
        return float(given[0]), float(given[1])
    return 1.0, 0.0


# ---- making


@dataclass(frozen=True)
class Pairs:
    """Rows of a preference file, and where they come from."""

    rows: list[dict[str, Any]]
    num_groups: int
    num_paired: int
    """Groups that gave at least one."""

    @property
    def mean_margin(self) -> float:
        """Mean difference of the two rewards."""
        return sum(row["chosen_score"] - row["rejected_score"] for row in self.rows) / len(self.rows)


def pairs_of_rollouts(
    rollouts: Iterable[Mapping[str, Any]],  # rows of rollouts.jsonl
    *,
    pairs_per_prompt: int,
    last: int | None,
    noise: NoiseLike,
) -> Pairs:
    """From each group (a batch's rollouts of one prompt) some pairs of unequal reward, drawn without replacement.

    `last` keeps the newest batches alone. Empty completions, and two equal ones, make no pair. The draw of a group
    depends on its batch, its prompt and the seed alone. The scores are the rewards.

    Raises: DataError if there is nothing to pair.
    Source: the offline protocol of energy matching (EMBR), which learns from samples of a run during its training;
    R_i > R_j within a prompt.
    """
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rollouts:
        groups.setdefault((row["iteration"], row["prompt_id"]), []).append(row)
    if last is not None:
        newest = sorted({iteration for iteration, _ in groups})[-last:]
        groups = {key: rows for key, rows in groups.items() if key[0] in newest}
    found: list[dict[str, Any]] = []
    num_paired = 0
    for (iteration, prompt_id), rows in groups.items():
        possible = list(_possible_pairs(rows))
        keys = noise.uniform(iteration, prompt_id, torch.arange(len(possible)))
        chosen = sorted(keys.argsort(stable=True)[:pairs_per_prompt].tolist())
        num_paired += bool(chosen)
        found += [_pair(*possible[i]) for i in chosen]
    if not found:
        raise DataError(
            f"nothing to pair: none of {len(groups)} groups holds two completions of unequal reward. "
            "Take more batches, or a run whose rewards differ within a prompt."
        )
    return Pairs(found, len(groups), num_paired)


def _possible_pairs(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for good in rows:
        for bad in rows:
            texts = good["completion"], bad["completion"]
            if good["reward"] > bad["reward"] and all(text.strip() for text in texts) and texts[0] != texts[1]:
                yield good, bad


def _pair(good: Mapping[str, Any], bad: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": good["prompt"],
        "chosen": good["completion"],
        "rejected": bad["completion"],
        "chosen_score": good["reward"],
        "rejected_score": bad["reward"],
        "iteration": good["iteration"],
        "prompt_id": good["prompt_id"],
    }


def read_rollouts(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's rollouts.jsonl. Raises: ConfigError if there is none, DataError for a row of another form."""
    file = run / "rollouts.jsonl"
    if not file.is_file():
        raise ConfigError(f"{run}: no rollouts.jsonl there. Name the directory of a run of `unmask train`.")
    kinds = {"iteration": int, "prompt_id": int, "prompt": str, "completion": str, "reward": int | float}
    rows = []
    for where, row in read_rows(str(file), ""):
        is_good = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        if not is_good:
            raise DataError(f"{where}: has not {', '.join(kinds)} of a rollout. Restore the file.")
        rows.append(row)
    return rows
