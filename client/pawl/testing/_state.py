"""What the fake server remembers: calls, planned faults, live requests.

Owns everything that its services share, behind one condition variable.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import grpc
from google.protobuf import json_format, message

from pawl.errors import AlreadyExists, PawlError, Unauthenticated, Unavailable
from pawl.status import to_grpc_status
from pawl.testing._model import FakeModel

__all__ = ["Fault", "LiveRequest", "ReceivedCall", "State", "abort"]

_GENERATING = ("Generate", "StreamGenerate", "Chat", "StreamChat")


@dataclass(frozen=True, slots=True)
class ReceivedCall:
    """A call that the fake took: its name, its fields by their proto names, its metadata."""

    method: str
    fields: Mapping[str, object]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with a call.

    Attributes:
        kind: an error, a stream that stands still, or a stream that stops without its end.
        method: of which call, as in the proto; empty for any.
        after: after how many deltas, so of a call that generates; None for before anything was sent.
        error: what to answer.
    """

    kind: Literal["error", "hang", "truncate"]
    method: str
    after: int | None
    error: PawlError | None = None

    def strikes(self, method: str) -> bool:
        """Whether it is meant for a call of this name."""
        return self.method in ("", method) and (self.after is None or method in _GENERATING)


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that has not ended."""

    request_id: str
    prompt_tokens: int
    priority: int
    user: str
    output_tokens: int = 0
    cancelled: bool = False
    gone: bool = False


@dataclass(slots=True)
class State:
    """Shared by the services of one fake server."""

    model: FakeModel
    api_key: str
    chunk_tokens: int
    max_page_size: int
    calls: list[ReceivedCall] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    live: dict[str, LiveRequest] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    num_abandoned: int = 0
    num_requests: int = 0
    cached_blocks: int = 0
    ready: bool = True
    draining: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def receive(self, method: str, request: message.Message, context: grpc.ServicerContext) -> Fault | None:
        """Note a call, check its key, and take the fault that is planned for it, if any.

        Raises:
            PawlError: the planned error, if it comes before everything else, or a wrong key.
        """
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        fields = json_format.MessageToDict(request, preserving_proto_field_name=True)
        with self.changed:
            self.calls.append(ReceivedCall(method, fields, metadata))
            if self.api_key and metadata.get("authorization") != f"Bearer {self.api_key}":
                raise Unauthenticated("the API key is missing or not known; set PAWL_API_KEY")
            for place, fault in enumerate(self.faults):
                if fault.strikes(method):
                    del self.faults[place]
                    break
            else:
                return None
        if fault.error is not None and fault.after is None:
            raise fault.error
        return fault

    @contextmanager
    def admit(
        self, request_id: str, prompt_tokens: int, priority: int, user: str, context: grpc.ServicerContext
    ) -> Iterator[LiveRequest]:
        """Keep a request among the live ones while the block runs.

        Raises:
            PawlError: the server is draining, or the id is in use.
        """
        with self.changed:
            if self.draining or not self.ready:
                raise Unavailable("the server is not taking requests; try again later", retry_after=1.0)
            self.num_requests += 1
            request_id = request_id or f"fake-{self.num_requests}"
            if request_id in self.live:
                raise AlreadyExists(f"request id {request_id!r} is in use", request_id=request_id)
            request = LiveRequest(request_id, prompt_tokens, priority, user)
            self.live[request_id] = request
            self.changed.notify_all()

        def ended() -> None:
            with self.changed:
                if self.live.get(request_id) is request and not request.gone:
                    request.gone = True
                    self.num_abandoned += 1
                self.changed.notify_all()

        context.add_callback(ended)
        try:
            yield request
        except GeneratorExit:  # the caller left while nothing was being made: gRPC drops the iterator
            with self.changed:
                if not request.gone:
                    request.gone = True
                    self.num_abandoned += 1
            raise
        finally:
            with self.changed:
                del self.live[request_id]
                self.ended.add(request_id)
                self.cached_blocks += -(-prompt_tokens // 16)
                self.changed.notify_all()

    def stand_still(self, request: LiveRequest) -> None:
        """Wait until a request is cancelled or its caller is gone."""
        with self.changed:
            self.changed.wait_for(lambda: request.cancelled or request.gone)


def abort(context: grpc.ServicerContext, error: PawlError) -> NoReturn:
    """Answer with an error and its details. Raises, as gRPC's abort does."""
    context.abort_with_status(to_grpc_status(error))
