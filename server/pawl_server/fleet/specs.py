"""From settings to what the fleet starts: one EngineSpec per replica, and when to start it again.

Pure; the fleets of this folder differ only in how they start a spec.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pawl_server.config import Config
from pawl_server.engine.spec import EngineSpec
from pawl_server.fleet.supervisor import RestartPolicy

__all__ = ["engine_specs", "num_cores", "restart_policy", "served_name"]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def served_name(config: Config) -> str:
    """Id under which the model is served."""
    return config.model.served_name or Path(config.model.model).name


def engine_specs(config: Config, token: str, cores_per_replica: int) -> list[EngineSpec]:
    """One spec per replica.

    Args:
        config: the settings.
        token: the shared token.
        cores_per_replica: compute threads when num_threads is 0.
    """
    fleet = config.fleet
    first = EngineSpec(
        model=config.model,
        engine=config.engine,
        internal_token=token,
        served_name=served_name(config),
        host=fleet.engine_host,
        ports=fleet.engine_ports,
        metrics_ports=fleet.engine_metrics_ports,
        num_threads=config.engine.num_threads or max(1, cores_per_replica),
        heartbeat_timeout_s=config.frontend.heartbeat_timeout_s,
        log_level=config.log.log_level,
        log_format=config.log.log_format,
    )
    return [msgspec.structs.replace(first, replica=index) for index in range(fleet.replicas)]


def restart_policy(config: Config) -> RestartPolicy:
    """When replicas are started again."""
    fleet = config.fleet
    return RestartPolicy(
        start_timeout_s=fleet.start_timeout_s,
        backoff_initial_s=fleet.backoff_initial_s,
        backoff_max_s=max(fleet.backoff_initial_s, fleet.backoff_max_s),
    )
