"""The benchmark scripts run, and their checks of equality can fail."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import fake_rollouts, tiny_policy
from unmask.comparison.arms import read_arms
from unmask.models import chunked_head
from unmask.models.cross_entropy import CROSS_ENTROPIES
from unmask.objectives import ALGORITHMS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = {
    "vocab": 97, "width": 16, "layers": 2, "heads": 2, "feed_forward": 24,
    "batch": 2, "prompt": 5, "tokens": 8, "steps": 4, "block": 4,
}  # fmt: skip
CPU = torch.device("cpu")


SHAPE = ["--shape=tiny", "--shape-repeats=1"]
REPORTS = {
    "sampler": (
        ["--reference-steps=3", *SHAPE],
        ["first 3, extrapolated", "float64 noise", "12 of 16 tokens compared", "| 2 | first 2 of 4, extrapolated |"],
    ),
    "scoring": (
        ["--repeats=1", *SHAPE],
        [
            "| full logits |",
            "peak, MiB",
            "gradients by at most",
            "| forward and backward | LoRA, rank 4 | on | chunked |",
        ],
    ),
}


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as its own directory sees it; puts back the number of threads that it sets."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    shared = ("common", "full_size", "sampler", "scoring", "cross_entropy", "claims", "preference_variance", "sandbox")
    for name in shared:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def command(name: str) -> list[str]:
    sizes = [f"--{size.replace('_', '-')}={value}" for size, value in SIZES.items()]
    return [str(BENCHMARKS / f"{name}.py"), *sizes, *REPORTS[name][0]]


# ---- benchmarks


@pytest.mark.parametrize("name", REPORTS)
def test_a_benchmark_prints_its_table(benchmark, monkeypatch, capsys, name):
    script = benchmark(name)
    if name == "scoring":  # a fresh process costs seconds of imports; the slow test below starts it
        problem = script.build_problem(benchmark("common").Geometry(**SIZES), copies=2, seed=0, device=CPU)

        def peak_here(variant: str, *_: object) -> int:
            return 1 + script.peak_bytes(problem, script.VARIANTS[variant])  # may well be 0 at this size

        monkeypatch.setattr(script, "peak_in_fresh_process", peak_here)
    monkeypatch.setattr(sys, "argv", command(name))
    script.main()
    check_report(name, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_a_benchmark_runs_as_a_script(name):
    done = subprocess.run([sys.executable, *command(name)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_report(name, done.stdout)


def check_report(name: str, text: str) -> None:
    for part in ["1 thread(s)", f"`python benchmarks/{name}.py", *REPORTS[name][1]]:
        assert part in text


@pytest.mark.parametrize("name", REPORTS)
def test_without_an_accelerator_the_full_size_is_not_measured(benchmark, monkeypatch, capsys, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark(name).main(["--section=shape"])
    text = capsys.readouterr().out
    assert "not measured (no accelerator)" in text and "llada-8b" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == {"sampler": 3, "scoring": 3 * len(CROSS_ENTROPIES)}[name]
    assert all(row.endswith("| not measured | not measured | not measured | not measured |") for row in rows)


def test_the_full_size_section_uses_every_way_and_checkpoints(benchmark, monkeypatch):
    """The rows differ in what they do, not in their labels alone."""
    scoring = benchmark("scoring")
    monkeypatch.setattr(chunked_head, "CHUNK_NUMBERS", 60)
    used, checkpointed = [], []
    plain = CROSS_ENTROPIES["plain"]
    monkeypatch.setitem(CROSS_ENTROPIES, "plain", lambda *args: used.append("plain") or plain(*args))
    one_pass = scoring.one_pass

    def watched(policy: object, *args: object, has_backward: bool) -> None:
        layers = policy.module.get_base_model().model.layers
        checkpointed.append(any(layer.gradient_checkpointing for layer in layers))
        one_pass(policy, *args, has_backward=has_backward)
        slopes = [p.grad is not None for p in policy.module.parameters() if p.requires_grad]
        assert all(slopes) if has_backward else not any(slopes)

    monkeypatch.setattr(scoring, "one_pass", watched)
    monkeypatch.setattr(scoring, "ways_here", lambda: (["chunked", "plain"], []))
    text = scoring.full_size_report("tiny", seed=0, repeats=1)
    assert used == ["plain"] * 6  # three kinds of pass, a warm-up and a timed run each
    assert checkpointed == [False] * 8 + [True] * 4
    assert "out of memory" not in text and "nan" not in text


@pytest.mark.parametrize("trained", ["all weights", "adapters"])
def test_flops_are_those_that_torch_counts(benchmark, trained):
    """Hand-written formulas against torch's counter of the products that really happen."""
    full_size, scoring = benchmark("full_size"), benchmark("scoring")
    shape = full_size.SHAPES["tiny"]
    policy = full_size.build_policy(shape, CPU, seed=0)
    policy.module.set_attn_implementation("eager")  # the counter does not know every fused attention
    if trained == "adapters":
        config = scoring.LoraConfig(rank=shape.lora_rank)
        policy = scoring.MaskedPolicy(scoring.wrap(policy.module, config, seed=0), tokenizer=None)
    canvas = torch.arange(26).view(2, 13) + 8
    positions = canvas % 2 == 0  # 13 of them
    work = full_size.Work(positions=26, length=13, scored=13)
    with FlopCounterMode(display=False) as forward:
        logp = policy.token_outputs(canvas, None, positions, targets=canvas[positions], want=("logp",)).logp
    with FlopCounterMode(display=False) as backward:
        logp.sum().backward()
    assert forward.get_total_flops() == work.forward(policy.module)
    both, formula = forward.get_total_flops() + backward.get_total_flops(), work.with_backward(policy.module)
    # with a frozen base nothing flows below the first of two layers' adapters: its q, k, v and A products are saved
    assert both == formula if trained == "all weights" else 0.94 * formula < both < formula


