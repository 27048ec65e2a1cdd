"""Keys and values of a bidirectional model that are kept while a part of the canvas changes: an approximation.

A full forward fills the cache. Afterwards a window of the canvas is read alone, as if nothing outside had changed.
Fast-dLLM, arXiv:2505.22618: its prefix cache has a window from the current block to the end, its dual cache one of the
block itself. Right after a full forward the window's numbers are those of the whole canvas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _WindowLayer(DynamicLayer):
    """One layer; `start` is where the window begins, None while the whole canvas is read."""

    start: int | None = None
    keeps_suffix = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (b, heads, positions, width) of the window in, those of the whole canvas out."""
        if self.start is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        end = self.start + key_states.shape[-2]
        if self.keeps_suffix:
            self.keys[..., self.start : end, :] = key_states
            self.values[..., self.start : end, :] = value_states
            return self.keys, self.values
        before = slice(0, self.start)
        return (
            torch.cat([self.keys[..., before, :], key_states], -2),
            torch.cat([self.values[..., before, :], value_states], -2),
        )

    def get_seq_length(self) -> int:
        """Positions before the window: where the model counts on from."""
        return self.start or 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a query sees, their offset)."""
        if self.start is None:
            return query_length, 0
        return (self.keys.shape[-2] if self.keeps_suffix else self.start + query_length), 0


class WindowCache(Cache):
    """Not for autograd: the kept tensors are written in place."""

    def __init__(self, keeps_suffix: bool):
        """`keeps_suffix`: what follows the window is kept too (dual); else it is part of the window (prefix)."""
        super().__init__(layer_class_to_replicate=_WindowLayer)
        self.keeps_suffix = keeps_suffix

    def freeze(self, start: int) -> None:
        """The next forwards are of a window that begins at this position."""
        for layer in self.layers:
            layer.start, layer.keeps_suffix = start, self.keeps_suffix  # type: ignore[attr-defined]

    def keep(
        self,
        rows: Tensor,  # (k,) int64
    ) -> None:
        """Only these rows of the batch go on."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]  # type: ignore[index]
