"""WINO: tokens are fixed readily and taken back where they do not hold, arXiv:2507.18578."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.samplers.canvas import Canvas, end_rows, open_canvas
from unmask.samplers.draw import draw_tokens, recorded_logps, token_probabilities
from unmask.samplers.plan import check_lengths
from unmask.samplers.reveal import ranks, spread
from unmask.types import NoiseLike, Policy, PromptBatch, Samples

_FEWEST, _MOST = 5, 20
"""The published limits: a step may fix 7 of 10 open positions, though always 5 and never more than 20."""


@dataclass(frozen=True)
class Wino:
    """Wide in, narrow out: each forward fixes what passes a low threshold and revokes what fails a high one.

        open position i    x_i ~ softmax(logits_i / temperature);   fixed if softmax(logits_i)[x_i] > threshold
        fixed position i   masked again if softmax(shadow_i)[x_i] < verify_threshold

    shadow_i are the logits of a second, masked copy of position i that sees the canvas without position i: how probable
    the model finds x_i in the company of the others. Blocks are filled left to right. A step fixes at least one token,
    and takes back fewer than the step before it fixed, so a block is full after at most as many steps as it has tokens.
    A step that fixes a single token takes none back.

    As tokens are taken back, `reveal_step` and the recorded log-probability are those of the last time that a position
    was fixed, and no order of the tokens leads through the states that there were: algorithms that read the order
    refuse this sampler. `on_step` sees every state. One forward reads the canvas and a block more. Differs from the
    authors' code in that rows are independent of each other, so that any number can be sampled together, tokens may be
    drawn at a temperature, the mask token cannot be drawn, and a row may end with the block of its stop token.
    """

    gen_length: int
    """L, tokens to generate."""
    block_length: int | None = None
    """Tokens per block; blocks are filled left to right. None: one block of gen_length."""
    threshold: float = 0.6
    """Confidence above which a token is fixed; the surest of a row is fixed in any case."""
    verify_threshold: float = 0.9
    """Probability below which a fixed token is taken back. 0: never, which is decoding by `threshold`."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token. Recorded log-probabilities are those of temperature 1."""
    stop_early: bool = True
    """A row is finished with the block that holds its stop token, and what follows is filled with stop tokens, of
    log-probability 0. False: every block is sampled."""

    keeps_tokens: ClassVar[bool] = False
    continues: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_lengths(self.gen_length, self.block_length, self.temperature)
        for name in ("threshold", "verify_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"sampler.{name} = {getattr(self, name)}: a probability, from 0 to 1. Try 0.9.")

    @property
    def total_steps(self) -> int:
        """Denoising steps of a completion, the most that there can be."""
        return self.gen_length

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,  # B rows
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Samples:
        """One completion per row. `on_step` receives a copy of the canvas (B, T) after every step.

        Raises: ConfigError for a family whose tokens are not read at their own positions (Dream), or that has no
            attention from which single positions can be left out.
        """
        if policy.lookback != 0:
            raise ConfigError(
                "sampler.type = 'wino': reads every token a second time in a masked copy of its own position, which "
                "this model's family does not allow. Use sampler.type = 'low_confidence' with a threshold, or 'dream'."
            )
        if getattr(policy, "num_models", 1) > 1:
            raise ConfigError("sampler.type = 'wino': reads one model, and this is a mixture of two. Use 'roar'.")
        canvas = open_canvas(policy, prompts, self.gen_length, on_step)
        token_noise = noise.stream("token") if self.temperature > 0 else None
        length = self.block_length or self.gen_length
        for start in range(0, self.gen_length, length):
            if self.stop_early and start:
                end_rows(policy, canvas, start)
            self._fill(policy, canvas, slice(start, start + length), token_noise)
        return canvas.samples()

    def _fill(self, policy: Policy, canvas: Canvas, block: slice, noise: NoiseLike | None) -> None:
        """All steps of a block."""
        in_block = torch.zeros_like(canvas.logps, dtype=torch.bool)
        in_block[:, block] = True
        num_before = torch.zeros_like(canvas.nfe)  # (B, 1), tokens that the last step fixed
        while (is_open := in_block & (canvas.reveal_step < 0)).any():
            takes_part = is_open.any(1, keepdim=True)
            is_fixed = in_block & ~is_open & takes_part
            logits, shadow_logits = _read(policy, canvas, is_open, is_fixed, block)
            uniforms = None
            if noise is not None:
                slots = torch.arange(is_open.shape[1], device=is_open.device)[None]  # (1, L)
                uniforms = canvas.uniforms(noise, canvas.nfe, slots)[is_open]
            tokens = draw_tokens(logits, self.temperature, uniforms)  # (N,)
            chosen = is_open & self._accepted(spread(token_probabilities(logits, tokens), is_open))
            completion = canvas.ids[:, canvas.prompt_length :]
            held = spread(token_probabilities(shadow_logits, completion[is_fixed]), is_fixed)  # (B, L)
            num_fixed = chosen.sum(1, keepdim=True)
            _revoke(policy, canvas, self._doubted(held, is_fixed, num_before) & (num_fixed > 1))
            written = chosen[is_open]  # (N,)
            logps, drawn = recorded_logps(logits[written], tokens[written], self.temperature)
            canvas.write_where(chosen, tokens[written], logps, drawn, took_part=takes_part)
            num_before = torch.where(takes_part, num_fixed, num_before)

    def _accepted(
        self,
        confidence: Tensor,  # (B, L), -inf where no slot is open
    ) -> Tensor:  # (B, L) bool
        """What a step fixes."""
        num_open = (confidence > -math.inf).sum(1, keepdim=True)
        most = (7 * num_open // 10).clamp(_FEWEST, _MOST)
        rank = ranks(confidence)
        return ((confidence > self.threshold) & (rank < most)) | ((rank == 0) & (num_open > 0))

    def _doubted(
        self,
        held: Tensor,  # (B, L), probability of a fixed token by its shadow, -inf elsewhere
        is_fixed: Tensor,  # (B, L) bool
        num_before: Tensor,  # (B, 1)
    ) -> Tensor:  # (B, L) bool
        """What a step takes back: of the least probable, fewer than the step before it fixed."""
        fails = is_fixed & (held < self.verify_threshold)
        rank = ranks(torch.where(is_fixed, -held, -math.inf))
        return fails & (rank < num_before - 1)


def _read(
    policy: Policy,
    canvas: Canvas,
    is_open: Tensor,  # (B, L) bool, N of them
    is_fixed: Tensor,  # (B, L) bool, M of them, all in the block
    block: slice,
) -> tuple[Tensor, Tensor]:  # (N, V), (M, V)
    """One forward of the rows with open slots: logits of these, and of the fixed ones' shadows behind the canvas."""
    rows = is_open.any(1)
    ids = canvas.ids[rows]
    first = canvas.prompt_length
    block = slice(first + block.start, first + block.stop)
    shadow = torch.full_like(ids[:, block], policy.mask_token_id)
    real = torch.ones_like(ids, dtype=torch.bool) if canvas.attention_mask is None else canvas.attention_mask[rows]
    places = (real.long().cumsum(-1) - 1).clamp(min=0)  # pads take no position
    wanted = torch.cat([canvas.positions(is_open), canvas.positions(is_fixed)[:, block]], 1)[rows]  # (b, T + n)
    outputs = policy.token_outputs(
        torch.cat([ids, shadow], 1),
        _who_sees_whom(real, block),
        wanted,
        position_ids=torch.cat([places, places[:, block]], 1),
    )
    assert outputs.logits is not None, "a policy returns what it is asked for"
    of_shadow = wanted.nonzero()[:, 1] >= ids.shape[1]  # (N + M,)
    return outputs.logits[~of_shadow], outputs.logits[of_shadow]


def _who_sees_whom(
    real: Tensor,  # (b, T) bool, False on pads
    block: slice,  # of the canvas, n positions
) -> Tensor:  # (b, T + n, T + n) bool
    """Nobody sees pads; shadows are seen by shadows alone, and each of them sees all of the canvas but its twin."""
    width, length = real.shape[1], block.stop - block.start
    seen = torch.zeros(len(real), width + length, width + length, dtype=torch.bool, device=real.device)
    seen[:, :, :width] = real[:, None]
    seen[:, width:, width:] = True
    seen[:, width:, block] &= ~torch.eye(length, dtype=torch.bool, device=real.device)
    return seen


def _revoke(policy: Policy, canvas: Canvas, doubted: Tensor) -> None:
    """Mask tokens (B, L) again."""
    canvas.ids[:, canvas.prompt_length :].masked_fill_(doubted, policy.mask_token_id)
    canvas.reveal_step.masked_fill_(doubted, -1)
    canvas.logps.masked_fill_(doubted, 0.0)
    canvas.drawn_logps.masked_fill_(doubted, 0.0)
