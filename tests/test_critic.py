"""The value model beside the policy: what it reads, how it learns, what it leaves alone, and that a run can go on."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import unmask
from tests.checkpoints import write_checkpoint
from tests.helpers import DigitSum, FixedSource, fake_rollouts, make_trainer, tiny_policy
from tests.test_adapters import SMALL, randomise
from tests.test_distributed import launch as launch_processes
from tests.test_resume import StopAt, assert_same_run, train_tables
from unmask.bases import reference_policy, weights_digest
from unmask.build import train_recipe
from unmask.critic import ENERGY, make_value_model
from unmask.errors import ConfigError, DataError, ModelError, Stopped, TrainingError
from unmask.launch import run_recipe
from unmask.models import with_lora
from unmask.models.adapters import adapter_parameters
from unmask.objectives import DGA
from unmask.run_log import SilentView
from unmask.tasks import TASKS
from unmask.types import Batch, Needs, ValueNeeds

PROMPT = ValueNeeds(reads="prompt", is_trunk_trained=False, lr=1e-2)
COMPLETION = ValueNeeds(reads="completion", is_trunk_trained=True, lr=1e-2, trunk_lr=1e-3, loss=DGA().ranking_loss)
KINDS = ("copy", "adapter", "reference")


def make(kind: str, micro_batch_size: int = 64, seed: int = 0):
    """A policy and its value model; float64, an adapter that does something, and a head that is not zero."""
    policy = tiny_policy()
    if kind == "adapter":
        policy = randomise(with_lora(policy, SMALL, seed=0), scale=0.1)
        policy.module.double()
    need = PROMPT if kind == "reference" else COMPLETION
    critic = make_value_model(
        policy, reference_policy(policy), Needs(value=need), seed=seed, micro_batch_size=micro_batch_size
    )
    assert critic is not None
    critic.head.double()
    return policy, critic


def unsettle(critic) -> None:
    """Values in the last layer, which is zero at first."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in critic.head[2].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))


def loss_of(rollouts):
    return lambda values: DGA().ranking_loss(values, rollouts.rewards, rollouts.groups)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_zero_at_first_and_one_for_each_row(kind):
    rollouts = fake_rollouts()
    values = make(kind)[1].values(rollouts)
    assert torch.equal(values, torch.zeros(12, dtype=torch.float64)) and not values.requires_grad


def test_an_energy_reads_the_completion_up_to_its_stop_token():
    """By hand: one row at a time, without pads, mean of the states at the completion's first `length` positions."""
    policy, critic = make("copy")
    unsettle(critic)
    rollouts = fake_rollouts()
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        canvas = torch.cat([prompt, rollouts.completion_ids[row]])[None]
        wanted = torch.zeros_like(canvas, dtype=torch.bool)
        wanted[0, len(prompt) : len(prompt) + int(rollouts.length[row])] = True
        states = policy.token_outputs(canvas, None, wanted, want=("hidden",)).hidden
        expected = critic.head(states.mean(0)).squeeze(-1)
        assert abs(float(expected.detach() - critic.values(rollouts)[row])) < 1e-12


def test_a_constant_reads_the_prompt_alone_whatever_its_padding():
    policy, critic = make("reference")
    unsettle(critic)
    rollouts = fake_rollouts()
    values = critic.values(rollouts)
    pad = torch.nn.functional.pad
    wider = replace(
        rollouts,
        prompt_ids=pad(rollouts.prompt_ids, (3, 0)),
        prompt_mask=pad(rollouts.prompt_mask, (3, 0)),
        completion_ids=rollouts.completion_ids.flip(0),
        length=rollouts.length.flip(0),
    )
    assert torch.allclose(critic.values(wider), values, rtol=0, atol=1e-12)
    row = rollouts.prompt_ids[5][rollouts.prompt_mask[5]]
    states = policy.token_outputs(row[None], None, torch.ones(1, len(row)).bool(), want=("hidden",)).hidden
    assert abs(float(critic.head(states[1:].mean(0)).detach() - values[5])) < 1e-12


