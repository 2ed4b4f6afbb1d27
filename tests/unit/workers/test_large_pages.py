"""Large pages: zeroed and aligned, asked for where the system gives them, and where keys and values lie."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels import choose_backend
from pawl_workers.kv_cache import KvCache
from pawl_workers.large_pages import map_large_pages, passing_tensor
from pawl_workers.model.checkpoint_config import read_config

_MAPPINGS = Path("/proc/self/smaps")
_CPU = torch.device("cpu")


def mapping_facts(address: int) -> dict[str, list[str]]:
    """What Linux knows of the mapping that holds an address, by name, in words."""
    here, facts = False, dict[str, list[str]]()
    for line in _MAPPINGS.read_text(encoding="ascii", errors="replace").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here:
            name, _, words = line.partition(":")
            facts[name] = words.split()
    return facts


def mapping_flags(address: int) -> set[str]:
    """`hg` for large pages advised, `sh` for shared memory."""
    return set(mapping_facts(address)["VmFlags"])


@pytest.fixture(scope="module", params=["cpu", "reference"])
def tensors(request: pytest.FixtureRequest, llama_folder: Path) -> list[torch.Tensor]:
    """Keys and values of each layer."""
    return allocate(llama_folder, request.param, num_blocks=7)


def allocate(folder: Path, backend: str, num_blocks: int) -> list[torch.Tensor]:
    """Keys and values of each layer of a new cache."""
    spec = read_config(folder).spec
    shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    kernels = choose_backend(_CPU, torch.float32, shape, backend)
    cache = KvCache.allocate(spec, kernels, num_blocks, _CPU, torch.float32)
    return [tensor for layer in range(spec.num_layers) for tensor in (cache[layer].keys, cache[layer].values)]


def test_memory_is_zeroed_whole_and_aligned() -> None:
    for size in (1, 2 << 20, (2 << 20) + 1):
        memory = map_large_pages(size)
        assert memory.numel() >= size
        assert memory.data_ptr() % (2 << 20) == 0
        assert int(memory.max()) == 0
        memory.fill_(1)


def test_keys_and_values_of_all_layers_are_apart_and_aligned(tensors: list[torch.Tensor]) -> None:
    assert len(tensors) >= 4
    assert all(int(tensor.count_nonzero()) == 0 and tensor.data_ptr() % 64 == 0 for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number + 1).all())


@pytest.mark.skipif(not _MAPPINGS.exists(), reason="Linux alone tells how it maps memory")
def test_keys_and_values_lie_where_linux_gives_large_pages(tensors: list[torch.Tensor]) -> None:
    """Shared memory, which `mmap` gives unless it is told otherwise, mostly stays in small pages."""
    for tensor in tensors:
        assert "sh" not in mapping_flags(tensor.data_ptr())
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in mapping_flags(tensors[0].data_ptr())


@pytest.mark.skipif(not _MAPPINGS.exists(), reason="Linux alone tells what is resident")
def test_no_request_waits_for_the_pages_of_the_first_blocks(llama_folder: Path) -> None:
    tensors = allocate(llama_folder, "cpu", num_blocks=2048)
    size = sum(tensor.nbytes for tensor in tensors)
    assert size > 16 << 20
    assert int(mapping_facts(tensors[0].data_ptr())["Rss"][0]) << 10 >= size


def test_systems_without_large_pages_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # refused, as by a kernel without them
    assert int(map_large_pages(100)[:100].fill_(3).sum()) == 300
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert int(map_large_pages(100)[:100].fill_(3).sum()) == 300


def test_a_passing_tensor_is_one_of_its_shape() -> None:
    """Small ones come from malloc: a mapping for each would take a page that it does not fill."""
    for shape in ((3, 5), (300, 500)):
        tensor = passing_tensor(shape, torch.bfloat16)
        assert (tensor.shape, tensor.dtype) == (shape, torch.bfloat16)
        assert bool((tensor.fill_(7.0) == 7.0).all())
