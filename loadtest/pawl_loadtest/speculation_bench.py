"""`python -m pawl_loadtest.speculation_bench`: output tokens/s with drafts and without, where they pay and where not.

The model has the sizes of a published one, and weights that make it follow a chain of tokens: the one after the last,
or with some probability another one, as the request's sampling has it. So how repetitive the text is can be set:

    copy        the text of the prompt again and again, word for word
    edit        the same with one token in twelve or so changed, after which it goes on elsewhere
    misleading  what follows a token is one of sixteen, so that n-grams come again and go on otherwise
    fresh       no n-gram comes twice
    json        a list of objects by a JSON schema, whose strings are at random

Scheduler and worker run in this process, with the settings of a server that has just started: what is learnt of drafts
is learnt in each round anew. Two workers serve the same requests, one with drafts and one without, and take turns step
by step, so that both meet the same neighbours; the one that has given fewer tokens is next. Outputs are compared,
log-probabilities included. A line gives the medians of the rounds, and the ratios from the least to the greatest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pawl_loadtest.arguments import positive
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.speculation_tasks import CYCLE, EOS_ID, TASKS, Task, write_chain
from pawl_server.engine.grammar.compiler import GrammarCompiler, checkpoint_tokenizer
from pawl_server.engine.grammar.constraint import Constraint
from pawl_server.engine.grammar.masks import MaskBuilder
from pawl_server.engine.grammar.proposer import GrammarProposer
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.guess import Proposer
from pawl_server.scheduler.ngram import NgramIndex
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState
from pawl_server.scheduler.speculation import Speculation
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec, TokenLogprobs
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["Outcome", "Run", "Runner", "Service", "main"]


@dataclass(slots=True)
class Run:
    """What one run gave: tokens and log-probabilities of each request, and the steps in which all decoded."""

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs | None]]
    num_decoded: int = 0
    decode_s: float = 0.0
    num_drafts: int = 0
    num_accepted: int = 0

    @property
    def rate(self) -> float:
        """Output tokens per second of decoding."""
        return self.num_decoded / self.decode_s


class Service:
    """Requests that go through a scheduler of their own and a worker, step by step.

    Args:
        worker: of which nothing else is asked meanwhile.
        epoch: that it has not had.
        requests: with their numbers as handles.
        max_drafts: of a request in a step; 0 = none.
        clock: seconds, by which is learnt whether drafts pay.

    Raises:
        RuntimeError: a request is refused.
    """

    def __init__(
        self,
        worker: Worker,
        epoch: int,
        requests: Sequence[SequenceRequest],
        max_drafts: int,
        clock: Callable[[], float],
    ) -> None:
        facts = worker.facts
        self._worker, self._num_requests, self._clock = worker, len(requests), clock
        self._limits = SchedulerLimits(
            num_blocks=facts.num_blocks, block_size=facts.block_size, max_running=facts.max_running,
            max_batch_tokens=facts.max_batch_tokens, max_context=facts.max_context, prefix_cache=False,
            max_drafts=max_drafts,
        )  # fmt: skip
        self._state = SchedulerState(self._limits, CacheRoot("bench", "float32", facts.block_size), epoch=epoch)
        self._masks = MaskBuilder(facts.vocab_size, [EOS_ID], 1)
        if max_drafts:
            self._state.speculation = Speculation(max_drafts, self._make_proposer)
        worker.reset(epoch)
        self.run = Run([[] for _ in requests], [[] for _ in requests])
        for request in requests:
            refusal = self._state.submit(request, 0.0)
            if refusal is not None:
                raise RuntimeError(refusal.message)

    def _make_proposer(self, sequence: SequenceState) -> Proposer:
        guesses = NgramIndex()
        return GrammarProposer(self._masks, sequence, guesses) if sequence.constrained else guesses

    def step(self) -> bool:
        """Make a step; False when there is none to make."""
        run, state, began = self.run, self._state, self._clock()
        plan = plan_step(state, self._limits, 0.0)
        if plan is None:
            self._masks.close()
            return False
        launch(state, plan)
        masks = self._masks.launched(state, {} if plan.proposals is None else plan.proposals.drafts)
        committed = commit(state, plan, self._worker.execute(plan.wire(), masks), 0.0)
        self._masks.committed(state)
        seconds = self._clock() - began
        if state.speculation is not None and plan.kind == "decode":
            state.speculation.observe(plan.load, seconds)
        if plan.num_decodes == self._num_requests:
            run.num_decoded += len(committed.token_ids)
            run.decode_s += self._clock() - began
        run.num_drafts += plan.num_drafts
        run.num_accepted += committed.num_accepted
        logprobs = committed.logprobs or [None] * len(committed.token_ids)
        for handle, token_id, entry in zip(committed.handles, committed.token_ids, logprobs, strict=True):
            number = int(str(handle))
            run.token_ids[number].append(token_id)
            run.logprobs[number].append(entry)
        return True


class Runner:
    """Two workers, one for requests without drafts and one for the same with drafts.

    Args:
        workers: of the same model.
        num_output: tokens of each request.
        max_drafts: with drafts, most of them.
        clock: seconds.
    """

    def __init__(
        self,
        workers: tuple[Worker, Worker],
        num_output: int,
        max_drafts: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._workers = workers
        self._num_output = num_output
        self._max_drafts = max_drafts
        self._clock = clock
        self._epochs = itertools.count(1)
        self._compiler = GrammarCompiler(
            lambda: checkpoint_tokenizer("demo", "", workers[0].facts.vocab_size, [EOS_ID])
        )

    def run(self, task: Task, num_requests: int) -> tuple[Run, Run]:
        """Generate for so many requests at once, without drafts and with them.

        Raises:
            RuntimeError: a request is refused.
        """
        requests = [self._request(task, number) for number in range(num_requests)]
        services = [
            Service(worker, next(self._epochs), requests, max_drafts, self._clock)
            for worker, max_drafts in zip(self._workers, (0, self._max_drafts), strict=True)
        ]
        running = list(services)
        while running:
            behind = min(running, key=lambda service: sum(map(len, service.run.token_ids)))
            if not behind.step():
                running.remove(behind)
        return services[0].run, services[1].run

    def _request(self, task: Task, number: int) -> SequenceRequest:
        begin = (37 * number) % CYCLE
        if task.repeats:
            prompt = [(begin + place) % CYCLE for place in range(CYCLE + 1)]
        else:
            prompt = list(range(CYCLE + begin, 2 * CYCLE + begin + 1))
        sampling = task.sampling
        compiled = None
        if task.schema:
            prompt = [token_id % 900 + 3 for token_id in prompt]
            compiled = self._compiler.compile(Constraint("json_schema", task.schema))
        return SequenceRequest(
            handle=number, request_id=str(number), prompt_ids=prompt, max_output_tokens=self._num_output,
            sampling=SamplingSpec(
                temperature=sampling.temperature, top_k=sampling.top_k, logprobs=sampling.logprobs, seed=number
            ),
            cache_key=b"bench", constraint=compiled,
        )  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """Rounds of one task and batch: tokens per second without drafts and with them."""

    task: str
    requests: int
    off: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)
    num_drafts: int = 0
    num_accepted: int = 0

    def measure(self, runner: Runner) -> None:
        """One round.

        Raises:
            RuntimeError: the outputs differ.
        """
        off, on = runner.run(TASKS[self.task], self.requests)
        if on.token_ids != off.token_ids or on.logprobs != off.logprobs:
            raise RuntimeError(f"{self.task}: outputs with drafts are not those without")
        self.off.append(off.rate)
        self.on.append(on.rate)
        self.num_drafts += on.num_drafts
        self.num_accepted += on.num_accepted

    def line(self) -> str:
        """One row of the table."""
        ratios = [on / off for on, off in zip(self.on, self.off, strict=True)]
        accepted = f"{self.num_accepted}/{self.num_drafts}"
        return (
            f"{self.task:<12}{self.requests:>6}{statistics.median(self.off):>10.1f}{statistics.median(self.on):>10.1f}"
            f"{statistics.median(ratios):>8.2f}{f'{min(ratios):.2f}-{max(ratios):.2f}':>12}{accepted:>14}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pawl_loadtest.speculation_bench", description=__doc__)
    add = parser.add_argument
    add("--shape", choices=[name for name, shape in SHAPES.items() if shape.kind == "llama"], default="smollm2-135m")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=positive, default=1)
    add("--requests", type=positive, nargs="*", default=[1, 4, 16], help="requests at once")
    add("--tasks", choices=TASKS, nargs="*", default=list(TASKS))
    add("--output-tokens", type=positive, default=128)
    add("--drafts", type=positive, default=8, help="most drafts of a request in a step")
    add("--rounds", type=positive, default=3)
    add("--folder", type=Path, help="keep the checkpoint here")
    add("--json", type=Path, help="write the figures here")
    return parser


def _load(path: Path, options: argparse.Namespace) -> Worker:
    most = max(options.requests)
    context = 2 * CYCLE + options.output_tokens
    return Worker.load(
        WorkerOptions(
            model=str(path), device=options.device, num_threads=options.threads, max_running=max(most, 64),
            max_batch_tokens=512, max_context=context, num_blocks=most * (context // 16 + 1),
        )
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 when outputs differ."""
    options = _parser().parse_args(arguments)
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        path = folder / f"{shape.name}-chain-0"
        if not (path / "config.json").is_file():
            write_chain(shape, folder)
        workers = _load(path, options), _load(path, options)
    runner = Runner(workers, options.output_tokens, options.drafts)
    outcomes = [Outcome(task, requests) for requests in options.requests for task in options.tasks]
    sys.stdout.write(
        f"{options.shape} on {workers[0].facts.device}, {options.threads} threads, at most {options.drafts} drafts, "
        f"{options.rounds} rounds of {options.output_tokens} tokens; output tokens/s while decoding\n"
        f"{'task':<12}{'batch':>6}{'off':>10}{'on':>10}{'ratio':>8}{'of rounds':>12}{'accepted':>14}\n"
    )
    try:
        for outcome in outcomes:
            for _ in range(options.rounds):
                outcome.measure(runner)
            sys.stdout.write(outcome.line() + "\n")
            sys.stdout.flush()
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
