"""Rollouts: independent of how they are batched, new noise for a prompt drawn twice, and faults named early."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from tests.helpers import DigitSum, fake_rollouts, sudoku_source, tiny_policy
from unmask.corruption import draw_uniform_count
from unmask.demonstrations import read_demonstrations
from unmask.errors import ConfigError, DataError, RewardError
from unmask.noise import Noise
from unmask.rollout import DemonstrationSource, RolloutConfig, draw_indices, judge, roll_out
from unmask.samplers import SAMPLERS
from unmask.scoring import score
from unmask.types import Example, Score, Status, take_rows

POLICY = tiny_policy()
# prompts of one to four characters, so that batches differ in padding
EXAMPLES = [Example(id=10 + i, prompt="1234"[: 1 + i % 4]) for i in range(9)]


def rows_by_key(rollouts, order):
    """Everything that was drawn, by the row's place in EXAMPLES."""
    return {
        place: (
            rollouts.completion_ids[row].tolist(),
            rollouts.reveal_step[row].tolist(),
            rollouts.completions[row],
            float(rollouts.rewards[row]),
        )
        for row, place in enumerate(order)
    }


def sampled(name, order=range(9), batch_size=4, seed=0, **fields):
    order = list(order)
    sampler = SAMPLERS[name](gen_length=4, temperature=1.0, **fields)
    index = torch.tensor([100 + place for place in order])
    return roll_out(
        POLICY,
        DigitSum(),
        sampler,
        [EXAMPLES[place] for place in order],
        index,
        index,
        noise=Noise(seed),
        batch_size=batch_size,
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("roar", {}),
        ("roar", {"block_length": 2}),
        ("low_confidence", {}),
        ("low_confidence", {"num_steps": 2}),
        ("random_remasking", {"num_steps": 2}),
    ],
)
def test_a_rollout_does_not_depend_on_its_batch(name, fields):
    expected = rows_by_key(sampled(name, **fields), range(9))
    for order in (range(9), [8, 3, 5, 0, 1, 7, 2, 6, 4], [4], [0, 4, 8]):  # other rows, other widths of padding
        for batch_size in (1, 2, 9):
            got = rows_by_key(sampled(name, order, batch_size, **fields), order)
            assert got == {place: expected[place] for place in order}
    assert rows_by_key(sampled(name, seed=1, **fields), range(9)) != expected


def collected(task, sampler, batch_size=3):
    index = torch.arange(9)
    return roll_out(POLICY, task, sampler, EXAMPLES, index, index, noise=Noise(0), batch_size=batch_size)


class Watched:
    """A sampler that looks at the task before every part but the first."""

    def __init__(self, check):
        self.inner, self.check, self.num_parts = SAMPLERS["roar"](gen_length=4), check, 0
        self.gen_length = 4

    def sample(self, *args, **kwargs):
        self.num_parts += 1
        if self.num_parts > 1:
            self.check()
        return self.inner.sample(*args, **kwargs)


def test_a_part_is_judged_while_the_next_one_is_sampled():
    has_judged = threading.Event()

    class Telling(DigitSum):
        judges_rows = True

        def score(self, example, completion):
            has_judged.set()
            return super().score(example, completion)

    def wait():
        assert has_judged.wait(20)  # would not come if judging waited for all parts

    rollouts = collected(Telling(), Watched(wait))
    plain = collected(Telling(), SAMPLERS["roar"](gen_length=4), batch_size=9)
    assert rollouts.completions == plain.completions and torch.equal(rollouts.rewards, plain.rewards)
    assert torch.equal(rollouts.length, plain.length) and rollouts.statuses == plain.statuses


def test_a_reward_that_wants_the_whole_batch_gets_it():
    calls = []

    class Whole(DigitSum):
        def score_all(self, examples, completions, *, completion_ids=None):
            calls.append(len(completions))
            return [self.score(e, c) for e, c in zip(examples, completions, strict=True)]

    collected(Whole(), SAMPLERS["roar"](gen_length=4))
    assert calls == [9]
    Whole.judges_rows = True
    collected(Whole(), SAMPLERS["roar"](gen_length=4))
    assert calls[1:] == [3, 3, 3]


def test_what_judging_raises_in_its_thread_is_raised():
    class Broken(DigitSum):
        judges_rows = True

        def score(self, example, completion):
            raise RewardError("the reward is broken")

    with pytest.raises(RewardError, match="the reward is broken"):
        collected(Broken(), SAMPLERS["roar"](gen_length=4))


def test_prompts_of_like_length_are_sampled_together_and_without_pads():
    widths = []

    class Wide(Watched):
        def sample(self, policy, prompts, **rest):
            widths.append((prompts.prompt_ids.shape[1], int(prompts.prompt_mask.sum(1).min())))
            return super().sample(policy, prompts, **rest)

    collected(DigitSum(), Wide(lambda: None))
    assert widths == [(1, 1), (3, 2), (4, 3)]  # the longest and the shortest of each part


