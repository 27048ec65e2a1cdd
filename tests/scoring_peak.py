"""Memory that scoring takes, measured in a process that has done nothing else: python -m tests.scoring_peak NAME N ...

In a process that ran other tests the heap may hold free pages, mapped or not, which hide growth or add to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from unmask.models import chunked_head
from unmask.models.tiny import TinyConfig, TinyForMaskedLM

VOCAB = 126_464  # LLaDA's
CHUNK_ROWS = 70
"""34 MiB of logits: quicker than the default's 64, and still too large for a heap to keep, as glibc gives every buffer
above 32 MiB back."""


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM the most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def peak_of_scoring(num_positions: int, name: str) -> int:
    """Most resident bytes over those of the model while it scores so many positions, forward and backward."""
    config = TinyConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=600,
    )
    model = TinyForMaskedLM(config)
    model.cross_entropy = name
    model.lm_head.requires_grad_(False)
    canvas = torch.arange(num_positions)[None] + 8
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    before = resident("VmRSS")
    out = model(canvas, positions=torch.ones_like(canvas, dtype=torch.bool), targets=canvas[0], want=("logp",))
    out["logp"].sum().backward()
    return resident("VmHWM") - before


if __name__ == "__main__":
    chunked_head.CHUNK_NUMBERS = CHUNK_ROWS * VOCAB
    print(json.dumps([peak_of_scoring(int(number), sys.argv[1]) for number in sys.argv[2:]]))
