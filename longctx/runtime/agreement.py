"""Failing together: what one rank cannot do, no rank goes on from."""

from collections.abc import Callable
from typing import TypeVar

import torch

from longctx.errors import LongctxError
from longctx.runtime.mesh import Mesh

T = TypeVar("T")


class FailedElsewhere(LongctxError):
    """Another rank met bad input and says what it was; this one only stops."""


def agree(mesh: Mesh, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and return its result; collective.

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
    failed = torch.zeros(mesh.world.size, dtype=torch.int64, device=mesh.device)
    failed[mesh.world.rank] = failure is not None
    ranks = mesh.all_reduce(failed).nonzero().flatten().tolist()
    if not ranks:
        return result  # type: ignore[return-value]
    if failure is not None and mesh.world.rank == ranks[0]:
        raise failure
    raise FailedElsewhere(f"rank {ranks[0]} stopped the run")
