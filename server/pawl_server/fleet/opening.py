"""Chooses the fleet that the settings ask for, and prepares the environment of a local Ray before Ray is imported.

Owns the protocol that all fleets meet; imports Ray only when it is asked for.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Protocol

from pawl.errors import InvalidRequest
from pawl_server.addresses import is_any
from pawl_server.config import Config
from pawl_server.engine.spec import check_engine, parse_ports
from pawl_server.fleet.local_fleet import LocalFleet
from pawl_server.fleet.replicas import EventBatch

__all__ = ["Fleet", "make_fleet", "prepare_local_ray"]

# A node that died or fell silent is noticed in 3 to 9 s instead of 14 to 65 s.
_NODE_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Fleet(Protocol):
    """A fleet, wherever it runs."""

    kind: str
    """In words, for people."""

    @property
    def address(self) -> str:
        """host:port for front ends, once started."""

    async def start(self) -> None:
        """Listen and begin to start the replicas.

        Raises:
            PawlError: it cannot.
        """

    async def events(self, number: int) -> EventBatch:
        """Events from `number` on; may be none after a while.

        Raises:
            Unavailable: the fleet is gone for good.
        """

    async def stop(self, grace_s: float) -> None:
        """Stop everything it started; nothing is left on return. Right also after a failed start."""


def make_fleet(config: Config, token: str, *, outlived: bool = False) -> Fleet:
    """The fleet that `config.fleet.fleet` names, not started.

    Args:
        config: the settings.
        token: the shared token.
        outlived: whether front ends may meet the fleet after this one.

    Raises:
        InvalidRequest: there is no such kind of fleet, or settings of its engines are wrong or contradict each other.
        ModuleNotFoundError: Ray is not installed.
    """
    check_engine(config.engine)
    for setting in ("engine_ports", "engine_metrics_ports"):
        parse_ports(getattr(config.fleet, setting), setting)
    first_incarnation = int(time.time()) if outlived else 1
    if config.fleet.fleet == "local":
        return LocalFleet(config, token, first_incarnation)
    if config.fleet.fleet != "ray":
        raise InvalidRequest(
            f"fleet = {config.fleet.fleet!r}: must be ray or local here;"
            " HOST:PORT of a running fleet is for `pawl frontend`",
            reason="BAD_SETTING",
        )
    # Ray is heavy, and optional.
    if not config.fleet.ray_address:
        # An engine on every interface is reached from elsewhere, under the address that Ray takes for the node's.
        prepare_local_ray(os.environ, loopback=not is_any(config.fleet.engine_host))
        from pawl_server.fleet.own_ray_fleet import OwnRayFleet  # noqa: PLC0415

        return OwnRayFleet(config, token, first_incarnation)
    from pawl_server.fleet.ray_fleet import RayFleet  # noqa: PLC0415

    return RayFleet(config, token, first_incarnation)


def prepare_local_ray(environment: MutableMapping[str, str], *, loopback: bool = True) -> None:
    """Set what a Ray of our own reads at its start; what the user has set stays.

    Args:
        environment: the variables.
        loopback: whether Ray listens on 127.0.0.1 alone.

    A Ray peer can run any code, so the cluster demands a token even on loopback, where every local user could
    connect. It is drawn here unless the user has one.
    """
    for name, value in _NODE_HEALTH.items():
        environment.setdefault(name, value)
    if loopback:
        # So told, Ray takes 127.0.0.1 for the node's address and listens there alone; else on every interface.
        environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if environment.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    has_token = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment
    if not has_token and not (Path.home() / ".ray" / "auth_token").exists():
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
