"""What a run will take, before it is made: model passes counted from the recipe, hours from three measured batches.

Nothing is written. The counts are those of one process and a run to its last batch; a stop rule may end it sooner.
"""

from __future__ import annotations

import json
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
from unmask.counting import Passes, batch_rows, count_passes, num_collected, sampling
from unmask.critic import Critic
from unmask.launch import Evaluator, check_source, open_buffer, open_source, open_value_model
from unmask.models import MaskedPolicy, build_tiny
from unmask.noise import Noise
from unmask.run_log import SilentView, rollout_rows, trained_parameters
from unmask.runs import plain
from unmask.strategies.pairs import OfflineConfig
from unmask.trainer import Trainer
from unmask.types import Batch

MEASURED_BATCHES = 3


@dataclass(frozen=True)
class Measurement:
    """What three batches of the run showed."""

    num_masks: int  # K
    tokens: float  # D, mean tokens of a canvas, pads not counted
    seconds: dict[str, float]  # median of a batch, by phase; "evaluate": of one sequence through the model
    checkpoint_bytes: int
    bytes_per_batch: float  # rows of the logs
    bytes_per_step: float
    num_evidence: int = 0  # K of the copies that weights of whole rollouts are made of
    prompt_tokens: float = 0.0  # mean tokens of a prompt
    value_model: ValueModelSize | None = None


