"""Every model family by the compiled kernels: logits are those of transformers, graphs generate what the CPU does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.families import FAMILIES, write_checkpoint
from tests.fakes.reference_logits import assert_same_logits
from tests.fakes.worker_driver import WorkerDriver

pytestmark = pytest.mark.gpu

drawn_anew = settings(
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CHUNKS = [70, 33, 1, 1]


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(drawn_anew, max_examples=3)
def test_every_position_equals_transformers(cuda: torch.device, name: str, data: st.DataObject) -> None:
    """In float32: a prompt in chunks, and tokens by themselves."""
    draft = data.draw(FAMILIES[name])
    token_ids = Random(data.draw(st.integers(0, 1 << 30))).choices(range(draft.vocab_size), k=sum(CHUNKS))
    with tempfile.TemporaryDirectory() as made:
        assert_same_logits(write_checkpoint(Path(made), draft), Path(made), ["triton"], token_ids, CHUNKS, cuda)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(drawn_anew, max_examples=2)
def test_graphs_generate_what_the_cpu_generates(cuda: torch.device, name: str, data: st.DataObject) -> None:
    """Greedy, in float32: three sequences, one of which joins later."""
    draft = data.draw(FAMILIES[name])
    chooser = Random(data.draw(st.integers(0, 1 << 30)))
    prompts = [chooser.choices(range(draft.vocab_size), k=length) for length in (5, 40, 71)]
    found = []
    with tempfile.TemporaryDirectory() as made:
        write_checkpoint(Path(made), draft)
        for device, kernels in ((cuda.type, "triton"), ("cpu", "reference")):
            options = WorkerOptions(
                model=made, device=device, dtype="float32", kernels=kernels, max_running=4, max_batch_tokens=64,
                num_blocks=64, max_context=128,
            )  # fmt: skip
            driver = WorkerDriver(Worker.load(options))
            sequences = [driver.start(prompt) for prompt in prompts]
            driver.generate(sequences[:2], 6, chunk=30)
            driver.generate(sequences, 14, chunk=30)
            assert all(one.failure is None for one in sequences)
            found.append([one.output for one in sequences])
    assert found[0] == found[1]
