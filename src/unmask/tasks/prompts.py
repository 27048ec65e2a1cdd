"""Prompt texts that several papers' tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Messages = list[dict[str, str]]

XML_INSTRUCTION = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
"""d1 (arXiv:2504.12216): in front of every question of its training."""

D1_BOXED_SYSTEM = """You are a math expert. You will be given a question to solve. Solve it step by step. Wrap the \
final answer in a \\boxed{}.
Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
\\boxed{...}
</answer>"""
"""d1's evaluation of GSM8K and MATH."""

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""ESPO (arXiv:2512.03759), behind every mathematical question."""


def opened(prompt: str | Messages, opening: str) -> str | Messages:
    """A chat prompt whose answer begins with a given text: a last turn of the assistant. Plain text stays as it is."""
    if not opening or isinstance(prompt, str):
        return prompt
    return [*prompt, {"role": "assistant", "content": opening}]


def with_opening(prompt: str | Messages, completion: str) -> str:
    """The whole answer: what the prompt begins it with, and the completion."""
    if isinstance(prompt, str) or not prompt or prompt[-1]["role"] != "assistant":
        return completion
    return prompt[-1]["content"] + completion


@dataclass(frozen=True)
class PromptStyle:
    """How a question is put to the model: a template with {names}, as chat messages or as plain text."""

    template: str
    is_chat: bool = True
    system: str = ""
    opening: str = ""
    """What answers begin with in a chat prompt, unless the task says."""

    def render(self, values: Mapping[str, str], shots: Messages | None = None) -> str | Messages:
        """The prompt; `shots` are turns of examples that stand before the question."""
        text = self.template
        for name, value in values.items():  # str.format would trip over other braces
            text = text.replace("{" + name + "}", value)
        if not self.is_chat:
            return text
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(shots or []), {"role": "user", "content": text}]
