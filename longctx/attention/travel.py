"""What travels in the backward of ring attention: keys and values with their gradients, or queries with theirs.

Per token, keys and values cost ``2 K E`` numbers and their gradients ``2 K E`` wide ones; queries cost ``q`` and
``dout``, ``2 H E`` numbers, two wide numbers per head and ``H E`` wide ones for the gradient. Without grouped heads
(H = K) queries are fewer bytes in half precision, with them keys and values are.

Legend: N query rows, H query heads, K kv heads, E head dim.
"""

from typing import NamedTuple

import torch

from longctx.sequence.plan import AttentionPlan


class QueryBlock(NamedTuple):
    """All that the backward of a block of keys needs to know about some queries, in a kernel's order."""

    dout_NHE: torch.Tensor
    q_NHE: torch.Tensor
    out_NHE: torch.Tensor
    lse_NH: torch.Tensor


def queries_travel(plan: AttentionPlan, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether it is fewer bytes to send queries around than keys and values."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    keys = 2 * kv_heads * head_dim * (dtype.itemsize + wide) * plan.keys.length
    queries = (query_bytes(heads, head_dim, dtype) + heads * head_dim * wide) * plan.queries.length
    return queries < keys


def query_bytes(heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one packed query row."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return heads * (2 * head_dim * dtype.itemsize + 2 * wide)


def pack_queries(block: QueryBlock) -> torch.Tensor:
    """q, dout, lse and delta (the row sum of dout * out) side by side, uint8 [N, query_bytes]."""
    wide = block.lse_NH.dtype
    delta_NH = (block.dout_NHE.to(wide) * block.out_NHE.to(wide)).sum(-1)
    parts = (block.q_NHE, block.dout_NHE.to(block.q_NHE.dtype), block.lse_NH, delta_NH)
    return torch.cat([part.contiguous().flatten(1).view(torch.uint8) for part in parts], dim=1)


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
