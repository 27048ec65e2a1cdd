"""The library as functions: what the commands do, callable from Python.

Stability: names, arguments and the keys of returned rows keep their meaning within a minor version; arguments and keys
may be added. Everything a user can mend is raised as an `UnmaskError` with one line of text.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.bases import model_directory, weights_digest
from unmask.build import Named, make_sampler, make_task, sft_recipe, train_recipe
from unmask.config import apply_overrides, read_recipe
from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError, DataError
from unmask.evaluation import Answer, Setting
from unmask.evaluation import evaluate as evaluate_policy
from unmask.kept import Kept
from unmask.launch import check_prompts, run_recipe
from unmask.likelihood import elbo as weighted_sum
from unmask.likelihood import eubo as log_mean_power
from unmask.models import MaskedPolicy, load
from unmask.noise import Noise
from unmask.ranks import num_ranks, rank
from unmask.run_log import SilentView, View
from unmask.scoring import score
from unmask.types import Corruption, Example, PromptBatch, Rollouts, Sampler, take_rows

Prompt = str | list[dict[str, str]]
"""Text that the model reads as it is, or chat messages."""

MAX_EXACT_LENGTH = 12
"""Completion tokens up to which all 2^L masked states are scored."""

DRAWN_ROWS = 64
"""Rows whose masked copies are held at a time: thousands of rows would need gigabytes."""


# ---- training


def train(
    recipe: str | Path | Mapping[str, Any],
    *overrides: str,
    output: str | Path | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """Train by reinforcement; writes the run directory and returns the content of its summary.json.

    `recipe` is a TOML file or its tables as nested mappings (paths in it are then relative to the working directory);
    `overrides` are "dotted.key=value". `output` defaults to runs/<recipe>-<date>-<time>; `view` hears of the progress.

    Raises: ConfigError, DataError or ModelError before anything is written; RewardError or TrainingError on the way.
    Example: train("recipes/sudoku-espo.toml", "seed=1", output="runs/seed1")["final"][0]["accuracy"]
    """
    tree, directory = recipe_tables(recipe, overrides)
    return run_recipe(train_recipe(tree, directory), output or run_name(recipe), view or SilentView())


def sft(
    recipe: str | Path | Mapping[str, Any],
    *overrides: str,
    output: str | Path | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """Train on demonstrations, a task's teacher or a JSON lines file; arguments, result and errors as for `train`.

    Source of the loss: LLaDA, arXiv:2502.09992 Eq. 5; see objectives/sft.py.
    """
    tree, directory = recipe_tables(recipe, overrides)
    return run_recipe(sft_recipe(tree, directory), output or run_name(recipe), view or SilentView())


def recipe_tables(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """(tables with overrides, directory that relative paths in them start from)."""
    if isinstance(recipe, Mapping):
        return apply_overrides(recipe, overrides), Path()
    return apply_overrides(read_recipe(recipe), overrides), Path(recipe).parent


def run_name(recipe: str | Path | Mapping[str, Any]) -> Path:
    """runs/<recipe>-<date>-<time>, the default run directory."""
    stem = "recipe" if isinstance(recipe, Mapping) else Path(recipe).stem
    return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


# ---- evaluating and sampling


def open_model(model: str | Path | MaskedPolicy) -> MaskedPolicy:
    """A model or adapter directory, the model of a run directory, a hub id, or a loaded policy as it is.

    What is loaded goes to the accelerator if there is one, and is named as the caller named it. Raises: ModelError if
    it cannot be loaded.
    """
    if isinstance(model, MaskedPolicy):
        return model
    policy = load(model_directory(model))
    policy.name = str(model)
    if torch.accelerator.is_available():
        policy.module.to(torch.accelerator.current_accelerator())
    return policy


def evaluate(
    model: str | Path | MaskedPolicy,
    task: str = "sudoku",
    *,
    data: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    sampler: str = "low_confidence",
    gen_length: int | None = None,  # tokens
    num_steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    batch_size: int = 256,
    seed: int = 0,
    num_samples: int = 1,
    sampler_options: Mapping[str, Any] | None = None,
    view: View | None = None,
    **task_options: Any,
) -> dict[str, Any]:
    """Accuracy of a model on a task: the row that `unmask eval --output` writes. `num_samples` completions for each
    example, with `pass@k` where there are several.

    Greedy unless `temperature` is above 0; length and steps default to what the task declares. `data` is a file whose
    rows take the place of the task's test split; `limit` keeps the first examples; `sampler_options` are further
    settings of the sampler, such as {"threshold": 0.9}; further keywords are task options.
    `accuracy`, `parse_failures` and the like are fractions, `ci95` is a 95 % Wilson interval, `seconds` wall time.
    In a script under `accelerate launch` whose processes have met, each of them takes its share of the batches.

    Raises: ConfigError, DataError or ModelError. Example: evaluate("runs/mine", "sudoku", num_steps=8)["accuracy"]
    """
    chosen = evaluation_task(task, data, split, task_options)
    decoder = decoding(
        chosen,
        sampler,
        gen_length=gen_length,
        num_steps=num_steps,
        block_length=block_length,
        temperature=temperature,
        **sampler_options or {},
    )
    ((row, _),) = evaluation_rows(
        model,
        chosen,
        [decoder],
        split=split,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        num_samples=num_samples,
        view=view,
    )
    return row


def evaluation_task(name: str, data: str | Path | None, split: str, options: Mapping[str, Any]) -> Named:
    """The task with its data file. Raises: ConfigError for a file that the split would not read."""
    if data is not None and split != "test":
        raise ConfigError(
            f"data {data} with split {split!r}: a data file takes the place of the test split, so it would not be "
            "read. Drop one of the two."
        )
    given = {} if data is None else {"data": str(data)}
    return make_task({"type": name, **options, **given})


def decoding(task: Named | None, sampler: str, **fields: Any) -> Named:
    """A sampler by name; fields that are None keep the defaults of the task and the sampler."""
    return make_sampler({"type": sampler, **{k: v for k, v in fields.items() if v is not None}}, task, "sampler")


def evaluation_rows(
    model: str | Path | MaskedPolicy,
    task: Named,
    samplers: Sequence[Named],
    *,
    split: str,
    limit: int | None,
    batch_size: int,
    seed: int,
    num_samples: int = 1,
    view: View | None = None,
    kept: Kept | None = None,
    role: str = "model",
) -> list[tuple[dict[str, Any], list[Answer]]]:
    """One evaluation row for each sampler, on the same examples and noise, each with its completions; the model is
    loaded last. What is finished of it is kept in `kept` under the model's role."""
    for key, value in (("limit", limit), ("batch_size", batch_size), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{key} = {value}: must be at least 1. Try 256.")
    view = view or SilentView()
    examples = task.value.examples(split)[:limit]
    policy = open_model(model)
    for sampler in samplers:
        check_prompts(policy, examples, sampler.value.gen_length)
    if kept:
        kept.check(role, identity(policy, examples))
    total = len(examples) * num_samples
    if 0 < -(-total // batch_size) < num_ranks():
        view.note(
            f"{total} completions in batches of {batch_size} do not occupy {num_ranks()} processes. "
            "Take a smaller batch size."
        )
    rows = []
    for place, sampler in enumerate(samplers):
        name = f"{role} {place}"
        done = sum(len(part["answers"]) for part in kept.parts(name).values()) if kept else 0
        view.stage(f"evaluating, {sampler.value.gen_length} tokens", total, done)
        setting = Setting(task.name, task.value.source(split), sampler.name, task.value.prompt, policy.name, seed)
        rows.append(
            evaluate_policy(
                policy,
                task.value,
                examples,
                sampler.value,
                setting,
                noise=Noise(seed).stream("evaluation"),
                batch_size=batch_size,
                num_samples=num_samples,
                on_rows=view.advance,
                kept=kept,
                name=name,
            )
        )
    return rows


def identity(policy: MaskedPolicy, examples: Sequence[Example]) -> dict[str, str]:
    """What completions and verdicts rest on beside settings: digests of the weights, and of the examples as the model
    reads them and as the task judges them; the kind of device."""
    texts = [policy.render(example.prompt) for example in examples]
    ids, _ = policy.encode_prompts(texts, 1)
    columns = [[example.id, text, dict(example.columns)] for example, text in zip(examples, texts, strict=True)]
    content = hashlib.sha256(json.dumps(columns, default=str, sort_keys=True).encode())
    content.update(json.dumps(ids.tolist()).encode())
    return {
        "weights": weights_digest(policy.module) if rank() == 0 else "",  # the first process compares
        "examples": content.hexdigest(),
        "device": policy.device.type,
    }


def sample(
    model: str | Path | MaskedPolicy,
    prompt: Prompt | Sequence[Prompt],
    *,
    sampler: str = "low_confidence",
    gen_length: int = 16,  # tokens
    num_steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    **sampler_options: Any,
) -> str | list[str]:
    """The completion of a prompt, or a list of them for a list of prompts, without the stop token and what follows it.

    Further keywords are settings of the sampler, such as threshold=0.9 or cache="dual".

    A list of messages ({"role": ..., "content": ...}) is one prompt and goes through the model's chat template.

    Raises: ConfigError, DataError (a prompt that does not fit) or ModelError.
    Example: sample("runs/mine", "3102200002100320|")
    """
    decoder = decoding(
        None,
        sampler,
        gen_length=gen_length,
        num_steps=num_steps,
        block_length=block_length,
        temperature=temperature,
        **sampler_options,
    )
    is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping))
    texts = complete(open_model(model), [prompt] if is_one else list(prompt), decoder.value, seed=seed)  # type: ignore[list-item, arg-type]
    return texts[0] if is_one else texts


