"""Causal attention whose weights are a polynomial of the score: ``f(s) = 1 + s`` or ``1 + s + s^2 / 2``.

``y_i = sum_j f(q_i k_j) v_j / sum_j f(q_i k_j)`` over the tokens j <= i of i's document. Inside a chunk as masked
scores; between chunks through the moments of keys, ``S = sum_j phi(k_j) v_j`` with ``f(q k) = phi(q) phi(k)``, a state
that only adds. Products of two channels are kept once, not in both orders: 1 + E + E (E + 1) / 2 features.

Legend: B batch, T local tokens, S global tokens, N chunks, C tokens per chunk, H heads, E head size, F value size,
P features.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx.mixers.ops.linear import linear_attention_naive
from longctx.sequence.chunks import Chunks, chunks_of
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import planned_scan, scan
from longctx.sequence.context import SequenceContext


def polynomial_attention(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHF: Tensor, order: int, context: SequenceContext,
    state_BHPF: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums [B, T, H, F + 1] of weighted values and, last, of weights, in fp32 (fp64 for fp64); and the final state.

    Args:
        order: 1 or 2, the degree of f.
        state_BHPF: moments [B, H, P, F + 1] before the first token, the same on every rank; None: empty.
        chunk: tokens per chunk; the result does not depend on it.
    """
    chunks = chunks_of(context, chunk)
    wide = torch.promote_types(q_BTHE.dtype, torch.float32)
    ones = torch.cat((v_BTHF, torch.ones_like(v_BTHF[..., :1])), dim=-1)
    q, k, v = (chunks.split(t.to(wide)).transpose(2, 3) for t in (q_BTHE, k_BTHE, ones))
    seen = chunks.together(q.device)[:, :, None]
    here = polynomial(q @ k.mT, order).masked_fill(~seen, 0) @ v
    # Features are larger than what they are made of: made again in the backward.
    addition = checkpoint(_moments, k, v, order, chunks, use_reentrant=False, preserve_rng_state=False)
    passing = chunks.passed(q.device)[:, :, None, None, None].to(wide)
    entering, final = scan(passing, addition, chunks, context, state_BHPF)
    read = checkpoint(_read, q, entering, order, chunks, use_reentrant=False, preserve_rng_state=False)
    return chunks.join((here + read).transpose(2, 3)), final


def polynomial_attention_naive(
    q_BSHE: Tensor, k_BSHE: Tensor, v_BSHF: Tensor, order: int, context: SequenceContext
) -> tuple[Tensor, Tensor]:
    """The same token by token, on one rank."""
    ones = torch.cat((v_BSHF, torch.ones_like(v_BSHF[..., :1])), dim=-1)
    no_decay = q_BSHE.new_zeros(1, 1, q_BSHE.shape[2], 1)
    return linear_attention_naive(features(q_BSHE, order), features(k_BSHE, order), ones, no_decay, context)


def planned_polynomial_attention(
    context: SequenceContext, heads: int, size: int, value: int, order: int, itemsize: int
) -> list[Transfer]:
    """What :func:`polynomial_attention` posts on this rank, forward and then backward."""
    return planned_scan(context, 1, heads * feature_count(size, order) * (value + 1), itemsize)


def polynomial(scores: Tensor, order: int) -> Tensor:
    """The exponential's Taylor polynomial."""
    return torch.stack([scores**power / math.factorial(power) for power in range(order + 1)]).sum(0)


def feature_count(size: int, order: int) -> int:
    """P for vectors of ``size`` channels."""
    return 1 + size + (size * (size + 1) // 2 if order == 2 else 0)


def features(x: Tensor, order: int) -> Tensor:
    """phi, [..., E] -> [..., P]: products of two vectors' features are the polynomial of their product."""
    parts = [torch.ones_like(x[..., :1]), x]
    if order == 2:
        first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        # Half of the square: every mixed product comes twice in it, the square of a channel once.
        weight = torch.where(first == second, 0.5, 1.0).to(x.dtype).sqrt()
        parts.append(x[..., first] * x[..., second] * weight)
    return torch.cat(parts, dim=-1)


def _moments(k: Tensor, v: Tensor, order: int, chunks: Chunks) -> Tensor:
    """What every chunk adds to the state, [B, N, H, P, F]."""
    lasting = chunks.lasting(k.device)[:, :, None, :, None]
    return features(k, order).mT @ (v * lasting)


def _read(q: Tensor, entering: Tensor, order: int, chunks: Chunks) -> Tensor:
    """What the state that enters a chunk gives its tokens, [B, N, H, C, F]."""
    reached = chunks.reached(q.device)[:, :, None, :, None]
    return (features(q, order) * reached) @ entering
