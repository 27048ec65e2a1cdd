"""HumanEval, HumanEval+, MBPP, MBPP+ and AceCoder rows: programs that have to pass tests, judged in the sandbox."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from unmask.sandbox.backends import SandboxConfig, open_sandbox
from unmask.sandbox.literal import tree
from unmask.sandbox.verdicts import Limits, Program, Sandbox, Verdict
from unmask.tasks.common import require_at_least, require_choices
from unmask.tasks.evalplus import evalplus, mended
from unmask.tasks.prompts import PromptStyle, with_opening
from unmask.tasks.questions import QuestionTask
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
    """"chat": asks for one code block at the end of the reply. "complete": the model goes on behind the prompt."""
    reward: str = "solved"
    """"solved": 1 if all tests pass, else 0. "tests": the share that passes. "espo": share + format. "coupled_grpo":
    2 · share + format / 2. Format: 1 for exactly one block at the end that parses, 0.5 if it does not parse, else 0;
    where format counts, tests count only if it is 1."""
    cpu_seconds: float = 2.0
    """CPU time of one program over all its tests. Some references need more (docs/tasks.md)."""
    memory_mib: int = 512
    """Address space of one program."""
    num_workers: int = 1
    """Programs that run at a time."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Where they run: on this machine, or where `url` points (docs/sandbox.md)."""

    name: ClassVar[str] = "code"
    expected: ClassVar[str] = "Give rows of HumanEval, MBPP (plain, or EvalPlus's in either format), or AceCoder."
    hub: ClassVar[Mapping[str, str]] = {"train": "TIGER-Lab/AceCode-87K", "test": "openai/openai_humaneval"}
    prompts: ClassVar[Mapping[str, PromptStyle]] = {
        "chat": PromptStyle("{question}", system=_SYSTEM),
        "complete": PromptStyle("{question}", is_chat=False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(self, reward=REWARDS)
        require_at_least(self, cpu_seconds=0.1, memory_mib=64, num_workers=1)

    def read_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Columns beside question and solution: tests, setup, helpers, names (see `Program`) and task_id."""
        if "base_input" in row:
            return evalplus(row)
        columns = self._columns(row)
        if not columns["tests"] or not columns["names"]:
            raise ValueError("no test calls a function of the program's, so every program would pass")
        return columns

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if "entry_point" in row:
            return humaneval(row)
        return acecoder(row) if "test_cases" in row else mbpp(row)

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
        )

    def program_text(self, example: Example, completion: str) -> str | None:
        """The program of a completion; None if a block was asked for and there is none."""
        if self.prompt == "complete":
            return str(example.columns["question"]) + until_next_statement(completion)
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
    return {
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
    code = [code for language, code, _ in blocks(text) if language.lower() in ("python", "py", "python3", "")]
    return code[-1] if code else None


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
