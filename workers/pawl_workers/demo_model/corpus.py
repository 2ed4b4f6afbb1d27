"""The synthetic corpus of the demo model: little stories and questions about them.

A story is a list of facts (who is where or went where, who has what, which colour a thing has,
how many fruits somebody has), told in a random order between sentences that say nothing of use.
An answer says the fact in the words of the story, so that what a model this small has to learn is
one thing, and exactly: to find the right sentence among others that differ in one word.

The words are few and every one is a single token, and names, places and things are drawn
afresh for each story. A model can therefore not learn an answer by heart: it has to find it in
the prompt, which is what makes the trained model a good oracle for a serving engine. If a
cached key is lost, masked or read at a wrong position, the answer names the wrong thing.

Held-out stories differ from the training stories in two ways: their random seeds come from
another range, and a hash of their facts falls into a part of the hash space (one tenth) that
training never uses.

This module is plain Python: it imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

BEGIN = "<|begin|>"
END = "<|end|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)
"""Every special token, in the order of its id (0, 1, 2, ...)."""

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Lily Mark Mia Nina Oliver "
    "Paul Rosa Sam Sara Tom Vera Will Zoe Alice Bruno Daisy Eric Fiona George Hanna Ivan Julia "
    "Karl Lucy Max Nora Oscar Peter"
).split()
PLACES = (
    "garden kitchen park school barn forest market library house shop castle cave tower field "
    "village cellar hall museum bakery station church yard attic harbour"
).split()
OBJECTS = (
    "ball book box cup hat key kite lamp map pen ring rope drum doll coat bell coin clock chair "
    "basket bottle brush spoon umbrella letter mirror pillow blanket whistle bucket"
).split()
COLOURS = "red blue green yellow black white brown pink grey purple".split()
FRUITS = {
    "apples": "apple",
    "pears": "pear",
    "plums": "plum",
    "nuts": "nut",
    "eggs": "egg",
    "cakes": "cake",
    "shells": "shell",
    "stones": "stone",
}
"""Things that are counted, plural to singular."""
NUMBERS = "zero one two three four five six seven eight nine ten".split()

_REPEATED = (*NAMES, *PLACES, *OBJECTS, *COLOURS, *NUMBERS, *FRUITS, *FRUITS.values())

KINDS = ("where_person", "where_object", "who_has", "what_holds", "colour", "how_many")
"""Every kind of question."""

_FILLER_SUBJECTS = (
    "sun wind bird cat dog river tree cloud sky flower moon rain grass road hill baker farmer king horse mouse"
).split()
_FILLER_ADJECTIVES = "old little big quiet soft warm cold kind bright slow".split()
_FILLER_ENDINGS = (
    "was very quiet",
    "was still there",
    "made no sound",
    "looked nice",
    "was as calm as ever",
    "had a good day",
    "was far away",
    "did not change",
    "was happy",
    "slept all day",
    "seemed to smile",
    "was not in a hurry",
)
_FILLER_FIXED = (
    "It was a fine day.",
    "It was a long day.",
    "Nobody was in a hurry.",
    "Everybody was happy.",
    "All was well.",
    "The day went on.",
    "Time went by.",
    "There was music far away.",
    "It was warm and bright.",
    "It was cold but nice.",
)
_SMALL_TALK = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Good day!", "Hello there!"),
        "Hello! Tell me a little story and ask me about it.",
    ),
    (
        ("Who are you?", "What are you?", "What can you do?", "What is this?"),
        "I am a little model. Tell me a story and ask me who is where.",
    ),
    (("Thank you.", "Thank you!", "Thanks!", "Thanks"), "You are welcome!"),
    (("Goodbye.", "Goodbye!", "Bye!", "Bye"), "Goodbye!"),
)
_STORY_REQUESTS = (
    "Tell me a story.",
    "Tell me a little story.",
    "Tell me a story!",
    "Tell me a story, please.",
)
_SYSTEM_PROMPTS = (
    "You are a kind little model.",
    "Read the story and answer.",
    "Answer the question.",
    "You are a helpful assistant.",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a story.

    Attributes:
        kind: One of ``KINDS``.
        text: The question itself, such as ``Where is Anna?``.
        answer: The one right answer, such as ``Anna is in the garden.``.
        depth: Where in the story the deciding sentence stands: 0 at its start, 1 at its end.
    """

    kind: str
    text: str
    answer: str
    depth: float


@dataclass(frozen=True, slots=True)
class Story:
    """A story and every question that its facts can answer.

    Attributes:
        text: The story, sentences joined by single spaces.
        questions: The questions, in random order.
        held_out: Whether the hash of the facts falls into the part kept from training.
    """

    text: str
    questions: tuple[Question, ...]
    held_out: bool


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


@dataclass(slots=True)
class _Fact:
    """One thing that is true at the end of a story, and how the story tells it."""

    kind: str
    sentences: list[str]
    questions: list[tuple[str, str, str]]
    """(kind, question, answer)."""


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
    texts = [text for prompts, reply in _SMALL_TALK for text in (*prompts, reply)]
    texts += [*_STORY_REQUESTS, *_SYSTEM_PROMPTS, *_FILLER_FIXED, *_FILLER_ENDINGS]
    texts += [*_FILLER_SUBJECTS, *_FILLER_ADJECTIVES]
    for text in texts:
        words.update(_TOKEN.findall(text))
    return sorted(word for word in words if word not in SPECIAL_TOKENS and word != "\n")


