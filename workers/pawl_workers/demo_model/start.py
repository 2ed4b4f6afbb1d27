"""Where the training of the demo model starts: with heads that look sentences up.

A model this small finds out by itself how to look a word up in its prompt, but from a random start that takes
most of the training (README.md beside this file has the figures). So the first two layers start as a rough version
of the circuit that such models are known to form, an induction head (Olsson et al. 2022, "In-context Learning and
Induction Heads"), in the spirit of mimetic initialisation (Trockman and Kolter 2023); training then does with it what
it likes:

1. In layer 0, one pair of heads looks one and two words back, the other looks back at the nearest word that a
   sentence can be about, and copies it into the upper half of the residual stream, the *subject slot*.
2. In layer 1, every head seeks words whose subject slot equals its own, prefers those that can answer a question,
   and adds what it finds to the lower half, where words lie.

How far to look back is set through the rotary embedding: a constant query and key give a score that is a sum of
cosines of the distance, and any shape of it is a least-squares fit of their weights (`_look_back`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pawl_workers.demo_model.words import COLOURS, NAMES, NUMBERS, OBJECTS, PLACES

__all__ = ["start_at_random", "start_by_looking_up"]

_CONSTANT, _SUBJECT, _ANSWER = 0, 1, 2
"""Residual directions that every word, every word to speak of, and every word to answer with starts with."""
_FLAG = 4.0
_SLOW_PAIR = -1
"""The rotary pair that turns least: a score through it does not depend on the distance."""
_RIDGE = 10.0
"""Keeps the fitted weights small. Large ones that cancel give the same scores, but multiply the rounding of angles:
with 1e-3 the logits of the trained model were 1e-3 away from those computed in fp64."""


@torch.no_grad()
def start_by_looking_up(model: LlamaForCausalLM, vocabulary: Mapping[str, int]) -> None:
    """Sets the weights of an untrained model.

    Args:
        model: Its residual stream is cut into halves; it needs two layers or more, two key/value heads, and heads
            as wide as half its residual stream.
        vocabulary: From token to id; a token with a leading ``Ġ`` follows a space.
    """
    config = model.config
    start_at_random(model)
    _start_embedding(model.model.embed_tokens.weight, vocabulary)
    model.model.norm.weight.fill_(1 / math.sqrt(config.hidden_size))
    rows = model.model.embed_tokens.weight
    # What a flag is worth behind the norm.
    flag = _FLAG / float(rows.square().mean(1).sqrt().median())
    _start_subjects(model.model.layers[0].self_attn, config, flag)
    _start_matching(model.model.layers[1].self_attn, config, flag)


@torch.no_grad()
def start_at_random(model: LlamaForCausalLM) -> None:
    """Normal weights that keep variances; what adds to the residual stream starts smaller by the root of depth."""
    deep = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            scale = deep if "o_proj" in name or "down_proj" in name else 1.0
            weight.normal_(0.0, scale * weight.shape[1] ** -0.5)
    for layer in model.model.layers[2:]:
        # Queries near the keys of their group: words attend to their equals.
        attention, head_dim = layer.self_attn, model.config.head_dim
        groups = model.config.num_attention_heads // model.config.num_key_value_heads
        keys = attention.k_proj.weight.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1)
        attention.q_proj.weight.copy_(keys + 0.02 * torch.randn_like(keys))


def _start_embedding(rows: Tensor, vocabulary: Mapping[str, int]) -> None:
    """Words in the lower half, flags in front; a word after a space and at the start of a text is one word."""
    half = rows.shape[1] // 2
    rows.normal_()
    rows[:, half:] *= 0.1
    rows[:, : _ANSWER + 1] = 0.0
    rows[:, _CONSTANT] = _FLAG
    subjects = {*NAMES, *OBJECTS}
    answers = subjects | {*PLACES, *COLOURS, *NUMBERS[2:]}
    for words, direction in ((subjects, _SUBJECT), (answers, _ANSWER)):
        rows[_ids(words, vocabulary), direction] = _FLAG
    starting = 0.3 * torch.randn(half).sign()
    for token, number in vocabulary.items():
        spaced = vocabulary.get(f"Ġ{token}")
        if spaced is not None and token.isalnum() and len(token) > 1:
            rows[number, _ANSWER + 1 : half] = rows[spaced, _ANSWER + 1 : half]
            rows[number, half:] = starting


def _ids(words: Iterable[str], vocabulary: Mapping[str, int]) -> list[int]:
    forms = (form for word in sorted(words) for form in (word, f"Ġ{word}"))
    return [vocabulary[form] for form in forms if form in vocabulary]


def _start_subjects(attention: torch.nn.Module, config: LlamaConfig, flag: float) -> None:
    """Layer 0: heads of the first group look one and two words back, the others at the nearest subject."""
    head_dim, half = config.head_dim, config.hidden_size // 2
    query, key, value, output = _heads(attention, config)
    query *= 0.05
    key *= 0.05
    key[:, : head_dim // 2, _CONSTANT] = 1.0
    nearest = torch.exp(-(torch.arange(config.max_position_embeddings // 2) - 1) / 4.0)
    nearest[0] = -0.2  # not the word itself
    gain = math.sqrt(head_dim) / flag**2  # from here a score of 1
    for head in range(2):
        query[head, :, _CONSTANT] = 60.0 * gain * _look_back(config, torch.eye(len(nearest))[head + 1])
    for head in range(2, 4):
        query[head, :, _CONSTANT] = 40.0 * gain * _look_back(config, nearest)
        query[head, head_dim // 2 + _SLOW_PAIR, _CONSTANT] += 16.0 * gain
    key[1, head_dim // 2 + _SLOW_PAIR, _SUBJECT] = 1.0
    value[1] = 0.0
    value[1, :, _ANSWER + 1 : half] = torch.linalg.qr(torch.randn(half, half))[0][:, _ANSWER + 1 :]
    output[:2] *= 0.5
    output[:2, :, half:] *= 0.2
    output[2:] = 0.0
    output[2:, :, half:] = 0.75 * torch.eye(half)


def _start_matching(attention: torch.nn.Module, config: LlamaConfig, flag: float) -> None:
    """Layer 1: seek the same subject among words that can answer, and add what is found."""
    head_dim, half = config.head_dim, config.hidden_size // 2
    query, key, value, output = _heads(attention, config)
    for weight in (query, key, value, output):
        weight.normal_(0.0, 0.02)
    quarter = head_dim // 4
    for group in range(2):
        # Only through pairs that turn slowly, so that a match counts the same at any distance.
        match = torch.zeros(head_dim, config.hidden_size)
        directions = torch.linalg.qr(torch.randn(half, half))[0] * math.sqrt(14.0 * math.sqrt(head_dim) / 32)
        match[quarter : 2 * quarter, half:] = directions[:quarter]
        match[3 * quarter :, half:] = directions[quarter : 2 * quarter]
        key[group] += match
        query[2 * group : 2 * group + 2] += match
        key[group, head_dim // 2 + _SLOW_PAIR, _ANSWER] += 1.0
        value[group, :, :half] += torch.eye(half)
    query[:, head_dim // 2 + _SLOW_PAIR, _CONSTANT] += 14.0 * math.sqrt(head_dim) / flag**2
    output[:, :, :half] += 0.5 * torch.eye(half)
    output[:, :, : _ANSWER + 1] = 0.0


def _heads(attention: torch.nn.Module, config: LlamaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of query, key and value weights, (heads, head_dim, hidden), and output, (heads, head_dim, hidden)."""
    query, key, value = (attention.get_parameter(f"{name}_proj.weight") for name in ("q", "k", "v"))
    output = attention.get_parameter("o_proj.weight").T
    width, hidden = config.head_dim, config.hidden_size
    return (
        query.view(-1, width, hidden),
        key.view(-1, width, hidden),
        value.view(-1, width, hidden),
        output.view(-1, width, hidden),
    )


def _look_back(config: LlamaConfig, wanted: Tensor) -> Tensor:
    """Finds a constant query whose score with a constant key has a wanted shape over the distance.

    A query of phase p and a key of phase 0 in one rotary pair of frequency f score cos(distance * f + p), so a
    shape is fitted as a sum of cosines and sines (least squares, near distances weighing most).

    Args:
        config: For the frequencies.
        wanted: The score per distance, (distances,).

    Returns:
        The query, (head_dim,), for a key of ones in its first half and zeros in its second.
    """
    pairs = config.head_dim // 2
    theta = float(config.rope_parameters["rope_theta"])
    frequencies = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    distances = torch.arange(len(wanted), dtype=torch.float64)
    angles = distances[:, None] * frequencies
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], 1)
    weights = torch.full_like(distances, 0.3)
    weights[:40] = 3.0
    weights[:12] = 10.0
    weighted = waves.T * weights
    fitted = torch.linalg.solve(weighted @ waves + _RIDGE * torch.eye(2 * pairs), weighted @ wanted.double())
    return torch.cat([fitted[:pairs], -fitted[pairs:]]).float()
