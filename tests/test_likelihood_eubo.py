"""The evidence upper bound against enumeration: what it bounds, and when it does not."""

import itertools
import math

import pytest
import torch

from tests.oracles import (
    bits,
    conditionals,
    elbo_dp,
    eubo_by_contexts,
    log_likelihood_dp,
    make_rollouts,
    score_copies,
)
from tests.test_likelihood import TOYS, all_completions, subset_corruption, toy_table
from tests.toys import TabularPolicy
from unmask.corruption import draw_full_mask, draw_uniform_count
from unmask.likelihood import eubo, token_eubo
from unmask.noise import Noise
from unmask.types import Corruption

GAMMAS = (1.0, 1.5, 2.0, 3.0, 8.0)


def all_copies(length, *, coupled):
    """One row whose copies are all outcomes of one draw, weighted by their probabilities too: a mean without noise."""
    corruption, probability = subset_corruption(length, coupled=coupled)
    weight = corruption.weight * probability[:, None, None]
    return Corruption(*(t.flatten(0, 1)[None] for t in (corruption.masked, corruption.scored, weight)), "elbo")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(("length", "seed"), TOYS)
def test_weighted_mean_over_the_law_of_draws_is_the_exact_eubo(length, seed, coupled, normalize):
    """Value and gradient through a model; the weights of a position add up to 1, so that dividing changes nothing."""
    policy = TabularPolicy(length=length, seed=seed)
    completion = torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(seed))
    corruption = all_copies(length, coupled=coupled)
    assert torch.allclose(corruption.weight.sum(1), torch.ones(1, length).double(), rtol=0, atol=1e-14)
    logps = score_copies(policy, make_rollouts(completion[None]), corruption)
    for gamma in GAMMAS:
        ours = eubo(logps, corruption, gamma, normalize=normalize)[0]
        exact = eubo_by_contexts(conditionals(policy, completion), gamma)
        assert abs((ours - exact).item()) < 1e-10
        gradients = [torch.autograd.grad(v, policy.table, retain_graph=True)[0] for v in (ours, exact)]
        assert torch.allclose(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(12))
def test_eubo_is_above_the_elbo_grows_with_gamma_and_bounds_the_likelihood_at_gamma_l(seed):
    for length in (2, 3, 4):
        table = toy_table(length, seed)
        values = [float(eubo_by_contexts(table, gamma)) for gamma in (*GAMMAS, 50.0)]
        assert values[0] >= float(elbo_dp(table)) + 1e-3
        assert all(a < b for a, b in itertools.pairwise(values))
        assert float(eubo_by_contexts(table, length)) >= float(log_likelihood_dp(table)) - 1e-12


def test_below_gamma_l_it_may_lie_below_the_likelihood():
    """The counter-example: p = ½ (0.1 · 0.1 + 0.9 · 0.9) = 0.41, exp U = 0.25 at γ = 1 and 0.41 at γ = 2 = L."""
    low, high = math.log(0.1), math.log(0.9)
    table = torch.tensor([[0, 0], [high, 0], [0, low], [low, high]], dtype=torch.float64)  # states ∅, {0}, {1}, {0, 1}
    assert float(log_likelihood_dp(table).exp()) == pytest.approx(0.41, abs=1e-14)
    corruption = all_copies(2, coupled=False)
    logps = torch.stack([table[int((row * torch.tensor([1, 2])).sum())] for row in corruption.scored[0]])[None]
    assert float(eubo(logps, corruption, 1.0).exp()) == pytest.approx(0.25, abs=1e-14)
    assert float(eubo(logps, corruption, 2.0).exp()) == pytest.approx(0.41, abs=1e-14)


def test_how_often_random_conditionals_break_it_at_gamma_one():
    """Models of no joint: U^1 lies below log p for some of them and above for others."""
    gaps = [
        float(eubo_by_contexts(toy_table(3, seed), 1.0) - log_likelihood_dp(toy_table(3, seed))) for seed in range(20)
    ]
    assert min(gaps) < -0.01 and max(gaps) > 0.01


