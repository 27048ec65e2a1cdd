"""Group-relative advantages: how much better a rollout did than the others of its prompt.

All of them add up to zero within a group, ignore a constant added to its rewards, and are exactly zero where all
rewards of the group are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unmask.errors import ConfigError

_STD_FLOOR = 1e-4  # added to the standard deviation, as JustGRPO (arXiv:2601.15165) and TRL do


def group_centered(
    rewards: Tensor,  # (B,)
    groups: Tensor,  # (B,) equal for the rollouts of one prompt
) -> Tensor:  # (B,)
    """A_i = R_i - mean of the group (diffu-GRPO, arXiv:2504.12216; ESPO's paper, arXiv:2512.03759).

    Raises: ConfigError if a group has a single rollout.
    """
    return _centre(rewards, groups)[0]


def leave_one_out(
    rewards: Tensor,  # (B,)
    groups: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """A_i = R_i - mean of the others = G/(G-1) · (R_i - mean of the group) (ESPO's code, arXiv:2512.03759).

    Raises: ConfigError if a group has a single rollout.
    """
    centred, member, size = _centre(rewards, groups)
    return centred * (size / (size - 1))[member]


def z_score(
    rewards: Tensor,  # (B,)
    groups: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """A_i = (R_i - mean) / (std + 1e-4), std with divisor G-1 (GRPO; UniGRPO, arXiv:2505.15809).

    Raises: ConfigError if a group has a single rollout.
    """
    centred, member, size = _centre(rewards, groups)
    variance = _group_sum(centred.square(), member, len(size)) / (size - 1)
    return centred / (variance.sqrt() + _STD_FLOOR)[member]


def group_softmax(
    values: Tensor,  # (B,)
    groups: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """softmax of `values` over each group: positive, adding up to 1 there, unchanged by a constant added to the group.

    Source: the weights of wd1, arXiv:2507.08838.
    """
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    top = values.new_zeros(len(count)).scatter_reduce(0, member, values, "amax", include_self=False)
    scale = (values - top[member]).exp()  # the highest of a group is 1: no overflow
    return scale / _group_sum(scale, member, len(count))[member]


def group_sums(
    values: Tensor,  # (B,)
    groups: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """Each row's sum over its group."""
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    return _group_sum(values, member, len(count))[member]


def scale_negative(advantages: Tensor, factor: float) -> Tensor:
    """Negative advantages multiplied by `factor`, the others unchanged; 1 changes nothing."""
    return torch.where(advantages < 0, advantages * factor, advantages)


ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "leave_one_out": leave_one_out,
    "group_centered": group_centered,
    "z_score": z_score,
}


def _group_sum(values: Tensor, member: Tensor, num_groups: int) -> Tensor:
    """(B,) -> (num_groups,)"""
    return values.new_zeros(num_groups).scatter_add(0, member, values)


def _centre(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rewards (B,), each row's group number (B,), and group sizes (num_groups,) in the dtype of `rewards`."""
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    if (count < 2).any():
        raise ConfigError(
            f"{int((count < 2).sum())} of {len(count)} prompts have a single rollout: an advantage compares the "
            "rollouts of one prompt, so group_size must be >= 2."
        )
    size = count.to(rewards)
    # relative to the group's lowest reward, so that equal rewards give exactly zero whatever they round to
    lowest = rewards.new_zeros(len(count)).scatter_reduce(0, member, rewards, "amin", include_self=False)
    above = rewards - lowest[member]
    return above - (_group_sum(above, member, len(count)) / size)[member], member, size
