"""The generalised delta rule, whose state forgets per channel and along a direction before it writes.

``S_t = S_{t-1} (diag(w_t) - kappa_t (kappa_t * a_t)^T) + v_t k_t^T`` and ``y_t = S_t r_t``, with ``S`` [F, E] per head
(RWKV-7, Peng et al., arXiv 2503.14456, section 3). With ``kappa = k`` of length one, ``a = w beta`` and values that
beta scales it is the gated delta rule (Yang et al., arXiv 2412.06464).

In chunks: with ``b = kappa * a`` and D the summed ``log w`` of a chunk, ``u_t = S_{t-1} kappa_t`` solves the unit lower
triangular system ``u_t + sum_{j<t} (b_j exp(D_{t-1} - D_j) kappa_t) u_j = S_0 (exp(D_{t-1}) kappa_t) +
sum_{j<t} (k_j exp(D_{t-1} - D_j) kappa_t) v_j``, so ``U = W S_0^T + Z``. The state that enters, ``S_0``, leaves as
``S_0 (diag(exp(D_C)) - W^T B) + (V^T K - Z^T B)``, with k and b decayed to the end of the chunk: a scan over matrices.
Linear in T: C (E + F) for the scores and the system, E^2 (E + F) / C for the states, per token and head. A document
starts from an empty state.

Legend: B batch, T local tokens, S global tokens, N chunks, C tokens per chunk, H heads, E key size, F value size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.mixers.ops.linear import decayed_scores, masked_decay, summed_decay
from longctx.sequence.chunks import Chunks, chunks_of
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import planned_scan, scan
from longctx.sequence.context import SequenceContext


def delta_rule(
    r_BTHE: Tensor, log_w: Tensor, k_BTHE: Tensor, v_BTHF: Tensor, kappa_BTHE: Tensor, a: Tensor,
    context: SequenceContext, state_BHFE: Tensor | None = None, chunk: int = 32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, F] in fp32 (fp64 for fp64), and the state after the last token of all ranks [B, H, F, E].

    Args:
        log_w: log w, at most 0: [B, T, H, E], or [B, T, H, 1] for all channels.
        kappa_BTHE: the directions, of length one.
        a: how much of the state along kappa is taken away: [B, T, H, E] or [B, T, H, 1].
        state_BHFE: the state before the first token, the same on every rank; None: empty.
        chunk: tokens per chunk; shorter sequences are one chunk.
    """
    chunks = chunks_of(context, min(chunk, max(1, context.local_length)))
    wide = torch.promote_types(r_BTHE.dtype, torch.float32)
    tokens = (r_BTHE, k_BTHE, v_BTHF, kappa_BTHE, kappa_BTHE.to(wide) * a)
    r, k, v, kappa, b = (chunks.split(t.to(wide)).transpose(2, 3) for t in tokens)
    decay = summed_decay(chunks.split(log_w.to(wide)).transpose(2, 3), chunks)
    pairs = _pairs(r, k, kappa, b, decay, chunks)
    reached, lasting = chunks.reached(r.device), chunks.lasting(r.device)
    entering_kappa = kappa * masked_decay(_shifted(decay), reached, chunks)
    solved = _solve(pairs.kappa_b, torch.cat((entering_kappa, pairs.kappa_k @ v), dim=-1))
    W, Z = solved[..., : k.shape[-1]], solved[..., k.shape[-1] :]
    leaving = masked_decay(decay[..., -1:, :] - decay, lasting, chunks)
    addition = v.mT @ (k * leaving) - Z.mT @ (b * leaving)
    transition = _kept(decay, chunks, k.shape[-1]) - W.mT @ (b * leaving)
    entering, final = scan(transition, addition, chunks, context, state_BHFE, matrix=True)
    reading = r * masked_decay(decay, reached, chunks) - pairs.r_b @ W
    y = reading @ entering.mT + pairs.r_k @ v - pairs.r_b @ Z
    return chunks.join(y.transpose(2, 3)), final


def delta_rule_naive(
    r_BSHE: Tensor, log_w: Tensor, k_BSHE: Tensor, v_BSHF: Tensor, kappa_BSHE: Tensor, a: Tensor,
    context: SequenceContext, state_BHFE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same token by token, on one rank."""
    first = context.positions(r_BSHE.device) == 0
    empty = v_BSHF.new_zeros(*v_BSHF.shape[::2], *v_BSHF.shape[3:], k_BSHE.shape[3])
    state = empty if state_BHFE is None else state_BHFE
    b_BSHE, outputs = kappa_BSHE * a, []
    for t in range(r_BSHE.shape[1]):
        state = state * (~first[:, t, None, None, None])
        removed = (state @ kappa_BSHE[:, t, :, :, None]) * b_BSHE[:, t, :, None]
        state = state * log_w[:, t, :, None].exp() - removed + v_BSHF[:, t, :, :, None] * k_BSHE[:, t, :, None]
        outputs.append((state @ r_BSHE[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1), state


def planned_delta_rule(context: SequenceContext, heads: int, key: int, value: int, itemsize: int) -> list[Transfer]:
    """What :func:`delta_rule` posts on this rank, forward and then backward."""
    return planned_scan(context, heads * key * key, heads * value * key, itemsize)


class _Pairs(NamedTuple):
    """Decayed products of the pairs of a chunk [B, N, H, C, C]: kappa with those before it, r also with its own."""

    kappa_k: Tensor
    kappa_b: Tensor
    r_k: Tensor
    r_b: Tensor


def _pairs(r: Tensor, k: Tensor, kappa: Tensor, b: Tensor, decay: Tensor, chunks: Chunks) -> _Pairs:
    # kappa_t meets states that are decayed up to t - 1: it is a query at the place of the token before it.
    ahead = torch.nn.functional.pad(kappa[..., 1:, :], (0, 0, 0, 1))
    scores = decayed_scores(torch.stack((ahead, r), 3), torch.stack((k, b), 3), decay, chunks)
    of_kappa = _shifted(scores[:, :, :, 0])
    if chunks.cut:
        of_kappa = of_kappa.masked_fill(~chunks.together(r.device)[:, :, None, None], 0)
    return _Pairs(*of_kappa.unbind(3), *scores[:, :, :, 1].unbind(3))


def _shifted(x: Tensor) -> Tensor:
    """Rows of a chunk moved to the next token, 0 at the first."""
    return torch.nn.functional.pad(x[..., :-1, :], (0, 0, 1, 0))


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """x of ``x_t + sum_{j<t} lower_tj x_j = right_t``."""
    x: Tensor = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    return x


def _kept(decay: Tensor, chunks: Chunks, key: int) -> Tensor:
    """``diag(exp(D_C))`` of every chunk [B, N, H, E, E], 0 where the entering state does not leave it."""
    kept = decay[..., -1, :].exp().expand(*decay.shape[:3], key)
    if chunks.cut:
        kept = kept * chunks.passed(decay.device)[:, :, None, None]
    return torch.diag_embed(kept)
