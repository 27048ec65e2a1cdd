"""Compare algorithms on one task with equal rollouts: arms x seeds as parallel runs, one table, one figure.

  unmask compare recipes/sudoku.toml --arms espo,wd1 --budget 20480 --output runs/first
  unmask compare recipes/sudoku.toml --arms espo,espo:kl=k3:kl_coef=0.01 --seeds 0,1,2,3 --budget 20480 --output runs/k3
  unmask compare recipes/sudoku.toml --arms 'wd1,wd1:rollout.group_size=16' --budget 20480 --output runs/groups
  unmask compare recipes/sudoku.toml --arms espo,recipes/sudoku-espo-paper.toml --budget 20480 --output runs/paper
  unmask compare recipes/sudoku.toml optimizer.lr=1e-4 --arms espo,wd1 --budget 20480 --output runs/lr --jobs 1
  unmask compare recipes/sudoku.toml --arms espo,wd1 --budget 20480 --output runs/first --dry-run

An arm is NAME[:KEY=VALUE...]. NAME is an algorithm put into the RECIPE (as algorithm.type=NAME), or the TOML file of a
whole recipe. A KEY without a dot is one of the algorithm; one with a dot is any key of the recipe. The first arm is
what the others are compared with. Every arm gets BUDGET rollouts per seed, in whole batches.

Each run is a run directory of its own, OUTPUT/<arm>/seed<N>/, beside its log. At the end there are table.md,
table.json, table.tex and curves.png: mean and 95 % interval over seeds of accuracy, its difference to the first arm
(paired by seed), reward deviation, ESS, peak memory, tokens/s and relative cost, and the FLOPs; docs/compare.md says
how each is measured.

Ctrl-C and SIGTERM stop all runs with a checkpoint. The same command goes on: finished runs are kept, others resumed,
failed ones tried again. A run that fails does not stop the others; the table says so, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unmask.cli.view import open_view
from unmask.comparison import Comparison, Jobs, cells, check_directory, compare, has_failed, jobs_here, plan_comparison
from unmask.errors import Stopped
from unmask.plan import plan_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a TOML recipe that all arms share, such as recipes/sudoku.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys for all arms")
    parser.add_argument(
        "--arms", required=True, metavar="ARM,ARM,...", help="NAME[:KEY=VALUE...]; the first is the bar"
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N,...", help="seeds of every arm (default: 0,1,2)")
    parser.add_argument("--budget", type=int, required=True, metavar="ROLLOUTS", help="rollouts of each arm and seed")
    parser.add_argument("--output", required=True, metavar="DIR", help="where everything goes; the same again goes on")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time, which share the cores (default: one per GPU, else one per core with one thread)",
    )
    parser.add_argument("--quiet", action="store_true", help="show nothing but the result")
    parser.add_argument("--dry-run", action="store_true", help="print arms, batches, FLOPs and hours; write nothing")


def run(args: argparse.Namespace) -> int:
    comparison = plan_comparison(args.recipe, args.overrides, args.arms, args.seeds, args.budget, args.output)
    check_directory(comparison)
    jobs = jobs_here(len(comparison.runs), args.jobs)
    if args.dry_run:
        show_plan(comparison, jobs)
        return 0
    try:
        with open_view(args.quiet) as view:
            for note in comparison.notes:
                view.note(note)
            tree = compare(comparison, jobs, view)
    except Stopped as stopped:
        raise Stopped(f"{stopped} Go on with: {command(args)}", stopped.signal_number) from stopped
    show(tree)
    print(f"Everything is in {comparison.directory}: table.md, table.json, table.tex, curves.png and the runs.")
    return report_failures(tree)


def command(args: argparse.Namespace) -> str:
    """The command line that goes on with this one."""
    words = ["unmask", "compare", args.recipe, *args.overrides, "--arms", args.arms, "--seeds", args.seeds]
    words += ["--budget", str(args.budget), "--output", args.output]
    words += ["--jobs", str(args.jobs)] if args.jobs is not None else []
    return shlex.join(words + (["--quiet"] if args.quiet else []))


def show(tree: dict[str, Any]) -> None:
    """The table on standard output, without what only the files have room for."""
    heading, *rows = cells(tree)
    left_out = {"rollouts", "FLOPs", "peak memory, MiB", "reward deviation", "ESS, %"}
    kept = [i for i, title in enumerate(heading) if title not in left_out]
    table = Table(title=Text(f"{tree['budget']:,} rollouts, mean and 95 % interval over seeds"))
    for i in kept:
        table.add_column(Text(heading[i]), justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in kept))
    (Console() if sys.stdout.isatty() else Console(width=160)).print(table)


def report_failures(tree: dict[str, Any]) -> int:
    """The exit code: 2 if a run failed, with a line for each on standard error."""
    for arm in tree["arms"]:
        for seed, found in arm["runs"].items():
            if found["error"]:
                print(f"failed: {arm['label']}, seed {seed}: {found['error']}", file=sys.stderr)
    if not has_failed(tree):
        return 0
    print("The same command tries failed runs again; each has its log beside its directory.", file=sys.stderr)
    return 2


def show_plan(comparison: Comparison, jobs: Jobs) -> None:
    """What would be made; hours by three measured batches of each arm with as many threads as a run gets."""
    seeds, threads = ", ".join(map(str, comparison.seeds)), torch.get_num_threads()
    print(
        f"arms: {len(comparison.arms)}, seeds: {seeds}, runs at a time: {jobs.count}, threads of each: {jobs.threads}"
    )
    line = "{:40s} {:>8s} {:>10s} {:>10s} {:>10s}"
    print(line.format("arm", "batches", "rollouts", "FLOPs", "hours"))
    hours = []
    torch.set_num_threads(jobs.threads)
    try:
        for arm in comparison.arms:
            plan = plan_run(arm.with_seed(comparison.seeds[0]))
            hours.append(sum(plan.hours.values()))
            flops = f"{plan.flops:.2e}"
            numbers = (f"{arm.num_batches:,}", f"{arm.rollouts:,}", flops, f"{hours[-1]:.3f}")
            print(line.format(arm.label, *numbers), flush=True)
    finally:
        torch.set_num_threads(threads)
    total = sum(hours) * len(comparison.seeds)
    print(
        f"hours of a run, by 3 measured batches; all runs: {total:.3f}, at best {total / jobs.count:.3f} by the clock"
    )
    for recipe, seed in comparison.missing_bases():
        print(f"trained first, and not in these hours: the base {recipe.name}, seed {seed}")
    for note in comparison.notes:
        print(f"note: {note}")
