"""What a run writes and shows while the trainer works: logs, the best model, checkpoints, and stopping on request."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.checkpoint import pack, read_newest, unpack, write_checkpoint
from unmask.detectors import Detectors
from unmask.errors import ConfigError, Stopped
from unmask.models import MaskedPolicy
from unmask.ranks import gather_objects, rank
from unmask.rollout import is_finished
from unmask.runs import RunDirectory, replace_file
from unmask.sharding import fill, is_sharded, whole_tensors
from unmask.trainer import Trainer, TrainerState
from unmask.types import Batch


@dataclass(frozen=True)
class RevealedSample:
    """One rollout, token by token with the step that fixed each."""

    prompt: str
    tokens: list[str]
    reveal_step: list[int]
    reward: float


class View(Protocol):
    """What a run shows while it works."""

    def stage(self, title: str, total: int, done: int = 0) -> None:
        """A stage of `total` steps begins, `done` of them in an earlier run; the stage before is over."""
        ...

    def advance(self, amount: int = 1, **facts: float) -> None: ...

    def batch(self, metrics: dict[str, float], sample: RevealedSample) -> None:
        """A batch was collected: its metrics, and one of its completions."""
        ...

    def phases(self, timing: dict[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class SilentView:
    """Shows nothing."""

    def stage(self, title: str, total: int, done: int = 0) -> None: ...

    def advance(self, amount: int = 1, **facts: float) -> None: ...

    def batch(self, metrics: dict[str, float], sample: RevealedSample) -> None: ...

    def phases(self, timing: dict[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class StopRequest:
    """Remembers SIGINT or SIGTERM; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handlers for the time of the block; does nothing outside the main thread."""
        try:
            old = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def agreed(self) -> int:
        """The signal that any process has received, 0 for none; the same answer on all of them."""
        return max(gather_objects(self.signal_number))


class RunLog:
    """The trainer's listener: writes the run directory (first process only), moves the view, checkpoints and stops."""

    def __init__(
        self,
        run: RunDirectory,
        view: View,
        policy: MaskedPolicy,
        accelerator: Accelerator,
        *,
        stop: StopRequest,
        carried: dict[str, Any],
        with_rollouts: bool,
    ):
        self.run, self.view, self.policy, self.accelerator = run, view, policy, accelerator
        self.stop, self.carried, self.with_rollouts = stop, carried, with_rollouts
        self.saved_step = 0
        self.is_writer = rank() == 0
        self.detectors = Detectors()
        self.last_row: dict[str, float] = {}

    def on_batch(self, batch: Batch) -> None:
        if self.with_rollouts:
            self.view.batch(batch.metrics, self.sample(batch))
            if self.is_writer and (rows := rollout_rows(batch)):
                self.run.append("rollouts.jsonl", rows)

    def sample(self, batch: Batch) -> RevealedSample:
        """The first rollout of the batch, a new one if there is one."""
        rollouts = batch.fresh or batch.rollouts
        tokens = [self.policy.tokenizer.decode([token]) for token in rollouts.completion_ids[0].tolist()]
        return RevealedSample(rollouts.prompts[0], tokens, rollouts.reveal_step[0].tolist(), float(rollouts.rewards[0]))

    def on_step(self, row: dict[str, float], timing: dict[str, float]) -> None:
        if self.is_writer:
            self.run.append("metrics.jsonl", [row])
            self.run.append("timing.jsonl", [{"step": row["step"], **timing}])
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
        self.last_row = row
        self.view.phases(timing)
        self.view.advance(1, loss=row["loss"])

    def on_evaluation(self, row: dict[str, Any], is_best: bool) -> None:
        self.view.advance(0, accuracy=row["accuracy"])
        if is_best:
            self.save_model("best")
        if self.is_writer:
            self.run.append("evaluations.jsonl", [row])

    def on_boundary(self, trainer: Trainer) -> None:
        if trainer.state.batch is None and self.with_rollouts:  # a batch is through
            for advice in self.detectors.observe(self.last_row):
                self.view.note(f"update {trainer.state.step}: {advice}")
        state, every = trainer.state, trainer.config.save_every
        number = self.stop.agreed()
        is_due = bool(every) and state.step % every == 0 and state.step > self.saved_step
        if number or is_due or (state.is_done and every):
            self.save_checkpoint(trainer)
        if number:
            gather_objects(None)  # a launcher kills the writer soon after another process has ended
            raise Stopped(
                f"stopped after update {state.step}; go on with: --resume {self.run.path}", signal_number=number
            )

    def on_fault(self, trainer: Trainer, message: str) -> None:
        """Save the batch that broke, with the weights it met, for `unmask replay`."""
        tensors = self.weights()
        if self.is_writer:
            state = {name: pack(value, name, tensors) for name, value in vars(trainer.state).items()}
            path = self.run.path / f"fault-{trainer.state.step + 1:06d}.safetensors"
            content = json.dumps({"trainer": state, "message": message})
            replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"fault": content}))
            self.view.note(f"the batch is in {path}; look into it with: unmask replay {path}")
        gather_objects(None)  # as on_boundary: the error ends every process

    def weights(self) -> dict[str, Tensor]:
        """Copies of the trained parameters, named model.<name>; every process asks, and the writer gets them."""
        module = self.accelerator.unwrap_model(self.policy.module)
        names = [name for name, _ in trained_parameters(module)]
        return {f"model.{n}": t for n, t in whole_tensors(module, names, keep=self.is_writer).items()}

    def save_model(self, name: str) -> None:
        """Write the weights to `name`/ of the run directory; every process takes part."""
        module = self.accelerator.unwrap_model(self.policy.module)
        state = None
        if is_sharded(module):
            names = [name for name, _ in trained_parameters(module)] if self.policy.adapters else module.state_dict()
            state = whole_tensors(module, names, keep=self.is_writer)
        if self.is_writer:
            self.run.save_model(name, lambda path: self.policy.save(path, module, state))

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Everything the run needs to go on from this boundary; every process takes part."""
        self.saved_step = trainer.state.step
        tensors = self.weights()
        optimizer = trainer.updates.state(keep=self.is_writer)
        values = trainer.value_model.state(keep=self.is_writer) if trainer.value_model else None
        if not self.is_writer:
            return
        state = {
            "trainer": {name: pack(value, name, tensors) for name, value in vars(trainer.state).items()},
            "optimizer": pack(optimizer, "optimizer", tensors),
            "buffer": pack(trainer.buffer.state(), "buffer", tensors),
            "value_model": pack(values, "value_model", tensors),
            "positions": self.run.positions(),
            "carried": self.carried,
        }
        self.run.flush()
        at = trainer.state
        name = f"{at.step:08d}-{at.iteration:06d}{'b' if at.batch else 'a'}"  # a batch is done, b the next is there
        write_checkpoint(self.run.path / "checkpoints", name, tensors, state, trainer.config.save_total_limit)

    def restore(self, trainer: Trainer, base_weights: str) -> bool:
        """Go back to the newest good checkpoint; False if there is none.

        Raises: ConfigError, before anything is changed, if it is not of a run that began with these weights.
        """
        found = read_newest(self.run.path / "checkpoints", self.view.note)
        if found is None:
            return False
        tensors, state = found
        if state["carried"].get("base_weights") != base_weights:
            raise ConfigError(
                f"--resume {self.run.path}: the base model is not the one the run began with (its weights have "
                "changed). Put it back, or start a new run."
            )
        restore_weights(self.accelerator.unwrap_model(self.policy.module), tensors)
        trainer.updates.load(unpack(state["optimizer"], tensors))
        # the rest; weights and optimiser went to the device one slice at a time
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(("model.", "optimizer."))}
        tensors = {name: tensor.to(self.policy.device) for name, tensor in rest.items()}
        trainer.state = TrainerState(**{name: unpack(value, tensors) for name, value in state["trainer"].items()})
        trainer.buffer.load(unpack(state["buffer"], tensors))
        if trainer.value_model and state["value_model"]:
            trainer.value_model.load(unpack(state["value_model"], tensors))
        self.carried.update(state["carried"])
        self.saved_step = trainer.state.step
        if self.is_writer:
            self.run.cut_back(state["positions"])
        return True


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that the optimiser moves; the others are those of the base."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def restore_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy model.<name> tensors into the trained parameters."""
    for name, parameter in trained_parameters(module):
        fill(parameter, tensors[f"model.{name}"])


def rollout_rows(batch: Batch) -> list[dict[str, Any]]:
    """One readable row per completion that was sampled for this batch: none of a buffer's, and no inner node of a tree.

    What comes by way of a buffer has no advantage here; the batches that it is trained in give it one.
    """
    rollouts = batch.rollouts if batch.fresh is None else batch.fresh
    if rollouts.sampled_at is None:
        return []
    is_new = (rollouts.sampled_at == batch.iteration) & is_finished(rollouts)
    return [
        {
            "iteration": batch.iteration,
            "prompt_id": int(rollouts.prompt_key[i]),
            "prompt": rollouts.prompts[i],
            "completion": rollouts.completions[i],
            "reward": float(rollouts.rewards[i]),
            "status": rollouts.statuses[i],
            "advantage": None if batch.fresh is not None else float(batch.advantages[i]),
            "length": int(rollouts.length[i]),
        }
        for i in is_new.nonzero()[:, 0].tolist()
    ]
