"""Settings of a client: arguments, the environment, secrets and channels."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl import (
    TLS,
    AdminClient,
    Client,
    InvalidRequest,
    Retry,
)
from pawl._channel import channel_options, metadata, open_channel
from pawl._options import DEFAULT_TARGET, Settings, settings_from
from pawl._secrets import internal_token

SETTINGS = Settings(target="localhost:1")


def settings(target: str | None = None, **changes: object) -> Settings:
    """As a client makes them."""
    values: dict[str, object] = {"api_key": None, "timeout": None, "retries": None, "tls": None, **changes}
    return settings_from(target, target_variable="PAWL_TARGET", default_target=DEFAULT_TARGET, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["pawl-secret\n", " pawl-secret", "pawl-secret"])
def test_the_line_end_of_a_key_file_is_no_part_of_the_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert metadata(settings(api_key=key)) == (("authorization", "Bearer pawl-secret"),)
    monkeypatch.setenv("PAWL_API_KEY", key)
    assert settings().api_key == "pawl-secret"


@pytest.mark.parametrize("key", ["pawl secret", "pawl\nsecret", "pawl-geheim\u00df"])
def test_a_key_that_metadata_cannot_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(InvalidRequest, match="api_key") as caught:
        settings(api_key=key)
    assert key[5:] not in caught.value.message


def test_environment_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument before variable before default."""
    assert settings() == Settings(target="localhost:50051")
    monkeypatch.setenv("PAWL_TARGET", "elsewhere:1")
    monkeypatch.setenv("PAWL_API_KEY", "k")
    monkeypatch.setenv("PAWL_TIMEOUT", "7.5")
    assert settings() == Settings(target="elsewhere:1", api_key="k", timeout=7.5)
    assert settings("here:2", api_key="", timeout=1.0, retries=4) == Settings(
        target="here:2", api_key="", timeout=1.0, retry=Retry(retries=4)
    )


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan"])
def test_bad_timeout_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with the value."""
    monkeypatch.setenv("PAWL_TIMEOUT", value)
    with pytest.raises(InvalidRequest, match=f"PAWL_TIMEOUT is '{value}'"):
        settings()


def test_targets_and_tls() -> None:
    """A scheme chooses encryption; a file is a certificate authority."""
    assert settings("grpcs://host:443") == Settings(target="host:443", tls=TLS())
    assert settings("grpc://host:1/") == Settings(target="host:1")
    assert settings("dns:///name:1").target == "dns:///name:1"
    assert settings("h:1", tls=True).tls == TLS()
    assert settings("h:1", tls=False).tls is None
    assert settings("h:1", tls="ca.pem").tls == TLS(ca_file=Path("ca.pem"))
    with pytest.raises(InvalidRequest, match="tls has no key_file"):
        TLS(certificate_file=Path("c"))
    with pytest.raises(InvalidRequest, match="tls has no certificate_file"):
        TLS(key_file=Path("k"))
    with pytest.raises(InvalidRequest, match="target is empty"):
        settings(" ")
    with pytest.raises(InvalidRequest, match=r"cannot read missing\.pem"):
        open_channel(settings("h:1", tls="missing.pem"))


def test_channel_options() -> None:
    """gRPC's own retries are off; a name with several addresses is spread over."""
    options = dict(channel_options(settings("h:1")))
    assert options["grpc.enable_retries"] == 0
    assert options["grpc.min_reconnect_backoff_ms"] == 5000
    assert "grpc.service_config" not in options
    assert "round_robin" in str(dict(channel_options(settings("dns:///h:1")))["grpc.service_config"])
    assert metadata(settings("h:1", api_key="k")) == (("authorization", "Bearer k"),)
    assert metadata(settings("h:1")) == ()


def test_open_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond this machine and without TLS; the key itself is not logged."""
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/s"):
        open_channel(settings(target, api_key="secret-key")).close()
    assert not caplog.records
    open_channel(settings("far.example:1", api_key="secret-key")).close()
    assert "without encryption" in caplog.text
    open_channel(settings("far.example:1", internal_token="secret-token")).close()
    assert "the internal token goes to far.example:1 without encryption" in caplog.text
    assert "secret-" not in caplog.text


def test_an_internal_token_comes_from_what_is_given_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    assert internal_token(None) == ""
    monkeypatch.setenv("PAWL_INTERNAL_TOKEN_FILE", str(file))
    assert internal_token(None) == internal_token(file) == "of-the-file"
    monkeypatch.setenv("PAWL_INTERNAL_TOKEN", "of-the-variable")
    assert internal_token(None) == "of-the-variable"
    assert internal_token("given") == "given"
    assert internal_token("") == ""
    sent = metadata(settings("h:1", api_key="k", internal_token="given"))
    assert sent == (("authorization", "Bearer k"), ("pawl-internal-token", "given"))


def test_an_internal_token_that_cannot_be_had_is_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    monkeypatch.setenv("PAWL_INTERNAL_TOKEN_FILE", str(file))
    with pytest.raises(InvalidRequest, match="PAWL_INTERNAL_TOKEN_FILE cannot be read"):
        AdminClient("h:1")
    with pytest.raises(InvalidRequest, match="internal_token cannot be read"):
        internal_token(file)
    file.write_text("\n")
    with pytest.raises(InvalidRequest, match="is empty"):
        internal_token(file)
    file.write_text("two words")
    with pytest.raises(InvalidRequest, match="give the token alone") as caught:
        internal_token(file)
    assert "words" not in str(caught.value)
    with AdminClient("h:1", internal_token="secret-token") as admin:
        assert "secret-token" not in repr(admin)


def test_with_options() -> None:
    """Other defaults over the same connection, which only its owner closes."""
    with Client("localhost:1", default_model="m") as client:
        fast = client.with_options(timeout=5, retries=0, priority=10)
        assert fast._settings == Settings(
            target="localhost:1", timeout=5, retry=Retry(retries=0), priority=10, default_model="m"
        )
        assert client._settings.priority is None
        fast.close()
        client.stream("still open").__enter__().close()
        with pytest.raises(InvalidRequest, match="timeout"):
            client.with_options(timeout=-1)
    with pytest.raises(RuntimeError, match="closed"):
        fast.generate("x")
