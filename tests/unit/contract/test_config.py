"""Settings: one name everywhere, precedence, ranges, and suggestions for what is unknown."""

from pathlib import Path

import pytest

from pawl.errors import InvalidRequest
from pawl_server.config import Config, load_config, settings


def test_defaults() -> None:
    assert load_config(environment={}) == Config()


def test_precedence_is_flag_variable_file_default(tmp_path: Path) -> None:
    file = tmp_path / "pawl.toml"
    file.write_text("[engine]\nmax_running = 1\nmax_batch_tokens = 11\nmax_waiting = 111\n")
    environment = {"PAWL_MAX_RUNNING": "2", "PAWL_MAX_BATCH_TOKENS": "22"}
    config = load_config({"max_running": 3, "port": None}, file=file, environment=environment)
    engine = config.engine
    assert (engine.max_running, engine.max_batch_tokens, engine.max_waiting) == (3, 22, 111)
    assert config.frontend.port == Config().frontend.port


@pytest.mark.parametrize("name", [setting.name for setting in settings()])
def test_every_setting_can_be_given_by_file_and_variable(name: str, tmp_path: Path) -> None:
    setting = next(s for s in settings() if s.name == name)
    shown = {bool: "false", int: "7", float: "0.5", str: '"x"'}[setting.kind]
    others = {
        "pipeline_depth": "2",
        "max_grammar_bytes": "65536",
        "device": '"cpu"',
        "dtype": '"float32"',
        "kernels": '"reference"',
        "kv_dtype": '"float16"',
        "weight_dtype": '"int8"',
        "speculation": '"ngram"',
        "log_level": '"debug"',
        "log_format": '"json"',
    }
    shown = others.get(name, shown)
    file = tmp_path / "pawl.toml"
    file.write_text(f"[{setting.section}]\n{name} = {shown}\n")
    by_file = load_config(file=file, environment={})
    by_variable = load_config(environment={setting.variable: shown.strip('"')})
    assert by_file == by_variable
    assert getattr(getattr(by_file, setting.section), name) != setting.default or setting.default in (0, 0.5)


def test_names_are_unique_over_all_sections() -> None:
    names = [setting.name for setting in settings()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"max_runing": 3}, "max_running"),
        ({"max_running": 0}, "between 1 and"),
        ({"max_running": "many"}, "not a int"),
        ({"max_running": True}, "not a int"),
        ({"prefix_cache": "perhaps"}, "not a bool"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"port": 70000}, "65535"),
        ({"watermark": 0.9}, "0.5"),
        ({"step_timeout_s": 0}, "between 0.01 and"),
        ({"heartbeat_timeout_s": "0"}, "between 0.01 and"),
        ({"slow_reader_timeout_s": "inf"}, "and 31536000"),
        ({"stream_interval": 0}, "stream_interval = 0 (flag --stream-interval): must be between 1 and 1024"),
        ({"stream_interval": 1025}, "must be between 1 and 1024"),
        ({"drain_grace_s": "inf"}, "and 31536000"),
        ({"drain_grace_s": "nan"}, "and 31536000"),
        ({"keepalive_time_s": 3e6}, "and 2147483"),
        ({"max_request_bytes": 1 << 31}, "2147483647"),
        ({"prefix_affinity": "inf"}, "between 0 and"),
        ({"max_queued_requests": 0}, "between 1 and"),
    ],
)
def test_bad_values_say_what_and_where(flags: dict[str, str | int | float | bool | None], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_config(flags, environment={})
    assert said in str(caught.value)
    assert "flag --" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[engin]\nmax_running = 1\n", "[engine]"),
        ("[engine]\nport = 1\n", "[frontend]"),
        ("[engine]\nmax_run = 1\n", "max_running"),
        ("[engine\n", "not TOML"),
    ],
)
def test_bad_files_are_refused_with_a_suggestion(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "pawl.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        load_config(file=file, environment={})
    assert said in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pawl.toml"
    file.write_bytes(b'[model]\nmodel = "\xff"\n')
    with pytest.raises(InvalidRequest, match=r"pawl\.toml is not TOML"):
        load_config(file=file, environment={})


def test_secrets_are_not_shown() -> None:
    config = load_config({"internal_token": "hush"}, environment={})
    assert "hush" not in str(config.shown())
    with pytest.raises(InvalidRequest) as caught:
        load_config({"internal_token": True}, environment={})
    assert "True" not in str(caught.value)
