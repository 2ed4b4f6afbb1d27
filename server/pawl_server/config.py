"""Settings: built once, frozen, sliced; each part of the server gets its slice and never the whole.

A setting has one name everywhere: flag `--max-running`, key `max_running` in its section of the TOML file,
variable `PAWL_MAX_RUNNING`. Precedence: flag, variable, file, default. Unknown keys are errors with a
suggestion. Reads and checks; what can be set is declared in `settings`. Lies below everything else in the server.
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
from pawl_server.settings import (
    MAX_CHUNK_TOKENS,
    EngineSettings,
    FleetSettings,
    FrontendSettings,
    LimitSettings,
    LogSettings,
    ModelSettings,
    SecuritySettings,
    Value,
)

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
    "Value",
    "load_config",
    "settings",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings. Build it with `load_config`; hand each part its slice."""

    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    frontend: FrontendSettings = field(default_factory=FrontendSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    security: SecuritySettings = field(default_factory=SecuritySettings)
    log: LogSettings = field(default_factory=LogSettings)

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


_YEAR_S = 31_536_000.0
_MOST = (1 << 63) - 1  # that a count or a number of bytes may be where it is counted in 64 bits
# gRPC takes milliseconds and bytes as signed numbers of 32 bits.
_MOST_GRPC = (1 << 31) - 1
_GRPC_SECONDS = (0.001, float(_MOST_GRPC // 1000))
_SHORTEST_S = 0.01  # of what is waited for: 0 would mean that it never comes in time
# (low, high) of the numbers that have a range; other seconds are in [0, a year], everything else numeric is >= 0.
_RANGES: dict[str, tuple[float, float]] = {
    "kv_memory_fraction": (0.001, 0.95),
    "watermark": (0.0, 0.5),
    "retained_share": (0.0, 0.9),
    "max_retain_prefix_s": (0.001, _YEAR_S),
    "step_timeout_s": (_SHORTEST_S, _YEAR_S),
    "start_timeout_s": (_SHORTEST_S, _YEAR_S),
    "heartbeat_timeout_s": (_SHORTEST_S, _YEAR_S),
    "slow_reader_timeout_s": (_SHORTEST_S, _YEAR_S),
    "max_duration_s": (_SHORTEST_S, _YEAR_S),
    "keepalive_time_s": _GRPC_SECONDS,
    "keepalive_timeout_s": _GRPC_SECONDS,
    "max_concurrent_streams": (1, _MOST_GRPC),
    "max_request_bytes": (1, _MOST_GRPC),
    "max_metadata_bytes": (1, _MOST_GRPC),
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
    "stream_interval": (1, MAX_CHUNK_TOKENS),
    "max_waiting": (1, _MOST),
    "max_queued_requests": (1, _MOST),
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
        low, high = _RANGES.get(setting.name, (0, _YEAR_S if setting.name.endswith("_s") else _MOST))
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
    except ValueError as error:  # of TOML, and of UTF-8
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
