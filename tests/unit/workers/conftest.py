"""One thread for torch in the worker's unit tests, checkpoints made once, and an interpreter that treats rows alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pawl_workers.kernels.native import library
from tests.fakes.checkpoints import make_llama

if TYPE_CHECKING:
    from triton.runtime.interpreter import TensorHandle

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("llama"), tokenizer=True)


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled kernels as they are where there are no matrix tiles: greedy rows have a screen there."""
    monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", "avx512")
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.fixture
def rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a product has the same bits wherever it lies in its tile, as on a GPU.

    The interpreter multiplies by numpy's BLAS, which on some processors takes some rows by other instructions.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    product = interpreter.InterpreterBuilder.create_dot
    handle = interpreter.TensorHandle

    def row_by_row(
        builder: object, left: TensorHandle, right: TensorHandle, sums: TensorHandle, *options: object
    ) -> TensorHandle:
        rows = [
            product(builder, handle(row[None], left.dtype), right, handle(before[None], sums.dtype), *options)
            for row, before in zip(left.data, sums.data, strict=True)
        ]
        return handle(np.concatenate([row.data for row in rows]), sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", row_by_row)
