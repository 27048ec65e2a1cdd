"""EMBR-U against a loop oracle, its interval on exact bounds, closed forms at the reference, and its surrogates."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, assert_same_value_and_gradient, inputs
from tests.oracles import conditionals, elbo_dp, eubo_by_contexts, log_likelihood_dp, make_rollouts, token_estimates
from tests.oracles_pairs import embr_u_loss, eubo_of_reads
from tests.test_embr import GROUPS, LENGTHS, REWARDS, ROLLOUTS, exact_inputs, hand_made, plain
from tests.test_likelihood_eubo import all_copies
from tests.toys import TabularPolicy
from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError
from unmask.likelihood import elbo, eubo
from unmask.objectives import EmbrC, EmbrU
from unmask.objectives.embr_u import surrogate
from unmask.types import Corruption, LossInputs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta": 0.7, "gamma": 4.0},
        {"gamma": 1.0, "num_masks": 6, "normalize": False},
        {"share_masks": False, "beta": 1.0},
        {"coupled": False, "num_masks": 3, "stratify": False},
        {"count_positions": "to_eos", "beta": 0.5},
        {"residual_scale": "none", "beta": 1.5},
        {"surrogate": "huber", "beta": 0.5},
        {"surrogate": "softplus", "threshold": 0.7, "beta": 0.5},
        {"surrogate": "hinge", "threshold": 0.5, "beta": 0.5},
        {"surrogate": "huber", "threshold": 6.0, "residual_scale": "none", "beta": 1.0},
    ],
    ids=str,
)
def test_loss_equals_the_loop_oracle(fields):
    a = EmbrU(**fields)
    x = inputs(a, rollouts=ROLLOUTS)
    length = LENGTHS if a.count_positions == "to_eos" else [4] * 5
    bounds = []
    for logps, draw in ((x.logps, x.corruption), (x.ref_logps, x.ref_corruption or x.corruption)):
        masked = draw.masked[..., -4:]
        bounds.append([sum(row) for row in token_estimates(logps, masked, length, "elbo", a.coupled)])
        options = {"coupled": a.coupled, "normalize": a.normalize}
        bounds.append([eubo_of_reads(logps[b], masked[b], length[b], a.gamma, **options) for b in range(5)])
    expected = embr_u_loss(
        *bounds,
        REWARDS,
        GROUPS,
        beta=a.beta,
        scale=4 if a.residual_scale == "per_length" else 1,
        kind=a.surrogate,
        threshold=a.threshold,
    )
    assert_same_value_and_gradient(a.loss(x).loss, expected, POLICY)


def two_reads(first, second, ref_first, ref_second, rewards):
    """Two rows of one token, read in two copies with weight 1/2 each: probabilities given, B and U by hand."""
    scored = torch.ones(2, 2, 1, dtype=torch.bool)
    draw = Corruption(scored, scored, scored.double() / 2, "elbo")
    logps, ref = (
        torch.tensor(v, dtype=torch.float64).log()[..., None] for v in ((first, second), (ref_first, ref_second))
    )
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return LossInputs(logps.requires_grad_(), draw, rewards, rewards, torch.zeros(2), torch.ones(2), ref_logps=ref)


def test_numbers_by_hand():
    """γ = 1, β = 1/2. B: log 1/4 (of 1/2, 1/8), log 1/2; U: log 5/16, log 1/2. Reference: 1/2 throughout. Δr/β = 2.
    S_min = (log 1/4 - log 1/2) - 0 - 2, S_max = (log 5/16 - log 1/2) - 0 - 2, for the pair of better and worse."""
    x = two_reads((0.5, 0.125), (0.5, 0.5), (0.5, 0.5), (0.5, 0.5), [1.0, 0.0])
    out = plain(EmbrU, gamma=1.0, num_masks=2).loss(x)
    low, high = math.log(0.5) - 2, math.log(0.625) - 2
    assert out.metrics == pytest.approx(
        {
            "policy_loss": low**2,
            "log_ratio": math.log(0.5) / 2,
            "residual_rms": -low,  # B - B^ref
            "target_rms": 2.0,
            "bound_rms": -low,
            "gap": (high - low) / 2,
            "s_min_share": 1.0,
        },
        abs=1e-14,
    )
    (gradient,) = torch.autograd.grad(out.loss, x.logps)
    # S_min alone: dB of the better, half of each read, and dU of the worse, a softmax of two equal reads
    assert gradient.flatten().tolist() == pytest.approx([low, low, -low, -low], abs=1e-14)
    near = replace(x, rewards=torch.tensor([0.1, 0.0], dtype=torch.float64), ref_logps=x.logps.detach())
    assert plain(EmbrU, gamma=1.0, num_masks=2).loss(near).metrics["s_min_share"] == 1.0  # by Δr/β = 0.2 only
    # row 1 better by Δr/β = 0.2, and its log-ratio ahead by more: S_max = (log 1/2 - log 1/4) - 0.2 rules
    beyond = replace(x, rewards=torch.tensor([0.0, 0.1], dtype=torch.float64))
    turned = plain(EmbrU, gamma=1.0, num_masks=2).loss(beyond)
    assert turned.metrics["s_min_share"] == 0.0
    assert turned.loss.item() == pytest.approx((math.log(2) - 0.2) ** 2, abs=1e-14)


# --- exact bounds ----------------------------------------------------------------------------------------------------

LENGTH = 3
COMPLETIONS = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 1], [0, 0, 0]])


def exact_bounds(seed, ref_seed, rewards=(1.0, 0.0, 0.4, 0.4)):
    """One group whose copies are all masked states with the weights of their law: B and U without noise, and log p."""
    models = [TabularPolicy(length=LENGTH, seed=s) for s in (seed, ref_seed)]
    draw = all_copies(LENGTH, coupled=False)
    draw = Corruption(*(t.expand(4, -1, -1) for t in (draw.masked, draw.scored, draw.weight)), "elbo")
    states = (draw.scored[0] * 2 ** torch.arange(LENGTH)).sum(-1)
    tables = [[conditionals(model, y).detach() for y in COMPLETIONS] for model in models]
    logps, ref = (torch.stack([table[states] for table in of_model]) for of_model in tables)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    x = LossInputs(
        logps.requires_grad_(), draw, rewards, rewards, torch.zeros(4), torch.full((4,), LENGTH), ref_logps=ref
    )
    return x, tables


def interval(tables, gamma, beta, i, j, rewards):
    """(S_min, S of the ELBO, S of the likelihood, S_max) of a pair, from the exact oracles."""
    (bi, bj, ri, rj) = (float(elbo_dp(t[b])) for t in tables for b in (i, j))
    (ui, uj, vi, vj) = (float(eubo_by_contexts(t[b], gamma)) for t in tables for b in (i, j))
    (pi, pj, qi, qj) = (float(log_likelihood_dp(t[b])) for t in tables for b in (i, j))
    target = (rewards[i] - rewards[j]) / beta
    return (
        (bi - uj) - (vi - rj) - target,
        (bi - ri) - (bj - rj) - target,
        (pi - qi) - (pj - qj) - target,
        (ui - bj) - (ri - vj) - target,
    )


@pytest.mark.parametrize("gamma", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("seed", [1, 5, 8])
def test_the_interval_holds_the_residual_and_the_loss_exceeds_the_contrastive_one(seed, gamma):
    """S_min <= S <= S_max for every γ with S of the ELBO, and with S of the likelihood where γ >= L."""
    beta, fields = 0.5, {"residual_scale": "none"}
    x, tables = exact_bounds(seed, seed + 1)
    rewards = x.rewards.tolist()
    worst, gaps = 0.0, 0.0
    for i, j in itertools.permutations(range(4), 2):
        s_min, s, s_exact, s_max = interval(tables, gamma, beta, i, j, rewards)
        assert s_min < s < s_max
        if gamma >= LENGTH:
            assert s_min <= s_exact <= s_max
        gap = sum(
            float(eubo_by_contexts(t[b], gamma) - elbo_dp(t[b])) for t in tables for b in (i, j)
        )  # all four of U - B
        assert s_max - s_min == pytest.approx(gap, abs=1e-12)
        worst, gaps = worst + max(s_min**2, s_max**2) / 12, gaps + gap / 24
    out = EmbrU(beta=beta, gamma=gamma, **fields).loss(x)
    assert out.loss.item() == pytest.approx(worst, abs=1e-10)
    assert out.metrics["gap"] == pytest.approx(gaps, abs=1e-10)
    contrastive = EmbrC(beta=beta, **fields).loss(x)
    assert out.loss > contrastive.loss + 1e-3
    assert out.metrics["bound_rms"] ** 2 == pytest.approx(worst, abs=1e-10)
    for name in ("residual_rms", "target_rms", "log_ratio"):
        assert out.metrics[name] == pytest.approx(contrastive.metrics[name], abs=1e-12)


def test_a_small_exponent_may_miss_the_likelihood():
    """γ = 1: for some model the interval does not hold the true residual. The name is not a promise."""
    missed = 0
    for seed in range(12):
        x, tables = exact_bounds(seed, seed + 1)
        for i, j in itertools.combinations(range(4), 2):
            s_min, _, s_exact, s_max = interval(tables, 1.0, 0.5, i, j, x.rewards.tolist())
            missed += not s_min <= s_exact <= s_max
    assert missed > 0


def test_one_read_of_each_position_leaves_the_contrastive_loss():
    """Where U = B - here one copy with weight 1 - both losses are the same, with the same gradient."""
    x = hand_made([-1.0, -3.0, -0.5], [-3.0, -2.0, -1.0], [1.0, 0.0, 1.0], [4, 4, 4])
    out, contrastive = plain(EmbrU).loss(x), plain(EmbrC).loss(x)
    assert out.loss.item() == pytest.approx(contrastive.loss.item(), abs=1e-14)
    gradients = [torch.autograd.grad(o.loss, x.logps)[0] for o in (out, contrastive)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-14)
    assert out.metrics["gap"] == 0.0
    assert out.metrics["s_min_share"] == 0.0  # ties, of either sign: neither rules


# --- at the reference ------------------------------------------------------------------------------------------------


def test_at_the_reference_the_loss_is_the_squared_target_plus_gaps():
    """(|Δr|/β + g)² with g = (U - B)(y) + (U - B)(y'); the active branch of the better is S_min."""
    beta, gamma = 0.5, 1.5
    x, tables = exact_bounds(2, 2)
    expected, gaps = 0.0, [float(eubo_by_contexts(t, gamma) - elbo_dp(t)) for t in tables[0]]
    for i, j in itertools.permutations(range(4), 2):
        target = abs(x.rewards[i] - x.rewards[j]).item() / beta
        expected += (target + gaps[i] + gaps[j]) ** 2 / 12
    out = EmbrU(beta=beta, gamma=gamma, residual_scale="none").loss(x)
    assert out.loss.item() == pytest.approx(expected, abs=1e-10)
    assert out.metrics["s_min_share"] == 1.0 and out.metrics["residual_rms"] == pytest.approx(
        out.metrics["target_rms"], rel=1e-13
    )


def test_near_the_reference_the_better_is_raised_by_its_elbo_and_the_worse_lowered_by_its_eubo():
    """One pair: gradient 2 S_min (∇B_i - ∇U_j)."""
    algorithm = EmbrU(beta=0.5, residual_scale="none", gamma=2.0)
    rollouts = make_rollouts(ROLLOUTS.completion_ids[:2], rewards=[1.0, 0.0])
    x = inputs(algorithm, ref=POLICY, rollouts=rollouts)
    low, high = elbo(x.logps, x.corruption), eubo(x.logps, x.corruption, 2.0)
    s_min = (low[0] - high[1] - (high[0] - low[1]).detach() - 2).detach()
    (gradient,) = torch.autograd.grad(2 * s_min * (low[0] - high[1]), POLICY.table, retain_graph=True)
    (found,) = torch.autograd.grad(algorithm.loss(x).loss, POLICY.table)
    assert s_min < -2 and torch.allclose(found, gradient, rtol=0, atol=1e-12)


def test_a_tie_has_half_of_each_branch():
    """Equal rewards at the reference: S_max = -S_min = g, so the gradient is g ∇(S_max - S_min), narrowing the gaps."""
    algorithm = EmbrU(residual_scale="none", gamma=2.0)
    rollouts = make_rollouts(ROLLOUTS.completion_ids[:2], rewards=[1.0, 1.0])
    x = inputs(algorithm, ref=POLICY, rollouts=rollouts)
    gap = (eubo(x.logps, x.corruption, 2.0) - elbo(x.logps, x.corruption)).sum()
    out = algorithm.loss(x)
    assert out.loss.item() == pytest.approx(gap.item() ** 2, rel=1e-10)
    gradients = [torch.autograd.grad(v, POLICY.table, retain_graph=True)[0] for v in (out.loss, gap)]
    assert torch.allclose(gradients[0], gap.detach() * gradients[1], rtol=0, atol=1e-10)
    assert gradients[1].abs().max() > 1e-2 and out.metrics["s_min_share"] == 0.0  # no pair has a better one


def test_the_optimum_of_a_joint_is_not_where_the_loss_is_zero():
    """At reference · exp(r/β), where C has loss 0, U still pays for its gaps: a heuristic, not the same optimum."""
    beta = 0.5
    rewards = torch.linspace(0, 1, 8, dtype=torch.float64)
    from_tests = exact_inputs(torch.zeros(2, 2, 2).double(), rewards=rewards)
    assert EmbrU(beta=beta).loss(from_tests).loss > EmbrC(beta=beta).loss(from_tests).loss


# --- identities and surrogates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["square", "huber", "softplus", "hinge"])
def test_a_constant_of_the_prompt_and_a_common_factor_change_nothing(kind):
    algorithm = EmbrU(beta=0.5, surrogate=kind)
    x = inputs(algorithm, rollouts=ROLLOUTS)
    shifted = replace(x, rewards=x.rewards + torch.where(x.groups == 7, 5.0, -2.5))
    scaled = replace(x, rewards=3 * x.rewards)
    same = [algorithm.loss(x).loss, algorithm.loss(shifted).loss, replace(algorithm, beta=1.5).loss(scaled).loss]
    for loss in same[1:]:
        assert_same_value_and_gradient(loss, same[0], POLICY)
    assert abs(algorithm.loss(scaled).loss - same[0]).item() > 1e-2


def test_surrogates_by_hand():
    """δ = 2: at s = 1 the forms give 1; 1; 4 (softplus 1 + softplus -1 - 2 log 2); 0; at s = 3: 9; 8; ...; 8."""
    s = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)

    def soft(t):
        return 4 * (math.log(1 + math.exp(t)) + math.log(1 + math.exp(-t)) - 2 * math.log(2))

    expected = {
        "square": [0.0, 1.0, 9.0],
        "huber": [0.0, 1.0, 8.0],
        "softplus": [0.0, soft(1.0), soft(3.0)],
        "hinge": [0.0, 0.0, 8.0],
    }
    for kind, values in expected.items():
        assert surrogate(s, kind, 2.0).tolist() == pytest.approx(values, abs=1e-14)
    with pytest.raises(ValueError, match=r"unknown surrogate 'l1'. Known: square, huber, softplus, hinge"):
        surrogate(s, "l1", 2.0)


