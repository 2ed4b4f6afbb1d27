"""Every model family by the GPU's kernels, run by Triton's interpreter: all logits are those of transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.fakes.families import FAMILIES, write_checkpoint
from tests.fakes.reference_logits import assert_same_logits

BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)
NAMES = [name for name in FAMILIES if not name.startswith("llama-")] + [
    "llama-default"
]  # angles are no kernel's affair
CHUNKS = [41, 8, 1]  # beyond the original context of drafts with long rope; the interpreter is slow


def check_logits(name: str, data: st.DataObject) -> None:
    draft = data.draw(FAMILIES[name])
    token_ids = Random(data.draw(st.integers(0, 1 << 30))).choices(range(draft.vocab_size), k=sum(CHUNKS))
    with tempfile.TemporaryDirectory() as made:
        assert_same_logits(write_checkpoint(Path(made), draft), Path(made), ["triton"], token_ids, CHUNKS)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=1, phases=BOUNDED)
@given(data=st.data())
def test_every_position_equals_transformers(name: str, data: st.DataObject) -> None:
    """The smallest draft of each, in float32: a prompt in chunks, and a token by itself."""
    check_logits(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, phases=BOUNDED)
@given(data=st.data())
def test_every_position_equals_transformers_at_length(name: str, data: st.DataObject) -> None:
    """The same over more configurations: heads, groups, layers, windows, types of weights."""
    check_logits(name, data)
