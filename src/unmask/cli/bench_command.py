"""Sampler settings by speed and accuracy, for your model and task: which steps, thresholds and caches are worth it.

  unmask bench runs/mine --task sudoku
  unmask bench runs/mine --task gsm8k --gen-length 256 --block-length 32 --limit 200 --output bench

Every setting of `low_confidence` decodes the same examples greedily, batch by batch in turn, so differences in accuracy
are paired and a machine that slows down does so for all. The first setting is the reference: one token per step, or
--num-steps, without a cache. Named is the fastest setting that loses at most --margin points to it. Task options follow
as key=value; sampler.key=value holds for every setting.

--output DIR writes bench.json, bench.md and bench.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unmask import pareto
from unmask.api import decoding, evaluation_task, open_model
from unmask.build import Named
from unmask.cli.decoding import add_task_arguments, split_options
from unmask.cli.view import open_view
from unmask.config import apply_overrides
from unmask.errors import ConfigError, UnmaskError
from unmask.figures import check_figure
from unmask.launch import check_prompts
from unmask.models import MaskedPolicy
from unmask.noise import Noise
from unmask.runs import plain, write_atomic
from unmask.types import Sampler

OWN = {"gen_length", "num_steps", "block_length", "temperature", "threshold", "factor", "entropy_bound", "cache"}
"""Settings of the sampler that no word may change: each row names them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_task_arguments(parser)
    parser.add_argument("--gen-length", type=int, metavar="N", help="canvas tokens (default: the task's)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="steps of the reference (default: one token a step)")
    parser.add_argument("--block-length", type=int, metavar="N", help="semi-autoregressive block (default: one block)")
    parser.add_argument("--margin", type=float, default=1.0, help="points of accuracy that may be lost (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="completions a forward (default: 64)")
    parser.add_argument("--output", metavar="DIR", help="write bench.json, bench.md and bench.png there")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("options", nargs="*", metavar="key=value", help="task options, or sampler.KEY=VALUE")


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.margin <= 100 or args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ConfigError("--margin from 0 to 100 points, --batch-size and --limit of at least 1 are needed.")
    if args.output:
        check_figure(Path(args.output) / "bench.png")
    words, fields = split_options(args.options)
    if own := OWN & set(fields):
        raise ConfigError(f"sampler.{min(own)}: is what the settings differ in, or has an option of its own. Drop it.")
    task = evaluation_task(args.task, args.data, args.split, apply_overrides({}, words))
    reference = chosen(task, args, fields)
    examples = task.value.examples(args.split)[: args.limit]
    policy = open_model(args.model)
    check_prompts(policy, examples, reference.gen_length)
    samplers = settings(task, args, fields, reference, policy)
    with open_view(args.quiet) as view:
        view.stage(f"measuring {len(samplers)} settings", len(examples) * len(samplers))
        options: dict[str, Any] = {"noise": Noise(0).stream("evaluation"), "batch_size": args.batch_size}
        found = pareto.measure(policy, task.value, examples, samplers, on_rows=view.advance, **options)
    table = pareto.rows(found)
    sentences = pareto.words(table, found, args.margin / 100)
    show(table, f"{args.model} on {args.task}, {len(examples):,} examples")
    print("\n".join(sentences))
    if args.output:
        write(Path(args.output), table, sentences, f"{Path(args.model).name} on {args.task}")


def chosen(task: Named, args: argparse.Namespace, fields: dict[str, Any], **own: Any) -> Sampler:
    """The sampler with the command's lengths and the fields of one setting."""
    name = own.pop("type", "low_confidence")
    given = {"gen_length": args.gen_length, "block_length": args.block_length}
    if name == "low_confidence":
        given["num_steps"] = args.num_steps
    sampler: Sampler = decoding(task, name, **given | own | {"temperature": 0.0} | fields).value
    return sampler


def settings(
    task: Named, args: argparse.Namespace, fields: dict[str, Any], reference: Sampler, policy: MaskedPolicy
) -> dict[str, Sampler]:
    """The samplers by name; those whose steps or blocks do not fit are left out, the reference never."""
    num_blocks: int = reference.num_blocks  # type: ignore[attr-defined]
    steps: int = reference.total_steps  # type: ignore[attr-defined]
    wanted = pareto.settings(
        steps,
        reference.gen_length,
        has_windows=policy.lookback is not None,
        has_shadows=policy.lookback == 0,
        has_blocks=num_blocks > 1,
    )
    samplers: dict[str, Sampler] = {}
    for name, own in wanted.items():
        try:
            samplers[name] = chosen(task, args, fields, **own)
        except UnmaskError:
            if not samplers:
                raise
    return samplers


def show(table: list[dict[str, Any]], title: str) -> None:
    """The rows on the screen."""
    drawn = Table(title=title)
    for heading in ("setting", "accuracy, %", "difference, points", "forwards", "ms each", "speed-up", "front"):
        drawn.add_column(heading, justify="left" if heading == "setting" else "right", no_wrap=heading == "setting")
    for row in table:
        drawn.add_row(*pareto.cells(row))
    (Console() if sys.stdout.isatty() else Console(width=120)).print(drawn)


def write(directory: Path, table: list[dict[str, Any]], sentences: list[str], title: str) -> None:
    """The three files."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"- {sentence}" for sentence in sentences)
    write_atomic(directory / "bench.md", f"# {title}\n\n{pareto.as_markdown(table)}\n\n{text}\n")
    write_atomic(directory / "bench.json", json.dumps(plain({"rows": table, "words": sentences}), indent=2) + "\n")
    pareto.draw(table, title, directory / "bench.png")
    print(f"bench.json, bench.md and bench.png are in {directory}")
