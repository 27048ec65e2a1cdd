"""The common suite: what every registered objective must satisfy, whatever its equation."""

import inspect
from dataclasses import fields, replace

import pytest
import torch

from tests.oracles import make_rollouts, score_copies
from tests.oracles_energy import divergences
from tests.toys import TabularPolicy
from unmask.corruption_steps import draw_trajectory
from unmask.noise import Noise
from unmask.objectives import ALGORITHMS, DGA, ESPO, GDPO, SFT, SPG, VRPO, WD1, DmpoWDCE, DmpoWDDO, EmbrC, EmbrE, EmbrU
from unmask.types import Evidence, LossInputs, take_rows

LENGTH = 4
POLICY, OLD, REF = (TabularPolicy(length=LENGTH, seed=seed) for seed in (1, 2, 3))
VARIANTS = {
    **{name: algorithm() for name, algorithm in ALGORITHMS.items()},
    "espo-token": ESPO(level="token"),
    "espo-mean_field": ESPO(likelihood="mean_field"),
    "espo-token-mean_field": ESPO(level="token", likelihood="mean_field"),
    "espo-k3": ESPO(kl="k3"),
    "espo-to_eos": ESPO(count_positions="to_eos"),
    "wd1-leave_one_out": WD1(advantage="leave_one_out"),
    "wd1-mixture": WD1(old_coef=0.5, ref_coef=0.5, count_positions="all"),
    "wd1-trajectory": WD1(likelihood="trajectory", prompt_mask_ratio=0.0, fresh_masks=False),
    "gdpo-bernoulli": GDPO(masking="bernoulli"),
    "gdpo-unscaled": GDPO(ratio_scale="none", kl="k2"),
    "spg-eubo": SPG(eubo_share=1.0, gamma=4.0, num_masks=6, block_length=2),
    "dmpo_wdce-elbo": DmpoWDCE(likelihood="elbo", reward_temperature=1.0, ess_target=0.8, count_positions="to_eos"),
    "dmpo_wdce-group_mean": DmpoWDCE(baseline="group_mean", weights="reward", coupled=True),
    "dmpo_wdce-unbias": DmpoWDCE(baseline="unbias", reward_temperature=1.0),
    "dmpo_wddo-order": DmpoWDDO(old_likelihood="order", likelihood="elbo", use_independent_halves=False),
    "dmpo_wdce-tempered": DmpoWDCE(density="tempered", reward_temperature=1.0),
    "dmpo_wddo-tempered": DmpoWDDO(density="tempered", old_likelihood="order", reward_temperature=1.0),
    "spg-masked": SPG(scored_positions="masked", block_length=2),
    "dga-sum": DGA(mode="sum", alpha=0.5, num_masks=2, coupled=True),
    "dga-rewards": DGA(use_energy=False, mode="sum", kl_coef=0.0, count_positions="to_eos", skip_zero_variance=True),
    "embr_e-group_mean": EmbrE(c_mode="group_mean", cross_fit=True),
    "embr_c-cross_fit": EmbrC(cross_fit=True, count_positions="to_eos"),
    "embr_u-softplus": EmbrU(surrogate="softplus", gamma=4.0, normalize=False),
    "vrpo-coupled": VRPO(coupled=True, sft_coef=0.0, count_positions="all"),
}


def has_ratio(algorithm):
    """A ratio to the old policy is clipped; else, where that is scored, it is what the policy is measured from."""
    return hasattr(algorithm, "clip_low")


def has_kl(algorithm):
    """The reference is a penalty beside the objective; else, where it is scored, what the policy is measured from."""
    return getattr(algorithm, "kl_coef", 0.0) > 0


