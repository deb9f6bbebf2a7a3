"""Integers as people write them: ``128k`` is 128,000, ``1Mi`` is 1,048,576, ``1_000`` and ``2^20`` work too."""

import re
from typing import Any

_SUFFIXES = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_NUMBER = re.compile(r"([0-9][0-9_]*)(\.[0-9]+)?\s*([a-zA-Z]*)")
_POWER = re.compile(r"([0-9]+)\s*(?:\^|\*\*)\s*([0-9]+)")


def parse_int(value: Any) -> Any:
    """Turn ``"128k"`` into 128000; what is no string is handed back unchanged for pydantic to judge.

    Raises:
        ValueError: the text is not a whole number in any accepted form.
    """
    if isinstance(value, bool):
        raise ValueError("expected a whole number, got true/false")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if power := _POWER.fullmatch(text):
        return int(power[1]) ** int(power[2])
    match = _NUMBER.fullmatch(text)
    if match is None or match[3].lower() not in _SUFFIXES:
        raise ValueError(f"{value!r} is not a whole number; write for example 4096, 4_096, 128k, 1Mi or 2^20")
    number, fraction = match[1].replace("_", ""), match[2] or ""
    digits = len(fraction) - 1 if fraction else 0
    scaled, rest = divmod(int(number + fraction[1:]) * _SUFFIXES[match[3].lower()], 10**digits)
    if rest:
        raise ValueError(f"{value!r} is not a whole number")
    return scaled
