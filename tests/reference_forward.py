"""Plain forwards of the model families, from the architecture's description, on tensors by the authors' names.

A second source: no transformers, no code of the package under test. `reference_logits(config, tensors, ids)` takes the
dict of config.json and the tensors as they stand on disk. Common to all: pre-norm residual blocks, RMSNorm, rotary
positions on halves (i with i + n/2), SwiGLU, an attention mask that hides pads as keys. Positions count the real tokens
before. `dtype` is that of the whole computation; norms, rotation and router work in float32 at least.

    llada       Llama's block without causal mask; ff_proj is under the SiLU, up_proj is not
    Dream       Qwen2's block (q, k, v with biases) without causal mask; the hidden state of token i-1 predicts token i,
                that of the first column predicts itself too
    sdar        Qwen3's block (RMSNorm of each head's q and k before the rotation); a token sees its block and the
                blocks before, counted from the first real token
    llada2_moe  as sdar; fused q, k, v; only the first part of each head is rotated; after the first dense layers a
                mixture of experts: scores sigmoid(x Wᵀ), chosen by score + bias within the best groups (a group's rank
                is the sum of its two best), weighted by score / sum · factor, plus a shared expert
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

Weights = Callable[[str], Tensor]


def reference_logits(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    block_size: int | None = None,
    rotate_in: torch.dtype = torch.float32,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Logits (b, T, V) about the token of each column; rows of pads hold numbers without meaning.

    `block_size` replaces that of the config. `rotate_in` is the lowest precision of the rotation. `attend(q, k, v,
    attn_mask=)` replaces the plain softmax, to compare low precision bit by bit.
    """

    def weight(name: str) -> Tensor:
        return tensors[name].to(dtype)

    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    positions = (real.cumsum(-1) - 1).clamp_min(0)  # (b, T)
    visible = real[:, None, None, :]  # (b, 1, T queries, T keys) once broadcast
    family = config["model_type"]
    if family in ("sdar", "llada2_moe"):
        blocks = positions // (block_size or config["block_size"])
        visible = visible & (blocks[:, None, :, None] >= blocks[:, None, None, :])
    mask = None if attention_mask is None and visible.all() else visible
    rotate = _rotation(config, positions, rotate_in, dtype)
    hidden = {"llada": _llada, "llada2_moe": _llada2}.get(family, _qwen)(
        config, weight, ids, lambda q, k, v: (attend or softmax_attention)(rotate(q), rotate(k), v, attn_mask=mask)
    )
    if family == "Dream":
        hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
    head, embeddings = {
        "llada": ("model.transformer.ff_out.weight", "model.transformer.wte.weight"),
        "llada2_moe": ("lm_head.weight", "model.word_embeddings.weight"),
    }.get(family, ("lm_head.weight", "model.embed_tokens.weight"))
    return linear(hidden, weight(head if head in tensors else embeddings))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √n) v over the visible keys; (b, heads, T, n) each, mask broadcast to (b, heads, T, T)."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if attn_mask is not None:  # a pad may see no key at all: a finite number keeps its row finite
        scores = scores.masked_fill(~attn_mask, -1e30)
    return scores.softmax(-1) @ v


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps), in float32 at least, then times the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotation(
    config: Mapping[str, Any], positions: Tensor, rotate_in: torch.dtype, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Turns the pairs (i, i + n/2) of the first n entries of each head by position · theta^(-2i/n)."""
    heads = config["n_heads"] if "n_heads" in config else config["num_attention_heads"]
    width = config["d_model"] if "d_model" in config else config["hidden_size"]
    turned = int((config.get("head_dim") or width // heads) * config.get("partial_rotary_factor", 1.0))
    # as the authors do it in float32: the angles of float64 differ by 1e-7 radians
    frequency = 1.0 / config["rope_theta"] ** (torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    angles = positions[:, None, :, None] * frequency  # (b, 1, T, n/2)
    inner = torch.promote_types(dtype, rotate_in)
    cos, sin = angles.cos().to(inner), angles.sin().to(inner)

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., : turned // 2].to(inner), x[..., turned // 2 : turned].to(inner)
        return torch.cat([(a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype), x[..., turned:]], dim=-1)

    return rotate


def _split_heads(x: Tensor, head: int) -> Tensor:
    return x.unflatten(-1, (-1, head)).transpose(1, 2)  # (b, T, heads · n) -> (b, heads, T, n)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _shared(x: Tensor, heads: int) -> Tensor:
    """Each key/value head serves the consecutive query heads of its group."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _swiglu(x: Tensor, weight: Weights, prefix: str) -> Tensor:
    gated = silu(linear(x, weight(f"{prefix}.gate_proj.weight"))) * linear(x, weight(f"{prefix}.up_proj.weight"))
    return linear(gated, weight(f"{prefix}.down_proj.weight"))


def _llada(config: Mapping[str, Any], weight: Weights, ids: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    heads, eps = config["n_heads"], config["rms_norm_eps"]
    head = config["d_model"] // heads
    x = weight("model.transformer.wte.weight")[ids]
    for i in range(config["n_layers"]):

        def part(name: str, i: int = i) -> Tensor:
            return weight(f"model.transformer.blocks.{i}.{name}.weight")

        y = rms_norm(x, part("attn_norm"), eps)
        q, k, v = (_split_heads(linear(y, part(f"{name}_proj")), head) for name in "qkv")
        x = x + linear(_merge_heads(attend(q, _shared(k, heads), _shared(v, heads))), part("attn_out"))
        y = rms_norm(x, part("ff_norm"), eps)
        x = x + linear(silu(linear(y, part("ff_proj"))) * linear(y, part("up_proj")), part("ff_out"))
    return rms_norm(x, weight("model.transformer.ln_f.weight"), eps)


def _qwen(config: Mapping[str, Any], weight: Weights, ids: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    has_bias = config["model_type"] == "Dream"
    x = weight("model.embed_tokens.weight")[ids]
    for i in range(config["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        y = rms_norm(x, weight(f"{layer}.input_layernorm.weight"), eps)
        q, k, v = (
            _split_heads(
                linear(
                    y,
                    weight(f"{attention}.{name}_proj.weight"),
                    weight(f"{attention}.{name}_proj.bias") if has_bias else None,
                ),
                head,
            )
            for name in "qkv"
        )
        if not has_bias:
            q, k = (
                rms_norm(z, weight(f"{attention}.{name}_norm.weight"), eps)
                for z, name in zip((q, k), "qk", strict=True)
            )
        y = _merge_heads(attend(q, _shared(k, heads), _shared(v, heads)))
        x = x + linear(y, weight(f"{attention}.o_proj.weight"))
        x = x + _swiglu(rms_norm(x, weight(f"{layer}.post_attention_layernorm.weight"), eps), weight, f"{layer}.mlp")
    return rms_norm(x, weight("model.norm.weight"), eps)


def _llada2(config: Mapping[str, Any], weight: Weights, ids: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    heads, kv_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps = config["rms_norm_eps"]
    x = weight("model.word_embeddings.weight")[ids]
    for i in range(config["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.attention"
        y = rms_norm(x, weight(f"{layer}.input_layernorm.weight"), eps)
        fused = _split_heads(linear(y, weight(f"{attention}.query_key_value.weight")), head)
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        q = rms_norm(q, weight(f"{attention}.query_layernorm.weight"), eps)
        k = rms_norm(k, weight(f"{attention}.key_layernorm.weight"), eps)
        y = _merge_heads(attend(q, _shared(k, heads), _shared(v, heads)))
        x = x + linear(y, weight(f"{attention}.dense.weight"))
        y = rms_norm(x, weight(f"{layer}.post_attention_layernorm.weight"), eps)
        is_dense = i < config["first_k_dense_replace"]
        x = x + (_swiglu(y, weight, f"{layer}.mlp") if is_dense else _experts(config, weight, f"{layer}.mlp", y))
    return rms_norm(x, weight("model.norm.weight"), eps)


def _experts(config: Mapping[str, Any], weight: Weights, prefix: str, x: Tensor) -> Tensor:
    """The shared expert and the chosen ones."""
    scores = linear(x, weight(f"{prefix}.gate.weight")).sigmoid()  # (b, T, experts)
    biased = scores + weight(f"{prefix}.gate.expert_bias")
    groups = biased.unflatten(-1, (config["n_group"], -1))  # (b, T, groups, experts of a group)
    rank = groups.sort(descending=True).values[..., :2].sum(-1)
    best_groups = rank.argsort(descending=True)[..., : config["topk_group"]]
    left_out = torch.ones_like(rank, dtype=torch.bool).scatter(-1, best_groups, False)
    allowed = groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
    chosen = allowed.argsort(descending=True)[..., : config["num_experts_per_tok"]]
    share = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
    share = share / share.sum(-1, keepdim=True) * config["routed_scaling_factor"]
    out = _swiglu(x, weight, f"{prefix}.shared_experts")
    for expert in range(config["num_experts"]):
        out = out + share[..., expert : expert + 1] * _swiglu(x, weight, f"{prefix}.experts.{expert}")
    return out
