"""A learned number about each row, beside the policy: an energy of completions, or a constant for each prompt.

It keeps its own optimiser. Its parameters are no parameters of the policy: where it is an adapter on the policy's
backbone, they take gradients inside `learn` alone, so that optimiser, clipping, DDP, checkpoints and saved weights of
the policy do not see them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmask.errors import ConfigError, DataError, TrainingError
from unmask.models import LoraConfig, MaskedPolicy
from unmask.models.adapters import POLICY, adapter_parameters, adapting
from unmask.noise import Noise
from unmask.ranks import gather_rows, own_rows
from unmask.sharding import add_up, clip, fill, gathered, load_state, place, slice_again, whole_tensors, zero
from unmask.types import Needs, Rollouts, ValueNeeds, take_rows

ENERGY = "energy"
"""The adapter of a trained trunk."""
WEIGHTS, CONTENT = "weights.safetensors", "energy.json"
FORMAT = 1

# d1's optimiser (arXiv:2504.12216); the decay keeps energies finite, which ranking alone does not bound
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.99), 0.1, 0.2


def make_value_model(
    policy: MaskedPolicy,
    reference: MaskedPolicy | None,
    needs: Needs,
    *,
    seed: int,
    micro_batch_size: int,
    accelerator: Accelerator | None = None,
) -> Critic | None:
    """What `needs.value` asks for, None if nothing, placed as the accelerator says.

    Called before the trainer wraps or shards the policy. Collective if the reference is in slices.

    Raises: ConfigError or ModelError where the launcher or the model cannot give what `needs.value` and `needs.kl` ask.
    """
    need = needs.value
    if (needs.kl or need) and zero.is_wanted():
        raise ConfigError(
            "algorithm: its full-vocabulary KL and its value model cannot be had with DeepSpeed. Launch with "
            "recipes/accelerate/fsdp2.yaml or ddp.yaml."
        )
    if needs.kl and reference is not None:
        reference.head_weight()
    if need is None:
        return None
    if not need.is_trunk_trained and reference is None:
        raise ConfigError("algorithm: its value is read from the reference policy, and this run has none. Give one.")
    key = Noise(seed).stream("value_model").key & 0x7FFFFFFFFFFFFFFF
    trunk = _trained_trunk(policy, key, accelerator) if need.is_trunk_trained else FrozenTrunk(reference)
    critic = Critic(trunk, need, seed=key, micro_batch_size=micro_batch_size)
    if accelerator:
        critic.head.to(accelerator.device)
    return critic


def _trained_trunk(policy: MaskedPolicy, seed: int, accelerator: Accelerator | None) -> AdapterTrunk | CopyTrunk:
    if not policy.switch:
        trunk = CopyTrunk(policy.with_module(copy.deepcopy(policy.module), ENERGY))
        if accelerator:
            place(trunk.policy.module, accelerator)
        return trunk
    own = policy.switch.module.peft_config[POLICY]
    targets = {name.rsplit(".", 1)[-1] for name in own.target_modules}  # a loaded adapter has whole names
    shape = LoraConfig(rank=own.r, alpha=own.lora_alpha, targets=tuple(sorted(targets)))
    policy.add_adapter(ENERGY, shape, seed=seed, is_trained=False)
    return AdapterTrunk(policy)


LOWER_RATES = "Lower its learning rates in [algorithm] (dga: energy_lr and energy_trunk_lr; embr_e: head_lr)."


class FrozenTrunk:
    """Hidden states of the reference."""

    kind = "reference"

    def __init__(self, policy: Any):
        self.policy: MaskedPolicy = policy

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()

    reading = learning


class CopyTrunk:
    """A copy of the starting model, all of it trained: as much memory again, which an adapter would save."""

    kind = "copy"

    def __init__(self, policy: MaskedPolicy):
        self.policy = policy
        policy.module.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that hidden states depend on. The output head is not used, unless it is the embedding too."""
        return dict(self.policy.module.named_parameters())

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()

    reading = learning


class AdapterTrunk:
    """A second adapter on the policy's backbone, beginning as the bare base."""

    kind = "adapter"

    def __init__(self, policy: MaskedPolicy):
        # the policy as it is now: its forward with gradient must not pass the wrapper that it gets later (DDP), which
        # would wait for the gradients of the policy
        self.policy = copy.copy(policy)

    def parameters(self) -> dict[str, nn.Parameter]:
        assert self.policy.switch
        return dict(adapter_parameters(self.policy.switch.module, ENERGY))

    @contextmanager
    def learning(self) -> Iterator[None]:
        slice_again(self.policy.module)  # what is open to gradients is marked on the slices
        with self.policy.learning(ENERGY):
            try:
                yield
            finally:
                slice_again(self.policy.module)

    def reading(self) -> AbstractContextManager[None]:
        return self.policy.use(ENERGY)