# wd1 and SPG weigh log-likelihoods and compare no two models: statements about ratios and KL leave them out
STEPS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 1, 2], [0, 0, 1, 1], [2, 3, 0, 1], [1, 3, 2, 0]])
PROCESS = torch.tensor([0.5, 0.1, 0.0, 0.3, 0.25, 0.4], dtype=torch.float64)  # none turns an advantage
WITH_RATIO = {name: algorithm for name, algorithm in VARIANTS.items() if has_ratio(algorithm)}
# an exact KL has a gradient of its own, which d loss / d logps does not show
WITH_KL = {name: a for name, a in VARIANTS.items() if has_kl(a) and not a.needs.kl}
# advantages alone decide what happens to a rollout; not so where a log-ratio to the reference is fitted to the reward,
# or one to the old policy to a density ratio, or a baseline is made of that log-ratio, or a learned energy says how
# much of each completion is to be imitated
BY_ADVANTAGE = {
    name: algorithm
    for name, algorithm in VARIANTS.items()
    if (has_kl(algorithm) or not algorithm.needs.ref)
    and not hasattr(algorithm, "discriminator_scale")
    and getattr(algorithm, "baseline", None) != "unbias"
    and not hasattr(algorithm, "use_energy")
}
# a learned number of the prompt takes up a constant added to its rewards, but not before it has learned
WITHOUT_VALUE = {name: algorithm for name, algorithm in VARIANTS.items() if algorithm.needs.value is None}


@pytest.fixture(params=VARIANTS)
def algorithm(request):
    return VARIANTS[request.param]


@pytest.fixture(params=WITH_RATIO)
def with_ratio(request):
    return WITH_RATIO[request.param]


@pytest.fixture(params=WITH_KL)
def with_kl(request):
    return WITH_KL[request.param]


@pytest.fixture(params=BY_ADVANTAGE)
def by_advantage(request):
    return BY_ADVANTAGE[request.param]


@pytest.fixture(params=WITHOUT_VALUE)
def without_value(request):
    return WITHOUT_VALUE[request.param]


def no_kl(algorithm):
    return replace(algorithm, kl_coef=0.0) if has_kl(algorithm) else algorithm


def rollouts(rewards=(1.0, 0.0, 0.5, 0.2, 0.9, 0.1), length=(4, 2, 1, 3, 4, 4)):
    completions = torch.randint(0, 3, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = make_rollouts(completions, groups=[4, 4, 4, 9, 9, 9], rewards=list(rewards), length=list(length))
    return replace(batch, reveal_step=STEPS, process_rewards=PROCESS)


def loss_inputs(algorithm, batch, *, logps=None, old=OLD, ref=REF, noise=None, policy=POLICY):
    draw = algorithm.draw(batch, noise=noise or Noise(0))
    logps = score_copies(policy, batch, draw).detach().requires_grad_() if logps is None else logps
    needs = algorithm.needs
    return LossInputs(
        logps=logps,
        corruption=draw,
        advantages=algorithm.advantages(batch.rewards, batch.groups),
        rewards=batch.rewards,
        groups=batch.groups,
        length=batch.length,
        old_logps=score_copies(old, batch, draw).detach() if needs.old else None,
        ref_logps=score_copies(ref, batch, draw).detach() if needs.ref else None,
        evidence=evidence_of(needs, batch, old, ref),
        sample_logps=score_copies(old, batch, draw_trajectory(batch)).sum(1).detach(),
        drawn_logps=score_copies(old, batch, draw_trajectory(batch)).sum(1).detach(),  # temperature 1
        process_rewards=batch.process_rewards,
        values=batch.prompt_key.double() / 10 if needs.value else None,
        kl=divergences(policy, ref, batch, draw).detach() if needs.kl else None,
        uniform=Noise(5).uniform(batch.prompt_key, batch.rollout_index),
    )


def evidence_of(needs, batch, old, ref):
    if needs.evidence is None:
        return None
    draw = needs.evidence(batch, Noise(0).stream("evidence"))
    old_logps = score_copies(old, batch, draw).detach() if needs.evidence_old else None
    return Evidence(draw, score_copies(ref, batch, draw).detach(), old_logps)


def gradient(algorithm, x):
    return torch.autograd.grad(algorithm.loss(x).loss, x.logps)[0]


def test_policy_equal_to_old_has_ratio_one_and_no_clipping(with_ratio):
    x = loss_inputs(with_ratio, rollouts(), old=POLICY, ref=POLICY)
    metrics = with_ratio.loss(x).metrics
    assert metrics["ratio_max"] == 1.0  # exactly: the same stored masks give the same bits
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "log_ratio_clamped"):
        assert metrics[name] == 0.0
    assert metrics["kl_penalty"] == 0.0


