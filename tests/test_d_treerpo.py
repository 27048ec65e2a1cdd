"""d-TreeRPO against a loop over parents, children and tokens, with hand-made trees."""

import math
from dataclasses import fields, replace

import pytest
import torch

from tests.objective_inputs import NOISE, OLD, POLICY, REF, assert_same_value_and_gradient, inputs
from tests.oracles import conditionals, make_rollouts, order_logp
from tests.oracles_steps import d_treerpo_loss, state_before, steps_of
from unmask.errors import ConfigError
from unmask.objectives import DTreeRPO
from unmask.objectives.d_treerpo import distillation_target
from unmask.types import Corruption, LossInputs

# Three parents. The first two share a leaf's way with their children; all children of the third are worth the same.
PARENTS = [5, 5, 5, 2, 2, 2, 8, 8]
VALUES = [1.0, 0.25, 0.5, 0.0, 1.0, 1.0, 0.4, 0.4]
STEPS = [[0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 0, 3], [2, 0, 3, 1], [0, 0, 2, 3], [3, 1, 0, 2], [0, 1, 2, 3], [3, 2, 1, 0]]
WINDOWS = [[0, 2]] * 3 + [[2, 4]] * 3 + [[0, 4]] * 2
LENGTH = [4, 1, 3, 4, 4, 3, 4, 2]
TREE = replace(
    make_rollouts(
        torch.tensor(
            [[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 2], [0, 2, 0, 1], [1, 1, 1, 0], [2, 0, 1, 1]] + [[0] * 4] * 2
        ),
        groups=PARENTS,
        rewards=VALUES,
        length=LENGTH,
    ),
    reveal_step=torch.tensor(STEPS),
    window=torch.tensor(WINDOWS),
)
REVEALED = [
    [k for k in range(n) if first <= steps[k] < end]
    for steps, (first, end), n in zip(STEPS, WINDOWS, LENGTH, strict=True)
]  # [0, 1], [], [0, 1, 2], [0, 2], [2, 3], [0], ...: the second child has written nothing before its stop token


def given(algorithm, **changes):
    return replace(inputs(algorithm, rollouts=TREE), **changes)


def test_the_tree_has_a_child_without_tokens():
    assert REVEALED[1] == [] and REVEALED[5] == [0] and all(REVEALED[b] for b in (0, 2, 3, 4))


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.999])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"clip_low": 0.05, "clip_high": 0.6, "kl_coef": 0.5},
        {"clip_low": 0.6, "clip_high": 0.05},
        {"distill_coef": 2.0, "distill_temperature": 0.3},
        {"kl_coef": 0.0, "distill_coef": 1.0, "distill_growth": 0.5, "distill_decay": 2.0},
    ],
    ids=str,
)
def test_loss_equals_the_loop_oracle(changed, progress):
    algorithm = DTreeRPO(**changed)
    x = given(algorithm, progress=progress)
    tables = []
    for policy in (POLICY, OLD, REF):
        rows = []
        for y, steps, (first, _) in zip(TREE.completion_ids, STEPS, WINDOWS, strict=True):
            rows.append(conditionals(policy, y)[state_before(steps, first)])
        tables.append(torch.stack(rows))
    gamma = algorithm.distill_growth
    expected = d_treerpo_loss(
        tables[0],
        tables[1].detach(),
        tables[2].detach(),
        REVEALED,
        VALUES,
        PARENTS,
        clip=(algorithm.clip_low, algorithm.clip_high),
        kl_coef=algorithm.kl_coef,
        coef=algorithm.distill_coef * (math.exp(gamma * progress) - 1) / (math.exp(gamma) - 1),
        temperature=algorithm.distill_temperature * (1 - progress) ** algorithm.distill_decay,
    )
    assert_same_value_and_gradient(algorithm.loss(x).loss, expected, POLICY)


