"""The tokenizer of the served model: text to ids and back, with the bytes of every token.

Owns the `tokenizers` object, turns off its truncation and padding, so that nothing is cut silently, and makes errors
of its panics; knows nothing of templates or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tokenizers import Tokenizer

from pawl.errors import InvalidRequest
from pawl_server.frontend.detokenize import Detokenizer, TokenBytes, new_detokenizer

__all__ = ["PlacedToken", "TextTokenizer"]


_MOST_IDS = (1 << 31) - 1  # an int32 on the wire


class _Refusing:
    """Makes an InvalidRequest of what tokenizers raises: a plain Exception, or a panic, which is none.

    A class, and made once where every token comes by: a generator would cost a token more than its text does.
    """

    __slots__ = ("_reason", "_what")

    def __init__(self, what: str, reason: str) -> None:
        self._what, self._reason = what, reason

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # The class of a Rust panic has no module to import it from; it derives from BaseException.
        if isinstance(error, Exception) or (kind is not None and kind.__name__ == "PanicException"):
            raise InvalidRequest(f"{self._what}: {error}", reason=self._reason) from error


_ENCODING = _Refusing("the model's tokenizer cannot encode the text", "TOKENIZER_REFUSED")
_DECODING = _Refusing("the model's tokenizer cannot decode the tokens", "TOKENIZER_REFUSED")


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token and the bytes [start, end) of the text that it covers; a special token that was added covers none."""

    token_id: int
    token_bytes: bytes
    start: int
    end: int
    special: bool


class TextTokenizer:
    """Text to tokens and back.

    Attributes:
        vocab_size: one more than the highest id of the tokenizer; the model's head may have more rows.
        token_bytes: bytes by id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read `tokenizer.json` of a checkpoint.

        Raises:
            InvalidRequest: there is none, or it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            text = (
                f"{folder} has no tokenizer.json: save the tokenizer in the fast format (transformers save_pretrained)"
            )
            raise InvalidRequest(text, reason="NO_TOKENIZER")
        with _Refusing(f"cannot read {path}", "NO_TOKENIZER"):
            loaded = cls(Tokenizer.from_file(str(path)))
        if loaded.vocab_size > _MOST_IDS:
            text = f"{path}: token ids go up to {loaded.vocab_size - 1}, more than 32 bits hold"
            raise InvalidRequest(text, reason="NO_TOKENIZER")
        return loaded

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Releases the interpreter lock; long texts belong on a thread.

        Raises:
            InvalidRequest: the tokenizer has no tokens for it, or is broken.
        """
        with _ENCODING:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_placed(self, text: str, *, add_special_tokens: bool) -> list[PlacedToken]:
        """Tokens of a text with their bytes and places.

        Raises:
            InvalidRequest: as of `encode`.
        """
        with _ENCODING:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        byte_at = [0]
        for character in text:
            byte_at.append(byte_at[-1] + len(character.encode()))
        special = self.token_bytes.special_ids
        return [
            PlacedToken(token_id, self.token_bytes[token_id], byte_at[start], byte_at[end], token_id in special)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of a whole sequence, as the tokenizer's own decoder has it.

        Raises:
            InvalidRequest: the tokenizer has no text for them, or is broken.
        """
        with _DECODING:
            text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A new detokenizer for one output that continues a prompt. It raises what `decode` raises."""
        return new_detokenizer(self.decode, self.token_bytes, skip_special_tokens)
