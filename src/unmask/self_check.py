"""The main job in small: a new embedded model makes one update. Run as `python -m unmask.self_check`, prints JSON.

A process of its own, because a broken torch may crash or hang the interpreter that imports it.
"""

from __future__ import annotations

import json
import time

import torch
from accelerate import Accelerator

from unmask.models import TinyModelConfig, build_tiny
from unmask.noise import Noise
from unmask.objectives.sft import SFT
from unmask.rollout import DemonstrationSource
from unmask.schedule import OptimizerConfig, TrainerConfig
from unmask.trainer import Trainer
from unmask.types import Example

SMALL = TinyModelConfig(hidden_size=16, num_layers=1, num_heads=1, intermediate_size=16, max_length=8)


def one_update() -> int:
    """Trains a very small embedded model on one demonstration; returns the number of updates made, 1."""
    source = DemonstrationSource([(Example(0, "12|"), "34")], gen_length=2, rows=4, noise=Noise(0))
    trainer = Trainer(
        build_tiny(SMALL, seed=0),
        None,
        source,
        SFT(),
        TrainerConfig(num_batches=1, monitor_rows=0),
        OptimizerConfig(),
        noise=Noise(0),
        accelerator=Accelerator(cpu=not torch.accelerator.is_available()),
    )
    trainer.run()
    return trainer.state.step


def accelerators() -> list[str]:
    """Names of the devices that torch can use."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [str(kind)] if kind else []


def main() -> None:
    started = time.perf_counter()
    facts = {
        "updates": one_update(),
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "accelerators": accelerators(),
        "torch_cuda": torch.version.cuda,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
