"""Rollouts kept for later batches: how many, how often new ones are collected, and which are taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from unmask.errors import ConfigError
from unmask.types import NoiseLike, Rollouts, take_rows


@dataclass(frozen=True)
class BufferConfig:
    """How long rollouts live."""

    num_batches: int = 0
    """Collected batches kept, the oldest dropped first; 0: each batch is trained on alone."""
    collect_every: int = 1
    """Batches trained on for each one collected; above 1 the others come from the buffer alone."""

    def __post_init__(self) -> None:
        if self.num_batches < 0:
            raise ConfigError(f"rollout.buffer.num_batches = {self.num_batches}: must be 0 (no buffer) or more. Try 4.")
        if self.collect_every < 1 or (self.collect_every > 1 and not self.num_batches):
            raise ConfigError(
                f"rollout.buffer.collect_every = {self.collect_every}: must be at least 1, and more only with a buffer "
                "to take the other batches from. Try 8 with rollout.buffer.num_batches = 4."
            )


class Buffer:
    """The newest `num_batches` collected batches, and batches taken from them.

    What is trained on is as many whole groups as a collected batch has, drawn uniformly and without replacement from
    all that are stored. Every process holds all rows and draws the same. Given completions, which no policy of the run
    wrote (`sampled_at` is None), pass through and are not kept.
    """

    def __init__(self, config: BufferConfig, noise: NoiseLike):
        self.config, self.noise = config, noise
        self.batches: deque[Rollouts] = deque(maxlen=config.num_batches or None)

    def is_due(self, iteration: int) -> bool:
        """Whether new rollouts are to be collected for this batch."""
        return not self.batches or iteration % self.config.collect_every == 0

    def exchange(self, fresh: Rollouts | None, iteration: int) -> Rollouts:
        """Keep the new rollouts, and give those to train on; without a buffer the new ones themselves.

        Groups are numbered anew from 0. `rollout_index` is renewed, so that a group which comes again gets new masks:
        it counts rows over the whole run. `sampled_at` stays.
        """
        if fresh is not None:
            if not self.config.num_batches or fresh.sampled_at is None:
                return fresh
            self.batches.append(fresh)
        stored = join_rollouts(self.batches)
        newest = self.batches[-1]
        groups, inverse = stored.groups.unique(return_inverse=True)  # (N,), (B,)
        count = len(newest.groups.unique())
        keys = self.noise.stream("buffer").uniform(iteration, torch.arange(len(groups)))
        taken = keys.argsort(stable=True)[:count].tolist()
        rows = [(inverse == group).nonzero()[:, 0] for group in taken]  # those of a group follow each other
        chosen = torch.cat(rows)
        number = torch.arange(count, device=chosen.device)
        place = torch.arange(len(chosen), device=chosen.device)
        return replace(
            take_rows(stored, chosen),
            groups=number.repeat_interleave(torch.tensor([len(r) for r in rows], device=chosen.device)),
            rollout_index=iteration * len(newest) + place,
        )

    def metrics(self, rollouts: Rollouts, iteration: int) -> dict[str, float]:
        """How old what is trained on is; nothing without a buffer, or where nothing comes from it."""
        if not self.config.num_batches or rollouts.sampled_at is None:
            return {}
        staleness = (iteration - rollouts.sampled_at).double()
        return {
            "buffer/staleness_mean": float(staleness.mean()),
            "buffer/staleness_max": float(staleness.max()),
            "buffer/size": float(sum(map(len, self.batches))),
            "buffer/fresh_share": float((staleness == 0).double().mean()),
        }

    def state(self) -> dict[str, Any]:
        """The stored batches, oldest first, for a checkpoint."""
        return {"batches": list(self.batches)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.batches.clear()
        self.batches.extend(state["batches"])


def join_rollouts(batches: Sequence[Rollouts] | deque[Rollouts]) -> Rollouts:
    """The rows of several batches as one, prompts padded on the left to the widest, `groups` unique over all."""
    width = max(batch.prompt_ids.shape[1] for batch in batches)
    first_group = 0
    parts: list[Rollouts] = []
    for batch in batches:
        missing = width - batch.prompt_ids.shape[1]
        changes: dict[str, Tensor] = {
            "prompt_ids": pad(batch.prompt_ids, (missing, 0)),  # the mask says that these are pads, whatever their id
            "prompt_mask": pad(batch.prompt_mask, (missing, 0)),
            "groups": batch.groups + first_group,
        }
        first_group += int(batch.groups.max()) + 1
        parts.append(replace(batch, **changes))  # type: ignore[arg-type]
    joined: dict[str, Any] = {}
    for f in fields(Rollouts):
        values = [getattr(part, f.name) for part in parts]
        if any(value is None for value in values):  # a record that some batch lacks
            joined[f.name] = None
        elif isinstance(values[0], Tensor):
            joined[f.name] = torch.cat(values)
        else:
            joined[f.name] = [item for value in values for item in value]
    return Rollouts(**joined)
