"""Around every call of `pawl.v1`: its id, its caller, its errors and its metrics.

Owns the one place where exceptions become statuses and where requests are counted; knows no message but the
fields `options.request_id`. Health and reflection pass untouched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from pawl.errors import Cancelled, DeadlineExceeded, InvalidRequest, PawlError, ServerError
from pawl.status import to_grpc_status
from pawl_server.frontend.auth import Principal
from pawl_server.frontend.calls import Call, Context, new_request_id, past_deadline, set_current_call
from pawl_server.frontend.core import Core
from pawl_server.frontend.violations import visible_ascii

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Handler = grpc.RpcMethodHandler[Any, Any]

__all__ = ["REQUEST_ID_KEY", "CallInterceptor"]

log = logging.getLogger(__name__)

REQUEST_ID_KEY = "pawl-request-id"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"  # what gRPC's own retries obey (gRFC A6)
_ABORT_WAIT_S = 2.0
# Requests of these end in one outcome of pawl_requests_total each.
_COUNTED = frozenset({"Generate", "StreamGenerate", "Chat", "StreamChat", "Score"})
_REJECTED = frozenset(
    {"invalid_request", "unauthenticated", "permission_denied", "not_found", "already_exists", "overloaded"}
)

Authenticate = Callable[[Iterable[tuple[str, str | bytes]]], Principal]


class _Undecodable:
    """Stands for a message that is not valid protobuf."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of `pawl.v1`.

    Args:
        core: for metrics.
        authenticate: from a call's metadata to its caller; raises Unauthenticated.
    """

    def __init__(self, core: Core, authenticate: Authenticate) -> None:
        self._core = core
        self._authenticate = authenticate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler, or leave it as it is."""
        handler = await continuation(handler_call_details)
        _, service, method = handler_call_details.method.split("/", 2)
        if handler is None or not service.startswith("pawl.v1."):
            return handler
        decode = _tolerant(handler.request_deserializer)
        if handler.unary_unary is not None:
            unary = self._unary(service, method, handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(unary, decode, handler.response_serializer)
        stream = self._stream(service, method, handler.unary_stream)
        return grpc.unary_stream_rpc_method_handler(stream, decode, handler.response_serializer)

    def _unary(self, service: str, method: str, behaviour: Any) -> Any:  # noqa: ANN401 - grpc's handler types
        async def handle(request: Any, context: Context) -> Any:  # noqa: ANN401 - as above
            async def run() -> Any:  # noqa: ANN401 - as above
                return await behaviour(request, context)

            return await self._around(service, method, "unary", request, context, run)

        return handle

    def _stream(self, service: str, method: str, behaviour: Any) -> Any:  # noqa: ANN401 - as above
        async def handle(request: Any, context: Context) -> None:  # noqa: ANN401 - as above
            async def run() -> None:
                running = behaviour(request, context)
                if hasattr(running, "__aiter__"):
                    async for message in running:
                        await context.write(message)
                else:
                    await running

            await self._around(service, method, "server_stream", request, context, run)

        return handle

    async def _around(
        self,
        service: str,
        method: str,
        kind: str,
        request: Any,  # noqa: ANN401 - as above
        context: Context,
        run: Callable[[], Awaitable[Any]],
    ) -> Any:  # noqa: ANN401 - as above
        """One call from its receipt to its status."""
        call = Call(_request_id(request), method)
        set_current_call(call)
        metrics = self._core.metrics
        metrics.rpc_started(service, method, kind)
        status = grpc.StatusCode.OK
        outcome = ""
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, call.request_id),))
            call.principal = self._authenticate(context.invocation_metadata() or ())
            _check_decoded(request)
            answer = await run()
            outcome = call.outcome
        except (asyncio.CancelledError, grpc.aio.InternalError) as error:  # the second: left while we were writing
            late = past_deadline(context)
            status = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            outcome = "deadline" if late else "cancelled"
            raise asyncio.CancelledError from error
        except Exception as error:
            known = _as_pawl_error(error, call)
            status, outcome = known.status, _outcome(known, call)
            self._core.rejected(known.reason)
            await _abort(context, known)
        else:
            return answer
        finally:
            metrics.rpc_ended(service, method, kind, status.name, time.monotonic() - call.arrived)
            if method in _COUNTED:
                metrics.request_ended(method, outcome or "error")


def _tolerant(decode: Any) -> Any:  # noqa: ANN401 - grpc's serializers
    """A decoder whose failure can be answered with a proper status instead of a trace in the log."""

    def run(data: bytes) -> Any:  # noqa: ANN401 - as above
        try:
            return decode(data)
        except DecodeError:
            return _Undecodable()

    return run


def _check_decoded(request: object) -> None:
    if isinstance(request, _Undecodable):
        raise InvalidRequest("the message is not valid protobuf (strings must be UTF-8)", reason="MALFORMED_MESSAGE")


def _request_id(request: Any) -> str:  # noqa: ANN401 - any message
    """The caller's own id if it is one that may stand in metadata, else a new one."""
    inner = getattr(request, "request", request)
    given = getattr(getattr(inner, "options", None), "request_id", "")
    return str(given) if given and len(given) <= 128 and visible_ascii(given) else new_request_id()


def _as_pawl_error(error: Exception, call: Call) -> PawlError:
    """The error that the caller gets. What nobody expected is logged here, once."""
    if not isinstance(error, PawlError):
        log.error("request %s: %s failed", call.request_id, call.method, exc_info=error)
        error = ServerError("internal error; the server's log has the cause under this request id")
    error.request_id = error.request_id or call.request_id
    return error


def _outcome(error: PawlError, call: Call) -> str:
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, Cancelled):
        return "cancelled"
    if error.code in _REJECTED or (error.retryable and not call.admitted):
        return "rejected"
    return "error"


async def _abort(context: Context, error: PawlError) -> None:
    """End the call with a status that has every detail. Always raises.

    A client that reads nothing does not read its status either: it is not waited for long.
    """
    status = to_grpc_status(error)
    trailing = tuple(status.trailing_metadata or ())
    if error.retry_after is not None:
        trailing += ((_PUSHBACK_KEY, str(round(error.retry_after * 1000))),)
    try:
        async with asyncio.timeout(_ABORT_WAIT_S):
            await context.abort(status.code, status.details, trailing)
    except (TimeoutError, grpc.aio.InternalError):
        raise asyncio.CancelledError from None