def test_policy_equal_to_reference_has_no_kl_gradient(with_kl):
    x = loss_inputs(with_kl, rollouts(), ref=POLICY)
    x = replace(x, advantages=torch.zeros_like(x.advantages))
    assert (gradient(with_kl, x) == 0).all()


def test_equal_rewards_give_no_policy_gradient(by_advantage):
    without_kl = no_kl(by_advantage)
    x = loss_inputs(without_kl, rollouts(rewards=[0.3] * 3 + [0.7] * 3))
    out = without_kl.loss(x)
    assert out.loss.item() == 0.0 and "kl_penalty" not in out.metrics
    assert (gradient(without_kl, x) == 0).all()


def test_equal_rewards_leave_the_pull_of_the_kl(with_kl):
    """But not in a tree, which leaves out parents whose children are alike."""
    x = loss_inputs(with_kl, rollouts(rewards=[0.3] * 3 + [0.7] * 3))
    assert bool((gradient(with_kl, x) != 0).any()) == ("tree" not in with_kl.strategies)


def test_all_wrong_group_leaves_the_other_group_its_gradient(by_advantage):
    without_kl = no_kl(by_advantage)
    moved = gradient(without_kl, loss_inputs(without_kl, rollouts(rewards=[0.0] * 3 + [1.0, 0.0, 0.0]), old=POLICY))
    assert (moved[:3] == 0).all() and (moved[3:] != 0).flatten(1).any(1).all()


def test_good_rollouts_gain_probability_and_bad_ones_lose_it(by_advantage):
    without_kl = no_kl(by_advantage)
    x = loss_inputs(without_kl, rollouts(), old=POLICY, ref=POLICY)
    step = -gradient(without_kl, x) * x.corruption.scored
    sign = x.advantages.sign()[:, None, None]
    assert (step * sign >= 0).all()
    assert torch.equal((step != 0), x.corruption.scored & (sign != 0))


def test_reward_shift_changes_nothing(without_value):
    algorithm = without_value
    batch = rollouts()
    shifted = replace(batch, rewards=batch.rewards + torch.tensor([5.0] * 3 + [-2.5] * 3))
    values = [loss_inputs(algorithm, b) for b in (batch, shifted)]
    assert torch.allclose(*(algorithm.loss(x).loss for x in values), rtol=0, atol=1e-12)
    assert torch.allclose(*(gradient(algorithm, x) for x in values), rtol=0, atol=1e-12)


def test_row_permutation_permutes_gradients(algorithm):
    batch, order = rollouts(), torch.tensor([4, 0, 5, 2, 1, 3])
    x, y = loss_inputs(algorithm, batch), loss_inputs(algorithm, take_rows(batch, order))
    assert torch.allclose(algorithm.loss(x).loss, algorithm.loss(y).loss, rtol=0, atol=1e-13)
    assert torch.allclose(gradient(algorithm, x)[order], gradient(algorithm, y), rtol=0, atol=1e-13)
    for name, value in algorithm.loss(x).metrics.items():
        assert algorithm.loss(y).metrics[name] == pytest.approx(value, abs=1e-12)


def test_group_labels_do_not_matter(algorithm):
    batch = rollouts()
    relabelled = replace(batch, groups=torch.where(batch.groups == 4, 100, -3))
    assert torch.equal(
        algorithm.advantages(batch.rewards, batch.groups), algorithm.advantages(batch.rewards, relabelled.groups)
    )


