"""DMPO's two losses against loop oracles, and what they are for: the target distribution, on models without noise."""

import math
from dataclasses import fields, replace

import pytest
import torch

from tests.objective_inputs import NOISE, OLD, POLICY, REF, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import conditionals, elbo_by_orders, make_rollouts, score_copies, token_estimates
from tests.oracles_steps import (
    all_paths,
    dmpo_weights,
    every_subset,
    policy_of,
    state_before,
    trajectory_logp,
    wdce_loss,
    wddo_loss,
)
from tests.toys import TabularPolicy
from unmask.errors import ConfigError
from unmask.objectives import SFT, DmpoWDCE, DmpoWDDO
from unmask.objectives.dmpo import signed_weights
from unmask.objectives.target_weights import (
    effective_share,
    ess_coefficient,
    log_density_ratio,
    target_weights,
)
from unmask.types import Evidence, LossInputs

STEPS = [[2, 0, 3, 1], [0, 0, 1, 1], [3, 2, 1, 0], [1, 4, 4, 0]]  # the second and fourth with several tokens a step
BATCH = replace(ROLLOUTS, reveal_step=torch.tensor(STEPS))
REWARDS, GROUPS, LENGTH = BATCH.rewards.tolist(), BATCH.groups.tolist(), BATCH.length.tolist()


def path_logps(policy, batch, steps):
    """(B, L) each position's share of log p(y; σ)."""
    tables, shares = {}, []
    for y, s in zip(batch.completion_ids, steps, strict=True):
        key = tuple(y.tolist())
        if key not in tables:
            tables[key] = conditionals(policy, y).tolist()
        shares.append([tables[key][state_before(s, s[i])][i] for i in range(len(s))])
    return torch.tensor(shares, dtype=torch.float64)


def with_evidence(algorithm, x, batch=BATCH, old=OLD, ref=REF, steps=STEPS):
    """LossInputs with what the trainer adds for weights of whole rollouts."""
    draw = algorithm.draw_evidence(batch, NOISE)
    evidence = Evidence(draw, score_copies(ref, batch, draw).detach(), score_copies(old, batch, draw).detach())
    return replace(x, evidence=evidence, sample_logps=path_logps(old, batch, steps))


def given(algorithm, **models):
    return with_evidence(algorithm, inputs(algorithm, rollouts=BATCH), **models)


@torch.no_grad()
def expected_log_rnd(algorithm, x):
    """Loops: along the steps, or two ELBO estimates."""
    if algorithm.weights != "target":
        return [0.0] * 4
    length = LENGTH if algorithm.count_positions == "to_eos" else [4] * 4
    if algorithm.likelihood == "order":
        return [
            float(trajectory_logp(conditionals(REF, y), s, n) - trajectory_logp(conditionals(OLD, y), s, n))
            for y, s, n in zip(BATCH.completion_ids, STEPS, length, strict=True)
        ]
    masked = x.evidence.corruption.masked[..., -4:]
    ref, old = (token_estimates(v, masked, length, "elbo", True) for v in (x.evidence.ref_logps, x.evidence.old_logps))
    return [float(sum(r) - sum(o)) for r, o in zip(ref, old, strict=True)]


def bounds(logps, corruption, length, coupled):
    return [sum(row) for row in token_estimates(logps, corruption.masked[..., -4:], length, "elbo", coupled)]


