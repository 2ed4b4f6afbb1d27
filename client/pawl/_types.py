"""What a caller gets: completions, scores, tokens, models: frozen plain data, no protobuf.

Owns the shapes of answers. Knows nothing of messages on the wire (`_convert` does) or of channels.
All times are seconds, all log-probabilities natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import overload

from pawl._inputs import Sampling

__all__ = [
    "Alternative",
    "CancelOutcome",
    "Completion",
    "FinishReason",
    "Model",
    "RenderedChat",
    "Sample",
    "ScoredContinuation",
    "Scores",
    "StopMatch",
    "Timings",
    "Token",
    "TokenLogprob",
    "Tokenization",
    "Usage",
]


class FinishReason(StrEnum):
    """Why an output ended."""

    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class StopMatch:
    """What exactly stopped an output; one of the three is set."""

    eos_token_id: int | None = None
    stop_token_id: int | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the tokens that could have been chosen; rank 1 is the most probable."""

    token_id: int
    token_bytes: bytes
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how probable it was, before temperature and truncation.

    `logprob` is None and `rank` 0 for the first token of a prompt, which nothing precedes. `token_bytes` need
    not be valid UTF-8 by themselves.
    """

    token_id: int
    token_bytes: bytes
    logprob: float | None
    rank: int
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for a request; cached ones are part of the prompt's."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, by the server's clock, in seconds. queue + prefill + decode + stalled = total."""

    queue: float
    prefill: float
    decode: float
    stalled: float
    total: float
    time_to_first_token: float
    preemption_count: int
    output_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of the outputs for a prompt.

    Attributes:
        index: its position among them, from 0.
        text: the generated text.
        finish_reason: why it ended; None only for a sample of the `partial` of a stream that broke.
        stop_match: what stopped it, with `FinishReason.STOP`.
        token_ids: ids of the generated tokens, if asked for.
        logprobs: one per generated token, if asked for.
    """

    index: int
    text: str
    finish_reason: FinishReason | None
    stop_match: StopMatch | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    def __repr__(self) -> str:
        reason = self.finish_reason.value if self.finish_reason else "incomplete"
        return f"Sample({self.index}, {reason}, {len(self.text)} characters)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A generated output; with `sample_count` above 1 the first one, and all of them in `samples`.

    Attributes:
        text: the generated text.
        finish_reason: why it ended; None only for the `partial` of a stream that broke.
        stop_match: what stopped it, with `FinishReason.STOP`.
        token_ids: ids of the generated tokens, if asked for.
        logprobs: one per generated token, if asked for.
        prompt_logprobs: one per token of the prompt, if asked for.
        samples: every output, by index; one, unless more were asked for.
        usage: token counts, of all samples; of a broken stream only `output_tokens` is known.
        timings: where the time went, None if not asked for.
        request_id: id of the request.
        model: name of the model that answered.
        seed: give it back with the same request for the same tokens.
        created: when the request arrived (UTC), None if the server did not say.
    """

    text: str
    finish_reason: FinishReason | None
    stop_match: StopMatch | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    samples: tuple[Sample, ...] = ()
    usage: Usage = Usage()
    timings: Timings | None = None
    request_id: str = ""
    model: str = ""
    seed: int = 0
    created: datetime | None = None

    def __repr__(self) -> str:
        reason = self.finish_reason.value if self.finish_reason else "incomplete"
        return f"Completion({self.request_id!r}, {reason}, {self.usage.output_tokens} tokens)"


@dataclass(frozen=True, slots=True)
class ScoredContinuation:
    """How probable a continuation is.

    Attributes:
        tokens: one per token of the continuation.
        total_logprob: sum of the tokens' log-probabilities.
        greedy_match: whether greedy decoding of the context gives exactly this continuation.
        byte_count: bytes of its text in UTF-8.
    """

    tokens: tuple[TokenLogprob, ...]
    total_logprob: float
    greedy_match: bool
    byte_count: int


@dataclass(frozen=True, slots=True)
class Scores(Sequence[ScoredContinuation]):
    """The scores in the order of the continuations: a sequence, with the request's id and usage."""

    continuations: tuple[ScoredContinuation, ...]
    request_id: str
    usage: Usage

    def __len__(self) -> int:
        return len(self.continuations)

    def __iter__(self) -> Iterator[ScoredContinuation]:
        return iter(self.continuations)

    @overload
    def __getitem__(self, index: int) -> ScoredContinuation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScoredContinuation, ...]: ...
    def __getitem__(self, index: int | slice) -> ScoredContinuation | tuple[ScoredContinuation, ...]:
        return self.continuations[index]


@dataclass(frozen=True, slots=True)
class Token:
    """One token and the bytes of the text that it covers, `[start_byte, end_byte)`."""

    id: int
    token_bytes: bytes
    start_byte: int
    end_byte: int
    special: bool


@dataclass(frozen=True, slots=True)
class Tokenization:
    """The tokens of a text; `tokens` only with `offsets=True`."""

    token_ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    max_context_tokens: int

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The exact prompt that a chat call would run."""

    text: str
    token_ids: tuple[int, ...]

    def __repr__(self) -> str:
        return f"RenderedChat({len(self.token_ids)} tokens)"


@dataclass(frozen=True, slots=True)
class Model:
    """Facts about a served model. `name` is `models/{id}`; the id alone is accepted everywhere."""

    name: str
    display_name: str
    architectures: tuple[str, ...]
    max_context_tokens: int
    vocab_size: int
    data_type: str
    eos_token_ids: tuple[int, ...]
    default_sampling: Sampling
    has_chat_template: bool
    revision: str

    @property
    def id(self) -> str:
        """The name without `models/`."""
        return self.name.removeprefix("models/")


class CancelOutcome(StrEnum):
    """What became of a cancellation."""

    CANCELLED = "cancelled"
    NOT_FOUND = "not_found"
    ALREADY_FINISHED = "already_finished"
