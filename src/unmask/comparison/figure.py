"""Learning curves over rollouts: the mean of each arm over its seeds, and a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.comparison.measures import curves
from unmask.comparison.planning import Comparison
from unmask.figures import load_pyplot, save_figure
from unmask.intervals import Interval, mean_interval

PANELS = {"accuracy": "held-out accuracy", "reward": "reward of rollouts"}

WIDTH = 12.0
"""Inches."""

MAX_BANDS = 6
"""Arms up to which bands are drawn: more hide each other, and the table has the intervals."""


def mean_curve(seeds: Sequence[Mapping[int, float]]) -> list[tuple[int, Interval]]:
    """(x, mean and interval over seeds) where every seed has a value, in the order of x."""
    if not seeds:
        return []
    shared = sorted(set(seeds[0]).intersection(*seeds[1:]))
    return [(x, mean_interval([curve[x] for curve in seeds])) for x in shared]


def draw(comparison: Comparison, file: Path) -> None:
    """A panel of held-out accuracy and one of reward; finished runs only.

    Raises: ConfigError if matplotlib is not installed.
    """
    pyplot = load_pyplot()
    drawn = {
        arm.label: [curves(r) for r in comparison.runs if r.arm is arm and r.is_finished] for arm in comparison.arms
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, 4.5), constrained_layout=True)
    has_bands = len(drawn) <= MAX_BANDS
    colours, styles = pyplot.get_cmap("tab10").colors, ("-", "--", ":", "-.")
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for number, (label, seeds) in enumerate(drawn.items()):
            look = (colours[number % len(colours)], styles[number // len(colours) % len(styles)])
            draw_arm(axis, label, mean_curve([curve[key] for curve in seeds]), *look, has_band=has_bands)
        seen = [value for seeds in drawn.values() for curve in seeds for value in curve[key].values()]
        if seen and min(seen) < max(seen):  # two seeds can have bands many times as wide as all that was seen
            margin = 0.05 * (max(seen) - min(seen))
            axis.set_ylim(min(seen) - margin, max(seen) + margin)
        axis.set_title(f"{title}, mean{' and 95 % interval' * has_bands} over seeds", fontsize=10)
        axis.set_xlabel("rollouts")
        axis.grid(alpha=0.25)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = legend_columns(list(handles))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8)
    save_figure(figure, file, dpi=130)


def legend_columns(labels: Sequence[str]) -> int:
    """As many as fit side by side: a sample line of half an inch, and 0.065 inches for a character."""
    return max(1, min(6, len(labels), int(WIDTH / (0.5 + 0.065 * max(map(len, labels))))))


def draw_arm(
    axis: Any, label: str, points: Sequence[tuple[int, Interval]], colour: Any, style: str, *, has_band: bool = True
) -> None:
    """A line and its band; nothing for an arm without points, no band for one seed."""
    if not points:
        return
    x = [x for x, _ in points]
    axis.plot(x, [found.mean for _, found in points], color=colour, linestyle=style, linewidth=1.3, label=label)
    if has_band and all(found.low is not None for _, found in points):
        low, high = zip(*((found.low, found.high) for _, found in points), strict=True)
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
