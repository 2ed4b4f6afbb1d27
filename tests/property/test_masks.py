"""Masks among chunks, preemptions, resets, aborts and two steps in flight: each output is that of the sequence alone.

Every emitted token lies in the mask that a matcher of its own gives after the tokens before it, and what ends with the
end of text is matched as a whole by Python's `re`, which knows nothing of the library.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import replace

import jsonschema
import numpy as np
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits

from pawl_server.engine.grammar.constraint import CompiledConstraint, Constraint
from pawl_server.engine.grammar.source import BadGrammarError, new_matcher
from pawl_server.scheduler.endings import EndReason
from tests.fakes.masked_bench import EOS_ID, constrained, decode, masked_bench, replay, vocabulary

MAX_OUTPUT = 24
MOST_TOKENS = 20_000  # of a walk through a schema: arrays of arrays of four, with spaces wherever they may stand

_atoms = st.sampled_from(["a", "b", "the", "[a-f]", "[0-9]", " ", r"\.", "[^a-z ]", "é", "\U0001f600", "(?:yes|no)"])


def _combined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    bounds = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda pair: (min(pair), max(pair)))
    return st.one_of(
        st.tuples(parts, parts).map(lambda pair: pair[0] + pair[1]),
        st.tuples(parts, parts).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(parts, bounds).map(lambda found: f"(?:{found[0]}){{{found[1][0]},{found[1][1]}}}"),
        st.tuples(parts, st.sampled_from("*+?")).map(lambda found: f"(?:{found[0]}){found[1]}"),
    )


regexes = st.recursive(_atoms, _combined, max_leaves=6)
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@functools.lru_cache(maxsize=4096)
def alone(prompt: tuple[int, ...], regex: str | None) -> list[int]:
    """What the sequence gives with nobody beside it."""
    with masked_bench(1) as bench:
        bench.submit(constrained(0, prompt, None if regex is None else Constraint("regex", regex), MAX_OUTPUT))
        bench.run()
        return bench.output[0]


def _check(regex: str, output: Sequence[int], reason: EndReason | None) -> None:
    if reason is EndReason.EOS:
        assert output[-1] == EOS_ID
        assert re.fullmatch(regex, decode(output[:-1]), re.DOTALL), (regex, decode(output))
        output = output[:-1]
        assert replay(Constraint("regex", regex), output).is_accepting()
    else:
        replay(Constraint("regex", regex), output)


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(
    asked=st.lists(st.tuples(st.integers(1, 14), st.one_of(st.none(), regexes)), min_size=1, max_size=6),
    depth=st.sampled_from([1, 2]),
    num_blocks=st.integers(18, 40),
    max_drafts=st.sampled_from([0, 0, 1, 4]),
    events=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["reset", "abort"])), max_size=3),
)
@example(
    asked=[(3, "(ab)*"), (9, "[a-f]{1,9}"), (5, None)], depth=2, num_blocks=18, max_drafts=0, events=[(4, "reset")]
)
@example(asked=[(3, "(ab)*"), (9, "(the ){3}[a-f]{1,9}"), (5, None)], depth=1, num_blocks=18, max_drafts=4, events=[])
def test_outputs_are_those_of_sequences_alone(
    asked: list[tuple[int, str | None]], depth: int, num_blocks: int, max_drafts: int, events: list[tuple[int, str]]
) -> None:
    """With drafts and without."""
    prompts = [tuple(range(10 * number + 6, 10 * number + 6 + length)) for number, (length, _) in enumerate(asked)]
    with masked_bench(depth, num_blocks=num_blocks, max_running=4, max_drafts=max_drafts) as bench:
        for number, (prompt, (_, regex)) in enumerate(zip(prompts, asked, strict=True)):
            constraint = None if regex is None else Constraint("regex", regex)
            bench.submit(constrained(number, prompt, constraint, MAX_OUTPUT))
        at = dict(events)
        for count in range(4000):
            if at.get(count) == "reset":
                bench.lose_worker()
            elif at.get(count) == "abort":
                bench.abort(0)
            if not bench.step():
                break
        for number, (prompt, (_, regex)) in enumerate(zip(prompts, asked, strict=True)):
            output, reason = bench.output[number], bench.ended[number].reason
            expected = alone(prompt, regex)
            assert output == (expected[: len(output)] if reason is EndReason.ABORTED else expected)
            assert reason is not EndReason.FAILED
            if regex is not None:
                _check(regex, output, reason)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(length=st.integers(1, 9), regex=regexes, cut=st.integers(0, MAX_OUTPUT - 1), depth=st.sampled_from([1, 2]))
def test_another_engine_goes_on_where_the_first_stopped(length: int, regex: str, cut: int, depth: int) -> None:
    """`resume_ids` take the matcher to where it was: the output goes on as if nothing had been."""
    prompt = tuple(range(6, 6 + length))
    expected = alone(prompt, regex)
    resume = [token_id for token_id in expected[:cut] if token_id != EOS_ID]
    assume(len(resume) < len(expected))
    with masked_bench(depth) as bench:
        bench.submit(constrained(0, prompt, Constraint("regex", regex), MAX_OUTPUT, resume))
        bench.run()
        assert bench.output[0] == expected


def test_forced_tokens_are_drafts_that_are_never_wrong() -> None:
    """What a grammar leaves no choice about is accepted whatever the worker draws; and much of it is drafted."""
    with masked_bench(1, max_drafts=4) as bench:
        for number in range(3):
            regex = Constraint("regex", "once upon a time there [a-z]{2} in the beginning of it")
            bench.submit(constrained(number, (7, 8, 9 + number), regex, 60))
        bench.run()
        for number in range(3):
            assert bench.ended[number].reason is EndReason.EOS
            assert decode(bench.output[number][:-1]).startswith("once upon a time there ")
        assert bench.num_drafts == bench.num_accepted > 30


def test_a_draft_that_does_not_fit_is_not_taken_and_masks_after_it_do_not_count() -> None:
    """The n-grams of an output that says one word again and again, where the constraint ends it."""
    outputs = []
    for max_drafts in (0, 4):
        with masked_bench(1, max_drafts=max_drafts) as bench:
            bench.submit(constrained(0, (7, 8, 9), Constraint("regex", "(ab|ac){6}x"), 40))
            bench.submit(constrained(1, (7, 8, 10), Constraint("regex", "(a|b){20}"), 40))
            bench.run()
            outputs.append(bench.output)
            assert max_drafts == 0 or bench.num_drafts > bench.num_accepted > 0
    assert outputs[0] == outputs[1]


def test_looking_ahead_takes_nobody_further_than_he_comes_without() -> None:
    """A grammar that is too much for its limits some tokens ahead: the row fails where it fails without drafts."""
    grammar = 'start: "b"* "a" x\nx: "c" x "c" | "c" x "d" | "c" x | x x | "e"'
    found = []
    for max_drafts in (0, 1, 4):
        with masked_bench(1, max_drafts=max_drafts) as bench:
            for number, most_items in enumerate((40, 100, 300)):
                limits = LLParserLimits(step_max_items=most_items)
                matcher = LLMatcher(vocabulary(), LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
                request = constrained(number, (7, 8, 9), None, 40)
                constraint = CompiledConstraint(Constraint("grammar", grammar), matcher)
                bench.submit(replace(request, constraint=constraint))
            bench.run()
            ends = {handle: (ended.reason, ended.detail) for handle, ended in bench.ended.items()}
            found.append((bench.output, ends))
            assert max_drafts == 0 or bench.num_drafts > 0
    assert found[0] == found[1] == found[2]
    assert any(reason is EndReason.FAILED for reason, _ in found[0][1].values())


def _schemas() -> st.SearchStrategy[dict[str, object]]:
    bounds = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda pair: (min(pair), max(pair)))
    strings = bounds.map(lambda b: {"type": "string", "minLength": b[0], "maxLength": b[1]})
    integers = st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    )
    leaves = st.one_of(
        strings,
        integers,
        st.just({"type": "boolean"}),
        st.just({"type": ["null", "boolean"]}),
        st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=3), st.none()), min_size=1, max_size=3).map(
            lambda values: {"enum": values}
        ),
        st.sampled_from([{"type": "string", "pattern": "^[a-c]{1,3}$"}, {"const": {"a": [1]}}]),
    )

    def deeper(parts: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
        arrays = st.tuples(parts, bounds).map(
            lambda found: {"type": "array", "items": found[0], "minItems": found[1][0], "maxItems": found[1][1]}
        )
        names = st.lists(st.sampled_from(["a", "b", 'c "quoted"', "é"]), unique=True, max_size=3)
        objects = st.tuples(names, st.lists(parts, min_size=3, max_size=3), st.integers(0, 3)).map(
            lambda found: {
                "type": "object",
                "properties": dict(zip(found[0], found[1], strict=False)),
                "required": found[0][: found[2]],
                "additionalProperties": False,
            }
        )
        either = st.lists(parts, min_size=1, max_size=3).map(lambda found: {"anyOf": found})
        return st.one_of(arrays, objects, either)

    return st.recursive(leaves, deeper, max_leaves=5)


def _nested(schema: dict[str, object], *bounds: tuple[int, int]) -> dict[str, object]:
    """Arrays of arrays, the innermost first."""
    for least, most in bounds:
        schema = {"type": "array", "items": schema, "minItems": least, "maxItems": most}
    return schema


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(schema=_schemas(), seed=st.integers(0, 2**32 - 1))
@example(schema={"type": "integer", "x-guidance": {"whitespace_pattern": ".*", "lenient": True}}, seed=1)
@example(schema=_nested({"const": {"a": [1]}}, (3, 4), (2, 4), (0, 2)), seed=3)  # long, and yet it ends
def test_whatever_is_chosen_inside_the_masks_fits_the_schema(schema: dict[str, object], seed: int) -> None:
    """Any walk through the masks to the end of text is JSON that `jsonschema` finds valid."""
    try:
        matcher = new_matcher(vocabulary(), Constraint("json_schema", json.dumps(schema)))
    except BadGrammarError:
        assume(False)
        raise
    random, chosen = np.random.default_rng(seed), list[int]()
    for _ in range(MOST_TOKENS):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        assert len(allowed), "nothing is left to choose"
        token_id = int(EOS_ID if EOS_ID in allowed and random.random() < 0.5 else random.choice(allowed))
        assert matcher.consume_token(token_id)
        if token_id == EOS_ID:
            jsonschema.validate(json.loads(decode(chosen)), schema, jsonschema.Draft202012Validator)
            return
        chosen.append(token_id)
    raise AssertionError(f"no end in sight: {decode(chosen)!r}")
