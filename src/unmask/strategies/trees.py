"""Trees of completions: every node is continued several times from the state that its edge leads to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.rollout import (
    GroupSource,
    RolloutConfig,
    TextPolicy,
    draw_samples,
    encode,
    join_samples,
    judged,
)
from unmask.samplers.canvas import Start
from unmask.strategies.continuing import ContinuingSampler, check_continues, whole_prompts
from unmask.types import NoiseLike, PromptBatch, Rollouts, Samples, Task, take_rows


@dataclass(frozen=True)
class TreeConfig(RolloutConfig):
    """Trees whose leaves are the completions of a prompt, and whose rows are the nodes below the root.

    A node's value is its reward at a leaf and the mean of its children's above; rows of one parent form a group.
    Source: d-TreeRPO, height 2 and branching 4.
    """

    group_size: int = 16
    """Leaves of a prompt's tree, whole completions. Published: 16 = 4 x 4."""
    height: int = 2
    """Levels; each covers an equal share of the denoising steps, rounded."""
    branching: tuple[int, ...] = ()
    """Children of a node, level by level; their product is group_size. Empty: as even as group_size allows, larger
    numbers first."""

    strategy: ClassVar[str] = "tree"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.height < 1:
            raise ConfigError(f"rollout.height = {self.height}: must be at least 1 level. Try 2.")
        if self.branching and (len(self.branching) != self.height or prod(self.branching) != self.group_size):
            raise ConfigError(
                f"rollout.branching = {list(self.branching)}: must be rollout.height = {self.height} numbers whose "
                f"product is rollout.group_size = {self.group_size}. Leave it out for even ones."
            )
        if any(number < 2 for number in self.branching) or not self.branches:
            raise ConfigError(
                f"rollout.group_size = {self.group_size}: cannot be split into {self.height} levels of 2 or more "
                "branches, and a node with one child has nothing to compare. Try 16, or rollout.height = 1."
            )
        if self.buffer.num_batches:
            raise ConfigError(
                f"rollout.buffer.num_batches = {self.buffer.num_batches}: trees are trained on once, because their "
                "rows are steps of the policy that made them. Use 0, or rollout.type = 'groups'."
            )

    @property
    def branches(self) -> tuple[int, ...]:
        """Children of a node on each level; empty if there is no way."""
        return self.branching or even_factors(self.group_size, self.height)

    @property
    def nodes(self) -> list[int]:
        """Nodes of each level, the root's level left out."""
        return list(accumulate(self.branches, mul))

    @property
    def rows_per_prompt(self) -> int:
        return sum(self.nodes)

    def boundaries(self, num_steps: int) -> list[int]:
        """Step at which each level begins, and the number of steps."""
        return [num_steps * level // self.height for level in range(self.height + 1)]

    def sampled(self, num_steps: int) -> list[tuple[str, int, int]]:
        """A level's first child goes on where its parent's own completion does; the others are continuations."""
        before = [0, *self.nodes]
        return [
            ("collect", self.prompts_per_batch * (here - above), num_steps - first)
            for here, above, first in zip(self.nodes, before, self.boundaries(num_steps), strict=False)
        ]

    def share(self, rows: slice) -> range:
        return whole_prompts(rows, self.rows_per_prompt, "tree")

    def check(self, name: str, sampler: Any) -> None:
        check_continues("tree", name, sampler)
        if sampler.total_steps < self.height:
            raise ConfigError(
                f"rollout.height = {self.height}: every level needs a denoising step, and the sampler makes "
                f"{sampler.total_steps}. Use fewer levels or more steps."
            )

    def layout(self, num_prompts: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """(groups, window) of the rows of so many trees, level after level within each; see `Rollouts`."""
        edges = self.boundaries(num_steps)
        parents, windows, above = [], [], 0
        for level, (count, branches) in enumerate(zip(self.nodes, self.branches, strict=True)):
            parents.append(above + torch.arange(count) // branches)
            windows.append(torch.tensor([edges[level], edges[level + 1]]).expand(count, 2))
            above += count // branches
        tree = torch.cat(parents)
        groups = above * torch.arange(num_prompts)[:, None] + tree
        return groups.flatten(), torch.cat(windows).repeat(num_prompts, 1)

    def leaves(self) -> Tensor:  # (rows of a tree,) int64
        """The first leaf below each node, as a number among the tree's leaves."""
        return torch.cat([torch.arange(count) * (self.group_size // count) for count in self.nodes])

    def source(self, task: Task, sampler: Any, noise: NoiseLike) -> GroupSource:
        return TreeSource(task, sampler, self, noise)


def even_factors(number: int, count: int) -> tuple[int, ...]:
    """`count` factors of 2 or more, largest first, whose largest is least; empty if there are none."""
    if count == 1:
        return (number,) if number >= 2 else ()
    found = [
        (first, *rest)
        for first in range(2, number + 1)
        if number % first == 0 and (rest := even_factors(number // first, count - 1)) and first >= rest[0]
    ]
    return min(found, default=())


@dataclass
class TreeSource(GroupSource):
    """Trees of completions for each of N prompts drawn from the task. Processes hold whole trees."""

    sampler: ContinuingSampler
    config: TreeConfig

    def collect(self, policy: TextPolicy, iteration: int, rows: slice) -> Rollouts:
        config, size = self.config, self.config.rows_per_prompt
        prompts = config.share(rows)
        leaf_rows = size - config.group_size + torch.arange(config.group_size)  # the last level of a tree
        numbers = torch.tensor(list(prompts))[:, None] * size + leaf_rows  # (n, G), rows of the batch
        of_nodes = self.examples_of(iteration, rows)
        examples = [of_nodes[row - rows.start] for row in numbers.flatten().tolist()]
        index = iteration * self.batch_rows + numbers.flatten()
        texts, batch = encode(policy, examples, index, self.sampler.gen_length)
        samples = self.grow(policy, batch)
        leaves = judged(policy, self.task, examples, texts, batch, samples, numbers.flatten())
        return self.nodes(policy, leaves, iteration, prompts)

    def grow(self, policy: TextPolicy, batch: PromptBatch) -> Samples:
        """Every leaf of every tree, level by level: a leaf is continued from the first leaf below its own branching."""
        config = self.config
        number = torch.arange(len(batch), device=batch.prompt_ids.device)
        edges = config.boundaries(self.sampler.total_steps)
        parts: list[Samples] = []
        made: list[Tensor] = []
        for level, branches in enumerate(config.branches):
            stride = config.group_size // config.nodes[level]
            is_first = number % stride == 0
            child = number // stride % branches
            rows = number[is_first & ((child != 0) if level else torch.ones_like(is_first))]
            start = None
            if level:
                so_far, place = join_samples(parts), torch.cat(made)
                origin = rows - child[rows] * stride
                start = Start(take_rows(so_far, _places(place, origin)), edges[level])
            parts += draw_samples(
                policy,
                self.sampler,
                [(take_rows(batch, rows), start)],
                batch.prompt_ids[:1],
                noise=self.noise.stream("sampler"),
                batch_size=config.batch_size,
            )
            made.append(rows)
        return take_rows(join_samples(parts), torch.cat(made).argsort())

    def nodes(self, policy: TextPolicy, leaves: Rollouts, iteration: int, prompts: range) -> Rollouts:
        """One row for each node below the roots, from the leaves in order."""
        config, device = self.config, leaves.groups.device
        trees, size = len(prompts), config.rows_per_prompt
        values = [leaves.rewards.view(trees, -1)]
        for branches in config.branches[:0:-1]:
            # rounded, so that children whose means are equal but for the last bits are equal: no preference is rounding
            values.insert(0, values[0].unflatten(1, (-1, branches)).mean(-1).round(decimals=12))
        first = torch.arange(trees)[:, None] * config.group_size + config.leaves()
        rows = take_rows(leaves, first.flatten().to(device))
        groups, window = (t.to(device) for t in config.layout(config.prompts_per_batch, self.sampler.total_steps))
        own = slice(prompts.start * size, prompts.stop * size)
        window = window[own]
        is_hidden = rows.reveal_step >= window[:, 1:]
        visible = rows.completion_ids.masked_fill(is_hidden, policy.mask_token_id)
        return replace(
            rows,
            groups=groups[own],
            window=window,
            rewards=torch.cat(values, dim=1).flatten(),
            length=policy.completion_lengths(visible),
            rollout_index=iteration * self.batch_rows + torch.arange(own.start, own.stop, device=device),
            sampled_at=torch.full_like(rows.groups, iteration),
        )


def _places(held: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted number stands in `held`, which holds it once."""
    order = held.argsort()
    return order[torch.searchsorted(held[order], wanted)]
