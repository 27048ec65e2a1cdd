"""The public functions: exact likelihoods and bounds against enumeration, rows, samples, training from Python."""

from __future__ import annotations

import math

import pytest
import torch

import unmask
from tests.helpers import tiny_policy
from tests.oracles import elbo_dp, eubo_by_contexts, log_likelihood_by_orders, log_likelihood_dp
from unmask.api import subset_recursion
from unmask.errors import ConfigError, DataError, ModelError
from unmask.models import MaskedPolicy

POLICY = tiny_policy()


def table(prompt: str, completion: str, policy: MaskedPolicy = POLICY) -> torch.Tensor:
    """(2^L, L): log p(token i | the others shown) for every set of hidden positions, by the plain forward."""
    ids = [policy.tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion)]
    length, rows = len(ids[1]), []
    for state in range(2 ** len(ids[1])):
        hidden = torch.tensor([bool(state >> i & 1) for i in range(length)])
        shown = torch.tensor(ids[1]).masked_fill(hidden, policy.mask_token_id)
        logits = policy.module(torch.cat([torch.tensor(ids[0]), shown])[None]).logits[0, -length:].detach().clone()
        logits[:, policy.mask_token_id] = -math.inf
        rows.append(logits.log_softmax(-1)[range(length), ids[1]] * hidden)
    return torch.stack(rows)


@pytest.mark.parametrize("completion", ["1", "12", "9304", "55555"])
def test_log_likelihood_equals_the_mean_over_all_orders(completion):
    exact = float(log_likelihood_by_orders(table("12|", completion)))
    for size in (1, 7, 256):
        assert unmask.log_likelihood(POLICY, "12|", completion, micro_batch_size=size) == pytest.approx(
            exact, abs=1e-10
        )


@pytest.mark.parametrize("block_length", [1, 2, 3, 6])
def test_block_wise_likelihood_equals_the_mean_over_its_orders(block_length):
    states = table("3|", "120304")
    got = unmask.log_likelihood(POLICY, "3|", "120304", block_length=block_length)
    assert got == pytest.approx(float(log_likelihood_dp(states, block_length)), abs=1e-10)
    if block_length < 4:
        assert got == pytest.approx(float(log_likelihood_by_orders(states, block_length)), abs=1e-10)
        assert abs(got - float(log_likelihood_dp(states))) > 1e-4  # the orders matter


def test_likelihoods_of_all_completions_add_up_to_one():
    vocabulary = [i for i in range(POLICY.module.config.vocab_size) if i != POLICY.mask_token_id]
    words = ["0123456789|"[i - 8] for i in vocabulary if i >= 8]
    # of one token: the text alphabet, and what is left for special tokens, is read off the model itself
    inside = sum(math.exp(unmask.log_likelihood(POLICY, "1|", word)) for word in words)
    canvas = torch.cat([torch.tensor(POLICY.tokenizer.encode("1|")), torch.tensor([POLICY.mask_token_id])])[None]
    logits = POLICY.module(canvas).logits[0, -1].detach()[vocabulary]
    special = logits.softmax(0)[[n for n, i in enumerate(vocabulary) if i < 8]].sum()
    assert inside == pytest.approx(1 - float(special), abs=1e-12)


def test_the_recursion_survives_tiny_probabilities():
    # every order reveals four tokens of e^-500 each: the product underflows, its logarithm does not
    assert subset_recursion([[-500.0] * 4] * 15, 4) == pytest.approx(-2000.0)
    # two positions, by hand: 1/2 (a b' + b a') with a, b from the full mask and a', b' from the half-shown states
    a, b, a_later, b_later = 0.1, 0.3, 0.5, 0.7
    rows = [[math.log(a_later), 0.0], [0.0, math.log(b_later)], [math.log(a), math.log(b)]]
    assert subset_recursion(rows, 2) == pytest.approx(math.log(0.5 * (a * b_later + b * a_later)))
    assert subset_recursion(rows, 1) == pytest.approx(math.log(a * b_later))  # left to right


