"""`--dry-run`: the plan's counts are what a real run does, its sizes what a real run leaves, and nothing is written."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.helpers import DigitSum, tiny_policy
from unmask import scoring, trainer
from unmask.bases import open_for_training
from unmask.build import Named, Recipe, sft_recipe, supervised_base, train_recipe
from unmask.checkpoint import list_checkpoints
from unmask.cli import main
from unmask.config import dump_toml
from unmask.counting import count_passes, rehearse, sampling, value_passes
from unmask.critic import Critic
from unmask.estimation.footprint import Footprint, Lengths
from unmask.estimation.machines import Setting
from unmask.launch import Evaluator, cached_base, run_recipe
from unmask.models import MaskedPolicy
from unmask.models.block import SDARConfig, SDARForMaskedLM
from unmask.noise import Noise
from unmask.plan import Measurement, Plan, plan_run, plan_text, size
from unmask.rollout import GroupSource
from unmask.run_log import SilentView
from unmask.samplers import SAMPLERS
from unmask.tasks import TASKS
from unmask.trainer import Trainer
from unmask.types import Needs, PromptBatch

SUDOKU = {"type": "sudoku", "num_train": 48, "num_validation": 20, "num_test": 16}
TINY = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_policy(dtype=torch.float32).save(path)
    return path


def train_tables(model: Path, **algorithm) -> dict:
    return {
        "model": {"path": str(model)},
        "task": SUDOKU,
        "algorithm": {"type": "espo", "num_iterations": 2, **algorithm},
        "sampler": {"type": "roar", "gen_length": 4},
        "rollout": {"prompts_per_batch": 3, "group_size": 4, "batch_size": 5},
        "trainer": {"num_batches": 3, "eval_every": 2, "save_every": 4, "micro_batch_size": 9, "monitor_rows": 4},
        "evaluation": {"num_examples": 20, "batch_size": 7, "final_num_steps": [4, 2]},
    }


def sft_tables() -> dict:
    return {
        "model": {"tiny": TINY},
        "task": {**SUDOKU, "num_demonstrations": 48},
        "data": {"batch_size": 8},
        "trainer": {"num_batches": 2, "eval_every": 3, "micro_batch_size": 3},
        "evaluation": {"num_examples": 10, "batch_size": 4},
    }


class Count:
    """Model passes of a real run by kind: calls, sequences and backward calls."""

    def __init__(self, monkeypatch):
        self.calls, self.sequences, self.backwards = Counter(), Counter(), Counter()
        self.kind = ""
        forward, backward, score_copies = MaskedPolicy.token_outputs, Accelerator.backward, scoring.score_copies
        value = Critic._value

        def token_outputs(policy, canvas, *args, **kwargs):
            kind = "value model" if kwargs.get("want") == ("pooled",) else self.kind_of(policy)
            self.calls[kind] += 1
            if kind in ("collect", "evaluation", "final", "value model"):
                self.sequences[kind] += len(canvas)
            return forward(policy, canvas, *args, **kwargs)

        def count_copies(policy, rollouts, corruption, copies, **kwargs):
            self.sequences[self.kind_of(policy)] += len(copies)  # those without a mask, which cost nothing, included
            if kwargs.get("kl_to") is not None:
                self.sequences["kl"] += len(copies)
            return score_copies(policy, rollouts, corruption, copies, **kwargs)

        def count_value(critic, *args):
            out = value(critic, *args)
            if out.requires_grad and critic.need.is_trunk_trained:
                out.register_hook(lambda grad: self.backwards.update(["value model"]))
            return out

        def count_backward(accelerator, loss):
            self.backwards[self.kind] += 1
            backward(accelerator, loss)

        monkeypatch.setattr(MaskedPolicy, "token_outputs", token_outputs)
        monkeypatch.setattr(scoring, "score_copies", count_copies)
        monkeypatch.setattr(trainer, "score_copies", count_copies)
        monkeypatch.setattr(Accelerator, "backward", count_backward)
        monkeypatch.setattr(Critic, "_value", count_value)
        for owner, name, kind in (
            (GroupSource, "collect", "collect"),
            (Trainer, "score_fixed", "old policy"),
            (Trainer, "monitor", "monitor"),
            (Trainer, "backward", "update"),
            (Evaluator, "held_out_row", "evaluation"),
            (Evaluator, "final_rows", "final"),
        ):
            monkeypatch.setattr(owner, name, self.within(getattr(owner, name), kind))

    def kind_of(self, policy) -> str:
        if policy.name != "reference":
            return self.kind
        return {"old policy": "reference", "update": "kl"}.get(self.kind, self.kind)

    def within(self, function, kind):
        def labelled(*args, **kwargs):
            self.kind = kind
            try:
                return function(*args, **kwargs)
            finally:
                self.kind = "elsewhere"

        return labelled


def assert_equal(passes, count: Count) -> None:
    names = {"base and final": "final", "final rows": "final"}
    planned = {names.get(item.name, item.name): item for item in passes}
    for attribute, found in (("forwards", count.calls), ("sequences", count.sequences), ("backwards", count.backwards)):
        expected = {name: getattr(item, attribute) for name, item in planned.items() if getattr(item, attribute)}
        assert dict(found) == expected, attribute


CASES = [  # (algorithm, K of one draw)
    ({"kl_coef": 0.01}, 4),
    ({"kl_coef": 0.0, "fresh_masks": False}, 4),
    ({"kl_coef": 0.01, "fresh_masks": False, "num_iterations": 3}, 4),
    ({"kl_coef": 0.01, "share_masks": False}, 4),
    ({"kl_coef": 0.0, "share_masks": False, "fresh_masks": False}, 4),
    ({"kl_coef": 0.01, "num_masks": 10}, 10),  # more copies than fit into a micro-batch: two passes an update
    ({"type": "wd1", "ref_coef": 0.5}, 1),  # two forwards a step of sampling
    ({"type": "diffu_grpo", "num_masks": 2}, 2),
    ({"type": "diffu_grpo", "prompt_mask_ratio": 0.0, "num_masks": 3}, 1),
    ({"type": "wd1", "likelihood": "trajectory", "prompt_mask_ratio": 0.0, "fresh_masks": False}, 4),  # one a step
    ({"type": "wd1"}, 1),  # neither old policy nor reference is scored
    ({"type": "spg", "num_masks": 3}, 3),
    ({"type": "gdpo", "num_masks_per_node": 2}, 6),
    ({"type": "coupled_grpo", "share_masks": False}, 3),
    ({"type": "unigrpo"}, 1),
]


@pytest.mark.parametrize(("algorithm", "num_masks"), CASES)
def test_a_real_run_makes_the_planned_passes(algorithm, num_masks, model, tmp_path, monkeypatch):
    recipe = train_recipe(train_tables(model, **algorithm), tmp_path)
    count = Count(monkeypatch)
    run_recipe(recipe, tmp_path / "run", SilentView())
    assert_equal(list(count_passes(recipe, num_masks, num_held_out=20, num_final=16)), count)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "dga", "energy_updates": 2},  # layers of its own, and the reference in every update
        {"type": "dga", "mode": "sum", "num_masks": 4, "use_energy": False},
        {"type": "embr_e"},  # a head on the reference's states, which are read once a batch
    ],
    ids=["energy", "kl", "head"],
)
def test_a_real_run_with_a_value_model_or_an_exact_kl_makes_the_planned_passes(algorithm, model, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digit_sum", DigitSum)  # whose rewards differ, so that there is something to learn
    tables = train_tables(model, **algorithm)
    tables["task"] = {"type": "digit_sum"}
    recipe = train_recipe(tables, tmp_path)
    num_masks = Footprint(recipe, Setting(), Lengths(4, 4, 4, 20, 20)).draw.num_masks
    count = Count(monkeypatch)
    run_recipe(recipe, tmp_path / "run", SilentView())
    passes = list(count_passes(recipe, num_masks, num_held_out=20, num_final=20))
    assert {item.name for item in passes} & {"kl", "value model"}
    assert_equal(passes, count)


def test_values_that_follow_the_objective_are_read_again_after_each_update(model, tmp_path):
    """No algorithm here has layers of its own without a loss of its own: 3 batches of 12 rows in micro-batches of 9."""
    recipe = train_recipe(train_tables(model, type="dga"), tmp_path)
    follows = replace(recipe.algorithm.value.needs.value, loss=None)
    algorithm = SimpleNamespace(needs=Needs(value=follows), num_iterations=2)
    first, later = value_passes(replace(recipe, algorithm=Named("mine", algorithm)))
    assert (first.phase, first.forwards, first.sequences, first.backwards) == ("score", 6, 36, 0)
    # for each update a forward without gradient, one with, one for the new numbers
    assert (later.phase, later.forwards, later.sequences) == ("update", 2 * 3 * 6, 2 * 3 * 36)
    assert (later.backwards, later.backward_sequences) == (2 * 6, 2 * 36)


@pytest.mark.parametrize("change", [{}, {"monitor_rows": 0, "eval_every": 0}, {"num_batches": 1, "monitor_rows": 99}])
def test_other_rhythms(change, model, tmp_path, monkeypatch):
    tables = train_tables(model, type="diffu_grpo")
    tables["trainer"] |= change
    tables["sampler"] = {"type": "random_remasking", "gen_length": 4, "num_steps": 2, "temperature": 1.0}
    recipe = train_recipe(tables, tmp_path)
    count = Count(monkeypatch)
    run_recipe(recipe, tmp_path / "run", SilentView())
    assert_equal(list(count_passes(recipe, 1, num_held_out=20, num_final=16)), count)


def test_supervised_training_makes_the_planned_passes(tmp_path, monkeypatch):
    recipe = sft_recipe(sft_tables(), tmp_path)
    count = Count(monkeypatch)
    run_recipe(recipe, tmp_path / "run", SilentView())
    assert_equal(list(count_passes(recipe, 1, num_held_out=10, num_final=16)), count)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "engine"])  # whose passes are elsewhere
def test_sampling_passes_are_the_samplers_own_count(name):
    policy = block_causal_policy() if name == "block_diffusion" else tiny_policy()
    fields = SAMPLERS[name].__dataclass_fields__
    for steps in [{}, {"num_steps": 3}] if "num_steps" in fields else [{}]:
        sampler = SAMPLERS[name](gen_length=6, **steps)
        ids = torch.tensor([[3], [4]])
        prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(2), torch.arange(2))
        samples = sampler.sample(policy, prompts, noise=Noise(0))
        assert sampling("", "", sampler, 2, 1, 1, policy.block_size).sequences == int(samples.nfe.sum())


def block_causal_policy() -> MaskedPolicy:
    config = SDARConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, block_size=4, mask_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return MaskedPolicy(SDARForMaskedLM(config), None)


def test_a_rehearsed_sampler_asks_what_the_real_one_asks():
    """Two blocks of three slots, one token a step: three, two and one open slots in each; canvases of 2 + 6 tokens."""
    heard = rehearse(SAMPLERS["low_confidence"](gen_length=6, block_length=3), prompt_tokens=2)
    assert (heard.forwards, heard.tokens, heard.wanted, heard.most_wanted) == (6, 48, 12, 3)
    assert (heard.most_tokens, heard.pairs, heard.cached) == (8, 6 * 64, 0)


def test_a_rehearsed_cache_holds_all_but_what_is_open():
    """Blocks of two: the prompt fills one, the completion two; each finished block is read once more for the cache."""
    heard = rehearse(SAMPLERS["block_diffusion"](gen_length=4), prompt_tokens=2, block_size=2)
    # 2+2 tokens, then the open block alone; the finished one; the next block, twice
    assert (heard.forwards, heard.tokens, heard.wanted) == (5, 4 + 2 + 2 + 2 + 2, 6)
    assert (heard.most_tokens, heard.cached) == (4, 6)


# ---- sizes, FLOPs, hours


def tree_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_planned_checkpoints_and_disk_are_what_a_run_leaves(model, tmp_path, monkeypatch):
    recipe = train_recipe(train_tables(model, kl_coef=0.01), tmp_path)
    plan = plan_run(recipe)
    written = []
    monkeypatch.setattr("unmask.run_log.write_checkpoint", recording("unmask.checkpoint.write_checkpoint", written))
    run_recipe(recipe, tmp_path / "run", SilentView())
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert plan.checkpoints == (len({str(path) for path in written}), len(checkpoints)) == (2, 2)
    assert tree_bytes(checkpoints[0]) == pytest.approx(plan.measured.checkpoint_bytes, rel=0.1)
    disk = plan.disk_bytes
    logs = sum((tmp_path / "run" / name).stat().st_size for name in ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl"))
    assert disk["logs"] == pytest.approx(logs, rel=0.05)
    weights = sum((tmp_path / "run" / name / "model.safetensors").stat().st_size for name in ("model", "best"))
    assert disk["models"] == pytest.approx(weights, rel=0.1)


@pytest.mark.parametrize("kind", ["copy", "adapter", "reference"])
def test_a_planned_value_model_is_what_a_run_saves(kind, model, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digit_sum", DigitSum)
    tables = train_tables(model, type="embr_e" if kind == "reference" else "dga")
    tables["task"] = {"type": "digit_sum"}
    tables["trainer"] |= {"num_batches": 1, "save_every": 1}
    if kind == "adapter":
        tables["model"] |= {"lora": {"rank": 4, "alpha": 8.0}}
    recipe = train_recipe(tables, tmp_path)
    plan = plan_run(recipe)
    run_recipe(recipe, tmp_path / "run", SilentView())
    weights = load_file(tmp_path / "run" / "energy" / "weights.safetensors")
    planned = plan.measured.value_model
    assert planned.kind == kind and planned.num_parameters == sum(t.numel() for t in weights.values())
    assert planned.weight_bytes == sum(t.numel() * t.element_size() for t in weights.values())
    path = min(list_checkpoints(tmp_path / "run" / "checkpoints"))  # within the batch, as a planned one
    saved = load_file(path / "tensors.safetensors")
    moments = [t for name, t in saved.items() if name.startswith("value_model.optimizer") and t.dim()]
    assert planned.optimizer_bytes == sum(t.numel() * t.element_size() for t in moments) > 0
    assert tree_bytes(path) == pytest.approx(plan.measured.checkpoint_bytes, rel=0.1)
    assert f"# value model  {planned.num_parameters:,} parameters more (head" in plan_text(plan)
    policy = sum(p.numel() for p in open_for_training(model, recipe.model, seed=0).module.parameters())
    assert plan.num_parameters == policy  # none of the value model's among them
    prompts, canvases = (plan.measured.prompt_tokens, plan.measured.tokens)
    assert canvases - prompts == recipe.sampler.value.gen_length
    (learning,) = (item for item in plan.passes if item.name == "value model")
    tokens = prompts if kind == "reference" else canvases
    multiple = 1 if kind == "reference" else 3 + 2  # forwards of 12 rows: two for the update, one for the numbers
    assert plan.pass_flops(learning) == pytest.approx(2 * policy * tokens * 12 * multiple)


def recording(name: str, paths: list):
    """The function of that name, whose results are kept in `paths`."""
    module, _, attribute = name.rpartition(".")
    function = getattr(__import__(module, fromlist=[attribute]), attribute)

    def recorded(*args):
        paths.append(function(*args))
        return paths[-1]

    return recorded


def plan_of(recipe: Recipe, **fields) -> Plan:
    seconds = {"collect": 36.0, "score": 18.0, "update": 72.0, "evaluate": 0.9}
    measured = Measurement(2, 33.0, seconds, checkpoint_bytes=1000, bytes_per_batch=10.0, bytes_per_step=1.0)
    passes = list(count_passes(recipe, 2, num_held_out=20, num_final=16))
    return replace(Plan(recipe, 100, 400, measured, passes), **fields)


def test_hours_and_flops_by_hand(model, tmp_path):
    tables = train_tables(model, type="diffu_grpo", kl_coef=0.04, num_iterations=2, num_masks=2)
    tables["trainer"] |= {"monitor_rows": 0, "eval_every": 0}
    tables["evaluation"]["final_num_steps"] = [4]
    plan = plan_of(train_recipe(tables, tmp_path))
    # three batches; base and final: 2 x 16 completions x 4 steps, 0.9 s each
    assert plan.hours == pytest.approx({"collect": 0.03, "score": 0.015, "update": 0.06, "evaluate": 128 * 0.9 / 3600})
    # for each of 3 batches of 12 rollouts: K_den = 4 forwards, μ K = 4 forward-backwards at 3 forwards each, one more
    # pass of 2 for the second draw's old policy, 2 draws of 2 for the reference
    per_rollout = 4 + 3 * 4 + 2 + 4
    assert plan.flops == pytest.approx(2 * 100 * 33 * (3 * 12 * per_rollout + 128))


@pytest.mark.parametrize(("draws", "expected"), [(1, 608), (2, 704), (4, 896)])
def test_the_published_cost_formula(draws, expected):
    """Coupled ELBO: F = 2ND (K_den + 6 μ M); with K_den = 256 and μ = 8 it is 608, 704 and 896 ND for M = 1, 2, 4."""
    algorithm = {"type": "espo", "num_masks": 2 * draws, "kl_coef": 0.0, "num_iterations": 8, "fresh_masks": False}
    tables = train_tables(Path("x")) | {"algorithm": algorithm, "sampler": {"type": "roar", "gen_length": 256}}
    tables["trainer"]["micro_batch_size"] = 64
    recipe = train_recipe(tables, Path())
    passes = {item.name: item for item in count_passes(recipe, 2 * draws, 0, 0)}
    flops = passes["collect"].flops(1, 1.0) + passes["update"].flops(1, 1.0)
    assert flops / (3 * 12) == expected
    assert passes["old policy"].sequences == 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 << 20, "1.5 GiB"), (1 << 60, "1048576.0 TiB")],
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


# ---- the command


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in path.rglob("*")}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with recipes and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base.toml").write_text(dump_toml(sft_tables()))
    (tmp_path / "rl.toml").write_text(dump_toml(train_tables(Path("x")) | {"model": {"recipe": "base.toml"}}))
    return tmp_path


def test_a_dry_run_prints_a_recipe_and_a_plan_and_writes_nothing(place, capsys):
    before = snapshot(place)
    assert main(["train", "rl.toml", "seed=3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert snapshot(place) == before
    expected = train_recipe(tomllib.loads((place / "rl.toml").read_text()) | {"seed": 3}, place)
    assert tomllib.loads(out) == tomllib.loads(dump_toml(expected.tree()))
    assert "# updates      6" in out and "# hours " in out and "# checkpoints  2 written, 2 kept" in out
    assert "The base is not in the cache" in out and "plan of supervised training, seed 3" in out


def test_a_cached_base_is_used_and_found_where_runs_put_it(place, capsys):
    directory = cached_base(place / "base.toml", 0, SilentView())
    assert supervised_base(place / "base.toml", 0)[1] == directory
    before = snapshot(place)
    assert main(["train", "rl.toml", "--dry-run"]) == 0
    assert "The base is not in the cache" not in capsys.readouterr().out
    assert snapshot(place) == before


def test_a_dry_run_of_supervised_training(place, capsys):
    assert main(["sft", "base.toml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "data" in tomllib.loads(out) and "# completions  16" in out and "collect   " not in out
    assert sorted(p.name for p in place.iterdir()) == ["base.toml", "rl.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rl.toml", "--dry-run", "--output", "full"], "exists and is not empty"),
        (["--resume", "full", "--dry-run"], "--dry-run plans a new run"),
        (["rl.toml", "--dry-run", "evaluation.final_split=tst"], "unknown split 'tst'"),
        (["rl.toml", "--dry-run", "task.data=none.csv"], "none.csv"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(arguments, message, place, capsys):
    (place / "full").mkdir()
    (place / "full" / "file").write_text("")
    before = snapshot(place)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert snapshot(place) == before


def test_the_text_of_a_plan_is_a_recipe(model, tmp_path):
    recipe = train_recipe(train_tables(model), tmp_path)
    again = tomllib.loads(plan_text(plan_of(recipe)))
    assert train_recipe(again, tmp_path).tree() == recipe.tree()
