"""Which tokens stay: the highest scores of every group, over the tokens of all ranks, exactly as many as asked for.

Scores are compared in fp32, equal ones by position, the later one first: no two tokens of a lane are equal, so one rank
and many keep the same. The boundary is found digit by digit (radix selection): per digit a histogram of every group is
summed over the ranks, 8 messages of 256 counts per group, however many tokens there are.

Legend: n tokens of this rank, G groups.
"""

import torch
from torch import Tensor

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger
from longctx.sequence.collectives.reduce import reduce_

_DIGIT = 8
_WORD = 64


def ranked(score_n: Tensor, lane_n: Tensor, position_n: Tensor, lanes: int) -> Tensor:
    """Integers [n] in the order of the scores; equal scores by position and then by lane.

    Args:
        score_n: fp32, no NaN.
        position_n: below ``2**31 / lanes``.
    """
    bits_n = (score_n.float() + 0.0).view(torch.int32).long()  # -0 is 0
    # Floats in sign and magnitude as integers that ascend with them.
    order_n = torch.where(bits_n < 0, -(bits_n & 0x7FFFFFFF), bits_n)
    return (order_n << 32) + position_n * lanes + lane_n


def select(
    rank_n: Tensor, group_n: Tensor, budget_G: Tensor, ranks: Group | None = None, ledger: Ledger | None = None
) -> Tensor:
    """Which tokens are among the ``budget_G`` highest of their group over all ranks; all where there are fewer.

    Args:
        rank_n: from :func:`ranked`.
        group_n: of each token.
        budget_G: the same on every rank.
    """
    groups, device = len(budget_G), rank_n.device
    # As unsigned numbers: the sign bit is turned, so that the first digit ascends, too.
    key_n = rank_n ^ (-(2**63))
    prefix_G = torch.zeros(groups, dtype=torch.int64, device=device)
    left_G = budget_G.to(device).clone()
    for shift in range(_WORD - _DIGIT, -1, -_DIGIT):
        digit_n = (key_n >> shift) & 255
        known = (1 << (_WORD - shift - _DIGIT)) - 1  # bits that are settled; a shift to the right repeats the sign
        same_n = (key_n >> shift >> _DIGIT) & known == prefix_G[group_n]
        counts_GD = torch.zeros(groups * 256, dtype=torch.int64, device=device)
        counts_GD.index_add_(0, (group_n * 256 + digit_n)[same_n], torch.ones_like(digit_n[same_n]))
        counts_GD = counts_GD.view(groups, 256)
        if ranks is not None and ranks.size > 1:
            reduce_(counts_GD, "sum", ranks, ledger)
        above_GD = counts_GD.flip(1).cumsum(1).flip(1)  # tokens of this digit or a higher one
        reach_GD = above_GD >= left_G[:, None]
        digit_G = (reach_GD.sum(1) - 1).clamp_min(0)  # the highest digit with enough at or above it
        higher_G = torch.where(digit_G < 255, above_GD.gather(1, (digit_G + 1).clamp_max(255)[:, None])[:, 0], 0)
        left_G = left_G - higher_G
        prefix_G = (prefix_G << _DIGIT) | digit_G
    boundary_G = prefix_G ^ (-(2**63))
    chosen_n = rank_n >= boundary_G[group_n]
    return chosen_n & (budget_G.to(device) > 0)[group_n]
