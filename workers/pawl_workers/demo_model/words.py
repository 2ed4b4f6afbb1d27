"""The words of the demo model's stories, its special tokens, and the sentences that carry no fact."""

from __future__ import annotations

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

FILLER_SUBJECTS = (
    "sun wind bird cat dog river tree cloud sky flower moon rain grass road hill baker farmer king horse mouse"
).split()
FILLER_ADJECTIVES = "old little big quiet soft warm cold kind bright slow".split()
FILLER_ENDINGS = (
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
FILLER_FIXED = (
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
SMALL_TALK = (
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
STORY_REQUESTS = (
    "Tell me a story.",
    "Tell me a little story.",
    "Tell me a story!",
    "Tell me a story, please.",
)
SYSTEM_PROMPTS = (
    "You are a kind little model.",
    "Read the story and answer.",
    "Answer the question.",
    "You are a helpful assistant.",
)
