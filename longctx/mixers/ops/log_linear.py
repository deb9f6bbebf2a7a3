"""Causal linear attention whose features are given by their logarithms, of any size.

``w_ij = sum_e exp(a_ie + b_je)``, ``y_i = sum_j w_ij v_j / sum_j w_ij`` over the tokens j <= i of i's document. The
state is kept relative to the largest b so far of every channel, ``m_e``: ``S_e = sum_j exp(b_je - m_e) v_j``. When m
grows, S shrinks by the exponential of the difference: a decay per key channel, so that chunks and ranks are merged as
those of gated linear attention are. No exponent is positive, and the denominator is never below 1.

Legend: B batch, T local tokens, S global tokens, H heads, E features, F value size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.mixers.ops.linear import linear_attention, planned_linear_attention
from longctx.mixers.ops.running_max import planned_running_max, running_max
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext


class LogLinearState(NamedTuple):
    """Sums of values and of ones relative to ``exp(m)``, and m. A constant to autograd, m cancels in every output."""

    S_BHEF: Tensor
    m_BHE: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, features: int, value: int, like: Tensor) -> "LogLinearState":
        """No token yet; fp32 (fp64 for fp64) on the device of ``like``."""
        wide = torch.promote_types(like.dtype, torch.float32)
        sums = like.new_zeros(batch, heads, features, value + 1, dtype=wide)
        return cls(sums, sums.new_full((batch, heads, features), float("-inf")))


def log_linear_attention(
    a_BTHE: Tensor, b_BTHE: Tensor, v_BTHF: Tensor, context: SequenceContext, state: LogLinearState, chunk: int = 16
) -> tuple[Tensor, LogLinearState]:
    """Outputs [B, T, H, F] in fp32 (fp64 for fp64), and the state after the last token of all ranks.

    Args:
        a_BTHE: logarithms of the features of queries; ``b_BTHE`` those of keys.
        state: that before the first token, the same on every rank.
        chunk: tokens per chunk; the result does not depend on it.
    """
    wide = torch.promote_types(a_BTHE.dtype, torch.float32)
    a, b, v = (t.to(wide) for t in (a_BTHE, b_BTHE, v_BTHF))
    top, fall, final = running_max(b, context, state.m_BHE)
    # Two scales that cancel between numerator and denominator: one per channel in the state, one per query.
    a = a + top
    q = (a - a.detach().amax(-1, keepdim=True)).exp()
    ones = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    sums, after = linear_attention(q, (b - top).exp(), ones, fall, context, state.S_BHEF, chunk)
    return sums[..., :-1] / sums[..., -1:], LogLinearState(after, final)


def log_linear_attention_naive(
    a_BSHE: Tensor, b_BSHE: Tensor, v_BSHF: Tensor, context: SequenceContext
) -> tuple[Tensor, Tensor]:
    """The same token by token on one rank, as defined: sums of features as they are, which may overflow.

    Returns the outputs and the sums after the last token, [B, H, E, F + 1].
    """
    fresh = context.positions(a_BSHE.device) == 0
    sums, outputs = a_BSHE.new_zeros(*b_BSHE.shape[::2], b_BSHE.shape[3], v_BSHF.shape[3] + 1), []
    for t in range(a_BSHE.shape[1]):
        value = torch.cat((v_BSHF[:, t], torch.ones_like(v_BSHF[:, t, :, :1])), dim=-1)
        sums = sums * ~fresh[:, t, None, None, None] + b_BSHE[:, t, :, :, None].exp() * value[:, :, None]
        read = (a_BSHE[:, t, :, None].exp() @ sums)[:, :, 0]
        outputs.append(read[..., :-1] / read[..., -1:])
    return torch.stack(outputs, dim=1), sums


def planned_log_linear_attention(
    context: SequenceContext, heads: int, features: int, value: int, itemsize: int
) -> list[Transfer]:
    """What :func:`log_linear_attention` posts on this rank, forward and then backward."""
    top = planned_running_max(context, heads * features, itemsize)
    return top + planned_linear_attention(context, heads, features, value + 1, itemsize, diagonal=True)
