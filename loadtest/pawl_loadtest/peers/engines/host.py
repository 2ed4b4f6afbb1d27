"""Serves one engine over JSON lines: `python -P host.py ENGINE_FILE`. Needs the standard library alone.

A line on standard input is a request `{"op": ..., "arguments": {...}}`; a line on standard output answers it with
`{"result": ...}` or `{"error": "..."}`. Whatever else the engine prints goes to standard error. The file defines a
class `Engine`; `load` makes one from its arguments, and each other operation is a method of it. Ends with its input.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines and their libraries print
    engine: object | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            operation, arguments = request["op"], request["arguments"]
            if operation == "load":
                engine = runpy.run_path(sys.argv[1])["Engine"](**arguments)
                result = getattr(engine, "facts", {})
            else:
                result = getattr(engine, operation)(**arguments)
            answer = {"result": result}
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    close = getattr(engine, "close", None)
    if close is not None:
        close()


if __name__ == "__main__":
    main()
