"""A user's own data and rewards: TRL's and verl's signatures, weights, None, failures, and the example of 15 lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.errors import ConfigError, DataError, RewardError
from unmask.models.tiny import TinyModelConfig, build_tiny
from unmask.rollout import judge
from unmask.tasks import TASKS
from unmask.tasks.rewards import Batch, call, find_function
from unmask.types import Status

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_task"

REWARDS = """
calls = []
def trl(prompts, completions, answer, log_metric, log_extra, completion_ids=None, trainer_state=None, **rest):
    calls.append((prompts, completions, answer, completion_ids, trainer_state, sorted(rest)))
    log_metric("seen", len(prompts)); log_extra("guess", completions)
    return [float(len(c) == a) for c, a in zip(completions, answer)]
def chat(prompts, completions, **_):
    return [float(c[0]["content"] == "hello" and c[0]["role"] == "assistant") for c in completions]
async def later(completions, **_):
    return [2.0] * len(completions)
def some(completions, answer, **_):
    return [None if a > 2 else 0.25 for a in answer]
def fragile(completions, **_):
    if any(c == "bad" for c in completions):
        raise ValueError("cannot read it")
    return [1.0] * len(completions)
def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "note": extra_info["answer"]}
class Nested:
    @staticmethod
    def reward(completions): return [3] * len(completions)
