"""tasks x sampler -> Rollouts with rewards: where training batches come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from unmask.buffer import BufferConfig
from unmask.errors import ConfigError, DataError, RewardError
from unmask.ranks import failing_together
from unmask.samplers.canvas import Start
from unmask.sharding import in_step
from unmask.types import (
    BatchTask,
    Example,
    NoiseLike,
    Policy,
    PromptBatch,
    Rollouts,
    Sampler,
    Samples,
    Score,
    Task,
    take_rows,
)

Verdicts = tuple[list[str], list[int], list[Score]]
"""Completions as text, their lengths in tokens, and their scores."""


class TextPolicy(Policy, Protocol):
    """A policy with text in and text out."""

    name: str

    def render(self, prompt: str | list[dict[str, str]]) -> str: ...

    def encode_prompts(self, texts: Sequence[str], gen_length: int) -> tuple[Tensor, Tensor]: ...

    def encode_completions(self, texts: Sequence[str], gen_length: int) -> Tensor: ...

    def completion_lengths(self, completion_ids: Tensor) -> Tensor: ...

    def decode(self, completion_ids: Tensor) -> list[str]: ...


class Source(Protocol):
    """Where the trainer's batches come from: rollouts of a task, or a fixed dataset."""

    @property
    def batch_rows(self) -> int:
        """B of one collected batch, over all processes."""
        ...

    def collect(self, policy: TextPolicy, iteration: int, rows: slice) -> Rollouts:
        """The given rows of batch `iteration`; the whole batch is `slice(0, batch_rows)`.

        What can fail on one process alone belongs into `failing_together`; calls of the model do not, for where
        parameters are sharded the processes make them together.
        """
        ...


@dataclass(frozen=True)
class RolloutConfig:
    """How a training batch is collected: G completions of each prompt, which are compared with each other."""

    prompts_per_batch: int = 16
    """Prompts per rollout batch, drawn with replacement. ESPO (arXiv:2512.03759): 96 rollouts = 16 x 6."""
    group_size: int = 6
    """G, completions per prompt. ESPO on GSM8K: 6."""
    batch_size: int = 128
    """Rollouts sampled in one forward; changes speed and memory, not the rollouts."""
    buffer: BufferConfig = field(default_factory=BufferConfig)
    """Rollouts of earlier batches that are trained on again."""

    strategy: ClassVar[str] = "groups"

    def __post_init__(self) -> None:
        for key in ("prompts_per_batch", "group_size", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"rollout.{key} = {getattr(self, key)}: must be at least 1. Try 8.")
        if self.group_size < 2:
            raise ConfigError(
                "rollout.group_size = 1: advantages compare the completions of one prompt, so at least 2 are needed. "
                "Try 8."
            )

    @property
    def rows_per_prompt(self) -> int:
        """Rows of a batch that belong to one prompt; processes share whole prompts where these hang together."""
        return self.group_size

    @property
    def batch_rows(self) -> int:
        """B."""
        return self.prompts_per_batch * self.rows_per_prompt

    def sampled(self, num_steps: int) -> list[tuple[str, int, int]]:
        """(name, completions, forwards of each) of all that is sampled for a batch."""
        return [("collect", self.prompts_per_batch * self.group_size, num_steps)]

    def share(self, rows: slice) -> range:
        """Numbers of the prompts that a process holds with these rows of a batch, where it has to hold them whole.

        Raises: ConfigError if a prompt's rows are not all among them.
        """
        return range(0)

    def check(self, name: str, sampler: Any) -> None:
        """Raises: ConfigError if the sampler, which goes by this name, cannot do what is asked of it."""

    def source(self, task: Task, sampler: Any, noise: NoiseLike) -> GroupSource:
        """Where the batches come from."""
        return GroupSource(task, sampler, self, noise)


