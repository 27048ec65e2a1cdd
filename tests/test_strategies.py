"""Rollout strategies: trees and re-rolls are continuations of the sampler's own states, counted and keyed as such."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.helpers import DigitSum, tiny_policy
from unmask.build import train_recipe
from unmask.cli import main
from unmask.config import dump_toml
from unmask.counting import count_passes, rehearse
from unmask.errors import ConfigError
from unmask.models import MaskedPolicy
from unmask.noise import Noise
from unmask.objectives import ALGORITHMS
from unmask.objectives.wd1 import WD1
from unmask.rollout import is_finished, rollout_metrics
from unmask.run_log import rollout_rows
from unmask.samplers import SAMPLERS
from unmask.samplers.canvas import Start
from unmask.strategies import ONLINE, STRATEGIES
from unmask.strategies.steps import StepsConfig
from unmask.strategies.trees import TreeConfig, even_factors
from unmask.tasks.sudoku import Sudoku
from unmask.types import Batch, PromptBatch, Samples, Score, Status, take_rows

POLICY = tiny_policy()
LENGTH = 6
CONTINUING = {
    "low_confidence": {"block_length": 3, "num_steps": 4, "stop_early": False},
    "random_remasking": {"block_length": 3, "num_steps": 4},
    "roar": {"block_length": 3},
    "dream": {"num_steps": 4},
    "dream-origin": {"num_steps": 4, "alg": "origin"},
}


class Length6(DigitSum):
    """The first characters' digits above four count one each, so that states differ in what they are worth."""

    def score(self, example, completion):
        value = sum((i + 1) * (c in "56789") for i, c in enumerate(completion)) / 8
        return Score(value, Status.WRONG, {"accuracy": 0.0})


def sampler(name: str, temperature: float = 1.0, **fields):
    return SAMPLERS[name.partition("-")[0]](gen_length=LENGTH, temperature=temperature, **(CONTINUING[name] | fields))


def prompts(rows: int = 4, first_index: int = 0) -> PromptBatch:
    ids, mask = POLICY.encode_prompts(["1", "123", "12", "4567"][:rows], LENGTH)
    return PromptBatch(ids, mask, torch.arange(rows) + 5, torch.arange(rows) + first_index)


NOISE = Noise(4).stream("rollout")
every_continuing = pytest.mark.parametrize("name", CONTINUING)


# ---- continuing


def test_a_row_that_stopped_early_goes_on_as_it_was():
    drawn, batch = sampler("low_confidence", stop_early=True), prompts()
    whole = drawn.sample(POLICY, batch, noise=NOISE)
    assert whole.nfe.min() == 2 < whole.nfe.max() == 4
    for step in range(drawn.total_steps + 1):
        again = drawn.sample(POLICY, batch, noise=NOISE, start=Start(whole, step))
        assert torch.equal(again.completion_ids, whole.completion_ids)
        assert torch.equal(again.reveal_step, whole.reveal_step)
        assert torch.equal(again.nfe, (whole.nfe - step).clamp(min=0))


@every_continuing
def test_going_on_with_the_same_noise_repeats_the_completion(name):
    """Random orders are drawn in advance, so that they agree only where nothing is open but what the state decides."""
    drawn, batch = sampler(name), prompts()
    whole = drawn.sample(POLICY, batch, noise=NOISE)
    for step in range(drawn.total_steps + 1):
        again = drawn.sample(POLICY, batch, noise=NOISE, start=Start(whole, step))
        before = whole.reveal_step < step
        assert torch.equal(again.completion_ids[before], whole.completion_ids[before])
        assert torch.equal(again.reveal_step[before], whole.reveal_step[before])
        assert torch.equal(again.logps[before], whole.logps[before])
        assert (again.reveal_step[~before] >= step).all()
        assert again.nfe.tolist() == [drawn.total_steps - step] * 4
        assert not (again.completion_ids == POLICY.mask_token_id).any()
        if step == 0 or name in ("low_confidence", "dream", "dream-origin"):
            assert torch.equal(again.completion_ids, whole.completion_ids)
            assert torch.equal(again.reveal_step, whole.reveal_step)
            assert torch.allclose(again.logps, whole.logps, rtol=0, atol=1e-12)


