"""What moves the parameters: one optimiser behind the same verbs, whoever holds gradients and state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from unmask.ranks import num_ranks
from unmask.sharding import zero
from unmask.sharding.tensors import gathered, is_sharded, slice_like, whole


class Updates(Protocol):
    """backward (any number of times), clip, then step or discard."""

    def exchanging(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of a micro-batch; after the last one gradients are those of all processes."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def clip(self) -> float:
        """The 2-norm of the whole gradient, which `step` will use scaled down to the bound. Collective."""
        ...

    def set_lr(self, lr: float) -> None: ...

    def step(self) -> None: ...

    def discard(self) -> None:
        """Forget the gradients."""
        ...

    def state(self, *, keep: bool) -> Any:
        """AdamW's state_dict with whole tensors, its tensors None if not `keep`. Collective."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from such a state. Its `state` has text as keys. Collective."""
        ...


def make_updates(
    module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, accelerator: Accelerator
) -> tuple[nn.Module, Updates]:
    """A placed module as it is to be called from now on, and what updates its parameters.

    Raises: ConfigError for weights that the launcher's choice cannot train.
    """
    if zero.stage():
        engine = zero.make_engine(module, optimizer, max_norm)
        return engine, zero.ZeroUpdates(engine, [p for p in module.parameters() if p.requires_grad])
    if is_sharded(module):
        optimizer = accelerator.prepare_optimizer(optimizer)
    else:
        module, optimizer = accelerator.prepare(module, optimizer)
    return module, OwnUpdates(module, optimizer, max_norm, accelerator)


class OwnUpdates:
    """torch's optimiser on whole parameters (one process, DDP) or on slices (FSDP2)."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, accelerator: Accelerator
    ) -> None:
        self.module, self.optimizer, self.max_norm, self.accelerator = module, optimizer, max_norm, accelerator
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def exchanging(self, is_last: bool) -> AbstractContextManager[Any]:
        # sharded gradients are exchanged every time: to wait would mean to hold them whole
        is_exchanged = is_last or is_sharded(self.module)
        return nullcontext() if is_exchanged else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self) -> float:
        return float(whole(self.accelerator.clip_grad_norm_(self.parameters, self.max_norm)))

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def state(self, *, keep: bool) -> Any:
        return gathered(self.optimizer.state_dict(), keep=keep)

    def load(self, state: dict[str, Any]) -> None:
        load_state(self.optimizer, state)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give AdamW a state_dict with whole tensors, whose `state` may have text as keys. Nothing travels."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        int(number): {
            # the count of updates lies on the CPU, whatever the parameter's device
            key: value.cpu() if key == "step" else slice_like(value, parameters[int(number)])
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def add_up(parameters: Sequence[nn.Parameter]) -> None:
    """Make every gradient the sum of all processes', of whole parameters and of FSDP2's slices. Collective."""
    for parameter in parameters:
        if isinstance(parameter.grad, DTensor):
            parameter.grad.mul_(num_ranks())  # FSDP2 has averaged them in the backward
        elif num_ranks() > 1:
            distributed.all_reduce(parameter.grad)


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """The 2-norm of all gradients, of whole parameters and of slices, which are scaled to the bound. Collective."""
    sliced = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    if not sliced:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    gradients = [p.grad for p in parameters if p.grad is not None]
    others = [grad for grad in gradients if not isinstance(grad, DTensor)]
    norm = math.hypot(*(float(whole(nn.utils.get_total_norm(kind))) for kind in (sliced, others) if kind))
    scale = min(1.0, max_norm / (norm + 1e-6))  # as torch does
    for grad in gradients:
        grad.mul_(scale)
    return norm
