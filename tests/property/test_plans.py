"""Whatever a plan says, the worker carries it out or refuses it: then nothing has changed. No other error exists."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pawl_workers.errors import PlanError
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama

ROWS, BLOCKS, CONTEXT, HOST_BLOCKS, BROKEN = 3, 6, 70, 4, 200
LENGTHS = (1, 2, 5, 31, 32, 33, 64, 69, 70, 71)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A small worker, in which one token makes a row fail."""
    folder = make_llama(tmp_path_factory.mktemp("llama"))
    block_bytes = 2 * 2 * 2 * 16 * 32 * 4
    made = Worker.load(
        WorkerOptions(
            str(folder),
            max_running=ROWS,
            max_context=CONTEXT,
            num_blocks=BLOCKS,
            host_kv_bytes=HOST_BLOCKS * block_bytes,
        )
    )
    with torch.inference_mode():
        made._weights.embedding.tokens[BROKEN] = torch.nan
    return made


def state(worker: Worker) -> list[NDArray[np.generic]]:
    table = worker._table
    return [
        array.copy()
        for array in (table.token_ids, table.block_tables, table.num_tokens, table.num_computed, table.num_blocks)
    ] + [array.copy() for array in (table.num_prompt, table.samples, table.known, table.failed, table.generation)]


class Drawer:
    """Plans that are mostly right: each number is now and then one that cannot be."""

    def __init__(self, draw: random.Random, worker: Worker) -> None:
        self._draw, self._worker = draw, worker

    def _mostly(self, right: int, *wrong: int) -> int:
        return right if self._draw.random() < 0.97 else self._draw.choice(wrong)

    def _row(self) -> int:
        return self._mostly(self._draw.randrange(ROWS), -1, ROWS, 99)

    def _block(self) -> int:
        return self._mostly(self._draw.randint(1, BLOCKS), -1, 0, BLOCKS + 1)

    def _token(self) -> int:
        return self._mostly(self._draw.randint(1, 199), BROKEN, -1, 256, 257)

    def _sequence(self) -> NewSequence:
        draw, length = self._draw, self._draw.choice(LENGTHS)
        return NewSequence(
            self._row(),
            [draw.randint(1, 199) for _ in range(length - 1)] + [BROKEN if draw.random() < 0.2 else self._token()],
            self._mostly(draw.randint(1, length), 0, length + 1),
            self._mostly(draw.choice((0, length - 1)), length, -1),
            [self._block() for _ in range(self._mostly(-(-length // 32), 0, 1, 4))],
            SamplingSpec(temperature=draw.choice((0.0, 1.0)), logprobs=draw.choice((-1, 2))),
            prompt_logprobs=draw.choice((-1, -1, 2)),
            samples=draw.random() < 0.9,
        )

    def plan(self, step: int) -> StepPlan:
        """The next plan."""
        draw, table = self._draw, self._worker._table
        known = np.flatnonzero(table.known).tolist()
        new = [self._sequence() for _ in range(draw.choice((0, 0, 1, 2)))]
        ends = {row: int(table.num_tokens[row] - table.num_computed[row]) for row in known}
        ends |= {sequence.row: len(sequence.token_ids) - sequence.num_computed for sequence in new}
        rows = [row for row in ends if draw.random() < 0.9] + [self._row()] * (draw.random() < 0.03)
        drafts = [(row, [self._token() for _ in range(draw.choice((1, 3, 60)))]) for row in rows if draw.random() < 0.2]
        lengths = {row: len(ids) for row, ids in drafts}
        return StepPlan(
            self._mostly(step, step - 1, step + 1),
            self._mostly(0, 1),
            [row for row in known if draw.random() < (0.9 if row in {s.row for s in new} else 0.1)],
            new,
            [(self._row(), [self._block() for _ in range(draw.randrange(3))]) for _ in range(draw.random() < 0.2)],
            rows,
            [self._mostly(ends.get(row, 1) + lengths.get(row, 0), 0, -1, 1, 71) for row in rows],
            copies=[(self._block(), self._block()) for _ in range(draw.random() < 0.05)],
            swap_out=[(self._block(), self._mostly(0, -1, HOST_BLOCKS)) for _ in range(draw.random() < 0.05)],
            swap_in=[(self._mostly(1, -1, HOST_BLOCKS), self._block()) for _ in range(draw.random() < 0.05)],
            drafts=drafts,
        )


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 32))
def test_a_plan_is_carried_out_or_changes_nothing(worker: Worker, seed: int) -> None:
    drawer, step, refused, done = Drawer(random.Random(seed), worker), 1, 0, 0
    worker.reset(0)
    for _ in range(60):
        plan, before = drawer.plan(step), state(worker)
        try:
            result = worker.execute(plan)
        except PlanError:
            refused += 1
            assert all(np.array_equal(was, now) for was, now in zip(before, state(worker), strict=True))
            continue
        done, step = done + 1, step + 1
        assert {*result.rows, *(failure.row for failure in result.failures)} <= {*plan.rows}
        assert all(0 <= token_id < worker.facts.vocab_size for token_id in result.token_ids)
    assert refused
    assert done