def judge(
    task: Task,
    examples: Sequence[Example],
    completions: Sequence[str],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> list[Score]:
    """One score per completion; of a task that judges batches, in one call.

    Raises: RewardError naming the prompt if a reward is not a finite number.
    """
    if isinstance(task, BatchTask):
        scores = task.score_all(examples, completions, completion_ids=token_ids)
    else:
        scores = [task.score(example, text) for example, text in zip(examples, completions, strict=True)]
    for example, text, score in zip(examples, completions, scores, strict=True):
        if not math.isfinite(score.value):
            raise RewardError(
                f"the reward of prompt {example.id} is {score.value} (completion begins {text[:40]!r}). "
                "Rewards must be finite numbers: mend the reward function."
            )
    return scores


def roll_out(
    policy: TextPolicy,
    task: Task,
    sampler: Sampler,
    examples: Sequence[Example],  # one per row
    rollout_index: Tensor,  # (B,) int64
    groups: Tensor,  # (B,) int64
    *,
    noise: NoiseLike,
    batch_size: int,
    on_rows: Callable[[int], None] | None = None,
) -> Rollouts:
    """Sample and judge one completion per row; `on_rows(n)` is told of every n finished rows.

    With several processes: what a prompt or a reward raises on one of them is raised on all.
    """
    texts, batch = encode(policy, examples, rollout_index, sampler.gen_length)
    jobs: list[tuple[PromptBatch, Start | None]] = [(batch, None)]
    options: dict[str, Any] = {"noise": noise, "batch_size": batch_size, "on_rows": on_rows}
    if len(batch) <= batch_size or not judges_rows(task):
        parts = draw_samples(policy, sampler, jobs, batch.prompt_ids[:1], **options)
        return judged(policy, task, examples, texts, batch, join_samples(parts), groups)
    with Judging(policy, task, examples) as judging:
        parts = draw_samples(policy, sampler, jobs, batch.prompt_ids[:1], on_part=judging.add, **options)
        return judged(policy, task, examples, texts, batch, join_samples(parts), groups, judging.verdicts)


def encode(
    policy: TextPolicy, examples: Sequence[Example], rollout_index: Tensor, gen_length: int
) -> tuple[list[str], PromptBatch]:
    """The prompts as text and as tokens, one per row."""
    with failing_together():
        texts = [policy.render(example.prompt) for example in examples]
        prompt_ids, prompt_mask = policy.encode_prompts(texts, gen_length)
    keys = torch.tensor([example.id for example in examples], device=policy.device)
    return texts, PromptBatch(prompt_ids, prompt_mask, keys, rollout_index.to(policy.device))


def draw_samples(
    policy: TextPolicy,
    sampler: Any,
    jobs: Sequence[tuple[PromptBatch, Start | None]],
    canvas: Tensor,  # (1, T) int64
    *,
    noise: NoiseLike,
    batch_size: int,
    on_rows: Callable[[int], None] | None = None,
    on_part: Callable[[Tensor, Tensor], None] | None = None,
) -> list[Samples]:
    """Completions of the rows of all jobs, one job after the other, each in the order of its rows.

    Rows are sampled in parts, those of like prompt lengths together and without the pads that a part does not need;
    `on_part` is given the rows of a job and their completion_ids as soon as they are there.
    With several processes each may have other jobs, or none, and keeps step with the others on `canvas`.
    """
    samples = []
    with in_step(policy, canvas) as stepping:
        for batch, start in jobs:
            parts, order = [], by_length(batch.prompt_mask)
            for rows in order.split(batch_size):
                # samplers that cannot go on from a state have no such argument
                begin = {} if start is None else {"start": Start(take_rows(start.samples, rows), start.step)}
                parts.append(sampler.sample(stepping, trimmed(take_rows(batch, rows)), noise=noise, **begin))
                if on_part:
                    on_part(rows, parts[-1].completion_ids)
                if on_rows:
                    on_rows(len(rows))
            if parts:
                samples.append(take_rows(join_samples(parts), order.argsort()))
    return samples


def by_length(
    prompt_mask: Tensor,  # (B, P) bool
) -> Tensor:  # (B,) int64
    """The rows from the shortest prompt to the longest; equals stay in their order."""
    return prompt_mask.sum(1).argsort(stable=True)


def trimmed(batch: PromptBatch) -> PromptBatch:
    """Without the columns in which every row has a pad."""
    first = batch.prompt_mask.shape[1] - int(batch.prompt_mask.sum(1).max())
    if not first:
        return batch
    return replace(batch, prompt_ids=batch.prompt_ids[:, first:], prompt_mask=batch.prompt_mask[:, first:])


def join_samples(parts: Sequence[Samples]) -> Samples:
    """The rows of all parts; a record that one of them does not have is left out."""
    columns = ([getattr(part, name) for part in parts] for name in Samples.__dataclass_fields__)
    return Samples(*(None if any(x is None for x in column) else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def verdicts(
    policy: TextPolicy,
    task: Task,
    examples: Sequence[Example],
    completion_ids: Tensor,  # (B, L) int64
) -> Verdicts:
    """Completions as text, their lengths in tokens up to and including the stop token, and the task's scores."""
    completions = policy.decode(completion_ids)
    lengths = policy.completion_lengths(completion_ids).tolist()
    ids = [row[:length] for row, length in zip(completion_ids.tolist(), lengths, strict=True)]
    return completions, lengths, judge(task, examples, completions, ids)


def judges_rows(task: Task) -> bool:
    """Whether a task says that a batch may be judged in parts, and in another thread."""
    return bool(getattr(task, "judges_rows", False))


class Judging(AbstractContextManager["Judging"]):
    """Judges finished rows in a thread, while the next ones are sampled."""

    def __init__(self, policy: TextPolicy, task: Task, examples: Sequence[Example]):
        self.policy, self.task, self.examples = policy, task, examples
        self.pool = ThreadPoolExecutor(1)
        self.parts: list[tuple[list[int], Future[Verdicts]]] = []

    def add(
        self,
        rows: Tensor,  # (b,) int64
        completion_ids: Tensor,  # (b, L) int64
    ) -> None:
        """Begin with these rows."""
        places = rows.tolist()
        examples = [self.examples[place] for place in places]
        self.parts.append((places, self.pool.submit(verdicts, self.policy, self.task, examples, completion_ids)))

    def verdicts(self) -> Verdicts:
        """Those of all rows, in their order. Raises: what judging raised."""
        found: dict[int, tuple[str, int, Score]] = {}
        for places, future in self.parts:
            found |= dict(zip(places, zip(*future.result(), strict=True), strict=True))
        completions, lengths, scores = zip(*(found[place] for place in sorted(found)), strict=True)
        return list(completions), list(lengths), list(scores)

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def judged(
    policy: TextPolicy,
    task: Task,
    examples: Sequence[Example],
    texts: list[str],
    batch: PromptBatch,
    samples: Samples,
    groups: Tensor,  # (B,) int64
    known: Callable[[], Verdicts] | None = None,
) -> Rollouts:
    """Finished completions with the task's scores, which `known` gives if they are being made already."""
    with failing_together():
        completions, lengths, scores = known() if known else verdicts(policy, task, examples, samples.completion_ids)
    return Rollouts(
        prompt_ids=batch.prompt_ids,
        prompt_mask=batch.prompt_mask,
        completion_ids=samples.completion_ids,
        prompt_key=batch.prompt_key,
        rollout_index=batch.rollout_index,
        groups=groups.to(policy.device),
        rewards=torch.tensor([s.value for s in scores], dtype=torch.float64, device=policy.device),
        length=torch.tensor(lengths, device=policy.device),
        reveal_step=samples.reveal_step,
        sample_logps=samples.logps,
        nfe=samples.nfe,
        drawn_logps=samples.drawn_logps,
        prompts=texts,
        completions=completions,
        statuses=[str(s.status) for s in scores],
        facts=[s.facts for s in scores],
    )


def draw_indices(noise: NoiseLike, iteration: int, count: int, num_examples: int) -> list[int]:
    """`count` example indices with replacement, a function of the iteration alone."""
    uniforms = noise.uniform(iteration, torch.arange(count))
    return [int(i) for i in (uniforms * num_examples).long().clamp(max=num_examples - 1)]


@dataclass
class GroupSource:
    """G completions for each of N prompts drawn from the task: the source of the online algorithms."""

    task: Task
    sampler: Sampler
    config: RolloutConfig
    noise: NoiseLike
    split: str = "train"

    def __post_init__(self) -> None:
        self.examples = self.task.examples(self.split)
        if not self.examples:
            raise DataError(f"the task has no examples in split {self.split!r}. Check task.data or the task's sizes.")

    @property
    def batch_rows(self) -> int:
        return self.config.batch_rows

    def examples_of(self, iteration: int, rows: slice) -> list[Example]:
        """Whose prompt it is, for the given rows of a batch."""
        n, size = self.config.prompts_per_batch, self.config.rows_per_prompt
        indices = draw_indices(self.noise.stream("prompts"), iteration, n, len(self.examples))
        return [self.examples[indices[row // size]] for row in range(self.batch_rows)[rows]]

    def collect(self, policy: TextPolicy, iteration: int, rows: slice) -> Rollouts:
        chosen = torch.arange(self.batch_rows)[rows]
        # unique among all rollouts of a prompt, also when the prompt is drawn twice
        rollout_index = iteration * self.batch_rows + chosen
        groups = chosen // self.config.group_size
        examples = self.examples_of(iteration, rows)
        rollouts = roll_out(
            policy,
            self.task,
            self.sampler,
            examples,
            rollout_index,
            groups,
            noise=self.noise.stream("sampler"),
            batch_size=self.config.batch_size,
        )
        return replace(rollouts, sampled_at=torch.full_like(rollouts.groups, iteration))


@dataclass
class DemonstrationSource:
    """Prompts with given completions (a teacher's or a dataset's), drawn with replacement: supervised training."""

    demonstrations: Sequence[tuple[Example, str]]
    gen_length: int
    rows: int
    noise: NoiseLike

    def __post_init__(self) -> None:
        if not self.demonstrations:
            raise DataError("there are no demonstrations to train on. Check task.num_demonstrations or data.file.")

    @property
    def batch_rows(self) -> int:
        return self.rows

    def collect(self, policy: TextPolicy, iteration: int, rows: slice) -> Rollouts:
        indices = draw_indices(self.noise.stream("prompts"), iteration, self.rows, len(self.demonstrations))
        chosen = range(self.rows)[rows]
        pairs = [self.demonstrations[indices[row]] for row in chosen]
        numbers = torch.tensor(list(chosen))
        return given(policy, pairs, self.gen_length, iteration * self.rows + numbers, numbers)


def given(
    policy: TextPolicy,
    pairs: Sequence[tuple[Example, str]],  # B
    gen_length: int,
    rollout_index: Tensor,  # (B,) int64
    groups: Tensor,  # (B,) int64
) -> Rollouts:
    """Completions that come from elsewhere, with reward 0: no policy of the run wrote them, and in no order."""
    with failing_together():
        texts = [policy.render(example.prompt) for example, _ in pairs]
        prompt_ids, prompt_mask = policy.encode_prompts(texts, gen_length)
        completion_ids = policy.encode_completions([text for _, text in pairs], gen_length)
    size, length = completion_ids.shape
    empty = torch.zeros(size, length, device=policy.device)
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        prompt_key=torch.tensor([example.id for example, _ in pairs], device=policy.device),
        rollout_index=rollout_index.to(policy.device),
        groups=groups.to(policy.device),
        rewards=torch.zeros(size, dtype=torch.float64, device=policy.device),
        length=policy.completion_lengths(completion_ids),
        reveal_step=empty.long(),
        sample_logps=empty.double(),
        nfe=torch.zeros(size, dtype=torch.int64, device=policy.device),
        prompts=texts,
        completions=[text for _, text in pairs],
        statuses=["given"] * size,
        facts=[{}] * size,
    )


def is_finished(rollouts: Rollouts) -> Tensor:  # (B,) bool
    """Rows that are whole completions: all but the inner nodes of trees."""
    if rollouts.window is None:
        return torch.ones_like(rollouts.groups, dtype=torch.bool)
    return rollouts.window[:, 1] == rollouts.window[:, 1].max()


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """What a batch of rollouts looks like, before any update on it; of trees, the leaves, compared over a prompt."""
    if rollouts.window is not None:
        rollouts = take_rows(rollouts, is_finished(rollouts).nonzero()[:, 0])
        rollouts = replace(rollouts, groups=rollouts.prompt_key)
    rewards = rollouts.rewards
    _, inverse = rollouts.groups.unique(return_inverse=True)
    num_groups = int(inverse.max()) + 1
    count = rewards.new_zeros(num_groups).index_add(0, inverse, torch.ones_like(rewards))
    mean = torch.zeros_like(count).index_add(0, inverse, rewards) / count
    variance = torch.zeros_like(count).index_add(0, inverse, (rewards - mean[inverse]) ** 2) / count
    keyed = torch.cat([inverse[:, None], rollouts.completion_ids], dim=1)
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(variance.sqrt().mean()),
        "frac_reward_zero_std": float((variance < 1e-12).double().mean()),
        "unique_completion_rate": keyed.unique(dim=0).shape[0] / len(rollouts),
        "completions/mean_length": float(rollouts.length.double().mean()),
        "nfe": float(rollouts.nfe.double().mean()),
    }
    for name in sorted({key for facts in rollouts.facts for key in facts}):
        metrics[f"train/{name}"] = sum(facts.get(name, 0.0) for facts in rollouts.facts) / len(rollouts)
    return metrics
