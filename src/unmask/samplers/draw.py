"""Exact draws from categorical laws given by logits, with one keyed uniform per draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# float64 scratch per slice of rows: 2^20 numbers are 8 MiB, so that memory stays flat and a slice fits into cache
_SLICE_NUMBERS = 1 << 20
# below this vocabulary a cumulative sum over all of it costs less than the second level
_ONE_LEVEL = 1024


def draw_tokens(
    logits: Tensor,  # (N, V) float32 or float64, -inf = forbidden
    temperature: float,
    uniforms: Tensor | None,  # (N,) float64 in (0, 1); not read at temperature 0
) -> Tensor:  # (N,) int64
    """One id per row from softmax(logits / temperature); the argmax at temperature 0 (lowest id of equals).

    Inverse of the distribution function in float64: the smallest id whose cumulative weight exceeds u times the
    total. An id of weight zero is never returned, not even where rounding carries u times the total past the end (the
    heaviest id of the last level is, then).
    Same law as LLaDA's float64 Gumbel draw (arXiv:2502.09992), with one uniform per row instead of V.

    Raises: ValueError if uniforms are missing above temperature 0.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if uniforms is None:
        raise ValueError("draw_tokens() above temperature 0 needs uniforms (N,), one for each row of logits")
    rows = max(1, _SLICE_NUMBERS // logits.shape[-1])
    slices = zip(logits.split(rows), uniforms.split(rows), strict=True)
    ids = [_draw_slice(part, temperature, u) for part, u in slices]
    return torch.cat(ids)


def token_logps(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,) int64
    dtype: torch.dtype,
    temperature: float = 1.0,  # above 0
) -> Tensor:  # (N,) nats
    """log softmax(logits / temperature) at `ids`, with logits cast to `dtype` first."""
    rows = max(1, _SLICE_NUMBERS // logits.shape[-1])
    log_total = torch.cat([(part.to(dtype) / temperature).logsumexp(-1) for part in logits.split(rows)])
    return logits.gather(-1, ids[:, None]).squeeze(-1).to(dtype) / temperature - log_total


def recorded_logps(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,) int64, what `draw_tokens` gave at this temperature
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (N,) float64, nats, each
    """Log-probabilities of drawn ids: untempered, and in the law that they were drawn from.

    The second is log softmax(logits / temperature), and 0 at temperature 0, where nothing is left to chance.
    """
    logps = token_logps(logits, ids, torch.float64)
    if temperature == 1:
        return logps, logps
    if temperature == 0:
        return logps, torch.zeros_like(logps)
    return logps, token_logps(logits, ids, torch.float64, temperature)


def token_probabilities(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,) int64
) -> Tensor:  # (N,)
    """softmax(logits) at `ids`, in the precision of the logits.

    Not exp(logit - logsumexp): that loses the digits of both in float32 and ranks confident tokens otherwise.
    """
    rows = max(1, _SLICE_NUMBERS // logits.shape[-1])
    parts = zip(logits.split(rows), ids.split(rows), strict=True)
    return torch.cat([part.softmax(-1).gather(-1, chosen[:, None]).squeeze(-1) for part, chosen in parts])


def _draw_slice(
    logits: Tensor,  # (n, V)
    temperature: float,
    uniforms: Tensor,  # (n,)
) -> Tensor:  # (n,)
    """Two levels, so that only sums, not a cumulative sum, run over the whole vocabulary: first a chunk of about
    sqrt(V) neighbouring ids, then an id in it."""
    n, vocab = logits.shape
    width = vocab if vocab <= _ONE_LEVEL else math.isqrt(vocab - 1) + 1
    padded = logits.new_full((n, width * math.ceil(vocab / width)), -math.inf, dtype=torch.float64)
    padded[:, :vocab] = logits
    padded -= logits.amax(-1, keepdim=True)
    if temperature != 1:
        padded /= temperature
    weights = padded.exp_().unflatten(-1, (-1, width))  # (n, chunks, width)
    totals = weights.sum(-1)  # (n, chunks)
    target = uniforms[:, None] * totals.sum(-1, keepdim=True)  # (n, 1)
    if totals.shape[1] == 1:
        return _invert(weights[:, 0], target)[0]
    chunk, rest = _invert(totals, target)
    inside = weights[torch.arange(n, device=logits.device), chunk]  # (n, width)
    return chunk * width + _invert(inside, rest)[0]


def _invert(
    weights: Tensor,  # (n, W) >= 0
    target: Tensor,  # (n, 1)
) -> tuple[Tensor, Tensor]:  # (n,) int64, (n, 1)
    """The first index of positive weight whose cumulative weight exceeds the target, and what is left of the target
    before that index. If rounding leaves no such index, the heaviest."""
    cumulative = weights.cumsum(-1)
    # the weight is looked at itself because a parallel cumulative sum need not be flat to the last bit across zeros
    reached = (cumulative > target).logical_and_(weights > 0)
    index = weights.masked_fill(reached, math.inf).argmax(-1, keepdim=True)  # argmax returns the first of equals
    rest = target - (cumulative.gather(-1, index) - weights.gather(-1, index))
    return index.squeeze(-1), rest
