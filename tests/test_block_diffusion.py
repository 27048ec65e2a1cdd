"""Sampling block by block: equality with the published rule, an exact cache, enumerated laws, refusals."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import unmask
from tests.checkpoints import write_checkpoint
from tests.reference_samplers import reference_block_diffusion
from tests.toys_network import BlockToyTransformer, ToyTransformer, chi_square_p, prompt_batch, random_prompts
from unmask.cli import main
from unmask.errors import ConfigError, ModelError
from unmask.models.block import LLaDA2Config, LLaDA2ForMaskedLM, SDARConfig, SDARForMaskedLM
from unmask.models.policy import MaskedPolicy
from unmask.noise import Noise
from unmask.samplers import SAMPLERS, BlockDiffusion
from unmask.types import Samples, take_rows

NOISE = Noise(seed=0).stream("rollout")


def watch(policy) -> list[SimpleNamespace]:
    """Canvas, wanted positions and cached length of each forward from now on."""
    calls, inner = [], policy.token_outputs

    def spy(canvas, attention_mask, positions, *, cache=None, **rest):
        assert attention_mask is None
        calls.append(
            SimpleNamespace(canvas=canvas.clone(), wanted=positions, cached=0 if cache is None else len(cache))
        )
        return inner(canvas, attention_mask, positions, cache=cache, **rest)

    policy.token_outputs = spy
    return calls


def assert_same(a: Samples, b: Samples) -> None:
    assert torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.reveal_step, b.reveal_step)
    # a matrix product of another shape may add in another order
    assert torch.allclose(a.logps, b.logps, rtol=0, atol=1e-12)


# ---- against the published rule


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps_per_block", [4, 2, 1])
def test_tokens_steps_and_forwards_are_those_of_the_published_rule(steps_per_block, threshold, use_cache):
    for length in (12, 7):  # both leave a partial block at one end or the other for most prompts
        policy = BlockToyTransformer(seed=length)
        prompts = prompt_batch(random_prompts(8, seed=steps_per_block, longest=9))
        ids, fixed_at, num_steps = reference_block_diffusion(
            policy, prompts, length, steps_per_block, threshold=threshold
        )
        # ceil(n S / L) of the sampler against ceil(n steps / 4) of the reference: equal for S = L steps / 4
        sampler = BlockDiffusion(12, 3 * steps_per_block, threshold, use_cache=use_cache)
        if length == 7:
            sampler = BlockDiffusion(7, None, threshold, use_cache=use_cache)
            ids, fixed_at, num_steps = reference_block_diffusion(policy, prompts, 7, 4, threshold=threshold)
        samples = sampler.sample(policy, prompts, noise=NOISE)
        assert torch.equal(samples.completion_ids, ids) and torch.equal(samples.reveal_step, fixed_at)
        num_prompt = prompts.prompt_mask.sum(1)
        stores = -(-(num_prompt + length) // 4) - num_prompt // 4 - 1 if use_cache else 0
        assert torch.equal(samples.nfe, num_steps + stores)


def test_a_block_takes_its_share_of_the_steps_rounded_up():
    assert BlockDiffusion(16).step_counts(4) == [1, 1, 1, 1]
    assert BlockDiffusion(16, num_steps=8).step_counts(4) == [2, 2]
    assert BlockDiffusion(16, num_steps=8).step_counts(3) == [2, 1]
    assert BlockDiffusion(16, num_steps=8).step_counts(1) == [1]
    assert BlockDiffusion(256, num_steps=96).step_counts(32) == [3] * 8 + [2] * 4
    assert BlockDiffusion(5, num_steps=1).step_counts(4) == [4]


def test_a_threshold_fixes_sure_tokens_early_and_rows_wait_for_each_other_without_cost():
    policy, rows = BlockToyTransformer(seed=1), [[1, 2], [3, 4], [5, 6], [7, 8], [9, 1], [2, 2]]
    plain = BlockDiffusion(10).sample(policy, prompt_batch(rows), noise=NOISE)
    assert plain.nfe.tolist() == [12] * 6  # 10 tokens one by one, and 2 finished blocks read for the cache
    for threshold in (0.0, 0.4, 0.999):
        sampler = BlockDiffusion(10, threshold=threshold)
        samples = sampler.sample(policy, prompt_batch(rows), noise=NOISE)
        for i, row in enumerate(rows):
            alone = sampler.sample(policy, prompt_batch([row], keys=[i]), noise=NOISE)
            assert_same(alone, take_rows(samples, slice(i, i + 1)))
            assert alone.nfe.tolist() == [int(samples.reveal_step[i].max()) + 1 + 2] == samples.nfe[i : i + 1].tolist()
        if threshold == 0.0:
            assert samples.nfe.tolist() == [3 + 2] * 6
        if threshold == 0.4:
            assert len(samples.nfe.unique()) > 1 and int(samples.nfe.min()) < 11


# ---- the cache


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("block_size", [1, 3, 4, 32])
def test_the_cache_changes_no_token(block_size, threshold, temperature):
    policy = BlockToyTransformer(block_size, seed=block_size)
    prompts = prompt_batch(random_prompts(10, seed=block_size, longest=9), extra_pads=2)
    for length, num_steps in ((11, None), (12, 5)):
        settings = {"num_steps": num_steps, "threshold": threshold, "temperature": temperature}
        cached, plain = (
            BlockDiffusion(length, use_cache=use, **settings).sample(policy, prompts, noise=NOISE)
            for use in (True, False)
        )
        assert_same(cached, plain)


def test_forwards_show_the_open_block_only_and_finished_blocks_once():
    policy = BlockToyTransformer(seed=0)
    calls = watch(policy)
    samples = BlockDiffusion(9).sample(policy, prompt_batch([[1, 2, 3, 4, 5, 6]]), noise=NOISE)
    text = torch.cat([torch.tensor([[1, 2, 3, 4, 5, 6]]), samples.completion_ids], 1)
    windows = [(call.cached, call.cached + call.canvas.shape[1], int(call.wanted.sum())) for call in calls]
    # the prompt's whole block with the first step; then per block: steps, and once more when it is full
    first = [(0, 8, 2), (4, 8, 1), (4, 8, 0)]
    second = [(8, 12, 4), (8, 12, 3), (8, 12, 2), (8, 12, 1), (8, 12, 0)]
    assert windows == first + second + [(12, 15, 3), (12, 15, 2), (12, 15, 1)]
    assert samples.nfe.tolist() == [len(calls)]
    for call, (start, end, _) in zip(calls, windows, strict=True):
        if not call.wanted.any():  # what the cache keeps is final
            assert torch.equal(call.canvas, text[:, start:end])


def test_without_the_cache_forwards_end_with_the_open_block():
    policy = BlockToyTransformer(seed=0)
    calls = watch(policy)
    BlockDiffusion(9, num_steps=3, use_cache=False).sample(policy, prompt_batch([[1, 2, 3, 4, 5, 6]]), noise=NOISE)
    assert [call.canvas.shape[1] for call in calls] == [8, 12, 12, 15]


def test_rows_of_a_length_share_forwards_and_pads_never_enter():
    policy = BlockToyTransformer(seed=0)
    calls = watch(policy)
    prompts = prompt_batch([[1, 2], [3], [4, 5], [6, 7, 8]], extra_pads=3)
    samples = BlockDiffusion(4, num_steps=1, use_cache=False).sample(policy, prompts, noise=NOISE)
    # lengths 1, 2, 3; the first block holds the prompt, the last what is left
    assert [tuple(call.canvas.shape) for call in calls] == [(1, 4), (1, 5), (2, 4), (2, 6), (1, 4), (1, 7)]
    assert samples.completion_ids.shape == (4, 4)


def test_on_step_shows_all_rows_with_their_pads():
    policy, states = BlockToyTransformer(seed=0), []
    prompts = prompt_batch([[1, 2], [3]], extra_pads=1)
    samples = BlockDiffusion(3, num_steps=1).sample(policy, prompts, noise=NOISE, on_step=states.append)
    masks = torch.full((2, 3), policy.mask_token_id)
    assert all(torch.equal(state[:, :3], prompts.prompt_ids) for state in states)
    assert torch.equal(states[0][0, 3:], masks[0]) and torch.equal(states[0][1, 3:], samples.completion_ids[1])
    assert torch.equal(states[-1][:, 3:], samples.completion_ids)


# ---- enumerated law


def stepwise_law(policy: BlockToyTransformer, prompt: list[int], counts: dict, temperature: float) -> Tensor:
    """p(y) of every completion, in the order of `product`, by following every outcome of every step."""
    vocab, mask = policy.mask_token_id, policy.mask_token_id
    states: dict[tuple[int, ...], float] = {tuple(prompt): 1.0}
    for num_new, steps in counts:
        states = {(*state, *[mask] * num_new): weight for state, weight in states.items()}
        for count in steps:
            after: dict[tuple[int, ...], float] = {}
            for state, weight in states.items():
                logits = policy(torch.tensor([state]), None)[0, :, :vocab].detach()
                tempered, plain = (logits / temperature).softmax(-1).tolist(), logits.softmax(-1).tolist()
                masked = [i for i, token in enumerate(state) if token == mask]
                for tokens in product(range(vocab), repeat=len(masked)):
                    drawn, chance = dict(zip(masked, tokens, strict=True)), weight
                    for i, token in drawn.items():
                        chance *= tempered[i][token]
                    surest = sorted(masked, key=lambda i: -plain[i][drawn[i]])[:count]
                    new = tuple(drawn[i] if i in surest else token for i, token in enumerate(state))
                    after[new] = after.get(new, 0.0) + chance
            states = after
    length = len(next(iter(states))) - len(prompt)
    return torch.tensor([states[(*prompt, *y)] for y in product(range(vocab), repeat=length)], dtype=torch.float64)


@pytest.mark.parametrize("use_cache", [True, False])
def test_completions_follow_the_law_of_their_steps(use_cache):
    policy, prompt = BlockToyTransformer(2, vocab=4, seed=3), [1]
    rows = prompt_batch([prompt] * 30_000, keys=range(30_000))
    sampler = BlockDiffusion(4, num_steps=2, temperature=2.0, use_cache=use_cache)
    ids = sampler.sample(policy, rows, noise=NOISE).completion_ids
    seen = (ids * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81).double()
    # prompt and 1 token | 2 tokens in one step | 1 token
    law = stepwise_law(policy, prompt, [(1, [1]), (2, [2]), (1, [1])], 2.0)
    assert abs(float(law.sum()) - 1) < 1e-12
    assert chi_square_p(seen, law) > 1e-4
    assert chi_square_p(seen, stepwise_law(policy, prompt, [(1, [1]), (2, [1, 1]), (1, [1])], 2.0)) < 1e-4
    assert chi_square_p(seen, stepwise_law(policy, prompt, [(1, [1]), (2, [2]), (1, [1])], 1.5)) < 1e-4


# ---- the families it is for


def tiny_block_policy(family: str) -> MaskedPolicy:
    shape = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "mask_token_id": 23, "eos_token_id": 1,
        "pad_token_id": 0, "block_size": 4, "initializer_range": 0.5,
    }  # fmt: skip
    experts = {
        "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "sdar":
            model = SDARForMaskedLM(SDARConfig(**shape))
        else:
            model = LLaDA2ForMaskedLM(LLaDA2Config(**shape, **experts))
    return MaskedPolicy(model.double(), SimpleNamespace(), name=family)


@pytest.mark.parametrize("family", ["sdar", "llada2"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_cache_is_exact_for_the_families(family, threshold):
    policy, prompts = tiny_block_policy(family), prompt_batch(random_prompts(6, seed=2, longest=9))
    cached, plain = (
        BlockDiffusion(10, threshold=threshold, temperature=1.0, use_cache=use).sample(policy, prompts, noise=NOISE)
        for use in (True, False)
    )
    assert torch.equal(cached.completion_ids, plain.completion_ids)
    assert torch.equal(cached.reveal_step, plain.reveal_step)
    # the families compute their normalisations in float32, which moves log-probabilities by about 1e-6
    assert torch.allclose(cached.logps, plain.logps, rtol=0, atol=1e-4)


# ---- refusals


def test_a_model_without_blocks_is_refused_with_the_sampler_for_it():
    with pytest.raises(ConfigError, match=r"^sampler.type = 'block_diffusion': .* Use .* 'low_confidence'\.$"):
        BlockDiffusion(4).sample(ToyTransformer(), prompt_batch([[1]]), noise=NOISE)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("block_diffusion", "engine")])
def test_other_samplers_refuse_a_model_that_reads_block_by_block(name):
    with pytest.raises(ConfigError, match=r"^sampler.type: .* blocks of 4 tokens .* Use .* 'block_diffusion'\.$"):
        SAMPLERS[name](4).sample(BlockToyTransformer(), prompt_batch([[1]]), noise=NOISE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 1.5}, r"^sampler.threshold = 1.5: must be from 0 to 1, or none\. Try 0.9\.$"),
        ({"threshold": -0.1}, r"^sampler.threshold = -0.1: "),
        ({"threshold": float("nan")}, r"^sampler.threshold = nan: "),
        ({"num_steps": 9}, r"^sampler.num_steps = 9: steps beyond .* Try 8\.$"),
        ({"num_steps": 0}, r"^sampler.num_steps = 0: "),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        BlockDiffusion(8, **wrong)


@pytest.mark.parametrize("family", ["sdar", "llada2_moe"])
def test_block_causal_checkpoints_are_evaluated_and_sampled_from_the_command_line(family, tmp_path, capsys):
    model = str(write_checkpoint(family, tmp_path / family))
    options = ["--task", "sudoku", "--limit", "3", "--gen-length", "16", "--num-steps", "4", "--quiet", "prompt=raw"]
    assert main(["eval", model, *options, "--sampler", "block_diffusion", "--output", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["num_examples"] == 3 and row["sampler"] == "block_diffusion"
    capsys.readouterr()
    assert main(["eval", model, *options]) == 2
    error = capsys.readouterr().err
    assert "block_diffusion" in error and error.count("\n") == 1
    with pytest.raises(ModelError, match="block-causal"):
        unmask.elbo(model, ["12"], ["34"])
