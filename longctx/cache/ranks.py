"""What a rank asks the others about tokens of which each holds some; with one rank all of it is the identity.

Legend: B batch, K kv heads, T tokens of this rank, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger
from longctx.sequence.collectives.reduce import reduce_
from longctx.sequence.collectives.summaries import gathered


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a cache.

    Args:
        seen: tokens of a row so far.
    """

    seen: int
    group: Group | None = None
    ledger: Ledger | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no other rank to ask."""
        return self.group is None or self.group.size == 1

    def total(self, own: Tensor) -> Tensor:
        """The sum over ranks."""
        return own if self.group is None or self.alone else reduce_(own.clone(), "sum", self.group, self.ledger)

    def highest(self, own: Tensor) -> Tensor:
        """The maximum over ranks."""
        return own if self.group is None or self.alone else reduce_(own.clone(), "max", self.group, self.ledger)

    def merged(self, positions: Sequence[Tensor]) -> list[Tensor]:
        """Positions of every lane (each rank has its own, ascending) on all ranks, ascending; int64.

        All of them travel to every rank, 4 bytes each.
        """
        if self.group is None or self.alone:
            return list(positions)
        longest = int(self.highest(torch.tensor([max(map(len, positions))]))[0])
        if not longest:
            return list(positions)
        after = torch.iinfo(torch.int32).max
        padded = [functional.pad(p.int(), (0, longest - len(p)), value=after) for p in positions]
        found = torch.cat(gathered(torch.stack(padded), self.group, self.ledger).unbind(0), dim=-1)
        return [row[row < after] for row in found.sort(dim=-1).values.long()]

    def smoothed(self, score_BKT: Tensor, positions_BKT: Tensor, kernel: int) -> Tensor:
        """Means over ``kernel`` tokens that follow each other in the cache, as fp32; outside of it are zeros.

        Over ranks every score travels to every rank, 12 bytes per token and head, since blocks are dealt in turn and
        neighbours lie elsewhere.
        """
        if self.group is None or self.alone:
            return functional.avg_pool1d(score_BKT, kernel, stride=1, padding=kernel // 2).float()
        longest = int(self.highest(torch.tensor([score_BKT.shape[-1]]))[0])
        spare = longest - score_BKT.shape[-1]
        after = torch.iinfo(torch.int32).max
        score = functional.pad(score_BKT.double(), (0, spare))
        position = functional.pad(positions_BKT.int(), (0, spare), value=after)
        scores = torch.cat(gathered(score, self.group, self.ledger).unbind(0), dim=-1)
        positions = torch.cat(gathered(position, self.group, self.ledger).unbind(0), dim=-1)
        order = positions.argsort(dim=-1, stable=True)
        smooth = functional.avg_pool1d(scores.gather(-1, order), kernel, stride=1, padding=kernel // 2).float()
        mine = torch.zeros_like(smooth).scatter(-1, order, smooth)
        start = self.group.rank * longest
        return mine[..., start : start + score_BKT.shape[-1]]
