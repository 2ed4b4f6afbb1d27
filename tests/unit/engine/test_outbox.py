from __future__ import annotations

import pytest

from pawl_server.engine.link import outbox as outbox_module
from pawl_server.engine.link.outbox import Outbox
from pawl_server.internal.v1 import engine_pb2


def _kinds(frames: list[engine_pb2.ConnectResponse]) -> list[str | None]:
    return [frame.WhichOneof("frame") for frame in frames]


async def test_steps_of_a_stalled_connection_merge_into_one_frame() -> None:
    outbox = Outbox(1)
    for step in range(5):
        outbox.add_tokens([7, 8], [step, step], [100 + step, 200 + step])
        outbox.step_done(step + 1)
    frames = await outbox.take()
    assert _kinds(frames) == ["tokens"]
    tokens = frames[0].tokens
    assert tokens.step == 5
    assert list(tokens.handles) == [7, 8] * 5
    assert list(tokens.indices) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert list(tokens.logprobs) == []


async def test_prompt_logprobs_come_first_then_tokens_then_ends_then_the_latest_load() -> None:
    outbox = Outbox(1)
    outbox.handles.add(7)
    outbox.set_load(engine_pb2.EngineLoad(step=1))
    outbox.add_end(engine_pb2.End(handle=7))
    outbox.add_tokens([7], [0], [1])
    outbox.add_prompt_logprobs(engine_pb2.PromptLogprobs(handle=7))
    outbox.step_done(1)
    outbox.set_load(engine_pb2.EngineLoad(step=2))
    frames = await outbox.take()
    assert _kinds(frames) == ["prompt_logprobs", "tokens", "end", "load"]
    assert frames[-1].load.step == 2
    assert outbox.handles == set()


async def test_logprobs_stay_with_their_token() -> None:
    outbox = Outbox(1)
    position = engine_pb2.PositionLogprobs(token_id=12, logprob=-0.5, rank=1)
    outbox.add_tokens([1, 2], [0, 0], [11, 12], [None, position])
    outbox.step_done(1)
    (frame,) = await outbox.take()
    assert [position.rank for position in frame.tokens.logprobs] == [0, 1]
    outbox.add_tokens([1], [1], [13])
    outbox.step_done(2)
    (frame,) = await outbox.take()
    assert list(frame.tokens.logprobs) == []


async def test_a_long_backlog_is_cut_into_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_FRAME_TOKENS", 4)
    outbox = Outbox(1)
    for index in range(10):
        outbox.add_tokens([1], [index], [index], [engine_pb2.PositionLogprobs(token_id=index, rank=1)])
    outbox.step_done(1)
    frames = await outbox.take()
    assert [list(frame.tokens.indices) for frame in frames] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [[p.token_id for p in frame.tokens.logprobs] for frame in frames] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


async def test_cache_events_of_a_stalled_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit any more is replaced by the word that the reader knows nothing."""
    monkeypatch.setattr(outbox_module, "MAX_CACHE_EVENTS", 3)
    outbox = Outbox(1)
    event = engine_pb2.CacheEvent(name=b"n", num_tokens=4)
    for _ in range(3):
        outbox.add_cache_events(engine_pb2.CacheEvents(events=[event]))
    outbox.set_load(engine_pb2.EngineLoad())
    frames = await outbox.take()
    assert _kinds(frames) == ["load", "cache_events"]
    assert (frames[1].cache_events.reset, len(frames[1].cache_events.events)) == (False, 3)
    for _ in range(4):
        outbox.add_cache_events(engine_pb2.CacheEvents(events=[event]))
    outbox.set_load(engine_pb2.EngineLoad())
    frames = await outbox.take()
    assert (frames[1].cache_events.reset, len(frames[1].cache_events.events)) == (True, 1)
