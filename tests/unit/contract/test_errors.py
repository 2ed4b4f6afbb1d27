"""The one table of errors: every row there and back, with its details."""

import grpc
import pytest

from pawl.errors import (
    ERROR_CLASSES,
    FieldViolation,
    PawlError,
    error_class_for_code,
    error_class_for_status,
)
from pawl.status import MAX_VIOLATIONS, from_status, to_grpc_status, to_status


@pytest.mark.parametrize("error_class", ERROR_CLASSES)
def test_every_row_survives_the_wire(error_class: type[PawlError]) -> None:
    sent = error_class(
        "what, value, limit, remedy",
        reason="SOME_REASON",
        request_id="r-1",
        violations=[FieldViolation("sampling.top_p", "must be in (0, 1]; got 3")],
        metadata={"limit": "1"},
        retry_after=1.25,
    )
    received = from_status(to_status(sent))
    assert type(received) is error_class
    assert (received.message, received.reason, received.request_id) == (sent.message, "SOME_REASON", "r-1")
    assert received.violations == sent.violations
    assert received.metadata == sent.metadata
    assert received.retry_after == pytest.approx(1.25)
    assert to_grpc_status(sent).code is error_class.status


@pytest.mark.parametrize("error_class", ERROR_CLASSES)
def test_code_and_status_name_one_class(error_class: type[PawlError]) -> None:
    assert error_class_for_code(error_class.code) is error_class
    assert error_class_for_status(error_class.status) is error_class


def test_codes_and_statuses_are_unique() -> None:
    assert len({error.code for error in ERROR_CLASSES}) == len(ERROR_CLASSES)
    assert len({error.status for error in ERROR_CLASSES}) == len(ERROR_CLASSES)


def test_a_status_outside_the_table_is_a_server_error() -> None:
    assert error_class_for_status(grpc.StatusCode.DATA_LOSS).code == "internal"
    assert error_class_for_code("no such code").code == "internal"


def test_violations_are_capped_so_that_trailers_fit() -> None:
    violations = [FieldViolation(f"f{n}", "wrong") for n in range(100)]
    received = from_status(to_status(PawlError("many", violations=violations)))
    assert len(received.violations) == MAX_VIOLATIONS
