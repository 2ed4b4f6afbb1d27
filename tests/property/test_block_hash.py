"""Names of blocks: equal exactly where the prefixes are, whatever the fields of the root."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash


@given(st.lists(st.integers(0, 3), min_size=8, max_size=24), st.integers(1, 4), st.data())
def test_equal_names_mean_equal_prefixes(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    """Names agree exactly as far as tokens do, in whole blocks, and never over a difference in the root."""
    other = data.draw(st.lists(st.integers(0, 3), min_size=len(tokens), max_size=len(tokens)))
    root = root_hash(CacheRoot("m", "float32", block_size), b"tenant")
    chains = [HashChain(root, block_size) for _ in range(2)]
    for chain, ids in zip(chains, (tokens, other), strict=True):
        for blocks in range(len(tokens) // block_size + 1):  # extended piece by piece, as tokens come
            chain.extend(ids, blocks)
    for index in range(len(chains[0])):
        end = (index + 1) * block_size
        assert (chains[0][index] == chains[1][index]) == (tokens[:end] == other[:end])


def test_no_field_of_the_root_can_pose_as_another() -> None:
    base = CacheRoot("model", "float32", 16, "adapter")
    roots = [
        root_hash(base, b"tenant"),
        root_hash(base, b"tenan"),
        root_hash(CacheRoot("model", "float32", 16, "tenant"), b"adapter"),
        root_hash(CacheRoot("model", "float16", 16, "adapter"), b"tenant"),
        root_hash(CacheRoot("modelfloat32", "", 16, "adapter"), b"tenant"),
        root_hash(CacheRoot("model", "float32", 32, "adapter"), b"tenant"),
    ]
    assert len(set(roots)) == len(roots)
