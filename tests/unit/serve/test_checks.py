"""What is refused before anything starts, and where the token comes from."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from pawl.errors import InvalidRequest, Unavailable
from pawl_server.addresses import is_loopback
from pawl_server.config import Config, SecuritySettings
from pawl_server.fleet.opening import make_fleet
from pawl_server.serve.checks import check_internal_listeners, check_port, exposure_warning
from pawl_server.serve.internal_token import default_token_file, given_token, token_for_fleet, token_for_frontend


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default token file is the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def test_a_port_in_use_is_refused_with_its_number_and_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(Unavailable, match=rf"port {port} on 127.0.0.1 is in use.*--port") as caught:
            check_port("127.0.0.1", port, "--port")
        assert caught.value.reason == "PORT_IN_USE"
        assert f"process {os.getpid()}" in caught.value.message
    check_port("127.0.0.1", port, "--port")
    check_port("127.0.0.1", 0, "--port")


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"203\.0\.113\.1"):
        check_port("203.0.113.1", 50051, "--port")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("fleet", ["local", "ray"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_running": 600}, "max_batch_tokens = 512 is below max_running = 600"),
        ({"speculation": "ngram", "pipeline_depth": 2}, "set pipeline_depth to 1"),
        ({"host_kv_bytes": 1, "prefix_cache": False}, "host_kv_bytes = 1 with prefix_cache = false.*must be 0: set"),
        ({"engine_ports": "9-1"}, "engine_ports = '9-1'"),
    ],
)
def test_settings_that_no_engine_can_serve_with_are_refused_before_one_is_started(
    changes: dict[str, int | str | bool], said: str, fleet: str
) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        make_fleet(Config().replace(fleet=fleet, **changes), "token")
    assert caught.value.reason == "BAD_SETTING"


@pytest.mark.parametrize("setting", ["fleet_host", "engine_host", "admin_host"])
def test_an_open_internal_listener_needs_a_chosen_token(setting: str) -> None:
    config = Config().replace(**{setting: "0.0.0.0"})
    with pytest.raises(InvalidRequest, match=f"{setting}.*--internal-token-file"):
        check_internal_listeners(config, None, admin=True)
    check_internal_listeners(config, "chosen", admin=True)
    check_internal_listeners(Config(), None, admin=True)


def test_an_admin_host_is_no_matter_of_a_process_without_that_listener() -> None:
    check_internal_listeners(Config().replace(admin_host="0.0.0.0"), None)


def test_the_exposure_warning_names_the_missing_flags() -> None:
    assert exposure_warning(Config()) == ""
    assert exposure_warning(Config().replace(host="0.0.0.0", port=7)) == (
        "open to anyone on 0.0.0.0:7: no --tls-cert, no --api-key-file"
    )
    half = exposure_warning(Config().replace(host="0.0.0.0", tls_cert="a"))
    assert "no --api-key-file" in half
    assert "tls-cert" not in half


def test_a_given_token_wins_and_no_file_is_written() -> None:
    assert token_for_fleet(SecuritySettings(internal_token="given")) == ("given", None)
    assert token_for_frontend(SecuritySettings(internal_token="given")) == "given"
    assert not default_token_file().exists()


def test_the_fleet_leaves_its_token_where_a_front_end_of_this_user_finds_it() -> None:
    token, path = token_for_fleet(SecuritySettings())
    assert path == default_token_file()
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(token) >= 32
    assert token_for_frontend(SecuritySettings()) == token
    assert token_for_fleet(SecuritySettings()) == (token, path)


def test_a_front_end_without_a_token_says_where_to_get_it() -> None:
    with pytest.raises(InvalidRequest, match="--internal-token-file") as caught:
        token_for_frontend(SecuritySettings())
    assert caught.value.reason == "TOKEN_NEEDED"


def test_a_token_file_is_read_and_an_empty_or_missing_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(InvalidRequest, match="cannot read"):
        given_token(SecuritySettings(internal_token_file=str(file)))
    file.write_text(" \n")
    with pytest.raises(InvalidRequest, match="empty"):
        given_token(SecuritySettings(internal_token_file=str(file)))
    file.write_text("abc\n")
    assert given_token(SecuritySettings(internal_token_file=str(file))) == "abc"
    assert given_token(SecuritySettings()) is None
