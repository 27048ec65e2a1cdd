"""Accuracy of a model on a task: a table on screen, and JSON rows with --output.

  unmask eval runs/mine --task sudoku
  unmask eval runs/mine/model --task sudoku --data puzzles.csv --num-steps 8 --output rows.json

MODEL is a model directory or a run directory. Decoding is greedy and in order of confidence unless told otherwise;
length and steps default to what the task declares. --gen-length takes several lengths, one row each. Task options
follow as key=value, such as prompt=d1 parser=d1.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from unmask.api import decoding, evaluation_rows, evaluation_task
from unmask.cli.view import open_view, print_rows
from unmask.config import apply_overrides
from unmask.errors import ConfigError
from unmask.runs import plain, write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model, adapter or run directory, or a hub id")
    parser.add_argument("--task", required=True, help="task name; see `unmask list tasks`")
    parser.add_argument("--data", metavar="FILE", help="a data file of the task (default: its generated test split)")
    parser.add_argument("--split", default="test", help="split to evaluate (default: test)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    parser.add_argument(
        "--sampler",
        default="low_confidence",
        help="sampler name (default: low_confidence; block-causal models need block_diffusion)",
    )
    parser.add_argument(
        "--gen-length", metavar="N[,N...]", help="canvas tokens, one row for each (default: the task's)"
    )
    parser.add_argument("--num-steps", type=int, metavar="N", help="denoising steps (default: one token per step)")
    parser.add_argument("--block-length", type=int, metavar="N", help="semi-autoregressive block (default: one block)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="completions per forward (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="noise of sampling at temperature above 0 (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("options", nargs="*", metavar="key=value", help="further task options")


def run(args: argparse.Namespace) -> None:
    task = evaluation_task(args.task, args.data, args.split, apply_overrides({}, args.options))
    samplers = [
        decoding(
            task,
            args.sampler,
            gen_length=length,
            num_steps=args.num_steps,
            block_length=args.block_length,
            temperature=args.temperature,
        )
        for length in lengths(args.gen_length)
    ]
    if args.output:
        check_output(Path(args.output))
    with open_view(args.quiet) as view:
        rows = evaluation_rows(
            args.model,
            task,
            samplers,
            split=args.split,
            limit=args.limit,
            batch_size=args.batch_size,
            seed=args.seed,
            view=view,
        )
    if args.output:
        write_atomic(Path(args.output), json.dumps(plain(rows), indent=2) + "\n")
    print_rows([(Path(row["model"]).name, row) for row in rows], f"{args.model} on {args.task}")
    if args.output:
        print(f"rows written to {args.output}")


def check_output(file: Path, option: str = "--output") -> None:
    """Raises: ConfigError, before the work, if the file of this option could not be written."""
    parent = file.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{option} {file}: its directory does not exist. Create it first.")
    if file.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{option} {file}: is a directory or stands in one that is not writable. Name another file.")


def lengths(text: str | None) -> list[int | None]:
    """The lengths of --gen-length; [None] for the task's own."""
    if text is None:
        return [None]
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--gen-length {text}: must be positive integers separated by commas, such as 128,256.")
    return [int(part) for part in parts]
