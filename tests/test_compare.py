"""Comparing algorithms: statistics by hand, arms from text, the plan's directory, tables from runs, real processes."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_policy
from unmask.cli import main
from unmask.cli.compare_command import report_failures
from unmask.comparison import has_failed, jobs_here, plan_comparison
from unmask.comparison.arms import parse_arms, split_outside
from unmask.comparison.figure import legend_columns, mean_curve
from unmask.comparison.measures import last_mean, last_row, measure, share_done
from unmask.comparison.planning import Run, check_directory, count_flops, only_here, read_flops, write_plan
from unmask.comparison.processes import Machine, read_record, run_all, this_machine
from unmask.comparison.results import summarise
from unmask.comparison.tables import markdown, significant
from unmask.config import dump_toml
from unmask.errors import ConfigError
from unmask.intervals import mean_interval, paired_difference, paired_ratio, student_quantile
from unmask.run_log import StopRequest
from unmask.runs import read_rows
from unmask.tables import escape

RECIPE = """
[model]
path = "model"
[task]
type = "sudoku"
num_train = 8
num_validation = 4
num_test = 4
[algorithm]
type = "espo"
num_iterations = 2
[sampler]
type = "roar"
[rollout]
prompts_per_batch = 2
group_size = 4
[trainer]
eval_every = 2
save_every = 1
monitor_rows = 4
[trainer.stop]
at_least = 0.9
[optimizer]
lr = 1e-3
[evaluation]
num_examples = 4
final_num_steps = [4, 2]
[evaluation.sampler]
type = "low_confidence"
num_steps = 4
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model and recipes."""
    place = tmp_path_factory.mktemp("compare")
    tiny_policy(dtype=torch.float32).save(place / "model")
    (place / "recipe.toml").write_text(RECIPE)
    (place / "other.toml").write_text(RECIPE.replace('"espo"', '"wd1"').replace("num_steps = 4", "num_steps = 8"))
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A fresh copy of that folder, to work in."""
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def planned(arms: str, *overrides: str, seeds: str = "0,1", budget: int = 32):
    return plan_comparison("recipe.toml", overrides, arms, seeds, budget, "out")


# ---- statistics


def test_quantiles_of_student_by_closed_forms():
    # nu = 1 is Cauchy's: t = tan(pi (p - 1/2)). nu = 2: t = (2p - 1) / sqrt(2 p (1 - p)).
    p = 0.975
    assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-12)
    assert student_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-12)
    # nu = 4: 2 sqrt(q - 1) with q = cos(arccos(sqrt(a)) / 3) / sqrt(a), a = 4 p (1 - p) (Shaw 2006)
    a = 4 * p * (1 - p)
    q = math.cos(math.acos(math.sqrt(a)) / 3) / math.sqrt(a)
    assert student_quantile(p, 4) == pytest.approx(2 * math.sqrt(q - 1), rel=1e-12)
    # printed tables, three decimals
    for degrees, t in ((3, 3.182), (5, 2.571), (9, 2.262), (29, 2.045), (120, 1.980)):
        assert student_quantile(p, degrees) == pytest.approx(t, abs=5.01e-4)
    # z (1 + (z² + 1) / (4 nu)) + O(1 / nu²) with z = 1.959964, printed to six decimals; the next term is 3e-8
    assert student_quantile(p, 10_001) == pytest.approx(1.959964 * (1 + (1.959964**2 + 1) / 40_004), abs=1e-6)
    assert student_quantile(0.5, 7) == 0


def test_an_interval_by_hand():
    # values 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, s = sqrt(14 / 2) = sqrt(7), t(2) = 0.95 / sqrt(2 * 0.975 * 0.025)
    found = mean_interval([1.0, 2.0, 6.0])
    half = 0.95 / math.sqrt(0.04875) * math.sqrt(7) / math.sqrt(3)
    assert found.mean == 3 and found.count == 3
    assert found.deviation == pytest.approx(math.sqrt(7), rel=1e-12)
    assert (found.low, found.high) == (pytest.approx(3 - half, rel=1e-12), pytest.approx(3 + half, rel=1e-12))


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert mean_interval([0.5]).tree() == {"mean": 0.5, "ci95": None, "deviation": None, "count": 1}
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_differences_are_paired_by_seed():
    # seeds differ by 10, arms by 1 and 3: the mean difference is 2, half = 12.706 * sqrt(2) / sqrt(2) = tan(0.475 pi)
    found = paired_difference({0: 11.0, 1: 23.0, 5: 0.0}, {1: 20.0, 0: 10.0, 7: 0.0})
    assert found.mean == 2 and found.count == 2
    assert found.high - found.mean == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_ratio({0: 3.0, 1: 1.0}, {0: 2.0}) == {0: 1.5}


