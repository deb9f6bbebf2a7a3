"""Options with which mixers fit sequences of a few dozen tokens, so that those are cut into several of their parts."""

from longctx.mixers import MIXERS

SIZES: dict[str, int] = {"chunk": 4, "segment": 5, "memory": 7, "states": 3, "sliding": 3, "tile": 16}


def small_options(mixer: str) -> dict[str, int]:
    """Those of the sizes above that a mixer has."""
    return {key: value for key, value in SIZES.items() if key in MIXERS[mixer].Options.model_fields}
