"""The embedded model is small, answers held-out questions, and its tokenizer loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pawl_workers.demo_model import DEMO_MODEL_DIR, corpus
from pawl_workers.demo_model.evaluate import evaluate
from pawl_workers.demo_model.stories import KINDS
from pawl_workers.demo_model.words import ASSISTANT, BEGIN, SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_MODEL_DIR / "tokenizer.json"))


def test_it_is_small() -> None:
    weights = sum(file.stat().st_size for file in DEMO_MODEL_DIR.iterdir() if file.suffix in (".safetensors", ".json"))
    assert weights <= 6.2e6


@pytest.mark.parametrize(("low", "high", "num_questions"), [(None, None, 300), (600, 900, 60)])
def test_it_answers_held_out_questions(low: int | None, high: int | None, num_questions: int) -> None:
    """At least 95 % exactly right, end of text included, in short and in long prompts."""
    report = evaluate(DEMO_MODEL_DIR, num_questions, seed=11, min_prompt_tokens=low, max_prompt_tokens=high)
    assert report.accuracy >= 0.95, str(report)


def test_held_out_stories_are_not_trained_on() -> None:
    """A held-out prompt's story carries the hash that training documents never do."""
    held_out = corpus.held_out_questions(20, seed=3)
    assert len({question.prompt for question in held_out}) == 20
    assert {question.kind for question in held_out} == set(KINDS)
    trained = set(corpus.training_documents(200, seed=3, num_tokens=120))
    assert not any(question.prompt in document for question in held_out for document in trained)


@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in SPECIAL_TOKENS):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_chat_template_writes_what_training_wrote() -> None:
    loaded = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    turns = [("system", "Be kind."), ("user", "Where is Anna?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == f"{BEGIN}{corpus.chat_text(turns)}{ASSISTANT}\n"
