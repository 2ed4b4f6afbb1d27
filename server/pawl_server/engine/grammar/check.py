"""`python -m pawl_server.engine.grammar.check`: tries constraints where they can do no harm.

A grammar may take the library's parser too deep for a stack, or take memory and time; a process that dies of that is
not the engine. Reads one JSON array [kind, source] a line and answers with a line, a JSON array: why it cannot be used,
or empty, and the bytes that it takes. What it lets pass is compiled again in the engine, on a larger stack.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys

from llguidance import LLMatcher, LLTokenizer

from pawl_server.engine.grammar.constraint import Constraint
from pawl_server.engine.grammar.source import BadGrammarError, error_of, new_matcher

__all__ = ["main"]

_STACK_BYTES = 2 << 20  # a quarter of what a thread of the engine has
_MEMORY_BYTES = 1 << 30
_TOKENS = 48  # of an output that are tried
_LEAST_BYTES = 32  # per character of a source; large choices and enums take 50 to 60


class _Allocated(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _num_allocated() -> int:
    """Bytes that this process has allocated and not freed; 0 where the C library does not count them."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = _Allocated
    counts = library.mallinfo2()
    return int(counts.uordblks + counts.hblkhd)


def _walk(matcher: LLMatcher) -> str:
    """Take one allowed token after the other, each time another of them; gives why that failed."""
    for number in range(_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token_id for token_id in range(256) if mask >> token_id & 1]
        if matcher.is_error() or not allowed:
            break
        matcher.consume_token(allowed[number * 7919 % len(allowed)])
    fine = not matcher.is_error() or matcher.stop_reason() in ("NoExtension", "NoExtensionBias", "EndOfSentence")
    return "" if fine else error_of(matcher)


def _try(tokenizer: LLTokenizer, line: str) -> tuple[str, int]:
    """Why a constraint cannot be used, or empty; and the bytes that it takes."""
    kind, source = json.loads(line)
    before = _num_allocated()
    try:
        matcher = new_matcher(tokenizer, Constraint(kind, source))
        problem = _walk(matcher)
    except BadGrammarError as error:
        return str(error) or "it cannot be used", 0
    return problem, max(_num_allocated() - before, _LEAST_BYTES * len(source))


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = LLTokenizer("byte")  # a vocabulary of bytes: what a grammar costs here does not depend on the model
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_try(tokenizer, line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
