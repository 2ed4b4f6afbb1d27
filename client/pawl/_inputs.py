"""What a caller gives: prompts, turns of a conversation, how to choose tokens and when to stop.

Owns the shapes of requests: frozen plain data. Knows nothing of messages on the wire (`_build` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

__all__ = ["Message", "Prompt", "Role", "Sampling", "Stop", "assistant", "system", "tool", "user"]

# Text, tokenized by the server, or token ids, used as they are.
Prompt: TypeAlias = str | Sequence[int]


class Role(StrEnum):
    """Who speaks in a conversation."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `name` is the speaker's, for templates that use one."""

    role: Role
    content: str
    name: str = ""

    def __repr__(self) -> str:
        return f"Message({self.role.value}, {len(self.content)} characters)"


def system(content: str) -> Message:
    """Instructions to the model."""
    return Message(Role.SYSTEM, content)


def user(content: str, *, name: str = "") -> Message:
    """A turn of the person asking."""
    return Message(Role.USER, content, name)


def assistant(content: str) -> Message:
    """An earlier turn of the model."""
    return Message(Role.ASSISTANT, content)


def tool(content: str, *, name: str = "") -> Message:
    """The result of a tool, for chat templates that know the role."""
    return Message(Role.TOOL, content, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. None leaves a value to the model's defaults; 0 means 0.

    Attributes:
        temperature: divides the logits; 0 is greedy. [0, 100].
        top_p: keep the smallest set of tokens that reaches this probability. (0, 1].
        top_k: keep the k best tokens. At least 1.
        min_p: drop tokens below this share of the best one's probability. [0, 1].
        repetition_penalty: weakens every token of prompt and output; 1 is off. (0, 10].
        presence_penalty: subtracted once from the logit of a token of the output. [-2, 2].
        frequency_penalty: subtracted per occurrence in the output. [-2, 2].
        logit_bias: added to the logit of a token id. [-100, 100].
        seed: the same seed, prompt and parameters give the same tokens. [0, 2^63).
        sample_count: outputs for the prompt, which is computed once; sample i equals the one of a request with the
            seed `pawl.seeds.derive_seed(seed, i)`. At least 1; more than 1 not with temperature 0.
        json_schema: the output is JSON that fits this JSON Schema, given as a mapping or as its JSON text.
        regex: the output is matched by this regular expression as a whole.
        grammar: the output is a text of this context-free grammar (EBNF in Lark's or GBNF's notation).
        choices: the output is one of these texts. At most one of these four is given.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    sample_count: int | None = None
    json_schema: Mapping[str, object] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """When the output ends, besides the model's own end-of-text tokens.

    Attributes:
        max_tokens: most tokens to generate; None is up to the context limit.
        min_tokens: nothing stops the output before this many tokens.
        strings: literal texts that end the output.
        token_ids: further token ids that end the output.
        include: whether the stop string or token is part of the output.
        ignore_eos: go on past end-of-text tokens (for load tests).
        max_duration: ends the output cleanly after this many seconds since the request arrived.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    strings: Sequence[str] = ()
    token_ids: Sequence[int] = ()
    include: bool = False
    ignore_eos: bool = False
    max_duration: float | None = None
