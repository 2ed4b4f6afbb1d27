"""pawl in process: scheduler, paged KV cache and worker, without gRPC."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from pawl_loadtest.peers.workloads import Workload
from pawl_workers.parallel import thread_environment

if TYPE_CHECKING:
    from collections.abc import Sequence


class Engine:
    """A worker under the production scheduler; `settings` are options of the worker."""

    def __init__(self, checkpoint: str, threads: int, workloads: list[list[int]], settings: dict[str, str]) -> None:
        os.environ |= thread_environment(threads)  # as a server's engine has it; read as torch is imported
        from pawl_loadtest.peers.in_process import InProcess  # noqa: PLC0415 (imports torch)

        self._engine = InProcess(checkpoint, threads, [Workload(*sizes) for sizes in workloads], settings)
        facts = self._engine.facts
        self.facts = {
            "version": f"pawl, kernels {facts.kernels}, {facts.data_type}",
            "weight_bytes": facts.weight_bytes,
            "load_s": facts.load_s,
        }

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, object]:
        """Greedy tokens of each prompt, exactly so many, and the seconds that they took."""
        started = time.perf_counter()
        tokens = self._engine.run(prompts, output_tokens)
        return {"tokens": tokens, "seconds": time.perf_counter() - started}
