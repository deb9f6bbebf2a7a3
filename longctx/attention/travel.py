"""What travels in ring attention, and when.

Keys and values do; in the backward they and their gradients, or queries and theirs.

Per token, keys and values cost ``2 K E`` numbers and their gradients ``2 K E`` wide ones; queries cost ``q`` and
``dout``, ``2 H E`` numbers, two wide numbers per head and ``H E`` wide ones for the gradient. Without grouped heads
(H = K) queries are fewer bytes in half precision, with them keys and values are. Only rows that another rank needs
travel (:mod:`longctx.sequence.parts`), the part of a block.

Legend: N query rows, M key rows, n and m those that travel, H query heads, K kv heads, E head dim.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from longctx.sequence.collectives.schedule import Schedule, ring_schedule
from longctx.sequence.parts import Part
from longctx.sequence.plan import AttentionPlan


@dataclass(frozen=True)
class Schedules:
    """How keys travel to queries, and queries to keys, under one plan; found once and shared by all layers."""

    plan: AttentionPlan
    width: int | None = None

    @cached_property
    def there(self) -> Schedule:
        return ring_schedule(self.plan.needed_pairs, self.width)

    @cached_property
    def back(self) -> Schedule:
        return ring_schedule(self.plan.needed_pairs.T, self.width)

    @cached_property
    def key_rows(self) -> tuple[int, int]:
        """Rows of keys that all ranks together send, and rows of gradients that these bring home."""
        return self.there.rows_sent(self.plan.rows("keys"))

    @cached_property
    def query_rows(self) -> tuple[int, int]:
        """The same of queries."""
        return self.back.rows_sent(self.plan.rows("queries"))


class QueryBlock(NamedTuple):
    """All that the backward of a block of keys needs to know about some queries, in a kernel's order."""

    dout_NHE: torch.Tensor
    q_NHE: torch.Tensor
    out_NHE: torch.Tensor
    lse_NH: torch.Tensor


def queries_travel(schedules: Schedules, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether it is fewer bytes, over all ranks and hops, to send queries around than keys and values."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    (keys, key_gradients), (queries, query_gradients) = schedules.key_rows, schedules.query_rows
    key_numbers, query_numbers = 2 * kv_heads * head_dim, heads * head_dim
    with_keys = key_numbers * (keys * dtype.itemsize + key_gradients * wide)
    with_queries = queries * query_bytes(heads, head_dim, dtype) + query_gradients * query_numbers * wide
    return with_queries < with_keys


def query_bytes(heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one packed query row."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return heads * (2 * head_dim * dtype.itemsize + 2 * wide)


def pack_keys(k_MKE: torch.Tensor, v_MKE: torch.Tensor, part: Part) -> torch.Tensor:
    """Keys and values of the part side by side, kv_m2KE; one copy."""
    if part.whole:
        return torch.stack((k_MKE, v_MKE), dim=1)
    kv_m2KE = k_MKE.new_empty(part.size, 2, *k_MKE.shape[1:])
    for rows, places in part.places():
        kv_m2KE[places, 0], kv_m2KE[places, 1] = k_MKE[rows], v_MKE[rows]
    return kv_m2KE


def pack_queries(block: QueryBlock, part: Part) -> torch.Tensor:
    """q, dout, lse and delta (the row sum of dout * out) of the part side by side, uint8 [n, query_bytes]."""
    heads, head_dim = block.q_NHE.shape[1:]
    packed = block.q_NHE.new_empty(part.size, query_bytes(heads, head_dim, block.q_NHE.dtype), dtype=torch.uint8)
    for rows, places in part.places():
        _pack(QueryBlock(*(t[rows] for t in block)), packed[places])
    return packed


def add_part_(block: torch.Tensor, arrived: torch.Tensor | None, part: Part) -> torch.Tensor:
    """Add what has come home for the rows of the part, if anything has."""
    if arrived is not None:
        for rows, places in part.places():
            block[rows] += arrived[places]
    return block


def _pack(block: QueryBlock, packed: torch.Tensor) -> None:
    wide = block.lse_NH.dtype
    delta_NH = (block.dout_NHE.to(wide) * block.out_NHE.to(wide)).sum(-1)
    parts = (block.q_NHE, block.dout_NHE.to(block.q_NHE.dtype), block.lse_NH, delta_NH)
    torch.cat([part.contiguous().flatten(1).view(torch.uint8) for part in parts], dim=1, out=packed)


def unpack_queries(packed: torch.Tensor, like: QueryBlock) -> QueryBlock:
    """The block that was packed; its ``out`` is another one with the same delta, which is all a backward reads of it.

    ``like`` gives dtypes and numbers of heads.
    """
    heads, head_dim = like.q_NHE.shape[1:]
    dtype, wide = like.q_NHE.dtype, like.lse_NH.dtype
    widths = [heads * head_dim * dtype.itemsize] * 2 + [heads * wide.itemsize] * 2
    q, dout, lse, delta = torch.split(packed, widths, dim=1)
    q_NHE, dout_NHE = (t.contiguous().view(dtype).view(-1, heads, head_dim) for t in (q, dout))
    lse_NH, delta_NH = (t.contiguous().view(wide) for t in (lse, delta))
    return QueryBlock(dout_NHE, q_NHE, _out_with(delta_NH, dout_NHE), lse_NH)


def _out_with(delta_NH: torch.Tensor, dout_NHE: torch.Tensor) -> torch.Tensor:
    """The shortest ``out`` whose row sums of ``dout * out`` are delta: a multiple of dout.

    Scaled by dout's largest entry first, so that neither a square underflows nor a quotient overflows.
    """
    dout = dout_NHE.to(delta_NH.dtype)
    largest_NH1 = dout.abs().amax(-1, keepdim=True)
    unit_NHE = dout / largest_NH1.masked_fill(largest_NH1 == 0, 1)
    share_NH1 = delta_NH[..., None] / largest_NH1.masked_fill(largest_NH1 == 0, 1)
    square_NH1 = unit_NHE.square().sum(-1, keepdim=True).clamp_min(1)
    return (unit_NHE * (share_NH1 / square_NH1)).to(dout_NHE.dtype)
