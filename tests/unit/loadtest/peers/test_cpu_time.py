"""Where the CPU time of a served token goes."""

from __future__ import annotations

import os
import subprocess
import sys

from pawl_loadtest.peers.cpu_time import CLIENT, ENGINE, cpu_seconds, spent

BURN = "import time\nwhile time.process_time() < 0.2: pass\nprint('done', flush=True)\ninput()"


def test_each_process_counts_for_its_part() -> None:
    """A child is told by its command line; this process, which is the client here, only waits."""
    before = cpu_seconds(os.getpid())
    children = [
        subprocess.Popen([sys.executable, "-c", BURN, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("ray::EngineReplica.run", "pawl_server.serve.frontend_child", "raylet")
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"done\n"
        used = spent(before, cpu_seconds(os.getpid()))
    finally:
        for child in children:
            child.communicate(b"\n", timeout=20)
    assert set(used) == {ENGINE, "front end", CLIENT, "Ray and fleet"}
    assert all(used[part] >= 0.15 for part in (ENGINE, "front end", "Ray and fleet"))
    assert used[CLIENT] < 0.15


def test_a_client_that_has_ended_used_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait(20)
    assert cpu_seconds(child.pid) == {}
