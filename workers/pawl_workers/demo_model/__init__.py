"""The embedded demo model: a small Llama checkpoint and everything that made it.

The checkpoint itself (configuration, weights, tokenizer) lies in this folder beside the code,
so ``DEMO_MODEL_DIR`` is a path that any Hugging Face loader accepts.
"""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL_DIR = Path(__file__).resolve().parent
"""The folder of the committed checkpoint."""

__all__ = ["DEMO_MODEL_DIR"]
