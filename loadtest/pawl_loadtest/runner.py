"""Sends a schedule of requests to a server through the SDK and records what each experienced.

Open loop: a request is sent when it is due, however many are still running. Owns the clock and the tasks;
arrivals, lengths, prompts and sums are elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pawl import TLS, AsyncClient, Delta, End, PawlError, Stop
from pawl_loadtest.measure import Record

__all__ = ["Job", "run_jobs"]


@dataclass(frozen=True, slots=True)
class Job:
    """One request: when it is due (seconds after the start), its prompt, and how many tokens to generate."""

    due: float
    prompt: Sequence[int] | str
    output_tokens: int


async def _run_job(client: AsyncClient, job: Job, started: float, timeout: float) -> Record:
    record = Record(due=started + job.due, sent=time.monotonic())
    stop = Stop(max_tokens=job.output_tokens, ignore_eos=True)
    try:
        async with client.stream(job.prompt, stop=stop, temperature=0.0, timeout=timeout) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    record.delta(time.monotonic(), event.token_count)
                elif isinstance(event, End):
                    record.prompt_tokens = event.usage.prompt_tokens
                    record.cached_tokens = event.usage.cached_prompt_tokens
    except PawlError as error:
        record.error = f"{type(error).__name__} {error.reason}"
    record.ended = time.monotonic()
    return record


async def run_jobs(
    target: str,
    jobs: Sequence[Job],
    *,
    api_key: str | None = None,
    timeout: float = 600.0,
    tls: TLS | None = None,
) -> tuple[list[Record], float]:
    """Run jobs on their schedule.

    Returns:
        The records in the order of the jobs, and the seconds from the first due time to the last end.
    """
    async with AsyncClient(target, api_key=api_key, retries=0, tls=tls) as client:
        await client.wait_ready(timeout=30)
        started = time.monotonic() + 0.05
        tasks: list[asyncio.Task[Record]] = []
        for job in jobs:
            await asyncio.sleep(max(0.0, started + job.due - time.monotonic()))
            tasks.append(asyncio.create_task(_run_job(client, job, started, timeout)))
        records = await asyncio.gather(*tasks)
    first = min((record.due for record in records), default=started)
    last = max((record.ended or record.due for record in records), default=started)
    return records, last - first