def test_a_device_too_small_gives_a_row_without_numbers(benchmark):
    full_size = benchmark("full_size")

    def too_large() -> None:
        raise torch.OutOfMemoryError

    measured = full_size.measure(too_large, CPU, repeats=1)
    assert measured is None and full_size.cells(measured, 1, 1.0, 1.0) == ["out of memory"] * 4
    # 2 s for one of 4 parts: 100 tokens in 8 s; 6 FLOP in the part's 2 s are half of 6 FLOP/s
    known = full_size.cells(full_size.Measured(2.0, 1.25), 100, 6.0, 6.0, scale=4)
    assert known == ["8", "12", "1.2", "50.0%"]


def test_the_cross_entropy_table_has_a_row_for_each_way_and_head(benchmark, capsys):
    script = benchmark("cross_entropy")
    script.main(["--rows=20", "--width=8", "--vocab=97", "--repeats=1"])
    text = capsys.readouterr().out
    for head in ("frozen", "trained"):
        for name in ("chunked", "plain"):
            assert f"| {head} | {name} |" in text


def test_settings_of_the_sampler_are_held_against_the_published_one(benchmark, capsys):
    script = benchmark("sampler")
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    script.main(["--section=settings", "--reference-steps=2", "--batches=1,3", *sizes])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 2 * (1 + len(script.SETTINGS))
    assert rows[0][1:4] == ["published", "first 2, extrapolated", "4"] and rows[0][6:8] == ["1.0", "1.0"]
    by_name = {row[1]: row for row in rows[6:]}
    assert by_name["every step whole"][-1] == "100.0% |" and by_name["dual cache"][3] == "4.0"
    assert float(by_name["threshold 0.9"][3]) <= 8


def test_another_sampler_is_not_mistaken_for_the_published_one(benchmark):
    sampler, geometry = benchmark("sampler"), benchmark("common").Geometry(**SIZES)
    steps = {"greedy_steps": 4, "sampled_steps": 1}
    assert sampler.compare(geometry, device=CPU, **steps).same_tokens == 16

    def with_one_wrong_token(*args: object, **settings: object) -> Tensor:
        ids = sampler.published_sampler(*args, **settings)
        ids[0, -1] += 1
        return ids

    with pytest.raises(AssertionError, match="1 of 16 tokens differ"):
        sampler.compare(geometry, device=CPU, reference=with_one_wrong_token, **steps)


def test_another_loss_is_not_mistaken_for_the_full_logits_one(benchmark):
    scoring, geometry = benchmark("scoring"), benchmark("common").Geometry(**SIZES)
    problem = scoring.build_problem(geometry, copies=2, seed=0, device=CPU)
    result = scoring.compare(problem, repeats=1)
    assert result.gradient_error < 1e-5

    def slightly_off(*args: object) -> Tensor:
        return 1.001 * scoring.full_logits_scores(*args)

    def no_gradient_of_the_head(*args: object) -> Tensor:
        logps = scoring.full_logits_scores(*args)
        return logps + 0.01 * (logps.detach() - logps)  # same value, gradient short of a hundredth

    with pytest.raises(AssertionError, match="losses differ"):
        scoring.compare(problem, repeats=1, reference=slightly_off)
    with pytest.raises(AssertionError, match=r"gradients of .* differ"):
        scoring.compare(problem, repeats=1, reference=no_gradient_of_the_head)


