"""The two listeners of a front end: the public one and that of operators.

Owns ports, gRPC options, TLS and which service is on which listener; what the services do is theirs.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pawl.errors import Unauthenticated, Unavailable
from pawl.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from pawl_server.addresses import host_port, is_loopback
from pawl_server.config import FrontendSettings, LimitSettings
from pawl_server.engine.link.auth import TOKEN_KEY
from pawl_server.frontend.admin_service import AdminService
from pawl_server.frontend.auth import ANONYMOUS, KeyFile, Principal, presented_key
from pawl_server.frontend.core import Core
from pawl_server.frontend.health import Health
from pawl_server.frontend.interceptors import Authenticate, CallInterceptor
from pawl_server.frontend.model_service import ModelService
from pawl_server.frontend.service import InferenceService
from pawl_server.frontend.tls import server_credentials
from pawl_server.frontend.tokenizer_service import TokenizerService

__all__ = ["ADMIN_SERVICES", "PUBLIC_SERVICES", "Listener", "admin_listener", "public_listener", "server_options"]

log = logging.getLogger(__name__)

PUBLIC_SERVICES = [
    pb2.DESCRIPTOR.services_by_name[name].full_name
    for pb2, name in (
        (inference_pb2, "InferenceService"),
        (tokenizer_pb2, "TokenizerService"),
        (model_pb2, "ModelService"),
    )
]
ADMIN_SERVICES = [admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_CONNECTION_AGE_MS = 30 * 60 * 1000  # then clients connect anew, so that a front end that was added gets its share


class Listener:
    """A server and where it listens."""

    def __init__(
        self, server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
    ) -> None:
        self.server = server
        wanted = host_port(host, port)
        try:
            if credentials is None:
                bound = server.add_insecure_port(wanted)
            else:
                bound = server.add_secure_port(wanted, credentials)
        except RuntimeError as error:
            text = f"cannot listen on {wanted}: the port is in use, or the address is none of this machine"
            raise Unavailable(text, reason="PORT_IN_USE") from error
        self.address = host_port(host, bound)


def server_options(settings: FrontendSettings, limits: LimitSettings) -> list[tuple[str, int]]:
    """Options for gRPC, the same on both listeners."""
    return [
        # Off by default, since a stale process on the same port would take connections away in silence.
        ("grpc.so_reuseport", 1 if settings.frontends > 1 else 0),
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.keepalive_time_ms", round(settings.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ("grpc.max_connection_age_ms", _CONNECTION_AGE_MS),
        # Streams on an old connection may run as long as any request may.
        ("grpc.max_connection_age_grace_ms", min(round(limits.max_duration_s * 1000) + 60_000, 2**31 - 1)),
    ]


def public_listener(core: Core, health: Health) -> Listener:
    """The listener of clients; not started yet.

    Raises:
        PawlError: the port is in use, or a TLS or key file is wrong.
    """
    config = core.config
    credentials = server_credentials(config.security)
    keys = KeyFile(Path(config.security.api_key_file)) if config.security.api_key_file else None

    def authenticate(metadata: Iterable[tuple[str, str | bytes]]) -> Principal:
        return ANONYMOUS if keys is None else keys.authenticate(presented_key(metadata))

    server = _server(core, authenticate)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(core), server)
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(TokenizerService(core), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(core), server)
    _add_common(server, health, PUBLIC_SERVICES)
    return Listener(server, config.frontend.host, config.frontend.port, credentials)


def admin_listener(core: Core, health: Health) -> Listener:
    """The listener of operators; not started yet. Beyond loopback it wants the internal token.

    Raises:
        PawlError: the port is in use.
    """
    settings = core.config.frontend
    open_to_others = not is_loopback(settings.admin_host)

    def authenticate(metadata: Iterable[tuple[str, str | bytes]]) -> Principal:
        if open_to_others:
            given = [value for name, value in metadata if name == TOKEN_KEY and isinstance(value, str)]
            if not given or not hmac.compare_digest(given[0].encode(), core.token.encode()):
                text = (
                    "the admin listener is open to other machines and wants the server's internal token:"
                    " --internal-token-file, PAWL_INTERNAL_TOKEN, or AdminClient(internal_token=...),"
                    f" which send it as `{TOKEN_KEY}`"
                )
                raise Unauthenticated(text, reason="INTERNAL_TOKEN_INVALID")
        return ANONYMOUS

    server = _server(core, authenticate)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(core), server)
    _add_common(server, health, ADMIN_SERVICES)
    credentials = server_credentials(core.config.security) if open_to_others else None
    return Listener(server, settings.admin_host, settings.admin_port, credentials)


def _server(core: Core, authenticate: Authenticate) -> grpc.aio.Server:
    options = server_options(core.config.frontend, core.limits)
    return grpc.aio.server(interceptors=[CallInterceptor(core, authenticate)], options=options)


def _add_common(server: grpc.aio.Server, health: Health, services: list[str]) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    reflection.enable_server_reflection([*services, _HEALTH, reflection.SERVICE_NAME], server)
