"""The public surface: what is exported, and that sync and async agree."""

from __future__ import annotations

import inspect
import re

import pytest

import pawl
import pawl.errors
import pawl.testing
from pawl._async_client import AsyncModels
from pawl._client import Models

DOCUMENTED = set(
    """
    AdminClient AlreadyExists Alternative AsyncAdminClient AsyncChat AsyncClient AsyncLoadWatch AsyncStream
    CallOptions CancelOutcome Cancelled Chat ChatOptions Client Clock Completion DeadlineExceeded Delta End
    Event FieldViolation FinishReason GenerateOptions InvalidRequest Load LoadWatch Message Model NotFound
    NotSupported Overloaded PawlError PermissionDenied Prompt RenderedChat RequestState Retry Role Sample SampleEnd
    Sampling ScoreOptions ScoredContinuation Scores ServerError ServerInfo Start Stop StopMatch Stream
    StreamBroken StreamChatOptions StreamOptions TLS Timings Token TokenLogprob Tokenization Unauthenticated
    Unavailable Usage WorkerLoad WorkerState __version__ assistant system tool user
    """.split()  # noqa: SIM905 (a list of sixty strings hides what it says)
)

TWINS = [
    (pawl.Client, pawl.AsyncClient),
    (pawl.AdminClient, pawl.AsyncAdminClient),
    (pawl.Stream, pawl.AsyncStream),
    (pawl.LoadWatch, pawl.AsyncLoadWatch),
    (pawl.Chat, pawl.AsyncChat),
    (Models, AsyncModels),
]


def test_all_is_what_is_documented() -> None:
    """Adding or losing a public name is a decision, not an accident."""
    assert set(pawl.__all__) == DOCUMENTED
    for name in pawl.__all__:
        assert hasattr(pawl, name)
    public = {name for name, value in vars(pawl).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - set(pawl.__all__) <= {"annotations", "set_up_logging"}


def test_every_error_is_exported() -> None:
    """A caller never has to import from a deeper module to catch something."""
    for error in (*pawl.errors.ERROR_CLASSES, pawl.StreamBroken):
        assert getattr(pawl, error.__name__) is error


def _public(cls: type) -> dict[str, inspect.Signature | None]:
    return {
        name: inspect.signature(value) if inspect.isfunction(value) else None
        for name, value in inspect.getmembers(cls)
        if not name.startswith("_") or name == "__init__"
    }


def _neutral(text: str) -> str:
    return re.sub(r"\bAsync", "", text).replace("AsyncIterator", "Iterator")


@pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda cls: cls.__name__)
def test_sync_and_async_have_the_same_methods(sync: type, twin: type) -> None:
    """Same names, parameters, defaults and results; only `async` differs."""
    ours, theirs = _public(sync), _public(twin)
    assert ours.keys() == theirs.keys()
    private = {"__init__"} if sync in (pawl.Stream, pawl.LoadWatch, pawl.Chat, Models) else set()
    for name in ours.keys() - private:
        assert _neutral(str(ours[name])) == _neutral(str(theirs[name])), name


@pytest.mark.parametrize("cls", [cls for pair in TWINS for cls in pair], ids=lambda cls: cls.__name__)
def test_public_methods_are_documented(cls: type) -> None:
    """Every public method has a docstring."""
    for name, value in inspect.getmembers(cls):
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert value.__doc__, name


def test_no_protobuf_in_signatures() -> None:
    """Messages of the wire stay inside."""
    for pair in TWINS:
        for cls in pair:
            private = {"__init__"} if cls in (pawl.LoadWatch, pawl.AsyncLoadWatch) else set()
            for name, signature in _public(cls).items():
                if name not in private:
                    assert "pb2" not in str(signature), f"{cls.__name__}.{name}"


def test_repr_has_neither_key_nor_prompt() -> None:
    """What lands in logs and tracebacks is harmless."""
    with pawl.Client("localhost:1", api_key="secret-key") as client:
        assert "secret" not in repr(client) + repr(client._settings)
        assert repr(client) == "Client('localhost:1', timeout=600)"
        assert "hidden words" not in repr(client.chat(system="hidden words"))
        assert "hidden words" not in repr(client.stream("hidden words"))
    assert "hidden words" not in repr(pawl.user("hidden words"))
