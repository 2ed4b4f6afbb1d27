"""From a checked request to a stream at an engine: admit, render, tokenize, check lengths, route, submit.

Owns the order of these steps, the deadline around them and the clean-up whatever happens; what is done with the
output is the service's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pawl.errors import DeadlineExceeded, PawlError
from pawl.seeds import derive_seed
from pawl_server.frontend.admission import Ticket
from pawl_server.frontend.auth import cache_key
from pawl_server.frontend.calls import Call, HasDeadline, past_deadline
from pawl_server.frontend.convert import Finish
from pawl_server.frontend.core import Core
from pawl_server.frontend.lengths import check_prompt, output_limit
from pawl_server.frontend.mailbox import EVERYTHING, Mailbox
from pawl_server.frontend.output_text import OutputText
from pawl_server.frontend.requests import (
    ConstraintChoice,
    ConversationInput,
    GenerationRequest,
    Handling,
    SamplingChoice,
)
from pawl_server.frontend.samples import Samples
from pawl_server.frontend.stream import RequestStream
from pawl_server.internal.v1 import engine_pb2

__all__ = ["Progress", "deadline", "running", "submit_handling"]

_EXPECTED_OUTPUT = 256  # tokens counted as work for a request without an explicit maximum


class Progress:
    """How far a request got, for the error of a missed deadline."""

    def __init__(self) -> None:
        self.samples: Samples | None = None

    def metadata(self) -> dict[str, str]:
        """Phase and number of output tokens."""
        if self.samples is None:
            return {"phase": "queue", "output_tokens": "0"}
        return {"phase": self.samples.phase, "output_tokens": str(self.samples.num_tokens)}


@asynccontextmanager
async def deadline(context: HasDeadline, progress: Progress) -> AsyncIterator[None]:
    """Ends what runs inside a moment before the call's deadline, so that the client gets the details.

    Raises:
        DeadlineExceeded: the deadline has come.
    """
    remaining = context.time_remaining()
    if remaining is None:
        yield
        return
    scope = asyncio.timeout(max(0.0, remaining - min(0.05, remaining / 10)))
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        found = progress.metadata()
        text = f"the deadline passed in phase {found['phase']} after {found['output_tokens']} output tokens"
        raise DeadlineExceeded(text, metadata=found) from None


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A request that was let in, and what it runs with."""

    core: Core
    request: GenerationRequest
    call: Call
    ticket: Ticket


@asynccontextmanager
async def running(
    core: Core, request: GenerationRequest, call: Call, context: HasDeadline, *, streamed: bool
) -> AsyncIterator[Samples]:
    """Run a request while the body reads its samples; leaving the body early frees its KV blocks.

    Raises:
        PawlError: it was refused, or its deadline came.
    """
    progress = Progress()
    async with deadline(context, progress):
        ticket = core.admission.admit(call.principal, call.request_id)
        call.admitted = True
        try:
            prompt_ids = await _prompt_ids(core, request)
            admitted = _Admitted(core, request, call, ticket)
            samples = progress.samples = _open(admitted, prompt_ids, streamed=streamed)
            async with _at_engine(admitted, samples, prompt_ids, context):
                yield samples
        finally:
            ticket.close()


@asynccontextmanager
async def _at_engine(
    admitted: _Admitted, samples: Samples, prompt_ids: list[int], context: HasDeadline
) -> AsyncIterator[None]:
    """Hold the request at a replica."""
    core, request = admitted.core, admitted.request
    submit = samples.submit()
    replica = core.pick(prompt_ids, submit.cache_key)
    link = replica.link
    if link is None:
        raise core.not_ready("the replica was just lost")
    expected_output = submit.max_output_tokens if submit.max_output_tokens > 0 else _EXPECTED_OUTPUT
    expected = len(prompt_ids) + len(samples.streams) * expected_output
    replica.outstanding_tokens += expected
    reason = engine_pb2.ABORT_REASON_INTERNAL
    try:
        samples.begin(link, submit, admitted.call.arrived + request.stop.max_duration_s - time.monotonic())
        admitted.ticket.on_cancel(samples.cancel)
        yield
    except asyncio.CancelledError:
        late = past_deadline(context, 0.06)
        reason = engine_pb2.ABORT_REASON_DEADLINE if late else engine_pb2.ABORT_REASON_DISCONNECTED
        raise
    except PawlError as error:
        if error.reason == "SLOW_READER":
            reason = engine_pb2.ABORT_REASON_SLOW_READER
        raise
    finally:
        samples.close(reason)
        replica.outstanding_tokens -= expected


