"""4x4 Sudoku: prompts, generated or published puzzles, the judge of answers and demonstrations for supervised training.

Two questions are kept apart. Does the answer solve the puzzle (`accuracy`: a legal grid that keeps the givens)? Does it
equal the stored solution (`match_accuracy`, `cell_accuracy`: blank cells only, as the papers count)? They differ where
a puzzle has several solutions, a quarter of d1's test file, and where an answer changes a given.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, tensor

from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.tasks.answers import last_answer
from unmask.tasks.common import first_id, require_choice, require_choices, require_counts
from unmask.tasks.prompts import opened, with_opening
from unmask.tasks.sudoku_files import drawn_puzzles, read_puzzles, scored_puzzles
from unmask.tasks.sudoku_grids import (
    MAX_BLANKS,
    column_blind_solutions,
    from_text,
    generate_puzzles,
    generate_spread_puzzles,
    grid_texts,
    split_grids,
    to_text,
)
from unmask.tasks.sudoku_shots import chosen_shots, generated_shots, worked_example
from unmask.types import Example, Score, Status

FORMS = ("digits", "lines", "tags")
PARSERS = ("strict", "d1")
GRIDS = ("three_way", "spg")

_FACTS = ("accuracy", "match_accuracy", "cell_accuracy")

_NOT_DIGITS = bytes(b for b in range(128) if chr(b) not in string.digits)

_D1_PROMPT = """Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading \
left-to-right, top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>

Solve the following Sudoku puzzle: {puzzle}"""

# ESPO, arXiv:2512.03759, Appendix H.1
_ESPO_PROMPT = """Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string \
reading left-to-right, top-to-bottom, where '0' represents empty cells.

**Rules:**
- Fill empty cells with digits 1-4.
- Each row must contain digits 1-4 exactly once.
- Each column must contain digits 1-4 exactly once.
- Each 2x2 box must contain digits 1-4 exactly once.

**Example:**
Puzzle: 0401002010030310
This puzzle grid looks like this:
0 4 | 0 1
0 0 | 2 0
----+----
1 0 | 0 3
0 3 | 1 0

Solution: 2431312412434312
The solved grid looks like this:
2 4 | 3 1
3 1 | 2 4
----+----
1 2 | 4 3
4 3 | 1 2

**Important:** Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>

Now, solve the following Sudoku puzzle: {puzzle}"""

_QUERY = "Solve the following Sudoku puzzle: {puzzle}"
_SPG_PROMPT = _D1_PROMPT.removesuffix(_QUERY) + f"{{examples}}\n\nQuestion: {_QUERY}\nAnswer:\n"

_DREAM_SYSTEM = "You are an AI assistant skilled at solving Sudoku puzzles."

_DREAM_PROMPT = """Fill the positions where the values are 0 in a 4x4 grid with digits 1-4 so that each column, \
each row, and each of the four 2x2 subgrids that compose the grid contains all of the digits from 1 to 4.

Input:
0321
0030
0400
2100
Output:
4321
1234
3412
2143

