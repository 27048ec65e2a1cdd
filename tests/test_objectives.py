"""Each objective against a loop implementation, closed forms and hand-made numbers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, OLD, POLICY, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import (
    conditionals,
    diffu_grpo_loss,
    elbo_dp,
    espo_loss,
    expectation_of_law,
    law_of_draws,
    make_rollouts,
    score_copies,
    token_estimates,
)
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.objectives import ESPO, GDPO, SFT, CoupledGRPO, DiffuGRPO, UniGRPO
from unmask.objectives.policy_gradient import clipped_surrogate, importance_ratio, kl_estimate, ratio_metrics
from unmask.types import Corruption, LossInputs


def oracle_estimates(x, algorithm, likelihood, coupled):
    """Token estimates of policy, old and reference, and the lengths, by loops."""
    positions = x.logps.shape[-1]
    length = x.length.tolist() if algorithm.count_positions == "to_eos" else [positions] * len(x)
    tables = []
    for logps, draw in (
        (x.logps, x.corruption),
        (x.old_logps, x.old_corruption or x.corruption),
        (x.ref_logps, x.ref_corruption or x.corruption),
    ):
        tables.append(token_estimates(logps, draw.masked[..., -positions:], length, likelihood, coupled))
    return tables, length


ESPO_VARIANTS = [
    {"likelihood": likelihood, "level": level, "kl": kl}
    for likelihood, level, kl in itertools.product(("elbo", "mean_field"), ("sequence", "token"), ("k1", "k2", "k3"))
] + [
    {"coupled": False, "num_masks": 3},
    {"coupled": False, "num_masks": 3, "level": "token", "count_positions": "to_eos"},
    {"kl_scale": "none"},
    {"kl_scale": "none", "level": "token"},
    {"ratio_scale": "none"},
    {"ratio_scale": "none", "count_positions": "to_eos"},
    {"count_positions": "to_eos"},
    {"count_positions": "to_eos", "level": "token", "likelihood": "mean_field"},
    {"clip_low": 0.05, "clip_high": 0.4},
    {"share_masks": False},
    {"negative_scale": 0.5, "advantage": "z_score"},
    {"likelihood": "mean_field", "prompt_mask_ratio": 0.5, "level": "token"},
]


@pytest.mark.parametrize("at_old", [False, True])
@pytest.mark.parametrize("fields", ESPO_VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_espo_equals_the_loop_oracle(fields, at_old):
    algorithm = ESPO(**{"kl_coef": 0.1, **fields})
    x = inputs(algorithm, old=POLICY if at_old else OLD)
    tables, length = oracle_estimates(x, algorithm, algorithm.likelihood, algorithm.coupled)
    expected = espo_loss(
        *tables,
        x.advantages.tolist(),
        length,
        level=algorithm.level,
        clip=(algorithm.clip_low, algorithm.clip_high),
        kl=algorithm.kl,
        kl_coef=algorithm.kl_coef,
        kl_scale=algorithm.kl_scale,
        ratio_scale=algorithm.ratio_scale,
    )
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


@pytest.mark.parametrize("at_old", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_masks": 3}, {"count_positions": "all"}, {"share_masks": False}, {"prompt_mask_ratio": 0.0}],
    ids=str,
)
def test_diffu_grpo_equals_the_loop_oracle(fields, at_old):
    algorithm = DiffuGRPO(**fields)
    x = inputs(algorithm, old=POLICY if at_old else OLD)
    tables, length = oracle_estimates(x, algorithm, "mean_field", False)
    expected = diffu_grpo_loss(*tables, x.advantages.tolist(), length, clip=0.5, kl_coef=0.04)
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def law_as_corruption(row_copies, weights, positions):
    """One draw out of the enumerated law, the same for every row."""
    scored = torch.tensor([[bool(S >> i & 1) for i in range(positions)] for S in row_copies])
    weight = torch.tensor(weights, dtype=torch.float64)[:, None] * scored
    batch = len(ROLLOUTS)
    masked = torch.cat([torch.zeros(len(row_copies), 2, dtype=torch.bool), scored], -1)
    return Corruption(*(t.expand(batch, *t.shape) for t in (masked, scored, weight)), "elbo")


def test_expected_espo_gradient_on_policy_is_that_of_the_exact_elbo():
    """E over all coupled draws of the gradient at θ = old is -(1/(B L)) Σ_i A_i ∇B_i, with B_i by recursion."""
    algorithm, positions = ESPO(num_masks=2, kl_coef=0.0), 4
    advantages = algorithm.advantages(ROLLOUTS.rewards, ROLLOUTS.groups)
    mean = torch.zeros_like(POLICY.table)
    for copies, (probability, weights) in law_of_draws(positions, coupled=True).items():
        draw = law_as_corruption(copies, weights, positions)
        logps = score_copies(POLICY, ROLLOUTS, draw)
        x = LossInputs(
            logps, draw, advantages, ROLLOUTS.rewards, ROLLOUTS.groups, ROLLOUTS.length, old_logps=logps.detach()
        )
        mean += probability * torch.autograd.grad(algorithm.loss(x).loss, POLICY.table)[0]
    exact = sum(
        a * elbo_dp(conditionals(POLICY, y)) for a, y in zip(advantages.tolist(), ROLLOUTS.completion_ids, strict=True)
    )
    closed_form = torch.autograd.grad(-exact / (len(ROLLOUTS) * positions), POLICY.table)[0]
    assert closed_form.abs().max() > 1e-2
    assert torch.allclose(mean, closed_form, rtol=0, atol=1e-10)


def test_diffu_grpo_gradient_on_policy_is_the_closed_form():
    """-Σ c A_i ∇l / Σ c, from the conditionals of the fully masked canvas; lengths 4, 3, 1, 2: Σ c = 10."""
    algorithm = DiffuGRPO(kl_coef=0.0, prompt_mask_ratio=0.0)
    x = inputs(algorithm, old=POLICY)
    total = sum(
        a * conditionals(POLICY, y)[-1, :n].sum()
        for a, y, n in zip([0.375, -0.375, -1.0, 1.0], ROLLOUTS.completion_ids, [4, 3, 1, 2], strict=True)
    )
    ours, closed_form = (torch.autograd.grad(v, POLICY.table)[0] for v in (algorithm.loss(x).loss, -total / 10))
    assert torch.allclose(ours, closed_form, rtol=0, atol=1e-12)


def test_espo_by_hand():
    """Two rows, L = 2, K = 2, S = {0}: both weights are ½·(2+1)/1 = 1.5. Policy logps (-1, -1), old (-1.2, -1.2):
    ΔB = 2·1.5·0.2 = 0.6, ρ = e^0.3 = 1.3499. A = +1: clipped to 1.2; A = -1: not clipped. Policy loss
    -(1.2 - e^0.3)/2. Reference (-1, -2): ΔB = 1.5, KL = ½·1.5²/2 = 0.5625, times 0.01."""
    scored = torch.tensor([[[True, False], [False, True]]] * 2)
    draw = Corruption(scored, scored, 1.5 * scored.double(), "elbo")
    logps = torch.tensor([[[-1.0, 0.0], [0.0, -1.0]]] * 2, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[[-1.2, 0.0], [0.0, -1.2]]] * 2, dtype=torch.float64)
    ref = torch.tensor([[[-1.0, 0.0], [0.0, -2.0]]] * 2, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x = LossInputs(logps, draw, advantages, advantages, torch.zeros(2), torch.tensor([2, 2]), old, ref)
    out = ESPO(num_masks=2, kl_coef=0.01).loss(x)
    policy_loss = -(1.2 - math.exp(0.3)) / 2
    assert abs(out.loss.item() - (policy_loss + 0.005625)) < 1e-12
    expected = {
        "policy_loss": policy_loss,
        "kl_penalty": 0.005625,
        "ratio_max": math.exp(0.3),
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.5,
        "clip_ratio/region_mean": 0.5,
        "log_ratio_clamped": 0.0,
    }
    assert out.metrics == pytest.approx(expected, abs=1e-12)
    out.loss.backward()
    # row 0 is clipped and keeps only its KL: 0.01·(ΔB/L)·1.5/B = 0.01·0.75·1.5/2; row 1 adds ρ·1.5/L/B
    kl_part = 0.01 * 0.75 * 1.5 / 2
    assert logps.grad[0, 0, 0].item() == pytest.approx(kl_part, abs=1e-12)
    assert logps.grad[1, 1, 1].item() == pytest.approx(kl_part + math.exp(0.3) * 1.5 / 4, abs=1e-12)


def test_diffu_grpo_by_hand():
    """Lengths 2 and 1, so three tokens count. Policy -1 everywhere, old -1 - log 2: ρ = 2 > 1.5.
    A = 1: gain 1.5 for both tokens; A = -1: -2. Reference -1 + log 2: d = -log 2, k3 = 2 - 1 - log 2."""
    scored = torch.tensor([[[True, True]], [[True, False]]])
    draw = Corruption(torch.ones(2, 1, 2).bool(), scored, scored.double(), "mean_field")
    counted = scored.double()
    logps = -counted
    x = LossInputs(
        logps.requires_grad_(),
        draw,
        torch.tensor([1.0, -1.0]).double(),
        torch.zeros(2),
        torch.zeros(2),
        torch.tensor([2, 1]),
        (logps - math.log(2) * counted).detach(),
        (logps + math.log(2) * counted).detach(),
    )
    out = DiffuGRPO().loss(x)
    assert out.loss.item() == pytest.approx(-(1.5 + 1.5 - 2) / 3 + 0.04 * (1 - math.log(2)), abs=1e-12)
    assert out.metrics["clip_ratio/high_mean"] == pytest.approx(2 / 3)
    assert out.metrics["clip_ratio/low_mean"] == 0.0 and out.metrics["ratio_max"] == pytest.approx(2.0)
    out.loss.backward()
    # token of row 1: ρ/3 from the surrogate, 0.04·(1 - e^{-d})/3 = -0.04/3 from the KL; row 0 has the KL alone
    assert logps.grad.flatten().tolist() == pytest.approx([-0.04 / 3, -0.04 / 3, 2 / 3 - 0.04 / 3, 0.0], abs=1e-12)


@pytest.mark.parametrize("algorithm", [ESPO, DiffuGRPO, GDPO, CoupledGRPO, UniGRPO])
def test_clip_bounds_reach_loss_and_metrics_in_their_order(algorithm):
    """One token a row, clip(ρ) = [0.9, 1.9]. A = 1, ρ = 1.5: inside. A = -1, ρ = 0.7: min(-0.7, -0.9)."""
    scored = torch.ones(2, 1, 1, dtype=torch.bool)
    logps = torch.tensor([math.log(1.5), math.log(0.7)], dtype=torch.float64).view(2, 1, 1) - 3
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    draw = Corruption(scored, scored, scored.double(), "elbo")
    old = torch.full_like(logps, -3.0)
    x = LossInputs(logps, draw, advantages, advantages, torch.zeros(2), torch.tensor([1, 1]), old)
    out = algorithm(clip_low=0.1, clip_high=0.9, kl_coef=0.0).loss(x)
    assert out.loss.item() == pytest.approx(-(1.5 - 0.9) / 2, abs=1e-12)
    assert (out.metrics["clip_ratio/low_mean"], out.metrics["clip_ratio/high_mean"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    "algorithm", [DiffuGRPO(), ESPO(level="token", likelihood="mean_field", count_positions="to_eos")], ids=repr
)
def test_positions_behind_the_stop_token_do_not_count_even_where_they_were_read(algorithm):
    x = inputs(replace(algorithm, count_positions="all"))
    assert x.corruption.scored.all()
    tail = torch.arange(4) >= x.length[:, None, None]
    first = algorithm.loss(x)
    for shift in (-2.0, 2.0):
        moved = algorithm.loss(replace(x, logps=x.logps + shift * tail))
        assert torch.equal(moved.loss, first.loss) and moved.metrics == first.metrics


def test_mean_field_ignores_the_rest_of_the_completion():
    """Other tokens at the other positions leave a position's log-probability as it is; under the ELBO they do not."""
    other = make_rollouts(ROLLOUTS.completion_ids.clone(), groups=[0, 0, 1, 1])
    other.completion_ids[:, 1:] = (other.completion_ids[:, 1:] + 1) % 3
    for algorithm, is_same in ((DiffuGRPO(count_positions="all"), True), (ESPO(), False)):
        draw = algorithm.draw(other, noise=NOISE)
        first = [score_copies(POLICY, r, draw)[..., 0] for r in (ROLLOUTS, other)]
        assert torch.equal(*first) == is_same


