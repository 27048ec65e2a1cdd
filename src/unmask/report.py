"""Figures from run directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.figures import load_pyplot, save_figure
from unmask.runs import read_rows

PANELS = {
    "reward of rollouts": "reward",
    "ELBO of rollouts, nats per token": "elbo_per_token",
    "KL to the base, nats per token": "kl",
}
"""Panels drawn from metrics.jsonl, beside held-out accuracy."""


def load_run(path: Path) -> dict[str, Any]:
    """Metrics (one row per batch), evaluations and summary of a run directory. Raises: DataError if it is none."""
    if not (path / "metrics.jsonl").is_file():
        raise DataError(f"{path}: no metrics.jsonl there. Name the directory of a run.")
    try:
        metrics = {row["iteration"]: row for row in read_rows(path / "metrics.jsonl")}
        evaluations = read_rows(path / "evaluations.jsonl") if (path / "evaluations.jsonl").exists() else []
        summary = path / "summary.json"
        content = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: a log is damaged ({error}). Resume the run, which mends its logs.") from error
    return {"name": path.name, "metrics": list(metrics.values()), "evaluations": evaluations, "summary": content}


def draw_curves(runs: Sequence[Path], file: Path) -> None:
    """Held-out accuracy and the main metrics over updates, one line per run, as an image (by the file's ending)."""
    loaded = [load_run(run) for run in runs]
    figure, axes = load_pyplot().subplots(2, 2, figsize=(10, 6.5), constrained_layout=True)
    accuracy, *others = axes.flat
    for run in loaded:
        rows = run["evaluations"]
        steps, values = [row["step"] for row in rows], [row["accuracy"] for row in rows]
        (line,) = accuracy.plot(steps, values, marker="o", markersize=3, label=run["name"])
        if rows:
            low, high = zip(*(row["ci95"] for row in rows), strict=True)
            accuracy.fill_between(steps, low, high, alpha=0.12, color=line.get_color())
        for axis, key in zip(others, PANELS.values(), strict=True):
            points = [(row["step"], row[key]) for row in run["metrics"] if key in row]
            axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1, label=run["name"])
    for axis, title in zip(axes.flat, ["held-out accuracy, 95 % interval", *PANELS], strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.25)
    accuracy.legend(fontsize=8)
    save_figure(figure, file)
