"""The Grafana dashboard, as a table of panels.

Owns which expression is drawn where; the JSON that Grafana reads is generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Panel", "dashboard", "panels"]

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

_SOURCE: dict[str, Json] = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 8, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph.

    Attributes:
        title: what it shows.
        unit: Grafana's name of the unit.
        queries: (expression, legend) of each line.
        text: what to look for.
        stacked: lines on top of each other.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str = ""
    stacked: bool = False


def _quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    """p50, p95 and p99 of a histogram."""
    rate = f'sum by (le) (rate({metric}_bucket{{model=~"$model"}}[$__rate_interval]))'
    return tuple((f"histogram_quantile({q / 100}, {rate})", f"p{q}") for q in (50, 95, 99))


def _rate(metric: str, by: str, selector: str = "") -> str:
    chosen = f'model=~"$model"{selector}'
    return f"sum by ({by}) (rate({metric}{{{chosen}}}[$__rate_interval]))"


def _gauge(metric: str, by: str) -> str:
    return f'sum by ({by}) ({metric}{{model=~"$model"}})'


def _mean(metric: str, by: str) -> str:
    return f"{_rate(f'{metric}_sum', by)} / {_rate(f'{metric}_count', by)}"


def panels() -> dict[str, tuple[Panel, ...]]:
    """The panels of each row, by the row's title."""
    return {
        "Service": _service(),
        "Requests": _requests(),
        "Batch and step": _steps(),
        "KV cache": _cache(),
        "Workers": _workers(),
    }


def _service() -> tuple[Panel, ...]:
    tokens = (
        (_rate("pawl_output_tokens_total", "replica"), "output, replica {{replica}}"),
        (_rate("pawl_prompt_tokens_total", "source"), "prompt, {{source}}"),
    )
    return (
        Panel("Tokens per second", "short", tokens, "Rates of counters. Prompt tokens by where their KV came from."),
        Panel(
            "Time to first token",
            "s",
            _quantiles("pawl_time_to_first_token_seconds"),
            "From the receipt of the call to the first delta handed to gRPC.",
        ),
        Panel(
            "Gap between deltas",
            "s",
            _quantiles("pawl_output_gap_seconds"),
            "One sample per delta after a stream's first: the stall that a user sees.",
        ),
        Panel(
            "Time per output token",
            "s",
            _quantiles("pawl_time_per_output_token_seconds"),
            "One sample per request: decode time / (output tokens - 1).",
        ),
        Panel(
            "Mean request duration by phase",
            "s",
            ((_mean("pawl_request_duration_seconds", "phase"), "{{phase}}"),),
            "queue + prefill + decode + stalled = total.",
        ),
        Panel(
            "Calls by status",
            "reqps",
            (
                (
                    "sum by (grpc_method, grpc_code) (rate(grpc_server_handled_total[$__rate_interval]))",
                    "{{grpc_method}} {{grpc_code}}",
                ),
            ),
            "INTERNAL, UNKNOWN and UNAVAILABLE are the server's; the rest is mostly the callers'.",
        ),
    )


def _requests() -> tuple[Panel, ...]:
    return (
        Panel(
            "Requests that ended, by outcome",
            "reqps",
            ((_rate("pawl_requests_total", "outcome"), "{{outcome}}"),),
            "Every request ends in exactly one outcome.",
            stacked=True,
        ),
        Panel(
            "Waiting in the engines, by reason",
            "short",
            ((_gauge("pawl_requests_waiting", "reason"), "{{reason}}"),),
            "blocks: the KV cache is full. slots: max_running is reached.",
            stacked=True,
        ),
        Panel(
            "Queued at the front ends",
            "short",
            (
                ('sum(pawl_frontend_requests_queued{model=~"$model"})', "without a first token"),
                ('sum(pawl_frontend_streams_open{model=~"$model"})', "open streams"),
                (_rate("pawl_scheduler_queue_rejections_total", "reason"), "refused per second: {{reason}}"),
            ),
        ),
        Panel(
            "Prompt length",
            "short",
            _quantiles("pawl_request_prompt_tokens"),
            "Tokens per request.",
        ),
        Panel("Output length", "short", _quantiles("pawl_request_output_tokens"), "Tokens per request."),
        Panel(
            "Running",
            "short",
            ((_gauge("pawl_requests_running", "replica"), "replica {{replica}}"),),
            "Sequences that hold KV blocks.",
        ),
    )


