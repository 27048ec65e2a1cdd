"""GSM8K and MATH: every reference is right, its neighbour wrong, and hostile answers end in time."""

from __future__ import annotations

import threading
import time

import pytest

from unmask.errors import ConfigError, DataError, RewardError
from unmask.sandbox import math_check
from unmask.sandbox.math_check import MathVerifier, is_bounded
from unmask.tasks import TASKS
from unmask.tasks.answers import parse_number
from unmask.tasks.mathematics import assigned, tidy
from unmask.types import Example, Status

WHOLE = "<reasoning>\nFirst\nthen\n</reasoning>\n<answer>\n{}\n</answer>\n"


def gsm8k(**settings):
    return TASKS["gsm8k"](**({"prompt": "espo"} | settings))


def math(**settings):
    pytest.importorskip("math_verify")
    return TASKS["math"](**({"prompt": "espo"} | settings))


def example(answer):
    return Example(0, "", {"answer": answer})


# ---- GSM8K


def test_every_gsm8k_reference_is_right_and_its_neighbour_wrong(data_dir):
    files = [str(data_dir / "gsm8k" / name) for name in ("test.jsonl", "train_0000-1999.jsonl")]
    task = gsm8k(data=files[0], train_data=files[1])
    examples = [e for split in ("test", "train", "validation") for e in task.examples(split)]
    assert len(examples) == 1319 + 2000 and len({e.id for e in examples}) == 3319
    lenient = gsm8k(data=files[0], train_data=files[1], parser="lenient")
    for row in examples:
        answer = row.columns["answer"]
        number = parse_number(answer)
        assert task.score(row, f"so it is \\boxed{{{answer}}}.").status == Status.CORRECT
        assert task.score(row, f"so it is \\boxed{{{number + 1}}}.").status == Status.WRONG
        assert lenient.score(row, row.columns["solution"]).status == Status.CORRECT


@pytest.mark.parametrize(("completion", "strict", "lenient"), [
    ("\\boxed{1,250}", "correct", "correct"), ("\\boxed{\\$1250.00}", "correct", "correct"),
    ("\\boxed{1250 \\text{ dollars}}", "correct", "correct"), ("\\boxed{1} then \\boxed{1250}", "unparsed", "correct"),
    ("\\boxed{1250} not \\boxed{1}", "unparsed", "wrong"), ("#### 1,250", "unparsed", "correct"),
    ("It is 1250.", "unparsed", "correct"), ("1250 or 1251", "unparsed", "wrong"),
    ("\\boxed{x = 1250}", "unparsed", "correct"),
    ("\\boxed{1250", "unparsed", "correct"), ("\\boxed{125}0", "wrong", "wrong"), ("\\boxed{}", "unparsed", "unparsed"),
    ("\\boxed{12.50}", "wrong", "wrong"), ("\\boxed{-1250}", "wrong", "wrong"),
    ("\\boxed{2500/2}", "correct", "correct"),
    ("\\boxed{\\frac{2500}{2}}", "correct", "correct"), ("", "unparsed", "unparsed"),
    ("twelve fifty", "unparsed", "unparsed"),
    ("\\boxed{1250\n}", "correct", "correct"), ("<answer>1250</answer>", "unparsed", "correct"),
    ("\\boxed{1250%}", "correct", "correct"), ("\\boxed{1249 + 1}", "unparsed", "wrong"),
])  # fmt: skip
def test_hard_gsm8k_answers(completion, strict, lenient):
    row = example("1,250")
    assert gsm8k().score(row, completion).status == strict
    assert gsm8k(parser="lenient").score(row, completion).status == lenient


def test_rewards_of_d1_for_gsm8k():
    row = example("18")
    mended, published = gsm8k(prompt="d1", reward="d1"), gsm8k(prompt="d1", reward="d1_published")
    assert mended.score(row, WHOLE.format(18)).value == 4.0
    assert mended.score(row, WHOLE.format("18.0")).value == 4.0  # an equal number
    assert mended.score(row, WHOLE.format(17)).value == 2.0 and mended.score(row, "").value == 0.0
    assert published.score(row, WHOLE.format(18)).value == 3.0  # its two patterns do not cross lines
    assert published.score(row, "<reasoning>a</reasoning><answer>18</answer>").value == 2.0 + 0.5 + 0.5
    assert published.score(row, WHOLE.format("18.0")).value == 0.5  # neither equal text nor digits
    assert (
        published.score(row, WHOLE.format(18).removesuffix("\n") + "x" * 1000).value
        < mended.score(row, WHOLE.format(18).removesuffix("\n") + "x" * 1000).value
    )
    assert gsm8k(prompt="d1").score(row, WHOLE.format("\\boxed{18}")).status == Status.CORRECT
    assert gsm8k(prompt="d1").score(row, "\\boxed{18}").status == Status.UNPARSED  # tags were asked for


