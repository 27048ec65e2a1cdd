"""Every way to log p(target) equals the plain head, also where the mask token holds nearly all of the probability.

Ways that this machine cannot run are skipped with the reason. Liger's and cut cross-entropy's kernels are for GPUs;
without one they can be run by Triton's interpreter, where both packages and triton are installed: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.helpers import fake_rollouts, gradients, tiny_policy
from tests.scoring_peak import CHUNK_ROWS, VOCAB
from unmask.corruption import draw_uniform_count
from unmask.errors import ConfigError
from unmask.models import chunked_head, cross_entropy
from unmask.models.cross_entropy import CROSS_ENTROPIES, check_cross_entropy, exclude_mask
from unmask.models.outputs import summarise_hidden, summarise_logits
from unmask.noise import Noise
from unmask.scoring import score_copies

MASK = 2
TRAINED = [("hidden", "weight"), ("hidden",), ("weight",)]
GPU_ONLY = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


@dataclass(frozen=True)
class Way:
    """One entry of the table with the precision it can be held to."""

    name: str
    device: str
    dtype: torch.dtype
    """Of hidden states and weight."""
    tolerance: float
    """Of log-probabilities, nats."""
    slope_tolerance: float
    """Of gradients, as a share of the largest."""


# float64 carries 1e-16 and float32 1e-7, in sums over tens of terms. Cut cross-entropy has bfloat16 only, 2^-9: its
# logits are not rounded, but those of rows that fall back to chunks are (15 here), and so are p and the gradients.
EXACT = Way("", "cpu", torch.float64, 1e-10, 1e-10)
SINGLE = Way("", "cpu", torch.float32, 2e-5, 2e-5)
HALF = Way("", "cpu", torch.bfloat16, 2**-8 * 15, 0.03)
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=CROSS_ENTROPIES)
def way(request) -> Way:
    """Skips what cannot run here."""
    name = request.param
    precision = {"liger": SINGLE, "cce": HALF}.get(name, EXACT)
    if name in GPU_ONLY and IS_INTERPRETED:
        pytest.importorskip(GPU_ONLY[name])
        is_half = precision == HALF  # the interpreter multiplies bfloat16 numbers as if they were integers
        return replace(precision, name=name, dtype=torch.float16 if is_half else precision.dtype)
    try:
        check_cross_entropy(name)
    except ConfigError as error:
        pytest.skip(str(error))
    return replace(precision, name=name, device="cuda" if name in GPU_ONLY else "cpu")


def head_inputs(way: Way, num_rows: int = 37, vocab: int = 50, width: int = 24) -> dict[str, Tensor]:
    """Hidden states (N, H), weight (V, H) and targets (N,) without the mask token."""
    g = torch.Generator().manual_seed(num_rows)
    hidden, weight = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (num_rows, vocab))
    targets = torch.randint(3, vocab, (num_rows,), generator=g)
    targets[0] = 0  # an id below the mask token's
    return {
        "hidden": (hidden * 0.5).to(way.device, way.dtype),
        "weight": weight.to(way.device, way.dtype),
        "targets": targets.to(way.device),
    }


def with_mask_share(inputs: dict[str, Tensor], logit: float) -> dict[str, Tensor]:
    """The same with one more dimension of the hidden states, read by the mask token alone: its logit is near that."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    column = torch.zeros_like(weight[:, :1])
    column[MASK] = logit
    hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
    return {**inputs, "hidden": hidden, "weight": torch.cat([weight, column], 1)}


def logp_of(name: str, inputs: dict[str, Tensor]) -> Tensor:
    return CROSS_ENTROPIES[name](inputs["hidden"], inputs["weight"], inputs["targets"], MASK)


def truth(inputs: dict[str, Tensor]) -> Tensor:
    """In float64, through the logits."""
    hidden, weight = inputs["hidden"].double(), inputs["weight"].double()
    logp = summarise_logits(hidden @ weight.T, inputs["targets"], ("logp",), MASK).logp
    assert logp is not None
    return logp


# ---- equal to the plain head


