"""The loop: exact gradients at any micro-batch size, old scores, stopping, faults, and learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.helpers import (
    Coupled,
    DigitSum,
    FixedSource,
    fake_rollouts,
    gradients,
    make_trainer,
    sudoku_source,
    tiny_policy,
)
from unmask.bases import frozen_copy
from unmask.errors import RewardError, TrainingError
from unmask.noise import Noise
from unmask.objectives import ALGORITHMS
from unmask.objectives.dmpo import DmpoWDCE
from unmask.objectives.embr import EmbrE
from unmask.objectives.espo import ESPO
from unmask.objectives.sft import SFT
from unmask.objectives.unigrpo import UniGRPO
from unmask.objectives.wd1 import WD1
from unmask.schedule import OptimizerConfig, StopRule
from unmask.scoring import score
from unmask.types import LossInputs

CASES: dict[str, Any] = {
    **{name: cls(num_iterations=2) for name, cls in ALGORITHMS.items()},
    "espo_with_kl": ESPO(num_iterations=2, kl_coef=0.3),
    "espo_token": ESPO(num_iterations=2, level="token", kl="k3", kl_coef=0.1),
    "espo_mean_field": ESPO(num_iterations=2, likelihood="mean_field", prompt_mask_ratio=0.2),
    "wd1_trajectory": WD1(num_iterations=2, likelihood="trajectory", prompt_mask_ratio=0.0, fresh_masks=False),
    "sft": SFT(num_masks=3),
    "embr_e_group_mean": EmbrE(num_iterations=2, c_mode="group_mean", cross_fit=True),
    "dmpo_wdce_unbias": DmpoWDCE(num_iterations=2, likelihood="elbo", baseline="unbias", reward_temperature=1.0),
    "coupled_rows": Coupled(num_iterations=2, kl_coef=0.0),
}


def away_from_old(policy, batch):
    """Old and reference scores that differ from the policy's, so that ratios and clips are active."""
    for draw in batch.draws:
        scores = score(policy, batch.rollouts, draw.corruption, micro_batch_size=64).logps
        noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=scores.dtype)
        draw.old_logps = (scores + 0.3 * noise) * draw.corruption.scored
        draw.ref_logps = (scores - 0.2 * noise) * draw.corruption.scored


