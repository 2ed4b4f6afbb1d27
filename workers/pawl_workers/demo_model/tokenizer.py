"""The tokenizer of the demo model: byte-level BPE with role markers and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pawl_workers.demo_model import corpus
from pawl_workers.demo_model.words import ASSISTANT, BEGIN, END, PAD, SPECIAL_TOKENS, SYSTEM, USER

VOCABULARY_SIZE = 1024
MAX_POSITIONS = 4096

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role ' ~ message['role']) }}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|>\\n' ~ (message['content'] | trim) ~ '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
"""Writes a chat as ``corpus.chat_text`` does, after the begin token."""


def build_tokenizer() -> Tokenizer:
    """Trains the tokenizer on the words of the corpus.

    Every word is offered as it stands after a space and as it stands at the start of a text, so
    both forms become single tokens; bytes cover whatever else a user may write.

    Returns:
        The trained tokenizer, which puts the begin token in front of a text.

    Raises:
        RuntimeError: If a word of the corpus did not become a single token.
    """
    words = corpus.vocabulary()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words that only ever follow a space need no second form, but names and sentence openers
    # do, and a user may start a text with any word.
    lines = [f" {word}" for word in words] * 3 + [word for word in words if word[0].isupper()]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, SPECIAL_TOKENS.index(BEGIN))],
    )
    broken = [
        word
        for word in words
        for form in ((f" {word}", word) if word[0].isupper() else (f" {word}",))
        if word[0].isalnum() and len(tokenizer.encode(form, add_special_tokens=False)) != 1
    ]
    if broken:
        raise RuntimeError(f"{len(broken)} words are not single tokens: {broken[:20]}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into a folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": MAX_POSITIONS,
        "padding_side": "left",
        # Text must come back byte for byte, so nothing may tidy the spaces.
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