def _steps() -> tuple[Panel, ...]:
    return (
        Panel(
            "Where the loop's time goes",
            "percentunit",
            (
                (
                    f"{_rate('pawl_step_phase_seconds_total', 'phase')} / ignoring (phase) group_left ()"
                    f' sum(rate(pawl_step_phase_seconds_total{{model=~"$model"}}[$__rate_interval]))',
                    "{{phase}}",
                ),
            ),
            "Shares of wall time. A low share of idle and a low share of forward together: the host is the limit.",
            stacked=True,
        ),
        Panel("Step duration", "s", _quantiles("pawl_step_duration_seconds"), "Plan to emitted tokens."),
        Panel(
            "Mean batch",
            "short",
            (
                (_mean("pawl_batch_requests", "kind"), "sequences, {{kind}}"),
                (_mean("pawl_batch_tokens", "kind"), "tokens, {{kind}}"),
            ),
            "Per step.",
        ),
        Panel(
            "Drafts",
            "short",
            ((_rate("pawl_draft_tokens_total", "outcome"), "{{outcome}}"),),
            "Tokens per second. Accepted ones are output that took no step of its own; none unless speculation is on.",
            stacked=True,
        ),
    )


def _cache() -> tuple[Panel, ...]:
    cached = _rate("pawl_prompt_tokens_total", "replica", ', source="cached"')
    fresh = _rate("pawl_prompt_tokens_total", "replica", ', source=~"cached|computed"')
    return (
        Panel(
            "KV blocks by state",
            "short",
            (
                (_gauge("pawl_kv_blocks", "state"), "{{state}}"),
                ('sum(pawl_kv_block_capacity{model=~"$model"})', "capacity"),
            ),
            "free + cached + used = capacity. Cached blocks are given up as soon as they are needed.",
        ),
        Panel(
            "KV blocks in use",
            "percentunit",
            (('pawl_kv_cache_usage_ratio{model=~"$model"}', "replica {{replica}}"),),
        ),
        Panel(
            "Prefix hit ratio",
            "percentunit",
            ((f"{cached} / {fresh}", "replica {{replica}}"),),
            "Share of first-time prompt tokens whose KV was found in the cache.",
        ),
        Panel(
            "Preemptions",
            "ops",
            (
                (_rate("pawl_preemptions_total", "reason"), "{{reason}}"),
                (_rate("pawl_prompt_tokens_total", "source", ', source="recomputed"'), "tokens recomputed per second"),
            ),
            "Sequences that lost their KV blocks, and what it cost.",
        ),
    )


def _workers() -> tuple[Panel, ...]:
    return (
        Panel("Serving", "short", (('pawl_worker_up{model=~"$model"}', "replica {{worker}}"),), "1 while it serves."),
        Panel(
            "Time since the last step",
            "s",
            (('time() - pawl_worker_last_step_timestamp_seconds{model=~"$model"}', "replica {{worker}}"),),
            "Rises while a replica is idle; with work waiting it should not pass a step's length.",
        ),
        Panel(
            "Restarts in 15 minutes",
            "short",
            (
                (
                    'sum by (worker, reason) (increase(pawl_worker_restarts_total{model=~"$model"}[15m]))',
                    "replica {{worker}}: {{reason}}",
                ),
            ),
        ),
        Panel(
            "Builds",
            "short",
            (
                ("sum by (version) (pawl_build_info)", "front ends of {{version}}"),
                (
                    'sum by (dtype, kernels, block_size) (pawl_config_info{model=~"$model"})',
                    "engines: {{dtype}}, {{kernels}}, blocks of {{block_size}}",
                ),
            ),
        ),
    )


def dashboard() -> dict[str, Json]:
    """The dashboard in Grafana's JSON."""
    drawn: list[Json] = []
    y = 0
    for title, row in panels().items():
        drawn.append(_row(title, len(drawn) + 1, y))
        y += 1
        for index, panel in enumerate(row):
            column = index % (24 // _WIDTH)
            drawn.append(_graph(panel, len(drawn) + 1, column * _WIDTH, y + index // (24 // _WIDTH) * _HEIGHT))
        y += -(-len(row) // (24 // _WIDTH)) * _HEIGHT
    return {
        "uid": "pawl-serving",
        "title": "pawl",
        "tags": ["pawl", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": drawn,
    }


def _variables() -> list[Json]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": "label_values(pawl_kv_block_capacity, model)", "refId": "model"},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _row(title: str, number: int, y: int) -> Json:
    return {"id": number, "type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "panels": []}


def _graph(panel: Panel, number: int, x: int, y: int) -> Json:
    stacking: Json = {"mode": "normal" if panel.stacked else "none"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {"fillOpacity": 20 if panel.stacked else 0, "stacking": stacking, "showPoints": "never"},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }
