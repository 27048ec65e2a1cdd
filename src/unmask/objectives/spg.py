"""SPG, sandwiched policy gradient, arXiv:2510.09541."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmask.advantages import ADVANTAGES
from unmask.corruption import SCORED_POSITIONS, draw_blocks, sequence_length
from unmask.likelihood import sequence_estimate, token_eubo
from unmask.objectives.policy_gradient import (
    check_num_masks,
    check_prompt_mask_ratio,
    check_reading,
    require,
    require_choice,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts


@dataclass(frozen=True)
class SPG:
    """Policy gradient that raises a lower bound of good rollouts and lowers an upper bound of bad ones.

        loss = -Σ_i E_i A_i · ( B_i if A_i > 0 else ω U_i + (1-ω) B_i ) / Σ_i E_i
        B_i  = Σ_j Σ_{k∈S_ij} w_ij l_ij(k) / E_i,     w_ij = E_i / (|S_ij| num_masks)
        U_i  = mean over read k of (1/γ) log [ Σ_j w_ij e^{γ l_ij(k)} / Σ_j w_ij ],     both sums over the j that read k

    l_ij(k) = log π(y_k | copy j), E_i the length up to and including the stop token; both bounds are nats per token.
    A copy shows the blocks before one block, masks part of that block, everything behind it and all from E_i on, so
    that the stop token's place is not given away; of the shown tokens, prompt included, a share `prompt_mask_ratio` is
    hidden too. There is no ratio and no clip, also for μ > 1: nothing bounds a step but its size.

    Defaults are the paper's for GSM8K with the mixture of bounds. Only positions of the chosen block are read, as the
    paper has it; the code builds that mask and does not apply it (`scored_positions = "masked"`). A block is met as
    often as it has counted tokens, so that Σ_i E_i B_i estimates a block-wise ELBO; paper and code choose among blocks.
    U is divided by the weights it got: a number that no gradient sees. Whether U bounds anything: likelihood.eubo.

    Oracle: tests/test_spg.py::test_loss_equals_the_loop_oracle
    """

    gamma: float = 1.5
    """γ (the paper's β), exponent of the upper bound, at least 1: GSM8K and MATH 1.5, Countdown 2.0 (1.5 in the
    mixture), Sudoku 1.0."""
    eubo_share: float = 0.5
    """ω, share of the upper bound in what bad rollouts are lowered by; 1: the upper bound alone, 0: the lower."""
    num_masks: int = 2
    """K, masked copies per rollout."""
    block_length: int = 32
    """Tokens per block; that of the sampler."""
    prompt_mask_ratio: float = 0.15
    """Share of the tokens shown, prompt included, that is hidden all the same."""
    scored_positions: str = "block"
    """"block": masked positions of the chosen block are read (paper); "masked": all counted masked ones (code)."""
    num_iterations: int = 4
    """μ, optimiser passes over the same rollouts."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    advantage: str = "group_centered"
    """"group_centered" (paper), "leave_one_out" or "z_score"."""
    count_positions: str = "to_eos"
    """"to_eos": E is the length up to the stop token (paper); "all": the canvas."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    share_masks: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv:2510.09541"

    def __post_init__(self) -> None:
        check_reading(self)
        check_num_masks(self.num_masks)
        require(
            1 <= self.gamma < float("inf"),
            "gamma",
            self.gamma,
            "exponent of an upper bound. Use 1 or more, such as 1.5.",
        )
        require(0 <= self.eubo_share <= 1, "eubo_share", self.eubo_share, "share of the upper bound. Use 0 to 1.")
        require(self.block_length >= 1, "block_length", self.block_length, "tokens per block. Use 1 or more.")
        check_prompt_mask_ratio(self.prompt_mask_ratio)
        require_choice("scored_positions", self.scored_positions, SCORED_POSITIONS)

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), by the estimator `advantage`."""
        return ADVANTAGES[self.advantage](rewards, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` copies of each rollout, as a block-wise sampler meets them."""
        return draw_blocks(
            rollouts,
            self.num_masks,
            block_length=self.block_length,
            clean_mask_ratio=self.prompt_mask_ratio,
            scored_positions=self.scored_positions,
            count_positions=self.count_positions,
            noise=noise.stream(str(iteration)),
        )

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        length = sequence_length(x.length, x.logps.shape[-1], self.count_positions).to(x.logps)  # (B,)
        lower = sequence_estimate(x.logps, x.corruption) / length  # (B,) nats per token
        num_read = x.corruption.scored.any(1).sum(1)  # (B,)
        upper = token_eubo(x.logps, x.corruption, self.gamma, normalize=True).sum(1) / num_read
        advantages = x.advantages.to(lower)
        bad = self.eubo_share * upper + (1 - self.eubo_share) * lower
        bound = torch.where(advantages > 0, lower, bad)
        loss = -(advantages * bound * length).sum() / length.sum()
        metrics = {
            "policy_loss": float(loss.detach()),
            "lower_per_token": float(lower.detach().mean()),
            "upper_per_token": float(upper.detach().mean()),
            "upper_share": float((advantages < 0).double().mean()),
        }
        return LossOutput(loss, metrics)