@pytest.mark.parametrize("mask_logit", [0.0, 4.0, 12.0, 30.0])
@pytest.mark.parametrize("trained", TRAINED, ids=str)
def test_every_way_equals_the_plain_head(way, trained, mask_logit):
    """From a mask token like any other to one beside which the others' probability is 1e-12 in all."""
    inputs = with_mask_share(head_inputs(way), mask_logit)
    leaves = [inputs[name].requires_grad_() for name in trained]
    found, expected = logp_of(way.name, inputs), truth(inputs)
    assert found.dtype == torch.promote_types(way.dtype, torch.float32)
    assert (found - expected).abs().max() <= way.tolerance
    coefficients = torch.linspace(-1, 2, len(found), dtype=torch.float64, device=way.device)  # unequal, both signs
    found_slopes = torch.autograd.grad((found * coefficients).sum(), leaves)
    expected_slopes = torch.autograd.grad((expected * coefficients).sum(), leaves)
    for a, b in zip(found_slopes, expected_slopes, strict=True):
        assert a.dtype == way.dtype and (a - b).abs().max() <= way.slope_tolerance * b.abs().max()


def test_the_mask_token_as_target_has_no_probability(way):
    inputs = head_inputs(way)
    inputs["targets"][5] = MASK
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    logp = logp_of(way.name, inputs)
    assert torch.equal(logp.isinf(), inputs["targets"] == MASK) and logp[5] < 0
    others = inputs["targets"] != MASK
    assert (logp - truth(inputs))[others].abs().max() <= way.tolerance
    for slope in torch.autograd.grad(logp, leaves, torch.ones_like(logp)):  # infinite in value alone
        assert slope.isfinite().all()


@pytest.mark.parametrize("mask_token_id", [0, 49])
def test_the_mask_token_may_be_the_first_or_the_last_id(way, mask_token_id):
    inputs = head_inputs(way)
    inputs["targets"] = torch.arange(37, device=way.device) + 5
    logits = inputs["hidden"].double() @ inputs["weight"].double().T
    expected = summarise_logits(logits, inputs["targets"], ("logp",), mask_token_id)
    found = CROSS_ENTROPIES[way.name](inputs["hidden"], inputs["weight"], inputs["targets"], mask_token_id)
    assert (found - expected.logp).abs().max() <= way.tolerance


def test_half_precision_is_as_good_as_the_plain_head_in_half_precision(way):
    dtype = torch.float16 if way.dtype == torch.float16 else torch.bfloat16
    half = {
        name: x.to(dtype) if x.is_floating_point() else x
        for name, x in with_mask_share(head_inputs(way, num_rows=200, vocab=500), 6.0).items()
    }
    inputs = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in half.items()}
    found = logp_of(way.name, inputs)
    assert found.dtype == torch.float32
    # truth: the same rounded inputs, all further steps in float64. A bfloat16 number is off by up to 2^-9 of itself,
    # and logits (up to 15 here) as well as torch's returned losses are such numbers
    expected = truth(half)
    assert (found - expected).abs().max() <= 2**-8 * 15
    (slope,) = torch.autograd.grad(found.mean(), inputs["hidden"])
    plain = half["hidden"].double().requires_grad_()
    (wanted,) = torch.autograd.grad(truth({**half, "hidden": plain}).mean(), plain)
    # p and onehot - p are rounded to 2^-9 as well, over 500 ids of either sign
    assert (slope - wanted).abs().max() <= 0.03 * wanted.abs().max()


# ---- the correction for kernels that know no bias


def full_softmax_logp(inputs: dict[str, Tensor]) -> Tensor:
    """What such a kernel gives: the mask token is in the support."""
    logits = inputs["hidden"] @ inputs["weight"].T
    return logits.log_softmax(-1).gather(-1, inputs["targets"][:, None]).squeeze(-1)


@pytest.mark.parametrize("mask_logit", [-5.0, 0.0, 3.0, 4.0, 5.0, 8.0, 15.0, 40.0])
def test_the_correction_removes_the_mask_token_exactly(mask_logit):
    for precision in (EXACT, SINGLE):
        inputs = with_mask_share(head_inputs(precision), mask_logit)
        leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
        found = exclude_mask(full_softmax_logp(inputs), **inputs, mask_token_id=MASK)
        expected = truth(inputs)
        assert (found - expected).abs().max() <= precision.tolerance
        slopes = [torch.autograd.grad(logp.sum(), leaves) for logp in (found, expected)]
        for a, b in zip(*slopes, strict=True):
            assert (a - b).abs().max() <= precision.slope_tolerance * b.abs().max()


