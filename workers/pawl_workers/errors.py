"""The errors a worker raises: one root, `WorkerError`, and one class per thing that can be wrong.

Knows no wire codes; the engine maps these to the public error tree.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "OutOfMemoryError", "PlanError", "SelfTestError", "WorkerError"]


class WorkerError(Exception):
    """A worker cannot do what it was asked; the message holds the numbers and the remedy.

    A name in a checkpoint's JSON may hold half of a surrogate pair, which no pipe, log or terminal takes: it is shown
    as its escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class CheckpointError(WorkerError):
    """A checkpoint is missing, incomplete, or of a kind that is not supported."""


class OutOfMemoryError(WorkerError):
    """The weights or the KV cache do not fit into the memory that is available."""


class PlanError(WorkerError):
    """A step plan breaks the contract of `pawl_workers.plan`; the worker's state is unchanged."""


class SelfTestError(WorkerError):
    """The loaded model and the reference kernels disagree."""
