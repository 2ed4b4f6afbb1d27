"""A fatal error as one block on stderr: what failed, the reason as a stable word, what to do."""

from __future__ import annotations

import json
import sys
import textwrap

from pawl.errors import PawlError

__all__ = ["print_fatal"]


def print_fatal(error: PawlError, *, command: str, as_json: bool) -> None:
    """Print an error of a command."""
    if as_json:
        fields = {
            "event": "fatal",
            "command": command,
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
        }
        print(json.dumps(fields, ensure_ascii=False), file=sys.stderr, flush=True)
        return
    violations = "".join(f"\n{item.field}: {item.message}" for item in error.violations)
    first, *rest = f"{error.message}{violations}".splitlines() or [""]
    block = "\n".join([f"ERROR pawl {command}: {first}", *rest])
    print(textwrap.indent(block, "  ").lstrip() + f"\n  [{error.reason}]", file=sys.stderr, flush=True)
