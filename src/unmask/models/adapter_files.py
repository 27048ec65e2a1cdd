"""Adapter directories: PEFT's format, written under transformers' tensor names, read under those or the authors'."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.errors import ModelError
from unmask.models.adapters import POLICY, Switch, adapter_parameters, adapting, add_scalar_head
from unmask.models.files import one_line, read_json
from unmask.optional import optional

CONFIG, WEIGHTS, SCALAR = "adapter_config.json", "adapter_model.safetensors", "scalar_head.safetensors"
_PREFIX = "base_model.model."


def is_adapter(directory: Path) -> bool:
    return os.path.isfile(directory / CONFIG)  # False also where the path itself is impossible


def base_of(directory: Path) -> str:
    """The model that an adapter was trained on, as its configuration names it. Raises: ModelError if it names none."""
    base = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{directory / CONFIG}: base_model_name_or_path = {base!r}: must name the model. Mend the file."
        )
    return base


def save(
    directory: Path, switch: Switch, base: str, name: str = POLICY, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write one adapter, and its scalar head if it has one. `state`: full tensors by parameter name where the module's
    own are shards."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, parameter in adapter_parameters(switch.module, name):
        value = (state[key] if state else parameter).detach().cpu().contiguous()
        if "scalar_heads" in key:
            head[key.rsplit(".", 1)[-1]] = value
        else:
            tensors[key.replace(f".{name}.", ".")] = value
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    if head:
        save_file(head, directory / SCALAR)
    config = switch.module.peft_config[name]
    # peft holds the targets as a set, whose order differs from process to process
    content = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    content["target_modules"] = sorted(content["target_modules"])
    (directory / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_onto(model: Any, directory: Path, renames: Sequence[tuple[str, str]]) -> Any:
    """The model behind a PEFT model with the adapter of a directory as `default`, every tensor of it in place.

    Raises: ModelError if the files are missing or damaged, the adapter is no LoRA, or a tensor has no place.
    """
    peft = optional("peft", "peft")
    content = read_json(directory / CONFIG)
    if content.get("peft_type") != "LORA":
        raise ModelError(f"{directory / CONFIG}: peft_type = {content.get('peft_type')!r}: only 'LORA' is supported.")
    tensors = {_our_name(key, renames): value for key, value in _read(directory / WEIGHTS).items()}
    layers = {key.split(".lora_")[0] for key in tensors}
    known = dict(model.named_modules())
    for layer in sorted(layers):
        if layer not in known:
            raise ModelError(
                f"{directory / WEIGHTS}: no layer {layer} in this model. The adapter belongs to another model, or was "
                "saved under names that are not known here."
            )
    config = peft.LoraConfig.from_pretrained(str(directory))
    config.target_modules, config.inference_mode, config.lora_dropout = sorted(layers), False, 0.0
    with adapting():
        wrapped = peft.get_peft_model(model, config, adapter_name=POLICY)
    wanted = {
        key.removeprefix(_PREFIX).replace(f".{POLICY}.", "."): p for key, p in adapter_parameters(wrapped, POLICY)
    }
    wrong = sorted(wanted.keys() ^ tensors.keys())
    if wrong:
        where = "missing in" if wrong[0] in wanted else "unknown in"
        raise ModelError(f"{directory / WEIGHTS}: {wrong[0]} is {where} the file. Restore the adapter from one save.")
    with torch.no_grad():
        for key, parameter in wanted.items():
            if parameter.shape != tensors[key].shape:
                found, needed = tuple(tensors[key].shape), tuple(parameter.shape)
                raise ModelError(f"{directory / WEIGHTS}: {key} has shape {found}, the model needs {needed}.")
            parameter.copy_(tensors[key])
    if (directory / SCALAR).is_file():
        add_scalar_head(model, POLICY)
        model.scalar_heads[POLICY].load_state_dict(_read(directory / SCALAR))
    return wrapped.eval()


def _our_name(key: str, renames: Sequence[tuple[str, str]]) -> str:
    """`base_model.model.<authors' or transformers' name>` -> transformers' name."""
    name = key.removeprefix(_PREFIX)
    for theirs, ours in renames:
        name, count = re.subn(theirs, ours, name)
        if count:
            break
    return name


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read ({one_line(error)}). Restore the adapter.") from error
