"""Figures of a run. Those of requests count the chats, not the adversaries; those of steps count everything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pawl_server.sim.simulator import Run

__all__ = ["Objective", "Summary", "summarize", "times_to_first_token"]


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must get to count as good: seconds to its first token, and mean seconds per further token."""

    first_token_s: float = 2.0
    per_token_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One line of a table. Times in seconds; shares are of 1.

    Attributes:
        longest_gap_s: longest time between two tokens of a chat.
        goodput: chats per second that met the objective.
        good_share: of the chats.
        recomputed_share: of all tokens computed, those that had been computed before a preemption.
        tenant_gap: how far the service of two waiting tenants drifted apart, in tokens (an output token counts two).
        blocked_share: of busy time, while someone waited for blocks beside a free row and nobody was admitted.
        hit_rate: of all prompt tokens, those found in the cache.
        preemptions: per request, mean.
        occupancy: of the blocks, over busy time.
        scheduler_us: of this machine's time per step that was not skipped; the one figure that no seed fixes.
    """

    workload: str
    policy: str
    num_requests: int
    num_finished: int
    num_refused: int
    num_aborted: int
    first_token_p50_s: float
    first_token_p99_s: float
    first_token_max_s: float
    gap_p50_s: float
    gap_p99_s: float
    longest_gap_s: float
    goodput: float
    good_share: float
    tokens_per_s: float
    recomputed_share: float
    tenant_gap: float
    blocked_share: float
    hit_rate: float
    preemptions: float
    most_preemptions: int
    occupancy: float
    num_steps: int
    num_skipped: int
    scheduler_us: float
    duration_s: float


def times_to_first_token(run: Run) -> npt.NDArray[np.float64]:
    """Seconds to the first token of every chat that got one."""
    record = run.record
    mask = _chats(run) & (record.first_token_ns >= 0)
    return (record.first_token_ns[mask] - record.arrived_ns[mask]) / 1e9


def _chats(run: Run) -> npt.NDArray[np.bool_]:
    return np.asarray([request.group == "chat" for request in run.trace.requests], np.bool_)


def _percentile(values: npt.NDArray[np.float64], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan


def summarize(run: Run, objective: Objective) -> Summary:
    """Add up a run."""
    record, requests = run.record, run.trace.requests
    chats, finished = _chats(run), record.finished
    first_token_s = times_to_first_token(run)
    done = chats & finished
    waited_s = (record.first_token_ns - record.arrived_ns)[done] / 1e9
    further = np.maximum(1, record.num_output[done] - 1)
    per_token_s = (record.last_token_ns - record.first_token_ns)[done] / 1e9 / further
    num_good = int(((waited_s <= objective.first_token_s) & (per_token_s <= objective.per_token_s)).sum())
    duration_s = max(run.end_ns, 1) / 1e9
    prompts = np.asarray([request.prompt_tokens for request in requests], np.int64)
    reasons = list(record.reasons.values())
    num_aborted = reasons.count("aborted")
    num_refused = len(reasons) - int(finished.sum()) - num_aborted - reasons.count("failed")
    return Summary(
        workload=run.trace.name,
        policy=run.policy.name,
        num_requests=len(requests),
        num_finished=int(finished.sum()),
        num_refused=num_refused,
        num_aborted=num_aborted,
        first_token_p50_s=_percentile(first_token_s, 50),
        first_token_p99_s=_percentile(first_token_s, 99),
        first_token_max_s=_percentile(first_token_s, 100),
        gap_p50_s=record.gaps.percentile_s(50),
        gap_p99_s=record.gaps.percentile_s(99),
        longest_gap_s=float(record.longest_gap_ns[chats].max(initial=0)) / 1e9,
        goodput=num_good / duration_s,
        good_share=num_good / max(1, int(chats.sum())),
        tokens_per_s=float(record.num_output.sum()) / duration_s,
        recomputed_share=record.num_recomputed / max(1, record.num_computed),
        tenant_gap=record.service.largest_gap,
        blocked_share=record.blocked_ns / max(1, record.busy_ns),
        hit_rate=float(record.cached_tokens.sum() / max(1, prompts.sum())),
        preemptions=float(record.num_preempted.mean()),
        most_preemptions=int(record.num_preempted.max()),
        occupancy=record.used_block_ns / max(1, record.busy_ns) / record.num_blocks,
        num_steps=record.num_steps,
        num_skipped=record.num_skipped,
        scheduler_us=1e6 * record.scheduler_s / max(1, record.num_steps - record.num_skipped),
        duration_s=duration_s,
    )