def test_a_mean_curve_has_points_where_every_seed_has_one():
    points = mean_curve([{0: 1.0, 8: 3.0, 16: 9.0}, {8: 5.0, 0: 2.0}])
    assert [(x, found.mean) for x, found in points] == [(0, 1.5), (8, 4.0)]
    assert mean_curve([]) == []


# ---- arms


def test_arms_are_split_outside_of_brackets_and_quotes():
    assert split_outside("a,b=[1,2],c='x,y'", ",") == ["a", "b=[1,2]", "c='x,y'"]
    (plain, full) = parse_arms("espo, wd1:num_masks=2:rollout.group_size=4:evaluation.final_num_steps=[4,2]")
    assert (plain.label, plain.name, plain.overrides) == ("espo", "espo", ())
    assert full.label == "wd1:num_masks=2:rollout.group_size=4:evaluation.final_num_steps=[4,2]" and full.name == "wd1"
    assert full.overrides == ("algorithm.num_masks=2", "rollout.group_size=4", "evaluation.final_num_steps=[4,2]")
    assert parse_arms("a/b.toml:lr=1")[0].is_file and not plain.is_file


def test_an_arm_is_its_algorithm_in_the_recipe_with_equal_rollouts(place):
    comparison = planned("espo:kl=k3,wd1,wd1:rollout.group_size=2", "optimizer.lr=5e-4", budget=35)
    first, second, _ = (arm.recipe for arm in comparison.arms)
    assert (first.algorithm.name, first.algorithm.value.kl, first.algorithm.value.num_iterations) == ("espo", "k3", 2)
    assert second.algorithm.name == "wd1"
    assert second.algorithm.value == type(second.algorithm.value)()  # the published setting: the recipe's is espo's
    assert {arm.recipe.optimizer.lr for arm in comparison.arms} == {5e-4}
    assert [arm.num_batches for arm in comparison.arms] == [4, 4, 8]  # 35 // 8, 35 // 8, 35 // 4
    assert [arm.rollouts for arm in comparison.arms] == [32, 32, 32]
    assert all(arm.recipe.trainer.stop.at_least is None for arm in comparison.arms)  # equal rollouts
    assert comparison.arms[0].with_seed(3).seed == 3
    assert [arm.directory for arm in comparison.arms] == ["01-espo_kl=k3", "02-wd1", "03-wd1_rollout.group_size=2"]
    text = "\n".join(comparison.notes)
    assert "espo:kl=k3, wd1: batches of 8 rollouts make 32 of 35" in text
    assert "all arms: the stop rule" in text and "sets num_iterations for espo" in text


def test_a_file_is_a_whole_recipe_and_what_it_measures_otherwise_is_said(place):
    comparison = planned("espo,other.toml:num_masks=2")
    arm = comparison.arms[1]
    assert (
        arm.label == "other.toml:num_masks=2"
        and arm.recipe.algorithm.name == "wd1"
        and arm.recipe.algorithm.value.num_masks == 2
    )
    assert any("evaluation.sampler.num_steps" in note for note in comparison.notes)


def test_a_supervised_recipe_can_be_an_arm(place):
    (place / "rows.jsonl").write_text('{"prompt": "12|", "completion": "34"}\n')
    (place / "sft.toml").write_text(
        '[model]\npath = "model"\n[data]\nfile = "rows.jsonl"\nbatch_size = 4\ngen_length = 8\n'
    )
    arm = planned("espo,sft.toml").arms[1]
    assert (arm.command, arm.num_batches, arm.rollouts, arm.completion_tokens) == ("sft", 8, 32, 8)


