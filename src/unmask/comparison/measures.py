"""Numbers of finished runs, from their directories."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.comparison.planning import Run
from unmask.comparison.processes import read_record
from unmask.errors import DataError
from unmask.runs import read_rows

PHASES = ("collect", "score", "update")
"""Columns of timing.jsonl that make the cost of training; evaluations are none of it."""

LAST_SHARE = 0.25
"""Share of the batches, the last ones, over which what drifts through a run is averaged."""

TAIL_BYTES = 1 << 16


def measure(run: Run) -> dict[str, float]:
    """What the table shows of a finished run; what its algorithm or its recipe does not log is absent.

        accuracy@S           share of the final split solved in S denoising steps, by the last weights
        reward_std           reward units, spread within a group, mean over the last quarter of the batches
        ess                  share of the group size, likewise, over the updates
        peak_memory_bytes    of the process at its highest; of its accelerator where there is one
        tokens_per_second    canvas tokens of rollouts per second of training
        seconds_per_rollout  wall, collecting, scoring and updating

    Raises: DataError if a log is damaged.
    """
    try:
        summary = read_json(run.path / "summary.json")
        metrics, timing = read_rows(run.path / "metrics.jsonl"), read_rows(run.path / "timing.jsonl")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run.path}: a log is damaged ({error}). Remove the directory to make the run anew."
        ) from error
    found = accuracies(summary["final"])
    for key in ("reward_std", "ess"):
        if (value := last_mean(metrics, key, run.arm.num_batches)) is not None:
            found[key] = value
    memory = summary.get("peak_device_bytes") or read_record(run).get("peak_memory_bytes")
    if memory:
        found["peak_memory_bytes"] = float(memory)
    seconds = sum(row.get(phase, 0.0) for row in timing for phase in PHASES)
    if seconds > 0:
        found["seconds_per_rollout"] = seconds / run.arm.rollouts
        found["tokens_per_second"] = run.arm.completion_tokens * run.arm.rollouts / seconds
    return found


def base_accuracies(run: Run) -> dict[str, float]:
    """Of the model before training: step 0. Empty for supervised training, which does not evaluate it."""
    return accuracies(read_json(run.path / "summary.json")["base"])


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """accuracy@S for the rows of a summary, in their order: the first is the main number."""
    return {f"accuracy@{row['num_steps']}": float(row["accuracy"]) for row in rows}


def last_mean(metrics: Sequence[Mapping[str, Any]], key: str, num_batches: int) -> float | None:
    """Mean of a column over the updates of the last quarter of the batches (one batch at least); None if not logged."""
    begin = min(math.floor(num_batches * (1 - LAST_SHARE)), num_batches - 1)
    values = [row[key] for row in metrics if row["iteration"] >= begin and row.get(key) is not None]
    return math.fsum(values) / len(values) if values else None


def curves(run: Run) -> dict[str, dict[int, float]]:
    """{"reward", "accuracy"}: values over rollouts made; the reward of a batch stands at those made before it."""
    made = run.arm.made
    file = run.path / "evaluations.jsonl"
    evaluations = read_rows(file) if file.is_file() else []
    metrics = [row for row in read_rows(run.path / "metrics.jsonl") if row.get("reward") is not None]
    return {
        "reward": {made[row["iteration"]]: row["reward"] for row in metrics},
        "accuracy": {made[row["iteration"] + 1]: row["accuracy"] for row in evaluations},
    }


def share_done(run: Run, evaluation_share: float) -> float:
    """Share of the run's work that is made, by batches; half of its evaluating is taken to come after the last."""
    if run.is_finished:
        return 1.0
    row = last_row(run.path / "metrics.jsonl")
    batches = (row["iteration"] + 1) / run.arm.num_batches if row else 0.0
    return batches * (1 - evaluation_share / 2)


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a log that may be growing; None if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
        return dict(json.loads(lines[-2])) if len(lines) > 1 else None
    except (OSError, ValueError):
        return None
