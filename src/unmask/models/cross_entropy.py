"""Ways to log p(target) from hidden states, by name; all leave the mask token out of the support.

`chunked` is our own and the default. The others belong to libraries, whose softmax runs over the whole vocabulary:
where a kernel takes a bias, the mask token's is -inf, which is exact; where it takes none, `exclude_mask` corrects.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unmask.errors import ConfigError
from unmask.models.chunked_head import chunked_head, rows_per_chunk, widened
from unmask.optional import optional

CrossEntropy = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(hidden (N, H), weight (V, H) of the same type, targets (N,) int64, mask_token_id) -> log p(target), (N,) nats."""

MASK_SHARE_LIMIT = 0.5
"""Largest p(mask) that `exclude_mask` corrects. 1 - p(mask) is a difference of numbers that carry the rounding of
log Z, so its relative error is that rounding times p / (1 - p): no gain up to here, and any size close to 1."""


def check_cross_entropy(name: str) -> None:
    """Raises: ConfigError if there is no such way, or this machine cannot run it: package, torch version, GPU."""
    if name not in CROSS_ENTROPIES:
        close = difflib.get_close_matches(name, CROSS_ENTROPIES, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"model.cross_entropy = '{name}' is unknown. Known: {', '.join(CROSS_ENTROPIES)}.{hint}")
    if name in ("liger", "cce") and not torch.cuda.is_available():
        raise ConfigError(
            f"model.cross_entropy = '{name}' has kernels for GPUs only, and torch sees none. Use 'chunked' here."
        )
    if name in _KERNELS:
        _KERNELS[name]()


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """All logits at once, (N, V) kept for the backward pass: the fastest while they fit."""
    logits = widened(hidden @ weight.t())
    forbidden = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    forbidden[mask_token_id] = True
    return -functional.cross_entropy(logits.masked_fill(forbidden, float("-inf")), targets, reduction="none")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    return chunked_head(hidden, weight, targets, mask_token_id)[0]


def torch_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy`; in half precision it rounds each log-probability to that type."""
    function, options = _torch_kernel()
    # torch's own choice is about four rows per chunk at a vocabulary of 126,464, an order of magnitude slower
    chunks = options(chunking_method=None, batch_chunk_size=rows_per_chunk(len(weight)))
    bias = _mask_bias(weight, mask_token_id)
    nll = function(hidden, weight, targets, linear_bias=bias, reduction="none", options=chunks)
    return _without_mask_targets(-nll, targets, mask_token_id)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """Liger's fused linear cross-entropy; the head's gradient is added up in float32."""
    bias = _mask_bias(weight, mask_token_id)
    # in order: class weights, ignored index, z-loss scale, label smoothing, reduction, softcap, z-loss, accumulator
    settings = (None, -100, 0.0, 0.0, "none", None, False, torch.float32)
    nll = _liger_kernel().apply(hidden, weight, targets, bias, *settings)[0]
    return _without_mask_targets(-nll, targets, mask_token_id)


def cut(hidden: Tensor, weight: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """Cut cross-entropy (arXiv:2411.09009) with its gradient filter off, which would drop small gradients.

    Raises: ConfigError outside of half precision, for which the package has no backward pass.
    """
    function = _cut_kernel()
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"model.cross_entropy = 'cce' got hidden states in {hidden.dtype}: its gradients exist in half precision "
            "only. Set model.dtype = 'bfloat16', or use 'chunked'."
        )
    nll = function(hidden, weight, targets, reduction="none", filter_eps=None, impl="cce")
    return _without_mask_targets(exclude_mask(-nll, hidden, weight, targets, mask_token_id), targets, mask_token_id)


def exclude_mask(
    logp: Tensor,  # (N,) log-probabilities over all V ids
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    mask_token_id: int,
) -> Tensor:  # (N,)
    """Log-probabilities over the other V - 1 ids; differentiable. No number of use where the target is the mask token.

        log Z = l(y) - log p(y),   log p'(y) = log p(y) - log(1 - exp(l(mask) - log Z))

    Rows with p(mask) above `MASK_SHARE_LIMIT` are computed anew in chunks, without the mask token from the start.
    """
    logp, wide = widened(logp), widened(hidden)
    target_logit = (wide * widened(weight[targets])).sum(-1)
    log_mask_share = wide @ widened(weight[mask_token_id]) - (target_logit - logp)
    is_heavy = log_mask_share > math.log(MASK_SHARE_LIMIT)
    out = logp - torch.log1p(-log_mask_share.masked_fill(is_heavy, float("-inf")).exp())
    heavy = is_heavy.nonzero().squeeze(-1)
    if len(heavy) == 0:
        return out
    return out.index_put((heavy,), chunked(hidden[heavy], weight, targets[heavy], mask_token_id).to(out.dtype))


def _without_mask_targets(logp: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """float32 or wider, -inf without a gradient where the target is the mask token."""
    return widened(logp).masked_fill(targets == mask_token_id, float("-inf"))


def _mask_bias(weight: Tensor, mask_token_id: int) -> Tensor:
    """(V,): -inf for the mask token, 0 otherwise."""
    bias = weight.new_zeros(len(weight))
    bias[mask_token_id] = float("-inf")
    return bias


def _torch_kernel() -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """The function and the class of its options, looked up by name: torch has them since 2.13."""
    function = getattr(functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise ConfigError(
            f"model.cross_entropy = 'linear_cross_entropy' needs torch >= 2.13, found {torch.__version__}. "
            "Update torch, or use 'chunked'."
        )
    return function, options


def _liger_kernel() -> Any:
    module = optional("liger_kernel.ops.fused_linear_cross_entropy", "liger")
    # releases before 0.8.2 scale the head's gradient by one number for all tokens, silently
    if "token_grad_output" not in inspect.signature(module.fused_linear_cross_entropy_forward).parameters:
        raise ConfigError(
            "model.cross_entropy = 'liger': this liger-kernel gives wrong gradients for per-token losses. "
            "Update it: pip install 'liger-kernel>=0.8.2'"
        )
    return module.LigerFusedLinearCrossEntropyFunction


def _cut_kernel() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = optional("cut_cross_entropy", "cce").linear_cross_entropy
    return function


_KERNELS: dict[str, Callable[[], object]] = {
    "linear_cross_entropy": _torch_kernel,
    "liger": _liger_kernel,
    "cce": _cut_kernel,
}

CROSS_ENTROPIES: dict[str, CrossEntropy] = {
    "chunked": chunked,
    "plain": plain,
    "linear_cross_entropy": torch_chunks,
    "liger": liger,
    "cce": cut,
}
