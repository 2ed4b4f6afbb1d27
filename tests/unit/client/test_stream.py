"""Streams, sync and async: whole, broken, tried again, cancelled."""

from __future__ import annotations

import asyncio

import pytest

import pawl
from pawl import AsyncClient, Client, Delta, End, FinishReason, SampleEnd, Start
from pawl.testing import FakeServer, ManualClock

REPLY = "You said: Hi"


def test_events_in_order(client: Client) -> None:
    """One start, deltas that follow each other, one sample end, one end."""
    with client.stream("Hi", token_ids=True, logprobs=1) as stream:
        events = list(stream)
    start, *deltas, sample_end, end = events
    assert isinstance(start, Start)
    assert isinstance(sample_end, SampleEnd)
    assert isinstance(end, End)
    num_tokens = 0
    for delta in deltas:
        assert isinstance(delta, Delta)
        assert delta.token_offset == num_tokens
        assert delta.token_count == len(delta.token_ids) == len(delta.logprobs)
        num_tokens += delta.token_count
    assert sample_end.output_tokens == end.usage.output_tokens == num_tokens == len(REPLY)


def test_final_is_what_generate_returns(client: Client) -> None:
    """Field by field, but for the id that the server draws."""
    options: pawl.GenerateOptions = {
        "logprobs": 2,
        "prompt_logprobs": 1,
        "token_ids": True,
        "stop": ["H"],
        "request_id": "same",
        "seed": 5,
    }
    whole = client.generate("Hi", **options)
    with client.stream("Hi", **options) as stream:
        assert stream.final() == whole
    assert whole.text == "You said: "
    assert whole.stop_match == pawl.StopMatch(stop_string="H")


async def test_samples_keep_apart(client: Client, async_client: AsyncClient) -> None:
    """Deltas and ends carry the index of their sample; the whole has all samples, and the first one's text."""
    wanted = [REPLY, f"{REPLY} #1", f"{REPLY} #2"]
    options: pawl.GenerateOptions = {"sample_count": 3, "token_ids": True, "logprobs": 0, "request_id": "same"}
    with client.stream("Hi", **options) as stream:
        events = list(stream)
        final = stream.final()
    texts, ends = ["", "", ""], list[int]()
    for event in events:
        if isinstance(event, Delta):
            assert event.token_offset == len(texts[event.index])
            texts[event.index] += event.text
        elif isinstance(event, SampleEnd):
            ends.append(event.index)
            assert event.output_tokens == len(wanted[event.index])
    assert (texts, ends) == (wanted, [0, 1, 2])
    assert [sample.text for sample in final.samples] == wanted
    assert [len(sample.logprobs) for sample in final.samples] == [len(text) for text in wanted]
    assert (final.text, final.token_ids) == (REPLY, final.samples[0].token_ids)
    assert final.usage.output_tokens == sum(map(len, wanted))
    assert client.generate("Hi", sample_count=3, token_ids=True, logprobs=0, request_id="same") == final
    assert await async_client.generate("Hi", **options) == final
    async with async_client.stream("Hi", sample_count=2) as async_stream:
        assert "".join([piece async for piece in async_stream.text_stream]) == REPLY
        assert [sample.text for sample in (await async_stream.final()).samples] == wanted[:2]
    assert [sample.text for sample in client.generate("Hi").samples] == [REPLY]


def test_a_broken_stream_has_what_came_of_each_sample(client: Client, server: FakeServer) -> None:
    server.truncate(after=3)
    with pytest.raises(pawl.StreamBroken) as broken, client.stream("Hi", sample_count=2) as stream:
        stream.final()
    partial = broken.value.partial
    assert partial is not None
    assert [sample.text for sample in partial.samples] == ["You said", "You "]
    assert [sample.finish_reason for sample in partial.samples] == [None, None]


@pytest.mark.parametrize(("count", "temperature"), [(0, None), (17, None), (2, 0.0)])
def test_samples_that_cannot_be(client: Client, count: int, temperature: float | None) -> None:
    with pytest.raises(pawl.InvalidRequest) as refused:
        client.generate("Hi", sample_count=count, temperature=temperature)
    assert refused.value.violations[0].field == "sampling.sample_count"


