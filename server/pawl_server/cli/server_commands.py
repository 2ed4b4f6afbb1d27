"""serve, fleet, frontend, doctor, plan and config: the commands that need the server's packages.

The packages are imported when a command runs, so that `pawl --help` works without them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Coroutine

from pawl.errors import InvalidRequest
from pawl_server.cli.arguments import Parser, add_settings, config_from
from pawl_server.config import Config

__all__ = ["register"]

_FLEET_DEFAULTS = {"fleet_port": 50060, "metrics_port": 9401}


def register(commands: argparse._SubParsersAction[Parser], *, all_help: bool) -> None:
    """Add the commands."""
    serve = commands.add_parser(
        "serve",
        help="start a whole server: fleet, replicas, front end",
        description="Start a whole server on this machine: a local Ray (or none, --fleet local), the fleet,"
        " its replicas and the front end. Ctrl-C or SIGTERM drains.",
    )
    serve.add_argument("checkpoint", nargs="?", metavar="MODEL", help="the same as --model")
    add_settings(serve, ("model", "engine", "fleet", "frontend", "security", "log"), all_help=all_help)
    serve.set_defaults(run=_serve)

    fleet = commands.add_parser(
        "fleet",
        help="start the fleet and its replicas alone",
        description="Start the fleet and its replicas, for front ends that run elsewhere. Inside a Ray cluster:"
        " --ray-address auto. Listens on --fleet-port 50060, with metrics on --metrics-port 9401.",
    )
    fleet.add_argument("checkpoint", nargs="?", metavar="MODEL", help="the same as --model")
    add_settings(fleet, ("model", "engine", "fleet", "log"), all_help=all_help)
    fleet.set_defaults(run=_fleet)

    frontend = commands.add_parser(
        "frontend",
        help="start a front end for a running fleet",
        description="Start a front end for a running fleet: --fleet HOST:PORT. Needs neither Ray nor torch.",
    )
    add_settings(frontend, ("frontend", "fleet", "security", "log"), all_help=all_help)
    frontend.set_defaults(run=_frontend)

    doctor = commands.add_parser("doctor", help="check this machine, and whether a model would be served")
    doctor.add_argument("checkpoint", nargs="?", metavar="MODEL", help="the same as --model")
    add_settings(doctor, ("model", "engine", "fleet", "frontend"), all_help=all_help)
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser(
        "plan",
        help="what a model would take of this machine: weights, activations, KV cache",
        description="Print what a server of these settings would take of this machine, without loading weights:"
        " it reads the configuration and the headers of the weights. Exit code 1 if it does not fit.",
    )
    plan.add_argument("checkpoint", nargs="?", metavar="MODEL", help="the same as --model")
    plan.add_argument("--json", action="store_true", help="print one JSON object; sizes in bytes")
    add_settings(plan, ("model", "engine", "fleet"), all_help=all_help)
    plan.set_defaults(run=_plan)

    show = commands.add_parser("config", help="print the settings that a server would have")
    add_settings(show, (), all_help=all_help)
    show.set_defaults(run=_config)


def _serve(parsed: argparse.Namespace) -> int:
    config = config_from(parsed, os.environ)
    from pawl_server.cli.output import make_output  # noqa: PLC0415 (optional packages)
    from pawl_server.serve.serving import serve  # noqa: PLC0415 (as above)

    return _run(config, "serve", lambda: serve(config, make_output(config)))


def _fleet(parsed: argparse.Namespace) -> int:
    config = config_from(parsed, os.environ, _FLEET_DEFAULTS)
    from pawl_server.cli.output import make_output  # noqa: PLC0415 (optional packages)
    from pawl_server.serve.fleet_command import run_fleet  # noqa: PLC0415 (as above)

    return _run(config, "fleet", lambda: run_fleet(config, make_output(config)))


def _frontend(parsed: argparse.Namespace) -> int:
    config = config_from(parsed, os.environ)
    import uvloop  # noqa: PLC0415 (optional packages)

    from pawl_server.cli.output import make_output  # noqa: PLC0415 (as above)
    from pawl_server.serve.frontend_command import run_frontend_alone  # noqa: PLC0415 (as above)

    return _run(config, "frontend", lambda: run_frontend_alone(config, make_output(config)), uvloop.new_event_loop)


def _doctor(parsed: argparse.Namespace) -> int:
    config = config_from(parsed, os.environ)
    from pawl_server.cli.doctor import examine  # noqa: PLC0415 (optional packages)

    failed = 0
    for finding in examine(config):
        print(finding.line, flush=True)
        failed += finding.level == "FAIL"
    print(f"\n{failed} check(s) failed" if failed else "\nall is well")
    return 1 if failed else 0


def _plan(parsed: argparse.Namespace) -> int:
    config = config_from(parsed, os.environ)
    from pawl_server.cli.plan import plan_model  # noqa: PLC0415 (optional packages)
    from pawl_server.cli.plan_text import plan_lines  # noqa: PLC0415 (as above)
    from pawl_workers.errors import WorkerError  # noqa: PLC0415 (as above)

    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there, the hub's client what it cannot import
            plan = plan_model(config)
    except WorkerError as error:
        raise InvalidRequest(str(error), reason="NO_PLAN") from error
    if parsed.json:
        print(json.dumps(dataclasses.asdict(plan), indent=2))
    else:
        print("\n".join(plan_lines(plan)))
    return 1 if plan.refused else 0


def _config(parsed: argparse.Namespace) -> int:
    section = ""
    for name, value in config_from(parsed, os.environ).shown().items():
        if name.partition(".")[0] != section:
            section = name.partition(".")[0]
            print(f"[{section}]")
        print(f"  {name.partition('.')[2]} = {value}")
    return 0


def _run(
    config: Config,
    process: str,
    work: Callable[[], Coroutine[None, None, int]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    from pawl_server.logs import set_up_logs  # noqa: PLC0415 (optional packages)

    set_up_logs(config.log, process)
    # Line by line also into a file or a pipe: whoever waits for READY must see it.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work())
