"""Seeds of samples: fixed for ever, since answers name the request's seed alone."""

from __future__ import annotations

import pytest

from pawl.seeds import derive_seed


def test_the_first_sample_has_the_seed_of_the_request() -> None:
    assert derive_seed(42, 0) == 42


@pytest.mark.parametrize(
    ("seed", "index", "wanted"),
    [
        (42, 1, 0x18279C55BC51F20C >> 1),  # printf 'pawl sample seed\0\0\0\0\0\0\0\x2a\0\0\0\0\0\0\0\x01' | sha256sum
        (42, 2, 1157520812492611161),
        (2**63 - 1, 15, 5418761072501938070),
    ],
)
def test_the_others_have_digests_that_never_change(seed: int, index: int, wanted: int) -> None:
    assert derive_seed(seed, index) == wanted


def test_no_two_are_alike_and_all_are_seeds() -> None:
    seeds = {derive_seed(seed, index) for seed in range(1, 200) for index in range(1, 16)}
    assert len(seeds) == 199 * 15
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**63, 1), (0, -1), (0, 2**63)])
def test_what_is_no_seed_or_index_is_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 2\^63\)"):
        derive_seed(seed, index)
