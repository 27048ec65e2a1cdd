"""What a run will take, before it is made: model passes counted from the recipe, hours from three measured batches.

Nothing is written. The counts are those of one process and a run to its last batch; a stop rule may end it sooner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from unmask.bases import fit_for_training, model_directory, open_for_training, reference_policy
from unmask.build import Recipe, supervised_base
from unmask.checkpoint import pack
from unmask.config import dump_toml
from unmask.launch import Evaluator, check_source, open_source
from unmask.models import MaskedPolicy, build_tiny
from unmask.noise import Noise
from unmask.run_log import SilentView, rollout_rows, trained_parameters
from unmask.runs import plain
from unmask.scoring import micro_batches
from unmask.trainer import Trainer
from unmask.types import Batch, PromptBatch, Sampler, TokenOutput

MEASURED_BATCHES = 3


@dataclass(frozen=True)
class Passes:
    """Model passes of one kind over a whole run.

    `sequences` are canvases sent through the model. Masked copies in which nothing happens to be masked are left out
    when they are scored, so for algorithms that draw mask counts from 0 on it is an upper bound, at most 1/(L+1) high.
    """

    name: str
    phase: str  # of the trainer's timing: "collect", "score", "update" or "evaluate"
    forwards: int  # calls
    sequences: int
    backwards: int = 0  # calls; each follows one of the forwards
    backward_sequences: int = 0

    def flops(self, num_parameters: int, tokens: float) -> float:
        """2ND a sequence forward, 4ND backward: N parameters, D tokens of a canvas."""
        return (2 * self.sequences + 4 * self.backward_sequences) * num_parameters * tokens


@dataclass(frozen=True)
class Measurement:
    """What three batches of the run showed."""

    num_masks: int  # K
    tokens: float  # D, mean tokens of a canvas, pads not counted
    seconds: dict[str, float]  # median of a batch, by phase; "evaluate": of one sequence through the model
    checkpoint_bytes: int
    bytes_per_batch: float  # rows of the logs
    bytes_per_step: float


@dataclass(frozen=True)
class Plan:
    """The counts, sizes and hours of a run."""

    recipe: Recipe
    num_parameters: int
    weight_bytes: int
    measured: Measurement
    passes: list[Passes]
    base: Plan | None = None
    """Of the supervised run that has to come first, because its result is not in the cache."""

    @property
    def num_updates(self) -> int:
        return int(self.recipe.trainer.num_batches * self.recipe.algorithm.value.num_iterations)

    @property
    def flops(self) -> float:
        return sum(item.flops(self.num_parameters, self.measured.tokens) for item in self.passes)

    @property
    def hours(self) -> dict[str, float]:
        """By phase; the time for loading the model and for writing files is not in it."""
        seconds, batches = self.measured.seconds, self.recipe.trainer.num_batches
        hours = {phase: seconds[phase] * batches / 3600 for phase in ("collect", "score", "update")}
        evaluated = sum(item.sequences for item in self.passes if item.phase == "evaluate")
        return {**hours, "evaluate": seconds["evaluate"] * evaluated / 3600}

    @property
    def checkpoints(self) -> tuple[int, int]:
        """(written, kept at the end)."""
        every = self.recipe.trainer.save_every
        written = -(-self.num_updates // every) if every else 0  # the last update's is always among them
        return written, min(written, self.recipe.trainer.save_total_limit)

    @property
    def disk_bytes(self) -> dict[str, int]:
        """What the run directory holds at the end."""
        trainer = self.recipe.trainer
        logs = self.measured.bytes_per_batch * trainer.num_batches + self.measured.bytes_per_step * self.num_updates
        has_best = bool(self.recipe.task and trainer.eval_every)
        return {
            "checkpoints": self.checkpoints[1] * self.measured.checkpoint_bytes,
            "models": (1 + has_best) * self.weight_bytes,
            "logs": int(logs),
        }


# ---- counting


def count_passes(
    recipe: Recipe, num_masks: int, num_held_out: int, num_final: int, block_size: int | None = None
) -> Iterator[Passes]:
    """Every model pass of the run; `num_masks` is K of one draw, then numbers of examples, `block_size` the policy's.

    collect     S forwards a rollout                    update     μ (+ μ where a first pass is needed)
    old         one for each draw but the first          reference  one for each draw
    monitor     2 copies of some rollouts, policy and reference
    """
    trainer, algorithm = recipe.trainer, recipe.algorithm.value
    batches, size, rows = trainer.num_batches, trainer.micro_batch_size, batch_rows(recipe)
    draws = algorithm.num_iterations if algorithm.fresh_masks else 1
    calls, copies = num_parts(rows, num_masks, size), rows * num_masks
    if recipe.rollout and recipe.sampler:
        yield sampling("collect", "collect", recipe.sampler.value, rows, recipe.rollout.batch_size, batches, block_size)
    if algorithm.needs.old:
        # the first update's own pass gives the old log-probabilities, unless these are read from other masks
        scored = (draws - 1 if algorithm.share_masks else draws) * batches
        yield Passes("old policy", "score", scored * calls, scored * copies)
    if algorithm.needs.ref:
        yield Passes("reference", "score", draws * batches * calls, draws * batches * copies)
    if trainer.monitor_rows:
        watched, models = min(trainer.monitor_rows, rows), 1 if recipe.data else 2
        forwards = num_parts(watched, 2, size) * models * batches
        yield Passes("monitor", "score", forwards, 2 * watched * models * batches)
    updates = batches * algorithm.num_iterations
    passes = 1 if algorithm.is_row_separable and size >= num_masks else 2
    yield Passes(
        "update", "update", passes * updates * calls, passes * updates * copies, updates * calls, updates * copies
    )
    if recipe.evaluation_sampler:
        yield from evaluation_passes(recipe, num_held_out, num_final, block_size)


def evaluation_passes(
    recipe: Recipe, num_held_out: int, num_final: int, block_size: int | None = None
) -> Iterator[Passes]:
    """The periodic evaluations, and those before (reinforcement only) and after the training."""
    assert recipe.evaluation_sampler
    sampler, size = recipe.evaluation_sampler.value, recipe.evaluation.batch_size
    every, batches = recipe.trainer.eval_every, recipe.trainer.num_batches
    times = -(-batches // every) if every else 0  # every so many batches, and after the last
    yield sampling("evaluation", "evaluate", sampler, num_held_out, size, times, block_size)
    samplers = [replace(sampler, num_steps=n) for n in recipe.evaluation.final_num_steps] or [sampler]
    rounds = [sampling("", "", s, num_final, size, 1 if recipe.data else 2, block_size) for s in samplers]
    forwards, sequences = sum(r.forwards for r in rounds), sum(r.sequences for r in rounds)
    yield Passes("final rows" if recipe.data else "base and final", "evaluate", forwards, sequences)


def sampling(
    name: str, phase: str, sampler: Sampler, rows: int, batch_size: int, times: int, block_size: int | None = None
) -> Passes:
    """Passes of sampling `rows` completions, `times` times over, from a model that reads in blocks if so said."""
    steps = rehearse(sampler, 1, block_size).forwards
    return Passes(name, phase, times * -(-rows // batch_size) * steps, times * rows * steps)


@dataclass
class Decoding:
    """What a sampler asks of a model for one completion; samplers that may finish sooner are taken not to."""

    forwards: int = 0
    tokens: int = 0  # through the model, in all forwards
    wanted: int = 0  # positions whose logits are asked for, in all forwards
    most_tokens: int = 0  # in one forward
    most_wanted: int = 0
    pairs: int = 0  # a token and one that it sees, in all forwards
    cached: int = 0  # positions whose keys and values are kept, at most


class _Cache:
    """Counts the positions that a model would keep."""

    length = 0

    def get_seq_length(self) -> int:
        return self.length


class _Listener:
    """A policy that knows nothing, and writes down what it is asked."""

    mask_token_id, pad_token_id, max_length = 7, 0, 1 << 60
    stop_token_ids: tuple[int, ...] = (6,)
    device = torch.device("cpu")

    def __init__(self, block_size: int | None):
        self.block_size = block_size
        self.heard = Decoding()

    def token_outputs(
        self,
        canvas: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        *,
        targets: Tensor | None = None,
        want: Sequence[str] = ("logits",),
        cache: Any = None,
    ) -> TokenOutput:
        tokens, wanted = canvas.shape[1], int(positions.sum())
        seen = tokens + (cache.length if cache is not None else 0)
        heard = self.heard
        self.heard = Decoding(
            forwards=heard.forwards + 1,
            tokens=heard.tokens + tokens,
            wanted=heard.wanted + wanted,
            most_tokens=max(heard.most_tokens, tokens),
            most_wanted=max(heard.most_wanted, wanted),
            pairs=heard.pairs + tokens * seen,
            cached=max(heard.cached, seen if cache is not None else 0),
        )
        if cache is not None:
            cache.length = seen
        logits = torch.zeros(wanted, 8)
        logits[:, self.mask_token_id] = -torch.inf
        logp = None if targets is None else torch.zeros(wanted)
        return TokenOutput(logits, logp, torch.zeros(wanted))

    def new_cache(self) -> _Cache:
        return _Cache()

    def forget(self, cache: _Cache, num_positions: int) -> None:
        cache.length -= num_positions


def rehearse(sampler: Sampler, prompt_tokens: int, block_size: int | None = None) -> Decoding:
    """Let the sampler write one completion with a model that gives every token the same probability."""
    policy = _Listener(block_size)
    ids = torch.zeros(1, prompt_tokens, dtype=torch.int64)
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1).long(), torch.zeros(1).long())
    sampler.sample(policy, prompts, noise=Noise(0))
    return policy.heard


def num_parts(num_rows: int, num_masks: int, micro_batch_size: int) -> int:
    """Micro-batches of one pass over the masked copies of a batch."""
    return sum(1 for _ in micro_batches(num_rows, num_masks, micro_batch_size))


def batch_rows(recipe: Recipe) -> int:
    """B, rollouts or demonstrations of a batch."""
    if recipe.rollout:
        return recipe.rollout.prompts_per_batch * recipe.rollout.group_size
    assert recipe.data
    return recipe.data.batch_size


# ---- measuring


def plan_run(recipe: Recipe) -> Plan:
    """Counts from the recipe, sizes and hours from the real model on real batches; nothing is written.

    Raises: ConfigError, DataError or ModelError as the run would, TrainingError if it breaks within these batches.
    """
    evaluator = Evaluator(recipe, SilentView()) if recipe.task else None
    policy, base = starting_policy(recipe)
    policy.module.to(Accelerator(cpu=not torch.accelerator.is_available()).device)
    if evaluator:
        evaluator.attach(policy)
    measured = measure(recipe, policy, evaluator)
    num_held_out, num_final = (len(evaluator.held_out), len(evaluator.final)) if evaluator else (0, 0)
    parameters = list(policy.module.parameters())
    return Plan(
        recipe=recipe,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        measured=measured,
        passes=list(count_passes(recipe, measured.num_masks, num_held_out, num_final, policy.block_size)),
        base=base,
    )


def starting_policy(recipe: Recipe) -> tuple[MaskedPolicy, Plan | None]:
    """The model that the run starts from; if it is not trained yet, a new one of its shape, and the plan for it."""
    if recipe.model.tiny:
        return build_tiny(recipe.model.tiny, seed=recipe.seed), None
    if recipe.model.path:
        return open_for_training(model_directory(recipe.model.path), recipe.model, seed=recipe.seed), None
    assert recipe.model.recipe
    base, directory = supervised_base(Path(recipe.model.recipe), recipe.seed)
    if (directory / "summary.json").is_file():
        return open_for_training(directory / "model", recipe.model, seed=recipe.seed), None
    assert base.model.tiny
    policy = build_tiny(base.model.tiny, seed=base.seed)
    return fit_for_training(policy, recipe.model, seed=recipe.seed), plan_run(base)


def measure(recipe: Recipe, policy: MaskedPolicy, evaluator: Evaluator | None) -> Measurement:
    """Collect, score and update three batches as the run would, then evaluate some completions."""
    count = min(MEASURED_BATCHES, recipe.trainer.num_batches)
    recorder = Recorder()
    source = open_source(recipe)
    check_source(policy, recipe, source)
    trainer = Trainer(
        policy,
        reference_policy(policy) if recipe.data is None else None,
        source,
        recipe.algorithm.value,
        replace(recipe.trainer, num_batches=count, eval_every=0),
        recipe.optimizer,
        noise=Noise(recipe.seed).stream("train"),
        accelerator=Accelerator(cpu=not torch.accelerator.is_available()),
        listeners=(recorder,),
    )
    trainer.run()
    seconds = {phase: recorder.seconds(phase) for phase in ("collect", "score", "update")}
    seconds["evaluate"] = evaluation_seconds(recipe, evaluator) if evaluator else 0.0
    first = recorder.batches[0]
    tokens = torch.cat([batch.rollouts.prompt_mask.sum(1) for batch in recorder.batches]).double().mean()
    rows = rollout_rows(first) if recipe.data is None else []
    return Measurement(
        num_masks=first.draws[0].corruption.num_masks,
        tokens=float(tokens) + first.rollouts.completion_length,
        seconds=seconds,
        checkpoint_bytes=recorder.checkpoint_bytes,
        bytes_per_batch=json_bytes(rows),
        bytes_per_step=json_bytes(recorder.rows) / len(recorder.timing),
    )


def evaluation_seconds(recipe: Recipe, evaluator: Evaluator) -> float:
    """Wall time of one sequence in one denoising step, from a batch no larger than those of the training."""
    sampler = evaluator.sampler.value
    rows = min(len(evaluator.held_out), recipe.evaluation.batch_size, batch_rows(recipe))
    row = evaluator.row(recipe.evaluation.split, evaluator.held_out[:rows], sampler)
    return float(row["seconds"]) / sampling("", "", sampler, rows, rows, 1, evaluator.policy.block_size).sequences


@dataclass
class Recorder:
    """The trainer's listener of a measurement: keeps batches, rows and times in memory."""

    batches: list[Batch] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, float]] = field(default_factory=list)
    checkpoint_bytes: int = 0

    def on_batch(self, batch: Batch) -> None:
        self.batches.append(batch)

    def on_step(self, row: dict[str, float], timing: dict[str, float]) -> None:
        self.rows += [row, {"step": row["step"], **timing}]
        self.timing.append({"iteration": row["iteration"], **timing})

    def on_evaluation(self, row: dict[str, Any], is_best: bool) -> None: ...

    def on_boundary(self, trainer: Trainer) -> None:
        if trainer.state.batch is not None and trainer.state.inner == 1:
            self.checkpoint_bytes = checkpoint_bytes(trainer)

    def on_fault(self, trainer: Trainer, message: str) -> None: ...

    def seconds(self, phase: str) -> float:
        """Median over the batches."""
        totals = [
            sum(row.get(phase, 0.0) for row in self.timing if row["iteration"] == batch.iteration)
            for batch in self.batches
        ]
        return median(totals)


