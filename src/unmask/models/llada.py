"""LLaDA (arXiv:2502.09992) over transformers' Llama: the authors' checkpoints, without their code.

What differs from Llama: attention in both directions, rotation of queries and keys in float32 whatever the weights'
type, no gradient stop at the padding token's embedding (it is the end-of-text token), and the authors' names of
configuration keys and tensors, which are also the names that are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from unmask.models.files import check_variant, portable
from unmask.models.heads import MaskedLMHead

# the authors' key: our field
_FIELDS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "embedding_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
    "init_std": "initializer_range",
}

# variants of the authors' model class that no released checkpoint uses: one value each is built here
_ONLY = {
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "activation_type": "silu",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "rope_scaling": None,
}

_KEPT = ("dtype", "transformers_version", "quantization_config")
_SPECIAL = ("rms_norm_eps", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")


class LLaDAConfig(LlamaConfig):
    """Llama's fields under their own names, read from and written as the authors' keys. Defaults: LLaDA-8B.

    Raises: ValueError for a variant of the architecture that no released checkpoint uses.
    """

    model_type = "llada"

    vocab_size: int = 126464
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    mask_token_id: int = 126336
    rope_parameters: Any = None
    is_causal: bool = False
    use_cache: bool = False
    authors: dict[str, Any] | None = None
    """config.json as it was read, so that what is not used here is written back."""

    def __post_init__(self, **kwargs: Any) -> None:
        ours = ("torch_dtype", "attn_implementation", "name_or_path")
        given = {key: kwargs.pop(key) for key in list(kwargs) if key not in ours and key[0] != "_"}
        self.authors = given
        check_variant({**given, "rope_parameters": self.rope_parameters}, _ONLY, "LLaDA")
        if given.get("embedding_size") is not None:  # rows of the matrix; the authors' vocab_size may be smaller
            given["vocab_size"] = self.vocab_size
        for key, field in _FIELDS.items():
            if given.get(key) is not None:
                setattr(self, field, given[key])
        if given.get("mlp_hidden_size") is None and given.get("mlp_ratio"):
            self.intermediate_size = given["mlp_ratio"] * self.hidden_size
        if given.get("n_kv_heads") is None and "n_heads" in given:
            self.num_key_value_heads = 1 if given.get("multi_query_attention") else self.num_attention_heads
        if given.get("rope_theta") is not None or self.rope_parameters is None:
            theta = float(given.get("rope_theta") or 500000.0)
            self.rope_parameters = {"rope_type": "default", "rope_theta": theta}
        self.head_dim = None  # otherwise Llama keeps the value of its own default width
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The authors' keys only: their class refuses Llama's names."""
        ours = super().to_dict()
        out = {key: ours[key] for key in _KEPT if ours.get(key) is not None}
        out |= {
            "model_type": self.model_type,
            **{k: v for k, v in _ONLY.items() if v is not None},
            **portable(self.authors or {}),
        }
        out |= {key: ours[field] for key, field in _FIELDS.items()} | {key: ours[key] for key in _SPECIAL}
        out["vocab_size"] = (self.authors or {}).get("vocab_size", self.vocab_size)
        assert self.rope_parameters is not None  # set at construction
        out |= {"rope_theta": self.rope_parameters["rope_theta"], "use_cache": False}
        return {**out, "architectures": ["LLaDAModelLM"]}

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`: what equals a default of ours may differ from the authors' default."""
        return self.to_dict()


class LLaDARotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines in float32 or wider, whatever the type of the hidden states."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))  # read for type and device only
        return super().forward(like, position_ids)


class LLaDAAttention(LlamaAttention):
    """Llama's attention with queries and keys rotated in the wider type of cosines and sines."""

    def forward(
        self,
        hidden_states: Tensor,  # (b, T, H)
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotated = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key = (x.to(value.dtype) for x in rotated)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **{"is_causal": False, **kwargs}
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class LLaDAPreTrainedModel(LlamaPreTrainedModel):
    config_class = LLaDAConfig


class LLaDAModel(LlamaModel):
    """Llama's backbone with LLaDA's rotation."""

    config_class = LLaDAConfig

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.__class__ = LLaDAAttention  # the same parameters, not allocated a second time
        self.rotary_emb = LLaDARotaryEmbedding(config=config)
        self.embed_tokens.padding_idx = None  # pad is end-of-text here, and that row has to learn


class LLaDAForMaskedLM(MaskedLMHead, LLaDAPreTrainedModel):
    """LLaDA with its head; see `MaskedLMHead.forward`."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# the authors' tensor name: ours. One group each, so that saving turns them round; `ff_out` occurs in two places.
RENAMES = (
    (r"^model\.transformer\.wte\.", "model.embed_tokens."),
    (r"^model\.transformer\.ln_f\.", "model.norm."),
    (r"^model\.transformer\.ff_out\.", "lm_head."),
    (r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^model\.transformer\.blocks\.(\d+)\.q_proj\.", r"model.layers.\1.self_attn.q_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.k_proj\.", r"model.layers.\1.self_attn.k_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.v_proj\.", r"model.layers.\1.self_attn.v_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.attn_out\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.", r"model.layers.\1.mlp.gate_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.up_proj\.", r"model.layers.\1.mlp.up_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_out\.", r"model.layers.\1.mlp.down_proj."),
)

register_checkpoint_conversion_mapping(
    LLaDAConfig.model_type, [WeightRenaming(theirs, ours) for theirs, ours in RENAMES], overwrite=True
)
