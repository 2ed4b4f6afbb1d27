"""Requests drawn with any parameter beside any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import msgspec

from pawl_server.scheduler.sequence import SequenceRequest, Sibling
from pawl_workers.plan import SamplingSpec

__all__ = ["draw_requests", "samples_of"]


def _draw_sampling(draw: Random, vocab_size: int, eos: Sequence[int], poison: int) -> SamplingSpec:
    """Any parameter with any other; most with log-probabilities."""
    greedy = draw.random() < 0.4
    adjusted = draw.random() < 0.4
    return SamplingSpec(
        temperature=0.0 if greedy else draw.choice([0.7, 1.0, 1.5]),
        top_k=draw.choice([0, 0, 1, 5, 30]),
        top_p=draw.choice([1.0, 1.0, 0.9, 0.5]),
        min_p=draw.choice([0.0, 0.0, 0.05]),
        repetition_penalty=draw.choice([1.0, 1.3, 0.8]) if adjusted else 1.0,
        presence_penalty=draw.choice([0.0, 1.0, -0.5]) if adjusted else 0.0,
        frequency_penalty=draw.choice([0.0, 0.7]) if adjusted else 0.0,
        logit_bias={poison: 4.0} if draw.random() < 0.02 else {poison: -50.0, draw.randrange(vocab_size - 1): 3.0},
        seed=draw.randrange(1 << 62),
        min_output_tokens=draw.choice([0, 3]) if eos else 0,
        suppressed_ids=tuple(eos),
        logprobs=draw.choice([-1, 0, 0, 2, 5]),
    )


def draw_requests(
    draw: Random, vocab_size: int, *, most: int, poison: int, lengths: Sequence[int], longest: int
) -> list[SequenceRequest]:
    """Draw requests, some of several samples. The handles of those that choose under a mask are multiples of 3.

    Args:
        draw: decides.
        vocab_size: of the model.
        most: requests.
        poison: a token that spoils whoever computes it.
        lengths: of what a prompt does not share with others.
        longest: tokens of prompt and output together.
    """
    few = draw.choice([4, 30, vocab_size])  # tokens of prompts, which repeat themselves where they are few
    shared = [draw.randrange(min(few, vocab_size)) for _ in range(max(lengths))]
    if draw.random() < 0.05:
        shared[draw.randrange(len(shared))] = poison
    requests, handle = [], 0
    for _ in range(draw.choice([1, 2, draw.randint(2, most)])):  # with few of them rows stay what they are for longer
        own = [draw.randrange(min(few, vocab_size)) for _ in range(draw.choice(lengths))]
        prompt = shared[: draw.choice([0, 0, 31, 32, 33, 64, 65])] + own
        prompt = prompt[: longest - 1]
        if draw.random() < 0.02:
            prompt[-1] = poison
        eos = draw.sample(range(vocab_size), 4) if draw.random() < 0.3 else []
        sampling = _draw_sampling(draw, vocab_size, eos, poison)
        num_samples = draw.randint(2, 4) if draw.random() < 0.2 else 1
        output = -1 if draw.random() < 0.1 else draw.choice([1, 2, 9, 34, 70, 120])
        scored = draw.choice([0, 2]) if draw.random() < 0.15 else -1
        if scored >= 0 and num_samples == 1 and draw.random() < 0.3:
            output = 0
        request = SequenceRequest(
            handle=handle,
            request_id=str(handle),
            prompt_ids=prompt,
            sampling=sampling,
            cache_key=draw.choice([b"", b"", b"b"]),
            max_output_tokens=min(output, longest - len(prompt)),
            min_output_tokens=sampling.min_output_tokens,
            eos_token_ids=frozenset(eos[:2]),
            stop_token_ids=frozenset(eos[2:]),
            prompt_logprobs=scored,
            bypass_prefix_cache=draw.random() < 0.1,
            retain_prefix_s=draw.choice([0.0, 0.0, 0.0, 20.0]),
            priority=draw.choice([0, 0, 0, 2]),
            constraint=True if handle % 3 == 0 else None,
            siblings=[Sibling(handle + 3 * index, draw.randrange(1 << 62)) for index in range(1, num_samples)],
        )
        requests.append(request)
        handle += 1 + 3 * (num_samples - 1)
    return requests


def samples_of(request: SequenceRequest) -> list[SequenceRequest]:
    """Each sample of a request as a request of its own; prompts are scored for the first."""
    found = [replace(request, siblings=())]
    for sibling in request.siblings:
        sampling = msgspec.structs.replace(request.sampling, seed=sibling.seed)
        found.append(replace(request, handle=sibling.handle, sampling=sampling, prompt_logprobs=-1, siblings=()))
    return found
