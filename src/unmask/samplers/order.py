"""Filling a canvas in an order that does not depend on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unmask.samplers.canvas import Canvas, Start, open_canvas
from unmask.samplers.draw import draw_tokens, recorded_logps
from unmask.types import NoiseLike, Policy, PromptBatch, Samples


@torch.no_grad()
def fill_in_random_order(
    policy: Policy,
    prompts: PromptBatch,
    counts: Sequence[int],  # S numbers of tokens to fix per step, L in all; a step stays inside a block
    *,
    gen_length: int,
    block_length: int,
    temperature: float,
    noise: NoiseLike,
    on_step: Callable[[Tensor], None] | None = None,
    start: Start | None = None,
) -> Samples:
    """Blocks left to right, slots of a block in uniformly random order, `counts[s]` of them in step s.

    The order is known before the first forward, so each forward is asked only for the slots it fixes.
    """
    canvas = open_canvas(policy, prompts, gen_length, on_step, start)
    step_of_place = torch.repeat_interleave(torch.tensor(counts)).to(policy.device)[None]  # (1, L)
    order = _draw_order(canvas, gen_length, block_length, noise.stream("order"))  # (B, L)
    # logits come in canvas order, so the slots of one step are sorted by position
    order = (step_of_place * gen_length + order).sort(1).values - step_of_place * gen_length
    uniforms = canvas.uniforms(noise.stream("token"), step_of_place, order) if temperature > 0 else None
    place = sum(counts[: canvas.first_step])
    for count in counts[canvas.first_step :]:
        here = slice(place, place + count)
        slots = order[:, here]  # (B, count)
        logits = canvas.logits(policy, slots)  # (B·count, V)
        tokens = draw_tokens(logits, temperature, None if uniforms is None else uniforms[:, here].flatten())
        logps, drawn = recorded_logps(logits, tokens, temperature)
        canvas.write(slots, tokens.view_as(slots), logps.view_as(slots), drawn.view_as(slots))
        place += count
    return canvas.samples()


def _draw_order(canvas: Canvas, gen_length: int, block_length: int, noise: NoiseLike) -> Tensor:
    """Slots in the order in which they are fixed, (B, L): a uniform permutation inside each block.

    Slots that have their tokens already keep their places, before those of their block that are still open.
    """
    slots = torch.arange(gen_length, device=canvas.ids.device)[None]  # (1, L)
    keys = canvas.uniforms(noise, 0, slots)  # (B, L)
    if canvas.first_step:
        # a step below the first is negative here, so these come first, and in the order of their steps
        steps = (canvas.reveal_step - canvas.first_step).to(keys)
        keys = torch.where(canvas.reveal_step >= 0, steps, keys)
    within = keys.unflatten(1, (-1, block_length)).argsort(dim=-1, stable=True)  # (B, blocks, block_length)
    first = slots[:, ::block_length, None]  # (1, blocks, 1)
    return (within + first).flatten(1)
