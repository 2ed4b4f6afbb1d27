"""Log-probabilities, ranks and best alternatives of given tokens, from untouched logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pawl_workers.plan import TokenLogprobs

__all__ = ["describe_tokens"]


def describe_tokens(scores: Tensor, token_ids: Sequence[int], num_alternatives: Sequence[int]) -> list[TokenLogprobs]:
    """Describe one token per row of logits.

    Args:
        scores: logits, [N, V].
        token_ids: the token of each row.
        num_alternatives: how many best tokens to list for each row; among equals the lower ids.

    Returns:
        Natural log-probabilities under the softmax of the logits in float32. The rank is one more than the
        number of tokens with a higher logit.
    """
    scores = scores.float()
    logprobs = torch.log_softmax(scores, dim=-1)  # a row at a time: no row's bits depend on another
    index = torch.tensor(token_ids, device=scores.device).unsqueeze(1)
    chosen = logprobs.gather(1, index).squeeze(1).tolist()
    ranks = ((scores > scores.gather(1, index)).sum(dim=-1) + 1).tolist()
    described = []
    for row, (token_id, count) in enumerate(zip(token_ids, num_alternatives, strict=True)):
        best = _best_ids(scores[row], min(count, scores.shape[1])) if count > 0 else None
        described.append(
            TokenLogprobs(
                token_id=token_id,
                logprob=chosen[row],
                rank=ranks[row],
                alternative_ids=[] if best is None else best.tolist(),
                alternative_logprobs=[] if best is None else logprobs[row, best].tolist(),
            )
        )
    return described


def _best_ids(scores: Tensor, count: int) -> Tensor:
    # topk leaves open which of several equal tokens it takes, so only its threshold is used.
    threshold = scores.topk(count).values[-1]
    ids = (scores >= threshold).nonzero().squeeze(1)
    order = scores[ids].sort(descending=True, stable=True).indices
    return ids[order[:count]]
