"""What sampler settings cost and what they solve, on the same examples: the front of speed and accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmask.errors import DataError
from unmask.figures import load_pyplot, save_figure
from unmask.intervals import paired_difference, wilson
from unmask.rollout import TextPolicy, draw_samples, encode, judged
from unmask.tables import markdown_table
from unmask.types import Example, NoiseLike, Sampler, Status, Task

THRESHOLDS = (0.9, 0.99, 0.999, 0.9999, 0.99999)
"""Models that were trained for long on little are sure of much: the published 0.9 may be all too low."""

MARGIN = 0.01
"""Accuracy that a setting may lose and still be named the fastest: one point."""


@dataclass
class Measured:
    """One setting of the sampler on all examples."""

    name: str
    sampler: Sampler
    correct: list[float] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    seconds: float = 0.0
    """Of sampling, on the clock."""

    @property
    def accuracy(self) -> float:
        """Share of examples solved."""
        return sum(self.correct) / len(self.correct)

    @property
    def forwards_per_completion(self) -> float:
        """Mean."""
        return sum(self.forwards) / len(self.forwards)

    @property
    def cache(self) -> str:
        """Which cache its sampler has."""
        return getattr(self.sampler, "cache", "none")


def settings(
    num_steps: int, gen_length: int, *, has_windows: bool, has_shadows: bool, has_blocks: bool
) -> dict[str, dict[str, Any]]:
    """Names and fields of the settings that are compared; the first is the reference, as the task is evaluated.

    Fewer steps, thresholds, factors and entropy bounds; with caches, the reference and every other threshold; WINO at
    three pairs of thresholds, the published one first. A dual cache is one of its own only where a completion has
    several blocks. A field `type` names another sampler than `low_confidence`.
    """
    found: dict[str, dict[str, Any]] = {f"{num_steps} steps": {"num_steps": num_steps}}
    for steps in (num_steps // 2, num_steps // 4):
        if steps and not gen_length % steps:
            found[f"{steps} steps"] = {"num_steps": steps}
    found |= {f"threshold {x:g}": {"threshold": x} for x in (0.7, *THRESHOLDS)}
    found |= {f"factor {x:g}": {"factor": x} for x in (1.0, 0.1, 0.01, 0.001)}
    found |= {f"entropy {x:g}": {"entropy_bound": x} for x in (0.1, 0.01, 0.001, 0.0001)}
    if has_windows:
        for cache in ("prefix", "dual") if has_blocks else ("prefix",):
            found[f"{num_steps} steps, {cache}"] = {"num_steps": num_steps, "cache": cache}
            found |= {f"threshold {x:g}, {cache}": {"threshold": x, "cache": cache} for x in THRESHOLDS[::2]}
    if has_shadows:
        for low, high in ((0.6, 0.9), (0.9, 0.99), (0.99, 0.999)):
            found[f"wino {low:g}, {high:g}"] = {"type": "wino", "threshold": low, "verify_threshold": high}
    return found


def measure(
    policy: TextPolicy,
    task: Task,
    examples: Sequence[Example],
    samplers: Mapping[str, Sampler],
    *,
    noise: NoiseLike,
    batch_size: int,
    on_rows: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Every setting on every example. Each batch goes through all settings before the next one does, and from another
    one on, so that a machine that becomes faster or slower does so for all of them alike.

    Raises: DataError if there are no examples.
    """
    if not examples:
        raise DataError("no examples to measure on. Name a split or a data file with at least one row.")
    found = [Measured(name, sampler) for name, sampler in samplers.items()]
    _run(policy, task, examples[:batch_size], Measured("warm-up", found[0].sampler), noise, batch_size)
    for number, first in enumerate(range(0, len(examples), batch_size)):
        part = examples[first : first + batch_size]
        turn = number % len(found)
        for measured in found[turn:] + found[:turn]:
            _run(policy, task, part, measured, noise, batch_size)
            if on_rows:
                on_rows(len(part))
    return found


def _run(
    policy: TextPolicy,
    task: Task,
    part: Sequence[Example],
    measured: Measured,
    noise: NoiseLike,
    batch_size: int,
) -> None:
    """Sample and judge a batch. Only sampling is timed."""
    index = torch.zeros(len(part), dtype=torch.int64)
    texts, batch = encode(policy, part, index, measured.sampler.gen_length)
    _finish(policy)
    began = time.perf_counter()
    (samples,) = draw_samples(
        policy, measured.sampler, [(batch, None)], batch.prompt_ids[:1], noise=noise, batch_size=batch_size
    )
    _finish(policy)
    measured.seconds += time.perf_counter() - began
    rollouts = judged(policy, task, part, texts, batch, samples, index)
    measured.forwards += rollouts.nfe.tolist()
    measured.correct += [
        facts.get("accuracy", float(status == Status.CORRECT))
        for facts, status in zip(rollouts.facts, rollouts.statuses, strict=True)
    ]


