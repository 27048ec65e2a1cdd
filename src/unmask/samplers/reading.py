"""Where a step's logits come from: the whole canvas, a window of it behind a cache, or with and without the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.samplers.canvas import Canvas, read_logits
from unmask.types import Policy

CACHES = ("none", "prefix", "dual")


def guided_logits(
    policy: Policy,
    canvas: Canvas,
    wanted: Tensor,  # (B, L) bool, N of them
    scale: float,
) -> Tensor:  # (N, V)
    """u + (scale + 1)(c - u) of the logits c and those u where the prompt is masked, in one forward of twice the rows.

    Classifier-free guidance as LLaDA has it, arXiv:2502.09992. A token that neither may draw stays at -inf.
    """
    rows = wanted.any(1)
    ids, positions = canvas.ids[rows], canvas.positions(wanted)[rows]
    blind = ids.clone()
    blind[:, : canvas.prompt_length] = policy.mask_token_id
    mask = None if canvas.attention_mask is None else canvas.attention_mask[rows].repeat(2, 1)
    both = read_logits(policy, torch.cat([ids, blind]), mask, positions.repeat(2, 1))
    c, u = both.chunk(2)
    return torch.where(c.isneginf(), c, u + (scale + 1) * (c - u))


class WindowReader:
    """Logits of a block's slots: at first from the whole canvas, then from a window of it that begins with the block.

    "prefix": keys and values before the block are kept, the window goes to the end of the canvas. "dual": those behind
    the block are kept too. What is kept is what the last forward of the whole canvas found, when the block was masked:
    Fast-dLLM, arXiv:2505.22618. Where a token is read from the state of the position before it (Dream), the window
    begins one position earlier, which is read anew; the authors' code takes the block's first token from the forward of
    the whole canvas in any case. Rows that want nothing leave the batch and the cache.
    """

    def __init__(self, policy: Policy, canvas: Canvas, kind: str, refresh_every: int | None):
        self.policy, self.canvas, self.keeps_suffix = policy, canvas, kind == "dual"
        self.refresh_every = refresh_every
        self.block = range(0)
        self.steps = 0
        self.cache: Any = None
        self.rows = torch.zeros(0, dtype=torch.int64)

    def open_block(self, slots: range) -> None:
        """The next steps fill these slots."""
        self.block, self.steps = slots, 0

    def read(
        self,
        wanted: Tensor,  # (B, L) bool, N of them, all in the block
    ) -> Tensor:  # (N, V)
        """One forward of the rows that want something."""
        rows = wanted.any(1).nonzero()[:, 0]
        is_whole = self.steps == 0 or (self.refresh_every is not None and self.steps % self.refresh_every == 0)
        self.steps += 1
        if is_whole:
            return self._read_whole(wanted, rows)
        return self._read_window(wanted, rows)

    def _read_whole(self, wanted: Tensor, rows: Tensor) -> Tensor:
        self.cache, self.rows = self.policy.new_window_cache(self.keeps_suffix), rows
        return read_logits(self.policy, self.canvas.ids[rows], self._mask(), self._positions(wanted), self.cache)

    def _read_window(self, wanted: Tensor, rows: Tensor) -> Tensor:
        if len(rows) < len(self.rows):
            self.cache.keep(torch.isin(self.rows, rows).nonzero()[:, 0])
            self.rows = rows
        canvas, before = self.canvas, self.canvas.prompt_length
        start = max(before + self.block.start - (self.policy.lookback or 0), 0)
        end = before + self.block.stop if self.keeps_suffix else canvas.ids.shape[1]
        self.cache.freeze(start)
        window = slice(start, end)
        positions = self._positions(wanted)[:, window]
        return read_logits(self.policy, canvas.ids[rows, window], self._mask(), positions, self.cache)

    def _mask(self) -> Tensor | None:
        mask = self.canvas.attention_mask
        return None if mask is None else mask[self.rows]

    def _positions(self, wanted: Tensor) -> Tensor:
        return self.canvas.positions(wanted)[self.rows]
