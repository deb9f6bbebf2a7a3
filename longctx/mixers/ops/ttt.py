"""TTT-Linear's inner model: a linear map with bias that takes one gradient step per mini-batch of tokens, per head.

Sun et al., arXiv 2407.04620, sections 2.4 and 2.5. With ``k' = (k, 1)`` and the bias as the last row of W, token i of a
mini-batch has the loss ``1/2 |norm(k'_i W) - target_i|^2`` (half the paper's, as in its code). Its gradient G_i with
respect to ``k'_i W`` is taken at the mini-batch's first W. Then ``W_i = W - t_i sum_{j<=i} l_j k'_j^T G_j``, the output
is ``q'_i W_i``, and the next mini-batch starts from the last W_i. That is the primal form. The dual form is
``q'_i W - t_i sum_{j<=i} l_j (q'_i . k'_j) G_j``: no W_i is made. ``t_i`` depends on the place i in the mini-batch,
``l_j`` on the token.

Mini-batches are counted from the start of the document, wherever ranks are cut. The state therefore holds the sum
``A = sum_j l_j k'_j^T G_j`` of an unfinished mini-batch beside W, and a run may start and end at any token.

Legend: B batch, T local tokens, S global tokens, H heads, E head dim, F = E + 1, L = B x H lanes, N pieces of
mini-batches, C tokens per mini-batch.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longctx.errors import UnsupportedError
from longctx.sequence.collectives.handoff import Operands, handoff, planned_handoff
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.tables import Tables

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class InnerModel(NamedTuple):
    """What a document starts from, and how the inner model learns and normalises."""

    start_HFE: Tensor
    """W, its last row the bias."""
    scale_C: Tensor
    """t, by the place of a token in its mini-batch."""
    norm_HE: tuple[Tensor, Tensor] | None
    """Weight and bias of the norm over E; None: no norm, an affine map of the state (a delta rule)."""
    eps: float = 1e-6

    def normalised(self, y_HE: Tensor) -> Tensor:
        """[..., H, E]"""
        if self.norm_HE is None:
            return y_HE
        weight, bias = self.norm_HE
        return nn.functional.layer_norm(y_HE, y_HE.shape[-1:], eps=self.eps) * weight + bias


class TTTState(NamedTuple):
    """W at the start of the current mini-batch, the bias as its last row, and A, the sum over its tokens so far."""

    W_BHFE: Tensor
    A_BHFE: Tensor


def ttt_linear(
    q_BTHE: Tensor, k_BTHE: Tensor, target_BTHE: Tensor, rate_BTH: Tensor, inner: InnerModel, context: SequenceContext,
    state: TTTState | None = None, pieces: int = 1,
) -> tuple[Tensor, TTTState | None]:  # fmt: skip
    """``q'_i W_i`` [B, T, H, E] before the norm, in fp32 (fp64 for fp64), in the dual form; None in, None out.

    Args:
        target_BTHE: what the inner model shall make of k.
        rate_BTH: l, the learning rate of every token.
        pieces: groups of lanes that the ranks of the sequence work on in turn.

    Raises:
        UnsupportedError: the layout's runs have gaps (striped).
    """
    wide, heads = torch.promote_types(q_BTHE.dtype, torch.float32), q_BTHE.shape[2]
    parts = mini_batches(context, len(inner.scale_C))
    rows = [parts.split(t.to(wide)) for t in (q_BTHE, k_BTHE, target_BTHE, rate_BTH[..., None])]
    operands = Operands((*rows, *parts.tables(inner.scale_C.to(wide), heads)), _per_lane(inner, len(q_BTHE), wide))
    before = inner.start_HFE.new_zeros(len(q_BTHE), heads, 2, *inner.start_HFE.shape[1:], dtype=wide)
    if state is not None:
        before = torch.stack(state, dim=2).to(wide)

    def step(operands: Operands, state_L2FE: Tensor, run: int) -> tuple[Tensor, Tensor]:
        return _learn(operands, state_L2FE, inner.eps, parts.plain[run])

    y, after = handoff(
        step, operands, before.flatten(0, 1), parts.runs, context, shape=(parts.size, q_BTHE.shape[3]), pieces=pieces,
        final=state is not None,
    )  # fmt: skip
    y_BTHE = parts.join(y, heads)
    if state is None or after is None:
        return y_BTHE, None
    return y_BTHE, TTTState(*after.view(len(q_BTHE), heads, *after.shape[1:]).unbind(2))


def ttt_linear_naive(
    q_BSHE: Tensor, k_BSHE: Tensor, target_BSHE: Tensor, rate_BSH: Tensor, inner: InnerModel, context: SequenceContext,
    state: TTTState | None = None,
) -> tuple[Tensor, TTTState]:  # fmt: skip
    """The same in the primal form, token by token on one rank; gradients of the inner loss by autograd."""
    position_BS, size = context.positions(q_BSHE.device), len(inner.scale_C)
    W = inner.start_HFE.expand(len(q_BSHE), *inner.start_HFE.shape) if state is None else state.W_BHFE
    A = torch.zeros_like(W) if state is None else state.A_BHFE
    outputs = []
    for t in range(q_BSHE.shape[1]):
        place = position_BS[:, t] % size
        starts, ends = ((x == y)[:, None, None, None] for x, y in ((position_BS[:, t], 0), (place, size - 1)))
        W, A = torch.where(starts, inner.start_HFE, W), torch.where(starts, 0, A)
        A = A + rate_BSH[:, t, :, None, None] * _inner_gradient(W, k_BSHE[:, t], target_BSHE[:, t], inner)
        now = W - inner.scale_C[place][:, None, None, None] * A
        outputs.append((with_one(q_BSHE[:, t])[..., None, :] @ now)[..., 0, :])
        W, A = torch.where(ends, now, W), torch.where(ends, 0, A)
    return torch.stack(outputs, dim=1), TTTState(W, A)


def planned_ttt_linear(
    context: SequenceContext, heads: int, head_dim: int, pieces: int, itemsize: int
) -> list[Transfer]:
    """What :func:`ttt_linear` posts on this rank, forward and then backward."""
    row = 2 * (head_dim + 1) * head_dim * itemsize
    return planned_handoff(context, context.batch * heads, pieces, row)


def with_one(x: Tensor) -> Tensor:
    """(x, 1): what the bias is multiplied with."""
    return torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)


def _inner_gradient(W_BHFE: Tensor, k_BHE: Tensor, target_BHE: Tensor, inner: InnerModel) -> Tensor:
    """Of the inner loss of one token with respect to W, differentiable once more."""
    with torch.enable_grad():
        W = W_BHFE if W_BHFE.requires_grad else W_BHFE.detach().requires_grad_()
        y = (with_one(k_BHE)[..., None, :] @ W)[..., 0, :]
        loss = (inner.normalised(y) - target_BHE).square().sum() / 2
        return torch.autograd.grad(loss, W, create_graph=True)[0]


def _per_lane(inner: InnerModel, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The inner model's tensors, [L, ...]."""
    tensors = (inner.start_HFE, *(t[:, None] for t in inner.norm_HE or ()))
    return tuple(t.to(dtype).expand(batch, *t.shape).flatten(0, 1) for t in tensors)


