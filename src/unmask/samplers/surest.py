"""The end of a step in which every row fixes equally many tokens, those it is surest of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unmask.samplers.canvas import Canvas


def fix_surest(
    canvas: Canvas,
    open_slots: Tensor,  # (B, r) int64, ascending
    logits: Tensor,  # (B·r, V), of the open slots, row by row
    tokens: Tensor,  # (B·r,) int64, a candidate for each
    confidence: Tensor,  # (B·r,)
    count: int,
    record: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:  # (B, r - count) int64, ascending
    """Write the `count` candidates of highest confidence of each row; the lower position of equals comes first.

    `record` gives both log-probabilities of tokens (n,) that were drawn from logits (n, V), see `Samples`. Returns the
    slots still open.
    """
    ranked = confidence.view_as(open_slots).argsort(dim=1, descending=True, stable=True)
    fixed, kept = ranked[:, :count], ranked[:, count:].sort(1).values
    first = torch.arange(len(ranked), device=ranked.device)[:, None] * ranked.shape[1]
    chosen = (first + fixed).flatten()  # (B·count,) rows of logits
    logps, drawn = record(logits[chosen], tokens[chosen])
    slots = open_slots.gather(1, fixed)
    canvas.write(slots, tokens[chosen].view_as(fixed), logps.view_as(fixed), drawn.view_as(fixed))
    return open_slots.gather(1, kept)
