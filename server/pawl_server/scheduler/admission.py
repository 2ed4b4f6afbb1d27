"""What may enter: limits of a replica, and the refusal of what can never run. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from pawl_server.kv.host_tier import RestoreCost
from pawl_server.scheduler.sequence import SequenceRequest

__all__ = ["Refusal", "SchedulerLimits", "blocks_for", "refuse", "token_limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Sizes of one replica. Tokens unless said otherwise."""

    num_blocks: int
    block_size: int
    max_running: int
    max_batch_tokens: int
    max_context: int
    max_partial_prefills: int = 4
    max_prefill_chunk: int = 256
    max_starts: int = -1  # of the waiting, in one step; -1 = as many as fit
    max_waiting: int = 4096
    prefix_cache: bool = True
    retained_share: float = 0.25  # of the blocks, that callers may ask to keep
    max_cache_events: int = 0  # kept between two reports to the front ends; 0 = none are
    num_host_blocks: int = 0  # second tier of the prefix cache
    restore_cost: RestoreCost | None = None  # of bringing its blocks back; None = it is not used
    watermark: float = 0.01  # share of the blocks kept free at admission while something runs
    max_bypass: int = 8
    backfill: bool = True  # whoever cannot delay those for whom blocks are kept may start before them
    max_preemptions: int = 4  # how often a sequence may be preempted
    preempt_below: int = 5  # a sequence takes the blocks of those whose class is lower by so much; 0 = of nobody
    output_quantile: float = 0.1  # of the output lengths seen, that admission keeps blocks for
    max_drafts: int = 0  # of one sequence in one step; 0 = nothing is drafted
    ageing_s: float = 0.0  # a sequence that waited so long rises by one class; 0 = never

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_running", "max_prefill_chunk", "max_partial_prefills"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens = {self.max_batch_tokens} is below max_running = {self.max_running}:"
                " every running sequence must be able to get its next token in one step"
            )

    @property
    def watermark_blocks(self) -> int:
        """Blocks kept free at admission while something runs."""
        return int(self.watermark * self.num_blocks)

    @property
    def pool_tokens(self) -> int:
        """Tokens that all blocks together hold."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not taken: code and reason of the public error table, the field, the numbers."""

    code: str
    reason: str
    field: str
    message: str
    metadata: dict[str, str]


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-num_tokens // block_size)


def token_limit(request: SequenceRequest, limits: SchedulerLimits) -> int:
    """Most tokens (prompt and output) the sequence may reach: its own maximum, the context, the pool.

    The KV of the last token is never needed, so a sequence may have one token more than the pool holds.
    """
    reachable = min(limits.max_context, limits.pool_tokens + 1)
    if request.max_output_tokens < 0:
        return reachable
    return min(reachable, len(request.prompt_ids) + request.max_output_tokens)


def refuse(request: SequenceRequest, limits: SchedulerLimits, num_waiting: int) -> Refusal | None:
    """Refuse what can never run, or what there is no room to queue; None when it may enter."""
    num_prompt = len(request.prompt_ids)
    numbers = {
        "prompt_tokens": str(num_prompt),
        "max_context_tokens": str(limits.max_context),
        "kv_pool_tokens": str(limits.pool_tokens),
    }
    outputs = request.max_output_tokens
    least = num_prompt + (0 if outputs == 0 else 1)
    if num_prompt < 1:
        return Refusal("invalid_request", "EMPTY_PROMPT", "prompt", "the prompt has no tokens", numbers)
    if least > limits.max_context or num_prompt > limits.pool_tokens:
        bound = min(limits.max_context - (least - num_prompt), limits.pool_tokens)
        message = f"the prompt has {num_prompt} tokens, at most {bound} fit: shorten it"
        return Refusal("invalid_request", "NEVER_FITS", "prompt", message, numbers)
    if outputs > 0 and num_prompt + outputs > min(limits.max_context, limits.pool_tokens + 1):
        bound = min(limits.max_context, limits.pool_tokens + 1) - num_prompt
        message = f"max_output_tokens = {outputs}, at most {bound} fit after {num_prompt} prompt tokens"
        return Refusal("invalid_request", "NEVER_FITS", "stop.max_output_tokens", message, numbers)
    if request.siblings and (refusal := _refuse_group(request, limits, numbers)) is not None:
        return refusal
    if num_waiting + len(request.handles) > limits.max_waiting:
        message = f"{num_waiting} sequences wait already, at most {limits.max_waiting} may: try again later"
        return Refusal("overloaded", "QUEUE_FULL", "", message, {"max_waiting": str(limits.max_waiting)})
    return None


def _refuse_group(request: SequenceRequest, limits: SchedulerLimits, numbers: dict[str, str]) -> Refusal | None:
    """All samples start together: there must be as many rows, and a block for each beside the prompt's."""
    number, field = len(request.handles), "sampling.sample_count"
    if number > limits.max_running:
        message = f"{number} samples start together, at most {limits.max_running} sequences run at once: ask for fewer"
        return Refusal("invalid_request", "NEVER_FITS", field, message, {"max_running": str(limits.max_running)})
    room = limits.num_blocks - blocks_for(len(request.prompt_ids) + len(request.resume_ids), limits.block_size) + 1
    if number > room:
        message = (
            f"{number} samples, at most {room} fit beside a prompt of {len(request.prompt_ids)} tokens: ask for fewer"
        )
        return Refusal("invalid_request", "NEVER_FITS", field, message, numbers)
    return None
