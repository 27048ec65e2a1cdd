"""SAPO against diffu-GRPO's loop oracle with advantages added up by hand."""

from dataclasses import fields, replace

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import diffu_grpo_loss, make_rollouts, token_estimates
from unmask.errors import ConfigError
from unmask.objectives import SAPO, DiffuGRPO

REWARDS, LENGTH = ROLLOUTS.rewards.tolist(), ROLLOUTS.length.tolist()  # 1, 0.25 | 0, 2
PROCESS = torch.tensor([0.3, 9.0, -9.0, -0.75], dtype=torch.float64)  # 9: rows that did worse have no such number


def given(algorithm, process=PROCESS):
    return replace(inputs(algorithm), process_rewards=process)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"process_coef": 0.5, "clip_low": 0.05, "clip_high": 0.05},
        {"process_coef": 2.0, "kl_coef": 0.5, "num_masks": 3},
        {"count_positions": "all", "prompt_mask_ratio": 0.0},
    ],
    ids=str,
)
def test_loss_equals_the_loop_oracle(changed):
    algorithm = SAPO(**changed)
    x = given(algorithm)
    length = LENGTH if algorithm.count_positions == "to_eos" else [4] * 4
    advantages = []
    for b, reward in enumerate(REWARDS):
        advantage = reward - (REWARDS[b] + REWARDS[b ^ 1]) / 2
        if advantage > 0:
            advantage += algorithm.process_coef * PROCESS[b].item()
        advantages.append(advantage)
    tables = [
        token_estimates(v, x.corruption.masked[..., -4:], length, "mean_field", False)
        for v in (x.logps, x.old_logps, x.ref_logps)
    ]
    expected = diffu_grpo_loss(*tables, advantages, length, clip=algorithm.clip_low, kl_coef=algorithm.kl_coef)
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def test_process_rewards_reach_better_rollouts_only():
    """What stands in the other rows, even junk, changes nothing; the sum over a group is no longer zero."""
    algorithm = SAPO()
    junk = torch.tensor([0.3, float("nan"), float("inf"), -0.75], dtype=torch.float64)
    x, y = given(algorithm), given(algorithm, junk)
    assert torch.equal(algorithm.loss(x).loss, algorithm.loss(y).loss)
    assert algorithm.loss(y).metrics == algorithm.loss(x).metrics
    assert not torch.allclose(algorithm.loss(given(algorithm, PROCESS + 1)).loss, algorithm.loss(x).loss)


@pytest.mark.parametrize("changed", [{"process_coef": 0.0}, {}], ids=str)
def test_without_process_rewards_it_is_diffu_grpo(changed):
    process = PROCESS if changed else torch.zeros(4).double()
    ours = SAPO(**changed).loss(given(SAPO(), process))
    theirs = DiffuGRPO().loss(inputs(DiffuGRPO()))
    assert torch.equal(ours.loss, theirs.loss)
    assert theirs.metrics.items() <= ours.metrics.items()


def test_a_process_reward_equal_to_the_advantage_doubles_it():
    """As a deterministic sampler has it, whose re-rollouts repeat the original; and the whole gradient by hand."""
    algorithm = SAPO(kl_coef=0.0, prompt_mask_ratio=0.0)
    x = given(algorithm, torch.tensor([0.375, 0.0, 0.0, 1.0]).double())
    x = replace(x, old_logps=x.logps.detach())
    total = x.logps.new_zeros(())
    for b, advantage in enumerate([2 * 0.375, -0.375, -1.0, 2 * 1.0]):
        total = total - advantage * x.logps[b, 0, : LENGTH[b]].sum() / sum(LENGTH)
    ours, theirs = (torch.autograd.grad(v, POLICY.table, retain_graph=True)[0] for v in (algorithm.loss(x).loss, total))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14) and theirs.abs().max() > 1e-3


