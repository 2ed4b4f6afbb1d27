"""Structured output over a real socket on the embedded model: what ends with STOP fits, and nobody else is hurt."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from pawl import Client, Completion, FinishReason, InvalidRequest, SampleEnd, Stop
from tests.fakes.servers import RunningServer, pawl_serve

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "leaf": {"type": "object", "properties": {"size": {"type": "number", "minimum": -5, "maximum": 5}},
                 "required": ["size"], "additionalProperties": False},
    },
    "type": "array",
    "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "boolean"}]},
    "minItems": 1,
    "maxItems": 3,
}  # fmt: skip
WORDS = {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 2, "maxItems": 4}
SCHEMAS: list[dict[str, Any]] = [PERSON, TREE, WORDS]
REGEXES = [r"[a-z]{3,10} \d{2}", r"(yes|no|perhaps)!?", r"([0-9a-f]{2}:){3}[0-9a-f]{2}", r"[A-Z]\w{0,12}\."]
PROMPTS = ["Once upon a time", "The fox", "A list of things:"]


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with pawl_serve("--fleet=local", f"--pipeline-depth={request.param}", "--check-every=1") as running:
        yield running


def _check(completion: Completion, schema: dict[str, Any]) -> None:
    assert completion.finish_reason is FinishReason.STOP
    assert completion.stop_match is not None
    assert completion.stop_match.eos_token_id is not None
    jsonschema.validate(json.loads(completion.text), schema)


def _many(client: Client, count: int) -> None:
    """So many answers at temperature 1, eight at a time, all valid."""

    def one(seed: int) -> tuple[Completion, dict[str, Any]]:
        schema = SCHEMAS[seed % len(SCHEMAS)]
        prompt = PROMPTS[seed % len(PROMPTS)]
        return client.generate(prompt, json_schema=schema, temperature=1.0, seed=seed, max_tokens=300), schema

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(count)))
    for completion, schema in answers:
        _check(completion, schema)
    assert len({completion.text for completion, _ in answers}) > count // 2  # it is the model that writes


def test_json_fits_its_schema(server: RunningServer) -> None:
    with Client(server.target) as client:
        _many(client, 24)


@pytest.mark.slow
def test_200_of_200_fit_their_schema(server: RunningServer) -> None:
    with Client(server.target) as client:
        _many(client, 200)


def test_regexes_match_as_a_whole(server: RunningServer) -> None:
    with Client(server.target) as client:
        for seed, regex in enumerate(REGEXES * 2):
            answer = client.generate(PROMPTS[seed % 3], regex=regex, temperature=1.0, seed=seed, max_tokens=100)
            assert answer.finish_reason is FinishReason.STOP
            assert re.fullmatch(regex, answer.text), (regex, answer.text)


def test_choices_and_grammars(server: RunningServer) -> None:
    choices = ["red", "blue", "blue green", 'a "quoted" one\n', "\u4e2d\u6587"]
    grammar = 'start: sum\nsum: term ("+" term)*\nterm: /[0-9]{1,2}/ | "(" term ")"\n'
    with Client(server.target) as client:
        seen = {client.generate("Pick:", choices=choices, temperature=1.0, seed=seed).text for seed in range(12)}
        assert seen <= set(choices)
        assert len(seen) > 1
        for seed in range(4):
            options = {"temperature": 1.0, "seed": seed, "max_tokens": 40}
            answer = client.generate("Sum:", grammar=grammar, **options)  # type: ignore[arg-type]
            assert re.fullmatch(r"[0-9()+]+", answer.text)
            if answer.finish_reason is FinishReason.STOP:
                assert re.fullmatch(r"\(*[0-9]{1,2}\)*(\+\(*[0-9]{1,2}\)*)*", answer.text)
                assert answer.text.count("(") == answer.text.count(")")
        gbnf = client.generate("x", grammar='root ::= "a" root "b" | "c"', temperature=1.0, max_tokens=40)
        assert re.fullmatch(r"a*(cb*)?", gbnf.text)


def test_a_stream_and_a_chat_fit_too(server: RunningServer) -> None:
    with Client(server.target) as client:
        with client.stream("Pick:", choices=["yes", "no"], temperature=1.0, seed=5) as stream:
            events = list(stream)
            text = stream.final().text
        assert text in ("yes", "no")
        ends = [event for event in events if isinstance(event, SampleEnd)]
        assert [end.finish_reason for end in ends] == [FinishReason.STOP]
        said = client.chat().send("Hello", json_schema=WORDS, temperature=1.0, seed=3, max_tokens=300)
        jsonschema.validate(json.loads(said.text), WORDS)


def test_the_same_seed_gives_the_same_alone_and_among_others(server: RunningServer) -> None:
    def one(client: Client, seed: int) -> str:
        return client.generate("The fox", json_schema=PERSON, temperature=1.0, seed=seed, max_tokens=300).text

    with Client(server.target) as client:
        alone = one(client, 11)
        with ThreadPoolExecutor(6) as pool:
            free = [pool.submit(client.generate, "A b c", max_tokens=60, seed=seed) for seed in range(3)]
            bound = [pool.submit(one, client, seed) for seed in (11, 12, 13)]
            assert bound[0].result() == alone
            assert all(future.result().text for future in free)


def test_every_sample_of_a_request_fits(server: RunningServer) -> None:
    """Each has a matcher of its own; the first is what a request for one gives."""
    with Client(server.target) as client:
        one = client.generate("The fox", json_schema=PERSON, temperature=1.0, seed=9, max_tokens=300)
        many = client.generate("The fox", json_schema=PERSON, temperature=1.0, seed=9, max_tokens=300, sample_count=4)
        assert [sample.finish_reason for sample in many.samples] == [FinishReason.STOP] * 4
        for sample in many.samples:
            jsonschema.validate(json.loads(sample.text), PERSON)
        assert many.samples[0].text == one.text
        assert len({sample.text for sample in many.samples}) > 1


def test_too_few_tokens_cut_it_and_say_so(server: RunningServer) -> None:
    with Client(server.target) as client:
        cut = client.generate("The fox", json_schema=PERSON, max_tokens=4, temperature=1.0, seed=2)
        assert cut.finish_reason is FinishReason.MAX_TOKENS
        assert cut.text.startswith("{")


def test_min_tokens_bias_and_penalties_stay_inside(server: RunningServer) -> None:
    with Client(server.target) as client:
        free = client.generate("x", regex="(ab){0,30}", temperature=0.0)
        longer = client.generate("x", regex="(ab){0,30}", temperature=0.0, stop=Stop(min_tokens=20))
        assert re.fullmatch("(ab){0,30}", longer.text)
        assert longer.usage.output_tokens > 20 >= free.usage.output_tokens
        # Nothing but the end can follow: it comes although more tokens were asked for.
        short = client.generate("x", regex="abc", stop=Stop(min_tokens=20))
        assert (short.text, short.finish_reason) == ("abc", FinishReason.STOP)
        ids = client.tokenize("q").token_ids
        biased = client.generate(
            "x", regex="[abc]{8}", temperature=1.0, seed=4, repetition_penalty=1.5, logit_bias=dict.fromkeys(ids, 100.0)
        )
        assert re.fullmatch("[abc]{8}", biased.text)


@pytest.mark.parametrize(
    ("options", "field", "said"),
    [
        ({"regex": "a(b"}, "sampling.regex", "unclosed group"),
        ({"regex": r"(a)\1"}, "sampling.regex", "backreferences"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "sampling.json_schema", "uniqueItems"),
        ({"json_schema": {"type": "objet"}}, "sampling.json_schema", "objet"),
        ({"json_schema": {"$ref": "#"}}, "sampling.json_schema", "no output meets it"),
        ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "sampling.json_schema", "maxLength"),
        ({"grammar": 'start: "a" missing'}, "sampling.grammar", "missing"),
        ({"grammar": "root ::= ("}, "sampling.grammar", ""),
    ],
)
def test_a_bad_constraint_fails_alone(server: RunningServer, options: dict[str, Any], field: str, said: str) -> None:
    """INVALID_ARGUMENT that names the field, in the library's words; requests beside it never notice."""
    with Client(server.target) as client, ThreadPoolExecutor(3) as pool:
        beside = [pool.submit(client.generate, "The fox", max_tokens=30, temperature=0.0) for _ in range(2)]
        with pytest.raises(InvalidRequest) as caught:
            client.generate("The fox", **options)
        assert [violation.field for violation in caught.value.violations] == [field]
        assert said in str(caught.value)
        assert len(str(caught.value)) < 600
        texts = {future.result().text for future in beside}
        assert len(texts) == 1


