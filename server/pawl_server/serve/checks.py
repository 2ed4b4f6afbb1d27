"""What is checked before anything starts: ports, and who could reach the internal listeners.

A start that cannot succeed fails here, with one message that has the numbers and the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import socket

import psutil

from pawl.errors import InvalidRequest, Unavailable
from pawl_server.addresses import host_port, is_loopback
from pawl_server.config import Config

__all__ = ["check_internal_listeners", "check_port", "exposure_warning"]


def check_port(host: str, port: int, flag: str) -> None:
    """Make sure that a port can be bound; 0 always can.

    Raises:
        Unavailable: it is in use (by whom, if we may know), or may not be bound.
        InvalidRequest: the host is none of this machine.
    """
    if port == 0:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the servers do: ports of closed connections are free, ports with a listener are not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(
                f"port {port} on {host} is in use{_holder(port)}: stop it, or choose another with {flag}"
                f" ({flag} 0 = any free one)",
                reason="PORT_IN_USE",
                metadata={"host": host, "port": str(port)},
            ) from error
        if error.errno == errno.EACCES:
            raise Unavailable(
                f"port {port} on {host} may not be bound by this user: choose one above 1023 with {flag}",
                reason="PORT_FORBIDDEN",
            ) from error
        raise InvalidRequest(
            f"cannot listen on {host_port(host, port)} ({error.strerror or error}):"
            f" is {host} an address of this machine?",
            reason="BAD_SETTING",
        ) from error


def _holder(port: int) -> str:
    """Who listens on a port, in words; empty when we may not know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def check_internal_listeners(config: Config, token: str | None, *, admin: bool = False) -> None:
    """Refuse internal listeners that others can reach unless the operator chose their token.

    Args:
        config: the settings.
        token: the token that the settings give, None if there is none.
        admin: whether this process has an admin listener.

    Raises:
        InvalidRequest: a listener is open and no token was given.
    """
    hosts = {"fleet_host": config.fleet.fleet_host, "engine_host": config.fleet.engine_host}
    if admin:
        hosts["admin_host"] = config.frontend.admin_host
    for setting, host in hosts.items():
        if not is_loopback(host) and token is None:
            raise InvalidRequest(
                f"{setting} = {host} is open to other machines and no token protects it: write one to a file"
                " that only you can read (openssl rand -base64 32) and give it to every part with"
                " --internal-token-file, or bind 127.0.0.1",
                reason="TOKEN_NEEDED",
            )


def exposure_warning(config: Config) -> str:
    """What is open to anyone, and the flags that close it; empty if nothing is."""
    host, security = config.frontend.host, config.security
    missing = [
        flag
        for flag, value in (("--tls-cert", security.tls_cert), ("--api-key-file", security.api_key_file))
        if not value
    ]
    if is_loopback(host) or not missing:
        return ""
    return f"open to anyone on {host_port(host, config.frontend.port)}: no {', no '.join(missing)}"
