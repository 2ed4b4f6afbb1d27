"""The engine's end of `check`: a process that may die of a grammar, started when the first one comes.

Owns its life: a check that takes too long, or a process that died, costs that one grammar and a new process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

from pawl_server.engine.grammar.constraint import Constraint, bad_constraint

__all__ = ["GrammarChecker"]

_MODULE = "pawl_server.engine.grammar.check"
_START_TIMEOUT_S = 60.0
_LINE_BYTES = 1 << 22


class GrammarChecker:
    """Checks one constraint after the other.

    Args:
        timeout_s: longest time that one may take.
        most_bytes: most memory that one may take once it is compiled.
    """

    def __init__(self, timeout_s: float, most_bytes: int) -> None:
        self._timeout_s, self._most_bytes = timeout_s, most_bytes
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
        """
        async with self._turn:
            try:
                process = await self._running()
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
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                _MODULE,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LINE_BYTES,
            )
            async with asyncio.timeout(_START_TIMEOUT_S):
                await _ask(self._process, ["regex", "a"])  # so that its start is not counted as the grammar's time
        return self._process


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
