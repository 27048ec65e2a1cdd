"""The buffer: which batches it keeps, what it gives to train on, how old that is, and that it goes on as it was."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.helpers import DigitSum, fake_rollouts, make_trainer, sudoku_source, tiny_policy
from unmask.buffer import Buffer, BufferConfig, join_rollouts
from unmask.build import train_recipe
from unmask.checkpoint import pack, unpack
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.objectives.wd1 import WD1
from unmask.run_log import rollout_rows

CONFIG = BufferConfig(num_batches=3)


def batch(iteration: int, prompt: int = 4, num_groups: int = 3):
    """Rollouts of one batch; its prompts and completions are those of no other."""
    rollouts = fake_rollouts(num_groups=num_groups, prompt=prompt, seed=iteration)
    return replace(
        rollouts,
        prompt_key=100 * iteration + rollouts.prompt_key,
        sampled_at=torch.full_like(rollouts.groups, iteration),
    )


def keyed(rollouts) -> list[tuple]:
    return [(int(k), *c.tolist()) for k, c in zip(rollouts.prompt_key, rollouts.completion_ids, strict=True)]


def filled(num_batches: int, config: BufferConfig = CONFIG, seed: int = 0) -> tuple[Buffer, list]:
    buffer = Buffer(config, Noise(seed))
    return buffer, [buffer.exchange(batch(i, prompt=3 + i % 2), i) for i in range(num_batches)]


def test_without_a_buffer_the_new_rollouts_come_back_themselves():
    buffer, fresh = Buffer(BufferConfig(), Noise(0)), batch(0)
    assert buffer.exchange(fresh, 0) is fresh
    assert all(buffer.is_due(i) for i in range(4)) and buffer.metrics(fresh, 0) == {}
    assert buffer.state() == {"batches": []}


def test_the_oldest_batch_goes_first():
    buffer, _ = filled(7)
    assert [int(b.sampled_at[0]) for b in buffer.batches] == [4, 5, 6]


def test_a_batch_is_whole_groups_without_replacement():
    buffer, batches = filled(6)
    for iteration, given in enumerate(batches):
        assert given.groups.tolist() == [row // 4 for row in range(12)]  # relabelled
        assert given.rollout_index.tolist() == list(range(12 * iteration, 12 * iteration + 12))  # renewed
        keys = given.prompt_key.view(3, 4)
        assert (keys == keys[:, :1]).all() and len(set(keys[:, 0].tolist())) == 3
    stored = {
        (int(k), tuple(c.tolist())) for b in buffer.batches for k, c in zip(b.prompt_key, b.completion_ids, strict=True)
    }
    last = batches[-1]
    rows = {(int(k), tuple(c.tolist())) for k, c in zip(last.prompt_key, last.completion_ids, strict=True)}
    assert rows <= stored and len(rows) == 12
    assert (last.sampled_at * 100 == last.prompt_key // 100 * 100).all()  # goes with its row


def test_every_stored_group_is_drawn_equally_often():
    """3 of 9 groups, 600 draws: each 200 times in expectation, standard deviation sqrt(600 · 1/3 · 2/3) = 11.5."""
    counts: Counter[int] = Counter()
    buffer, _ = filled(3)
    for iteration in range(3, 603):
        counts.update(buffer.exchange(None, iteration).prompt_key.view(3, 4)[:, 0].tolist())
    assert len(counts) == 9
    assert all(abs(count - 200) < 5 * 11.6 for count in counts.values())


def test_prompts_of_other_widths_are_padded_on_the_left():
    narrow, wide = batch(0, prompt=3), batch(1, prompt=5)
    joined = join_rollouts([narrow, wide])
    assert joined.prompt_ids.shape == (24, 5)
    assert torch.equal(joined.prompt_ids[:12, 2:], narrow.prompt_ids)
    assert not joined.prompt_mask[:12, :2].any() and torch.equal(joined.prompt_mask[:12, 2:], narrow.prompt_mask)
    assert torch.equal(joined.prompt_ids[12:], wide.prompt_ids)
    assert len(joined.groups.unique()) == 6 and len(joined.completions) == 24


def test_staleness_is_counted_in_batches():
    buffer, _ = filled(3)
    given = buffer.exchange(None, 7)
    ages = [7 - int(at) for at in given.sampled_at]
    metrics = buffer.metrics(given, 7)
    assert metrics["buffer/staleness_mean"] == sum(ages) / len(ages)
    assert metrics["buffer/staleness_max"] == max(ages)
    assert metrics["buffer/size"] == 36 and metrics["buffer/fresh_share"] == 0
    first = Buffer(CONFIG, Noise(0))
    assert first.metrics(first.exchange(batch(0), 0), 0)["buffer/fresh_share"] == 1


def test_given_completions_pass_through_and_are_not_kept():
    buffer, given = Buffer(replace(CONFIG, collect_every=4), Noise(0)), replace(batch(0), sampled_at=None)
    assert buffer.exchange(given, 0) is given and not buffer.batches
    assert buffer.is_due(1)  # there is nothing yet to take a batch from
    buffer.exchange(batch(1), 1)
    assert [i for i in range(2, 10) if buffer.is_due(i)] == [4, 8]


def test_a_stored_buffer_goes_on_equally():
    buffer, _ = filled(4)
    tensors: dict[str, torch.Tensor] = {}
    content = json.loads(json.dumps(pack(buffer.state(), "buffer", tensors)))
    other = Buffer(CONFIG, Noise(0))
    other.load(unpack(content, tensors))
    for iteration in (4, 5):
        a, b = (x.exchange(batch(iteration), iteration) for x in (buffer, other))
        assert torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.prompt_ids, b.prompt_ids)
        assert a.completions == b.completions and torch.equal(a.sampled_at, b.sampled_at)
    assert len(other.batches) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_batches": -1}, "must be 0"),
        ({"collect_every": 2}, "more only with a buffer"),
        ({"num_batches": 2, "collect_every": 0}, "must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BufferConfig(**fields)


class Batches:
    """Keeps what the trainer tells."""

    def __init__(self):
        self.batches, self.rows = [], []

    def on_batch(self, batch):
        self.batches.append(batch)

    def on_step(self, row, timing):
        self.rows.append(row)

    def on_evaluation(self, row, is_best): ...

    def on_boundary(self, trainer): ...

    def on_fault(self, trainer, message): ...


def test_a_trainer_collects_when_it_is_due_and_logs_new_rollouts_alone():
    seen, source = Batches(), sudoku_source(DigitSum(), prompts_per_batch=2, group_size=3)
    trainer = make_trainer(
        tiny_policy(dtype=torch.float32),
        WD1(num_iterations=2),
        source,
        num_batches=6,
        listeners=(seen,),
        buffer=Buffer(BufferConfig(num_batches=2, collect_every=2), Noise(0)),
    )
    trainer.run()
    assert [len(rollout_rows(b)) for b in seen.batches] == [6, 0, 6, 0, 6, 0]
    assert all(row["advantage"] is None for b in seen.batches for row in rollout_rows(b))
    logged = [row["completion"] for row in rollout_rows(seen.batches[2])]
    assert logged == seen.batches[2].fresh.completions
    assert [row["buffer/staleness_max"] for row in seen.rows[:4]] == [0, 0, 1, 1]
    assert all(len(b.rollouts) == 6 for b in seen.batches)
    assert trainer.state.step == 12
    masks = [b.draws[0].corruption.masked for b in seen.batches[:2]]
    assert not torch.equal(*masks)  # the first batch comes again, with new masks


def test_a_ratio_needs_the_policy_that_wrote_the_rollouts(tmp_path):
    tables = {
        "model": {"path": str(tmp_path)},
        "task": {"type": "sudoku"},
        "algorithm": {"type": "espo"},
        "rollout": {"buffer": {"num_batches": 2}},
    }
    with pytest.raises(ConfigError, match="espo needs the policy that wrote the rollouts"):
        train_recipe(tables, tmp_path)
    tables["algorithm"] = {"type": "wd1"}
    recipe = train_recipe(tables, tmp_path)
    assert recipe.rollout.buffer == BufferConfig(2)
    assert train_recipe(recipe.tree(), tmp_path) == recipe
