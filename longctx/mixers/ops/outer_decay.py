"""Linear attention whose matrix state decays on both sides.

``S_t = (a_t b_t') o S_{t-1} + k_t v_t'``, ``y_t = q_t S_t``: entry (e, f) decays by a_e b_f, gates of the keys and of
the values (GaLiTe, Pramanik et al., arXiv 2310.15719). In chunks: inside one as scores that decay by key channel,
summed with weights that decay by value channel; between them as a scan of whole matrices. No exponent is positive; O(T)
in time and memory. A document starts from an empty state.

Legend: B batch, T local tokens, S global tokens, N chunks, C tokens per chunk, H heads, E key size, F value size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.mixers.ops.linear import decayed_scores, masked_decay, summed_decay
from longctx.sequence.chunks import chunks_of
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import planned_scan, scan
from longctx.sequence.context import SequenceContext


def outer_decay_attention(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHF: Tensor, log_a_BTHE: Tensor, log_b_BTHF: Tensor, context: SequenceContext,
    state_BHEF: Tensor | None = None, chunk: int = 16,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, F] in fp32 (fp64 for fp64), and the state after the last token of all ranks [B, H, E, F].

    Args:
        log_a_BTHE, log_b_BTHF: logarithms of the decays by key and by value channel, at most 0.
        state_BHEF: the state before the first token, the same on every rank; None: empty.
        chunk: tokens per chunk; fewer where this rank has fewer.
    """
    chunks = chunks_of(context, min(chunk, max(context.local_length, 1)))
    wide = torch.promote_types(q_BTHE.dtype, torch.float32)
    operands = (q_BTHE, k_BTHE, v_BTHF, log_a_BTHE, log_b_BTHF)
    q, k, v, log_a, log_b = (chunks.split(t.to(wide)).transpose(2, 3) for t in operands)
    key, value = summed_decay(log_a, chunks), summed_decay(log_b, chunks)
    lasting, reached = chunks.lasting(q.device), chunks.reached(q.device)
    k_left, v_left = (t * masked_decay(d[..., -1:, :] - d, lasting, chunks) for t, d in ((k, key), (v, value)))
    passing = key[..., -1, :, None].exp() * value[..., -1, None, :].exp()
    if chunks.cut:
        passing = passing * chunks.passed(q.device)[:, :, None, None, None]
    entering, final = scan(passing, k_left.mT @ v_left, chunks, context, state_BHEF)
    scores = decayed_scores(q[:, :, :, None], k[:, :, :, None], key, chunks)[:, :, :, 0, 0]
    inside: Tensor = _DecayedSum.apply(scores, v, value)  # type: ignore[no-untyped-call]
    from_before = (q * masked_decay(key, reached, chunks)) @ entering * masked_decay(value, reached, chunks)
    return chunks.join((inside + from_before).transpose(2, 3)), final


def outer_decay_attention_naive(
    q_BSHE: Tensor, k_BSHE: Tensor, v_BSHF: Tensor, log_a_BSHE: Tensor, log_b_BSHF: Tensor, context: SequenceContext,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same token by token, on one rank."""
    inside = (context.positions(q_BSHE.device) > 0)[..., None, None, None]
    shape = (*k_BSHE.shape[::2], *k_BSHE.shape[3:], v_BSHF.shape[3])
    state = q_BSHE.new_zeros(shape) if state_BHEF is None else state_BHEF
    outputs = []
    for t in range(q_BSHE.shape[1]):
        decay = log_a_BSHE[:, t, :, :, None].exp() * log_b_BSHF[:, t, :, None, :].exp()
        state = state * inside[:, t] * decay + k_BSHE[:, t, :, :, None] * v_BSHF[:, t, :, None, :]
        outputs.append((q_BSHE[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1), state


def planned_outer_decay_attention(
    context: SequenceContext, heads: int, key: int, value: int, itemsize: int
) -> list[Transfer]:
    """What :func:`outer_decay_attention` posts on this rank, forward and then backward."""
    return planned_scan(context, heads * key * value, heads * key * value, itemsize)


class _DecayedSum(torch.autograd.Function):
    """``y_if = sum_j s_ij v_jf exp(D_if - D_jf)`` over j <= i.

    No exponent is positive inside a document; across its start one may be, and is cut off: the score is 0.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        ctx.save_for_backward(scores, v, decay)
        y = torch.zeros_like(v)
        for j in range(v.shape[-2]):
            y[..., j:, :] += scores[..., j:, j, None] * _weight(decay, j) * v[..., j : j + 1, :]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, v, decay = ctx.saved_tensors
        dscores, dv, ddecay = torch.zeros_like(scores), torch.zeros_like(v), torch.zeros_like(decay)
        for j in range(v.shape[-2]):
            weight = _weight(decay, j) * gradient[..., j:, :]
            dscores[..., j:, j] = (weight @ v[..., j, :, None])[..., 0]
            by_value = weight * scores[..., j:, j, None]
            dv[..., j, :] = by_value.sum(-2)
            share = by_value * v[..., j : j + 1, :]
            ddecay[..., j:, :] += share
            ddecay[..., j, :] -= share.sum(-2)
        return dscores, dv, ddecay


def _weight(decay: Tensor, j: int) -> Tensor:
    """What is left of token j at itself and at the tokens after it."""
    return (decay[..., j:, :] - decay[..., j : j + 1, :]).clamp(max=0).exp()
