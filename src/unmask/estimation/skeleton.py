"""The model of a recipe without its weights: its shape from config.json, its modules on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from unmask.bases import model_directory
from unmask.build import ModelConfig, supervised_base
from unmask.errors import DataError, ModelError
from unmask.estimation.memory_model import META, adapt
from unmask.models import MaskedPolicy, build_tiny, stored_dtype
from unmask.models.adapter_files import base_of, is_adapter
from unmask.models.adapters import TARGETS
from unmask.models.families import family_of
from unmask.models.files import one_line, read_json
from unmask.places import is_hub_id

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a number: 4 bits, one byte of scale for 64 numbers, one float32 for 256 scales."""


@dataclass(frozen=True)
class AdapterShape:
    """LoRA: rank, and the last parts of the names of the linears that get one."""

    rank: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Skeleton:
    """Numbers and bytes of a model, and the module to rehearse passes with."""

    module: nn.Module
    policy: MaskedPolicy | None
    """Renders and tokenises prompts; None without a tokenizer."""
    has_adapter: bool
    is_float32: bool
    num_parameters: int
    num_trained: int
    weight_bytes: int
    trained_bytes: int
    begun_from_bytes: int
    """Of the frozen copy of an adapter that the run begins with."""
    layer_bytes: int
    """Of the largest layer."""
    layer_trained_bytes: int
    outer_bytes: int
    """Of what is outside of the layers: embedding, head, last norm."""
    num_body: int
    """Numbers of all matrices that every token is multiplied with."""
    num_head: int

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def block_size(self) -> int | None:
        return getattr(self.config, "block_size", None)

    @property
    def attention_width(self) -> int:
        """A, heads times their width."""
        heads = int(self.config.num_attention_heads)
        return heads * int(getattr(self.config, "head_dim", None) or self.config.hidden_size // heads)

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one position in all layers."""
        config = self.config
        share = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        width = self.attention_width * share // int(config.num_attention_heads)
        return 2 * int(config.num_hidden_layers) * width * (4 if self.is_float32 else 2)

    def num_tokens(self, prompt: str | list[dict[str, str]]) -> int:
        """Of a prompt as the model reads it. Raises: DataError without a tokenizer."""
        if self.policy is None:
            raise DataError("the model's tokenizer is not at hand")
        return len(self.policy.encode(self.policy.render(prompt)))

    def forward_flops(self, tokens: float, pairs: float, wanted: float) -> float:
        """Of `tokens` that see each other in `pairs`, with logits at `wanted` of them."""
        attention = 4 * pairs * self.attention_width * int(self.config.num_hidden_layers)
        return 2 * self.num_body * tokens + attention + 2 * self.num_head * wanted

    def backward_flops(self, forward: float, tokens: float, is_checkpointed: bool) -> float:
        """After a forward of so many: gradients of activations, and of the weights that are trained."""
        weights = 2 * self.num_trained * tokens if self.has_adapter else forward
        return forward + weights + (forward if is_checkpointed else 0)


def open_skeleton(model: ModelConfig, config_file: Path | None = None) -> Skeleton:
    """The recipe's model, or one of the shape of `config_file`, ready to be rehearsed.

    Raises: ModelError if its config.json cannot be had or is of a family that cannot be rehearsed.
    """
    shape = AdapterShape(model.lora.rank, model.lora.names) if model.lora else None
    begins_with = None
    if config_file is None and (tiny := model.tiny or _tiny_base(model)):
        with META:
            policy: MaskedPolicy | None = build_tiny(tiny, seed=0)
        assert policy
        return measure(policy.module, policy, model, shape, None)
    source: str | Path = model_directory(model.path) if model.path else Path()
    for directory in (model.adapter, source):
        if directory and is_adapter(Path(directory)):
            begins_with = shape = _adapter_shape(Path(directory))
    if is_adapter(Path(source)):
        source = base_of(Path(source))
    content = read_json(config_file or _config_file(source))
    family = family_of(content, Path(source))
    if any(content.get(key) for key in ("num_experts", "n_routed_experts", "num_local_experts")):
        raise ModelError(
            f"{config_file or source}: a mixture of experts, whose routing cannot be rehearsed without weights. "
            "estimate knows dense models."
        )
    is_frozen = shape is not None or model.quantization != "none"
    dtype = _stored(content, Path(source)) if is_frozen else torch.float32
    if model.dtype != "auto":
        dtype = getattr(torch, model.dtype)
    attention = "eager" if model.attention == "eager" else family.attention("sdpa")
    config = family.config_class.from_dict(content)
    with META:
        module = family.model_class._from_config(config, dtype=dtype, attn_implementation=attention).eval()
    if config.mask_token_id is None:  # from the tokenizer otherwise; which one it is makes no difference here
        config.mask_token_id = 0
    module.cross_entropy = model.cross_entropy
    try:
        # with a config.json of its own, the estimate asks nothing of the hub
        tokenizer = family.tokenizer_class.from_pretrained(
            source, trust_remote_code=False, local_files_only=config_file is not None
        )
        policy = MaskedPolicy(module, tokenizer, str(source))
    except (OSError, ValueError):
        policy = None
    return measure(module, policy, model, shape, begins_with)


def measure(
    module: nn.Module,
    policy: MaskedPolicy | None,
    model: ModelConfig,
    shape: AdapterShape | None,
    begins_with: AdapterShape | None,
) -> Skeleton:
    """Put adapters on the module if it is to have some, and count."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    packed: set[int] = set()
    if model.quantization == "nf4":
        packed = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear) and m is not head}

    def size(parameters: Any) -> int:
        return int(sum(p.numel() * (NF4_BYTES if id(p) in packed else p.element_size()) for p in parameters))

    is_float32 = next(module.parameters()).dtype == torch.float32
    if shape:
        adapt(module, shape.rank, lambda name: name.rpartition(".")[2] in shape.names)
    every = list(module.parameters())
    trained = [p for p in every if p.requires_grad]
    layers = _layers(module)
    outside = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    return Skeleton(
        module=module,
        policy=policy,
        has_adapter=shape is not None,
        is_float32=is_float32,
        num_parameters=sum(p.numel() for p in every),
        num_trained=sum(p.numel() for p in trained),
        weight_bytes=size(every),
        trained_bytes=size(trained),
        begun_from_bytes=size(trained) if begins_with else 0,
        layer_bytes=max(size(layer.parameters()) for layer in layers),
        layer_trained_bytes=max(size(p for p in layer.parameters() if p.requires_grad) for layer in layers),
        outer_bytes=size(every) - sum(size(layer.parameters()) for layer in layers),
        num_body=sum(p.numel() for p in every if p.ndim > 1 and id(p) not in outside),
        num_head=head.weight.numel(),
    )