async def _prompt_ids(core: Core, request: GenerationRequest) -> list[int]:
    source = request.source
    if isinstance(source, ConversationInput):
        text = await core.render(source, request.input_field)
        ids = await core.encode_text(text, add_special_tokens=False)
    else:
        ids = await core.encode(source)
    check_prompt(request.input_field, len(ids), core.max_context, core.limits)
    return ids


def _open(admitted: _Admitted, prompt_ids: list[int], *, streamed: bool) -> Samples:
    core, request = admitted.core, admitted.request
    limit = output_limit(request.path, request.stop, len(prompt_ids), core.max_context, core.limits)
    admitted.ticket.charge(len(prompt_ids))
    submit = _submit(core, request, admitted.call, prompt_ids, limit)
    samples = [
        _open_sample(admitted, sample, streamed=streamed)
        for sample in _sample_submits(submit, request.sampling.sample_count)
    ]
    return Samples(samples)


def _sample_submits(submit: engine_pb2.Submit, sample_count: int) -> Iterator[engine_pb2.Submit]:
    """Each sample as a request of its own, which it would become at another engine."""
    yield submit
    for index in range(1, sample_count):
        alone = engine_pb2.Submit()
        alone.CopyFrom(submit)
        alone.sampling.seed = derive_seed(submit.sampling.seed, index)
        alone.ClearField("prompt_logprobs")
        alone.ClearField("prompt_logprobs_from")
        yield alone


def _open_sample(admitted: _Admitted, submit: engine_pb2.Submit, *, streamed: bool) -> RequestStream:
    core, request = admitted.core, admitted.request
    tokenizer = core.served("").tokenizer
    output = request.output
    detokenizer = None if output.omit_text else tokenizer.detokenizer(skip_special_tokens=output.skip_special_tokens)
    longest = submit.max_output_tokens if submit.max_output_tokens > 0 else core.max_context
    chunking = request.chunking
    mailbox: Mailbox[Finish | PawlError]
    if streamed:
        mailbox = Mailbox(longest, chunking.min_tokens, chunking.min_interval_s, first_tokens=chunking.first_tokens)
    else:
        mailbox = Mailbox(longest, EVERYTHING)
    return RequestStream(
        submit,
        OutputText(detokenizer, request.stop),
        mailbox,
        call=admitted.call,
        account=admitted.ticket,
        path=request.path,
    )


def _submit(core: Core, request: GenerationRequest, call: Call, prompt_ids: list[int], limit: int) -> engine_pb2.Submit:
    facts = core.replicas.facts
    if facts is None:
        raise core.not_ready("no replica has been seen yet")
    stop, output = request.stop, request.output
    submit = engine_pb2.Submit(
        prompt_ids=prompt_ids,
        sampling=_sampling(request.sampling, output.logprobs),
        max_output_tokens=limit,
        min_output_tokens=stop.min_output_tokens,
        eos_token_ids=() if stop.ignore_eos else facts.eos_token_ids,
        stop_token_ids=stop.token_ids,
    )
    _constrain(submit, request.sampling.constraint)
    if output.prompt_logprobs is not None:
        submit.prompt_logprobs = output.prompt_logprobs
        submit.prompt_logprobs_from = 1
    submit_handling(submit, core, request.handling, call)
    return submit


def _constrain(submit: engine_pb2.Submit, constraint: ConstraintChoice | None) -> None:
    if constraint is None:
        return
    if constraint.kind == "choices":
        submit.choices.values.extend(constraint.texts)
    else:
        setattr(submit, constraint.kind, constraint.texts[0])


def submit_handling(submit: engine_pb2.Submit, core: Core, handling: Handling, call: Call) -> None:
    """Fill in who asks and how the request is handled."""
    submit.request_id = call.request_id
    submit.cache_key = cache_key(core.token, call.principal.tenant, handling.cache_salt)
    submit.bypass_prefix_cache = handling.bypass_prefix_cache
    submit.priority = handling.priority
    submit.retain_prefix_s = handling.retain_prefix_s
    submit.user = handling.user
    submit.tenant = call.principal.tenant
    submit.weight = call.principal.weight


def _sampling(choice: SamplingChoice, logprobs: int | None) -> engine_pb2.Sampling:
    return engine_pb2.Sampling(
        temperature=choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p,
        min_p=choice.min_p,
        repetition_penalty=choice.repetition_penalty,
        presence_penalty=choice.presence_penalty,
        frequency_penalty=choice.frequency_penalty,
        logit_bias=choice.logit_bias,
        seed=choice.seed,
        logprobs=logprobs,
    )
