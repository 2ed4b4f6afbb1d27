"""What is measured of one library, in a process of its own: a line of JSON per question."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil

from pawl_loadtest.grammar_bench.cases import FEATURES, HOSTILE, SPEED, Feature, Grammar
from pawl_loadtest.grammar_bench.libraries import Compiled, Library, Refused, open_library
from pawl_loadtest.grammar_bench.vocabulary import Vocabulary, embedded_vocabulary, synthetic_vocabulary

__all__ = ["Answer", "main"]

Answer = dict[str, str | float]
ROUNDS = 5
HOSTILE_TOKENS = 40
_MEMORY_BYTES = 4 << 30


def _mask(vocabulary: Vocabulary) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.zeros((1, -(-len(vocabulary.tokens) // 32)), dtype=np.int32)


def _allows(mask: np.ndarray[tuple[int, ...], np.dtype[np.int32]], token_id: int) -> bool:
    return bool(mask[0, token_id // 32] >> (token_id % 32) & 1)


def speed(library: Library, vocabulary: Vocabulary) -> Iterator[Answer]:
    """Compile time, and the time of each token's mask along a text that fits."""
    for grammar, text in SPEED:
        compiles, masks, steps = [], list[float](), list[float]()
        for _ in range(ROUNDS):
            started = time.perf_counter()
            compiled = library.compile(grammar)
            compiles.append(time.perf_counter() - started)
            mask = _mask(vocabulary)
            for token_id in vocabulary.cut(text):
                started = time.perf_counter()
                compiled.fill(mask)
                masks.append(time.perf_counter() - started)
                if not _allows(mask, token_id):
                    raise ValueError(f"{grammar.name}: token {vocabulary.tokens[token_id]!r} of {text} is not allowed")
                started = time.perf_counter()
                compiled.take(token_id)
                steps.append(time.perf_counter() - started)
        masks.sort()
        yield {
            "case": grammar.name,
            "compile_ms": statistics.median(compiles) * 1e3,
            "first_compile_ms": compiles[0] * 1e3,
            "mask_us": statistics.median(masks) * 1e6,
            "mask_p99_us": masks[int(len(masks) * 0.99)] * 1e6,
            "mask_max_us": masks[-1] * 1e6,
            "take_us": statistics.median(steps) * 1e6,
        }


def _accepts(compiled: Compiled, ids: Sequence[int], vocabulary: Vocabulary) -> bool:
    mask = _mask(vocabulary)
    for token_id in ids:
        compiled.fill(mask)
        if not _allows(mask, token_id) or not compiled.take(token_id):
            return False
    compiled.fill(mask)
    return _allows(mask, vocabulary.eos_id)


def _understands(library: Library, feature: Feature, vocabulary: Vocabulary) -> str:
    wrong = []
    for good, texts in ((True, feature.good), (False, feature.bad)):
        for text in texts:
            try:
                if _accepts(library.compile(feature.grammar), vocabulary.cut(text), vocabulary) is not good:
                    wrong.append(f"{'refuses' if good else 'accepts'} {text}")
            except Refused as error:
                return f"refused: {' '.join(str(error).split())[:100]}"
    return "wrong: " + "; ".join(wrong) if wrong else "yes"


def features(library: Library, vocabulary: Vocabulary) -> Iterator[Answer]:
    """Which features do what they mean; "refused" is honest, "wrong" is not."""
    for feature in FEATURES:
        yield {"case": feature.grammar.name, "answer": _understands(library, feature, vocabulary)}


def hostile(library: Library, grammar: Grammar, vocabulary: Vocabulary) -> Answer:
    """Time and memory of a grammar meant to hurt, and of a few masks with it."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    before = psutil.Process().memory_info().rss
    started, slowest, outcome = time.perf_counter(), 0.0, "taken"
    compiled_s = 0.0
    try:
        compiled = library.compile(grammar)
        compiled_s = time.perf_counter() - started
        mask = _mask(vocabulary)
        for _ in range(HOSTILE_TOKENS):
            at = time.perf_counter()
            compiled.fill(mask)
            slowest = max(slowest, time.perf_counter() - at)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(vocabulary.tokens)])
            allowed = allowed[allowed != vocabulary.eos_id]
            if not len(allowed):
                outcome = "taken, ends"
                break
            at = time.perf_counter()
            compiled.take(int(allowed[len(allowed) // 2]))
            slowest = max(slowest, time.perf_counter() - at)
    except Refused as error:
        compiled_s = compiled_s or time.perf_counter() - started
        outcome = f"refused: {' '.join(str(error).split())[:60]}"
    grown = psutil.Process().memory_info().rss - before
    return {
        "case": grammar.name,
        "compile_s": compiled_s,
        "slowest_s": slowest,
        "grown_mib": grown / 2**20,
        "outcome": outcome,
    }


def _count_beside(work: Callable[[], object] | None, seconds: float) -> float:
    """How often another thread gets to count while `work` runs again and again, per second."""
    stop, counted = threading.Event(), 0

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        if work is None:
            time.sleep(seconds - elapsed)
        else:
            work()
    stop.set()
    thread.join()
    return counted / (time.perf_counter() - started)


def interpreter_lock(library: Library) -> Answer:
    """How much another Python thread gets done while grammars are compiled, against while nothing runs."""
    grammar = next(grammar for grammar, _ in SPEED if grammar.name == "wide")
    alone = _count_beside(None, 0.5)
    return {"case": "compile", "share": _count_beside(lambda: library.compile(grammar), 1.0) / alone}


def main(arguments: Sequence[str]) -> None:
    """Answer one question about one library; see `pawl_loadtest.grammar_bench.__main__`."""
    name, question, size, *rest = arguments
    vocabulary = embedded_vocabulary() if size == "embedded" else synthetic_vocabulary(int(size))
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    try:
        library = open_library(name, vocabulary)
    except Refused as error:
        sys.stdout.write(json.dumps({"unavailable": str(error)}) + "\n")
        return
    opened_s = time.perf_counter() - started
    answers: list[Answer] = []
    if question == "speed":
        answers = list(speed(library, vocabulary))
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        answers.append({"case": "process", "open_s": opened_s, "grown_mib": grown})
    elif question == "features":
        answers = list(features(library, vocabulary))
    elif question == "lock":
        answers = [interpreter_lock(library)]
    else:
        answers = [hostile(library, HOSTILE[int(rest[0])], vocabulary)]
    for answer in answers:
        sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
