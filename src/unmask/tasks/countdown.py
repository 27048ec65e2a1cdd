"""Countdown: write an expression that uses each of the given numbers once and comes to the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch

from unmask.errors import ConfigError, DataError
from unmask.noise import Noise
from unmask.rows import read_rows
from unmask.tasks.answers import boxed, last_answer
from unmask.tasks.arithmetic import MAX_CHARACTERS, is_solvable, parse_expression
from unmask.tasks.common import first_id, held_out, require_choices, require_counts
from unmask.tasks.prompts import XML_INSTRUCTION, PromptStyle, opened, with_opening
from unmask.types import Example, Score, Status

# d1 (arXiv:2504.12216), and ESPO (arXiv:2512.03759) after it
_D1_PROMPT = (
    XML_INSTRUCTION + "\nUsing only the numbers {numbers}, create an arithmetic expression that evaluates to exactly "
    "{target}. You must use all numbers from the list, and each number must be used exactly once. You may use the "
    "operations +, -, *, and / as needed. After reasoning, provide only your final expression inside <answer></answer> "
    "tags without including an equals sign or the target number. For example, if the numbers are [2, 3, 4] and the "
    "target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
)

PROMPTS = {"raw": PromptStyle("{numbers}={target}|", is_chat=False), "d1": PromptStyle(_D1_PROMPT)}

REWARDS = {"d1": 0.1, "solved": 0.0}
"""What an answer in tags is worth that is no solution; a solution is worth 1."""

PARSERS = ("strict", "lenient")


@dataclass(frozen=True)
class Countdown:
    """Countdown. Generated instances are solvable; numbers are 1 to 99, targets 10 to 100, as in the published data.

    The answer is read by a grammar (+ - * / and parentheses over whole numbers), its value is exact.
    """

    prompt: str = "d1"
    """"d1": the papers' chat message (also ESPO's). "raw": the numbers, "=", the target and "|". Anything else is a
    template with "{numbers}" and "{target}", given to the model as it stands; answers are then read from <answer> tags
    if it has them, else they are the whole completion."""
    reward: str = "d1"
    """"d1": 1 for a solution, 0.1 for another answer in tags, 0 without one. "solved": 1 or 0."""
    parser: str = "strict"
    """"strict": the answer between the last <answer> tags, nothing else. "lenient": the last box comes first, then the
    tags; LaTeX operators and what follows an equals sign are taken out (d1's evaluation)."""
    num_numbers: int = 3
    """Numbers of a generated instance, 3 to 5."""
    num_train: int = 4_000
    """Generated training instances."""
    num_validation: int = 256
    """Instances for validation: generated ones, or the last of `train_data`."""
    num_test: int = 256
    """Generated test instances."""
    seed: int = 0
    """Draws the generated instances."""
    data: str | None = None
    """Test split: a file or a hub id with rows {target, nums} or {input, output}."""
    train_data: str | None = None
    """Training split, likewise; "Jiayi-Pan/Countdown-Tasks-3to4" is what the papers train on."""
    only_num_numbers: bool = False
    """Leave out rows of `train_data` with another count of numbers than `num_numbers` (d1 trains on 3)."""

    opening: str = ""
    """What the answer begins with in a chat prompt: the model goes on from it, and is judged with it. "<reasoning>" in
    the evaluations of d1 and ESPO."""

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS and not ("{numbers}" in self.prompt and "{target}" in self.prompt):
            raise ConfigError(
                f"task.prompt = {self.prompt!r}: use one of {', '.join(PROMPTS)}, or a text with {{numbers}} and "
                "{target}."
            )
        require_choices(self, reward=REWARDS, parser=PARSERS)
        if not 3 <= self.num_numbers <= 5:
            raise ConfigError(f"task.num_numbers = {self.num_numbers}: 3, 4 or 5 are possible.")
        require_counts(self, "num_train", "num_validation", "num_test")

    @property
    def gen_length(self) -> int | None:
        """Completion length in tokens that goes with the prompt; None where it depends on the model's tokenizer."""
        return 16 if self.prompt == "raw" else None

    @property
    def num_steps(self) -> int | None:
        """Denoising steps that go with `gen_length`."""
        return self.gen_length

    def examples(self, split: str) -> list[Example]:
        """The instances of "train", "validation" or "test". Columns: `numbers` (list of int) and `target` (int)."""
        offset = first_id(split, "countdown")
        return [self._example(offset + row, list(n), t) for row, (n, t) in enumerate(self._instances(split))]

    def score(self, example: Example, completion: str) -> Score:
        """Judge one completion. Facts: `accuracy`, and `numbers_accuracy` (the right numbers, each once)."""
        answer = self._answer(with_opening(example.prompt, completion))
        if answer is None:
            return Score(0.0, Status.UNPARSED, {"accuracy": 0.0, "numbers_accuracy": 0.0})
        found = parse_expression(answer)
        has_numbers = found is not None and sorted(found.numbers) == sorted(example.columns["numbers"])
        is_right = has_numbers and found is not None and found.value == Fraction(example.columns["target"])
        facts = {"accuracy": float(is_right), "numbers_accuracy": float(has_numbers)}
        if is_right:
            return Score(1.0, Status.CORRECT, facts)
        return Score(REWARDS[self.reward], Status.UNPARSED if found is None else Status.WRONG, facts)

    def stratum(self, example: Example) -> str:
        """Instances are reported apart by how many numbers they have."""
        return f"{len(example.columns['numbers'])}_numbers"

    def source(self, split: str) -> str:
        """Where a split comes from, as evaluation rows name it: a file, a hub id or "generated:<split>"."""
        given = {"train": self.train_data, "validation": self.train_data, "test": self.data}[split]
        return given or f"generated:{split}"

    def _example(self, id_: int, numbers: list[int], target: int) -> Example:
        style = PROMPTS.get(self.prompt) or PromptStyle(self.prompt, is_chat=False)
        shown = ",".join(map(str, numbers)) if self.prompt == "raw" else str(numbers)
        prompt = style.render({"numbers": shown, "target": str(target)})
        return Example(id_, opened(prompt, self.opening), {"numbers": numbers, "target": target})

    def _answer(self, completion: str) -> str | None:
        if self.prompt != "d1" and "<answer>" not in self.prompt:
            return completion.strip()
        answer = last_answer(completion)
        if self.parser == "lenient":
            boxes = boxed(completion)
            answer = boxes[-1] if boxes else answer
            return None if answer is None else plain(answer)
        return None if answer is None else answer.strip()

    def _instances(self, split: str) -> list[tuple[tuple[int, ...], int]]:
        given = {"train": self.train_data, "validation": self.train_data, "test": self.data}[split]
        if given is None:
            count = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}[split]
            return list(generate(split, count, self.num_numbers, self.seed))
        rows = list(read_instances(given, "test" if split == "test" else "train"))
        if split == "test":
            return rows
        if self.only_num_numbers:
            rows = [row for row in rows if len(row[0]) == self.num_numbers]
        return list(held_out(rows, split, self.num_validation, given))


