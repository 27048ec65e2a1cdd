"""The nouns that travel between rooms, and the protocols that describe who handles them.

Dimensions: B rollouts, K masked copies per rollout, P prompt tokens (left-padded), L completion tokens, T = P + L,
N selected positions, V vocabulary. Log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor


class Status(StrEnum):
    """What became of one completion when it was judged."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    FORBIDDEN = "forbidden"
    ERROR = "error"


@dataclass(frozen=True)
class Example:
    """One task instance. `id` is stable within the task and keys all noise drawn for this prompt.

    Example: Example(id=17, prompt="3102200002100320|", columns={"puzzle": "3102200002100320"})
    """

    id: int
    prompt: str | list[dict[str, str]]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The verdict on one completion: the reward that training sees, a status, and named facts for evaluation.

    Example: Score(value=0.75, status=Status.WRONG, facts={"accuracy": 0.0, "cell_accuracy": 0.75})
    """

    value: float
    status: Status
    facts: Mapping[str, float] = field(default_factory=dict)


_Rows = TypeVar("_Rows", "PromptBatch", "Samples", "Rollouts", "Corruption", "Evidence", "LossInputs")


def take_rows(batch: _Rows, index: Tensor | slice) -> _Rows:
    """The given rows of every tensor (first dimension) and list of a batch; anything else is kept as it is."""
    changes: dict[str, Any] = {}
    for f in fields(batch):
        value: Any = getattr(batch, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = value[index]
        elif isinstance(value, list):
            changes[f.name] = value[index] if isinstance(index, slice) else [value[i] for i in index.tolist()]
        elif type(value) in (Corruption, Evidence):
            changes[f.name] = take_rows(value, index)
    return replace(batch, **changes)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts ready for a sampler. `prompt_key` and `rollout_index` name a row wherever it stands in a batch."""

    prompt_ids: Tensor  # (B, P) int64, left-padded
    prompt_mask: Tensor  # (B, P) bool, False on pads
    prompt_key: Tensor  # (B,) int64, Example.id
    rollout_index: Tensor  # (B,) int64, unique among the rollouts of one prompt

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]


@dataclass(frozen=True)
class Samples:
    """What a sampler returns. `reveal_step` is the step (0-based forward) in which each position was fixed."""

    completion_ids: Tensor  # (B, L) int64, the full canvas, without a mask token
    reveal_step: Tensor  # (B, L) int64
    logps: Tensor  # (B, L) float64, nats: untempered log-probability of each token in the state that revealed it
    nfe: Tensor  # (B,) int64, model forwards that this row took part in
    drawn_logps: Tensor | None = None
    """(B, L) float64, nats: as `logps`, in the law that the token was drawn from (temperature, top-p, top-k). None: the
    sampler keeps no such record."""

    def __len__(self) -> int:
        return self.completion_ids.shape[0]


@dataclass(frozen=True)
class Rollouts:
    """Completions with their rewards. Rows of one prompt share a value in `groups`.

    `length` counts tokens up to and including the stop token (L if there is none). A row of a tree is a node: its
    completion is that of a leaf below it, `window` names the steps that lead to it from its parent, and `groups` the
    parent.
    """

    prompt_ids: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool
    completion_ids: Tensor  # (B, L) int64
    prompt_key: Tensor  # (B,) int64
    rollout_index: Tensor  # (B,) int64
    groups: Tensor  # (B,) int64
    rewards: Tensor  # (B,) float64
    length: Tensor  # (B,) int64, tokens
    reveal_step: Tensor  # (B, L) int64
    sample_logps: Tensor  # (B, L) float64, nats
    nfe: Tensor  # (B,) int64
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    facts: list[Mapping[str, float]] = field(default_factory=list)
    sampled_at: Tensor | None = None  # (B,) int64, batch whose policy wrote the row; None: nobody asks
    window: Tensor | None = None  # (B, 2) int64, reveal steps [first, end) of a tree's edge; None: all steps
    process_rewards: Tensor | None = None  # (B,) float64, what a rollout strategy found out about the way there
    drawn_logps: Tensor | None = None  # (B, L) float64, nats, see `Samples`; None: nobody recorded it

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    @property
    def completion_length(self) -> int:
        """L, tokens."""
        return self.completion_ids.shape[1]


@dataclass(frozen=True)
class Corruption:
    """K masked copies per rollout, and how the log-probabilities read from them are to be weighted.

    A likelihood estimate is `(weight * logps).sum(1)` per position: shape (B, L). `kind` says what that estimates:
    "elbo" (a lower bound on log p of the completion, in expectation), "quadrature" (the same up to the error of fixed
    mask ratios), "block" (a lower bound for completions written block by block, with hidden context), or no bound:
    "mean_field" (one-step factorised), "random_mask" (the masked tokens alone), "coupled_tokens" (three reads a token),
    "order" (the probability of the tokens along the steps in which they were revealed).
    Stored, not replayed from a seed: policy, old policy and reference are scored on these same tensors.
    """

    masked: Tensor  # (B, K, T) bool, True = input shows the mask token
    scored: Tensor  # (B, K, L) bool, True = log-probability read here
    weight: Tensor  # (B, K, L) float64, zero where not scored
    kind: str

    def __len__(self) -> int:
        return self.masked.shape[0]

    @property
    def num_masks(self) -> int:
        """K."""
        return self.masked.shape[1]


