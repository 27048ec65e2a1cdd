"""The model that a run starts from, as its recipe wants it trained, and the reference beside it."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from unmask.build import ModelConfig
from unmask.errors import ConfigError, ModelError
from unmask.models import MaskedPolicy, load, with_adapter, with_lora
from unmask.models.adapter_files import is_adapter
from unmask.models.adapters import POLICY, REFERENCE
from unmask.models.files import fetch
from unmask.sharding import place

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def model_directory(path: str | Path) -> str | Path:
    """A model or adapter directory (or hub id) itself, or the model/ of a run directory."""
    inner = Path(path) / "model"
    # os.path: a name that is too long for the system is no directory, rather than an error
    is_run = any(os.path.isfile(inner / name) for name in ("config.json", "adapter_config.json"))
    return inner if is_run else path


def open_base(path: str | Path, config: ModelConfig) -> MaskedPolicy:
    """The model of a directory or hub id in the type that its training wants.

    `dtype = "auto"` is the stored type for a frozen base, and float32 where all weights are trained: an update of
    3e-6 is lost on a bfloat16 weight.
    """
    dtype = DTYPES[config.dtype]
    is_frozen = config.lora is not None or config.adapter is not None or config.quantization != "none"
    is_frozen = is_frozen or is_adapter(fetch(path))
    if config.dtype == "auto" and not is_frozen:
        dtype = torch.float32
    return load(path, dtype=dtype, attention=config.attention, quantization=config.quantization)


def open_for_training(path: str | Path, config: ModelConfig, *, seed: int) -> MaskedPolicy:
    """The model of a directory or hub id, ready for the trainer."""
    return fit_for_training(open_base(path, config), config, seed=seed)


def fit_for_training(policy: MaskedPolicy, config: ModelConfig, *, seed: int) -> MaskedPolicy:
    """Adapters, gradient checkpointing and the cross-entropy path, as the recipe has them.

    Raises: ModelError for a family that cannot be trained, ConfigError for settings that exclude each other.
    """
    if policy.block_size is not None:
        raise ModelError(
            f"{policy.name}: a block-causal model (blocks of {policy.block_size}), whose ELBO is not implemented. It "
            "can be sampled and evaluated; train LLaDA or Dream."
        )
    if config.adapter:
        policy = with_adapter(policy, config.adapter)
    if policy.adapters:  # given as model.adapter, or model.path is an adapter's directory
        if config.lora:
            raise ConfigError("model.lora: the adapter that the run starts from has its own shape. Drop [model.lora].")
        assert policy.switch
        policy.switch.add_frozen_copy(POLICY, REFERENCE)
    elif config.lora:
        policy = with_lora(policy, config.lora, seed=seed)
    elif config.quantization != "none":
        raise ConfigError("model.quantization: 4-bit weights cannot be trained. Add [model.lora].")
    if config.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    base: Any = policy.switch.module.get_base_model() if policy.switch else policy.module
    if hasattr(base, "cross_entropy"):
        base.cross_entropy = config.cross_entropy
    elif config.cross_entropy != "chunked":
        raise ConfigError(f"model.cross_entropy = {config.cross_entropy!r}: this family has one path. Drop the key.")
    return policy


def reference_policy(policy: MaskedPolicy, accelerator: Accelerator | None = None) -> MaskedPolicy:
    """The frozen start: the adapter switched off (or the one begun from), a copy where all weights are trained."""
    if policy.adapters:
        return policy.with_adapter(REFERENCE if REFERENCE in policy.adapters else None)
    return frozen_copy(policy, accelerator)


def frozen_copy(policy: MaskedPolicy, accelerator: Accelerator | None = None) -> MaskedPolicy:
    """The reference policy of full fine-tuning, placed as the accelerator says."""
    module = copy.deepcopy(policy.module).requires_grad_(False)
    if accelerator:
        place(module, accelerator)
    return policy.with_module(module, "reference")


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over names and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
