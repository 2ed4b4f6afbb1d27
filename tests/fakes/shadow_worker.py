"""A worker without a model: it remembers, per KV slot, which prefix was written there, and checks every read.

The next token is a function of the whole prefix, so a wrong block, a block shared across tenants, a stale cache
entry or a lost write shows as an assertion or as another token than the isolated run gives. The namespace of a
sequence travels in the lowest byte of `sampling.seed`; samples of one prompt differ in the bits above it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pawl_workers.plan import NewSequence, PromptLogprobs, RowFailure, StepPlan, StepResult, TokenLogprobs
from pawl_workers.row_masks import MaskSource


def _extend(digest: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(digest + token_id.to_bytes(4, "little", signed=True), digest_size=8).digest()


_SPOILED = b"spoiled"


def _root(seed: int) -> bytes:
    return b"root" + (seed % 256).to_bytes(8, "little")


def _draw(digest: bytes, seed: int, vocab_size: int) -> int:
    """The token after a prefix: another one for each sample."""
    drawn = _extend(digest, seed // 256) if seed >= 256 else digest
    return int.from_bytes(drawn, "little") % vocab_size


class _Row:
    def __init__(self, new: NewSequence) -> None:
        self.tokens = list(new.token_ids)
        self.blocks = list(new.block_ids)
        self.computed = new.num_computed
        self.new = new
        self.failed = False


class ShadowWorker:
    """Executes plans as a worker would, over digests instead of tensors.

    Args:
        block_size: tokens per block.
        vocab_size: tokens are in [0, vocab_size).
        fault: called before each step; may raise (the step fails) or return rows that fail alone.
    """

    def __init__(
        self, block_size: int, vocab_size: int = 32, fault: Callable[[StepPlan], Sequence[int]] | None = None
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.fault = fault
        self.reset(1)

    def reset(self, epoch: int) -> None:
        """Forget everything; the next plan is step 1."""
        self.epoch = epoch
        self.step = 0
        self.rows: dict[int, _Row] = {}
        self.slots: dict[tuple[int, int], bytes] = {}
        self.host: dict[int, list[bytes | None]] = {}

    def execute(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        """Run one step, checking everything the plan says. A masked row's hash falls on an allowed token."""
        assert (plan.step, plan.epoch) == (self.step + 1, self.epoch)
        self.step = plan.step
        failing = set(self.fault(plan) if self.fault else ())
        for freed in plan.freed_rows:
            del self.rows[freed]
        for new in plan.new:
            assert new.row not in self.rows
            self.rows[new.row] = _Row(new)
        for known, blocks in plan.append_blocks:
            self.rows[known].blocks += blocks
        assert len(set(plan.rows)) == len(plan.rows)
        self._move(plan)
        drafts = dict(plan.drafts)
        assert len(drafts) == len(plan.drafts)
        # A row that failed is computed no more until it is freed, and is reported again.
        failures = [RowFailure(row, "failed before") for row in plan.rows if self.rows[row].failed]
        grants = [(row, n) for row, n in zip(plan.rows, plan.num_tokens, strict=True) if not self.rows[row].failed]
        self._check_writers(grants)
        prompt_logprobs: list[PromptLogprobs] = []
        sampled: list[tuple[int, int]] = []
        allowed = _allowed(masks)
        for number, count in grants:
            row = self.rows[number]
            drafted = drafts.get(number, [])
            assert number not in drafts or (drafted and row.computed + count == len(row.tokens) + len(drafted))
            self._write(row, count, drafted, spoiled=number in failing)
        for number, count in grants:
            row, drafted = self.rows[number], drafts.get(number, [])
            digests = self._read(row, count, drafted)
            if number in failing and drafted:
                continue  # the drafts may have done it: the step counts for nothing
            if number in failing:
                row.failed = True
                failures.append(RowFailure(number, "planted"))
                continue
            row.computed += count - len(drafted)
            prompt_logprobs += self._prompt_logprobs(number, row, count - len(drafted))
            if row.computed == len(row.tokens) and row.new.samples:
                choices = allowed.get(number, [range(self.vocab_size)] * (1 + len(drafted)))
                assert len(choices) == 1 + len(drafted), "a mask for each sample"
                if not len(choices[0]):
                    row.failed = True
                    failures.append(RowFailure(number, "no token is left"))
                    continue
                seed = row.new.sampling.seed
                token_ids = [
                    ids[_draw(digest, seed, len(ids))] if ids else -1
                    for ids, digest in zip(choices, digests, strict=True)
                ]
                right = [token_id == draft for token_id, draft in zip(token_ids, drafted, strict=False)]
                num_accepted = [*right, False].index(False)
                row.tokens += token_ids[: num_accepted + 1]
                row.computed += num_accepted
                sampled += [(number, token_id) for token_id in token_ids[: num_accepted + 1]]
        for source, destination in plan.copies:
            self._fill(destination, [self.slots.get((source, offset)) for offset in range(self.block_size)])
        rows, token_ids = [number for number, _ in sampled], [token_id for _, token_id in sampled]
        return StepResult(plan.step, plan.epoch, rows, token_ids, [], prompt_logprobs, failures, 0.0, 0.0, 0.0)

    def _slot(self, row: _Row, position: int) -> tuple[int, int]:
        return row.blocks[position // self.block_size], position % self.block_size

    def _move(self, plan: StepPlan) -> None:
        """Swap out, swap in: whole blocks, with whatever stands in them."""
        for block, host in plan.swap_out:
            self.host[host] = [self.slots.get((block, offset)) for offset in range(self.block_size)]
        for host, block in plan.swap_in:
            self._fill(block, self.host[host])

    def _fill(self, block: int, contents: list[bytes | None]) -> None:
        for offset, digest in enumerate(contents):
            self.slots.pop((block, offset), None)
            if digest is not None:
                self.slots[block, offset] = digest

    def _check_writers(self, grants: Sequence[tuple[int, int]]) -> None:
        """No two rows write one slot, and nobody writes the null block."""
        written = [
            self._slot(self.rows[number], position)
            for number, count in grants
            for position in range(self.rows[number].computed, self.rows[number].computed + count)
        ]
        assert len(written) == len(set(written)), "two sequences write one slot"
        assert all(block > 0 for block, _ in written), "the null block is written"

    def _write(self, row: _Row, count: int, drafts: Sequence[int], *, spoiled: bool) -> None:
        """All rows write before any reads, as a layer does. What a failing row writes is worth nothing."""
        assert count >= 1
        assert row.computed + count <= len(row.tokens) + len(drafts)
        digest = _root(row.new.sampling.seed)
        for position, token_id in enumerate([*row.tokens, *drafts][: row.computed + count]):
            digest = _extend(digest, token_id)
            if position >= row.computed:
                self.slots[self._slot(row, position)] = _SPOILED if spoiled else digest

    def _read(self, row: _Row, count: int, drafts: Sequence[int]) -> list[bytes]:
        """Check every slot; the digests up to the last token known and up to each draft.

        Over spoiled slots all is spoiled: the token is wrong.
        """
        digest, spoiled, digests = _root(row.new.sampling.seed), False, []
        for position, token_id in enumerate([*row.tokens, *drafts][: row.computed + count]):
            digest = _extend(digest, token_id)
            found = self.slots.get(self._slot(row, position))
            spoiled |= found == _SPOILED
            assert spoiled or found == digest, f"slot of position {position} is wrong"
            if spoiled and position >= row.computed:
                self.slots[self._slot(row, position)] = _SPOILED
            digests.append(bytes(byte ^ 0xFF for byte in digest) if spoiled else digest)
        return digests[len(row.tokens) - 1 :]

    @staticmethod
    def _prompt_logprobs(number: int, row: _Row, count: int) -> list[PromptLogprobs]:
        if row.new.prompt_logprobs < 0:
            return []
        first = max(row.new.prompt_logprobs_from, row.computed - count + 1)
        last = min(row.computed + 1, row.new.num_prompt_tokens)
        positions = [TokenLogprobs(row.tokens[place], -1.0, 1, [], []) for place in range(first, last)]
        return [PromptLogprobs(number, first, positions)] if positions else []


def _allowed(masks: MaskSource | None) -> Mapping[int, list[Sequence[int]]]:
    """The ids that each masked row may choose, for one sample after the other."""
    allowed: dict[int, list[Sequence[int]]] = {}
    if masks is not None:
        found = masks()
        bits = np.unpackbits(found.words.view(np.uint8), axis=1, bitorder="little")
        for place, row in enumerate(found.rows):
            allowed.setdefault(row, []).append(np.flatnonzero(bits[place]).tolist())
    return allowed


def isolated_output(prompt: Sequence[int], seed: int, num_tokens: int, vocab_size: int = 32) -> list[int]:
    """What a sequence alone generates: the oracle."""
    digest = _root(seed)
    for token_id in prompt:
        digest = _extend(digest, token_id)
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(_draw(digest, seed, vocab_size))
        digest = _extend(digest, output[-1])
    return output
