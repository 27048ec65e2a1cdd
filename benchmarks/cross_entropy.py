"""Head and cross-entropy alone, by every way that this machine has: time and memory at LLaDA's vocabulary.

Time is the process's CPU time, or wall time on a GPU. Memory is the peak above inputs, weights and their gradients. The
head is frozen (adapters) or trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Stopwatch, machine, markdown_table
from scoring import status_bytes, ways_here
from torch import Tensor

from unmask.models.outputs import summarise_hidden

MASK = 2


def head_inputs(rows: int, width: int, vocab: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Hidden states (N, H), weight (V, H) with logits of spread 1, targets (N,) other than the mask token."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * width**-0.5
    targets = torch.randint(MASK + 1, vocab, (rows,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def peak_above(function: Callable[[], object], device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, else that of the resident set (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    function()
    return status_bytes("VmHWM") - before


def row_of(name: str, inputs: tuple[Tensor, ...], *, is_frozen: bool, repeats: int) -> tuple[float, float, int]:
    """Seconds of the quickest forward and backward pass, and the peak of the last of both together."""
    hidden, weight, targets = inputs
    hidden.requires_grad_()
    weight.requires_grad_(not is_frozen)
    device = hidden.device
    forwards, backwards = [], []
    for _ in range(repeats):
        for leaf in (hidden, weight):
            leaf.grad = torch.ones_like(leaf) if leaf.requires_grad else None  # in place before the peak is counted
        forward, backward = Stopwatch(device), Stopwatch(device)

        def both(forward: Stopwatch = forward, backward: Stopwatch = backward) -> None:
            score = partial(summarise_hidden, hidden, weight, targets, ("logp",), MASK, name)
            logp = forward.time(score).logp
            backward.time(logp.sum().backward)

        peak = peak_above(both, device)
        forwards.append(forward)
        backwards.append(backward)
    clock = "wall" if device.type == "cuda" else "cpu"
    forward_s, backward_s = (min(getattr(w.total, clock) for w in watches) for watches in (forwards, backwards))
    return forward_s, backward_s, peak


def table(names: list[str], inputs: tuple[Tensor, ...], *, repeats: int) -> str:
    """Markdown, ratios to `plain`."""
    rows = []
    for is_frozen in (True, False):
        found = {name: row_of(name, inputs, is_frozen=is_frozen, repeats=repeats) for name in names}
        base = sum(found["plain"][:2])
        for name, (forward, backward, peak) in found.items():
            times = [f"{forward:.3g}", f"{backward:.3g}", f"{(forward + backward) / base:.2f}"]
            rows.append(["frozen" if is_frozen else "trained", name, *times, f"{peak / 2**20:.0f}"])
    head = ["head", "cross-entropy", "forward, s", "backward, s", "both / plain", "peak, MiB"]
    return markdown_table(head, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512, help="N, scored positions")
    parser.add_argument("--width", type=int, default=512, help="H")
    parser.add_argument("--vocab", type=int, default=126_464, help="V")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--gpu", action="store_true", help="measure on the first CUDA device, in bfloat16")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.gpu else "cpu")
    dtype = torch.bfloat16 if options.gpu else torch.float32
    inputs = head_inputs(options.rows, options.width, options.vocab, dtype=dtype, device=device)
    names, missing = ways_here()
    sizes = f"N = {options.rows}, H = {options.width}, V = {options.vocab}, {dtype}"
    print("\n\n".join([machine(device), sizes, table(names, inputs, repeats=options.repeats), *missing]))


if __name__ == "__main__":
    main()
