"""Accuracy of a model on a task: a table on screen, and JSON rows with --output.

  unmask eval runs/mine --task sudoku
  unmask eval runs/mine/model --task sudoku --data puzzles.csv --num-steps 8 --output rows.json

MODEL is a model directory or a run directory. Decoding is greedy and in order of confidence unless told otherwise;
length and steps default to what the task declares. --gen-length takes several lengths, one row each. Task options
follow as key=value, such as prompt=d1 parser=d1.

  unmask eval runs/mine --task gsm8k --preset espo                     128, 256 and 512 tokens as the paper did
  unmask eval runs/mine --task sudoku --baseline runs/base             paired differences, with intervals
  unmask eval runs/mine --task gsm8k --num-samples 8 --temperature 0.9   pass@1, 2, 4, 8
  unmask eval runs/mine --task sudoku --completions completions.jsonl    what was written, with verdicts

The ending of --output says how rows are written: .json, .md (a Markdown table) or .tex (a LaTeX table).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.api import decoding, evaluation_rows, evaluation_task
from unmask.cli.view import open_view, print_rows
from unmask.comparison.tables import escape
from unmask.config import apply_overrides
from unmask.errors import ConfigError
from unmask.evaluation import by_example, paired_difference
from unmask.protocols import LENGTHS, PROTOCOLS, task_options
from unmask.runs import plain, write_atomic
from unmask.samplers import SAMPLERS
from unmask.types import Rollouts


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
    parser.add_argument(
        "--preset", metavar="NAME", help=f"a paper's lengths, steps, prompt and parser: {', '.join(PROTOCOLS)}"
    )
    parser.add_argument("--num-steps", type=int, metavar="N", help="denoising steps (default: one token per step)")
    parser.add_argument("--block-length", type=int, metavar="N", help="semi-autoregressive block (default: one block)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="completions per forward (default: 256)"
    )
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="completions per example, for pass@k (default: 1)"
    )
    parser.add_argument("--baseline", metavar="MODEL", help="another model on the same examples, to compare with")
    parser.add_argument("--completions", metavar="FILE", help="write every completion with its verdict as JSON lines")
    parser.add_argument("--seed", type=int, default=0, help="noise of sampling at temperature above 0 (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("options", nargs="*", metavar="key=value", help="further task options")


def run(args: argparse.Namespace) -> None:
    options = task_options(args.preset, args.task) if args.preset else {}
    task = evaluation_task(args.task, args.data, args.split, apply_overrides(options, args.options))
    samplers = [
        decoding(task, args.sampler, gen_length=length, temperature=args.temperature, **pace(args, length))
        for length in (LENGTHS if args.preset and not args.gen_length else lengths(args.gen_length))
    ]
    if args.output:
        check_output(Path(args.output))
        if Path(args.output).suffix not in WRITERS:
            raise ConfigError(f"--output {args.output}: must end with {', '.join(WRITERS)}. Try rows.json.")
    if args.completions:
        check_output(Path(args.completions), "--completions")
    if args.num_samples > 1 and args.temperature == 0:
        raise ConfigError("--num-samples above 1 at temperature 0 writes the same again. Try --temperature 0.9.")
    settings: dict[str, Any] = {
        "split": args.split,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "num_samples": args.num_samples,
    }
    with open_view(args.quiet) as view:
        found = evaluation_rows(args.model, task, samplers, view=view, **settings)
        if args.baseline:
            others = evaluation_rows(args.baseline, task, samplers, view=view, **settings)
    rows = [row for row, _ in found]
    if args.baseline:
        for (row, own), (other, theirs) in zip(found, others, strict=True):
            row |= {"baseline": other["model"], "baseline_accuracy": other["accuracy"]}
            row |= compare(own, theirs, args.num_samples)
    if args.completions:
        write_completions(Path(args.completions), [rollouts for _, rollouts in found], args.num_samples)
    if args.output:
        write_atomic(Path(args.output), WRITERS[Path(args.output).suffix](rows))
    print_rows([(Path(row["model"]).name, row) for row in rows], f"{args.model} on {args.task}")
    for row in rows:
        print("".join(f"{line}\n" for line in facts(row)), end="")
    for what, file in (("rows", args.output), ("completions", args.completions)):
        if file:
            print(f"{what} written to {file}")


def pace(args: argparse.Namespace, length: int | None) -> dict[str, int | None]:
    """Steps and block of a length: as given, else the preset's."""
    given = {"num_steps": args.num_steps, "block_length": args.block_length}
    if not args.preset or length is None:
        return given
    protocol = PROTOCOLS[args.preset]
    own: dict[str, int | None] = {"num_steps": protocol.num_steps(args.task, length)}
    if "block_length" in getattr(SAMPLERS.get(args.sampler), "__dataclass_fields__", {}):  # Dream's has no blocks
        own["block_length"] = min(protocol.block_length, length)
    return {key: own.get(key) if value is None else value for key, value in given.items()}