async def test_text_stream(client: Client, async_client: AsyncClient) -> None:
    """Pieces that are never empty; the final completion afterwards without reading again."""
    with client.stream("Hi") as stream:
        pieces = list(stream.text_stream)
        final = stream.final()
    async with async_client.stream("Hi") as async_stream:
        async_pieces = [piece async for piece in async_stream.text_stream]
        async_final = await async_stream.final()
    assert pieces == async_pieces == ["You ", "said", ": Hi"]
    assert final.text == async_final.text == REPLY
    assert final.finish_reason is FinishReason.STOP
    assert stream.request_id == final.request_id != async_final.request_id


async def test_leaving_early_cancels(server: FakeServer, client: Client, async_client: AsyncClient) -> None:
    """The server sees the caller go; what came is still there."""
    server.hang(after=1)
    with client.stream("Hi") as stream:
        for _ in stream.text_stream:
            break
    assert server.wait_abandoned(1)
    assert stream.partial.text == "You "
    server.hang(after=1)
    async with async_client.stream("Hi") as async_stream:
        async for _ in async_stream.text_stream:
            break
    assert server.wait_abandoned(2)
    assert server.wait_live(0)
    with pytest.raises(pawl.Cancelled, match="closed before its end"):
        stream.final()
    with pytest.raises(pawl.Cancelled, match="closed before its end"):
        await async_stream.final()


def test_an_exception_in_the_block_cancels(server: FakeServer, client: Client) -> None:
    """And passes through unchanged."""
    server.hang(after=1)
    stream = client.stream("Hi")

    def read() -> None:
        with stream:
            next(stream.text_stream)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()
    assert server.wait_abandoned()


async def test_cancelling_the_task_cancels_the_request(server: FakeServer, async_client: AsyncClient) -> None:
    """`asyncio.CancelledError` passes; no pawl error takes its place."""
    server.hang(after=1)
    began = asyncio.Event()

    async def read() -> None:
        async with async_client.stream("Hi") as stream:
            async for _ in stream.text_stream:
                began.set()

    task = asyncio.create_task(read())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.wait_abandoned)


async def test_closing_from_another_task(server: FakeServer, async_client: AsyncClient) -> None:
    """The reader meets Cancelled, and its own task lives on."""
    server.hang(after=1)
    stream = async_client.stream("Hi")
    began = asyncio.Event()

    async def read() -> None:
        async for _ in stream.text_stream:
            began.set()

    task = asyncio.create_task(read())
    await began.wait()
    await stream.close()
    with pytest.raises(pawl.Cancelled):
        await task


@pytest.mark.parametrize("after", [None, 0])
async def test_broken_before_the_first_delta_is_tried_again(
    after: int | None, server: FakeServer, client: Client, async_client: AsyncClient, clock: ManualClock
) -> None:
    """Also after the start event: it is sent on admission and delivers nothing."""
    server.fail(pawl.Unavailable("worker lost"), after=after)
    with client.stream("Hi") as stream:
        assert stream.final().text == REPLY
    server.fail(pawl.Unavailable("worker lost"), after=after)
    async with async_client.stream("Hi") as async_stream:
        assert (await async_stream.final()).text == REPLY
    assert len(clock.slept) == 2
    assert len(server.calls) == 4


def test_a_second_start_replaces_the_first(server: FakeServer, client: Client) -> None:
    """The stream's id is the one that lives."""
    server.fail(pawl.Unavailable("worker lost"), after=0)
    with client.stream("Hi") as stream:
        starts = [event for event in stream if isinstance(event, Start)]
        assert [start.request_id for start in starts] == ["fake-1", "fake-2"]
        assert stream.request_id == stream.final().request_id == "fake-2"


