"""Exact mean and variance of likelihood estimates against loops over every outcome of a draw."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import (
    GAUSS_LEGENDRE,
    conditionals,
    elbo_dp,
    expectation_of_law,
    law_of_draws,
    order_logp,
    orders,
)
from tests.toys import TabularPolicy
from unmask.diagnosis import laws


def toy_table(length: int, seed: int = 0) -> Tensor:
    """(2^L, L): the conditionals of one completion of a model without any structure."""
    completion = torch.arange(length) % 3
    return conditionals(TabularPolicy(vocab=3, length=length, seed=seed), completion).detach()


def assert_equal(found: float | Tensor, expected: float | Tensor) -> None:
    """To 1e-10: both sides are sums of at most some thousand float64 numbers of size 1 to 100."""
    assert float(found) == pytest.approx(float(expected), abs=1e-10, rel=1e-10)


def assert_law(found: laws.Moments, outcomes: list[tuple[float, float]]) -> None:
    """Mean and variance of (probability, value) pairs that are all there are."""
    assert_equal(sum(p for p, _ in outcomes), 1)
    mean = sum(p * value for p, value in outcomes)
    assert_equal(found.mean[0], mean)
    assert_equal(found.variance[0], sum(p * (value - mean) ** 2 for p, value in outcomes))


def of_size(positions: list[int], m: int) -> list[list[int]]:
    return [list(c) for c in itertools.combinations(positions, m)]


def total(table: Tensor, S: list[int]) -> float:
    """Σ_{i∈S} l(i;S)."""
    return float(table[sum(1 << i for i in S)].sum())


def products(choices: list[list[float]], probability: float) -> list[tuple[float, float]]:
    """Sums of one value from each list, each list uniform and independent of the others."""
    p = probability / math.prod(map(len, choices))
    return [(p, sum(values)) for values in itertools.product(*choices)]


@pytest.mark.parametrize("coupled", [False, True])
def test_law_of_a_single_count_is_that_of_the_listed_outcomes(coupled):
    table = toy_table(4)
    found = laws.uniform_count(table[None], num_masks=2 if coupled else 1, coupled=coupled)
    law = law_of_draws(4, coupled=coupled)
    outcomes = [
        (p, sum(w * float(table[S].sum()) for S, w in zip(copies, weights, strict=True)))
        for copies, (p, weights) in law.items()
    ]
    assert_law(found, outcomes)
    assert_equal(found.mean[0], expectation_of_law(table, law))
    assert_equal(found.mean[0], elbo_dp(table))


@pytest.mark.parametrize(("coupled", "num_masks"), [(False, 4), (False, 2), (True, 4), (True, 6)])
def test_law_of_stratified_counts(coupled, num_masks):
    table, L = toy_table(3), 3
    everything = list(range(L))
    draws, levels = (num_masks // 2, L + 1) if coupled else (num_masks, L)
    outcomes = []
    for start in range(levels):
        choices = []
        for d in range(draws):
            level = (start + math.floor(d * levels / draws + 0.5)) % levels
            values = []
            for S in of_size(everything, level if coupled else level + 1):
                rest = [i for i in everything if i not in S]
                if coupled:
                    halves = [(L + 1) / len(C) * total(table, C) / 2 for C in (S, rest) if C]
                    values.append(sum(halves) / draws)
                else:
                    values.append(L / len(S) * total(table, S) / draws)
            choices.append(values)
        outcomes += products(choices, 1 / levels)
    assert_law(laws.uniform_count(table[None], num_masks=num_masks, coupled=coupled), outcomes)


@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
def test_law_of_quadrature(masking):
    table, L = toy_table(4), 4
    subsets = [S for m in range(L + 1) for S in of_size(list(range(L)), m)]
    nodes = []
    for t, w in GAUSS_LEGENDRE[3]:
        if masking == "exact_count":
            m = max(1, round(t * L))
            nodes.append([(1 / math.comb(L, m), w * L / m * total(table, S)) for S in of_size(list(range(L)), m)])
        else:
            nodes.append([(t ** len(S) * (1 - t) ** (L - len(S)), w / t * total(table, S)) for S in subsets])
    outcomes = [(math.prod(p for p, _ in c), sum(v for _, v in c)) for c in itertools.product(*nodes)]
    found = laws.quadrature(table[None], rule="gauss_legendre", num_nodes=3, masking=masking)
    assert_law(found, outcomes)
    if masking == "bernoulli":  # three nodes integrate the cubic of four tokens exactly
        assert_equal(found.mean[0], elbo_dp(table))


@pytest.mark.parametrize(("block_length", "num_masks"), [(2, 1), (2, 2), (3, 2), (5, 3)])
def test_law_of_blocks(block_length, num_masks):
    table, L = toy_table(5), 5
    outcomes = []
    for start in range(L):
        choices = []
        for d in range(num_masks):
            j = (start + math.floor(d * L / num_masks + 0.5)) % L
            first = j // block_length * block_length
            block = [i for i in range(first, first + block_length) if i < L]
            values = []
            for S in of_size(block, 1 + j % block_length):
                state = sum(1 << i for i in [*S, *range(first + block_length, L)])
                values.append(L / len(S) / num_masks * float(table[state, S].sum()))
            choices.append(values)
        outcomes += products(choices, 1 / L)
    found = laws.blocks(table[None], num_masks=num_masks, block_length=block_length)
    assert_law(found, outcomes)
    assert_equal(found.mean[0], elbo_dp(table, block_length))


def test_law_of_a_trajectory_and_of_the_first_rising_pass():
    table, L = toy_table(5), 5
    assert_law(laws.trajectory(table[None]), [(1 / math.factorial(L), float(order_logp(table, o))) for o in orders(L)])
    steps = [max(1, math.floor(L * t / 7 + 0.5)) for t in range(7)]
    outcomes = [(1 / 7 / math.comb(L, m), total(table, S)) for m in steps for S in of_size(list(range(L)), m)]
    assert_law(laws.rising_ratio(table[None], num_timesteps=7), outcomes)
    assert_law(laws.full_mask(table[None]), [(1.0, total(table, list(range(L))))])


def integral_of_powers(power: int, rest: int, low: float, high: float) -> float:
    """∫ t^power (1-t)^rest dt, by the binomial theorem; power may be -1."""
    value = 0.0
    for k in range(rest + 1):
        n = power + k + 1
        primitive = math.log(high / low) if n == 0 else (high**n - low**n) / n
        value += math.comb(rest, k) * (-1) ** k * primitive
    return value


def test_law_of_continuous_ratios():
    table, L, low = toy_table(4), 4, 1e-3
    first = second = 0.0
    for S in (S for m in range(1, L + 1) for S in of_size(list(range(L)), m)):
        m = len(S)
        first += integral_of_powers(m - 1, L - m, low, 1) / (1 - low) * total(table, S)
        second += integral_of_powers(m - 2, L - m, low, 1) / (1 - low) * total(table, S) ** 2
    found = laws.continuous(table[None], min_mask_ratio=low)
    assert_equal(found.mean[0], first)
    assert_equal(found.variance[0], second - first**2)
    assert abs(first - float(elbo_dp(table))) < 1e-2  # the ratios that are left out are a thousandth
    spread = [float(laws.continuous(table[None], min_mask_ratio=10.0**-k).variance) for k in (3, 6, 9)]
    # each factor of a thousand adds log(1000) · Σ_i l(i;{i})²: there is no limit
    assert spread[2] - spread[1] == pytest.approx(spread[1] - spread[0], rel=2e-2)
    assert spread[1] > spread[0]


def test_law_of_coupled_tokens():
    table, L, low, high = toy_table(4), 4, 0.2, 0.8
    x, w = np.polynomial.legendre.leggauss(40)
    subsets = [S for m in range(L + 1) for S in of_size(list(range(L)), m)]
    outcomes = []
    for t, weight in zip(0.5 + 0.3 * x, w / 2, strict=True):
        for S in subsets:
            rest = [i for i in range(L) if i not in S]
            value = (total(table, list(range(L))) + total(table, S) / t + total(table, rest) / (1 - t)) / 2
            outcomes.append((weight * t ** len(S) * (1 - t) ** len(rest), value))
    assert_law(laws.coupled_tokens(table[None], min_mask_ratio=low, max_mask_ratio=high), outcomes)
