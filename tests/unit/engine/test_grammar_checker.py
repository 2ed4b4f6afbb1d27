"""The process in which grammars are tried: it may die, and costs one grammar when it does."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pawl.errors import InvalidRequest, Unavailable
from pawl_server.engine.grammar.checker import CHECK_COMMAND, GrammarChecker
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
    checker = GrammarChecker(timeout_s=20.0, most_bytes=1 << 30)
    yield checker
    await checker.close()


async def refusal(checker: GrammarChecker, constraint: Constraint) -> InvalidRequest:
    """Why a constraint cannot be used."""
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(constraint)
    return caught.value


async def test_a_grammar_that_kills_the_process_is_refused_and_the_next_one_is_checked(checker: GrammarChecker) -> None:
    await checker.check(GOOD)
    first = checker.process_id
    refused = await refusal(checker, DEEP)
    assert refused.reason == "CONSTRAINT_TOO_COMPLEX"
    assert refused.violations[0].field == "sampling.grammar"
    await checker.check(GOOD)
    assert checker.process_id not in (first, None)


async def test_a_grammar_that_takes_too_long_is_given_up() -> None:
    impatient = GrammarChecker(timeout_s=0.02, most_bytes=1 << 30)
    try:
        refused = await refusal(impatient, SLOW)
        assert refused.reason == "CONSTRAINT_TOO_COMPLEX"
        assert "0.02 s" in refused.message
        assert impatient.process_id is None
    finally:
        await impatient.close()


async def test_a_check_that_is_given_up_does_not_answer_the_next_one(checker: GrammarChecker) -> None:
    await checker.check(GOOD)
    given_up = asyncio.create_task(checker.check(Constraint("regex", "a(")))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    await checker.check(GOOD)
    refused = await refusal(checker, Constraint("regex", "b("))
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
    refused = await refusal(checker, Constraint(kind, source))
    assert refused.reason == "BAD_CONSTRAINT"
    assert said in refused.message
    assert [violation.field for violation in refused.violations] == [f"sampling.{kind}"]


async def test_what_a_grammar_takes_is_counted_and_bounded() -> None:
    """1,500 choices take nearly 2 MB, a short regex some 30 kB."""
    values = [f"choice {number}" for number in range(1500)]
    choices = Constraint("choices", json.dumps(values))
    checker = GrammarChecker(timeout_s=20.0, most_bytes=1 << 20)
    try:
        assert 0 < await checker.check(GOOD) < 1 << 18
        refused = await refusal(checker, choices)
        assert refused.reason == "CONSTRAINT_TOO_COMPLEX"
        assert "max_grammar_bytes" in refused.message
        assert 0 < await checker.check(GOOD) < 1 << 18
    finally:
        await checker.close()


def test_the_librarys_words_are_cut() -> None:
    assert len(bad_constraint(GOOD, "x " * 10_000).message) < 420


@pytest.mark.parametrize(
    ("command", "said", "logged"),
    [
        ((sys.executable, "-c", "raise SystemExit('no memory for it')"), "ended with code 1", "no memory for it"),
        ((sys.executable, "-c", "print('[1'); input()"), "Expecting", ""),
        ((sys.executable, "-c", "input(); input()"), "did not answer in 0.2 s", ""),
        (("/nowhere/python",), "No such file", ""),
    ],
)
async def test_a_checker_that_does_not_start_is_no_grammars_fault(
    command: tuple[str, ...], said: str, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Said so with a status that means the server, and why in the log, once."""
    checker = GrammarChecker(20.0, 1 << 30, command, start_timeout_s=0.2 if "0.2 s" in said else 60.0)
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            await checker.check(GOOD)
        assert caught.value.reason == "GRAMMAR_CHECKER_FAILED"
        assert said in caught.value.message
        assert checker.process_id is None
    # asyncio has a warning of its own for a process that ends just as it is killed.
    (record,) = [one for one in caplog.records if one.name == "pawl_server.engine.grammar.checker"]
    assert said in record.getMessage()
    assert logged in record.getMessage()


async def test_a_checker_that_did_not_start_is_started_for_the_next_one(tmp_path: Path) -> None:
    there = tmp_path / "there"
    script = f"import os, sys; os.path.exists({str(there)!r}) and os.execv(sys.executable, {list(CHECK_COMMAND)!r})"
    checker = GrammarChecker(20.0, 1 << 30, (sys.executable, "-c", script))
    try:
        with pytest.raises(Unavailable):
            await checker.check(GOOD)
        there.touch()
        assert await checker.check(GOOD) > 0
    finally:
        await checker.close()
