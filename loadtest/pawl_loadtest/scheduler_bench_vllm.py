"""Drives vLLM's own v1 scheduler with a stub in place of its executor. Run by an interpreter that has vLLM, not ours.

`pawl_loadtest.scheduler_bench --peer-python PATH` starts it and talks to it in lines of JSON: a case with its
prompts comes in, the seconds of `schedule` and `update_from_output` of each pure decode step go out. Written against
vLLM 0.32 (its tests build a scheduler in the same way); imports nothing of pawl, so that it needs none of it there.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol, TypedDict

# A model is needed for its sizes alone: only this file of it is ever read.
_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 1024, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 131072, "torch_dtype": "float32",
}  # fmt: skip


class Work(TypedDict):
    """A case, as it comes in."""

    running: int
    block_size: int
    num_blocks: int
    max_batch_tokens: int
    max_context: int
    max_output_tokens: int
    num_steps: int
    token_id: int
    prompts: list[list[int]]


def decode_steps(work: Work, model: str) -> list[float]:
    """Seconds of each step in which everybody decodes one token."""
    import torch  # noqa: PLC0415 (after the first line of output: the other side waits for it)
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.config import (  # noqa: PLC0415
        CacheConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.utils.hashing import get_hash_fn_by_name  # noqa: PLC0415
    from vllm.v1.core.kv_cache_utils import (  # noqa: PLC0415
        get_request_block_hasher,
        init_none_hash,
    )
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415
    from vllm.v1.kv_cache_interface import (  # noqa: PLC0415
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.outputs import ModelRunnerOutput  # noqa: PLC0415
    from vllm.v1.request import Request  # noqa: PLC0415
    from vllm.v1.structured_output import StructuredOutputManager  # noqa: PLC0415

    size = work["block_size"]
    scheduler_config = SchedulerConfig(
        max_num_seqs=work["running"], max_num_batched_tokens=work["max_batch_tokens"],
        max_model_len=work["max_context"], enable_chunked_prefill=True, is_encoder_decoder=False,
        async_scheduling=False,
    )  # fmt: skip
    model_config = ModelConfig(
        model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=work["max_context"]
    )
    cache_config = CacheConfig(block_size=size, enable_prefix_caching=True, prefix_caching_hash_algo="sha256")
    config = VllmConfig(scheduler_config=scheduler_config, model_config=model_config, cache_config=cache_config)
    cache_config.num_gpu_blocks = work["num_blocks"]
    spec = FullAttentionSpec(block_size=size, num_kv_heads=2, head_size=16, dtype=torch.float32)
    kv_config = KVCacheConfig(
        num_blocks=work["num_blocks"], kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    scheduler = Scheduler(
        vllm_config=config, kv_cache_config=kv_config, structured_output_manager=StructuredOutputManager(config),
        block_size=size, log_stats=False,
    )  # fmt: skip
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(size, hash_function)
    for number, prompt in enumerate(work["prompts"]):
        params = SamplingParams(max_tokens=work["max_output_tokens"], temperature=1.0)
        params.update_from_generation_config({}, 2)
        request = Request(
            request_id=str(number), prompt_token_ids=prompt, sampling_params=params, pooling_params=None,
            block_hasher=hasher,
        )  # fmt: skip
        scheduler.add_request(request)
    seconds: list[float] = []
    gc.collect()
    gc.freeze()
    while len(seconds) < work["num_steps"]:
        begin = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        names = list(plan.num_scheduled_tokens)
        sampled = [[work["token_id"]] if _is_done(scheduler.requests[name]) else [] for name in names]
        result = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=sampled, logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
        )  # fmt: skip
        answered = time.perf_counter()
        scheduler.update_from_output(plan, result)
        end = time.perf_counter()
        if plan.total_num_scheduled_tokens == len(names) == work["running"]:
            seconds.append(end - answered + scheduled - begin)
    gc.unfreeze()
    return seconds


class _Progress(Protocol):
    num_computed_tokens: int
    num_tokens: int


def _is_done(request: _Progress) -> bool:
    """Whether the step reaches the last token of a request, so that it samples."""
    return request.num_computed_tokens >= request.num_tokens


def main() -> None:
    """Answer cases until the input ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # vLLM logs there
    with tempfile.TemporaryDirectory(prefix="pawl-peer-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        for line in sys.stdin:
            answer = {"seconds": decode_steps(json.loads(line), folder)}
            out.write(json.dumps(answer) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
