"""The scheduler, the mask builder and a shadow worker that obeys masks, driven step by step.

Constraints without a model.

The vocabulary is the embedded model's. The shadow worker's token is a function of everything before it and of what is
allowed, so a mask that is wrong at one place shows as another output than that of the sequence alone.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from pawl_server.engine.grammar.compiler import checkpoint_tokenizer
from pawl_server.engine.grammar.constraint import CompiledConstraint, Constraint
from pawl_server.engine.grammar.masks import MaskBuilder
from pawl_server.engine.grammar.proposer import GrammarProposer
from pawl_server.engine.grammar.source import new_matcher
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepLoad
from pawl_server.scheduler.committer import Committed, commit, launch, void
from pawl_server.scheduler.endings import Ended
from pawl_server.scheduler.guess import Proposer
from pawl_server.scheduler.invariants import check_invariants
from pawl_server.scheduler.ngram import NgramIndex
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState
from pawl_server.scheduler.speculation import Speculation
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.model.source import resolve_checkpoint
from pawl_workers.plan import SamplingSpec, StepResult
from pawl_workers.row_masks import MaskSource
from tests.fakes.shadow_worker import ShadowWorker

__all__ = ["EOS_ID", "MaskedBench", "constrained", "decode", "masked_bench", "replay", "vocabulary"]

EOS_ID = 2
VOCAB_SIZE = 920
_TOKENIZER = Tokenizer.from_file(str(resolve_checkpoint(None) / "tokenizer.json"))
_VOCABULARY = checkpoint_tokenizer("demo", "", VOCAB_SIZE, [EOS_ID])


def vocabulary() -> LLTokenizer:
    """The embedded model's."""
    return _VOCABULARY


def decode(token_ids: Sequence[int]) -> str:
    """The text of an output."""
    text: str = _TOKENIZER.decode(list(token_ids), skip_special_tokens=True)
    return text


def replay(constraint: Constraint, token_ids: Sequence[int]) -> LLMatcher:
    """A matcher of its own that has taken an output, token by token, each inside the mask before it."""
    matcher = new_matcher(_VOCABULARY, constraint)
    for token_id in token_ids:
        mask = matcher.compute_bitmask()
        assert mask[token_id // 8] >> (token_id % 8) & 1, f"token {token_id} is not in its mask"
        assert matcher.consume_token(token_id)
    return matcher


def constrained(
    handle: int, prompt: Sequence[int], constraint: Constraint | None, max_output: int, resume: Sequence[int] = ()
) -> SequenceRequest:
    """A request; without a constraint one that anything may follow."""
    compiled = None if constraint is None else CompiledConstraint(constraint, new_matcher(_VOCABULARY, constraint))
    return SequenceRequest(
        handle=handle,
        request_id=f"r{handle}",
        prompt_ids=prompt,
        resume_ids=resume,
        sampling=SamplingSpec(seed=0),
        max_output_tokens=max_output,
        cache_key=b"",
        eos_token_ids=frozenset({EOS_ID}),
        constraint=compiled,
    )


class MaskedBench:
    """A replica without a model. A step is computed when its turn to be settled comes, as the worker's thread does."""

    def __init__(self, limits: SchedulerLimits, depth: int) -> None:
        self.limits, self.depth = limits, depth
        self.state = SchedulerState(limits, CacheRoot("model", "float32", limits.block_size))
        self.worker = ShadowWorker(limits.block_size, VOCAB_SIZE)
        self.masks = MaskBuilder(VOCAB_SIZE, [EOS_ID], num_threads=1)
        if limits.max_drafts:
            self.state.speculation = drafter = Speculation(limits.max_drafts, self._make_proposer)
            for num_tokens in range(1, 9):  # as if tokens cost nothing, so that all that is found is computed
                drafter.observe(StepLoad(num_tokens, num_tokens, num_tokens), 1.0)
        self.num_drafts = self.num_accepted = 0
        self.in_flight: deque[tuple[Plan, MaskSource | None]] = deque()
        self.output: dict[int, list[int]] = {}
        self.ended: dict[int, Ended] = {}
        self.now = 0.0

    def _make_proposer(self, sequence: SequenceState) -> Proposer:
        guesses = NgramIndex(shortest=1)
        return GrammarProposer(self.masks, sequence, guesses) if sequence.constrained else guesses

    def submit(self, request: SequenceRequest) -> None:
        assert isinstance(request.handle, int)
        assert self.state.submit(request, self.now) is None
        self.output[request.handle] = list(request.resume_ids)

    def abort(self, handle: int) -> None:
        ended = self.state.abort(handle, "test", self.now)
        if ended is not None:
            self.ended[handle] = ended

    def step(self) -> bool:
        """One tick of the loop; False when there was nothing to do."""
        self.now += 1.0
        plan = plan_step(self.state, self.limits, self.now) if len(self.in_flight) < self.depth else None
        if plan is not None:
            launch(self.state, plan)
            drafts = {} if plan.proposals is None else plan.proposals.drafts
            self.in_flight.append((plan, self.masks.launched(self.state, drafts)))
        if self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            self.settle()
            return True
        return plan is not None

    def settle(self) -> Committed:
        plan, source = self.in_flight.popleft()
        result: StepResult = self.masks.explain(self.worker.execute(plan.wire(), source))
        committed = commit(self.state, plan, result, self.now)
        if self.state.speculation is not None:
            self.state.speculation.observe(plan.load, 1.0)
        self.num_drafts += plan.num_drafts
        self.num_accepted += committed.num_accepted
        self.masks.committed(self.state)
        check_invariants(self.state)
        for handle, index, token_id in zip(committed.handles, committed.indices, committed.token_ids, strict=True):
            assert isinstance(handle, int)
            assert index == len(self.output[handle]), "a gap or a repeat"
            self.output[handle].append(token_id)
        for ended in committed.ended:
            assert isinstance(ended.handle, int)
            self.ended[ended.handle] = ended
        return committed

    def lose_worker(self) -> None:
        """Every step in flight fails, and the worker's KV is gone."""
        sources = [source for _, source in self.in_flight if source is not None]
        self.masks.void()
        for source in sources:  # whoever waits for masks is let go
            with contextlib.suppress(Exception, CancelledError):
                source()
        while self.in_flight:
            void(self.state, self.in_flight.pop()[0])
        epoch = self.state.epoch + 1
        self.state.reset_worker(epoch, self.now)
        self.worker.reset(epoch)

    def run(self, max_steps: int = 4000) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError("no end in sight: livelock")

    def outputs(self) -> Mapping[int, list[int]]:
        """Of each sequence, without the end of text."""
        return {handle: [i for i in ids if i != EOS_ID] for handle, ids in self.output.items()}


@contextlib.contextmanager
def masked_bench(
    depth: int, *, num_blocks: int = 200, max_running: int = 8, max_drafts: int = 0
) -> Iterator[MaskedBench]:
    """A bench whose thread ends with it."""
    limits = SchedulerLimits(
        num_blocks=num_blocks,
        block_size=4,
        max_running=max_running,
        max_batch_tokens=32,
        max_prefill_chunk=8,
        max_context=96,
        prefix_cache=True,
        watermark=0.0,
        max_drafts=max_drafts,
    )
    bench = MaskedBench(limits, depth)
    try:
        yield bench
    finally:
        bench.masks.close()
