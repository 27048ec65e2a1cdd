"""VRPO and DPO-with-ELBO against a loop oracle, closed forms, their optimum, and the noise of their estimates."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, assert_same_value_and_gradient, inputs
from tests.oracles import bits, make_rollouts, token_estimates
from tests.oracles_pairs import corruption_of, log_ratios, multisets, preference_loss
from tests.test_embr import ALL_REWARDS, REF_LOGITS, exact_inputs
from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError
from unmask.likelihood import elbo
from unmask.objectives import VRPO, DPOElbo
from unmask.objectives.preference import preferred_pairs, win_shares
from unmask.types import Corruption, LossInputs, take_rows

GROUPS, REWARDS, LENGTHS = [7, 2, 7, 7, 2, 5, 5], [1.0, 0.25, 0.0, 0.5, 2.0, 1.0, 1.0], [4, 3, 1, 2, 4, 2, 3]
ROLLOUTS = make_rollouts(
    torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 0], [0, 2, 0, 1], [1, 1, 2, 2], [0, 1, 1, 1], [2, 0, 1, 1]]),
    groups=GROUPS,
    rewards=REWARDS,
    length=LENGTHS,
)


def elbos(x, length, coupled):
    return [sum(row) for row in token_estimates(x.logps, x.corruption.masked[..., -4:], length, "elbo", coupled)]


@pytest.mark.parametrize("cls", [VRPO, DPOElbo])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta": 1.3, "sft_coef": 0.4},
        {"sft_coef": 0.0, "share_masks": True},
        {"share_masks": False, "num_masks": 2, "stratify": False},
        {"coupled": True, "num_masks": 4},
        {"count_positions": "all", "sft_coef": 1.0},
    ],
    ids=str,
)
def test_loss_equals_the_loop_oracle(cls, fields):
    a = cls(**fields)
    x = inputs(a, rollouts=ROLLOUTS)
    length = LENGTHS if a.count_positions == "to_eos" else [4] * 7
    expected = preference_loss(
        log_ratios(x, length, coupled=a.coupled),
        elbos(x, length, a.coupled),
        REWARDS,
        GROUPS,
        length,
        beta=a.beta,
        sft_coef=a.sft_coef,
    )
    assert_same_value_and_gradient(a.loss(x).loss, expected, POLICY)


def hand_made(logps, ref, rewards, groups):
    """One copy of two tokens, both read with weight 1 and half of the number given: B is that number."""
    two = torch.ones(len(logps), 1, 2, dtype=torch.bool)
    logps, ref, rewards = (torch.tensor(v, dtype=torch.float64) for v in (logps, ref, rewards))
    logps, ref = (v.view(-1, 1, 1).expand(-1, 1, 2) / 2 for v in (logps, ref))
    length = torch.full((len(rewards),), 2)
    draw = Corruption(two, two, two.double(), "elbo")
    return LossInputs(logps.requires_grad_(), draw, rewards, rewards, torch.tensor(groups), length, ref_logps=ref)


def test_numbers_by_hand():
    """B - B^ref = 2, -1, 1.5, 5, 5; pairs 0 > 1 of group 4 and 3 > 2 of group 9, row 4 has no pair. β = 1/2:
    h = 1.5 and 1.75. Supervised: (1 + 1) / 2 pairs · 1/10 · 1/2 per token."""
    x = hand_made([-1.0, -3.0, 0.0, -1.0, 0.0], [-3.0, -2.0, -1.5, -6.0, -5.0], [1, 0, 0, 7, 0], [4, 4, 9, 9, 1])
    out = VRPO(beta=0.5, sft_coef=0.1).loss(x)
    policy_loss = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(-1.75))) / 2
    expected = {
        "policy_loss": policy_loss,
        "sft_loss": 0.05,
        "rewards/chosen": (1.0 + 2.5) / 2,
        "rewards/rejected": (-0.5 + 0.75) / 2,
        "rewards/margins": 1.625,
        "rewards/accuracies": 1.0,
        "num_pairs": 2.0,
    }
    assert out.metrics == pytest.approx(expected, abs=1e-14)
    assert out.loss.item() == pytest.approx(policy_loss + 0.05, abs=1e-14)
    (gradient,) = torch.autograd.grad(out.loss, x.logps)
    push = [0.25 / (1 + math.exp(1.5)), 0.25 / (1 + math.exp(1.75))]  # β/2 σ(-h), over two groups
    rows = [-push[0] - 0.025, push[0], push[1], -push[1] - 0.025, 0.0]
    assert gradient[:, 0, 0].tolist() == pytest.approx(rows, abs=1e-14)
    turned = VRPO(beta=0.5, sft_coef=0.0).loss(replace(x, rewards=-x.rewards))
    assert turned.metrics["rewards/accuracies"] == 0.0 and "sft_loss" not in turned.metrics
    half = VRPO(beta=0.5).loss(replace(x, rewards=torch.tensor([0.0, 1, 0, 7, 0]).double()))
    assert half.metrics["rewards/accuracies"] == 0.5


def test_pairs_of_larger_groups_are_all_with_unequal_rewards_and_groups_weigh_alike():
    rewards, groups = torch.tensor([1.0, 0.0, 0.5, 0.5, 3.0, 2.0]), torch.tensor([1, 1, 1, 1, 6, 6])
    winner, loser = preferred_pairs(rewards, groups)
    expected = [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1), (4, 5)]
    assert list(zip(winner.tolist(), loser.tolist(), strict=True)) == expected
    x = hand_made([-1.0] * 6, [-1.0] * 6, rewards.tolist(), groups.tolist())
    (gradient,) = torch.autograd.grad(VRPO(sft_coef=0.0).loss(x).loss, x.logps)
    # β σ(0) times (losses - wins) / pairs, halved by two groups
    rows = [-3 / 5, 3 / 5, 0.0, 0.0, -1.0, 1.0]
    assert gradient[:, 0, 0].tolist() == pytest.approx([0.1 * r / 2 for r in rows], abs=1e-15)


def test_win_shares_by_hand():
    """Three wins of three; three losses; one each, the equal one neither; a pair; a row alone."""
    rewards, groups = torch.tensor([1.0, 0.0, 0.5, 0.5, 3.0, 2.0, 4.0]), torch.tensor([1, 1, 1, 1, 6, 6, 8])
    assert win_shares(rewards, groups).tolist() == [1.0, -1.0, 0.0, 0.0, 1.0, -1.0, 0.0]
    third = win_shares(torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.zeros(4))
    assert third.tolist() == pytest.approx([1.0, 0.0, 0.0, -1.0])
    uneven = win_shares(torch.tensor([2.0, 2.0, 1.0, 0.0], dtype=torch.float64), torch.zeros(4))
    assert uneven.tolist() == pytest.approx([2 / 3, 2 / 3, -1 / 3, -1.0], abs=1e-15)
    assert VRPO().advantages(rewards, groups).tolist() == DPOElbo().advantages(rewards, groups).tolist()
    assert VRPO().advantages(rewards, groups).tolist() == win_shares(rewards, groups).tolist()


# --- at the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [VRPO(sft_coef=0.0), DPOElbo(share_masks=True)], ids=["vrpo", "dpo"])
def test_at_the_reference_the_loss_is_log_two_and_the_gradient_that_of_the_pair(algorithm):
    pair = take_rows(ROLLOUTS, torch.tensor([1, 4]))
    x = inputs(algorithm, ref=POLICY, rollouts=pair)
    out = algorithm.loss(x)
    loss, low = out.loss, elbo(x.logps, x.corruption)
    assert out.metrics["rewards/accuracies"] == out.metrics["rewards/margins"] == 0.0
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    expected = -0.1 * (low[1] - low[0])  # -(β/2) (B_w - B_l); row 4 has the higher reward
    gradients = [torch.autograd.grad(v, POLICY.table, retain_graph=True)[0] for v in (loss, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-14) and gradients[1].abs().max() > 1e-2


def test_winner_and_loser_exchanged_negate_the_margin():
    algorithm = VRPO(sft_coef=0.0)
    x = inputs(algorithm, rollouts=take_rows(ROLLOUTS, torch.tensor([1, 4])))
    there, back = (algorithm.loss(replace(x, rewards=sign * x.rewards)) for sign in (1, -1))
    h = there.metrics["rewards/margins"]
    assert abs(h) > 0.1 and back.metrics["rewards/margins"] == pytest.approx(-h, abs=1e-14)
    # log(1 + e^-h) - log(1 + e^h) = -h
    assert (there.loss - back.loss).item() == pytest.approx(-h, abs=1e-14)


@pytest.mark.parametrize("algorithm", [VRPO(), DPOElbo()], ids=["vrpo", "dpo"])
def test_no_pair_is_a_zero_with_zero_gradient(algorithm):
    x = inputs(algorithm, rollouts=ROLLOUTS)
    for rewards, groups in (([1.0] * 7, GROUPS), (REWARDS, list(range(7)))):
        out = algorithm.loss(replace(x, rewards=torch.tensor(rewards).double(), groups=torch.tensor(groups)))
        (gradient,) = torch.autograd.grad(out.loss, x.logps)
        assert out.loss.item() == 0.0 and not gradient.any()
        assert set(out.metrics.values()) == {0.0}


def test_rows_and_groups_without_a_pair_change_nothing():
    x = inputs(VRPO(), rollouts=ROLLOUTS)
    fewer = inputs(VRPO(), rollouts=take_rows(ROLLOUTS, slice(0, 5)))  # the last two rows are an undecided group
    assert_same_value_and_gradient(VRPO().loss(x).loss, VRPO().loss(fewer).loss, POLICY)


def test_padding_behind_the_stop_token_changes_nothing():
    """Two more end-of-text tokens on each canvas: the same draws where it counts, so the same loss and gradient."""
    algorithm = VRPO()
    wide = replace(
        ROLLOUTS,
        **{
            name: torch.nn.functional.pad(getattr(ROLLOUTS, name), (0, 2))
            for name in ("completion_ids", "reveal_step", "sample_logps")
        },
    )
    x = inputs(algorithm, rollouts=ROLLOUTS)
    draw = algorithm.draw(wide, noise=NOISE.stream("policy"))
    assert torch.equal(draw.masked[..., :-2], x.corruption.masked) and not draw.masked[..., -2:].any()
    padded = replace(
        x,
        corruption=draw,
        logps=torch.nn.functional.pad(x.logps, (0, 2)),
        ref_logps=torch.nn.functional.pad(x.ref_logps, (0, 2)),
    )
    assert_same_value_and_gradient(algorithm.loss(padded).loss, algorithm.loss(x).loss, POLICY)


# --- optimum ---------------------------------------------------------------------------------------------------------


def bradley_terry_loss(logits, beta):
    """Mean over all pairs of the loss on (i, j) and (j, i), weighted by σ(r_i - r_j) and σ(r_j - r_i)."""
    x, total = exact_inputs(logits), 0.0
    algorithm = VRPO(beta=beta, sft_coef=0.0)
    for i, j in itertools.combinations(range(8), 2):
        rows = torch.tensor([i, j])
        pair = take_rows(x, rows)
        p = (ALL_REWARDS[i] - ALL_REWARDS[j]).sigmoid()
        for weight, rewards in ((p, [1.0, 0.0]), (1 - p, [0.0, 1.0])):
            total = total + weight * algorithm.loss(replace(pair, rewards=torch.tensor(rewards).double())).loss
    return total / 28


def test_the_optimum_for_bradley_terry_preferences_is_the_tilted_reference():
    """There β (log-ratio) is the reward up to a constant: h = r_i - r_j for every pair, and the gradient vanishes."""
    beta = 0.5
    logits = (REF_LOGITS + ALL_REWARDS.view(2, 2, 2) / beta).requires_grad_()
    loss = bradley_terry_loss(logits, beta)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12
    gaps = [abs(a - b) for a, b in itertools.combinations(ALL_REWARDS.tolist(), 2)]
    entropy = sum(math.log(1 + math.exp(-g)) + g / (1 + math.exp(g)) for g in gaps) / 28  # of the preferences
    assert loss.item() == pytest.approx(entropy, abs=1e-12)
    away = bradley_terry_loss(REF_LOGITS.clone().requires_grad_(), beta)
    assert away.item() == pytest.approx(math.log(2), abs=1e-12) and away > loss + 1e-3


# --- noise of the estimate, enumerated on two tokens -----------------------------------------------------------------


def tables(seed=0):
    """(theta, reference): l(i;S) of winner and loser in the 3 masked states of 2 tokens, (2, 4, 2) each."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.tensor([[bool(S >> i & 1) for i in range(2)] for S in range(4)])
    theta, ref = (-3 * torch.rand((2, 4, 2), generator=generator, dtype=torch.float64) * inside for _ in range(2))
    return theta.requires_grad_(), ref