def test_one_joint_makes_it_a_bound_at_every_gamma():
    """Conditionals of a joint p(y): ELBO = log p <= U^γ."""
    length, vocab = 3, 3
    joint = torch.rand((vocab,) * length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint = joint / joint.sum()
    for completion in all_completions(length)[::5]:
        table = torch.zeros(2**length, length, dtype=torch.float64)
        for S in range(1, 2**length):
            slots = [slice(None) if S >> j & 1 else int(completion[j]) for j in range(length)]
            for i in bits(S):
                given_i = list(slots)
                given_i[i] = int(completion[i])
                table[S, i] = (joint[tuple(given_i)].sum() / joint[tuple(slots)].sum()).log()
        exact = float(joint[tuple(completion.tolist())].log())
        assert all(float(eubo_by_contexts(table, gamma)) > exact for gamma in GAMMAS)


def test_token_eubo_by_hand():
    """Position 0 is read twice, weights 2 and 1, probabilities 1/2 and 1/4; position 1 once, weight 3; 2 never.
    γ = 1: log(2/2 + 1/4), log(3/8); divided by 3 and 3: log(5/12), log(1/8). γ = 2: ½ log(2/4 + 1/16)."""
    weight = torch.tensor([[[2.0, 0.0, 0.0], [1.0, 3.0, 0.0]]], dtype=torch.float64)
    logps = torch.tensor([[[0.5, 1.0, 1.0], [0.25, 0.125, 1.0]]], dtype=torch.float64).log().requires_grad_()
    draw = Corruption(weight > 0, weight > 0, weight, "elbo")
    cases = {
        (1.0, False): [math.log(1.25), math.log(0.375), 0.0],
        (1.0, True): [math.log(5 / 12), math.log(0.125), 0.0],
        (2.0, False): [math.log(9 / 16) / 2, math.log(3 / 64) / 2, 0.0],
        (2.0, True): [math.log(9 / 48) / 2, math.log(0.125), 0.0],
    }
    for (gamma, normalize), expected in cases.items():
        found = token_eubo(logps, draw, gamma, normalize=normalize)
        assert found[0].tolist() == pytest.approx(expected, abs=1e-14)
        (gradient,) = torch.autograd.grad(found.sum(), logps)
        first = 2 * 0.5**gamma / (2 * 0.5**gamma + 0.25**gamma)  # softmax over the two reads
        assert gradient.flatten().tolist() == pytest.approx([first, 0, 0, 1 - first, 1, 0], abs=1e-14)
    assert eubo(logps, draw, 1.0).item() == pytest.approx(math.log(5 / 96), abs=1e-14)  # normalized
    assert eubo(logps, draw, 1.0, normalize=False).item() == pytest.approx(math.log(15 / 32), abs=1e-14)


def test_one_coupled_pair_gives_the_reads_themselves():
    """Each position is read once: with the realised weights U is Σ l, whatever γ."""
    rollouts = make_rollouts(torch.zeros(30, 5, dtype=torch.int64))
    draw = draw_uniform_count(rollouts, 2, coupled=True, noise=Noise(0))
    logps = -torch.rand(draw.scored.shape, generator=torch.Generator().manual_seed(0)).double() * draw.scored
    for gamma in GAMMAS:
        assert torch.allclose(eubo(logps, draw, gamma), logps.sum((1, 2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_probabilities_stay_finite(dtype):
    rollouts = make_rollouts(torch.zeros(4, 5, dtype=torch.int64))
    draw = draw_uniform_count(rollouts, 3, coupled=False, noise=Noise(0))
    assert (~draw.scored.any(1)).any()  # a position that no copy reads
    for shift in (-300.0, -1e4):
        logps = (shift * draw.scored).to(dtype).requires_grad_()
        for normalize in (True, False):
            value = eubo(logps, draw, 8.0, normalize=normalize)
            assert value.dtype == dtype and torch.isfinite(value).all()
            assert torch.isfinite(torch.autograd.grad(value.sum(), logps)[0]).all()


def test_estimates_are_low_on_average_and_approach_the_bound():
    table = toy_table(3, 1)
    completion = torch.zeros(400, 3, dtype=torch.int64)
    exact, means = float(eubo_by_contexts(table, 3.0)), []
    for num_masks in (2, 8, 64):
        draw = draw_uniform_count(make_rollouts(completion), num_masks, coupled=True, noise=Noise(0))
        logps = table[(draw.scored * 2 ** torch.arange(3)).sum(-1)]
        means.append(float(eubo(logps, draw, 3.0).mean()))
    assert means[0] < means[1] < means[2] < exact
    assert exact - means[2] < 0.05 * (exact - means[0])


def test_other_draws_and_exponents_are_refused():
    rollouts = make_rollouts(torch.zeros(2, 3, dtype=torch.int64))
    draw = draw_full_mask(rollouts, 1, prompt_mask_ratio=0.0, count_positions="all", noise=Noise(0))
    with pytest.raises(ValueError, match=r"eubo\(\) got a 'mean_field' corruption.* Draw with"):
        eubo(torch.zeros(2, 1, 3), draw, 1.5)
    good = draw_uniform_count(rollouts, 2, coupled=True, noise=Noise(0))
    for gamma in (0.99, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"gamma = .*at least 1"):
            eubo(torch.zeros(2, 2, 3), good, gamma)
