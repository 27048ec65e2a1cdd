"""Low-confidence sampling against the published sampler (LLaDA, arXiv:2502.09992; d1, arXiv:2504.12216).

The published sampler computes logits, noise and softmax of the whole canvas in every step and picks the surest
positions row by row. At temperature 0 both must write the same tokens, which is asserted; above it they draw from the
same law with different noise. One deviation: the published code may write the mask token, here neither side may.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import full_size
import torch
from common import (
    Geometry,
    Seconds,
    Stopwatch,
    device_of,
    geometry_of,
    geometry_parser,
    machine,
    markdown_table,
    random_policy,
    random_text,
)
from torch import Tensor, nn

from unmask.models import MaskedPolicy
from unmask.noise import Noise
from unmask.samplers import LowConfidence
from unmask.types import PromptBatch, Samples

PublishedSampler = Callable[..., Tensor]


@torch.no_grad()
def published_sampler(
    module: nn.Module,  # canvas (B, T) -> .logits (B, T, V)
    prompt_ids: Tensor,  # (B, P)
    geometry: Geometry,
    watch: Stopwatch,
    *,
    temperature: float,
    noise_dtype: torch.dtype,
    num_steps: int,  # stop after so many
    generator: torch.Generator,
) -> Tensor:  # (B, P + L), mask tokens left where it was stopped before they were filled
    """LLaDA's `generate` as d1 publishes it, with logits and softmax in float32. One lap of `watch` for each step."""
    mask_id = module.config.mask_token_id
    masks = prompt_ids.new_full((len(prompt_ids), geometry.tokens), mask_id)
    canvas = torch.cat([prompt_ids, masks], 1)
    steps_per_block = geometry.steps // (geometry.tokens // geometry.block)
    for block_end in range(geometry.prompt + geometry.block, canvas.shape[1] + 1, geometry.block):
        quota = transfer_counts((canvas == mask_id)[:, block_end - geometry.block : block_end], steps_per_block)
        for step in range(steps_per_block):
            if watch.laps == num_steps:
                return canvas
            watch.start()
            is_open = canvas == mask_id
            logits = module(canvas).logits.float()
            logits[..., mask_id] = float("-inf")
            tokens = add_gumbel_noise(logits, temperature, noise_dtype, generator).argmax(-1)
            probability = logits.softmax(-1)
            confidence = probability.gather(-1, tokens[..., None]).squeeze(-1)
            confidence[:, block_end:] = float("-inf")
            confidence = confidence.where(is_open, float("-inf"))
            for row in range(len(canvas)):
                chosen = confidence[row].topk(int(quota[row, step])).indices
                canvas[row, chosen] = tokens[row, chosen]
            watch.stop()
    return canvas


