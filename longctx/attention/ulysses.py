"""Ulysses and hybrid attention: exchange tokens for heads inside a group, attend, exchange back.

DeepSpeed-Ulysses (arXiv 2309.14509) where the group is all ranks of the sequence; USP's two dimensions (arXiv
2405.07719) where it is the inner group and a ring runs over the outer one. Heads need not divide the group: every rank
gets a nearly equal range of query heads, possibly none, and the kv heads these need.

Legend: B batch, T local tokens, U tokens of the inner group, H query heads, K kv heads, E head dim.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from longctx.sequence.collectives.transpose import Heads, Transposition

Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""q_BTHE, k_BTKE, v_BTKE, sink_H, bias_2HE."""


class Attend(Protocol):
    """Attention over the inner group's tokens, for some of the heads: [B, U, H, E] and its log-sum-exp [B, U, H]."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class HeadShare:
    """Ranges of query and kv heads of every rank.

    ``index[r]``: which of rank r's kv heads each of its groups of equally many query heads uses.
    """

    queries: Heads
    keys: Heads
    index: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(heads: int, kv_heads: int, size: int) -> "HeadShare":
        """Nearly equal shares of query heads over ``size`` ranks."""
        group = heads // kv_heads
        queries = tuple((heads * r // size, heads * (r + 1) // size) for r in range(size))
        keys = tuple((a // group, -(-b // group)) if a < b else (0, 0) for a, b in queries)
        return HeadShare(queries, keys, tuple(_index(a, b, group) for a, b in queries))


def _index(start: int, stop: int, group: int) -> tuple[int, ...]:
    """Query heads [start, stop) in groups as large as the borders between kv heads allow; each group's kv head."""
    borders = [start, *range((start // group + 1) * group, stop, group), stop]
    step = math.gcd(*(b - a for a, b in pairwise(borders)))
    return tuple(head // group - start // group for head in range(start, stop, step)) if step else ()


def exchanged(
    attend: Attend, operands: Operands, plan: Transposition, share: HeadShare,
    tables: tuple[Tensor, Tensor] | None, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention output [B, T, H, E] of this rank's tokens, and the log-sum-exp [B, T, H] where it is asked for.

    Args:
        tables: the n-th token for ``attend`` is the tables[0][n]-th of the group's tokens rank after rank, and
            tables[1] is the inverse. None: the same order.
    """
    order, back = tables or (None, None)
    own = slice(*share.queries[plan.group.rank])
    sink_H, bias_2HE = operands[3:]
    sink, bias = None if sink_H is None else sink_H[own], None if bias_2HE is None else bias_2HE[:, own]
    q_BUHE, k_BUKE, v_BUKE = (_arranged(t, order) for t in plan.to_heads(*operands[:3]))
    if not q_BUHE.shape[2]:
        # No head is left for this rank, but its share of the exchange, and what is learned, must stay in the graph.
        out_BUHE = q_BUHE if sink is None else q_BUHE + sink[:, None]
        out_BUHE = out_BUHE if bias is None else out_BUHE + bias.sum(0)
        return plan.to_tokens(out_BUHE), _lse_to_tokens(q_BUHE[..., 0].detach(), plan) if return_lse else None
    index = share.index[plan.group.rank]
    if index != tuple(range(k_BUKE.shape[2])):
        k_BUKE, v_BUKE = (t[:, :, list(index)] for t in (k_BUKE, v_BUKE))
    out_BUHE, lse_BUH = attend(q_BUHE, k_BUKE, v_BUKE, sink, bias)
    out_BTHE = plan.to_tokens(_arranged(out_BUHE, back))
    return out_BTHE, _lse_to_tokens(_arranged(lse_BUH, back), plan) if return_lse else None


def _lse_to_tokens(lse_BUH: Tensor, plan: Transposition) -> Tensor:
    wide = lse_BUH.to(torch.promote_types(lse_BUH.dtype, torch.float32))
    return plan.to_tokens(wide[..., None])[..., 0]


def _arranged(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)
