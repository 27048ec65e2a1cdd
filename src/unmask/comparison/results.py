"""From the numbers of runs to what a comparison says: means and differences over seeds, as one JSON tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unmask import __version__
from unmask.comparison.measures import base_accuracies, measure
from unmask.comparison.planning import Comparison, Run, read_flops
from unmask.comparison.processes import read_record
from unmask.intervals import mean_interval, paired_difference, paired_ratio

COST = "relative_cost"


@dataclass(frozen=True)
class Result:
    """One run: its numbers if it is finished, else why it is not."""

    is_finished: bool
    values: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def state(self) -> str:
        return "finished" if self.is_finished else "failed" if self.error else "not made"


def read_result(run: Run) -> Result:
    if run.is_finished:
        return Result(True, measure(run), base_accuracies(run))
    return Result(False, error=read_record(run).get("error"))


def summarise(comparison: Comparison, machine: Mapping[str, Any]) -> dict[str, Any]:
    """table.json: every run; for each arm mean and interval of every number, and of its difference to the first arm."""
    results = {(run.arm.label, run.seed): read_result(run) for run in comparison.runs}
    flops = read_flops(comparison)
    by_arm = {arm.label: by_seed(comparison, results, arm.label) for arm in comparison.arms}
    first = by_arm[comparison.first.label]
    cost = first.get("seconds_per_rollout", {})
    for columns in by_arm.values():
        if ratio := paired_ratio(columns.get("seconds_per_rollout", {}), cost):
            columns[COST] = ratio
    arms = [
        {
            "label": arm.label,
            "algorithm": arm.recipe.algorithm.name,
            "num_batches": arm.num_batches,
            "rollouts": arm.rollouts,
            "flops": flops[arm.label],
            "runs": {str(seed): run_tree(results[arm.label, seed]) for seed in comparison.seeds},
            **statistics(by_arm[arm.label], first),
        }
        for arm in comparison.arms
    ]
    base = base_by_seed(comparison, results)
    return {
        "unmask": __version__,
        "recipe": str(comparison.recipe),
        "budget": comparison.budget,
        "seeds": list(comparison.seeds),
        "first": comparison.first.label,
        "accuracies": accuracy_keys(by_arm, base),
        "base": {"values": base, **statistics(base, first)},
        "arms": arms,
        "notes": list(comparison.notes),
        "machine": dict(machine),
    }


def by_seed(
    comparison: Comparison, results: Mapping[tuple[str, int], Result], label: str
) -> dict[str, dict[int, float]]:
    """{column: {seed: value}} over the finished runs of an arm."""
    columns: dict[str, dict[int, float]] = {}
    for seed in comparison.seeds:
        for key, value in results[label, seed].values.items():
            columns.setdefault(key, {})[seed] = value
    return columns


def base_by_seed(comparison: Comparison, results: Mapping[tuple[str, int], Result]) -> dict[str, dict[int, float]]:
    """The step-0 row of each seed, from the first arm that has it: arms that start alike have the same."""
    columns: dict[str, dict[int, float]] = {}
    for arm in reversed(comparison.arms):
        for seed in comparison.seeds:
            for key, value in results[arm.label, seed].base.items():
                columns.setdefault(key, {})[seed] = value
    return columns


def statistics(columns: Mapping[str, Mapping[int, float]], first: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Mean and interval of each column, and of its difference to the first arm, paired by seed."""
    differences = {key: paired_difference(values, first.get(key, {})) for key, values in columns.items()}
    return {
        "statistics": {key: mean_interval(list(values.values())).tree() for key, values in columns.items()},
        "difference": {key: found.tree() for key, found in differences.items() if found},
    }


def accuracy_keys(by_arm: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]) -> list[str]:
    """accuracy@S of the first arm that has any, the main number first, and then those that only others have."""
    keys = [key for columns in (*by_arm.values(), base) for key in columns if key.startswith("accuracy@")]
    return list(dict.fromkeys(keys))


def run_tree(result: Result) -> dict[str, Any]:
    return {"state": result.state, "error": result.error, "values": dict(result.values), "base": dict(result.base)}
