"""transformers: `generate` on a static batch, or continuous batching. Also the reference that others are held to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


_PAGE = 32


class Engine:
    """A model of transformers in fp32."""

    def __init__(self, checkpoint: str, threads: int, workloads: list[list[int]], settings: dict[str, str]) -> None:
        torch.set_num_threads(threads)
        self._continuous = settings.get("batching") == "continuous"
        self._max_requests = max(requests for requests, _, _ in workloads)
        self._num_pages = max(n * (-(-(prompt + output) // _PAGE) + 1) for n, prompt, output in workloads)
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=settings.get("attention", "sdpa")
        ).eval()
        self.facts = {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, object]:
        """Greedy tokens of each prompt, exactly so many, and the seconds that they took."""
        run = self._generate_continuously if self._continuous else self._generate
        started = time.perf_counter()
        with torch.inference_mode():
            tokens = run(prompts, output_tokens)
        return {"tokens": tokens, "seconds": time.perf_counter() - started}

    def reference(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, object]:
        """Greedy tokens, and by how much each one's logit is above the next best: near 0 it is a tie."""
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            output = self._model.generate(
                ids, generation_config=self._config(output_tokens, scores=True), attention_mask=torch.ones_like(ids)
            )
        best = torch.stack(output.scores, dim=1).topk(2, dim=-1).values
        margins = (best[..., 0] - best[..., 1]).tolist()
        return {"tokens": output.sequences[:, ids.shape[1] :].tolist(), "margins": margins}

    def _config(self, output_tokens: int, *, scores: bool = False) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=output_tokens,
            min_new_tokens=None if self._continuous else output_tokens,
            eos_token_id=-1 if self._continuous else None,
            pad_token_id=0,
            output_scores=scores,
            return_dict_in_generate=scores,
        )

    def _generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        output = self._model.generate(
            ids, generation_config=self._config(output_tokens), attention_mask=torch.ones_like(ids)
        )
        generated: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return generated

    def _generate_continuously(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        outputs = self._model.generate_batch(
            inputs=[list(prompt) for prompt in prompts],
            generation_config=self._config(output_tokens),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=self._num_pages,
                max_batch_tokens=max(512, self._max_requests),
                allow_block_sharing=False,
            ),
            warmup=False,
        )
        # By request id, which transformers numbers in the order of the prompts.
        ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
        return [list(output.generated_tokens) for output in ordered]
