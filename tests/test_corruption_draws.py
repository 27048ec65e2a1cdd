"""Draws of the published objectives, each against a loop over keyed uniforms, and what belongs to a row."""

import math
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch

from tests.oracles import chi_square, chi_square_limit, conditionals, elbo_dp, make_rollouts
from tests.test_corruption import NOISE, OneDevice, loop_subset, mixed_rollouts, rounded, true_places
from tests.toys import TabularPolicy
from unmask.corruption import (
    draw_blocks,
    draw_coupled_tokens,
    draw_quadrature,
    draw_rising_ratio,
    quadrature_rule,
)
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.types import take_rows


def quadrature(rollouts, noise=NOISE, masking="exact_count", count_positions="to_eos"):
    return draw_quadrature(
        rollouts,
        rule="gauss_legendre",
        num_nodes=3,
        num_masks_per_node=2,
        masking=masking,
        count_positions=count_positions,
        noise=noise,
    )


def bernoulli(rollouts, noise=NOISE):
    return quadrature(rollouts, noise, masking="bernoulli")


def coupled(rollouts, noise=NOISE, low=0.2, high=0.8, count_positions="to_eos"):
    return draw_coupled_tokens(
        rollouts, min_mask_ratio=low, max_mask_ratio=high, count_positions=count_positions, noise=noise
    )


def rising(rollouts, noise=NOISE, iteration=1, num_iterations=4, num_timesteps=1000, count_positions="to_eos"):
    return draw_rising_ratio(
        rollouts,
        iteration=iteration,
        num_iterations=num_iterations,
        num_timesteps=num_timesteps,
        count_positions=count_positions,
        noise=noise,
    )


def blocks(rollouts, noise=NOISE, num_masks=3, block_length=2, clean=0.4, scored="block", count_positions="to_eos"):
    return draw_blocks(
        rollouts,
        num_masks,
        block_length=block_length,
        clean_mask_ratio=clean,
        scored_positions=scored,
        count_positions=count_positions,
        noise=noise,
    )


def read_all(rollouts, noise=NOISE):
    return blocks(rollouts, noise, scored="masked")


DRAWS = {draw.__name__: draw for draw in (quadrature, bernoulli, coupled, rising, blocks, read_all)}


def keys(rollouts):
    return list(enumerate(zip(rollouts.prompt_key.tolist(), rollouts.rollout_index.tolist(), strict=True)))


# --- common to all ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWS)
def test_draws_belong_to_their_row(name):
    """Permuted rows, and (but for the batch's ratio of the coupled draw) rows alone, are masked alike."""
    rollouts, order = mixed_rollouts(), torch.tensor([5, 1, 0, 4, 2, 3])
    whole, permuted = DRAWS[name](rollouts), DRAWS[name](take_rows(rollouts, order))
    assert torch.equal(permuted.masked, whole.masked[order]) and torch.equal(permuted.weight, whole.weight[order])
    for row in [] if name == "coupled" else range(6):
        single = DRAWS[name](take_rows(rollouts, torch.tensor([row])))
        for field in ("masked", "scored", "weight"):
            assert torch.equal(getattr(single, field)[0], getattr(whole, field)[row])
    assert len({tuple(m.flatten().tolist()) for m in whole.masked}) >= 5  # rows differ from each other


@pytest.mark.parametrize("name", DRAWS)
def test_draws_do_not_depend_on_left_padding(name):
    rollouts = mixed_rollouts()
    wider = replace(
        rollouts,
        prompt_ids=torch.ones(6, 11, dtype=torch.int64),
        prompt_mask=torch.cat([torch.zeros(6, 3, dtype=torch.bool), rollouts.prompt_mask], dim=1),
    )
    narrow, wide = DRAWS[name](rollouts), DRAWS[name](wider)
    assert torch.equal(wide.masked[..., 3:], narrow.masked)
    assert not wide.masked[..., :3].any()


