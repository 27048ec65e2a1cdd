"""The published samplers of LLaDA (arXiv:2502.09992), Dream (arXiv:2508.15487) and SDAR (arXiv:2510.06303) without any
of our shortcuts: slow, plain, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unmask.types import NoiseLike, Policy, PromptBatch


def reference_low_confidence(
    policy: Policy,
    prompt_ids: Tensor,  # (B, P)
    prompt_mask: Tensor,  # (B, P)
    gen_length: int,
    block_length: int,
    num_steps: int,
    *,
    temperature: float = 0.0,
    softmax_dtype: torch.dtype = torch.float64,
    gumbel_dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # (B, L) ids, (B, L) step in which each was fixed
    """Logits, candidates and softmax over the whole canvas in every step; top-k by confidence row by row."""
    batch, prompt_length = prompt_ids.shape
    canvas = torch.cat([prompt_ids, torch.full((batch, gen_length), policy.mask_token_id)], dim=1)
    seen = torch.cat([prompt_mask, torch.ones(batch, gen_length, dtype=torch.bool)], dim=1)
    is_open = torch.zeros_like(seen)
    is_open[:, prompt_length:] = True
    fixed_at = torch.full((batch, gen_length), -1)
    steps_per_block = num_steps // (gen_length // block_length)
    forward = 0
    for block_end in range(prompt_length + block_length, prompt_length + gen_length + 1, block_length):
        quota = []
        for row in range(batch):
            num_open = int(is_open[row, :block_end].sum())
            shares = [num_open // steps_per_block] * steps_per_block
            for late in range(num_open - sum(shares)):
                shares[late] += 1
            quota.append(shares)
        for step in range(steps_per_block):
            output = policy.token_outputs(canvas, seen, torch.ones_like(seen), want=("logits",))
            logits = output.logits.view(batch, canvas.shape[1], -1)
            candidates = _candidates(logits, temperature, gumbel_dtype, generator)
            probability = torch.softmax(logits.to(softmax_dtype), dim=-1)
            confidence = torch.gather(probability, -1, candidates.unsqueeze(-1)).squeeze(-1)
            confidence[:, block_end:] = float("-inf")
            confidence[~is_open] = float("-inf")
            for row in range(batch):
                winners = torch.topk(confidence[row], quota[row][step]).indices
                canvas[row, winners] = candidates[row, winners]
                is_open[row, winners] = False
                fixed_at[row, winners - prompt_length] = forward
            forward += 1
    return canvas[:, prompt_length:], fixed_at


def _candidates(logits: Tensor, temperature: float, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """argmax of logits plus temperature times Gumbel noise."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    uniforms = torch.rand(logits.shape, dtype=dtype, generator=generator)
    return (logits.to(dtype) - temperature * torch.log(-torch.log(uniforms))).argmax(dim=-1)


def reference_dream(
    policy: Policy,
    prompts: PromptBatch,
    gen_length: int,
    num_steps: int,
    *,
    noise: NoiseLike,
    alg: str = "entropy",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float = 0.0,
) -> tuple[Tensor, Tensor]:  # (B, L) ids, (B, L) step in which each was fixed
    """The published rules for one row after the other, masked positions found by their id, one distribution at a time;
    the uniforms are those of our noise."""
    times = torch.linspace(1, 1e-3, num_steps + 1)
    finished, fixed_at = [], []
    for row in range(len(prompts)):
        canvas = prompts.prompt_ids[row].tolist() + [policy.mask_token_id] * gen_length
        seen = torch.cat([prompts.prompt_mask[row], torch.ones(gen_length, dtype=torch.bool)])[None]
        start, steps = len(canvas) - gen_length, [-1] * gen_length

        def uniform(stream: str, step: int, place: int, row: int = row, start: int = start) -> float:
            coordinates = (prompts.prompt_key[row], prompts.rollout_index[row], step, place - start)
            return float(noise.stream(stream).uniform(*coordinates))

        for step in range(num_steps):
            ids = torch.tensor([canvas])
            logits = policy.token_outputs(ids, seen, torch.ones_like(seen), want=("logits",)).logits
            masked = [place for place, token in enumerate(canvas) if token == policy.mask_token_id]
            share = 1 - times[step + 1] / times[step] if step < num_steps - 1 else torch.tensor(1.0)
            laws = {place: _cut_law(logits[place], temperature, top_p, top_k) for place in masked}
            drawn = {
                place: _invert_law(law, uniform("token", step, place)) if temperature > 0 else int(law.argmax())
                for place, law in laws.items()
            }
            if alg == "origin":
                chosen = [place for place in masked if uniform("position", step, place) < float(share)]
            else:
                score = {place: _dream_confidence(law, drawn[place], alg) for place, law in laws.items()}
                number = int(torch.tensor(float(len(masked))) * share)
                if alg_temp > 0:  # one after the other without replacement, as a race of exponential clocks
                    rate = torch.softmax(torch.tensor(list(score.values()), dtype=torch.float64) / alg_temp, 0)
                    clocks = [
                        -math.log(uniform("position", step, p)) / float(r) for p, r in zip(score, rate, strict=True)
                    ]
                    score = {place: -clock for place, clock in zip(score, clocks, strict=True)}
                chosen = sorted(score, key=lambda place, score=score: -score[place])[:number]
            for place in chosen:
                canvas[place], steps[place - start] = drawn[place], step
        finished.append(canvas[start:])
        fixed_at.append(steps)
    return torch.tensor(finished), torch.tensor(fixed_at)


