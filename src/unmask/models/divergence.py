"""KL to a reference over the whole vocabulary, from hidden states in row chunks: (N, V) is never held at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.models.chunked_head import _add_product_, _chunk_logits, _row_chunks
from unmask.types import ReferenceStates


def kl_to_reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), of a head without bias
    reference: ReferenceStates,
    mask_token_id: int,
) -> Tensor:  # (N,) nats, float32 or wider
    """KL(p || q) = Σ_v p_v (log p_v - log q_v) at each position, the mask token excluded from both.

    Differentiable in `hidden` and `weight`, and in nothing of the reference. Exactly zero, with a gradient of exactly
    zero, where both sides have the same bits. Rounding may make a value slightly negative, about -1e-7 in float32.

    Source: the masked KL of Diffusion-Gibbs Alignment, Eq. 15.
    Oracle: tests/test_divergence.py::test_value_and_gradient_are_those_of_the_full_softmax
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):  # cast here: the backward pass runs outside of autocast
        dtype = torch.get_autocast_dtype(hidden.device.type)
    head = weight.detach() if reference.head is None else reference.head
    states = (hidden.to(dtype), weight.to(dtype), reference.hidden.to(dtype), head.to(dtype))
    kl: Tensor = _ChunkedKL.apply(*states, mask_token_id)
    return kl


class _ChunkedKL(torch.autograd.Function):
    """KL(p || q) of p = softmax(hidden @ weight.T), q = softmax(ref_hidden @ ref_weight.T).

        ∂ KL / ∂ logits_v = p_v (log p_v - log q_v - KL)

    As in `chunked_head`: chunks are computed again in the backward pass, unless the weight is frozen, where a row's
    gradient is its coefficient times a direction that the forward pass leaves behind.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, mask_token_id: int
    ) -> Tensor:
        kl = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        is_frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        direction = torch.empty_like(hidden) if is_frozen else None  # (N, H)
        for rows in _row_chunks(len(hidden), 2 * len(weight)):  # two chunks of logits at a time
            gap = _log_ratio(hidden[rows], weight, ref_hidden[rows], ref_weight, mask_token_id)
            kl[rows], slope = _value_and_slope(*gap)
            if direction is not None:
                direction[rows] = slope.to(weight.dtype) @ weight
            del gap, slope
        ctx.mask_token_id, ctx.is_frozen, ctx.dtype = mask_token_id, is_frozen, hidden.dtype
        # with a direction the backward needs no matrix: one that was gathered for the forward may go
        ctx.save_for_backward(*((direction,) if is_frozen else (hidden, weight, ref_hidden, ref_weight)))
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_frozen:
            (direction,) = ctx.saved_tensors
            return (grad[:, None] * direction).to(ctx.dtype), None, None, None, None
        hidden, weight, ref_hidden, ref_weight = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for rows in _row_chunks(len(hidden), 2 * len(weight)):
            gap = _log_ratio(hidden[rows], weight, ref_hidden[rows], ref_weight, ctx.mask_token_id)
            slope = _value_and_slope(*gap)[1].mul_(grad[rows, None]).to(weight.dtype)  # (n, V)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None:
                _add_product_(grad_weight, slope.t(), hidden[rows])
            del gap, slope
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _log_ratio(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """p and log p - log q, (n, V) each; both zero for the mask token."""
    log_p = _chunk_logits(hidden, weight, mask_token_id).log_softmax(-1)
    log_q = _chunk_logits(ref_hidden, ref_weight, mask_token_id).log_softmax(-1)
    p = log_p.exp()
    ratio = log_p.sub_(log_q)
    ratio[:, mask_token_id] = 0.0  # -inf minus -inf
    return p, ratio


def _value_and_slope(p: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """KL (n,) and ∂ KL / ∂ logits (n, V), the latter written over `p` and `ratio`."""
    kl = (p * ratio).sum(-1)
    return kl, ratio.sub_(kl[:, None]).mul_(p)
