"""The loop: collect, draw, score, loss, step. It knows no algorithm, no task and no model by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from unmask.buffer import Buffer, BufferConfig
from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError, TrainingError
from unmask.likelihood import sequence_estimate
from unmask.ranks import gather_rollouts, gather_rows, num_ranks, own_rows
from unmask.rollout import Source, TextPolicy, rollout_metrics
from unmask.samplers.mixture import GeometricMixture
from unmask.schedule import OptimizerConfig, TrainerConfig
from unmask.scoring import micro_batches, score, score_copies
from unmask.sharding import make_updates, place
from unmask.types import Algorithm, Batch, Corruption, Draw, Evidence, LossInputs, NoiseLike, Rollouts, take_rows


class ValueModel(Protocol):
    """A learned number about each row, beside the policy; see `ValueNeeds`."""

    def values(self, rollouts: Rollouts) -> Tensor:
        """(B,) of all rows, without gradient; each process computes its own."""
        ...

    def learn(self, rollouts: Rollouts, loss: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """One update of its weights on a loss of the values (B,); numbers for the log."""
        ...

    def state(self, *, keep: bool) -> dict[str, Any]:
        """Weights and optimiser with whole tensors, for a checkpoint; without tensors if not `keep`. Collective."""
        ...

    def load(self, state: dict[str, Any]) -> None: ...


class Listener(Protocol):
    """What a run wants to hear: the place for logs, progress and checkpoints."""

    def on_batch(self, batch: Batch) -> None: ...

    def on_step(self, row: dict[str, float], timing: dict[str, float]) -> None: ...

    def on_evaluation(self, row: dict[str, Any], is_best: bool) -> None: ...

    def on_boundary(self, trainer: Trainer) -> None:
        """Between two phases: `trainer.state` is complete, so that a run could go on from here."""
        ...

    def on_fault(self, trainer: Trainer, message: str) -> None:
        """An update broke; `trainer.state.batch` holds what it was made from."""
        ...


@dataclass
class TrainerState:
    """Where a run stands, beside weights and optimiser. `batch` is None between batches."""

    iteration: int = 0
    """Batch being worked on, from 0."""
    inner: int = 0
    """Updates made on that batch."""
    step: int = 0
    """Updates made in all."""
    is_done: bool = False
    """The planned batches are through, or the stop rule is met."""
    batch: Batch | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Moves `policy` by `algorithm` on batches from `source`; see `run`."""

    def __init__(
        self,
        policy: TextPolicy,
        reference: TextPolicy | None,
        source: Source,
        algorithm: Algorithm,
        config: TrainerConfig,
        optimizer_config: OptimizerConfig,
        *,
        noise: NoiseLike,
        accelerator: Accelerator,
        evaluate: Callable[[], dict[str, Any]] | None = None,
        listeners: tuple[Listener, ...] = (),
        buffer: Buffer | None = None,
        value_model: ValueModel | None = None,
    ):
        self.policy, self.reference, self.source, self.algorithm = policy, reference, source, algorithm
        self.config, self.optimizer_config, self.noise = config, optimizer_config, noise
        self.accelerator, self.evaluate, self.listeners = accelerator, evaluate, listeners
        self.buffer, self.value_model = buffer or Buffer(BufferConfig(), noise), value_model
        self.total_steps = config.num_batches * algorithm.num_iterations
        self.state = TrainerState()
        self.timing: dict[str, float] = {}
        module = policy.module  # type: ignore[attr-defined]
        place(module, accelerator)  # first: sharding replaces parameters
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optimizer_config.lr,
            betas=optimizer_config.betas,
            weight_decay=optimizer_config.weight_decay,
        )
        policy.module, self.updates = make_updates(  # type: ignore[attr-defined]
            module, optimizer, optimizer_config.max_grad_norm, accelerator
        )

    def run(self) -> None:
        """Train from `state` to the end of the planned batches, or until the stop rule is met."""
        state = self.state
        while not state.is_done:
            if state.batch is None:
                state.batch = self.prepare(state.iteration)
                self.tell("on_batch", state.batch)
                self.tell("on_boundary", self)
            while state.inner < self.algorithm.num_iterations:
                self.update(state.batch, state.inner)
                state.inner += 1
                self.tell("on_boundary", self)
            is_met = self.evaluation_stops(state.iteration)
            state.batch, state.inner, state.iteration = None, 0, state.iteration + 1
            state.is_done = is_met or state.iteration >= self.config.num_batches
            self.tell("on_boundary", self)

    def prepare(self, iteration: int) -> Batch:
        """collect, draw, score: everything that updates on this batch hold constant."""
        with self.phase("collect"):
            fresh = None
            if self.buffer.is_due(iteration):
                own = self.source.collect(self.writer(), iteration, own_rows(self.source.batch_rows))
                fresh = gather_rollouts(own)
            rollouts = self.buffer.exchange(fresh, iteration)
            self.check_record(rollouts)
            advantages = self.algorithm.advantages(rollouts.rewards, rollouts.groups)
        with self.phase("score"):
            draws = self.draw(rollouts)
            for inner, draw in enumerate(draws):
                if inner == 0 or draw is not draws[0]:
                    self.score_fixed(rollouts, draw, is_first=inner == 0)
            batch = Batch(iteration, rollouts, advantages, draws, {}, fresh=None if fresh is rollouts else fresh)
            batch.evidence = self.gather_evidence(rollouts)
            batch.metrics |= rollout_metrics(fresh or rollouts) | self.buffer.metrics(rollouts, iteration)
            batch.metrics |= self.learn_values(batch) | self.monitor(rollouts)
        return batch

    def check_record(self, rollouts: Rollouts) -> None:
        """Raises: ConfigError for rollouts without a record that the algorithm reads."""
        if self.algorithm.needs.drawn and rollouts.drawn_logps is None:
            raise ConfigError(
                'algorithm.density = "tempered": these rollouts have no drawn_logps, which their sampler does not '
                'record or a buffer of an older version does not hold. Use "untempered", or begin a new run with a '
                "sampler that records them."
            )

    def writer(self) -> Any:
        """Whom rollouts are drawn from: the policy, or its mixture with the reference that the algorithm asks for."""
        share = self.algorithm.needs.reference_share
        return GeometricMixture(self.policy, self.needed_reference(), share) if share else self.policy

    def draw(self, rollouts: Rollouts) -> list[Draw]:
        """Masks for every inner iteration, drawn before the first update."""
        draws: list[Draw] = []
        for inner in range(self.algorithm.num_iterations):
            if inner and not self.algorithm.fresh_masks:
                draws.append(draws[0])
                continue
            noise = self.noise.stream("corruption")
            draw = Draw(self.algorithm.draw(rollouts, noise=noise, iteration=inner))
            draw.uniform = self.noise.stream("choice").uniform(rollouts.prompt_key, rollouts.rollout_index, inner)
            if not self.algorithm.share_masks:
                draw.old_corruption = self.algorithm.draw(rollouts, noise=noise.stream("old"), iteration=inner)
                draw.ref_corruption = self.algorithm.draw(rollouts, noise=noise.stream("ref"), iteration=inner)
            draws.append(draw)
        return draws

    def score_fixed(self, rollouts: Rollouts, draw: Draw, *, is_first: bool) -> None:
        """Fill in old and reference log-probabilities, as far as the algorithm needs them."""
        needs = self.algorithm.needs
        # before the first update the policy is the old policy: its own first pass gives these numbers for nothing
        if needs.old and not (is_first and draw.old_corruption is None):
            masks = draw.old_corruption or draw.corruption
            draw.old_logps = self.score(self.policy, rollouts, masks)
        if needs.ref:
            masks = draw.ref_corruption or draw.corruption
            draw.ref_logps = self.score(self.needed_reference(), rollouts, masks)

    def needed_reference(self) -> TextPolicy:
        """Raises: ConfigError if there is none."""
        if self.reference is None:
            raise ConfigError("this algorithm needs a reference policy. Set its KL coefficient to 0 or give one.")
        return self.reference

    def gather_evidence(self, rollouts: Rollouts) -> Evidence | None:
        """What the algorithm's weights of whole rollouts are made of, if it has such weights."""
        needs = self.algorithm.needs
        if needs.evidence is None:
            return None
        masks = needs.evidence(rollouts, self.noise.stream("evidence"))
        old = self.score(self.policy, rollouts, masks) if needs.evidence_old else None
        return Evidence(masks, self.score(self.needed_reference(), rollouts, masks), old)

    def learn_values(self, batch: Batch) -> dict[str, float]:
        """Let the value model learn from the batch as far as it has a loss of its own, then note its numbers."""
        need, rollouts = self.algorithm.needs.value, batch.rollouts
        if need is None:
            return {}
        if self.value_model is None:
            raise ConfigError("this algorithm learns a value of each row, and no value model was given.")
        metrics: dict[str, float] = {}
        if loss := need.loss:
            for _ in range(need.num_updates):
                metrics = self.value_model.learn(
                    rollouts, lambda values: loss(values, rollouts.rewards, rollouts.groups)
                )
        self.read_values(batch)
        return metrics

    def read_values(self, batch: Batch) -> None:
        """Note the value model's numbers. Raises: TrainingError if one is not finite: weights would hide it."""
        assert self.value_model
        batch.values = self.value_model.values(batch.rollouts)
        bad = ~torch.isfinite(batch.values)
        if bool(bad.any()):
            raise TrainingError(
                f"the value model gives {int(bad.sum())} of {len(bad)} rollouts no finite number (batch "
                f"{batch.iteration}, step {self.state.step}). Lower its learning rates in [algorithm]."
            )

    def learn_values_by_objective(self, batch: Batch, inputs: LossInputs) -> dict[str, float]:
        """A value model without a loss of its own follows the objective's, at the numbers of the update just made."""
        need = self.algorithm.needs.value
        if need is None or need.loss is not None:
            return {}
        assert self.value_model
        metrics = self.value_model.learn(
            batch.rollouts, lambda values: self.algorithm.loss(replace(inputs, values=values)).loss
        )
        self.read_values(batch)
        return metrics

    def score(self, policy: TextPolicy, rollouts: Rollouts, masks: Corruption) -> Tensor:
        """Log-probabilities (B, K, L) without gradient, each process scoring its own rows."""
        return self.numbers(policy, rollouts, masks)["logps"]

    def numbers(
        self, policy: TextPolicy, rollouts: Rollouts, masks: Corruption, kl_to: TextPolicy | None = None
    ) -> dict[str, Tensor]:
        """`Scores.learned` of all rows, without gradient, each process scoring its own."""
        rows = own_rows(len(rollouts))
        size = self.config.micro_batch_size
        own = score(policy, take_rows(rollouts, rows), take_rows(masks, rows), micro_batch_size=size, kl_to=kl_to)
        return {name: gather_rows(values) for name, values in own.learned.items()}

    def update(self, batch: Batch, inner: int) -> None:
        """loss, step: one optimiser update on the batch's masks number `inner`."""
        started = time.perf_counter()
        draw = batch.draws[inner]
        scale = self.optimizer_config.scale(self.state.step, self.total_steps)
        self.updates.set_lr(self.optimizer_config.lr * scale)
        with self.phase("update"):
            numbers = self.backward(batch, draw)
            norm = self.updates.clip()
            inputs = self.loss_inputs(batch, draw, numbers)
            with torch.no_grad():
                out = self.algorithm.loss(inputs)
            self.check_finite(batch, inner, numbers["logps"], float(out.loss), norm)
            if draw.old_logps is None:
                draw.old_logps = numbers["logps"]
            self.updates.step()
            metrics = out.metrics | self.learn_values_by_objective(batch, inputs)
        self.state.step += 1
        row = {
            "step": self.state.step,
            "iteration": batch.iteration,
            "loss": float(out.loss),
            "grad_norm": norm,
            "learning_rate": self.optimizer_config.lr * scale,
            **batch.metrics,
            **metrics,
        }
        self.timing["step_seconds"] = time.perf_counter() - started
        self.tell("on_step", row, self.timing)
        self.timing = {}

    def backward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Accumulate the gradient of the whole batch's loss; returns the policy's numbers (B, K, L).

        The gradient is that of one pass over the whole batch whatever `micro_batch_size`. If a row's coefficient
        d loss / d logps depends on that row alone, each slice is put in its place among constants and back-propagated
        at once. Otherwise (or if one rollout's copies do not fit together) a first pass without gradient gives all
        coefficients, and a second back-propagates sum(coefficient * logps) slice by slice.
        """
        num_masks = draw.corruption.num_masks
        kl_to = self.needed_reference() if self.algorithm.needs.kl else None
        if self.algorithm.is_row_separable and self.config.micro_batch_size >= num_masks:
            return self.backward_rows(batch, draw, kl_to)
        numbers = self.numbers(self.policy, batch.rollouts, draw.corruption, kl_to)
        leaves = {name: values.requires_grad_() for name, values in numbers.items()}
        out = self.algorithm.loss(self.loss_inputs(batch, draw, leaves))
        found = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
        coefficients = {name: c for name, c in zip(leaves, found, strict=True) if c is not None}
        for copies, context in self.slices(batch, num_masks):
            with context:
                live = score_copies(self.policy, batch.rollouts, draw.corruption, copies, kl_to=kl_to).learned
                parts = [(live[name] * c.flatten(0, 1)[copies]).sum() for name, c in coefficients.items()]
                self.updates.backward(num_ranks() * torch.stack(parts).sum())
        return {name: values.detach() for name, values in leaves.items()}

    def backward_rows(self, batch: Batch, draw: Draw, kl_to: TextPolicy | None) -> dict[str, Tensor]:
        """The one-pass form of `backward`, for objectives that are separable by row."""
        num_masks = draw.corruption.num_masks
        zeros = torch.zeros_like(draw.corruption.weight, dtype=torch.float32)
        current = {"logps": zeros} | ({} if kl_to is None else {"kl": zeros})
        if draw.old_logps is not None:
            current["logps"] = draw.old_logps.clone()
        for copies, context in self.slices(batch, num_masks):
            first, last = int(copies[0]) // num_masks, int(copies[-1]) // num_masks + 1
            with context:
                live = score_copies(self.policy, batch.rollouts, draw.corruption, copies, kl_to=kl_to).learned
                for name, rows in live.items():
                    whole = current[name].to(rows.dtype)
                    own = rows.view(last - first, num_masks, -1)
                    current[name] = torch.cat([whole[:first], own, whole[last:]])
                out = self.algorithm.loss(self.loss_inputs(batch, draw, current))
                self.updates.backward(num_ranks() * out.loss)
            current = {name: values.detach() for name, values in current.items()}
        return {name: gather_rows(values[own_rows(len(values))]) for name, values in current.items()}

    def slices(self, batch: Batch, num_masks: int) -> Iterator[tuple[Tensor, AbstractContextManager[Any]]]:
        """Micro-batches of this process's flat copy indices; in the last one's context gradients are whole.

        Processes average their gradients, which is why each multiplies its share of the loss by their number.
        All of them make equally many forwards and backwards: their shares are equally long.
        """
        rows = own_rows(len(batch.rollouts))
        parts = list(micro_batches(rows.stop - rows.start, num_masks, self.config.micro_batch_size))
        for i, copies in enumerate(parts):
            context = self.updates.exchanging(i == len(parts) - 1)
            yield (copies + rows.start * num_masks).to(self.policy.device), context

    def loss_inputs(self, batch: Batch, draw: Draw, numbers: dict[str, Tensor]) -> LossInputs:
        rollouts, logps = batch.rollouts, numbers["logps"]
        old = logps.detach() if draw.old_logps is None and self.algorithm.needs.old else draw.old_logps
        return LossInputs(
            logps=logps,
            corruption=draw.corruption,
            advantages=batch.advantages,
            rewards=rollouts.rewards,
            groups=rollouts.groups,
            length=rollouts.length,
            old_logps=old,
            ref_logps=draw.ref_logps,
            old_corruption=draw.old_corruption,
            ref_corruption=draw.ref_corruption,
            kl=numbers.get("kl"),
            evidence=batch.evidence,
            values=batch.values,
            sample_logps=rollouts.sample_logps,
            drawn_logps=rollouts.drawn_logps,
            process_rewards=rollouts.process_rewards,
            uniform=draw.uniform,
            progress=self.state.step / self.total_steps,
        )

    def monitor(self, rollouts: Rollouts) -> dict[str, float]:
        """ELBO, KL and entropy of the first rollouts on one coupled draw; the same numbers for every algorithm.

        `kl` is the on-policy estimate (ELBO_theta - ELBO_ref) / L, nats per token: it may be negative by chance.
        """
        if not self.config.monitor_rows:
            return {}
        rows = take_rows(rollouts, slice(0, self.config.monitor_rows))
        masks = draw_uniform_count(rows, 2, coupled=True, noise=self.noise.stream("monitor"))
        size, length = self.config.micro_batch_size, rollouts.completion_length
        scores = score(self.policy, rows, masks, micro_batch_size=size, entropy=True)
        elbo = sequence_estimate(scores.logps, masks).mean()
        assert scores.entropy is not None
        metrics = {
            "elbo": float(elbo),
            "elbo_per_token": float(elbo) / length,
            "entropy": float(scores.entropy.sum() / masks.scored.sum()),
        }
        if self.reference is not None:
            reference = score(self.reference, rows, masks, micro_batch_size=size).logps
            metrics["kl"] = float(elbo - sequence_estimate(reference, masks).mean()) / length
        return metrics

    def evaluation_stops(self, iteration: int) -> bool:
        """Evaluate when it is due; True if the stop rule is met."""
        done = iteration + 1
        if self.evaluate is None or not self.config.eval_every:
            return False
        if done % self.config.eval_every and done != self.config.num_batches:
            return False
        with self.phase("evaluate"):
            row = {"iteration": iteration, "step": self.state.step, **self.evaluate()}
        earlier = self.state.evaluations
        is_best = all(row["accuracy"] > other["accuracy"] for other in earlier)
        earlier.append(row)
        self.tell("on_evaluation", row, is_best)
        return self.config.stop.is_met(earlier, done)

    def check_finite(self, batch: Batch, inner: int, logps: Tensor, loss: float, norm: float) -> None:
        """Raises: TrainingError before anything is updated, with the prompt and position where numbers broke."""
        bad = (~torch.isfinite(logps) & batch.draws[inner].corruption.scored).any(1)  # (B, L)
        if math.isfinite(loss) and math.isfinite(norm) and not bool(bad.any()):
            return
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        if bool(bad.any()):
            row, position = bad.nonzero()[0].tolist()
            prompt = int(batch.rollouts.prompt_key[row])
            what += (
                f": {int(bad.any(1).sum())} of {len(bad)} rollouts have non-finite log-probabilities, "
                f"first at prompt {prompt}, position {position}"
            )
        self.updates.discard()
        message = f"{what} at step {self.state.step + 1} (batch {batch.iteration})."
        self.tell("on_fault", self, message)
        raise TrainingError(
            f"{message} Nothing was updated. Lower optimizer.lr, or raise algorithm.kl_coef where there is one."
        )

    def tell(self, event: str, *args: Any) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*args)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block to `timing`, seconds."""
        started = time.perf_counter()
        yield
        self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - started
