"""What a starting server prints."""

from __future__ import annotations

import io
import json

from pawl_server.cli.output import ConsoleOutput, JsonOutput
from pawl_server.config import Config
from pawl_server.engine.spec import EngineProgress
from pawl_server.fleet.replicas import ReplicaChanged, ReplicaProgress, ReplicaState, ReplicaStatus
from pawl_server.serve.events import Output, ServerAddresses

MEMORY = {
    "weight_bytes": 3 << 30,
    "activation_bytes": 1 << 29,
    "kv_bytes": 4 << 30,
    "num_blocks": 47_744,
    "block_size": 16,
    "cache_tokens": 763_904,
    "max_context": 8192,
    "max_concurrency": 93,
}
ADDRESSES = ServerAddresses(grpc="127.0.0.1:5", admin="127.0.0.1:6", metrics="http://127.0.0.1:7/metrics")


def feed(output: Output, replica: int, *, upto: str = "self-test") -> None:
    for progress in (
        EngineProgress(step="weights", done=1, total=2),
        EngineProgress(
            step="weights", done=2, total=2, text="8.2 M parameters", seconds=3.0, facts={"weight_bytes": 3 << 30}
        ),
        EngineProgress(step="memory", done=1, total=1, facts=MEMORY),
        EngineProgress(step="warm-up", done=3, total=3, text="prefill 64", seconds=0.5, facts={"num_tokens": 64}),
        EngineProgress(step="self-test", done=8, total=8, text="8 tokens", seconds=0.25),
    ):
        output.fleet_event(ReplicaProgress(replica=replica, incarnation=1, progress=progress))
        if progress.step == upto and progress.done == progress.total:
            return


def console(replicas: int = 1) -> tuple[ConsoleOutput, io.StringIO]:
    stream = io.StringIO()
    now = iter(float(second) for second in range(1000))
    return ConsoleOutput(Config().replace(replicas=replicas), stream, lambda: next(now)), stream


def test_a_start_prints_its_steps_in_order_and_ready_last() -> None:
    output, stream = console()
    output.begin("serve", "Ray")
    feed(output, 0)
    output.warning("open to anyone")
    output.ready(ADDRESSES)
    lines = stream.getvalue().splitlines()
    heads = [line.split("]")[0] + "]" for line in lines if line.startswith("[")]
    assert heads == ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"]
    assert lines[0].startswith("pawl serve  demo  1 replica(s)")
    assert any("KV cache    47 744 blocks x 16 = 763 904 tokens: 93 requests of 8 192" in line for line in lines)
    assert any("weights 3.0 GiB | activations 512.0 MiB | KV 4.0 GiB" in line for line in lines)
    assert any(line.startswith("[2/5] weights") and line.endswith("3.0 s") for line in lines)
    assert "WARNING open to anyone" in lines
    assert lines[-1].startswith("READY  grpc 127.0.0.1:5  admin 127.0.0.1:6  metrics http://127.0.0.1:7/metrics  (")


def test_a_step_is_printed_when_every_replica_has_done_it() -> None:
    output, stream = console(replicas=2)
    feed(output, 0)
    assert "[1/5]" not in stream.getvalue()
    feed(output, 1, upto="weights")
    assert "[2/5]" in stream.getvalue()
    assert "3.0 GiB each" in stream.getvalue()
    assert "[3/5]" not in stream.getvalue()


def test_a_replica_that_is_ready_has_done_every_step() -> None:
    output, stream = console()
    output.fleet_event(ReplicaChanged(status=ReplicaStatus(index=0, state=ReplicaState.READY)))
    assert stream.getvalue().count("/5]") == 5


def test_a_replica_that_fails_at_the_start_is_told_with_its_reason() -> None:
    output, stream = console()
    status = ReplicaStatus(index=0, state=ReplicaState.BACKOFF, detail="was killed by SIGKILL")
    output.fleet_event(ReplicaChanged(status=status, restart_reason="start_failed"))
    assert stream.getvalue() == "WARNING replica 0: was killed by SIGKILL; it is started again\n"


def test_nothing_follows_ready() -> None:
    output, stream = console()
    output.ready(ADDRESSES)
    before = stream.getvalue()
    feed(output, 0)
    output.fleet_event(ReplicaChanged(status=ReplicaStatus(index=0, state=ReplicaState.BACKOFF, detail="died")))
    assert stream.getvalue() == before


def test_a_closed_output_does_not_end_the_server() -> None:
    output, stream = console()
    stream.close()
    output.ready(ADDRESSES)


def test_json_has_one_object_per_event() -> None:
    stream = io.StringIO()
    output = JsonOutput(stream)
    output.begin("serve", "Ray")
    feed(output, 0)
    output.ready(ADDRESSES)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["begin", *["progress"] * 5, "ready"]
    assert events[3]["progress"]["facts"]["cache_tokens"] == 763_904
    assert events[-1]["grpc"] == "127.0.0.1:5"
