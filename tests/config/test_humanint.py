"""Integers as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.config.humanint import parse_int


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("4_096", 4096),
        ("128k", 128_000),
        ("128K", 128_000),
        ("1Mi", 2**20),
        ("64 Ki", 2**16),
        ("1.5k", 1500),
        ("0.25Mi", 2**18),
        ("2G", 2 * 10**9),
        ("7b", 7 * 10**9),
        ("1Ti", 2**40),
        ("2^20", 2**20),
        ("2**10", 1024),
        (" 12 ", 12),
    ],
)
def test_accepted_forms(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "4kk", "1.0001k", "1,000", "-", "2^", "0x10", "1e3x", "1.5", "NaN"])
def test_refused_forms(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_int(text)


def test_truth_values_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="true/false"):
        parse_int(True)


def test_whole_floats_are_numbers_and_others_are_left_to_pydantic() -> None:
    assert parse_int(3e4) == 30_000
    assert parse_int(1.5) == 1.5
    assert parse_int(None) is None


@given(st.integers(0, 10**6), st.sampled_from([("k", 10**3), ("Mi", 2**20), ("g", 10**9)]))
def test_suffix_multiplies(number: int, suffix: tuple[str, int]) -> None:
    assert parse_int(f"{number}{suffix[0]}") == number * suffix[1]
