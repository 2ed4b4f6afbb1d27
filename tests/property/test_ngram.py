"""The n-gram index against a scan of the sequence."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pawl_server.scheduler.ngram import NgramIndex


def scan(tokens: list[int], most: int, longest: int, shortest: int) -> list[int]:
    """What followed the last occurrence of the longest n-gram that ends the sequence; repeated past the end."""
    length = len(tokens)
    for size in range(min(longest, length - 1), shortest - 1, -1):
        for begin in range(length - 1, size - 1, -1):
            if tokens[begin - size : begin] == tokens[length - size :]:
                follows = list(tokens)
                for place in range(most):
                    follows.append(follows[begin + place])
                return follows[length:]
    return []


def _parts(token_ids: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(token_ids, min_size=1, max_size=60), min_size=1, max_size=12)


SIZES = st.integers(1, 3), st.integers(0, 2), st.integers(1, 9)


@settings(max_examples=200)
@given(_parts(st.sampled_from([0, 17, 34])), *SIZES)
@example([[17, 0, 34, *[0] * 30, 17, 0]], 2, 2, 1)  # at once, and its first tokens again
def test_it_proposes_what_a_scan_finds(parts: list[list[int]], shortest: int, more: int, most: int) -> None:
    """In pieces of any length, of three tokens of which no two n-grams of up to five share an entry."""
    index, tokens = NgramIndex(shortest + more, shortest), array("i")
    for part in parts:
        tokens.extend(part)
        guess = index.propose(tokens, most)
        assert not guess.token_ids or shortest <= guess.evidence <= shortest + more
        assert guess.token_ids == scan(tokens.tolist(), most, shortest + more, shortest)


@settings(max_examples=200)
@given(_parts(st.integers(0, 5)), *SIZES)
@example([[0, 1, 0, 3, 5, 2, 0, 1, 0]], 3, 0, 1)
def test_where_n_grams_share_an_entry_what_is_proposed_followed_one(
    parts: list[list[int]], shortest: int, more: int, most: int
) -> None:
    """The later one has the entry: for the other a shorter one, or nothing, is found."""
    index, tokens = NgramIndex(shortest + more, shortest), array("i")
    for part in parts:
        tokens.extend(part)
        found = index.propose(tokens, most).token_ids
        assert not found or found in tails(tokens.tolist(), most, shortest)


def tails(tokens: list[int], most: int, shortest: int) -> list[list[int]]:
    """All continuations that the shortest n-gram at the end had before."""
    length, found = len(tokens), []
    for begin in range(shortest, length):
        if tokens[begin - shortest : begin] == tokens[length - shortest :]:
            follows = list(tokens)
            for place in range(most):
                follows.append(follows[begin + place])
            found.append(follows[length:])
    return found


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_long_sequence_takes_bounded_memory_and_is_still_followed(step: int) -> None:
    """A text that comes again after 3,000 other tokens, in a sequence of 100,000."""
    index = NgramIndex()
    tokens = array("i", [(place * place) % 7919 for place in range(97_000)])
    text = [8000 + place for place in range(50)]
    tokens.extend([*text, *((place * 31) % 6007 for place in range(3_000))])
    index.propose(tokens, 4)
    for begin in range(0, 40, step):
        tokens.extend(text[begin : min(begin + step, 40)])
        if begin + step >= 4:
            at = min(begin + step, 40)
            assert index.propose(tokens, 4).token_ids == text[at : at + 4]
    assert index.num_entries <= 3 << 14


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="of 3 to 2 tokens"):
        NgramIndex(2, 3)
    assert NgramIndex().propose(array("i", [1]), 3).token_ids == []
