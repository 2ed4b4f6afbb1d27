"""What an engine tells of itself over real sockets: its start, its load, what its cache holds, its metrics."""

from __future__ import annotations

import asyncio

from pawl_server.exposition import parse_exposition
from pawl_server.internal.v1 import engine_pb2
from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from tests.fakes.engine_harness import (
    Recorder,
    ended,
    open_stream,
    running_engine,
    submit_frame,
    until,
)


async def test_load_is_told_on_becoming_idle() -> None:
    async with running_engine() as running, running.link() as link:
        _, recorder = open_stream(link, [1, 2, 3], 5)
        await ended(recorder)
        await until(lambda: link.load.output_tokens == 5 and link.load.running == 0)
        assert link.load.num_blocks == 256
        assert link.load.memory_bytes > 0
        assert link.load.progressing


async def test_what_the_cache_holds_is_told_by_name() -> None:
    """The names are those that a router makes of prompt, cache key and the facts of the welcome."""
    told: list[engine_pb2.CacheEvents] = []
    prompt = [5, 6, 7, 8] * 5
    async with running_engine() as running, running.link() as link:
        link.on_cache_events = told.append
        submit = submit_frame([*prompt, 9], 1)
        link.open(submit, recorder := Recorder())
        await ended(recorder)
        await until(lambda: bool(told))
        model = link.welcome.model
        root = root_hash(CacheRoot(model.revision, model.data_type, link.welcome.block_size), submit.cache_key)
        chain = HashChain(root, link.welcome.block_size)
        chain.extend(prompt, 5)
        events = [event for frame in told for event in frame.events]
        assert [event.name for event in events] == chain.names
        assert [event.parent for event in events] == [root, *chain.names[:-1]]
        assert {(event.namespace, event.num_tokens) for event in events} == {(root, 4)}
        told.clear()
        assert await link.flush_cache() == 5
        await until(lambda: bool(told))
        assert sorted(event.name for frame in told for event in frame.events) == sorted(chain.names)
        assert not any(event.num_tokens for frame in told for event in frame.events)


async def test_step_phases_sum_to_wall_time() -> None:
    async with running_engine() as running, running.link() as link:
        loop = running.engine.loop

        def phases() -> float:
            totals = parse_exposition(loop.meter.exposition().decode())
            return totals["pawl_step_phase_seconds_total"]

        await until(lambda: link.load_time > 0 and phases() > 0)
        before, started = phases(), loop.clock()
        for _ in range(3):
            _, recorder = open_stream(link, [1, 2, 3], 60)
            await ended(recorder)
        await running.until_empty()
        load_time = link.load_time
        await until(lambda: link.load_time > load_time)  # a report brings idle time up to date
        after, ended_at = phases(), loop.clock()
        # Reports come once a second and on becoming idle: at most one of them is missing at either end.
        assert abs((after - before) - (ended_at - started)) < 1.2


async def test_metrics_count_what_was_served() -> None:
    async with running_engine() as running, running.link() as link:
        for _ in range(2):
            _, recorder = open_stream(link, list(range(1, 18)), 6)
            await ended(recorder)
        await running.until_empty()
        host, port = running.metrics_address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode().partition("\r\n\r\n")[2]
        writer.close()
        totals = parse_exposition(text)
        assert totals["pawl_output_tokens_total"] == 12
        # The second prompt finds the four full blocks of the first, below its last token.
        assert totals["pawl_prompt_tokens_total"] == 34
        assert 'pawl_prompt_tokens_total{model="shadow",replica="0",source="cached"} 16.0' in text
        assert totals["pawl_kv_blocks"] == totals["pawl_kv_block_capacity"] == 256
        assert totals["pawl_requests_running"] == 0


async def test_start_reports_its_steps_in_order() -> None:
    async with running_engine() as running:
        steps = [event.step for event in running.progress]
        assert list(dict.fromkeys(steps)) == ["weights", "memory", "warm-up", "self-test"]
        memory = next(event for event in running.progress if event.step == "memory")
        assert memory.facts["cache_tokens"] == 1024
        warm_up = [event for event in running.progress if event.step == "warm-up"][-1]
        assert warm_up.facts == {"num_tokens": 64, "num_sequences": 8}
        assert running.worker.reset_epochs == [1, 1, 1]
