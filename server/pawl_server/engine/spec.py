"""What starts an engine, and what a starting engine says: plain data for the fleet and the engine itself.

Owns the JSON that crosses the pipe of `pawl_server.engine.process` and the calls of the Ray actor; imports
neither torch nor Ray, so that whoever builds a spec stays light.
"""

from __future__ import annotations

import msgspec

from pawl.errors import InvalidRequest
from pawl_server.config import EngineSettings, ModelSettings

__all__ = [
    "EngineAddresses",
    "EngineEvent",
    "EngineFailed",
    "EngineProgress",
    "EngineReady",
    "EngineSpec",
    "check_engine",
    "decode_event",
    "decode_spec",
    "encode",
    "parse_ports",
]


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine to start. Holds the shared token, so it travels on a pipe and never on a command line."""

    model: ModelSettings
    engine: EngineSettings
    internal_token: str
    served_name: str = ""  # id of the model towards clients; empty = the last part of `model.model`
    replica: int = 0
    incarnation: int = 1
    host: str = "127.0.0.1"
    advertise_host: str = ""  # what front ends connect to; empty = `host`
    ports: str = "0"  # one port or a range such as 50100-50199; 0 = any free one
    metrics_host: str = ""  # empty = `host`
    metrics_ports: str = "0"
    num_threads: int = 0  # compute threads; 0 = the cores this process may use
    memory_bytes: int = 0  # of the host, for an engine that computes there; 0 = all that is free
    replicas_per_gpu: int = 1  # engines that share a GPU's memory, for one that computes there
    heartbeat_timeout_s: float = 5.0  # a front end silent for so long is gone
    log_level: str = "info"
    log_format: str = "text"

    def advertised_as(self, host: str) -> EngineSpec:
        """The same spec, reached under another host."""
        return msgspec.structs.replace(self, advertise_host=host)

    def __repr__(self) -> str:
        return f"EngineSpec({self.model.model!r}, replica={self.replica}, incarnation={self.incarnation})"


class EngineAddresses(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a started engine listens (host:port), and which process it is."""

    address: str
    metrics_address: str
    process_id: int


class EngineProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="event"):
    """One step of the start: imports, weights, memory, warm-up or self-test.

    `done` and `total` count the step's own units (bytes of weights, warm-up steps); a step is over when they
    are equal and not 0. `facts` are the numbers behind `text`, by name.
    """

    step: str
    done: int = 0
    total: int = 0
    text: str = ""
    seconds: float = 0.0  # since the step began
    facts: dict[str, int] = {}


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready", tag_field="event"):
    """The engine serves."""

    addresses: EngineAddresses
    seconds: float = 0.0  # since the process began to start it


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed", tag_field="event"):
    """The engine could not start, or stopped on an error: the root cause, in words for an operator."""

    code: str
    reason: str
    message: str
    detail: str = ""  # end of the traceback; empty for errors that a setting explains


EngineEvent = EngineProgress | EngineReady | EngineFailed

_encoder = msgspec.json.Encoder()
_spec_decoder = msgspec.json.Decoder(EngineSpec)
_event_decoder: msgspec.json.Decoder[EngineEvent] = msgspec.json.Decoder(EngineEvent)


def encode(message: EngineSpec | EngineEvent) -> bytes:
    """One line of JSON, without its line end."""
    return _encoder.encode(message)


def decode_spec(data: bytes) -> EngineSpec:
    """Decode and type-check a spec.

    Raises:
        msgspec.DecodeError: the bytes are not an EngineSpec.
    """
    return _spec_decoder.decode(data)


def decode_event(data: bytes) -> EngineEvent:
    """Decode and type-check one event.

    Raises:
        msgspec.DecodeError: the bytes are not an event.
    """
    return _event_decoder.decode(data)


def check_engine(engine: EngineSettings) -> None:
    """Check what no setting shows by itself, before a model is loaded.

    Raises:
        InvalidRequest: the settings contradict each other.
    """
    if engine.max_batch_tokens < engine.max_running:
        raise InvalidRequest(
            f"max_batch_tokens = {engine.max_batch_tokens} is below max_running = {engine.max_running}: every running"
            " sequence must be able to get its next token in one step: raise one or lower the other",
            reason="BAD_SETTING",
        )
    if engine.host_kv_bytes and not engine.prefix_cache:
        raise InvalidRequest(
            f"host_kv_bytes = {engine.host_kv_bytes} with prefix_cache = false: only what the prefix cache keeps is"
            " saved to host memory, and without it this must be 0: set host_kv_bytes to 0 or prefix_cache to true",
            reason="BAD_SETTING",
        )
    if engine.speculation != "off" and engine.pipeline_depth > 1:
        raise InvalidRequest(
            f"speculation = {engine.speculation!r} with pipeline_depth = {engine.pipeline_depth}: drafts go on from the"
            " last token, which is not known while a step is in flight: set pipeline_depth to 1 or speculation to off",
            reason="BAD_SETTING",
        )


def parse_ports(text: str, setting: str) -> range:
    """The ports of "0", "50100" or "50100-50199".

    Raises:
        InvalidRequest: the text is none of these; `setting` is named in the message.
    """
    first, dash, last = text.strip().partition("-")
    if first.isdecimal() and (last.isdecimal() if dash else not last):
        ports = range(int(first), int(last or first) + 1)
        if ports and ports[-1] <= 65535 and (ports[0] > 0 or len(ports) == 1):
            return ports
    raise InvalidRequest(
        f"{setting} = {text!r}: must be a port, a range such as 50100-50199, or 0", reason="BAD_SETTING"
    )
