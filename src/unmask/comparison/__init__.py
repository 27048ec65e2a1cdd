"""Several algorithms on one task with equal rollouts: arms x seeds as parallel runs, one table, one figure.

    arms.py        NAME:KEY=VALUE -> checked recipes            planning.py   the plan, its directory, who may go on
    processes.py   one child process for each run               measures.py   numbers of a finished run
    statistics.py  means and intervals over seeds               results.py    all of it as one tree: table.json
    tables.py      the tree as Markdown and LaTeX               figure.py     learning curves

No algorithm is known by name: what an arm is, its recipe says.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch

from unmask.comparison.figure import draw
from unmask.comparison.measures import accuracies, read_json, share_done
from unmask.comparison.planning import (
    Comparison,
    Run,
    check_directory,
    only_here,
    plan_comparison,
    read_flops,
    write_plan,
)
from unmask.comparison.processes import Machine, most_threads, read_record, run_all, this_machine
from unmask.comparison.results import summarise
from unmask.comparison.tables import cells, latex, markdown
from unmask.errors import ConfigError, Stopped
from unmask.launch import cached_base
from unmask.run_log import StopRequest, View
from unmask.runs import plain, write_atomic

PARTS = 1000
"""Steps of the progress: thousandths of the work."""

__all__ = ["Comparison", "Jobs", "cells", "check_directory", "compare", "has_failed", "jobs_here", "plan_comparison"]


@dataclass(frozen=True)
class Jobs:
    """How many children there are at a time, and what each may use."""

    machine: Machine
    count: int
    threads: int

    def environment(self, slot: int) -> dict[str, str]:
        return self.machine.environment(slot, self.threads)

    def tree(self) -> dict[str, Any]:
        """For table.json and the notes of the table."""
        return {
            "jobs": self.count,
            "threads": self.threads,
            "cores": self.machine.num_cores,
            "devices": len(self.machine.devices),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }


def jobs_here(num_runs: int, wanted: int | None) -> Jobs:
    """Of this machine. Raises: ConfigError if more are wanted than there are cores."""
    machine = this_machine(torch.cuda.device_count())
    return Jobs(machine, *machine.share(num_runs, wanted, most_threads()))


def compare(comparison: Comparison, jobs: Jobs, view: View) -> dict[str, Any]:
    """Make the missing runs, then table.md, table.json, table.tex and curves.png; returns the tree of table.json.

    A run that fails is in the tree with its error; the others go on. Bases that are not in the cache are trained first,
    one after the other, because two runs would train the same one.
    Raises: ConfigError before anything is made, Stopped if the process was asked to stop.
    """
    if not check_directory(comparison):
        write_plan(comparison)
    with only_here(comparison.directory) as lock:
        if any(not run.is_finished for run in comparison.runs):
            for recipe, seed in comparison.missing_bases():
                cached_base(recipe, seed, view)
            make_runs(comparison, jobs, view, lock)
        tree = summarise(comparison, jobs.tree())
        write_tables(comparison, tree, view)
    return tree


def make_runs(comparison: Comparison, jobs: Jobs, view: View, lock: int) -> None:
    """All runs that are not finished. Raises: Stopped when asked to, once every child has ended."""
    runs, stop = comparison.runs, StopRequest()
    progress = Progress(comparison, view)

    def on_end(run: Run) -> None:
        if run.is_finished:
            rows = accuracies(read_json(run.path / "summary.json")["final"])
            text = ", ".join(f"{100 * value:.1f} % {key.removeprefix('accuracy')}" for key, value in rows.items())
            view.note(f"{run.arm.label}, seed {run.seed}: finished{', ' + text if text else ''}")
        elif error := read_record(run).get("error"):
            view.note(f"{run.arm.label}, seed {run.seed}: failed: {error}")

    def on_poll() -> None:
        progress.update()
        if stop.signal_number and not progress.is_stopping:
            progress.is_stopping = True
            view.note("stopping: every run writes a checkpoint first. Ctrl-C once more ends them at once.")

    missing = [run for run in runs if not run.is_finished]
    with stop.listening():
        run_all(missing, jobs.count, jobs.environment, lock, stop, on_poll=on_poll, on_end=on_end)
    if stop.signal_number:
        finished = sum(run.is_finished for run in runs)
        raise Stopped(f"stopped with {finished} of {len(runs)} runs finished and the others kept.", stop.signal_number)


class Progress:
    """Moves the view by the work that the runs have made, FLOPs where they are known: arms cost differently."""

    def __init__(self, comparison: Comparison, view: View):
        self.runs, self.view, self.is_stopping = comparison.runs, view, False
        self.flops = read_flops(comparison)
        known = [sum(found.values()) for found in self.flops.values() if found]
        self.middle = sum(known) / len(known) if known else 1.0
        self.shown = self.done()
        arms, seeds = len(comparison.arms), len(comparison.seeds)
        title = f"comparing {arms} {'arms' if arms > 1 else 'arm'} x {seeds} {'seeds' if seeds > 1 else 'seed'}"
        view.stage(f"{title}, thousandths of the work", PARTS, self.shown)

    def work(self, run: Run) -> tuple[float, float]:
        """(of the whole run, share of it that is evaluating)."""
        found = self.flops[run.arm.label]
        total = sum(found.values()) if found else self.middle
        return total, found["evaluation"] / total if found else 0.0

    def done(self) -> int:
        """Thousandths."""
        made = total = 0.0
        for run in self.runs:
            work, evaluation = self.work(run)
            total += work
            made += work * share_done(run, evaluation)
        return int(PARTS * made / total)

    def update(self) -> None:
        done = self.done()
        if done > self.shown:  # a run that is resumed forgets what followed its checkpoint
            self.view.advance(done - self.shown)
            self.shown = done


def write_tables(comparison: Comparison, tree: dict[str, Any], view: View) -> None:
    """The files that a comparison is made for. Without matplotlib there is no figure, and that is said."""
    directory = comparison.directory
    write_atomic(directory / "table.json", json.dumps(plain(tree), indent=2, ensure_ascii=False) + "\n")
    write_atomic(directory / "table.md", markdown(tree))
    write_atomic(directory / "table.tex", latex(tree))
    try:
        draw(comparison, directory / "curves.png")
    except ConfigError as error:
        view.note(f"no figure: {error}, and give the same command again: finished runs are kept.")


def has_failed(tree: dict[str, Any]) -> bool:
    """Some run of the comparison failed."""
    return any(run["error"] for arm in tree["arms"] for run in arm["runs"].values())
