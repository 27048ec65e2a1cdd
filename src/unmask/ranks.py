"""Several processes: every process holds all rows of a batch, and runs the model on its own share of them.

Only rollouts and log-probabilities travel; masks need not, because keyed noise gives every process the same ones.
Texts travel as objects, pickled by torch between the processes of one run; nothing from a file or a user does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, distributed

from unmask.errors import ConfigError, UnmaskError
from unmask.types import Rollouts


def rank() -> int:
    """This process's number; known from the launcher before the processes have met."""
    return distributed.get_rank() if distributed.is_initialized() else int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_rows(total: int) -> slice:
    """This process's consecutive share of `total` rows.

    Raises: ConfigError if the rows cannot be shared evenly, which gathering tensors requires.
    """
    size = num_ranks()
    if total % size:
        raise ConfigError(
            f"{total} rows cannot be shared evenly by {size} processes. "
            "Choose rollout.prompts_per_batch * rollout.group_size (or data.batch_size) divisible by their number."
        )
    return slice(total // size * rank(), total // size * (rank() + 1))


def gather_objects(value: Any) -> list[Any]:
    """One entry per process, in rank order."""
    if num_ranks() == 1:
        return [value]
    out: list[Any] = [None] * num_ranks()
    distributed.all_gather_object(out, value)
    return out


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    if num_ranks() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in rank order; every process has equally many."""
    if num_ranks() == 1:
        return rows
    out = [torch.empty_like(rows) for _ in range(num_ranks())]
    distributed.all_gather(out, rows.contiguous())
    return torch.cat(out)


def gather_rollouts(own: Rollouts) -> Rollouts:
    """The rollouts of all processes as one batch, prompts padded on the left to the widest."""
    if num_ranks() == 1:
        return own
    width = max(gather_objects(own.prompt_ids.shape[1]))
    missing = width - own.prompt_ids.shape[1]
    pad = torch.nn.functional.pad
    changes: dict[str, Any] = {
        "prompt_ids": pad(own.prompt_ids, (missing, 0)),  # the mask says that these are pads, whatever their id
        "prompt_mask": pad(own.prompt_mask, (missing, 0)),
    }
    own = replace(own, **changes)
    changes = {}
    for f in fields(Rollouts):
        value = getattr(own, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = gather_rows(value)
        elif value is not None:
            changes[f.name] = [item for part in gather_objects(value) for item in part]
    return replace(own, **changes)


@contextmanager
def failing_together() -> Iterator[None]:
    """An error inside the block on one process is raised on all of them, with the message of the first."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if num_ranks() == 1:
        if error:
            raise error
        return
    found = gather_objects((type(error).__name__, str(error)) if error else None)
    first = next((i for i, item in enumerate(found) if item), None)
    if first is None:
        return
    if error:
        raise error
    name, message = found[first]
    raise UnmaskError(f"{name} on process {first}: {message}")
