"""wd1 against a loop oracle, closed forms of its weights, and hand-made numbers."""

import math
from dataclasses import fields, replace

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import conditionals, make_rollouts, token_estimates, wd1_loss
from tests.oracles_steps import trajectory_logp
from unmask.build import train_recipe
from unmask.errors import ConfigError
from unmask.objectives import WD1
from unmask.types import Corruption, LossInputs

STATES = {"prompt_mask_ratio": 0.0, "fresh_masks": False}
"""What goes with the states of a sampler, which leave nothing to draw."""
REWARDS = torch.tensor([1.0, 0.25, 0.0, 2.0, 0.5], dtype=torch.float64)
GROUPS = torch.tensor([3, 3, 8, 8, 3])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_masks": 3},
        {"prompt_mask_ratio": 0.5, "num_masks": 2},
        {"prompt_mask_ratio": 0.0},
        {"old_coef": 0.25},
        {"old_coef": 0.25, "ref_coef": 0.5},
        {"positive_only": True},
        {"count_positions": "all"},
    ],
    ids=str,
)
def test_loss_equals_the_loop_oracle(fields):
    algorithm = WD1(**fields)
    x = inputs(algorithm)
    length = ROLLOUTS.length.tolist() if algorithm.count_positions == "to_eos" else [4] * 4
    table = token_estimates(x.logps, x.corruption.masked[..., -4:], length, "mean_field", False)
    expected = wd1_loss(
        table,
        ROLLOUTS.rewards.tolist(),
        ROLLOUTS.groups.tolist(),
        length,
        psi=1 / (algorithm.old_coef + algorithm.ref_coef),
        positive_only=algorithm.positive_only,
    )
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


STEPS = [[2, 0, 3, 1], [0, 0, 1, 1], [3, 2, 1, 0], [1, 4, 4, 0]]  # the second and fourth with several tokens a step


@pytest.mark.parametrize(
    "fields",
    [{}, {"count_positions": "all"}, {"positive_only": True, "old_coef": 0.5}, {"ref_coef": 1.0}],
    ids=str,
)
def test_trajectory_loss_equals_the_loop_oracle(fields):
    """The same weights, on Σ_i l(i; masked before the step of i) from the enumerated conditionals."""
    algorithm = WD1(likelihood="trajectory", **STATES, **fields)
    batch = replace(ROLLOUTS, reveal_step=torch.tensor(STEPS))
    x = inputs(algorithm, rollouts=batch)
    length = ROLLOUTS.length.tolist() if algorithm.count_positions == "to_eos" else [4] * 4
    table = [
        [trajectory_logp(conditionals(POLICY, y), s, n)]
        for y, s, n in zip(batch.completion_ids, STEPS, length, strict=True)
    ]
    expected = wd1_loss(
        table,
        ROLLOUTS.rewards.tolist(),
        ROLLOUTS.groups.tolist(),
        [1] * 4,  # each row's sum is taken already
        psi=1 / (algorithm.old_coef + algorithm.ref_coef),
        positive_only=algorithm.positive_only,
    )
    out = algorithm.loss(x)
    assert_same_value_and_gradient(out.loss, expected, POLICY)
    weights = algorithm.advantages(batch.rewards, batch.groups)
    good = [row[0].item() for row, w in zip(table, weights, strict=True) if w > 0]
    assert out.metrics["trajectory_logp_good"] == pytest.approx(sum(good) / len(good), abs=1e-12)
    assert "mean_field_logp_good" not in out.metrics


def test_one_token_a_step_from_left_to_right_is_the_autoregressive_likelihood():
    """By hand: the chain of conditionals, each from the canvas with what is to its right masked."""
    algorithm = WD1(likelihood="trajectory", **STATES, count_positions="all")
    batch = replace(ROLLOUTS, reveal_step=torch.arange(4).repeat(4, 1))
    x = inputs(algorithm, rollouts=batch)
    total = x.logps.new_zeros(())
    for y, weight in zip(batch.completion_ids, x.advantages, strict=True):
        for k in range(4):
            canvas = torch.cat([torch.zeros(2, dtype=torch.int64), y[:k], torch.full((4 - k,), POLICY.mask_token_id)])
            total = total - weight * POLICY(canvas[None])[0, 2 + k, : POLICY.vocab].log_softmax(-1)[y[k]] / 2
    assert_same_value_and_gradient(algorithm.loss(x).loss, total, POLICY)


