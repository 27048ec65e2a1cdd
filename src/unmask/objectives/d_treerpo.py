"""d-TreeRPO, arXiv:2512.09675: tree rollouts, transitions scored from their parent's state, and self-distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmask.advantages import ADVANTAGES, scale_negative
from unmask.corruption_steps import draw_transition
from unmask.likelihood import token_estimate
from unmask.objectives.policy_gradient import (
    check_policy_gradient,
    clipped_surrogate,
    kl_estimate,
    old_scores,
    ratio_metrics,
    ref_scores,
    require,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts

_COLDEST = 1e-12
"""Least temperature of the distillation target: an advantage smaller by 1e-9 has no share of it left."""
_MAX_GROWTH = 100.0  # exp(100) fits float64; the schedule is then zero but for the last updates


@dataclass(frozen=True)
class DTreeRPO:
    """Clipped surrogate on the transitions of a rollout tree, with distillation towards the better siblings.

        loss = mean_p [ mean_c mean_{k∈C_c} ( -min(ρ_ck A_c, clip(ρ_ck) A_c) + kl_coef · k3_ck ) + λ(t) CE_p ]
        CE_p = -mean_{k∈K_p} Σ_c ω_ck l_ck,     ω_ck = softmax of A_c/τ(t) over the c with A_c > 0 and k ∈ C_c
        ρ_ck = exp( l_ck - l_ck^old ),          l_ck = log π(y_ck | state of the parent),     A_c = V_c - V_p
        λ(t) = distill_coef · (e^{γt} - 1) / (e^γ - 1),     τ(t) = distill_temperature · (1 - t)^distill_decay

    Each row is a node c below its parent p: `rewards` holds its value V_c (reward of a leaf, mean of the children
    above), `groups` the parent. C_c are the tokens that the transition revealed, up to and including the stop token;
    K_p is the union of the C_c with A_c > 0; t is the share of the run's updates that are made. The mean over p is over
    the parents whose children differ in value: others contribute nothing, neither surrogate nor KL. A child with an
    empty C_c counts in the mean over c, with zero.

    Where paper and published code differ: advantages are the paper's V_c - V_p (code: leave-one-out); revealed tokens
    come from the steps (code: wherever a new log-probability is not zero, which loses tokens of probability 1). The
    code makes one update for each parent, we one for all parents of a batch. Its t counts to 30,000 updates, ours to
    the end of the run. The log-ratio is clamped to ±20 nats (neither does).

    Oracle: tests/test_d_treerpo.py::test_loss_equals_the_loop_oracle
    """

    num_iterations: int = 12
    """μ, optimiser passes over the same rollouts."""
    clip_low: float = 0.4
    """Distance of the lower clip bound below a ratio of 1."""
    clip_high: float = 0.4
    """Distance of the upper clip bound above a ratio of 1."""
    kl: str = "k3"
    """Estimator of the KL to the reference: "k1", "k2" or "k3"."""
    kl_coef: float = 0.01
    """β, weight of the KL; 0 needs no reference model."""
    distill_coef: float = 3e-3
    """λ_max, weight of the distillation at the end of the run; 0 leaves it out."""
    distill_growth: float = 2.0
    """γ, steepness of the rise of that weight."""
    distill_temperature: float = 2.0
    """τ_max, reward units: temperature of the target among better siblings at the start."""
    distill_decay: float = 0.7
    """Exponent of the fall of that temperature to zero, where the best sibling is all of the target."""
    advantage: str = "group_centered"
    """"group_centered" (paper), "leave_one_out" (published code) or "z_score", over the children of one parent."""
    negative_scale: float = 1.0
    """Factor of negative advantages. A departure of ours; 1 is the published method."""
    count_positions: str = "to_eos"
    """"to_eos": tokens up to and including the stop token (published code); "all": the whole canvas."""

    is_row_separable: ClassVar[bool] = True  # targets follow from values and steps, which are constants
    strategies: ClassVar[tuple[str, ...]] = ("tree",)
    fresh_masks: ClassVar[bool] = False  # the states are the parents': there is nothing to draw
    share_masks: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv:2512.09675"

    def __post_init__(self) -> None:
        check_policy_gradient(self)
        bounds = {
            "distill_coef": (0 <= self.distill_coef < math.inf, "weight of a loss. Use 0 (none) or more."),
            "distill_growth": (0 < self.distill_growth <= _MAX_GROWTH, "steepness of an exponential. Use 2."),
            "distill_temperature": (
                0 < self.distill_temperature < math.inf,
                "divides advantages in a softmax. Use a number above 0; 2 is the published setting.",
            ),
            "distill_decay": (
                0 <= self.distill_decay < math.inf,
                "exponent of a falling temperature. Use 0 (constant) or more.",
            ),
        }
        for field, (holds, reason) in bounds.items():
            require(holds, field, getattr(self, field), reason)

    @property
    def needs(self) -> Needs:
        return Needs(old=True, ref=self.kl_coef > 0, order=True)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), of each node among its siblings; negative ones times `negative_scale`."""
        return scale_negative(ADVANTAGES[self.advantage](rewards, groups), self.negative_scale)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """The state of each node's parent, read where the transition revealed tokens; the same in every pass."""
        return draw_transition(rollouts, count_positions=self.count_positions)

    def schedule(self, progress: float) -> tuple[float, float]:
        """λ and τ after the given share of the run's updates."""
        rise = math.expm1(self.distill_growth * progress) / math.expm1(self.distill_growth)
        return self.distill_coef * rise, self.distill_temperature * (1 - progress) ** self.distill_decay

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        estimate = token_estimate(x.logps, x.corruption)  # (B, L)
        revealed = x.corruption.scored[:, 0]  # (B, L), of the one copy
        advantages = x.advantages.to(estimate)
        _, member, size = x.groups.unique(return_inverse=True, return_counts=True)
        is_useful = _any_in_group(advantages != 0, member, len(size))  # (parents,)
        num_useful = is_useful.sum().clamp(min=1)
        row = (is_useful.to(estimate) / (size * num_useful))[member]  # (B,), adds up to 1
        token = revealed * row[:, None] / revealed.sum(1, keepdim=True).clamp(min=1)  # (B, L)

        log_ratio = estimate - token_estimate(*old_scores(x, "DTreeRPO")).to(estimate)
        gain = clipped_surrogate(log_ratio, advantages[:, None], self.clip_low, self.clip_high)
        loss = policy_loss = -(gain * token).sum()
        counted = revealed & is_useful[member][:, None]
        metrics = ratio_metrics(log_ratio, advantages[:, None], counted, self.clip_low, self.clip_high)
        metrics["policy_loss"] = float(policy_loss.detach())
        if self.needs.ref:
            log_ratio_ref = estimate - token_estimate(*ref_scores(x, "DTreeRPO")).to(estimate)
            penalty = self.kl_coef * (kl_estimate(log_ratio_ref, self.kl) * token).sum()
            loss = loss + penalty
            metrics["kl_penalty"] = float(penalty.detach())

        coef, temperature = self.schedule(x.progress)
        target, num_positions = distillation_target(advantages, revealed, member, len(size), temperature)
        per_token = target / num_positions.clamp(min=1)[member][:, None] / num_useful  # (B, L)
        cross_entropy = -(per_token * estimate).sum()
        metrics |= {
            "distill_loss": float(cross_entropy.detach()),
            "distill_coef": coef,
            "distill_temperature": temperature,
        }
        return LossOutput(loss + coef * cross_entropy, metrics)