@torch.no_grad()
def expected_baseline(algorithm, x, theta, log_rnd, alpha):
    name = algorithm.baseline
    if name == "negative":
        return dmpo_weights(REWARDS, GROUPS, log_rnd, alpha=alpha, coef=algorithm.weight_coef, sign=-1.0)
    if name == "unbias":
        if algorithm.likelihood == "order":
            old = [
                float(trajectory_logp(conditionals(OLD, y), s))
                for y, s in zip(BATCH.completion_ids, STEPS, strict=True)
            ]
        else:
            old = [float(b) for b in bounds(x.evidence.old_logps, x.evidence.corruption, [4] * 4, True)]
        ratio = [float(t) - o for t, o in zip(theta, old, strict=True)]
        return dmpo_weights([0.0] * 4, GROUPS, ratio, alpha=1.0)
    return [0.0 if name == "none" else 0.5] * 4  # two rollouts a group


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"reward_temperature": 1.0},
        {"reward_temperature": 1.0, "likelihood": "elbo"},
        {"reward_temperature": 1.0, "likelihood": "elbo", "num_evidence_masks": 2, "count_positions": "to_eos"},
        {"reward_temperature": 1.0, "count_positions": "to_eos"},
        {"reward_temperature": 0.5, "baseline": "none"},
        {"reward_temperature": 0.5, "baseline": "constant", "baseline_scale": 0.5},
        {"reward_temperature": 0.5, "baseline": "group_mean"},
        {"reward_temperature": 0.5, "baseline_scale": 0.0},
        {"reward_temperature": 0.5, "baseline": "unbias"},
        {"reward_temperature": 0.5, "baseline": "unbias", "likelihood": "elbo", "weights": "reward"},
        {"weights": "reward", "weight_coef": 0.7},
        {"reward_temperature": 0.3, "weight_coef": 0.25, "baseline_scale": 2.0},
        {"reward_temperature": 1.0, "coupled": True, "num_masks": 2},
        {"reward_temperature": 1.0, "num_masks": 1, "stratify": False},
    ],
    ids=str,
)
def test_wdce_equals_the_loop_oracle(changed):
    algorithm = DmpoWDCE(**changed)
    x = given(algorithm)
    length = LENGTH if algorithm.count_positions == "to_eos" else [4] * 4
    theta = bounds(x.logps, x.corruption, length, algorithm.coupled)
    log_rnd = expected_log_rnd(algorithm, x)
    alpha = algorithm.reward_temperature if algorithm.weights == "target" else None
    weights = dmpo_weights(REWARDS, GROUPS, log_rnd, alpha=alpha, coef=algorithm.weight_coef)
    base = expected_baseline(algorithm, x, theta, log_rnd, alpha)
    signed = [w - algorithm.baseline_scale * b for w, b in zip(weights, base, strict=True)]
    out = algorithm.loss(x)
    assert_same_value_and_gradient(out.loss, wdce_loss(theta, signed, GROUPS, 4), POLICY)
    good = [b.item() for b, s in zip(theta, signed, strict=True) if s > 0]
    bad = [b.item() for b, s in zip(theta, signed, strict=True) if s < 0]
    assert out.metrics["elbo_good"] == pytest.approx(sum(good) / len(good), abs=1e-10)
    assert out.metrics["elbo_bad"] == pytest.approx(sum(bad) / len(bad) if bad else 0.0, abs=1e-10)
    assert out.metrics["weight_max"] == pytest.approx(max(map(abs, signed)), abs=1e-12)
    assert out.metrics["log_rnd_mean"] == pytest.approx(sum(log_rnd) / 4, abs=1e-10)
    spread = [(log_rnd[b] - log_rnd[b ^ 1]) / 2 for b in range(4)]  # from the mean of two
    assert out.metrics["log_rnd_std"] == pytest.approx((sum(d * d for d in spread) / 4) ** 0.5, abs=1e-10)
    share = [1 / (2 * (weights[b] ** 2 + weights[b ^ 1] ** 2)) for b in (0, 2)]
    assert out.metrics["ess"] == pytest.approx(sum(share) / 2, abs=1e-12)
    assert out.metrics["weight_coef"] == algorithm.weight_coef


@pytest.mark.parametrize(("baseline", "scale"), [("none", 1.0), ("group_mean", 1.0), ("group_mean", 0.5)])
def test_raw_rewards_are_reinforce_on_the_elbo(baseline, scale):
    algorithm = DmpoWDCE(weights="raw", baseline=baseline, baseline_scale=scale)
    x = inputs(algorithm, rollouts=BATCH)
    mean = [0.625, 0.625, 1.0, 1.0] if baseline == "group_mean" else [0.0] * 4
    signed = [r - scale * m for r, m in zip(REWARDS, mean, strict=True)]
    expected = wdce_loss(bounds(x.logps, x.corruption, [4] * 4, False), signed, GROUPS, 4)
    out = algorithm.loss(x)
    assert_same_value_and_gradient(out.loss, expected, POLICY)
    assert set(out.metrics) == {"policy_loss", "weight_max", "elbo_good", "elbo_bad"}
    assert algorithm.needs.evidence is None and not algorithm.needs.order
    assert signed_weights(algorithm, x.rewards, x.groups, None, None)[2].tolist() == [1.0] * 4  # no exponent


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"reward_temperature": 1.0, "discriminator_scale": 0.3, "negative_coef": 0.7},
        {"reward_temperature": 1.0, "use_independent_halves": False},
        {"reward_temperature": 1.0, "use_independent_halves": False, "num_masks": 2, "coupled": True},
        {"reward_temperature": 1.0, "coupled": True, "weights": "reward"},
        {"reward_temperature": 1.0, "old_likelihood": "order"},
        {"reward_temperature": 1.0, "old_likelihood": "order", "likelihood": "elbo"},
        {"reward_temperature": 1.0, "likelihood": "elbo", "weight_coef": 0.5},
        {"reward_temperature": 1.0, "old_likelihood": "order", "count_positions": "to_eos"},
    ],
    ids=str,
)
def test_wddo_equals_the_loop_oracle(changed):
    algorithm = DmpoWDDO(**changed)
    x = given(algorithm)
    length = LENGTH if algorithm.count_positions == "to_eos" else [4] * 4
    halves = [slice(None)] * 2
    if algorithm.use_independent_halves:
        k = algorithm.num_masks // 2
        halves = [slice(0, k), slice(k, 2 * k)]
    ratios = []
    for half in halves:
        masked = x.corruption.masked[:, half, -4:]
        theta, old = (
            [sum(row) for row in token_estimates(v[:, half], masked, length, "elbo", algorithm.coupled)]
            for v in (x.logps, x.old_logps)
        )
        if algorithm.old_likelihood == "order":
            old = [
                trajectory_logp(conditionals(OLD, y), s, n).detach()
                for y, s, n in zip(BATCH.completion_ids, STEPS, length, strict=True)
            ]
        ratios.append([t - o for t, o in zip(theta, old, strict=True)])
    log_rnd = expected_log_rnd(algorithm, x)
    alpha = algorithm.reward_temperature if algorithm.weights == "target" else None
    weights = dmpo_weights(REWARDS, GROUPS, log_rnd, alpha=alpha, coef=algorithm.weight_coef)
    expected = wddo_loss(*ratios, weights, GROUPS, kappa=algorithm.discriminator_scale, a=algorithm.negative_coef)
    out = algorithm.loss(x)
    assert_same_value_and_gradient(out.loss, expected, POLICY)
    up, down = ([v.item() for v in part] for part in ratios)
    target = sum(2 * w * d for w, d in zip(weights, up, strict=True)) / 4
    assert out.metrics["log_ratio_target"] == pytest.approx(target, abs=1e-10)
    assert out.metrics["log_ratio_old"] == pytest.approx(sum(down) / 4, abs=1e-10)
    assert out.metrics["weight_max"] == pytest.approx(max(weights), abs=1e-12)
    assert out.metrics["policy_loss"] == out.loss.item()


