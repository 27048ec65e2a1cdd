"""DMPO's density of drawn tokens: what samplers record of it, and that weights with it have the target they name."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.helpers import tiny_policy
from tests.objective_inputs import POLICY, assert_same_value_and_gradient, inputs
from tests.oracles import conditionals, make_rollouts, score_copies
from tests.oracles_steps import dmpo_weights, every_subset, policy_of, trajectory_logp, wdce_loss
from tests.test_dmpo import BATCH, GROUPS, REWARDS, bounds, with_evidence
from tests.toys import TabularPolicy
from unmask.buffer import Buffer, BufferConfig, join_rollouts
from unmask.build import train_recipe
from unmask.errors import ConfigError
from unmask.noise import Noise
from unmask.objectives import DmpoWDCE, DmpoWDDO
from unmask.objectives.target_weights import log_density_ratio, target_weights
from unmask.rollout import join_samples
from unmask.samplers import Dream, LowConfidence, RandomRemasking, Roar
from unmask.samplers.canvas import Start
from unmask.types import LossInputs, PromptBatch, Samples, take_rows

NOISE = Noise(seed=6).stream("rollout")
OLD, REF = TabularPolicy(seed=31), TabularPolicy(seed=32)  # 3 tokens, completions of 3
TEMPERATURE, ALPHA = 0.5, 0.7
ORDER = [0, 1, 2]
TEMPERED = {"density": "tempered"}


def prompts(rows: int) -> PromptBatch:
    ids = torch.zeros(rows, 2, dtype=torch.int64)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(rows) % 7, torch.arange(rows))


@torch.no_grad()
def law_logps(completion: list[int], steps: list[int], temperature: float, top_k: int = 3) -> list[float]:
    """Each token's log-probability in the tempered, cut law of the state that revealed it, token by token."""
    logps = []
    for slot, token in enumerate(completion):
        state = [OLD.mask_token_id if steps[i] >= steps[slot] else v for i, v in enumerate(completion)]
        powers = [math.exp(x / temperature) for x in OLD(torch.tensor([[0, 0, *state]]))[0, 2 + slot, :3].tolist()]
        kept = sorted(powers, reverse=True)[:top_k]
        logps.append(math.log(powers[token] / sum(kept)))
    return logps


# ---- the record


@pytest.mark.parametrize(
    ("sampler", "top_k"),
    [
        (Roar(3, temperature=TEMPERATURE), 3),
        (RandomRemasking(3, num_steps=2, temperature=2.0), 3),
        (LowConfidence(3, temperature=TEMPERATURE), 3),
        (LowConfidence(3, threshold=0.6, temperature=0.3), 3),
        (Dream(3, temperature=TEMPERATURE, top_p=None, top_k=2), 2),
        (Dream(3, temperature=TEMPERATURE, top_p=None, top_k=2, alg="origin"), 2),
        (Dream(3, temperature=1.0, top_p=None), 3),
        (Roar(3), 3),
    ],
    ids=str,
)
def test_every_sampler_records_the_law_that_it_drew_from(sampler, top_k):
    samples = sampler.sample(OLD, prompts(40), noise=NOISE)
    rows = zip(samples.completion_ids.tolist(), samples.reveal_step.tolist(), strict=True)
    for row, (completion, steps) in enumerate(rows):
        drawn = law_logps(completion, steps, sampler.temperature, top_k)
        assert samples.drawn_logps[row].tolist() == pytest.approx(drawn, abs=1e-10)
        assert samples.logps[row].tolist() == pytest.approx(law_logps(completion, steps, 1.0), abs=1e-10)
    assert torch.equal(samples.drawn_logps, samples.logps) == (sampler.temperature == 1 and top_k == 3)


def test_a_share_of_the_probability_cuts_the_recorded_law():
    samples = Dream(3, temperature=1.0, top_p=1e-9).sample(OLD, prompts(8), noise=NOISE)
    assert not samples.drawn_logps.any() and (samples.logps < 0).all()  # one token is left in every state


@pytest.mark.parametrize("sampler", [Roar(3, temperature=0.0), LowConfidence(3), Dream(3, temperature=0.0)], ids=str)
def test_nothing_is_left_to_chance_at_temperature_0(sampler):
    samples = sampler.sample(OLD, prompts(4), noise=NOISE)
    assert not samples.drawn_logps.any() and (samples.logps < 0).all()


