"""Brute force for the objectives that compare rollouts of one prompt: plain loops, from the definitions.

As in oracles.py: `table[S, i]` is l(i;S), a subset S of masked positions a bit mask.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, product

import torch
from torch import Tensor

from tests.oracles import bits, token_estimates
from unmask.types import Corruption, LossInputs


def rows_of(groups: list[int]) -> list[list[int]]:
    """Row numbers of each group."""
    return [[b for b, g in enumerate(groups) if g == group] for group in sorted(set(groups))]


def log_ratios(x: LossInputs, length: list[int], *, coupled: bool, half: int | None = None) -> list[Tensor]:
    """B - B^ref of each row; of one half of the copies if asked for."""
    ref = x.ref_corruption or x.corruption
    positions, copies = x.logps.shape[2], x.logps.shape[1]
    keep = slice(None) if half is None else slice(half * copies // 2, (half + 1) * copies // 2)
    sums = []
    for logps, draw in ((x.logps, x.corruption), (x.ref_logps, ref)):
        masked = draw.masked[:, keep, -positions:]
        sums.append([sum(row) for row in token_estimates(logps[:, keep], masked, length, "elbo", coupled)])
    return [a - b for a, b in zip(*sums, strict=True)]


def embr_e_loss(
    ratios: list[list[Tensor]],  # of all draws, or of each half
    rewards: list[float],
    groups: list[int],
    c: list[Tensor] | None,
    *,
    beta: float,
    scale: float,
) -> Tensor:
    """Mean over rows of (log-ratio - r/β + c)², or the product of two; c None: minus the mean over the group."""
    terms = []
    for rows in rows_of(groups):
        for b in rows:
            term = 1 / scale**2
            for ratio in (ratios * 2)[:2]:
                energy = {i: ratio[i] - rewards[i] / beta for i in rows}
                centre = -sum(energy.values()) / len(rows) if c is None else c[b]
                term = term * (energy[b] + centre)
            terms.append(term)
    return sum(terms) / len(terms)


def embr_c_loss(
    ratios: list[list[Tensor]], rewards: list[float], groups: list[int], *, beta: float, scale: float
) -> Tensor:
    """Mean over groups of the mean over i ≠ j of (difference of log-ratios - Δr/β)², or the product of two."""
    means = []
    for rows in rows_of(groups):
        terms = []
        for i in rows:
            for j in rows:
                if i != j:
                    first, second = (
                        ratio[i] - ratio[j] - (rewards[i] - rewards[j]) / beta for ratio in (ratios * 2)[:2]
                    )
                    terms.append(first * second / scale**2)
        if terms:
            means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


def eubo_of_reads(
    logps: Tensor,  # (K, L)
    masked: Tensor,  # (K, L)
    length: int,
    gamma: float,
    *,
    coupled: bool,
    normalize: bool,
) -> Tensor:
    """Σ_i (1/γ) log Σ_k w_k e^{γ l_k} (/ Σ_k w_k), over the copies that mask i; positions never masked add nothing."""
    copies = logps.shape[0]
    total = logps.new_zeros(())
    for i in range(length):
        mass, norm = logps.new_zeros(()), 0.0
        for k in range(copies):
            if masked[k, i]:
                w = (length + coupled) / int(masked[k].sum()) / copies
                mass, norm = mass + w * torch.exp(gamma * logps[k, i]), norm + w
        if norm:
            total = total + (mass / (norm if normalize else 1)).log() / gamma
    return total


def surrogate(s: Tensor, kind: str, d: float) -> Tensor:
    s = abs(s)
    if kind == "square":
        return s * s
    if kind == "huber":
        return s * s if s <= d else 2 * d * s - d * d
    if kind == "softplus":
        return d * d * (torch.log(1 + torch.exp(2 * s / d)) + torch.log(1 + torch.exp(-2 * s / d)) - 2 * math.log(2))
    return torch.clamp(2 * d * s - d * d, min=0.0)


def embr_u_loss(
    lower: list[Tensor],
    upper: list[Tensor],
    ref_lower: list[Tensor],
    ref_upper: list[Tensor],
    rewards: list[float],
    groups: list[int],
    *,
    beta: float,
    scale: float,
    kind: str = "square",
    threshold: float = 1.0,
) -> Tensor:
    """Eq. 19-21 for each ordered pair, with Δr/β."""
    means = []
    for rows in rows_of(groups):
        terms = []
        for i in rows:
            for j in rows:
                if i != j:
                    gain = (rewards[i] - rewards[j]) / beta
                    s_min = (lower[i] - upper[j]) - (ref_upper[i] - ref_lower[j]) - gain
                    s_max = (upper[i] - lower[j]) - (ref_lower[i] - ref_upper[j]) - gain
                    both = [surrogate(s / scale, kind, threshold) for s in (s_min, s_max)]
                    terms.append(max(both))
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


def preference_loss(
    ratios: list[Tensor],
    elbos: list[Tensor],
    rewards: list[float],
    groups: list[int],
    length: list[int],
    *,
    beta: float,
    sft_coef: float,
) -> Tensor:
    """Mean over groups with a pair of the mean over w, l with R_w > R_l of log(1 + e^-h) - s · B_w / E_w."""
    means = []
    for rows in rows_of(groups):
        terms = [
            torch.log(1 + torch.exp(-beta * (ratios[w] - ratios[l]))) - sft_coef * elbos[w] / length[w]
            for w, l in product(rows, rows)
            if rewards[w] > rewards[l]
        ]
        if terms:
            means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


# --- a model whose conditionals are those of one joint ---------------------------------------------------------------


def joint_table(
    log_joint: Tensor,  # (V,) * L, log-probabilities of all completions
    completion: list[int],
) -> Tensor:  # (2^L, L), differentiable
    """l(i;S) of one completion: log p(y_i | y outside S) of the joint. Then every order has likelihood p(y)."""
    positions = log_joint.ndim
    table = []
    for S in range(2**positions):
        slots = [slice(None) if S >> j & 1 else completion[j] for j in range(positions)]
        row = [log_joint.new_zeros(()) for _ in range(positions)]
        for i in bits(S):
            given_i = list(slots)
            given_i[i] = completion[i]
            with_i, without_i = (log_joint[tuple(where)].flatten().logsumexp(0) for where in (given_i, slots))
            row[i] = with_i - without_i
        table.append(torch.stack(row))
    return torch.stack(table)


# --- every outcome of several draws ----------------------------------------------------------------------------------


def multisets(positions: int, num_draws: int) -> list[tuple[tuple[int, ...], float]]:
    """(subsets, probability) of `num_draws` independent uncoupled draws, their order forgotten."""
    probability = {
        S: 1 / (positions * math.comb(positions, len(bits(S)))) for S in range(1, 2**positions)
    }  # m ~ U{1..L}, then a subset of that size
    found = []
    for chosen in combinations_with_replacement(probability, num_draws):
        arrangements = math.factorial(num_draws)
        for S in set(chosen):
            arrangements //= math.factorial(chosen.count(S))
        found.append((chosen, arrangements * math.prod(probability[S] for S in chosen)))
    return found


def corruption_of(rows: list[tuple[int, ...]], positions: int) -> Corruption:
    """Uncoupled copies masking the given subsets, weights L / (m K)."""
    scored = torch.tensor([[[bool(S >> i & 1) for i in range(positions)] for S in row] for row in rows])
    size = scored.sum(-1, keepdim=True)
    return Corruption(scored, scored, scored * positions / (size * scored.shape[1]).double(), "elbo")
