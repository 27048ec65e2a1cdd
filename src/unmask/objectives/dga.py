"""DGA, "Diffusion-Gibbs Alignment": "Reinforcement Learning for Diffusion LLMs via Energy-Based Gibbs Alignment"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from unmask.advantages import group_softmax, group_sums, z_score
from unmask.corruption import COUNT_POSITIONS, draw_uniform_count, sequence_length
from unmask.likelihood import elbo
from unmask.objectives.policy_gradient import check_num_masks, require, require_choice
from unmask.objectives.target_weights import effective_share, ess_coefficient, group_size
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts, ValueNeeds

MODES = ("index", "sum")


@dataclass(frozen=True)
class DGA:
    """Imitation of the policy's own completions, weighted by a learned energy, with an exact KL to the reference.

        loss = (1/N) Σ_groups Σ_i c_i ( -ELBO(y_i) / L + λ · mean over masked tokens of KL(π ‖ π_ref) )

        w_i = softmax over the group of -E_i/α,   ŵ_i = min(w_i, γ/K),   w̃_i = ŵ_i / Σ_j ŵ_j           (Eq. 11, 16)
        c_i = w̃_i ("sum"), or 1 for one row of the group drawn with probability w̃_i and 0 elsewhere ("index")

    N groups of K rollouts; E is a value model that ranks the rollouts of a prompt by their rewards (`ranking_loss`), a
    low energy for a high reward. No ratio, no old likelihood, no negative weight: a group of wrong answers is imitated
    too, unless `skip_zero_variance`. Right after a rollout the policy is its own proposal, so w needs no likelihood.

    The two modes are two estimators of one gradient: mean over the choice of the row = weighted sum. The paper gives
    no α, K, γ, λ or β; defaults are ours, as is the rule for α: the smallest α >= `min_alpha` whose weights, before
    clipping, have an effective sample size of at least `ess_target` · K.

    Oracle: tests/test_dga.py::test_loss_equals_the_loop_oracle
    """

    num_masks: int = 1
    """Masked copies per rollout and pass; the paper draws one. Even where `coupled`."""
    coupled: bool = False
    """Complementary pairs of masks: less noise, twice the forwards of one copy."""
    num_iterations: int = 8
    """μ, optimiser passes over the same rollouts before the sampling policy is refreshed (paper: "periodically")."""
    fresh_masks: bool = True
    """New masks, and in "index" mode a new row, for each pass."""
    mode: str = "index"
    """"index": one row per group, drawn by the weights, counts (paper, Algorithm 1); "sum": all rows, weighted (its
    Eq. 15), the same gradient on average with less noise."""
    use_energy: bool = True
    """False: rewards, centred and divided by their deviation in the group, stand in for -E (the paper's ablation)."""
    alpha: float | None = None
    """Temperature of the weights. None: chosen for each prompt by `min_alpha` and `ess_target`."""
    min_alpha: float = 0.05
    """Least temperature that the rule chooses."""
    ess_target: float = 0.9
    """Effective sample size that the rule keeps, as a share of the group."""
    weight_clip: float = 4.0
    """γ: no weight above γ / K before they are made to add up to 1 again, once. K or more (inf): no clipping."""
    kl_coef: float = 0.05
    """λ, weight of the KL, nats per masked token; 0: no reference is needed."""
    ranking_scale: float = 1.0
    """β, energy gap in units of which a preference is certain; a larger one asks for larger gaps."""
    energy_lr: float = 1e-4
    """Learning rate of the energy's head."""
    energy_trunk_lr: float = 3e-6
    """Learning rate of its adapter, or of its copy of the model."""
    energy_updates: int = 1
    """Updates of the energy on each batch, before the policy uses it."""
    skip_zero_variance: bool = False
    """True leaves out groups whose rewards are all equal."""
    count_positions: str = "all"
    """"all": the whole canvas is imitated; "to_eos": tokens up to the stop token. The paper does not say."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    share_masks: ClassVar[bool] = True
    source: ClassVar[str] = "Diffusion-Gibbs Alignment"

    def __post_init__(self) -> None:
        check_num_masks(self.num_masks)
        require(
            not self.coupled or self.num_masks % 2 == 0,
            "num_masks",
            self.num_masks,
            "coupled masks come in complementary pairs, so it must be even. Try 2, or coupled = false.",
        )
        require(
            self.num_iterations >= 1,
            "num_iterations",
            self.num_iterations,
            "rollouts are used at least once. Use 1 or more.",
        )
        require_choice("mode", self.mode, MODES)
        require_choice("count_positions", self.count_positions, COUNT_POSITIONS)
        self._check_weights()
        self._check_energy()

    def _check_weights(self) -> None:
        for field in ("alpha", "min_alpha"):
            value = getattr(self, field)
            is_good = value is None or 0 < value < math.inf
            require(is_good, field, value, "temperature that divides energies. Use a number above 0, such as 0.5.")
        require(
            0 < self.ess_target < 1,
            "ess_target",
            self.ess_target,
            "a share of the group below 1, which equal weights alone reach. Try 0.9.",
        )
        require(
            self.weight_clip > 1,
            "weight_clip",
            self.weight_clip,
            "γ, in multiples of the equal weight 1/K; at 1 or below good rollouts could not gain. Try 4, inf for none.",
        )
        require(
            0 <= self.kl_coef < math.inf,
            "kl_coef",
            self.kl_coef,
            "λ, weight of a penalty. Use 0 (no reference) or more.",
        )

    def _check_energy(self) -> None:
        for field in ("ranking_scale", "energy_lr", "energy_trunk_lr"):
            value = getattr(self, field)
            require(0 < value < math.inf, field, value, "must be above 0 and finite. Try the default.")
        require(
            self.energy_updates >= 1,
            "energy_updates",
            self.energy_updates,
            "the energy learns from each batch. Use 1 or more, or use_energy = false for none.",
        )

    @property
    def needs(self) -> Needs:
        value = ValueNeeds(
            reads="completion",
            is_trunk_trained=True,
            lr=self.energy_lr,
            trunk_lr=self.energy_trunk_lr,
            loss=self.ranking_loss,
            num_updates=self.energy_updates,
        )
        return Needs(kl=self.kl_coef > 0, value=value if self.use_energy else None)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) normalised rewards, for the log; the weights are made of them where `use_energy` is false."""
        return z_score(rewards, groups)

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """Subsets of uniform size (LLaDA's discrete form), or coupled pairs of them."""
        return draw_uniform_count(
            rollouts,
            self.num_masks,
            coupled=self.coupled,
            count_positions=self.count_positions,
            noise=noise.stream(str(iteration)),
        )

    def ranking_loss(
        self,
        values: Tensor,  # (B,) energies
        rewards: Tensor,  # (B,)
        groups: Tensor,  # (B,)
    ) -> Tensor:
        """Bradley-Terry loss of the energies, nats: mean over groups of the mean over pairs with R_i > R_j of

            -log σ( (E_j - E_i) / β )                                                                   (Eq. 8, 9)

        A group without such a pair adds 0. Unchanged by a number added to the energies of a group; without a finite
        minimum, since rewards are certain: the weight decay of the value model bounds the energies.
        """
        pairs = _pairs(rewards, groups).to(values)  # (B, B)
        losses = functional.softplus((values[:, None] - values[None, :]) / self.ranking_scale)
        _, member, count = groups.unique(return_inverse=True, return_counts=True)
        sums = values.new_zeros(2, len(count)).index_add(
            1, member, torch.stack([(pairs * losses).sum(1), pairs.sum(1)])
        )
        return (sums[0] / sums[1].clamp(min=1)).mean()

    def weights(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        """w̃ and α, (B,) float64 each, without gradient. Raises: ValueError if there are no energies."""
        if self.use_energy and x.values is None:
            raise ValueError("DGA.loss() got no values; give it the energies, or set use_energy = false.")
        quality = -x.values if self.use_energy and x.values is not None else x.advantages
        quality = quality.detach().double()
        if self.alpha is None:
            scale = ess_coefficient(quality, x.groups, 1 / self.min_alpha, self.ess_target)
        else:
            scale = torch.full_like(quality, 1 / self.alpha)
        weight = group_softmax(scale * quality, x.groups).minimum(self.weight_clip / group_size(x.groups).double())
        return weight / group_sums(weight, x.groups), 1 / scale

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        weight, alpha = self.weights(x)
        chosen = weight if self.mode == "sum" else _draw_rows(weight, x)
        if self.skip_zero_variance:
            pairs = _pairs(x.rewards, x.groups)
            chosen = chosen * (pairs.any(0) | pairs.any(1))  # where rewards differ, each row differs from another
        coefficient = chosen.to(x.logps) / len(x.groups.unique())  # (B,)
        length = sequence_length(x.length, x.logps.shape[-1], self.count_positions)
        loss = policy_loss = -(coefficient * elbo(x.logps, x.corruption) / length).sum()
        metrics = {"policy_loss": float(policy_loss.detach())} | self._weight_metrics(x, weight, alpha)
        if self.kl_coef > 0:
            penalty = self.kl_coef * (coefficient * _masked_mean(x).to(x.logps)).sum()
            loss = policy_loss + penalty
            metrics["kl_penalty"] = float(penalty.detach())
        return LossOutput(loss, metrics)

    def _weight_metrics(self, x: LossInputs, weight: Tensor, alpha: Tensor) -> dict[str, float]:
        metrics = {
            "ess": float(effective_share(weight, x.groups).mean()),
            "alpha": float(alpha.mean()),
            "weight_max": float(weight.max()),
        }
        pairs = _pairs(x.rewards, x.groups)
        if self.use_energy and x.values is not None and bool(pairs.any()):
            gap = x.values.detach()[None, :] - x.values.detach()[:, None]  # E_j - E_i
            right = (gap > 0).double() + (gap == 0).double() / 2
            metrics["energy_accuracy"] = float(right[pairs].mean())
            metrics["energy_gap"] = float(gap[pairs].mean())
        return metrics


def _pairs(rewards: Tensor, groups: Tensor) -> Tensor:
    """(B, B) bool, True where i and j are of one group and R_i > R_j."""
    return (groups[:, None] == groups[None, :]) & (rewards[:, None] > rewards[None, :])


def _draw_rows(
    weight: Tensor,  # (B,), adding up to 1 in each group
    x: LossInputs,
) -> Tensor:  # (B,) float64, 1 for one row of each group and 0 elsewhere
    """The first arrival of a race: row i at time -log(u_i) / w̃_i, which is row i with probability w̃_i.

    Each row has a uniform of its own, so the choice does not depend on the order of the rows.
    Raises: ValueError if there are none.
    """
    if x.uniform is None:
        raise ValueError('DGA.loss() got no uniforms; give it one for each row, or set mode = "sum".')
    arrival = -x.uniform.double().log() / weight
    _, member, count = x.groups.unique(return_inverse=True, return_counts=True)
    first = arrival.new_zeros(len(count)).scatter_reduce(0, member, arrival, "amin", include_self=False)
    return (arrival == first[member]).double() + 0 * weight  # a weight that is no number stays visible


def _masked_mean(x: LossInputs) -> Tensor:
    """(B,) nats, mean KL over the masked tokens of a row's copies. Raises: ValueError if there is no KL."""
    if x.kl is None:
        raise ValueError("DGA.loss() got no kl; score the policy against the reference, or set kl_coef = 0.")
    scored = x.corruption.scored
    return (x.kl * scored).sum((1, 2)) / scored.sum((1, 2))
