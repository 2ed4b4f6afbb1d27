"""The benchmark of grammar libraries: what it asks of one, it asks rightly."""

from __future__ import annotations

import numpy as np
import pytest

from pawl_loadtest.grammar_bench.cases import FEATURES, Feature, Grammar
from pawl_loadtest.grammar_bench.libraries import Refused, open_library
from pawl_loadtest.grammar_bench.probe import features
from pawl_loadtest.grammar_bench.vocabulary import embedded_vocabulary, synthetic_vocabulary

# What a caller is told that is not kept (the contract names them).
REFUSED = {
    "uniqueItems", "contains", "propertyNames", "not", "if, then, else", "dependentRequired", "regex look-ahead",
    "regex word border", "regex back-reference",
}  # fmt: skip


def test_the_library_keeps_or_refuses_every_feature() -> None:
    vocabulary = embedded_vocabulary()
    library = open_library("llguidance", vocabulary)
    answers = {str(answer["case"]): str(answer["answer"]) for answer in features(library, vocabulary)}
    assert len(answers) == len(FEATURES)
    assert {case for case, answer in answers.items() if answer.startswith("refused")} == REFUSED
    assert {answer for case, answer in answers.items() if case not in REFUSED} == {"yes"}


def test_a_feature_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = embedded_vocabulary()
    lie = Feature(Grammar("lie", "regex", "a|b"), ("a",), ("b",))
    monkeypatch.setattr("pawl_loadtest.grammar_bench.probe.FEATURES", (lie,))
    (answer,) = features(open_library("llguidance", vocabulary), vocabulary)
    assert answer["answer"] == "wrong: accepts b"


def test_the_synthetic_vocabulary_is_what_it_says() -> None:
    vocabulary = synthetic_vocabulary(2000)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == 2000
    assert vocabulary.tokens == synthetic_vocabulary(2000).tokens
    text = 'a "text", 1.5 é'
    assert b"".join(vocabulary.tokens[i] for i in vocabulary.cut(text)) == text.encode()
    compiled = open_library("llguidance", vocabulary).compile(Grammar("one", "regex", "x"))
    mask = np.zeros((1, -(-2000 // 32)), dtype=np.int32)
    compiled.fill(mask)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == [ord("x")]


def test_a_library_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("No module named 'xgrammar'")

    monkeypatch.setattr("pawl_loadtest.grammar_bench.libraries.importlib.import_module", missing)
    with pytest.raises(Refused, match="pip install --no-deps xgrammar"):
        open_library("xgrammar", embedded_vocabulary())
