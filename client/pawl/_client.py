"""The sync client: one method per call of the public contract.

Owns the public surface; requests and answers are made in `_core`, the connection is `_transport`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

from pawl import _core
from pawl._assembly import Assembly
from pawl._chat import Chat
from pawl._convert import StreamMessage
from pawl._inputs import Message, Prompt
from pawl._options import (
    DEFAULT_TARGET,
    TLS,
    CallOptions,
    ChatOptions,
    GenerateOptions,
    ScoreOptions,
    Settings,
    StreamChatOptions,
    StreamOptions,
    refuse_unknown,
    settings_from,
    with_changes,
)
from pawl._ready import ReadyWait, health_call
from pawl._retry import Clock, Retry
from pawl._stream import Stream
from pawl._transport import Transport
from pawl._types import CancelOutcome, Completion, Model, RenderedChat, Scores, Tokenization
from pawl.errors import PawlError

__all__ = ["Client", "Models"]

MessageT = TypeVar("MessageT", bound=StreamMessage)


class Models:
    """The served models, as `client.models`."""

    def __init__(self, transport: Transport, settings: Settings) -> None:
        self._transport = transport
        self._settings = settings

    def list(self) -> list[Model]:
        """All of them, every page."""
        models: list[Model] = []
        page_token = ""
        while True:
            page, page_token = self._transport.unary(_core.list_models(self._settings, page_token))
            models += page
            if not page_token:
                return models

    def get(self, name: str) -> Model:
        """One by `models/{id}` or the id alone.

        Raises:
            NotFound: it is not served.
        """
        return self._transport.unary(_core.get_model(self._settings, name))


class Client:
    """A pawl server. Connects with the first call; use it as a context manager or `close()` it.

    Safe to share between threads. Every method raises `PawlError` and its subclasses, nothing of gRPC's.

    Args:
        target: host:port, `dns:///host:port` for several servers behind a name, `unix:path`, or
            `grpcs://host:port` for TLS. Default: `PAWL_TARGET`, else localhost:50051.
        api_key: sent with every call. Default: `PAWL_API_KEY`.
        timeout: seconds for a call, retries included; `math.inf` for none. Default: `PAWL_TIMEOUT`, else 600.
        retries: how often a call that met `Unavailable` or `Overloaded` is tried again, or a `Retry`.
            Default: 2.
        tls: True for the system's certificate authorities, a PEM file of others, or a `TLS`.
        default_model: name of the model for calls that name none.
        clock: where time comes from (for tests; see `pawl.testing.ManualClock`).
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        retries: int | Retry | None = None,
        tls: bool | str | Path | TLS | None = None,
        default_model: str = "",
        clock: Clock | None = None,
    ) -> None:
        settings = settings_from(
            target,
            target_variable="PAWL_TARGET",
            default_target=DEFAULT_TARGET,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            tls=tls,
            default_model=default_model,
        )
        self._set_up(Transport(settings, clock or Clock()), settings, owns_transport=True)

    def _set_up(self, transport: Transport, settings: Settings, *, owns_transport: bool) -> None:
        self._transport = transport
        self._settings = settings
        self._owns_transport = owns_transport
        self.models = Models(transport, settings)

    def with_options(
        self,
        *,
        timeout: float | None = None,
        retries: int | Retry | None = None,
        priority: int | None = None,
        default_model: str | None = None,
    ) -> Client:
        """A client over the same connection with other defaults. Closing it leaves the connection open."""
        settings = with_changes(
            self._settings, timeout=timeout, retries=retries, priority=priority, default_model=default_model
        )
        client = type(self).__new__(type(self))
        client._set_up(self._transport, settings, owns_transport=False)  # noqa: SLF001 (its own class)
        return client

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Continue a prompt: text, or token ids.

        Args:
            prompt: what to continue.
            options: see `GenerateOptions`; among them `sampling`, `stop`, `max_tokens`, `temperature`,
                `top_p`, `top_k`, `min_p`, `seed`, `logprobs`, `token_ids`, `priority`, `request_id`, `model`,
                `timeout`.
        """
        refuse_unknown(options, GenerateOptions, "generate")
        return self._transport.unary(_core.generate(self._settings, prompt, options))

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> Stream:
        """As `generate`, as it is made. Use it in a `with` block; leaving it early cancels."""
        refuse_unknown(options, StreamOptions, "stream")
        return self._stream(_core.stream_generate(self._settings, prompt, options))

    def chat(self, *, system: str = "", history: Sequence[Message] = (), **options: Unpack[ChatOptions]) -> Chat:
        """A conversation that remembers its turns; the options hold for every turn."""
        return Chat(self, system, history, options)

    def chat_once(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion:
        """The model's next turn of a conversation, rendered with its own chat template."""
        refuse_unknown(options, ChatOptions, "chat_once")
        return self._transport.unary(_core.chat(self._settings, messages, options))

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[StreamChatOptions]) -> Stream:
        """As `chat_once`, as it is made. Use it in a `with` block; leaving it early cancels."""
        refuse_unknown(options, StreamChatOptions, "stream_chat")
        return self._stream_chat(messages, options, None)

    def _stream_chat(
        self,
        messages: Sequence[Message],
        options: StreamChatOptions,
        on_complete: Callable[[Completion], None] | None,
    ) -> Stream:
        return self._stream(_core.stream_chat(self._settings, messages, options), on_complete)

    def _stream(
        self,
        call: _core.Call[MessageT, StreamMessage],
        on_complete: Callable[[Completion], None] | None = None,
    ) -> Stream:
        transport = self._transport
        assembly = Assembly(call, target=transport.target, clock=transport.clock, on_complete=on_complete)
        return Stream(lambda timeout: transport.open_stream(call, timeout), assembly, transport.clock.sleep)

    def score(
        self,
        context: Prompt,
        continuations: Sequence[Prompt],
        *,
        alternatives: int | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """How probable given continuations of a context are; nothing is sampled.

        Args:
            context: what they follow; computed once.
            continuations: texts (no special token is added) or token ids.
            alternatives: also give the n best tokens at each position.
            options: see `ScoreOptions`.
        """
        refuse_unknown(options, ScoreOptions, "score")
        return self._transport.unary(_core.score(self._settings, context, continuations, alternatives, options))

    def tokenize(
        self,
        text: str,
        *,
        add_special_tokens: bool | None = None,
        offsets: bool = False,
        **options: Unpack[CallOptions],
    ) -> Tokenization:
        """Text to token ids, as a prompt would be; `offsets` also gives each token's bytes and place."""
        refuse_unknown(options, CallOptions, "tokenize")
        return self._transport.unary(
            _core.tokenize(
                self._settings, text, add_special_tokens=add_special_tokens, offsets=offsets, options=options
            )
        )

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> str:
        """Token ids to text; bytes that are not UTF-8 become U+FFFD."""
        refuse_unknown(options, CallOptions, "detokenize")
        return self._transport.unary(
            _core.detokenize(self._settings, token_ids, skip_special_tokens=skip_special_tokens, options=options)
        )

    def render_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> RenderedChat:
        """The exact prompt that `chat_once` would run."""
        refuse_unknown(options, ChatOptions, "render_chat")
        return self._transport.unary(_core.render_chat(self._settings, messages, options))

    def cancel(self, *request_ids: str, reason: str = "", timeout: float | None = None) -> dict[str, CancelOutcome]:
        """End running requests of the same caller, from any connection. An unknown id is an outcome."""
        return self._transport.unary(_core.cancel(self._settings, request_ids, reason, timeout))

    def wait_ready(self, timeout: float = 60.0, *, service: str = "") -> None:
        """Wait until the server serves (`grpc.health.v1`).

        Raises:
            Unavailable: it did not within `timeout` seconds; the message says what it did last.
        """
        wait = ReadyWait(self._transport.target, timeout, self._transport.clock)
        while True:
            try:
                if self._transport.unary(health_call(self._settings, service, wait.attempt_timeout())):
                    return
            except PawlError as error:
                wait.note(error)
            self._transport.clock.sleep(wait.next_delay())

    def close(self) -> None:
        """Close the connection; what still runs is cancelled."""
        if self._owns_transport:
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.target!r}, timeout={self._settings.timeout:g})"
