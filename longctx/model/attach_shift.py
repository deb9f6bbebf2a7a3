"""Decoder layers of an attached model report how much they change a token, for scorers that keep tokens by it.

A layer's attention and its module called ``mlp`` are hooked, and the layer itself, which must add to its input what
these two gave and nothing else: norms behind a branch or scaled residuals are refused where they show.

Legend: B batch, T new tokens, D model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longctx.errors import UnsupportedError

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_COARSE = 5e-2


@contextmanager
def reporting(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block layers tell the caches that a forward is given; unless it is not wanted.

    Raises:
        UnsupportedError: a layer has no ``mlp``; in a forward: it adds something else than its two branches.
    """
    handles: list[Any] = []
    try:
        for index, layer, attention in _layers(model) if wanted else ():
            parts: dict[str, Tensor] = {}
            for name, module in (("attention", attention), ("mlp", layer.mlp)):
                handles.append(module.register_forward_hook(partial(_keep, parts, name)))
            handles.append(layer.register_forward_hook(partial(_tell, parts, index), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> list[tuple[int, Any, nn.Module]]:
    """Number, decoder layer and attention of every layer."""
    config: Any = model.config
    wanted = set(range(config.get_text_config(decoder=True).num_hidden_layers))
    found: list[tuple[int, Any, nn.Module]] = []
    for layer in model.modules():
        mlp = getattr(layer, "mlp", None)
        for child in layer.children() if isinstance(mlp, nn.Module) else ():
            index = getattr(child, "layer_idx", None)
            if isinstance(index, int) and child is not mlp:
                found.append((index, layer, child))
    if {index for index, _, _ in found} != wanted or len(found) != len(wanted):
        raise UnsupportedError(
            f"layers of {type(model).__name__} do not have one attention that knows its number beside a module called "
            "mlp, which would report how much tokens change; use another scorer than RepresentationShift"
        )
    return found


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _keep(parts: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    parts[name] = _first(output)


def _tell(
    parts: dict[str, Tensor], index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> None:
    caches = kwargs.get("longctx_caches")
    if caches is None:
        return
    before_BTD, after_BTD = args[0] if args else kwargs["hidden_states"], _first(output)
    mixed_BTD, added_BTD = (parts.pop(name).view_as(before_BTD) for name in ("attention", "mlp"))
    other = (after_BTD - before_BTD - mixed_BTD - added_BTD).norm()
    if bool(other > _TOLERANCE.get(after_BTD.dtype, _COARSE) * after_BTD.norm()):
        raise UnsupportedError(
            f"{type(layer).__name__} adds something else to its tokens than its attention and its mlp give, such as "
            "their norm, so these do not tell how much tokens change; use another scorer than RepresentationShift"
        )
    caches.told(index, mixed_BTD, added_BTD)
