"""Attention inside a region whose activations are recomputed: it runs once, the second pass takes its result.

The region runs twice, first without gradients, then with (``torch.utils.checkpoint`` with ``use_reentrant=True``). Both
passes are given one context that carries the same :class:`longctx.sequence.context.Kept`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.sequence.context import Kept

Operands = tuple[Tensor | None, ...]


def attend_once(attend: Callable[..., Tensor], operands: Operands, kept: Kept) -> Tensor:
    """``attend(*operands)`` in the first pass; in the second its result, connected to the new operands.

    Raises:
        RuntimeError: the second pass calls attention more often than the first.
    """
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            leaves = tuple(None if t is None else t.detach().requires_grad_() for t in operands)
            out = attend(*leaves)
        kept.results.append((leaves, out))
        return out.detach()
    if not kept.results:
        raise RuntimeError("attention is recomputed that was never computed; use one fresh Kept per region and pass")
    result: Tensor = _Replay.apply(kept.results.pop(0), *operands)  # type: ignore[no-untyped-call]
    return result


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: tuple[Operands, Tensor], *operands: Tensor | None) -> Tensor:
        # The result comes inside a tuple: as an argument of its own, autograd would run its backward a second time.
        ctx.leaves, ctx.out = first
        return ctx.out.detach()  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given = [t for t in ctx.leaves if t is not None]
        gradients = iter(torch.autograd.grad(ctx.out, given, dout))
        ctx.out = None
        return (None, *(None if t is None else next(gradients) for t in ctx.leaves))
