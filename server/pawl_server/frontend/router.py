"""Which replica gets a request: the one with most of its prompt cached, less the work it already has.

Owns what is known of each replica's cache: a guess from what was sent there, set right by what the replica says;
pure, knows no connection.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash

__all__ = ["Candidate", "Router"]

Key = TypeVar("Key", bound=Hashable)

_MAX_BLOCKS = 4096  # of one prompt that are looked at
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
        root: what its KV depends on, the size of a block with it.
    """

    key: Key
    outstanding_tokens: int
    num_own: int
    num_sequences: int
    num_blocks: int
    root: CacheRoot


class Router(Generic[Key]):
    """Remembers which prompts went where, as the engines name their blocks.

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
        names: dict[CacheRoot, list[bytes]] = {}
        best, best_score = candidates[0], -float("inf")
        for candidate in candidates:
            root = candidate.root
            if root not in names:
                names[root] = _block_names(prompt_ids, cache_key, root) if self._affinity else []
            cached = self._num_cached(candidate.key, names[root]) * root.block_size
            score = self._affinity * cached - _load(candidate)
            if score > best_score:
                best, best_score = candidate, score
        self._remember(best, names[best.root])
        return best

    def learn(self, key: Key, name: bytes, *, present: bool) -> None:
        """A replica says that a prefix is cached from now on, or is not any more."""
        seen = self._seen.setdefault(key, OrderedDict())
        if present:
            seen[name] = None
            seen.move_to_end(name)
        else:
            seen.pop(name, None)

    def forget(self, key: Key) -> None:
        """Nothing is known of a replica's cache any more."""
        self._seen.pop(key, None)

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


def _block_names(prompt_ids: Sequence[int], cache_key: bytes, root: CacheRoot) -> list[bytes]:
    """Names of the full blocks, without the last token (the engine always computes that one)."""
    chain = HashChain(root_hash(root, cache_key), root.block_size)
    chain.extend(prompt_ids, max(0, min((len(prompt_ids) - 1) // root.block_size, _MAX_BLOCKS)))
    return chain.names
