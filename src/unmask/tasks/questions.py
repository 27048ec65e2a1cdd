"""What tasks of questions with one answer share: files and hub data, splits, prompt styles, examples in the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unmask.errors import ConfigError, DataError
from unmask.rows import cached_rows
from unmask.tasks.common import LeavesLengthToSampler, first_id, held_out, require_at_least
from unmask.tasks.prompts import Messages, PromptStyle, opened
from unmask.types import Example


def one_line(error: Exception) -> str:
    """The text of an exception, shortened to a line."""
    return " ".join(str(error).split())[:120]


@dataclass(frozen=True)
class QuestionTask(LeavesLengthToSampler):
    """Questions from a file or the hub. Validation is the end of the training rows; test rows are never trained on."""

    prompt: str = "d1"
    """A prompt style by name (docs/tasks.md), or a text with "{question}" that is given to the model as it stands."""
    num_shots: int = 0
    """Examples in front of the question, as turns of a conversation: the first rows of the training data."""
    num_validation: int = 256
    """Rows at the end of the training data that are kept for validation."""
    data: str | None = None
    """Test rows: a file, a hub id `owner/name` or `owner/name:configuration`. None: the published set on the hub."""
    train_data: str | None = None
    """Training rows, likewise."""
    opening: str = ""
    """What the answer begins with in a chat prompt: the model goes on from it, and is judged with it. "<reasoning>" in
    the evaluations of d1 and ESPO."""

    judges_rows: ClassVar[bool] = True
    """A verdict is its row's own affair: a batch may be judged in parts, in another thread."""
    name: ClassVar[str]
    prompts: ClassVar[Mapping[str, PromptStyle]]
    hub: ClassVar[Mapping[str, str]]
    """Published sets, by "train" and "test"."""

    def __post_init__(self) -> None:
        if self.prompt not in self.prompts and "{question}" not in self.prompt:
            raise ConfigError(
                f"task.prompt = {self.prompt!r}: use one of {', '.join(self.prompts)}, or a text with {{question}}."
            )
        require_at_least(self, num_shots=0, num_validation=1)

    def source(self, split: str) -> str:
        """Where a split comes from, as evaluation rows name it."""
        given = self.data if split == "test" else self.train_data
        return given or self.hub["test" if split == "test" else "train"]

    def examples(self, split: str) -> list[Example]:
        """The questions of "train", "validation" or "test", with the columns of `read_row`."""
        offset, style, shots = first_id(split, self.name), self._style, self._shots()
        return [
            Example(
                offset + row,
                opened(style.render({"question": self.question(columns)}, shots), self.opening or style.opening),
                columns,
            )
            for row, columns in self._rows(split)
        ]

    def question(self, columns: Mapping[str, Any]) -> str:
        """What the prompt asks of a row."""
        return str(columns["question"])

    def read_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Columns `question`, `solution` and `answer` of a row of the data. Raises: KeyError, TypeError, ValueError."""
        raise NotImplementedError

    @property
    def _style(self) -> PromptStyle:
        return self.prompts.get(self.prompt) or PromptStyle(self.prompt, is_chat=False)

    def _rows(self, split: str) -> list[tuple[int, dict[str, Any]]]:
        """(row of the file, columns), without the rows that are shown as examples."""
        rows = list(enumerate(self._read(self.source(split), "test" if split == "test" else "train")))
        if split == "test":
            return rows
        return list(held_out(rows, split, self.num_validation, self.source(split), self.num_shots))

    def _read(self, source: str, split: str, key: str = "") -> Sequence[dict[str, Any]]:
        key = key or ("task.data" if split == "test" else "task.train_data")
        rows = []
        for where, row in self.raw_rows(source, split, key):
            try:
                rows.append(self.read_row(row))
            except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as error:
                raise DataError(f"{where}: is no row of {self.name} ({one_line(error)}). {self.expected}") from error
        return rows

    def raw_rows(self, source: str, split: str, key: str) -> Sequence[tuple[str, Any]]:
        """(place, row) as they are stored. `key` is what the user calls the source."""
        return cached_rows(source, split, key)

    def _shots(self) -> Messages:
        if not self.num_shots:
            return []
        turns: Messages = []
        for columns in self._read(self.source("train"), "train")[: self.num_shots]:
            turns.append({"role": "user", "content": str(self._style.render({"question": columns["question"]}))})
            turns.append({"role": "assistant", "content": columns["solution"]})
        return turns

    expected: ClassVar[str] = ""
    """What a row has to look like, for messages."""