def checkpoint_bytes(trainer: Trainer) -> int:
    """Size of a checkpoint of the trainer as it stands: weights, optimiser and the batch in use."""
    module = trainer.policy.module  # type: ignore[attr-defined]
    tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in trained_parameters(module)}
    text = json.dumps(
        {
            "trainer": {name: pack(value, name, tensors) for name, value in vars(trainer.state).items()},
            "optimizer": pack(trainer.updates.state(keep=True), "optimizer", tensors),
        }
    )
    header = sum(len(name) + 80 for name in tensors)  # type, shape and place of each tensor as JSON
    return len(text) + header + sum(t.numel() * t.element_size() for t in tensors.values())


def json_bytes(rows: list[dict[str, Any]]) -> int:
    """Bytes of these rows in a log."""
    return sum(len(json.dumps(plain(row), ensure_ascii=False).encode()) + 1 for row in rows)


# ---- text


def plan_text(plan: Plan) -> str:
    """The resolved recipe as TOML with the plan in comments, so that the whole is a recipe again."""
    lines = [dump_toml(plan.recipe.tree()), *(f"# {line}".rstrip() for line in plan_lines(plan))]
    return "\n".join(lines)


def plan_lines(plan: Plan) -> list[str]:
    recipe, measured = plan.recipe, plan.measured
    written, kept = plan.checkpoints
    disk = plan.disk_bytes
    hours = plan.hours
    of = f"{recipe.rollout.prompts_per_batch} prompts x {recipe.rollout.group_size}" if recipe.rollout else "given"
    lines = [
        f"plan of {'supervised training' if recipe.data else recipe.algorithm.name}, seed {recipe.seed}",
        f"batches      {recipe.trainer.num_batches:,} of {batch_rows(recipe):,} completions ({of})",
        f"{'rollouts' if recipe.rollout else 'completions':12s} {recipe.trainer.num_batches * batch_rows(recipe):,}",
        f"updates      {plan.num_updates:,}, each on masked copies of every completion: {measured.num_masks}",
        f"model        {plan.num_parameters:,} parameters, {measured.tokens:.1f} tokens a canvas",
        "",
        *pass_table(plan),
        "",
        f"checkpoints  {written:,} written, {kept} kept, {size(measured.checkpoint_bytes)} each",
        f"disk         {size(sum(disk.values()))}: " + ", ".join(f"{name} {size(n)}" for name, n in disk.items()),
        f"hours        {sum(hours.values()):.3f}: " + ", ".join(f"{name} {value:.3f}" for name, value in hours.items()),
        f"             by {MEASURED_BATCHES} measured batches (threads: {torch.get_num_threads()}); "
        "loading and writing come on top",
    ]
    stop = recipe.trainer.stop
    if stop.at_most is not None or stop.at_least is not None:
        lines.append("             the stop rule may end the run sooner")
    if plan.base:
        lines += [
            "",
            "The base is not in the cache: it is trained first, and the hours above are a new model's of its shape.",
        ]
        lines += plan_lines(plan.base)
    return lines


def pass_table(plan: Plan) -> list[str]:
    """One line for each kind of pass, and their sum."""
    line = "{:15s} {:>12s} {:>14s} {:>12s} {:>10s}"
    rows = [line.format("pass", "forwards", "sequences", "backwards", "FLOPs")]
    for p in filter(lambda item: item.forwards, plan.passes):
        flops = f"{p.flops(plan.num_parameters, plan.measured.tokens):.2e}"
        rows.append(line.format(p.name, f"{p.forwards:,}", f"{p.sequences:,}", f"{p.backwards:,}", flops))
    total = [sum(getattr(p, key) for p in plan.passes) for key in ("forwards", "sequences", "backwards")]
    return [*rows, line.format("all", *(f"{n:,}" for n in total), f"{plan.flops:.2e}")]


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least 1 before the point."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(num_bytes), 1).bit_length() - 1, 49) // 10
    return f"{num_bytes / 1024**power:.{min(power, 1)}f} {units[power]}"