def compare(own: Rollouts, theirs: Rollouts, num_samples: int) -> dict[str, Any]:
    """Paired differences of two models' completions of the same examples."""
    means = [[sum(v) / len(v) for v in by_example(rollouts, num_samples)] for rollouts in (own, theirs)]
    return paired_difference(*means)


def facts(row: Mapping[str, Any]) -> list[str]:
    """What has no column: pass@k, and the difference to a baseline."""
    lines = []
    chances = [f"{key} {100 * row[key]:.1f} %" for key in row if key.startswith("pass@")]
    if chances:
        lines.append(f"{', '.join(chances)}; {100 * row['unique_completion_rate']:.0f} % of completions are unique")
    if "difference" in row:
        low, high = (100 * bound for bound in row["difference_ci95"])
        lines.append(
            f"{row['baseline']}: {100 * row['baseline_accuracy']:.1f} %; difference {100 * row['difference']:+.1f} "
            f"points ({low:+.1f} to {high:+.1f}), {row['won']} examples won, {row['lost']} lost"
        )
    return lines


def write_completions(file: Path, evaluations: Sequence[Rollouts], num_samples: int) -> None:
    """One row for each completion, with what was asked and how it was judged."""
    rows = []
    for rollouts in evaluations:
        for place in range(len(rollouts)):
            rows.append(
                {
                    "prompt_id": int(rollouts.prompt_key[place]),
                    "sample": place % num_samples,
                    "gen_length": rollouts.completion_length,
                    "prompt": rollouts.prompts[place],
                    "completion": rollouts.completions[place],
                    "reward": float(rollouts.rewards[place]),
                    "status": rollouts.statuses[place],
                    "length": int(rollouts.length[place]),
                    "facts": dict(rollouts.facts[place]),
                }
            )
    write_atomic(file, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A heading and a line for each row."""
    shares = list(dict.fromkeys(k for row in rows for k in row if k.endswith("_accuracy") or k.startswith("pass@")))
    names = [key.removesuffix("_accuracy") for key in shares]
    has_baseline = any("difference" in row for row in rows)
    heading = ["model", "task", "examples", "tokens", "steps", "accuracy, %", "95 % interval", *names]
    lines = [heading + ["difference, points"] * has_baseline + ["tokens/s"]]
    for row in rows:
        low, high = (f"{100 * bound:.1f}" for bound in row["ci95"])
        line = [Path(row["model"]).name, row["task"], str(row["num_examples"]), str(row["gen_length"])]
        line += [str(row["num_steps"]), f"{100 * row['accuracy']:.1f}", f"{low} to {high}"]
        line += [f"{100 * row[key]:.1f}" if key in row else "-" for key in shares]
        if has_baseline:
            bounds = " to ".join(f"{100 * bound:+.1f}" for bound in row["difference_ci95"])
            line.append(f"{100 * row['difference']:+.1f} ({bounds})")
        lines.append([*line, f"{row['tokens_per_second']:.0f}"])
    return lines


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(plain(list(rows)), indent=2) + "\n"


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    heading, *lines = cells(rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heading, ["---"] * len(heading), *lines)) + "\n"


def as_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    heading, *lines = [[escape(text) for text in line] for line in cells(rows)]
    body = [" & ".join(line) + " \\\\" for line in lines]
    head = [
        f"\\begin{{tabular}}{{ll{'r' * (len(heading) - 2)}}}",
        "\\toprule",
        " & ".join(heading) + " \\\\",
        "\\midrule",
    ]
    return "\n".join(["% \\usepackage{booktabs}", *head, *body, "\\bottomrule", "\\end{tabular}"]) + "\n"


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
