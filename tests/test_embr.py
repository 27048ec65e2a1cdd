"""EMBR-E and EMBR-C against loop oracles, closed forms at the reference, and exact optima of enumerated models."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, REF, assert_same_value_and_gradient, inputs
from tests.oracles import bits, make_rollouts
from tests.oracles_pairs import corruption_of, embr_c_loss, embr_e_loss, joint_table, log_ratios, multisets
from tests.test_likelihood_eubo import all_copies
from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError
from unmask.likelihood import elbo
from unmask.objectives import EmbrC, EmbrE
from unmask.types import Corruption, LossInputs

GROUPS, REWARDS, LENGTHS = [7, 2, 7, 7, 2], [1.0, 0.25, 0.0, 0.5, 2.0], [4, 3, 1, 2, 4]
ROLLOUTS = make_rollouts(
    torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 0], [0, 2, 0, 1], [1, 1, 2, 2]]),
    groups=GROUPS,
    rewards=REWARDS,
    length=LENGTHS,
)
VALUES = torch.tensor([0.4, -1.3, 0.4, 0.4, -1.3], dtype=torch.float64)
FIELDS = [
    {},
    {"beta": 0.7},
    {"cross_fit": True},
    {"cross_fit": True, "coupled": False, "num_masks": 6, "beta": 0.5},
    {"share_masks": False},
    {"coupled": False, "num_masks": 3, "stratify": False},
    {"count_positions": "to_eos"},
    {"residual_scale": "none", "beta": 1.5},
]


def both_modes(c_mode, **fields):
    algorithm = EmbrE(c_mode=c_mode, **fields)
    x = inputs(algorithm, rollouts=ROLLOUTS)
    return algorithm, replace(x, values=VALUES.clone().requires_grad_()) if c_mode == "head" else x


def ratios_of(algorithm, x):
    length = LENGTHS if algorithm.count_positions == "to_eos" else [4] * 5
    halves = (0, 1) if algorithm.cross_fit else (None,)
    return [log_ratios(x, length, coupled=algorithm.coupled, half=half) for half in halves]


@pytest.mark.parametrize("c_mode", ["head", "group_mean"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_loss_equals_the_loop_oracle(fields, c_mode):
    algorithm, x = both_modes(c_mode, **fields)
    scale = 4 if algorithm.residual_scale == "per_length" else 1
    c = None if x.values is None else list(x.values)
    expected = embr_e_loss(ratios_of(algorithm, x), REWARDS, GROUPS, c, beta=algorithm.beta, scale=scale)
    loss = algorithm.loss(x).loss
    assert_same_value_and_gradient(loss, expected, POLICY)
    if x.values is not None:
        ours, theirs = (torch.autograd.grad(value, x.values, retain_graph=True)[0] for value in (loss, expected))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10) and theirs.abs().min() > 1e-4


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_contrastive_loss_equals_the_loop_oracle(fields):
    algorithm = EmbrC(**fields)
    x = inputs(algorithm, rollouts=ROLLOUTS)
    scale = 4 if algorithm.residual_scale == "per_length" else 1
    expected = embr_c_loss(ratios_of(algorithm, x), REWARDS, GROUPS, beta=algorithm.beta, scale=scale)
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def hand_made(logps, ref, rewards, groups, **more):
    """One copy of one token for each row, weight 1: B is the number given."""
    one = torch.ones(len(logps), 1, 1, dtype=torch.bool)
    logps, ref, rewards = (torch.tensor(v, dtype=torch.float64) for v in (logps, ref, rewards))
    draw = Corruption(one, one, one.double(), "elbo")
    logps = logps.view(-1, 1, 1).requires_grad_()
    length = torch.ones(len(rewards), dtype=torch.int64)
    return LossInputs(logps, draw, rewards, rewards, torch.tensor(groups), length, ref_logps=ref.view(-1, 1, 1), **more)


def plain(cls, **fields):
    return cls(**{"coupled": False, "num_masks": 1, "beta": 0.5} | fields)


def test_numbers_by_hand():
    """B - B^ref = 2, -1, 1; R = 1, 0, 1; β = 1/2: energies 0, -1, -1. Rows 0 and 1 are a group, row 2 is alone.
    head: c = 0.5, 0.5, 3: residuals 0.5, -0.5, 2. group_mean: 0.5, -0.5, 0. C: one pair, twice: 1."""
    x = hand_made([-1.0, -3.0, 0.0], [-3.0, -2.0, -1.0], [1.0, 0.0, 1.0], [4, 4, 9])
    head = plain(EmbrE).loss(replace(x, values=torch.tensor([0.5, 0.5, 3.0]).double()))
    assert head.loss.item() == pytest.approx(4.5 / 3, abs=1e-14)
    assert head.metrics == pytest.approx(
        {
            "policy_loss": 1.5,
            "log_ratio": 2 / 3,
            "log_partition": 4 / 3,
            "residual_rms": 1.5**0.5,
            "target_rms": (2 / 3) ** 0.5,  # R/β = 2, 0, 2; within the groups 1, -1, 0
        },
        abs=1e-14,
    )
    mean = plain(EmbrE, c_mode="group_mean").loss(x)
    assert mean.loss.item() == pytest.approx(0.5 / 3, abs=1e-14)
    assert mean.metrics["log_partition"] == pytest.approx((0.5 + 0.5 + 1) / 3, abs=1e-14)
    pairs = plain(EmbrC).loss(x)
    assert pairs.metrics == pytest.approx(
        {"policy_loss": 1.0, "log_ratio": 2 / 3, "residual_rms": 1.0, "target_rms": 2.0}, abs=1e-14
    )
    (gradient,) = torch.autograd.grad(pairs.loss, x.logps)
    assert gradient.flatten().tolist() == pytest.approx([2.0, -2.0, 0.0], abs=1e-14)  # 2 S, as 0 - -1 = 1


def test_the_residual_is_divided_by_the_canvas_length():
    for algorithm in (EmbrC(), EmbrE(c_mode="group_mean"), EmbrC(count_positions="to_eos", cross_fit=True)):
        x = inputs(algorithm, rollouts=ROLLOUTS)
        raw = replace(algorithm, residual_scale="none").loss(x)
        assert algorithm.loss(x).loss.item() == pytest.approx(raw.loss.item() / 16, rel=1e-14)
        rms = (out.metrics["residual_rms"] for out in (algorithm.loss(x), raw))
        assert next(rms) == pytest.approx(next(rms), rel=1e-14)  # nats of a completion in either case


@pytest.mark.parametrize("algorithm", [EmbrC(), EmbrE(), EmbrE(c_mode="group_mean")], ids=["c", "e", "e_mean"])
def test_metrics_are_those_of_all_draws_with_cross_fit_too(algorithm):
    x = replace(inputs(algorithm, rollouts=ROLLOUTS), values=VALUES)
    plainly, crossed = (replace(algorithm, cross_fit=flag).loss(x).metrics for flag in (False, True))
    assert plainly.pop("policy_loss") != crossed.pop("policy_loss")
    assert plainly == pytest.approx(crossed, rel=1e-12)


# --- at the reference ------------------------------------------------------------------------------------------------


def elbo_gradients(x):
    """d B_i / d table of the policy, one row each."""
    return [torch.autograd.grad(b, POLICY.table, retain_graph=True)[0] for b in elbo(x.logps, x.corruption)]


def gradient_of(algorithm, x):
    return torch.autograd.grad(algorithm.loss(x).loss, POLICY.table, retain_graph=True)[0]


def test_at_the_reference_e_is_reinforce_with_c_as_its_baseline():
    """c = 0: gradient -(2/β) mean R ∇B; c = mean of R/β in the group: -(2/β) mean (R - R̄) ∇B; all over L²."""
    algorithm = EmbrE(beta=0.5)
    x = inputs(algorithm, ref=POLICY, rollouts=ROLLOUTS)
    directions = elbo_gradients(x)
    baseline = [0.5, 1.125, 0.5, 0.5, 1.125]
    for c, mode in ((torch.zeros(5), "head"), (torch.tensor(baseline) / 0.5, "head"), (None, "group_mean")):
        used = baseline if c is None or c.any() else [0.0] * 5
        found = gradient_of(replace(algorithm, c_mode=mode), replace(x, values=c))
        expected = sum(-(r - b) * g for r, b, g in zip(REWARDS, used, directions, strict=True)) * 2 / 0.5 / 5 / 16
        assert torch.allclose(found, expected, rtol=0, atol=1e-13) and expected.abs().max() > 1e-3


def test_at_the_reference_c_has_the_squared_target_and_the_gradient_of_its_pairs():
    """Loss (Δ/β)², gradient -2 (Δ/β) ∇(B_i - B_j), averaged; a group of three has six ordered pairs."""
    algorithm = EmbrC(beta=0.5)
    x = inputs(algorithm, ref=POLICY, rollouts=ROLLOUTS)
    directions, loss, gradient = elbo_gradients(x), 0.0, 0.0
    for rows in ([0, 2, 3], [1, 4]):
        pairs = list(itertools.permutations(rows, 2))
        for i, j in pairs:
            target = (REWARDS[i] - REWARDS[j]) / 0.5
            loss += target**2 / len(pairs) / 2 / 16
            gradient = gradient - 2 * target * (directions[i] - directions[j]) / len(pairs) / 2 / 16
    out = algorithm.loss(x)
    assert out.loss.item() == pytest.approx(loss, abs=1e-13)
    assert torch.allclose(gradient_of(algorithm, x), gradient, rtol=0, atol=1e-13)
    assert out.metrics["residual_rms"] == pytest.approx(out.metrics["target_rms"], rel=1e-14)
    assert out.metrics["log_ratio"] == pytest.approx(0.0, abs=1e-14)


# --- identities ------------------------------------------------------------------------------------------------------


def test_pairs_are_twice_the_variance_and_the_group_mean_leaves_the_variance():
    """C: 2 Var with divisor G-1. E with the best c: Var with divisor G. Of the energies of each group."""
    fields = {"beta": 0.5, "residual_scale": "none"}
    for rows in ([0, 2, 3], [1, 4]):
        x = inputs(EmbrC(**fields), rollouts=ROLLOUTS)
        (ratio,) = ratios_of(EmbrC(**fields), x)
        energy = torch.stack([ratio[i] - REWARDS[i] / 0.5 for i in rows])
        one_group = replace(
            x,
            groups=torch.where(torch.isin(torch.arange(5), torch.tensor(rows)), 0, 10 + torch.arange(5)),
        )
        assert EmbrC(**fields).loss(one_group).loss.item() == pytest.approx(2 * energy.var().item(), rel=1e-12)
        best = EmbrE(c_mode="group_mean", **fields).loss(one_group).loss.item() * 5  # rows of their own have 0
        assert best == pytest.approx(len(rows) * energy.var(correction=0).item(), rel=1e-12)


def test_group_mean_is_the_minimum_over_c():
    algorithm = EmbrE(beta=0.5)
    x = inputs(algorithm, rollouts=ROLLOUTS)
    (ratio,) = ratios_of(algorithm, x)
    best = -torch.stack([ratio[i] - REWARDS[i] / 0.5 for i in range(5)])
    best = torch.where(x.groups == 7, best[[0, 2, 3]].mean(), best[[1, 4]].mean()).detach()
    at_best = algorithm.loss(replace(x, values=best))
    assert at_best.loss.item() == pytest.approx(replace(algorithm, c_mode="group_mean").loss(x).loss.item(), rel=1e-12)
    for step in (0.1, -0.1):
        assert algorithm.loss(replace(x, values=best + step)).loss > at_best.loss + 1e-4  # 0.01 / 16


@pytest.mark.parametrize("cross_fit", [False, True])
@pytest.mark.parametrize("algorithm", [EmbrC(), EmbrE(c_mode="group_mean")], ids=["c", "e"])
def test_a_constant_of_the_prompt_and_a_common_factor_change_nothing(algorithm, cross_fit):
    """r -> r + const(x); and r, β -> s r, s β."""
    algorithm = replace(algorithm, beta=0.5, cross_fit=cross_fit)
    x = inputs(algorithm, rollouts=ROLLOUTS)
    shifted = replace(x, rewards=x.rewards + torch.where(x.groups == 7, 5.0, -2.5))
    scaled = replace(x, rewards=3 * x.rewards)
    same = [algorithm.loss(x).loss, algorithm.loss(shifted).loss, replace(algorithm, beta=1.5).loss(scaled).loss]
    for loss in same[1:]:
        assert_same_value_and_gradient(loss, same[0], POLICY)
    assert abs(algorithm.loss(scaled).loss - same[0]).item() > 1e-2


def test_equal_rewards_still_pull_log_ratios_together():
    algorithm = EmbrC()
    x = inputs(algorithm, rollouts=ROLLOUTS)
    x = replace(x, rewards=torch.ones(5).double())
    assert algorithm.loss(x).loss.item() > 1e-3 and gradient_of(algorithm, x).abs().max() > 1e-3
    at_ref = replace(x, ref_logps=x.logps.detach())
    assert algorithm.loss(at_ref).loss.item() == 0.0 and not gradient_of(algorithm, at_ref).any()


def test_rows_without_a_partner_add_nothing_and_alone_give_zero():
    algorithm = EmbrC()
    x = inputs(algorithm, rollouts=ROLLOUTS)
    one_pair = replace(x, groups=torch.tensor([1, 2, 3, 1, 4]))
    two_rows = torch.tensor([0, 3])
    keep = {"logps": x.logps[two_rows], "ref_logps": x.ref_logps[two_rows], "rewards": x.rewards[two_rows]}
    pair = replace(
        x,
        **keep,
        groups=torch.zeros(2),
        length=x.length[two_rows],
        corruption=Corruption(
            x.corruption.masked[two_rows], x.corruption.scored[two_rows], x.corruption.weight[two_rows], "elbo"
        ),
    )
    assert_same_value_and_gradient(algorithm.loss(one_pair).loss, algorithm.loss(pair).loss, POLICY)
    out = algorithm.loss(replace(x, groups=torch.arange(5)))
    (nothing,) = torch.autograd.grad(out.loss, x.logps)
    assert out.loss.item() == 0.0 and not nothing.any()
    assert out.metrics["residual_rms"] == out.metrics["target_rms"] == 0.0


# --- optima of a model whose ELBO is its likelihood ------------------------------------------------------------------

LENGTH, VOCAB = 3, 2
COMPLETIONS = list(itertools.product(range(VOCAB), repeat=LENGTH))
REF_LOGITS = torch.randn((VOCAB,) * LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ALL_REWARDS = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def exact_inputs(logits, rewards=ALL_REWARDS, values=None):
    """All completions as one group, scored on every masked state with the weights of their law: B = log p exactly."""
    draw = all_copies(LENGTH, coupled=False)
    draw = Corruption(*(t.expand(8, -1, -1) for t in (draw.masked, draw.scored, draw.weight)), "elbo")
    states = (draw.scored[0] * 2 ** torch.arange(LENGTH)).sum(-1)

    def logps(joint):
        return torch.stack([joint_table(joint, list(y))[states] for y in COMPLETIONS])

    joint, ref = (t - t.flatten().logsumexp(0) for t in (logits, REF_LOGITS))
    return LossInputs(
        logps(joint),
        draw,
        rewards,
        rewards,
        torch.zeros(8, dtype=torch.int64),
        torch.full((8,), LENGTH),
        ref_logps=logps(ref),
        values=values,
    )


def test_the_estimate_of_a_joint_is_its_log_probability():
    x = exact_inputs(REF_LOGITS + 1.3 * torch.arange(8.0).view(2, 2, 2).sin())
    joint = (REF_LOGITS + 1.3 * torch.arange(8.0).view(2, 2, 2).sin()).flatten().log_softmax(0)
    assert torch.allclose(elbo(x.logps, x.corruption), joint, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_and_gradient_vanish_at_the_tilted_reference_with_c_its_log_partition(beta):
    logits = (REF_LOGITS + ALL_REWARDS.view(2, 2, 2) / beta).requires_grad_()
    ref = REF_LOGITS.flatten().log_softmax(0)
    log_z = (ref + ALL_REWARDS / beta).logsumexp(0)
    for algorithm in (EmbrE(beta=beta), EmbrE(beta=beta, c_mode="group_mean"), EmbrC(beta=beta)):
        x = exact_inputs(logits, values=log_z.expand(8))
        out = algorithm.loss(x)
        assert out.loss.item() < 1e-24
        assert torch.autograd.grad(out.loss, logits)[0].abs().max() < 1e-11
        if isinstance(algorithm, EmbrE):
            assert out.metrics["log_partition"] == pytest.approx(log_z.item(), abs=1e-12)
    off = exact_inputs(logits, values=log_z.expand(8) + 0.3)
    assert EmbrE(beta=beta).loss(off).loss.item() == pytest.approx(0.09 / 9, rel=1e-10)


@pytest.mark.parametrize("name", ["head", "group_mean", "pairs"])
def test_descent_from_the_reference_arrives_there_and_nowhere_else(name):
    """8 logits and c by L-BFGS: the optimum is unique, as the loss is a square in log p."""
    beta = 0.5
    algorithm = EmbrC(beta=beta) if name == "pairs" else EmbrE(beta=beta, c_mode=name)
    logits, c = REF_LOGITS.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits, c], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, history_size=20)

    def closure():
        optimizer.zero_grad()
        loss = algorithm.loss(exact_inputs(logits, values=c.expand(8))).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    target = (REF_LOGITS.flatten().log_softmax(0) + ALL_REWARDS / beta).log_softmax(0)
    assert torch.allclose(logits.detach().flatten().log_softmax(0), target, rtol=0, atol=1e-7)
    if name == "head":
        log_z = (REF_LOGITS.flatten().log_softmax(0) + ALL_REWARDS / beta).logsumexp(0)
        assert c.item() == pytest.approx(log_z.item(), abs=1e-7)


# --- noise of the estimate -------------------------------------------------------------------------------------------


def table_of(seed):
    """Two rows' conditionals in the 3 masked states of 2 tokens, (2, 4, 2)."""
    table = -2 * torch.rand((2, 4, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inside = torch.tensor([[bool(S >> i & 1) for i in range(2)] for S in range(4)])
    return (table * inside).requires_grad_()


def enumerated(table, ref, rows):
    """Inputs of one group of two rows, whose copies mask the given subsets."""
    draw = corruption_of(rows, 2)
    states = torch.tensor(rows)
    logps, ref_logps = (torch.stack([t[b, states[b]] for b in range(2)]) for t in (table, ref))
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return LossInputs(
        logps,
        draw,
        rewards,
        rewards,
        torch.zeros(2),
        torch.tensor([2, 2]),
        ref_logps=ref_logps.detach(),
        values=VALUES[:2],
    )


@pytest.mark.parametrize("name", ["head", "group_mean", "pairs"])
def test_cross_fit_has_the_expectation_of_the_exact_residual_and_the_square_exceeds_it(name):
    """Two independent draws of each row: 3^4 outcomes. E[X1 X2] = X²; E[((X1 + X2)/2)²] = X² + Var/2."""
    fields = {"beta": 0.5, "num_masks": 2, "coupled": False}
    algorithm = EmbrC(**fields) if name == "pairs" else EmbrE(c_mode=name, **fields)
    table, ref = table_of(0), table_of(1).detach()
    outcomes = multisets(2, 1)
    differences = table - ref
    ratios = [sum(p * 2 / len(bits(S)) * differences[b, S, bits(S)].sum() for (S,), p in outcomes) for b in range(2)]
    if name == "pairs":
        expected = embr_c_loss([ratios], [1.0, 0.0], [0, 0], beta=0.5, scale=2)
    else:
        c = list(VALUES[:2]) if name == "head" else None
        expected = embr_e_loss([ratios], [1.0, 0.0], [0, 0], c, beta=0.5, scale=2)
    means = {True: 0.0, False: 0.0}
    for (a, p), (b, q), (c, r), (d, s) in itertools.product(outcomes, repeat=4):
        x = enumerated(table, ref, [a + b, c + d])
        for cross_fit in means:
            means[cross_fit] = means[cross_fit] + p * q * r * s * replace(algorithm, cross_fit=cross_fit).loss(x).loss
    gradients = [torch.autograd.grad(value, table, retain_graph=True)[0] for value in (means[True], expected)]
    assert abs((means[True] - expected).item()) < 1e-10
    assert torch.allclose(*gradients, rtol=0, atol=1e-10) and gradients[1].abs().max() > 1e-2
    assert means[False] > expected + 1e-2


def test_halves_are_independent_draws_side_by_side():
    algorithm = EmbrC(cross_fit=True, num_masks=8)
    draw, noise = algorithm.draw(ROLLOUTS, noise=NOISE, iteration=3), NOISE.stream("3")
    for start, name in ((0, "first_half"), (4, "second_half")):
        half = draw_uniform_count(ROLLOUTS, 4, coupled=True, noise=noise.stream(name))
        copies = slice(start, start + 4)
        for tensor, expected in (("masked", half.masked), ("scored", half.scored), ("weight", half.weight / 2)):
            assert torch.equal(getattr(draw, tensor)[:, copies], expected)
    assert draw.num_masks == 8 and draw.kind == "elbo"
    assert not torch.equal(draw.masked[:, :4], draw.masked[:, 4:])


def test_draws_follow_the_fields():
    for cls in (EmbrC, EmbrE):
        draw = cls().draw(ROLLOUTS, noise=NOISE)
        assert draw.num_masks == 4 and (draw.scored[:, ::2] ^ draw.scored[:, 1::2]).all()
        plainer = cls(coupled=False, num_masks=3, stratify=False, count_positions="to_eos")
        expected = draw_uniform_count(
            ROLLOUTS, 3, coupled=False, stratify=False, count_positions="to_eos", noise=NOISE.stream("0")
        )
        assert torch.equal(plainer.draw(ROLLOUTS, noise=NOISE).weight, expected.weight)


# --- needs, limits, refusals -----------------------------------------------------------------------------------------


def test_what_is_asked_for():
    head, mean = EmbrE(head_lr=3e-3), EmbrE(c_mode="group_mean")
    assert (head.needs.value.reads, head.needs.value.is_trunk_trained, head.needs.value.lr) == ("prompt", False, 3e-3)
    assert head.needs.value.loss is None and head.is_row_separable
    assert mean.needs.value is None and not mean.is_row_separable and not EmbrC().is_row_separable
    for algorithm in (head, mean, EmbrC()):
        assert algorithm.needs.ref and not algorithm.needs.old
        assert algorithm.strategies == ("groups", "pairs")
        assert algorithm.advantages(torch.tensor([1.0, 0.0]), torch.zeros(2)).tolist() == [0.5, -0.5]


def test_missing_numbers_are_named():
    x = inputs(EmbrE(), rollouts=ROLLOUTS)
    with pytest.raises(ValueError, match=r"EmbrE.loss\(\) got no values.*group_mean"):
        EmbrE().loss(x)
    for algorithm in (EmbrC(), EmbrE(c_mode="group_mean")):
        with pytest.raises(ValueError, match=f"{type(algorithm).__name__}.* got no ref_logps"):
            algorithm.loss(replace(x, ref_logps=None))


@pytest.mark.parametrize("shift", [300.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rewards", [[1.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]])
def test_extreme_log_ratios_stay_finite(shift, dtype, rewards):
    for algorithm in (EmbrC(), EmbrC(cross_fit=True), EmbrE(), EmbrE(c_mode="group_mean")):
        x = inputs(algorithm, rollouts=ROLLOUTS)
        logps = x.logps.detach().to(dtype).requires_grad_()
        ref = (x.logps.detach() + shift) * x.corruption.scored
        x = replace(x, logps=logps, ref_logps=ref.to(dtype), rewards=torch.tensor(rewards).double(), values=VALUES)
        out = algorithm.loss(x)
        assert out.loss.dtype == dtype and torch.isfinite(out.loss)
        assert torch.isfinite(torch.autograd.grad(out.loss, logps)[0]).all()
        assert all(math.isfinite(value) for value in out.metrics.values())


def test_implied_defaults():
    for a in (EmbrE(), EmbrC()):
        assert (a.beta, a.num_masks, a.coupled, a.stratify, a.share_masks) == (0.04, 4, True, True, True)
        assert (a.num_iterations, a.fresh_masks, a.cross_fit) == (8, True, False)
        assert (a.residual_scale, a.count_positions) == ("per_length", "all")
    assert (EmbrE().c_mode, EmbrE().head_lr) == ("head", 1e-4)


@pytest.mark.parametrize("cls", [EmbrE, EmbrC])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, r"algorithm.beta = 0.0: .*above 0"),
        ({"beta": -1.0}, r"algorithm.beta = -1.0"),
        ({"beta": math.inf}, r"algorithm.beta = inf"),
        ({"beta": math.nan}, r"algorithm.beta = nan"),
        ({"num_masks": 3}, r"algorithm.num_masks = 3: .*even.* Try 2 or 4, or algorithm.coupled = false"),
        ({"num_masks": 0}, r"algorithm.num_masks = 0"),
        ({"cross_fit": True, "num_masks": 6}, r"algorithm.num_masks = 6: .*halves of coupled pairs.*multiple of 4"),
        ({"cross_fit": True, "num_masks": 3, "coupled": False}, r"num_masks = 3: .*halves of copies.*multiple of 2"),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0"),
        ({"count_positions": "eos"}, r"algorithm.count_positions = 'eos'"),
        ({"residual_scale": "length"}, r"algorithm.residual_scale = 'length': .*per_length, none"),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(cls, fields, message):
    with pytest.raises(ConfigError, match=message):
        cls(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"c_mode": "mean"}, r"algorithm.c_mode = 'mean': .*head, group_mean"),
        ({"head_lr": 0.0}, r"algorithm.head_lr = 0.0"),
        ({"head_lr": math.inf}, r"algorithm.head_lr = inf"),
    ],
)
def test_bad_fields_of_the_head_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        EmbrE(**fields)


def test_fields_may_reach_their_limits():
    for fields in ({"cross_fit": True, "num_masks": 4}, {"num_masks": 1, "coupled": False}, {"num_iterations": 1}):
        assert {name: getattr(EmbrC(**fields), name) for name in fields} == fields
    assert EmbrC(cross_fit=True, num_masks=2, coupled=False).num_masks == 2
    assert REF.table.requires_grad  # the reference of `inputs` is detached, and not merely frozen