def distillation_target(
    advantages: Tensor,  # (B,)
    revealed: Tensor,  # (B, L) bool
    member: Tensor,  # (B,) int64, number of each row's parent
    num_parents: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (B, L), (num_parents,) int64
    """Each better sibling's share ω_ck of the target at the positions it revealed, and how many positions have one.

    At a position the shares of the children of one parent add up to 1, or are all zero if no better child revealed it.
    A temperature of zero shares it equally among the best.
    """
    is_target = revealed & (advantages > 0)[:, None]  # (B, L)
    above = torch.where(is_target, advantages[:, None], -torch.inf)
    place = member[:, None].expand_as(above)
    # best at each position rather than of all children: however cold, somebody there keeps a share
    top = above.new_full((num_parents, above.shape[1]), -torch.inf).scatter_reduce(0, place, above, "amax")
    gap = torch.where(is_target, above - top[member], 0.0)
    share = (gap / max(temperature, _COLDEST)).exp() * is_target
    total = torch.zeros_like(top).index_add(0, member, share)  # at least 1 where there is a target
    return share / total.clamp(min=1)[member], (total > 0).sum(1)


def _any_in_group(values: Tensor, member: Tensor, num_groups: int) -> Tensor:
    """(B,) bool -> (num_groups,) bool."""
    count = values.float()
    return count.new_zeros(num_groups).index_add(0, member, count) > 0