@pytest.mark.parametrize("name", CASES)
def test_gradient_does_not_depend_on_the_micro_batch_size(name):
    algorithm = CASES[name]
    expected = None
    for size in (10_000, 1, 3, 4, 7, 16):
        policy = tiny_policy()
        trainer = make_trainer(
            policy,
            algorithm,
            FixedSource(fake_rollouts()),
            reference=frozen_copy(tiny_policy(seed=1)),
            micro_batch_size=size,
        )
        batch = trainer.prepare(0)
        away_from_old(policy, batch)
        numbers = trainer.backward(batch, batch.draws[-1])
        got = [numbers["logps"], *gradients(policy)]
        expected = expected or got
        assert any(g.abs().max() > 1e-6 for g in got[1:])
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12), (size, float((a - b).abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_one_backward_through_the_whole_batch(name):
    algorithm = CASES[name]
    policy, reference = tiny_policy(), frozen_copy(tiny_policy(seed=1))
    trainer = make_trainer(policy, algorithm, FixedSource(fake_rollouts()), reference=reference, micro_batch_size=8)
    batch = trainer.prepare(0)
    away_from_old(policy, batch)
    draw, rollouts = batch.draws[0], batch.rollouts
    trainer.backward(batch, draw)
    got = gradients(policy)
    policy.module.zero_grad()

    # each copy by itself, through the plain transformers forward
    shape = draw.corruption.scored.shape
    flat, kl = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    ordinary = torch.arange(policy.module.config.vocab_size) != policy.mask_token_id
    for b, k in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).tolist():
        canvas = torch.cat([rollouts.prompt_ids[b], rollouts.completion_ids[b]])
        canvas = torch.where(draw.corruption.masked[b, k], policy.mask_token_id, canvas)[None]
        attention = torch.cat([rollouts.prompt_mask[b], torch.ones(shape[2], dtype=torch.bool)])[None]
        logits = policy.module(canvas, attention).logits[0, -shape[2] :].clone()
        logits[:, policy.mask_token_id] = -math.inf
        logp = logits.log_softmax(-1).gather(-1, rollouts.completion_ids[b][:, None]).squeeze(-1)
        flat = flat.index_put((torch.tensor(b), torch.tensor(k)), logp * draw.corruption.scored[b, k])
        # from one forward with logp: the norms go back in float32, where the slope of a sum is not the sum of slopes
        other = reference.module(canvas, attention).logits[0, -shape[2] :]
        p, q = (values[:, ordinary].softmax(-1) for values in (logits, other))
        divergence = (p * (p.log() - q.log())).sum(-1) * draw.corruption.scored[b, k]
        kl = kl.index_put((torch.tensor(b), torch.tensor(k)), divergence)
    x = LossInputs(
        logps=flat,
        corruption=draw.corruption,
        advantages=batch.advantages,
        rewards=rollouts.rewards,
        groups=rollouts.groups,
        length=rollouts.length,
        old_logps=draw.old_logps,
        ref_logps=draw.ref_logps,
        old_corruption=draw.old_corruption,
        ref_corruption=draw.ref_corruption,
        kl=kl,
        uniform=draw.uniform,
        values=batch.values,
        evidence=batch.evidence,
        sample_logps=rollouts.sample_logps,
        process_rewards=rollouts.process_rewards,
    )
    algorithm.loss(x).loss.backward()
    for a, b in zip(got, gradients(policy), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_separable_objective_pays_one_forward_for_each_copy():
    calls = []
    policy = tiny_policy()
    inner = policy.module.forward
    policy.module.forward = lambda *a, **k: calls.append(a[0].shape[0]) or inner(*a, **k)
    trainer = make_trainer(policy, ESPO(num_iterations=1, kl_coef=0.0), FixedSource(fake_rollouts()), monitor_rows=0)
    trainer.update(trainer.prepare(0), 0)
    assert sum(calls) <= 12 * 4  # 12 rollouts, 4 copies each; copies without a masked token cost nothing


def test_first_update_on_fresh_masks_has_ratio_one_and_old_scores_stay():
    rows = []
    policy = tiny_policy()
    algorithm = ESPO(num_iterations=3, fresh_masks=False, kl_coef=0.0)
    trainer = make_trainer(policy, algorithm, FixedSource(fake_rollouts()), listeners=(Recorder(rows),))
    batch = trainer.prepare(0)
    assert batch.draws[0].old_logps is None
    before = score(policy, batch.rollouts, batch.draws[0].corruption, micro_batch_size=64).logps
    for inner in range(3):
        trainer.update(batch, inner)
    assert torch.equal(batch.draws[2].old_logps, before)
    assert rows[0]["ratio_max"] == 1.0 and rows[1]["ratio_max"] > 1.0


def test_fresh_masks_are_scored_by_the_policy_that_drew_the_rollouts():
    policy = tiny_policy()
    trainer = make_trainer(policy, ESPO(num_iterations=2, kl_coef=0.0), FixedSource(fake_rollouts()))
    batch = trainer.prepare(0)
    old = tiny_policy()
    expected = score(old, batch.rollouts, batch.draws[1].corruption, micro_batch_size=64).logps
    trainer.update(batch, 0)
    trainer.update(batch, 1)
    assert torch.allclose(batch.draws[1].old_logps, expected, atol=1e-12)
    assert not torch.equal(batch.draws[0].corruption.masked, batch.draws[1].corruption.masked)


def test_passes_share_the_noise_of_the_batch_and_are_told_apart_by_their_number():
    """UniGRPO: the start is common to the passes, the share of masked tokens rises from it to everything."""
    algorithm = UniGRPO(num_iterations=3, kl_coef=0.0)
    source = FixedSource(fake_rollouts(length=20))
    batch = make_trainer(tiny_policy(), algorithm, source, monitor_rows=0).prepare(0)
    first, second, last = (draw.corruption.scored[:, 0].sum(-1) for draw in batch.draws)
    assert ((second - (first + 20) / 2).abs() <= 1).all() and (last == 20).all()
    assert len(first.unique()) > 3
    expected = algorithm.draw(source.rollouts, noise=Noise(3).stream("train").stream("corruption"), iteration=1)
    assert torch.equal(batch.draws[1].corruption.masked, expected.masked)


def test_independent_draws_for_old_and_reference_differ_from_the_shared_ones():
    policy = tiny_policy()
    algorithm = ESPO(num_iterations=1, share_masks=False, kl_coef=0.1)
    trainer = make_trainer(policy, algorithm, FixedSource(fake_rollouts()), reference=frozen_copy(policy))
    draw = trainer.prepare(0).draws[0]
    masks = [c.masked for c in (draw.corruption, draw.old_corruption, draw.ref_corruption)]
    assert not any(torch.equal(a, b) for a, b in [(masks[0], masks[1]), (masks[1], masks[2]), (masks[0], masks[2])])
    assert draw.old_logps is not None


@dataclass
class Recorder:
    rows: list
    batches: list = field(default_factory=list)
    evaluations: list = field(default_factory=list)

    def on_batch(self, batch):
        self.batches.append(batch)

    def on_step(self, row, timing):
        self.rows.append(row)

    def on_evaluation(self, row, is_best):
        self.evaluations.append((row, is_best))

    def on_boundary(self, trainer):
        pass

    def on_fault(self, trainer, message):
        self.rows.append(message)


def run_digits(algorithm, seed=0, **settings):
    rows: list = []
    policy = tiny_policy(seed, torch.float32)
    source = sudoku_source(DigitSum(), prompts_per_batch=8, group_size=8)
    settings = {"optimizer": OptimizerConfig(lr=3e-3, max_grad_norm=1.0), "num_batches": 25} | settings
    trainer = make_trainer(
        policy, algorithm, source, reference=frozen_copy(policy), listeners=(Recorder(rows),), **settings
    )
    trainer.run()
    return rows, policy


# whose rewards are those of completions alone: re-rolls belong to the tests of the rollouts
FROM_COMPLETIONS = [name for name, algorithm in ALGORITHMS.items() if "steps" not in algorithm.strategies]


# defaults for models of billions of weights: an energy that learns in 25 batches, and weights that follow it
LEARNING = {"dga": {"mode": "sum", "ess_target": 0.3, "energy_lr": 1e-2, "energy_trunk_lr": 3e-3}}


@pytest.mark.parametrize("name", FROM_COMPLETIONS)
def test_reward_rises(name):
    rows, _ = run_digits(ALGORITHMS[name](num_iterations=2, **LEARNING.get(name, {})))
    # 12 of 18 tokens are digits or '|' and five of them pay: an untrained model earns about 0.3; 25 batches reach 0.6
    assert rows[0]["reward"] < 0.45
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.2


def test_same_seed_same_bits():
    first, policy_1 = run_digits(ESPO(num_iterations=2), num_batches=3)
    second, policy_2 = run_digits(ESPO(num_iterations=2), num_batches=3)
    assert first == second
    for a, b in zip(policy_1.module.parameters(), policy_2.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_touches_the_global_generator():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    run_digits(ESPO(num_iterations=1), num_batches=2)
    assert torch.equal(before, torch.get_rng_state())


def test_metrics_have_the_names_people_know():
    rows, _ = run_digits(ESPO(num_iterations=2), num_batches=1)
    wanted = (
        "step iteration reward reward_std frac_reward_zero_std kl entropy clip_ratio/region_mean "
        "completions/mean_length grad_norm learning_rate elbo elbo_per_token ratio_max unique_completion_rate"
    )
    assert set(wanted.split()) <= set(rows[0])
    assert rows[0]["kl"] == 0.0  # theta = ref on the same masks, exactly
    assert rows[0]["elbo"] == pytest.approx(4 * rows[0]["elbo_per_token"])


def test_kl_is_pulled_down_by_its_coefficient():
    free, _ = run_digits(ESPO(num_iterations=2, kl_coef=0.0), num_batches=15)
    held, _ = run_digits(ESPO(num_iterations=2, kl_coef=1.0), num_batches=15)
    assert held[-1]["kl"] < 0.5 * free[-1]["kl"]


def test_a_nan_reward_is_refused_with_the_prompt():
    source = sudoku_source(DigitSum(broken=True))
    trainer = make_trainer(tiny_policy(), ESPO(), source)
    with pytest.raises(RewardError, match=r"reward of prompt \d+ is nan"):
        trainer.run()


def test_a_loss_that_is_not_finite_stops_before_the_step():
    policy = tiny_policy()
    trainer = make_trainer(policy, ESPO(num_iterations=1, kl_coef=0.0), FixedSource(fake_rollouts()))
    batch = trainer.prepare(0)
    batch.advantages[0] = math.nan
    before = [p.clone() for p in policy.module.parameters()]
    with pytest.raises(TrainingError, match="loss is nan at step 1"):
        trainer.update(batch, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.module.parameters(), strict=True))


def test_the_stop_rule_waits_for_its_batch_and_window():
    values = iter([0.1, 0.1, 0.9, 0.3, 0.2, 0.1, 0.1])
    recorder = Recorder([])
    trainer = make_trainer(
        tiny_policy(),
        SFT(),
        FixedSource(fake_rollouts()),
        num_batches=7,
        eval_every=1,
        monitor_rows=0,
        stop=StopRule(at_most=0.25, window=2, after_batch=3),
        evaluate=lambda: {"accuracy": next(values)},
        listeners=(recorder,),
    )
    trainer.run()
    # (0.1 + 0.1)/2 comes too early; 0.9, 0.3 -> 0.6; 0.3, 0.2 -> 0.25: met after the fifth batch
    assert trainer.state.step == 5
    assert [best for _, best in recorder.evaluations] == [True, False, True, False, False]


def test_the_cosine_ends_at_its_floor_and_warms_up():
    config = OptimizerConfig(lr=1.0, schedule="cosine", min_lr_ratio=0.1, warmup_steps=4)
    assert [config.scale(step, 100) for step in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert config.scale(4, 100) == 1.0
    assert config.scale(52, 100) == pytest.approx(0.55)  # half way: mean of 1 and 0.1
    assert config.scale(100, 100) == pytest.approx(0.1)
