"""Which seed each sample of a request has: the same on both sides of the wire, and in every version."""

from __future__ import annotations

import hashlib
import struct

__all__ = ["derive_seed"]

_DOMAIN = b"pawl sample seed"  # 16 bytes, so that no other use of SHA-256 gives the same digests


def derive_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request with `seed`: a request for it alone gives the same tokens.

    Sample 0 has the request's own seed. The others have the first 63 bits of the SHA-256 digest of 32 bytes: the text
    "pawl sample seed" in ASCII, then `seed` and `index`, each as 8 bytes, big-endian.

    Args:
        seed: in [0, 2^63); the one that the request gave, or the one that the answer names.
        index: position of the sample, from 0; below 2^63.

    Returns:
        In [0, 2^63).

    Raises:
        ValueError: one of them is out of its range.
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{name} = {value}: must be in [0, 2^63)")
    if index == 0:
        return seed
    digest = hashlib.sha256(_DOMAIN + struct.pack(">QQ", seed, index)).digest()
    return int.from_bytes(digest[:8], "big") >> 1
