"""LoRA adapters on a loaded model: which one is active, and what may not be done while its gradient is pending.

PEFT does the adapting. Two orders of calls give wrong gradients there without a word: switching adapters between a
forward and its backward (with gradient checkpointing the recomputation uses the other adapter), and one backward of a
sum of losses of two adapters (switching clears `requires_grad` of the first). `Switch` refuses both.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import ConfigError, ModelError
from unmask.models.heads import MaskedLMHead
from unmask.optional import optional

TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    # the published d1 runs name Llama's seven on a model with other names: these four are found there
    "d1_compat": ("q_proj", "k_proj", "v_proj", "up_proj"),
}

POLICY = "default"
"""The adapter that is trained as the policy."""
REFERENCE = "reference"
"""A frozen copy of the adapter that a run started from."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, y = W x + (alpha / rank) B A x with B = 0 at first. Defaults: d1's and ESPO's.

    No dropout: rollouts and likelihoods are those of one model.
    """

    rank: int = 128
    """Rows of A, columns of B."""
    alpha: float = 64.0
    """Scale of the product, divided by rank."""
    targets: str | tuple[str, ...] = "all"
    """"all" (q, k, v, o, gate, up, down), "d1_compat" (q, k, v, up: what d1's list found in LLaDA), or names of linear
    layers."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"model.lora.rank = {self.rank}: must be at least 1. Try 128.")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"model.lora.alpha = {self.alpha}: must be above 0 and finite. Try 64.")
        if isinstance(self.targets, str) and self.targets not in TARGETS:
            raise ConfigError(
                f"model.lora.targets = {self.targets!r}: must be one of {', '.join(map(repr, TARGETS))}, or an array "
                "of names of linear layers."
            )
        if not self.targets:
            raise ConfigError("model.lora.targets = []: must name at least one linear layer. Try 'all'.")

    @property
    def names(self) -> tuple[str, ...]:
        """Last parts of the names of the layers that get adapters."""
        return TARGETS[self.targets] if isinstance(self.targets, str) else self.targets


class _Graph:
    """An autograd graph that was recorded under an adapter; dies with the graph."""

    def __init__(self, adapter: str | None):
        self.adapter, self.is_done = adapter, False


class Switch:
    """The adapters of one PEFT model. `active` is the one in use, None with all of them off."""

    def __init__(self, module: Any):
        self.module = module
        self.active: str | None = POLICY
        self.trained: set[str] = {POLICY}
        self._graphs: list[weakref.ref[_Graph]] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.module.peft_config)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """The adapter of this name, or none, is active in the block.

        One adapter stays active from its forward to the end of its backward. Frozen ones may be used in between,
        without gradient, if the block is left before the backward.

        Raises: ModelError for an unknown name, on entering if another adapter's backward is still to come, on leaving
            if this one's is.
        """
        if name is not None and name not in self.names:
            raise ModelError(f"no adapter {name!r} on this model. It has: {', '.join(self.names)}.")
        before = self.active
        if torch.is_grad_enabled() and name in self.trained:
            self._require_no_graph(lambda graph: graph.adapter != name, f"cannot switch to adapter {name!r}")
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)
        if name != before:
            self._require_no_graph(lambda graph: graph.adapter == name, f"left adapter {name!r}")

    def activate(self, name: str | None) -> None:
        """Set the active adapter; every trained adapter keeps its `requires_grad`, which PEFT would clear."""
        if name is None:
            self.module.base_model.disable_adapter_layers()
        else:
            self.module.base_model.enable_adapter_layers()
            self.module.set_adapter(name)
        self.active = name
        for adapter in self.names:
            for _, parameter in adapter_parameters(self.module, adapter):
                parameter.requires_grad_(adapter in self.trained)

    @torch.no_grad()
    def add_frozen_copy(self, source: str, name: str) -> None:
        """A second adapter with the values that `source` has now, never trained; what is active stays so."""
        self.module.add_adapter(name, copy.deepcopy(self.module.peft_config[source]))
        values = {
            key.replace(f".{source}.", f".{name}."): value for key, value in adapter_parameters(self.module, source)
        }
        for key, parameter in adapter_parameters(self.module, name):
            parameter.copy_(values[key])
        self.module.eval()
        self.activate(self.active)

    def watch(self, outputs: Mapping[str, Tensor]) -> None:
        """Remember the graph behind these outputs until its backward, which checks that the same adapter is active."""
        graph = _Graph(self.active)
        for value in outputs.values():
            if value.requires_grad:
                value.register_hook(lambda grad, graph=graph: self._begin_backward(graph))
        # held by the hooks alone: a graph that is thrown away without a backward is pending no longer
        self._graphs = [ref for ref in self._graphs if (alive := ref()) is not None and not alive.is_done]
        self._graphs.append(weakref.ref(graph))

    def _begin_backward(self, graph: _Graph) -> None:
        graph.is_done = True
        if graph.adapter != self.active:
            raise ModelError(
                f"backward through adapter {graph.adapter!r} while {self.active!r} is active, which gives wrong "
                "gradients. Call backward inside the block that made the forward, one adapter at a time."
            )

    def _require_no_graph(self, is_wrong: Any, what: str) -> None:
        for ref in self._graphs:
            graph = ref()
            if graph is not None and not graph.is_done and is_wrong(graph):
                raise ModelError(
                    f"{what} while the backward of adapter {graph.adapter!r} is still to come, which gives wrong "
                    "gradients. Call backward first, or make the forward under torch.no_grad()."
                )


