"""Detokenizing one token at a time against decoding the whole sequence at once."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from pawl_server.frontend.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer
from pawl_server.frontend.tokens import TextTokenizer
from tests.fakes.tokenizer import VOCAB_SIZE, build_tokenizer

BYTE_LEVEL = TextTokenizer(build_tokenizer())
EURO = BYTE_LEVEL.encode("\N{EURO SIGN}", add_special_tokens=False)
FACE = BYTE_LEVEL.encode("\N{GRINNING FACE}", add_special_tokens=False)
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def _metaspace() -> TextTokenizer:
    """Words with a marked leading space: its decoder looks at where a text begins."""
    words = [f"{space}{word}" for space in ("", "\u2581") for word in ("a", "bc", "the", ",", "\N{EURO SIGN}")]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Metaspace()
    return TextTokenizer(tokenizer)


def _byte_fallback() -> TextTokenizer:
    """Characters, and every byte as a token of its own."""
    words = ["\u2581", *"abc", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return TextTokenizer(tokenizer)


def _fused_bytes() -> TextTokenizer:
    """Byte-level with a decoder that is not known to be the bytes alone."""
    tokenizer = build_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return TextTokenizer(tokenizer)


METASPACE, BYTE_FALLBACK, FUSED_BYTES = _metaspace(), _byte_fallback(), _fused_bytes()


def _pieces(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


# Random ids make few whole characters of several bytes: some are mixed in, cut or not.
runs = st.one_of(
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
    st.sampled_from([EURO, FACE, EURO[:2], FACE[:3], FACE[1:]]),
)
byte_ids = st.lists(runs, max_size=8).map(lambda parts: [token_id for part in parts for token_id in part])


@given(byte_ids, st.booleans())
@example([*FACE[:3], 0, FACE[3]], True)
@example([*FACE[:3], *EURO], False)
def test_byte_level_pieces_join_to_the_whole(token_ids: list[int], skip: bool) -> None:
    detokenizer = BYTE_LEVEL.detokenizer(skip_special_tokens=skip)
    assert isinstance(detokenizer, ByteDetokenizer)
    pieces = _pieces(detokenizer, token_ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)


@given(st.text(max_size=40))
def test_valid_text_never_shows_half_a_character(text: str) -> None:
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    *pieces, rest = _pieces(BYTE_LEVEL.detokenizer(skip_special_tokens=False), token_ids)
    assert "".join(pieces) == text
    assert rest == ""
    num_seen = num_shown = 0
    for token_id, piece in zip(token_ids, pieces, strict=True):
        num_seen += len(BYTE_LEVEL.token_bytes[token_id])
        num_shown += len(piece.encode())
        assert UNFINISHED in text or UNFINISHED not in piece
        # What is certain is shown at once: less than one character is missing.
        assert 0 <= num_seen - num_shown < 4


@given(st.lists(st.integers(0, 9), max_size=60))
def test_window_pieces_join_to_the_whole(token_ids: list[int]) -> None:
    detokenizer = METASPACE.detokenizer(skip_special_tokens=True)
    assert isinstance(detokenizer, WindowDetokenizer)
    assert "".join(_pieces(detokenizer, token_ids)) == METASPACE.decode(token_ids, skip_special_tokens=True)


@given(st.text(alphabet="ab \N{EURO SIGN}\N{GRINNING FACE}", max_size=30))
def test_a_window_waits_for_whole_characters(text: str) -> None:
    detokenizer = FUSED_BYTES.detokenizer(skip_special_tokens=True)
    assert isinstance(detokenizer, WindowDetokenizer)
    pieces = _pieces(detokenizer, FUSED_BYTES.encode(text, add_special_tokens=False))
    assert not any(UNFINISHED in piece for piece in pieces)
    assert "".join(pieces) == text


def test_a_long_window_forgets_and_stays_right() -> None:
    token_ids = [n * 7 % 10 for n in range(2000)]
    detokenizer = METASPACE.detokenizer(skip_special_tokens=True)
    assert "".join(_pieces(detokenizer, token_ids)) == METASPACE.decode(token_ids, skip_special_tokens=True)
    assert isinstance(detokenizer, WindowDetokenizer)
    assert len(detokenizer._ids) < 600


@given(st.text(alphabet="abc \N{EURO SIGN}\N{GRINNING FACE}", max_size=30))
def test_byte_fallback_pieces_join_to_the_text(text: str) -> None:
    token_ids: list[int] = []
    for character in text:
        known = BYTE_FALLBACK._tokenizer.token_to_id(character.replace(" ", "\u2581"))
        token_ids += [known] if known is not None else [4 + byte for byte in character.encode()]
    detokenizer = BYTE_FALLBACK.detokenizer(skip_special_tokens=True)
    assert isinstance(detokenizer, ByteDetokenizer)
    assert "".join(_pieces(detokenizer, token_ids)) == text
