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
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class CacheRoot:
    """What all sequences of a replica share: everything besides tokens and tenant that KV depends on."""

    model_revision: str
    kv_dtype: str
    block_size: int
    adapter: str = ""


def _head(tag: bytes, num_bytes: int) -> bytes:
    """What stands before a field: its type (4 bytes) and length, so that no two lists of fields encode alike."""
    return tag + struct.pack("<I", num_bytes)


def _field(tag: bytes, value: bytes) -> bytes:
    return _head(tag, len(value)) + value


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
    """Names of the full blocks of one sequence, made once and extended as tokens come.

    Attributes:
        root: name of the empty prefix; also the namespace, since no two tenants or salts have the same.
        block_size: tokens of a block.
        owner: tenant whose share of the cache the blocks count against.
        names: of the blocks so far. Written by `extend` alone.
        found: where the last lookup ended; belongs to `PrefixIndex.find`.
    """

    __slots__ = ("_before_tokens", "block_size", "found", "names", "owner", "root")

    def __init__(self, root: bytes, block_size: int, owner: str = "") -> None:
        self.root = root
        self.block_size = block_size
        self.owner = owner
        self.names: list[bytes] = []
        self.found: tuple[int, list[int]] = (-1, [])
        self._before_tokens = _head(b"tokn", block_size * array("i").itemsize)

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> None:
        """Make the names of the first `num_blocks` blocks; those made already are kept.

        `token_ids` must begin with the tokens given before and cover the blocks.
        """
        names, size = self.names, self.block_size
        parent = names[-1] if names else self.root
        for start in range(len(names) * size, num_blocks * size, size):
            tokens = array("i", token_ids[start : start + size])
            parent = hashlib.sha256(_BEFORE_PARENT + parent + self._before_tokens + tokens.tobytes()).digest()
            names.append(parent)

    def fork(self, num_blocks: int) -> HashChain:
        """The chain of another sequence that begins with the same blocks."""
        chain = HashChain(self.root, self.block_size, self.owner)
        chain.names = self.names[:num_blocks]
        return chain

    def parent(self, index: int) -> bytes:
        """Name of the prefix before a block."""
        return self.names[index - 1] if index else self.root

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        return self.names[index]


_BEFORE_PARENT = _head(b"prnt", _DIGEST_BYTES)
