"""A front end gives way to engines, and never takes back what it was told to give way to."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pawl_server.serve.priority import NICENESS

PROGRAM = """
import os, sys, threading
from pawl_server.serve.priority import give_way
os.nice(int(sys.argv[1]))
give_way()
def tell():
    print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_BATCH)
tell()
thread = threading.Thread(target=tell)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("already", [0, NICENESS + 5])
def test_a_process_that_gives_way_is_a_batch_process_with_all_its_threads(already: int) -> None:
    outer = int(subprocess.run(["nice"], capture_output=True, text=True, check=True).stdout)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(already)], capture_output=True, text=True, check=True)
    expected = f"{max(NICENESS, min(19, outer + already))} True"
    assert done.stdout.splitlines() == [expected, expected]
