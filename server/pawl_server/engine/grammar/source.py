"""How each kind of constraint is put to llguidance (docs/decisions/0012), and within which limits."""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from pawl_server.engine.grammar.constraint import Constraint

__all__ = ["BadGrammarError", "error_of", "new_matcher"]

# The schema's own `x-guidance` must not change what the caller is promised: one space at most between tokens, so that
# nothing can be filled with spaces, and no keyword passed over.
_JSON: dict[str, str | bool | None] = {
    "whitespace_flexible": False,
    "whitespace_pattern": "[ ]?",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}


_NOTHING = "NoExtensionBias"


class BadGrammarError(Exception):
    """A constraint is not understood, too large, or met by no output; the message is mostly the library's."""


def _limits() -> LLParserLimits:
    """Tens of milliseconds for a lexer and for a token, some tens of MiB for a grammar (1 to 2 KiB a lexer state)."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def new_matcher(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """Compile a constraint, and see that some output meets it.

    Raises:
        BadGrammarError: it is not understood, too large, or met by no output.
    """
    try:
        grammar = _grammar(constraint)
    except ValueError as error:
        raise BadGrammarError(str(error)) from error
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    first = matcher.deep_copy()
    nothing = not matcher.is_error() and not any(first.compute_bitmask())
    if nothing or _NOTHING in (error_of(matcher), error_of(first)):
        raise BadGrammarError("no output meets it")
    for tried in (matcher, first):
        if tried.is_error():
            raise BadGrammarError(error_of(tried))
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, in the library's words without its own state."""
    return matcher.get_error().partition("<")[0].strip() or matcher.stop_reason()


def _grammar(constraint: Constraint) -> str:
    """The constraint as llguidance takes it.

    Raises:
        ValueError: it cannot be read.
    """
    if constraint.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(constraint.source, overrides=_JSON)  # type: ignore[arg-type]
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.source)
    if constraint.kind == "choices":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(constraint.source))))
    return grammar_from("grammar", constraint.source)
