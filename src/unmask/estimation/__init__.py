"""What a run needs and costs on a machine that need not be at hand: parameters, peak memory, FLOPs and hours.

No weights are read: config.json is enough. Memory comes from passes on the meta device (memory_model.py), FLOPs from
the passes that the recipe implies (plan.py), hours from FLOPs / (peak rate · utilisation).

    by formula     2 N D a forward, 4 N D a backward: N parameters, D tokens of a canvas
    computed       forward: 2 (numbers of matrices) D + 4 A D² a layer (A width of attention) + 2 H V a wanted position;
                   backward: twice that, or once and the adapters' own where weights are frozen; with gradient
                   checkpointing one forward more
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from unmask.build import Recipe
from unmask.counting import VALUE_PASSES, Passes, count_passes
from unmask.demonstrations import read_demonstrations
from unmask.errors import ConfigError, UnmaskError
from unmask.estimation.footprint import PARTS, Footprint, Lengths, warnings
from unmask.estimation.machines import GIB, MACHINES, Machine, Setting, this_machine
from unmask.estimation.skeleton import Skeleton, open_skeleton
from unmask.preferences import read_preferences
from unmask.strategies.pairs import OfflineConfig
from unmask.types import Example

DEFAULT_PROMPT_TOKENS = 200
SAMPLED_PROMPTS = 256  # examples whose tokens are counted


LABELS = {"collect": "rollout", "old policy": "old", "base and final": "before and after", "final rows": "after"}


@dataclass(frozen=True)
class Cost:
    """FLOPs and hours of one kind of pass over the whole run."""

    name: str
    passes: Passes
    formula_flops: float
    device_flops: float
    hours: float


@dataclass(frozen=True)
class Estimate:
    """All of it."""

    recipe: Recipe
    setting: Setting
    machine: Machine
    lengths: Lengths
    num_masks: int
    num_parameters: int
    num_trained: int
    num_value: int
    """Of the value model, all trained; none of them among the others."""
    phases: dict[str, Counter[str]]  # bytes by part
    costs: list[Cost]
    assumptions: list[str]
    warnings: list[str]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].total())

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.phases[self.peak_phase].total()

    def tree(self) -> dict[str, Any]:
        """For --json."""
        return {
            "algorithm": self.recipe.algorithm.name,
            "device": self.setting.machine,
            "num_gpus": self.setting.num_gpus,
            "sharded": self.setting.is_sharded,
            "parameters": {
                "total": self.num_parameters,
                "trained": self.num_trained,
                "value_model": self.num_value,
            },
            "tokens": {
                "prompt_mean": self.lengths.mean_prompt,
                "prompt_longest": self.lengths.longest_prompt,
                "completion": self.lengths.completion,
            },
            "num_masks": self.num_masks,
            "memory": {
                "peak_bytes": self.peak,
                "peak_phase": self.peak_phase,
                "usable_bytes": int(self.machine.usable * GIB),
                "phases": {name: {part: parts[part] for part in PARTS} for name, parts in self.phases.items()},
            },
            "passes": [
                {
                    "name": LABELS.get(cost.name, cost.name),
                    **{f.name: getattr(cost.passes, f.name) for f in fields(Passes) if f.name != "name"},
                    "formula_flops": cost.formula_flops,
                    "device_flops": cost.device_flops,
                    "hours": cost.hours,
                }
                for cost in self.costs
            ],
            "hours": sum(cost.hours for cost in self.costs),
            "utilisation": dict(self.setting.utilisation),
            "assumptions": self.assumptions,
            "warnings": self.warnings,
        }


def estimate_run(recipe: Recipe, setting: Setting) -> Estimate:
    """Parameters, peak memory, FLOPs and hours of the run on `setting.num_gpus` devices.

    Raises: ConfigError or ModelError where the model's shape cannot be found out, or it is one that is not trained.
    """
    assumptions: list[str] = []
    skeleton = open_skeleton(recipe.model, setting.config)
    if skeleton.block_size is not None and not recipe.is_supervised:
        raise ConfigError("estimate: a block-causal model cannot be trained, only sampled. Name LLaDA or Dream.")
    lengths = measure_lengths(recipe, setting, skeleton, assumptions)
    machine = MACHINES[setting.machine] if setting.machine != "cpu" else this_machine()
    footprint = Footprint(recipe, setting, lengths)
    phases = {name: footprint.phase(name) for name in footprint.phases}
    rate = machine.float32 if skeleton.is_float32 else machine.bf16
    share = ", ".join(f"{LABELS.get(name, name)} {value:.2f}" for name, value in setting.utilisation.items())
    assumptions.append(f"share of {rate / 1e12:.3g} TFLOP/s reached: {share} (change with --utilisation)")
    return Estimate(
        recipe=recipe,
        setting=setting,
        machine=machine,
        lengths=lengths,
        num_masks=footprint.draw.num_masks,
        num_parameters=skeleton.num_parameters,
        num_trained=skeleton.num_trained,
        num_value=footprint.value_sizes.num_parameters,
        phases=phases,
        costs=costs(footprint, rate),
        assumptions=assumptions,
        warnings=warnings(footprint, phases, machine),
    )


# ---- what is not in the recipe


def measure_lengths(recipe: Recipe, setting: Setting, skeleton: Skeleton, assumptions: list[str]) -> Lengths:
    """Prompt lengths of the first examples, numbers of examples; what is not at hand is assumed, and that is said."""
    sampler = recipe.sampler or recipe.evaluation_sampler
    completion = recipe.data.gen_length if recipe.data else sampler.value.gen_length if sampler else 0
    assert completion
    tokens = [setting.prompt_tokens] if setting.prompt_tokens else []
    if not tokens:
        try:
            tokens = [skeleton.num_tokens(example.prompt) for example in first_examples(recipe)]
        except UnmaskError as error:
            tokens = [DEFAULT_PROMPT_TOKENS]
            assumptions.append(f"prompts of {DEFAULT_PROMPT_TOKENS} tokens (change with --prompt-tokens), as {error}")
    num_held_out, num_final = recipe.evaluation.num_examples, recipe.evaluation.num_examples
    if recipe.task:
        try:
            num_held_out = min(num_held_out, len(recipe.task.value.examples(recipe.evaluation.split)))
            num_final = len(recipe.task.value.examples(recipe.evaluation.final_split))
        except UnmaskError as error:
            assumptions.append(f"{num_final} examples in each evaluation, as {error}")
    return Lengths(sum(tokens) / len(tokens), max(tokens), completion, num_held_out, num_final)


def first_examples(recipe: Recipe) -> list[Example]:
    """Some of those that the run is trained on. Raises: DataError if the data is not at hand."""
    if isinstance(recipe.data, OfflineConfig):
        return [pair.example for pair in read_preferences(recipe.data.file, recipe.data.split)[:SAMPLED_PROMPTS]]
    if recipe.data and recipe.data.file:
        return [example for example, _ in read_demonstrations(recipe.data.file)[:SAMPLED_PROMPTS]]
    assert recipe.task
    return list(recipe.task.value.examples("train")[:SAMPLED_PROMPTS])


# ---- FLOPs and hours


def costs(footprint: Footprint, rate: float) -> list[Cost]:
    """One for each kind of pass that the run makes."""
    recipe, setting, lengths, skeleton = footprint.recipe, footprint.setting, footprint.lengths, footprint.skeleton
    num_masks = footprint.draw.num_masks
    found = []
    counts = (lengths.num_held_out, lengths.num_final)
    for passes in count_passes(recipe, num_masks, *counts, skeleton.block_size, footprint.num_evidence):
        if not passes.forwards:
            continue
        sampler = recipe.sampler if passes.phase == "collect" else recipe.evaluation_sampler
        tokens = lengths.mean_prompt + (0 if passes.is_prompt_alone else lengths.completion)
        if passes.phase in ("collect", "evaluate"):
            assert sampler
            asked = footprint.decoding(sampler.value)
            forward = skeleton.forward_flops(asked.tokens, asked.pairs, asked.wanted) / asked.forwards
        else:
            # a value model has no output head
            is_value = passes.name in VALUE_PASSES
            wanted = 0.0 if is_value else float(footprint.draw.scored.sum()) / footprint.draw.scored[..., 0].numel()
            forward = skeleton.forward_flops(tokens, tokens**2, wanted)
        backward = skeleton.backward_flops(forward, tokens, recipe.model.gradient_checkpointing)
        device_flops = passes.sequences * forward + passes.backward_sequences * backward
        hours = device_flops / (rate * setting.utilisation[passes.phase] * setting.num_gpus) / 3600
        found.append(
            Cost(passes.name, passes, passes.flops(skeleton.num_parameters, tokens), device_flops, hours),
        )
    return found
