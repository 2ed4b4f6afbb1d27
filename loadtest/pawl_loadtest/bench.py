"""`make bench`: output tokens/s of pawl against `transformers.generate`, same weights, same prompts, same lengths.

Makes a checkpoint of a named shape with random weights, checks that both sides choose the same tokens, then runs
them alternately for several rounds and reports medians, spread and the ratio round by round. In process on both
sides: pawl's scheduler, paged KV cache and worker, without gRPC. Run it on an idle machine.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pawl_loadtest.prompts import PromptSource
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["CASES", "SHAPES", "Case", "main", "make_checkpoint"]

# Sizes as published in the models' configs; the weights are random.
SHAPES: dict[str, dict[str, int | float | bool]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """Concurrent requests, tokens of each prompt, tokens to generate."""

    requests: int
    prompt_tokens: int
    output_tokens: int


CASES = (Case(1, 32, 128), Case(16, 128, 128), Case(64, 128, 64))


def make_checkpoint(shape: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint of this shape with random weights (never zeros) in Hugging Face format, fp32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=1, rope_theta=10000.0))
    path = folder / shape
    model.save_pretrained(path, safe_serialization=True)
    return path


class Peer:
    """transformers `generate`: static batch, greedy, fp32, exact lengths."""

    name = "transformers.generate"

    def __init__(self, checkpoint: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        """Generated ids of each prompt."""
        ids = torch.tensor([list(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=output_tokens,
                min_new_tokens=output_tokens, pad_token_id=0,
            )  # fmt: skip
        generated: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return generated


class Pawl:
    """The server in process: scheduler, paged KV cache and worker, step after step."""

    name = "pawl"

    def __init__(self, checkpoint: Path, threads: int, case: Case) -> None:
        tokens = case.prompt_tokens + case.output_tokens
        options = WorkerOptions(
            model=str(checkpoint), device="cpu", dtype="float32", kernels="auto", num_threads=threads,
            max_context=2 * tokens, max_running=case.requests, max_batch_tokens=max(512, case.requests),
            num_blocks=case.requests * (tokens // 16 + 2) + 8, memory_fraction=0.5, kv_bytes=None, revision=None,
        )  # fmt: skip
        self._worker = Worker.load(options)
        facts = self._worker.facts
        self._limits = SchedulerLimits(
            num_blocks=facts.num_blocks, block_size=facts.block_size, max_running=case.requests,
            max_batch_tokens=options.max_batch_tokens, max_context=2 * tokens, max_prefill_chunk=512,
            max_partial_prefills=case.requests, prefix_cache=False,
        )  # fmt: skip
        self._epoch = 1

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        """Generated ids of each prompt."""
        self._epoch += 1
        self._worker.reset(self._epoch)
        state = SchedulerState(self._limits, CacheRoot("bench", "float32", self._limits.block_size), epoch=self._epoch)
        output: dict[object, list[int]] = {}
        for number, prompt in enumerate(prompts):
            output[number] = []
            refusal = state.submit(
                SequenceRequest(
                    handle=number, request_id=str(number), prompt_ids=prompt, cache_key=b"",
                    sampling=SamplingSpec(temperature=0.0), max_output_tokens=output_tokens,
                ),
                0.0,
            )  # fmt: skip
            if refusal is not None:
                raise RuntimeError(refusal.message)
        while (plan := plan_step(state, self._limits, 0.0)) is not None:
            wire = plan.wire()
            launch(state, plan)
            committed = commit(state, plan, self._worker.execute(wire), 0.0)
            for handle, token_id in zip(committed.handles, committed.token_ids, strict=True):
                output[handle].append(token_id)
        return list(output.values())


@dataclass(frozen=True, slots=True)
class Outcome:
    """Output tokens per second of one case, by round."""

    case: Case
    pawl: list[float]
    peer: list[float]
    same_tokens: float

    @property
    def ratios(self) -> list[float]:
        """Pawl / peer, round by round."""
        return [ours / theirs for ours, theirs in zip(self.pawl, self.peer, strict=True)]

    def line(self) -> str:
        """One row of the table."""
        case = self.case
        cells = [_spread(self.pawl), _spread(self.peer), _spread(self.ratios, 2)]
        name = f"{case.requests} x {case.prompt_tokens}/{case.output_tokens}"
        return f"{name:<16}" + "".join(f"{cell:>26}" for cell in cells) + f"{100 * self.same_tokens:>9.1f} %"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of sequences whose first 16 tokens are equal; later ones may part at a near tie of random weights."""
    same = [list(a[:16]) == list(b[:16]) for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


def _timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    output = run()
    seconds = time.perf_counter() - started
    return sum(len(tokens) for tokens in output) / seconds, output


def measure(checkpoint: Path, case: Case, *, rounds: int, threads: int, vocab_size: int) -> Outcome:
    """Verify that outputs agree, warm both up, then time them alternately."""
    peer, pawl = Peer(checkpoint), Pawl(checkpoint, threads, case)
    source = PromptSource(vocab_size, seed=case.requests)
    prompts = [source.prompt(case.prompt_tokens) for _ in range(case.requests)]
    few = min(16, case.output_tokens)
    same = _agreement(pawl.run(prompts, few), peer.run(prompts, few))
    outcome = Outcome(case, [], [], same)
    for number in range(rounds):
        pair: list[tuple[list[float], Peer | Pawl]] = [(outcome.pawl, pawl), (outcome.peer, peer)]
        for rates, engine in pair if number % 2 == 0 else reversed(pair):
            rate, output = _timed(lambda engine=engine: engine.run(prompts, case.output_tokens))  # type: ignore[misc]
            if any(len(tokens) != case.output_tokens for tokens in output):
                raise RuntimeError(f"{engine.name} generated other lengths than asked for")
            rates.append(rate)
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 when the outputs disagree."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.bench", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", type=int, nargs="*", help="only the cases with these numbers of requests")
    parser.add_argument("--output-tokens", type=int, help="instead of each case's own")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = [case for case in CASES if not options.requests or case.requests in options.requests]
    if options.output_tokens:
        cases = [replace(case, output_tokens=options.output_tokens) for case in cases]
    vocab_size = int(SHAPES[options.shape]["vocab_size"])
    outcomes: list[Outcome] = []
    sys.stdout.write(
        f"{options.shape}, random weights, fp32, {options.threads} threads, {options.rounds} rounds; output tokens/s,"
        " median (min-max)\n"
        f"{'requests':<16}{'pawl':>26}{'transformers.generate':>26}{'ratio':>26}{'same':>11}\n"
    )
    with tempfile.TemporaryDirectory(prefix="pawl-bench-") as folder:
        checkpoint = make_checkpoint(options.shape, Path(folder))
        for case in cases:
            outcome = measure(checkpoint, case, rounds=options.rounds, threads=options.threads, vocab_size=vocab_size)
            outcomes.append(outcome)
            sys.stdout.write(outcome.line() + "\n")
            sys.stdout.flush()
    if options.json:
        figures = {"shape": options.shape, "threads": options.threads, "cases": [asdict(o) for o in outcomes]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(outcome.same_tokens > 0.95 for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