def test_without_the_limit_the_correction_loses_its_digits(monkeypatch):
    """Why there is one: at p(mask) = 1 - 1e-6 the formula alone is off by a tenth of a nat in float32, or nan."""
    inputs = with_mask_share(head_inputs(SINGLE), 22.0)
    share = (inputs["hidden"] @ inputs["weight"].T).double().softmax(-1)[:, MASK]
    assert 0 < (1 - share).min() < (1 - share).max() < 1e-3
    monkeypatch.setattr(cross_entropy, "MASK_SHARE_LIMIT", 2.0)
    alone = exclude_mask(full_softmax_logp(inputs), **inputs, mask_token_id=MASK)
    assert not ((alone - truth(inputs)).abs() < 0.05).all()


# ---- chosen by name


def test_a_model_scores_the_same_whichever_way_is_chosen(monkeypatch, way):
    if way.dtype != torch.float64:
        pytest.skip("the embedded model is run in float64 on the CPU here")
    monkeypatch.setattr(chunked_head, "CHUNK_NUMBERS", 60)
    rollouts = fake_rollouts()
    masks = draw_uniform_count(rollouts, 2, coupled=True, noise=Noise(0))
    found, calls = [], []
    chosen = CROSS_ENTROPIES[way.name]
    monkeypatch.setitem(CROSS_ENTROPIES, way.name, lambda *args: calls.append(1) or chosen(*args))
    for name in ("chunked", way.name):
        policy = tiny_policy()
        policy.module.cross_entropy = name
        scores = score_copies(policy, rollouts, masks, torch.arange(24), entropy=True)
        scores.logps.square().sum().backward()
        found.append([scores.logps.detach(), scores.entropy, *gradients(policy)])
    assert calls == ([] if way.name == "chunked" else [1])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_entropy_alone_asks_no_kernel(monkeypatch):
    inputs = head_inputs(EXACT)
    monkeypatch.setitem(CROSS_ENTROPIES, "plain", lambda *_: pytest.fail("called"))
    arguments = (inputs["hidden"], inputs["weight"], None, ("entropy",), MASK)
    chosen, default = summarise_hidden(*arguments, cross_entropy="plain"), summarise_hidden(*arguments)
    assert chosen.logp is None and torch.equal(chosen.entropy, default.entropy)


def test_what_cannot_run_is_refused_in_one_line(monkeypatch):
    for name in ("chunked", "plain"):
        check_cross_entropy(name)
    with pytest.raises(ConfigError, match=r"'chunkd' is unknown\. Known: chunked, plain, .* Did you mean 'chunked'\?"):
        check_cross_entropy("chunkd")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in GPU_ONLY:
        with pytest.raises(ConfigError, match=rf"'{name}' has kernels for GPUs only.*'chunked'"):
            check_cross_entropy(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", None)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    for name in GPU_ONLY:
        with pytest.raises(ConfigError, match=rf"pip install 'unmask\[{name}\]'") as refusal:
            check_cross_entropy(name)
        assert "\n" not in str(refusal.value)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(ConfigError, match=r"needs torch >= 2\.13, found"):
        check_cross_entropy("linear_cross_entropy")


def test_a_liger_that_scales_all_tokens_alike_is_refused(monkeypatch):
    old = SimpleNamespace(fused_linear_cross_entropy_forward=lambda _input, weight, target: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cross_entropy, "optional", lambda module, extra: old)
    with pytest.raises(ConfigError, match=r"liger-kernel>=0\.8\.2"):
        check_cross_entropy("liger")


# ---- memory


def measured_peaks(name: str, *numbers: int) -> list[int]:
    """Bytes for each number of positions, in a process of its own: `scoring_peak.py` says why."""
    command = [sys.executable, "-m", "tests.scoring_peak", name, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    peaks: list[int] = json.loads(done.stdout)
    return peaks


reads_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


@reads_proc
@pytest.mark.parametrize("name", ["chunked", "linear_cross_entropy"])
def test_peak_memory_does_not_grow_with_positions_times_vocabulary(name):
    """LLaDA's vocabulary, pages really touched, whoever allocated them. 68 MiB of logits in all become 135.

    The allowance of a quarter is for smaller tensors, which a run may find mapped.
    """
    try:
        check_cross_entropy(name)
    except ConfigError as error:
        pytest.skip(str(error))
    peaks = measured_peaks(name, 140, 280)
    assert peaks[1] < 1.25 * peaks[0]
    assert max(peaks) < 1.5 * CHUNK_ROWS * VOCAB * 4  # one buffer of float32 logits, not two


@reads_proc
def test_the_meter_sees_what_keeping_the_logits_costs():
    """Otherwise the test above could not fail: logits, their softmax and their gradient are there at once."""
    assert measured_peaks("plain", 140)[0] > 2.5 * 140 * VOCAB * 4
