"""What a caller asked for, checked and complete: every default filled in, no protobuf left.

Owns the frozen types between `validate` and the rest of the front end; knows no limit and no message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "ChatMessage",
    "Chunking",
    "ConstraintChoice",
    "ConversationInput",
    "GenerationRequest",
    "Handling",
    "OutputChoice",
    "PromptInput",
    "SamplingChoice",
    "SamplingDefaults",
    "ScoreInput",
    "StopRules",
]


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What unset sampling parameters mean for a model; `top_k` 0 = no limit."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class PromptInput:
    """A text or its token ids; exactly one of the two is not None."""

    text: str | None
    token_ids: tuple[int, ...] | None
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn: role as templates name it ("system", "user", "assistant", "tool")."""

    role: str
    content: str
    name: str


@dataclass(frozen=True, slots=True)
class ConversationInput:
    """A conversation and how to render it."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ConstraintChoice:
    """What the output must be: a field of `SamplingParams` and its text; for "choices" the texts."""

    kind: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """How tokens are chosen; `top_k` 0 = no limit; the seed is the caller's or drawn."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    sample_count: int = 1
    constraint: ConstraintChoice | None = None


@dataclass(frozen=True, slots=True)
class StopRules:
    """When the output ends. `max_output_tokens` None = up to the context limit."""

    max_output_tokens: int | None
    min_output_tokens: int
    strings: tuple[str, ...]
    token_ids: tuple[int, ...]
    include_stop: bool
    ignore_eos: bool
    max_duration_s: float


@dataclass(frozen=True, slots=True)
class OutputChoice:
    """What is returned besides the text. `logprobs` None = none, n = with the n best alternatives."""

    logprobs: int | None
    prompt_logprobs: int | None
    token_ids: bool
    omit_text: bool
    skip_special_tokens: bool
    timings: bool


@dataclass(frozen=True, slots=True)
class Handling:
    """How the request is handled. `request_id` is empty when the caller gave none; `retain_prefix_s` 0 = no hint."""

    request_id: str
    priority: int
    bypass_prefix_cache: bool
    cache_salt: str
    user: str
    retain_prefix_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a stream is cut into messages. `first_tokens` are enough for the first delta; 0 = as `min_tokens`."""

    min_tokens: int = 1
    min_interval_s: float = 0.0
    first_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A completion or a chat turn.

    Attributes:
        path: prefix of field paths in errors: "" or "request.".
        input_field: field of the input, for errors found after validation: "prompt" or "conversation".
    """

    source: PromptInput | ConversationInput
    sampling: SamplingChoice
    stop: StopRules
    output: OutputChoice
    handling: Handling
    chunking: Chunking
    path: str

    @property
    def input_field(self) -> str:
        """Path of the field that held the input."""
        return self.path + ("prompt" if isinstance(self.source, PromptInput) else "conversation")


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """A context and the continuations to score."""

    context: PromptInput
    continuations: tuple[PromptInput, ...]
    alternatives: int
    handling: Handling