def plain(answer: str) -> str:
    """An expression with LaTeX operators written plainly, without what follows an equals sign; bounded first."""
    answer = answer[: 4 * MAX_CHARACTERS].split("=")[0]
    for latex, sign in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("×", "*"), ("÷", "/"), ("−", "-")):
        answer = answer.replace(latex, sign)
    for bracket in ("\\left", "\\right", "$"):
        answer = answer.replace(bracket, "")
    return answer.strip()


@lru_cache(maxsize=8)
def generate(split: str, count: int, num_numbers: int, seed: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Solvable instances: numbers 1 to 99 with repetition, a target of 10 to 100 that some expression reaches.

    With 3 numbers the target is uniform and kept if a search reaches it (the rule of the published data); with more
    it is what a random expression comes to. No two splits, of whatever seed, share an instance up to the order of its
    numbers. Raises: ConfigError if so many cannot be found.
    """
    noise = Noise(seed).stream("countdown").stream(split).stream(str(num_numbers))
    found: dict[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]] = {}
    for uniforms in _draws(noise, 5 * num_numbers, 2_000 * count):
        numbers = tuple(1 + int(u * 99) for u in uniforms[:num_numbers])
        target = 10 + int(uniforms[-1] * 91) if num_numbers == 3 else random_value(numbers, uniforms[num_numbers:-1])
        if not 10 <= target <= 100 or owner(numbers, target) != split or (tuple(sorted(numbers)), target) in found:
            continue
        if num_numbers > 3 or is_solvable(numbers, target):
            found[tuple(sorted(numbers)), target] = numbers, target
            if len(found) == count:
                return tuple(found.values())
    raise ConfigError(f"task.num_{split} = {count}: so many different instances were not found. Use fewer.")


def _draws(noise: Noise, width: int, count: int, size: int = 4096) -> Iterator[list[float]]:
    """`count` rows of uniforms, made in blocks."""
    for first in range(0, count, size):
        yield from noise.uniform(torch.arange(first, first + size)[:, None], torch.arange(width)).tolist()


def random_value(numbers: tuple[int, ...], uniforms: list[float]) -> int:
    """What a random expression over the numbers comes to; 0 if that is no whole number."""
    values, draws = [Fraction(number) for number in numbers], iter(uniforms)
    while len(values) > 1:
        a, b = (values.pop(int(next(draws) * len(values))) for _ in range(2))
        sign = "+-*/"[int(next(draws) * 4)]
        if sign == "/" and not b:
            return 0
        values.append(a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b)
    return int(values[0]) if values[0].denominator == 1 else 0


def owner(numbers: tuple[int, ...], target: int) -> str:
    """The split that an instance belongs to, whatever the order of its numbers: 8 of 10 to training."""
    code = target
    for number in sorted(numbers):
        code = (code * 101 + number) % 1_000_003
    return {8: "validation", 9: "test"}.get(code % 10, "train")


def read_instances(source: str, split: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """(numbers, target) of each row: {target, nums}, d1's {"input": "30,100,93", "output": "23"}, or Dream's, whose
    input ends with the target and whose output has the steps.

    Raises: DataError with the place of the first other row.
    """
    for where, row in read_rows(source, split, "task.data"):
        try:
            yield _instance(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f'{where}: is no Countdown row. Give {{"target": 98, "nums": [44, 19, 35]}}, or "input" and "output".'
            ) from error


def _instance(row: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    if "nums" in row:
        numbers, target = tuple(row["nums"]), row["target"]
    else:
        listed = [int(part) for part in row["input"].split(",")]
        output = row["output"].strip()
        is_target = output.lstrip("-").isdecimal()
        numbers, target = (tuple(listed), int(output)) if is_target else (tuple(listed[:-1]), listed[-1])
    if len(numbers) < 2 or not all(type(n) is int and n >= 0 for n in (*numbers, target)):
        raise ValueError
    return numbers, target