def estimate(algorithm, theta, ref, rows, ref_rows=None):
    """(loss, h) where the copies of winner and loser mask the given subsets."""
    draw, ref_draw = corruption_of(rows, 2), corruption_of(ref_rows or rows, 2)
    logps, ref_logps = (
        torch.stack([t[b, torch.tensor(subsets[b])] for b in range(2)])
        for t, subsets in ((theta, rows), (ref, ref_rows or rows))
    )
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    shared = {} if ref_rows is None else {"ref_corruption": ref_draw}
    x = LossInputs(
        logps, draw, rewards, rewards, torch.zeros(2), torch.tensor([2, 2]), ref_logps=ref_logps.detach(), **shared
    )
    return algorithm.loss(x)


def exact_ratios(theta, ref):
    law = multisets(2, 1)
    return [sum(p * 2 / len(bits(S)) * (theta - ref)[b, S, bits(S)].sum() for (S,), p in law) for b in range(2)]


def shared_outcomes(algorithm, theta, ref, num_masks):
    """(probability, output) over all draws of winner and loser, the reference on the same."""
    law = multisets(2, num_masks)
    return [(p * q, estimate(algorithm, theta, ref, [w, l])) for (w, p), (l, q) in itertools.product(law, law)]


def test_bias_of_the_estimate_inside_the_logarithm_shrinks_with_the_draws():
    """E -log σ(ĥ) > -log σ(h) by Jensen; about half of it is left with twice the draws."""
    theta, ref = tables()
    algorithm = VRPO(beta=1.0, sft_coef=0.0)
    winner, loser = exact_ratios(theta, ref)
    exact = -torch.nn.functional.logsigmoid(winner - loser).item()
    biases = []
    for n in (1, 2, 4):
        outcomes = shared_outcomes(algorithm, theta.detach(), ref, n)
        assert sum(p for p, _ in outcomes) == pytest.approx(1.0, abs=1e-12)
        biases.append(sum(p * out.loss.item() for p, out in outcomes) - exact)
    assert all(later < earlier for earlier, later in itertools.pairwise(biases)) and biases[-1] > 0
    assert 1.7 < biases[1] / biases[2] < 2.3


