"""DGA against loop oracles and enumeration: energies, weights, the choice of a row, and the loss."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, OLD, POLICY, REF, assert_same_value_and_gradient
from tests.oracles import chi_square, chi_square_limit, make_rollouts, score_copies
from tests.oracles_energy import (
    dga_loss,
    dga_weights,
    divergences,
    effective,
    least_alpha,
    members,
    ranking_loss,
    softmax,
)
from unmask.errors import ConfigError
from unmask.objectives import DGA
from unmask.objectives.dga import _draw_rows
from unmask.objectives.target_weights import ess_coefficient
from unmask.types import LossInputs

GROUPS = [3, 3, 3, 8, 8, 3, 8]
REWARDS = [1.0, 0.25, 0.0, 2.0, 0.5, 0.25, 0.5]
ENERGIES = torch.tensor([-1.5, 0.25, 2.0, -0.75, 3.0, 0.125, 0.5], dtype=torch.float64)
ROLLOUTS = make_rollouts(
    torch.randint(0, 3, (7, 4), generator=torch.Generator().manual_seed(4)),
    groups=GROUPS,
    rewards=REWARDS,
    length=[4, 3, 1, 2, 4, 4, 3],
)


def inputs(algorithm, energies=ENERGIES, policy=POLICY, ref=REF, rollouts=ROLLOUTS) -> LossInputs:
    """As the trainer makes them, scored without any of the library's code."""
    draw = algorithm.draw(rollouts, noise=NOISE)
    uniform = NOISE.stream("choice").uniform(rollouts.prompt_key, rollouts.rollout_index, 0)
    return LossInputs(
        logps=score_copies(policy, rollouts, draw),
        corruption=draw,
        advantages=algorithm.advantages(rollouts.rewards, rollouts.groups),
        rewards=rollouts.rewards,
        groups=rollouts.groups,
        length=rollouts.length,
        kl=divergences(policy, ref, rollouts, draw),
        values=energies,
        uniform=uniform,
    )


def uniforms_for(choice: list[int], size: int = len(GROUPS)) -> torch.Tensor:
    """Uniforms with which the given rows come first: near 1 there, tiny elsewhere."""
    out = torch.full((size,), 1e-300, dtype=torch.float64)
    out[choice] = 1 - 1e-15
    return out


def oracle_weights(algorithm, energies=ENERGIES) -> list[float]:
    """w̃, from rewards where there is no energy."""
    values = energies.tolist()
    if not algorithm.use_energy:
        for rows in members(GROUPS):
            mean = sum(REWARDS[i] for i in rows) / len(rows)
            std = math.sqrt(sum((REWARDS[i] - mean) ** 2 for i in rows) / (len(rows) - 1))
            for i in rows:
                values[i] = -(REWARDS[i] - mean) / (std + 1e-4)
    a = algorithm
    return dga_weights(values, GROUPS, alpha=a.alpha, least=a.min_alpha, share=a.ess_target, clip=a.weight_clip)


