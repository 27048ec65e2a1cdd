"""Accuracy of a model on a task: a table on screen, and JSON rows with --output.

  unmask eval runs/mine --task sudoku
  unmask eval runs/mine/model --task sudoku --data puzzles.csv --num-steps 8 --output rows.json

MODEL is a model directory or a run directory. Decoding is greedy and in order of confidence unless told otherwise;
length and steps default to what the task declares. --gen-length takes several lengths, one row each. Task options
follow as key=value, such as prompt=d1 parser=d1; sampler.threshold=0.9 and the like are the sampler's.

  unmask eval runs/mine --task gsm8k --preset espo                     128, 256 and 512 tokens as the paper did
  unmask eval runs/mine --task sudoku --baseline runs/base             paired differences, with intervals
  unmask eval runs/mine --task gsm8k --num-samples 8 --temperature 0.9   pass@1, 2, 4, 8
  unmask eval runs/mine --task sudoku --completions completions.jsonl    what was written, with verdicts

The ending of --output says how rows are written: .json, .md (a Markdown table) or .tex (a LaTeX table).

Every finished batch is kept in FILE.partial, FILE being that of --completions, or else of --output. Interrupted, the
same command goes on from there; at the end that file is removed.

  accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 8 -m unmask eval ...    batches in turn
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask import __version__
from unmask.api import decoding, evaluation_rows, evaluation_task
from unmask.build import Named
from unmask.cli.decoding import (
    add_sampler_arguments,
    add_task_arguments,
    check_temperature,
    sampler_fields,
    split_options,
)
from unmask.cli.view import open_view, print_rows
from unmask.config import apply_overrides, to_table
from unmask.errors import ConfigError
from unmask.evaluation import Answer, compare
from unmask.kept import Kept
from unmask.launch import join_processes
from unmask.protocols import LENGTHS, PROTOCOLS, task_options
from unmask.ranks import rank
from unmask.run_log import View
from unmask.runs import plain, write_atomic
from unmask.samplers import SAMPLERS
from unmask.tables import latex_table, markdown_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_task_arguments(parser)
    add_sampler_arguments(parser)
    parser.add_argument(
        "--gen-length", metavar="N[,N...]", help="canvas tokens, one row for each (default: the task's)"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help=f"a paper's lengths, steps, prompt and parser: {', '.join(PROTOCOLS)}"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="completions per forward; processes take batches in turn (default: 256)",
    )
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="completions per example, for pass@k (default: 1)"
    )
    parser.add_argument("--baseline", metavar="MODEL", help="another model on the same examples, to compare with")
    parser.add_argument("--completions", metavar="FILE", help="write every completion with its verdict as JSON lines")
    parser.add_argument("--output", metavar="FILE", help="write the rows (.json, .md or .tex)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "options", nargs="*", metavar="key=value", help="further task options; sampler.key=value for the sampler"
    )


def run(args: argparse.Namespace) -> None:
    options = task_options(args.preset, args.task) if args.preset else {}
    words, settings = split_options(args.options)
    task = evaluation_task(args.task, args.data, args.split, apply_overrides(options, words))
    samplers = [
        decoding(task, args.sampler, **sampler_fields(args) | pace(args, length) | {"gen_length": length} | settings)
        for length in (LENGTHS if args.preset and not args.gen_length else lengths(args.gen_length))
    ]
    check(args, samplers)
    join_processes()
    with open_kept(args, task, samplers) as kept:
        with open_view(args.quiet) as view:
            rows, completions = evaluate(args, task, samplers, view, kept)
        if rank() != 0:
            return
        if args.completions:
            write_completions(Path(args.completions), completions)
        if args.output:
            write_atomic(Path(args.output), WRITERS[Path(args.output).suffix](rows))
        if kept:
            kept.remove()
    print_rows([(Path(row["model"]).name, row) for row in rows], f"{args.model} on {args.task}")
    for row in rows:
        print("".join(f"{line}\n" for line in facts(row)), end="")
    for what, file in (("rows", args.output), ("completions", args.completions)):
        if file:
            print(f"{what} written to {file}")


def check(args: argparse.Namespace, samplers: Sequence[Named]) -> None:
    """Raises: ConfigError, before the work, for options that do not go together or files that cannot be written."""
    if args.output:
        check_output(Path(args.output))
        if Path(args.output).suffix not in WRITERS:
            raise ConfigError(f"--output {args.output}: must end with {', '.join(WRITERS)}. Try rows.json.")
    if args.completions:
        check_output(Path(args.completions), "--completions")
    check_temperature(args.num_samples, samplers[0])


@contextmanager
def open_kept(args: argparse.Namespace, task: Named, samplers: Sequence[Named]) -> Iterator[Kept | None]:
    """Where finished batches are kept until all are: beside the completions, or else beside the rows."""
    if not (args.completions or args.output):
        yield None
        return
    settings: dict[str, Any] = {"unmask": __version__}
    settings |= {key: getattr(args, key) for key in ("model", "baseline", "split", "limit", "batch_size", "seed")}
    settings |= {"num_samples": args.num_samples, "lengths": [sampler.value.gen_length for sampler in samplers]}
    for part, named in (("task", task), *((f"sampler {n}", sampler) for n, sampler in enumerate(samplers, start=1))):
        settings |= {f"{part} {key}": value for key, value in to_table(named.value, named.name).items()}
    kept = Kept(Path(f"{args.completions or args.output}.partial"))
    try:
        kept.check("the command's", settings)
        yield kept
    finally:
        kept.close()


def evaluate(
    args: argparse.Namespace, task: Named, samplers: Sequence[Named], view: View, kept: Kept | None
) -> tuple[list[dict[str, Any]], list[Answer]]:
    """The rows, compared with the baseline if there is one, and all completions of the model."""
    settings: dict[str, Any] = {
        "split": args.split,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "num_samples": args.num_samples,
        "view": view,
        "kept": kept,
    }
    found = evaluation_rows(args.model, task, samplers, **settings)
    rows = [row for row, _ in found]
    if args.baseline:
        others = evaluation_rows(args.baseline, task, samplers, role="baseline", **settings)
        for (row, own), (other, theirs) in zip(found, others, strict=True):
            row |= {"baseline": other["model"], "baseline_accuracy": other["accuracy"]}
            row |= compare(own, theirs, args.num_samples)
    return rows, [answer for _, answers in found for answer in answers]


def pace(args: argparse.Namespace, length: int | None) -> dict[str, int | None]:
    """Steps and block of a length: as given, else the preset's."""
    given = {"num_steps": args.num_steps, "block_length": args.block_length}
    if not args.preset or length is None:
        return given
    protocol = PROTOCOLS[args.preset]
    own = {"num_steps": protocol.num_steps(args.task, length), "block_length": min(protocol.block_length, length)}
    known = getattr(SAMPLERS.get(args.sampler), "__dataclass_fields__", {})  # Dream's has no blocks, WINO no steps
    return {key: own[key] if value is None and key in known else value for key, value in given.items()}


