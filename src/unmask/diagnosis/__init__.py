"""Bias, variance and cost of every likelihood estimator, and the gap of the bounds, against exact enumeration.

Completions are sampled, all but a few of their positions are shown for good, and the model is asked for every
conditional of the 2^L masked states of the rest. All estimates, exact likelihoods and bounds are functions of that
table; only copies that hide prompt tokens need further forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.api import MAX_EXACT_LENGTH, open_model
from unmask.build import Named
from unmask.diagnosis.estimators import Estimator, estimators
from unmask.diagnosis.exact import ShortRows, read, run_model, score_table, shorten
from unmask.diagnosis.measure import Exact, exact, gaps, measure, reward_classes, summary
from unmask.errors import ConfigError, DataError, ModelError
from unmask.launch import check_prompts
from unmask.models import MaskedPolicy
from unmask.noise import Noise
from unmask.rollout import roll_out
from unmask.run_log import SilentView, View
from unmask.types import Corruption, Example, Rollouts


@dataclass(frozen=True)
class DiagnosisSettings:
    """What is measured, and how thoroughly."""

    split: str = "test"
    """Split of the task that prompts are taken from."""
    num_prompts: int = 16
    """Its first prompts."""
    group_size: int = 4
    """Completions sampled for each prompt."""
    length: int = 8
    """L, completion tokens open to masking; 2^L - 1 forwards for each completion and model."""
    gammas: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Exponents of the EUBO; 1, 1.5 and 2 are those of SPG (arXiv:2510.09541)."""
    budget: int = 4
    """Forwards at which estimators are compared."""
    num_draws: int = 256
    """Draws of each estimator from the table; they cost no forward."""
    num_model_draws: int = 64
    """Draws of estimators that hide prompt tokens and so need the model; 0 leaves them out."""
    batch_size: int = 256
    """Masked copies in one forward."""
    seed: int = 0
    """Of the completions, of the open positions and of the draws."""

    def __post_init__(self) -> None:
        for key, least in (("num_prompts", 2), ("group_size", 1), ("num_draws", 2), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} = {getattr(self, key)}: must be at least {least}. Try {max(16, least)}.")
        if not 2 <= self.length <= MAX_EXACT_LENGTH:
            raise ConfigError(
                f"length = {self.length}: 2^length masked states of each completion are scored, so 2 to "
                f"{MAX_EXACT_LENGTH} tokens are possible. Try 8."
            )
        if self.budget < 2 or self.budget % 2:
            raise ConfigError(f"budget = {self.budget}: coupled copies come in pairs, so it must be even. Try 4.")
        if self.num_model_draws < 0 or self.num_model_draws == 1:
            raise ConfigError(
                f"num_model_draws = {self.num_model_draws}: a variance needs two draws or more. Try 64, or 0 for none."
            )
        for gamma in self.gammas:
            if not 1 <= gamma < math.inf:
                raise ConfigError(f"gamma = {gamma}: the exponent of an upper bound is at least 1 and finite. Try 1.5.")