SETTINGS = [
    {"mode": "sum"},
    {"mode": "sum", "alpha": 0.5},
    {"mode": "sum", "alpha": 0.5, "weight_clip": 1.5},
    {"mode": "sum", "alpha": 0.5, "weight_clip": math.inf, "kl_coef": 0.7},
    {"mode": "sum", "use_energy": False},
    {"mode": "sum", "use_energy": False, "alpha": 0.3},
    {"mode": "sum", "num_masks": 4, "coupled": True, "ess_target": 0.5},
    {"mode": "sum", "num_masks": 3, "count_positions": "to_eos"},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_loss_equals_the_loop_oracle(fields):
    algorithm = DGA(**fields)
    x = inputs(algorithm)
    length = ROLLOUTS.length.tolist() if algorithm.count_positions == "to_eos" else [4] * 7
    weights = oracle_weights(algorithm)
    expected = dga_loss(x.logps, x.kl, x.corruption, length, GROUPS, weights, algorithm.kl_coef)
    out = algorithm.loss(x)
    assert_same_value_and_gradient(out.loss, expected, POLICY)
    assert out.metrics["weight_max"] == pytest.approx(max(weights), abs=1e-10)
    shares = [effective([weights[i] for i in rows]) / len(rows) for rows in members(GROUPS)]
    assert out.metrics["ess"] == pytest.approx(sum(shares) / 2, abs=1e-10)
    assert out.loss.item() == pytest.approx(out.metrics["policy_loss"] + out.metrics["kl_penalty"], abs=1e-13)


def test_a_drawn_row_counts_once_and_unweighted():
    algorithm = DGA(alpha=0.5)
    for choice in ([0, 3], [5, 6], [2, 4]):
        x = replace(inputs(algorithm), uniform=uniforms_for(choice))
        coefficients = [float(i in choice) for i in range(7)]
        expected = dga_loss(x.logps, x.kl, x.corruption, [4] * 7, GROUPS, coefficients, 0.05)
        assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


@pytest.mark.parametrize("fields", [{}, {"alpha": 0.4, "weight_clip": 1.5}, {"use_energy": False}], ids=str)
def test_the_mean_over_all_choices_is_the_weighted_sum(fields):
    """Every pair of rows, one of each group, with the product of their weights: value and gradient."""
    index, whole = DGA(**fields), DGA(**fields, mode="sum")
    x = inputs(index)
    weights = oracle_weights(index)
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for choice in itertools.product(*members(GROUPS)):
        probability = math.prod(weights[i] for i in choice)
        total = total + probability * index.loss(replace(x, uniform=uniforms_for(list(choice)))).loss
        mass += probability
    assert mass == pytest.approx(1, abs=1e-12)
    assert_same_value_and_gradient(whole.loss(x).loss, total, POLICY)


def test_rows_are_drawn_with_their_weights():
    algorithm = DGA(alpha=1.5, kl_coef=0.0)
    x = inputs(algorithm)
    weights = oracle_weights(algorithm)
    draws = torch.arange(20_000)[:, None]
    uniform = NOISE.stream("law").uniform(ROLLOUTS.prompt_key, ROLLOUTS.rollout_index, draws).flatten()
    many = replace(x, uniform=uniform, groups=(100 * draws + ROLLOUTS.groups).flatten())
    chosen = _draw_rows(torch.tensor(weights, dtype=torch.float64).repeat(20_000), many).view(-1, 7)
    counts = chosen.sum(0).long().tolist()
    for rows in members(GROUPS):
        own = [counts[i] for i in rows]
        assert sum(own) == 20_000  # one row of each group
        assert chi_square(own, [weights[i] for i in rows]) < chi_square_limit(len(rows) - 1)


def test_alpha_is_the_least_that_keeps_the_effective_sample_size():
    algorithm = DGA(min_alpha=0.05, ess_target=0.9)
    g = torch.Generator().manual_seed(0)
    for scale in (0.001, 0.1, 1.0, 30.0, 1e4):
        energies = scale * torch.randn(7, generator=g, dtype=torch.float64)
        weight, alpha = algorithm.weights(inputs(algorithm, energies))
        for rows in members(GROUPS):
            own = [float(energies[i]) for i in rows]
            found = float(alpha[rows[0]])
            assert found == pytest.approx(least_alpha(own, 0.05, 0.9), rel=1e-9) and found >= 0.05 - 1e-15
            share = effective(softmax([-e / found for e in own])) / len(rows)
            assert share >= 0.9 - 1e-12
            assert found == pytest.approx(0.05) or share == pytest.approx(0.9, abs=1e-9)
            assert [float(weight[i]) for i in rows] == pytest.approx(softmax([-e / found for e in own]), abs=1e-9)


def test_the_effective_sample_size_grows_with_alpha():
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        energies = torch.randn(5, generator=g, dtype=torch.float64).tolist()
        sizes = [effective(softmax([-e / a for e in energies])) for a in (0.01, 0.05, 0.2, 1.0, 5.0, 100.0)]
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(sizes)) and sizes[0] >= 1 and sizes[-1] <= 5
    groups = torch.tensor([0] * 5)
    shares = [ess_coefficient(torch.tensor(energies), groups, 20.0, share)[0] for share in (0.3, 0.5, 0.9)]
    assert shares[0] >= shares[1] >= shares[2]


@pytest.mark.parametrize("mode", ["index", "sum"])
def test_invariants_of_the_weights(mode):
    algorithm = DGA(mode=mode, alpha=0.5, weight_clip=1.5)
    x = inputs(algorithm)
    weight, _ = algorithm.weights(x)
    for rows in members(GROUPS):
        own = weight[rows]
        assert float(own.sum()) == pytest.approx(1, abs=1e-14) and (own > 0).all()
        assert 1 <= 1 / float(own.square().sum()) <= len(rows)
    shift = torch.tensor([100.0 if g == 3 else -7.0 for g in GROUPS], dtype=torch.float64)
    moved, _ = algorithm.weights(replace(x, values=ENERGIES + shift))
    assert torch.allclose(moved, weight, rtol=0, atol=1e-12)
    equal, _ = algorithm.weights(replace(x, values=shift))
    assert equal.tolist() == pytest.approx([1 / GROUPS.count(g) for g in GROUPS], abs=1e-15)
    assert not x.values.requires_grad
    learned = ENERGIES.clone().requires_grad_()
    loss = algorithm.loss(replace(x, values=learned)).loss
    assert torch.autograd.grad(loss, learned, allow_unused=True) == (
        None,
    )  # the policy's loss teaches the energy nothing


