"""Pictures of runs. The only module that needs matplotlib, which comes with `pawl-serve[sim]`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pawl_server.sim.simulator import Run
from pawl_server.sim.summary import times_to_first_token

__all__ = ["PlotsUnavailableError", "check_plots", "plot_first_tokens"]


class PlotsUnavailableError(RuntimeError):
    """matplotlib is not installed."""


def check_plots() -> None:
    """Find out before a long run whether plots can be made.

    Raises:
        PlotsUnavailableError: they cannot.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsUnavailableError("--plots needs matplotlib: pip install 'pawl-serve[sim]', or leave --plots out")


def plot_first_tokens(runs: Sequence[Run], folder: Path) -> list[Path]:
    """One picture per workload: how many chats had their first token within a time, by policy.

    Returns:
        The files written, `WORKLOAD.png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (optional, and slow to import)
    from matplotlib.figure import Figure  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in dict.fromkeys(run.trace.name for run in runs):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for run in runs:
            times_s = np.sort(times_to_first_token(run))
            if run.trace.name == name and len(times_s):
                shares = np.arange(1, len(times_s) + 1) / len(times_s)
                axes.step(np.maximum(times_s, 1e-4), shares, where="post", label=run.policy.name)
        axes.set_xscale("log")
        axes.set_xlabel("seconds to the first token")
        axes.set_ylabel("share of chats")
        axes.set_title(name)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written
