"""Relay: handoff for a decoder that runs whole segments, rank by rank; every layer hands a state to the next segment.

The rank of segment k runs layer l when its own layer l - 1 is done and the rank of segment k - 1 has handed on the
state of layer l: a wavefront over (segment, layer). With P ranks, N segments and L layers of equal cost, a rank is
idle for the share :func:`idle_share` of the time: ``(P - 1) / (N L / P + P - 1)`` if L >= P and P divides N.

Order: a rank posts the receives of all layers before it sends anything of that segment. The hidden states pass through
every message, and one segment through a token of the next, so autograd walks the exact reverse and chooses no order.

Legend: ``h`` hidden states of a segment, any shape; ``*`` the shape of a state.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.sequence.collectives.ledger import Direction, Transfer
from longctx.sequence.collectives.mail import Arriving, Mail
from longctx.sequence.context import SequenceContext


class Relay:
    """The messages of one segment on its rank: ``enter``, then ``arrive`` and ``hand_on`` per layer, then ``leave``.

    Args:
        layers: states that arrive, and that are handed on.
        left, right: ranks of the group that have the segments before and after; None: there is none.
        returns: whether gradients go back to the left, and come back from the right.
        like: a state [*].
    """

    def __init__(
        self, context: SequenceContext, layers: int, left: int | None, right: int | None, returns: tuple[bool, bool],
        like: Tensor,
    ) -> None:  # fmt: skip
        group, ledger = context.group, context.ledger
        self.layers, self.left, self.right, self.like = layers, left, right, like
        self.to_left, self.from_right = returns[0] and left is not None, returns[1] and right is not None
        self.there = Mail(group, group.handle, "relay", ledger)
        self.back = Mail(group, group.returning, "relay-return", ledger)
        self.arriving: list[Arriving] = []

    def enter(self, h: Tensor, token: Tensor) -> Tensor:
        """``h``; ``token`` is that of :meth:`leave` of this rank's segment before, or zero."""
        entered: Tensor = _Enter.apply(self, h, token)  # type: ignore[no-untyped-call]
        return entered

    def arrive(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """``h`` and the state [*] that the segment before hands on."""
        found: tuple[Tensor, Tensor] = _Arrive.apply(self, h)  # type: ignore[no-untyped-call]
        return found

    def hand_on(self, h: Tensor, state: Tensor) -> Tensor:
        """``h``; the state goes to the segment after."""
        handed: Tensor = _HandOn.apply(self, h, state)  # type: ignore[no-untyped-call]
        return handed

    def leave(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """``h`` and the token that this rank's next segment enters with."""
        left: tuple[Tensor, Tensor] = _Leave.apply(self, h)  # type: ignore[no-untyped-call]
        return left


def planned_relay(
    context: SequenceContext, turns: list[tuple[int | None, int | None, bool, bool]], layers: int, size: int
) -> list[Transfer]:
    """What relays of states of ``size`` bytes post on this rank, forward and then backward.

    Args:
        turns: left, right and returns of each segment of this rank, in order.
    """
    ranks = context.group.ranks

    def posts(kind: str, direction: Direction, peer: int | None) -> list[Transfer]:
        return [] if peer is None else [Transfer(kind, direction, ranks[peer], size)] * layers

    there: list[Transfer] = []
    back: list[list[Transfer]] = []
    for left, right, to_left, from_right in turns:
        there += posts("relay", "receive", left) + posts("relay", "send", right)
        returns = posts("relay-return", "receive", right if from_right else None)
        back.insert(0, returns + posts("relay-return", "send", left if to_left else None))
    return there + [transfer for turn in back for transfer in turn]


def idle_share(segments: int, layers: int, ranks: int) -> float:
    """Share of the time that ranks wait if every (segment, layer) costs the same and messages cost nothing."""
    free, handed = [0] * ranks, [0] * layers
    for segment in range(segments):
        now = free[segment % ranks]
        for layer in range(layers):
            now = handed[layer] = max(now, handed[layer]) + 1
        free[segment % ranks] = now
    return 1 - segments * layers / (ranks * max(free))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, relay: Relay, h: Tensor, token: Tensor) -> Tensor:
        ctx.relay = relay
        ctx.save_for_backward(token)
        if relay.left is not None:
            relay.arriving = [relay.there.receive(relay.left, relay.like) for _ in range(relay.layers)]
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        ctx.relay.back.close()
        return None, gradient, torch.zeros_like(ctx.saved_tensors[0])


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, relay: Relay, h: Tensor) -> tuple[Tensor, Tensor]:
        ctx.relay = relay
        return h.view_as(h), relay.arriving.pop(0).land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, dstate: Tensor) -> tuple[None, Tensor]:
        if ctx.relay.to_left:
            ctx.relay.back.send(ctx.relay.left, dstate)
        return None, gradient


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, relay: Relay, h: Tensor, state: Tensor) -> Tensor:
        ctx.relay = relay
        assert relay.right is not None
        relay.there.send(relay.right, state.detach())
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None]:
        return None, gradient, ctx.relay.arriving.pop(0).land() if ctx.relay.from_right else None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, relay: Relay, h: Tensor) -> tuple[Tensor, Tensor]:
        ctx.relay = relay
        relay.there.close()
        return h.view_as(h), h.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[None, Tensor]:
        relay = ctx.relay
        if relay.from_right:
            relay.arriving = [relay.back.receive(relay.right, relay.like) for _ in range(relay.layers)]
        return None, gradient