@pytest.mark.parametrize("name", DRAWS)
def test_draws_stay_on_the_device_of_the_rollouts(name):
    rollouts = mixed_rollouts()
    tensors = {f.name: getattr(rollouts, f.name) for f in fields(rollouts)}
    there = replace(rollouts, **{k: v.to("meta") for k, v in tensors.items() if isinstance(v, torch.Tensor)})
    corruption = DRAWS[name](there, OneDevice(NOISE, "meta"))
    assert {t.device.type for t in (corruption.masked, corruption.scored, corruption.weight)} == {"meta"}
    assert corruption.masked.shape == DRAWS[name](rollouts).masked.shape


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_read_is_masked_weighed_and_before_the_stop_token(name):
    rollouts = mixed_rollouts()
    corruption = DRAWS[name](rollouts)
    assert corruption.weight.dtype == torch.float64
    assert torch.equal(corruption.weight > 0, corruption.scored)
    assert not (corruption.scored & ~corruption.masked[..., 8:]).any()
    assert not (corruption.scored & (torch.arange(5) >= rollouts.length[:, None, None])).any()


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count_positions", ["all", "to_eos"])
def test_quadrature_equals_a_loop_over_keyed_uniforms(count_positions):
    """Copies 2n and 2n+1 belong to node n; the subset of a copy is keyed by its number."""
    rollouts = mixed_rollouts()
    nodes, weights = quadrature_rule("gauss_legendre", 3)
    exact = quadrature(rollouts, count_positions=count_positions)
    chance = quadrature(rollouts, masking="bernoulli", count_positions=count_positions)
    for row, key in keys(rollouts):
        length = 5 if count_positions == "all" else int(rollouts.length[row])
        for copy in range(6):
            t, w = float(nodes[copy // 2]), float(weights[copy // 2])
            size = max(1, math.floor(t * length + 0.5))
            assert true_places(exact.scored[row, copy]) == loop_subset(size, length, *key, copy)
            found = exact.weight[row, copy][exact.scored[row, copy]]
            assert torch.allclose(found, torch.full_like(found, w / 2 * length / size), rtol=1e-14)
            u = [float(NOISE.stream("bernoulli").uniform(*key, copy, i)) for i in range(length)]
            assert true_places(chance.scored[row, copy]) == {i for i in range(length) if u[i] < t}
            found = chance.weight[row, copy][chance.scored[row, copy]]
            assert torch.allclose(found, torch.full_like(found, w / 2 / t), rtol=1e-14)


def test_coupled_tokens_equal_a_loop_over_keyed_uniforms():
    """t is keyed by the lowest rollout index of the batch, S by row and position."""
    rollouts = mixed_rollouts()
    rollouts = replace(rollouts, rollout_index=rollouts.rollout_index + 70)
    corruption = coupled(rollouts, low=0.3, high=0.4, count_positions="all")
    t = 0.3 + 0.1 * float(NOISE.stream("ratio").uniform(70))
    for row, key in keys(rollouts):
        chosen = {i for i in range(5) if float(NOISE.stream("bernoulli").uniform(*key, 0, i)) < t}
        assert [true_places(m) for m in corruption.masked[row, :, 8:]] == [
            set(range(5)),
            chosen,
            set(range(5)) - chosen,
        ]
        weight = [[0.5] * 5, [0.5 / t if i in chosen else 0.0 for i in range(5)]]
        weight.append([0.0 if i in chosen else 0.5 / (1 - t) for i in range(5)])
        assert torch.allclose(corruption.weight[row], torch.tensor(weight, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_coupled_ratio_covers_its_range_over_batches():
    ratios = []
    for first in range(0, 1600, 4):
        rollouts = mixed_rollouts()
        corruption = coupled(replace(rollouts, rollout_index=rollouts.rollout_index + first), count_positions="all")
        ratios.append(1 / (2 * corruption.weight[:, 1].max().item()) if corruption.scored[:, 1].any() else 0.2)
    assert 0.2 <= min(ratios) < 0.21 and 0.79 < max(ratios) <= 0.8
    assert abs(sum(ratios) / len(ratios) - 0.5) < 4 * (0.6**2 / 12 / len(ratios)) ** 0.5


@pytest.mark.parametrize("count_positions", ["all", "to_eos"])
@pytest.mark.parametrize("num_timesteps", [1000, 7, 1])
@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_rising_ratio_equals_a_loop_over_keyed_uniforms(num_iterations, num_timesteps, count_positions):
    rollouts = mixed_rollouts()
    settings = {"num_iterations": num_iterations, "num_timesteps": num_timesteps, "count_positions": count_positions}
    for iteration in range(num_iterations):
        corruption = rising(rollouts, iteration=iteration, **settings)
        assert corruption.num_masks == 1 and corruption.kind == "random_mask"
        for row, key in keys(rollouts):
            start = math.floor(float(NOISE.stream("start").uniform(*key)) * num_timesteps)
            step = num_timesteps
            if num_iterations > 1:
                step = math.floor(iteration / (num_iterations - 1) * (num_timesteps - start) + start + 1e-9)
            length = 5 if count_positions == "all" else int(rollouts.length[row])
            size = max(1, rounded(step, length, num_timesteps))
            u = [float(NOISE.stream(str(iteration)).stream("subset").uniform(*key, 0, i)) for i in range(length)]
            assert true_places(corruption.scored[row, 0]) == set(sorted(range(length), key=u.__getitem__)[:size])
            assert torch.equal(corruption.weight[row], corruption.scored[row].double())


@pytest.mark.parametrize("scored", ["block", "masked"])
@pytest.mark.parametrize("count_positions", ["all", "to_eos"])
@pytest.mark.parametrize("block_length", [1, 2, 3, 32])
def test_blocks_equal_a_loop_over_keyed_uniforms(block_length, count_positions, scored):
    rollouts = mixed_rollouts()
    corruption = blocks(rollouts, block_length=block_length, count_positions=count_positions, scored=scored)
    for row, key in keys(rollouts):
        length = 5 if count_positions == "all" else int(rollouts.length[row])
        start = int(float(NOISE.stream("level").uniform(*key, 0)) * length)
        for copy in range(3):
            level = (start + rounded(copy, length, 3)) % length
            first = level // block_length * block_length
            inside = range(first, min(first + block_length, length))
            u = {i: float(NOISE.stream("subset").uniform(*key, copy, i)) for i in inside}
            chosen = set(sorted(inside, key=u.__getitem__)[: level % block_length + 1])
            slips = {i for i in range(5) if float(NOISE.stream("clean").uniform(*key, copy, i)) < 0.4}
            later = set(range(first + block_length, 5)) | set(range(length, 5))
            hidden = chosen | later | slips
            assert true_places(corruption.masked[row, copy, 8:]) == hidden
            read = chosen if scored == "block" else {i for i in hidden if i < length}
            assert true_places(corruption.scored[row, copy]) == read
            weight = corruption.weight[row, copy][corruption.scored[row, copy]]
            assert torch.allclose(weight, torch.full_like(weight, length / len(read) / 3), rtol=1e-14)
            prompt = [float(NOISE.stream("prompt").uniform(*key, copy, 7 - i)) < 0.4 for i in range(8)]
            assert corruption.masked[row, copy, :8].tolist() == [
                p and bool(m) for p, m in zip(prompt, rollouts.prompt_mask[row], strict=True)
            ]


@pytest.mark.parametrize(("length", "block_length"), [(4, 2), (4, 3), (4, 32), (3, 2), (4, 1)])
def test_expectation_of_block_draws_is_the_block_elbo(length, block_length):
    """Over the law of one draw (level, then subset of its block), with the weights of real draws; all subsets occur."""
    policy, completion = TabularPolicy(length=length, seed=5), torch.tensor([2, 0, 1, 1])[:length]
    table = conditionals(policy, completion).detach()
    rollouts = make_rollouts(torch.zeros(1500, length, dtype=torch.int64))
    corruption = blocks(rollouts, Noise(3), num_masks=1, block_length=block_length, clean=0.0)
    place, found, counts = 2 ** torch.arange(length), {}, Counter()
    for row in range(1500):
        state = int((corruption.masked[row, 0, 2:] * place).sum())
        chosen = tuple(corruption.scored[row, 0].nonzero().flatten().tolist())
        value = float((corruption.weight[row, 0] * table[state]).sum())
        assert found.setdefault((state, chosen), value) == value
        counts[state, chosen] += 1
    law = {}
    for state, chosen in found:
        first = chosen[0] // block_length * block_length
        width = min(block_length, length - first)
        law[state, chosen] = 1 / length / math.comb(width, len(chosen))
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)  # every outcome was met
    assert chi_square([counts[c] for c in law], list(law.values())) < chi_square_limit(max(1, len(law) - 1))
    mean = sum(law[outcome] * found[outcome] for outcome in law)
    assert mean == pytest.approx(float(elbo_dp(table, block_length)), abs=1e-10)


def test_levels_of_block_draws_are_evenly_spaced():
    """8 tokens in blocks of 4, 4 copies: two in each block, their counts two apart."""
    corruption = blocks(make_rollouts(torch.zeros(50, 8, dtype=torch.int64)), num_masks=4, block_length=4, clean=0.0)
    level = corruption.scored.sum(-1) - 1 + 4 * corruption.scored[..., 4:].any(-1)
    assert torch.equal((level - level[:, :1]) % 8, torch.tensor([0, 2, 4, 6]).expand(50, 4))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda r: coupled(r, low=0.0), "min_mask_ratio = 0.0, max_mask_ratio = 0.8: .*Try 0.2 and 0.8"),
        (lambda r: coupled(r, high=1.0), "max_mask_ratio = 1.0"),
        (lambda r: coupled(r, low=0.9), "min_mask_ratio = 0.9"),
        (lambda r: blocks(r, num_masks=0), "num_masks = 0"),
        (lambda r: blocks(r, block_length=0), "block_length = 0: .*Try 32"),
        (lambda r: blocks(r, clean=1.0), r"mask_ratio = 1.0: .*\[0, 1\)"),
        (lambda r: blocks(r, scored="all"), "scored_positions = 'all': unknown. Use one of: block, masked"),
        (lambda r: rising(r, count_positions="eos"), "count_positions = 'eos'"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(draw, message):
    with pytest.raises(ConfigError, match=message):
        draw(mixed_rollouts())


def test_the_coupled_ratio_may_be_one_number():
    assert coupled(mixed_rollouts(), low=0.5, high=0.5).weight.max().item() == 1.0


class Constant:
    """Noise that is one number everywhere."""

    def stream(self, name):
        return self

    def uniform(self, *coordinates):
        return torch.full(torch.broadcast_shapes(*(c.shape for c in coordinates)), 0.5, dtype=torch.float64)


def test_a_uniform_at_the_ratio_itself_does_not_mask():
    """As for prompts: P(u < t) = t."""
    rollouts = make_rollouts(torch.zeros(2, 4, dtype=torch.int64), prompt=torch.ones(2, 3, dtype=torch.int64))
    settings = {"rule": "gauss_legendre", "num_nodes": 1, "num_masks_per_node": 1, "count_positions": "all"}
    assert not draw_quadrature(rollouts, masking="bernoulli", **settings, noise=Constant()).masked.any()
    assert not coupled(rollouts, Constant(), low=0.5, high=0.5).masked[:, 1].any()
    shown = blocks(rollouts, Constant(), num_masks=1, block_length=4, clean=0.5)
    assert torch.equal(shown.masked[..., 3:], shown.scored) and not shown.masked[..., :3].any()
