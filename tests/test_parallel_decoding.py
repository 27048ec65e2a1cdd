"""Threshold, factor and entropy decoding, guidance, early stops and caches of the low-confidence sampler."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.helpers import tiny_policy
from tests.reference_samplers import reference_parallel
from tests.test_all_samplers import assert_same_tokens, count_calls
from tests.toys_network import ToyTransformer, prompt_batch, random_prompts
from unmask.errors import ConfigError, ModelError
from unmask.models import load
from unmask.noise import Noise
from unmask.samplers import LowConfidence
from unmask.samplers.reveal import above, negative_entropies, surest, within_entropy, within_factor
from unmask.types import take_rows

NOISE = Noise(seed=3).stream("rollout")
LENGTH, BLOCK = 12, 4

RULES = {
    "threshold": ({"threshold": 0.5}, lambda c, _: max(1, sum(x >= 0.5 for x in c))),
    "factor": ({"factor": 1.2}, lambda c, _: max(1, _while([(k + 2) * (1 - x) <= 1.2 for k, x in enumerate(c)]))),
    "entropy": ({"entropy_bound": 2.0}, lambda _, laws: _fitting(laws, 2.0)),
}
"""Fields, and how many of the candidates, from the surest down, a step fixes: written anew, one row at a time."""


def _while(flags: list[bool]) -> int:
    return next((n for n, flag in enumerate(flags) if not flag), len(flags))


def _fitting(laws: list[torch.Tensor], bound: float) -> int:
    entropies = [-float(torch.special.xlogy(law, law).sum()) for law in laws]
    return max(n for n in range(1, len(laws) + 1) if n == 1 or sum(entropies[:n]) - max(entropies[:n]) <= bound)


# ---- rules


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("block", [12, 4, 1])
def test_rules_are_those_of_the_plain_loops(name, block):
    fields, chosen = RULES[name]
    policy, prompts = ToyTransformer(seed=7), prompt_batch(random_prompts(40, seed=block))
    ids, fixed_at, forwards = reference_parallel(policy, prompts, LENGTH, block, chosen, by_entropy=name == "entropy")
    samples = LowConfidence(LENGTH, block, **fields).sample(policy, prompts, noise=NOISE)
    assert torch.equal(samples.completion_ids, ids)
    assert torch.equal(samples.reveal_step, fixed_at)
    assert torch.equal(samples.nfe, forwards)
    assert block == 1 or len(forwards.unique()) > 1  # rows do not need equally many


@pytest.mark.parametrize("fields", [{"threshold": 1.5}, {"factor": 0.0}])
def test_a_bound_that_none_reaches_is_one_token_per_step(fields):
    policy, prompts = ToyTransformer(seed=1), prompt_batch(random_prompts(20, seed=3))
    plain = LowConfidence(LENGTH, BLOCK).sample(policy, prompts, noise=NOISE)
    assert_same_tokens(LowConfidence(LENGTH, BLOCK, **fields).sample(policy, prompts, noise=NOISE), plain)


@pytest.mark.parametrize("fields", [{"threshold": 0.0}, {"factor": 100.0}, {"entropy_bound": 1e6}])
def test_a_bound_that_all_reach_is_a_block_per_step(fields):
    policy, prompts = ToyTransformer(seed=1), prompt_batch(random_prompts(20, seed=3))
    plain = LowConfidence(LENGTH, BLOCK, num_steps=3).sample(policy, prompts, noise=NOISE)
    assert_same_tokens(LowConfidence(LENGTH, BLOCK, **fields).sample(policy, prompts, noise=NOISE), plain)


def test_rules_by_hand():
    closed = -math.inf
    sure = torch.tensor([[0.95, closed, 0.9, 0.2], [0.1, 0.3, closed, 0.3], [closed] * 4])
    assert surest(sure, 2).tolist() == [[True, False, True, False], [False, True, False, True], [False] * 4]
    assert above(sure, 0.9).tolist() == [[True, False, True, False], [False, True, False, False], [False] * 4]
    # 2 · 0.05 and 3 · 0.1 are within 0.31, 4 · 0.8 is not; the last of all failing alone is not taken either
    assert within_factor(sure, 0.31).tolist() == [[True, False, True, False], [False, True, False, False], [False] * 4]
    # entropies 0.1, 0.4 and 0.5: the first alone is free, then 0.1, then 0.5 nats
    entropy = torch.tensor([[-0.4, -0.1, closed, -0.5]])
    for bound, wanted in [(0.0, [0, 1, 0, 0]), (0.11, [1, 1, 0, 0]), (0.49, [1, 1, 0, 0]), (0.51, [1, 1, 0, 1])]:
        assert within_entropy(entropy, bound).int().tolist() == [wanted]


def test_entropies_leave_forbidden_tokens_out():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [5.0, -math.inf, -math.inf]])
    assert torch.allclose(negative_entropies(logits), torch.tensor([-math.log(2), 0.0]))


# ---- invariance

VARIANTS = {
    "threshold": {"threshold": 0.4},
    "factor": {"factor": 1.0},
    "entropy": {"entropy_bound": 2.0},
    "guidance": {"guidance": 0.7},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "dual-threshold": {"cache": "dual", "threshold": 0.4},
    "prefix-factor": {"cache": "prefix", "factor": 1.0, "refresh_every": 2},
}
FAMILIES = ("tiny", "llada", "Dream")


@cache
def model(family: str, folder: str):
    """A tiny float64 model of a family."""
    if family == "tiny":
        return tiny_policy(seed=4)
    write_checkpoint(family, folder)
    return load(folder, dtype=torch.float64)


@pytest.fixture
def policy(request, tmp_path_factory):
    found = model(request.param, tmp_path_factory.getbasetemp() / f"parallel-{request.param}")
    found.stop_token_ids = ()
    return found


every_family = pytest.mark.parametrize("policy", FAMILIES, indirect=True)


def prompts_for(policy, rows: int, seed: int = 0, **more):
    ordinary = [i for i in range(3, 14) if i not in (policy.mask_token_id, policy.pad_token_id)]
    lists = [[ordinary[t % len(ordinary)] for t in row] for row in random_prompts(rows, seed=seed)]
    return lists, prompt_batch(lists, **more)


@every_family
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_the_same_in_any_company_order_and_padding(policy, variant, temperature):
    sampler = LowConfidence(LENGTH, BLOCK, temperature=temperature, **VARIANTS[variant])
    lists, prompts = prompts_for(policy, 16, seed=5)
    together = sampler.sample(policy, prompts, noise=NOISE)
    for i in (0, 7, 15):
        alone = sampler.sample(policy, prompt_batch([lists[i]], keys=[i]), noise=NOISE)
        assert_same_tokens(alone, take_rows(together, slice(i, i + 1)))
    backwards = list(range(15, -1, -1))
    turned = sampler.sample(policy, prompt_batch(lists[::-1], extra_pads=3, keys=backwards), noise=NOISE)
    assert_same_tokens(turned, take_rows(together, torch.tensor(backwards)))


@every_family
@pytest.mark.parametrize("variant", VARIANTS)
def test_nfe_counts_the_forwards_of_a_row_and_every_slot_is_fixed_once(policy, variant):
    sampler = LowConfidence(LENGTH, BLOCK, **VARIANTS[variant])
    _, prompts = prompts_for(policy, 6)
    states: list[torch.Tensor] = []
    samples = sampler.sample(policy, prompts, noise=NOISE, on_step=states.append)
    factor = 2 if sampler.guidance else 1
    assert torch.equal(samples.nfe, (samples.reveal_step.amax(1) + 1) * factor)
    masks = [(state[:, -LENGTH:] == policy.mask_token_id) for state in states]
    assert all((later <= earlier).all() for earlier, later in pairwise(masks)) and not masks[-1].any()
    assert torch.equal(states[-1][:, :-LENGTH], prompts.prompt_ids)
    assert (samples.reveal_step[:, :BLOCK].amax(1) < samples.reveal_step[:, BLOCK : 2 * BLOCK].amin(1)).all()


def test_rows_that_are_done_leave_the_batch():
    policy, sampler = ToyTransformer(seed=7), LowConfidence(LENGTH, BLOCK, threshold=0.5)
    calls = count_calls(policy)
    samples = sampler.sample(policy, prompt_batch(random_prompts(20, seed=4)), noise=NOISE)
    assert sum(len(call["canvas"]) for call in calls) == int(samples.nfe.sum()) < 20 * len(calls)


# ---- caches


class StaleForward:
    """A forward of the whole canvas, in which keys and values outside of the window are those of an earlier one.

    Written with hooks on the projections, so it shares nothing with the cache that it is the measure of.
    """

    def __init__(self, policy, kind: str):
        self.policy, self.kind, self.kept, self.window = policy, kind, {}, None
        modules = [m for n, m in policy.module.named_modules() if n.endswith(("k_proj", "v_proj"))]
        self.handles = [m.register_forward_hook(partial(self._hook, number)) for number, m in enumerate(modules)]

    def _hook(self, number, module, inputs, output):
        if self.window is None:
            self.kept[number] = output.clone()
            return output
        fresh = torch.zeros_like(output, dtype=torch.bool)
        fresh[:, self.window.start : self.window.stop] = True
        return output.where(fresh, self.kept[number])

    def __call__(self, ids, seen, whole, block):
        every = torch.ones_like(seen)
        if block is None:
            self.window = None
            return self.policy.token_outputs(ids, seen, every).logits
        start = max(block.start - self.policy.lookback, 0)
        self.window = range(start, block.stop if self.kind == "dual" else ids.shape[1])
        return self.policy.token_outputs(ids, seen, every).logits

    def close(self):
        for handle in self.handles:
            handle.remove()


@every_family
@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("block", [4, 6, 12])
def test_cached_decoding_is_that_of_stale_keys_and_values(policy, kind, block):
    _, prompts = prompts_for(policy, 12, seed=block)  # unequal lengths, so rows have pads
    oracle = StaleForward(policy, kind)
    ids, fixed_at, _ = reference_parallel(policy, prompts, LENGTH, block, lambda c, _: 1, windows=oracle)
    oracle.close()
    samples = LowConfidence(LENGTH, block, cache=kind).sample(policy, prompts, noise=NOISE)
    assert torch.equal(samples.completion_ids, ids)
    assert torch.equal(samples.reveal_step, fixed_at)


@every_family
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_window_read_right_after_the_whole_canvas_has_its_logits(policy, kind):
    _, prompts = prompts_for(policy, 5)
    ids = torch.cat([prompts.prompt_ids, torch.full((5, LENGTH), policy.mask_token_id)], 1)
    seen = torch.cat([prompts.prompt_mask, torch.ones(5, LENGTH, dtype=torch.bool)], 1)
    start, stop = ids.shape[1] - 8, ids.shape[1] - 4
    wanted = torch.zeros_like(seen)
    wanted[:, start:stop] = True
    with torch.no_grad():
        expected = policy.token_outputs(ids, seen, wanted).logits
        kept = policy.new_window_cache(kind == "dual")
        assert torch.equal(policy.token_outputs(ids, seen, wanted, cache=kept).logits, expected)
        window = slice(start - policy.lookback, stop if kind == "dual" else None)
        kept.freeze(window.start)
        again = policy.token_outputs(ids[:, window], seen, wanted[:, window], cache=kept).logits
        finite = expected > -math.inf
        assert torch.allclose(again[finite], expected[finite], rtol=0, atol=1e-10)  # float64, in another shape
        kept.keep(torch.tensor([1, 3]))
        some = torch.tensor([1, 3])
        fewer = policy.token_outputs(ids[some, window], seen[some], wanted[some, window], cache=kept).logits
        part = expected.unflatten(0, (5, 4))[some].flatten(0, 1)
        assert torch.allclose(fewer[finite[:8]], part[finite[:8]], rtol=0, atol=1e-10)


@every_family
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cache_that_is_filled_at_every_step_changes_nothing(policy, kind):
    _, prompts = prompts_for(policy, 8)
    plain = LowConfidence(LENGTH, BLOCK).sample(policy, prompts, noise=NOISE)
    cached = LowConfidence(LENGTH, BLOCK, cache=kind, refresh_every=1).sample(policy, prompts, noise=NOISE)
    assert_same_tokens(cached, plain)


@every_family
def test_windows_are_as_short_as_the_cache_allows(policy):
    _, prompts = prompts_for(policy, 3)
    width = prompts.prompt_ids.shape[1] + LENGTH
    for kind, rest in [("prefix", [LENGTH, LENGTH - BLOCK, BLOCK]), ("dual", [BLOCK] * 3)]:
        calls = count_calls(policy)
        LowConfidence(LENGTH, BLOCK, cache=kind).sample(policy, prompts, noise=NOISE)
        del policy.token_outputs
        widths = [call["canvas"].shape[1] for call in calls]
        assert widths == [w for n in rest for w in [width, *[n + policy.lookback] * (BLOCK - 1)]]


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cache_changes_nothing_where_tokens_do_not_depend_on_each_other(kind):
    policy = tiny_policy(seed=9)
    for layer in policy.module.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    _, prompts = prompts_for(policy, 8)
    plain = LowConfidence(LENGTH, BLOCK).sample(policy, prompts, noise=NOISE)
    assert_same_tokens(LowConfidence(LENGTH, BLOCK, cache=kind).sample(policy, prompts, noise=NOISE), plain)


# ---- guidance


def test_guidance_moves_away_from_what_is_likely_without_the_prompt():
    policy, prompts, w = ToyTransformer(seed=2), prompt_batch(random_prompts(9, seed=1)), 1.5

    def guided(ids, seen, whole, block):
        blind = ids.clone()
        blind[:, :-LENGTH] = policy.mask_token_id
        c, u = (policy.token_outputs(x, seen, torch.ones_like(seen)).logits for x in (ids, blind))
        return torch.where(c.isneginf(), c, (1 + w) * c - w * u)

    ids, fixed_at, forwards = reference_parallel(policy, prompts, LENGTH, BLOCK, lambda c, _: 1, windows=guided)
    samples = LowConfidence(LENGTH, BLOCK, guidance=w).sample(policy, prompts, noise=NOISE)
    assert torch.equal(samples.completion_ids, ids) and torch.equal(samples.reveal_step, fixed_at)
    assert torch.equal(samples.nfe, 2 * forwards)
    plain = LowConfidence(LENGTH, BLOCK).sample(policy, prompts, noise=NOISE)
    assert not torch.equal(plain.completion_ids, ids)


# ---- early stops


@pytest.mark.parametrize("fields", [{}, {"threshold": 0.5}, {"num_steps": 6}])
def test_a_row_is_finished_with_the_block_of_its_stop_token(fields):
    policy, prompts = ToyTransformer(seed=7), prompt_batch(random_prompts(40, seed=2))
    whole = LowConfidence(LENGTH, BLOCK, **fields).sample(policy, prompts, noise=NOISE)
    stops = (5, 2)
    policy.stop_token_ids = stops
    kept = LowConfidence(LENGTH, BLOCK, stop_early=False, **fields).sample(policy, prompts, noise=NOISE)
    assert_same_tokens(kept, whole)
    early = LowConfidence(LENGTH, BLOCK, **fields).sample(policy, prompts, noise=NOISE)
    num_stopped = 0
    for row in range(40):
        tokens, expected = early.completion_ids[row].tolist(), whole.completion_ids[row].tolist()
        first = next((i for i, token in enumerate(expected) if token in stops), LENGTH)
        end = min(first // BLOCK * BLOCK + BLOCK, LENGTH)
        assert tokens[:end] == expected[:end] and tokens[end:] == [stops[0]] * (LENGTH - end)
        assert early.nfe[row] == whole.reveal_step[row, :end].max() + 1
        assert (early.reveal_step[row, end:] == early.nfe[row]).all() and not early.logps[row, end:].any()
        num_stopped += end < LENGTH
    assert num_stopped > 10 and early.nfe.sum() < whole.nfe.sum()


def test_a_caches_rows_leave_it_when_they_stop():
    policy = tiny_policy(seed=4)
    _, prompts = prompts_for(policy, 12)
    policy.stop_token_ids = ()
    whole = LowConfidence(LENGTH, BLOCK, cache="dual").sample(policy, prompts, noise=NOISE)
    first = [set(row.tolist()) for row in whole.completion_ids[:, :BLOCK]]
    some = next(token for token in range(20) if 3 <= sum(token in row for row in first) <= 9)
    policy.stop_token_ids = (some,)
    early = LowConfidence(LENGTH, BLOCK, cache="dual").sample(policy, prompts, noise=NOISE)
    lists, _ = prompts_for(policy, 12)
    for row in (0, 5, 11):
        alone = LowConfidence(LENGTH, BLOCK, cache="dual").sample(
            policy, prompt_batch([lists[row]], keys=[row]), noise=NOISE
        )
        assert_same_tokens(alone, take_rows(early, slice(row, row + 1)))
    assert early.nfe.min() < early.nfe.max()


# ---- refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": 0.9, "factor": 1.0}, "sampler.threshold and sampler.factor: each says"),
        ({"threshold": -0.1}, "sampler.threshold = -0.1: must be at least 0"),
        ({"entropy_bound": float("nan")}, "sampler.entropy_bound = nan"),
        ({"factor": float("inf")}, "sampler.factor = inf"),
        ({"cache": "double"}, "sampler.cache = 'double': must be one of none, prefix, dual"),
        ({"refresh_every": 2}, "sampler.refresh_every = 2: at least 1, and with sampler.cache"),
        ({"cache": "dual", "refresh_every": 0}, "sampler.refresh_every = 0"),
        ({"guidance": -1.0}, "sampler.guidance = -1.0"),
        ({"guidance": 1.0, "cache": "dual"}, "guidance reads the canvas twice"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LowConfidence(LENGTH, BLOCK, **fields)


def test_a_family_without_windows_is_refused():
    policy = tiny_policy()
    policy.lookback = None
    with pytest.raises(ModelError, match=r"cannot read a window of its text alone. Set sampler.cache = 'none'"):
        LowConfidence(8, 4, cache="dual").sample(policy, prompt_batch([[9, 9]]), noise=NOISE)


def test_only_the_paced_rule_can_begin_in_the_middle():
    assert LowConfidence(8).continues and LowConfidence(8, num_steps=4).total_steps == 4
    for fields in ({"threshold": 0.9}, {"cache": "dual"}, {"guidance": 1.0}):
        assert not LowConfidence(8, **fields).continues
    assert replace(LowConfidence(8, num_steps=4), threshold=0.9).total_steps == 8
