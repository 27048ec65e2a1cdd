"""An adapter folded into its base: one ordinary model, checked against the two apart before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unmask.bases import DTYPES, model_directory
from unmask.errors import ConfigError, ModelError
from unmask.models import MaskedPolicy, load
from unmask.noise import Noise
from unmask.runs import replace_directory

# Largest mean KL(apart || merged), nats per token. Float32 differs in the last bits of W + (alpha / rank) B A; bfloat16
# rounds that sum to 8 bits, as it does every stored weight.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}

NUM_CANVASES, CANVAS_LENGTH = 4, 64


@dataclass(frozen=True)
class MergeReport:
    """How far the merged model is from base and adapter apart."""

    output: Path
    kl: float  # mean over positions, nats per token
    largest: float  # largest difference of two logits
    tolerance: float  # on kl
    dtype: str


def merge(path: str | Path, output: str | Path, *, dtype: str = "auto") -> MergeReport:
    """Write the model of a run or adapter directory to `output` with its adapter merged in.

    Raises: ConfigError if there is no adapter or `output` exists, ModelError if the merged logits are too far off.
    """
    target = Path(output)
    if target.exists():
        raise ConfigError(f"--output {target}: exists already. Name a new directory.")
    policy = load(model_directory(path), dtype=DTYPES[dtype])
    if policy.switch is None:
        raise ConfigError(f"{path}: this model has no adapter; it is whole as it is.")
    if hasattr(policy.switch.module.get_base_model(), "scalar_heads"):
        raise ConfigError(f"{path}: this adapter has a scalar head, which a merged model cannot hold. Keep them apart.")
    canvas = probe(policy)
    before = log_probabilities(policy, canvas)
    merged = policy.with_module(policy.switch.module.merge_and_unload(), policy.name)
    after = log_probabilities(merged, canvas)
    merged_dtype = next(merged.module.parameters()).dtype
    tolerance = TOLERANCE[merged_dtype]
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    if not (kl <= tolerance and all(bool(p.isfinite().all()) for p in merged.module.parameters())):
        raise ModelError(
            f"{path}: merged and apart differ by {kl:.2e} nats per token, and may by {tolerance:.0e}; or weights are "
            "not finite. Merge in float32 (--dtype float32)."
        )
    largest = float((before - after).abs().max())
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_directory(target, merged.save)
    return MergeReport(
        target, kl, largest, tolerance, str(next(merged.module.parameters()).dtype).removeprefix("torch.")
    )


def probe(policy: MaskedPolicy) -> Tensor:
    """Canvases (4, 64) of random tokens of which half are masked, the same for every call."""
    size = min(CANVAS_LENGTH, policy.max_length)
    rows, slots = torch.arange(NUM_CANVASES)[:, None], torch.arange(size)[None]
    noise = Noise(0).stream("merge")
    tokens = (noise.stream("token").uniform(rows, slots) * len(policy.tokenizer)).long()
    masked = noise.stream("masked").uniform(rows, slots) < 0.5
    return tokens.masked_fill(masked, policy.mask_token_id).to(policy.device)


@torch.no_grad()
def log_probabilities(policy: MaskedPolicy, canvas: Tensor) -> Tensor:
    """(N, V - 1), of every position and every token but the mask token."""
    logits = policy.token_outputs(canvas, None, torch.ones_like(canvas, dtype=torch.bool)).logits
    assert logits is not None  # a policy returns what it is asked for
    tokens = torch.arange(logits.shape[-1], device=logits.device) != policy.mask_token_id
    return logits.log_softmax(-1)[:, tokens]