@every_continuing
def test_other_noise_gives_other_ends_and_the_steps_stay_full(name):
    drawn = sampler(name)
    whole = drawn.sample(POLICY, prompts(), noise=NOISE)
    ends = [drawn.sample(POLICY, prompts(4, 100 * i), noise=NOISE, start=Start(whole, 1)) for i in range(1, 9)]
    tokens = {tuple(end.completion_ids.flatten().tolist()) for end in ends}
    assert len(tokens) == len(ends)
    if name != "dream-origin":  # whose numbers of tokens are drawn
        counts = [torch.bincount(row, minlength=drawn.total_steps) for row in whole.reveal_step]
        for end in ends:
            found = [torch.bincount(row, minlength=drawn.total_steps) for row in end.reveal_step]
            assert all(torch.equal(a, b) for a, b in zip(found, counts, strict=True))


@every_continuing
def test_a_continuation_does_not_depend_on_its_batch(name):
    drawn, batch = sampler(name), prompts()
    whole = drawn.sample(POLICY, batch, noise=NOISE)
    together = drawn.sample(POLICY, batch, noise=NOISE.stream("b"), start=Start(whole, 2))
    for row in range(4):
        rows = torch.tensor([row])
        alone = drawn.sample(
            POLICY, take_rows(batch, rows), noise=NOISE.stream("b"), start=Start(take_rows(whole, rows), 2)
        )
        assert torch.equal(alone.completion_ids[0], together.completion_ids[row])
        assert torch.equal(alone.reveal_step[0], together.reveal_step[row])


def test_a_random_order_goes_on_uniformly():
    """Which of three open slots comes next, from a state with one of four fixed: thirds, within 5 deviations."""
    drawn = SAMPLERS["roar"](gen_length=4)
    ids, mask = POLICY.encode_prompts(["12"], 4)
    rows = 900
    batch = PromptBatch(ids.repeat(rows, 1), mask.repeat(rows, 1), torch.zeros(rows).long(), torch.arange(rows))
    whole = drawn.sample(POLICY, take_rows(batch, slice(0, 1)), noise=NOISE)
    same = take_rows(whole, torch.zeros(rows).long())
    ends = drawn.sample(POLICY, batch, noise=NOISE.stream("b"), start=Start(same, 1))
    chosen = (ends.reveal_step == 1).int().argmax(1)
    counts = torch.bincount(chosen, minlength=4)
    open_slots = (whole.reveal_step[0] >= 1).nonzero()[:, 0]
    assert len(open_slots) == 3 and int(counts[open_slots].sum()) == rows
    assert ((counts[open_slots] - rows / 3).abs() < 5 * (rows * 2 / 9) ** 0.5).all()


# ---- trees


def tree_source(name: str = "low_confidence", **fields):
    config = TreeConfig(**({"prompts_per_batch": 3, "group_size": 6, "batch_size": 5} | fields))
    return config.source(Length6(), sampler(name, 2.0), Noise(1))


def collected(source, iteration: int = 2):
    return source.collect(POLICY, iteration, slice(0, source.batch_rows))


@pytest.mark.parametrize(
    ("number", "levels", "expected"),
    [(8, 2, (4, 2)), (16, 2, (4, 4)), (6, 2, (3, 2)), (24, 3, (4, 3, 2)), (7, 2, ()), (7, 1, (7,)), (4, 3, ())],
)
def test_branching_is_as_even_as_the_leaves_allow(number, levels, expected):
    assert even_factors(number, levels) == expected


def test_a_tree_of_height_two_has_the_published_rows():
    config = TreeConfig()
    assert config.branches == (4, 4) and config.rows_per_prompt == 20 and config.group_size == 16


@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("name", ["low_confidence", "roar", "dream"])
def test_tree_invariants(name, height):
    source = tree_source(name, group_size=12, height=height)
    rollouts, config = collected(source), source.config
    steps, edges = source.sampler.total_steps, config.boundaries(source.sampler.total_steps)
    assert edges[0] == 0 and edges[-1] == steps and sorted(set(edges)) == edges  # windows partition the steps
    size = config.rows_per_prompt
    above = 0
    for tree in range(3):
        rows = take_rows(rollouts, slice(tree * size, (tree + 1) * size))
        leaf_mean = rows.rewards[-config.group_size :].mean()
        parents = rows.groups.unique().tolist()
        assert parents == list(range(above, above + len(parents)))
        above += len(parents)
        for number, parent in enumerate(parents):
            children = take_rows(rows, (rows.groups == parent).nonzero()[:, 0])
            first, end = children.window[0].tolist()
            assert (children.window == children.window[0]).all() and [first, end] in [
                list(pair) for pair in pairwise(edges)
            ]
            shared = children.reveal_step < first
            assert (shared == shared[0]).all()  # siblings share exactly the parent's tokens
            assert (children.completion_ids[:, shared[0]] == children.completion_ids[0, shared[0]]).all()
            value = children.rewards.mean()
            expected = leaf_mean if number == 0 else rows.rewards[number - 1]
            assert torch.allclose(value, expected, rtol=0, atol=1e-12)  # V of the parent
            assert abs(float((children.rewards - value).sum())) < 1e-12
            if number:  # the parent is row number - 1 of its tree, and its own tokens are what its children share
                own = rows.reveal_step[number - 1] < first
                assert torch.equal(own, shared[0])
                assert torch.equal(rows.completion_ids[number - 1][own], children.completion_ids[0][own])


