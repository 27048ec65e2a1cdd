"""Brute force for tests: exact likelihoods, bounds and losses of tiny models, by enumeration and plain loops.

Written from the definitions, sharing no algebra with the library. A subset S of masked positions is a bit mask
(bit i set: position i masked), and `table[S, i]` is l(i;S) = log p(y_i | q, y outside S) for i in S, else 0.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations
from math import comb, factorial

import numpy as np
import torch
from torch import Tensor

from unmask.types import Corruption, Rollouts


def make_rollouts(
    completions: Tensor,  # (B, L)
    *,
    groups: list[int] | None = None,
    rewards: list[float] | None = None,
    length: list[int] | None = None,
    prompt: Tensor | None = None,  # (B, P)
    prompt_mask: Tensor | None = None,
) -> Rollouts:
    """Rollouts around given completions; rows are numbered within their group, and the group is the prompt key."""
    batch, positions = completions.shape
    groups = groups or [0] * batch
    seen: Counter[int] = Counter()
    index = []
    for group in groups:
        index.append(seen[group])
        seen[group] += 1
    prompt = torch.zeros(batch, 2, dtype=torch.int64) if prompt is None else prompt
    zeros = torch.zeros(batch, positions, dtype=torch.int64)
    return Rollouts(
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool) if prompt_mask is None else prompt_mask,
        completion_ids=completions,
        prompt_key=torch.tensor(groups),
        rollout_index=torch.tensor(index),
        groups=torch.tensor(groups),
        rewards=torch.tensor(rewards or [0.0] * batch, dtype=torch.float64),
        length=torch.tensor(length or [positions] * batch),
        reveal_step=zeros,
        sample_logps=zeros.double(),
        nfe=zeros[:, 0],
        prompts=[""] * batch,
        completions=[""] * batch,
        statuses=[""] * batch,
        facts=[{}] * batch,
    )


def score_copies(policy, rollouts: Rollouts, corruption: Corruption) -> Tensor:
    """Log-probabilities (B, K, L) of the completions, copy by copy, zero where not scored."""
    batch, copies, positions = corruption.scored.shape
    rows = []
    for b in range(batch):
        for k in range(copies):
            clean = torch.cat([rollouts.prompt_ids[b], rollouts.completion_ids[b]])
            canvas = torch.where(corruption.masked[b, k], policy.mask_token_id, clean)
            logits = policy(canvas[None])[0, -positions:, : policy.vocab]  # the mask token has no probability
            logps = logits.log_softmax(-1)[range(positions), rollouts.completion_ids[b]]
            rows.append(torch.where(corruption.scored[b, k], logps, torch.zeros_like(logps)))
    return torch.stack(rows).view(batch, copies, positions)


def bits(S: int) -> list[int]:
    return [i for i in range(S.bit_length()) if S >> i & 1]


def conditionals(policy, completion: Tensor, prompt: Tensor | None = None) -> Tensor:
    """`table` (2^L, L) of one completion (L,), differentiable."""
    positions = len(completion)
    prompt = torch.zeros(2, dtype=torch.int64) if prompt is None else prompt
    rows = []
    for S in range(2**positions):
        canvas = completion.clone()
        canvas[bits(S)] = policy.mask_token_id
        logits = policy(torch.cat([prompt, canvas])[None])[0, -positions:, : policy.vocab]
        logps = logits.log_softmax(-1)[range(positions), completion]
        inside = torch.tensor([bool(S >> i & 1) for i in range(positions)])
        rows.append(torch.where(inside, logps, torch.zeros_like(logps)))
    return torch.stack(rows)


# --- exact likelihood and ELBO ---------------------------------------------------------------------------------------


def orders(positions: int, block_length: int | None = None) -> list[tuple[int, ...]]:
    """Reveal orders, each equally likely; with blocks, those that finish a block before they enter the next."""
    block_length = block_length or positions
    blocks = [i // block_length for i in range(positions)]
    return [o for o in permutations(range(positions)) if [blocks[i] for i in o] == sorted(blocks)]


def order_logp(table: Tensor, order: tuple[int, ...]) -> Tensor:
    """log p(y; σ) = Σ_k l(σ_k; {σ_k, ..., σ_L}), the trajectory estimate (E5) of this order."""
    total = table.new_zeros(())
    for k, i in enumerate(order):
        total = total + table[sum(1 << j for j in order[k:]), i]
    return total


def log_likelihood_by_orders(table: Tensor, block_length: int | None = None) -> Tensor:
    paths = torch.stack([order_logp(table, o) for o in orders(table.shape[1], block_length)])
    return paths.exp().mean().log()


def elbo_by_orders(table: Tensor, block_length: int | None = None) -> Tensor:
    return torch.stack([order_logp(table, o) for o in orders(table.shape[1], block_length)]).mean()


def _next_positions(S: int, block_length: int) -> list[int]:
    """Masked positions that may be revealed now: those of the first unfinished block."""
    first = min(i // block_length for i in bits(S))
    return [i for i in bits(S) if i // block_length == first]


def log_likelihood_dp(table: Tensor, block_length: int | None = None) -> Tensor:
    """F(S) = mean over the positions i that may come next of exp l(i;S) · F(S without i); log F(everything)."""
    positions = table.shape[1]
    F = {0: table.new_ones(())}
    for S in range(1, 2**positions):
        choices = _next_positions(S, block_length or positions)
        F[S] = sum(table[S, i].exp() * F[S & ~(1 << i)] for i in choices) / len(choices)
    return F[2**positions - 1].log()


def elbo_dp(table: Tensor, block_length: int | None = None) -> Tensor:
    """H(S) = mean over the positions i that may come next of l(i;S) + H(S without i); H(everything)."""
    positions = table.shape[1]
    H = {0: table.new_zeros(())}
    for S in range(1, 2**positions):
        choices = _next_positions(S, block_length or positions)
        H[S] = sum(table[S, i] + H[S & ~(1 << i)] for i in choices) / len(choices)
    return H[2**positions - 1]


# --- expectations of the ELBO estimators -----------------------------------------------------------------------------


def expectation_continuous(table: Tensor, num_nodes: int = 8) -> Tensor:
    """E1: ∫ dt Σ_S t^|S| (1-t)^(L-|S|) (1/t) Σ_{i∈S} l(i;S). The integrand has degree L-1 in t: quadrature is exact."""
    positions = table.shape[1]
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    total = table.new_zeros(())
    for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        for S in range(1, 2**positions):
            m = len(bits(S))
            total = total + w * t ** (m - 1) * (1 - t) ** (positions - m) * table[S].sum()
    return total


Law = dict[tuple[int, ...], tuple[float, list[float]]]


def law_of_draws(positions: int, *, coupled: bool, factor: int | None = None) -> Law:
    """Every outcome of one draw: {masked subsets of its copies: (probability, weight of each copy)}.

    `factor` replaces L+1 (coupled) or L (uncoupled) in the weights. An empty copy has weight 0.
    """
    everything = 2**positions - 1
    factor = factor or (positions + 1 if coupled else positions)
    law: Law = {}
    for S in range(0 if coupled else 1, everything + 1):
        m = len(bits(S))
        probability = 1 / ((positions + 1 if coupled else positions) * comb(positions, m))
        copies = (S, everything & ~S) if coupled else (S,)
        sizes = [len(bits(C)) for C in copies]
        law[copies] = (probability, [factor / size / len(copies) if size else 0.0 for size in sizes])
    return law


def expectation_of_law(table: Tensor, law: Law) -> Tensor:
    """Mean of Σ_copies weight · Σ_{i∈S} l(i;S) over a law of draws."""
    total = table.new_zeros(())
    for copies, (probability, weights) in law.items():
        for S, w in zip(copies, weights, strict=True):
            total = total + probability * w * table[S].sum()
    return total


def expectation_trajectory(table: Tensor) -> Tensor:
    """E5: mean over all orders, written as a count: position i is revealed from state S in |S-1|! (L-|S|)! orders."""
    positions = table.shape[1]
    total = table.new_zeros(())
    for S in range(1, 2**positions):
        m = len(bits(S))
        total = total + table[S].sum() * factorial(m - 1) * factorial(positions - m) / factorial(positions)
    return total


def eubo_by_contexts(table: Tensor, gamma: float) -> Tensor:
    """Σ_i (1/γ) log E[ (L/m) 1[i∈S] e^{γ l(i;S)} ] over m ~ U{1..L} and S uniform of size m."""
    positions = table.shape[1]
    total = table.new_zeros(())
    for i in range(positions):
        mean = table.new_zeros(())
        for S in range(1, 2**positions):
            if S >> i & 1:
                m = len(bits(S))
                mean = mean + positions / m * torch.exp(gamma * table[S, i]) / (positions * comb(positions, m))
        total = total + mean.log() / gamma
    return total


# --- losses, in loops ------------------------------------------------------------------------------------------------


def token_estimates(
    logps: Tensor,  # (B, K, L)
    masked: Tensor,  # (B, K, L)
    length: list[int],
    likelihood: str,
    coupled: bool,
) -> list[list[Tensor]]:
    """B̂_i^k by the definitions: mean-field, uncoupled (E/m) or coupled (half of (E+1)/m each), averaged over draws."""
    batch, copies, positions = logps.shape
    estimates = []
    for b in range(batch):
        row = [logps.new_zeros(()) for _ in range(positions)]
        for k in range(copies):
            m = int(masked[b, k].sum())
            for i in range(positions):
                if not masked[b, k, i] or i >= length[b]:
                    continue
                if likelihood == "mean_field":
                    w = 1 / copies
                elif coupled:
                    w = 0.5 * (length[b] + 1) / m / (copies // 2)
                else:
                    w = length[b] / m / copies
                row[i] = row[i] + w * logps[b, k, i]
        estimates.append(row)
    return estimates


def ppo_gain(log_ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    return torch.minimum(ratio * advantage, clipped * advantage)


def kl_term(d: Tensor, kind: str) -> Tensor:
    return {"k1": d, "k2": 0.5 * d * d, "k3": torch.exp(-d) - 1 + d}[kind]


def espo_loss(
    theta: list[list[Tensor]],
    old: list[list[Tensor]],
    ref: list[list[Tensor]],
    advantages: list[float],
    length: list[int],
    *,
    level: str,
    clip: tuple[float, float],
    kl: str,
    kl_coef: float,
    kl_scale: str,
    ratio_scale: str = "per_length",
) -> Tensor:
    """-(1/B) Σ_i gain_i + kl_coef · (1/B) Σ_i KL_i from token estimates."""
    losses = []
    for b, advantage in enumerate(advantages):
        n = length[b]
        if level == "sequence":
            rho = sum(theta[b][:n]) - sum(old[b][:n])
            rho = rho / n if ratio_scale == "per_length" else rho
            gain = ppo_gain(rho, advantage, *clip)
            penalty = kl_term(sum(theta[b][:n]) - sum(ref[b][:n]), kl)
        else:
            gain = sum(ppo_gain(theta[b][i] - old[b][i], advantage, *clip) for i in range(n)) / n
            penalty = sum(kl_term(theta[b][i] - ref[b][i], kl) for i in range(n))
        losses.append(-gain + kl_coef * penalty / (n if kl_scale == "per_length" else 1))
    return sum(losses) / len(losses)


def diffu_grpo_loss(
    theta: list[list[Tensor]],
    old: list[list[Tensor]],
    ref: list[list[Tensor]],
    advantages: list[float],
    length: list[int],
    *,
    clip: float,
    kl_coef: float,
) -> Tensor:
    """Mean over every counted token of the batch of -gain + kl_coef · (e^d - d - 1), d = ref - theta."""
    terms = []
    for b, advantage in enumerate(advantages):
        for i in range(length[b]):
            d = ref[b][i] - theta[b][i]
            gain = ppo_gain(theta[b][i] - old[b][i], advantage, clip, clip)
            terms.append(-gain + kl_coef * (torch.exp(d) - d - 1))
    return sum(terms) / len(terms)


def wd1_loss(
    theta: list[list[Tensor]],
    rewards: list[float],
    groups: list[int],
    length: list[int],
    *,
    psi: float,
    positive_only: bool,
) -> Tensor:
    """Σ (w⁻ - w⁺) log π, mean over groups, the weights by their definition from centred rewards."""
    total = theta[0][0].new_zeros(())
    for group in set(groups):
        rows = [b for b, g in enumerate(groups) if g == group]
        mean = sum(rewards[b] for b in rows) / len(rows)
        up = {b: math.exp(psi * (rewards[b] - mean)) for b in rows}
        down = {b: math.exp(-psi * (rewards[b] - mean)) for b in rows}
        for b in rows:
            weight = -up[b] / sum(up.values())
            if not positive_only:
                weight += down[b] / sum(down.values())
            total = total + weight * sum(theta[b][: length[b]])
    return total / len(set(groups))


GAUSS_LEGENDRE = {
    1: [(0.5, 1.0)],
    2: [(0.5 - 0.5 / 3**0.5, 0.5), (0.5 + 0.5 / 3**0.5, 0.5)],
    3: [(0.5 - 0.5 * 0.6**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.5 * 0.6**0.5, 5 / 18)],
}
"""(node, weight) on [0, 1], from the roots of the Legendre polynomials x, 3x² - 1, 5x³ - 3x."""
SIMPSON = [(0.1, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)]


def quadrature_estimates(
    logps: Tensor,  # (B, N K, L)
    masked: Tensor,  # (B, N K, L)
    length: list[int],
    rule: list[tuple[float, float]],
    masking: str,
) -> list[Tensor]:
    """GDPO's B̂ of each row: Σ_n ω_n (1/K) Σ_k (L/m or 1/t) Σ_{i∈S} l."""
    batch, copies, _ = logps.shape
    per_node = copies // len(rule)
    totals = []
    for b in range(batch):
        total = logps.new_zeros(())
        for k in range(copies):
            t, w = rule[k // per_node]
            S = [i for i in range(length[b]) if masked[b, k, i]]
            factor = length[b] / len(S) if masking == "exact_count" else 1 / t
            total = total + w / per_node * factor * sum((logps[b, k, i] for i in S), start=logps.new_zeros(()))
        totals.append(total)
    return totals


def gdpo_loss(
    theta: list[Tensor],
    old: list[Tensor],
    ref: list[Tensor],
    advantages: list[float],
    scale: list[float],
    *,
    clip: float,
    kl: str,
    kl_coef: float,
) -> Tensor:
    """Mean over rollouts of -gain + kl_coef · KL, with differences of estimates divided by `scale`."""
    terms = []
    for b, advantage in enumerate(advantages):
        gain = ppo_gain((theta[b] - old[b]) / scale[b], advantage, clip, clip)
        terms.append(-gain + kl_coef * kl_term((theta[b] - ref[b]) / scale[b], kl))
    return sum(terms) / len(terms)


def coupled_scores(logps: Tensor, chosen: Tensor, t: float) -> list[list[Tensor]]:
    """DiffuCoder's s of (B, L) tokens from copies (all masked, S, complement), S given as (B, L) bool."""
    return [
        [
            0.5 * (row[0, i] + (row[1, i] / t if inside else row[2, i] / (1 - t)))
            for i, inside in enumerate(places.tolist())
        ]
        for row, places in zip(logps, chosen, strict=True)
    ]


def unigrpo_loss(
    theta: Tensor,  # (B, L)
    old: Tensor,
    ref: Tensor,
    masked: Tensor,  # (B, L)
    advantages: list[float],
    *,
    clip: float,
    kl_coef: float,
) -> Tensor:
    """Mean over rollouts of the mean over their masked positions of -gain + kl_coef · (e^{-d} - 1 + d)."""
    rows = []
    for b, advantage in enumerate(advantages):
        terms = []
        for i in range(theta.shape[1]):
            if masked[b, i]:
                gain = ppo_gain(theta[b, i] - old[b, i], advantage, clip, clip)
                terms.append(-gain + kl_coef * kl_term(theta[b, i] - ref[b, i], "k3"))
        rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows)


