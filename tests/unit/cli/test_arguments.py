"""The command line: every setting is a flag, wrong ones get a suggestion, defaults of commands yield to all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl.errors import InvalidRequest
from pawl_server.cli import main
from pawl_server.cli.arguments import build_parser, config_from
from pawl_server.config import Config, settings


def parse(*words: str, environment: dict[str, str] | None = None, **defaults: int) -> Config:
    parsed = build_parser(all_help=False).parse_args(list(words))
    return config_from(parsed, environment or {}, defaults)


def test_without_flags_the_config_is_the_default() -> None:
    assert parse("serve") == Config()


@pytest.mark.parametrize("command", ["serve", "fleet", "frontend", "doctor", "plan", "config"])
def test_every_setting_is_a_flag_but_for_secrets(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help-all"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for setting in settings():
        assert (f"{setting.flag} " in shown or f"{setting.flag}," in shown) != setting.secret


def test_help_shows_the_common_settings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "--max-running " in shown
    assert "--watermark " not in shown
    assert shown.count("\n  --") <= 45


def test_a_flag_of_each_kind_is_converted() -> None:
    config = parse("serve", "--port=0", "--drain-grace-s", "1.5", "--no-prefix-cache", "--host", "localhost")
    assert (config.frontend.port, config.frontend.drain_grace_s) == (0, 1.5)
    assert (config.engine.prefix_cache, config.frontend.host) == (False, "localhost")


def test_the_model_may_stand_alone() -> None:
    assert parse("serve", "some/model").model.model == "some/model"
    assert parse("serve", "--model", "some/model").model.model == "some/model"


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pawl.toml"
    file.write_text("[engine]\nmax_running = 1\nmax_waiting = 1\nmax_bypass = 1\n")
    environment = {"PAWL_MAX_RUNNING": "2", "PAWL_MAX_WAITING": "2"}
    engine = parse("serve", f"--config={file}", "--max-running=3", environment=environment).engine
    assert (engine.max_running, engine.max_waiting, engine.max_bypass) == (3, 2, 1)


def test_a_commands_own_default_yields_to_whatever_was_given(tmp_path: Path) -> None:
    file = tmp_path / "pawl.toml"
    file.write_text("[fleet]\nfleet_port = 0\n")
    assert parse("fleet", fleet_port=50060).fleet.fleet_port == 50060
    assert parse("fleet", "--fleet-port=0", fleet_port=50060).fleet.fleet_port == 0
    assert parse("fleet", environment={"PAWL_FLEET_PORT": "7"}, fleet_port=50060).fleet.fleet_port == 7
    assert parse("fleet", f"--config={file}", fleet_port=50060).fleet.fleet_port == 0


def test_a_misspelt_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--max-runing", "3"])
    assert ended.value.code == 2
    assert "did you mean --max-running?" in capsys.readouterr().err


def test_flags_cannot_be_shortened() -> None:
    with pytest.raises(SystemExit):
        parse("serve", "--max-run=3")


def test_a_value_out_of_range_is_one_block_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port=99999"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "ERROR pawl serve: port = '99999' (flag --port)" in shown.err
    assert "[BAD_SETTING]" in shown.err


def test_config_from_names_the_origin_of_a_bad_variable() -> None:
    with pytest.raises(InvalidRequest, match="variable PAWL_PORT"):
        parse("serve", environment={"PAWL_PORT": "many"})


def test_config_prints_settings_and_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAWL_INTERNAL_TOKEN", "hush-hush")
    assert main(["config", "--max-running=9"]) == 0
    shown = capsys.readouterr().out
    assert "max_running = 9" in shown
    assert "hush-hush" not in shown


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "serve" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "fleet"])
def test_a_missing_package_is_one_sentence_with_the_remedy(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray.util")

    monkeypatch.setattr("pawl_server.cli.server_commands._run", missing)
    assert main([command]) == 2
    shown = capsys.readouterr().err
    assert "'ray'" in shown
    assert "pip install 'pawl-serve[all]'" in shown
