"""A hub on this machine: serves one checkpoint folder as `owner/name`, and notes what was fetched of it.

Speaks as much of the Hugging Face hub's HTTP as its client needs for metadata, single files and ranges of them.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["COMMIT", "LocalHub", "local_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """Where it listens, and the bytes that it sent of each file."""

    url: str = ""
    sent: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def local_hub(folder: Path, model: str) -> Iterator[LocalHub]:
    """Serve the folder for as long as the context lasts."""
    hub = LocalHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            names = sorted(entry.name for entry in folder.iterdir())
            if path.startswith(f"/api/models/{model}"):
                info = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                entries = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": name}
                           for name in names]  # fmt: skip
                self._send(200, json.dumps(entries if "/tree/" in path else info).encode(), with_body)
            elif path.startswith(f"/{model}/resolve/") and path.rpartition("/")[2] in names:
                self._file(path.rpartition("/")[2], with_body)
            else:
                self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})

        def _file(self, name: str, with_body: bool) -> None:
            body, status = (folder / name).read_bytes(), 200
            wanted = self.headers.get("range", "")
            if wanted.startswith("bytes="):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                body, status = body[int(first) : int(last) + 1], 206
            if with_body:
                hub.sent[name] = hub.sent.get(name, 0) + len(body)
            self._send(status, body, with_body, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

        def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
