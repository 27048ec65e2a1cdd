"""Which of the candidates of a step are fixed, and the end of such a step. Rows may fix unequally many."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unmask.samplers.canvas import Canvas
from unmask.samplers.draw import draw_tokens, recorded_logps, token_probabilities
from unmask.types import NoiseLike

Rule = Callable[[Tensor], Tensor]
"""From how sure the model is of each candidate, (B, L), -inf where no slot is open, to which are fixed, (B, L) bool."""


def surest(confidence: Tensor, count: int) -> Tensor:
    """The `count` surest of every row that has open slots, or all if there are fewer."""
    return (ranks(confidence) < count) & (confidence > -math.inf)


def above(confidence: Tensor, threshold: float) -> Tensor:
    """All at or above the threshold, and the surest of a row in any case. Fast-dLLM, arXiv:2505.22618."""
    return (confidence >= threshold) & (confidence > -math.inf) | surest(confidence, 1)


def within_factor(confidence: Tensor, factor: float) -> Tensor:
    """The n surest, for the largest n with (k + 1)(1 - c_(k)) <= factor for all k up to it; at least one.

        c_(1) >= c_(2) >= ... are a row's confidences. Fast-dLLM, arXiv:2505.22618, whose code fixes all where the test
    fails at the last of them alone; here it does not.
    """
    ranked, order = confidence.sort(dim=1, descending=True, stable=True)
    k = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
    passes = (k + 1) * (1 - ranked) <= factor  # both factors grow with k: what fails once fails from there on
    passes[:, 0] = True
    return _scattered(passes, order) & (confidence > -math.inf)


def within_entropy(negative_entropy: Tensor, bound: float) -> Tensor:
    """The n of least entropy, for the largest n with (sum of their entropies) - (the largest of them) <= bound nats.

    At least one. The bound is one on how far the joint law of these tokens may be from the product of their own.
    Entropy-bounded sampling, arXiv:2505.24857, with the entropy as the order.
    """
    is_open = negative_entropy > -math.inf
    ranked, order = negative_entropy.sort(dim=1, descending=True, stable=True)
    entropy = torch.where(ranked > -math.inf, -ranked, 0.0)
    earlier = torch.zeros_like(entropy)  # the largest of an ascending sequence is its last, and is left out
    earlier[:, 1:] = entropy[:, :-1].cumsum(1)
    passes = earlier <= bound
    passes[:, 0] = True
    return _scattered(passes, order) & is_open


def ranks(confidence: Tensor) -> Tensor:  # (B, L) int64
    """Place of every slot when a row is sorted from the surest down; the lower position of equals comes first."""
    return confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def negative_entropies(
    logits: Tensor,  # (N, V)
) -> Tensor:  # (N,) nats
    """Σ p log p of softmax(logits), in float32 or wider."""
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return (logp.exp() * logp.clamp(min=-1e4)).sum(-1)


def fix(
    canvas: Canvas,
    is_open: Tensor,  # (B, L) bool, N of them
    logits: Tensor,  # (N, V)
    rule: Rule,
    *,
    temperature: float,
    noise: NoiseLike | None,  # None at temperature 0
    by_entropy: bool = False,
) -> Tensor:  # (B, L) bool
    """One step: a candidate for every open slot, those that the rule names are written. Returns which are still open.

    x_i ~ softmax(logits_i / temperature);   confidence_i = softmax(logits_i)[x_i], or Σ p log p `by_entropy`
    """
    uniforms = None
    if noise is not None:
        slots = torch.arange(is_open.shape[1], device=is_open.device)[None]  # (1, L)
        uniforms = canvas.uniforms(noise, canvas.nfe, slots)[is_open]
    tokens = draw_tokens(logits, temperature, uniforms)  # (N,)
    sureness = negative_entropies(logits) if by_entropy else token_probabilities(logits, tokens)  # (N,)
    record = partial(recorded_logps, temperature=temperature)
    return fix_candidates(canvas, is_open, logits, tokens, sureness, rule, record)


def fix_candidates(
    canvas: Canvas,
    is_open: Tensor,  # (B, L) bool, N of them
    logits: Tensor,  # (N, V)
    tokens: Tensor,  # (N,) int64
    sureness: Tensor,  # (N,)
    rule: Rule,
    record: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:  # (B, L) bool
    """Write those of the candidates that the rule names, and end the step. Returns which slots are still open.

    `record` gives both log-probabilities of tokens (n,) that were drawn from logits (n, V), see `Samples`.
    """
    chosen = is_open & rule(spread(sureness, is_open))
    fixed = chosen[is_open]  # (N,)
    logps, drawn = record(logits[fixed], tokens[fixed])
    canvas.write_where(chosen, tokens[fixed], logps, drawn, took_part=is_open.any(1, keepdim=True))
    return is_open & ~chosen


def spread(
    numbers: Tensor,  # (N,)
    where: Tensor,  # (B, L) bool, N of them
) -> Tensor:  # (B, L)
    """-inf elsewhere. What is not finite is found when the rows are finished; it must not keep a row from going on."""
    return numbers.new_full(where.shape, -math.inf).masked_scatter_(where, numbers.nan_to_num(nan=0.0))


def _scattered(passes: Tensor, order: Tensor) -> Tensor:
    """From places in the order back to slots."""
    return torch.empty_like(passes).scatter_(1, order, passes)
