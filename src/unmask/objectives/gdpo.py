"""GDPO, group diffusion policy optimisation, arXiv:2510.08554 (another GDPO, of several rewards, is not meant)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmask.advantages import ADVANTAGES, scale_negative
from unmask.corruption import MASKINGS, draw_quadrature, quadrature_rule, sequence_length
from unmask.likelihood import token_estimate
from unmask.objectives.policy_gradient import (
    check_num_masks,
    check_policy_gradient,
    clipped_surrogate,
    kl_estimate,
    old_scores,
    ratio_metrics,
    ref_scores,
    require_choice,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts

RATIO_SCALES = ("per_length", "none")


@dataclass(frozen=True)
class GDPO:
    """Sequence-level clipped surrogate on an ELBO whose integral over mask ratios is a quadrature.

        loss = mean_i [ -min(ρ_i A_i, clip(ρ_i) A_i) + kl_coef · k3( (B_i - B_i^ref) / L ) ]
        ρ_i  = exp( (B_i - B_i^old) / L )
        B_i  = Σ_n ω_n (1/K) Σ_k (L/m_n) Σ_{j∈S_nk} log π(y_ij | prompt, y_i outside S_nk),     |S_nk| = m_n

    ω_n are the weights of Gauss-Legendre nodes t_n on [0, 1], m_n = max(1, round(t_n L)), K = `num_masks_per_node`.

    The paper's ratio is exp(B - B^old), which overflows for hundreds of tokens; we divide by L (`ratio_scale = "none"`
    does not), and treat the difference in the KL alike. The paper divides the gain by the length as well; here it is
    the mean over rollouts. Its code could not be obtained. A re-implementation weights exact counts by 1/t_n, which
    misjudges a constant log-probability; we weight by L/m_n. What the paper leaves open (mu, clip range, KL) is
    diffu-GRPO's. The log-ratio is clamped to ±20 nats.

    Oracle: tests/test_gdpo.py::test_loss_equals_the_loop_oracle
    """

    num_nodes: int = 3
    """N, mask ratios at which the ELBO is read (paper: 2 or 3)."""
    num_masks_per_node: int = 1
    """K, masked copies at each ratio."""
    quadrature: str = "gauss_legendre"
    """"gauss_legendre", or "simpson": nodes 0.1, 0.5, 1 with weights 1/6, 4/6, 1/6."""
    masking: str = "exact_count"
    """"exact_count": m_n tokens, weight L/m_n; "bernoulli": each token with probability t_n, weight 1/t_n."""
    num_iterations: int = 12
    """μ, optimiser passes over the same rollouts (diffu-GRPO's; 8 for Countdown and Sudoku)."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    share_masks: bool = True
    """Policy, old policy and reference read the same copies."""
    clip_low: float = 0.5
    """Distance of the lower clip bound below a ratio of 1."""
    clip_high: float = 0.5
    """Distance of the upper clip bound above a ratio of 1."""
    ratio_scale: str = "per_length"
    """"per_length": differences of estimates are divided by L, in ratio and KL; "none": not, as in the paper."""
    kl: str = "k3"
    """Estimator of the KL to the reference: "k1", "k2" or "k3"."""
    kl_coef: float = 0.04
    """β, weight of the KL; 0 needs no reference model."""
    advantage: str = "group_centered"
    """"group_centered" (paper), "leave_one_out" or "z_score"."""
    negative_scale: float = 1.0
    """Factor of negative advantages. A departure of ours; 1 is the published method."""
    count_positions: str = "all"
    """"all": L is the canvas, end-of-text padding included; "to_eos": up to the stop token. The paper does not say."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    source: ClassVar[str] = "arXiv:2510.08554"

    def __post_init__(self) -> None:
        check_policy_gradient(self)
        check_num_masks(self.num_masks_per_node, "num_masks_per_node")
        require_choice("masking", self.masking, MASKINGS)
        require_choice("ratio_scale", self.ratio_scale, RATIO_SCALES)
        quadrature_rule(self.quadrature, self.num_nodes)  # refuses what it does not have

    @property
    def needs(self) -> Needs:
        return Needs(old=True, ref=self.kl_coef > 0)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), by the estimator `advantage`, negative ones times `negative_scale`."""
        return scale_negative(ADVANTAGES[self.advantage](rewards, groups), self.negative_scale)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_nodes` · `num_masks_per_node` copies of each rollout."""
        return draw_quadrature(
            rollouts,
            rule=self.quadrature,
            num_nodes=self.num_nodes,
            num_masks_per_node=self.num_masks_per_node,
            masking=self.masking,
            count_positions=self.count_positions,
            noise=noise.stream(str(iteration)),
        )

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        estimate = token_estimate(x.logps, x.corruption)  # (B, L)
        length = sequence_length(x.length, x.logps.shape[-1], self.count_positions)  # (B,)
        scale = length.to(estimate) if self.ratio_scale == "per_length" else 1.0

        def difference(logps: Tensor, corruption: Corruption) -> Tensor:
            # token by token before the sum: a small difference of large sums would lose digits in float32
            return (estimate - token_estimate(logps.to(estimate), corruption)).sum(1) / scale  # (B,)

        advantages = x.advantages.to(estimate)  # (B,)
        log_ratio = difference(*old_scores(x, "GDPO"))
        loss = policy_loss = -clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high).mean()
        everywhere = torch.ones_like(advantages, dtype=torch.bool)[:, None]  # (B, 1)
        metrics = ratio_metrics(log_ratio[:, None], advantages[:, None], everywhere, self.clip_low, self.clip_high)
        metrics["policy_loss"] = float(policy_loss.detach())
        if self.needs.ref:
            penalty = self.kl_coef * kl_estimate(difference(*ref_scores(x, "GDPO")), self.kl).mean()
            loss = policy_loss + penalty
            metrics["kl_penalty"] = float(penalty.detach())
        return LossOutput(loss, metrics)
