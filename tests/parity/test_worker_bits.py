"""On CPU a worker gives every request of every family the same tokens and log-probabilities over any schedule."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers import start_plan
from pawl_workers.batch import AttentionLayout
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.model.packed import PackedLinear
from pawl_workers.model.weights import AttentionRule, LayerWeights
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.batch_dependent import SplitByRows
from tests.fakes.checkpoints import make_llama
from tests.fakes.families import FAMILIES, MAX_POSITIONS, write_checkpoint
from tests.fakes.worker_driver import WorkerDriver
from tests.fakes.worker_schedule import WorkerSchedule, draw_requests, serve_alone

BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)
MOST_REQUESTS = 6
NUM_BLOCKS = MOST_REQUESTS * -(-MAX_POSITIONS // 32)
OPTIONS = WorkerOptions("", max_running=MOST_REQUESTS, num_blocks=NUM_BLOCKS)
CHOICES = {
    "cpu": replace(OPTIONS, kernels="cpu"),
    "cpu, float16 KV, int8 weights": replace(OPTIONS, kernels="cpu", kv_dtype="float16", weight_dtype="int8"),
    "cpu, int8 KV, int8_g32 weights": replace(OPTIONS, kernels="cpu", kv_dtype="int8", weight_dtype="int8_g32"),
    "onednn": replace(OPTIONS, kernels="onednn"),
    "onednn, int8_g64 weights": replace(OPTIONS, kernels="onednn", weight_dtype="int8_g64"),
}


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def load(folder: Path, options: WorkerOptions = OPTIONS) -> WorkerDriver:
    return WorkerDriver(Worker.load(replace(options, model=str(folder))))


def first_difference(schedule: WorkerSchedule) -> int | None:
    """Serve a schedule; the first of its requests that gave other bits than alone."""
    alone = serve_alone(schedule.driver, schedule.requests)
    found = schedule.run()
    return next((i for i, outcome in enumerate(found) if not outcome.equals(alone[i])), None)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3, phases=BOUNDED)
@given(data=st.data())
def test_no_schedule_changes_a_token_or_a_log_probability(name: str, data: st.DataObject) -> None:
    """Every type of KV and of weights, each with a schedule of its own, per drawn checkpoint."""
    draft = data.draw(FAMILIES[name])
    seed = data.draw(st.integers(0, 1 << 30))
    with tempfile.TemporaryDirectory() as made:
        write_checkpoint(Path(made), draft)
        for nth, (choice, options) in enumerate(CHOICES.items()):
            chooser = Random(seed + nth)
            requests = draw_requests(chooser, draft.vocab_size, MOST_REQUESTS)
            differing = first_difference(WorkerSchedule(load(Path(made), options), chooser, requests))
            assert differing is None, f"{choice}: request {differing} of {len(requests)}"


def test_schedules_hold_what_they_say(tmp_path: Path) -> None:
    """Requests that run together, over prefixes of others, and again after a preemption."""
    driver = load(make_llama(tmp_path, max_position_embeddings=MAX_POSITIONS))
    preempted = over_prefix = together = 0
    for seed in range(10):
        chooser = Random(seed)
        schedule = WorkerSchedule(driver, chooser, draw_requests(chooser, 257, MOST_REQUESTS))
        schedule.run()
        preempted, over_prefix = preempted + schedule.num_preempted, over_prefix + schedule.num_over_prefix
        together += schedule.num_together
    assert preempted >= 10
    assert over_prefix >= 5
    assert together >= 50


class StageByStage(CpuKernels):
    """Sound, but without the program of all layers, so that a fault in one operation is met."""

    def compile_layers(self, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        del layers, caches


class FaultyLinears(StageByStage):
    """Sums in parts, by the number of rows."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:  # type: ignore[override]
        return SplitByRows(super().pack_linear(weight, bias))


class FaultyHead(StageByStage):
    """The same in the head alone, whose rows are those that sample."""

    def pack_head(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:  # type: ignore[override]
        return SplitByRows(super().pack_head(weight, bias))


class FaultyAttention(StageByStage):
    """Queries are rounded once more in steps of an odd number of tokens."""

    def attend(self, q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        return super().attend(q * 3 / 3 if len(q) % 2 else q, rule, keys, values, layout)


@pytest.mark.parametrize("kernels", [StageByStage, FaultyLinears, FaultyHead, FaultyAttention])
def test_a_kernel_that_depends_on_the_batch_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: Callable[[], CpuKernels]
) -> None:
    """By the tokens and log-probabilities of a worker, within a few schedules; sound kernels pass the same ones."""
    folder = make_llama(tmp_path, max_position_embeddings=MAX_POSITIONS)
    monkeypatch.setattr(start_plan, "choose_backend", lambda *_, **__: kernels())
    driver = load(folder)
    caught = 0
    for seed in range(6):
        chooser = Random(seed)
        schedule = WorkerSchedule(driver, chooser, draw_requests(chooser, 257, MOST_REQUESTS))
        caught += first_difference(schedule) is not None
    assert caught == 0 if kernels is StageByStage else caught >= 3
