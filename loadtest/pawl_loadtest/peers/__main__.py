"""`python -m pawl_loadtest.peers`: pawl against other engines, same weights, same prompts, same lengths, in turns.

Makes a checkpoint of a named shape with random weights, exports it to each engine's format, compares each engine's
greedy tokens with those of transformers in fp32, times them in turns, one process at a time, and prints tables of
medians, spread, ratios and the share of what this machine, measured in the same run, can do. Run it on an idle machine.
What takes long can be run in pieces, each with --json, and joined into one report with --join.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pawl_loadtest.arguments import positive
from pawl_loadtest.peers.caps import CAPS, held_to
from pawl_loadtest.peers.checkpoint import WEIGHTS, make_checkpoint
from pawl_loadtest.peers.driver import EngineError
from pawl_loadtest.peers.environments import EnvironmentUnavailable, cache_folder, interpreter
from pawl_loadtest.peers.figures import as_json, read_run
from pawl_loadtest.peers.machine import MachineMeter, instructions
from pawl_loadtest.peers.report import as_tables
from pawl_loadtest.peers.rounds import Course, Outcome, read_reference, run_rounds
from pawl_loadtest.peers.runs import Piece, Run, code_digest, join, processor
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.variants import BASE, TABLES, VARIANTS, Variant, choose_variants
from pawl_loadtest.peers.workloads import NAMED, Workload, parse_workloads

__all__ = ["main"]

_MAX_WEIGHT_BYTES = 4


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pawl_loadtest.peers", description=__doc__)
    add = parser.add_argument
    known = ", ".join(dict.fromkeys(variant.environment for variant in VARIANTS))
    add("--shape", choices=SHAPES, default="smollm2-135m", help="default: %(default)s")
    add("--weights", choices=WEIGHTS, default="bfloat16", help="what the weights are exact in; default: %(default)s")
    add("--peers", nargs="*", default=["all"], help=f"all, or by environment ({known}) or by a row's name; pawl always")
    add("--workloads", nargs="*", default=list(NAMED), help=f"{', '.join(NAMED)}, or REQUESTSxPROMPT/OUTPUT")
    add("--kv", nargs="*", choices=TABLES, default=list(TABLES), dest="tables", help="which tables; default: all")
    add("--rounds", type=positive, default=5)
    add(
        "--pairs",
        type=positive,
        default=2,
        help="runs in turns over gRPC and in process, a round; default: %(default)s",
    )
    add("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="default: this process's cores")
    add("--at-most", choices=CAPS, dest="cap", help="instructions that every engine is held to; default: all there are")
    add("--check-tokens", type=positive, default=16, help="greedy tokens to compare; default: %(default)s")
    add("--quick", action="store_true", help="whether everything runs: one round of a few requests and tokens")
    add("--peers-dir", type=Path, default=cache_folder(), help="environments and checkpoints; default: %(default)s")
    add("--join", type=Path, nargs="+", metavar="JSON", help="measure nothing: report these, which --json wrote")
    add(
        "--kept-weight-bytes",
        type=_weight_bytes,
        metavar="BYTES",
        help="pawl's limits count so many for a weight, 1.5 as it reads bf16 in 12 bits; default: the checkpoint's",
    )
    add("--json", type=Path, help="write every figure here")
    add("--plot", type=Path, help="draw the figures here, as the name's ending says (needs --json)")
    return parser


def _weight_bytes(text: str) -> float:
    """Bytes of a weight, between what no code reaches and float32's: ratios to the machine's limit divide by it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_WEIGHT_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be bytes that a weight takes, above 0 and at most {_MAX_WEIGHT_BYTES} (float32)"
        )
    return value


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code: 1 when pawl did not run or disagrees with the reference, 2 for usage."""
    options = _parser().parse_args(arguments)
    if options.plot and not options.json:
        sys.stderr.write("error: --plot draws what --json writes: give both\n")
        return 2
    try:
        variants, workloads = choose_variants(options.peers, options.tables), parse_workloads(options.workloads)
        joined = join([read_run(path) for path in options.join]) if options.join else None
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        run = replace(joined or _run(options, variants, workloads), kept_weight_bytes=options.kept_weight_bytes)
    except (EngineError, EnvironmentUnavailable) as error:
        sys.stderr.write(f"error: the reference: {error}\n")
        return 1
    sys.stdout.write(as_tables(run) + "\n")
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(as_json(run, settings), encoding="utf-8")
    if options.plot:
        _plot(options)
    ours = [outcome for outcome in run.outcomes if outcome.variant.name in BASE.values()]
    return 0 if all(_is_right(outcome) for outcome in ours) else 1


def _is_right(outcome: Outcome) -> bool:
    if outcome.failure is not None or outcome.agreement is None:
        return False
    return outcome.agreement.agrees or outcome.variant.table == "coarse"  # which has no tolerance


def _run(options: argparse.Namespace, variants: Sequence[Variant], workloads: Sequence[Workload]) -> Run:
    shape = SHAPES[options.shape]
    weights = 2 * (shape.layer_weights + shape.head_weights)
    peaks = CAPS[options.cap].peaks if options.cap else None
    with (
        held_to(options.cap, options.peers_dir),
        MachineMeter(options.threads, weights, quick=options.quick, peaks=peaks) as meter,
    ):
        return _measured(options, variants, workloads, meter)


def _measured(
    options: argparse.Namespace, variants: Sequence[Variant], workloads: Sequence[Workload], meter: MachineMeter
) -> Run:
    shape = SHAPES[options.shape]
    if options.quick:
        workloads = list(dict.fromkeys(workload.smaller() for workload in workloads))
    rounds = 1 if options.quick else options.rounds
    logs = options.peers_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    load_average, started = os.getloadavg()[0], _now()
    _say("measuring the machine")
    before = meter.measure()
    _say(f"making {shape.name}")
    checkpoint = make_checkpoint(shape, options.peers_dir / "checkpoints", weights=options.weights)
    course = Course(
        checkpoint=checkpoint,
        vocab_size=shape.vocab_size,
        workloads=workloads,
        rounds=rounds,
        threads=options.threads,
        check_tokens=options.check_tokens,
        logs=logs,
        interpreter=partial(_interpreter, options),
        say=_say,
        pairs=options.pairs,
        measure=meter.glance,
    )
    _say("asking the reference")
    outcomes = run_rounds(course, variants, read_reference(course))
    _say("measuring the machine again")
    piece = Piece(
        started=started,
        ended=_now(),
        rounds=rounds,
        processor=processor(),
        instructions=instructions(options.weights),
        code=code_digest(),
        load_average=load_average,
        before=before,
        after=meter.measure(),
        cap=options.cap,
    )
    return Run(shape, options.weights, workloads, options.tables, [piece], outcomes)


def _interpreter(options: argparse.Namespace, name: str) -> Path:
    if options.cap:
        name = CAPS[options.cap].environments.get(name, name)
    return interpreter(name, options.peers_dir, _say)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plot(options: argparse.Namespace) -> None:
    try:
        python = interpreter("plot", options.peers_dir, _say)
        script = Path(__file__).with_name("plot.py")
        subprocess.run([str(python), "-P", str(script), str(options.json), str(options.plot)], check=True)
    except (EnvironmentUnavailable, subprocess.CalledProcessError) as error:
        _say(f"no plot: {error}")


if __name__ == "__main__":
    sys.exit(main())
