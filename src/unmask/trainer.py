"""The loop: collect, draw, score, loss, step. It knows no algorithm, no task and no model by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError, TrainingError
from unmask.likelihood import sequence_estimate
from unmask.ranks import gather_rollouts, gather_rows, num_ranks, own_rows
from unmask.rollout import Source, TextPolicy, rollout_metrics
from unmask.scoring import micro_batches, score, score_copies
from unmask.sharding import make_updates, place
from unmask.types import Algorithm, Batch, Corruption, Draw, LossInputs, NoiseLike, Rollouts, take_rows


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the defaults are ESPO's for LoRA (arXiv:2512.03759)."""

    lr: float = 3e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's moment decays."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 0.2
    """Gradients are scaled down to this 2-norm."""
    schedule: str = "constant"
    """"constant", or "cosine" from lr to min_lr_ratio * lr over the planned updates."""
    min_lr_ratio: float = 0.1
    """End of the cosine as a share of lr."""
    warmup_steps: int = 0
    """Updates over which lr rises linearly from zero."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(
                f"optimizer.schedule = {self.schedule!r}: must be 'constant' or 'cosine'. Try 'constant'."
            )
        bounds = {
            "lr": (0 < self.lr < math.inf, "above 0 and finite", 3e-6),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0", 1.0),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more and finite", 0.01),
            "betas": (all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)", [0.9, 0.99]),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "in [0, 1]", 0.1),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more", 0),
        }
        for key, (is_good, requirement, example) in bounds.items():
            if not is_good:
                raise ConfigError(f"optimizer.{key} = {getattr(self, key)}: must be {requirement}. Try {example}.")

    def scale(self, step: int, total: int) -> float:
        """Learning rate at update `step` (0-based) of `total`, as a share of lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class StopRule:
    """Stop once the mean of the last `window` evaluations passes a bound, not before batch `after_batch`."""

    metric: str = "accuracy"
    """Column of the evaluation row."""
    at_most: float | None = None
    """Stop when the mean is at or below this."""
    at_least: float | None = None
    """Stop when the mean is at or above this."""
    window: int = 2
    """Evaluations averaged."""
    after_batch: int = 0
    """First batch at whose end the rule may act."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"trainer.stop.window = {self.window}: must be at least 1 evaluation. Try 2.")

    def is_met(self, rows: list[dict[str, Any]], batch: int) -> bool:
        if (self.at_most is None and self.at_least is None) or batch < self.after_batch or len(rows) < self.window:
            return False
        mean = sum(row[self.metric] for row in rows[-self.window :]) / self.window
        low = self.at_most is not None and mean <= self.at_most
        return low or (self.at_least is not None and mean >= self.at_least)


@dataclass(frozen=True)
class TrainerConfig:
    """Length and rhythm of a run."""

    num_batches: int = 1000
    """Rollout batches; optimiser updates = num_batches * algorithm.num_iterations."""
    micro_batch_size: int = 256
    """Masked copies per forward and backward; changes memory and speed, not the gradient."""
    eval_every: int = 0
    """Batches between evaluations on held-out prompts; 0: none."""
    save_every: int = 100
    """Updates between checkpoints; 0: only when the run is stopped."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    monitor_rows: int = 32
    """Rollouts per batch on which ELBO, KL to the reference and entropy are measured, for any algorithm; 0: none."""
    stop: StopRule = field(default_factory=StopRule)
    """Early stop on held-out results."""

    def __post_init__(self) -> None:
        least = {"num_batches": 1, "micro_batch_size": 1, "save_total_limit": 1}
        for key in (*least, "eval_every", "save_every", "monitor_rows"):
            if getattr(self, key) < least.get(key, 0):
                bound = least.get(key, 0)
                raise ConfigError(f"trainer.{key} = {getattr(self, key)}: must be at least {bound}. Try the default.")


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
    ):
        self.policy, self.reference, self.source, self.algorithm = policy, reference, source, algorithm
        self.config, self.optimizer_config, self.noise = config, optimizer_config, noise
        self.accelerator, self.evaluate, self.listeners = accelerator, evaluate, listeners
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
            own = self.source.collect(self.policy, iteration, own_rows(self.source.batch_rows))
            rollouts = gather_rollouts(own)
            advantages = self.algorithm.advantages(rollouts.rewards, rollouts.groups)
        with self.phase("score"):
            draws = self.draw(rollouts)
            for inner, draw in enumerate(draws):
                if inner == 0 or draw is not draws[0]:
                    self.score_fixed(rollouts, draw, is_first=inner == 0)
            metrics = rollout_metrics(rollouts) | self.monitor(rollouts)
        return Batch(iteration, rollouts, advantages, draws, metrics)

    def draw(self, rollouts: Rollouts) -> list[Draw]:
        """Masks for every inner iteration, drawn before the first update."""
        draws: list[Draw] = []
        for inner in range(self.algorithm.num_iterations):
            if inner and not self.algorithm.fresh_masks:
                draws.append(draws[0])
                continue
            noise = self.noise.stream("corruption")
            draw = Draw(self.algorithm.draw(rollouts, noise=noise, iteration=inner))
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
            if self.reference is None:
                raise ConfigError("this algorithm needs a reference policy. Set its KL coefficient to 0 or give one.")
            masks = draw.ref_corruption or draw.corruption
            draw.ref_logps = self.score(self.reference, rollouts, masks)

    def score(self, policy: TextPolicy, rollouts: Rollouts, masks: Corruption) -> Tensor:
        """Log-probabilities (B, K, L) without gradient, each process scoring its own rows."""
        rows = own_rows(len(rollouts))
        size = self.config.micro_batch_size
        own = score(policy, take_rows(rollouts, rows), take_rows(masks, rows), micro_batch_size=size)
        return gather_rows(own.logps)

    def update(self, batch: Batch, inner: int) -> None:
        """loss, step: one optimiser update on the batch's masks number `inner`."""
        started = time.perf_counter()
        draw = batch.draws[inner]
        scale = self.optimizer_config.scale(self.state.step, self.total_steps)
        self.updates.set_lr(self.optimizer_config.lr * scale)
        with self.phase("update"):
            logps = self.backward(batch, draw)
            norm = self.updates.clip()
            with torch.no_grad():
                out = self.algorithm.loss(self.loss_inputs(batch, draw, logps))
            self.check_finite(batch, inner, logps, float(out.loss), norm)
            if draw.old_logps is None:
                draw.old_logps = logps
            self.updates.step()
        self.state.step += 1
        row = {
            "step": self.state.step,
            "iteration": batch.iteration,
            "loss": float(out.loss),
            "grad_norm": norm,
            "learning_rate": self.optimizer_config.lr * scale,
            **batch.metrics,
            **out.metrics,
        }
        self.timing["step_seconds"] = time.perf_counter() - started
        self.tell("on_step", row, self.timing)
        self.timing = {}

    def backward(self, batch: Batch, draw: Draw) -> Tensor:
        """Accumulate the gradient of the whole batch's loss; returns the policy's log-probabilities (B, K, L).

        The gradient is that of one pass over the whole batch whatever `micro_batch_size`. If a row's coefficient
        d loss / d logps depends on that row alone, each slice is put in its place among constants and back-propagated
        at once. Otherwise (or if one rollout's copies do not fit together) a first pass without gradient gives all
        coefficients, and a second back-propagates sum(coefficient * logps) slice by slice.
        """
        num_masks = draw.corruption.num_masks
        if self.algorithm.is_row_separable and self.config.micro_batch_size >= num_masks:
            return self.backward_rows(batch, draw)
        logps = self.score(self.policy, batch.rollouts, draw.corruption).requires_grad_()
        out = self.algorithm.loss(self.loss_inputs(batch, draw, logps))
        (coefficients,) = torch.autograd.grad(out.loss, logps)
        for copies, context in self.slices(batch, num_masks):
            with context:
                live = score_copies(self.policy, batch.rollouts, draw.corruption, copies).logps
                self.updates.backward(num_ranks() * (live * coefficients.flatten(0, 1)[copies]).sum())
        return logps.detach()

    def backward_rows(self, batch: Batch, draw: Draw) -> Tensor:
        """The one-pass form of `backward`, for objectives that are separable by row."""
        num_masks = draw.corruption.num_masks
        current = torch.zeros_like(draw.corruption.weight, dtype=torch.float32)
        if draw.old_logps is not None:
            current = draw.old_logps.clone()
        for copies, context in self.slices(batch, num_masks):
            first, last = int(copies[0]) // num_masks, int(copies[-1]) // num_masks + 1
            with context:
                live = score_copies(self.policy, batch.rollouts, draw.corruption, copies).logps
                live = live.view(last - first, num_masks, -1)
                current = current.to(live.dtype)
                logps = torch.cat([current[:first], live, current[last:]])
                out = self.algorithm.loss(self.loss_inputs(batch, draw, logps))
                self.updates.backward(num_ranks() * out.loss)
            current = logps.detach()
        return gather_rows(current[own_rows(len(current))])

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

    def loss_inputs(self, batch: Batch, draw: Draw, logps: Tensor) -> LossInputs:
        rollouts = batch.rollouts
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
