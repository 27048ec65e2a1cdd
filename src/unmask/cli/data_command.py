"""Data files: looked at before a run, or made out of what a run has sampled.

  unmask data check prompts.jsonl
  unmask data check pairs.jsonl --model owner/model --gen-length 256
  unmask data pairs runs/mine --output pairs.jsonl
  unmask data pairs runs/mine --output pairs.jsonl --pairs-per-prompt 4 --last 20 --seed 1

`check` reads every row of prompts, prompts with completions, or preference pairs, and prints columns, lengths, repeated
rows and the first prompt as the model reads it; with --model lengths are tokens, and texts that do not fit are counted.
Exit code 2 if a row is one that a run would refuse.

`pairs` takes from each group of rollouts.jsonl (a batch's completions of one prompt) pairs of unequal reward, at
random, with the rewards as scores. `unmask train` learns from the file with data.file=pairs.jsonl; docs/data.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from unmask.api import open_model
from unmask.cli.eval_command import check_output
from unmask.data_check import SHOWN_PROBLEMS, Report, check_rows
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.preferences import pairs_of_rollouts, read_rollouts
from unmask.rows import read_rows
from unmask.runs import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["check", "pairs"], help="look at a file, or make one from a run's rollouts")
    parser.add_argument("source", metavar="FILE|RUN", help="check: a data file or hub id; pairs: a run directory")
    parser.add_argument("--model", metavar="MODEL", help="check: count tokens of this model, render with its template")
    parser.add_argument("--gen-length", type=int, metavar="N", help="check: canvas tokens of a completion")
    parser.add_argument("--split", default="train", help="check: of a hub data set (default: train)")
    parser.add_argument("--output", metavar="FILE", help="pairs: JSON lines file to write")
    parser.add_argument("--pairs-per-prompt", type=int, default=1, metavar="N", help="at most, per group (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice among pairs (default: 0)")
    parser.add_argument("--last", type=int, metavar="N", help="of the newest N batches alone (default: of all)")


def run(args: argparse.Namespace) -> int:
    for name in ("pairs_per_prompt", "last", "gen_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1. Try 1.")
    if args.action == "pairs":
        make_pairs(args)
        return 0
    if args.gen_length and not args.model:
        raise ConfigError("--gen-length counts tokens, which takes a tokenizer. Name a model with --model.")
    policy = open_model(args.model) if args.model else None
    report = check_rows(
        read_rows(args.source, args.split, "FILE"),
        policy=policy,
        max_length=policy.max_length if policy else None,
        gen_length=args.gen_length,
    )
    return show(report)


def show(report: Report) -> int:
    """Print what was found; 2 if a run would refuse a row."""
    print(f"rows       {report.num_rows:,} of {report.kind}")
    for name, text in report.columns.items():
        print(f"column     {name}: {text}")
    for of in report.lengths:
        low, middle, high, top = of.numbers
        too_long = f"; {of.too_long:,} do not fit" if of.too_long else ""
        print(f"{of.name:10s} {low:,} to {top:,} {of.unit}, median {middle:,}, 95 % up to {high:,}{too_long}")
    print(f"repeated   {report.num_repeated_rows:,} rows, {report.num_repeated_prompts:,} prompts")
    if report.rendered:
        print(f"first prompt as it is read:\n{report.rendered}")
    for problem in report.problems[:SHOWN_PROBLEMS]:
        print(f"refused    {problem}")
    if len(report.problems) > SHOWN_PROBLEMS:
        print(f"refused    {len(report.problems) - SHOWN_PROBLEMS:,} more")
    num_bad = len(report.problems) + sum(of.too_long for of in report.lengths)
    print("every row can be used" if not num_bad else f"{num_bad:,} rows or texts would be refused")
    return 2 if num_bad else 0


def make_pairs(args: argparse.Namespace) -> None:
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