def _cut_law(logits: Tensor, temperature: float, top_p: float | None, top_k: int | None) -> Tensor:
    """(V,) probabilities of one position after temperature, top-p and top-k."""
    values = (logits / temperature if temperature > 0 else logits).tolist()
    by_size = sorted(range(len(values)), key=lambda token: -values[token])
    kept = by_size
    if top_p is not None:
        law, total, kept = torch.softmax(torch.tensor(values, dtype=torch.float64), 0), 0.0, []
        for token in by_size:
            if total > top_p:
                break
            kept.append(token)
            total += float(law[token])
    if top_k is not None:
        kept = kept[:top_k]
    cut = torch.full((len(values),), float("-inf"), dtype=torch.float64)
    cut[kept] = torch.tensor(values, dtype=torch.float64)[kept]
    return torch.softmax(cut, 0)


def _invert_law(law: Tensor, u: float) -> int:
    """The first token whose cumulative probability is above u."""
    total = 0.0
    for token, probability in enumerate(law.tolist()):
        total += probability
        if total > u:
            return token
    raise AssertionError("rounding past the end")


def _dream_confidence(law: Tensor, token: int, alg: str) -> float:
    if alg == "maskgit_plus":
        return float(law[token])
    if alg == "topk_margin":
        first, second = sorted(law.tolist(), reverse=True)[:2]
        return first - second
    return sum(p * math.log(p + 1e-10) for p in law.tolist())


