"""`python -m pawl_server.sim`: the production scheduler against baselines, in virtual time.

python -m pawl_server.sim                         # every workload, every policy, a table
python -m pawl_server.sim run --workload flood --plots plots
python -m pawl_server.sim run --workload urgent --set preempt_below=0
python -m pawl_server.sim run --azure AzureLLMInferenceTrace_conv.csv
python -m pawl_server.sim fit steps.csv --output cost.json
python -m pawl_server.sim draw --requests 100000 --output trace.csv
python -m pawl_server.sim replay journal.0        # what a server with journal = "journal" decided, decided again
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

from rich.console import Console

from pawl_server.sim.arrivals import Arrivals
from pawl_server.sim.azure import drawn_rows, read_rows, write_rows
from pawl_server.sim.cost import CostModel, fit, load_cost, save_cost
from pawl_server.sim.measured import read_steps
from pawl_server.sim.plots import PlotsUnavailableError, check_plots, plot_first_tokens
from pawl_server.sim.policies import POLICIES
from pawl_server.sim.replay import ReplayError, replay
from pawl_server.sim.report import as_json, as_markdown, as_table
from pawl_server.sim.scenarios import SCENARIOS, bundled_cost, replica_limits
from pawl_server.sim.simulator import Run, SimulationStuckError, simulate
from pawl_server.sim.summary import Objective, Summary, summarize
from pawl_server.sim.trace import Trace
from pawl_server.sim.workloads import from_rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m pawl_server.sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", help="simulate workloads and compare policies (the default)"))
    fitting = commands.add_parser("fit", help="fit a cost model to recorded steps")
    fitting.add_argument("steps", type=Path, help="CSV or JSON, as `python -m pawl_loadtest.steps` records it")
    fitting.add_argument("--output", type=Path, required=True, help="JSON of the cost model")
    fitting.add_argument("--machine", default="", help="what ran the steps, for the record")
    fitting.add_argument("--model", default="", help="what they computed, for the record")
    replaying = commands.add_parser("replay", help="decide again what a server's journal says, and compare")
    replaying.add_argument("journal", type=Path, help="as an engine writes it (setting `journal`)")
    drawing = commands.add_parser("draw", help="write a trace of drawn lengths in Azure's published format")
    drawing.add_argument("--requests", type=int, default=10_000)
    drawing.add_argument("--rate", type=float, default=10.0, help="arrivals per second")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--output", type=Path, required=True)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workload", action="append", choices=list(SCENARIOS), help="may be given again; default: all")
    add("--azure", type=Path, help="a CSV in Azure's published format instead of a workload")
    add("--policy", action="append", choices=list(POLICIES), help="may be given again; default: all")
    add("--requests", type=int, default=2_000, help="requests of each workload")
    add("--rate", type=float, help="mean arrivals per second; default: the workload's own")
    add("--pool-tokens", type=int, help="tokens that the KV pool holds; default: the workload's own")
    add(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another limit of the replica; may be repeated"
    )
    add("--cost", default="llama-8b-h100-analytic", help="a cost model: a JSON file, or one that comes with pawl")
    add("--first-token-s", type=float, default=2.0, help="objective: seconds to the first token")
    add("--per-token-s", type=float, default=0.1, help="objective: mean seconds per further token")
    add("--seed", type=int, default=0, help="same seed, same trace")
    add("--no-skip", action="store_true", help="plan every step, also those that are alike")
    add("--plots", type=Path, help="write a picture per workload into this folder")
    add("--json", type=Path, help="write every figure here")
    add("--markdown", type=Path, help="write the table here")


def _traces(options: argparse.Namespace) -> list[tuple[Trace, int]]:
    """Traces, and the pool each runs on."""
    if options.azure is not None:
        rows = list(read_rows(options.azure))[: options.requests]
        return [(from_rows(rows, options.azure.stem), options.pool_tokens or SCENARIOS["conversation"].pool_tokens)]
    traces = []
    for name in options.workload or SCENARIOS:
        scenario = SCENARIOS[name]
        made = scenario.make(options.requests, options.rate or scenario.rate, options.seed)
        traces.append((Trace(name, made.requests, made.faults), options.pool_tokens or scenario.pool_tokens))
    return traces


def _cost(text: str) -> CostModel:
    return load_cost(Path(text)) if text.endswith(".json") else bundled_cost(text)


def _run(options: argparse.Namespace) -> int:
    if options.plots is not None:
        check_plots()
    cost, objective = _cost(options.cost), Objective(options.first_token_s, options.per_token_s)
    progress = Console(stderr=True)
    summaries: list[Summary] = []
    runs: list[Run] = []
    for trace, pool_tokens in _traces(options):
        limits = replica_limits(pool_tokens, options.set)
        gc.freeze()  # the trace lives as long as the runs: nothing of it is garbage
        for name in options.policy or POLICIES:
            started = time.perf_counter()
            run = simulate(trace, limits, cost, POLICIES[name], skip=not options.no_skip)
            took_s = time.perf_counter() - started
            summaries.append(summarize(run, objective))
            if options.plots is not None:
                runs.append(run)
            progress.print(
                f"{trace.name}, {name}: {run.end_ns / 1e9:.0f} s simulated in {took_s:.1f} s,"
                f" {run.record.num_steps} steps, {run.record.num_skipped} skipped, log {run.digest[:16]}",
                highlight=False,
                soft_wrap=True,
            )
    width = None if sys.stdout.isatty() else 240
    Console(width=width).print(as_table(summaries))
    for path in plot_first_tokens(runs, options.plots) if options.plots is not None else ():
        progress.print(f"wrote {path}", highlight=False)
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items() if value is not None}
        options.json.write_text(as_json(summaries, settings) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(summaries), encoding="utf-8")
    return 0


def _fit(options: argparse.Namespace) -> int:
    cost = fit(read_steps(options.steps), machine=options.machine, model=options.model)
    save_cost(cost, options.output)
    if (report := cost.fit) is not None:
        print(
            f"fitted to {report.num_fitted} steps; on {report.num_held_out} held out the relative error is"
            f" {report.mean_error:.1%} in the mean, {report.median_error:.1%} at the median and"
            f" {report.p90_error:.1%} at the 90th percentile"
        )
    return 0


def _replay(path: Path) -> int:
    data = path.read_bytes()
    replayed = replay(data)
    if replayed.again != data:
        sys.stderr.write("error: every plan is the same, but not what came of it\n")
        return 1
    print(
        f"{replayed.num_sequences} sequences, {replayed.num_steps} steps, {replayed.num_events} events:"
        " decided again, the same to the byte"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit code: 1 when a simulation starves a request or a replay differs, 2 for usage."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    options = _parser().parse_args(given)
    try:
        if options.command == "fit":
            return _fit(options)
        if options.command == "replay":
            return _replay(options.journal)
        if options.command == "draw":
            arrivals = Arrivals(options.rate, seed=options.seed)
            write_rows(options.output, drawn_rows(arrivals, options.requests, options.seed))
            return 0
        return _run(options)
    except (SimulationStuckError, ReplayError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (ValueError, OSError, PlotsUnavailableError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
