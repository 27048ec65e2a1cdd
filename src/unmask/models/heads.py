"""What every model family has in common: a root forward that turns hidden states into numbers about tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from unmask.models import outputs
from unmask.models.outputs import OUTPUTS, summarise_hidden, summarise_logits


class MaskedLMHead:
    """Mixin for a `*ForMaskedLM` class that has `model` (the backbone) and `lm_head`.

    Everything computed from hidden states is computed here, inside the root forward: wrappers that gather parameters
    around it (FSDP2, ZeRO-3, DDP) then see every use of them.
    """

    model: Any
    lm_head: Any
    config: Any

    def forward(
        self,
        input_ids: Tensor,  # (b, T) int64
        attention_mask: Tensor | None = None,  # (b, T), zero or False on pads
        position_ids: Tensor | None = None,  # (b, T)
        *,
        positions: Tensor | None = None,  # (b, T) bool
        targets: Tensor | None = None,  # (N,) int64
        want: Sequence[str] = ("logits",),
        labels: Tensor | None = None,  # (b, T) int64, -100 = ignored
        **kwargs: Any,
    ) -> MaskedLMOutput | dict[str, Tensor]:
        """With `positions`: the wanted numbers at those N positions as a dict. Without: the usual transformers output.

        The transformers output holds raw logits (b, T, V), mask token included, and the mean cross-entropy in nats
        over the labelled positions when `labels` is given.
        """
        if positions is None:
            hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
            logits = self.lm_head(hidden)
            loss = (
                None if labels is None else nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            )
            return MaskedLMOutput(loss=loss, logits=logits)
        hidden = self.select_hidden(input_ids, attention_mask, position_ids, positions)
        mask_token_id = self.config.mask_token_id
        if "logits" not in want and self._is_worth_chunking(hidden):
            out = summarise_hidden(hidden, self.lm_head.weight, targets, want, mask_token_id)
        else:
            out = summarise_logits(self.lm_head(hidden), targets, want, mask_token_id)
        return {name: value for name in OUTPUTS if (value := getattr(out, name)) is not None}

    def select_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, positions: Tensor
    ) -> Tensor:
        """Final hidden states (N, H) at `positions`; a family with a cheaper way or a shift overrides this."""
        out = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return out.last_hidden_state[positions]

    def _is_worth_chunking(self, hidden: Tensor) -> bool:
        """Whether the logits are large, and the head a bare matrix that may be read without calling the module.

        Adapters and wrappers that shard the head on its own change its class or hook its call.
        """
        head = self.lm_head
        is_bare = type(head) is nn.Linear and head.bias is None
        is_bare = is_bare and not head._forward_pre_hooks and not head._forward_hooks
        return is_bare and len(hidden) * head.out_features > outputs.CHUNK_NUMBERS