def test_log_probabilities_agree_to_rounding_whatever_the_batch():
    expected = sampled("roar").sample_logps
    for batch_size in (1, 9):
        assert torch.allclose(sampled("roar", batch_size=batch_size).sample_logps, expected, rtol=0, atol=1e-12)


def test_masks_and_scores_of_a_collected_batch_do_not_depend_on_micro_batches():
    source = sudoku_source(DigitSum())
    rollouts = [
        replace(source, config=replace(source.config, batch_size=size)).collect(POLICY, 3, slice(0, 16))
        for size in (1, 5, 16)
    ]
    for other in rollouts[1:]:
        assert torch.equal(other.completion_ids, rollouts[0].completion_ids)
        assert torch.equal(other.rewards, rollouts[0].rewards)


def test_shares_of_a_batch_make_up_the_whole():
    source = sudoku_source(DigitSum())
    whole = source.collect(POLICY, 2, slice(0, 16))
    parts = [source.collect(POLICY, 2, slice(first, first + 4)) for first in (0, 4, 8, 12)]
    for name in ("completion_ids", "prompt_key", "rollout_index", "groups", "rewards"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert whole.groups.tolist() == [row // 4 for row in range(16)]


def test_batches_differ_and_each_is_a_function_of_its_number():
    source = sudoku_source(DigitSum())
    first, again, second = (source.collect(POLICY, i, slice(0, 16)) for i in (0, 0, 1))
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert not torch.equal(first.completion_ids, second.completion_ids)
    assert len(set(first.prompt_key.tolist())) > 1


def test_a_prompt_drawn_twice_gets_new_noise():
    class OnePrompt(DigitSum):
        def examples(self, split):
            return [Example(id=7, prompt="12|")]

    source = sudoku_source(OnePrompt(), prompts_per_batch=4, group_size=8)
    batches = [source.collect(POLICY, i, slice(0, 32)) for i in (0, 1)]
    indices = torch.cat([batch.rollout_index for batch in batches])
    assert len(indices.unique()) == 64
    for batch in batches:
        groups = batch.completion_ids.view(4, 8, -1)
        assert not any(torch.equal(groups[0], groups[i]) for i in (1, 2, 3))
    assert not torch.equal(batches[0].completion_ids, batches[1].completion_ids)


def test_indices_cover_the_examples_evenly():
    counts = torch.bincount(torch.tensor(draw_indices(Noise(0), 0, 20_000, 5)), minlength=5)
    assert counts.sum() == 20_000
    assert (counts - 4000).abs().max() < 4 * 57  # four standard deviations of a binomial, sqrt(20000 * 0.2 * 0.8) = 57


def test_rollouts_carry_what_was_said_and_how():
    rollouts = sampled("low_confidence", num_steps=2)
    assert rollouts.prompts == [example.prompt for example in EXAMPLES]
    assert rollouts.completions == POLICY.decode(rollouts.completion_ids)
    assert rollouts.nfe.tolist() == [2] * 9
    assert set(rollouts.statuses) <= {"correct", "wrong"}
    for row, text in enumerate(rollouts.completions):
        assert float(rollouts.rewards[row]) == sum(c in "56789" for c in text) / 4
    stops = torch.isin(rollouts.completion_ids, torch.tensor(POLICY.stop_token_ids))
    for row in range(9):
        places = stops[row].nonzero().flatten().tolist()
        assert int(rollouts.length[row]) == (places[0] + 1 if places else 4)


def test_a_prompt_that_does_not_fit_is_refused():
    long = [Example(id=0, prompt="1" * 37)]
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(DataError, match="a prompt of 37 tokens plus gen_length = 4 exceeds the 40 positions"):
        roll_out(POLICY, DigitSum(), SAMPLERS["roar"](4), long, index, index, noise=Noise(0), batch_size=1)


def test_a_task_without_examples_is_refused():
    class Nothing(DigitSum):
        def examples(self, split):
            return []

    with pytest.raises(DataError, match="no examples in split 'train'"):
        sudoku_source(Nothing())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_must_be_finite(value):
    class Broken(DigitSum):
        judges_rows = True

        def score(self, example, completion):
            return Score(value, Status.WRONG)

    with pytest.raises(RewardError, match=r"the reward of prompt 3 is .*completion begins 'abc'"):
        judge(Broken(), [Example(id=3, prompt="p")], ["abc"])


@pytest.mark.parametrize("key", ["prompts_per_batch", "group_size", "batch_size"])
def test_counts_below_one_are_refused(key):
    with pytest.raises(ConfigError, match=f"rollout.{key} = 0: must be at least 1"):
        RolloutConfig(**{key: 0})


def test_a_group_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"rollout\.group_size = 1: advantages compare"):
        RolloutConfig(group_size=1)


# ---- demonstrations


def demonstrations(count=6):
    return [(Example(id=i, prompt="12"[: 1 + i % 2]), "34"[: i % 3]) for i in range(count)]


def test_demonstrations_become_rollouts_with_stop_padding():
    source = DemonstrationSource(demonstrations(), gen_length=3, rows=8, noise=Noise(0))
    batch = source.collect(POLICY, 0, slice(0, 8))
    given = {example.id: (example.prompt, text) for example, text in demonstrations()}
    stop = POLICY.stop_token_ids[0]
    for row in range(8):
        prompt, text = given[int(batch.prompt_key[row])]
        expected = POLICY.tokenizer.encode(text, add_special_tokens=False)
        assert batch.completion_ids[row].tolist() == expected + [stop] * (3 - len(expected))
        assert batch.prompt_ids[row][batch.prompt_mask[row]].tolist() == POLICY.tokenizer.encode(prompt)
        assert int(batch.length[row]) == min(len(text) + 1, 3)
    assert source.batch_rows == len(batch) == 8
    assert batch.rewards.tolist() == [0.0] * 8 and set(batch.statuses) == {"given"}


def test_shares_of_a_demonstration_batch_make_up_the_whole():
    source = DemonstrationSource(demonstrations(), gen_length=3, rows=8, noise=Noise(0))
    whole = source.collect(POLICY, 5, slice(0, 8))
    for share in (slice(0, 4), slice(4, 8)):
        part, expected = source.collect(POLICY, 5, share), take_rows(whole, share)
        assert torch.equal(part.completion_ids, expected.completion_ids)
        assert torch.equal(part.rollout_index, expected.rollout_index)
    later = source.collect(POLICY, 6, slice(0, 8))
    assert not set(later.rollout_index.tolist()) & set(whole.rollout_index.tolist())  # new masks for a repeated row


def test_no_demonstrations_are_refused():
    with pytest.raises(DataError, match="there are no demonstrations"):
        DemonstrationSource([], gen_length=3, rows=8, noise=Noise(0))


def test_a_demonstration_that_does_not_fit_is_refused():
    source = DemonstrationSource([(Example(id=0, prompt="1"), "12345")], gen_length=3, rows=2, noise=Noise(0))
    with pytest.raises(DataError, match="a completion of 5 tokens exceeds gen_length = 3"):
        source.collect(POLICY, 0, slice(0, 2))


def test_demonstration_files_in_their_three_forms(tmp_path):
    file = tmp_path / "rows.jsonl"
    user, answer = '{"role": "user", "content": "1"}', '{"role": "assistant", "content": "2"}'
    file.write_text(
        '{"prompt": "1", "completion": "2", "source": "x"}\n\n'
        f'{{"prompt": [{user}], "completion": [{answer}]}}\n'
        f'{{"messages": [{user}, {answer}]}}\n'
    )
    rows = read_demonstrations(file)
    assert [text for _, text in rows] == ["2", "2", "2"]
    assert [example.prompt for example, _ in rows] == ["1"] + [[{"role": "user", "content": "1"}]] * 2
    assert len({example.id for example, _ in rows}) == 3  # masks are keyed by it


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[]", "line 1: is not a JSON object"),
        ('{"prompt": "1"}', "line 1: no 'completion'"),
        ('{"completion": "1"}', "line 1: no 'prompt'"),
        ('{"prompt": 1, "completion": "2"}', "line 1: prompt: must be a string or a list of messages"),
        ('{"prompt": "1", "completion": null}', "line 1: completion: must be a string"),
        ('{"messages": [{"role": "user", "content": "1"}]}', "a single turn"),
        ('{"messages": []}', "line 1: messages: must be"),
        ('{"messages": [{"role": "user"}]}', "line 1: messages: must be"),
        (
            '{"messages": [{"role": "user", "content": "1"}, {"role": "user", "content": "1"}]}',
            "must be one assistant turn",
        ),
        ("", "holds no rows"),
    ],
)
def test_demonstration_rows_of_another_form_are_refused(line, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=message) as error:
        read_demonstrations(file)
    assert "\n" not in str(error.value) and "rows.jsonl" in str(error.value)


def test_unreadable_demonstration_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_demonstrations(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        read_demonstrations(tmp_path / "latin.jsonl")


def test_scores_of_rollouts_do_not_depend_on_extra_padding():
    rollouts = fake_rollouts()
    wider = replace(
        rollouts,
        prompt_ids=torch.nn.functional.pad(rollouts.prompt_ids, (3, 0)),
        prompt_mask=torch.nn.functional.pad(rollouts.prompt_mask, (3, 0)),
    )
    masks = [draw_uniform_count(rows, 4, coupled=True, noise=Noise(0)) for rows in (rollouts, wider)]
    assert torch.equal(masks[0].scored, masks[1].scored)
    logps = [score(POLICY, rows, m, micro_batch_size=7).logps for rows, m in zip((rollouts, wider), masks, strict=True)]
    assert torch.allclose(*logps, rtol=0, atol=1e-12)
