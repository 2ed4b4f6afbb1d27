from __future__ import annotations

import msgspec
import pytest

from pawl_server.engine.result_check import BadResultError, check_result
from pawl_workers.plan import StepPlan, StepResult, TokenLogprobs

PLAN = StepPlan(3, 1, [], [], [], rows=[4, 5], num_tokens=[1, 1])
GOOD = StepResult(3, 1, [4, 5], [7, 8], [], [], [], 0.0, 0.0, 0.0)
LOGPROBS = TokenLogprobs(7, -1.0, 1, [], [])


def test_a_result_that_fits_passes() -> None:
    check_result(PLAN, GOOD, vocab_size=10)
    check_result(PLAN, msgspec.structs.replace(GOOD, rows=[5], token_ids=[0]), vocab_size=10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": 2},
        {"epoch": 2},
        {"rows": [4, 6]},
        {"rows": [4, 4]},
        {"token_ids": [7]},
        {"token_ids": [7, 10]},
        {"token_ids": [-1, 7]},
        {"logprobs": [LOGPROBS]},
    ],
)
def test_a_result_that_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadResultError):
        check_result(PLAN, msgspec.structs.replace(GOOD, **wrong), vocab_size=10)


@pytest.mark.parametrize(
    ("rows", "token_ids", "fits"),
    [
        ([4, 5, 5, 5], [1, 8, 9, 3], True),
        ([4, 5, 5], [1, 8, 3], True),
        ([4], [1], True),
        ([5, 4], [1, 1], True),
        ([4, 5, 5], [1, 9, 3], False),
        ([4, 5, 5, 5, 5], [1, 8, 9, 3, 3], False),
        ([5, 4, 5], [8, 1, 9], False),
        ([4, 4, 5], [8, 1, 9], False),
    ],
)
def test_a_row_gives_the_drafts_that_it_had_and_one_token_more(
    rows: list[int], token_ids: list[int], fits: bool
) -> None:
    plan = msgspec.structs.replace(PLAN, num_tokens=[1, 3], drafts=[(5, [8, 9])])
    result = msgspec.structs.replace(GOOD, rows=rows, token_ids=token_ids)
    if fits:
        check_result(plan, result, vocab_size=10)
    else:
        with pytest.raises(BadResultError):
            check_result(plan, result, vocab_size=10)
