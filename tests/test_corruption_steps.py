"""Copies along a sampler's steps, against the likelihood of every order by enumeration."""

from dataclasses import replace
from itertools import permutations, product

import pytest
import torch

from tests.oracles import (
    conditionals,
    elbo_by_orders,
    log_likelihood_by_orders,
    make_rollouts,
    order_logp,
    score_copies,
)
from tests.oracles_steps import state_before, steps_of, trajectory_logp, transition_logp
from tests.toys import TabularPolicy
from unmask.corruption_steps import draw_trajectory, draw_transition
from unmask.errors import ConfigError
from unmask.likelihood import elbo, sequence_estimate
from unmask.types import take_rows

POLICY = TabularPolicy(length=4, seed=3)
COMPLETION = torch.tensor([2, 0, 1, 1])
TABLE = conditionals(POLICY, COMPLETION)


def rows(steps, windows=None, length=None):
    batch = make_rollouts(COMPLETION.expand(len(steps), -1), length=length)
    window = None if windows is None else torch.tensor(windows)
    return replace(batch, reveal_step=torch.tensor(steps), window=window)


def estimates(batch, draw):
    return sequence_estimate(score_copies(POLICY, batch, draw), draw)


def test_trajectory_is_the_likelihood_along_each_order():
    orders = list(permutations(range(4)))
    batch = rows([steps_of(order) for order in orders])
    paths = estimates(batch, draw_trajectory(batch))
    expected = torch.stack([order_logp(TABLE, order) for order in orders])
    assert torch.allclose(paths, expected, rtol=0, atol=1e-12)
    assert (paths.exp().mean().log() - log_likelihood_by_orders(TABLE)).abs() < 1e-12
    assert (paths.mean() - elbo_by_orders(TABLE)).abs() < 1e-12
    ours, theirs = (torch.autograd.grad(v.sum(), POLICY.table, retain_graph=True)[0] for v in (paths, expected))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and theirs.abs().max() > 0.1


def test_tokens_of_one_step_are_read_from_the_state_before_it():
    """All 4^4 step maps, gaps between the steps included."""
    steps = [list(s) for s in product(range(4), repeat=4)]
    batch = rows(steps)
    draw = draw_trajectory(batch)
    expected = torch.stack([trajectory_logp(TABLE, s) for s in steps])
    assert torch.allclose(estimates(batch, draw), expected, rtol=0, atol=1e-12)
    assert draw.kind == "order" and draw.num_masks == 4
    assert [int(n) for n in draw.scored.any(-1).sum(1)] == [len(set(s)) for s in steps]  # copies that cost a forward
    assert (draw.scored.sum(1) == 1).all()  # each position is read once, with weight 1
    assert torch.equal(draw.weight, draw.scored.double())


def test_a_copy_shows_what_was_fixed_before_its_step():
    draw = draw_trajectory(rows([[7, 3, 7, 5], [2, 2, 2, 2]]))
    assert draw.masked[0].int().tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1], [0, 0, 1, 0, 1, 0]]
    assert draw.scored[0].int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]]
    assert draw.scored[1].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not draw.masked[1, 1:].any()


def test_transitions_of_one_step_add_up_to_the_trajectory():
    for order in permutations(range(4)):
        batch = rows([steps_of(order)] * 4, windows=[[k, k + 1] for k in range(4)])
        assert (estimates(batch, draw_transition(batch)).sum() - order_logp(TABLE, order)).abs() < 1e-12


def test_a_transition_reads_its_window_from_the_state_of_the_parent():
    steps = [[0, 1, 2, 3], [3, 1, 0, 2], [1, 1, 0, 0], [2, 0, 2, 0]]
    cases = [(s, first, end, n) for s in steps for first in range(4) for end in range(first + 1, 5) for n in (1, 3, 4)]
    batch = rows([c[0] for c in cases], windows=[c[1:3] for c in cases], length=[c[3] for c in cases])
    draw = draw_transition(batch)
    expected = torch.stack([transition_logp(TABLE, *case) for case in cases])
    assert torch.allclose(estimates(batch, draw), expected, rtol=0, atol=1e-12)
    assert draw.num_masks == 1 and draw.kind == "order" and torch.equal(draw.weight, draw.scored.double())
    hidden = [[bool(state_before(c[0], c[1]) >> i & 1) for i in range(4)] for c in cases]
    assert draw.masked[:, 0, 2:].tolist() == hidden and not draw.masked[..., :2].any()
    whole = draw_transition(batch, count_positions="all")
    assert torch.equal(whole.masked, draw.masked)
    assert [int(n) for n in whole.scored.sum((1, 2))] == [
        sum(first <= s < end for s in c) for c, first, end, _ in cases
    ]


def test_a_row_without_a_window_covers_all_steps():
    batch = rows([[0, 1, 2, 3], [3, 3, 0, 0]], length=[4, 2])
    draw = draw_transition(batch)
    assert draw.masked.dtype == draw.scored.dtype == torch.bool
    assert draw.masked[..., 2:].all() and draw.scored[:, 0].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    everything = replace(batch, window=torch.tensor([[0, 4], [0, 4]]))
    assert torch.equal(draw_transition(everything).scored, draw.scored)


def test_tokens_behind_the_stop_token_are_shown_as_they_were_and_not_read():
    batch = rows([[0, 3, 1, 2]], length=[2])
    draw = draw_trajectory(batch, count_positions="to_eos")
    assert torch.equal(draw.masked, draw_trajectory(batch).masked)
    assert (estimates(batch, draw)[0] - trajectory_logp(TABLE, [0, 3, 1, 2], 2)).abs() < 1e-12
    assert draw.scored.any(-1).tolist() == [[True, False, False, True]]


def test_rows_do_not_depend_on_their_neighbours():
    batch = rows([[0, 0, 1, 1], [3, 2, 1, 0], [5, 5, 5, 5]], windows=[[0, 1], [1, 3], [5, 6]])
    whole, alone = draw_trajectory(batch), draw_trajectory(take_rows(batch, torch.tensor([0])))
    assert torch.equal(whole.masked[:1, :2], alone.masked) and not whole.scored[0, 2:].any()
    assert torch.equal(draw_transition(batch).masked[2:], draw_transition(take_rows(batch, torch.tensor([2]))).masked)


def test_an_order_is_no_bound_and_unknown_positions_are_refused():
    batch = rows([[0, 1, 2, 3]])
    draw = draw_trajectory(batch)
    with pytest.raises(ValueError, match="'order' corruption"):
        elbo(score_copies(POLICY, batch, draw), draw)
    for draw_steps in (draw_trajectory, draw_transition):
        with pytest.raises(ConfigError, match="count_positions = 'eos'"):
            draw_steps(batch, count_positions="eos")


def test_a_completion_of_one_token():
    batch = make_rollouts(torch.tensor([[1], [2]]))
    batch = replace(batch, reveal_step=torch.tensor([[4], [0]]))
    assert draw_trajectory(batch).scored.all() and draw_trajectory(batch).num_masks == 1
    assert draw_transition(batch).scored.all()
