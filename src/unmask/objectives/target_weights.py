"""Weights that make completions of the old policy samples of a target p_* ∝ p_ref · exp(r/α), arXiv:2510.08233.

Shared by the losses of dmpo.py, whose fields `algorithm` stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.advantages import group_centered, group_softmax
from unmask.corruption import COUNT_POSITIONS, counted_positions, draw_uniform_count, sequence_length
from unmask.corruption_steps import draw_trajectory
from unmask.likelihood import token_estimate
from unmask.objectives.policy_gradient import check_num_masks, require, require_choice
from unmask.types import Corruption, Evidence, LossInputs, Needs, NoiseLike, Rollouts

WEIGHTS = ("target", "reward", "raw")
LIKELIHOODS = ("order", "elbo")
DENSITIES = ("untempered", "tempered")
_BISECTIONS = 50  # 2^-50 of the range: the last bits of a float64


def check_target_weights(algorithm: Any, weights: Sequence[str]) -> None:
    """Check the fields that both losses have. Raises: ConfigError naming the first that is out of range."""
    a = algorithm
    require_choice("weights", a.weights, weights)
    require(
        0 < a.reward_temperature < float("inf"),
        "reward_temperature",
        a.reward_temperature,
        'α divides rewards. Use a number above 0; what the published code calls 0 is weights = "reward".',
    )
    require_choice("likelihood", a.likelihood, LIKELIHOODS)
    require_choice("density", a.density, DENSITIES)
    require_choice("count_positions", a.count_positions, COUNT_POSITIONS)
    require(
        a.num_evidence_masks >= 2 and a.num_evidence_masks % 2 == 0,
        "num_evidence_masks",
        a.num_evidence_masks,
        "copies of an ELBO, in complementary pairs. Use an even number; 4 is the published setting.",
    )
    require(0 < a.weight_coef <= 1, "weight_coef", a.weight_coef, "flattens the weights. Use a number in (0, 1].")
    require(
        0 <= a.ess_target < 1,
        "ess_target",
        a.ess_target,
        "a share of the group below 1, which equal weights alone reach. Try 0.7, or 0 for none.",
    )
    check_num_masks(a.num_masks)
    require(
        a.num_iterations >= 1, "num_iterations", a.num_iterations, "rollouts are used at least once. Use 1 or more."
    )


def evidence_needs(algorithm: Any, *, is_old_used: bool) -> Needs:
    """What ℓ asks for, and with `is_old_used` log p_old by itself."""
    a, has_target = algorithm, algorithm.weights == "target"
    is_order = a.likelihood == "order"
    is_read = has_target or (is_old_used and not is_order)
    return Needs(
        evidence=a.draw_evidence if is_read else None,
        evidence_old=is_read and not is_order,
        order=is_order and (has_target or is_old_used),
        drawn=a.density == "tempered",
    )


def check_density(algorithm: Any, *, is_read: bool) -> None:
    """Raises: ConfigError for "tempered" unless `is_read`: log p_old is read, and everywhere along the order."""
    require(
        is_read or algorithm.density == "untempered",
        "density",
        algorithm.density,
        "is the density of the drawn tokens along the order, and log p_old is not read from that alone. Use "
        'algorithm.likelihood = "order" (in dmpo_wddo algorithm.old_likelihood = "order" too), or "untempered".',
    )


def draw_replicates(algorithm: Any, rollouts: Rollouts, num_masks: int, noise: NoiseLike) -> Corruption:
    """Copies for an ELBO estimate of the policy, by the algorithm's fields."""
    return draw_uniform_count(
        rollouts,
        num_masks,
        coupled=algorithm.coupled,
        stratify=algorithm.stratify,
        count_positions=algorithm.count_positions,
        noise=noise,
    )


def draw_evidence(algorithm: Any, rollouts: Rollouts, noise: NoiseLike) -> Corruption:
    """The states along the reveal order, or coupled subsets that both models read."""
    if algorithm.likelihood == "order":
        return draw_trajectory(rollouts, count_positions=algorithm.count_positions)
    return draw_uniform_count(
        rollouts,
        algorithm.num_evidence_masks,
        coupled=True,
        count_positions=algorithm.count_positions,
        noise=noise,
    )


def evidence_of(x: LossInputs) -> Evidence:
    """Raises: ValueError if there is none."""
    if x.evidence is None:
        raise ValueError("DMPO's loss() got no evidence; score the reference on what draw_evidence() gives.")
    return x.evidence


