"""AdamW with decoupled decay groups, able to sit out a step.

Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101).
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from longctx.config.schema import Train

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW; while ``held`` is set, :meth:`step` changes nothing, whatever engine calls it."""

    held: bool = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters unless held. A held step leaves parameters, moments and step counts untouched."""
        return None if self.held else super().step(closure)

    @property
    def updates(self) -> int:
        """Steps applied so far."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    def prepare_state(self, tensor: torch.Tensor, steps: int) -> None:
        """State of one parameter tensor after ``steps`` updates, moments zero; replaces what was there."""
        self.state[tensor] = {
            "step": torch.tensor(float(steps)), **{name: torch.zeros_like(tensor) for name in MOMENTS}
        }  # fmt: skip


def build_optimizer(parameters: Iterable[nn.Parameter], train: Train) -> AdamW:
    """AdamW over two groups: matrices decay, norms and biases (fewer than two dimensions) do not.

    Parameters that ask for no gradient are in neither.
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in (p for p in parameters if p.requires_grad):
        (decay if parameter.dim() > 1 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=train.lr, betas=train.betas, eps=train.eps)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
