"""A model behind the interface of lm-evaluation-harness, there called `unmask`; docs/lm-eval.md explains its use.

The harness imports this file when `--model unmask` is asked for: `_auto.py` tells its registry.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from unmask import __version__
from unmask.api import complete, decoding, elbo, given_rollouts, open_model
from unmask.errors import ConfigError
from unmask.models import MaskedPolicy
from unmask.noise import Noise
from unmask.optional import optional
from unmask.types import PromptBatch, take_rows

if TYPE_CHECKING:
    LM = object
else:
    LM = optional("lm_eval.api.model", "lm-eval").LM

GEN_LENGTH = 256
"""Canvas tokens where neither the user nor the task says how many; the harness's own number."""

TASK_NAMES = {"max_gen_toks": "gen_length", "max_new_tokens": "gen_length", "max_tokens": "gen_length"}
"""What tasks call a sampler's settings."""

log = logging.getLogger(__name__)


class UnmaskLM(LM):
    """Completions by a sampler, log-likelihoods by the ELBO; requests are the harness's `Instance` objects.

    Rows are keyed by their place among the requests of their task: no result depends on the batch size, or on which
    tasks are evaluated together.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        sampler: str = "low_confidence",
        num_masks: int = 128,
        coupled: bool = True,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        **settings: Any,
    ):
        """`pretrained` is what `unmask.load` takes, or a run directory; `settings` are the sampler's, and go before the
        task's. `num_masks`, `coupled` and `seed` as for `unmask.elbo`; `batch_size` counts the rows of a forward.

        Raises: ConfigError for a wrong setting, before the model is loaded; ModelError.
        """
        super().__init__()
        self.num_masks, self.coupled = checked_masks(num_masks, coupled)
        self.sampler, self.settings, self.seed = sampler, settings, seed
        self.batch_size = checked_batch_size(batch_size)
        self.not_used: set[str] = set()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed = {seed!r}: must be an integer. Try 0.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"{os.environ['WORLD_SIZE']} processes: --model unmask runs in one, the others would repeat it. "
                "Start it without a launcher."
            )
        self.decoder({})
        self.policy = open_model(str(pretrained))
        place(self.policy, device)

    # ---- completions

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The completion of each (context, settings of the task), cut before the first of the `until` texts."""
        texts = [""] * len(requests)
        for numbers in groups(requests, by_settings=True):
            contexts = [self.context(requests[number].args[0]) for number in numbers]
            asked = dict(requests[numbers[0]].args[1])
            until = asked.pop("until", None) or []
            decoder = self.decoder(asked)
            steps = getattr(decoder, "total_steps", None)  # only for the bar
            total = steps and steps * -(-len(numbers) // self.batch_size)
            with tqdm(total=total, desc="unmask: generating", unit="step", disable=disable_tqdm) as bar:
                found = complete(
                    self.policy,
                    contexts,
                    decoder,
                    seed=self.seed,
                    batch_size=self.batch_size,
                    on_step=lambda _, bar=bar: bar.update(),  # type: ignore[misc]
                )
            for number, text in zip(numbers, found, strict=True):
                texts[number] = cut(text, [until] if isinstance(until, str) else until)
        return texts

    def decoder(self, asked: Mapping[str, Any]) -> Any:
        """The sampler with the user's settings, then those that a task asks for, then its own.

        Raises: ConfigError for a setting of the user that the sampler does not have or allow. One of the task that it
        does not have is named once in the log.
        """
        own = {"gen_length", *getattr(decoding(None, self.sampler, gen_length=1).value, "__dataclass_fields__", {})}
        wanted = {TASK_NAMES.get(name, name): value for name, value in asked.items() if name != "do_sample"}
        if asked.get("do_sample") is False:
            wanted = {name: value for name, value in wanted.items() if name not in ("top_p", "top_k")}
            wanted["temperature"] = 0.0
        for name in sorted(wanted.keys() - own - self.not_used):
            log.warning("%s = %r of the task is not used: %s has no such setting", name, wanted[name], self.sampler)
            self.not_used.add(name)
        fields = {"gen_length": GEN_LENGTH, **{name: wanted[name] for name in wanted.keys() & own}, **self.settings}
        return decoding(None, self.sampler, **fields).value

    # ---- likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ELBO in nats, whether greedy decoding writes it) of each (context, continuation).

        The ELBO is that of `unmask.elbo`, a lower bound on log p of a canvas of exactly the continuation's tokens.
        Greedy decoding fills that canvas by `low_confidence` at temperature 0, one token a step.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers in groups(requests):
            contexts = [self.context(requests[number].args[0]) for number in numbers]
            continuations = [requests[number].args[1] for number in numbers]
            values = self.bounds(contexts, continuations).tolist()
            for number, value, greedy in zip(numbers, values, self.are_greedy(contexts, continuations), strict=True):
                results[number] = (value, greedy)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The ELBO of each text in nats; a text that does not fit the model is the sum of parts that do."""
        results = [0.0] * len(requests)
        for numbers in groups(requests):
            texts = [requests[number].args[0] for number in numbers]
            parts = [(number, part) for number, text in zip(numbers, texts, strict=True) for part in self.parts(text)]
            values = self.bounds([self.context("")] * len(parts), [part for _, part in parts]).tolist()
            for (number, _), value in zip(parts, values, strict=True):
                results[number] += value
        return results

    def bounds(self, contexts: Sequence[str], continuations: Sequence[str]) -> Tensor:  # (B,) float64, nats
        return elbo(
            self.policy,
            contexts,
            continuations,
            num_masks=self.num_masks,
            coupled=self.coupled,
            seed=self.seed,
            micro_batch_size=self.batch_size,
        )

    def are_greedy(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[bool]:
        """Whether greedy decoding after each context gives the tokens of its continuation."""
        found = [False] * len(contexts)
        for rows in given_rollouts(self.policy, contexts, continuations, None):
            sampler = decoding(None, "low_confidence", gen_length=rows.completion_length).value
            for start in range(0, len(rows), self.batch_size):
                part = take_rows(rows, slice(start, start + self.batch_size))
                prompts = PromptBatch(part.prompt_ids, part.prompt_mask, part.prompt_key, part.rollout_index)
                samples = sampler.sample(self.policy, prompts, noise=Noise(self.seed))  # draws none at temperature 0
                equal = (samples.completion_ids == part.completion_ids).all(dim=1)
                for row, is_equal in zip(part.prompt_key.tolist(), equal.tolist(), strict=True):
                    found[row] = is_equal
        return found

    def parts(self, text: str) -> list[str]:
        """The text in pieces that fit the model behind the empty context, halved at spaces where there are any."""
        num_tokens = len(self.policy.encode(text))
        if num_tokens < self.policy.max_length:
            return [text] if num_tokens else []
        space = text.rfind(" ", 1, len(text) // 2 + 1)
        middle = space if space > 0 else len(text) // 2
        return self.parts(text[:middle]) + self.parts(text[middle:])

    # ---- prompts

    def context(self, text: str) -> str:
        """The text; for an empty one the model's first-token text, else its stop token's: no prompt may be empty."""
        tokenizer = self.policy.tokenizer
        return text or tokenizer.bos_token or tokenizer.decode(self.policy.stop_token_ids[:1])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the model reads them. Without generation prompt the last one is left open, to be gone on with.

        Raises: ModelError for a model without a chat template.
        """
        text = self.policy.render(chat_history)
        if add_generation_prompt:
            return text
        template = self.policy.tokenizer.apply_chat_template
        return str(template(chat_history, tokenize=False, continue_final_message=True))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for the harness's records. Raises: ConfigError for one asked for by name."""
        if isinstance(chat_template, str):
            raise ConfigError(
                f"--apply_chat_template {chat_template}: a model has one chat template here. Leave out the name."
            )
        return str(self.policy.tokenizer.chat_template or "")

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's caches of prompts."""
        return self.policy.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Entries of `config` in the harness's results."""
        return {
            "unmask_version": __version__,
            "sampler": self.sampler,
            "sampler_settings": self.settings,
            "likelihood": f"ELBO, a lower bound, {self.num_masks} masked copies",
            "unmask_seed": self.seed,
        }


def groups(requests: Sequence[Any], by_settings: bool = False) -> Iterator[list[int]]:
    """Places of the requests of each task, and of each setting of it."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, request in enumerate(requests):
        settings = json.dumps(request.args[1], sort_keys=True) if by_settings else ""
        found.setdefault((str(request.task_name), settings), []).append(number)
    yield from found.values()


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [text.find(stop) for stop in until if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def place(policy: MaskedPolicy, device: str | None) -> None:
    """Move the model to the device. The harness asks for cuda:0 unless told otherwise, so an accelerator that is not
    there leaves the model where it is. Raises: ConfigError for a name that torch does not know."""
    if device is None:
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device = {device!r}: no device of torch. Try cpu or cuda:0.") from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted.type == "cpu" or (here is not None and wanted.type == here.type):
        policy.module.to(wanted)


def checked_masks(num_masks: Any, coupled: Any) -> tuple[int, bool]:
    """Raises: ConfigError unless masks can be drawn in this number."""
    if not isinstance(coupled, bool):
        raise ConfigError(f"coupled = {coupled!r}: must be true or false.")
    if isinstance(num_masks, bool) or not isinstance(num_masks, int) or num_masks < 1 or (coupled and num_masks % 2):
        raise ConfigError(
            f"num_masks = {num_masks!r}: must be at least 1 masked copy, and even unless coupled=false. Try 128."
        )
    return num_masks, coupled


def checked_batch_size(batch_size: Any) -> int:
    """Raises: ConfigError for "auto" and other texts, and numbers below 1."""
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ConfigError(f"batch_size = {batch_size}: must be the number of rows of a forward. Try --batch_size 16.")
    return int(batch_size)
