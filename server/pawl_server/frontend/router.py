"""Which replica gets a request: the one with most of its prompt cached, less the work it already has.

Owns a guess of what each replica has cached, made from what was sent there; pure, knows no connection.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Candidate", "Router"]

Key = TypeVar("Key", bound=Hashable)

_MAX_BLOCKS = 4096  # of one prompt that are looked at
_DEFAULT_BLOCK = 16
_FOREIGN_TOKENS = 256  # counted for a sequence of another front end, whose size is not known here


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Key]):
    """A replica that is ready.

    Attributes:
        key: identifies the process: a rebuilt replica has another one, and an empty cache.
        outstanding_tokens: prompt and output tokens of this front end's requests there, as far as known.
        num_own: this front end's requests there.
        num_sequences: running and waiting sequences by the replica's own latest report.
        num_blocks: KV blocks of the replica.
        block_size: tokens in a block.
    """

    key: Key
    outstanding_tokens: int
    num_own: int
    num_sequences: int
    num_blocks: int
    block_size: int


class Router(Generic[Key]):
    """Remembers which prompts went where, as hashes of their blocks.

    Score of a replica = affinity * cached prompt tokens - outstanding tokens; the highest gets the request.
    A replica's memory holds as many blocks as the replica itself, least recently used first out.

    Args:
        affinity: weight of cached tokens; 0 = load alone.
    """

    def __init__(self, affinity: float) -> None:
        self._affinity = affinity
        self._seen: dict[Key, OrderedDict[bytes, None]] = {}

    def pick(self, candidates: Sequence[Candidate[Key]], prompt_ids: Sequence[int], cache_key: bytes) -> Candidate[Key]:
        """Choose among the candidates and remember the prompt there. Ties go to the first.

        Raises:
            ValueError: there is no candidate.
        """
        if not candidates:
            raise ValueError("no replica to choose from")
        hashes: dict[int, list[bytes]] = {}
        best, best_score = candidates[0], -float("inf")
        for candidate in candidates:
            size = candidate.block_size or _DEFAULT_BLOCK
            if size not in hashes:
                hashes[size] = _block_hashes(prompt_ids, cache_key, size) if self._affinity else []
            score = self._affinity * self._num_cached(candidate.key, hashes[size]) * size - _load(candidate)
            if score > best_score:
                best, best_score = candidate, score
        self._remember(best, hashes[best.block_size or _DEFAULT_BLOCK])
        return best

    def keep(self, keys: Sequence[Key]) -> None:
        """Forget every replica that is not among the keys."""
        for key in self._seen.keys() - set(keys):
            del self._seen[key]

    def _num_cached(self, key: Key, blocks: Sequence[bytes]) -> int:
        """Length of the beginning of the chain that the replica should have."""
        seen = self._seen.get(key)
        if not seen:
            return 0
        return next((n for n, block in enumerate(blocks) if block not in seen), len(blocks))

    def _remember(self, candidate: Candidate[Key], blocks: Sequence[bytes]) -> None:
        seen = self._seen.setdefault(candidate.key, OrderedDict())
        # Backwards, so that the head of a chain is the youngest: a chain without its head is worth nothing.
        for block in reversed(blocks):
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > max(candidate.num_blocks, 1):
            seen.popitem(last=False)


def _load(candidate: Candidate[Key]) -> float:
    foreign = max(0, candidate.num_sequences - candidate.num_own)
    return candidate.outstanding_tokens + foreign * _FOREIGN_TOKENS


def _block_hashes(prompt_ids: Sequence[int], cache_key: bytes, block_size: int) -> list[bytes]:
    """Chained hashes of the full blocks, without the last token (the engine always computes that one)."""
    num_blocks = max(0, min((len(prompt_ids) - 1) // block_size, _MAX_BLOCKS))
    ids = array("i", prompt_ids[: num_blocks * block_size]).tobytes()
    width = array("i").itemsize * block_size
    hashes: list[bytes] = []
    parent = cache_key
    for start in range(0, len(ids), width):
        parent = hashlib.blake2b(parent + ids[start : start + width], digest_size=8).digest()
        hashes.append(parent)
    return hashes
