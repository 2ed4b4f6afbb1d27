"""What a client knows that others must not: where it comes from, and what it may be made of. It is never shown."""

from __future__ import annotations

import os
from pathlib import Path

from pawl.errors import FieldViolation, InvalidRequest

__all__ = ["internal_token", "secret"]

_TOKEN = "internal_token"  # noqa: S105 (name of the setting, not a secret)


def secret(name: str, given: str) -> str:
    """A secret without the line end of the file that it was read from.

    Raises:
        InvalidRequest: metadata cannot carry it.
    """
    stripped = given.strip()
    if not all(" " < character <= "~" for character in stripped):
        word = name.rpartition("_")[2]
        raise _bad(name, f"has a space or a character beyond ASCII inside; give the {word} alone")
    return stripped


def internal_token(given: str | Path | None) -> str:
    """The internal token of a server: what is given, else what the environment gives; empty if nothing is.

    Args:
        given: the token, or the path of the file that holds it. None = variable `PAWL_INTERNAL_TOKEN`, else the file
            that `PAWL_INTERNAL_TOKEN_FILE` names.

    Raises:
        InvalidRequest: the file cannot be read or is empty, or metadata cannot carry what it holds.
    """
    name = _TOKEN
    if given is None:
        given = os.environ.get("PAWL_INTERNAL_TOKEN", "")
        if not given and (file := os.environ.get("PAWL_INTERNAL_TOKEN_FILE")):
            given, name = Path(file), "PAWL_INTERNAL_TOKEN_FILE"
    if isinstance(given, str):
        return secret(_TOKEN, given)
    try:
        text = given.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(name, f"cannot be read: {error}") from error
    if not (token := secret(_TOKEN, text)):
        raise _bad(name, f"{given} is empty; give the file of the server's --internal-token-file")
    return token


def _bad(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {what}", violations=[FieldViolation(name, what)])
