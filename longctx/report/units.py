"""Numbers as people read them: rates, sizes, durations. One rounding rule for terminal, plots and HTML.

Every function answers ``n/a`` for None and for what is not a finite number (losses show ``nan`` and ``inf``).
"""

import math
from collections.abc import Callable

MISSING = "n/a"
_PREFIXES = ("", "k", "M", "G", "T", "P")


def count(value: float | None) -> str:
    """A decimal count with three significant digits: 999, 41.2k, 1.05M."""
    if value is None or not math.isfinite(value):
        return MISSING
    return "".join(_scale(value, _significant))


def memory(value: float | None) -> str:
    """Bytes in decimal units (1 GB = 10^9 bytes): 512 B, 1.3 GB."""
    if value is None or not math.isfinite(value):
        return MISSING
    scaled, prefix = _scale(value, _one_decimal)
    return f"{scaled} {prefix}B"


def duration(seconds: float | None) -> str:
    """Whole seconds as 42s, 3m07s, 2h14m or 5d03h; the last unit is rounded down."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def percent(part: int, total: int) -> str:
    """``part`` of ``total`` in tenths of a percent, rounded down so that 100.0% means done."""
    if total <= 0:
        return MISSING
    tenths = 1000 * part // total
    return f"{tenths // 10}.{tenths % 10}%"


def share(value: float | None) -> str:
    """A fraction as a percentage: 0.431 is 43.1%."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.1f}%"


def scientific(value: float | None) -> str:
    """One digit after the point and no padding in the exponent: 3.0e-4; zero is 0."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def fixed(value: float | None, digits: int) -> str:
    """A plain decimal; nan and inf stay visible because they are news, None is n/a."""
    return MISSING if value is None else f"{value:.{digits}f}"


def _scale(value: float, digits: Callable[[float], str]) -> tuple[str, str]:
    """``value`` over the fitting power of 1000, and that power's prefix.

    The power is chosen after rounding, so 999,600 becomes 1.00M and never 1000k.
    """
    magnitude, step = abs(value), 0
    while step < len(_PREFIXES) - 1 and float(digits(magnitude)) >= 1000:
        magnitude /= 1000
        step += 1
    text = str(int(magnitude)) if step == 0 and magnitude == int(magnitude) else digits(magnitude)
    return ("-" if value < 0 else "") + text, _PREFIXES[step]


def _significant(magnitude: float) -> str:
    return f"{magnitude:#.3g}".rstrip(".")


def _one_decimal(magnitude: float) -> str:
    return f"{magnitude:.1f}" if magnitude < 99.95 else f"{magnitude:.0f}"