class _Part(NamedTuple):
    """What one part of a mini-batch takes part with, of every lane."""

    both: Tensor  # k' above q', [L, 2C, F]
    learning: Tensor  # k'^T l, [L, F, C]
    target: Tensor
    attention: Tensor  # t_i l_j q'_i . k'_j for j <= i, [L, C, C]
    fresh: Tensor
    over: Tensor
    closing: Tensor


def _parts_of(tokens: tuple[Tensor, ...]) -> tuple[list[_Part], Tensor]:
    """What does not depend on the state, and t q' of the first part."""
    q, k, target, rate, used, scale, starts, ends, closing = tokens
    q, k = torch.cat((q, used), dim=-1), torch.cat((k, used), dim=-1)
    attention = ((q @ k.mT) * (scale[..., None] * rate.mT)).tril()
    flags = starts[..., None].bool(), ends[..., None].bool(), closing[..., None]
    stacked = (torch.cat((k, q), dim=2), (k * rate).mT, target, attention, *flags)
    # Unbound, not indexed: the gradient of every index is a tensor as long as the run, O(N^2) in all.
    parts = [_Part(*tensors) for tensors in zip(*(t.unbind(1) for t in stacked), strict=True)]
    return parts, scale[:, 0, :, None] * q[:, 0]


def _learn(operands: Operands, state_L2FE: Tensor, eps: float, plain: Bools) -> tuple[Tensor, Tensor]:
    """Outputs of one run [L, N, C, E] and the state after it; ``plain[n]``: whole mini-batches, no document start."""
    start, *norm = operands.rows
    parts, reach = _parts_of(operands.tokens)
    W, A = state_L2FE.unbind(1)
    outputs = []
    for n, part in enumerate(parts):
        if not plain[n]:
            W, A = torch.where(part.fresh, start, W), torch.where(part.fresh, 0, A)
        predicted, y = (part.both @ W).chunk(2, dim=1)
        G = _loss_gradient(predicted, part.target, norm, eps)
        y = torch.baddbmm(y, part.attention, G, alpha=-1)
        # Only the first tokens of a run can find a mini-batch begun.
        outputs.append(torch.baddbmm(y, reach, A, alpha=-1) if n == 0 else y)
        if plain[n]:
            W = torch.baddbmm(W, part.learning * part.closing, G, alpha=-1)
            continue
        A = torch.baddbmm(A, part.learning, G)
        W, A = W - part.closing * A, torch.where(part.over, 0, A)
    return torch.stack(outputs, dim=1), torch.stack((W, A), dim=1)