@dataclass(frozen=True)
class ValueModelSize:
    """What the model that learns a number about each row adds to a run."""

    kind: str  # of its trunk: "adapter", "copy" or "reference"
    num_parameters: int  # all trained: head, and layers of its own
    weight_bytes: int
    optimizer_bytes: int


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
        return sum(map(self.pass_flops, self.passes))

    def pass_flops(self, item: Passes) -> float:
        """Of passes of one kind. A value model has the policy's layers, or the reference's."""
        tokens = self.measured.prompt_tokens if item.is_prompt_alone else self.measured.tokens
        return item.flops(self.num_parameters, tokens)

    @property
    def hours(self) -> dict[str, float]:
        """By phase; the time for loading the model and for writing files is not in it."""
        seconds, batches = self.measured.seconds, self.recipe.trainer.num_batches
        hours = {phase: seconds[phase] * batches / 3600 for phase in ("collect", "score", "update")}
        if self.recipe.rollout:  # reading a file takes no time to speak of
            hours["collect"] = seconds["collect"] * num_collected(self.recipe) / 3600
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
        value = self.measured.value_model
        return {
            "checkpoints": self.checkpoints[1] * self.measured.checkpoint_bytes,
            "models": (1 + has_best) * self.weight_bytes + (value.weight_bytes if value else 0),
            "logs": int(logs),
        }


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
    parameters = list(policy.module.parameters())  # before a value model adds its own
    measured = measure(recipe, policy, evaluator)
    num_held_out, num_final = (len(evaluator.held_out), len(evaluator.final)) if evaluator else (0, 0)
    return Plan(
        recipe=recipe,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        measured=measured,
        passes=list(
            count_passes(recipe, measured.num_masks, num_held_out, num_final, policy.block_size, measured.num_evidence)
        ),
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
    recipe = measured_recipe(recipe)
    source = open_source(recipe)
    check_source(policy, recipe, source)
    reference = None if recipe.is_supervised else reference_policy(policy)
    values = open_value_model(recipe, policy, reference)
    trainer = Trainer(
        policy,
        reference,
        source,
        recipe.algorithm.value,
        replace(recipe.trainer, num_batches=count, eval_every=0),
        recipe.optimizer,
        noise=Noise(recipe.seed).stream("train"),
        accelerator=Accelerator(cpu=not torch.accelerator.is_available()),
        listeners=(recorder,),
        buffer=open_buffer(recipe),
        value_model=values,
    )
    trainer.run()
    seconds = {phase: recorder.seconds(phase) for phase in ("collect", "score", "update")}
    seconds["evaluate"] = evaluation_seconds(recipe, evaluator) if evaluator else 0.0
    first = recorder.batches[0]
    tokens = torch.cat([batch.rollouts.prompt_mask.sum(1) for batch in recorder.batches]).double().mean()
    rows = rollout_rows(recorder.batches[-1])
    return Measurement(
        num_masks=first.draws[0].corruption.num_masks,
        num_evidence=first.evidence.corruption.num_masks if first.evidence else 0,
        tokens=float(tokens) + first.rollouts.completion_length,
        seconds=seconds,
        checkpoint_bytes=recorder.checkpoint_bytes,
        bytes_per_batch=json_bytes(rows),
        bytes_per_step=json_bytes(recorder.rows) / len(recorder.timing),
        prompt_tokens=float(tokens),
        value_model=value_model_size(values) if values else None,
    )


def value_model_size(values: Critic) -> ValueModelSize:
    """Of a value model, with AdamW's two moments of each weight that is used: a copy's output head is not."""
    module: Any = values.trunk.policy.module
    weights, outer = values.parameters, module.get_output_embeddings().weight
    is_unused = outer is not module.get_input_embeddings().weight
    moved = [p for p in weights if not (is_unused and p is outer)]
    return ValueModelSize(
        kind=values.trunk.kind,
        num_parameters=sum(p.numel() for p in weights),
        weight_bytes=sum(p.numel() * p.element_size() for p in weights),
        optimizer_bytes=2 * sum(p.numel() * p.element_size() for p in moved),
    )


def measured_recipe(recipe: Recipe) -> Recipe:
    """As the recipe, with every batch but one rolled out if any are, so that the median is of those."""
    if recipe.rollout is None:
        return recipe
    buffer = replace(recipe.rollout.buffer, collect_every=1)
    data = replace(recipe.data, num_batches=1) if isinstance(recipe.data, OfflineConfig) else None
    return replace(recipe, rollout=replace(recipe.rollout, buffer=buffer), data=data)


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
    values = trainer.value_model.state(keep=True) if trainer.value_model else None
    text = json.dumps(
        {
            "trainer": {name: pack(value, name, tensors) for name, value in vars(trainer.state).items()},
            "optimizer": pack(trainer.updates.state(keep=True), "optimizer", tensors),
            "buffer": pack(trainer.buffer.state(), "buffer", tensors),
            "value_model": pack(values, "value_model", tensors),
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
    lines = [
        f"plan of {'supervised training' if recipe.is_supervised else recipe.algorithm.name}, seed {recipe.seed}",
        *batch_lines(recipe),
        f"updates      {plan.num_updates:,}, each on masked copies of every completion: {measured.num_masks}",
        f"model        {plan.num_parameters:,} parameters, {measured.tokens:.1f} tokens a canvas",
        *value_lines(measured.value_model),
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


def batch_lines(recipe: Recipe) -> list[str]:
    """What the batches are, and how much comes together."""
    offline, rollout, lines, rollouts = recipe.num_offline_batches, recipe.rollout, [], 0
    if recipe.data:
        of = "given" if recipe.is_supervised else f"pairs x 2, of {Path(recipe.data.file or '').name}"
        lines.append(f"batches      {offline:,} of {recipe.data.batch_rows:,} completions ({of})")
        if not rollout:
            lines.append(f"completions  {offline * recipe.data.batch_rows:,}")
    if rollout:
        online = recipe.trainer.num_batches - offline
        completions = rollout.prompts_per_batch * rollout.group_size
        rollouts = num_collected(recipe) * completions
        of = f"{rollout.prompts_per_batch} prompts x {rollout.group_size}"
        lines.append(f"batches      {online:,} of {completions:,} completions ({of})")
        if rollout.batch_rows != completions:
            lines.append(f"rows         {rollout.batch_rows:,} of a batch are trained on, the nodes of its trees")
        lines.append(f"{'rollouts':12s} {rollouts:,}")
    return lines


def value_lines(value: ValueModelSize | None) -> list[str]:
    """The value model's own parameters, if there is one."""
    if value is None:
        return []
    trunk = {"adapter": "head and adapter", "copy": "head and a copy of the model", "reference": "head"}[value.kind]
    sizes = f"{size(value.weight_bytes)}, its optimiser {size(value.optimizer_bytes)}"
    return [f"value model  {value.num_parameters:,} parameters more ({trunk}), {sizes}"]


def pass_table(plan: Plan) -> list[str]:
    """One line for each kind of pass, and their sum."""
    line = "{:15s} {:>12s} {:>14s} {:>12s} {:>10s}"
    rows = [line.format("pass", "forwards", "sequences", "backwards", "FLOPs")]
    for p in filter(lambda item: item.forwards, plan.passes):
        flops = f"{plan.pass_flops(p):.2e}"
        rows.append(line.format(p.name, f"{p.forwards:,}", f"{p.sequences:,}", f"{p.backwards:,}", flops))
    total = [sum(getattr(p, key) for p in plan.passes) for key in ("forwards", "sequences", "backwards")]
    return [*rows, line.format("all", *(f"{n:,}" for n in total), f"{plan.flops:.2e}")]


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least 1 before the point."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(num_bytes), 1).bit_length() - 1, 49) // 10
    return f"{num_bytes / 1024**power:.{min(power, 1)}f} {units[power]}"
