"""DeepSpeed's ZeRO-2 and ZeRO-3: its engine holds gradients and AdamW's state in slices, and at stage 3 parameters too.

Whether and how is the launcher's choice (`accelerate launch --config_file recipes/accelerate/zero3.yaml`). Of
accelerate only the launcher and its settings are used: its own preparation updates inside `backward`, before numbers
were checked. Nothing of DeepSpeed's checkpoints is used either, for they are pickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor, distributed, nn

from unmask.errors import ConfigError
from unmask.optional import optional
from unmask.ranks import num_ranks, rank

SWITCH = "ACCELERATE_USE_DEEPSPEED"
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_wanted() -> bool:
    return os.environ.get(SWITCH, "false").lower() in ("true", "1")


def stage() -> int:
    """The stage that the launcher asks for, 0 without DeepSpeed."""
    return int(DeepSpeedPlugin().zero_stage) if is_wanted() and distributed.is_initialized() else 0


def check_settings() -> None:
    """Raises: ConfigError if DeepSpeed is not installed, or for a setting of the launcher that cannot be kept here."""
    _deepspeed()
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        raise ConfigError(
            f"accelerate's deepspeed_config_file = {file}: must not be given here. Launch with "
            "recipes/accelerate/zero2.yaml or zero3.yaml; recipes hold the rest."
        )
    plugin = DeepSpeedPlugin()
    found = {
        "zero_stage": (plugin.zero_stage, (2, 3), "2 or 3"),
        "offload_optimizer_device": (plugin.offload_optimizer_device, ("none",), "none"),
        "offload_param_device": (plugin.offload_param_device, ("none",), "none"),
        "gradient_clipping": (plugin.gradient_clipping, ("auto",), "left out; optimizer.max_grad_norm does that"),
        "gradient_accumulation_steps": (plugin.gradient_accumulation_steps, ("auto", 1), "1"),
        "zero3_init_flag": (plugin.zero3_init_flag, (False,), "false"),
        "mixed_precision": (os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), ("no",), "no (fsdp2.yaml has others)"),
    }
    for key, (value, allowed, required) in found.items():
        if value not in allowed:
            raise ConfigError(
                f"accelerate's {key} = {value}: with DeepSpeed it must be {required}. "
                "Launch with recipes/accelerate/zero2.yaml or zero3.yaml."
            )


@contextmanager
def unknown_to_accelerate() -> Iterator[None]:
    """In the block accelerate takes the processes for plain ones, and leaves loading and updating to us."""
    value = os.environ.get(SWITCH)
    if value is not None:
        os.environ[SWITCH] = "false"
    try:
        yield
    finally:
        if value is not None:
            os.environ[SWITCH] = value


def place(module: nn.Module, accelerator: Accelerator) -> None:
    """Move a module to this process's device; a frozen one is put in slices at stage 3. In place.

    A module that is trained becomes slices together with its optimiser, in `make_engine`.
    Raises: ConfigError for weights that cannot be sharded.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"{name} holds packed 4-bit weights, which DeepSpeed cannot shard. "
                "Set model.quantization = 'none', or launch with recipes/accelerate/ddp.yaml."
            )
    module.to(accelerator.device)
    if stage() == 3 and not is_sliced(module) and not any(p.requires_grad for p in module.parameters()):
        engine, *_ = _deepspeed().initialize(model=module, config=_config())
        module.__dict__["_zero_engine"] = engine  # whose end would take the slices' hooks away; no submodule


def make_engine(module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Any:
    """The engine around a module and its AdamW. Raises: ConfigError unless all trained weights are float32."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"model.dtype: {name} is {str(parameter.dtype).removeprefix('torch.')}, and trained weights must be "
                "float32 with DeepSpeed. Set model.dtype = 'float32', or launch with recipes/accelerate/fsdp2.yaml."
            )
    engine, *_ = _deepspeed().initialize(
        model=module, optimizer=optimizer, config=_config() | {"gradient_clipping": max_norm}
    )
    return engine


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # not read: gradients are summed until we say that they are complete
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage()},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def _deepspeed() -> Any:
    package = optional("deepspeed", "deepspeed")
    # a kernel for inference on CPU, which nothing here calls and which it would compile for minutes
    package.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return package


def is_sliced(module: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def is_owned(parameter: Tensor) -> bool:
    """Whether an engine holds this parameter or trains it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    """In the block a sliced parameter is whole; any other tensor is as it was. Collective."""
    return _deepspeed().zero.GatheredParameters([tensor]) if hasattr(tensor, "ds_id") else nullcontext()


def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a trained parameter, and the copy that the optimiser moves, the values of a whole tensor. Collective."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        _deepspeed().utils.safe_set_full_fp32_param(parameter, value)
        return
    with _deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
        if rank() == 0:
            parameter.copy_(value)
    _deepspeed().utils.safe_set_local_fp32_param(parameter, _share(parameter, value))


def _share(parameter: Any, value: Tensor) -> Tensor:
    """This process's slice of a whole tensor at stage 3: equal shares of the numbers, the last filled up with zeros."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * num_ranks(), dtype=value.dtype, device=parameter.ds_tensor.device)
    padded[: value.numel()] = value.flatten()
    return padded[size * rank() : size * (rank() + 1)]


class ZeroUpdates:
    """The verbs of `updates.Updates` on a DeepSpeed engine; states are those of torch's AdamW on whole parameters."""

    def __init__(self, engine: Any, parameters: list[nn.Parameter]) -> None:
        self.engine, self.parameters, self.tools = engine, parameters, _deepspeed().utils

    def exchanging(self, is_last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def clip(self) -> float:
        # one parameter at a time is whole; the engine finds the same norm, and scales by it, in `step`
        norms = [self.tools.safe_get_full_grad(parameter).norm() for parameter in self.parameters]
        return float(torch.stack(norms).norm())

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> None:
        self.engine.step()

    def discard(self) -> None:
        self.engine.optimizer.zero_grad()

    def state(self, *, keep: bool) -> Any:
        optimizer = self.engine.optimizer.optimizer
        states = {}
        for number, parameter in enumerate(self.parameters if optimizer.state else ()):
            found = {key: self.tools.safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            step = next(iter(optimizer.state.values()))["step"]
            states[number] = {"step": step} | {key: value.cpu() if keep else None for key, value in found.items()}
        (group,) = optimizer.param_groups
        numbers = list(range(len(self.parameters)))
        return {"state": states, "param_groups": [{**group, "params": numbers}]}

    def load(self, state: dict[str, Any]) -> None:
        if not state["state"]:
            return
        self._begin_state(state["state"]["0"]["step"])
        for number, parameter in enumerate(self.parameters):
            for key in MOMENTS:
                value = state["state"][str(number)][key].to(parameter.device)
                if hasattr(parameter, "ds_id"):
                    self.tools.safe_set_local_optimizer_state(parameter, _share(parameter, value), key)
                else:
                    self.tools.safe_set_full_optimizer_state(parameter, value, key)

    def _begin_state(self, step: Tensor) -> None:
        """AdamW's state on the engine's flat slices, as its first update would make it, after `step` updates."""
        outer = self.engine.optimizer
        is_stage_3 = hasattr(outer, "fp32_partitioned_groups_flat")
        for flat in outer.fp32_partitioned_groups_flat if is_stage_3 else outer.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            outer.optimizer.state[flat] = {"step": step.clone(), **moments}
        if not is_stage_3:
            outer._lazy_init_hp_params_optimizer_state()  # ties the flat state to parameters, as after an update
