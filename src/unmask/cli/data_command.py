"""Preference files out of what a run has sampled.

  unmask data pairs runs/mine --output pairs.jsonl
  unmask data pairs runs/mine --output pairs.jsonl --pairs-per-prompt 4 --last 20 --seed 1

`pairs` takes from each group of rollouts.jsonl (a batch's completions of one prompt) pairs of unequal reward, at
random, with the rewards as scores. `unmask train` learns from the file with data.file=pairs.jsonl; docs/data.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from unmask.cli.eval_command import check_output
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.preferences import pairs_of_rollouts, read_rollouts
from unmask.runs import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["pairs"], help="pairs: a preference file from a run's rollouts")
    parser.add_argument("source", metavar="RUN", help="directory of a run of `unmask train`")
    parser.add_argument("--output", metavar="FILE", help="JSON lines file to write")
    parser.add_argument("--pairs-per-prompt", type=int, default=1, metavar="N", help="at most, per group (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice among pairs (default: 0)")
    parser.add_argument("--last", type=int, metavar="N", help="of the newest N batches alone (default: of all)")


def run(args: argparse.Namespace) -> None:
    for name in ("pairs_per_prompt", "last"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1. Try 1.")
    if args.output is None:
        raise ConfigError("--output is missing: must be the file to write, such as pairs.jsonl.")
    output = Path(args.output)
    check_output(output)
    pairs = pairs_of_rollouts(
        read_rollouts(Path(args.source)),
        pairs_per_prompt=args.pairs_per_prompt,
        last=args.last,
        noise=Noise(args.seed).stream("preference pairs"),
    )
    write_atomic(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs.rows))
    print(f"groups       {pairs.num_groups:,}, of which {pairs.num_paired:,} hold completions of unequal reward")
    print(f"pairs        {len(pairs.rows):,}, mean margin {pairs.mean_margin:.4f}")
    print(f"written to   {output}")
