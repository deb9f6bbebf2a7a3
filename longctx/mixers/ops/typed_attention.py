"""Softmax attention in which every key has a type per kv head that says how long it is seen; a ring over ranks.

The mask is ``j <= i <= end_j`` inside documents (:mod:`longctx.mixers.ops.token_types`). Keys, values and one integer
per key and kv head (type and next Global) travel; their gradients and those of the types come home. Work is cut into
tiles of C x C pairs, and beside its operands a rank holds the scores of one tile. The forward leaves out tiles in which
nobody sees a key; a backward that wants gradients of types works on all causal pairs.

With M the mask, out_i = sum_j M_ij e^s_ij v_j / sum_j M_ij e^s_ij. The gradient of a type is that of out by M_ij,
``p_ij (dout_i v_j - dout_i out_i)``, summed over the queries that the type would let see the key, whether they do or
not; p_ij, the weight the key would have, is at most 1, as in the authors' code. Where the next Global is stays fixed.

Legend: N query rows, M key rows, n and m those of a tile, H query heads, K kv heads, G = H / K, E head dim, 3 types.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.attention.cutting import tiles
from longctx.attention.merge import merge_
from longctx.attention.schemes import inner_and_outer, schedules_of
from longctx.errors import UnsupportedError
from longctx.mixers.ops.token_types import GLOBAL, LOCAL, SLIDING, next_global, planned_next_global
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.ring import Homeward, circulate
from longctx.sequence.collectives.schedule import Schedule, planned_transfers
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once
from longctx.sequence.plan import AttentionPlan
from longctx.sequence.slices import Slice


class Typed(NamedTuple):
    """Keys, values and types, the last one-hot."""

    k_BSKE: Tensor
    v_BSKE: Tensor
    type_BSK3: Tensor


@dataclass(frozen=True)
class Call:
    """All of a call that is no tensor; ``trains``: whether types want a gradient."""

    context: SequenceContext
    window: int
    tile: int
    trains: bool

    @property
    def plan(self) -> AttentionPlan:
        """Which pairs are in one document and causal."""
        return self.context.plan(causal=True)

    @property
    def schedule(self) -> Schedule:
        """Who works on whose keys when."""
        double = self.context.scheme == "double_ring" and self.context.degree > 1
        width = inner_and_outer(self.context)[0].size if double else None
        return schedules_of(self.context, self.plan, width).there

    @property
    def key_rows(self) -> list[int]:
        """Flattened key rows of every rank."""
        return [self.context.batch * size for size in self.plan.keys.sizes]


def typed_attention(q_BTHE: Tensor, keys: Typed, call: Call) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks; after a past the keys are all past and new ones.

    Returns:
        out_BTHE in the dtype of q, and the pressure of these tokens, a scalar: over tokens and heads, the share of its
        document for which a Global or Local is seen. It is differentiable in the type a token has (the authors' code).

    Raises:
        UnsupportedError: a scheme other than rings; a past over more than one rank.
    """
    check(call.context)

    def attend(q: Tensor, k: Tensor, v: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        out, _, pressure = attend_typed(q, Typed(k, v, types), call)
        return out, pressure

    out_BTHE, pressure = run_once(attend, (q_BTHE, *keys), call.context.kept)
    return out_BTHE, pressure


def check(context: SequenceContext) -> None:
    """Raises UnsupportedError as :func:`typed_attention` says."""
    if context.degree == 1:
        return
    if context.past:
        raise UnsupportedError("typed keys of past tokens belong to one rank; decode with degree 1")
    if context.scheme not in ("ring", "double_ring", "auto"):
        raise UnsupportedError(
            f"sequence.scheme {context.scheme} moves no token types; use ring, double_ring or auto for nats"
        )


def attend_typed(q_BTHE: Tensor, keys: Typed, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """out_BTHE, lse_BTH without gradient, and the pressure, outside of any recomputation."""
    next_BSK = next_global(keys.type_BSK3[..., GLOBAL] > 0.5, call.context)
    flat = [t.flatten(0, 1) for t in (q_BTHE, *keys, next_BSK)]
    out_NHE, lse_NH = _Attention.apply(*flat, call)  # type: ignore[no-untyped-call]
    pressure = _pressure(keys.type_BSK3, next_BSK, q_BTHE.shape[1], call)
    return out_NHE.view(q_BTHE.shape), lse_NH.view(q_BTHE.shape[:3]), pressure


def planned_typed_attention(
    call: Call, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[list[Transfer], list[Transfer]]:
    """What :func:`typed_attention` posts on this rank, forward and backward."""
    context = call.context
    if context.degree == 1:
        return [], []
    wide = torch.promote_types(dtype, torch.float32).itemsize
    row = kv_heads * (2 * head_dim * dtype.itemsize + 8)
    home = kv_heads * (2 * head_dim + 3 * call.trains) * wide
    there = planned_transfers(context.group, call.schedule, call.key_rows, row)
    back = planned_transfers(context.group, call.schedule, call.key_rows, row, home)
    return planned_next_global(context, kv_heads) + there, back


def _pressure(type_BSK3: Tensor, next_BSK: Tensor, new: int, call: Call) -> Tensor:
    """See :func:`typed_attention`."""
    rows = _rows(call.context, call.context.rank, next_BSK.device)
    index_BS1, first_BS1, last_BS1 = (t.view(*next_BSK.shape[:2], 1) for t in rows)
    lives = (last_BS1 + 1 - index_BS1).expand_as(next_BSK), next_BSK.minimum(last_BS1) - index_BS1
    old, length_BS11 = next_BSK.shape[1] - new, (last_BS1 + 1 - first_BS1)[..., None]
    types_BTK2 = type_BSK3[:, old:, :, :SLIDING]
    share_BTK2 = (torch.stack(lives, dim=-1).to(types_BTK2.dtype) / length_BS11)[:, old:]
    return (types_BTK2 * (types_BTK2.detach() > 0.5) * share_BTK2).sum()


class _Attention(torch.autograd.Function):
    """q_NHE, k_MKE, v_MKE, type_MK3 and next_MK of this rank -> out_NHE, lse_NH."""

    @staticmethod
    def forward(
        ctx: Any, q_NHE: Tensor, k_MKE: Tensor, v_MKE: Tensor, type_MK3: Tensor, next_MK: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q_NHE.dtype, torch.float32)
        out_NHE = torch.zeros_like(q_NHE, dtype=wide)
        lse_NH = out_NHE.new_full(out_NHE.shape[:2], float("-inf"))
        own = Keys(k_MKE, v_MKE, type_MK3.argmax(-1), next_MK)
        for _, source, keys in _visits(own, call):
            if keys is None:
                continue
            hop = Hop.of(keys, source, call)
            for tile in hop.tiles(call, seen_only=True):
                rows = slice(tile.q_start, tile.q_end)
                merge_(out_NHE[rows], lse_NH[rows], *_forward_tile(q_NHE[rows], hop.part(tile), wide))
        ctx.save_for_backward(q_NHE, *own, out_NHE, lse_NH)
        ctx.mark_non_differentiable(lse_NH)
        ctx.call = call
        return out_NHE.to(q_NHE.dtype), lse_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        q_NHE, k_MKE, v_MKE, kind_MK, next_MK, out_NHE, lse_NH = ctx.saved_tensors
        dout_NHE = dout_NHE.to(lse_NH.dtype)
        queries = Queries(q_NHE, dout_NHE, lse_NH, (dout_NHE * out_NHE).sum(-1))
        dq_NHE = torch.zeros_like(out_NHE)
        home_MKF = _gradients(queries, Keys(k_MKE, v_MKE, kind_MK, next_MK), dq_NHE, call)
        dk, dv, dtype = torch.split(home_MKF, [k_MKE.shape[2]] * 2 + [3 * call.trains], dim=2)
        return (
            dq_NHE.to(q_NHE.dtype), dk.to(k_MKE.dtype), dv.to(v_MKE.dtype), dtype if call.trains else None, None, None,
        )  # fmt: skip


class Keys(NamedTuple):
    """Keys of one rank: each with its type as a number, and the global index of the next Global."""

    k_MKE: Tensor
    v_MKE: Tensor
    kind_MK: Tensor
    next_MK: Tensor


class Queries(NamedTuple):
    """What the backward of a block of keys needs to know about queries; delta is the row sum of dout * out."""

    q_NHE: Tensor
    dout_NHE: Tensor
    lse_NH: Tensor
    delta_NH: Tensor


class Part(NamedTuple):
    """Keys of a tile, and which queries see them: by their own type, and causally up to where each type would end."""

    k_mKE: Tensor
    v_mKE: Tensor
    visible_Knm: Tensor
    behind_nm: Tensor
    index_n: Tensor
    ends_mK3: Tensor


@dataclass(frozen=True)
class Hop:
    """Keys of one rank as this one's queries see them; ``ends_MK3``: the last query that would see each, by type."""

    keys: Keys
    slices: tuple[Slice, ...]
    query_N: Tensor
    index_M: Tensor
    ends_MK3: Tensor
    reach_MK: Tensor

    @staticmethod
    def of(keys: Keys, source: int, call: Call) -> "Hop":
        """With the ends of every type, none beyond its document."""
        device = keys.next_MK.device
        index_M, _, last_M = _rows(call.context, source, device)
        last_MK = last_M[:, None].expand_as(keys.next_MK)
        ends = [last_MK] * 3
        ends[LOCAL] = last_MK.minimum(keys.next_MK)
        ends[SLIDING] = last_MK.minimum(index_M[:, None] + call.window)
        ends_MK3 = torch.stack(ends, dim=-1)
        reach_MK = ends_MK3.gather(2, keys.kind_MK[..., None])[..., 0]
        slices, rank = call.plan.slices(call.context.rank, source), call.context.rank
        return Hop(keys, slices, _query_rows(call, rank, device), index_M, ends_MK3, reach_MK)

    def tiles(self, call: Call, seen_only: bool) -> Iterator[Slice]:
        """The work; with ``seen_only`` without tiles in which no query sees a key, which the host must know."""
        reach_M: npt.NDArray[np.int64] | None = None
        if seen_only and self.slices:
            reach_M, query_N = self.reach_MK.amax(1).cpu().numpy(), self.query_N.cpu().numpy()
        for s in self.slices:
            for tile in tiles(s, call.tile, call.tile):
                if reach_M is None or reach_M[tile.k_start : tile.k_end].max() >= query_N[tile.q_start]:
                    yield tile

    def part(self, tile: Slice) -> Part:
        """The keys of a tile."""
        columns = slice(tile.k_start, tile.k_end)
        index_n, index_m = self.query_N[tile.q_start : tile.q_end], self.index_M[columns]
        behind_nm = index_n[:, None] >= index_m
        visible_Knm = behind_nm & (index_n[:, None] <= self.reach_MK[columns].T[:, None])
        return Part(
            self.keys.k_MKE[columns], self.keys.v_MKE[columns], visible_Knm, behind_nm, index_n, self.ends_MK3[columns]
        )


def _visits(own: Keys, call: Call) -> Iterator[tuple[int, int, Keys | None]]:
    """Step, source and keys, as they come; this rank's own are copied only to be sent."""
    context, schedule = call.context, call.schedule
    packed = _packed(own) if len(schedule.steps) > 1 else own.k_MKE
    for step, source, block in circulate(packed, call.key_rows, schedule, context.group, context.ledger):
        yield step, source, own if step == 0 else None if block is None else _unpacked(block, own)


def _packed(keys: Keys) -> Tensor:
    """Bytes, one row per token; a type and an index below 2 ** 61 are one number."""
    parts = keys.k_MKE, keys.v_MKE, keys.next_MK * 3 + keys.kind_MK
    return torch.cat([t.contiguous().flatten(1).view(torch.uint8) for t in parts], dim=1)


def _unpacked(block: Tensor, like: Keys) -> Keys:
    heads, size = like.k_MKE.shape[1:]
    row = heads * size * like.k_MKE.element_size()
    k, v, code = (t.contiguous() for t in torch.split(block, [row, row, heads * 8], dim=1))
    code_MK = code.view(torch.int64)
    k_MKE, v_MKE = (t.view(like.k_MKE.dtype).view(-1, heads, size) for t in (k, v))
    return Keys(k_MKE, v_MKE, code_MK % 3, code_MK // 3)


def _gradients(queries: Queries, own: Keys, dq_NHE: Tensor, call: Call) -> Tensor:
    """Adds to ``dq_NHE``; gradients of this rank's keys, values and types side by side, [M, K, 2 E + 3]."""
    heads, size = own.k_MKE.shape[1:]
    none = dq_NHE.new_empty(0, heads, 2 * size + 3 * call.trains)
    context, schedule = call.context, call.schedule
    homeward = Homeward(none, call.key_rows, schedule, context.group, context.ledger)
    mine = none
    for step, source, keys in _visits(own, call):
        found = None
        if keys is not None and (step == 0 or schedule.needed[step, context.rank]):
            found = _gradients_of_hop(queries, Hop.of(keys, source, call), dq_NHE, call)
        if step:
            homeward.add(step, found)
        elif found is not None:
            mine = found
    arrived = homeward.arrived()
    return mine if arrived is None else mine.add_(arrived)


def _gradients_of_hop(queries: Queries, hop: Hop, dq_NHE: Tensor, call: Call) -> Tensor:
    rows, heads, size = hop.keys.k_MKE.shape
    home_MKF = dq_NHE.new_zeros(rows, heads, 2 * size + 3 * call.trains)
    for tile in hop.tiles(call, seen_only=not call.trains):
        q_rows, part = slice(tile.q_start, tile.q_end), hop.part(tile)
        dq_nHE, *found = _backward_tile(Queries(*(t[q_rows] for t in queries)), part, call.trains)
        dq_NHE[q_rows] += dq_nHE
        home_MKF[tile.k_start : tile.k_end] += torch.cat(found, dim=2)
    return home_MKF


def _scores(q_nHE: Tensor, part: Part, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores [K, G, n, m], and the queries by kv head and the keys that made them, wide."""
    heads, size = part.k_mKE.shape[1:]
    q_nKGE, k_mKE = q_nHE.to(wide).view(len(q_nHE), heads, -1, size), part.k_mKE.to(wide)
    return torch.einsum("nkge,mke->kgnm", q_nKGE, k_mKE).mul_(size**-0.5), q_nKGE, k_mKE


def _forward_tile(q_nHE: Tensor, part: Part, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the keys of a tile; 0 and -inf where a query sees none of them."""
    score_KGnm = _scores(q_nHE, part, wide)[0].masked_fill_(~part.visible_Knm[:, None], float("-inf"))
    lse_KGn = score_KGnm.logsumexp(-1)
    weight_KGnm = score_KGnm.sub_(lse_KGn.masked_fill(lse_KGn.isneginf(), 0)[..., None]).exp_()
    out_nKGE = torch.einsum("kgnm,mke->nkge", weight_KGnm, part.v_mKE.to(wide))
    return out_nKGE.flatten(1, 2), lse_KGn.permute(2, 0, 1).flatten(1)


def _backward_tile(queries: Queries, part: Part, trains: bool) -> list[Tensor]:
    """dq [n, H, E], dk and dv [m, K, E] and, where types train, dtype [m, K, 3]."""
    wide, heads, size = queries.lse_NH.dtype, *part.k_mKE.shape[1:]
    score_KGnm, q_nKGE, k_mKE = _scores(queries.q_NHE, part, wide)
    dout_nKGE = queries.dout_NHE.view(-1, heads, q_nKGE.shape[2], size)
    lse_KGn1, delta_KGn1 = (
        t.view(-1, heads, q_nKGE.shape[2]).permute(1, 2, 0)[..., None] for t in (queries.lse_NH, queries.delta_NH)
    )
    # What it would weigh: at most 1, which it is at once where the key is seen.
    weight_KGnm = score_KGnm.sub_(lse_KGn1).clamp_(max=0).exp_()
    by_mask_KGnm = torch.einsum("nkge,mke->kgnm", dout_nKGE, part.v_mKE.to(wide)).sub_(delta_KGn1).mul_(weight_KGnm)
    hidden_K1nm = ~part.visible_Knm[:, None]
    dv_mKE = torch.einsum("kgnm,nkge->mke", weight_KGnm.masked_fill_(hidden_K1nm, 0), dout_nKGE)
    del score_KGnm, weight_KGnm  # one tensor
    found = [_by_type(by_mask_KGnm.sum(1), part)] if trains else []
    dscore_KGnm = by_mask_KGnm.masked_fill_(hidden_K1nm, 0).mul_(size**-0.5)
    dq_nKGE = torch.einsum("kgnm,mke->nkge", dscore_KGnm, k_mKE)
    dk_mKE = torch.einsum("kgnm,nkge->mke", dscore_KGnm, q_nKGE)
    return [dq_nKGE.flatten(1, 2), dk_mKE, dv_mKE, *found]


def _by_type(by_mask_Knm: Tensor, part: Part) -> Tensor:
    """Sums [m, K, 3] over the queries that each type lets see a key."""
    by_mask_Knm.masked_fill_(~part.behind_nm, 0)
    sums = []
    for end_mK in part.ends_mK3.unbind(-1):
        sums.append(by_mask_Knm.masked_fill(part.index_n[:, None] > end_mK.T[:, None], 0).sum(1).T)
    return torch.stack(sums, dim=-1)


def _query_rows(call: Call, rank: int, device: torch.device) -> Tensor:
    """Global indices of this rank's queries, [N]."""

    def make() -> Tensor:
        index_T = torch.from_numpy(call.plan.queries.indices(rank))
        return index_T.repeat(call.context.batch).to(device)

    index_N: Tensor = call.context.once(("typed queries", rank, str(device)), make)
    return index_N


def _rows(context: SequenceContext, source: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Global index of every key of a rank, and first and last index of its document, [M] each."""

    def make() -> tuple[Tensor, ...]:
        index_S = context.plan(causal=True).keys.indices(source)
        tables: list[npt.NDArray[np.int64]] = []
        for starts in context.documents:
            bounds = np.array([*starts, context.length], dtype=np.int64)
            document_S = np.searchsorted(bounds[:-1], index_S, side="right") - 1
            tables.append(np.stack((index_S, bounds[document_S], bounds[document_S + 1] - 1)))
        return torch.from_numpy(np.concatenate(tables, axis=1)).to(device).unbind(0)

    index_M, first_M, last_M = context.once(("typed keys", source, str(device)), make)
    return index_M, first_M, last_M
