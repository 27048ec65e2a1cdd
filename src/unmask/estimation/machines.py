"""Devices that a run may be planned for, and what is assumed about them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from unmask.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One device. Memory as its driver reports it; dense rates without sparsity, float32 without TF32."""

    memory: float  # GiB
    bf16: float  # FLOP/s
    float32: float  # FLOP/s
    is_gpu: bool = True

    @property
    def usable(self) -> float:
        """GiB for tensors. A GPU keeps 0.8 for its context and kernels; 6 % go to gaps between tensors."""
        return self.memory * 0.94 - 0.8 if self.is_gpu else self.memory * 0.94


MACHINES = {
    "h100": Machine(79.6, 989e12, 67e12),
    "h200": Machine(139.8, 989e12, 67e12),
    "b200": Machine(178.4, 2250e12, 75e12),
    "a100-80": Machine(79.3, 312e12, 19.5e12),
    "a100-40": Machine(39.4, 312e12, 19.5e12),
    "l40s": Machine(44.5, 362e12, 91.6e12),
    "rtx4090": Machine(23.6, 165e12, 82.6e12),
}
"""From the makers' data sheets (SXM where there are several)."""

UTILISATION = {"collect": 0.30, "score": 0.45, "update": 0.40, "evaluate": 0.30}
"""Share of the peak rate that a phase is taken to reach. Assumptions, not measurements."""


@dataclass(frozen=True)
class Setting:
    """Where the run is to be made, and what is assumed about it."""

    machine: str = "cpu"
    num_gpus: int = 1
    is_sharded: bool = False
    """FSDP2: weights, gradients and optimiser are divided. Otherwise every device holds all of them (DDP)."""
    prompt_tokens: int | None = None
    utilisation: Mapping[str, float] = field(default_factory=lambda: dict(UTILISATION))
    config: Path | None = None
    """A config.json in place of the model's."""

    def __post_init__(self) -> None:
        if self.machine != "cpu" and self.machine not in MACHINES:
            known = ", ".join(["cpu", *MACHINES])
            raise ConfigError(f"--gpu {self.machine}: unknown. Known: {known}.")
        for name, value in (("--num-gpus", self.num_gpus), ("--prompt-tokens", self.prompt_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1. Try {1 if 'gpus' in name else 200}.")
        if self.is_sharded and self.num_gpus == 1:
            raise ConfigError("--shard: one device has nothing to share. Add --num-gpus 8, or drop it.")


def this_machine() -> Machine:
    """Memory of this computer, and the rate of a float32 matrix product as measured in a quarter of a second."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    a = torch.full((512, 512), 0.5)
    a @ a
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.25:
        a @ a
        count += 1
    rate = count * 2 * 512**3 / (time.perf_counter() - started)
    return Machine(memory, bf16=rate, float32=rate, is_gpu=False)
