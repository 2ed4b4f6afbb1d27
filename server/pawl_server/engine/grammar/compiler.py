"""The vocabulary of the model and the compiler for it. Blocks: called on a thread, for what `check` let pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from llguidance import LLTokenizer

from pawl.errors import InvalidRequest
from pawl_server.engine.grammar.constraint import CompiledConstraint, Constraint, bad_constraint
from pawl_server.engine.grammar.source import BadGrammarError, new_matcher
from pawl_workers.errors import CheckpointError
from pawl_workers.model.source import resolve_checkpoint

__all__ = ["GrammarCompiler", "OpenTokenizer", "checkpoint_tokenizer"]

OpenTokenizer = Callable[[], LLTokenizer]


def checkpoint_tokenizer(source: str, revision: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The vocabulary of a checkpoint, as the library needs it.

    Args:
        source: folder or hub id.
        revision: on the hub; empty = the default branch.
        vocab_size: ids that the model can choose.
        eos_token_ids: what ends a text.

    Raises:
        InvalidRequest: the checkpoint has no tokenizer in the fast format, or no end of text.
    """
    if not eos_token_ids:
        raise _no_vocabulary("the model has no end-of-text token")
    try:
        path = resolve_checkpoint(source, revision or None, tokenizer_only=True) / "tokenizer.json"
        return LLTokenizer(str(path), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except (CheckpointError, ValueError) as error:
        raise _no_vocabulary(str(error)) from error


def _no_vocabulary(why: str) -> InvalidRequest:
    return InvalidRequest(f"no constraint can be kept with this model: {why}", reason="NO_TOKENIZER")


class GrammarCompiler:
    """Compiles constraints for one vocabulary, which is read when the first one comes."""

    def __init__(self, open_tokenizer: OpenTokenizer) -> None:
        self._open = open_tokenizer
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def tokenizer(self) -> LLTokenizer:
        """The vocabulary, which may have to be fetched first.

        Raises:
            InvalidRequest: it cannot be had.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._open()
            return self._tokenizer

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        """Compile a constraint.

        Raises:
            InvalidRequest: it is not understood, too large, or met by no output; or the vocabulary cannot be had.
        """
        tokenizer = self.tokenizer()
        try:
            return CompiledConstraint(constraint, new_matcher(tokenizer, constraint))
        except BadGrammarError as error:
            raise bad_constraint(constraint, str(error)) from error
