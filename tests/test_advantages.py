"""Group-relative advantages by hand and by their invariants."""

import pytest
import torch

from unmask.advantages import ADVANTAGES, group_centered, group_softmax, leave_one_out, scale_negative, z_score
from unmask.errors import ConfigError

REWARDS = torch.tensor([1.0, 0.0, 5.0, 0.0, 7.0, 3.0, 1.0], dtype=torch.float64)
GROUPS = torch.tensor([42, 42, 7, 42, 7, 7, 42])  # interleaved; group 42: 1 0 0 1, group 7: 5 7 3


def test_centred_by_hand():
    """Group 42 has mean 1/2, group 7 mean 5."""
    assert group_centered(REWARDS, GROUPS).tolist() == [0.5, -0.5, 0.0, -0.5, 2.0, -2.0, 0.5]


def test_leave_one_out_by_hand():
    """Group 42: 1 against (0+0+1)/3; group 7: 7 against (5+3)/2 = 4."""
    expected = torch.tensor([2 / 3, -2 / 3, 0.0, -2 / 3, 3.0, -3.0, 2 / 3], dtype=torch.float64)
    assert torch.allclose(leave_one_out(REWARDS, GROUPS), expected, rtol=1e-15, atol=1e-15)


def test_z_score_by_hand():
    """Unbiased: group 42 has variance 4·(1/4)/3 = 1/3, group 7 has (0+4+4)/2 = 4."""
    expected = torch.tensor([0.5, -0.5, 0.0, -0.5, 2.0, -2.0, 0.5], dtype=torch.float64)
    expected /= torch.tensor([(1 / 3) ** 0.5, 2.0]).double()[torch.tensor([0, 0, 1, 0, 1, 1, 0])] + 1e-4
    assert torch.allclose(z_score(REWARDS, GROUPS), expected, rtol=1e-7)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_invariant_and_balanced(name):
    advantage = ADVANTAGES[name]
    base = advantage(REWARDS, GROUPS)
    for group in (42, 7):
        assert abs(float(base[group == GROUPS].sum())) < 1e-12
    shifted = REWARDS + torch.where(GROUPS == 42, 3.5, -1.25)
    assert torch.allclose(advantage(shifted, GROUPS), base, rtol=0, atol=1e-14)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.allclose(advantage(REWARDS[order], GROUPS[order]), base[order], rtol=0, atol=1e-14)
    alone = advantage(REWARDS[GROUPS == 7], GROUPS[GROUPS == 7])
    assert torch.equal(alone, base[GROUPS == 7])  # other prompts in the batch have no say


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(name, value):
    rewards = torch.full((6,), value, dtype=torch.float64)
    assert ADVANTAGES[name](rewards, torch.zeros(6, dtype=torch.int64)).tolist() == [0.0] * 6


def test_leave_one_out_is_a_multiple_of_centred():
    group = torch.zeros(6, dtype=torch.int64)
    rewards = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(leave_one_out(rewards, group), group_centered(rewards, group) * 6 / 5, rtol=1e-14)


def test_z_score_ignores_the_scale_of_rewards():
    assert torch.allclose(z_score(REWARDS * 1000, GROUPS), z_score(REWARDS * 100, GROUPS), rtol=2e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_single_rollout_is_refused(name):
    with pytest.raises(ConfigError, match=r"1 of 2 prompts .* group_size must be >= 2"):
        ADVANTAGES[name](torch.ones(3), torch.tensor([0, 0, 1]))


def test_scale_negative_touches_only_negatives():
    advantages = torch.tensor([-2.0, 0.0, 3.0])
    assert scale_negative(advantages, 0.25).tolist() == [-0.5, 0.0, 3.0]
    assert torch.equal(scale_negative(advantages, 1.0), advantages)
    assert scale_negative(advantages, float("inf")).tolist() == [float("-inf"), 0.0, 3.0]  # zero is not negative


def test_group_softmax_by_hand():
    """Group 7: e^0, e^log2, e^log5 over 8; group 42: three zeros and log 3 over 6."""
    values = torch.tensor([1.0, 1.0, 1.0, 3.0, 2.0, 5.0, 1.0], dtype=torch.float64).log()
    expected = [1 / 6, 1 / 6, 1 / 8, 3 / 6, 2 / 8, 5 / 8, 1 / 6]
    for shift in (0.0, 1000.0, -1000.0):  # neither overflows nor vanishes
        assert group_softmax(values + shift, GROUPS).tolist() == pytest.approx(expected, abs=1e-12)
    apart = torch.tensor([-800.0, 800.0], dtype=torch.float32)
    assert group_softmax(apart, torch.tensor([1, 2])).tolist() == [1.0, 1.0]
