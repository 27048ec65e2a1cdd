"""What the energy model of a dga run has learned: energy by verdict, correlations, accuracy by quarter of energy.

  unmask energy runs/mine
  unmask energy runs/mine --split validation --num-rollouts 2000 --output energy.json --figure energy.png

Reads the newest rollouts of the run's log, or with --split samples new ones from the trained policy.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unmask.cli.eval_command import check_output
from unmask.energy import draw_figure, measure_energies, number, summarise
from unmask.errors import ConfigError
from unmask.figures import check_figure
from unmask.runs import plain, write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="directory of a finished run that learned an energy")
    parser.add_argument("--num-rollouts", type=int, default=2000, metavar="N", help="completions (default: 2000)")
    parser.add_argument("--split", metavar="SPLIT", help="sample new completions of these prompts, e.g. validation")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="completions per forward (default: 64)")
    parser.add_argument("--output", metavar="FILE", help="write the numbers, and every energy, as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw histogram and quarters")


def run(args: argparse.Namespace) -> None:
    for name in ("num_rollouts", "batch_size"):
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} {getattr(args, name)}: must be at least 1. Try the default.")
    if args.output:
        check_output(Path(args.output))
    if args.figure:
        check_figure(Path(args.figure))
        check_output(Path(args.figure), "--figure")
    path = Path(args.run)
    scored = measure_energies(path, num_rollouts=args.num_rollouts, split=args.split, micro_batch_size=args.batch_size)
    source = f"new rollouts on {args.split}" if args.split else "the newest rollouts of its log"
    summary = {"run": str(path), "source": source, **summarise(scored)}
    show(summary)
    if args.output:
        columns = {
            "energies": scored.energies.tolist(),
            "rewards": scored.rewards.tolist(),
            "is_correct": scored.is_correct.tolist(),
            "prompt_id": scored.prompt_id.tolist(),
        }
        write_atomic(Path(args.output), json.dumps(plain(summary | columns), indent=2) + "\n")
        print(f"numbers written to {args.output}")
    if args.figure:
        draw_figure(summary, f"{path.name}: {source}", Path(args.figure))
        print(f"figure drawn in {args.figure}")


def show(summary: dict) -> None:
    """The quarters as a table, the rest in lines."""
    table = Table(title=f"energy of {summary['num_rollouts']} completions ({summary['source']})", title_justify="left")
    for place, column in enumerate(("energy", "rollouts", "mean energy", "accuracy", "mean reward")):
        table.add_column(column, justify="right" if place else "left")
    for row in summary["quartiles"]:
        numbers = (number(row[key]) for key in ("mean_energy", "accuracy", "mean_reward"))
        table.add_row(row["energy"], str(row["rollouts"]), *numbers)
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table)
    print(f"Pearson r of energy and reward {number(summary['pearson_reward'])}", end="")
    print(f" (within prompts {number(summary['pearson_reward_within_prompts'])})", end="")
    print(f", of energy and correctness {number(summary['pearson_correct'])}")
    means = [number(summary[key]) for key in ("energy_correct", "energy_wrong")]
    print(f"mean energy of correct completions {means[0]}, of wrong ones {means[1]}")
    if summary["num_dropped"]:
        print(f"{summary['num_dropped']} rows of the log were left out: their text does not fit the canvas again")
