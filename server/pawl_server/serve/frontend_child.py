"""One front end as a child of `pawl serve`: `python -m pawl_server.serve.frontend_child`.

Reads its order (settings, the fleet's address, the token) as one JSON line on stdin, which stays open: when it
closes, the parent is gone, and so are we soon. Answers with one JSON line on stdout. Neither Ray nor torch is in
this process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading

import uvloop

from pawl.errors import PawlError
from pawl_server.collector import leave_alone
from pawl_server.frontend.main import FrontendAddresses, run_frontend
from pawl_server.logs import set_up_logs
from pawl_server.serve.events import ServerAddresses
from pawl_server.serve.orders import Answer, FrontendFailed, FrontendReady, decode_order, encode
from pawl_server.serve.priority import give_way

__all__ = ["main"]

log = logging.getLogger(__name__)

# The engines die with the parent, so the streams end at once and there is little to wait for.
_ORPHAN_GRACE_S = 3.0


def main() -> int:
    """Serve until SIGTERM; returns the exit code."""
    give_way()  # before there is any other thread
    order = decode_order(sys.stdin.buffer.readline())
    set_up_logs(order.config.log, "frontend")
    # A terminal's Ctrl-C is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="pawl-parent", daemon=True).start()

    def on_ready(addresses: FrontendAddresses) -> None:
        leave_alone()
        _say(
            FrontendReady(
                addresses=ServerAddresses(
                    grpc=addresses.grpc,
                    admin=addresses.admin,
                    metrics=addresses.metrics,
                    process_id=os.getpid(),
                )
            )
        )

    try:
        # grpc.aio wakes the loop once more for every message that it was woken for, so the loop's own time counts.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run_frontend(order.config, order.fleet_address, order.token, on_ready))
    except PawlError as error:
        invalid = error.code == "invalid_request"
        _say(FrontendFailed(message=error.message, reason=error.reason, invalid=invalid))
    except Exception as error:
        log.exception("the front end failed")
        _say(FrontendFailed(message=f"{type(error).__name__}: {error}"))
    return 1


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(encode(answer))
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    # Not by sys.stdin: the interpreter cannot end while a thread holds its lock.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_ORPHAN_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
