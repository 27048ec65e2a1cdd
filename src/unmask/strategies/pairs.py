"""Preference pairs from a file as batches; alone, or for the first batches of a run that then rolls out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from unmask.errors import ConfigError, DataError
from unmask.preferences import Preference
from unmask.rollout import GroupSource, TextPolicy, given
from unmask.types import NoiseLike, Rollouts


@dataclass(frozen=True)
class OfflineConfig:
    """Preference pairs to learn from, instead of rollouts or before them."""

    file: str
    """JSON lines or a JSON array of prompt, chosen and rejected (docs/data.md), a file that the package datasets reads,
    or a hub id (owner/name)."""
    split: str = "train"
    """Split of a data set of the hub."""
    batch_size: int = 64
    """Pairs per batch, each two rows. Each pair comes once an epoch, in an order of its own. LLaDA 1.5: 64."""
    gen_length: int | None = None
    """L, canvas tokens of an answer. None: the sampler's, or what the task declares."""
    num_batches: int = 0
    """The first so many batches come from the file, all others are rolled out. 0: all come from the file, and [rollout]
    and [sampler] are not used."""

    strategy: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        for key, least, example in (("batch_size", 1, 64), ("gen_length", 1, 256), ("num_batches", 0, 100)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"data.{key} = {value}: must be at least {least}. Try {example}.")

    @property
    def batch_rows(self) -> int:
        """B."""
        return 2 * self.batch_size


@dataclass
class PairSource:
    """Pairs as groups of two rows, the chosen answer first; rewards are the scores."""

    pairs: Sequence[Preference]
    gen_length: int
    num_pairs: int
    noise: NoiseLike

    @property
    def batch_rows(self) -> int:
        return 2 * self.num_pairs

    def collect(self, policy: TextPolicy, iteration: int, rows: slice) -> Rollouts:
        chosen = range(self.batch_rows)[rows]
        places = self.places(iteration)
        pairs = [self.pairs[places[row // 2]] for row in chosen]
        texts = [(p.example, p.rejected if row % 2 else p.chosen) for row, p in zip(chosen, pairs, strict=True)]
        numbers = torch.tensor(list(chosen))
        rollouts = given(policy, texts, self.gen_length, iteration * self.batch_rows + numbers, numbers // 2)
        scores = [p.rejected_score if row % 2 else p.chosen_score for row, p in zip(chosen, pairs, strict=True)]
        return replace(rollouts, rewards=torch.tensor(scores, dtype=torch.float64, device=policy.device))

    def places(self, iteration: int) -> list[int]:
        """Which pairs make up a batch: epoch after epoch, each a keyed permutation of all."""
        size, first = len(self.pairs), iteration * self.num_pairs
        found: list[int] = []
        while len(found) < self.num_pairs:
            epoch, place = divmod(first + len(found), size)
            order = self.noise.stream("prompts").uniform(epoch, torch.arange(size)).argsort(stable=True)
            found += order[place : place + self.num_pairs - len(found)].tolist()
        return found

    def check(self, policy: TextPolicy) -> None:
        """Raises: DataError, with the place in the file, for the first pair that does not fit the model."""
        for pair in self.pairs:
            try:
                policy.encode_prompts([policy.render(pair.example.prompt)], self.gen_length)
                policy.encode_completions([pair.chosen, pair.rejected], self.gen_length)
            except DataError as error:
                raise DataError(f"{pair.where}: {error}") from error


@dataclass
class OfflineThenOnline:
    """The first batches from a file, the others rolled out."""

    offline: PairSource
    online: GroupSource
    num_batches: int

    @property
    def batch_rows(self) -> int:
        """Of the batches that are rolled out."""
        return self.online.batch_rows

    def collect(self, policy: TextPolicy, iteration: int, rows: slice) -> Rollouts:
        if iteration >= self.num_batches:
            return self.online.collect(policy, iteration, rows)
        shares = self.online.batch_rows // (rows.stop - rows.start)  # of how many processes
        size = self.offline.batch_rows // shares
        first = rows.start // (rows.stop - rows.start) * size
        return self.offline.collect(policy, iteration, slice(first, first + size))
