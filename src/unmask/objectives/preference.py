"""VRPO (LLaDA 1.5, arXiv:2505.19223), and DPO (arXiv:2305.18290) on an ELBO estimate, the baseline of that paper.

(Another VRPO, arXiv:2508.03058, is not meant.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from unmask.corruption import sequence_length
from unmask.likelihood import sequence_estimate
from unmask.objectives.pairs import check_estimate, copy_log_ratios, draw_elbo, mean_over_groups, ordered_pairs
from unmask.objectives.policy_gradient import require
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts


@dataclass(frozen=True)
class VRPO:
    """DPO on an ELBO estimate whose noise is held down by many levels and masks shared with the reference.

        loss = mean over pairs of -log σ( β [ (B_w - B_w^ref) - (B_l - B_l^ref) ] ) - sft_coef · mean of B_w / E_w
        B    = mean over `num_masks` copies of E/m · Σ_{i∈S} log π(y_i | q, y outside S),     |S| = m ~ U{1..E}

    The pairs are all (w, l) of a group with R_w > R_l: the one pair of a group of two, else all of them, averaged in
    the group and then over the groups that have a pair. Pairs of equal rewards say nothing here. B is a sum over the
    E positions that count, not a mean. Winner and loser have independent draws.

    Defaults are the paper's: β, 8 levels with one mask each, masks shared with the reference, the supervised term. Ours
    are the number of masked tokens in place of a mask ratio t (the same expectation), levels of one rollout spread
    evenly rather than independent, and the supervised term per token. No code of the authors is published. One
    re-implementation divides B by the padded length, which is another β for each batch.

    Oracle: tests/test_preference.py::test_loss_equals_the_loop_oracle
    """

    beta: float = 0.2
    """β, how strongly the log-ratio to the reference answers to a preference."""
    sft_coef: float = 0.05
    """Weight of the winner's negative ELBO per token, for pairs only; 0: none."""
    num_masks: int = 8
    """K, masked copies per rollout, each with a level of its own."""
    coupled: bool = False
    """Draw masks in complementary pairs; `num_masks` must then be even."""
    stratify: bool = True
    """Spread the mask counts of one rollout's draws evenly (ours; the paper's are independent)."""
    share_masks: bool = True
    """Policy and reference read the same copies; independent draws drown their difference in noise."""
    num_iterations: int = 1
    """μ, optimiser passes over the same pairs."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    count_positions: str = "to_eos"
    """"to_eos": tokens up to and including the stop token (paper); "all": the whole canvas."""

    is_row_separable: ClassVar[bool] = False  # a pair's coefficient depends on both of its rows
    strategies: ClassVar[tuple[str, ...]] = ("pairs", "groups")
    source: ClassVar[str] = "arXiv:2505.19223"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def needs(self) -> Needs:
        return Needs(ref=True)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), see `win_shares`."""
        return win_shares(rewards, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` copies of each rollout."""
        return draw_elbo(rollouts, self, noise=noise.stream(str(iteration)))

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        return preference_loss(x, self)


@dataclass(frozen=True)
class DPOElbo:
    """DPO with a naive ELBO estimate: one level, one mask, and another one for the reference.

        loss = mean over pairs of -log σ( β [ (B_w - B_w^ref) - (B_l - B_l^ref) ] )

    VRPO without what it adds; see there for pairs and B. Its estimates are so noisy that the loss exceeds log 2 on
    average where policy and reference are equal. The fields make everything between the two.

    Oracle: tests/test_preference.py::test_loss_equals_the_loop_oracle
    """

    beta: float = 0.2
    """β, how strongly the log-ratio to the reference answers to a preference."""
    sft_coef: float = 0.0
    """Weight of the winner's negative ELBO per token, for pairs only; 0: none."""
    num_masks: int = 1
    """K, masked copies per rollout, each with a level of its own."""
    coupled: bool = False
    """Draw masks in complementary pairs; `num_masks` must then be even."""
    stratify: bool = True
    """Spread the mask counts of one rollout's draws evenly; without effect on a single one."""
    share_masks: bool = False
    """Policy and reference read the same copies. False: each has draws of its own."""
    num_iterations: int = 1
    """μ, optimiser passes over the same pairs."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    count_positions: str = "to_eos"
    """"to_eos": tokens up to and including the stop token (paper); "all": the whole canvas."""

    is_row_separable: ClassVar[bool] = False  # a pair's coefficient depends on both of its rows
    strategies: ClassVar[tuple[str, ...]] = ("pairs", "groups")
    source: ClassVar[str] = "arXiv:2305.18290"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def needs(self) -> Needs:
        return Needs(ref=True)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,), see `win_shares`."""
        return win_shares(rewards, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` copies of each rollout."""
        return draw_elbo(rollouts, self, noise=noise.stream(str(iteration)))

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        return preference_loss(x, self)


def _check(algorithm: Any) -> None:
    """Raises: ConfigError naming the first field that is out of range."""
    check_estimate(algorithm)
    require(
        0 <= algorithm.sft_coef < float("inf"),
        "sft_coef",
        algorithm.sft_coef,
        "weight of the winner's negative log-likelihood; below 0 it would unlearn winners. Use 0 (none) or more.",
    )


def preferred_pairs(
    rewards: Tensor,  # (B,)
    groups: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:  # (N,) int64 rows of winners, (N,) of losers
    """All (w, l) of one group with R_w > R_l."""
    first, second = ordered_pairs(groups)
    is_better = rewards[first] > rewards[second]
    return first[is_better], second[is_better]


def win_shares(
    rewards: Tensor,  # (B,)
    groups: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """Pairs that a row wins minus those that it loses, over the group's others: in [-1, 1], adding up to 0 in a group.

    For the log; the loss reads rewards itself. Where policy and reference are equal, descent raises the B of each row
    of a group in proportion to its share.
    """
    winner, loser = preferred_pairs(rewards, groups)
    one = rewards.new_ones(len(winner))
    balance = rewards.new_zeros(len(rewards)).index_add(0, winner, one).index_add(0, loser, -one)
    others = (groups[:, None] == groups).sum(1) - 1
    return balance / others.clamp(min=1)


def preference_loss(x: LossInputs, algorithm: Any) -> LossOutput:
    """The equation of `VRPO`, by the fields beta, sft_coef and count_positions.

    Metrics have TRL's names: `rewards/chosen` and `rewards/rejected` are β (B - B^ref) of winners and losers,
    `rewards/margins` their difference, `rewards/accuracies` the share of pairs in which it is above 0.
    """
    a = algorithm
    ratio = copy_log_ratios(x, type(a).__name__).sum(1)  # (B,)
    winner, loser = preferred_pairs(x.rewards, x.groups)

    def mean(values: Tensor) -> Tensor:
        return mean_over_groups(values, x.groups[winner])

    margin = a.beta * (ratio[winner] - ratio[loser])  # (N,)
    loss = policy_loss = mean(-logsigmoid(margin))
    chosen, rejected = (a.beta * ratio.detach()[rows] for rows in (winner, loser))
    metrics = {
        "policy_loss": float(policy_loss.detach()),
        "rewards/chosen": float(mean(chosen)),
        "rewards/rejected": float(mean(rejected)),
        "rewards/margins": float(mean(margin.detach())),
        "rewards/accuracies": float(mean((chosen > rejected).to(chosen))),
        "num_pairs": float(len(winner)),
    }
    if a.sft_coef > 0:
        length = sequence_length(x.length, x.logps.shape[-1], a.count_positions)  # (B,)
        per_token = sequence_estimate(x.logps, x.corruption) / length
        sft_loss = -a.sft_coef * mean(per_token[winner])
        loss = policy_loss + sft_loss
        metrics["sft_loss"] = float(sft_loss.detach())
    return LossOutput(loss, metrics)