def test_loss_and_metrics_by_hand():
    """One parent, children worth 1 and 0 with tokens {0, 1} and {1}: A = ±1/2, on policy, L = 2."""
    scored = torch.tensor([[[True, True]], [[False, True]]])
    logps = torch.tensor([[[-1.0, -2.0]], [[0.0, -3.0]]], dtype=torch.float64, requires_grad=True)
    draw = Corruption(torch.ones(2, 1, 2).bool(), scored, scored.double(), "order")
    rewards, groups = torch.tensor([1.0, 0.0]).double(), torch.tensor([5, 5])
    algorithm = DTreeRPO(kl_coef=0.0, distill_coef=0.5)
    advantages = algorithm.advantages(rewards, groups)
    x = LossInputs(
        logps, draw, advantages, rewards, groups, torch.tensor([2, 2]), old_logps=logps.detach(), progress=1.0
    )
    out = algorithm.loss(x)
    # surrogate -(1/2 - 1/2)/2 = 0; the better child alone is the target: CE = (1 + 2)/2
    assert out.loss.item() == pytest.approx(0.5 * 1.5, abs=1e-14)
    assert out.metrics["distill_loss"] == pytest.approx(1.5, abs=1e-14)
    assert (out.metrics["distill_coef"], out.metrics["distill_temperature"]) == (0.5, 0.0)
    assert out.metrics["policy_loss"] == 0.0 and out.metrics["ratio_max"] == 1.0
    out.loss.backward()
    surrogate, distillation = [-1 / 8, -1 / 8, 0.0, 1 / 4], [-1 / 4, -1 / 4, 0.0, 0.0]
    expected = [a + b for a, b in zip(surrogate, distillation, strict=True)]
    assert logps.grad.flatten().tolist() == pytest.approx(expected, abs=1e-15)


def _cut_low(ratio, advantage):
    return ratio < 0.4 and advantage < 0


def _cut_high(ratio, advantage):
    return ratio > 1.05 and advantage > 0


def test_the_parts_of_the_loss_add_up_and_unequal_clips_are_told_apart():
    algorithm = DTreeRPO(clip_low=0.6, clip_high=0.05, kl_coef=0.5, distill_coef=1.0)
    x = given(algorithm, progress=0.7)
    out = algorithm.loss(x)
    m = out.metrics
    parts = m["policy_loss"] + m["kl_penalty"] + m["distill_coef"] * m["distill_loss"]
    assert out.loss.item() == pytest.approx(parts, abs=1e-14) and m["kl_penalty"] > 0.01 and m["distill_loss"] > 0.01
    without = replace(algorithm, kl_coef=0.0).loss(x)
    assert "kl_penalty" not in without.metrics
    assert without.loss.item() == pytest.approx(out.loss.item() - m["kl_penalty"], abs=1e-14)
    ratios = [
        (math.exp(float(x.logps[c, 0, k].detach() - x.old_logps[c, 0, k])), float(x.advantages[c]))
        for c in range(6)
        for k in REVEALED[c]
    ]
    low, high = (sum(cut(r, a) for r, a in ratios) / len(ratios) for cut in (_cut_low, _cut_high))
    # shares are counted in float32
    assert m["clip_ratio/low_mean"] == pytest.approx(low, abs=1e-7)
    assert m["clip_ratio/high_mean"] == pytest.approx(high, abs=1e-7) and high > 0
    assert m["ratio_max"] == pytest.approx(max(r for r, _ in ratios), abs=1e-12)


def test_one_advantage_is_enough_to_count_a_parent():
    """negative_scale = 0 leaves the better of two children alone."""
    algorithm = DTreeRPO(negative_scale=0.0, kl_coef=0.0)
    tree = replace(
        make_rollouts(torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]), rewards=[1.0, 0.0]),
        reveal_step=torch.tensor(STEPS[:2]),
    )
    x = inputs(algorithm, rollouts=tree)
    (grad,) = torch.autograd.grad(algorithm.loss(replace(x, old_logps=x.logps.detach())).loss, x.logps)
    assert grad.flatten().tolist() == pytest.approx([-1 / 16] * 4 + [0] * 4, abs=1e-15)


def test_parents_whose_children_are_alike_contribute_nothing_and_are_not_counted():
    """Not even their KL; and the mean over parents is the same without their rows."""
    algorithm = DTreeRPO(kl_coef=0.5, distill_coef=1.0)
    x = given(algorithm, progress=0.5)
    logps = x.logps.detach().requires_grad_()
    out = algorithm.loss(replace(x, logps=logps))
    (grad,) = torch.autograd.grad(out.loss, logps)
    assert (grad[6:] == 0).all() and (grad[:6] != 0).any()
    part = LossInputs(
        logps[:6],
        Corruption(*(getattr(x.corruption, n)[:6] for n in ("masked", "scored", "weight")), "order"),
        x.advantages[:6],
        x.rewards[:6],
        x.groups[:6],
        x.length[:6],
        old_logps=x.old_logps[:6],
        ref_logps=x.ref_logps[:6],
        progress=0.5,
    )
    assert algorithm.loss(part).loss.item() == pytest.approx(out.loss.item(), abs=1e-14)
    assert algorithm.loss(part).metrics == pytest.approx(out.metrics, abs=1e-14)


