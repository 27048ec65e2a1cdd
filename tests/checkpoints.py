"""Tiny random checkpoints in the authors' own format: config keys, tensor names, shards and tokenizer files.

A second source for the tests of the model families: nothing here uses the package under test or a transformers model.
`write_checkpoint` writes a directory as the authors published theirs, `CONFIGS` holds the tiny configurations with the
authors' keys, `PUBLISHED` the geometry of the released models, and `tensor_shapes` names every tensor of either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
"""One printable symbol for each of the 256 bytes: every text has tokens, one for each ASCII character."""

SPECIAL = {
    "llada": (
        *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Dream": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
    "sdar": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"),
    "llada2_moe": ("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mask|>", "<|role_end|>"),
}
"""Special tokens by model_type, in the order of their ids, which follow the 256 bytes."""

_IM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    # the assistant's header is appended whatever add_generation_prompt says, as in the released file
    "llada": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "Dream": _IM_TEMPLATE,
    "sdar": _IM_TEMPLATE,
    "llada2_moe": "{% for m in messages %}<role>{{ 'HUMAN' if m['role'] == 'user' else m['role'] | upper }}</role>"
    "{{ m['content'] }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}",
}

TOKENIZER_FIELDS: dict[str, dict[str, Any]] = {
    "llada": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
    },
    "Dream": {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "add_prefix_space": False,
        "add_bos_token": False,
        "errors": "replace",
        "unk_token": None,
    },
    "sdar": {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "errors": "replace",
        "unk_token": None,
    },
    "llada2_moe": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
    },
}


def token_id(family: str, token: str) -> int:
    """Id of a special token, or of one ASCII character."""
    return len(BYTES) + SPECIAL[family].index(token) if token in SPECIAL[family] else _byte_id(token)


def _byte_id(character: str) -> int:
    """The byte-level alphabet shows printable ASCII as itself and moves the rest up by 256: a space is chr(288)."""
    return BYTES.index(character if "!" <= character <= "~" else chr(256 + ord(character)))


def _auto_map(stem: str, config: str, model: str) -> dict[str, str]:
    auto = {"AutoConfig": f"configuration_{stem}.{config}"}
    return auto | {name: f"modeling_{stem}.{model}" for name in ("AutoModel", "AutoModelForCausalLM")}


_LLADA: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": _auto_map("llada", "LLaDAConfig", "LLaDAModelLM"),
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 272,
    "eos_token_id": token_id("llada", "<|endoftext|>"),
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": token_id("llada", "<|mdm_mask|>"),
    "max_sequence_length": 4096,
    "mlp_hidden_size": 80,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 3,
    "pad_token_id": token_id("llada", "<|endoftext|>"),
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 272,
    "weight_tying": False,
}

_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 4096,
    "max_window_layers": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 272,
}

_DREAM: dict[str, Any] = {
    **_QWEN,
    "architectures": ["DreamModel"],
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "bos_token_id": token_id("Dream", "<|endoftext|>"),
    "eos_token_id": token_id("Dream", "<|endoftext|>"),
    "mask_token_id": token_id("Dream", "<|mask|>"),
    "model_type": "Dream",
    "pad_token_id": token_id("Dream", "<|endoftext|>"),
    "use_mrope": False,
}

_SDAR: dict[str, Any] = {
    **_QWEN,
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "auto_map": _auto_map("sdar", "SDARConfig", "SDARForCausalLM"),
    "block_size": 4,
    "bos_token_id": token_id("sdar", "<|endoftext|>"),
    "eos_token_id": token_id("sdar", "<|endoftext|>"),
    "fuse_cross_entropy": True,
    "head_dim": 16,  # heads times head_dim is wider than hidden_size, as in the 4B model
    "mask_token_id": token_id("sdar", "<|MASK|>"),
    "model_type": "sdar",
    "pad_token_id": token_id("sdar", "<|endoftext|>"),
}

_LLADA2: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": _auto_map("llada2_moe", "LLaDA2MoeConfig", "LLaDA2MoeModelLM"),
    "dtype": "bfloat16",
    "embedding_dropout": 0.0,
    "eos_token_id": token_id("llada2_moe", "<|endoftext|>"),
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "mask_token_id": token_id("llada2_moe", "<|mask|>"),  # left out in the released file, whose tokens are known
    "max_position_embeddings": 4096,
    "max_window_layers": 3,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": token_id("llada2_moe", "<|endoftext|>"),
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "transformers_version": "4.57.1",
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "vocab_size": 272,
}

CONFIGS: dict[str, dict[str, Any]] = {"llada": _LLADA, "Dream": _DREAM, "sdar": _SDAR, "llada2_moe": _LLADA2}
"""The tiny config.json of each model_type, every key as the authors write it."""

# Qwen3-4B's and Qwen2.5-7B's geometry under the names SDAR and Dream; embeddings untied
_SDAR_4B: dict[str, Any] = {
    **_SDAR,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "eos_token_id": 151643,
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "mask_token_id": 151669,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "LLaDA-8B-Instruct": {
        **_LLADA,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
        "mask_token_id": 126336,
    },
    "Dream-v0-Instruct-7B": {
        **_DREAM,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
        "mask_token_id": 151666,
    },
    "SDAR-4B-Chat": _SDAR_4B,
    "SDAR-8B-Chat": {**_SDAR_4B, "hidden_size": 4096, "intermediate_size": 12288},
    "LLaDA2.1-mini": {
        **{key: value for key, value in _LLADA2.items() if key not in ("mask_token_id", "eos_token_id")},
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 20,
        "max_window_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 157184,
        "max_position_embeddings": 32768,
        "pad_token_id": 156892,
    },
}
"""config.json of the released models, of which only the shape matters here."""

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of the authors' checkpoint by its name."""
    return {"llada": _llada_shapes, "llada2_moe": _llada2_shapes}.get(config["model_type"], _qwen_shapes)(config)


