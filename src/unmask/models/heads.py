"""What every model family has in common: a root forward that turns hidden states into numbers about tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from unmask.errors import ModelError
from unmask.models import chunked_head
from unmask.models.divergence import kl_to_reference
from unmask.models.outputs import OUTPUTS, STATES, pool, summarise_hidden, summarise_logits
from unmask.models.window_cache import WindowCache
from unmask.types import ReferenceStates, TokenOutput


class MaskedLMHead:
    """Mixin for a `*ForMaskedLM` class that has `model` (the backbone) and `lm_head`.

    Everything computed from hidden states is computed here, inside the root forward: wrappers that gather parameters
    around it (FSDP2, ZeRO-3, DDP) then see every use of them.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}  # where they are
    model: Any
    lm_head: Any
    config: Any
    scalar_heads: Any
    """ModuleDict of one Linear(H, 1) for each adapter that has a scalar head; not there before the first."""
    lookback: ClassVar[int] = 0
    """Positions before a token whose hidden states its number is read from; a family with a shift overrides this."""
    cross_entropy: str = "chunked"
    """What computes log-probabilities when the logits are large: a name of `cross_entropy.CROSS_ENTROPIES`."""

    def forward(
        self,
        input_ids: Tensor,  # (b, T) int64
        attention_mask: Tensor | None = None,  # (b, T), zero or False on pads; or (b, T, T), who (row) sees whom
        position_ids: Tensor | None = None,  # (b, T)
        *,
        positions: Tensor | None = None,  # (b, T) bool
        targets: Tensor | None = None,  # (N,) int64
        want: Sequence[str] = ("logits",),
        labels: Tensor | None = None,  # (b, T) int64, -100 = ignored
        past_key_values: Any = None,
        scalar_head: str | None = None,
        reference: ReferenceStates | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | dict[str, Tensor]:
        """With `positions`: the wanted numbers at those N positions as a dict. Without: the usual transformers output.

        "scalar" is (b,): the scalar head of that name on the mean of a row's wanted hidden states, in float32 or wider;
        "pooled" is that mean, and "hidden" the states themselves, without gradient. "kl" is to `reference`.
        The transformers output holds raw logits (b, T, V), mask token included, and the mean cross-entropy in nats
        over the labelled positions when `labels` is given.
        """
        if attention_mask is not None and attention_mask.dim() == 3:
            if position_ids is None:
                raise ValueError("a mask of who sees whom does not tell pads from others; pass position_ids with it")
            attention_mask = self._additive(attention_mask)
        is_window = isinstance(past_key_values, WindowCache)
        if position_ids is None and attention_mask is not None and (past_key_values is None or is_window):
            # pads take no position, so a row's numbers do not depend on the amount of padding
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            if is_window:  # of which the mask covers the whole canvas
                start = past_key_values.get_seq_length()
                position_ids = position_ids[:, start : start + input_ids.shape[1]]
        if positions is None:
            every = torch.ones_like(input_ids, dtype=torch.bool)
            hidden = self.select_hidden(input_ids, attention_mask, position_ids, every, past_key_values)
            logits = self.lm_head(hidden).unflatten(0, input_ids.shape)
            loss = (
                None if labels is None else nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            )
            return MaskedLMOutput(loss=loss, logits=logits)
        hidden = self.select_hidden(input_ids, attention_mask, position_ids, positions, past_key_values)
        numbers: dict[str, Tensor] = {}
        if "scalar" in want:
            numbers["scalar"] = self._scalar(hidden, positions, scalar_head)
        if "pooled" in want:
            numbers["pooled"] = pool(hidden, positions)
        if "hidden" in want:
            numbers["hidden"] = hidden.detach()
        if "kl" in want:
            numbers["kl"] = self._kl(hidden, reference)
        if wanted := [name for name in want if name not in STATES]:
            out = self._summary(hidden, targets, wanted)
            numbers |= {name: value for name in OUTPUTS if (value := getattr(out, name)) is not None}
        return numbers

    def select_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        positions: Tensor,  # (b, T) bool
        past_key_values: Any = None,
    ) -> Tensor:
        """Final hidden states (N, H) at `positions`; a family with a cheaper way overrides this."""
        out = self.model(
            input_ids,
            attention_mask=self.attention(input_ids, attention_mask, position_ids, past_key_values),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
        return self.align(out.last_hidden_state)[positions]

    def attention(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Any
    ) -> Any:
        """What the backbone is told of who sees whom; a family that is not fully bidirectional overrides this."""
        return attention_mask

    def _additive(self, seen: Tensor) -> Tensor:
        """(b, 1, T, T) numbers that are added to the attention's: every implementation with such masks takes these.

        Raises: ModelError for one that has no such masks.
        """
        name = self.config._attn_implementation
        if name not in ("sdpa", "eager"):
            raise ModelError(
                f"attention {name!r} cannot leave single positions out, which this sampler needs. Load the model with "
                "attention 'sdpa', or choose another sampler."
            )
        dtype = self.model.embed_tokens.weight.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[
            :, None
        ]

    def align(self, hidden: Tensor) -> Tensor:
        """Hidden states (b, T, H) so that number i is about token i; a family with a shift overrides this."""
        return hidden

    def _summary(self, hidden: Tensor, targets: Tensor | None, want: Sequence[str]) -> TokenOutput:
        if "logits" not in want and self._is_worth_chunking(hidden):
            mask_token_id = self.config.mask_token_id
            return summarise_hidden(hidden, self.lm_head.weight, targets, want, mask_token_id, self.cross_entropy)
        return summarise_logits(self.lm_head(hidden), targets, want, self.config.mask_token_id)

    def head_matrix(self) -> Tensor:
        """(V, H). Raises: ModelError where the head is more than a whole matrix."""
        if not self._is_bare():
            raise ModelError(
                f"{type(self).__name__}: its output head is no bare matrix here (it has an adapter, or is put in "
                "slices by itself), so no KL over the vocabulary can be computed. Set algorithm.kl_coef = 0, or train "
                "without a target on lm_head, with recipes/accelerate/fsdp2.yaml or ddp.yaml."
            )
        weight: Tensor = self.lm_head.weight
        return weight

    def _kl(self, hidden: Tensor, reference: ReferenceStates | None) -> Tensor:
        if reference is None:
            raise ValueError("token output 'kl' needs the reference's states at the wanted positions")
        return kl_to_reference(hidden, self.head_matrix(), reference, self.config.mask_token_id)

    def _scalar(self, hidden: Tensor, positions: Tensor, name: str | None) -> Tensor:
        if name not in getattr(self, "scalar_heads", ()):
            raise ValueError(f"no scalar head {name!r} on this model; add one with the adapter that trains it")
        scalar: Tensor = self.scalar_heads[name](pool(hidden, positions)).squeeze(-1)
        return scalar

    def _is_worth_chunking(self, hidden: Tensor) -> bool:
        return self._is_bare() and len(hidden) * self.lm_head.out_features > chunked_head.CHUNK_NUMBERS

    def _is_bare(self) -> bool:
        """Whether the head is a matrix and nothing else, which may be read without calling the module.

        Adapters and wrappers that shard the head on its own change its class or hook its call.
        """
        head = self.lm_head
        is_bare = type(head) is nn.Linear and head.bias is None
        return is_bare and not head._forward_pre_hooks and not head._forward_hooks