def _finish(policy: TextPolicy) -> None:
    """Wait for the accelerator, if there is one."""
    if policy.device.type != "cpu":
        torch.accelerator.synchronize(policy.device)


def rows(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row for each setting: accuracy, its paired difference to the first, forwards, time and speed-up; whether no
    other setting is both faster and more accurate (`is_on_front`)."""
    first = found[0]
    reference = dict(enumerate(first.correct))
    table = []
    for measured in found:
        difference = paired_difference(dict(enumerate(measured.correct)), reference)
        assert difference is not None  # the examples are the same
        total = len(measured.correct)
        table.append(
            {
                "name": measured.name,
                "num_examples": total,
                "accuracy": measured.accuracy,
                "ci95": list(wilson(sum(measured.correct), total)),
                "difference": difference.mean,
                "difference_ci95": None if difference.low is None else [difference.low, difference.high],
                "forwards_per_completion": measured.forwards_per_completion,
                "seconds_per_completion": measured.seconds / total,
                "speedup": first.seconds / measured.seconds,
                "is_on_front": not any(dominates(other, measured) for other in found),
            }
        )
    return table


def dominates(other: Measured, measured: Measured) -> bool:
    """Whether the other is at least as fast and as accurate, and better in one."""
    gains = (measured.seconds - other.seconds, other.accuracy - measured.accuracy)
    return min(gains) >= 0 and max(gains) > 0


def fastest(table: Sequence[Mapping[str, Any]], margin: float = MARGIN) -> Mapping[str, Any]:
    """The fastest setting whose accuracy is at most `margin` below the reference's."""
    return min(
        (row for row in table if row["difference"] >= -margin - 1e-12), key=lambda row: row["seconds_per_completion"]
    )


def words(table: Sequence[Mapping[str, Any]], found: Sequence[Measured], margin: float = MARGIN) -> list[str]:
    """What the table says, in sentences: the fastest setting, and caches that do not help."""
    best, first = fastest(table, margin), table[0]
    saved = first["forwards_per_completion"] / best["forwards_per_completion"]
    pace = f"{best['speedup']:.2f} times as fast, {saved:.2f} times fewer forwards"
    lines = [
        f"fastest within {100 * margin:g} points of {first['name']}: {best['name']}, {pace}, "
        f"{100 * best['difference']:+.2f} points"
    ]
    by_name = {row["name"]: row for row in table}
    for measured in found:
        plain = by_name.get(measured.name.removesuffix(f", {measured.cache}"))
        row = by_name[measured.name]
        if measured.cache != "none" and plain and row["speedup"] <= plain["speedup"]:
            ratio = plain["speedup"] / row["speedup"]
            lines.append(f"the {measured.cache} cache does not help {plain['name']} here: {ratio:.2f} times its time")
    return lines


def as_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; front in the last column."""
    heading = ["setting", "accuracy, %", "difference, points", "forwards", "ms a completion", "speed-up", "front"]
    return markdown_table(heading, *map(cells, table))


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row as text."""
    bounds = "" if row["difference_ci95"] is None else " ({:+.2f} to {:+.2f})".format(
        *(100 * bound for bound in row["difference_ci95"])
    )  # fmt: skip
    return [
        row["name"],
        f"{100 * row['accuracy']:.2f}",
        f"{100 * row['difference']:+.2f}{bounds}",
        f"{row['forwards_per_completion']:.2f}",
        f"{1000 * row['seconds_per_completion']:.2f}",
        f"{row['speedup']:.2f}",
        "yes" if row["is_on_front"] else "",
    ]


def draw(table: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Accuracy over speed-up, the front as a line. Raises: ConfigError if matplotlib is not installed."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for row in table:
        colour = "tab:blue" if row["is_on_front"] else "0.6"
        low, high = row["ci95"]
        axis.plot([row["speedup"]] * 2, [100 * low, 100 * high], color=colour, linewidth=0.8, alpha=0.6)
        axis.plot(row["speedup"], 100 * row["accuracy"], "o", color=colour, markersize=4)
        if not row["is_on_front"]:
            continue
        axis.annotate(
            row["name"], (row["speedup"], 100 * row["accuracy"]), (4, 4), textcoords="offset points", fontsize=7
        )
    front = sorted((row["speedup"], 100 * row["accuracy"]) for row in table if row["is_on_front"])
    axis.plot(*zip(*front, strict=True), color="tab:blue", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel(f"speed relative to {table[0]['name']}")
    axis.set_ylabel("accuracy, %, with 95 % interval")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    save_figure(figure, file, dpi=130)
