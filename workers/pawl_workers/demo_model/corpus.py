"""The synthetic corpus of the demo model: documents that tell a story and ask about it.

The words are few and every one is a single token, and names, places and things are drawn
afresh for each story. A model can therefore not learn an answer by heart: it has to find it in
the prompt, which is what makes the trained model a good oracle for a serving engine. If a
cached key is lost, masked or read at a wrong position, the answer names the wrong thing.

Held-out stories differ from the training stories in two ways: their random seeds come from
another range, and a hash of their facts falls into a part of the hash space (one tenth) that
training never uses.

This module and those it stands on are plain Python: they import neither torch nor transformers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pawl_workers.demo_model.stories import KINDS, story
from pawl_workers.demo_model.words import (
    BEGIN,
    COLOURS,
    END,
    FILLER_ADJECTIVES,
    FILLER_ENDINGS,
    FILLER_FIXED,
    FILLER_SUBJECTS,
    FRUITS,
    NAMES,
    NUMBERS,
    OBJECTS,
    PLACES,
    SMALL_TALK,
    SPECIAL_TOKENS,
    STORY_REQUESTS,
    SYSTEM_PROMPTS,
)

_REPEATED = (*NAMES, *PLACES, *OBJECTS, *COLOURS, *NUMBERS, *FRUITS, *FRUITS.values())


@dataclass(frozen=True, slots=True)
class HeldOutQuestion:
    """A question about a story that no training document tells.

    Attributes:
        prompt: The text form, which ends with ``Answer:``; the begin token is not part of it.
        messages: The chat form of the same question, for ``apply_chat_template``.
        answer: The text that the model must generate, apart from surrounding white space.
        kind: One of ``KINDS``.
        depth: Where in the story the deciding sentence stands: 0 at its start, 1 at its end.
        num_prompt_tokens: The length of ``prompt`` in tokens, as ``count_tokens`` has it.
    """

    prompt: str
    messages: tuple[dict[str, str], ...]
    answer: str
    kind: str
    depth: float
    num_prompt_tokens: int


_TOKEN = re.compile(r"<\|\w+\|>|\w+|[^\w\s]|\n")


def count_tokens(text: str) -> int:
    """Counts the tokens of a text of this corpus without a tokenizer.

    Every word, punctuation mark, newline and special token is one token, so the count is exact
    for texts made here and a lower bound for others.

    Args:
        text: The text to measure, without the begin token that the tokenizer adds.

    Returns:
        The number of tokens.
    """
    return len(_TOKEN.findall(text))


def vocabulary() -> list[str]:
    """Lists every word and mark of the corpus, for training the tokenizer."""
    words: set[str] = set()
    for seed in range(400):
        words.update(_TOKEN.findall(document(random.Random(seed), 12, 6)))
    for group in (NAMES, PLACES, OBJECTS, COLOURS, FRUITS, FRUITS.values(), NUMBERS):
        words.update(group)
    texts = [text for prompts, reply in SMALL_TALK for text in (*prompts, reply)]
    texts += [*STORY_REQUESTS, *SYSTEM_PROMPTS, *FILLER_FIXED, *FILLER_ENDINGS]
    texts += [*FILLER_SUBJECTS, *FILLER_ADJECTIVES]
    for text in texts:
        words.update(_TOKEN.findall(text))
    return sorted(word for word in words if word not in SPECIAL_TOKENS and word != "\n")


def document(rng: random.Random, num_facts: int, num_filler: int, repeat_share: float = 0.1) -> str:
    """Makes one training document, special tokens included.

    Most documents tell one story and ask several questions about it, as plain text or as a
    chat; a few are stories without a question or small talk.

    Args:
        rng: The source of every choice.
        num_facts: How many facts the story tells.
        num_filler: How many idle sentences it has.
        repeat_share: Which share of the documents asks to repeat some words instead.

    Returns:
        The document. Its story is never one of the held-out ones.
    """
    begin = BEGIN if rng.random() < 0.9 else ""
    if rng.random() < repeat_share:
        return begin + _repeat_task(rng, num_facts)
    choice = rng.random()
    if choice < 0.015:
        return begin + _small_talk(rng)
    made = story(rng, num_facts, num_filler)
    while made.held_out:
        made = story(rng, num_facts, num_filler)
    if choice < 0.05:
        return f"{begin}{_with_opening(rng, made.text)} The end.{END}"
    if choice < 0.065:
        reply = f"{_with_opening(rng, made.text)} The end."
        return begin + chat_text([("user", rng.choice(STORY_REQUESTS)), ("assistant", reply)])
    num_questions = max(1, min(len(made.questions), rng.randint(2, 4 + num_facts)))
    questions = made.questions[:num_questions]
    if choice < 0.5:
        asked = "".join(f"Question: {one.text}\nAnswer: {one.answer}{END}\n" for one in questions)
        return f"{begin}{made.text}\n{asked}"
    turns: list[tuple[str, str]] = []
    lead = ""
    if choice < 0.6:
        turns.append(("system", made.text))
    else:
        if choice < 0.68:
            turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
        lead = made.text + rng.choice((" ", "\n"))
    for question in questions:
        turns += [("user", lead + question.text), ("assistant", question.answer)]
        lead = ""
    return begin + chat_text(turns)


def _with_opening(rng: random.Random, text: str) -> str:
    """Lets a story that is told for its own sake begin like one."""
    if text.startswith(("Once", "One", "It")):
        return text
    return f"{rng.choice(('Once upon a time there was a little town.', 'It was a fine day.'))} {text}"


def _repeat_task(rng: random.Random, num_facts: int) -> str:
    """Asks for words to be said again: the plainest way to look something up in a prompt."""
    turns: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, 2)):
        words = rng.choices(_REPEATED, k=rng.randint(3, 5 * num_facts))
        said = f"{' '.join(words)}."
        turns += [("user", f"Repeat: {said}"), ("assistant", said)]
    if rng.random() < 0.5:
        return chat_text(turns)
    lines = (
        f"Question: {asked}\nAnswer: {said}{END}\n"
        for (_, asked), (_, said) in zip(turns[::2], turns[1::2], strict=True)
    )
    return "".join(lines)


def _small_talk(rng: random.Random) -> str:
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.3:
        turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
    for prompts, reply in rng.sample(SMALL_TALK, rng.randint(1, 2)):
        turns += [("user", rng.choice(prompts)), ("assistant", reply)]
    return chat_text(turns)


def chat_text(turns: list[tuple[str, str]]) -> str:
    """Writes a chat the way the chat template does, without the begin token.

    Args:
        turns: (role, content) pairs; the roles are system, user and assistant.

    Returns:
        The text, special tokens included.
    """
    return "".join(f"<|{role}|>\n{content}{END}\n" for role, content in turns)


def sizes(rng: random.Random, num_tokens: int) -> tuple[int, int]:
    """Draws how many facts and idle sentences fill a document of a given length.

    Args:
        rng: The source of every choice.
        num_tokens: The length to aim at; the outcome is near or below it.

    Returns:
        ``num_facts`` and ``num_filler`` for ``story`` or ``document``.
    """
    # A fact costs about 11 tokens to tell and, since documents ask about most of their facts,
    # up to 18 to ask about; an idle sentence costs about 7.
    most = max(3, min(12, (num_tokens - 20) // 30))
    num_facts = rng.randint(3, most)
    rest = num_tokens - 20 - 30 * num_facts
    num_filler = max(0, rest // 7)
    if num_tokens < 400:
        num_filler = rng.randint(0, min(num_filler, 12))
    return num_facts, num_filler


def training_documents(num: int, seed: int, num_tokens: int, repeat_share: float = 0.1) -> Iterator[str]:
    """Makes training documents of about one length.

    Args:
        num: How many documents.
        seed: Equal seeds give equal documents.
        num_tokens: The length to aim at, in tokens.
        repeat_share: Which share of the documents asks to repeat some words.

    Yields:
        Documents with their special tokens.
    """
    rng = random.Random(f"train-{seed}")
    for _ in range(num):
        yield document(rng, *sizes(rng, num_tokens), repeat_share)


def held_out_questions(
    num: int,
    seed: int,
    min_prompt_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    max_depth: float = 1.0,
) -> list[HeldOutQuestion]:
    """Makes questions about stories that no training document tells.

    Each question has a story of its own, and the kinds of question take turns.

    Args:
        num: How many questions.
        seed: Equal arguments give equal questions.
        min_prompt_tokens: The least length of a prompt, or None for short prompts.
        max_prompt_tokens: The greatest length of a prompt, or None for a bound of 300 tokens,
            or of 1.25 times ``min_prompt_tokens`` where that is given.
        max_depth: How late in the story the deciding sentence may stand, 0 to 1: 0.3 keeps
            questions whose answer lies in the first third of the prompt.

    Returns:
        The questions, ``num`` of them.
    """
    rng = random.Random(f"held-out-{seed}-{min_prompt_tokens}-{max_prompt_tokens}-{max_depth}")
    low = min_prompt_tokens or 1
    high = max_prompt_tokens or (int(low * 1.25) if min_prompt_tokens else 300)
    if low > high:
        raise ValueError(f"min_prompt_tokens {low} is above max_prompt_tokens {high}")
    found: list[HeldOutQuestion] = []
    while len(found) < num:
        kind = KINDS[len(found) % len(KINDS)]
        question = _held_out_question(rng, kind, low, high, max_depth)
        if question is not None:
            found.append(question)
    return found


def _held_out_question(rng: random.Random, kind: str, low: int, high: int, max_depth: float) -> HeldOutQuestion | None:
    """Tries once to make a question of one kind and length."""
    # A prompt asks one question, so it needs fewer tokens per fact than a document.
    target = rng.randint(max(low, min(high, 40)), high)
    num_facts = rng.randint(3, max(3, min(12, target // 14)))
    num_filler = max(0, (target - 25 - 13 * num_facts) // 7)
    if target < 300:
        num_filler = rng.randint(0, min(num_filler, 12)) if low == 1 else num_filler
    made = story(rng, num_facts, num_filler)
    if not made.held_out:
        return None
    for question in made.questions:
        if question.kind != kind or question.depth > max_depth:
            continue
        prompt = f"{made.text}\nQuestion: {question.text}\nAnswer:"
        length = count_tokens(prompt)
        if not low <= length <= high:
            return None
        if rng.random() < 0.3:
            messages: tuple[dict[str, str], ...] = (
                {"role": "system", "content": made.text},
                {"role": "user", "content": question.text},
            )
        else:
            messages = ({"role": "user", "content": f"{made.text}\n{question.text}"},)
        return HeldOutQuestion(prompt, messages, question.answer, question.kind, question.depth, length)
    return None
