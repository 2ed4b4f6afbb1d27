"""Keywords and settings: what is sent for what a caller wrote."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import json_format, message

from pawl import (
    TLS,
    AdminClient,
    AsyncClient,
    ChatOptions,
    Client,
    GenerateOptions,
    InvalidRequest,
    Retry,
    Sampling,
    Stop,
    user,
)
from pawl import _core as core
from pawl._channel import channel_options, metadata, open_channel
from pawl._options import DEFAULT_TARGET, Settings, settings_from
from pawl._secrets import internal_token

SETTINGS = Settings(target="localhost:1")


def fields(request: message.Message) -> dict[str, object]:
    """A message as plain data."""
    return dict(json_format.MessageToDict(request, preserving_proto_field_name=True))


def settings(target: str | None = None, **changes: object) -> Settings:
    """As a client makes them."""
    values: dict[str, object] = {"api_key": None, "timeout": None, "retries": None, "tls": None, **changes}
    return settings_from(target, target_variable="PAWL_TARGET", default_target=DEFAULT_TARGET, **values)  # type: ignore[arg-type]


def test_nothing_given_sends_nothing() -> None:
    """Unset stays unset, so the server's defaults hold."""
    assert fields(core.generate(SETTINGS, "Hi", {}).request) == {
        "prompt": {"text": "Hi"},
        "output": {"timings": True},
        "options": {},
    }


LONE = "half \ud83d"


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: core.generate(SETTINGS, LONE, {}), "prompt"),
        (lambda: core.generate(SETTINGS, "Hi", {"model": LONE}), "model"),
        (lambda: core.generate(SETTINGS, "Hi", {"model": 5}), "model"),  # type: ignore[typeddict-item]
        (lambda: core.generate(SETTINGS, "Hi", {"stop": LONE}), "stop"),
        (lambda: core.generate(SETTINGS, "Hi", {"user": LONE}), "options"),
        (lambda: core.generate(SETTINGS, "Hi", {"choices": [LONE]}), "sampling.choices"),
        (lambda: core.chat(SETTINGS, [user(LONE)], {}), "conversation.messages[0]"),
        (lambda: core.chat(SETTINGS, [user("Hi"), user(None)], {}), "conversation.messages[1].content"),  # type: ignore[arg-type]
        (lambda: core.chat(SETTINGS, [user(5)], {}), "conversation.messages[0].content"),  # type: ignore[arg-type]
        (lambda: core.render_chat(SETTINGS, [user("Hi")], {"model": LONE}), "model"),
        (lambda: core.score(SETTINGS, "Hi", ["a", LONE], None, {}), "continuations[1]"),
        (lambda: core.tokenize(SETTINGS, LONE, add_special_tokens=None, offsets=False, options={}), "text"),
        (lambda: core.get_model(SETTINGS, LONE), "name"),
        (lambda: core.cancel(SETTINGS, [LONE], "", None), "request_ids"),
        (lambda: core.cancel(SETTINGS, [5], "", None), "request_ids"),  # type: ignore[list-item]
    ],
)
def test_what_no_message_can_hold_names_its_field(call: Callable[[], object], field: str) -> None:
    """Half of a pair of surrogates, as a text cut in UTF-16 has it, is no text; nothing of it is in the message."""
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert [violation.field for violation in caught.value.violations] == [field]
    assert "half" not in caught.value.message


@pytest.mark.parametrize("key", ["pawl-secret\n", " pawl-secret", "pawl-secret"])
def test_the_line_end_of_a_key_file_is_no_part_of_the_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert metadata(settings(api_key=key)) == (("authorization", "Bearer pawl-secret"),)
    monkeypatch.setenv("PAWL_API_KEY", key)
    assert settings().api_key == "pawl-secret"


@pytest.mark.parametrize("key", ["pawl secret", "pawl\nsecret", "pawl-geheim\u00df"])
def test_a_key_that_metadata_cannot_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(InvalidRequest, match="api_key") as caught:
        settings(api_key=key)
    assert key[5:] not in caught.value.message


