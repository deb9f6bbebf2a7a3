"""What communicates inside a region whose activations are recomputed: it runs once, the second pass takes its result.

The region runs twice, first without gradients, then with (``torch.utils.checkpoint`` with ``use_reentrant=True``). Both
passes are given one context that carries the same :class:`Kept`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Operands = tuple[Tensor | None, ...]
Results = tuple[Tensor, ...]


@dataclass(eq=False)
class Kept:
    """What was computed in the first of two passes through a recomputed region, in order."""

    results: list[tuple[Operands, Results]] = field(default_factory=list)


def run_once(function: Callable[..., Results], operands: Operands, kept: Kept | None) -> Results:
    """``function(*operands)``; inside a recomputed region its first result, connected to the operands of the second.

    Raises:
        RuntimeError: the second pass calls it more often than the first.
    """
    if kept is None:
        return function(*operands)
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            leaves = tuple(None if t is None else t.detach().requires_grad_() for t in operands)
            results = function(*leaves)
        kept.results.append((leaves, results))
        return tuple(t.detach() for t in results)
    if not kept.results:
        raise RuntimeError("a region is recomputed that was never computed; use one fresh Kept per region and pass")
    replayed: Results = _Replay.apply([kept.results.pop(0)], *operands)  # type: ignore[no-untyped-call]
    return replayed


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: list[tuple[Operands, Results]], *operands: Tensor | None) -> Results:
        # The results come inside a list: as arguments of their own, autograd would run their backward a second time.
        ctx.leaves, ctx.results = first[0]
        return tuple(t.detach() for t in ctx.results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = [t for t in ctx.leaves if t is not None]
        found = iter(torch.autograd.grad(ctx.results, given, gradients, allow_unused=True))
        ctx.results = None
        return (None, *(None if t is None else next(found) for t in ctx.leaves))