def test_prompt_masks_are_new_in_each_pass_only_where_prompts_are_masked():
    plain, masking = DiffuGRPO(prompt_mask_ratio=0.0), DiffuGRPO(prompt_mask_ratio=0.5)
    for algorithm, is_same in ((plain, True), (masking, False)):
        draws = [algorithm.draw(ROLLOUTS, noise=NOISE.stream(f"pass {n}")) for n in range(2)]
        assert torch.equal(draws[0].masked, draws[1].masked) == is_same


def test_draws_follow_the_fields():
    assert ESPO(num_masks=6).draw(ROLLOUTS, noise=NOISE).num_masks == 6
    single = ESPO(num_masks=3, coupled=False).draw(ROLLOUTS, noise=NOISE)
    assert single.num_masks == 3 and (single.scored.sum(-1) >= 1).all()
    for algorithm, copies in (
        (ESPO(likelihood="mean_field"), 1),  # without prompt masking further copies would be the same
        (ESPO(likelihood="mean_field", num_masks=3, prompt_mask_ratio=0.5), 3),
        (DiffuGRPO(), 1),
        (DiffuGRPO(num_masks=5), 5),
        (DiffuGRPO(num_masks=5, prompt_mask_ratio=0.0), 1),
    ):
        draw = algorithm.draw(ROLLOUTS, noise=NOISE)
        assert draw.kind == "mean_field" and draw.num_masks == copies and draw.masked[..., 2:].all()
    lengths = DiffuGRPO().draw(ROLLOUTS, noise=NOISE).scored.sum(-1).flatten().tolist()
    assert lengths == [4, 3, 1, 2]
    assert not torch.equal(
        ESPO().draw(ROLLOUTS, noise=NOISE).masked, ESPO(stratify=False).draw(ROLLOUTS, noise=NOISE).masked
    )