def reference_parallel(
    policy: Policy,
    prompts: PromptBatch,
    gen_length: int,
    block_length: int,
    chosen: Callable[[list[float], list[Tensor]], int],
    *,
    by_entropy: bool = False,
    stops: tuple[int, ...] = (),
    windows: Callable[[Tensor, Tensor, Tensor, range | None], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, L) ids, (B, L) step in which each was fixed, (B,) forwards
    """Greedy decoding in blocks, one row after the other; `chosen(surenesses, laws)`, both from the surest down, says
    how many a step fixes. `windows(ids, seen, previous whole-canvas ids, block)` gives (T, V) logits, where a test has
    a forward of its own; `block` is None in a block's first step."""
    finished, fixed_at, forwards = [], [], []
    for row in range(len(prompts)):
        canvas = prompts.prompt_ids[row].tolist() + [policy.mask_token_id] * gen_length
        seen = torch.cat([prompts.prompt_mask[row], torch.ones(gen_length, dtype=torch.bool)])[None]
        start, steps, step = len(canvas) - gen_length, [-1] * gen_length, 0
        for first in range(start, len(canvas), block_length):
            if any(token in stops for token in canvas[start:first]):
                canvas[first:], steps[first - start :] = [stops[0]] * len(canvas[first:]), [step] * len(canvas[first:])
                break
            masked, whole = list(range(first, first + block_length)), torch.tensor([canvas])
            while masked:
                ids = torch.tensor([canvas])
                if windows is None:
                    logits = policy.token_outputs(ids, seen, torch.ones_like(seen), want=("logits",)).logits
                else:
                    block = None if len(masked) == block_length else range(first, first + block_length)
                    logits = windows(ids, seen, whole, block)
                laws = {place: torch.softmax(logits[place].detach().double(), 0) for place in masked}
                sureness = {place: float(law.max()) for place, law in laws.items()}
                if by_entropy:
                    sureness = {place: float(torch.special.xlogy(law, law).sum()) for place, law in laws.items()}
                ranked = sorted(masked, key=lambda place, sureness=sureness: -sureness[place])
                number = chosen([sureness[place] for place in ranked], [laws[place] for place in ranked])
                for place in ranked[:number]:
                    canvas[place], steps[place - start] = int(laws[place].argmax()), step
                    masked.remove(place)
                step += 1
        finished.append(canvas[start:])
        fixed_at.append(steps)
        forwards.append(step)
    return torch.tensor(finished), torch.tensor(fixed_at), torch.tensor(forwards)


def reference_wino(
    laws: Callable[[Tensor, range], tuple[Tensor, Tensor]],  # of a row's canvas (T,) and block: (T, V), (n, V)
    prompt: list[int],
    mask_token_id: int,
    gen_length: int,
    block_length: int,
    *,
    low: float,
    high: float,
) -> tuple[list[int], int, int]:
    """arXiv:2507.18578 for one row at temperature 0: its tokens, the forwards, and how many tokens were taken back."""
    canvas, forwards, revoked = prompt + [mask_token_id] * gen_length, 0, 0
    for start in range(len(prompt), len(canvas), block_length):
        block, fixed_before = range(start, start + block_length), 30
        while any(canvas[i] == mask_token_id for i in block):
            law, shadow = laws(torch.tensor(canvas), block)
            forwards += 1
            sure = {i: float(law[i].max()) for i in block if canvas[i] == mask_token_id}
            held = {i: float(shadow[i - start, canvas[i]]) for i in block if canvas[i] != mask_token_id}
            best = sorted(sure, key=lambda i: -sure[i])
            limit = min(max(int(len(sure) * 0.7), 5), 20)
            accepted = [i for i in best if sure[i] > low][:limit] or best[:1]
            failed = sorted((i for i in held if held[i] < high), key=lambda i: held[i])
            failed = failed[: fixed_before - 1] if len(accepted) > 1 else []
            for i in accepted:
                canvas[i] = int(law[i].argmax())
            for i in failed:
                canvas[i] = mask_token_id
            revoked += len(failed)
            fixed_before = len(accepted)
    return canvas[len(prompt) :], forwards, revoked


def reference_block_diffusion(
    policy: Policy,
    prompts: PromptBatch,
    gen_length: int,
    steps_per_block: int,
    *,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, L) ids, (B, L) step in which each was fixed, (B,) steps
    """Greedy block diffusion of one unpadded row after the other, each forward over the whole text so far.

    `steps_per_block` is that of a whole block; the model's block size must be a multiple of it.
    """
    size, finished, fixed_at, num_steps = policy.block_size, [], [], []
    assert size is not None and size % steps_per_block == 0
    for row in range(len(prompts)):
        prompt = prompts.prompt_ids[row][prompts.prompt_mask[row]].tolist()
        text, steps, step = list(prompt), {}, 0
        while len(text) < len(prompt) + gen_length:
            text.append(policy.mask_token_id)
            if len(text) % size and len(text) < len(prompt) + gen_length:
                continue
            masked = [place for place, token in enumerate(text) if token == policy.mask_token_id]
            num_left = math.ceil(len(masked) * steps_per_block / size)
            shares = [len(masked) // num_left + (i < len(masked) % num_left) for i in range(num_left)]
            for share in shares:
                ids = torch.tensor([text])
                logits = policy.token_outputs(ids, None, torch.ones_like(ids, dtype=torch.bool)).logits
                law = torch.softmax(logits.detach(), -1)
                sureness = {place: float(law[place].max()) for place in masked}
                by_sureness = sorted(masked, key=lambda place, sureness=sureness: -sureness[place])
                above = [place for place in by_sureness if threshold is not None and sureness[place] > threshold]
                for place in by_sureness[: max(share, len(above))]:
                    text[place], steps[place] = int(law[place].argmax()), step
                    masked.remove(place)
                step += 1
                if not masked:
                    break
        finished.append(text[len(prompt) :])
        fixed_at.append([steps[place] for place in range(len(prompt), len(text))])
        num_steps.append(step)
    return torch.tensor(finished), torch.tensor(fixed_at), torch.tensor(num_steps)
