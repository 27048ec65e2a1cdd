"""`unmask diagnose`: tables against loops, real draws against exact laws, what the numbers mean, the command."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import unmask
from tests.checkpoints import write_checkpoint
from tests.helpers import fake_rollouts, tiny_policy
from tests.oracles import (
    bits,
    elbo_dp,
    eubo_by_contexts,
    log_likelihood_by_orders,
    make_rollouts,
    order_logp,
)
from tests.test_diagnose_laws import assert_equal, toy_table
from unmask.cli import main
from unmask.diagnosis import laws
from unmask.diagnosis.estimators import Estimator, draw_continuous, draw_order, estimators
from unmask.diagnosis.exact import (
    eubo_limit,
    log_likelihood,
    mean_over_orders,
    read,
    run_model,
    score_table,
    shorten,
    sub_table,
)
from unmask.diagnosis.measure import check, exact, gaps, measure, moments, reward_classes, spearman
from unmask.likelihood import sequence_estimate
from unmask.noise import Noise

NOISE = Noise(5)


# ---- tables


@pytest.mark.parametrize("block_length", [None, 1, 2, 3])
def test_likelihood_and_bounds_equal_the_oracles(block_length):
    table = toy_table(5)
    assert_equal(log_likelihood(table[None], block_length)[0], log_likelihood_by_orders(table, block_length))
    assert_equal(mean_over_orders(table[None], block_length)[0, -1], elbo_dp(table, block_length))
    for gamma in (1.0, 1.5, 5.0):
        assert_equal(eubo_limit(table[None], gamma)[0], eubo_by_contexts(table, gamma))


def test_a_table_of_all_tokens_gives_the_public_likelihood():
    policy = tiny_policy()
    ids, mask = policy.encode_prompts(["12|", "3|"], 4)  # the second row is padded
    completions = policy.encode_completions(["9304", "1122"], 4)
    rows = shorten(make_rollouts(completions, groups=[0, 1], prompt=ids, prompt_mask=mask), 4, noise=NOISE)
    told: list[int] = []
    table = score_table(policy, rows, micro_batch_size=7, on_row=told.append)
    assert told == [1, 1] and rows.position.tolist() == [[0, 1, 2, 3]] * 2
    for row, (prompt, completion) in enumerate((("12|", "9304"), ("3|", "1122"))):
        assert_equal(log_likelihood(table)[row], unmask.log_likelihood(policy, prompt, completion))


def test_positions_that_are_not_open_stay_shown():
    policy = tiny_policy()
    rollouts = fake_rollouts(length=6)
    rows = shorten(rollouts, 3, noise=NOISE)
    table = score_table(policy, rows, micro_batch_size=256, on_row=lambda n: None)
    for row, state in itertools.product((0, 5, 11), range(1, 8)):
        canvas = torch.cat([rollouts.prompt_ids[row], rollouts.completion_ids[row]])
        hidden = [int(rows.position[row, i]) for i in bits(state)]
        truth = canvas[-6:].clone()
        canvas[[i - 6 for i in hidden]] = policy.mask_token_id
        keep = torch.cat([rollouts.prompt_mask[row], torch.ones(6, dtype=torch.bool)])
        logits = policy.module(canvas[keep][None]).logits[0, -6:].detach()
        logits[:, policy.mask_token_id] = -math.inf
        expected = torch.zeros(3, dtype=torch.float64)
        for i in bits(state):
            place = int(rows.position[row, i])
            expected[i] = logits[place].log_softmax(-1)[truth[place]]
        assert torch.allclose(table[row, state], expected, atol=1e-10, rtol=0)


def test_open_positions_are_uniform_before_the_stop_token_and_keyed_by_row():
    rollouts = replace(fake_rollouts(num_groups=400, length=6), length=torch.full((1600,), 5))
    rows = shorten(rollouts, 2, noise=NOISE)
    pairs = {tuple(pair): 0 for pair in itertools.combinations(range(5), 2)}
    for pair in rows.position.tolist():
        pairs[tuple(pair)] += 1  # a KeyError would be the position behind the stop token
    # 160 expected; five standard deviations of a binomial of 1600 draws at 1/10 are 60
    assert all(abs(count - 160) < 60 for count in pairs.values())
    assert sorted(rows.turn[0].tolist()) == [0, 1]
    assert torch.equal(rows.rollouts.completion_ids, rollouts.completion_ids.gather(1, rows.position))
    few = shorten(replace(rollouts, length=torch.ones(1600, dtype=torch.int64)), 3, noise=NOISE)
    assert (few.position[:, 0] == 0).all() and set(few.position[:, 1:].flatten().tolist()) == {1, 2, 3, 4, 5}


def test_what_the_model_answers_to_drawn_copies_stands_in_the_table():
    policy = tiny_policy()
    rows = shorten(fake_rollouts(length=6), 4, noise=NOISE)
    table = score_table(policy, rows, micro_batch_size=256, on_row=lambda n: None)
    for entry in estimators(4, (1.5,), 4):
        if not entry.hides_prompt:
            copies = entry.draw(rows.rollouts, noise=NOISE)
            reads = run_model(policy, rows, copies, micro_batch_size=64)
            assert copies.num_masks == entry.forwards
            assert (copies.scored <= copies.masked[..., -4:]).all()
            assert torch.allclose(read(table, copies), reads, atol=1e-10, rtol=0), entry.name


def test_copies_with_a_hidden_prompt_are_run_by_the_model():
    policy = tiny_policy()
    rows = shorten(fake_rollouts(length=6), 4, noise=NOISE)
    (entry,) = (e for e in estimators(4, (), 4) if e.name == "mean field, prompt hidden")
    copies = entry.draw(rows.rollouts, noise=NOISE)
    row = int(copies.masked[:, 0, :4].any(1).nonzero()[0])  # a row whose prompt is hidden in part
    canvas = torch.cat([rows.whole.prompt_ids[row], rows.whole.completion_ids[row]])
    hidden = copies.masked[row, 0, :4].nonzero()[:, 0].tolist() + [4 + i for i in rows.position[row].tolist()]
    canvas[hidden] = policy.mask_token_id
    keep = torch.cat([rows.whole.prompt_mask[row], torch.ones(6, dtype=torch.bool)])
    logits = policy.module(canvas[keep][None]).logits[0, -6:].detach()
    logits[:, policy.mask_token_id] = -math.inf
    expected = logits.log_softmax(-1)[rows.position[row], rows.rollouts.completion_ids[row]]
    assert torch.allclose(run_model(policy, rows, copies, micro_batch_size=64)[row, 0], expected, atol=1e-10, rtol=0)


def test_shorter_completions_show_the_tokens_that_left():
    policy = tiny_policy()
    rows = shorten(fake_rollouts(length=6), 4, noise=NOISE)
    table = score_table(policy, rows, micro_batch_size=256, on_row=lambda n: None)
    shorter = shorten(fake_rollouts(length=6), 2, noise=NOISE)  # the same noise: the first two of the same order
    expected = score_table(policy, shorter, micro_batch_size=256, on_row=lambda n: None)
    assert torch.allclose(sub_table(table, rows.turn, 2), expected, atol=1e-10, rtol=0)
    assert torch.equal(sub_table(table, rows.turn, 4), table)


# ---- real draws against laws


def repeated_rows(length: int, num_rows: int) -> tuple[Tensor, object]:
    """One completion in many rows that draw differently: (table (B, 2^L, L), rollouts)."""
    completion = (torch.arange(length) % 3).repeat(num_rows, 1)
    return toy_table(length).expand(num_rows, -1, -1), make_rollouts(completion)


WITH_LAW = [entry for entry in estimators(5, (), 4) if entry.law]


@pytest.mark.parametrize("entry", WITH_LAW, ids=[entry.name for entry in WITH_LAW])
def test_real_draws_follow_the_law(entry: Estimator):
    table, rollouts = repeated_rows(5, 500)
    values = []
    for number in range(40):
        copies = entry.draw(rollouts, noise=NOISE.stream(str(number)))
        values.append(entry.estimate(read(table, copies), copies))
    drawn = torch.stack(values)  # (40, 500)
    found = check(drawn, entry.law(table))
    # Student's t with 39 degrees of freedom exceeds 5 once in 80,000 times
    assert abs(found["z"]) < 5, found
    # 20,000 draws tell a variance to a few per cent; ratios t below 0.01 and batch-wide t make it worse
    loose = 0.4 if entry.name in ("continuous", "coupled tokens") else 0.1
    assert found["variance_ratio"] == pytest.approx(1, abs=loose)


def test_a_wrong_law_is_found_out():
    """The check above can fail: a weight of L/m in place of (L+1)/m is many standard errors off."""
    table, rollouts = repeated_rows(5, 500)
    (entry,) = (e for e in WITH_LAW if e.name == "coupled x2")
    copies = [entry.draw(rollouts, noise=NOISE.stream(str(d))) for d in range(40)]
    values = torch.stack([sequence_estimate(read(table, c), c) * 5 / 6 for c in copies])
    assert abs(check(values, entry.law(table))["z"]) > 20


def test_an_order_reads_its_own_steps():
    table, rollouts = repeated_rows(4, 30)
    copies = draw_order(rollouts, noise=NOISE)
    for row in range(30):
        order = tuple(copies.scored[row].int().argmax(1).tolist())
        assert sorted(order) == [0, 1, 2, 3]
        assert_equal(sequence_estimate(read(table, copies), copies)[row], order_logp(table[row], order))
    assert len({tuple(r.flatten().tolist()) for r in copies.scored}) > 10


def test_continuous_draws_do_not_depend_on_the_batch():
    rollouts = fake_rollouts(length=5)
    whole = draw_continuous(rollouts, 3, min_mask_ratio=1e-3, noise=NOISE)
    part = draw_continuous(unmask.types.take_rows(rollouts, slice(4, 6)), 3, min_mask_ratio=1e-3, noise=NOISE)
    assert torch.equal(whole.weight[4:6], part.weight) and torch.equal(whole.masked[4:6], part.masked)
    assert float(whole.weight.max()) <= 1000 / 3 and (whole.weight[whole.scored] >= 1 / 3).all()


# ---- what the numbers mean


def test_coupling_removes_all_spread_where_the_level_alone_decides():
    """Log-probabilities that fall linearly with the number of masked tokens: coupled pairs have no variance left."""
    L = 6
    size = torch.tensor([len(bits(S)) for S in range(2**L)], dtype=torch.float64)
    inside = torch.tensor([[bool(S >> i & 1) for i in range(L)] for S in range(2**L)])
    table = (-0.3 * size[:, None] * inside)[None]
    assert float(laws.uniform_count(table, num_masks=2, coupled=True).variance) < 1e-20
    assert float(laws.uniform_count(table, num_masks=1, coupled=False).variance) > 1
    assert float(laws.trajectory(table).variance) < 1e-20


def test_bounds_are_tight_where_all_conditionals_come_from_one_joint():
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand((2,) * 4, generator=generator, dtype=torch.float64)
    joint /= joint.sum()
    completion = (0, 1, 1, 0)
    table = torch.zeros(16, 4, dtype=torch.float64)
    for S in range(1, 16):
        given = tuple(slice(None) if S >> i & 1 else completion[i] for i in range(4))
        for i in bits(S):
            inside = tuple(completion[j] if j == i or not S >> j & 1 else slice(None) for j in range(4))
            table[S, i] = (joint[inside].sum() / joint[given].sum()).log()
    rows = gaps(table[None], torch.arange(4)[None], (1.0, 4.0))
    assert_equal(rows[-1]["log_p"][0], joint[completion].log())
    for row in rows:
        assert_equal(row["elbo_gap"][0], 0)
        assert row["eubo"]["1"][0] >= -1e-12 and row["eubo"]["4"][0] >= row["eubo"]["1"][0]


def test_the_published_upper_bound_may_lie_below_the_likelihood():
    """L = 2: 0.1 and 0.9 alone, the other way round once the other token is shown: p = 0.41, exp EUBO = 0.25."""
    table = torch.tensor([[0.0, 0.0], [0.9, 0.0], [0.0, 0.1], [0.1, 0.9]], dtype=torch.float64)
    table = torch.where(table > 0, table.log(), table)[None]
    (row,) = gaps(table, torch.tensor([[0, 1]]), (1.0, 2.0))
    assert_equal(row["log_p"][0].exp(), 0.41)
    assert_equal((row["eubo"]["1"] + row["log_p"])[0].exp(), 0.25)
    assert_equal(row["eubo"]["2"][0], 0)
    assert_equal(row["elbo_gap"][0], math.log(0.41) - (math.log(0.1 * 0.1) + math.log(0.9 * 0.9)) / 2)
    assert_equal(row["mean_field"][0], math.log(0.1 * 0.9) - math.log(0.41))


def test_rows_of_numbers_say_what_they_are_named_for():
    policy, reference = (exact(torch.stack([toy_table(4, seed), toy_table(4, seed + 1)])) for seed in (0, 10))
    rollouts = make_rollouts(torch.arange(4).repeat(2, 1) % 3)
    for entry in estimators(4, (1.5,), 4):
        if entry.hides_prompt:
            continue
        values = []
        for number in range(5):
            copies = entry.draw(rollouts, noise=NOISE.stream(str(number)))
            values.append(torch.stack([entry.estimate(read(m.table, copies), copies) for m in (policy, reference)]))
        drawn = torch.stack(values)
        row = measure(entry, drawn, policy, reference, budget=8)
        law = entry.law(policy.table) if entry.law else moments(drawn[:, 0])
        apart = entry.law(policy.table - reference.table) if entry.law else moments(drawn[:, 0] - drawn[:, 1])
        assert row["moments"] == ("exact" if entry.law else "draws")
        assert_equal(row["bias"], law.mean.mean() - policy.log_p.mean())
        assert_equal(row["bias_elbo"], law.mean.mean() - policy.elbo.mean())
        assert_equal(row["sd"], law.variance.mean().clamp(min=0).sqrt())
        assert_equal(row["sd_equal_cost"], row["sd"] * math.sqrt(entry.forwards / 8))
        log_ratio = (policy.log_p - reference.log_p).mean()
        assert_equal(row["difference"]["bias"], apart.mean.mean() - log_ratio)
        assert_equal(row["difference"]["sd"], apart.variance.mean().clamp(min=0).sqrt())
        same = measure(entry, drawn[:, [0, 0]], policy, policy, budget=8)["difference"]
        assert same["sd"] == same["mean"] == 0


def test_ranks_share_ties_and_rewards_fall_into_classes():
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5, squares 4.5 and 5
    assert_equal(spearman(torch.tensor([1.0, 2, 2, 5]), torch.tensor([-4.0, 0, 1, 9])), 4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(torch.ones(3), torch.arange(3.0)))
    few = reward_classes(torch.tensor([0.5, 1.0, 0.5]))
    assert [(label, rows.tolist()) for label, rows in few] == [
        ("0.5", [True, False, True]),
        ("1", [False, True, False]),
    ]
    many = reward_classes(torch.arange(12.0))
    assert [label for label, _ in many] == ["0 to 2", "3 to 5", "6 to 8", "9 to 11"]
    assert sum(rows.int() for _, rows in many).tolist() == [1] * 12


# ---- the command

SMALL = ["--num-prompts", "3", "--group-size", "2", "--length", "3", "--draws", "3", "--model-draws", "2", "num_test=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models of one kind, and two that do not fit them."""
    folder = tmp_path_factory.mktemp("diagnose")
    tiny_policy(dtype=torch.float32).save(folder / "model")
    tiny_policy(seed=1, dtype=torch.float32).save(folder / "other")
    write_checkpoint("llada", folder / "llada")
    write_checkpoint("sdar", folder / "sdar")
    return folder


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)


