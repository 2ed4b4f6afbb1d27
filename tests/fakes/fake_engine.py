"""An engine without a model behind a real socket: its tokens are a function of the request, its faults are on order.

Speaks the internal protocol, so that a front end cannot tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc

from pawl_server.engine.link.auth import TokenInterceptor
from pawl_server.engine.link.protocol import PROTOCOL_VERSION
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc
from tests.fakes.tokenizer import CONTEXT, EOS_ID, VOCAB_SIZE, build_tokenizer

__all__ = ["TOKEN", "FakeEngine", "ids_of"]

TOKEN = "internal-token-of-the-tests"
Reply = Callable[[engine_pb2.Submit], Sequence[int]]
_TOKENIZER = build_tokenizer()


def ids_of(text: str) -> list[int]:
    """Tokens of a text, without special ones."""
    return list(_TOKENIZER.encode(text, add_special_tokens=False).ids)


def letters(submit: engine_pb2.Submit) -> Sequence[int]:
    """The default output: lower-case letters, shifted by the length of the prompt, without an end."""
    shift = len(submit.prompt_ids)
    text = "".join(chr(ord("a") + (shift + n) % 26) for n in range(CONTEXT))
    return [token for character in text for token in ids_of(character)]


def _samples(submit: engine_pb2.Submit) -> Iterator[engine_pb2.Submit]:
    """Each sample of a request as a request of its own."""
    yield submit
    for handle, seed in zip(submit.sample_handles, submit.sample_seeds, strict=True):
        alone = engine_pb2.Submit()
        alone.CopyFrom(submit)
        alone.handle, alone.sampling.seed = handle, seed
        alone.ClearField("prompt_logprobs")
        yield alone


class FakeEngine(engine_pb2_grpc.EngineServiceServicer):
    """One engine.

    Attributes:
        reply: tokens of a request, cut by its limits.
        hold_after: a request waits after so many tokens until `release` is set; None = never.
        per_frame: tokens of one sequence in a frame.
        refuse: error with which every request is refused.
        fail_after: a request fails with `refuse`'s error, or a default one, after so many tokens.
        skip_index: this index of every request is left out.
        repeat: every frame is sent twice.
        silent: nothing more is sent, heartbeats included.
        progressing: as the load report has it.
        submits: every request, in order.
        aborts: (handle, reason) in order.
    """

    def __init__(self, replica: int = 0) -> None:
        self.replica = replica
        self.address = ""
        self.reply: Reply = letters
        self.hold_after: int | None = None
        self.release = asyncio.Event()
        self.per_frame = 1
        self.refuse: engine_pb2.EngineError | None = None
        self.fail_after: int | None = None
        self.skip_index: int | None = None
        self.repeat = False
        self.silent = False
        self.progressing = True
        self.ignore_aborts = False
        self.max_context = CONTEXT
        self.submits: list[engine_pb2.Submit] = []
        self.aborts: list[tuple[int, int]] = []
        self.live: dict[int, asyncio.Task[None]] = {}
        self.num_tokens = 0
        self.flushed = 0
        self.changed = asyncio.Event()
        self._queues: set[asyncio.Queue[engine_pb2.ConnectResponse]] = set()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> FakeEngine:
        """Listen on a free port."""
        self._server = grpc.aio.server(interceptors=[TokenInterceptor(TOKEN)], options=[("grpc.so_reuseport", 0)])
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def kill(self) -> None:
        """Die at once: every connection breaks."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)
        for task in self.live.values():
            task.cancel()

    async def seen(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until something is true of this engine."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def Connect(
        self, request_iterator: AsyncIterator[engine_pb2.ConnectRequest], context: Any
    ) -> AsyncIterator[engine_pb2.ConnectResponse]:
        """The link."""
        queue: asyncio.Queue[engine_pb2.ConnectResponse] = asyncio.Queue()
        queue.put_nowait(engine_pb2.ConnectResponse(welcome=self._welcome()))
        queue.put_nowait(engine_pb2.ConnectResponse(load=self._load()))
        self._queues.add(queue)
        tasks = [asyncio.create_task(self._read(request_iterator, queue)), asyncio.create_task(self._beat(queue))]
        try:
            while True:
                frame = await queue.get()
                if self.silent:
                    await asyncio.Event().wait()
                yield frame
                if self.repeat and frame.HasField("tokens"):
                    yield frame
        finally:
            self._queues.discard(queue)
            for task in (*tasks, *self.live.values()):
                task.cancel()

    async def ListSequences(self, request: Any, context: Any) -> engine_pb2.ListSequencesResponse:
        """The live requests; every second one claims to wait."""
        states = []
        for number, submit in enumerate(s for s in self.submits if s.handle in self.live):
            waits = number % 2 == 1
            states.append(
                engine_pb2.SequenceState(
                    request_id=submit.request_id,
                    phase="waiting" if waits else "decode",
                    prompt_tokens=len(submit.prompt_ids),
                    age_s=100.0 - number,
                    wait_reason="blocks: needs 4, 1 free" if waits else "",
                    user=submit.user,
                    priority=submit.priority,
                    tenant=submit.tenant,
                )
            )
        return engine_pb2.ListSequencesResponse(sequences=states)

    async def FlushCache(self, request: Any, context: Any) -> engine_pb2.FlushCacheResponse:
        """Counts."""
        self.flushed += 1
        return engine_pb2.FlushCacheResponse(freed_blocks=7)

    async def Stop(self, request: Any, context: Any) -> engine_pb2.StopResponse:
        """Its test stops it."""
        return engine_pb2.StopResponse()

    def _welcome(self) -> engine_pb2.Welcome:
        facts = engine_pb2.ModelFacts(
            id="toy",
            architectures=["ToyForCausalLM"],
            max_context_tokens=self.max_context,
            vocab_size=VOCAB_SIZE,
            data_type="float32",
            eos_token_ids=[EOS_ID],
            revision="r1",
        )
        return engine_pb2.Welcome(
            protocol_version=PROTOCOL_VERSION,
            engine_id=f"fake-{self.replica}",
            replica=self.replica,
            model=facts,
            block_size=16,
            num_blocks=100,
            max_running=8,
            max_batch_tokens=512,
        )

    def _load(self) -> engine_pb2.EngineLoad:
        return engine_pb2.EngineLoad(
            step=self.num_tokens,
            running=len(self.live),
            free_blocks=100 - len(self.live),
            num_blocks=100,
            output_tokens=self.num_tokens,
            memory_bytes=1 << 20,
            progressing=self.progressing,
        )

    def tell_load(self) -> None:
        """Send a load report now."""
        for queue in self._queues:
            queue.put_nowait(engine_pb2.ConnectResponse(load=self._load()))

    async def _beat(self, queue: asyncio.Queue[engine_pb2.ConnectResponse]) -> None:
        while True:
            await asyncio.sleep(0.1)
            queue.put_nowait(engine_pb2.ConnectResponse(load=self._load()))

    async def _read(
        self, frames: AsyncIterator[engine_pb2.ConnectRequest], queue: asyncio.Queue[engine_pb2.ConnectResponse]
    ) -> None:
        async for frame in frames:
            if frame.HasField("submit"):
                self.submits.append(frame.submit)
                for sample in _samples(frame.submit):
                    self.live[sample.handle] = asyncio.create_task(self._run(sample, queue))
            elif frame.HasField("abort"):
                for handle in (frame.abort.handle, *frame.abort.more_handles):
                    self.aborts.append((handle, frame.abort.reason))
                    task = self.live.pop(handle, None)
                    if task is not None and not self.ignore_aborts:
                        task.cancel()
                        self._end(queue, handle, engine_pb2.END_REASON_ABORTED)
            self.changed.set()

    async def _run(self, submit: engine_pb2.Submit, queue: asyncio.Queue[engine_pb2.ConnectResponse]) -> None:
        handle = submit.handle
        if self.refuse is not None and self.fail_after is None:
            self._end(queue, handle, engine_pb2.END_REASON_REFUSED, error=self.refuse)
            return
        self._send_prompt_logprobs(submit, queue)
        most = submit.max_output_tokens if submit.max_output_tokens >= 0 else CONTEXT
        room = self.max_context - len(submit.prompt_ids)
        num = 0
        for index, token in enumerate(list(self.reply(submit))[: min(most, room)]):
            if index == self.fail_after:
                default = engine_pb2.EngineError(code="internal", reason="BAD_STEP", message="the step failed")
                self._end(queue, handle, engine_pb2.END_REASON_FAILED, error=self.refuse or default)
                return
            if self.hold_after is not None and index >= self.hold_after:
                await self.release.wait()
            self._send_token(submit, index, token, queue)
            num = index + 1
            if num > submit.min_output_tokens or not submit.min_output_tokens:
                for ids, reason in (
                    (submit.eos_token_ids, engine_pb2.END_REASON_EOS),
                    (submit.stop_token_ids, engine_pb2.END_REASON_STOP_TOKEN),
                ):
                    if token in ids:
                        self._end(queue, handle, reason, stop_token_id=token, output_tokens=num)
                        return
            await asyncio.sleep(0)
        at_limit = 0 <= submit.max_output_tokens <= num
        reason = engine_pb2.END_REASON_MAX_TOKENS if at_limit else engine_pb2.END_REASON_CONTEXT_LENGTH
        self._end(queue, handle, reason, output_tokens=num)

    def _send_token(
        self, submit: engine_pb2.Submit, index: int, token: int, queue: asyncio.Queue[engine_pb2.ConnectResponse]
    ) -> None:
        self.num_tokens += 1
        if index == self.skip_index:
            return
        logprobs = []
        if submit.sampling.HasField("logprobs"):
            logprobs = [self._logprob(token, submit.sampling.logprobs)]
        tokens = engine_pb2.Tokens(
            step=self.num_tokens, handles=[submit.handle], indices=[index], token_ids=[token], logprobs=logprobs
        )
        queue.put_nowait(engine_pb2.ConnectResponse(tokens=tokens))

    def _send_prompt_logprobs(
        self, submit: engine_pb2.Submit, queue: asyncio.Queue[engine_pb2.ConnectResponse]
    ) -> None:
        if not submit.HasField("prompt_logprobs"):
            return
        ids = submit.prompt_ids
        for first in range(submit.prompt_logprobs_from, len(ids), 4):
            positions = [self._logprob(token, submit.prompt_logprobs) for token in ids[first : first + 4]]
            part = engine_pb2.PromptLogprobs(handle=submit.handle, first_position=first, positions=positions)
            queue.put_nowait(engine_pb2.ConnectResponse(prompt_logprobs=part))

    @staticmethod
    def _logprob(token: int, alternatives: int) -> engine_pb2.PositionLogprobs:
        others = [(token + n) % VOCAB_SIZE for n in range(alternatives)]
        return engine_pb2.PositionLogprobs(
            token_id=token,
            logprob=-0.5,
            rank=1 + token % 2,
            alternative_ids=others,
            alternative_logprobs=[-0.5 - n for n in range(alternatives)],
        )

    def _end(
        self,
        queue: asyncio.Queue[engine_pb2.ConnectResponse],
        handle: int,
        reason: engine_pb2.EndReason.ValueType,
        **fields: Any,
    ) -> None:
        self.live.pop(handle, None)
        self.changed.set()
        end = engine_pb2.End(
            handle=handle, reason=reason, cached_prompt_tokens=3, prefill_s=0.001, decode_s=0.0005, **fields
        )
        queue.put_nowait(engine_pb2.ConnectResponse(end=end))
