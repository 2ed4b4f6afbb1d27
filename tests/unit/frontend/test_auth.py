"""Key files: what a right one gives, what a wrong one is told, and when it is read again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pawl.errors import InvalidRequest, Unauthenticated
from pawl_server.frontend.auth import KeyFile, Principal, cache_key, hash_key, new_key, presented_key

KEY = f"pawl-{'k' * 43}"  # not drawn: processes that share the tests name them alike


class Clock:
    """Seconds that a test turns forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _write(path: Path, *entries: str) -> Path:
    path.write_text("".join(f"[[keys]]\n{entry}\n" for entry in entries), encoding="utf-8")
    return path


def _entry(key: str = KEY, tenant: str = "acme", **values: int) -> str:
    lines = [
        f'hash = "{hash_key(key)}"',
        f'tenant = "{tenant}"',
        *(f"{name} = {value}" for name, value in values.items()),
    ]
    return "\n".join(lines)


def test_a_key_gives_its_tenant_with_class_and_limits(tmp_path: Path) -> None:
    other = new_key()
    entry = _entry(max_priority=5, requests_per_minute=60, tokens_per_minute=5000, max_concurrent=3)
    keys = KeyFile(_write(tmp_path / "keys.toml", entry, _entry(other, "umbrella")))
    assert keys.authenticate(KEY) == Principal("acme", 5, 60, 5000, 3)
    assert keys.authenticate(other) == Principal("umbrella", max_priority=0)


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_is_told_how_to_send_one(tmp_path: Path, key: str | None) -> None:
    keys = KeyFile(_write(tmp_path / "keys.toml", _entry()))
    with pytest.raises(Unauthenticated, match="authorization: Bearer KEY") as refused:
        keys.authenticate(key)
    assert refused.value.reason == "API_KEY_MISSING"


@pytest.mark.parametrize("key", ["pawl-wrong", KEY[:-1], KEY + "x", hash_key(KEY), "é" * 400, KEY + "x" * 600])
def test_a_wrong_key_is_refused_and_never_repeated(tmp_path: Path, key: str) -> None:
    keys = KeyFile(_write(tmp_path / "keys.toml", _entry()))
    with pytest.raises(Unauthenticated) as refused:
        keys.authenticate(key)
    assert refused.value.reason == "API_KEY_INVALID"
    assert key not in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('tenant = "acme"', "needs `hash` and `tenant`"),
        (f'hash = "{hash_key(KEY)}"', "needs `hash` and `tenant`"),
        (_entry(max_streams=3), "may have"),
        ('hash = "sha256:00"\ntenant = "acme"', "64 hex digits"),
        (f'hash = "{hash_key(KEY)[7:]}"\ntenant = "acme"', "64 hex digits"),
        (f'hash = "{KEY}"\ntenant = "acme"', "64 hex digits"),
        (_entry(tenant=""), "tenant a name"),
        (_entry(max_concurrent=-1), "whole numbers"),
        (_entry(max_priority=11), "whole numbers"),
        (f"{_entry()}\nmax_concurrent = true", "whole numbers"),
        (f"{_entry()}\nrequests_per_minute = 1.5", "whole numbers"),
    ],
)
def test_a_wrong_entry_is_refused_at_start_with_its_number(tmp_path: Path, entry: str, says: str) -> None:
    path = _write(tmp_path / "keys.toml", _entry(new_key(), "good"), entry)
    with pytest.raises(InvalidRequest, match=r"keys\[1\]") as refused:
        KeyFile(path)
    assert says in str(refused.value)
    assert refused.value.reason == "BAD_KEY_FILE"


@pytest.mark.parametrize("text", ["", "keys = 3", "[[keys]\n", "[keys]\nhash = 1"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"keys\.toml"):
        KeyFile(path)
    with pytest.raises(InvalidRequest, match=r"missing\.toml"):
        KeyFile(tmp_path / "missing.toml")


def test_limits_belong_to_the_tenant(tmp_path: Path) -> None:
    path = _write(tmp_path / "keys.toml", _entry(max_concurrent=2), _entry(new_key(), max_concurrent=3))
    with pytest.raises(InvalidRequest, match="'acme' the same in every entry"):
        KeyFile(path)


def test_a_changed_file_is_read_again_and_a_wrong_one_leaves_the_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, fresh, path = Clock(), new_key(), tmp_path / "keys.toml"
    keys = KeyFile(_write(path, _entry()), clock)

    def change(number: int) -> None:
        os.utime(path, ns=(number, number))  # a second write may fall into the same tick of the file system
        clock.now += 1.5

    path.write_text("not TOML")
    change(1)
    assert keys.authenticate(KEY).tenant == "acme"
    assert "keeping the API keys" in caplog.text
    _write(path, _entry(fresh, "umbrella"))
    change(2)
    assert keys.authenticate(fresh).tenant == "umbrella"
    with pytest.raises(Unauthenticated):
        keys.authenticate(KEY)


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ([("authorization", "Bearer abc")], "abc"),
        ([("authorization", "bearer  abc ")], "abc"),
        ([("pawl-api-key", "abc")], "abc"),
        ([("authorization", "Basic abc")], None),
        ([("authorization", b"Bearer abc")], None),
        ([("x-request-id", "abc")], None),
        ([], None),
    ],
)
def test_where_a_key_is_looked_for(metadata: list[tuple[str, str | bytes]], key: str | None) -> None:
    assert presented_key(metadata) == key


@example(pairs=[("a", "bc"), ("ab", "c")])
@given(pairs=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=2, max_size=2, unique=True))
def test_no_two_tenants_or_salts_share_a_cache(pairs: list[tuple[str, str]]) -> None:
    """Fields are length-prefixed: ("a", "bc") and ("ab", "c") differ."""
    (one_tenant, one_salt), (other_tenant, other_salt) = pairs
    assert cache_key("token", one_tenant, one_salt) != cache_key("token", other_tenant, other_salt)
    assert cache_key("token", one_tenant, one_salt) == cache_key("token", one_tenant, one_salt)
    assert cache_key("token", one_tenant, one_salt) != cache_key("other", one_tenant, one_salt)
