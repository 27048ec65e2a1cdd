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
    (directory / SCALAR).unlink(missing_ok=True)  # an earlier adapter's
    if head:
        save_file(head, directory / SCALAR)
    config = switch.module.peft_config[name]
    # peft holds the targets as a set, whose order differs from process to process
    content = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    content["target_modules"] = sorted(content["target_modules"])
    (directory / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_onto(model: Any, directory: Path, renames: Sequence[tuple[str, str]]) -> Any:
    """The model behind a PEFT model with the adapter of a directory as `default`, every tensor of it in place.

    Of adapter_config.json only what the numbers depend on is read. Raises: ModelError if the files are missing or
    damaged, the adapter is no plain LoRA, or a tensor has no place.
    """
    peft = optional("peft", "peft")
    content = read_json(directory / CONFIG)
    _check_plain(content, directory / CONFIG)
    read = {key.removeprefix(_PREFIX): value for key, value in _read(directory / WEIGHTS).items()}
    tensors = {_our_name(key, renames): value for key, value in read.items()}
    layers = {ours.split(".lora_")[0]: key.split(".lora_")[0] for ours, key in zip(tensors, read, strict=True)}
    known = dict(model.named_modules())
    for layer in sorted(layers):
        if layer not in known:
            raise ModelError(
                f"{directory / WEIGHTS}: no layer {layer} in this model. The adapter belongs to another model, or was "
                "saved under names that are not known here."
            )
    config = peft.LoraConfig(
        r=content["r"],
        lora_alpha=content["lora_alpha"],
        use_rslora=bool(content.get("use_rslora")),
        target_modules=sorted(layers),
        rank_pattern=_by_layer(content.get("rank_pattern") or {}, layers),
        alpha_pattern=_by_layer(content.get("alpha_pattern") or {}, layers),
    )
    with adapting():
        wrapped = peft.get_peft_model(model, config, adapter_name=POLICY)
    _fill(wrapped, tensors, directory / WEIGHTS)
    if (directory / SCALAR).is_file():
        add_scalar_head(model, POLICY)
        try:
            model.scalar_heads[POLICY].load_state_dict(_read(directory / SCALAR))
        except RuntimeError as error:
            raise ModelError(
                f"{directory / SCALAR}: does not fit the model ({one_line(error)}). Restore it."
            ) from error
    return wrapped.eval()


# keys of peft's that change no number once the tensors are there
_HARMLESS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    *("exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_dropout", "target_modules"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}


def _check_plain(content: Mapping[str, Any], file: Path) -> None:
    """Raises: ModelError for anything but low-rank products added to linear layers."""
    if content.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type = {content.get('peft_type')!r}: only 'LORA' is supported.")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelError(f"{file}: r = {rank!r}: must be an integer of at least 1. Restore the file.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ModelError(f"{file}: lora_alpha = {alpha!r}: must be a number above 0. Restore the file.")
    # by these methods the adapter begins as a part of the base, which is changed for it
    if content.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ModelError(
            f"{file}: init_lora_weights = {content['init_lora_weights']!r} changes the base model. Convert the adapter "
            "with peft first (path_initial_model_for_weight_conversion)."
        )
    for key in sorted(set(content) - _HARMLESS - _READ - {"init_lora_weights"}):
        if content[key] and not (key == "bias" and content[key] == "none"):
            raise ModelError(f"{file}: {key} = {content[key]!r} is not supported: only plain LoRA is.")


def _by_layer(pattern: Mapping[str, Any], layers: Mapping[str, str]) -> dict[str, Any]:
    """peft's rank or alpha of single layers, whose patterns speak of the names in the file, by the names here."""
    out = {}
    for ours, theirs in layers.items():
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", theirs):
                out[re.escape(ours)] = value
                break
    return out


@torch.no_grad()
def _fill(wrapped: Any, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy the tensors into the new adapter. Raises: ModelError if they are not just its own, or not finite."""
    parameters = adapter_parameters(wrapped, POLICY)
    wanted = {key.removeprefix(_PREFIX).replace(f".{POLICY}.", "."): parameter for key, parameter in parameters}
    wrong = sorted(wanted.keys() ^ tensors.keys())
    if wrong:
        where = "missing in" if wrong[0] in wanted else "unknown in"
        raise ModelError(f"{file}: {wrong[0]} is {where} the file. Restore the adapter from one save.")
    for key, parameter in wanted.items():
        if parameter.shape != tensors[key].shape:
            found, needed = tuple(tensors[key].shape), tuple(parameter.shape)
            raise ModelError(f"{file}: {key} has shape {found}, the model needs {needed}.")
        if not bool(tensors[key].isfinite().all()):
            raise ModelError(f"{file}: {key} holds values that are not finite. Restore the adapter.")
        parameter.copy_(tensors[key])


def _our_name(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """The authors' name of a tensor, or transformers', -> transformers'."""
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
