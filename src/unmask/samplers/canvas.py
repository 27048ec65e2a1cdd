"""The canvas that every sampler fills: prompt, then L positions that start as mask tokens and are fixed once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.errors import ConfigError, ModelError
from unmask.types import NoiseLike, Policy, PromptBatch, Samples


@dataclass(frozen=True)
class Start:
    """The state that `samples` were in before reveal step `step`: where other completions of theirs begin."""

    samples: Samples  # B rows, of a sampler with the same settings
    step: int


@dataclass
class Canvas:
    """A batch of rows while they are being filled. Slots are positions within the completion, 0..L-1.

    Which slots are open is the caller's knowledge; ids are never compared with the mask token to find out.
    """

    ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) bool, None where no row has pads
    prompt_key: Tensor  # (B, 1) int64
    rollout_index: Tensor  # (B, 1) int64
    reveal_step: Tensor  # (B, L) int64
    logps: Tensor  # (B, L) float64, nats
    drawn_logps: Tensor  # (B, L) float64, nats
    nfe: Tensor  # (B, 1) int64, steps that the row took part in and that a `write` answered
    on_step: Callable[[Tensor], None] | None
    first_step: int = 0
    """Steps that were made before this canvas was opened; they count in `nfe` while it is being filled."""
    forwards_per_step: int = 1
    """Two where a step reads two models, or the canvas with and without its prompt; four where both."""

    @property
    def prompt_length(self) -> int:
        """P, tokens."""
        return self.ids.shape[1] - self.logps.shape[1]

    def logits(
        self,
        policy: Policy,
        slots: Tensor,  # (B, k) int64, ascending in every row
    ) -> Tensor:  # (B·k, V), row by row
        """One forward of the whole canvas; logits of the given slots only."""
        return self.logits_where(policy, torch.zeros_like(self.logps, dtype=torch.bool).scatter_(1, slots, True))

    def logits_where(
        self,
        policy: Policy,
        wanted: Tensor,  # (B, L) bool, N of them
    ) -> Tensor:  # (N, V), row by row
        """As `logits`, for rows that want unequally many slots; rows that want none are left out of the forward."""
        positions = self.positions(wanted)
        ids, attention_mask = self.ids, self.attention_mask
        takes_part = wanted.any(1)
        if not takes_part.all() and takes_part.any():
            ids, positions = ids[takes_part], positions[takes_part]
            attention_mask = None if attention_mask is None else attention_mask[takes_part]
        return read_logits(policy, ids, attention_mask, positions)

    def positions(
        self,
        wanted: Tensor,  # (B, L) bool
    ) -> Tensor:  # (B, T) bool
        """Slots as positions of the canvas."""
        positions = torch.zeros_like(self.ids, dtype=torch.bool)
        positions[:, self.prompt_length :] = wanted
        return positions

    def uniforms(
        self,
        noise: NoiseLike,
        step: Tensor | int,  # broadcasts against slots
        slots: Tensor,  # (B, k) or (1, L)
    ) -> Tensor:  # (B, k) float64
        """Keyed by prompt, rollout, step and slot: a row draws the same wherever it stands in whichever batch."""
        return noise.uniform(self.prompt_key, self.rollout_index, step, slots)

    def write(
        self,
        slots: Tensor,  # (B, k) int64
        tokens: Tensor,  # (B, k) int64
        logps: Tensor,  # (B, k) float64, nats
        drawn_logps: Tensor,  # (B, k) float64, nats
    ) -> None:
        """Fix tokens and close the step; the two records are those of `Samples`."""
        self.ids.scatter_(1, slots + self.prompt_length, tokens)
        self.logps.scatter_(1, slots, logps)
        self.drawn_logps.scatter_(1, slots, drawn_logps)
        self.reveal_step.scatter_(1, slots, self.nfe.expand_as(slots))
        self._close_step(torch.ones_like(self.nfe))

    def write_where(
        self,
        chosen: Tensor,  # (B, L) bool, n of them
        tokens: Tensor,  # (n,) int64, row by row
        logps: Tensor,  # (n,) float64, nats
        drawn_logps: Tensor,  # (n,) float64, nats
        took_part: Tensor | None = None,  # (B, 1) bool; None: every row
    ) -> None:
        """As `write`, for rows that fix unequally many slots; the step counts for the rows that took part."""
        self.ids[:, self.prompt_length :].masked_scatter_(chosen, tokens)
        self.logps.masked_scatter_(chosen, logps)
        self.drawn_logps.masked_scatter_(chosen, drawn_logps)
        self.reveal_step.copy_(torch.where(chosen, self.nfe, self.reveal_step))
        self._close_step(torch.ones_like(self.nfe) if took_part is None else took_part)

    def _close_step(self, forwards: Tensor) -> None:
        self.nfe += forwards
        if self.on_step is not None:
            self.on_step(self.ids.clone())  # a copy, so that the caller may keep it

    def samples(self) -> Samples:
        """The finished rows.

        Raises: ModelError if the model gave logits that are not finite where a token was drawn.
        """
        bad = ~(self.logps.isfinite() & self.drawn_logps.isfinite())
        if bad.any():
            row, slot = bad.nonzero()[0].tolist()
            raise ModelError(
                f"the model's log-probabilities are not finite in {int(bad.any(1).sum())} of {len(bad)} rollouts; "
                f"first: prompt {int(self.prompt_key[row])}, completion position {slot}. "
                "Check the weights; a lower learning rate keeps training from getting here."
            )
        made = (self.nfe[:, 0] - self.first_step) * self.forwards_per_step
        completion_ids = self.ids[:, self.prompt_length :].clone()
        return Samples(completion_ids, self.reveal_step, self.logps, made, self.drawn_logps)


def read_logits(
    policy: Policy,
    ids: Tensor,  # (b, T) int64
    attention_mask: Tensor | None,
    positions: Tensor,  # (b, T) bool, N of them
    cache: Any = None,
) -> Tensor:  # (N, V)
    """One forward."""
    options = {} if cache is None else {"cache": cache}
    logits = policy.token_outputs(ids, attention_mask, positions, want=("logits",), **options).logits
    assert logits is not None, "a policy returns what it is asked for"
    return logits


def open_canvas(
    policy: Policy,
    prompts: PromptBatch,
    gen_length: int,
    on_step: Callable[[Tensor], None] | None = None,
    start: Start | None = None,
) -> Canvas:
    """Every prompt followed by `gen_length` mask tokens, on the policy's device, for a model that reads all of it.

    With `start`, followed by the tokens that are fixed there, and masks elsewhere.

    Raises: ConfigError if a prompt leaves no room for them in the model, or the model reads block by block.
    """
    if policy.block_size is not None:
        raise ConfigError(
            f"sampler.type: this model reads its text in blocks of {policy.block_size} tokens and cannot see masks in "
            "blocks to come, which this sampler shows it. Use sampler.type = 'block_diffusion'."
        )
    require_room(policy, prompts.prompt_mask, gen_length)
    canvas = new_canvas(policy, prompts, gen_length, on_step)
    if start is not None:
        _go_to(canvas, start)
    return canvas


def _go_to(canvas: Canvas, start: Start) -> None:
    """Put a new canvas into the state of `start`."""
    samples = start.samples
    is_fixed = samples.reveal_step < start.step
    completion = canvas.ids[:, canvas.prompt_length :]
    completion.copy_(torch.where(is_fixed, samples.completion_ids, completion))
    canvas.reveal_step.copy_(torch.where(is_fixed, samples.reveal_step, canvas.reveal_step))
    canvas.logps.copy_(torch.where(is_fixed, samples.logps, canvas.logps))
    assert samples.drawn_logps is not None, "what can be continued was drawn on a canvas"
    canvas.drawn_logps.copy_(torch.where(is_fixed, samples.drawn_logps, canvas.drawn_logps))
    canvas.nfe.fill_(start.step)
    canvas.first_step = start.step


def new_canvas(
    policy: Policy,
    prompts: PromptBatch,
    gen_length: int,
    on_step: Callable[[Tensor], None] | None = None,
) -> Canvas:
    """As `open_canvas`, without its checks."""
    prompt_ids = prompts.prompt_ids.to(policy.device)
    prompt_mask = prompts.prompt_mask.to(policy.device)
    shape = (len(prompts), gen_length)
    masks = prompt_ids.new_full(shape, policy.mask_token_id)
    attention_mask = None
    if not prompt_mask.all():
        attention_mask = torch.cat([prompt_mask, torch.ones_like(masks, dtype=torch.bool)], 1)
    return Canvas(
        ids=torch.cat([prompt_ids, masks], 1),
        attention_mask=attention_mask,
        prompt_key=prompts.prompt_key.to(policy.device)[:, None],
        rollout_index=prompts.rollout_index.to(policy.device)[:, None],
        reveal_step=torch.full_like(masks, -1),
        logps=torch.zeros(shape, dtype=torch.float64, device=policy.device),
        drawn_logps=torch.zeros(shape, dtype=torch.float64, device=policy.device),
        nfe=masks.new_zeros(len(prompts), 1),
        on_step=on_step,
        forwards_per_step=getattr(policy, "num_models", 1),
    )


def end_rows(policy: Policy, canvas: Canvas, num_filled: int) -> None:
    """Rows with a stop token among their first `num_filled` slots are finished: the others get the first stop token.

    As in the data that models are trained on, a completion ends with it to its last position. The tokens are given, not
    drawn: their log-probability is 0, and they belong to the step that comes next.
    """
    if not policy.stop_token_ids:
        return
    completion = canvas.ids[:, canvas.prompt_length :]
    stops = torch.tensor(policy.stop_token_ids, device=completion.device)
    has_stopped = torch.isin(completion[:, :num_filled], stops).any(1, keepdim=True)
    is_rest = has_stopped & (canvas.reveal_step < 0)
    completion.masked_fill_(is_rest, policy.stop_token_ids[0])
    canvas.reveal_step.copy_(torch.where(is_rest, canvas.nfe, canvas.reveal_step))


def require_room(
    policy: Policy,
    prompt_mask: Tensor,  # (B, P)
    gen_length: int,
) -> None:
    """Raises: ConfigError if a prompt and `gen_length` tokens are more than the model has positions."""
    if prompt_mask.shape[1] + gen_length <= policy.max_length:
        return
    longest = int(prompt_mask.sum(1).max())  # pads take no position
    if longest + gen_length > policy.max_length:
        room = policy.max_length - longest
        advice = f"Try {room} or less" if room > 0 else "Shorten the prompts"
        raise ConfigError(
            f"sampler.gen_length = {gen_length}: with the longest prompt ({longest} tokens) more than the model's "
            f"{policy.max_length} positions. {advice}."
        )
