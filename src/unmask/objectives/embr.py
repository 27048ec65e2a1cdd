"""EMBR-E and EMBR-C, of "Energy Matching based Preference Learning for Diffusion Language Models" (EMBR).

Its third form, EMBR-U, is in embr_u.py. All aim at the policy reference · exp(reward / β) / Z, for which the energy
B - B^ref - R/β of every completion of a prompt is the same number, -log Z; none has a ratio, a clip or an old policy,
so that the completions may come from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from unmask.advantages import group_centered
from unmask.corruption import join_halves
from unmask.objectives.pairs import (
    check_estimate,
    copy_log_ratios,
    draw_elbo,
    group_means,
    mean_over_groups,
    ordered_pairs,
    root_mean_square,
)
from unmask.objectives.policy_gradient import require, require_choice
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts, ValueNeeds

C_MODES = ("head", "group_mean")
RESIDUAL_SCALES = ("per_length", "none")
TITLE = "Energy Matching based Preference Learning for Diffusion Language Models (EMBR)"


@dataclass(frozen=True)
class EmbrE:
    """Energy matching: the log-ratio to the reference is fitted to the reward, up to a number c of the prompt.

        loss = mean_i ( B_i - B_i^ref - R_i / β + c(q_i) )² / L²

    B is an ELBO estimate in place of log π; where it is exact, the minimum is 0, at the policy reference · exp(R/β) / Z
    with c = log Z. c comes from a head on the reference's hidden states of the prompt, learned through this loss, or is
    the best number for the group at hand, minus its mean energy (`c_mode`). The square of a noisy estimate is too large
    by its variance; `cross_fit` multiplies two independent estimates instead.

    Defaults are the paper's where it has any: the loss, the head, one term for each rollout. Ours, as no code is
    published and little is stated: β, μ, the number of draws (the paper implies one), coupled draws, masks shared with
    the reference, a head that leaves the trunk alone, and 1/L², which changes the scale of the loss and nothing else.

    Oracle: tests/test_embr.py::test_loss_equals_the_loop_oracle
    """

    beta: float = 0.04
    """β, temperature: the policy aimed at is reference · exp(R/β). diffu-GRPO's KL weight, for rewards of about 1; try
    0.1, 0.5 and 1."""
    c_mode: str = "head"
    """"head": c(q) is learned (paper); "group_mean": minus the group's mean energy, the exact minimum in c there."""
    head_lr: float = 1e-4
    """Learning rate of the head."""
    cross_fit: bool = False
    """Multiply residuals of two independent halves of the draws instead of squaring one: no bias from their noise."""
    num_masks: int = 4
    """K, masked copies per rollout: two coupled draws."""
    coupled: bool = True
    """Draw masks in complementary pairs; `num_masks` must then be even, and each half with `cross_fit`."""
    stratify: bool = True
    """Spread the mask counts of one rollout's draws evenly; with `cross_fit` those of each half."""
    share_masks: bool = True
    """Policy and reference read the same copies; independent draws drown their difference in noise."""
    num_iterations: int = 8
    """N, optimiser passes over the same rollouts (diffu-GRPO: 12; Countdown and Sudoku 8)."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    residual_scale: str = "per_length"
    """"per_length": the residual is divided by L, the loss so by L²; "none": not. The optimum is the same."""
    count_positions: str = "all"
    """"all": the canvas, end-of-text padding included; "to_eos": up to the stop token. The paper does not say."""

    strategies: ClassVar[tuple[str, ...]] = ("groups", "pairs")
    source: ClassVar[str] = TITLE

    def __post_init__(self) -> None:
        _check(self)
        require_choice("c_mode", self.c_mode, C_MODES)
        require(0 < self.head_lr < float("inf"), "head_lr", self.head_lr, "learning rate of c(q). Use one above 0.")

    @property
    def is_row_separable(self) -> bool:
        """The head's number is given; a group's mean is made of all its rows."""
        return self.c_mode == "head"

    @property
    def needs(self) -> Needs:
        head = ValueNeeds(reads="prompt", is_trunk_trained=False, lr=self.head_lr)
        return Needs(ref=True, value=head if self.c_mode == "head" else None)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) group-centred rewards, for the log. The loss reads rewards itself."""
        return group_centered(rewards, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` copies of each rollout; with `cross_fit` two independent halves."""
        return _draw(self, rollouts, noise.stream(str(iteration)))

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        energy = _energies(self, x)  # (B, N)
        if self.c_mode == "head":
            if x.values is None:
                raise ValueError("EmbrE.loss() got no values, its c(q); give them, or set c_mode = 'group_mean'.")
            c = x.values.to(energy)[:, None]  # (B, 1)
        else:
            c = -group_means(energy, x.groups)
        residual = energy + c
        loss = _product(residual, _scale(self, x)).mean()
        target = x.rewards / self.beta
        metrics = {
            "policy_loss": float(loss.detach()),
            "log_ratio": _mean_log_ratio(energy, x, self.beta),
            "log_partition": float(c.detach().mean()),
            "residual_rms": _root_mean_square(residual.mean(1)),
            "target_rms": _root_mean_square(target - group_means(target, x.groups)),
        }
        return LossOutput(loss, metrics)


@dataclass(frozen=True)
class EmbrC:
    """Contrastive energy matching: two completions of a prompt are compared, so that its log Z cancels.

        loss = mean over pairs of ( (B_i - B_i^ref) - (B_j - B_j^ref) - (R_i - R_j) / β )² / L²

    over all ordered pairs i ≠ j of a group, groups weighing alike: the expectation of drawing the partner j uniformly
    from the others. Pairs of equal rewards count; they pull their log-ratios together. B is an ELBO estimate in place
    of log π; where it is exact, the minimum is 0, at the policy reference · exp(R/β) / Z.

    The paper prints the reward term without 1/β (Eq. 16-17); its Eq. 13 has it, and so have we. What it leaves open is
    chosen as in `EmbrE`.

    Oracle: tests/test_embr.py::test_loss_equals_the_loop_oracle
    """

    beta: float = 0.04
    """β, temperature: the policy aimed at is reference · exp(R/β). diffu-GRPO's KL weight, for rewards of about 1; try
    0.1, 0.5 and 1."""
    cross_fit: bool = False
    """Multiply residuals of two independent halves of the draws instead of squaring one: no bias from their noise."""
    num_masks: int = 4
    """K, masked copies per rollout: two coupled draws."""
    coupled: bool = True
    """Draw masks in complementary pairs; `num_masks` must then be even, and each half with `cross_fit`."""
    stratify: bool = True
    """Spread the mask counts of one rollout's draws evenly; with `cross_fit` those of each half."""
    share_masks: bool = True
    """Policy and reference read the same copies; independent draws drown their difference in noise."""
    num_iterations: int = 8
    """N, optimiser passes over the same rollouts (diffu-GRPO: 12; Countdown and Sudoku 8)."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    residual_scale: str = "per_length"
    """"per_length": the residual is divided by L, the loss so by L²; "none": not. The optimum is the same."""
    count_positions: str = "all"
    """"all": the canvas, end-of-text padding included; "to_eos": up to the stop token. The paper does not say."""

    is_row_separable: ClassVar[bool] = False  # a pair's coefficient depends on both of its rows
    strategies: ClassVar[tuple[str, ...]] = ("groups", "pairs")
    source: ClassVar[str] = TITLE

    def __post_init__(self) -> None:
        _check(self)

    @property
    def needs(self) -> Needs:
        return Needs(ref=True)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) group-centred rewards, for the log. The loss reads rewards itself."""
        return group_centered(rewards, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` copies of each rollout; with `cross_fit` two independent halves."""
        return _draw(self, rollouts, noise.stream(str(iteration)))

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        energy = _energies(self, x)  # (B, N)
        first, second = ordered_pairs(x.groups)
        groups = x.groups[first]
        residual = energy[first] - energy[second]  # (pairs, N)
        loss = mean_over_groups(_product(residual, _scale(self, x)), groups)
        metrics = {
            "policy_loss": float(loss.detach()),
            "log_ratio": _mean_log_ratio(energy, x, self.beta),
            "residual_rms": root_mean_square(residual.mean(1), groups),
            "target_rms": root_mean_square((x.rewards[first] - x.rewards[second]) / self.beta, groups),
        }
        return LossOutput(loss, metrics)


def _check(algorithm: Any) -> None:
    """Raises: ConfigError naming the first field that is out of range."""
    a = algorithm
    check_estimate(a)
    require_choice("residual_scale", a.residual_scale, RESIDUAL_SCALES)
    least = 4 if a.coupled else 2
    require(
        not a.cross_fit or a.num_masks % least == 0,
        "num_masks",
        a.num_masks,
        f"cross_fit draws two independent halves of {'coupled pairs' if a.coupled else 'copies'}, so it must be a "
        f"multiple of {least}. Try {least}, or algorithm.cross_fit = false.",
    )


def _draw(algorithm: Any, rollouts: Rollouts, noise: NoiseLike) -> Corruption:
    """Copies for one estimate, or for two independent ones side by side, each with half of the copies and weight."""
    if not algorithm.cross_fit:
        return draw_elbo(rollouts, algorithm, noise=noise)
    part = replace(algorithm, num_masks=algorithm.num_masks // 2, cross_fit=False)
    return join_halves(*(draw_elbo(rollouts, part, noise=noise.stream(name)) for name in ("first_half", "second_half")))


def _energies(algorithm: Any, x: LossInputs) -> Tensor:
    """(B, N) nats: B - B^ref - R/β from all draws (N = 1), or with `cross_fit` from each half of them (N = 2)."""
    parts = copy_log_ratios(x, type(algorithm).__name__)  # (B, K)
    num_parts = 2 if algorithm.cross_fit else 1
    log_ratio = num_parts * parts.view(len(parts), num_parts, -1).sum(2)
    target: Tensor = x.rewards / algorithm.beta
    return log_ratio - target.to(log_ratio)[:, None]


def _product(
    residual: Tensor,  # (..., 1) or (..., 2)
    scale: float,
) -> Tensor:  # (...)
    """The square of one estimate, or the product of two independent ones, divided by scale²."""
    return (residual[..., 0] / scale) * (residual[..., -1] / scale)


def _scale(algorithm: Any, x: LossInputs) -> float:
    return float(x.logps.shape[-1]) if algorithm.residual_scale == "per_length" else 1.0


def _root_mean_square(values: Tensor) -> float:
    return float(values.detach().square().mean().sqrt())


def _mean_log_ratio(energy: Tensor, x: LossInputs, beta: float) -> float:
    """Mean of B - B^ref, nats per completion."""
    return float((energy.detach().mean(1) + (x.rewards / beta).to(energy)).mean())
