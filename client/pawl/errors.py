"""Every error that pawl shows a user, and the one table between error codes and gRPC statuses.

    PawlError
    ├── InvalidRequest       INVALID_ARGUMENT    a field is wrong: `violations` says which and why
    ├── Unauthenticated      UNAUTHENTICATED     no API key, or an unknown one
    ├── PermissionDenied     PERMISSION_DENIED   the key may not do this
    ├── NotFound             NOT_FOUND           no such model
    ├── AlreadyExists        ALREADY_EXISTS      the request id is in use
    ├── Overloaded           RESOURCE_EXHAUSTED  queue full or quota spent: retry after `retry_after`
    ├── Unavailable          UNAVAILABLE         nobody can serve this now
    │   └── StreamBroken     (client side)       a stream broke after it had begun; `partial` has what came
    ├── DeadlineExceeded     DEADLINE_EXCEEDED   the deadline passed, also while queued
    ├── Cancelled            CANCELLED           the call was cancelled
    ├── NotSupported         UNIMPLEMENTED       the server does not have this call
    └── ServerError          INTERNAL            a defect of the server

The server raises these classes; `pawl.status` turns them into `google.rpc.Status` and back, so both ends read
the same table. Owns the tree and the table; knows nothing of messages or channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import grpc

if TYPE_CHECKING:
    from pawl._types import Completion

__all__ = [
    "ERROR_CLASSES",
    "AlreadyExists",
    "Cancelled",
    "DeadlineExceeded",
    "FieldViolation",
    "InvalidRequest",
    "NotFound",
    "NotSupported",
    "Overloaded",
    "PawlError",
    "PermissionDenied",
    "ServerError",
    "StreamBroken",
    "Unauthenticated",
    "Unavailable",
    "error_class_for_code",
    "error_class_for_status",
]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that is wrong: its path as in the proto (`sampling.top_p`), and what, with the remedy."""

    field: str
    message: str


class PawlError(Exception):
    """Base of every error that pawl raises on purpose.

    Attributes:
        message: one sentence: what was wrong, the value, the limit, what to do.
        reason: stable word in capitals for programs, such as `QUEUE_FULL` (google.rpc.ErrorInfo).
        request_id: id of the request, empty if there was none.
        violations: the fields that are wrong (google.rpc.BadRequest).
        metadata: numbers by name (google.rpc.ErrorInfo).
        retry_after: seconds to wait before trying again (google.rpc.RetryInfo), None if unknown.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        request_id: str = "",
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.request_id = request_id
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message


class InvalidRequest(PawlError):
    """A field of the request is wrong; trying again unchanged cannot help."""

    code = "invalid_request"
    status = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_FIELD"


class Unauthenticated(PawlError):
    """No API key was given where one is needed, or it is not known."""

    code = "unauthenticated"
    status = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "API_KEY_INVALID"


class PermissionDenied(PawlError):
    """The API key is known and may not do this."""

    code = "permission_denied"
    status = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "NOT_ALLOWED"


class NotFound(PawlError):
    """The model that was named is not served here."""

    code = "not_found"
    status = grpc.StatusCode.NOT_FOUND
    default_reason = "MODEL_NOT_FOUND"


class AlreadyExists(PawlError):
    """The request id is in use by a live request of the same caller."""

    code = "already_exists"
    status = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "REQUEST_ID_IN_USE"


class Overloaded(PawlError):
    """The queue is full or a quota is spent. `retry_after` says how long to wait."""

    code = "overloaded"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"
    retryable = True


class Unavailable(PawlError):
    """Nobody can serve this now: loading, draining, no healthy worker, or a worker was lost."""

    code = "unavailable"
    status = grpc.StatusCode.UNAVAILABLE
    default_reason = "NOT_READY"
    retryable = True


class StreamBroken(Unavailable):
    """A stream broke after its first delta. Never tried again by the SDK: output was delivered.

    Attributes:
        partial: what had arrived (the SDK's `Completion` without an end), None if nothing is known.
    """

    code = "stream_broken"
    default_reason = "STREAM_BROKEN"
    retryable = False
    partial: Completion | None = None


class DeadlineExceeded(PawlError):
    """The deadline passed before the request was complete, queueing included."""

    code = "deadline_exceeded"
    status = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE"


class Cancelled(PawlError):
    """The call was cancelled."""

    code = "cancelled"
    status = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class NotSupported(PawlError):
    """The server does not have this call, or this listener does not serve it."""

    code = "not_supported"
    status = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "NOT_SUPPORTED"


class ServerError(PawlError):
    """A defect of the server. The log has the cause under the request id."""

    code = "internal"
    status = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


# The table. One class per status; StreamBroken exists on the client alone and shares UNAVAILABLE.
ERROR_CLASSES: tuple[type[PawlError], ...] = (
    InvalidRequest,
    Unauthenticated,
    PermissionDenied,
    NotFound,
    AlreadyExists,
    Overloaded,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    NotSupported,
    ServerError,
)
_BY_CODE = {error.code: error for error in ERROR_CLASSES}
_BY_STATUS = {error.status: error for error in ERROR_CLASSES}


def error_class_for_code(code: str) -> type[PawlError]:
    """Class of a code of the table; `ServerError` for a code that is not in it."""
    return _BY_CODE.get(code, ServerError)


def error_class_for_status(status: grpc.StatusCode) -> type[PawlError]:
    """Class of a gRPC status. Statuses that pawl never sends become `ServerError`."""
    return _BY_STATUS.get(status, ServerError)
