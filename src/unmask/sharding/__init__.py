"""Parameters, gradients and optimiser state in slices: FSDP2 and DeepSpeed's ZeRO behind the same verbs.

Whether a run is sharded is the launcher's choice. Trainer, run log and sampling call the verbs and do not know which
it is. Many of them are collective: every process must call them with the same tensors in the same order.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from unmask.sharding import fsdp2, zero
from unmask.sharding.fsdp2 import sharding_plugin
from unmask.sharding.stepping import in_step
from unmask.sharding.tensors import fill, gathered, is_sharded, slice_again, whole_tensors
from unmask.sharding.updates import Updates, add_up, clip, load_state, make_updates
from unmask.sharding.zero import unknown_to_accelerate

__all__ = [
    "Updates",
    "add_up",
    "check_launcher",
    "clip",
    "fill",
    "gathered",
    "in_step",
    "is_sharded",
    "load_state",
    "make_updates",
    "place",
    "sharding_plugin",
    "slice_again",
    "unknown_to_accelerate",
    "whole_tensors",
]


def check_launcher() -> None:
    """Raises: ConfigError if the launcher wants what this program cannot do, before anything is built."""
    if zero.is_wanted():
        zero.check_settings()
    if fsdp2.is_wanted():
        fsdp2.read_plugin()


def place(module: nn.Module, accelerator: Accelerator) -> None:
    """Move a module to this process's device, whole or as a slice. In place; a sharded module stays as it is.

    Raises: ConfigError for weights that cannot be sharded.
    """
    plugin = sharding_plugin(accelerator)
    if zero.stage():
        zero.place(module, accelerator)
    elif plugin is None:
        module.to(accelerator.device)
    elif not is_sharded(module):
        fsdp2.shard(module, accelerator, plugin)
