from __future__ import annotations

import msgspec
import pytest

from pawl.errors import InvalidRequest
from pawl_server.config import ModelSettings
from pawl_server.engine.life import describe_failure
from pawl_server.engine.spec import (
    EngineAddresses,
    EngineEvent,
    EngineFailed,
    EngineProgress,
    EngineReady,
    decode_event,
    decode_spec,
    encode,
    parse_ports,
)
from pawl_workers.errors import OutOfMemoryError
from tests.fakes.engine_worker import fake_spec

ADDRESSES = EngineAddresses(address="127.0.0.1:1", metrics_address="127.0.0.1:2", process_id=3)


def test_a_spec_survives_the_pipe_on_one_line() -> None:
    spec = fake_spec(replica=2, served_name="name\nwith a line end")
    line = encode(spec)
    assert b"\n" not in line
    assert decode_spec(line) == spec


def test_the_token_is_in_no_repr() -> None:
    assert "secret" not in repr(fake_spec())


def test_an_unknown_key_is_refused() -> None:
    line = encode(fake_spec()).replace(b'"replica"', b'"replicant"')
    with pytest.raises(msgspec.ValidationError):
        decode_spec(line)


@pytest.mark.parametrize(
    "event",
    [
        EngineProgress(step="memory", done=1, total=1, text="x", facts={"num_blocks": 3}),
        EngineReady(addresses=ADDRESSES, seconds=1.5),
        EngineFailed(code="internal", reason="ENGINE_FAILED", message="why", detail="where"),
    ],
)
def test_events_survive_the_pipe(event: EngineEvent) -> None:
    assert decode_event(encode(event)) == event


@pytest.mark.parametrize(
    ("text", "ports"),
    [("0", range(1)), ("50100", range(50100, 50101)), ("50100-50102", range(50100, 50103)), (" 7 ", range(7, 8))],
)
def test_ports(text: str, ports: range) -> None:
    assert parse_ports(text, "engine_ports") == ports


@pytest.mark.parametrize("text", ["", "-", "5-", "-5", "9-8", "65536", "0-9", "many", "1-2-3", "1.5"])
def test_ports_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="engine_ports"):
        parse_ports(text, "engine_ports")


def test_failures_carry_the_root_cause() -> None:
    assert describe_failure(OutOfMemoryError("needs 9 GiB")) == EngineFailed(
        code="unavailable", reason="OUT_OF_MEMORY", message="needs 9 GiB"
    )
    failure = describe_failure(InvalidRequest("bad", reason="BAD_SETTING"))
    assert (failure.code, failure.reason, failure.detail) == ("invalid_request", "BAD_SETTING", "")
    try:
        raise KeyError("x")  # noqa: TRY301 (a traceback is wanted)
    except KeyError as error:
        failure = describe_failure(error)
    assert "test_failures_carry_the_root_cause" in failure.detail


def test_settings_are_defaults_unless_said() -> None:
    assert fake_spec(model="m").model == ModelSettings(model="m")
