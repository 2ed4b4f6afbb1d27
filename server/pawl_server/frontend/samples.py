"""The samples of one request as one stream: whichever has something comes next.

Owns the joining of their pieces and of their ends; what a sample is, `stream` knows. With a single sample nothing
stands between the reader and it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from pawl.v1 import types_pb2
from pawl_server.engine.link.client import EngineLink
from pawl_server.frontend.convert import Finish
from pawl_server.frontend.mailbox import Delta
from pawl_server.frontend.stream import RequestStream
from pawl_server.internal.v1 import engine_pb2

__all__ = ["Samples", "joint_finish"]


class Samples:
    """All samples of a request at one engine.

    Args:
        streams: one per sample, in their order.

    Attributes:
        num_running: samples whose end `take` has not returned yet.
    """

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self.streams = streams
        self.num_running = len(streams)
        self._link: EngineLink | None = None
        self._pumps: list[asyncio.Task[None]] = []
        # One piece: what a slow reader has not taken yet waits, joined, in the mailboxes.
        self._pieces: asyncio.Queue[tuple[int, Delta | Finish | Exception]] = asyncio.Queue(1)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, in all."""
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def phase(self) -> str:
        """Up to the first token of any sample "queue", then "decode"."""
        return "queue" if self.first_token is None else "decode"

    @property
    def first_token(self) -> float | None:
        """`time.monotonic()` of the first token of any sample, None before."""
        return min((stream.first_token for stream in self.streams if stream.first_token is not None), default=None)

    @property
    def first_prompt_id(self) -> int:
        """First token of the prompt."""
        return self.streams[0].journal.first_prompt_id

    def submit(self) -> engine_pb2.Submit:
        """The request for an engine that knows none of the samples."""
        first, *others = (stream.journal for stream in self.streams)
        submit = first.resume()
        submit.sample_seeds.extend(journal.seed for journal in others)
        return submit

    def begin(self, link: EngineLink, submit: engine_pb2.Submit, time_limit_s: float) -> None:
        """Send the request; every sample ends with TIME_LIMIT `time_limit_s` from now.

        Raises:
            Unavailable: the link is lost.
        """
        self._link = link
        for stream, engine in zip(self.streams, link.open_samples(submit, self.streams), strict=True):
            stream.begin(engine, time_limit_s)

    async def take(self) -> tuple[int, Delta | Finish]:
        """The next piece of output of any running sample, with the index of it. The caller bounds the wait.

        Raises:
            PawlError: a sample failed, and with it the request; nothing follows.
        """
        index, piece = (0, await self.streams[0].take()) if len(self.streams) == 1 else await self._take_any()
        self.num_running -= isinstance(piece, Finish)
        return index, piece

    async def _take_any(self) -> tuple[int, Delta | Finish]:
        if not self._pumps:
            self._pumps = [
                asyncio.create_task(self._pump(index, stream), name=f"sample {index}")
                for index, stream in enumerate(self.streams)
            ]
        index, piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return index, piece

    async def _pump(self, index: int, stream: RequestStream) -> None:
        piece: Delta | Finish | Exception = Delta(0)
        while isinstance(piece, Delta):
            try:
                piece = await stream.take()
            except Exception as error:  # the reader raises it
                piece = error
            await self._pieces.put((index, piece))

    def cancel(self) -> None:
        """End all with FINISH_REASON_CANCELLED and the text so far."""
        if self._link is None:
            for stream in self.streams:
                stream.cancel()
            return
        with self._link.joint_aborts(engine_pb2.ABORT_REASON_CANCELLED):
            for stream in self.streams:
                stream.cancel()

    def close(self, reason: engine_pb2.AbortReason.ValueType) -> None:
        """Nobody reads any more. Frees the engine's blocks of the samples that had not ended."""
        for pump in self._pumps:
            pump.cancel()
        if self._link is None:
            return
        with self._link.joint_aborts(reason):
            for stream in self.streams:
                stream.close(reason)


def joint_finish(ends: Sequence[tuple[int, Finish]]) -> Finish:
    """How a request ended whose samples ended so, in this order: counts are summed, the times are the last one's.

    Prompt and its log-probabilities were given once, to the first sample.
    """
    last = ends[-1][1]
    if len(ends) == 1:
        return last
    first = next(finish for index, finish in ends if index == 0)
    usage = types_pb2.Usage(
        prompt_tokens=first.usage.prompt_tokens,
        cached_prompt_tokens=first.usage.cached_prompt_tokens,
        output_tokens=sum(finish.usage.output_tokens for _, finish in ends),
    )
    phases = replace(
        last.phases,
        first_token=min(finish.phases.first_token for _, finish in ends),
        preemptions=sum(finish.phases.preemptions for _, finish in ends),
    )
    return Finish(last.reason, last.outcome, last.match, usage, phases, first.prompt_logprobs)
