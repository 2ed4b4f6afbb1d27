"""One thread for torch in the worker's unit tests, and checkpoints made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fakes.checkpoints import make_llama

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("llama"), tokenizer=True)