def test_zero_is_sent_as_zero() -> None:
    """0 is a value and never reads as "default"."""
    request = core.generate(
        SETTINGS, [1, 2], {"temperature": 0, "min_p": 0.0, "seed": 0, "logprobs": 0, "stop": Stop(min_tokens=0)}
    ).request
    assert fields(request)["sampling"] == {"temperature": 0.0, "min_p": 0.0, "seed": "0"}
    assert fields(request)["stop"] == {"min_output_tokens": 0}
    assert fields(request)["output"] == {"logprobs": 0, "timings": True}
    assert fields(request)["prompt"] == {"token_ids": {"ids": [1, 2]}}


def test_every_keyword_is_sent() -> None:
    """One request with all of them."""
    call = core.stream_generate(
        SETTINGS,
        "Hi",
        {
            "model": "m",
            "timeout": 5,
            "sampling": Sampling(temperature=0.5, repetition_penalty=1.1, presence_penalty=0.25),
            "top_p": 0.5,
            "top_k": 4,
            "min_p": 0.25,
            "frequency_penalty": 0.5,
            "logit_bias": {3: -1.0},
            "seed": 7,
            "stop": Stop(strings=["a"], token_ids=[9], include=True, ignore_eos=True, max_duration=1.5, min_tokens=1),
            "max_tokens": 8,
            "logprobs": 2,
            "prompt_logprobs": 1,
            "token_ids": True,
            "omit_text": True,
            "skip_special_tokens": False,
            "timings": False,
            "priority": 3,
            "request_id": "r",
            "bypass_prefix_cache": True,
            "cache_salt": "s",
            "retain_prefix": 30.0,
            "user": "u",
            "add_special_tokens": False,
            "min_chunk_interval": 0.25,
            "min_chunk_tokens": 2,
        },
    )
    assert call.timeout == 5
    assert fields(call.request) == {
        "request": {
            "model": "m",
            "prompt": {"text": "Hi", "add_special_tokens": False},
            "sampling": {
                "temperature": 0.5,
                "top_p": 0.5,
                "top_k": 4,
                "min_p": 0.25,
                "repetition_penalty": 1.1,
                "presence_penalty": 0.25,
                "frequency_penalty": 0.5,
                "logit_bias": {"3": -1.0},
                "seed": "7",
            },
            "stop": {
                "max_output_tokens": 8,
                "min_output_tokens": 1,
                "stop_strings": ["a"],
                "stop_token_ids": [9],
                "include_stop": True,
                "ignore_eos": True,
                "max_duration": "1.500s",
            },
            "output": {
                "logprobs": 2,
                "prompt_logprobs": 1,
                "token_ids": True,
                "omit_text": True,
                "skip_special_tokens": False,
            },
            "options": {
                "request_id": "r",
                "priority": 3,
                "bypass_prefix_cache": True,
                "cache_salt": "s",
                "retain_prefix": "30s",
                "user": "u",
            },
        },
        "stream": {"min_chunk_interval": "0.250s", "min_chunk_tokens": 2},
    }


def test_keyword_wins_over_object() -> None:
    """`sampling=base, seed=i` is base with another seed; `max_tokens` goes over `Stop`."""
    request = core.generate(
        SETTINGS,
        "",
        {"sampling": Sampling(seed=1, top_k=2), "seed": 3, "stop": Stop(max_tokens=4, strings=["x"]), "max_tokens": 5},
    ).request
    assert fields(request)["sampling"] == {"seed": "3", "top_k": 2}
    assert fields(request)["stop"] == {"max_output_tokens": 5, "stop_strings": ["x"]}


@pytest.mark.parametrize("stop", ["END", ["END"], Stop(strings=("END",))])
def test_stop_takes_text_texts_or_object(stop: str | list[str] | Stop) -> None:
    """A single text is one stop string, not its letters."""
    request = core.generate(SETTINGS, "", {"stop": stop}).request
    assert fields(request)["stop"] == {"stop_strings": ["END"]}


def test_chat_keywords() -> None:
    """Conversation, template variables and an open last turn."""
    call = core.chat(
        SETTINGS, [user("Hi", name="Ann")], {"template_kwargs": {"a": "b"}, "continue_final_message": True}
    )
    assert fields(call.request)["conversation"] == {
        "messages": [{"role": "ROLE_USER", "content": "Hi", "name": "Ann"}],
        "continue_final_message": True,
        "template_kwargs": {"a": "b"},
    }


