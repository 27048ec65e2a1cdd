"""WINO, arXiv:2507.18578: drafting widely, verifying narrowly; a token that does not hold is taken back."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.helpers import tiny_policy
from tests.reference_samplers import reference_wino
from tests.test_all_samplers import assert_same_tokens, count_calls
from tests.toys_network import ToyTransformer, prompt_batch, random_prompts
from unmask.build import train_recipe
from unmask.config import read_recipe
from unmask.counting import evaluation_passes
from unmask.errors import ConfigError, ModelError
from unmask.models import load
from unmask.noise import Noise
from unmask.samplers import LowConfidence, Wino
from unmask.types import take_rows

NOISE = Noise(seed=3).stream("rollout")
RECIPES = Path(__file__).parents[1] / "recipes"
LENGTH, BLOCK = 24, 12
RULES = {"threshold": 0.25, "verify_threshold": 0.4}
"""Untrained models are sure of little."""


def toy_laws(policy: ToyTransformer, canvas: torch.Tensor, block: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the canvas, and of each shadow: one forward with a loop over who sees whom."""
    width, length = len(canvas), len(block)
    sees = [
        [
            query < width or block[query - width] != key if key < width else query >= width
            for key in range(width + length)
        ]
        for query in range(width + length)
    ]
    seen = torch.tensor([sees])
    ids = torch.cat([canvas, torch.full((length,), policy.mask_token_id)])[None]
    places = torch.tensor([[*range(width), *block]])
    logits = policy(ids, seen, position_ids=places)[0]
    logits[:, policy.mask_token_id] = -torch.inf
    laws = logits.softmax(-1)
    return laws[:width], laws[width:]


def llada_laws(policy, canvas: torch.Tensor, block: range) -> tuple[torch.Tensor, torch.Tensor]:
    """As `toy_laws`, through transformers' own backbone, once for each shadow's seat among the others."""
    width, length = len(canvas), len(block)
    allowed = torch.ones(width + length, width + length, dtype=torch.bool)
    allowed[:width, width:] = False
    for number, place in enumerate(block):
        allowed[width + number, place] = False
    ids = torch.cat([canvas, torch.full((length,), policy.mask_token_id)])[None]
    places = torch.tensor([[*range(width), *block]])
    with torch.no_grad():
        hidden = policy.module.model(ids, attention_mask=allowed[None, None], position_ids=places).last_hidden_state
        logits = policy.module.lm_head(hidden)[0]
    logits[:, policy.mask_token_id] = -torch.inf
    laws = logits.softmax(-1)
    return laws[:width], laws[width:]


@pytest.mark.parametrize("block", [24, 12, 8, 1])
def test_tokens_and_forwards_are_those_of_the_plain_loop(block):
    policy, rows = ToyTransformer(seed=7), random_prompts(10, seed=block)
    samples = Wino(LENGTH, block, **RULES).sample(policy, prompt_batch(rows), noise=NOISE)
    num_revoked = 0
    for row, prompt in enumerate(rows):
        with torch.no_grad():
            tokens, forwards, revoked = reference_wino(
                partial(toy_laws, policy), prompt, policy.mask_token_id, LENGTH, block, low=0.25, high=0.4
            )
        assert samples.completion_ids[row].tolist() == tokens
        assert samples.nfe[row] == forwards
        num_revoked += revoked
    assert num_revoked > 10 or block == 1  # else this test would show nothing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llada_reads_its_shadows_as_transformers_own_backbone_does(tmp_path, attention):
    write_checkpoint("llada", tmp_path / "model")
    policy = load(tmp_path / "model", dtype=torch.float64, attention=attention)
    policy.stop_token_ids = ()
    rows = [[3 + token % 7 for token in row] for row in random_prompts(10, seed=2)]
    sampler = Wino(LENGTH, BLOCK, threshold=0.05, verify_threshold=0.08)
    samples = sampler.sample(policy, prompt_batch(rows), noise=NOISE)
    policy.module.config._attn_implementation = "sdpa"  # which takes a mask of truth values
    num_revoked = 0
    for row, prompt in enumerate(rows):
        tokens, forwards, revoked = reference_wino(
            partial(llada_laws, policy), prompt, policy.mask_token_id, LENGTH, BLOCK, low=0.05, high=0.08
        )
        assert samples.completion_ids[row].tolist() == tokens and samples.nfe[row] == forwards
        num_revoked += revoked
    assert num_revoked


def test_shadows_change_nothing_for_the_canvas():
    policy, prompts = tiny_policy(seed=4), prompt_batch([[3, 4, 5], [6]])
    policy.stop_token_ids = ()
    never = Wino(LENGTH, BLOCK, threshold=1.0, verify_threshold=0.0).sample(policy, prompts, noise=NOISE)
    assert_same_tokens(never, LowConfidence(LENGTH, BLOCK).sample(policy, prompts, noise=NOISE))


def test_without_verification_it_is_decoding_by_threshold():
    policy, rows = ToyTransformer(seed=5), random_prompts(20, seed=9)
    wino = Wino(4, 4, threshold=0.4, verify_threshold=0.0).sample(policy, prompt_batch(rows), noise=NOISE)
    plain = LowConfidence(4, 4, threshold=0.4).sample(policy, prompt_batch(rows), noise=NOISE)
    assert_same_tokens(wino, plain)  # blocks of 4: the limits of a step are never reached


