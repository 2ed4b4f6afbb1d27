"""`python -m pawl_loadtest`: an open-loop load on a running server, reported as a table and as JSON."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from itertools import islice
from pathlib import Path

from pawl import AsyncClient, PawlError
from pawl_loadtest.arguments import positive
from pawl_loadtest.measure import summarize
from pawl_loadtest.prompts import PromptSource
from pawl_loadtest.report import as_json, as_table
from pawl_loadtest.runner import Job, run_jobs
from pawl_server.cli.client_tls import add_tls_flags, encryption
from pawl_server.sim.arrivals import parse_arrivals
from pawl_server.sim.lengths import WORKLOADS, Lognormal, Workload


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pawl_loadtest", description=__doc__)
    add = parser.add_argument
    add(
        "--target",
        default=os.environ.get("PAWL_TARGET", "localhost:50051"),
        help="host:port, or grpcs://host:port for TLS",
    )
    add("--api-key", default=os.environ.get("PAWL_API_KEY"), help="default: PAWL_API_KEY")
    add_tls_flags(parser)
    add("--rate", type=float, default=4.0, help="arrivals per second")
    add("--arrivals", default="poisson", help="poisson, gamma:VARIATION, azure-conversation or azure-code")
    add("--requests", type=positive, default=100, help="how many")
    add("--lengths", default="azure-conversation", help=f"{', '.join(WORKLOADS)}, or PROMPT/OUTPUT in tokens")
    add("--scale", type=float, default=0.1, help="factor on the lengths of a named workload")
    add("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with")
    add("--seed", type=int, default=0, help="same seed, same load")
    add("--timeout", type=float, default=600.0, help="seconds per request")
    add("--max-lateness-ms", type=float, default=10.0, help="the run fails when its own p99 lateness is above")
    add("--json", type=Path, help="write the figures here")
    return parser


def _workload(text: str, scale: float, max_context: int) -> Workload:
    if text in WORKLOADS:
        return WORKLOADS[text].scaled(scale, max_context)
    prompt, _, output = text.partition("/")
    if not (prompt.isdecimal() and output.isdecimal()):
        raise ValueError(f"lengths = {text!r}: must be PROMPT/OUTPUT in tokens or one of {', '.join(WORKLOADS)}")
    return Workload(_fixed(int(prompt)), _fixed(int(output)))


def _fixed(length: int) -> Lognormal:
    return Lognormal(length, length, length, length)


async def _run(options: argparse.Namespace) -> int:
    tls = encryption(options)
    async with AsyncClient(options.target, api_key=options.api_key, tls=tls) as client:
        model = (await client.models.list())[0]
    workload = _workload(options.lengths, options.scale, model.max_context_tokens)
    source = PromptSource(model.vocab_size, shared_prefix=options.shared_prefix, seed=options.seed)
    due_times = parse_arrivals(options.arrivals, options.rate, options.seed).due_times()
    schedule = islice(zip(due_times, workload.lengths(options.seed), strict=False), options.requests)
    jobs = [Job(due, source.prompt(pair.prompt), pair.output) for due, pair in schedule]
    records, duration_s = await run_jobs(
        options.target, jobs, api_key=options.api_key, timeout=options.timeout, tls=tls
    )
    summary = summarize(records, duration_s)
    sys.stdout.write(f"{model.name}  {options.arrivals} {options.rate}/s  {options.lengths}\n")
    sys.stdout.write(as_table(summary) + "\n")
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items() if name != "api_key"}
        options.json.write_text(as_json(summary, model=model.name, settings=settings) + "\n", encoding="utf-8")
    lateness_ms = 1000 * summary.dispatch_lateness_s["p99"]
    if lateness_ms > options.max_lateness_ms:
        sys.stderr.write(
            f"error: this load generator was late by {lateness_ms:.1f} ms (p99), above"
            f" {options.max_lateness_ms} ms: the figures say more about it than about the server\n"
        )
        return 1
    return 1 if summary.num_errors else 0


def main() -> int:
    """Run and return the exit code: 1 when requests failed or the generator was late, 2 for usage."""
    try:
        return asyncio.run(_run(_parser().parse_args()))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except PawlError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
