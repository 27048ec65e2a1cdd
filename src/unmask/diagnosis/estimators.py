"""Every likelihood estimator of the library as one entry: how it draws, what it makes of the reads, and its exact law.

The draws are those of corruption.py, with the settings that the objectives have by default. `NoiseLike` in, nothing
else: an entry neither sees a model nor an enumerated table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask.corruption import (
    draw_blocks,
    draw_coupled_tokens,
    draw_full_mask,
    draw_quadrature,
    draw_rising_ratio,
    draw_uniform_count,
)
from unmask.diagnosis import laws
from unmask.diagnosis.exact import eubo_limit
from unmask.likelihood import eubo, sequence_estimate
from unmask.types import Corruption, NoiseLike, Rollouts

MIN_MASK_RATIO = 1e-3
"""ε of the continuous estimator: the published pre-training code of LLaDA draws t from (ε, 1) with this one."""
PROMPT_MASK_RATIO = 0.15
"""Share of the prompt that d1 and SPG hide."""


@dataclass(frozen=True)
class Estimator:
    """One way to estimate log p from masked copies."""

    name: str
    """As rows of the result are called."""
    used_by: str
    """Who estimates so: algorithms of this library, or a paper."""
    forwards: int
    """Masked copies per draw, also those that chance leaves empty, which cost nothing."""
    draw: Callable[..., Corruption]
    """(rollouts, noise=) -> masked copies."""
    law: Callable[[Tensor], laws.Moments] | None = None
    """Exact mean and variance from a table; None where they are known from draws alone."""
    estimate: Callable[[Tensor, Corruption], Tensor] = sequence_estimate
    """(logps, corruption) -> (B,) nats."""
    limit: Callable[[Tensor], Tensor] | None = None
    """What an estimate that is not linear in the table tends to with many copies; None for all others."""
    hides_prompt: bool = False
    """Whether copies hide prompt tokens: no table has their reads, so the model is run."""


def draw_continuous(
    rollouts: Rollouts,
    num_masks: int,
    *,
    min_mask_ratio: float,
    noise: NoiseLike,
) -> Corruption:
    """Copies at mask ratios t ~ U(ε, 1), each position masked with probability t, read with weight 1/t.

    The textbook form of the ELBO, from which the law of `draw_uniform_count` follows by taking |S| for what it is. The
    weight is unbounded as ε → 0, and so is the variance: of a single masked token, ∫ dt / t. No algorithm draws so.

    Source: LLaDA, arXiv:2502.09992, Eq. 3; ε as in its published code.
    """
    copy = torch.arange(num_masks, device=rollouts.length.device)[:, None]
    places = torch.arange(rollouts.completion_length, device=copy.device)
    key, index = rollouts.prompt_key[:, None, None], rollouts.rollout_index[:, None, None]
    ratio = min_mask_ratio + (1 - min_mask_ratio) * noise.stream("ratio").uniform(key, index, copy)  # (B, K, 1)
    scored = noise.stream("bernoulli").uniform(key, index, copy, places) < ratio
    return Corruption(_behind_prompts(rollouts, scored), scored, scored / (ratio * num_masks), "continuous")


def draw_order(rollouts: Rollouts, *, noise: NoiseLike) -> Corruption:
    """L copies along one uniformly random order: copy k masks its last L - k positions and reads the first of them."""
    places = torch.arange(rollouts.completion_length, device=rollouts.length.device)
    u = noise.stream("order").uniform(rollouts.prompt_key[:, None], rollouts.rollout_index[:, None], places)
    rank = u.argsort(stable=True).argsort(1)[:, None]  # (B, 1, L)
    scored = rank == places[:, None]
    return Corruption(_behind_prompts(rollouts, rank >= places[:, None]), scored, scored.double(), "trajectory")


def _behind_prompts(rollouts: Rollouts, hidden: Tensor) -> Tensor:
    prompt = hidden.new_zeros(*hidden.shape[:2], rollouts.prompt_ids.shape[1])
    return torch.cat([prompt, hidden], dim=2)


def estimators(length: int, gammas: Sequence[float], budget: int) -> list[Estimator]:
    """All entries for completions of `length` tokens; those with a free number of copies also with `budget` of them."""
    return [
        *_one_step(),
        Estimator(
            "continuous",
            "LLaDA's training",
            1,
            partial(draw_continuous, num_masks=1, min_mask_ratio=MIN_MASK_RATIO),
            partial(laws.continuous, min_mask_ratio=MIN_MASK_RATIO),
        ),
        *[_uniform_count(num_masks, coupled=False) for num_masks in (1, budget)],
        *[_uniform_count(num_masks, coupled=True) for num_masks in dict.fromkeys((2, budget))],
        *[_quadrature(masking) for masking in ("exact_count", "bernoulli")],
        Estimator(
            "coupled tokens",
            "coupled-GRPO",
            3,
            partial(draw_coupled_tokens, min_mask_ratio=0.2, max_mask_ratio=0.8, count_positions="all"),
            partial(laws.coupled_tokens, min_mask_ratio=0.2, max_mask_ratio=0.8),
        ),
        *_blocks(max(1, length // 2)),
        Estimator(
            "random mask",
            "UniGRPO",
            1,
            partial(draw_rising_ratio, iteration=0, num_iterations=8, num_timesteps=1000, count_positions="all"),
            partial(laws.rising_ratio, num_timesteps=1000),
        ),
        Estimator("trajectory", "DMPO, d-TreeRPO", length, draw_order, laws.trajectory),
        *[_eubo(gamma, budget) for gamma in gammas],
    ]


def _one_step() -> list[Estimator]:
    draw = partial(draw_full_mask, num_masks=1, count_positions="all")
    return [
        Estimator("mean field", "diffu-GRPO, wd1", 1, partial(draw, prompt_mask_ratio=0.0), laws.full_mask),
        Estimator(
            "mean field, prompt hidden",
            "diffu-GRPO, wd1",
            1,
            partial(draw, prompt_mask_ratio=PROMPT_MASK_RATIO),
            hides_prompt=True,
        ),
    ]


def _uniform_count(num_masks: int, *, coupled: bool) -> Estimator:
    return Estimator(
        f"coupled x{num_masks}" if coupled else f"uniform count x{num_masks}",
        "ESPO" if coupled else "VRPO, DMPO",
        num_masks,
        partial(draw_uniform_count, num_masks=num_masks, coupled=coupled),
        partial(laws.uniform_count, num_masks=num_masks, coupled=coupled),
    )


def _quadrature(masking: str) -> Estimator:
    rule: dict[str, Any] = {"rule": "gauss_legendre", "num_nodes": 3, "masking": masking}
    return Estimator(
        "quadrature" if masking == "exact_count" else "quadrature, Bernoulli",
        "GDPO",
        3,
        partial(draw_quadrature, **rule, num_masks_per_node=1, count_positions="all"),
        partial(laws.quadrature, **rule),
    )


def _blocks(block_length: int) -> list[Estimator]:
    draw = partial(draw_blocks, num_masks=2, block_length=block_length, scored_positions="block", count_positions="all")
    return [
        Estimator(
            "block x2",
            "SPG",
            2,
            partial(draw, clean_mask_ratio=0.0),
            partial(laws.blocks, num_masks=2, block_length=block_length),
        ),
        Estimator(
            "block x2, prompt hidden", "SPG", 2, partial(draw, clean_mask_ratio=PROMPT_MASK_RATIO), hides_prompt=True
        ),
    ]


def _eubo(gamma: float, num_masks: int) -> Estimator:
    return Estimator(
        f"EUBO {gamma:g} x{num_masks}",
        "EMBR-U, SPG",
        num_masks,
        partial(draw_uniform_count, num_masks=num_masks, coupled=True),
        estimate=partial(eubo, gamma=gamma),
        limit=partial(eubo_limit, gamma=gamma),
    )