def diagnose(
    model: str | Path | MaskedPolicy,
    task: Named,
    sampler: Named,
    settings: DiagnosisSettings,
    *,
    reference: str | Path | MaskedPolicy | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """Everything measured, as the content of diagnose.json; docs/diagnose.md explains the keys.

    With a `reference` the difference of both models' estimates on the same masked copies is measured too: the quantity
    inside every ratio. Completions are sampled from `model`. Models are loaded after everything else was checked.

    Raises: ConfigError, DataError (a prompt that does not fit) or ModelError (block-causal models).
    """
    view = view or SilentView()
    examples = checked_examples(task, sampler, settings)
    policies = open_models(model, reference)
    check_prompts(policies[0], examples, sampler.value.gen_length)
    rollouts = collect(policies[0], task, sampler, examples, settings, view)
    rows = shorten(rollouts, settings.length, noise=Noise(settings.seed).stream("diagnose"))
    known = [exact(table) for table in score_tables(policies, rows, settings, view)]
    return {
        "model": policies[0].name,
        "reference": policies[1].name if len(policies) > 1 else None,
        "task": task.name,
        "data": task.value.source(settings.split),
        "sampler": sampler.name,
        "gen_length": sampler.value.gen_length,
        "temperature": getattr(sampler.value, "temperature", 0.0),
        **asdict(settings),
        "num_completions": len(rows),
        "exact": summaries(known),
        "estimators": measure_all(policies, rows, known, settings, view),
        **gap_tables(known[0], rows, settings.gammas),
        "completions": completion_rows(rows, known),
    }


def checked_examples(task: Named, sampler: Named, settings: DiagnosisSettings) -> list[Example]:
    """The prompts. Raises: ConfigError or DataError if they or the completions are too few or too short."""
    gen_length = sampler.value.gen_length
    if settings.length > gen_length:
        raise ConfigError(
            f"length = {settings.length}: completions have {gen_length} tokens, of which at most all can be open. "
            f"Try {min(8, gen_length)}."
        )
    examples: list[Example] = list(task.value.examples(settings.split)[: settings.num_prompts])
    if len(examples) < 2:
        raise DataError(f"{task.value.source(settings.split)}: {len(examples)} prompts; at least 2 are needed.")
    return examples


def open_models(model: str | Path | MaskedPolicy, reference: str | Path | MaskedPolicy | None) -> list[MaskedPolicy]:
    """The policy, and the reference if there is one. Raises: ModelError for models that cannot be compared so."""
    policies = [open_model(given) for given in (model, reference) if given is not None]
    for policy in policies:
        if policy.block_size is not None:
            raise ModelError(
                f"{policy.name}: block-causal (blocks of {policy.block_size} tokens): it has no conditionals given "
                "tokens behind a mask, so there is nothing to enumerate. Use LLaDA, Dream or a masked LM."
            )
    if len(policies) == 2 and policies[0].tokenizer.get_vocab() != policies[1].tokenizer.get_vocab():
        raise ModelError(
            f"{policies[1].name}: has another vocabulary than {policies[0].name}, so likelihoods of the same tokens "
            "cannot be compared. Name a reference with the same tokenizer."
        )
    return policies


def collect(
    policy: MaskedPolicy,
    task: Named,
    sampler: Named,
    examples: list[Example],
    settings: DiagnosisSettings,
    view: View,
) -> Rollouts:
    """`group_size` completions of each prompt with their rewards."""
    index = torch.arange(len(examples) * settings.group_size)
    view.stage("sampling completions", len(index))
    return roll_out(
        policy,
        task.value,
        sampler.value,
        [examples[i // settings.group_size] for i in index.tolist()],
        index % settings.group_size,
        index // settings.group_size,
        noise=Noise(settings.seed).stream("diagnose").stream("sampler"),
        batch_size=settings.batch_size,
        on_rows=view.advance,
    )


def score_tables(
    policies: list[MaskedPolicy], rows: ShortRows, settings: DiagnosisSettings, view: View
) -> list[Tensor]:
    """A table (B, 2^L, L) for each model."""
    view.stage(f"scoring 2^{settings.length} masked states", len(rows) * len(policies))
    return [score_table(policy, rows, micro_batch_size=settings.batch_size, on_row=view.advance) for policy in policies]


def measure_all(
    policies: list[MaskedPolicy], rows: ShortRows, known: list[Exact], settings: DiagnosisSettings, view: View
) -> list[dict[str, Any]]:
    """One row for each estimator; see `measure`."""
    moved: dict[str, Any] = {
        key: value.cpu() for key, value in vars(rows.rollouts).items() if isinstance(value, Tensor)
    }
    on_cpu = replace(rows.rollouts, **moved)
    chosen = estimators(settings.length, settings.gammas, settings.budget)
    if not settings.num_model_draws:
        chosen = [entry for entry in chosen if not entry.hides_prompt]
    draws = {True: settings.num_model_draws, False: settings.num_draws}
    view.stage("drawing estimates", sum(draws[entry.hides_prompt] for entry in chosen))

    def from_model(copies: Corruption) -> list[Tensor]:
        size = settings.batch_size
        return [run_model(policy, rows, copies, micro_batch_size=size) for policy in policies]

    def from_tables(copies: Corruption) -> list[Tensor]:
        return [read(one.table, copies) for one in known]

    found = []
    for entry in chosen:
        reads, drawn_for = (from_model, rows.rollouts) if entry.hides_prompt else (from_tables, on_cpu)
        values = draw_values(entry, drawn_for, reads, draws[entry.hides_prompt], settings.seed, view)
        found.append(measure(entry, values, known[0], known[1] if len(known) > 1 else None, settings.budget))
    return found


def draw_values(
    entry: Estimator,
    rollouts: Rollouts,
    reads: Callable[[Corruption], list[Tensor]],
    num_draws: int,
    seed: int,
    view: View,
) -> Tensor:  # (D, models, B) float64, on the CPU
    """Independent draws of an estimator, all models reading the same copies."""
    noise = Noise(seed).stream("diagnose").stream(entry.name)
    values = []
    for number in range(num_draws):
        copies = entry.draw(rollouts, noise=noise.stream(str(number)))
        values.append(torch.stack([entry.estimate(logps, copies) for logps in reads(copies)]).cpu())
        view.advance()
    return torch.stack(values)


def summaries(known: list[Exact]) -> dict[str, Any]:
    """Exact numbers over completions, nats."""
    policy = known[0]
    found = {
        "log_p": summary(policy.log_p),
        "elbo": summary(policy.elbo),
        "elbo_gap": summary(policy.log_p - policy.elbo),
    }
    if len(known) > 1:
        found["log_ratio"] = summary(policy.log_p - known[1].log_p)
        found["elbo_difference"] = summary(policy.elbo - known[1].elbo)
    return found


def gap_tables(policy: Exact, rows: ShortRows, gammas: tuple[float, ...]) -> dict[str, list[dict[str, Any]]]:
    """How far bounds lie from log p: by length, and at the full length by reward."""
    by_length = gaps(policy.table, rows.turn.cpu(), gammas)
    full = by_length[-1]
    classes = reward_classes(rows.rollouts.rewards.cpu())
    return {
        "gap_by_length": [_summarised(row, slice(None)) for row in by_length],
        "gap_by_reward": [
            {"reward": label, "completions": int(own.sum()), **_summarised(full, own)} for label, own in classes
        ],
    }


def _summarised(row: dict[str, Any], own: Tensor | slice) -> dict[str, Any]:
    return {
        "length": row["length"],
        **{key: summary(row[key][own]) for key in ("log_p", "elbo_gap", "mean_field")},
        "eubo": {
            gamma: {**summary(excess[own]), "below_log_p": float((excess[own] < -1e-9).double().mean())}
            for gamma, excess in row["eubo"].items()
        },
    }


def completion_rows(rows: ShortRows, known: list[Exact]) -> list[dict[str, Any]]:
    """One row for each completion: what it was, and its exact numbers in nats."""
    whole = rows.whole
    found = []
    for row in range(len(rows)):
        found.append(
            {
                "prompt_id": int(whole.prompt_key[row]),
                "completion": whole.completions[row],
                "reward": float(whole.rewards[row]),
                "open_positions": rows.position[row].tolist(),
                "log_p": float(known[0].log_p[row]),
                "elbo": float(known[0].elbo[row]),
                "mean_field": float(known[0].table[row, -1].sum()),
            }
        )
        if len(known) > 1:
            found[-1]["reference_log_p"] = float(known[1].log_p[row])
            found[-1]["reference_elbo"] = float(known[1].elbo[row])
    return found
