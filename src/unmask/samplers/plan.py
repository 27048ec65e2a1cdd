"""How many tokens are fixed in which step, and the checks of a sampler's lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmask.errors import ConfigError


def reveal_counts(num_tokens: int, num_steps: int) -> list[int]:
    """Tokens to fix in each step: num_tokens // num_steps, one more in the first num_tokens % num_steps steps.

    Source: LLaDA, arXiv:2502.09992, per block.
    """
    base, extra = divmod(num_tokens, num_steps)
    return [base + (step < extra) for step in range(num_steps)]


def time_grid_counts(num_tokens: int, num_steps: int) -> list[int]:
    """Tokens to fix in each step from t to s: int(tokens left * (1 - s/t)), in the last step all that are left.

    Rounded down from float32 products, as published: with one step per token the first step fixes none, which the
    last makes up for. Source: Dream, arXiv:2508.15487.
    """
    counts: list[int] = []
    for share in time_grid_shares(num_steps):
        counts.append(int((num_tokens - sum(counts)) * share))
    return counts


def time_grid_shares(num_steps: int) -> Tensor:  # (S,) float32
    """1 - s/t for each step of the grid of times from 1 down to 1e-3; 1 for the last step, which leaves nothing."""
    times = torch.linspace(1, 1e-3, num_steps + 1)  # on the CPU, so that the counts are the same on every machine
    shares = 1 - times[1:] / times[:-1]
    shares[-1] = 1
    return shares


def check_lengths(gen_length: int, block_length: int | None, temperature: float) -> None:
    """Raises: ConfigError unless blocks tile the completion and the temperature is finite and not negative."""
    if gen_length < 1:
        raise ConfigError(f"sampler.gen_length = {gen_length}: must be at least 1 token. Try 16.")
    if block_length is not None and (block_length < 1 or gen_length % block_length):
        divisors = [d for d in range(1, gen_length + 1) if gen_length % d == 0]
        raise ConfigError(
            f"sampler.block_length = {block_length}: must divide sampler.gen_length = {gen_length}. "
            f"{_try_nearest(block_length, divisors)}"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"sampler.temperature = {temperature}: must be finite and not negative. Try 0.0 or 1.0.")


def check_steps(gen_length: int, num_blocks: int, num_steps: int | None) -> None:
    """Raises: ConfigError unless every block gets the same number of steps and every step has a token to fix."""
    if num_steps is None:
        return
    possible = range(num_blocks, gen_length + 1, num_blocks)
    if num_steps < 1 or num_steps % num_blocks:
        raise ConfigError(
            f"sampler.num_steps = {num_steps}: must be a multiple of the number of blocks, gen_length / block_length "
            f"= {num_blocks}. {_try_nearest(num_steps, possible)}"
        )
    if num_steps > gen_length:
        raise ConfigError(
            f"sampler.num_steps = {num_steps}: steps beyond sampler.gen_length = {gen_length} have no token left to "
            f"fix. Try {gen_length}."
        )


def _try_nearest(value: int, possible: range | list[int]) -> str:
    """The acceptable values next to the one found, the larger first."""
    nearest = [
        min((p for p in possible if p > value), default=None),
        max((p for p in possible if p < value), default=None),
    ]
    return f"Try {' or '.join(str(p) for p in nearest if p is not None)}."
