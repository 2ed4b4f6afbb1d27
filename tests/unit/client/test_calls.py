"""Every other call, in both clients, against the fake."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

import pawl
from pawl import (
    AdminClient,
    AsyncAdminClient,
    AsyncClient,
    Client,
    FinishReason,
    Role,
    Sampling,
    WorkerState,
    assistant,
    system,
    user,
)
from pawl.testing import FakeServer, ManualClock


async def test_generate(client: Client, async_client: AsyncClient) -> None:
    """Every field of a completion, the same from both."""
    options: pawl.GenerateOptions = {
        "max_tokens": 3,
        "logprobs": 2,
        "prompt_logprobs": 0,
        "token_ids": True,
        "seed": 9,
        "request_id": "r",
    }
    completion = client.generate("Hi", **options)
    assert completion == await async_client.generate("Hi", **options)
    assert completion.text == "You"
    assert completion.finish_reason is FinishReason.MAX_TOKENS
    assert str(completion.finish_reason) == "max_tokens"
    assert completion.stop_match is None
    assert completion.token_ids == (89, 111, 117)
    assert [(t.token_bytes, t.rank, len(t.alternatives)) for t in completion.logprobs] == [
        (b"Y", 1, 2),
        (b"o", 1, 2),
        (b"u", 1, 2),
    ]
    assert [t.logprob is None for t in completion.prompt_logprobs] == [True, False, False]
    assert completion.usage == pawl.Usage(prompt_tokens=3, cached_prompt_tokens=0, output_tokens=3)
    timings = completion.timings
    assert timings is not None
    assert timings.queue + timings.prefill + timings.decode + timings.stalled == pytest.approx(timings.total)
    assert (completion.request_id, completion.model, completion.seed) == ("r", "models/fake", 9)
    assert completion.created == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert client.generate("Hi", timings=False).timings is None


def test_token_id_prompt_and_no_special_tokens(client: Client) -> None:
    """Ids are used as they are; text gets a begin token unless told not to."""
    assert client.generate([72, 105]).usage.prompt_tokens == 2
    assert client.generate("Hi").usage.prompt_tokens == 3
    assert client.generate("Hi", add_special_tokens=False).usage.prompt_tokens == 2


def test_violations(client: Client) -> None:
    """All at once."""
    with pytest.raises(pawl.InvalidRequest) as caught:
        client.generate("Hi", top_p=3, temperature=-1)
    assert [v.field for v in caught.value.violations] == ["sampling.temperature", "sampling.top_p"]


async def test_chat_once(server: FakeServer, client: Client, async_client: AsyncClient) -> None:
    """A plain list of messages, whole and streamed."""
    messages = [system("Be brief."), user("Hi"), assistant("Ho"), user("Hm")]
    assert client.chat_once(messages).text == "You said: Hm"
    assert (await async_client.chat_once(messages)).text == "You said: Hm"
    with client.stream_chat(messages, max_tokens=3) as stream:
        assert stream.final().text == "You"
    async with async_client.stream_chat(messages) as async_stream:
        assert (await async_stream.final()).text == "You said: Hm"
    assert [call.method for call in server.calls] == ["Chat", "Chat", "StreamChat", "StreamChat"]


async def test_score(client: Client, async_client: AsyncClient) -> None:
    """A sequence in the order of the continuations, with usage."""
    scores = client.score("Hi", ["You", [78, 111]], alternatives=1)
    assert scores == await async_client.score("Hi", ["You", [78, 111]], alternatives=1)
    assert len(scores) == 2
    assert [s.greedy_match for s in scores] == [True, False]
    assert scores[0].total_logprob == pytest.approx(sum(t.logprob or 0 for t in scores[0].tokens))
    assert scores[1].byte_count == 2
    assert scores[-1:] == (scores[1],)
    assert scores.usage.prompt_tokens == 8


async def test_tokens(client: Client, async_client: AsyncClient) -> None:
    """Text to ids to text; offsets in bytes."""
    tokens = client.tokenize("hé", offsets=True)
    assert tokens == await async_client.tokenize("hé", offsets=True)
    assert tokens.token_ids == (1, 104, 233)
    assert [(t.start_byte, t.end_byte, t.special) for t in tokens.tokens] == [
        (0, 0, True),
        (0, 1, False),
        (1, 3, False),
    ]
    assert len(client.tokenize("hé", add_special_tokens=False)) == 2
    assert client.detokenize(tokens.token_ids) == await async_client.detokenize(tokens.token_ids) == "hé"
    assert client.detokenize(tokens.token_ids, skip_special_tokens=False) == "\x01hé"
    rendered = client.render_chat([user("Hi")])
    assert rendered == await async_client.render_chat([user("Hi")])
    assert rendered.text == "<user>Hi\n<assistant>"


async def test_models(client: Client, async_client: AsyncClient) -> None:
    """Listed and by name, short or long."""
    (model,) = client.models.list()
    assert [model] == await async_client.models.list()
    assert model == client.models.get("fake") == await async_client.models.get("models/fake")
    assert (model.id, model.default_sampling) == ("fake", Sampling(temperature=1.0))
    with pytest.raises(pawl.NotFound, match="served: fake") as caught:
        client.generate("Hi", model="other")
    assert caught.value.metadata["model"] == "other"


async def test_conversation(server: FakeServer, client: Client, async_client: AsyncClient) -> None:
    """Turns are remembered once they are whole."""
    chat = client.chat(system="Be brief.", max_tokens=20)
    assert chat.send("one").text == "You said: one"
    with chat.stream("two", max_tokens=3) as stream:
        assert list(stream.text_stream) == ["You"]
    assert [message.content for message in chat.history] == ["Be brief.", "one", "You said: one", "two", "You"]
    assert chat.history[-1].role is Role.ASSISTANT
    server.fail(pawl.ServerError("oops"))
    with pytest.raises(pawl.ServerError):
        chat.send("three")
    server.hang(after=1)
    with chat.stream("four") as stream:
        next(stream.text_stream)
    assert len(chat.history) == 5
    conversation = server.calls[1].fields["request"]
    assert isinstance(conversation, dict)
    assert conversation["stop"] == {"max_output_tokens": 3}
    assert len(conversation["conversation"]["messages"]) == 4
    chat.reset()
    assert [message.content for message in chat.history] == ["Be brief."]

    async_chat = async_client.chat(history=[user("a"), assistant("b")])
    assert (await async_chat.send("c")).text == "You said: c"
    async with async_chat.stream("d") as async_stream:
        await async_stream.final()
    assert len(async_chat.history) == 6
    async_chat.reset()
    assert async_chat.history == []


async def test_wait_ready(server: FakeServer, client: Client, async_client: AsyncClient, clock: ManualClock) -> None:
    """Returns when the server serves; else says what it did last."""
    client.wait_ready()
    await async_client.wait_ready()
    server.set_ready(False)
    with pytest.raises(pawl.Unavailable, match="does not serve yet"):
        client.wait_ready(30)
    assert clock.time == pytest.approx(30)
    with pytest.raises(pawl.Unavailable, match=r"not ready within 0\.1 s"):
        await async_client.wait_ready(0.1)
    with Client("127.0.0.1:1", clock=clock.clock) as nobody, pytest.raises(pawl.Unavailable, match="nothing listens"):
        nobody.wait_ready(3)


async def test_admin(server: FakeServer, client: Client) -> None:
    """Facts, requests, load, cache and drain."""
    server.hang(after=1)
    with client.stream("Hi", request_id="r", priority=4, user="ann") as stream:
        next(stream.text_stream)
        with AdminClient(server.admin_target) as admin:
            assert admin.server_info().block_size == 16
            (state,) = admin.requests()
            assert (state.request_id, state.phase, state.priority, state.user) == ("r", "decode", 4, "ann")
            with admin.watch_load() as watch:
                first = next(watch)
                assert (first.running_requests, first.workers[0].state) == (1, WorkerState.READY)
                client.cancel("r")
                assert any(load.running_requests == 0 for load in watch)
            assert list(watch) == []
    async with AsyncAdminClient(server.admin_target) as async_admin:
        assert (await async_admin.server_info()).config == {"model": "fake"}
        assert await async_admin.requests() == []
        assert await async_admin.flush_prefix_cache() == 1
        async with async_admin.watch_load() as async_watch:
            assert (await anext(async_watch)).running_requests == 0
        assert [load async for load in async_watch] == []
        assert await async_admin.drain(grace=0.0) == 0
    with pytest.raises(pawl.Unavailable, match="not taking requests"):
        client.generate("Hi")


async def test_drain_cancels_what_is_left(server: FakeServer, client: Client) -> None:
    """After the grace period; the stream ends cleanly."""
    server.hang(after=1)
    with client.stream("Hi") as stream, AdminClient(server.admin_target) as admin:
        next(stream.text_stream)
        assert await asyncio.to_thread(lambda: admin.drain(grace=0.01)) == 1
        assert stream.final().finish_reason is FinishReason.CANCELLED


async def test_pages_are_followed() -> None:
    """`requests()` gives all of them, however short the server's pages are."""
    with (
        FakeServer(max_page_size=2) as server,
        Client(server.target) as client,
        AdminClient(server.admin_target) as admin,
    ):
        streams = [client.stream("Hi", request_id=f"r{number}") for number in range(3)]
        for stream in streams:
            server.hang(after=0)
            next(stream)
        assert [state.request_id for state in admin.requests()] == ["r0", "r1", "r2"]
        async with AsyncAdminClient(server.admin_target) as async_admin:
            assert len(await async_admin.requests()) == 3
        assert [call.method for call in server.calls].count("ListRequests") == 4


