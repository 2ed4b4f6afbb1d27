"""What a test that starts Ray in its own process is marked with."""

from __future__ import annotations

import pytest

__all__ = ["RAY"]

RAY = [
    pytest.mark.ray,
    *(
        pytest.mark.filterwarnings(f"ignore::{name}")
        for name in ("FutureWarning", "DeprecationWarning", "ResourceWarning")
    ),
]