def test_steps_do_not_depend_on_noise_or_pass():
    algorithm = WD1(likelihood="trajectory", **STATES)
    batch = replace(ROLLOUTS, reveal_step=torch.tensor(STEPS))
    first, other = algorithm.draw(batch, noise=NOISE), algorithm.draw(batch, noise=NOISE.stream("x"), iteration=3)
    assert torch.equal(first.masked, other.masked) and first.num_masks == 4 and first.kind == "order"
    assert not first.masked[..., :2].any()  # the prompt is shown
    assert algorithm.needs.order and not WD1().needs.order


def test_a_recipe_of_steps_asks_for_a_sampler_with_a_record_of_them(tmp_path):
    tables = {
        "model": {"path": "somewhere"},
        "task": {"type": "sudoku"},
        "algorithm": {"type": "wd1", "likelihood": "trajectory", **STATES},
        "sampler": {"type": "low_confidence", "block_length": 4},
    }
    assert train_recipe(tables, tmp_path).algorithm.value.needs.order
    for sampler, message in (
        ({"type": "low_confidence", "cache": "dual"}, "these are those of an approximation"),
        ({"type": "engine", "engine": "mine.py:Engine"}, "wd1 reads the steps in which tokens were fixed"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_recipe({**tables, "sampler": sampler}, tmp_path)
    tables["algorithm"]["count_positions"] = "all"
    with pytest.raises(ConfigError, match=r"Set sampler.stop_early = false"):
        train_recipe(tables, tmp_path)


def test_loss_by_hand():
    """One group, rewards 1 and 0, L = 2, lengths 2 and 1: w⁺ - w⁻ = ±tanh(1/2), log π = -3 and -4."""
    scored = torch.tensor([[[True, True]], [[True, False]]])
    logps = torch.tensor([[[-1.0, -2.0]], [[-4.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    draw = Corruption(torch.ones(2, 1, 2).bool(), scored, scored.double(), "mean_field")
    rewards, groups = torch.tensor([1.0, 0.0]).double(), torch.tensor([5, 5])
    x = LossInputs(logps, draw, WD1().advantages(rewards, groups), rewards, groups, torch.tensor([2, 1]))
    out = WD1().loss(x)
    half = math.tanh(0.5)
    assert out.loss.item() == pytest.approx(3 * half - 4 * half, abs=1e-14)
    assert out.metrics == pytest.approx(
        {"policy_loss": -half, "weight_max": half, "mean_field_logp_good": -3.0, "mean_field_logp_bad": -4.0}
    )
    out.loss.backward()
    assert logps.grad.flatten().tolist() == pytest.approx([-half, -half, half, 0.0], abs=1e-15)
    none = WD1().loss(LossInputs(logps, draw, 0 * x.advantages, rewards, groups, x.length)).metrics
    assert (none["mean_field_logp_good"], none["mean_field_logp_bad"], none["weight_max"]) == (0.0, 0.0, 0.0)


def test_metrics_of_two_good_and_one_bad_rollout():
    """Rewards 1, 1, 0: A = 1/3, 1/3, -2/3, so that the bad one has the largest weight, twice that of a good one."""
    scored = torch.ones(3, 1, 1).bool()
    logps = torch.tensor([-1.0, -2.0, -5.0], dtype=torch.float64).view(3, 1, 1)
    rewards, groups = torch.tensor([1.0, 1.0, 0.0]).double(), torch.zeros(3)
    draw = Corruption(scored, scored, scored.double(), "mean_field")
    x = LossInputs(logps, draw, WD1().advantages(rewards, groups), rewards, groups, torch.tensor([1, 1, 1]))
    e = math.e
    weight = e / (2 + e) - 1 / (2 * e + 1)  # of the bad one: w⁻ - w⁺
    expected = {
        "policy_loss": weight * (-5.0 + 1.5),
        "weight_max": weight,
        "mean_field_logp_good": -1.5,
        "mean_field_logp_bad": -5.0,
    }
    assert WD1().loss(x).metrics == pytest.approx(expected, abs=1e-14)
    turned = WD1().loss(replace(x, advantages=-x.advantages)).metrics
    assert (turned["mean_field_logp_good"], turned["mean_field_logp_bad"]) == (-5.0, -1.5)


def test_gradient_is_the_weighted_gradient_of_the_mean_field_likelihood():
    """No prompt masking: -(1/2) Σ w_i ∇ Σ_{k<E} l(k; all masked), from the conditionals of the masked canvas."""
    algorithm = WD1(prompt_mask_ratio=0.0)
    weight = [math.tanh(0.375), -math.tanh(0.375), -math.tanh(1.0), math.tanh(1.0)]  # gaps 0.75 and 2
    total = sum(
        w * conditionals(POLICY, y)[-1, :n].sum()
        for w, y, n in zip(weight, ROLLOUTS.completion_ids, [4, 3, 1, 2], strict=True)
    )
    assert_same_value_and_gradient(algorithm.loss(inputs(algorithm)).loss, -total / 2, POLICY)


def test_weights_add_up_and_grow_with_the_reward():
    positive = WD1(positive_only=True).advantages(REWARDS, GROUPS)
    both = WD1().advantages(REWARDS, GROUPS)
    for group in (3, 8):
        rows = group == GROUPS
        assert positive[rows].sum().item() == pytest.approx(1.0, abs=1e-15)
        assert both[rows].sum().item() == pytest.approx(0.0, abs=1e-15)
        order = REWARDS[rows].argsort()
        assert (both[rows][order].diff() > 0).all() and (positive[rows][order].diff() > 0).all()


@pytest.mark.parametrize(("old_coef", "gap"), [(1.0, 0.75), (0.5, 3.0), (4.0, 0.1)])
def test_weights_of_two_rollouts_are_a_hyperbolic_tangent(old_coef, gap):
    weights = WD1(old_coef=old_coef).advantages(torch.tensor([gap, 0.0], dtype=torch.float64), torch.tensor([0, 0]))
    expected = math.tanh(gap / old_coef / 2)
    assert weights.tolist() == pytest.approx([expected, -expected], abs=1e-14)  # a few roundings of one half


def test_weights_and_share_follow_the_two_coefficients():
    rewards, groups = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0, 0])
    for old, ref in ((1.0, 0.0), (1.0, 0.5), (0.5, 1.5), (2.0, 2.0)):
        algorithm = WD1(old_coef=old, ref_coef=ref)
        half = math.tanh(1 / (old + ref) / 2)
        assert algorithm.advantages(rewards, groups).tolist() == pytest.approx([half, -half], abs=1e-14)
        assert algorithm.needs.reference_share == pytest.approx(ref / (old + ref), abs=1e-15)


def test_the_tilted_mixture_is_the_best_law_under_both_pulls():
    """By gradient over all laws of three outcomes: E[A] - λ KL(π, old) - β KL(π, ref) is stationary there, and less
    anywhere near."""
    old, ref = (torch.tensor(p, dtype=torch.float64) for p in ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]))
    advantage = torch.tensor([0.7, -0.4, -0.3], dtype=torch.float64)
    algorithm = WD1(old_coef=0.8, ref_coef=0.4)
    b = algorithm.needs.reference_share

    def gain(logits):
        log_p = logits.log_softmax(-1)
        pulls = 0.8 * (log_p - old.log()) + 0.4 * (log_p - ref.log())
        return (log_p.exp() * (advantage - pulls)).sum()

    best = ((1 - b) * old.log() + b * ref.log() + advantage / 1.2).requires_grad_()
    (slope,) = torch.autograd.grad(gain(best), best)
    assert slope.abs().max() < 1e-14
    for direction in torch.eye(3, dtype=torch.float64):
        assert all(gain(best.detach() + step * direction) < gain(best) for step in (0.1, -0.1))


def test_negated_rewards_negate_the_loss_and_shifted_ones_leave_it():
    algorithm, x = WD1(), inputs(WD1())

    def loss(rewards):
        weights = algorithm.advantages(rewards, ROLLOUTS.groups)
        return algorithm.loss(LossInputs(x.logps, x.corruption, weights, rewards, x.groups, x.length)).loss.item()

    rewards = ROLLOUTS.rewards
    assert loss(-rewards) == pytest.approx(-loss(rewards), abs=1e-13)
    assert loss(rewards + torch.tensor([5.0, 5.0, -1.0, -1.0])) == pytest.approx(loss(rewards), abs=1e-13)


def test_equal_rewards_weigh_nothing_but_in_wd1_p_alike():
    rewards, groups = torch.full((4,), 0.3), torch.tensor([1, 1, 1, 1])
    assert WD1().advantages(rewards, groups).tolist() == [0.0] * 4
    assert WD1(positive_only=True).advantages(rewards, groups).tolist() == [0.25] * 4


def test_weights_are_finite_and_reach_their_limits_at_extreme_rewards():
    weights = WD1().advantages(torch.tensor([1e4, 0.0, 0.0], dtype=torch.float32), torch.tensor([0, 0, 0]))
    assert weights.tolist() == pytest.approx([1.0, -0.5, -0.5], abs=1e-6)


def test_nothing_is_compared_with_another_policy():
    assert not (WD1().needs.old or WD1().needs.ref)
    assert WD1().share_masks and "share_masks" not in {f.name for f in fields(WD1)}


def test_draws_follow_the_fields():
    assert WD1().draw(ROLLOUTS, noise=NOISE).scored.sum(-1).flatten().tolist() == [4, 3, 1, 2]
    assert WD1(num_masks=5).draw(ROLLOUTS, noise=NOISE).num_masks == 5
    assert WD1(num_masks=5, prompt_mask_ratio=0.0).draw(ROLLOUTS, noise=NOISE).num_masks == 1
    assert WD1(count_positions="all").draw(ROLLOUTS, noise=NOISE).scored.all()
    wide = make_rollouts(torch.zeros(200, 2, dtype=torch.int64), prompt=torch.ones(200, 10, dtype=torch.int64))
    for ratio in (0.15, 0.6):
        hidden = WD1(prompt_mask_ratio=ratio).draw(wide, noise=NOISE).masked[..., :10].double().mean().item()
        assert abs(hidden - ratio) < 4 * (ratio * (1 - ratio) / 2000) ** 0.5


def test_published_defaults():
    a = WD1()
    assert (a.num_masks, a.prompt_mask_ratio, a.num_iterations, a.fresh_masks) == (1, 0.15, 8, True)
    assert (a.old_coef, a.ref_coef, a.positive_only, a.likelihood) == (1.0, 0.0, False, "mean_field")
    assert (a.advantage, a.count_positions, a.is_row_separable) == ("group_centered", "to_eos", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ref_coef": -0.5}, r"algorithm.ref_coef = -0.5: .*Use 0"),
        ({"ref_coef": float("inf")}, r"algorithm.ref_coef = inf: "),
        ({"old_coef": 0.0}, r"algorithm.old_coef = 0.0: .*above 0"),
        ({"old_coef": float("inf")}, r"algorithm.old_coef = inf: "),
        ({"num_masks": 0}, r"algorithm.num_masks = 0: "),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0: "),
        ({"prompt_mask_ratio": 1.0}, r"algorithm.prompt_mask_ratio = 1.0: .*Try 0.15"),
        ({"likelihood": "elbo"}, r"algorithm.likelihood = 'elbo': unknown. Use one of: mean_field, trajectory"),
        ({"likelihood": "trajectory"}, r"algorithm.prompt_mask_ratio = 0.15: .*states of the sampler.* = 0, "),
        (
            {"likelihood": "trajectory", "prompt_mask_ratio": 0.0},
            r"algorithm.fresh_masks = True: .*fresh_masks = false",
        ),
        ({"likelihood": "trajectory", **STATES, "num_masks": 2}, r"algorithm.num_masks = 2: .*num_masks = 1"),
        ({"advantage": "mean"}, r"algorithm.advantage = 'mean': "),
        ({"count_positions": "eos"}, r"algorithm.count_positions = 'eos': "),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ConfigError, match=message):
        WD1(**fields)


def test_a_single_rollout_has_nothing_to_be_weighed_against():
    with pytest.raises(ConfigError, match="group_size must be >= 2"):
        WD1().advantages(torch.ones(1), torch.zeros(1))
