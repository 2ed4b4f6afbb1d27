"""Settings: built once, frozen, sliced; each part of the server gets its slice and never the whole.

A setting has one name everywhere: flag `--max-running`, key `max_running` in its section of the TOML file,
variable `PAWL_MAX_RUNNING`. Precedence: flag, variable, file, default. Unknown keys are errors with a
suggestion. Lies below everything in the server and imports nothing of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pawl.errors import InvalidRequest

__all__ = [
    "Config",
    "EngineSettings",
    "FleetSettings",
    "FrontendSettings",
    "LimitSettings",
    "LogSettings",
    "ModelSettings",
    "SecuritySettings",
    "Setting",
    "load_config",
    "settings",
]

Value = str | int | float | bool | None


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
        "drafts that a step verifies beside the next token: ngram (from the text so far) or off; same output",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings. Build it with `load_config`; hand each part its slice."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    fleet: FleetSettings = FleetSettings()
    frontend: FrontendSettings = FrontendSettings()
    limits: LimitSettings = LimitSettings()
    security: SecuritySettings = SecuritySettings()
    log: LogSettings = LogSettings()

    def shown(self) -> dict[str, str]:
        """Settings by `section.name`, secrets redacted."""
        return {
            f"{s.section}.{s.name}": ("***" if s.secret and value else str(value))
            for s in settings()
            for value in [getattr(getattr(self, s.section), s.name)]
        }

    def replace(self, **values: Value) -> Config:
        """A new Config with the named settings changed.

        Raises:
            InvalidRequest: no setting has that name, or the value is out of range.
        """
        return _build({name: (value, "caller") for name, value in values.items()}, self)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: where it lives and what it means."""

    section: str
    name: str
    kind: type
    default: Value
    help: str
    common: bool
    secret: bool

    @property
    def flag(self) -> str:
        """Flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Variable in the environment."""
        return "PAWL_" + self.name.upper()


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the sections."""
    for section in dataclasses.fields(Config):
        section_class = typing.get_type_hints(Config)[section.name]
        kinds = typing.get_type_hints(section_class)
        for item in dataclasses.fields(section_class):
            kind = kinds[item.name]
            yield Setting(
                section.name,
                item.name,
                kind,
                typing.cast("Value", item.default),
                item.metadata["help"],
                item.metadata["common"],
                item.metadata["secret"],
            )


# (low, high) of the numbers that have a range; everything else numeric is >= 0.
_RANGES: dict[str, tuple[float, float]] = {
    "kv_memory_fraction": (0.001, 0.95),
    "watermark": (0.0, 0.5),
    "retained_share": (0.0, 0.9),
    "max_retain_prefix_s": (0.001, 31_536_000.0),
    "max_preemptions": (1, 1 << 20),
    "pipeline_depth": (0, 2),
    "speculation_tokens": (1, 32),
    "output_quantile": (0.0, 0.95),
    "preempt_below": (0, 20),
    "port": (0, 65535),
    "admin_port": (0, 65535),
    "metrics_port": (0, 65535),
    "fleet_port": (0, 65535),
    "replicas": (1, 1024),
    "frontends": (1, 64),
    "max_running": (1, 65536),
    "max_batch_tokens": (1, 1 << 20),
    "max_prefill_chunk": (1, 1 << 20),
    "grammar_threads": (1, 64),
    "grammar_timeout_s": (0.01, 3600.0),
    "max_grammars": (1, 65536),
    "max_grammar_bytes": (1 << 16, 1 << 40),
    "max_partial_prefills": (1, 65536),
    "gpus_per_replica": (-1, 1024),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "kernels": ("auto", "reference", "cpu", "onednn", "triton"),
    "kv_dtype": ("auto", "float32", "float16", "int8"),
    "weight_dtype": ("auto", "int8", "int8_g32", "int8_g64", "int8_g128"),
    "speculation": ("off", "ngram"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("text", "json"),
}
_WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _convert(setting: Setting, raw: Value, origin: str) -> Value:
    """One raw value as the setting's type, checked against its range."""
    where = f"{setting.name} = {'***' if setting.secret else raw!r} ({origin})"
    try:
        value: Value
        if setting.kind is bool:
            value = raw if isinstance(raw, bool) else _WORDS[str(raw).strip().lower()]
        elif isinstance(raw, bool) or raw is None:
            raise ValueError  # noqa: TRY301 (one place words the message)
        elif setting.kind is int:
            value = int(raw) if not isinstance(raw, float) or raw.is_integer() else int(str(raw))
        else:
            value = setting.kind(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{where}: not a {setting.kind.__name__}", reason="BAD_SETTING") from error
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = _RANGES.get(setting.name, (0, float("inf")))
        if not low <= value <= high:
            raise InvalidRequest(f"{where}: must be between {low} and {high}", reason="BAD_SETTING")
    choices = _CHOICES.get(setting.name)
    if choices and value not in choices:
        raise InvalidRequest(f"{where}: must be one of {', '.join(choices)}", reason="BAD_SETTING")
    return value


def _build(values: Mapping[str, tuple[Value, str]], base: Config) -> Config:
    known = {s.name: s for s in settings()}
    sections: dict[str, dict[str, Value]] = {}
    for name, (raw, origin) in values.items():
        if name not in known:
            raise InvalidRequest(_unknown(name, origin, known), reason="UNKNOWN_SETTING")
        setting = known[name]
        sections.setdefault(setting.section, {})[name] = _convert(setting, raw, origin)
    changed = {
        section: dataclasses.replace(getattr(base, section), **slice_values)
        for section, slice_values in sections.items()
    }
    return dataclasses.replace(base, **changed)


def _unknown(name: str, origin: str, known: Mapping[str, Setting]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown setting {name!r} ({origin})" + (f": did you mean {close[0]!r}?" if close else "")


def _from_file(path: Path) -> dict[str, tuple[Value, str]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", reason="BAD_SETTING") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{path} is not TOML: {error}", reason="BAD_SETTING") from error
    sections = {s.section for s in settings()}
    by_name = {s.name: s.section for s in settings()}
    values: dict[str, tuple[Value, str]] = {}
    for section, items in document.items():
        if section not in sections or not isinstance(items, dict):
            close = difflib.get_close_matches(section, sections, n=1)
            hint = f": did you mean [{close[0]}]?" if close else f": sections are {', '.join(sorted(sections))}"
            raise InvalidRequest(f"unknown section [{section}] in {path}{hint}", reason="UNKNOWN_SETTING")
        for name, value in items.items():
            if by_name.get(name, section) != section:
                raise InvalidRequest(
                    f"{name!r} in {path} belongs to [{by_name[name]}], not [{section}]",
                    reason="UNKNOWN_SETTING",
                )
            values[name] = (value, f"{path}, [{section}]")
    return values


def load_config(
    flags: Mapping[str, Value] | None = None,
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Build the Config from flags, `PAWL_*` variables, a TOML file and the defaults.

    Variables of the SDK (PAWL_TARGET, PAWL_API_KEY, PAWL_TIMEOUT, PAWL_LOG) are not settings and are skipped.

    Raises:
        InvalidRequest: an unknown name (with a suggestion) or a value out of range; the message says where it
            came from.
    """
    environment = os.environ if environment is None else environment
    known = {s.variable: s.name for s in settings()}
    values: dict[str, tuple[Value, str]] = {}
    if file is not None:
        values.update(_from_file(file))
    for variable, name in known.items():
        if variable in environment:
            values[name] = (environment[variable], f"variable {variable}")
    for name, value in (flags or {}).items():
        if value is not None:
            values[name] = (value, f"flag --{name.replace('_', '-')}")
    return _build(values, Config())