def test_client_defaults_are_used() -> None:
    """Model and priority of the client, unless the call has its own."""
    own = Settings(target="t", default_model="m", priority=5, timeout=9.0)
    request = fields(core.generate(own, "", {}).request)
    assert (request["model"], request["options"]) == ("m", {"priority": 5})
    other = fields(core.generate(own, "", {"model": "n", "priority": 0}).request)
    assert (other["model"], other["options"]) == ("n", {})
    assert core.generate(own, "", {}).timeout == 9.0


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        (b"bytes", {}, "prompt"),
        (["a"], {}, "prompt"),
        (3, {}, "prompt"),
        ("", {"temperature": "hot"}, "sampling"),
        ("", {"stop": Stop(strings="END")}, "stop.strings"),
        ("", {"stop": [3]}, "stop"),
        ("", {"logprobs": 2**40}, "output"),
        ("", {"priority": 1.5}, "options"),
        ("", {"timeout": 0}, "timeout"),
        ("", {"timeout": math.nan}, "timeout"),
        ("", {"stop": Stop(max_duration=-1)}, "stop.max_duration"),
        ("", {"retain_prefix": -1.0}, "options.retain_prefix"),
    ],
)
def test_wrong_types_name_the_field(prompt: object, options: dict[str, object], field: str) -> None:
    """Protobuf's own errors never come through."""
    with pytest.raises(InvalidRequest) as caught:
        core.generate(SETTINGS, prompt, options)  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [field]


def test_wrong_messages_and_continuations() -> None:
    """The two easy slips: a dict for a message, one text for several."""
    with pytest.raises(InvalidRequest, match=r"pawl\.user"):
        core.chat(SETTINGS, [{"role": "user"}], {})  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="give a sequence"):
        core.score(SETTINGS, "a", "bc", None, {})


def test_unknown_keyword_is_a_type_error(client: Client, async_client: AsyncClient) -> None:
    """As for any Python function, with its name, before anything is sent."""
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'max_token'"):
        client.generate("", max_token=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"stream\(\).*'n'"):
        async_client.stream("", n=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"chat\(\).*'min_chunk_tokens'"):
        client.chat(min_chunk_tokens=3)  # type: ignore[call-arg]


def test_environment_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument before variable before default."""
    assert settings() == Settings(target="localhost:50051")
    monkeypatch.setenv("PAWL_TARGET", "elsewhere:1")
    monkeypatch.setenv("PAWL_API_KEY", "k")
    monkeypatch.setenv("PAWL_TIMEOUT", "7.5")
    assert settings() == Settings(target="elsewhere:1", api_key="k", timeout=7.5)
    assert settings("here:2", api_key="", timeout=1.0, retries=4) == Settings(
        target="here:2", api_key="", timeout=1.0, retry=Retry(retries=4)
    )


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan"])
def test_bad_timeout_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with the value."""
    monkeypatch.setenv("PAWL_TIMEOUT", value)
    with pytest.raises(InvalidRequest, match=f"PAWL_TIMEOUT is '{value}'"):
        settings()


def test_targets_and_tls() -> None:
    """A scheme chooses encryption; a file is a certificate authority."""
    assert settings("grpcs://host:443") == Settings(target="host:443", tls=TLS())
    assert settings("grpc://host:1/") == Settings(target="host:1")
    assert settings("dns:///name:1").target == "dns:///name:1"
    assert settings("h:1", tls=True).tls == TLS()
    assert settings("h:1", tls=False).tls is None
    assert settings("h:1", tls="ca.pem").tls == TLS(ca_file=Path("ca.pem"))
    with pytest.raises(InvalidRequest, match="target is empty"):
        settings(" ")
    with pytest.raises(InvalidRequest, match=r"cannot read missing\.pem"):
        open_channel(settings("h:1", tls="missing.pem"))


def test_channel_options() -> None:
    """gRPC's own retries are off; a name with several addresses is spread over."""
    options = dict(channel_options(settings("h:1")))
    assert options["grpc.enable_retries"] == 0
    assert options["grpc.min_reconnect_backoff_ms"] == 5000
    assert "grpc.service_config" not in options
    assert "round_robin" in str(dict(channel_options(settings("dns:///h:1")))["grpc.service_config"])
    assert metadata(settings("h:1", api_key="k")) == (("authorization", "Bearer k"),)
    assert metadata(settings("h:1")) == ()


