"""Every metric of pawl: names, types, labels and buckets in one place.

Each process builds the group it fills (`FrontendMetrics`, `EngineMetrics`, `FleetMetrics`) on a registry of
its own and serves that; `pawl serve` joins the expositions. Labels are `model`, `replica`, `worker` and
closed enums: nothing a client sends becomes a label. Rules and dashboards in `deploy/` use these names alone.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

__all__ = [
    "BATCH_BUCKETS",
    "GAP_BUCKETS",
    "LATENCY_BUCKETS",
    "OUTCOMES",
    "PHASES",
    "PREEMPTION_REASONS",
    "STEP_PHASES",
    "TOKEN_BUCKETS",
    "WAIT_REASONS",
    "EngineMetrics",
    "FleetMetrics",
    "FrontendMetrics",
]

# `_created` series carry times that cannot be joined over processes, and nobody queries them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Bounds in seconds. Thresholds of alerts must be bounds of these lists, below the last one.
LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
GAP_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2,
)  # fmt: skip
TOKEN_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))  # 1-2-5 up to 500,000
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

OUTCOMES = (
    "stop",
    "max_tokens",
    "context_length",
    "time_limit",
    "cancelled",
    "deadline",
    "rejected",
    "error",
)
WAIT_REASONS = ("blocks", "slots", "priority", "fairness", "grammar", "reservation", "prompt")
PREEMPTION_REASONS = ("blocks", "priority", "worker_lost")
PHASES = ("queue", "prefill", "decode", "stalled", "total")
STEP_PHASES = ("schedule", "prepare", "forward", "sample", "postprocess", "idle")
STEP_KINDS = ("prefill", "decode", "mixed")


class FrontendMetrics:
    """What a front end fills. `model` is a label of each."""

    def __init__(self, model: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.model = model
        r, m = self.registry, ["model"]
        self._requests = Counter(
            "pawl_requests",
            "Requests that ended, each in exactly one outcome",
            [*m, "method", "outcome"],
            registry=r,
        )
        self.time_to_first_token = Histogram(
            "pawl_time_to_first_token_seconds",
            "From the receipt of the RPC to the first delta handed to gRPC",
            m, buckets=LATENCY_BUCKETS, registry=r,
        ).labels(model)  # fmt: skip
        self.output_gap = Histogram(
            "pawl_output_gap_seconds", "Between two deltas of a stream", m, buckets=GAP_BUCKETS, registry=r
        ).labels(model)
        self.time_per_output_token = Histogram(
            "pawl_time_per_output_token_seconds",
            "Per request: decode time / (output tokens - 1)",
            m, buckets=GAP_BUCKETS, registry=r,
        ).labels(model)  # fmt: skip
        self._request_duration = Histogram(
            "pawl_request_duration_seconds",
            "Per request; queue + prefill + decode + stalled = total",
            [*m, "phase"], buckets=LATENCY_BUCKETS, registry=r,
        )  # fmt: skip
        self.request_prompt_tokens = Histogram(
            "pawl_request_prompt_tokens", "Prompt tokens per request", m, buckets=TOKEN_BUCKETS, registry=r
        ).labels(model)
        self.request_output_tokens = Histogram(
            "pawl_request_output_tokens", "Output tokens per request", m, buckets=TOKEN_BUCKETS, registry=r
        ).labels(model)
        self._queue_rejections = Counter(
            "pawl_scheduler_queue_rejections", "Requests refused at admission", [*m, "reason"], registry=r
        )
        self.requests_queued = Gauge(
            "pawl_frontend_requests_queued", "Admitted requests without a first token", m, registry=r
        ).labels(model)
        self.streams_open = Gauge(
            "pawl_frontend_streams_open", "Requests between admission and their end", m, registry=r
        ).labels(model)
        grpc_labels = ["grpc_service", "grpc_method", "grpc_type"]
        self._grpc_started = Counter("grpc_server_started", "RPCs started", grpc_labels, registry=r)
        self._grpc_handled = Counter("grpc_server_handled", "RPCs ended", [*grpc_labels, "grpc_code"], registry=r)
        self._grpc_handling = Histogram(
            "grpc_server_handling_seconds", "Time from start to end of an RPC",
            grpc_labels, buckets=LATENCY_BUCKETS, registry=r,
        )  # fmt: skip
        self._build_info = Gauge("pawl_build_info", "1; version as a label", ["version"], registry=r)
        for phase in PHASES:
            self._request_duration.labels(model, phase)

    def request_ended(self, method: str, outcome: str) -> None:
        """Count the one end of a request. `method` is the RPC's name, `outcome` one of OUTCOMES."""
        self._requests.labels(self.model, method, outcome).inc()

    def request_phases(self, queue: float, prefill: float, decode: float, stalled: float) -> None:
        """Observe the phases of one request, seconds; their sum is the total."""
        for phase, value in zip(PHASES[:4], (queue, prefill, decode, stalled), strict=True):
            self._request_duration.labels(self.model, phase).observe(value)
        self._request_duration.labels(self.model, "total").observe(queue + prefill + decode + stalled)

    def request_rejected(self, reason: str) -> None:
        """Count a refusal at admission. `reason` is an ErrorInfo reason, lower case."""
        self._queue_rejections.labels(self.model, reason).inc()

    def rpc_started(self, service: str, method: str, kind: str) -> None:
        """Count the start of an RPC; `kind` is unary or server_stream."""
        self._grpc_started.labels(service, method, kind).inc()

    def rpc_ended(self, service: str, method: str, kind: str, code: str, seconds: float) -> None:
        """Count the end of an RPC with its status name, such as OK."""
        self._grpc_handled.labels(service, method, kind, code).inc()
        self._grpc_handling.labels(service, method, kind).observe(seconds)

    def build(self, version: str) -> None:
        """Publish the version."""
        self._build_info.labels(version).set(1)


