"""Rollouts from a mixture of policy and reference: what is drawn is the enumerated law, and what is counted is true."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import DigitSum, make_trainer, sudoku_source, tiny_policy
from tests.toys import TabularPolicy
from unmask.bases import frozen_copy, reference_policy
from unmask.build import train_recipe
from unmask.errors import ConfigError, ModelError
from unmask.models import MaskedPolicy
from unmask.models.adapters import LoraConfig, adapter_parameters, wrap
from unmask.noise import Noise
from unmask.objectives import WD1
from unmask.samplers import Dream, LowConfidence, OutsideEngine, RandomRemasking, Roar
from unmask.samplers.mixture import GeometricMixture
from unmask.types import PromptBatch

NOISE = Noise(seed=2).stream("rollout")
POLICY, REFERENCE = TabularPolicy(seed=21), TabularPolicy(seed=22)  # 3 tokens, completions of 3
SHARE = 0.3
MIXTURE = GeometricMixture(POLICY, REFERENCE, SHARE)
SAMPLERS = {
    "roar": Roar(3),
    "roar-tempered": Roar(3, temperature=0.5),
    "random_remasking": RandomRemasking(3, num_steps=2, temperature=1.0),
    "low_confidence": LowConfidence(3, temperature=1.0),
    "low_confidence-greedy": LowConfidence(3, num_steps=2),
    "low_confidence-threshold": LowConfidence(3, threshold=0.5, temperature=0.7),
    "low_confidence-entropy": LowConfidence(3, entropy_bound=0.5, temperature=1.0),
    "low_confidence-guided": LowConfidence(3, guidance=0.5, temperature=1.0),
    "dream": Dream(3, temperature=0.8),
    "dream-origin": Dream(3, alg="origin", temperature=1.0, top_k=2),
}


def prompts(rows: int) -> PromptBatch:
    ids = torch.zeros(rows, 2, dtype=torch.int64)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(rows) % 7, torch.arange(rows))


def mixture_law(completion: list[int], slot: int) -> list[float]:
    """p^(1-b) q^b over the tokens at one slot of a state, normalised, from each model's own softmax."""
    canvas = torch.tensor([[0, 0, *completion]])
    p, q = (model(canvas)[0, 2 + slot, :3].softmax(-1).tolist() for model in (POLICY, REFERENCE))
    weights = [a ** (1 - SHARE) * b**SHARE for a, b in zip(p, q, strict=True)]
    return [w / sum(weights) for w in weights]


@torch.no_grad()
def test_steps_are_drawn_from_the_enumerated_mixture():
    """Left to right, each token is the inverse of the enumerated law at the noise's own uniform: the law itself."""
    batch = prompts(400)
    samples = Roar(3, block_length=1).sample(MIXTURE, batch, noise=NOISE)
    drawn = set()
    for row in range(400):
        state = [POLICY.mask_token_id] * 3
        for slot in range(3):
            law = mixture_law(state, slot)
            u = float(NOISE.stream("token").uniform(batch.prompt_key[row], batch.rollout_index[row], slot, slot))
            token = next(v for v in range(3) if u < sum(law[: v + 1]))
            assert int(samples.completion_ids[row, slot]) == token
            assert abs(samples.logps[row, slot].item() - math.log(law[token])) < 1e-10
            state[slot] = token
        drawn.add(tuple(state))
    assert len(drawn) > 20  # of 27
    assert samples.nfe.tolist() == [6] * 400 and samples.reveal_step.tolist() == [[0, 1, 2]] * 400


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_as_from_the_one_model_that_has_the_mixed_logits(name):
    mixed = TabularPolicy()
    with torch.no_grad():
        mixed.table.copy_((1 - SHARE) * POLICY.table + SHARE * REFERENCE.table)
    states, expected_states = [], []
    samples = SAMPLERS[name].sample(MIXTURE, prompts(60), noise=NOISE, on_step=states.append)
    expected = SAMPLERS[name].sample(mixed, prompts(60), noise=NOISE, on_step=expected_states.append)
    assert torch.equal(samples.completion_ids, expected.completion_ids)
    assert torch.equal(samples.reveal_step, expected.reveal_step)
    assert torch.allclose(samples.logps, expected.logps, rtol=0, atol=1e-12)
    assert torch.equal(samples.nfe, 2 * expected.nfe)
    assert all(map(torch.equal, states, expected_states)) and len(states) == len(expected_states)
    alone = SAMPLERS[name].sample(POLICY, prompts(60), noise=NOISE)
    assert not torch.equal(alone.completion_ids, samples.completion_ids)  # the reference has a say