def add_gumbel_noise(logits: Tensor, temperature: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """exp(logits) / (-log u)^temperature, whose argmax is a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return logits
    logits = logits.to(dtype)
    u = torch.rand(logits.shape, dtype=dtype, device=logits.device, generator=generator)
    return logits.exp() / (-u.log()) ** temperature


def transfer_counts(is_open: Tensor, num_steps: int) -> Tensor:
    """(B, num_steps): tokens to fix in each step of a block, the remainder in its first steps."""
    count = is_open.sum(1, keepdim=True)
    return count // num_steps + (torch.arange(num_steps, device=is_open.device) < count % num_steps)


def check_same_tokens(samples: Samples, reference: Tensor, num_steps: int) -> int:
    """Number of tokens compared: those fixed in the first `num_steps` steps. Raises: AssertionError if one differs."""
    compared = samples.reveal_step < num_steps
    same = samples.completion_ids == reference[:, -samples.completion_ids.shape[1] :]
    wrong = int((compared & ~same).sum())
    assert wrong == 0, f"{wrong} of {int(compared.sum())} tokens differ from the published sampler at temperature 0"
    return int(compared.sum())


@dataclass(frozen=True)
class Timing:
    """One sampler on one batch; `measured_steps` below `geometry.steps` means that the rest is extrapolated."""

    name: str
    temperature: float
    seconds: Seconds
    measured_steps: int


@dataclass(frozen=True)
class Comparison:
    """Everything the report says."""

    ours: list[Timing]
    reference: list[Timing]
    same_tokens: int
    share: Seconds
    """Layers and head of ours at temperature 0, as a share of its time."""


def time_ours(
    policy: MaskedPolicy, prompts: PromptBatch, geometry: Geometry, temperature: float
) -> tuple[Samples, Timing, Seconds]:
    """Samples, the whole time, and the part of it inside the backbone and the head."""
    whole, inside = Stopwatch(policy.device), Stopwatch(policy.device)
    sampler = LowConfidence(geometry.tokens, geometry.block, geometry.steps, temperature)
    parts = (policy.module.model, policy.module.lm_head)
    handles = [part.register_forward_pre_hook(inside.start) for part in parts]
    handles += [part.register_forward_hook(inside.stop) for part in parts]
    samples = whole.time(partial(sampler.sample, policy, prompts, noise=Noise(seed=0)))
    for handle in handles:
        handle.remove()
    share = Seconds(inside.total.wall / whole.total.wall, inside.total.cpu / whole.total.cpu)
    return samples, Timing("unmask", temperature, whole.total, geometry.steps), share


def compare(
    geometry: Geometry,
    *,
    device: torch.device,
    seed: int = 0,
    temperature: float = 0.9,
    greedy_steps: int,
    sampled_steps: int,
    reference: PublishedSampler = published_sampler,
) -> Comparison:
    """Both samplers at temperature 0 and at `temperature`. Raises: AssertionError if tokens differ at 0."""
    policy = random_policy(geometry, seed=seed, device=device)
    prompts = random_prompts(geometry, seed=seed, device=device)
    LowConfidence(geometry.block, num_steps=1).sample(policy, prompts, noise=Noise(0))  # warm up

    def time_reference(name: str, temperature: float, dtype: torch.dtype, num_steps: int) -> tuple[Tensor, Timing]:
        watch = Stopwatch(device)
        settings = {"temperature": temperature, "noise_dtype": dtype, "num_steps": num_steps}
        generator = torch.Generator(device).manual_seed(seed)
        ids = reference(policy.module, prompts.prompt_ids, geometry, watch, generator=generator, **settings)
        return ids, Timing(name, temperature, watch.total * (geometry.steps / watch.laps), watch.laps)

    samples, greedy, share = time_ours(policy, prompts, geometry, 0.0)
    ids, greedy_reference = time_reference("published", 0.0, torch.float32, greedy_steps)
    same = check_same_tokens(samples, ids, greedy_reference.measured_steps)
    _, drawn, _ = time_ours(policy, prompts, geometry, temperature)
    _, single = time_reference("published, float32 noise (d1)", temperature, torch.float32, sampled_steps)
    _, double = time_reference("published, float64 noise (LLaDA)", temperature, torch.float64, sampled_steps)
    return Comparison([greedy, drawn], [greedy_reference, single, double], same, share)


class _Enough(Exception):
    """Ends a sampler early."""


def sample_steps(policy: MaskedPolicy, prompts: PromptBatch, geometry: Geometry, num_steps: int) -> None:
    """The first denoising steps, at temperature 0."""
    left = num_steps

    def count_down(_: Tensor) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Enough

    sampler = LowConfidence(geometry.tokens, geometry.block, geometry.steps)
    try:
        sampler.sample(policy, prompts, noise=Noise(seed=0), on_step=count_down)
    except _Enough:
        return
    assert num_steps == geometry.steps, "the sampler took fewer steps than it was asked for"


def full_size_report(name: str, *, seed: int, repeats: int) -> str:
    """Markdown: seconds, tokens/s, peak and share of the ceiling by batch size.

    One block is run and stands for all: every block passes the whole canvas through the layers, and its open positions
    through the head, equally often.
    """
    shape, device = full_size.SHAPES[name], full_size.shape_device(name)
    geometry = shape.geometry
    num_blocks = geometry.tokens // geometry.block
    num_steps = geometry.steps // num_blocks
    labels = ("batch", "steps measured")
    rows = [[str(batch), f"first {num_steps} of {geometry.steps}, extrapolated"] for batch in shape.sampler_batches]
    if device is None:
        return f"{full_size.heading(name, None, None)}\n\n{full_size.table(labels, rows)}"
    ceiling = full_size.matmul_ceiling(shape, device)
    policy = full_size.build_policy(shape, device, seed=seed)
    length = geometry.prompt + geometry.tokens
    open_slots = sum(range(geometry.block, 0, -geometry.block // num_steps))  # of one row, over the steps of a block
    for row, batch in zip(rows, shape.sampler_batches, strict=True):
        prompts = random_prompts(dataclasses.replace(geometry, batch=batch), seed=seed, device=device)
        run = partial(sample_steps, policy, prompts, geometry, num_steps)
        measured = full_size.measure(run, device, repeats=repeats)
        flops = full_size.Work(batch * length * num_steps, length, batch * open_slots).forward(policy.module)
        row += full_size.cells(measured, batch * geometry.tokens, flops, ceiling, scale=num_blocks)
    return f"{full_size.heading(name, device, ceiling)}\n\n{full_size.table(labels, rows)}"


SETTINGS = {
    "every step whole": {},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.9, dual cache": {"threshold": 0.9, "cache": "dual"},
}
"""Of `low_confidence`; without a threshold with the geometry's steps. The first is what tokens are compared with."""


def settings_report(
    geometry: Geometry, *, device: torch.device, seed: int, batches: Sequence[int], reference_steps: int, sharpness: int
) -> str:
    """Markdown: time against the published sampler, forwards, and tokens equal to those without cache and threshold.

    Random weights are sure of nothing, so the head's are multiplied by `sharpness`; the time of a forward is the same.
    """
    policy = random_policy(geometry, seed=seed, device=device)
    policy.module.lm_head.weight.data *= sharpness
    rows = []
    for batch in batches:
        sized = dataclasses.replace(geometry, batch=batch)
        prompts = random_prompts(sized, seed=seed, device=device)
        watch, generator = Stopwatch(device), torch.Generator(device).manual_seed(seed)
        options = {"temperature": 0.0, "noise_dtype": torch.float32, "num_steps": reference_steps}
        published_sampler(policy.module, prompts.prompt_ids, sized, watch, generator=generator, **options)
        published = watch.total * (geometry.steps / watch.laps)
        steps = "all" if watch.laps == geometry.steps else f"first {watch.laps}, extrapolated"
        rows.append([str(batch), "published", steps, f"{geometry.steps}", *seconds_cells(published, published), ""])
        plain: Tensor | None = None
        for name, fields in SETTINGS.items():
            sampler = LowConfidence(geometry.tokens, geometry.block, geometry.steps, **fields)
            clock = Stopwatch(device)
            samples = clock.time(partial(sampler.sample, policy, prompts, noise=Noise(seed=0)))
            plain = samples.completion_ids if plain is None else plain
            same = float((samples.completion_ids == plain).double().mean())
            forwards = f"{float(samples.nfe.double().mean()):.1f}"
            rows.append([str(batch), name, "all", forwards, *seconds_cells(clock.total, published), f"{same:.1%}"])
    head = ["batch", "setting", "steps measured", "forwards", "wall, s", "CPU, s"]
    return markdown_table([*head, "published / wall", "published / CPU", "same tokens"], rows)


def seconds_cells(seconds: Seconds, published: Seconds) -> list[str]:
    """Time, and how many times that of the published sampler is longer."""
    ratios = (published.wall / seconds.wall, published.cpu / seconds.cpu)
    return [f"{seconds.wall:.1f}", f"{seconds.cpu:.1f}", *(f"{ratio:.1f}" for ratio in ratios)]


def random_prompts(geometry: Geometry, *, seed: int, device: torch.device) -> PromptBatch:
    ids = random_text(geometry, geometry.batch, geometry.prompt, seed=seed + 1, device=device)
    row = torch.arange(geometry.batch, device=device)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), row, torch.zeros_like(row))


