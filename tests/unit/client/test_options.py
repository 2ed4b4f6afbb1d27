"""Keywords: what is sent for what a caller wrote."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from google.protobuf import json_format, message

from pawl import (
    AsyncClient,
    ChatOptions,
    Client,
    GenerateOptions,
    InvalidRequest,
    Sampling,
    Stop,
    user,
)
from pawl import _core as core
from pawl._options import Settings

SETTINGS = Settings(target="localhost:1")


def fields(request: message.Message) -> dict[str, object]:
    """A message as plain data."""
    return dict(json_format.MessageToDict(request, preserving_proto_field_name=True))


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
