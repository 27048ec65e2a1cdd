"""DGA by loops: weights, choices and losses in Python floats and single tensors; nothing of the library's algebra."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from unmask.types import Corruption, Rollouts


def divergences(policy, reference, rollouts: Rollouts, corruption: Corruption) -> Tensor:
    """(B, K, L) KL(policy || reference) over the ordinary tokens, zero where not scored; differentiable in `policy`."""
    clean = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    rows = []
    for b, k in itertools.product(*map(range, corruption.scored.shape[:2])):
        canvas = clean[b].masked_fill(corruption.masked[b, k], policy.mask_token_id)[None]
        tokens = [i for i in range(policy.vocab + 1) if i != policy.mask_token_id]
        p, q = (m(canvas)[0, -policy.length :, tokens].softmax(-1) for m in (policy, reference))
        terms = (p * (p.log() - q.log().detach())).sum(-1)
        rows.append(terms * corruption.scored[b, k])
    return torch.stack(rows).view(corruption.scored.shape)


def members(groups: list[int]) -> list[list[int]]:
    return [[i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))]


def softmax(values: list[float]) -> list[float]:
    scale = [math.exp(v - max(values)) for v in values]
    return [s / sum(scale) for s in scale]


def effective(weights: list[float]) -> float:
    return 1 / sum(w * w for w in weights)


def least_alpha(energies: list[float], least: float, share: float) -> float:
    """Smallest α >= `least` whose weights have an effective sample size of `share` times their number."""
    low, high = math.log(least), math.log(1e6)
    if effective(softmax([-e / least for e in energies])) >= share * len(energies):
        return least
    for _ in range(200):
        middle = (low + high) / 2
        is_enough = effective(softmax([-e / math.exp(middle) for e in energies])) >= share * len(energies)
        low, high = (low, middle) if is_enough else (middle, high)
    return math.exp(high)


def dga_weights(
    energies: list[float], groups: list[int], *, alpha: float | None, least: float, share: float, clip: float
) -> list[float]:
    """w̃ by Eq. 11 and 16."""
    out = [0.0] * len(groups)
    for rows in members(groups):
        own = [energies[i] for i in rows]
        temperature = alpha or least_alpha(own, least, share)
        clipped = [min(w, clip / len(rows)) for w in softmax([-e / temperature for e in own])]
        for i, w in zip(rows, clipped, strict=True):
            out[i] = w / sum(clipped)
    return out


def dga_loss(
    logps: Tensor,  # (B, K, L)
    kl: Tensor,  # (B, K, L)
    corruption: Corruption,
    length: list[int],
    groups: list[int],
    coefficients: list[float],
    kl_coef: float,
) -> Tensor:
    """Mean over groups of Σ_i c_i (-ELBO_i / L + λ · mean KL over masked tokens)."""
    total = torch.zeros((), dtype=torch.float64)
    num_masks, positions = corruption.scored.shape[1:]
    for rows in members(groups):
        for i in rows:
            estimate, masked, count = torch.zeros_like(total), torch.zeros_like(total), 0
            for k in range(num_masks):
                for j in range(positions):
                    estimate = estimate + corruption.weight[i, k, j] * logps[i, k, j]
                    if corruption.scored[i, k, j]:
                        masked, count = masked + kl[i, k, j], count + 1
            total = total + coefficients[i] * (-estimate / length[i] + kl_coef * masked / count)
    return total / len(members(groups))


def ranking_loss(energies: Tensor, rewards: list[float], groups: list[int], scale: float) -> Tensor:
    """Mean over groups of the mean of -log σ((E_j - E_i) / β) over pairs with R_i > R_j, 0 without a pair."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in members(groups):
        pairs = [(i, j) for i in rows for j in rows if rewards[i] > rewards[j]]
        for i, j in pairs:
            total = total + (1 + torch.exp(-(energies[j] - energies[i]) / scale)).log() / len(pairs)
    return total / len(members(groups))
