"""GSM8K: grade-school problems whose answer is a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from unmask.tasks.answers import after_hash, boxed, last_answer, last_number, parse_number
from unmask.tasks.common import require_choices
from unmask.tasks.prompts import BOXED_INSTRUCTION, D1_BOXED_SYSTEM, XML_INSTRUCTION, PromptStyle, with_opening
from unmask.tasks.questions import QuestionTask
from unmask.tasks.tags import SOFT, STRICT, soft_format, strict_format, tag_count
from unmask.types import Example, Score, Status

REWARDS = ("solved", "d1", "d1_published")
PARSERS = ("strict", "lenient")


@dataclass(frozen=True)
class GSM8K(QuestionTask):
    """Grade-school mathematics (GSM8K). Answers are compared as exact numbers: 1,000 is 1000.00 and $1000."""

    reward: str = "solved"
    """"solved": 1 for the right number, else 0 (ESPO). "d1": 2 for the right number, 0.5 for a whole number in the
    answer, 0.5 each for the loose and the exact form, up to 0.5 for the tags; at most 4. "d1_published": the same with
    the faults of the published code, and the answer compared as text."""
    parser: str = "strict"
    """"strict": the one box, or, where the prompt asks for tags alone, the answer in them. "lenient": the last box,
    else what follows ####, else the tags, else the last number."""

    name: ClassVar[str] = "gsm8k"
    expected: ClassVar[str] = 'Give {"question": ..., "answer": "... #### 18"}.'
    hub: ClassVar[Mapping[str, str]] = {"train": "openai/gsm8k:main", "test": "openai/gsm8k:main"}
    prompts: ClassVar[Mapping[str, PromptStyle]] = {
        "d1": PromptStyle(XML_INSTRUCTION + "\n\n{question}"),
        "d1_boxed": PromptStyle(D1_BOXED_SYSTEM + "\n\n{question}"),
        "espo": PromptStyle("{question}\n" + BOXED_INSTRUCTION),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(self, reward=REWARDS, parser=PARSERS)

    def read_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        answer = after_hash(row["answer"])
        if answer is None or parse_number(answer) is None:
            raise ValueError("no number behind ####")
        return {"question": row["question"], "solution": row["answer"], "answer": answer}

    def score(self, example: Example, completion: str) -> Score:
        """Judge one completion. Facts: `accuracy`, and `format_accuracy` for the loose form of reasoning and answer."""
        completion = with_opening(example.prompt, completion)
        found, wanted = self._number(completion), parse_number(example.columns["answer"])
        is_right = found is not None and found == wanted
        facts = {"accuracy": float(is_right), "format_accuracy": float(soft_format(completion))}
        status = Status.CORRECT if is_right else Status.WRONG if found is not None else Status.UNPARSED
        if self.reward == "solved":
            return Score(float(is_right), status, facts)
        return Score(self._d1(completion, example.columns["answer"], is_right), status, facts)

    def _d1(self, completion: str, answer: str, is_right: bool) -> float:
        published = self.reward == "d1_published"
        if published:
            text = completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()
            is_right, is_whole = text == answer, text.isdigit()
        else:
            found = parse_number(last_answer(completion) or "")
            is_whole = found is not None and found.denominator == 1
        return (
            2.0 * is_right
            + 0.5 * is_whole
            + SOFT * soft_format(completion, published=published)
            + STRICT * strict_format(completion, published=published)
            + tag_count(completion, published=published)
        )

    def _number(self, completion: str) -> Fraction | None:
        boxes = boxed(completion)
        if self.parser == "strict":
            if self.prompt == "d1":
                content = last_answer(completion) or ""
                inner = boxed(content)
                return parse_number(inner[0] if len(inner) == 1 else content)
            return parse_number(boxes[0]) if len(boxes) == 1 else None
        texts = (boxes[-1] if boxes else None, after_hash(completion), last_answer(completion), last_number(completion))
        return next((n for text in texts if text is not None and (n := parse_number(text)) is not None), None)