def test_open_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond this machine and without TLS; the key itself is not logged."""
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/s"):
        open_channel(settings(target, api_key="secret-key")).close()
    assert not caplog.records
    open_channel(settings("far.example:1", api_key="secret-key")).close()
    assert "without encryption" in caplog.text
    open_channel(settings("far.example:1", internal_token="secret-token")).close()
    assert "the internal token goes to far.example:1 without encryption" in caplog.text
    assert "secret-" not in caplog.text


def test_an_internal_token_comes_from_what_is_given_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    assert internal_token(None) == ""
    monkeypatch.setenv("PAWL_INTERNAL_TOKEN_FILE", str(file))
    assert internal_token(None) == internal_token(file) == "of-the-file"
    monkeypatch.setenv("PAWL_INTERNAL_TOKEN", "of-the-variable")
    assert internal_token(None) == "of-the-variable"
    assert internal_token("given") == "given"
    assert internal_token("") == ""
    sent = metadata(settings("h:1", api_key="k", internal_token="given"))
    assert sent == (("authorization", "Bearer k"), ("pawl-internal-token", "given"))


def test_an_internal_token_that_cannot_be_had_is_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    monkeypatch.setenv("PAWL_INTERNAL_TOKEN_FILE", str(file))
    with pytest.raises(InvalidRequest, match="PAWL_INTERNAL_TOKEN_FILE cannot be read"):
        AdminClient("h:1")
    with pytest.raises(InvalidRequest, match="internal_token cannot be read"):
        internal_token(file)
    file.write_text("\n")
    with pytest.raises(InvalidRequest, match="is empty"):
        internal_token(file)
    file.write_text("two words")
    with pytest.raises(InvalidRequest, match="give the token alone") as caught:
        internal_token(file)
    assert "words" not in str(caught.value)
    with AdminClient("h:1", internal_token="secret-token") as admin:
        assert "secret-token" not in repr(admin)


def test_with_options() -> None:
    """Other defaults over the same connection, which only its owner closes."""
    with Client("localhost:1", default_model="m") as client:
        fast = client.with_options(timeout=5, retries=0, priority=10)
        assert fast._settings == Settings(
            target="localhost:1", timeout=5, retry=Retry(retries=0), priority=10, default_model="m"
        )
        assert client._settings.priority is None
        fast.close()
        client.stream("still open").__enter__().close()
        with pytest.raises(InvalidRequest, match="timeout"):
            client.with_options(timeout=-1)
    with pytest.raises(RuntimeError, match="closed"):
        fast.generate("x")


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"json_schema": {"type": "integer"}}, {"json_schema": '{"type": "integer"}'}),
        ({"json_schema": '{"type":"null"}'}, {"json_schema": '{"type":"null"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"choices": ["yes", "no"]}, {"choices": {"values": ["yes", "no"]}}),
        ({"sampling": Sampling(regex="a+", seed=1)}, {"regex": "a+", "seed": "1"}),
        ({"sampling": Sampling(regex="a+", seed=1), "choices": ("a",)}, {"choices": {"values": ["a"]}, "seed": "1"}),
    ],
)
def test_a_constraint_is_sent(options: GenerateOptions, sent: dict[str, object]) -> None:
    """As keyword or in `sampling`; the call's own wins over one of another kind in `sampling`."""
    assert fields(core.generate(SETTINGS, "Hi", options).request)["sampling"] == sent
    turns = core.chat(SETTINGS, [user("Hi")], ChatOptions(**options))  # type: ignore[typeddict-item]
    assert fields(turns.request)["sampling"] == sent


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"regex": "a", "choices": ["a"]}, "sampling.choices"),
        ({"sampling": Sampling(regex="a", grammar="b")}, "sampling.grammar"),
        ({"choices": "yes"}, "sampling.choices"),
        ({"choices": [1]}, "sampling.choices"),
        ({"json_schema": {"a": {1, 2}}}, "sampling.json_schema"),
        ({"json_schema": {"const": math.inf}}, "sampling.json_schema"),
        ({"regex": 3}, "sampling"),
    ],
)
def test_a_constraint_that_cannot_be_sent(options: GenerateOptions, field: str) -> None:
    """Refused before anything is sent, naming the field."""
    with pytest.raises(InvalidRequest) as caught:
        core.generate(SETTINGS, "Hi", options)
    assert [violation.field for violation in caught.value.violations] == [field]
