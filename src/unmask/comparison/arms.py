"""What is compared: arms, written as an algorithm or a recipe with overrides, as checked recipes of equal rollouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask.api import recipe_tables
from unmask.build import Recipe, any_recipe
from unmask.config import differences
from unmask.errors import ConfigError
from unmask.schedule import StopRule
from unmask.strategies.pairs import OfflineConfig

FIXED = {"seed": "--seeds", "trainer.num_batches": "--budget"}
"""Keys of a recipe that an option of the command decides."""


@dataclass(frozen=True)
class ArmText:
    """NAME[:KEY=VALUE...], taken apart."""

    label: str
    """As it was given."""
    name: str
    """An algorithm, or the file of a whole recipe."""
    overrides: tuple[str, ...]

    @property
    def is_file(self) -> bool:
        return ".toml" in self.name


@dataclass(frozen=True)
class Arm:
    """One arm, ready to be run with any seed."""

    label: str
    directory: str
    """Name of its folder."""
    command: str
    """`unmask train` or `unmask sft`."""
    recipe: Recipe
    """Under seed 0; the number of batches follows from the budget, and no stop rule cuts it short."""
    notes: tuple[str, ...] = ()

    @property
    def num_batches(self) -> int:
        return self.recipe.trainer.num_batches

    @cached_property
    def made(self) -> list[int]:
        """Rollouts made before each batch, and at the end: num_batches + 1 numbers."""
        found, size = [0], completions_per_batch(self.recipe)
        for batch in range(self.num_batches):
            found.append(found[-1] + size * is_made(self.recipe, batch))
        return found

    @property
    def rollouts(self) -> int:
        """Of a run; completions that are read, where none is rolled out."""
        return self.made[-1]

    @property
    def completion_tokens(self) -> int:
        """L, canvas tokens of a rollout."""
        if self.recipe.sampler:
            return int(self.recipe.sampler.value.gen_length)
        assert self.recipe.data and self.recipe.data.gen_length
        return int(self.recipe.data.gen_length)

    def with_seed(self, seed: int) -> Recipe:
        return replace(self.recipe, seed=seed)

    def tree(self) -> dict[str, Any]:
        """The recipe but for its seed."""
        return {key: value for key, value in self.recipe.tree().items() if key != "seed"}


def read_arms(recipe: str | Path, overrides: Sequence[str], arms: str, budget: int) -> list[Arm]:
    """The arms of --arms, each with the batches that `budget` rollouts make.

    Raises: ConfigError for an arm that is no recipe, one that is there twice, and a budget below a batch.
    """
    for override in overrides:
        refuse_fixed(override, override)
    texts = parse_arms(arms)
    return [resolve(text, number, recipe, overrides, budget) for number, text in enumerate(texts, start=1)]


def parse_arms(text: str) -> list[ArmText]:
    """Arms between commas, overrides behind colons; both may stand inside [], {} and quotes."""
    arms: list[ArmText] = []
    for label in (part.strip() for part in split_outside(text, ",")):
        name, *rest = split_outside(label, ":")
        if not name.strip():
            raise ConfigError(f"--arms {text}: an arm has no name. Try --arms espo,wd1,espo:kl=k3.")
        if label in [arm.label for arm in arms]:
            raise ConfigError(f"--arms {text}: {label} is there twice. Name each arm once; --seeds repeats them all.")
        arms.append(ArmText(label, name.strip(), tuple(arm_override(part, label) for part in rest)))
    return arms


def arm_override(part: str, label: str) -> str:
    """dotted.key=value; a key without a dot is one of the algorithm."""
    key, equals, value = part.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--arms {label}: {part!r} must be KEY=VALUE, such as kl_coef=0.1 or rollout.group_size=4.")
    override = f"{key.strip() if '.' in key else 'algorithm.' + key.strip()}={value}"
    refuse_fixed(override, label)
    return override


def refuse_fixed(override: str, where: str) -> None:
    key = override.partition("=")[0].strip()
    if key in FIXED:
        raise ConfigError(f"{where}: {key} is set by {FIXED[key]} for all arms alike. Drop it.")


def split_outside(text: str, separator: str) -> list[str]:
    """Parts between separators that stand neither in brackets nor in quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == separator and depth <= 0:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def resolve(text: ArmText, number: int, recipe: str | Path, overrides: Sequence[str], budget: int) -> Arm:
    """The checked arm. Raises: ConfigError that begins with its label."""
    file = text.name if text.is_file else recipe
    chosen = () if text.is_file else (f"algorithm.type={text.name}",)
    try:
        built = any_recipe(*recipe_tables(file, [*overrides, *chosen, *text.overrides]))
    except ConfigError as error:
        raise ConfigError(f"--arms {text.label}: {error}") from error
    size = completions_per_batch(built)
    if budget < size:
        raise ConfigError(
            f"--budget {budget}: less than one batch of {text.label}, which has {size} rollouts. Give at least {size}."
        )
    trainer = replace(built.trainer, num_batches=batches_for(built, budget // size), stop=StopRule())
    return Arm(
        label=text.label,
        directory=f"{number:02d}-{re.sub(r'[^A-Za-z0-9._=-]+', '_', text.label)[:60]}",
        command="sft" if built.is_supervised else "train",
        recipe=replace(built, seed=0, trainer=trainer),
        notes=tuple(budget_notes(built, budget)),
    )


def completions_per_batch(recipe: Recipe) -> int:
    """Whole completions that are rolled out at a time (of a tree its leaves), or read where none is rolled out."""
    if recipe.rollout:
        return recipe.rollout.prompts_per_batch * recipe.rollout.group_size
    assert recipe.data
    return recipe.data.batch_rows


def is_made(recipe: Recipe, batch: int) -> bool:
    """Whether completions are made for this batch: none where a buffer gives it, or a file before rollouts begin."""
    if not recipe.rollout:
        return True
    first, every = num_given(recipe), recipe.rollout.buffer.collect_every
    return batch >= first and (batch == first or batch % every == 0)


def num_given(recipe: Recipe) -> int:
    """Batches that come from a file before the first is rolled out."""
    return recipe.data.num_batches if recipe.rollout and isinstance(recipe.data, OfflineConfig) else 0


def batches_for(recipe: Recipe, num_made: int) -> int:
    """The most batches for which completions are made so many times."""
    batch = 0
    while num_made or not is_made(recipe, batch):
        num_made -= is_made(recipe, batch)
        batch += 1
    return batch


def budget_notes(recipe: Recipe, budget: int) -> list[str]:
    """Where the recipe's run is not simply so many rollouts."""
    size, given = completions_per_batch(recipe), num_given(recipe)
    notes = []
    if budget % size:
        notes.append(f"batches of {size} rollouts make {budget // size * size} of {budget}")
    if recipe.trainer.stop != StopRule():
        notes.append("the stop rule of the recipe is left out, so that all arms have equal rollouts")
    if given:
        notes.append(f"{given} batches are read from a file before the rollouts begin, and are not counted as such")
    if extra := getattr(recipe.rollout, "num_rerolls", 0):
        notes.append(f"rows above the mean are finished {extra} times again and judged; that is not in the budget")
    if not recipe.rollout:
        notes.append("nothing is rolled out; what counts as rollouts are the completions that are read")
    return notes


def comparison_notes(recipe: str | Path, arms: Sequence[Arm]) -> list[str]:
    """What a reader of the table has to know about the arms."""
    concerned: dict[str, list[str]] = {}
    for arm in arms:
        for note in arm.notes:
            concerned.setdefault(note, []).append(arm.label)
    notes = [f"{'all arms' if len(who) == len(arms) else ', '.join(who)}: {note}" for note, who in concerned.items()]
    table = recipe_tables(recipe, ())[0].get("algorithm", {})
    own, names = [key for key in table if key != "type"], {arm.recipe.algorithm.name for arm in arms}
    if own and len(names) > 1 and table.get("type") in names:
        notes.append(f"{Path(recipe).name} sets {', '.join(own)} for {table['type']}; other algorithms have defaults")
    for arm in arms[1:]:
        if keys := unlike_keys(arms[0], arm):
            shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
            notes.append(f"{arm.label} does not start or end as {arms[0].label} does, and differs in {shown}")
    return notes


def unlike_keys(first: Arm, other: Arm) -> list[str]:
    """Keys of model, task and evaluation in which two arms differ: their accuracies are not of the same thing."""
    sections = ("model", "task", "evaluation")
    a, b = ({key: arm.tree()[key] for key in sections if key in arm.tree()} for arm in (first, other))
    return differences(a, b)
