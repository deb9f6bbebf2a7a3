"""Sequence mixers by name. To add one: write a :class:`Mixer`, list it here; the contract tests find it."""

from collections.abc import Mapping
from types import MappingProxyType

from longctx.mixers.base import Mixer, StateSize
from longctx.mixers.softmax import KVState, SoftmaxMixer

MIXERS: Mapping[str, type[Mixer]] = MappingProxyType({"softmax": SoftmaxMixer})

__all__ = ["MIXERS", "KVState", "Mixer", "SoftmaxMixer", "StateSize"]
