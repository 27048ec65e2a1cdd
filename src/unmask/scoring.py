"""(Policy, Rollouts, Corruption) -> log-probabilities: the only place a model runs while learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.errors import ModelError
from unmask.types import Corruption, Policy, ReferenceStates, Rollouts


@dataclass(frozen=True)
class Scores:
    """Numbers read from masked copies; zero where `Corruption.scored` is False."""

    logps: Tensor  # (B, K, L) nats
    entropy: Tensor | None = None  # (B, K, L) nats, without gradient
    kl: Tensor | None = None  # (B, K, L) nats, to the reference over the whole vocabulary

    @property
    def learned(self) -> dict[str, Tensor]:
        """The numbers that carry gradient, under the names that `LossInputs` has for them."""
        return {"logps": self.logps} | ({} if self.kl is None else {"kl": self.kl})


def score_copies(
    policy: Policy,
    rollouts: Rollouts,
    corruption: Corruption,
    copies: Tensor,  # (C,) int64, flat indices into (B, K)
    *,
    entropy: bool = False,
    kl_to: Policy | None = None,
) -> Scores:
    """Run the model on the given masked copies; returns (C, L) tensors. Differentiable if gradients are enabled.

    `kl_to` is a frozen model whose distributions are compared with the policy's at the scored positions.

    Copies in which nothing is scored cost no forward: their rows are zero.

    Raises: ModelError for a block-causal model. Its ELBO conditions a block on clean blocks before it, which one masked
        canvas does not show.
    """
    if policy.block_size is not None:
        raise ModelError(
            f"this model is block-causal (blocks of {policy.block_size}), and its ELBO is not implemented. It can be "
            "sampled and evaluated."
        )
    masked = corruption.masked.flatten(0, 1)[copies]  # (C, T)
    scored = corruption.scored.flatten(0, 1)[copies]  # (C, L)
    rows = copies // corruption.num_masks
    live = scored.any(-1)
    live[:1] |= ~live.any()  # one row at least, so that every process makes the same forwards
    rows, masked, seen = rows[live], masked[live], scored[live]

    prompts, completions = rollouts.prompt_ids[rows], rollouts.completion_ids[rows]
    canvas = torch.cat([prompts, completions], dim=1)
    canvas = canvas.masked_fill(masked, policy.mask_token_id)
    positions = torch.cat([torch.zeros_like(prompts, dtype=torch.bool), seen], dim=1)
    attention_mask = None
    if not bool(rollouts.prompt_mask.all()):
        attention_mask = torch.cat([rollouts.prompt_mask[rows], torch.ones_like(completions, dtype=torch.bool)], dim=1)
    want: list[str] = ["logp"]
    options: dict[str, Any] = {}
    if entropy:
        want.append("entropy")
    if kl_to is not None:
        want.append("kl")
        with torch.no_grad():
            states = kl_to.token_outputs(canvas, attention_mask, positions, want=("hidden",)).hidden
        assert states is not None  # it was wanted
        # adapters have one head in common, which the forward has at hand also where weights are in slices
        is_same_model = getattr(kl_to, "parent", None) is policy
        options["reference"] = ReferenceStates(states, None if is_same_model else kl_to.head_weight())
    out = policy.token_outputs(canvas, attention_mask, positions, targets=completions[seen], want=want, **options)

    place = (scored & live[:, None]).flatten().nonzero().squeeze(-1)  # (N,) flat places in (C, L)
    assert out.logp is not None  # it was wanted
    return Scores(
        *(None if v is None else _scatter(v, place, scored) for v in (out.logp, out.entropy, out.kl))  # type: ignore[arg-type]
    )


def _scatter(values: Tensor, place: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (C, L), zero elsewhere; differentiable."""
    return values.new_zeros(like.numel()).index_put((place,), values).view_as(like)


def micro_batches(num_rows: int, num_masks: int, micro_batch_size: int) -> Iterator[Tensor]:
    """Flat indices of the masked copies of `num_rows` rollouts, `micro_batch_size` copies at a time.

    Whole rollouts stay together when one fits; otherwise a rollout's copies are split over several micro-batches.
    """
    size = micro_batch_size
    if micro_batch_size >= num_masks:
        size = micro_batch_size // num_masks * num_masks
    yield from torch.arange(num_rows * num_masks).split(size)


@torch.no_grad()
def score(
    policy: Policy,
    rollouts: Rollouts,
    corruption: Corruption,
    *,
    micro_batch_size: int,
    entropy: bool = False,
    kl_to: Policy | None = None,
) -> Scores:
    """Log-probabilities (B, K, L) and what else is wanted, without gradient, in micro-batches of masked copies."""
    parts = [
        score_copies(policy, rollouts, corruption, copies.to(policy.device), entropy=entropy, kl_to=kl_to)
        for copies in micro_batches(len(rollouts), corruption.num_masks, micro_batch_size)
    ]
    shape = corruption.scored.shape
    whole = (
        [getattr(part, name) for part in parts if getattr(part, name) is not None]
        for name in ("logps", "entropy", "kl")
    )
    return Scores(*(torch.cat(found).view(shape) if found else None for found in whole))  # type: ignore[arg-type]
