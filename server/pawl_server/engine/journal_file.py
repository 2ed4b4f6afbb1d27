"""The file that a scheduler's journal goes into, for `python -m pawl_server.sim replay`."""

from __future__ import annotations

import logging
from pathlib import Path

from pawl_server.scheduler.journal import Journal

__all__ = ["JournalFile"]

log = logging.getLogger(__name__)


class JournalFile:
    """Appends what a journal holds. A disk that is full or gone ends the recording and nothing else.

    Args:
        path: of a new file; one that is there is overwritten.
        journal: that of the scheduler.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path = path
        self._journal = journal
        self._file = path.open("wb")
        self._told = False

    def write(self) -> None:
        """Append what happened since the last time."""
        data = self._journal.drain()
        if self._file.closed:
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            log.error("the journal %s ends here: %s", self.path, error.strerror)  # noqa: TRY400 (its stack says nothing)
            self._file.close()
        if self._journal.full and not self._told:
            self._told = True
            log.warning("the journal %s is full: what comes after is not in it", self.path)

    def close(self) -> None:
        """Write the rest."""
        self.write()
        self._file.close()
