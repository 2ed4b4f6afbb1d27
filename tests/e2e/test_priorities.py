"""Priorities, weights and preemption from end to end: the SDK, a front end, an engine; only the worker is fake."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pawl import AsyncClient
from pawl_server.config import EngineSettings
from pawl_server.exposition import parse_exposition
from pawl_server.frontend.auth import hash_key, new_key
from tests.fakes.shadow_worker import isolated_output
from tests.fakes.tokenizer import VOCAB_SIZE
from tests.fakes.whole_server import WholeServer, whole_server

_SMALL = {"max_batch_tokens": 64, "max_prefill_chunk": 32, "check_every": 1}


def _settings(**values: int | float) -> EngineSettings:
    return EngineSettings(**{"max_running": 8, **_SMALL, **values})  # type: ignore[arg-type]


async def _check_outputs(server: WholeServer, prompts: dict[str, list[int]]) -> None:
    for name, completion in (await server.finish()).items():
        expected = isolated_output(prompts[name], 1, len(completion.token_ids), VOCAB_SIZE)
        assert list(completion.token_ids) == expected, f"{name} got other tokens than alone"


@pytest.fixture
async def one_slot(tmp_path: Path) -> AsyncIterator[tuple[WholeServer, AsyncClient]]:
    settings = _settings(max_running=1, preempt_below=0, ageing_s=0.0)
    async with whole_server(tmp_path, settings) as server, server.client() as client:
        yield server, client


async def test_the_higher_class_is_next_and_each_knows_its_place(one_slot: tuple[WholeServer, AsyncClient]) -> None:
    server, client = one_slot
    server.generate(client, "runs", [10, 11], 12)
    await server.arrived("runs")
    for name, priority in (("low", 0), ("high", 2), ("highest", 9)):
        server.generate(client, name, [20, 21], 2, priority)
        await server.arrived("runs", name)
    states = await server.requests()
    places = {name: state.queue_position for name, state in states.items()}
    assert places == {"runs": 0, "highest": 1, "high": 2, "low": 3}
    assert states["runs"].wait_reason == ""
    assert states["low"].wait_reason == "slots: all 1 slots are taken, position 3 of 3"
    assert [states[name].priority for name in ("low", "high", "highest")] == [0, 2, 9]
    await _check_outputs(server, {name: [20, 21] for name in states} | {"runs": [10, 11]})
    assert server.ended == ["runs", "highest", "high", "low"]


async def test_who_waited_long_enough_is_before_a_higher_class(tmp_path: Path) -> None:
    settings = _settings(max_running=1, preempt_below=0, ageing_s=0.1)
    async with whole_server(tmp_path, settings) as server, server.client() as client:
        server.generate(client, "runs", [10, 11], 60)
        await server.arrived("runs")
        server.generate(client, "old", [20], 2)
        await server.arrived("old")
        since = time.monotonic()
        await server.until(lambda: time.monotonic() - since > 0.1)
        await server.step()  # it rises at the end of a step
        server.generate(client, "new", [30], 2, priority=1)
        await server.arrived("new")
        states = await server.requests()
        assert (states["old"].queue_position, states["new"].queue_position) == (1, 2)
        await server.finish()
        assert server.ended == ["runs", "old", "new"]


async def test_a_much_higher_class_preempts_and_everybody_is_told(tmp_path: Path) -> None:
    """Two fill the pool of 16 blocks; a request of class 10 takes the blocks of the newer one, which goes on later."""
    settings = _settings(preempt_below=5, prefix_cache=False)
    async with whole_server(tmp_path, settings, num_blocks=16) as server, server.client() as client:
        prompts = {"first": [10] * 12, "second": [11] * 12, "urgent": [12] * 20}
        for name in ("first", "second"):
            server.generate(client, name, prompts[name], 18)
            await server.arrived(name)
        await server.step_until(lambda: all(s.num_output > 4 for s in server.running.engine.loop.state.live.values()))
        server.generate(client, "urgent", prompts["urgent"], 3, priority=10)
        await server.arrived("urgent")
        await server.step()
        states = await server.requests()
        assert {name: state.phase for name, state in states.items()} == {
            "first": "decode", "second": "preempted", "urgent": "decode",
        }  # fmt: skip
        second = states["second"]
        assert (second.preemption_count, second.queue_position) == (1, 1)
        assert ": priority: a request of a much higher class was short of " in second.preemption_reason
        assert second.lost_tokens >= 16
        assert second.wait_reason.startswith("blocks: needs up to ")
        assert second.block_count == 0
        assert states["first"].preemption_reason == ""
        answers = await server.finish()
        assert server.ended[0] == "urgent"
        await _check_outputs(server, prompts)
        assert len(answers["second"].token_ids) == 18
        metrics = server.running.engine.loop.meter.exposition().decode()
        assert parse_exposition(metrics)["pawl_preemptions_total"] == 1.0
        assert 'reason="priority",replica="0"} 1.0' in metrics


async def test_each_waiting_request_says_why(tmp_path: Path) -> None:
    """Blocks are short: the first lacks them, lower classes wait for it, and later for what is kept for it."""
    settings = _settings(preempt_below=0, max_bypass=1, prefix_cache=False)
    async with whole_server(tmp_path, settings, num_blocks=16) as server, server.client() as client:
        server.generate(client, "runs", [10] * 20, 30)
        await server.arrived("runs")
        server.generate(client, "large", [11] * 40, 4, priority=1)
        server.generate(client, "low", [12] * 40, 4)
        await server.arrived("large", "low")
        words = {name: state.wait_reason.split(":")[0] for name, state in (await server.requests()).items()}
        assert words == {"runs": "", "large": "blocks", "low": "priority"}
        for name, num_output in (("passes", 8), ("kept-out", 40)):
            server.generate(client, name, [13] * 2, num_output, priority=1)
            await server.arrived(name)
        states = await server.requests()
        assert states["passes"].phase == "decode"
        assert states["kept-out"].wait_reason.startswith("reservation: blocks are kept for the head, overtaken 1 times")
        await server.finish()


async def test_tenants_are_served_by_their_weights(tmp_path: Path) -> None:
    """Both tenants always have requests waiting: of the first 24 that are served, one has three times as many."""
    weights = {"light": 1, "heavy": 3, "other": 1}
    keys = {tenant: new_key() for tenant in weights}
    entries = [
        f'[[keys]]\nhash = "{hash_key(keys[tenant])}"\ntenant = "{tenant}"\nweight = {weight}\n'
        for tenant, weight in weights.items()
    ]
    (tmp_path / "keys.toml").write_text("".join(entries), encoding="utf-8")
    async with (
        whole_server(tmp_path, _settings(max_running=1), api_key_file=str(tmp_path / "keys.toml")) as server,
        server.client(keys["light"]) as light,
        server.client(keys["heavy"]) as heavy,
        server.client(keys["other"]) as other,
    ):
        server.generate(other, "plug", [9], 200)
        await server.arrived("plug")
        names = [f"{tenant}-{number}" for number in range(30) for tenant in ("light", "heavy")]
        for number, name in enumerate(names):
            server.generate(light if name.startswith("light") else heavy, name, [10 + number], 4)
        await server.arrived(*names)
        server.tasks.pop("plug").cancel()
        await server.finish()
    served = [name.split("-")[0] for name in server.ended[:24]]
    assert served.count("heavy") == pytest.approx(18, abs=1)
