"""Short completions, and all that is exact about them: every conditional of every masked state, enumerated.

A subset S of masked positions is a bit mask (bit i: position i is masked). A table (B, 2^L, L) holds
l(i;S) = log p(y_i | prompt, y outside S) in nats for i in S, and 0 elsewhere; it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.scoring import score
from unmask.types import Corruption, NoiseLike, Policy, Rollouts, take_rows


@dataclass(frozen=True)
class ShortRows:
    """Rollouts of which L completion positions are open to masking; all others stay shown, as if they were prompt.

    Example: 8 of the 16 cells of a Sudoku are open, so 256 masked states exist instead of 65,536.
    """

    whole: Rollouts  # completions as they were sampled
    rollouts: Rollouts  # the same rows with the open tokens alone as completion: what the draws see
    position: Tensor  # (B, L) int64, ascending: where the open tokens stand in the completion
    turn: Tensor  # (B, L) int64: shorter completions of l tokens keep the open tokens with turn < l

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def length(self) -> int:
        """L, tokens."""
        return self.position.shape[1]

    def row(self, index: int) -> ShortRows:
        """One row alone."""
        one = slice(index, index + 1)
        return ShortRows(take_rows(self.whole, one), take_rows(self.rollouts, one), self.position[one], self.turn[one])


def shorten(rollouts: Rollouts, length: int, *, noise: NoiseLike) -> ShortRows:
    """`length` random positions of each completion: of those up to the stop token as far as they suffice."""
    places = torch.arange(rollouts.completion_length, device=rollouts.length.device)
    u = noise.stream("positions").uniform(rollouts.prompt_key[:, None], rollouts.rollout_index[:, None], places)
    u = u + (places >= rollouts.length[:, None])
    position, turn = u.argsort(stable=True)[:, :length].sort(1)
    short = replace(
        rollouts,
        completion_ids=rollouts.completion_ids.gather(1, position),
        reveal_step=rollouts.reveal_step.gather(1, position),
        sample_logps=rollouts.sample_logps.gather(1, position),
        drawn_logps=None,
        length=torch.full_like(rollouts.length, length),
    )
    return ShortRows(rollouts, short, position, turn)


def subsets(length: int) -> Tensor:  # (2^L, L) bool
    """Row S: which positions S masks."""
    return (torch.arange(2**length)[:, None] >> torch.arange(length)) % 2 == 1


# ---- the model's answers


def run_model(policy: Policy, rows: ShortRows, corruption: Corruption, *, micro_batch_size: int) -> Tensor:
    """(B, K, L) float64: log-probabilities of the open tokens in masked copies drawn for the short rows."""
    prompt = rows.rollouts.prompt_ids.shape[1]
    place = rows.position[:, None].expand(-1, corruption.num_masks, -1)  # (B, K, L)
    shape = (*place.shape[:2], rows.whole.completion_length)
    hidden = corruption.masked[..., prompt:]
    masked = hidden.new_zeros(shape).scatter_(2, place, hidden)
    scored = hidden.new_zeros(shape).scatter_(2, place, corruption.scored)
    whole = Corruption(
        torch.cat([corruption.masked[..., :prompt], masked], dim=2), scored, scored.double(), corruption.kind
    )
    logps = score(policy, rows.whole, whole, micro_batch_size=micro_batch_size).logps
    return logps.gather(2, place).double()


def score_table(
    policy: Policy,
    rows: ShortRows,
    *,
    micro_batch_size: int,
    on_row: Callable[[int], None],
) -> Tensor:  # (B, 2^L, L), on the CPU
    """All conditionals of each row, from 2^L - 1 forwards a row. `on_row(1)` is told of every finished row."""
    prompt = rows.rollouts.prompt_ids.shape[1]
    states = subsets(rows.length)[1:].to(rows.position.device)[None]  # (1, 2^L - 1, L)
    hidden = torch.cat([states.new_zeros(1, states.shape[1], prompt), states], dim=2)
    every_state = Corruption(hidden, states, states.double(), "states")
    table = torch.zeros(len(rows), 2**rows.length, rows.length, dtype=torch.float64)
    for row in range(len(rows)):
        table[row, 1:] = run_model(policy, rows.row(row), every_state, micro_batch_size=micro_batch_size)[0].cpu()
        on_row(1)
    return table


def read(
    table: Tensor,  # (B, 2^L, L)
    corruption: Corruption,  # drawn for the short rows, no prompt token masked
) -> Tensor:  # (B, K, L), zero where not scored
    """What the model would answer to masked copies."""
    length = table.shape[-1]
    states = (corruption.masked[..., -length:].long() << torch.arange(length)).sum(-1)  # (B, K)
    logps = table[torch.arange(len(table))[:, None], states]
    return logps * corruption.scored


def sub_table(
    table: Tensor,  # (B, 2^L, L)
    turn: Tensor,  # (B, L)
    length: int,  # l
) -> Tensor:  # (B, 2^l, l)
    """The table of the completions that keep the open tokens with turn < l, the others being shown."""
    kept = (turn >= length).int().argsort(stable=True)[:, :length]  # (B, l), ascending
    states = (subsets(length).long() << kept[:, None]).sum(-1)  # (B, 2^l)
    picked = table[torch.arange(len(table))[:, None], states]  # (B, 2^l, L)
    return picked.gather(2, kept[:, None].expand(-1, states.shape[1], -1))


# ---- likelihood and bounds


def may_come_next(length: int, block_length: int | None = None) -> Tensor:  # (2^L, L) bool
    """Masked positions of each state that may be revealed now: those of its first unfinished block."""
    inside = subsets(length)
    block = torch.arange(length) // (block_length or length)
    first = torch.where(inside, block, length).amin(1)
    return inside & (block == first[:, None])


def log_likelihood(table: Tensor, block_length: int | None = None) -> Tensor:  # (B,) nats
    """Exact log p of the completions when one token at a time is revealed in uniformly random order.

        F(∅) = 1,     F(S) = mean over the i that may come next of e^{l(i;S)} F(S \\ {i}),     log F({1..L})

    Oracle: tests/test_diagnose.py::test_likelihood_and_bounds_equal_the_oracles
    """
    return _over_orders(table, block_length, lambda terms, may: _log_mean_exp(terms, may))[:, -1]


def mean_over_orders(table: Tensor, block_length: int | None = None) -> Tensor:  # (B, 2^L)
    """For every state S the mean over the orders of revealing S of the summed table; at the last state, the ELBO."""
    return _over_orders(table, block_length, lambda terms, may: (terms * may).sum(-1) / may.sum(-1))


def before(length: int) -> Tensor:  # (2^L, L) int64
    """The state that is left of S once position i is revealed; S itself where it is shown already."""
    return torch.arange(2**length)[:, None] & ~(1 << torch.arange(length))


def eubo_limit(table: Tensor, gamma: float) -> Tensor:  # (B,) nats
    """The EUBO of infinitely many copies: Σ_i (1/γ) log Σ_{S∋i} e^{γ l(i;S)} / (m C(L,m)), m = |S|."""
    length = table.shape[-1]
    inside = subsets(length)
    size = inside.sum(1).tolist()
    log_weight = torch.tensor([-math.log(m * math.comb(length, m)) if m else 0.0 for m in size], dtype=table.dtype)
    terms = (gamma * table + log_weight[:, None]).masked_fill(~inside, -torch.inf)
    return terms.logsumexp(1).sum(1) / gamma


def _log_mean_exp(terms: Tensor, may: Tensor) -> Tensor:
    return terms.masked_fill(~may, -torch.inf).logsumexp(-1) - may.sum(-1).to(terms).log()


def _over_orders(
    table: Tensor,  # (B, 2^L, L)
    block_length: int | None,
    merge: Callable[[Tensor, Tensor], Tensor],  # (B, n, L) terms and (n, L) bool -> (B, n)
) -> Tensor:  # (B, 2^L)
    """A recursion from few masked positions to many: value(S) = merge over i of table(i;S) + value(S \\ {i})."""
    length = table.shape[-1]
    may, left = may_come_next(length, block_length), before(length)
    size = subsets(length).sum(1)
    value = table.new_zeros(table.shape[:2])
    for m in range(1, length + 1):
        states = (size == m).nonzero()[:, 0]
        terms = table[:, states] + value[:, left[states]]  # (B, n, L)
        value[:, states] = merge(terms, may[states])
    return value
