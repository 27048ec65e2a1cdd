"""Masked copies along the steps in which a sampler wrote its tokens: nothing is drawn at random here.

What was masked before a step follows from `Rollouts.reveal_step`, so a sampler must have fixed each position once. One
that takes tokens back leaves no such record; `Needs.order` keeps it away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.types import Corruption, Rollouts


def draw_trajectory(
    rollouts: Rollouts,
    *,
    count_positions: str = "all",
) -> Corruption:
    """One copy for each step: its state before the step, read where the step revealed a token. Weight 1.

        log p(y; σ) = Σ_k Σ_{i: s(i) = k} l(i; {j : s(j) >= k}),     s = reveal_step

    With one token a step, log-likelihood of the completion along its order; with several, they are independent given
    the state, which is how such a sampler draws them. The probability of the order itself is left out.

    K is the largest number of distinct steps in a row. Rows with fewer have copies in which nothing is scored, which
    cost no forward. "to_eos" reads tokens up to and including the stop token; the states stay as they were.

    Raises: ConfigError for an unknown `count_positions`.
    Source: DMPO, arXiv:2510.08233; TraceRL, arXiv:2509.06949.
    Oracle: tests/test_corruption_steps.py::test_trajectory_is_the_likelihood_along_each_order
    """
    rank = _rank_of_step(rollouts.reveal_step)[:, None]  # (B, 1, L)
    step = torch.arange(int(rank.max()) + 1, device=rank.device)[:, None]  # (K, 1)
    scored = (rank == step) & _counted(rollouts, count_positions)[:, None]
    return Corruption(_behind_prompts(rollouts, rank >= step), scored, scored.double(), "order")


def draw_transition(
    rollouts: Rollouts,
    *,
    count_positions: str = "to_eos",
) -> Corruption:
    """One copy of each row: the canvas before its window of steps, read where the window revealed a token. Weight 1.

        log p(child | parent) = Σ_{i: first <= s(i) < end} l(i; {j : s(j) >= first}),     (first, end) = window

    The probability of the transition if all its tokens were drawn at once: exact for a window of one step. Rows
    without a window (`Rollouts.window` is None) cover all steps: everything is masked. "to_eos" reads tokens up to
    and including the stop token.

    Raises: ConfigError for an unknown `count_positions`.
    Source: d-TreeRPO, arXiv:2512.09675.
    Oracle: tests/test_corruption_steps.py::test_transitions_of_one_step_add_up_to_the_trajectory
    """
    step = rollouts.reveal_step
    hidden = revealed = torch.ones_like(step, dtype=torch.bool)  # (B, L)
    if rollouts.window is not None:
        first, end = rollouts.window[:, :1], rollouts.window[:, 1:]  # (B, 1) each
        hidden = step >= first
        revealed = hidden & (step < end)
    scored = (revealed & _counted(rollouts, count_positions))[:, None]  # (B, 1, L)
    return Corruption(_behind_prompts(rollouts, hidden[:, None]), scored, scored.double(), "order")


def _rank_of_step(step: Tensor) -> Tensor:
    """(B, L) -> (B, L): how many different steps of the row come before each position's."""
    ordered, place = step.sort()
    is_new = torch.zeros_like(step)
    is_new[:, 1:] = ordered.diff() != 0
    return torch.zeros_like(step).scatter(1, place, is_new.cumsum(1))


def _counted(rollouts: Rollouts, count_positions: str) -> Tensor:
    """(B, L) bool, the positions that count."""
    if count_positions not in ("all", "to_eos"):
        raise ConfigError(f'count_positions = {count_positions!r}: unknown. Use "all" or "to_eos".')
    if count_positions == "all":
        return torch.ones_like(rollouts.completion_ids, dtype=torch.bool)
    positions = torch.arange(rollouts.completion_length, device=rollouts.length.device)
    return positions < rollouts.length[:, None]


def _behind_prompts(rollouts: Rollouts, hidden: Tensor) -> Tensor:
    """(B, K, L) -> (B, K, T): masks of whole canvases whose prompts are shown."""
    prompt = hidden.new_zeros(*hidden.shape[:2], rollouts.prompt_ids.shape[1])
    return torch.cat([prompt, hidden], dim=2)
