"""Errors: every row of the table both ways, over a real socket, in both clients."""

from __future__ import annotations

import socket

import grpc
import pytest
from google.rpc import status_pb2

import pawl
from pawl import AsyncClient, Client
from pawl.errors import ERROR_CLASSES, FieldViolation, Overloaded, PawlError, error_class_for_code
from pawl.status import from_status, to_status
from pawl.testing import FakeServer


def full(kind: type[PawlError]) -> PawlError:
    """An error with every detail."""
    return kind(
        "what was wrong",
        reason="SOME_REASON",
        request_id="r-1",
        violations=[FieldViolation("a.b", "is bad"), FieldViolation("c", "too")],
        metadata={"limit": "3"},
        retry_after=0.25,
    )


def parts(error: PawlError) -> tuple[object, ...]:
    """What must survive the wire."""
    return (
        type(error),
        error.message,
        error.reason,
        error.request_id,
        error.violations,
        error.metadata,
        error.retry_after,
    )


@pytest.mark.parametrize("kind", ERROR_CLASSES, ids=lambda kind: kind.__name__)
def test_table_both_ways(kind: type[PawlError]) -> None:
    """Error to status and back is the same error; its code finds its class."""
    assert parts(from_status(to_status(full(kind)))) == parts(full(kind))
    assert to_status(kind("x")).code == kind.status.value[0]
    assert error_class_for_code(kind.code) is kind


@pytest.mark.parametrize("status", list(grpc.StatusCode), ids=lambda status: status.name)
def test_every_status_has_a_class(status: grpc.StatusCode) -> None:
    """Also those that pawl never sends."""
    error = from_status(status_pb2.Status(code=status.value[0], message="m"))
    expected = {kind.status: kind for kind in ERROR_CLASSES}.get(status, pawl.ServerError)
    assert type(error) is expected


@pytest.mark.parametrize("kind", ERROR_CLASSES, ids=lambda kind: kind.__name__)
async def test_over_the_wire(kind: type[PawlError], server: FakeServer) -> None:
    """Both clients raise what the server raised, unary and streamed, with gRPC's error as the cause."""
    server.fail(full(kind), times=4)
    caught = []
    with Client(server.target, retries=0) as client:
        with pytest.raises(PawlError) as error:
            client.generate("x")
        caught.append(error.value)
        with pytest.raises(PawlError) as error:
            client.stream("x").final()
        caught.append(error.value)
    async with AsyncClient(server.target, retries=0) as async_client:
        with pytest.raises(PawlError) as error:
            await async_client.generate("x")
        caught.append(error.value)
        with pytest.raises(PawlError) as error:
            await async_client.stream("x").final()
        caught.append(error.value)
    for one in caught:
        assert parts(one) == parts(full(kind))
        assert isinstance(one.__cause__, grpc.RpcError)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


async def test_nothing_listens() -> None:
    """The error says where, and how to start a server."""
    target = f"127.0.0.1:{free_port()}"
    with Client(target, retries=0) as client, pytest.raises(pawl.Unavailable, match="pawl serve") as caught:
        client.generate("x")
    assert caught.value.reason == "CANNOT_CONNECT"
    assert target in caught.value.message
    async with AsyncClient(target, retries=0) as async_client:
        with pytest.raises(pawl.Unavailable, match="nothing listens there"):
            await async_client.models.list()
        with pytest.raises(pawl.Unavailable, match="pawl serve"):
            await async_client.stream("x").final()


async def test_deadline(server: FakeServer) -> None:
    """Passes to the server as gRPC's deadline; the message has the seconds."""
    server.hang(method="Generate")
    server.hang(method="StreamGenerate")
    with Client(server.target, timeout=0.2) as client, pytest.raises(pawl.DeadlineExceeded, match=r"within 0\.2 s"):
        client.generate("x")
    async with AsyncClient(server.target) as async_client:
        with pytest.raises(pawl.DeadlineExceeded, match="StreamGenerate"):
            await async_client.stream("x", timeout=0.2).final()
    assert server.wait_abandoned(2)


def test_wrong_listener(server: FakeServer) -> None:
    """Admin calls on the public port: told apart from a server that is broken."""
    with pawl.AdminClient(server.target) as admin, pytest.raises(pawl.NotSupported, match="admin listener"):
        admin.server_info()


def test_too_long_a_message_is_not_tried_again(server: FakeServer, client: Client) -> None:
    """gRPC's own limit shares a status with overload, and waiting cannot help."""
    with pytest.raises(pawl.InvalidRequest, match="too long") as caught:
        client.generate("x" * (64 * 1024 * 1024 + 1))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


async def test_server_goes_away() -> None:
    """A stream that had begun is broken; one that had not is unavailable."""
    with FakeServer() as server, Client(server.target, retries=0) as client:
        server.hang(after=1)
        server.hang(after=0)
        with client.stream("x") as begun:
            assert next(begun.text_stream)  # now the second plan is for the second stream
            with client.stream("x") as started:
                next(started)
                server.stop()
                with pytest.raises(pawl.StreamBroken) as broken:
                    begun.final()
                with pytest.raises(pawl.Unavailable) as unavailable:
                    started.final()
    assert broken.value.partial is not None
    assert broken.value.partial.text == "You "
    assert type(unavailable.value) is pawl.Unavailable


def test_api_key() -> None:
    """Sent as a bearer token; refused without."""
    with FakeServer(api_key="k") as server:
        with Client(server.target, api_key="k") as client:
            assert client.generate("x").text == "You said: x"
        with Client(server.target) as client, pytest.raises(pawl.Unauthenticated, match="PAWL_API_KEY"):
            client.generate("x")
        assert server.calls[0].metadata["authorization"] == "Bearer k"


def test_overloaded_attributes(server: FakeServer) -> None:
    """What a caller's own retry reads."""
    server.fail(Overloaded("full", retry_after=1.5, metadata={"queued": "9"}))
    with Client(server.target, retries=0) as client, pytest.raises(Overloaded) as caught:
        client.generate("x")
    assert (caught.value.retry_after, caught.value.metadata) == (1.5, {"queued": "9"})
