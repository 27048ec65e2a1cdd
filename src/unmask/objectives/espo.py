"""ESPO, arXiv:2512.03759, with the ablations of its action space, likelihood and KL estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmask.advantages import ADVANTAGES, scale_negative
from unmask.corruption import counted_positions, draw_full_mask, draw_uniform_count, sequence_length
from unmask.likelihood import token_estimate
from unmask.objectives.policy_gradient import (
    check_num_masks,
    check_policy_gradient,
    check_prompt_mask_ratio,
    clipped_surrogate,
    kl_estimate,
    old_scores,
    ratio_metrics,
    ref_scores,
    require,
    require_choice,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts

LIKELIHOODS = ("elbo", "mean_field")
LEVELS = ("sequence", "token")
SCALES = ("per_length", "none")


@dataclass(frozen=True)
class ESPO:
    """Sequence-level clipped surrogate on an ELBO estimate, with a squared-difference KL.

        loss = mean_i [ -min(ρ_i A_i, clip(ρ_i) A_i) + kl_coef · KL_i ]
        ρ_i = exp( (B_i - B_i^old) / L ),     KL_i = ½ (B_i - B_i^ref)² / L

    B is estimated on the same masked copies for policy, old policy and reference. `level = "token"` replaces the
    ratio by one for each position, exp(B_i^k - B_i^{old,k}), with surrogate and KL averaged over positions.

    Defaults are the paper's GSM8K setting. Where paper and published code differ we follow the code: advantages are
    leave-one-out (paper: centred, smaller by (G-1)/G), the KL is divided by L (paper: not). The code's k1 adds a
    score-function term; ours, like the paper's, does not. The log-ratio is clamped to ±20 nats (neither does).

    Oracle: tests/test_objectives.py::test_espo_equals_the_loop_oracle
    """

    likelihood: str = "elbo"
    """"elbo", or "mean_field": the one-step likelihood of a fully masked completion (App. C.1)."""
    level: str = "sequence"
    """"sequence": one ratio for each rollout; "token": one for each position (App. C.1)."""
    num_masks: int = 4
    """K, masked copies per rollout; the paper's M = 2 coupled draws. "mean_field" without prompt masking reads one
    copy, as all would be the same."""
    coupled: bool = True
    """Draw masks in complementary pairs; `num_masks` must then be even."""
    stratify: bool = True
    """Spread the mask counts of one rollout's draws evenly (ours; the published code spreads them over rows)."""
    num_iterations: int = 8
    """μ, optimiser passes over the same rollouts."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    share_masks: bool = True
    """Policy, old policy and reference read the same copies; independent draws drown the ratio in noise."""
    clip_low: float = 0.2
    """Distance of the lower clip bound below a ratio of 1."""
    clip_high: float = 0.2
    """Distance of the upper clip bound above a ratio of 1."""
    ratio_scale: str = "per_length"
    """"per_length": the log-ratio of a sequence is divided by L, as published; "none": not (an ablation)."""
    kl: str = "k2"
    """Estimator of the KL to the reference: "k1", "k2" or "k3"."""
    kl_coef: float = 1e-3
    """β, weight of the KL; 0 needs no reference model."""
    kl_scale: str = "per_length"
    """"per_length": KL divided by L, as in the published code; "none": not, as in the paper."""
    advantage: str = "leave_one_out"
    """"leave_one_out" (published code), "group_centered" (paper) or "z_score"."""
    negative_scale: float = 1.0
    """Factor of negative advantages. A departure of ours; 1 is the published method."""
    count_positions: str = "all"
    """"all": L is the canvas, end-of-text padding included (published code); "to_eos": up to the stop token."""
    prompt_mask_ratio: float = 0.0
    """Share of prompt tokens hidden in "mean_field" copies; "elbo" copies show the whole prompt."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    source: ClassVar[str] = "arXiv:2512.03759"

    def __post_init__(self) -> None:
        check_policy_gradient(self)
        check_num_masks(self.num_masks)
        check_prompt_mask_ratio(self.prompt_mask_ratio)
        require_choice("likelihood", self.likelihood, LIKELIHOODS)
        require_choice("level", self.level, LEVELS)
        require_choice("kl_scale", self.kl_scale, SCALES)
        require_choice("ratio_scale", self.ratio_scale, SCALES)
        require(
            self.level == "sequence" or self.ratio_scale == "per_length",
            "ratio_scale",
            self.ratio_scale,
            'a token\'s ratio has no length to be divided by. Set "per_length", or algorithm.level = "sequence".',
        )
        require(
            self.likelihood != "elbo" or not self.coupled or self.num_masks % 2 == 0,
            "num_masks",
            self.num_masks,
            "espo draws masks in complementary pairs, so it must be even. Try 2 or 4, or algorithm.coupled = false.",
        )
        require(
            self.likelihood == "mean_field" or self.prompt_mask_ratio == 0,
            "prompt_mask_ratio",
            self.prompt_mask_ratio,
            'an ELBO is conditioned on the whole prompt. Set it to 0, or algorithm.likelihood = "mean_field".',
        )

    @property
    def needs(self) -> Needs:
        return Needs(old=True, ref=self.kl_coef > 0)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), by the estimator `advantage`, negative ones times `negative_scale`."""
        return scale_negative(ADVANTAGES[self.advantage](rewards, groups), self.negative_scale)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` copies of each rollout: coupled or independent subsets, or the full mask."""
        if self.likelihood == "elbo":
            return draw_uniform_count(
                rollouts,
                self.num_masks,
                coupled=self.coupled,
                stratify=self.stratify,
                count_positions=self.count_positions,
                noise=noise.stream(str(iteration)),
            )
        return draw_full_mask(
            rollouts,
            self.num_masks if self.prompt_mask_ratio > 0 else 1,
            prompt_mask_ratio=self.prompt_mask_ratio,
            count_positions=self.count_positions,
            noise=noise.stream(str(iteration)),
        )

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class; N is 1 at sequence level and L at token level."""
        length = sequence_length(x.length, x.logps.shape[-1], self.count_positions)  # (B,)
        per_token = token_estimate(x.logps, x.corruption)  # (B, L)
        advantages = x.advantages.to(per_token)[:, None]  # (B, 1)
        counted = counted_positions(length, x.logps.shape[-1])  # (B, L)
        if self.level == "sequence":
            counted = counted[:, :1]
        # one action a row: the ratio is that of the geometric mean over its tokens
        is_divided = self.level == "sequence" and self.ratio_scale == "per_length"
        tokens_per_action = length[:, None].to(per_token) if is_divided else 1.0

        log_ratio = self._difference(per_token, *old_scores(x, "ESPO")) / tokens_per_action  # (B, N)
        gain = clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high)
        loss = policy_loss = -((gain * counted).sum(1) / counted.sum(1)).mean()
        metrics = ratio_metrics(log_ratio, advantages, counted, self.clip_low, self.clip_high)
        metrics["policy_loss"] = float(policy_loss.detach())
        if self.needs.ref:
            kl = kl_estimate(self._difference(per_token, *ref_scores(x, "ESPO")), self.kl)  # (B, N)
            kl_per_row = (kl * counted).sum(1) / (length if self.kl_scale == "per_length" else 1)
            penalty = self.kl_coef * kl_per_row.mean()
            loss = policy_loss + penalty
            metrics["kl_penalty"] = float(penalty.detach())
        return LossOutput(loss, metrics)

    def _difference(self, per_token: Tensor, other_logps: Tensor, other: Corruption) -> Tensor:
        """Estimate of the policy minus that of another model, (B, 1) at sequence level, (B, L) at token level."""
        # token by token before the sum: a small difference of large sums would lose digits in float32
        difference = per_token - token_estimate(other_logps.to(per_token), other)
        return difference.sum(1, keepdim=True) if self.level == "sequence" else difference
