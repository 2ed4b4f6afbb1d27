"""Names of cached prefixes: a SHA-256 chain over typed, length-prefixed fields.

The name of a block covers every token up to its end and everything its KV depends on, so equal names mean equal KV.
Python's `hash()` and untagged strings are not used: the first is not collision-safe, the second lets one field pose
as another.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CacheRoot", "HashChain", "root_hash"]

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class CacheRoot:
    """What all sequences of a replica share: everything besides tokens and tenant that KV depends on."""

    model_revision: str
    kv_dtype: str
    block_size: int
    adapter: str = ""


def _field(tag: bytes, value: bytes) -> bytes:
    """A field with its type (4 bytes) and length in front, so that no two lists of fields encode alike."""
    return tag + struct.pack("<I", len(value)) + value


def root_hash(root: CacheRoot, cache_key: bytes) -> bytes:
    """Name of the empty prefix of one tenant and salt.

    Args:
        root: what the replica's sequences share.
        cache_key: keyed digest of tenant and salt, made by the front end from the authenticated caller.

    Returns:
        32 bytes.
    """
    digest = hashlib.sha256()
    digest.update(_field(b"vers", struct.pack("<I", _FORMAT_VERSION)))
    digest.update(_field(b"modl", root.model_revision.encode()))
    digest.update(_field(b"dtyp", root.kv_dtype.encode()))
    digest.update(_field(b"bsiz", struct.pack("<I", root.block_size)))
    digest.update(_field(b"adpt", root.adapter.encode()))
    digest.update(_field(b"tnnt", cache_key))
    return digest.digest()


class HashChain:
    """Names of the full blocks of one sequence, made once and extended as tokens come."""

    __slots__ = ("_hashes", "_root", "block_size")

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root = root
        self.block_size = block_size
        self._hashes: list[bytes] = []

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> None:
        """Make the names of the first `num_blocks` blocks; those made already are kept.

        `token_ids` must begin with the tokens given before and cover the blocks.
        """
        for index in range(len(self._hashes), num_blocks):
            start = index * self.block_size
            tokens = array("i", token_ids[start : start + self.block_size])
            parent = self._hashes[-1] if self._hashes else self._root
            digest = hashlib.sha256(_field(b"prnt", parent))
            digest.update(_field(b"tokn", tokens.tobytes()))
            self._hashes.append(digest.digest())

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, index: int) -> bytes:
        return self._hashes[index]
