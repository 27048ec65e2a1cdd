"""Pieces shared by the clipped policy-gradient objectives: ratio, surrogate, KL estimators, metrics, field checks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from unmask.advantages import ADVANTAGES
from unmask.corruption import COUNT_POSITIONS
from unmask.errors import ConfigError
from unmask.likelihood import token_estimate
from unmask.types import Corruption, LossInputs, LossOutput

MAX_LOG_RATIO = 20.0
"""Nats. exp(20) is 5e8: far beyond any clip range, and safe to multiply and to square in float32."""

KL_ESTIMATORS = ("k1", "k2", "k3")


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), the exponent clamped to ±20 nats; beyond that the value is constant, with zero gradient."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    log_ratio: Tensor,  # (...) nats
    advantages: Tensor,  # broadcastable to (...)
    clip_low: float,
    clip_high: float,
) -> Tensor:  # (...)
    """PPO's pessimistic gain, to be maximised.

        min( ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A ),     ρ = exp(log_ratio)

    At ρ = 1 its gradient is A · ∇log_ratio, for every clip range including zero: both branches tie, and autograd
    gives each half. Source: PPO, arXiv:1707.06347.
    """
    ratio = importance_ratio(log_ratio)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_estimate(
    log_ratio: Tensor,  # (...) nats, log π_θ - log π_ref
    kind: str,
) -> Tensor:  # (...)
    """Single-sample estimate of KL(π_θ ‖ π_ref) for samples of π_θ, with d = log_ratio.

        k1 = d          k2 = d²/2          k3 = e^{-d} - 1 + d

    As losses they differ: the expected gradient is 0 for k1, ∇KL(π_θ ‖ π_ref) for k2, ∇KL(π_ref ‖ π_θ) for k3. For k3
    d is held at -20 nats below that, in both terms: e^{-d} would overflow, and the linear term alone would push away
    from the reference.

    Raises: ValueError for another `kind`.
    Source: http://joschu.net/blog/kl-approx.html; ESPO, arXiv:2512.03759 Eq. 9 (its Eq. 25-26 print k3 with the
    opposite sign of d, which is no penalty).
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        d = log_ratio.clamp(min=-MAX_LOG_RATIO)
        return (-d).exp() - 1 + d
    raise ValueError(f"unknown KL estimator {kind!r}. Known: {', '.join(KL_ESTIMATORS)}")


@torch.no_grad()
def ratio_metrics(
    log_ratio: Tensor,  # (B, N) nats
    advantages: Tensor,  # (B, 1) or (B, N)
    counted: Tensor,  # (B, N) bool
    clip_low: float,
    clip_high: float,
) -> dict[str, float]:
    """Facts about the counted ratios.

    `clip_ratio/*_mean`: share of ratios beyond a bound where clipping stops the gradient (low: A < 0, high: A > 0,
    region: either); `ratio_max`; `log_ratio_clamped`: share outside ±20 nats.
    """
    ratio = importance_ratio(log_ratio)
    low = (ratio < 1 - clip_low) & (advantages < 0) & counted
    high = (ratio > 1 + clip_high) & (advantages > 0) & counted
    clamped = (log_ratio.abs() > MAX_LOG_RATIO) & counted
    total = counted.sum().clamp(min=1)
    return {
        "ratio_max": float(ratio.masked_fill(~counted, 0.0).max()),
        "clip_ratio/low_mean": float(low.sum() / total),
        "clip_ratio/high_mean": float(high.sum() / total),
        "clip_ratio/region_mean": float((low | high).sum() / total),
        "log_ratio_clamped": float(clamped.sum() / total),
    }


def old_scores(x: LossInputs, name: str) -> tuple[Tensor, Corruption]:
    """Old policy's log-probabilities with the draws they were read from.

    Raises: ValueError if there are none.
    """
    if x.old_logps is None:
        raise ValueError(f"{name}.loss() got no old_logps; score the old policy, or pass logps.detach() on-policy.")
    return x.old_logps, x.corruption if x.old_corruption is None else x.old_corruption


def ref_scores(x: LossInputs, name: str) -> tuple[Tensor, Corruption]:
    """Reference's log-probabilities with the draws they were read from.

    Raises: ValueError if there are none.
    """
    if x.ref_logps is None:
        raise ValueError(f"{name}.loss() got no ref_logps, which it reads the policy against; score the reference.")
    return x.ref_logps, x.corruption if x.ref_corruption is None else x.ref_corruption