def report(result: Comparison, geometry: Geometry) -> str:
    """Markdown: a table of times, and the two facts about temperature 0."""
    ours = {timing.temperature: timing.seconds for timing in result.ours}
    rows = []
    for timing in sorted(result.ours + result.reference, key=lambda t: t.temperature):
        seconds, best = timing.seconds, ours[timing.temperature]
        is_whole = timing.measured_steps == geometry.steps
        steps = "all" if is_whole else f"first {timing.measured_steps}, extrapolated"
        cells = [f"{timing.temperature:g}", timing.name, steps, f"{seconds.wall:.1f}", f"{seconds.cpu:.1f}"]
        rows.append([*cells, f"{seconds.wall / best.wall:.2f}", f"{seconds.cpu / best.cpu:.2f}"])
    head = ["temperature", "sampler", "steps measured", "wall, s", "CPU, s", "wall / unmask", "CPU / unmask"]
    total = geometry.batch * geometry.tokens
    facts = (
        f"Temperature 0: {result.same_tokens} of {total} tokens compared, all identical. Layers and head take "
        f"{result.share.wall:.1%} of unmask's wall time ({result.share.cpu:.1%} of its CPU time)."
    )
    return f"{markdown_table(head, rows)}\n\n{facts}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = geometry_parser(__doc__.splitlines()[0])
    full_size.add_options(parser, "settings")
    parser.add_argument("--batches", default="1,4", help="batch sizes of the section of settings")
    parser.add_argument("--sharpness", type=int, default=16, help="factor of the head's weights in that section")
    parser.add_argument("--temperature", type=float, default=0.9, help="of the second comparison")
    parser.add_argument("--reference-steps", type=int, default=None, help="published sampler at 0: default all")
    parser.add_argument("--sampled-reference-steps", type=int, default=None, help="and above 0: default all")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    geometry, device = geometry_of(options), device_of(options)
    if options.section in ("all", "comparison"):
        result = compare(
            geometry,
            device=device,
            seed=options.seed,
            temperature=options.temperature,
            greedy_steps=options.reference_steps or geometry.steps,
            sampled_steps=options.sampled_reference_steps or geometry.steps,
        )
        print(f"{machine(device)}\n\n{geometry}\n\n{report(result, geometry)}\n")
    if options.section in ("all", "settings"):
        text = settings_report(
            geometry,
            device=device,
            seed=options.seed,
            batches=[int(batch) for batch in options.batches.split(",")],
            reference_steps=options.reference_steps or geometry.steps,
            sharpness=options.sharpness,
        )
        print(f"{machine(device)}\n\n{geometry}\n\n{text}\n")
    if options.section in ("all", "shape"):
        print(full_size_report(options.shape, seed=options.seed, repeats=options.shape_repeats))


if __name__ == "__main__":
    main()
