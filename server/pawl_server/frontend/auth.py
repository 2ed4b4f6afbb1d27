"""Who calls: API keys to tenants, their rights and limits, and the cache key that keeps tenants apart.

Owns the key file and its comparison in constant time; keys themselves are nowhere kept, only their SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pawl.errors import InvalidRequest, Unauthenticated

__all__ = ["ANONYMOUS", "KeyFile", "Principal", "cache_key", "hash_key", "new_key", "presented_key"]

log = logging.getLogger(__name__)

_PREFIX = "sha256:"
_FIELDS = {"hash", "tenant", "weight", "max_priority", "requests_per_minute", "tokens_per_minute", "max_concurrent"}
_MAX_KEY_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Principal:
    """The authenticated caller. Limits of 0 mean none.

    `weight` is the tenant's share of an engine that is short of room, against the others who wait.
    """

    tenant: str
    max_priority: int = 10
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0
    weight: int = 1


ANONYMOUS = Principal("anonymous")
"""Everybody, on a listener without keys."""


def new_key() -> str:
    """Draw an API key of 256 random bits."""
    return "pawl-" + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What the key file holds of a key."""
    return _PREFIX + hashlib.sha256(key.encode()).hexdigest()


def presented_key(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The key in a call's metadata: `authorization: Bearer KEY` or `pawl-api-key: KEY`."""
    for name, value in metadata:
        text = value if isinstance(value, str) else ""
        if name == "pawl-api-key":
            return text
        if name == "authorization" and text[:7].lower() == "bearer ":
            return text[7:].strip()
    return None


def cache_key(internal_token: str, tenant: str, salt: str) -> bytes:
    """Root of a caller's prefix-cache chain: equal on every front end that shares the token, secret elsewhere."""
    digest = hashlib.blake2b(key=hashlib.sha256(internal_token.encode()).digest(), digest_size=32, person=b"pawl-cache")
    for part in (tenant.encode(), salt.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


class KeyFile:
    """Keys of a TOML file, read again when the file changes.

        [[keys]]
        hash = "sha256:…"            # pawl_server.frontend.auth.hash_key
        tenant = "acme"
        max_priority = 0             # highest priority class; default 0
        requests_per_minute = 600    # of the tenant; default 0 = no limit; so the next two
        tokens_per_minute = 100000
        max_concurrent = 32
        weight = 2                   # the tenant's share when tenants wait; default 1

    Raises:
        InvalidRequest: the file cannot be read or has an entry that is wrong.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._looked = clock()
        self._stamp = self._stat()
        self._keys = _read_keys(path)

    def authenticate(self, key: str | None) -> Principal:
        """The principal of a key. Takes as long for a wrong key as for a right one.

        Raises:
            Unauthenticated: no key, or an unknown one.
        """
        self._reload()
        if not key:
            raise Unauthenticated(
                "an API key is needed: send it as metadata `authorization: Bearer KEY`", reason="API_KEY_MISSING"
            )
        digest = hashlib.sha256(key[:_MAX_KEY_LENGTH].encode()).digest()
        found: Principal | None = None
        for known, principal in self._keys:
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None or len(key) > _MAX_KEY_LENGTH:
            raise Unauthenticated("the API key is not known", reason="API_KEY_INVALID")
        return found

    def _stat(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise InvalidRequest(f"cannot read {self._path}: {error.strerror}", reason="BAD_KEY_FILE") from error
        return status.st_mtime_ns, status.st_size

    def _reload(self) -> None:
        """Look at the file at most once a second; a file that is wrong leaves the keys as they were."""
        now = self._clock()
        if now - self._looked < 1.0:
            return
        self._looked = now
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._keys = _read_keys(self._path)
            log.info("%s: %d API keys", self._path, len(self._keys))
        except InvalidRequest as error:
            log.error("keeping the API keys as they were: %s", error)  # noqa: TRY400 - the trace says no more


def _read_keys(path: Path) -> list[tuple[bytes, Principal]]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("keys")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", reason="BAD_KEY_FILE") from error
    if not isinstance(entries, list) or not entries:
        raise InvalidRequest(f"{path} has no [[keys]]: nobody could call", reason="BAD_KEY_FILE")
    keys: list[tuple[bytes, Principal]] = []
    limits: dict[str, tuple[int, ...]] = {}
    for index, entry in enumerate(entries):
        digest, principal = _read_entry(f"{path}: keys[{index}]", entry)
        own = (
            principal.requests_per_minute, principal.tokens_per_minute, principal.max_concurrent, principal.weight
        )  # fmt: skip
        if limits.setdefault(principal.tenant, own) != own:
            text = (
                f"{path}: keys[{index}]: limits belong to the tenant: give {principal.tenant!r} the same in every entry"
            )
            raise InvalidRequest(text, reason="BAD_KEY_FILE")
        keys.append((digest, principal))
    return keys


def _read_entry(where: str, entry: object) -> tuple[bytes, Principal]:
    if not isinstance(entry, dict) or not {"hash", "tenant"} <= entry.keys() <= _FIELDS:
        raise InvalidRequest(f"{where}: needs `hash` and `tenant`, may have {sorted(_FIELDS)}", reason="BAD_KEY_FILE")
    text, tenant = entry["hash"], entry["tenant"]
    numbers = {name: value for name, value in entry.items() if name not in ("hash", "tenant")}
    try:
        digest = bytes.fromhex(text.removeprefix(_PREFIX))
        good = text.startswith(_PREFIX) and len(digest) == 32 and isinstance(tenant, str) and bool(tenant)
    except (AttributeError, ValueError):
        good, digest = False, b""
    low = {"max_priority": -10, "weight": 1}
    for name, value in numbers.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        good = good and whole and low.get(name, 0) <= value and (name != "max_priority" or value <= 10)
    if not good:
        text = f'{where}: hash must be "sha256:" and 64 hex digits, tenant a name, limits whole numbers, weight >= 1'
        raise InvalidRequest(text, reason="BAD_KEY_FILE")
    return digest, Principal(tenant, **({"max_priority": 0} | numbers))