# --- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["negative", "constant", "group_mean", "unbias"])
@pytest.mark.parametrize("likelihood", ["order", "elbo"])
def test_weights_add_up_to_one_and_signed_ones_to_zero(baseline, likelihood):
    """The gradient at B itself is the signed weight: -1/(N L) of it for each copy's weight."""
    algorithm = DmpoWDCE(baseline=baseline, likelihood=likelihood, reward_temperature=0.7)
    x = given(algorithm)
    x = replace(x, logps=x.logps.detach().requires_grad_())
    (grad,) = torch.autograd.grad(algorithm.loss(x).loss, x.logps)
    size = x.corruption.weight.sum((1, 2))
    signed = -grad.sum((1, 2)) / size * 2 * 4
    assert (signed.view(2, 2).sum(1)).abs().max() < 1e-14 and signed.abs().min() > 1e-4
    weight, _, _ = target_weights(algorithm, x.rewards, x.groups, log_density_ratio(algorithm, x))
    assert torch.allclose(weight.view(2, 2).sum(1), torch.ones(2).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("algorithm", [DmpoWDCE(), DmpoWDCE(likelihood="elbo"), DmpoWDDO(likelihood="elbo")], ids=str)
def test_log_rnd_is_exactly_zero_where_the_models_agree(algorithm):
    x = given(algorithm, old=POLICY, ref=POLICY)
    if algorithm.likelihood == "order":  # the same bits, as sampler and scoring give on one model
        x = replace(x, sample_logps=x.evidence.ref_logps.sum(1))
    assert (log_density_ratio(algorithm, x) == 0).all()
    plain = log_density_ratio(DmpoWDCE(weights="reward"), replace(x, rewards=x.rewards.float()))
    assert plain.dtype == torch.float64 and (plain == 0).all()
    metrics = algorithm.loss(x).metrics
    assert metrics["log_rnd_mean"] == metrics["log_rnd_std"] == 0.0
    weight, _, _ = target_weights(algorithm, x.rewards, x.groups, log_density_ratio(algorithm, x))
    expected = dmpo_weights(REWARDS, GROUPS, [0.0] * 4, alpha=0.04)
    assert weight.tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("positions", [2, 3])
def test_density_ratios_average_to_one_over_samples_and_orders(positions):
    """E_{σ, y ~ p_old(·;σ)} exp(log p_ref - log p_old) = 1, every completion with every order."""
    old, ref = (TabularPolicy(length=positions, seed=seed) for seed in (1, 2))
    paths = all_paths(3, positions)
    batch = make_rollouts(torch.tensor([y for y, _ in paths]))
    batch = replace(batch, reveal_step=torch.tensor([s for _, s in paths]))
    x = LossInputs(torch.zeros(len(paths), 1, positions), None, *[batch.rewards] * 2, batch.groups, batch.length)
    algorithm = DmpoWDCE()
    log_rnd = log_density_ratio(algorithm, with_evidence(algorithm, x, batch, old, ref, [s for _, s in paths]))
    log_old = path_logps(old, batch, [s for _, s in paths]).sum(1)
    num_orders = math.factorial(positions)
    assert abs(float(log_old.exp().sum() / num_orders) - 1) < 1e-12
    assert abs(float((log_old + log_rnd).exp().sum() / num_orders) - 1) < 1e-12
    assert log_rnd.abs().max() > 0.5


@pytest.mark.parametrize("steps", [[0, 0, 1], [1, 0, 0], [0, 0, 0]])
def test_density_ratios_average_to_one_with_several_tokens_a_step(steps):
    """Tokens of one step are drawn independently: that is the density, and again the ratio averages to 1."""
    old, ref = (TabularPolicy(length=3, seed=seed) for seed in (4, 5))
    batch = make_rollouts(torch.cartesian_prod(*[torch.arange(3)] * 3))
    batch = replace(batch, reveal_step=torch.tensor([steps] * 27))
    x = LossInputs(torch.zeros(27, 1, 3), None, *[batch.rewards] * 2, batch.groups, batch.length)
    x = with_evidence(DmpoWDCE(), x, batch, old, ref, [steps] * 27)
    weighted = (x.sample_logps.sum(1) + log_density_ratio(DmpoWDCE(), x)).exp()
    assert abs(float(weighted.sum()) - 1) < 1e-12


@pytest.mark.parametrize("baseline", ["negative", "group_mean", "unbias", "none"])
def test_equal_rewards(baseline):
    """The negative baseline leaves exactly nothing, whatever the density ratios; the others follow those."""
    algorithm = DmpoWDCE(baseline=baseline)
    x = replace(given(algorithm), rewards=torch.tensor([0.3, 0.3, -7.1, -7.1]).double())
    out = algorithm.loss(x)
    (grad,) = torch.autograd.grad(out.loss, x.logps)
    assert bool((grad == 0).all()) == (baseline == "negative")
    assert (out.metrics["elbo_good"] == 0.0) == (baseline == "negative")
    assert (out.metrics["elbo_bad"] == 0.0) == (baseline in ("negative", "none"))


def test_even_weights_without_a_baseline_are_supervised_fine_tuning():
    algorithm = DmpoWDCE(baseline="none")
    x = given(algorithm, old=POLICY, ref=POLICY)
    x = replace(x, rewards=torch.zeros(4).double(), sample_logps=x.evidence.ref_logps.sum(1))
    assert_same_value_and_gradient(algorithm.loss(x).loss, SFT().loss(x).loss, POLICY)


def test_wddo_at_the_old_policy():
    """D = 0: loss 2 log 2, gradient -1/2 mean( G w ∇B - ∇B' ) over the halves."""
    algorithm = DmpoWDDO(reward_temperature=1.0)
    x = given(algorithm)
    x = replace(x, old_logps=x.logps.detach())
    out = algorithm.loss(x)
    assert out.loss.item() == pytest.approx(2 * math.log(2), abs=1e-14)
    assert out.metrics["log_ratio_target"] == out.metrics["log_ratio_old"] == 0.0
    weights = dmpo_weights(REWARDS, GROUPS, expected_log_rnd(algorithm, x), alpha=1.0)
    halves = [
        [sum(row) for row in token_estimates(x.logps[:, h], x.corruption.masked[:, h, -4:], [4] * 4, "elbo", False)]
        for h in (slice(0, 2), slice(2, 4))
    ]
    pull = -sum(0.5 * (2 * w * u - d) for w, u, d in zip(weights, *halves, strict=True)) / 4
    ours, theirs = (torch.autograd.grad(v, POLICY.table, retain_graph=True)[0] for v in (out.loss, pull))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and theirs.abs().max() > 1e-3


@torch.no_grad()
def population(algorithm, alpha, reward):
    """Every (completion, order) of two tokens, once: all that a uniform old policy writes, with exact ELBOs."""
    ref = TabularPolicy(length=2, seed=6)
    old = policy_of({(a, b): 1 / 9 for a in range(3) for b in range(3)}, 3, 2)
    paths = all_paths(3, 2)
    steps = [s for _, s in paths]
    batch = make_rollouts(torch.tensor([y for y, _ in paths]), rewards=[reward(y) for y, _ in paths])
    batch = replace(batch, reveal_step=torch.tensor(steps))
    draw = every_subset(len(paths), 2, prompt=2, times=2)

    @torch.enable_grad()
    def x(policy):
        zero = LossInputs(
            score_copies(policy, batch, draw),
            draw,
            batch.rewards,
            batch.rewards,
            batch.groups,
            batch.length,
            old_logps=score_copies(old, batch, draw).detach(),
        )
        return with_evidence(algorithm, zero, batch, old, ref, steps)

    target: dict[tuple[int, ...], float] = {}
    for y, s in paths:
        log_ref = float(trajectory_logp(conditionals(ref, torch.tensor(y)), s))
        target[y] = target.get(y, 0.0) + math.exp(log_ref + reward(y) / alpha) / 2
    total = sum(target.values())
    return x, {y: p / total for y, p in target.items()}


@pytest.mark.parametrize(
    "algorithm",
    [
        DmpoWDCE(reward_temperature=0.5, baseline="none"),
        DmpoWDDO(reward_temperature=0.5),
        DmpoWDDO(reward_temperature=0.5, old_likelihood="order"),
        DmpoWDDO(reward_temperature=0.5, use_independent_halves=False),
    ],
    ids=["wdce", "wddo", "wddo-order", "wddo-all copies"],
)
def test_the_target_is_the_stationary_point(algorithm):
    """At p_θ = p_ref · exp(r/α) / Z the gradient vanishes at every logit of every state, and any step away costs."""
    x, target = population(algorithm, 0.5, lambda y: 0.8 * y[0] - 0.3 * y[1] * y[0])
    policy = policy_of(target, 3, 2)
    for y, p in target.items():
        assert elbo_by_orders(conditionals(policy, torch.tensor(y))).exp().item() == pytest.approx(p, abs=1e-12)
    best = algorithm.loss(x(policy)).loss
    (grad,) = torch.autograd.grad(best, policy.table)
    assert grad.abs().max() < 1e-12
    for seed in range(3):
        other = policy_of(target, 3, 2)
        noise = torch.randn(other.table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other.table.data += 0.1 * noise
        away = algorithm.loss(x(other)).loss
        assert away.item() > best.item() + 1e-6
        assert torch.autograd.grad(away, other.table)[0].abs().max() > 1e-3


def test_the_unbias_baseline_takes_off_what_has_no_expectation():
    """Over all that the old policy writes, Σ p_θ ∇B = 0 for a consistent θ: the expected gradient stays the same."""
    algorithm = DmpoWDCE(reward_temperature=0.5, baseline="unbias")
    x, target = population(algorithm, 0.5, lambda y: 0.4 * y[1])
    for joint in (target, {y: 1 / 9 for y in target}):
        policy = policy_of(joint, 3, 2)
        free = replace(algorithm, baseline="none")
        ours, plain = (torch.autograd.grad(a.loss(x(policy)).loss, policy.table)[0] for a in (algorithm, free))
        assert torch.allclose(ours, plain, rtol=0, atol=1e-12)


# --- effective sample size -------------------------------------------------------------------------------------------


def test_effective_share_of_two_rollouts_by_hand():
    """w = 1/(1+e^{-cv}); share = 1 / (2 (w² + (1-w)²)) = 0.7 at w = (1 + √(2/1.4 - 1)) / 2."""
    w = (1 + (2 / 1.4 - 1) ** 0.5) / 2
    gap = 30.0
    exponent = torch.tensor([gap, 0.0, 1e-3, 0.0], dtype=torch.float64)
    groups = torch.tensor([7, 7, 2, 2])
    coef = ess_coefficient(exponent, groups, 1.0, 0.7)
    assert coef.tolist() == pytest.approx([math.log(w / (1 - w)) / gap] * 2 + [1.0] * 2, abs=1e-12)
    one_hot = torch.tensor([1e6, 0.0], dtype=torch.float64)  # a share of exactly 1/2 is enough for 1/2
    assert ess_coefficient(one_hot, groups[:2], 1.0, 0.5).tolist() == [1.0, 1.0]
    assert ess_coefficient(exponent, groups, 0.5, 0.0).tolist() == [0.5] * 4
    share = effective_share(torch.tensor([1.0, 0.0, 0.5, 0.5]), groups)
    assert share.tolist() == [1.0, 0.5]  # groups in the order of their labels


@pytest.mark.parametrize("target", [0.3, 0.7, 0.9])
def test_the_coefficient_is_the_largest_that_reaches_the_target(target):
    g = torch.Generator().manual_seed(3)
    groups = torch.arange(5).repeat_interleave(8)
    exponent = torch.randn(40, generator=g, dtype=torch.float64) * torch.tensor(
        [0.01, 1, 10, 100, 1000]
    ).repeat_interleave(8)

    def share(coef):
        weights = [math.exp(float(v)) for v in coef * (exponent - exponent.view(5, 8).amax(1).repeat_interleave(8))]
        return [sum(weights[i : i + 8]) ** 2 / sum(w * w for w in weights[i : i + 8]) / 8 for i in range(0, 40, 8)]

    coef = ess_coefficient(exponent, groups, 1.0, target)
    assert len(coef.view(5, 8).unique(dim=1).T) == 1  # one for each group
    assert min(share(coef)) >= target - 1e-12
    is_free = coef.view(5, 8)[:, 0] == 1
    assert is_free[0] and not is_free[3:].any()
    steps = coef * 2.0**50  # fifty bisections of [0, 1]
    assert torch.equal(steps, steps.round())
    more = share((coef * 1.001).clamp(max=1.0))
    assert all(s < target for s, free in zip(more, is_free.tolist(), strict=True) if not free)


def test_the_target_share_is_reached_in_the_loss():
    algorithm = DmpoWDCE(ess_target=0.8)
    x = given(algorithm)
    metrics = algorithm.loss(x).metrics
    assert metrics["ess"] == pytest.approx(0.8, abs=1e-9) and 0 < metrics["weight_coef"] < 0.5
    assert DmpoWDCE().loss(x).metrics["ess"] < 0.6
    weight, coef, _ = target_weights(algorithm, x.rewards, x.groups, log_density_ratio(algorithm, x))
    exponents = [r / 0.04 + d for r, d in zip(REWARDS, expected_log_rnd(algorithm, x), strict=True)]
    for b in (0, 2):
        gap = float(coef[b]) * (exponents[b] - exponents[b + 1])
        assert weight[b].item() == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-12)


# --- extremes, draws, fields -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [300.0, -300.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "algorithm",
    [
        DmpoWDCE(),
        DmpoWDCE(ess_target=0.7),
        DmpoWDCE(baseline="unbias"),
        DmpoWDDO(),
        DmpoWDDO(old_likelihood="order", ess_target=0.7),
    ],
    ids=str,
)
def test_finite_where_log_ratios_are_extreme(algorithm, dtype, shift):
    """One completion that the reference all but excludes or insists on, and one that the policy does."""
    x = given(algorithm)
    logps = x.logps.detach().to(dtype)
    logps[0] += shift * x.corruption.scored[0]
    logps.requires_grad_()
    ref = x.evidence.ref_logps.clone()
    ref[1] += shift * x.evidence.corruption.scored[1]
    x = replace(x, logps=logps, old_logps=x.old_logps.to(dtype), evidence=replace(x.evidence, ref_logps=ref))
    out = algorithm.loss(x)
    assert torch.isfinite(out.loss) and out.loss.dtype == dtype
    assert torch.isfinite(torch.autograd.grad(out.loss, logps)[0]).all()
    assert all(math.isfinite(v) for v in out.metrics.values())


