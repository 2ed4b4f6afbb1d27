"""What a starting server prints: numbered steps with their timings and facts for people, JSON lines for programs.

READY is the last line, and the only one that says so. Goes to stdout; the log goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import TextIO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from pawl_server.addresses import is_any
from pawl_server.cli.render import size_text
from pawl_server.config import Config
from pawl_server.engine.spec import EngineProgress
from pawl_server.fleet.replicas import FleetEvent, ReplicaProgress, ReplicaState
from pawl_server.fleet.specs import num_cores, served_name
from pawl_server.serve.events import Output, ServerAddresses

__all__ = ["ConsoleOutput", "JsonOutput", "make_output"]

_STEPS = ("workers", "weights", "memory", "warm-up", "self-test")


def make_output(config: Config) -> Output:
    """The output that the settings ask for, on stdout."""
    return JsonOutput(sys.stdout) if config.log.log_format == "json" else ConsoleOutput(config, sys.stdout)


class JsonOutput:
    """One JSON object per line: begin, progress, changed, warning, ready."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()

    def begin(self, command: str, fleet_kind: str) -> None:
        """See Output."""
        self._say({"event": "begin", "command": command, "fleet": fleet_kind})

    def fleet_event(self, event: FleetEvent) -> None:
        """See Output."""
        self._say(msgspec.to_builtins(event))

    def warning(self, text: str) -> None:
        """See Output."""
        self._say({"event": "warning", "text": text})

    def ready(self, addresses: ServerAddresses) -> None:
        """See Output."""
        seconds = time.monotonic() - self._started
        self._say({"event": "ready", "seconds": seconds, **msgspec.to_builtins(addresses)})

    def _say(self, fields: dict[str, object]) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more; serving goes on
            self._stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
            self._stream.flush()


class ConsoleOutput:
    """The numbered steps.

    Args:
        config: for the header and the number of replicas.
        stream: where to print; a progress bar is drawn if it is a terminal.
        clock: monotonic seconds.
    """

    def __init__(self, config: Config, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._stream = stream
        self._clock = clock
        self._started = clock()
        self._num_replicas = config.fleet.replicas
        self._latest: dict[str, dict[int, EngineProgress]] = {step: {} for step in _STEPS}
        self._finished: dict[str, set[int]] = {step: set() for step in _STEPS}
        self._num_printed = 0
        self._fleet_kind = ""
        self._is_ready = False
        self._bar = _WeightsBar(stream) if stream.isatty() else None

    def begin(self, command: str, fleet_kind: str) -> None:
        """Print the header."""
        self._fleet_kind = fleet_kind
        parts = [f"pawl {command}"]
        if command != "frontend":
            parts += [served_name(self._config), f"{self._num_replicas} replica(s)", f"{num_cores()} cores"]
        self._print("  ".join([*parts, fleet_kind]))

    def fleet_event(self, event: FleetEvent) -> None:
        """Print the steps that this completes."""
        if self._is_ready:
            return
        if isinstance(event, ReplicaProgress):
            self._progress(event.replica, event.progress)
        elif event.status.state is ReplicaState.READY:
            for step in _STEPS:
                self._finished[step].add(event.status.index)
        elif event.status.state is ReplicaState.BACKOFF:
            self.warning(f"replica {event.status.index}: {event.status.detail}; it is started again")
        self._print_finished()

    def warning(self, text: str) -> None:
        """Print a warning."""
        self._print(f"WARNING {text}")

    def ready(self, addresses: ServerAddresses) -> None:
        """Print the last line."""
        self._is_ready = True
        if addresses.grpc:
            self._print(f"  try: {_hint(addresses.grpc)}")
        if addresses.token_file:
            self._print(f"  token: {addresses.token_file} (front ends elsewhere need it: --internal-token-file)")
        named = [
            f"{name} {value}"
            for name, value in (
                ("grpc", addresses.grpc),
                ("admin", addresses.admin),
                ("fleet", "" if addresses.grpc else addresses.fleet),
                ("metrics", addresses.metrics),
            )
            if value
        ]
        self._print("  ".join(["READY", *named, f"({self._clock() - self._started:.1f} s)"]))

    def _progress(self, replica: int, progress: EngineProgress) -> None:
        if progress.step not in self._latest:
            return
        self._latest[progress.step][replica] = progress
        if progress.step != "workers":
            self._finished["workers"].add(replica)
        # The last report of a step has its facts; one of the self-test is its last.
        if progress.facts or progress.step == "self-test":
            self._finished[progress.step].add(replica)
        if self._bar is not None and progress.step == "weights":
            self._bar.update(list(self._latest["weights"].values()))

    def _print_finished(self) -> None:
        while self._num_printed < len(_STEPS):
            step = _STEPS[self._num_printed]
            if len(self._finished[step]) < self._num_replicas:
                return
            if self._bar is not None and step == "weights":
                self._bar.close()
            self._num_printed += 1
            lines, seconds = self._describe(step)
            head = f"[{self._num_printed}/{len(_STEPS)}] {step:<11} {lines[0]}"
            self._print(f"{head:<78} {seconds:6.1f} s" if seconds is not None else head)
            for line in lines[1:]:
                self._print(f"      {line}")

    def _describe(self, step: str) -> tuple[list[str], float | None]:
        """The lines of a finished step, and how long it took."""
        if step == "workers":
            count = len(self._finished["workers"])
            text = f"{count}/{self._num_replicas} started ({self._fleet_kind})"
            return [text], self._clock() - self._started
        reports = list(self._latest[step].values())
        if not reports:
            return ["done"], None
        seconds = max(report.seconds for report in reports)
        facts, each = reports[0].facts, " each" if self._num_replicas > 1 else ""
        if step == "weights" and facts:
            return [f"{size_text(facts['weight_bytes'])}{each}: {reports[0].text}"], seconds
        if step == "memory" and facts:
            return _memory_lines(facts, each), None
        return [reports[0].text], seconds

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more; serving goes on
            if self._bar is not None:
                self._bar.print(line)
            else:
                self._stream.write(line + "\n")
                self._stream.flush()


class _WeightsBar:
    """A progress bar over the bytes of weights, while they load."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("[2/5] weights    "),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._closed = False

    def update(self, reports: list[EngineProgress]) -> None:
        """Show the sum over the replicas."""
        total = sum(report.total for report in reports)
        if self._closed or not total:
            return
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("weights", total=total)
        self._progress.update(self._task, completed=sum(report.done for report in reports), total=total)

    def close(self) -> None:
        """Remove the bar."""
        if self._task is not None and not self._closed:
            self._progress.stop()
        self._closed = True

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False)


def _memory_lines(facts: dict[str, int], each: str) -> list[str]:
    parts = " | ".join(
        f"{name} {size_text(facts[key])}"
        for name, key in (("weights", "weight_bytes"), ("activations", "activation_bytes"), ("KV", "kv_bytes"))
        if key in facts
    )
    fits = facts["max_concurrency"]
    requests = f"{_count(fits)} requests" if fits else "less than one request"
    cache = (
        f"KV cache    {_count(facts['num_blocks'])} blocks x {facts['block_size']}"
        f" = {_count(facts['cache_tokens'])} tokens{each}:"
        f" {requests} of {_count(facts['max_context'])} tokens"
    )
    return [parts + each, cache]


def _hint(address: str) -> str:
    host, _, port = address.rpartition(":")
    if port == "50051":
        return "pawl chat"
    host = "localhost" if is_any(host) else host
    return f"PAWL_TARGET={host}:{port} pawl chat"


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")
