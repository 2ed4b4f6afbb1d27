from __future__ import annotations

import dataclasses

from pawl_server.engine.meter import Meter, StepRecord
from pawl_server.exposition import parse_exposition
from pawl_server.metrics import STEP_PHASES, EngineMetrics

RECORD = StepRecord(
    kind="decode",
    num_sequences=3,
    num_tokens=3,
    idle_s=1.0,
    schedule_s=0.1,
    prepare_s=0.2,
    forward_s=0.3,
    sample_s=0.4,
    postprocess_s=0.5,
    num_output=3,
    num_prompt_computed=5,
    num_prompt_cached=4,
    num_recomputed=2,
    num_preempted=1,
    num_gave_way=0,
    num_swapped_out=7,
    num_swapped_in=5,
    num_lost=70,
    num_drafts=9,
    num_accepted=6,
)


def test_steps_are_filled_in_at_a_scrape_and_only_once() -> None:
    meter = Meter(EngineMetrics("m", 0))
    meter.step(RECORD)
    meter.step(dataclasses.replace(RECORD, kind="mixed"))
    for _ in range(2):
        totals = parse_exposition(meter.exposition().decode())
        assert totals["pawl_output_tokens_total"] == 6
        assert totals["pawl_prompt_tokens_total"] == 22
        assert totals["pawl_step_duration_seconds_count"] == 2
        assert totals["pawl_preemptions_total"] == 2
        assert totals["pawl_preempted_tokens_total"] == 140
        assert totals["pawl_batch_tokens_sum"] == 6
        assert totals["pawl_kv_swapped_blocks_total"] == 24
        assert totals["pawl_draft_tokens_total"] == 18
        assert 'outcome="accepted",replica="0"} 12.0' in meter.exposition().decode()
    assert meter.output_tokens == 6


def test_preemptions_are_counted_by_reason() -> None:
    meter = Meter(EngineMetrics("m", 0))
    meter.step(dataclasses.replace(RECORD, num_preempted=5, num_gave_way=2))
    meter.worker_lost(4)
    text = meter.exposition().decode()
    for reason, count in (("blocks", 3), ("priority", 2), ("worker_lost", 4)):
        assert f'pawl_preemptions_total{{model="m",reason="{reason}",replica="0"}} {count}.0' in text


def test_phases_sum_to_wall_time() -> None:
    meter = Meter(EngineMetrics("m", 0))
    meter.step(RECORD)
    meter.idle(2.5)
    totals = parse_exposition(meter.exposition().decode())
    assert abs(totals["pawl_step_phase_seconds_total"] - (RECORD.duration_s + RECORD.idle_s + 2.5)) < 1e-9
    text = meter.exposition().decode()
    assert all(f'phase="{phase}"' in text for phase in STEP_PHASES)


def test_gauges_sum_to_the_capacity_and_forget_nothing() -> None:
    metrics = EngineMetrics("m", 0)
    metrics.config(dtype="float32", kernels="cpu", block_size=4, num_blocks=10)
    meter = Meter(metrics)
    meter.gauges(running=2, waiting={"blocks": 3}, free=5, cached=1, used=4)
    totals = parse_exposition(meter.exposition().decode())
    assert totals["pawl_kv_blocks"] == totals["pawl_kv_block_capacity"] == 10
    assert totals["pawl_kv_cache_usage_ratio"] == 0.4
    assert totals["pawl_requests_waiting"] == 3
    meter.gauges(running=0, waiting={}, free=9, cached=1, used=0)
    assert parse_exposition(meter.exposition().decode())["pawl_requests_waiting"] == 0
