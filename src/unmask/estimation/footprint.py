"""Memory of one device through a run, phase by phase, and which settings would make a phase fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unmask.build import Recipe
from unmask.counting import Decoding, batch_rows, num_parts, rehearse
from unmask.critic import make_head
from unmask.estimation.machines import GIB, Machine, Setting
from unmask.estimation.memory_model import Canvases, Rehearsal
from unmask.estimation.skeleton import Skeleton, open_skeleton
from unmask.models import LoraConfig
from unmask.noise import Noise
from unmask.scoring import micro_batches
from unmask.strategies.trees import TreeConfig
from unmask.types import Corruption, Rollouts, ValueNeeds

PARTS = (
    "weights", "reference", "optimizer", "value model", "gradients", "activations", "logits", "rollouts", "buffers",
)  # fmt: skip


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions, and numbers of examples."""

    mean_prompt: float
    longest_prompt: int
    completion: int
    num_held_out: int
    num_final: int

    @property
    def canvas(self) -> int:
        """T, the longest."""
        return self.longest_prompt + self.completion

    @property
    def is_padded(self) -> bool:
        return self.mean_prompt < self.longest_prompt


@dataclass(frozen=True)
class ValueSizes:
    """Of a value model; none by default."""

    num_parameters: int = 0
    trunk_bytes: int = 0
    """Weights and optimiser of layers of its own."""
    head_bytes: int = 0
    """The same of its head, which every device holds whole."""
    state_bytes: int = 0
    """Of the frozen layers' states of a batch."""

    def on_device(self, shards: int) -> int:
        return self.trunk_bytes // shards + self.head_bytes + self.state_bytes