def test_published_defaults():
    espo, d1 = ESPO(), DiffuGRPO()
    assert (espo.num_masks, espo.num_iterations, espo.kl, espo.kl_coef, espo.kl_scale) == (
        4,
        8,
        "k2",
        1e-3,
        "per_length",
    )
    assert (espo.clip_low, espo.clip_high, espo.advantage, espo.count_positions) == (0.2, 0.2, "leave_one_out", "all")
    assert (d1.num_iterations, d1.kl, d1.kl_coef, d1.clip_low, d1.clip_high) == (12, "k3", 0.04, 0.5, 0.5)
    assert (d1.prompt_mask_ratio, d1.advantage, d1.count_positions) == (0.15, "group_centered", "to_eos")
    assert espo.negative_scale == d1.negative_scale == 1.0
    assert (SFT().num_masks, SFT().num_iterations) == (1, 1)
    for algorithm in (espo, d1, SFT()):
        assert algorithm.fresh_masks and algorithm.share_masks and algorithm.is_row_separable


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


def test_expected_sft_loss_is_the_negative_exact_elbo_per_token():
    """Over the enumerated law of one uncoupled draw, value and gradient."""
    positions, mean = 4, 0.0
    for copies, (probability, weights) in law_of_draws(positions, coupled=False).items():
        draw = law_as_corruption(copies, weights, positions)
        logps = score_copies(POLICY, ROLLOUTS, draw)
        zeros = torch.zeros(len(ROLLOUTS))
        mean = mean + probability * SFT().loss(LossInputs(logps, draw, zeros, zeros, zeros, ROLLOUTS.length)).loss
    exact = -sum(elbo_dp(conditionals(POLICY, y)) for y in ROLLOUTS.completion_ids) / (len(ROLLOUTS) * positions)
    assert_same_value_and_gradient(mean, exact, POLICY)