def _loss_gradient(predicted: Tensor, target: Tensor, norm: list[Tensor], eps: float) -> Tensor:
    """Of ``1/2 |norm(predicted) - target|^2`` with respect to ``predicted``."""
    if not norm:
        return predicted - target
    weight, bias = norm
    centred = predicted - predicted.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    unit = centred * inverse
    slope = (unit * weight + bias - target) * weight
    return (slope - slope.mean(-1, keepdim=True) - unit * (slope * unit).mean(-1, keepdim=True)) * inverse


@dataclass(frozen=True, eq=False)
class MiniBatches:
    """This rank's tokens cut at document starts, at every C-th token of a document, and at the ends of runs.

    Rows have as many parts as the one with most; ``places_BNC``: index among the T local tokens, T where there is none.
    ``positions_BNC``: place of a token in its mini-batch. ``starts``: a document starts with the part; ``ends``: a
    mini-batch ends with it. ``plain[r][n]``: the n-th parts of run r are whole mini-batches in all rows, and no
    document starts with them.
    """

    size: int
    tokens: int
    places_BNC: Ints
    positions_BNC: Ints
    starts_BN: Bools
    ends_BN: Bools
    runs: tuple[tuple[int, int], ...]
    plain: tuple[Bools, ...]
    _tables: Tables = field(default_factory=Tables, init=False, repr=False)

    def split(self, x_BTHE: Tensor) -> Tensor:
        """[B, T, H, E] as [L, N, C, E], zeros where there is no token."""
        batch, _, heads, size = x_BTHE.shape
        padded = torch.cat((x_BTHE, x_BTHE.new_zeros(batch, 1, heads, size)), dim=1)
        first = np.arange(batch).reshape(-1, 1, 1) * (self.tokens + 1)
        index = self._tables.on(x_BTHE.device, "split", lambda: (first + self.places_BNC).reshape(-1))
        rows = padded.flatten(0, 1).index_select(0, index).view(*self.places_BNC.shape, heads, size)
        return rows.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def join(self, x_LNCE: Tensor, heads: int) -> Tensor:
        """[L, N, C, E] as [B, T, H, E]."""
        batch = len(self.places_BNC)
        rows = x_LNCE.view(batch, heads, *x_LNCE.shape[1:]).permute(0, 2, 3, 1, 4).flatten(0, 2)
        held = self.places_BNC < self.tokens
        index = self._tables.on(x_LNCE.device, "join", lambda: np.flatnonzero(held.reshape(-1)))
        # Ascending places: within a row, parts and their tokens are in local order.
        return rows.index_select(0, index).view(batch, self.tokens, heads, x_LNCE.shape[-1])

    def tables(self, scale_C: Tensor, heads: int) -> tuple[Tensor, ...]:
        """Per lane: 1 for tokens [L, N, C, 1], their t [L, N, C], starts and ends as 1 and t at the ends [L, N, 1]."""
        device = scale_C.device
        used = self._tables.on(device, "used", lambda: (self.places_BNC < self.tokens)[..., None]).to(scale_C)
        starts = self._tables.on(device, "starts", lambda: self.starts_BN[..., None]).to(scale_C)
        ends = self._tables.on(device, "ends", lambda: self.ends_BN[..., None]).to(scale_C)
        scale = scale_C[self._tables.on(device, "positions", lambda: self.positions_BNC)]
        return tuple(t.repeat_interleave(heads, dim=0) for t in (used, scale, starts, ends, ends * scale_C[-1]))


