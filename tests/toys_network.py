"""A small bidirectional transformer for tests of samplers: real attention, real padding, float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unmask.models.outputs import summarise_logits
from unmask.types import PromptBatch, TokenOutput


class ToyTransformer(nn.Module):
    """Two attention layers over token and position embeddings. Vocabulary 0..V-1 with the mask token last.

    Positions count from the first token that is not a pad, and pads are not attended to, so left padding changes
    nothing. The mask token's logit is raised by 20: a sampler that could draw it would.
    """

    def __init__(self, vocab: int = 12, width: int = 16, max_length: int = 64, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

        self.tokens, self.places = weight(vocab, width, scale=1.0), weight(max_length, width, scale=1.0)
        self.qkv = weight(2, width, 3 * width, scale=width**-0.5)
        self.mix = weight(2, 2, width, width, scale=width**-0.5)
        self.head = weight(width, vocab, scale=2 * width**-0.5)
        self.mask_token_id, self.pad_token_id = vocab - 1, 0
        self.stop_token_ids: tuple[int, ...] = ()
        self.max_length = max_length

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(self, canvas: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (b, T, V)."""
        seen = torch.ones_like(canvas, dtype=torch.bool) if attention_mask is None else attention_mask
        x = self.tokens[canvas] + self.places[(seen.cumsum(-1) - 1).clamp_min(0)]
        for qkv, (across, up) in zip(self.qkv, self.mix, strict=True):
            q, k, v = (nn.functional.layer_norm(x, x.shape[-1:]) @ qkv).chunk(3, dim=-1)
            scores = (q @ k.transpose(-1, -2) / x.shape[-1] ** 0.5).masked_fill(~seen[:, None], float("-inf"))
            x = x + scores.softmax(-1) @ v @ across
            x = x + torch.tanh(x @ up)
        logits = nn.functional.layer_norm(x, x.shape[-1:]) @ self.head
        raised = torch.zeros_like(logits[0, 0])
        raised[self.mask_token_id] = 20.0
        return logits + raised

    def token_outputs(
        self,
        canvas: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        *,
        targets: Tensor | None = None,
        want: Sequence[str] = ("logits",),
    ) -> TokenOutput:
        return summarise_logits(self(canvas, attention_mask)[positions], targets, want, self.mask_token_id)


def prompt_batch(
    prompts: Sequence[Sequence[int]], extra_pads: int = 0, keys: Sequence[int] | None = None
) -> PromptBatch:
    """Token lists, left-padded with 0; the n-th prompt has key n unless given, and rollout index 2."""
    longest = max(len(p) for p in prompts) + extra_pads
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.int64)
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], dtype=torch.bool)
    key = torch.tensor(list(keys) if keys is not None else list(range(len(prompts))))
    return PromptBatch(ids.view(len(prompts), longest), mask.view(len(prompts), longest), key, torch.full_like(key, 2))


def random_prompts(
    num_prompts: int, seed: int, vocab: int = 12, shortest: int = 1, longest: int = 6
) -> list[list[int]]:
    """Prompts of ordinary tokens with lengths `shortest` to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num_prompts,), generator=generator).tolist()
    return [torch.randint(0, vocab - 1, (n,), generator=generator).tolist() for n in lengths]


def chi_square_p(counts: Tensor, law: Tensor) -> float:
    """P(chi-square at least as large) of counts (n,) under the probabilities `law` (n,), all cells positive."""
    expected = law * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(law) - 1) / 2, dtype=torch.float64), statistic.double() / 2))
