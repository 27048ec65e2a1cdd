"""From hidden states or logits to numbers about tokens: the one implementation, called by heads.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.types import TokenOutput

OUTPUTS = ("logits", "logp", "entropy")

# logits held at once when no one asked for logits: 2^24 numbers are 64 MiB in float32
CHUNK_NUMBERS = 1 << 24


def summarise_logits(
    logits: Tensor,  # (N, V); the mask token's column is overwritten unless a gradient is recorded
    targets: Tensor | None,  # (N,) int64
    want: Sequence[str],
    mask_token_id: int,
) -> TokenOutput:
    """Log-probabilities of `targets` and entropies from logits, without the mask token in the support.

    A sampler may never write the mask token, so the likelihood must not give it probability either: its logit is
    set to -inf for samplers and likelihoods alike. Computed in float32 or wider. The entropy carries no gradient.

    Raises: ValueError for an unknown output, or "logp" without targets.
    """
    _check_want(want, targets)
    logits = _widened(logits)
    if logits.requires_grad:
        forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        forbidden[mask_token_id] = True
        logits = logits.masked_fill(forbidden, float("-inf"))
    else:
        logits[..., mask_token_id] = float("-inf")  # in place: a copy of (N, V) costs as much as a softmax
    logp = entropy = None
    if "logp" in want:
        log_total = logits.logsumexp(-1)  # (N,)
        logp = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total  # type: ignore[index]
    if "entropy" in want:
        with torch.no_grad():
            # -p log p -> 0 as p -> 0; entr takes that limit, also for the mask token
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return TokenOutput(logits if "logits" in want else None, logp, entropy)


def summarise_hidden(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), of a head without bias
    targets: Tensor | None,  # (N,) int64
    want: Sequence[str],  # among "logp", "entropy"
    mask_token_id: int,
) -> TokenOutput:
    """As `summarise_logits(hidden @ weight.T, ...)`, in row chunks: memory does not grow with N·V.

    Raises: ValueError for an output other than "logp" and "entropy", or "logp" without targets.
    Oracle: tests/test_heads.py::test_chunks_equal_the_plain_head
    """
    _check_want(want, targets, known=("logp", "entropy"))
    if targets is None:
        targets = torch.zeros_like(hidden[:, 0], dtype=torch.int64)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):  # cast here: the backward pass runs outside of autocast
        dtype = torch.get_autocast_dtype(hidden.device.type)
    logp, entropy = _ChunkedHead.apply(hidden.to(dtype), weight.to(dtype), targets, mask_token_id, "entropy" in want)
    return TokenOutput(None, logp if "logp" in want else None, entropy)


class _ChunkedHead(torch.autograd.Function):
    """log p(target) and entropy of softmax(hidden @ weight.T) with the mask token excluded; p is the softmax.

        ∂ log p(y) / ∂ logits = onehot(y) - p

    Chunks of logits are computed again in the backward pass. With a frozen weight they need not be: a row's gradient
    is then its coefficient times (onehot(y) - p) @ weight, which the forward pass leaves behind.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp, log_total, entropy = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        is_frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        direction = torch.empty_like(hidden) if is_frozen else None  # (N, H)
        for rows in _row_chunks(len(hidden), len(weight)):
            logits = _chunk_logits(hidden[rows], weight, mask_token_id)
            log_total[rows] = logits.logsumexp(-1)
            logp[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - log_total[rows]
            if want_entropy:
                entropy[rows] = torch.special.entr((logits - log_total[rows, None]).exp_()).sum(-1)
            if direction is not None:
                slope = _slope_(logits, log_total[rows], targets[rows], mask_token_id)
                direction[rows] = slope.to(weight.dtype) @ weight
        ctx.mask_token_id = mask_token_id
        ctx.save_for_backward(hidden, weight, targets, log_total, direction)
        if not want_entropy:
            return logp, None
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_total, direction = ctx.saved_tensors
        if direction is not None:
            return (grad_logp[:, None] * direction).to(hidden.dtype), None, None, None, None
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=log_total.dtype) if ctx.needs_input_grad[1] else None
        for rows in _row_chunks(len(hidden), len(weight)):
            logits = _chunk_logits(hidden[rows], weight, ctx.mask_token_id)
            slope = _slope_(logits, log_total[rows], targets[rows], ctx.mask_token_id)
            slope = slope.mul_(grad_logp[rows, None]).to(weight.dtype)  # (n, V)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None:
                _add_product_(grad_weight, slope.t(), hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _check_want(want: Sequence[str], targets: Tensor | None, known: Sequence[str] = OUTPUTS) -> None:
    unknown = set(want) - set(known)
    if unknown:
        raise ValueError(f"unknown token outputs {sorted(unknown)}; known: {', '.join(known)}")
    if "logp" in want and targets is None:
        raise ValueError("token output 'logp' needs targets (N,), one token id for each wanted position")


def _widened(x: Tensor) -> Tensor:
    """float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _row_chunks(num_rows: int, vocab: int) -> Iterator[slice]:
    """Equal slices of rows whose logits are about `CHUNK_NUMBERS` numbers; one row at least."""
    limit = max(1, CHUNK_NUMBERS // vocab)
    num_chunks = max(1, -(-num_rows // limit))
    size = max(1, -(-num_rows // num_chunks))
    yield from (slice(start, start + size) for start in range(0, num_rows, size))


def _chunk_logits(hidden: Tensor, weight: Tensor, mask_token_id: int) -> Tensor:
    """(n, V), float32 or wider, -inf for the mask token; a tensor of its own."""
    logits = _widened(hidden @ weight.t())
    logits[:, mask_token_id] = float("-inf")
    return logits


def _slope_(logits: Tensor, log_total: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """∂ log p(target) / ∂ logits, (n, V), written over the logits."""
    slope = logits.sub_(log_total[:, None]).exp_().neg_()
    slope.scatter_add_(1, targets[:, None], torch.ones_like(log_total[:, None]))
    slope[:, mask_token_id] = 0.0  # excluded, so also where it is the target
    return slope


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; half-precision products are added up in `total`'s wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
