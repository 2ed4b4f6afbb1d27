"""`python -m pawl_loadtest.speculation_bench`: output tokens/s with drafts and without, where they pay and where not.

The model has the sizes of a published one, and weights that make it follow a chain of tokens: the one after the last,
or with some probability another one, as the request's sampling has it. So how repetitive the text is can be set:

    copy        the text of the prompt again and again, word for word
    edit        the same with one token in twelve or so changed, after which it goes on elsewhere
    misleading  what follows a token is one of sixteen, so that n-grams come again and go on otherwise
    fresh       no n-gram comes twice

Scheduler and worker run in this process, with the settings of a server. Outputs with and without drafts are compared,
log-probabilities included; then both run in turn. A line gives the medians of the rounds, and the ratio round by round.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pawl_loadtest.arguments import positive
from pawl_loadtest.peers.shapes import SHAPES, Shape
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec, TokenLogprobs
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["TASKS", "Outcome", "Run", "Runner", "Task", "main", "write_chain"]

CYCLE = 256
"""Tokens of the text that the chain repeats; the others are a chain that does not end."""

_MATCH = 20.0  # logit of the token that follows, where the others' are about 0
_APART = 10.0  # how much lower those are that are not of the text
_CONSTANT = 4.0  # first number of each embedding


@dataclass(frozen=True, slots=True)
class Task:
    """How a request samples, and whether it begins in the text that repeats."""

    sampling: SamplingSpec
    repeats: bool = True


TASKS = {
    "copy": Task(SamplingSpec(temperature=0.0, logprobs=0)),
    "edit": Task(SamplingSpec(temperature=2.5, top_k=CYCLE, logprobs=0)),
    "misleading": Task(SamplingSpec(temperature=100.0, top_k=16, logprobs=0)),
    "fresh": Task(SamplingSpec(temperature=0.0, logprobs=0), repeats=False),
}


def write_chain(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a shape that follows the chain; what its layers add is far too small to matter.

    Raises:
        ValueError: the shape is not of the Llama kind.
    """
    if shape.kind != "llama":
        raise ValueError(f"shape {shape.name} is of the {shape.kind} kind: choose one of the llama kind")
    config = LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab_size, max_position_embeddings=shape.max_context, rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" not in name:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1e-4 if small else 0.02))
        embedding = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
        embedding[:, 0] = _CONSTANT
        before = torch.arange(shape.vocab_size) - 1
        before[0], before[CYCLE] = CYCLE - 1, shape.vocab_size - 1
        head = embedding[before] * (_MATCH / shape.hidden_size)
        head[:, 0] = 0.0
        head[CYCLE:, 0] = -_APART / _CONSTANT
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight.copy_(head)
    path = folder / f"{shape.name}-chain-{seed}"
    model.to(torch.bfloat16).save_pretrained(path)
    return path


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


class Runner:
    """A worker, and requests that go through a scheduler of its own each time.

    Args:
        worker: what computes.
        num_output: tokens of each request.
        max_drafts: with drafts, most of them.
    """

    def __init__(self, worker: Worker, num_output: int, max_drafts: int) -> None:
        self._worker = worker
        self._num_output = num_output
        self._max_drafts = max_drafts
        self._epochs = itertools.count(1)

    def run(self, task: Task, num_requests: int, *, drafts: bool) -> Run:
        """Generate for so many requests at once.

        Raises:
            RuntimeError: a request is refused.
        """
        facts, epoch = self._worker.facts, next(self._epochs)
        limits = SchedulerLimits(
            num_blocks=facts.num_blocks, block_size=facts.block_size, max_running=facts.max_running,
            max_batch_tokens=facts.max_batch_tokens, max_context=facts.max_context, prefix_cache=False,
            max_drafts=self._max_drafts if drafts else 0,
        )  # fmt: skip
        state = SchedulerState(limits, CacheRoot("bench", "float32", facts.block_size), epoch=epoch)
        self._worker.reset(epoch)
        run = Run([[] for _ in range(num_requests)], [[] for _ in range(num_requests)])
        for number in range(num_requests):
            refusal = state.submit(self._request(task, number), 0.0)
            if refusal is not None:
                raise RuntimeError(refusal.message)
        while state.has_work():
            began = time.perf_counter()
            plan = plan_step(state, limits, 0.0)
            if plan is None:
                break
            launch(state, plan)
            committed = commit(state, plan, self._worker.execute(plan.wire()), 0.0)
            seconds = time.perf_counter() - began
            if state.speculation is not None and plan.kind == "decode":
                state.speculation.observe(plan.load, seconds)
            if plan.num_decodes == num_requests:
                run.num_decoded += len(committed.token_ids)
                run.decode_s += time.perf_counter() - began
            run.num_drafts += plan.num_drafts
            run.num_accepted += committed.num_accepted
            logprobs = committed.logprobs or [None] * len(committed.token_ids)
            for handle, token_id, entry in zip(committed.handles, committed.token_ids, logprobs, strict=True):
                number = int(str(handle))
                run.token_ids[number].append(token_id)
                run.logprobs[number].append(entry)
        return run

    def _request(self, task: Task, number: int) -> SequenceRequest:
        begin = (37 * number) % CYCLE
        if task.repeats:
            prompt = [(begin + place) % CYCLE for place in range(CYCLE + 1)]
        else:
            prompt = list(range(CYCLE + begin, 2 * CYCLE + begin + 1))
        sampling = task.sampling
        return SequenceRequest(
            handle=number, request_id=str(number), prompt_ids=prompt, max_output_tokens=self._num_output,
            sampling=SamplingSpec(
                temperature=sampling.temperature, top_k=sampling.top_k, logprobs=sampling.logprobs, seed=number
            ),
            cache_key=b"bench",
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
        """One round, in alternating order.

        Raises:
            RuntimeError: the outputs differ.
        """
        order = (False, True) if len(self.off) % 2 == 0 else (True, False)
        runs = {drafts: runner.run(TASKS[self.task], self.requests, drafts=drafts) for drafts in order}
        if runs[True].token_ids != runs[False].token_ids or runs[True].logprobs != runs[False].logprobs:
            raise RuntimeError(f"{self.task}: outputs with drafts are not those without")
        self.off.append(runs[False].rate)
        self.on.append(runs[True].rate)
        self.num_drafts += runs[True].num_drafts
        self.num_accepted += runs[True].num_accepted

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
        worker = _load(path, options)
    runner = Runner(worker, options.output_tokens, options.drafts)
    outcomes = [Outcome(task, requests) for requests in options.requests for task in options.tasks]
    sys.stdout.write(
        f"{options.shape} on {worker.facts.device}, {options.threads} threads, at most {options.drafts} drafts, "
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
