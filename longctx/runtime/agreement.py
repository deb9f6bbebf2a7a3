"""Failing together: what one rank cannot do, no rank goes on from."""

from collections.abc import Callable
from typing import TypeVar

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
    failed = mesh.gather(failure is not None)
    if not any(failed):
        return result  # type: ignore[return-value]
    first = failed.index(1)
    if failure is not None and mesh.world.rank == first:
        raise failure
    raise FailedElsewhere(f"rank {first} stopped the run")
