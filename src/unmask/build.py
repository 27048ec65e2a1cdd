"""Names -> objects: the one file that knows the concrete classes of every room."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unmask import __version__
from unmask.config import choose, parse, read_recipe, to_table
from unmask.errors import ConfigError
from unmask.models import LoraConfig, TinyModelConfig
from unmask.models.cross_entropy import check_cross_entropy
from unmask.objectives import ALGORITHMS
from unmask.objectives.sft import SFT
from unmask.places import cache_directory, is_hub_id
from unmask.rollout import RolloutConfig
from unmask.samplers import SAMPLERS
from unmask.schedule import OptimizerConfig, TrainerConfig
from unmask.strategies import ONLINE
from unmask.strategies.pairs import OfflineConfig
from unmask.tasks import TASKS
from unmask.tasks.sudoku_grids import GENERATOR_VERSION


@dataclass(frozen=True)
class ModelConfig:
    """Where the model to train comes from: exactly one of the keys."""

    path: str | None = None
    """A model directory (config.json, safetensors, tokenizer), a run's, an adapter's, or a hub id (owner/name)."""
    recipe: str | None = None
    """A supervised recipe whose result is the base; trained once and cached. Relative to the working directory, else to
    the recipe that the command was given."""
    tiny: TinyModelConfig | None = None
    """A new embedded model (supervised training only)."""
    adapter: str | None = None
    """An adapter directory to start from, on the model above; it stays the reference."""
    lora: LoraConfig | None = None
    """Train low-rank adapters on the frozen model. None: train all weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. "auto": as stored for a frozen base, float32 where all weights are trained."""
    attention: str = "sdpa"
    """One of transformers' attention implementations."""
    quantization: Literal["none", "nf4"] = "none"
    """"nf4" holds a frozen base in 4 bits; needs the extra `quantization`."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, a third more time."""
    cross_entropy: str = "chunked"
    """How log-probabilities are computed from hidden states, see docs/models.md."""

    def __post_init__(self) -> None:
        check_cross_entropy(self.cross_entropy)
        given = [key for key in ("path", "recipe", "tiny") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(f"model.{key}" for key in given) or "no key of [model]"
            raise ConfigError(f"{found} given: exactly one of model.path, model.recipe and model.tiny is required.")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated during a run, and before and after it."""

    split: str = "validation"
    """Split of the periodic evaluations, on which the best model is chosen."""
    num_examples: int = 256
    """Examples of a periodic evaluation."""
    final_split: str = "test"
    """Split of the rows `base` and `final` of summary.json."""
    final_num_steps: tuple[int, ...] = ()
    """Denoising steps of those rows; the first is the main number. Empty: the evaluation sampler's."""
    batch_size: int = 256
    """Completions sampled in one forward."""

    def __post_init__(self) -> None:
        for key in ("num_examples", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"evaluation.{key} = {getattr(self, key)}: must be at least 1. Try 256.")


@dataclass(frozen=True)
class DataConfig:
    """What supervised training reads."""

    file: str | None = None
    """JSON lines with prompt and completion, or messages. None: the task's teacher."""
    batch_size: int = 64
    """Completions per batch."""
    gen_length: int | None = None
    """L, canvas tokens of a completion. None: what the task declares."""

    def __post_init__(self) -> None:
        for key, example in (("batch_size", 64), ("gen_length", 256)):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"data.{key} = {value}: must be at least 1. Try {example}.")

    @property
    def batch_rows(self) -> int:
        """B."""
        return self.batch_size


@dataclass(frozen=True)
class TrackingConfig:
    """Experiment trackers that metrics.jsonl is mirrored to, through accelerate; none is required."""

    trackers: tuple[str, ...] = ()
    """Among "tensorboard", "wandb", "trackio"; the package must be installed."""
    project: str = "unmask"
    """Project name given to the trackers."""

    def __post_init__(self) -> None:
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(f"tracking.trackers: unknown tracker {name!r}. Known: {', '.join(TRACKERS)}.")


TRACKERS = ("tensorboard", "trackio", "wandb")


class Named(NamedTuple):
    """An object and the registry name it was chosen by."""

    name: str
    value: Any


