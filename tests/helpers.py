"""Small real objects that several test files build."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from unmask.critic import make_value_model
from unmask.likelihood import sequence_estimate
from unmask.models import MaskedPolicy, TinyModelConfig, build_tiny
from unmask.noise import Noise
from unmask.objectives.espo import ESPO
from unmask.rollout import GroupSource, RolloutConfig
from unmask.samplers import SAMPLERS
from unmask.schedule import OptimizerConfig, TrainerConfig
from unmask.tasks.sudoku import Sudoku
from unmask.trainer import Trainer
from unmask.types import Example, LossInputs, LossOutput, Rollouts, Score, Status

SMALL = TinyModelConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_length=40)


def tiny_policy(seed: int = 0, dtype: torch.dtype = torch.float64, config: TinyModelConfig = SMALL) -> MaskedPolicy:
    """A small random embedded model; wide weights, so that its distributions are far from uniform."""
    policy = build_tiny(replace(config, init_std=0.3), seed=seed)
    policy.module.to(dtype)
    return policy


def fake_rollouts(
    num_groups: int = 3, group_size: int = 4, length: int = 5, prompt: int = 4, seed: int = 0
) -> Rollouts:
    """Rollouts of digits with random rewards and steps, unequal left padding and unequal lengths.

    Every row is also a node of a tree: it has a window of its steps.
    """
    g = torch.Generator().manual_seed(seed)
    rows = num_groups * group_size
    pads = torch.arange(rows) // group_size % prompt
    batch = Rollouts(
        prompt_ids=torch.randint(8, 18, (rows, prompt), generator=g),
        prompt_mask=torch.arange(prompt) >= pads[:, None],
        completion_ids=torch.randint(8, 18, (rows, length), generator=g),
        prompt_key=torch.arange(rows) // group_size,
        rollout_index=torch.arange(rows),
        groups=torch.arange(rows) // group_size,
        rewards=torch.rand(rows, generator=g, dtype=torch.float64),
        length=torch.randint(1, length + 1, (rows,), generator=g),
        reveal_step=torch.zeros(rows, length, dtype=torch.int64),
        sample_logps=torch.zeros(rows, length, dtype=torch.float64),
        nfe=torch.full((rows,), length),
        prompts=["p"] * rows,
        completions=["c"] * rows,
        statuses=["wrong"] * rows,
        facts=[{}] * rows,
    )
    first = torch.randint(0, 2, (rows,), generator=g)
    return replace(
        batch,
        reveal_step=torch.randint(0, 4, (rows, length), generator=g),
        sample_logps=-3 * torch.rand(rows, length, generator=g, dtype=torch.float64),
        window=torch.stack([first, first + 2], dim=1),
        process_rewards=torch.rand(rows, generator=g, dtype=torch.float64),
    )


@dataclass
class FixedSource:
    """The same rollouts in every iteration."""

    rollouts: Rollouts

    @property
    def batch_rows(self) -> int:
        return len(self.rollouts)

    def collect(self, policy: Any, iteration: int, rows: slice) -> Rollouts:
        return self.rollouts


@dataclass(frozen=True)
class Coupled(ESPO):
    """An objective whose rows cannot be separated: the square of the mean ELBO, weighted by rewards."""

    is_row_separable: ClassVar[bool] = False

    def loss(self, x: LossInputs) -> LossOutput:
        values = sequence_estimate(x.logps, x.corruption)
        spread = (values - values.mean()).square().mean()
        return LossOutput(spread + (x.rewards * values).mean().square(), {})


@dataclass(frozen=True)
class DigitSum:
    """A task of two characters: the share of digits among the completion's characters that are above four."""

    prompt: str = "raw"
    gen_length: int = 4
    num_steps: int = 4
    broken: bool = False

    def examples(self, split: str) -> list[Example]:
        return [Example(id=i, prompt=f"{i % 10}{i // 10 % 10}|") for i in range(20)]

    def score(self, example: Example, completion: str) -> Score:
        value = float("nan") if self.broken else sum(c in "56789" for c in completion) / 4
        return Score(value, Status.CORRECT if value == 1 else Status.WRONG, {"accuracy": float(value == 1)})

    def stratum(self, example: Example) -> str:
        return ""

    def source(self, split: str) -> str:
        return f"generated:{split}"


def make_trainer(
    policy: MaskedPolicy, algorithm: Any, source: Any, *, reference: MaskedPolicy | None = None, **settings: Any
) -> Trainer:
    """A trainer on a fixed noise, without listeners unless given; with a value model if the algorithm needs one."""
    if "value_model" not in settings:
        settings["value_model"] = make_value_model(policy, reference, algorithm.needs, seed=0, micro_batch_size=64)
    config = {k: settings.pop(k) for k in list(settings) if k in TrainerConfig.__dataclass_fields__}
    return Trainer(
        policy,
        reference,
        source,
        algorithm,
        TrainerConfig(**config),
        settings.pop("optimizer", OptimizerConfig(lr=1e-3, max_grad_norm=1.0)),
        noise=Noise(3).stream("train"),
        accelerator=Accelerator(),
        **settings,
    )


def sudoku_source(task: Sudoku | DigitSum, sampler: str = "roar", **rollout: int) -> GroupSource:
    settings = {"prompts_per_batch": 4, "group_size": 4, "batch_size": 8} | rollout
    return GroupSource(task, SAMPLERS[sampler](gen_length=task.gen_length), RolloutConfig(**settings), Noise(1))


def gradients(policy: MaskedPolicy) -> list[Tensor]:
    return [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]
