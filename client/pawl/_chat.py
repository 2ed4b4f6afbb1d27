"""Conversations that remember: each turn is sent with the ones before it.

Owns the history. A turn enters it only when its answer is complete, so that a failed or cancelled turn can be
sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, Unpack

from pawl._async_stream import AsyncStream
from pawl._inputs import Message, assistant, system, user
from pawl._options import ChatOptions, StreamChatOptions, refuse_unknown
from pawl._stream import Stream
from pawl._types import Completion

__all__ = ["AsyncChat", "Chat"]


class _Sends(Protocol):
    """What a chat needs of its client."""

    def chat_once(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion: ...

    def _stream_chat(
        self,
        messages: Sequence[Message],
        options: StreamChatOptions,
        on_complete: Callable[[Completion], None] | None,
    ) -> Stream: ...


class _AsyncSends(Protocol):
    """What an async chat needs of its client."""

    async def chat_once(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion: ...

    def _stream_chat(
        self,
        messages: Sequence[Message],
        options: StreamChatOptions,
        on_complete: Callable[[Completion], None] | None,
    ) -> AsyncStream: ...


class _History:
    """The turns so far, and the options of every turn."""

    def __init__(self, system_text: str, history: Sequence[Message], options: ChatOptions) -> None:
        refuse_unknown(options, ChatOptions, "chat")
        self.history: list[Message] = [*([system(system_text)] if system_text else []), *history]
        self._num_kept = 1 if system_text else 0
        self._options = options

    def _turns(self, text: str) -> list[Message]:
        return [*self.history, user(text)]

    def _keep(self, text: str, completion: Completion) -> None:
        self.history += [user(text), assistant(completion.text)]

    def reset(self) -> None:
        """Forget every turn but the system message."""
        del self.history[self._num_kept :]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.history)} messages)"


class Chat(_History):
    """A conversation over a `Client`. `history` is a plain list that may be changed."""

    def __init__(self, client: _Sends, system_text: str, history: Sequence[Message], options: ChatOptions) -> None:
        super().__init__(system_text, history, options)
        self._client = client

    def send(self, text: str, **options: Unpack[ChatOptions]) -> Completion:
        """Say something and wait for the answer; the keywords are those of `Client.chat_once`."""
        merged: ChatOptions = {**self._options, **options}
        completion = self._client.chat_once(self._turns(text), **merged)
        self._keep(text, completion)
        return completion

    def stream(self, text: str, **options: Unpack[StreamChatOptions]) -> Stream:
        """Say something and stream the answer; it enters the history when the stream has ended."""
        refuse_unknown(options, StreamChatOptions, "stream")
        merged: StreamChatOptions = {**self._options, **options}
        keep = partial(self._keep, text)
        return self._client._stream_chat(self._turns(text), merged, keep)  # noqa: SLF001 (same package)


class AsyncChat(_History):
    """A conversation over an `AsyncClient`. `history` is a plain list that may be changed."""

    def __init__(self, client: _AsyncSends, system_text: str, history: Sequence[Message], options: ChatOptions) -> None:
        super().__init__(system_text, history, options)
        self._client = client

    async def send(self, text: str, **options: Unpack[ChatOptions]) -> Completion:
        """Say something and wait for the answer; the keywords are those of `AsyncClient.chat_once`."""
        merged: ChatOptions = {**self._options, **options}
        completion = await self._client.chat_once(self._turns(text), **merged)
        self._keep(text, completion)
        return completion

    def stream(self, text: str, **options: Unpack[StreamChatOptions]) -> AsyncStream:
        """Say something and stream the answer; it enters the history when the stream has ended."""
        refuse_unknown(options, StreamChatOptions, "stream")
        merged: StreamChatOptions = {**self._options, **options}
        keep = partial(self._keep, text)
        return self._client._stream_chat(self._turns(text), merged, keep)  # noqa: SLF001 (same package)
