"""Exact mean and variance of likelihood estimates over their random masks, from an enumerated table.

Each law is written from the definition of the estimator, not from the code that draws; `unmask diagnose` holds real
draws against it. Estimates are linear in the table, so the law of a difference of two models that read the same masked
copies is the law of the difference of their tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.corruption import quadrature_rule
from unmask.diagnosis.exact import before, may_come_next, mean_over_orders, subsets

NUM_NODES = 64
"""Gauss-Legendre nodes of integrals over the mask ratio; from 32 on the moments of 12 tokens keep 11 digits."""


@dataclass(frozen=True)
class Moments:
    """Over the draws of one estimate, for each row."""

    mean: Tensor  # (B,) nats
    variance: Tensor  # (B,) nats²

    def scaled(self, factor: float) -> Moments:
        """Of the estimate times a constant."""
        return Moments(factor * self.mean, factor**2 * self.variance)


def full_mask(table: Tensor) -> Moments:
    """Mean field: one state, without randomness."""
    mean = table[:, -1].sum(1)
    return Moments(mean, torch.zeros_like(mean))


def continuous(table: Tensor, *, min_mask_ratio: float) -> Moments:
    """t ~ U(ε, 1), each position masked with probability t, (1/t) Σ_{i∈S} l(i;S). As ε → 0 the variance diverges."""
    # nodes in log t, where the second moment, which grows as 1/t, is smooth
    nodes, weights = _legendre(math.log(min_mask_ratio), 0.0)
    ratio = nodes.exp()
    probability = weights * ratio / (1 - min_mask_ratio)
    chance = _bernoulli(table.shape[-1], ratio) * probability[:, None]  # (N, 2^L)
    total = table.sum(2)
    mean = total @ (chance / ratio[:, None]).sum(0)
    second = total.square() @ (chance / ratio[:, None] ** 2).sum(0)
    return Moments(mean, second - mean.square())


def uniform_count(table: Tensor, *, num_masks: int, coupled: bool) -> Moments:
    """`num_masks` copies, or half as many complementary pairs, whose levels are evenly spaced round a circle.

    uncoupled m ~ U{1..L}: (L/m) Σ_{i∈S} l(i;S); coupled m ~ U{0..L}: half of ((L+1)/m) Σ over S and the same over S^c.
    """
    length, size = table.shape[-1], subsets(table.shape[-1]).sum(1)
    if coupled:
        one = table.sum(2) * (length + 1) / size.clamp(min=1) / 2
        values, first, num_levels, num_draws = one + one.flip(1), 0, length + 1, num_masks // 2
    else:
        values, first, num_levels, num_draws = table.sum(2) * length / size.clamp(min=1), 1, length, num_masks
    level = [_moments(values, (size == first + m).double()) for m in range(num_levels)]
    steps = [math.floor(d * num_levels / num_draws + 0.5) for d in range(num_draws)]
    starts = [
        [level[(start + step) % num_levels].scaled(1 / num_draws) for step in steps] for start in range(num_levels)
    ]
    return _mixture(starts)


def quadrature(table: Tensor, *, rule: str, num_nodes: int, masking: str) -> Moments:
    """Σ_n ω_n (1/s_n) Σ_{i∈S_n} l(i;S_n) at fixed mask ratios t_n, one copy each."""
    length, size = table.shape[-1], subsets(table.shape[-1]).sum(1)
    nodes, weights = quadrature_rule(rule, num_nodes)
    parts = []
    for ratio, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        if masking == "exact_count":
            m = max(1, math.floor(ratio * length + 0.5))
            part = _moments(table.sum(2) * length / m, (size == m).double())
        else:
            part = _moments(table.sum(2) / ratio, _bernoulli(length, torch.tensor([ratio], dtype=torch.float64))[0])
        parts.append(part.scaled(weight))
    return _mixture([parts])


def coupled_tokens(table: Tensor, *, min_mask_ratio: float, max_mask_ratio: float) -> Moments:
    """Half of: everything masked, S divided by t, and its complement divided by 1 - t."""
    nodes, weights = _legendre(min_mask_ratio, max_mask_ratio)
    chance = _bernoulli(table.shape[-1], nodes)
    total = table.sum(2)
    scenarios = []
    for ratio, probability in zip(nodes.tolist(), chance, strict=True):
        values = (total[:, -1:] + total / ratio + total.flip(1) / (1 - ratio)) / 2
        scenarios.append([_moments(values, probability)])
    return _mixture(scenarios, weights / (max_mask_ratio - min_mask_ratio))


def blocks(table: Tensor, *, num_masks: int, block_length: int) -> Moments:
    """Earlier blocks shown, m tokens of one block masked and read with weight L/m, all behind it masked."""
    length = table.shape[-1]
    may = may_come_next(length, block_length)
    shown_before, size = may.int().argmax(1) // block_length, may.sum(1)  # (2^L,) block, tokens read
    behind = torch.arange(length) // block_length > shown_before[:, None]
    is_state = (subsets(length) | ~behind).all(1) & (size > 0)  # everything behind the block is masked
    values = (table * may).sum(2) * length / size.clamp(min=1)
    level = [
        _moments(values, (is_state & (shown_before == j // block_length) & (size == 1 + j % block_length)).double())
        for j in range(length)
    ]
    steps = [math.floor(d * length / num_masks + 0.5) for d in range(num_masks)]
    return _mixture([[level[(j + step) % length].scaled(1 / num_masks) for step in steps] for j in range(length)])


def rising_ratio(table: Tensor, *, num_timesteps: int) -> Moments:
    """The first pass of several: t_1 = floor(r T), |S| = max(1, round(L t_1 / T)), Σ_{i∈S} l(i;S)."""
    length, size = table.shape[-1], subsets(table.shape[-1]).sum(1)
    sizes = [max(1, math.floor(length * t / num_timesteps + 0.5)) for t in range(num_timesteps)]
    per_size = [sizes.count(m) / num_timesteps / math.comb(length, m) for m in range(length + 1)]
    return _moments(table.sum(2), torch.tensor(per_size, dtype=torch.float64)[size])


def trajectory(table: Tensor) -> Moments:
    """Σ_k l(σ_k; {σ_k..σ_L}) of a uniformly random order, from the recursions of its first two moments."""
    mean = mean_over_orders(table)
    growth = table.square() + 2 * table * mean[:, before(table.shape[-1])]
    return Moments(mean[:, -1], mean_over_orders(growth)[:, -1] - mean[:, -1].square())


def _legendre(low: float, high: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights (N,) of the integral from `low` to `high`."""
    x, w = np.polynomial.legendre.leggauss(NUM_NODES)
    return torch.from_numpy(low + (x + 1) / 2 * (high - low)), torch.from_numpy(w / 2 * (high - low))


def _bernoulli(length: int, ratio: Tensor) -> Tensor:  # (N, 2^L)
    """Probability of each state when every position is masked with probability `ratio` (N,)."""
    size = subsets(length).sum(1)
    return ratio[:, None] ** size * (1 - ratio[:, None]) ** (length - size)


def _moments(
    values: Tensor,  # (B, 2^L)
    weight: Tensor,  # (2^L,), in proportion to the probability of each state
) -> Moments:
    probability = weight / weight.sum()
    mean = values @ probability
    return Moments(mean, (values - mean[:, None]).square() @ probability)


def _mixture(scenarios: Sequence[Sequence[Moments]], probability: Tensor | None = None) -> Moments:
    """Sums of independent parts, mixed over scenarios (equally likely unless told otherwise)."""
    mean = torch.stack([torch.stack([part.mean for part in parts]).sum(0) for parts in scenarios])  # (N, B)
    inside = torch.stack([torch.stack([part.variance for part in parts]).sum(0) for parts in scenarios])
    if probability is None:
        probability = mean.new_full((len(mean),), 1 / len(mean))
    overall = probability @ mean
    return Moments(overall, probability @ (inside + (mean - overall).square()))
