"""Whole runs: from a recipe to a run directory. What `unmask train` and `unmask sft` do."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging as transformers_logging

from unmask import __version__
from unmask.bases import model_directory, open_for_training, reference_policy, weights_digest
from unmask.buffer import Buffer
from unmask.build import DataConfig, Recipe, TrackingConfig, any_recipe, supervised_base
from unmask.checkpoint import unpack
from unmask.config import dump_toml, read_recipe
from unmask.critic import Critic, make_value_model
from unmask.demonstrations import read_demonstrations
from unmask.errors import ConfigError, DataError, Stopped
from unmask.evaluation import Setting, evaluate
from unmask.models import MaskedPolicy, build_tiny
from unmask.noise import Noise
from unmask.optional import optional
from unmask.preferences import read_preferences
from unmask.ranks import gather_objects, num_ranks, own_rows, rank
from unmask.rollout import DemonstrationSource, GroupSource, Source
from unmask.run_log import RunLog, SilentView, StopRequest, View, restore_weights
from unmask.runs import RunDirectory
from unmask.sharding import check_launcher, sharding_plugin, unknown_to_accelerate
from unmask.strategies.pairs import OfflineThenOnline, PairSource
from unmask.trainer import Trainer
from unmask.types import Batch, Draw, Example, Sampler

OpenSource = GroupSource | DemonstrationSource | PairSource | OfflineThenOnline

transformers_logging.disable_progress_bar()  # the view has its own


def run_recipe(recipe: Recipe, output: str | Path, view: View, *, resume: bool = False) -> dict[str, Any]:
    """Train as the recipe says, by reinforcement or on demonstrations; returns summary.json's content.

    With `resume` the run in `output` goes on from its newest good checkpoint, or from the start if it has none.
    Raises: Stopped if the process was asked to stop; a checkpoint is there then.
    """
    run = open_run(output, resume)
    started = time.perf_counter()
    accelerator = make_accelerator(recipe.tracking, run)
    source = open_source(recipe)
    evaluator = Evaluator(recipe, view) if recipe.task else None
    policy = base_policy(recipe, view)
    if sharding_plugin(accelerator) is None:  # otherwise it goes there in slices, once its digest is taken
        policy.module.to(accelerator.device)
    if evaluator:
        evaluator.attach(policy)
    check_source(policy, recipe, source)
    reference = None if recipe.is_supervised else reference_policy(policy, accelerator)
    digest = weights_digest(policy.module)  # before the trainer wraps or shards it
    values = open_value_model(recipe, policy, reference, accelerator)
    if rank() == 0 and not resume:
        run.create(dump_toml(recipe.tree()))
    carried: dict[str, Any] = {"base": [], "base_weights": digest}
    train_loop(recipe, policy, reference, values, source, evaluator, run, view, accelerator, carried, resume)
    return write_summary(run, recipe, carried["base"], evaluator.final_rows("final") if evaluator else [], started)


def open_source(recipe: Recipe) -> OpenSource:
    """Where the run's batches come from. Raises: ConfigError or DataError if it can give none."""
    noise = Noise(recipe.seed)
    if isinstance(recipe.data, DataConfig):
        return open_demonstrations(recipe, recipe.data)
    online = offline = None
    if recipe.rollout:
        assert recipe.task and recipe.sampler
        stream = noise.stream("train").stream("rollouts")
        online = recipe.rollout.source(recipe.task.value, recipe.sampler.value, stream)
        recipe.rollout.share(own_rows(online.batch_rows))
    if recipe.data:
        assert recipe.data.gen_length
        pairs = read_preferences(recipe.data.file, recipe.data.split)
        stream = noise.stream("train").stream("pairs")
        offline = PairSource(pairs, recipe.data.gen_length, recipe.data.batch_size, stream)
        own_rows(offline.batch_rows)
    if offline and online:
        return OfflineThenOnline(offline, online, recipe.num_offline_batches)
    source = online or offline
    assert source
    return source


