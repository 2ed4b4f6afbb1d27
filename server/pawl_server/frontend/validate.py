"""Generation and score messages in, checked requests out: every rule of the public contract, all at once.

Pure functions from proto to the frozen types of `requests`; owns ranges and defaults, and knows neither the
network nor the tokenizer (what depends on the number of prompt tokens is checked by `lengths`).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from pawl.v1 import inference_pb2, types_pb2
from pawl_server.config import LimitSettings
from pawl_server.frontend.requests import (
    Chunking,
    ConversationInput,
    GenerationRequest,
    Handling,
    OutputChoice,
    PromptInput,
    SamplingChoice,
    SamplingDefaults,
    ScoreInput,
    StopRules,
)
from pawl_server.frontend.validate_constraint import constraint
from pawl_server.frontend.validate_conversation import conversation
from pawl_server.frontend.violations import Violations, visible_ascii
from pawl_server.settings import MAX_CHUNK_TOKENS

__all__ = ["MIN_PRIORITY", "Rules", "chat", "generation", "prompt", "score"]

MIN_PRIORITY = -10
_MAX_ID_LENGTH = 128
_MAX_SALT_BYTES = 256
_MAX_USER_BYTES = 128


@dataclass(frozen=True, slots=True)
class Rules:
    """What a message is checked against: limits, the model's sizes and defaults, the caller's rights."""

    limits: LimitSettings
    vocab_size: int
    defaults: SamplingDefaults
    max_priority: int = 10
    stream_interval: int = 1


def generation(
    message: inference_pb2.GenerateRequest, rules: Rules, stream: inference_pb2.StreamOptions | None = None
) -> GenerationRequest:
    """Check a completion; `stream` is given for StreamGenerate, whose fields lie under `request.`.

    Raises:
        InvalidRequest: with every violation.
    """
    path = "" if stream is None else "request."
    found = Violations(path)
    source = prompt(found, "prompt", message.prompt, message.HasField("prompt"), rules)
    return _finish(found, source, message, rules, stream, path)


def chat(
    message: inference_pb2.ChatRequest, rules: Rules, stream: inference_pb2.StreamOptions | None = None
) -> GenerationRequest:
    """Check a chat turn, as `generation`.

    Raises:
        InvalidRequest: with every violation.
    """
    path = "" if stream is None else "request."
    found = Violations(path)
    source = conversation(found, message.conversation, rules.limits)
    return _finish(found, source, message, rules, stream, path)


def _finish(
    found: Violations,
    source: PromptInput | ConversationInput,
    message: inference_pb2.GenerateRequest | inference_pb2.ChatRequest,
    rules: Rules,
    stream: inference_pb2.StreamOptions | None,
    path: str,
) -> GenerationRequest:
    sampling = _sampling(found, message.sampling, message.stop, rules)
    stop = _stop(found, message.stop, rules)
    output = _output(found, message.output, message.stop, rules.limits)
    handling = _handling(found, message.options, rules.max_priority, rules.limits)
    outer = Violations()
    chunking = Chunking() if stream is None else _chunking(outer, stream, rules.stream_interval)
    found.absorb(outer)
    found.raise_if_any()
    return GenerationRequest(source, sampling, stop, output, handling, chunking, path)


def score(message: inference_pb2.ScoreRequest, rules: Rules) -> ScoreInput:
    """Check a Score call.

    Raises:
        InvalidRequest: with every violation.
    """
    found = Violations()
    limits = rules.limits
    context = prompt(found, "context", message.context, message.HasField("context"), rules)
    continuations: list[PromptInput] = []
    number = len(message.continuations)
    if found.count("continuations", number, limits.max_continuations, "limits.max_continuations", low=1):
        for index, item in enumerate(message.continuations):
            field = f"continuations[{index}]"
            if item.HasField("add_special_tokens") and item.add_special_tokens:
                found.add(f"{field}.add_special_tokens", "no special token is added to a continuation: leave it unset")
            checked = prompt(found, field, item, True, rules, may_add_special=False)
            continuations.append(checked)
    alternatives = message.alternatives if message.HasField("alternatives") else 0
    found.number("alternatives", alternatives, 0, limits.max_logprobs, "limits.max_logprobs")
    handling = _handling(found, message.options, rules.max_priority, rules.limits)
    found.raise_if_any()
    return ScoreInput(context, tuple(continuations), alternatives, handling)


def prompt(
    found: Violations, field: str, message: types_pb2.Prompt, given: bool, rules: Rules, *, may_add_special: bool = True
) -> PromptInput:
    """Check a prompt. A text may be empty here: whether it has tokens is known after tokenizing."""
    kind = message.WhichOneof("kind")
    if not given or kind is None:
        found.add(field, "required: set `text` or `token_ids`")
    if kind != "token_ids":
        if kind == "text":
            found.text(f"{field}.text", message.text, rules.limits.max_prompt_bytes, "limits.max_prompt_bytes")
        add_special = message.add_special_tokens if message.HasField("add_special_tokens") else True
        return PromptInput(message.text, None, add_special and may_add_special)
    ids = tuple(message.token_ids.ids)
    if message.HasField("add_special_tokens") and may_add_special:
        found.add(f"{field}.add_special_tokens", "must be unset for `token_ids`, which are used as they are")
    if found.check(bool(ids), f"{field}.token_ids.ids", "at least one token id is needed"):
        found.token_ids(f"{field}.token_ids.ids", ids, rules.vocab_size)
    return PromptInput(None, ids, False)


def _sampling(
    found: Violations, message: types_pb2.SamplingParams, stop: types_pb2.StopParams, rules: Rules
) -> SamplingChoice:
    defaults = rules.defaults

    def number(name: str, default: float, low: float, high: float, *, open_low: bool = False) -> float:
        if not message.HasField(name):  # type: ignore[arg-type]  # names of the table below, all optional scalars
            return default
        value = float(getattr(message, name))
        found.number(f"sampling.{name}", value, low, high, open_low=open_low)
        return value

    bias = dict(message.logit_bias)
    if found.count("sampling.logit_bias", len(bias), rules.limits.max_logit_bias, "limits.max_logit_bias"):
        for token_id, value in bias.items():
            field = f"sampling.logit_bias[{token_id}]"
            if found.check(0 <= token_id < rules.vocab_size, field, f"token id is not in [0, {rules.vocab_size - 1}]"):
                found.number(field, value, -100, 100)
    temperature = number("temperature", defaults.temperature, 0, 100)
    samples = message.sample_count if message.HasField("sample_count") else 1
    if found.number("sampling.sample_count", samples, 1, rules.limits.max_samples, "limits.max_samples"):
        text = f"{samples} samples would be equal with temperature 0: ask for one, or set sampling.temperature above 0"
        found.check(samples == 1 or temperature != 0, "sampling.sample_count", text)
    seed = message.seed if message.HasField("seed") else secrets.randbits(63)
    found.check(seed >= 0, "sampling.seed", f"{seed} is not in [0, 2^63)")
    return SamplingChoice(
        temperature=temperature,
        top_p=number("top_p", defaults.top_p, 0, 1, open_low=True),
        top_k=int(number("top_k", defaults.top_k, 1, rules.vocab_size)),
        min_p=number("min_p", defaults.min_p, 0, 1),
        repetition_penalty=number("repetition_penalty", defaults.repetition_penalty, 0, 10, open_low=True),
        presence_penalty=number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=number("frequency_penalty", 0.0, -2, 2),
        logit_bias=bias,
        seed=seed,
        sample_count=samples,
        constraint=constraint(found, message, stop, rules.limits),
    )


def _stop(found: Violations, message: types_pb2.StopParams, rules: Rules) -> StopRules:
    limits = rules.limits
    most = message.max_output_tokens if message.HasField("max_output_tokens") else None
    least = message.min_output_tokens if message.HasField("min_output_tokens") else 0
    allowed = limits.max_output_tokens
    if most is not None and found.check(most >= 1, "stop.max_output_tokens", f"{most} is not at least 1") and allowed:
        text = f"{most} tokens, at most {allowed} are allowed (server setting limits.max_output_tokens)"
        found.check(most <= allowed, "stop.max_output_tokens", text)
    if found.check(least >= 0, "stop.min_output_tokens", f"{least} is negative"):
        if most is not None and most >= 1:
            text = f"{least} is more than stop.max_output_tokens = {most}"
            found.check(least <= most, "stop.min_output_tokens", text)
        elif allowed:  # else it would raise the server's own limit
            text = f"{least} tokens, at most {allowed} are allowed (server setting limits.max_output_tokens)"
            found.check(least <= allowed, "stop.min_output_tokens", text)
    strings = tuple(message.stop_strings)
    if found.count("stop.stop_strings", len(strings), limits.max_stop_strings, "limits.max_stop_strings"):
        for index, text in enumerate(strings):
            field = f"stop.stop_strings[{index}]"
            if found.check(bool(text), field, "must not be empty"):
                found.text(field, text, limits.max_stop_string_bytes, "limits.max_stop_string_bytes")
    ids = tuple(message.stop_token_ids)
    if found.count("stop.stop_token_ids", len(ids), limits.max_stop_token_ids, "limits.max_stop_token_ids"):
        found.token_ids("stop.stop_token_ids", ids, rules.vocab_size)
    longest = limits.max_duration_s
    if message.HasField("max_duration"):
        longest = found.duration(
            "stop.max_duration", message.max_duration, 0, limits.max_duration_s, "limits.max_duration_s", open_low=True
        )
    return StopRules(most, least, strings, ids, message.include_stop, message.ignore_eos, longest)


def _output(
    found: Violations, message: types_pb2.OutputOptions, stop: types_pb2.StopParams, limits: LimitSettings
) -> OutputChoice:
    logprobs = message.logprobs if message.HasField("logprobs") else None
    prompt_logprobs = message.prompt_logprobs if message.HasField("prompt_logprobs") else None
    for name, number in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        found.number(f"output.{name}", number or 0, 0, limits.max_logprobs, "limits.max_logprobs")
    if message.omit_text and stop.stop_strings:
        found.add("output.omit_text", "stop.stop_strings are looked for in the text: drop one of the two")
    skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
    return OutputChoice(logprobs, prompt_logprobs, message.token_ids, message.omit_text, skip, message.timings)


def _handling(
    found: Violations, message: types_pb2.RequestOptions, max_priority: int, limits: LimitSettings
) -> Handling:
    if message.request_id:
        size = len(message.request_id)
        good = size <= _MAX_ID_LENGTH and visible_ascii(message.request_id)
        found.check(good, "options.request_id", f"must be 1 to {_MAX_ID_LENGTH} visible ASCII characters")
    found.number("options.priority", message.priority, MIN_PRIORITY, max_priority)
    found.text("options.cache_salt", message.cache_salt, _MAX_SALT_BYTES)
    found.text("options.user", message.user, _MAX_USER_BYTES)
    retain_s = 0.0
    if message.HasField("retain_prefix"):
        field, limit = "options.retain_prefix", "limits.max_retain_prefix_s"
        retain_s = found.duration(field, message.retain_prefix, 0, limits.max_retain_prefix_s, limit, open_low=True)
        if message.bypass_prefix_cache:
            found.add(field, "options.bypass_prefix_cache leaves nothing to keep: drop one of the two")
    return Handling(
        message.request_id,
        message.priority,
        message.bypass_prefix_cache,
        message.cache_salt,
        message.user,
        retain_s,
    )


def _chunking(found: Violations, message: inference_pb2.StreamOptions, stream_interval: int) -> Chunking:
    """The request's own way, or the server's, whose first delta comes at once."""
    chosen = message.HasField("min_chunk_tokens")
    least = message.min_chunk_tokens if chosen else stream_interval
    found.number("stream.min_chunk_tokens", least, 1, MAX_CHUNK_TOKENS)
    interval = 0.0
    if message.HasField("min_chunk_interval"):
        interval = found.duration("stream.min_chunk_interval", message.min_chunk_interval, 0, 10)
    return Chunking(least, interval, first_tokens=0 if chosen else 1)