@pytest.mark.parametrize("algorithm", [DmpoWDCE(), DmpoWDCE(ess_target=0.9), DmpoWDDO()], ids=str)
def test_finite_for_one_token_and_one_correct_rollout(algorithm):
    batch = make_rollouts(torch.tensor([[0], [1], [2], [0]]), rewards=[0.0, 1.0, 0.0, 0.0])
    policy = TabularPolicy(length=1, seed=0)
    x = with_evidence(algorithm, inputs(algorithm, policy, policy, policy, batch), batch, policy, policy, [[0]] * 4)
    out = algorithm.loss(x)
    assert torch.isfinite(out.loss) and out.metrics["log_rnd_std"] < 1e-12
    (grad,) = torch.autograd.grad(out.loss, x.logps)
    assert torch.isfinite(grad).all() and grad[1].sum() < 0


def test_draws_follow_the_fields():
    sizes = DmpoWDCE(num_masks=4).draw(BATCH, noise=NOISE).scored.sum(-1)
    assert (sizes.sort(1).values == torch.tensor([1, 2, 3, 4])).all()  # stratified
    free = DmpoWDCE(stratify=False).draw(BATCH, noise=NOISE).scored.sum(-1)
    assert (free.sort(1).values != torch.tensor([1, 2, 3, 4])).any()
    for algorithm in (DmpoWDCE(), DmpoWDDO()):
        first, again, second = (
            algorithm.draw(BATCH, noise=NOISE, **k).masked for k in ({}, {"iteration": 0}, {"iteration": 1})
        )
        assert torch.equal(first, again) and not torch.equal(first, second)
    pairs = DmpoWDCE(coupled=True).draw(BATCH, noise=NOISE).scored
    assert (pairs[:, 0] ^ pairs[:, 1]).all() and (pairs[:, 2] ^ pairs[:, 3]).all()
    assert not DmpoWDCE(count_positions="to_eos").draw(BATCH, noise=NOISE).scored[2, :, 1:].any()
    evidence = DmpoWDCE(likelihood="elbo", num_evidence_masks=6).draw_evidence(BATCH, NOISE)
    assert evidence.kind == "elbo" and evidence.num_masks == 6
    assert (evidence.scored[:, 0] ^ evidence.scored[:, 1]).all()
    assert DmpoWDCE().draw_evidence(BATCH, NOISE).kind == "order"


