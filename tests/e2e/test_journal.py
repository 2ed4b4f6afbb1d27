"""A served engine records what its scheduler decided; the simulator decides it again, to the byte."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pawl.errors import InvalidRequest
from pawl_server.config import EngineSettings
from pawl_server.scheduler.journal import Launched, Settled, Submitted, read_events
from pawl_server.sim.__main__ import main
from pawl_server.sim.replay import replay
from tests.fakes.engine_harness import running_engine
from tests.fakes.engine_worker import fake_spec
from tests.fakes.whole_server import whole_server


@pytest.mark.parametrize("depth", [1, 2])
async def test_what_was_served_is_decided_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: int) -> None:
    """Chunks, shared prefixes, classes, a client that hangs up, a target gap, drafts; times are the engine's own."""
    settings = EngineSettings(
        max_running=6,
        max_batch_tokens=48,
        max_prefill_chunk=16,
        target_gap_s=0.05,
        pipeline_depth=depth,
        speculation="ngram" if depth == 1 else "off",
        check_every=1,
        journal=str(tmp_path / "journal"),
    )
    async with whole_server(tmp_path, settings, num_blocks=40) as server, server.client() as client:
        server.gate.set()
        for number in range(16):
            prompt = [20 + number % 3] * 24 + [100 + number] * 10
            server.generate(client, f"chat-{number}", prompt, 6 + number)
        await server.until(lambda: len(server.ended) > 1)
        server.tasks.pop("chat-15").cancel()
        server.generate(client, "urgent", [77] * 50, 8, priority=9)
        await server.finish()
        state = server.running.engine.loop.state
        await server.until(lambda: not state.live)
        decisions = state.decisions.records()
    data = (tmp_path / "journal.0").read_bytes()
    replayed = replay(data)
    assert replayed.again == data
    assert replayed.decisions == decisions
    assert replayed.num_sequences >= 16
    events = read_events(data)
    assert sum(isinstance(event, Submitted) for event in events) == replayed.num_sequences
    assert sum(isinstance(event, Launched) for event in events) == sum(isinstance(event, Settled) for event in events)
    assert await asyncio.to_thread(main, ["replay", str(tmp_path / "journal.0")]) == 0
    assert f"{replayed.num_sequences} sequences" in capsys.readouterr().out


async def test_a_journal_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    spec = fake_spec()
    spec = msgspec.structs.replace(spec, engine=replace(spec.engine, journal=str(tmp_path / "missing" / "journal")))
    with pytest.raises(InvalidRequest, match=r"cannot write .*journal\.0: No such file") as caught:
        async with running_engine(spec):
            raise AssertionError("it started")
    assert caught.value.reason == "BAD_SETTING"


def test_a_journal_that_was_cut_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.0"
    path.write_bytes(b"\xff\x00\x00\x00abc")
    assert main(["replay", str(path)]) == 2
    assert "cut off" in capsys.readouterr().err
