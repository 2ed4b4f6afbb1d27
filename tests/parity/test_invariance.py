"""On CPU a token's logits have the same bits whatever shares its step, its chunks, its prefix and its threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pawl_workers.kernels.onednn import OneDnnLinear
from tests.fakes.logit_runner import LogitRunner

Checkpoint = Callable[[str], Path]
NAMES = ["llama-gqa", "llama-one-kv-head", "gpt2"]
BACKENDS = ["cpu", "onednn"]


def random_tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_alone_equals_any_batch(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """The needle's decode steps and a chunk of its prompt, beside 0 to 16 others."""
    runner = LogitRunner(checkpoint(name), kernels, max_running=18)
    needle = random_tokens(1, 90)
    alone = runner.alone(needle, [80, *[1] * 10])
    for num_others in range(1, 17):
        runner.add(0, needle)
        others = {row: random_tokens(row, 20 + 37 * row % 170) for row in range(1, num_others + 1)}
        for row, token_ids in others.items():
            runner.add(row, token_ids)
        place = num_others // 2
        left = {row: len(token_ids) for row, token_ids in others.items()}
        found = []
        for grant in [80, *[1] * 10]:
            company = [(row, min(left[row], 1 + row % 3 * 9)) for row in others if left[row]]
            step = runner.step(dict([*company[:place], (0, grant), *company[place:]]))
            for row, count in company:
                left[row] -= count
            found.append(step[0])
        assert torch.equal(torch.cat(found), alone), num_others
        for row in range(num_others + 1):
            runner.free(row)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_matter(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """Whole, one token at a time, and chunks that cross tiles, blocks and KV splits."""
    runner = LogitRunner(checkpoint(name), kernels, max_running=2)
    token_ids = random_tokens(2, 700)
    whole = runner.alone(token_ids)
    for chunks in ([1] * 130 + [570], [63, 1, 1, 63, 500, 72], [7] * 100, [511, 1, 1, 187], [512, 188]):
        assert torch.equal(runner.alone(token_ids, chunks), whole), chunks[:4]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_cached_prefix_does_not_matter(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """A sequence over another's blocks has the logits it has alone."""
    runner = LogitRunner(checkpoint(name), kernels, max_running=3)
    prefix, own = random_tokens(4, 96), random_tokens(5, 50)
    whole = runner.alone(prefix + own)
    runner.add(1, prefix + random_tokens(6, 30))
    runner.step({1: 126})
    runner.add(2, prefix + own, shared_blocks=runner.blocks(1)[: 96 // runner.kernels.block_size])
    assert torch.equal(runner.step({2: 50})[2], whole[96:])


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_number_of_threads_does_not_matter(checkpoint: Checkpoint, name: str, kernels: str, two_threads: None) -> None:
    """Two threads and one give the same bits, for chunks and single tokens."""
    runner = LogitRunner(checkpoint(name), kernels, max_running=2)
    token_ids, chunks = random_tokens(8, 600), [300, 1, 1, 298]
    two = runner.alone(token_ids, chunks)
    torch.set_num_threads(1)
    assert torch.equal(runner.alone(token_ids, chunks), two)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(48, 96), (128, 256), (384, 128), (576, 1536), (1536, 576), (768, 2304)]
)
def test_linear_rows_do_not_depend_on_their_number(
    in_features: int, out_features: int, num_threads: int, request: pytest.FixtureRequest
) -> None:
    """The library fact the above rests on: rows of a packed oneDNN product, for many numbers of rows."""
    if num_threads == 2:
        request.getfixturevalue("two_threads")
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    linear = OneDnnLinear(weight, torch.randn(out_features, generator=generator))
    x = torch.randn(256, in_features, generator=generator)
    whole = linear(x)
    for num_rows in [*range(1, 41), 64, 100, 128, 200]:
        assert torch.equal(linear(x[:num_rows]), whole[:num_rows]), num_rows
        assert torch.equal(linear(x[-num_rows:]), whole[-num_rows:]), num_rows


def test_values_behind_a_sequence_do_not_matter(checkpoint: Checkpoint) -> None:
    """Blocks that another sequence has used before give the bits that fresh ones give."""
    folder = checkpoint("llama-gqa")
    fresh, used = LogitRunner(folder, max_running=2), LogitRunner(folder, max_running=2)
    with torch.inference_mode():
        for layer in range(used.spec.num_layers):
            used.cache[layer].keys.fill_(1e3)
            used.cache[layer].values.fill_(-1e3)
    token_ids = random_tokens(9, 75)
    assert torch.equal(fresh.alone(token_ids, [70, 1, 4]), used.alone(token_ids, [70, 1, 4]))
