"""Between the engine's read loop and one reader: tokens go in at once, come out joined when the reader is ready.

Owns the joining, the bound and the one end of a stream; knows neither gRPC nor what a token means.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pawl_server.internal.v1 import engine_pb2

__all__ = ["EVERYTHING", "Delta", "Mailbox"]

Ending = TypeVar("Ending")

EVERYTHING = sys.maxsize
"""As `min_tokens`: the reader gets one delta with the whole output."""


@dataclass(slots=True)
class Delta:
    """Tokens that follow each other, and the text that became certain with them.

    `offset` is the index of the first token; `logprobs` is empty or one per token.
    """

    offset: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[engine_pb2.PositionLogprobs] = field(default_factory=list)
    text: str = ""


class Mailbox(Generic[Ending]):
    """Holds what one reader has not taken yet. `put` and `finish` never wait.

    The reader waits on a future of its own: an `asyncio.Event` would cost every token as much as its text does.

    Args:
        max_tokens: most tokens of the whole output; more is a defect of the engine.
        min_tokens: a delta has at least so many, the last one excepted.
        first_tokens: of the first delta, which may be sent earlier; 0 = as `min_tokens`.
        min_interval_s: least time between two deltas, the last one excepted.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        max_tokens: int,
        min_tokens: int = 1,
        min_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        *,
        first_tokens: int = 0,
    ) -> None:
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._wanted = first_tokens or min_tokens  # tokens of the next delta
        self._interval_s = min_interval_s
        self._clock = clock
        self._next_at = -float("inf")
        self._waiting = Delta(0)
        self._texts: list[str] = []
        self._ending: Ending | None = None
        self._ready = False
        self._reader: asyncio.Future[None] | None = None  # pending while the reader waits
        self.num_tokens = 0

    @property
    def finished(self) -> bool:
        """Whether the end was put in; nothing may follow it."""
        return self._ending is not None

    def put(self, token_ids: Sequence[int], logprobs: Sequence[engine_pb2.PositionLogprobs], text: str) -> None:
        """Add tokens and text.

        Raises:
            ValueError: more tokens than the output can have, or something after the end.
        """
        if self._ending is not None:
            raise ValueError("tokens after the end of a stream")
        if self.num_tokens + len(token_ids) > self._max_tokens:
            raise ValueError(f"more than {self._max_tokens} tokens in a stream")
        self.num_tokens += len(token_ids)
        self._waiting.token_ids += token_ids
        self._waiting.logprobs += logprobs
        if text:
            self._texts.append(text)
        if len(self._waiting.token_ids) >= self._wanted:
            self._ready = True
            self._wake()

    def finish(self, ending: Ending) -> bool:
        """Put the end in. Only the first counts; returns whether this was it."""
        if self._ending is not None:
            return False
        self._ending = ending
        self._ready = True
        self._wake()
        return True

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> Delta | Ending:
        """What waits, as one delta; the end once nothing waits any more.

        The caller bounds the wait.
        """
        while not self._ready:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        while self._ending is None and (pause := self._next_at - self._clock()) > 0:
            await self._wait_for_end(pause)
        if self._ending is not None and not self._waiting.token_ids and not self._texts:
            return self._ending
        taken, self._waiting = self._waiting, Delta(self.num_tokens)
        taken.text, self._texts = "".join(self._texts), []
        self._wanted = self._min_tokens
        self._next_at = self._clock() + self._interval_s
        self._ready = self._ending is not None
        return taken

    async def _wait_for_end(self, seconds: float) -> None:
        """Pause between two deltas, cut short by the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._ending is None:
                    self._reader = asyncio.get_running_loop().create_future()
                    await self._reader
