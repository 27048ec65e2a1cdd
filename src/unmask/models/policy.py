"""A loaded model with its tokenizer: what samplers and scoring call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from unmask.errors import DataError, ModelError
from unmask.models import adapter_files
from unmask.models.adapters import POLICY, LoraConfig, Switch, add
from unmask.models.window_cache import WindowCache
from unmask.types import ReferenceStates, TokenOutput


class MaskedPolicy:
    """A `MaskedLMHead` module behind the `Policy` protocol, with text in and text out.

    `module` may be a wrapper (DDP, FSDP2) of the model; every number comes from its root forward. The module stays in
    evaluation mode, gradients or not: dropout would make the ratio at theta = old differ from 1.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, name: str = "model", stop_tokens: Sequence[str] = ()):
        """`stop_tokens`: texts of tokens that end a completion, beside the configuration's eos_token_id."""
        self.module, self.tokenizer, self.name = module.eval(), tokenizer, name
        self.switch = Switch(module) if hasattr(module, "peft_config") else None
        config: Any = module.config
        self.mask_token_id: int = config.mask_token_id
        self.pad_token_id: int = config.pad_token_id
        eos = config.eos_token_id
        stops = list(eos) if isinstance(eos, list | tuple) else [eos]
        vocabulary = tokenizer.get_vocab() if stop_tokens else {}
        stops += [vocabulary[text] for text in stop_tokens if text in vocabulary]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        self.max_length: int = getattr(module, "num_positions", config.max_position_embeddings)
        self.block_size: int | None = getattr(config, "block_size", None)
        self.lookback: int | None = getattr(module, "lookback", None)
        self.vocab_size: int = config.vocab_size
        self._checkpointed: list[nn.Module] = []

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters; "default" is the policy's. Empty without adapters."""
        return self.switch.names if self.switch else ()

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        """The named adapter, or none, is active in the block; see `Switch.use`. Raises: ModelError."""
        if self.switch:
            return self.switch.use(adapter)
        if adapter is None:
            return nullcontext()
        raise ModelError(f"{self.name}: no adapter {adapter!r}; the model has none. Give model.lora, or load one.")

    def with_adapter(self, adapter: str | None) -> AdapterView:
        """This policy with another adapter active, or none, for scoring without gradient: a reference."""
        return AdapterView(self, adapter)

    def with_module(self, module: nn.Module, name: str) -> MaskedPolicy:
        """Another module with this policy's tokenizer and stop tokens."""
        policy = MaskedPolicy(module, self.tokenizer, name)
        policy.stop_token_ids = self.stop_token_ids
        if self._checkpointed:
            policy.enable_gradient_checkpointing()
        return policy

    def add_adapter(
        self, name: str, config: LoraConfig, *, seed: int, is_trained: bool = True, has_scalar_head: bool = False
    ) -> None:
        """Another adapter on the same base, such as one with a scalar head for an energy. Raises: ModelError."""
        if self.switch is None:
            raise ModelError(f"{self.name}: adapters go beside the policy's own. Give model.lora first.")
        add(self.switch, name, config, seed=seed, is_trained=is_trained, has_scalar_head=has_scalar_head)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter that is trained, without gradient. Raises: ModelError for slices."""
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if isinstance(parameter, DTensor) or not parameter.numel():
                raise ModelError(
                    f"{self.name}: its weights are in slices, and an engine wants them whole. Launch with "
                    "recipes/accelerate/ddp.yaml."
                )
            yield name.removeprefix("module."), parameter.detach()

    def weights_version(self) -> tuple[float, ...]:
        """Another one whenever trained parameters have been written: their sums, as some optimisers leave no trace."""
        trained = [parameter.detach() for parameter in self.module.parameters() if parameter.requires_grad]
        sums = [parameter.sum(dtype=torch.float64) for parameter in trained]
        return (float(sum(parameter._version for parameter in trained)), *torch.stack(sums).tolist())

    def enable_gradient_checkpointing(self) -> None:
        """Layers keep their input alone for the backward pass and compute the rest again. Raises: ModelError."""
        self._checkpointed = [x for x in self.module.modules() if isinstance(x, GradientCheckpointingLayer)]
        if not self._checkpointed:
            raise ModelError(
                f"{self.name}: this model does not support gradient checkpointing. Set model.gradient_checkpointing = "
                "false."
            )
        for layer in self._checkpointed:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            # no random numbers to replay: nothing here draws any
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]

    def new_cache(self) -> DynamicCache:
        """An empty cache of keys and values, exact for block-causal models only. Raises: ModelError for others."""
        if self.block_size is None:
            raise ModelError(f"{self.name}: sees in both directions, so cached keys and values would not be exact.")
        return DynamicCache()

    def new_window_cache(self, keeps_suffix: bool) -> WindowCache:
        """An empty cache to read windows of a canvas with, an approximation. Raises: ModelError for other families."""
        if self.block_size is not None or self.lookback is None:
            raise ModelError(
                f"{self.name}: this family cannot read a window of its text alone. Set sampler.cache = 'none'."
            )
        return WindowCache(keeps_suffix)

    def forget(self, cache: DynamicCache, num_tokens: int) -> None:
        """Drop the last tokens of a cache."""
        cache.crop(-num_tokens)

    def token_outputs(
        self,
        canvas: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        *,
        targets: Tensor | None = None,
        want: Sequence[str] = ("logits",),
        cache: DynamicCache | WindowCache | None = None,
        reference: ReferenceStates | None = None,
        position_ids: Tensor | None = None,
    ) -> TokenOutput:
        """See `Policy.token_outputs`."""
        options: dict[str, Any] = {"targets": targets, "want": want}
        if position_ids is not None:
            options["position_ids"] = position_ids
        if reference is not None:
            options["reference"] = reference
        if cache is not None:
            options["past_key_values"] = cache
        if "scalar" in want:
            options["scalar_head"] = self.switch.active if self.switch else None
        with self._checkpointing():
            numbers = self.module(canvas, attention_mask, positions=positions, **options)
        if self.switch and torch.is_grad_enabled():
            self.switch.watch(numbers)
        return TokenOutput(**numbers)

    def head_weight(self) -> Tensor:
        """See `Policy.head_weight`; put together where it is in slices, which is collective. Raises: ModelError."""
        base: Any = self.switch.module.get_base_model() if self.switch else self.module
        base = getattr(base, "module", base)  # DDP's
        if not hasattr(base, "head_matrix"):
            raise ModelError(
                f"{self.name}: the output head of this family is no bare matrix, so no KL over the vocabulary can be "
                "computed. Set algorithm.kl_coef = 0, or train LLaDA, Dream or the embedded model."
            )
        weight: Tensor = base.head_matrix()
        if isinstance(weight, DTensor):
            return weight.detach().full_tensor()
        if weight.dim() != 2 or not weight.numel():
            raise ModelError(
                f"{self.name}: its output head is in slices, and a KL over the vocabulary needs it whole. Launch "
                "with recipes/accelerate/fsdp2.yaml or ddp.yaml, or set algorithm.kl_coef = 0."
            )
        return weight.detach()

    @contextmanager
    def learning(self, adapter: str) -> Iterator[None]:
        """`use`, with the adapter's parameters open to gradients in this block alone.

        For a model that shares the backbone and is no part of the policy: whoever collects the trained parameters of
        the policy (optimiser, clipping, DDP, checkpoints) does so outside of it. Raises: ModelError.
        """
        if self.switch is None:
            raise ModelError(f"{self.name}: no adapter {adapter!r}; the model has none. Give model.lora, or load one.")
        self.switch.trained.add(adapter)
        try:
            with self.switch.use(adapter):
                yield
        finally:
            self.switch.trained.discard(adapter)
            self.switch.activate(self.switch.active)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Layers checkpoint in training mode only; what is inside them stays in evaluation mode, without dropout."""
        is_on = torch.is_grad_enabled()
        for layer in self._checkpointed:
            layer.training = is_on
        try:
            yield
        finally:
            for layer in self._checkpointed:
                layer.training = False

    def render(self, prompt: str | list[dict[str, str]]) -> str:
        """The text the model reads: a string as it is, messages through the chat template.

        A last turn of the assistant is the beginning of the answer, which the model goes on with.
        """
        if isinstance(prompt, str):
            return prompt
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{self.name}: the prompt is a list of messages, but the tokenizer has no chat template. "
                "Use a plain-text prompt (for example task.prompt = 'raw') or a model with a template."
            )
        opening = prompt[-1]["content"] if len(prompt) > 1 and prompt[-1]["role"] == "assistant" else None
        turns = prompt if opening is None else prompt[:-1]
        text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return text + (opening or "")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises: DataError for a text that the model has no tokens for."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text is not valid Unicode (begins {text[:40]!r}). Remove its lone surrogates."
            ) from error
        row: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if self.mask_token_id in row:
            raise DataError(
                f"a text contains the mask token (begins {text[:40]!r}), which only a sampler may write. Remove it."
            )
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in row:
            raise DataError(
                f"a text has characters that are not in the model's vocabulary (begins {text[:40]!r}). "
                "Use another prompt style or a model with a larger alphabet."
            )
        return row

    def encode_prompts(self, texts: Sequence[str], gen_length: int) -> tuple[Tensor, Tensor]:
        """Token ids (b, P) int64, left-padded, and the mask (b, P) bool, False on pads.

        Raises: DataError if a prompt and its completion do not fit the model, or a prompt is empty.
        """
        rows = [self.encode(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise DataError("a prompt has no tokens. Give every example a non-empty prompt.")
            if len(row) + gen_length > self.max_length:
                raise DataError(
                    f"a prompt of {len(row)} tokens plus gen_length = {gen_length} exceeds the {self.max_length} "
                    f"positions of {self.name} (prompt begins {text[:40]!r}). Shorten the prompt or gen_length."
                )
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = True
        return ids.to(self.device), mask.to(self.device)

    def encode_completions(self, texts: Sequence[str], gen_length: int) -> Tensor:
        """Token ids (b, L) int64 with the stop token after the text and as padding, as LLaDA's training data has it.

        A text of exactly L tokens gets no stop token. Raises: DataError for a text longer than L tokens.
        """
        ids = torch.full((len(texts), gen_length), self.stop_token_ids[0], dtype=torch.int64)
        for i, text in enumerate(texts):
            row = self.encode(text)
            if len(row) > gen_length:
                raise DataError(
                    f"a completion of {len(row)} tokens exceeds gen_length = {gen_length} (begins {text[:40]!r}). "
                    "Raise gen_length or drop the row."
                )
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return ids.to(self.device)

    def completion_lengths(self, completion_ids: Tensor) -> Tensor:
        """Tokens up to and including the first stop token, (b,) int64; L if there is none."""
        stops = torch.isin(completion_ids, torch.tensor(self.stop_token_ids, device=completion_ids.device))
        first = stops.int().argmax(-1) + 1
        return torch.where(stops.any(-1), first, completion_ids.shape[-1])

    def decode(self, completion_ids: Tensor) -> list[str]:
        """The text before the first stop token of each row, without special tokens."""
        lengths = self.completion_lengths(completion_ids).tolist()
        rows = [row[:length] for row, length in zip(completion_ids.tolist(), lengths, strict=True)]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def save(self, directory: Path, module: Any = None, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the model, or its adapter alone where it has one, and the tokenizer (safetensors).

        `state` holds the whole tensors of a module whose own are slices.
        """
        if self.switch:
            base = self.switch.module.peft_config[POLICY].base_model_name_or_path or self.name
            adapter_files.save(directory, self.switch, base, state=state)
        else:
            model: Any = module or self.module
            model.save_pretrained(directory, state_dict=state)
        self.tokenizer.save_pretrained(directory)


class AdapterView(MaskedPolicy):
    """A policy with another adapter active, without gradient; it shares everything else with its parent."""

    def __init__(self, parent: MaskedPolicy, adapter: str | None):
        self.__dict__.update({key: value for key, value in vars(parent).items() if key != "module"})
        self.parent, self.adapter = parent, adapter
        self.name = "reference"

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The parent's, also after it has been wrapped."""
        return self.parent.module

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        """Raises: ModelError; a view has the one adapter that it was made for."""
        raise ModelError(f"this is a view of adapter {self.adapter!r}. Call use() on the policy it was made from.")

    def with_adapter(self, adapter: str | None) -> AdapterView:
        """See `MaskedPolicy.with_adapter`."""
        return self.parent.with_adapter(adapter)

    def save(self, directory: Path, module: Any = None, state: Mapping[str, Tensor] | None = None) -> None:
        """Raises: ModelError; what is saved is the policy that the view was made from."""
        raise ModelError(f"this is a view of adapter {self.adapter!r}. Save the policy it was made from.")

    @torch.no_grad()
    def token_outputs(self, *args: Any, **kwargs: Any) -> TokenOutput:
        """See `Policy.token_outputs`."""
        with self.parent.use(self.adapter):
            return self.parent.token_outputs(*args, **kwargs)
