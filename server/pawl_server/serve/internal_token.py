"""Where the shared token of the internal listeners comes from, and where it is left for the other parts.

Never on a command line and never in a log.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from pawl.errors import InvalidRequest
from pawl_server.config import SecuritySettings
from pawl_server.engine.link.auth import new_token

__all__ = ["default_token_file", "given_token", "token_for_fleet", "token_for_frontend"]

log = logging.getLogger(__name__)


def default_token_file() -> Path:
    """File that `pawl fleet` and `pawl frontend` of one user on one machine share."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path.home() / ".cache"
    return folder / "pawl" / "internal-token"


def given_token(security: SecuritySettings) -> str | None:
    """The token that the settings give; None if they give none.

    Raises:
        InvalidRequest: the file cannot be read or is empty.
    """
    if security.internal_token:
        return security.internal_token
    if not security.internal_token_file:
        return None
    return _read(Path(security.internal_token_file))


def token_for_fleet(security: SecuritySettings) -> tuple[str, Path | None]:
    """The token of `pawl fleet` and the default file that holds it (None if the settings gave the token).

    Without a given one, that of the default file is used; if there is no such file, a token is drawn into it.

    Raises:
        InvalidRequest: a file cannot be read or written.
    """
    given = given_token(security)
    if given is not None:
        return given, None
    path = default_token_file()
    if path.exists():
        return _read(path), path
    token = new_token()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
    except OSError as error:
        raise InvalidRequest(
            f"cannot write the token to {path} ({error.strerror}): give one with --internal-token-file",
            reason="BAD_SETTING",
        ) from error
    return token, path


def token_for_frontend(security: SecuritySettings) -> str:
    """The token of `pawl frontend`: the given one, else that of the default file.

    Raises:
        InvalidRequest: there is neither.
    """
    given = given_token(security)
    if given is not None:
        return given
    path = default_token_file()
    if not path.exists():
        raise InvalidRequest(
            f"no token for the fleet: give the one of `pawl fleet` with --internal-token-file ({path} does not"
            " exist; `pawl fleet` writes it when it runs on this machine as this user)",
            reason="TOKEN_NEEDED",
        )
    return _read(path)


def _read(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            log.warning("%s can be read by other users: chmod 600 it", path)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read the token file {path}: {error}", reason="BAD_SETTING") from error
    if not token:
        raise InvalidRequest(f"the token file {path} is empty", reason="BAD_SETTING")
    return token
