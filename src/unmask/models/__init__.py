"""Model families behind one forward, by `model_type`; loading without remote code.

Importing this room registers the families with transformers' Auto classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from unmask.errors import ConfigError, ModelError
from unmask.models import adapter_files
from unmask.models.adapters import LoraConfig, wrap
from unmask.models.families import MODELS, Family, family_of
from unmask.models.files import fetch, one_line, read_json
from unmask.models.policy import AdapterView, MaskedPolicy
from unmask.models.quantization import quantization_options
from unmask.models.tiny import TinyModelConfig, build_tiny
from unmask.places import is_hub_id

__all__ = [
    "MODELS",
    "AdapterView",
    "Family",
    "LoraConfig",
    "MaskedPolicy",
    "TinyModelConfig",
    "build_tiny",
    "load",
    "register",
    "stored_dtype",
    "with_adapter",
    "with_lora",
]


def register(model_type: str, family: Family) -> None:
    """Make `load`, and transformers' Auto classes, build a family for this `model_type`."""
    MODELS[model_type] = family
    AutoConfig.register(model_type, family.config_class, exist_ok=True)
    AutoModelForMaskedLM.register(family.config_class, family.model_class, exist_ok=True)


for _name, _family in tuple(MODELS.items()):
    register(_name, _family)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    quantization: str = "none",
) -> MaskedPolicy:
    """Load a model as a policy: a model directory, an adapter directory, or a hub id.

    `dtype` None: half precision where the checkpoint has it, else float32. `attention` names one of transformers'
    implementations; a class of transformers without "sdpa" gets "eager" in its place. `quantization` "nf4" holds the
    linear layers in 4 bits. Hub ids go through the local hub cache and respect HF_HUB_OFFLINE; no code of the
    repository is ever run.

    Raises: ModelError with the way out if the directory is missing, incomplete, damaged or of an unknown family.
    """
    directory = fetch(path)
    if adapter_files.is_adapter(directory):
        base = _base_of_adapter(directory)
        return with_adapter(load(base, dtype=dtype, attention=attention, quantization=quantization), directory)
    if not os.path.isfile(directory / "config.json"):  # False also where the path itself is impossible
        raise ModelError(
            f"{directory}: no config.json there. Name a model directory, the model/ folder of a run, or a hub id."
        )
    content = read_json(directory / "config.json")
    family = family_of(content, directory)
    if not list(directory.glob("*.safetensors")):
        raise ModelError(f"{directory}: no *.safetensors file. Only safetensors are loaded; convert the weights first.")
    _check_experts(directory)
    try:
        with _silence():
            model, report = family.model_class.from_pretrained(
                directory,
                dtype=dtype or stored_dtype(directory),
                attn_implementation=family.attention(attention),
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **quantization_options(quantization),
            )
            tokenizer = family.tokenizer_class.from_pretrained(directory, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:
        raise ModelError(f"{directory}: cannot be loaded ({one_line(error)}). Restore or rewrite the model.") from error
    _check_report(report, directory, family.allows_extra)
    _complete_tokens(model.config, tokenizer)
    _check_tokens(model.config, tokenizer, directory)
    broken = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if broken:
        raise ModelError(f"{directory}: {broken} holds values that are not finite. Restore the weights.")
    if family.prepare:
        family.prepare(model, directory)
    if is_hub_id(str(path)):
        _name_repository(model.config, str(path))
    return MaskedPolicy(model, tokenizer, str(path), family.stop_tokens)


def _base_of_adapter(directory: Path) -> str | Path:
    """The model that an adapter belongs to. Raises: ModelError if it is not there, or is an adapter itself."""
    base = adapter_files.base_of(directory)
    nearby = directory / base  # an adapter may name its base relative to itself
    found = fetch(nearby if os.path.isdir(nearby) else base)
    if not os.path.isfile(found / "config.json"):
        raise ModelError(
            f"{directory}: its base model {base} is not there, or no model. Mend base_model_name_or_path in "
            "adapter_config.json, or give the base as model.path and this directory as model.adapter."
        )
    return nearby if os.path.isdir(nearby) else base


def with_lora(policy: MaskedPolicy, config: LoraConfig, *, seed: int) -> MaskedPolicy:
    """The policy with a new adapter `default` on a frozen base. Raises: ConfigError for targets it does not have."""
    _require_bare(policy)
    return _around(policy, wrap(policy.module, config, seed=seed))


def with_adapter(policy: MaskedPolicy, path: str | Path) -> MaskedPolicy:
    """The policy with the adapter of a directory (or hub id) as `default` on a frozen base. Raises: ModelError."""
    _require_bare(policy)
    family = MODELS.get(str(getattr(policy.module.config, "model_type", "")))
    return _around(policy, adapter_files.load_onto(policy.module, fetch(path), family.renames if family else ()))


def stored_dtype(directory: Path) -> torch.dtype:
    """Half precision where the first tensor on disk is, else float32. config.json need not say it, and may err."""
    with safe_open(min(directory.glob("*.safetensors")), "pt") as file:
        name = next((file.get_slice(key).get_dtype() for key in file.keys()), "F32")  # noqa: SIM118
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(name, torch.float32)


def _around(policy: MaskedPolicy, module: nn.Module) -> MaskedPolicy:
    """The policy with its module inside another one."""
    module.peft_config["default"].base_model_name_or_path = policy.name  # type: ignore[index, union-attr]
    return policy.with_module(module, policy.name)


def _require_bare(policy: MaskedPolicy) -> None:
    if policy.switch:
        raise ConfigError(f"{policy.name}: has an adapter already, and none goes on top. Merge it: unmask merge.")


def _check_report(report: dict[str, Any], directory: Path, allows_extra: bool) -> None:
    """Raises: ModelError unless every tensor of the model, and no other, was in the files.

    Extra tensors are allowed outside of numbered layers only: a layer too many means another model.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    extra = [key for key in report["unexpected_keys"] if not allows_extra or re.search(r"\.\d+\.", key)]
    wrong = sorted([*report["missing_keys"], *extra, *mismatched])
    if wrong:
        raise ModelError(
            f"{directory}: weights do not fit config.json, first at {wrong[0]}. Restore both from one save."
        )


def _check_experts(directory: Path) -> None:
    """Raises: ModelError unless every expert of a layer has the same tensors; transformers' own message names none."""
    layers: dict[str, set[tuple[str, str]]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError):
            return  # the loader says so
        for name in names:
            layer, found, rest = name.partition(".experts.")
            if found and rest.split(".", 1)[0].isdigit():
                layers.setdefault(layer, set()).add(tuple(rest.split(".", 1)))  # type: ignore[arg-type]
    for layer, there in layers.items():
        every = {(number, tensor) for number, _ in there for _, tensor in there}
        for number, tensor in sorted(every - there):
            raise ModelError(
                f"{directory}: {layer}.experts.{number}.{tensor} is missing, which other experts have. "
                "Restore the weights."
            )


def _complete_tokens(config: Any, tokenizer: Any) -> None:
    """Special tokens that config.json leaves out, from the tokenizer."""
    for key, fallback in (("mask_token_id", None), ("eos_token_id", "sep_token_id"), ("pad_token_id", "eos_token_id")):
        if getattr(config, key, None) is None:
            value = getattr(tokenizer, key, None)
            if value is None and fallback:
                value = getattr(tokenizer, fallback, None)
            setattr(config, key, value)


def _name_repository(config: Any, hub_id: str) -> None:
    """References to the repository's own Python files, completed by its name, so that a saved copy still finds them."""
    references = (getattr(config, "authors", None) or vars(config)).get("auto_map")
    for key, value in (references or {}).items():
        if "--" not in str(value):
            references[key] = f"{hub_id}--{value}"


@contextmanager
def _silence() -> Iterator[None]:
    """transformers reports what it finds wrong in tables of its own; ours is the one line of the error."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_tokens(config: Any, tokenizer: Any, directory: Path) -> None:
    """Raises: ModelError unless the special tokens lie in the vocabulary and the tokenizer is the model's."""
    size = config.vocab_size
    for key in ("mask_token_id", "pad_token_id", "eos_token_id"):
        value = getattr(config, key, None)
        ids = value if isinstance(value, list | tuple) and value and key == "eos_token_id" else [value]
        if not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise ModelError(
                f"{directory}: {key} = {value} in config.json: must be a token id from 0 to {size - 1}. Mend the file."
            )
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < size or tokenizer.mask_token_id not in (None, config.mask_token_id):
        raise ModelError(
            f"{directory}: the tokenizer has token ids up to {largest} and the mask token {tokenizer.mask_token_id}, "
            f"config.json has {size} tokens and the mask token {config.mask_token_id}. Restore both from one save."
        )
