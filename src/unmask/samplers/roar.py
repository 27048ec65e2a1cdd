"""Random-order autoregressive sampling: one token per forward, in an order drawn in advance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmask.samplers.canvas import Start
from unmask.samplers.order import fill_in_random_order
from unmask.samplers.plan import check_lengths
from unmask.types import NoiseLike, Policy, PromptBatch, Samples


@dataclass(frozen=True)
class Roar:
    """Random-order autoregressive sampler, DMPO, arXiv:2510.08233.

        σ ~ uniform over the orders that finish a block before the next;   y_σk ~ softmax(logits_σk / temperature)

    At temperature 1 its samples follow the likelihood that the ELBO bounds, and because σ does not depend on the
    model, Σ logps is the exact log-likelihood of the sample along its order. nfe = gen_length.
    """

    gen_length: int
    """L, tokens to generate; also the number of forwards."""
    block_length: int | None = None
    """Tokens per block; blocks are filled left to right. None: one block, fully random order. 1: left to right."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token. Recorded log-probabilities are those of temperature 1."""

    keeps_tokens: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_lengths(self.gen_length, self.block_length, self.temperature)

    @property
    def total_steps(self) -> int:
        """Denoising steps of a completion."""
        return self.gen_length

    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,  # B rows
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
        start: Start | None = None,
    ) -> Samples:
        """One completion per row, from `start` on if it is given. `on_step` receives a copy of the canvas (B, T) after
        every step."""
        return fill_in_random_order(
            policy,
            prompts,
            [1] * self.gen_length,
            gen_length=self.gen_length,
            block_length=self.block_length or self.gen_length,
            temperature=self.temperature,
            noise=noise,
            on_step=on_step,
            start=start,
        )
