"""`python -m pawl_loadtest.sampling_bench`: what choosing the tokens of a step costs, against transformers and a sort.

Both sides get the same normal logits: pawl's sampling stage, and the processors of transformers with
`torch.multinomial`. Their answers are compared first (greedy tokens and log-probabilities equal, sampled tokens among
those that the processors keep), then they run in turn, several rounds; a line gives medians, the spread of the rounds'
medians, and the ratio round by round. `--in-step` also runs pawl's worker on a checkpoint with random weights and
gives the share of sampling in its decode steps. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pawl_loadtest.arguments import positive
from pawl_loadtest.peers.checkpoint import make_checkpoint
from pawl_loadtest.peers.shapes import SHAPES
from pawl_workers.batch import AttentionShape
from pawl_workers.kernels import choose_backend
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.sampling.batch import SamplingBatch
from pawl_workers.sampling.table import SamplingTable
from pawl_workers.stages.sample import sample
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["SETTINGS", "Case", "Outcome", "main", "measure", "share_of_step"]

SETTINGS = {
    "greedy": SamplingSpec(temperature=0.0),
    "temperature 0.8": SamplingSpec(temperature=0.8),
    "top-k 50": SamplingSpec(top_k=50),
    "top-p 0.9": SamplingSpec(top_p=0.9),
    "repetition 1.2": SamplingSpec(repetition_penalty=1.2),
    "logprobs 5": SamplingSpec(temperature=0.0, logprobs=5),
}
SAMPLES = (1, 16, 64)
HISTORY = 512
"""Tokens before the step, which a penalty counts."""


@dataclass(frozen=True, slots=True)
class Case:
    """A setting of `SETTINGS`, samples of the step, and the vocabulary's size."""

    setting: str
    samples: int
    vocab_size: int


class Pawl:
    """The sampling stage, on a table that was filled once."""

    def __init__(self, case: Case, history: Tensor) -> None:
        kernels = choose_backend(torch.device("cpu"), torch.float32, AttentionShape(1, 1, 64))
        table, rows = SamplingTable(case.samples), np.arange(case.samples)
        for row, ids in enumerate(history.tolist()):
            table.add(row, msgspec.structs.replace(SETTINGS[case.setting], seed=row), ids, [])
        none = np.zeros((case.samples, 0), dtype=np.int64)
        self._batch = SamplingBatch(kernels.sampler, table, rows, rows + HISTORY, rows * 0, none)

    def run(self, scores: Tensor) -> tuple[list[int], list[list[float]]]:
        """Tokens, and the log-probabilities of the token and of the best."""
        sampled = sample(scores, self._batch)
        described = [[entry.logprob, *entry.alternative_logprobs] for entry in sampled.logprobs if entry is not None]
        return sampled.token_ids.tolist(), described


class Transformers:
    """The processors of transformers, softmax and `torch.multinomial`, as in its `generate`."""

    def __init__(self, case: Case, history: Tensor) -> None:
        spec = SETTINGS[case.setting]
        self._history, self._spec = history, spec
        self._processors = LogitsProcessorList()
        if spec.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(spec.repetition_penalty))
        if spec.temperature not in {0.0, 1.0}:
            self._processors.append(TemperatureLogitsWarper(spec.temperature))
        if spec.top_k:
            self._processors.append(TopKLogitsWarper(spec.top_k))
        if spec.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(spec.top_p))

    def processed(self, scores: Tensor) -> Tensor:
        """Logits after the processors, -inf where a token is not kept."""
        processed: Tensor = self._processors(self._history, scores)
        return processed

    def run(self, scores: Tensor) -> tuple[list[int], list[list[float]]]:
        """Tokens, and the log-probabilities of the token and of the best."""
        processed = self.processed(scores)
        if self._spec.temperature == 0.0:
            tokens = processed.argmax(dim=-1)
        else:
            tokens = torch.multinomial(processed.softmax(dim=-1), num_samples=1).squeeze(1)
        if self._spec.logprobs < 0:
            return tokens.tolist(), []
        logprobs = scores.log_softmax(dim=-1)
        best = logprobs.topk(self._spec.logprobs, dim=-1)
        return tokens.tolist(), torch.cat([logprobs.gather(1, tokens.unsqueeze(1)), best.values], dim=1).tolist()


@dataclass(slots=True)
class Outcome:
    """Milliseconds of a step's sampling, the median of each round."""

    case: Case
    pawl: list[float] = field(default_factory=list)
    transformers: list[float] = field(default_factory=list)
    sort: list[float] = field(default_factory=list)

    def line(self) -> str:
        """One row of the table."""
        ratios = [theirs / ours for ours, theirs in zip(self.pawl, self.transformers, strict=True)]
        cells = "".join(f"{_spread(values):>26}" for values in (self.pawl, self.transformers, self.sort))
        return (
            f"{self.case.vocab_size:>8}{self.case.samples:>4}  {self.case.setting:<16}{cells}{_spread(ratios, 1):>22}"
        )


