"""Pairs of rollouts of one prompt, and means over them, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, ROLLOUTS, inputs
from tests.oracles_pairs import log_ratios
from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError
from unmask.objectives import VRPO, DPOElbo
from unmask.objectives.pairs import (
    copy_log_ratios,
    draw_elbo,
    group_means,
    mean_over_groups,
    ordered_pairs,
    ref_scores,
    root_mean_square,
)


def test_ordered_pairs_are_all_of_a_group_and_none_with_itself():
    first, second = ordered_pairs(torch.tensor([5, 1, 5, 5, 1, 9]))
    expected = [(0, 2), (0, 3), (1, 4), (2, 0), (2, 3), (3, 0), (3, 2), (4, 1)]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected


def test_groups_weigh_alike_whatever_their_size():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64, requires_grad=True)
    mean = mean_over_groups(values, torch.tensor([3, 3, 3, 8]))
    assert mean.item() == pytest.approx((2.0 + 10.0) / 2, abs=1e-15)
    (gradient,) = torch.autograd.grad(mean, values)
    assert gradient.tolist() == pytest.approx([1 / 6] * 3 + [1 / 2], abs=1e-15)
    assert root_mean_square(values, torch.tensor([3, 3, 3, 8])) == pytest.approx(((14 / 3 + 100) / 2) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_is_a_zero_that_can_be_differentiated(dtype):
    values = torch.ones(3, dtype=dtype, requires_grad=True)
    mean = mean_over_groups(values[torch.tensor([], dtype=torch.int64)], torch.tensor([], dtype=torch.int64))
    assert mean.item() == 0.0 and mean.dtype == dtype
    assert torch.autograd.grad(mean, values)[0].tolist() == [0.0] * 3


def test_each_row_has_the_mean_of_its_group():
    values = torch.tensor([[1.0, 0.0], [4.0, 1.0], [3.0, 4.0]], dtype=torch.float64)
    assert group_means(values, torch.tensor([2, 0, 2])).tolist() == [[2.0, 2.0], [4.0, 1.0], [2.0, 2.0]]
    assert group_means(values[:, 0], torch.tensor([2, 0, 2])).tolist() == [2.0, 4.0, 2.0]


@pytest.mark.parametrize("algorithm", [VRPO(), DPOElbo(num_masks=3)], ids=["shared", "independent"])
def test_copies_add_up_to_the_difference_of_two_estimates(algorithm):
    x = inputs(algorithm)
    parts = copy_log_ratios(x, "VRPO")
    assert parts.shape == x.logps.shape[:2]
    expected = torch.stack(log_ratios(x, ROLLOUTS.length.tolist(), coupled=False))
    assert torch.allclose(parts.sum(1), expected, rtol=0, atol=1e-12)
    first = replace(x, logps=x.logps * torch.tensor([1.0] + [0.0] * (parts.shape[1] - 1))[:, None].double())
    changed = (copy_log_ratios(first, "VRPO") != parts).any(0)
    assert changed.tolist() == [False] + [True] * (parts.shape[1] - 1)


def test_small_differences_of_large_sums_keep_their_digits():
    """4 tokens at -1e6 nats in float32, moved by 1/8 each: the sums alone would lose it."""
    x = inputs(DPOElbo(num_masks=1, share_masks=True, count_positions="all"))
    scored = torch.ones_like(x.corruption.scored)
    draw = replace(x.corruption, scored=scored, weight=scored.double())
    logps = torch.full(scored.shape, -1e6)
    x = replace(x, corruption=draw, logps=logps, ref_logps=logps - 0.125)
    assert copy_log_ratios(x, "DPOElbo").flatten().tolist() == [0.5] * 4


def test_a_reference_is_named_where_it_is_missing():
    x = inputs(VRPO())
    assert ref_scores(x, "VRPO")[1] is x.corruption
    with pytest.raises(ValueError, match=r"VRPO.loss\(\) got no ref_logps.* score the reference"):
        ref_scores(replace(x, ref_logps=None), "VRPO")


def test_draws_follow_every_field():
    for fields in (
        {"num_masks": 4, "coupled": True, "stratify": False, "count_positions": "all"},
        {"num_masks": 3, "coupled": False, "stratify": True, "count_positions": "to_eos"},
    ):
        found = draw_elbo(ROLLOUTS, VRPO(**fields), noise=NOISE)
        expected = draw_uniform_count(ROLLOUTS, **fields, noise=NOISE)
        assert torch.equal(found.masked, expected.masked) and torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, r"algorithm.beta = 0.0: temperature.* above 0"),
        ({"beta": math.inf}, r"algorithm.beta = inf"),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0: "),
        ({"num_masks": 0}, r"algorithm.num_masks = 0: "),
        ({"num_masks": 3, "coupled": True}, r"algorithm.num_masks = 3: .*even"),
        ({"count_positions": "eos"}, r"algorithm.count_positions = 'eos': "),
    ],
)
def test_fields_of_an_estimate_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        VRPO(**fields)


def test_fields_of_an_estimate_may_reach_their_limits():
    assert VRPO(num_iterations=1, num_masks=1, beta=1e-6).beta == 1e-6
    assert VRPO(num_masks=2, coupled=True).coupled and VRPO(num_masks=3).num_masks == 3
