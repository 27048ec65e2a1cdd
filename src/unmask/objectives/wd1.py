"""wd1, arXiv:2507.08838: weighted likelihood instead of a ratio; with wd1-P, its positive part, and wd1++, by steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmask.advantages import ADVANTAGES, group_softmax
from unmask.corruption import draw_full_mask
from unmask.corruption_steps import draw_trajectory
from unmask.likelihood import sequence_estimate
from unmask.objectives.policy_gradient import (
    check_num_masks,
    check_prompt_mask_ratio,
    check_reading,
    chosen_mean,
    require,
    require_choice,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts

LIKELIHOODS = ("mean_field", "trajectory")


@dataclass(frozen=True)
class WD1:
    """Log-likelihood weighted by a softmax of the advantages, less one by a softmax of their negatives.

        loss = -(1/N) Σ_groups Σ_i ( w⁺_i - w⁻_i ) · log π(y_i)
        w±   = softmax over the group of ±ψ A_i,     ψ = 1 / (old_coef + ref_coef)
        log π(y_i) = Σ_k c_ik log π(y_ik | prompt with some tokens masked, all masked)

    N is the number of groups; c marks the positions up to and including the stop token; the sum over k is not divided
    by a length. The target is the geometric mixture of old policy and reference, tilted by the reward:

        argmax_π  E_π[A] - old_coef · KL(π ‖ π_old) - ref_coef · KL(π ‖ π_ref)  ∝  π_old^(1-b) · π_ref^b · exp(ψ A)
        b = ref_coef / (old_coef + ref_coef)

    so the weights belong to rollouts of that mixture, which with `ref_coef` above 0 they are drawn from, token by
    token. Neither model is scored, and nothing is clipped. `positive_only` leaves out w⁻ (wd1-P).

    With `likelihood = "trajectory"` (wd1++) the weights are the same, and the likelihood is that of the steps in which
    the sampler wrote the completion, s(k) the step that revealed token k:

        log π(y_i; s_i) = Σ_k c_ik log π(y_ik | prompt, tokens of steps before s_i(k))

    Defaults are the paper's. The paper takes the softmax over the completions of all prompts, its code over those of
    one device's micro-batch; we take it over the group, which is what the code does when a device holds one group. The
    code does not divide by the number of groups. It may mask left pads; we never do.

    Oracle: tests/test_wd1.py::test_loss_equals_the_loop_oracle
    """

    likelihood: str = "mean_field"
    """"mean_field": all tokens at once, behind partly masked prompts; "trajectory": each in the state that the sampler
    revealed it in (wd1++), one copy for each step, the same in all passes. It draws nothing at random: it goes with
    prompt_mask_ratio 0, fresh_masks false and num_masks 1."""
    num_masks: int = 1
    """K, draws of the prompt mask whose log-probabilities are averaged. Without prompt masking one copy is read, as
    all would be the same."""
    prompt_mask_ratio: float = 0.15
    """Share of prompt tokens hidden from the policy, which keeps the inner passes from overfitting."""
    num_iterations: int = 8
    """μ, optimiser passes over the same rollouts (scripts: 12, Sudoku 8)."""
    fresh_masks: bool = True
    """A new prompt mask for each pass."""
    old_coef: float = 1.0
    """λ, pull to the old policy; larger values flatten the weights."""
    ref_coef: float = 0.0
    """β, pull to the reference. Above 0 rollouts are drawn from logits (1 - b) · policy + b · reference, with
    b = β / (λ + β), which takes two forwards a step; larger values flatten the weights."""
    positive_only: bool = False
    """True leaves out the negative weights: wd1-P."""
    advantage: str = "group_centered"
    """"group_centered" (paper), "leave_one_out" or "z_score"."""
    count_positions: str = "to_eos"
    """"to_eos": tokens up to and including the stop token (published code); "all": the whole canvas."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    share_masks: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv:2507.08838"

    def __post_init__(self) -> None:
        check_reading(self)
        require_choice("likelihood", self.likelihood, LIKELIHOODS)
        check_num_masks(self.num_masks)
        check_prompt_mask_ratio(self.prompt_mask_ratio)
        require(
            0 < self.old_coef < float("inf"),
            "old_coef",
            self.old_coef,
            "λ, a temperature of the weights. Use a number above 0; 1 is the published setting.",
        )
        require(
            0 <= self.ref_coef < float("inf"),
            "ref_coef",
            self.ref_coef,
            "β, the pull to the reference. Use 0, the published setting, or more.",
        )
        require(
            self.old_coef + self.ref_coef < float("inf") and self.needs.reference_share < 1,
            "ref_coef",
            self.ref_coef,
            f"leaves old_coef = {self.old_coef} no share of the mixture. Use numbers of the same size.",
        )
        if self.likelihood == "trajectory":
            for field, value in (("prompt_mask_ratio", 0), ("fresh_masks", False), ("num_masks", 1)):
                require(
                    getattr(self, field) == value,
                    field,
                    getattr(self, field),
                    'with likelihood = "trajectory" the copies are the states of the sampler, and nothing is masked at '
                    "random. Set algorithm.prompt_mask_ratio = 0, algorithm.fresh_masks = false and "
                    "algorithm.num_masks = 1.",
                )

    @property
    def needs(self) -> Needs:
        share = self.ref_coef / (self.old_coef + self.ref_coef)
        return Needs(reference_share=share, order=self.likelihood == "trajectory")

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) the signed weights w⁺ - w⁻; they add up to zero in each group. With `positive_only` w⁺, to one."""
        scaled = ADVANTAGES[self.advantage](rewards, groups) / (self.old_coef + self.ref_coef)
        positive = group_softmax(scaled, groups)
        return positive if self.positive_only else positive - group_softmax(-scaled, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """Fully masked completions behind partly masked prompts, or the states of the sampler."""
        if self.likelihood == "trajectory":
            return draw_trajectory(rollouts, count_positions=self.count_positions)
        return draw_full_mask(
            rollouts,
            self.num_masks if self.prompt_mask_ratio > 0 else 1,
            prompt_mask_ratio=self.prompt_mask_ratio,
            count_positions=self.count_positions,
            noise=noise.stream(str(iteration)),
        )

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        logps = sequence_estimate(x.logps, x.corruption)  # (B,)
        weight = x.advantages.to(logps)  # (B,)
        loss = -(weight * logps).sum() / len(x.groups.unique())
        metrics = {
            "policy_loss": float(loss.detach()),
            "weight_max": float(weight.abs().max()),
            f"{self.likelihood}_logp_good": chosen_mean(logps, weight > 0),
            f"{self.likelihood}_logp_bad": chosen_mean(logps, weight < 0),
        }
        return LossOutput(loss, metrics)
