"""Small transformers for tests of samplers, bidirectional and block-causal: real attention, padding, cache; float64."""

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
        self.block_size: int | None = None
        self.lookback: int | None = 0

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(
        self,
        canvas: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (b, T, V)."""
        seen = torch.ones_like(canvas, dtype=torch.bool) if attention_mask is None else attention_mask
        cache = cache if cache is not None else self.new_cache()
        place = position_ids
        if place is None:
            place = (seen.cumsum(-1) - 1 + len(cache)).clamp_min(0)
        x = self.tokens[canvas] + self.places[place]
        hidden = ~seen if seen.dim() == 3 else ~seen[:, None]  # (b, 1 or T, keys), what a query must not see
        if self.block_size is not None:
            block = place // self.block_size
            hidden = hidden | (block[:, :, None] < block[:, None, :])
        hidden = nn.functional.pad(hidden, (len(cache), 0))
        for layer, (qkv, (across, up)) in enumerate(zip(self.qkv, self.mix, strict=True)):
            q, k, v = (nn.functional.layer_norm(x, x.shape[-1:]) @ qkv).chunk(3, dim=-1)
            k, v = cache.add(layer, k, v)
            scores = (q @ k.transpose(-1, -2) / x.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
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
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> TokenOutput:
        options = {} if position_ids is None else {"position_ids": position_ids}
        logits = self(canvas, attention_mask, cache, **options)[positions]
        return summarise_logits(logits, targets, want, self.mask_token_id)

    def new_cache(self) -> Cache:
        return Cache(len(self.qkv))

    def forget(self, cache: Cache, num_tokens: int) -> None:
        cache.layers = [(k[:, :-num_tokens], v[:, :-num_tokens]) for k, v in cache.layers]


class Cache:
    """Keys and values (b, positions, width) of each layer."""

    def __init__(self, num_layers: int):
        self.layers = [(torch.empty(1, 0, 0), torch.empty(1, 0, 0)) for _ in range(num_layers)]

    def __len__(self) -> int:
        return self.layers[-1][0].shape[1]

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        old_k, old_v = self.layers[layer]
        if old_k.shape[1]:
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        self.layers[layer] = k, v
        return k, v


class BlockToyTransformer(ToyTransformer):
    """The same network reading block by block: a position sees its own block and those before, blocks counted from the
    first token that is not a pad. A window behind cached positions must lie in one block and have no pads."""

    def __init__(self, block_size: int = 4, **settings: int):
        super().__init__(**settings)
        self.block_size = block_size

    def forward(self, canvas: Tensor, attention_mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        if cache is not None:
            assert attention_mask is None and len(cache) % self.block_size == 0
            assert not len(cache) or canvas.shape[1] <= self.block_size
        return super().forward(canvas, attention_mask, cache)


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
