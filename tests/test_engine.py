"""Completions from outside engines: what they are told, what is checked, and a whole one in a second process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_policy
from unmask.build import train_recipe
from unmask.cli import main
from unmask.config import read_recipe
from unmask.errors import ConfigError, ModelError
from unmask.noise import Noise
from unmask.runs import read_rows
from unmask.samplers import SAMPLERS
from unmask.types import PromptBatch

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_engine"
NOISE = Noise(2)
made = []


class Recorded:
    """Answers with numbers from the seeds, and remembers what it was told."""

    def __init__(self):
        self.pushed, self.asked = [], []
        made.append(self)

    def push(self, weights):
        self.pushed.append({name: tensor.clone() for name, tensor in weights})

    def complete(self, prompts, *, gen_length, temperature, seeds):
        self.asked.append({"prompts": prompts, "gen_length": gen_length, "temperature": temperature, "seeds": seeds})
        return [[8 + (seed + i) % 9 for i in range(1 + seed % gen_length)] for seed in seeds]


class Deaf(Recorded):
    """Ignores seeds and temperature."""

    def complete(self, prompts, **rest):
        return [[9, 9]] * len(prompts)


class Restless(Recorded):
    """Samples whatever the temperature."""

    def complete(self, prompts, **rest):
        return [[8 + i] for i in range(len(prompts))]


class Short(Recorded):
    def complete(self, prompts, **rest):
        return [[9]] * (len(prompts) - 1)


class Long(Recorded):
    def complete(self, prompts, *, gen_length, **rest):
        return [[9] * (gen_length + 1)] * len(prompts)


class Foreign(Recorded):
    def complete(self, prompts, **rest):
        return [[9, 1_000_000]] * len(prompts)


class Truth(Recorded):
    def complete(self, prompts, **rest):
        return [[9, True]] * len(prompts)


class Masked(Recorded):
    def complete(self, prompts, **rest):
        return [[9, 2]] * len(prompts)


def sampler(name: str, temperature: float = 1.0):
    return SAMPLERS["engine"](gen_length=6, engine=f"tests.test_engine:{name}", temperature=temperature)


def prompts(policy, texts=("1", "234", "5", "67")):
    """Each twice."""
    ids, mask = policy.encode_prompts([text for text in texts for _ in range(2)], 6)
    numbers = torch.arange(2 * len(texts))
    return PromptBatch(ids, mask, numbers // 2, numbers % 2)


def test_an_engine_gets_bare_prompts_and_a_seed_for_each_row():
    policy = tiny_policy()
    samples = sampler("Recorded").sample(policy, prompts(policy), noise=NOISE)
    (asked,) = made[-1].asked
    assert asked["prompts"] == [policy.encode(t) for t in ("1", "1", "234", "234", "5", "5", "67", "67")]
    assert asked["temperature"] == 1.0 and asked["gen_length"] == 6
    assert len(set(asked["seeds"])) == 8 and all(0 <= seed < 2**52 for seed in asked["seeds"])
    for row, seed in zip(samples.completion_ids.tolist(), asked["seeds"], strict=True):
        length = 1 + seed % 6
        assert row == [8 + (seed + i) % 9 for i in range(length)] + [policy.stop_token_ids[0]] * (6 - length)
    # a row's seed is its own, in whatever batch it stands
    alone = PromptBatch(*(getattr(prompts(policy), f)[2:3] for f in PromptBatch.__dataclass_fields__))
    again = sampler("Recorded").sample(policy, alone, noise=NOISE)
    assert made[-1].asked[0]["seeds"] == asked["seeds"][2:3]
    assert torch.equal(again.completion_ids, samples.completion_ids[2:3])


def test_weights_are_pushed_when_they_have_changed_and_only_then():
    policy, outside = tiny_policy(), sampler("Recorded")
    for _ in range(2):
        outside.sample(policy, prompts(policy), noise=NOISE)
    engine = made[-1]
    assert len(engine.pushed) == 1
    assert engine.pushed[0].keys() == dict(policy.module.named_parameters()).keys()
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=0.1, fused=True)  # leaves no trace in _version
    for parameter in policy.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    outside.sample(policy, prompts(policy), noise=NOISE)
    assert len(engine.pushed) == 2
    for name, parameter in policy.module.named_parameters():
        assert torch.equal(engine.pushed[1][name], parameter)
    assert not torch.equal(engine.pushed[0]["lm_head.weight"], engine.pushed[1]["lm_head.weight"])


@pytest.mark.parametrize(
    ("name", "temperature", "message"),
    [
        ("Deaf", 1.0, "at temperature 1 all completions of each of 4 prompts are the same"),
        ("Restless", 0.0, "at temperature 0 a prompt got different completions"),
        ("Short", 1.0, "7 completions for 8 prompts"),
        ("Long", 1.0, "completion 0 has 7 tokens, asked for were at most 6"),
        ("Foreign", 1.0, "completion 0 holds 1000000, which is no token that a text can have"),
        ("Truth", 1.0, "completion 0 holds True, which is no token"),
        ("Masked", 1.0, "completion 0 holds 2, which is no token that a text can have"),
    ],
)
def test_wrong_replies_are_refused(name, temperature, message):
    policy = tiny_policy()
    with pytest.raises(ModelError, match=message):
        sampler(name, temperature).sample(policy, prompts(policy), noise=NOISE)


def test_few_groups_of_equal_completions_say_nothing():
    policy = tiny_policy()
    few = prompts(policy, ("1", "234"))
    assert sampler("Deaf").sample(policy, few, noise=NOISE).completion_ids[:, 0].tolist() == [9] * 4


def test_a_policy_may_become_sure_of_itself_later():
    policy, outside = tiny_policy(), sampler("Recorded")
    outside.sample(policy, prompts(policy), noise=NOISE)
    outside.session.engine.complete = lambda prompts, **rest: [[9]] * len(prompts)
    assert outside.sample(policy, prompts(policy), noise=NOISE).completion_ids[0, 0] == 9


def test_settings_and_readers_of_steps_are_refused(tmp_path):
    for fields, message in [
        ({"gen_length": 4}, "sampler.engine is missing"),
        ({"gen_length": 0, "engine": "a:b"}, "gen_length = 0"),
        ({"gen_length": 4, "engine": "a:b", "temperature": -1.0}, "temperature = -1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            SAMPLERS["engine"](**fields)
    with pytest.raises(ConfigError, match=r"sampler.engine = 'no_such:Engine': cannot be imported"):
        _ = SAMPLERS["engine"](gen_length=4, engine="no_such:Engine").session
    tree = read_recipe(EXAMPLE / "recipe.toml")
    assert train_recipe(tree, EXAMPLE).sampler.value.engine == f"{EXAMPLE / 'engine.py'}:SecondProcess"
    tree["algorithm"] = {"type": "dmpo_wdce"}
    with pytest.raises(ConfigError, match="takes tokens back, or has no record"):
        train_recipe(tree, EXAMPLE)


def test_the_example_trains_with_rollouts_of_a_second_process(tmp_path):
    tiny_policy(dtype=torch.float32).save(tmp_path / "model")
    words = [f"model.path={tmp_path / 'model'}", "model.recipe=none", "task.num_train=16", "task.num_validation=4"]
    words += ["task.num_test=4", "trainer.num_batches=2", "rollout.prompts_per_batch=2", "rollout.group_size=4"]
    words += ["trainer.eval_every=0", "evaluation.num_examples=4", "--output", str(tmp_path / "run"), "--quiet"]
    command = [sys.executable, "-m", "unmask", "train", str(EXAMPLE / "recipe.toml"), *words]
    environment = {**os.environ, "OWN_ENGINE_MODEL": str(tmp_path / "model")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(read_rows(tmp_path / "run" / "rollouts.jsonl"))
    assert len(rows) == 16 and len({row["completion"] for row in rows}) > 8


def test_list_names_it(capsys):
    assert main(["list", "samplers"]) == 0
    assert "engine" in capsys.readouterr().out
