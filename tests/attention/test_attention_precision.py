"""The error of bf16 attention does not grow with the ring: against one kernel call, both against fp64."""

import pytest
from varlen_cases import FLASH_VARLEN, NAIVE_VARLEN

from longctx.attention.kernels import CPU_FLASH, NAIVE, Kernel
from longctx.bench.precision import RING_SIZES, error_curve, error_growth, table


@pytest.mark.parametrize(
    ("kernel", "bound"),
    # The naive kernel hands out fp32 parts, the flash kernels bf16 ones: these are rounded once per block.
    [(NAIVE, 1.1), (NAIVE_VARLEN, 1.1), (CPU_FLASH, 1.35), (FLASH_VARLEN, 1.35)],
    ids=lambda x: getattr(x, "name", ""),
)
def test_error_stays_within_its_bound_at_every_ring_size(kernel: Kernel, bound: float, seed: int) -> None:
    rows = error_growth(kernel, (1, 2, 8, 32), length=384, heads=2, kv_heads=1, seed=seed)
    assert [row.ranks for row in rows] == [1, 2, 8, 32]
    assert max(row.worst for row in rows) <= bound, rows


@pytest.mark.tier2
@pytest.mark.parametrize(("kernel", "bound"), [(NAIVE, 1.1), (CPU_FLASH, 1.35)], ids=lambda x: getattr(x, "name", ""))
def test_the_published_curve(kernel: Kernel, bound: float, seed: int) -> None:
    rows = error_growth(kernel, seed=seed)
    assert [row.ranks for row in rows] == list(RING_SIZES) and max(row.worst for row in rows) <= bound


def test_the_curve_is_plain_values_and_a_line_each() -> None:
    curve = error_curve((CPU_FLASH,), (1, 2))
    assert [list(row) for row in curve] == [["kernel", "ranks", "out", "dq", "dk", "dv"]] * 2
    lines = table(curve)
    assert len(lines) == 4 and lines[3].startswith("| cpu_flash | 2 | 1.")
