"""A request to the fake, made uniform: checked, with its prompt's ids and its whole output.

Owns validation and the pieces of an answer; `_inference` puts them in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf import duration_pb2

from pawl.errors import FieldViolation, InvalidRequest, NotFound
from pawl.testing._model import FakeModel, Output, decode, encode, logprobs, render
from pawl.v1 import inference_pb2, types_pb2

__all__ = ["Job", "Request", "check_model", "prompt_ids"]

_MAX_SAMPLES = 16

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
            *_check_samples(sampling),
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


def _check_samples(sampling: types_pb2.SamplingParams) -> list[tuple[bool, str, str]]:
    number, field = sampling.sample_count if sampling.HasField("sample_count") else 1, "sampling.sample_count"
    greedy = sampling.HasField("temperature") and not sampling.temperature
    return [
        (not 1 <= number <= _MAX_SAMPLES, field, f"must be in [1, {_MAX_SAMPLES}]"),
        (number > 1 and greedy, field, "must be 1 with temperature 0: all samples would be equal"),
    ]


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
    outputs: tuple[Output, ...]

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
        choices = request.sampling.choices.values
        outputs = (
            model.generate(text, len(ids), request.stop, choices, index)
            for index in range(max(1, request.sampling.sample_count))
        )
        return cls(request, ids, tuple(outputs))

    def pieces(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Sample, first token and end of each delta of so many tokens; samples take turns."""
        longest = max(len(output.token_ids) for output in self.outputs)
        for first in range(0, longest, step):
            for index, output in enumerate(self.outputs):
                if first < len(output.token_ids):
                    yield index, first, min(first + step, len(output.token_ids))

    def endings(
        self, sent: Sequence[int], *, cancelled: bool
    ) -> tuple[list[inference_pb2.SampleEnd], inference_pb2.StreamEnd]:
        """The last events, after so many tokens of each sample. One that is whole was not cancelled."""
        sample_ends = []
        for index, (output, num_sent) in enumerate(zip(self.outputs, sent, strict=True)):
            cut = cancelled and (num_sent < len(output.token_ids) or len(sent) == 1)
            sample_ends.append(
                inference_pb2.SampleEnd(
                    index=index,
                    finish_reason=types_pb2.FINISH_REASON_CANCELLED if cut else output.finish_reason,
                    stop_match=None if cut else output.stop_match,
                    output_tokens=num_sent,
                )
            )
        num_tokens = sum(sent)
        end = inference_pb2.StreamEnd(
            usage=types_pb2.Usage(prompt_tokens=len(self.prompt_ids), output_tokens=num_tokens),
            timings=self._timings(num_tokens),
            prompt_logprobs=self._prompt_logprobs(),
        )
        return sample_ends, end

    def _prompt_logprobs(self) -> list[types_pb2.TokenLogprob]:
        """Log-probabilities of the prompt, if asked for."""
        output = self.request.output
        wanted = output.prompt_logprobs if output.HasField("prompt_logprobs") else None
        return logprobs(self.prompt_ids, wanted, prompt=True)

    def delta(self, index: int, first: int, last: int) -> inference_pb2.StreamDelta:
        """The output tokens of a sample from `first` up to `last`."""
        wanted = self.request.output
        whole = self.outputs[index].token_ids
        token_ids = whole[first:last]
        return inference_pb2.StreamDelta(
            index=index,
            token_offset=first,
            token_count=len(token_ids),
            text="" if wanted.omit_text else decode(token_ids),
            token_ids=token_ids if wanted.token_ids else (),
            logprobs=logprobs(whole, wanted.logprobs if wanted.HasField("logprobs") else None)[first:last],
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
