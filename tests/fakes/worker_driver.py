"""Drives a `Worker` by hand: a sequence is generated alone or beside others, with any chunks and blocks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pawl_workers.plan import NewSequence, PromptLogprobs, SamplingSpec, StepPlan, StepResult, TokenLogprobs
from pawl_workers.row_masks import MaskSource
from pawl_workers.worker import Worker

__all__ = ["Generation", "WorkerDriver"]


@dataclass(slots=True)
class Generation:
    """A sequence in the worker and what it has given."""

    row: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int
    sampling: SamplingSpec
    prompt_logprobs: int = -1
    samples: bool = True
    masked: bool = False  # for those who make masks
    blocks: list[int] = field(default_factory=list)
    sent: bool = False
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt: list[PromptLogprobs] = field(default_factory=list)
    failure: str | None = None

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[self.num_prompt :]


class WorkerDriver:
    """Hands out rows and blocks in random order and sends plans, as a scheduler would."""

    def __init__(self, worker: Worker, seed: int = 0) -> None:
        self.worker = worker
        self._step = self._epoch = 0
        self._free = list(range(1, worker.facts.num_blocks + 1))
        self._rows = list(range(worker.facts.max_running))
        self._freed: list[int] = []
        self._holders: Counter[int] = Counter()  # of each block
        chooser = random.Random(seed)
        chooser.shuffle(self._free)
        chooser.shuffle(self._rows)

    def reset(self) -> None:
        """Begin a new epoch."""
        self._epoch += 1
        self._step = 0
        self.worker.reset(self._epoch)

    def start(
        self,
        prompt: Sequence[int],
        sampling: SamplingSpec | None = None,
        *,
        output: Sequence[int] = (),
        prompt_logprobs: int = -1,
        samples: bool = True,
        cached: Sequence[int] = (),
    ) -> Generation:
        """Make a sequence; it is sent with its first step.

        Args:
            prompt: its tokens.
            sampling: greedy by default.
            output: tokens generated earlier.
            prompt_logprobs: -1 for none, or how many alternatives.
            samples: whether it generates.
            cached: blocks of another sequence, full, that hold its first tokens; they are shared.
        """
        self._holders.update(cached)
        return Generation(
            row=self._rows.pop(),
            token_ids=[*prompt, *output],
            num_prompt=len(prompt),
            num_computed=len(cached) * self.worker.facts.block_size,
            sampling=sampling or SamplingSpec(temperature=0.0),
            prompt_logprobs=prompt_logprobs,
            samples=samples,
            blocks=list(cached),
        )

    def finish(self, generation: Generation) -> None:
        """Free a sequence; the worker hears of it with the next step."""
        if generation.sent:
            self._freed.append(generation.row)
        self._rows.insert(0, generation.row)
        self._holders.subtract(generation.blocks)
        self._free += [block for block in generation.blocks if not self._holders[block]]

    def preempt(self, generation: Generation, *, keep: int = 0) -> None:
        """Free a sequence; with its next step it is sent again, computed anew but for `keep` full blocks."""
        kept = generation.blocks[:keep]
        self._holders.update(kept)
        self.finish(generation)
        generation.row, generation.blocks, generation.sent = self._rows.pop(), kept, False
        generation.num_computed = keep * self.worker.facts.block_size

    def step(
        self,
        grants: Sequence[tuple[Generation, int]],
        drafts: Mapping[int, Sequence[int]] | None = None,
        masks: MaskSource | None = None,
    ) -> StepResult:
        """Run one step in which each sequence computes so many tokens, the last of them drafts if its row has some."""
        new, appended = [], []
        for generation, grant in grants:
            size = self.worker.facts.block_size
            missing = -(-(generation.num_computed + grant) // size) - len(generation.blocks)
            blocks = [self._free.pop() for _ in range(missing)]
            self._holders.update(blocks)
            generation.blocks += blocks
            if not generation.sent:
                new.append(self._new_sequence(generation))
            elif blocks:
                appended.append((generation.row, blocks))
        self._step += 1
        rows, counts = [one.row for one, _ in grants], [count for _, count in grants]
        drafted = [(row, list(ids)) for row, ids in (drafts or {}).items()]
        plan = StepPlan(self._step, self._epoch, self._freed, new, appended, rows, counts, drafts=drafted)
        self._freed = []
        result = self.worker.execute(plan, masks)
        by_row = {one.row: one for one, _ in grants}
        drafted_rows = {row for row, _ in drafted}
        for generation, grant in grants:
            generation.num_computed += 0 if generation.row in drafted_rows else grant
        logprobs = result.logprobs or [None] * len(result.rows)
        for row, token_id, entry in zip(result.rows, result.token_ids, logprobs, strict=True):
            by_row[row].token_ids.append(token_id)
            by_row[row].logprobs.append(entry)
        for row in drafted_rows.intersection(result.rows):
            by_row[row].num_computed = len(by_row[row].token_ids) - 1  # what was rejected counts as not computed
        for scored in result.prompt_logprobs:
            by_row[scored.row].prompt.append(scored)
        for failure in result.failures:
            by_row[failure.row].failure = failure.message
        return result

    @staticmethod
    def _new_sequence(generation: Generation) -> NewSequence:
        generation.sent = True
        return NewSequence(
            row=generation.row,
            token_ids=list(generation.token_ids),
            num_prompt_tokens=generation.num_prompt,
            num_computed=generation.num_computed,
            block_ids=list(generation.blocks),
            sampling=generation.sampling,
            prompt_logprobs=generation.prompt_logprobs,
            samples=generation.samples,
        )

    def generate(self, generations: Sequence[Generation], num_tokens: int, chunk: int = 1 << 30) -> None:
        """Run steps until every sequence has so many output tokens or has failed; prompts in chunks."""
        while True:
            grants = [
                (one, min(chunk, len(one.token_ids) - one.num_computed))
                for one in generations
                if len(one.output) < num_tokens and one.failure is None
            ]
            if not grants:
                return
            self.step(grants)
