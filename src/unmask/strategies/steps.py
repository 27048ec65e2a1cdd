"""Groups of completions, the better of which are finished several times more from one of their earlier states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.ranks import failing_together
from unmask.rollout import GroupSource, RolloutConfig, TextPolicy, draw_samples, join_samples, judge
from unmask.samplers.canvas import Start
from unmask.strategies.continuing import ContinuingSampler, check_continues, whole_prompts
from unmask.types import Example, NoiseLike, PromptBatch, Rollouts, Samples, Task, take_rows


@dataclass(frozen=True)
class StepsConfig(RolloutConfig):
    """Groups in which what a step is worth is found out by finishing from it again.

        R_proc,i = mean_n r(re-roll n of i from the state before step t1) - group mean;   0 unless R_i is above it

    t1 is one uniform draw from 1 ... S-1 for each group of a batch, S the denoising steps. Source: step-aware policy
    optimization (SAPO), the form with the later state fully masked, whose mean reward is that of the group.
    """

    num_rerolls: int = 4
    """N, new ends of each completion above its group's mean."""

    strategy: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_rerolls < 1:
            raise ConfigError(f"rollout.num_rerolls = {self.num_rerolls}: must be at least 1. Try 4.")

    def sampled(self, num_steps: int) -> list[tuple[str, int, int]]:
        """As expected: half of the completions are above the mean, and half of the steps are made again."""
        completions = self.prompts_per_batch * self.group_size
        return [
            ("collect", completions, num_steps),
            ("re-rolls", completions // 2 * self.num_rerolls, -(-num_steps // 2)),
        ]

    def share(self, rows: slice) -> range:
        return whole_prompts(rows, self.rows_per_prompt, "steps")

    def check(self, name: str, sampler: Any) -> None:
        check_continues("steps", name, sampler)
        if sampler.total_steps < 2:
            raise ConfigError(
                f"rollout.type = 'steps': goes on from a state between two denoising steps, and the sampler makes "
                f"{sampler.total_steps}. Raise sampler.num_steps."
            )

    def source(self, task: Task, sampler: Any, noise: NoiseLike) -> GroupSource:
        return StepSource(task, sampler, self, noise)


@dataclass
class StepSource(GroupSource):
    """Groups with process rewards. Processes hold whole groups."""

    sampler: ContinuingSampler
    config: StepsConfig

    def collect(self, policy: TextPolicy, iteration: int, rows: slice) -> Rollouts:
        groups = self.config.share(rows)
        rollouts = super().collect(policy, iteration, rows)
        rewards = rollouts.rewards.view(len(groups), -1)
        # by more than rounding: a reward equal to the mean is not above it, in whatever order the mean was taken
        above = ((rewards - rewards.mean(1, keepdim=True)).round(decimals=12) > 0).flatten().nonzero()[:, 0]
        step = self.draw_steps(iteration, groups).to(above.device)[rollouts.groups - groups.start]  # (b,)
        means, nfe = self.reroll(policy, rollouts, self.examples_of(iteration, rows), above, step)
        process = torch.zeros_like(rollouts.rewards)
        process[above] = means - rewards.mean(1).repeat_interleave(rewards.shape[1])[above]
        extra = dict.fromkeys(above.tolist(), float(self.config.num_rerolls))
        return replace(
            rollouts,
            process_rewards=process,
            nfe=rollouts.nfe.index_add(0, above, nfe),
            facts=[{**facts, "extra_rollouts": extra.get(row, 0.0)} for row, facts in enumerate(rollouts.facts)],
        )

    def draw_steps(self, iteration: int, groups: range) -> Tensor:  # (groups,) int64
        """t1 of each group."""
        uniforms = self.noise.stream("steps").uniform(iteration, torch.tensor(list(groups)))
        most = self.sampler.total_steps - 1
        return 1 + (uniforms * most).long().clamp(max=most - 1)

    def reroll(
        self,
        policy: TextPolicy,
        rollouts: Rollouts,
        examples: Sequence[Example],  # one per row
        above: Tensor,  # (A,) int64, rows to finish again
        step: Tensor,  # (b,) int64, from which step on
    ) -> tuple[Tensor, Tensor]:  # (A,) float64, (A,) int64
        """Mean reward of each row's re-rolls, and the forwards that they took."""
        number = self.config.num_rerolls
        rows = above.repeat_interleave(number)  # (A·N,)
        again = torch.arange(number, device=rows.device).repeat(len(above))
        index = rollouts.rollout_index[rows] * number + again  # unique among the re-rolls of a prompt
        batch = PromptBatch(rollouts.prompt_ids[rows], rollouts.prompt_mask[rows], rollouts.prompt_key[rows], index)
        done = Samples(
            rollouts.completion_ids, rollouts.reveal_step, rollouts.sample_logps, rollouts.nfe, rollouts.drawn_logps
        )
        places = [(step[rows] == t).nonzero()[:, 0] for t in step[rows].unique().tolist()]
        jobs = [(take_rows(batch, p), Start(take_rows(done, rows[p]), int(step[rows[p[0]]]))) for p in places]
        parts = draw_samples(
            policy,
            self.sampler,
            jobs,
            rollouts.prompt_ids[:1],
            noise=self.noise.stream("continuation"),
            batch_size=self.config.batch_size,
        )
        samples = join_samples([take_rows(done, slice(0, 0)), *parts])
        samples = take_rows(samples, torch.cat([rows[:0], *places]).argsort())
        with failing_together():
            scores = judge(self.task, [examples[row] for row in rows.tolist()], policy.decode(samples.completion_ids))
        values = torch.tensor([s.value for s in scores], dtype=torch.float64, device=rows.device)
        shape = (len(above), number)
        return values.view(shape).mean(1), samples.nfe.view(shape).sum(1)
