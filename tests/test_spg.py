"""SPG against a loop oracle, its bounds on policy, and hand-made numbers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.objective_inputs import NOISE, POLICY, ROLLOUTS, assert_same_value_and_gradient, inputs
from tests.oracles import make_rollouts, spg_loss
from unmask.errors import ConfigError
from unmask.objectives import SPG
from unmask.types import Corruption, LossInputs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_length": 2, "num_masks": 5},
        {"block_length": 2, "scored_positions": "masked", "num_masks": 3},
        {"eubo_share": 1.0, "gamma": 1.0, "num_masks": 4},
        {"eubo_share": 0.0},
        {"gamma": 4.0, "num_masks": 6, "block_length": 3},
        {"count_positions": "all", "prompt_mask_ratio": 0.0},
        {"advantage": "z_score"},
    ],
    ids=str,
)
def test_loss_equals_the_loop_oracle(fields):
    algorithm = SPG(**fields)
    x = inputs(algorithm)
    length = ROLLOUTS.length.tolist() if algorithm.count_positions == "to_eos" else [4] * 4
    expected = spg_loss(
        x.logps,
        x.corruption.scored,
        x.advantages.tolist(),
        length,
        gamma=algorithm.gamma,
        eubo_share=algorithm.eubo_share,
    )
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def hand_made(advantages, length=(2, 2)):
    """Two rows, two copies: {0} and {0, 1} of L = 2 are read, with weights 2/1/2 and 2/2/2. The probabilities are 1/2;
    1/4 and 1/8."""
    scored = torch.tensor([[[True, False], [True, True]]] * 2)
    weight = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]] * 2, dtype=torch.float64)
    logps = torch.tensor([[[0.5, 1.0], [0.25, 0.125]]] * 2, dtype=torch.float64).log().requires_grad_()
    draw = Corruption(scored, scored, weight, "block")
    a = torch.tensor(advantages, dtype=torch.float64)
    return LossInputs(logps, draw, a, a, torch.zeros(2), torch.tensor(length))


def test_loss_by_hand():
    """B = ½ log ½ + ¼ (log ¼ + log ⅛) = -7/4 log 2. U at γ = 1: ½ [log(⅔·½ + ⅓·¼) + log ⅛] = ½ [log(5/12) + log ⅛].
    A = 1 takes B, A = -1 takes ½ U + ½ B; equal lengths."""
    x = hand_made([1.0, -1.0])
    out = SPG(gamma=1.0).loss(x)
    lower, upper = -1.75 * math.log(2), (math.log(5 / 12) + math.log(1 / 8)) / 2
    mixed = (upper + lower) / 2
    assert out.loss.item() == pytest.approx(-(lower - mixed) / 2, abs=1e-14)
    assert out.metrics == pytest.approx(
        {"policy_loss": out.loss.item(), "lower_per_token": lower, "upper_per_token": upper, "upper_share": 0.5}
    )
    out.loss.backward()
    good = [0.5, 0.0, 0.25, 0.25]  # dB: weight / E
    share = (1 / 3) / (5 / 12)  # of the first read of position 0 in U: 2/3 · 1/2 over 5/12
    bad = [(0.5 + share / 2) / 2, 0.0, (0.25 + (1 - share) / 2) / 2, (0.25 + 0.5) / 2]
    assert logps_gradient(x) == pytest.approx([-g / 2 for g in good] + [g / 2 for g in bad], abs=1e-14)


def logps_gradient(x):
    return x.logps.grad.flatten().tolist()


def test_rows_weigh_by_their_length():
    x = hand_made([1.0, 0.5], length=(2, 6))
    one, other = (SPG().loss(hand_made(a)).loss.item() * 4 for a in ([1.0, 0.0], [0.0, 0.5]))
    # a row of length 6 divides its weighted sum by 6 and weighs 6: the same numerator, divided by 2 + 6
    assert SPG().loss(x).loss.item() == pytest.approx((one / 2 + other / 2) * 2 / 8, abs=1e-14)
    assert SPG(count_positions="all").loss(x).loss.item() == pytest.approx(
        SPG().loss(hand_made([1.0, 0.5])).loss.item(), abs=1e-14
    )


def test_only_the_sign_of_the_advantage_chooses_the_bound():
    x = hand_made([-2.0, -1e-9])
    assert SPG().loss(x).metrics["upper_share"] == 1.0
    lower_only = SPG(eubo_share=0.0)
    a, b = (lower_only.loss(replace(x, advantages=s * x.advantages)).loss.item() for s in (1, -1))
    assert a == pytest.approx(-b, abs=1e-14)  # plain policy gradient on the lower bound is odd in A
    mixed = [SPG().loss(replace(x, advantages=s * x.advantages)).loss.item() for s in (1, -1)]
    assert abs(mixed[0] + mixed[1]) > 0.1
    assert SPG().loss(hand_made([0.0, 1.0])).metrics["upper_share"] == 0.0


def test_upper_exceeds_lower_and_grows_with_gamma_where_a_position_is_read_twice():
    """U against the mean of the reads with the same weights, position by position (Jensen)."""
    x = hand_made([1.0, -1.0])
    values = [SPG(gamma=g).loss(x).metrics["upper_per_token"] for g in (1.0, 1.5, 2.0, 8.0)]
    weighted_mean = ((2 * math.log(0.5) + math.log(0.25)) / 3 + math.log(0.125)) / 2
    assert weighted_mean < values[0] and all(a < b for a, b in itertools.pairwise(values))


def test_with_one_read_a_token_both_bounds_have_the_gradient_of_the_log_probability():
    """num_masks = 1: U is the mean of the reads, and so is B: the lower and the upper branch are the same."""
    algorithm = SPG(num_masks=1)
    x = inputs(algorithm)
    losses = [replace(algorithm, eubo_share=s, gamma=g).loss(x).loss for s in (0.0, 0.5, 1.0) for g in (1.0, 3.0)]
    for loss in losses[1:]:
        assert_same_value_and_gradient(loss, losses[0], POLICY)


def test_nothing_behind_the_stop_token_is_shown_or_read():
    draw = SPG(block_length=2).draw(ROLLOUTS, noise=NOISE)
    tail = (torch.arange(4) >= ROLLOUTS.length[:, None, None]).expand_as(draw.scored)
    assert draw.masked[..., 2:][tail].all() and not draw.scored[tail].any()
    assert draw.kind == "block" and draw.num_masks == 2


def test_draws_follow_the_fields():
    rollouts = make_rollouts(torch.zeros(60, 8, dtype=torch.int64), prompt=torch.ones(60, 20, dtype=torch.int64))
    draw = SPG(num_masks=3, block_length=4, prompt_mask_ratio=0.0).draw(rollouts, noise=NOISE)
    assert draw.num_masks == 3 and not draw.masked[..., :20].any()
    assert (draw.scored[..., :4].any(-1) ^ draw.scored[..., 4:].any(-1)).all()
    code = SPG(num_masks=3, block_length=4, scored_positions="masked").draw(rollouts, noise=NOISE)
    assert torch.equal(code.scored, code.masked[..., 20:]) and code.masked[..., :20].any()


def test_published_defaults():
    a = SPG()
    assert (a.gamma, a.eubo_share, a.num_masks, a.block_length, a.prompt_mask_ratio) == (1.5, 0.5, 2, 32, 0.15)
    assert (a.scored_positions, a.num_iterations, a.fresh_masks) == ("block", 4, True)
    assert (a.advantage, a.count_positions, a.is_row_separable) == ("group_centered", "to_eos", True)
    assert a.share_masks and not (a.needs.old or a.needs.ref)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma": 0.5}, r"algorithm.gamma = 0.5: .*1 or more"),
        ({"gamma": math.inf}, r"algorithm.gamma = inf"),
        ({"eubo_share": 1.5}, r"algorithm.eubo_share = 1.5: .*0 to 1"),
        ({"eubo_share": -0.1}, r"algorithm.eubo_share = -0.1"),
        ({"block_length": 0}, r"algorithm.block_length = 0"),
        ({"num_masks": 0}, r"algorithm.num_masks = 0"),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0"),
        ({"prompt_mask_ratio": 1.0}, r"algorithm.prompt_mask_ratio = 1.0"),
        ({"scored_positions": "all"}, r"algorithm.scored_positions = 'all': .*block, masked"),
        ({"advantage": "mean"}, r"algorithm.advantage = 'mean'"),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ConfigError, match=message):
        SPG(**fields)


def test_fields_may_reach_their_limits():
    for fields in ({"gamma": 1.0}, {"eubo_share": 0.0}, {"eubo_share": 1.0}, {"block_length": 1}, {"num_masks": 1}):
        assert {name: getattr(SPG(**fields), name) for name in fields} == fields
