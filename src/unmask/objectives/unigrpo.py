"""UniGRPO of MMaDA, arXiv:2505.15809."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmask.advantages import ADVANTAGES, scale_negative
from unmask.corruption import draw_rising_ratio
from unmask.objectives.policy_gradient import check_policy_gradient, require, token_level_loss
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts


@dataclass(frozen=True)
class UniGRPO:
    """Token-level clipped surrogate at masked positions, whose share rises over the passes up to the whole completion.

        loss = mean_i mean_{k∈S_i} [ -min(ρ_ik A_i, clip(ρ_ik) A_i) + kl_coef · k3_ik ]
        ρ_ik = exp( l(k;S_i) - l^old(k;S_i) ),     l(k;S) = log π(y_k | prompt, y outside S)
        |S_i| = max(1, round(L t_n / T)),          t_n = t_1 + floor( (n-1)/(μ-1) · (T - t_1) ),     t_1 = floor(r_i T)

    in pass n of μ, r_i ~ U(0, 1) once for a rollout; a single pass masks everything.

    The trainer of the authors is not published. The paper divides by the length |y_i|; we divide by |S_i|, as draws
    with few masked tokens would otherwise weigh less. It draws the start twice (lines 8-9 and 12-14 of its algorithm);
    we draw it once for each rollout and batch. Its KL estimator is not named: k3. Clip range, KL weight and μ are not
    stated: those below are ours. The log-ratio is clamped to ±20 nats.

    Oracle: tests/test_unigrpo.py::test_loss_equals_the_loop_oracle
    """

    num_iterations: int = 8
    """μ, optimiser passes over the same rollouts, each with more masked tokens than the one before."""
    num_timesteps: int = 1000
    """T, steps of the grid on which mask ratios lie."""
    fresh_masks: bool = True
    """New masks for each pass; without them all passes read those of the first, and the share does not rise."""
    clip_low: float = 0.2
    """Distance of the lower clip bound below a ratio of 1."""
    clip_high: float = 0.2
    """Distance of the upper clip bound above a ratio of 1."""
    kl: str = "k3"
    """Estimator of the KL to the reference: "k1", "k2" or "k3"."""
    kl_coef: float = 0.04
    """β, weight of the KL; 0 needs no reference model."""
    advantage: str = "z_score"
    """"z_score" (paper), "group_centered" or "leave_one_out"."""
    negative_scale: float = 1.0
    """Factor of negative advantages. A departure of ours; 1 is the published method."""
    count_positions: str = "all"
    """"all": any completion position may be masked; "to_eos": those up to the stop token. The paper does not say."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    share_masks: ClassVar[bool] = True  # a ratio at k needs k masked for both policies
    source: ClassVar[str] = "arXiv:2505.15809"

    def __post_init__(self) -> None:
        check_policy_gradient(self)
        require(self.num_timesteps >= 1, "num_timesteps", self.num_timesteps, "a grid has steps. Use 1000.")

    @property
    def needs(self) -> Needs:
        return Needs(old=True, ref=self.kl_coef > 0)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), by the estimator `advantage`, negative ones times `negative_scale`."""
        return scale_negative(ADVANTAGES[self.advantage](rewards, groups), self.negative_scale)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """One masked copy of each rollout; `noise` goes on whole, as the start is common to the passes."""
        return draw_rising_ratio(
            rollouts,
            iteration=iteration,
            num_iterations=self.num_iterations,
            num_timesteps=self.num_timesteps,
            count_positions=self.count_positions,
            noise=noise,
        )

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        return token_level_loss(x, x.corruption.scored[:, 0], self, per_rollout=True)
