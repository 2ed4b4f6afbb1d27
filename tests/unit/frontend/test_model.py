"""The files of a checkpoint that a front end reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pawl.errors import InvalidRequest
from pawl_server.frontend.model import load_model
from tests.fakes.checkpoints import make_llama
from tests.fakes.tokenizer import write_checkpoint


def test_a_template_that_is_no_text_is_a_bad_checkpoint(tmp_path: Path) -> None:
    (make_llama(tmp_path) / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(InvalidRequest, match=r"cannot read .*chat_template\.jinja") as caught:
        load_model("m", str(tmp_path), "", 1000)
    assert caught.value.reason == "BAD_CHECKPOINT"


@pytest.mark.parametrize("context", [1 << 31, -1, True, "many", None, 1e3])
def test_a_context_that_is_none_is_not_told(tmp_path: Path, context: object) -> None:
    folder = write_checkpoint(tmp_path / "toy")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model("m", str(folder), "", 1000).max_context_tokens == 0


def test_settings_nested_without_end_are_a_bad_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "toy")
    (folder / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(InvalidRequest, match=r"cannot read .*generation_config\.json: .*recursion") as caught:
        load_model("m", str(folder), "", 1000)
    assert caught.value.reason == "BAD_CHECKPOINT"