def test_clipping_is_one_pass_so_that_a_weight_may_end_above_the_cap():
    """K = 4, w = (0.7, 0.1, 0.1, 0.1), γ = 2: cap 0.5, sum 0.8, so 0.625 and 0.125."""
    energies = torch.tensor([-math.log(7.0), 0.0, 0.0, 0.0], dtype=torch.float64)
    batch = make_rollouts(torch.zeros(4, 4, dtype=torch.int64), groups=[1] * 4, rewards=[1.0, 0.0, 0.0, 0.0])
    x = inputs(DGA(alpha=1.0), energies, rollouts=batch)
    weight, _ = DGA(alpha=1.0, weight_clip=2.0).weights(x)
    assert weight.tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125], abs=1e-14)
    for clip in (4.0, 9.0, math.inf):
        weight, _ = DGA(alpha=1.0, weight_clip=clip).weights(x)
        assert weight.tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=1e-14)


@pytest.mark.parametrize("mode", ["index", "sum"])
def test_a_single_rollout_is_imitated_as_supervised_training_would(mode):
    batch = make_rollouts(ROLLOUTS.completion_ids[:2], groups=[1, 2], rewards=[0.0, 1.0])
    algorithm = DGA(mode=mode, kl_coef=0.0)
    draw = algorithm.draw(batch, noise=NOISE)
    logps = score_copies(POLICY, batch, draw)
    zeros = torch.zeros(2, dtype=torch.float64)
    x = LossInputs(
        logps, draw, zeros, batch.rewards, batch.groups, batch.length, values=zeros + 5.0, uniform=zeros + 0.3
    )
    expected = sum(-(draw.weight[i, 0] * logps[i, 0]).sum() / 4 for i in range(2)) / 2
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def test_at_the_reference_the_kl_adds_nothing():
    algorithm = DGA(mode="sum", kl_coef=3.0)
    x = inputs(algorithm, ref=POLICY)
    out, without = algorithm.loss(x), replace(algorithm, kl_coef=0.0).loss(x)
    assert out.metrics["kl_penalty"] == 0.0 and "kl_penalty" not in without.metrics
    slopes = [torch.autograd.grad(o.loss, POLICY.table, retain_graph=True)[0] for o in (out, without)]
    assert torch.allclose(*slopes, rtol=0, atol=1e-12)
    assert not torch.allclose(slopes[0], torch.autograd.grad(algorithm.loss(inputs(algorithm)).loss, POLICY.table)[0])


def test_the_kl_is_a_mean_over_masked_tokens():
    """A constant KL of one nat at every masked token costs λ, however many there are."""
    algorithm = DGA(mode="sum", kl_coef=0.25, num_masks=2, coupled=True)
    x = inputs(algorithm)
    out = algorithm.loss(replace(x, kl=x.corruption.scored.double()))
    assert out.metrics["kl_penalty"] == pytest.approx(0.25, abs=1e-12)


def test_groups_without_variance_are_imitated_unless_they_are_left_out():
    batch = replace(ROLLOUTS, rewards=torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5], dtype=torch.float64))
    for skip in (False, True):
        algorithm = DGA(mode="sum", kl_coef=0.0, skip_zero_variance=skip)
        x = inputs(algorithm, rollouts=batch)
        logps = x.logps.detach().requires_grad_()
        moved = torch.autograd.grad(algorithm.loss(replace(x, logps=logps)).loss, logps)[0].flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [(not skip) or g == 8 for g in GROUPS]  # row 6 has the mean reward, and counts


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ranking_loss_equals_the_loop_oracle(scale):
    algorithm = DGA(ranking_scale=scale)
    energies = ENERGIES.clone().requires_grad_()
    rewards, groups = torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(GROUPS)
    found = algorithm.ranking_loss(energies, rewards, groups)
    expected = ranking_loss(energies, REWARDS, GROUPS, scale)
    assert abs((found - expected).item()) < 1e-12
    slopes = [torch.autograd.grad(v, energies, retain_graph=True)[0] for v in (found, expected)]
    assert torch.allclose(*slopes, rtol=0, atol=1e-12) and (slopes[0] != 0).any()
    shift = torch.tensor([40.0 if g == 3 else -3.0 for g in GROUPS], dtype=torch.float64)
    assert torch.allclose(algorithm.ranking_loss(energies + shift, rewards, groups), found, rtol=0, atol=1e-12)


def test_swapping_two_rewards_turns_the_slope_of_their_gap_round():
    energies = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    groups = torch.zeros(2, dtype=torch.int64)
    slopes = [
        torch.autograd.grad(DGA().ranking_loss(energies, torch.tensor(r).double(), groups), energies)[0]
        for r in ([1.0, 0.0], [0.0, 1.0])
    ]
    assert torch.equal(slopes[0], -slopes[1]) and slopes[0].tolist() == [0.5, -0.5]  # the better one's energy falls


