"""What can be set: each section of the settings, with its defaults and its words of help.

Owns the declarations alone; `config` reads and checks what they are set to. Lies below everything in the server and
imports nothing of it.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field

__all__ = [
    "MAX_CHUNK_TOKENS",
    "EngineSettings",
    "FleetSettings",
    "FrontendSettings",
    "LimitSettings",
    "LogSettings",
    "ModelSettings",
    "SecuritySettings",
    "Value",
]

Value = str | int | float | bool | None

MAX_CHUNK_TOKENS = 1024
"""Most tokens that a message of a stream can be made to wait for, by its request or by `stream_interval`."""


def _setting(default: Value, text: str, *, common: bool = False, secret: bool = False) -> typing.Any:  # noqa: ANN401 (as dataclasses.field)
    return field(default=default, metadata={"help": text, "common": common, "secret": secret})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which checkpoint, and how it computes."""

    model: str = _setting("demo", "checkpoint directory, hub id, or 'demo' (the embedded model)", common=True)
    served_name: str = _setting("", "id under which the model is served; empty = last part of `model`")
    revision: str = _setting("", "hub revision; empty = the default branch")
    device: str = _setting("auto", "auto, cpu or cuda", common=True)
    dtype: str = _setting("auto", "auto, float32, bfloat16 or float16", common=True)
    kernels: str = _setting("auto", "auto, reference, cpu, onednn or triton")
    kv_dtype: str = _setting("auto", "cached keys and values: auto (as computed), float32, float16 or int8 (cpu)")
    weight_dtype: str = _setting(
        "auto", "linear layers: auto (exact), int8 or, with a scale per N inputs, int8_g32, _g64, _g128"
    )
    strict: bool = _setting(False, "on cuda: results that no other request can touch, to the bit, at some speed")
    screen_head: bool = _setting(
        True,
        "on a cpu: the head in bytes too, by which greedy requests read half of it; false spares its memory",
    )
    dummy_weights: bool = _setting(
        False, "random weights in the shapes of the checkpoint's config.json, for benchmarks"
    )
    max_context: int = _setting(0, "most tokens of prompt and output; 0 = the model's own limit", common=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One replica: batch, KV cache, step loop."""

    max_running: int = _setting(64, "most sequences running at once", common=True)
    max_batch_tokens: int = _setting(512, "most tokens computed in a step", common=True)
    max_prefill_chunk: int = _setting(256, "most prompt tokens of one sequence in a step")
    max_partial_prefills: int = _setting(4, "most sequences in mid-prompt at once")
    target_gap_s: float = _setting(
        0.0, "time between the tokens of a stream that prompts beside it should not exceed; 0 = no target"
    )
    max_waiting: int = _setting(4096, "most sequences waiting inside a replica")
    num_blocks: int = _setting(0, "KV blocks; 0 = what kv_memory_fraction gives", common=True)
    kv_memory_fraction: float = _setting(0.25, "share of the free memory for the KV cache, (0, 0.95]", common=True)
    kv_max_bytes: int = _setting(4 << 30, "most bytes for the KV cache when num_blocks is 0; 0 = no limit")
    host_kv_bytes: int = _setting(0, "bytes of host memory for cached KV blocks that leave the device; 0 = none")
    prefix_cache: bool = _setting(True, "reuse the KV of equal prompt beginnings", common=True)
    retained_share: float = _setting(0.25, "share of the blocks that callers may ask to keep, [0, 0.9]")
    watermark: float = _setting(0.01, "share of the blocks kept free at admission, [0, 0.5]")
    max_bypass: int = _setting(8, "how often a sequence that does not fit may be overtaken")
    pipeline_depth: int = _setting(
        0,
        "steps in flight at once: 2 plans the next one while one is computed; 0 = 2 on a GPU that can, else 1",
    )
    speculation: str = _setting(
        "off",
        "drafts that a step verifies beside the next token: ngram (the text so far, what a grammar forces) or off",
    )
    speculation_tokens: int = _setting(8, "most drafts of one sequence in a step, 1 to 32")
    max_preemptions: int = _setting(4, "how often a sequence may lose its blocks to others, at least 1")
    preempt_below: int = _setting(5, "a request takes the blocks of those whose class is lower by so much; 0 = never")
    output_quantile: float = _setting(0.1, "quantile of the outputs seen that admission keeps blocks for, [0, 0.95]")
    ageing_s: float = _setting(30.0, "a request that waited so long rises by one priority class; 0 = never")
    grammar_threads: int = _setting(
        2, "constraints (JSON schemas, grammars, ...) compiled at once, and threads for masks"
    )
    grammar_timeout_s: float = _setting(10.0, "a constraint not compiled by then is refused")
    max_grammars: int = _setting(64, "compiled constraints kept for the next request with the same one")
    max_grammar_bytes: int = _setting(256 << 20, "bytes that these may take together, and any one of them")
    num_threads: int = _setting(0, "compute threads of a replica; 0 = cores / replicas", common=True)
    step_timeout_s: float = _setting(60.0, "a step that takes longer means a hung worker: the replica is rebuilt")
    check_every: int = _setting(0, "check the scheduler's invariants every n steps; 0 = never")
    journal: str = _setting(
        "", "file (and .REPLICA) for `python -m pawl_server.sim replay`: decisions, no text or token"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Replicas: how many, where, and what happens when one dies."""

    fleet: str = _setting(
        "ray", "ray, local (plain subprocesses), or HOST:PORT of a fleet (for `pawl frontend`)", common=True
    )
    replicas: int = _setting(1, "engines, each with the whole model", common=True)
    fleet_host: str = _setting("127.0.0.1", "where the fleet listens for front ends")
    fleet_port: int = _setting(0, "its port; 0 = any free one (50060 for `pawl fleet`)")
    engine_host: str = _setting("127.0.0.1", "where engines listen for front ends")
    engine_ports: str = _setting("0", "port range of the engines, such as 50100-50199; 0 = any free one")
    engine_metrics_ports: str = _setting("0", "port range of the engines' /metrics; 0 = any free one")
    ray_address: str = _setting("", "Ray cluster to join ('auto' inside one); empty = start a local Ray")
    gpus_per_replica: float = _setting(-1.0, "GPUs that Ray reserves; -1 = 1 on cuda, else 0")
    cpus_per_replica: float = _setting(1.0, "CPUs that Ray reserves")
    start_timeout_s: float = _setting(300.0, "a replica not ready by then is started again")
    backoff_initial_s: float = _setting(0.5, "wait before the second start of a replica")
    backoff_max_s: float = _setting(30.0, "longest wait between starts")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendSettings:
    """The process that clients talk to."""

    host: str = _setting("127.0.0.1", "where clients connect", common=True)
    port: int = _setting(50051, "its port; 0 = any free one", common=True)
    admin_host: str = _setting("127.0.0.1", "where operators connect")
    admin_port: int = _setting(50052, "its port; 0 = any free one", common=True)
    metrics_host: str = _setting("127.0.0.1", "where Prometheus connects")
    metrics_port: int = _setting(9400, "its port; 0 = any free one", common=True)
    frontends: int = _setting(1, "front-end processes sharing the port", common=True)
    max_queued_requests: int = _setting(
        256,
        "admitted requests without a first token at once; more are refused with RESOURCE_EXHAUSTED",
        common=True,
    )
    max_concurrent_streams: int = _setting(4096, "HTTP/2 streams of one connection")
    drain_grace_s: float = _setting(30.0, "how long running requests may finish after SIGTERM", common=True)
    stream_interval: int = _setting(
        1,
        "tokens in a message of a stream that does not say it itself; the first and the last come at once",
        common=True,
    )
    slow_reader_timeout_s: float = _setting(30.0, "a reader that takes nothing for so long is cancelled")
    heartbeat_timeout_s: float = _setting(5.0, "an engine silent for so long counts as lost")
    keepalive_time_s: float = _setting(30.0, "time between keepalive pings")
    keepalive_timeout_s: float = _setting(10.0, "a connection that does not answer a ping for so long is closed")
    prefix_affinity: float = _setting(
        1.0, "weight of cached prefixes against load when a replica is picked; 0 = load alone"
    )
    ready_file: str = _setting("", "file written when the server is ready")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What a single request may ask for. Each is one row of the bad-input table test."""

    max_request_bytes: int = _setting(4 << 20, "bytes of one request message")
    max_metadata_bytes: int = _setting(16 << 10, "bytes of the metadata of one call")
    max_prompt_bytes: int = _setting(1 << 20, "bytes of a prompt's text")
    max_prompt_tokens: int = _setting(0, "tokens of a prompt; 0 = the context limit - 1")
    max_output_tokens: int = _setting(0, "tokens of an output; 0 = the context limit")
    max_stop_strings: int = _setting(16, "stop strings of one request")
    max_stop_string_bytes: int = _setting(256, "bytes of one stop string")
    max_stop_token_ids: int = _setting(64, "stop token ids of one request")
    max_logit_bias: int = _setting(300, "biased tokens of one request")
    max_samples: int = _setting(16, "samples of one request")
    max_constraint_bytes: int = _setting(
        64 << 10, "bytes of a constraint: a JSON schema, regex, grammar or all choices"
    )
    max_choices: int = _setting(256, "choices of one request")
    max_logprobs: int = _setting(20, "alternatives per token")
    max_messages: int = _setting(256, "turns of a conversation")
    max_template_kwargs: int = _setting(16, "variables for the chat template")
    max_continuations: int = _setting(64, "continuations of one Score call")
    max_tokenize_texts: int = _setting(256, "texts or sequences of one tokenizer call")
    max_cancel_ids: int = _setting(1024, "request ids of one Cancel call")
    max_duration_s: float = _setting(3600.0, "a request still running after this ends with TIME_LIMIT")
    max_retain_prefix_s: float = _setting(3600.0, "longest time for which a caller may ask to keep a cached prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecuritySettings:
    """Who may connect, and how."""

    tls_cert: str = _setting("", "PEM certificate chain of the public listener", common=True)
    tls_key: str = _setting("", "its PEM private key", common=True)
    tls_client_ca: str = _setting("", "PEM authorities of client certificates; set = client certificates are required")
    api_key_file: str = _setting("", "TOML file of API key hashes, tenants and limits", common=True)
    internal_token_file: str = _setting(
        "", "file with the token that front ends, engines and fleet share; empty = drawn at start"
    )
    internal_token: str = _setting("", "the token itself (variable only)", secret=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """What is written to stderr."""

    log_level: str = _setting("info", "debug, info, warning or error", common=True)
    log_format: str = _setting("text", "text or json")
