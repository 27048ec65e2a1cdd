"""The LLaDA-8B shape with random weights in bfloat16: model, FLOPs, and the matmul ceiling of the same run.

FLOPs are those that the mathematics needs, two for each multiplication and addition of a matrix product:

    forward     2 N D  in the layers (N weights, D positions) + 4 T H D  per layer in attention (T positions, width H)
                + 2 V H S  in the head (S scored positions)
    backward    4 N D + 8 T H D + 4 V H S  if all weights are trained; with a frozen base half of the first and last,
                and 4 M D for the adapters' M weights beside their 2 M D forward

Recomputation (gradient checkpointing, chunks of the head) is work without being counted, so it lowers the share.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import Geometry, Stopwatch, machine, markdown_table
from torch import nn

from unmask.models import MaskedPolicy
from unmask.models.llada import LLaDAConfig, LLaDAForMaskedLM

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Shape:
    """A model, and the work that is measured on it."""

    geometry: Geometry
    """Prompt, new tokens, steps and block; `vocab` bounds random text, below all special tokens."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of LLaDAConfig that differ from LLaDA-8B's."""
    sampler_batches: tuple[int, ...] = (1, 8, 16)
    """Sequences sampled at once."""
    copies: int = 8
    """Masked copies in one micro-batch of scoring."""
    lora_rank: int = 128
    matmul: int = 8192
    """Rows and columns of the square matrices whose product is the ceiling."""


_SPECIAL = {"mask_token_id": 2, "pad_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 64}
_NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPES = {
    "llada-8b": Shape(Geometry(vocab=126_080, prompt=200, tokens=256, steps=128, block=32)),
    "tiny": Shape(
        Geometry(vocab=97, prompt=5, tokens=8, steps=4, block=4),
        config={"vocab_size": 97, **_NARROW, **_SPECIAL},
        sampler_batches=(1, 2),
        copies=2,
        lora_rank=4,
        matmul=64,
    ),
}


def add_options(parser: argparse.ArgumentParser, *more: str) -> None:
    parser.add_argument("--section", choices=("all", "comparison", *more, "shape"), default="all", help="what to run")
    parser.add_argument("--shape-repeats", type=int, default=3, help="timed runs of each row of the second section")
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="llada-8b", help="of the second section; tiny: any device"
    )


def shape_device(name: str) -> torch.device | None:
    """The accelerator; without one, the CPU for the tiny shape and nothing for the other."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu") if name == "tiny" else None


def build_policy(shape: Shape, device: torch.device, *, seed: int) -> MaskedPolicy:
    """Built on the device in bfloat16: no copy in float32, none on the host. It has no tokenizer."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        module = LLaDAForMaskedLM._from_config(LLaDAConfig(**shape.config), dtype=torch.bfloat16)
    return MaskedPolicy(module, tokenizer=None)


@dataclass(frozen=True)
class Work:
    """Positions that one measurement passes through the model; the formulas stand at the top of the file."""

    positions: int
    """D, in the layers."""
    length: int
    """T, of one sequence."""
    scored: int
    """S, in the head."""

    def forward(self, module: nn.Module) -> float:
        layers, head, attention, adapters = self._parts(module)
        return layers + adapters + head + attention

    def with_backward(self, module: nn.Module) -> float:
        layers, head, attention, adapters = self._parts(module)
        is_frozen = adapters > 0
        return (2 if is_frozen else 3) * (layers + head) + 3 * (attention + adapters)

    def _parts(self, module: nn.Module) -> tuple[float, float, float, float]:
        """Forward FLOPs of the base's layers, the head, attention, and the adapters."""
        matrices = {name: p.numel() for name, p in module.named_parameters() if p.dim() == 2 and "embed" not in name}
        adapters = sum(size for name, size in matrices.items() if "lora_" in name)
        head = sum(size for name, size in matrices.items() if "lm_head" in name)
        layers = sum(matrices.values()) - adapters - head
        config: Any = module.config
        attention = 4.0 * self.length * config.hidden_size * self.positions * config.num_hidden_layers
        return 2.0 * layers * self.positions, 2.0 * head * self.scored, attention, 2.0 * adapters * self.positions


@dataclass(frozen=True)
class Measured:
    """Best of several runs."""

    seconds: float
    peak_gib: float | None
    """The allocator's peak, weights included; None without an accelerator."""


def measure(function: Callable[[], Any], device: torch.device, *, repeats: int) -> Measured | None:
    """One run to warm up, then the best of `repeats`. None if the device's memory does not suffice."""
    try:
        function()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        watches = [Stopwatch(device) for _ in range(repeats)]
        for watch in watches:
            watch.time(function)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return Measured(min(watch.total.wall for watch in watches), peak)


def matmul_ceiling(shape: Shape, device: torch.device) -> float:
    """FLOP/s of one large bfloat16 product, best of ten."""
    a, b = (torch.randn(shape.matmul, shape.matmul, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = measure(partial(torch.mm, a, b), device, repeats=10)
    assert best is not None, "three matrices of the ceiling do not fit"
    return 2.0 * shape.matmul**3 / best.seconds


def cells(measured: Measured | None, tokens: int, flops: float, ceiling: float, *, scale: float = 1.0) -> list[str]:
    """Seconds, tokens/s, peak GiB, share of the ceiling; `scale` extrapolates time, tokens are those of the whole."""
    if measured is None:
        return ["out of memory"] * 4
    peak = "not measured" if measured.peak_gib is None else f"{measured.peak_gib:.1f}"
    seconds = measured.seconds * scale
    return [f"{seconds:.3g}", f"{tokens / seconds:,.0f}", peak, f"{flops / measured.seconds / ceiling:.1%}"]


HEAD = ("seconds", "tokens/s", "peak, GiB", "share of the ceiling")


def table(labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows without measured cells get "not measured"."""
    width = len(labels) + len(HEAD)
    return markdown_table([*labels, *HEAD], [[*row, *[NOT_MEASURED] * (width - len(row))] for row in rows])


def heading(name: str, device: torch.device | None, ceiling: float | None) -> str:
    """What was measured, on what."""
    geometry = dataclasses.asdict(SHAPES[name].geometry)
    sizes = ", ".join(f"{key} {geometry[key]}" for key in ("prompt", "tokens", "steps", "block"))
    where = f"{NOT_MEASURED} (no accelerator)" if device is None else machine(device)
    found = (
        "" if ceiling is None else f", ceiling {ceiling / 1e12:.3g} TFLOP/s (bfloat16 product, {SHAPES[name].matmul}³)"
    )
    return f"Shape {name}, random bfloat16 weights, {sizes}{found}\n\n{where}"
