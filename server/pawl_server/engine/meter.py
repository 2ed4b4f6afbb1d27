"""What the loop did, for Prometheus and for load reports. Fed with copies; never reads the state itself.

A step costs the loop one append; the metrics are filled once a second and at each scrape.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import generate_latest

from pawl_server.metrics import WAIT_REASONS, EngineMetrics

__all__ = ["Meter", "StepRecord"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step. Times in seconds; with the idle time before it they sum to wall time.

    `postprocess_s` holds everything between the worker's answer and the next plan, and the hops to its thread.
    """

    kind: str
    num_sequences: int
    num_tokens: int
    idle_s: float
    schedule_s: float
    prepare_s: float
    forward_s: float
    sample_s: float
    postprocess_s: float
    num_output: int
    num_prompt_computed: int
    num_prompt_cached: int
    num_recomputed: int
    num_preempted: int
    num_gave_way: int  # of them, those that a higher class took the blocks of
    num_swapped_out: int = 0
    num_swapped_in: int = 0
    num_lost: int  # computed tokens of those preempted that are not cached
    num_drafts: int = 0
    num_accepted: int = 0  # of them

    @property
    def duration_s(self) -> float:
        """Plan to emitted tokens."""
        return self.schedule_s + self.prepare_s + self.forward_s + self.sample_s + self.postprocess_s


class Meter:
    """Collects steps and fills `EngineMetrics` with them."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._records: deque[StepRecord] = deque()
        self._lock = threading.Lock()  # scrapes come on threads of their own
        self.output_tokens = 0

    def step(self, record: StepRecord) -> None:
        """Note one step."""
        self.output_tokens += record.num_output
        self._records.append(record)

    def idle(self, seconds: float) -> None:
        """Note time without a step."""
        self._metrics.step_phase["idle"].inc(seconds)

    def worker_lost(self, num_running: int) -> None:
        """Note that sequences lost their KV with the worker's state."""
        self._metrics.preemptions["worker_lost"].inc(num_running)

    def gauges(self, *, running: int, waiting: Mapping[str, int], free: int, cached: int, used: int) -> None:
        """Publish the totals. `waiting` counts sequences by WAIT_REASONS; blocks sum to the capacity."""
        metrics = self._metrics
        metrics.requests_running.set(running)
        for reason in WAIT_REASONS:
            metrics.requests_waiting[reason].set(waiting.get(reason, 0))
        for state, count in (("free", free), ("cached", cached), ("used", used)):
            metrics.kv_blocks[state].set(count)
        metrics.kv_cache_usage.set(used / max(1, free + cached + used))

    def flush(self) -> None:
        """Fill the metrics with the steps noted so far."""
        with self._lock:
            last = None
            while self._records:
                last = self._records.popleft()
                self._fill(last)
            if last is not None:
                self._metrics.last_step.set(time.time())

    def exposition(self) -> bytes:
        """The metrics as text, up to date."""
        self.flush()
        return generate_latest(self._metrics.registry)

    def _fill(self, record: StepRecord) -> None:
        metrics = self._metrics
        for phase, seconds in (
            ("schedule", record.schedule_s),
            ("prepare", record.prepare_s),
            ("forward", record.forward_s),
            ("sample", record.sample_s),
            ("postprocess", record.postprocess_s),
            ("idle", record.idle_s),
        ):
            metrics.step_phase[phase].inc(max(0.0, seconds))
        metrics.step_duration[record.kind].observe(record.duration_s)
        metrics.batch_requests[record.kind].observe(record.num_sequences)
        metrics.batch_tokens[record.kind].observe(record.num_tokens)
        metrics.output_tokens.inc(record.num_output)
        for source, count in (
            ("computed", record.num_prompt_computed),
            ("cached", record.num_prompt_cached),
            ("recomputed", record.num_recomputed),
        ):
            metrics.prompt_tokens[source].inc(count)
        metrics.swapped_blocks["out"].inc(record.num_swapped_out)
        metrics.swapped_blocks["in"].inc(record.num_swapped_in)
        metrics.draft_tokens["accepted"].inc(record.num_accepted)
        metrics.draft_tokens["rejected"].inc(record.num_drafts - record.num_accepted)
        if record.num_preempted:
            metrics.preemptions["blocks"].inc(record.num_preempted - record.num_gave_way)
            metrics.preemptions["priority"].inc(record.num_gave_way)
            metrics.preempted_tokens.inc(record.num_lost)