def adapter_parameters(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of one adapter and of its scalar head."""
    for key, parameter in module.named_parameters():
        parts = key.split(".")
        owners = [after for part, after in pairwise(parts) if part.startswith("lora_") or part == "scalar_heads"]
        if owners == [name]:
            yield key, parameter


def wrap(model: Any, config: LoraConfig, *, seed: int) -> Any:
    """The model behind a PEFT model with the adapter `default`; the base is frozen.

    Raises: ConfigError if peft is missing, or a target is no linear layer of the model.
    """
    peft = optional("peft", "peft")
    _check_targets(model, config.names)
    with adapting(seed):
        wrapped = peft.get_peft_model(model, _peft_config(config), adapter_name=POLICY)
    return wrapped.eval()


def add(switch: Switch, name: str, config: LoraConfig, *, seed: int, is_trained: bool, has_scalar_head: bool) -> None:
    """Another adapter, with a scalar head (H -> 1, float32, zero at first) if wanted; what is active stays so."""
    if name in switch.names or not name.isidentifier():
        raise ModelError(f"adapter {name!r}: must be a new name of letters, digits and underscores. Choose another.")
    if has_scalar_head and not isinstance(switch.module.get_base_model(), MaskedLMHead):
        raise ModelError(f"adapter {name!r}: this family has no scalar heads; those of unmask's own classes have.")
    _check_targets(switch.module.get_base_model(), config.names)
    with adapting(seed):
        switch.module.add_adapter(name, _peft_config(config))
    if has_scalar_head:
        add_scalar_head(switch.module.get_base_model(), name)
    if is_trained:
        switch.trained.add(name)
    switch.module.eval()
    switch.activate(switch.active)


def add_scalar_head(base: Any, name: str) -> None:
    """H -> 1 in float32 or wider, zero at first."""
    if not hasattr(base, "scalar_heads"):
        base.scalar_heads = nn.ModuleDict()
    weight = base.get_output_embeddings().weight
    dtype = torch.promote_types(weight.dtype if weight.is_floating_point() else torch.float32, torch.float32)
    head = nn.Linear(base.config.hidden_size, 1, dtype=dtype, device=weight.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    base.scalar_heads[name] = head


def _peft_config(config: LoraConfig) -> Any:
    return optional("peft", "peft").LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.names), lora_dropout=0.0, bias="none"
    )


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Raises: ConfigError unless every target is the last part of a linear layer's name."""
    layers = [key.removesuffix(".base_layer") for key, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    found = {key.rsplit(".", 1)[-1] for key in layers if ".lora_" not in key and "scalar_heads" not in key}
    if missing := sorted(set(targets) - found):
        raise ConfigError(
            f"model.lora.targets: no linear layer {missing[0]!r} in this model. It has: {', '.join(sorted(found))}."
        )


@contextmanager
def adapting(seed: int = 0) -> Iterator[None]:
    """PEFT initialises from the global generators, which are left as they were, and reads names that are deprecated."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        yield
