"""On CPU every family's logits have the same bits over any schedule: batches, chunks, prefixes, preemptions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.model.weights import MlpWeights, Weights
from pawl_workers.model.wrapped_linear import WrappedLinear
from tests.fakes.batch_dependent import SplitByRows, TorchLinear
from tests.fakes.checkpoints import make_llama
from tests.fakes.families import FAMILIES, MAX_POSITIONS, write_checkpoint
from tests.fakes.logit_runner import LogitRunner

BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)
MAX_ROWS = 6


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def draw_sequences(chooser: Random, vocab_size: int) -> list[list[int]]:
    """Two to six sequences from one token to three tiles; most begin alike."""
    shared = chooser.choices(range(vocab_size), k=70)
    sequences = []
    for _ in range(chooser.randint(2, MAX_ROWS)):
        own = chooser.choices(range(vocab_size), k=chooser.choice([1, 4, 31, 64, 65, 100]))
        sequences.append(shared[: chooser.choice([0, 33, 64, 70])] + own)
    return sequences


def num_alike(one: list[int], other: list[int]) -> int:
    """Tokens that two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(slots=True)
class Schedule:
    """Runs sequences as a scheduler might: late arrivals, any grants, preemptions, blocks lent, one or two threads."""

    runner: LogitRunner
    chooser: Random
    sequences: list[list[int]]
    found: dict[int, list[Tensor]] = field(default_factory=dict)  # by row, from `first` on
    first: dict[int, int] = field(default_factory=dict)  # position of a row's first computed token
    lenders: set[int] = field(default_factory=set)
    num_preempted: int = 0
    num_shared: int = 0

    def run(self) -> None:
        waiting = list(range(len(self.sequences)))
        while waiting or any(self._left(row) for row in self.found):
            if waiting and self.chooser.random() < 0.6:
                self._arrive(waiting.pop(0))
            running = [row for row in self.found if self._left(row)]
            if not running:
                continue
            if self.chooser.random() < 0.15:
                self._preempt(self.chooser.choice(running))
            rows = self.chooser.sample(running, self.chooser.randint(1, len(running)))
            grants = {row: min(self._left(row), self.chooser.choice([1, 1, 1, 2, 7, 33, 64, 90])) for row in rows}
            torch.set_num_threads(self.chooser.choice([1, 2]))
            for row, logits in self.runner.step(grants).items():
                self.found[row].append(logits)
        for row in self.found:
            self.runner.free(row)

    def differing_row(self, alone: list[Tensor]) -> int | None:
        """The first row whose logits are not those it has alone, bit for bit."""
        for row, parts in self.found.items():
            if not torch.equal(torch.cat(parts), alone[row][self.first[row] :]):
                return row
        return None

    def _computed(self, row: int) -> int:
        return self.first[row] + sum(len(part) for part in self.found[row])

    def _left(self, row: int) -> int:
        return len(self.sequences[row]) - self._computed(row)

    def _arrive(self, row: int) -> None:
        token_ids, size = self.sequences[row], self.runner.kernels.block_size
        lent: tuple[int, ...] = ()
        for lender in self.found:
            alike = num_alike(token_ids, self.sequences[lender])
            whole = min(alike, self._computed(lender), len(token_ids) - 1) // size
            if whole:
                lent = self.runner.blocks(lender)[:whole]
                self.lenders.add(lender)
                self.num_shared += 1
                break
        self.runner.add(row, token_ids, shared_blocks=lent)
        self.found[row], self.first[row] = [], len(lent) * size

    def _preempt(self, row: int) -> None:
        """Forget what a row has computed and begin again, in other blocks."""
        if row in self.lenders:
            return
        self.runner.free(row)
        self.runner.add(row, self.sequences[row])
        self.found[row], self.first[row] = [], 0
        self.num_preempted += 1


def logits_alone(runner: LogitRunner, sequences: list[list[int]]) -> list[Tensor]:
    torch.set_num_threads(1)
    return [runner.alone(token_ids) for token_ids in sequences]


def kernels_for(folder: Path) -> list[str]:
    spec = read_config(folder).spec
    compiled = CpuKernels.supports(AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim))
    return ["onednn", *(["cpu"] if compiled else [])]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=4, phases=BOUNDED)
@given(data=st.data())
def test_no_schedule_changes_a_bit(name: str, data: st.DataObject) -> None:
    """Three schedules of each of two drawn sets of sequences, per drawn checkpoint and backend."""
    draft = data.draw(FAMILIES[name])
    seed = data.draw(st.integers(0, 1 << 30))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_checkpoint(folder, draft)
        for kernels in kernels_for(folder):
            chooser = Random(seed)
            runner = LogitRunner(folder, kernels, max_running=MAX_ROWS)
            sequences = draw_sequences(chooser, draft.vocab_size)
            alone = logits_alone(runner, sequences)
            for nth in range(3):
                schedule = Schedule(runner, chooser, sequences)
                schedule.run()
                row = schedule.differing_row(alone)
                assert row is None, f"{kernels}, schedule {nth}: row {row} of {len(sequences)}"


def test_schedules_preempt_and_share(tmp_path: Path) -> None:
    """What the test above draws does hold what it says."""
    runner = LogitRunner(make_llama(tmp_path, max_position_embeddings=MAX_POSITIONS), max_running=MAX_ROWS)
    preempted = shared = 0
    for seed in range(10):
        chooser = Random(seed)
        schedule = Schedule(runner, chooser, draw_sequences(chooser, 257))
        schedule.run()
        preempted, shared = preempted + schedule.num_preempted, shared + schedule.num_shared
    assert preempted >= 5
    assert shared >= 5


def planted(weights: Weights, place: str, fault: type[WrappedLinear]) -> Weights:
    if place == "head":
        return replace(weights, head=replace(weights.head, linear=fault(weights.head.linear)))
    first, *others = weights.layers
    assert isinstance(first.mlp, MlpWeights)
    attention, mlp = first.attention, first.mlp
    match place:
        case "qkv":
            attention = replace(attention, qkv=fault(attention.qkv))
        case "output":
            attention = replace(attention, output=fault(attention.output))
        case "up":
            mlp = replace(mlp, up=fault(mlp.up))
        case _:
            mlp = replace(mlp, down=fault(mlp.down))
    return replace(weights, layers=(replace(first, attention=attention, mlp=mlp), *others))


@pytest.mark.parametrize("fault", [SplitByRows, TorchLinear])
@pytest.mark.parametrize("place", ["qkv", "output", "up", "down", "head"])
def test_a_kernel_that_depends_on_the_batch_is_caught(tmp_path: Path, place: str, fault: type[WrappedLinear]) -> None:
    """Wherever it stands, within a few schedules; the sound kernels pass the same ones."""
    folder = make_llama(tmp_path, hidden_size=64, intermediate_size=120, max_position_embeddings=MAX_POSITIONS)
    sound, faulty = (LogitRunner(folder, "cpu", max_running=MAX_ROWS, one_by_one=True) for _ in range(2))
    faulty.weights = planted(faulty.weights, place, fault)
    caught = False
    for seed in range(5):
        sequences = draw_sequences(Random(seed), 257)
        for runner in (sound, faulty):
            alone = logits_alone(runner, sequences)
            schedule = Schedule(runner, Random(seed), sequences)
            schedule.run()
            differs = schedule.differing_row(alone) is not None
            assert runner is faulty or not differs
            caught |= differs
    assert caught