def test_equal_energies_cost_log_two_for_each_group_with_a_pair_and_nothing_without():
    zeros = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1])
    cases = {(1.0, 0.0, 0.5, 0.25): math.log(2), (1.0, 0.0, 0.5, 0.5): math.log(2) / 2, (1.0, 1.0, 0.0, 0.0): 0.0}
    for rewards, expected in cases.items():
        loss = DGA().ranking_loss(zeros, torch.tensor(rewards).double(), groups)
        assert loss.item() == pytest.approx(expected, abs=1e-15)
        assert torch.autograd.grad(loss, zeros)[0].isfinite().all()
    huge = torch.tensor([1e6, -1e6], dtype=torch.float32, requires_grad=True)
    loss = DGA().ranking_loss(huge, torch.tensor([1.0, 0.0]), torch.zeros(2).long())
    assert loss.isfinite() and torch.autograd.grad(loss, huge)[0].isfinite().all()


def test_metrics_say_how_well_energies_rank():
    batch = make_rollouts(torch.zeros(4, 4, dtype=torch.int64), groups=[0, 0, 1, 1], rewards=[1.0, 0.0, 1.0, 0.0])
    energies = torch.tensor([-1.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    algorithm = DGA(mode="sum", alpha=2.0, kl_coef=0.0)
    metrics = algorithm.loss(inputs(algorithm, energies, rollouts=batch)).metrics
    assert metrics["energy_accuracy"] == 0.5 and metrics["energy_gap"] == 0.5 and metrics["alpha"] == 2.0
    silent = DGA(mode="sum", use_energy=False, kl_coef=0.0)
    assert set(silent.loss(inputs(silent)).metrics) == {"policy_loss", "ess", "alpha", "weight_max"}


def test_needs_follow_the_switches():
    needs = DGA().needs
    assert needs.kl and not needs.old and not needs.ref and needs.value.is_trunk_trained
    assert (needs.value.reads, needs.value.lr, needs.value.trunk_lr, needs.value.num_updates) == (
        *("completion", 1e-4, 3e-6, 1),
    )
    assert not DGA(kl_coef=0.0).needs.kl
    assert DGA(use_energy=False).needs.value is None


def test_what_is_missing_is_named():
    algorithm = DGA()
    x = inputs(algorithm)
    for name, message in (("values", "no values"), ("uniform", "no uniforms"), ("kl", "no kl")):
        with pytest.raises(ValueError, match=message):
            algorithm.loss(replace(x, **{name: None}))
    replace(algorithm, use_energy=False).loss(replace(x, values=None))
    replace(algorithm, mode="sum").loss(replace(x, uniform=None))
    replace(algorithm, kl_coef=0.0).loss(replace(x, kl=None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.0}, "algorithm.alpha = 0.0: temperature"),
        ({"alpha": -1.0}, "algorithm.alpha = -1.0: temperature"),
        ({"alpha": math.inf}, "algorithm.alpha = inf: temperature"),
        ({"min_alpha": 0.0}, "algorithm.min_alpha = 0.0"),
        ({"ess_target": 1.0}, "algorithm.ess_target = 1.0: a share"),
        ({"ess_target": math.nan}, "algorithm.ess_target = nan"),
        ({"weight_clip": 1.0}, "algorithm.weight_clip = 1.0: γ"),
        ({"weight_clip": 0.5}, "algorithm.weight_clip = 0.5: γ"),
        ({"kl_coef": -0.1}, "algorithm.kl_coef = -0.1"),
        ({"mode": "both"}, "algorithm.mode = 'both': unknown. Use one of: index, sum."),
        ({"count_positions": "some"}, "algorithm.count_positions"),
        ({"num_masks": 0}, "algorithm.num_masks = 0"),
        ({"num_masks": 3, "coupled": True}, "must be even"),
        ({"num_iterations": 0}, "algorithm.num_iterations = 0"),
        ({"ranking_scale": 0.0}, "algorithm.ranking_scale = 0.0"),
        ({"energy_lr": 0.0}, "algorithm.energy_lr = 0.0"),
        ({"energy_trunk_lr": math.inf}, "algorithm.energy_trunk_lr = inf"),
        ({"energy_updates": 0}, "algorithm.energy_updates = 0"),
    ],
    ids=str,
)
def test_bad_fields_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError) as caught:
        DGA(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_old_policy_is_not_asked():
    algorithm = DGA(mode="sum")
    x = inputs(algorithm)
    other = replace(x, old_logps=score_copies(OLD, ROLLOUTS, x.corruption).detach())
    assert torch.equal(algorithm.loss(x).loss, algorithm.loss(other).loss)
