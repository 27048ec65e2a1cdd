"""Two models read as one: rollouts where an algorithm's target is a mixture of policy and reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from unmask.errors import ModelError
from unmask.types import Policy, TokenOutput


class GeometricMixture:
    """A policy whose logits are those of two models, weighted: for sampling, and to be read whole.

        logits = (1 - b) · logits of the policy + b · logits of the reference,     b = `share`

    At temperature 1 a token follows p_policy^(1-b) · p_reference^b, normalised over the vocabulary in each state; a
    token that either may not draw is not drawn. Everything else (text in and out, device, lengths) is the policy's.
    Each read is two forwards, which samplers count as two. Source: wd1, arXiv:2507.08838.

    Raises: ValueError unless 0 < share < 1: at either end one model alone is meant.
    Oracle: tests/test_mixture.py::test_steps_are_drawn_from_the_enumerated_mixture
    """

    num_models = 2
    """Forwards of each read."""

    def __init__(self, policy: Any, reference: Policy, share: float):
        if not 0 < share < 1:
            raise ValueError(f"GeometricMixture() got share = {share}, and it must lie between 0 and 1")
        self.policy, self.reference, self.share = policy, reference, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    @torch.no_grad()
    def token_outputs(
        self,
        canvas: Tensor,  # (b, T) int64
        attention_mask: Tensor | None,  # (b, T) bool
        positions: Tensor,  # (b, T) bool, N of them
        *,
        want: Sequence[str] = ("logits",),
    ) -> TokenOutput:
        """See `Policy.token_outputs`; logits alone, without gradient. Raises: ValueError for anything else."""
        if tuple(want) != ("logits",):
            raise ValueError(f"a mixture of two models gives logits alone, and was asked for {', '.join(want)}")
        own, other = (m.token_outputs(canvas, attention_mask, positions).logits for m in (self.policy, self.reference))
        assert own is not None and other is not None, "a policy returns what it is asked for"
        return TokenOutput(logits=(1 - self.share) * own + self.share * other)

    def _has_no(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self.policy.name}: rollouts are drawn from a mixture with the reference, which has no {what}. Use a "
            "sampler that reads whole canvases of this model, without a cache, or no mixture."
        )

    def new_cache(self) -> NoReturn:
        """Raises: ModelError; what a cache keeps is one model's."""
        self._has_no("cache")

    def new_window_cache(self, keeps_suffix: bool) -> NoReturn:
        """Raises: ModelError; what a cache keeps is one model's."""
        self._has_no("cache")

    def named_weights(self) -> NoReturn:
        """Raises: ModelError; an engine would draw from the policy alone."""
        self._has_no("weights of its own to give away")

    def weights_version(self) -> NoReturn:
        """Raises: ModelError; see `named_weights`."""
        self._has_no("weights of its own to give away")
