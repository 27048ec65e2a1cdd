"""UniGRPO against a loop oracle, its schedule of masks over the passes, and hand-made numbers."""

import math

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import make_rollouts, unigrpo_loss
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.objectives import DiffuGRPO, UniGRPO
from unmask.types import Corruption, LossInputs


@pytest.mark.parametrize("at_old", [False, True])
@pytest.mark.parametrize("iteration", [0, 3, 7])
@pytest.mark.parametrize("count_positions", ["all", "to_eos"])
def test_loss_equals_the_loop_oracle(count_positions, iteration, at_old):
    algorithm = UniGRPO(count_positions=count_positions)
    x = inputs(algorithm, iteration=iteration, **({"old": POLICY} if at_old else {}))
    expected = unigrpo_loss(
        x.logps[:, 0],
        x.old_logps[:, 0],
        x.ref_logps[:, 0],
        x.corruption.masked[:, 0, 2:],
        x.advantages.tolist(),
        clip=0.2,
        kl_coef=0.04,
    )
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def test_loss_by_hand():
    """Row 0 masks two tokens, row 1 one. Row 0: Δ = log 1.1 and log 1.5, A = 1: gains 1.1 and 1.2, mean 1.15.
    Row 1: Δ = log 1.5, A = -2: gain -3. Loss (-1.15 + 3)/2. Reference = policy."""
    scored = torch.tensor([[[True, False, True]], [[False, True, False]]])
    logps = torch.tensor([[[-2.0, 0.0, -2.0]], [[0.0, -2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([[[1.1, 1.0, 1.5]], [[1.0, 1.5, 1.0]]], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0], dtype=torch.float64)
    draw = Corruption(scored, scored, scored.double(), "random_mask")
    old = (logps - ratio.log()).detach() * scored
    x = LossInputs(logps, draw, advantages, advantages, torch.zeros(2), torch.tensor([3, 3]), old, logps.detach())
    out = UniGRPO().loss(x)
    assert out.loss.item() == pytest.approx((-1.15 + 3) / 2, abs=1e-14)
    assert out.metrics["clip_ratio/high_mean"] == pytest.approx(1 / 3)
    assert out.metrics["ratio_max"] == pytest.approx(1.5) and out.metrics["kl_penalty"] == 0.0
    out.loss.backward()
    assert logps.grad.flatten().tolist() == pytest.approx([-1.1 / 4, 0.0, 0.0, 0.0, 3.0 / 2, 0.0], abs=1e-14)


def test_gradient_on_policy_is_the_closed_form():
    """-(1/B) Σ_i A_i mean_{k∈S} ∇l(k;S)."""
    algorithm = UniGRPO(kl_coef=0.0)
    x = inputs(algorithm, iteration=2, old=POLICY)
    total = sum(a * x.logps[b, 0, x.corruption.scored[b, 0]].mean() for b, a in enumerate(x.advantages.tolist()))
    ours, closed = (torch.autograd.grad(v, POLICY.table, retain_graph=True)[0] for v in (algorithm.loss(x).loss, total))
    assert torch.allclose(ours, -closed / 4, rtol=0, atol=1e-12) and closed.abs().max() > 1e-2


def test_last_pass_is_diffu_grpo_without_prompt_masking():
    """Everything is masked, and rows of equal length weigh the same in both means."""
    uni = UniGRPO(num_iterations=3)
    d1 = DiffuGRPO(prompt_mask_ratio=0.0, count_positions="all", clip_low=0.2, clip_high=0.2, advantage="z_score")
    x, y = inputs(uni, iteration=2), inputs(d1)
    assert torch.equal(x.corruption.masked, y.corruption.masked)
    assert_same_value_and_gradient(uni.loss(x).loss, d1.loss(y).loss, POLICY)


def sizes(algorithm, positions=100, seed=0, rows=40):
    rollouts = make_rollouts(torch.zeros(rows, positions, dtype=torch.int64))
    return torch.stack(
        [
            algorithm.draw(rollouts, noise=Noise(seed), iteration=n).scored[:, 0].sum(-1)
            for n in range(algorithm.num_iterations)
        ]
    )


def test_masked_share_rises_in_equal_steps_from_a_random_start_to_everything():
    """T = 1000, L = 1000: |S| = t_n; the start is the row's own and the same in all passes."""
    found = sizes(UniGRPO(num_iterations=5), positions=1000)
    start, last = found[0].double(), found[-1]
    assert (last == 1000).all() and len(start.unique()) > 30
    for n in range(5):
        assert ((found[n] - (start + n / 4 * (1000 - start))).abs() <= 1).all()  # the floor, and at least one
    assert abs(start.mean() / 1000 - 0.5) < 4 * (1 / 12 / 40) ** 0.5
    assert not torch.equal(sizes(UniGRPO(num_iterations=5), seed=1)[0], sizes(UniGRPO(num_iterations=5))[0])


def test_a_single_pass_masks_everything_and_none_masks_nothing():
    assert (sizes(UniGRPO(num_iterations=1)) == 100).all()
    assert (sizes(UniGRPO(num_iterations=3), positions=1) == 1).all()
    assert sizes(UniGRPO(num_iterations=2), positions=4, rows=200).min() == 1


def test_loss_of_constant_log_probabilities_does_not_depend_on_the_number_of_masked_tokens():
    """The mean over |S|: with 1/|y| a pass with few masked tokens would weigh less."""
    algorithm, losses = UniGRPO(num_iterations=4), []
    for n in range(4):
        draw = algorithm.draw(ROLLOUTS, noise=NOISE, iteration=n)
        logps = -draw.scored.double()
        advantages = algorithm.advantages(ROLLOUTS.rewards, ROLLOUTS.groups)
        x = LossInputs(
            logps, draw, advantages, ROLLOUTS.rewards, ROLLOUTS.groups, ROLLOUTS.length, 1.1 * logps, 0.9 * logps
        )
        losses.append(algorithm.loss(x).loss.item())
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-14)


def test_published_and_own_defaults():
    a = UniGRPO()
    assert (a.num_iterations, a.num_timesteps, a.clip_low, a.clip_high) == (8, 1000, 0.2, 0.2)
    assert (a.kl, a.kl_coef, a.advantage, a.count_positions, a.negative_scale) == ("k3", 0.04, "z_score", "all", 1.0)
    assert a.fresh_masks and a.share_masks and a.is_row_separable


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_timesteps": 0}, r"algorithm.num_timesteps = 0: .*Use 1000"),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0"),
        ({"clip_low": -0.1}, r"algorithm.clip_low = -0.1"),
        ({"kl_coef": math.nan}, r"algorithm.kl_coef = nan"),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ConfigError, match=message):
        UniGRPO(**fields)


def test_the_grid_may_have_one_step():
    assert (sizes(UniGRPO(num_iterations=2, num_timesteps=1), positions=3)[0] == 1).all()
