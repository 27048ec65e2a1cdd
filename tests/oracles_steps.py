"""Brute force for objectives that know the steps of a sampler, in plain loops; see oracles.py for `table`.

Steps are lists: `steps[i]` is the step in which position i was revealed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations, product
from math import comb

import torch
from torch import Tensor

from tests.oracles import kl_term, ppo_gain
from tests.toys import TabularPolicy
from unmask.types import Corruption


def steps_of(order: Sequence[int]) -> list[int]:
    """The order reveals order[k] in step k: the step of each position."""
    steps = [0] * len(order)
    for k, i in enumerate(order):
        steps[i] = k
    return steps


def state_before(steps: Sequence[int], step: int) -> int:
    """Bit mask of the positions still masked when `step` begins."""
    return sum(1 << i for i, s in enumerate(steps) if s >= step)


def transition_logp(table: Tensor, steps: Sequence[int], first: int, end: int, length: int) -> Tensor:
    """Σ l(i; masked before `first`) over the i < length revealed in [first, end)."""
    total = table.new_zeros(())
    for i in range(length):
        if first <= steps[i] < end:
            total = total + table[state_before(steps, first), i]
    return total


def trajectory_logp(table: Tensor, steps: Sequence[int], length: int | None = None) -> Tensor:
    """Σ_i l(i; masked before the step of i) over i < length."""
    counted = len(steps) if length is None else length
    return sum((table[state_before(steps, steps[i]), i] for i in range(counted)), start=table.new_zeros(()))


def all_paths(vocab: int, positions: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Every completion with every order: (tokens, steps)."""
    orders = list(permutations(range(positions)))
    return [(y, steps_of(order)) for y in product(range(vocab), repeat=positions) for order in orders]


def every_subset(rows: int, positions: int, prompt: int, times: int = 1) -> Corruption:
    """Copies that are all masks at once, weighted by their law (m ~ U{1..L}, S uniform): the exact ELBO, no draws.

    `times` repeats them, each repetition with its share of the weight.
    """
    masked, weight = [], []
    for S in range(1, 2**positions):
        inside = [bool(S >> i & 1) for i in range(positions)]
        m = sum(inside)
        masked.append(inside)
        weight.append([positions / m / (positions * comb(positions, m)) / times if i else 0.0 for i in inside])
    hidden = torch.tensor(masked * times).expand(rows, -1, -1)
    shown = torch.zeros(rows, hidden.shape[1], prompt, dtype=torch.bool)
    weights = torch.tensor(weight * times, dtype=torch.float64).expand(rows, -1, -1)
    return Corruption(torch.cat([shown, hidden], dim=2), hidden, weights, "elbo")


def policy_of(joint: dict[tuple[int, ...], float], vocab: int, positions: int) -> TabularPolicy:
    """The model whose conditionals are those of a joint distribution: its ELBO is log p, along every order."""
    policy = TabularPolicy(vocab=vocab, length=positions)
    with torch.no_grad():
        for canvas in product(range(vocab + 1), repeat=positions):
            state = sum(token * (vocab + 1) ** i for i, token in enumerate(canvas))
            fits = {y: p for y, p in joint.items() if all(c in (vocab, v) for c, v in zip(canvas, y, strict=True))}
            for i in range(positions):
                if canvas[i] == vocab:
                    for v in range(vocab):
                        policy.table[0, state, i, v] = math.log(sum(p for y, p in fits.items() if y[i] == v))
    return policy


# --- DMPO ------------------------------------------------------------------------------------------------------------


def softmax(values: Sequence[float]) -> list[float]:
    """By the definition; a constant is taken off, which changes nothing but overflow."""
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def dmpo_weights(
    rewards: list[float],
    groups: list[int],
    log_rnd: list[float],
    *,
    alpha: float | None,  # None: rewards as they are, and no log_rnd
    coef: float = 1.0,
    sign: float = 1.0,  # -1: the target of the opposite reward
) -> list[float]:
    weights = [0.0] * len(rewards)
    for group in set(groups):
        rows = [b for b, g in enumerate(groups) if g == group]
        exponents = [
            coef * (sign * rewards[b] if alpha is None else log_rnd[b] + sign * rewards[b] / alpha) for b in rows
        ]
        for b, w in zip(rows, softmax(exponents), strict=True):
            weights[b] = w
    return weights


def wdce_loss(bounds: list[Tensor], signed: list[float], groups: list[int], positions: int) -> Tensor:
    """Σ w (-B / L), divided by the number of groups."""
    return -sum(w * b / positions for w, b in zip(signed, bounds, strict=True)) / len(set(groups))


def wddo_loss(
    up: list[Tensor], down: list[Tensor], weights: list[float], groups: list[int], *, kappa: float, a: float
) -> Tensor:
    """-mean [ G w log σ(κ D) + a log σ(-κ D') ], σ written out."""
    terms = []
    for b, group in enumerate(groups):
        good = torch.log(1 / (1 + torch.exp(-kappa * up[b])))
        bad = torch.log(1 / (1 + torch.exp(kappa * down[b])))
        terms.append(-(groups.count(group) * weights[b] * good + a * bad))
    return sum(terms) / len(terms)


# --- d-TreeRPO -------------------------------------------------------------------------------------------------------


def d_treerpo_loss(
    theta: Tensor,  # (B, L)
    old: Tensor,
    ref: Tensor,
    revealed: list[list[int]],  # C_c of each row
    values: list[float],
    parents: list[int],
    *,
    clip: tuple[float, float],
    kl_coef: float,
    coef: float,  # λ
    temperature: float,  # τ
) -> Tensor:
    """Parent by parent, as the pseudo-code goes; parents whose children are alike are skipped and not counted."""
    losses = []
    for parent in sorted(set(parents)):
        children = [c for c, p in enumerate(parents) if p == parent]
        mean = sum(values[c] for c in children) / len(children)
        advantage = {c: values[c] - mean for c in children}
        if len({values[c] for c in children}) == 1:
            continue
        loss = theta.new_zeros(())
        for c in children:
            terms = []
            for k in revealed[c]:
                gain = ppo_gain(theta[c, k] - old[c, k], advantage[c], *clip)
                terms.append(-gain + kl_coef * kl_term(theta[c, k] - ref[c, k], "k3"))
            if terms:
                loss = loss + sum(terms) / len(terms) / len(children)
        better = [c for c in children if advantage[c] > 0]
        positions = sorted({k for c in better for k in revealed[c]})
        for k in positions:
            there = [c for c in better if k in revealed[c]]
            omega = softmax([advantage[c] / temperature for c in there])
            for c, share in zip(there, omega, strict=True):
                loss = loss - coef * share * theta[c, k] / len(positions)
        losses.append(loss)
    return sum(losses) / len(losses)
