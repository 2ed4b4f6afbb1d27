"""Speculation over a real socket on the embedded model: the same answers to the bit, and drafts that are accepted."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from pawl import Client, Completion, Delta, Sampling, Stop
from pawl_server.exposition import parse_exposition
from tests.fakes.servers import RunningServer, StartFailedError, pawl_serve

REPETITIVE = "red ball blue ball green ball red ball blue ball green ball red ball blue ball"
PROMPTS = [REPETITIVE, "Once upon a time", "Anna has a red ball. Anna has a red", "The fox"]
SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.9, seed=7),
    Sampling(temperature=1.0, seed=8, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.5),
    Sampling(temperature=0.0, logit_bias={40: 3.0}, presence_penalty=0.5),
]
STOPS = [Stop(max_tokens=60, ignore_eos=True), Stop(max_tokens=40), Stop(min_tokens=20, strings=[" ball"])]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, RunningServer]]:
    with contextlib.ExitStack() as stack:
        yield {
            mode: stack.enter_context(pawl_serve("--fleet=local", f"--speculation={mode}", "--check-every=1"))
            for mode in ("off", "ngram")
        }


def drafts(server: RunningServer) -> tuple[float, float]:
    """Accepted and rejected so far."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    totals = [
        parse_exposition("\n".join(line for line in text.splitlines() if f'outcome="{outcome}"' in line))
        for outcome in ("accepted", "rejected")
    ]
    accepted, rejected = (total["pawl_draft_tokens_total"] for total in totals)
    return accepted, rejected


def answers(server: RunningServer) -> list[Completion]:
    """Every prompt in every way, eight at once."""
    cases = [(prompt, sampling, stop) for prompt in PROMPTS for sampling in SAMPLINGS for stop in STOPS]
    with Client(server.target) as client, ThreadPoolExecutor(8) as pool:
        return list(
            pool.map(
                lambda case: client.generate(case[0], sampling=case[1], stop=case[2], logprobs=2, token_ids=True), cases
            )
        )


def test_answers_are_the_same_and_drafts_are_accepted(servers: dict[str, RunningServer]) -> None:
    """Tokens, texts, log-probabilities, ends; greedy and sampled, with penalties, bias and stop strings."""
    before = drafts(servers["ngram"])
    found = {mode: answers(server) for mode, server in servers.items()}
    for plain, drafted in zip(found["off"], found["ngram"], strict=True):
        assert drafted.token_ids == plain.token_ids
        assert drafted.text == plain.text
        assert drafted.logprobs == plain.logprobs
        assert (drafted.finish_reason, drafted.stop_match) == (plain.finish_reason, plain.stop_match)
        assert drafted.usage.output_tokens == plain.usage.output_tokens
    accepted, rejected = drafts(servers["ngram"])
    assert accepted > before[0]
    assert rejected > before[1]
    assert drafts(servers["off"]) == (0.0, 0.0)


def test_a_repetitive_text_takes_fewer_steps_than_tokens(servers: dict[str, RunningServer]) -> None:
    before, _ = drafts(servers["ngram"])
    with (
        Client(servers["ngram"].target) as client,
        client.stream(REPETITIVE, sampling=SAMPLINGS[0], stop=STOPS[0], token_ids=True) as stream,
    ):
        tokens = [token_id for message in stream if isinstance(message, Delta) for token_id in message.token_ids]
    after, _ = drafts(servers["ngram"])
    assert len(tokens) == 60
    assert after - before > 20


def test_structured_answers_are_the_same_and_what_a_schema_forces_is_drafted(servers: dict[str, RunningServer]) -> None:
    schema = {
        "type": "object",
        "properties": {
            "given_name": {"type": "string", "maxLength": 8},
            "family_name": {"type": "string", "maxLength": 8},
            "colours": {"type": "array", "items": {"enum": ["crimson", "turquoise"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["given_name", "family_name", "colours"],
        "additionalProperties": False,
    }

    def structured(server: RunningServer) -> list[Completion]:
        with Client(server.target) as client, ThreadPoolExecutor(4) as pool:
            schemas = pool.map(
                lambda seed: client.generate(
                    "Once upon", json_schema=schema, temperature=1.0, seed=seed, max_tokens=200, token_ids=True
                ),
                range(6),
            )
            regexes = pool.map(
                lambda seed: client.generate(
                    REPETITIVE, regex="( (red|blue|green) ball){8}", seed=seed, logprobs=1, token_ids=True
                ),
                range(3),
            )
            return [*schemas, *regexes]

    before = drafts(servers["ngram"])
    plain, drafted = structured(servers["off"]), structured(servers["ngram"])
    after = drafts(servers["ngram"])
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert [one.logprobs for one in drafted] == [one.logprobs for one in plain]
    for one in drafted[:6]:
        jsonschema.validate(json.loads(one.text), schema)
    assert after[0] - before[0] > sum(len(one.token_ids or ()) for one in drafted) / 4


def test_speculation_and_steps_that_overlap_exclude_each_other() -> None:
    with (
        pytest.raises(StartFailedError, match="set pipeline_depth to 1 or speculation to off"),
        pawl_serve("--fleet=local", "--speculation=ngram", "--pipeline-depth=2"),
    ):
        pass
