"""pawl: the client of a pawl server, sync and async.

    from pawl import Client

    with Client() as client:
        with client.stream("Once upon a time", max_tokens=64) as stream:
            for piece in stream.text_stream:
                print(piece, end="", flush=True)

This module is the public surface; everything with a leading underscore may change. `pawl.testing` has a server
for tests. Imports neither torch, ray nor numpy.
"""

from __future__ import annotations

from pawl._admin import AdminClient, LoadWatch
from pawl._admin_types import Load, RequestState, ServerInfo, WorkerLoad, WorkerState
from pawl._async_admin import AsyncAdminClient, AsyncLoadWatch
from pawl._async_client import AsyncClient
from pawl._async_stream import AsyncStream
from pawl._chat import AsyncChat, Chat
from pawl._client import Client
from pawl._events import Delta, End, Event, SampleEnd, Start
from pawl._inputs import Message, Prompt, Role, Sampling, Stop, assistant, system, tool, user
from pawl._logging import set_up_logging
from pawl._options import (
    TLS,
    CallOptions,
    ChatOptions,
    GenerateOptions,
    ScoreOptions,
    StreamChatOptions,
    StreamOptions,
)
from pawl._retry import Clock, Retry
from pawl._stream import Stream
from pawl._types import (
    Alternative,
    CancelOutcome,
    Completion,
    FinishReason,
    Model,
    RenderedChat,
    Sample,
    ScoredContinuation,
    Scores,
    StopMatch,
    Timings,
    Token,
    Tokenization,
    TokenLogprob,
    Usage,
)
from pawl._version import __version__
from pawl.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    PawlError,
    PermissionDenied,
    ServerError,
    StreamBroken,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "TLS",
    "AdminClient",
    "AlreadyExists",
    "Alternative",
    "AsyncAdminClient",
    "AsyncChat",
    "AsyncClient",
    "AsyncLoadWatch",
    "AsyncStream",
    "CallOptions",
    "CancelOutcome",
    "Cancelled",
    "Chat",
    "ChatOptions",
    "Client",
    "Clock",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "End",
    "Event",
    "FieldViolation",
    "FinishReason",
    "GenerateOptions",
    "InvalidRequest",
    "Load",
    "LoadWatch",
    "Message",
    "Model",
    "NotFound",
    "NotSupported",
    "Overloaded",
    "PawlError",
    "PermissionDenied",
    "Prompt",
    "RenderedChat",
    "RequestState",
    "Retry",
    "Role",
    "Sample",
    "SampleEnd",
    "Sampling",
    "ScoreOptions",
    "ScoredContinuation",
    "Scores",
    "ServerError",
    "ServerInfo",
    "Start",
    "Stop",
    "StopMatch",
    "Stream",
    "StreamBroken",
    "StreamChatOptions",
    "StreamOptions",
    "Timings",
    "Token",
    "TokenLogprob",
    "Tokenization",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "WorkerLoad",
    "WorkerState",
    "__version__",
    "assistant",
    "system",
    "tool",
    "user",
]

set_up_logging()
