"""Any bidirectional masked language model of transformers (ModernBERT, BERT, RoBERTa, ...) behind our root forward.

The class is transformers' own, with two changes: its output embedding sees the wanted positions only, so that logits
(b, T, V) never exist, and pads take no position. Classes differ too much to be trusted by name, so every loaded model
is put to a probe of a few tokens, and refused where it fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from unmask.errors import ModelError
from unmask.models.files import one_line
from unmask.models.outputs import OUTPUTS, STATES, pool, summarise_logits

# largest difference that rounding may make, in units of the root mean square logit; a wrong position makes about 1
_ROUNDING = {torch.bfloat16: 2.5e-1, torch.float16: 3e-2}
_ROUNDING_WIDE = 1e-3

_ADVICE = "Use a bidirectional masked language model, such as modernbert."


class SelectedPositions:
    """Mixin in front of a `*ForMaskedLM` class of transformers; see `MaskedLMHead.forward` for the arguments."""

    config: Any
    get_output_embeddings: Any
    first_position: int | None = None
    """Position of a row's first real token; None where the class finds positions by itself, or has none."""
    num_positions: int
    """Tokens that fit, fewer than max_position_embeddings where the table has rows for padding."""

    def forward(
        self,
        input_ids: Tensor,  # (b, T) int64
        attention_mask: Tensor | None = None,  # (b, T), zero or False on pads
        *,
        positions: Tensor | None = None,  # (b, T) bool
        targets: Tensor | None = None,  # (N,) int64
        want: Sequence[str] = ("logits",),
        **kwargs: Any,
    ) -> MaskedLMOutput | dict[str, Tensor]:
        plain: Any = super().forward  # type: ignore[misc]
        if attention_mask is not None:
            attention_mask = attention_mask.long()
            if self.first_position is not None:
                places = (attention_mask.cumsum(-1) - 1).clamp(min=0) + self.first_position
                kwargs.setdefault("position_ids", places)
        # by keyword: some classes have other arguments in between
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if positions is None:
            return plain(**kwargs)

        states: list[Tensor] = []  # (N, H), what the output embedding sees

        def select(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            states.append(inputs[0].reshape(*input_ids.shape, -1)[positions])
            return (states[0],)

        handle = self.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits = plain(**kwargs).logits  # (N, V)
        finally:
            handle.remove()
        if logits.dim() == 3:  # a class whose head reads the embedding matrix without calling the module
            logits = logits[positions]
        numbers = self._states(states, positions, want)
        others = [name for name in want if name not in STATES]
        out = summarise_logits(logits, targets, others, self.config.mask_token_id)
        return numbers | {name: value for name in OUTPUTS if (value := getattr(out, name)) is not None}

    def _states(self, states: Sequence[Tensor], positions: Tensor, want: Sequence[str]) -> dict[str, Tensor]:
        """ "hidden" and "pooled" where wanted. Raises: ModelError for what this class does not have."""
        wanted = [name for name in STATES if name in want]
        possible = ("hidden", "pooled") if states else ()
        if missing := [name for name in wanted if name not in possible]:
            raise ModelError(
                f"{type(self).__name__}: has no {missing[0]!r} output, because its head is not a bare matrix on hidden "
                "states. Use an algorithm without it (algorithm.kl_coef = 0), or LLaDA, Dream or the embedded model."
            )
        makers = {"hidden": lambda: states[0].detach(), "pooled": lambda: pool(states[0], positions)}
        return {name: makers[name]() for name in wanted}


def is_masked_lm(model_type: str) -> bool:
    """Whether transformers ships a masked language model of this type."""
    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


@cache
def masked_lm_classes(model_type: str) -> tuple[Any, Any]:
    """transformers' configuration and model class of this type, the latter with selected positions."""
    config_class = CONFIG_MAPPING[model_type]
    base: Any = AutoModelForMaskedLM._model_mapping[config_class]
    return config_class, type(base.__name__, (SelectedPositions, base), {"__module__": base.__module__})


def check_class(model_type: str, config: Mapping[str, Any], file: Path) -> None:
    """Raises: ModelError for a class, or a configuration of it, that cannot work; known before anything is built."""
    config_class, model_class = masked_lm_classes(model_type)
    base = model_class.__mro__[2]
    arguments = inspect.signature(base.forward).parameters
    if "decoder_input_ids" in arguments:
        flaw = "an encoder and a decoder, which is no bidirectional masked language model"
    elif config.get("is_decoder"):
        flaw = "is_decoder = true, which is no bidirectional masked language model"
    elif not hasattr(config_class(), "vocab_size"):
        flaw = "several models in one, whose vocabulary is not the configuration's own"
    elif model_type == "reformer":
        flaw = "its hashed attention draws random numbers, so no likelihood can be repeated"
    elif "attention_mask" not in arguments:
        flaw = f"{base.__name__} takes no attention mask, so rows of unequal length cannot be batched"
    else:
        return
    raise ModelError(f"{file}: model_type = {model_type!r}: {flaw}. {_ADVICE}")


def prepare(model: Any, directory: Path) -> None:
    """Give a loaded model its positions, take its dropout away, and put it to the probe; in place.

    Raises: ModelError if its numbers are not those of the plain class, depend on padding, do not depend on what comes
        after them, or are not finite when every token is masked.
    """
    _remove_dropout(model)
    model.eval()
    try:
        model.first_position, model.num_positions = _places(model)
        flaw = _flaw(model)
    except Exception as error:
        flaw = f"a probe of 8 tokens fails ({one_line(error)})"
    if flaw:
        raise ModelError(f"{directory}: model_type = {model.config.model_type!r}: {flaw}. {_ADVICE}")


def _remove_dropout(model: nn.Module) -> None:
    """Gradient checkpointing puts layers in training mode; what they drop on their own account must be nothing.

    The configuration keeps its rates: a saved copy is the author's model, dropout included.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)


def _plain(model: Any) -> Any:
    """transformers' own forward."""
    return super(SelectedPositions, model).forward  # type: ignore[misc]


def _places(model: Any) -> tuple[int | None, int]:
    """`first_position` and `num_positions` from the table of absolute positions, if there is one."""
    first = 0 if "position_ids" in inspect.signature(_plain(model)).parameters else None
    limit: int = model.config.max_position_embeddings
    for module in model.modules():
        weight = getattr(getattr(module, "position_embeddings", None), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        padding = module.position_embeddings.padding_idx
        if padding is not None:  # RoBERTa and its kin count the tokens that are not pads, from padding_idx + 1
            return None, min(limit, len(weight) - padding - 1)
        own = getattr(module, "position_ids", None)  # some begin at 2
        start = int(own.flatten()[0]) if isinstance(own, Tensor) else 0
        return (None if first is None else start), min(limit, len(weight) - start)
    return first, limit


@torch.no_grad()
def _flaw(model: Any) -> str | None:
    """What is wrong with the numbers of a model in evaluation mode, None if nothing is."""
    size, mask, pad = model.config.vocab_size, model.config.mask_token_id, model.config.pad_token_id
    words = [i for i in range(size) if i not in (mask, pad)]
    a, b, c, d, e = ((words * 5)[len(words) // 2 :])[:5]
    row, later = [a, mask, b, mask, c, d], [a, mask, c, mask, d, e]
    keep = torch.arange(size, device=model.device) != mask

    def logits(rows: list[list[int]], real: list[list[int]] | None = None, first: bool = False) -> Tensor:
        ids = torch.tensor(rows, device=model.device)
        wanted = (ids == mask) & (torch.arange(ids.shape[1], device=model.device) < (2 if first else len(rows[0])))
        attention_mask = None if real is None else torch.tensor(real, device=model.device)
        return model(ids, attention_mask, positions=wanted)["logits"][:, keep]

    ids = torch.tensor([row], device=model.device)
    expected = _plain(model)(input_ids=ids).logits[ids == mask][:, keep].float()
    allowed = float(expected.square().mean().sqrt()) * _ROUNDING.get(model.dtype, _ROUNDING_WIDE)
    if not float((logits([row]) - expected).abs().max()) <= allowed:
        return "logits at selected positions are not those of the class itself"
    if torch.equal(logits([row], first=True), logits([later], first=True)):  # same shapes: equal to the bit if causal
        return "later tokens do not change the logits before them"
    pads, ones = [pad] * 2, [1] * 6
    padded = logits([pads + row, row + pads], [[0, 0, *ones], [*ones, 0, 0]])
    error = float((padded - expected.repeat(2, 1)).abs().max())
    if not error <= allowed:
        return f"padding changes the logits of real tokens by {error:.2g} (rounding: {allowed:.2g})"
    if not bool(logits([[mask] * 8]).isfinite().all()):
        return "logits are not finite when every token is masked"
    return None
