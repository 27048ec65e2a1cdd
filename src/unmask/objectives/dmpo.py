"""DMPO, distribution matching policy optimisation, arXiv:2510.08233: its losses WDCE and WDDO.

Both learn a target tilted by the reward, p_* ∝ p_ref · exp(r/α), from completions of the old policy that are weighted
as if they had been drawn from it:

    w_i = softmax over the group of coef · (ℓ_i + r_i/α),     ℓ_i = log p_ref(y_i) - log p_old(y_i)      ("log_rnd")

ℓ is taken along the order σ in which the sampler revealed the tokens, or as a difference of ELBO estimates on the same
masks. log p_old(y; σ) is the sum of the log-probabilities that the sampler noted. "untempered", they are those of
temperature 1 whatever temperature the tokens were drawn at: the form of the paper and of its code. At another
temperature the completions do not follow that density and w is no exact importance weight. "tempered", they are those
of the law q that the tokens were drawn from; the reference stays at temperature 1, because it is the target that is
made of it: w ∝ p_ref · exp(r/α) / q. The numbers stay with the rollout, so that completions out of a buffer keep the
policy that wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unmask.advantages import group_centered, group_softmax
from unmask.corruption import join_halves
from unmask.likelihood import elbo
from unmask.objectives.policy_gradient import chosen_mean, old_scores, require, require_choice
from unmask.objectives.target_weights import (
    LIKELIHOODS,
    WEIGHTS,
    check_density,
    check_target_weights,
    draw_evidence,
    draw_replicates,
    evidence_needs,
    group_size,
    log_density_ratio,
    old_tokens,
    target_weights,
    weight_metrics,
)
from unmask.types import Corruption, LossInputs, LossOutput, Needs, NoiseLike, Rollouts

BASELINES = ("negative", "none", "constant", "group_mean", "unbias")


@dataclass(frozen=True)
class DmpoWDCE:
    """Denoising cross-entropy, each rollout weighted by what the target has more of than the baseline.

        loss = (1/N) Σ_groups Σ_i ( w_i - baseline_scale · w_base,i ) · ( -B_i / L )

        baseline    "negative"    softmax of coef · (ℓ_i - r_i/α), the target of the opposite reward
                    "none"        0
                    "constant"    1/G (the paper's 1, for weights of mean 1)
                    "group_mean"  mean of w over the group
                    "unbias"      softmax of (B_i - log p_old(y_i)), an estimate of p_θ/p_old

    B is the ELBO estimate of the policy on `num_masks` copies; only it carries gradient. N is the number of groups, L
    the canvas. No ratio to the current policy enters: weights stay right over all passes, and for old rollouts.

    Where paper and published code differ, and from both: softmax, mean, and effective sample size are those of the
    group (code: of one process's rows). The code masks each token with probability t, clamps t to [0.1, 1] and weights
    by L/m, which makes its B lower than the ELBO by a factor and biased; here m is uniform. It sums log-probabilities
    in bfloat16, we in float64. It divides by m, we by m/L and by L, and by the number of groups.

    Oracle: tests/test_dmpo.py::test_wdce_equals_the_loop_oracle
    """

    weights: str = "target"
    """"target": w as in the equation; "reward": softmax of coef · r alone (the code's α = 0); "raw": r itself, without
    a softmax (the code's α = -1)."""
    reward_temperature: float = 0.04
    """α, reward units for one nat of the target. Only "target" uses it."""
    likelihood: str = "order"
    """What ℓ is made of. "order": log-likelihoods along the reveal order, exact where that does not depend on the
    policy; "elbo": ELBO estimates of both models on the same masks, for every other sampler."""
    density: str = "untempered"
    """log p_old along the order: "untempered", of temperature 1 (paper and code); "tempered", of the law that the
    sampler drew from, with which w is an exact importance weight at any temperature. Asks for likelihood "order"."""
    num_evidence_masks: int = 4
    """Copies for each ELBO of ℓ, in complementary pairs; even. Without effect with "order"."""
    baseline: str = "negative"
    """"negative" (published), "none", "constant", "group_mean" or "unbias"."""
    baseline_scale: float = 1.0
    """Strength of the centring: factor of the baseline."""
    weight_coef: float = 1.0
    """coef, factor of the exponent; below 1 weights are flatter. The most that `ess_target` may choose."""
    ess_target: float = 0.0
    """Share of the group, in [0, 1): coef is lowered, group by group, until the effective sample size reaches it.
    0: never. The code's options are 0.7 and 0.8, within [0.01, 0.99]; ours has no lower end."""
    num_masks: int = 4
    """R, masked copies per rollout and pass."""
    coupled: bool = False
    """Draw masks in complementary pairs; `num_masks` must then be even."""
    stratify: bool = True
    """Spread the mask counts of one rollout's copies evenly (ours; the published code draws each alone)."""
    num_iterations: int = 8
    """μ, optimiser passes over the same rollouts."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    count_positions: str = "all"
    """"all": the canvas, end-of-text padding included (published code); "to_eos": up to the stop token, in ℓ and B."""

    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    share_masks: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv:2510.08233"

    def __post_init__(self) -> None:
        check_target_weights(self, WEIGHTS)
        require_choice("baseline", self.baseline, BASELINES)
        require(
            0 <= self.baseline_scale < float("inf"),
            "baseline_scale",
            self.baseline_scale,
            "factor of the baseline. Use 1, or 0 for none.",
        )
        require(
            self.weights != "raw" or self.baseline in ("none", "group_mean"),
            "baseline",
            self.baseline,
            'with weights = "raw" there is no distribution to compare with. Use "group_mean" or "none".',
        )
        require(
            self.weights != "raw" or (self.weight_coef == 1 and self.ess_target == 0),
            "weights",
            self.weights,
            "raw rewards have no exponent to scale. Leave out algorithm.weight_coef and algorithm.ess_target.",
        )
        require(
            not self.coupled or self.num_masks % 2 == 0,
            "num_masks",
            self.num_masks,
            "coupled masks come in complementary pairs, so it must be even. Try 2 or 4, or algorithm.coupled = false.",
        )
        is_read = self.weights == "target" or self.baseline == "unbias"
        check_density(self, is_read=is_read and self.likelihood == "order")

    @property
    def is_row_separable(self) -> bool:
        """Not with "unbias", whose softmax holds the B of the whole group."""
        return self.baseline != "unbias"

    @property
    def needs(self) -> Needs:
        return evidence_needs(self, is_old_used=self.baseline == "unbias")

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) the signed weights as they are where policy, old policy and reference agree; for the log."""
        agree = 0 * rewards  # nats
        return signed_weights(self, rewards, groups, agree, agree)[0]

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` random subsets of each completion."""
        return draw_replicates(self, rollouts, self.num_masks, noise.stream(str(iteration)))

    def draw_evidence(self, rollouts: Rollouts, noise: NoiseLike) -> Corruption:
        """What ℓ is read from; see `draw_evidence`."""
        return draw_evidence(self, rollouts, noise)

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        bound = elbo(x.logps, x.corruption)  # (B,)
        log_rnd = log_density_ratio(self, x)
        moved = log_rnd
        if self.baseline == "unbias":
            old = old_tokens(x, self.likelihood, self.count_positions, self.density).sum(1)
            moved = bound.detach().double() - old
        signed, weight, coef = signed_weights(self, x.rewards.double(), x.groups, log_rnd, moved)
        num_groups = len(x.groups.unique())
        loss = -(signed.to(bound) * bound).sum() / (num_groups * x.logps.shape[-1])
        metrics = weight_metrics(self, weight, coef, log_rnd, x.groups) | {
            "policy_loss": float(loss.detach()),
            "weight_max": float(signed.abs().max()),
            "elbo_good": chosen_mean(bound, signed > 0),
            "elbo_bad": chosen_mean(bound, signed < 0),
        }
        return LossOutput(loss, metrics)


@dataclass(frozen=True)
class DmpoWDDO:
    """Tells weighted completions of the target from those of the old policy by the log-ratio of policy to old policy.

        loss = -mean_i [ G w_i · log s(κ D_i) + a · log s(-κ D'_i) ],     s the logistic function
        D_i  = B_i - B_i^old

    G w_i estimates p_*/p_old, so that the optimum is s(D)/s(-D) = e^D = p_*/p_old: p_θ = p_*. D and D' are read from
    two halves of the masked copies, drawn independently (never complements of each other). κ = `discriminator_scale`,
    a = `negative_coef`. There is no baseline: the second term pushes down. With equal rewards and ℓ = 0 the gradient
    is zero on average only, as both terms then pull with the same strength on different masks.

    Where the published code differs: it compares B with log p_old(y; σ) (`old_likelihood = "order"`), which is off by
    the gap of the bound, many nats; it weights its first term by w and its second by 1, a factor G apart, where we use
    G w; without independent halves it adds up the copies instead of averaging them; with antithetic masks its halves
    are complements. Weights: as in `DmpoWDCE`.

    `old_likelihood = "elbo"` reads the policy at the start of the batch, which is the one that wrote the rollouts only
    where they are new: a buffer needs "order", here and in `likelihood`.

    Oracle: tests/test_dmpo.py::test_wddo_equals_the_loop_oracle
    """

    weights: str = "target"
    """"target": w as in the module's equation; "reward": softmax of coef · r alone (the code's α = 0)."""
    reward_temperature: float = 0.04
    """α, reward units for one nat of the target. Only "target" uses it."""
    likelihood: str = "order"
    """What ℓ is made of. "order": log-likelihoods along the reveal order, exact where that does not depend on the
    policy; "elbo": ELBO estimates of both models on the same masks, for every other sampler."""
    density: str = "untempered"
    """log p_old along the order: "untempered", of temperature 1 (paper and code); "tempered", of the law that the
    sampler drew from, with which w is an exact importance weight at any temperature. Asks for "order"
    in `likelihood` and `old_likelihood`."""
    num_evidence_masks: int = 4
    """Copies for each ELBO of ℓ, in complementary pairs; even. Without effect with "order"."""
    old_likelihood: str = "elbo"
    """What D subtracts. "elbo": the old policy's B on the same copies; "order": log p_old(y; σ), as the code."""
    discriminator_scale: float = 1.0
    """κ, factor of the log-ratio."""
    negative_coef: float = 1.0
    """a, weight of the term that pushes down what the old policy wrote."""
    use_independent_halves: bool = True
    """D from one half of the copies, D' from the other; False: both from all of them."""
    weight_coef: float = 1.0
    """coef, factor of the exponent; below 1 weights are flatter. The most that `ess_target` may choose."""
    ess_target: float = 0.0
    """Share of the group, in [0, 1): coef is lowered, group by group, until the effective sample size reaches it.
    0: never. The code's options are 0.7 and 0.8, within [0.01, 0.99]; ours has no lower end."""
    num_masks: int = 4
    """R, masked copies per rollout and pass, both halves together."""
    coupled: bool = False
    """Draw the masks of a half in complementary pairs."""
    stratify: bool = True
    """Spread the mask counts of one rollout's copies evenly within a half (ours)."""
    num_iterations: int = 8
    """μ, optimiser passes over the same rollouts."""
    fresh_masks: bool = True
    """New masked copies for each pass."""
    count_positions: str = "all"
    """"all": the canvas, end-of-text padding included (published code); "to_eos": up to the stop token, in ℓ and B."""

    is_row_separable: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("groups",)
    share_masks: ClassVar[bool] = True  # D is a difference of two bounds: on other masks it would be noise
    source: ClassVar[str] = "arXiv:2510.08233"

    def __post_init__(self) -> None:
        check_target_weights(self, WEIGHTS[:2])
        require_choice("old_likelihood", self.old_likelihood, LIKELIHOODS)
        for field in ("discriminator_scale", "negative_coef"):
            value = getattr(self, field)
            require(0 < value < float("inf"), field, value, "a factor. Use one above 0; 1 is the published setting.")
        halves, pairs = self.use_independent_halves, self.coupled
        step = (2 if halves else 1) * (2 if pairs else 1)
        parts = " of ".join(["two halves"] * halves + ["complementary pairs"] * pairs)
        require(
            self.num_masks % step == 0,
            "num_masks",
            self.num_masks,
            f"copies come in {parts}, so it must be a multiple of {step}. Try {step} or {2 * step}.",
        )
        is_order = self.likelihood == "order" or self.weights != "target"
        check_density(self, is_read=is_order and self.old_likelihood == "order")

    @property
    def needs(self) -> Needs:
        needs = evidence_needs(self, is_old_used=False)
        return replace(needs, old=self.old_likelihood == "elbo", order=needs.order or self.old_likelihood == "order")

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(B,) G w - a where old policy and reference agree, twice the pull on B at D = 0; for the log."""
        weight = target_weights(self, rewards, groups, 0 * rewards)[0]
        return group_size(groups) * weight - self.negative_coef

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """`num_masks` random subsets of each completion; the second half is drawn without a look at the first."""
        noise = noise.stream(str(iteration))
        if not self.use_independent_halves:
            return draw_replicates(self, rollouts, self.num_masks, noise)
        half = self.num_masks // 2
        return join_halves(*(draw_replicates(self, rollouts, half, noise.stream(name)) for name in ("up", "down")))

    def draw_evidence(self, rollouts: Rollouts, noise: NoiseLike) -> Corruption:
        """What ℓ is read from; see `draw_evidence`."""
        return draw_evidence(self, rollouts, noise)

    def loss(self, x: LossInputs) -> LossOutput:
        """The equation of the class."""
        log_rnd = log_density_ratio(self, x)
        weight, coef, _ = target_weights(self, x.rewards.double(), x.groups, log_rnd)
        up, down = self._log_ratios(x)  # (B,) nats each
        density = (group_size(x.groups) * weight).to(up)  # (B,), estimates p_*/p_old
        scale = self.discriminator_scale
        loss = -(density * logsigmoid(scale * up) + self.negative_coef * logsigmoid(-scale * down)).mean()
        metrics = weight_metrics(self, weight, coef, log_rnd, x.groups) | {
            "policy_loss": float(loss.detach()),
            "weight_max": float(weight.max()),
            "log_ratio_target": float((density * up.detach()).mean()),
            "log_ratio_old": float(down.detach().mean()),
        }
        return LossOutput(loss, metrics)

    def _log_ratios(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        """D and D', (B,) nats each."""
        logps: Tensor = x.logps
        old: Tensor | float = 0.0
        if self.old_likelihood == "elbo":
            # copy by copy before the sum: a small difference of large sums would lose digits in float32
            logps = logps - old_scores(x, "DmpoWDDO")[0].to(logps)
        else:
            old = old_tokens(x, self.old_likelihood, self.count_positions, self.density).sum(1).to(logps)
        weighted = x.corruption.weight.to(logps) * logps  # (B, K, L)
        parts: Sequence[Tensor] = (weighted, weighted)
        if self.use_independent_halves:
            parts = [2 * half for half in weighted.chunk(2, dim=1)]
        up, down = (part.sum((1, 2)) - old for part in parts)
        return up, down


def signed_weights(
    algorithm: DmpoWDCE,
    rewards: Tensor,  # (B,)
    groups: Tensor,  # (B,)
    log_rnd: Tensor,  # (B,) nats
    moved: Tensor,  # (B,) nats, estimate of log p_θ - log p_old; "unbias" alone looks at it
) -> tuple[Tensor, Tensor, Tensor]:  # (B,) each
    """w - baseline_scale · w_base; w; and coef (1 for raw rewards)."""
    a = algorithm
    if a.weights == "raw":
        mean = rewards - group_centered(rewards, groups)
        base = mean if a.baseline == "group_mean" else torch.zeros_like(mean)
        return rewards - a.baseline_scale * base, rewards, torch.ones_like(rewards)
    weight, coef, tilt = target_weights(a, rewards, groups, log_rnd)
    even = torch.ones_like(weight) / group_size(groups)  # what weights that add up to 1 are on average
    if a.baseline == "negative":
        base = group_softmax(coef * (log_rnd - tilt), groups)
    elif a.baseline == "unbias":
        base = group_softmax(moved, groups)
    else:
        base = torch.zeros_like(weight) if a.baseline == "none" else even
    return weight - a.baseline_scale * base, weight, coef