not_callable = 5
def short(completions, **_): return [1.0]
def endless(completions, **_): return [float("nan")] * len(completions)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"p{n}", "answer": n} for n in range(1, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def make(*rewards, **settings):
    return TASKS["data"](train_data="rows.jsonl", rewards=rewards, **({"num_validation": 2} | settings))


def test_a_reward_of_trl_gets_the_batch_its_columns_and_its_helpers(folder):
    task = make("my_rewards:trl")
    scores = judge(task, task.examples("train"), ["a", "ab", "a"], [[1], [1, 2], [1]])
    assert [s.value for s in scores] == [1.0, 1.0, 0.0]
    assert [s.status for s in scores] == [Status.CORRECT, Status.CORRECT, Status.WRONG]
    assert scores[0].facts == {"reward_errors": 0.0, "seen": 3.0, "rewards/trl": 1.0, "accuracy": 1.0}
    (seen,) = sys.modules["my_rewards"].calls
    assert seen == (["p1", "p2", "p3"], ["a", "ab", "a"], [1, 2, 3], [[1], [1, 2], [1]], None, [])


def test_splits_do_not_overlap_and_the_test_file_is_its_own(folder):
    task = make("my_rewards:later")
    found = {split: [e.prompt for e in task.examples(split)] for split in ("train", "validation", "test")}
    assert found == {"train": ["p1", "p2", "p3"], "validation": ["p4", "p5"], "test": ["p4", "p5"]}
    (folder / "other.jsonl").write_text('{"prompt": "q"}\n')
    assert [e.prompt for e in make("my_rewards:later", data="other.jsonl").examples("test")] == ["q"]
    assert make("my_rewards:later", data="other.jsonl").source("test") == "other.jsonl"


def test_chat_prompts_have_chat_completions(folder):
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "hi"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    task = make("my_rewards.py:chat", system="Be brief.")
    first = task.examples("train")[0]
    assert first.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert task.examples("train")[1].prompt == first.prompt  # a text becomes the user's turn
    assert [task.score(first, text).value for text in ("hello", "bye")] == [1.0, 0.0]


def test_rewards_are_weighted_and_none_does_not_apply(folder):
    task = make("my_rewards:later", "my_rewards:some", weights=(0.5, 4.0))
    one, two, three = task.examples("train")
    assert [task.score(e, "").value for e in (one, two, three)] == [2.0, 2.0, 1.0]  # 0.5 * 2 + 4 * 0.25, or without it
    assert "rewards/some" not in task.score(three, "").facts
    with pytest.raises(RewardError, match=r"no reward applies to prompt 2: all of my_rewards:some returned None"):
        make("my_rewards:some").score(three, "")


def test_failures_are_counted_and_stop_the_run_beyond_the_share(folder):
    examples = make("my_rewards:fragile").examples("train")
    with pytest.raises(
        RewardError, match=r"fragile failed for 1 of 3 .* prompt 1: ValueError: cannot read it.*max_error_share"
    ):
        judge(make("my_rewards:fragile"), examples, ["x", "bad", "y"])
    scores = judge(make("my_rewards:fragile", max_error_share=0.4), examples, ["x", "bad", "y"])
    assert [(s.value, s.status) for s in scores] == [(1.0, "correct"), (0.0, "error"), (1.0, "correct")]
    assert [s.facts["reward_errors"] for s in scores] == [0.0, 1.0, 0.0]
    alone = call(find_function("my_rewards:short"), "trl", Batch(["p"] * 3, ["c"] * 3, {}))
    assert alone.values == [1.0] * 3 and not alone.errors  # called alone, each row has its one value
    with pytest.raises(RewardError, match=r"endless failed for 3 of 3 .* no finite number"):
        judge(make("my_rewards:endless"), examples, ["a", "b", "c"])


def test_verls_signature(folder):
    rows = [{"prompt": f"p{n}", "ground_truth": "yes", "answer": n} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make("my_rewards:verl", signature="verl")
    assert [s.value for s in judge(task, task.examples("train"), ["yes", "no"])] == [1.0, 0.0]


def test_functions_are_found_in_modules_files_and_classes(folder):
    assert find_function("my_rewards:Nested.reward")(completions=[1, 2]) == [3, 3]
    assert find_function(f"{folder}/my_rewards.py:later")
    for name, message in (
        ("my_rewards", "module:function"), ("my_rewards:", "module:function"), ("nowhere:f", "cannot be imported"),
        ("my_rewards:missing", "cannot be imported"), ("none.py:f", "there is no file"),
        ("my_rewards:not_callable", "is a int"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            find_function(name)


@pytest.mark.parametrize(("settings", "message"), [
    ({"rewards": ()}, "task.rewards is missing"), ({"rewards": ("a:b",), "weights": (1.0, 2.0)}, "2 for 1 rewards"),
    ({"rewards": ("a:b",), "signature": "x"}, "task.signature"), ({"rewards": ("a:b",),
    "max_error_share": 1.0}, "below 1"),
    ({"rewards": ("a:b",), "train_data": None}, "task.train_data is missing"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TASKS["data"](**({"train_data": "rows.jsonl"} | settings))


@pytest.mark.parametrize(
    "row", ['{"answer": 1}', '{"prompt": ""}', '{"prompt": [{"role": "user"}]}', "5", '{"prompt": []}']
)
def test_rows_without_a_prompt_are_named(folder, row):
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n' + row + "\n" + '{"prompt": "b"}\n' * 2)
    with pytest.raises(DataError, match=r"rows.jsonl line 2: has no prompt"):
        make("my_rewards:later").examples("train")
    with pytest.raises(ConfigError, match="validation takes the last"):
        make("my_rewards:later", num_validation=9).examples("train")


def test_the_example_is_short_and_trains_from_another_directory(tmp_path, monkeypatch):
    assert len((EXAMPLE / "rewards.py").read_text().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_length": 40}
    build_tiny(TinyModelConfig(**sizes, alphabet="0123456789|"), seed=0).save(tmp_path / "base")
    overrides = [
        f"model.path={tmp_path / 'base'}",
        "model.recipe=none",
        "trainer.num_batches=1",
        "task.num_validation=2",
    ]
    command = ["train", str(EXAMPLE / "recipe.toml"), *overrides, "trainer.eval_every=0", "--output", "run", "--quiet"]
    assert main(command) == 0
    rows = [json.loads(line) for line in Path("run/rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 128 and all(0 <= row["reward"] <= 1 for row in rows)
    for row in rows[:20]:
        wanted = int(row["prompt"].removesuffix("|"))
        found = sum(int(sign) for sign in row["completion"] if sign.isdigit())
        assert row["reward"] == pytest.approx(max(0.0, 1 - abs(found - wanted) / wanted))
