"""Log-probabilities of given continuations: one sequence per continuation, of which nothing is sampled.

Owns the order in which they are sent (the first alone, so that the context is computed once and found in the
prefix cache by the others) and the sums; knows nothing of generation.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from pawl.errors import Cancelled, DeadlineExceeded, PawlError, ServerError, Unavailable
from pawl.v1 import inference_pb2, types_pb2
from pawl_server.frontend import convert
from pawl_server.frontend.admission import Ticket
from pawl_server.frontend.auth import cache_key
from pawl_server.frontend.calls import Call, HasDeadline
from pawl_server.frontend.core import Core
from pawl_server.frontend.detokenize import TokenBytes
from pawl_server.frontend.lengths import check_prompt
from pawl_server.frontend.replicas import Replica
from pawl_server.frontend.requests import PromptInput, ScoreInput
from pawl_server.frontend.running import Progress, deadline, submit_handling
from pawl_server.internal.v1 import engine_pb2

__all__ = ["score"]

_MAX_PARALLEL = 16


class _Scored:
    """One continuation at an engine. Implements `StreamEvents` of the link."""

    def __init__(self, core: Core, call: Call, first_position: int, num_expected: int) -> None:
        self.done: asyncio.Future[engine_pb2.End] = asyncio.get_running_loop().create_future()
        self.entries: list[engine_pb2.PositionLogprobs] = []
        self._core = core
        self._call = call
        self._next = first_position
        self._num_expected = num_expected

    def on_tokens(
        self, indices: Sequence[int], token_ids: Sequence[int], logprobs: Sequence[engine_pb2.PositionLogprobs]
    ) -> None:
        """None was asked for."""
        self._fail(ServerError("an engine sent tokens for a Score call"))

    def on_prompt_logprobs(self, frame: engine_pb2.PromptLogprobs) -> None:
        """A stretch of the log-probabilities."""
        skip = self._next - frame.first_position
        if skip < 0:
            self._fail(ServerError(f"an engine left out the log-probabilities from position {self._next}"))
            return
        news = frame.positions[skip:]
        self.entries += news
        self._next += len(news)

    def on_end(self, end: engine_pb2.End) -> None:
        """All are there, or the engine says why not."""
        if end.reason in (engine_pb2.END_REASON_REFUSED, engine_pb2.END_REASON_FAILED):
            retry_after = self._core.admission.retry_after()
            self._fail(convert.engine_error(end.error, self._call.request_id, "", retry_after))
        elif len(self.entries) != self._num_expected:
            text = f"an engine gave {len(self.entries)} of {self._num_expected} log-probabilities"
            self._fail(ServerError(text, request_id=self._call.request_id))
        elif not self.done.done():
            self.done.set_result(end)

    def on_lost(self, detail: str) -> None:
        """The engine is lost."""
        text = f"the replica of this request was lost: {detail}"
        self._fail(Unavailable(text, reason="WORKER_LOST", retry_after=self._core.admission.retry_after()))

    def on_defect(self, error: Exception) -> None:
        """A defect of ours: the call fails, and logs the cause under its id."""
        if not self.done.done():
            self.done.set_exception(error)

    def _fail(self, error: PawlError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def score(core: Core, request: ScoreInput, call: Call, context: HasDeadline) -> inference_pb2.ScoreResponse:
    """Score every continuation of a context.

    Raises:
        PawlError: it was refused, cancelled, or its deadline came.
    """
    async with deadline(context, Progress()):
        ticket = core.admission.admit(call.principal, call.request_id)
        call.admitted = True
        work = asyncio.create_task(_score_all(core, request, call, ticket))
        ticket.on_cancel(lambda: _cancel(work))
        try:
            await asyncio.wait({work}, timeout=core.limits.max_duration_s)
            if not work.done():
                text = (
                    f"scoring took longer than {core.limits.max_duration_s:g} s (server setting limits.max_duration_s)"
                )
                raise DeadlineExceeded(text, reason="TIME_LIMIT")
            if work.cancelled():
                raise Cancelled("the request was cancelled by Cancel or Drain")
            return work.result()
        finally:
            if work.cancel():
                await asyncio.wait({work})
            ticket.close()


def _cancel(work: asyncio.Task[inference_pb2.ScoreResponse]) -> None:
    work.cancel()


async def _score_all(core: Core, request: ScoreInput, call: Call, ticket: Ticket) -> inference_pb2.ScoreResponse:
    context_ids = await core.encode(request.context)
    pieces = [await core.encode(item) for item in request.continuations]
    check_prompt("context", len(context_ids), core.max_context, core.limits)
    for index, ids in enumerate(pieces):
        field = f"continuations[{index}]"
        check_prompt(field, len(ids), core.max_context - len(context_ids), core.limits, num_output=0)
    num_tokens = len(context_ids) + sum(map(len, pieces))
    ticket.charge(num_tokens)
    key = cache_key(core.token, call.principal.tenant, request.handling.cache_salt)
    replica = core.pick(context_ids, key)
    replica.outstanding_tokens += num_tokens
    places = asyncio.Semaphore(_MAX_PARALLEL)

    async def one(ids: list[int]) -> tuple[engine_pb2.End, list[engine_pb2.PositionLogprobs]]:
        async with places:
            return await _score_one(core, request, call, replica, context_ids, ids)

    try:
        first = await one(pieces[0])
        ticket.first_token()
        async with asyncio.TaskGroup() as group:
            rest = [group.create_task(one(ids)) for ids in pieces[1:]]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        replica.outstanding_tokens -= num_tokens
    results = [first, *(task.result() for task in rest)]
    token_bytes = core.served("").tokenizer.token_bytes
    usage = types_pb2.Usage(prompt_tokens=num_tokens, cached_prompt_tokens=first[0].cached_prompt_tokens)
    return inference_pb2.ScoreResponse(
        request_id=call.request_id,
        continuations=[
            _continuation(item, entries, token_bytes)
            for item, (_, entries) in zip(request.continuations, results, strict=True)
        ],
        usage=usage,
    )


async def _score_one(
    core: Core, request: ScoreInput, call: Call, replica: Replica, context_ids: list[int], ids: list[int]
) -> tuple[engine_pb2.End, list[engine_pb2.PositionLogprobs]]:
    """Run one continuation; leaving early frees its blocks."""
    submit = engine_pb2.Submit(
        prompt_ids=[*context_ids, *ids],
        # Set as the engine wants every field set; nothing is sampled.
        sampling=engine_pb2.Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0),
        max_output_tokens=0,
        prompt_logprobs=request.alternatives,
        prompt_logprobs_from=len(context_ids),
    )
    submit_handling(submit, core, request.handling, call)
    if replica.link is None:
        raise core.not_ready("the replica was just lost")
    scored = _Scored(core, call, len(context_ids), len(ids))
    stream = replica.link.open(submit, scored)
    try:
        # Bounded: the link ends it when the engine falls silent, and the caller's wait ends the whole call.
        end = await scored.done
    except BaseException:
        stream.abort(engine_pb2.ABORT_REASON_DISCONNECTED)
        raise
    return end, scored.entries


def _continuation(
    item: PromptInput, entries: Sequence[engine_pb2.PositionLogprobs], token_bytes: TokenBytes
) -> inference_pb2.ScoredContinuation:
    size = len(item.text.encode()) if item.text is not None else sum(len(token_bytes[e.token_id]) for e in entries)
    return inference_pb2.ScoredContinuation(
        tokens=[convert.token_logprob(entry, token_bytes) for entry in entries],
        total_logprob=math.fsum(entry.logprob for entry in entries),
        greedy_match=all(entry.rank == 1 for entry in entries),
        byte_count=size,
    )