def test_an_opened_answer_is_judged_as_one(data_dir):
    files = {"data": str(data_dir / "gsm8k" / "test.jsonl")}
    task = gsm8k(prompt="d1", reward="d1", opening="<reasoning>", **files)
    row = task.examples("test")[0]
    assert row.prompt[-1] == {"role": "assistant", "content": "<reasoning>"}
    rest = WHOLE.format(18).removeprefix("<reasoning>")
    assert task.score(row, rest).value == 4.0
    assert gsm8k(prompt="d1", reward="d1").score(example("18"), rest).value == 2.5 + 3 * 0.125  # without the form


def test_prompts_and_examples_in_them(data_dir):
    files = {
        "data": str(data_dir / "gsm8k" / "test.jsonl"),
        "train_data": str(data_dir / "gsm8k" / "train_0000-1999.jsonl"),
    }
    plain = gsm8k(**files)
    assert plain.examples("test")[0].prompt[0]["content"].endswith("put your final answer within \\boxed{}.")
    shown = gsm8k(num_shots=2, **files)
    prompt = shown.examples("test")[0].prompt
    assert [turn["role"] for turn in prompt] == ["user", "assistant"] * 2 + ["user"]
    assert prompt[1]["content"].endswith("#### 72") and "Janet" in prompt[4]["content"]
    assert len(shown.examples("train")) == len(plain.examples("train")) - 2
    assert gsm8k(prompt="Q: {question}\nA:", **files).examples("test")[0].prompt.startswith("Q: Janet")


def test_gsm8k_bad_settings_and_rows(tmp_path):
    for settings, message in (({"prompt": "x"}, "task.prompt"), ({"reward": "x"}, "task.reward"),
    ({"num_shots": -1}, "num_shots"),
                              ({"parser": "x"}, "task.parser"), ({"num_validation": 0}, "num_validation")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            gsm8k(**settings)
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "no hash"}\n')
    with pytest.raises(DataError, match=r"line 1: is no row of gsm8k .*no number behind ####"):
        gsm8k(data=str(tmp_path / "rows.jsonl")).examples("test")
    with pytest.raises(ConfigError, match="unknown split"):
        gsm8k().examples("dev")


# ---- MATH


def test_every_math_reference_is_right_and_a_changed_one_wrong(data_dir):
    task = math(data=str(data_dir / "math" / "math500_first250.jsonl"))
    examples = task.examples("test")
    assert len(examples) == 250
    for number, row in enumerate(examples):
        answer = row.columns["answer"]
        assert task.score(row, f"so \\boxed{{{answer}}}").status == Status.CORRECT
        if number % 5 == 0:  # the others in test_every_changed_math_reference
            assert task.score(row, f"so \\boxed{{{answer}+1}}").value == 0
    task.verifier.close()


@pytest.mark.slow
def test_every_changed_math_reference_is_wrong(data_dir):
    task = math(data=str(data_dir / "math" / "math500_first250.jsonl"))
    for row in task.examples("test"):
        for change in ("{}+1", "-({})-1", "2\\cdot({})+3"):
            assert task.score(row, f"\\boxed{{{change.format(row.columns['answer'])}}}").value == 0
    task.verifier.close()


