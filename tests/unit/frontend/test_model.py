"""The files of a checkpoint that a front end reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl.errors import InvalidRequest
from pawl_server.frontend.model import load_model
from tests.fakes.checkpoints import make_llama


def test_a_template_that_is_no_text_is_a_bad_checkpoint(tmp_path: Path) -> None:
    (make_llama(tmp_path) / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(InvalidRequest, match=r"cannot read .*chat_template\.jinja") as caught:
        load_model("m", str(tmp_path), "", 1000)
    assert caught.value.reason == "BAD_CHECKPOINT"
