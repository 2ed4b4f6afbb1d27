"""The table of calls against the contract."""

from __future__ import annotations

from pawl import _methods
from pawl._methods import Method
from pawl.v1 import admin_pb2, inference_pb2, model_pb2, tokenizer_pb2


def test_every_call_of_the_contract_is_in_the_table() -> None:
    """Path, request and response of every RPC agree with the descriptors, and none is missing."""
    expected = {
        f"/{service.full_name}/{method.name}": (method.input_type.full_name, method.output_type.full_name)
        for file in (inference_pb2, tokenizer_pb2, model_pb2, admin_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    table = {
        method.path: (method.request.DESCRIPTOR.full_name, method.response.DESCRIPTOR.full_name)
        for method in vars(_methods).values()
        if isinstance(method, Method) and method is not _methods.HEALTH_CHECK
    }
    assert table == expected


def test_health_messages_are_wire_compatible() -> None:
    """The well-known types that stand in for grpc.health.v1 give its bytes."""
    from grpc_health.v1 import health_pb2

    check = _methods.HEALTH_CHECK
    for service in ("", "readiness"):
        assert (
            check.request(value=service).SerializeToString()
            == health_pb2.HealthCheckRequest(service=service).SerializeToString()
        )
    for status in health_pb2.HealthCheckResponse.ServingStatus.values():
        data = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        assert check.response.FromString(data).value == status
    assert health_pb2.HealthCheckResponse.SERVING == _methods.HEALTH_SERVING
