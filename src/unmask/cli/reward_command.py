"""What the reward of a recipe says about completions, without a model.

  unmask reward test recipes/sudoku.toml
  unmask reward test examples/own_task/recipe.toml --completion "44440000" --split validation --limit 5
  unmask reward rescore runs/mine

`test` judges a few completions for each of the first prompts: those given with --completion, else an empty one, the
prompt itself and, where the data has one, the reference. `rescore` judges every completion of a run's rollouts.jsonl
again and ends with exit code 2 if a reward or a status is another one than the run saw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unmask.api import recipe_tables
from unmask.build import any_recipe
from unmask.config import read_recipe
from unmask.errors import ConfigError, DataError
from unmask.preferences import read_rollouts
from unmask.rollout import judge
from unmask.types import Example, Score, Task

BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["test", "rescore"], help="sample completions, or a run's own")
    parser.add_argument("source", metavar="RECIPE|RUN", help="test: a TOML recipe; rescore: a run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as task.reward=solved")
    parser.add_argument("--completion", action="append", default=[], metavar="TEXT", help="a completion to judge")
    parser.add_argument("--split", default="train", help="of the prompts (default: train)")
    parser.add_argument("--limit", type=int, default=3, metavar="N", help="prompts (default: 3)")


def run(args: argparse.Namespace) -> None:
    if args.action == "rescore":
        rescore(Path(args.source))
        return
    if args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: must be at least 1. Try 3.")
    task = task_of(*recipe_tables(args.source, args.overrides))
    examples = task.examples(args.split)[: args.limit]
    pairs = [(example, text) for example in examples for text in args.completion or samples(example)]
    show(pairs, judge(task, [example for example, _ in pairs], [text for _, text in pairs]))


def task_of(tree: dict, directory: Path) -> Task:
    """The task of a recipe. Raises: ConfigError if it has none."""
    task = any_recipe(tree, directory).task
    if task is None:
        raise ConfigError("the recipe has no [task], and so no reward. Name a task.")
    return task.value  # type: ignore[no-any-return]


def samples(example: Example) -> list[str]:
    """Nothing, the prompt again, and the reference."""
    prompt = example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])
    reference = example.columns.get("solution")
    return ["", prompt, *([str(reference)] if reference is not None else [])]


def show(pairs: Sequence[tuple[Example, str]], scores: Sequence[Score]) -> None:
    """A row for each completion."""
    table = Table()
    for column in ("prompt", "completion", "reward", "status", "facts"):
        table.add_column(column, justify="right" if column == "reward" else "left")
    for (example, text), score in zip(pairs, scores, strict=True):
        facts = ", ".join(f"{name} {value:g}" for name, value in score.facts.items())
        shown = text.replace("\n", "⏎")
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        table.add_row(str(example.id), Text(shown), f"{score.value:.4f}", str(score.status), facts)
    (Console() if sys.stdout.isatty() else Console(width=160)).print(table)


def rescore(directory: Path) -> None:
    """Judge a run's completions again. Raises: DataError naming the first that is judged otherwise."""
    rows = [row for row in read_rollouts(directory) if row.get("status") != "given"]
    if not (directory / "config.toml").is_file():
        raise ConfigError(f"{directory}: no config.toml there. Name the directory of a run.")
    task = task_of(read_recipe(directory / "config.toml"), directory)
    examples = {example.id: example for example in task.examples("train")}
    others, first = 0, ""
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        missing = next((row for row in part if row["prompt_id"] not in examples), None)
        if missing:
            raise DataError(f"{directory}: prompt {missing['prompt_id']} is no example of the task. Restore its data.")
        scores = judge(task, [examples[row["prompt_id"]] for row in part], [row["completion"] for row in part])
        for number, (row, score) in enumerate(zip(part, scores, strict=True), start=start + 1):
            if (row["reward"], row["status"]) != (score.value, str(score.status)):
                others += 1
                first = first or (
                    f"row {number}: {row['reward']:g} ({row['status']}) then, {score.value:g} ({score.status}) now"
                )
    print(f"{len(rows):,} completions judged again, {len(rows) - others:,} with the same reward and status")
    if others:
        raise DataError(f"{directory}: {others} of {len(rows)} are judged otherwise, at first {first}.")