def test_metrics():
    metrics = SAPO().loss(given(SAPO())).metrics
    assert metrics["process_reward"] == pytest.approx((0.3 - 0.75) / 2, abs=1e-15)
    assert metrics["process_reward_negative"] == 0.5
    one = replace(given(SAPO()), advantages=torch.tensor([1.0, -1.0, 0.0, 0.0]).double())
    assert SAPO().loss(one).metrics["process_reward"] == pytest.approx(0.3, abs=1e-15)
    for value, share in ((0.3, 0.0), (0.0, 0.0), (-0.1, 1.0)):
        process = torch.tensor([value, -1.0, -1.0, -1.0]).double()
        assert SAPO().loss(replace(one, process_rewards=process)).metrics["process_reward_negative"] == share
    nobody = SAPO().loss(replace(given(SAPO()), advantages=torch.zeros(4).double())).metrics
    assert nobody["process_reward"] == nobody["process_reward_negative"] == 0.0


def test_equal_rewards_leave_the_kl_alone():
    x = replace(given(SAPO()), advantages=torch.zeros(4).double())
    out = SAPO().loss(x)
    assert out.metrics["policy_loss"] == 0.0 and out.loss.item() == out.metrics["kl_penalty"] > 0


@pytest.mark.parametrize("shift", [300.0, -300.0])
def test_finite_at_extremes(shift):
    x = given(SAPO(), 1e6 * PROCESS)
    x = replace(x, logps=(x.logps.detach() + shift).requires_grad_())
    out = SAPO().loss(x)
    assert torch.isfinite(out.loss) and torch.isfinite(torch.autograd.grad(out.loss, x.logps)[0]).all()


def test_missing_process_rewards_are_named():
    with pytest.raises(ValueError, match=r'got no process_rewards; collect rollouts by rollout.type = "steps"'):
        SAPO().loss(inputs(SAPO()))
    assert SAPO.strategies == ("steps",) and SAPO.is_row_separable


def test_defaults_and_draws_are_those_of_diffu_grpo():
    ours, theirs = SAPO(), DiffuGRPO()
    for f in fields(theirs):
        assert getattr(ours, f.name) == getattr(theirs, f.name), f.name
    assert ours.process_coef == 1.0 and ours.needs == theirs.needs
    assert {f.name for f in fields(ours)} - {f.name for f in fields(theirs)} == {"process_coef"}
    wide = make_rollouts(torch.zeros(4, 2, dtype=torch.int64), prompt=torch.ones(4, 40, dtype=torch.int64))
    for iteration in (0, 1):
        draws = [a.draw(ROLLOUTS, noise=NOISE, iteration=iteration) for a in (ours, theirs)]
        assert torch.equal(draws[0].masked, draws[1].masked) and torch.equal(draws[0].weight, draws[1].weight)
    assert torch.equal(ours.draw(wide, noise=NOISE).masked, ours.draw(wide, noise=NOISE, iteration=0).masked)
    assert not torch.equal(ours.draw(wide, noise=NOISE).masked, ours.draw(wide, noise=NOISE, iteration=1).masked)
    assert not SAPO(kl_coef=0.0).needs.ref
    assert SAPO(num_masks=5).draw(ROLLOUTS, noise=NOISE).num_masks == 5
    assert SAPO(num_masks=5, prompt_mask_ratio=0.0).draw(ROLLOUTS, noise=NOISE).num_masks == 1
    assert SAPO(count_positions="all").draw(ROLLOUTS, noise=NOISE).scored.all()
    assert SAPO(negative_scale=0.5).advantages(ROLLOUTS.rewards, ROLLOUTS.groups).tolist() == [0.375, -0.1875, -0.5, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"process_coef": -1.0}, r"algorithm.process_coef = -1.0: .*diffu_grpo"),
        ({"process_coef": float("inf")}, r"algorithm.process_coef = inf: "),
        ({"num_masks": 0}, r"algorithm.num_masks = 0: "),
        ({"prompt_mask_ratio": 1.0}, r"algorithm.prompt_mask_ratio = 1.0: "),
        ({"clip_low": 2.0}, r"algorithm.clip_low = 2.0: "),
        ({"advantage": "mean"}, r"algorithm.advantage = 'mean': "),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(changed, message):
    with pytest.raises(ConfigError, match=message):
        SAPO(**changed)
