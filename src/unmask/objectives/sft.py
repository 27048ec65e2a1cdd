"""Supervised fine-tuning of a masked diffusion model on given completions: the negative ELBO per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmask.corruption import draw_stratified_rows, draw_uniform_count
from unmask.likelihood import elbo
from unmask.objectives.policy_gradient import require
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts


@dataclass(frozen=True)
class SFT:
    """Masked-diffusion cross-entropy on completions that come from a dataset.

        loss = -mean_i (1/L) · (L/m_i) · Σ_{k∈S_i} log π(y_ik | prompt, y_i outside S_i),     m_i ~ U{1..L}, |S_i| = m_i

    The whole canvas counts, end-of-text padding included, so that the model learns to stop. Rewards play no part.
    Source: LLaDA, arXiv:2502.09992 Eq. 5; it masks each token with probability t and weights by 1/t, the same
    expectation with a heavier tail.
    """

    num_masks: int = 1
    """K, masked copies per completion and pass."""
    stratify_rows: bool = True
    """Spread the mask counts evenly over 1..L across the rows of a batch (ours; lowers variance, same expectation)."""
    num_iterations: int = 1
    """Optimiser passes over the same batch."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    share_masks: bool = True
    """Without effect: no other model is scored."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)

    def __post_init__(self) -> None:
        require(self.num_masks >= 1, "num_masks", self.num_masks, "the loss is read from masked copies. Use 1 or more.")
        require(self.num_iterations >= 1, "num_iterations", self.num_iterations, "a batch is used at least once.")

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) zeros; there is nothing to compare."""
        return torch.zeros_like(rewards)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` independent subsets of each completion."""
        noise = noise.stream(str(iteration))
        if self.stratify_rows:
            return draw_stratified_rows(rollouts, self.num_masks, noise=noise)
        return draw_uniform_count(rollouts, self.num_masks, coupled=False, noise=noise)

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class; `elbo` in nats per completion, `elbo_per_token` in nats."""
        bound = elbo(x.logps, x.corruption).mean()
        loss = -bound / x.logps.shape[-1]
        return LossOutput(loss, {"elbo": float(bound.detach()), "elbo_per_token": -float(loss.detach())})
