"""Stop strings in pieces against an oracle that knows the whole text."""

from __future__ import annotations

import codecs
from itertools import pairwise, product

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from pawl_server.frontend.output_text import OutputText
from pawl_server.frontend.requests import StopRules
from pawl_server.frontend.stop_strings import StopMatcher
from pawl_server.frontend.tokens import TextTokenizer
from tests.fakes.tokenizer import build_tokenizer

TOKENIZER = TextTokenizer(build_tokenizer())

# Tokens that end in the middle of a character, as those of large vocabularies do: here of a euro sign.
PARTS = [part for size in (1, 2, 3) for part in product(b"a\xe2\x82\xac", repeat=size)]

# Few letters, so that strings overlap, repeat and begin inside each other.
stops = st.lists(st.text(alphabet="ab\N{EURO SIGN}", min_size=1, max_size=5), max_size=4)
texts = st.text(alphabet="ab\N{EURO SIGN}", max_size=30)


def _first_match(text: str, strings: list[str]) -> tuple[int, int] | None:
    """Start and end of the match that is complete first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        starts = [end - len(string) for string in strings if text[:end].endswith(string)]
        if starts:
            return min(starts), end
    return None


def _held(text: str, strings: list[str]) -> int:
    """Characters at the end of a text without a match that may become one."""
    return max((n for n in range(1, len(text) + 1) if any(_begins(s, text[-n:]) for s in strings)), default=0)


def _begins(string: str, part: str) -> bool:
    return string.startswith(part) and len(part) < len(string)


def _parts_tokenizer() -> TextTokenizer:
    alphabet = {ord("a"): "a", 0xE2: "\u00e2", 0x82: "\u0124", 0xAC: "\u00ac"}  # as byte-level BPE writes them
    vocabulary = {"".join(alphabet[byte] for byte in part): number for number, part in enumerate(PARTS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return TextTokenizer(tokenizer)


@given(texts, stops, st.booleans(), st.lists(st.integers(0, 30), max_size=12))
@example("aab", ["aab", "ab", "b"], False, [1, 2])
@example("aaab", ["aab"], True, [1, 2, 3])
def test_the_result_is_that_of_the_whole_text(text: str, strings: list[str], include: bool, cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    matcher = StopMatcher(strings, include)
    shown = ""
    for start, end in pairwise(borders):
        shown += matcher.push(text[start:end])
        match = _first_match(text[:end], strings)
        if match is not None:
            assert matcher.matched == text[match[0] : match[1]]
            assert shown == text[: match[1] if include else match[0]]
            assert matcher.flush() == ""
            return
        assert matcher.matched is None
        # Not a character more is held back than may become a match.
        held = _held(text[:end], strings)
        assert shown == text[: end - held]
        assert held <= max(map(len, strings), default=1) - 1
    assert shown + matcher.flush() == text


def _rules(strings: list[str], least: int = 0, *, include: bool) -> StopRules:
    return StopRules(None, least, tuple(strings), (), include, ignore_eos=False, max_duration_s=1.0)


@given(texts, stops, st.booleans(), st.integers(0, 6))
def test_tokens_end_at_the_same_place(text: str, strings: list[str], include: bool, least: int) -> None:
    output = OutputText(TOKENIZER.detokenizer(skip_special_tokens=True), _rules(strings, least, include=include))
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    shown = ""
    for token_id in token_ids:
        shown += output.push(token_id)
        if output.stop_string is not None:
            break
    else:
        shown += output.flush()
    # Matching begins with the text of the first token after the minimum: a character counts where it is complete.
    first = len(TOKENIZER.decode(token_ids[:least], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}"))
    match = _first_match(text[first:], strings)
    if match is None:
        assert (shown, output.stop_string) == (text, None)
        return
    start, end = match
    assert output.stop_string == text[first:][start:end]
    assert shown == text[: first + (end if include else start)]
    # No token after the one that completed the match was looked at.
    whole = TOKENIZER.decode(token_ids[: output.num_tokens], skip_special_tokens=True)
    assert len(whole.rstrip("\N{REPLACEMENT CHARACTER}")) >= first + end
    before = TOKENIZER.decode(token_ids[: output.num_tokens - 1], skip_special_tokens=True)
    assert len(before.rstrip("\N{REPLACEMENT CHARACTER}")) < first + end


@given(
    st.lists(st.integers(0, len(PARTS) - 1), max_size=8),
    st.lists(st.text(alphabet="a\N{EURO SIGN}\N{REPLACEMENT CHARACTER}", min_size=1, max_size=3), max_size=3),
    st.booleans(),
)
@example([PARTS.index((*b"a\xe2",))], ["a"], False)
def test_nothing_follows_a_match_in_a_token_that_begins_a_character(
    token_ids: list[int], strings: list[str], include: bool
) -> None:
    output = OutputText(_parts_tokenizer().detokenizer(skip_special_tokens=True), _rules(strings, include=include))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = text = ""
    match = None
    for token_id in token_ids:
        shown += output.push(token_id)
        text += decoder.decode(bytes(PARTS[token_id]))
        match = _first_match(text, strings)
        assert (output.stop_string is not None) == (match is not None)
        if match is not None:
            break
    shown += output.flush()
    if match is None:
        text += decoder.decode(b"", final=True)
        match = _first_match(text, strings)
    end = len(text) if match is None else match[1 if include else 0]
    assert shown == text[:end]
