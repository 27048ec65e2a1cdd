"""An engine in a process of its own: it holds a second copy of the model and answers over pipes.

A server on other machines has the same two methods. Everything goes as files that are safe to read and lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import unmask
from unmask.noise import Noise
from unmask.samplers import SAMPLERS
from unmask.types import PromptBatch


class SecondProcess:
    """`OWN_ENGINE_MODEL` names the model directory that the process starts from."""

    def __init__(self):
        command = [sys.executable, __file__, os.environ["OWN_ENGINE_MODEL"]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = tempfile.TemporaryDirectory()

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def push(self, weights):
        file = Path(self.folder.name) / "weights.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights}, file)
        self.ask(weights=str(file))

    def complete(self, prompts, *, gen_length, temperature, seeds):
        return self.ask(prompts=prompts, gen_length=gen_length, temperature=temperature, seeds=seeds)


def answer(policy, question):
    """What the process says to one line."""
    if "weights" in question:
        policy.module.load_state_dict(load_file(question["weights"]), strict=False)  # tied tensors come once
        return True
    longest = max(map(len, question["prompts"]))
    ids = torch.tensor([[policy.pad_token_id] * (longest - len(row)) + row for row in question["prompts"]])
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in question["prompts"]])
    seeds = torch.tensor(question["seeds"])
    sampler = SAMPLERS["roar"](gen_length=question["gen_length"], temperature=question["temperature"])
    samples = sampler.sample(policy, PromptBatch(ids, mask, seeds, torch.zeros_like(seeds)), noise=Noise(0))
    return samples.completion_ids.tolist()


if __name__ == "__main__":
    model = unmask.load(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), flush=True)
