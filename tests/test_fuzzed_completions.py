"""Every scorer on completions that no one would write: no exception, no hang, and a verdict for each.

300 of them in CI, 10,000 in `make test-all`.
"""

from __future__ import annotations

import json
import random
import time

import pytest

from unmask.errors import UnmaskError
from unmask.rollout import judge
from unmask.sandbox.pool import SandboxUnavailable
from unmask.tasks import TASKS
from unmask.types import Example

PIECES = (
    "<answer>", "</answer>", "<reasoning>", "</reasoning>", "\\boxed{", "}", "{", "####", "```python\n", "```", "\n",
    " ",
    "1", "42", "9" * 40, "1,234", "-", "+", "*", "/", "**", "//", "(", ")", "^", "^{9^{9^{9}}}", "\\frac{1}{",
    "\\sqrt[3]{",
    "=", "x", "\\left(", "\\right)", "\\text{", "$", "%", "!", "99999!", "\\binom{100000}{50000}", "e", "nan", "inf",
    "\x00", "\ud800", "\u202e", "٣", "１", "²", "\u200b", "\ufeff", "🙂", "é", "def f(x):\n    return x\n",
    "import os\n",
    "while True: pass\n", "\\int_0^1 x dx", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\sum_{n=1}^{\\infty}",
    "\\infty", "\\{1,2\\}", "[0,1)", "\t", "\r", "\\", "'", '"', "0x10", "1e9", "<|endoftext|>", "3142", "1234\n3412\n",
)  # fmt: skip
SHAPES = ("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n",
          "so\n```python\n{}\n```", "#### {}", "<answer>\\boxed{{{}}}</answer>")  # fmt: skip


def completion(draw: random.Random) -> str:
    """A few pieces in a likely shape; now and then one piece very often, or a nesting."""
    kind = draw.random()
    if kind < 0.03:
        body = draw.choice(PIECES) * draw.randint(1, 1_000_000 // 8)
        body = body[:1_000_000]
    elif kind < 0.06:
        depth = draw.randint(10, 5_000)
        left, right = draw.choice(
            [("(", ")"), ("{", "}"), ("[", "]"), ("\\sqrt{", "}"), ("-", ""), ("<answer>", "</answer>")]
        )
        body = left * depth + "1" + right * depth
    else:
        body = "".join(draw.choice(PIECES) for _ in range(draw.randint(0, 14)))
    shape = draw.choice(SHAPES)
    return shape.format(*[body] * shape.count("{}"))


def scorers():
    """(task, example) of everything that reads completions."""
    puzzle = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    for prompt in ("raw", "d1", "dream"):
        for parser in ("strict", "d1"):
            yield TASKS["sudoku"](prompt=prompt, parser=parser, num_test=1), Example(0, "", puzzle)
    yield TASKS["sudoku_twice"](num_test=1), Example(0, "", puzzle)
    for parser in ("strict", "lenient"):
        for prompt in ("raw", "d1"):
            yield (
                TASKS["countdown"](prompt=prompt, parser=parser),
                Example(0, "", {"numbers": [44, 19, 35], "target": 98}),
            )
        for prompt, reward in (("d1", "d1_published"), ("d1", "d1"), ("espo", "solved")):
            yield TASKS["gsm8k"](prompt=prompt, parser=parser, reward=reward), Example(0, "", {"answer": "1,250"})


def num_judged(task, example, texts, *, seconds):
    """How many were judged: with a status, a bounded reward, facts that can be logged, and in time."""
    judged = 0
    for text in texts:
        began = time.process_time()
        (score,) = judge(task, [example], [text])
        assert time.process_time() - began < seconds, (text[:80], len(text))
        assert score.status and -1001 * len(text) <= score.value <= 4
        json.dumps(dict(score.facts))
        judged += 1
    return judged


def texts(count, seed):
    draw = random.Random(seed)
    return [completion(draw) for _ in range(count)]


@pytest.mark.parametrize("number", range(len(list(scorers()))))
def test_fuzzed_completions_are_judged(number):
    task, example = list(scorers())[number]
    assert num_judged(task, example, texts(300, number), seconds=5) == 300


def test_fuzzed_answers_of_math():
    pytest.importorskip("math_verify")
    task = TASKS["math"](parser="lenient", reward="d1", deadline=1.0)
    for gold in ("42", "\\frac{x}{2}"):
        assert num_judged(task, Example(0, "", {"answer": gold}), texts(60, 99), seconds=5) == 60
    task.verifier.close()


@pytest.fixture(scope="module")
def code():
    task = TASKS["code"](cpu_seconds=1.0, reward="espo")
    try:
        yield task if task.runner else None
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    task.runner.close()


TEST_ROW = {"question": "", "tests": ["assert f(1) == 1"], "setup": "", "helpers": "", "names": ["f"]}


def test_fuzzed_programs(code):
    assert num_judged(code, Example(0, "", TEST_ROW), texts(100, 7), seconds=5) == 100


@pytest.mark.slow
def test_ten_thousand_fuzzed_completions(code):
    for number, (task, example) in enumerate(scorers()):
        assert num_judged(task, example, texts(10_000, 1000 + number), seconds=10) == 10_000
    math = TASKS["math"](parser="lenient", deadline=1.0)
    assert num_judged(math, Example(0, "", {"answer": "x+1"}), texts(1_000, 5), seconds=10) == 1_000
    math.verifier.close()
    assert num_judged(code, Example(0, "", TEST_ROW), texts(1_000, 6), seconds=10) == 1_000


def test_the_fuzzer_makes_what_it_should():
    found = texts(300, 0)
    assert (
        max(map(len, found)) > 100_000 and any("\ud800" in text for text in found) and any("9^{9" in t for t in found)
    )
    with pytest.raises(UnmaskError):
        raise SandboxUnavailable("it is one of ours, so that a run ends with one line")
