"""The mixers that a config may name, and which layer uses which. Imports no torch: classes are named, not loaded."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

MIXER_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "softmax": "longctx.mixers.softmax.SoftmaxMixer",
        "yoco": "longctx.mixers.yoco.YocoMixer",
        "gated_retention": "longctx.mixers.gated_retention.GatedRetentionMixer",
        "conv": "longctx.mixers.conv.LightConvMixer",
        "rwkv7": "longctx.mixers.rwkv7.RWKV7Mixer",
        "fast": "longctx.mixers.fast.FastMixer",
        "lln": "longctx.mixers.lln.LLNMixer",
        "mega": "longctx.mixers.mega.MegaMixer",
        "ttt": "longctx.mixers.ttt.TTTMixer",
        "gated_delta": "longctx.mixers.gated_delta.GatedDeltaMixer",
        "agalite": "longctx.mixers.agalite.AgaliteMixer",
        "transformer_vq": "longctx.mixers.transformer_vq.TransformerVQMixer",
        "block_recurrent": "longctx.mixers.block_recurrent.BlockRecurrentMixer",
        "transformer_xl": "longctx.mixers.transformer_xl.TransformerXLMixer",
        "nats": "longctx.mixers.nats.NatsMixer",
    }
)
"""The registry: what ``model.mixer`` and ``model.layers`` may name, and the class that it stands for."""

MIXER_NAMES = tuple(MIXER_CLASSES)

_ROTARY = frozenset(
    {"softmax", "yoco", "gated_retention", "fast", "mega", "ttt", "transformer_vq", "block_recurrent", "nats"}
)
_SOFTMAX = frozenset({"softmax"})

READERS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        **dict.fromkeys(("qkv_bias", "o_bias", "qk_norm", "sliding_window", "window_layers"), _SOFTMAX),
        "num_kv_heads": frozenset({"softmax", "yoco", "nats"}),
        "rope": _ROTARY,
    }
)
"""Keys of the model section that only some of the mixers above read."""


def unread(mixers: Iterable[str]) -> dict[str, str]:
    """Keys that none of ``mixers`` reads, and why; a mixer that is not ours may read all."""
    used = set(mixers)
    if not used <= _KNOWN:
        return {}
    return {
        key: f"no layer is one of the mixers that read it: {', '.join(sorted(readers))}"
        for key, readers in READERS.items()
        if not used & readers
    }


_KNOWN = _ROTARY | {"conv", "rwkv7", "gated_delta", "agalite", "lln", "transformer_xl"}

_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|\d+|[\[\],*])")


def parse_layers(pattern: Any) -> Any:
    """``[a*3, b] * 2``, as text or (without the last factor) as a list, as one name per layer.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(pattern, list | tuple):
        pattern = ", ".join(str(item) for item in pattern)
    if not isinstance(pattern, str):
        raise ValueError("layers should be like [gated_retention*3, softmax] * 6")
    tokens, position = [], 0
    while pattern[position:].strip():
        match = _TOKEN.match(pattern, position)
        if match is None:
            raise ValueError(f"layers {pattern!r}: cannot read {pattern[position:].strip()!r}")
        tokens.append(match.group(1))
        position = match.end()
    names = _items(pattern, tokens)
    if tokens or not names:
        raise ValueError(f"layers {pattern!r}: nothing fits before {tokens[0]!r}" if tokens else "layers is empty")
    return tuple(names)


def _items(pattern: str, tokens: list[str]) -> list[str]:
    """Names separated by commas, each with an optional factor, up to the end or a closing bracket."""
    found = _item(pattern, tokens)
    while tokens and tokens[0] == ",":
        tokens.pop(0)
        found += _item(pattern, tokens)
    return found


def _item(pattern: str, tokens: list[str]) -> list[str]:
    head = tokens.pop(0) if tokens else ""
    if head == "[":
        names = _items(pattern, tokens)
        if not tokens or tokens.pop(0) != "]":
            raise ValueError(f"layers {pattern!r}: a bracket is not closed")
    elif head.isidentifier():
        names = [head]
    else:
        raise ValueError(f"layers {pattern!r}: a name or a bracket should stand at {head or 'the end'!r}")
    if tokens and tokens[0] == "*":
        tokens.pop(0)
        count = tokens.pop(0) if tokens else ""
        if not count.isdigit() or not int(count):
            raise ValueError(f"layers {pattern!r}: a whole number above 0 should follow *, not {count or 'the end'!r}")
        names = names * int(count)
    return names
