"""The commands that talk to a running server: their flags, their connection, their exit codes.

Owns parsing and what an error becomes; `client_generate` and `client_operate` do the work. Exit codes: 0 done,
1 the request failed, 2 wrong usage, 3 no server to connect to, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pawl.errors import PawlError
from pawl_server.cli import client_generate, client_operate
from pawl_server.cli.client_tls import add_tls_flags
from pawl_server.cli.render import describe

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 (argparse has no public name)

__all__ = ["CANNOT_CONNECT", "FAILED", "INTERRUPTED", "USAGE", "register"]

FAILED = 1
USAGE = 2
CANNOT_CONNECT = 3
INTERRUPTED = 130

_EPILOG = (
    "exit codes: 0 done, 1 the request failed, 2 wrong usage, 3 no server to connect to, 130 interrupted. "
    "The API key is read from PAWL_API_KEY."
)
Run = Callable[[argparse.Namespace], int]


def register(subparsers: Commands) -> None:
    """Add generate, chat, score, models, requests, drain and cancel; each sets `run`."""
    connection, admin = _connection_flags(), _admin_flags()
    _add_generate(subparsers, connection)
    _add_chat(subparsers, connection)
    _add_score(subparsers, connection)
    models = _add(subparsers, "models", "what is served", client_operate.models, connection)
    _add_json(models)
    requests = _add(subparsers, "requests", "what runs, what waits and why", client_operate.requests, admin)
    _add_json(requests)
    drain = _add(subparsers, "drain", "stop taking requests, let running ones finish", client_operate.drain, admin)
    drain.add_argument(
        "--grace", type=_seconds, metavar="S", help="seconds until what is left is cancelled (default: the server's)"
    )
    cancel = _add(
        subparsers,
        "cancel",
        "end running requests (exit code 1 if one is not known)",
        client_operate.cancel,
        connection,
    )
    cancel.add_argument("request_ids", nargs="+", metavar="ID", help="id of a request of yours")
    cancel.add_argument("--reason", default="", help="why, for the server's log")
    _add_json(cancel)


def _add(
    subparsers: Commands, name: str, text: str, run: Run, *parents: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text, description=text, epilog=_EPILOG, parents=list(parents))
    parser.set_defaults(run=_guarded(run))
    return parser


def _guarded(run: Run) -> Run:
    """Turn what a command raises into one line on stderr and an exit code."""

    def guarded(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except PawlError as error:
            print(f"error: {describe(error)}", file=sys.stderr)
            return CANNOT_CONNECT if error.reason == "CANNOT_CONNECT" else FAILED
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return INTERRUPTED

    return guarded


def _positive_seconds(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 seconds leave no time for an answer")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _connection_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("connection")
    group.add_argument(
        "--target", help="host:port, or grpcs://host:port for TLS (default: PAWL_TARGET, else localhost:50051)"
    )
    group.add_argument("--model", help="name of the model (default: the only one served)")
    _add_common(group)
    return flags


def _admin_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("connection")
    group.add_argument(
        "--admin-target", help="host:port of the admin listener (default: PAWL_ADMIN_TARGET, else localhost:50052)"
    )
    group.add_argument(
        "--internal-token-file",
        type=Path,
        metavar="FILE",
        help="the server's, which its admin listener wants beyond loopback (default: PAWL_INTERNAL_TOKEN, else the"
        " file of PAWL_INTERNAL_TOKEN_FILE)",
    )
    _add_common(group)
    return flags


def _add_common(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timeout", type=_positive_seconds, metavar="S", help="seconds for a call (default: PAWL_TIMEOUT or 600)"
    )
    add_tls_flags(group)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "unset means the model's own default; 0 means 0")
    group.add_argument("-n", "--max-tokens", type=int, metavar="N", help="most tokens to generate")
    group.add_argument("-t", "--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="X", help="keep the smallest set of this probability")
    group.add_argument("--top-k", type=int, metavar="N", help="keep the N best tokens")
    group.add_argument("--min-p", type=float, metavar="X", help="drop tokens below this share of the best")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="1 is off")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="0 is off")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="0 is off")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same tokens")
    shape = group.add_mutually_exclusive_group()
    shape.add_argument("--json-schema", metavar="JSON|@FILE", help="the output is JSON that fits this JSON Schema")
    shape.add_argument("--regex", metavar="REGEX", help="the output is matched by this as a whole")
    shape.add_argument("--grammar", metavar="EBNF|@FILE", help="the output is a text of this grammar (Lark or GBNF)")
    shape.add_argument("--choice", action="append", metavar="TEXT", help="the output is this text or another --choice")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the output here; may be given again")
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-text tokens")
    group.add_argument("--priority", type=int, metavar="N", help="higher is served first")
    group.add_argument("--request-id", metavar="ID", help="an id of your own, for `pawl cancel`")
    group.add_argument("-v", "--verbose", action="store_true", help="say on stderr why it ended and how fast it was")


def _add_generate(subparsers: Commands, connection: argparse.ArgumentParser) -> None:
    parser = _add(subparsers, "generate", "continue a prompt, streamed", client_generate.generate, connection)
    parser.add_argument("prompt", metavar="PROMPT", help="what to continue; - reads it from stdin")
    _add_sampling(parser)
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="this many outputs; each is printed when it is complete, after its number",
    )
    parser.add_argument(
        "--logprobs", type=int, nargs="?", const=0, metavar="N", help="a table of the tokens, with N alternatives each"
    )
    _add_json(parser)


def _add_chat(subparsers: Commands, connection: argparse.ArgumentParser) -> None:
    parser = _add(
        subparsers,
        "chat",
        "talk with the model; Ctrl-C cancels an answer, Ctrl-D leaves",
        client_generate.chat,
        connection,
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="instructions to the model")
    parser.add_argument("--once", metavar="TEXT", help="say this, print the answer, leave; - reads it from stdin")
    _add_sampling(parser)


def _add_score(subparsers: Commands, connection: argparse.ArgumentParser) -> None:
    parser = _add(subparsers, "score", "how probable continuations are", client_generate.score, connection)
    parser.add_argument("context", metavar="CONTEXT", help="what the continuations follow; - reads it from stdin")
    parser.add_argument("continuations", nargs="+", metavar="CONTINUATION", help="a text to score")
    _add_json(parser)
