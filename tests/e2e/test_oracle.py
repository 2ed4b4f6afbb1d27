"""The whole chain against itself, over gRPC, under pressure: the same request, alone and among others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from pawl import AdminClient, AsyncClient, CancelOutcome, PawlError, Stop
from pawl_server.exposition import parse_exposition
from pawl_workers.demo_model import corpus
from tests.fakes.servers import RunningServer, pawl_serve
from tests.fakes.waiting import wait_until

NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A pool of 64 blocks of 32 tokens, which two long prompts fill, and prompts computed in chunks of 64 tokens."""
    with pawl_serve(f"--num-blocks={NUM_BLOCKS}", "--max-running=16", "--max-batch-tokens=256") as running:
        yield running


async def _ask(client: AsyncClient, question: corpus.HeldOutQuestion, *, goes_on: bool) -> str:
    """The answer; one that goes on grows by eight blocks after it was admitted, so that others are preempted."""
    stop = Stop(max_tokens=256, ignore_eos=True) if goes_on else Stop(max_tokens=16)
    completion = await client.generate(question.prompt, stop=stop, temperature=0.0)
    return completion.text


async def test_concurrent_answers_are_those_given_alone(server: RunningServer) -> None:
    """64 held-out questions at once, short and long: an error in paging, chunking or caching is another answer."""
    questions = corpus.held_out_questions(52, seed=21) + corpus.held_out_questions(12, 21, 600, 900)
    random.Random(3).shuffle(questions)
    asked = [(question, number % 2 == 0) for number, question in enumerate(questions)]
    async with AsyncClient(server.target) as client:
        together = await asyncio.gather(*(_ask(client, question, goes_on=goes_on) for question, goes_on in asked))
        num_preempted = parse_exposition(server.scrape())["pawl_preemptions_total"]
        alone = [await _ask(client, question, goes_on=goes_on) for question, goes_on in asked]
    assert together == alone
    answered = [
        text.strip() == question.answer for (question, goes_on), text in zip(asked, alone, strict=True) if not goes_on
    ]
    assert sum(answered) >= 0.9 * len(answered)
    assert num_preempted > 0


async def _one(client: AsyncClient, draw: random.Random, number: int) -> str:
    prompt = [draw.randrange(300, 900) for _ in range(draw.choice([3, 20, 70]))]
    stop = Stop(max_tokens=draw.randint(1, 24), ignore_eos=True)
    name = f"random-{number}"
    doomed = draw.random() < 0.3
    async with client.stream(prompt, stop=stop, temperature=1.0, seed=number, request_id=name) as stream:
        if not doomed:
            return str((await stream.final()).finish_reason)
        wanted, seen = draw.randint(0, 6), 0
        if draw.random() < 0.5:  # by the Cancel call
            outcome = (await client.cancel(name))[name]
            assert outcome in (CancelOutcome.CANCELLED, CancelOutcome.NOT_FOUND, CancelOutcome.ALREADY_FINISHED)
            return "cancelled"
        async for _ in stream:  # by leaving in mid-stream
            seen += 1
            if seen > wanted:
                break
    return "left"


async def test_500_random_requests_leave_nothing_behind(server: RunningServer) -> None:
    """30 % cancelled at random moments; then free + cached blocks = all blocks, and no request in any table."""
    draw = random.Random(5)
    gate = asyncio.Semaphore(40)
    async with AsyncClient(server.target) as client:

        async def run(number: int) -> str:
            async with gate:
                try:
                    return await _one(client, random.Random(f"{number}-{draw.random()}"), number)
                except PawlError as error:
                    return type(error).__name__

        outcomes = await asyncio.gather(*(run(number) for number in range(500)))
    assert set(outcomes) <= {"max_tokens", "cancelled", "left"}, set(outcomes)
    assert outcomes.count("cancelled") + outcomes.count("left") > 100
    with AdminClient(server.admin) as admin:
        wait_until(lambda: admin.requests() == [], 30.0)

        def settled() -> bool:
            with admin.watch_load(min_interval=0.1) as watch:
                load = next(watch)
            blocks = load.free_blocks + load.evictable_blocks
            return load.running_requests == load.waiting_requests == 0 and blocks == load.block_count == NUM_BLOCKS

        wait_until(settled, 30.0)