def test_independent_masks_of_the_reference_exceed_log_two_where_the_models_are_equal():
    """All 3^4 outcomes of one draw each: shared masks give log 2 in every one, independent ones more on average."""
    theta, _ = tables()
    law, algorithm = multisets(2, 1), DPOElbo(beta=1.0)
    mean = 0.0
    for (w, p), (l, q), (rw, r), (rl, s) in itertools.product(law, repeat=4):
        mean += p * q * r * s * estimate(algorithm, theta, theta, [w, l], [rw, rl]).loss.item()
    assert mean > math.log(2) + 0.1
    for _, out in shared_outcomes(algorithm, theta, theta, 1):
        assert out.loss.item() == pytest.approx(math.log(2), abs=1e-15)


def spread(outcomes, theta):
    """(variance of h, total variance of the gradient in theta) over enumerated outcomes."""
    score = gradient = 0.0
    squares = 0.0
    mean_h = sum(p * out.metrics["rewards/margins"] for p, out in outcomes)
    for p, out in outcomes:
        (g,) = torch.autograd.grad(out.loss, theta, retain_graph=True)
        score += p * (out.metrics["rewards/margins"] - mean_h) ** 2
        gradient, squares = gradient + p * g, squares + p * g.square().sum().item()
    return score, squares - gradient.square().sum().item()