def open_demonstrations(recipe: Recipe, data: DataConfig) -> DemonstrationSource:
    """The source of supervised training."""
    assert data.gen_length
    if data.file:
        rows = read_demonstrations(data.file)
    else:
        assert recipe.task
        rows = recipe.task.value.demonstrations("train")
    stream = Noise(recipe.seed).stream("sft").stream("data")
    source = DemonstrationSource(rows, data.gen_length, data.batch_size, stream)
    own_rows(source.batch_rows)
    return source


def check_source(policy: MaskedPolicy, recipe: Recipe, source: OpenSource) -> None:
    """Raises: DataError before anything is written if a text of the source does not fit the model."""
    if isinstance(source, OfflineThenOnline):
        check_source(policy, recipe, source.offline)
        check_source(policy, recipe, source.online)
    elif isinstance(source, GroupSource):
        check_prompts(policy, source.examples, source.sampler.gen_length)
    elif isinstance(source, PairSource):
        source.check(policy)
    else:
        check_prompts(policy, [example for example, _ in source.demonstrations], source.gen_length)
        for _, completion in source.demonstrations:
            policy.encode_completions([completion], source.gen_length)


def open_buffer(recipe: Recipe) -> Buffer | None:
    """The run's store of earlier rollouts."""
    return Buffer(recipe.rollout.buffer, Noise(recipe.seed).stream("train")) if recipe.rollout else None


def open_value_model(
    recipe: Recipe, policy: MaskedPolicy, reference: MaskedPolicy | None, accelerator: Accelerator | None = None
) -> Critic | None:
    """What the algorithm learns beside the policy, if anything; opened before the trainer wraps the policy."""
    needs, size = recipe.algorithm.value.needs, recipe.trainer.micro_batch_size
    return make_value_model(policy, reference, needs, seed=recipe.seed, micro_batch_size=size, accelerator=accelerator)


def make_accelerator(tracking: TrackingConfig, run: RunDirectory) -> Accelerator:
    """Placement and trackers. Raises: ConfigError if a tracker is not installed."""
    for name in tracking.trackers:
        optional(name, "trackers")
    check_launcher()
    with unknown_to_accelerate():
        return Accelerator(
            cpu=not torch.accelerator.is_available(),  # several processes on CPU need the flag
            log_with=list(tracking.trackers) or None,
            project_dir=str(run.path),
            # buffers are constants of the model; sending them would make every forward wait for all processes
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )


