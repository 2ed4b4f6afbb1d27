"""Ending well: no new requests, running ones finish within a grace period, the rest is cancelled.

Owns that order; Drain and SIGTERM both come through here. Stops no server.
"""

from __future__ import annotations

import asyncio
import logging

from pawl_server.frontend.core import Core

__all__ = ["drain"]

log = logging.getLogger(__name__)

_POLL_S = 0.02
_LAST_S = 5.0  # a cancelled stream gets its end in a step or two


async def drain(core: Core, grace_s: float, hurry: asyncio.Event | None = None) -> int:
    """Refuse new requests and wait until none runs; returns how many were cancelled.

    Args:
        core: the front end.
        grace_s: how long running requests may take.
        hurry: set = cancel the rest now.
    """
    core.admission.draining = True
    core.changed()
    loop = asyncio.get_running_loop()
    log.info("draining: %d requests may finish within %g s", core.admission.num_live, grace_s)
    end = loop.time() + grace_s
    while core.admission.num_live and loop.time() < end and not (hurry and hurry.is_set()):  # noqa: ASYNC110 - three conditions, one of them time
        await asyncio.sleep(_POLL_S)
    left = list(core.admission.live())
    for ticket in left:
        ticket.cancel()
    end = loop.time() + _LAST_S
    while core.admission.num_live and loop.time() < end:  # noqa: ASYNC110 - as above
        await asyncio.sleep(_POLL_S)
    if left:
        log.warning("draining: %d requests had not finished and were cancelled", len(left))
    return len(left)
