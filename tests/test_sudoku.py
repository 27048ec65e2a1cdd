"""4x4 Sudoku: grids, generated puzzles, the column-blind teacher, published files, and the judge of answers."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.errors import ConfigError, DataError
from unmask.noise import Noise
from unmask.tasks import TASKS
from unmask.tasks.common import SPLITS
from unmask.tasks.sudoku import Sudoku, parse_answer
from unmask.tasks.sudoku_files import read_puzzles, scored_puzzles
from unmask.tasks.sudoku_grids import (
    GENERATOR_VERSION,
    MAX_BLANKS,
    all_grids,
    column_blind_grids,
    column_blind_solutions,
    completions,
    from_text,
    generate_puzzles,
    split_grids,
    to_text,
)
from unmask.types import Example, Status

# First row of d1's file: blanks at cells 2, 5, 6, 7, 8, 11, 12, 15; one solution.
PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
EXAMPLE = Example(0, PUZZLE + "|", {"puzzle": PUZZLE, "solution": SOLUTION, "seen_grid": False})

# The grid 1234/3412/2143/4321 has 1 and 3 at the corners of a rectangle in rows 1-2, columns 1 and 3, with each pair
# one above the other in one box. Swapping 1 and 3 there keeps all rows, columns and boxes: exactly two solutions.
TWO_WAYS, FIRST_WAY, SECOND_WAY = "0204040221434321", "1234341221434321", "3214143221434321"


def units(cells: str) -> dict[str, list[str]]:
    """Rows, columns and boxes of a grid, written out again so as not to trust the code under test."""
    rows = [cells[i : i + 4] for i in (0, 4, 8, 12)]
    return {
        "rows": rows,
        "columns": ["".join(row[c] for row in rows) for c in range(4)],
        "boxes": [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)],
    }


def is_right(cells: str, *kinds: str) -> bool:
    return all(sorted(unit) == ["1", "2", "3", "4"] for kind in kinds for unit in units(cells)[kind])


def keeps(puzzle: str, cells: str) -> bool:
    return all(p in ("0", c) for p, c in zip(puzzle, cells, strict=True))


def count_solutions(puzzle: str) -> int:
    """By depth-first search, a second way to count."""
    cell = puzzle.find("0")
    if cell < 0:
        return int(is_right(puzzle, "rows", "columns", "boxes"))
    row, column = divmod(cell, 4)
    seen = {(i // 4, i % 4, i // 8, i % 4 // 2): digit for i, digit in enumerate(puzzle)}
    peers = {d for (r, c, *box), d in seen.items() if r == row or c == column or box == [row // 2, column // 2]}
    return sum(count_solutions(puzzle[:cell] + d + puzzle[cell + 1 :]) for d in "1234" if d not in peers)


def test_there_are_288_grids_and_all_are_right():
    texts = to_text(all_grids())
    assert len(texts) == len(set(texts)) == 288
    assert all(is_right(t, "rows", "columns", "boxes") for t in texts)


def test_there_are_9216_column_blind_grids_and_288_of_them_have_right_columns():
    # A band: 24 first rows; below each pair of cells of a box the other two digits in 2 orders: 24 * 2 * 2 = 96. 96^2.
    texts = to_text(column_blind_grids())
    assert len(texts) == len(set(texts)) == 9216
    assert all(is_right(t, "rows", "boxes") for t in texts)
    assert {t for t in texts if is_right(t, "columns")} == set(to_text(all_grids()))


def test_text_and_tensor_are_inverse():
    assert to_text(from_text([PUZZLE, SOLUTION])) == [PUZZLE, SOLUTION]
    assert from_text([PUZZLE])[0].tolist() == [3, 1, 0, 2, 2, 0, 0, 0, 0, 2, 1, 0, 0, 3, 2, 0]
    assert from_text([]).shape == (0, 16)


def test_completions_are_the_grids_that_keep_the_givens():
    puzzles = [PUZZLE, TWO_WAYS, "0" * 16, "1000000000000001", "1100000000000000"]
    found = completions(from_text(puzzles))
    for puzzle, row in zip(puzzles, found, strict=True):
        assert row.tolist() == [keeps(puzzle, grid) for grid in to_text(all_grids())]
    assert found.sum(1).tolist()[:3] == [1, 2, 288] and int(found[4].sum()) == 0
    assert {to_text(all_grids())[i] for i in found[1].nonzero()[:, 0]} == {FIRST_WAY, SECOND_WAY}


def test_no_puzzle_with_three_givens_is_unique_but_some_with_four_are():
    # Renaming the digits keeps the number of solutions, so the 12 grids with first row 1234 stand for all 288.
    grids = from_text([t for t in to_text(all_grids()) if t.startswith("1234")])
    assert len(grids) == 12
    for num_givens, is_possible in ((16 - MAX_BLANKS - 1, False), (16 - MAX_BLANKS, True)):
        cells = torch.combinations(torch.arange(16), num_givens)
        given = torch.zeros(len(cells), 16, dtype=torch.bool).scatter_(1, cells, True)
        puzzles = (grids[:, None] * given).flatten(0, 1)
        assert bool((completions(puzzles).sum(1) == 1).any()) == is_possible


def test_split_is_pinned():
    # A changed digest means other training data for every recipe: raise GENERATOR_VERSION and re-measure.
    texts = ["".join(to_text(split_grids(s))) for s in SPLITS]
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    assert GENERATOR_VERSION == 1
    assert digests == ["c125c9db9b2cb48b", "68b515ecb99e40b4", "64b34873993e9986"]


def test_split_has_200_40_and_48_grids_without_overlap():
    parts = [set(to_text(split_grids(s))) for s in SPLITS]
    assert [len(p) for p in parts] == [200, 40, 48]
    assert set.union(*parts) == set(to_text(all_grids()))  # 200 + 40 + 48 = 288, so the parts are disjoint


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown split 'dev'.*train, validation, test"):
        split_grids("dev")
    with pytest.raises(ConfigError, match="unknown split 'dev'"):
        Sudoku().examples("dev")


def test_generated_puzzles_are_pinned():
    puzzles, _ = generate_puzzles("train", 100, 8, 0)
    assert hashlib.sha256("".join(to_text(puzzles)).encode()).hexdigest()[:16] == "1da134ec78cd40fd"


@pytest.mark.parametrize(("split", "num_blanks"), [("train", 8), ("validation", 4), ("test", 11)])
def test_generated_puzzles_are_distinct_unique_and_of_their_split(split: str, num_blanks: int):
    puzzles, solutions = (to_text(x) for x in generate_puzzles(split, 300, num_blanks, seed=3))
    assert len(set(puzzles)) == 300
    assert all(p.count("0") == num_blanks and keeps(p, s) for p, s in zip(puzzles, solutions, strict=True))
    assert set(solutions) <= set(to_text(split_grids(split)))
    assert [count_solutions(p) for p in puzzles[:60]] == [1] * 60


def test_generated_puzzles_depend_on_seed_and_split_only():
    first, _ = generate_puzzles("train", 400, 8, seed=5)
    assert torch.equal(generate_puzzles("train", 50, 8, seed=5)[0], first[:50])  # a smaller count is a prefix
    assert not torch.equal(generate_puzzles("train", 400, 8, seed=6)[0], first)
    dropped = set(to_text(first[:100]))
    rest, _ = generate_puzzles("train", 300, 8, seed=5, exclude=dropped)
    assert torch.equal(rest, first[100:])


def test_all_grids_and_cells_are_used_evenly():
    puzzles, solutions = generate_puzzles("train", 10_000, 8, seed=0)
    per_grid = Counter(to_text(solutions))
    # About 50 puzzles a grid, sd 7; two classes of grids differ a little in their share of unique puzzles.
    assert len(per_grid) == 200 and min(per_grid.values()) >= 20 and max(per_grid.values()) <= 90
    share_blank = (puzzles == 0).double().mean(0)
    assert torch.all((share_blank - 0.5).abs() < 0.025)  # 5 sd of a share of 10,000; all cells are alike by symmetry


def test_puzzles_may_be_ambiguous_on_request_and_are_still_distinct():
    puzzles, solutions = generate_puzzles("test", 1_000, 14, seed=0, unique=False)
    assert len(set(to_text(puzzles))) == 1_000
    assert int(completions(puzzles).sum(1).min()) > 1  # two givens never determine a grid
    assert all(keeps(p, s) for p, s in zip(to_text(puzzles), to_text(solutions), strict=True))


def test_too_many_puzzles_are_refused_with_the_number_there_is():
    # One blank: its cell is determined by its row, so all 48 * 16 = 768 puzzles are unique.
    assert len(generate_puzzles("test", 768, 1, seed=0)[0]) == 768
    with pytest.raises(ConfigError, match=r"769 test puzzles with 1 blanks.*leave only 768"):
        generate_puzzles("test", 769, 1, seed=0)


def test_column_blind_answers_keep_givens_rows_and_boxes():
    puzzles, _ = generate_puzzles("train", 500, 8, seed=1)
    answers = to_text(column_blind_solutions(puzzles, torch.arange(500), Noise(0)))
    assert all(is_right(a, "rows", "boxes") for a in answers)
    assert all(keeps(p, a) for p, a in zip(to_text(puzzles), answers, strict=True))


def test_column_blind_draws_are_uniform_over_the_enumerated_grids():
    # Upper band 12../.4..: 3 and 4 behind 12 in 2 orders, then 3 before 4, and 1 and 2 behind in 2 orders: 4 ways.
    # Lower band .2.4/.4.2: 1 and 3 in the left box in 2 orders, which fixes the right box: 2 ways. 8 in all.
    puzzle = "1200040002040402"
    possible = [t for t in to_text(column_blind_grids()) if keeps(puzzle, t)]
    num_draws = 20_000
    draws = column_blind_solutions(from_text([puzzle] * num_draws), torch.arange(num_draws), Noise(7))
    counts = Counter(to_text(draws))
    assert set(counts) == set(possible) and len(possible) == 8
    expected, freedom = num_draws / len(possible), len(possible) - 1
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and sd of the law: freedom, sqrt(2 freedom)


def test_column_blind_draw_belongs_to_its_id():
    puzzles, _ = generate_puzzles("train", 64, 8, seed=1)
    ids = torch.arange(64) + 1000
    whole = column_blind_solutions(puzzles, ids, Noise(0))
    order = torch.arange(63, -1, -1)
    assert torch.equal(column_blind_solutions(puzzles[order], ids[order], Noise(0)), whole[order])
    assert not torch.equal(column_blind_solutions(puzzles, ids + 1, Noise(0)), whole)


def test_column_blind_refuses_givens_that_break_a_row():
    with pytest.raises(DataError, match=r"1100000000000000.*repeat a digit in a row or box"):
        column_blind_solutions(from_text([PUZZLE, "1100000000000000"]), torch.arange(2), Noise(0))


def test_column_blind_demonstrations_are_right_in_28_percent():
    task = Sudoku()
    pairs = task.demonstrations()
    assert len(pairs) == 8_000
    right = sum(task.score(example, text).status is Status.CORRECT for example, text in pairs) / 8_000
    # The prototype counted 28.3 %; one sd is 0.5 points.
    assert abs(right - 0.283) < 0.015


@pytest.mark.parametrize("prompt", ["raw", "d1", "espo", "dream", "Puzzle {puzzle}, give <answer>"])
def test_exact_demonstrations_solve_their_puzzles_in_every_form(prompt: str):
    task = Sudoku(prompt=prompt, teacher="exact", num_test=40, num_demonstrations=20)
    pairs = task.demonstrations("test")
    assert [example for example, _ in pairs] == task.examples("test")[:20]
    assert all(task.score(example, text).facts["match_accuracy"] == 1.0 for example, text in pairs)


def test_examples_have_stable_ids_that_no_split_shares():
    task = Sudoku(num_train=300, num_validation=30, num_test=40)
    by_split = {s: task.examples(s) for s in SPLITS}
    assert [len(v) for v in by_split.values()] == [300, 30, 40]
    assert [e.id for e in by_split["train"]] == list(range(300))
    assert len({e.id for v in by_split.values() for e in v}) == 370
    assert [{e.columns["seen_grid"] for e in v} for v in by_split.values()] == [{True}, {False}, {False}]
    assert task.examples("train") == by_split["train"]
    assert [task.stratum(by_split[s][0]) for s in SPLITS] == ["seen_grids", "unseen_grids", "unseen_grids"]
    assert [Sudoku(data="a.csv").source(s) for s in SPLITS] == ["generated:train", "generated:validation", "a.csv"]


def test_raw_prompt_of_the_registered_task_is_sixteen_cells_and_a_separator():
    task = TASKS["sudoku"](num_test=1)
    example = task.examples("test")[0]
    assert example.prompt == example.columns["puzzle"] + "|"
    assert (task.gen_length, task.num_steps) == (16, 16)


def test_chat_prompts_are_messages_that_hold_the_puzzle():
    for name in ("d1", "espo"):
        task = Sudoku(prompt=name, num_test=1)
        example = task.examples("test")[0]
        (message,) = example.prompt
        assert message["role"] == "user"
        assert message["content"].endswith(f"olve the following Sudoku puzzle: {example.columns['puzzle']}")
        assert ("Example" in message["content"]) == (name == "espo")
        assert task.gen_length is None and task.num_steps is None


def test_dream_prompt_shows_four_lines_and_a_template_may_hold_other_braces():
    example = Sudoku(prompt="dream", num_test=1).examples("test")[0]
    assert [m["role"] for m in example.prompt] == ["system", "user"]
    p = example.columns["puzzle"]
    assert example.prompt[1]["content"].endswith(f"\n\nInput:\n{p[:4]}\n{p[4:8]}\n{p[8:12]}\n{p[12:]}\nOutput:")
    example = Sudoku(prompt="{x} {puzzle} =", num_test=1).examples("test")[0]
    assert example.prompt == "{x} " + example.columns["puzzle"] + " ="


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "ras"}, r"task.prompt = 'ras' is not known. Known: raw, d1, espo, spg, dream.*Did you mean 'raw'"),
        ({"reward": "cell"}, r"Known: cells, solved. Did you mean 'cells'"),
        ({"parser": "loose"}, r"Known: strict, d1"),
        ({"teacher": "column-blind"}, r"Did you mean 'column_blind'"),
        ({"num_blanks": 0}, r"task.num_blanks = 0: 1 to 12"),
        ({"num_blanks": 13}, r"task.num_blanks = 13"),
        ({"num_test": 0}, r"task.num_test = 0"),
        ({"exclude": "d1.csv"}, r"task.exclude = 'd1.csv': a list"),
    ],
)
def test_wrong_fields_are_refused_while_building(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Sudoku(**fields)


@pytest.mark.parametrize(
    ("answer", "status", "accuracy", "match", "cell"),
    [
        (SOLUTION, Status.CORRECT, 1, 1, 1),
        (f" {SOLUTION}\n", Status.CORRECT, 1, 1, 1),
        ("4" + SOLUTION[1:], Status.WRONG, 0, 1, 1),  # a miscopied given, all blanks right
        ("3132244142131324", Status.WRONG, 0, 0, 0.75),  # cells 2 and 6 of the 8 blanks exchanged
        (SOLUTION[:15] + "3", Status.WRONG, 0, 0, 0.875),  # cell 15 wrong
        ("0" * 16, Status.WRONG, 0, 0, 0),
        ("9" * 16, Status.WRONG, 0, 0, 0),
        (FIRST_WAY, Status.WRONG, 0, 0, 0.25),  # a legal grid, other givens; right in blanks 5 (4) and 11 (3)
        (SOLUTION + "4", Status.UNPARSED, 0, 0, 0),  # 17 digits
        (SOLUTION[:15], Status.UNPARSED, 0, 0, 0),
        ("３" + SOLUTION[1:], Status.UNPARSED, 0, 0, 0),  # a full-width three
        ("³" + SOLUTION[1:], Status.UNPARSED, 0, 0, 0),
        (f"<answer>{SOLUTION}</answer>", Status.UNPARSED, 0, 0, 0),
        (f"{SOLUTION[:8]} {SOLUTION[8:]}", Status.UNPARSED, 0, 0, 0),
        ("", Status.UNPARSED, 0, 0, 0),
        (" \n", Status.UNPARSED, 0, 0, 0),
    ],
)
def test_verdicts_on_raw_answers(answer: str, status: Status, accuracy: float, match: float, cell: float):
    expected = {"accuracy": accuracy, "match_accuracy": match, "cell_accuracy": cell}
    cells, solved = Sudoku().score(EXAMPLE, answer), Sudoku(reward="solved").score(EXAMPLE, answer)
    assert cells.status is solved.status is status
    assert dict(cells.facts) == dict(solved.facts) == expected
    assert (cells.value, solved.value) == (cell, accuracy)


def test_another_solution_of_an_ambiguous_puzzle_is_right_but_does_not_match():
    example = Example(0, "", {"puzzle": TWO_WAYS, "solution": FIRST_WAY})
    score = Sudoku().score(example, SECOND_WAY)
    assert score.status is Status.CORRECT
    assert dict(score.facts) == {"accuracy": 1.0, "match_accuracy": 0.0, "cell_accuracy": 0.0}
    assert score.value == 0.0 and Sudoku(reward="solved").score(example, SECOND_WAY).value == 1.0


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        (f"<reasoning>x</reasoning>\n<answer>\n{SOLUTION}\n</answer>", SOLUTION, SOLUTION),
        (f"<answer>1</answer> no: <answer>{SOLUTION}</answer>", SOLUTION, SOLUTION),  # the last one counts
        (f"<answer>{SOLUTION}</answer><answer>12", SOLUTION, SOLUTION),  # an unclosed one does not
        (f"<answer>5<answer>{SOLUTION}</answer></answer>", SOLUTION, "5" + SOLUTION[:15]),  # nested
        (f"<answer>{SOLUTION}</answer></answer>", SOLUTION, SOLUTION),
        (f"<answer>{SOLUTION[:8]} {SOLUTION[8:]}</answer>", None, SOLUTION),
        (f"<answer>{SOLUTION}{PUZZLE}</answer>", None, SOLUTION),  # cut at 16
        ("<answer>314</answer>", None, "3140000000000000"),  # padded
        ("<answer>[３142]</answer>", None, "1420000000000000"),
        ("<answer>none</answer>", None, None),
        ("<answer></answer>", None, None),
        (f"<answer>{SOLUTION}", None, None),
        (f"</answer>{SOLUTION}<answer>", None, None),
        (SOLUTION, None, None),
        ("", None, None),
        ("\ud800", None, None),
    ],
)
def test_answers_between_tags(text: str, strict: str | None, published: str | None):
    assert parse_answer(text, "tags") == strict
    assert parse_answer(text, "tags", "d1") == published


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3142\n2431\n4213\n1324", SOLUTION),
        ("\n3142 \n 2431\n4213\r\n1324\n", SOLUTION),
        (SOLUTION, None),
        ("3142\n2431\n4213", None),
        ("3142\n2431\n4213\n1324\n1", None),
        ("31\n422431\n4213\n1324", None),
        ("３142\n2431\n4213\n1324", None),
    ],
)
def test_answers_in_four_lines(text: str, expected: str | None):
    assert parse_answer(text, "lines") == expected


def test_published_parser_reads_an_untagged_text_whole_and_unknown_names_are_refused():
    assert parse_answer("grid: 3142 2431 4213 1324.", "digits", "d1") == SOLUTION
    assert parse_answer("no digits", "digits", "d1") is None
    with pytest.raises(ValueError, match="form 'xml'"):
        parse_answer("", "xml")
    with pytest.raises(ValueError, match="parser 'loose'"):
        parse_answer("", "tags", "loose")


@pytest.mark.parametrize("parser", ["strict", "d1"])
@pytest.mark.parametrize("form", ["digits", "lines", "tags"])
def test_a_megabyte_of_hostile_text_is_judged_at_once(form: str, parser: str):
    texts = ["<answer>" * 125_000, "</answer>" * 111_000, "<answer></answer>" * 58_000, "<answer>" + "1" * 10**6]
    texts += ["<answer>" * 125_000 + "</answer>", "1" * 10**6, "1 " * 500_000, " " * 10**6, "<" * 10**6]
    start = time.perf_counter()
    for text in texts:
        parse_answer(text, form, parser)
    assert time.perf_counter() - start < 1.0  # 9 texts, a few ms each; a backtracking pattern needs minutes


def test_d1_file_has_500_puzzles_of_which_376_are_unique(data_dir: Path):
    rows = read_puzzles(data_dir / "sudoku" / "d1_4x4_test_sudoku.csv")
    assert (rows[0].puzzle, rows[0].solution, rows[0].line) == (PUZZLE, SOLUTION, 2)
    assert rows[1].puzzle == "0140432014020000"  # leading zero kept
    assert len({row.puzzle for row in rows}) == 500
    numbers = completions(from_text([row.puzzle for row in rows])).sum(1).tolist()
    assert Counter(numbers) == {1: 376, 2: 115, 3: 8, 4: 1}  # as counted when the file was collected


@pytest.mark.parametrize("num_givens", [6, 8, 10])
def test_dream_files_have_108_rows_and_score_100(data_dir: Path, num_givens: int):
    path = data_dir / "sudoku" / f"dream_sudoku_4x4_{num_givens}.jsonl"
    rows, scored = read_puzzles(path), scored_puzzles(path)
    assert (len(rows), len(scored), scored[0].index, scored[0].line) == (108, 100, 8, 9)
    assert {16 - row.puzzle.count("0") for row in rows} == {num_givens}
    examples = Sudoku(prompt="dream", data=str(path)).examples("test")
    assert [e.id % 1000 for e in examples] == list(range(8, 108))


def test_training_file_decides_which_grids_were_seen(data_dir: Path):
    train, test = (str(data_dir / "sudoku" / n) for n in ("sudoku_4x4_train.csv", "d1_4x4_test_sudoku.csv"))
    examples = Sudoku(data=test, train_data=train).examples("test")
    # The training file holds the 200 grids of SPG's split; 148 rows of d1's test file lie on the other 88.
    assert sum(not e.columns["seen_grid"] for e in examples) == 148
    own = set(to_text(split_grids("train")))
    assert all(e.columns["seen_grid"] == (e.columns["solution"] in own) for e in Sudoku(data=test).examples("test"))


def test_the_papers_draw_256_puzzles_of_d1s_file(data_dir: Path):
    path = str(data_dir / "sudoku" / "d1_4x4_test_sudoku.csv")
    every, drawn = Sudoku(data=path).examples("test"), Sudoku(data=path, num_drawn=256).examples("test")
    state = np.random.get_state()
    np.random.seed(42)  # the published script: the global generator, the file's rows counted from 0
    rows = np.random.choice(500, 256, replace=False)
    np.random.set_state(state)
    assert drawn == [example for row, example in enumerate(every) if row in set(rows.tolist())] and len(drawn) == 256
    assert Sudoku(data=path, num_drawn=500).examples("test") == every
    assert Sudoku(num_test=9, num_drawn=4).examples("test") == Sudoku(num_test=9).examples("test")  # generated
    with pytest.raises(ConfigError, match=r"task.num_drawn = 0: must be at least 1. The papers' is 256"):
        Sudoku(num_drawn=0)


def test_an_opened_answer_is_part_of_the_prompt_and_judged_as_one():
    task, whole = Sudoku(prompt="d1", opening="<answer>", num_train=9), Sudoku(prompt="d1", num_train=9)
    opened, plain = task.examples("train")[0], whole.examples("train")[0]
    assert opened.prompt == [*plain.prompt, {"role": "assistant", "content": "<answer>"}]
    assert task.score(opened, f"{opened.columns['solution']}</answer>").status == Status.CORRECT
    assert whole.score(plain, f"{plain.columns['solution']}</answer>").status == Status.UNPARSED
    assert Sudoku(opening="<answer>", num_train=9).examples("train") == Sudoku(num_train=9).examples("train")  # no chat
    begun = Sudoku(prompt="d1", opening="<reasoning>", num_train=9)
    for (example, text), (_, full) in zip(begun.demonstrations(), whole.demonstrations(), strict=True):
        assert "<reasoning>" + text == full and example.prompt[-1]["content"] == "<reasoning>"


def test_every_published_solution_is_judged_right(data_dir: Path):
    task = Sudoku(data=str(data_dir / "sudoku" / "d1_4x4_test_sudoku.csv"))
    for example in task.examples("test"):
        facts = task.score(example, example.columns["solution"]).facts
        assert set(facts.values()) == {1.0}


def test_excluded_files_are_kept_out_of_training(tmp_path: Path):
    plain = Sudoku(num_train=50).examples("train")
    rows = [f"{e.columns['puzzle']},{e.columns['solution']}" for e in plain]
    (tmp_path / "test.csv").write_text("Puzzle,Solution\n" + "\n".join(rows[:20]) + "\n")
    kept = Sudoku(num_train=30, exclude=(str(tmp_path / "test.csv"),)).examples("train")
    assert [e.prompt for e in kept] == [e.prompt for e in plain[20:]]
    (tmp_path / "train.csv").write_text("Puzzle,Solution\n" + "\n".join(rows[10:]) + "\n")
    task = Sudoku(train_data=str(tmp_path / "train.csv"), exclude=(str(tmp_path / "test.csv"),))
    assert [e.prompt for e in task.examples("train")] == [e.prompt for e in plain[20:]]
    with pytest.raises(ConfigError, match="leaves no puzzle"):
        Sudoku(train_data=str(tmp_path / "test.csv"), exclude=(str(tmp_path / "test.csv"),)).examples("train")


def test_columns_are_found_by_name_and_blank_lines_skipped(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(f"\ufeffSolution,id,Puzzle\r\n\r\n{SOLUTION},7,{PUZZLE}\r\n".encode())
    (row,) = read_puzzles(tmp_path / "a.csv")
    assert (row.puzzle, row.solution, row.line) == (PUZZLE, SOLUTION, 3)


def test_json_lines_are_known_by_content(tmp_path: Path):
    (tmp_path / "a.txt").write_text(f'{{"input": "{PUZZLE}", "output": "{SOLUTION}"}}\n' * 9)
    assert len(read_puzzles(tmp_path / "a.txt")) == 9 and len(scored_puzzles(tmp_path / "a.txt")) == 1


HEAD = "Puzzle,Solution\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", HEAD + f"{PUZZLE[1:]},{SOLUTION}", r"a.csv line 2: puzzle '1022.*has 15 char.*16 are.*leading zeros"),
        ("a.csv", HEAD + f"{PUZZLE},{SOLUTION}\n{PUZZLE}0,{SOLUTION}", r"a.csv line 3: puzzle .* has 17 characters"),
        ("a.csv", HEAD + f"5{PUZZLE[1:]},{SOLUTION}", r"a.csv line 2: puzzle .* has '5', only the digits 0-4"),
        ("a.csv", HEAD + f"３{PUZZLE[1:]},{SOLUTION}", r"a.csv line 2: puzzle .* has '３'"),
        ("a.csv", HEAD + f"{PUZZLE},0{SOLUTION[1:]}", r"a.csv line 2: solution .* has '0', only the digits 1-4"),
        ("a.csv", HEAD + f"{PUZZLE},{'1234' * 4}", r"a.csv line 2: solution '1234.*repeats a digit"),
        ("a.csv", HEAD + f"{PUZZLE},{FIRST_WAY}", r"a.csv line 2: the solution has 1 in row 1, column 1.*gives 3"),
        ("a.csv", HEAD + f"{SOLUTION},{SOLUTION}", r"a.csv line 2: puzzle .* has no blank cell"),
        (
            "a.csv",
            f"Puzzle,Answer\n{PUZZLE},{SOLUTION}",
            r"a.csv line 1: no column 'Solution' among \['Puzzle', 'Answer'\]",
        ),
        ("a.csv", f"{PUZZLE},{SOLUTION}\n", r"a.csv line 1: no column 'Puzzle'"),
        ("a.csv", HEAD + PUZZLE, r"a.csv line 2: 1 fields, the header has 2"),
        ("a.csv", HEAD + "1" * 200_000, r"a.csv line \d: not readable as CSV"),
        ("a.csv", "", r"a.csv line 1: no column 'Puzzle' among \[\]"),
        ("a.csv", HEAD, r"a.csv: no puzzles in this file"),
        ("a.csv", b"Puzzle,Solution\n\xff", r"a.csv: byte 16 is not UTF-8"),
        ("a.jsonl", "", r"a.jsonl: no puzzles"),
        ("a.jsonl", "Puzzle,Solution", r"a.jsonl line 1: not a JSON object"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl line 1: not a JSON object"),
        ("a.jsonl", "[1]", r"a.jsonl line 1: a JSON list"),
        ("a.jsonl", f'{{"input": "{PUZZLE}"}}', r"a.jsonl line 1: 'output' is missing"),
        ("a.jsonl", f'\n{{"input": 12, "output": "{SOLUTION}"}}', r"a.jsonl line 2: 'input' is a int"),
        (
            "a.jsonl",
            f'{{"input": "310\\n2000\\n0210\\n0320", "output": "{SOLUTION}"}}',
            r"line 1: puzzle .* 15 characters",
        ),
    ],
)
def test_malformed_files_are_refused_with_file_and_line(tmp_path: Path, name: str, content: str | bytes, message: str):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_puzzles(tmp_path / name)


def test_missing_file_folder_and_a_file_of_few_shot_rows_only_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"none.csv: cannot be read \(No such file"):
        Sudoku(data=str(tmp_path / "none.csv")).examples("test")
    with pytest.raises(DataError, match="cannot be read"):
        read_puzzles(tmp_path)
    (tmp_path / "a.jsonl").write_text(f'{{"input": "{PUZZLE}", "output": "{SOLUTION}"}}\n' * 8)
    with pytest.raises(DataError, match="8 rows, and the first 8"):
        scored_puzzles(tmp_path / "a.jsonl")
