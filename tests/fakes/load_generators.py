"""The load generators as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pawl_loadtest
from tests.fakes.servers import ROOT, environment

__all__ = ["DEADLINE_S", "locust", "run_generator"]

DEADLINE_S = 90.0
_LOCUSTFILE = Path(pawl_loadtest.__file__).parent / "locustfile.py"
# A test machine may be busy: the generators' own lateness is their subject, not that of these tests.
_ANY_LATENESS_MS = "60000"


def run_generator(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A generator as a user starts it; killed at the deadline."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=environment(variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def locust(target: str, report: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Locust with a file of settings that any machine holds; its figures begin with `report`."""
    command = ("locust", "-f", str(_LOCUSTFILE), "--headless", "--csv", str(report), "--html", f"{report}.html")
    usual = {
        "PAWL_TARGET": target,
        "PAWL_LOAD_PROMPT_TOKENS": "8",
        "PAWL_LOAD_OUTPUT_TOKENS": "4",
        "PAWL_LOAD_MAX_LATENESS_MS": _ANY_LATENESS_MS,
    }
    return run_generator(*command, *flags, **(usual | variables))
