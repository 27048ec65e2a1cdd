"""GDPO against a loop oracle, its quadrature against exact integrals and enumeration, and hand-made numbers."""

import math

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import (
    GAUSS_LEGENDRE,
    SIMPSON,
    bits,
    conditionals,
    elbo_dp,
    gdpo_loss,
    make_rollouts,
    quadrature_estimates,
)
from unmask.corruption import draw_quadrature, quadrature_rule
from unmask.errors import ConfigError
from unmask.likelihood import sequence_estimate
from unmask.objectives import GDPO
from unmask.types import Corruption, LossInputs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_nodes": 2, "num_masks_per_node": 3},
        {"num_nodes": 1, "kl": "k2"},
        {"quadrature": "simpson"},
        {"masking": "bernoulli", "num_masks_per_node": 2},
        {"ratio_scale": "none", "kl": "k2"},
        {"count_positions": "to_eos"},
        {"count_positions": "to_eos", "ratio_scale": "none", "kl": "k1", "masking": "bernoulli"},
        {"share_masks": False},
        {"kl_coef": 0.0},
    ],
    ids=str,
)
def test_loss_equals_the_loop_oracle(fields):
    algorithm = GDPO(**{"kl_coef": 0.1, **fields})
    x = inputs(algorithm)
    length = [4] * 4 if algorithm.count_positions == "all" else ROLLOUTS.length.tolist()
    rule = SIMPSON if algorithm.quadrature == "simpson" else GAUSS_LEGENDRE[algorithm.num_nodes]
    draws = (x.corruption, x.old_corruption or x.corruption, x.ref_corruption or x.corruption)
    estimates = [
        quadrature_estimates(logps, draw.masked[..., 2:], length, rule, algorithm.masking)
        for logps, draw in zip((x.logps, x.old_logps, x.ref_logps), draws, strict=True)
    ]
    scale = [1.0] * 4 if algorithm.ratio_scale == "none" else [float(n) for n in length]
    expected = gdpo_loss(*estimates, x.advantages.tolist(), scale, clip=0.5, kl=algorithm.kl, kl_coef=algorithm.kl_coef)
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def test_loss_by_hand():
    """L = 2, one copy, weights 1.5 and 0.5. Row 0: ΔB = 2·0.4, ρ = e^0.4 < 1.5, A = 1. Row 1: ΔB = -2·0.8, ρ = e^-0.8
    clipped to 0.5 for A = -1. Reference: d = ΔB/2 = log 2 in both rows, k3 = 1/2 - 1 + log 2."""
    weight = torch.tensor([[[1.5, 0.5]]] * 2, dtype=torch.float64)
    draw = Corruption(torch.ones(2, 1, 2).bool(), torch.ones(2, 1, 2).bool(), weight, "quadrature")
    logps = torch.full((2, 1, 2), -3.0, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-3.4, -2.2], dtype=torch.float64).view(2, 1, 1).expand(2, 1, 2)
    ref = (logps - math.log(2)).detach()
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x = LossInputs(logps, draw, advantages, advantages, torch.zeros(2), torch.tensor([2, 2]), old, ref)
    out = GDPO().loss(x)
    policy_loss, penalty = -(math.exp(0.4) - 0.5) / 2, 0.04 * (math.log(2) - 0.5)
    assert out.loss.item() == pytest.approx(policy_loss + penalty, abs=1e-12)
    expected = {
        "policy_loss": policy_loss,
        "kl_penalty": penalty,
        "ratio_max": math.exp(0.4),
        "clip_ratio/low_mean": 0.5,
        "clip_ratio/high_mean": 0.0,
        "clip_ratio/region_mean": 0.5,
        "log_ratio_clamped": 0.0,
    }
    assert out.metrics == pytest.approx(expected, abs=1e-12)
    out.loss.backward()
    pull = 0.04 * (1 - 0.5) / 2 / 2  # of the KL, per unit of weight: (1 - e^-d) over rows and L
    push = -math.exp(0.4) / 2 / 2
    assert logps.grad.flatten().tolist() == pytest.approx(
        [1.5 * (pull + push), 0.5 * (pull + push), 1.5 * pull, 0.5 * pull], abs=1e-12
    )


def test_gradient_on_policy_is_that_of_the_estimate():
    """At θ = old: -(1/(B L)) Σ A_i ∇B̂_i."""
    algorithm = GDPO(kl_coef=0.0)
    x = inputs(algorithm, old=POLICY)
    estimates = quadrature_estimates(x.logps, x.corruption.masked[..., 2:], [4] * 4, GAUSS_LEGENDRE[3], "exact_count")
    total = sum(a * b for a, b in zip([0.375, -0.375, -1.0, 1.0], estimates, strict=True))
    ours, closed = (torch.autograd.grad(v, POLICY.table, retain_graph=True)[0] for v in (algorithm.loss(x).loss, total))
    assert torch.allclose(ours, -closed / 16, rtol=0, atol=1e-12) and closed.abs().max() > 1e-2


# --- the quadrature ---------------------------------------------------------------------------------------------------


def bernoulli_expectation(table, num_nodes):
    """Σ_n ω_n Σ_S t^|S| (1-t)^(L-|S|) (1/t) Σ_{i∈S} l(i;S), over all subsets."""
    nodes, weights = quadrature_rule("gauss_legendre", num_nodes)
    positions, total = table.shape[1], 0.0
    for t, w in zip(nodes.tolist(), weights.tolist(), strict=True):
        for S in range(1, 2**positions):
            m = len(bits(S))
            total = total + w * t ** (m - 1) * (1 - t) ** (positions - m) * table[S].sum()
    return total


