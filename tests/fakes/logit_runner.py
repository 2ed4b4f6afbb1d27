"""Runs sequences through the forward pass over paged KV and returns the logits of every token computed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import AttentionShape, PromptRows
from pawl_workers.forward import compute
from pawl_workers.kernels import Precision, choose_backend
from pawl_workers.kv_cache import KvCache
from pawl_workers.model.checkpoint_config import CheckpointConfig, read_config
from pawl_workers.model.loading import load_weights
from pawl_workers.model.rotary import rotary_table
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.prepare import BatchSettings, build_batch
from pawl_workers.rows import RowTable
from pawl_workers.stages.logits import logits
from pawl_workers.stages.norm import norm

__all__ = ["LogitRunner"]


class LogitRunner:
    """A row table, a cache and weights, without sampling. Blocks are dealt in random order."""

    def __init__(
        self,
        folder: Path,
        kernels: str = "auto",
        *,
        max_running: int = 24,
        seed: int = 0,
        max_context: int | None = None,
        config: CheckpointConfig | None = None,
        precision: Precision = Precision(),  # noqa: B008 - frozen
        one_by_one: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - as above
    ) -> None:
        """`one_by_one`: stage after stage, even where the backend has a program of all layers."""
        config = config or read_config(folder)
        self.spec = spec = config.spec
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self.kernels = choose_backend(device, dtype, shape, kernels, precision=precision)
        with torch.inference_mode():
            self.weights = load_weights(config, self.kernels, device, dtype, 1 << 40)
        self._num_blocks = max_running * -(-spec.max_context // self.kernels.block_size)
        with torch.inference_mode():
            self.cache = KvCache.allocate(spec, self.kernels, self._num_blocks, device, dtype)
            if not one_by_one:
                self.cache.compile(self.weights)
        self._settings = BatchSettings(
            kernels=self.kernels,
            shape=shape,
            rotaries=tuple(rotary_table(rotary, max_context or spec.max_context, device) for rotary in spec.rotaries),
            device=device,
            dtype=dtype,
        )
        self._table = RowTable(
            max_running, spec.max_context, self.kernels.block_size, self._num_blocks, spec.vocab_size
        )
        self._free = list(range(1, self._num_blocks + 1))
        random.Random(seed).shuffle(self._free)
        self._held: dict[int, list[int]] = {}

    def add(
        self, row: int, token_ids: list[int], *, shared_blocks: tuple[int, ...] = (), samples: bool = False
    ) -> None:
        """Give a row a sequence; `shared_blocks` hold its first tokens already."""
        size = self.kernels.block_size
        num_needed = -(-len(token_ids) // size) - len(shared_blocks)
        own = [self._free.pop() for _ in range(num_needed)]
        self._held[row] = own
        sequence = NewSequence(
            row=row,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            num_computed=len(shared_blocks) * size,
            block_ids=[*shared_blocks, *own],
            sampling=SamplingSpec(),
            samples=samples,
        )
        plan = StepPlan(1, 0, [], [sequence], [], [], [])
        self._table.check(plan)
        self._table.apply(plan)

    def fork(self, parent: int, row: int, token_ids: list[int], num_computed: int) -> None:
        """Give a row a sequence that begins like the parent's: full blocks shared, a partial one copied."""
        num_full, rest = divmod(num_computed, self.kernels.block_size)
        shared = self.blocks(parent)[:num_full]
        self.add(row, token_ids, shared_blocks=shared)
        if rest:
            with torch.inference_mode():
                self.cache.copy_blocks([(self.blocks(parent)[num_full], self.blocks(row)[num_full])])
        self._table.num_computed[row] = num_computed

    def take(self, count: int) -> list[int]:
        """Take blocks out of those that are dealt."""
        return [self._free.pop() for _ in range(count)]

    def free(self, row: int) -> None:
        """Take a row's sequence away; its blocks are used again, with what is in them."""
        plan = StepPlan(1, 0, [row], [], [], [], [])
        self._table.check(plan)
        self._table.apply(plan)
        self._free += self._held.pop(row)

    def blocks(self, row: int) -> tuple[int, ...]:
        """Return the blocks of a row."""
        return tuple(self._table.blocks_of(row).tolist())

    def keys(self, row: int, layer: int, num_tokens: int) -> Tensor:
        """Return the cached keys of a row's first tokens in one layer, [tokens, K, head_dim]."""
        blocks = self.cache[layer].keys[list(self.blocks(row))]  # [blocks, K, block_size, head_dim]
        if self.kernels.name == "cpu":  # whose keys lie transposed in a block, padded
            blocks = blocks.transpose(2, 3)[..., : self.spec.head_dim]
        return blocks.transpose(1, 2).flatten(0, 1)[:num_tokens]

    def step(self, grants: Mapping[int, int]) -> dict[int, Tensor]:
        """Compute the next tokens of some rows and return their logits, [tokens, V], by row."""
        rows, lengths = np.array(list(grants)), np.array(list(grants.values()))
        with torch.inference_mode():
            batch, _ = build_batch(self._table, rows, lengths, self._settings)
            every = PromptRows(0, 0, 1, np.zeros(len(batch.token_ids), dtype=np.int64), 0)
            stream, _ = compute(replace(batch, prompts=[every]), self.weights, self.cache)
            scores = logits(norm(stream, self.weights.final_norm), self.weights.head)
        self._table.num_computed[rows] += lengths
        return dict(zip(grants, torch.split(scores, lengths.tolist()), strict=True))

    def sampled(self, grants: Mapping[int, int]) -> Tensor:
        """Compute the next tokens of some rows, and return what those that are at their end sample from, [S, V]."""
        rows, lengths = np.array(list(grants)), np.array(list(grants.values()))
        with torch.inference_mode():
            batch, _ = build_batch(self._table, rows, lengths, self._settings)
            _, scores = compute(batch, self.weights, self.cache)
        self._table.num_computed[rows] += lengths
        return scores

    def decode(self, rows: list[int]) -> Tensor:
        """Compute the last token of some rows that sample, and return the logits that they sample from, [rows, V]."""
        return self.sampled(dict.fromkeys(rows, 1))

    def alone(self, token_ids: list[int], chunks: list[int] | None = None) -> Tensor:
        """Compute one sequence by itself, in chunks, and return all its logits, [tokens, V]."""
        self.add(0, token_ids)
        found = [self.step({0: chunk})[0] for chunk in chunks or [len(token_ids)]]
        self.free(0)
        return torch.cat(found)
