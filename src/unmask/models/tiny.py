"""The embedded model: a small bidirectional Llama with learned absolute positions instead of rotary ones.

Learned positions matter: with rotary embeddings the same network learns 4x4 Sudoku an order of magnitude more slowly,
because a cell's row, column and box are facts about its absolute place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel, LlamaRMSNorm

from unmask.errors import ConfigError
from unmask.models.heads import MaskedLMHead
from unmask.models.policy import MaskedPolicy

SPECIAL_TOKENS = (
    "<|pad|>", "<|eos|>", "<|mask|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>", "<|eot|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, after eight special tokens; anything else becomes <|unk|>."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *dict.fromkeys(alphabet)])}
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        mask_token="<|mask|>",
        unk_token="<|unk|>",
        extra_special_tokens=list(SPECIAL_TOKENS[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class TinyConfig(LlamaConfig):
    """Llama's fields, with defaults of the embedded Sudoku model; `max_position_embeddings` is a hard limit here."""

    model_type = "unmask_tiny"

    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 64
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    mask_token_id: int = 2
    is_causal: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = None  # otherwise Llama keeps the value of its own default width
        super().__post_init__(**kwargs)


class TinyAttention(nn.Module):
    """Bidirectional attention without rotary embedding; the attention function is transformers' choice."""

    is_causal = False
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, config: TinyConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, _ = attention(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        mixed = mixed.reshape(hidden.shape)
        return self.o_proj(mixed if positions is None else mixed[positions])


class TinyLayer(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU, each with a residual; with `positions`, at the wanted positions only."""

    def __init__(self, config: TinyConfig, layer_idx: int):
        super().__init__()
        self.self_attn = TinyAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(hidden), attention_mask, positions, cache)
        hidden = (hidden if positions is None else hidden[positions]) + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class TinyPreTrainedModel(LlamaPreTrainedModel):
    config_class = TinyConfig
    _no_split_modules = ("TinyLayer",)
    _can_record_outputs = None
    _supports_flash_attn = False
    _supports_flex_attn = False
    supports_gradient_checkpointing = True


class TinyModel(TinyPreTrainedModel):
    """Token plus position embeddings, layers, final norm."""

    def __init__(self, config: TinyConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([TinyLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> BaseModelOutput:
        """`last_hidden_state` is (b, T, H), or (N, H) at the wanted `positions` (b, T) bool. With a `WindowCache` the
        window is (b, T), and the attention mask is of the whole canvas all the same.

        Nothing reads the other positions of the last layer, so their output projection and MLP are not computed.
        """
        if position_ids is None:
            first = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()[:, None, None, :]
        for layer in self.layers[:-1]:
            hidden = layer(hidden, mask, None, cache)
        hidden = self.layers[-1](hidden, mask, positions, cache)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class TinyForMaskedLM(MaskedLMHead, TinyPreTrainedModel):
    """The embedded masked diffusion model; see `MaskedLMHead.forward`."""

    def __init__(self, config: TinyConfig):
        super().__init__(config)
        self.model = TinyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def select_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        positions: Tensor,
        past_key_values: Any = None,
    ) -> Tensor:
        return self.model(input_ids, attention_mask, position_ids, positions, past_key_values).last_hidden_state


@dataclass(frozen=True)
class TinyModelConfig:
    """A new embedded model, initialised from a seed."""

    alphabet: str = "0123456789|"
    """Characters that get a token each, behind eight special tokens."""
    hidden_size: int = 64
    """Width."""
    num_layers: int = 3
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads; must divide hidden_size."""
    intermediate_size: int = 192
    """Inner width of the SwiGLU."""
    max_length: int = 64
    """Positions, tokens; prompt and completion must fit."""
    init_std: float = 0.125
    """Standard deviation of the initial weights, 1/sqrt(width). With 0.02 Sudoku is learned later, and the habits of
    the supervised teacher hardly at all."""

    def __post_init__(self) -> None:
        for key in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.tiny.{key} = {getattr(self, key)}: must be at least 1. Try the default.")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.tiny.num_heads = {self.num_heads}: must divide model.tiny.hidden_size = {self.hidden_size}. "
                "Try 4."
            )
        if not (math.isfinite(self.init_std) and 0 < self.init_std <= 1):
            raise ConfigError(f"model.tiny.init_std = {self.init_std}: must be above 0 and at most 1. Try 0.125.")
        if not self.alphabet:
            raise ConfigError("model.tiny.alphabet = '': must name the characters of the task. Try '0123456789|'.")


def build_tiny(config: TinyModelConfig, *, seed: int) -> MaskedPolicy:
    """A new embedded model with a character tokenizer."""
    tokenizer = character_tokenizer(config.alphabet)
    fields = TinyConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_length,
        initializer_range=config.init_std,
    )
    # transformers initialises from the global generators; leave them as they were
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = TinyForMaskedLM(fields)
    return MaskedPolicy(model, tokenizer, name="embedded model")