@pytest.mark.parametrize("kind", ["huber", "softplus", "hinge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogates_grow_linearly_never_exceed_the_square_and_do_not_overflow(kind, dtype):
    s = torch.tensor([0.0, 1e-3, 0.3, 0.5, 0.8, 2.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    value = surrogate(s, kind, 0.5)
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert (value >= 0).all() and (value <= s.square() * (1 + 1e-6) + 1e-7).all()  # rounding of two logarithms
    assert slope[-2:].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)  # 2δ
    assert abs(slope[0].item()) < 1e-12 and (slope >= -1e-6).all()
    if kind != "hinge":
        near = surrogate(torch.tensor([1e-3], dtype=torch.float64), kind, 0.5)
        assert near.item() == pytest.approx(1e-6, rel=1e-5)


# --- draws, metrics, limits, refusals --------------------------------------------------------------------------------


def test_rows_without_a_partner_give_zero():
    x = inputs(EmbrU(), rollouts=ROLLOUTS)
    out = EmbrU().loss(replace(x, groups=torch.arange(5)))
    (nothing,) = torch.autograd.grad(out.loss, x.logps)
    assert out.loss.item() == 0.0 and not nothing.any()
    assert all(value == 0.0 for name, value in out.metrics.items() if name != "log_ratio")


def test_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"EmbrU.* got no ref_logps"):
        EmbrU().loss(replace(inputs(EmbrU(), rollouts=ROLLOUTS), ref_logps=None))


@pytest.mark.parametrize("kind", ["square", "huber", "softplus", "hinge"])
@pytest.mark.parametrize("shift", [300.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(kind, shift, dtype):
    algorithm = EmbrU(surrogate=kind)
    for rewards in ([1.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]):
        x = inputs(algorithm, rollouts=ROLLOUTS)
        logps = x.logps.detach().to(dtype).requires_grad_()
        ref = (x.logps.detach() + shift) * x.corruption.scored
        x = replace(x, logps=logps, ref_logps=ref.to(dtype), rewards=torch.tensor(rewards).double())
        out = algorithm.loss(x)
        assert out.loss.dtype == dtype and torch.isfinite(out.loss)
        assert torch.isfinite(torch.autograd.grad(out.loss, logps)[0]).all()
        assert all(math.isfinite(value) for value in out.metrics.values())


def test_draws_follow_the_fields():
    draw = EmbrU().draw(ROLLOUTS, noise=NOISE, iteration=2)
    assert draw.num_masks == 4 and (draw.scored[:, ::2] ^ draw.scored[:, 1::2]).all()
    expected = draw_uniform_count(ROLLOUTS, 4, coupled=True, noise=NOISE.stream("2"))
    assert torch.equal(draw.masked, expected.masked)


def test_implied_defaults():
    a = EmbrU()
    assert (a.beta, a.gamma, a.surrogate, a.threshold, a.normalize) == (0.04, 1.5, "square", 1.0, True)
    assert (a.num_masks, a.coupled, a.stratify, a.share_masks) == (4, True, True, True)
    assert (a.num_iterations, a.fresh_masks) == (8, True)
    assert (a.residual_scale, a.count_positions, a.is_row_separable) == ("per_length", "all", False)
    assert a.needs.ref and not a.needs.old and a.needs.value is None and a.strategies == ("groups", "pairs")
    assert a.advantages(torch.tensor([1.0, 0.0]), torch.zeros(2)).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, r"algorithm.beta = 0.0: .*above 0"),
        ({"gamma": 0.9}, r"algorithm.gamma = 0.9: .*1 or more"),
        ({"gamma": math.inf}, r"algorithm.gamma = inf"),
        ({"surrogate": "l1"}, r"algorithm.surrogate = 'l1': .*square, huber, softplus, hinge"),
        ({"threshold": 0.0}, r"algorithm.threshold = 0.0: .*above 0"),
        ({"threshold": math.inf}, r"algorithm.threshold = inf"),
        ({"num_masks": 3}, r"algorithm.num_masks = 3: .*even"),
        ({"residual_scale": "length"}, r"algorithm.residual_scale = 'length': .*per_length, none"),
        ({"count_positions": "eos"}, r"algorithm.count_positions = 'eos'"),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ConfigError, match=message):
        EmbrU(**fields)


def test_fields_may_reach_their_limits():
    assert EmbrU(gamma=1.0).gamma == 1.0
