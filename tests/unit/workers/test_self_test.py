"""A worker's self test passes on a sound worker, whatever it is computed in, and notices one that is not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from pawl_workers.errors import SelfTestError
from pawl_workers.plan import StepPlan, StepResult
from pawl_workers.self_test import run_self_test
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama
from tests.fakes.small_plans import plan


def test_self_test_passes_and_notices(llama_folder: Path) -> None:
    """It passes on a sound worker, and fails when a layer computes something else than it holds."""
    worker = Worker.load(WorkerOptions(str(llama_folder), max_running=1, num_blocks=4))
    passed = worker.self_test()
    assert (passed.num_tokens, passed.max_difference < 1e-3) == (8, True)
    assert worker.execute(plan()).rows == [0]

    class Wrong:
        """Off by a little from what it unpacks to."""

        def __init__(self, linear: object) -> None:
            self.linear = linear

        def __getattr__(self, name: str) -> object:
            return getattr(self.linear, name)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            linear: Callable[[torch.Tensor], torch.Tensor] = self.linear  # type: ignore[assignment]
            return linear(x) * 1.05

    head = dataclasses.replace(worker._weights.head, linear=Wrong(worker._weights.head.linear))  # type: ignore[arg-type]
    worker._weights = dataclasses.replace(worker._weights, head=head)
    with pytest.raises(SelfTestError, match="differ from the reference by up to"):
        worker.self_test()


def test_self_test_notices_what_is_no_number_wherever_it_stands(llama_folder: Path) -> None:
    worker = Worker.load(WorkerOptions(str(llama_folder), max_running=1, num_blocks=4))
    calls = 0

    def execute(step: StepPlan) -> StepResult:
        nonlocal calls
        result = worker.execute(step)
        calls += any(result.logprobs)
        spoiled = [entry and msgspec.structs.replace(entry, logprob=math.nan) for entry in result.logprobs]
        return msgspec.structs.replace(result, logprobs=spoiled) if calls == 3 else result

    facts = worker.facts
    with pytest.raises(SelfTestError, match="differ from the reference by up to nan"):
        run_self_test(execute, 0, worker._weights, worker._settings, facts.max_context, facts.num_blocks, None)


@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_what_a_narrow_cache_costs_is_no_fault(kv_dtype: str, tmp_path: Path) -> None:
    """The reference rounds keys and values alike: bytes move log-probabilities by 0.17 nats here, which is no error."""
    folder = make_llama(tmp_path, hidden_size=128, intermediate_size=256, num_hidden_layers=3, head_dim=32)
    passed = Worker.load(WorkerOptions(str(folder), kv_dtype=kv_dtype, max_running=1, num_blocks=4)).self_test()
    assert passed.max_difference < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_on_the_reference_kernels(llama_folder: Path, dtype: str) -> None:
    """Slow on a CPU, but it works and passes its self test."""
    worker = Worker.load(WorkerOptions(str(llama_folder), dtype=dtype, max_running=1, num_blocks=4))
    assert (worker.facts.kernels, worker.facts.data_type) == ("reference", dtype)
    worker.self_test()