Trunk = FrozenTrunk | CopyTrunk | AdapterTrunk


class Critic:
    """A trunk's mean hidden state and a head of two layers on it; see `trainer.ValueModel`.

        value = Linear(H/4, 1)( GELU( Linear(H, H/4)( mean of the hidden states ) ) ),   the last layer zero at first

    The mean is over the completion up to and including its stop token, behind its prompt and without a mask; or over
    the tokens of the prompt but its first, the prompt alone. Every process computes its own rows, and gradients are
    added up, so that all hold the same weights, or slices of them: under FSDP2 the trunk is sharded as the policy is,
    and the head is whole everywhere.
    """

    def __init__(self, trunk: Trunk, need: ValueNeeds, *, seed: int, micro_batch_size: int):
        self.trunk, self.need, self.micro_batch_size = trunk, need, micro_batch_size
        module: Any = trunk.policy.module
        # what is only ranked has no level: the gradient of a last bias would be rounding, which Adam makes large
        self.head = make_head(module, seed, has_level=need.reads == "prompt")
        self._seen: tuple[Rollouts, Tensor] | None = None

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made when it is first asked for: the trainer may put the policy in slices, which replaces parameters."""
        slice_again(self.trunk.policy.module)
        groups = [{"params": list(self.head.parameters()), "lr": self.need.lr}]
        if trunk_parameters := list(self.trunk.parameters().values()):
            groups.append({"params": trunk_parameters, "lr": self.need.trunk_lr})
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def values(self, rollouts: Rollouts) -> Tensor:
        """(B,) of all rows, float32 or wider, without gradient; each process computes its own."""
        own = own_rows(len(rollouts))
        with self.trunk.reading():
            parts = [self._value(rollouts, rows) for rows in self._slices(own)]
        return gather_rows(torch.cat(parts))

    def learn(self, rollouts: Rollouts, loss: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """One update on a loss of the values (B,) of all rows; nothing changes where it has no gradient.

        The gradient is that of one pass over all rows, whatever the micro-batch size: a pass without gradient gives
        d loss / d values, a second one back-propagates them slice by slice.

        Raises: TrainingError, before anything is updated, if the loss or its gradient is not finite.
        """
        leaf = self.values(rollouts).requires_grad_()
        result = loss(leaf)
        (coefficients,) = torch.autograd.grad(result, leaf)
        _require_finite("loss", float(result.detach()))
        norm = 0.0
        if bool((coefficients != 0).any()):
            with self.trunk.learning():
                for rows in self._slices(own_rows(len(rollouts))):
                    (self._value(rollouts, rows) * coefficients[rows]).sum().backward()
            norm = self._step()
        return {"value_loss": float(result.detach()), "value_grad_norm": norm}

    def _step(self) -> float:
        """Add up the processes' gradients, clip and update; returns the norm before clipping."""
        used = [p for p in self.parameters if p.grad is not None]  # the same ones on every process
        add_up(used)
        norm = clip(used, MAX_GRAD_NORM)
        _require_finite("gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _slices(self, rows: slice) -> Iterator[slice]:
        size = self.micro_batch_size
        yield from (slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size))

    def _value(self, rollouts: Rollouts, rows: slice) -> Tensor:
        """(b,) of the given rows."""
        if self.need.is_trunk_trained:
            pooled = self._pooled(take_rows(rollouts, rows))
        else:
            pooled = self._frozen_states(rollouts)[rows]
        # FSDP2's mixed precision gives outputs in half precision
        value: Tensor = self.head(pooled.to(next(self.head.parameters()).dtype)).squeeze(-1)
        return value

    @torch.no_grad()
    def _frozen_states(self, rollouts: Rollouts) -> Tensor:
        """(B, H) of a frozen trunk, zero for other processes' rows; computed once for a batch."""
        if self._seen is None or self._seen[0] is not rollouts:
            own = own_rows(len(rollouts))
            parts = torch.cat([self._pooled(take_rows(rollouts, rows)) for rows in self._slices(own)])
            states = parts.new_zeros(len(rollouts), parts.shape[1])
            states[own] = parts
            self._seen = (rollouts, states)
        return self._seen[1]

    def _pooled(self, rollouts: Rollouts) -> Tensor:
        """(b, H) mean hidden states of what the value is about."""
        if self.need.reads == "prompt":
            canvas, real = rollouts.prompt_ids, rollouts.prompt_mask
            # without the first token, if there is another: where logits are shifted (Dream) its state is a pad's
            is_first = real.cumsum(1) == 1
            wanted = real & ~(is_first & (real.sum(1, keepdim=True) > 1))
        else:
            canvas = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
            places = torch.arange(rollouts.completion_length, device=canvas.device)
            wanted = torch.cat([torch.zeros_like(rollouts.prompt_mask), places < rollouts.length[:, None]], 1)
            real = torch.cat([rollouts.prompt_mask, torch.ones_like(rollouts.completion_ids, dtype=torch.bool)], 1)
        mask = None if bool(real.all()) else real
        pooled = self.trunk.policy.token_outputs(canvas, mask, wanted, want=("pooled",)).pooled
        assert pooled is not None  # it was wanted
        return pooled

    def tensors(self) -> dict[str, nn.Parameter]:
        """Every weight, or this process's slice of it, under its name in checkpoints and files."""
        slice_again(self.trunk.policy.module)
        named = {f"trunk.{name}": p for name, p in self.trunk.parameters().items()}
        return named | {f"head.{name}": p for name, p in self.head.named_parameters()}

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Copies of the whole weights on CPU; an empty dict if not `keep`. Collective."""
        names = list(self.trunk.parameters())
        trunk = whole_tensors(self.trunk.policy.module, names, keep=keep)
        head = whole_tensors(self.head, [name for name, _ in self.head.named_parameters()], keep=keep)
        return {f"trunk.{name}": t for name, t in trunk.items()} | {f"head.{name}": t for name, t in head.items()}

    def state(self, *, keep: bool = True) -> dict[str, Any]:
        """Weights and optimiser, for a checkpoint; their tensors left out if not `keep`. Collective."""
        return {"weights": self.weights(keep=keep), "optimizer": gathered(self.optimizer.state_dict(), keep=keep)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from such a state, whose keys may have become text. Collective."""
        self._fill(state["weights"])
        load_state(self.optimizer, state["optimizer"])

    def _fill(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.tensors().items():
            fill(parameter, weights[name])

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the weights and what they belong to, as safetensors and JSON.

        `weights` are what `weights` has gathered, where other processes hold slices of them.
        """
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.weights() if weights is None else weights), directory / WEIGHTS)
        content = {"format": FORMAT, "reads": self.need.reads, "trunk": self.trunk.kind}
        (directory / CONTENT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def restore(self, directory: Path) -> None:
        """Take over saved weights. Raises: DataError if they are missing, damaged or those of another model."""
        try:
            content = json.loads((directory / CONTENT).read_text(encoding="utf-8"))
            weights = load_file(directory / WEIGHTS)
        except Exception as error:  # safetensors has errors of its own kind
            raise DataError(f"{directory}: cannot be read ({error}). Restore it, or train again.") from error
        expected = {"format": FORMAT, "reads": self.need.reads, "trunk": self.trunk.kind}
        if content != expected:
            raise DataError(f"{directory / CONTENT}: says {content}, and this run needs {expected}. Restore it.")
        own = self.tensors()
        if {k: tuple(v.shape) for k, v in weights.items()} != {k: tuple(v.shape) for k, v in own.items()}:
            raise DataError(f"{directory / WEIGHTS}: does not fit the run's model. Restore both from one run.")
        self._fill(weights)


def make_head(module: Any, seed: int, *, has_level: bool) -> nn.Sequential:
    """H -> H/4 -> 1 in float32 or wider, the last layer zero, and without a bias unless `has_level`."""
    width = int(module.config.hidden_size)
    weight = module.get_output_embeddings().weight
    dtype = torch.promote_types(weight.dtype if weight.is_floating_point() else torch.float32, torch.float32)
    inner = max(1, width // 4)
    with adapting(seed):
        first, last = nn.Linear(width, inner), nn.Linear(inner, 1, bias=has_level)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(first, nn.GELU(), last).to(device=weight.device, dtype=dtype)


def _require_finite(what: str, value: float) -> None:
    """Raises: TrainingError naming the value model."""
    if not math.isfinite(value):
        raise TrainingError(f"the {what} of the value model is {value}. {LOWER_RATES}")
