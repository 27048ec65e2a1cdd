"""From log-probabilities read off masked copies to estimates of a completion's log-likelihood. Pure algebra."""

from __future__ import annotations

from torch import Tensor

from unmask.types import Corruption


def token_estimate(
    logps: Tensor,  # (B, K, L) nats
    corruption: Corruption,
) -> Tensor:  # (B, L) nats
    """Each position's share of the estimate, Σ_k weight · logps; zero where no copy was read.

    Computed in the dtype of `logps` and differentiable in it. The shares of a row add up to `sequence_estimate`.
    """
    return (corruption.weight.to(logps) * logps).sum(1)


def sequence_estimate(
    logps: Tensor,  # (B, K, L) nats
    corruption: Corruption,
) -> Tensor:  # (B,) nats
    """Estimate for the whole completion, Σ_k Σ_i weight · logps, of whatever `corruption.kind` names."""
    return token_estimate(logps, corruption).sum(1)


def elbo(
    logps: Tensor,  # (B, K, L) nats
    corruption: Corruption,
) -> Tensor:  # (B,) nats
    """Unbiased estimate of a lower bound on log p(completion | prompt), summed over the completion.

        ELBO = E_{m ~ U{1..L}, |S| = m} [ L/m · Σ_{i∈S} log p(y_i | q, y outside S) ]

    The draw decides the weights, which stand in `corruption`; this is the weighted sum.

    Raises: ValueError if `corruption.kind` is not "elbo".
    Source: LLaDA, arXiv:2502.09992; ESPO, arXiv:2512.03759.
    Oracle: tests/test_likelihood.py::test_mean_over_the_law_of_draws_is_the_exact_elbo
    """
    if corruption.kind != "elbo":
        raise ValueError(
            f"elbo() got a {corruption.kind!r} corruption; its weights form no bound. "
            "Draw with corruption.draw_uniform_count()."
        )
    return sequence_estimate(logps, corruption)


def token_eubo(
    logps: Tensor,  # (B, K, L) nats
    corruption: Corruption,
    gamma: float,
    *,
    normalize: bool,
) -> Tensor:  # (B, L) nats
    """Each position's share of the EUBO; zero where no copy was read.

        (1/γ) log Σ_k w_k e^{γ l_k}                  w: the weights of the draw
        (1/γ) log Σ_k w_k e^{γ l_k} / Σ_k w_k        with `normalize`

    The two differ by a number that the draw alone decides, so their gradients are the same: a softmax of
    γ l_k + log w_k over the copies. With one read of a position the second is l itself.

    Raises: ValueError if gamma < 1: below it this is no upper bound even of the ELBO.
    """
    if not gamma >= 1:
        raise ValueError(f"gamma = {gamma}: the exponent of an EUBO is at least 1. Try 1.5.")
    weight = corruption.weight.to(logps)
    is_read = (weight > 0).any(1)  # (B, L)
    # a position that no copy read would be log 0, with an undefined gradient: it takes weight 1 and is left out below
    log_weight = weight.masked_fill(~is_read[:, None], 1.0).log()
    estimate = (gamma * logps + log_weight).logsumexp(1)  # (B, K, L) -> (B, L)
    if normalize:
        estimate = estimate - log_weight.logsumexp(1)
    return (estimate / gamma).masked_fill(~is_read, 0.0)


def eubo(
    logps: Tensor,  # (B, K, L) nats
    corruption: Corruption,
    gamma: float,
    *,
    normalize: bool = True,
) -> Tensor:  # (B,) nats
    """Estimate of the evidence upper bound with exponent γ, summed over the completion.

        EUBO = Σ_i (1/γ) log E_{m ~ U{1..L}, |S| = m} [ L/m · 1[i∈S] · p(y_i | q, y outside S)^γ ]

    When it is a bound: EUBO >= ELBO for every model and γ >= 1, and it grows with γ. EUBO >= log p is certain only for
    γ >= L, or where all conditionals are those of one joint. Otherwise it may fail: with L = 2, p(y_1) = 0.1 and
    p(y_2) = 0.9, each the other way round once the other token is shown, p = 0.41 while exp EUBO is 0.25 at γ = 1 (and
    0.41 at γ = 2). And this estimate is low on average, being the logarithm of a mean over finitely many copies: what
    holds, holds in the limit of many.

    Positions that no copy read add nothing; coupled draws read each one. `normalize` divides by the weights that a
    position got instead of their expectation 1, see `token_eubo`: less noise, the same limit and gradient.

    Raises: ValueError if `corruption.kind` is not "elbo", or gamma < 1.
    Source: SPG, arXiv:2510.09541 (its β is γ); the constant it drops where γ < L has no gradient, but decides whether
    this is a bound.
    Oracle: tests/test_likelihood_eubo.py::test_weighted_mean_over_the_law_of_draws_is_the_exact_eubo
    """
    if corruption.kind != "elbo":
        raise ValueError(
            f"eubo() got a {corruption.kind!r} corruption; its weights form no mean over contexts. "
            "Draw with corruption.draw_uniform_count()."
        )
    return token_eubo(logps, corruption, gamma, normalize=normalize).sum(1)
