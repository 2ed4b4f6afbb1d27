"""The fake server: two listeners on ports chosen by the system, and the knobs a test turns.

Owns starting, stopping and planning faults; the services are in the modules beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from types import TracebackType
from typing import Self

import grpc

from pawl.errors import PawlError
from pawl.testing._inference import FakeInference
from pawl.testing._model import FakeModel
from pawl.testing._others import FakeAdmin, FakeModels, FakeTokenizer, health_handler
from pawl.testing._state import Fault, ReceivedCall, State
from pawl.v1 import admin_pb2_grpc, inference_pb2_grpc, model_pb2_grpc, tokenizer_pb2_grpc

__all__ = ["FakeServer"]


def _echo(text: str) -> str:
    return f"You said: {text}"


class FakeServer:
    """A pawl server in this process, without a model: the same request always gets the same reply.

        with FakeServer(reply="Paris.") as server, Client(server.target) as client:
            assert client.generate("The capital of France is").text == "Paris."

    It speaks the whole public contract over real sockets on 127.0.0.1: one token per character, made-up
    log-probabilities, fixed timings. Faults are planned with `fail`, `hang` and `truncate`; leaving the block
    raises if one of them never struck.

    Args:
        reply: what it answers, or a function of the prompt's text (of a conversation: of its last turn).
        model: id of its model.
        api_key: if set, calls without it are refused.
        chunk_tokens: tokens in a delta.
        max_page_size: most entries in a page of a list.
    """

    def __init__(
        self,
        *,
        reply: str | Callable[[str], str] = _echo,
        model: str = "fake",
        api_key: str = "",
        chunk_tokens: int = 4,
        max_page_size: int = 1000,
    ) -> None:
        make_reply = reply if callable(reply) else lambda _: reply
        self._state = State(FakeModel(model, make_reply), api_key, chunk_tokens, max_page_size)
        self._pool = futures.ThreadPoolExecutor(max_workers=64, thread_name_prefix="pawl-fake")
        self._public = self._listener()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(FakeInference(self._state), self._public)
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(FakeTokenizer(self._state), self._public)
        model_pb2_grpc.add_ModelServiceServicer_to_server(FakeModels(self._state), self._public)
        self._public.add_generic_rpc_handlers((health_handler(self._state),))
        self._admin = self._listener()
        admin_pb2_grpc.add_AdminServiceServicer_to_server(FakeAdmin(self._state), self._admin)
        self.target = f"127.0.0.1:{self._public.add_insecure_port('127.0.0.1:0')}"
        self.admin_target = f"127.0.0.1:{self._admin.add_insecure_port('127.0.0.1:0')}"

    def _listener(self) -> grpc.Server:
        return grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])

    def start(self) -> None:
        """Start to answer; entering the `with` block does it."""
        self._public.start()
        self._admin.start()

    def stop(self) -> None:
        """Cut every call off and stop."""
        stopping = [self._public.stop(None), self._admin.stop(None)]
        for event in stopping:
            event.wait()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self._state.faults:
            raise AssertionError(f"{len(self._state.faults)} planned faults never struck: {self._state.faults}")

    @property
    def calls(self) -> Sequence[ReceivedCall]:
        """Every call that it took, in order."""
        with self._state.changed:
            return tuple(self._state.calls)

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        with self._state.changed:
            return len(self._state.live)

    def fail(self, error: PawlError, *, method: str = "", after: int | None = None, times: int = 1) -> None:
        """Answer the next call with an error.

        Args:
            error: what the caller will meet.
            method: only a call of this name, as in the proto (`StreamGenerate`); default: any.
            after: of a call that generates, after so many deltas; 0 is after the start event; None before everything.
            times: for so many calls.
        """
        self._plan(*[Fault("error", method, after, error)] * times)

    def hang(self, *, method: str = "", after: int = 0) -> None:
        """Let the next call that generates stand still after so many deltas, until it is cancelled."""
        self._plan(Fault("hang", method, after))

    def truncate(self, *, method: str = "", after: int = 0) -> None:
        """Let the next call that generates stop after so many deltas, without an error and without its end event."""
        self._plan(Fault("truncate", method, after))

    def _plan(self, *faults: Fault) -> None:
        with self._state.changed:
            self._state.faults.extend(faults)

    def set_ready(self, ready: bool) -> None:
        """Whether it says that it serves, and takes requests."""
        with self._state.changed:
            self._state.ready = ready

    def wait_abandoned(self, count: int = 1, *, timeout: float = 10.0) -> bool:
        """Wait until so many requests were left by their callers before their end; false if they were not."""
        with self._state.changed:
            return self._state.changed.wait_for(lambda: self._state.num_abandoned >= count, timeout)

    def wait_live(self, count: int, *, timeout: float = 10.0) -> bool:
        """Wait until so many requests are live; false if they were not in time."""
        with self._state.changed:
            return self._state.changed.wait_for(lambda: len(self._state.live) == count, timeout)

    def __repr__(self) -> str:
        return f"FakeServer({self.target!r})"
