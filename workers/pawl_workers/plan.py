"""StepPlan and StepResult: all that a worker is told, and all that it answers.

Plain data that survives a socket (`encode`, `decode_plan`, `decode_result`); imports no torch. A plan is a
diff: a sequence is sent whole once (`NewSequence`), afterwards the worker keeps its tokens in a row of its
own table and the plan names the row. Whether a row samples is not said: it does when the step reaches the
last token the worker knows of the sequence, and the sampled token is then appended to the row.

A row may be given drafts, guesses of what it will sample. They are computed with it and sampled after, each position
with the noise that is its own, and those that turn out to be what was sampled are accepted: the row gives several
tokens at once, the same that it gives one by one.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "LEAST_SAMPLES",
    "NewSequence",
    "PromptLogprobs",
    "RowFailure",
    "SamplingSpec",
    "StepPlan",
    "StepResult",
    "TokenLogprobs",
    "decode_plan",
    "decode_result",
    "encode",
]


LEAST_SAMPLES = 64
"""Positions that every worker can sample in a step, however few rows it has."""


class SamplingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token of one sequence is chosen. Every value is final: no default is filled in later.

    The order of operations is: repetition, presence and frequency penalties, logit bias, suppression of
    `suppressed_ids`, the step's mask of allowed tokens, temperature, then top-k, top-p and min-p on the tempered
    distribution, then the draw. Repetition counts the tokens of prompt and output; presence and frequency count those
    of the output, which are all after `num_prompt_tokens`, whoever generated them. Log-probabilities are those of the
    untouched logits.
    """

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0  # key of the counter-based noise: one draw per (seed, position)
    min_output_tokens: int = 0  # until then `suppressed_ids` are never chosen
    suppressed_ids: tuple[int, ...] = ()  # end-of-text and stop ids, for min_output_tokens
    logprobs: int = -1  # -1 = none, 0 = the chosen token, n = also the n best


class NewSequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sequence the worker does not know (new, or resumed after a preemption), sent whole."""

    row: int  # row of the worker's table, in [0, max_running)
    token_ids: list[int]  # prompt, then the output so far
    num_prompt_tokens: int
    num_computed: int  # tokens whose KV is in `block_ids` already (prefix cache)
    block_ids: list[int]  # enough for num_computed plus this step's grant
    sampling: SamplingSpec
    prompt_logprobs: int = -1  # -1 = none, n = log-probabilities of prompt tokens with n alternatives
    prompt_logprobs_from: int = 1  # first prompt position wanted
    samples: bool = True  # False: prompt log-probabilities only, nothing is sampled


class StepPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step. The worker applies it in this order: free, add, append blocks, swap out, swap in, run, copy.

    `rows[i]` computes its next `num_tokens[i]` tokens. Rows are distinct; every grant is at least 1. The grant of a row
    with drafts ends with the last of them. At most max(max_running, LEAST_SAMPLES) positions are sampled. A sequence
    may be added without being computed: one that is forked from a row of this step begins in a later one.
    No block is written twice by the moves of one plan, and no copy reads what another copy writes.
    """

    step: int  # counts up by one; a worker refuses another number
    epoch: int  # incarnation of the replica; a worker refuses another one
    freed_rows: list[int]
    new: list[NewSequence]
    append_blocks: list[tuple[int, list[int]]]  # (row, block ids), for rows already known
    rows: list[int]
    num_tokens: list[int]
    copies: list[tuple[int, int]] = []  # (source, destination), after the run: partial blocks of forked sequences
    swap_out: list[tuple[int, int]] = []  # (block, host block): cached blocks that are about to be overwritten
    swap_in: list[tuple[int, int]] = []  # (host block, block)
    drafts: list[tuple[int, list[int]]] = []  # (row, token ids): guesses of the tokens after the last one known


class TokenLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-probability (natural), rank (1 = best) and best alternatives at one position."""

    token_id: int
    logprob: float
    rank: int
    alternative_ids: list[int]
    alternative_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-probabilities of consecutive prompt tokens of one row."""

    row: int
    first_position: int
    positions: list[TokenLogprobs]


class RowFailure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row whose result cannot be used (such as logits that are not finite). Fails that sequence alone."""

    row: int
    message: str
    field: str = ""  # of the request, where that is at fault


class StepResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one step gave: a token for each row that sampled, in the order of the plan's rows.

    A row with drafts stands there once for each token: the drafts that were accepted, which is as many of the first as
    are what was sampled, and the token sampled after them. The KV of its other drafts counts as not computed. If it is
    neither there nor in `failures`, nothing that was computed of it counts: its drafts broke the step for it.
    """

    step: int
    epoch: int
    rows: list[int]
    token_ids: list[int]  # parallel to `rows`
    logprobs: list[TokenLogprobs | None]  # empty when no row asked, else parallel to `rows`
    prompt_logprobs: list[PromptLogprobs]
    failures: list[RowFailure]  # rows that are in neither `rows` nor `prompt_logprobs`
    prepare_s: float  # building the batch, seconds
    forward_s: float  # stages up to the logits, seconds
    sample_s: float  # sampling and log-probabilities, seconds


_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_result_decoder = msgspec.msgpack.Decoder(StepResult)


def encode(frame: StepPlan | StepResult) -> bytes:
    """Encode a frame as MessagePack."""
    return _encoder.encode(frame)


def decode_plan(data: bytes) -> StepPlan:
    """Decode and type-check a plan.

    Raises:
        msgspec.DecodeError: the bytes are not a StepPlan.
    """
    return _plan_decoder.decode(data)


def decode_result(data: bytes) -> StepResult:
    """Decode and type-check a result.

    Raises:
        msgspec.DecodeError: the bytes are not a StepResult.
    """
    return _result_decoder.decode(data)
