"""FSDP2: every process keeps a slice of each parameter, and the root forward puts them together where they are used.

Whether a run is sharded is the launcher's choice (`accelerate launch --config_file recipes/accelerate/fsdp2.yaml`). The
sharding itself is torch's `fully_shard`: one unit for each block of the model's `_no_split_modules`, one for the rest.
accelerate's own preparation is not used: it knows neither processes on CPU nor a frozen reference beside the policy.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from unmask.errors import ConfigError
from unmask.ranks import num_ranks


def is_wanted() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def sharding_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The launcher's settings of FSDP2; None if parameters are not to be sharded."""
    if not is_wanted() or not distributed.is_initialized():
        return None
    plugin = read_plugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    return plugin


def shard(module: nn.Module, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Turn a module's parameters into slices, in place. Raises: ConfigError for weights that cannot be sharded."""
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


def read_plugin() -> FullyShardedDataParallelPlugin:
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
