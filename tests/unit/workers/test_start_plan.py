"""What a start is planned from: options that cannot be met, how memory is divided, which kernels serve and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pawl_workers.errors import OutOfMemoryError, WorkerError
from pawl_workers.memory import plan_memory
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.start_plan import explain_kernels, plan_start
from pawl_workers.worker import Worker, WorkerOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu0"}, "device 'tpu0'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"kernels": "magic"}, "no kernels 'magic'"),
        ({"kernels": "cpu", "dtype": "bfloat16"}, "the cpu kernels compute in float32"),
        ({"num_blocks": 1 << 40}, "do not fit"),
        ({"kv_bytes": 100}, "do not fit"),
    ],
)
def test_options_that_cannot_be_met(llama_folder: Path, changes: dict[str, object], message: str) -> None:
    """Each is refused with what is wrong."""
    options = dataclasses.replace(WorkerOptions(str(llama_folder)), **changes)  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match=message):
        Worker.load(options)


def test_more_host_blocks_than_memory_are_refused(llama_folder: Path) -> None:
    """Before anything is allocated, with the setting's name."""
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        Worker.load(WorkerOptions(str(llama_folder), max_running=1, num_blocks=4, host_kv_bytes=1 << 50))


def test_memory_is_divided(llama_folder: Path) -> None:
    """A share of what remains goes to KV, no more than can be used, and nothing is counted twice."""
    spec = read_config(llama_folder).spec
    block_bytes = 32 * spec.kv_bytes_per_token(4)

    def divide(available: int, most_blocks: int, kv_bytes: int | None = None) -> tuple[int, int]:
        made = plan_memory(
            available=available,
            weights=1000,
            activations=500,
            block_bytes=block_bytes,
            most_blocks=most_blocks,
            num_blocks=None,
            kv_bytes=kv_bytes,
            memory_fraction=0.5,
        )
        assert made.weight_bytes + made.activation_bytes + made.kv_bytes + made.reserve_bytes == available
        return made.num_blocks, made.kv_bytes

    assert divide(1500 + 20 * block_bytes, 1000) == (9, 10 * block_bytes)
    assert divide(1500 + 20 * block_bytes, 4) == (4, 5 * block_bytes)
    assert divide(1500 + 20 * block_bytes, 4, 15 * block_bytes) == (14, 15 * block_bytes)
    with pytest.raises(OutOfMemoryError, match=r"= 0\.03 MB do not fit into 0\.02 MB of memory"):
        divide(1500 + block_bytes, 1000)


@pytest.mark.parametrize(
    ("available", "message"),
    [
        (0.5, r"weights 0\.\d+ MB \+ activations of a step [\d.]+ MB \+ KV [\d.]+ MB .* Use a smaller model"),
        (1.1, "Lower max_batch_tokens or max_running"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_read(
    llama_folder: Path, available: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every part and the remedy."""
    plan = plan_start(WorkerOptions(str(llama_folder)))
    limit = int(plan.weight_bytes * available)
    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", lambda device: limit)
    seen: list[str] = []
    with pytest.raises(OutOfMemoryError, match=message):
        Worker.load(WorkerOptions(str(llama_folder)), lambda phase, done, total: seen.append(phase))
    assert seen == []


def test_a_plan_is_what_happens(llama_folder: Path) -> None:
    """The worker's own figures, from headers alone; a bound on KV is kept."""
    options = WorkerOptions(str(llama_folder), max_running=4, max_context=128, most_kv_bytes=1 << 16)
    plan = plan_start(options)
    memory, facts = plan.divide_memory(), Worker.load(options).facts
    assert (facts.kernels, facts.block_size) == (plan.kernels.name, plan.kernels.block_size)
    assert facts.weight_bytes <= memory.weight_bytes
    assert (facts.activation_bytes, facts.kv_bytes) == (memory.activation_bytes, memory.kv_bytes)
    assert facts.num_blocks == memory.num_blocks == (1 << 16) // plan.block_bytes - 1


def test_a_host_tier_without_a_block_is_refused(llama_folder: Path) -> None:
    options = WorkerOptions(str(llama_folder), max_running=4, max_context=128, most_kv_bytes=1 << 16)
    block_bytes = plan_start(options).block_bytes
    with pytest.raises(
        WorkerError, match=f"host_kv_bytes = {block_bytes - 1} holds no KV block, .* {block_bytes} bytes"
    ):
        plan_start(dataclasses.replace(options, host_kv_bytes=block_bytes - 1))
    assert Worker.load(dataclasses.replace(options, host_kv_bytes=block_bytes)).facts.num_host_blocks == 1


def test_the_choice_of_kernels_is_explained(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for, the best, or why not the best."""
    options = WorkerOptions(str(llama_folder))
    assert "asked for" in explain_kernels(plan_start(dataclasses.replace(options, kernels="onednn")))
    assert explain_kernels(plan_start(options)).startswith("the fastest for float32 on cpu, heads of 16")
    narrow = explain_kernels(plan_start(dataclasses.replace(options, dtype="bfloat16")))
    assert "not cpu: the cpu kernels compute in float32 on a cpu, not in torch.bfloat16" in narrow
