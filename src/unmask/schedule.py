"""Length and rhythm of a run: updates, evaluations, checkpoints, the early stop, and the optimiser's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from unmask.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the defaults are ESPO's for LoRA (arXiv:2512.03759)."""

    lr: float = 3e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's moment decays."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 0.2
    """Gradients are scaled down to this 2-norm."""
    schedule: str = "constant"
    """"constant", or "cosine" from lr to min_lr_ratio * lr over the planned updates."""
    min_lr_ratio: float = 0.1
    """End of the cosine as a share of lr."""
    warmup_steps: int = 0
    """Updates over which lr rises linearly from zero."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(
                f"optimizer.schedule = {self.schedule!r}: must be 'constant' or 'cosine'. Try 'constant'."
            )
        bounds = {
            "lr": (0 < self.lr < math.inf, "above 0 and finite", 3e-6),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0", 1.0),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more and finite", 0.01),
            "betas": (all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)", [0.9, 0.99]),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "in [0, 1]", 0.1),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more", 0),
        }
        for key, (is_good, requirement, example) in bounds.items():
            if not is_good:
                raise ConfigError(f"optimizer.{key} = {getattr(self, key)}: must be {requirement}. Try {example}.")

    def scale(self, step: int, total: int) -> float:
        """Learning rate at update `step` (0-based) of `total`, as a share of lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class StopRule:
    """Stop once the mean of the last `window` evaluations passes a bound, not before batch `after_batch`."""

    metric: str = "accuracy"
    """Column of the evaluation row."""
    at_most: float | None = None
    """Stop when the mean is at or below this."""
    at_least: float | None = None
    """Stop when the mean is at or above this."""
    window: int = 2
    """Evaluations averaged."""
    after_batch: int = 0
    """First batch at whose end the rule may act."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"trainer.stop.window = {self.window}: must be at least 1 evaluation. Try 2.")

    def is_met(self, rows: list[dict[str, Any]], batch: int) -> bool:
        if (self.at_most is None and self.at_least is None) or batch < self.after_batch or len(rows) < self.window:
            return False
        mean = sum(row[self.metric] for row in rows[-self.window :]) / self.window
        low = self.at_most is not None and mean <= self.at_most
        return low or (self.at_least is not None and mean >= self.at_least)


@dataclass(frozen=True)
class TrainerConfig:
    """Length and rhythm of a run."""

    num_batches: int = 1000
    """Rollout batches; optimiser updates = num_batches * algorithm.num_iterations."""
    micro_batch_size: int = 256
    """Masked copies per forward and backward; changes memory and speed, not the gradient."""
    eval_every: int = 0
    """Batches between evaluations on held-out prompts; 0: none."""
    save_every: int = 100
    """Updates between checkpoints; 0: only when the run is stopped."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    monitor_rows: int = 32
    """Rollouts per batch on which ELBO, KL to the reference and entropy are measured, for any algorithm; 0: none."""
    stop: StopRule = field(default_factory=StopRule)
    """Early stop on held-out results."""

    def __post_init__(self) -> None:
        least = {"num_batches": 1, "micro_batch_size": 1, "save_total_limit": 1}
        for key in (*least, "eval_every", "save_every", "monitor_rows"):
            if getattr(self, key) < least.get(key, 0):
                bound = least.get(key, 0)
                raise ConfigError(f"trainer.{key} = {getattr(self, key)}: must be at least {bound}. Try the default.")