@pytest.mark.parametrize("coupled", [True, False])
def test_elbo_estimates_the_exact_bound(coupled):
    prompts, completions = ["12|", "3|", "12|", "4|"], ["930", "5", "77", "930"]
    exact = torch.stack([elbo_dp(table(p, c)) for p, c in zip(prompts, completions, strict=True)])
    draws = torch.stack(
        [unmask.elbo(POLICY, prompts, completions, num_masks=64, coupled=coupled, seed=seed) for seed in range(24)]
    )
    error = draws.std(0) / 24**0.5
    assert ((draws.mean(0) - exact).abs() <= 4 * error + 1e-12).all()
    assert error.max() < 0.2
    likelihood = [unmask.log_likelihood(POLICY, p, c) for p, c in zip(prompts, completions, strict=True)]
    assert (exact <= torch.tensor(likelihood, dtype=torch.float64) + 1e-12).all()


def test_elbo_does_not_depend_on_batching_or_neighbours():
    prompts, completions = ["12|", "3|", "12345|"], ["930", "55", "111"]
    expected = unmask.elbo(POLICY, prompts, completions, num_masks=8)
    assert expected.dtype == torch.float64 and expected.shape == (3,)
    for size in (1, 5):
        got = unmask.elbo(POLICY, prompts, completions, num_masks=8, micro_batch_size=size)
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert torch.allclose(
        unmask.elbo(POLICY, prompts[:1], completions[:1], num_masks=8), expected[:1], rtol=0, atol=1e-12
    )
    assert not torch.equal(unmask.elbo(POLICY, prompts, completions, num_masks=8, seed=1), expected)


def test_eubo_approaches_the_exact_upper_bound():
    """Copies of `elbo` with the same seed; at 2,048 of them 0.02 nats are far above the bias and noise of 3 tokens."""
    prompts, completions = ["12|", "3|", "12|"], ["930", "5", "77"]
    lower = unmask.elbo(POLICY, prompts, completions, num_masks=2048)
    for gamma in (1.0, 3.0):
        exact = torch.stack([eubo_by_contexts(table(p, c), gamma) for p, c in zip(prompts, completions, strict=True)])
        got = unmask.eubo(POLICY, prompts, completions, gamma=gamma, num_masks=2048)
        assert got.dtype == torch.float64 and (got - exact).abs().max() < 0.02
        assert (got >= lower - 0.02).all()
        likelihood = torch.tensor(
            [unmask.log_likelihood(POLICY, p, c) for p, c in zip(prompts, completions, strict=True)]
        )
        assert gamma < 3 or (exact >= likelihood - 1e-12).all()
    few = unmask.eubo(POLICY, prompts, completions, gamma=2.0, num_masks=4)
    again = unmask.eubo(POLICY, prompts, completions, gamma=2.0, num_masks=4, micro_batch_size=3)
    assert torch.allclose(few, again, rtol=0, atol=1e-12)
    assert not torch.equal(few, unmask.eubo(POLICY, prompts, completions, gamma=2.0, num_masks=4, seed=1))
    single = unmask.eubo(POLICY, prompts[:1], completions[:1], gamma=2.0, num_masks=3, coupled=False)
    assert single.isfinite().all()


