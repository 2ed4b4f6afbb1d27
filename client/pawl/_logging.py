"""The SDK's logger, and `PAWL_LOG` (debug, info, warning or error) that shows it on stderr.

Logs targets, attempts and error reasons; never prompt text or a key.
"""

from __future__ import annotations

import logging
import os

__all__ = ["logger", "set_up_logging"]

logger = logging.getLogger("pawl")


def set_up_logging() -> None:
    """Attach a stderr handler at the level that `PAWL_LOG` names; without it the library stays silent."""
    logger.addHandler(logging.NullHandler())
    name = os.environ.get("PAWL_LOG", "").upper()
    if not name:
        return
    level = logging.getLevelNamesMapping().get(name)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level if level is not None else logging.INFO)
    if level is None:
        logger.warning("PAWL_LOG=%s is no level; using info. Levels: debug, info, warning, error", name)
