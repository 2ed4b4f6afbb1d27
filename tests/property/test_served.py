"""Scheduler and worker together, all features at once: every request gives the bits that it gives alone.

The oracle runs stage by stage, with batches built anew in every step: neither the compiled program of all layers nor
batches that are moved on are in it. PAWL_NUM_SCHEDULES of each checkpoint are run, from PAWL_FIRST_SCHEDULE on.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers import decodes
from pawl_workers.kernels import cpu
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.decode_mover import DecodeArrays
from pawl_workers.model.weights import LayerWeights
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama
from tests.fakes.drawn_requests import draw_requests, samples_of
from tests.fakes.families import FAMILIES, MAX_POSITIONS, write_checkpoint
from tests.fakes.queueing_sampler import QueueingCpuSampler
from tests.fakes.served_schedule import REACHED, ServedSchedule
from tests.fakes.told import first_difference, told_alone
from tests.fakes.worker_driver import WorkerDriver

NUM_SCHEDULES = int(os.environ.get("PAWL_NUM_SCHEDULES", "2"))
FIRST = int(os.environ.get("PAWL_FIRST_SCHEDULE", "0"))
BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)
NAMES = {
    "mistral": "float32",
    "gemma2": "float16",
    "qwen3-moe": "int8",
    "smollm3": "float32",
    "gemma3": "int8",
    "gpt2": "float16",
}  # with windows, softcaps, experts, layers without positions, two rotary embeddings, and none
LENGTHS = [1, 1, 4, 30, 31, 32, 33, 64, 90]
LONG = [1, 60, 470, 500, 505, 1000, 1018]  # over the ends of splits of 512 keys
LONGEST = 1200


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


class StageByStage(CpuKernels):
    """The operations of the layers one by one, and no batch that is moved on."""

    def compile_layers(self, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        del layers, caches

    def decode_mover(self, arrays: DecodeArrays) -> None:
        del arrays


class Pair:
    """A worker that serves schedules, and one that serves each request alone; a token spoils whoever computes it."""

    def __init__(self, folder: Path, kv_dtype: str, *, queues: bool = False, long: bool = False) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "CpuKernels", StageByStage)
            self.plain = self._load(folder, kv_dtype, long=long)
        with pytest.MonkeyPatch.context() as patch:
            if queues:
                patch.setattr(cpu, "CpuSampler", QueueingCpuSampler)
            self.worker = self._load(folder, kv_dtype, long=long)
        self.poison = self.worker.facts.vocab_size - 1
        self.long, self._epoch = long, 0

    def _load(self, folder: Path, kv_dtype: str, *, long: bool) -> Worker:
        worker = Worker.load(
            WorkerOptions(
                model=str(folder),
                kernels="cpu",
                kv_dtype=kv_dtype,
                max_running=6,
                max_batch_tokens=700 if long else 96,
                num_blocks=250 if long else 40,
                host_kv_bytes=1 << 20,
            )
        )
        with torch.inference_mode():
            worker._weights.embedding.tokens[worker.facts.vocab_size - 1] = torch.nan
        return worker

    def serve(self, seed: int) -> ServedSchedule:
        """Run the schedule of a seed, and compare every request with what it gives alone."""
        draw = Random(seed)
        requests = draw_requests(
            draw,
            self.worker.facts.vocab_size,
            most=5 if self.long else 10,
            poison=self.poison,
            lengths=LONG if self.long else LENGTHS,
            longest=LONGEST if self.long else MAX_POSITIONS,
        )
        depth = draw.choice([1, 1, 2, 3]) if self.worker.facts.max_in_flight == 1 else 2
        served = ServedSchedule(self.worker, draw, self._epoch + 1, depth)
        requests = [request for request in requests if served.accepts(request)]
        driver = WorkerDriver(self.plain)
        driver.reset()
        served.alone = {
            one.handle: told_alone(driver, one, served.end) for request in requests for one in samples_of(request)
        }
        served.run(requests, resets=True)
        self._epoch = served.epoch
        for handle, found in served.told.items():
            assert (differing := first_difference(found, served.alone[handle])) is None, (
                f"schedule {seed}, request {handle}: {differing}"
            )
        return served


def serve_all(pair: Pair, seeds: range) -> Counter[str]:
    """What the schedules of these seeds reached together."""
    reached: Counter[str] = Counter()
    for seed in seeds:
        reached += pair.serve(seed).reached
    return reached


@pytest.mark.parametrize(("name", "kv_dtype"), NAMES.items())
@settings(max_examples=2, phases=BOUNDED)
@given(data=st.data())
def test_every_request_gives_what_it_gives_alone(name: str, kv_dtype: str, data: st.DataObject) -> None:
    draft = data.draw(FAMILIES[name])
    first = data.draw(st.integers(0, 1 << 30))
    with tempfile.TemporaryDirectory() as made:
        write_checkpoint(Path(made), draft)
        serve_all(Pair(Path(made), kv_dtype), range(first + FIRST, first + FIRST + NUM_SCHEDULES))


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_long_contexts_too(tmp_path: Path, kv_dtype: str) -> None:
    pair = Pair(make_llama(tmp_path, max_position_embeddings=1300), kv_dtype, long=True)
    serve_all(pair, range(FIRST, FIRST + NUM_SCHEDULES))


def test_schedules_reach_what_they_are_meant_to_reach(tmp_path: Path) -> None:
    """On two workers: steps that are done when they are launched, and steps that stay in flight."""
    folder = make_llama(tmp_path, max_position_embeddings=MAX_POSITIONS)
    reached: Counter[str] = Counter()
    for queues in (False, True):
        pair = Pair(folder, "float32", queues=queues)
        reached += serve_all(pair, range(FIRST, FIRST + 9 * NUM_SCHEDULES))
    assert not [feature for feature in REACHED if not reached[feature]]


def test_blocks_that_a_moved_batch_does_not_show_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that there was: rows kept blocks of refused drafts, and the batches after that did not know of them."""
    monkeypatch.setattr(decodes, "_append_spare", lambda *_, **__: True)
    pair = Pair(make_llama(tmp_path, max_position_embeddings=MAX_POSITIONS), "float32")
    with pytest.raises(AssertionError, match="schedule"):
        serve_all(pair, range(66, 200))  # found in the first few
