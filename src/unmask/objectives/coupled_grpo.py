"""coupled-GRPO of DiffuCoder, arXiv:2506.20639."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmask.advantages import ADVANTAGES, scale_negative
from unmask.corruption import counted_positions, draw_coupled_tokens, sequence_length
from unmask.objectives.policy_gradient import check_policy_gradient, require, token_level_loss
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts


@dataclass(frozen=True)
class CoupledGRPO:
    """Token-level clipped surrogate on scores read from a full mask and a complementary pair of masks.

        loss = Σ_{i,k} c_ik [ -min(ρ_ik A_i, clip(ρ_ik) A_i) + kl_coef · k3_ik ] / Σ_{i,k} c_ik
        ρ_ik = exp( s_ik - s_ik^old )
        s_k  = 1/2 [ l(k; all) + 1[k∈S] l(k;S) / t + 1[k∉S] l(k;S^c) / (1-t) ]

    l(k;S) = log π(y_k | prompt, y outside S); t ~ U[0.2, 0.8] once for the batch, each token is in S with probability
    t; c marks the positions up to and including the stop token. Each token is read twice. The weights of a score have
    expectation 3/2, as paper and code halve three terms.

    Defaults are the published code's. With two accumulated micro-batches it gives each of them the same masks in both
    passes; here every pass has its own. It moves the reference towards the policy every 64 steps; here it is frozen.
    The log-ratio is clamped to ±20 nats (the code does not).

    Oracle: tests/test_coupled_grpo.py::test_loss_equals_the_loop_oracle
    """

    min_mask_ratio: float = 0.2
    """Lower end of t; tokens outside S are weighted by 1/(1-t)."""
    max_mask_ratio: float = 0.8
    """Upper end of t."""
    num_iterations: int = 2
    """μ, optimiser passes over the same rollouts."""
    fresh_masks: bool = True
    """New masks, and a new t, for each pass."""
    share_masks: bool = True
    """Policy, old policy and reference read the same copies."""
    clip_low: float = 0.5
    """Distance of the lower clip bound below a ratio of 1."""
    clip_high: float = 0.5
    """Distance of the upper clip bound above a ratio of 1."""
    kl: str = "k3"
    """Estimator of the KL to the reference: "k1", "k2" or "k3"."""
    kl_coef: float = 0.01
    """β, weight of the KL; 0 needs no reference model."""
    advantage: str = "leave_one_out"
    """"leave_one_out" (published), "group_centered" or "z_score"."""
    negative_scale: float = 1.0
    """Factor of negative advantages. A departure of ours; 1 is the published method."""
    count_positions: str = "to_eos"
    """"to_eos": tokens up to and including the stop token (published code); "all": the whole canvas."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    source: ClassVar[str] = "arXiv:2506.20639"

    def __post_init__(self) -> None:
        check_policy_gradient(self)
        low, high = self.min_mask_ratio, self.max_mask_ratio
        need = "tokens are weighted by 1/t and 1/(1-t), so t must lie between 0 and 1 without them. Try"
        require(0 < low < 1, "min_mask_ratio", low, f"{need} 0.2.")
        require(low <= high < 1, "max_mask_ratio", high, f"{need} 0.8, and not less than min_mask_ratio.")

    @property
    def needs(self) -> Needs:
        return Needs(old=True, ref=self.kl_coef > 0)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), by the estimator `advantage`, negative ones times `negative_scale`."""
        return scale_negative(ADVANTAGES[self.advantage](rewards, groups), self.negative_scale)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """Three copies of each rollout: all masked, S, and its complement."""
        return draw_coupled_tokens(
            rollouts,
            min_mask_ratio=self.min_mask_ratio,
            max_mask_ratio=self.max_mask_ratio,
            count_positions=self.count_positions,
            noise=noise.stream(str(iteration)),
        )

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        length = sequence_length(x.length, x.logps.shape[-1], self.count_positions)
        counted = counted_positions(length, x.logps.shape[-1])  # (B, L)
        return token_level_loss(x, counted, self, per_rollout=False)