Input:
{puzzle}
Output:"""


@dataclass(frozen=True)
class PromptStyle:
    """How a puzzle is put to the model, and the form in which its answer is read.

    `form` is "digits" (the completion is the 16 digits), "lines" (four lines of four) or "tags" (between <answer> and
    </answer>).
    """

    template: str
    form: str
    is_chat: bool = False
    system: str = ""


PROMPTS = {
    "raw": PromptStyle("{puzzle}|", "digits"),
    "d1": PromptStyle(_D1_PROMPT, "tags", is_chat=True),
    "espo": PromptStyle(_ESPO_PROMPT, "tags", is_chat=True),
    "spg": PromptStyle(_SPG_PROMPT, "tags", is_chat=True),
    "dream": PromptStyle(_DREAM_PROMPT, "lines", is_chat=True, system=_DREAM_SYSTEM),
}


@dataclass(frozen=True)
class Sudoku:
    """4x4 Sudoku. Generated puzzles have one solution; training and test never share a solution grid."""

    prompt: str = "raw"
    """"raw": the 16 cells and "|". "d1", "espo", "dream": the papers' chat messages. "spg": d1's with three
    worked examples of training grids, which are in no split. Anything else is a template with
    "{puzzle}", given to the model as it stands, without chat markup; answers are read from <answer> tags if it has
    them, else they are the whole completion."""
    reward: str = "cells"
    """"cells": share of the blank cells that equal the stored solution (the papers' reward). "solved": 1 for a legal
    grid that keeps the givens, else 0."""
    parser: str = "strict"
    """"strict": the answer must be exactly 16 digits. "d1": digits are picked out, cut to 16 or padded with 0."""
    num_blanks: int = 8
    """Blank cells of a generated puzzle, 1 to 12."""
    num_train: int = 20_000
    """Generated training puzzles."""
    num_validation: int = 256
    """Generated validation puzzles."""
    num_test: int = 2_000
    """Generated test puzzles."""
    seed: int = 0
    """Draws the puzzles and the demonstrations; the split of the grids does not depend on it."""
    grids: str = "three_way"
    """Solution grids of generated puzzles. "three_way": 200 for training, 40 for validation, 48 for the test. "spg"
    (arXiv:2510.09541): 200 for training and the other 88 for the test, over which its puzzles are spread evenly;
    validation puzzles are others of the training grids."""
    data: str | None = None
    """CSV or JSON lines file whose puzzles are the test split."""
    train_data: str | None = None
    """CSV or JSON lines file whose puzzles are the training split."""
    exclude: tuple[str, ...] = ()
    """Files whose puzzles are kept out of the training split."""
    teacher: str = "column_blind"
    """Demonstrations. "column_blind": a random answer with right rows and boxes. "exact": the stored solution."""
    num_demonstrations: int = 8_000
    """Demonstrations at most: one for each of the first examples of the split."""
    num_drawn: int | None = None
    """Puzzles of `data` at most: those that the scripts of d1 and ESPO draw, which is 256. None: all of them."""
    opening: str = ""
    """What the answer begins with in a chat prompt: the model goes on from it, and is judged with it. "<reasoning>" in
    the evaluations of d1 and ESPO."""

    def __post_init__(self) -> None:
        if "{puzzle}" not in self.prompt:
            require_choice("prompt", self.prompt, PROMPTS, " A template must contain '{puzzle}'.")
        require_choices(
            self, reward=("cells", "solved"), parser=PARSERS, teacher=("column_blind", "exact"), grids=GRIDS
        )
        if not 1 <= self.num_blanks <= MAX_BLANKS:
            raise ConfigError(
                f"task.num_blanks = {self.num_blanks}: 1 to {MAX_BLANKS} are possible, as no puzzle with fewer than 4 "
                f"givens has a unique solution. The recipes use 8."
            )
        require_counts(self, "num_train", "num_validation", "num_test", "num_demonstrations")
        if self.num_drawn is not None and self.num_drawn < 1:
            raise ConfigError(f"task.num_drawn = {self.num_drawn}: must be at least 1. The papers' is 256.")
        if isinstance(self.exclude, str):
            raise ConfigError(f"task.exclude = '{self.exclude}': a list of files is required. Put it in brackets.")

    @property
    def gen_length(self) -> int | None:
        """Completion length in tokens that goes with the prompt; None where it depends on the model's tokenizer."""
        return 16 if self.prompt == "raw" else None

    @property
    def num_steps(self) -> int | None:
        """Denoising steps that go with `gen_length`."""
        return 16 if self.prompt == "raw" else None

    def examples(self, split: str) -> list[Example]:
        """The puzzles of "train", "validation" or "test".

        Columns: `puzzle`, `solution` (strings of 16 digits) and `seen_grid`, whether the training split has a puzzle
        with this solution (for generated training puzzles: whether it is one of the 200 training grids).
        """
        offset, seen, style = first_id(split, "sudoku"), self._training_grids(), self._with_shots(self._style)
        return [
            Example(
                id=offset + row,
                prompt=opened(render_prompt(style, puzzle), self.opening),
                columns={"puzzle": puzzle, "solution": solution, "seen_grid": solution in seen},
            )
            for row, puzzle, solution in self._puzzles(split)
        ]

    def score(self, example: Example, completion: str) -> Score:
        """Judge one completion. Facts: `accuracy` (legal grid, givens kept; any solution counts), `match_accuracy` (all
        blanks equal the stored solution; givens are not looked at), `cell_accuracy` (share of such blanks)."""
        puzzle, solution = example.columns["puzzle"], example.columns["solution"]
        answer = parse_answer(with_opening(example.prompt, completion), self._style.form, self.parser)
        if answer is None:
            return Score(0.0, Status.UNPARSED, dict.fromkeys(_FACTS, 0.0))
        blanks = [i for i in range(16) if puzzle[i] == "0"]
        cell_accuracy = sum(answer[i] == solution[i] for i in blanks) / len(blanks)
        keeps_givens = all(given in ("0", cell) for given, cell in zip(puzzle, answer, strict=True))
        solved = keeps_givens and answer in grid_texts()
        value = float(solved) if self.reward == "solved" else cell_accuracy
        facts = (float(solved), float(cell_accuracy == 1.0), cell_accuracy)
        return Score(value, Status.CORRECT if solved else Status.WRONG, dict(zip(_FACTS, facts, strict=True)))

    def demonstrations(self, split: str = "train") -> list[tuple[Example, str]]:
        """The first `num_demonstrations` examples of a split, each with the teacher's answer as a completion."""
        examples = self.examples(split)[: self.num_demonstrations]
        answers = [example.columns["solution"] for example in examples]
        if self.teacher == "column_blind":
            puzzles = from_text([example.columns["puzzle"] for example in examples])
            noise = Noise(self.seed).stream("sudoku/demonstrations")
            answers = to_text(column_blind_solutions(puzzles, _ids(examples), noise))
        texts = [render_answer(self._style, answer) for answer in answers]
        return [(e, text.removeprefix(with_opening(e.prompt, ""))) for e, text in zip(examples, texts, strict=True)]

    def stratum(self, example: Example) -> str:
        """Evaluation reports puzzles whose solution grid was trained on apart from the others."""
        return "seen_grids" if example.columns["seen_grid"] else "unseen_grids"

    def source(self, split: str) -> str:
        """Where the puzzles of a split come from, as evaluation rows name it: a file or "generated:<split>"."""
        return {"train": self.train_data, "test": self.data}.get(split) or f"generated:{split}"

    @property
    def _style(self) -> PromptStyle:
        if self.prompt in PROMPTS:
            return PROMPTS[self.prompt]
        return PromptStyle(self.prompt, "tags" if "<answer>" in self.prompt else "digits")

    def _with_shots(self, style: PromptStyle) -> PromptStyle:
        """The style with its examples in place."""
        examples = "\n\n".join(worked_example(*shot) for shot in self._shots())
        return replace(style, template=style.template.replace("{examples}", examples)) if examples else style

    def _shots(self) -> list[tuple[str, str]]:
        """(puzzle, solution) that the prompt shows: of the training file if there is one."""
        if self.prompt != "spg":
            return []
        if self.train_data is None:
            return generated_shots()
        return chosen_shots(((r.puzzle, r.solution) for r in scored_puzzles(self.train_data)), self.train_data)

    def _puzzles(self, split: str) -> list[tuple[int, str, str]]:
        """(row, puzzle, solution); the row is the one in the file, or counts from 0."""
        exclude = {puzzle for puzzle, _ in self._shots()}
        if split == "train":
            exclude |= {row.puzzle for path in self.exclude for row in read_puzzles(path)}
        path = {"train": self.train_data, "test": self.data}.get(split)
        if path is not None:
            scored = scored_puzzles(path)
            if split == "test" and self.num_drawn is not None:
                scored = drawn_puzzles(scored, self.num_drawn)
            rows = [(r.index, r.puzzle, r.solution) for r in scored if r.puzzle not in exclude]
            if not rows:
                raise ConfigError(f"task.exclude leaves no puzzle of {path}: all of them stand in the excluded files.")
            return rows
        return list(zip(itertools.count(), *map(to_text, self._generated(split, exclude)), strict=False))

    def _generated(self, split: str, exclude: set[str]) -> tuple[Tensor, Tensor]:
        """Puzzles and solutions of a split."""
        count = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}[split]
        if self.grids == "three_way" or split == "train":
            return generate_puzzles(split, count, self.num_blanks, self.seed, exclude=exclude)
        if split == "test":
            others = torch.cat([split_grids("validation"), split_grids("test")])
            return generate_spread_puzzles(others, "test", count, self.num_blanks, self.seed, exclude)
        exclude |= {puzzle for _, puzzle, _ in self._puzzles("train")}
        return generate_spread_puzzles(split_grids("train"), "validation", count, self.num_blanks, self.seed, exclude)

    def _training_grids(self) -> set[str]:
        if self.train_data is None:
            return set(to_text(split_grids("train")))
        return {solution for _, _, solution in self._puzzles("train")}


