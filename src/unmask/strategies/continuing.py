"""What strategies share that go on from a state: whether the sampler is one that can, and who holds which rows."""

from __future__ import annotations

from typing import Any, Protocol

from unmask.errors import ConfigError
from unmask.types import Sampler


class ContinuingSampler(Sampler, Protocol):
    """One whose `sample` takes a `Start`."""

    @property
    def total_steps(self) -> int:
        """Denoising steps of a completion."""
        ...


def check_continues(strategy: str, name: str, sampler: Any) -> None:
    """Raises: ConfigError if the sampler, which goes by this name, cannot begin in the middle of a completion."""
    if not getattr(sampler, "continues", False):
        raise ConfigError(
            f"rollout.type = {strategy!r}: goes on from the middle of a completion, which sampler.type = {name!r} "
            "cannot with these settings. Use 'low_confidence' (no threshold, cache or guidance), 'random_remasking', "
            "'roar' or 'dream', or rollout.type = 'groups'."
        )


def whole_prompts(rows: slice, rows_per_prompt: int, strategy: str) -> range:
    """Numbers of the prompts that make up these rows of a batch.

    Raises: ConfigError if a prompt's rows are not all among them.
    """
    if rows.start % rows_per_prompt or rows.stop % rows_per_prompt:
        raise ConfigError(
            f"rollout.type = {strategy!r}: the {rows_per_prompt} rows of a prompt belong to one process, and a share "
            f"of {rows.stop - rows.start} rows cuts them. Make rollout.prompts_per_batch a multiple of the processes."
        )
    return range(rows.start // rows_per_prompt, rows.stop // rows_per_prompt)
