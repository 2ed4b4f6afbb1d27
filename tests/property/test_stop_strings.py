"""Stop strings in pieces against an oracle that knows the whole text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from pawl_server.frontend.output_text import OutputText
from pawl_server.frontend.requests import StopRules
from pawl_server.frontend.stop_strings import StopMatcher
from pawl_server.frontend.tokens import TextTokenizer
from tests.fakes.tokenizer import build_tokenizer

TOKENIZER = TextTokenizer(build_tokenizer())

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


@given(texts, stops, st.booleans(), st.integers(0, 6))
def test_tokens_end_at_the_same_place(text: str, strings: list[str], include: bool, least: int) -> None:
    rules = StopRules(None, least, tuple(strings), (), include, ignore_eos=False, max_duration_s=1.0)
    output = OutputText(TOKENIZER.detokenizer(skip_special_tokens=True), rules)
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
