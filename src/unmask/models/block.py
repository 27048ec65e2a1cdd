"""Block-causal families: SDAR (arXiv:2510.06303) over Qwen3, LLaDA2.x (arXiv:2512.15745) over GLM-4-MoE.

A position sees its own block and all blocks before it. Keys and values of finished blocks therefore never change, and
a plain cache is exact. Blocks are counted from the first token that is not padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Qwen3Config
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeModel, Glm4MoePreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel

from unmask.models.files import check_variant, published
from unmask.models.heads import MaskedLMHead


class BlockCausalHead(MaskedLMHead):
    """The root forward of a family that fills block after block of `config.block_size` tokens."""

    def attention(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Any
    ) -> Any:
        """The block-causal mask, or None for a window within one block behind cached ones, which sees everything.

        Raises: ValueError for a window that a cache cannot serve (padded, or spanning several blocks behind others),
            and for an attention implementation that takes no such mask.
        """
        if self.config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
            raise ValueError(
                f"attention {self.config._attn_implementation!r} cannot express a block-causal mask; "
                "load the model with 'sdpa'"
            )
        size, width = self.config.block_size, input_ids.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past_key_values is not None and attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("a cache holds rows of equal length: strip the padding and group rows by length")
        if past:
            if past % size + width > size:
                raise ValueError(f"{width} tokens behind {past} cached ones span several blocks of {size}; pass one")
            return None
        if position_ids is None:
            position_ids = torch.arange(width, device=input_ids.device)[None]
        block = (position_ids // size).expand(len(input_ids), -1)  # (b, T)
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=self.model.embed_tokens.weight.new_empty(*input_ids.shape, 0),  # read for shape and type
            attention_mask=attention_mask,
            and_mask_function=lambda b, h, q, k: block[b, q] >= block[b, k],
        )


class SDARConfig(Qwen3Config):
    """Qwen3's fields with SDAR's tokens and block size. Defaults: SDAR-4B-Chat."""

    model_type = "sdar"

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = 151643
    mask_token_id: int = 151669
    block_size: int = 4
    is_causal: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        given = {**kwargs, "use_sliding_window": self.use_sliding_window, "rope_parameters": self.rope_parameters}
        check_variant(given, {"use_sliding_window": False, "rope_scaling": None}, "SDAR")
        _check_block_size(self.block_size)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """With the authors' class name, and the rotary base under the key that their class reads."""
        return published(super().to_dict(), self, "SDARForCausalLM")

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without what transformers gives every model."""
        return published(super().to_diff_dict(), self, "SDARForCausalLM")


class SDARPreTrainedModel(Qwen3PreTrainedModel):
    config_class = SDARConfig


class SDARModel(Qwen3Model):
    config_class = SDARConfig


class SDARForMaskedLM(BlockCausalHead, SDARPreTrainedModel):
    """SDAR with its head; see `MaskedLMHead.forward`."""

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# the authors' key: our field
_KEYS = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts", "use_qkv_bias": "attention_bias"}
_ONLY = {
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "use_bias": False,
    "norm_head": False,
    "rope_scaling": None,
}


class LLaDA2Config(Glm4MoeConfig):
    """GLM-4-MoE's fields, read from and written with the authors' keys for experts. Defaults: LLaDA2.1-mini.

    Raises: ValueError for a variant of the architecture that no released checkpoint uses.
    """

    model_type = "llada2_moe"

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    moe_intermediate_size: int = 512
    n_routed_experts: int = 256
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    use_qk_norm: bool = True
    rope_parameters: Any = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    mask_token_id: int = 156895
    block_size: int = 32
    is_causal: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for theirs, ours in _KEYS.items():
            if (value := kwargs.pop(theirs, None)) is not None:
                setattr(self, ours, value)
        given = {**kwargs, "use_qk_norm": self.use_qk_norm, "rope_parameters": self.rope_parameters}
        check_variant(given, _ONLY, "LLaDA2")
        _check_block_size(self.block_size)
        if self.rope_parameters is None:
            theta, share = kwargs.pop("rope_theta", 600000.0), kwargs.pop("partial_rotary_factor", 0.5)
            self.rope_parameters = {
                "rope_type": "default", "rope_theta": float(theta), "partial_rotary_factor": float(share)
            }  # fmt: skip
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """With the authors' keys and class name."""
        return self._published(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without what transformers gives every model."""
        return self._published(super().to_diff_dict())

    def _published(self, config: dict[str, Any]) -> dict[str, Any]:
        config.pop("num_nextn_predict_layers", None)  # GLM's, with a default that no checkpoint here fulfils
        for theirs, ours in _KEYS.items():
            config.pop(ours, None)
            config[theirs] = getattr(self, ours)
        return published(config, self, "LLaDA2MoeModelLM")


class LLaDA2PreTrainedModel(Glm4MoePreTrainedModel):
    config_class = LLaDA2Config


class LLaDA2Model(Glm4MoeModel):
    config_class = LLaDA2Config


class LLaDA2ForMaskedLM(BlockCausalHead, LLaDA2PreTrainedModel):
    """LLaDA2.x with its head; see `MaskedLMHead.forward`."""

    def __init__(self, config: LLaDA2Config):
        super().__init__(config)
        self.model = LLaDA2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _check_block_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"block_size = {size}: must be at least 1 token")


class SplitProjections(ConversionOps):
    """The authors' fused query, key and value rows -> three tensors; saving concatenates them again.

    Not for tensor parallelism, where a rank holds part of the rows.
    """

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        config: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        query, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = fused.split([query, shared, shared])
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(0)


register_checkpoint_conversion_mapping(
    LLaDA2Config.model_type,
    [
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
        WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
        WeightConverter(
            source_patterns="attention.query_key_value.weight",
            target_patterns=[f"self_attn.{name}_proj.weight" for name in "qkv"],
            operations=[SplitProjections()],
        ),
        *get_checkpoint_conversion_mapping("qwen2_moe"),  # experts one by one on disk, fused in memory
    ],
    overwrite=True,
)
