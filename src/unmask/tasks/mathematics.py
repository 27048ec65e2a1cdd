"""MATH and MATH-500: competition problems whose answer is an expression."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from unmask.sandbox.math_check import MathVerifier, is_bounded
from unmask.tasks.answers import boxed, last_answer, last_number, parse_number
from unmask.tasks.common import require_at_least, require_choices
from unmask.tasks.prompts import BOXED_INSTRUCTION, D1_BOXED_SYSTEM, XML_INSTRUCTION, PromptStyle, with_opening
from unmask.tasks.questions import QuestionTask
from unmask.types import Example, Score, Status

REWARDS = ("solved", "d1")
PARSERS = ("strict", "lenient")
FORMAT = {(True, True): 1.0, (False, True): 0.75, (True, False): 0.5, (False, False): 0.25}
"""d1's reward for (a box, answer tags): both, tags alone, a box alone, neither."""


_NAME = re.compile(r"[A-Za-z](?:_\{?[A-Za-z0-9]+\}?)?(?:\([A-Za-z]\))?", re.ASCII)
"""x, x_1, f(x)."""


@dataclass(frozen=True)
class Mathematics(QuestionTask):
    """Competition mathematics (MATH). Equal text and equal numbers decide; all else is compared by math-verify."""

    reward: str = "solved"
    """"solved": 1 for an equal answer, else 0 (ESPO). "d1": 2 for an equal answer, and 1, 0.75, 0.5 or 0.25 for the
    form: a box within answer tags, tags alone, a box alone, neither."""
    parser: str = "strict"
    """"strict": exactly one box. "lenient": the last box, else the answer tags, else the last number."""
    num_workers: int = 1
    """Processes that compare answers."""
    deadline: float = 2.0
    """Wall seconds for a comparison; one that takes longer counts as wrong, with the status "timeout"."""

    name: ClassVar[str] = "math"
    expected: ClassVar[str] = 'Give {"problem": ..., "solution": "... \\\\boxed{4}"}, with or without "answer".'
    hub: ClassVar[Mapping[str, str]] = {"train": "ankner/math-500", "test": "HuggingFaceH4/MATH-500"}
    prompts: ClassVar[Mapping[str, PromptStyle]] = {
        "d1": PromptStyle(
            XML_INSTRUCTION + "\n\nYou are a math expert. You will be given a question to solve. Solve it step by "
            "step. Wrap the final answer in a \\boxed{}. \n\n{question}"
        ),
        "d1_boxed": PromptStyle(D1_BOXED_SYSTEM + "\n\n{question}"),
        "espo": PromptStyle("{question}\n" + BOXED_INSTRUCTION),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(self, reward=REWARDS, parser=PARSERS)
        require_at_least(self, num_workers=1, deadline=0.1)

    def read_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        boxes = boxed(row["solution"])
        answer = row.get("answer") or (boxes[-1] if boxes else None)
        if not answer:
            raise ValueError("no answer and no box in the solution")
        return {"question": row["problem"], "solution": row["solution"], "answer": answer}

    def score(self, example: Example, completion: str) -> Score:
        """Judge one completion. Facts: `accuracy`, and `format_accuracy` for exactly one box."""
        completion = with_opening(example.prompt, completion)
        boxes = boxed(completion)
        answer = self._answer(completion, boxes)
        status = Status.UNPARSED if answer is None else self._compare(example.columns["answer"], answer)
        is_right = status == Status.CORRECT
        facts = {"accuracy": float(is_right), "format_accuracy": float(len(boxes) == 1)}
        if self.reward == "solved":
            return Score(float(is_right), status, facts)
        inside = last_answer(completion)
        form = FORMAT[bool(boxed(inside) if inside is not None else boxes), inside is not None]
        return Score(2.0 * is_right + form, status, facts)

    @cached_property
    def verifier(self) -> MathVerifier:
        """The processes that compare, shared by all completions."""
        return MathVerifier(self.num_workers, self.deadline)

    def _answer(self, completion: str, boxes: list[str]) -> str | None:
        if self.parser == "strict":
            return boxes[0] if len(boxes) == 1 and not boxed(boxes[0]) else None
        return next(
            (t for t in (boxes[-1] if boxes else None, last_answer(completion), last_number(completion)) if t), None
        )

    def _compare(self, gold: str, answer: str) -> Status:
        """Cheap comparisons first: they settle most answers."""
        if tidy(gold) == tidy(answer):
            return Status.CORRECT
        numbers = parse_number(gold, has_units=False), parse_number(answer, has_units=False)
        if None not in numbers:
            return Status.CORRECT if numbers[0] == numbers[1] else Status.WRONG
        value = assigned(gold, answer)
        if value is None or not is_bounded(value) or is_set(gold) != is_set(value):
            return Status.WRONG
        verdict = self.verifier.verify(gold, value)
        return {"correct": Status.CORRECT, "timeout": Status.TIMEOUT}.get(verdict, Status.WRONG)


def assigned(gold: str, answer: str) -> str | None:
    """What an answer says that is written as an equation: `x = 42` is 42, `41 = 42` is nothing.

    Where the reference is an equation itself, the whole answer is compared. None for an empty answer too.
    """
    if "=" in gold or "=" not in answer:
        return answer if answer.strip() else None
    left, _, right = answer.partition("=")
    return right if _NAME.fullmatch(left.strip()) and "=" not in right and right.strip() else None


def is_set(text: str) -> bool:
    """Whether an answer as a whole is written in braces: a set is no tuple."""
    return tidy(text).startswith("\\{")


def tidy(text: str) -> str:
    """LaTeX without what does not change its meaning: spaces, \\left, \\right, dollar signs, kinds of fractions."""
    for old, new in (
        ("\\left", ""),
        ("\\right", ""),
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\!", ""),
        ("$", ""),
    ):
        text = text.replace(old, new)
    return "".join(text.split()).removesuffix(".")
