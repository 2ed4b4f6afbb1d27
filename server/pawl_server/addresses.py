"""Hosts and ports as words: one address written as gRPC and HTTP read it, and who can reach it."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["family_of", "host_port", "is_any", "is_loopback"]


def host_port(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_any(host: str) -> bool:
    """Whether a listener on `host` is on every interface."""
    return host.strip("[]") in ("0.0.0.0", "::")  # noqa: S104 (compared, not bound)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def family_of(host: str) -> socket.AddressFamily:
    """The family in which `host` is to be bound.

    Raises:
        OSError: the name is not known.
    """
    return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
