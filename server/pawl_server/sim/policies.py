"""What is compared: the production scheduler, and baselines made of it by what they leave out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from pawl_server.scheduler.admission import SchedulerLimits

__all__ = ["POLICIES", "Policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A way to schedule.

    Attributes:
        name: in tables and on the command line.
        text: one line for a report.
        one_queue: neither tenants nor classes: whoever came first is served first.
        head_blocks: a head that does not fit holds up everyone behind it.
        backfill: whoever cannot delay those for whom blocks are kept may start before them.
        newest_victim: whoever was admitted last gives up its blocks, whatever that costs.
        target_gap_s: time between tokens that the step budget holds; 0 = it holds none.
    """

    name: str
    text: str
    one_queue: bool = False
    head_blocks: bool = False
    backfill: bool = True
    newest_victim: bool = False
    target_gap_s: float = 0.0

    def limits(self, limits: SchedulerLimits) -> SchedulerLimits:
        """The limits of a replica under this policy."""
        max_bypass = 0 if self.head_blocks else limits.max_bypass
        below = 0 if self.newest_victim else limits.preempt_below
        return dataclasses.replace(limits, max_bypass=max_bypass, backfill=self.backfill, preempt_below=below)


POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(name="production", text="the scheduler as it is served"),
        Policy(name="gap-target", text="production with a target of 40 ms between tokens", target_gap_s=0.04),
        Policy(
            name="first-come",
            text="one queue in order of arrival, blocked by its head",
            one_queue=True,
            head_blocks=True,
        ),
        Policy(name="no-backfill", text="production, but nobody passes those for whom blocks are kept", backfill=False),
        Policy(name="last-in", text="as production, but the newest sequence is the victim", newest_victim=True),
    )
}
