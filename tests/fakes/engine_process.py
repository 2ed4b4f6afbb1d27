"""`pawl_server.engine.process` with the shadow worker: a real engine process without torch or weights."""

from __future__ import annotations

from pawl_server.engine.process import main
from tests.fakes.engine_worker import load_fake_worker

if __name__ == "__main__":
    main(load_fake_worker)