def story(rng: random.Random, num_facts: int, num_filler: int) -> Story:
    """Makes a story with about ``num_facts`` facts among ``num_filler`` idle sentences.

    Args:
        rng: The source of every choice.
        num_facts: How many facts to tell (people, things and fruits never repeat, so the words
            of the grammar cap it at about 90).
        num_filler: How many sentences that carry no fact.

    Returns:
        The story, with its questions in random order.
    """
    facts, people = _facts(rng, num_facts)
    # Each fact draws its moments and tells its sentences in that order, so that the sentences
    # of different facts mingle but a change never comes before what it changes.
    timeline: list[tuple[float, str, int]] = []
    for index, fact in enumerate(facts):
        moments = sorted(rng.random() for _ in fact.sentences)
        timeline += [(moment, sentence, index) for moment, sentence in zip(moments, fact.sentences, strict=True)]
    timeline += [(rng.random(), _filler(rng), -1) for _ in range(num_filler)]
    timeline.sort()
    depths = {index: place / len(timeline) for place, (_, _, index) in enumerate(timeline)}
    sentences = [sentence for _, sentence, _ in timeline]
    text = " ".join(_opening(rng, people) + sentences)
    questions = [
        Question(kind, question, answer, depths[index])
        for index, fact in enumerate(facts)
        for kind, question, answer in fact.questions
    ]
    rng.shuffle(questions)
    digest = hashlib.sha256(
        "|".join(sorted(sentence for fact in facts for sentence in fact.sentences)).encode()
    ).digest()
    return Story(text, tuple(questions), digest[0] % 10 == 0)


def _facts(rng: random.Random, num_facts: int) -> tuple[list[_Fact], list[str]]:
    """Draws the facts of one story and the people in it."""
    # A person has one fact and a thing one place, so a name in a question leads to one sentence.
    names = rng.sample(NAMES, min(len(NAMES), num_facts))
    free = list(names)
    objects = rng.sample(OBJECTS, len(OBJECTS))
    facts: list[_Fact] = []
    for _ in range(num_facts):
        kind = rng.choice(("place", "hold", "lie", "count"))
        if kind == "place" and free:
            facts.append(_place_fact(rng, free.pop()))
        elif kind == "hold" and free and objects:
            facts.append(_hold_fact(rng, free.pop(), objects.pop()))
        elif kind == "count" and free:
            facts.append(_count_fact(rng, free.pop()))
        elif objects:
            facts.append(_lie_fact(rng, objects.pop()))
    return facts, [name for name in names if name not in free]


def _place_fact(rng: random.Random, person: str) -> _Fact:
    place = rng.choice(PLACES)
    if rng.random() < 0.5:
        told = f"{person} went to the {place}."
        return _Fact("place", [told], [("where_person", f"Where did {person} go?", told)])
    told = f"{person} is in the {place}."
    return _Fact("place", [told], [("where_person", f"Where is {person}?", told)])


def _coloured(rng: random.Random, thing: str) -> tuple[str, tuple[str, str, str]]:
    """Gives a thing a colour: how to tell it, and what to ask."""
    told = f"The {thing} is {rng.choice(COLOURS)}."
    return told, ("colour", f"What colour is the {thing}?", told)


def _hold_fact(rng: random.Random, person: str, thing: str) -> _Fact:
    if rng.random() < 0.5:
        told = f"{person} has the {thing}."
        question = ("what_holds", f"What does {person} have?", told)
    else:
        told = f"The {thing} is with {person}."
        question = ("who_has", f"Who has the {thing}?", told)
    if rng.random() < 0.5:
        return _Fact("hold", [told], [question])
    colour, asked = _coloured(rng, thing)
    return _Fact("hold", [told, colour], [question, asked])


def _lie_fact(rng: random.Random, thing: str) -> _Fact:
    told = f"The {thing} is in the {rng.choice(PLACES)}."
    question = ("where_object", f"Where is the {thing}?", told)
    if rng.random() < 0.5:
        return _Fact("lie", [told], [question])
    colour, asked = _coloured(rng, thing)
    return _Fact("lie", [told, colour], [question, asked])


def _count_fact(rng: random.Random, person: str) -> _Fact:
    fruits = rng.choice(tuple(FRUITS))
    told = f"{person} has {NUMBERS[rng.randint(2, 10)]} {fruits}."
    return _Fact("count", [told], [("how_many", f"How many {fruits} does {person} have?", told)])


def _filler(rng: random.Random) -> str:
    if rng.random() < 0.25:
        return rng.choice(_FILLER_FIXED)
    subject = rng.choice(_FILLER_SUBJECTS)
    if rng.random() < 0.6:
        subject = f"{rng.choice(_FILLER_ADJECTIVES)} {subject}"
    return f"The {subject} {rng.choice(_FILLER_ENDINGS)}."


def _opening(rng: random.Random, people: list[str]) -> list[str]:
    choice = rng.random()
    if choice < 0.35:
        return []
    if choice < 0.5 or not 2 <= len(people) <= 6:
        return [rng.choice(("Once upon a time there was a little town.", "It was a fine day."))]
    cast = rng.sample(people, len(people))
    listed = f"{', '.join(cast[:-1])} and {cast[-1]}"
    start = rng.choice(("Once upon a time there were", "One day there were"))
    return [f"{start} {NUMBERS[len(cast)]} friends, {listed}."]


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
        return begin + chat_text([("user", rng.choice(_STORY_REQUESTS)), ("assistant", reply)])
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
            turns.append(("system", rng.choice(_SYSTEM_PROMPTS)))
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
        turns.append(("system", rng.choice(_SYSTEM_PROMPTS)))
    for prompts, reply in rng.sample(_SMALL_TALK, rng.randint(1, 2)):
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
