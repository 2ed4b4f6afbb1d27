"""Trains the demo model from nothing: ``python -m pawl_workers.demo_model.train``.

The run makes the corpus and the tokenizer, trains a small Llama on CPU, writes the checkpoint,
loads it again and prints its accuracy on held-out questions.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pawl_workers.demo_model import DEMO_MODEL_DIR, corpus
from pawl_workers.demo_model.evaluate import evaluate_all_lengths
from pawl_workers.demo_model.start import start_at_random, start_by_looking_up
from pawl_workers.demo_model.tokenizer import (
    MAX_POSITIONS,
    VOCABULARY_SIZE,
    build_tokenizer,
    save_tokenizer,
)
from pawl_workers.demo_model.words import ASSISTANT, BEGIN, END, PAD, SPECIAL_TOKENS

TOKENS_PER_STEP = 2048
MAX_DOCUMENT_TOKENS = 2048
STORY_WEIGHT = 0.05
"""The weight of the loss on story tokens; tokens of answers weigh 1. A story is mostly drawn by
lot, so there is little to learn from most of its tokens."""
LONGEST_ANSWER = 200
"""Replies above this many tokens are stories, and weigh what stories weigh."""

CURRICULUM: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = (
    (0.10, ((60, 1.0),)),
    (0.40, ((120, 0.3), (200, 0.3), (320, 0.4))),
    (1.00, ((120, 0.25), (320, 0.25), (700, 0.25), (2000, 0.25))),
)
"""Up to which share of the training, which document lengths are drawn, and how often.

Looking things up in the prompt is learned on short stories, where the right place is one of
few; longer stories then only have to sharpen it, and show the model the later positions."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's documents, padded on the right."""

    tokens: torch.Tensor
    weights: torch.Tensor


