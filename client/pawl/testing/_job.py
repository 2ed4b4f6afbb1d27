"""A request to the fake, made uniform: checked, with its prompt's ids and its whole output.

Owns validation and the pieces of an answer; `_inference` puts them in order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf import duration_pb2

from pawl.errors import FieldViolation, InvalidRequest, NotFound
from pawl.testing._model import FakeModel, Output, decode, encode, logprobs, render
from pawl.v1 import inference_pb2, types_pb2

__all__ = ["Job", "Request", "check_model", "prompt_ids"]

Request: TypeAlias = inference_pb2.GenerateRequest | inference_pb2.ChatRequest


def check_model(model: FakeModel, name: str) -> None:
    """Refuse a model that the fake does not serve.

    Raises:
        NotFound: with the name that is served.
    """
    if name.removeprefix("models/") not in ("", model.name):
        raise NotFound(
            f"model {name!r} is not served; served: {model.name}", metadata={"model": name, "served": model.name}
        )


def _check(request: Request) -> None:
    sampling, stop = request.sampling, request.stop
    wrong = [
        FieldViolation(field, message)
        for bad, field, message in (
            *_check_constraint(sampling, stop),
            (not 0 <= sampling.temperature <= 100, "sampling.temperature", "must be in [0, 100]"),
            (sampling.HasField("top_p") and not 0 < sampling.top_p <= 1, "sampling.top_p", "must be in (0, 1]"),
            (sampling.HasField("top_k") and sampling.top_k < 1, "sampling.top_k", "must be at least 1"),
            (not 0 <= sampling.min_p <= 1, "sampling.min_p", "must be in [0, 1]"),
            (
                stop.HasField("max_output_tokens") and stop.max_output_tokens < 1,
                "stop.max_output_tokens",
                "must be at least 1",
            ),
        )
        if bad
    ]
    if isinstance(request, inference_pb2.GenerateRequest) and request.prompt.WhichOneof("kind") is None:
        wrong.append(FieldViolation("prompt", "is required"))
    if isinstance(request, inference_pb2.ChatRequest) and not request.conversation.messages:
        wrong.append(FieldViolation("conversation.messages", "needs at least one turn"))
    if wrong:
        raise InvalidRequest("; ".join(f"{v.field} {v.message}" for v in wrong), violations=wrong)


def _check_constraint(sampling: types_pb2.SamplingParams, stop: types_pb2.StopParams) -> list[tuple[bool, str, str]]:
    """What the server refuses beside a constraint. Whether the reply fits one is up to who wrote the reply."""
    kind = sampling.WhichOneof("constraint")
    if kind is None:
        return []
    excluded = {"stop_strings": stop.stop_strings, "stop_token_ids": stop.stop_token_ids, "ignore_eos": stop.ignore_eos}
    found = [(bool(given), f"stop.{name}", f"not together with sampling.{kind}") for name, given in excluded.items()]
    if kind == "choices":
        found.append((not sampling.choices.values, "sampling.choices.values", "needs at least one"))
    if kind == "json_schema":
        found.append((not _is_schema(sampling.json_schema), "sampling.json_schema", "is not a JSON Schema"))
    return found


def _is_schema(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def prompt_ids(prompt: types_pb2.Prompt) -> list[int]:
    """Ids of a prompt, given as text or as ids."""
    if prompt.WhichOneof("kind") == "token_ids":
        return list(prompt.token_ids.ids)
    return encode(prompt.text, special=not prompt.HasField("add_special_tokens") or prompt.add_special_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """A request made uniform: what to continue, and what comes out."""

    request: Request
    prompt_ids: list[int]
    output: Output

    @classmethod
    def of(cls, request: Request, model: FakeModel) -> Job:
        """Check a request and work out its output. Raises `PawlError`."""
        check_model(model, request.model)
        _check(request)
        if isinstance(request, inference_pb2.ChatRequest):
            ids = encode(render(request.conversation), special=False)
            text = request.conversation.messages[-1].content
        else:
            ids = prompt_ids(request.prompt)
            text = decode(ids)
        return cls(request, ids, model.generate(text, len(ids), request.stop, request.sampling.choices.values))

    def ending(self, num_tokens: int, *, cancelled: bool) -> tuple[inference_pb2.SampleEnd, inference_pb2.StreamEnd]:
        """The last two events, after so many tokens."""
        sample_end = inference_pb2.SampleEnd(
            finish_reason=types_pb2.FINISH_REASON_CANCELLED if cancelled else self.output.finish_reason,
            stop_match=None if cancelled else self.output.stop_match,
            output_tokens=num_tokens,
        )
        end = inference_pb2.StreamEnd(
            usage=types_pb2.Usage(prompt_tokens=len(self.prompt_ids), output_tokens=num_tokens),
            timings=self._timings(num_tokens),
            prompt_logprobs=self._prompt_logprobs(),
        )
        return sample_end, end

    def _prompt_logprobs(self) -> list[types_pb2.TokenLogprob]:
        """Log-probabilities of the prompt, if asked for."""
        output = self.request.output
        wanted = output.prompt_logprobs if output.HasField("prompt_logprobs") else None
        return logprobs(self.prompt_ids, wanted, prompt=True)

    def delta(self, first: int, last: int) -> inference_pb2.StreamDelta:
        """The output tokens from `first` up to `last`."""
        wanted = self.request.output
        token_ids = self.output.token_ids[first:last]
        return inference_pb2.StreamDelta(
            token_offset=first,
            token_count=len(token_ids),
            text="" if wanted.omit_text else decode(token_ids),
            token_ids=token_ids if wanted.token_ids else (),
            logprobs=logprobs(self.output.token_ids, wanted.logprobs if wanted.HasField("logprobs") else None)[
                first:last
            ],
        )

    def _timings(self, output_tokens: int) -> types_pb2.Timings | None:
        """Made-up timings, if asked for."""
        if not self.request.output.timings:
            return None
        return types_pb2.Timings(
            queue=duration_pb2.Duration(nanos=1_000_000),
            prefill=duration_pb2.Duration(nanos=2_000_000),
            decode=duration_pb2.Duration(nanos=1_000_000 * output_tokens),
            total=duration_pb2.Duration(nanos=3_000_000 + 1_000_000 * output_tokens),
            time_to_first_token=duration_pb2.Duration(nanos=3_000_000),
            output_tokens_per_second=1000.0 if output_tokens > 1 else 0.0,
        )
