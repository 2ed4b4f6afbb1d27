"""Loads the weights of a checkpoint in a process of its own and prints what that took: `python -m ... FOLDER ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pawl_workers.model.loading import load_weights
from pawl_workers.options import WorkerOptions
from pawl_workers.start_plan import plan_start

__all__ = ["main"]


def _private_bytes() -> int:
    """What this process has written to: files that are mapped, such as the checkpoint, do not count."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Print what the weights take, and by how much the process grew at its largest, after any tensor."""
    folder, kernels, weight_dtype = sys.argv[1:]
    torch.set_num_threads(1)
    plan = plan_start(WorkerOptions(folder, kernels=kernels, weight_dtype=weight_dtype))
    before, grown = _private_bytes(), [0]
    weights = load_weights(
        plan.config,
        plan.kernels,
        plan.device,
        plan.dtype,
        plan.available_bytes,
        lambda _done, _total: grown.append(_private_bytes() - before),
        reading=plan.reading,
    )
    grown.append(_private_bytes() - before)
    print(json.dumps({"weight_bytes": weights.num_bytes, "grown_bytes": max(grown)}))


if __name__ == "__main__":
    main()