def chosen_mean(
    values: Tensor,  # (B,)
    chosen: Tensor,  # (B,) bool
) -> float:
    """Mean of the chosen values, for the log; 0 if there is none."""
    return float((values.detach() * chosen).sum() / chosen.sum().clamp(min=1))


def token_level_loss(
    x: LossInputs,
    counted: Tensor,  # (B, L) bool, at least one in each row
    algorithm: Any,
    *,
    per_rollout: bool,
) -> LossOutput:
    """Clipped surrogate and KL with a ratio for each counted position.

        loss = mean_{i,k} [ -min(ρ_ik A_i, clip(ρ_ik) A_i) + kl_coef · KL_ik ],     ρ_ik = exp( s_ik - s_ik^old )

    s is the token estimate of the draws. The mean is over all counted positions of the batch, or with `per_rollout`
    over those of each rollout and then over rollouts. `algorithm` has the fields of `check_policy_gradient`.
    """
    a, name = algorithm, type(algorithm).__name__

    def mean(values: Tensor, factor: float) -> Tensor:
        if per_rollout:
            return factor * ((values * counted).sum(1) / counted.sum(1)).mean()
        return factor * (values * counted).sum() / counted.sum()

    estimate = token_estimate(x.logps, x.corruption)  # (B, L)
    advantages = x.advantages.to(estimate)[:, None]  # (B, 1)
    log_ratio = estimate - token_estimate(*old_scores(x, name)).to(estimate)
    loss = policy_loss = mean(clipped_surrogate(log_ratio, advantages, a.clip_low, a.clip_high), -1.0)
    metrics = ratio_metrics(log_ratio, advantages, counted, a.clip_low, a.clip_high)
    metrics["policy_loss"] = float(policy_loss.detach())
    if a.needs.ref:
        log_ratio_ref = estimate - token_estimate(*ref_scores(x, name)).to(estimate)
        penalty = mean(kl_estimate(log_ratio_ref, a.kl), a.kl_coef)
        loss = policy_loss + penalty
        metrics["kl_penalty"] = float(penalty.detach())
    return LossOutput(loss, metrics)


def require(holds: bool, field: str, value: Any, reason: str) -> None:
    """Raises: ConfigError "algorithm.<field> = <value>: <reason>" unless `holds`."""
    if not holds:
        raise ConfigError(f"algorithm.{field} = {value!r}: {reason}")


def require_choice(field: str, value: str, known: Collection[str]) -> None:
    """Raises: ConfigError unless `value` is among `known`."""
    require(value in known, field, value, f"unknown. Use one of: {', '.join(known)}.")


def check_reading(algorithm: Any) -> None:
    """Check how often and where log-probabilities are read: fields that every objective on rollouts has.

    Raises: ConfigError naming the first field that is out of range.
    """
    a = algorithm
    require(
        a.num_iterations >= 1, "num_iterations", a.num_iterations, "rollouts are used at least once. Use 1 or more."
    )
    require_choice("advantage", a.advantage, ADVANTAGES)
    require_choice("count_positions", a.count_positions, COUNT_POSITIONS)


def check_num_masks(num_masks: int, field: str = "num_masks") -> None:
    """Raises: ConfigError unless there is a copy to read."""
    require(num_masks >= 1, field, num_masks, "a likelihood is read from masked copies. Use 1 or more.")


def check_prompt_mask_ratio(ratio: float) -> None:
    """Raises: ConfigError unless some of the prompt may be seen."""
    require(
        0 <= ratio < 1,
        "prompt_mask_ratio",
        ratio,
        "share of prompt tokens hidden, in [0, 1). Try 0.15, or 0 for none.",
    )


def check_policy_gradient(algorithm: Any) -> None:
    """Check the fields that all clipped policy-gradient objectives have.

    Raises: ConfigError naming the first field that is out of range.
    """
    a = algorithm
    check_reading(a)
    require(
        0 <= a.clip_low <= 1,
        "clip_low",
        a.clip_low,
        "distance below a ratio of 1, and no ratio is negative. Use 0 to 1.",
    )
    require(a.clip_high >= 0, "clip_high", a.clip_high, "distance above a ratio of 1. Use 0 or more.")
    require(0 <= a.kl_coef < float("inf"), "kl_coef", a.kl_coef, "weight of a penalty. Use 0 (no reference) or more.")
    require(
        0 <= a.negative_scale < float("inf"),
        "negative_scale",
        a.negative_scale,
        "factor of negative advantages; below 0 it would reward failures. Use 1 for the published method.",
    )
    require_choice("kl", a.kl, KL_ESTIMATORS)