def test_halves_are_independent_and_never_complements():
    wide = make_rollouts(torch.zeros(400, 8, dtype=torch.int64), groups=list(range(400)))
    draw = DmpoWDDO(num_masks=2).draw(wide, noise=NOISE)
    first, second = draw.scored.unbind(1)
    complement = ((first ^ second).all(1)).double().mean().item()
    assert complement < 0.05  # by chance: 1/8 of the levels fit, and of those one subset in at least 8
    sizes = torch.stack([first.sum(1), second.sum(1)]).double()
    assert abs(float(torch.corrcoef(sizes)[0, 1])) < 4 / 400**0.5  # standard error of no correlation
    # both halves together are one ELBO estimate: on a constant log-probability of -1, weights add up to L
    assert torch.allclose(draw.weight.sum((1, 2)), torch.full((400,), 8.0).double(), rtol=0, atol=1e-12)
    pairs = DmpoWDDO(coupled=True).draw(wide, noise=NOISE).scored
    assert (pairs[:, 0] ^ pairs[:, 1]).all() and (pairs[:, 2] ^ pairs[:, 3]).all()
    assert (pairs[:, 0] ^ pairs[:, 2]).all(1).double().mean() < 0.05


def test_needs_follow_the_fields():
    order, bound = DmpoWDCE().needs, DmpoWDCE(likelihood="elbo").needs
    assert order.order and order.evidence is not None and not order.evidence_old and not order.old and not order.ref
    assert not bound.order and bound.evidence is not None and bound.evidence_old
    assert order.evidence(BATCH, NOISE).kind == "order"
    plain = DmpoWDCE(weights="reward").needs
    assert plain.evidence is None and not plain.order and not plain.evidence_old
    assert DmpoWDCE(weights="reward", baseline="unbias").needs.order
    assert DmpoWDCE(weights="reward", baseline="unbias").needs.evidence is None
    alone = DmpoWDCE(weights="reward", likelihood="elbo").needs
    assert alone.evidence is None and not alone.evidence_old
    assert DmpoWDCE(weights="reward", baseline="unbias", likelihood="elbo").needs.evidence_old
    for likelihood in ("order", "elbo"):
        bare = DmpoWDDO(weights="reward", likelihood=likelihood).needs
        assert bare.old and bare.evidence is None and not bare.order and not bare.evidence_old
    assert DmpoWDDO().needs.old and DmpoWDDO().needs.order and DmpoWDDO().needs.evidence is not None
    ordered = DmpoWDDO(old_likelihood="order", likelihood="elbo").needs
    assert ordered.order and ordered.evidence_old and not ordered.old
    assert not DmpoWDDO(likelihood="elbo").needs.order
    assert [DmpoWDCE(baseline=b).is_row_separable for b in ("negative", "none", "unbias")] == [True, True, False]


