"""What the energy model of a run has learned: energies of rollouts beside their rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.bases import model_directory, open_base
from unmask.build import Recipe, train_recipe
from unmask.config import read_recipe
from unmask.critic import Critic, make_value_model
from unmask.errors import ConfigError, DataError
from unmask.figures import load_pyplot, save_figure
from unmask.models import MaskedPolicy
from unmask.noise import Noise
from unmask.objectives import ALGORITHMS
from unmask.rollout import roll_out
from unmask.runs import read_rows
from unmask.types import Needs, Rollouts

NUM_BINS = 20
QUARTILES = ("lowest quarter", "second", "third", "highest quarter")


@dataclass(frozen=True)
class Scored:
    """Completions with their energies, (N,) each."""

    energies: Tensor  # float64
    rewards: Tensor  # float64
    is_correct: Tensor  # bool
    prompt_id: Tensor  # int64
    num_dropped: int = 0
    """Rows of the log whose text does not fit the canvas any more once it is made into tokens again."""


def measure_energies(run: Path, *, num_rollouts: int, split: str | None = None, micro_batch_size: int = 64) -> Scored:
    """Energies of the newest `num_rollouts` rollouts of a run's log, or of new ones on a split.

    All are those of the energy model at the end of the run. New rollouts are sampled as in training, by the trained
    policy. Completions of the log are made into tokens again from their text.

    Raises: ConfigError if the run has no energy model, DataError if its files are damaged.
    """
    recipe = open_recipe(run)
    policy, critic = open_energy(run, recipe, micro_batch_size)
    if split is None:
        rollouts, num_dropped = logged_rollouts(run, recipe, policy, num_rollouts)
    else:
        rollouts, num_dropped = new_rollouts(recipe, policy, split, num_rollouts), 0
    return Scored(
        critic.values(rollouts).double(),
        rollouts.rewards,
        torch.tensor([status == "correct" for status in rollouts.statuses]),
        rollouts.prompt_key,
        num_dropped,
    )


def open_recipe(run: Path) -> Recipe:
    """The recipe of a run with an energy. Raises: ConfigError if it is none, or has none (yet)."""
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: no config.toml there. Name the directory of a run.")
    tree = read_recipe(run / "config.toml")
    algorithm: Any = tree.get("algorithm", {})
    name = algorithm.get("type", "sft")
    recipe = train_recipe(tree, run) if name in ALGORITHMS else None
    value = recipe.algorithm.value.needs.value if recipe else None
    if recipe is None or value is None or value.reads != "completion":
        raise ConfigError(f"{run}: is a run of {name!r} that learns no energy of completions. Name one of dga.")
    if not (run / "energy").is_dir():
        raise ConfigError(f"{run / 'energy'}: is not there yet; it is written at the end. Finish the run: --resume.")
    return recipe


def open_energy(run: Path, recipe: Recipe, micro_batch_size: int) -> tuple[MaskedPolicy, Critic]:
    """The trained policy and its energy model."""
    policy = open_base(model_directory(run), recipe.model)
    policy.module.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    needs = Needs(value=recipe.algorithm.value.needs.value)
    critic = make_value_model(policy, None, needs, seed=recipe.seed, micro_batch_size=micro_batch_size)
    assert critic is not None
    critic.restore(run / "energy")
    return policy, critic


def logged_rollouts(run: Path, recipe: Recipe, policy: MaskedPolicy, count: int) -> tuple[Rollouts, int]:
    """The newest rows of rollouts.jsonl, and how many of them had to be left out."""
    assert recipe.sampler
    length: int = recipe.sampler.value.gen_length
    try:
        rows = read_rows(run / "rollouts.jsonl")[-count:]
        fitting = [row for row in rows if len(policy.encode(row["completion"])) <= length]
        rewards = torch.tensor([float(row["reward"]) for row in fitting], dtype=torch.float64)
        keys = torch.tensor([int(row["prompt_id"]) for row in fitting])
        texts = [str(row["completion"]) for row in fitting]
        prompts, statuses = ([str(row[name]) for row in fitting] for name in ("prompt", "status"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{run / 'rollouts.jsonl'}: cannot be read ({error}). Name a complete run.") from error
    if not fitting:
        raise DataError(f"{run / 'rollouts.jsonl'}: has no rollouts that fit. Try --split validation.")
    prompt_ids, prompt_mask = policy.encode_prompts(prompts, length)
    completion_ids = policy.encode_completions(texts, length)
    zeros = torch.zeros_like(completion_ids)
    rollouts = Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        prompt_key=keys,
        rollout_index=torch.arange(len(fitting)),
        groups=keys,
        rewards=rewards,
        length=policy.completion_lengths(completion_ids),
        reveal_step=zeros,
        sample_logps=zeros.double(),
        nfe=zeros[:, 0],
        prompts=prompts,
        completions=texts,
        statuses=statuses,
        facts=[{}] * len(fitting),
    )
    return rollouts, len(rows) - len(fitting)


def new_rollouts(recipe: Recipe, policy: MaskedPolicy, split: str, count: int) -> Rollouts:
    """`count` completions by the trained policy, spread over the prompts of a split."""
    assert recipe.task and recipe.sampler and recipe.rollout
    examples = recipe.task.value.examples(split)
    if not examples:
        raise DataError(f"--split {split}: the task has no examples there. Try validation.")
    numbers = torch.arange(count)
    return roll_out(
        policy,
        recipe.task.value,
        recipe.sampler.value,
        [examples[i % len(examples)] for i in range(count)],
        numbers // len(examples),
        numbers % len(examples),
        noise=Noise(recipe.seed).stream("energy"),
        batch_size=recipe.rollout.batch_size,
    )


def summarise(scored: Scored) -> dict[str, Any]:
    """Pearson correlations, means by verdict, quartiles by energy (lowest first), and a histogram by verdict.

    An energy is defined up to a number for each prompt, so correlations are also given within prompts, of what is left
    when each prompt's mean is taken away. A correlation without variance is None.
    """
    energies, correct = scored.energies.cpu(), scored.is_correct.cpu()
    rewards, verdict = scored.rewards.cpu(), scored.is_correct.cpu().double()
    parts = energies.argsort(stable=True).tensor_split(len(QUARTILES))
    low, high = float(energies.min()), float(energies.max())
    edges = torch.linspace(low, high if high > low else low + 1, NUM_BINS + 1, dtype=torch.float64)
    bins = (torch.bucketize(energies, edges, right=True) - 1).clamp(0, NUM_BINS - 1)
    within = [centred(values, scored.prompt_id.cpu()) for values in (energies, rewards)]
    return {
        "num_rollouts": len(energies),
        "num_dropped": scored.num_dropped,
        "accuracy": float(verdict.mean()),
        "pearson_reward": pearson(energies, rewards),
        "pearson_correct": pearson(energies, verdict),
        "pearson_reward_within_prompts": pearson(*within),
        "energy_correct": mean(energies[correct]),
        "energy_wrong": mean(energies[~correct]),
        "quartiles": [
            {
                "energy": name,
                "rollouts": len(part),
                "mean_energy": mean(energies[part]),
                "accuracy": mean(verdict[part]),
                "mean_reward": mean(rewards[part]),
            }
            for name, part in zip(QUARTILES, parts, strict=True)
        ],
        "histogram": {
            "edges": edges.tolist(),
            "correct": bins[correct].bincount(minlength=NUM_BINS).tolist(),
            "wrong": bins[~correct].bincount(minlength=NUM_BINS).tolist(),
        },
    }


def mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def centred(values: Tensor, groups: Tensor) -> Tensor:
    """(N,) less the mean of each group."""
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    return values - (values.new_zeros(len(count)).index_add(0, member, values) / count)[member]


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Correlation of two (N,) tensors; None if one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 and math.isfinite(scale) else None


def draw_figure(summary: dict[str, Any], title: str, file: Path) -> None:
    """Histogram of energies by verdict, and accuracy by quartile of energy, as an image (by the file's ending)."""
    figure, (left, right) = load_pyplot().subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    edges = summary["histogram"]["edges"]
    for name, color in (("wrong", "tab:gray"), ("correct", "tab:orange")):
        left.stairs(summary["histogram"][name], edges, fill=True, alpha=0.55, color=color, label=name)
    left.set_title(f"energies of rollouts, r = {number(summary['pearson_correct'])}", fontsize=10)
    left.set_xlabel("energy")
    left.legend(fontsize=8)
    names, heights = _bars(summary["quartiles"])
    right.bar(names, heights, color="tab:orange")
    right.set_ylim(0, 1)
    right.set_title("accuracy by energy", fontsize=10)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, file)


def _bars(quartiles: Sequence[dict[str, Any]]) -> tuple[list[str], list[float]]:
    return [row["energy"] for row in quartiles], [row["accuracy"] or 0.0 for row in quartiles]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