@dataclass(frozen=True)
class Recipe:
    """A complete, checked recipe. Fields that a command does not use are None."""

    seed: int
    model: ModelConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    algorithm: Named
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    evaluation_sampler: Named | None = None
    task: Named | None = None
    sampler: Named | None = None
    rollout: RolloutConfig | None = None
    """None: no batch is rolled out."""
    data: DataConfig | OfflineConfig | None = None
    """What is read from a file: demonstrations, or preference pairs."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def final_samplers(self) -> list[Any]:
        """Of the final rows: the evaluation's sampler at each of `final_num_steps`, or as it is."""
        assert self.evaluation_sampler
        sampler = self.evaluation_sampler.value
        return [replace(sampler, num_steps=n) for n in self.evaluation.final_num_steps] or [sampler]

    @property
    def is_supervised(self) -> bool:
        """Trained on demonstrations, without rewards and without a reference."""
        return isinstance(self.data, DataConfig)

    @property
    def num_offline_batches(self) -> int:
        """Batches that are read from a file."""
        if not isinstance(self.data, OfflineConfig):
            return self.trainer.num_batches if self.data else 0
        return min(self.data.num_batches or self.trainer.num_batches, self.trainer.num_batches)

    def tree(self) -> dict[str, Any]:
        """Every key with its value, defaults included: the text of config.toml."""
        out: dict[str, Any] = {"seed": self.seed, "model": to_table(self.model)}
        if self.task:
            out["task"] = to_table(self.task.value, self.task.name)
        out["algorithm"] = to_table(self.algorithm.value, None if self.is_supervised else self.algorithm.name)
        if self.sampler:
            out["sampler"] = to_table(self.sampler.value, self.sampler.name)
        if self.rollout:
            out["rollout"] = to_table(self.rollout, self.rollout.strategy)
        for key in ("data", "trainer", "optimizer", "tracking", "evaluation"):
            if getattr(self, key) is not None:
                out[key] = to_table(getattr(self, key))
        if self.evaluation_sampler:
            out["evaluation"]["sampler"] = to_table(self.evaluation_sampler.value, self.evaluation_sampler.name)
        return out


TASK_FILES = ("data", "train_data", "exclude", "rewards")
"""Keys of [task] that may name a file beside the recipe."""

SECTIONS = {
    "train": (
        "seed",
        "model",
        "task",
        "algorithm",
        "sampler",
        "rollout",
        "data",
        "trainer",
        "optimizer",
        "tracking",
        "evaluation",
    ),
    "sft": ("seed", "model", "task", "data", "algorithm", "trainer", "optimizer", "tracking", "evaluation"),
}


def any_recipe(tree: Mapping[str, Any], directory: Path) -> Recipe:
    """A checked recipe of whichever command it is for: a supervised one names no algorithm. Raises: ConfigError."""
    model, algorithm = tree.get("model"), tree.get("algorithm")
    names_algorithm = isinstance(algorithm, Mapping) and "type" in algorithm
    is_new = isinstance(model, Mapping) and isinstance(model.get("tiny"), Mapping)  # a run's config says "none"
    return (sft_recipe if is_new or ("data" in tree and not names_algorithm) else train_recipe)(tree, directory)