def old_tokens(
    x: LossInputs,
    likelihood: str,
    count_positions: str,
    density: str,
) -> Tensor:  # (B, L) float64, nats
    """Each position's share of log p_old(y): the sampler's own numbers for "order", the old ELBO's for "elbo".

    Of the sampler's numbers those of temperature 1 ("untempered"), or of the law that it drew from ("tempered").

    Raises: ValueError if what it is read from is missing.
    """
    if likelihood == "elbo":
        evidence = evidence_of(x)
        if evidence.old_logps is None:
            raise ValueError("DMPO's loss() got no evidence.old_logps; score the old policy on the same copies.")
        return token_estimate(evidence.old_logps.double(), evidence.corruption)
    name = "drawn_logps" if density == "tempered" else "sample_logps"
    logps: Tensor | None = getattr(x, name)
    if logps is None:
        raise ValueError(f"DMPO's loss() got no {name}; pass the sampler's log-probabilities.")
    positions = x.logps.shape[-1]
    counted = counted_positions(sequence_length(x.length, positions, count_positions), positions)
    return logps.double() * counted


def log_density_ratio(
    algorithm: Any,
    x: LossInputs,
) -> Tensor:  # (B,) float64, nats
    """ℓ = log p_ref(y) - log p_old(y), zero where the weights do not ask for it."""
    if algorithm.weights != "target":
        return x.rewards.new_zeros(len(x), dtype=torch.float64)
    evidence = evidence_of(x)
    ref = token_estimate(evidence.ref_logps.double(), evidence.corruption)  # (B, L)
    difference: Tensor = ref - old_tokens(x, algorithm.likelihood, algorithm.count_positions, algorithm.density)
    return difference.sum(1)


def target_weights(
    algorithm: Any,
    rewards: Tensor,  # (B,)
    groups: Tensor,  # (B,)
    log_rnd: Tensor,  # (B,) nats
) -> tuple[Tensor, Tensor, Tensor]:  # (B,) each
    """w, coef, and r/α as used (relative to the group's mean, so that equal rewards are exactly zero)."""
    a = algorithm
    tilt = group_centered(rewards, groups)
    if a.weights == "target":
        tilt = tilt / a.reward_temperature
    exponent = log_rnd + tilt
    coef = ess_coefficient(exponent, groups, a.weight_coef, a.ess_target)
    return group_softmax(coef * exponent, groups), coef, tilt


def effective_share(
    weight: Tensor,  # (B,), adding up to 1 in each group
    groups: Tensor,  # (B,)
) -> Tensor:  # (groups,)
    """Effective sample size 1 / Σ w² as a share of the group's size: 1 for equal weights, 1/G for a single one."""
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    squares = weight.new_zeros(len(count)).scatter_add(0, member, weight.square())
    share: Tensor = 1 / (squares * count)
    return share


def ess_coefficient(
    exponent: Tensor,  # (B,) nats
    groups: Tensor,  # (B,)
    most: float,
    target: float,
) -> Tensor:  # (B,)
    """The largest coef in [0, `most`] with which softmax(coef · exponent) has an effective share of `target`.

    One for each group, repeated in its rows; `most` where that will do. The share falls as coef grows, so bisection
    finds it: d log ESS / d coef = 2 (E_coef[v] - E_{2 coef}[v]) <= 0, expectations under the softmax at coef, 2 coef.
    """
    _, member, count = groups.unique(return_inverse=True, return_counts=True)

    def is_enough(coef: Tensor) -> Tensor:
        return effective_share(group_softmax(coef[member] * exponent, groups), groups) >= target

    high = exponent.new_full((len(count),), most)
    low = torch.where(is_enough(high), high, torch.zeros_like(high))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        good = is_enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return low[member]


def weight_metrics(
    algorithm: Any,
    weight: Tensor,  # (B,)
    coef: Tensor,  # (B,)
    log_rnd: Tensor,  # (B,) nats
    groups: Tensor,  # (B,)
) -> dict[str, float]:
    """`ess`, share of the group size, mean over groups; `weight_coef`, mean; `log_rnd_std`, nats, within groups.

    Raw rewards are no distribution: nothing for them.
    """
    if algorithm.weights == "raw":
        return {}
    return {
        "ess": float(effective_share(weight, groups).mean()),
        "weight_coef": float(coef.mean()),
        "log_rnd_mean": float(log_rnd.mean()),
        "log_rnd_std": float(group_centered(log_rnd, groups).square().mean().sqrt()),
    }


def group_size(groups: Tensor) -> Tensor:
    """(B,) int64, rows of each row's group."""
    member: Tensor
    count: Tensor
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    return count[member]
