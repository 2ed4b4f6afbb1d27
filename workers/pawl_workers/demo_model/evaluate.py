"""Measures the demo model on held-out questions: ``python -m pawl_workers.demo_model.evaluate``.

An answer counts if the greedy continuation is the right answer, character for character, and
the end token follows it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from pawl_workers.demo_model import DEMO_MODEL_DIR, corpus
from pawl_workers.demo_model.corpus import HeldOutQuestion
from pawl_workers.demo_model.stories import KINDS

LENGTH_BUCKETS = ((1, 150), (150, 300), (300, 600), (600, 1200), (1200, 2030))
"""Prompt lengths that are measured apart: from, and up to but not including."""
MAX_NEW_TOKENS = 14
"""The longest answer takes nine tokens, its end token included."""
TOKENS_PER_BATCH = 16_384


@dataclass(slots=True)
class Score:
    """How many of some questions were answered rightly."""

    num_right: int = 0
    num_asked: int = 0

    @property
    def accuracy(self) -> float:
        """The share of right answers; 1 where nothing was asked."""
        return self.num_right / self.num_asked if self.num_asked else 1.0

    def count(self, right: bool) -> None:
        """Counts one more question."""
        self.num_right += int(right)
        self.num_asked += 1

    def __str__(self) -> str:
        return f"{self.accuracy:7.2%}  ({self.num_right} of {self.num_asked})"


@dataclass(slots=True)
class Report:
    """The outcome of an evaluation.

    Attributes:
        total: Over all questions.
        by_kind: By kind of question.
        by_length: By bucket of ``LENGTH_BUCKETS``.
        by_form: For the plain text form and for the chat form.
        mistakes: (question, the text that came instead) for the wrong answers.
    """

    total: Score = field(default_factory=Score)
    by_kind: dict[str, Score] = field(default_factory=dict)
    by_length: dict[tuple[int, int], Score] = field(default_factory=dict)
    by_form: dict[str, Score] = field(default_factory=dict)
    mistakes: list[tuple[HeldOutQuestion, str]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """The share of right answers over all questions."""
        return self.total.accuracy

    def __str__(self) -> str:
        lines = [f"{'total':<16}{self.total}"]
        lines += [f"{kind:<16}{score}" for kind, score in sorted(self.by_kind.items())]
        lines += [f"{f'{low}-{high - 1} tokens':<16}{score}" for (low, high), score in sorted(self.by_length.items())]
        lines += [f"{f'as {form}':<16}{score}" for form, score in sorted(self.by_form.items())]
        return "\n".join(lines)


def evaluate_questions(model_dir: Path, questions: Sequence[HeldOutQuestion], form: str | None = None) -> Report:
    """Asks the model a list of questions.

    Args:
        model_dir: The folder of the checkpoint.
        questions: What to ask.
        form: ``text`` or ``chat``, or None to let the two take turns.

    Returns:
        The scores.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.eval()
    asked: list[tuple[list[int], HeldOutQuestion, str]] = []
    for index, question in enumerate(questions):
        # The kinds take turns too, so the form changes after each round of kinds.
        form_of_this = form or ("text", "chat")[index // len(KINDS) % 2]
        asked.append((_prompt_ids(tokenizer, question, form_of_this), question, form_of_this))
    asked.sort(key=lambda one: len(one[0]))
    report = Report()
    for batch in _batches(asked):
        outputs = _generate(model, tokenizer, [ids for ids, _, _ in batch])
        for (_, question, form_of_this), output in zip(batch, outputs, strict=True):
            right = output == question.answer
            report.total.count(right)
            report.by_kind.setdefault(question.kind, Score()).count(right)
            report.by_form.setdefault(form_of_this, Score()).count(right)
            for bucket in LENGTH_BUCKETS:
                if bucket[0] <= question.num_prompt_tokens < bucket[1]:
                    report.by_length.setdefault(bucket, Score()).count(right)
            if not right:
                report.mistakes.append((question, output))
    return report


def evaluate(
    model_dir: Path,
    num_questions: int,
    seed: int,
    min_prompt_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
) -> Report:
    """Asks the model held-out questions of one range of lengths.

    Args:
        model_dir: The folder of the checkpoint.
        num_questions: How many questions to ask.
        seed: Which questions.
        min_prompt_tokens: As for ``corpus.held_out_questions``.
        max_prompt_tokens: As for ``corpus.held_out_questions``.

    Returns:
        The scores.
    """
    questions = corpus.held_out_questions(num_questions, seed, min_prompt_tokens, max_prompt_tokens)
    return evaluate_questions(model_dir, questions)


def evaluate_all_lengths(model_dir: Path, num_questions: int, seed: int) -> Report:
    """Asks the model as many held-out questions of each bucket of ``LENGTH_BUCKETS``."""
    questions: list[HeldOutQuestion] = []
    for low, high in LENGTH_BUCKETS:
        questions += corpus.held_out_questions(num_questions // len(LENGTH_BUCKETS), seed, low, high - 1)
    return evaluate_questions(model_dir, questions)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: HeldOutQuestion, form: str) -> list[int]:
    if form == "text":
        text = tokenizer.encode(question.prompt)
        return [int(token) for token in text]
    chat = tokenizer.apply_chat_template(
        list(question.messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in chat]


def _batches(
    asked: Sequence[tuple[list[int], HeldOutQuestion, str]],
) -> Iterator[list[tuple[list[int], HeldOutQuestion, str]]]:
    """Cuts questions, sorted by length, into batches of a bounded number of tokens."""
    batch: list[tuple[list[int], HeldOutQuestion, str]] = []
    for one in asked:
        if batch and (len(batch) + 1) * len(one[0]) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> list[str]:
    """Continues prompts greedily; an output without an end token becomes a marked one."""
    longest = max(len(prompt) for prompt in prompts)
    pad, end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    tokens = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        generated = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
    outputs: list[str] = []
    for row in generated[:, longest:].tolist():
        answer = row[: row.index(end)] if end in row else row
        text = str(tokenizer.decode(answer, skip_special_tokens=False)).strip()
        outputs.append(text if end in row else f"{text} (no end)")
    return outputs


def main() -> None:
    """Parses the command line and prints a report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_DIR)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mistakes", type=int, default=5, help="how many to show")
    arguments = parser.parse_args()
    started = time.monotonic()
    report = evaluate_all_lengths(arguments.model, arguments.questions, arguments.seed)
    lines = [str(report), f"evaluated in {time.monotonic() - started:.0f} s"]
    for question, output in report.mistakes[: arguments.mistakes]:
        asked = question.prompt.splitlines()[-2]
        lines.append(f"wrong: {asked} -> {output} (right: {question.answer})")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
