"""EMBR-U, of "Energy Matching based Preference Learning for Diffusion Language Models" (EMBR); E and C: embr.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmask.advantages import group_centered
from unmask.likelihood import token_estimate, token_eubo
from unmask.objectives.embr import RESIDUAL_SCALES, TITLE
from unmask.objectives.pairs import (
    check_estimate,
    draw_elbo,
    mean_over_groups,
    ordered_pairs,
    root_mean_square,
)
from unmask.objectives.policy_gradient import ref_scores, require, require_choice
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts

SURROGATES = ("square", "huber", "softplus", "hinge")


@dataclass(frozen=True)
class EmbrU:
    """Contrastive energy matching with an upper bound in place of the residual, from a lower and an upper bound of B.

        loss  = mean over pairs of max( S_min², S_max² ) / L²,         S_min = -S_max of the pair the other way round
        S_max = (U_i - B_j) - (B_i^ref - U_j^ref) - (R_i - R_j) / β
        S_min = (B_i - U_j) - (U_i^ref - B_j^ref) - (R_i - R_j) / β

    over all ordered pairs i ≠ j of a group, groups weighing alike, as in `EmbrC`, whose residual lies in
    [S_min, S_max]. U is the evidence upper bound with exponent γ, from the same reads as B. With a gap U - B the loss
    has a floor: at equal rewards and policy = reference it is the squared sum of both gaps, and part of every gradient
    only narrows them.

    "Upper bound" is a figure of speech here: U bounds log π for γ >= L, in the limit of many copies, or where the
    conditionals fit one joint (see likelihood.eubo). The constant that would repair smaller γ is dropped as in the
    paper, though a square does see it. U is divided by the weights that each position got, not by their expectation.

    The paper prints the reward term without 1/β (Eq. 19-20), and U with a logarithm of a negative number; we use its
    Eq. 13 and the form of SPG, arXiv:2510.09541, from which γ is taken. It squares; the other surrogates of
    max(|S_min|, |S_max|) are those its outlook names, in forms of ours. What it leaves open is chosen as in `EmbrE`.

    Oracle: tests/test_embr_u.py::test_loss_equals_the_loop_oracle
    """

    beta: float = 0.04
    """β, temperature: the policy aimed at is reference · exp(R/β). diffu-GRPO's KL weight, for rewards of about 1; try
    0.1, 0.5 and 1."""
    gamma: float = 1.5
    """γ, exponent of the upper bound, at least 1: larger is looser; from L on it is a bound for every model."""
    surrogate: str = "square"
    """φ of s = max(|S_min|, |S_max|): "square" s² (paper); "huber", "softplus" and "hinge" grow like 2δs: s² up to δ
    and 2δs - δ² beyond; δ² · [softplus(2s/δ) + softplus(-2s/δ) - 2 log 2]; max(0, 2δs - δ²)."""
    threshold: float = 1.0
    """δ of the surrogates other than "square", in units of the residual: nats per token, or nats for "none"."""
    normalize: bool = True
    """Divide U at each position by the weights it was read with; False: by their expectation 1, which adds noise."""
    num_masks: int = 4
    """K, masked copies per rollout: two coupled draws. With a single one each position is read once, and U has no more
    to say than B."""
    coupled: bool = True
    """Draw masks in complementary pairs, so that each position is read; `num_masks` must then be even."""
    stratify: bool = True
    """Spread the mask counts of one rollout's draws evenly."""
    share_masks: bool = True
    """Policy and reference read the same copies; independent draws drown their difference in noise."""
    num_iterations: int = 8
    """N, optimiser passes over the same rollouts (diffu-GRPO: 12; Countdown and Sudoku 8)."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    residual_scale: str = "per_length"
    """"per_length": the residual is divided by L, a squared loss so by L²; "none": not. The optimum of a square is the
    same."""
    count_positions: str = "all"
    """"all": the canvas, end-of-text padding included; "to_eos": up to the stop token. The paper does not say."""

    is_row_separable: ClassVar[bool] = False  # a pair's coefficient depends on both of its rows
    strategies: ClassVar[tuple[str, ...]] = ("groups", "pairs")
    source: ClassVar[str] = TITLE

    def __post_init__(self) -> None:
        check_estimate(self)
        require(
            1 <= self.gamma < float("inf"),
            "gamma",
            self.gamma,
            "exponent of an upper bound. Use 1 or more, such as 1.5, or the canvas length.",
        )
        require_choice("surrogate", self.surrogate, SURROGATES)
        require(
            0 < self.threshold < float("inf"),
            "threshold",
            self.threshold,
            "residual beyond which a surrogate grows linearly. Use a number above 0, such as 1.",
        )
        require_choice("residual_scale", self.residual_scale, RESIDUAL_SCALES)

    @property
    def needs(self) -> Needs:
        return Needs(ref=True)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) group-centred rewards, for the log. The loss reads rewards itself."""
        return group_centered(rewards, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` copies of each rollout."""
        return draw_elbo(rollouts, self, noise=noise.stream(str(iteration)))

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        lower, upper, middle = self._energies(x)  # (B,) each
        first, second = ordered_pairs(x.groups)
        groups = x.groups[first]
        s_min, s_max = lower[first] - upper[second], upper[first] - lower[second]  # (N,)
        worst = torch.maximum(s_min.abs(), s_max.abs())  # a tie has half of each gradient
        scale = x.logps.shape[-1] if self.residual_scale == "per_length" else 1
        loss = mean_over_groups(surrogate(worst / scale, self.surrogate, self.threshold), groups)
        target = (x.rewards[first] - x.rewards[second]) / self.beta
        is_better = target > 0
        lower_rules = (s_min.abs() > s_max.abs())[is_better].to(worst)
        metrics = {
            "policy_loss": float(loss.detach()),
            "log_ratio": float((middle.detach() + (x.rewards / self.beta).to(middle)).mean()),
            "residual_rms": root_mean_square(middle[first] - middle[second], groups),
            "target_rms": root_mean_square(target, groups),
            "bound_rms": root_mean_square(worst, groups),
            "gap": float(mean_over_groups((s_max - s_min).detach() / 2, groups)),
            "s_min_share": float(mean_over_groups(lower_rules, groups[is_better])),
        }
        return LossOutput(loss, metrics)

    def _energies(self, x: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) nats each: B - U^ref, U - B^ref and B - B^ref, less R/β."""
        ref_logps, ref = ref_scores(x, "EmbrU")
        ref_logps = ref_logps.to(x.logps)
        low, ref_low = token_estimate(x.logps, x.corruption), token_estimate(ref_logps, ref)  # (B, L)
        high, ref_high = (
            token_eubo(logps, masks, self.gamma, normalize=self.normalize)
            for logps, masks in ((x.logps, x.corruption), (ref_logps, ref))
        )
        target = (x.rewards / self.beta).to(low)
        # token by token before the sum: a small difference of large sums would lose digits in float32
        lower, upper, middle = ((a - b).sum(1) - target for a, b in ((low, ref_high), (high, ref_low), (low, ref_low)))
        return lower, upper, middle


def surrogate(
    s: Tensor,  # (...) at least 0
    kind: str,
    threshold: float,
) -> Tensor:  # (...)
    """φ(s) by the forms of `EmbrU.surrogate`; all but "hinge" are s² to second order at 0, and none exceeds it.

    Raises: ValueError for another `kind`.
    """
    d = threshold
    if kind == "square":
        return s.square()
    if kind == "huber":
        inner = s.clamp(max=d)
        return inner * (2 * s - inner)
    if kind == "softplus":
        t = 2 * s / d  # softplus(t) + softplus(-t) = t + 2 log(1 + e^-t), which does not overflow
        return d * d * (t + 2 * ((-t).exp().log1p() - torch.log(t.new_tensor(2.0))))
    if kind == "hinge":
        return (d * (2 * s - d)).clamp(min=0)
    raise ValueError(f"unknown surrogate {kind!r}. Known: {', '.join(SURROGATES)}")
