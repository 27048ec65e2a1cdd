"""Options and steps shared by the commands that run a recipe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unmask.api import recipe_tables, run_name
from unmask.build import Recipe
from unmask.cli.view import print_rows
from unmask.config import apply_overrides, differences, read_recipe
from unmask.errors import ConfigError
from unmask.launch import summary_table
from unmask.plan import plan_run, plan_text
from unmask.ranks import rank
from unmask.runs import RunDirectory


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a TOML recipe, such as recipes/sudoku-espo.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as optimizer.lr=3e-4")
    parser.add_argument("--output", metavar="DIR", help="run directory (default: runs/<recipe>-<date>-<time>)")
    parser.add_argument("--resume", metavar="DIR", help="go on with a stopped run, as if it had never stopped")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="with --resume: a key of the recipe that may differ"
    )
    parser.add_argument("--quiet", action="store_true", help="show nothing but the result")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, the plan and the hours; write nothing"
    )


def read(args: argparse.Namespace, check: Callable[[Any, Path], Recipe]) -> tuple[Recipe, Path]:
    """The checked recipe and the run directory. Raises: ConfigError."""
    if args.resume and args.dry_run:
        raise ConfigError("--dry-run plans a new run and cannot say what is left of one. Drop it or --resume.")
    if args.resume:
        return read_resumed(args, check)
    if args.allow:
        raise ConfigError(f"--allow {args.allow[0]}: goes with --resume. Drop it, or name the run with --resume DIR.")
    if args.recipe is None:
        raise ConfigError("no recipe given. Name a TOML file, such as recipes/sudoku-espo.toml, or --resume DIR.")
    if args.output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes need one run directory, and no --output is given. Name one.")
    return check(*recipe_tables(args.recipe, args.overrides)), Path(args.output or run_name(args.recipe))


def print_result(recipe: Recipe, summary: Mapping[str, Any], output: Path) -> None:
    """The rows before and after, and where everything is; from the first process only."""
    if rank() != 0:
        return
    if rows := summary_table(summary):
        print_rows(rows, f"{recipe.algorithm.name} on {summary['task']}, seed {recipe.seed}")
    print(f"{summary['seconds']:.0f} seconds. Everything is in {output} (model/ holds the trained weights).")


def print_plan(recipe: Recipe, output: Path) -> None:
    """The plan of a run on standard output, if `output` could take it."""
    RunDirectory(output).check_new()
    text = plan_text(plan_run(recipe))
    if rank() == 0:
        print(text)


def read_resumed(args: argparse.Namespace, check: Callable[[Any, Path], Recipe]) -> tuple[Recipe, Path]:
    """The recipe of a stopped run. A recipe or overrides given beside it must agree, but for the --allow keys."""
    run = Path(args.resume)
    if args.output:
        raise ConfigError("--output goes with a new run; --resume writes where the run began. Drop one of them.")
    if not (run / "config.toml").is_file():
        raise ConfigError(f"--resume {run}: no config.toml there. Name the directory of a run.")
    began = read_recipe(run / "config.toml")
    overrides, given, directory = list(args.overrides), began, run
    if args.recipe and "=" in args.recipe:  # with --resume the recipe may be left out before overrides
        overrides.insert(0, args.recipe)
    elif args.recipe:
        given, directory = read_recipe(args.recipe), Path(args.recipe).parent
    recipe = check(apply_overrides(given, overrides), directory)
    own = check(began, run).tree()  # with the defaults of keys that are newer than the run
    changed = [key for key in differences(own, recipe.tree()) if key not in args.allow]
    if changed:
        raise ConfigError(
            f"--resume {run}: the recipe differs in {', '.join(changed)}. "
            f"Drop the change, or keep it knowingly with --allow {changed[0]}."
        )
    return recipe, run
