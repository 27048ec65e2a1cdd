"""Completions from an outside engine: a server, another process, another library. Weights go out, tokens come in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from unmask.errors import ConfigError, ModelError
from unmask.samplers.canvas import require_room
from unmask.types import NoiseLike, Policy, PromptBatch, Samples
from unmask.user_code import find_callable

MIN_GROUPS = 4
"""Groups of equal completions that say more of an engine than of a policy which has become sure of itself."""


class Engine(Protocol):
    """What `sampler.engine` makes."""

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's trained parameters, under the names of its module (an adapter's alone, if it has
        one). Called before the first completions, and before others whenever the weights have changed."""
        ...

    def complete(
        self, prompts: Sequence[Sequence[int]], *, gen_length: int, temperature: float, seeds: Sequence[int]
    ) -> Sequence[Sequence[int]]:
        """At most `gen_length` token ids for each prompt, which has no pads. `seeds`, one a row in [0, 2^52), are all
        that a row's randomness may depend on."""
        ...


class WeightedPolicy(Policy, Protocol):
    """A policy that can give its weights away."""

    vocab_size: int

    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def weights_version(self) -> tuple[float, ...]: ...


class _Session:
    """An engine, and which weights it has."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.policy: object = None
        self.version: tuple[float, ...] = ()
        self.has_seen_groups = False

    def bring_up_to_date(self, policy: WeightedPolicy) -> None:
        version = policy.weights_version()
        if policy is not self.policy or version != self.version:
            self.engine.push(policy.named_weights())
            self.policy, self.version = policy, version


@dataclass(frozen=True)
class OutsideEngine:
    """Completions of an engine of your own: docs/rollouts.md has its interface, examples/own_engine a whole one.

    It is given the weights before its first completions and after every update. What it returns is checked: as many
    rows as prompts, no longer than the canvas, tokens of the model but not the mask. At temperature 0 equal prompts
    must have equal completions; above it, the first batch with several rollouts of each of at least four prompts is
    refused if they are equal in all of these groups, as an engine that ignores temperature or seeds makes them. No
    steps and log-probabilities are recorded, so algorithms that read them refuse it.
    """

    gen_length: int
    """L, tokens of the canvas that the completions are scored on; shorter ones are filled up with stop tokens."""
    engine: str = ""
    """What makes the engine when called without arguments: `module:name` or `path/to/file.py:name`."""
    temperature: float = 1.0
    """Passed to the engine."""

    keeps_tokens: ClassVar[bool] = False
    continues: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    is_outside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gen_length < 1:
            raise ConfigError(f"sampler.gen_length = {self.gen_length}: must be at least 1 token. Try 16.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"sampler.temperature = {self.temperature}: must be finite and not negative. Try 1.0.")
        if not self.engine:
            raise ConfigError("sampler.engine is missing: name what makes it, such as engine.py:Engine.")

    @cached_property
    def session(self) -> _Session:
        """Made when the first completions are wanted. Raises: ConfigError for an engine that is not there."""
        return _Session(find_callable(self.engine, "sampler.engine")())

    @torch.no_grad()
    def sample(
        self,
        policy: WeightedPolicy,
        prompts: PromptBatch,  # B rows
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Samples:
        """One completion per row; `on_step` is not called. Raises: ModelError naming what is wrong with a reply."""
        require_room(policy, prompts.prompt_mask, self.gen_length)
        self.session.bring_up_to_date(policy)
        uniforms = noise.stream("engine").uniform(prompts.prompt_key, prompts.rollout_index, 0, 0)
        seeds = [int(u * 2**52) for u in uniforms.tolist()]
        rows = [ids[mask].tolist() for ids, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
        replies = self.session.engine.complete(
            rows, gen_length=self.gen_length, temperature=self.temperature, seeds=seeds
        )
        ids = self._checked(policy, replies, len(rows))
        self._check_groups(rows, ids)
        empty = torch.zeros_like(ids)
        return Samples(ids, empty, empty.double(), empty[:, 0].clone())

    def _checked(
        self, policy: WeightedPolicy, replies: Sequence[Sequence[int]], num_rows: int
    ) -> Tensor:  # (B, L) int64
        """The replies on canvases. Raises: ModelError."""
        if len(replies) != num_rows:
            raise ModelError(f"{self.engine}: {len(replies)} completions for {num_rows} prompts. Return one for each.")
        stop = policy.stop_token_ids[0] if policy.stop_token_ids else policy.pad_token_id
        ids = torch.full((num_rows, self.gen_length), stop, dtype=torch.int64)
        for row, reply in enumerate(replies):
            if len(reply) > self.gen_length:
                raise ModelError(
                    f"{self.engine}: completion {row} has {len(reply)} tokens, asked for were at most "
                    f"{self.gen_length}. Cut it in the engine."
                )
            wrong = [t for t in reply if not is_token(t, policy)]
            if wrong:
                raise ModelError(
                    f"{self.engine}: completion {row} holds {wrong[0]!r}, which is no token that a text can have. "
                    "Return token ids of the model, without the mask token."
                )
            ids[row, : len(reply)] = torch.tensor([int(t) for t in reply], dtype=torch.int64)
        return ids.to(policy.device)

    def _check_groups(self, prompts: Sequence[Sequence[int]], ids: Tensor) -> None:
        """Raises: ModelError if completions of equal prompts say that the temperature, or the seeds, were ignored."""
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for prompt, row in zip(prompts, ids.tolist(), strict=True):
            groups.setdefault(tuple(prompt), []).append(tuple(row))
        several = [group for group in groups.values() if len(group) > 1]
        are_equal = [len(set(group)) == 1 for group in several]
        if self.temperature == 0 and not all(are_equal):
            raise ModelError(
                f"{self.engine}: at temperature 0 a prompt got different completions, so the temperature is ignored. "
                "Pass it on to what samples."
            )
        is_enough = len(several) >= MIN_GROUPS and not self.session.has_seen_groups
        if self.temperature > 0 and is_enough and all(are_equal):
            raise ModelError(
                f"{self.engine}: at temperature {self.temperature:g} all completions of each of {len(several)} prompts "
                "are the same, so temperature or seeds are ignored. Give every row its own seed."
            )
        self.session.has_seen_groups |= is_enough


def is_token(value: object, policy: WeightedPolicy) -> bool:
    """Whether it is an id that a text can have."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return False
    return 0 <= operator.index(value) < policy.vocab_size and operator.index(value) != policy.mask_token_id
