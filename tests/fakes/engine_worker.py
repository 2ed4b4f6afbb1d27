"""The shadow worker dressed as the worker an engine loads: with facts, a self-test and faults by prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pawl_server.config import EngineSettings, ModelSettings
from pawl_server.engine.load import LoadProgress
from pawl_server.engine.spec import EngineSpec
from pawl_workers.pending import DoneStep, PendingStep
from pawl_workers.plan import StepPlan, StepResult
from pawl_workers.row_masks import MaskSource
from tests.fakes.shadow_worker import ShadowWorker

# First prompt tokens that mean trouble; the tests' other prompts begin with less than 900.
POISON = 990  # every step that starts it raises
DELAYED_POISON = 989  # every step raises that computes it when it has as many tokens as the prompt's second id says
HANG = 991  # the step that computes it never returns
STUMBLE = 992  # the first step that computes it raises, the next ones work
VOCAB_SIZE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeFacts:
    """Facts of a model that does not exist."""

    architectures: Sequence[str] = ("ShadowForCausalLM",)
    vocab_size: int = VOCAB_SIZE
    max_context: int = 512
    eos_token_ids: Sequence[int] = (0,)
    data_type: str = "float32"
    weight_type: str = "float32"
    kv_type: str = "float32"
    revision: str = "shadow"
    block_size: int = 4
    num_blocks: int = 256
    num_host_blocks: int = 0
    restore_fixed_s: float = 0.0
    restore_block_s: float = 0.0
    weight_bytes: int = 1 << 20
    kv_bytes: int = 1 << 20
    activation_bytes: int = 1 << 10
    num_parameters: int = 1 << 18
    kernels: str = "shadow"
    device: str = "cpu"
    num_threads: int = 1
    max_in_flight: int = 1
    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FakeSelfTest:
    """A self-test that passed."""

    num_tokens: int = 8
    max_difference: float = 0.0


@dataclass(slots=True)
class FakeEngineWorker:
    """Tokens as `tests.fakes.shadow_worker` makes them; `isolated_output` is the oracle."""

    facts: FakeFacts = field(default_factory=FakeFacts)
    reset_epochs: list[int] = field(default_factory=list)
    num_executed: int = 0
    gate: threading.Event | None = None  # a step waits for it
    _shadow: ShadowWorker = field(init=False)
    _stumbled: bool = False

    def __post_init__(self) -> None:
        self._shadow = ShadowWorker(self.facts.block_size, self.facts.vocab_size)

    def launch(
        self, plan: StepPlan, masks: MaskSource | None = None, began: Callable[[], object] | None = None
    ) -> PendingStep:
        """Compute the step at once."""
        if began is not None:
            began()
        return DoneStep(self.execute(plan, masks))

    def execute(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        """Run a step, unless a prompt in it says otherwise."""
        self.num_executed += 1
        if self.gate is not None:
            assert self.gate.wait(30)
        known = {row: state.tokens for row, state in self._shadow.rows.items()}
        known |= {new.row: new.token_ids for new in plan.new}
        for row in plan.rows:
            self._fault(known[row], starts=any(new.row == row for new in plan.new))
        return self._shadow.execute(plan, masks)

    def _fault(self, tokens: Sequence[int], *, starts: bool) -> None:
        first = tokens[0]
        if first == POISON and starts:
            raise RuntimeError("planted crash")
        if first == DELAYED_POISON and len(tokens) >= tokens[1]:
            raise RuntimeError("planted crash")
        if first == HANG:
            threading.Event().wait()
        if first == STUMBLE and not self._stumbled:
            self._stumbled = True
            raise RuntimeError("planted stumble")

    def reset(self, epoch: int) -> None:
        """Forget everything."""
        self.reset_epochs.append(epoch)
        self._shadow.reset(epoch)

    def self_test(self) -> FakeSelfTest:
        """Nothing to compare."""
        return FakeSelfTest()


def load_fake_worker(spec: EngineSpec, on_progress: LoadProgress) -> FakeEngineWorker:
    """As `load_torch_worker`; model "broken" fails."""
    if spec.model.model == "broken":
        raise ValueError("planted load failure")
    on_progress("weights", 1, 2)
    num_blocks = spec.engine.num_blocks or 256
    return FakeEngineWorker(FakeFacts(num_blocks=num_blocks, max_context=spec.model.max_context or 512))


def fake_spec(
    *, model: str = "shadow", num_blocks: int = 256, step_timeout_s: float = 60.0, **values: object
) -> EngineSpec:
    """A spec of a small engine on loopback."""
    settings: dict[str, object] = {
        "model": ModelSettings(model=model),
        "engine": EngineSettings(
            num_blocks=num_blocks,
            max_running=8,
            max_batch_tokens=64,
            max_prefill_chunk=32,
            step_timeout_s=step_timeout_s,
            check_every=1,
        ),
        "internal_token": "secret",
        "heartbeat_timeout_s": 5.0,
        **values,
    }
    return EngineSpec(**settings)  # type: ignore[arg-type]
