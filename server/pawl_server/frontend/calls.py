"""The call that is being handled: who, since when, under which id. Set by the interceptor, read by the handlers.

Owns the context variable; knows nothing of what the call asks for.
"""

from __future__ import annotations

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from pawl_server.frontend.auth import ANONYMOUS, Principal

__all__ = ["Call", "Context", "HasDeadline", "current_call", "new_request_id", "past_deadline", "set_current_call"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:  # generic in the stubs alone
    Context = grpc.aio.ServicerContext


class HasDeadline(Protocol):
    """What is needed of a gRPC context to know its deadline."""

    def time_remaining(self) -> float | None:
        """Seconds to the deadline, None without one."""


@dataclass(slots=True)
class Call:
    """One RPC.

    Attributes:
        request_id: the caller's id, or a drawn one.
        method: name of the RPC, such as "Generate".
        principal: who calls.
        arrived: `time.monotonic()` at its receipt.
        arrived_unix_ns: the same moment on the wall clock.
        outcome: how the request ended, set by a handler that ended it normally.
        admitted: whether it passed admission.
    """

    request_id: str
    method: str
    principal: Principal = ANONYMOUS
    arrived: float = field(default_factory=time.monotonic)
    arrived_unix_ns: int = field(default_factory=time.time_ns)
    outcome: str = ""
    admitted: bool = False


_current: ContextVar[Call] = ContextVar("pawl_call")


def new_request_id() -> str:
    """Draw an id of 128 random bits."""
    return "req-" + secrets.token_hex(16)


def current_call() -> Call:
    """The call of this task.

    Raises:
        LookupError: outside of a handler.
    """
    return _current.get()


def set_current_call(call: Call) -> None:
    """Make `call` the call of this task. For the interceptor alone."""
    _current.set(call)


def past_deadline(context: HasDeadline, slack_s: float = 0.0) -> bool:
    """Whether the deadline of a call has come, or will within `slack_s`."""
    left = context.time_remaining()
    return left is not None and left <= slack_s