def facts(row: Mapping[str, Any]) -> list[str]:
    """What has no column: failures, pace, pass@k, and the difference to a baseline."""
    numbers = [f"{key} {100 * row[key]:.1f} %" for key in row if key.startswith("pass@")]
    if numbers:
        numbers.append(f"{100 * row['unique_completion_rate']:.0f} % of completions are unique")
    numbers += [f"{100 * row['parse_failures']:.1f} % not parsed", f"{row['tokens_per_second']:.0f} tokens/s"]
    lines = [f"{row['gen_length']} tokens: {', '.join(numbers)}"]
    if "difference" in row:
        low, high = (100 * bound for bound in row["difference_ci95"])
        lines.append(
            f"{row['gen_length']} tokens, {row['baseline']}: {100 * row['baseline_accuracy']:.1f} %; "
            f"difference {100 * row['difference']:+.1f} points ({low:+.1f} to {high:+.1f}), "
            f"{row['won']} examples won, {row['lost']} lost"
        )
    return lines


def write_completions(file: Path, answers: Sequence[Answer]) -> None:
    """One row for each completion, with what was asked and how it was judged."""
    rows = [{key: value for key, value in asdict(answer).items() if key != "nfe"} for answer in answers]
    write_atomic(file, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A heading and a line for each row."""
    shares = list(dict.fromkeys(k for row in rows for k in row if k.endswith("_accuracy") or k.startswith("pass@")))
    names = [key.removesuffix("_accuracy") for key in shares]
    has_baseline = any("difference" in row for row in rows)
    rates = {"parse_failures": "unparsed, %", "unique_completion_rate": "unique, %"}
    rates = {key: name for key, name in rates.items() if any(key in row for row in rows)}
    heading = ["model", "task", "examples", "tokens", "steps", "accuracy, %", "95 % interval", *names]
    lines = [heading + ["difference, points"] * has_baseline + [*rates.values(), "tokens/s"]]
    for row in rows:
        low, high = (f"{100 * bound:.1f}" for bound in row["ci95"])
        line = [Path(row["model"]).name, row["task"], str(row["num_examples"]), str(row["gen_length"])]
        line += [str(row["num_steps"]), f"{100 * row['accuracy']:.1f}", f"{low} to {high}"]
        line += [f"{100 * row[key]:.1f}" if key in row else "-" for key in shares]
        if has_baseline:
            bounds = " to ".join(f"{100 * bound:+.1f}" for bound in row["difference_ci95"])
            line.append(f"{100 * row['difference']:+.1f} ({bounds})")
        line += [f"{100 * row[key]:.1f}" for key in rates]
        lines.append([*line, f"{row['tokens_per_second']:.0f}"])
    return lines


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(plain(list(rows)), indent=2) + "\n"


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(*cells(rows)) + "\n"


def as_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    return latex_table(*cells(rows)) + "\n"


WRITERS = {".json": as_json, ".md": as_markdown, ".tex": as_latex}
"""How rows are written, by the file's ending."""


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