def _spread(values: Sequence[float], digits: int = 3) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _check(case: Case, pawl: Pawl, peer: Transformers, scores: Tensor) -> None:
    (tokens, logprobs), (peer_tokens, peer_logprobs) = pawl.run(scores), peer.run(scores)
    if SETTINGS[case.setting].temperature == 0.0:
        agree = tokens == peer_tokens and np.allclose(logprobs, peer_logprobs, atol=1e-4)
    else:
        kept = peer.processed(scores).gather(1, torch.tensor(tokens).unsqueeze(1))
        agree = bool(kept.isfinite().all())
    if not agree:
        raise RuntimeError(f"{case}: pawl chose {tokens}, which transformers would not")


def _timed(run: Callable[[], object], runs: int) -> float:
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def measure(case: Case, *, rounds: int, runs: int, scale: float) -> Outcome:
    """Compare the answers of both sides, then time them and a full sort of the logits in turn.

    Args:
        case: what to sample.
        rounds: of all sides.
        runs: calls of a side in a round.
        scale: standard deviation of the logits; the smaller, the more tokens top-p keeps.

    Raises:
        RuntimeError: pawl's answer is none that transformers would give.
    """
    generator = torch.Generator().manual_seed(case.samples)
    scores = torch.randn(case.samples, case.vocab_size, generator=generator) * scale
    history = torch.randint(case.vocab_size, (case.samples, HISTORY), generator=generator)
    pawl, peer, outcome = Pawl(case, history), Transformers(case, history), Outcome(case)
    with torch.inference_mode():
        _check(case, pawl, peer, scores)
        for _ in range(rounds):
            outcome.pawl.append(_timed(lambda: pawl.run(scores), runs))
            outcome.transformers.append(_timed(lambda: peer.run(scores), runs))
            outcome.sort.append(_timed(lambda: scores.sort(dim=-1, descending=True), 1))
    return outcome


def share_of_step(worker: Worker, epoch: int, spec: SamplingSpec, samples: int, steps: int) -> tuple[float, float]:
    """Run decode steps in which all rows sample.

    Args:
        worker: with at least `samples` rows and as many blocks.
        epoch: another one each time.
        spec: of all rows.
        samples: rows.
        steps: measured.

    Returns:
        Median milliseconds of a step, and the median share of sampling in it.
    """
    worker.reset(epoch)
    rows, prompt = list(range(samples)), [3, 1, 4, 1]
    new = [NewSequence(row, prompt, len(prompt), 0, [row + 1], msgspec.structs.replace(spec, seed=row)) for row in rows]
    worker.execute(StepPlan(1, epoch, [], new, [], rows, [len(prompt)] * samples))
    milliseconds, shares = [], []
    for step in range(steps):
        result = worker.execute(StepPlan(2 + step, epoch, [], [], [], rows, [1] * samples))
        seconds = result.prepare_s + result.forward_s + result.sample_s
        milliseconds.append(1e3 * seconds)
        shares.append(result.sample_s / seconds)
    return statistics.median(milliseconds), statistics.median(shares)


def _print_shares(shape: str, samples: Sequence[int], steps: int, threads: int) -> None:
    sys.stdout.write(f"\n{shape}, random weights: ms of a decode step, share of sampling in it\n")
    with tempfile.TemporaryDirectory(prefix="pawl-bench-") as folder:
        checkpoint = make_checkpoint(SHAPES[shape], Path(folder))
        options = WorkerOptions(
            str(checkpoint), num_threads=threads, max_running=max(samples), num_blocks=max(samples), max_context=32
        )
        worker = Worker.load(options)
        epoch = 0
        for count in samples:
            for setting, spec in SETTINGS.items():
                epoch += 1
                milliseconds, share = share_of_step(worker, epoch, spec, count, min(steps, 24))
                sys.stdout.write(f"{count:>4}  {setting:<16}{milliseconds:>10.2f}{100 * share:>8.2f} %\n")
                sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 0 when all answers agreed."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.sampling_bench", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--runs", type=positive, default=5, help="calls of each side in a round")
    parser.add_argument("--samples", type=positive, nargs="*", default=list(SAMPLES))
    parser.add_argument("--vocab-size", type=positive, nargs="*", default=[49152, 151936])
    parser.add_argument("--scale", type=float, default=2.0, help="standard deviation of the logits")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--in-step", choices=SHAPES, help="also the share of a decode step of this shape")
    parser.add_argument("--steps", type=positive, default=12, help="decode steps of each setting, at most 24")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = [Case(*parts) for parts in _products(options.vocab_size, options.samples)]
    outcomes: list[Outcome] = []
    sys.stdout.write(
        f"ms per step, median of {options.rounds} rounds (min-max), {options.threads} threads, normal logits with"
        f" deviation {options.scale}\n{'V':>8}{'S':>4}  {'setting':<16}{'pawl':>26}{'transformers':>26}"
        f"{'a full sort alone':>26}{'transformers / pawl':>22}\n"
    )
    for case in cases:
        outcomes.append(measure(case, rounds=options.rounds, runs=options.runs, scale=options.scale))
        sys.stdout.write(outcomes[-1].line() + "\n")
        sys.stdout.flush()
    if options.in_step:
        _print_shares(options.in_step, options.samples, options.steps, options.threads)
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n", encoding="utf-8")
    return 0


def _products(vocab_sizes: Sequence[int], samples: Sequence[int]) -> list[tuple[str, int, int]]:
    return [(setting, count, size) for size in vocab_sizes for count in samples for setting in SETTINGS]


if __name__ == "__main__":
    sys.exit(main())
