"""One engine process, spoken to in JSON lines. See `engines/host.py` for the other side."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Driver", "EngineError", "tokens_of"]

_HOST = Path(__file__).parent / "engines" / "host.py"
_STOP_TIMEOUT_S = 30.0
_TAIL_LINES = 3


class EngineError(Exception):
    """The engine refused, failed, ended or did not answer in time."""


class Driver:
    """An engine process; a context manager that ends it.

    Args:
        python: the interpreter of its environment.
        engine: the script that defines `Engine`.
        log: where its standard error goes.
        threads: how many of this process's cores it may run on.
        variables: of its environment, beside ours.
        stop_timeout_s: how long it may take to end by itself.
    """

    def __init__(
        self,
        python: Path,
        engine: Path,
        log: Path,
        *,
        threads: int,
        variables: Mapping[str, str] | None = None,
        stop_timeout_s: float = _STOP_TIMEOUT_S,
    ) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | dict(variables or {})
        self._log, self._stop_timeout_s = log, stop_timeout_s
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(python), "-P", str(_HOST), str(engine)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # with the processes it starts, so that all can be told to end
            )
        os.sched_setaffinity(self._process.pid, cores)
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, operation: str, arguments: Mapping[str, object], timeout_s: float) -> Mapping[str, object]:
        """Ask for an operation and wait for its result.

        Raises:
            EngineError: it failed, or did not answer in time.
        """
        request = json.dumps({"op": operation, "arguments": arguments}).encode() + b"\n"
        if self._process.stdin is None:
            raise EngineError("the process has no input")
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except OSError as error:
            raise EngineError(f"{operation}: the process ended: {self._tail()}") from error
        answer = json.loads(self._read_line(operation, time.monotonic() + timeout_s))
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        result: Mapping[str, object] = answer["result"]
        return result

    def _read_line(self, operation: str, deadline: float) -> bytes:
        if self._process.stdout is None:
            raise EngineError("the process has no output")
        output = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EngineError(f"{operation}: no answer in time")
            read = os.read(output, 1 << 20)
            if not read:
                raise EngineError(f"{operation}: the process ended: {self._tail()}")
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-_TAIL_LINES:]) or "it said nothing"

    @property
    def process_id(self) -> int:
        """Of the engine's process, the parent of those that it starts."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process: by closing its input, and by signals if that is not heard."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        for last_resort in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(self._stop_timeout_s)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, last_resort)
            else:
                return
        self._process.wait()


def tokens_of(result: Mapping[str, object]) -> list[list[int]]:
    """The generated tokens of a result, checked to be lists of numbers."""
    tokens = result["tokens"]
    if not isinstance(tokens, Sequence):
        raise EngineError(f"tokens are {type(tokens).__name__}, not a list")
    return [[int(token) for token in sequence] for sequence in tokens]
