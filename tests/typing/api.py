"""Programs that use the SDK as the README does. Only type-checked (mypy --strict), never run."""

from __future__ import annotations

import asyncio
import time
from typing import assert_type

import pawl
from pawl import (
    AdminClient,
    AsyncAdminClient,
    AsyncClient,
    Client,
    Completion,
    Delta,
    Event,
    GenerateOptions,
    Retry,
    Sampling,
    Start,
    Stop,
    system,
    user,
)
from pawl.testing import FakeServer, ManualClock


def generate() -> None:
    with Client("dns:///pawl:50051", api_key="...", timeout=60, retries=3, tls=True, default_model="m") as client:
        completion = client.generate("The capital of France is", max_tokens=8, temperature=0)
        assert_type(completion, Completion)
        assert_type(completion.text, str)
        if completion.timings is not None:
            print(completion.usage.cached_prompt_tokens, completion.timings.time_to_first_token)
        client.generate([1, 2, 3], stop=["\n"], logprobs=2, token_ids=True)
        fast = client.with_options(timeout=5, retries=Retry(retries=1), priority=10)
        assert_type(fast, Client)
        client.generate("x", max_token=3)  # type: ignore[call-arg]
        client.generate("x", temperature="hot")  # type: ignore[arg-type]


def options() -> None:
    shared: GenerateOptions = {"max_tokens": 8, "seed": 1}
    with Client() as client:
        client.generate("x", **shared)
        client.stream("x", **shared)


def stream() -> None:
    with Client() as client:
        with client.stream(
            "Once upon a time",
            sampling=Sampling(temperature=0.8, top_p=0.95, seed=7),
            stop=Stop(max_tokens=200),
            min_chunk_tokens=4,
        ) as running:
            for piece in running.text_stream:
                assert_type(piece, str)
                print(piece, end="", flush=True)
            assert_type(running.final(), Completion)
        many = client.generate("x", sample_count=3)
        assert_type([sample.text for sample in many.samples], list[str])
        with client.stream("x", logprobs=5, sample_count=3) as running:
            for event in running:
                assert_type(event, Event)
                match event:
                    case Start():
                        print(event.request_id)
                    case Delta():
                        print(event.index, event.token_offset, event.token_count, event.logprobs)
                    case _:
                        print(event)


def chat() -> None:
    with Client() as client:
        conversation = client.chat(system="Be brief.", temperature=0)
        print(conversation.send("Hi").text, conversation.history[-1].content)
        client.chat_once([system("Be brief."), user("Hi")], template_kwargs={"a": "b"})
        print(client.render_chat([user("Hi")]).text)


def other_calls() -> None:
    with Client() as client:
        scores = client.score("The sky is", [" blue", " green"])
        assert_type(scores[0].total_logprob, float)
        assert_type(scores[0].tokens[0].rank, int)
        token_ids = client.tokenize("héllo").token_ids
        assert_type(client.detokenize(token_ids), str)
        print(client.cancel("req-123")["req-123"], client.models.list()[0].id)
    with AdminClient() as admin:
        print(admin.server_info().block_count, admin.requests(), admin.drain(grace=30))
        with admin.watch_load() as watch:
            for load in watch:
                print(load.output_tokens_per_second)


def errors() -> None:
    client = Client()
    try:
        client.generate("...", top_p=3)
    except pawl.InvalidRequest as error:
        for violation in error.violations:
            print(violation.field, violation.message)
    except pawl.Overloaded as error:
        time.sleep(error.retry_after or 1.0)
    except pawl.StreamBroken as error:
        if error.partial is not None:
            assert_type(error.partial, Completion)
            print(error.partial.text)


async def use_async(prompts: list[str]) -> None:
    async with AsyncClient() as client:
        answers = await asyncio.gather(*(client.generate(prompt) for prompt in prompts))
        assert_type(answers, list[Completion])
        async with client.stream("x") as running:
            async for piece in running.text_stream:
                assert_type(piece, str)
            assert_type(await running.final(), Completion)
        async with client.chat(system="Be brief.").stream("Hi") as running:
            async for event in running:
                assert_type(event, Event)
    async with AsyncAdminClient() as admin:
        print(await admin.server_info())


def in_tests() -> None:
    clock = ManualClock()
    with FakeServer(reply="Paris.") as server, Client(server.target, clock=clock.clock) as client:
        server.fail(pawl.Overloaded("full", retry_after=2.0))
        assert client.generate("The capital of France is").text == "Paris."
        assert clock.slept == [2.0]