@pytest.mark.parametrize("family", ["llada", "Dream"])
@pytest.mark.parametrize("need", [PROMPT, COMPLETION], ids=["prompt", "completion"])
def test_padding_changes_no_value_in_any_family(family, need, tmp_path):
    policy = unmask.load(write_checkpoint(family, tmp_path))
    policy.module.double()
    critic = make_value_model(policy, reference_policy(policy), Needs(value=need), seed=0, micro_batch_size=8)
    critic.head.double()
    unsettle(critic)
    rollouts = fake_rollouts(num_groups=2, group_size=1)
    pad = torch.nn.functional.pad
    wider = {"prompt_ids": pad(rollouts.prompt_ids, (2, 0)), "prompt_mask": pad(rollouts.prompt_mask, (2, 0))}
    values = critic.values(rollouts)
    assert torch.allclose(critic.values(replace(rollouts, **wider)), values, rtol=0, atol=1e-10)
    assert values[0] != values[1]


@pytest.mark.parametrize("micro_batch_size", [1, 5, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_backward(kind, micro_batch_size, monkeypatch):
    """The gradients before the step, against autograd through head and trunk at once."""
    rollouts = fake_rollouts()
    _, critic = make(kind, micro_batch_size)
    unsettle(critic)
    kept = {}

    def keep():
        kept.update({name: p.grad.clone() for name, p in critic.tensors().items() if p.grad is not None})
        critic.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(critic, "_step", keep)
    critic.learn(rollouts, lambda values: (values * rollouts.rewards).sum().square())
    with critic.trunk.learning():
        (critic._value(rollouts, slice(0, 12)) * rollouts.rewards).sum().square().backward()
    assert len(kept) > (4 if kind != "reference" else 3)
    for name, parameter in critic.tensors().items():
        if parameter.grad is not None:
            assert torch.allclose(kept[name], parameter.grad, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_energies_learn_to_rank(kind):
    rollouts = fake_rollouts(num_groups=4, group_size=6)
    # quality that can be read off the tokens: the share of the largest digits up to the stop token
    places = torch.arange(5) < rollouts.length[:, None]
    rollouts = replace(rollouts, rewards=((rollouts.completion_ids > 12) & places).sum(1) / rollouts.length.double())
    _, critic = make(kind)
    critic.optimizer.param_groups[1]["lr"] = 1e-2
    losses = [critic.learn(rollouts, loss_of(rollouts))["value_loss"] for _ in range(40)]
    assert losses[0] == pytest.approx(0.6931471805599453, abs=1e-12)  # log 2 for each group with a pair
    assert losses[-1] < 0.35
    values = critic.values(rollouts)
    better = (rollouts.groups[:, None] == rollouts.groups) & (rollouts.rewards[:, None] > rollouts.rewards)
    assert (values[:, None] < values)[better].double().mean() > 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_is_left_alone(kind):
    policy, critic = make(kind)
    before = weights_digest(policy.module) if kind != "adapter" else None
    watched = {n: p.detach().clone() for n, p in policy.module.named_parameters() if f".{ENERGY}." not in n}
    trained = {n for n, p in policy.module.named_parameters() if p.requires_grad}
    assert not any(f".{ENERGY}." in name for name in trained)
    rollouts = fake_rollouts()
    unsettle(critic)
    for _ in range(2):
        critic.learn(rollouts, loss_of(rollouts))
        critic.values(rollouts)
    assert {n for n, p in policy.module.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in policy.module.parameters())
    assert all(torch.equal(p, watched[n]) for n, p in policy.module.named_parameters() if n in watched)
    assert before in (None, weights_digest(policy.module))
    if kind == "adapter":
        assert policy.switch.active == "default" and policy.switch.trained == {"default"}
        assert all((p != 0).any() for n, p in adapter_parameters(policy.module, ENERGY) if "lora_B" in n)


@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_a_trainer_keeps_the_two_apart(kind):
    policy, critic = make(kind)
    rollouts = fake_rollouts()
    algorithm = DGA(mode="sum", num_iterations=2, alpha=0.5)
    trainer = make_trainer(
        policy, algorithm, FixedSource(rollouts), reference=reference_policy(policy), value_model=critic, num_batches=3
    )
    mine = {id(p) for p in critic.parameters}
    assert not mine & {id(p) for p in trainer.parameters}
    trainer.run()
    own = {n: p for n, p in policy.module.named_parameters() if p.requires_grad}
    assert not any(f".{ENERGY}." in n for n in own) and float(critic.values(rollouts).abs().max()) > 0


@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_a_value_model_that_broke_stops_the_run_before_weights_hide_it(kind):
    policy, critic = make(kind)
    rollouts = fake_rollouts()
    before = {name: p.detach().clone() for name, p in critic.tensors().items()}
    with pytest.raises(TrainingError, match=r"the loss of the value model is nan\. Lower its learning rates"):
        critic.learn(rollouts, lambda values: values.sum() * math.nan)
    with pytest.raises(TrainingError, match=r"the gradient norm of the value model is (inf|nan)"):
        critic.learn(rollouts, lambda values: (values * 1e308 * 1e10).sum())  # 0, with an infinite slope
    assert all(torch.equal(p, before[name]) for name, p in critic.tensors().items())
    trainer = make_trainer(
        policy, DGA(num_iterations=1), FixedSource(rollouts), reference=reference_policy(policy), value_model=critic
    )
    with torch.no_grad():
        critic.head[-1].weight.fill_(math.inf)
    with pytest.raises(TrainingError, match="value model"):
        trainer.prepare(0)
    with pytest.raises(TrainingError, match=r"gives .* of 12 rollouts no finite number"):
        trainer.read_values(Batch(0, rollouts, rollouts.rewards, [], {}))


def test_a_model_that_the_algorithm_cannot_learn_on_leaves_no_directory(model, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digit_sum", DigitSum)
    content = tables(model, is_adapted=True)
    content["model"]["lora"] = {"rank": 2, "targets": ["lm_head", "q_proj"]}
    with pytest.raises(ModelError):
        run_recipe(train_recipe(content, tmp_path), tmp_path / "run", SilentView())
    assert not (tmp_path / "run").exists()


def test_a_copy_computes_its_layers_again_as_the_policy_does():
    policy = tiny_policy()
    policy.enable_gradient_checkpointing()
    critic = make_value_model(policy, reference_policy(policy), Needs(value=COMPLETION), seed=0, micro_batch_size=64)
    calls = []
    critic.trunk.policy.module.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    rollouts = fake_rollouts()
    critic.head.double()
    unsettle(critic)
    critic.learn(rollouts, loss_of(rollouts))
    assert len(calls) == 3  # for the loss, for the gradient, and again in its backward


def test_nothing_changes_where_the_loss_has_no_gradient():
    _, critic = make("copy")
    rollouts = replace(fake_rollouts(), rewards=torch.zeros(12, dtype=torch.float64))
    before = {name: p.detach().clone() for name, p in critic.tensors().items()}
    assert critic.learn(rollouts, loss_of(rollouts)) == {"value_loss": 0.0, "value_grad_norm": 0.0}
    assert all(torch.equal(p, before[name]) for name, p in critic.tensors().items())


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = {n: p.detach().clone() for n, p in make("adapter", seed=5)[1].tensors().items()}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (dict(make("adapter", seed=seed)[1].tensors()) for seed in (5, 6))
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert any(not torch.equal(other[name], weight) for name, weight in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_come_back_and_others_are_refused(kind, tmp_path):
    rollouts = fake_rollouts()
    _, critic = make(kind)
    unsettle(critic)
    critic.learn(rollouts, loss_of(rollouts))
    critic.save(tmp_path / "energy")
    _, fresh = make(kind)
    assert not torch.equal(fresh.values(rollouts), critic.values(rollouts))
    fresh.restore(tmp_path / "energy")
    assert torch.equal(fresh.values(rollouts), critic.values(rollouts))
    other = make("copy" if kind != "copy" else "adapter")[1]
    with pytest.raises(DataError, match=r"energy\.json: says"):
        other.restore(tmp_path / "energy")
    (tmp_path / "energy" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read"):
        fresh.restore(tmp_path / "energy")


@pytest.mark.parametrize("needs", [Needs(kl=True), Needs(value=PROMPT)], ids=["kl", "value"])
def test_deepspeed_is_refused_in_one_line(needs, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    policy = tiny_policy()
    with pytest.raises(ConfigError, match=r"cannot be had with DeepSpeed. Launch with recipes/accelerate/fsdp2"):
        make_value_model(policy, reference_policy(policy), needs, seed=0, micro_batch_size=8)


def test_a_constant_of_the_reference_needs_one():
    with pytest.raises(ConfigError, match="this run has none"):
        make_value_model(tiny_policy(), None, Needs(value=PROMPT), seed=0, micro_batch_size=8)
    assert make_value_model(tiny_policy(), None, Needs(), seed=0, micro_batch_size=8) is None


# ---- whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_policy(dtype=torch.float32).save(path)
    return path


def tables(model, is_adapted: bool, **trainer) -> dict:
    content = train_tables(model, "dga", **trainer)
    content["task"] = {"type": "digit_sum"}  # whose rewards differ also where nothing is learned yet
    content["evaluation"] = {"num_examples": 4}
    content["algorithm"] |= {"energy_lr": 1e-2, "energy_trunk_lr": 1e-2, "alpha": 0.5}
    if is_adapted:
        content["model"] |= {"lora": {"rank": 4, "alpha": 8.0}, "gradient_checkpointing": True}
    return content


def stopped_everywhere(recipe, directory, boundaries) -> int:
    """Run, stopping at the given boundaries (numbers from 1) and going on each time; returns the stops."""
    StopAt.reached, StopAt.calls = boundaries[0] - 1, 0
    stops, resume = 0, False
    while True:
        try:
            run_recipe(recipe, directory, SilentView(), resume=resume)
            return stops
        except Stopped as stopped:
            assert stopped.signal_number == signal.SIGTERM
            stops, resume = stops + 1, True
            # every resume starts at the boundary of the last stop, which is not told again
            StopAt.calls = StopAt.reached
            StopAt.reached = boundaries[stops] - 1 if stops < len(boundaries) else 1 << 30


@pytest.mark.parametrize(
    "boundaries", [[3], pytest.param(list(range(1, 9)), marks=pytest.mark.slow)], ids=["one", "all"]
)
@pytest.mark.parametrize("is_adapted", [False, True], ids=["copy", "adapter"])
def test_stopping_between_two_phases_changes_no_byte(is_adapted, boundaries, model, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digit_sum", DigitSum)
    recipe = train_recipe(tables(model, is_adapted, num_batches=2, eval_every=0, save_every=6), tmp_path)
    run_recipe(recipe, tmp_path / "whole", SilentView())
    monkeypatch.setattr("unmask.launch.StopRequest", StopAt)
    assert stopped_everywhere(recipe, tmp_path / "stopped", boundaries) == len(boundaries)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    energies = [load_file(tmp_path / name / "energy" / "weights.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(energies[0][name], energies[1][name]) for name in energies[0])
    assert any(name.startswith("trunk.") for name in energies[0]) and (energies[0]["head.2.weight"] != 0).any()
    (saved,) = (tmp_path / "whole" / "model").glob("*.safetensors")
    assert not any(ENERGY in name for name in load_file(saved))


@pytest.mark.slow
@pytest.mark.parametrize("is_adapted", [False, True], ids=["copy", "adapter"])
def test_two_processes_hold_the_same_energy_as_one(is_adapted, model, tmp_path):
    content = tables(model, is_adapted, save_every=0)
    content["rollout"] = {"prompts_per_batch": 3, "group_size": 4}  # one group spans both processes
    (tmp_path / "empty.toml").write_text("seed = 0\n")
    overrides = [f"{s}.{k}={value(v)}" for s, table in content.items() for k, v in table.items()]
    for processes in (1, 2):
        args = ["train", str(tmp_path / "empty.toml"), *overrides, "--output", str(tmp_path / str(processes))]
        result = launch_processes(processes, tmp_path / "started", args)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = (load_file(tmp_path / name / "energy" / "weights.safetensors") for name in ("1", "2"))
    for name in one:
        # float32 sums in another order; Adam's steps of 1e-2 magnify them where a gradient is almost nothing
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-3), name
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("1", "2")]
    losses = [[json.loads(line)["value_loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len({round(loss, 4) for loss in losses[0]}) == 3


def value(content) -> str:
    """TOML of a value; tables inline."""
    if isinstance(content, dict):
        return "{" + ", ".join(f"{k} = {value(v)}" for k, v in content.items()) + "}"
    return json.dumps(content)
