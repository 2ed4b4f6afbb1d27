"""Token ids to text, one token at a time, in whole UTF-8 characters: never half a character, never a repeat.

Owns what each vocabulary makes of a token: bytes (byte-level BPE), text with byte tokens (byte fallback), or
whatever the tokenizer's own decoder says of a window of tokens. Knows nothing of streams or stop strings.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

__all__ = ["ByteDetokenizer", "Detokenizer", "TokenBytes", "WindowDetokenizer", "new_detokenizer"]

_WINDOW = 6  # tokens of context that the decoder of a window sees before the new ones
_MAX_PENDING = 16  # tokens that may wait for a character to become whole; more than any character has bytes


class Detokenizer(Protocol):
    """The text of one output. The pieces joined are the text of all tokens."""

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain, often a token's worth."""

    def flush(self) -> str:
        """No token follows: the rest, bytes of an unfinished character as U+FFFD."""


class Decode(Protocol):
    """A whole sequence to text."""

    def __call__(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Decode it."""


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for each byte (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # an added token with a character outside the alphabet stands for itself
        return token.encode()


def _byte_fallback(replacements: Sequence[tuple[str, str]]) -> Callable[[str], bytes]:
    def convert(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.encode()

    return convert


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The decoder of a tokenizer as `tokenizer.json` has it, a sequence as its steps."""
    if tokenizer.decoder is None:
        return []
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _converter(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """How a token becomes bytes, and whether joining those bytes is what the tokenizer's decoder does."""
    steps = _decoder_steps(tokenizer)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, True
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        patterns = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
        if all(old for old, _ in patterns):
            return _byte_fallback(patterns), True
    if "Metaspace" in kinds:
        return _byte_fallback([(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]), False
    return str.encode, False


class TokenBytes:
    """The bytes of every token of a vocabulary, looked up once each.

    Attributes:
        exact: whether an output's text is the UTF-8 reading of its tokens' bytes joined.
        special_ids: ids of special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.exact: bool
        self._convert, self.exact = _converter(tokenizer)
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of a token; empty for an id that the tokenizer does not have (padding rows of the head)."""
        found = self._known.get(token_id)
        if found is None:
            token = self._tokenizer.id_to_token(token_id)
            found = b"" if token is None else self._convert(token)
            self._known[token_id] = found
        return found


class ByteDetokenizer:
    """For vocabularies whose text is the bytes of the tokens, joined.

    Bytes that are not UTF-8 become U+FFFD, one per maximal part of a character (Unicode 15, table 3-8). A run
    of byte-fallback tokens is read the same way, where `tokenizers` would replace every byte of a run that has
    one wrong byte: a stream cannot take back what it has sent. The leading space is kept, since an output
    continues a prompt.
    """

    __slots__ = ("_decoder", "_hidden", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes, skip_special_tokens: bool) -> None:
        self._token_bytes = token_bytes
        self._hidden = token_bytes.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        return "" if token_id in self._hidden else self._decoder.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: what the tokenizer's decoder says of a window, less what it said before.

    The window begins a few tokens before the last text that was sent, so that what a decoder does at the start
    of a text (dropping a space) happens outside of it.
    """

    __slots__ = ("_decode", "_hidden", "_ids", "_shown", "_skip", "_start")

    def __init__(self, decode: Decode, special_ids: frozenset[int], skip_special_tokens: bool) -> None:
        self._decode = decode
        self._skip = skip_special_tokens
        self._hidden = special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []
        self._start = 0  # first token of the window
        self._shown = 0  # tokens whose text was returned

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        before, now = self._texts()
        waits = now.endswith("\N{REPLACEMENT CHARACTER}") and len(self._ids) - self._shown < _MAX_PENDING
        if waits or not now.startswith(before):
            return ""
        return self._advance(now[len(before) :])

    def flush(self) -> str:
        """See Detokenizer."""
        if self._shown == len(self._ids):
            return ""
        before, now = self._texts()
        common = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), len(before))
        return self._advance(now[common:])

    def _texts(self) -> tuple[str, str]:
        window = self._ids[self._start :]
        shown = window[: self._shown - self._start]
        return (
            self._decode(shown, skip_special_tokens=self._skip),
            self._decode(window, skip_special_tokens=self._skip),
        )

    def _advance(self, text: str) -> str:
        self._shown = len(self._ids)
        excess = self._shown - _WINDOW
        if excess > 256:  # forget what no window reaches any more
            del self._ids[:excess]
            self._shown -= excess
        self._start = max(0, self._shown - _WINDOW)
        return text


def new_detokenizer(decode: Decode, token_bytes: TokenBytes, skip_special_tokens: bool) -> Detokenizer:
    """The detokenizer that fits the vocabulary, for one output."""
    if token_bytes.exact:
        return ByteDetokenizer(token_bytes, skip_special_tokens)
    return WindowDetokenizer(decode, token_bytes.special_ids, skip_special_tokens)
