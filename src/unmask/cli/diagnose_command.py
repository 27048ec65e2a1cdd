"""Bias, variance and cost of likelihood estimators, against the exact likelihood of short completions.

  unmask diagnose runs/mine --task sudoku
  unmask diagnose runs/mine --task sudoku --reference base --length 10 --output diagnosis

Completions are sampled; of each, all but --length positions at random stay shown, as if they belonged to the prompt,
and the model is asked for every one of the 2^length masked states of the rest. From these numbers follow the exact
log p (mean over all orders of revealing one token at a time), the exact ELBO and EUBO, and the law of every estimator
that an algorithm here uses, for single models and, with --reference, for the difference of two that read the same
masked copies, which is what stands in every ratio. docs/diagnose.md explains the columns and shows a result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unmask.api import decoding, evaluation_task
from unmask.cli.view import open_view
from unmask.config import apply_overrides
from unmask.diagnosis import DiagnosisSettings, diagnose
from unmask.diagnosis.output import draw_figure, headline, markdown, tables
from unmask.errors import ConfigError
from unmask.figures import load_pyplot
from unmask.runs import RunDirectory, plain, replace_directory, write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model, adapter or run directory, or a hub id")
    parser.add_argument("--task", required=True, help="task name; see `unmask list tasks`")
    parser.add_argument("--reference", metavar="MODEL", help="a second model, for the difference of estimates")
    parser.add_argument("--data", metavar="FILE", help="a data file of the task (default: its generated test split)")
    parser.add_argument("--split", default="test", help="split that prompts come from (default: test)")
    parser.add_argument("--num-prompts", type=int, default=16, metavar="N", help="the first N prompts (default: 16)")
    parser.add_argument("--group-size", type=int, default=4, metavar="N", help="completions of each (default: 4)")
    parser.add_argument(
        "--length", type=int, default=8, metavar="N", help="completion tokens left open, 2 to 12 (default: 8)"
    )
    parser.add_argument(
        "--sampler", default="roar", help="sampler name (default: roar, whose samples follow the exact likelihood)"
    )
    parser.add_argument("--gen-length", type=int, metavar="N", help="completion tokens (default: the task's)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="denoising steps, for samplers that take them")
    parser.add_argument("--block-length", type=int, metavar="N", help="block of the sampler (default: one block)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampler (default: 1)")
    parser.add_argument("--gamma", default="1,1.5,2", metavar="X[,X...]", help="exponents of the EUBO")
    parser.add_argument(
        "--budget", type=int, default=4, metavar="N", help="forwards at which estimators are compared (default: 4)"
    )
    parser.add_argument("--draws", type=int, default=256, metavar="N", help="draws of each estimator (default: 256)")
    parser.add_argument(
        "--model-draws",
        type=int,
        default=64,
        metavar="N",
        help="draws of those that hide prompt tokens, one forward a copy (default: 64; 0: leave them out)",
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="copies per forward (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of completions, open positions and draws (default: 0)")
    parser.add_argument("--output", metavar="DIR", help="a new directory for diagnose.json, diagnose.md, diagnose.png")
    parser.add_argument("--no-figure", action="store_true", help="no diagnose.png, which needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("options", nargs="*", metavar="key=value", help="further task options")


def run(args: argparse.Namespace) -> None:
    settings = DiagnosisSettings(
        split=args.split,
        num_prompts=args.num_prompts,
        group_size=args.group_size,
        length=args.length,
        gammas=numbers(args.gamma),
        budget=args.budget,
        num_draws=args.draws,
        num_model_draws=args.model_draws,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    task = evaluation_task(args.task, args.data, args.split, apply_overrides({}, args.options))
    sampler = decoding(
        task,
        args.sampler,
        gen_length=args.gen_length,
        num_steps=args.num_steps,
        block_length=args.block_length,
        temperature=args.temperature,
    )
    with_figure = bool(args.output) and not args.no_figure
    if with_figure:
        load_pyplot()  # refused now rather than after the work
    if args.output:
        RunDirectory(args.output).check_new()
    with open_view(args.quiet) as view:
        found = diagnose(args.model, task, sampler, settings, reference=args.reference, view=view)
    if args.output:
        replace_directory(Path(args.output), lambda directory: write(found, directory, with_figure=with_figure))
    show(found)
    if args.output:
        print(f"everything is in {args.output}")


def write(found: dict, directory: Path, *, with_figure: bool) -> None:
    """diagnose.json, diagnose.md and diagnose.png."""
    write_atomic(directory / "diagnose.json", json.dumps(plain(found), indent=2, ensure_ascii=False) + "\n")
    write_atomic(directory / "diagnose.md", markdown(found))
    if with_figure:
        draw_figure(found, directory / "diagnose.png")


def show(found: dict) -> None:
    """The tables as text."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(headline(found), markup=False, highlight=False)
    for title, columns, rows in tables(found):
        table = Table(title=Text(title), title_justify="left")
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


def numbers(text: str) -> tuple[float, ...]:
    """The exponents of --gamma."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--gamma {text}: must be numbers separated by commas, such as 1,1.5,2.") from None
