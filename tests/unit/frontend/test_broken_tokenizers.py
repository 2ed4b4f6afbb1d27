"""A checkpoint's tokenizer that cannot be read, or breaks over a text: an error of the request, never a panic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pawl.errors import InvalidRequest
from pawl_server.frontend.tokens import TextTokenizer
from tests.fakes.tokenizer import write_checkpoint

Settings = dict[str, object]


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Settings], TextTokenizer]:
    """Load the toy tokenizer with some of its settings changed."""

    def changed(settings: Settings) -> TextTokenizer:
        path = write_checkpoint(tmp_path) / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return TextTokenizer.load(tmp_path)

    return changed


@pytest.mark.parametrize(
    "settings",
    [
        {"model": 3},
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a panic
        {"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}},
    ],
    ids=["no model", "an id that is none", "a panic", "an id beyond 32 bits"],
)
def test_what_cannot_be_read_is_refused_by_its_path(
    settings: Settings, load: Callable[[Settings], TextTokenizer]
) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json: ") as refused:
        load(settings)
    assert refused.value.reason == "NO_TOKENIZER"


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "no"}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "y"}},  # a panic
    ],
    ids=["no unknown word", "no unknown piece", "a panic"],
)
def test_a_text_without_tokens_is_refused(settings: Settings, load: Callable[[Settings], TextTokenizer]) -> None:
    tokenizer = load(settings)
    for encode in (tokenizer.encode, tokenizer.encode_placed):
        with pytest.raises(InvalidRequest, match="the model's tokenizer cannot encode the text: ") as refused:
            encode("hello \u00e9", add_special_tokens=True)
        assert refused.value.reason == "TOKENIZER_REFUSED"
