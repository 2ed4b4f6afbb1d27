"""Bad input of Generate and StreamGenerate, field by field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from pawl.v1 import inference_pb2, types_pb2
from tests.e2e.bad_input import INF, NAN, Row, generate, ids, text
from tests.fakes.tokenizer import CONTEXT, VOCAB_SIZE

__all__ = ["GENERATE_ROWS"]


def _generate(name: str, fields: str | Sequence[str], limit: str = "", **parts: Any) -> Row:
    paths = (fields,) if isinstance(fields, str) else tuple(fields)
    return Row(name, "InferenceService/Generate", generate(**parts), paths, limit=limit)


def _sampling(name: str, field: str, limit: str = "", **values: Any) -> Row:
    return _generate(name, f"sampling.{field}", limit, sampling=types_pb2.SamplingParams(**values))


def _stop(name: str, field: str, limit: str = "", **values: Any) -> Row:
    return _generate(name, f"stop.{field}", limit, stop=types_pb2.StopParams(**values))


def _output(name: str, field: str, limit: str = "", **values: Any) -> Row:
    return _generate(name, f"output.{field}", limit, output=types_pb2.OutputOptions(**values))


def _options(name: str, field: str, limit: str = "", **values: Any) -> Row:
    return _generate(name, f"options.{field}", limit, options=types_pb2.RequestOptions(**values))


def _stream(name: str, field: str, request: inference_pb2.GenerateRequest, **stream: Any) -> Row:
    options = inference_pb2.StreamOptions(**stream)
    message = inference_pb2.StreamGenerateRequest(request=request, stream=options)
    return Row(name, "InferenceService/StreamGenerate", message, (field,))


PROMPTS = [
    Row("empty-message", "InferenceService/Generate", inference_pb2.GenerateRequest(), ("prompt",)),
    _generate("prompt-of-no-kind", "prompt", prompt=types_pb2.Prompt()),
    _generate("prompt-empty", "prompt", prompt=types_pb2.Prompt(text="", add_special_tokens=False)),
    _generate("prompt-no-ids", "prompt.token_ids.ids", prompt=ids()),
    _generate("prompt-negative-id", "prompt.token_ids.ids[0]", prompt=ids(-1)),
    _generate("prompt-unknown-id", "prompt.token_ids.ids[1]", prompt=ids(5, VOCAB_SIZE)),
    _generate("prompt-huge-id", "prompt.token_ids.ids[2]", prompt=ids(5, 6, 2**31 - 1)),
    _generate(
        "prompt-ids-with-specials",
        "prompt.add_special_tokens",
        prompt=types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=[5]), add_special_tokens=True),
    ),
    _generate("prompt-fills-context", "prompt", prompt=ids(*[5] * CONTEXT)),
    _generate("prompt-beyond-context", "prompt", prompt=ids(*[5] * 5000)),
    _generate("prompt-text-beyond-context", "prompt", prompt=text("x" * 400)),
    _generate("prompt-bytes", "prompt.text", "max_prompt_bytes", prompt=text("\N{EURO SIGN}" * 200 + "x")),
    _generate("prompt-tokens", "prompt", "max_prompt_tokens", prompt=ids(*[5] * 201)),
]
SAMPLING = [
    _sampling("temperature-negative", "temperature", temperature=-0.1),
    _sampling("temperature-nan", "temperature", temperature=NAN),
    _sampling("temperature-infinite", "temperature", temperature=INF),
    _sampling("top-p-zero", "top_p", top_p=0.0),
    _sampling("top-p-over-one", "top_p", top_p=1.0001),
    _sampling("top-p-nan", "top_p", top_p=NAN),
    _sampling("top-p-minus-infinite", "top_p", top_p=-INF),
    _sampling("top-k-zero", "top_k", top_k=0),
    _sampling("top-k-negative", "top_k", top_k=-1),
    _sampling("top-k-over-vocabulary", "top_k", top_k=VOCAB_SIZE + 1),
    _sampling("min-p-negative", "min_p", min_p=-0.01),
    _sampling("min-p-nan", "min_p", min_p=NAN),
    _sampling("repetition-penalty-zero", "repetition_penalty", repetition_penalty=0.0),
    _sampling("repetition-penalty-infinite", "repetition_penalty", repetition_penalty=INF),
    _sampling("presence-penalty", "presence_penalty", presence_penalty=-2.01),
    _sampling("frequency-penalty-nan", "frequency_penalty", frequency_penalty=NAN),
    _sampling("constraint-schema-empty", "json_schema", json_schema=" "),
    _sampling("constraint-schema-not-json", "json_schema", json_schema='{"type": '),
    _sampling("constraint-schema-nan", "json_schema", json_schema='{"const": NaN}'),
    _sampling("constraint-schema-too-deep", "json_schema", json_schema="[" * 400),
    _sampling("constraint-schema-no-object", "json_schema", json_schema="[1]"),
    _sampling("constraint-schema-large", "json_schema", "max_constraint_bytes", json_schema='"' + "a" * 400),
    _sampling("constraint-regex-empty", "regex", regex=""),
    _sampling("constraint-regex-null", "regex", regex="a\0b"),
    _sampling("constraint-regex-large", "regex", "max_constraint_bytes", regex="é" * 201),
    _sampling("constraint-grammar-empty", "grammar", grammar="\n"),
    _sampling("constraint-grammar-large", "grammar", "max_constraint_bytes", grammar="a" * 401),
    _sampling("constraint-choices-none", "choices.values", choices=types_pb2.Choices()),
    _sampling("constraint-choices-empty", "choices.values[1]", choices=types_pb2.Choices(values=["a", ""])),
    _sampling("constraint-choices-twice", "choices.values[2]", choices=types_pb2.Choices(values=["a", "b", "a"])),
    _sampling(
        "constraint-choices-many",
        "choices.values",
        "max_choices",
        choices=types_pb2.Choices(values=[str(i) for i in range(11)]),
    ),
    _sampling(
        "constraint-choices-large",
        "choices",
        "max_constraint_bytes",
        choices=types_pb2.Choices(values=["a" * 200, "b" * 201]),
    ),
    _generate(
        "constraint-and-stops",
        ("stop.stop_strings", "stop.stop_token_ids", "stop.ignore_eos"),
        sampling=types_pb2.SamplingParams(regex="a+"),
        stop=types_pb2.StopParams(stop_strings=["b"], stop_token_ids=[3], ignore_eos=True),
    ),
    _sampling("seed-negative", "seed", seed=-(2**63)),
    _sampling("bias-of-unknown-token", f"logit_bias[{VOCAB_SIZE}]", logit_bias={VOCAB_SIZE: 1.0}),
    _sampling("bias-of-negative-token", "logit_bias[-1]", logit_bias={-1: 1.0}),
    _sampling("bias-nan", "logit_bias[5]", logit_bias={5: NAN}),
    _sampling("bias-too-large", "logit_bias[5]", logit_bias={5: 100.5}),
    _sampling("samples-none", "sample_count", sample_count=0),
    _sampling("samples", "sample_count", "max_samples", sample_count=13),
    _sampling("samples-huge", "sample_count", "max_samples", sample_count=2**31 - 1),
    _sampling("samples-alike", "sample_count", sample_count=2, temperature=0.0),
    _sampling("biases", "logit_bias", "max_logit_bias", logit_bias=dict.fromkeys(range(6), 1.0)),
    _generate(
        "many-fields-at-once",
        ("prompt", "sampling.temperature", "sampling.top_p", "stop.max_output_tokens", "options.priority"),
        prompt=types_pb2.Prompt(),
        sampling=types_pb2.SamplingParams(temperature=NAN, top_p=2.0),
        stop=types_pb2.StopParams(max_output_tokens=0),
        options=types_pb2.RequestOptions(priority=99),
    ),
]
STOP = [
    _stop("output-of-nothing", "max_output_tokens", max_output_tokens=0),
    _stop("output-negative", "max_output_tokens", max_output_tokens=-(2**31)),
    _stop("output-tokens", "max_output_tokens", "max_output_tokens", max_output_tokens=221),
    _stop("least-output-tokens", "min_output_tokens", "max_output_tokens", min_output_tokens=221),
    _stop("least-negative", "min_output_tokens", min_output_tokens=-1),
    _stop("least-over-most", "min_output_tokens", min_output_tokens=9, max_output_tokens=8),
    _generate(
        "output-beyond-context",
        "stop.max_output_tokens",
        prompt=ids(*[5] * 100),
        stop=types_pb2.StopParams(max_output_tokens=CONTEXT - 99),
    ),
    _generate(
        "least-beyond-context",
        "stop.min_output_tokens",
        prompt=ids(*[5] * 100),
        stop=types_pb2.StopParams(min_output_tokens=CONTEXT - 99),
    ),
    _stop("stop-string-empty", "stop_strings[1]", stop_strings=["a", ""]),
    _stop("stop-strings", "stop_strings", "max_stop_strings", stop_strings=["a", "b", "c", "d"]),
    _stop("stop-string-bytes", "stop_strings[0]", "max_stop_string_bytes", stop_strings=["x" * 17]),
    _stop("stop-token-unknown", "stop_token_ids[0]", stop_token_ids=[VOCAB_SIZE]),
    _stop("stop-tokens", "stop_token_ids", "max_stop_token_ids", stop_token_ids=[5, 6, 7, 8, 9]),
    _stop("duration-zero", "max_duration", max_duration=Duration()),
    _stop("duration-negative", "max_duration", max_duration=Duration(seconds=-5)),
    _stop("duration-of-two-signs", "max_duration", max_duration=Duration(seconds=5, nanos=-1)),
    _stop("duration-of-too-many-nanos", "max_duration", max_duration=Duration(nanos=2_000_000_000)),
    _stop("duration-out-of-the-world", "max_duration", max_duration=Duration(seconds=2**62)),
    _stop("duration", "max_duration", "max_duration_s", max_duration=Duration(seconds=60, nanos=1)),
]
OUTPUT = [
    _output("logprobs-negative", "logprobs", logprobs=-1),
    _output("prompt-logprobs-negative", "prompt_logprobs", prompt_logprobs=-1),
    _output("logprobs", "logprobs", "max_logprobs", logprobs=7),
    _output("prompt-logprobs", "prompt_logprobs", "max_logprobs", prompt_logprobs=7),
    _generate(
        "stop-strings-without-text",
        "output.omit_text",
        stop=types_pb2.StopParams(stop_strings=["a"]),
        output=types_pb2.OutputOptions(omit_text=True),
    ),
    _options("id-too-long", "request_id", request_id="x" * 129),
    _options("id-with-a-space", "request_id", request_id="a b"),
    _options("id-with-a-line-break", "request_id", request_id="a\r\nset-cookie: b"),
    _options("id-not-ascii", "request_id", request_id="\N{EURO SIGN}"),
    _options("priority-over-the-callers", "priority", priority=4),
    _options("priority-too-low", "priority", priority=-11),
    _options("salt-too-long", "cache_salt", cache_salt="x" * 257),
    _options("retain-zero", "retain_prefix", retain_prefix=Duration()),
    _options("retain-negative", "retain_prefix", retain_prefix=Duration(seconds=-1)),
    _options("retain-too-long", "retain_prefix", "max_retain_prefix_s", retain_prefix=Duration(seconds=3601)),
    _options("retain-without-cache", "retain_prefix", retain_prefix=Duration(seconds=1), bypass_prefix_cache=True),
    _options("user-too-long", "user", user="x" * 129),
    _stream("stream-of-nothing", "request.prompt", inference_pb2.GenerateRequest()),
    _stream("stream-beyond-context", "request.prompt", generate(prompt=ids(*[5] * CONTEXT))),
    _stream("chunk-of-no-tokens", "stream.min_chunk_tokens", generate(), min_chunk_tokens=0),
    _stream("chunk-too-large", "stream.min_chunk_tokens", generate(), min_chunk_tokens=1025),
    _stream("chunks-too-rare", "stream.min_chunk_interval", generate(), min_chunk_interval=Duration(seconds=11)),
]
GENERATE_ROWS: list[Row] = [*PROMPTS, *SAMPLING, *STOP, *OUTPUT]