def _llada_shapes(c: Mapping[str, Any]) -> Shapes:
    d, inner = c["d_model"], c["mlp_hidden_size"] or c["mlp_ratio"] * c["d_model"]
    kv_heads = c["n_kv_heads"] or (1 if c["multi_query_attention"] else c["n_heads"])
    kv = d // c["n_heads"] * kv_heads
    rows = c["embedding_size"] or c["vocab_size"]
    shapes: Shapes = {"model.transformer.wte.weight": (rows, d), "model.transformer.ln_f.weight": (d,)}
    if not c["weight_tying"]:
        shapes["model.transformer.ff_out.weight"] = (rows, d)
    for i in range(c["n_layers"]):
        parts = {"attn_norm": (d,), "ff_norm": (d,), "q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d)}
        parts |= {"attn_out": (d, d), "ff_proj": (inner, d), "up_proj": (inner, d), "ff_out": (d, inner)}
        shapes |= {f"model.transformer.blocks.{i}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def _swiglu(prefix: str, d: int, inner: int) -> Shapes:
    parts = {"gate_proj": (inner, d), "up_proj": (inner, d), "down_proj": (d, inner)}
    return {f"{prefix}.{name}.weight": shape for name, shape in parts.items()}


def _qwen_shapes(c: Mapping[str, Any]) -> Shapes:
    """Dream has Qwen2's tensors (biases on q, k, v), SDAR has Qwen3's (a norm of each head's q and k)."""
    d, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    head = c.get("head_dim") or d // heads
    rows = {"q_proj": heads * head, "k_proj": kv_heads * head, "v_proj": kv_heads * head}
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        shapes |= {f"{layer}.input_layernorm.weight": (d,), f"{layer}.post_attention_layernorm.weight": (d,)}
        shapes |= {f"{attention}.{name}.weight": (width, d) for name, width in rows.items()}
        shapes[f"{attention}.o_proj.weight"] = (d, heads * head)
        if c["model_type"] == "Dream":
            shapes |= {f"{attention}.{name}.bias": (width,) for name, width in rows.items()}
        else:
            shapes |= {f"{attention}.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        shapes |= _swiglu(f"{layer}.mlp", d, c["intermediate_size"])
    return shapes


def _llada2_shapes(c: Mapping[str, Any]) -> Shapes:
    d, heads, kv_heads, head = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    inner, experts = c["moe_intermediate_size"], c["num_experts"]
    shapes: Shapes = {
        "model.word_embeddings.weight": (c["vocab_size"], d),
        "model.norm.weight": (d,),
        "lm_head.weight": (c["vocab_size"], d),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (d,), f"{layer}.post_attention_layernorm.weight": (d,)}
        shapes[f"{layer}.attention.query_key_value.weight"] = ((heads + 2 * kv_heads) * head, d)
        shapes[f"{layer}.attention.dense.weight"] = (d, heads * head)
        shapes |= {f"{layer}.attention.{name}_layernorm.weight": (head,) for name in ("query", "key")}
        if i < c["first_k_dense_replace"]:
            shapes |= _swiglu(f"{layer}.mlp", d, c["intermediate_size"])
            continue
        shapes |= {f"{layer}.mlp.gate.weight": (experts, d), f"{layer}.mlp.gate.expert_bias": (experts,)}
        for expert in range(experts):
            shapes |= _swiglu(f"{layer}.mlp.experts.{expert}", d, inner)
        shapes |= _swiglu(f"{layer}.mlp.shared_experts", d, inner * c["num_shared_experts"])
    return shapes


def random_tensors(shapes: Shapes, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Values that keep the activations near 1: every part of the network moves the logits.

    The router's selection bias stays float32 in every dtype, and is as large as the scores it is added to.
    """
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=rng, dtype=torch.float64)
        if name.endswith("expert_bias"):
            tensors[name] = (0.3 * noise).float()
        elif name.endswith("bias"):
            tensors[name] = (0.5 * noise).to(dtype)
        elif len(shape) == 1:
            tensors[name] = (1 + 0.2 * noise).to(dtype)
        elif "wte" in name or "embed" in name:
            tensors[name] = (0.25 * noise).to(dtype)  # logits near 1 where the head is tied to it
        else:
            tensors[name] = (noise * shape[-1] ** -0.5).to(dtype)
    return tensors


def write_checkpoint(
    family: str,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 3,
    **config: Any,
) -> Path:
    """Write a checkpoint of a model_type of `CONFIGS`; `config` replaces keys of its config.json, `...` removes them.

    `num_shards = 1` writes one model.safetensors, more write shards and their index. Equal seeds give equal bytes.

        write_checkpoint("llada", path, n_kv_heads=2, weight_tying=True, vocab_size=264, auto_map=...)
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in CONFIGS[family]}
    fields = {key: value for key, value in (CONFIGS[family] | named | config).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    write_tensors(directory, random_tensors(tensor_shapes(fields), seed=seed, dtype=dtype), num_shards)
    write_tokenizer(family, directory)
    return directory


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], num_shards: int = 3) -> None:
    """Safetensors as published: one file, or shards of consecutive tensors with an index."""
    if num_shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = names[len(names) * shard // num_shards : len(names) * (shard + 1) // num_shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tokenizer(family: str, directory: Path) -> None:
    """Byte-level BPE without merges: as tokenizer.json, or as Qwen2's vocab.json and merges.txt (Dream, SDAR)."""
    vocab = {symbol: i for i, symbol in enumerate(BYTES)}
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL[family]]
    if "Qwen2" in TOKENIZER_FIELDS[family]["tokenizer_class"] or family == "Dream":
        (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    else:
        core = Tokenizer(models.BPE(vocab, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(special)
        core.save(str(directory / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    fields = {
        "added_tokens_decoder": {str(token_id(family, t)): {"content": t, **flags} for t in SPECIAL[family]},
        "additional_special_tokens": [t for t in SPECIAL[family] if t not in TOKENIZER_FIELDS[family].values()],
        "chat_template": TEMPLATES[family],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        **TOKENIZER_FIELDS[family],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
