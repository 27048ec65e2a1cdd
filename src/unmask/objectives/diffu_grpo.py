"""diffu-GRPO, the reinforcement-learning half of d1, arXiv:2504.12216."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmask.advantages import ADVANTAGES, scale_negative
from unmask.corruption import counted_positions, draw_full_mask, sequence_length
from unmask.objectives.policy_gradient import (
    check_num_masks,
    check_policy_gradient,
    check_prompt_mask_ratio,
    token_level_loss,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts


@dataclass(frozen=True)
class DiffuGRPO:
    """Token-level clipped surrogate on the one-step mean-field likelihood, with a token-level KL.

        loss = Σ_{i,k} c_ik [ -min(ρ_ik A_i, clip(ρ_ik) A_i) + kl_coef · k3_ik ] / Σ_{i,k} c_ik
        ρ_ik = exp( l_ik - l_ik^old ),     l_ik = log π(y_ik | prompt with some tokens masked, all masked)

    c marks the positions up to and including the stop token. Defaults are the published GSM8K setting. The paper
    averages over the tokens of each completion; its code, and we, over those of the whole batch. The code may mask
    left pads; we never do. The log-ratio is clamped to ±20 nats (neither does).

    Oracle: tests/test_objectives.py::test_diffu_grpo_equals_the_loop_oracle
    """

    num_masks: int = 1
    """K, draws of the prompt mask whose log-probabilities are averaged. Without prompt masking one copy is read, as
    all would be the same."""
    prompt_mask_ratio: float = 0.15
    """Share of prompt tokens hidden from the policy, which keeps the inner passes from overfitting."""
    num_iterations: int = 12
    """μ, optimiser passes over the same rollouts (8 for Countdown and Sudoku)."""
    fresh_masks: bool = True
    """A new prompt mask for each pass."""
    share_masks: bool = True
    """Policy, old policy and reference read the same copies."""
    clip_low: float = 0.5
    """Distance of the lower clip bound below a ratio of 1."""
    clip_high: float = 0.5
    """Distance of the upper clip bound above a ratio of 1."""
    kl: str = "k3"
    """Estimator of the KL to the reference: "k1", "k2" or "k3"."""
    kl_coef: float = 0.04
    """β, weight of the KL; 0 needs no reference model."""
    advantage: str = "group_centered"
    """"group_centered" (paper), "leave_one_out" or "z_score"."""
    negative_scale: float = 1.0
    """Factor of negative advantages. A departure of ours; 1 is the published method."""
    count_positions: str = "to_eos"
    """"to_eos": tokens up to and including the stop token (published code); "all": the whole canvas."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    source: ClassVar[str] = "arXiv:2504.12216"

    def __post_init__(self) -> None:
        check_policy_gradient(self)
        check_num_masks(self.num_masks)
        check_prompt_mask_ratio(self.prompt_mask_ratio)

    @property
    def needs(self) -> Needs:
        return Needs(old=True, ref=self.kl_coef > 0)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), by the estimator `advantage`, negative ones times `negative_scale`."""
        return scale_negative(ADVANTAGES[self.advantage](rewards, groups), self.negative_scale)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """Fully masked completions behind partly masked prompts."""
        return draw_full_mask(
            rollouts,
            self.num_masks if self.prompt_mask_ratio > 0 else 1,
            prompt_mask_ratio=self.prompt_mask_ratio,
            count_positions=self.count_positions,
            noise=noise.stream(str(iteration)),
        )

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        length = sequence_length(x.length, x.logps.shape[-1], self.count_positions)
        counted = counted_positions(length, x.logps.shape[-1])  # (B, L)
        return token_level_loss(x, counted, self, per_rollout=False)
