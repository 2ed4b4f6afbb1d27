"""The row table: what the worker knows of the sequences it serves. Plans change it; the forward pass reads it.

A plan is checked as a whole before anything changes. Arrays are indexed by row and made once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from pawl_workers.batch import IntArray
from pawl_workers.errors import PlanError
from pawl_workers.plan import LEAST_SAMPLES, NewSequence, StepPlan
from pawl_workers.sampling.table import SamplingTable

__all__ = ["RowTable"]


class RowTable:
    """Tokens, blocks and sampling state of up to `max_running` sequences.

    Attributes:
        max_context: most tokens that a row computes.
        token_ids: [rows, max_context + 1] int32; -1 - i where sample i of the step in flight will stand. A step's
            drafts stand after the tokens known.
        block_tables: [rows, most blocks] int64, 0 past the end.
        num_tokens, num_computed, num_prompt, num_blocks: [rows].
        prompt_alternatives: -1 when no prompt log-probabilities are wanted, [rows].
        prompt_from: first prompt position wanted, [rows].
        samples, known, failed: [rows] bool; a failed row is computed no more until it is freed.
        generation: counts the sequences that each row was given or lost, [rows].
        sampling: how each row samples.
    """

    def __init__(
        self,
        max_running: int,
        max_context: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int,
        num_host_blocks: int = 0,
    ) -> None:
        self._max_running, self.max_context = max_running, max_context
        self._num_host_blocks = num_host_blocks
        self._block_size, self._last_block, self._vocab_size = block_size, num_blocks, vocab_size
        most_blocks = -(-max_context // block_size)
        self.token_ids = np.zeros((max_running, max_context + 1), dtype=np.int32)
        self.block_tables = np.zeros((max_running, most_blocks), dtype=np.int64)
        self.num_tokens, self.num_computed, self.num_prompt, self.num_blocks, self.generation = (
            np.zeros(max_running, dtype=np.int64) for _ in range(5)
        )
        self.prompt_alternatives, self.prompt_from = (np.full(max_running, value, dtype=np.int64) for value in (-1, 1))
        self.samples, self.known, self.failed = (np.zeros(max_running, dtype=np.bool_) for _ in range(3))
        self.sampling = SamplingTable(max_running)

    def check(self, plan: StepPlan) -> None:
        """Check a plan against the table.

        Raises:
            PlanError: it breaks the contract; the message names the row and the numbers.
        """
        freed = set(plan.freed_rows)
        for row in freed:
            self._check_row(row)
            if not self.known[row]:
                raise PlanError(f"row {row} is freed but holds no sequence")
        added = {sequence.row: sequence for sequence in plan.new}
        if len(freed) < len(plan.freed_rows) or len(added) < len(plan.new):
            raise PlanError("a row is freed or added twice in one plan")
        for row, sequence in added.items():
            self._check_row(row)
            if self.known[row] and row not in freed:
                raise PlanError(f"row {row} is given a new sequence but still holds one")
            self._check_sequence(sequence)
        appended = self.check_appended(plan.append_blocks, added.keys() | freed)
        self._check_grants(plan, freed, added, appended)
        self._check_moves(plan)

    def check_appended(
        self, append_blocks: Sequence[tuple[int, list[int]]], changing: Collection[int] = ()
    ) -> dict[int, int]:
        """Check the blocks that rows are given; how many each of them is given.

        Args:
            append_blocks: of a plan.
            changing: rows that it frees or gives a sequence.

        Raises:
            PlanError: as of `check`.
        """
        appended: dict[int, int] = {}
        for row, block_ids in append_blocks:
            self._check_row(row)
            if row in changing or not self.known[row]:
                raise PlanError(f"row {row} is given more blocks but holds no earlier sequence")
            self._check_blocks(row, block_ids)
            appended[row] = appended.get(row, 0) + len(block_ids)
            if self.num_blocks[row] + appended[row] > self.block_tables.shape[1]:
                raise PlanError(f"row {row} is given more than {self.block_tables.shape[1]} blocks")
        return appended

    def _check_moves(self, plan: StepPlan) -> None:
        if not (plan.copies or plan.swap_out or plan.swap_in):
            return
        read = [block for block, _ in plan.swap_out] + [source for source, _ in plan.copies]
        written = [block for _, block in plan.swap_in] + [destination for _, destination in plan.copies]
        hosts = [host for _, host in plan.swap_out] + [host for host, _ in plan.swap_in]
        for block in (*read, *written):
            if not 1 <= block <= self._last_block:
                raise PlanError(f"block {block} is copied or swapped, not in [1, {self._last_block}]")
        for host in hosts:
            if not 0 <= host < self._num_host_blocks:
                raise PlanError(f"host block {host} is swapped, not in [0, {self._num_host_blocks})")
        if len(set(written)) < len(written) or len({host for _, host in plan.swap_out}) < len(plan.swap_out):
            raise PlanError("a block is written twice by the moves of one plan")
        if not {source for source, _ in plan.copies}.isdisjoint(destination for _, destination in plan.copies):
            raise PlanError("a copy reads a block that another copy writes")

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self._max_running:
            raise PlanError(f"row {row} is not in [0, {self._max_running})")

    def _check_blocks(self, row: int, block_ids: list[int]) -> None:
        if block_ids and not 1 <= min(block_ids) <= max(block_ids) <= self._last_block:
            raise PlanError(
                f"row {row} is given blocks {min(block_ids)} to {max(block_ids)}, not in [1, {self._last_block}]"
            )

    def _check_sequence(self, sequence: NewSequence) -> None:
        row, ids = sequence.row, sequence.token_ids
        if not 1 <= len(ids) <= self.max_context:
            raise PlanError(f"row {row} has {len(ids)} tokens, not in [1, {self.max_context}]")
        for token_ids in (ids, sequence.sampling.suppressed_ids, sequence.sampling.logit_bias.keys()):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
                raise PlanError(f"row {row} names a token outside the vocabulary of {self._vocab_size}")
        if not 1 <= sequence.num_prompt_tokens <= len(ids) or not 0 <= sequence.num_computed < len(ids):
            raise PlanError(
                f"row {row} has {len(ids)} tokens, {sequence.num_prompt_tokens} of the prompt and "
                f"{sequence.num_computed} computed; the last token is never computed beforehand"
            )
        self._check_blocks(row, sequence.block_ids)
        if len(sequence.block_ids) > self.block_tables.shape[1]:
            raise PlanError(f"row {row} is given more than {self.block_tables.shape[1]} blocks")

    def _check_grants(
        self, plan: StepPlan, freed: set[int], added: dict[int, NewSequence], appended: dict[int, int]
    ) -> None:
        rows, grants = np.array(plan.rows, dtype=np.int64), np.array(plan.num_tokens, dtype=np.int64)
        if len(rows) != len(grants) or len(set(plan.rows)) < len(rows):
            raise PlanError(f"{len(rows)} rows and {len(grants)} grants; rows must be distinct")
        for row in rows[(rows < 0) | (rows >= self._max_running)].tolist():
            self._check_row(row)
        computed, known, blocks = self.num_computed.copy(), self.num_tokens.copy(), self.num_blocks.copy()
        holds = self.known.copy()
        holds[list(freed)] = False
        # The plan may have been made before a failure was known: such a row is not computed, and reported again.
        passed_over = holds & self.failed
        for row, sequence in added.items():
            holds[row], passed_over[row] = True, False
            computed[row], known[row], blocks[row] = (
                sequence.num_computed, len(sequence.token_ids), len(sequence.block_ids),
            )  # fmt: skip
        for row, count in appended.items():
            blocks[row] += count
        for row in rows[~holds[rows]].tolist():
            raise PlanError(f"row {row} is to be computed but holds no sequence")
        rows, grants = rows[~passed_over[rows]], grants[~passed_over[rows]]
        after = computed[rows] + grants
        if plan.drafts:
            self._check_drafts(plan, rows, after, known, added)
        wrong = (grants < 1) | (after > np.minimum(known[rows], self.max_context))
        for row, grant in zip(rows[wrong].tolist(), grants[wrong].tolist(), strict=True):
            raise PlanError(
                f"row {row} is granted {grant} tokens; {computed[row]} of its {known[row]} are computed and "
                f"{self.max_context} is the longest context"
            )
        wrong = blocks[rows] * self._block_size < after
        for row, end in zip(rows[wrong].tolist(), after[wrong].tolist(), strict=True):
            raise PlanError(f"row {row} has {blocks[row]} blocks of {self._block_size} tokens for {end} tokens")

    def _check_drafts(
        self, plan: StepPlan, rows: IntArray, after: IntArray, known: IntArray, added: dict[int, NewSequence]
    ) -> None:
        """Check the drafts of a plan, and count them as tokens known."""
        ends = dict(zip(rows.tolist(), after.tolist(), strict=True))
        drafted = {row for row, _ in plan.drafts}
        if len(drafted) < len(plan.drafts) or not drafted <= {*plan.rows}:
            raise PlanError("drafts are for distinct rows of the step")
        for row, ids in plan.drafts:
            if not ids or not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise PlanError(f"row {row} has no drafts, or one outside the vocabulary of {self._vocab_size}")
            if row not in ends:
                continue  # it failed and is not computed
            if not (added[row].samples if row in added else self.samples[row]):
                raise PlanError(f"row {row} has drafts but samples nothing")
            known[row] += len(ids)
            if ends[row] != known[row]:
                raise PlanError(f"row {row} is computed up to {ends[row]} tokens, and {known[row]} with its drafts")
        num_samples = int((after == known[rows]).sum()) + sum(len(ids) for row, ids in plan.drafts if row in ends)
        if num_samples > max(self._max_running, LEAST_SAMPLES):
            raise PlanError(
                f"{num_samples} positions are to be sampled, at most {max(self._max_running, LEAST_SAMPLES)} can be"
            )

    def apply(self, plan: StepPlan) -> None:
        """Free, add, append blocks, then note the drafts. The plan has been checked."""
        for row in plan.freed_rows:
            self.known[row] = False
            self.generation[row] += 1
            self.sampling.free(row)
        for sequence in plan.new:
            self._add(sequence)
        for row, block_ids in plan.append_blocks:
            begin = int(self.num_blocks[row])
            self.block_tables[row, begin : begin + len(block_ids)] = block_ids
            self.num_blocks[row] += len(block_ids)
        for row, ids in plan.drafts:
            if self.failed[row]:
                continue  # it is not computed, and what it has room for was not checked
            begin = int(self.num_tokens[row])
            self.token_ids[row, begin : begin + len(ids)] = ids

    def _add(self, sequence: NewSequence) -> None:
        row, ids, num_prompt = sequence.row, sequence.token_ids, sequence.num_prompt_tokens
        self.token_ids[row, : len(ids)] = ids
        self.block_tables[row] = 0
        self.block_tables[row, : len(sequence.block_ids)] = sequence.block_ids
        self.num_tokens[row], self.num_prompt[row] = len(ids), num_prompt
        self.num_computed[row], self.num_blocks[row] = sequence.num_computed, len(sequence.block_ids)
        self.prompt_alternatives[row] = sequence.prompt_logprobs
        self.prompt_from[row] = sequence.prompt_logprobs_from
        self.samples[row], self.known[row], self.failed[row] = sequence.samples, True, False
        self.sampling.add(row, sequence.sampling, ids[:num_prompt], ids[num_prompt:])

    def append_tokens(self, rows: IntArray, token_ids: IntArray) -> None:
        """Append a token to each of some distinct rows."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1
        self.sampling.observe(rows, token_ids)

    def reserve(self, rows: IntArray) -> IntArray:
        """Make room for the token that each of some distinct rows will sample, and return its position, [S]."""
        positions = self.num_tokens[rows]
        self.token_ids[rows, positions] = -1 - np.arange(len(rows))
        self.num_tokens[rows] += 1
        return positions

    def fill(self, rows: IntArray, positions: IntArray, token_ids: IntArray) -> None:
        """Write the sampled tokens into the room that was reserved for them."""
        self.token_ids[rows, positions] = token_ids
        self.sampling.observe(rows, token_ids)

    def blocks_of(self, row: int) -> NDArray[np.int64]:
        """Return the block ids of a row."""
        return self.block_tables[row, : self.num_blocks[row]]

    def positions(self, rows: IntArray, num_tokens: IntArray) -> tuple[IntArray, IntArray]:
        """List, token after token, which of `rows` it belongs to (as an index) and its position."""
        sequence = np.repeat(np.arange(len(rows)), num_tokens)
        starts = np.cumsum(num_tokens) - num_tokens
        return sequence, np.arange(len(sequence)) - starts[sequence] + self.num_computed[rows][sequence]
