"""Model passes of a run, counted from its recipe. The counts are those of one process and a run to its last batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.build import Recipe
from unmask.noise import Noise
from unmask.scoring import micro_batches
from unmask.types import PromptBatch, Sampler, TokenOutput

VALUE_PASSES = ("value model", "value update")
"""Names of the passes of a learned number about each row."""


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
    is_prompt_alone: bool = False
    """Canvases are prompts without completions."""

    def flops(self, num_parameters: int, tokens: float) -> float:
        """2ND a sequence forward, 4ND backward: N parameters, D tokens of a canvas."""
        return (2 * self.sequences + 4 * self.backward_sequences) * num_parameters * tokens


def count_passes(
    recipe: Recipe,
    num_masks: int,
    num_held_out: int,
    num_final: int,
    block_size: int | None = None,
    num_evidence: int = 0,
) -> Iterator[Passes]:
    """Every model pass of the run; `num_masks` is K of one draw, then numbers of examples, `block_size` the policy's,
    and K of the copies that weights of whole rollouts are made of.

    collect     S forwards a rollout, 2 S from a mixture; of trees those of the edges, of re-rolls those to be expected
    old         one for each draw but the first          reference  one for each draw
    evidence    one for each model that reads it         kl         the reference in every pass of an update
    value model see `value_passes`
    monitor     2 copies of some rollouts, policy and reference
    update      μ (+ μ where a first pass is needed)
    """
    trainer, algorithm = recipe.trainer, recipe.algorithm.value
    size, needs = trainer.micro_batch_size, algorithm.needs
    draws = algorithm.num_iterations if algorithm.fresh_masks else 1
    if recipe.rollout and recipe.sampler:
        yield from collecting(recipe, block_size)
    # the first update's own pass gives the old log-probabilities, unless these are read from other masks
    num_old = (draws - 1 if algorithm.share_masks else draws) if needs.old else 0
    passes = 1 if algorithm.is_row_separable and size >= num_masks else 2
    yield scoring(recipe, "old policy", num_masks, num_old)
    yield scoring(recipe, "reference", num_masks, draws if needs.ref else 0)
    yield scoring(recipe, "evidence", num_evidence, 1 + needs.evidence_old if num_evidence else 0)
    if needs.kl:
        yield replace(scoring(recipe, "kl", num_masks, passes * algorithm.num_iterations), phase="update")
    yield from value_passes(recipe)
    if trainer.monitor_rows:
        models = 1 if recipe.is_supervised else 2
        yield scoring(recipe, "monitor", 2, models, most_rows=trainer.monitor_rows)
    updates = scoring(recipe, "update", num_masks, algorithm.num_iterations)
    yield Passes(
        "update", "update", passes * updates.forwards, passes * updates.sequences, updates.forwards, updates.sequences
    )
    if recipe.evaluation_sampler:
        yield from evaluation_passes(recipe, num_held_out, num_final, block_size)


def collecting(recipe: Recipe, block_size: int | None) -> Iterator[Passes]:
    """What is sampled for all batches that are rolled out, one entry for each kind."""
    assert recipe.rollout and recipe.sampler
    num_steps, times = rehearse(recipe.sampler.value, 1, block_size).forwards, num_collected(recipe)
    num_models = 2 if recipe.algorithm.value.needs.reference_share else 1
    found: dict[str, Passes] = {}
    for name, rows, forwards in recipe.rollout.sampled(num_steps):
        calls = times * -(-rows // recipe.rollout.batch_size) * forwards * num_models
        before = found.get(name, Passes(name, "collect", 0, 0))
        sequences = before.sequences + times * rows * forwards * num_models
        found[name] = Passes(name, "collect", before.forwards + calls, sequences)
    yield from found.values()


def scoring(recipe: Recipe, name: str, num_masks: int, times: int, most_rows: int | None = None) -> Passes:
    """Passes over the masked copies of every batch, `times` times each; or over its first `most_rows` alone."""
    size, forwards, sequences = recipe.trainer.micro_batch_size, 0, 0
    for batches, rows in batch_sizes(recipe):
        rows = min(rows, most_rows or rows)
        forwards += batches * times * (num_parts(rows, num_masks, size) if times else 0)
        sequences += batches * times * rows * num_masks
    return Passes(name, "score", forwards, sequences)


def value_passes(recipe: Recipe) -> Iterator[Passes]:
    """Passes of the model that learns a number about each row, each over all rows as they are, without a mask.

    Frozen layers are read once for a batch. Trained ones are read for the numbers of the batch, and each of their
    updates takes a forward for the loss and one for the backward; those that follow the objective's loss come in the
    update, and a new reading after each. An update is taken to find a gradient: where all values of a batch are as
    they should be there is no second forward.
    """
    algorithm = recipe.algorithm.value
    need = algorithm.needs.value
    if need is None:
        return

    def passes(name: str, phase: str, readings: int, updates: int = 0) -> Passes:
        once = scoring(recipe, name, 1, 1)
        times = readings + 2 * updates
        backwards = (updates * once.forwards, updates * once.sequences)
        is_prompt = need.reads == "prompt"
        return Passes(name, phase, times * once.forwards, times * once.sequences, *backwards, is_prompt)

    has_loss, is_trained = need.loss is not None, need.is_trunk_trained
    first, later = VALUE_PASSES
    yield passes(first, "score", 1, need.num_updates if has_loss and is_trained else 0)
    if is_trained and not has_loss:
        yield passes(later, "update", algorithm.num_iterations, algorithm.num_iterations)


def evaluation_passes(
    recipe: Recipe, num_held_out: int, num_final: int, block_size: int | None = None
) -> Iterator[Passes]:
    """The periodic evaluations, and those before (reinforcement only) and after the training."""
    assert recipe.evaluation_sampler
    sampler, size = recipe.evaluation_sampler.value, recipe.evaluation.batch_size
    every, batches = recipe.trainer.eval_every, recipe.trainer.num_batches
    times = -(-batches // every) if every else 0  # every so many batches, and after the last
    yield sampling("evaluation", "evaluate", sampler, num_held_out, size, times, block_size)
    number = 1 if recipe.is_supervised else 2
    rounds = [sampling("", "", s, num_final, size, number, block_size) for s in recipe.final_samplers]
    forwards, sequences = sum(r.forwards for r in rounds), sum(r.sequences for r in rounds)
    yield Passes("final rows" if recipe.is_supervised else "base and final", "evaluate", forwards, sequences)


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

    def seen(self, tokens: int) -> int:
        """Positions that the tokens of a forward see; they are kept too."""
        self.length += tokens
        return self.length


class _WindowCache(_Cache):
    """The same for one that is filled by the first forward."""

    def seen(self, tokens: int) -> int:
        self.length = max(self.length, tokens)
        return self.length

    def freeze(self, start: int) -> None:
        """Windows begin here."""


class _Listener:
    """A policy that knows nothing, and writes down what it is asked."""

    mask_token_id, pad_token_id, max_length = 7, 0, 1 << 60
    stop_token_ids: tuple[int, ...] = (6,)
    device = torch.device("cpu")

    lookback: int | None = 0

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
        reference: Any = None,
        position_ids: Tensor | None = None,
    ) -> TokenOutput:
        tokens, wanted = canvas.numel(), int(positions.sum())
        seen = canvas.shape[1] if cache is None else cache.seen(canvas.shape[1])
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
        logits = torch.zeros(wanted, 8)
        logits[:, self.mask_token_id] = -torch.inf
        logp = None if targets is None else torch.zeros(wanted)
        return TokenOutput(logits, logp, torch.zeros(wanted))

    def new_cache(self) -> _Cache:
        return _Cache()

    def new_window_cache(self, keeps_suffix: bool) -> _WindowCache:
        return _WindowCache()

    def forget(self, cache: _Cache, num_positions: int) -> None:
        cache.length -= num_positions

    def head_weight(self) -> Tensor:
        return torch.zeros(8, 1)


def rehearse(sampler: Sampler, prompt_tokens: int, block_size: int | None = None) -> Decoding:
    """Let the sampler write one completion with a model that gives every token the same probability."""
    if getattr(sampler, "is_outside", False):
        return Decoding()
    policy = _Listener(block_size)
    ids = torch.zeros(1, prompt_tokens, dtype=torch.int64)
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1).long(), torch.zeros(1).long())
    sampler.sample(policy, prompts, noise=Noise(0))
    return policy.heard


def num_parts(num_rows: int, num_masks: int, micro_batch_size: int) -> int:
    """Micro-batches of one pass over the masked copies of a batch."""
    return sum(1 for _ in micro_batches(num_rows, num_masks, micro_batch_size))


def batch_sizes(recipe: Recipe) -> list[tuple[int, int]]:
    """(batches, rows of each) of those that are read from a file and those that are rolled out."""
    offline = recipe.num_offline_batches
    sizes = [(offline, recipe.data.batch_rows)] if recipe.data else []
    if recipe.rollout:
        sizes.append((recipe.trainer.num_batches - offline, recipe.rollout.batch_rows))
    return sizes


def batch_rows(recipe: Recipe) -> int:
    """B, rollouts or given completions of a batch, the larger if there are both; nodes of trees count."""
    return max(rows for _, rows in batch_sizes(recipe))


def num_collected(recipe: Recipe) -> int:
    """Batches that are rolled out; a buffer gives the others, but never the first."""
    assert recipe.rollout
    first, every = recipe.num_offline_batches, recipe.rollout.buffer.collect_every
    return sum(i == first or i % every == 0 for i in range(first, recipe.trainer.num_batches))
