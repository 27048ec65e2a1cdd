"""coupled-GRPO against a loop oracle, closed forms, and enumeration of its subsets."""

import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import bits, coupled_scores, diffu_grpo_loss, make_rollouts, score_copies
from unmask.errors import ConfigError
from unmask.likelihood import token_estimate
from unmask.objectives import CoupledGRPO
from unmask.types import Corruption, LossInputs


def ratio_of(draw):
    """t, from the weight 1/(2t) of any token in S (or 1/(2 (1-t)) outside)."""
    inside, outside = draw.weight[:, 1].max().item(), draw.weight[:, 2].max().item()
    return 0.5 / inside if inside else 1 - 0.5 / outside


@pytest.mark.parametrize("at_old", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"count_positions": "all"}, {"share_masks": False}, {"min_mask_ratio": 0.4, "max_mask_ratio": 0.4}],
    ids=str,
)
def test_loss_equals_the_loop_oracle(fields, at_old):
    algorithm = CoupledGRPO(**{"kl_coef": 0.04, **fields})
    x = inputs(algorithm, **({"old": POLICY} if at_old else {}))
    length = ROLLOUTS.length.tolist() if algorithm.count_positions == "to_eos" else [4] * 4
    tables = []
    for name, logps in (("policy", x.logps), ("old", x.old_logps), ("ref", x.ref_logps)):
        name = "policy" if algorithm.share_masks else name
        noise = NOISE.stream(name).stream("0")
        low, high = algorithm.min_mask_ratio, algorithm.max_mask_ratio
        t = low + (high - low) * float(noise.stream("ratio").uniform(0))  # the lowest rollout index is 0
        chosen = torch.tensor(
            [
                [
                    float(noise.stream("bernoulli").uniform(int(key), int(index), 0, i)) < t
                    for i in range(logps.shape[-1])
                ]
                for key, index in zip(ROLLOUTS.prompt_key, ROLLOUTS.rollout_index, strict=True)
            ]
        )
        tables.append(coupled_scores(logps, chosen, t))
    expected = diffu_grpo_loss(*tables, x.advantages.tolist(), length, clip=0.5, kl_coef=0.04)
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def test_loss_by_hand():
    """One rollout pair of one token, t = 0.4, in S: weights 1/2 and 1/0.8. Policy reads -1 and -1, old -1.1 and -1.4:
    Δs = 0.05 + 0.5. ρ = e^0.55 > 1.5: clipped for A = 1, not for A = -1. Reference = policy."""
    scored = torch.tensor([[[True], [True], [False]]] * 2)
    weight = torch.tensor([[[0.5], [1.25], [0.0]]] * 2, dtype=torch.float64)
    logps = torch.tensor([[[-1.0], [-1.0], [0.0]]] * 2, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[[-1.1], [-1.4], [0.0]]] * 2, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    draw = Corruption(scored, scored, weight, "coupled_tokens")
    x = LossInputs(
        logps, draw, advantages, advantages, torch.zeros(2), torch.tensor([1, 1]), old, logps.detach().clone()
    )
    out = CoupledGRPO().loss(x)
    assert out.loss.item() == pytest.approx(-(1.5 - math.exp(0.55)) / 2, abs=1e-14)
    assert out.metrics["clip_ratio/high_mean"] == 0.5 and out.metrics["ratio_max"] == pytest.approx(math.exp(0.55))
    assert out.metrics["kl_penalty"] == 0.0
    out.loss.backward()
    rho = math.exp(0.55) / 2
    assert logps.grad.flatten().tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5 * rho, 1.25 * rho, 0.0], abs=1e-14)


def test_gradient_on_policy_is_the_closed_form():
    """-Σ c A_i ∇s / Σ c with leave-one-out advantages 0.75, -0.75, -2, 2 and lengths 4, 3, 1, 2."""
    algorithm = CoupledGRPO(kl_coef=0.0)
    x = inputs(algorithm, old=POLICY)
    scores = coupled_scores(x.logps, x.corruption.masked[:, 1, 2:], ratio_of(x.corruption))
    total = sum(
        a * sum(row[:n]) for a, row, n in zip([0.75, -0.75, -2.0, 2.0], scores, ROLLOUTS.length.tolist(), strict=True)
    )
    ours, closed = (torch.autograd.grad(v, POLICY.table, retain_graph=True)[0] for v in (algorithm.loss(x).loss, total))
    assert torch.allclose(ours, -closed / 10, rtol=0, atol=1e-12) and closed.abs().max() > 1e-2


