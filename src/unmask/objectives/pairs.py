"""Pieces shared by the objectives that compare rollouts of one prompt with each other, and with a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.corruption import COUNT_POSITIONS, draw_uniform_count
from unmask.objectives.policy_gradient import check_num_masks, ref_scores, require, require_choice
from unmask.types import Corruption, LossInputs, NoiseLike, Rollouts


def copy_log_ratios(x: LossInputs, name: str) -> Tensor:
    """(B, K) nats: what each masked copy adds to B - B^ref, the log-ratio of policy and reference.

    Token by token before the sum: a small difference of large sums would lose digits in float32.

    Raises: ValueError if the reference was not scored.
    """
    ref_logps, ref = ref_scores(x, name)
    weight, ref_weight = x.corruption.weight.to(x.logps), ref.weight.to(x.logps)
    return (weight * x.logps - ref_weight * ref_logps.to(x.logps)).sum(2)


def draw_elbo(
    rollouts: Rollouts,
    algorithm: Any,
    *,
    noise: NoiseLike,
) -> Corruption:
    """Copies for an ELBO estimate, by the fields num_masks, coupled, stratify and count_positions."""
    a = algorithm
    return draw_uniform_count(
        rollouts,
        a.num_masks,
        coupled=a.coupled,
        stratify=a.stratify,
        count_positions=a.count_positions,
        noise=noise,
    )


def ordered_pairs(
    groups: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:  # (N,) int64 row numbers, twice
    """All (i, j) with i ≠ j of one group: the expectation of drawing j uniformly from the others, without the draw."""
    same = groups[:, None] == groups
    first, second = same.fill_diagonal_(False).nonzero().unbind(1)
    return first, second


def mean_over_groups(
    values: Tensor,  # (N,)
    groups: Tensor,  # (N,) of the values
) -> Tensor:  # ()
    """Mean over groups of the mean within; 0, with gradient 0, if there is no value."""
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    weight: Tensor = 1 / (count[member] * len(count)).to(values)
    return (weight * values).sum()


def group_means(
    values: Tensor,  # (B, ...)
    groups: Tensor,  # (B,)
) -> Tensor:  # (B, ...)
    """Each row's mean over its group; differentiable."""
    member = (groups[:, None] == groups).to(values)  # (B, B), with equal sums over rows and columns
    means: Tensor = torch.matmul(member / member.sum(1), values)
    return means


def check_estimate(algorithm: Any) -> None:
    """Check temperature, draws and passes of an objective that estimates log-ratios to a reference.

    Raises: ConfigError naming the first field that is out of range.
    """
    a = algorithm
    require(
        0 < a.beta < float("inf"),
        "beta",
        a.beta,
        "temperature of the pull to the reference; the policy aimed at is reference · exp(reward / beta). Use a number "
        "above 0, such as 0.1.",
    )
    require(
        a.num_iterations >= 1, "num_iterations", a.num_iterations, "rollouts are used at least once. Use 1 or more."
    )
    check_num_masks(a.num_masks)
    require(
        not a.coupled or a.num_masks % 2 == 0,
        "num_masks",
        a.num_masks,
        "coupled masks come in complementary pairs, so it must be even. Try 2 or 4, or algorithm.coupled = false.",
    )
    require_choice("count_positions", a.count_positions, COUNT_POSITIONS)


@torch.no_grad()
def root_mean_square(
    values: Tensor,  # (N,)
    groups: Tensor,  # (N,) of the values
) -> float:
    """Root of the mean over groups of the mean square; 0 if there is no value."""
    return float(mean_over_groups(values.square(), groups).sqrt())
