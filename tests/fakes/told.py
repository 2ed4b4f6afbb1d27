"""What is heard of a sequence, what it gives when it is alone, and where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from pawl_server.scheduler.endings import EndReason
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_workers.plan import TokenLogprobs
from pawl_workers.row_masks import RowMasks
from tests.fakes.worker_driver import WorkerDriver

__all__ = ["Told", "first_difference", "mask_after", "told_alone"]


@dataclass(slots=True)
class Told:
    """What was heard of a sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)
    reason: EndReason | None = None


def mask_after(output: Sequence[int], num_words: int) -> NDArray[np.uint32]:
    """What may follow an output: three of four tokens, others after others."""
    noise = np.random.default_rng([*output[-8:], len(output)])
    first, second = noise.integers(0, 1 << 32, (2, num_words), dtype=np.uint32)
    found: NDArray[np.uint32] = first | second
    return found


def told_alone(driver: WorkerDriver, request: SequenceRequest, end: int) -> Told:
    """Token by token, nobody beside it: the oracle.

    Args:
        driver: of a worker.
        request: for one sample.
        end: length of prompt and output at which generation ends at the latest.
    """
    torch.set_num_threads(1)
    num_words = -(-driver.worker.facts.vocab_size // 32)
    one = driver.start(
        request.prompt_ids,
        request.sampling,
        prompt_logprobs=request.prompt_logprobs,
        samples=request.max_output_tokens != 0,
    )
    reason = None
    most = request.max_output_tokens if request.max_output_tokens >= 0 else 1 << 30
    while reason is None:
        grants = [(one, len(one.token_ids) - one.num_computed)]
        if request.constraint is not None and one.samples:
            masks = RowMasks([one.row], mask_after(one.output, num_words)[None, :])
            driver.step(grants, masks=lambda masks=masks: masks)  # type: ignore[misc]
        else:
            driver.step(grants)
        count, last = len(one.output), one.token_ids[-1]
        if one.failure is not None:
            reason = EndReason.FAILED
        elif not one.samples:
            reason = EndReason.MAX_TOKENS
        elif last in request.eos_token_ids and count > request.min_output_tokens:
            reason = EndReason.EOS
        elif last in request.stop_token_ids and count > request.min_output_tokens:
            reason = EndReason.STOP_TOKEN
        elif count == most:
            reason = EndReason.MAX_TOKENS
        elif len(one.token_ids) == end:
            reason = EndReason.CONTEXT_LENGTH
    driver.finish(one)
    prompt = [entry for scored in one.prompt for entry in scored.positions]
    return Told(one.output, one.logprobs, prompt, reason)


def first_difference(found: Told, wanted: Told) -> str | None:
    """Where what was heard is not what a request gives alone; what was aborted is the beginning of it."""
    count = len(found.tokens)
    if found.tokens != wanted.tokens[:count]:
        place = next(i for i, (a, b) in enumerate(zip(found.tokens, [*wanted.tokens, None], strict=False)) if a != b)
        return f"token {place} of {count}"
    if found.logprobs != wanted.logprobs[:count]:
        place = next(i for i, (a, b) in enumerate(zip(found.logprobs, wanted.logprobs, strict=False)) if a != b)
        return f"log-probability {place} of {count}: {found.logprobs[place]} and {wanted.logprobs[place]}"
    # Of a request that fails alone nothing is scored; in chunks those before the one that fails are.
    if found.prompt != wanted.prompt[: len(found.prompt)] and wanted.reason is not EndReason.FAILED:
        place = next(i for i, (a, b) in enumerate(zip(found.prompt, wanted.prompt, strict=False)) if a != b)
        return f"scored token {place}: {found.prompt[place]} and {wanted.prompt[place]}"
    if found.reason is EndReason.ABORTED:
        return None
    if (count, found.reason) != (len(wanted.tokens), wanted.reason):
        return f"{found.reason} after {count}, not {wanted.reason} after {len(wanted.tokens)}"
    if len(found.prompt) != len(wanted.prompt) and found.reason is not EndReason.FAILED:
        return f"{len(found.prompt)} scored of the prompt, not {len(wanted.prompt)}"
    return None