def test_vrpo_has_less_variance_than_dpo_in_score_and_gradient():
    """One level and masks of its own, one level shared, four levels shared: by enumeration of every draw."""
    theta, _ = tables()
    ref = (theta.detach() * 1.1).clone()  # a policy not far from its reference
    law, algorithm = multisets(2, 1), DPOElbo()
    independent = [
        (p * q * r * s, estimate(algorithm, theta, ref, [w, l], [rw, rl]))
        for (w, p), (l, q), (rw, r), (rl, s) in itertools.product(law, repeat=4)
    ]
    shared = VRPO(sft_coef=0.0)
    dpo, one, four = (
        spread(o, theta)
        for o in (independent, shared_outcomes(shared, theta, ref, 1), shared_outcomes(shared, theta, ref, 4))
    )
    assert dpo[0] > 50 * one[0] and one[0] == pytest.approx(4 * four[0], rel=1e-10)  # independent draws: 1/n
    assert dpo[1] > one[1] > 3 * four[1]


# --- draws, limits, refusals -----------------------------------------------------------------------------------------


def test_draws_follow_the_fields():
    assert VRPO().draw(ROLLOUTS, noise=NOISE).num_masks == 8 and DPOElbo().draw(ROLLOUTS, noise=NOISE).num_masks == 1
    wide = make_rollouts(torch.zeros(3, 8, dtype=torch.int64))
    sizes = VRPO().draw(wide, noise=NOISE).scored.sum(-1)
    assert sizes.sort(1).values.tolist() == [list(range(1, 9))] * 3  # eight levels of eight, each once
    fields = {"num_masks": 4, "coupled": True, "stratify": False, "count_positions": "all"}
    for cls in (VRPO, DPOElbo):
        found = cls(**fields).draw(ROLLOUTS, noise=NOISE, iteration=1)
        expected = draw_uniform_count(ROLLOUTS, **fields, noise=NOISE.stream("1"))
        assert torch.equal(found.weight, expected.weight) and torch.equal(found.masked, expected.masked)
        assert found.kind == "elbo"


