"""The parser: one flag per setting of `config.settings()`, and one subparser per command.

Values stay strings here; `config.load_config` checks and converts them, whatever their origin.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pawl_server.config import Config, Setting, load_config, settings

__all__ = ["Parser", "add_settings", "build_parser", "config_from", "wants_all_help"]

Value = str | int | float | bool | None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests the flag that was meant."""

    def __init__(self, **options: object) -> None:
        # A prefix that is unique today is another flag's tomorrow.
        super().__init__(**(options | {"allow_abbrev": False}))  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print usage, the message and a suggestion; exit with 2."""
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split(maxsplit=1)[0].partition("=")[0]
            close = difflib.get_close_matches(unknown, _every_flag(self), n=1)
            message += f" (did you mean {close[0]}?)" if close else ""
        super().error(message)


def _every_flag(parser: argparse.ArgumentParser) -> list[str]:
    flags = list(parser._option_string_actions)  # noqa: SLF001 (argparse has no other way to list them)
    for action in parser._actions:  # noqa: SLF001 (as above)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 (as above)
            flags += [flag for child in action.choices.values() for flag in _every_flag(child)]
    return flags


def wants_all_help(arguments: Sequence[str]) -> bool:
    """Whether --help-all was asked for."""
    return "--help-all" in arguments


def build_parser(*, all_help: bool) -> Parser:
    """The whole command line.

    Args:
        all_help: show every setting in --help, not just the common ones.
    """
    parser = Parser(prog="pawl", description="Distributed LLM inference over gRPC.")
    parser.add_argument("--version", action="version", version=f"pawl {_version()}")
    parser.add_argument("--help-all", action="store_true", help="as --help, with every setting")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name in ("server_commands", "client_commands"):
        _register(name, commands, all_help=all_help)
    return parser


def _register(name: str, commands: argparse._SubParsersAction[Parser], *, all_help: bool) -> None:
    """Let a module of this package add its commands."""
    full_name = f"pawl_server.cli.{name}"
    try:
        module = importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        return  # a build without these commands
    if name == "server_commands":
        module.register(commands, all_help=all_help)
    else:
        module.register(commands)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 (slow, for one flag)

    try:
        return version("pawl-serve")
    except PackageNotFoundError:
        return "unknown"


def add_settings(parser: argparse.ArgumentParser, shown_sections: Sequence[str], *, all_help: bool) -> None:
    """Add a flag for every setting; --help shows the common ones of `shown_sections`."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings; flags and PAWL_* variables win")
    parser.add_argument("--help-all", action="help", help="as --help, with every setting")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in settings():
        if setting.secret:
            continue
        shown = all_help or (setting.common and setting.section in shown_sections)
        if shown and setting.section not in groups:
            groups[setting.section] = parser.add_argument_group(setting.section)
        target = groups[setting.section] if shown else parser
        _add_setting(target, setting, shown=shown)


def _add_setting(target: argparse.ArgumentParser | argparse._ArgumentGroup, setting: Setting, *, shown: bool) -> None:
    text = f"{setting.help} (default: {_shown_default(setting)})".replace("%", "%%")
    help_text = text if shown else argparse.SUPPRESS
    if setting.kind is bool:
        action = argparse.BooleanOptionalAction
        target.add_argument(setting.flag, dest=setting.name, action=action, default=None, help=help_text)
        return
    target.add_argument(setting.flag, dest=setting.name, default=None, metavar=_metavar(setting), help=help_text)


def _shown_default(setting: Setting) -> str:
    return "none" if setting.default == "" else str(setting.default)


def _metavar(setting: Setting) -> str:
    if setting.kind is int:
        return "N"
    return "X" if setting.kind is float else "TEXT"


def config_from(
    parsed: argparse.Namespace,
    environment: Mapping[str, str],
    command_defaults: Mapping[str, Value] | None = None,
) -> Config:
    """The Config of a parsed command line.

    Args:
        parsed: of a parser that `add_settings` filled.
        environment: the variables.
        command_defaults: values of settings that nobody gave, where the command has other defaults.

    Raises:
        InvalidRequest: a setting is unknown or out of range.
    """
    flags: dict[str, Value] = {
        setting.name: getattr(parsed, setting.name, None) for setting in settings() if not setting.secret
    }
    if getattr(parsed, "checkpoint", None):
        flags["model"] = parsed.checkpoint
    file = Path(parsed.config) if parsed.config else None
    config = load_config(flags, file=file, environment=environment)
    given = {name for name, value in flags.items() if value is not None}
    given |= {setting.name for setting in settings() if setting.variable in environment}
    if file is not None:
        given |= {name for section in tomllib.loads(file.read_text("utf-8")).values() for name in section}
    return config.replace(**{n: v for n, v in (command_defaults or {}).items() if n not in given})
