"""The token-level loss that several objectives share, by hand. Its pieces are tested in test_objectives.py."""

import math

import pytest
import torch

from unmask.objectives import CoupledGRPO, UniGRPO
from unmask.objectives.policy_gradient import token_level_loss
from unmask.types import Corruption, LossInputs


def numbers():
    """Ratios 1.1 and 1.4 | 2 of a good row of two counted tokens and a bad row of one; a third read token does not
    count. Reference = old policy times 1/2 in the counted tokens of row 0, the policy itself in row 1."""
    scored = torch.ones(2, 1, 3, dtype=torch.bool)
    ratio = torch.tensor([[[1.1, 1.4, 50.0]], [[2.0, 0.01, 70.0]]], dtype=torch.float64)
    logps = torch.full((2, 1, 3), -2.0, dtype=torch.float64, requires_grad=True)
    ref = logps.detach().clone()
    ref[0] -= math.log(2)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    draw = Corruption(scored, scored, scored.double(), "random_mask")
    old = (logps - ratio.log()).detach()
    return LossInputs(logps, draw, advantages, advantages, torch.zeros(2), torch.tensor([3, 3]), old, ref)


COUNTED = torch.tensor([[True, True, False], [True, False, False]])
K3 = 0.5 - 1 + math.log(2)  # d = log 2 at both tokens of row 0, 0 in row 1


@pytest.mark.parametrize(
    ("per_rollout", "gain", "kl"),
    [(True, ((1.1 + 1.2) / 2 - 2) / 2, K3 / 2), (False, (1.1 + 1.2 - 2) / 3, 2 * K3 / 3)],
)
def test_means_are_over_the_counted_tokens_of_each_rollout_or_of_the_batch(per_rollout, gain, kl):
    x = numbers()
    out = token_level_loss(x, COUNTED, UniGRPO(kl_coef=0.1), per_rollout=per_rollout)
    assert out.metrics["policy_loss"] == pytest.approx(-gain, abs=1e-14)
    assert out.metrics["kl_penalty"] == pytest.approx(0.1 * kl, abs=1e-14)
    assert out.loss.item() == pytest.approx(-gain + 0.1 * kl, abs=1e-14)
    assert out.metrics["ratio_max"] == pytest.approx(2.0) and out.metrics["clip_ratio/high_mean"] == pytest.approx(
        1 / 3
    )
    out.loss.backward()
    share = [1 / 4, 1 / 4, 1 / 2] if per_rollout else [1 / 3] * 3
    pull = 0.1 * (1 - 0.5)
    expected = [share[0] * (pull - 1.1), share[1] * pull, 0.0, share[2] * 2.0, 0.0, 0.0]
    assert x.logps.grad.flatten().tolist() == pytest.approx(expected, abs=1e-14)


def test_missing_scores_are_named_after_the_objective():
    x = numbers()
    x = LossInputs(x.logps, x.corruption, x.advantages, x.rewards, x.groups, x.length)
    with pytest.raises(ValueError, match=r"CoupledGRPO.loss\(\) got no old_logps"):
        token_level_loss(x, COUNTED, CoupledGRPO(), per_rollout=False)
