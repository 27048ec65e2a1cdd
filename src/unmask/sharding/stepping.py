"""Sampling where a forward needs all processes: they agree on how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unmask.ranks import any_rank, failing_together
from unmask.sharding.tensors import is_sharded
from unmask.types import TokenOutput


class _Stepping:
    """A policy that tells the other processes of every forward it is about to make."""

    def __init__(self, policy: Any):
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def token_outputs(self, *args: Any, **kwargs: Any) -> TokenOutput:
        any_rank(True, self.policy.device)
        output: TokenOutput = self.policy.token_outputs(*args, **kwargs)
        return output


@contextmanager
def in_step(policy: Any, canvas: Tensor) -> Iterator[Any]:
    """The policy to sample with: inside the block every process may make any number of forwards.

    A forward of a sharded model needs all processes. One that has finished goes on with forwards on `canvas`
    (1, T) int64, whose numbers nobody reads, until the others have finished too. An error ends its own process, and
    the launcher the others: they wait for a forward. Without sharding it is raised on all of them.
    """
    if not is_sharded(getattr(policy, "module", None)):
        with failing_together():
            yield policy
        return
    yield _Stepping(policy)
    with torch.no_grad():
        while any_rank(False, policy.device):
            policy.token_outputs(canvas, None, torch.zeros_like(canvas, dtype=torch.bool))
