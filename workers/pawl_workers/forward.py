"""START READING HERE: the forward pass, the chain of dot products from token ids to the next token.

One function for every model family; what differs lies in the weights' flags. It knows no plans and no rows:
`batch` says which tokens lie where, `cache` holds what earlier steps computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.kv_cache import KvCache
from pawl_workers.model.weights import Weights
from pawl_workers.plan import PromptLogprobs
from pawl_workers.stages.attention import attend
from pawl_workers.stages.embed import embed
from pawl_workers.stages.logits import adjust, logits
from pawl_workers.stages.mlp import mlp
from pawl_workers.stages.norm import norm
from pawl_workers.stages.residual import add
from pawl_workers.stages.sample import Sampled, chosen, sample
from pawl_workers.stages.score import score

__all__ = ["StepOutput", "choose", "compute", "finish", "forward"]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step found: sampled tokens, scored prompts, and the stream after the last layer, [T, D].

    Rows that are neither sampled from nor scored may stand in it as they were before that layer: finite only where the
    keys and values are that they wrote.
    """

    sampled: Sampled
    prompts: list[PromptLogprobs]
    stream: Tensor


def forward(batch: Batch, weights: Weights, cache: KvCache) -> StepOutput:
    """Run one step. Writes the new tokens' keys and values into `cache`; changes nothing else."""
    return finish(*compute(batch, weights, cache), batch, weights)


def compute(batch: Batch, weights: Weights, cache: KvCache) -> tuple[Tensor, Tensor]:
    """Give the stream after the last layer, [T, D], as in `StepOutput`, and the logits of the rows that sample, [S, V].

    Where the backend has compiled the layers into a program, that does what the loop does, with the same bits; and one
    that goes on to the head does the first and the last line too.
    """
    if cache.scoring is not None and batch.last.shape[0] == batch.token_ids.shape[0]:  # a step of decodes
        x, scores = cache.scoring.run_through_head(batch)
        return x, adjust(scores, weights.head)
    x = embed(batch, weights.embedding)  # [T, D]  token -> vector
    if cache.program is not None:
        x = cache.program(x, batch)
    for layer, w in enumerate(weights.layers if cache.program is None else ()):
        normed = norm(x, w.attention_norm)
        found = attend(normed, w.attention, cache[layer], batch)  # queries meet keys
        if w.parallel:  # features ignite, on the same stream; one norm may serve both
            fired = mlp(normed if w.mlp_norm is None else norm(x, w.mlp_norm), w.mlp)
            x = add(add(x, found, w.residual_scale), fired, w.residual_scale)
            continue
        x = add(x, norm(found, w.attention_output_norm), w.residual_scale)
        fired = mlp(norm(x, w.mlp_norm), w.mlp)  # features ignite
        x = add(x, norm(fired, w.mlp_output_norm), w.residual_scale)
    return x, logits(norm(batch.samples(x), weights.final_norm), weights.head)  # [S, V]  every direction is scored


def choose(batch: Batch, weights: Weights, cache: KvCache) -> StepOutput | None:
    """Run a step of which nothing but the best token of each sample is wanted, without computing all logits.

    Gives the tokens that `forward` gives, which are not masked. Writes the new tokens' keys and values into `cache`.

    Returns:
        None where more is wanted, or where the backend cannot; then nothing has been computed.
    """
    scoring = cache.scoring
    if scoring is None or not scoring.chooses or not batch.sampling.greedy:
        return None
    x, token_ids = scoring.run_through_choice(batch)
    prompts = score(x, weights.final_norm, weights.head, batch)
    return StepOutput(chosen(token_ids), prompts, x)


def finish(x: Tensor, scores: Tensor, batch: Batch, weights: Weights) -> StepOutput:
    """Score prompts where log-probabilities are wanted, and choose one token for each row that samples."""
    prompts = score(x, weights.final_norm, weights.head, batch)
    return StepOutput(sample(scores, batch.sampling), prompts, x)  # [S]  one token is chosen
