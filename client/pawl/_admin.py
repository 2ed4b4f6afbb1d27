"""The admin client: what an operator asks of a server, on its own listener.

Owns the public surface of administration; `_admin_core` makes requests and reads answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from pawl import _admin_core, _secrets
from pawl._admin_types import Load, RequestState, ServerInfo
from pawl._failures import from_grpc
from pawl._options import DEFAULT_ADMIN_TARGET, TLS, settings_from
from pawl._retry import Clock, Retry
from pawl._transport import ServerStream, Transport
from pawl.v1 import admin_pb2

__all__ = ["AdminClient", "LoadWatch"]


class LoadWatch:
    """Load reports as they come: the first at once, then on change. Leaving the `with` block ends it."""

    def __init__(
        self,
        rpc: ServerStream[admin_pb2.WatchLoadResponse],
        convert: Callable[[admin_pb2.WatchLoadResponse], Load],
        target: str,
    ) -> None:
        self._rpc = rpc
        self._convert = convert
        self._target = target
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Load]:
        return self

    def __next__(self) -> Load:
        """The next report; ends when the watch is closed or the server ends it.

        Raises:
            PawlError: the call failed.
        """
        if self._closed:
            raise StopIteration
        try:
            return self._convert(next(self._rpc))
        except grpc.RpcError as failure:
            if self._closed:
                raise StopIteration from None
            raise from_grpc(failure, target=self._target, method="WatchLoad", timeout=None) from failure

    def close(self) -> None:
        """End the watch. May be called from another thread, and twice."""
        self._closed = True
        self._rpc.cancel()


class AdminClient:
    """The admin listener of a pawl server. Use it as a context manager or `close()` it.

    Args:
        target: host:port. Default: `PAWL_ADMIN_TARGET`, else localhost:50052.
        api_key: sent with every call. Default: `PAWL_API_KEY`.
        internal_token: the server's internal token, which an admin listener beyond loopback wants, or a `Path` to the
            file that holds it. Default: `PAWL_INTERNAL_TOKEN`, else the file that `PAWL_INTERNAL_TOKEN_FILE` names.
        timeout: seconds for a call; `drain` and `watch_load` have their own. Default: `PAWL_TIMEOUT`, else 600.
        retries: how often a call that met `Unavailable` or `Overloaded` is tried again, or a `Retry`. Default: 2.
        tls: True for the system's certificate authorities, a PEM file of others, or a `TLS`.
        clock: where time comes from (for tests).
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        api_key: str | None = None,
        internal_token: str | Path | None = None,
        timeout: float | None = None,
        retries: int | Retry | None = None,
        tls: bool | str | Path | TLS | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings_from(
            target,
            target_variable="PAWL_ADMIN_TARGET",
            default_target=DEFAULT_ADMIN_TARGET,
            api_key=api_key,
            internal_token=_secrets.internal_token(internal_token),
            timeout=timeout,
            retries=retries,
            tls=tls,
        )
        self._transport = Transport(self._settings, clock or Clock())

    def server_info(self) -> ServerInfo:
        """Static facts: version, capacity, settings."""
        return self._transport.unary(_admin_core.server_info(self._settings))

    def requests(self) -> list[RequestState]:
        """What runs, what waits and why; oldest first, every page."""
        states: list[RequestState] = []
        page_token = ""
        while True:
            page, page_token = self._transport.unary(_admin_core.list_requests(self._settings, page_token))
            states += page
            if not page_token:
                return states

    def watch_load(self, *, min_interval: float = 1.0) -> LoadWatch:
        """The load whenever it changes, at most every `min_interval` seconds (0.1 to 60)."""
        call = _admin_core.watch_load(self._settings, min_interval)
        return LoadWatch(self._transport.open_stream(call, None), call.convert, self._transport.target)

    def drain(self, *, grace: float | None = None) -> int:
        """Stop taking requests, let running ones finish, and cancel what is left after the grace period.

        Args:
            grace: seconds that running requests may take. Default: the server's setting.

        Returns:
            Number of requests that were cancelled. Answers when nothing runs any more.
        """
        return self._transport.unary(_admin_core.drain(self._settings, grace))

    def flush_prefix_cache(self) -> int:
        """Empty the prefix cache of every replica; the number of KV blocks that are free now."""
        return self._transport.unary(_admin_core.flush_prefix_cache(self._settings))

    def close(self) -> None:
        """Close the connection; what still runs is cancelled."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.target!r}, timeout={self._settings.timeout:g})"