def test_batches_of_a_buffer_and_leaves_of_a_tree_are_counted_as_rollouts_once(place):
    """A buffer's batches cost no rollouts: of 35, 4 times 8 are made, each for three batches. A tree of 4 leaves."""
    text = "wd1:rollout.buffer.num_batches=2:rollout.buffer.collect_every=3,d_treerpo"
    buffered, tree = planned(text, budget=35).arms
    assert (buffered.num_batches, buffered.rollouts) == (12, 32)
    assert buffered.made == [0, 8, 8, 8, 16, 16, 16, 24, 24, 24, 32, 32, 32]
    assert (tree.num_batches, tree.rollouts) == (4, 32)  # 2 prompts x 4 leaves, whatever the nodes
    assert tree.recipe.rollout.batch_rows > 8


def test_pairs_of_a_file_can_be_an_arm_alone_or_before_rollouts(place):
    (place / "pairs.jsonl").write_text('{"prompt": "12|", "chosen": "34", "rejected": "43"}\n')
    begin = 'extends = "recipe.toml"\n[algorithm]\ntype = "vrpo"\n[data]\nfile = "pairs.jsonl"\nbatch_size = 2\n'
    (place / "pairs.toml").write_text(begin + "gen_length = 8\n")
    arm = planned("espo,pairs.toml", budget=32).arms[1]
    assert (arm.command, arm.num_batches, arm.rollouts, arm.completion_tokens) == ("train", 8, 32, 8)
    assert "nothing is rolled out" in arm.notes[-1]
    (place / "both.toml").write_text(begin + "num_batches = 3\n")
    arm = planned("espo,both.toml", budget=32).arms[1]
    assert (arm.num_batches, arm.rollouts, arm.made) == (7, 32, [0, 0, 0, 0, 8, 16, 24, 32])


def test_flops_follow_the_plan_of_passes(place):
    """One set of masks, no reference: 16 forwards of a canvas a rollout, 4 copies forward and backward an update."""
    arm = planned("espo:num_masks=4:fresh_masks=false:kl_coef=0", "trainer.monitor_rows=0", budget=16).arms[0]
    size = sum(p.numel() for p in tiny_policy().module.parameters())
    tokens = 17 + 16  # puzzle and bar, canvas
    collected, copies = 16 * 16, 2 * 16 * 4  # two updates for each batch
    found = count_flops(arm)
    assert found["training"] == pytest.approx((2 * collected + (2 + 4) * copies) * size * tokens, rel=1e-9)
    # held out: after batch 2, 4 prompts x 4 steps; before and after: 4 prompts x (4 + 2) steps each
    assert found["evaluation"] == pytest.approx(2 * (4 * 4 + 2 * 4 * 6) * size * tokens, rel=1e-9)