def train_recipe(tree: Mapping[str, Any], directory: Path) -> Recipe:
    """A checked recipe of `unmask train`; paths are resolved against `directory`. Raises: ConfigError."""
    tables = _sections(tree, "train")
    task = _task(tables, directory)
    data = parse(OfflineConfig, tables["data"], "data") if "data" in tables else None
    trainer = parse(TrainerConfig, tables.get("trainer", {}), "trainer")
    is_online = data is None or data.num_batches > 0
    if task is None and is_online:
        raise ConfigError(f"[task] is missing: must name a task. Known: {', '.join(sorted(TASKS))}.")
    model = _model(tables, directory)
    if model.tiny:
        raise ConfigError("model.tiny: an untrained model has nothing to reinforce. Give model.recipe or model.path.")
    algorithm = Named(*choose(ALGORITHMS, tables.get("algorithm", {}), "algorithm"))
    sampler = rollout = None
    if is_online:
        sampler = make_sampler(_sampler_table(tables, directory), task, "sampler")
        rollout = _rollout(tables.get("rollout", {}), algorithm, sampler, has_pairs=data is not None)
    if data:
        data = _offline(data, algorithm, trainer, sampler or tables.get("sampler"), task, directory)
    length = sampler.value.gen_length if sampler else data.gen_length if data else None
    return Recipe(
        seed=_seed(tree),
        model=model,
        task=task,
        algorithm=algorithm,
        sampler=sampler,
        rollout=rollout,
        data=data,
        trainer=trainer,
        optimizer=parse(OptimizerConfig, tables.get("optimizer", {}), "optimizer"),
        tracking=parse(TrackingConfig, tables.get("tracking", {}), "tracking"),
        **(_evaluation(tables, task, length) if task and length else {}),
    )


def _rollout(table: Mapping[str, Any], algorithm: Named, sampler: Named, *, has_pairs: bool) -> RolloutConfig:
    """How batches are rolled out; without a type, as the algorithm's publication has it. Raises: ConfigError."""
    learns_from = algorithm.value.strategies
    online = [name for name in learns_from if name in ONLINE]
    if not online:
        raise ConfigError(
            f"algorithm.type = {algorithm.name!r}: learns from preference pairs of a file alone. Give data.file, and "
            "no data.num_batches."
        )
    if learns_from[0] == "pairs" and not has_pairs and "type" not in table:
        raise ConfigError(
            f"[data] is missing: {algorithm.name} as published learns from preference pairs. Give data.file, or "
            f"rollout.type = {online[0]!r} to let it learn from rollouts."
        )
    if isinstance(table, Mapping):
        table = {"type": online[0], **table}
    name, config = choose(ONLINE, table, "rollout")
    if name not in learns_from:
        able = sorted(key for key, cls in ALGORITHMS.items() if name in getattr(cls, "strategies", ()))
        others = f", or an algorithm that learns from it: {', '.join(able)}" if able else ""
        raise ConfigError(
            f"rollout.type = {name!r}: {algorithm.name} learns from {' or '.join(map(repr, online))}. "
            f"Leave the key out{others}."
        )
    config.check(sampler.name, sampler.value)
    needs = algorithm.value.needs
    if config.buffer.num_batches and (needs.old or needs.evidence_old):
        raise ConfigError(
            f"rollout.buffer.num_batches = {config.buffer.num_batches}: {algorithm.name} needs the policy that wrote "
            "the rollouts, and those of a buffer were written by several. Use 0, or an algorithm without a ratio."
        )
    if needs.order and not getattr(sampler.value, "keeps_tokens", False):
        raise ConfigError(
            f"sampler.type = {sampler.name!r}: takes tokens back, or has no record of its steps, and {algorithm.name} "
            "reads the steps in which tokens were fixed for good. Use 'roar' or 'low_confidence'."
        )
    if needs.order:
        _check_record(algorithm, sampler.value)
    if needs.drawn and not getattr(sampler.value, "temperature", 1.0):
        raise ConfigError(
            f"sampler.temperature = 0: {algorithm.name} weighs completions by the probability with which they were "
            'drawn, and here nothing is. Use a temperature above 0, or algorithm.density = "untempered".'
        )
    if needs.reference_share and not getattr(sampler.value, "mixes", False):
        raise ConfigError(
            f"sampler.type = {sampler.name!r}: with these settings it reads one model, and {algorithm.name} draws "
            f"{needs.reference_share:.3g} of its logits from the reference. Use 'low_confidence' without a cache, "
            "'random_remasking', 'roar' or 'dream', or give the reference no share in [algorithm]."
        )
    return config


