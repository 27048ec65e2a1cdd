"""Dream's sampler: any position of the canvas at any time, at a pace given by a grid of times. arXiv:2508.15487."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.samplers.canvas import Canvas, Start, open_canvas
from unmask.samplers.draw import draw_tokens, token_logps
from unmask.samplers.plan import check_lengths, check_steps, time_grid_counts, time_grid_shares
from unmask.samplers.reveal import fix_candidates, surest
from unmask.types import NoiseLike, Policy, PromptBatch, Samples

ALGS = ("origin", "maskgit_plus", "topk_margin", "entropy")

# numbers sorted at once: 2^24 are 64 MiB in float32
_SLICE_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Dream:
    """Dream's sampler, which has no blocks: in each step the surest of all masked positions are fixed.

        x_i ~ softmax(logits_i / temperature) cut to top_p, then to top_k;   step t to s: int((1 - s/t) left) tokens

    Confidence is read from that tempered, cut distribution p: its probability of x_i ("maskgit_plus"), the distance of
    its two largest probabilities ("topk_margin"), or Σ p log p ("entropy"). "origin" asks for none: each masked
    position is fixed with probability 1 - s/t. The last step fixes what is left. Defaults: ESPO's evaluation of Dream,
    arXiv:2512.03759; it trains at temperature 0.9.

    Differs from the authors' code in that the mask token cannot be drawn, numbers of tokens are per row, equal
    confidences are taken from left to right, and probabilities are computed in float32 or wider.
    """

    gen_length: int
    """L, tokens to generate."""
    num_steps: int | None = None
    """Forwards. None: gen_length; the published pace then fixes no token in the first step, and two in a later one."""
    alg: str = "entropy"
    """Which positions a step fixes: "entropy", "maskgit_plus", "topk_margin" or "origin"."""
    temperature: float = 0.1
    """Divides the logits; 0 takes the most probable token. Recorded log-probabilities are those of temperature 1."""
    top_p: float | None = 0.95
    """Tokens are drawn from the fewest that hold this share of the tempered probability. None or 1: from all."""
    top_k: int | None = None
    """Tokens are drawn from at most so many. None: from all."""
    alg_temp: float = 0.0
    """Above 0: positions are drawn without replacement from softmax(confidence / alg_temp) instead of the surest."""

    keeps_tokens: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_lengths(self.gen_length, None, self.temperature)
        check_steps(self.gen_length, 1, self.num_steps)
        if self.alg not in ALGS:
            raise ConfigError(f"sampler.alg = '{self.alg}': must be one of {', '.join(ALGS)}. Try 'entropy'.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"sampler.top_p = {self.top_p}: must be above 0 and at most 1, or none. Try 0.95.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"sampler.top_k = {self.top_k}: must be at least 1, or none. Try 50.")
        if not (math.isfinite(self.alg_temp) and self.alg_temp >= 0):
            raise ConfigError(f"sampler.alg_temp = {self.alg_temp}: must be finite and not negative. Try 0.0.")
        if self.alg_temp > 0 and self.alg == "origin":
            raise ConfigError(
                f"sampler.alg_temp = {self.alg_temp}: alg 'origin' has no confidence to temper. "
                "Set it to 0, or alg to 'entropy'."
            )

    @property
    def total_steps(self) -> int:
        """Denoising steps of a completion."""
        return self.num_steps or self.gen_length

    @torch.no_grad()
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
        canvas = open_canvas(policy, prompts, self.gen_length, on_step, start)
        first = canvas.first_step
        is_open = canvas.reveal_step < 0
        if self.alg == "origin":
            for share in time_grid_shares(self.total_steps).tolist()[first:]:
                is_open = self._fix_independently(policy, canvas, is_open, share, noise)
        else:
            for count in time_grid_counts(self.gen_length, self.total_steps)[first:]:
                is_open = self._fix_surest(policy, canvas, is_open, count, noise)
        return canvas.samples()

    def _fix_surest(
        self,
        policy: Policy,
        canvas: Canvas,
        is_open: Tensor,  # (B, L) bool, N of them
        count: int,
        noise: NoiseLike,
    ) -> Tensor:  # (B, L) bool
        """One step of the rules with a confidence. Returns which slots are still open."""
        logits = canvas.logits_where(policy, is_open)  # (N, V)
        tokens, confidence = self._candidates(logits, self._uniforms(canvas, is_open, noise))
        if self.alg_temp > 0:
            # the largest of score plus Gumbel noise are draws without replacement from softmax(score)
            chance = canvas.uniforms(noise.stream("position"), canvas.nfe, _slots(is_open))[is_open]
            confidence = confidence.double() / self.alg_temp - (-chance.log()).log()
        rule = partial(surest, count=count)
        return fix_candidates(canvas, is_open, logits, tokens, confidence, rule, self._record)

    def _fix_independently(
        self,
        policy: Policy,
        canvas: Canvas,
        is_open: Tensor,  # (B, L) bool
        share: float,
        noise: NoiseLike,
    ) -> Tensor:  # (B, L) bool
        """One step of "origin": every open slot with probability `share`. Returns which are still open."""
        chosen = is_open & (canvas.uniforms(noise.stream("position"), canvas.nfe, _slots(is_open)) < share)
        logits = canvas.logits_where(policy, chosen)  # (n, V)
        tokens, _ = self._candidates(logits, self._uniforms(canvas, chosen, noise))
        canvas.write_where(chosen, tokens, *self._record(logits, tokens))
        return is_open & ~chosen

    def _uniforms(
        self,
        canvas: Canvas,
        where: Tensor,  # (B, L) bool, N of them
        noise: NoiseLike,
    ) -> Tensor | None:  # (N,)
        """For the draws of tokens there; None at temperature 0."""
        if self.temperature == 0:
            return None
        return canvas.uniforms(noise.stream("token"), canvas.nfe, _slots(where))[where]

    def _candidates(
        self,
        logits: Tensor,  # (N, V)
        uniforms: Tensor | None,  # (N,); None at temperature 0
    ) -> tuple[Tensor, Tensor]:  # (N,) int64, (N,)
        """A token for each row of logits and the confidence in it (zero for "origin")."""
        rows = max(1, _SLICE_NUMBERS // logits.shape[-1])
        tokens, confidence = torch.empty_like(logits[:, 0], dtype=torch.int64), torch.zeros_like(logits[:, 0])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            kept = self._law(logits[part])
            drawn = draw_tokens(kept, float(self.temperature > 0), None if uniforms is None else uniforms[part])
            tokens[part] = drawn
            if self.alg != "origin":
                confidence[part] = _confidence(kept.softmax(-1), drawn, self.alg)
        return tokens, confidence

    def _law(self, logits: Tensor) -> Tensor:
        """(n, V) -> (n, V): logits of what tokens are drawn from, tempered and cut; at temperature 0 cut alone."""
        tempered = logits / self.temperature if self.temperature > 0 else logits
        return cut(tempered, self.top_p, self.top_k)

    def _record(
        self,
        logits: Tensor,  # (n, V)
        tokens: Tensor,  # (n,) int64
    ) -> tuple[Tensor, Tensor]:  # (n,) float64, nats, each
        """Untempered log-probabilities, and those in the law that the tokens were drawn from; 0 at temperature 0."""
        logps = token_logps(logits, tokens, torch.float64)
        drawn = torch.zeros_like(logps)
        rows = max(1, _SLICE_NUMBERS // logits.shape[-1])
        for start in range(0, len(logits) if self.temperature > 0 else 0, rows):
            part = slice(start, start + rows)
            drawn[part] = token_logps(self._law(logits[part]), tokens[part], torch.float64)
        return logps, drawn


def _slots(like: Tensor) -> Tensor:
    """(1, L)"""
    return torch.arange(like.shape[1], device=like.device)[None]


def cut(
    logits: Tensor,  # (n, V)
    top_p: float | None,
    top_k: int | None,
) -> Tensor:  # (n, V)
    """-inf for tokens beyond the fewest that hold the share `top_p`, and then for those beyond the `top_k` largest."""
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        is_beyond = ranked.softmax(-1).cumsum(-1) > top_p
        is_beyond[:, 1:] = is_beyond[:, :-1].clone()  # the token that reaches the share is kept
        is_beyond[:, 0] = False
        logits = logits.masked_fill(torch.empty_like(is_beyond).scatter_(-1, order, is_beyond), -math.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    return logits


def _confidence(
    probabilities: Tensor,  # (n, V)
    tokens: Tensor,  # (n,) int64
    alg: str,
) -> Tensor:  # (n,)
    if alg == "maskgit_plus":
        return probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    if alg == "topk_margin":
        largest = probabilities.topk(2).values
        return largest[:, 0] - largest[:, 1]
    return (probabilities * (probabilities + 1e-10).log()).sum(-1)  # the constant is the published one