async def test_broken_after_a_delta_is_not_tried_again(
    server: FakeServer, client: Client, async_client: AsyncClient, clock: ManualClock
) -> None:
    """Output was delivered: the caller gets it, and the reason, and decides."""
    lost = pawl.Unavailable("worker lost", reason="WORKER_LOST", retry_after=1.0, metadata={"replica": "0"})
    server.fail(lost, after=2, times=2)
    with pytest.raises(pawl.StreamBroken, match="after 8 tokens: worker lost") as caught, client.stream("Hi") as stream:
        stream.final()
    with pytest.raises(pawl.StreamBroken) as async_caught:
        await async_client.stream("Hi").final()
    for error in (caught.value, async_caught.value):
        assert error.partial is not None
        assert error.partial.text == "You said"
        assert error.partial.finish_reason is None
        assert error.partial.usage.output_tokens == 8
        assert (error.reason, error.retry_after, error.metadata) == ("WORKER_LOST", 1.0, {"replica": "0"})
        assert error.request_id == error.partial.request_id != ""
    assert clock.slept == []
    assert len(server.calls) == 2


def test_other_errors_keep_their_class(server: FakeServer, client: Client) -> None:
    """A defect in the middle of a stream is a defect; the text so far stays at hand."""
    server.fail(pawl.ServerError("oops"), after=1)
    with client.stream("Hi") as stream:
        with pytest.raises(pawl.ServerError) as caught:
            stream.final()
        assert stream.partial.text == "You "
        assert caught.value.request_id == "fake-1"
        with pytest.raises(pawl.ServerError):  # a failed stream never looks complete
            stream.final()


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_stream_without_its_end_is_broken(
    after: int, server: FakeServer, client: Client, async_client: AsyncClient
) -> None:
    """Even if gRPC says OK."""
    server.truncate(after=after)
    with pytest.raises(pawl.StreamBroken) as caught:
        client.stream("Hi").final()
    assert caught.value.reason == "STREAM_CUT"
    assert caught.value.partial is not None
    assert caught.value.partial.text == REPLY[: 4 * after]
    server.truncate(after=after)
    with pytest.raises(pawl.StreamBroken):
        await async_client.stream("Hi").final()


async def test_retry_info_is_obeyed(
    server: FakeServer, client: Client, async_client: AsyncClient, clock: ManualClock
) -> None:
    """The wait is the server's, for streams and plain calls alike."""
    clock.chance = 0.0
    for _ in range(2):
        server.fail(pawl.Overloaded("full", retry_after=3.0))
    client.stream("Hi").final()
    client.generate("Hi")
    server.fail(pawl.Overloaded("full", retry_after=4.0), times=2)
    await async_client.generate("Hi")
    assert clock.slept == [3.0, 3.0, 4.0, 4.0]


def test_retries_come_to_an_end(server: FakeServer, client: Client, clock: ManualClock) -> None:
    """Three attempts, then the last error."""
    server.fail(pawl.Overloaded("full"), times=3)
    with pytest.raises(pawl.Overloaded):
        client.stream("Hi").final()
    assert len(clock.slept) == 2


def test_cancel_by_id(server: FakeServer, client: Client) -> None:
    """A stream cancelled from elsewhere ends cleanly, and says so."""
    server.hang(after=1)
    with client.stream("Hi", request_id="mine") as stream:
        next(stream.text_stream)
        assert client.cancel("mine", "other") == {
            "mine": pawl.CancelOutcome.CANCELLED,
            "other": pawl.CancelOutcome.NOT_FOUND,
        }
        assert stream.final().finish_reason is FinishReason.CANCELLED
    assert client.cancel("mine") == {"mine": pawl.CancelOutcome.ALREADY_FINISHED}


def test_an_empty_output_is_whole() -> None:
    """No delta at all is a completion too."""
    with FakeServer(reply="") as server, Client(server.target) as client, client.stream("Hi") as stream:
        final = stream.final()
    assert (final.text, final.finish_reason) == ("", FinishReason.STOP)


async def test_many_at_once(server: FakeServer, async_client: AsyncClient) -> None:
    """One async client serves many tasks."""
    answers = await asyncio.gather(*(async_client.generate(f"p{i}") for i in range(20)))
    assert [answer.text for answer in answers] == [f"You said: p{i}" for i in range(20)]