def test_half_masks_score_every_position_once_in_a_pair(benchmark):
    scoring, geometry = benchmark("scoring"), benchmark("common").Geometry(**SIZES)
    masks = scoring.half_masks(scoring.random_rollouts(geometry, seed=0, device=CPU), 4, seed=0)
    assert (masks.scored.sum(-1) == 4).all() and not masks.masked[..., :5].any()
    assert (masks.scored.view(2, 2, 2, 8).sum(2) == 1).all()
    # (L+1)/m over K copies for each of m positions, K copies: L+1 in all
    assert torch.allclose(masks.weight.sum((1, 2)), torch.tensor(9.0).double())


def test_extrapolation_is_by_the_steps_measured(benchmark):
    common = benchmark("common")
    watch = common.Stopwatch(CPU)
    assert watch.time(lambda: 7) == 7 and watch.laps == 1 and watch.total.wall > 0
    assert common.Seconds(2.0, 1.0) * 3 + common.Seconds(1.0, 1.0) == common.Seconds(7.0, 4.0)


# ---- claims


def table_of(script, columns, **settings):
    """A comparison's table with accuracies by seed."""
    accuracy = {label: {"accuracy@16": dict(enumerate(values))} for label, values in columns.items()}
    return script.Table(accuracy, **{"task": "sudoku", "budget": 64, "accuracy": "accuracy@16"} | settings)


def test_a_claim_is_judged_by_the_paired_interval(benchmark):
    script = benchmark("claims")
    better = script.Claim("a beats b", "somewhere", "a", "b")
    no_better = script.Claim("a is no better than b", "somewhere", "a", "b", is_better=False)
    cases = {  # differences over three seeds -> verdicts
        (0.10, 0.11, 0.12): ("reproduced", "not reproduced"),
        (-0.10, -0.11, -0.12): ("not reproduced", "reproduced"),
        (-0.10, 0.00, 0.13): ("inconclusive", "inconclusive"),
        (0.0, 0.001, -0.001): ("inconclusive", "reproduced"),
    }
    for differences, verdicts in cases.items():
        base = (0.2, 0.5, 0.3)  # far more spread than the differences: only pairs can tell
        found = table_of(
            script, {"a:optimizer.lr=0.1": [b + d for b, d in zip(base, differences, strict=True)], "b": base}
        )
        difference = found.difference(better, "accuracy@16")
        assert (better.verdict(difference), no_better.verdict(difference)) == verdicts
    assert (
        better.verdict(table_of(script, {"a": [0.5], "b": [0.1]}).difference(better, "accuracy@16")) == "inconclusive"
    )
    assert better.verdict(None) == "inconclusive"


def test_every_arm_of_the_claims_can_be_built(benchmark, capsys):
    """The commands are those of `unmask compare`, which refuses an arm that no recipe could hold."""
    script = benchmark("claims")
    assert set(script.RATES) == {name for name, kind in ALGORITHMS.items() if kind.strategies[0] != "pairs"}
    for words in (["search"], ["compare"], ["claims"], ["claims", "--task", "sudoku_twice"]):
        assert script.main([*words, "--output", "unused", "--dry-run"]) == 0
        command = capsys.readouterr().out.split()
        assert command[1:4] == ["-m", "unmask", "compare"]
        options = dict(itertools.pairwise(command))
        overrides = [word for word in command[5:] if "=" in word and not word.startswith("--") and ":" not in word]
        arms = read_arms(command[4], overrides, options["--arms"], int(options["--budget"]))
        assert len(arms) >= 10 and all(arm.rollouts == int(options["--budget"]) for arm in arms)