def _check_record(algorithm: Named, sampler: Any) -> None:
    """Raises: ConfigError where the log-probabilities that the sampler records are not the model's own in its steps."""
    if not getattr(sampler, "is_own_law", True):
        raise ConfigError(
            f"sampler.cache and sampler.guidance: {algorithm.name} reads the log-probabilities of the sampler's steps, "
            "and these are those of an approximation. Set sampler.cache = 'none' and sampler.guidance = 0."
        )
    counts_all = getattr(algorithm.value, "count_positions", "all") == "all"
    if counts_all and getattr(sampler, "gives_tails", False):
        raise ConfigError(
            f"sampler.stop_early: {algorithm.name} counts all positions, and those behind a stop token would be given, "
            "not drawn. Set sampler.stop_early = false, or algorithm.count_positions = 'to_eos'."
        )


def _offline(
    data: OfflineConfig,
    algorithm: Named,
    trainer: TrainerConfig,
    sampler: Named | Mapping[str, Any] | None,
    task: Named | None,
    directory: Path,
) -> OfflineConfig:
    """Preference data with its length. Raises: ConfigError if the algorithm cannot learn from it."""
    if "pairs" not in algorithm.value.strategies:
        able = sorted(key for key, cls in ALGORITHMS.items() if "pairs" in getattr(cls, "strategies", ()))
        known = f"Algorithms that do: {', '.join(able)}" if able else "No algorithm here does"
        raise ConfigError(
            f"[data] given: {algorithm.name} does not learn from preference pairs. {known}. For demonstrations use "
            "`unmask sft`."
        )
    if data.num_batches >= trainer.num_batches:
        raise ConfigError(
            f"data.num_batches = {data.num_batches}: leaves none of trainer.num_batches = {trainer.num_batches} to "
            "roll out. Use 0 to learn from the file alone."
        )
    if isinstance(sampler, Named):
        length = sampler.value.gen_length
    else:
        length = _length(sampler) or (task.value.gen_length if task else None)
    length = data.gen_length or length
    if length is None:
        raise ConfigError("data.gen_length is missing: must be the canvas length in tokens, such as 256.")
    return replace(data, file=_resolve(data.file, directory) or data.file, gen_length=length)


def _length(sampler: Mapping[str, Any] | None) -> int | None:
    """gen_length of a [sampler] that is not used otherwise. Raises: ConfigError."""
    length = sampler.get("gen_length") if isinstance(sampler, Mapping) else None
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ConfigError(f"sampler.gen_length = {length!r}: must be an integer of at least 1. Try 256.")
    return length


def sft_recipe(tree: Mapping[str, Any], directory: Path) -> Recipe:
    """A checked recipe of `unmask sft`. Raises: ConfigError."""
    tables = _sections(tree, "sft")
    task = _task(tables, directory)
    data = parse(DataConfig, tables.get("data", {}), "data")
    length = data.gen_length or (task.value.gen_length if task else None)
    if not task and not data.file:
        raise ConfigError("neither [task] nor data.file is given: name a task with a teacher, or a JSON lines file.")
    if length is None:
        raise ConfigError("data.gen_length is missing: must be the canvas length in tokens, such as 256.")
    trainer = {"monitor_rows": 0, **tables.get("trainer", {})}
    return Recipe(
        seed=_seed(tree),
        model=_model(tables, directory),
        task=task,
        data=DataConfig(_resolve(data.file, directory), data.batch_size, length),
        algorithm=Named("sft", parse(SFT, tables.get("algorithm", {}), "algorithm")),
        trainer=parse(TrainerConfig, trainer, "trainer"),
        optimizer=parse(OptimizerConfig, tables.get("optimizer", {}), "optimizer"),
        tracking=parse(TrackingConfig, tables.get("tracking", {}), "tracking"),
        **(_evaluation(tables, task, length) if task else {}),
    )


def supervised_base(recipe_file: Path, seed: int) -> tuple[Recipe, Path]:
    """The recipe of a base under this seed, and the run directory in the cache that holds it once it is trained.

    The directory's name covers the resolved recipe, the package version and the version of the puzzle generator.
    """
    base = sft_recipe({**read_recipe(recipe_file), "seed": seed}, recipe_file.parent)
    if base.model.tiny is None:
        raise ConfigError(f"model.recipe = {recipe_file.name!r}: must be a recipe with [model.tiny]. Use model.path.")
    identity = {"recipe": base.tree(), "unmask": __version__, "generator": GENERATOR_VERSION}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return base, cache_directory() / f"{recipe_file.stem}-seed{seed}-{key}"


