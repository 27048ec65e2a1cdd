"""Reading a file of prompts with given completions, for supervised training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.rows import read_text
from unmask.types import Example


def read_demonstrations(path: str | Path) -> list[tuple[Example, str]]:
    """Rows of a JSON lines file as (example, completion text).

    A row is {"prompt": ..., "completion": ...}, each a string or a list of messages, or {"messages": [...]} whose last
    turn is the assistant's: that turn is the completion, all before it the prompt. A completion
    of messages is the content of its one assistant turn.

    Raises: DataError with file and line for a row of another form.
    """
    file = Path(path)
    text = read_text(file)
    # splitlines would also cut at breaks inside a string
    rows = [_row(line, number, file) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise DataError(f"{file}: holds no rows. Give one JSON object per line with prompt and completion.")
    return rows


def _row(line: str, number: int, file: Path) -> tuple[Example, str]:
    where = f"{file} line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON. Give one JSON object per line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not a JSON object. Give one with 'prompt' and 'completion', or 'messages'.")
    prompt: str | list[dict[str, str]]
    completion: str | list[dict[str, str]]
    if "messages" in row:
        turns = messages(row["messages"], f"{where}: messages")
        prompt, completion = turns[:-1], turns[-1:]
        if not prompt:
            raise DataError(f"{where}: messages has a single turn. Give the prompt's turns and the assistant's answer.")
    else:
        missing = [key for key in ("prompt", "completion") if key not in row]
        if missing:
            raise DataError(f"{where}: no '{missing[0]}'. Give 'prompt' and 'completion', or 'messages'.")
        prompt, completion = row["prompt"], row["completion"]
        prompt = prompt if isinstance(prompt, str) else messages(prompt, f"{where}: prompt")
        completion = completion if isinstance(completion, str) else messages(completion, f"{where}: completion")
    if not isinstance(completion, str):
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            raise DataError(f"{where}: the completion must be one assistant turn. Drop the other turns.")
        completion = completion[0]["content"]
    return Example(id=number, prompt=prompt, columns={}), completion


def messages(value: Any, where: str) -> list[dict[str, str]]:
    """Chat turns as they are, checked. Raises: DataError beginning with `where`."""
    good = isinstance(value, list) and bool(value)
    for turn in value if good else ():
        good = good and isinstance(turn, dict) and isinstance(turn.get("role"), str)
        good = good and isinstance(turn.get("content"), str)
    if not good:
        raise DataError(f"{where}: must be a string or a list of messages with 'role' and 'content'. Mend the row.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