@pytest.mark.parametrize(
    ("algorithm", "missing", "message"),
    [
        (DmpoWDCE(), {"evidence": None}, "got no evidence;"),
        (DmpoWDCE(), {"sample_logps": None}, "got no sample_logps"),
        (DmpoWDDO(old_likelihood="order", weights="reward"), {"sample_logps": None}, "got no sample_logps"),
        (DmpoWDDO(), {"old_logps": None}, "got no old_logps"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(algorithm, missing, message):
    with pytest.raises(ValueError, match=message):
        algorithm.loss(replace(given(algorithm), **missing))
    bound = DmpoWDCE(likelihood="elbo")
    x = given(bound)
    with pytest.raises(ValueError, match=r"got no evidence\.old_logps"):
        bound.loss(replace(x, evidence=replace(x.evidence, old_logps=None)))


def test_the_logged_advantages_are_the_weights_without_density_ratios():
    rewards, groups = BATCH.rewards, BATCH.groups
    up = dmpo_weights(REWARDS, GROUPS, [0.0] * 4, alpha=1.0)
    down = dmpo_weights(REWARDS, GROUPS, [0.0] * 4, alpha=1.0, sign=-1.0)
    expected = [u - d for u, d in zip(up, down, strict=True)]
    assert DmpoWDCE(reward_temperature=1.0).advantages(rewards, groups).tolist() == pytest.approx(expected, abs=1e-15)
    unbiased = DmpoWDCE(reward_temperature=1.0, baseline="unbias").advantages(rewards, groups)
    assert unbiased.tolist() == pytest.approx([u - 0.5 for u in up], abs=1e-15)
    wddo = DmpoWDDO(reward_temperature=1.0, negative_coef=0.5).advantages(rewards, groups)
    assert wddo.tolist() == pytest.approx([2 * u - 0.5 for u in up], abs=1e-15)


def test_published_defaults():
    a, b = DmpoWDCE(), DmpoWDDO()
    for c in (a, b):
        assert (c.weights, c.reward_temperature, c.likelihood, c.num_evidence_masks) == ("target", 0.04, "order", 4)
        assert (c.weight_coef, c.ess_target, c.num_masks, c.coupled, c.stratify) == (1.0, 0.0, 4, False, True)
        assert (c.num_iterations, c.fresh_masks, c.count_positions, c.strategies) == (8, True, "all", ("groups",))
        assert c.share_masks and "share_masks" not in {f.name for f in fields(c)}
        assert type(c)(num_iterations=1, num_masks=2).num_iterations == 1
    assert (a.baseline, a.baseline_scale) == ("negative", 1.0)
    assert (b.discriminator_scale, b.negative_coef, b.use_independent_halves) == (1.0, 1.0, True)
    assert b.old_likelihood == "elbo" and b.is_row_separable


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward_temperature": 0.0}, r'algorithm.reward_temperature = 0.0: .*weights = "reward"'),
        ({"reward_temperature": -1.0}, r"algorithm.reward_temperature = -1.0: "),
        ({"reward_temperature": math.inf}, r"algorithm.reward_temperature = inf: "),
        ({"weights": "softmax"}, r"algorithm.weights = 'softmax': "),
        ({"likelihood": "mean_field"}, r"algorithm.likelihood = 'mean_field': unknown. Use one of: order, elbo"),
        ({"num_evidence_masks": 3}, r"algorithm.num_evidence_masks = 3: .*even"),
        ({"num_evidence_masks": 0}, r"algorithm.num_evidence_masks = 0: "),
        ({"weight_coef": 0.0}, r"algorithm.weight_coef = 0.0: "),
        ({"weight_coef": 1.5}, r"algorithm.weight_coef = 1.5: "),
        ({"ess_target": 1.0}, r"algorithm.ess_target = 1.0: .*Try 0.7"),
        ({"ess_target": -0.1}, r"algorithm.ess_target = -0.1: "),
        ({"num_masks": 0}, r"algorithm.num_masks = 0: "),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0: "),
        ({"count_positions": "eos"}, r"algorithm.count_positions = 'eos': "),
    ],
)
def test_bad_fields_of_both_are_refused_with_the_way_out(changed, message):
    for algorithm in (DmpoWDCE, DmpoWDDO):
        with pytest.raises(ConfigError, match=message):
            algorithm(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"baseline": "mean"}, r"algorithm.baseline = 'mean': "),
        ({"baseline_scale": -1.0}, r"algorithm.baseline_scale = -1.0: "),
        ({"baseline_scale": math.inf}, r"algorithm.baseline_scale = inf: "),
        ({"weights": "raw"}, r"algorithm.baseline = 'negative': .*group_mean"),
        ({"weights": "raw", "baseline": "constant"}, r"algorithm.baseline = 'constant': "),
        ({"weights": "raw", "baseline": "none", "ess_target": 0.7}, r"algorithm.weights = 'raw': "),
        ({"weights": "raw", "baseline": "none", "weight_coef": 0.5}, r"algorithm.weights = 'raw': "),
        ({"coupled": True, "num_masks": 3}, r"algorithm.num_masks = 3: .*even"),
    ],
)
def test_bad_fields_of_wdce_are_refused_with_the_way_out(changed, message):
    with pytest.raises(ConfigError, match=message):
        DmpoWDCE(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "raw"}, r"algorithm.weights = 'raw': unknown. Use one of: target, reward"),
        ({"old_likelihood": "path"}, r"algorithm.old_likelihood = 'path': "),
        ({"discriminator_scale": 0.0}, r"algorithm.discriminator_scale = 0.0: "),
        ({"discriminator_scale": math.inf}, r"algorithm.discriminator_scale = inf: "),
        ({"negative_coef": 0.0}, r"algorithm.negative_coef = 0.0: "),
        ({"num_masks": 3}, r"algorithm.num_masks = 3: copies come in two halves, .*multiple of 2. Try 2 or 4"),
        ({"num_masks": 6, "coupled": True}, r"two halves of complementary pairs, .*multiple of 4. Try 4 or 8"),
        ({"num_masks": 3, "coupled": True, "use_independent_halves": False}, r"come in complementary pairs, .* of 2"),
    ],
)
def test_bad_fields_of_wddo_are_refused_with_the_way_out(changed, message):
    with pytest.raises(ConfigError, match=message):
        DmpoWDDO(**changed)
    assert DmpoWDDO(num_masks=3, use_independent_halves=False).num_masks == 3


def test_a_single_rollout_has_nothing_to_be_weighed_against():
    for algorithm in (DmpoWDCE(), DmpoWDDO()):
        with pytest.raises(ConfigError, match="group_size must be >= 2"):
            algorithm.advantages(torch.ones(1), torch.zeros(1))
