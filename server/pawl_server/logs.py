"""Logging of every process of the server: to stderr, as text or as one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
import time

from pawl_server.config import LogSettings

__all__ = ["JsonFormatter", "set_up_logs"]


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (Unix seconds), level, process, logger, message."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        fields: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def set_up_logs(settings: LogSettings, process: str) -> None:
    """Send this process's log to stderr. Other packages are heard from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        formatter = logging.Formatter(f"%(asctime)s {process} %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
    level = settings.log_level.upper()
    logging.basicConfig(
        level=max(logging.WARNING, logging.getLevelNamesMapping()[level]), handlers=[handler], force=True
    )
    logging.raiseExceptions = False  # a closed log pipe does not disturb the service
    for package in ("pawl", "pawl_server", "pawl_workers"):
        logging.getLogger(package).setLevel(level)