@pytest.mark.parametrize(("gold", "answer", "status"), [
    ("\\frac{1}{2}", "0.5", "correct"), ("\\frac{1}{2}", "\\dfrac{1}{2}", "correct"), ("\\frac12", "1/2", "correct"),
    ("\\frac{1}{3}", "0.333333", "wrong"), ("x^2+2x+1", "(x+1)^2", "correct"), ("x^2+2x+1", "(x+2)^2", "wrong"),
    ("2\\sqrt{3}", "\\sqrt{12}", "correct"), ("(1,2)", "(1, 2)", "correct"), ("(1,2)", "(2,1)", "wrong"),
    ("(1,2)", "\\{1,2\\}", "wrong"), ("42", "x = 42", "correct"), ("42", "41 = 42", "wrong"),
    ("42", "42\\%", "correct"),
    ("42", "not 42", "wrong"), ("42", "", "wrong"), ("\\text{Evelyn}", "\\text{Evelyn}", "correct"),
    ("\\pi", "3.14159", "wrong"), ("\\pi", "3.141593", "wrong"), ("\\sqrt{2}", "1.414214", "wrong"),
    ("(\\sqrt{2},1)", "(1.4142136,1)", "wrong"), ("\\sqrt{4}", "2.0", "correct"),
    ("(0.5,1)", "(\\frac{1}{2},1)", "correct"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", "correct"), ("0.1+0.2", "0.3", "correct"),
    ("[-2,7]", "[-2, 7]", "correct"), ("[-2,7]", "(-2,7)", "wrong"), ("10\\text{ cm}", "10", "correct"),
    ("90^\\circ", "90", "correct"),
    ("y = 2x + 3", "y=2x+3", "correct"), ("5x", "5y", "wrong"), ("5x", "5", "wrong"), ("2i", "2", "wrong"),
    ("10n", "10", "wrong"),
])  # fmt: skip
def test_hard_math_answers(verifier, gold, answer, status):
    task = math()
    task.__dict__["verifier"] = verifier  # one process for all rows of the table
    assert task.score(example(gold), f"\\boxed{{{answer}}}").status == status


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify")
    found = MathVerifier(deadline=20.0)  # the table asks for verdicts, not for speed
    yield found
    found.close()


def test_parsers_and_rewards_of_math():
    row = example("4")
    assert math().score(row, "\\boxed{4} \\boxed{4}").status == Status.UNPARSED
    assert math().score(row, "\\boxed{3 \\boxed{4}}").status == Status.UNPARSED
    assert math(parser="lenient").score(row, "\\boxed{3} \\boxed{4}").status == Status.CORRECT
    assert math(parser="lenient").score(row, "so 4").status == Status.CORRECT
    d1 = math(reward="d1", parser="lenient")
    forms = {
        "<answer>\\boxed{4}</answer>": 3.0,
        "<answer>4</answer>": 2.75,
        "\\boxed{4}": 2.5,
        "4": 2.25,
        "5": 0.25,
        "": 0.25,
    }
    assert {text: d1.score(row, text).value for text in forms} == forms
    assert assigned("42", "f(x)=42") == "42" and assigned("42", "x_1 = 42").strip() == "42"
    assert assigned("42", "a=b=42") is None and assigned("y=1", "y=1") == "y=1" and assigned("42", "x=") is None
    assert tidy("\\left( \\dfrac{1}{2} \\right).") == "(\\frac{1}{2})"


HOSTILE = ["9^{9^{9^{9}}}", "7^{99999999}", "99999999!", "(" * 400 + "x" + ")" * 400, "\\{" + "1," * 3000 + "\\}",
"{" * 20000,
           "1" * 1000000, "2^2^2^2", "\\sqrt{" * 30 + "2" + "}" * 30]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_too_large_is_wrong_without_being_parsed(answer, monkeypatch):
    monkeypatch.setattr(MathVerifier, "verify", lambda *_: pytest.fail("was parsed"))
    assert not is_bounded(answer)
    assert math(parser="lenient").score(example("5"), f"<answer>{answer}</answer>").status == Status.WRONG


def test_an_answer_that_takes_too_long_is_a_timeout_and_the_next_one_is_judged():
    task = math(deadline=1.0)
    began = time.monotonic()
    assert task.score(example("5"), "\\boxed{(1+x+y+z+w)^{200}}").status == Status.TIMEOUT
    assert task.verifier.timeouts == 1
    assert task.score(example("(x+1)^2"), "\\boxed{x^2+2x+1}").status in (
        Status.CORRECT,
        Status.TIMEOUT,
    )  # a busy machine
    assert time.monotonic() - began < 60
    task.verifier.close()


def test_a_lost_worker_is_replaced_and_two_in_a_row_are_an_error(monkeypatch):
    pytest.importorskip("math_verify")
    verifier = MathVerifier(deadline=20.0)
    assert verifier.verify("x+1", "1+x") == "correct"
    worker = verifier._free.get()
    verifier._free.put(worker)
    worker.kill()
    worker.wait()
    assert verifier.verify("x+1", "1+x") == "correct"
    monkeypatch.setattr(math_check, "read_line", lambda *_: b"")
    with pytest.raises(RewardError, match="died twice"):
        verifier.verify("x+1", "1+x")
    verifier.close()


def test_a_start_that_fails_blocks_nobody(monkeypatch):
    pytest.importorskip("math_verify")
    verifier, start = MathVerifier(deadline=20.0), math_check.start_worker
    monkeypatch.setattr(math_check, "start_worker", lambda: (_ for _ in ()).throw(RewardError("no memory")))
    with pytest.raises(RewardError, match="no memory"):
        verifier.verify("x+1", "1+x")
    monkeypatch.setattr(math_check, "start_worker", start)
    assert verifier.verify("x+1", "1+x") == "correct"
    verifier.close()


def test_threads_share_the_workers():
    pytest.importorskip("math_verify")
    verifier, found = MathVerifier(num_workers=2, deadline=20.0), []
    ask = lambda: found.append(verifier.verify("x^2-1", "(x-1)(x+1)"))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["correct"] * 6 and verifier._started == 2
    verifier.close()
