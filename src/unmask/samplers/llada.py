"""LLaDA's semi-autoregressive samplers: several tokens per forward, blocks left to right. arXiv:2502.09992."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.samplers.canvas import Canvas, Start, end_rows, open_canvas
from unmask.samplers.order import fill_in_random_order
from unmask.samplers.plan import check_lengths, check_steps, reveal_counts
from unmask.samplers.reading import CACHES, WindowReader, guided_logits
from unmask.samplers.reveal import Rule, above, fix, surest, within_entropy, within_factor
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
    mixes: ClassVar[bool] = True

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

    `threshold`, `factor` and `entropy_bound` fix as many tokens as the model is sure of instead of `num_steps`' share;
    `cache` reads a part of the canvas alone. Both change what is written: docs/samplers.md measures by how much.
    """

    threshold: float | None = None
    """Fix all tokens of at least this confidence, and one in any case (Fast-dLLM, arXiv:2505.22618: 0.9). Above 1: one
    token per step. num_steps is not read."""
    factor: float | None = None
    """Fix the n surest tokens while (n + 1)(1 - confidence of the n-th) is at most this (Fast-dLLM, arXiv:2505.22618).
    num_steps is not read."""
    entropy_bound: float | None = None
    """Fix tokens of least entropy while their entropies, the largest left out, sum to at most so many nats
    (arXiv:2505.24857). num_steps is not read."""
    cache: str = "none"
    """"prefix": in a block's later steps, keys and values before it are those of its first step. "dual": those behind
    it too. "none": every step reads the whole canvas. Fast-dLLM, arXiv:2505.22618."""
    refresh_every: int | None = None
    """With a cache: every so many steps of a block the whole canvas is read again. None: at a block's beginning."""
    guidance: float = 0.0
    """w of u + (w + 1)(c - u), with logits c and those u where the prompt is masked. 0: none; else two forwards count
    per step."""
    stop_early: bool = True
    """A row is finished with the block that holds its stop token, and what follows is filled with stop tokens, of
    log-probability 0. False: every block is sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = [name for name in ("threshold", "factor", "entropy_bound") if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ConfigError(f"sampler.{rules[0]} and sampler.{rules[1]}: each says what a step fixes. Give one.")
        for name in rules:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"sampler.{name} = {getattr(self, name)}: must be at least 0 and finite, or none.")
        if self.cache not in CACHES:
            raise ConfigError(f"sampler.cache = {self.cache!r}: must be one of {', '.join(CACHES)}.")
        if self.refresh_every is not None and (self.cache == "none" or self.refresh_every < 1):
            raise ConfigError(
                f"sampler.refresh_every = {self.refresh_every}: at least 1, and with sampler.cache = 'prefix' or "
                "'dual'. Leave it out otherwise."
            )
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"sampler.guidance = {self.guidance}: must be at least 0 and finite. Try 0.")
        if self.guidance and self.cache != "none":
            raise ConfigError("sampler.guidance reads the canvas twice and has no cache: set sampler.cache = 'none'.")

    @property
    def is_paced(self) -> bool:
        """Whether `num_steps` says how many tokens a step fixes."""
        return self.threshold is None and self.factor is None and self.entropy_bound is None

    @property
    def continues(self) -> bool:  # type: ignore[override]
        """Whether it can begin in the middle of a completion: where steps and states are those of the pace alone."""
        return self.is_paced and self.cache == "none" and not self.guidance

    @property
    def is_own_law(self) -> bool:
        """Whether recorded log-probabilities are those of the model itself, read whole and without guidance."""
        return self.cache == "none" and not self.guidance

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        """Whether it can draw from a mixture of two models: what a cache keeps is one model's."""
        return self.cache == "none"

    @property
    def gives_tails(self) -> bool:
        """Whether tokens behind a stop token may be given instead of drawn."""
        return self.stop_early and self.num_blocks > 1

    @property
    def total_steps(self) -> int:
        """Denoising steps of a completion, the most that there can be."""
        return super().total_steps if self.is_paced else self.gen_length

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
        every step. Raises: ModelError for a cache that the model's family does not have."""
        if start is not None and not self.continues:
            raise ValueError(
                "sample() with a threshold, a cache or guidance cannot begin in the middle of a completion"
            )
        canvas = open_canvas(policy, prompts, self.gen_length, on_step, start)
        reader = WindowReader(policy, canvas, self.cache, self.refresh_every) if self.cache != "none" else None
        token_noise = noise.stream("token") if self.temperature > 0 else None
        length = self.gen_length // self.num_blocks
        for number in range(self.num_blocks):
            slots = range(number * length, (number + 1) * length)
            if self.stop_early and number:
                end_rows(policy, canvas, slots.start)
            is_open = torch.zeros_like(canvas.logps, dtype=torch.bool)
            is_open[:, slots.start : slots.stop] = canvas.reveal_step[:, slots.start : slots.stop] < 0
            if reader:
                reader.open_block(slots)
            for rule in self._rules(number, canvas.first_step):
                if not is_open.any():
                    break
                logits = self._logits(policy, canvas, is_open, reader)
                is_open = fix(
                    canvas,
                    is_open,
                    logits,
                    rule,
                    temperature=self.temperature,
                    noise=token_noise,
                    by_entropy=self.entropy_bound is not None,
                )
        if self.guidance:
            canvas.forwards_per_step *= 2
        return canvas.samples()

    def _rules(self, number: int, first_step: int) -> Iterator[Rule]:
        """What each step of block `number` fixes; as many as there are left to do, or as it may take."""
        if self.is_paced:
            counts = self.block_counts
            for count in counts[min(max(first_step - number * len(counts), 0), len(counts)) :]:
                yield partial(surest, count=count)
            return
        for _ in range(self.gen_length // self.num_blocks):
            if self.threshold is not None:
                yield partial(above, threshold=self.threshold)
            elif self.factor is not None:
                yield partial(within_factor, factor=self.factor)
            elif self.entropy_bound is not None:
                yield partial(within_entropy, bound=self.entropy_bound)

    def _logits(self, policy: Policy, canvas: Canvas, is_open: Tensor, reader: WindowReader | None) -> Tensor:
        """(N, V) of the open slots."""
        if reader:
            return reader.read(is_open)
        if self.guidance:
            return guided_logits(policy, canvas, is_open, self.guidance)
        return canvas.logits_where(policy, is_open)


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
