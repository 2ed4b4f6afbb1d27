"""Strict mode on a GPU: a request's bits do not depend on what else is in the step.

cuBLAS is kept and only denied what makes its sums depend on the number of rows: workspace, without which it cannot
split the inner dimension, sums in less than float32, and TF32. On a CPU the bits never depend on the batch.
"""

from __future__ import annotations

import os

import torch

from pawl_workers.errors import WorkerError

__all__ = ["STRICT_VARIABLES", "enter_strict_mode"]

STRICT_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
"""Read by torch when it makes the first handle of a library, KiB and number of buffers, and KiB."""


def enter_strict_mode() -> None:
    """Set the process up, for good.

    Raises:
        WorkerError: CUDA is in use already and its libraries may have the workspace that they had without this.
    """
    missing = [name for name, value in STRICT_VARIABLES.items() if os.environ.get(name) != value]
    if missing and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        wanted = " ".join(f"{name}={STRICT_VARIABLES[name]}" for name in missing)
        raise WorkerError(f"strict mode must come before the first use of CUDA in a process; start it with {wanted}")
    os.environ.update(STRICT_VARIABLES)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
