"""This process's session with Ray: a Ray of its own, on this machine, or a cluster that it joins.

Owns what Ray does to the process (signals, children) and what is left of it. Knows neither fleets nor replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Callable

import psutil
import ray

from pawl.errors import Unavailable
from pawl_server.config import Config
from pawl_server.fleet import own_ray
from pawl_server.fleet.specs import num_cores

__all__ = ["NAMESPACE", "RaySession", "end_ray", "gpus_per_replica", "start_ray"]

log = logging.getLogger(__name__)

NAMESPACE = "pawl"

_OBJECT_STORE_BYTES = 100 << 20  # nothing of ours goes through it
_LEFTOVER_S = 5.0


class RaySession:
    """`open`, then `settle` and `close`, also where `open` failed or was cancelled.

    Args:
        config: the settings; `ray_address` empty = a Ray of our own, on this machine.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._is_own = not config.fleet.ray_address
        self._opening: asyncio.Task[None] | None = None

    async def open(self, then: Callable[[], None] = lambda: None) -> None:
        """Start or join Ray.

        Args:
            then: called on a thread once Ray is there; a cancellation comes after it.

        Raises:
            Unavailable: Ray cannot be started or joined, or `then` failed.
        """
        try:
            # Shielded: its threads cannot be stopped half-way, so `settle` waits for them.
            self._opening = asyncio.create_task(self._open(then), name="pawl-ray-open")
            await asyncio.shield(self._opening)
        except Exception as error:  # Ray raises bare ones, too: its node took too long to register
            where = "start a local Ray" if self._is_own else f"join Ray at {self._config.fleet.ray_address}"
            raise Unavailable(
                f"cannot {where}: {error}; `--fleet local` works without Ray", reason="RAY_FAILED"
            ) from error

    async def settle(self) -> None:
        """Wait for an `open` that is on its way. To be called before anything of the session is stopped."""
        _reclaim_signals()
        if self._opening is not None:
            await asyncio.wait({self._opening})
            if not self._opening.cancelled():
                self._opening.exception()  # seen: whoever called `open` may be gone

    async def close(self) -> None:
        """Leave Ray, and end it if it is ours."""
        await asyncio.to_thread(self._disconnect)

    async def _open(self, then: Callable[[], None]) -> None:
        await asyncio.to_thread(self._connect)
        _reclaim_signals()
        await asyncio.to_thread(then)

    def _connect(self) -> None:
        if not self._is_own:
            ray.init(
                self._config.fleet.ray_address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        fleet = self._config.fleet
        # Counts of reservations, not of threads: two replicas fit on one core if they are asked for.
        start_ray(max(num_cores(), math.ceil(fleet.replicas * fleet.cpus_per_replica)))

    def _disconnect(self) -> None:
        if self._is_own:
            end_ray()
        else:
            ray.shutdown()


def start_ray(num_cpus: int) -> None:
    """Start a Ray of this process's own, and connect to it.

    Ray gives its node 30 s to register, which cannot be set and a busy machine exceeds: hence a second try.

    Args:
        num_cpus: that can be reserved there.

    Raises:
        Exception: Ray's own, of any class: it could not be started, and none of its processes is left.
    """
    own_ray.set_environment()
    try:
        _start_ray(num_cpus)
    except Exception as error:  # a bare one, where its node took too long
        log.warning("Ray did not start: %s; trying once more", error)
        _start_ray(num_cpus)
    own_ray.end_idle_helpers()


def end_ray() -> None:
    """End the Ray that this process started, if it did. None of its processes is left on return."""
    started = _processes_of_ray()
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=_LEFTOVER_S)
    if left:
        log.warning("killing what Ray left over: processes %s", [process.pid for process in left])
    _kill(left)


def _start_ray(num_cpus: int) -> None:
    try:
        ray.init(
            "local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            namespace=NAMESPACE,
        )
    except BaseException:
        started = _processes_of_ray()
        ray.shutdown()  # which knows nothing of a node that did not register
        _kill(started)
        raise


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_LEFTOVER_S)


def _processes_of_ray() -> list[psutil.Process]:
    """Those of a Ray that this process started, with all that they started."""
    home = os.path.dirname(ray.__file__)
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(part.startswith(home) for part in child.cmdline()):
                found |= {process.pid: process for process in (child, *child.children(recursive=True))}
    return list(found.values())


def gpus_per_replica(config: Config) -> float:
    """GPUs that Ray reserves for a replica, with the session open."""
    asked = config.fleet.gpus_per_replica
    if asked >= 0:
        return asked
    device = config.model.device
    found = float(ray.cluster_resources().get("GPU", 0.0))
    return 1.0 if device == "cuda" or (device == "auto" and found >= 1) else 0.0


def _reclaim_signals() -> None:
    """Undo what `ray.init` does to this process's signals.

    Its handler of crashes takes SIGTERM for one: it prints a stack trace, sets an alarm that aborts the process
    3 s later (exit by SIGABRT in the middle of a drain), and only then calls the handler from before.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # signals are the main thread's business
    signal.alarm(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
            signal.siginterrupt(number, False)