def complete(
    policy: MaskedPolicy,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int = 128,
    on_step: Callable[[Tensor], None] | None = None,
) -> list[str]:
    """One completion per prompt; `on_step` receives the canvas (b, T) after every step of every batch."""
    if not prompts:
        return []
    ids, mask = policy.encode_prompts([policy.render(prompt) for prompt in prompts], sampler.gen_length)
    key = torch.arange(len(prompts), device=policy.device)
    batch = PromptBatch(ids, mask, key, torch.zeros_like(key))
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        rows = take_rows(batch, slice(start, start + batch_size))
        samples = sampler.sample(policy, rows, noise=Noise(seed).stream("sample"), on_step=on_step)
        texts += policy.decode(samples.completion_ids)
    return texts


# ---- likelihoods


def elbo(
    policy: str | Path | MaskedPolicy,
    prompts: Sequence[Prompt],  # B
    completions: Sequence[str],  # B
    *,
    num_masks: int = 128,
    coupled: bool = True,
    gen_length: int | None = None,  # tokens
    seed: int = 0,
    micro_batch_size: int = 256,
) -> Tensor:  # (B,) float64, nats
    """Unbiased estimates of a lower bound on log p(completion | prompt), from `num_masks` masked copies of each row.

        ELBO = E_{m ~ U{1..L}, |S| = m} [ L/m · Σ_{i∈S} log p(y_i | prompt, y outside S) ]

    `coupled` draws the copies as num_masks / 2 complementary pairs. L is the number of tokens of the row's completion,
    without a stop token; `gen_length` makes it that for all rows, filled up with stop tokens as in training. Row b's
    masks depend on the seed, b and L alone: two models are compared on the same masks.

    Raises: ConfigError (odd num_masks), DataError (a row that is empty or does not fit) or ModelError.
    Source: LLaDA, arXiv:2502.09992; coupled draws: ESPO, arXiv:2512.03759.
    Oracle: tests/test_api.py::test_elbo_estimates_the_exact_bound
    """
    opened = open_model(policy)
    rollouts = given_rollouts(opened, prompts, completions, gen_length)
    draw = partial(draw_uniform_count, num_masks=num_masks, coupled=coupled, noise=Noise(seed).stream("elbo"))
    return _estimates(opened, rollouts, draw, weighted_sum, micro_batch_size)