def join_processes() -> None:
    """Meet the launcher's other processes, if there are any, where nothing is trained: each has the whole model."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with unknown_to_accelerate():
            PartialState(cpu=not torch.accelerator.is_available())


def open_run(output: str | Path, resume: bool) -> RunDirectory:
    """The run directory, checked: new, or an unfinished one to go on with."""
    run = RunDirectory(output)
    if not resume:
        run.check_new()
    elif not (run.path / "config.toml").is_file():
        raise ConfigError(f"--resume {run.path}: no config.toml there. Name the directory of a run.")
    elif (run.path / "summary.json").is_file():
        raise ConfigError(f"--resume {run.path}: this run is complete; its model is in {run.path / 'model'}.")
    return run


def train_loop(
    recipe: Recipe,
    policy: MaskedPolicy,
    reference: MaskedPolicy | None,
    values: Critic | None,
    source: Source,
    evaluator: Evaluator | None,
    run: RunDirectory,
    view: View,
    accelerator: Accelerator,
    carried: dict[str, Any],
    resume: bool,
) -> None:
    """From the first evaluation to the trained weights in model/. `carried` goes into checkpoints and comes back."""
    stop = StopRequest()
    digest = carried["base_weights"]
    log = RunLog(run, view, policy, accelerator, stop=stop, carried=carried, with_rollouts=recipe.rollout is not None)
    trainer = Trainer(
        policy,
        reference,
        source,
        recipe.algorithm.value,
        recipe.trainer,
        recipe.optimizer,
        noise=Noise(recipe.seed).stream("train"),
        accelerator=accelerator,
        evaluate=evaluator.held_out_row if evaluator else None,
        listeners=(log,),
        value_model=values,
        buffer=open_buffer(recipe),
    )
    is_restored = resume and log.restore(trainer, digest)
    carried["base_weights"] = digest
    if not is_restored:
        if rank() == 0:
            run.cut_back({})
        if evaluator and not recipe.is_supervised:
            carried["base"] = evaluator.final_rows("base")
    view.stage(f"training with {recipe.algorithm.name}", trainer.total_steps, trainer.state.step)
    if recipe.tracking.trackers:
        accelerator.init_trackers(recipe.tracking.project)
    try:
        with stop.listening():
            trainer.run()
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    log.save_model("model")
    if values:
        weights = values.weights(keep=rank() == 0)
        if rank() == 0:
            run.save_model("energy", lambda path: values.save(path, weights))


class Evaluator:
    """Evaluates the policy of a run: on held-out prompts as it goes, on the final split before and after.

    Built before there is a policy, so that a recipe that cannot be evaluated is refused before any work.
    """

    def __init__(self, recipe: Recipe, view: View):
        assert recipe.task and recipe.evaluation_sampler
        self.recipe, self.view = recipe, view
        self.task, self.config, self.sampler = recipe.task, recipe.evaluation, recipe.evaluation_sampler
        self.noise = Noise(recipe.seed).stream("evaluation")
        self.held_out = self.task.value.examples(self.config.split)[: self.config.num_examples]
        self.final = self.task.value.examples(self.config.final_split)
        self.final_samplers = recipe.final_samplers
        metric = recipe.trainer.stop.metric
        facts = self.task.value.score(self.held_out[0], "").facts if self.held_out else {}
        known = sorted({"accuracy", "reward", "parse_failures", *facts})
        if metric not in known:
            raise ConfigError(
                f"trainer.stop.metric = {metric!r}: is no number of an evaluation. Known: {', '.join(known)}."
            )

    def attach(self, policy: MaskedPolicy) -> None:
        """The policy to evaluate. Raises: DataError if a prompt does not fit it."""
        self.policy = policy
        check_prompts(policy, [*self.held_out, *self.final], self.sampler.value.gen_length)

    def held_out_row(self) -> dict[str, Any]:
        """The periodic row, without wall times: evaluations.jsonl compares byte by byte."""
        row = self.row(self.config.split, self.held_out, self.sampler.value)
        return {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}

    def final_rows(self, name: str) -> list[dict[str, Any]]:
        """One row for each number of denoising steps, on the final split."""
        self.view.stage(f"evaluating the {name} model", len(self.final) * len(self.final_samplers))
        split = self.config.final_split
        rows = [self.row(split, self.final, sampler, self.view.advance) for sampler in self.final_samplers]
        return [{**row, "model": name} for row in rows]

    def row(
        self,
        split: str,
        examples: list[Example],
        sampler: Sampler,
        on_rows: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        setting = Setting(
            task=self.task.name,
            data=self.task.value.source(split),
            sampler=self.sampler.name,
            prompt=self.task.value.prompt,
            model="policy",
            seed=self.recipe.seed,
        )
        row, _ = evaluate(
            self.policy,
            self.task.value,
            examples,
            sampler,
            setting,
            noise=self.noise,
            # processes take whole batches: none of them waits while there are examples
            batch_size=min(self.config.batch_size, -(-len(examples) // num_ranks())) or 1,
            on_rows=on_rows,
        )
        return row


def check_prompts(policy: MaskedPolicy, examples: Sequence[Example], gen_length: int) -> None:
    """Raises: DataError before anything is written if a prompt and its completion do not fit the model."""
    policy.encode_prompts([policy.render(example.prompt) for example in examples], gen_length)


def write_summary(
    run: RunDirectory, recipe: Recipe, base: list[dict[str, Any]], final: list[dict[str, Any]], started: float
) -> dict[str, Any]:
    """summary.json: the rows before and after, and what was done."""
    summary = {
        "unmask": __version__,
        "algorithm": recipe.algorithm.name,
        "task": recipe.task.name if recipe.task else recipe.data.file if recipe.data else None,
        "seed": recipe.seed,
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "base": base,
        "final": final,
    }
    if rank() == 0:
        run.write_json("summary.json", summary)
    return summary


def base_policy(recipe: Recipe, view: View) -> MaskedPolicy:
    """The model a run starts from: new, loaded from a directory, or from the cache of supervised bases; as trained."""
    config = recipe.model
    if config.tiny:
        return build_tiny(config.tiny, seed=recipe.seed)
    if config.path:
        return open_for_training(model_directory(config.path), config, seed=recipe.seed)
    assert config.recipe
    path = cached_base(Path(config.recipe), recipe.seed, view) / "model"
    return open_for_training(path, config, seed=recipe.seed)


def cached_base(recipe_file: Path, seed: int, view: View) -> Path:
    """The run directory of a supervised recipe under this seed, trained once and kept in the cache."""
    base, target = supervised_base(recipe_file, seed)
    if all(gather_objects((target / "summary.json").is_file())):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache {target.parent} cannot be written ({error.strerror}). Set UNMASK_CACHE to a writable directory."
        ) from error
    temporary = target.with_name(f".{target.name}.{gather_objects(os.getpid())[0]}.tmp")
    view.note(f"no cached base for {recipe_file.name} (seed {seed}): training it once")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        run_recipe(base, temporary, view)
    except Stopped as stopped:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise Stopped(
            "stopped while the base was being trained; nothing of it is kept. Give the same command again.",
            stopped.signal_number,
        ) from stopped
    if rank() == 0:
        try:
            os.replace(temporary, target)
        except OSError:  # another run finished the same base first; ours is equal
            if not (target / "summary.json").is_file():
                raise
    gather_objects(None)  # nobody reads the base before it is in place
    return target


def summary_table(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(model, row) pairs of a summary in reading order."""
    return [(name, row) for name in ("base", "final") for row in summary[name]]


