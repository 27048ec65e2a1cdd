"""The chunked head equals the plain one: values, gradients, precision, and when it is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unmask.models.chunked_head as heads
from tests.helpers import fake_rollouts, gradients, tiny_policy
from unmask.corruption import draw_uniform_count
from unmask.models.outputs import summarise_hidden, summarise_logits
from unmask.noise import Noise
from unmask.scoring import score_copies


def head_inputs(num_rows: int = 13, vocab: int = 17, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, H), weight (V, H) and targets (N,), float64."""
    g = torch.Generator().manual_seed(num_rows)
    hidden, weight = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (num_rows, vocab))
    return hidden, weight, torch.randint(3, vocab, (num_rows,), generator=g)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",), ()], ids=str)
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 13, 100])
def test_chunks_equal_the_plain_head(monkeypatch, rows_per_chunk, trained):
    hidden, weight, targets = head_inputs()
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", rows_per_chunk * len(weight))
    leaves = [x.requires_grad_() for name, x in (("hidden", hidden), ("weight", weight)) if name in trained]
    plain = summarise_logits(hidden @ weight.T, targets, ("logp", "entropy"), 2)
    chunked = summarise_hidden(hidden, weight, targets, ("logp", "entropy"), 2)
    # float64 carries 1e-16; sums over 17 ids and 13 rows in another order stay below 1e-12
    assert torch.allclose(chunked.logp, plain.logp, rtol=0, atol=1e-12)
    assert torch.allclose(chunked.entropy, plain.entropy, rtol=0, atol=1e-12)
    assert not chunked.entropy.requires_grad and chunked.logits is None
    assert chunked.logp.requires_grad == bool(leaves)
    if not leaves:
        return
    coefficients = torch.linspace(-1, 2, 13, dtype=torch.float64)
    expected = torch.autograd.grad((plain.logp * coefficients).sum(), leaves)
    found = torch.autograd.grad((chunked.logp * coefficients).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",)], ids=str)
def test_chunks_pass_gradcheck(monkeypatch, trained):
    hidden, weight, targets = head_inputs(num_rows=5, vocab=7, width=3)
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", 2 * len(weight))
    leaves = [x.requires_grad_() for name, x in (("hidden", hidden), ("weight", weight)) if name in trained]

    def logp(*leaves: Tensor) -> Tensor:
        given = {"hidden": hidden, "weight": weight, **dict(zip(trained, leaves, strict=True))}
        return summarise_hidden(given["hidden"], given["weight"], targets, ("logp",), 2).logp

    assert torch.autograd.gradcheck(logp, leaves)


def test_a_masked_target_has_no_probability_and_gives_no_gradient_to_its_column(monkeypatch):
    hidden, weight, targets = head_inputs()
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", 4 * len(weight))
    targets[5] = 2
    weight.requires_grad_()
    logp = summarise_hidden(hidden, weight, targets, ("logp",), 2).logp
    assert torch.equal(logp.isinf(), targets == 2)
    (slope,) = torch.autograd.grad(logp, weight, torch.ones_like(logp))
    assert (slope[2] == 0).all() and slope.isfinite().all()


def test_chunks_in_half_precision_add_up_in_float32(monkeypatch):
    hidden, weight, targets = head_inputs(num_rows=1000)
    # all push the same row of the weight the same way; a bfloat16 sum would stand still after a few hundred
    hidden, weight, targets = hidden.abs().bfloat16(), weight.bfloat16(), torch.full_like(targets, 3)
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", len(weight))  # one row each: 1000 sums
    weight.requires_grad_()
    chunked = summarise_hidden(hidden, weight, targets, ("logp", "entropy"), 2)
    plain = summarise_logits(hidden @ weight.T, targets, ("logp", "entropy"), 2)
    assert chunked.logp.dtype == chunked.entropy.dtype == torch.float32
    assert torch.allclose(chunked.logp, plain.logp, atol=1e-5)  # the same bfloat16 logits, float32 from there on
    (found,), (expected,) = (torch.autograd.grad(out.logp.sum(), weight) for out in (chunked, plain))
    assert found.dtype == torch.bfloat16
    # bfloat16 rounds by up to 2^-9: the summands, which is noise, and once the sum
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()


def test_autocast_decides_the_precision_of_the_chunks_in_both_directions():
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in head_inputs())
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = summarise_hidden(hidden, weight, targets, ("logp",), 2).logp
        plain = summarise_logits(torch.nn.functional.linear(hidden, weight), targets, ("logp",), 2).logp
    assert torch.equal(chunked, plain)
    found, expected = (torch.autograd.grad(logp.sum(), weight)[0] for logp in (chunked, plain))
    assert found.dtype == torch.float32
    # float32 differences that flip a bfloat16 rounding are rare; logits of another precision would move all entries
    assert (found != expected).float().mean() < 0.05


def test_a_model_scores_the_same_in_chunks(monkeypatch):
    """Same log-probabilities, entropies and gradients whichever way the head goes."""
    rollouts = fake_rollouts()
    masks = draw_uniform_count(rollouts, 2, coupled=True, noise=Noise(0))
    found = {}
    for limit in (1 << 24, 60):
        monkeypatch.setattr(heads, "CHUNK_NUMBERS", limit)
        policy = tiny_policy()
        scores = score_copies(policy, rollouts, masks, torch.arange(24), entropy=True)
        scores.logps.square().sum().backward()
        found[limit] = [scores.logps.detach(), scores.entropy, *gradients(policy)]
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_head_that_is_no_bare_matrix_is_called_as_a_module(monkeypatch):
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", 1)
    policy = tiny_policy()
    calls = []
    policy.module.lm_head.register_forward_hook(lambda *_: calls.append(1))
    rollouts = fake_rollouts()
    masks = draw_uniform_count(rollouts, 2, coupled=True, noise=Noise(0))
    score_copies(policy, rollouts, masks, torch.arange(4))
    assert calls == [1]  # once: a call may stand for a collective, and ranks differ in their number of rows


def test_chunks_refuse_what_they_cannot_give():
    hidden, weight, targets = head_inputs()
    with pytest.raises(ValueError, match="unknown token outputs"):
        summarise_hidden(hidden, weight, targets, ("logits",), 2)
    with pytest.raises(ValueError, match="needs targets"):
        summarise_hidden(hidden, weight, None, ("logp",), 2)
    assert summarise_hidden(hidden, weight, None, ("entropy",), 2).logp is None
