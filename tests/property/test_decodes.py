"""The batch of a decode step, moved on from the last one, is the batch that would be built anew."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pawl_workers.batch import AttentionShape, Batch, IntArray, PromptRows
from pawl_workers.decodes import Decodes
from pawl_workers.errors import PlanError
from pawl_workers.kernels import choose_backend
from pawl_workers.kernels.cpu_layout import CpuLayout
from pawl_workers.model.rotary import rotary_table
from pawl_workers.model.spec import RotarySpec
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.prepare import BatchSettings, build_batch
from pawl_workers.rows import RowTable
from pawl_workers.sampling.penalties import SeenTokens

CPU, SIZE, CONTEXT, ROWS = torch.device("cpu"), 32, 1600, 6
SHAPE = AttentionShape(6, 3, 16)
KEPT = 1015  # positions whose angles are looked up
LENGTHS = [1, 2, 30, 31, 32, 33, 250, 490, 500, 511, 512, 513, 1000, 1010, 1020]
ROTARY = RotarySpec(theta=1e4, rotary_dim=16)


@pytest.fixture(scope="module")
def settings_of_steps() -> BatchSettings:
    kernels = choose_backend(CPU, torch.float32, SHAPE, "cpu")
    tables = rotary_table(ROTARY, KEPT, CPU), rotary_table(replace(ROTARY, theta=100.0), CONTEXT, CPU)
    return BatchSettings(kernels, SHAPE, tables, CPU, torch.float32)


class Rows:
    """A table of sequences of given lengths whose last token is not computed, and the plans of their decode steps.

    Each has so many blocks more than it needs, as after drafts that were not what came.
    """

    def __init__(self, lengths: list[int], num_spare: int = 0) -> None:
        self.table = RowTable(ROWS, CONTEXT, SIZE, 1000, 500)
        self.step, self._next_block = 1, 1
        new = [
            NewSequence(row, [3] * n, n, n - 1, self._take(-(-n // SIZE) + num_spare), SamplingSpec(temperature=0.0))
            for row, n in enumerate(lengths)
        ]
        self.table.apply(StepPlan(1, 0, [], new, [], [], []))
        self.rows = np.arange(len(lengths))[::-1].copy()

    def _take(self, count: int) -> list[int]:
        self._next_block += count
        return list(range(self._next_block - count, self._next_block))

    def plan(self) -> StepPlan:
        """The next step; who comes to the end of his blocks is given one."""
        self.step += 1
        short = [int(row) for row in self.rows if self.table.num_computed[row] == self.table.num_blocks[row] * SIZE]
        granted = [1] * len(self.rows)
        return StepPlan(self.step, 0, [], [], [(row, self._take(1)) for row in short], self.rows.tolist(), granted)

    def sample(self) -> None:
        """The step is computed, and gives a token for each row."""
        self.table.num_computed[self.rows] += 1
        self.table.append_tokens(self.rows, self.rows + self.step)

    def decodes(self, settings: BatchSettings) -> Decodes:
        decodes = Decodes.after(self.built_anew(settings), self.rows, self.table, settings)
        assert decodes is not None
        return decodes

    def built_anew(self, settings: BatchSettings) -> Batch:
        return build_batch(self.table, self.rows, np.ones(len(self.rows), dtype=np.int64), settings)[0]


def in_order(tiles: torch.Tensor) -> IntArray:
    found: IntArray = tiles.numpy()
    return found[np.lexsort(found.T)]


def assert_same(moved: Batch, built: Batch, blocks: IntArray) -> None:
    for name in ("token_ids", "positions", "last"):
        assert torch.equal(getattr(moved, name), getattr(built, name)), name
    for angles, wanted in zip(moved.rotary, built.rotary, strict=True):
        assert torch.equal(angles[0], wanted[0])
        assert torch.equal(angles[1], wanted[1])
    for name in ("rows", "positions", "num_output", "drafts"):
        assert (getattr(moved.sampling, name) == getattr(built.sampling, name)).all(), name
    ours, theirs = moved.attention, built.attention
    assert isinstance(ours, CpuLayout)
    assert isinstance(theirs, CpuLayout)
    assert torch.equal(ours.slots, theirs.slots)
    for shown, held, position in zip(ours.tables.tolist(), blocks.tolist(), built.positions.tolist(), strict=True):
        needed = position // SIZE + 1
        assert shown[:needed] == held[:needed]
        assert all(block in (0, other) for block, other in zip(shown, held + [0] * len(shown), strict=False))
    assert (in_order(ours.tiles) == in_order(theirs.tiles)).all()
    assert (ours.pairs is None) == (theirs.pairs is None)
    if ours.pairs is not None and theirs.pairs is not None:
        assert torch.equal(ours.pairs, theirs.pairs)


@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=ROWS),
    num_steps=st.integers(1, 60),
    num_spare=st.sampled_from([0, 0, 1, 2]),
    num_threads=st.sampled_from([1, 2]),
)
def test_moved_on_batches_are_those_built_anew(
    lengths: list[int], num_steps: int, num_spare: int, num_threads: int, settings_of_steps: BatchSettings
) -> None:
    """Over the ends of blocks, of tables and of splits; only there it may be laid out anew."""
    torch.set_num_threads(num_threads)
    try:
        rows, settings = Rows(lengths, num_spare), settings_of_steps
        rows.step += 1
        decodes = rows.decodes(settings)
        for _ in range(num_steps):
            rows.sample()
            plan = rows.plan()
            moved = decodes.next(plan)
            if moved is None:
                rows.table.check(plan)
                rows.table.apply(plan)
                positions = rows.table.num_computed[rows.rows]
                assert (positions % 512 == 0).any() or (positions % (8 * SIZE) == 0).any() or KEPT in positions
                decodes = rows.decodes(settings)
            else:
                blocks = rows.table.block_tables[rows.rows]
                assert_same(moved, rows.built_anew(settings), blocks)
    finally:
        torch.set_num_threads(1)


@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=ROWS - 1),
    num_steps=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_what_is_noted_is_what_the_table_would_have_written(
    lengths: list[int], num_steps: int, seed: int, settings_of_steps: BatchSettings
) -> None:
    """Of each row in the step, in its order, and of no other row."""
    ours, theirs, random = Rows([*lengths, 9]), Rows([*lengths, 9]), np.random.default_rng(seed)
    ours.rows = theirs.rows = random.permutation(len(lengths) + 1)[: len(lengths)]
    penalised = int(ours.rows[0])
    for rows in (ours, theirs):
        rows.table.sampling.seen[penalised] = SeenTokens([], [], np.float32(0.5), np.float32(0.25))
    decodes = ours.decodes(settings_of_steps)
    for _ in range(num_steps):
        token_ids = random.integers(500, size=len(lengths))
        assert decodes.note(token_ids) == ours.rows.tolist()
        theirs.table.num_computed[theirs.rows] += 1
        theirs.table.append_tokens(theirs.rows, token_ids)
    for name in ("token_ids", "num_tokens", "num_computed"):
        assert (getattr(ours.table, name) == getattr(theirs.table, name)).all(), name
    seen = (rows.table.sampling.seen[penalised].entries() for rows in (ours, theirs))
    assert all((mine == wanted).all() for mine, wanted in zip(*seen, strict=True))


def changed(plan: StepPlan) -> dict[str, StepPlan]:
    """Plans that do not simply go on."""
    rows, granted = plan.rows, plan.num_tokens
    new = NewSequence(5, [1], 1, 0, [900], SamplingSpec())
    fields: dict[str, dict[str, object]] = {
        "one row less": {"rows": rows[1:], "num_tokens": granted[1:]},
        "another order": {"rows": rows[::-1]},
        "more tokens": {"num_tokens": [2, *granted[1:]]},
        "a row is freed": {"freed_rows": [rows[0]], "rows": rows[1:], "num_tokens": granted[1:]},
        "a row is freed and still computed": {"freed_rows": [rows[0]]},
        "a row is added": {"new": [new]},
        "drafts": {"drafts": [(rows[0], [4])]},
        "copies": {"copies": [(1, 900)]},
        "swapped out": {"swap_out": [(1, 0)]},
        "swapped in": {"swap_in": [(0, 900)]},
        "blocks of another row": {"append_blocks": [(2, [900])]},
        "a row named twice": {"append_blocks": [(0, [900]), (0, [901])]},
    }  # fmt: skip
    return {name: msgspec.structs.replace(plan, **values) for name, values in fields.items()}


@pytest.mark.parametrize("name", changed(StepPlan(1, 0, [], [], [], [1, 0], [1, 1])))
def test_other_steps_are_left_to_others(name: str, settings_of_steps: BatchSettings) -> None:
    """Nothing has changed then."""
    rows = Rows([5, 40, 7])
    rows.rows = np.array([1, 0])
    decodes = rows.decodes(settings_of_steps)
    rows.sample()
    before = rows.table.num_blocks.copy(), rows.table.block_tables.copy(), rows.table.known.copy()
    assert decodes.next(changed(rows.plan())[name]) is None
    for ours, theirs in zip((rows.table.num_blocks, rows.table.block_tables, rows.table.known), before, strict=True):
        assert (ours == theirs).all()


def test_a_row_that_lacks_a_block_is_left_to_the_check(settings_of_steps: BatchSettings) -> None:
    rows = Rows([5, 32])
    decodes = rows.decodes(settings_of_steps)
    rows.sample()
    plan = rows.plan()
    assert plan.append_blocks
    starved = msgspec.structs.replace(plan, append_blocks=[])
    assert decodes.next(starved) is None
    with pytest.raises(PlanError, match="blocks of 32 tokens"):
        rows.table.check(starved)


@pytest.mark.parametrize(
    ("blocks", "message"), [([(1, [1001])], "blocks 1001 to 1001"), ([(5, [9])], "no earlier sequence")]
)
def test_blocks_against_the_contract_are_refused(
    blocks: list[tuple[int, list[int]]], message: str, settings_of_steps: BatchSettings
) -> None:
    rows = Rows([5, 33])
    decodes = rows.decodes(settings_of_steps)
    rows.sample()
    with pytest.raises(PlanError, match=message):
        decodes.next(msgspec.structs.replace(rows.plan(), append_blocks=blocks))


def test_who_can_go_on(settings_of_steps: BatchSettings) -> None:
    """Steps in which every token samples, and no prompt is scored."""
    rows, settings = Rows([5, 33]), settings_of_steps
    batch = rows.built_anew(settings)
    assert Decodes.after(batch, rows.rows, rows.table, settings) is not None
    fewer = replace(batch.sampling, rows=batch.sampling.rows[:1])
    assert Decodes.after(replace(batch, sampling=fewer), rows.rows, rows.table, settings) is None
    scored = PromptRows(0, 0, 1, np.zeros(1, dtype=np.int64), 0)
    assert Decodes.after(replace(batch, prompts=[scored]), rows.rows, rows.table, settings) is None
    reference = replace(settings, kernels=choose_backend(CPU, torch.float32, SHAPE, "reference"))
    assert Decodes.after(batch, rows.rows, rows.table, reference) is None
