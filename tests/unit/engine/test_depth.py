"""What an engine says when drafts keep its steps from overlapping."""

from __future__ import annotations

import pytest

from pawl_server.config import EngineSettings
from tests.fakes.engine_harness import running_engine
from tests.fakes.engine_worker import FakeFacts, fake_spec


@pytest.mark.parametrize(("speculation", "max_in_flight"), [("ngram", 1), ("ngram", 2), ("off", 2)])
async def test_steps_that_drafts_keep_from_overlapping_are_told_of(
    speculation: str, max_in_flight: int, caplog: pytest.LogCaptureFixture
) -> None:
    """On a worker that could have two in flight; on one that cannot nothing is lost and nothing is said."""
    settings = EngineSettings(num_blocks=64, max_running=8, max_batch_tokens=64, speculation=speculation)
    async with running_engine(fake_spec(engine=settings), FakeFacts(num_blocks=64, max_in_flight=max_in_flight)):
        pass
    said = "cpu could have 2 in flight" in caplog.text
    assert said == (speculation == "ngram" and max_in_flight == 2)