def test_given_tails_and_continued_rows_keep_their_record():
    policy = tiny_policy(seed=4)
    policy.stop_token_ids = tuple(range(8, 13))
    sampler = LowConfidence(6, block_length=2, num_steps=6, temperature=0.5)
    whole = sampler.sample(policy, prompts(12), noise=NOISE)
    is_given = whole.logps == 0
    assert is_given.any() and torch.equal(whole.drawn_logps == 0, is_given)
    again = Roar(3, temperature=TEMPERATURE)
    first = again.sample(OLD, prompts(12), noise=NOISE)
    other = again.sample(OLD, prompts(12), noise=NOISE.stream("other"), start=Start(first, 2))
    before = first.reveal_step < 2
    assert torch.equal(other.drawn_logps[before], first.drawn_logps[before])
    for row, (completion, steps) in enumerate(
        zip(other.completion_ids.tolist(), other.reveal_step.tolist(), strict=True)
    ):
        expected = law_logps(completion, steps, TEMPERATURE)
        assert other.drawn_logps[row].tolist() == pytest.approx(expected, abs=1e-10)


def test_parts_without_a_record_are_joined_without_one():
    first = Roar(3).sample(OLD, prompts(2), noise=NOISE)
    bare = Samples(first.completion_ids, first.reveal_step, first.logps, first.nfe)
    assert join_samples([first, first]).drawn_logps.shape == (4, 3)
    assert join_samples([first, bare]).drawn_logps is None
    assert take_rows(bare, slice(0, 1)).drawn_logps is None


def test_a_buffer_keeps_the_law_of_the_policy_that_wrote_a_row():
    def fresh(iteration: int):
        rows = make_rollouts(torch.full((4, 3), iteration), groups=[0, 0, 1, 1])
        record = torch.full((4, 3), -float(iteration + 1), dtype=torch.float64)
        return replace(rows, drawn_logps=record, sampled_at=torch.full((4,), iteration))

    buffer = Buffer(BufferConfig(num_batches=2), Noise(0))
    buffer.exchange(fresh(0), 0)
    taken = [buffer.exchange(fresh(i), i) for i in range(1, 6)]
    assert all(torch.equal(batch.drawn_logps, -(batch.completion_ids.double() + 1)) for batch in taken)
    assert any(len(batch.completion_ids.unique()) == 2 for batch in taken)


# ---- the weights


def reward(completion) -> float:
    return 0.9 * completion[0] - 0.4 * completion[1] * completion[2]


def enumerated(algorithm) -> tuple[LossInputs, torch.Tensor, list[float]]:
    """All completions once, as one group, with the records of a sampler that fills them from left to right at
    temperature 0.5; how often each is drawn; and p_ref exp(r/α) normalised."""
    completions = list(product(range(3), repeat=3))
    batch = make_rollouts(torch.tensor(completions), rewards=[reward(y) for y in completions])
    batch = replace(batch, reveal_step=torch.tensor([ORDER] * 27))
    x = LossInputs(torch.zeros(27, 1, 3), None, *[batch.rewards] * 2, batch.groups, batch.length)
    drawn = torch.tensor([law_logps(list(y), ORDER, TEMPERATURE) for y in completions], dtype=torch.float64)
    x = replace(with_evidence(algorithm, x, batch, OLD, REF, [ORDER] * 27), drawn_logps=drawn)
    with torch.no_grad():
        target = [
            math.exp(float(trajectory_logp(conditionals(REF, torch.tensor(y)), ORDER)) + reward(y) / ALPHA)
            for y in completions
        ]
    return x, drawn.sum(1).exp(), [p / sum(target) for p in target]


@pytest.mark.parametrize("density", ["tempered", "untempered"])
def test_weighted_draws_are_the_target_with_the_density_that_they_were_drawn_with(density):
    """Σ_y q(y) w(y) f(y) / Σ_y q(y) w(y) = E_*[f] for every f, that is q w normalised is p_*: at temperature 0.5 with
    the tempered density exactly, with the untempered one not."""
    algorithm = DmpoWDCE(reward_temperature=ALPHA, density=density)
    x, q, target = enumerated(algorithm)
    assert abs(float(q.sum()) - 1) < 1e-12
    weight, _, _ = target_weights(algorithm, x.rewards, x.groups, log_density_ratio(algorithm, x))
    law = q * weight / (q * weight).sum()
    distance = (law - torch.tensor(target)).abs().sum() / 2
    if density == "tempered":
        assert law.tolist() == pytest.approx(target, abs=1e-12)
        assert abs(float((q * log_density_ratio(algorithm, x).exp()).sum()) - 1) < 1e-12
    else:
        assert distance > 0.05


