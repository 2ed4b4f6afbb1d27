"""Several samples of one prompt over a real socket, on the embedded model: each is what a request of its own gives."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from pawl import AdminClient, AsyncClient, Client, Completion, Delta, End, FinishReason, SampleEnd, Stop
from pawl.errors import InvalidRequest
from pawl.seeds import derive_seed
from tests.fakes.servers import RunningServer, pawl_serve
from tests.fakes.waiting import wait_until

NUM_BLOCKS = 64
PROMPT = "The library of the old town has a reading room with tall windows. " * 3
LONG = Stop(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A pool of 64 blocks of 32 tokens; prompts in chunks of 16 tokens, and a second step planned while one runs."""
    with pawl_serve(
        f"--num-blocks={NUM_BLOCKS}", "--max-running=12", "--max-prefill-chunk=16", "--pipeline-depth=2"
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as connected:
        yield connected


def prompt_tokens(server: RunningServer, source: str) -> int:
    """Prompt tokens that the engine got from somewhere, so far; its metrics are filled once a second."""
    lines = server.scrape().splitlines()
    mine = [line for line in lines if line.startswith("pawl_prompt_tokens_total{") and f'source="{source}"' in line]
    return int(sum(float(line.rpartition(" ")[2]) for line in mine))


def everything_free(server: RunningServer) -> bool:
    with AdminClient(server.admin) as admin, admin.watch_load(min_interval=0.1) as watch:
        load = next(watch)
    blocks = load.free_blocks + load.evictable_blocks
    return load.running_requests == load.waiting_requests == 0 and blocks == load.block_count == NUM_BLOCKS


@pytest.mark.parametrize("bypass", [False, True])
def test_each_sample_equals_a_request_of_its_own(client: Client, bypass: bool) -> None:
    """Tokens and log-probabilities, bit for bit, with penalties and a biased token; usage counts the prompt once."""
    options = {
        "temperature": 0.9, "top_p": 0.97, "presence_penalty": 0.3, "logit_bias": {300: 1.5}, "stop": LONG,
        "logprobs": 2, "token_ids": True, "bypass_prefix_cache": bypass,
    }  # fmt: skip
    together = client.generate(PROMPT, seed=11, sample_count=5, **options)  # type: ignore[arg-type]
    alone = [client.generate(PROMPT, seed=derive_seed(11, index), **options) for index in range(5)]  # type: ignore[arg-type]
    assert [sample.index for sample in together.samples] == [0, 1, 2, 3, 4]
    for sample, completion in zip(together.samples, alone, strict=True):
        assert sample.token_ids == completion.token_ids
        assert sample.logprobs == completion.logprobs
        assert (sample.text, sample.finish_reason) == (completion.text, completion.finish_reason)
    assert len({sample.token_ids for sample in together.samples}) == 5
    assert together.text == together.samples[0].text
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.output_tokens == 5 * 40


async def test_groups_among_others_give_what_they_give_alone(server: RunningServer) -> None:
    """Too few rows and blocks for all at once: groups wait for each other, and samples perhaps for blocks."""
    stop = Stop(max_tokens=120, ignore_eos=True)

    async def ask(client: AsyncClient, number: int, samples: int | None) -> Completion:
        prompt = [300 + (7 * number + place) % 500 for place in range(40 + 9 * number)]
        return await client.generate(
            prompt, stop=stop, temperature=1.0, seed=number, sample_count=samples, token_ids=True, priority=number % 2
        )

    async with AsyncClient(server.target) as client:
        counts = [4, None, 3, 6, None, 2]
        together = await asyncio.gather(*(ask(client, number, samples) for number, samples in enumerate(counts)))
        for number, (samples, completion) in enumerate(zip(counts, together, strict=True)):
            assert len(completion.samples) == (samples or 1)
            again = await ask(client, number, samples)
            assert [sample.token_ids for sample in completion.samples] == [one.token_ids for one in again.samples]
    wait_until(lambda: everything_free(server), 30.0)


def test_the_prompt_is_computed_once(server: RunningServer, client: Client) -> None:
    """All but its last token, by the engine's own count: that one is computed again by each further sample."""
    prompt = [400 + place % 90 for place in range(75)]
    before = prompt_tokens(server, "computed"), prompt_tokens(server, "recomputed")
    client.generate(
        prompt, sample_count=4, temperature=1.0, stop=Stop(max_tokens=2, ignore_eos=True), bypass_prefix_cache=True
    )
    wait_until(lambda: prompt_tokens(server, "computed") > before[0], 30.0)
    assert prompt_tokens(server, "computed") - before[0] == 75
    assert prompt_tokens(server, "recomputed") - before[1] == 3


def test_a_stream_carries_the_index_of_each_sample(client: Client) -> None:
    """Deltas of a sample follow each other without a gap, each sample ends once, and the whole stream once."""
    whole = client.generate(PROMPT, seed=5, sample_count=3, temperature=1.0, stop=LONG, token_ids=True)
    lengths, ends = [0, 0, 0], list[int]()
    with client.stream(PROMPT, seed=5, sample_count=3, temperature=1.0, stop=LONG, token_ids=True) as stream:
        events = list(stream)
        final = stream.final()
    for event in events:
        if isinstance(event, Delta):
            assert event.token_offset == lengths[event.index]
            assert event.index not in ends
            lengths[event.index] += event.token_count
        elif isinstance(event, SampleEnd):
            assert (event.finish_reason, event.output_tokens) == (FinishReason.MAX_TOKENS, 40)
            ends.append(event.index)
    assert lengths == [40, 40, 40]
    assert sorted(ends) == [0, 1, 2]
    assert [isinstance(event, End) for event in events].index(True) == len(events) - 1
    assert final.samples == whole.samples
    assert final.usage.output_tokens == 120
    timings = final.timings
    assert timings is not None
    parts = timings.queue + timings.prefill + timings.decode + timings.stalled
    assert parts == pytest.approx(timings.total, abs=1e-6)


def test_each_sample_stops_by_itself(client: Client) -> None:
    """A stop string that one sample comes to ends that one; the others go on to their ends."""
    options = {"seed": 3, "temperature": 1.0, "sample_count": 4, "token_ids": True}
    free = client.generate(PROMPT, stop=Stop(max_tokens=60, ignore_eos=True), **options)  # type: ignore[arg-type]
    text = free.samples[2].text
    string = next(
        text[place : place + 4]
        for place in range(10, len(text) - 4)
        if sum(text[place : place + 4] in sample.text for sample in free.samples) == 1
    )
    stopped = client.generate(
        PROMPT, stop=Stop(max_tokens=60, ignore_eos=True, strings=[string]), **options  # type: ignore[arg-type]
    )  # fmt: skip
    for before, after in zip(free.samples, stopped.samples, strict=True):
        if before.index == 2:
            assert after.finish_reason is FinishReason.STOP
            assert after.text == before.text[: before.text.index(string)]
        else:
            assert (after.finish_reason, after.token_ids) == (FinishReason.MAX_TOKENS, before.token_ids)
    assert stopped.usage.output_tokens < free.usage.output_tokens


def test_each_sample_keeps_to_the_constraint(client: Client) -> None:
    """Each has a matcher of its own, and equals a request of its own; the grammar is compiled once, then kept."""
    options = {"temperature": 1.0, "regex": "[a-f]{3,12}!", "token_ids": True}
    for seed in (1, 2):
        together = client.generate(PROMPT, seed=seed, sample_count=4, **options)  # type: ignore[arg-type]
        for index, sample in enumerate(together.samples):
            assert re.fullmatch("[a-f]{3,12}!", sample.text)
            alone = client.generate(PROMPT, seed=derive_seed(seed, index), **options)  # type: ignore[arg-type]
            assert sample.token_ids == alone.token_ids


def test_prompt_log_probabilities_come_once(client: Client) -> None:
    one = client.generate(PROMPT, seed=1, temperature=1.0, prompt_logprobs=1, max_tokens=2)
    many = client.generate(PROMPT, seed=1, temperature=1.0, prompt_logprobs=1, max_tokens=2, sample_count=3)
    assert many.prompt_logprobs == one.prompt_logprobs
    assert len(many.prompt_logprobs) == many.usage.prompt_tokens


async def test_cancel_and_leaving_free_every_block_of_a_group(server: RunningServer) -> None:
    """By the Cancel call all samples end with what they have; by leaving nothing is read any more."""
    stop = Stop(max_tokens=400, ignore_eos=True)
    async with AsyncClient(server.target) as client:
        async with client.stream(PROMPT, sample_count=6, temperature=1.0, stop=stop, request_id="all") as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    break
            with AdminClient(server.admin) as admin:
                states = await asyncio.to_thread(admin.requests)
            assert [state.request_id for state in states] == ["all"] * 6
            await client.cancel("all")
            completion = await stream.final()
        assert [sample.finish_reason for sample in completion.samples] == [FinishReason.CANCELLED] * 6
        await asyncio.to_thread(wait_until, lambda: everything_free(server), 30.0)
        async with client.stream(PROMPT, sample_count=6, temperature=1.0, stop=stop) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    break
    await asyncio.to_thread(wait_until, lambda: everything_free(server), 30.0)


def test_a_time_limit_ends_all_samples(client: Client) -> None:
    completion = client.generate(
        PROMPT, sample_count=3, temperature=1.0, stop=Stop(max_tokens=1500, ignore_eos=True, max_duration=0.3)
    )
    assert {sample.finish_reason for sample in completion.samples} == {FinishReason.TIME_LIMIT}


@pytest.mark.parametrize(
    ("samples", "temperature", "text"),
    [
        (17, 1.0, "17 is not in [1, 16]"),
        (2, 0.0, "2 samples would be equal with temperature 0"),
        (13, 1.0, "13 samples start together, at most 12 sequences run at once"),
    ],
)
def test_what_cannot_be_is_refused(client: Client, samples: int, temperature: float, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.generate(PROMPT, sample_count=samples, temperature=temperature, max_tokens=2)
    assert text in str(refused.value)
    assert refused.value.violations[0].field == "sampling.sample_count"
