"""OpenVINO through optimum-intel: a stateful model with its KV inside, `generate` on a static batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import openvino
import torch
from optimum.intel import OVModelForCausalLM
from transformers import GenerationConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


class Engine:
    """The checkpoint as OpenVINO IR; `settings` name the type of its `weights`, the rest are OpenVINO's properties."""

    def __init__(self, checkpoint: str, threads: int, workloads: list[list[int]], settings: dict[str, str]) -> None:
        properties = {name: value for name, value in settings.items() if name != "weights"}
        properties |= {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1", "CACHE_DIR": ""}
        path = _export(Path(checkpoint), settings["weights"])
        self._model = OVModelForCausalLM.from_pretrained(path, ov_config=properties, use_cache=True)
        compiled = self._model.request.get_compiled_model()
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "INFERENCE_NUM_THREADS")
        self.facts = {
            "version": f"openvino {openvino.__version__}",
            "properties": {name: str(compiled.get_property(name)) for name in names},
        }

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, object]:
        """Greedy tokens of each prompt, exactly so many, and the seconds that they took."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        output = self._model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
        seconds = time.perf_counter() - started
        return {"tokens": output[:, ids.shape[1] :].tolist(), "seconds": seconds}


def _export(checkpoint: Path, weights: str) -> Path:
    """Write the IR with weights in `f32` or `int8`, or find it written; beside the checkpoint."""
    path = checkpoint.with_name(f"{checkpoint.name}-openvino-{weights}")
    if not path.is_dir():
        unfinished = path.with_name(f"{path.name}.unfinished")
        model = OVModelForCausalLM.from_pretrained(
            checkpoint, export=True, compile=False, load_in_8bit=weights == "int8", dtype=torch.float32
        )
        model.save_pretrained(unfinished)
        unfinished.rename(path)
    return path
