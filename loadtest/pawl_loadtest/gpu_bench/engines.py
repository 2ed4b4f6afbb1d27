"""The two that are measured, on the same checkpoint and the same GPU, one at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pawl_loadtest.gpu_bench.workload import Request, shortened
from pawl_loadtest.peers.in_process import generate_all
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["Checked", "Outcome", "Pawl", "Transformers"]

_BATCH_TOKENS = 16_384
_BF16_BITS = 7  # of the fraction
_PAGE = 256  # of transformers' cache, as by default
_SMALLEST_BLOCK = 64 if torch.cuda.is_available() else 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """Generated tokens of each request, and the seconds that all of them took."""

    token_ids: list[list[int]]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return sum(map(len, self.token_ids)) / self.seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Pawl:
    """The scheduler, the paged KV cache and a worker in this process, greedy, without a prefix cache."""

    name = "pawl"

    def __init__(self, checkpoint: Path, requests: Sequence[Request], *, strict: bool, device: str = "cuda") -> None:
        longest = max(len(one.prompt_ids) + one.output_tokens for one in requests)
        options = WorkerOptions(
            model=str(checkpoint),
            device=device,
            max_context=longest,
            max_running=len(requests),
            max_batch_tokens=_BATCH_TOKENS,
            num_blocks=sum(-(-(len(one.prompt_ids) + one.output_tokens) // _SMALLEST_BLOCK) + 1 for one in requests),
            strict=strict,
        )
        self._worker = Worker.load(options)
        facts = self._worker.facts
        self._limits = SchedulerLimits(
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
            max_running=len(requests),
            max_batch_tokens=_BATCH_TOKENS,
            max_context=longest,
            max_prefill_chunk=_BATCH_TOKENS,
            max_partial_prefills=len(requests),
            prefix_cache=False,
        )
        self._epoch = 1

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Have kernels compiled and graphs captured, for all sizes of steps that will come."""
        self.run(requests)

    def run(self, requests: Sequence[Request]) -> Outcome:
        """Generate exactly the tokens that are asked for."""
        self._epoch += 1
        self._worker.reset(self._epoch)
        root = CacheRoot("gpu-bench", self._worker.facts.data_type, self._limits.block_size)
        state = SchedulerState(self._limits, root, epoch=self._epoch)
        wanted = [(list(one.prompt_ids), one.output_tokens) for one in requests]
        _synchronise()
        started = time.perf_counter()
        output = generate_all(state, self._limits, self._worker, wanted)
        _synchronise()
        return Outcome(output, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a plain forward pass of transformers says of generated tokens.

    Attributes:
        margins: how far below the best logit each token's lies, in steps of bf16 at the best logit's size, which is as
            finely as this model tells logits apart.
        chosen: of each request, whether a token chooses an expert, 0 or 1, [layers, tokens, experts]; empty where
            nothing is routed. Tokens of prompts count too: random models soon repeat themselves, each request in its
            own way.
    """

    margins: list[float]
    chosen: list[Tensor]

    def frequencies(self) -> list[list[float]] | None:
        """Share of tokens that choose each expert of each layer, or None where nothing is routed."""
        if not self.chosen:
            return None
        found: list[list[float]] = torch.cat(self.chosen, dim=1).mean(dim=1).tolist()
        return found


class Transformers:
    """Continuous batching of transformers, greedy, bf16. Without flash-attn installed it attends by `sdpa|paged`."""

    name = "transformers continuous batching"

    def __init__(self, checkpoint: Path, *, device: str = "cuda") -> None:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - heavy

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model = model.to(device).eval()
        self._device = device

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Have libraries loaded: a little of the workload, of which a whole round takes minutes."""
        self.run(shortened(requests, 200, 8))

    def run(self, requests: Sequence[Request]) -> Outcome:
        """Generate exactly the tokens that are asked for."""
        from transformers import ContinuousBatchingConfig, GenerationConfig  # noqa: PLC0415 - as above

        most = max(one.output_tokens for one in requests)
        config = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=-1, pad_token_id=0)
        found: dict[str, list[int]] = {}
        tokens = sum(len(one.prompt_ids) + one.output_tokens for one in requests)
        with self._model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=-(-tokens // _PAGE) + len(requests),
                max_batch_tokens=min(_BATCH_TOKENS, tokens),
                allow_block_sharing=False,
            ),
        ) as manager:
            _synchronise()
            started = time.perf_counter()
            names = [
                manager.add_request(list(one.prompt_ids), request_id=f"r{i}", max_new_tokens=one.output_tokens)
                for i, one in enumerate(requests)
            ]
            while len(found) < len(names):
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError(f"transformers gave no result for 60 s; {len(found)} of {len(names)} were done")
                if result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
            _synchronise()
            seconds = time.perf_counter() - started
        return Outcome([found[name] for name in names], seconds)

    def check(self, requests: Sequence[Request], token_ids: Sequence[Sequence[int]]) -> Checked:
        """See what a plain forward pass over the whole of each sequence says of tokens that were generated."""
        checked = Checked([], [])
        active = int(getattr(self._model.config, "num_experts_per_tok", None) or 0)
        routing = {"output_router_logits": True} if active else {}
        with torch.inference_mode():
            for one, generated in zip(requests, token_ids, strict=True):
                ids = torch.tensor([[*one.prompt_ids, *generated]], device=self._device)
                output = self._model(ids, **routing)
                logits = output.logits[0, len(one.prompt_ids) - 1 : -1].float()
                chosen = logits.gather(1, ids[0, len(one.prompt_ids) :].unsqueeze(1)).squeeze(1)
                best = logits.max(dim=-1).values
                step = torch.exp2(torch.floor(torch.log2(best.abs().clamp(min=1e-3))) - _BF16_BITS)
                checked.margins.extend(((best - chosen) / step).tolist())
                if active:
                    scores = torch.stack(list(output.router_logits)).float()
                    experts = scores.topk(active, dim=-1).indices
                    checked.chosen.append(one_hot(experts, scores.shape[-1]).sum(dim=-2).float().cpu())
        return checked