_RULES = "".join(f'r{i}: "a" r{i + 1} | "b"\n' for i in range(2400))
HOSTILE: dict[str, dict[str, Any]] = {
    "deep rules": {"grammar": f'start: r0\n{_RULES}r2400: "c"'},
    "nested repetition": {"regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
    "exponential states": {"regex": "(a|b)*a(a|b){400}c"},
    "optional properties": {"json_schema": {"type": "object", "properties": {f"p{i}": {} for i in range(3500)}}},
    "long alternation": {"choices": [f"{i * 7919 % 256:03d}" + "ab" * 100 for i in range(256)]},
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a" | ""\n'},
    "nesting": {"json_schema": json.loads('{"items":' * 120 + "{}" + "}" * 120)},
    "unbounded": {"regex": r"(\p{L}+\d*)*x{1,1000}"},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_costs_only_itself(server: RunningServer, name: str) -> None:
    """Refused, or served within its tokens; streams beside it get theirs, and the engine is the same one after it."""
    options = HOSTILE[name]
    before = [process.pid for process in server.engines()]
    with Client(server.target) as client, ThreadPoolExecutor(2) as pool:
        beside = pool.submit(client.generate, "The fox", max_tokens=40, temperature=0.0)
        with contextlib.suppress(InvalidRequest):
            client.generate("The fox", max_tokens=8, temperature=1.0, seed=1, timeout=60.0, **options)
        assert beside.result().usage.output_tokens > 0
    assert [process.pid for process in server.engines()] == before