@dataclass(frozen=True)
class Evidence:
    """Masked copies read once for a batch, before its first update: what weights of whole rollouts are made of."""

    corruption: Corruption
    ref_logps: Tensor  # (B, K, L) nats
    old_logps: Tensor | None = None  # (B, K, L) nats; None where not asked for


@dataclass
class Draw:
    """Masks for one inner iteration, with the log-probabilities that stay fixed during it.

    `old_logps` is None until the first update on these masks: there theta is still old, and its own pass supplies it.
    """

    corruption: Corruption
    old_corruption: Corruption | None = None
    ref_corruption: Corruption | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    uniform: Tensor | None = None  # (B,) float64 in [0, 1), a number of each row, for objectives that choose among them


@dataclass
class Batch:
    """One batch to train on: what every update on it shares. Tensors hold the rows of all processes."""

    iteration: int
    rollouts: Rollouts
    advantages: Tensor  # (B,)
    draws: list[Draw]  # one per inner iteration; the same object repeated when masks are not fresh
    metrics: dict[str, float]
    fresh: Rollouts | None = None
    """What was newly sampled, if that is not `rollouts` itself (which then come from a buffer)."""
    evidence: Evidence | None = None
    values: Tensor | None = None  # (B,) of the value model


class ValueLoss(Protocol):
    """What a value model learns from, (B,) each; differentiable in `values`."""

    def __call__(self, values: Tensor, rewards: Tensor, groups: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class ValueNeeds:
    """A learned number about each row, and how it is learned."""

    reads: str
    """"prompt": a number about the prompt; "completion": about the completion, up to and including its stop token."""
    is_trunk_trained: bool
    """The number comes from layers of its own: an adapter, or a copy of the model. False: from the hidden states of the
    frozen reference."""
    lr: float
    """Learning rate of the head."""
    trunk_lr: float = 0.0
    """Learning rate of the layers below it."""
    loss: ValueLoss | None = None
    """Learned by this before a batch is used. None: learned through the objective's own loss, after each update."""
    num_updates: int = 1
    """Updates by `loss` for each batch."""


@dataclass(frozen=True)
class Needs:
    """What an algorithm wants to see in `LossInputs` beside the policy's log-probabilities."""

    old: bool = False
    ref: bool = False
    kl: bool = False
    """Full-vocabulary KL to the reference at each scored position."""
    evidence: Callable[[Rollouts, NoiseLike], Corruption] | None = None
    """Draws the copies that the reference reads once for each batch."""
    evidence_old: bool = False
    """The old policy reads them too."""
    order: bool = False
    """The steps in which tokens were revealed, and their log-probabilities then: no sampler that takes tokens back."""
    drawn: bool = False
    """The log-probabilities of tokens in the law that they were drawn from: no sampler at temperature 0."""
    reference_share: float = 0.0
    """b, in [0, 1): rollouts are drawn from logits (1 - b) · policy + b · reference. What their record of
    log-probabilities says is then the mixture's."""
    value: ValueNeeds | None = None


@dataclass(frozen=True)
class LossInputs:
    """Everything an objective may look at. Tensors (B, K, L) are zero where `corruption.scored` is False."""

    logps: Tensor  # (B, K, L) nats, differentiable
    corruption: Corruption
    advantages: Tensor  # (B,) constants
    rewards: Tensor  # (B,)
    groups: Tensor  # (B,)
    length: Tensor  # (B,) tokens up to and including the stop token
    old_logps: Tensor | None = None  # (B, K, L)
    ref_logps: Tensor | None = None  # (B, K, L)
    old_corruption: Corruption | None = None  # None: the same draws as `corruption`
    ref_corruption: Corruption | None = None
    kl: Tensor | None = None  # (B, K, L) nats, KL(policy || reference) over the vocabulary, differentiable
    evidence: Evidence | None = None
    values: Tensor | None = None  # (B,) of the value model; differentiable where that learns through this loss
    sample_logps: Tensor | None = None  # (B, L) nats, see `Samples.logps`
    drawn_logps: Tensor | None = None  # (B, L) nats, see `Samples.drawn_logps`
    process_rewards: Tensor | None = None  # (B,)
    uniform: Tensor | None = None  # (B,) in [0, 1)
    progress: float = 0.0  # share of the run's updates that are made

    def __len__(self) -> int:
        return self.logps.shape[0]


@dataclass(frozen=True)
class LossOutput:
    """The scalar to minimise and detached numbers for the log."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenOutput:
    """Numbers about the N selected positions of a canvas, in row-major order; None where not asked for."""

    logits: Tensor | None = None  # (N, V), float32 or wider; the mask token's is -inf
    logp: Tensor | None = None  # (N,) nats, of the targets
    entropy: Tensor | None = None  # (N,) nats
    scalar: Tensor | None = None  # (b,), of the active adapter's scalar head on a row's mean wanted hidden state
    hidden: Tensor | None = None  # (N, H), the head's input, without gradient: what `kl` and `pooled` rest on
    pooled: Tensor | None = None  # (b, H), mean of a row's wanted hidden states, float32 or wider
    kl: Tensor | None = None  # (N,) nats, KL(this model || reference) over the vocabulary


@dataclass(frozen=True)
class ReferenceStates:
    """What a KL to the reference is computed from, without gradient."""

    hidden: Tensor  # (N, H), its `TokenOutput.hidden` at the same positions
    head: Tensor | None  # (V, H), the matrix that turns them into logits; None: the compared model's own, frozen


class Policy(Protocol):
    """A masked diffusion language model as the rest of the library sees it."""

    mask_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    max_length: int
    block_size: int | None
    """Tokens per block of a model whose positions see their own block and those before; None: each sees all."""
    lookback: int | None
    """Positions before a token that have to be in a window with it; None: the model reads whole canvases only."""

    @property
    def device(self) -> torch.device: ...

    def token_outputs(
        self,
        canvas: Tensor,  # (b, T) int64
        attention_mask: Tensor | None,  # (b, T) bool, False on pads; None: no pads; (b, T, T): who (row) sees whom
        positions: Tensor,  # (b, T) bool, True = wanted; N of them
        *,
        targets: Tensor | None = None,  # (N,) int64
        want: Sequence[str] = ("logits",),  # among "logits", "logp", "entropy", "scalar", "hidden", "pooled", "kl"
        cache: Any = None,
        reference: ReferenceStates | None = None,
        position_ids: Tensor | None = None,  # (b, T) int64; None: counted from the first that is no pad
    ) -> TokenOutput:
        """One forward of the model; numbers about the wanted positions only. "kl" needs the reference's states there.

        With a cache of `new_cache` (block by block models only) the canvas is what follows the positions in the cache,
        without pads, and starts a block; its keys and values are added to the cache. With one of `new_window_cache`
        the canvas and its positions are the window, and the attention mask is of the whole canvas.

        A mask of who sees whom comes with `position_ids`, and where `lookback` is 0 alone.
        """
        ...

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        ...

    def forget(self, cache: Any, num_tokens: int, /) -> None:
        """Drop the last tokens of the cache."""
        ...

    def new_window_cache(self, keeps_suffix: bool) -> Any:
        """An empty cache with `freeze` and `keep`: the first forward, of the whole canvas, fills it."""
        ...

    def head_weight(self) -> Tensor:
        """(V, H), the matrix that turns hidden states into logits; gathered, and so collective, where it is in slices.

        Raises: ModelError where there is no such matrix.
        """
        ...


class NoiseLike(Protocol):
    """Keyed uniforms, see noise.py."""

    def stream(self, name: str) -> NoiseLike: ...

    def uniform(self, *coordinates: Tensor | int) -> Tensor: ...


class Task(Protocol):
    """Prompts and a judge of completions; the same one for training and evaluation.

    `prompt` names the prompt style; `gen_length` and `num_steps` are the tokens and denoising steps that go with it.
    """

    prompt: str

    @property
    def gen_length(self) -> int | None: ...

    @property
    def num_steps(self) -> int | None: ...

    def source(self, split: str) -> str:
        """Where the examples of a split come from, as evaluation rows name it."""
        ...

    def examples(self, split: str) -> Sequence[Example]: ...

    def score(self, example: Example, completion: str) -> Score: ...

    def stratum(self, example: Example) -> str:
        """A name under which evaluation reports this example apart, e.g. "unseen_grids"; "" for none."""
        ...


@runtime_checkable
class BatchTask(Protocol):
    """A task whose judge wants the whole batch: slow rewards, or functions written for batches."""

    def score_all(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Score]:
        """One score per completion. `completion_ids`: tokens up to and including the stop token."""
        ...


class Sampler(Protocol):
    """Fills L mask tokens behind each prompt."""

    @property
    def gen_length(self) -> int: ...

    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,
        *,
        noise: NoiseLike,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Samples: ...


class Algorithm(Protocol):
    """An objective: draws masked copies of rollouts and turns log-probabilities into a loss. Never sees a model."""

    strategies: ClassVar[tuple[str, ...]]
    """Kinds of batches that it can learn from, the published one first: names of `rollouts.STRATEGIES`."""

    @property
    def is_row_separable(self) -> bool:
        """A row's coefficient d loss / d logps depends on that row's differentiable numbers alone."""
        ...

    @property
    def num_iterations(self) -> int: ...

    @property
    def fresh_masks(self) -> bool: ...

    @property
    def share_masks(self) -> bool: ...

    @property
    def needs(self) -> Needs: ...

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor: ...

    def draw(self, rollouts: Rollouts, *, noise: NoiseLike, iteration: int = 0) -> Corruption:
        """Masked copies for one of the passes over a batch, which `iteration` counts from 0.

        `noise` is the same in all passes: what is new in each is drawn from `noise.stream(str(iteration))`.
        """
        ...

    def loss(self, x: LossInputs) -> LossOutput: ...