class Footprint:
    """Memory of one device through a run, phase by phase; bytes."""

    def __init__(self, recipe: Recipe, setting: Setting, lengths: Lengths):
        self.recipe, self.setting, self.lengths = recipe, setting, lengths
        self.is_gpu = setting.machine != "cpu"
        self.shards = setting.num_gpus if setting.is_sharded else 1
        self.own_rows = -(-batch_rows(recipe) // setting.num_gpus)

    @cached_property
    def skeleton(self) -> Skeleton:
        return open_skeleton(self.recipe.model, self.setting.config)

    @cached_property
    def rehearsal(self) -> Rehearsal:
        head = None
        if need := self.value_needs:
            head = make_head(self.skeleton.module, 0, has_level=need.reads == "prompt")
        rehearsal = Rehearsal(self.skeleton.module, is_gpu=self.is_gpu, value_head=head)
        if self.recipe.model.gradient_checkpointing:
            rehearsal.checkpoint_layers()
        return rehearsal

    @property
    def value_needs(self) -> ValueNeeds | None:
        need: ValueNeeds | None = self.recipe.algorithm.value.needs.value
        return need

    @cached_property
    def value_sizes(self) -> ValueSizes:
        """Of a value model, which has layers as the policy has, or a head on those of the reference."""
        need, skeleton = self.value_needs, self.skeleton
        if need is None:
            return ValueSizes()
        assert self.rehearsal.value_head
        head = list(self.rehearsal.value_head.parameters())
        own, trunk = sum(p.numel() * p.element_size() for p in head), (0, 0, 0)
        if need.is_trunk_trained:
            # an adapter of the policy's shape, or all of the model
            kept = self.value_stepping[0] - self.rehearsal.step(head)[0]
            trunk = (skeleton.num_trained, skeleton.trained_bytes, kept)
        return ValueSizes(
            num_parameters=sum(p.numel() for p in head) + trunk[0],
            trunk_bytes=trunk[1] + trunk[2],
            head_bytes=own + self.rehearsal.step(head)[0],
            state_bytes=0 if need.is_trunk_trained else 4 * batch_rows(self.recipe) * int(skeleton.config.hidden_size),
        )

    @cached_property
    def value_stepping(self) -> tuple[int, Counter[str]]:
        return self.rehearsal.step(self.rehearsal.value_parameters)

    @cached_property
    def draw(self) -> Corruption:
        """Masks of a batch's last pass, which is the one that masks most where passes differ."""
        algorithm = self.recipe.algorithm.value
        masks: Corruption = algorithm.draw(self.sketch, noise=Noise(0), iteration=algorithm.num_iterations - 1)
        return masks

    @cached_property
    def num_evidence(self) -> int:
        """K of the copies that weights of whole rollouts are made of."""
        draw = self.recipe.algorithm.value.needs.evidence
        return int(draw(self.sketch, Noise(0)).num_masks) if draw else 0

    @cached_property
    def sketch(self) -> Rollouts:
        """A batch with the right shapes; of trees also the edges."""
        recipe, rollouts = self.recipe, sketch_rollouts(batch_rows(self.recipe), self.lengths)
        steps = getattr(recipe.sampler.value, "total_steps", None) if recipe.sampler else None
        if steps:
            rollouts = replace(rollouts, reveal_step=rollouts.reveal_step * steps // self.lengths.completion)
        if not isinstance(recipe.rollout, TreeConfig):
            return rollouts
        assert steps
        groups, window = recipe.rollout.layout(recipe.rollout.prompts_per_batch, steps)
        return replace(rollouts, groups=groups, window=window)

    @cached_property
    def stepping(self) -> tuple[int, Counter[str]]:
        return self.rehearsal.step()

    @property
    def phases(self) -> list[str]:
        """In the order of a run."""
        recipe = self.recipe
        needs = recipe.algorithm.value.needs
        names = ["rollout"] if recipe.rollout else []
        if needs.old or needs.ref or needs.evidence or recipe.trainer.monitor_rows:
            names.append("score")
        names += ["value"] if needs.value else []
        names += ["update", "step"]
        names += ["checkpoint"] if not self.is_gpu and recipe.trainer.save_every else []
        return names + (["evaluation"] if recipe.evaluation_sampler else [])

    def phase(self, name: str) -> Counter[str]:
        """Bytes by part while the phase is at its peak."""
        total = self.resident() + self._passing(name)
        if self.setting.num_gpus > 1:
            total += self._exchanged(name)
        return total

    def resident(self) -> Counter[str]:
        """What stays from the first update to the end of the run."""
        skeleton = self.skeleton
        has_copy = not self.recipe.is_supervised and not skeleton.has_adapter
        return Counter(
            weights=skeleton.weight_bytes // self.shards,
            reference=(skeleton.weight_bytes if has_copy else skeleton.begun_from_bytes) // self.shards,
            optimizer=self.stepping[0] // self.shards,
            rollouts=self.rollout_bytes(),
        ) + Counter({"value model": self.value_sizes.on_device(self.shards)})

    def rollout_bytes(self) -> int:
        """A batch with its masks and fixed log-probabilities; every process holds all rows."""
        algorithm = self.recipe.algorithm.value
        kept = 1 + (self.recipe.rollout.buffer.num_batches if self.recipe.rollout else 0)
        kinds = 1 if algorithm.share_masks else 1 + algorithm.needs.old + algorithm.needs.ref
        logps = self.draw.scored.numel() * 4 * (1 + algorithm.needs.old + algorithm.needs.ref)
        num_draws = algorithm.num_iterations if algorithm.fresh_masks else 1
        return kept * tensor_bytes(self.sketch) + num_draws * (kinds * tensor_bytes(self.draw) + logps)

    def _passing(self, name: str) -> Counter[str]:
        recipe, trainer = self.recipe, self.recipe.trainer
        if name == "rollout":
            assert recipe.sampler and recipe.rollout
            rows = min(recipe.rollout.batch_size, self.own_rows)
            is_mixture = recipe.algorithm.value.needs.reference_share > 0
            return self._sampling(recipe.sampler.value, rows, is_mixture=is_mixture)
        if name == "evaluation":
            assert recipe.evaluation_sampler
            rows = -(-max(self.lengths.num_held_out, self.lengths.num_final) // self.setting.num_gpus)
            return self._sampling(recipe.evaluation_sampler.value, min(recipe.evaluation.batch_size, rows))
        if name == "score":
            return self.rehearsal.score(self.canvases, entropy=bool(trainer.monitor_rows))
        if name == "value":
            return self._valuing()
        if name == "update":
            parts = num_parts(self.own_rows, self.draw.num_masks, trainer.micro_batch_size)
            return self._divided(self.rehearsal.update(self.canvases, num_micro_batches=parts))
        if name == "checkpoint":  # copies of what is trained and of the optimiser's state are written
            saved = self.value_sizes.trunk_bytes + self.value_sizes.head_bytes
            return Counter(buffers=self.skeleton.trained_bytes + self.stepping[0] + self.rollout_bytes() + saved)
        return self._divided(self.stepping[1], parts=("gradients", "buffers"))

    def _valuing(self) -> Counter[str]:
        """The value model's forward, or its backward or step, whichever takes more."""
        need, lengths, size = self.value_needs, self.lengths, self.recipe.trainer.micro_batch_size
        assert need
        rows = min(size, self.own_rows)
        if need.reads == "prompt":
            canvases = Canvases(rows, lengths.longest_prompt, max(1, lengths.longest_prompt - 1), lengths.is_padded)
        else:
            canvases = Canvases(rows, lengths.canvas, lengths.completion, lengths.is_padded)
        if not need.is_trunk_trained:
            return self.rehearsal.read_values(canvases)
        parts = num_parts(self.own_rows, 1, size)
        learning = self._divided(self.rehearsal.learn_values(canvases, num_micro_batches=parts))
        stepping = self._divided(self.value_stepping[1], parts=("gradients", "buffers"))
        return max(learning, stepping, key=lambda used: used.total())

    @property
    def canvases(self) -> Canvases:
        """The largest micro-batch of masked copies."""
        num_masks, scored = self.draw.num_masks, self.draw.scored.flatten(0, 1)[: self.own_rows * self.draw.num_masks]
        parts = list(micro_batches(self.own_rows, num_masks, self.recipe.trainer.micro_batch_size))
        rows = len(parts[0])
        most = max(int(scored[copies].sum()) for copies in parts)
        return Canvases(rows, self.lengths.canvas, max(1, -(-most // rows)), self.lengths.is_padded)

    def decoding(self, sampler: Any) -> Decoding:
        return rehearse(sampler, self.lengths.longest_prompt, self.skeleton.block_size)

    def _sampling(self, sampler: Any, rows: int, *, is_mixture: bool = False) -> Counter[str]:
        asked = self.decoding(sampler)
        canvases = Canvases(rows, asked.most_tokens, max(1, asked.most_wanted), self.lengths.is_padded)
        used = self.rehearsal.sample(canvases, getattr(sampler, "temperature", 0.0), is_mixture=is_mixture)
        return used + Counter(rollouts=rows * asked.cached * self.skeleton.cache_bytes_per_token)

    def _divided(self, used: Counter[str], parts: tuple[str, ...] = ("gradients",)) -> Counter[str]:
        return Counter({part: size // self.shards if part in parts else size for part, size in used.items()})

    def _exchanged(self, name: str) -> Counter[str]:
        """DDP: buckets as large as the gradients. FSDP2: what is whole at a time, two layers, embedding and head."""
        if name in ("step", "checkpoint"):
            return Counter()
        if not self.setting.is_sharded:  # a value model's gradients are added up where they are
            return Counter(buffers=0 if name == "value" else self.skeleton.trained_bytes)
        is_learning = name == "update" or (name == "value" and self.value_sizes.trunk_bytes > 0)
        gradient = self.skeleton.layer_trained_bytes if is_learning else 0
        return Counter(buffers=2 * self.skeleton.layer_bytes + self.skeleton.outer_bytes + gradient)


def sketch_rollouts(rows: int, lengths: Lengths) -> Rollouts:
    """Rollouts with the right shapes: every completion full, one token revealed a step."""
    shape = (rows, lengths.completion)
    number = torch.arange(rows)
    return Rollouts(
        prompt_ids=torch.zeros(rows, lengths.longest_prompt, dtype=torch.int64),
        prompt_mask=torch.ones(rows, lengths.longest_prompt, dtype=torch.bool),
        completion_ids=torch.zeros(shape, dtype=torch.int64),
        prompt_key=number,
        rollout_index=number,
        groups=number,
        rewards=torch.zeros(rows, dtype=torch.float64),
        length=torch.full((rows,), lengths.completion),
        reveal_step=torch.arange(lengths.completion).repeat(rows, 1),
        sample_logps=torch.zeros(shape, dtype=torch.float64),
        drawn_logps=torch.zeros(shape, dtype=torch.float64),
        nfe=number,
    )


def tensor_bytes(batch: Any) -> int:
    """Of the tensors that a dataclass holds."""
    values = [getattr(batch, f.name) for f in fields(batch)]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


# ---- advice


def warnings(footprint: Footprint, phases: Mapping[str, Counter[str]], machine: Machine) -> list[str]:
    """One line for each phase that does not fit, with every single knob that would mend it."""
    usable = machine.usable * GIB
    lines = []
    for name, parts in phases.items():
        if parts.total() <= usable:
            continue
        knobs = [text for text in suggestions(footprint, name, parts, usable) if text]
        advice = f"Any one of these would fit: {'; '.join(knobs)}." if knobs else "No single setting mends this."
        sizes = f"{parts.total() / GIB:.1f} GiB of {usable / GIB:.1f} usable"
        lines.append(f"{name} needs {sizes} on {footprint.setting.machine}. {advice}")
    return lines


def suggestions(footprint: Footprint, name: str, parts: Counter[str], usable: float) -> list[str | None]:
    """Settings that would make one phase fit."""
    recipe, setting = footprint.recipe, footprint.setting
    model = recipe.model

    def total(**changes: Any) -> int:
        changed = replace(recipe, **changes)
        return Footprint(changed, setting, footprint.lengths).phase(name).total()

    def try_model(text: str, **changes: Any) -> str | None:
        return text if total(model=replace(model, **changes)) <= usable else None

    found = [batch_that_fits(footprint, name, parts, usable)]
    if name in ("update", "value") and not model.gradient_checkpointing:
        found.append(try_model("model.gradient_checkpointing = true", gradient_checkpointing=True))
    if not footprint.skeleton.has_adapter and not recipe.is_supervised:
        found.append(try_model("[model.lora]", lora=LoraConfig()))
    if footprint.skeleton.is_float32 and footprint.is_gpu:
        found.append(try_model('model.dtype = "bfloat16"', dtype="bfloat16"))
    if footprint.skeleton.has_adapter and model.quantization == "none" and footprint.is_gpu:
        found.append(try_model('model.quantization = "nf4"', quantization="nf4"))
    if footprint.is_gpu and not setting.is_sharded:
        found.append(gpus_that_fit(footprint, name, usable))
    return found


BATCH_KEYS = {
    "rollout": ("rollout", "batch_size"),
    "evaluation": ("evaluation", "batch_size"),
    "score": ("trainer", "micro_batch_size"),
    "value": ("trainer", "micro_batch_size"),
    "update": ("trainer", "micro_batch_size"),
}


def batch_that_fits(footprint: Footprint, name: str, parts: Counter[str], usable: float) -> str | None:
    """The largest batch of the phase that fits, tried out after a straight line through two sizes."""
    if name not in BATCH_KEYS:
        return None
    section, key = BATCH_KEYS[name]
    config = getattr(footprint.recipe, section)
    rows = min(getattr(config, key), parts_rows(footprint, name))

    def total(size: int) -> int:
        changed = replace(footprint.recipe, **{section: replace(config, **{key: size})})
        return Footprint(changed, footprint.setting, footprint.lengths).phase(name).total()

    if rows == 1 or (least := total(1)) > usable:
        return None
    slope = (parts.total() - least) / (rows - 1)
    size = min(rows - 1, 1 + int((usable - least) / slope))
    while size > 1 and total(size) > usable:
        size -= max(1, size // 16)
    return f"{section}.{key} = {size}"


def parts_rows(footprint: Footprint, name: str) -> int:
    """Rows of the phase's forward if its batch size were unlimited."""
    if name == "rollout":
        return footprint.own_rows
    if name == "evaluation":
        lengths = footprint.lengths
        return -(-max(lengths.num_held_out, lengths.num_final) // footprint.setting.num_gpus)
    return footprint.own_rows * (1 if name == "value" else footprint.draw.num_masks)


def gpus_that_fit(footprint: Footprint, name: str, usable: float) -> str | None:
    """The smallest power of two of devices that fit it sharded."""
    if footprint.recipe.model.quantization != "none":
        return None  # packed weights are not sharded
    for count in (2, 4, 8, 16, 32, 64):
        setting = replace(footprint.setting, num_gpus=count, is_sharded=True)
        enough = count >= footprint.setting.num_gpus
        if enough and Footprint(footprint.recipe, setting, footprint.lengths).phase(name).total() <= usable:
            return f"FSDP2 on {count} devices (--shard --num-gpus {count})"
    return None
