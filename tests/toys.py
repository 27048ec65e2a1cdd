"""Models small enough to enumerate: every conditional of every masked state is a free float64 parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unmask.models.outputs import summarise_logits
from unmask.types import TokenOutput


class TabularPolicy(nn.Module):
    """V ordinary tokens (ids 0..V-1) and a mask token (id V); a completion of L tokens; any prompt.

    Parameter `table` (states, L, V+1): logits of each position for each of the (V+1)^L canvases. With
    `num_prompts` > 1 the first prompt token selects one of several tables.
    """

    def __init__(self, vocab: int = 3, length: int = 3, seed: int = 0, scale: float = 1.0, num_prompts: int = 1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.length, self.num_prompts = vocab, length, num_prompts
        shape = (num_prompts, (vocab + 1) ** length, length, vocab + 1)
        self.table = nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))
        self.mask_token_id, self.pad_token_id = vocab, 0
        self.stop_token_ids: tuple[int, ...] = ()
        self.max_length = 10_000
        self.block_size: int | None = None

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, canvas: Tensor) -> Tensor:
        """Logits (b, T, V+1); zero at prompt positions."""
        completion = canvas[:, -self.length :]
        place = (self.vocab + 1) ** torch.arange(self.length)
        state = (completion * place).sum(-1)  # (b,)
        prompt = canvas[:, 0] % self.num_prompts if canvas.shape[1] > self.length else torch.zeros_like(state)
        rows = self.table[prompt, state]  # (b, L, V+1)
        pad = rows.new_zeros(canvas.shape[0], canvas.shape[1] - self.length, self.vocab + 1)
        return torch.cat([pad, rows], dim=1)

    def token_outputs(
        self,
        canvas: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        *,
        targets: Tensor | None = None,
        want: Sequence[str] = ("logits",),
    ) -> TokenOutput:
        return summarise_logits(self(canvas)[positions], targets, want, self.mask_token_id)
