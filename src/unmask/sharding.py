"""FSDP2: every process keeps a slice of each parameter, and the root forward puts them together where they are used.

Whether a run is sharded is the launcher's choice (`accelerate launch --config_file recipes/accelerate/fsdp2.yaml`). The
sharding itself is torch's `fully_shard`: one unit for each block of the model's `_no_split_modules`, one for the rest.
accelerate's own preparation is not used: it knows neither processes on CPU nor a frozen reference beside the policy.

Gathering is collective: every process must ask for the same tensors in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unmask.errors import ConfigError
from unmask.ranks import any_rank, failing_together, num_ranks
from unmask.types import TokenOutput


def check_launcher() -> None:
    """Raises: ConfigError if the launcher wants what this program cannot do, before anything is built."""
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "accelerate's distributed_type = DEEPSPEED: its engine updates inside backward and pickles its "
            "checkpoints, so that updates could not be checked before they are made nor resumed exactly. Launch with "
            "recipes/accelerate/fsdp2.yaml, which shards what ZeRO-3 does, or fsdp2-zero2.yaml."
        )
    if _is_set("ACCELERATE_USE_FSDP"):
        _read_plugin()


def sharding_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The launcher's settings of FSDP2; None if parameters are not to be sharded."""
    if not _is_set("ACCELERATE_USE_FSDP") or not distributed.is_initialized():
        return None
    plugin = _read_plugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    return plugin


def place(module: nn.Module, accelerator: Accelerator) -> None:
    """Move a module to this process's device, whole or as a slice. In place; a sharded module stays as it is.

    Raises: ConfigError for weights that cannot be sharded.
    """
    plugin = sharding_plugin(accelerator)
    if plugin is None:
        module.to(accelerator.device)
    elif not is_sharded(module):
        _shard(module, accelerator, plugin)


def _shard(module: nn.Module, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    packed = [name for name, p in module.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ConfigError(
            f"{packed[0]} holds packed 4-bit weights, which FSDP2 cannot shard. "
            "Set model.quantization = 'none', or launch with recipes/accelerate/ddp.yaml."
        )
    is_trained = any(p.requires_grad for p in module.parameters())
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (num_ranks(),)),
        # the root too, which torch would leave whole; a frozen reference has no backward that would slice it again
        "reshard_after_forward": plugin.reshard_after_forward or not is_trained,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    blocks = set(plugin.transformer_cls_names_to_wrap or getattr(module, "_no_split_modules", None) or ())
    found = [child for child in module.modules() if type(child).__name__ in blocks and child is not module]
    if not found:
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap: the model has no block named {' or '.join(sorted(blocks)) or '...'}. "
            "Name the class of its layers there."
        )
    for child in found:
        fully_shard(child, **settings)
    fully_shard(module, **settings)


def is_sharded(module: nn.Module | None) -> bool:
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(module: nn.Module, names: Iterable[str], *, keep: bool) -> dict[str, Tensor]:
    """Copies on CPU of the named parameters and buffers of a module; an empty dict if not `keep`. Collective.

    One tensor at a time is put together on the device, so that the model need not fit there.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()  # a forward may have left whole parameters in the place of the slices
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    tensors = {}
    for name in names:
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


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _read_plugin() -> FullyShardedDataParallelPlugin:
    """The settings of FSDP in the launcher's environment. Raises: ConfigError for one that cannot be kept here."""
    plugin = FullyShardedDataParallelPlugin()
    found = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), False),
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, False),
    }
    for key, (value, required) in found.items():
        if value != required:
            instead = "; model.gradient_checkpointing = true does that" if "checkpointing" in key else ""
            raise ConfigError(
                f"accelerate's {key} = {str(value).lower()}: must be {str(required).lower()} here{instead}. "
                "Launch with recipes/accelerate/fsdp2.yaml."
            )
    return plugin