def test_bernoulli_masks_at_the_nodes_have_the_elbo_as_expectation_for_l_up_to_2n():
    """The integrand has degree L - 1 = 3 in t: two nodes are exact for any model, one is not."""
    table = conditionals(POLICY, ROLLOUTS.completion_ids[0])
    exact = elbo_dp(table)
    for num_nodes in (2, 3):
        assert_same_value_and_gradient(bernoulli_expectation(table, num_nodes), exact, POLICY)
    assert abs((bernoulli_expectation(table, 1) - exact).item()) > 1e-3


def test_bernoulli_draws_are_unbiased_within_their_noise():
    """Mean of 4,000 real draws against the enumerated expectation, 4 standard errors; the constant l has L·l."""
    table = conditionals(POLICY, ROLLOUTS.completion_ids[0]).detach()
    rollouts = make_rollouts(ROLLOUTS.completion_ids[:1].expand(4000, -1))
    settings = {"rule": "gauss_legendre", "num_nodes": 2, "num_masks_per_node": 1, "count_positions": "all"}
    draw = draw_quadrature(rollouts, masking="bernoulli", **settings, noise=NOISE)
    logps = table[(draw.scored * 2 ** torch.arange(4)).sum(-1)]
    found = sequence_estimate(logps, draw)
    assert abs(found.mean() - elbo_dp(table)) < 4 * found.std() / 4000**0.5


@pytest.mark.parametrize("positions", [1, 2, 5, 16, 256])
@pytest.mark.parametrize("fields", [{}, {"num_nodes": 2, "num_masks_per_node": 2}, {"quadrature": "simpson"}], ids=str)
def test_exact_counts_give_a_constant_its_length(positions, fields):
    """The weight is L/m_n; with 1/t_n a constant would be off by 0.8 % at L = 256, N = 3."""
    draw = GDPO(**fields).draw(make_rollouts(torch.zeros(3, positions, dtype=torch.int64)), noise=NOISE)
    assert sequence_estimate(-0.7 * draw.scored.double(), draw).tolist() == pytest.approx(
        [-0.7 * positions] * 3, rel=1e-14
    )


def test_exact_counts_are_the_rounded_nodes():
    """t L = 0.1127, 0.5, 0.8873 of L = 5 round to 1, 3 (2.5 upwards), 4; of 16 to 2, 8, 14; none is below 1."""
    for positions, expected in ((5, [1, 3, 4]), (16, [2, 8, 14]), (1, [1, 1, 1]), (2, [1, 1, 2])):
        draw = GDPO().draw(make_rollouts(torch.zeros(2, positions, dtype=torch.int64)), noise=NOISE)
        assert draw.scored.sum(-1).tolist() == [expected] * 2
        assert draw.kind == "quadrature" and torch.equal(draw.masked[..., 2:], draw.scored)
        assert not draw.masked[..., :2].any()


def test_exact_counts_err_by_half_a_token_where_logps_fall_linearly():
    """l(i;S) = -|S|/L, L = 100: the ELBO is -(L+1)/2 = -50.5, the quadrature -(5·11 + 8·50 + 5·89)/18 = -50."""
    draw = GDPO().draw(make_rollouts(torch.zeros(1, 100, dtype=torch.int64)), noise=NOISE)
    logps = -draw.scored.sum(-1, keepdim=True).double() / 100 * draw.scored
    assert sequence_estimate(logps, draw).item() == pytest.approx(-50.0, rel=1e-14)


def test_to_eos_reads_the_rows_own_length():
    draw = GDPO(count_positions="to_eos").draw(ROLLOUTS, noise=NOISE)
    tail = torch.arange(4) >= ROLLOUTS.length[:, None, None]
    assert not (draw.masked[..., 2:] & tail).any()
    assert sequence_estimate(-draw.scored.double(), draw).tolist() == pytest.approx([-4.0, -3.0, -1.0, -2.0])


def test_published_defaults():
    a = GDPO()
    assert (a.num_nodes, a.num_masks_per_node, a.quadrature, a.masking) == (3, 1, "gauss_legendre", "exact_count")
    assert (a.num_iterations, a.clip_low, a.clip_high, a.kl, a.kl_coef) == (12, 0.5, 0.5, "k3", 0.04)
    assert (a.ratio_scale, a.advantage, a.count_positions) == ("per_length", "group_centered", "all")
    assert a.fresh_masks and a.share_masks and a.is_row_separable and a.negative_scale == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_nodes": 0}, r"num_nodes = 0: .*Try 3"),
        ({"num_nodes": 2, "quadrature": "simpson"}, r"num_nodes = 2: Simpson.* Use 3"),
        ({"num_nodes": 4, "quadrature": "simpson"}, r"num_nodes = 4: Simpson"),
        ({"quadrature": "trapezoid"}, r"quadrature = 'trapezoid': unknown. Use one of: gauss_legendre, simpson"),
        ({"masking": "exact"}, r"algorithm.masking = 'exact': unknown. Use one of: exact_count, bernoulli"),
        ({"ratio_scale": "length"}, r"algorithm.ratio_scale = 'length': .*per_length, none"),
        ({"num_masks_per_node": 0}, r"algorithm.num_masks_per_node = 0"),
        ({"clip_low": 2.0}, r"algorithm.clip_low = 2.0"),
        ({"kl": "k4"}, r"algorithm.kl = 'k4'"),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ConfigError, match=message):
        GDPO(**fields)