def test_a_forgotten_stream_is_cancelled(server: FakeServer, client: Client) -> None:
    """A stream that nobody holds any more frees its request, also without a `with` block."""
    server.hang(after=0)
    next(client.stream("Hi"))
    assert server.wait_abandoned()


def test_a_fault_after_deltas_waits_for_a_call_that_makes_them(server: FakeServer, client: Client) -> None:
    """Other calls go by without taking it."""
    server.truncate(after=1)
    assert [model.id for model in client.models.list()] == ["fake"]
    with client.stream("x") as stream, pytest.raises(pawl.StreamBroken):
        stream.final()


def test_a_fault_that_never_strikes_is_an_error() -> None:
    """A test that plans a fault and does not meet it is wrong."""
    with pytest.raises(AssertionError, match="never struck"), FakeServer() as server:
        server.fail(pawl.Overloaded("full"), method="Score")


def test_request_id_in_use(server: FakeServer, client: Client) -> None:
    """A live id is refused."""
    server.hang(after=0)
    with client.stream("Hi", request_id="r") as stream:
        next(stream)
        with pytest.raises(pawl.AlreadyExists):
            client.generate("Hi", request_id="r")


def test_log_variable() -> None:
    """`PAWL_LOG` shows the SDK's log; text and keys are not in it."""
    import os
    import subprocess
    import sys

    program = (
        "import pawl\nfrom pawl.testing import FakeServer, ManualClock\n"
        "with FakeServer() as s, pawl.Client(s.target, api_key='secret', clock=ManualClock().clock) as c:\n"
        "    s.fail(pawl.Overloaded('full')); c.generate('hidden words')\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PAWL_LOG": "info", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "QUEUE_FULL; again in" in answer.stderr
    assert "hidden" not in answer.stderr
    assert "secret" not in answer.stderr
