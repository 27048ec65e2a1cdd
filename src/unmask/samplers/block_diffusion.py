"""Sampler of models that read block by block (SDAR, LLaDA2.x): each block is filled before the next one exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.samplers.canvas import Canvas, new_canvas, read_logits, require_room
from unmask.samplers.plan import check_lengths, check_steps, reveal_counts
from unmask.samplers.reveal import fix, surest
from unmask.types import NoiseLike, Policy, PromptBatch, Samples, take_rows


@dataclass(frozen=True)
class BlockDiffusion:
    """Low-confidence sampling in the model's own blocks, with an exact cache of the finished ones.

        x_i ~ softmax(logits_i / temperature) at every masked i of the block;   confidence_i = softmax(logits_i)[x_i]

    In each step the surest tokens of the block are fixed: as many as its schedule says, and with `threshold` also
    every other whose confidence is above it. Blocks are counted from the first prompt token, so the first one to be
    filled may begin with the end of the prompt, and the last one ends where the completion does, however many tokens
    that leaves it. Every block is filled, also behind a stop token. Rows of equal prompt length are sampled together,
    without pads.

    SDAR, arXiv:2510.06303; LLaDA2, arXiv:2512.15745. Differs from their code in that the mask token cannot be drawn,
    the confidence is untempered, the last block is not filled beyond the completion to be cut off, and no top-p or
    top-k is applied. LLaDA2.1's editing of fixed tokens is not offered.
    """

    gen_length: int
    """L, tokens to generate."""
    num_steps: int | None = None
    """Steps for a completion of whole blocks: a block of n tokens takes n num_steps / gen_length, rounded up. None:
    gen_length, one token per step. Published for blocks of 4 with 4 steps each: gen_length."""
    threshold: float | None = None
    """Confidence above which a token is fixed ahead of schedule; a row whose block is full waits. None: never."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token. Recorded log-probabilities are those of temperature 1."""
    use_cache: bool = True
    """Keep keys and values of finished blocks, each of which is then read once more. The tokens are the same."""

    keeps_tokens: ClassVar[bool] = True
    continues: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_lengths(self.gen_length, None, self.temperature)
        check_steps(self.gen_length, 1, self.num_steps)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError(f"sampler.threshold = {self.threshold}: must be from 0 to 1, or none. Try 0.9.")

    def step_counts(self, num_tokens: int) -> list[int]:
        """Tokens to fix in each step of a block with so many masked tokens."""
        return reveal_counts(num_tokens, -(-num_tokens * (self.num_steps or self.gen_length) // self.gen_length))

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,  # B rows
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Samples:
        """One completion per row. `on_step` receives a copy of the canvas (B, T) after every step; rows of one prompt
        length are finished before those of the next. `nfe` counts the forwards that fill the cache, `reveal_step`
        does not."""
        if policy.block_size is None:
            raise ConfigError(
                "sampler.type = 'block_diffusion': this model reads its whole text in both directions and has no "
                "blocks of its own. Use sampler.type = 'low_confidence'."
            )
        require_room(policy, prompts.prompt_mask, self.gen_length)
        groups = list(_equal_lengths(prompts))
        show = _shown_whole(new_canvas(policy, prompts, self.gen_length).ids, on_step) if on_step else None
        parts = []
        for rows, group in groups:
            canvas = new_canvas(policy, group, self.gen_length, show and partial(show, rows))
            parts.append(self._fill(policy, canvas, noise))
        joined = Samples(*(torch.cat([getattr(p, name) for p in parts]) for name in Samples.__dataclass_fields__))
        return take_rows(joined, torch.cat([rows for rows, _ in groups]).argsort())

    def _fill(self, policy: Policy, canvas: Canvas, noise: NoiseLike) -> Samples:
        """Rows without pads, block after block."""
        assert policy.block_size is not None
        size, num_prompt, num_all = policy.block_size, canvas.prompt_length, canvas.ids.shape[1]
        cache = policy.new_cache() if self.use_cache else None
        token_noise = noise.stream("token") if self.temperature > 0 else None
        starts = range(num_prompt // size * size, num_all, size)
        seen_from = 0  # what lies before is in the cache
        for start in starts:
            end = min(start + size, num_all)
            if cache is not None and start > starts[0]:
                _read(policy, canvas, None, seen_from, start, cache)  # the finished block, for good
                seen_from = start
            is_open = torch.zeros_like(canvas.logps, dtype=torch.bool)  # (B, L)
            is_open[:, max(start - num_prompt, 0) : end - num_prompt] = True
            for count in self.step_counts(end - max(start, num_prompt)):
                logits = _read(policy, canvas, is_open, seen_from, end, cache)
                if cache is not None:
                    policy.forget(cache, end - start)  # the block is not finished
                    seen_from = start
                rule = partial(self._chosen, count=count)
                is_open = fix(canvas, is_open, logits, rule, temperature=self.temperature, noise=token_noise)
                if self.threshold is not None and not is_open.any():
                    break
        if cache is not None:
            canvas.nfe += len(starts) - 1
        return canvas.samples()

    def _chosen(self, confidence: Tensor, count: int) -> Tensor:
        """The `count` surest of a row are fixed, and all above the threshold."""
        chosen = surest(confidence, count)
        return chosen if self.threshold is None else chosen | (confidence > self.threshold)


def _read(
    policy: Policy,
    canvas: Canvas,
    wanted: Tensor | None,  # (B, L) bool, N of them; None: none, the forward is for the cache
    start: int,
    end: int,
    cache: Any,
) -> Tensor:  # (N, V)
    """One forward of the positions from `start` to `end`."""
    positions = canvas.positions(torch.zeros_like(canvas.logps, dtype=torch.bool) if wanted is None else wanted)
    return read_logits(policy, canvas.ids[:, start:end], None, positions[:, start:end], cache)


def _equal_lengths(prompts: PromptBatch) -> Iterator[tuple[Tensor, PromptBatch]]:
    """The rows of each prompt length, and these rows without pads."""
    lengths, width = prompts.prompt_mask.sum(1), prompts.prompt_mask.shape[1]
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        group = take_rows(prompts, rows)
        bare = slice(width - length, None)
        yield rows, replace(group, prompt_ids=group.prompt_ids[:, bare], prompt_mask=group.prompt_mask[:, bare])


def _shown_whole(ids: Tensor, on_step: Callable[[Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    """What shows the canvas of some rows, without pads, as part of the canvas of all rows, `ids` (B, T)."""

    def show(rows: Tensor, group_ids: Tensor) -> None:
        ids[rows, ids.shape[1] - group_ids.shape[1] :] = group_ids
        on_step(ids.clone())

    return show
