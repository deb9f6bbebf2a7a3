"""Failing together: what one rank cannot do, no rank goes on from."""

from collections.abc import Callable
from typing import TypeVar

import torch

from longctx.errors import LongctxError
from longctx.runtime.mesh import Group, Mesh, gather_numbers

T = TypeVar("T")


class FailedElsewhere(LongctxError):
    """Another rank met bad input and says what it was; this one only stops."""


def agree(mesh: Mesh, action: Callable[[], T]) -> T:
    """:func:`agree_among` all ranks."""
    return agree_among(mesh.world, mesh.device, action)


def agree_among(group: Group, device: torch.device, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank of a group and return its result; collective.

    Raises:
        LongctxError: the failure, on the first rank that met bad input; :class:`FailedElsewhere` on all others, so
            that none waits for another and only one speaks.
    """
    failure: LongctxError | None = None
    result: T | None = None
    try:
        result = action()
    except LongctxError as error:
        failure = error
    failed = gather_numbers(failure is not None, group, device)
    if not any(failed):
        return result  # type: ignore[return-value]
    first = failed.index(1)
    if failure is not None and group.rank == first:
        raise failure
    raise FailedElsewhere(f"rank {group.ranks[first]} stopped the run")
