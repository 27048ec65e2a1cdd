"""The full-vocabulary KL to a reference against softmaxes written out: values and gradients, in chunks, in models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unmask
import unmask.models.chunked_head as heads
from tests.checkpoints import write_checkpoint
from tests.helpers import fake_rollouts, gradients, tiny_policy
from tests.test_adapters import SMALL, randomise
from tests.test_masked_lm import CLASSES, tokenizer
from unmask.bases import reference_policy
from unmask.corruption import draw_uniform_count
from unmask.errors import ModelError
from unmask.models import LoraConfig, with_lora
from unmask.models.adapters import adapter_parameters
from unmask.models.divergence import kl_to_reference
from unmask.noise import Noise
from unmask.scoring import score_copies
from unmask.types import ReferenceStates

MASK = 2


def states(num_rows: int = 13, vocab: int = 17, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (N, H) and weight (V, H) of the policy, then of the reference, float64."""
    g = torch.Generator().manual_seed(num_rows)
    shapes = ((num_rows, width), (vocab, width)) * 2
    hidden, weight, ref_hidden, ref_weight = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return hidden, weight, ref_hidden, ref_weight


def written_out(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, mask: int = MASK) -> Tensor:
    """Σ_v p_v (log p_v - log q_v) over the vocabulary without the mask token, term by term."""
    keep = [v for v in range(len(weight)) if v != mask]
    p = torch.softmax(hidden @ weight.T[:, keep], -1)
    q = torch.softmax(ref_hidden @ ref_weight.T[:, keep], -1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",), ()], ids=str)
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 13, 100])
def test_value_and_gradient_are_those_of_the_full_softmax(monkeypatch, rows_per_chunk, trained):
    hidden, weight, ref_hidden, ref_weight = states()
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", 2 * rows_per_chunk * len(weight))
    leaves = [x.requires_grad_() for name, x in (("hidden", hidden), ("weight", weight)) if name in trained]
    found = kl_to_reference(hidden, weight, ReferenceStates(ref_hidden, ref_weight), MASK)
    expected = written_out(hidden, weight, ref_hidden, ref_weight)
    # sums of 17 terms in float64 lose about 1e-15
    assert torch.allclose(found, expected, rtol=0, atol=1e-12) and (found > 0.01).all()
    assert found.requires_grad == bool(leaves)
    if leaves:
        coefficients = torch.linspace(-1, 2, 13, dtype=torch.float64)
        slopes = torch.autograd.grad((found * coefficients).sum(), leaves)
        wanted = torch.autograd.grad((expected * coefficients).sum(), leaves)
        for a, b in zip(slopes, wanted, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_it_passes_gradcheck(monkeypatch):
    hidden, weight, ref_hidden, ref_weight = states(num_rows=5, vocab=7, width=3)
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", 4 * len(weight))
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: kl_to_reference(h, w, ReferenceStates(ref_hidden, ref_weight), 2), leaves
    )


def test_the_reference_gets_no_gradient():
    hidden, weight, ref_hidden, ref_weight = (x.requires_grad_() for x in states())
    kl = kl_to_reference(hidden, weight, ReferenceStates(ref_hidden, ref_weight), MASK).sum()
    assert torch.autograd.grad(kl, [ref_hidden, ref_weight], allow_unused=True) == (None, None)


def test_equal_bits_give_zero_and_a_zero_gradient_in_any_type():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        hidden, weight = (x.to(dtype).requires_grad_() for x in states()[:2])
        kl = kl_to_reference(hidden, weight, ReferenceStates(hidden.detach(), weight.detach()), MASK)
        assert (kl == 0).all()
        assert all((slope == 0).all() for slope in torch.autograd.grad(kl.sum(), [hidden, weight]))


def test_the_mask_tokens_logit_changes_nothing_and_gets_no_gradient():
    hidden, weight, ref_hidden, ref_weight = states()
    other, ref_other = weight.clone(), ref_weight.clone()
    other[MASK], ref_other[MASK] = 30.0, -7.0
    values = [
        kl_to_reference(hidden, w.requires_grad_(), ReferenceStates(ref_hidden, r), MASK)
        for w, r in ((weight, ref_weight), (other, ref_other))
    ]
    assert torch.equal(*values)
    (slope,) = torch.autograd.grad(values[1].sum(), other)
    assert (slope[MASK] == 0).all() and (slope != 0).any()


def test_it_stays_finite_where_tokens_are_all_but_impossible():
    hidden, weight, ref_hidden, ref_weight = (x.float() for x in states())
    hidden.requires_grad_()
    kl = kl_to_reference(hidden * 1e3, weight, ReferenceStates(-1e3 * ref_hidden, ref_weight), MASK)
    assert kl.isfinite().all() and torch.autograd.grad(kl.sum(), hidden)[0].isfinite().all()


def test_half_precision_adds_up_in_float32():
    cut = [x.bfloat16() for x in states()]
    kl = kl_to_reference(cut[0], cut[1], ReferenceStates(cut[2], cut[3]), MASK)
    assert kl.dtype == torch.float32
    # the same bfloat16 logits (2^-9 relative, values up to about 10), so a few hundredths of a nat at most
    assert torch.allclose(kl, written_out(*(x.float() for x in cut)), atol=0.1)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")

    def open_policy(family: str):
        if family == "tiny":
            return tiny_policy()
        policy = unmask.load(write_checkpoint(family, folder / family))
        policy.module.double()
        return policy

    return open_policy


