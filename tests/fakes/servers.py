"""A whole server as a subprocess, started with the real command line, for the tests that need one.

`pawl_serve()` waits for the ready file and leaves no process behind, whatever the test did to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.fakes.waiting import wait_until

__all__ = [
    "RunningServer",
    "StartFailedError",
    "launch_pawl",
    "pawl",
    "pawl_fleet",
    "pawl_frontend",
    "pawl_serve",
    "start_pawl",
]

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 60.0
READY_FILE = "ready.json"

# The smallest server that is a real one.
SMALL = (
    "--device=cpu",
    "--num-threads=1",
    "--num-blocks=64",
    "--max-running=8",
    "--max-batch-tokens=128",
    "--max-prefill-chunk=64",
    "--backoff-initial-s=0.05",
)
FREE_PORTS = ("--port=0", "--admin-port=0", "--metrics-port=0")


class StartFailedError(Exception):
    """The server ended before it was ready; the message is what it printed."""

    def __init__(self, exit_code: int, output: str, errors: str) -> None:
        super().__init__(f"exit code {exit_code}\n{output}\n{errors}")
        self.exit_code = exit_code
        self.output = output
        self.errors = errors


@dataclass
class RunningServer:
    """A started server.

    Attributes:
        process: the parent of all its processes.
        addresses: the content of the ready file.
        logs: folder with what it printed.
    """

    process: subprocess.Popen[bytes]
    addresses: Mapping[str, str | int]
    logs: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """host:port for clients."""
        return str(self.addresses["grpc"])

    @property
    def admin(self) -> str:
        """host:port for operators."""
        return str(self.addresses["admin"])

    @property
    def metrics_url(self) -> str:
        """Where Prometheus would scrape."""
        return str(self.addresses["metrics"])

    @property
    def fleet(self) -> str:
        """host:port for front ends."""
        return str(self.addresses["fleet"])

    @property
    def output(self) -> str:
        """What it printed so far."""
        return (self.logs / "stdout").read_text()

    @property
    def errors(self) -> str:
        """What it logged so far."""
        return (self.logs / "stderr").read_text()

    def processes(self) -> list[psutil.Process]:
        """It and everything it started, now."""
        try:
            parent = psutil.Process(self.process.pid)
            found = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        self.seen.update({process.pid: process for process in found})
        return found

    def engines(self) -> list[psutil.Process]:
        """Its engine processes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                line = " ".join(process.cmdline())
                if "pawl_server.engine.process" in line or line.startswith("ray::EngineReplica"):
                    found.append(process)
        return found

    def scrape(self) -> str:
        """The joined exposition."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            return str(response.read().decode())

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to the parent alone."""
        self.processes()
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_DEADLINE_S) -> int:
        """Its exit code, once it ended."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """SIGTERM, and wait; returns the exit code."""
        if self.process.poll() is None:
            self.signal()
        return self.wait()

    def leftovers(self, timeout_s: float = 10.0) -> list[str]:
        """Processes of it that still live, given a moment to end."""
        gone, alive = psutil.wait_procs(list(self.seen.values()), timeout=timeout_s)
        del gone
        return [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in alive if not _zombie(process)]

    def kill(self) -> None:
        """End everything at once."""
        self.processes()
        for process in self.seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(STOP_DEADLINE_S)


def _zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a child: the sources importable, one thread, none of our own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PAWL_", "RAY_"))}
    paths = [str(ROOT / part) for part in ("client", "server", "workers", ".")]
    defaults = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
    }
    return kept | defaults | dict(extra or {})


def launch_pawl(*arguments: str, folder: Path, variables: Mapping[str, str] | None = None) -> RunningServer:
    """Start `pawl ...` and wait for nothing; `addresses` are empty."""
    with (folder / "stdout").open("wb") as output, (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "pawl_server.cli", *arguments, f"--ready-file={folder / READY_FILE}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            cwd=ROOT,
            env=environment(variables),
        )
    return RunningServer(process, {}, folder)


def start_pawl(*arguments: str, folder: Path, variables: Mapping[str, str] | None = None) -> RunningServer:
    """Start `pawl ...` and wait until it is ready.

    Raises:
        StartFailedError: it ended instead.
        TimeoutError: it did neither.
    """
    server = launch_pawl(*arguments, folder=folder, variables=variables)
    ready, process = folder / READY_FILE, server.process
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, START_DEADLINE_S)
    except TimeoutError as error:
        server.kill()
        raise TimeoutError(f"{error}\n{server.output}\n{server.errors}") from error
    if not ready.exists():
        raise StartFailedError(process.wait(), server.output, server.errors)
    server.addresses = json.loads(ready.read_text())
    server.processes()
    return server


@contextlib.contextmanager
def pawl(command: str, *flags: str, variables: Mapping[str, str] | None = None) -> Iterator[RunningServer]:
    """`pawl COMMAND FLAGS` for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="pawl-test-") as name:
        server = start_pawl(command, *flags, folder=Path(name), variables=variables)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.kill()


@contextlib.contextmanager
def pawl_serve(
    *flags: str, fleet: str = "local", variables: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """`pawl serve` with the smallest settings and free ports; `flags` win."""
    with pawl("serve", f"--fleet={fleet}", *FREE_PORTS, *SMALL, *flags, variables=variables) as server:
        yield server


@contextlib.contextmanager
def pawl_fleet(
    *flags: str, fleet: str = "local", variables: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """`pawl fleet` with the smallest settings and free ports; `flags` win."""
    ports = ("--fleet-port=0", "--metrics-port=0")
    with pawl("fleet", f"--fleet={fleet}", *ports, *SMALL, *flags, variables=variables) as server:
        yield server


@contextlib.contextmanager
def pawl_frontend(fleet: str, *flags: str, variables: Mapping[str, str] | None = None) -> Iterator[RunningServer]:
    """`pawl frontend` for a running fleet, on free ports."""
    with pawl("frontend", f"--fleet={fleet}", *FREE_PORTS, *flags, variables=variables) as server:
        yield server
