"""What a rank sends and receives, written down."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Direction = Literal["send", "receive"]


class Transfer(NamedTuple):
    """One message of this rank: ``peer`` is a rank of the world, ``bytes`` the payload."""

    kind: str
    direction: Direction
    peer: int
    bytes: int


@dataclass
class Ledger:
    """The transfers of this rank, in the order they were posted."""

    transfers: list[Transfer] = field(default_factory=list)
