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
import threading
import time
import urllib.request
from pathlib import Path
from typing import Self

from pawl import AsyncClient, Completion, Stop, user
from pawl_server.exposition import parse_exposition

__all__ = ["main"]

_STORIES = (
    "Anna went to the garden. The ball is with Tom. The ball is red. Mia has three apples.",
    "The hat is in the tower. Ben is in the kitchen. Vera has the map. The hat is green.",
)
_QUESTIONS = (
    ("Where did Anna go?", "Who has the ball?", "What colour is the ball?", "How many apples does Mia have?"),
    ("Where is the hat?", "Where is Ben?", "What does Vera have?", "What colour is the hat?"),
)
_OPENING = "Once upon a time there were three friends,"
_LEAST_S = 1.5  # the streams go round as long as this: gauges are renewed once a second
_NUM_STREAMS = 16
_LONG = Stop(max_tokens=400, ignore_eos=True)
_NUM_BLOCKS = 256  # small enough to see it fill
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0


def _say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def _stream(client: AsyncClient, number: int) -> Completion:
    """A question about a story, as a chat; every fourth stream tells stories of its own instead, at some length."""
    if number % 4 == 3:
        async with client.stream(_OPENING, stop=_LONG, temperature=0.7, seed=number) as stream:
            return await stream.final()
    story = number % 2
    question = f"{_STORIES[story]}\n{_QUESTIONS[story][number // 4]}"
    async with client.stream_chat([user(question)], max_tokens=32, temperature=0.0) as stream:
        return await stream.final()


async def _stream_all(target: str) -> list[Completion]:
    async with AsyncClient(target) as client:
        await client.wait_ready(timeout=30)
        _say(f"\n{_NUM_STREAMS} streams at once through the SDK, to {target}")
        started = time.monotonic()
        answers, tokens, seconds = list[Completion](), 0, 0.0
        while seconds < _LEAST_S:
            answers = await asyncio.gather(*(_stream(client, number) for number in range(_NUM_STREAMS)))
            tokens += sum(answer.usage.output_tokens for answer in answers)
            seconds = time.monotonic() - started
    for number, answer in enumerate(answers):
        _say(f"  {number:>2}  {answer.finish_reason!s:<12} {' '.join(answer.text.split())[:84]}")
    _say(f"{tokens} tokens in {seconds:.2f} s by the client's clock")
    return answers


class _Scraper:
    """Reads /metrics while the streams run, so that the fullest moment of the KV cache is seen too."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)
        self.most_used = 0.0
        self.last: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._scrape()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self._scrape()

    def _scrape(self) -> None:
        with urllib.request.urlopen(self._url, timeout=10) as answer:  # noqa: S310 (our own loopback address)
            self.last = parse_exposition(answer.read().decode())
        self.most_used = max(self.most_used, self.last["pawl_kv_cache_usage_ratio"])

    def show(self) -> None:
        """Print tokens per second and cache usage."""
        busy, output = self.last["pawl_step_duration_seconds_sum"], self.last["pawl_output_tokens_total"]
        blocks = self.last["pawl_kv_block_capacity"]
        _say(f"\nfrom {self._url}")
        _say(f"  output tokens            {output:.0f}")
        _say(f"  tokens per second        {output / max(busy, 1e-9):.1f} (over {busy:.2f} s of steps)")
        _say(f"  KV cache                 {blocks:.0f} blocks, at most {100 * self.most_used:.1f} % in use")
        _say(f"  prefill tokens           {self.last['pawl_prompt_tokens_total']:.0f}, cached ones included")
        _say(f"  requests completed       {self.last['pawl_requests_total']:.0f}")


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
        command += ["--num-blocks", str(_NUM_BLOCKS), "--ready-file", str(ready_file), *flags]
        _say("$ pawl " + " ".join(command[3:]))
        server = subprocess.Popen(command, env=os.environ.copy())
        try:
            addresses = _wait_ready(server, ready_file)
            with _Scraper(addresses["metrics"]) as scraper:
                answers = asyncio.run(_stream_all(addresses["grpc"]))
            scraper.show()
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