def test_sft_needs_nothing_and_counts_the_padding():
    algorithm = SFT(num_masks=4)
    assert not (algorithm.needs.old or algorithm.needs.ref)
    assert algorithm.advantages(ROLLOUTS.rewards, ROLLOUTS.groups).tolist() == [0.0] * 4
    for fields in ({}, {"stratify_rows": False}):
        draw = SFT(num_masks=4, **fields).draw(ROLLOUTS, noise=NOISE)
        assert draw.kind == "elbo" and draw.scored[2, :, 1:].any()  # row 2 stops after one token
    # four rows of one copy each, four levels: spread over the rows, every count occurs once in the batch
    spread = [SFT().draw(ROLLOUTS, noise=Noise(seed)).scored.sum(-1).flatten().tolist() for seed in range(10)]
    apart = [
        SFT(stratify_rows=False).draw(ROLLOUTS, noise=Noise(s)).scored.sum(-1).flatten().tolist() for s in range(10)
    ]
    assert all(sorted(counts) == [1, 2, 3, 4] for counts in spread)
    assert not all(sorted(counts) == [1, 2, 3, 4] for counts in apart)
    draw = algorithm.draw(ROLLOUTS, noise=NOISE)
    logps = score_copies(POLICY, ROLLOUTS, draw)
    zeros = torch.zeros(4)
    out = algorithm.loss(LossInputs(logps, draw, zeros, zeros, zeros, ROLLOUTS.length))
    assert out.metrics["elbo_per_token"] == pytest.approx(-out.loss.item())
    assert out.metrics["elbo"] == pytest.approx(-4 * out.loss.item())


