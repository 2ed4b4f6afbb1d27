"""The samples of a request as one stream, without an engine."""

from __future__ import annotations

import pytest

from pawl.errors import ServerError
from pawl.v1 import types_pb2
from pawl_server.frontend.convert import Finish, Phases
from pawl_server.frontend.mailbox import Delta
from pawl_server.frontend.samples import Samples, joint_finish
from pawl_server.frontend.stream import RequestStream
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.request_stream import request_stream


def sample(seed: int) -> RequestStream:
    submit = engine_pb2.Submit(prompt_ids=[7, 8], sampling=engine_pb2.Sampling(seed=seed), prompt_logprobs=seed)
    return request_stream(submit, "r")


def finish(number: int, *, first: int, preemptions: int) -> Finish:
    usage = types_pb2.Usage(prompt_tokens=5, cached_prompt_tokens=number, output_tokens=10 * number)
    phases = Phases(1, 2, 3, 4, 10, first, preemptions)
    reason = types_pb2.FINISH_REASON_STOP if number == 2 else types_pb2.FINISH_REASON_MAX_TOKENS
    return Finish(reason, f"outcome {number}", None, usage, phases, [engine_pb2.PositionLogprobs(rank=number)])


def test_ends_are_joined() -> None:
    """Output is summed, the prompt is the first sample's, the times those of the last to end."""
    ends = [
        (2, finish(2, first=5, preemptions=1)),
        (0, finish(1, first=4, preemptions=0)),
        (1, finish(3, first=6, preemptions=2)),
    ]
    joint = joint_finish(ends)
    assert (joint.usage.prompt_tokens, joint.usage.cached_prompt_tokens, joint.usage.output_tokens) == (5, 1, 60)
    assert (joint.reason, joint.outcome) == (types_pb2.FINISH_REASON_MAX_TOKENS, "outcome 3")
    assert (joint.phases.total, joint.phases.first_token, joint.phases.preemptions) == (10, 4, 3)
    assert [entry.rank for entry in joint.prompt_logprobs] == [1]
    assert joint_finish(ends[:1]) is ends[0][1]


async def test_pieces_come_from_whoever_has_some_and_keep_their_order() -> None:
    streams = [sample(seed) for seed in range(3)]
    samples = Samples(streams)
    assert (samples.phase, samples.num_tokens, samples.first_prompt_id) == ("queue", 0, 7)
    streams[2].on_tokens([0, 1], [11, 12], ())
    assert await samples.take() == (2, Delta(0, [11, 12]))
    streams[2].on_tokens([2], [13], ())
    streams[0].on_tokens([0], [21], ())
    end = engine_pb2.End(reason=engine_pb2.END_REASON_MAX_TOKENS)
    for stream in (streams[1], streams[0], streams[2]):
        stream.on_end(end)
    found: dict[int, list[object]] = {0: [], 1: [], 2: []}
    while samples.num_running:
        index, piece = await samples.take()
        found[index].append(piece.token_ids if isinstance(piece, Delta) else "end")
    assert found == {0: [[21], "end"], 1: ["end"], 2: [[13], "end"]}
    assert (samples.phase, samples.num_tokens) == ("decode", 4)


async def test_one_that_fails_fails_the_request() -> None:
    streams = [sample(seed) for seed in range(3)]
    samples = Samples(streams)
    streams[0].on_tokens([0], [5], ())
    error = engine_pb2.EngineError(code="internal", reason="SEQUENCE_FAILED", message="not finite")
    streams[1].on_end(engine_pb2.End(reason=engine_pb2.END_REASON_FAILED, error=error))
    assert await samples.take() == (0, Delta(0, [5]))
    with pytest.raises(ServerError, match="not finite"):
        await samples.take()
    samples.close(engine_pb2.ABORT_REASON_INTERNAL)


def test_one_request_asks_for_all_and_each_can_go_on_alone() -> None:
    """Another engine continues every sample as a request of its own: with its seed and what it has given so far."""
    streams = [sample(seed) for seed in (3, 40, 41)]
    submit = Samples(streams).submit()
    assert (submit.sampling.seed, list(submit.sample_seeds), list(submit.prompt_ids)) == (3, [40, 41], [7, 8])
    streams[1].on_tokens([0, 1], [5, 6], ())
    alone = streams[1].journal.resume()
    assert (alone.sampling.seed, list(alone.resume_ids), list(alone.sample_seeds)) == (40, [5, 6], [])