def test_the_claims_are_read_from_a_table_on_disk(benchmark, tmp_path, capsys):
    script = benchmark("claims")
    runs = {arm: {"0": {"values": {"accuracy@16": 0.5 + rise}}, "1": {"values": {"accuracy@16": 0.6 + 1.1 * rise}}}
            for arm, rise in (("embr_u:optimizer.lr=1", 0.2), ("embr_c:optimizer.lr=3", 0.0))}  # fmt: skip
    tree = {"recipe": "recipes/sudoku.toml", "budget": 4096, "accuracies": ["accuracy@16"]}
    tree |= {"arms": [{"label": a, "runs": r} for a, r in runs.items()]}
    (tmp_path / "table.json").write_text(json.dumps(tree))
    assert script.main(["judge", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 1 and "| +21.0 (+8.3 to +33.7) | - | - | 4,096 × 2 | reproduced |" in rows[0]
    search = {"a:optimizer.lr=3e-3": [0.5], "a:optimizer.lr=1e-3": [0.5], "a:optimizer.lr=3e-4:head_lr=0.1": [0.25]}
    more = {"b:optimizer.lr=1e-4": [0.75]}
    rows = script.rates([table_of(script, search), table_of(script, more)]).splitlines()
    assert rows[0] == "| algorithm | 1e-04 | 3e-04 | 1e-03 | 3e-03 |"
    assert rows[2:] == ["| `a` | - | 25.0 | **50.0** | 50.0 |", "| `b` | **75.0** | - | - | - |"]


def test_seeds_and_arms_of_one_task_and_budget_are_judged_together(benchmark):
    script = benchmark("claims")
    some = table_of(script, {"espo": [0.1], "espo:num_iterations=16": [0.2]})
    arms = {"espo": {"accuracy@16": {1: 0.3}}, "espo:num_iterations=16": {"accuracy@16": {1: 0.5}}}
    more = replace(some, columns=arms)
    other = replace(some, task="sudoku_twice", columns={"espo:num_iterations=8": {"accuracy@16": {0: 0.3, 1: 0.3}}})
    rows = script.judge([some, more, other]).splitlines()[2:]
    assert len(rows) == 1 and "| +15.0 (" in rows[0] and "| 64 × 2 |" in rows[0]  # 8 is what the recipe has
    assert [table.task for table in script.pooled([some, more, other])] == ["sudoku", "sudoku_twice"]
    with pytest.raises(SystemExit, match="espo: seed 1 is in two of the directories"):
        script.judge([some, more, more])
    rates = [table_of(script, {f"espo:optimizer.lr={rate}": [0.1]}) for rate in (1, 2)]
    with pytest.raises(SystemExit, match=r"optimizer.lr=2 and espo:optimizer.lr=1: one arm at two rates"):
        script.judge(rates)
    assert "espo" in script.claim_arms("sudoku") and "espo:num_iterations=8" in script.claim_arms("sudoku_twice")


def test_preference_noise_falls_with_shared_masks_and_with_more_of_them(benchmark):
    """The names of the rows are what they do, and without noise there is none to measure."""
    script = benchmark("preference_variance")
    policy, reference = tiny_policy(), tiny_policy()
    with torch.no_grad():
        for weight in policy.module.parameters():  # a policy not far from its reference
            weight.mul_(1.05)
    rollouts = fake_rollouts(num_groups=2, group_size=2)
    own, many_own, shared, many_shared, _ = (
        script.measure(algorithm, policy, reference, rollouts, num_draws=20) for algorithm in script.VARIANTS.values()
    )
    assert own.score_deviation > 3 * shared.score_deviation > 3 * many_shared.score_deviation
    assert min(own.gradient_noise, shared.gradient_noise) > many_shared.gradient_noise > 0
    assert many_own.score_deviation < own.score_deviation
    same = script.measure(script.PLAIN, policy, policy, rollouts, num_draws=2)
    exact = script.VARIANTS["1 mask, shared"]
    assert script.measure(exact, policy, policy, rollouts, num_draws=2).score_deviation == 0 < same.score_deviation


# ---- the sandbox


def test_the_sandbox_benchmark_counts_the_cpu_time_of_all_processes(benchmark):
    module = benchmark("sandbox")
    try:
        pool = module.LocalSandbox(packages=())
    except module.SandboxUnavailable as error:
        pytest.skip(str(error))
    source = "import time\ndef f(x):\n    while time.process_time() < 0.3: pass\n    return [x, x * x]\n"
    program = module.Program(source, module.TESTS, ["f"])
    for asked in (program, module.executed(program)):
        verdicts, wall, cpu = module.measure(pool, [asked] * 2)
        assert [v.status for v in verdicts] == ["correct"] * 2 and wall > 0.5 and 0.6 <= cpu < 2.0
    pool.close()
    assert set(module.EXPECTED) == {*module.SOURCES, "right, imports numpy"}
