"""A small decoder of every registered mixer, of every recurrence, and of layers over blocks, for training runs."""

from typing import Any

from small_mixers import small_options

from longctx.mixers import MIXERS


def two_layers(name: str) -> dict[str, Any]:
    """A decoder of one mixer, in a small size where it has one, and with the start of a default config.

    From ten times larger weights AGaLiTe's and TTT's gradients are known to fp32 no better than to 1e-4, on one rank.
    """
    options = small_options(name)
    return {"mixer": name, "init_std": 0.02, "mixer_options": {name: options} if options else {}}


SMALL: dict[str, dict[str, Any]] = {
    "pattern": {"layers": "[gated_retention, softmax, conv] * 2", "init_std": 0.05},
    "rmt": {"recurrence": {"kind": "rmt", "segment": 11, "memory": 3, "curriculum": ((0, 1), (1, 2), (3, 4))}},
    "armt": {"recurrence": {"kind": "armt", "segment": 11, "memory": 3, "keys": 16, "bptt": 2}},
    "wavefront": {"recurrence": {"kind": "armt", "segment": 11, "memory": 3, "keys": 16, "wavefront": True}},
}
LARGE: dict[str, dict[str, Any]] = {
    "kv_bias": {"mixer": "softmax", "init_std": 0.05, "mixer_options": {"softmax": {"kv_bias": True}}},
    "block": {"layers": "[softmax, gated_retention]", "block": {"size": 4, "layers": 2}, "init_std": 0.05},
    "sharing": {
        # Two memories in one decoder: the first layer's values, and keys that are gathered once.
        "layers": "[rwkv7, yoco] * 2", "init_std": 0.05,
        "mixer_options": {"rwkv7": {"chunk": 4}, "yoco": {"kv": "gathered"}},
    },
}  # fmt: skip

MODELS = {**{name: two_layers(name) for name in MIXERS}, **LARGE, **SMALL}
