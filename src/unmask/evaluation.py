"""tasks x sampler -> one evaluation row: accuracies with intervals, cost, and what identifies the setting."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unmask.errors import DataError
from unmask.ranks import gather_rollouts, num_ranks, own_rows
from unmask.rollout import TextPolicy, roll_out
from unmask.types import Example, NoiseLike, Rollouts, Sampler, Status, Task, take_rows


@dataclass(frozen=True)
class Setting:
    """What an evaluation row says about itself beside the numbers."""

    task: str
    data: str
    sampler: str
    prompt: str
    model: str
    seed: int


def wilson(successes: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); (0, 1) for no data."""
    if total == 0:
        return 0.0, 1.0
    p = successes / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(values: Sequence[float]) -> dict[str, Any]:
    """Count, mean and interval of 0/1 values."""
    low, high = wilson(sum(values), len(values))
    return {"num_examples": len(values), "accuracy": sum(values) / max(1, len(values)), "ci95": [low, high]}


def evaluate(
    policy: TextPolicy,
    task: Task,
    examples: Sequence[Example],
    sampler: Sampler,
    setting: Setting,
    *,
    noise: NoiseLike,
    batch_size: int = 128,
    num_samples: int = 1,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], Rollouts]:
    """`num_samples` completions per example, judged by the task. Returns the row and the completions it rests on; those
    of one example stand together, and `groups` is its place.

    Raises: DataError if there is nothing to evaluate.
    """
    if not examples:
        raise DataError(f"no examples to evaluate in {setting.data}. Name a data file with at least one scored row.")
    start = time.perf_counter()
    wanted = [example for example in examples for _ in range(num_samples)]
    # every process makes its share; the last example fills up the last share
    padded = [*wanted, *[wanted[-1]] * (-len(wanted) % num_ranks())]
    rows = own_rows(len(padded))
    index = torch.arange(len(padded))[rows]
    own = roll_out(
        policy,
        task,
        sampler,
        padded[rows],
        index % num_samples,
        index // num_samples,
        noise=noise,
        batch_size=batch_size,
        on_rows=lambda n: on_rows(n * num_ranks()) if on_rows else None,
    )
    rollouts = take_rows(gather_rollouts(own), slice(0, len(wanted)))
    return summarise(task, examples, sampler, setting, rollouts, time.perf_counter() - start), rollouts


def by_example(rollouts: Rollouts, num_samples: int) -> list[list[float]]:
    """Which completions of each example are correct, as 0 or 1."""
    values = [
        facts.get("accuracy", float(status == Status.CORRECT))
        for facts, status in zip(rollouts.facts, rollouts.statuses, strict=True)
    ]
    return [values[first : first + num_samples] for first in range(0, len(values), num_samples)]


def pass_at(of_examples: Sequence[Sequence[float]], k: int) -> float:
    """Mean over examples of 1 - C(n - c, k) / C(n, k), for c correct ones of n: unbiased (arXiv:2107.03374, Eq. 1)."""
    chances = [1 - math.comb(len(values) - round(sum(values)), k) / math.comb(len(values), k) for values in of_examples]
    return sum(chances) / len(chances)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... and the limit itself."""
    return sorted({2**n for n in range(limit.bit_length()) if 2**n <= limit} | {limit})


def unique_share(completions: Sequence[str], num_samples: int) -> float:
    """Mean over examples of the share of different completions among those of the example."""
    groups = [completions[first : first + num_samples] for first in range(0, len(completions), num_samples)]
    return sum(len(set(group)) / len(group) for group in groups) / len(groups)


def mean_interval(values: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a mean of many independent values: mean ± z s / sqrt(n); the value itself for one."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, mean
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean - z * deviation / math.sqrt(len(values)), mean + z * deviation / math.sqrt(len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Accuracy less the baseline's, example by example: mean, 95 % interval, and examples won and lost."""
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    return {
        "difference": sum(differences) / len(differences),
        "difference_ci95": list(mean_interval(differences)),
        "won": sum(d > 0 for d in differences),
        "lost": sum(d < 0 for d in differences),
    }


def summarise(
    task: Task,
    examples: Sequence[Example],
    sampler: Sampler,
    setting: Setting,
    rollouts: Rollouts,
    seconds: float,  # wall
) -> dict[str, Any]:
    """The evaluation row; fractions in [0, 1], tokens are canvas tokens.

    With several completions per example the interval is that of the mean over examples, since completions of one are
    not independent, and `pass@k` is added: the probability that one of k is correct.
    """
    num_samples = len(rollouts) // len(examples)
    of_examples = by_example(rollouts, num_samples)
    accuracy = [sum(values) / num_samples for values in of_examples]
    row: dict[str, Any] = {"task": setting.task, "data": setting.data, **share(accuracy)}
    if num_samples > 1:
        row |= {"num_samples": num_samples, "ci95": list(mean_interval(accuracy))}
        row |= {f"pass@{k}": pass_at(of_examples, k) for k in powers_of_two(num_samples)}
        row["unique_completion_rate"] = unique_share(rollouts.completions, num_samples)
    for name in sorted({key for facts in rollouts.facts for key in facts} - {"accuracy"}):
        row[name] = sum(facts.get(name, 0.0) for facts in rollouts.facts) / len(rollouts)
    counts = Counter(rollouts.statuses)
    row |= {
        "reward": float(rollouts.rewards.mean()),
        "parse_failures": counts[Status.UNPARSED] / len(rollouts),
        "statuses": {str(status): counts[status] for status in Status if counts[status]},
        "gen_length": sampler.gen_length,
        "num_steps": getattr(sampler, "num_steps", None) or sampler.gen_length,
        "block_length": getattr(sampler, "block_length", None) or sampler.gen_length,
        "temperature": getattr(sampler, "temperature", 0.0),
        "sampler": setting.sampler,
        "prompt": setting.prompt,
        "nfe_per_completion": float(rollouts.nfe.double().mean()),
        "seconds": seconds,
        "tokens_per_second": len(rollouts) * sampler.gen_length / max(seconds, 1e-9),
        "model": setting.model,
        "seed": setting.seed,
    }
    strata: dict[str, list[float]] = {}
    for example, value in zip(examples, accuracy, strict=True):
        strata.setdefault(task.stratum(example), []).append(value)
    if len(strata) > 1:
        row |= {name: share(values) for name, values in sorted(strata.items())}
    return row
