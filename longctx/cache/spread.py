"""A chunk of a prompt that is cut over ranks meets a cache: its queries, keys and values come together on every rank.

Each rank projects its own tokens of the chunk. Those of all ranks are gathered, so that a rank can keep of the keys
what is its own to keep and let all queries see it; after the merge over ranks it takes back the rows of its own tokens.
What travels grows with the chunk and not with what the cache holds.

Legend: B batch, T tokens of this rank, C tokens of the chunk, H query heads, K kv heads, E head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.sequence.collectives.gather import GatherRows, to_all
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Layout, Run


class Chunk(NamedTuple):
    """All tokens of a chunk, and their context on one rank."""

    q_BCHE: Tensor
    k_BCKE: Tensor
    v_BCKE: Tensor
    context: SequenceContext


def whole_chunk(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, context: SequenceContext) -> Chunk:
    """The chunk of which ``context`` is this rank's part; not differentiable. On one rank the identity."""
    if context.degree == 1:
        return Chunk(q_BTHE, k_BTKE, v_BTKE, context)
    heads, kv_heads = q_BTHE.shape[2], k_BTKE.shape[2]
    together = torch.cat((q_BTHE, k_BTKE, v_BTKE), dim=2)
    whole = gather_chunk(together, context)
    q, k, v = torch.split(whole, [heads, kv_heads, kv_heads], dim=2)
    return Chunk(q, k, v, context.once("on one rank", context.on_one_rank))


def own_rows(x_BC: Tensor, context: SequenceContext) -> Tensor:
    """This rank's rows [B, T, ...] of those of the whole chunk."""
    if context.degree == 1:
        return x_BC
    return x_BC[:, torch.from_numpy(context.layout.indices(context.rank) - context.past).to(x_BC.device)]


def gather_chunk(x_BT: Tensor, context: SequenceContext) -> Tensor:
    """Every rank's rows of the chunk, [B, C, ...] in order; not differentiable."""
    rows = _gather(context).gather(x_BT.flatten(0, 1))
    return rows.view(context.batch, -1, *rows.shape[1:])


def planned_chunk(context: SequenceContext, row_bytes: int) -> list[Transfer]:
    """What :func:`gather_chunk` posts on this rank; ``row_bytes``: of one token."""
    return to_all(context.group, "gather", _gather(context).rows * row_bytes) if context.degree > 1 else []


def _gather(context: SequenceContext) -> GatherRows:
    """Of the new tokens alone: past ones lie on no rank's shard."""

    def make() -> GatherRows:
        past = context.past
        runs = tuple(tuple(Run(r.start - past, r.stop - past, r.step) for r in own) for own in context.layout.runs)
        return GatherRows(context.group, context.batch, Layout(context.length - past, runs), context.ledger)

    found: GatherRows = context.once(("gather a chunk", context.rank), make)
    return found