def test_nothing_to_compare_is_a_loss_of_zero_with_a_gradient_of_zero():
    algorithm = DTreeRPO()
    x = given(algorithm, progress=1.0)
    x = replace(x, advantages=torch.zeros(8).double())
    out = algorithm.loss(x)
    assert out.loss.item() == 0.0 and (torch.autograd.grad(out.loss, POLICY.table)[0] == 0).all()


def test_transitions_of_one_token_add_up_to_the_likelihood_of_the_order():
    """A chain of nodes, one for each step: what the loss reads of it is the completion's log-likelihood."""
    order = (2, 0, 3, 1)
    y = torch.tensor([1, 0, 2, 2])
    chain = replace(
        make_rollouts(y.expand(4, -1), groups=[0, 1, 2, 3]),
        reveal_step=torch.tensor([steps_of(order)] * 4),
        window=torch.tensor([[k, k + 1] for k in range(4)]),
    )
    algorithm = DTreeRPO()
    draw = algorithm.draw(chain, noise=NOISE)
    total = sum(
        conditionals(POLICY, y)[sum(1 << i for i in range(4) if draw.masked[c, 0, 2 + i]), i]
        for c in range(4)
        for i in range(4)
        if draw.scored[c, 0, i]
    )
    assert abs(float((total - order_logp(conditionals(POLICY, y), order)).detach())) < 1e-12


# --- values and targets ----------------------------------------------------------------------------------------------


def test_advantages_are_measured_from_the_value_of_the_parent():
    """A parent's value is the mean of its children; leave-one-out is n/(n-1) times as much."""
    groups, values = torch.tensor(PARENTS), torch.tensor(VALUES).double()
    ours = DTreeRPO().advantages(values, groups)
    expected = [
        VALUES[c] - sum(v for v, q in zip(VALUES, PARENTS, strict=True) if q == p) / PARENTS.count(p)
        for c, p in enumerate(PARENTS)
    ]
    assert ours.tolist() == pytest.approx(expected, abs=1e-15)
    for parent in set(PARENTS):
        assert abs(ours[groups == parent].sum().item()) < 1e-15
    others = DTreeRPO(advantage="leave_one_out").advantages(values, groups)
    size = torch.tensor([PARENTS.count(p) for p in PARENTS])
    assert torch.allclose(others, ours * size / (size - 1), rtol=0, atol=1e-15)
    assert (ours[6:] == 0).all() and (others[6:] == 0).all()


A = torch.tensor([0.5, 0.25, 0.25, -1.0, 0.3], dtype=torch.float64)
MEMBER = torch.tensor([1, 1, 1, 1, 0])
HERE = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()


