"""llama.cpp through the C interface of llama-cpp-python: all requests in one batch, a KV stream for each."""

from __future__ import annotations

import ctypes
import runpy
import time
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_TYPES = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}
_BATCH_TOKENS = 2048
_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Engine:
    """A GGUF file of the checkpoint; `settings` name the type of its `weights`, of its `kv`, and `flash` attention."""

    def __init__(self, checkpoint: str, threads: int, workloads: list[list[int]], settings: dict[str, str]) -> None:
        export = runpy.run_path(str(Path(__file__).with_name("gguf_export.py")))["export"]
        path = export(Path(checkpoint), settings["weights"])
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads, self._settings = threads, settings
        self._sizes = sorted({(requests, prompt + output) for requests, prompt, output in workloads})
        self._size: tuple[int, int] | None = None
        self._context: ctypes.c_void_p | None = None
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.facts = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, object]:
        """Greedy tokens of each prompt, exactly so many, and the seconds that they took."""
        self._make_context(len(prompts), len(prompts[0]) + output_tokens)
        started = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        tokens = self._prefill(prompts)
        output = [tokens]
        for step in range(output_tokens - 1):
            entries = [
                (sequence, len(prompt) + step, tokens[sequence], True) for sequence, prompt in enumerate(prompts)
            ]
            tokens = self._decode(entries)
            output.append(tokens)
        seconds = time.perf_counter() - started
        return {"tokens": [list(sequence) for sequence in zip(*output, strict=True)], "seconds": seconds}

    def _make_context(self, requests: int, tokens: int) -> None:
        """As large as the workload that this belongs to, so that memory touched in its warm-up serves the run."""
        size = next(size for size in self._sizes if size[0] >= requests and size[1] >= tokens)
        if size == self._size:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = size[0]
        parameters.n_ctx = size[0] * -(-size[1] // 256) * 256
        parameters.n_batch, parameters.n_ubatch = _BATCH_TOKENS, 512
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = _TYPES[self._settings["kv"]]
        parameters.flash_attn_type = int(self._settings["flash"])
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {size[0]} x {size[1]} tokens")
        self._size = size

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Whole prompts, as many as a batch takes, so that each yields its first token."""
        tokens: list[int] = []
        entries: list[tuple[int, int, int, bool]] = []
        for sequence, prompt in enumerate(prompts):
            if len(prompt) > _BATCH_TOKENS:
                raise ValueError(f"prompts of more than {_BATCH_TOKENS} tokens are not supported")
            if len(entries) + len(prompt) > _BATCH_TOKENS:
                tokens += self._decode(entries)
                entries = []
            last = len(prompt) - 1
            entries += [(sequence, position, token, position == last) for position, token in enumerate(prompt)]
        return tokens + self._decode(entries)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (sequence, position, token, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = sum(wanted for *_, wanted in entries)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (rows, self._vocab_size))
        best: list[int] = logits.argmax(axis=1).tolist()
        return best
