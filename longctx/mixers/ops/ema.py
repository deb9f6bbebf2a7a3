"""The multi-dimensional damped moving average of Mega (Ma et al., arXiv 2209.10655, section 3.1).

Each channel d of the input is averaged by n recurrences, ``h_t = keep h_{t-1} + write x_t``, and read as
``y_t = sum_n read h_t``. All three weights are constant in time, so inside a chunk the average is a convolution with
C taps, and states of size n exist only between chunks: O(T D) memory instead of O(T D n). The convolution is summed tap
by tap and not by a Fourier transform, since that would let tokens of the future and of other documents round those of
this one. A document starts from an empty state.

Legend: B batch, T local tokens, S global tokens, N chunks, C tokens per chunk, D channels, E recurrences per channel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.sequence.chunks import Chunks, chunks_of
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import planned_scan, scan
from longctx.sequence.context import SequenceContext


def damped_ema(
    x_BTD: Tensor, keep_DE: Tensor, write_DE: Tensor, read_DE: Tensor, context: SequenceContext,
    state_BDE: Tensor | None = None, chunk: int = 32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The averages [B, T, D] in fp32 (fp64 for fp64), and the state after the last token of all ranks [B, D, E].

    Args:
        keep_DE: in [0, 1].
        state_BDE: the state before the first token, the same on every rank; None: empty.
        chunk: tokens per chunk; fewer where this rank has fewer.
    """
    chunks = chunks_of(context, min(chunk, max(context.local_length, 1)))
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    x_BNCD, keep, write, read = chunks.split(x_BTD.to(wide)), keep_DE.to(wide), write_DE.to(wide), read_DE.to(wide)
    # Powers by pow, whose gradient is right where keep is 0 or they underflow.
    powers_CDE = keep ** torch.arange(chunks.size + 1, device=keep.device).view(-1, 1, 1)
    kernel_CD = (powers_CDE[:-1] * (write * read)).sum(-1)
    addition = torch.einsum("bncd,cde->bnde", _to_the_end(x_BNCD, chunks), powers_CDE[:-1].flip(0) * write)
    entering, final = scan(_passing(powers_CDE, chunks, addition), addition, chunks, context, state_BDE)
    reaching = torch.einsum("bnde,cde->bncd", entering, powers_CDE[1:] * read)
    seen = chunks.together(x_BTD.device) if chunks.cut else None
    y_BNCD: Tensor = _Taps.apply(x_BNCD, kernel_CD, seen)  # type: ignore[no-untyped-call]
    if chunks.cut:
        reaching = reaching * chunks.reached(x_BTD.device)[..., None]
    return chunks.join(y_BNCD + reaching), final


def damped_ema_naive(
    x_BSD: Tensor, keep_DE: Tensor, write_DE: Tensor, read_DE: Tensor, context: SequenceContext,
    state_BDE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same token by token, on one rank."""
    inside = (context.positions(x_BSD.device) > 0)[..., None, None]
    state = x_BSD.new_zeros(x_BSD.shape[0], *keep_DE.shape) if state_BDE is None else state_BDE
    outputs = []
    for t in range(x_BSD.shape[1]):
        state = keep_DE * state * inside[:, t] + write_DE * x_BSD[:, t, :, None]
        outputs.append((read_DE * state).sum(-1))
    return torch.stack(outputs, dim=1), state


def planned_damped_ema(context: SequenceContext, channels: int, size: int, itemsize: int) -> list[Transfer]:
    """What :func:`damped_ema` posts on this rank, forward and then backward."""
    return planned_scan(context, channels * size, channels * size, itemsize)


def _to_the_end(x_BNCD: Tensor, chunks: Chunks) -> Tensor:
    """The tokens that a chunk's last state is made of, moved behind the padding, which decays nothing."""
    if chunks.cut:
        x_BNCD = x_BNCD * chunks.lasting(x_BNCD.device)[..., None]
    lengths_N = _lengths(chunks, x_BNCD.device)
    places_NC = (torch.arange(chunks.size, device=x_BNCD.device) + lengths_N[:, None]) % chunks.size
    index = places_NC[None, :, :, None].expand(x_BNCD.shape)
    return x_BNCD.gather(2, index)


def _passing(powers_CDE: Tensor, chunks: Chunks, addition: Tensor) -> Tensor:
    """What becomes of a state that enters each chunk, [B, N, D, E]."""
    passing = powers_CDE.index_select(0, _lengths(chunks, addition.device)).expand_as(addition)
    return passing * chunks.passed(addition.device)[..., None, None] if chunks.cut else passing


def _lengths(chunks: Chunks, device: torch.device) -> Tensor:
    """Real tokens of every chunk."""
    return chunks.tables.on(device, "lengths", lambda: (chunks.places_NC < chunks.tokens).sum(1))


class _Taps(torch.autograd.Function):
    """Causal convolution inside every chunk, over the tokens of one document: ``y_i = sum_j w_(i-j) x_j``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, seen: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, kernel, seen)
        y = torch.zeros_like(x)
        for back in range(x.shape[2]):
            y[:, :, back:] += _masked(x[:, :, : x.shape[2] - back], seen, back) * kernel[back]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernel, seen = ctx.saved_tensors
        dx, dkernel = torch.zeros_like(x), torch.zeros_like(kernel)
        for back in range(x.shape[2]):
            reached = _masked(gradient[:, :, back:], seen, back)
            dx[:, :, : x.shape[2] - back] += reached * kernel[back]
            dkernel[back] = (reached * x[:, :, : x.shape[2] - back]).sum((0, 1, 2))
        return dx, dkernel, None


def _masked(pairs: Tensor, seen: Tensor | None, back: int) -> Tensor:
    """Without the pairs of tokens, ``back`` apart, of which the one does not see the other."""
    return pairs if seen is None else pairs * seen.diagonal(-back, 2, 3)[..., None]