@pytest.mark.parametrize("algorithm", [DmpoWDCE, DmpoWDDO])
@pytest.mark.parametrize("density", ["tempered", "untempered"])
def test_the_target_is_stationary_for_draws_of_another_temperature(algorithm, density):
    """A uniform policy at temperature 1 whose tokens are drawn otherwise, each completion as often as it is drawn:
    with the density of the draws the gradient vanishes at p_* at every logit of every state."""
    fields = {"baseline": "none"} if algorithm is DmpoWDCE else {"old_likelihood": "order"}
    loss = algorithm(reward_temperature=2.0, density=density, **fields)
    times = {0: 1, 1: 2, 2: 3}  # how often a token is drawn, of 6: a law of its own in every state
    completions = [y for y in product(range(3), repeat=2) for _ in range(times[y[0]] * times[y[1]])]
    batch = make_rollouts(torch.tensor(completions), rewards=[reward((*y, 1)) for y in completions])
    batch = replace(batch, reveal_step=torch.tensor([[0, 1]] * 36))
    law = {(a, b): (a + 1) * (3 - b) + 1 for a in range(3) for b in range(3)}  # any joint: p_ref
    ref = policy_of({y: p / sum(law.values()) for y, p in law.items()}, 3, 2)
    old = policy_of({y: 1 / 9 for y in law}, 3, 2)
    tilted = {y: p * math.exp(reward((*y, 1)) / 2.0) for y, p in law.items()}
    target = policy_of({y: p / sum(tilted.values()) for y, p in tilted.items()}, 3, 2)
    draw = every_subset(36, 2, prompt=2, times=2)
    x = LossInputs(score_copies(target, batch, draw), draw, *[batch.rewards] * 2, batch.groups, batch.length)
    drawn = torch.tensor([[math.log(times[v] / 6) for v in y] for y in completions], dtype=torch.float64)
    x = replace(with_evidence(loss, x, batch, old, ref, [[0, 1]] * 36), drawn_logps=drawn)
    (grad,) = torch.autograd.grad(loss.loss(x).loss, target.table)
    if density == "tempered":
        assert grad.abs().max() < 1e-12
    else:
        # in WDDO p_old divides out of e^D = G w but for the normaliser, so that little is left to see
        assert grad.abs().max() > 1e-4


def drawn_record() -> torch.Tensor:
    return -2 * torch.rand(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"count_positions": "to_eos"},
        {"baseline": "none", "weight_coef": 0.3},
        {"baseline": "unbias"},
        {"baseline": "unbias", "weights": "reward"},
    ],
    ids=str,
)
def test_wdce_equals_the_loop_oracle(changed):
    """log p_old is Σ of the drawn record everywhere; log p_ref stays at temperature 1."""
    algorithm = DmpoWDCE(reward_temperature=0.8, **TEMPERED, **changed)
    ref = TabularPolicy(length=4, seed=12)
    x = replace(with_evidence(algorithm, inputs(algorithm, rollouts=BATCH), ref=ref), drawn_logps=drawn_record())
    length = BATCH.length.tolist() if algorithm.count_positions == "to_eos" else [4] * 4
    theta = bounds(x.logps, x.corruption, length, False)
    old = [sum(row[:n]) for row, n in zip(x.drawn_logps.tolist(), length, strict=True)]
    rows = zip(BATCH.completion_ids, BATCH.reveal_step.tolist(), length, strict=True)
    with torch.no_grad():
        log_ref = [trajectory_logp(conditionals(ref, y), s, n).item() for y, s, n in rows]
    log_rnd = [r - o for r, o in zip(log_ref, old, strict=True)] if algorithm.weights == "target" else [0.0] * 4
    alpha = 0.8 if algorithm.weights == "target" else None
    weights = dmpo_weights(REWARDS, GROUPS, log_rnd, alpha=alpha, coef=algorithm.weight_coef)
    base = [0.0] * 4
    if algorithm.baseline == "negative":
        base = dmpo_weights(REWARDS, GROUPS, log_rnd, alpha=alpha, sign=-1.0)
    elif algorithm.baseline == "unbias":
        moved = [t.item() - o for t, o in zip(theta, old, strict=True)]
        base = dmpo_weights([0.0] * 4, GROUPS, moved, alpha=1.0)
    signed = [w - b for w, b in zip(weights, base, strict=True)]
    assert_same_value_and_gradient(algorithm.loss(x).loss, wdce_loss(theta, signed, GROUPS, 4), POLICY)


