"""What of Ray is turned off where it is pawl's own: it shares the cores of the model and serves nobody else.

Ray wakes its processes some nine hundred times a second for what pawl does not ask: statistics, logs, a cluster that
grows, objects that move. Each time it takes a core from a step. Knows no actor and imports no Ray.
"""

from __future__ import annotations

import contextlib
import os

import psutil

__all__ = ["end_idle_helpers", "set_environment"]

_SETTINGS = {
    # Of its workers, which the engines are: Ray's default is 15, so that everything else goes before a step.
    "RAY_worker_niceness": "0",
    # Workers that Ray keeps in reserve wake up a hundred times a second, and pawl starts no second actor in a hurry.
    "RAY_num_workers_soft_limit": "0",
    # How long each handler of its event loops took, for its debugging files.
    "RAY_event_stats": "0",
    # For its dashboard and its own Prometheus listener; pawl has metrics of its own.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Looks for objects that could be fetched from other nodes, ten times a second. There is no other node.
    "RAY_object_manager_timer_freq_ms": "5000",
    # Looks whether memory runs out, four times a second, to kill the youngest worker. What a replica holds is
    # reserved when it starts.
    "RAY_memory_monitor_refresh_ms": "2000",
}
_HELPERS = (
    "log_monitor.py",  # shows the workers' output at the driver, which ours does not want (`log_to_driver`)
    "monitor.py",  # starts nodes where there are too few
    "dashboard.py",  # without a dashboard: reports usage
)


def set_environment() -> None:
    """Set what Ray's processes read when they start. What is set already stays."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def end_idle_helpers() -> None:
    """End the processes that `ray.init` starts in any case and that nothing here needs."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(os.path.basename(part) in _HELPERS for part in process.cmdline()):
                process.kill()  # told to end, the one that starts nodes reports a failure to the terminal
