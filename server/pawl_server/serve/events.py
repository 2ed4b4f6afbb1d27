"""What a starting server tells whoever prints it: the protocol between `serve` and the command line."""

from __future__ import annotations

from typing import Protocol

import msgspec

from pawl_server.fleet.replicas import FleetEvent

__all__ = ["Output", "ServerAddresses"]


class ServerAddresses(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a ready server listens (host:port), also the content of the ready file; empty = not served here."""

    grpc: str = ""
    admin: str = ""
    metrics: str = ""
    fleet: str = ""
    model: str = ""
    process_id: int = 0
    token_file: str = ""


class Output(Protocol):
    """Shows a start to people or programs. Called from the event loop; must not block for long."""

    def begin(self, command: str, fleet_kind: str) -> None:
        """The server begins to start."""

    def fleet_event(self, event: FleetEvent) -> None:
        """A replica changed or got further."""

    def warning(self, text: str) -> None:
        """Something that the operator should know, though the server starts."""

    def ready(self, addresses: ServerAddresses) -> None:
        """The server serves. Nothing is shown after this but what goes wrong."""