def test_missing_reference_is_named():
    for algorithm in (VRPO(), DPOElbo()):
        x = inputs(algorithm, rollouts=ROLLOUTS)
        with pytest.raises(ValueError, match=f"{type(algorithm).__name__}.* got no ref_logps"):
            algorithm.loss(replace(x, ref_logps=None))


@pytest.mark.parametrize("shift", [300.0, -300.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite_and_linear(shift, dtype):
    """Row 0 wins by B - B^ref = shift against 0: the loss is softplus(-β shift), exact on either side."""
    x = hand_made([-1.0, -1.0], [-1.0 - shift, -1.0], [1, 0], [0, 0])
    x = replace(x, logps=x.logps.detach().to(dtype).requires_grad_(), ref_logps=x.ref_logps.to(dtype))
    out = VRPO(sft_coef=0.0).loss(x)
    (gradient,) = torch.autograd.grad(out.loss, x.logps)
    h = 0.2 * shift
    expected, push = (math.log1p(math.exp(-h)), 0.0) if h > 0 else (-h, 0.2)
    assert out.loss.dtype == dtype and out.loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-30)
    assert gradient[0, 0, 0].item() == pytest.approx(-push, abs=1e-7)  # β in float32
    assert torch.isfinite(gradient).all() and all(math.isfinite(v) for v in out.metrics.values())


def test_completions_of_length_one_are_finite():
    short = make_rollouts(torch.tensor([[1], [2]]), rewards=[1.0, 0.0])
    draw = VRPO().draw(short, noise=NOISE)
    assert draw.scored.all() and torch.allclose(draw.weight, torch.tensor(1 / 8).double())
    logps = -torch.ones(2, 8, 1, dtype=torch.float64, requires_grad=True)
    x = LossInputs(logps, draw, short.rewards, short.rewards, short.groups, short.length, ref_logps=logps.detach())
    assert VRPO().loss(x).loss.item() == pytest.approx(math.log(2) + 0.05, abs=1e-12)


def test_published_defaults():
    a, b = VRPO(), DPOElbo()
    assert (a.beta, a.sft_coef, a.num_masks, a.coupled, a.stratify, a.share_masks) == (0.2, 0.05, 8, False, True, True)
    assert (b.beta, b.sft_coef, b.num_masks, b.coupled, b.stratify, b.share_masks) == (0.2, 0.0, 1, False, True, False)
    for one in (a, b):
        assert (one.num_iterations, one.fresh_masks, one.count_positions) == (1, True, "to_eos")
        assert one.strategies == ("pairs", "groups") and not one.is_row_separable
        assert one.needs.ref and not one.needs.old and one.needs.value is None


@pytest.mark.parametrize("cls", [VRPO, DPOElbo])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, r"algorithm.beta = 0.0: .*above 0"),
        ({"beta": math.inf}, r"algorithm.beta = inf"),
        ({"sft_coef": -0.1}, r"algorithm.sft_coef = -0.1: .*0 \(none\) or more"),
        ({"sft_coef": math.inf}, r"algorithm.sft_coef = inf"),
        ({"num_masks": 0}, r"algorithm.num_masks = 0"),
        ({"num_masks": 3, "coupled": True}, r"algorithm.num_masks = 3: .*even"),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0"),
        ({"count_positions": "eos"}, r"algorithm.count_positions = 'eos': .*all, to_eos"),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(cls, fields, message):
    with pytest.raises(ConfigError, match=message):
        cls(**fields)


def test_fields_may_reach_their_limits():
    assert VRPO(sft_coef=0.0, num_masks=1, num_iterations=1).num_masks == 1
