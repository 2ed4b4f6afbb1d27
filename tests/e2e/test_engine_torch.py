"""A real engine process: torch, a small random checkpoint, and transformers as the judge of its tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from pawl_server.config import EngineSettings, ModelSettings
from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.spec import EngineProgress, EngineSpec
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.checkpoints import load_reference, make_llama
from tests.fakes.engine_harness import Recorder, ended, submit_frame
from tests.fakes.engine_subprocess import engine_process

KV_BYTES = 8 << 20
HOST_BYTES = 1 << 20


def _greedy(prompt: list[int], num_output: int) -> engine_pb2.Submit:
    submit = submit_frame(prompt, num_output)
    submit.sampling.temperature = 0.0
    submit.sampling.logprobs = 2
    return submit


async def test_greedy_tokens_are_those_of_the_reference(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    prompts = [[5, 17, 90, 3], [8], list(range(20, 60))]
    model = load_reference(folder).eval()
    spec = EngineSpec(
        model=ModelSettings(model=str(folder), device="cpu", dtype="float32", max_context=128),
        engine=EngineSettings(
            max_running=4,
            max_batch_tokens=32,
            max_prefill_chunk=16,
            kv_max_bytes=KV_BYTES,
            check_every=1,
            host_kv_bytes=HOST_BYTES,
        ),
        internal_token="secret",
        num_threads=1,
    )
    async with engine_process(spec, "pawl_server.engine.process") as process:
        ready = await process.ready()
        async with EngineLink(ready.addresses.address, "secret", "test") as link:
            recorders = [Recorder() for _ in prompts]
            for prompt, recorder in zip(prompts, recorders, strict=True):
                link.open(_greedy(prompt, 12), recorder)
            for prompt, recorder in zip(prompts, recorders, strict=True):
                await ended(recorder)
                with torch.inference_mode():
                    whole = torch.tensor([prompt + recorder.token_ids])
                    scores = model(whole).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                best = scores.max(-1).values
                chosen = scores.gather(1, torch.tensor(recorder.token_ids)[:, None])[:, 0]
                assert torch.allclose(best, chosen, atol=1e-4)  # the best token, but for rounding
                told = torch.tensor([position.logprob for position in recorder.logprobs])
                assert torch.allclose(told, chosen, atol=1e-4)
                assert [position.rank for position in recorder.logprobs] == [1] * 12
            assert link.welcome.model.max_context_tokens == 128
    weights = [e for e in process.events if isinstance(e, EngineProgress) and e.step == "weights"][-1]
    assert " M parameters in float32, computed in float32 on cpu by the cpu kernels, KV in float32" in weights.text
    memory = [e for e in process.events if isinstance(e, EngineProgress) and e.step == "memory"][-1]
    assert 0 < memory.facts["kv_bytes"] <= KV_BYTES
    block_bytes = memory.facts["kv_bytes"] // (memory.facts["num_blocks"] + 1)
    assert memory.facts["num_host_blocks"] == HOST_BYTES // block_bytes > 0
    assert memory.facts["num_blocks"] == link.welcome.num_blocks
