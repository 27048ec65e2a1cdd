"""Any bidirectional masked language model of transformers (ModernBERT, BERT, RoBERTa, ...) behind our root forward.

The class is transformers' own, with one change: its output embedding sees the wanted positions only, so that logits
(b, T, V) never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from unmask.models.outputs import OUTPUTS, summarise_logits


class SelectedPositions:
    """Mixin in front of a `*ForMaskedLM` class of transformers; see `MaskedLMHead.forward` for the arguments."""

    config: Any
    get_output_embeddings: Any

    def forward(
        self,
        input_ids: Tensor,  # (b, T) int64
        attention_mask: Tensor | None = None,  # (b, T), zero or False on pads
        *args: Any,
        positions: Tensor | None = None,  # (b, T) bool
        targets: Tensor | None = None,  # (N,) int64
        want: Sequence[str] = ("logits",),
        **kwargs: Any,
    ) -> MaskedLMOutput | dict[str, Tensor]:
        plain: Any = super().forward  # type: ignore[misc]
        mask = None if attention_mask is None else attention_mask.long()
        if positions is None:
            return plain(input_ids, mask, *args, **kwargs)

        def select(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (inputs[0].reshape(*input_ids.shape, -1)[positions],)

        handle = self.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits = plain(input_ids, mask).logits  # (N, V)
        finally:
            handle.remove()
        if logits.dim() == 3:  # a class whose head reads the embedding matrix without calling the module
            logits = logits[positions]
        out = summarise_logits(logits, targets, want, self.config.mask_token_id)
        return {name: value for name in OUTPUTS if (value := getattr(out, name)) is not None}


def is_masked_lm(model_type: str) -> bool:
    """Whether transformers ships a masked language model of this type."""
    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


@cache
def masked_lm_classes(model_type: str) -> tuple[Any, Any]:
    """transformers' configuration and model class of this type, the latter with selected positions."""
    config_class = CONFIG_MAPPING[model_type]
    base: Any = AutoModelForMaskedLM._model_mapping[config_class]
    return config_class, type(base.__name__, (SelectedPositions, base), {"__module__": __name__})
