"""Dream's sampler: the published pace, equality with the published rules on shared uniforms, and enumerated laws."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, permutations, product

import pytest
import torch
from torch import Tensor

from tests.reference_samplers import reference_dream
from tests.toys import TabularPolicy
from tests.toys_network import ToyTransformer, chi_square_p, prompt_batch, random_prompts
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.samplers import Dream
from unmask.samplers.dream import ALGS, cut
from unmask.samplers.plan import time_grid_counts, time_grid_shares
from unmask.types import PromptBatch

NOISE = Noise(seed=0).stream("rollout")


# ---- the pace


def test_the_pace_is_the_published_one():
    # 4 tokens, 4 steps, times 1, .75025, .5005, .25075, .001: shares .24975, .33289, .49900, 1 of 4, 4, 3, 2 tokens:
    # .999, 1.33, 1.497 and all
    assert time_grid_counts(4, 4) == [0, 1, 1, 2]
    # 8 tokens, 3 steps, times 1, .667, .334, .001: shares .333, .49925, 1 of 8, 6, 4 tokens: 2.664, 2.9955 and all
    assert time_grid_counts(8, 3) == [2, 2, 4]
    assert time_grid_counts(5, 1) == [5]
    for length in (24, 128, 256, 512):
        counts = time_grid_counts(length, length)
        assert counts[0] == 0 and sum(counts) == length and counts[-1] == 2  # the missing one is made up for at the end
        half = time_grid_counts(length, length // 2)
        assert sum(half) == length and half[0] == 1 and half[-1] == 3


def test_the_pace_is_that_of_exact_arithmetic_up_to_float32_at_an_integer():
    for length, steps in [(n, s) for n in range(1, 40) for s in range(1, n + 1)] + [(256, 256), (256, 128), (512, 256)]:
        times = [1 - Fraction(999, 1000) * i / steps for i in range(steps + 1)]
        left, exact = length, []
        for i in range(steps):
            share = 1 - times[i + 1] / times[i] if i < steps - 1 else Fraction(1)
            exact.append(int(left * share))
            left -= exact[-1]
        assert time_grid_counts(length, steps) == exact


# ---- against the published rules


SETTINGS = [
    pytest.param({"temperature": 0.0}, id="greedy"),
    pytest.param({"temperature": 0.0, "top_p": 0.6}, id="greedy-top_p"),
    pytest.param({"temperature": 0.9, "top_p": 0.95}, id="training"),
    pytest.param({"temperature": 0.1, "top_p": 0.95}, id="evaluation"),
    pytest.param({"temperature": 1.3, "top_p": 0.8, "top_k": 3}, id="top_p-top_k"),
    pytest.param({"temperature": 1.0, "top_k": 2}, id="top_k"),
]


@pytest.mark.parametrize("alg", ALGS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_and_steps_are_those_of_the_published_rules(alg, settings):
    settings = {"top_p": None, "alg": alg, **settings}
    for length, steps in ((8, 8), (9, 4), (6, 1)):
        policy, prompts = ToyTransformer(seed=length), prompt_batch(random_prompts(6, seed=steps))
        ids, fixed_at = reference_dream(policy, prompts, length, steps, noise=NOISE, **settings)
        samples = Dream(length, num_steps=steps, **settings).sample(policy, prompts, noise=NOISE)
        assert torch.equal(samples.completion_ids, ids)
        assert torch.equal(samples.reveal_step, fixed_at)
        assert samples.nfe.tolist() == [steps] * 6


@pytest.mark.parametrize("alg", ALGS[1:])
@pytest.mark.parametrize("alg_temp", [0.05, 0.5, 5.0])
def test_drawn_positions_are_those_of_the_published_rule(alg, alg_temp):
    settings = {"alg": alg, "alg_temp": alg_temp, "temperature": 0.7, "top_p": 0.9}
    policy, prompts = ToyTransformer(seed=2), prompt_batch(random_prompts(6, seed=3))
    ids, fixed_at = reference_dream(policy, prompts, 9, 5, noise=NOISE, **settings)
    samples = Dream(9, num_steps=5, **settings).sample(policy, prompts, noise=NOISE)
    assert torch.equal(samples.completion_ids, ids) and torch.equal(samples.reveal_step, fixed_at)
    surest = Dream(9, num_steps=5, **{**settings, "alg_temp": 0.0}).sample(policy, prompts, noise=NOISE)
    assert not torch.equal(samples.reveal_step, surest.reveal_step)


def test_the_rules_differ_from_each_other():
    policy, prompts = ToyTransformer(seed=1), prompt_batch(random_prompts(16, seed=0))
    steps = [
        Dream(8, alg=alg, temperature=0.9, num_steps=4).sample(policy, prompts, noise=NOISE).reveal_step for alg in ALGS
    ]
    assert all(not torch.equal(a, b) for a, b in combinations(steps, 2))


def test_slicing_rows_changes_nothing(monkeypatch):
    policy, prompts = ToyTransformer(seed=1), prompt_batch(random_prompts(4, seed=0))
    for alg in ALGS:
        sampler = Dream(7, alg=alg, temperature=0.9, num_steps=3)
        monkeypatch.undo()
        expected = sampler.sample(policy, prompts, noise=NOISE)
        monkeypatch.setattr("unmask.samplers.dream._SLICE_NUMBERS", 30)
        got = sampler.sample(policy, prompts, noise=NOISE)
        assert torch.equal(got.completion_ids, expected.completion_ids)
        assert torch.equal(got.reveal_step, expected.reveal_step) and torch.equal(got.logps, expected.logps)


# ---- cutting


def test_cut_by_hand():
    law = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)

    def kept(top_p, top_k):
        return cut(law.log(), top_p, top_k).isfinite()[0].nonzero()[:, 0].tolist()

    assert kept(None, None) == kept(1.0, None) == kept(None, 4) == kept(None, 99) == [0, 1, 2, 3]
    assert kept(0.4, None) == [1]  # the first is kept though it alone holds more
    assert kept(0.6, None) == [1, 3]
    assert kept(0.76, None) == [1, 2, 3]
    assert kept(None, 2) == [1, 3] and kept(0.4, 2) == [1] and kept(0.95, 1) == [1]
    assert torch.equal(cut(law.log(), 0.6, None)[0, [1, 3]], law.log()[0, [1, 3]])


# ---- enumerated laws


def bare_prompts(num_rows: int) -> PromptBatch:
    key = torch.arange(num_rows)
    return PromptBatch(key[:, None] * 0, key[:, None] >= 0, key, key * 0)


def observed(sampler: Dream, policy: TabularPolicy, num_rows: int = 40_000) -> Tensor:
    """How often each of the V^L completions came, (V^L,), in the order of `product`."""
    completions = sampler.sample(policy, bare_prompts(num_rows), noise=NOISE).completion_ids
    place = policy.vocab ** torch.arange(policy.length - 1, -1, -1)
    return (completions * place).sum(1).bincount(minlength=policy.vocab**policy.length).double()


def chosen_sets(masked: list[int], count: int, confidence: dict[int, float], rule: str, share: float, alg_temp: float):
    """(positions, probability) of every set that a step may fix."""
    if rule == "origin":
        for size in range(len(masked) + 1):
            for chosen in combinations(masked, size):
                yield chosen, share**size * (1 - share) ** (len(masked) - size)
    elif alg_temp == 0:
        yield tuple(sorted(masked, key=lambda i: -confidence[i])[:count]), 1.0
    else:
        weight = dict(
            zip(masked, torch.tensor([confidence[i] / alg_temp for i in masked]).double().exp().tolist(), strict=True)
        )
        for order in permutations(masked, count):
            chance, total = 1.0, sum(weight.values())
            for i in order:
                chance, total = chance * weight[i] / total, total - weight[i]
            yield order, chance


def stepwise_law(policy: TabularPolicy, num_steps: int, temperature: float, rule: str, alg_temp: float) -> Tensor:
    """p(y) of every completion, (V^L,), by following every outcome of every step."""
    states = {(policy.mask_token_id,) * policy.length: 1.0}
    pace = zip(time_grid_counts(policy.length, num_steps), time_grid_shares(num_steps).tolist(), strict=True)
    for count, share in pace:
        after: dict[tuple[int, ...], float] = {}
        for state, weight in states.items():
            law = (policy(torch.tensor([state]))[0, :, : policy.vocab].detach() / temperature).softmax(-1)
            masked = [i for i, token in enumerate(state) if token == policy.mask_token_id]
            margin = law.topk(2).values.diff().neg()[:, 0].tolist()
            sureness = {"topk_margin": margin, "entropy": (law * law.log()).sum(-1).tolist()}
            for tokens in product(range(policy.vocab), repeat=len(masked)):
                drawn = dict(zip(masked, tokens, strict=True))
                chance = weight
                for i, token in drawn.items():
                    chance *= float(law[i, token])
                confidence = {i: sureness[rule][i] if rule in sureness else float(law[i, drawn[i]]) for i in masked}
                for chosen, probability in chosen_sets(masked, count, confidence, rule, share, alg_temp):
                    new = tuple(drawn[i] if i in chosen else token for i, token in enumerate(state))
                    after[new] = after.get(new, 0.0) + chance * probability
        states = after
    every = product(range(policy.vocab), repeat=policy.length)
    return torch.tensor([states.get(y, 0.0) for y in every], dtype=torch.float64)


CASES = [("origin", 0.0), ("maskgit_plus", 0.0), ("topk_margin", 0.0), ("entropy", 0.0), ("entropy", 0.3)]


@pytest.mark.parametrize(("rule", "alg_temp"), CASES)
def test_completions_follow_the_law_of_their_rule(rule, alg_temp):
    policy = TabularPolicy(vocab=3, length=3, scale=2.0, seed=6)  # entropy and margin differ in the first step
    sampler = Dream(3, num_steps=2, alg=rule, temperature=2.5, top_p=None, alg_temp=alg_temp)
    seen = observed(sampler, policy)
    for other, other_temp in CASES:
        law = stepwise_law(policy, 2, 2.5, other, other_temp)
        assert abs(float(law.sum()) - 1) < 1e-12
        assert (chi_square_p(seen, law) > 1e-4) == ((other, other_temp) == (rule, alg_temp))


def test_origin_may_fix_none_or_several_tokens_in_a_step_and_always_ends():
    prompts = prompt_batch([[1]] * 64, keys=range(64))
    samples = Dream(6, alg="origin").sample(ToyTransformer(), prompts, noise=NOISE)
    sizes = torch.stack([row.bincount(minlength=6) for row in samples.reveal_step])
    assert sizes.sum(1).eq(6).all() and (sizes == 0).any() and (sizes > 1).any()


# ---- settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alg": "entrophy"}, r"^sampler.alg = 'entrophy': must be one of origin, maskgit_plus, topk_margin, entropy"),
        ({"top_p": 0.0}, r"^sampler.top_p = 0.0: must be above 0 and at most 1, or none\. Try 0.95\.$"),
        ({"top_p": 1.01}, r"^sampler.top_p = 1.01: "),
        ({"top_p": float("nan")}, r"^sampler.top_p = nan: "),
        ({"top_k": 0}, r"^sampler.top_k = 0: must be at least 1, or none\. Try 50\.$"),
        ({"alg_temp": -1.0}, r"^sampler.alg_temp = -1.0: must be finite and not negative"),
        ({"alg_temp": 0.5, "alg": "origin"}, r"^sampler.alg_temp = 0.5: alg 'origin' has no confidence"),
        ({"num_steps": 9}, r"^sampler.num_steps = 9: steps beyond .* Try 8\.$"),
        ({"num_steps": 0}, r"^sampler.num_steps = 0: "),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Dream(8, **wrong)