def test_gen_length_counts_the_stop_tokens():
    ended = unmask.log_likelihood(POLICY, "1|", "23", gen_length=4)
    assert ended < unmask.log_likelihood(POLICY, "1|", "23")
    bound = unmask.elbo(POLICY, ["1|"], ["23"], gen_length=4, num_masks=2048)
    assert float(bound) < ended + 0.1
    assert math.isfinite(unmask.log_likelihood(POLICY, "1|", "", gen_length=2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: unmask.log_likelihood(POLICY, "1|", "1" * 13), ConfigError, "12 tokens are the most"),
        (lambda: unmask.log_likelihood(POLICY, "1|", "1234", block_length=3), ConfigError, "must divide the 4 tokens"),
        (lambda: unmask.log_likelihood(POLICY, "1|", ""), DataError, "completion 0 has no tokens"),
        (lambda: unmask.log_likelihood(POLICY, "", "1"), DataError, "a prompt has no tokens"),
        (lambda: unmask.elbo(POLICY, ["1"], ["1"], num_masks=3), ConfigError, "must be even"),
        (lambda: unmask.eubo(POLICY, ["1"], ["1"], gamma=0.5), ConfigError, "gamma = 0.5"),
        (lambda: unmask.eubo(POLICY, ["1"], ["1"], gamma=1.5, num_masks=3), ConfigError, "must be even"),
        (lambda: unmask.elbo(POLICY, ["1"], ["1"], gen_length=0), ConfigError, "gen_length = 0"),
        (lambda: unmask.elbo(POLICY, ["1"], ["1", "2"]), DataError, "1 prompts and 2 completions"),
        (lambda: unmask.elbo(POLICY, ["1" * 40], ["1"]), DataError, "exceeds the 40 positions"),
        (lambda: unmask.elbo("nowhere", ["1"], ["1"]), ModelError, "no config.json there"),
        (lambda: unmask.evaluate(POLICY, "sudoku", limit=0), ConfigError, "limit = 0"),
        (lambda: unmask.evaluate(POLICY, "sudoku", blanks=3), ConfigError, "unknown key task.blanks"),
        (lambda: unmask.evaluate(POLICY, "sudoku", data="x.csv", split="train"), ConfigError, "test split"),
        (lambda: unmask.sample(POLICY, "1", sampler="beam"), ConfigError, "unknown sampler 'beam'"),
        (lambda: unmask.train({"task": {"type": "sudoku"}}), ConfigError, "exactly one of"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_sampling_one_prompt_or_several():
    texts = unmask.sample(POLICY, ["12|", "3|"], gen_length=4)
    assert isinstance(texts, list) and len(texts) == 2
    assert unmask.sample(POLICY, "12|", gen_length=4) == texts[0]
    assert unmask.sample(POLICY, [], gen_length=4) == []
    chat = [{"role": "user", "content": "1"}]
    assert unmask.sample(POLICY, [chat, chat], gen_length=4) == [unmask.sample(POLICY, chat, gen_length=4)] * 2
    drawn = {unmask.sample(POLICY, "12|", gen_length=4, temperature=1.0, seed=seed) for seed in range(5)}
    assert len(drawn) > 1


def test_evaluating_a_loaded_policy_or_its_directory(tmp_path):
    tiny_policy(dtype=torch.float32).save(tmp_path)
    options = {"num_test": 4, "parser": "d1", "num_steps": 4}
    row = unmask.evaluate(str(tmp_path), "sudoku", **options)
    loaded = unmask.evaluate(unmask.load(tmp_path), "sudoku", limit=4, **options)
    assert row["model"] == loaded["model"] == str(tmp_path)
    changing = ("seconds", "tokens_per_second")
    assert {k: v for k, v in row.items() if k not in changing} == {k: v for k, v in loaded.items() if k not in changing}


def test_training_from_python(tmp_path, monkeypatch):
    tiny_policy(dtype=torch.float32).save(tmp_path / "model")
    recipe = {
        "model": {"path": str(tmp_path / "model")},
        "task": {"type": "sudoku", "parser": "d1", "num_train": 4, "num_validation": 2, "num_test": 2},
        "algorithm": {"type": "espo"},
        "rollout": {"prompts_per_batch": 2, "group_size": 2},
        "trainer": {"num_batches": 1},
        "evaluation": {"num_examples": 2},
    }
    summary = unmask.train(recipe, "algorithm.num_iterations=1", output=tmp_path / "run")
    assert summary["final"][0]["num_examples"] == 2 and (tmp_path / "run" / "model").is_dir()
    assert recipe["algorithm"] == {"type": "espo"}  # overrides leave the caller's tables alone
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "completion": "2"}\n')
    data = {"file": str(rows), "gen_length": 2, "batch_size": 2}
    unmask.sft({"model": recipe["model"], "data": data, "trainer": {"num_batches": 1}})
    assert len(list((tmp_path / "runs").glob("recipe-*/model"))) == 1  # the default place


def test_every_public_name_exists_and_is_documented():
    for name in unmask.__all__:
        value = getattr(unmask, name)
        if callable(value):
            assert value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        unmask.trian  # noqa: B018
    assert set(unmask.__all__) <= set(dir(unmask))
