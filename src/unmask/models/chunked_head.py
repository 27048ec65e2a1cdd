"""Log-probabilities and entropies from hidden states in row chunks: our own autograd function, the default path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits held at once when no one asked for logits: 2^24 numbers are 64 MiB in float32
CHUNK_NUMBERS = 1 << 24


def chunked_head(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), of the same type
    targets: Tensor,  # (N,) int64
    mask_token_id: int,
    want_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and, if wanted, the entropy, (N,) nats each, float32 or wider; the mask token is excluded.

    The entropy carries no gradient. Memory does not grow with N·V.
    """
    logp, entropy = _ChunkedHead.apply(hidden, weight, targets, mask_token_id, want_entropy)
    return logp, entropy


def rows_per_chunk(vocab: int) -> int:
    """Rows whose logits are at most `CHUNK_NUMBERS` numbers; one at least."""
    return max(1, CHUNK_NUMBERS // vocab)


def widened(x: Tensor) -> Tensor:
    """float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
            logp[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1)
            p, log_total[rows] = _softmax_(logits)
            if want_entropy:
                entropy[rows] = torch.special.entr(p).sum(-1)
            if direction is not None:
                slope = _slope_(p, targets[rows], mask_token_id)
                direction[rows] = slope.to(weight.dtype) @ weight
                del slope
            del logits, p  # one buffer: the next chunk is not made beside this one
        logp -= log_total
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
            slope = _slope_(logits.sub_(log_total[rows, None]).exp_(), targets[rows], ctx.mask_token_id)
            slope = slope.mul_(grad_logp[rows, None]).to(weight.dtype)  # (n, V)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None:
                _add_product_(grad_weight, slope.t(), hidden[rows])
            del logits, slope
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _row_chunks(num_rows: int, vocab: int) -> Iterator[slice]:
    """Equal slices of rows whose logits are about `CHUNK_NUMBERS` numbers; one row at least."""
    num_chunks = max(1, -(-num_rows // rows_per_chunk(vocab)))
    size = max(1, -(-num_rows // num_chunks))
    yield from (slice(start, start + size) for start in range(0, num_rows, size))


def _chunk_logits(hidden: Tensor, weight: Tensor, mask_token_id: int) -> Tensor:
    """(n, V), float32 or wider, -inf for the mask token; a tensor of its own."""
    logits = widened(hidden @ weight.t())
    logits[:, mask_token_id] = float("-inf")
    return logits


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, V), written over the logits, and the logarithm of what they were divided by, (n,)."""
    top = logits.amax(-1, keepdim=True)
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), (top + total.log()).squeeze(-1)


def _slope_(p: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """∂ log p(target) / ∂ logits = onehot(target) - p, (n, V), written over p."""
    slope = p.neg_()
    slope.scatter_add_(1, targets[:, None], torch.ones_like(p[:, :1]))
    slope[:, mask_token_id] = 0.0  # excluded, so also where it is the target
    return slope


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; half-precision products are added up in `total`'s wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