def eubo(
    policy: str | Path | MaskedPolicy,
    prompts: Sequence[Prompt],  # B
    completions: Sequence[str],  # B
    *,
    gamma: float,
    num_masks: int = 128,
    coupled: bool = True,
    gen_length: int | None = None,  # tokens
    seed: int = 0,
    micro_batch_size: int = 256,
) -> Tensor:  # (B,) float64, nats
    """Estimates of the evidence upper bound of log p(completion | prompt) with exponent `gamma` >= 1.

        EUBO = Σ_i (1/γ) log E_{m ~ U{1..L}, |S| = m} [ L/m · 1[i∈S] · p(y_i | prompt, y outside S)^γ ]

    Read from the copies of `elbo` with the same seed; the other arguments are explained there. It is never below the
    ELBO, and grows with gamma. It is certain to bound log p only for gamma >= L: at smaller exponents about half of all
    random models of a few tokens lie above their EUBO at gamma = 1. And the estimate is low on average, the more so the
    fewer copies and the larger gamma, as it is the logarithm of a mean.

    Raises: ConfigError (gamma below 1, odd num_masks), DataError or ModelError as for `elbo`.
    Source: SPG, arXiv:2510.09541; see likelihood.eubo.
    Oracle: tests/test_api.py::test_eubo_approaches_the_exact_upper_bound
    """
    if not 1 <= gamma < math.inf:
        raise ConfigError(f"gamma = {gamma}: the exponent of an upper bound is at least 1 and finite. Try 1.5.")
    opened = open_model(policy)
    rollouts = given_rollouts(opened, prompts, completions, gen_length)
    draw = partial(draw_uniform_count, num_masks=num_masks, coupled=coupled, noise=Noise(seed).stream("elbo"))
    return _estimates(opened, rollouts, draw, partial(log_mean_power, gamma=gamma), micro_batch_size)


