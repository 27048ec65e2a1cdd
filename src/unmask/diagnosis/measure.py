"""Bias, variance and use of one estimator on many completions, as a row of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unmask.diagnosis.estimators import Estimator
from unmask.diagnosis.exact import eubo_limit, log_likelihood, mean_over_orders, sub_table
from unmask.diagnosis.laws import Moments


@dataclass(frozen=True)
class Exact:
    """What one model holds of the completions, without error."""

    table: Tensor  # (B, 2^L, L)
    log_p: Tensor  # (B,) nats
    elbo: Tensor  # (B,) nats


def exact(table: Tensor) -> Exact:
    """Likelihood and lower bound of a table."""
    return Exact(table, log_likelihood(table), mean_over_orders(table)[:, -1])


def measure(
    estimator: Estimator,
    values: Tensor,  # (D, models, B) estimates of D draws
    policy: Exact,
    reference: Exact | None,
    budget: int,
) -> dict[str, Any]:
    """The row of one estimator. Mean and variance are those of its law where that is known, else those of the draws.

    Standard deviations are root mean squares over the completions; at equal cost, those of a mean of independent draws
    that cost `budget` forwards in all.
    """
    drawn = moments(values[:, 0])
    known = estimator.law(policy.table) if estimator.law else None
    best = known or drawn
    row: dict[str, Any] = {
        "name": estimator.name,
        "used_by": estimator.used_by,
        "forwards": estimator.forwards,
        "moments": "exact" if known else "draws",
        **compare(best, values[:, 0], policy.log_p, estimator.forwards / budget),
        "bias_elbo": float((best.mean - policy.elbo).mean()),
        "below_log_p": float((best.mean < policy.log_p - 1e-9).double().mean()),
        "draws": check(values[:, 0], known),
    }
    if estimator.limit:
        row["bias_limit"] = float((best.mean - estimator.limit(policy.table)).mean())
    if reference is not None:
        apart = values[:, 0] - values[:, 1]
        difference = estimator.law(policy.table - reference.table) if estimator.law else moments(apart)
        other = estimator.law(reference.table) if estimator.law else moments(values[:, 1])
        row["difference"] = {
            **compare(difference, apart, policy.log_p - reference.log_p, estimator.forwards / budget),
            "sd_separate_draws": root_mean(best.variance + other.variance),
            "right_sign_one_draw": float((apart.sign() == (policy.log_p - reference.log_p).sign()).double().mean()),
        }
    return row


def compare(found: Moments, values: Tensor, truth: Tensor, cost: float) -> dict[str, float]:
    """Mean, bias, spread and order of estimates against the true number of each completion."""
    bias = found.mean - truth
    return {
        "mean": float(found.mean.mean()),
        "bias": float(bias.mean()),
        "bias_se": standard_error(bias),
        "bias_sd": float(bias.std(correction=0)),
        "sd": root_mean(found.variance),
        "sd_equal_cost": root_mean(found.variance) * math.sqrt(cost),
        "spearman": spearman(found.mean, truth),
        "spearman_one_draw": mean_or_nan([spearman(one, truth) for one in values[:100]]),
    }


def check(values: Tensor, known: Moments | None) -> dict[str, float]:
    """The draws by themselves and, where the law is known, how far they are from it.

    `z` is the mean over completions less the law's, in standard errors over draws; `variance_ratio` is drawn variance
    over the law's. Completions of one draw may share noise, so the average of a draw counts as one number.
    """
    per_draw = values.mean(1)
    found = {"number": float(len(values)), "mean": float(per_draw.mean()), "standard_error": standard_error(per_draw)}
    if known is not None:
        off = found["mean"] - float(known.mean.mean())
        # without randomness, what is left is rounding
        found["z"] = off / found["standard_error"] if found["standard_error"] > 1e-9 else 0.0
        expected = float(known.variance.mean())
        found["variance_ratio"] = float(moments(values).variance.mean()) / expected if expected > 1e-12 else 1.0
    return found


def moments(values: Tensor) -> Moments:
    """Of D draws (D, B), the variance without bias."""
    return Moments(values.mean(0), values.var(0))


def gaps(
    table: Tensor,  # (B, 2^L, L)
    turn: Tensor,  # (B, L)
    gammas: tuple[float, ...],
) -> list[dict[str, Any]]:
    """For each length from 2: how far the bounds and the one-step likelihood lie from log p, (B,) each and in nats."""
    rows = []
    for length in range(2, table.shape[-1] + 1):
        short = exact(sub_table(table, turn, length))
        rows.append(
            {
                "length": length,
                "log_p": short.log_p,
                "elbo_gap": short.log_p - short.elbo,
                "mean_field": short.table[:, -1].sum(1) - short.log_p,
                "eubo": {f"{gamma:g}": eubo_limit(short.table, gamma) - short.log_p for gamma in gammas},
            }
        )
    return rows


def reward_classes(rewards: Tensor, most: int = 5) -> list[tuple[str, Tensor]]:
    """(label, rows (B,) bool) by reward: every value apart if there are at most `most`, else quarters of the rows."""
    distinct = rewards.unique()
    if len(distinct) <= most:
        return [(f"{float(value):g}", rewards == value) for value in distinct]
    edges = rewards.quantile(torch.linspace(0, 1, 5, dtype=rewards.dtype)).unique()
    classes = []
    for low, high in pairwise(edges.tolist()):
        rows = (rewards >= low) & ((rewards < high) | (high == float(edges[-1])))
        if rows.any():
            classes.append((f"{float(rewards[rows].min()):.3g} to {float(rewards[rows].max()):.3g}", rows))
    return classes


def summary(values: Tensor) -> dict[str, float]:
    """Mean, its standard error and the extremes over completions."""
    return {
        "mean": float(values.mean()),
        "standard_error": standard_error(values),
        "median": float(values.median()),
        "largest": float(values.max()),
    }


def standard_error(values: Tensor) -> float:
    """Of the mean of independent numbers; nan for one alone."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def root_mean(variance: Tensor) -> float:
    """Root of the mean variance; rounding may leave a variance of zero slightly negative."""
    return math.sqrt(max(0.0, float(variance.mean())))


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, equal values sharing their mean rank; nan where one side is constant."""
    x, y = (_ranks(values) - (len(values) - 1) / 2 for values in (a, b))
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else math.nan


def mean_or_nan(values: list[float]) -> float:
    """Mean of the numbers that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1).double() / 2
