"""Forked, copied and swapped blocks give the logits that computed ones give, bit for bit, in every backend's layout."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pawl_workers.host_cache import HostCache
from tests.fakes.logit_runner import LogitRunner

Checkpoint = Callable[[str], Path]
BACKENDS = ["reference", "cpu", "onednn"]
NAMES = ["llama-gqa", "gpt2"]


def random_tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fork_equals_a_sequence_of_its_own(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """Two children leave their parent in the middle of a block, and none disturbs another."""
    runner = LogitRunner(checkpoint(name), kernels, max_running=4)
    size = runner.kernels.block_size
    common = random_tokens(1, 2 * size + 5)
    ends = [random_tokens(seed, 2 * size) for seed in (2, 3, 4)]
    alone = [runner.alone(common + end) for end in ends]
    runner.add(1, common + ends[0])
    first = [runner.step({1: len(common)})[1]]
    for row, end in ((2, ends[1]), (3, ends[2])):
        runner.fork(1, row, common + end, len(common))
    own = runner.blocks(2)[2], runner.blocks(3)[2]
    assert runner.blocks(1)[:2] == runner.blocks(2)[:2] == runner.blocks(3)[:2]
    assert len({runner.blocks(1)[2], *own}) == 3
    steps = [runner.step({1: 1, 2: 1, 3: 1}) for _ in range(2 * size)]
    first += [step[1] for step in steps]
    torch.testing.assert_close(torch.cat(first), alone[0], rtol=0, atol=_tolerance(kernels))
    for row in (2, 3):
        found = torch.cat([step[row] for step in steps])
        torch.testing.assert_close(found, alone[row - 1][len(common) :], rtol=0, atol=_tolerance(kernels))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_swapped_blocks_come_back(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """A prefix goes to the host, its blocks are overwritten, and it comes back into other blocks."""
    runner = LogitRunner(checkpoint(name), kernels, max_running=4)
    size = runner.kernels.block_size
    token_ids = random_tokens(5, 20 * size + 3)
    runner.add(0, token_ids)
    whole = runner.step({0: len(token_ids)})[0]
    host = HostCache(runner.cache, 24, torch.device("cpu"), torch.float32)
    held = runner.blocks(0)[:20]
    places = random.Random(0).sample(range(24), 20)
    with torch.inference_mode():
        host.swap_out(list(zip(held, places, strict=True)))
    runner.free(0)
    for row in range(3):
        runner.add(row, random_tokens(6 + row, len(token_ids)))
        runner.step({row: len(token_ids)})
    runner.free(1)
    restored = runner.take(20)
    with torch.inference_mode():
        host.swap_in(list(zip(places, restored, strict=True)))
    runner.add(3, token_ids, shared_blocks=tuple(restored))
    found = runner.step({3: len(token_ids) - 20 * size})[3]
    torch.testing.assert_close(found, whole[20 * size :], rtol=0, atol=_tolerance(kernels))


def test_moves_change_only_what_they_name(checkpoint: Checkpoint) -> None:
    runner = LogitRunner(checkpoint("llama-gqa"), "cpu", max_running=2)
    cache, blocks = runner.cache, list(range(40))
    with torch.inference_mode():
        cache.scatter(blocks, torch.randn(40, cache.block_elements))
        before = cache.gather(blocks)
        cache.copy_blocks([(3, 7), (3, 9), (5, 8)])
        after = cache.gather(blocks)
    changed = [block for block in blocks if not torch.equal(before[block], after[block])]
    assert changed == [7, 8, 9]
    assert torch.equal(after[[7, 9, 8]], before[[3, 3, 5]])


def test_what_a_restore_costs_is_measured(checkpoint: Checkpoint) -> None:
    runner = LogitRunner(checkpoint("llama-gqa"), "cpu", max_running=2)
    blocks = list(range(1, 17))
    with torch.inference_mode():
        runner.cache.scatter(blocks, torch.randn(16, runner.cache.block_elements))
        before = runner.cache.gather(blocks)
        fixed_s, block_s = HostCache(runner.cache, 16, torch.device("cpu"), torch.float32).measure(40)
        assert torch.equal(runner.cache.gather(blocks), before)
    assert min(fixed_s, block_s) >= 0
    assert fixed_s + block_s > 0


def _tolerance(kernels: str) -> float:
    """The reference sums in an order that depends on the step; the fast kernels do not."""
    return 1e-4 if kernels == "reference" else 0.0
