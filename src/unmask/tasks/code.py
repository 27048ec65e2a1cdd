"""HumanEval(+), MBPP(+) and AceCoder rows, and programs that read standard input: judged in the sandbox."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from unmask.errors import ConfigError
from unmask.sandbox.backends import SandboxConfig, open_sandbox
from unmask.sandbox.literal import tree
from unmask.sandbox.verdicts import Limits, Program, Sandbox, Verdict
from unmask.tasks import mbpp_prompt
from unmask.tasks.acecoder import hard_rows
from unmask.tasks.common import held_out, require_at_least, require_choices
from unmask.tasks.evalplus import evalplus, mended
from unmask.tasks.prompts import Messages, PromptStyle, with_opening
from unmask.tasks.questions import QuestionTask
from unmask.tasks.stdio import is_stdio_row, stdio
from unmask.types import Example, Score, Status

REWARDS = {"solved": (0.0, 0.0), "tests": (1.0, 0.0), "espo": (1.0, 1.0), "coupled_grpo": (2.0, 0.5)}
"""Factors of (share of tests passed, format); "solved" is 1 for all tests, else 0."""

_SYSTEM = (
    "You are an expert programmer. Answer with one Python program in a single ```python code block at the end of your "
    "reply, and write nothing after it."
)
_FENCE = "```"
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Code(QuestionTask):
    """Programs from prompts with tests. Nothing is run without confinement: where there is none, it is refused."""

    prompt: str = "chat"
    """"chat": asks for one code block at the end of the reply. "complete": the model goes on behind the prompt.
    "mbpp", "mbpp_text": MBPP's own with `num_shots` of its examples, as turns or as one text; the program ends at
    [DONE]."""
    shots_data: str | None = None
    """Where the examples of "mbpp" are: rows with MBPP's tasks 2, 3 and so on, a file or a hub id, whose split "prompt"
    is read. None: those of `data`. What is shown is not scored."""
    reward: str = "solved"
    """"solved": 1 if all tests pass, else 0. "tests": the share that passes. "espo": share + format. "coupled_grpo":
    2 · share + format / 2. Format: 1 for exactly one block at the end that parses, 0.5 if it does not parse, else 0;
    where format counts, tests count only if it is 1."""
    difficulty: str = "all"
    """Training rows. "hard": of AceCoder's those that DiffuCoder and ESPO train on, by the pass rates recorded with
    them; it is made of all rows, so name the whole set. "all": no choice."""
    cpu_seconds: float = 2.0
    """CPU time of one program over all its tests. Some references need more (docs/tasks.md)."""
    memory_mib: int = 512
    """Address space of one program."""
    num_workers: int = 1
    """Programs that run at a time."""
    copies_back: bool = False
    """Tests see what a call does to its arguments, as AceCoder's runner does. A program that empties a list then passes
    f(x) == sorted(x)."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Where they run: on this machine, or where `url` points (docs/sandbox.md)."""

    name: ClassVar[str] = "code"
    expected: ClassVar[str] = (
        "Give rows of HumanEval, MBPP (plain, or EvalPlus's in either format), AceCoder, or inputs and outputs."
    )
    hub: ClassVar[Mapping[str, str]] = {"train": "TIGER-Lab/AceCode-87K", "test": "openai/openai_humaneval"}
    prompts: ClassVar[Mapping[str, PromptStyle]] = {
        "chat": PromptStyle("{question}", system=_SYSTEM),
        "complete": PromptStyle("{question}", is_chat=False),
        **mbpp_prompt.STYLES,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(self, reward=REWARDS, difficulty=("all", "hard"))
        require_at_least(self, cpu_seconds=0.1, memory_mib=64, num_workers=1)
        if self._is_mbpp and self.num_shots > mbpp_prompt.MAX_SHOTS:
            raise ConfigError(
                f"task.num_shots = {self.num_shots}: MBPP keeps {mbpp_prompt.MAX_SHOTS} tasks from 2 on for prompts. "
                "The published number is 3."
            )
        if self._is_mbpp and REWARDS[self.reward][1]:
            raise ConfigError(
                f"task.reward = {self.reward!r} counts the form of a code block, which prompt {self.prompt!r} does not "
                'ask for. Use "solved" or "tests".'
            )

    def read_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Columns beside question and solution: tests, setup, helpers, names (see `Program`) and task_id."""
        if "base_input" in row:
            return evalplus(row)
        columns = self._columns(row)
        if not columns["tests"] or not (columns["names"] or "stdin" in columns):
            raise ValueError("no test calls a function of the program's, so every program would pass")
        return columns

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if is_stdio_row(row):
            return stdio(row)
        if "entry_point" in row:
            return humaneval(row)
        return acecoder(row) if "test_cases" in row else mbpp(row)

    def raw_rows(self, source: str, split: str, key: str) -> Sequence[tuple[str, Any]]:
        """As they are stored, or the hard ones."""
        rows = super().raw_rows(source, split, key)
        return hard_rows(rows) if split == "train" and self.difficulty == "hard" else rows

    def question(self, columns: Mapping[str, Any]) -> str:
        """What the prompt asks of a row."""
        return mbpp_prompt.question_of(columns) if self._is_mbpp else super().question(columns)

    @property
    def _style(self) -> PromptStyle:
        style = super()._style
        is_text = self._is_mbpp and not style.is_chat
        return replace(style, template=mbpp_prompt.text_of(self._shown) + style.template) if is_text else style

    @property
    def _is_mbpp(self) -> bool:
        return self.prompt in mbpp_prompt.STYLES

    @property
    def _shown(self) -> Sequence[Mapping[str, Any]]:
        """Rows of the examples of MBPP's prompt."""
        if not self.num_shots:
            return []
        source = self.shots_data or self.source("test")
        return mbpp_prompt.shown_rows(self._read(source, "prompt", "task.shots_data"), self.num_shots, source)

    def _shots(self) -> Messages:
        return mbpp_prompt.turns_of(self._shown) if self._is_mbpp else super()._shots()

    def _rows(self, split: str) -> list[tuple[int, dict[str, Any]]]:
        if not self._is_mbpp:
            return super()._rows(split)
        shown = {columns["task_id"] for columns in self._shown}
        read = self._read(self.source(split), "test" if split == "test" else "train")
        rows = [(number, columns) for number, columns in enumerate(read) if columns["task_id"] not in shown]
        return rows if split == "test" else list(held_out(rows, split, self.num_validation, self.source(split)))

    def score(self, example: Example, completion: str) -> Score:
        """One completion alone."""
        return self.score_all([example], [completion])[0]

    def score_all(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Score]:
        """All programs of a batch, as many at a time as there are workers. Facts: accuracy, share of tests, format."""
        pairs = zip(examples, completions, strict=True)
        completions = [with_opening(example.prompt, completion) for example, completion in pairs]
        sources = [
            self.program_text(example, completion) for example, completion in zip(examples, completions, strict=True)
        ]
        programs = [
            self.program(example, source)
            for example, source in zip(examples, sources, strict=True)
            if source is not None
        ]
        verdicts = iter(self.runner.run(programs))
        return [
            self._score(completion, None if source is None else next(verdicts))
            for source, completion in zip(sources, completions, strict=True)
        ]

    @cached_property
    def runner(self) -> Sandbox:
        """Started when the first program is judged. Raises: SandboxUnavailable if none is to be had."""
        return open_sandbox(self.sandbox, self.num_workers)

    def program(self, example: Example, source: str) -> Program:
        """The program with the tests of its row."""
        columns = example.columns
        wall = (6 if columns.get("runs_reference") else 3) * self.cpu_seconds
        limits = Limits(self.cpu_seconds, wall, self.memory_mib << 20)
        return Program(
            source,
            columns["tests"],
            columns["names"],
            setup=columns["setup"],
            helpers=columns["helpers"],
            limits=limits,
            copies_back=self.copies_back and not columns["setup"],  # whose checks look at their inputs afterwards
            stdin=columns.get("stdin"),
        )

    def program_text(self, example: Example, completion: str) -> str | None:
        """The program of a completion; None if a block was asked for and there is none."""
        if self.prompt == "complete":
            return str(example.columns["question"]) + until_next_statement(completion)
        if self._is_mbpp:
            answer = completion.partition(mbpp_prompt.DONE)[0]
            found = [code for language, code, _ in blocks(answer) if is_python(language)]
            return mbpp_prompt.program_in(completion, found[0] if found else None)
        code = last_block(completion)
        return None if code is None else imports_of(example.columns["question"]) + code

    def _score(self, completion: str, verdict: Verdict | None) -> Score:
        form = block_format(completion)
        if verdict is None:
            return Score(0.0, Status.UNPARSED, {"accuracy": 0.0, "test_share": 0.0, "format": form})
        facts = {"accuracy": float(verdict.status == Status.CORRECT), "test_share": verdict.share, "format": form}
        if self.reward == "solved":
            return Score(facts["accuracy"], verdict.status, facts)
        of_tests, of_format = REWARDS[self.reward]
        counts = not of_format or form == 1.0
        return Score(of_tests * verdict.share * counts + of_format * form, verdict.status, facts)


# ---- rows


def humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    """HumanEval, and HumanEval+ in the original format: the prompt's helpers belong to the tests."""
    name = row["entry_point"]
    return {
        "question": row["prompt"],
        "solution": row["prompt"] + row["canonical_solution"],
        "tests": [f"check({name})"],
        "setup": mended(row["test"], row["task_id"]),
        "helpers": row["prompt"],
        "names": [name],
        "task_id": row["task_id"],
    }


def mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    """MBPP and MBPP+ in the original format, whose `test` holds all inputs; names are those that the tests use."""
    code = row["code"].replace("\r\n", "\n")
    if row.get("test"):
        setup, tests = "", [mended(row["test"], f"Mbpp/{row['task_id']}")]
    else:
        setup, tests = row.get("test_setup_code", ""), list(row["test_list"])
    shown = row["test_list"][0] if row.get("test_list") else ""
    text = row.get("text") or row["prompt"]
    asked = mbpp_prompt.task_and_tests(text, row["test_list"]) if row.get("test_list") else None
    return {
        "task_and_tests": asked,
        "question": f"{text}\nTest cases: {shown}" if shown else text,
        "solution": code,
        "tests": tests,
        "setup": setup,
        "helpers": "",
        "names": defined_and_used(code, [setup, *tests, *row.get("test_list", [])]),
        "task_id": str(row["task_id"]),
    }


def acecoder(row: Mapping[str, Any]) -> dict[str, Any]:
    """AceCoder: the names are those that the assertions call and nobody else defines."""
    tests = list(row["test_cases"])
    names = sorted({name for test in tests for name in called(test)} - set(dir(builtins)))
    names = names or sorted({name for test in tests for name in outermost(test)})  # a task may ask for a `sum`
    question = row["question"]
    if _FENCE not in question and tests:
        question += f"\nTest cases: {tests[0]}"
    return {
        "question": question,
        "solution": "",
        "tests": tests,
        "setup": "",
        "helpers": "",
        "names": names,
        "task_id": str(row.get("id", "")),
    }


def defined_and_used(code: str, tests: Sequence[str]) -> list[str]:
    """Functions and classes at the top of the reference that the tests mention; they may have names of builtins."""
    words = {word for test in tests for word in _WORD.findall(test)}
    kinds = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef
    return [node.name for node in tree(code).body if isinstance(node, kinds) and node.name in words]


def called(test: str) -> set[str]:
    """Plain names that are called in a test. Raises: ValueError if it is no Python."""
    try:
        nodes = ast.walk(tree(test))
    except SyntaxError as error:
        raise ValueError(f"a test is no Python ({error})") from error
    return {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def outermost(test: str) -> set[str]:
    """Plain names whose call is the whole left side of an assertion's comparison, or all of it."""
    checks = [node.test for node in tree(test).body if isinstance(node, ast.Assert)]
    sides = [check.left if isinstance(check, ast.Compare) else check for check in checks]
    return {s.func.id for s in sides if isinstance(s, ast.Call) and isinstance(s.func, ast.Name)}


# ---- completions


def blocks(text: str) -> list[tuple[str, str, int]]:
    """(language, code, where it ends) of every closed code block."""
    found: list[tuple[str, str, int]] = []
    place = 0
    while True:
        start = text.find(_FENCE, place)
        line = text.find("\n", start)
        end = text.find(_FENCE, line) if start >= 0 and line >= 0 else -1
        if end < 0:
            return found
        found.append((text[start + len(_FENCE) : line].strip(), text[line + 1 : end], end + len(_FENCE)))
        place = end + len(_FENCE)


def last_block(text: str) -> str | None:
    """The last code block in Python or without a language."""
    code = [code for language, code, _ in blocks(text) if is_python(language)]
    return code[-1] if code else None


def is_python(language: str) -> bool:
    """Whether a block says that it is Python, or nothing."""
    return language.lower() in ("python", "py", "python3", "")


def block_format(text: str) -> float:
    """1 for exactly one Python block, at the end, that parses; 0.5 if it does not parse; else 0."""
    found = blocks(text)
    if len(found) != 1 or found[0][0].lower() != "python" or text[found[0][2] :].strip():
        return 0.0
    return 1.0 if parses(found[0][1]) else 0.5


def parses(code: str) -> bool:
    """Whether a text is Python; parsing runs nothing, and its size is bounded first."""
    if len(code) > 1 << 16 or max((len(line) - len(line.lstrip()) for line in code.split("\n")), default=0) > 400:
        return False
    try:
        tree(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def imports_of(question: str) -> str:
    """The imports at the top of a prompt that is Python, which an answer may leave out."""
    if not parses(question):
        return ""
    body = tree(question).body
    return "".join(ast.unparse(n) + "\n" for n in body if isinstance(n, ast.Import | ast.ImportFrom))


def until_next_statement(completion: str) -> str:
    """A function's body: up to the first line that begins at the margin with something new."""
    lines = completion.split("\n")
    for number, line in enumerate(lines[1:], start=1):
        if line[:1] not in ("", " ", "\t", ")", "]", "}", "#") and not line.startswith(
            ("def ", "import ", "from ", "@")
        ):
            return "\n".join(lines[:number]) + "\n"
    return completion