def replay(file: Path, *, double: bool = False) -> dict[str, Any]:
    """Repeat the update that a fault file comes from: its message, one row per rollout, loss and gradient norm.

    Raises: DataError if the file is no fault file, ConfigError if its run directory is not around it.
    """
    try:
        with safe_open(file, "pt") as opened:
            content = json.loads(opened.metadata()["fault"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: is not a fault file of a run. Name a fault-*.safetensors file.") from error
    config = file.parent / "config.toml"
    if not config.is_file():
        raise ConfigError(f"{config}: missing; it says which model the batch belongs to. Put the file back there.")
    tree = read_recipe(config)
    recipe = any_recipe(tree, file.parent)
    policy = base_policy(recipe, SilentView())
    reference = None if recipe.is_supervised else reference_policy(policy)  # of the weights that the run began with
    restore_weights(policy.module, tensors)
    state = {name: unpack(value, tensors) for name, value in content["trainer"].items()}
    for model in (policy, reference) if double else ():
        if model:
            model.module.double()
    batch, draw = state["batch"], state["batch"].draws[state["inner"]]
    logps, loss, norm = repeat_update(recipe, policy, reference, batch, draw, state["step"])
    bad = (~torch.isfinite(logps) & draw.corruption.scored).any(1)  # (B, L)
    rows = [
        {
            "prompt_id": int(batch.rollouts.prompt_key[i]),
            "reward": float(batch.rollouts.rewards[i]),
            "position": int(bad[i].nonzero()[0]) if bool(bad[i].any()) else None,
            "completion": batch.rollouts.completions[i],
        }
        for i in range(len(batch.rollouts))
    ]
    return {"message": content["message"], "rows": rows, "loss": loss, "grad_norm": norm}


def repeat_update(
    recipe: Recipe, policy: MaskedPolicy, reference: MaskedPolicy | None, batch: Batch, draw: Draw, step: int
) -> tuple[Tensor, float, float]:
    """Log-probabilities (B, K, L), loss and gradient 2-norm of the update after `step`, without making it."""
    trainer = Trainer(
        policy,
        reference,
        DemonstrationSource([(Example(0, ""), "")], 1, 1, Noise(0)),
        recipe.algorithm.value,
        recipe.trainer,
        recipe.optimizer,
        noise=Noise(recipe.seed),
        accelerator=Accelerator(cpu=not torch.accelerator.is_available()),
    )
    trainer.state.step = step
    numbers = trainer.backward(batch, draw)
    with torch.no_grad():
        loss = float(recipe.algorithm.value.loss(trainer.loss_inputs(batch, draw, numbers)).loss)
    squares = sum(float(p.grad.double().square().sum()) for p in trainer.parameters if p.grad is not None)
    return numbers["logps"], loss, squares**0.5
