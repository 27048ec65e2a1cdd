"""The registry of model families, and which of them a config.json belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2Tokenizer

from unmask.errors import ModelError
from unmask.models.block import LLaDA2Config, LLaDA2ForMaskedLM, SDARConfig, SDARForMaskedLM
from unmask.models.dream import DreamConfig, DreamForMaskedLM
from unmask.models.llada import RENAMES, LLaDAConfig, LLaDAForMaskedLM
from unmask.models.masked_lm import check_class, is_masked_lm, masked_lm_classes, prepare
from unmask.models.tiny import TinyConfig, TinyForMaskedLM


@dataclass(frozen=True)
class Family:
    """How one `model_type` is built; `about` is a line for `unmask list models`."""

    config_class: Any
    model_class: Any
    about: str
    tokenizer_class: Any = AutoTokenizer
    stop_tokens: tuple[str, ...] = ()
    """Texts of tokens that end a turn, where config.json names only the end of a document."""
    renames: tuple[tuple[str, str], ...] = ()
    """Authors' tensor names (regular expressions) and ours, for adapters that were saved under the former."""
    allows_extra: bool = False
    """Whether files may hold tensors that the model has not, outside of its layers: heads of the pretraining."""
    prepare: Callable[[Any, Path], None] | None = None
    """What is done to a loaded model, in place; may refuse it."""

    def attention(self, wanted: str) -> str:
        """The implementation of attention that is built: eager for a class without "sdpa", else the wanted one."""
        return "eager" if wanted == "sdpa" and not self.model_class._supports_sdpa else wanted


MODELS: dict[str, Family] = {
    "unmask_tiny": Family(
        TinyConfig, TinyForMaskedLM, "embedded: small bidirectional Llama with learned absolute positions"
    ),
    "llada": Family(
        LLaDAConfig,
        LLaDAForMaskedLM,
        "LLaDA-8B and LLaDA-1.5 (arXiv:2502.09992): bidirectional Llama",
        stop_tokens=("<|eot_id|>",),
        renames=RENAMES,
    ),
    "Dream": Family(
        DreamConfig,
        DreamForMaskedLM,
        "Dream-7B (arXiv:2508.15487): bidirectional Qwen2 whose logits are shifted by one",
        tokenizer_class=Qwen2Tokenizer,  # the authors' own class is the same tokenizer
        stop_tokens=("<|im_end|>",),
    ),
    "sdar": Family(
        SDARConfig,
        SDARForMaskedLM,
        "SDAR (arXiv:2510.06303): block-causal Qwen3; sampling and evaluation only",
        stop_tokens=("<|im_end|>",),
    ),
    "llada2_moe": Family(
        LLaDA2Config,
        LLaDA2ForMaskedLM,
        "LLaDA2.x (arXiv:2512.15745): block-causal GLM-4-MoE; sampling and evaluation only",
        stop_tokens=("<|role_end|>",),
    ),
}


def family_of(config: Mapping[str, Any], directory: Path) -> Family:
    """The family of a config.json.

    Raises: ModelError for a model type that is neither ours nor a bidirectional masked language model of transformers.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in MODELS:
        return MODELS[model_type]
    if isinstance(model_type, str) and is_masked_lm(model_type):
        check_class(model_type, config, directory / "config.json")
        config_class, model_class = masked_lm_classes(model_type)
        about = "a masked language model of transformers"
        return Family(config_class, model_class, about, allows_extra=True, prepare=prepare)
    raise ModelError(
        f"{directory / 'config.json'}: model_type = {model_type!r} is unknown. Known: {', '.join(sorted(MODELS))}, and "
        "the masked language models of transformers, such as modernbert."
    )
