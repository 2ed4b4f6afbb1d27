"""The server's `stream_interval`: fewer messages of the same output, the first and the last of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from pawl.v1 import inference_pb2, types_pb2
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.front_end import RunningFrontEnd, front_end
from tests.fakes.tokenizer import write_checkpoint

_NUM_TOKENS = 20
_INTERVALS = [1, 2, 3, 8, 1024]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "toy")


def _asked(
    stops: list[str], num_samples: int = 1, *, own: int | None = None, request_id: str = ""
) -> inference_pb2.StreamGenerateRequest:
    """A request for all that a stream can have; `own`: its own least number of tokens in a delta."""
    return inference_pb2.StreamGenerateRequest(
        request=inference_pb2.GenerateRequest(
            prompt=types_pb2.Prompt(text="hello"),
            sampling=types_pb2.SamplingParams(sample_count=num_samples, seed=5),
            stop=types_pb2.StopParams(max_output_tokens=_NUM_TOKENS, stop_strings=stops),
            output=types_pb2.OutputOptions(token_ids=True, logprobs=1),
            options=types_pb2.RequestOptions(request_id=request_id),
        ),
        stream=inference_pb2.StreamOptions(min_chunk_tokens=own),
    )


async def _read(call: Any) -> list[inference_pb2.StreamGenerateResponse]:
    events: list[inference_pb2.StreamGenerateResponse] = []
    await _read_into(events, call)
    return events


async def _read_into(events: list[inference_pb2.StreamGenerateResponse], call: Any) -> None:
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)


def _deltas(events: list[inference_pb2.StreamGenerateResponse], index: int = 0) -> list[inference_pb2.StreamDelta]:
    return [event.delta for event in events if event.HasField("delta") and event.delta.index == index]


def _joined(events: list[inference_pb2.StreamGenerateResponse], num_samples: int) -> list[object]:
    """All that a client gets, without the cuts between the messages."""
    whole: list[object] = []
    for index in range(num_samples):
        pieces = _deltas(events, index)
        whole.append(
            (
                "".join(piece.text for piece in pieces),
                [token_id for piece in pieces for token_id in piece.token_ids],
                [entry.SerializeToString() for piece in pieces for entry in piece.logprobs],
                next(e.sample_end for e in events if e.HasField("sample_end") and e.sample_end.index == index),
            )
        )
        counts = [piece.token_count for piece in pieces]
        assert [piece.token_offset for piece in pieces] == [sum(counts[:place]) for place in range(len(counts))]
    return [*whole, events[-1].end.usage]


def _check_cuts(events: list[inference_pb2.StreamGenerateResponse], interval: int, index: int = 0) -> None:
    """At least so many tokens in every message between the first and the last."""
    counts = [delta.token_count for delta in _deltas(events, index)]
    assert all(count >= interval for count in counts[1:-1]), counts
    assert len(counts) <= 3 + _NUM_TOKENS // interval


@pytest.mark.parametrize(
    ("stops", "num_samples"), [([], 1), (["jk"], 1), ([], 3)], ids=["to the end", "stop string", "samples"]
)
async def test_every_interval_gives_the_same(checkpoint: Path, stops: list[str], num_samples: int) -> None:
    found = []
    for interval in _INTERVALS:
        async with front_end(checkpoint, stream_interval=interval) as server:
            events = await _read(server.inference.StreamGenerate(_asked(stops, num_samples), timeout=20))
            for index in range(num_samples):
                _check_cuts(events, interval, index)
            found.append(_joined(events, num_samples))
    assert all(each == found[0] for each in found[1:])


async def test_a_request_that_says_it_itself_is_obeyed(checkpoint: Path) -> None:
    async with front_end(checkpoint, stream_interval=8) as server:
        events = await _read(server.inference.StreamGenerate(_asked([], own=5), timeout=20))
    counts = [delta.token_count for delta in _deltas(events)]
    assert min(counts[:-1]) >= 5
    assert sum(counts) == _NUM_TOKENS


async def _begin(server: RunningFrontEnd, request_id: str) -> Any:
    """A stream whose engine has sent five tokens of which only the first is here."""
    server.engine.hold_after = 5
    call: Any = server.inference.StreamGenerate(_asked([], request_id=request_id), timeout=20)
    assert (await call.read()).HasField("start")
    first = (await call.read()).delta
    assert first.token_offset == 0
    assert first.token_count >= 1
    await server.engine.seen(lambda: server.engine.num_tokens >= 5)
    return call, first.token_count


async def test_nothing_is_held_back_when_a_stream_is_cancelled(checkpoint: Path) -> None:
    async with front_end(checkpoint, stream_interval=16) as server:
        call, num_first = await _begin(server, "cancelled")
        await server.inference.Cancel(inference_pb2.CancelRequest(request_ids=["cancelled"]), timeout=20)
        events = await _read(call)
    told = num_first + sum(delta.token_count for delta in _deltas(events))
    assert told == events[-1].end.usage.output_tokens
    ends = [event.sample_end for event in events if event.HasField("sample_end")]
    assert [end.finish_reason for end in ends] == [types_pb2.FINISH_REASON_CANCELLED]


async def test_nothing_is_held_back_when_the_engine_dies(checkpoint: Path) -> None:
    async with front_end(checkpoint, stream_interval=16) as server:
        call, num_first = await _begin(server, "lost")
        await server.engine.kill()
        events: list[inference_pb2.StreamGenerateResponse] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_into(events, call)
    told = num_first + sum(delta.token_count for delta in _deltas(events))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert f"after {told} tokens" in str(caught.value.details())


async def test_the_engine_is_told_nothing_of_it(checkpoint: Path) -> None:
    """An engine never holds tokens back: a stop string would be seen late, and its death would take them along."""
    submits = []
    for interval in (1, 8):
        async with front_end(checkpoint, stream_interval=interval) as server:
            await _read(server.inference.StreamGenerate(_asked([], request_id="same"), timeout=20))
            submit = engine_pb2.Submit()
            submit.CopyFrom(server.engine.submits[0])
            submit.ClearField("cache_key")
            submits.append(submit)
    assert submits[0] == submits[1]