def _estimates(
    policy: MaskedPolicy,
    batches: Sequence[Rollouts],
    draw: Callable[[Rollouts], Corruption],
    estimate: Callable[[Tensor, Corruption], Tensor],
    micro_batch_size: int,
) -> Tensor:  # (B,) float64
    """An estimate from masked copies for each row, in the order of `prompt_key`; draws belong to their row."""
    values = torch.zeros(sum(map(len, batches)), dtype=torch.float64)
    for batch in batches:
        for start in range(0, len(batch), DRAWN_ROWS):
            rows = take_rows(batch, slice(start, start + DRAWN_ROWS))
            masks = draw(rows)
            logps = score(policy, rows, masks, micro_batch_size=micro_batch_size).logps
            values[rows.prompt_key.cpu()] = estimate(logps.double(), masks).cpu()
    return values


def log_likelihood(
    policy: str | Path | MaskedPolicy,
    prompt: Prompt,
    completion: str,
    *,
    block_length: int | None = None,
    gen_length: int | None = None,  # tokens
    micro_batch_size: int = 256,
) -> float:  # nats
    """Exact log p(completion | prompt) when one token at a time is revealed in uniformly random order.

        F(∅) = 1,     F(S) = mean_{i∈S} [ p(y_i | prompt, y outside S) · F(S \\ {i}) ],     log p = log F({1..L})

    Scores all 2^L - 1 masked states, so L is at most 12 tokens. With `block_length` the orders are those that finish a
    block before the next, as block-wise samplers have it. `gen_length` as for `elbo`.

    Raises: ConfigError for more tokens or a block length that does not divide L; DataError or ModelError as for `elbo`.
    Oracle: tests/test_api.py::test_log_likelihood_equals_the_mean_over_all_orders
    """
    opened = open_model(policy)
    (rows,) = given_rollouts(opened, [prompt], [completion], gen_length)
    length = rows.completion_length
    if length > MAX_EXACT_LENGTH:
        raise ConfigError(
            f"a completion of {length} tokens: the exact likelihood scores 2^L masked states, so {MAX_EXACT_LENGTH} "
            "tokens are the most. Use unmask.elbo() for a bound."
        )
    if block_length is not None and (block_length < 1 or length % block_length):
        raise ConfigError(f"block_length = {block_length}: must divide the {length} tokens of the completion. Try 1.")
    states = torch.arange(1, 2**length, device=opened.device)[None, :, None]  # (1, K, 1), bit i: position i masked
    scored = (states >> torch.arange(length, device=opened.device)) % 2 == 1  # (1, K, L)
    prompt_part = scored.new_zeros(1, scored.shape[1], rows.prompt_ids.shape[1])
    masks = Corruption(torch.cat([prompt_part, scored], dim=2), scored, scored.double(), "states")
    logps = score(opened, rows, masks, micro_batch_size=micro_batch_size).logps[0]
    return subset_recursion(logps.double().tolist(), block_length or length)