class EngineMetrics:
    """What an engine fills, from copies of its state, after a step."""

    def __init__(self, model: str, replica: int, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        r, names, values = self.registry, ["model", "replica"], (model, str(replica))
        self.requests_running = Gauge("pawl_requests_running", "Sequences with KV blocks", names, registry=r).labels(
            *values
        )
        waiting = Gauge("pawl_requests_waiting", "Sequences that wait, by reason", [*names, "reason"], registry=r)
        self.requests_waiting = {reason: waiting.labels(*values, reason) for reason in WAIT_REASONS}
        prompt = Counter(
            "pawl_prompt_tokens", "Prompt tokens, by where their KV came from", [*names, "source"], registry=r
        )
        self.prompt_tokens = {s: prompt.labels(*values, s) for s in ("computed", "cached", "recomputed")}
        self.output_tokens = Counter(
            "pawl_output_tokens", "Generated tokens; tokens per second is its rate", names, registry=r
        ).labels(*values)
        drafts = Counter(
            "pawl_draft_tokens", "Tokens drafted for output, by what became of them", [*names, "outcome"], registry=r
        )
        self.draft_tokens = {outcome: drafts.labels(*values, outcome) for outcome in ("accepted", "rejected")}
        blocks = Gauge("pawl_kv_blocks", "KV blocks by state; they sum to the capacity", [*names, "state"], registry=r)
        self.kv_blocks = {state: blocks.labels(*values, state) for state in ("free", "used", "cached")}
        self.kv_block_capacity = Gauge("pawl_kv_block_capacity", "Usable KV blocks", names, registry=r).labels(*values)
        self.kv_cache_usage = Gauge(
            "pawl_kv_cache_usage_ratio", "Blocks in use / capacity, 0 to 1", names, registry=r
        ).labels(*values)
        swapped = Counter(
            "pawl_kv_swapped_blocks", "KV blocks copied to host memory and back", [*names, "direction"], registry=r
        )
        self.swapped_blocks = {direction: swapped.labels(*values, direction) for direction in ("out", "in")}
        duration = Histogram(
            "pawl_step_duration_seconds",
            "Whole step, by kind",
            [*names, "kind"],
            buckets=GAP_BUCKETS,
            registry=r,
        )
        self.step_duration = {kind: duration.labels(*values, kind) for kind in STEP_KINDS}
        phases = Counter(
            "pawl_step_phase_seconds",
            "Time by phase of the loop; sums to wall time",
            [*names, "phase"],
            registry=r,
        )
        self.step_phase = {phase: phases.labels(*values, phase) for phase in STEP_PHASES}
        batch_requests = Histogram(
            "pawl_batch_requests", "Sequences per step", [*names, "kind"], buckets=BATCH_BUCKETS, registry=r
        )
        self.batch_requests = {kind: batch_requests.labels(*values, kind) for kind in STEP_KINDS}
        batch_tokens = Histogram(
            "pawl_batch_tokens", "Tokens per step", [*names, "kind"], buckets=BATCH_BUCKETS, registry=r
        )
        self.batch_tokens = {kind: batch_tokens.labels(*values, kind) for kind in STEP_KINDS}
        preemptions = Counter("pawl_preemptions", "Sequences that lost their KV blocks", [*names, "reason"], registry=r)
        self.preemptions = {reason: preemptions.labels(*values, reason) for reason in PREEMPTION_REASONS}
        self.preempted_tokens = Counter(
            "pawl_preempted_tokens",
            "Computed tokens that preempted sequences lost with their blocks",
            names,
            registry=r,
        ).labels(*values)
        self.last_step = Gauge(
            "pawl_worker_last_step_timestamp_seconds",
            "Unix time of the last step",
            ["model", "worker"],
            registry=r,
        ).labels(*values)
        self._config_info = Gauge(
            "pawl_config_info",
            "1; facts as labels",
            [*names, "dtype", "kernels", "block_size", "block_count"],
            registry=r,
        )
        self._values = values

    def config(self, *, dtype: str, kernels: str, block_size: int, num_blocks: int) -> None:
        """Publish the facts of the loaded model and cache."""
        self._config_info.labels(*self._values, dtype, kernels, str(block_size), str(num_blocks)).set(1)
        self.kv_block_capacity.set(num_blocks)


class FleetMetrics:
    """What the fleet fills: which workers live."""

    def __init__(self, model: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._model = model
        self._up = Gauge("pawl_worker_up", "1 while the worker serves", ["model", "worker"], registry=self.registry)
        self._restarts = Counter(
            "pawl_worker_restarts",
            "Starts after the first",
            ["model", "worker", "reason"],
            registry=self.registry,
        )

    def worker_up(self, worker: int, *, up: bool) -> None:
        """Say whether a replica serves."""
        self._up.labels(self._model, str(worker)).set(1 if up else 0)

    def worker_restarted(self, worker: int, reason: str) -> None:
        """Count a restart; `reason` is one of died, start_timeout, start_failed."""
        self._restarts.labels(self._model, str(worker), reason).inc()
