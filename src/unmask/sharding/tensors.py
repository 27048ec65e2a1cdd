"""Whole tensors from slices and slices from whole tensors, however the parameters are sharded.

Gathering is collective: every process must ask for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from unmask.sharding import zero


def is_sharded(module: nn.Module | None) -> bool:
    """Whether parameters are in slices, so that a forward needs all processes."""
    return isinstance(module, FSDPModule) or (module is not None and zero.is_sliced(module))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def slice_again(module: nn.Module) -> None:
    """Put the slices back in the place of whole parameters, which a forward may have left there."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def whole_tensors(module: nn.Module, names: Iterable[str], *, keep: bool) -> dict[str, Tensor]:
    """Copies on CPU of the named parameters and buffers of a module; an empty dict if not `keep`. Collective.

    One tensor at a time is put together on the device, so that the model need not fit there.
    """
    slice_again(module)
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    tensors = {}
    for name in names:
        with zero.gathered(own[name]):
            tensor = whole(own[name].detach())
            if keep:
                tensors[name] = tensor.cpu().contiguous().clone()
    return tensors


def gathered(value: Any, *, keep: bool) -> Any:
    """Nested dicts and lists with every sharded tensor put together on CPU, or None if not `keep`. Collective."""
    if isinstance(value, dict):
        return {key: gathered(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item, keep=keep) for item in value]
    if not isinstance(value, DTensor):
        return value
    tensor = whole(value)
    return tensor.cpu() if keep else None


def slice_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a whole tensor, sharded as the parameter is; any other as it is, on the same device.

    Every process holds the whole tensor, so nothing travels.
    """
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter the values of a whole tensor that every process holds. Collective."""
    if zero.is_owned(parameter):
        zero.fill(parameter, value)
    else:
        parameter.copy_(slice_like(value, parameter))
