"""tasks x sampler -> one evaluation row: accuracies with intervals, cost, and what identifies the setting."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.errors import DataError
from unmask.intervals import paired_difference, wilson
from unmask.kept import Kept
from unmask.ranks import failing_together, gather_objects, num_ranks, rank
from unmask.rollout import TextPolicy, draw_samples, encode, verdicts
from unmask.types import Example, NoiseLike, PromptBatch, Sampler, Status, Task, take_rows


@dataclass(frozen=True)
class Setting:
    """What an evaluation row says about itself beside the numbers."""

    task: str
    data: str
    sampler: str
    prompt: str
    model: str
    seed: int


@dataclass(frozen=True)
class Answer:
    """One completion and what the task says about it."""

    prompt_id: int
    sample: int
    """Number among the completions of its prompt."""
    gen_length: int  # canvas tokens
    prompt: str
    completion: str
    reward: float
    status: str
    length: int  # tokens up to and including the stop token
    facts: Mapping[str, float]
    nfe: int


@dataclass(frozen=True)
class Part:
    """A finished batch."""

    answers: list[Answer]
    seconds: float  # wall; of batches made at the same time by several processes, each has its share


def share(values: Sequence[float], num_samples: int = 1) -> dict[str, Any]:
    """Count, mean and interval of accuracies of examples, each 0 or 1, or the mean over `num_samples` completions.

    Completions of one example are not independent. So the interval is Wilson's for as many independent completions as
    would give the mean the variance that it has, n p (1 - p) / s² with s² over the n examples: n if the completions of
    an example always agree, up to n · num_samples if examples do not differ.
    """
    n = len(values)
    mean = sum(values) / max(1, n)
    count: float = n
    if num_samples > 1 and 0 < mean < 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / n
        count = min(n * num_samples, n * mean * (1 - mean) / max(variance, 1e-12))
    low, high = wilson(sum(values) if count == n else mean * count, count)
    return {"num_examples": n, "accuracy": mean, "ci95": [low, high]}


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
    kept: Kept | None = None,
    name: str = "",
) -> tuple[dict[str, Any], list[Answer]]:
    """`num_samples` completions per example, judged by the task. Returns the row and the completions it rests on, those
    of one example together.

    Several processes take whole batches in turn, so a batch is the same, to the last bit, whatever their number. With
    `kept`, finished batches are kept there under `name`, and those found there are not made again.

    Raises: DataError if there is nothing to evaluate.
    """
    if not examples:
        raise DataError(f"no examples to evaluate in {setting.data}. Name a data file with at least one scored row.")
    wanted = [example for example in examples for _ in range(num_samples)]
    index = torch.arange(len(wanted))
    texts, prompts = encode(policy, wanted, index % num_samples, sampler.gen_length)
    parts = restored(kept, name) if kept else {}
    todo = [number for number in range(-(-len(wanted) // batch_size)) if number not in parts]
    for first in range(0, len(todo), num_ranks()):
        numbers = todo[first : first + num_ranks()]
        start = time.perf_counter()
        own = numbers[rank()] if rank() < len(numbers) else len(wanted)  # nothing stands there
        rows = slice(own * batch_size, (own + 1) * batch_size)
        answers = answer(
            policy,
            task,
            sampler,
            wanted[rows],
            texts[rows],
            take_rows(prompts, rows),
            prompts.prompt_ids[:1],
            noise=noise,
        )
        gathered = gather_objects(answers)[: len(numbers)]
        seconds = (time.perf_counter() - start) / len(numbers)
        made = {number: Part(answers, seconds) for number, answers in zip(numbers, gathered, strict=True)}
        if kept:
            kept.add(name, {number: asdict(part) for number, part in made.items()})
        parts |= made
        if on_rows:
            on_rows(sum(len(part.answers) for part in made.values()))
    ordered = [parts[number] for number in sorted(parts)]
    answers = [answer for part in ordered for answer in part.answers]
    return summarise(task, examples, sampler, setting, answers, sum(part.seconds for part in ordered)), answers


def restored(kept: Kept, name: str) -> dict[int, Part]:
    """The batches finished before."""
    found = kept.parts(name)
    return {number: Part([Answer(**row) for row in part["answers"]], part["seconds"]) for number, part in found.items()}


def answer(
    policy: TextPolicy,
    task: Task,
    sampler: Sampler,
    examples: Sequence[Example],  # one per row
    texts: Sequence[str],
    prompts: PromptBatch,
    canvas: Tensor,  # (1, T) int64
    *,
    noise: NoiseLike,
) -> list[Answer]:
    """Complete and judge the rows of one batch; of several processes some may have none, see `draw_samples`."""
    jobs = [(prompts, None)] if examples else []
    parts = draw_samples(policy, sampler, jobs, canvas, noise=noise, batch_size=max(1, len(examples)))
    with failing_together():
        if not parts:
            return []
        (samples,) = parts
        completions, lengths, scores = verdicts(policy, task, examples, samples.completion_ids)
        return [
            Answer(
                prompt_id=examples[row].id,
                sample=int(prompts.rollout_index[row]),
                gen_length=samples.completion_ids.shape[1],
                prompt=texts[row],
                completion=completions[row],
                reward=float(score.value),
                status=str(score.status),
                length=lengths[row],
                facts={
                    key: value if isinstance(value, int | float) else float(value) for key, value in score.facts.items()
                },
                nfe=int(samples.nfe[row]),
            )
            for row, score in enumerate(scores)
        ]


def by_example(answers: Sequence[Answer], num_samples: int) -> list[list[float]]:
    """Which completions of each example are correct, as 0 or 1."""
    values = [answer.facts.get("accuracy", float(answer.status == Status.CORRECT)) for answer in answers]
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


def compare(own: Sequence[Answer], theirs: Sequence[Answer], num_samples: int) -> dict[str, Any]:
    """Accuracy less that of another model on the same examples, example by example: mean, Student's 95 % interval (of
    one example -1 to 1), and the examples won and lost."""
    means = [
        {place: sum(values) / len(values) for place, values in enumerate(by_example(answers, num_samples))}
        for answers in (own, theirs)
    ]
    found = paired_difference(*means)
    assert found
    pairs = [(value, means[1][place]) for place, value in means[0].items()]
    return {
        "difference": found.mean,
        "difference_ci95": [-1.0, 1.0] if found.low is None else [found.low, found.high],
        "won": sum(value > other for value, other in pairs),
        "lost": sum(value < other for value, other in pairs),
    }


def further_settings(sampler: Sampler) -> dict[str, Any]:
    """{"sampler_options": settings that have no column and are not the default ones}, or nothing."""
    has_column = ("gen_length", "num_steps", "block_length", "temperature")
    if not is_dataclass(sampler):
        return {}
    known = [field for field in fields(sampler) if field.name not in has_column]
    changed = {field.name: value for field in known if (value := getattr(sampler, field.name)) != field.default}
    return {"sampler_options": changed} if changed else {}


def summarise(
    task: Task,
    examples: Sequence[Example],
    sampler: Sampler,
    setting: Setting,
    answers: Sequence[Answer],
    seconds: float,  # wall
) -> dict[str, Any]:
    """The evaluation row; fractions in [0, 1], tokens are canvas tokens.

    With several completions per example the interval allows for their being dependent, see `share`, and `pass@k` is
    added: the probability that one of k is correct.
    """
    num_samples = len(answers) // len(examples)
    of_examples = by_example(answers, num_samples)
    accuracy = [sum(values) / num_samples for values in of_examples]
    row: dict[str, Any] = {"task": setting.task, "data": setting.data, **share(accuracy, num_samples)}
    if num_samples > 1:
        row["num_samples"] = num_samples
        row |= {f"pass@{k}": pass_at(of_examples, k) for k in powers_of_two(num_samples)}
        row["unique_completion_rate"] = unique_share([answer.completion for answer in answers], num_samples)
    for name in sorted({key for answer in answers for key in answer.facts} - {"accuracy"}):
        row[name] = sum(answer.facts.get(name, 0.0) for answer in answers) / len(answers)
    counts = Counter(answer.status for answer in answers)
    row |= {
        "reward": float(torch.tensor([answer.reward for answer in answers], dtype=torch.float64).mean()),
        "parse_failures": counts[Status.UNPARSED] / len(answers),
        "statuses": {str(status): counts[status] for status in Status if counts[status]},
        "gen_length": sampler.gen_length,
        "num_steps": getattr(sampler, "num_steps", None) or sampler.gen_length,
        "block_length": getattr(sampler, "block_length", None) or sampler.gen_length,
        "temperature": getattr(sampler, "temperature", 0.0),
        "sampler": setting.sampler,
        **further_settings(sampler),
        "prompt": setting.prompt,
        "nfe_per_completion": sum(answer.nfe for answer in answers) / len(answers),
        "seconds": seconds,
        "tokens_per_second": len(answers) * sampler.gen_length / max(seconds, 1e-9),
        "model": setting.model,
        "seed": setting.seed,
    }
    strata: dict[str, list[float]] = {}
    for example, value in zip(examples, accuracy, strict=True):
        strata.setdefault(task.stratum(example), []).append(value)
    if len(strata) > 1:
        row |= {name: share(values, num_samples) for name, values in sorted(strata.items())}
    return row
