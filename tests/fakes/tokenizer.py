"""A small byte-level tokenizer with a chat template, as checkpoint files: every byte is a token, a few words too."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["BEGIN", "CHAT_TEMPLATE", "CONTEXT", "END", "EOS_ID", "VOCAB_SIZE", "build_tokenizer", "write_checkpoint"]

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIALS = (BEGIN, END, USER, ASSISTANT)
BEGIN_ID, EOS_ID = 0, 1
CONTEXT = 256
WORDS = ("hello", "Ġworld", "Ġstop")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {{- raise_exception('no tools here') }}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}
{%- endfor %}
{%- if mood is defined %}({{ mood }}){% endif %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""


def build_tokenizer() -> Tokenizer:
    """Specials 0 to 3, then the 256 bytes, then the words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate((*SPECIALS, *alphabet))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merge = (word[: end - 1], word[end - 1])
            if merge not in merges:
                merges.append(merge)
            vocabulary.setdefault(word[:end], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


VOCAB_SIZE = build_tokenizer().get_vocab_size(with_added_tokens=True)


def write_checkpoint(folder: Path, *, generation_config: dict[str, object] | None = None) -> Path:
    """Write what a front end reads of a checkpoint; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BEGIN, "eos_token": {"content": END}, "chat_template": CHAT_TEMPLATE}
    config = {"architectures": ["ToyForCausalLM"], "max_position_embeddings": CONTEXT, "vocab_size": VOCAB_SIZE}
    defaults = generation_config or {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "do_sample": True}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("config.json", config),
        ("generation_config.json", defaults),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