@pytest.mark.parametrize("temperature", [2.0, 0.1, 1e-3])
def test_target_is_a_softmax_over_the_better_siblings_at_each_position(temperature):
    target, count = distillation_target(A, HERE, MEMBER, 2, temperature)
    e = math.exp(0.25 / temperature)
    expected = [[e / (e + 2), 1, 0, 0], [1 / (e + 2), 0, 0.5, 0], [1 / (e + 2), 0, 0.5, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert torch.allclose(target, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)
    assert count.tolist() == [1, 3]  # positions with a target: the worse child's own have none
    shares = target[:4].sum(0).tolist()
    assert shares == pytest.approx([1, 1, 1, 0], abs=1e-15)


def test_target_at_temperature_zero_is_the_best_that_revealed_the_position():
    target, _ = distillation_target(A, HERE, MEMBER, 2, 0.0)
    assert target.tolist() == [[1, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0.5, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    cold, _ = distillation_target(A.float(), HERE, MEMBER, 2, 0.0)
    assert torch.isfinite(cold).all() and torch.equal(cold, target.float())


def test_schedules():
    algorithm = DTreeRPO()
    assert algorithm.schedule(0.0) == (0.0, 2.0)
    coef, temperature = algorithm.schedule(1.0)
    assert (coef, temperature) == (pytest.approx(3e-3, abs=1e-18), 0.0)
    coef, temperature = algorithm.schedule(0.5)
    assert coef == pytest.approx(3e-3 / (math.e + 1), abs=1e-17)  # (e - 1) / (e² - 1)
    assert temperature == pytest.approx(2 * 0.5**0.7, abs=1e-15)
    rises = [algorithm.schedule(p / 10) for p in range(11)]
    assert rises == sorted(rises, key=lambda pair: pair[0]) == sorted(rises, key=lambda pair: -pair[1])
    assert DTreeRPO(distill_decay=0.0).schedule(1.0)[1] == 2.0
    assert DTreeRPO(distill_coef=0.0).schedule(0.5)[0] == 0.0
    assert DTreeRPO(distill_growth=100.0).schedule(0.5)[0] == pytest.approx(3e-3 * math.exp(-50), rel=1e-12)


# --- extremes, fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [300.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extremes(shift, dtype):
    algorithm = DTreeRPO(distill_coef=1.0)
    x = given(algorithm, progress=1.0)
    logps = (x.logps.detach().to(dtype) + shift * x.corruption.scored).requires_grad_()
    out = algorithm.loss(replace(x, logps=logps))
    assert torch.isfinite(out.loss) and out.loss.dtype == dtype
    assert torch.isfinite(torch.autograd.grad(out.loss, logps)[0]).all()
    assert all(math.isfinite(v) for v in out.metrics.values())


def test_one_good_child_of_one_token():
    batch = make_rollouts(torch.tensor([[0], [1], [2], [0]]), rewards=[0.0, 1.0, 0.0, 0.0])
    batch = replace(batch, window=torch.tensor([[0, 1]] * 4))
    algorithm = DTreeRPO(distill_coef=1.0)
    draw = algorithm.draw(batch, noise=NOISE)
    assert draw.scored.all()
    logps = torch.tensor([-1.0, -2.0, -3.0, -1.0], dtype=torch.float64).view(4, 1, 1).requires_grad_()
    x = LossInputs(
        logps,
        draw,
        algorithm.advantages(batch.rewards, batch.groups),
        batch.rewards,
        batch.groups,
        batch.length,
        old_logps=logps.detach(),
        ref_logps=logps.detach(),
        progress=1.0,
    )
    (grad,) = torch.autograd.grad(algorithm.loss(x).loss, logps)
    # -A/4, and the whole target for the good one
    assert grad.flatten().tolist() == pytest.approx([1 / 16, -3 / 16 - 1, 1 / 16, 1 / 16], abs=1e-15)


def test_draws_follow_the_window_and_are_the_same_in_every_pass():
    algorithm = DTreeRPO()
    draw = algorithm.draw(TREE, noise=NOISE)
    assert [row.nonzero().flatten().tolist() for row in draw.scored[:, 0]] == REVEALED
    assert torch.equal(draw.masked, algorithm.draw(TREE, noise=NOISE.stream("other"), iteration=3).masked)
    assert not algorithm.fresh_masks and algorithm.share_masks
    everything = DTreeRPO(count_positions="all").draw(TREE, noise=NOISE)
    assert everything.scored[1, 0].tolist() == [False, True, False, True]


def test_published_defaults():
    a = DTreeRPO()
    assert (a.num_iterations, a.clip_low, a.clip_high, a.kl, a.kl_coef) == (12, 0.4, 0.4, "k3", 0.01)
    assert (a.distill_coef, a.distill_growth, a.distill_temperature, a.distill_decay) == (3e-3, 2.0, 2.0, 0.7)
    assert (a.advantage, a.negative_scale, a.count_positions) == ("group_centered", 1.0, "to_eos")
    assert a.strategies == ("tree",) and a.is_row_separable and a.needs.order and a.needs.old and a.needs.ref
    assert not DTreeRPO(kl_coef=0.0).needs.ref
    assert not {"fresh_masks", "share_masks", "num_masks"} & {f.name for f in fields(a)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distill_coef": -1.0}, r"algorithm.distill_coef = -1.0: .*Use 0"),
        ({"distill_coef": math.inf}, r"algorithm.distill_coef = inf: "),
        ({"distill_growth": 0.0}, r"algorithm.distill_growth = 0.0: .*Use 2"),
        ({"distill_growth": 100.5}, r"algorithm.distill_growth = 100.5: "),
        ({"distill_temperature": 0.0}, r"algorithm.distill_temperature = 0.0: .*above 0"),
        ({"distill_temperature": math.inf}, r"algorithm.distill_temperature = inf: "),
        ({"distill_decay": -0.5}, r"algorithm.distill_decay = -0.5: "),
        ({"distill_decay": math.inf}, r"algorithm.distill_decay = inf: "),
        ({"clip_low": 1.5}, r"algorithm.clip_low = 1.5: "),
        ({"clip_high": -0.1}, r"algorithm.clip_high = -0.1: "),
        ({"num_iterations": 0}, r"algorithm.num_iterations = 0: "),
    ],
)
def test_bad_fields_are_refused_with_the_way_out(changed, message):
    with pytest.raises(ConfigError, match=message):
        DTreeRPO(**changed)


def test_a_single_child_has_no_siblings():
    with pytest.raises(ConfigError, match="group_size must be >= 2"):
        DTreeRPO().advantages(torch.ones(1), torch.zeros(1))
