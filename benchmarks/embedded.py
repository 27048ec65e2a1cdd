"""CPU milliseconds per rollout of the demo's recipe, by phase, on one thread: collecting, and both updates.

python benchmarks/embedded.py --batches 6
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator

from unmask.bases import reference_policy
from unmask.build import train_recipe
from unmask.config import read_recipe
from unmask.launch import base_policy, open_source
from unmask.noise import Noise
from unmask.run_log import SilentView
from unmask.trainer import Trainer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "sudoku-espo.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = train_recipe(read_recipe(RECIPE), RECIPE.parent)
    policy = base_policy(recipe, SilentView())
    source = open_source(recipe)
    trainer = Trainer(
        policy,
        reference_policy(policy),
        source,
        recipe.algorithm.value,
        recipe.trainer,
        recipe.optimizer,
        noise=Noise(0),
        accelerator=Accelerator(cpu=True),
    )
    spent: dict[str, list[float]] = {"collect": [], "rest of prepare (masks, monitor)": [], "updates": []}
    for iteration in range(args.batches + 1):
        marks = [time.process_time()]
        source.collect(policy, iteration, slice(0, source.batch_rows))
        marks.append(time.process_time())
        batch = trainer.prepare(iteration)  # collects once more: its own part is what is left
        marks.append(time.process_time())
        for inner in range(recipe.algorithm.value.num_iterations):
            trainer.update(batch, inner)
        marks.append(time.process_time())
        first, second, third = (b - a for a, b in itertools.pairwise(marks))
        for name, seconds in zip(spent, (first, second - first, third), strict=True):
            if iteration:  # the first batch warms up
                spent[name].append(1000 * seconds / source.batch_rows)
    print(
        f"torch {torch.__version__}, one thread, {source.batch_rows} rollouts a batch, median of {args.batches} batches"
    )
    for name, values in spent.items():
        print(f"{name}: {median(values):.2f} ms CPU per rollout ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
