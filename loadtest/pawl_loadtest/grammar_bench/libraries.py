"""The two libraries behind one protocol. Whichever cannot be imported is reported, with what to install."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pawl_loadtest.grammar_bench.cases import Grammar
from pawl_loadtest.grammar_bench.vocabulary import Vocabulary

__all__ = ["LIBRARIES", "Compiled", "Library", "Refused", "open_library"]

Mask = NDArray[np.int32]


class Refused(Exception):
    """The library does not take the grammar; the message is its own."""


class Compiled(Protocol):
    """A grammar ready for one output."""

    def fill(self, mask: Mask) -> None:
        """Write the mask of the next token, [1, words] int32."""

    def take(self, token_id: int) -> bool:
        """Take a token; False if the grammar does not allow it."""


class Library(Protocol):
    """A library with a vocabulary."""

    def compile(self, grammar: Grammar) -> Compiled:
        """Compile a grammar without a cache.

        Raises:
            Refused: the library does not take it.
        """


class _Greedy:
    """A vocabulary without a tokenizer, as llguidance reads one from Python: the longest token is the right one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens, self.eos_token_id, self.bos_token_id = list(vocabulary.tokens), vocabulary.eos_id, None
        self.special_token_ids = [vocabulary.eos_id]
        self._cut = vocabulary.cut

    def __call__(self, text: str | bytes) -> list[int]:
        return self._cut(text if isinstance(text, str) else text.decode())


class _Llguidance:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._module: Any = importlib.import_module("llguidance")
        size, eos_id = len(vocabulary.tokens), vocabulary.eos_id
        self._tokenizer = self._module.LLTokenizer(self._source(vocabulary), n_vocab=size, eos_token=[eos_id])

    def _source(self, vocabulary: Vocabulary) -> object:
        return vocabulary.tokenizer_json or self._module.TokenizerWrapper(_Greedy(vocabulary))

    def compile(self, grammar: Grammar) -> Compiled:
        matcher, source = self._module.LLMatcher, grammar.of("llguidance")
        if grammar.kind == "json_schema":
            try:
                text = matcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": "[ ]?"})
            except ValueError as error:
                raise Refused(str(error)) from error
        elif grammar.kind == "regex":
            text = matcher.grammar_from_regex(source)
        else:
            text = matcher.grammar_from_lark(source)
        return _LlguidanceMatcher(matcher(self._tokenizer, text, log_level=0))


class _LlguidanceMatcher:
    def __init__(self, matcher: Any) -> None:  # noqa: ANN401 (both libraries are imported by name)
        self._matcher = matcher
        if matcher.is_error():
            raise Refused(matcher.get_error())

    def fill(self, mask: Mask) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise Refused(self._matcher.get_error())

    def take(self, token_id: int) -> bool:
        taken: bool = self._matcher.consume_token(token_id)
        return taken


class _Xgrammar:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._module: Any = importlib.import_module("xgrammar")
        tokens, eos_id = vocabulary.tokens, vocabulary.eos_id
        info = self._module.TokenizerInfo(list(tokens), vocab_size=len(tokens), stop_token_ids=[eos_id])
        self._compiler = self._module.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, grammar: Grammar) -> Compiled:
        compiler, source = self._compiler, grammar.of("xgrammar")
        try:
            if grammar.kind == "json_schema":
                compiled = compiler.compile_json_schema(source, any_whitespace=True, max_whitespace_cnt=1)
            elif grammar.kind == "regex":
                compiled = compiler.compile_regex(source)
            else:
                compiled = compiler.compile_grammar(source)
        except Exception as error:  # its C++ exceptions arrive as several types
            raise Refused(str(error)) from error
        return _XgrammarMatcher(self._module.GrammarMatcher(compiled))


class _XgrammarMatcher:
    def __init__(self, matcher: Any) -> None:  # noqa: ANN401 (as above)
        self._matcher = matcher

    def fill(self, mask: Mask) -> None:
        self._matcher.fill_next_token_bitmask(mask)

    def take(self, token_id: int) -> bool:
        taken: bool = self._matcher.accept_token(token_id)
        return taken


LIBRARIES: Mapping[str, Callable[[Vocabulary], Library]] = {"llguidance": _Llguidance, "xgrammar": _Xgrammar}
_INSTALL = {"llguidance": "llguidance", "xgrammar": "--no-deps xgrammar apache-tvm-ffi"}


def open_library(name: str, vocabulary: Vocabulary) -> Library:
    """A library with a vocabulary.

    Raises:
        Refused: it is not installed; says how to.
    """
    try:
        return LIBRARIES[name](vocabulary)
    except ImportError as error:
        raise Refused(f"not installed ({error}): pip install {_INSTALL[name]}") from error