def run(*args: object) -> None:
    assert main(["diagnose", *map(str, args)]) == 0


def test_the_command_writes_tables_and_repeats_itself(tmp_path, capsys):
    options = ["model", "--task", "sudoku", "--reference", "other", "--quiet", "--no-figure", *SMALL]
    run(*options, "--output", tmp_path / "a")
    shown = capsys.readouterr().out
    assert "Estimates of log p" in shown and "coupled x4" in shown and "trajectory" in shown
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["diagnose.json", "diagnose.md"]
    found = json.loads((tmp_path / "a" / "diagnose.json").read_text(), parse_constant=pytest.fail)
    assert [row["name"] for row in found["estimators"]] == [e.name for e in estimators(3, (1.0, 1.5, 2.0), 4)]
    rows = {row["name"]: row for row in found["estimators"]}
    assert rows["EUBO 1 x4"]["sd"] > 0 and rows["block x2, prompt hidden"]["sd"] > 0  # draws differ from one another
    assert rows["uniform count x1"]["draws"]["variance_ratio"] > 0
    assert len(found["completions"]) == 6 and [row["length"] for row in found["gap_by_length"]] == [2, 3]
    first = found["completions"][0]
    assert first["elbo"] <= first["log_p"] <= 0 and len(first["open_positions"]) == 3
    means = found["exact"]
    assert means["elbo_gap"]["mean"] == pytest.approx(means["log_p"]["mean"] - means["elbo"]["mean"])
    assert sum(row["completions"] for row in found["gap_by_reward"]) == 6
    text = (tmp_path / "a" / "diagnose.md").read_text()
    assert text.count("\n## ") == 4 and "nan" not in text
    run(*options, "--output", tmp_path / "b", "--batch-size", "5")
    again = json.loads((tmp_path / "b" / "diagnose.json").read_text())
    assert [c["completion"] for c in again["completions"]] == [c["completion"] for c in found["completions"]]
    for one, two in zip(found["estimators"], again["estimators"], strict=True):
        assert two["mean"] == pytest.approx(one["mean"], abs=1e-4)  # float32 sums of another batch shape


