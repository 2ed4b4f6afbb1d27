"""In every family a mismatch with transformers is traced to its component: a fault in any of them is named."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pawl_workers.model.checkpoint_config import CheckpointConfig, read_config
from pawl_workers.model.spec import ModelSpec, TensorTarget
from tests.fakes.families import FAMILIES, write_checkpoint
from tests.fakes.logit_runner import LogitRunner
from tests.fakes.reference_trace import trace_reference
from tests.fakes.stage_trace import first_difference, trace_runner

BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)

# Slots by pattern, {} being the last layer, and the stage that an error in their weights is seen in first.
FAULTS: Mapping[str, str] = {
    "embedding": "embedding",
    "layers.{}.qkv.weight": "layer {}: query-key-value projection",
    "layers.{}.attention_output.weight": "layer {}: attention output projection",
    "layers.{}.*up.weight": "layer {}: mlp",
    "layers.{}.*down.weight": "layer {}: mlp",
    "final_norm.weight": "final norm",
}


def shifted(config: CheckpointConfig, pattern: str) -> CheckpointConfig:
    """The same checkpoint, with something added to the weights of some slots when it is loaded."""

    def names(spec: ModelSpec) -> dict[str, TensorTarget]:
        return {
            name: replace(target, added=target.added + 0.25) if fnmatch(target.slot, pattern) else target
            for name, target in config.family.names(spec).items()
        }

    return replace(config, family=replace(config.family, names=names))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2, phases=BOUNDED)
@given(data=st.data())
def test_the_stage_of_a_fault_is_named(name: str, data: st.DataObject) -> None:
    """Without a fault no stage differs; with one, the first that does is its own, in the layer that it lies in."""
    draft = data.draw(FAMILIES[name])
    token_ids = Random(data.draw(st.integers(0, 1 << 30))).choices(range(draft.vocab_size), k=66)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wanted = trace_reference(write_checkpoint(folder, draft), token_ids)
        config = read_config(folder)
        assert first_difference(trace_runner(LogitRunner(folder, "cpu", max_running=1), token_ids), wanted) is None
        for pattern, stage in FAULTS.items():
            last = config.spec.num_layers - 1
            faulty = LogitRunner(folder, "cpu", max_running=1, config=shifted(config, pattern.format(last)))
            found = first_difference(trace_runner(faulty, token_ids), wanted)
            assert found is not None, pattern
            assert found.stage == stage.format(last), str(found)
