"""Locust user for the streaming RPC.

    locust -f loadtest/pawl_loadtest/locustfile.py --headless -u 1 -t 1m --csv run --html run.html

A user is a dispatcher: it keeps an open-loop schedule and spawns a greenlet per request, so that a slow server
cannot slow the arrivals. One per process is enough; `--processes 4 -u 4` shares the rate among four. Every request
fires `end to end`, `time to first token` and `dispatch lateness`, counted from its due time, and a `gap` between
each two deltas, with sub-millisecond resolution. A stream that is still open some time after the end of the run
counts as failed: without it, the slowest requests would be missing from the figures.

Settings, as environment variables: PAWL_TARGET (host:port, or grpcs://host:port for TLS), PAWL_API_KEY,
PAWL_LOAD_TLS_CA (PEM file of the authorities that sign the server), PAWL_LOAD_TLS_CERTIFICATE and PAWL_LOAD_TLS_KEY
(PEM files of your certificate, for a server that asks for one, and of its key), PAWL_LOAD_RATE (arrivals per second
of all users together), PAWL_LOAD_ARRIVALS, PAWL_LOAD_PROMPT_TOKENS, PAWL_LOAD_OUTPUT_TOKENS, PAWL_LOAD_SEED,
PAWL_LOAD_FINISH_S (how long open streams may go on after the end; default 30) and PAWL_LOAD_MAX_LATENESS_MS
(the run fails when the dispatchers' own p99 lateness is above; default 10).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# gRPC must be told about gevent before the first channel is made.
from grpc.experimental import gevent as grpc_gevent

grpc_gevent.init_gevent()

import gevent  # noqa: E402 (after init_gevent)
from gevent.pool import Group  # noqa: E402
from locust import User, constant, events, stats, task  # noqa: E402
from locust.runners import WorkerRunner  # noqa: E402

from pawl import Client, Delta, PawlError, Stop  # noqa: E402
from pawl_loadtest.measure import Record  # noqa: E402
from pawl_loadtest.prompts import PromptSource  # noqa: E402
from pawl_server.cli.client_tls import tls_of  # noqa: E402
from pawl_server.sim.arrivals import parse_arrivals  # noqa: E402

_numbers = itertools.count()

# Locust rounds to whole milliseconds and two digits; a gap between tokens needs more.
stats.bucket_response_time = lambda milliseconds: round(milliseconds, 2)


def _file(variable: str) -> Path | None:
    name = os.environ.get(variable)
    return Path(name) if name else None


class StreamUser(User):  # type: ignore[misc]  # locust is untyped
    """Dispatches streams on a schedule; the users of a run (`-u`) share its rate."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Connect and draw the schedule of this user's share."""
        variable = os.environ.get
        tls = tls_of(_file("PAWL_LOAD_TLS_CA"), _file("PAWL_LOAD_TLS_CERTIFICATE"), _file("PAWL_LOAD_TLS_KEY"))
        self._client = Client(variable("PAWL_TARGET", "localhost:50051"), retries=0, tls=tls)
        model = self._client.models.list()[0]
        seed = int(variable("PAWL_LOAD_SEED", "0"))
        rate = float(variable("PAWL_LOAD_RATE", "4"))
        arrivals = parse_arrivals(variable("PAWL_LOAD_ARRIVALS", "poisson"), rate, seed)
        num_users = max(1, self.environment.parsed_options.num_users or 1)
        runner = self.environment.runner
        number = runner.worker_index if isinstance(runner, WorkerRunner) else next(_numbers)
        if num_users > 1:
            arrivals = arrivals.split(num_users, number)
        self._due_times: Iterator[float] = arrivals.due_times()
        # Prompts of their own for each user, or the prefix cache would serve all but the first.
        self._prompts = PromptSource(model.vocab_size, seed=seed * 1009 + number)
        self._prompt_tokens = int(variable("PAWL_LOAD_PROMPT_TOKENS", "64"))
        self._output_tokens = int(variable("PAWL_LOAD_OUTPUT_TOKENS", "32"))
        self._finish_s = float(variable("PAWL_LOAD_FINISH_S", "30"))
        self._running = Group()
        self._started = time.monotonic()

    @task  # type: ignore[untyped-decorator]  # locust is untyped
    def dispatch(self) -> None:
        """Wait until the next request is due and start it."""
        due = self._started + next(self._due_times)
        gevent.sleep(max(0.0, due - time.monotonic()))
        self._running.spawn(self._stream, due, self._prompts.prompt(self._prompt_tokens))

    def _stream(self, due: float, prompt: list[int]) -> None:
        record = Record(due=due, sent=time.monotonic())
        failure: Exception | None = None
        stop = Stop(max_tokens=self._output_tokens, ignore_eos=True)
        try:
            with self._client.stream(prompt, stop=stop, temperature=0.0) as stream:
                for event in stream:
                    if isinstance(event, Delta):
                        record.delta(time.monotonic(), event.token_count)
        except PawlError as error:
            failure = error
        except gevent.GreenletExit:
            failure = TimeoutError(f"still open {self._finish_s:g} s after the end of the run")
        ended = time.monotonic()
        self._fire("end to end", ended - due, record.output_tokens, failure)
        self._fire("dispatch lateness", record.sent - due, 0, None)
        if record.first_token is not None:
            self._fire("time to first token", record.first_token - due, 0, None)
        for gap in record.gaps:
            self._fire("gap", gap, 0, None)

    def _fire(self, name: str, seconds: float, length: int, failure: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="stream",
            name=name,
            response_time=1000 * seconds,
            response_length=length,
            exception=failure,
            context={},
        )

    def on_stop(self) -> None:
        """Let running streams finish for a while, then cut them."""
        self._running.join(timeout=self._finish_s)
        self._running.kill()
        self._client.close()


@events.quitting.add_listener  # type: ignore[untyped-decorator]  # locust is untyped
def judge(environment: Any, **_: object) -> None:  # noqa: ANN401 (locust's own type is untyped)
    """Exit with 1 when requests failed or the dispatchers were late; let the CSV files have the last figures."""
    total = environment.stats.total
    lateness = environment.stats.get("dispatch lateness", "stream").get_response_time_percentile(0.99)
    if total.num_failures or (lateness or 0.0) > float(os.environ.get("PAWL_LOAD_MAX_LATENESS_MS", "10")):
        environment.process_exit_code = 1
    if environment.parsed_options.csv_prefix and not isinstance(environment.runner, WorkerRunner):
        # Locust writes them once a second and not at the end.
        gevent.sleep(stats.CSV_STATS_INTERVAL_SEC + 0.2)
