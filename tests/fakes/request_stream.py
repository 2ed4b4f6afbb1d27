"""A request's stream without a front end: its account counts nothing, and raises where a test wants that."""

from __future__ import annotations

from pawl_server.frontend.calls import Call
from pawl_server.frontend.mailbox import Mailbox
from pawl_server.frontend.output_text import OutputText
from pawl_server.frontend.requests import StopRules
from pawl_server.frontend.stream import RequestStream
from pawl_server.internal.v1 import engine_pb2

__all__ = ["request_stream"]

_RULES = StopRules(None, 0, (), (), include_stop=False, ignore_eos=False, max_duration_s=60.0)


class _FakeAccount:
    def __init__(self, planted: str) -> None:
        self._planted = planted

    def first_token(self) -> None:
        self._perhaps_raise("first_token")

    def charge(self, num_tokens: int) -> None:
        self._perhaps_raise("charge")

    def retry_after(self) -> float:
        self._perhaps_raise("retry_after")
        return 1.0

    def _perhaps_raise(self, method: str) -> None:
        if method == self._planted:
            raise ValueError("planted")


def request_stream(submit: engine_pb2.Submit, request_id: str, *, planted: str = "") -> RequestStream:
    """A stream without text. The method of its account that `planted` names raises."""
    return RequestStream(
        submit,
        OutputText(None, _RULES),
        Mailbox(100),
        call=Call(request_id, "Generate"),
        account=_FakeAccount(planted),
        path="",
    )
