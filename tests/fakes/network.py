"""What of the network a test needs and a machine may not have."""

from __future__ import annotations

import socket

__all__ = ["has_ipv6"]


def has_ipv6() -> bool:
    """Whether the loopback of IPv6 can be bound."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
