"""Run under `accelerate launch`: commands of the program one after the other, with parts that behave unequally.

python -m tests.distributed_run STARTED ARGS... [then ARGS...]      `kill=N` in ARGS: rank 1 gets SIGTERM in update N

`FSDP_NAME=VALUE` or `ACCELERATE_NAME=VALUE` in ARGS: a setting of the launcher, from there on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import DigitSum
from unmask import launch
from unmask.cli import main
from unmask.ranks import rank
from unmask.run_log import RunLog
from unmask.samplers import SAMPLERS
from unmask.samplers.roar import Roar
from unmask.tasks import TASKS
from unmask.tasks.sudoku import Sudoku
from unmask.types import Example, NoiseLike, Policy, PromptBatch, Samples, Score


@dataclass(frozen=True)
class Failing(Sudoku):
    """Sudoku whose reward raises on the second process."""

    def score(self, example: Example, completion: str) -> Score:
        if rank() == 1:
            raise ValueError(f"the judge of prompt {example.id} is broken")
        return super().score(example, completion)


@dataclass(frozen=True)
class Uneven(Roar):
    """Random order, with more forwards on the second process than on the first."""

    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Samples:
        ids = prompts.prompt_ids
        for _ in range(3 * rank()):
            policy.token_outputs(ids, prompts.prompt_mask, torch.ones_like(ids, dtype=torch.bool))
        return super().sample(policy, prompts, noise=noise, on_step=on_step)


class KilledLog(RunLog):
    """Asks its process to stop once an update is through, on the second process only."""

    update = 0

    def on_step(self, row: dict[str, float], timing: dict[str, float]) -> None:
        super().on_step(row, timing)
        if rank() == 1 and row["step"] == KilledLog.update:
            os.kill(os.getpid(), signal.SIGTERM)


def run(args: list[str]) -> int:
    """One command; its exit status, 0 if it was killed as wanted."""
    settings = [arg for arg in args if arg.startswith(("FSDP_", "ACCELERATE_"))]
    os.environ.update(dict(setting.split("=") for setting in settings))
    kills = [arg for arg in args if arg.startswith("kill=")]
    KilledLog.update = int(kills[0].removeprefix("kill=")) if kills else 0
    code = main([arg for arg in args if arg not in kills + settings])
    return 0 if kills and code == 128 + signal.SIGTERM else code


if __name__ == "__main__":
    TASKS["failing"] = Failing
    TASKS["digit_sum"] = DigitSum
    SAMPLERS["uneven"] = Uneven
    launch.RunLog = KilledLog
    Path(sys.argv[1]).touch()
    code, rest = 0, sys.argv[2:]
    while rest and code == 0:
        end = rest.index("then") if "then" in rest else len(rest)
        code, rest = run(rest[:end]), rest[end + 1 :]
    sys.exit(code)
