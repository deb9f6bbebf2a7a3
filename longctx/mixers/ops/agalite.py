"""The sums of AGaLiTe: a matrix state that decays on both sides, approximated by r pairs of vectors.

Pramanik et al., arXiv 2310.15719: with ``c_m(t) = cos(omega_m t)``, omega from -pi to pi,
``v_m,t = b_t v_m,t-1 + c_m(t) v_t``, ``k_m,t = a_t k_m,t-1 + c_m(t) k_t``, ``s_t = a_t s_t-1 + k_t`` and
``y_t = sum_m v_m,t (k_m,t q_t) / (2 r s_t q_t + eps)``. The products with q are linear attention over the cosines and a
one; the v_m are an element-wise scan. The scores behind it carry ``sum_m c_m(i) c_m(j)`` between the tick i of a key
and the tick j of a value: large for i = j, but also r - 1 ticks apart, where the cosines meet again. With r = 2 both
are (-1)^t and suppress no pair at all.

Legend: B batch, T local tokens, S global tokens, H heads, E key size, F value size, R oscillators.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.mixers.ops.diagonal import diagonal_scan, planned_diagonal_scan
from longctx.mixers.ops.linear import linear_attention, planned_linear_attention
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext

EPS = 1e-5


class AgaliteState(NamedTuple):
    """All k_m and s, and all v_m."""

    keys_BHER: Tensor  # R + 1
    values_BHRF: Tensor


def agalite(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHF: Tensor, log_a_BTHE: Tensor, b_BTHF: Tensor, count: int,
    context: SequenceContext, state: AgaliteState | None = None, chunk: int = 16,
) -> tuple[Tensor, AgaliteState]:  # fmt: skip
    """Outputs [B, T, H, F] in fp32 (fp64 for fp64), and the state after the last token of all ranks.

    Args:
        q_BTHE, k_BTHE: features, not negative.
        log_a_BTHE, b_BTHF: decays by key channel, as logarithms, and by value channel.
        count: r.
        chunk: tokens per chunk of the sums over keys; fewer where this rank has fewer.
    """
    cosines_BT1R = oscillators(context.positions(q_BTHE.device), count, v_BTHF.dtype)[:, :, None]
    ones = torch.cat((cosines_BT1R, torch.ones_like(cosines_BT1R[..., :1])), dim=-1)
    keys, values = (None, None) if state is None else state
    sums_BTHR, keys = linear_attention(
        q_BTHE, k_BTHE, ones.expand(-1, -1, q_BTHE.shape[2], -1), log_a_BTHE, context, keys,
        min(chunk, max(context.local_length, 1)),
    )  # fmt: skip
    x_BTHRF = cosines_BT1R[..., None] * v_BTHF[:, :, :, None]
    values_BTHRF, values = diagonal_scan(b_BTHF[:, :, :, None], x_BTHRF, context, values)
    return _read(sums_BTHR, values_BTHRF), AgaliteState(keys, values)


def agalite_naive(
    q_BSHE: Tensor, k_BSHE: Tensor, v_BSHF: Tensor, log_a_BSHE: Tensor, b_BSHF: Tensor, count: int,
    context: SequenceContext, state: AgaliteState | None = None,
) -> tuple[Tensor, AgaliteState]:  # fmt: skip
    """The same token by token, on one rank."""
    positions, heads = context.positions(q_BSHE.device), q_BSHE.shape[2:]
    keys = q_BSHE.new_zeros(len(q_BSHE), *heads, count + 1) if state is None else state.keys_BHER
    values = q_BSHE.new_zeros(len(q_BSHE), heads[0], count, v_BSHF.shape[3]) if state is None else state.values_BHRF
    cosines_BSR, outputs = oscillators(positions, count, v_BSHF.dtype), []
    for t in range(q_BSHE.shape[1]):
        inside = (positions[:, t] > 0)[:, None, None, None]
        weights = torch.cat((cosines_BSR[:, t], torch.ones_like(cosines_BSR[:, t, :1])), dim=-1)[:, None]
        keys = inside * log_a_BSHE[:, t, :, :, None].exp() * keys + k_BSHE[:, t, :, :, None] * weights[:, :, None]
        values = inside * b_BSHF[:, t, :, None] * values + cosines_BSR[:, t, None, :, None] * v_BSHF[:, t, :, None]
        outputs.append(_read((q_BSHE[:, t, :, None] @ keys)[:, :, 0], values))
    return torch.stack(outputs, dim=1), AgaliteState(keys, values)


def oscillators(positions: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``cos(omega_m t)`` of integer ticks [...] as [..., R], omega evenly from -pi to pi.

    Exact at any tick: all have the period 2 (R - 1), to which ticks are reduced as integers.
    """
    half = max(count - 1, 1)
    steps = torch.arange(count, device=positions.device) * 2 - half
    table = torch.cos(torch.arange(2 * half, dtype=torch.float64) * (math.pi / half)).to(positions.device, dtype)
    return table[(positions[..., None] * steps) % (2 * half)]


def planned_agalite(
    context: SequenceContext, heads: int, key: int, value: int, count: int, itemsize: int
) -> list[Transfer]:
    """What :func:`agalite` posts on this rank, forward and then backward."""
    keys = planned_linear_attention(context, heads, key, count + 1, itemsize, diagonal=True)
    values = planned_diagonal_scan(context, (heads, 1, value), (heads, count, value), itemsize)
    half = len(keys) // 2
    return keys[:half] + values + keys[half:]


def _read(sums: Tensor, values: Tensor) -> Tensor:
    """y from the products of q with all k_m and with s [..., R + 1], and all v_m [..., R, F]."""
    count = values.shape[-2]
    weights = sums[..., :count] / (2 * count * sums[..., count:] + EPS)
    return (weights[..., None] * values).sum(-2)