def test_every_token_is_read_twice_and_once_with_all_masked():
    draw = CoupledGRPO(count_positions="all").draw(ROLLOUTS, noise=NOISE)
    assert draw.num_masks == 3 and draw.kind == "coupled_tokens"
    assert (draw.scored.sum(1) == 2).all() and draw.scored[:, 0].all()
    assert torch.equal(draw.masked[:, 1, 2:], ~draw.masked[:, 2, 2:])
    assert not draw.masked[..., :2].any()


def test_tokens_behind_the_stop_token_are_masked_but_not_read():
    draw = CoupledGRPO().draw(ROLLOUTS, noise=NOISE)
    tail = torch.arange(4) >= ROLLOUTS.length[:, None, None]
    assert not (draw.scored & tail).any() and (draw.weight * tail == 0).all()
    assert draw.masked[:, 0, 2:].all()
    assert (draw.scored.sum(1) == torch.where(tail[:, 0], 0, 2)).all()


def test_swapping_the_pair_and_its_ratio_changes_no_score():
    """(S, t) <-> (S^c, 1-t) exchanges copies 1 and 2 and with them their weights."""
    x = inputs(CoupledGRPO(count_positions="all"))
    order = torch.tensor([0, 2, 1])
    swapped = replace(
        x.corruption,
        masked=x.corruption.masked[:, order],
        scored=x.corruption.scored[:, order],
        weight=x.corruption.weight[:, order],
    )
    scores = token_estimate(x.logps, x.corruption)
    again = token_estimate(score_copies(POLICY, ROLLOUTS, swapped), swapped)
    assert torch.allclose(again, scores, rtol=0, atol=1e-14)
    t = ratio_of(x.corruption)
    assert torch.allclose(
        torch.stack(
            [torch.stack(row) for row in coupled_scores(x.logps[:, order], x.corruption.masked[:, 2, 2:], 1 - t)]
        ),
        scores,
        rtol=0,
        atol=1e-12,
    )


def test_expected_score_is_three_halves_where_the_context_does_not_matter():
    """Over all subsets of 3 tokens with the weights of a real draw: E[s] = 1.5 l, for l that knows no context."""
    rollouts = make_rollouts(torch.zeros(1, 3, dtype=torch.int64))
    t = ratio_of(CoupledGRPO().draw(rollouts, noise=NOISE))
    logp = torch.tensor([-0.3, -1.0, -2.5], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    for S in range(8):
        chosen = torch.tensor([[i in bits(S) for i in range(3)]])
        scores = torch.stack(coupled_scores(logp.expand(1, 3, 3), chosen, t)[0])
        mean += t ** len(bits(S)) * (1 - t) ** (3 - len(bits(S))) * scores
    assert torch.allclose(mean, 1.5 * logp, rtol=0, atol=1e-13)


def test_published_defaults():
    a = CoupledGRPO()
    assert (a.min_mask_ratio, a.max_mask_ratio, a.num_iterations) == (0.2, 0.8, 2)
    assert (a.clip_low, a.clip_high, a.kl, a.kl_coef) == (0.5, 0.5, "k3", 0.01)
    assert (a.advantage, a.count_positions, a.negative_scale) == ("leave_one_out", "to_eos", 1.0)
    assert a.fresh_masks and a.share_masks and a.is_row_separable


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_mask_ratio": 0.0}, r"algorithm.min_mask_ratio = 0.0: .*Try 0.2"),
        ({"min_mask_ratio": 1.0}, r"algorithm.min_mask_ratio = 1.0: "),
        ({"max_mask_ratio": 1.0}, r"algorithm.max_mask_ratio = 1.0: .*Try 0.8"),
        ({"max_mask_ratio": 0.1}, r"algorithm.max_mask_ratio = 0.1: .*not less"),
        ({"clip_high": -1.0}, r"algorithm.clip_high = -1.0"),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0"),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ConfigError, match=message):
        CoupledGRPO(**fields)