def test_the_figure_is_drawn(tmp_path):
    run("model", "--task", "sudoku", "--quiet", *SMALL, "--output", tmp_path / "a")
    image = (tmp_path / "a" / "diagnose.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000  # an empty canvas of this size has 5,000 bytes


def test_other_families_are_diagnosed_with_the_length_they_are_given(capsys):
    options = ["--task", "sudoku", "prompt=raw", "--gen-length", "5", *SMALL, "--model-draws", "0"]
    run("llada", *options, "--quiet", "--sampler", "low_confidence", "--num-steps", "5")
    out = capsys.readouterr().out
    assert "prompt hidden" not in out and "log-ratio" not in out and "low_confidence" in out


BAD = {
    "too long": (["model", "--length", "13"], "length = 13"),
    "too short": (["model", "--length", "1"], "length = 1"),
    "longer than completions": (["model", "--length", "6", "--gen-length", "5"], "completions have 5 tokens"),
    "odd budget": (["model", "--budget", "3"], "budget = 3"),
    "one prompt": (["model", "--num-prompts", "1"], "num_prompts = 1"),
    "one draw": (["model", "--draws", "1"], "num_draws = 1"),
    "one model draw": (["model", "--model-draws", "1"], "num_model_draws = 1"),
    "small exponent": (["model", "--gamma", "0.5"], "gamma = 0.5"),
    "no exponent": (["model", "--gamma", "a"], "--gamma a"),
    "full folder": (["model", "--output", "other"], "exists and is not empty"),
    "missing model": (["nowhere"], "nowhere: no config.json there"),
    "missing reference": (["model", "--reference", "nowhere"], "nowhere: no config.json there"),
    "other vocabulary": (["model", "--reference", "llada"], "another vocabulary"),
    "block-causal": (["sdar", "prompt=raw", "--gen-length", "16"], "block-causal (blocks of 4 tokens)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(name, place, capsys):
    args, message = BAD[name]
    args = args if "--output" in args else [*args, "--output", "out"]
    before = sorted(place.rglob("*"))
    assert main(["diagnose", args[0], "--task", "sudoku", "num_test=4", *args[1:], "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
    assert sorted(place.rglob("*")) == before
