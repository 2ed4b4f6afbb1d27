"""`make demo`: start a server on the embedded model, stream completions through the SDK, show the metrics.

Ends by itself: exit code 0 when every stream completed and the server drained, 1 otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from pawl import AsyncClient, Completion, user
from pawl_server.metrics import parse_exposition

__all__ = ["main"]

_STORY = (
    "Anna went to the garden. Tom went to the kitchen. Anna has a red ball. Tom has a blue book. ",
    "Mia went to the garden. Ben has a green cup. Ben went to the office. Mia has a yellow hat. ",
)
_QUESTIONS = ("Where is Anna?", "Where is Tom?", "Who has the red ball?", "What colour is the ball?")
_NUM_STREAMS = 16
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0


def _say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def _stream(client: AsyncClient, number: int) -> Completion:
    """One streamed answer: a question about a story, or a story to go on with."""
    if number % 2:
        question = _STORY[number % 4 // 2] + _QUESTIONS[number // 2 % len(_QUESTIONS)]
        async with client.stream_chat([user(question)], max_tokens=32, temperature=0.0) as stream:
            return await stream.final()
    opening = "Once upon a time " if number % 4 == 0 else _STORY[0]
    async with client.stream(opening, max_tokens=48, temperature=0.7, seed=number) as stream:
        return await stream.final()


async def _stream_all(target: str) -> list[Completion]:
    async with AsyncClient(target) as client:
        await client.wait_ready(timeout=30)
        _say(f"\n{_NUM_STREAMS} streams at once through the SDK, to {target}")
        started = time.monotonic()
        answers = await asyncio.gather(*(_stream(client, number) for number in range(_NUM_STREAMS)))
        seconds = time.monotonic() - started
    for number, answer in enumerate(answers):
        _say(f"  {number:>2}  {answer.finish_reason!s:<12} {' '.join(answer.text.split())[:84]}")
    tokens = sum(answer.usage.output_tokens for answer in answers)
    _say(f"{tokens} tokens in {seconds:.2f} s by the client's clock")
    return list(answers)


def _show_metrics(url: str, seconds: float) -> None:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 (our own loopback address)
        totals = parse_exposition(answer.read().decode())
    busy = totals["pawl_step_duration_seconds_sum"]
    output = totals["pawl_output_tokens_total"]
    _say(f"\nfrom {url}")
    _say(f"  output tokens            {output:.0f}")
    _say(f"  tokens per second        {output / max(busy, 1e-9):.1f} while steps ran ({busy:.2f} of {seconds:.2f} s)")
    blocks, used = totals["pawl_kv_block_capacity"], totals["pawl_kv_cache_usage_ratio"]
    _say(f"  KV cache                 {blocks:.0f} blocks, {100 * used:.1f} % in use now")
    _say(f"  requests completed       {totals['pawl_requests_total']:.0f}")


def _wait_ready(server: subprocess.Popen[bytes], ready_file: Path) -> dict[str, str]:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode} before it was ready")
        if ready_file.exists():
            addresses: dict[str, str] = json.loads(ready_file.read_text(encoding="utf-8"))
            return addresses
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {_START_TIMEOUT_S:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Arguments are passed to `pawl serve`."""
    flags = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory(prefix="pawl-demo-") as folder:
        ready_file = Path(folder) / "ready.json"
        ports = ["--port", "0", "--admin-port", "0", "--metrics-port", "0"]
        command = [sys.executable, "-m", "pawl_server.cli", "serve", *ports]
        command += ["--ready-file", str(ready_file), *flags]
        _say("$ pawl " + " ".join(command[3:]))
        server = subprocess.Popen(command, env=os.environ.copy())
        try:
            addresses = _wait_ready(server, ready_file)
            started = time.monotonic()
            answers = asyncio.run(_stream_all(addresses["grpc"]))
            _show_metrics(addresses["metrics"], time.monotonic() - started)
            complete = len(answers) == _NUM_STREAMS and all(a.finish_reason and a.text for a in answers)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                code = server.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                code = server.wait()
        _say(f"\nserver drained and ended with exit code {code}")
    return 0 if complete and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
