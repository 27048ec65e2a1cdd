"""Inputs of the objective tests: three tabular models, four rollouts, and a comparison with an oracle."""

from __future__ import annotations

import torch

from tests.oracles import make_rollouts, score_copies
from tests.toys import TabularPolicy
from unmask.noise import Noise
from unmask.types import LossInputs

NOISE = Noise(seed=0)
POLICY, OLD, REF = (TabularPolicy(length=4, seed=seed) for seed in (10, 11, 12))
ROLLOUTS = make_rollouts(
    torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 0, 0], [0, 2, 0, 1]]),
    groups=[0, 0, 1, 1],
    rewards=[1.0, 0.25, 0.0, 2.0],
    length=[4, 3, 1, 2],
)


def inputs(algorithm, policy=POLICY, old=OLD, ref=REF, rollouts=ROLLOUTS, noise=NOISE, iteration=0):
    """LossInputs of three models, scored without any of the library's code; one set of draws, or one for each."""
    draws = [
        algorithm.draw(rollouts, noise=noise.stream(name), iteration=iteration) for name in ("policy", "old", "ref")
    ]
    shared = algorithm.share_masks
    old_draw, ref_draw = (None, None) if shared else draws[1:]
    return LossInputs(
        logps=score_copies(policy, rollouts, draws[0]),
        corruption=draws[0],
        advantages=algorithm.advantages(rollouts.rewards, rollouts.groups),
        rewards=rollouts.rewards,
        groups=rollouts.groups,
        length=rollouts.length,
        old_logps=score_copies(old, rollouts, old_draw or draws[0]).detach(),
        ref_logps=score_copies(ref, rollouts, ref_draw or draws[0]).detach(),
        old_corruption=old_draw,
        ref_corruption=ref_draw,
    )


def assert_same_value_and_gradient(loss, expected, policy):
    assert abs((loss - expected).item()) < 1e-10
    ours, theirs = (torch.autograd.grad(value, policy.table, retain_graph=True)[0] for value in (loss, expected))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    assert theirs.abs().max() > 1e-4  # there is a gradient to compare