def subset_recursion(
    logps: Sequence[Sequence[float]],  # (2^L - 1, L) nats; row S - 1 holds log p(y_i | y outside S) for i in S
    block_length: int,
) -> float:  # nats
    """log F of the full set, F(S) = mean over the positions that may come next of exp(logp) · F(S without it)."""
    log_f = [0.0]
    for state, row in enumerate(logps, start=1):
        first = ((state & -state).bit_length() - 1) // block_length * block_length  # of the first unfinished block
        choices = [i for i in range(first, first + block_length) if state >> i & 1]
        terms = [row[i] + log_f[state & ~(1 << i)] for i in choices]
        top = max(terms)
        log_f.append(top + math.log(sum(math.exp(term - top) for term in terms) / len(terms)))
    return log_f[-1]


def given_rollouts(
    policy: MaskedPolicy,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    gen_length: int | None,  # None: each completion's own number of tokens
) -> list[Rollouts]:
    """Given texts as rollouts without rewards, in batches of equal completion length; `prompt_key` is the row.

    Raises: DataError if the numbers of prompts and completions differ, or a row is empty or does not fit the model.
    """
    if len(prompts) != len(completions):
        raise DataError(f"{len(prompts)} prompts and {len(completions)} completions: give one completion per prompt.")
    if gen_length is not None and gen_length < 1:
        raise ConfigError(f"gen_length = {gen_length}: must be at least 1 token. Try None, the completion's own.")
    by_length: dict[int, list[int]] = {}
    for row, text in enumerate(completions):
        length = gen_length or len(policy.tokenizer.encode(text, add_special_tokens=False))
        if not length:
            raise DataError(f"completion {row} has no tokens. Give a text, or gen_length to count the stop tokens.")
        by_length.setdefault(length, []).append(row)
    texts = [policy.render(prompt) for prompt in prompts]
    return [_batch(policy, texts, completions, rows, length) for length, rows in by_length.items()]


def _batch(
    policy: MaskedPolicy, prompts: Sequence[str], completions: Sequence[str], rows: list[int], length: int
) -> Rollouts:
    prompt_ids, prompt_mask = policy.encode_prompts([prompts[row] for row in rows], length)
    completion_ids = policy.encode_completions([completions[row] for row in rows], length)
    key = torch.tensor(rows, device=policy.device)
    zeros = torch.zeros_like(completion_ids)
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        prompt_key=key,
        rollout_index=torch.zeros_like(key),
        groups=key,
        rewards=zeros[:, 0].double(),
        length=torch.full_like(key, length),
        reveal_step=zeros,
        sample_logps=zeros.double(),
        nfe=zeros[:, 0],
    )
