"""SAPO, step-aware policy optimisation, arXiv:2510.01544 (another SAPO, "soft adaptive", is not meant)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from unmask.advantages import ADVANTAGES, scale_negative
from unmask.corruption import counted_positions, draw_full_mask, sequence_length
from unmask.objectives.policy_gradient import (
    check_num_masks,
    check_policy_gradient,
    check_prompt_mask_ratio,
    require,
    token_level_loss,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts


@dataclass(frozen=True)
class SAPO:
    """diffu-GRPO whose better rollouts also earn what their first steps did for the reward.

        loss = Σ_{i,k} c_ik [ -min(ρ_ik Â_i, clip(ρ_ik) Â_i) + kl_coef · k3_ik ] / Σ_{i,k} c_ik
        Â_i  = A_i + 1[A_i > 0] · process_coef · R_proc,i
        ρ_ik = exp( l_ik - l_ik^old ),     l_ik = log π(y_ik | prompt with some tokens masked, all masked)

    R_proc,i is found while rolling out: completions are written anew from a state on the way to y_i, and their mean
    reward is compared with the mean of the group. The same number for all tokens; it may turn a positive advantage
    negative, and is not clamped. c marks the positions up to and including the stop token.

    The authors' code could not be obtained. What the paper leaves open is diffu-GRPO's: token mean over the batch,
    clip, KL. `process_coef` is ours, 1 is the paper. The log-ratio is clamped to ±20 nats.

    Oracle: tests/test_sapo.py::test_loss_equals_the_loop_oracle
    """

    num_masks: int = 1
    """K, draws of the prompt mask whose log-probabilities are averaged. Without prompt masking one copy is read, as
    all would be the same."""
    prompt_mask_ratio: float = 0.15
    """Share of prompt tokens hidden from the policy, which keeps the inner passes from overfitting."""
    process_coef: float = 1.0
    """Weight of the process reward beside the advantage; 0 is diffu-GRPO."""
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
    """"group_centered" (paper), "leave_one_out" or "z_score". The process reward is on the scale of the first."""
    negative_scale: float = 1.0
    """Factor of negative advantages. A departure of ours; 1 is the published method."""
    count_positions: str = "to_eos"
    """"to_eos": tokens up to and including the stop token (diffu-GRPO's); "all": the whole canvas."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("steps",)
    source: ClassVar[str] = "arXiv:2510.01544"

    def __post_init__(self) -> None:
        check_policy_gradient(self)
        check_num_masks(self.num_masks)
        check_prompt_mask_ratio(self.prompt_mask_ratio)
        require(
            0 <= self.process_coef < float("inf"),
            "process_coef",
            self.process_coef,
            "weight of the process reward. Use 1 for the published method, or 0 for diffu_grpo.",
        )

    @property
    def needs(self) -> Needs:
        return Needs(old=True, ref=self.kl_coef > 0)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), by the estimator `advantage`, without process rewards; negative ones times `negative_scale`."""
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
        """The equation of the class.

        Raises: ValueError if there are no process rewards.
        """
        if x.process_rewards is None:
            raise ValueError('SAPO.loss() got no process_rewards; collect rollouts by rollout.type = "steps".')
        is_better = x.advantages > 0
        process = x.process_rewards.to(x.advantages)
        # where, not a product: what stands in the other rows is nobody's number
        gain = torch.where(is_better, self.process_coef * process, torch.zeros_like(process))
        length = sequence_length(x.length, x.logps.shape[-1], self.count_positions)
        counted = counted_positions(length, x.logps.shape[-1])  # (B, L)
        out = token_level_loss(replace(x, advantages=x.advantages + gain), counted, self, per_rollout=False)
        total = is_better.sum().clamp(min=1)
        metrics = {
            "process_reward": float(process.masked_fill(~is_better, 0.0).sum() / total),
            "process_reward_negative": float((is_better & (process < 0)).sum() / total),
        }
        return LossOutput(out.loss, out.metrics | metrics)
