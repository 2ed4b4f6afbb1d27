"""What is generated: requests with lengths of their own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Request", "describe", "mixed_requests", "shortened", "single_stream"]

_HIGHEST_ID = 10_000


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and exactly how many tokens are to follow it."""

    prompt_ids: tuple[int, ...]
    output_tokens: int


def mixed_requests(num_requests: int = 256, most_output: int | None = None) -> list[Request]:
    """Prompts and outputs of 100 to 1024 tokens each, all there at once; outputs end at `most_output`.

    With 256 requests the workload of nano-vllm's `bench.py` to the last number: 133,966 output tokens.
    """
    source = random.Random(0)  # noqa: S311 - a workload, not a secret
    prompts = [
        tuple(source.randint(0, _HIGHEST_ID) for _ in range(source.randint(100, 1024))) for _ in range(num_requests)
    ]
    requests = [Request(prompt, source.randint(100, 1024)) for prompt in prompts]
    return requests if most_output is None else shortened(requests, 1024, most_output)


def single_stream(prompt_tokens: int = 512, output_tokens: int = 128) -> list[Request]:
    """One request."""
    source = random.Random(1)  # noqa: S311 - as above
    return [Request(tuple(source.randint(0, _HIGHEST_ID) for _ in range(prompt_tokens)), output_tokens)]


def shortened(requests: Sequence[Request], prompt_tokens: int, output_tokens: int) -> list[Request]:
    """The same requests, cut, to look whether outputs agree."""
    return [Request(one.prompt_ids[:prompt_tokens], min(one.output_tokens, output_tokens)) for one in requests]


def describe(requests: Sequence[Request]) -> str:
    """How many, and the least and most tokens in and out."""
    sizes = [[len(one.prompt_ids) for one in requests], [one.output_tokens for one in requests]]
    ranges = (str(min(each)) if min(each) == max(each) else f"{min(each)}-{max(each)}" for each in sizes)
    return f"{len(requests)} x {'/'.join(ranges)}"
