"""AdamW with decoupled decay groups, able to sit out a step.

Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101).
"""

from collections.abc import Callable, Iterable
from typing import Any

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

    def prepare_state(self, tensor: torch.Tensor, steps: int) -> dict[str, Any]:
        """State of one parameter tensor after ``steps`` updates, moments zero; replaces what was there."""
        state = {"step": torch.tensor(float(steps))} | {name: torch.zeros_like(tensor) for name in MOMENTS}
        self.state[tensor] = state
        return state


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], train: Train) -> AdamW:
    """AdamW over two groups: matrices decay, norms and biases (fewer than two dimensions) do not."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named:
        # Under ZeRO-3 a parameter's own shape is that of a partition; ds_shape is the full one.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (decay if dimensions > 1 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=train.lr, betas=train.betas, eps=train.eps)