def _layers(module: nn.Module) -> list[nn.Module]:
    """The blocks of the model."""
    count = int(module.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return [*max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))]


def _tiny_base(model: ModelConfig) -> Any:
    """The shape of the supervised base that `model.recipe` names."""
    return supervised_base(Path(model.recipe), 0)[0].model.tiny if model.recipe else None


def _config_file(source: str | Path) -> Path:
    """config.json of a directory, or of a hub id: that file alone. Raises: ModelError."""
    if not is_hub_id(str(source)):
        return Path(source) / "config.json"
    try:
        return Path(hf_hub_download(str(source), "config.json"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{source}: its config.json is neither here nor to be had from the hub ({one_line(error)}). Name a copy of "
            "it with --config FILE."
        ) from error


def _stored(content: dict[str, Any], directory: Path) -> torch.dtype:
    """The type of the weights as stored: of those that are at hand, else as config.json says, else bfloat16."""
    if any(directory.glob("*.safetensors")):
        return stored_dtype(directory)
    name = str(content.get("dtype") or content.get("torch_dtype") or "bfloat16")
    return torch.float32 if "32" in name else torch.bfloat16


def _adapter_shape(directory: Path) -> AdapterShape:
    content = read_json(directory / "adapter_config.json")
    names = content.get("target_modules") or TARGETS["all"]
    return AdapterShape(int(content["r"]), tuple(name.rpartition(".")[2] for name in names))