# --- shared pieces ----------------------------------------------------------------------------------------------------


def test_expected_gradients_of_the_kl_estimators():
    """Under samples from π: k1 has none, k2 that of KL(π ‖ ref), k3 that of KL(ref ‖ π), by summing over outcomes."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    forward, backward = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    for kind, divergence in (("k1", 0 * logits.sum()), ("k2", forward), ("k3", backward)):
        expected_estimate = (logp.exp().detach() * kl_estimate(logp - logq, kind)).sum()
        ours, exact = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (expected_estimate, divergence))
        assert torch.allclose(ours, exact, rtol=0, atol=1e-12), kind


def test_expected_value_of_k1_and_k3_is_the_kl():
    generator = torch.Generator().manual_seed(1)
    logp, logq = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    kl = float((logp.exp() * (logp - logq)).sum())
    for kind in ("k1", "k3"):
        assert abs(float((logp.exp() * kl_estimate(logp - logq, kind)).sum()) - kl) < 1e-12
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl_estimate(logp, "k4")


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_terms_vanish_with_their_gradient_at_the_reference(kind):
    d = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = kl_estimate(d, kind).sum()
    assert value.item() == 0.0
    assert torch.autograd.grad(value, d)[0].tolist() == [0.0] * 3


def test_kl_terms_are_never_negative_and_pull_towards_the_reference():
    d = torch.linspace(-300, 300, 601, dtype=torch.float64, requires_grad=True)
    for kind in ("k2", "k3"):
        value = kl_estimate(d, kind)
        assert (value >= 0).all() and torch.isfinite(value).all()
        (gradient,) = torch.autograd.grad(value.sum(), d)
        assert (gradient * d >= 0).all()


@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("clip", [0.0, 4e-4, 0.2, 0.5])
def test_surrogate_gradient_at_ratio_one_is_the_advantage(advantage, clip):
    log_ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    gain = clipped_surrogate(log_ratio, torch.tensor([advantage]).double(), clip, clip)
    assert gain.item() == advantage
    assert torch.autograd.grad(gain.sum(), log_ratio)[0].item() == advantage


def test_surrogate_stops_on_the_favourable_side_only():
    """ρ = 2, ½ for A = ±1, clip 0.2: gradients 0 (gain above 1.2), ½ | -2, 0 (loss below 0.8)."""
    log_ratio = torch.tensor([2.0, 0.5, 2.0, 0.5], dtype=torch.float64).log().requires_grad_()
    gain = clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), 0.2, 0.2)
    assert gain.tolist() == pytest.approx([1.2, 0.5, -2.0, -0.8], abs=1e-15)
    assert torch.autograd.grad(gain.sum(), log_ratio)[0].tolist() == pytest.approx([0.0, 0.5, -2.0, 0.0], abs=1e-15)


def test_ratio_metrics_by_hand():
    """A = 1: ρ = 2 (high), e^-20 (clamped from -25 nats; below the bound, but A > 0) and ½ (likewise).
    A = -1: ½ (low) and 2 (above the bound, but A < 0). The uncounted 300 nats are not seen."""
    log_ratio = torch.tensor([[math.log(2), -25.0], [-math.log(2), math.log(2)], [300.0, -math.log(2)]]).double()
    counted = torch.tensor([[True, True], [True, True], [False, True]])
    advantages = torch.tensor([[1.0], [-1.0], [1.0]]).double()
    metrics = ratio_metrics(log_ratio, advantages, counted, 0.2, 0.2)
    assert metrics == pytest.approx(
        {
            "ratio_max": 2.0,
            "clip_ratio/low_mean": 0.2,
            "clip_ratio/high_mean": 0.2,
            "clip_ratio/region_mean": 0.4,
            "log_ratio_clamped": 0.2,
        }
    )
    nowhere = ratio_metrics(log_ratio, advantages, torch.zeros_like(counted), 0.2, 0.2)
    assert nowhere == dict.fromkeys(metrics, 0.0)
    assert importance_ratio(torch.tensor([-300.0, 300.0])).tolist() == pytest.approx([math.exp(-20), math.exp(20)])


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clip", "expected"),
    [
        (0.0, -1.0, 0.0, {}),  # at the bound, not beyond it
        (0.0, 1.0, 0.0, {}),
        (math.log(0.9), -1.0, 0.2, {}),
        (math.log(1.1), 1.0, 0.2, {}),
        (math.log(0.7), -1.0, 0.2, {"clip_ratio/low_mean": 1.0, "clip_ratio/region_mean": 1.0}),
        (math.log(1.3), 1.0, 0.2, {"clip_ratio/high_mean": 1.0, "clip_ratio/region_mean": 1.0}),
        (math.log(0.5), 0.0, 0.2, {}),  # no gradient to stop
        (math.log(2.0), 0.0, 0.2, {}),
        (20.0, 0.0, 0.2, {}),
        (-20.5, 0.0, 0.2, {"log_ratio_clamped": 1.0}),
    ],
)
def test_ratio_metrics_of_one_counted_ratio(log_ratio, advantage, clip, expected):
    """Beside it one that does not count, and lies beyond both clip range and clamp."""
    for other in (-30.0, 30.0):
        cells = torch.tensor([[log_ratio, other]], dtype=torch.float64)
        advantages = torch.tensor([[advantage, math.copysign(1.0, other)]], dtype=torch.float64)
        metrics = ratio_metrics(cells, advantages, torch.tensor([[True, False]]), clip, clip)
        assert metrics.pop("ratio_max") == pytest.approx(math.exp(max(-20.0, log_ratio)), rel=1e-12)
        assert metrics == {**dict.fromkeys(metrics, 0.0), **expected}


@pytest.mark.parametrize("algorithm", [ESPO, DiffuGRPO, GDPO, CoupledGRPO, UniGRPO])
def test_fields_may_reach_their_limits(algorithm):
    for fields in (
        {"clip_low": 0.0, "clip_high": 0.0},
        {"clip_low": 1.0},
        {"kl_coef": 0.0},
        {"negative_scale": 0.0},
        {"num_iterations": 1},
    ):
        built = algorithm(**fields)
        assert {name: getattr(built, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ESPO(num_masks=3), r"algorithm.num_masks = 3: espo draws .* even. Try 2 or 4"),
        (lambda: ESPO(num_masks=0, coupled=False), r"algorithm.num_masks = 0: .* 1 or more"),
        (lambda: ESPO(likelihood="eubo"), r"algorithm.likelihood = 'eubo': unknown. Use one of: elbo, mean_field"),
        (lambda: ESPO(level="word"), r"algorithm.level = 'word': .*sequence, token"),
        (lambda: ESPO(kl="k4"), r"algorithm.kl = 'k4': .*k1, k2, k3"),
        (lambda: ESPO(kl_scale="length"), r"algorithm.kl_scale = 'length': .*per_length, none"),
        (lambda: ESPO(ratio_scale="length"), r"algorithm.ratio_scale = 'length': .*per_length, none"),
        (lambda: ESPO(ratio_scale="none", level="token"), r"algorithm.ratio_scale = 'none': .*level = \"sequence\""),
        (lambda: ESPO(advantage="mean"), r"algorithm.advantage = 'mean': .*leave_one_out, group_centered, z_score"),
        (lambda: ESPO(count_positions="eos"), r"algorithm.count_positions = 'eos': .*all, to_eos"),
        (lambda: ESPO(prompt_mask_ratio=0.15), r"algorithm.prompt_mask_ratio = 0.15: .*mean_field"),
        (lambda: ESPO(num_iterations=0), r"algorithm.num_iterations = 0: .*1 or more"),
        (lambda: ESPO(clip_low=1.5), r"algorithm.clip_low = 1.5: .*0 to 1"),
        (lambda: ESPO(clip_high=-0.1), r"algorithm.clip_high = -0.1: .*0 or more"),
        (lambda: ESPO(kl_coef=float("nan")), r"algorithm.kl_coef = nan: "),
        (lambda: DiffuGRPO(kl_coef=-1.0), r"algorithm.kl_coef = -1.0: "),
        (lambda: DiffuGRPO(kl_coef=float("inf")), r"algorithm.kl_coef = inf: "),
        (lambda: DiffuGRPO(negative_scale=-1.0), r"algorithm.negative_scale = -1.0: "),
        (lambda: DiffuGRPO(negative_scale=float("inf")), r"algorithm.negative_scale = inf: "),
        (lambda: DiffuGRPO(prompt_mask_ratio=1.0), r"algorithm.prompt_mask_ratio = 1.0: .*Try 0.15"),
        (lambda: DiffuGRPO(num_masks=0), r"algorithm.num_masks = 0: "),
        (
            lambda: ESPO(likelihood="mean_field", prompt_mask_ratio=1.0),
            r"algorithm.prompt_mask_ratio = 1.0: .*Try 0.15",
        ),
        (lambda: SFT(num_masks=0), r"algorithm.num_masks = 0: "),
        (lambda: SFT(num_iterations=0), r"algorithm.num_iterations = 0: "),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_coupling_is_required_only_where_pairs_are_drawn():
    ESPO(num_masks=3, coupled=False)
    ESPO(num_masks=3, likelihood="mean_field")


def test_uncoupled_law_reaches_the_same_elbo_as_coupled():
    table = conditionals(POLICY, ROLLOUTS.completion_ids[0]).detach()
    values = [expectation_of_law(table, law_of_draws(4, coupled=c)) for c in (True, False)]
    assert abs(float(values[0] - values[1])) < 1e-10


def test_k3_pulls_back_with_its_full_gradient_however_far_the_policy_is_above_the_reference():
    # 1 - e^{-d}, which no overflow threatens on this side
    d = torch.tensor([0.5, 21.0, 40.0, 300.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(kl_estimate(d, "k3").sum(), d)
    assert torch.allclose(gradient, 1 - torch.exp(-d.detach()), rtol=0, atol=1e-15)
    low = torch.tensor([-300.0], dtype=torch.float32, requires_grad=True)
    assert torch.isfinite(kl_estimate(low, "k3")).all()


def test_supervised_draws_are_those_of_the_first_pass_unless_told_otherwise():
    first, second = (SFT().draw(ROLLOUTS, noise=NOISE, iteration=i).masked for i in (0, 1))
    assert torch.equal(SFT().draw(ROLLOUTS, noise=NOISE).masked, first) and not torch.equal(first, second)