def test_rewards_and_lengths_of_a_tree_are_those_of_its_own_canvases():
    """At a high temperature, so that stop tokens come, some of them in the very step that a level begins with."""
    config, task = TreeConfig(prompts_per_batch=40, group_size=4), Length6()
    rollouts = collected(config.source(task, sampler("roar", 20.0), Noise(1)))
    for row in is_finished(rollouts).nonzero()[:, 0].tolist():
        assert float(rollouts.rewards[row]) == task.score(None, rollouts.completions[row]).value
    stop = POLICY.stop_token_ids[0]
    is_next = (rollouts.reveal_step == rollouts.window[:, 1:]) & (rollouts.completion_ids == stop)
    assert is_next.any()
    for row in range(len(rollouts)):
        shown = [
            int(token) if step < rollouts.window[row, 1] else -1
            for token, step in zip(rollouts.completion_ids[row], rollouts.reveal_step[row], strict=True)
        ]
        expected = shown.index(stop) + 1 if stop in shown else LENGTH
        assert int(rollouts.length[row]) == expected


@pytest.mark.parametrize("strategy", ["tree", "groups"])
def test_planned_forwards_are_those_that_are_made(strategy, tables, tmp_path, monkeypatch):
    tables["rollout"] |= {"type": strategy, "batch_size": 5}
    recipe = train_recipe(tables | {"algorithm": {"type": "learner"}}, tmp_path)
    source = recipe.rollout.source(Sudoku(num_train=8), recipe.sampler.value, Noise(0))
    sizes, forward = [], MaskedPolicy.token_outputs
    monkeypatch.setattr(
        MaskedPolicy,
        "token_outputs",
        lambda p, canvas, *a, **k: sizes.append(len(canvas)) or forward(p, canvas, *a, **k),
    )
    source.collect(POLICY, 0, slice(0, source.batch_rows))
    (planned,) = (p for p in count_passes(recipe, 1, 8, 8) if p.phase == "collect")
    batches = recipe.trainer.num_batches
    assert (planned.forwards, planned.sequences) == (batches * len(sizes), batches * sum(sizes))


@pytest.mark.parametrize("name", ["low_confidence", "random_remasking", "dream"])
def test_a_tree_does_not_depend_on_its_batch_or_on_who_grows_it(name):
    whole = collected(tree_source(name))
    size = tree_source(name).config.rows_per_prompt
    for batch_size in (1, 64):
        other = collected(tree_source(name, batch_size=batch_size))
        assert torch.equal(other.completion_ids, whole.completion_ids)
        assert torch.equal(other.reveal_step, whole.reveal_step)
    source = tree_source(name)
    parts = [source.collect(POLICY, 2, slice(i * size, (i + 1) * size)) for i in range(3)]
    for key in ("completion_ids", "groups", "window", "rewards", "rollout_index", "length", "prompt_key"):
        assert torch.equal(torch.cat([getattr(part, key) for part in parts]), getattr(whole, key)), key
    with pytest.raises(ConfigError, match="belong to one process"):
        source.collect(POLICY, 2, slice(0, size + 1))


def test_siblings_differ_and_all_indices_are_new():
    source = tree_source("roar", group_size=8)
    rollouts = collected(source, 0)
    leaves = take_rows(rollouts, is_finished(rollouts).nonzero()[:, 0])
    for tree in leaves.completion_ids.view(3, 8, LENGTH):
        assert len(tree.unique(dim=0)) == 8
    other = collected(source, 1)
    assert len(torch.cat([rollouts.rollout_index, other.rollout_index]).unique()) == 2 * len(rollouts)
    assert (other.sampled_at == 1).all()


