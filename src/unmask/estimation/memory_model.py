"""How much memory a model's passes take, found by making them on the meta device: every tensor counted, none filled.

The real modules, the real head and the real optimiser run on tensors that have a shape and a type but no storage, so
the numbers follow the code. docs/estimate.md has them as formulas. What is not seen: scratch space inside kernels other
than logsumexp's, and what an allocator keeps for itself.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmask.models.chunked_head import chunked_head
from unmask.models.heads import MaskedLMHead
from unmask.models.outputs import summarise_logits
from unmask.samplers.draw import draw_tokens, recorded_logps, token_probabilities
from unmask.types import TokenOutput

META = torch.device("meta")

_SDPA = torch.nn.functional.scaled_dot_product_attention
_HAS_SCRATCH = (torch.ops.aten.logsumexp.default,)  # allocates a copy of its input on every device


@dataclass(frozen=True)
class Canvases:
    """What one forward is given: `wanted` positions of each of `rows` canvases of `tokens` tokens."""

    rows: int
    tokens: int
    wanted: int
    is_padded: bool = False


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that come into being while it is entered, by part; `peak` is where their sum is largest.

    Storages that are there before, such as weights, are named in `known` and do not count. A tensor whose last
    dimension is `vocab` is logits.
    """

    def __init__(self, known: Sequence[Tensor], vocab: int):
        super().__init__()
        self.vocab = vocab
        self.part = "activations"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.parts: dict[int, str] = {}  # storage: part
        self.known = {t.untyped_storage()._cdata for t in known}
        self.references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device == META:
                self.enter(value)
        if func in _HAS_SCRATCH:
            scratch: Tensor = args[0]
            self.note_peak(extra=scratch.numel() * scratch.element_size())
        return out

    def enter(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self.parts or key in self.known:
            return
        part = "logits" if value.shape[-1:] == (self.vocab,) and self.part == "activations" else self.part
        num_bytes = storage.nbytes()
        self.parts[key] = part
        self.references[key] = weakref.ref(storage, partial(self.leave, key, num_bytes))
        self.live[part] += num_bytes
        self.note_peak()

    def leave(self, key: int, num_bytes: int, _: Any) -> None:
        self.live[self.parts.pop(key)] -= num_bytes
        del self.references[key]

    def move(self, value: Tensor, part: str) -> None:
        """Book a tensor under another part from now on."""
        key = value.untyped_storage()._cdata
        if key in self.parts:
            num_bytes = value.untyped_storage().nbytes()
            self.live[self.parts[key]] -= num_bytes
            self.live[part] += num_bytes
            self.parts[key] = part

    def note_peak(self, extra: int = 0) -> None:
        if self.live.total() + extra > self.peak.total():
            self.peak = self.live.copy()
            if extra:
                self.peak["logits"] += extra

    @contextmanager
    def booking(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


class _FusedAttention(torch.autograd.Function):
    """Shapes of a fused attention kernel: it keeps queries, keys, values, its output and one float32 for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        b, heads, tokens, _ = query.shape
        out = query.new_empty(b, tokens, heads, value.shape[-1]).transpose(1, 2)
        log_total = query.new_empty(b, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, log_total)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Stage(TorchFunctionMode):
    """Lets code that reads values run on the meta device: a test of a tensor is False, `positions` picks a number."""

    def __init__(self, positions: Tensor, wanted: int):
        super().__init__()
        self.positions = positions
        num_picked = len(positions) * wanted
        self.picked = tuple(torch.empty(num_picked, dtype=torch.int64, device=META) for _ in ("row", "column"))  # (N,)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SDPA:
            return _fused_attention(*args, **(kwargs or {}))
        if func is Tensor.__bool__ and args[0].device == META:
            return False  # a padding mask is not all true, otherwise it would not have been given
        if func is Tensor.__getitem__ and args[1] is self.positions:
            return args[0][self.picked]
        if func is Tensor.nonzero and args[0] is self.positions:
            return torch.empty(len(self.picked[0]), 2, dtype=torch.int64, device=META)
        return func(*args, **(kwargs or {}))


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # kernels add it
    return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-any-return]


class Adapted(nn.Module):
    """A linear with a low-rank adapter beside it, computed as PEFT does: in float32, whatever the base's type."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device, dtype=torch.float32)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return (out + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0).to(out.dtype)


def adapt(module: nn.Module, rank: int, is_target: Callable[[str], bool]) -> list[str]:
    """Freeze the model and put adapters on its targeted linears; returns their names."""
    module.requires_grad_(False)
    targets = [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and is_target(name)]
    for name in targets:
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, Adapted(module.get_submodule(name), rank))  # type: ignore[arg-type]
    return targets


class Rehearsal:
    """A model on the meta device, and what its passes would take: bytes by part, the weights not among them."""

    def __init__(self, module: nn.Module, *, is_gpu: bool, value_head: nn.Module | None = None):
        """`value_head` is what a value model has on pooled hidden states; its layers are of the module's shape."""
        self.module, self.is_gpu, self.value_head = module, is_gpu, value_head
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.vocab = int(module.config.vocab_size)  # type: ignore[union-attr, arg-type]
        if isinstance(module, MaskedLMHead):
            # its own asks whether autocast is on, which cannot be asked of the meta device
            module._summary = partial(_summary, module)  # type: ignore[method-assign]

    def checkpoint_layers(self) -> None:
        """Keep the inputs of layers only, from now on, and recompute the rest in the backward pass."""
        # PyTorch leaves the stage for the backward pass, so the recomputation has to enter it again
        settings = {
            "use_reentrant": False,
            "preserve_rng_state": False,  # there are no generators of the meta device
            "context_fn": lambda: (nullcontext(), self.stage),
        }
        # transformers renamed it during version 5
        enable = getattr(self.module, "activation_checkpointing_enable", None)
        (enable or self.module.gradient_checkpointing_enable)(settings)  # type: ignore[operator]
        self.module.train()  # transformers checkpoints in training mode only

    def sample(self, canvases: Canvases, temperature: float, *, is_mixture: bool = False) -> Counter[str]:
        """One forward of a sampler, or two from a mixture, and the draw from its logits."""
        with torch.no_grad(), self._running(canvases) as (ledger, call):
            logits = call(want=("logits",))["logits"]
            other = call(want=("logits",))["logits"] if is_mixture else None
            with ledger.booking("logits"):
                if other is not None:
                    logits = 0.5 * logits + 0.5 * other
                uniforms = torch.empty(len(logits), dtype=torch.float64, device=META)
                tokens = draw_tokens(logits, temperature, uniforms)
                token_probabilities(logits, tokens)
                recorded_logps(logits, tokens, temperature)
        return ledger.peak

    def score(self, canvases: Canvases, *, entropy: bool) -> Counter[str]:
        """One forward for log-probabilities without gradient."""
        with torch.no_grad(), self._running(canvases) as (ledger, call):
            call(want=("logp", "entropy") if entropy else ("logp",))
        return ledger.peak

    def update(self, canvases: Canvases, *, num_micro_batches: int) -> Counter[str]:
        """Forward and backward of a micro-batch; of the second where there are several, which finds gradients there."""
        with self._running(canvases) as (ledger, call), _gradients(ledger, self.trained, num_micro_batches > 1):
            call(want=("logp",))["logp"].sum().backward()
        return ledger.peak

    def read_values(self, canvases: Canvases) -> Counter[str]:
        """One forward for the mean hidden states at the wanted positions, without gradient."""
        with torch.no_grad(), self._running(canvases) as (ledger, call):
            call(want=("pooled",))
        return ledger.peak

    def learn_values(self, canvases: Canvases, *, num_micro_batches: int) -> Counter[str]:
        """`update` of a value model whose layers are trained."""
        assert self.value_head
        parameters = self.value_parameters
        with self._running(canvases) as (ledger, call), _gradients(ledger, parameters, num_micro_batches > 1):
            self.value_head(call(want=("pooled",))["pooled"]).sum().backward()
        return ledger.peak

    @property
    def value_parameters(self) -> list[nn.Parameter]:
        """Those of a value model's own layers and head that get gradients: no output head, which it does not use."""
        assert self.value_head
        outer = self.module.get_output_embeddings().weight  # type: ignore[operator]
        is_unused = outer is not self.module.get_input_embeddings().weight  # type: ignore[operator]
        trunk = [p for p in self.trained if not (is_unused and p is outer)]
        return [*trunk, *self.value_head.parameters()]

    def step(self, parameters: Sequence[nn.Parameter] | None = None) -> tuple[int, Counter[str]]:
        """(bytes that the optimiser keeps, peak while it steps without them), of all that is trained by default."""
        parameters = self.trained if parameters is None else parameters
        optimizer = torch.optim.AdamW(parameters, foreach=self.is_gpu)
        kept = 0
        for _ in range(2):  # the first step makes the state
            ledger = Ledger([*self._fixed(), *_tensors(optimizer)], vocab=-1)
            with ledger:
                _fill_gradients(ledger, parameters)
            with ledger.booking("buffers"), ledger:
                optimizer.step()
            kept = sum(t.numel() * t.element_size() for t in _tensors(optimizer))
            optimizer.zero_grad(set_to_none=True)
        return kept, ledger.peak

    def _fixed(self) -> list[Tensor]:
        """What is there before a pass."""
        head = list(self.value_head.parameters()) if self.value_head else []
        return [*self.module.parameters(), *self.module.buffers(), *head]

    @contextmanager
    def _running(self, canvases: Canvases) -> Iterator[tuple[Ledger, Callable[..., dict[str, Tensor]]]]:
        """A ledger, and the root forward on these canvases."""
        shape = (canvases.rows, canvases.tokens)
        ids = torch.empty(shape, dtype=torch.int64, device=META)
        positions = torch.empty(shape, dtype=torch.bool, device=META)
        mask = torch.empty(shape, dtype=torch.bool, device=META) if canvases.is_padded else None
        targets = torch.empty(canvases.rows * canvases.wanted, dtype=torch.int64, device=META)
        ledger = Ledger(self._fixed(), self.vocab)
        with ExitStack() as stack:
            self.stage = stack.enter_context(_Stage(positions, canvases.wanted))
            stack.enter_context(ledger)
            yield ledger, partial(self.module, ids, mask, positions=positions, targets=targets)


def _summary(module: MaskedLMHead, hidden: Tensor, targets: Tensor | None, want: Sequence[str]) -> TokenOutput:
    """As `MaskedLMHead._summary`; the fused kernels that a recipe may choose are taken to need what our chunks do."""
    is_plain = "logits" in want or module.cross_entropy == "plain" or not module._is_worth_chunking(hidden)
    if is_plain:
        return summarise_logits(module.lm_head(hidden), targets, want, module.config.mask_token_id)
    assert targets is not None
    logp, entropy = chunked_head(hidden, module.lm_head.weight, targets, module.config.mask_token_id, "entropy" in want)
    return TokenOutput(None, logp, entropy)


@contextmanager
def _gradients(ledger: Ledger, parameters: Sequence[nn.Parameter], are_there: bool) -> Iterator[None]:
    """Books what a backward leaves on parameters as gradients, and takes it away at the end."""
    if are_there:
        _fill_gradients(ledger, parameters)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients")) for p in parameters]
    yield
    for hook in hooks:
        hook.remove()
    for p in parameters:
        p.grad = None


def _fill_gradients(ledger: Ledger, parameters: Sequence[nn.Parameter]) -> None:
    with ledger.booking("gradients"):
        for p in parameters:
            p.grad = torch.empty_like(p)


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