def test_wddo_reads_the_drawn_record_in_weights_and_in_the_ratio():
    """The untempered loss on a batch whose two records are exchanged."""
    tempered = DmpoWDDO(reward_temperature=0.8, old_likelihood="order", **TEMPERED)
    plain = replace(tempered, density="untempered")
    x = replace(with_evidence(tempered, inputs(tempered, rollouts=BATCH)), drawn_logps=drawn_record())
    exchanged = replace(x, sample_logps=x.drawn_logps, drawn_logps=None)
    assert_same_value_and_gradient(tempered.loss(x).loss, plain.loss(exchanged).loss, POLICY)
    assert abs(tempered.loss(x).loss.item() - plain.loss(x).loss.item()) > 1e-3


# ---- refusals


def test_batches_of_a_buffer_are_joined_without_a_record_that_one_lacks():
    bare = replace(BATCH, drawn_logps=None)
    full = replace(BATCH, drawn_logps=torch.zeros_like(BATCH.sample_logps))
    for parts in ([bare, full], [full, bare]):
        assert join_rollouts(parts).drawn_logps is None
    assert join_rollouts([full, full]).drawn_logps.shape[0] == 2 * len(BATCH)


def test_what_is_missing_is_named():
    algorithm = DmpoWDCE(**TEMPERED)
    x = with_evidence(algorithm, inputs(algorithm, rollouts=BATCH))
    with pytest.raises(ValueError, match="got no drawn_logps"):
        algorithm.loss(x)
    assert algorithm.needs.drawn and algorithm.needs.order and not DmpoWDCE().needs.drawn


@pytest.mark.parametrize(
    ("algorithm", "fields"),
    [
        (DmpoWDCE, {"likelihood": "elbo"}),
        (DmpoWDCE, {"weights": "reward"}),
        (DmpoWDCE, {"likelihood": "elbo", "weights": "reward", "baseline": "unbias"}),
        (DmpoWDDO, {}),
        (DmpoWDDO, {"old_likelihood": "order", "likelihood": "elbo"}),
        (DmpoWDDO, {"likelihood": "order", "weights": "reward"}),
    ],
    ids=str,
)
def test_a_density_that_is_not_read_is_refused(algorithm, fields):
    with pytest.raises(ConfigError, match=r"algorithm.density = 'tempered': .*old_likelihood = \"order\" too"):
        algorithm(**TEMPERED, **fields)
    assert algorithm(**fields).density == "untempered"


def test_a_density_that_is_read_is_accepted_and_others_are_unknown():
    assert DmpoWDCE(weights="reward", baseline="unbias", **TEMPERED).needs.drawn
    assert DmpoWDDO(weights="reward", likelihood="elbo", old_likelihood="order", **TEMPERED).needs.drawn
    for algorithm in (DmpoWDCE, DmpoWDDO):
        with pytest.raises(ConfigError, match=r"algorithm.density = 'cold': unknown. Use one of: untempered, tempered"):
            algorithm(density="cold")


def test_a_recipe_at_temperature_0_is_refused(tmp_path):
    tables = {
        "model": {"path": "somewhere"},
        "task": {"type": "sudoku"},
        "algorithm": {"type": "dmpo_wdce", **TEMPERED},
        "sampler": {"type": "roar", "temperature": 0.0},
    }
    with pytest.raises(ConfigError, match=r"sampler.temperature = 0: dmpo_wdce .*Use a temperature above 0"):
        train_recipe(tables, tmp_path)
    tables["sampler"]["temperature"] = 0.2
    assert train_recipe(tables, tmp_path).algorithm.value.density == "tempered"
    train_recipe(
        {**tables, "algorithm": {"type": "dmpo_wdce"}, "sampler": {"type": "roar", "temperature": 0}}, tmp_path
    )
