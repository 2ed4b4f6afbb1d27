"""Metrics as text: served to scrapers, joined over processes, read again. Knows no metric by name."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families

from pawl_server.addresses import family_of

__all__ = ["MetricsServer", "join_expositions", "parse_exposition", "serve_metrics"]


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """A running /metrics listener."""

    host: str
    port: int
    server: ThreadingHTTPServer
    thread: threading.Thread
    ending: socket.socket

    def stop(self) -> None:
        """Close the listener."""
        self.ending.send(b"x")
        self.thread.join()
        self.ending.close()
        self.server.server_close()


def serve_metrics(host: str, port: int, exposition: CollectorRegistry | Callable[[], bytes]) -> MetricsServer:
    """Serve `/metrics` (text format 0.0.4) on a thread of its own. Port 0 = any free one.

    Args:
        host: address to bind.
        port: port to bind.
        exposition: a registry, or a function that makes the text at each scrape.

    Raises:
        OSError: the port is in use, or the host is none of this machine.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a scraper that hangs does not keep its thread for ever

        def do_GET(self) -> None:
            if self.path.split("?")[0] not in ("/", "/metrics"):
                self.send_error(404)
                return
            body = generate_latest(exposition) if isinstance(exposition, CollectorRegistry) else exposition()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (name of the base class)
            """Scrapes are not logged."""

    class Server(ThreadingHTTPServer):
        address_family = family_of(host)
        daemon_threads = True
        allow_reuse_address = True

    server = Server((host, port), Handler)
    server.timeout = 0  # of `handle_request`, which is called when somebody is there
    ending, ended = socket.socketpair()
    thread = threading.Thread(target=_serve_until, args=(server, ended), name="pawl-metrics", daemon=True)
    thread.start()
    return MetricsServer(host, server.server_address[1], server, thread, ending)


def _serve_until(server: ThreadingHTTPServer, ended: socket.socket) -> None:
    """Serve until something can be read from `ended`.

    `serve_forever` looks again and again whether it should end, each time with the lock that a step loop wants.
    """
    with ended, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while all(key.fileobj is not ended for key, _ in selector.select()):
            server.handle_request()


def join_expositions(texts: Iterable[str]) -> bytes:
    """Join the expositions of several processes into one, each family once.

    Their label values differ (`replica`, `worker`), or they are front ends sharing a port, whose equal
    series are added up.
    """
    documentation: dict[str, tuple[str, str]] = {}
    series: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            name = family.name + "_total" if family.type == "counter" else family.name
            documentation.setdefault(name, (family.documentation, family.type))
            rows = series.setdefault(name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                before = rows.get(key, 0.0)
                rows[key] = max(before, sample.value) if name.endswith("_info") else before + sample.value
    lines: list[str] = []
    for name, rows in series.items():
        text, kind = documentation[name]
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for (sample_name, labels), value in rows.items():
            shown = ",".join(f'{k}="{_escape(v)}"' for k, v in labels)
            lines.append(f"{sample_name}{{{shown}}} {value!r}" if shown else f"{sample_name} {value!r}")
    return ("\n".join(lines) + "\n").encode()


def parse_exposition(text: str) -> dict[str, float]:
    """Sum of each sample name over its labels; for displays, not for scraping."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
