"""The progress line and the number formats behind it (law 11: every number shown is tested)."""

import math

import pytest

from longctx.report import units
from longctx.report.terminal import step_line

RECORD = {
    "kind": "train", "step": 120, "loss": 3.2141, "grad_norm": 0.8123, "lr": 3e-4, "tokens": 1_000_000,
    "tokens_per_second": 41_234.0, "mfu": None, "peak_memory": 1_310_000_000, "seconds": 0.5, "eta": 8075.0,
    "data_hash": 1, "skipped": False, "time": 0.0,
}  # fmt: skip


def test_step_line_shows_every_number() -> None:
    expected = (
        "step 120/5000 2.4% | loss 3.214 | gnorm 0.81 | lr 3.0e-4 | 41.2k tok/s | mfu n/a | mem 1.3 GB | eta 2h14m"
    )
    assert step_line(RECORD, 5000) == expected


def test_step_line_with_known_mfu_and_a_skipped_step() -> None:
    line = step_line(RECORD | {"mfu": 0.4312, "skipped": True, "loss": math.nan, "grad_norm": math.inf}, 120)
    assert line == (
        "step 120/120 100.0% | loss nan | gnorm inf | lr 3.0e-4 | 41.2k tok/s | mfu 43.1% | mem 1.3 GB | eta 2h14m"
        " | skipped"
    )


def test_step_line_with_nothing_known() -> None:
    assert step_line({"step": 1}, 3) == (
        "step 1/3 33.3% | loss n/a | gnorm n/a | lr n/a | n/a tok/s | mfu n/a | mem n/a | eta n/a"
    )


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"), (7, "7"), (999, "999"), (999.4, "999"), (999.6, "1.00k"), (1000, "1.00k"), (9996, "10.0k"),
        (41_234, "41.2k"), (999_600, "1.00M"), (1_048_576, "1.05M"),
        (2.5e12, "2.50T"), (0.5, "0.500"), (-1500, "-1.50k"),
        (None, "n/a"), (math.nan, "n/a"), (math.inf, "n/a"),
    ],
)  # fmt: skip
def test_count(value: float | None, text: str) -> None:
    assert units.count(value) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0 B"), (512, "512 B"), (1000, "1.0 kB"), (99.96e6, "100 MB"), (412.3e6, "412 MB"), (999.6e6, "1.0 GB"),
        (1.31e9, "1.3 GB"), (79.3e9, "79.3 GB"), (None, "n/a"),
    ],
)  # fmt: skip
def test_memory(value: float | None, text: str) -> None:
    assert units.memory(value) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (8075, "2h14m"), (86_399, "23h59m"),
        (86_400, "1d00h"), (442_800, "5d03h"), (-1, "n/a"), (None, "n/a"), (math.inf, "n/a"),
    ],
)  # fmt: skip
def test_duration(value: float | None, text: str) -> None:
    assert units.duration(value) == text


def test_percent_reaches_one_hundred_only_at_the_end() -> None:
    assert units.percent(4999, 5000) == "99.9%"
    assert units.percent(99_999, 100_000) == "99.9%"
    assert units.percent(5000, 5000) == "100.0%"
    assert units.percent(0, 7) == "0.0%"
    assert units.percent(0, 0) == "n/a"


@pytest.mark.parametrize(
    "value, text", [(3e-4, "3.0e-4"), (9.96e-4, "1.0e-3"), (1.0, "1.0e0"), (0.0, "0"), (None, "n/a"), (2e10, "2.0e10")]
)
def test_scientific(value: float | None, text: str) -> None:
    assert units.scientific(value) == text
