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
from pawl_workers.control_groups import host_memory_left

__all__ = [
    "engine_specs",
    "memory_share",
    "num_cores",
    "replicas_per_gpu",
    "replicas_per_machine",
    "restart_policy",
    "served_name",
]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def served_name(config: Config) -> str:
    """Id under which the model is served."""
    return config.model.served_name or Path(config.model.model).name


def replicas_per_machine(config: Config) -> int:
    """Replicas that share the host's memory. In a cluster, whose nodes are not known, each may have its own."""
    return 1 if config.fleet.ray_address else config.fleet.replicas


def replicas_per_gpu(config: Config, num_gpus: int) -> int:
    """Replicas that share a GPU's memory.

    Args:
        config: the settings.
        num_gpus: that a local fleet deals out in turn.
    """
    fleet = config.fleet
    if fleet.fleet == "local":
        return -(-fleet.replicas // max(1, num_gpus))
    share = fleet.gpus_per_replica
    return min(fleet.replicas, int(1 / share)) if 0 < share < 1 else 1


def memory_share(config: Config) -> int:
    """Bytes of this host's memory for each replica on it; 0 = all that is free, for one alone.

    To be called before any of them is started, and once: a replica that is started again has no more and no less than
    the others left it.
    """
    sharing = replicas_per_machine(config)
    return host_memory_left() // sharing if sharing > 1 else 0


def engine_specs(
    config: Config, token: str, cores_per_replica: int, *, memory_bytes: int = 0, num_gpus: int = 0
) -> list[EngineSpec]:
    """One spec per replica.

    Args:
        config: the settings.
        token: the shared token.
        cores_per_replica: compute threads when num_threads is 0.
        memory_bytes: see `memory_share`.
        num_gpus: see `replicas_per_gpu`.
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
        memory_bytes=memory_bytes,
        replicas_per_gpu=replicas_per_gpu(config, num_gpus),
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