def test_what_is_logged_of_a_tree_is_its_leaves():
    rollouts = collected(tree_source())
    batch = Batch(2, rollouts, torch.arange(len(rollouts)).double(), [], {})
    rows = rollout_rows(batch)
    assert len(rows) == 18
    leaves = is_finished(rollouts).nonzero()[:, 0].tolist()
    assert [row["advantage"] for row in rows] == [float(i) for i in leaves]
    metrics = rollout_metrics(rollouts)
    assert metrics["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 18, abs=1e-12)
    # over the leaves of a prompt, as for groups; not over siblings, which share half of a canvas
    spread = rollouts.rewards[leaves].view(3, 6).var(1, unbiased=False).sqrt().mean()
    assert metrics["reward_std"] == pytest.approx(float(spread), abs=1e-12)


def test_the_forwards_of_a_tree_are_those_of_its_edges():
    source = tree_source(group_size=12)
    leaves = take_rows(collected(source), is_finished(collected(source)).nonzero()[:, 0])
    steps, config = source.sampler.total_steps, source.config
    edges = config.boundaries(steps)
    expected = sum(3 * n * (b - a) for n, a, b in zip(config.nodes, edges[:-1], edges[1:], strict=True))
    assert int(leaves.nfe.sum()) == expected
    assert sum(rows * forwards for _, rows, forwards in config.sampled(steps)) == expected


# ---- steps


def step_source(temperature: float = 2.0, name: str = "low_confidence", task=None, **fields):
    config = StepsConfig(**({"prompts_per_batch": 3, "group_size": 4, "batch_size": 5} | fields))
    return config.source(task or Length6(), sampler(name, temperature), Noise(1))


class Given(DigitSum):
    """Rewards in the order in which completions are judged."""

    def __init__(self, rewards):
        self.left = iter(rewards)

    def score(self, example, completion):
        return Score(next(self.left), Status.WRONG, {"accuracy": 0.0})


def test_means_that_differ_by_rounding_alone_are_equal():
    rewards = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]
    assert sum(rewards[:3]) != sum(rewards[3:])  # what the test is about
    config = TreeConfig(prompts_per_batch=1, group_size=6, branching=(2, 3))
    rollouts = collected(config.source(Given(rewards), sampler("roar"), Noise(1)))
    inner = rollouts.rewards[~is_finished(rollouts)]
    assert len(inner) == 2 and inner[0] == inner[1]
    steps = StepsConfig(prompts_per_batch=2, group_size=3, num_rerolls=1)
    again = collected(steps.source(Given([*rewards, 0.5, 0.5]), sampler("roar"), Noise(1)))
    assert [facts["extra_rollouts"] for facts in again.facts] == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_re_rolls_are_made_of_rows_above_the_mean_and_of_no_others():
    source = step_source()
    rollouts = collected(source)
    rewards = rollouts.rewards.view(3, 4)
    above = (rewards > rewards.mean(1, keepdim=True)).flatten()
    assert above.any() and not above.all()
    extra = torch.tensor([facts["extra_rollouts"] for facts in rollouts.facts])
    assert torch.equal(extra, 4.0 * above)
    assert (rollouts.process_rewards[~above] == 0).all()
    assert rollout_metrics(rollouts)["train/extra_rollouts"] == float(extra.mean())
    steps = source.sampler.total_steps
    first = source.draw_steps(2, range(3)).repeat_interleave(4)
    assert torch.equal(rollouts.nfe, steps + 4 * above * (steps - first))


