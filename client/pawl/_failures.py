"""What gRPC raised, as an error of `pawl.errors`: no gRPC error ever reaches a user, except as `__cause__`.

Owns the reading of trailers and the sentences for failures that no server wrote (nothing listens, the
connection went away, a message was too long). The table of codes is in `pawl.errors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from pawl.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotSupported,
    PawlError,
    Unavailable,
    error_class_for_status,
)
from pawl.status import from_status

__all__ = ["CANNOT_CONNECT", "CONNECTION_LOST", "from_grpc"]

CANNOT_CONNECT = "CANNOT_CONNECT"
CONNECTION_LOST = "CONNECTION_LOST"
_DETAILS_KEY = "grpc-status-details-bin"
_NOT_CONNECTED = ("failed to connect", "connection refused", "dns resolution failed", "name resolution")


def _rich_status(failure: grpc.RpcError) -> status_pb2.Status | None:
    # The published types of sync and async trailers differ from what both are: pairs.
    trailers = cast("Iterable[tuple[str, str | bytes]]", failure.trailing_metadata() or ())
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            return status if status.code else None
    return None


def from_grpc(failure: grpc.RpcError, *, target: str, method: str, timeout: float | None) -> PawlError:
    """The error to raise for a failed call; the caller raises it `from` the failure.

    Args:
        failure: what gRPC raised.
        target: where the call went.
        method: name of the call, as in the proto.
        timeout: seconds that the call was given, None for no limit.
    """
    rich = _rich_status(failure)
    if rich is not None:
        return from_status(rich)
    code = failure.code()
    details = (failure.details() or "").strip()
    lowered = details.lower()
    if code is grpc.StatusCode.UNAVAILABLE:
        if any(sign in lowered for sign in _NOT_CONNECTED):
            return _cannot_connect(target, details)
        return Unavailable(f"the connection to {target} was lost: {details or 'no details'}", reason=CONNECTION_LOST)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        limit = "in time" if timeout is None else f"within {timeout:.3g} s"
        return DeadlineExceeded(f"{target} did not finish {method} {limit}; give a longer timeout")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in lowered:
        # gRPC's own limit, not the server's load: trying again cannot help.
        return InvalidRequest(f"a message of {method} is too long: {details}", reason="MESSAGE_TOO_LARGE")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NotSupported(f"{target} does not serve {method}; admin calls go to the admin listener: {details}")
    return error_class_for_status(code)(details or f"{method} failed with {code.name} and no details")


def _cannot_connect(target: str, details: str) -> Unavailable:
    if "connection refused" in details.lower():
        what = "nothing listens there"
    else:
        what = details.replace("failed to connect to all addresses; last error: ", "")
    return Unavailable(
        f"cannot connect to {target}: {what}. Start a server with `pawl serve`, or name another one with the "
        f"target argument or PAWL_TARGET",
        reason=CANNOT_CONNECT,
    )
