"""From hidden states or logits to numbers about tokens: the one implementation, called by heads.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.models.chunked_head import chunked_head, widened
from unmask.models.cross_entropy import CROSS_ENTROPIES
from unmask.types import TokenOutput

OUTPUTS = ("logits", "logp", "entropy")
"""What logits give."""
STATES = ("scalar", "hidden", "pooled", "kl")
"""What needs hidden states."""


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
    logits = widened(logits)
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
    cross_entropy: str = "chunked",  # a name of CROSS_ENTROPIES: what computes "logp"
) -> TokenOutput:
    """As `summarise_logits(hidden @ weight.T, ...)`; unless "plain" is chosen, memory does not grow with N·V.

    Raises: ValueError for an output other than "logp" and "entropy", or "logp" without targets; ConfigError if the
    package of `cross_entropy` is missing.
    Oracle: tests/test_heads.py::test_chunks_equal_the_plain_head, tests/test_cross_entropy.py
    """
    _check_want(want, targets, known=("logp", "entropy"))
    if targets is None:
        targets = torch.zeros_like(hidden[:, 0], dtype=torch.int64)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):  # cast here: the backward pass runs outside of autocast
        dtype = torch.get_autocast_dtype(hidden.device.type)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if cross_entropy == "chunked":
        logp, entropy = chunked_head(hidden, weight, targets, mask_token_id, "entropy" in want)
        return TokenOutput(None, logp if "logp" in want else None, entropy)
    kernel_logp = entropy = None
    if "logp" in want:
        # by the chosen one also where the chunks below know it: scores with and without entropy are compared as ratios
        kernel_logp = CROSS_ENTROPIES[cross_entropy](hidden, weight, targets, mask_token_id)
    if "entropy" in want:
        with torch.no_grad():
            _, entropy = chunked_head(hidden, weight, targets, mask_token_id, want_entropy=True)
    return TokenOutput(None, kernel_logp, entropy)


def pool(
    hidden: Tensor,  # (N, H), in row-major order of the wanted positions
    positions: Tensor,  # (b, T) bool
) -> Tensor:  # (b, H), float32 or wider
    """Mean of each row's wanted hidden states; zero for a row without any."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = positions.nonzero()[:, 0]  # (N,) row of each wanted position
    total = hidden.new_zeros(len(positions), hidden.shape[-1], dtype=wide).index_add(0, rows, hidden.to(wide))
    return total / positions.sum(1, keepdim=True).clamp(min=1)


def _check_want(want: Sequence[str], targets: Tensor | None, known: Sequence[str] = OUTPUTS) -> None:
    unknown = set(want) - set(known)
    if unknown:
        raise ValueError(f"unknown token outputs {sorted(unknown)}; known: {', '.join(known)}")
    if "logp" in want and targets is None:
        raise ValueError("token output 'logp' needs targets (N,), one token id for each wanted position")