def compared(policy, reference, rollouts, masks, copies):
    return score_copies(policy, rollouts, masks, copies, kl_to=reference)


def kl_by_logits(policy, reference, rollouts, masks) -> Tensor:
    """(B, K, L) from the logits of both models, one masked copy at a time."""
    out = torch.zeros(masks.scored.shape, dtype=torch.float64)
    clean = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    real = torch.cat([rollouts.prompt_mask, torch.ones_like(rollouts.completion_ids, dtype=torch.bool)], 1)
    prompt = rollouts.prompt_ids.shape[1]
    for b, k in [(b, k) for b in range(len(rollouts)) for k in range(masks.num_masks)]:
        where = torch.nn.functional.pad(masks.scored[b, k], (prompt, 0))[None]
        canvas = clean[b : b + 1].masked_fill(masks.masked[b, k], policy.mask_token_id)
        logits = (m.token_outputs(canvas, real[b : b + 1], where).logits for m in (policy, reference))
        p, q = (
            torch.cat([x[:, : policy.mask_token_id], x[:, policy.mask_token_id + 1 :]], 1).softmax(-1) for x in logits
        )
        out[b, k, masks.scored[b, k]] = (p * (p.log() - q.log())).sum(-1)
    return out


@pytest.mark.parametrize("family", ["tiny", "llada", "Dream"])
def test_scored_copies_have_the_kl_of_the_models_logits(policies, family):
    policy, reference = policies(family), policies(family)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for parameter in policy.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    rollouts = fake_rollouts(num_groups=2, group_size=2)
    masks = draw_uniform_count(rollouts, 2, coupled=True, noise=Noise(0))
    scores = compared(policy, reference, rollouts, masks, torch.arange(8))
    expected = kl_by_logits(policy, reference, rollouts, masks)
    assert torch.allclose(scores.kl.view_as(expected), expected.detach(), rtol=0, atol=1e-10)
    assert (scores.kl.view_as(expected) != 0).equal(masks.scored)
    scores.kl.square().sum().backward()
    found = gradients(policy)
    assert gradients(reference) == []
    policy.module.zero_grad()
    expected.square().sum().backward()
    for a, b in zip(found, gradients(policy), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("family", ["tiny", "llada", "Dream"])
def test_with_lora_the_reference_is_the_same_model_without_its_adapter(policies, family, is_checkpointed):
    policy = with_lora(policies(family), SMALL, seed=0)
    policy.module.double()
    if is_checkpointed:
        policy.enable_gradient_checkpointing()
    reference = reference_policy(policy)
    rollouts = fake_rollouts(num_groups=2, group_size=2)
    masks = draw_uniform_count(rollouts, 2, coupled=True, noise=Noise(0))
    start = compared(policy, reference, rollouts, masks, torch.arange(8))
    assert (start.kl == 0).all()  # B is zero at first
    start.kl.sum().backward()
    assert all((p.grad == 0).all() for _, p in adapter_parameters(policy.module, "default"))
    policy.module.zero_grad()
    randomise(policy, scale=0.1)
    for copies in (torch.arange(4), torch.arange(4, 8)):  # micro-batches: the reference is asked before each forward
        scores = compared(policy, reference, rollouts, masks, copies)
        (scores.kl.sum() + scores.logps.sum()).backward()
        expected = kl_by_logits(policy, reference, rollouts, masks).flatten(0, 1)[copies]
        assert torch.allclose(scores.kl, expected, rtol=0, atol=1e-10) and (scores.kl.sum(1) > 0).any()
    assert all((p.grad != 0).any() for _, p in adapter_parameters(policy.module, "default"))


def test_the_mean_and_the_states_of_wanted_positions(policies):
    policy = policies("tiny")
    canvas = fake_rollouts().completion_ids[:3]
    positions = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    out = policy.token_outputs(canvas, None, positions, want=("hidden", "pooled"))
    assert out.logits is None and out.logp is None and not out.hidden.requires_grad
    assert torch.equal(out.hidden @ policy.head_weight().T, policy.module.lm_head(out.hidden).detach())
    assert torch.allclose(out.pooled[0], out.hidden[:3].mean(0), rtol=0, atol=1e-15)
    assert (out.pooled[1] == 0).all() and torch.equal(out.pooled[2].detach(), out.hidden[3])
    out.pooled.sum().backward()
    assert any((g != 0).any() for g in gradients(policy))


def test_what_has_no_bare_matrix_is_refused_in_one_line(policies, tmp_path):
    CLASSES["bert"]().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    policy = unmask.load(tmp_path)
    with pytest.raises(ModelError, match="no bare matrix"):
        policy.head_weight()
    canvas = torch.full((1, 4), policy.mask_token_id)
    everywhere = torch.ones_like(canvas, dtype=torch.bool)
    out = policy.token_outputs(canvas, None, everywhere, want=("hidden", "pooled"))
    assert torch.allclose(out.pooled[0], out.hidden.mean(0), atol=1e-6)
    with pytest.raises(ModelError, match="has no 'kl' output"):
        policy.token_outputs(canvas, None, everywhere, want=("kl",), reference=ReferenceStates(canvas, canvas))
    adapted = with_lora(policies("tiny"), LoraConfig(rank=2, alpha=2.0, targets=("q_proj", "lm_head")), seed=0)
    with pytest.raises(ModelError, match="no bare matrix here"):
        adapted.head_weight()
    with pytest.raises(ValueError, match="needs the reference's states"):
        policies("tiny").token_outputs(canvas, None, everywhere, want=("kl",))