def test_a_step_fixes_at_most_its_share_and_takes_back_fewer_than_the_one_before_fixed():
    policy, rows = ToyTransformer(seed=3), random_prompts(12, seed=4)
    states: list[torch.Tensor] = []
    sampler = Wino(32, threshold=0.0, verify_threshold=1.0)  # everything passes, everything fails
    samples = sampler.sample(policy, prompt_batch(rows), noise=NOISE, on_step=states.append)
    prompt_length = states[0].shape[1] - 32
    masked = [torch.ones(12, 32, dtype=torch.bool)]
    masked += [state[:, prompt_length:] == policy.mask_token_id for state in states]
    fixed = [(a & ~b).sum(1) for a, b in pairwise(masked)]
    revoked = [(b & ~a).sum(1) for a, b in pairwise(masked)]
    assert fixed[0].tolist() == [20] * 12 and revoked[1].tolist() == [19] * 12
    for step, (before, now) in enumerate(zip(fixed, revoked[1:], strict=False)):
        assert (now <= (before - 1).clamp(min=0)).all(), step
    assert not masked[-1].any() and samples.nfe.max() <= 32
    left = [m.sum(1) for m in masked]
    for open_before, now in zip(left, fixed, strict=False):
        share = (7 * open_before // 10).clamp(5, 20)
        assert (now <= share).all() and ((now >= 1) | (open_before == 0)).all()


def test_what_is_recorded_is_the_last_time_a_position_was_fixed():
    policy, rows = ToyTransformer(seed=7), random_prompts(16, seed=12)
    states: list[torch.Tensor] = []
    batch = prompt_batch(rows)
    samples = Wino(LENGTH, **RULES).sample(policy, batch, noise=NOISE, on_step=states.append)
    start = torch.cat([batch.prompt_ids, torch.full((16, LENGTH), policy.mask_token_id)], 1)
    seen = torch.cat([batch.prompt_mask, torch.ones(16, LENGTH, dtype=torch.bool)], 1)
    before = [start, *states]
    for row in range(16):
        for slot in range(LENGTH):
            step = int(samples.reveal_step[row, slot])
            place = slot - LENGTH
            assert before[step][row, place] == policy.mask_token_id
            assert all(after[row, place] == samples.completion_ids[row, slot] for after in before[step + 1 :])
            with torch.no_grad():
                logits = policy(before[step][row : row + 1], seen[row : row + 1])[0, place, : policy.mask_token_id]
            expected = logits.log_softmax(-1)[samples.completion_ids[row, slot]]
            assert abs(samples.logps[row, slot] - expected) < 1e-10  # float64, in another batch shape


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_is_the_same_in_any_company_order_and_padding(temperature):
    policy, lists = tiny_policy(seed=4), [[3 + t % 9 for t in row] for row in random_prompts(16, seed=5)]
    policy.stop_token_ids = ()
    sampler = Wino(LENGTH, BLOCK, threshold=0.1, verify_threshold=0.15, temperature=temperature)
    together = sampler.sample(policy, prompt_batch(lists), noise=NOISE)
    for i in (0, 7, 15):
        alone = sampler.sample(policy, prompt_batch([lists[i]], keys=[i]), noise=NOISE)
        assert_same_tokens(alone, take_rows(together, slice(i, i + 1)))
    backwards = list(range(15, -1, -1))
    turned = sampler.sample(policy, prompt_batch(lists[::-1], extra_pads=3, keys=backwards), noise=NOISE)
    assert_same_tokens(turned, take_rows(together, torch.tensor(backwards)))


def test_rows_leave_the_forward_when_their_block_is_full_or_they_have_stopped():
    policy = ToyTransformer(seed=7)
    policy.stop_token_ids = (5, 2)
    calls = count_calls(policy)
    samples = Wino(LENGTH, BLOCK, **RULES).sample(policy, prompt_batch(random_prompts(20, seed=4)), noise=NOISE)
    assert sum(len(call["canvas"]) for call in calls) == int(samples.nfe.sum()) < 20 * len(calls)
    tails = 0
    for tokens, steps, forwards in zip(samples.completion_ids, samples.reveal_step, samples.nfe, strict=True):
        if any(token in (5, 2) for token in tokens[:BLOCK].tolist()):
            tails += 1
            assert tokens[BLOCK:].tolist() == [5] * BLOCK and (steps[BLOCK:] == forwards).all()
    assert tails > 3


def test_families_without_shadows_are_refused_with_the_way_out(tmp_path):
    write_checkpoint("Dream", tmp_path / "dream")
    policy = load(tmp_path / "dream")
    with pytest.raises(ConfigError, match=r"^sampler.type = 'wino': .* 'low_confidence' with a threshold"):
        Wino(8).sample(policy, prompt_batch([[3]]), noise=NOISE)
    policy = tiny_policy(seed=0)
    with pytest.raises(ValueError, match="pass position_ids with it"):
        policy.token_outputs(torch.ones(1, 2).long(), torch.ones(1, 2, 2).bool(), torch.ones(1, 2).bool())
    policy.module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attention 'flash_attention_2' cannot leave single positions out"):
        Wino(8).sample(policy, prompt_batch([[3]]), noise=NOISE)


def test_a_recipe_that_evaluates_with_it_names_no_steps():
    tree = read_recipe(RECIPES / "sudoku.toml")
    tree["evaluation"]["sampler"] = {"type": "wino"}
    with pytest.raises(ConfigError, match=r"^evaluation.final_num_steps: sampler 'wino' has no num_steps. Set it to"):
        train_recipe(tree, RECIPES)
    tree["evaluation"]["final_num_steps"] = []
    recipe = train_recipe(tree, RECIPES)
    *_, final = evaluation_passes(recipe, 8, 8)
    assert recipe.final_samplers == [recipe.evaluation_sampler.value] and final.sequences


@pytest.mark.parametrize("fields", [{"threshold": 1.5}, {"verify_threshold": -0.1}])
def test_thresholds_are_probabilities(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=rf"^sampler.{name} = .*: a probability, from 0 to 1"):
        Wino(8, **fields)
