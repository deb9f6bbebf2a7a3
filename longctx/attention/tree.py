"""Tree attention: few queries, the same on every rank, over keys of which every rank holds some.

Shyam et al., arXiv 2408.04093. Each rank attends to its own keys; the partial results are joined by one maximum of the
log-sum-exps and one sum of outputs and weights, ``sum w out / sum w`` with ``w = exp(lse - max)``: messages that do not
grow with the keys. Where no rank saw a key the output is 0 and the log-sum-exp -inf.

Legend: B batch, T queries, H query heads, E head dim.
"""

import torch
from torch import Tensor

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.reduce import planned_reduce, reduce_


def tree_merge(out_BTHE: Tensor, lse_BTH: Tensor, group: Group, ledger: Ledger | None = None) -> tuple[Tensor, Tensor]:
    """The attention over the keys of all ranks from that over each rank's own, with the same bits on every rank.

    Args:
        out_BTHE, lse_BTH: fp32 or fp64; 0 and -inf where this rank has no key that the query sees.
    """
    if group.size == 1:
        return out_BTHE, lse_BTH
    top_BTH = reduce_(lse_BTH.clone(), "max", group, ledger)
    base_BTH = top_BTH.masked_fill(top_BTH.isneginf(), 0)
    weight_BTH1 = torch.exp(lse_BTH - base_BTH)[..., None]
    fused = torch.cat((out_BTHE * weight_BTH1, weight_BTH1), dim=-1)
    reduce_(fused, "sum", group, ledger)
    total_BTH = fused[..., -1]
    seen_BTH = total_BTH > 0
    merged_BTHE = fused[..., :-1] / total_BTH.where(seen_BTH, 1.0)[..., None]
    return merged_BTHE, (total_BTH.log() + base_BTH).where(seen_BTH, float("-inf"))


def planned_tree(group: Group, queries: int, head_dim: int, itemsize: int = 4) -> list[Transfer]:
    """What joining ``queries`` rows (batch x tokens x heads) moves to and from this rank."""
    return planned_reduce(group, queries * itemsize) + planned_reduce(group, queries * (head_dim + 1) * itemsize)
