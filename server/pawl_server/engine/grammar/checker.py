"""The engine's end of `check`: a process that may die of a grammar, started when the first one comes.

Owns its life: a check that takes too long, or a process that died, costs that one grammar and a new process. A
process that does not even start is no grammar's fault, and the next one that comes tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Sequence

from pawl.errors import Unavailable
from pawl_server.engine.grammar.constraint import Constraint, bad_constraint

__all__ = ["CHECK_COMMAND", "GrammarChecker"]

log = logging.getLogger(__name__)

CHECK_COMMAND = (sys.executable, "-m", "pawl_server.engine.grammar.check")
_START_TIMEOUT_S = 60.0
_LINE_BYTES = 1 << 22
_SHOWN_BYTES = 2000  # of what a process that does not start says last


class GrammarChecker:
    """Checks one constraint after the other.

    Args:
        timeout_s: longest time that one may take.
        most_bytes: most memory that one may take once it is compiled.
        command: what checks.
        start_timeout_s: longest time that it may take to start.
    """

    def __init__(
        self,
        timeout_s: float,
        most_bytes: int,
        command: Sequence[str] = CHECK_COMMAND,
        start_timeout_s: float = _START_TIMEOUT_S,
    ) -> None:
        self._timeout_s, self._most_bytes = timeout_s, most_bytes
        self._command, self._start_timeout_s = command, start_timeout_s
        self._start_failure = ""
        self._said: asyncio.Task[bytes] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    @property
    def process_id(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None else self._process.pid

    async def check(self, constraint: Constraint) -> int:
        """See whether a constraint can be used; gives the bytes that it takes when it is compiled.

        Raises:
            InvalidRequest: it cannot be used.
            Unavailable: nothing can be checked, since the process does not start.
        """
        async with self._turn:
            process = await self._running()
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await _ask(process, [constraint.kind, constraint.source])
            except TimeoutError:
                what = f"not compiled after {self._timeout_s:g} s (server setting engine.grammar_timeout_s)"
                answer = None
            except BaseException:
                await self.close()  # its answer would be taken for the next one's
                raise
            else:
                what = "it takes more stack or memory than a grammar may"
            if answer is None:
                await self.close()
                raise bad_constraint(constraint, f"{what}: simplify it", "CONSTRAINT_TOO_COMPLEX")
            problem, num_bytes = answer
            if problem:
                raise bad_constraint(constraint, problem)
            if num_bytes > self._most_bytes:
                what = f"it takes {num_bytes:,} bytes, at most {self._most_bytes:,} may be"
                setting = "server setting engine.max_grammar_bytes"
                raise bad_constraint(constraint, f"{what} ({setting}): simplify it", "CONSTRAINT_TOO_COMPLEX")
            return num_bytes

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _running(self) -> asyncio.subprocess.Process:
        """The process; a new one has answered, so that its start is not counted as a grammar's time.

        Raises:
            Unavailable: it does not start.
        """
        if self._process is not None and self._process.returncode is None:
            return self._process
        failure, said = "", b""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                process = await self._start()
                if await _ask(process, ["regex", "a"]) is not None:
                    self._start_failure = ""
                    return process
                failure = f"it ended with code {await process.wait()}"
                said = await self._said if self._said is not None else b""
        except TimeoutError:
            failure = f"it did not answer in {self._start_timeout_s:g} s"
        except (OSError, ValueError) as error:
            failure = str(error)
        except BaseException:
            await self.close()
            raise
        await self.close()
        if failure != self._start_failure:
            self._start_failure = failure
            command, last = " ".join(self._command), said.decode(errors="replace")
            log.error("no constraint can be checked, since %s did not start: %s\n%s", command, failure, last)
        raise Unavailable(
            f"this replica cannot check constraints: the process that does so did not start ({failure}); try again,"
            " or send the request without a constraint (the engine's log has the cause)",
            reason="GRAMMAR_CHECKER_FAILED",
        )

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LINE_BYTES
        )
        self._said = asyncio.create_task(_last_words(self._process), name="last words of a grammar checker")
        return self._process


async def _last_words(process: asyncio.subprocess.Process) -> bytes:
    """Read what a process says until it ends, so that it never waits for a reader; the last of it."""
    said = b""
    if process.stderr is not None:
        while part := await process.stderr.read(1 << 16):
            said = (said + part)[-_SHOWN_BYTES:]
    return said


async def _ask(process: asyncio.subprocess.Process, question: list[str]) -> tuple[str, int] | None:
    """One line to the process and one back: what is wrong, and bytes; None when it died of it."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return None
    if not line.endswith(b"\n"):
        return None
    problem, num_bytes = json.loads(line)
    return str(problem), int(num_bytes)
