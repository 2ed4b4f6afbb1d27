"""The fake's model: one token per character, and a reply that is a function of the prompt.

Owns texts, token ids and made-up log-probabilities, all deterministic. Ids 0 (end of text) and 1 (begin of text)
are special; every other id is a Unicode code point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pawl.v1 import types_pb2

__all__ = ["EOS", "VOCAB_SIZE", "FakeModel", "Output", "decode", "encode", "logprobs", "render"]

EOS = 0
BOS = 1
VOCAB_SIZE = 0x110000
_ROLE_NAMES = {
    types_pb2.ROLE_SYSTEM: "system",
    types_pb2.ROLE_USER: "user",
    types_pb2.ROLE_ASSISTANT: "assistant",
    types_pb2.ROLE_TOOL: "tool",
}


def encode(text: str, *, special: bool = True) -> list[int]:
    """Text to ids, with a begin-of-text token in front unless `special` is false."""
    return [BOS] * special + [ord(character) for character in text]


def decode(token_ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Ids to text."""
    return "".join(chr(i) for i in token_ids if not (skip_special and i in (EOS, BOS)))


def render(conversation: types_pb2.Conversation) -> str:
    """The fake's chat template."""
    turns = "".join(f"<{_ROLE_NAMES.get(m.role, '?')}>{m.content}\n" for m in conversation.messages)
    if conversation.continue_final_message:
        return turns.removesuffix("\n")
    return turns + "<assistant>"


def logprobs(
    token_ids: Sequence[int], alternatives: int | None, *, prompt: bool = False
) -> list[types_pb2.TokenLogprob]:
    """Made-up log-probabilities: each token is the most probable, -0.1 to -1 by id and position."""
    if alternatives is None:
        return []
    answer = []
    for position, token_id in enumerate(token_ids):
        token = types_pb2.TokenLogprob(token_id=token_id, token_bytes=chr(token_id).encode())
        if not (prompt and position == 0):
            token.logprob = -(1 + (token_id + position) % 10) / 10
            token.rank = 1
            for rank in range(1, alternatives + 1):
                other = (token_id + rank - 1) % 0xD800
                token.alternatives.add(
                    token_id=other, token_bytes=chr(other).encode(), logprob=token.logprob - rank + 1, rank=rank
                )
        answer.append(token)
    return answer


@dataclass(frozen=True, slots=True)
class Output:
    """What the fake generates for a request."""

    token_ids: tuple[int, ...]
    finish_reason: types_pb2.FinishReason.ValueType
    stop_match: types_pb2.StopMatch | None


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Replies to a prompt.

    Attributes:
        name: id under which it is served.
        reply: the reply to a prompt's text, or to a conversation's last turn.
        max_context_tokens: most tokens of prompt and output.
    """

    name: str
    reply: Callable[[str], str]
    max_context_tokens: int = 4096

    def generate(
        self, text: str, prompt_tokens: int, stop: types_pb2.StopParams, choices: Sequence[str] = (), index: int = 0
    ) -> Output:
        """The reply, cut where the request says. With choices the first of them, unless the reply is one.

        Sample 1 says "#1" after it, and so on; with choices it is the next one.
        """
        reply = self.reply(text) + (f" #{index}" if index else "")
        if choices and reply not in choices:
            reply = choices[index % len(choices)]
        match: types_pb2.StopMatch | None = types_pb2.StopMatch(eos_token_id=EOS)
        reason = types_pb2.FINISH_REASON_STOP
        found = [(reply.find(s), s) for s in stop.stop_strings if s in reply]
        if found:
            place, string = min(found)
            reply = reply[: place + len(string) * stop.include_stop]
            match = types_pb2.StopMatch(stop_string=string)
        for reason_if_cut, limit in (
            (types_pb2.FINISH_REASON_CONTEXT_LENGTH, self.max_context_tokens - prompt_tokens),
            (
                types_pb2.FINISH_REASON_MAX_TOKENS,
                stop.max_output_tokens if stop.HasField("max_output_tokens") else len(reply),
            ),
        ):
            if len(reply) > limit:
                reply, reason, match = reply[:limit], reason_if_cut, None
        return Output(tuple(encode(reply, special=False)), reason, match)
