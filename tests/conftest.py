"""Settings that all tests share: hypothesis profiles and one compute thread per process."""

import os

from hypothesis import HealthCheck, settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when triton is first imported: its kernels run in numpy, on the CPU. `make test-gpu` sets it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# CI draws the same examples every time, so that a failure there can be run again here.
_slow_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", _slow_machine, derandomize=True, print_blob=True)
settings.register_profile("dev", _slow_machine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