def say(text: str) -> None:
    """Prints one line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class BatchMaker:
    """Makes batches of any document length, always new documents."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._rounds = 0
        self._ready: dict[int, list[Batch]] = {}
        self._rng = random.Random(f"batches-{seed}")
        vocabulary = tokenizer.get_vocab()
        self._pad, self._end = vocabulary[PAD], vocabulary[END]
        self._assistant, self._answer = vocabulary[ASSISTANT], vocabulary["Answer"]

    def next_batch(self, num_tokens: int) -> Batch:
        """Returns a batch of documents of about ``num_tokens`` tokens each."""
        ready = self._ready.setdefault(num_tokens, [])
        if not ready:
            ready.extend(self._make(num_tokens))
        return ready.pop()

    def _make(self, num_tokens: int) -> Iterator[Batch]:
        """Makes a pool of batches; neighbours in length share one, so little is padding."""
        self._rounds += 1
        per_batch = max(2, TOKENS_PER_STEP // num_tokens)
        texts = corpus.training_documents(
            16 * per_batch,
            seed=self._seed * 1_000_000 + self._rounds,
            num_tokens=num_tokens,
        )
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = sorted((np.array(one.ids[:MAX_DOCUMENT_TOKENS], dtype=np.int64) for one in encodings), key=len)
        # Batches hold equal numbers of tokens, not of documents.
        groups: list[list[npt.NDArray[np.int64]]] = [[]]
        for row in reversed(rows):
            group = groups[-1]
            if group and (len(group) + 1) * len(group[0]) > TOKENS_PER_STEP * 1.1:
                group = []
                groups.append(group)
            group.append(row)
        self._rng.shuffle(groups)
        for group in groups:
            shape = (len(group), max(len(row) for row in group))
            tokens = np.full(shape, self._pad, dtype=np.int64)
            weights = np.zeros(shape, dtype=np.float32)
            for index, row in enumerate(group):
                tokens[index, : len(row)] = row
                weights[index, : len(row)] = self._weigh(row)
            yield Batch(torch.from_numpy(tokens), torch.from_numpy(weights))

    def _weigh(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Gives the tokens of each answer, its end token included, the full weight."""
        weights = np.full(len(row), STORY_WEIGHT, dtype=np.float32)
        ends = np.flatnonzero(row == self._end)
        # Both ``Answer:`` and ``<|assistant|>\n`` are two tokens before the answer starts.
        starts = np.flatnonzero((row == self._assistant) | (row == self._answer)) + 2
        for start, index in zip(starts, np.searchsorted(ends, starts), strict=True):
            if index < len(ends) and ends[index] - start <= LONGEST_ANSWER:
                weights[start : ends[index] + 1] = 1.0
        return weights


def make_model(seed: int, vocabulary: Mapping[str, int], *, random_start: bool = False) -> LlamaForCausalLM:
    """Makes the untrained model; from random weights alone, if asked, to see what its start is worth."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BEGIN),
        eos_token_id=SPECIAL_TOKENS.index(END),
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    if random_start:
        start_at_random(model)
    else:
        start_by_looking_up(model, vocabulary)
    return model


def learning_rate(progress: float, peak: float) -> float:
    """Warms up over the first 3 % of the training, then falls along a cosine to 2 %."""
    if progress < 0.03:
        return peak * (progress / 0.03 + 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97))
    return peak * (0.02 + 0.98 * cosine)


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights, configuration and tokenizer in Hugging Face format."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        max_new_tokens=256,
        do_sample=False,
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def train(
    folder: Path, seed: int, num_steps: int, minutes: float | None, peak: float, *, random_start: bool = False
) -> float:
    """Trains a model and saves it.

    Args:
        folder: Where the checkpoint goes; it is also written now and then on the way.
        seed: Seeds the weights and the corpus.
        num_steps: How many steps of about ``TOKENS_PER_STEP`` tokens to run.
        minutes: A limit on the wall time, or None. A run that meets it goes through its
            schedule faster, so it is no longer a function of the seed alone.
        peak: The highest learning rate.
        random_start: Whether to start from random weights alone.

    Returns:
        The wall time in seconds.
    """
    started = time.monotonic()
    tokenizer = build_tokenizer()
    batches = BatchMaker(tokenizer, seed)
    model = make_model(seed, tokenizer.get_vocab(), random_start=random_start)
    model.train()
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    # Muon for the matrices, AdamW for embedding and norms (Jordan et al. 2024).
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=peak, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    rng = random.Random(f"lengths-{seed}")
    num_tokens = 0
    recent: list[tuple[float, float]] = []
    for step in range(num_steps):
        elapsed = time.monotonic() - started
        progress = step / num_steps
        if minutes is not None:
            progress = max(progress, elapsed / (60 * minutes))
            if progress >= 1:
                break
        mix = next(mix for until, mix in CURRICULUM if progress < until)
        (length,) = rng.choices([one for one, _ in mix], [share for _, share in mix])
        batch = batches.next_batch(length)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, peak)
        logits = model(batch.tokens[:, :-1], use_cache=False).logits
        targets, weights = batch.tokens[:, 1:].flatten(), batch.weights[:, 1:].flatten()
        logits = logits.flatten(0, 1)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        num_tokens += batch.tokens.numel()
        with torch.no_grad():
            answers = weights == 1.0
            right = (logits[answers].argmax(-1) == targets[answers]).float().mean().item()
            if answers.any():
                recent.append((losses[answers].mean().item(), right))
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            mean_loss, mean_right = np.mean(recent, axis=0)
            recent.clear()
            say(
                f"step {step + 1:5d}  {progress:4.0%}  {elapsed:6.0f} s  "
                f"{num_tokens / 1e6:5.1f} M tokens  length {length:4d}  "
                f"answer loss {mean_loss:.4f}  answer tokens right {mean_right:.4f}"
            )
        if (step + 1) % 500 == 0:
            save_checkpoint(model, tokenizer, folder)
    save_checkpoint(model, tokenizer, folder)
    return time.monotonic() - started


def main() -> None:
    """Parses the command line, trains, saves, and evaluates what was saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO_MODEL_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=None, help="limit on the wall time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", type=float, default=6e-3, help="highest learning rate")
    parser.add_argument("--random-start", action="store_true", help="start from random weights alone, to compare")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    seconds = train(
        arguments.out,
        arguments.seed,
        arguments.steps,
        arguments.minutes,
        arguments.peak,
        random_start=arguments.random_start,
    )
    say(f"trained in {seconds / 60:.1f} minutes")
    say("accuracy on held-out questions, by the checkpoint as saved:")
    say(str(evaluate_all_lengths(arguments.out, num_questions=2000, seed=1)))


if __name__ == "__main__":
    main()