def test_a_token_that_one_of_the_two_may_not_draw_is_not_drawn():
    canvas, wanted = torch.tensor([[0, 0, 3, 3, 3]]), torch.tensor([[False, False, True, True, True]])
    logits = MIXTURE.token_outputs(canvas, None, wanted).logits
    assert torch.isneginf(logits[:, POLICY.mask_token_id]).all() and not logits.isnan().any()
    assert not logits.requires_grad


def away(policy: MaskedPolicy) -> None:
    """Move what is trained, so that the policy is no longer its reference."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_the_trainer_collects_from_the_mixture_that_the_algorithm_asks_for(has_adapter):
    policy = tiny_policy()
    if has_adapter:
        module = wrap(policy.module, LoraConfig(rank=4), seed=0).double()
        policy = MaskedPolicy(module, policy.tokenizer)
    reference = reference_policy(policy)
    away(policy)
    source = sudoku_source(DigitSum())

    def collected(writer):
        return source.collect(writer, 0, slice(0, 16))

    trainer = make_trainer(policy, WD1(ref_coef=0.5), source, reference=reference)
    rollouts = trainer.prepare(0).rollouts
    expected = collected(GeometricMixture(policy, reference, 1 / 3))
    assert torch.equal(rollouts.completion_ids, expected.completion_ids)
    assert torch.equal(rollouts.sample_logps, expected.sample_logps)
    assert rollouts.nfe.tolist() == [8] * 16
    alone = make_trainer(policy, WD1(), source, reference=reference).prepare(0).rollouts
    assert torch.equal(alone.completion_ids, collected(policy).completion_ids) and alone.nfe.tolist() == [4] * 16
    assert not torch.equal(alone.completion_ids, rollouts.completion_ids)
    assert not torch.equal(alone.completion_ids, collected(reference).completion_ids)
    if has_adapter:  # the adapter is on again, and trained
        assert policy.switch.active == "default"
        assert all(parameter.requires_grad for _, parameter in adapter_parameters(policy.module, "default"))


# ---- refusals


def tables(**sampler) -> dict:
    return {
        "model": {"path": "somewhere"},
        "task": {"type": "sudoku"},
        "algorithm": {"type": "wd1", "ref_coef": 0.5},
        "sampler": {"type": "low_confidence", "block_length": 4, **sampler},
    }


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({}, None),
        ({"guidance": 1.0}, None),
        (
            {"cache": "dual"},
            r"sampler.type = 'low_confidence': .* reads one model.* without a cache",
        ),
        ({"cache": "prefix"}, r"wd1 draws 0.333 of its logits from the reference"),
        ({"type": "block_diffusion"}, r"sampler.type = 'block_diffusion': "),
        ({"type": "engine", "engine": "mine.py:Engine"}, r"sampler.type = 'engine': "),
    ],
    ids=str,
)
def test_samplers_that_read_one_model_are_refused_while_building(sampler, message, tmp_path):
    changed = tables(**sampler)
    if sampler.get("type"):
        del changed["sampler"]["block_length"]
    if message is None:
        assert train_recipe(changed, tmp_path).sampler
        return
    with pytest.raises(ConfigError, match=message):
        train_recipe(changed, tmp_path)
    train_recipe({**changed, "algorithm": {"type": "wd1"}}, tmp_path)  # without a share it is nobody's business


def test_caches_and_engines_refuse_a_mixture_that_is_handed_to_them(tmp_path):
    policy = tiny_policy()
    mixture = GeometricMixture(policy, frozen_copy(policy), 0.5)
    ids, mask = policy.encode_prompts(["1|"], 4)
    batch = PromptBatch(ids, mask, torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(ModelError, match="has no cache"):
        LowConfidence(4, block_length=2, cache="prefix").sample(mixture, batch, noise=NOISE)
    with pytest.raises(ModelError, match="has no cache"):
        mixture.new_cache()
    (tmp_path / "mine.py").write_text("class Engine:\n    pass\n")
    engine = OutsideEngine(4, engine=f"{tmp_path / 'mine.py'}:Engine")
    with pytest.raises(ModelError, match="no weights of its own"):
        engine.sample(mixture, batch, noise=NOISE)
    with pytest.raises(ModelError, match="no weights of its own"):
        mixture.named_weights()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_mixture_of_one_model_is_none(share):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        GeometricMixture(POLICY, REFERENCE, share)


def test_a_mixture_is_not_scored():
    canvas = torch.tensor([[0, 0, 3, 3, 3]])
    with pytest.raises(ValueError, match="logits alone, and was asked for logp"):
        MIXTURE.token_outputs(canvas, None, canvas == 3, want=("logp",))
