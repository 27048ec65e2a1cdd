"""Dream (arXiv:2508.15487) over transformers' Qwen2: names and keys are Qwen2's own.

What differs: attention in both directions, and the hidden state of a position predicts the token of the next one, as
in the autoregressive model that Dream began from. The shift is undone here, so that everywhere else number i is about
token i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel

from unmask.models.files import check_variant, published
from unmask.models.heads import MaskedLMHead


class DreamConfig(Qwen2Config):
    """Qwen2's fields with Dream's tokens. Defaults: Dream-7B."""

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    mask_token_id: int = 151666
    is_causal: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        given = {**kwargs, "use_sliding_window": self.use_sliding_window, "rope_parameters": self.rope_parameters}
        check_variant(given, {"use_mrope": False, "use_sliding_window": False, "rope_scaling": None}, "Dream")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """With the authors' class name, and the rotary base under the key that their class reads."""
        return published(super().to_dict(), self, "DreamModel")

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without what transformers gives every model."""
        return published(super().to_diff_dict(), self, "DreamModel")


class DreamPreTrainedModel(Qwen2PreTrainedModel):
    config_class = DreamConfig


class DreamModel(Qwen2Model):
    config_class = DreamConfig


class DreamForMaskedLM(MaskedLMHead, DreamPreTrainedModel):
    """Dream with its head; see `MaskedLMHead.forward`."""

    lookback = 1

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def align(
        self,
        hidden: Tensor,  # (b, T, H)
    ) -> Tensor:
        """Position i gets the state of position i - 1; the first keeps its own, as nothing stands before it.

        Under left padding the first real token gets a pad's state: it belongs to a prompt, and is never predicted.
        """
        return torch.cat([hidden[:, :1], hidden[:, :-1]], 1)