def make_task(table: Mapping[str, Any]) -> Named:
    return Named(*choose(TASKS, table, "task"))


def make_sampler(table: Mapping[str, Any], task: Named | None, where: str) -> Named:
    """A sampler; length and steps default to what the task declares."""
    table = dict(table)
    if task and task.value.gen_length and "gen_length" not in table:
        table["gen_length"] = task.value.gen_length
        takes_steps = "num_steps" in getattr(SAMPLERS.get(str(table.get("type"))), "__dataclass_fields__", {})
        if takes_steps and task.value.num_steps:
            table.setdefault("num_steps", task.value.num_steps)
    return Named(*choose(SAMPLERS, table, where))


def _sections(tree: Mapping[str, Any], command: str) -> dict[str, Any]:
    known = SECTIONS[command]
    for key in tree:
        if key not in known:
            raise ConfigError(f"unknown section or key {key!r} for `unmask {command}`. Known: {', '.join(known)}.")
    for key, value in tree.items():
        if key != "seed" and not isinstance(value, Mapping):
            raise ConfigError(f"{key} = {value!r}: must be a table, written as [{key}].")
    return dict(tree)


def _seed(tree: Mapping[str, Any]) -> int:
    seed = tree.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed = {seed!r}: must be an integer. Try 0.")
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed = {seed}: must fit 64 bits. Try 0.")
    return seed


def _task(tables: Mapping[str, Any], directory: Path) -> Named | None:
    if "task" not in tables:
        return None
    files = {key: _beside(tables["task"][key], directory) for key in TASK_FILES if key in tables["task"]}
    return make_task({**tables["task"], **files})


def _sampler_table(tables: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    """[sampler], with the file of an engine found."""
    table: Mapping[str, Any] = tables.get("sampler", {"type": "low_confidence"})
    if not isinstance(table, Mapping) or "engine" not in table:
        return table
    return {**table, "engine": _beside(table["engine"], directory)}


def _beside(value: Any, directory: Path) -> Any:
    """A file that a task names: as given if it exists from here, else beside the recipe if it is there.

    What follows a colon is no part of the file: a function in it, or the configuration of a hub data set.
    """
    if isinstance(value, list | tuple):
        return [_beside(part, directory) for part in value]
    if not isinstance(value, str):
        return value
    file, colon, rest = value.partition(":")
    is_beside = not os.path.exists(file) and (directory / file).is_file()
    return f"{(directory / file).absolute()}{colon}{rest}" if is_beside else value


def _model(tables: Mapping[str, Any], directory: Path) -> ModelConfig:
    model = parse(ModelConfig, tables.get("model", {}), "model")
    return replace(
        model,
        path=_resolve(model.path, directory),
        recipe=_resolve(model.recipe, directory),
        adapter=_resolve(model.adapter, directory),
    )


def _resolve(path: str | None, directory: Path) -> str | None:
    """A path as given if it exists from here, else relative to the recipe's directory; a hub id as it is."""
    if path is None or Path(path).is_absolute() or os.path.exists(path):
        return None if path is None else str(Path(path).absolute())
    beside = directory / path
    return path if is_hub_id(path) and not beside.exists() else str(beside.absolute())


def _evaluation(tables: Mapping[str, Any], task: Named, gen_length: int) -> dict[str, Any]:
    table = dict(tables.get("evaluation", {}))
    sampler = table.pop("sampler", {"type": "low_confidence"})
    if isinstance(sampler, Mapping) and "gen_length" not in sampler:
        sampler = {**sampler, "gen_length": gen_length}
    config, made = parse(EvaluationConfig, table, "evaluation"), make_sampler(sampler, task, "evaluation.sampler")
    if config.final_num_steps and not hasattr(made.value, "num_steps"):
        raise ConfigError(
            f"evaluation.final_num_steps: sampler {made.name!r} has no num_steps. Set it to [], or evaluate with "
            "'low_confidence'."
        )
    return {"evaluation": config, "evaluation_sampler": made}