BAD = {
    "unknown algorithm": (["--arms", "espo,wd2"], "--arms wd2: unknown algorithm 'wd2'"),
    "unknown key": (["--arms", "espo:klx=1"], "--arms espo:klx=1: unknown key algorithm.klx"),
    "no value": (["--arms", "espo:kl"], "'kl' must be KEY=VALUE"),
    "no name": (["--arms", "espo,,wd1"], "an arm has no name"),
    "override without an arm": (["--arms", ":kl=k3"], "an arm has no name"),
    "twice": (["--arms", "espo,espo"], "espo is there twice"),
    "no file": (["--arms", "nowhere.toml"], "nowhere.toml: no such file"),
    "budget": (["--budget", "7"], "less than one batch of espo, which has 8 rollouts. Give at least 8"),
    "batches": (["--arms", "espo:trainer.num_batches=3"], "trainer.num_batches is set by --budget"),
    "seed": (["seed=3"], "seed is set by --seeds"),
    "seeds": (["--seeds", "0,x"], "--seeds 0,x: must be different integers"),
    "equal seeds": (["--seeds", "1,1"], "--seeds 1,1: must be different integers"),
    "no jobs": (["--jobs", "0"], "--jobs 0: must be from 1 to"),
    "jobs": (["--jobs", "10000"], "--jobs 10000: must be from 1 to"),
    "occupied": (["--output", "model"], "--output model: exists and is not empty"),
    "recipe": (["missing.toml"], "missing.toml"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(name, place, capsys):
    changes, message = BAD[name]
    options = {"--arms": "espo", "--budget": "16", "--output": "out", "--seeds": "0"}
    words = list(changes)
    recipe = [words.pop(0)] if words[0].endswith("ing.toml") else ["recipe.toml"]
    overrides = [words.pop(0)] if words and "=" in words[0] else []
    options |= dict(zip(words[::2], words[1::2], strict=True))
    before = sorted(place.rglob("*"))
    assert main(["compare", *recipe, *overrides, *(w for pair in options.items() for w in pair), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
    assert sorted(place.rglob("*")) == before


def test_compare_wants_no_launcher(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without a launcher"):
        planned("espo")


# ---- the directory


def test_the_same_plan_goes_on_and_another_is_refused(place):
    assert not check_directory(planned("espo"))
    write_plan(planned("espo"))
    assert check_directory(planned("espo"))
    assert read_flops(planned("espo"))["espo"]["training"] > 0
    for other, key in (
        (planned("espo", seeds="0,1,2"), "seeds"),
        (planned("espo", budget=40), "budget"),
        (planned("espo,wd1"), "arms.wd1"),
        (planned("espo", "optimizer.lr=5e-4"), "arms.espo.optimizer.lr"),
    ):
        with pytest.raises(ConfigError, match="another plan") as caught:
            check_directory(other)
        assert key in str(caught.value) and "\n" not in str(caught.value)
    (place / "out" / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        check_directory(planned("espo"))


def test_the_order_of_arms_is_part_of_the_plan(place):
    assert planned("espo,wd1").identity() != planned("wd1,espo").identity()


def test_a_directory_is_held_by_one_comparison_and_by_the_children_of_one_that_is_gone(tmp_path):
    with only_here(tmp_path) as lock:
        with pytest.raises(ConfigError, match="still works there"), only_here(tmp_path):
            pass
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(ConfigError, match="still works there"), only_here(tmp_path):
        pass
    orphan.communicate(b"\n")
    with only_here(tmp_path):
        pass


def test_the_base_of_a_seed_is_missing_once_for_all_arms(place, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cache"))
    (place / "base.toml").write_text('[model.tiny]\nhidden_size = 16\n[task]\ntype = "sudoku"\n')
    model = ("model.path=none", "model.recipe=base.toml")
    assert planned("espo,wd1", *model, seeds="4,2").missing_bases() == [
        (place / "base.toml", 4),
        (place / "base.toml", 2),
    ]
    assert planned("espo,wd1").missing_bases() == []


# ---- processes


def test_cores_are_shared_without_oversubscription():
    machine = Machine(num_cores=8)
    assert machine.share(20, None, None) == (8, 1)
    assert machine.share(3, None, None) == (3, 2)  # two cores each, two are left
    assert machine.share(20, 4, None) == (4, 2)
    assert machine.share(20, 2, 1) == (2, 1)  # the user allows one thread
    for jobs in (1, 2, 3, 5, 8):
        count, threads = machine.share(100, jobs, None)
        assert count == jobs and count * threads <= 8
    assert Machine(8, ("2", "5")).share(20, None, None) == (2, 4)
    with pytest.raises(ConfigError, match="--jobs 9: must be from 1 to 8"):
        machine.share(20, 9, None)


def test_a_child_has_its_threads_and_one_device(monkeypatch):
    machine = Machine(8, ("2", "5"))
    assert [machine.environment(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["2", "5", "2"]
    assert machine.environment(0, 4)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert this_machine(2).devices == ("3", "7") and this_machine(0).devices == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert this_machine(2).devices == ("0", "1")


def test_failing_children_do_not_stop_the_others_and_leave_their_last_line(place):
    """Real processes: an unknown command ends at once, with one line and code 2."""
    arm = replace(planned("espo").arms[0], command="fly")
    runs = [Run(arm, seed, place / "out" / "fly") for seed in (0, 1, 2)]
    machine, ended = Machine(2), []
    with open(place / "lock", "w") as lock:
        run_all(
            runs, 2, lambda slot: machine.environment(slot, 1), lock.fileno(), StopRequest(),
            on_poll=lambda: None, on_end=ended.append,
        )  # fmt: skip
    assert sorted(run.seed for run in ended) == [0, 1, 2]
    for run in runs:
        record = read_record(run)
        assert "ConfigError: " in record["error"] and "'fly'" in record["error"] and "\n" not in record["error"]
        assert record["parts"] == 1 and record["peak_memory_bytes"] > 0 and record["process_seconds"] > 0


def test_nothing_is_started_once_a_stop_is_asked_for(place):
    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    run = Run(planned("espo").arms[0], 0, place / "out" / "espo")
    run_all([run], 1, lambda slot: {}, 0, stop, on_poll=lambda: None, on_end=lambda run: None)
    assert not run.folder.exists()


# ---- tables from runs, written by hand

BASE = {"num_steps": 4, "accuracy": 0.25, "gen_length": 16}


def write_run(run: Run, accuracy: float, seconds: float, ess: float | None = None) -> None:
    """A finished run of 4 batches of 8 rollouts, 2 updates each."""
    run.path.mkdir(parents=True)
    (run.path / "config.toml").write_text(dump_toml(run.arm.with_seed(run.seed).tree()))
    rows, timing = [], []
    for step in range(8):
        row = {"step": step + 1, "iteration": step // 2, "reward": 0.1 * (step // 2), "reward_std": 0.1 * (step // 2)}
        rows.append(row | ({} if ess is None else {"ess": ess if step == 7 else None if step == 5 else 0.5}))
        first = {"collect": seconds / 8, "score": seconds / 16} if step % 2 == 0 else {}
        timing.append({"step": step + 1, **first, "update": seconds / 32, "step_seconds": 9.0, "evaluate": 100.0})
    summary = {
        "base": [BASE, BASE | {"num_steps": 2, "accuracy": 0.125}],
        "final": [BASE | {"accuracy": accuracy}, BASE | {"num_steps": 2, "accuracy": accuracy / 2}],
    }
    evaluations = [{"iteration": i, "step": 2 * i + 2, "accuracy": accuracy} for i in (1, 3)]
    for name, content in (("metrics", rows), ("timing", timing), ("evaluations", evaluations)):
        (run.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    run.beside("json").write_text(json.dumps({"peak_memory_bytes": 2**20 * 100, "error": None}))
    (run.path / "summary.json").write_text(json.dumps(summary))


def write_comparison(arms: str = "espo,wd1") -> None:
    """Two seeds: espo 0.5 and 0.7 in one second, wd1 0.8 and 0.8 in two."""
    comparison = planned(arms)
    flops = {arm.label: {"training": 3e12, "evaluation": 1e12} for arm in comparison.arms}
    Path("out").mkdir()
    Path("out/plan.json").write_text(json.dumps({"identity": comparison.identity(), "flops": flops}))
    for run in comparison.runs:
        is_first = run.arm is comparison.first
        write_run(run, (0.5, 0.7)[run.seed] if is_first else 0.8, 1.0 if is_first else 2.0, None if is_first else 0.9)


def again(*options: str, arms: str = "espo,wd1") -> int:
    words = ["compare", "recipe.toml", "--arms", arms, "--seeds", "0,1", "--budget", "32", "--output", "out"]
    return main([*words, *options])


def test_the_numbers_of_a_run_by_hand(place):
    write_comparison()
    run = planned("espo,wd1").runs[1]
    assert (run.arm.label, run.seed) == ("wd1", 0)
    found = measure(run)
    # seconds: 4 batches x (1/8 + 1/16) x 2 s and 8 updates x 2/32 s = 1.5 + 0.5 = 2; 32 rollouts of 16 tokens
    assert found == {
        "accuracy@4": 0.8,
        "accuracy@2": 0.4,
        "reward_std": pytest.approx(0.3),  # the last of four batches
        "ess": pytest.approx(0.7),  # its two updates: 0.5 and 0.9
        "peak_memory_bytes": 2**20 * 100,
        "seconds_per_rollout": pytest.approx(2 / 32),
        "tokens_per_second": pytest.approx(256),
    }
    summary = json.loads((run.path / "summary.json").read_text())
    (run.path / "summary.json").write_text(json.dumps(summary | {"peak_device_bytes": 7}))
    assert measure(run)["peak_memory_bytes"] == 7  # an accelerator's, where there is one


def test_the_last_quarter_is_one_batch_at_least_and_skips_what_is_not_a_number():
    rows = [{"iteration": i, "ess": 0.1 * i if i != 6 else None} for i in range(8)]
    assert last_mean(rows, "ess", 8) == pytest.approx(0.7)
    assert last_mean(rows[:1], "ess", 1) == 0
    assert last_mean(rows, "reward_std", 8) is None


def test_the_table_of_finished_runs_by_hand(place, capsys):
    pytest.importorskip("matplotlib")
    write_comparison()
    assert again("--quiet") == 0
    out = capsys.readouterr().out
    assert "base (step 0)" in out and "table.md" in out
    tree = json.loads((place / "out" / "table.json").read_text())
    t1 = math.tan(0.475 * math.pi)  # t of one degree of freedom
    first, second = tree["arms"]
    # espo 0.5, 0.7: mean 0.6, half = t * (0.2 / sqrt 2) / sqrt 2 = 0.1 t. wd1 - espo: 0.3, 0.1: mean 0.2, half 0.1 t
    assert first["statistics"]["accuracy@4"]["ci95"] == pytest.approx([0.6 - 0.1 * t1, 0.6 + 0.1 * t1])
    assert second["difference"]["accuracy@4"]["mean"] == pytest.approx(0.2)
    assert second["difference"]["accuracy@4"]["ci95"] == pytest.approx([0.2 - 0.1 * t1, 0.2 + 0.1 * t1])
    assert second["statistics"]["relative_cost"]["mean"] == pytest.approx(2)
    assert tree["base"]["statistics"]["accuracy@4"]["mean"] == 0.25
    assert tree["base"]["difference"]["accuracy@4"]["mean"] == pytest.approx(0.25 - 0.6)
    assert (first["rollouts"], tree["budget"], tree["first"], tree["accuracies"]) == (
        32,
        32,
        "espo",
        ["accuracy@4", "accuracy@2"],
    )
    assert {run["state"] for run in first["runs"].values()} == {"finished"}
    markdown = (place / "out" / "table.md").read_text()
    heading = next(line for line in markdown.splitlines() if line.startswith("| arm"))
    assert heading.startswith(
        "| arm | seeds | rollouts | FLOPs | accuracy @4, % | difference to espo | accuracy @2, % |"
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    base, espo, wd1 = rows[2:]
    assert base[:3] == ["base (step 0)", "2", "0"] and base[4] == "25.0 (25.0 to 25.0)"
    assert base[7:] == ["-"] * 5
    assert espo[4] == "60.0 (-67.1 to 187.1)" and espo[5] == "-" and espo[8] == "-"  # no ESS
    assert wd1[5] == "+20.0 (-107.1 to +147.1)" and wd1[8] == "70.0 (70.0 to 70.0)"
    assert wd1[9:] == ["100 (100 to 100)", "256 (256 to 256)", "2.00 (2.00 to 2.00)"]
    assert (place / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    latex = (place / "out" / "table.tex").read_text()
    assert latex.count("\\\\\n") == 4 and "60.0 ($-$67.1 to 187.1)" in latex and "accuracy @4, \\%" in latex


def test_a_failed_run_is_said_in_the_table_and_no_mean_hides_it(place, capsys):
    write_comparison("espo,wd1,wd1:num_masks=2")
    comparison = planned("espo,wd1,wd1:num_masks=2")
    for run in comparison.runs:
        if run.arm is comparison.arms[2] or (run.arm is comparison.arms[1] and run.seed == 1):
            shutil.rmtree(run.path)
            run.beside("json").write_text(json.dumps({"error": "TrainingError: loss is nan"}))
    tree = summarise(comparison, jobs_here(6, None).tree())
    assert has_failed(tree) and report_failures(tree) == 2
    error = capsys.readouterr().err
    assert error.count("failed: ") == 3 and "wd1, seed 1: TrainingError: loss is nan" in error
    text = markdown(tree)
    assert "- wd1, seed 1: failed: TrainingError: loss is nan" in text
    rows = [line.split(" | ") for line in text.splitlines() if line[:4] == "| wd"]
    assert rows[0][1] == "1 of 2, 1 failed" and rows[0][4] == "80.0"  # one seed has no interval
    assert rows[0][5] == "+30.0"  # against the first arm's same seed, 0.5
    assert rows[1][1] == "0 of 2, 2 failed" and set(rows[1][4:-1]) == {"failed"}
    assert tree["arms"][2]["statistics"] == {} and tree["arms"][2]["runs"]["0"]["state"] == "failed"


def test_latex_and_numbers_are_written_plainly():
    assert escape("a_b & 5 % {-1.5} 1e-3") == "a\\_b \\& 5 \\% \\{$-$1.5\\} 1e-3"
    assert [significant(x) for x in (0.0, 0.01234, 1.0, 45.67, 1234.5)] == ["0", "0.0123", "1.00", "45.7", "1,230"]


def test_the_share_of_work_follows_the_batches(place):
    write_comparison()
    run = planned("espo,wd1").runs[0]
    assert share_done(run, 0.5) == 1
    (run.path / "summary.json").unlink()
    assert share_done(run, 0.5) == 0.75  # half of the evaluating is still to come
    rows = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_text("".join(rows[:3]) + rows[3][:9])  # a row is being written
    assert last_row(run.path / "metrics.jsonl")["iteration"] == 1 and share_done(run, 0.0) == 0.5
    (run.path / "metrics.jsonl").unlink()
    assert share_done(run, 0.0) == 0


# ---- end to end


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "unmask", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_arms_and_two_seeds_stopped_and_gone_on_with_equal_one_that_never_stopped(place):
    words = (
        "compare",
        "recipe.toml",
        "--arms",
        "espo,diffu_grpo:num_iterations=2",
        "--seeds",
        "0,1",
        "--budget",
        "160",
    )
    process = start(*words, "--output", "stopped")
    while not list(place.glob("stopped/*/seed*/checkpoints/*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "Go on with: unmask compare recipe.toml --arms" in text
    assert len(list(place.glob("stopped/*/seed*/summary.json"))) < 4
    started = {file: file.stat().st_ino for file in place.glob("stopped/*/seed*/config.toml")}
    assert started

    second = start(*words, "--output", "stopped")
    text, _ = second.communicate(timeout=900)
    assert second.returncode == 0, text
    assert all(file.stat().st_ino == number for file, number in started.items())  # gone on with, not begun anew
    whole = start(*words, "--output", "whole")
    text, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, text
    logs = sorted(file.relative_to(place / "whole") for file in place.glob("whole/*/seed*/*.jsonl"))
    assert len(logs) == 16
    for log in logs:
        if log.name != "timing.jsonl":
            assert (place / "stopped" / log).read_bytes() == (place / "whole" / log).read_bytes(), log
    for run in ("01-espo/seed0", "02-diffu_grpo_num_iterations=2/seed1"):
        assert len(read_rows(place / "whole" / run / "rollouts.jsonl")) == 160
    trees = [json.loads((place / name / "table.json").read_text()) for name in ("stopped", "whole")]
    for a, b in zip(*(tree["arms"] for tree in trees), strict=True):
        for key in ("accuracy@4", "accuracy@2", "reward_std"):
            assert a["statistics"][key] == b["statistics"][key]
        assert a["statistics"]["peak_memory_bytes"]["mean"] > 50 * 2**20
    third = start(*words, "--output", "whole")  # nothing is left to do
    assert third.wait(120) == 0


@pytest.mark.slow
def test_a_broken_arm_fails_alone_and_bases_are_trained_before(place, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cache"))
    (place / "base.toml").write_text(
        "[model.tiny]\nhidden_size = 16\nnum_layers = 2\nnum_heads = 2\nintermediate_size = 32\n"
        '[task]\ntype = "sudoku"\nnum_train = 8\nnum_demonstrations = 8\nnum_validation = 2\nnum_test = 2\n'
        "[trainer]\nnum_batches = 2\n"
    )
    process = start(
        "compare", "recipe.toml", "model.path=none", "model.recipe=base.toml", "--seeds", "0,1", "--budget", "16",
        "--arms", "espo,espo:model.adapter=nowhere", "--output", "out",
    )  # fmt: skip
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 2, text
    assert text.count("training it once") == 2 and len(list(place.glob("cache/base-seed*"))) == 2
    tree = json.loads((place / "out" / "table.json").read_text())
    assert [run["state"] for arm in tree["arms"] for run in arm["runs"].values()] == ["finished"] * 2 + ["failed"] * 2
    assert tree["base"]["statistics"]["accuracy@4"]["count"] == 2
    assert "training it once" not in "".join(file.read_text() for file in place.glob("out/*/seed*.log"))


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    assert again("--dry-run") == 0
    out = capsys.readouterr().out
    assert "espo" in out and "wd1" in out and "hours of a run" in out
    assert sorted(place.rglob("*")) == before


def test_a_legend_of_long_labels_has_few_columns():
    assert legend_columns(["espo", "wd1"]) == 2 and legend_columns(["a"] * 20) == 6
    long = "dga:optimizer.lr=0.0003:energy_lr=0.01:energy_trunk_lr=0.0003"
    assert legend_columns([long] * 15) == 2
    assert legend_columns(["x" * 400] * 3) == 1
