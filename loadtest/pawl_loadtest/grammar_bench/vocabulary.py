"""The vocabularies that masks are made for: the embedded model's, and a made-up one as large as is common."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from pawl_server.frontend.tokens import TextTokenizer
from pawl_workers.model.source import resolve_checkpoint

__all__ = ["Vocabulary", "embedded_vocabulary", "synthetic_vocabulary"]


class Vocabulary:
    """The bytes of each token, the id of the end of text, and `tokenizer.json` if there is one."""

    def __init__(self, tokens: Sequence[bytes], eos_id: int, tokenizer_json: str = "") -> None:
        self.tokens, self.eos_id, self.tokenizer_json = tokens, eos_id, tokenizer_json
        self._tokenizer = Tokenizer.from_str(tokenizer_json) if tokenizer_json else None
        self._ids = {token: i for i, token in enumerate(tokens) if token and i != eos_id}
        self._longest = max(map(len, self._ids))

    def cut(self, text: str) -> list[int]:
        """The tokens of a text; without a tokenizer always the longest that fits."""
        if self._tokenizer is not None:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        data, cut, at = text.encode(), list[int](), 0
        while at < len(data):
            lengths = range(min(self._longest, len(data) - at), 0, -1)
            length = next(n for n in lengths if data[at : at + n] in self._ids)
            cut.append(self._ids[data[at : at + length]])
            at += length
        return cut


def embedded_vocabulary() -> Vocabulary:
    """The embedded model's."""
    folder = resolve_checkpoint(None)
    tokenizer = TextTokenizer.load(folder)
    eos_id = json.loads((folder / "config.json").read_text())["eos_token_id"]
    tokens = [tokenizer.token_bytes[i] for i in range(tokenizer.vocab_size)]
    return Vocabulary(tokens, eos_id, (folder / "tokenizer.json").read_text())


def synthetic_vocabulary(size: int, seed: int = 7) -> Vocabulary:
    """Bytes, then made-up words, digits, punctuation and other scripts of 2 to 12 characters; the end of text last."""
    random = np.random.default_rng(seed)
    tokens = {bytes([byte]): None for byte in range(256)}
    letters = np.array(list("eetaoinshrdlucmfwygpbvkxqjz"))
    marks = np.array(list('{}[]":,. \n\t-_0123456789/()<>='))
    others = np.array(list("éüñçøабвгдежαβγδ中文字数日本語"))
    while len(tokens) < size - 1:
        alphabet = (letters, letters, letters, marks, others)[int(random.integers(5))]
        text = "".join(random.choice(alphabet, int(random.integers(2, 13 if alphabet is letters else 6))))
        if alphabet is letters and random.random() < 0.5:
            text = " " + text
        tokens[text.encode()] = None
    return Vocabulary([*tokens, b"<|end|>"], size - 1)
