"""A worker on a GPU: graphs give what the eager pass gives, no step waits for the device but for its tokens."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from pawl_workers.errors import WorkerError
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama, make_qwen3_moe
from tests.fakes.worker_driver import WorkerDriver

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["dense", "routed"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose MLPs are dense, and one of routed layers but for one, of sizes that fill no tile of columns."""
    path = tmp_path_factory.mktemp(f"gpu-{request.param}")
    if request.param == "dense":
        return make_llama(path, hidden_size=256, intermediate_size=512, head_dim=64, tokenizer=True)
    return make_qwen3_moe(
        path, hidden_size=256, intermediate_size=512, head_dim=64, moe_intermediate_size=72, num_experts=20,
        num_hidden_layers=3, mlp_only_layers=[1],
    )  # fmt: skip


@pytest.fixture
def synchronising_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def _options(folder: Path, dtype: str = "bfloat16", *, kernels: str = "triton") -> WorkerOptions:
    return WorkerOptions(
        model=str(folder), device="cuda", dtype=dtype, kernels=kernels, max_running=16, max_batch_tokens=256,
        num_blocks=200, max_context=1024,
    )  # fmt: skip


def test_the_self_test_passes(folder: Path) -> None:
    # In 16 bits experts with nearly the same shares change places by rounding, which in a tiny model moves much.
    for dtype in ("float32",) if "routed" in folder.name else ("float32", "bfloat16", "float16"):
        assert Worker.load(_options(folder, dtype)).self_test().max_difference >= 0


def test_graphs_generate_what_the_reference_generates(folder: Path) -> None:
    """Float32, greedy: sequences of different lengths that join and leave, over a split's end."""
    found = []
    for kernels in ("triton", "reference"):
        worker = Worker.load(_options(folder, "float32", kernels=kernels))
        assert (worker._graphs is not None) == (kernels == "triton")
        driver = WorkerDriver(worker)
        sequences = [driver.start([(7 * i + j) % 256 for j in range(40 + 150 * i)]) for i in range(4)]
        driver.generate(sequences[:3], 12, chunk=50)
        driver.generate(sequences, 20, chunk=50)
        assert all(one.failure is None for one in sequences)
        found.append([one.output for one in sequences])
    assert found[0] == found[1]


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_swapped_and_forked_blocks_hold_what_they_held(folder: Path, kernels: str) -> None:
    """A prefix goes to pinned host memory, its blocks are overwritten, and it comes back and is forked."""
    worker = Worker.load(dataclasses.replace(_options(folder, "float32", kernels=kernels), host_kv_bytes=64 << 20))
    size = worker.facts.block_size
    assert worker.facts.num_host_blocks >= 4
    assert worker.facts.restore_block_s + worker.facts.restore_fixed_s > 0
    worker.reset(1)
    prompt = [(7 * place) % 251 for place in range(2 * size + size // 2)]
    greedy, length = SamplingSpec(temperature=0.0), len(prompt)

    def new(row: int, token_ids: list[int], blocks: list[int], num_computed: int = 0) -> NewSequence:
        return NewSequence(row, token_ids, length, num_computed, blocks, greedy)

    def run(step: int, sequence: NewSequence, freed: Sequence[int] = (), **moves: list[tuple[int, int]]) -> list[int]:
        grant = length - sequence.num_computed
        plan = StepPlan(step, 1, list(freed), [sequence], [], [sequence.row], [grant])
        return worker.execute(msgspec.structs.replace(plan, **moves)).token_ids

    alone = run(1, new(0, prompt, [1, 2, 3]))
    run(2, new(0, [9] * length, [1, 2, 4]), [0], swap_out=[(1, 3), (2, 0)])
    assert run(3, new(0, prompt, [7, 8, 9], 2 * size), [0], swap_in=[(3, 7), (0, 8)], copies=[(9, 11)]) == alone
    assert run(4, new(1, prompt, [7, 8, 11], length - 3)) == alone


def test_a_decode_step_does_not_wait_for_the_device(folder: Path, synchronising_is_an_error: None) -> None:
    """Once its graph is captured, a step queues its copy, its graph and its draw; only the event is waited for."""
    driver = WorkerDriver(Worker.load(_options(folder)))
    specs = [SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.8, top_k=40, top_p=0.9, seed=3)]
    sequences = [driver.start([1, 2, 3 + i], spec) for i, spec in enumerate(specs)]
    driver.generate(sequences, 3)
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        driver.step([(one, 1) for one in sequences])
    torch.cuda.set_sync_debug_mode("default")
    assert [len(one.output) for one in sequences] == [8, 8]


def test_two_steps_in_flight_do_not_wait_for_the_device(folder: Path, synchronising_is_an_error: None) -> None:
    """Chunks, then decodes through graphs: tokens equal those of one step at a time, and no launch synchronises."""
    worker = Worker.load(_options(folder))
    assert worker.facts.max_in_flight == 2
    specs = [
        SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.8, top_k=40, top_p=0.9, seed=3, logprobs=3),
        SamplingSpec(seed=5, logit_bias={7: 4.0}, min_output_tokens=9, suppressed_ids=(3,)),
    ]  # fmt: skip
    found = []
    for epoch, depth in enumerate((1, 2, 2), start=1):  # the first time, graphs are captured
        worker.reset(epoch)
        news = [NewSequence(row, [1, 2, 3 + row], 3, 0, [1 + row], spec) for row, spec in enumerate(specs)]
        plans = [StepPlan(1, epoch, [], news, [], [0, 1, 2], [3, 2, 3])]
        plans += [StepPlan(step, epoch, [], [], [], [1, 2, 0], [1, 1, 1]) for step in range(2, 60)]
        torch.cuda.set_sync_debug_mode("error" if epoch == 3 else "default")
        in_flight, results = [], []
        for plan in plans:
            in_flight.append(worker.launch(plan))
            if len(in_flight) == depth:
                results.append(in_flight.pop(0).result())
        results += [step.result() for step in in_flight]
        found.append([(result.rows, result.token_ids, result.logprobs) for result in results])
    torch.cuda.set_sync_debug_mode("default")
    assert found[0] == found[1] == found[2]
    assert len(found[0][-1][0]) == 3


def test_strict_is_refused_where_no_kernel_keeps_it(folder: Path) -> None:
    with pytest.raises(WorkerError, match="strict on cuda needs the triton kernels"):
        Worker.load(dataclasses.replace(_options(folder, kernels="reference"), strict=True))


def test_strict_products_depend_on_nothing_else() -> None:
    _check_strict("linears")


def test_strict_requests_depend_on_nothing_else(folder: Path) -> None:
    _check_strict("requests", str(folder))


def _check_strict(*arguments: str) -> None:
    """In a process of its own, as a server is."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.strict_gpu", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stdout + done.stderr
