"""What every registered sampler keeps, whatever its rule."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from tests.toys_network import BlockToyTransformer, ToyTransformer, prompt_batch, random_prompts
from unmask.errors import ConfigError, ModelError
from unmask.noise import Noise
from unmask.samplers import SAMPLERS as REGISTERED
from unmask.types import PromptBatch, Samples, take_rows

SAMPLERS = {name: cls for name, cls in REGISTERED.items() if not getattr(cls, "is_outside", False)}
"""Those that fill a canvas here; tests/test_engine.py has the other."""
NOISE = Noise(seed=3).stream("rollout")
LENGTH, BLOCK = 8, 4
everywhere = [
    pytest.param(name, temperature, id=f"{name}-{temperature}") for name in SAMPLERS for temperature in (0.0, 1.0)
]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
KEEPING = [name for name, cls in SAMPLERS.items() if cls.keeps_tokens]
"""Those that take no token back, so that steps and states can be told from the finished rows."""
every_keeping_sampler = pytest.mark.parametrize("name", KEEPING)
every_keeping_sampler_and_temperature = pytest.mark.parametrize(
    "name, temperature", [place for place in everywhere if place.values[0] in KEEPING]
)
every_sampler_and_temperature = pytest.mark.parametrize("name, temperature", everywhere)


# those that fill blocks of the completion; the blocks of block_diffusion are the model's, counted from the prompt
BLOCKWISE = [name for name, cls in SAMPLERS.items() if "block_length" in cls.__dataclass_fields__]


def build(name: str, temperature: float = 1.0):
    """Blocks of 4 and 6 steps, where the sampler has these: 2 tokens in the first of 3 steps per block."""
    known = SAMPLERS[name].__dataclass_fields__
    settings = {"block_length": BLOCK, "num_steps": 6}
    fields = {key: value for key, value in settings.items() if key in known}
    return SAMPLERS[name](gen_length=LENGTH, temperature=temperature, **fields)


def make_policy(name: str, **settings: int) -> ToyTransformer:
    """A model of the kind that the sampler is for."""
    return BlockToyTransformer(BLOCK, **settings) if name == "block_diffusion" else ToyTransformer(**settings)


def some_prompts(name: str, rows: int = 5) -> PromptBatch:
    """Prompts of 1 to 6 tokens; of 4 where lengths are sampled one after the other, so that a step is of all rows."""
    lengths = {"shortest": 4, "longest": 4} if name == "block_diffusion" else {}
    return prompt_batch(random_prompts(rows, seed=1, **lengths))


def run(name: str, temperature: float = 1.0, rows: int = 5) -> tuple[ToyTransformer, Samples, list[torch.Tensor]]:
    policy, states = make_policy(name), []
    samples = build(name, temperature).sample(policy, some_prompts(name, rows), noise=NOISE, on_step=states.append)
    return policy, samples, states


def assert_same_tokens(a: Samples, b: Samples) -> None:
    assert torch.equal(a.completion_ids, b.completion_ids)
    assert torch.equal(a.reveal_step, b.reveal_step)
    assert torch.equal(a.nfe, b.nfe)
    assert torch.allclose(a.logps, b.logps, rtol=0, atol=1e-12)


@every_keeping_sampler_and_temperature
def test_each_position_is_fixed_once_at_its_reveal_step_and_the_prompt_never_changes(name, temperature):
    policy, samples, states = run(name, temperature)
    prompts = some_prompts(name).prompt_ids
    for step, canvas in enumerate(states):
        completion = canvas[:, -LENGTH:]
        fixed = samples.reveal_step <= step
        assert torch.equal(canvas[:, :-LENGTH], prompts)
        assert torch.equal(completion, samples.completion_ids.where(fixed, torch.tensor(policy.mask_token_id)))
    assert torch.equal(states[-1][:, -LENGTH:], samples.completion_ids)


@every_sampler_and_temperature
def test_the_mask_token_is_never_written(name, temperature):
    policy, samples, states = run(name, temperature, rows=64)
    assert not (samples.completion_ids == policy.mask_token_id).any()
    wanted = policy(states[0], None)[:, -LENGTH:].argmax(-1)
    assert (wanted == policy.mask_token_id).all()  # the network itself asks for nothing else


@every_keeping_sampler
def test_nfe_counts_forwards_and_every_forward_fixes_something(name):
    policy = make_policy(name)
    calls = count_calls(policy)
    samples = build(name).sample(policy, some_prompts(name), noise=NOISE)
    # the one finished block is read once more for the cache
    expected = {"roar": LENGTH, "block_diffusion": 6 + 1}.get(name, 6)
    assert samples.nfe.tolist() == [len(calls)] * 5 == [expected] * 5
    for row in samples.reveal_step:
        assert row.unique().tolist() == list(range(LENGTH if name == "roar" else 6))


def count_calls(policy: ToyTransformer) -> list[dict]:
    """Records the arguments of each call of `token_outputs` from now on."""
    calls, inner = [], policy.token_outputs

    def spy(canvas, attention_mask, positions, **rest):
        calls.append(
            {"canvas": canvas.clone(), "attention_mask": attention_mask, "positions": positions.clone(), **rest}
        )
        return inner(canvas, attention_mask, positions, **rest)

    policy.token_outputs = spy
    return calls


@pytest.mark.parametrize("name", [*BLOCKWISE, "block_diffusion"])
def test_a_block_is_finished_before_the_next_begins(name):
    _, samples, _ = run(name, rows=16)
    first, second = samples.reveal_step[:, :BLOCK], samples.reveal_step[:, BLOCK:]
    assert (first.amax(1) < second.amin(1)).all()


@every_keeping_sampler
def test_only_masked_positions_of_the_current_block_are_asked_for(name):
    policy = make_policy(name)
    calls = count_calls(policy)
    samples = build(name).sample(policy, some_prompts(name), noise=NOISE)
    steps = [call for call in calls if call["positions"].any()]
    for step, call in enumerate(steps):
        masked, revealed = samples.reveal_step >= step, samples.reveal_step == step
        block = slice(0, LENGTH)
        if name != "dream":
            block = slice(0, BLOCK) if masked[0, :BLOCK].any() else slice(BLOCK, LENGTH)
        asked = call["positions"][:, -LENGTH:]
        if name == "block_diffusion":  # a window that ends with the block
            asked = torch.zeros_like(masked)
            asked[:, block] = call["positions"][:, -BLOCK:]
        assert call["positions"].sum() == asked[:, block].sum()
        assert call["want"] == ("logits",)
        if name in ("low_confidence", "dream", "block_diffusion"):
            assert torch.equal(asked[:, block], masked[:, block])
        else:
            assert torch.equal(asked, revealed)


@every_keeping_sampler
def test_an_attention_mask_is_passed_only_if_a_row_has_pads(name):
    policy = make_policy(name)
    calls = count_calls(policy)
    build(name).sample(policy, prompt_batch([[1, 2, 3], [4, 5, 6]]), noise=NOISE)
    assert all(call["attention_mask"] is None for call in calls)
    calls.clear()
    build(name).sample(policy, prompt_batch([[1, 2, 3], [4]]), noise=NOISE)
    if name == "block_diffusion":  # samples rows with equally many pads together, without them
        assert all(call["attention_mask"] is None for call in calls)
        return
    expected = torch.tensor([[True] * 11, [False] * 2 + [True] * 9])
    assert all(torch.equal(call["attention_mask"], expected) for call in calls)


@every_sampler_and_temperature
def test_a_row_is_the_same_in_any_company_order_and_padding(name, temperature):
    policy, sampler = make_policy(name), build(name, temperature)
    rows = random_prompts(16, seed=5)
    together = sampler.sample(policy, prompt_batch(rows), noise=NOISE)
    for i in (0, 7, 15):
        alone = sampler.sample(policy, prompt_batch([rows[i]], keys=[i]), noise=NOISE)
        assert_same_tokens(alone, take_rows(together, slice(i, i + 1)))
    backwards = list(range(15, -1, -1))
    reversed_rows = sampler.sample(policy, prompt_batch(rows[::-1], extra_pads=3, keys=backwards), noise=NOISE)
    assert_same_tokens(reversed_rows, take_rows(together, torch.tensor(backwards)))
    some = [3, 11, 12]
    fewer = sampler.sample(policy, prompt_batch([rows[i] for i in some], keys=some), noise=NOISE)
    assert_same_tokens(fewer, take_rows(together, torch.tensor(some)))


@every_sampler
def test_rollouts_of_one_prompt_differ_and_repeat_with_their_index_and_seed(name):
    policy, sampler = make_policy(name), build(name)
    prompts = prompt_batch([[1, 2]] * 6, keys=[4] * 6)
    same = sampler.sample(policy, prompts, noise=NOISE)
    assert torch.equal(same.completion_ids, same.completion_ids[:1].expand(6, -1))
    apart = sampler.sample(policy, replace(prompts, rollout_index=torch.arange(6)), noise=NOISE)
    assert len(apart.completion_ids.unique(dim=0)) == 6
    assert_same_tokens(take_rows(apart, slice(2, 3)), take_rows(same, slice(0, 1)))
    other_seed = sampler.sample(policy, prompts, noise=Noise(seed=4))
    assert not torch.equal(other_seed.completion_ids, same.completion_ids)


def test_at_temperature_0_confident_samplers_read_no_noise_and_the_others_only_an_order():
    for name in SAMPLERS:
        _, first, _ = run(name, temperature=0.0)
        other = build(name, 0.0).sample(make_policy(name), some_prompts(name), noise=Noise(seed=99))
        has_no_noise = name in ("low_confidence", "dream", "block_diffusion", "wino")
        assert torch.equal(first.reveal_step, other.reveal_step) == has_no_noise
        assert not has_no_noise or torch.equal(first.completion_ids, other.completion_ids)


@every_keeping_sampler_and_temperature
def test_recorded_logps_are_the_untempered_trajectory_likelihood(name, temperature):
    policy, sampler = make_policy(name), build(name, temperature if temperature == 0 else 0.7)
    prompts = prompt_batch(random_prompts(5, seed=2))
    samples = sampler.sample(policy, prompts, noise=NOISE)
    full_mask = torch.cat([prompts.prompt_mask, torch.ones(5, LENGTH, dtype=torch.bool)], 1)
    recomputed = torch.full((5, LENGTH), float("nan"), dtype=torch.float64)
    for step in range(int(samples.reveal_step.max()) + 1):
        masked = samples.reveal_step >= step
        completion = samples.completion_ids.masked_fill(masked, policy.mask_token_id)
        logits = policy(torch.cat([prompts.prompt_ids, completion], 1), full_mask)[:, -LENGTH:, : policy.mask_token_id]
        logp = logits.log_softmax(-1).gather(-1, samples.completion_ids[..., None]).squeeze(-1)
        recomputed = torch.where(samples.reveal_step == step, logp, recomputed)
    assert samples.logps.dtype == torch.float64
    assert torch.allclose(samples.logps, recomputed, rtol=0, atol=1e-12)


@every_keeping_sampler
def test_recorded_logps_are_float64_from_float32_logits(name):
    policy = make_policy(name).float()
    calls = count_calls(policy)
    samples = build(name).sample(policy, some_prompts(name), noise=NOISE)
    first = (samples.reveal_step[0] == 0).nonzero()[0, 0]
    canvas = calls[0]["canvas"][:1]
    end = LENGTH if name != "block_diffusion" else BLOCK  # the first window ends with the first block
    mask = calls[0]["attention_mask"]
    logits = policy(canvas, None if mask is None else mask[:1])[0, first - end, : policy.mask_token_id]
    assert logits.dtype == torch.float32
    expected = logits.double().log_softmax(-1)[samples.completion_ids[0, first]]
    # the logits themselves move by 1e-7 with the batch shape; float32 log-probabilities would not be finer than that
    assert abs(samples.logps[0, first] - expected) < 1e-5
    assert not torch.equal(samples.logps, samples.logps.float().double())


@every_sampler
def test_results_can_enter_autograd_and_nothing_tracks_gradients(name):
    policy, samples, _ = run(name)
    assert not samples.logps.requires_grad and not samples.logps.is_inference()
    canvas = torch.cat([torch.ones(5, 1, dtype=torch.int64), samples.completion_ids], 1)
    (policy(canvas, None).sum() * samples.logps.sum()).backward()
    assert policy.head.grad is not None


@every_sampler
def test_on_step_may_keep_or_change_what_it_is_given(name):
    _, untouched, _ = run(name)
    vandalised = build(name).sample(make_policy(name), some_prompts(name), noise=NOISE, on_step=torch.Tensor.zero_)
    assert_same_tokens(untouched, vandalised)


@every_sampler
def test_an_empty_prompt_and_a_length_of_one_work(name):
    samples = SAMPLERS[name](1).sample(make_policy(name), prompt_batch([[], []]), noise=NOISE)
    assert samples.completion_ids.shape == (2, 1) and samples.nfe.tolist() == [1, 1]


@every_sampler
def test_logits_that_are_not_finite_are_reported_with_the_prompt(name):
    policy, sampler = make_policy(name), build(name, 0.0)
    written = sampler.sample(policy, prompt_batch([[1, 2]], keys=[30]), noise=NOISE).completion_ids
    bad = next(token for token in range(3, 11) if token not in written)  # the first row has nothing to do with it
    policy.tokens.data[bad] = float("nan")
    with pytest.raises(ModelError, match=r"not finite in 1 of 2 rollouts; first: prompt 31, completion position \d"):
        sampler.sample(policy, prompt_batch([[1, 2], [bad, 2]], keys=[30, 31]), noise=NOISE)


@every_sampler
def test_a_prompt_that_leaves_no_room_is_refused_but_pads_take_none(name):
    policy = make_policy(name, max_length=11)
    build(name).sample(policy, prompt_batch([[1, 2, 3], [1]], extra_pads=9), noise=NOISE)
    with pytest.raises(
        ConfigError, match=r"gen_length = 8: with the longest prompt \(4 tokens\).* 11 positions. Try 7 or"
    ):
        build(name).sample(policy, prompt_batch([[1, 2, 3, 4]]), noise=NOISE)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_blocks_that_do_not_tile_the_completion_fail_when_built_with_the_way_out(name):
    wrong_block = r"^sampler.block_length = 24: must divide sampler.gen_length = 64\. Try 32 or 16\.$"
    for wrong, message in [
        ({"gen_length": 64, "block_length": 24}, wrong_block),
        ({"gen_length": 6, "block_length": 12}, r"gen_length = 6\. Try 6\.$"),
        ({"gen_length": 6, "block_length": 0}, r"block_length = 0: .* Try 1\.$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            SAMPLERS[name](**wrong)


@every_sampler
def test_wrong_settings_fail_when_built_with_the_way_out(name):
    cls = SAMPLERS[name]
    for wrong, message in [
        ({"gen_length": 0}, r"^sampler.gen_length = 0: must be at least 1"),
        ({"gen_length": 6, "temperature": -0.1}, r"^sampler.temperature = -0.1: must be finite"),
        ({"gen_length": 6, "temperature": float("nan")}, r"^sampler.temperature = nan: must be finite"),
    ]:
        with pytest.raises(ConfigError, match=message):
            cls(**wrong)
    with pytest.raises(FrozenInstanceError):
        cls(4).gen_length = 5
