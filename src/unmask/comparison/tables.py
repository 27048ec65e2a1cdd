"""The tree of results as text: Markdown, LaTeX, and what the terminal shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unmask.tables import latex_table, markdown_table

NONE = "-"
FAILED = "failed"


@dataclass(frozen=True)
class Column:
    """A number of the table: its key in the tree, its heading, and how a value is written."""

    key: str
    title: str
    write: Callable[[float], str]


def columns(tree: Mapping[str, Any]) -> list[Column]:
    """In reading order; accuracies first."""
    accuracies = [Column(key, f"{key.replace('@', ' @')}, %", percent) for key in tree["accuracies"]]
    return [
        *accuracies,
        Column("reward_std", "reward deviation", lambda x: f"{x:.3f}"),
        Column("ess", "ESS, %", percent),
        Column("peak_memory_bytes", "peak memory, MiB", lambda x: f"{x / 2**20:,.0f}"),
        Column("tokens_per_second", "tokens/s", significant),
        Column("relative_cost", "relative cost", lambda x: f"{x:.2f}"),
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def significant(value: float) -> str:
    """Three digits, without an exponent."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, digits):,.{max(0, digits)}f}"


def interval_text(found: Mapping[str, Any] | None, write: Callable[[float], str]) -> str:
    """mean (low to high); the mean alone where there is no interval; - where nothing was measured."""
    if found is None:
        return NONE
    if found["ci95"] is None:
        return write(found["mean"])
    low, high = found["ci95"]
    return f"{write(found['mean'])} ({write(low)} to {write(high)})"


def cells(tree: Mapping[str, Any]) -> list[list[str]]:
    """The table as text, heading first: the base, which is step 0, and every arm."""
    shown = columns(tree)
    main = shown[0].key if tree["accuracies"] else ""
    titles = ["arm", "seeds", "rollouts", "FLOPs", *(c.title for c in shown)]
    titles.insert(5 if main else 4, f"difference to {tree['first']}")
    rows = [titles]
    base = {"label": "base (step 0)", "runs": {}, "rollouts": 0, "flops": None, **tree["base"]}
    for entry in (base, *tree["arms"]):
        states = [run["state"] for run in entry["runs"].values()]
        blank = FAILED if FAILED in states and "finished" not in states else NONE
        numbers = [interval_text(entry["statistics"].get(c.key), c.write) for c in shown]
        difference = entry["difference"].get(main) if entry["label"] != tree["first"] else None
        numbers.insert(1 if main else 0, interval_text(difference, signed_points))
        flops = f"{entry['flops']['training']:.2e}" if entry["flops"] else NONE
        row = [entry["label"], seeds_text(states) or base_seeds(entry, main), f"{entry['rollouts']:,}", flops]
        rows.append(row + [blank if text == NONE else text for text in numbers])
    return rows


def signed_points(value: float) -> str:
    """Percentage points."""
    return f"{100 * value:+.1f}"


def seeds_text(states: list[str]) -> str:
    """`3`, or `2 of 3, 1 failed`."""
    finished, failed = states.count("finished"), states.count(FAILED)
    if finished == len(states):
        return str(finished) if states else ""
    return f"{finished} of {len(states)}" + (f", {failed} failed" if failed else "")


def base_seeds(entry: Mapping[str, Any], main: str) -> str:
    found = entry["statistics"].get(main)
    return str(found["count"]) if found else "0"


def notes(tree: Mapping[str, Any]) -> list[str]:
    """What the numbers are, how they were got, and what is missing."""
    machine = tree["machine"]
    lines = [
        f"Mean over seeds {', '.join(map(str, tree['seeds']))} (95 % interval by Student's t over seeds; one seed has "
        "none). Intervals are not cut at 0 or 100 %.",
        "Accuracy: share of the final split solved by the last weights, @ denoising steps; the first is the main "
        f"number. The difference to {tree['first']} is its, in percentage points, paired by seed.",
        "Reward deviation: standard deviation of rewards within a group, mean over the last quarter of the batches. "
        "ESS: effective sample size as a share of the group, likewise; - where the algorithm has none.",
        "FLOPs: of training (2ND a forward, 4ND a backward), evaluations left out. Peak memory: of the process, or of "
        "its accelerator. Tokens/s: canvas tokens of rollouts per second of collecting, scoring and updating. Relative "
        f"cost: such seconds per rollout, relative to {tree['first']}.",
        f"Processes at a time: {machine['jobs']}, threads of each: {machine['threads']}, cores: {machine['cores']}; "
        f"unmask {tree['unmask']}, torch {machine['torch']}, {machine['date']}.",
        *tree["notes"],
    ]
    for arm in tree["arms"]:
        for seed, run in arm["runs"].items():
            if run["error"]:
                lines.append(f"{arm['label']}, seed {seed}: {FAILED}: {run['error']}")
    return lines


def markdown(tree: Mapping[str, Any]) -> str:
    """A Markdown table with its notes."""
    lines = [
        f"# {tree['budget']:,} rollouts of {tree['recipe']}",
        "",
        markdown_table(*cells(tree)),
        "",
        *(f"- {line}" for line in notes(tree)),
    ]
    return "\n".join(lines) + "\n"


def latex(tree: Mapping[str, Any]) -> str:
    """A `tabular` in the style of booktabs, with its notes as comments."""
    return latex_table(*cells(tree), notes=notes(tree)) + "\n"
