"""Errors to `google.rpc.Status` and back: what crosses the wire beside a gRPC status code.

Every error carries ErrorInfo and RequestInfo; BadRequest, RetryInfo, QuotaFailure and ResourceInfo are
added where they say something (google.rpc error model, AIP-193). The server answers with it, the SDK reads.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from pawl.errors import (
    FieldViolation,
    NotFound,
    Overloaded,
    PawlError,
    error_class_for_status,
)

__all__ = ["DOMAIN", "MAX_VIOLATIONS", "from_status", "to_grpc_status", "to_status"]

DOMAIN = "pawl"
# Trailers are limited to about 8 KiB by default; more violations than this would not arrive.
MAX_VIOLATIONS = 20
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _pack(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _details(error: PawlError) -> list[message.Message]:
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if error.request_id:
        details.append(error_details_pb2.RequestInfo(request_id=error.request_id))
    if error.violations:
        shown = error.violations[:MAX_VIOLATIONS]
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.message) for v in shown
                ]
            )
        )
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, Overloaded):
        details.append(
            error_details_pb2.QuotaFailure(
                violations=[
                    error_details_pb2.QuotaFailure.Violation(
                        subject=error.metadata.get("subject", "server"), description=error.message
                    )
                ]
            )
        )
    if isinstance(error, NotFound):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type="model",
                resource_name=error.metadata.get("model", ""),
                description=error.message,
            )
        )
    return details


def to_status(error: PawlError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error, details included."""
    return status_pb2.Status(
        code=error.status.value[0],
        message=error.message,
        details=[_pack(detail) for detail in _details(error)],
    )


def to_grpc_status(error: PawlError) -> grpc.Status:
    """What `context.abort_with_status` takes."""
    answer: grpc.Status = rpc_status.to_status(to_status(error))
    return answer


def from_status(status: status_pb2.Status) -> PawlError:
    """Rebuild the error that `to_status` encoded; tolerant of details that are missing."""
    error_class = error_class_for_status(_CODES.get(status.code, grpc.StatusCode.UNKNOWN))
    info = error_details_pb2.ErrorInfo()
    request = error_details_pb2.RequestInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(request.DESCRIPTOR):
            detail.Unpack(request)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return error_class(
        status.message,
        reason=info.reason,
        request_id=request.request_id,
        violations=[FieldViolation(v.field, v.description) for v in bad.field_violations],
        metadata=dict(info.metadata),
        retry_after=retry_after,
    )