def spg_loss(
    logps: Tensor,  # (B, K, L)
    read: Tensor,  # (B, K, L)
    advantages: list[float],
    length: list[int],
    *,
    gamma: float,
    eubo_share: float,
) -> Tensor:
    """-Σ E A (B or ω U + (1-ω) B) / Σ E: B the mean over copies of the mean over read tokens, U a mean over tokens."""
    total = logps.new_zeros(())
    for b, advantage in enumerate(advantages):
        copies = [[k for k in range(logps.shape[2]) if read[b, j, k]] for j in range(logps.shape[1])]
        lower = sum(sum(logps[b, j, k] for k in S) / len(S) for j, S in enumerate(copies)) / len(copies)
        per_token = []
        for k in sorted(set().union(*copies)):
            holders = [j for j, S in enumerate(copies) if k in S]
            mass = sum(torch.exp(gamma * logps[b, j, k]) / len(copies[j]) for j in holders)
            per_token.append((mass / sum(1 / len(copies[j]) for j in holders)).log() / gamma)
        upper = sum(per_token) / len(per_token)
        bound = lower if advantage > 0 else eubo_share * upper + (1 - eubo_share) * lower
        total = total - length[b] * advantage * bound
    return total / sum(length)


# --- statistics ------------------------------------------------------------------------------------------------------


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    """Pearson's statistic."""
    total = sum(counts)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True))


def chi_square_limit(degrees: int, z: float = 4.0) -> float:
    """Quantile of chi-square at `z` standard normal deviations (z = 4: 3e-5 upper tail), Wilson-Hilferty."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
