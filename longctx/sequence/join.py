"""A layout seen from groups of ranks: what neighbours hold together. Integers, and tables of them on a device."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from longctx.sequence.layout import Layout, Run

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Joined:
    """``layout`` over groups of ``inner`` neighbouring ranks each.

    ``order[g][n]``: the n-th token of group g's rank in ``layout`` is the order[g][n]-th of the group's tokens taken
    rank after rank; None where that is no rearrangement.
    """

    layout: Layout
    order: tuple[Ints | None, ...]
    _tables: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor] | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def tables(self, group: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``order`` and ``back`` of a group, brought to the device once; None where that is no rearrangement."""
        if (group, device) not in self._tables:
            order, back = self.order[group], self.back[group]
            there = None if order is None or back is None else (torch.from_numpy(order), torch.from_numpy(back))
            self._tables[group, device] = None if there is None else (there[0].to(device), there[1].to(device))
        return self._tables[group, device]

    @cached_property
    def back(self) -> tuple[Ints | None, ...]:
        """The inverse of ``order``."""
        return tuple(None if order is None else np.argsort(order) for order in self.order)


def join(layout: Layout, inner: int) -> Joined:
    """The layout whose rank g holds what ranks [g * inner, (g + 1) * inner) of ``layout`` hold.

    Tokens are brought into global order where that makes fewer runs, so that attention over them is few slices.
    """
    runs: list[tuple[Run, ...]] = []
    orders: list[Ints | None] = []
    for first in range(0, layout.degree, inner):
        ranks = range(first, first + inner)
        held = [run for rank in ranks for run in layout.runs[rank]]
        tokens = np.concatenate([layout.indices(rank) for rank in ranks])
        order = np.argsort(tokens)
        found = _runs(tokens[order])
        if len(found) > len(held):
            runs.append(tuple(held))
            orders.append(None)
        else:
            runs.append(found)
            orders.append(None if bool((order[1:] > order[:-1]).all()) else order)
    return Joined(Layout(layout.length, tuple(runs)), tuple(orders))


def _runs(tokens: Ints) -> tuple[Run, ...]:
    """Runs of neighbours in ascending token indices."""
    if not len(tokens):
        return ()
    cuts = np.flatnonzero(np.diff(tokens) != 1) + 1
    return tuple(Run(int(part[0]), int(part[-1]) + 1) for part in np.split(tokens, cuts))
