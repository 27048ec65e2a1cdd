"""A base in 4 bits: less memory for weights that are not trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from unmask.errors import ConfigError
from unmask.optional import optional

QUANTIZATIONS = ("none", "nf4")


def quantization_options(name: str) -> dict[str, Any]:
    """Arguments for from_pretrained. Raises: ConfigError for an unknown name, or if the package is missing."""
    if name not in QUANTIZATIONS:
        raise ConfigError(f"model.quantization = {name!r}: must be one of {', '.join(QUANTIZATIONS)}. Try 'nf4'.")
    if name == "none":
        return {}
    optional("bitsandbytes", "quantization")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}
