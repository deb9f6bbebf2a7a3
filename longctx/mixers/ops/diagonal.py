"""The linear recurrence ``h_t = a_t * h_{t-1} + x_t``, element by element, with every state returned.

Chunks are worked through side by side: one pass over their places finds what each chunk does to a state that enters
it, a scan carries states from chunk to chunk, a second pass computes every state. Nothing is ever divided by a decay,
so any a in [0, 1] is fine; O(T) in time and memory. The gradient is the same recurrence run backwards (Martin and
Cundy, arXiv 1709.04057). A document starts from an empty state.

Legend: B batch, T local tokens, S global tokens, N chunks, C tokens per chunk, ``*`` the shape of a state.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.sequence.chunks import Chunks, chunks_of
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import planned_scan, scan
from longctx.sequence.context import SequenceContext


def diagonal_scan(
    decay: Tensor, x_BT: Tensor, context: SequenceContext, state_B: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Every state [B, T, *] in fp32 (fp64 for fp64), and the one after the last token of all ranks [B, *].

    Args:
        decay: a in [0, 1]: [B, T, ...] with the dimensions of ``x_BT``, any of which may be 1; [1, 1, ...] is constant.
        x_BT: [B, T, *].
        state_B: the state before the first token, [B, *], the same on every rank; None: empty.
        chunk: tokens per chunk; fewer where this rank has fewer.
    """
    chunks = chunks_of(context, min(chunk, max(context.local_length, 1)))
    wide = torch.promote_types(x_BT.dtype, torch.float32)
    decay = decay.to(wide)
    decay = chunks.split(decay) if decay.shape[1] == x_BT.shape[1] else decay[:, None]
    x_BNC, marks = chunks.split(x_BT.to(wide)), _marks(chunks, context, x_BT)
    passing, addition = _Folded.apply(decay, x_BNC, *marks)  # type: ignore[no-untyped-call]
    entering, final = scan(passing, addition, chunks, context, state_B)
    states: Tensor = _States.apply(decay, x_BNC, entering, *marks)  # type: ignore[no-untyped-call]
    return chunks.join(states), final


def diagonal_scan_naive(
    decay: Tensor, x_BS: Tensor, context: SequenceContext, state_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same token by token, on one rank."""
    decay = decay.expand(-1, x_BS.shape[1], *decay.shape[2:])
    starts = _like(context.positions(x_BS.device) == 0, x_BS)
    state = torch.zeros_like(x_BS[:, 0]) if state_B is None else state_B
    states = []
    for t in range(x_BS.shape[1]):
        state = decay[:, t].masked_fill(starts[:, t], 0) * state + x_BS[:, t]
        states.append(state)
    return torch.stack(states, dim=1), state


def planned_diagonal_scan(
    context: SequenceContext, decay: tuple[int, ...], state: tuple[int, ...], itemsize: int
) -> list[Transfer]:
    """What :func:`diagonal_scan` posts on this rank, forward and then backward; shapes without batch and time."""
    return planned_scan(context, math.prod(decay), math.prod(state), itemsize)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """With as many dimensions as ``x``."""
    return mask.view(*mask.shape, *[1] * (x.dim() - mask.dim()))


def _marks(chunks: Chunks, context: SequenceContext, x_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where a document starts [B, N, C, 1...], and which places are padding [1, N, C, 1...]."""
    starts_BNC = chunks.split(context.positions(x_BT.device) == 0)
    padded_NC = chunks.padded(x_BT.device)
    states = [1] * (x_BT.dim() - 2)
    return starts_BNC.view(*starts_BNC.shape, *states), padded_NC.view(1, *padded_NC.shape, *states)


def _at(decay: Tensor, place: int) -> Tensor:
    """Of a constant decay the same for every place."""
    return decay[:, :, place if decay.shape[2] > 1 else 0]


def _decay_at(decay: Tensor, place: int, starts: Tensor, padded: Tensor) -> Tensor:
    """a of one place of every chunk, [B, N, ...]: nothing enters a document, and padding changes no state."""
    return _at(decay, place).masked_fill(padded[:, :, place], 1).masked_fill(starts[:, :, place], 0)


def _add_(gradient: Tensor, place: int, share: Tensor, starts: Tensor, padded: Tensor) -> None:
    """Add the gradient of the decay that one place used, if it used any."""
    share = share.masked_fill(starts[:, :, place] | padded[:, :, place], 0)
    total = _at(gradient, place)
    total += share.sum_to_size(total.shape)


class _Folded(torch.autograd.Function):
    """The product of the decays of every chunk, and the state after it if an empty one entered."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, starts: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(decay, x, starts, padded)
        product = x.new_ones(*x.shape[:2], *decay.shape[3:])
        total = x.new_zeros(*x.shape[:2], *x.shape[3:])
        for place in range(x.shape[2]):
            a = _decay_at(decay, place, starts, padded)
            product, total = product * a, total * a + x[:, :, place]
        return product, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dproduct: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, None, None]:
        decay, x, starts, padded = ctx.saved_tensors
        before = [(torch.ones_like(dproduct), torch.zeros_like(dtotal))]
        for place in range(x.shape[2] - 1):
            a, (product, total) = _decay_at(decay, place, starts, padded), before[-1]
            before.append((product * a, total * a + x[:, :, place]))
        ddecay, dx = torch.zeros_like(decay), torch.empty_like(x)
        for place in reversed(range(x.shape[2])):
            product, total = before.pop()
            _add_(ddecay, place, dproduct * product, starts, padded)
            _add_(ddecay, place, dtotal * total, starts, padded)
            dx[:, :, place] = dtotal
            a = _decay_at(decay, place, starts, padded)
            dproduct, dtotal = dproduct * a, dtotal * a
        return ddecay, dx, None, None


class _States(torch.autograd.Function):
    """Every state, from the ones that enter the chunks."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, entering: Tensor, starts: Tensor, padded: Tensor) -> Tensor:
        states, state = torch.empty_like(x), entering
        for place in range(x.shape[2]):
            state = state * _decay_at(decay, place, starts, padded) + x[:, :, place]
            states[:, :, place] = state
        ctx.save_for_backward(decay, states, entering, starts, padded)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        decay, states, entering, starts, padded = ctx.saved_tensors
        ddecay, dx, reaching = torch.zeros_like(decay), torch.empty_like(states), torch.zeros_like(entering)
        for place in reversed(range(states.shape[2])):
            reaching = reaching + gradient[:, :, place]
            dx[:, :, place] = reaching
            before = states[:, :, place - 1] if place else entering
            _add_(ddecay, place, reaching * before, starts, padded)
            reaching = reaching * _decay_at(decay, place, starts, padded)
        return ddecay, dx, reaching, None, None
