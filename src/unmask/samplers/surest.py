"""The end of a step in which every row fixes equally many tokens, those it is surest of."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.samplers.canvas import Canvas
from unmask.samplers.draw import token_logps


def fix_surest(
    canvas: Canvas,
    open_slots: Tensor,  # (B, r) int64, ascending
    logits: Tensor,  # (B·r, V), of the open slots, row by row
    tokens: Tensor,  # (B·r,) int64, a candidate for each
    confidence: Tensor,  # (B·r,)
    count: int,
) -> Tensor:  # (B, r - count) int64, ascending
    """Write the `count` candidates of highest confidence of each row; the lower position of equals comes first.

    Recorded are their untempered log-probabilities. Returns the slots still open.
    """
    ranked = confidence.view_as(open_slots).argsort(dim=1, descending=True, stable=True)
    fixed, kept = ranked[:, :count], ranked[:, count:].sort(1).values
    first = torch.arange(len(ranked), device=ranked.device)[:, None] * ranked.shape[1]
    chosen = (first + fixed).flatten()  # (B·count,) rows of logits
    logps = token_logps(logits[chosen], tokens[chosen], torch.float64)
    canvas.write(open_slots.gather(1, fixed), tokens[chosen].view_as(fixed), logps.view_as(fixed))
    return open_slots.gather(1, kept)