def mini_batches(context: SequenceContext, size: int) -> MiniBatches:
    """The parts of this rank's tokens, found once per context.

    Raises:
        UnsupportedError: the layout's runs have gaps (striped).
    """
    found: MiniBatches = context.once(("mini-batches", size, context.rank), lambda: _find(context, size))
    return found


def _find(context: SequenceContext, size: int) -> MiniBatches:
    positions_BT = context.positions().numpy()
    tables, runs, local, first = [], [], 0, 0
    for run in context.layout.runs[context.rank]:
        if run.step != 1:
            raise UnsupportedError("a state is handed along neighbouring tokens; use a layout other than striped")
        places = _parts(positions_BT[:, local : local + run.size], size) + local
        places[places == local - 1] = context.local_length
        tables.append(places)
        runs.append((first, first + places.shape[1]))
        local, first = local + run.size, first + places.shape[1]
    batch = len(positions_BT)
    places_BNC = np.concatenate(tables, axis=1) if tables else np.empty((batch, 0, size), dtype=np.int64)
    padded = np.concatenate((positions_BT, np.full((batch, 1), -1)), axis=1)
    positions_BNC = np.take_along_axis(padded, places_BNC.reshape(batch, -1), axis=1).reshape(places_BNC.shape)
    starts, ends = positions_BNC[..., 0] == 0, (positions_BNC % size == size - 1) & (positions_BNC >= 0)
    whole = (ends[..., -1] & ~starts).all(0)
    return MiniBatches(
        size, context.local_length, places_BNC, positions_BNC.clip(0) % size, starts, ends.any(-1), tuple(runs),
        tuple(whole[a:b] for a, b in runs),
    )  # fmt: skip


def _parts(positions_BT: Ints, size: int) -> Ints:
    """Indices of the tokens of one run by part, [B, N, C], -1 where there is none."""
    begins = positions_BT % size == 0
    begins[:, 0] = True
    part = begins.cumsum(axis=1) - 1
    index = np.arange(positions_BT.shape[1])
    offset = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    places = np.full((len(positions_BT), int(part.max(initial=-1)) + 1, size), -1, dtype=np.int64)
    np.put_along_axis(places.reshape(len(places), -1), part * size + offset, np.broadcast_to(index, part.shape), axis=1)
    return places
