"""How a front end shares cores with engines beside it: it gives way.

A step that runs on a CPU is some 200 operations whose parts its threads share. Every time a front end wakes for one
message of one stream and takes a core at once, the others wait for the part that was being computed there. A batch
process does not: it gets a core when one is free or its turn comes, and then handles all that has arrived.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["NICENESS", "give_way"]

NICENESS = 10
"""Of a front end beside engines: enough of a share of busy cores that it keeps up with them, a tenth of theirs.

Where Linux groups processes by session (`sched_autogroup_enabled`) and no control group does, it tells nothing between
engines and a front end, which leads a session of its own; making it count there gained nothing (record 0003).
"""


def give_way() -> None:
    """Let this thread, and those that it starts, give way to engines. Without effect where it is not allowed."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
