"""The command line: `pawl serve | fleet | frontend | doctor | plan` and the client's commands.

Owns parsing, exit codes and what is printed. Imports only what the command needs, so that the client's commands
work with the base install.

Exit codes: 0 done, 1 failed, 2 wrong usage or an optional package is missing, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pawl.errors import PawlError
from pawl_server.cli.arguments import build_parser, wants_all_help
from pawl_server.cli.fatal import print_fatal

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(all_help=wants_all_help(given))
    parsed = parser.parse_args(["--help" if word == "--help-all" else word for word in given])
    if not hasattr(parsed, "run"):
        parser.print_help()
        return EXIT_USAGE
    as_json = getattr(parsed, "log_format", None) == "json" or os.environ.get("PAWL_LOG_FORMAT") == "json"
    try:
        code: int | None = parsed.run(parsed)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; nothing is left to say, also not at the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in {"pawl", "pawl_server", "pawl_workers"}:
            raise
        print(
            f"pawl {_command(parsed)} needs the package {package!r}, which is not installed:"
            " pip install 'pawl-serve[all]'",
            file=sys.stderr,
        )
        return EXIT_USAGE
    except PawlError as error:
        print_fatal(error, command=_command(parsed), as_json=as_json)
        return EXIT_USAGE if error.reason in {"BAD_SETTING", "UNKNOWN_SETTING", "TOKEN_NEEDED"} else 1
    return code or 0


def _command(parsed: argparse.Namespace) -> str:
    return str(getattr(parsed, "command", None) or "")
