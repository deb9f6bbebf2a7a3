"""Sequence mixers by name. To add one: write a :class:`Mixer` and name its class in ``longctx.config.mixers``."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from longctx.config.mixers import MIXER_CLASSES
from longctx.mixers.base import Mixer, StateSize


def _loaded(path: str) -> type[Mixer]:
    module, _, name = path.rpartition(".")
    found: type[Mixer] = getattr(import_module(module), name)
    return found


MIXERS: Mapping[str, type[Mixer]] = MappingProxyType({name: _loaded(path) for name, path in MIXER_CLASSES.items()})

__all__ = ["MIXERS", "Mixer", "StateSize"]
