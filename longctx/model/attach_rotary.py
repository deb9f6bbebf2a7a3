"""Rotary types whose frequencies depend on the length take the global length, not that of this rank's shard.

transformers derives the length from the largest position it is given. The positions of an attached model know the
global length; a rotary module sees it as one more token at the very end, whose angles are dropped again.

Legend: B batch, T local tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longctx.errors import UnsupportedError

_LENGTH_DEPENDENT = ("dynamic", "longrope")
_MARK = "longctx_length"


def mark_positions(positions_BT: Tensor, length: int) -> Tensor:
    """The same positions, knowing that they belong to a sequence of ``length`` global tokens."""
    marked_BT = positions_BT.view_as(positions_BT)  # a cached tensor of the context stays unmarked
    setattr(marked_BT, _MARK, length)
    return marked_BT


def length_of(positions_BT: Tensor) -> int | None:
    """Global length of marked positions; None for others."""
    length: int | None = getattr(positions_BT, _MARK, None)
    return length


def length_dependent(module: nn.Module) -> bool:
    """Whether a module computes rotary frequencies from the length."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, Mapping) else (kind,)
    return any(isinstance(k, str) and any(name in k for name in _LENGTH_DEPENDENT) for k in kinds)


def hook_rotary(model: nn.Module) -> list[Any]:
    """Hook every length-dependent rotary module; returns the handles that undo it."""
    handles: list[Any] = []
    for module in filter(length_dependent, model.modules()):
        handles.append(module.register_forward_pre_hook(_lengthen, with_kwargs=True))
        handles.append(module.register_forward_hook(_shorten, with_kwargs=True))
    return handles


def _lengthen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    positions_BT = _positions(args, kwargs)
    length = None if positions_BT is None else length_of(positions_BT)
    if positions_BT is None or length is None:
        return None
    _forget_longest(module)
    last_B1 = positions_BT.new_full((positions_BT.shape[0], 1), length - 1)
    longer = mark_positions(torch.cat((positions_BT, last_B1), dim=1), length)
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": longer}
    return tuple(longer if a is positions_BT else a for a in args), kwargs


def _shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    longer = _positions(args, kwargs)  # hooks after a forward see what the hooks before it made of its arguments
    if longer is None or length_of(longer) is None:
        return output
    tokens = longer.shape[1] - 1

    def cut(angles: Tensor) -> Tensor:
        if angles.dim() < 2 or angles.shape[1] != tokens + 1:
            raise UnsupportedError(
                f"{type(module).__name__} returns angles of shape {tuple(angles.shape)} for {tokens + 1} tokens; "
                "its length-dependent rotary type is not supported, use another rope_type"
            )
        return angles[:, :tokens]

    return tuple(cut(t) for t in output) if isinstance(output, tuple) else cut(output)


def _positions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    found = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    return found if isinstance(found, Tensor) else None


def _forget_longest(module: nn.Module) -> None:
    """Dynamic scaling would keep the frequencies of the longest sequence so far; we want those of this one."""
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, 0)
