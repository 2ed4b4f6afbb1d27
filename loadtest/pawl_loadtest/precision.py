"""`python -m pawl_loadtest.precision`: what smaller types of cached keys and values and of weights cost in accuracy.

Asks the embedded model held-out questions with each choice of `kv_dtype` and `weight_dtype`, and compares answers, and
the log-probability of every prompt token, with those of the exact model. An answer is right when it is so character for
character and ends there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pawl_loadtest.arguments import positive
from pawl_workers.demo_model import DEMO_MODEL_DIR
from pawl_workers.demo_model.corpus import HeldOutQuestion, held_out_questions
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["CHOICES", "Effect", "main", "measure"]

CHOICES = (
    ("auto", "auto"),
    ("float16", "auto"),
    ("int8", "auto"),
    ("auto", "int8"),
    ("auto", "int8_g128"),
    ("auto", "int8_g64"),
    ("auto", "int8_g32"),
    ("int8", "int8"),
)
"""`kv_dtype` and `weight_dtype`; the first is exact, and what the others are compared with."""
_ANSWER_TOKENS = 14
_AT_ONCE = 32
_CHUNK = 2048

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Effect:
    """What one choice of types does.

    Attributes:
        right: share of questions answered rightly.
        same: share of answers equal to the exact model's.
        mean_shift: of the log-probabilities of prompt tokens, absolute, in nats.
        largest_shift: likewise.
        weight_bytes: of the packed weights.
        kv_bytes_per_token: in all layers.
    """

    kv_dtype: str
    weight_dtype: str
    right: float
    same: float
    mean_shift: float
    largest_shift: float
    weight_bytes: int
    kv_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class _Answers:
    texts: list[str]
    logprobs: Floats
    weight_bytes: int
    kv_bytes_per_token: float


def measure(questions: Sequence[HeldOutQuestion], choices: Sequence[tuple[str, str]] = CHOICES) -> list[Effect]:
    """Ask the questions with each choice, the exact one first."""
    found = [_ask(questions, *choice) for choice in choices]
    exact = found[0]
    effects = []
    for (kv_dtype, weight_dtype), answers in zip(choices, found, strict=True):
        shifts = np.abs(answers.logprobs - exact.logprobs)
        right = [text == question.answer for text, question in zip(answers.texts, questions, strict=True)]
        same = [text == other for text, other in zip(answers.texts, exact.texts, strict=True)]
        effects.append(
            Effect(
                kv_dtype=kv_dtype,
                weight_dtype=weight_dtype,
                right=float(np.mean(right)),
                same=float(np.mean(same)),
                mean_shift=float(shifts.mean()),
                largest_shift=float(shifts.max()),
                weight_bytes=answers.weight_bytes,
                kv_bytes_per_token=answers.kv_bytes_per_token,
            )
        )
    return effects


def _ask(questions: Sequence[HeldOutQuestion], kv_dtype: str, weight_dtype: str) -> _Answers:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL_DIR / "tokenizer.json"))
    prompts = [tokenizer.encode(question.prompt).ids for question in questions]
    longest = max(map(len, prompts)) + _ANSWER_TOKENS
    worker = Worker.load(
        WorkerOptions(
            "demo",
            kernels="cpu",
            kv_dtype=kv_dtype,
            weight_dtype=weight_dtype,
            num_threads=len(os.sched_getaffinity(0)),
            max_running=_AT_ONCE,
            max_batch_tokens=_CHUNK,
            num_blocks=_AT_ONCE * (-(-longest // 32) + 1),
        )
    )
    facts = worker.facts
    end = set(facts.eos_token_ids)
    texts: list[str] = []
    logprobs: list[float] = []
    for epoch, begin in enumerate(range(0, len(prompts), _AT_ONCE), start=1):
        worker.reset(epoch)
        for ids, scores in _answer(worker, epoch, prompts[begin : begin + _AT_ONCE], end):
            ended = bool(end.intersection(ids))
            text = tokenizer.decode([i for i in ids if i not in end], skip_special_tokens=False).strip()
            texts.append(text if ended else f"{text} (no end)")
            logprobs += scores
    per_token = facts.kv_bytes / ((facts.num_blocks + 1) * facts.block_size)
    return _Answers(texts, np.array(logprobs), facts.weight_bytes, per_token)


def _answer(
    worker: Worker, epoch: int, prompts: Sequence[list[int]], end: set[int]
) -> Iterator[tuple[list[int], list[float]]]:
    """Give each prompt's greedy answer, its end included, and the log-probabilities of its tokens but the first."""
    step, next_block = 0, 1
    answers: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        num_blocks = -(-(len(prompt) + _ANSWER_TOKENS) // worker.facts.block_size)
        blocks = list(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        new = NewSequence(row, prompt, len(prompt), 0, blocks, SamplingSpec(temperature=0.0), prompt_logprobs=0)
        for done in range(0, len(prompt), _CHUNK):
            step += 1
            chunk = min(_CHUNK, len(prompt) - done)
            plan = StepPlan(step, epoch, [], [new] if done == 0 else [], [], [row], [chunk])
            result = worker.execute(plan)
            scores[row] += [entry.logprob for part in result.prompt_logprobs for entry in part.positions]
            answers[row] += result.token_ids  # of the last chunk alone
    for _ in range(_ANSWER_TOKENS - 1):
        rows = [row for row, answer in enumerate(answers) if not end.intersection(answer)]
        if not rows:
            break
        step += 1
        result = worker.execute(StepPlan(step, epoch, [], [], [], rows, [1] * len(rows)))
        for row, token_id in zip(result.rows, result.token_ids, strict=True):
            answers[row].append(token_id)
    yield from zip(answers, scores, strict=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each choice of types."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.precision", description=__doc__)
    parser.add_argument("--questions", type=positive, default=500)
    parser.add_argument("--most-tokens", type=positive, default=600, help="of a prompt; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    questions = held_out_questions(options.questions, options.seed, None, options.most_tokens)
    effects = measure(questions)
    sys.stdout.write(
        f"{len(questions)} questions of up to {options.most_tokens} tokens; shifts of log-probabilities in nats\n"
        f"{'KV':<10}{'weights':<10}{'right':>8}{'same':>8}{'mean shift':>12}{'largest':>10}{'weights MB':>12}"
        f"{'KV B/token':>12}\n"
    )
    for e in effects:
        sys.stdout.write(
            f"{e.kv_dtype:<10}{e.weight_dtype:<10}{e.right:>8.1%}{e.same:>8.1%}{e.mean_shift:>12.2g}"
            f"{e.largest_shift:>10.2g}{e.weight_bytes / 1e6:>12.2f}{e.kv_bytes_per_token:>12.0f}\n"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(effect) for effect in effects], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
