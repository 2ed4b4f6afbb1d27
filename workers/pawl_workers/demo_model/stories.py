"""Stories of a grammar of ours, and every question that a story answers.

A story is a list of facts (who is where or went where, who has what, which colour a thing has,
how many fruits somebody has), told in a random order between sentences that say nothing of use.
An answer says the fact in the words of the story, so that what a model this small has to learn is
one thing, and exactly: to find the right sentence among others that differ in one word.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from pawl_workers.demo_model.words import (
    COLOURS,
    FILLER_ADJECTIVES,
    FILLER_ENDINGS,
    FILLER_FIXED,
    FILLER_SUBJECTS,
    FRUITS,
    NAMES,
    NUMBERS,
    OBJECTS,
    PLACES,
)

KINDS = ("where_person", "where_object", "who_has", "what_holds", "colour", "how_many")
"""Every kind of question."""


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


@dataclass(slots=True)
class _Fact:
    """One thing that is true at the end of a story, and how the story tells it."""

    kind: str
    sentences: list[str]
    questions: list[tuple[str, str, str]]
    """(kind, question, answer)."""


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
        return rng.choice(FILLER_FIXED)
    subject = rng.choice(FILLER_SUBJECTS)
    if rng.random() < 0.6:
        subject = f"{rng.choice(FILLER_ADJECTIVES)} {subject}"
    return f"The {subject} {rng.choice(FILLER_ENDINGS)}."


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