def test_micro_batches_give_the_whole_batch_gradient(algorithm):
    """Rows that are not live hold constants, even junk: the live rows' gradient is that of the whole batch."""
    if not algorithm.is_row_separable:
        pytest.skip("rows are coupled: the trainer makes two passes, see tests/test_trainer.py")
    x = loss_inputs(algorithm, rollouts())
    whole = gradient(algorithm, x)
    junk = -7.0 * torch.rand(x.logps.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for live in (slice(0, 1), slice(1, 4), slice(4, 6)):
        leaf = x.logps.detach()[live].clone().requires_grad_()
        mixed = junk.clone()
        mixed[live] = leaf
        (part,) = torch.autograd.grad(algorithm.loss(replace(x, logps=mixed)).loss, leaf)
        assert torch.allclose(part, whole[live], rtol=0, atol=1e-15)


def test_gradient_reaches_scored_positions_only(algorithm):
    x = loss_inputs(algorithm, rollouts())
    moved = gradient(algorithm, x)
    assert (moved[~x.corruption.scored] == 0).all()
    assert (moved[x.corruption.scored] != 0).any()


@pytest.mark.parametrize("shift", [300.0, -300.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_where_ratios_are_extreme(with_ratio, shift, dtype):
    algorithm = with_ratio
    x = loss_inputs(algorithm, rollouts())
    logps = (x.logps.detach().to(dtype) - 0.5).requires_grad_()
    moved = {"old_logps": x.old_logps.to(dtype) - shift, "ref_logps": x.ref_logps.to(dtype) + shift}
    x = replace(x, logps=logps, **{k: v * x.corruption.scored for k, v in moved.items()})
    out = algorithm.loss(x)
    assert torch.isfinite(out.loss) and out.loss.dtype == dtype
    assert torch.isfinite(torch.autograd.grad(out.loss, logps)[0]).all()
    assert all(value == value and abs(value) < float("inf") for value in out.metrics.values())
    assert out.metrics["log_ratio_clamped"] > 0


@pytest.mark.parametrize("shift", [300.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_where_a_completion_is_all_but_impossible(algorithm, shift, dtype):
    x = loss_inputs(algorithm, rollouts())
    logps = ((x.logps.detach().to(dtype) - shift) * x.corruption.scored).requires_grad_()
    out = algorithm.loss(replace(x, logps=logps, old_logps=logps.detach(), ref_logps=logps.detach()))
    assert torch.isfinite(out.loss) and out.loss.dtype == dtype
    assert torch.isfinite(torch.autograd.grad(out.loss, logps)[0]).all()
    assert all(value == value and abs(value) < float("inf") for value in out.metrics.values())


def test_finite_for_length_one_and_one_correct_rollout(algorithm):
    batch = rollouts(rewards=[1.0] + [0.0] * 5, length=[1] * 6)
    x = loss_inputs(algorithm, batch)
    assert torch.isfinite(algorithm.loss(x).loss) and torch.isfinite(gradient(algorithm, x)).all()
    short = make_rollouts(batch.completion_ids[:, :1], groups=batch.groups.tolist(), rewards=batch.rewards.tolist())
    short = replace(short, process_rewards=PROCESS)
    policy = TabularPolicy(length=1, seed=0)
    out = algorithm.loss(loss_inputs(algorithm, short, policy=policy, old=policy, ref=policy))
    assert torch.isfinite(out.loss) and out.metrics.get("ratio_max", 1.0) == 1.0


def test_same_noise_draws_the_same_masks_and_other_noise_others(algorithm):
    batch = rollouts()
    first, again = (algorithm.draw(batch, noise=Noise(0)) for _ in range(2))
    assert torch.equal(first.masked, again.masked) and torch.equal(first.weight, again.weight)
    # of a mean field, prompts of two tokens are seldom masked; steps were drawn by the sampler
    if first.kind not in ("mean_field", "order"):
        assert not torch.equal(first.masked, algorithm.draw(batch, noise=Noise(1)).masked)


def test_each_pass_draws_its_own_masks(algorithm):
    batch = make_rollouts(
        torch.zeros(8, 6, dtype=torch.int64), groups=[1] * 4 + [2] * 4, prompt=torch.ones(8, 30, dtype=torch.int64)
    )
    draws = [algorithm.draw(batch, noise=Noise(0), iteration=n) for n in (0, 1)]
    masks = [draw.masked for draw in draws]
    is_random = draws[0].kind != "mean_field" or algorithm.prompt_mask_ratio > 0  # ESPO's shows the whole prompt
    assert torch.equal(*masks) != (is_random and draws[0].kind != "order")  # steps were drawn by the sampler
    assert torch.equal(masks[0], algorithm.draw(batch, noise=Noise(0)).masked)


def test_rescored_stored_masks_are_bitwise_equal(algorithm):
    batch = rollouts()
    draw = algorithm.draw(batch, noise=Noise(0))
    assert torch.equal(score_copies(POLICY, batch, draw), score_copies(POLICY, batch, draw))


def test_independent_draws_of_old_and_reference_are_used(with_ratio):
    """With old_corruption and ref_corruption equal to the policy's draws, nothing changes; with others, all does."""
    algorithm, batch = with_ratio, rollouts()
    x = loss_inputs(algorithm, batch)
    same = replace(x, old_corruption=x.corruption, ref_corruption=x.corruption)
    assert torch.equal(algorithm.loss(x).loss, algorithm.loss(same).loss)
    heavier = replace(x.corruption, weight=x.corruption.weight * 1.5)
    for name in ("old_corruption", "ref_corruption"):
        assert not torch.allclose(
            algorithm.loss(replace(same, **{name: heavier})).loss, algorithm.loss(x).loss, atol=1e-9
        )


def test_negative_scale_shrinks_bad_rollouts_only(with_ratio):
    algorithm, batch = with_ratio, rollouts()
    base = algorithm.advantages(batch.rewards, batch.groups)
    scaled = replace(algorithm, negative_scale=0.25).advantages(batch.rewards, batch.groups)
    assert torch.allclose(scaled, torch.where(base < 0, base / 4, base), rtol=1e-15)
    assert (base < 0).any() and (base > 0).any()


def test_missing_scores_are_named(with_ratio):
    algorithm = with_ratio
    x = loss_inputs(algorithm, rollouts())
    for name in ("old_logps", "ref_logps"):
        with pytest.raises(ValueError, match=f"got no {name}"):
            algorithm.loss(replace(x, **{name: None}))


def test_needs_follow_the_kl(with_ratio):
    algorithm = with_ratio
    assert algorithm.needs.old and algorithm.needs.ref
    without_kl = replace(algorithm, kl_coef=0.0)
    assert without_kl.needs.old and not without_kl.needs.ref


def test_metrics_are_detached_floats_under_known_names(algorithm):
    metrics = algorithm.loss(loss_inputs(algorithm, rollouts())).metrics
    assert all(type(value) is float for value in metrics.values())
    ratio = {"ratio_max", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "log_ratio_clamped"}
    assert "policy_loss" in metrics
    named = ratio | {"kl_penalty"} if has_ratio(algorithm) else {"kl_penalty"} if algorithm.needs.kl else set()
    assert set(metrics) & (ratio | {"kl_penalty"}) == named


def test_loss_is_policy_loss_plus_penalty(algorithm):
    out = algorithm.loss(loss_inputs(algorithm, rollouts()))
    penalty = out.metrics.get("kl_penalty", 0.0)
    supervised = out.metrics.get("sft_loss", 0.0)
    assert out.loss.item() == pytest.approx(out.metrics["policy_loss"] + penalty + supervised, abs=1e-14, rel=1e-14)
    assert (penalty > 0) == has_kl(algorithm)


def test_float32_rewards_and_logps_stay_float32(algorithm):
    x = loss_inputs(algorithm, rollouts())
    halves = {f.name: getattr(x, f.name) for f in fields(x)}
    x32 = replace(
        x, **{k: v.float() for k, v in halves.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    )
    out, reference = algorithm.loss(x32), algorithm.loss(x)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(reference.loss.item(), rel=1e-4, abs=1e-6)


def test_registry_names_the_published_algorithms_only():
    assert {"coupled_grpo", "diffu_grpo", "espo", "gdpo", "spg", "unigrpo", "wd1"} <= set(ALGORITHMS)
    assert SFT not in ALGORITHMS.values()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_field_is_documented_at_its_place(name):
    """A docstring line below each field, and in the module the paper: its arXiv id, or its title if it has none."""
    source = inspect.getsource(ALGORITHMS[name])
    lines = [line.strip() for line in source.splitlines()]
    for f in fields(ALGORITHMS[name]):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{f.name}:"))
        assert lines[place + 1].startswith('"""'), f.name
    module = " ".join((inspect.getmodule(ALGORITHMS[name]).__doc__ or "").split())
    assert "arXiv:" in module or f'"{ALGORITHMS[name].source.rsplit(" (", 1)[0]}"' in module
