"""A plan of `pawl plan` for people."""

from __future__ import annotations

from pawl_server.cli.plan import Alternative, ModelPlan
from pawl_server.cli.render import size_text

__all__ = ["plan_lines"]

_NAME_WIDTH = 40


def plan_lines(plan: ModelPlan) -> list[str]:
    """What a replica takes, whether it fits and what for, and what other types would take."""
    return [
        f"{plan.model}  {plan.architecture}, {plan.num_parameters / 1e6:.1f} M parameters, {plan.num_layers} layers",
        *(f"  {name:<12} {text}" for name, text in _rows(plan)),
        *([f"  DOES NOT FIT {plan.refused}", *_what_would_fit(plan)] if plan.refused else _what_fits(plan)),
        "",
        f"  {'with':<{_NAME_WIDTH}}{'weights':>12}{'KV/token':>12}{'tokens':>12}{'requests':>10}",
        *(_row(alternative) for alternative in plan.alternatives),
    ]


def _rows(plan: ModelPlan) -> list[tuple[str, str]]:
    each = " each" if plan.replicas > 1 else ""
    stored = f"stored as {' and '.join(plan.stored_dtypes)} in {size_text(plan.stored_bytes)}"
    kv_bytes = f"{size_text(plan.kv_bytes)}{each}, " if not plan.refused else ""
    rows = [
        ("device", f"{plan.device}, {plan.dtype}, {plan.num_threads} thread(s)"),
        ("kernels", f"{plan.kernels}: {plan.kernels_reason}"),
        ("available", f"{size_text(plan.available_bytes)} to {plan.replicas_sharing} replica(s)"),
        ("weights", f"{size_text(plan.weight_bytes)}{each}, {stored}"),
        ("activations", f"{size_text(plan.activation_bytes)}{each}, at most"),
        ("KV", f"{kv_bytes}{size_text(plan.kv_bytes_per_token)} per token"),
    ]
    if plan.refused:
        return rows
    cache = f"{plan.num_blocks} blocks x {plan.block_size} = {plan.cache_tokens} tokens{each}"
    return [
        *rows,
        ("KV cache", f"{cache}: {plan.requests} request(s) of {plan.max_context} at once"),
        ("left", size_text(plan.reserve_bytes)),
    ]


def _what_fits(plan: ModelPlan) -> list[str]:
    if plan.longest_request == plan.max_context:
        return ["  fits"]
    return [
        f"  fits, but NO REQUEST OF {plan.max_context} TOKENS: the longest that is served has {plan.longest_request},"
        " prompt and output together",
        f"  it would take {size_text(plan.full_context_kv_bytes)} of KV, there are {size_text(plan.kv_bytes)}:"
        " raise --kv-max-bytes, --kv-memory-fraction or --num-blocks, or take a smaller --kv-dtype;"
        f" else tell clients with --max-context={plan.longest_request}",
    ]


def _what_would_fit(plan: ModelPlan) -> list[str]:
    fitting = [alternative for alternative in plan.alternatives if not alternative.refused]
    if not fitting:
        return ["  nothing below fits either"]
    return [
        f"  would fit    {_flags(a)}: weights {size_text(a.weight_bytes)}, {a.cache_tokens} tokens,"
        f" {a.requests} request(s) of {plan.max_context}"
        for a in fitting
    ]


def _flags(a: Alternative) -> str:
    """The flags of `pawl serve` that choose it."""
    chosen = {"kernels": a.kernels, "dtype": a.dtype, "kv-dtype": a.kv_dtype, "weight-dtype": a.weight_dtype}
    return " ".join(f"--{flag}={value}" for flag, value in chosen.items() if value != "auto")


def _row(a: Alternative) -> str:
    types = [f"{what} {kind}" for what, kind in (("KV", a.kv_dtype), ("weights", a.weight_dtype)) if kind != "auto"]
    name = f"  {', '.join([f'{a.kernels} {a.dtype}', *types]):<{_NAME_WIDTH}}"
    if a.refused and not a.weight_bytes:
        return f"{name}{a.refused}"
    fits = "does not fit" if a.refused else f"{a.cache_tokens:>12}{a.requests:>10}"
    return f"{name}{size_text(a.weight_bytes):>12}{size_text(a.kv_bytes_per_token):>12}{fits:>22}"