def test_process_rewards_are_the_mean_over_ends_from_the_drawn_state():
    """The loop over rows, with the sampler called for each end alone."""
    source, task = step_source(), Length6()
    rollouts = collected(source)
    first = source.draw_steps(2, range(3))
    assert ((first >= 1) & (first < source.sampler.total_steps)).all()
    for row in rollouts.process_rewards.nonzero()[:, 0].tolist():
        rows = torch.tensor([row])
        done = take_rows(rollouts, rows)
        values = []
        for n in range(4):
            batch = PromptBatch(done.prompt_ids, done.prompt_mask, done.prompt_key, done.rollout_index * 4 + n)
            whole = Samples(done.completion_ids, done.reveal_step, done.sample_logps, done.nfe, done.drawn_logps)
            start = Start(whole, int(first[row // 4]))
            end = source.sampler.sample(POLICY, batch, noise=Noise(1).stream("continuation"), start=start)
            values.append(task.score(None, POLICY.decode(end.completion_ids)[0]).value)
        mean = float(rollouts.rewards.view(3, 4)[row // 4].mean())
        assert float(rollouts.process_rewards[row]) == pytest.approx(sum(values) / 4 - mean, abs=1e-12)


def test_without_temperature_every_end_is_the_completion_itself():
    """Groups of one greedy completion have equal rewards, so one row of each is made another to be above the mean."""
    source = step_source(temperature=0.0)
    rollouts = collected(source)
    assert (rollouts.process_rewards == 0).all() and all(f["extra_rollouts"] == 0 for f in rollouts.facts)
    rows = torch.arange(len(rollouts))
    examples = source.examples_of(2, slice(0, source.batch_rows))
    means, _ = source.reroll(POLICY, rollouts, examples, rows, torch.full_like(rows, 2))
    assert torch.equal(means, rollouts.rewards)


def test_from_a_fully_masked_state_an_end_is_a_new_completion():
    """So the mean over ends has the expectation of a rollout's reward: it is what the sampler draws under that key."""
    source = step_source()
    rollouts = collected(source)
    row = torch.tensor([5])
    examples = source.examples_of(2, slice(0, source.batch_rows))
    (mean,), _ = source.reroll(POLICY, rollouts, examples, row, torch.zeros(len(rollouts)).long())
    done = take_rows(rollouts, row.repeat(4))
    index = done.rollout_index * 4 + torch.arange(4)
    batch = PromptBatch(done.prompt_ids, done.prompt_mask, done.prompt_key, index)
    new = source.sampler.sample(POLICY, batch, noise=Noise(1).stream("continuation"))
    values = [Length6().score(None, text).value for text in POLICY.decode(new.completion_ids)]
    assert float(mean) == pytest.approx(sum(values) / 4, abs=1e-12)


def test_groups_without_variance_are_not_rolled_again():
    class Same(Length6):
        def score(self, example, completion):
            return Score(0.1, Status.WRONG, {"accuracy": 0.0})  # the mean of six 0.1 is a little below 0.1

    rollouts = collected(step_source(task=Same(), group_size=6))
    assert (rollouts.process_rewards == 0).all() and all(f["extra_rollouts"] == 0 for f in rollouts.facts)


def test_shares_of_steps_make_up_the_whole():
    source = step_source()
    whole = collected(source)
    parts = [source.collect(POLICY, 2, slice(4 * i, 4 * i + 4)) for i in range(3)]
    assert torch.equal(torch.cat([part.process_rewards for part in parts]), whole.process_rewards)
    with pytest.raises(ConfigError, match="belong to one process"):
        source.collect(POLICY, 2, slice(0, 6))


# ---- recipes


class Learner(WD1):
    """An objective that any batch will do for."""

    strategies = ("tree", "steps", "groups", "pairs")


@pytest.fixture
def tables(tmp_path, monkeypatch) -> dict:
    monkeypatch.setitem(ALGORITHMS, "learner", Learner)
    tiny_policy(dtype=torch.float32).save(tmp_path / "model")
    return {
        "model": {"path": str(tmp_path / "model")},
        "task": {"type": "sudoku", "num_train": 48, "num_validation": 8, "num_test": 8},
        "algorithm": {"type": "learner", "num_iterations": 1},
        "sampler": {"type": "low_confidence", "num_steps": 4, "temperature": 1.0},
        "rollout": {"prompts_per_batch": 2, "group_size": 8},
        "trainer": {"num_batches": 3, "save_every": 0, "monitor_rows": 2},
        "evaluation": {"num_examples": 8},
    }


def test_the_published_strategy_is_the_default_and_comes_back_from_the_written_recipe(tables, tmp_path):
    recipe = train_recipe(tables, tmp_path)
    assert isinstance(recipe.rollout, TreeConfig) and recipe.rollout.branches == (4, 2)
    assert recipe.tree()["rollout"]["type"] == "tree"
    assert train_recipe(recipe.tree(), tmp_path) == recipe
    assert set(STRATEGIES) == {*ONLINE, "pairs"}


@pytest.mark.parametrize("algorithm", [n for n, c in ALGORITHMS.items() if c.strategies[0] in ONLINE])
def test_a_rollout_section_without_a_type_serves_every_online_algorithm(algorithm, tables, tmp_path):
    tables = tables | {"algorithm": {"type": algorithm}}
    assert train_recipe(tables, tmp_path).rollout.strategy == ALGORITHMS[algorithm].strategies[0]


def test_an_algorithm_published_for_pairs_is_rolled_out_for_on_request_alone(tables, tmp_path):
    tables["algorithm"] = {"type": "vrpo"}
    with pytest.raises(ConfigError, match=r"vrpo as published learns from preference pairs. Give data.file"):
        train_recipe(tables, tmp_path)
    tables["rollout"]["type"] = "groups"
    assert train_recipe(tables, tmp_path).rollout.strategy == "groups"


REFUSED = [
    ({"rollout": {"type": "tree"}, "algorithm": {"type": "wd1"}}, "rollout.type = 'tree': wd1 learns from 'groups'"),
    ({"rollout": {"type": "pairs"}}, "unknown rollout 'pairs'"),
    ({"sampler": {"type": "block_diffusion"}}, "goes on from the middle of a completion"),
    ({"rollout": {"group_size": 7}}, "cannot be split into 2 levels"),
    ({"rollout": {"group_size": 8, "branching": [2, 2]}}, "product is rollout.group_size = 8"),
    ({"rollout": {"group_size": 8, "branching": [8, 1]}}, "a node with one child"),
    ({"rollout": {"height": 0}}, "must be at least 1 level"),
    ({"sampler": {"type": "low_confidence", "num_steps": 1}}, "every level needs a denoising step"),
    ({"rollout": {"type": "steps"}, "sampler": {"type": "low_confidence", "num_steps": 1}}, "between two denoising"),
    ({"rollout": {"type": "steps", "num_rerolls": 0}}, "num_rerolls = 0"),
    ({"rollout": {"buffer": {"num_batches": 2}}}, "trees are trained on once"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_impossible_strategies_are_refused_while_building(changes, message, tables, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        train_recipe(tables | changes, tmp_path)
    assert "\n" not in str(error.value)


def test_order_needs_a_sampler_that_keeps_its_tokens(tables, tmp_path, monkeypatch):
    class Reader(Learner):
        @property
        def needs(self):
            return replace(super().needs, order=True)

    revoking = {"sampler": {"type": "wino", "temperature": 1.0}}
    revoking["rollout"] = {"type": "groups", "prompts_per_batch": 2, "group_size": 8}
    train_recipe(tables | revoking, tmp_path)
    monkeypatch.setitem(ALGORITHMS, "learner", Reader)
    train_recipe(tables, tmp_path)
    with pytest.raises(ConfigError, match=r"sampler.type = 'wino': takes tokens back"):
        train_recipe(tables | revoking, tmp_path)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"cache": "dual"}, "these are those of an approximation"),
        ({"guidance": 0.5}, "these are those of an approximation"),
        ({"block_length": 3}, r"would be given, not drawn. Set sampler.stop_early = false"),
        ({"block_length": 3, "stop_early": False}, None),
        ({}, None),
    ],
)
def test_order_needs_the_models_own_record(tables, tmp_path, sampler, message):
    changed = tables | {
        "algorithm": {"type": "dmpo_wdce", "count_positions": "all"},
        "sampler": {"type": "low_confidence", "gen_length": 6, **sampler},
        "rollout": {"type": "groups", "prompts_per_batch": 2, "group_size": 8},
    }
    if message is None:
        train_recipe(changed, tmp_path)
        return
    with pytest.raises(ConfigError, match=message):
        train_recipe(changed, tmp_path)
    changed["algorithm"]["count_positions"] = "to_eos"
    if "block_length" in sampler:
        train_recipe(changed, tmp_path)


@pytest.mark.parametrize("strategy", ["tree", "steps"])
def test_runs_and_plans_of_a_strategy(strategy, tables, tmp_path, capsys):
    tables["rollout"]["type"] = strategy
    tables["trainer"]["num_batches"] = 1
    (tmp_path / "recipe.toml").write_text(dump_toml(tables))
    assert main(["train", str(tmp_path / "recipe.toml"), "--dry-run"]) == 0
    assert "rollouts     16" in capsys.readouterr().out
    recipe = train_recipe(tables, tmp_path)
    steps = rehearse(recipe.sampler.value, 1).forwards
    collect = {p.name: p for p in count_passes(recipe, 1, 8, 8) if p.phase == "collect"}
    if strategy == "tree":  # 4 children of the first half, 8 of the second
        assert collect["collect"].sequences == 2 * (4 * steps // 2 + 8 * steps // 2)
    else:
        assert collect["collect"].sequences == 16 * steps and collect["re-rolls"].sequences == 8 * 4 * steps // 2
    assert main(["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run"), "--quiet"]) == 0
    rows = (Path(tmp_path) / "run" / "rollouts.jsonl").read_text().splitlines()
    assert len(rows) == 16
