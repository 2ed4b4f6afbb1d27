"""The settings of thread pools, which have to be there before torch is."""

from __future__ import annotations

import subprocess
import sys

from pawl_workers.parallel import thread_environment

# Prints what an environment does to the pools of a process that imports torch under it.
PROGRAM = "import torch; print(torch.get_num_threads()); print(torch.__config__.parallel_info())"


def test_the_settings_are_known_before_torch_is_imported() -> None:
    program = "import sys, pawl_workers.parallel; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


def test_a_process_started_under_them_has_as_many_threads_as_it_was_told() -> None:
    environment = thread_environment(2)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PATH": "", **environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("2\n")
    assert "OMP_NUM_THREADS = '2'" in done.stderr
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
