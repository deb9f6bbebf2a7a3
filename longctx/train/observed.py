"""What mixers observed in one optimizer step: summed over all ranks, then taken in by the model's statistics."""

from torch import nn

from longctx.mixers.statistics import Observed, Statistics
from longctx.runtime.mesh import Mesh


def over_ranks(observed: Observed, mesh: Mesh) -> Observed:
    """The sums over the world, the same bits on every rank; collective, one reduction per statistic."""
    # A copy: reducing is in place, and these may be all that a micro-batch gave.
    totals = {name: mesh.all_reduce(total.clone()) for name, total in observed.sums.items()}
    return Observed(mesh.all_reduce(observed.loss_sum.double()), totals)


def absorb(model: nn.Module, observed: Observed) -> None:
    """Give every statistic of the model its total; after the update, so that a skipped step moves none."""
    for name, total in observed.sums.items():
        owner = model.get_submodule(name)
        assert isinstance(owner, Statistics)
        owner.absorb(total)
