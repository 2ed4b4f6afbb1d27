"""Checkpoints made once for all parity tests, and one thread for torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fakes.checkpoints import NAMED

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a named checkpoint, made at its first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = NAMED[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get
