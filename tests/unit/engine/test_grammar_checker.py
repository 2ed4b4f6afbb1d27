"""The process in which grammars are tried: it may die, and costs one grammar when it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pawl_server.engine.grammar.checker import GrammarChecker
from pawl_server.engine.grammar.constraint import Constraint, bad_constraint

GOOD = Constraint("regex", "[ab]{3}")
DEEP = Constraint(
    "grammar", "start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "b"\n' for i in range(2400)) + 'r2400: "c"\n'
)
SLOW = Constraint(
    "json_schema", '{"type":"object","properties":{' + ",".join(f'"p{i}":{{}}' for i in range(20_000)) + "}}"
)


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(timeout_s=20.0)
    yield checker
    await checker.close()


async def test_a_grammar_that_kills_the_process_is_refused_and_the_next_one_is_checked(checker: GrammarChecker) -> None:
    assert await checker.check(GOOD) is None
    first = checker.process_id
    refused = await checker.check(DEEP)
    assert refused is not None
    assert refused.reason == "CONSTRAINT_TOO_COMPLEX"
    assert refused.violations[0].field == "sampling.grammar"
    assert await checker.check(GOOD) is None
    assert checker.process_id not in (first, None)


async def test_a_grammar_that_takes_too_long_is_given_up() -> None:
    impatient = GrammarChecker(timeout_s=0.02)
    try:
        refused = await impatient.check(SLOW)
        assert refused is not None
        assert refused.reason == "CONSTRAINT_TOO_COMPLEX"
        assert "0.02 s" in refused.message
        assert impatient.process_id is None
    finally:
        await impatient.close()


async def test_a_check_that_is_given_up_does_not_answer_the_next_one(checker: GrammarChecker) -> None:
    assert await checker.check(GOOD) is None
    given_up = asyncio.create_task(checker.check(Constraint("regex", "a(")))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    assert await checker.check(GOOD) is None
    refused = await checker.check(Constraint("regex", "b("))
    assert refused is not None
    assert "b(" in refused.message


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("regex", "a(b", "unclosed group"),
        ("regex", "(?=a)a", "look-around"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"if": {}, "then": {}}', "then"),
        ("json_schema", '{"$ref": "#/nowhere"}', "nowhere"),
        ("json_schema", '{"$ref": "#"}', "no output meets it"),
        ("json_schema", '{"format": "no-such", "type": "string"}', "no-such"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "not"),
        ("grammar", "start: nothing", "nothing"),
        ("grammar", "root ::= (", "GBNF"),
        ("grammar", "start: start", "no output meets it"),
    ],
)
async def test_the_librarys_words_reach_the_caller(checker: GrammarChecker, kind: str, source: str, said: str) -> None:
    refused = await checker.check(Constraint(kind, source))
    assert refused is not None
    assert refused.reason == "BAD_CONSTRAINT"
    assert said in refused.message
    assert [violation.field for violation in refused.violations] == [f"sampling.{kind}"]


def test_the_librarys_words_are_cut() -> None:
    assert len(bad_constraint(GOOD, "x " * 10_000).message) < 420
