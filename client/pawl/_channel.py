"""Where a client connects, and how: channel arguments, encryption, call metadata.

Owns everything that gRPC is told when a channel is made; the transports make it. gRPC's own retries are off:
the SDK does its own (`_retry`), because only it knows whether output was delivered.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc
import grpc.aio

from pawl._logging import logger
from pawl._options import TLS, Settings
from pawl._version import __version__
from pawl.errors import FieldViolation, InvalidRequest

__all__ = ["MAX_MESSAGE_BYTES", "channel_options", "metadata", "open_async_channel", "open_channel"]

# Long prompts as token ids with log-probabilities pass gRPC's 4 MiB default easily.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_SEVERAL_ADDRESSES = ("dns:", "ipv4:", "ipv6:")
_INTERNAL_TOKEN_KEY = "pawl-internal-token"  # noqa: S105 (name of the metadata key, not a secret)
_ROUND_ROBIN = '{"loadBalancingConfig": [{"round_robin": {}}]}'


def channel_options(settings: Settings) -> list[tuple[str, str | int]]:
    """Channel arguments, in gRPC's own names."""
    options: list[tuple[str, str | int]] = [
        ("grpc.enable_retries", 0),
        ("grpc.primary_user_agent", f"pawl-python/{__version__}"),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # In gRPC's core this is also the time limit of one attempt to connect.
        ("grpc.min_reconnect_backoff_ms", max(1, round(settings.connect_timeout * 1000))),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 8_000),
        # Each client has its own connection, and its own backoff after a failure.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if settings.target.startswith(_SEVERAL_ADDRESSES):
        options.append(("grpc.service_config", _ROUND_ROBIN))
    if settings.tls is not None and settings.tls.server_name:
        options.append(("grpc.ssl_target_name_override", settings.tls.server_name))
    return options


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise InvalidRequest(what, violations=[FieldViolation("tls", what)]) from error


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.certificate_file),
    )


def open_channel(settings: Settings) -> grpc.Channel:
    """A sync channel. Does not connect before the first call."""
    _warn_of_open_secrets(settings)
    options = channel_options(settings)
    if settings.tls is None:
        return grpc.insecure_channel(settings.target, options=options)
    return grpc.secure_channel(settings.target, _credentials(settings.tls), options=options)


def open_async_channel(settings: Settings) -> grpc.aio.Channel:
    """An async channel, bound to the running event loop. Does not connect before the first call."""
    _warn_of_open_secrets(settings)
    options = channel_options(settings)
    if settings.tls is None:
        return grpc.aio.insecure_channel(settings.target, options=options)
    return grpc.aio.secure_channel(settings.target, _credentials(settings.tls), options=options)


def metadata(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Metadata of every call. As call metadata the secrets also work on a connection without encryption."""
    pairs: list[tuple[str, str]] = []
    if settings.api_key:
        pairs.append(("authorization", f"Bearer {settings.api_key}"))
    if settings.internal_token:
        pairs.append((_INTERNAL_TOKEN_KEY, settings.internal_token))
    return tuple(pairs)


def _warn_of_open_secrets(settings: Settings) -> None:
    secrets = [
        name for name, secret in (("API key", settings.api_key), ("internal token", settings.internal_token)) if secret
    ]
    if secrets and settings.tls is None and not _is_local(settings.target):
        what = " and the ".join(secrets)
        logger.warning("the %s goes to %s without encryption; pass tls=True", what, settings.target)


def _is_local(target: str) -> bool:
    if target.startswith(("unix:", "localhost", "dns:///localhost")):
        return True
    host = target.rpartition("/")[2].rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
