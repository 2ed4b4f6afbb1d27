"""Draws the figures of a run: `python plot.py RUN.json PICTURE`, with an interpreter that has matplotlib."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {"exact": "#4c78a8", "fp16": "#72b7b2", "coarse": "#b8b8b8"}
_OURS = "#e45756"


def main() -> None:
    """One panel for each workload: medians as bars, the range of the rounds as whiskers."""
    run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    workloads = run["workloads"]
    height = 1 + 0.3 * len(run["variants"])
    figure, panels = plt.subplots(1, len(workloads), figsize=(5 * len(workloads), height), squeeze=False)
    for panel, (name, workload) in zip(panels[0], workloads.items(), strict=True):
        rows = [row for row in run["variants"] if row["rates"].get(name)]
        rates = [list(row["rates"][name].values()) for row in rows]
        medians = [statistics.median(of_row) for of_row in rates]
        whiskers = [
            [middle - min(of_row) for of_row, middle in zip(rates, medians, strict=True)],
            [max(of_row) - middle for of_row, middle in zip(rates, medians, strict=True)],
        ]
        colours = [_OURS if row["name"].startswith("pawl") else _COLOURS[row["table"]] for row in rows]
        panel.barh(range(len(rows)), medians, xerr=whiskers, color=colours)
        panel.set_yticks(range(len(rows)), [f"{row['name']} ({row['table']})" for row in rows])
        panel.invert_yaxis()
        panel.set_title(name)
        panel.set_xlabel(workload["unit"])
    figure.suptitle(f"{run['shape']}, {run['machine']['threads']} threads, {run['rounds']} rounds")
    figure.tight_layout()
    figure.savefig(sys.argv[2])


if __name__ == "__main__":
    main()
