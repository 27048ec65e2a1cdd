"""Greedy decoding without cache or threshold writes the tokens of the plain published rules, on LLaDA and Dream."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.reference_samplers import reference_dream, reference_low_confidence
from tests.toys_network import prompt_batch, random_prompts
from unmask.models import load
from unmask.noise import Noise
from unmask.samplers import Dream, LowConfidence
from unmask.samplers.dream import ALGS
from unmask.types import take_rows

NOISE = Noise(seed=1).stream("rollout")
counts = pytest.mark.parametrize("num_prompts", [6, pytest.param(200, marks=pytest.mark.slow)])


@pytest.fixture(scope="module", params=["llada", "Dream"])
def policy(request, tmp_path_factory):
    """A tiny random checkpoint of the authors' format, in float64; no stop token, so that nothing ends early."""
    found = load(write_checkpoint(request.param, tmp_path_factory.mktemp("published")), dtype=torch.float64)
    found.stop_token_ids = ()
    return found


def prompts(num_prompts: int, seed: int):
    return prompt_batch([[50 + token for token in row] for row in random_prompts(num_prompts, seed=seed, longest=20)])


def num_equal(policy, sampler, batch, expected) -> int:
    """Rows whose tokens and steps are the expected ones at batch sizes 1 and 16, in the padding of the whole batch."""
    ids, fixed_at = expected
    equal = torch.ones(len(batch), dtype=torch.bool)
    for size in (1, 16):
        for first in range(0, len(batch), size):
            part = slice(first, first + size)
            samples = sampler.sample(policy, take_rows(batch, part), noise=NOISE)
            equal[part] &= (samples.completion_ids == ids[part]).all(1) & (samples.reveal_step == fixed_at[part]).all(1)
    return int(equal.sum())


@counts
@pytest.mark.parametrize("lengths", [(8, 8, 8), (12, 4, 6), (9, 3, 9), (16, 8, 4)])
def test_low_confidence(policy, num_prompts, lengths):
    batch = prompts(num_prompts, seed=lengths[0])
    expected = reference_low_confidence(policy, batch.prompt_ids, batch.prompt_mask, *lengths)
    assert num_equal(policy, LowConfidence(*lengths), batch, expected) == num_prompts


@counts
@pytest.mark.parametrize("lengths", [(8, 8), (9, 4)])
@pytest.mark.parametrize("alg", ALGS)
def test_dream(policy, num_prompts, alg, lengths):
    length, steps = lengths
    batch = prompts(num_prompts, seed=steps)
    with torch.no_grad():
        expected = reference_dream(policy, batch, length, steps, noise=NOISE, alg=alg)
    sampler = Dream(length, steps, alg, temperature=0.0, top_p=None)
    assert num_equal(policy, sampler, batch, expected) == num_prompts
