"""LLaDA's semi-autoregressive samplers: several tokens per forward, blocks left to right. arXiv:2502.09992."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmask.samplers.canvas import Canvas, Start, open_canvas
from unmask.samplers.draw import draw_tokens, token_probabilities
from unmask.samplers.order import fill_in_random_order
from unmask.samplers.plan import check_lengths, check_steps, reveal_counts
from unmask.samplers.surest import fix_surest
from unmask.types import NoiseLike, Policy, PromptBatch, Samples


@dataclass(frozen=True)
class _Blockwise:
    """Fields of both of LLaDA's remasking rules."""

    gen_length: int
    """L, tokens to generate."""
    block_length: int | None = None
    """Tokens per block; blocks are filled left to right. None: one block of gen_length."""
    num_steps: int | None = None
    """Forwards in all, shared equally among the blocks. None: gen_length, one token per step."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token. Recorded log-probabilities are those of temperature 1."""

    keeps_tokens: ClassVar[bool] = True
    continues: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_lengths(self.gen_length, self.block_length, self.temperature)
        check_steps(self.gen_length, self.num_blocks, self.num_steps)

    @property
    def num_blocks(self) -> int:
        """Blocks per completion."""
        return self.gen_length // (self.block_length or self.gen_length)

    @property
    def total_steps(self) -> int:
        """Denoising steps of a completion."""
        return self.num_steps or self.gen_length

    @property
    def block_counts(self) -> list[int]:
        """Tokens to fix in each step of one block."""
        return reveal_counts(self.gen_length // self.num_blocks, (self.num_steps or self.gen_length) // self.num_blocks)


@dataclass(frozen=True)
class LowConfidence(_Blockwise):
    """Fixes in each step the tokens of the current block that the model is surest of.

        x_i ~ softmax(logits_i / temperature) at every masked i of the block;   confidence_i = softmax(logits_i)[x_i]

    The confidence is untempered also where the token was drawn at another temperature. Equal confidences are taken
    from left to right. Differs from the authors' code in that the mask token cannot be drawn, steps without a token
    to fix are refused, and the confidence is computed in float32 or wider and only where it can matter.
    """

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,  # B rows
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
        start: Start | None = None,
    ) -> Samples:
        """One completion per row, from `start` on if it is given. `on_step` receives a copy of the canvas (B, T) after
        every step."""
        canvas = open_canvas(policy, prompts, self.gen_length, on_step, start)
        slots = torch.arange(self.gen_length, device=canvas.ids.device).expand(len(prompts), -1)
        token_noise = noise.stream("token") if self.temperature > 0 else None
        counts = self.block_counts
        for number, open_slots in enumerate(slots.chunk(self.num_blocks, dim=1)):  # (B, block_length)
            done = min(max(canvas.first_step - number * len(counts), 0), len(counts))
            open_slots = canvas.still_open(open_slots, sum(counts[:done]))
            for count in counts[done:]:
                # every row has equally many open slots, so the batch stays rectangular
                open_slots = _fix_surest(policy, canvas, open_slots, count, self.temperature, token_noise)
        return canvas.samples()


@dataclass(frozen=True)
class RandomRemasking(_Blockwise):
    """Fixes in each step a uniformly random set of the current block's masked positions.

    Successive uniform choices without replacement are slices of one uniform permutation, which is drawn in advance;
    with one token per step this is `roar`.
    """

    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,  # B rows
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
        start: Start | None = None,
    ) -> Samples:
        """One completion per row, from `start` on if it is given. `on_step` receives a copy of the canvas (B, T) after
        every step."""
        return fill_in_random_order(
            policy,
            prompts,
            self.block_counts * self.num_blocks,
            gen_length=self.gen_length,
            block_length=self.gen_length // self.num_blocks,
            temperature=self.temperature,
            noise=noise,
            on_step=on_step,
            start=start,
        )


def _fix_surest(
    policy: Policy,
    canvas: Canvas,
    open_slots: Tensor,  # (B, r) int64, ascending
    count: int,
    temperature: float,
    noise: NoiseLike | None,  # None at temperature 0
) -> Tensor:  # (B, r - count) int64, ascending
    """One step: a token for every open slot, the `count` most confident are fixed. Returns the slots still open."""
    logits = canvas.logits(policy, open_slots)  # (B·r, V)
    uniforms = None if noise is None else canvas.uniforms(noise, canvas.nfe, open_slots).flatten()
    tokens = draw_tokens(logits, temperature, uniforms)  # (B·r,)
    return fix_surest(canvas, open_slots, logits, tokens, token_probabilities(logits, tokens), count)