def render_prompt(style: PromptStyle, puzzle: str) -> str | list[dict[str, str]]:
    """The text of a plain style, the messages of a chat style."""
    cells = _as_lines(puzzle) if style.form == "lines" else puzzle
    text = style.template.replace("{puzzle}", cells)  # str.format would trip over other braces
    if not style.is_chat:
        return text
    system = [{"role": "system", "content": style.system}] if style.system else []
    return [*system, {"role": "user", "content": text}]


def render_answer(style: PromptStyle, answer: str) -> str:
    """A completion that gives the 16 digits in the form the prompt asks for."""
    if style.form == "lines":
        return _as_lines(answer)
    return f"<reasoning>\n</reasoning>\n<answer>\n{answer}\n</answer>" if style.form == "tags" else answer


def parse_answer(completion: str, form: str, parser: str = "strict") -> str | None:
    """The 16 digits of an answer, or None if there is none. Every form takes time linear in the text.

    "strict": `form` "digits" and "tags" want exactly 16 digits with white space around them, "lines" four lines of
    four. "d1" (dllm-reasoning/d1, reward_func.py): all digits, cut to 16 or padded on the right with 0; we count ASCII
    digits only, where the published code keeps any character that is a digit in Unicode (it never equals a cell).
    With "tags" the last answer that is closed counts; of nested ones "strict" takes the inner, "d1" the outer.
    """
    if form not in FORMS or parser not in PARSERS:
        raise ValueError(f"parse_answer: form '{form}' and parser '{parser}' must be among {FORMS} and {PARSERS}.")
    if form == "tags":
        content = last_answer(completion, outer=parser == "d1")
        if content is None:
            return None
        completion = content
    if parser == "d1":
        digits = completion.encode("ascii", "ignore").translate(None, _NOT_DIGITS).decode("ascii")
        return digits[:16].ljust(16, "0") if digits else None
    if form == "lines":
        lines = completion.split(None, 4)  # five parts are enough to know that there are too many
        if [len(line) for line in lines] != [4, 4, 4, 4]:
            return None
        completion = "".join(lines)
    answer = completion.strip()
    return answer if len(answer) == 16 and answer.isascii() and answer.isdigit() else None


def _as_lines(cells: str) -> str:
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))


def _ids(examples: Sequence[Example]) -> Tensor:
    return tensor([example.id for example in examples])
