"""Causal linear attention with a decaying state: ``S_t = a_t S_{t-1} + k_t v_t``, ``y_t = q_t S_t``.

The decay a is a number per head (retention) or per key channel (gated linear attention, Yang et al. 2023,
arXiv 2312.06635). In chunks: inside one as masked scores, between them as a scan; O(T) in time and memory. A document
starts from an empty state.

Legend: B batch, T local tokens, S global tokens, N chunks, C tokens per chunk, H heads, E key size, F value size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.sequence.chunks import Chunks, chunks_of
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import planned_scan, scan
from longctx.sequence.context import SequenceContext


def linear_attention(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHF: Tensor, log_decay: Tensor, context: SequenceContext,
    state_BHEF: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, F] in fp32 (fp64 for fp64), and the state after the last token of all ranks [B, H, E, F].

    Args:
        log_decay: log a, at most 0: [B, T, H] or [B, T, H, E], or [1, 1, H, 1] for a constant one.
        state_BHEF: the state before the first token, the same on every rank; None: empty.
    """
    chunks = chunks_of(context, chunk)
    wide = torch.promote_types(q_BTHE.dtype, torch.float32)
    q, k, v = (chunks.split(t.to(wide)).transpose(2, 3) for t in (q_BTHE, k_BTHE, v_BTHF))
    log_decay = log_decay.to(wide)
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    decay = summed_decay(chunks.split(log_decay.expand(*q_BTHE.shape[:3], log_decay.shape[3])).transpose(2, 3), chunks)
    scores = decayed_scores(q[:, :, :, None], k[:, :, :, None], decay, chunks)[:, :, :, 0, 0]
    leaving = masked_decay(decay[:, :, :, -1:] - decay, chunks.lasting(q.device), chunks)
    addition = (k * leaving).transpose(3, 4) @ v
    passing = decay[:, :, :, -1, :, None].exp()
    if chunks.cut:
        passing = passing * chunks.passed(q.device)[:, :, None, None, None]
    entering, final = scan(passing, addition, chunks, context, state_BHEF)
    reaching = masked_decay(decay, chunks.reached(q.device), chunks)
    y = scores @ v + (q * reaching) @ entering
    return chunks.join(y.transpose(2, 3)), final


def linear_attention_naive(
    q_BSHE: Tensor, k_BSHE: Tensor, v_BSHF: Tensor, log_decay: Tensor, context: SequenceContext,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same token by token, on one rank."""
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    decay = log_decay.exp().expand(*q_BSHE.shape[:3], log_decay.shape[3])
    first = context.positions(q_BSHE.device) == 0
    state = (
        q_BSHE.new_zeros(*k_BSHE.shape[::2], *k_BSHE.shape[3:], v_BSHF.shape[3]) if state_BHEF is None else state_BHEF
    )
    outputs = []
    for t in range(q_BSHE.shape[1]):
        state = state * (~first[:, t, None, None, None]) * decay[:, t, :, :, None]
        state = state + k_BSHE[:, t, :, :, None] * v_BSHF[:, t, :, None, :]
        outputs.append((q_BSHE[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1), state


def planned_linear_attention(
    context: SequenceContext, heads: int, key: int, value: int, itemsize: int, diagonal: bool = False
) -> list[Transfer]:
    """What :func:`linear_attention` posts on this rank, forward and then backward."""
    return planned_scan(context, heads * (key if diagonal else 1), heads * key * value, itemsize)


def decayed_scores(q: Tensor, k: Tensor, decay: Tensor, chunks: Chunks) -> Tensor:
    """``q_i k_j exp(D_i - D_j)`` of every pair of a chunk, 0 where the one may not see the other.

    Args:
        q: Q kinds of queries, [B, N, H, Q, C, E].
        k: K kinds of keys, [B, N, H, K, C, E].
        decay: D, from :func:`summed_decay`: [B, N, H, C, E], or [B, N, H, C, 1] for all channels.

    Returns:
        Every kind of query with every kind of key, [B, N, H, Q, K, C, C].
    """
    seen = chunks.together(q.device)[:, :, None]
    if decay.shape[-1] > 1:
        scores: Tensor = _DecayedScores.apply(q, k, decay)  # type: ignore[no-untyped-call]
        return scores.masked_fill(~seen[:, :, :, None, None], 0)
    # Hidden pairs are taken out before the exponential, which for them may overflow.
    weight = (decay - decay.mT).masked_fill(~seen, float("-inf")).exp()
    return (q[..., None, :, :] @ k.mT[..., None, :, :, :]) * weight[:, :, :, None, None]


def summed_decay(log_decay: Tensor, chunks: Chunks) -> Tensor:
    """Sums up to every token since its document or its chunk began: no rounding comes from another document."""
    if not chunks.cut:
        return log_decay.cumsum(3)
    return chunks.together(log_decay.device)[:, :, None].to(log_decay.dtype) @ log_decay


def masked_decay(exponent: Tensor, seen_BNC: Tensor, chunks: Chunks) -> Tensor:
    """The exponential where a token counts, else 0: across a document start the exponent may be positive."""
    return (exponent.masked_fill(~seen_BNC[:, :, None, :, None], float("-inf")) if chunks.cut else exponent).exp()


class _DecayedScores(torch.autograd.Function):
    """``sum_e q_ie k_je exp(D_ie - D_je)`` for j <= i, else 0, of all kinds of queries and keys.

    No exponent is positive inside a document; across its start one may be, and is cut off: the pair is hidden.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, decay)
        scores = q.new_zeros(*q.shape[:-2], k.shape[-3], q.shape[-2], q.shape[-2])
        for j in range(q.shape[-2]):
            weighted = q[..., j:, :] * _weight(decay, j)
            scores[..., j:, j] = (weighted @ k[..., None, :, j, :].mT).mT
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, decay = ctx.saved_tensors
        dq, dk, ddecay = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(decay)
        by_key = gradient.mT.contiguous()
        for j in range(q.shape[-2]):
            weight, share = _weight(decay, j), by_key[..., j, j:]
            weighted = q[..., j:, :] * weight
            by_query = sum(share[..., n, :, None] * k[..., None, n, j : j + 1, :] for n in range(k.shape[-3]))
            dq[..., j:, :] += by_query * weight
            dk[..., j, :] = (share @ weighted).sum(-3)
            moved = (by_query * weighted).sum(-3)
            ddecay[..., j:, :] += moved
            ddecay[..., j, :] -= moved.sum(-2)
        return dq, dk, ddecay


def _weight(decay: Tensor, j: int) -> Tensor:
    """Decay from token j to itself and those after it, [..., 1, C - j, E]."""
    return (decay[..., None, j:, :] - decay[..., None, j : j + 1, :]).clamp(max=0).exp()
