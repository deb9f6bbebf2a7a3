"""How what a layer remembers of one segment comes to the same layer of the next: on this rank, or from its neighbour.

Legend: B batch; ``h`` hidden states of a segment; ``state`` what a layer remembers, tensors [B, ...].
"""

from collections.abc import Callable
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from longctx.sequence.collectives.relay import Relay
from longctx.sequence.context import SequenceContext

Cuts = Callable[[int], bool]
"""Whether gradients stop before a segment."""

State = tuple[Tensor, ...]


class Carried:
    """Every rank has a part of every segment: the states stay where they are."""

    def __init__(self, layers: int, cuts: Cuts) -> None:
        self._states: list[State | None] = [None] * layers
        self._cuts = cuts

    def enter(self, number: int, h: Tensor) -> Tensor:
        """Begin the segment ``number``."""
        if self._cuts(number):
            self._states = [None if s is None else tuple(t.detach() for t in s) for s in self._states]
        return h

    def take(self, layer: int, h: Tensor) -> tuple[Tensor, State]:
        """``h``, and what ``layer`` remembers of the segment before."""
        state, self._states[layer] = self._states[layer], None
        assert state is not None
        return h, state

    def give(self, layer: int, h: Tensor, state: State) -> Tensor:
        """``h``; the state is for the next segment."""
        self._states[layer] = state
        return h

    def leave(self, h: Tensor) -> Tensor:
        """End the segment."""
        return h


class Wavefront:
    """Segment k is whole on rank k mod P: the states travel, layer by layer.

    Args:
        segments: of the whole sequence.
        like: a state.
    """

    def __init__(self, context: SequenceContext, layers: int, segments: int, cuts: Cuts, like: State) -> None:
        self._context, self._layers, self._segments, self._cuts, self._like = context, layers, segments, cuts, like
        self._alone = Carried(layers, cuts)
        self._token = like[0].new_zeros((), requires_grad=torch.is_grad_enabled())

    def enter(self, number: int, h: Tensor) -> Tensor:
        """See :class:`Carried`."""
        if self._context.degree == 1:
            return self._alone.enter(number, h)
        turn = turn_of(number, self._segments, self._context, self._cuts)
        self._relay = Relay(self._context, self._layers, *turn[:2], turn[2:], _packed(self._like))
        return self._relay.enter(h, self._token)

    def take(self, layer: int, h: Tensor) -> tuple[Tensor, State]:
        """See :class:`Carried`."""
        if self._context.degree == 1:
            return self._alone.take(layer, h)
        h, packed = self._relay.arrive(h)
        ends = [*accumulate(prod(t.shape[1:]) for t in self._like)]
        parts = packed.tensor_split(ends[:-1], dim=1)
        return h, tuple(part.view(t.shape) for part, t in zip(parts, self._like, strict=True))

    def give(self, layer: int, h: Tensor, state: State) -> Tensor:
        """See :class:`Carried`."""
        if self._context.degree == 1:
            return self._alone.give(layer, h, state)
        return self._relay.hand_on(h, _packed(state))

    def leave(self, h: Tensor) -> Tensor:
        """See :class:`Carried`."""
        if self._context.degree > 1:
            h, self._token = self._relay.leave(h)
        return h


def turn_of(
    number: int, segments: int, context: SequenceContext, cuts: Cuts
) -> tuple[int | None, int | None, bool, bool]:
    """Ranks of the segments before and after, and whether gradients go back to the one and come from the other."""
    left = (number - 1) % context.degree if number else None
    right = (number + 1) % context.degree if number + 1 < segments else None
    return left, right, not cuts(number), not cuts(number + 1)


def _packed(state: State) -> Tensor:
    """All of a state in one message, [B, ...]."""
    return torch.cat([t.flatten(1) for t in state], dim=1)
